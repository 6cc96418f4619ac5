"""Real daemons and a real issuance: pebble and certbot, nginx, HAProxy and postfix.

Where CERTFERRY_QUICK is set only Fleet runs: the daemons are the same under every interpreter, so
one of them is enough for what takes seconds.
"""

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


# ---------------------------------------------------------------- real programs

def start(case, *command, **variables):
    """A program in the foreground, with variables of its own, until the test ends; its Popen."""
    path = os.environ.get("PATH", os.defpath) + ":" + SBIN
    environment = dict(os.environ, PATH=path, **variables)
    log = open(os.path.join(world.scratch(case), "log"), "wb")
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                               stderr=subprocess.STDOUT, start_new_session=True)
    case.addCleanup(log.close)
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
    """Whether something accepts connections on that port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
        world.eventually(lambda: listens(self.port))
        self.source = "{}127.0.0.1:{}".format(self.prefix, self.port)
        self.reload_command = "kill -{} {}".format(self.signal, self.process.pid)

    def command(self, folder, live):
        """Write the configuration into the folder; returns the command that starts the daemon."""
        raise NotImplementedError

    def reload(self):
        """Have the daemon read its files again; it does so in its own time."""
        os.kill(self.process.pid, getattr(signal, "SIG" + self.signal))

    def leaf(self):
        """The certificate that it serves now, as DER."""
        how = ("-starttls", self.prefix[:-3]) if self.prefix else ()
        shown = world.openssl("s_client", "-connect", "127.0.0.1:{}".format(self.port), *how,
                              input=b"")
        pem = re.search("-----BEGIN CERTIFICATE-.*?-END CERTIFICATE-----", shown, re.S)
        return ssl.PEM_cert_to_DER_cert(pem.group())

    def shows_only(self, leaf):
        """Wait until it serves this leaf ten times in a row: a leaving worker accepts too."""
        return world.eventually(lambda: all(self.leaf() == leaf for _ in range(10)))


class Nginx(Daemon):
    """nginx, one worker."""

    def command(self, folder, live):
        """nginx wants its temporary folders named, though it never uses them here."""
        temporary = "".join("{}_temp_path {}; ".format(kind, os.path.join(folder, kind)) for kind in
                            "client_body proxy fastcgi uwsgi scgi".split())
        path = world.write(os.path.join(folder, "nginx.conf"), """\
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
""".format(folder=folder, temporary=temporary, port=self.port, live=live))
        return "nginx", "-e", "stderr", "-p", folder, "-c", path


class Haproxy(Daemon):
    """HAProxy as master and worker, with its key found beside fullchain.pem."""

    signal = "USR2"

    def command(self, folder, live):
        """The link lies among certferry's and has to stay there."""
        os.symlink("privkey.pem", os.path.join(live, "fullchain.pem.key"))
        path = world.write(os.path.join(folder, "haproxy.cfg"), """\
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend tls
    bind 127.0.0.1:{port} ssl crt {live}/fullchain.pem
    http-request return status 200 content-type text/plain string served
""".format(port=self.port, live=live))
        return "haproxy", "-W", "-db", "-f", path


