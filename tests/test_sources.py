"""Upstreams of every kind, good and bad, on real sockets: what is fetched, in what time, by whom.

Where a table has many servers, each is a lineage of its own and one `renew` ferries them all.
Impostors are test_proof.py's; files, commands and stores are test_stores.py's. Tests with real
servers want Debian's packages dovecot-imapd, postgresql, slapd, vsftpd.
"""

import contextlib
import glob
import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import impostors, world

NAME = "example.com"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
# From Python 3.10 on the ssl module tells the chain; before, `openssl s_client` connects once more.
TELLS = sys.version_info >= (3, 10)

# Answers for certain names in place of the resolver's: places is {name: its addresses}. Text would
# be encoded by a module that nobody, who asks, may not be able to load.
RESOLVER = """
import socket
resolve, places = socket.getaddrinfo, {!r}
def getaddrinfo(host, *rest, **how):
    name = host.decode() if isinstance(host, bytes) else host
    found = []
    for address in places.get(name, [name]):
        found += resolve(address.encode(), *rest, **how)
    return found
socket.getaddrinfo = getaddrinfo
"""
# The resolver is asked by the process that talks to the network: code in its place runs there, and
# what it raises is what certferry tells.
IN_THE_NETWORK_PROCESS = """
import fcntl, socket, stat
def getaddrinfo(host, port, *rest, **how):
    found = []
{}
    raise OSError("found: " + " ".join(map(str, found)))
socket.getaddrinfo = getaddrinfo
"""


class SourceCase(unittest.TestCase):
    """One authority for the class, a downstream for each test."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())
        cls.good = cls.authority.issue([NAME])

    def setUp(self):
        self.there = world.Downstream().started(self)

    def issue(self, *names, **how):
        """A certificate, for NAME unless other names are given."""
        return self.authority.issue(names or [NAME], **how)

    def cross(self, source, *options, name=NAME, key=None, **how):
        """`certferry NAME --from SOURCE ...` with the authority's root; its JSON object."""
        if key:
            self.there.key(name, key)
        options = ("--ca-file", self.authority.root) + options
        for each in [source] if isinstance(source, str) else source:
            options += ("--from", each)
        _, document = self.there.json(name, *options, **how)
        return document["lineages"][0]

    def renew(self, *options, **how):
        """`certferry renew`; {lineage: its JSON object}."""
        _, document = self.there.json("renew", *options, **how)
        return {each["name"]: each for each in document["lineages"]}

    def lineage(self, name, source, key=None, **options):
        """Put a lineage there by hand: a key, the good one's unless one is given, and a conf."""
        self.there.key(name, key or self.good)
        self.configure(name, source, **options)

    def configure(self, name, source, **options):
        """Write its NAME.conf; an option that is empty is left out."""
        os.makedirs(os.path.dirname(self.there.conf(name)), 0o700, exist_ok=True)
        options = dict({"ca-file": self.authority.root, "domain": NAME}, **options)
        options["from"] = source
        lines = ["{} = {}\n".format(*option) for option in sorted(options.items()) if option[1]]
        world.write(self.there.conf(name), "".join(lines), 0o600)

    def assert_result(self, expected, outcome, words="."):
        """The outcome's result, or the reason of its refusal, and what is said about it."""
        self.assertIn(expected, (outcome["result"], outcome["reason"]), outcome)
        if outcome["detail"]:
            self.assertRegex(outcome["detail"], words or ".")

    def serve(self, server):
        """Serve until the test ends; returns the server."""
        self.addCleanup(server.__exit__)
        return server.__enter__()

    def wrapper(self, script):
        """A command to run certferry by, in place of the interpreter, which is its $PYTHON."""
        path = os.path.join(world.scratch(self), "python")
        return world.write(
            path, "#!/bin/sh\nPYTHON='{}'\n{}\n".format(sys.executable, script), 0o755
        )


# ---------------------------------------------------------------- handshakes


