#!/usr/bin/env python3
"""What certferry costs, beside its peers: `python3 tests/bench.py [--quick]` prints one table.

Every row runs certferry and its neighbour in turn, A B A B, after one run of each that does not
count; it shows medians, their ranges in parentheses, and the median of the ratios of the pairs.
Only public tools are used; a peer that is not installed is named as missing. The upstream is nginx
with one worker, or a Python server in a process of its own. Everything is on the loopback.
"""

import argparse
import base64
import collections
import getpass
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

# Run as a script, Python looks for modules in tests/ only.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world  # noqa: E402

PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
IMPORT_SSL = [sys.executable, "-I", "-c", "import ssl"]

# The least that many handshakes can cost in Python: the same threads, no decision, nothing read.
BARE_LOOP = """
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
jobs = iter(range(int(sys.argv[2])))
def work():
    for _ in jobs:
        with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as plain:
            with context.wrap_socket(plain, server_hostname="example.com") as tls:
                tls.getpeercert(True)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log crit;
events {{ worker_connections 900; }}
http {{
    access_log off;
    server_names_hash_bucket_size 128;
    server_names_hash_max_size 4096;
    {temporary}
    {servers}
}}
"""
SERVER = ("server {{ listen 127.0.0.1:{port} ssl; server_name {name};"
          " ssl_certificate {0.fullchain}; ssl_certificate_key {0.key}; }}\n    ")

CERTBOT_RENEWAL = """\
version = 2.1.0
archive_dir = {config}/archive/{name}
cert = {live}/cert.pem
privkey = {live}/privkey.pem
chain = {live}/chain.pem
fullchain = {live}/fullchain.pem
[renewalparams]
account = 00000000000000000000000000000000
authenticator = standalone
server = https://localhost/directory
key_type = ecdsa
"""

# The steps of a run by the section of certferry.py in which its time is spent.
STEPS = {"Sources": "exchange", "OpenSSL": "verify", "Versions": "storage", "Hooks": "hooks"}


# ---------------------------------------------------------------- measuring