class Postfix(Daemon):
    """postfix with nothing but an smtpd that offers STARTTLS, which only root can start."""

    prefix = "smtp://"

    def command(self, folder, live):
        """An instance of its own: configuration, queue and data all in the folder."""
        for queue in "active bounce defer deferred flush incoming pid private public".split():
            os.makedirs(os.path.join(folder, "queue", queue))
        os.mkdir(os.path.join(folder, "data"))
        subprocess.check_call(["chown", "-R", "postfix", os.path.join(folder, "data"),
                               os.path.join(folder, "queue", "private")])
        world.write(os.path.join(folder, "main.cf"), """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
myhostname = example.com
inet_interfaces = 127.0.0.1
smtpd_tls_security_level = may
smtpd_tls_chain_files = {live}/privkey.pem, {live}/fullchain.pem
local_recipient_maps =
alias_maps =
""".format(folder=folder, live=live))
        world.write(os.path.join(folder, "master.cf"), """\
127.0.0.1:{port} inet n - n - - smtpd
tlsmgr unix - - n - 1 tlsmgr
anvil unix - - n - 1 anvil
""".format(port=self.port))
        return "master", "-d", "-c", folder


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
        settings = world.write(os.path.join(self._folder, "pebble.json"), json.dumps({"pebble": {
            "listenAddress": "127.0.0.1:{}".format(api), "httpPort": 1, "tlsPort": 1,
            "managementListenAddress": "127.0.0.1:{}".format(roots),
            "certificate": server.fullchain, "privateKey": server.key}}))
        start(case, "pebble-challtestsrv", "-dns01", "127.0.0.1:{}".format(dns), "-http01", "",
              "-https01", "", "-tlsalpn01", "", "-management", "127.0.0.1:{}".format(records))
        start(case, "pebble", "-config", settings, "-dnsserver", "127.0.0.1:{}".format(dns),
              PEBBLE_VA_NOSLEEP="1", PEBBLE_WFE_NONCEREJECT="0", PEBBLE_CHAIN_LENGTH="2",
              PEBBLE_AUTHZREUSE="0")
        world.eventually(lambda: listens(api) and listens(roots) and listens(records))
        self._server = "https://127.0.0.1:{}/dir".format(api)
        self._hook = world.write(os.path.join(self._folder, "hook"), self.HOOK.format(
            python=sys.executable, port=records), 0o755)
        trust = ssl.create_default_context(cafile=AUTHORITY.root)
        with urllib.request.urlopen("https://127.0.0.1:{}/roots/0".format(roots),
                                    context=trust) as answer:
            self.root = world.write(os.path.join(self._folder, "root.pem"), answer.read())

    def run(self, *arguments):
        """Run certbot to its end; returns a Result, what it says all in .out."""
        done = subprocess.run(
            ("certbot", "--config-dir", self._config, "--work-dir", self._folder, "--logs-dir",
             self._folder, "--server", self._server, "-n", "--agree-tos") + arguments,
            env=dict(os.environ, REQUESTS_CA_BUNDLE=AUTHORITY.root), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180)
        return world.Result(done.returncode, done.stdout.decode(), "")

    def issue(self, name, *domains, **how):
        """certbot certonly --reuse-key by DNS-01; with prove=False nobody answers the challenge."""
        names = [word for domain in domains for word in ("-d", domain)]
        hook = self._hook + " set-txt" if how.get("prove", True) else "true"
        return self.run("certonly", "--register-unsafely-without-email", "--manual",
                        "--preferred-challenges", "dns", "--manual-auth-hook", hook,
                        "--manual-cleanup-hook", self._hook + " clear-txt", "--reuse-key",
                        "--key-type", "ecdsa", "--cert-name", name, *names)

    def renew(self, *arguments):
        """certbot renew at once, due or not."""
        return self.run("renew", "--force-renewal", "--no-random-sleep-on-renew", *arguments)


# ---------------------------------------------------------------- the scenes

class Scene(unittest.TestCase):
    """A downstream, and short ways to say what happens on it."""

    def setUp(self):
        self.downstream = world.Downstream().started(self)

    def assert_ended(self, status, result, reason, *arguments, **how):
        """certferry ARGUMENTS --json ends so for its only lineage, whose object is returned."""
        downstream = how.get("downstream", self.downstream)
        ended, document = downstream.json(*arguments)
        self.assertEqual(1, len(document["lineages"]), document)
        lineage = document["lineages"][0]
        self.assertEqual((status, result, reason),
                         (ended, lineage["result"], lineage["reason"]), lineage)
        return lineage


