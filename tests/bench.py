#!/usr/bin/env python3
"""What certferry costs, beside its neighbours: prints one table, in Markdown.

certferry is installed by install.sh into a temporary folder, and the installed
command is measured. Each row runs it and its neighbour in turn, A B A B, after
one run of each that does not count, and shows medians, their ranges in
parentheses, and the median of the ratios of the pairs. A neighbour that is not
installed is named as missing. Everything is on the loopback. The upstream is
nginx with one worker, or where there is none a Python server in a process of
its own.
"""

import argparse
import os
import re
import sys

try:
    import collections
    import getpass
    import json
    import runpy
    import shutil
    import signal
    import statistics
    import subprocess
    import tempfile
    import time

    # Run as a script, Python looks for modules in tests/ only.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from tests import world
except ImportError as error:
    sys.exit("bench.py: this Python has no {}. Try: apt-get install python3".format(error.name))

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
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {servers}
}}
"""
SERVER = """
    server {{
        listen 127.0.0.1:{port} ssl;
        server_name {name};
        ssl_certificate {shown.fullchain};
        ssl_certificate_key {shown.key};
    }}
"""

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

SSHD = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
PermitRootLogin yes
"""

# The steps of a run by the section of certferry.py in which its time is spent.
STEPS = {"Sources": "exchange", "Processes": "verify", "Store": "storage", "Hooks": "hooks"}

# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def timed(command, status=0):
    """Run a command and return the seconds it took; AssertionError where it ends otherwise."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.communicate()[0]
    elapsed = time.monotonic() - started
    if process.returncode != status:
        what = "{}: status {}:\n{}"
        text = output.decode("utf-8", "replace")[-2000:]
        raise AssertionError(what.format(" ".join(command), process.returncode, text))
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
    """Return a median and its range as text, of seconds in milliseconds unless told otherwise."""
    three = min(values), statistics.median(values), max(values)
    low, middle, high = [form.format(value * unit) for value in three]
    return "{} ({}-{})".format(middle, low, high)


def memory(command):
    """Return KiB that a command and its children take at their peak, shared pages counted once."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        taken = kibibytes(process.pid, "Rss:")
        for child in children_of(process.pid):
            # What a forked child shares, it shares with its parent.
            taken += kibibytes(child, "Private_Clean:", "Private_Dirty:")
        peak = max(peak, taken)
    return peak


def children_of(pid):
    """Return the children of a process, and theirs."""
    try:
        with open("/proc/{0}/task/{0}/children".format(pid)) as file:
            children = [int(word) for word in file.read().split()]
    except OSError:
        return []
    return children + [inner for child in children for inner in children_of(child)]


def kibibytes(pid, *fields):
    """Return the sum of some fields of Linux's account of a process's memory; 0 without one."""
    try:
        with open("/proc/{}/smaps_rollup".format(pid)) as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(fields))
    except OSError:
        return 0