def timed(command, status=0):
    """Run a command and return the seconds it took; AssertionError where it ends otherwise."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    output = process.communicate()[0]
    elapsed = time.monotonic() - started
    if process.returncode != status:
        raise AssertionError("{}: status {}:\n{}".format(
            " ".join(command), process.returncode, output.decode("utf-8", "replace")[-2000:]))
    return elapsed


def in_turn(rounds, *commands):
    """Run commands A B A B; return a list of seconds for each."""
    for command in commands:
        timed(command)
    taken = [[] for _ in commands]
    for _ in range(rounds):
        for seconds, command in zip(taken, commands):
            seconds.append(timed(command))
    return taken


def spread(values, unit=1000.0, form="{:.0f}"):
    """A median and its range as text, milliseconds unless told otherwise."""
    low, middle, high = (form.format(function(values) * unit)
                         for function in (min, statistics.median, max))
    return "{} ({}-{})".format(middle, low, high)


class Table:
    """Rows, printed as they are known; in Markdown, as the README quotes it."""

    HEAD = ("what", "certferry", "beside it", "", "ratio", "aim")
    WIDTHS = (34, 20, 26, 20, 18, 12)

    def __init__(self):
        self.missing = []
        self.row(*self.HEAD)
        self.row(*("-" * width for width in self.WIDTHS))

    def row(self, *cells):
        """Print one row."""
        padded = (cell.ljust(width) for cell, width in zip(cells, self.WIDTHS))
        print("| " + " | ".join(padded) + " |", flush=True)

    def pair(self, what, ours, peer, theirs, aim, slower=True):
        """Print a comparison; slower=False shows how many times longer the peer takes."""
        ratios = [a / b if slower else b / a for a, b in zip(ours, theirs)]
        self.row(what, spread(ours) + " ms", peer, spread(theirs) + " ms",
                 ("{}" if slower else "1 : {}").format(spread(ratios, 1, "{:.2f}")), aim)

    def fact(self, what, text, aim=""):
        """Print a figure that stands alone."""
        self.row(what, text, "", "", "", aim)

    def miss(self, peer, why):
        """Remember a peer that could not be measured."""
        self.missing.append("{} ({})".format(peer, why))


def have(*tools):
    """The first of these commands that is missing, or None."""
    return next((tool for tool in tools if shutil.which(tool, path=PATH) is None), None)


# ---------------------------------------------------------------- upstreams

class Daemon:
    """A server in a process of its own that listens on .port; a context manager."""

    def __init__(self, command, port):
        self.port = port
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            world.eventually(self._answers)
        except AssertionError:
            self.__exit__()
            raise

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError("it ended with status {}".format(self.process.returncode))
        try:
            world.socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def upstream(folder, shown):
    """Start an upstream that shows {host name: Credential}, the first to who asks for another."""
    port = world.free_port()
    if have("nginx"):
        paths = [path for name, credential in shown.items() for path in (name,) + credential]
        return Daemon([sys.executable, os.path.abspath(__file__), "--serve", str(port)] + paths,
                      port)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    config = world.write(os.path.join(folder, "nginx.conf"), NGINX.format(
        folder=folder,
        temporary=" ".join("{0}_temp_path {1}/{0};".format(kind, folder) for kind in kinds),
        servers="".join(SERVER.format(credential, port=port, name=name)
                        for name, credential in shown.items())))
    return Daemon([shutil.which("nginx", path=PATH), "-p", folder, "-c", config], port)


def serve(port, *paths):
    """Be the upstream where there is no nginx: name, key, cert, chain, fullchain, name, ..."""
    shown = collections.OrderedDict(
        (paths[at], world.Credential(*paths[at + 1:at + 5])) for at in range(0, len(paths), 5))
    with world.Upstream(next(iter(shown.values())), port=int(port), hosts=shown):
        signal.pause()


# ---------------------------------------------------------------- downstreams

def names(count):
    """That many host names under example.com."""
    return ["host{:04d}.example.com".format(number) for number in range(count)]


class Host:
    """A config dir with lineages that are ferried from one port."""

    def __init__(self, folder, root):
        self.folder, self.root = folder, root
        self.config = os.path.join(folder, "letsencrypt")
        self.records = os.path.join(self.config, "certferry")
        os.makedirs(self.records, 0o700)
        os.chmod(self.config, 0o755)

    def add(self, name, port, key):
        """Set up a lineage as cloud-init does: a key and a NAME.conf."""
        live = os.path.join(self.config, "live", name)
        os.makedirs(live)
        world.write(os.path.join(live, "privkey.pem"), world.read(key), 0o600)
        world.write(os.path.join(self.records, name + ".conf"),
                    "from = 127.0.0.1:{}\nca-file = {}\n".format(port, self.root), 0o600)

    def command(self, *words):
        """The command that runs certferry here."""
        return [sys.executable, world.CERTFERRY] + list(words) + ["--config-dir", self.config]


def host_with(bench, count):
    """A Host with that many lineages of one wildcard certificate, in service."""
    host = Host(world.tempfile.mkdtemp(dir=bench.folder), bench.authority.root)
    first, *others = names(count)
    host.add(first, bench.port, bench.shown.key)
    timed(host.command("renew", "-q"))
    for name in others:  # by copies of the first one, which takes a tenth of the time
        for path in ("archive/{}@1", "live/{}", "certferry/{}.conf", "certferry/{}.state"):
            source, target = (os.path.join(host.config, path.format(each))
                              for each in (first, name))
            if os.path.isdir(source):
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target)
        current = os.path.join(host.config, "live", name, ".current")
        os.unlink(current)
        os.symlink("../../archive/{}@1".format(name), current)
    timed(host.command("renew", "-q"))  # the keys are new files: looked at once
    return host


# ---------------------------------------------------------------- peers

def certbot(bench, count):
    """The command of a `certbot renew` with nothing due; AssertionError where there is none."""
    folder = world.tempfile.mkdtemp(dir=bench.folder)
    config = os.path.join(folder, "certbot")
    os.makedirs(os.path.join(config, "renewal"))
    for name in names(count):
        live, archive = (os.path.join(config, kind, name) for kind in ("live", "archive"))
        os.makedirs(live)
        os.makedirs(archive)
        for file in bench.shown._fields:
            kind = {"key": "privkey"}.get(file, file)
            target = os.path.join(archive, kind + "1.pem")
            shutil.copy(getattr(bench.shown, file), target)
            os.symlink(os.path.relpath(target, live), os.path.join(live, kind + ".pem"))
        world.write(os.path.join(config, "renewal", name + ".conf"),
                    CERTBOT_RENEWAL.format(config=config, name=name, live=live))
    command = ["certbot", "renew", "-q", "-n", "--no-random-sleep-on-renew", "--config-dir", config,
               "--work-dir", folder + "/work", "--logs-dir", folder + "/logs"]
    timed(command)
    return command


def one_liner(bench):
    """The check that people write themselves: what does the server show, is it what is here?"""
    script = ('new=$(openssl s_client -connect 127.0.0.1:{} -servername example.com </dev/null '
              '2>/dev/null | openssl x509 -noout -fingerprint -sha256) && '
              '[ "$new" = "$(openssl x509 -noout -fingerprint -sha256 -in {})" ]')
    return ["sh", "-c", script.format(bench.port, bench.shown.cert)]


class Ssh(Daemon):
    """An sshd of our own; .rsync is the command that finds nothing to fetch through it."""

    def __init__(self, bench):
        folder = world.tempfile.mkdtemp(dir=bench.folder)
        port, key = world.free_port(), folder + "/key"
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # made by its unit, needed without it too
        subprocess.check_call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
        shutil.copy(key + ".pub", folder + "/authorized")
        config = world.write(folder + "/sshd_config", (
            "ListenAddress 127.0.0.1:{0}\nHostKey {1}/key\nAuthorizedKeysFile {1}/authorized\n"
            "StrictModes no\nPidFile none\nPermitRootLogin yes\n").format(port, folder))
        super().__init__([shutil.which("sshd", path=PATH), "-D", "-f", config], port)
        shutil.copytree(os.path.dirname(bench.shown.cert), folder + "/copy")
        shell = ("ssh -F none -p {} -i {} -o BatchMode=yes -o StrictHostKeyChecking=no "
                 "-o UserKnownHostsFile={}/known").format(port, key, folder)
        self.rsync = ["rsync", "-rlt", "-e", shell, "{}@127.0.0.1:{}/".format(
            getpass.getuser(), os.path.dirname(bench.shown.cert)), folder + "/copy/"]


class Directory(http.server.BaseHTTPRequestHandler):
    """As much of an ACME server as clients ask for when nothing is due."""

    def do_GET(self):
        """The directory, whatever is asked."""
        here = "http://127.0.0.1:{}/".format(self.server.server_port)
        kinds = ("newNonce", "newAccount", "newOrder", "revokeCert", "keyChange")
        body = json.dumps(dict({kind: here + kind for kind in kinds},
                               meta={"termsOfService": here})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


def dehydrated(bench, directory):
    """The command of a dehydrated run with nothing due."""
    folder = world.tempfile.mkdtemp(dir=bench.folder)
    authority = directory + "directory"
    hashed = base64.urlsafe_b64encode(authority.encode() + b"\n").decode().rstrip("=")
    account = os.path.join(folder, "accounts", hashed)
    certificates = os.path.join(folder, "certs", "example.com")
    for path in (account, certificates):
        os.makedirs(path)
    for file, source in (("cert.pem", "cert"), ("privkey.pem", "key"), ("chain.pem", "chain"),
                         ("fullchain.pem", "fullchain")):
        shutil.copy(getattr(bench.shown, source), os.path.join(certificates, file))
    world.openssl("genrsa", "-out", account + "/account_key.pem", "2048")
    world.write(account + "/registration_info.json", '{"status": "valid"}')
    world.write(account + "/account_id.json", json.dumps({"url": directory + "account"}))
    world.write(folder + "/domains.txt", "example.com *.example.com > example.com\n")
    os.makedirs(folder + "/challenges")
    config = world.write(folder + "/config", (
        "CA={0}\nBASEDIR={1}\nDOMAINS_TXT={1}/domains.txt\nCERTDIR={1}/certs\n"
        "WELLKNOWN={1}/challenges\nCHALLENGETYPE=dns-01\nHOOK=/bin/true\n").format(
            authority, folder))
    return ["dehydrated", "--cron", "--accept-terms", "--config", config]


def lego(bench, directory):
    """The command of a `lego renew` with nothing due."""
    folder = world.tempfile.mkdtemp(dir=bench.folder)
    authority, mail = directory + "directory", "hostmaster@example.com"
    account = os.path.join(folder, "accounts", authority.split("/")[2].replace(":", "_"), mail)
    for path in (account + "/keys", folder + "/certificates"):
        os.makedirs(path)
    world.openssl("ecparam", "-name", "secp384r1", "-genkey", "-noout",
                  "-out", "{}/keys/{}.key".format(account, mail))
    world.write(account + "/account.json", json.dumps({
        "email": mail,
        "registration": {"body": {"status": "valid"}, "uri": directory + "account"}}))
    base = folder + "/certificates/example.com"
    for end, source in ((".crt", bench.shown.fullchain), (".key", bench.shown.key)):
        shutil.copy(source, base + end)
    world.write(base + ".json", json.dumps({"domain": "example.com"}))
    return ["lego", "--server", authority, "--accept-tos", "--email", mail, "--path", folder,
            "--domains", "example.com", "--http", "renew"]


# ---------------------------------------------------------------- memory, processes, steps

def memory(command):
    """Return (KiB of the largest process, KiB of all, shared pages counted once) at their peaks."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    together, ended, usage = 0, 0, None
    while not ended:
        together = max(together, sum(map(_proportional, _family_of(process.pid))))
        ended, _, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = 0
    return usage.ru_maxrss, together