@world.needs("pebble", "pebble-challtestsrv", "certbot", "nginx")
class Issuance(Scene):
    """certbot renews and nginx serves on one host, certferry follows on another one."""

    def assert_well(self, result):
        """A certbot command succeeded."""
        self.assertEqual(0, result.status, result.out)

    def test_wildcard_followed(self):
        """First crossing, rotation, a changed key refused, the way out."""
        name, config = "example.org", world.scratch(self)
        live = os.path.join(config, "live", name)
        key, cert = os.path.join(live, "privkey.pem"), os.path.join(live, "cert.pem")
        certbot = Certbot(self, config)
        self.assert_well(certbot.issue(name, name, "*." + name))
        nginx = Nginx(self, live)

        def served():
            """nginx has reloaded what certbot wrote last."""
            nginx.reload()
            return nginx.shows_only(world.certificates(cert)[0])

        self.downstream.key(name, key)
        lineage = self.assert_ended(0, "installed", None, name, "--from", nginx.source,
                                    "-d", "*." + name, "--ca-file", certbot.root)
        self.assertEqual({name, "*." + name}, set(lineage["domains"]))
        self.assertEqual(3, len(world.certificates(self.downstream.live(name, "fullchain.pem"))))
        self.assert_ended(0, "unchanged", None, "renew")

        self.assert_well(certbot.renew())
        self.assertTrue(served())
        self.assert_ended(0, "installed", None, "renew")
        self.assertEqual(world.certificates(cert), [self.downstream.served_leaf(name)])
        self.downstream.assert_fits(self, name)

        self.assert_well(certbot.renew("--new-key"))
        self.assertTrue(served())
        kept = self.downstream.served_leaf(name)
        refused = self.assert_ended(1, "refused", "key-mismatch", "renew")
        self.assertEqual(kept, self.downstream.served_leaf(name))
        problem = self.downstream.run("renew").err
        for word in ("--reuse-key", "--key", name):
            self.assertIn(word, problem)
        self.assertEqual(2, refused["version"])

        self.assert_ended(0, "installed", None, name, "--key", key)
        self.assertEqual(world.certificates(cert), [self.downstream.served_leaf(name)])
        self.downstream.assert_fits(self, name)

    def test_beside_certbot(self):
        """Two tools in one config dir: what certbot does, well or not, harms and stops nothing."""
        certbot = Certbot(self, self.downstream.config)
        self.assert_well(certbot.issue("example.org", "example.org"))
        first = AUTHORITY.issue(NAMES)
        upstream = world.Upstream(first).started(self)
        self.downstream.key(NAME, first)
        self.assert_ended(0, "installed", None, NAME, "--from", upstream.source,
                          "--ca-file", AUTHORITY.root)
        both = self.snapshot("example.org"), self.snapshot(NAME)

        self.assert_well(certbot.run("renew"))
        listed = certbot.run("certificates")
        self.assert_well(listed)
        self.assertIn("Certificate Name: example.org", listed.out)
        self.assertNotIn("invalid", listed.out)
        self.assertEqual(1, certbot.issue(NAME, NAME, prove=False).status)
        conf = os.path.join(self.downstream.config, "renewal", NAME + ".conf")
        self.assertFalse(os.path.exists(conf))
        # A challenge that is met for a name that certferry has: certbot stumbles over live/NAME.
        self.assertEqual(1, certbot.issue(NAME, NAME).status)
        self.assertEqual(b"", world.read(conf))
        self.assertEqual(both, (self.snapshot("example.org"), self.snapshot(NAME)))

        upstream.switch(AUTHORITY.issue(NAMES, key=first.key))
        result = self.downstream.run("renew")
        self.assertEqual(0, result.status, result)
        self.assertRegex(result.out, r"\Aexample\.com: installed: ")
        self.assertRegex(result.err, r"\Acertferry: example\.com: [^\n]*renewal/example\.com\.conf"
                         r"[^\n]*\n\Z")
        os.unlink(conf)
        self.assertEqual("", self.downstream.run("renew").err)
        self.assert_well(certbot.renew())
        self.assertEqual("unchanged", self.assert_ended(0, "unchanged", None, "renew")["result"])

    def snapshot(self, name):
        """What is on disk of a lineage, certferry's or certbot's; the state's time may change."""
        return {path: entry for path, entry in self.downstream.snapshot().items()
                if re.match(r"(live|archive)/{}(@\d+)?(/|\Z)".format(re.escape(name)), path)}


