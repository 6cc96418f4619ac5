"""Real daemons and a real issuance: what certferry fetches from, what it sees being reloaded.

nginx, HAProxy and postfix serve a lineage's folder and are reloaded by its hook; dovecot, vsftpd,
slapd, PostgreSQL and postfix are fetched from by STARTTLS; certbot with pebble renews an upstream.

With CERTFERRY_FULL=1 there are more tests and rotations. With CERTFERRY_QUICK=1 only Fleet runs:
the daemons are the same under every interpreter, so one of them is enough for what takes seconds.
"""

import glob
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import unittest
import urllib.request

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

NAME = "example.com"
NAMES = [NAME, "*.example.com"]
SBIN = "/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/postfix/sbin:/usr/libexec/postfix"
POSTGRES = sorted(glob.glob("/usr/lib/postgresql/*/bin"))  # Debian keeps them out of PATH
ROOT = os.geteuid() == 0
ROTATIONS = 50 if world.FULL else 6
AUTHORITY = None


def load_tests(loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK the short ones: left out, since CI fails on a skip."""
    if world.QUICK:
        return loader.loadTestsFromTestCase(Fleet)
    return tests


def setUpModule():
    """Mint what all tests share."""
    global AUTHORITY
    AUTHORITY = world.Authority(world.scratch(), "Example Root")


# --------------------------------------------------------------------------------------------------
# Real programs
# --------------------------------------------------------------------------------------------------


def start(case, *command, **variables):
    """Start a program in the foreground, until the test ends; return its Popen."""
    path = os.environ.get("PATH", os.defpath) + ":" + SBIN
    environment = dict(os.environ, PATH=path, **variables)
    path = os.path.join(world.scratch(case), "log")
    with open(path, "wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.log = path
    case.addCleanup(stop, process)
    return process


def stop(process):
    """End a program that start() started, the processes that it left too, and wait for it."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port):
    """Return whether something accepts connections on that port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def give(path):
    """Make a path nobody's, as which these daemons run where the tests run as root."""
    if ROOT:
        os.chown(path, 65534, 65534)


class Daemon:
    """A TLS server that serves the four files of a folder live/NAME, until the test ends.

    .source is what --from and --served-at take; .reload() is what a deploy hook would do, and
    .reload_command the hook's line.
    """

    prefix, signal = "", "HUP"

    def __init__(self, case, live):
        self.port = world.port_for(case)
        folder = world.scratch(case)
        os.chmod(folder, 0o755)  # the daemons' workers run as users of their own
        self.process = start(case, *self.command(folder, live))
        world.eventually(self.is_up)
        self.source = "{}127.0.0.1:{}".format(self.prefix, self.port)
        self.reload_command = "kill -{} {}".format(self.signal, self.process.pid)

    def command(self, folder, live):
        """Write the configuration into the folder; return the command that starts the daemon."""
        raise NotImplementedError

    def is_up(self):
        """Return whether it listens; a daemon that ended is an error, with what it said."""
        status = self.process.poll()
        if status is not None:
            said = world.read(self.process.log).decode("utf-8", "replace")
            raise AssertionError("{}: {}: {}".format(self.process.args[0], status, said))
        return listens(self.port)

    def reload(self):
        """Have the daemon read its files again; it does so in its own time."""
        os.kill(self.process.pid, getattr(signal, "SIG" + self.signal))

    def leaf(self):
        """Return the certificate that it serves now, as DER."""
        how = ("-starttls", self.prefix[:-3]) if self.prefix else ()
        where = ("-connect", "127.0.0.1:{}".format(self.port))
        trust = ("-no-CAfile", "-no-CApath", "-no-CAstore")  # or it loads the system's: 20 ms
        shown = world.openssl("s_client", *(where + trust + how), input=b"")
        pem = re.search("-----BEGIN CERTIFICATE-.*?-END CERTIFICATE-----", shown, re.S)
        return ssl.PEM_cert_to_DER_cert(pem.group())

    def shows_only(self, leaf):
        """Wait until it serves this leaf four times in a row: a leaving worker accepts too."""
        return world.eventually(lambda: all(self.leaf() == leaf for _ in range(4)))


class Nginx(Daemon):
    """nginx, one worker."""

    def command(self, folder, live):
        """Write its configuration; it wants folders named that it never uses here."""
        temporary = "".join(
            "{}_temp_path {}; ".format(kind, os.path.join(folder, kind))
            for kind in "client_body proxy fastcgi uwsgi scgi".split()
        )
        path = world.write(
            os.path.join(folder, "nginx.conf"),
            """\
daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off; {temporary}
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {live}/fullchain.pem;
        ssl_certificate_key {live}/privkey.pem;
        return 200 "served";
    }}
}}
""".format(folder=folder, temporary=temporary, port=self.port, live=live),
        )
        return "nginx", "-e", "stderr", "-p", folder, "-c", path


class Haproxy(Daemon):
    """HAProxy as master and worker, with its key found beside fullchain.pem."""

    signal = "USR2"

    def command(self, folder, live):
        """Write its configuration; the link lies among certferry's and has to stay there."""
        os.symlink("privkey.pem", os.path.join(live, "fullchain.pem.key"))
        path = world.write(
            os.path.join(folder, "haproxy.cfg"),
            """\
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend tls
    bind 127.0.0.1:{port} ssl crt {live}/fullchain.pem
    http-request return status 200 content-type text/plain string served
""".format(port=self.port, live=live),
        )
        return "haproxy", "-W", "-db", "-f", path


class Postfix(Daemon):
    """postfix with nothing but an smtpd that offers STARTTLS, which only root can start."""

    prefix = "smtp://"

    def command(self, folder, live):
        """Write an instance of its own: configuration, queue and data all in the folder."""
        for queue in "active bounce defer deferred flush incoming pid private public".split():
            os.makedirs(os.path.join(folder, "queue", queue))
        os.mkdir(os.path.join(folder, "data"))
        subprocess.check_call(
            [
                "chown",
                "-R",
                "postfix",
                os.path.join(folder, "data"),
                os.path.join(folder, "queue", "private"),
            ]
        )
        world.write(
            os.path.join(folder, "main.cf"),
            """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
myhostname = example.com
inet_interfaces = 127.0.0.1
smtpd_tls_security_level = may
smtpd_tls_chain_files = {live}/privkey.pem, {live}/fullchain.pem
local_recipient_maps =
alias_maps =
""".format(folder=folder, live=live),
        )
        world.write(
            os.path.join(folder, "master.cf"),
            """\
127.0.0.1:{port} inet n - n - - smtpd
tlsmgr unix - - n - 1 tlsmgr
anvil unix - - n - 1 anvil
""".format(port=self.port),
        )
        return "master", "-d", "-c", folder


class Unprivileged(Daemon):
    """A server that runs as nobody, on copies of the files; .CONF is its configuration."""

    CONF = ""

    def command(self, folder, live):
        """Copy the files and write the configuration, {folder}, {port} and {user} filled in."""
        for file in ("fullchain.pem", "privkey.pem"):
            path = os.path.join(folder, file)
            give(world.write(path, world.read(os.path.join(live, file)), 0o600))
        user = "nobody" if ROOT else os.environ.get("USER", "nobody")
        text = self.CONF.format(folder=folder, port=self.port, user=user)
        conf = world.write(os.path.join(folder, "conf"), text)
        give(conf)
        give(folder)
        return self.as_nobody(*self.words(folder, conf))

    @staticmethod
    def as_nobody(*command):
        """Return the words that run a command as nobody."""
        if not ROOT:
            return command
        return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") + command

    def words(self, folder, conf):
        """Return the server's own command."""
        raise NotImplementedError


class Dovecot(Unprivileged):
    """dovecot's IMAP."""

    prefix = "imap://"
    CONF = """\
protocols = imap
listen = 127.0.0.1
base_dir = {folder}/run
state_dir = {folder}/run
log_path = {folder}/log
ssl = required
ssl_cert = <{folder}/fullchain.pem
ssl_key = <{folder}/privkey.pem
default_internal_user = {user}
default_internal_group = nogroup
default_login_user = {user}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  driver = static
  args = uid=65534 gid=65534 home={folder}
}}
"""

    def words(self, folder, conf):
        """In the foreground."""
        return "dovecot", "-F", "-c", conf


class Vsftpd(Unprivileged):
    """vsftpd without a root's tricks."""

    prefix = "ftp://"
    CONF = """\
listen=YES
listen_address=127.0.0.1
listen_port={port}
background=NO
run_as_launching_user=YES
anonymous_enable=YES
anon_root={folder}
secure_chroot_dir={folder}
xferlog_enable=NO
isolate=NO
isolate_network=NO
seccomp_sandbox=NO
ssl_enable=YES
allow_anon_ssl=YES
ssl_ciphers=HIGH
rsa_cert_file={folder}/fullchain.pem
rsa_private_key_file={folder}/privkey.pem
"""

    def words(self, folder, conf):
        """In the foreground, as its configuration says."""
        return "vsftpd", conf


class Slapd(Unprivileged):
    """slapd with no database."""

    prefix = "ldap://"
    CONF = """\
pidfile {folder}/pid
TLSCertificateFile {folder}/fullchain.pem
TLSCertificateKeyFile {folder}/privkey.pem
"""

    def words(self, folder, conf):
        """In the foreground, on one port."""
        return "slapd", "-d", "0", "-h", "ldap://127.0.0.1:{}/".format(self.port), "-f", conf


class Postgres(Unprivileged):
    """PostgreSQL with a fresh cluster."""

    prefix = "postgres://"

    def words(self, folder, _conf):
        """Make the cluster first."""
        data = os.path.join(folder, "data")
        initdb = (os.path.join(POSTGRES[-1], "initdb"), "-D", data, "-A", "trust", "-N", "-U", "x")
        subprocess.check_call(
            self.as_nobody(*initdb), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "ssl": "on",
            "ssl_cert_file": folder + "/fullchain.pem",
            "ssl_key_file": folder + "/privkey.pem",
            "fsync": "off",
        }
        words = ["--{}={}".format(*setting) for setting in settings.items()]
        return [os.path.join(POSTGRES[-1], "postgres"), "-D", data] + words


class Certbot:
    """certbot with pebble as its authority; .root is the path of pebble's root.

    DNS-01 challenges are met by pebble-challtestsrv, which a hook of certbot's tells what to say.
    """

    HOOK = """\
#!{python}
import json, os, sys, urllib.request
record = {{"host": "_acme-challenge." + os.environ["CERTBOT_DOMAIN"] + ".",
          "value": os.environ["CERTBOT_VALIDATION"]}}
urllib.request.urlopen("http://127.0.0.1:{port}/" + sys.argv[1], json.dumps(record).encode())
"""

    def __init__(self, case, config):
        self._folder, self._config = world.scratch(case), config
        api, roots, dns, records = (world.port_for(case) for _ in range(4))
        server = AUTHORITY.issue(["127.0.0.1"])
        settings = world.write(
            os.path.join(self._folder, "pebble.json"),
            json.dumps(
                {
                    "pebble": {
                        "listenAddress": "127.0.0.1:{}".format(api),
                        "httpPort": 1,
                        "tlsPort": 1,
                        "managementListenAddress": "127.0.0.1:{}".format(roots),
                        "certificate": server.fullchain,
                        "privateKey": server.key,
                    }
                }
            ),
        )
        start(
            case,
            "pebble-challtestsrv",
            "-dns01",
            "127.0.0.1:{}".format(dns),
            "-http01",
            "",
            "-https01",
            "",
            "-tlsalpn01",
            "",
            "-management",
            "127.0.0.1:{}".format(records),
        )
        start(
            case,
            "pebble",
            "-config",
            settings,
            "-dnsserver",
            "127.0.0.1:{}".format(dns),
            PEBBLE_VA_NOSLEEP="1",
            PEBBLE_WFE_NONCEREJECT="0",
            PEBBLE_CHAIN_LENGTH="2",
            PEBBLE_AUTHZREUSE="0",
        )
        world.eventually(lambda: listens(api) and listens(roots) and listens(records))
        self._server = "https://127.0.0.1:{}/dir".format(api)
        self._hook = world.write(
            os.path.join(self._folder, "hook"),
            self.HOOK.format(python=sys.executable, port=records),
            0o755,
        )
        trust = ssl.create_default_context(cafile=AUTHORITY.root)
        with urllib.request.urlopen(
            "https://127.0.0.1:{}/roots/0".format(roots), context=trust
        ) as answer:
            self.root = world.write(os.path.join(self._folder, "root.pem"), answer.read())

    def run(self, *arguments):
        """Run certbot to its end; return a Result, what it says all in .out."""
        done = subprocess.run(
            (
                "certbot",
                "--config-dir",
                self._config,
                "--work-dir",
                self._folder,
                "--logs-dir",
                self._folder,
                "--server",
                self._server,
                "-n",
                "--agree-tos",
            )
            + arguments,
            env=dict(os.environ, REQUESTS_CA_BUNDLE=AUTHORITY.root),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=180,
        )
        return world.Result(done.returncode, done.stdout.decode(), "")

    def issue(self, name, *domains, **how):
        """Run certonly --reuse-key by DNS-01; with prove=False nobody answers the challenge."""
        names = [word for domain in domains for word in ("-d", domain)]
        hook = self._hook + " set-txt" if how.get("prove", True) else "true"
        return self.run(
            "certonly",
            "--register-unsafely-without-email",
            "--manual",
            "--preferred-challenges",
            "dns",
            "--manual-auth-hook",
            hook,
            "--manual-cleanup-hook",
            self._hook + " clear-txt",
            "--reuse-key",
            "--key-type",
            "ecdsa",
            "--cert-name",
            name,
            *names,
        )

    def renew(self, *arguments):
        """Run certbot renew at once, due or not."""
        return self.run("renew", "--force-renewal", "--no-random-sleep-on-renew", *arguments)


# --------------------------------------------------------------------------------------------------
# The scenes
# --------------------------------------------------------------------------------------------------


class Scene(unittest.TestCase):
    """A downstream, and short ways to say what happens on it."""

    def setUp(self):
        self.downstream = world.Downstream().started(self)

    def assert_ended(self, status, result, reason, *arguments, **how):
        """See that certferry ARGUMENTS ends so for its only lineage; return its object."""
        downstream = how.get("downstream", self.downstream)
        ended, document = downstream.json(*arguments)
        self.assertEqual(1, len(document["lineages"]), document)
        lineage = document["lineages"][0]
        seen = (ended, lineage["result"], lineage["reason"])
        self.assertEqual((status, result, reason), seen, lineage)
        return lineage

    def cross(self, name, source, *options, **how):
        """Make the first crossing; return the lineage's object."""
        trust = ("--ca-file", how.pop("root", AUTHORITY.root))
        return self.assert_ended(
            0, "installed", None, name, "--from", source, *(trust + options), **how
        )


@world.needs("pebble", "pebble-challtestsrv", "certbot", "nginx")
class Issuance(Scene):
    """certbot renews and nginx serves on one host, certferry follows on another one."""

    def assert_well(self, result):
        """See that a certbot command succeeded."""
        self.assertEqual(0, result.status, result.out)

    def follow(self):
        """Cross what certbot issued, then what it renewed; return certbot, its folder, nginx."""
        name, live = "example.org", world.scratch(self)
        certbot = Certbot(self, live)
        self.assert_well(certbot.issue(name, name, "*." + name))
        live = os.path.join(live, "live", name)
        nginx = Nginx(self, live)
        self.downstream.key(name, os.path.join(live, "privkey.pem"))
        lineage = self.cross(name, nginx.source, "-d", "*." + name, root=certbot.root)
        self.assertEqual({name, "*." + name}, set(lineage["domains"]))
        self.assertEqual(3, len(world.certificates(self.downstream.live(name, "fullchain.pem"))))

        self.assert_well(certbot.renew())
        leaf = self.served(nginx, live)
        self.assert_ended(0, "installed", None, "renew")
        self.assertEqual(leaf, self.downstream.served_leaf(name))
        self.downstream.assert_fits(self, name)
        return certbot, live, nginx

    def served(self, nginx, live):
        """Have nginx read what certbot wrote last; return the leaf that it serves then."""
        nginx.reload()
        leaf = world.certificates(os.path.join(live, "cert.pem"))[0]
        nginx.shows_only(leaf)
        return leaf

    if not world.FULL:

        def test_followed(self):
            """The first crossing of a wildcard with its chain, and a rotation."""
            self.follow()

    else:

        def test_followed_and_a_changed_key(self):
            """The same; then a changed key is refused, and the way out is told and works."""
            certbot, live, nginx = self.follow()
            name = "example.org"
            self.assert_well(certbot.renew("--new-key"))
            leaf = self.served(nginx, live)
            kept = self.downstream.served_leaf(name)
            refused = self.assert_ended(1, "refused", "key-mismatch", "renew")
            self.assertEqual((2, kept), (refused["version"], self.downstream.served_leaf(name)))
            problem = self.downstream.run("renew").err
            for word in ("reuse_key", "certferry {} --key -".format(name)):
                self.assertIn(word, problem)
            key = os.path.join(live, "privkey.pem")
            self.assert_ended(0, "installed", None, name, "--key", key)
            self.assertEqual(leaf, self.downstream.served_leaf(name))
            self.downstream.assert_fits(self, name)

        def test_beside_certbot(self):
            """Two tools in one config dir: what certbot does, well or not, harms nothing."""
            certbot = Certbot(self, self.downstream.config)
            self.assert_well(certbot.issue("example.org", "example.org"))
            first = AUTHORITY.issue(NAMES)
            upstream = world.Upstream(first).started(self)
            self.downstream.key(NAME, first)
            self.cross(NAME, upstream.source)
            both = self.snapshot("example.org"), self.snapshot(NAME)

            self.assert_well(certbot.run("renew"))
            listed = certbot.run("certificates")
            self.assert_well(listed)
            self.assertIn("Certificate Name: example.org", listed.out)
            self.assertNotIn("invalid", listed.out)
            self.assertEqual(1, certbot.issue(NAME, NAME, prove=False).status)
            conf = os.path.join(self.downstream.config, "renewal", NAME + ".conf")
            self.assertFalse(os.path.exists(conf))
            # A challenge is met for a name that certferry has: certbot stumbles over live/NAME.
            self.assertEqual(1, certbot.issue(NAME, NAME).status)
            self.assertEqual(b"", world.read(conf))
            self.assertEqual(both, (self.snapshot("example.org"), self.snapshot(NAME)))

            upstream.switch(AUTHORITY.issue(NAMES, key=first.key))
            result = self.downstream.run("renew")
            self.assertEqual(0, result.status, result)
            self.assertRegex(result.out, r"\Aexample\.com: installed: ")
            line = r"\Acertferry: example\.com: [^\n]*renewal/example\.com\.conf[^\n]*\n\Z"
            self.assertRegex(result.err, line)
            os.unlink(conf)
            self.assertEqual("", self.downstream.run("renew").err)
            self.assert_well(certbot.renew())
            self.assert_ended(0, "unchanged", None, "renew")

        def snapshot(self, name):
            """Return what is on disk of a lineage, certferry's or certbot's."""
            path = re.compile(r"(live|archive)/{}(@\d+)?(/|\Z)".format(re.escape(name)))
            entries = self.downstream.snapshot()
            return {where: entry for where, entry in entries.items() if path.match(where)}


class Fetched(Scene):
    """Servers as Debian has them, behind STARTTLS: fetched from, and looked at as services."""

    def fetched(self, kind):
        """Cross from a server of this kind, which is the service as well."""
        credential, folder = AUTHORITY.issue(NAMES), world.scratch(self)
        for file in ("fullchain", "key"):
            name = "privkey" if file == "key" else file
            path = os.path.join(folder, name + ".pem")
            world.write(path, world.read(getattr(credential, file)), 0o600)
        daemon = kind(self, folder)
        self.downstream.key(NAME, credential)
        lineage = self.cross(NAME, daemon.source, "--served-at", daemon.source)
        self.assertEqual(daemon.source, lineage["source"])
        self.downstream.assert_fits(self, NAME, credential)

    @world.needs("dovecot", "setpriv")
    def test_dovecot(self):
        """IMAP."""
        self.fetched(Dovecot)

    @world.needs("vsftpd", "setpriv")
    def test_vsftpd(self):
        """FTP."""
        self.fetched(Vsftpd)

    @world.needs("slapd", "setpriv")
    def test_slapd(self):
        """LDAP."""
        self.fetched(Slapd)

    @unittest.skipUnless(POSTGRES, "needs postgresql")
    @world.needs("setpriv")
    def test_postgres(self):
        """PostgreSQL."""
        self.fetched(Postgres)

    @unittest.skipUnless(ROOT, "postfix needs root")
    @world.needs("postfix")
    def test_postfix(self):
        """SMTP."""
        self.fetched(Postfix)


class Served(Scene):
    """--served-at: daemons that reload, that reload late, that are forgotten."""

    def scene(self, kind, **options):
        """Return (downstream, upstream, daemon): a lineage in service, its files served.

        The upstream renewed. A hook has {reload} for what reloads the daemon.
        """
        downstream = world.Downstream().started(self)
        credential = AUTHORITY.issue(NAMES)
        upstream = world.Upstream(credential).started(self)
        downstream.key(NAME, credential)
        self.cross(NAME, upstream.source, downstream=downstream)
        daemon = kind(self, downstream.live(NAME))
        hook = options.get("hook", "{reload}").replace("{reload}", daemon.reload_command)
        with open(downstream.conf(NAME), "a") as conf:
            conf.write("deploy-hook = {}\n".format(hook))
            if options.get("looked_at", True):
                conf.write("served-at = {}\n".format(daemon.source))
        self.rotate(downstream, upstream)
        return downstream, upstream, daemon

    def rotate(self, downstream, upstream):
        """Renew the upstream's certificate, for the key that it has."""
        upstream.switch(AUTHORITY.issue(NAMES, key=downstream.live(NAME, "privkey.pem")))

    def follows(self, kind):
        """See a hook that reloads, and one that does so a second after it has ended."""
        late = os.path.join(world.scratch(self), "late")
        hook = "(test ! -e {} || sleep 1; {{reload}}) > /dev/null 2>&1 &".format(late)
        downstream, upstream, daemon = self.scene(kind, hook=hook)
        for _ in ("at once", "late"):
            self.assert_ended(0, "installed", None, "renew", downstream=downstream)
            self.assertTrue(daemon.shows_only(downstream.served_leaf(NAME)))
            world.write(late, "")
            self.rotate(downstream, upstream)
        if kind is Haproxy:
            self.assertEqual("privkey.pem", os.readlink(downstream.live(NAME, "fullchain.pem.key")))

    @world.needs("nginx")
    def test_nginx_follows(self):
        """nginx, at once and late."""
        self.follows(Nginx)

    @world.needs("haproxy")
    def test_haproxy_follows(self):
        """HAProxy, at once and late."""
        self.follows(Haproxy)

    @unittest.skipUnless(ROOT, "postfix needs root")
    @world.needs("postfix")
    def test_postfix_follows(self):
        """postfix behind STARTTLS, at once and late."""
        self.follows(Postfix)

    def forgotten(self, *kinds):
        """See a hook that reloads nothing: not-served and pending; it runs again at the next run.

        All daemons at once, since each run waits, three seconds in place of fifteen.
        """
        hasty = world.patched(self, "certferry.SERVED_SECONDS = 3")
        # The hook counts its runs, and reloads from the moment that somebody has mended it.
        hook = "cd $RENEWED_LINEAGE/../..; echo ran >> ran; if [ -e mended ]; then {reload}; fi"
        scenes = [self.scene(kind, hook=hook) for kind in kinds]
        stale = [daemon.leaf() for _, _, daemon in scenes]
        runs = [downstream.start("renew", "--json", python=hasty) for downstream, _, _ in scenes]
        ended = []
        for run in runs:
            with run:
                ended.append((run.communicate(timeout=60)[0], run.returncode))
        for (out, status), (downstream, _, daemon), leaf in zip(ended, scenes, stale):
            lineage = json.loads(out.decode())["lineages"][0]
            seen = (status, lineage["result"], lineage["reason"])
            self.assertEqual((1, "pending", "not-served"), seen, lineage)
            self.assertIn(daemon.source.rsplit("/", 1)[-1], lineage["detail"])
            self.assertEqual(leaf, daemon.leaf())
            self.assertNotEqual(leaf, downstream.served_leaf(NAME))
            self.assertEqual(1, downstream.run("status").status)
            world.write(os.path.join(downstream.config, "mended"), "")
            self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
            self.assertEqual(b"ran\nran\n", world.read(os.path.join(downstream.config, "ran")))
            self.assertTrue(daemon.shows_only(downstream.served_leaf(NAME)))
            self.assertEqual(0, downstream.run("status").status)

    if world.FULL and ROOT:

        @world.needs("nginx", "haproxy", "postfix")
        def test_all_forgotten(self):
            """Each of the three."""
            self.forgotten(Nginx, Haproxy, Postfix)

    else:

        @world.needs("haproxy")
        def test_forgotten(self):
            """HAProxy."""
            self.forgotten(Haproxy)

    if world.FULL:

        @world.needs("nginx")
        def test_stale_copy(self):
            """A daemon that somebody started from an old copy is found though nothing is new."""
            downstream, _, first = self.scene(Nginx)
            self.assert_ended(0, "installed", None, "renew", downstream=downstream)
            copy, old = world.scratch(self), world.scratch(self)
            stale = first.leaf()
            for folder in (copy, old):
                subprocess.check_call(
                    "cp -L {}/*.pem {}".format(downstream.live(NAME), folder), shell=True
                )
            nginx = Nginx(self, copy)
            hook = "cp -L {}/*.pem {} && {}"
            hook = hook.format(downstream.live(NAME), copy, nginx.reload_command)
            credential = AUTHORITY.issue(NAMES, key=downstream.live(NAME, "privkey.pem"))
            with world.Upstream(credential) as upstream:
                arguments = (NAME, "--from", upstream.source, "--served-at", nginx.source)
                arguments += ("--deploy-hook", hook)
                self.assert_ended(0, "installed", None, *arguments, downstream=downstream)
                nginx.shows_only(downstream.served_leaf(NAME))
                self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
                subprocess.check_call("cp {}/*.pem {}".format(old, copy), shell=True)
                nginx.reload()
                nginx.shows_only(stale)
                self.assert_ended(1, "pending", "not-served", "renew", downstream=downstream)
                self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
                self.assertTrue(nginx.shows_only(downstream.served_leaf(NAME)))

    @world.needs("nginx")
    def test_no_request_dropped(self):
        """Rotations one after another, each with a reload, while clients ask without a pause."""
        downstream, upstream, nginx = self.scene(Nginx, looked_at=False)
        done, shown, broken = threading.Event(), [], []
        trust = ssl.create_default_context(cafile=AUTHORITY.root)

        def ask():
            """Ask one request after the other; each must be answered, by a leaf that fits."""
            while not done.wait(0.01):  # or it takes the processor from what it waits for
                try:
                    plain = socket.create_connection(("127.0.0.1", nginx.port), 10)
                    with plain, trust.wrap_socket(plain, server_hostname=NAME) as tls:
                        tls.sendall(b"GET / HTTP/1.0\r\nHost: example.com\r\n\r\n")
                        answer = b"".join(iter(lambda: tls.recv(4096), b""))
                        shown.append(tls.getpeercert(True))
                    if not answer.endswith(b"served"):
                        broken.append(answer)
                except OSError as error:
                    broken.append(error)

        def seen():
            """Return whether the last one that asked was shown what is in service."""
            return broken or shown[-1:] == [downstream.served_leaf(NAME)]

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            for _ in range(ROTATIONS):
                self.rotate(downstream, upstream)
                self.assert_ended(0, "installed", None, "renew", downstream=downstream)
                world.eventually(seen)
        finally:
            done.set()
            for client in clients:
                client.join()
        self.assertEqual([], broken)
        self.assertGreaterEqual(len(set(shown)), ROTATIONS)


class Fleet(Scene):
    """The downstreams of one upstream get a new key without a gap."""

    def test_staged_key(self):
        """Staged everywhere, then the upstream switches, then each follows at its next run."""
        old, new = AUTHORITY.issue(NAMES), AUTHORITY.issue(NAMES)
        upstream = world.Upstream(old).started(self)
        fleet = [world.Downstream().started(self) for _ in "12"]
        for downstream in fleet:
            downstream.key(NAME, old)
            self.cross(NAME, upstream.source, downstream=downstream)
        done, seen = threading.Event(), [set() for _ in fleet]
        readers = [
            threading.Thread(target=self.read, args=arguments + (done,))
            for arguments in zip(fleet, seen)
        ]
        for reader in readers:
            reader.start()
        try:
            for downstream in fleet:
                self.assert_ended(
                    0, "unchanged", None, NAME, "--key", new.key, downstream=downstream
                )
                self.assertEqual(1, len(self.staged(downstream)))
            for downstream in fleet:
                self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
                downstream.assert_fits(self, NAME, old)
            upstream.switch(new)
            for downstream in fleet:
                self.assert_ended(0, "installed", None, "renew", downstream=downstream)
                downstream.assert_fits(self, NAME, new)
                self.assertEqual([], self.staged(downstream))
        finally:
            done.set()
            for reader in readers:
                reader.join()
        pairs = {(world.read(which.fullchain), world.read(which.key)) for which in (old, new)}
        self.assertEqual([pairs] * len(fleet), seen)

    @staticmethod
    def staged(downstream):
        """Return the staged keys' file names."""
        return [file for file in os.listdir(downstream.live(NAME)) if file.startswith("privkey-")]

    @staticmethod
    def read(downstream, seen, done):
        """Collect what a daemon would load that starts now: certificate and key of one moment."""
        finished = False
        while not finished:
            finished = done.wait(0.01)  # the last look comes after the last change
            current = os.readlink(downstream.live(NAME, ".current"))
            pair = tuple(
                world.read(downstream.live(NAME, file)) for file in ("fullchain.pem", "privkey.pem")
            )
            if current == os.readlink(downstream.live(NAME, ".current")):
                seen.add(pair)


if __name__ == "__main__":
    unittest.main()