def _family_of(pid):
    """A process and its children, and theirs."""
    try:
        with open("/proc/{0}/task/{0}/children".format(pid)) as file:
            children = file.read().split()
    except OSError:
        children = ()
    return [pid] + [each for child in children for each in _family_of(int(child))]


def _proportional(pid):
    """KiB of a process, pages shared by two counted half in each; 0 where that is not told."""
    try:
        with open("/proc/{}/smaps_rollup".format(pid)) as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except OSError:
        return 0


def processes(command, folder):
    """Return [program of each process that a command starts] as strace sees them."""
    logs = world.tempfile.mkdtemp(dir=folder)
    subprocess.check_call(["strace", "-ff", "-qq", "-e", "signal=none", "-e",
                           "trace=execve,clone,clone3,fork,vfork", "-o", logs + "/of"] + command,
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    texts = {name[3:]: world.read(os.path.join(logs, name)).decode("utf-8", "replace")
             for name in os.listdir(logs)}
    births = [line for text in texts.values() for line in text.splitlines()
              if re.match("(clone3?|v?fork)\\(", line) and "CLONE_THREAD" not in line]
    started = [line.rsplit("= ", 1)[1] for line in births if not line.endswith(")")]
    return [_program(texts.get(pid, "")) for pid in started]


def _program(log):
    """What a process has become by its last execve: "openssl verify", say."""
    runs = re.findall(r'execve\("([^"]*)", \["[^"]*"(?:, "([^"]*)")?.*= 0$', log, re.M)
    if not runs:
        return "certferry's own"
    return " ".join(filter(None, (os.path.basename(runs[-1][0]), runs[-1][1])))


def sample(path, arguments):
    """Run certferry in this process, looking every millisecond at where it is; write a report.

    The step is the section of the outermost frame that is in one of STEPS: a process that the
    storage of a version needs belongs to storage.
    """
    banners = re.compile(r"^# -+\n# (.*)\n# -+$", re.M)
    text = world.read(world.CERTFERRY).decode()
    starts = [(text.count("\n", 0, banner.start()), banner.group(1))
              for banner in banners.finditer(text)]
    spent, last = collections.Counter(), [time.monotonic()]

    def look(_, frame):
        step = "the rest"
        while frame:
            if frame.f_code.co_filename == world.CERTFERRY:
                before = [name for number, name in starts
                          if number < frame.f_code.co_firstlineno]
                step = STEPS.get(before[-1] if before else "", step)
            frame = frame.f_back
        now = time.monotonic()
        spent[step] += now - last[0]
        last[0] = now

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    sys.argv = [world.CERTFERRY] + arguments
    leave, ours = os._exit, os.getpid()
    # it leaves without taking the interpreter down: here the figures are due, but not in a child
    os._exit = lambda status: sys.exit(status) if os.getpid() == ours else leave(status)
    try:
        runpy.run_path(world.CERTFERRY, run_name="__main__")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        world.write(path, json.dumps(spent))


# ---------------------------------------------------------------- the rows

class Bench:
    """What all rows share: the folder, the authority, an upstream with a wildcard certificate."""

    def __init__(self, folder, quick):
        self.folder, self.quick = folder, quick
        self.authority = world.Authority(folder)
        self.shown = self.authority.issue(["example.com", "*.example.com"])
        self.table, self.port = None, None

    def rounds(self, count):
        """How often a pair is run."""
        return max(3, count // 4) if self.quick else count


def one_lineage(bench):
    """One lineage, unchanged, beside what else an administrator could run."""
    table, host = bench.table, Host(bench.folder + "/one", bench.authority.root)
    host.add("example.com", bench.port, bench.shown.key)
    timed(host.command("renew"))
    renew = host.command("renew")

    def beside(peer, command, aim, rounds=21, slower=False):
        ours, theirs = in_turn(bench.rounds(rounds), renew, command)
        table.pair("one lineage, unchanged", ours, peer, theirs, aim, slower)

    beside("python3 -I -c 'import ssl'", IMPORT_SSL, "2.0 at most", 41, True)
    tries = [("certbot renew", ["certbot"], lambda: certbot(bench, 1), "1 : 4"),
             ("s_client + x509", ["openssl"], lambda: one_liner(bench), "")]
    for peer, needed, make, aim in tries:
        _try(table, peer, needed, lambda make=make, peer=peer, aim=aim: beside(peer, make(), aim))
    _try(table, "rsync over ssh", ["rsync", "ssh", "sshd", "ssh-keygen"],
         lambda: _beside_rsync(bench, beside))
    for peer, needed, make in (("dehydrated --cron", ["dehydrated", "curl"], dehydrated),
                               ("lego renew", ["lego"], lego)):
        _try(table, peer, needed, lambda peer=peer, make=make: _beside_client(
            bench, beside, peer, make))
    peaks = [memory(renew) for _ in range(bench.rounds(8))]
    _memory_row(table, "one lineage, peak memory", peaks, "24 MiB")


def _try(table, peer, needed, measure):
    """Measure a peer, or remember why not."""
    missing = have(*needed)
    if missing:
        table.miss(peer, "no " + missing)
        return
    try:
        measure()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        table.miss(peer, " ".join(str(error).split())[:200])


def _beside_rsync(bench, beside):
    with Ssh(bench) as ssh:
        beside("rsync over ssh", ssh.rsync, "1 : 5", 13)


def _beside_client(bench, beside, peer, make):
    """An ACME client, with an authority to ask."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Directory)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        beside(peer, make(bench, "http://127.0.0.1:{}/".format(server.server_port)), "", 13)
    finally:
        server.shutdown()
        server.server_close()


def _memory_row(table, what, peaks, aim):
    largest, together = zip(*peaks)
    table.fact(what, spread(largest, 1 / 1024, "{:.1f}") + " MiB", aim)
    if any(together):
        table.row("  both processes together (PSS)", spread(together, 1 / 1024, "{:.1f}") + " MiB",
                  "", "", "", "")


def many_lineages(bench):
    """100 and 1,000 lineages, unchanged."""
    medians = [_many(bench, *how) for how in ((100, 9, "", "", ""),
                                              (1000, 5, "1.4 at most", "1 : 2", "32 MiB"))]
    bench.table.fact("1,000 lineages against 100", "{:.1f} times".format(medians[1] / medians[0]),
                     "12 at most")


def _many(bench, count, rounds, aim, peer_aim, memory_aim):
    """The rows of that many lineages; return the median seconds of their run."""
    table, host = bench.table, host_with(bench, count)
    what, renew = "{:,} lineages, unchanged".format(count), host.command("renew", "-q")
    loop = [sys.executable, "-I", "-c", BARE_LOOP, str(bench.port), str(count)]
    ours, theirs = in_turn(bench.rounds(rounds), renew, loop)
    table.pair(what, ours, "bare loop, 8 threads", theirs, aim)

    def beside_certbot():
        both = in_turn(3, renew, certbot(bench, count))
        table.pair(what, both[0], "certbot renew", both[1], peer_aim, slower=False)

    _try(table, "certbot renew, {:,}".format(count), ["certbot"], beside_certbot)
    _memory_row(table, "{:,} lineages, peak memory".format(count), [
        memory(renew) for _ in range(3)], memory_aim)
    silent(bench, host, renew)
    return statistics.median(ours)


def silent(bench, host, renew):
    """The same with ten more lineages, whose one upstream never answers within two seconds."""
    with world.Silent() as dead:
        for name in ["dead{}.example.com".format(number) for number in range(10)]:
            host.add(name, dead.port, bench.shown.key)
            with open(os.path.join(host.records, name + ".conf"), "a") as file:
                file.write("timeout = 2\n")
        bench.table.fact("  and 10 of a dead upstream (2 s)",
                         "{:.1f} s".format(timed(renew, status=1)))


def many_changed(bench):
    """200 new certificates in one run with one post hook, then the processes that 20 take."""
    count = 40 if bench.quick else 200
    table, hosts = bench.table, names(count)
    first = {name: bench.authority.issue([name], key=bench.shown.key) for name in hosts}
    second = {name: bench.authority.issue([name], key=bench.shown.key) for name in hosts}
    folder = world.tempfile.mkdtemp(dir=bench.folder)
    os.chmod(folder, 0o755)
    with upstream(folder, first) as before:
        host = Host(folder + "/host", bench.authority.root)
        for name in hosts:
            host.add(name, before.port, bench.shown.key)
        timed(host.command("renew", "-q"))
    post = os.path.join(host.config, "renewal-hooks", "post")
    os.makedirs(post)
    world.write(post + "/reload", "#!/bin/sh\n", 0o755)
    report = os.path.join(folder, "steps.json")
    backup = shutil.copytree(host.config, folder + "/backup", symlinks=True)
    with upstream(folder, second) as after:
        for where in (host.config, backup):
            _redirect(where, after.port)
        whole = timed(host.command("renew", "-q"))
        host.config = backup
        timed([sys.executable, os.path.abspath(__file__), "--steps", report]
              + host.command("renew", "-q")[2:])
    what = "{} changed in one run".format(count)
    table.fact(what, "{:.2f} s, {:.1f} ms each".format(whole, whole * 1000 / count))
    steps = json.loads(world.read(report).decode())
    for step in list(STEPS.values()) + ["the rest"]:
        table.fact("  {}, each".format(step), "{:.1f} ms".format(steps.get(step, 0) * 1000 / count))


def _redirect(config, port):
    """Point every lineage of a config dir at another port."""
    folder = os.path.join(config, "certferry")
    for name in os.listdir(folder):
        if name.endswith(".conf"):
            path = os.path.join(folder, name)
            world.write(path, re.sub("127.0.0.1:[0-9]+", "127.0.0.1:{}".format(port),
                                     world.read(path).decode()))


def processes_started(bench):
    """The processes that 20 changed lineages start, beyond those of a run that changes nothing."""
    table, count = bench.table, 20
    if have("strace"):
        table.miss("processes per changed lineage", "no strace")
        return
    folder = world.tempfile.mkdtemp(dir=bench.folder)
    os.chmod(folder, 0o755)
    newer = bench.authority.issue(["example.com", "*.example.com"], key=bench.shown.key)
    host = host_with(bench, count)
    usual = processes(host.command("renew", "-q"), folder)
    with upstream(folder, {"example.com": newer}) as after:
        _redirect(host.config, after.port)
        changed = collections.Counter(processes(host.command("renew", "-q"), folder))
    changed.subtract(usual)
    table.fact("processes per changed lineage", "{:.1f}".format(sum(changed.values()) / count),
               "4, +1 s_client")
    for program, times in sorted(changed.items()):
        if times:
            table.fact("  " + program, "{:.1f}".format(times / count))


def status(bench):
    """`status` from the disk."""
    for count, aim in ((400, "4 at most"), (1000, "6 at most")):
        host = host_with(bench, count)
        ours, theirs = in_turn(bench.rounds(9), host.command("status"), IMPORT_SSL)
        bench.table.pair("status of {:,} lineages".format(count), ours,
                         "python3 -I -c 'import ssl'", theirs, aim)


def machine():
    """One paragraph about what this was measured on."""
    model = "unknown processor"
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", world.read("/proc/cpuinfo").decode())
        model = found.group(1) if found else model
    versions = ["Python " + sys.version.split()[0], world.openssl("version").split(" (")[0].strip()]
    for command, pattern in ((["nginx", "-v"], r"nginx/\S+"),
                             (["certbot", "--version"], r"certbot \S+")):
        if not have(command[0]):
            command[0] = shutil.which(command[0], path=PATH)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            versions += re.findall(pattern, done.stdout.decode("utf-8", "replace"))[:1]
    return "{} x {}, load {:.1f}; {}; certferry.py: {} lines".format(
        os.cpu_count(), model, os.getloadavg()[0], ", ".join(versions),
        world.read(world.CERTFERRY).count(b"\n"))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 40 changed lineages")
    parser.add_argument("only", nargs="*", help="one, many, changed, processes, status")
    options = parser.parse_args()
    sections = collections.OrderedDict((
        ("one", one_lineage), ("many", many_lineages), ("changed", many_changed),
        ("processes", processes_started), ("status", status)))
    print(machine() + "\n")
    folder = world.scratch()
    os.chmod(folder, 0o755)
    bench = Bench(folder, options.quick)
    with upstream(folder, {"example.com": bench.shown}) as shown:
        bench.port, bench.table = shown.port, Table()
        for word, measure in sections.items():
            if word in (options.only or sections):
                measure(bench)
    for each in bench.table.missing:
        print("missing: " + each)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["--steps"]:
        sample(sys.argv[2], sys.argv[3:])
    else:
        main()