class KeyTypes(SourceCase):
    """RSA and ECDSA side by side: the certificate of the local key's type is fetched."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.rsa = cls.authority.issue([NAME], key="rsa:2048")

    def test_both(self):
        """One upstream, and a lineage of each type, through a rotation; in the clear first, too."""
        pair = {"rsa": self.rsa, "ecdsa": self.good}
        upstreams = {
            "tls": self.serve(world.Upstream(list(pair.values()))),
            "smtp": self.serve(
                world.Upstream(list(pair.values()), before=impostors.after_dialogue("smtp"))
            ),
        }
        for protocol, upstream in upstreams.items():
            source = upstream.source if protocol == "tls" else "smtp://" + upstream.source
            for kind, credential in pair.items():
                self.lineage("{}.{}.example.com".format(kind, protocol), source, credential)
        for expected in ("installed", "unchanged", "installed"):
            for name, outcome in self.renew().items():
                with self.subTest(name, expected=expected):
                    self.assert_result(expected, outcome)
                    self.there.assert_fits(self, name, pair[name.partition(".")[0]])
            if expected == "unchanged":
                pair = {kind: self.issue(key=one.key) for kind, one in pair.items()}
                for upstream in upstreams.values():
                    upstream.switch(list(pair.values()))

    def test_asked_once_more(self):
        """Where another type came, and only there; before Python 3.10 s_client connects too."""
        more = 0 if TELLS else 1
        for own in (self.rsa, self.good):
            for shown, most in (([self.rsa, self.good], 2), (own, 1)):
                with world.Upstream(shown) as upstream, world.Downstream() as self.there:
                    self.assert_result("installed", self.cross(upstream.source, key=own))
                    self.assertLessEqual(upstream.connections, most + more)

    def test_only_the_other_type(self):
        """The reason is that of the certificate which there is, or of the one for our type."""
        old = self.issue(key=self.rsa.key, not_before=world.days(-20), not_after=world.days(-10))
        other = self.serve(world.Upstream(self.good))
        expired = self.serve(world.Upstream([old, self.good]))
        self.lineage("other.example.com", other.source, self.rsa)
        self.lineage("expired.example.com", expired.source, self.rsa)
        found = self.renew()
        self.assert_result("key-mismatch", found["other.example.com"], "ECDSA P-256")
        self.assert_result("expired", found["expired.example.com"])


class OnlyOnce(world.Upstream):
    """A rate limit: every connection but the first is reset."""

    def talk(self, sock):
        """Serve the first one."""
        if self.connections == 1:
            super().talk(sock)
        else:
            world.ClosesAtOnce(reset=True).talk(sock)


class Handshakes(SourceCase):
    """Particular servers: versions, names, addresses, chains."""

    def test_versions(self):
        rsa = self.issue(key="rsa:2048")
        rows = (
            ("installed", self.good, {"maximum": "1.2"}),
            ("installed", rsa, {"maximum": "1.2"}),
            ("installed", self.good, {"minimum": "1.3"}),
            ("installed", rsa, {"minimum": "1.3"}),
            ("installed", self.good, {"minimum": "1.0"}),
            ("installed", rsa, {"tickets": False}),
            ("installed", self.good, {"maximum": "1.2", "ciphers": "ECDHE+CHACHA20"}),
            ("unreachable", self.good, {"minimum": "1.1", "maximum": "1.1"}),
        )
        for number, (_, credential, how) in enumerate(rows):
            upstream = self.serve(world.Upstream(credential, **how))
            self.lineage("v{}.example.com".format(number), upstream.source, credential)
        static = self.serve(world.StaticRsaOnly(rsa))
        self.lineage("static.example.com", static.source, rsa)
        found = self.renew()
        for number, (expected, credential, how) in enumerate(rows):
            name = "v{}.example.com".format(number)
            with self.subTest(**how):
                self.assert_result(expected, found[name], "handshake|TLS")
                if expected == "installed":
                    self.there.assert_fits(self, name, credential)
        # A key exchange without a signature proves nothing and is not offered.
        self.assert_result("unreachable", found["static.example.com"])

    def test_server_names(self):
        """--sni, else the first -d that is no wildcard, else NAME; an address is no name."""
        good = self.issue("*.example.com", NAME, "192.0.2.7", "xn--bcher-kva.example.com")
        several = "\n    *.example.com\n    www.example.com"
        rows = (
            ("a.example.com", {}, "a.example.com"),
            ("b.example.com", {"sni": "up.example.net"}, "up.example.net"),
            ("c.example.com", {"domain": several}, "www.example.com"),
            ("d.example.com", {"domain": "*.example.com"}, "d.example.com"),
            ("e.example.com", {"sni": "up.example.net."}, "up.example.net"),
            ("192.0.2.7", {}, None),
            ("xn--bcher-kva.example.com", {}, "xn--bcher-kva.example.com"),
        )
        upstreams = [self.serve(world.Upstream(good)) for _ in rows]
        for upstream, (name, options, _) in zip(upstreams, rows):
            self.lineage(name, upstream.source, good, **dict({"domain": ""}, **options))
        found = self.renew()
        for upstream, (name, _, expected) in zip(upstreams, rows):
            with self.subTest(name):
                self.assert_result("installed", found[name])
                asked = set(upstream.asked)
                # The server of Python 3.6 decodes the name for its callback.
                self.assertLessEqual(asked, {expected, "b\u00fccher.example.com"})

    def test_virtual_hosts(self):
        other = self.issue("shop.example.org")
        strict = self.serve(world.Upstream(self.good, strict=[NAME]))
        hosts = self.serve(world.Upstream(other, hosts={NAME: self.good}))
        stranger = self.serve(world.Upstream(other))
        self.lineage("strict.example.com", strict.source, sni="other.example.com")
        self.lineage("served.example.com", strict.source, sni=NAME)
        self.lineage("hosts.example.com", hosts.source)
        self.lineage("stranger.example.com", stranger.source)
        found = self.renew()
        outcome = found["strict.example.com"]
        self.assert_result("unreachable", outcome, "does not serve other.example.com.*--sni")
        self.assert_result("installed", found["served.example.com"])
        self.assert_result("installed", found["hosts.example.com"])
        words = "shop.example.org|another key"
        self.assert_result("key-mismatch", found["stranger.example.com"], words)

    def test_ipv6(self):
        try:
            upstream = self.serve(world.Upstream(self.good, address="::1"))
        except OSError as error:
            self.skipTest("no IPv6 here: {}".format(error))
        outcome = self.cross(upstream.source, key=self.good)
        self.assert_result("installed", outcome)
        self.assertEqual(upstream.source, outcome["source"])

    def test_no_resumption(self):
        """A resumed session would show the certificate of the one before."""
        second = self.issue(key=self.good.key)
        with world.Upstream(self.good) as upstream:
            self.assert_result("installed", self.cross(upstream.source, key=self.good))
            upstream.switch(second, keep_sessions=True)
            self.assert_result("installed", self.renew()[NAME])
            self.assertEqual(0, upstream.resumed)
        self.there.assert_fits(self, NAME, second)

    def test_one_connection(self):
        """One handshake brings leaf and chain where Python tells both; else the failure is told."""
        second = self.issue(key=self.good.key)
        plain = self.serve(OnlyOnce(self.good))
        mail = self.serve(OnlyOnce(self.good, before=impostors.after_dialogue("smtp")))
        self.lineage("tls.example.com", plain.source)
        self.lineage("mail.example.com", "smtp://" + mail.source)
        for name, outcome in self.renew().items():
            with self.subTest(name):
                if TELLS:
                    self.assert_result("installed", outcome)
                    self.there.assert_fits(self, name, self.good)
                else:
                    self.assert_result("unreachable", outcome, "second connection")
        if TELLS:
            self.assertEqual([1, 1], [plain.connections, mail.connections])
            with world.Upstream(second) as upstream:
                self.configure("tls.example.com", upstream.source)
                self.assert_result("installed", self.renew("tls.example.com")["tls.example.com"])
                self.assertEqual(1, upstream.connections)

    def test_chains(self):
        """Whatever is sent beside the leaf, leaf and issuers in order are written, and no root."""
        authority = self.authority
        upper = authority.issue(
            [],
            subject="/CN=Upper",
            ca=True,
            issuer=authority.root_credential,
            extensions=world.INTERMEDIATE.replace(",pathlen:0", ""),
        )
        lower = authority.issue([], subject="/CN=Lower", ca=True, issuer=upper)
        good = self.issue(issuer=lower)
        other = world.Authority(world.scratch(self), name="Other").intermediate.cert
        upper, lower, root, leaf = upper.cert, lower.cert, authority.root, good.cert
        rows = (
            ("root", [lower, upper, root]),
            ("reversed", [upper, lower]),
            ("twice", [lower, lower, upper, upper]),
            ("leaf-again", [lower, leaf, upper]),
            ("unrelated", [other, lower, other, upper]),
            ("all", [root, other, upper, leaf, lower, root]),
            ("all-1-2", [root, other, upper, leaf, lower, root]),
            ("lacking", [lower]),
            ("alone", []),
        )
        for name, sent in rows:
            version = "1.2" if "1-2" in name else "1.3"
            upstream = self.serve(world.Upstream(good, send=sent, maximum=version))
            self.lineage(name + ".example.com", upstream.source, good)
        for name, outcome in self.renew().items():
            with self.subTest(name):
                if name.startswith(("lacking", "alone")):
                    self.assert_result("untrusted", outcome)
                else:
                    self.assert_result("installed", outcome)
                    self.there.assert_fits(self, name, good)

    def test_a_log_of_session_keys(self):
        """SSLKEYLOGFILE is ignored: no file is written, and one that can't be stops nothing."""
        upstream = self.serve(world.Upstream(self.good))
        folder = world.scratch(self)
        os.chmod(folder, 0o777)
        for path in (os.path.join(folder, "log"), "/nonexistent/log"):
            with self.subTest(path), world.Downstream() as self.there:
                env = {"SSLKEYLOGFILE": path}
                self.assert_result("installed", self.cross(upstream.source, key=self.good, env=env))
                self.assertFalse(os.path.exists(path))