class Served(Scene):
    """--served-at: daemons that reload, that reload late, that are forgotten."""

    def scene(self, kind):
        """(downstream, upstream, daemon): one lineage in service, ferried and served."""
        downstream = world.Downstream().started(self)
        credential = AUTHORITY.issue(NAMES)
        upstream = world.Upstream(credential).started(self)
        downstream.key(NAME, credential)
        self.assert_ended(0, "installed", None, NAME, "--from", upstream.source, "--ca-file",
                          AUTHORITY.root, downstream=downstream)
        daemon = kind(self, downstream.live(NAME))
        return downstream, upstream, daemon

    def rotate(self, downstream, upstream):
        """The upstream renews, for the key that it has."""
        upstream.switch(AUTHORITY.issue(NAMES, key=downstream.live(NAME, "privkey.pem")))

    def follows(self, kind):
        """A hook that reloads, then one that does so a second after it has ended."""
        downstream, upstream, daemon = self.scene(kind)
        later = "(sleep 1; {}) >/dev/null 2>&1 &".format(daemon.reload_command)
        for hook in (daemon.reload_command, later):
            self.assert_ended(0, "unchanged", None, NAME, "--served-at", daemon.source,
                              "--deploy-hook", hook, downstream=downstream)
            self.rotate(downstream, upstream)
            self.assert_ended(0, "installed", None, "renew", downstream=downstream)
            self.assertTrue(daemon.shows_only(downstream.served_leaf(NAME)))
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

    @unittest.skipUnless(os.geteuid() == 0, "postfix needs root")
    @world.needs("postfix")
    def test_postfix_follows(self):
        """postfix behind STARTTLS, at once and late."""
        self.follows(Postfix)

    @unittest.skipUnless(os.geteuid() == 0, "postfix needs root")
    @world.needs("nginx", "haproxy", "postfix")
    def test_forgotten(self):
        """A hook that reloads nothing: not-served and pending; hooks run again at the next run.

        All three daemons at once, since each run waits, three seconds in place of fifteen.
        """
        hasty = world.patched(self, "certferry.SERVED_SECONDS = 3")
        scenes = [self.scene(kind) for kind in (Nginx, Haproxy, Postfix)]
        for downstream, upstream, daemon in scenes:
            # The hook counts its runs, and reloads from the moment that somebody has mended it.
            hook = "echo ran >> ran; if [ -e mended ]; then {}; fi".format(daemon.reload_command)
            self.assert_ended(0, "unchanged", None, NAME, "--served-at", daemon.source,
                              "--deploy-hook", "cd '{}'; {}".format(downstream.config, hook),
                              downstream=downstream)
            self.rotate(downstream, upstream)
        stale = [daemon.leaf() for _, _, daemon in scenes]
        runs = [downstream.start("renew", "--json", python=hasty) for downstream, _, _ in scenes]
        ended = [(run.communicate(timeout=60)[0], run.returncode) for run in runs]
        for (out, status), (downstream, _, daemon), leaf in zip(ended, scenes, stale):
            lineage = json.loads(out.decode())["lineages"][0]
            self.assertEqual((1, "pending", "not-served"),
                             (status, lineage["result"], lineage["reason"]), lineage)
            self.assertIn(daemon.source.rsplit("/", 1)[-1], lineage["detail"])
            self.assertEqual(leaf, daemon.leaf())
            self.assertNotEqual(leaf, downstream.served_leaf(NAME))
            self.assertEqual(1, downstream.run("status").status)
            ran = os.path.join(downstream.config, "ran")
            before = world.read(ran)
            world.write(os.path.join(downstream.config, "mended"), "")
            self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
            self.assertEqual(before + b"ran\n", world.read(ran))
            self.assertTrue(daemon.shows_only(downstream.served_leaf(NAME)))
            self.assertEqual(0, downstream.run("status").status)

    @world.needs("nginx")
    def test_stale_copy(self):
        """A daemon that somebody started from an old copy is found by a run with nothing new."""
        downstream, upstream, _ = self.scene(Nginx)
        copy, old = world.scratch(self), world.scratch(self)
        for folder in (copy, old):
            subprocess.check_call("cp -L {}/*.pem {}".format(downstream.live(NAME), folder),
                                  shell=True)
        nginx = Nginx(self, copy)
        hook = "cp -L {}/*.pem {} && {}".format(downstream.live(NAME), copy, nginx.reload_command)
        self.rotate(downstream, upstream)
        self.assert_ended(0, "installed", None, NAME, "--served-at", nginx.source,
                          "--deploy-hook", hook, downstream=downstream)
        nginx.shows_only(downstream.served_leaf(NAME))
        self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
        stale = world.certificates(os.path.join(old, "cert.pem"))
        subprocess.check_call("cp {}/*.pem {}".format(old, copy), shell=True)
        nginx.reload()
        nginx.shows_only(stale[0])
        self.assert_ended(1, "pending", "not-served", "renew", downstream=downstream)
        self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
        self.assertTrue(nginx.shows_only(downstream.served_leaf(NAME)))

    @world.needs("nginx")
    def test_no_request_dropped(self):
        """50 rotations, each with a reload, while clients ask without a pause."""
        downstream, upstream, nginx = self.scene(Nginx)
        self.assert_ended(0, "unchanged", None, NAME, "--deploy-hook", nginx.reload_command,
                          downstream=downstream)
        done, shown, broken = threading.Event(), [], []
        trust = ssl.create_default_context(cafile=AUTHORITY.root)

        def ask():
            """One request after the other; each must be answered, by a certificate that fits."""
            while not done.wait(0.003):  # or it takes the processor from what it waits for
                try:
                    with socket.create_connection(("127.0.0.1", nginx.port), 10) as plain, \
                            trust.wrap_socket(plain, server_hostname=NAME) as tls:
                        tls.sendall(b"GET / HTTP/1.0\r\nHost: example.com\r\n\r\n")
                        answer = b"".join(iter(lambda: tls.recv(4096), b""))
                        shown.append(tls.getpeercert(True))
                    if not answer.endswith(b"served"):
                        broken.append(answer)
                except OSError as error:
                    broken.append(error)

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            for _ in range(50):
                self.rotate(downstream, upstream)
                self.assert_ended(0, "installed", None, "renew", downstream=downstream)
                world.eventually(
                    lambda: broken or shown[-1:] == [downstream.served_leaf(NAME)])
        finally:
            done.set()
            for client in clients:
                client.join()
        self.assertEqual([], broken)
        self.assertGreaterEqual(len(set(shown)), 50)


