"""The README's recipes, run as they stand there: with the real daemon where there is one to be had.

What differs from a reader's host is replaced by `adapted`, word by word: folders, ports, and the
command that reloads a daemon which no systemd started.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

NAME = "example.com"
NAMES = [NAME, "*.example.com"]
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/postfix/sbin:/usr/libexec/postfix"
README = world.read(os.path.join(world.REPOSITORY, "README.md")).decode("utf-8")
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
AUTHORITY = None

HAPROXY_CFG = """\
global
    stats socket {socket} level admin
defaults
    mode http
    timeout client 5s
    timeout server 5s
    timeout connect 5s
frontend tls
    bind 127.0.0.1:{port} ssl crt {certs}/
    http-request return status 200 content-type text/plain string served
"""
POSTFIX_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
myhostname = example.com
inet_interfaces = 127.0.0.1
alias_maps =
local_recipient_maps =
smtpd_tls_security_level = may
"""
POSTFIX_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
tlsmgr unix - - n - 1 tlsmgr
anvil unix - - n - 1 anvil
"""
DOVECOT_CONF = """\
base_dir = {folder}/run
log_path = {folder}/dovecot.log
protocols = imap
ssl = required
{certificate}
{key}
service imap-login {{
  inet_listener imap {{
    port = {port}
    address = 127.0.0.1
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
passdb {{
  driver = static
  args = nopassword=y
}}
"""
POSTGRES_CONF = """\
listen_addresses = '127.0.0.1'
port = {port}
fsync = off
unix_socket_directories = '{data}'
ssl = on
ssl_cert_file = '{live}/fullchain.pem'
ssl_key_file = '{live}/privkey.pem'
"""


def load_tests(loader, tests, _pattern):
    """All tests, or none with CERTFERRY_QUICK: the recipes depend on no version of Python."""
    return unittest.TestSuite() if world.QUICK else tests


def setUpModule():
    """Mint what all tests share."""
    global AUTHORITY
    AUTHORITY = world.Authority(world.scratch(), "Example Root")


# --------------------------------------------------------------------------------------------------
# What the README says
# --------------------------------------------------------------------------------------------------


def recipe(title):
    """The first block of code after this beginning of a paragraph, without its fences."""
    start = README.index("\n" + title)
    return re.compile("^```[a-z]*\n(.*?)^```$", re.M | re.S).search(README, start).group(1)


def adapted(text, changes):
    """The text with each of these words replaced; AssertionError where one does not stand there."""
    for old, new in changes.items():
        if old not in text:
            raise AssertionError("the README does not say {!r} in\n{}".format(old, text))
        text = text.replace(old, str(new))
    return text


def commands(text):
    """[[word, ...]] of the lines of a block, as a shell reads them, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


# --------------------------------------------------------------------------------------------------
# Real programs
# --------------------------------------------------------------------------------------------------


def start(case, *command):
    """Start a program in the foreground, until the test ends; returns its Popen."""
    environment = dict(os.environ, PATH=os.environ.get("PATH", os.defpath) + ":" + SBIN)
    log = open(os.path.join(world.scratch(case), "log"), "wb")
    case.addCleanup(log.close)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    case.addCleanup(stop, process)
    return process


def stop(process):
    """End a program that start() started, and what it left, and wait for it."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port):
    """Whether something accepts connections on that port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shown(port, *how):
    """The SHA-256 of the certificate that is served on that port of 127.0.0.1."""
    address = "127.0.0.1:{}".format(port)
    text = world.openssl("s_client", "-connect", address, "-servername", NAME, *how, input=b"")
    pem = re.search("-----BEGIN CERTIFICATE-.*?-END CERTIFICATE-----\n", text, re.S).group()
    return world.openssl("x509", "-noout", "-fingerprint", "-sha256", input=pem.encode())


def fingerprint(credential):
    """The same of a credential."""
    return world.openssl("x509", "-noout", "-fingerprint", "-sha256", "-in", credential.cert)


def sh(text, **variables):
    """Run a text as a shell script; returns its Result."""
    environment = dict(os.environ, PATH=os.environ.get("PATH", os.defpath) + ":" + SBIN)
    done = subprocess.run(
        ["sh", "-c", text],
        env=dict(environment, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    return world.Result(done.returncode, done.stdout.decode(), done.stderr.decode())


class Scene(unittest.TestCase):
    """An upstream that renews once, a downstream that has its key, and a scratch folder."""

    def setUp(self):
        self.folder = world.scratch(self)
        os.chmod(self.folder, 0o755)  # daemons' workers run as users of their own
        self.first = AUTHORITY.issue(NAMES)
        self.second = AUTHORITY.issue(NAMES, key=self.first.key)
        self.upstream = world.Upstream(self.first).started(self)
        self.downstream = world.Downstream().started(self)
        os.chmod(os.path.dirname(self.downstream.config), 0o755)
        self.downstream.key(NAME, self.first)
        self.live = self.downstream.live(NAME)

    def ferry(self, *arguments, **how):
        """Run certferry, which has to end with 0; returns its Result."""
        result = self.downstream.run(*arguments, **how)
        self.assertEqual(0, result.status, result)
        return result

    def cross(self, *options):
        """Make the first crossing."""
        self.ferry(
            NAME,
            "--from",
            self.upstream.source,
            "--ca-file",
            AUTHORITY.root,
            "--no-timer",
            *options,
        )

    def renew(self):
        """Let the upstream show its second certificate, and ferry it."""
        self.upstream.switch(self.second)
        self.assertIn("installed", self.ferry("renew").out)

    def script(self, name, text):
        """Write an executable script into the scratch folder; returns its path."""
        return world.write(os.path.join(self.folder, name), text, 0o755)

    def write(self, name, text):
        """Write a file into the scratch folder; returns its path."""
        return world.write(os.path.join(self.folder, name), text)


# --------------------------------------------------------------------------------------------------
# The text itself
# --------------------------------------------------------------------------------------------------


class Text(unittest.TestCase):
    """The README as a page."""

    def test_nothing_is_left_to_fill_in(self):
        self.assertEqual([], re.findall("@@.*", README))
        self.assertLessEqual(README.count("\n"), 450)

    def test_links_lead_somewhere(self):
        headings = re.findall("^#+ (.*)$", README, re.M)
        anchors = [re.sub("[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings]
        for target in re.findall(r"\]\(([^)]+)\)", README):
            with self.subTest(target=target):
                if target.startswith("#"):
                    self.assertIn(target[1:], anchors)
                else:
                    self.assertTrue(os.path.exists(os.path.join(world.REPOSITORY, target)))

    def test_tables_have_the_columns_of_their_heads(self):
        for table in re.findall(r"(?:^\|.*\n)+", README, re.M):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            self.assertEqual(1, len(widths), table)

    def test_shell_blocks_are_shell(self):
        for block in re.findall("^```sh\n(.*?)^```$", README, re.M | re.S):
            if not re.search(r"^(up#|admin\$)", block):
                self.assertEqual((0, ""), _syntax(block), block)


def _syntax(text):
    """(status, words) of sh -n for this text."""
    done = subprocess.run(["sh", "-n"], input=text.encode(), stderr=subprocess.PIPE)
    return done.returncode, done.stderr.decode()


# --------------------------------------------------------------------------------------------------
# The upstream
# --------------------------------------------------------------------------------------------------


@world.needs("certbot")
class ReuseKey(unittest.TestCase):
    """The command that makes certbot keep its key, pasted as often as one likes."""

    CONF = """\
# renew_before_expiry = 30 days
version = 2.1.0
privkey = /etc/letsencrypt/live/example.com/privkey.pem

# Options used in the renewal process
[renewalparams]
account = 0123456789abcdef
{}authenticator = webroot
key_type = ecdsa
[[webroot_map]]
example.com = /var/www/html
"""
    READ = """\
import configobj, sys
conf = configobj.ConfigObj(sys.argv[1], encoding="utf-8", default_encoding="utf-8")
print(conf["renewalparams"].as_bool("reuse_key"), conf["renewalparams"]["account"],
      conf["renewalparams"]["webroot_map"])"""

    def test_twice(self):
        conf = os.path.join(world.scratch(self), NAME + ".conf")
        command = adapted(
            recipe("| nginx-acme"), {"/etc/letsencrypt/renewal/example.com.conf": conf}
        )
        for before in ("", "reuse_key = True\n", "reuse_key=False\n"):
            world.write(conf, self.CONF.format(before))
            for _ in range(2):
                self.assertEqual(0, sh(command).status)
                # certbot's own way to read it, by the interpreter that certbot runs under
                done = subprocess.run(
                    ["/usr/bin/python3", "-c", self.READ, conf], stdout=subprocess.PIPE
                )
                self.assertEqual(
                    "True 0123456789abcdef {'example.com': '/var/www/html'}",
                    done.stdout.decode().strip(),
                )
                self.assertEqual(self.CONF.format("").count("\n") + 1, _lines(conf))


def _lines(path):
    """How many lines a file has."""
    return world.read(path).count(b"\n")


class Carried(Scene):
    """Key and certificate that travel together."""

    def test_key_and_certificate_by_command(self):
        """What sshd does with the line in authorized_keys: it runs the command, in a shell."""
        line = re.search(
            'restrict,command="(.*)" ssh-', recipe("**An upstream that changes")
        ).group(1)
        served = os.path.join(self.folder, "served")
        os.mkdir(served)
        ssh = adapted(line, {"/etc/letsencrypt/live/example.com": served})
        for number in range(2):
            credential = AUTHORITY.issue(NAMES)
            world.write(os.path.join(served, "fullchain.pem"), world.read(credential.fullchain))
            world.write(os.path.join(served, "privkey.pem"), world.read(credential.key), 0o600)
            if number:
                self.ferry("renew")
            else:
                self.ferry(NAME, "--from", "exec:" + ssh, "--ca-file", AUTHORITY.root, "--no-timer")
            self.downstream.assert_fits(self, NAME, credential)


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------


@world.needs("haproxy", "socat")
class Haproxy(Scene):
    """The combined file, with and without a reload."""

    def setUp(self):
        super().setUp()
        self.certs = os.path.join(self.folder, "certs")
        os.mkdir(self.certs)
        self.port = world.port_for(self)
        self.socket = os.path.join(self.folder, "admin.sock")
        self.hook = os.path.join(self.folder, "deploy-haproxy")

    def haproxy(self):
        """Start HAProxy; returns its Popen."""
        text = HAPROXY_CFG.format(socket=self.socket, port=self.port, certs=self.certs)
        path = self.write("haproxy.cfg", text)
        process = start(self, "haproxy", "-W", "-db", "-f", path)
        world.eventually(lambda: listens(self.port))
        return process

    def combined(self, reload):
        """Write the combined recipe, with this line for the reload."""
        text = adapted(
            recipe("**Combined PEM**"),
            {"/etc/haproxy/certs": self.certs, "systemctl reload haproxy\n": reload},
        )
        return self.script("deploy-haproxy", text)

    def well(self, credential):
        """The combined file is this credential's and nobody else's to read."""
        path = os.path.join(self.certs, NAME + ".pem")
        self.assertEqual([NAME + ".pem"], os.listdir(self.certs))
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
        self.assertEqual(
            world.read(credential.fullchain).split(), world.read(path).split()[: -_words(self.live)]
        )

    def test_reload(self):
        self.cross("--deploy-hook", self.combined("true\n"))
        self.well(self.first)
        world.write(os.path.join(self.certs, ".new"), "half", 0o600)  # HAProxy leaves it alone
        process = self.haproxy()
        self.assertEqual(fingerprint(self.first), shown(self.port))
        self.combined("kill -USR2 {}\n".format(process.pid))
        self.renew()
        self.well(self.second)
        world.eventually(lambda: shown(self.port) == fingerprint(self.second))

    def test_socket(self):
        self.cross("--deploy-hook", self.combined("true\n"))
        self.haproxy()
        lines = recipe("**HAProxy without a reload**")
        self.combined(adapted(lines, {"/run/haproxy/admin.sock": self.socket}))
        self.upstream.switch(self.second)
        self.assertIn("Success!", self.ferry("renew").out)
        self.well(self.second)
        self.assertEqual(fingerprint(self.second), shown(self.port))


def _words(live):
    """How many words the private key of a live folder has."""
    return len(world.read(os.path.join(live, "privkey.pem")).split())


class Keystores(Scene):
    """PKCS#12 and Java."""

    def deployed(self, text):
        """Cross and renew with the recipe's script; returns the keystore's folder."""
        self.write("password", "changeit\n")
        hook = self.script("deploy-java", adapted(text, {"/etc/keystore": self.folder}))
        self.cross("--deploy-hook", hook)
        self.renew()
        return self.folder

    def test_pkcs12(self):
        text = recipe("**PKCS#12 and Java")
        folder = self.deployed(text[: text.index("keytool")])
        store, password = os.path.join(folder, "server.p12"), os.path.join(folder, "password")
        self.assertEqual(0o600, os.stat(store).st_mode & 0o777)
        how = ("pkcs12", "-in", store, "-passin", "file:" + password, "-nodes")
        pem = world.openssl(*how).encode()
        self.assertEqual(
            fingerprint(self.second),
            world.openssl("x509", "-noout", "-fingerprint", "-sha256", input=pem),
        )
        self.assertEqual(
            world.openssl("pkey", "-pubout", "-in", self.second.key),
            world.openssl("pkey", "-pubout", input=pem),
        )

    @world.needs("keytool")
    def test_java(self):
        folder = self.deployed(recipe("**PKCS#12 and Java"))
        self.assertEqual(0o600, os.stat(os.path.join(folder, "server.jks")).st_mode & 0o777)
        listed = sh(
            "cd {} && keytool -list -keystore server.jks -storepass:file password".format(folder)
        )
        self.assertIn(fingerprint(self.second).split("=")[1].strip(), listed.out, listed)


@world.needs("postfix", "postconf", "dovecot", "doveadm")
@unittest.skipIf(os.getuid(), "needs root")
class Mail(Scene):
    """postfix and dovecot, which read live/ themselves."""

    def postfix(self):
        """Write an instance of its own; returns what starts it, and its port."""
        folder, port = os.path.join(self.folder, "postfix"), world.port_for(self)
        for queue in "active bounce defer deferred flush incoming pid private public".split():
            os.makedirs(os.path.join(folder, "queue", queue))
        os.mkdir(os.path.join(folder, "data"))
        owned = [os.path.join(folder, "data"), os.path.join(folder, "queue", "private")]
        subprocess.check_call(["chown", "-R", "postfix"] + owned)
        self.write("postfix/main.cf", POSTFIX_MAIN.format(folder=folder))
        self.write("postfix/master.cf", POSTFIX_MASTER.format(port=port))
        return ("master", "-d", "-c", folder), port

    def dovecot(self):
        """Write a configuration with the README's two lines; returns its path, and its port."""
        port = world.port_for(self)
        certificate, key = [
            adapted(line, {"/etc/...": self.live})
            for line in re.findall("`(ssl_(?:cert|key) = <[^`]+)`", README)
        ]
        text = DOVECOT_CONF.format(folder=self.folder, port=port, certificate=certificate, key=key)
        path = self.write("dovecot.conf", text)
        return path, port

    def test_both(self):
        self.cross()
        first, command = commands(recipe("**postfix and dovecot**"))
        postfix, smtp = self.postfix()
        line = recipe("**postfix and dovecot**").splitlines()[0]
        changes = {
            "/etc/letsencrypt/live/example.com": self.live,
            "postconf": "postconf -c {}/postfix".format(self.folder),
        }
        self.assertEqual(0, sh(adapted(line, changes)).status)
        master = start(self, *postfix)
        conf, imap = self.dovecot()
        start(self, "dovecot", "-F", "-c", conf)
        world.eventually(lambda: listens(smtp) and listens(imap))
        places = {
            "postfix reload": "kill -HUP {}".format(master.pid),
            "doveadm reload": "doveadm -c {} reload".format(conf),
            "smtp://localhost:25": "smtp://127.0.0.1:{}".format(smtp),
            "imap://localhost:143": "imap://127.0.0.1:{}".format(imap),
        }
        self.ferry(*[places.get(word, word) for word in command[1:]])
        self.renew()
        for port, how in ((smtp, "smtp"), (imap, "imap")):
            self.assertEqual(fingerprint(self.second), shown(port, "-starttls", how))


@unittest.skipUnless(POSTGRES, "needs postgresql")
@unittest.skipIf(os.getuid(), "needs root")
class Postgres(Scene):
    """A key that a service reads by its group."""

    def as_postgres(self, *command):
        """Run a command of postgres's as its user."""
        done = subprocess.run(
            ("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups") + command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.assertEqual(0, done.returncode, done.stdout.decode())

    def test_key_of_a_group(self):
        self.cross()
        lines = recipe("**postgres**").splitlines()
        self.assertEqual(
            0, sh(adapted(lines[0], {"/etc/letsencrypt": self.downstream.config})).status
        )
        data, tool = os.path.join(self.folder, "data"), os.path.join(POSTGRES[-1], "pg_ctl")
        os.mkdir(data)
        subprocess.check_call(["chown", "postgres", data])
        self.as_postgres(os.path.join(POSTGRES[-1], "initdb"), "-D", data, "-A", "trust", "-N")
        port = world.port_for(self)
        with open(os.path.join(data, "postgresql.conf"), "a") as file:
            file.write(POSTGRES_CONF.format(port=port, data=data, live=self.live))
        self.addCleanup(self.as_postgres, tool, "-D", data, "-m", "immediate", "stop")
        self.as_postgres(tool, "-D", data, "-l", os.path.join(data, "log"), "start")
        command = commands(lines[1])[0]
        places = {
            "systemctl reload postgresql": "kill -HUP $(head -n 1 {}/postmaster.pid)".format(data),
            "postgres://localhost:5432": "postgres://127.0.0.1:{}".format(port),
        }
        self.ferry(*[places.get(word, word) for word in command[1:]])
        self.renew()
        self.assertEqual(fingerprint(self.second), shown(port, "-starttls", "postgres"))
        facts = os.stat(os.path.join(self.live, "privkey.pem"))
        self.assertEqual(0o640, facts.st_mode & 0o777)


class Proxy(world.Server):
    """An HTTP proxy that understands CONNECT and nothing else."""

    def talk(self, sock):
        """Answer 200, then carry bytes both ways."""
        request = b""
        while b"\r\n\r\n" not in request:
            request += sock.recv(4096)
        host, port = request.split()[1].decode().rsplit(":", 1)
        with socket.create_connection((host, int(port))) as other:
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = self._spawn(_carry, other, sock)
            _carry(sock, other)
            if back:
                back.join()


def _carry(source, target):
    """Carry bytes from one socket to the other until the end."""
    try:
        for data in iter(lambda: source.recv(65536), b""):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class OnTheWay(Scene):
    """A proxy between the hosts."""

    def test_through_it(self):
        proxy = Proxy().started(self)
        places = {
            "proxy.example.net:3128": proxy.source,
            "up.example.net:443": self.upstream.source,
        }
        (command,) = commands(adapted(recipe("**A proxy on the way"), places))
        self.ferry(*(command[1:] + ["--ca-file", AUTHORITY.root, "--no-timer"]))
        self.renew()
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(2, proxy.connections)


class BothTypes(Scene):
    """Two lineages of one name."""

    def test_side_by_side(self):
        rsa = AUTHORITY.issue(NAMES, key="RSA")
        upstream = world.Upstream([self.first, rsa]).started(self)
        places = {
            "up.example.net": upstream.source,
            "ecdsa.pem": self.first.key,
            "rsa.pem": rsa.key,
        }
        for words in commands(recipe("**RSA and ECDSA")):
            places_here = [places.get(word, word) for word in words[1:]]
            self.ferry(*(places_here + ["--ca-file", AUTHORITY.root, "--no-timer"]))
        self.downstream.assert_fits(self, NAME, self.first)
        self.downstream.assert_fits(self, "rsa." + NAME, rsa)


@world.needs("jq")
class Records(Scene):
    """TLSA records of the key in service and of a staged one."""

    def test_staged(self):
        staged = AUTHORITY.issue(NAMES)
        self.cross("--key", staged.key)
        script = self.script(
            "certferry",
            '#!/bin/sh\nexec {} --config-dir {} "$@"\n'.format(
                " ".join(shlex.quote(word) for word in world.command()), self.downstream.config
            ),
        )
        text = adapted(recipe("**TLSA records**"), {"certferry status": script + " status"})
        wanted = "".join(
            "_25._tcp.mail.example.com. IN TLSA 3 1 1 {}\n".format(_spki(credential.key))
            for credential in (self.first, staged)
        )
        self.assertEqual(wanted, sh(text).out)


def _spki(key):
    """SHA-256 of a key's public half, as a TLSA record of type 3 1 1 has it."""
    how = ["openssl", "pkey", "-pubout", "-outform", "DER", "-in", key]
    return hashlib.sha256(subprocess.check_output(how)).hexdigest()


class Told(unittest.TestCase):
    """The alert hook that mails."""

    def test_mail(self):
        folder = world.scratch(self)
        mail = '#!/bin/sh\n{ echo "$@"; cat; } >' + folder + "/mailed\n"
        world.write(os.path.join(folder, "mail"), mail, 0o755)
        facts = {
            "NAME": NAME,
            "HEALTH": "warning",
            "WAS": "ok",
            "DETAIL": 'it\'s all "wrong" $(date)',
            "NOT_AFTER": "2027-02-20T12:00:00Z",
            "DAYS_LEFT": "20",
        }
        variables = {"CERTFERRY_" + name: value for name, value in facts.items()}
        path = folder + ":" + os.environ["PATH"]
        self.assertEqual(0, sh(recipe("**Alert hooks**"), **dict(variables, PATH=path)).status)
        said = world.read(os.path.join(folder, "mailed")).decode()
        self.assertIn("example.com is warning (was ok) root\n", said)
        self.assertIn(
            'it\'s all "wrong" $(date)\n20 days left (until 2027-02-20T12:00:00Z)\n', said
        )


# --------------------------------------------------------------------------------------------------
# Keys, fleets, leaving
# --------------------------------------------------------------------------------------------------


class Elsewhere(Scene):
    """What is done once, by hand or by a tool."""

    def test_next_key_on_the_upstream(self):
        """sed edits the file behind the link in sites-enabled."""
        text = recipe("**A new key without a gap.**")
        command = re.search("sed .*", text).group()
        available = self.write(
            "available", "ssl_certificate /etc/letsencrypt/live/example.com/a;\n"
        )
        enabled = os.path.join(self.folder, "enabled")
        os.symlink("available", enabled)
        self.assertEqual(
            0, sh(adapted(command, {"/etc/nginx/sites-enabled/example.com": enabled})).status
        )
        self.assertTrue(os.path.islink(enabled))
        self.assertIn(b"/live/next.example.com/a;", world.read(available))

    def test_cloud_init(self):
        """Key and conf written beforehand are all that `renew` wants."""
        text = recipe("**cloud-init.**")
        conf = json.loads(re.search(r'content: ("from.*")$', text, re.M).group(1))
        folder = os.path.dirname(self.downstream.conf(NAME))
        os.mkdir(folder, 0o700)
        conf = adapted(
            conf,
            {"up.example.net": self.upstream.source, "systemctl reload-or-restart nginx": "true"},
        )
        conf += "ca-file = {}\n".format(AUTHORITY.root)
        world.write(self.downstream.conf(NAME), conf, 0o644)
        self.assertIn("installed", self.ferry("renew").out)
        self.downstream.assert_fits(self, NAME, self.first)

    def test_back_to_certbot(self):
        """Everything of the name is out of certbot's way, and nothing of it is lost."""
        self.cross()
        old = os.path.join(self.downstream.config, "archive", NAME)
        os.mkdir(old)  # certbot's own, from before
        lines = recipe("**Back to certbot**").splitlines()[:2]
        text = adapted("\n".join(lines), {"/etc/letsencrypt": self.downstream.config})
        self.assertEqual(0, sh(text, HOME=self.folder).status)
        left = [path for path in self.downstream.snapshot() if NAME in path]
        self.assertEqual([], left)
        self.assertEqual(
            sorted([NAME, NAME + "@1", NAME + ".conf", NAME + ".state", "archive"]),
            sorted(os.listdir(os.path.join(self.folder, "ferried"))),
        )


if __name__ == "__main__":
    unittest.main()