# ---------------------------------------------------------------- what misbehaves


def altered(path, count):
    """PEM of that many certificates that no two are the same: of one, with a false signature."""
    (der,) = world.certificates(path)
    texts = []
    for number in range(count):
        texts.append(ssl.DER_cert_to_PEM_cert(der[:-2] + bytes([number, 1])))
    return "".join(texts)


class Bounds(SourceCase):
    """Deadlines and sizes: whatever the peer does, a word within the timeout."""

    def test_servers_that_misbehave(self):
        rows = (
            ("timeout", world.Silent()),
            ("timeout", world.Dripping(0.05)),
            ("timeout", world.HelloThenHang()),
            ("unreachable", world.PlainHttp()),
            ("unreachable", world.Garbage()),
            ("unreachable", world.ClosesAtOnce()),
            ("unreachable", world.ClosesAtOnce(reset=True)),
            ("unreachable", world.Garbage(endless=True)),
            ("unreachable", world.Garbage(b"\x15\x03\x03\0\x02\x02\x28")),
            ("unreachable", world.Garbage(b"\x16\x03\x03\xff\xff" + b"x" * 70000)),
            ("unreachable", world.Garbage(b"220 mail ESMTP\r\n")),
            ("unreachable", world.Closed()),
        )
        for number, (expected, server) in enumerate(rows):
            # What has to be right, and not only over in time, may take long on a busy machine.
            seconds = "0.4" if expected == "timeout" else "20"
            source = self.serve(server).source
            self.lineage("tls-{}.example.com".format(number), source, timeout=seconds)
        found = self.renew()
        for number, (expected, server) in enumerate(rows):
            with self.subTest(number, server=type(server).__name__):
                self.assert_result(expected, found["tls-{}.example.com".format(number)])

    def test_dialogues_that_misbehave(self):
        servers = {
            "silent": world.Silent(),
            "dripping": world.Dripping(0.05),
            "closing": world.ClosesAtOnce(),
            "endless": world.Garbage(b"220-more\r\n" * 1000, endless=True),
            "http": world.PlainHttp(),
            "closed": world.Closed(),
        }
        for name, server in servers.items():
            self.serve(server)
            for protocol in ("smtp", "ldap", "mysql", "xmpp"):
                seconds = "0.3" if name in ("silent", "dripping", "http") else "20"
                source = "{}://{}".format(protocol, server.source)
                self.lineage("{}-{}.example.com".format(name, protocol), source, timeout=seconds)
        for name, outcome in self.renew().items():
            with self.subTest(name):
                self.assertIn(outcome["reason"], ("timeout", "unreachable"), outcome)
                if name.startswith("silent"):
                    self.assertEqual("timeout", outcome["reason"])
                if name.startswith(("closed", "closing", "endless")):
                    self.assertEqual("unreachable", outcome["reason"])

    def test_sizes(self):
        """At most 16 certificates and 1 MiB."""
        intermediate = self.authority.intermediate.cert
        folder = world.scratch(self)
        large = self.issue(extensions=world.LEAF + "nsComment = " + "x" * 100000 + "\n").cert
        rows = {
            "sixteen": altered(self.good.cert, 14),
            "seventeen": altered(self.good.cert, 15),
            "large": altered(large, 9),
        }
        for name, content in rows.items():
            path = world.write(os.path.join(folder, name), content)
            upstream = self.serve(world.Upstream(self.good, send=[intermediate, path]))
            self.lineage(name + ".example.com", upstream.source)
        found = self.renew()
        self.assert_result("installed", found["sixteen.example.com"])
        self.there.assert_fits(self, "sixteen.example.com", self.good)
        self.assert_result("malformed", found["seventeen.example.com"], "16|chain")
        self.assert_result("malformed", found["large.example.com"])

    def test_a_dead_endpoint(self):
        """It is waited for once in a run, by whichever lineage; the others get the same answer."""
        with world.Silent() as server:
            for number in range(12):
                name = "n{}.example.com".format(number)
                self.lineage(name, server.source, timeout="0.5", sni=name)
            # The same host behind another dialogue is another one.
            self.lineage("mail.example.com", "smtp://" + server.source, timeout="0.5")
            started = time.monotonic()
            found = self.renew()
            took = time.monotonic() - started
            self.assertEqual(2, server.connections)
        for outcome in found.values():
            self.assert_result("timeout", outcome, re.escape(server.source))
        self.assertEqual(13, len(found))
        self.assertLess(took, 13 * 0.5)

    def test_many_dead_upstreams(self):
        """At most one timeout for every eight of them, where the keys are remembered to fit."""
        names = ["n{:02}.example.com".format(number) for number in range(10)]
        upstream = self.serve(world.Upstream(self.good))
        for name in names:
            self.lineage(name, upstream.source)
        for outcome in self.renew().values():
            self.assert_result("installed", outcome)
        for name in names[:9]:
            self.configure(name, self.serve(world.Silent()).source, timeout="1")
        started = time.monotonic()
        found = self.renew()
        took = time.monotonic() - started
        for name in names:
            with self.subTest(name):
                outcome = found[name]
                self.assertEqual("timeout" if name in names[:9] else None, outcome["reason"])
        # In turn they would take 9 s; the slack is for a busy machine.
        self.assertLess(took, 2 + 5)

    def test_the_resolver_counts(self):
        """--timeout is for all of an exchange, the name's resolution included."""
        python = world.patched(
            self, IN_THE_NETWORK_PROCESS.format("    __import__('time').sleep(60)")
        )
        self.lineage(NAME, "up.example.net", timeout="0.5")
        started = time.monotonic()
        self.assert_result("timeout", self.renew(python=python)[NAME], "resolve")
        self.assertLess(time.monotonic() - started, 20)

    def test_nothing_stays(self):
        """A run that is ended while it waits: what asks for it ends too, by itself or in time."""

        def running():
            """The commands of all processes that name the server."""
            found = []
            for path in glob.glob("/proc/[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found.append(world.read(path))
            return [command for command in found if server.source.encode() in command]

        self.there.key(NAME, self.good)
        for source, seconds in (("smtp://{}", "60"), ("vault://{}/secret/a", "1")):
            with self.subTest(source), world.Silent() as server:
                arguments = [NAME, "--from", source.format(server.source), "--timeout", seconds]
                process = self.there.start(*arguments, env={"VAULT_TOKEN": "s.token"})
                world.eventually(lambda server=server: server.connections)
                self.assertTrue(running())
                process.terminate()
                process.communicate()
                world.eventually(lambda: not running(), 20)


class Addresses(SourceCase):
    """Several sources of a lineage, several addresses of one name, names that lead here."""

    def test_sources_in_turn(self):
        """The first that gives an acceptable offer; where none does, the gravest reason counts."""
        first = self.good
        second, stranger = self.issue(key=first.key), self.issue()
        stale, fresh, wrong = (
            self.serve(world.Upstream(each)) for each in (first, second, stranger)
        )
        closed = self.serve(world.Closed())
        rows = (
            ([fresh, stale], "unchanged", fresh),
            ([stale, fresh], "unchanged", fresh),
            ([closed, wrong, fresh], "unchanged", fresh),
            ([stale], "older", None),
            ([closed, stale], "unreachable", None),
            ([stale, wrong, closed], "key-mismatch", None),
        )
        for servers, shown in (([closed, wrong, stale], first), ([fresh], second)):
            outcome = self.cross(sources_of(servers), key=None if shown is second else first)
            self.assert_result("installed", outcome)
            self.assertEqual(servers[-1].source, outcome["source"])
            self.there.assert_fits(self, NAME, shown)
        for servers, expected, source in rows:
            with self.subTest(servers, expected=expected):
                outcome = self.cross(sources_of(servers))
                self.assert_result(expected, outcome)
                self.assertEqual(source and source.source, outcome["source"])
                self.there.assert_fits(self, NAME, second)

    def pool(self, *members):
        """Servers at 127.0.0.2 and on, all at one port; returns that port."""
        port = 0
        for number, member in enumerate(members, 2):
            member.address, member.port = "127.0.0.{}".format(number), port
            port = self.serve(member).port
        return port

    def test_first_address_is_dead(self):
        """The others get their share of the time, whatever is wrong with the first."""
        places = {}
        for first in (world.Silent(), world.PlainHttp(), world.ClosesAtOnce(), None):
            name = "n{}.example.com".format(len(places))
            host = "pool-" + name
            places[host] = ["127.0.0.2", "127.0.0.3"]
            members = [first or world.Silent(), world.Upstream(self.good)]
            port = self.pool(*members)
            if first is None:
                members[0].stop()
            seconds = "4" if len(places) == 1 else "20"
            self.lineage(name, "{}:{}".format(host, port), timeout=seconds)
        found = self.renew(python=world.patched(self, RESOLVER.format(places)))
        self.assertEqual(4, len(found))
        for name, outcome in found.items():
            with self.subTest(name):
                self.assert_result("installed", outcome)

    def test_this_very_machine(self):
        """Without --from a name that leads here is no upstream, and nothing is asked."""
        places = {"four.example.com": ["127.0.0.1"], "six.example.com": ["::1"]}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            with contextlib.suppress(OSError):  # no network at all
                probe.connect(("192.0.2.1", 9))
                places["own.example.com"] = [probe.getsockname()[0]]
        python = world.patched(self, RESOLVER.format(places))
        for name in places:
            self.lineage(name, "")
        result = self.there.run("renew", python=python)
        for name in places:
            with self.subTest(name):
                words = "{}: .*this very machine.*\n?.*--from".format(re.escape(name))
                self.assertRegex(result.err, words)
        for outcome in self.renew(python=python).values():
            self.assert_result("unreachable", outcome)
        # With --from it is one: what serves the certificate may be another program here.
        upstream = self.serve(world.Upstream(self.good))
        source = "four.example.com:{}".format(upstream.port)
        outcome = self.cross(source, key=self.good, python=python)
        self.assert_result("installed", outcome)

    def test_absolute_names(self):
        """The dot at the end of a name is for the resolver, which then adds no search domain."""
        up, stranger = world.Upstream(self.good), world.Upstream(self.issue("other.example.org"))
        port = self.pool(up, stranger)
        places = {"up.example.net.": ["127.0.0.2"], "up.example.net": ["127.0.0.3"]}
        python = world.patched(self, RESOLVER.format(places))
        source = "up.example.net.:{}".format(port)
        options = ("--served-at", source, "--sni", "example.com.")
        outcome = self.cross(source, *options, key=self.good, python=python)
        self.assert_result("installed", outcome)
        self.assertEqual((0, {NAME}), (stranger.connections, set(up.asked)))
        self.assert_result("unchanged", self.renew(python=python)[NAME])

    def test_ports(self):
        """Each protocol's own, where none is given."""
        ports = {
            "smtp": 25,
            "imap": 143,
            "pop3": 110,
            "ftp": 21,
            "ldap": 389,
            "xmpp": 5222,
            "postgres": 5432,
            "mysql": 3306,
        }
        for protocol in ports:
            self.lineage(protocol + ".example.com", protocol + "://up.example.net")
        self.lineage("tls.example.com", "up.example.net")
        told = IN_THE_NETWORK_PROCESS.format("    found = [port]")
        found = self.renew(python=world.patched(self, told))
        for protocol, port in dict(ports, tls=443).items():
            outcome = found[protocol + ".example.com"]
            self.assert_result("unreachable", outcome, r"found: {}\b".format(port))


def sources_of(servers):
    """What --from takes, for several of them."""
    return [server.source for server in servers]


# ---------------------------------------------------------------- STARTTLS


def heard_until(sock, pattern):
    """What the peer says until all of it matches; no byte more is read."""
    heard = b""
    while not pattern.fullmatch(heard):
        piece = sock.recv(1)
        if not piece:
            raise ValueError("the peer has enough: {!r}".format(heard))
        heard += piece
    return heard


class Scripted(world.Upstream):
    """Holds a dialogue step by step, then TLS: says bytes, or waits for what matches a pattern.

    At a step None the peer must be silent for a moment, which also parts what is said into pieces.
    Before Python 3.10 every second connection is s_client's and meets the usual dialogue. .heard is
    what was said to it in the scripted one.
    """

    def __init__(self, credential, protocol, steps, **where):
        super().__init__(credential, before=self.begin, **where)
        self.protocol, self.steps, self.heard = protocol, steps, []

    def begin(self, sock):
        """Hold the dialogue."""
        if not TELLS and self.connections % 2 == 0:
            impostors.DIALOGUES[self.protocol](sock, b"")
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for step in self.steps:
            if step is None:
                if select.select([sock], [], [], 0.03)[0]:
                    raise ValueError("the peer speaks too early")
            elif isinstance(step, bytes):
                sock.sendall(step)
            else:
                self.heard.append(heard_until(sock, step))


class Refusing(Scripted):
    """The same without TLS: waits for the end, or with hang_up ends it."""

    hang_up = False

    def talk(self, sock):
        """The dialogue alone."""
        self.begin(sock)
        if self.hang_up:
            sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def ber(kind, *parts, long=False):
    """A BER element, its length in the long form that Active Directory always writes, or short."""
    content = b"".join(parts)
    length = bytes([len(content)])
    if long:
        length = b"\x84" + len(content).to_bytes(4, "big")
    return bytes([kind]) + length + content


def ldap_answer(code, words=b"", long=False, more=b""):
    """An ExtendedResponse with that resultCode."""
    result = [ber(0x0A, bytes([code])), ber(4, b""), ber(4, words), more]
    return ber(0x30, ber(2, b"\1"), ber(0x78, *result, long=long), long=long)


def mysql_packet(content):
    """One packet, the first of its connection."""
    return len(content).to_bytes(3, "little") + b"\0" + content


def mysql_greeting(version, flags=b"\xff\xff"):
    """A greeting of protocol 10 with these lower capabilities."""
    challenge = b"\1\0\0\0" + b"12345678\0"
    rest = flags + b"\x21\2\0\xff\x81\x15" + bytes(10) + b"123456789012\0"
    return mysql_packet(b"\x0a" + version + b"\0" + challenge + rest)


EHLO = re.compile(rb"EHLO \S+\r\n")
STARTTLS = re.compile(rb"STARTTLS\r\n")
TAGGED = re.compile(rb"a STARTTLS\r\n")
STLS = re.compile(rb"STLS\r\n")
AUTH = re.compile(rb"AUTH TLS\r\n")
EXTENDED = re.compile(rb"\x30.\x02\x01\x01\x77.\x80\x161\.3\.6\.1\.4\.1\.1466\.20037", re.S)
STREAM = re.compile(rb".*<stream:stream [^>]*\bto=['\"]example\.com['\"][^>]*>", re.S)
ELEMENT = re.compile(rb"\s*<starttls xmlns=['\"]urn:ietf:params:xml:ns:xmpp-tls['\"]\s*/>")
SSL_REQUEST = re.compile(rb"\0\0\0\x08\x04\xd2\x16\x2f")
CAPABILITIES = re.compile(rb"\x20\0\0\x01.{32}", re.S)
FEATURES = b"<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>"
OPENED = (
    b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' id='1' version='1.0' "
    b"xmlns:stream='http://etherx.jabber.org/streams'>"
)
PROCEED = b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
NAMED = ldap_answer(0, b"fine", True, ber(0x8A, b"1.3.6.1.4.1.1466.20037"))
MARIADB = mysql_greeting(b"5.5.5-10.11.6-MariaDB")

# Odd, and right: (protocol, what is odd, the dialogue).
ODD = (
    (
        "smtp",
        "a banner whose first line comes early",
        [b"220-mail\r\n", None, b"220 ESMTP\r\n", EHLO, b"250 STARTTLS\r\n", STARTTLS]
        + [b"220 go\r\n"],
    ),
    (
        "smtp",
        "answers of several lines, in pieces, and of numbers alone",
        [b"220\r\n", EHLO, b"250-a\r\n250-", None, b"STARTTLS\r", None, b"\n250\r\n", STARTTLS]
        + [b"220-2.0.0 go\r\n", None, b"220 ahead\r\n"],
    ),
    (
        "smtp",
        "lines without returns",
        [b"220 mail\n", EHLO, b"250-mail\n250 STARTTLS\n", STARTTLS, b"220 go\n"],
    ),
    (
        "imap",
        "capabilities in the greeting, other news before the answer",
        [b"* OK [CAPABILITY IMAP4rev1 STARTTLS] hi\r\n", TAGGED, b"* 1 EXISTS\r\n"]
        + [None, b"* OK still here\r\n", None, b"a OK [X] begin\r\n"],
    ),
    ("imap", "a greeting in pieces", [b"* O", None, b"K\r", None, b"\n", TAGGED, b"a OK\r\n"]),
    ("pop3", "a banner with a timestamp", [b"+OK <1896.6@a.example>\r\n", STLS, b"+OK\r\n"]),
    (
        "ftp",
        "a banner of several lines, with anything between them",
        [b"220-Welcome\r\n 220 not yet\r\n221 nor now\r\nbe kind\r\n", None, b"220 ready\r\n"]
        + [AUTH, b"234-go\r\n234 on\r\n"],
    ),
    ("ldap", "lengths in the long form", [EXTENDED, ldap_answer(0, long=True)]),
    ("ldap", "the same in pieces, with a name", [EXTENDED, NAMED[:3], None, NAMED[3:]]),
    (
        "xmpp",
        "features in pieces",
        [STREAM, OPENED[:30], None, OPENED[30:], None, FEATURES[:40], None, FEATURES[40:]]
        + [ELEMENT, PROCEED[:9], None, PROCEED[9:]],
    ),
    (
        "xmpp",
        "quotes of the other kind, more features, elements with an end",
        [STREAM, OPENED.replace(b"'", b'"') + b"<stream:features><mechanisms><m>X</m></mechanisms>"]
        + [b'<starttls xmlns="urn:ietf:params:xml:ns:xmpp-tls"><required/></starttls>']
        + [b"</stream:features>", ELEMENT, PROCEED[:-2] + b"></proceed>"],
    ),
    ("postgres", "S", [SSL_REQUEST, b"S"]),
    ("mysql", "MariaDB's greeting in pieces", [MARIADB[:3], None, MARIADB[3:], CAPABILITIES]),
)
# Refused: (protocol, what is wrong, the dialogue, what is said of it).
HELLO = [b"220 hi\r\n", EHLO, b"250 a\r\n"]
TOO_MANY = mysql_packet(b"\xff\x10\4Too many connections")
REFUSED = (
    ("smtp", "the banner", [b"554 mail: go away, you\r\n"], "554 mail: go away"),
    ("smtp", "EHLO", [b"220 hi\r\n", EHLO, b"550 you are no mail host\r\n"], "550 you are no mail"),
    ("smtp", "not now", HELLO + [STARTTLS, b"454 not now\r\n"], "454 not now"),
    ("smtp", "unknown", HELLO + [STARTTLS, b"502-5.5.1\r\n502 what\r\n"], "502"),
    ("smtp", "another service", [b"* OK IMAP ready\r\n"], "IMAP ready"),
    ("smtp", "the banner and more", [b"220 hi\r\n250 pipelined\r\n"], "in the clear"),
    ("smtp", "an answer and more", HELLO[:2] + [b"250 a\r\n220 go\r\n"], "in the clear"),
    ("imap", "a farewell", [b"* BYE overloaded\r\n"], "overloaded"),
    ("imap", "NO", [b"* OK hi\r\n", TAGGED, b"a NO not here\r\n"], "a NO not here"),
    ("imap", "BAD", [b"* OK hi\r\n", TAGGED, b"* 1 EXISTS\r\na BAD what\r\n"], ""),
    ("imap", "the greeting and more", [b"* OK hi\r\na OK pipelined\r\n"], "in the clear"),
    ("pop3", "the banner", [b"-ERR closed for today\r\n"], "closed for today"),
    ("pop3", "no TLS", [b"+OK hi\r\n", STLS, b"-ERR unknown command\r\n"], "unknown command"),
    ("ftp", "the banner", [b"421 too many users\r\n"], "421 too many users"),
    ("ftp", "no TLS", [b"220 hi\r\n", AUTH, b"530 log in first\r\n"], "530 log in first"),
    ("ldap", "no TLS", [EXTENDED, ldap_answer(52, b"no TLS here")], "no TLS here"),
    ("ldap", "in long form", [EXTENDED, ldap_answer(2, b"protocol error", True)], "protocol error"),
    ("xmpp", "no TLS", [STREAM, OPENED + b"<stream:features><m/></stream:features>"], ""),
    ("xmpp", "no features", [STREAM, OPENED + b"<stream:features/>"], ""),
    ("xmpp", "no host", [STREAM, OPENED + b"<stream:error><host-unknown/></stream:error>"], ""),
    (
        "xmpp",
        "a failure",
        [STREAM, OPENED + FEATURES, ELEMENT, PROCEED.replace(b"proceed", b"failure")],
        "",
    ),
    ("postgres", "N", [SSL_REQUEST, b"N"], "TLS"),
    ("postgres", "E", [SSL_REQUEST, b"EFATAL: too many clients already\n\0"], "too many clients"),
    ("mysql", "an error", [TOO_MANY], "Too many connections"),
    ("mysql", "blocked", [mysql_packet(b"\xff\x69\4#HY000Host 'h' is blocked")], "is blocked"),
    ("mysql", "no TLS", [mysql_greeting(b"8.0.36", b"\xff\xf7")], ""),
    ("mysql", "an old protocol", [mysql_packet(b"\x09" + MARIADB[5:])], ""),
)


class Starttls(SourceCase):
    """The eight protocols that begin in the clear; plain dialogues are in test_proof.py."""

    def test_odd_dialogues(self):
        """Each is followed, and the certificate behind it fetched."""
        self.assertEqual(set(impostors.DIALOGUES), {protocol for protocol, _, _ in ODD})
        servers = []
        for number, (protocol, _, steps) in enumerate(ODD):
            servers.append(self.serve(Scripted(self.good, protocol, steps)))
            source = "{}://{}".format(protocol, servers[-1].source)
            self.lineage("n{}.example.com".format(number), source, timeout="10")
        found = self.renew()
        for number, (protocol, what, steps) in enumerate(ODD):
            with self.subTest(protocol, what=what):
                self.assert_result("installed", found["n{}.example.com".format(number)])
                patterns = [step for step in steps if step and not isinstance(step, bytes)]
                self.assertEqual(len(patterns), len(servers[number].heard))
                if TELLS:
                    self.assertEqual(1, servers[number].connections)

    def test_refusals(self):
        """What the server says is quoted, number and words; nobody waits for the timeout."""
        for number, (protocol, _, steps, _) in enumerate(REFUSED):
            server = self.serve(Refusing(self.good, protocol, steps))
            source = "{}://{}".format(protocol, server.source)
            self.lineage("n{}.example.com".format(number), source, timeout="20")
        found = self.renew()
        for number, (protocol, what, _, words) in enumerate(REFUSED):
            with self.subTest(protocol, what=what):
                outcome = found["n{}.example.com".format(number)]
                self.assert_result("unreachable", outcome, re.escape(words))

    def test_endings(self):
        """The server hangs up before each step of a dialogue."""
        for number, (protocol, _, steps) in enumerate(ODD[::2]):
            for count in range(0, len(steps), 2):
                server = Refusing(self.good, protocol, steps[:count])
                server.hang_up = True
                name = "n{}-{}.example.com".format(number, count)
                self.lineage(name, "{}://{}".format(protocol, self.serve(server).source))
        for name, outcome in self.renew().items():
            with self.subTest(name):
                self.assert_result("unreachable", outcome)

    def ehlo(self, name=None, address="127.0.0.1"):
        """What this host calls itself in an EHLO, where its name is that one."""
        steps = [b"220 hi\r\n", EHLO, b"550 no\r\n"]
        server = self.serve(Refusing(self.good, "smtp", steps, address=address))
        python = None
        if name is not None:
            change = "echo {} >/proc/sys/kernel/hostname".format(name)
            words = 'exec unshare --uts sh -c \'{}; exec "$@"\' - "$PYTHON" "$@"'
            python = self.wrapper(words.format(change))
        self.cross("smtp://" + server.source, key=self.good, python=python)
        return server.heard[0].split()[1].decode()

    def test_ehlo(self):
        """This host's name, or its address as a literal where the name has no dot."""
        name = socket.gethostname().lower()
        self.assertEqual(name if "." in name else "[127.0.0.1]", self.ehlo().lower())

    @world.needs("unshare")
    @unittest.skipUnless(ROOT, "needs root: a host name of its own")
    def test_ehlo_of_other_hosts(self):
        self.assertEqual("mail.example.org", self.ehlo("mail.example.org"))
        self.assertEqual("[127.0.0.1]", self.ehlo("mail"))
        try:
            self.assertEqual("[IPv6:::1]", self.ehlo("mail", "::1"))
        except OSError as error:
            self.skipTest("no IPv6 here: {}".format(error))


# ---------------------------------------------------------------- privilege


class Privilege(SourceCase):
    """Who talks to the network, as whom, and what a network process gone bad can do."""

    def serve_one(self):
        """An upstream for a lineage in folders open to all, so that its key's mode counts."""
        upstream = self.serve(world.Upstream(self.good))
        os.chmod(os.path.dirname(self.there.config), 0o755)
        self.lineage(NAME, upstream.source)
        return upstream

    @world.needs("strace")
    @unittest.skipUnless(ROOT, "needs root")
    def test_who_talks(self):
        """strace: no process of root's connects or reads a connection; verifiers are others yet."""
        self.serve_one()
        log = os.path.join(world.scratch(self), "log")
        calls = (
            "clone,clone3,fork,vfork,setresuid,setresgid,setuid,setgid,connect,read,recvfrom,"
            "recvmsg,openat,open,execve"
        )
        words = 'exec strace -f -yy -s 200 -o {} -e trace={} "$PYTHON" "$@"'
        python = self.wrapper(words.format(log, calls))
        self.assert_result("installed", self.renew(python=python)[NAME])
        calls = Calls(world.read(log).decode("ascii", "replace"))
        talkers, readers, verifiers = {}, {}, set()
        for call in calls:
            if call.name == "connect" and "AF_INET" in call.text:
                talkers[call.process] = call.who
            if call.name in READS and re.search("<(TCP|UDP)(v6)?:", call.text):
                readers[call.process] = call.who
            if call.name == "execve" and VERIFIES.search(call.text):
                verifiers.add(call.who)
        self.assertTrue(talkers and readers and verifiers)
        users = {user for user, _ in list(talkers.values()) + list(readers.values())}
        self.assertEqual(1, len(users))
        self.assertNotIn(0, users)
        for user, group in verifiers:
            self.assertEqual(users, {user})
            self.assertNotIn(group, {group for _, group in talkers.values()})
        network = set(talkers) | set(readers)
        near_keys = [call for call in calls if KEYS.search(call.text) and call.process in network]
        self.assertEqual([], near_keys)

    SNOOP = """
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink("/proc/self/fd/" + name)
        except OSError:
            continue
        if path.startswith("{config}"):
            found.append(path)
    parent = "/proc/%d/" % os.getppid()
    for path in ("{key}", "{staged}", parent + "environ", parent + "mem", "{conf}", "{public}"):
        try:
            open(path, "rb").close()
            found.append(os.path.basename(path))
        except OSError:
            pass
    try:
        open("{config}/written", "w").close()
        found.append("written")
    except OSError:
        pass
    for number in (0, 1):
        try:
            os.setuid(number)
            found.append("root")
        except OSError:
            pass
    found += [os.getuid(), os.getgid(), os.getgroups(), os.getcwd()]
"""

    @unittest.skipUnless(ROOT, "needs root")
    def test_what_it_can_open(self):
        """The network process finds no key, nothing of root's and no way back; one public file."""
        os.chmod(os.path.dirname(self.there.config), 0o755)
        self.lineage(NAME, "up.example.net")
        public = world.write(os.path.join(self.there.config, "public.txt"), "public", 0o644)
        snoop = self.SNOOP.format(
            config=self.there.config,
            key=self.there.live(NAME, "privkey.pem"),
            staged=self.there.key(NAME, self.issue(), "privkey-next.pem"),
            conf=self.there.conf(NAME),
            public=public,
        )
        # A passwd entry that makes nobody root, or one of root's group, does not count.
        roots = "import pwd\npwd.getpwnam = lambda name: pwd.struct_passwd("
        entries = ("", roots + "('nobody', 'x', 0, 0, '', '/', ''))")
        for entry in entries:
            with self.subTest(entry):
                python = world.patched(self, entry + IN_THE_NETWORK_PROCESS.format(snoop))
                outcome = self.renew(python=python)[NAME]
                self.assert_result(
                    "unreachable", outcome, r"found: public.txt \d{4,} \d{4,} \[\] /"
                )

    # What it answers through, and what becomes of it.
    ANSWERS = """
    for name in os.listdir("/proc/self/fd"):
        try:
            flags = fcntl.fcntl(int(name), fcntl.F_GETFL)
            if stat.S_ISFIFO(os.fstat(int(name)).st_mode) and flags & os.O_WRONLY:
                answers = int(name)
        except OSError:
            pass
    {}
"""

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "needs /proc")
    def test_a_network_process_that_misbehaves(self):
        """It dies, floods or lies about the protocol: one line, in bounded time, never put off."""
        rows = {
            "dies": "os._exit(9)",
            "is-killed": "os.kill(os.getpid(), 9)",
            "floods": "while True: os.write(answers, b'A' * 65536)",
            "floods-in-lines": "while True: os.write(answers, b'1 9 9\\n' * 1000)",
            "unasked": "os.write(answers, b'77 AAAA AAAA\\n')",
            "garbage": "os.write(answers, bytes(range(256)))",
        }
        running = {}
        upstream = self.serve(world.Upstream(self.good))
        self.lineage(NAME, upstream.source)
        self.assert_result("installed", self.renew()[NAME])
        self.configure(NAME, "up.example.net", timeout="2")
        before = self.there.config
        for name, code in rows.items():
            there = world.Downstream().started(self)
            there.become(before, "nothing", "nothing")
            python = world.patched(self, IN_THE_NETWORK_PROCESS.format(self.ANSWERS.format(code)))
            running[name] = there, there.start("renew", "--json", python=python)
        for name, (there, process) in running.items():
            with self.subTest(name):
                out, err = communicate(process)
                outcome = json.loads(out)["lineages"][0]
                self.assertEqual(1, process.returncode, err)
                self.assertEqual(("failed", "unreachable"), (outcome["result"], outcome["reason"]))
                self.assertEqual(1, len(err.splitlines()), err)
                self.there = there
                there.assert_fits(self, NAME, self.good)

    LIES = """
exchange, lies = certferry._exchange, {!r}
certferry._exchange = lambda job: exchange(job)._replace(**lies[job.server_name])
"""

    def test_a_network_process_that_lies(self):
        """It hands over other bytes than it was shown: they are judged like everything else."""
        upstream = self.serve(world.Upstream(self.good))
        stranger = world.Authority(world.scratch(self), name="Stranger")
        forged = stranger.issue([NAME], key=self.good.key)
        indefinite = ssl.DER_cert_to_PEM_cert(b"\x30\x80\0\0").encode()
        colours = "\x1b[31m\n\tlines \u00e9" * 99
        rows = (
            ("untrusted", {"data": world.read(forged.fullchain)}),
            ("key-mismatch", {"data": world.read(self.issue().fullchain)}),
            ("malformed", {"data": b""}),
            ("malformed", {"data": b"nonsense" * 1000}),
            ("malformed", {"data": b"#" * 1500000}),
            ("malformed", {"data": indefinite}),
            ("malformed", {"reason": "installed"}),
            ("unreachable", {"reason": "unreachable", "message": colours}),
            ("malformed", {"reason": "untrusted\r\nforged: installed: all is well"}),
        )
        lies = {}
        for number, (_, lie) in enumerate(rows):
            name = "n{}.example.com".format(number)
            lies[name] = lie
            self.lineage(name, upstream.source, sni=name)
        python = world.patched(self, self.LIES.format(lies))
        result = self.there.run("renew", "--json", python=python)
        outcomes = json.loads(result.out)["lineages"]
        self.assertEqual(len(rows), len(outcomes))
        for (expected, lie), outcome in zip(rows, outcomes):
            with self.subTest(str(lie)[:60]):
                self.assert_result(expected, outcome)
                self.assertFalse(os.path.lexists(self.there.live(outcome["name"], ".current")))
        self.assertRegex(result.err, r"\A(certferry: n\d\.example\.com: [ -~]{1,700}\n){9}\Z")
        self.assertEqual(1, result.status)
        self.assertTrue(upstream.connections)

    @world.needs("setpriv")
    @unittest.skipUnless(ROOT, "needs root")
    def test_privilege_that_stays(self):
        """Where it cannot be given up nothing is fetched, that is told and never put off."""
        upstream = self.serve_one()
        self.assert_result("installed", self.renew()[NAME])
        before = upstream.connections
        for capability in ("setuid", "setgid"):
            drop = "--inh-caps=-{0} --bounding-set=-{0}".format(capability)
            python = self.wrapper('exec setpriv {} "$PYTHON" "$@"'.format(drop))
            with self.subTest(capability):
                outcome = self.renew(python=python)[NAME]
                self.assertEqual(("failed", "unreachable"), (outcome["result"], outcome["reason"]))
                self.assertIn("CAP_" + capability.upper(), outcome["detail"])
        self.assertEqual(before, upstream.connections)