def processes(command, folder):
    """Return [program of each process that a command starts], as strace sees them."""
    logs = tempfile.mkdtemp(dir=folder)
    calls = "trace=execve,clone,clone3,fork,vfork"
    strace = ["strace", "-ff", "-qq", "-e", "signal=none", "-e", calls, "-o", logs + "/of"]
    subprocess.check_call(strace + command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    texts = {}
    for name in os.listdir(logs):
        text = world.read(os.path.join(logs, name)).decode("utf-8", "replace")
        texts[name.split(".")[-1]] = text
    born = r"^(?:clone3?|v?fork)\((?!.*CLONE_THREAD).*= (\d+)$"
    found = [re.findall(born, text, re.M) for text in texts.values()]
    return [program(texts.get(pid, "")) for started in found for pid in started]


def program(log):
    """Return what a process has become by its last execve: "openssl verify", say."""
    run = r'execve\("([^"]*)", \["[^"]*"(?:, "([^"]*)")?.*= 0$'
    runs = re.findall(run, log, re.M)
    if not runs:
        return "certferry's own"
    path, word = runs[-1]
    return "{} {}".format(os.path.basename(path), word).strip()


class Table:
    """Rows, printed as they are known."""

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

    def pair(self, what, ours, neighbour, theirs, aim):
        """Print how many times as long as its neighbour's ours takes."""
        ratios = [mine / other for mine, other in zip(ours, theirs)]
        ratio = spread(ratios, 1, "{:.2f}")
        self.row(what, spread(ours) + " ms", neighbour, spread(theirs) + " ms", ratio, aim)

    def times(self, what, ours, neighbour, theirs, aim):
        """Print how many times as long as ours its neighbour's takes."""
        ratios = [other / mine for mine, other in zip(ours, theirs)]
        ratio = "1 : " + spread(ratios, 1, "{:.1f}")
        self.row(what, spread(ours) + " ms", neighbour, spread(theirs) + " ms", ratio, aim)

    def fact(self, what, text, aim=""):
        """Print a figure that stands alone."""
        self.row(what, text, "", "", "", aim)

    def memory(self, what, command, rounds, aim):
        """Measure what a command and its children take, and print it."""
        peaks = [memory(command) for _ in range(rounds)]
        if min(peaks):
            self.fact(what, spread(peaks, 1 / 1024, "{:.1f}") + " MiB", aim)
        else:
            self.missing.append(what + " (no /proc)")


def lacking(*tools):
    """Return the first of these commands that is not installed, or None."""
    for tool in tools:
        if shutil.which(tool, path=PATH) is None:
            return tool
    return None


# --------------------------------------------------------------------------------------------------
# Upstreams
# --------------------------------------------------------------------------------------------------


class Daemon:
    """A server in a process of its own that listens on .port; a context manager."""

    def __init__(self, command, port):
        self.port = port
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
        try:
            world.eventually(self.answers)
        except AssertionError:
            self.__exit__()
            raise

    def answers(self):
        """Return whether it listens; AssertionError where it has ended."""
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
    if lacking("nginx"):
        command = [sys.executable, os.path.abspath(__file__), "--serve", str(port)]
        for name, credential in shown.items():
            command.append(name)
            command.extend(credential)
        return Daemon(command, port)
    servers = [SERVER.format(port=port, name=name, shown=one) for name, one in shown.items()]
    text = NGINX.format(folder=folder, servers="".join(servers))
    config = world.write(os.path.join(folder, "nginx.conf"), text)
    return Daemon([shutil.which("nginx", path=PATH), "-p", folder, "-c", config], port)


def serve(port, *words):
    """Be the upstream where there is no nginx: name, key, cert, chain, fullchain, name, ..."""
    shown = collections.OrderedDict()
    for start in range(0, len(words), 5):
        shown[words[start]] = world.Credential(*words[start + 1 : start + 5])
    with world.Upstream(next(iter(shown.values())), port=int(port), hosts=shown):
        signal.pause()


# --------------------------------------------------------------------------------------------------
# certferry and its neighbours
# --------------------------------------------------------------------------------------------------


def install(folder):
    """Install certferry into a folder, by install.sh; return the path of the command."""
    for file in ("install.sh", "certferry.service", "certferry.timer"):
        shutil.copy(os.path.join(world.REPOSITORY, file), folder)
    shutil.copy(world.SCRIPT, os.path.join(folder, "certferry.py"))
    root = os.path.join(folder, "root")
    environment = dict(os.environ, DESTDIR=root, PREFIX="/usr", PYTHON=sys.executable)
    subprocess.check_call(
        ["sh", folder + "/install.sh"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    command = os.path.join(root, "usr/bin/certferry")
    launcher = world.read(command).decode()
    # It is made for a root that is mounted as / later.
    world.write(command, launcher.replace('"/usr/lib', '"{}/usr/lib'.format(root)))
    return command


def names(count):
    """Return that many host names under example.com."""
    return ["host{:04d}.example.com".format(number) for number in range(count)]


class Host:
    """A config dir with lineages that are ferried from one port."""

    def __init__(self, folder, bench):
        self.program = bench.program
        self.root = bench.authority.root
        self.config = os.path.join(folder, "letsencrypt")
        self.records = os.path.join(self.config, "certferry")
        os.makedirs(self.records, 0o700)
        os.chmod(self.config, 0o755)

    def add(self, name, port, key, *lines):
        """Set up a lineage as cloud-init does: a key and a NAME.conf."""
        live = os.path.join(self.config, "live", name)
        os.makedirs(live)
        world.write(os.path.join(live, "privkey.pem"), world.read(key), 0o600)
        conf = ["from = 127.0.0.1:{}".format(port), "ca-file = " + self.root]
        text = "".join(line + "\n" for line in conf + list(lines))
        world.write(os.path.join(self.records, name + ".conf"), text, 0o600)

    def copy(self, first, name):
        """Make one more lineage, a copy of another: a tenth of the time that a crossing takes."""
        for kind in ("archive/{}@1", "live/{}", "certferry/{}.conf", "certferry/{}.state"):
            source = os.path.join(self.config, kind.format(first))
            target = os.path.join(self.config, kind.format(name))
            if os.path.isdir(source):
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy2(source, target)
        current = os.path.join(self.config, "live", name, ".current")
        os.unlink(current)
        os.symlink("../../archive/{}@1".format(name), current)

    def redirect(self, port):
        """Point every lineage at another port."""
        for name in os.listdir(self.records):
            if name.endswith(".conf"):
                path = os.path.join(self.records, name)
                text = world.read(path).decode()
                world.write(path, re.sub("127.0.0.1:[0-9]+", "127.0.0.1:%d" % port, text))

    def command(self, *words):
        """Return the command that runs certferry here."""
        return [self.program] + list(words) + ["--config-dir", self.config]


def host_with(bench, count):
    """Return a Host with that many lineages of one wildcard certificate, in service."""
    host = Host(tempfile.mkdtemp(dir=bench.folder), bench)
    first, *others = names(count)
    host.add(first, bench.port, bench.shown.key)
    timed(host.command("renew", "-q"))
    for name in others:
        host.copy(first, name)
    timed(host.command("renew", "-q"))  # the keys are new files: looked at once
    return host


def certbot(bench, count):
    """Return the command of a `certbot renew` with nothing due."""
    folder = tempfile.mkdtemp(dir=bench.folder)
    config = os.path.join(folder, "certbot")
    os.makedirs(os.path.join(config, "renewal"))
    for name in names(count):
        live = os.path.join(config, "live", name)
        archive = os.path.join(config, "archive", name)
        os.makedirs(live)
        os.makedirs(archive)
        for field, path in bench.shown._asdict().items():
            member = field.replace("key", "privkey")
            target = os.path.join(archive, member + "1.pem")
            shutil.copy(path, target)
            os.symlink(os.path.relpath(target, live), os.path.join(live, member + ".pem"))
        text = CERTBOT_RENEWAL.format(config=config, name=name, live=live)
        world.write(os.path.join(config, "renewal", name + ".conf"), text)
    command = ["certbot", "renew", "-q", "-n", "--no-random-sleep-on-renew"]
    command += ["--config-dir", config]
    command += ["--work-dir", folder + "/work", "--logs-dir", folder + "/logs"]
    timed(command)
    return command


def one_liner(bench):
    """Return the check that people write: is what the server shows what is here?"""
    script = """
        fingerprint() { openssl x509 -noout -fingerprint -sha256 "$@"; }
        shown() { openssl s_client -connect 127.0.0.1:$1 -servername example.com </dev/null; }
        new=$(shown $1 2>/dev/null | fingerprint) && [ "$new" = "$(fingerprint -in "$2")" ]"""
    return ["sh", "-c", script, "sh", str(bench.port), bench.shown.cert]


class Ssh(Daemon):
    """An sshd of our own; .rsync is the command that finds nothing to fetch through it."""

    def __init__(self, bench):
        folder = tempfile.mkdtemp(dir=bench.folder)
        port = world.free_port()
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # made by its unit, needed without it too
        key = folder + "/key"
        subprocess.check_call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
        config = world.write(folder + "/sshd_config", SSHD.format(port=port, folder=folder))
        super().__init__([shutil.which("sshd", path=PATH), "-D", "-f", config], port)
        shown = os.path.dirname(bench.shown.cert)
        shutil.copytree(shown, folder + "/copy")
        shell = "ssh -F none -p {} -i {} -o BatchMode=yes -o StrictHostKeyChecking=no"
        shell = shell.format(port, key) + " -o UserKnownHostsFile={}/known".format(folder)
        source = "{}@127.0.0.1:{}/".format(getpass.getuser(), shown)
        self.rsync = ["rsync", "-rlt", "-e", shell, source, folder + "/copy/"]


# --------------------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------------------


class Bench:
    """What all rows share: the folder, the command, an authority, an upstream, the table."""

    def __init__(self, folder, quick):
        self.folder = folder
        self.quick = quick
        self.program = install(folder)
        self.authority = world.Authority(folder)
        self.shown = self.authority.issue(["example.com", "*.example.com"])
        self.port = None
        self.table = None

    def rounds(self, count):
        """Return how often a pair is run."""
        return max(3, count // 4) if self.quick else count

    def has(self, row, *tools):
        """Return whether these commands are installed; note the row as missing where not."""
        missing = lacking(*tools)
        if missing:
            self.table.missing.append("{} (no {})".format(row, missing))
        return not missing


def one_lineage(bench):
    """One lineage, unchanged, beside what else an administrator could run."""
    table = bench.table
    what = "one lineage, unchanged"
    host = Host(bench.folder + "/one", bench)
    host.add("example.com", bench.port, bench.shown.key)
    renew = host.command("renew")
    timed(renew)
    ours, theirs = in_turn(bench.rounds(41), renew, IMPORT_SSL)
    table.pair(what, ours, "python3 -I -c 'import ssl'", theirs, "1.7 at most")
    if bench.has("certbot renew", "certbot"):
        ours, theirs = in_turn(bench.rounds(21), renew, certbot(bench, 1))
        table.times(what, ours, "certbot renew", theirs, "1 : 6")
    if bench.has("rsync over ssh", "rsync", "ssh", "sshd", "ssh-keygen"):
        with Ssh(bench) as ssh:
            ours, theirs = in_turn(bench.rounds(13), renew, ssh.rsync)
        table.times(what, ours, "rsync over ssh", theirs, "")
    ours, theirs = in_turn(bench.rounds(21), renew, one_liner(bench))
    table.times(what, ours, "s_client | x509", theirs, "")
    table.memory("  its memory, with the child's", renew, bench.rounds(8), "19 MiB")


def many_lineages(bench):
    """100 and 1,000 lineages, unchanged."""
    few = many(bench, 100, 9)
    lots = many(bench, 1000, 5)
    bench.table.fact("1,000 lineages against 100", "{:.1f} times".format(lots / few), "12 at most")


def many(bench, count, rounds):
    """Print the rows of that many lineages; return the median seconds of their run."""
    table = bench.table
    what = "{:,} lineages, unchanged".format(count)
    host = host_with(bench, count)
    renew = host.command("renew", "-q")
    loop = [sys.executable, "-I", "-c", BARE_LOOP, str(bench.port), str(count)]
    ours, theirs = in_turn(bench.rounds(rounds), renew, loop)
    table.pair(what, ours, "bare loop, 8 threads", theirs, "1.4 at most")
    if bench.has("certbot renew, {:,}".format(count), "certbot"):
        both = in_turn(3, renew, certbot(bench, count))
        table.times(what, both[0], "certbot renew", both[1], "1 : 2")
    table.memory("  its memory, with the child's", renew, 3, "32 MiB")
    silent(bench, host, renew)
    return statistics.median(ours)


def silent(bench, host, renew):
    """Print the same with ten more lineages, whose one upstream does not answer in two seconds."""
    with world.Silent() as dead:
        for number in range(10):
            name = "dead{}.example.com".format(number)
            host.add(name, dead.port, bench.shown.key, "timeout = 2")
        seconds = timed(renew, status=1)
    bench.table.fact("  and 10 of a dead upstream (2 s)", "{:.1f} s".format(seconds))


def many_changed(bench):
    """200 new certificates in one run, with one post hook, and where its time goes."""
    count = 40 if bench.quick else 200
    hosts, table = names(count), bench.table
    first = {name: bench.authority.issue([name], key=bench.shown.key) for name in hosts}
    second = {name: bench.authority.issue([name], key=bench.shown.key) for name in hosts}
    folder = tempfile.mkdtemp(dir=bench.folder)
    os.chmod(folder, 0o755)
    host = Host(folder + "/host", bench)
    with upstream(folder, first) as before:
        for name in hosts:
            host.add(name, before.port, bench.shown.key)
        timed(host.command("renew", "-q"))
    post = os.path.join(host.config, "renewal-hooks", "post")
    os.makedirs(post)
    world.write(post + "/reload", "#!/bin/sh\n", 0o755)
    with upstream(folder, second) as after:
        host.redirect(after.port)
        backup = shutil.copytree(host.config, folder + "/backup", symlinks=True)
        whole = timed(host.command("renew", "-q"))
        report = os.path.join(folder, "steps.json")
        host.config = backup
        words = host.command("renew", "-q")[1:]
        timed([sys.executable, os.path.abspath(__file__), "--steps", report] + words)
    each = "{:.2f} s, {:.1f} ms each".format(whole, whole * 1000 / count)
    table.fact("{} changed in one run".format(count), each)
    steps = json.loads(world.read(report).decode())
    for step in list(STEPS.values()) + ["the rest"]:
        each = "{:.1f} ms".format(steps.get(step, 0) * 1000 / count)
        table.fact("  {}, each (sampled)".format(step), each)


def sample(path, arguments):
    """Run certferry in this process, look every millisecond where it is, and write a report.

    The step is the section of the outermost frame that is in one of STEPS: a process that the
    storage of a version needs belongs to storage.
    """
    banners = re.compile(r"^# -+\n# (.*)\n# -+$", re.M)
    text = world.read(world.SCRIPT).decode()
    starts = []
    for banner in banners.finditer(text):
        starts.append((text.count("\n", 0, banner.start()), banner.group(1)))
    spent = collections.Counter()
    last = [time.monotonic()]

    def section_of(frame):
        line = frame.f_code.co_firstlineno
        before = [name for start, name in starts if start < line]
        return before[-1] if before else ""

    def look(_, frame):
        step = "the rest"
        while frame:
            if frame.f_code.co_filename == world.SCRIPT:
                step = STEPS.get(section_of(frame), step)
            frame = frame.f_back
        now = time.monotonic()
        spent[step] += now - last[0]
        last[0] = now

    def leave(status):
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() == ours:
            world.write(path, json.dumps(spent))
        really_leave(status)

    # It leaves without taking the interpreter down, and so do its children.
    really_leave, ours = os._exit, os.getpid()
    os._exit = leave
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    sys.argv = [world.SCRIPT] + arguments
    runpy.run_path(world.SCRIPT, run_name="__main__")


def processes_started(bench):
    """The processes that 20 changed lineages start, beyond those of a run that changes nothing."""
    table, count = bench.table, 20
    if not bench.has("processes for each changed one", "strace"):
        return
    folder = tempfile.mkdtemp(dir=bench.folder)
    os.chmod(folder, 0o755)
    newer = bench.authority.issue(["example.com", "*.example.com"], key=bench.shown.key)
    host = host_with(bench, count)
    renew = host.command("renew", "-q")
    usual = processes(renew, folder)
    with upstream(folder, {"example.com": newer}) as after:
        host.redirect(after.port)
        changed = collections.Counter(processes(renew, folder))
    changed.subtract(usual)
    each = "{:.1f}".format(sum(changed.values()) / count)
    table.fact("processes for each changed one", each, "4 at most")
    for name, times in sorted(changed.items()):
        if times:
            table.fact("  " + name, "{:.1f}".format(times / count))


def status(bench):
    """`status`, from the disk."""
    for count, aim in ((400, "4 at most"), (1000, "6 at most")):
        host = host_with(bench, count)
        ours, theirs = in_turn(bench.rounds(9), host.command("status"), IMPORT_SSL)
        what = "status of {:,} lineages".format(count)
        bench.table.pair(what, ours, "python3 -I -c 'import ssl'", theirs, aim)


ROWS = collections.OrderedDict(
    [
        ("one", one_lineage),
        ("many", many_lineages),
        ("changed", many_changed),
        ("processes", processes_started),
        ("status", status),
    ]
)


def machine():
    """Return one line about what this was measured on."""
    model = "unknown processor"
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*: (.*)", world.read("/proc/cpuinfo").decode())
        model = found.group(1) if found else model
    versions = ["Python " + sys.version.split()[0], world.openssl("version").split(" (")[0].strip()]
    asked = {"nginx": ("-v", r"nginx/\S+"), "certbot": ("--version", r"certbot \S+")}
    for tool, (option, pattern) in asked.items():
        if not lacking(tool):
            command = [shutil.which(tool, path=PATH), option]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            versions += re.findall(pattern, done.stdout.decode("utf-8", "replace"))[:1]
    load = os.getloadavg()[0]
    return "{} x {}, load {:.1f}; {}".format(os.cpu_count(), model, load, ", ".join(versions))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 40 changed lineages")
    parser.add_argument("rows", nargs="*", help="only these: " + ", ".join(ROWS))
    options = parser.parse_args()
    unknown = set(options.rows).difference(ROWS)
    if unknown:
        parser.error("no such rows: " + ", ".join(sorted(unknown)))
    print(machine() + "\n")
    folder = world.scratch()
    os.chmod(folder, 0o755)
    bench = Bench(folder, options.quick)
    with upstream(folder, {"example.com": bench.shown}) as shown:
        bench.port = shown.port
        bench.table = Table()
        for word, measure in ROWS.items():
            if word in (options.rows or ROWS):
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