class Fleet(Scene):
    """Three downstreams of one upstream get a new key without a gap."""

    def test_staged_key(self):
        """Staged everywhere, then the upstream switches, then each follows at its next run."""
        old, new = AUTHORITY.issue(NAMES), AUTHORITY.issue(NAMES)
        upstream = world.Upstream(old).started(self)
        fleet = [world.Downstream().started(self) for _ in range(3)]
        for downstream in fleet:
            downstream.key(NAME, old)
            self.assert_ended(0, "installed", None, NAME, "--from", upstream.source, "--ca-file",
                              AUTHORITY.root, downstream=downstream)
        done, seen = threading.Event(), [set() for _ in fleet]
        readers = [threading.Thread(target=self.read, args=arguments)
                   for arguments in zip(fleet, seen, [done] * 3)]
        for reader in readers:
            reader.start()
        try:
            for downstream in fleet:
                self.assert_ended(0, "unchanged", None, NAME, "--key", new.key,
                                  downstream=downstream)
                self.assertTrue(self.staged(downstream))
            for downstream in fleet:
                self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
                downstream.assert_fits(self, NAME, old)
            upstream.switch(new)
            for downstream in fleet:
                self.assert_ended(0, "installed", None, "renew", downstream=downstream)
                downstream.assert_fits(self, NAME, new)
                self.assertEqual([], self.staged(downstream))
            for downstream in fleet:
                self.assert_ended(0, "unchanged", None, "renew", downstream=downstream)
        finally:
            done.set()
            for reader in readers:
                reader.join()
        pairs = {(world.read(which.fullchain), world.read(which.key)) for which in (old, new)}
        self.assertEqual([pairs] * 3, seen)

    @staticmethod
    def staged(downstream):
        """The staged keys' file names."""
        return [file for file in os.listdir(downstream.live(NAME)) if file.startswith("privkey-")]

    @staticmethod
    def read(downstream, seen, done):
        """Collect what a daemon would load that starts now: certificate and key of one moment."""
        finished = False
        while not finished:
            finished = done.wait(0.005)  # the last look comes after the last change
            current = os.readlink(downstream.live(NAME, ".current"))
            pair = tuple(world.read(downstream.live(NAME, file))
                         for file in ("fullchain.pem", "privkey.pem"))
            if current == os.readlink(downstream.live(NAME, ".current")):
                seen.add(pair)


if __name__ == "__main__":
    unittest.main()
