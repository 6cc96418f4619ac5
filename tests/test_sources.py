"""Upstreams of every kind, good and bad, on real sockets: what is fetched, in what time, by whom.

Tests with real servers want Debian's packages dovecot-imapd, postgresql, slapd, vsftpd.
"""

import contextlib
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

NAME = "example.com"
LIBRESSL = "LibreSSL" in world.openssl("version")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def load_tests(_loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK those without real servers, which openssl talks to."""
    return world.without(tests, RealServers)


class SourceCase(unittest.TestCase):
    """One authority for the class, a downstream for each test."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())

    def setUp(self):
        self.there = world.Downstream().started(self)

    def issue(self, *names, **how):
        """A certificate, for NAME unless other names are given."""
        return self.authority.issue(names or [NAME], **how)

    def cross(self, source, *options, name=NAME, key=None, **how):
        """`certferry NAME --from SOURCE` with the authority's root; its JSON object."""
        if key:
            self.there.key(name, key)
        sources = [source] if isinstance(source, str) else source
        options = [part for each in sources for part in ("--from", each)] + list(options)
        _, document = self.there.json(name, "--ca-file", self.authority.root, *options, **how)
        return document["lineages"][0]

    def renew(self, *options, **how):
        """`certferry renew`; {lineage: its JSON object}."""
        _, document = self.there.json("renew", *options, **how)
        return {each["name"]: each for each in document["lineages"]}

    def lineage(self, name, source, key, **options):
        """Put a lineage there by hand: a key and a conf."""
        self.there.key(name, key)
        os.makedirs(os.path.dirname(self.there.conf(name)), 0o700, exist_ok=True)
        options = dict({"from": source, "ca-file": self.authority.root, "domain": NAME}, **options)
        world.write(self.there.conf(name), "".join(
            "{} = {}\n".format(*option) for option in sorted(options.items()) if option[1]), 0o600)

    def assert_result(self, expected, outcome, words="."):
        """The outcome's result, or the reason of its refusal, and what is said about it."""
        self.assertIn(expected, (outcome["result"], outcome["reason"]), outcome)
        if outcome["detail"]:
            self.assertRegex(outcome["detail"], words)

    def wrapper(self, script):
        """A command to run certferry by, in place of the interpreter, which is its $PYTHON."""
        return world.write(os.path.join(world.scratch(self), "python"),
                           "#!/bin/sh\nPYTHON='{}'\n{}\n".format(sys.executable, script), 0o755)

    patched = world.patched


class KeyTypes(SourceCase):
    """RSA and ECDSA side by side: the certificate of the local key's type is fetched."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.rsa = cls.authority.issue([NAME], key="rsa:2048")
        cls.ecdsa = cls.authority.issue([NAME])

    def follow(self, own, other, **how):
        """Fetch own's certificate of a pair, then the next one; the later runs ask once."""
        with world.Upstream([own, other], **how) as upstream:
            self.assert_result("installed", self.cross(upstream.source, key=own))
            self.there.assert_fits(self, NAME, own)
            self.renew_once(upstream)
            second = self.issue(key=own.key)
            upstream.switch([second, self.issue(key=other.key)])
            self.assert_result("installed", self.renew()[NAME])
            self.there.assert_fits(self, NAME, second)
            self.renew_once(upstream)

    def renew_once(self, upstream):
        """A run without news takes one exchange."""
        before = upstream.connections
        self.assert_result("unchanged", self.renew()[NAME])
        self.assertEqual(before + 1, upstream.connections)

    def test_rsa_of_both(self):
        self.follow(self.rsa, self.ecdsa)

    def test_ecdsa_of_both(self):
        self.follow(self.ecdsa, self.rsa)

    def test_rsa_of_both_in_tls_1_2(self):
        self.follow(self.rsa, self.ecdsa, maximum="1.2")

    @unittest.skipIf(LIBRESSL, "LibreSSL's s_client has no -sigalgs")
    def test_rsa_of_both_in_tls_1_3(self):
        self.follow(self.rsa, self.ecdsa, minimum="1.3")

    @unittest.skipIf(LIBRESSL, "LibreSSL's s_client has no -sigalgs")
    def test_rsa_of_both_by_starttls(self):
        with world.Upstream([self.rsa, self.ecdsa], before=DIALOGUES["smtp"]) as upstream:
            self.assert_result("installed", self.cross("smtp://" + upstream.source, key=self.rsa))
            self.there.assert_fits(self, NAME, self.rsa)

    def test_only_the_other_type(self):
        with world.Upstream(self.ecdsa) as upstream:
            self.assert_result("key-mismatch", self.cross(upstream.source, key=self.rsa),
                               "ECDSA P-256.*RSA 2048")

    def test_what_is_wrong_with_the_right_one(self):
        """The reason is that of the certificate for our type of key, not the other type's."""
        old = self.issue(key=self.rsa.key, not_before=world.days(-20), not_after=world.days(-10))
        with world.Upstream([old, self.ecdsa]) as upstream:
            self.assert_result("expired", self.cross(upstream.source, key=old))

    def test_two_lineages(self):
        """One upstream, one lineage for each type, through a rotation of both."""
        with world.Upstream([self.rsa, self.ecdsa]) as upstream:
            self.lineage("rsa.example.com", upstream.source, self.rsa)
            self.lineage("ecdsa.example.com", upstream.source, self.ecdsa)
            pair = [self.rsa, self.ecdsa]
            for _ in range(2):
                for outcome in self.renew().values():
                    self.assert_result("installed", outcome)
                self.there.assert_fits(self, "rsa.example.com", pair[0])
                self.there.assert_fits(self, "ecdsa.example.com", pair[1])
                pair = [self.issue(key=one.key) for one in pair]
                upstream.switch(pair)


class Handshakes(SourceCase):
    """Particular servers: versions, names, client certificates, addresses, chains."""

    def test_versions(self):
        rsa, ecdsa = self.issue(key="rsa:2048"), self.issue()
        rows = (("installed", ecdsa, {"maximum": "1.2"}), ("installed", rsa, {"maximum": "1.2"}),
                ("installed", ecdsa, {"minimum": "1.3"}), ("installed", rsa, {"minimum": "1.3"}),
                ("installed", ecdsa, {"minimum": "1.0"}), ("installed", rsa, {"tickets": False}),
                ("installed", ecdsa, {"maximum": "1.2", "ciphers": "ECDHE+CHACHA20"}),
                ("unreachable", ecdsa, {"minimum": "1.1", "maximum": "1.1"}))
        for number, (_, credential, how) in enumerate(rows):
            upstream = world.Upstream(credential, **how).started(self)
            self.lineage("v%d.example.com" % number, upstream.source, credential)
        found = self.renew()
        for number, (expected, credential, how) in enumerate(rows):
            with self.subTest(**how):
                self.assert_result(expected, found["v%d.example.com" % number], "handshake|TLS")
                if expected == "installed":
                    self.there.assert_fits(self, "v%d.example.com" % number, credential)

    def test_static_rsa(self):
        """A key exchange without a signature proves nothing and is not offered."""
        credential = self.issue(key="rsa:2048")
        with world.StaticRsaOnly(credential) as upstream:
            self.assert_result("unreachable", self.cross(upstream.source, key=credential))

    def test_impostors(self):
        """Whoever shows our certificate without its key is told from whoever holds it."""
        good = self.issue()
        for version in ("1.2", "1.3"):
            for then in ("bad-signature", "alert", "close"):
                impostor = world.Impostor(good, version=version, then=then).started(self)
                self.lineage("as-%s-%s.example.com" % (then, version), impostor.source, good)
        mail = world.Impostor(good, before=DIALOGUES["smtp"]).started(self)
        self.lineage("mail.example.com", "smtp://" + mail.source, good)
        found = self.renew()
        self.assertEqual(7, len(found))
        for name, outcome in found.items():
            with self.subTest(name):
                self.assert_result("unproven", outcome, "prove|another key")

    def test_server_name_demanded(self):
        good = self.issue()
        with world.Upstream(good, strict=[NAME]) as upstream:
            outcome = self.cross(upstream.source, "--sni", "other.example.com", key=good)
            self.assert_result("unreachable", outcome, "does not serve other.example.com.*--sni")
            self.assert_result("installed", self.cross(upstream.source))

    def test_server_name_asked(self):
        """--sni, else the first -d that is no wildcard, else NAME; an address is no name."""
        good = self.issue("*.example.com", NAME, "192.0.2.7")
        rows = (("a.example.com", {}, "a.example.com"),
                ("b.example.com", {"sni": "up.example.net"}, "up.example.net"),
                ("c.example.com", {"domain": "\n    *.example.com\n    www.example.com"},
                 "www.example.com"),
                ("d.example.com", {"domain": "*.example.com"}, "d.example.com"),
                ("192.0.2.7", {"domain": "192.0.2.7"}, None))
        upstreams = [world.Upstream(good).started(self) for _ in rows]
        for upstream, (name, options, _) in zip(upstreams, rows):
            self.lineage(name, upstream.source, good, **dict({"domain": ""}, **options))
        found = self.renew()
        for upstream, (name, _, expected) in zip(upstreams, rows):
            with self.subTest(name):
                self.assert_result("installed", found[name])
                self.assertEqual({expected}, set(upstream.asked))

    def test_virtual_hosts(self):
        good, other = self.issue(), self.issue("shop.example.org")
        with world.Upstream(other, hosts={NAME: good}) as upstream:
            self.assert_result("installed", self.cross(upstream.source, key=good))
        with world.Upstream(other) as upstream:
            self.assert_result("key-mismatch", self.cross(upstream.source),
                               "shop.example.org.*(--sni|--from)|another key")

    def test_internationalised_name(self):
        good = self.issue("xn--bcher-kva.example.com")
        with world.Upstream(good) as upstream:
            self.there.key("xn--bcher-kva.example.com", good)
            outcome = self.cross(upstream.source, name="b\u00fccher.example.com",
                                 env={"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"})
            self.assert_result("installed", outcome)
            self.assertEqual("xn--bcher-kva.example.com", outcome["name"])
            # The server of Python 3.6 decodes the name for its callback.
            self.assertLessEqual(set(upstream.asked), {"xn--bcher-kva.example.com",
                                                       "b\u00fccher.example.com"})

    def test_client_certificate_demanded(self):
        """In TLS 1.3 the leaf is proven before the server minds; in TLS 1.2 it never is."""
        good = self.issue()
        for version, expected in (("1.3", "installed"), ("1.2", "unproven")):
            with self.subTest(version), world.Upstream(
                    good, client_ca=self.authority.root, minimum=version,
                    maximum=version) as upstream:
                self.there = world.Downstream().started(self)
                self.assert_result(expected, self.cross(upstream.source, key=good),
                                   "client certificate")

    def test_ipv6(self):
        good = self.issue()
        try:
            upstream = world.Upstream(good, address="::1").started(self)
        except OSError as error:
            self.skipTest("no IPv6 here: {}".format(error))
        outcome = self.cross(upstream.source, key=good)
        self.assert_result("installed", outcome)
        self.assertEqual(upstream.source, outcome["source"])

    def test_no_resumption(self):
        """A resumed session would show the certificate of the one before."""
        first = self.issue()
        second = self.issue(key=first.key)
        with world.Upstream(first) as upstream:
            self.assert_result("installed", self.cross(upstream.source, key=first))
            upstream.switch(second, keep_sessions=True)
            self.assert_result("installed", self.renew()[NAME])
            self.assertEqual(0, upstream.resumed)
            self.there.assert_fits(self, NAME, second)

    def test_chains(self):
        """Whatever is sent beside the leaf, leaf and issuers in order are written, and no root."""
        authority = self.authority
        upper = authority.issue([], subject="/CN=Upper", ca=True, issuer=authority.root_credential,
                                extensions=world.INTERMEDIATE.replace(",pathlen:0", ""))
        lower = authority.issue([], subject="/CN=Lower", ca=True, issuer=upper)
        good = self.issue(issuer=lower)
        other = world.Authority(world.scratch(self), name="Other").intermediate.cert
        upper, lower, root, leaf = upper.cert, lower.cert, authority.root, good.cert
        rows = (("root", [lower, upper, root]), ("reversed", [upper, lower]),
                ("twice", [lower, lower, upper, upper]), ("leaf-again", [lower, leaf, upper]),
                ("unrelated", [other, lower, other, upper]),
                ("all", [root, other, upper, leaf, lower, root]), ("lacking", [lower]),
                ("alone", []), ("twice-1-3", [lower, lower, upper, upper]),
                ("all-1-3", [root, other, upper, leaf, lower, root]))
        for name, sent in rows:
            upstream = world.Upstream(good, send=sent, maximum="1.3" if "1-3" in name else "1.2")
            self.lineage(name + ".example.com", upstream.started(self).source, good)
        for name, outcome in self.renew().items():
            with self.subTest(name):
                if name.startswith(("lacking", "alone")):
                    self.assert_result("untrusted", outcome)
                else:
                    self.assert_result("installed", outcome)
                    self.there.assert_fits(self, name, good)


class Bounds(SourceCase):
    """Deadlines and sizes: whatever the peer does, a word within the timeout."""

    def test_servers_that_misbehave(self):
        good = self.issue()
        rows = (("timeout", world.Silent), ("timeout", world.Dripping),
                ("timeout", world.HelloThenHang), ("unreachable", world.PlainHttp),
                ("unreachable", world.Garbage), ("unreachable", world.ClosesAtOnce),
                ("unreachable", lambda: world.ClosesAtOnce(reset=True)),
                ("unreachable", lambda: world.Garbage(endless=True)),
                ("unreachable", lambda: world.Garbage(b"\x15\x03\x03\0\x02\x02\x28")),
                ("unreachable", lambda: world.Garbage(b"\x16\x03\x03\xff\xff" + b"x" * 70000)),
                ("unreachable", lambda: world.Garbage(b"220 mail ESMTP\r\n")),
                ("unreachable", world.Closed))
        for number, (expected, make) in enumerate(rows):
            server = make()
            self.addCleanup(server.__exit__)
            server.__enter__()
            self.lineage("tls-%d.example.com" % number, server.source, good,
                         timeout="1" if expected == "timeout" else "20")
        found = self.renew()
        for number, (expected, _) in enumerate(rows):
            with self.subTest(number):
                self.assert_result(expected, found["tls-%d.example.com" % number])

    def test_dialogues_that_misbehave(self):
        good = self.issue()
        servers = {"silent": world.Silent(), "dripping": world.Dripping(0.1),
                   "closing": world.ClosesAtOnce(), "endless": world.Garbage(endless=True),
                   "http": world.PlainHttp(), "closed": world.Closed(),
                   "refusing": Talker(refuse_starttls)}
        for name, server in servers.items():
            self.addCleanup(server.__exit__)
            server.__enter__()
            for protocol in ("smtp", "ldap", "mysql"):
                self.lineage("%s-%s.example.com" % (name, protocol),
                             "%s://%s" % (protocol, server.source), good,
                             timeout="20" if name == "refusing" and protocol == "smtp" else "1")
        for name, outcome in self.renew().items():
            with self.subTest(name):
                self.assertIn(outcome["reason"], ("timeout", "unreachable"), outcome)
                if name.startswith("silent"):
                    self.assertEqual("timeout", outcome["reason"])
                if name == "refusing-smtp.example.com":
                    self.assertIn("STARTTLS", outcome["detail"])

    def test_sizes(self):
        """At most 16 certificates and 1 MiB."""
        good = self.issue()
        others = [self.issue().cert for _ in range(15)]
        large = self.issue(extensions=world.LEAF + "nsComment = " + "x" * 100000 + "\n").cert
        for name, sent in (("sixteen", [self.authority.intermediate.cert] + others[:14]),
                           ("seventeen", [self.authority.intermediate.cert] + others),
                           ("large", [self.authority.intermediate.cert] + [large] * 9)):
            upstream = world.Upstream(good, send=sent).started(self)
            self.lineage(name + ".example.com", upstream.source, good)
        found = self.renew()
        self.assert_result("installed", found["sixteen.example.com"])
        self.there.assert_fits(self, "sixteen.example.com", good)
        self.assert_result("malformed", found["seventeen.example.com"],
                           "16 certificates|more than a chain")
        self.assert_result("malformed", found["large.example.com"])

    def test_many_lineages(self):
        """Of fifty, ten dead upstreams cost the run one timeout in all."""
        good = self.issue()
        with world.Upstream(good) as upstream:
            for number in range(50):
                if number % 5 == 0:
                    source, patience = world.Silent().started(self).source, "3"
                else:
                    source, patience = upstream.source, "20"
                self.lineage("n%d.example.com" % number, source, good, timeout=patience)
            started = time.monotonic()
            found = self.renew(timeout=90)
            took = time.monotonic() - started
        self.assertEqual(50, len(found))
        for number in range(50):
            with self.subTest(number):
                self.assert_result("installed" if number % 5 else "timeout",
                                   found["n%d.example.com" % number])
        # Ten timeouts in turn take 30 s; the slack is for a busy machine.
        self.assertLess(took, 3 + 25)

    def pool(self, jobs, **how):
        """A pool whose threads are no threads, with that many exchanges of one upstream to make."""
        reading, writing = os.pipe()
        for descriptor in (reading, writing):
            self.addCleanup(os.close, descriptor)
        self.addCleanup(threading.stack_size, threading.stack_size())
        pool = certferry._Pool(writing)
        pool.begin = mock.Mock(**how)
        job = certferry.Job("tls", "127.0.0.1", "1", 8.0, *[""] * 6)
        pool.waiting.update((str(number), job) for number in range(1, jobs + 1))
        return pool

    def test_one_upstream(self):
        """None is asked by more than eight at once, none that fell silent is waited for again."""
        def ask(waited, heard):
            """Tend the pool when its exchanges have waited so long, its upstream spoke then."""
            pool.heard[upstream] = time.monotonic() - heard
            pool.running = {number: (job, started - waited)
                            for number, (job, started) in pool.running.items()}
            pool.tend()

        for since, again in ((20, True), (4, False)):  # it answered before they asked, or after
            with self.subTest(since):
                pool = self.pool(30)
                upstream = pool.waiting["1"][:4]
                pool.tend()
                for heard in (0, 2):  # slow, and silent so far
                    ask(1, heard)
                    self.assertEqual(list("12345678"), sorted(pool.running))
                ask(9, since)
                self.assertEqual(again, upstream in pool.vain)
                self.assertEqual(8, len(pool.running))  # of the others
                with mock.patch.object(certferry, "exchange",
                                       return_value=certferry.Answer()) as asked:
                    pool.work(("9", pool.running["9"][0]))
                self.assertEqual(again, not asked.called)

    def test_two_vain_waits(self):
        """What is answered with the first one's words is no answer of the upstream's."""
        pool = self.pool(3)
        upstream = pool.waiting["1"][:4]
        pool.tend()
        for number in "12":  # both wait in vain, the third one begins after the first
            pool.running[number] = pool.running[number][0], pool.running[number][1] - 8
        pool.end("1", certferry.Answer("timeout", "first"))
        taken = pool.vain[upstream]
        pool.end("2", certferry.Answer("timeout", "second"))
        pool.end("3", taken)
        self.assertEqual(({}, {upstream}), (pool.heard, set(pool.vain)))

    def test_no_more_threads(self):
        """Where none can be started an exchange waits for one that runs, and nothing ends."""
        pool = self.pool(1, side_effect=RuntimeError("can't start new thread"))
        self.assertEqual(([], 0.1), pool.tend())
        self.assertEqual((["1"], {}), (list(pool.waiting), pool.running))

    def test_answers_nobody_reads(self):
        """What the pipe has no room for while hooks run, say, waits: nothing is lost."""
        network = certferry.Network()  # forked before the upstream's threads
        self.addCleanup(network.close)
        good = self.issue()
        leaf, = world.certificates(good.cert)
        with world.Upstream(good) as upstream:
            job = certferry.Job("tls", *upstream.source.split(":"), 20.0, NAME,
                                certferry.binascii.crc32(leaf), "", "", "", "")
            numbers = [network.submit(job) for _ in range(300)]
            network.send()  # the last ones, too
            world.eventually(lambda: upstream.connections == 300)
            for number in numbers:
                # with the chain from Python 3.13 on
                self.assertEqual(leaf, certferry.read_pem(network.answer(number).data)[0][0])
        self.assertEqual("", network.broken)

    def test_one_timeout_for_all_exchanges(self):
        """Whether there is a certificate for the key's type is asked in the time that is left."""
        log = os.path.join(world.scratch(self), "log")
        python = self.patched("""
submit, ask = certferry.Crossing.submit, certferry.Network.submit
def later(self, source, **asked):
    number = submit(self, source, **asked)
    self.asked -= 14 * (not asked)  # so long its answer seems to have taken
    return number
def noted(self, job):
    with open({!r}, "a") as log:
        log.write("%g " % job.timeout)
    return ask(self, job)
certferry.Crossing.submit, certferry.Network.submit = later, noted
""".format(log))
        with world.Upstream(self.issue()) as upstream:
            self.assert_result("key-mismatch", self.cross(
                upstream.source, key=self.issue(key="rsa:2048"), python=python))
        first, second = map(float, world.read(log).split())
        self.assertEqual(20, first)
        self.assertLessEqual(second, 6)

    def test_nothing_stays(self):
        """A run that is ended while it waits: what asks for it ends too, by itself or in time."""
        def running():
            """The commands of all processes that name the server."""
            found = []
            for path in glob.glob("/proc/[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found.append(world.read(path))
            return [command for command in found if server.source.encode() in command]

        self.there.key(NAME, self.issue())
        for source, seconds in (("smtp://{}", "60"), ("vault://{}/secret/a", "2")):
            with self.subTest(source), world.Silent() as server:
                process = self.there.start(
                    NAME, "--from", source.format(server.source), "--timeout", seconds,
                    env={"VAULT_TOKEN": "s.token"})
                world.eventually(lambda server=server: server.connections)
                self.assertTrue(running())
                process.terminate()
                process.communicate()
                world.eventually(lambda: not running(), 20)

    def test_a_command_that_leaves_one_behind(self):
        """What it started may hold its standard error: it is over when it has ended itself."""
        good, pid = self.issue(), os.path.join(world.scratch(self), "pid")
        try:
            self.assert_result("installed", self.cross(
                "exec:sleep 300 >/dev/null & echo $! >{}; cat {}".format(pid, good.fullchain),
                "--timeout", "10", key=good))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(world.read(pid)), signal.SIGKILL)


class Addresses(SourceCase):
    """Several sources of a lineage, several addresses of one name."""

    def test_sources_in_turn(self):
        first = self.issue()
        second, stranger = self.issue(key=first.key), self.issue()
        stale = world.Upstream(first).started(self)
        fresh = world.Upstream(second).started(self)
        wrong = world.Upstream(stranger).started(self)
        closed = world.Closed()
        self.addCleanup(closed.__exit__)
        sources = [closed.source, wrong.source, stale.source, fresh.source]
        outcome = self.cross(sources, key=first)
        self.assert_result("installed", outcome)
        self.assertEqual(stale.source, outcome["source"])
        for order, expected, source in (
                ([fresh, stale], "installed", fresh), ([stale, fresh], "unchanged", fresh),
                ([closed, fresh], "unchanged", fresh), ([wrong, fresh], "unchanged", fresh),
                ([closed, stale], "unreachable", None), ([stale], "older", None),
                ([stale, wrong, closed], "key-mismatch", None)):
            with self.subTest(order=[type(each).__name__ for each in order], expected=expected):
                outcome = self.cross([each.source for each in order])
                self.assert_result(expected, outcome)
                self.there.assert_fits(self, NAME, second)
                self.assertEqual(source and source.source, outcome["source"])

    def hosts(self, *lines):
        """A wrapper that runs the command where the hosts file has these lines alone."""
        hosts = world.write(os.path.join(world.scratch(self), "hosts"), "\n".join(lines) + "\n")
        os.chmod(os.path.dirname(hosts), 0o755)
        return self.wrapper("exec unshare -m sh -c 'mount --bind {} /etc/hosts; "
                            "exec \"$@\"' - \"$PYTHON\" \"$@\"".format(hosts))

    def pool(self, *members):
        """Servers at 127.0.0.2 and on, all at one port; returns (that port, wrapper)."""
        port = 0
        for number, member in enumerate(members):
            member.address, member.port = "127.0.0.%d" % (number + 2), port
            port = member.started(self).port
        return port, self.hosts(*("127.0.0.%d pool.example.net" % (number + 2)
                                  for number in range(len(members))))

    @world.needs("unshare")
    @unittest.skipUnless(ROOT, "needs root: a hosts file of its own")
    def test_first_address_is_dead(self):
        good = self.issue()
        for first in (world.Silent(), world.PlainHttp(), world.ClosesAtOnce()):
            with self.subTest(type(first).__name__):
                self.there = world.Downstream().started(self)
                port, python = self.pool(first, world.Upstream(good))
                self.assert_result("installed", self.cross(
                    "pool.example.net:%d" % port, "--timeout", "6", key=good, python=python))
        self.there = world.Downstream().started(self)
        with world.Upstream(good, address="127.0.0.3") as upstream:
            python = self.hosts("127.0.0.2 pool.example.net", "127.0.0.3 pool.example.net")
            self.assert_result("installed", self.cross(
                "pool.example.net:%d" % upstream.port, key=good, python=python))

    @world.needs("unshare")
    @unittest.skipUnless(ROOT, "needs root: a hosts file of its own")
    def test_stale_member(self):
        """A member that still serves an older certificate is named, and the others are asked."""
        old = self.issue()
        current, newest = self.issue(key=old.key), self.issue(key=old.key)
        with world.Upstream(current) as upstream:
            self.assert_result("installed", self.cross(upstream.source, key=current))
        members = world.Upstream(old), world.Upstream(old)
        port, python = self.pool(*members)
        source = "pool.example.net:%d" % port
        self.assert_result("older", self.cross(source, python=python), r"127\.0\.0\.[23]")
        self.assertTrue(all(member.connections for member in members))
        self.there.assert_fits(self, NAME, current)
        members[1].switch(newest)
        self.assert_result("installed", self.cross(source, python=python))
        self.there.assert_fits(self, NAME, newest)

    @world.needs("unshare")
    @unittest.skipUnless(ROOT, "needs root: a hosts file of its own")
    def test_this_machine_and_nowhere(self):
        """Without --from a name that leads here is told apart from one that leads nowhere."""
        good = self.issue()
        self.there.key(NAME, good)
        python = self.hosts("127.0.0.1 example.com")
        _, document = self.there.json(NAME, python=python)
        self.assert_result("unreachable", document["lineages"][0], "this very machine.*--from")
        outcome = self.cross("nowhere.invalid", "--timeout", "2", python=python)
        self.assertIn(outcome["reason"], ("unreachable", "timeout"))


def lines_of(sock):
    """The lines that the peer sends, upper case and without their ends."""
    unread = b""
    while True:
        while b"\n" not in unread:
            piece = sock.recv(1)  # no more than the dialogue's: what follows belongs to TLS
            if not piece:
                return
            unread += piece
        line, _, unread = unread.partition(b"\n")
        yield line.strip().upper()


def in_lines(greeting, answers, last):
    """A dialogue in lines: {word in the peer's line: answer}, over after the answer to `last`."""
    def talk(sock):
        sock.sendall(greeting)
        for line in lines_of(sock):
            word = next((word for word in answers if word in line), None)
            sock.sendall(answers.get(word, b"500 what?\r\n"))
            if word == last:
                return
    return talk


def ldap(sock):
    """RFC 4511's StartTLS: an ExtendedRequest with message number 1, an ExtendedResponse."""
    sock.recv(64)
    sock.sendall(b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\0\x04\0\x04\0")


def xmpp(sock):
    """RFC 6120, 5.4: stream features, starttls, proceed."""
    space = b"xmlns='urn:ietf:params:xml:ns:xmpp-tls'"
    sock.recv(4096)
    sock.sendall(b"<stream:stream xmlns:stream='http://etherx.jabber.org/streams' "
                 b"xmlns='jabber:client' version='1.0'><stream:features><starttls " + space
                 + b"><required/></starttls></stream:features>")
    sock.recv(4096)
    sock.sendall(b"<proceed " + space + b"/>")


def postgres(sock):
    """SSLRequest, eight bytes; S for yes."""
    sock.recv(8)
    sock.sendall(b"S")


def mysql(sock):
    """A greeting of protocol 10 with CLIENT_SSL among the capabilities, an SSLRequest."""
    greeting = (b"\x0a8.0.0\0" + b"\1\0\0\0" + b"12345678\0" + b"\x00\x8a\x21\x02\0\xff\x81\x15"
                + b"\0" * 10 + b"123456789012\0")
    sock.sendall(len(greeting).to_bytes(3, "little") + b"\0" + greeting)
    sock.recv(36)


DIALOGUES = {
    "smtp": in_lines(b"220 mail.example.com ESMTP\r\n", {
        b"EHLO": b"250-mail.example.com\r\n250-SIZE 1000\r\n250 STARTTLS\r\n",
        b"STARTTLS": b"220 go ahead\r\n"}, b"STARTTLS"),
    "imap": in_lines(b"* OK ready\r\n", {
        b"CAPABILITY": b"* CAPABILITY IMAP4rev1 STARTTLS\r\n. OK done\r\n",
        b"STARTTLS": b". OK begin\r\n"}, b"STARTTLS"),
    "pop3": in_lines(b"+OK ready\r\n", {b"STLS": b"+OK begin\r\n"}, b"STLS"),
    "ftp": in_lines(b"220 ready\r\n", {b"FEAT": b"211-Features:\r\n AUTH TLS\r\n211 End\r\n",
                                       b"AUTH TLS": b"234 begin\r\n"}, b"AUTH TLS"),
    "ldap": ldap, "xmpp": xmpp, "postgres": postgres, "mysql": mysql}

refuse_starttls = in_lines(b"220 mail.example.com ESMTP\r\n", {
    b"EHLO": b"250-mail.example.com\r\n250 SIZE 1000\r\n"}, b"QUIT")


class Talker(world.Server):
    """A server without TLS that holds a dialogue."""

    def __init__(self, dialogue):
        super().__init__()
        self.talk = dialogue


def become_nobody():
    """Give up root in a process that is about to become a server."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def stop(process):
    """End a server and what it started."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass  # the whole group is gone
    process.wait()


def postgres_folder():
    """The folder of PostgreSQL's programs, which Debian keeps out of PATH; None without it."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin")) + os.get_exec_path()
    return next((folder for folder in reversed(folders) if all(
        os.path.exists(os.path.join(folder, name)) for name in ("initdb", "postgres"))), None)


class Starttls(SourceCase):
    """The eight protocols that begin in the clear, by dialogues of our own and by real servers."""

    def test_default_ports(self):
        for protocol, port in (("smtp", 25), ("imap", 143), ("pop3", 110), ("ftp", 21),
                               ("ldap", 389), ("xmpp", 5222), ("postgres", 5432), ("mysql", 3306)):
            self.assertEqual(port, certferry.parse_source(protocol + "://up.example.net").port)

    def test_dialogues(self):
        """Each through a rotation: installed, unchanged, installed."""
        first = self.issue()
        second = self.issue(key=first.key)
        upstreams = {protocol: world.Upstream(first, before=dialogue).started(self)
                     for protocol, dialogue in DIALOGUES.items()}
        for protocol, upstream in upstreams.items():
            self.lineage(protocol + ".example.com", protocol + "://" + upstream.source, first)
        for expected, shown in (("installed", first), ("unchanged", first), ("installed", second)):
            for upstream in upstreams.values():
                upstream.switch(shown)
            for name, outcome in self.renew().items():
                with self.subTest(name):
                    self.assert_result(expected, outcome)
                    self.there.assert_fits(self, name, shown)


class RealServers(SourceCase):
    """Servers as Debian has them, run without rights at a high port; postfix: test_real.py."""

    def setUp(self):
        super().setUp()
        self.good = self.issue()
        self.port = world.port_for(self)
        self.folder = world.scratch(self)
        for path in (self.good.fullchain, self.good.key):
            copy = world.write(os.path.join(self.folder, os.path.basename(path)), world.read(path),
                               0o600)
            self.give(copy)
        self.give(self.folder)

    @staticmethod
    def give(path):
        """Make a path the account's."""
        if ROOT:
            os.chown(path, 65534, 65534)

    def write(self, name, text):
        """A file of the server's, {folder} and {port} filled in; returns its path."""
        path = world.write(os.path.join(self.folder, name), text.format(
            folder=self.folder, port=self.port))
        self.give(path)
        return path

    def launch(self, *command):
        """Start a server as nobody; wait until its port answers, stop it when the test ends."""
        log = os.path.join(self.folder, "output")
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder,
                start_new_session=True, preexec_fn=become_nobody if ROOT else None)
        self.addCleanup(stop, process)

        def answers():
            if process.poll() is not None:
                raise AssertionError("{}: status {}: {}".format(
                    command[0], process.returncode, world.read(log).decode("utf-8", "replace")))
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        world.eventually(answers)

    def fetch(self, protocol):
        """Its certificate is fetched and is what it was given."""
        self.assert_result("installed", self.cross(
            "%s://127.0.0.1:%d" % (protocol, self.port), key=self.good))
        self.there.assert_fits(self, NAME, self.good)
        self.assert_result("unchanged", self.renew()[NAME])

    @world.needs("dovecot")
    def test_dovecot(self):
        user = "nobody" if ROOT else os.environ.get("USER", "nobody")
        conf = self.write("dovecot.conf", """
protocols = imap
listen = 127.0.0.1
base_dir = {folder}/run
state_dir = {folder}/run
log_path = {folder}/log
ssl = required
ssl_cert = <{folder}/fullchain.pem
ssl_key = <{folder}/privkey.pem
default_internal_user = USER
default_internal_group = GROUP
default_login_user = USER
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
""".replace("USER", user).replace("GROUP", "nogroup"))
        self.launch("dovecot", "-F", "-c", conf)
        self.fetch("imap")

    @world.needs("vsftpd")
    def test_vsftpd(self):
        conf = self.write("vsftpd.conf", """\
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
""")
        self.launch("vsftpd", conf)
        self.fetch("ftp")

    @world.needs("slapd")
    def test_slapd(self):
        conf = self.write("slapd.conf", """\
pidfile {folder}/pid
TLSCertificateFile {folder}/fullchain.pem
TLSCertificateKeyFile {folder}/privkey.pem
""")
        self.launch("slapd", "-d", "0", "-h", "ldap://127.0.0.1:%d/" % self.port, "-f", conf)
        self.fetch("ldap")

    @unittest.skipUnless(postgres_folder(), "needs postgres and initdb")
    def test_postgres(self):
        data, programs = os.path.join(self.folder, "data"), postgres_folder()
        subprocess.check_call(
            [os.path.join(programs, "initdb"), "-D", data, "-A", "trust", "-N", "-U", "x"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder,
            preexec_fn=become_nobody if ROOT else None)
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "ssl": "on",
                    "ssl_cert_file": self.folder + "/fullchain.pem", "fsync": "off",
                    "ssl_key_file": self.folder + "/privkey.pem", "port": str(self.port)}
        self.launch(os.path.join(programs, "postgres"), "-D", data, *(
            "--%s=%s" % setting for setting in settings.items()))
        self.fetch("postgres")


class Privilege(SourceCase):
    """As root: who talks to the network, as whom, and what a network process gone bad can do."""

    def serve(self, key=None):
        """An upstream for a lineage in folders open to all, so that its key's mode counts."""
        good = self.issue()
        upstream = world.Upstream(good).started(self)
        os.chmod(os.path.dirname(self.there.config), 0o755)
        self.lineage(NAME, upstream.source, key or good)
        return upstream, good

    @world.needs("strace")
    @unittest.skipUnless(ROOT, "needs root")
    def test_who_talks(self):
        """strace: no process of root's connects or reads a connection; verifiers are others yet."""
        self.serve()
        log = os.path.join(world.scratch(self), "log")
        python = self.wrapper(
            "exec strace -f -yy -s 200 -o {} -e trace=clone,clone3,fork,vfork,setresuid,setresgid,"
            "setuid,setgid,"
            "connect,read,recvfrom,recvmsg,openat,open,execve \"$PYTHON\" \"$@\"".format(log))
        self.assert_result("installed", self.renew(python=python)[NAME])
        calls = Calls(world.read(log).decode("ascii", "replace"))
        talkers = {call.process: call.who for call in calls if call.name == "connect"
                   and "AF_INET" in call.text}
        readers = {call.process: call.who for call in calls if call.name in (
            "read", "recvfrom", "recvmsg") and re.search("<(TCP|UDP)(v6)?:", call.text)}
        self.assertTrue(talkers and readers)
        nobody = {user for user, _ in talkers.values()} | {user for user, _ in readers.values()}
        self.assertEqual(1, len(nobody))
        self.assertNotIn(0, nobody)
        verifiers = {call.who for call in calls if call.name == "execve" and re.search(
            '"openssl", "(verify|x509)"', call.text) and call.text.endswith(" = 0")}
        self.assertTrue(verifiers)
        for user, group in verifiers:
            self.assertEqual(nobody, {user})
            self.assertNotIn(group, {group for _, group in talkers.values()})
        self.assertEqual([], [call for call in calls if call.process in set(talkers) | set(readers)
                              and re.search(r"open(at)?\(.*privkey|<[^>]*privkey", call.text)])

    SNOOP = """
real = certferry.exchange
def exchange(job):
    found = [line for line in open("/proc/self/status")
             if line.startswith("Groups:") and line.split()[1:]]
    for descriptor in range(200):
        try:
            path = os.readlink("/proc/self/fd/%d" % descriptor)
        except OSError:
            continue
        if path.startswith("{config}"):
            found.append(path)
    for path in ("{key}", "{staged}", "/proc/%d/environ" % os.getppid(),
                 "/proc/%d/mem" % os.getppid(), "{conf}", "{public}"):
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
    try:
        os.setuid(0)
        found.append("root")
    except OSError:
        pass
    return real(job)._replace(reason="unreachable", detail="found: " + " ".join(found))
certferry.exchange = exchange
"""

    @unittest.skipUnless(ROOT, "needs root")
    def test_what_it_can_open(self):
        """The network process finds no key, nothing of root's and no way back; one public file."""
        _, good = self.serve()
        public = world.write(os.path.join(self.there.config, "public.txt"), "public", 0o644)
        staged = self.there.key(NAME, self.issue(), "privkey-next.pem")
        python = self.patched(self.SNOOP.format(
            config=self.there.config, key=self.there.live(NAME, "privkey.pem"), staged=staged,
            conf=self.there.conf(NAME), public=public))
        self.assertRegex(self.renew(python=python)[NAME]["detail"], "found: public.txt(:|$)")

    EVIL = """
real = certferry.own_process
def own_process(serve, *rest, **how):
    certferry.own_process = real  # the first one is the network's
    def evil(jobs, answers):
        {}
    return real(evil, *rest, **how)
certferry.own_process = own_process
"""

    def test_child_that_misbehaves(self):
        """It dies, floods, lies about the protocol or says nothing: one line, in bounded time."""
        good = self.issue()
        rows = {"dies": "os._exit(9)",
                "is-killed": "os.kill(os.getpid(), 9)",
                "dies-later": "os.read(jobs, 1); os._exit(0)",
                "floods": "while True: os.write(answers, b'A' * 65536)",
                "floods-after": "os.read(jobs, 1)\n"
                                "        while True: os.write(answers, b'1 9\\n')",
                "unasked": "os.write(answers, b'77 5\\nhello'); os.read(jobs, 1 << 16)",
                "too-long": "os.write(answers, b'1 999999999\\n'); os.read(jobs, 1 << 16)",
                "garbage": "os.write(answers, bytes(range(256))); os.read(jobs, 1 << 16)"}
        if os.environ.get("CERTFERRY_SWEEP") == "full":  # it is waited for a few seconds more
            rows["mute"] = "while os.read(jobs, 1 << 16): pass"
        running = {}
        with world.Upstream(good) as upstream:
            for name, code in rows.items():
                there = world.Downstream().started(self)
                self.there = there
                self.lineage(NAME, upstream.source, good, timeout="0.5")
                running[name] = there, there.start("renew", "--json", python=self.patched(
                    self.EVIL.format(code)))
            for name, (there, process) in running.items():
                with self.subTest(name):
                    out, err = communicate(process)
                    outcome = json.loads(out)["lineages"][0]
                    self.assertEqual(1, process.returncode)
                    self.assertIn(outcome["reason"], ("unreachable", "malformed"), outcome)
                    self.assertEqual(1, len(err.splitlines()), err)
                    self.assertFalse(os.path.lexists(there.live(NAME, ".current")))

    LIE = """
real = certferry.exchange
certferry.exchange = lambda job: real(job)._replace({})
"""

    def test_child_that_lies(self):
        """It hands over other bytes than it was shown: they are judged like everything else."""
        upstream, good = self.serve()
        stranger = world.Authority(world.scratch(self), name="Stranger")
        forged = stranger.issue([NAME], key=good.key)
        rows = (("untrusted", "data=%r" % world.read(forged.fullchain)),
                ("key-mismatch", "data=%r" % world.read(self.issue().fullchain)),
                ("malformed", "data=b''"), ("malformed", "data=b'nonsense' * 1000"),
                ("malformed", "data=b'#' * 1500000"),
                ("malformed", "data=%r" % certferry.to_pem([b"\x30\x80\0\0"])),
                ("malformed", "reason='installed'"),
                ("unreachable", r"reason='unreachable', detail='\x1b[31m\n\tlines \u00e9' * 99"),
                ("malformed", r"reason='untrusted\r\nforged: installed: all is well'"))
        for expected, lie in rows:
            with self.subTest(lie[:60]):
                result = self.there.run("renew", "--json", python=self.patched(
                    self.LIE.format(lie)))
                self.assert_result(expected, json.loads(result.out)["lineages"][0])
                self.assertRegex(result.err, r"\Acertferry: example.com: [ -~]{1,700}\n\Z")
        self.assertFalse(os.path.lexists(self.there.live(NAME, ".current")))
        self.assertTrue(upstream.connections)

    def test_nobody_of_roots(self):
        """A passwd entry that makes nobody root, or one of root's group, does not count."""
        for entry in ((0, 0), (65534, 0), (0, 65534)):
            found = mock.Mock(pw_uid=entry[0], pw_gid=entry[1])
            with mock.patch("pwd.getpwnam", return_value=found):
                self.assertEqual((65534, 65534), certferry._nobody(), entry)

    def test_privilege_that_stays(self):
        """Where it cannot be given up nothing is fetched, and that is never put off."""
        upstream, _ = self.serve()
        self.assert_result("installed", self.renew()[NAME])
        before = upstream.connections
        outcome = self.renew(python=self.patched(
            "def confine(*_, **__):\n    raise OSError(1, 'it stays')\n"
            "certferry.confine = confine"))[NAME]
        self.assertEqual(("failed", "unreachable"), (outcome["result"], outcome["reason"]))
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