def communicate(process, timeout=60):
    """Output and errors of a started command, as text; killed after the timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError("still running after {} s".format(timeout))
    return out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


READS = "read", "recvfrom", "recvmsg"
VERIFIES = re.compile(r'"openssl", "(verify|x509)".* = 0$')
KEYS = re.compile(r"open(at)?\(.*privkey|<[^>]*privkey")


class Call:
    """One system call of strace's log: who, a (user, group) pair, made it, in which process."""

    def __init__(self, process, name, text, who):
        self.process, self.name, self.text, self.who = process, name, text, who

    def __repr__(self):
        return "{} {} {}".format(self.process, self.who, self.text)


class Calls(list):
    """The calls of a log of `strace -f`, with the user and group that each process had then."""

    def __init__(self, log):
        super().__init__()
        lines = [line.split(None, 1) for line in log.splitlines() if " " in line]
        # A child's first calls come before its parent's fork has returned in the log.
        parents, who = {}, {}
        for process, text in lines:
            child = re.search(r"(?:clone3?|v?fork)(?:\(| resumed).* = (\d+)$", text)
            if child:
                parents[child.group(1)] = process
        unfinished = {}
        for process, text in lines:
            if process not in who:
                who[process] = who.get(parents.get(process), (os.getuid(), os.getgid()))
            if text.endswith("<unfinished ...>"):
                unfinished[process] = text[:-16]
                continue
            if text.startswith("<..."):
                text = unfinished.pop(process, "") + text.partition("resumed>")[2]
            name = text.partition("(")[0]
            change = re.match(r"set(?:res)?([ug])id\((\d+)\b.* = 0$", text)
            if change:
                user, group = who[process]
                number = int(change.group(2))
                who[process] = (number, group) if change.group(1) == "u" else (user, number)
            self.append(Call(process, name, text, who[process]))


if __name__ == "__main__":
    unittest.main()
