"""Attacks from outside: nobody without the key is believed, nothing beside root reaches root.

The usual run takes a sample of the tables of impostors. CERTFERRY_FULL=1 tries every alert at both
levels, in both versions of TLS, in the clear and after each dialogue, for each kind of lineage, and
every place to stop at; it prints how many.
"""

import builtins
import collections
import contextlib
import fcntl
import functools
import glob
import itertools
import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import termios
import time
import unittest
from unittest import mock

import certferry
from tests import impostors, world
from tests.impostors import Trick, alert, handshake, message

NAME = "example.com"
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
FULL = bool(os.environ.get("CERTFERRY_FULL"))
AT_ONCE = 1512  # lineages of one run, as many of each kind
STRANGER = 54321  # a user who owns nothing else
PROTOCOLS = (None,) + tuple(sorted(impostors.DIALOGUES))
VERSIONS = "1.2", "1.3"
KINDS = "first", "renewal", "replay", "staged"
ALERTS = (  # those that have a name, and three that have none
    "0 10 20 21 22 30 40 41 42 43 44 45 46 47 48 49 50 51 60 70 71 80 86 90 100 109 110 111 112 113"
    " 114 115 116 120 1 128 255"
)

# Before Python 3.10 the ssl module does not tell whether a certificate was shown.
TELLS = sys.version_info >= (3, 10)
SHOWN = {"unproven"} if TELLS else {"unproven", "unreachable"}
LYING = {"unproven"}  # a bad signature is told by every Python
NOT_SHOWN = {"unreachable"}
EITHER = SHOWN | NOT_SHOWN


def load_tests(_loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK those that the interpreter has a part in."""
    return world.without(tests, Devices, KeysAsOptions, Monitoring, WeakRoots)


class Row:
    """One attack: on a lineage of that kind, in that protocol, by that trick, and what it is."""

    def __init__(self, kind, protocol, trick, expected, what):
        self.kind = kind
        self.protocol = protocol
        self.trick = trick
        self.expected = expected  # the reasons that are right
        self.what = what
        self.name = None

    def __repr__(self):
        where = self.protocol or "tls"
        return "{} {} TLS {}: {}".format(self.kind, where, self.trick.version, self.what)


@functools.lru_cache(maxsize=None)
def minted():
    """(Authority, current, renewed, next): certificates of one key, and one of the next key."""
    authority = world.Authority(world.scratch())
    current = authority.issue([NAME])
    renewed = authority.issue([NAME], key=current.key)
    return authority, current, renewed, authority.issue([NAME])


def shown_to(kind):
    """The certificate that an impostor shows to that kind of lineage."""
    _, current, renewed, following = minted()
    return {"replay": current, "staged": following}.get(kind, renewed)


@functools.lru_cache(maxsize=None)
def ders(kind):
    """The same with its chain, as DER."""
    return world.certificates(shown_to(kind).fullchain)


class ProofCase(unittest.TestCase):
    """A downstream for each test, lineages put there by hand."""

    def setUp(self):
        self.authority, self.current, self.renewed, self.following = minted()
        self.there = world.Downstream().started(self)
        # Some of what is run is nobody and must get at openssl's wrapper and the like.
        os.chmod(os.path.dirname(self.there.config), 0o755)

    def lineage(self, name, source, kind="first", there=None, **options):
        """Put a lineage there, as certferry would have left it: its key, version 1 and a conf."""
        there = there or self.there
        if kind == "first":
            there.key(name, self.current)
        else:
            self.put_version(there, name)
        if kind == "staged":
            there.key(name, self.following, "privkey-next.pem")
        self.configure(name, source, there, **options)

    def configure(self, name, source, there=None, **options):
        """Write its NAME.conf; the server is asked for the lineage's name."""
        there = there or self.there
        os.makedirs(os.path.dirname(there.conf(name)), 0o700, exist_ok=True)
        options = dict({"ca-file": self.authority.root, "domain": NAME, "sni": name}, **options)
        sources = [source] if isinstance(source, str) else source
        options["from"] = "".join("\n    " + each for each in sources)
        lines = ("{} = {}\n".format(*option) for option in sorted(options.items()) if option[1])
        world.write(there.conf(name), "".join(lines), 0o600)

    def put_version(self, there, name):
        """Make the current certificate version 1, in service through four links."""
        folder, live = there.archive(name, 1), there.live(name)
        os.makedirs(folder)
        os.makedirs(live)
        files = zip(("privkey", "cert", "chain", "fullchain"), self.current)
        for member, path in files:
            mode = 0o600 if member == "privkey" else 0o644
            world.write(os.path.join(folder, member + ".pem"), world.read(path), mode)
            os.symlink(".current/{}.pem".format(member), os.path.join(live, member + ".pem"))
        os.symlink("../../archive/{}@1".format(name), os.path.join(live, ".current"))

    def closed(self):
        """A source where nothing listens."""
        closed = world.Closed()
        self.addCleanup(closed.__exit__)
        return closed.source

    def renew(self, *arguments, there=None, **how):
        """`certferry renew`: (exit status, {lineage: its JSON object})."""
        there = there or self.there
        status, document = there.json("renew", *arguments, timeout=600, **how)
        return status, {each["name"]: each for each in document["lineages"]}

    def cross(self, source, *options, **how):
        """`certferry NAME --from SOURCE` with the authority's root: (status, its JSON object)."""
        options = ("--from", source, "--ca-file", self.authority.root) + options
        status, document = self.there.json(NAME, *options, **how)
        return status, document["lineages"][0]

    def assert_nothing_written(self, before, there=None):
        """Certificates, keys and versions are as they were."""
        after = treasures(there or self.there)
        self.assertEqual([], world.changed(before, after))

    def patched(self, patch):
        """An interpreter that changes the module first."""
        return world.patched(self, patch)


def treasures(there):
    """A snapshot of live/ and archive/ alone."""
    found = there.snapshot().items()
    return {path: entry for path, entry in found if path.startswith(("live/", "archive/"))}


# ---------------------------------------------------------------- impostors


class ImpostorCase(ProofCase):
    """Tables of attacks: each run of the command meets many of them, one a lineage."""

    def attack(self, rows):
        """Try them all; AssertionError with those that were believed, or told wrongly."""
        rows = list(rows)
        with contextlib.ExitStack() as stack:
            there = stack.enter_context(world.Downstream())
            servers = {}
            for protocol in {row.protocol for row in rows}:
                server = impostors.Impostor({}, protocol)
                servers[protocol] = stack.enter_context(server)
            for start in range(0, len(rows), AT_ONCE):
                self.attack_at_once(rows[start : start + AT_ONCE], there, servers)
        if FULL:
            sys.stderr.write("{}: {:,} attacks\n".format(self.id(), len(rows)))

    def attack_at_once(self, rows, there, servers):
        """Try some of them in one run, on lineages of earlier ones where there are such."""
        numbers = collections.Counter()
        for row in rows:
            stem = "{}-{}".format(row.kind, row.protocol or "tls")
            row.name = "{}-{}.example.com".format(stem, numbers[stem])
            numbers[stem] += 1
            servers[row.protocol].tricks[row.name] = row.trick
            if not os.path.exists(there.conf(row.name)):
                self.lineage(row.name, servers[row.protocol].source, row.kind, there)
        for server in servers.values():
            server.played.clear()
        before = treasures(there)
        status, found = self.renew(*(row.name for row in rows), there=there)
        self.assertEqual(1, status)
        self.assert_refused(rows, found, servers)
        self.assert_nothing_written(before, there)

    def assert_refused(self, rows, found, servers):
        """Each was tried, none was believed, and each was told for what it is."""
        wrong = []
        for row in rows:
            outcome = found[row.name]
            believed = outcome["result"] not in ("refused", "failed") or outcome["changed"]
            if believed or outcome["reason"] not in row.expected:
                told = "{}, {}: {}".format(outcome["result"], outcome["reason"], outcome["detail"])
                wrong.append("{!r}: {}".format(row, told))
            elif row.protocol in servers:
                # the server's thread may count it after the command has ended
                played = servers[row.protocol].played
                world.eventually(lambda played=played, row=row: played[row.name])
        if wrong:
            told = "\n".join(wrong[:12])
            self.fail("{} of {}:\n{}".format(len(wrong), len(rows), told))


class Alerts(ImpostorCase):
    """In place of the proof an alert, of any code and level, and then the end."""

    @staticmethod
    def row(code, level, version, protocol, kind):
        """One alert, after the certificates."""
        trick = Trick(version, ders(kind), [alert(level, code)])
        return Row(kind, protocol, trick, SHOWN, "alert {} at level {}".format(code, level))

    def test_close_notify(self):
        """The gentlest one, which makes `openssl s_client` exit 0: in every place there is."""
        rows = []
        for number, place in enumerate(itertools.product(PROTOCOLS, KINDS)):
            rows.append(self.row(0, 1, "1.3", *place))
            if number % 2:
                rows.append(self.row(0, 1, "1.2", *place))
            if number % 5 == 0:
                rows.append(self.row(0, 2, "1.3", *place))
        self.attack(world.in_turn(rows))

    def test_all_alerts(self):
        """The codes that have a name, and three that have none; in the full table all of them."""
        if FULL:
            everywhere = itertools.product(range(256), (1, 2), VERSIONS, PROTOCOLS, KINDS)
            self.attack(self.row(*place) for place in everywhere)
            return
        places = itertools.cycle(itertools.product(PROTOCOLS, KINDS))
        forms = itertools.cycle([(1, "1.2"), (2, "1.3"), (2, "1.2"), (1, "1.3")])
        rows = [self.row(int(code), *next(forms) + next(places)) for code in ALERTS.split()]
        self.attack(world.in_turn(rows))

    def test_odd_alerts(self):
        """Levels that there are not, alerts in the clear, one after another, in pieces."""
        closing, fatal = alert(1, 0), alert(2, 40)
        odd = {
            "level 0": [alert(0, 0)],
            "level 3": [alert(3, 0)],
            "level 255": [alert(255, 255)],
            "in the clear": [impostors.record(*closing)],
            "in the clear, fatal": [impostors.record(*fatal)],
            "user_canceled, close_notify": [alert(1, 90), closing],
            "no_renegotiation, close_notify": [alert(1, 100), closing],
            "close_notify twice": [closing, closing],
            "four warnings, close_notify": [alert(1, 90)] * 4 + [closing],
            "nine warnings": [alert(1, 90)] * 9,
            "half an alert": [(impostors.ALERT, b"\1")],
            "two in one": [(impostors.ALERT, b"\1\0\1\0")],
            "empty": [(impostors.ALERT, b"")],
        }
        turns = itertools.cycle(itertools.product(PROTOCOLS, KINDS))
        versions = itertools.cycle(VERSIONS)
        rows = []
        for what, after in sorted(odd.items()):
            for version in itertools.islice(versions, 2 if FULL else 1):
                for protocol, kind in itertools.islice(turns, 36 if FULL else 1):
                    trick = Trick(version, ders(kind), after)
                    rows.append(Row(kind, protocol, trick, SHOWN, what))
        self.attack(rows)


def made_up(version):
    """The rest of a server's flight, with a signature that is nobody's."""
    if version == "1.2":
        done = message(impostors.SERVER_HELLO_DONE)
        return [handshake(impostors.key_exchange()), handshake(done)]
    return [handshake(impostors.certificate_verify()), handshake(impostors.finished(version))]


def flight_size(version, kind):
    """(bytes up to the certificates' end, bytes in all) of a flight with a made-up signature."""
    hello = impostors.Hello("", bytes(32), bytes(32), b"")
    content, opening = impostors.flight(hello, Trick(version, ders(kind), made_up(version)))
    return opening, len(content)


class Endings(ImpostorCase):
    """The flight ends somewhere: the connection is closed, reset or left silent."""

    def places(self, version, kind, ending):
        """Where to stop: everywhere, or before and after what may matter."""
        opening, size = flight_size(version, kind)
        if FULL:
            return range(size + 1)
        some = {0, 1, 5, 6, 50, 150, opening - 400, opening - 1, opening, opening + 1}
        some = sorted(some | {opening + 40, size - 1, size})
        return some if ending == "close" else some[::2]

    def rows(self, endings):
        """A row for each place and ending; protocol and kind in turn."""
        turns = itertools.cycle(itertools.product(PROTOCOLS, KINDS))
        for version, ending in itertools.product(VERSIONS, endings):
            for place in self.places(version, "renewal", ending):
                protocol, kind = next(turns)
                opening, _ = flight_size(version, kind)
                expected = SHOWN if place >= opening else NOT_SHOWN
                if ending == "reset":
                    expected = EITHER  # it may overtake what was sent before
                trick = Trick(version, ders(kind), made_up(version), ending, place)
                what = "{} after {} bytes of {}".format(ending, place, opening)
                yield Row(kind, protocol, trick, expected, what)

    def test_close_and_reset(self):
        self.attack(world.in_turn(self.rows(["close", "reset"])))

    def test_silence(self):
        """Each at an endpoint of its own: one that was waited for in vain is not asked again.

        The lineages have been ferried before, so that they are asked side by side.
        """
        rows = list(self.rows(["silence"]))
        if not FULL:
            rows = rows[1::2]
        for start in range(0, len(rows), 160):
            self.fall_silent(rows[start : start + 160])

    def fall_silent(self, rows):
        """Ferry all from an honest server, then meet these impostors."""
        with contextlib.ExitStack() as stack:
            there = stack.enter_context(world.Downstream())
            honest = stack.enter_context(world.Upstream(self.current))
            servers = []
            for number, row in enumerate(rows):
                row.name = "n{}.example.com".format(number)
                tricks = {row.name: row.trick}
                servers.append(stack.enter_context(impostors.Impostor(tricks, row.protocol)))
                self.lineage(row.name, honest.source, "renewal", there)
            self.assertEqual(0, self.renew(there=there)[0])
            for row, server in zip(rows, servers):
                self.configure(row.name, server.source, there, timeout="0.6")
            before = treasures(there)
            _, found = self.renew(there=there)
            self.assert_nothing_written(before, there)
            for row, server in zip(rows, servers):
                with self.subTest(row):
                    outcome = found[row.name]
                    # that of yesterday is good enough for today: a run without an upstream waits
                    self.assertIn(outcome["result"], ("failed", "deferred", "refused"), outcome)
                    self.assertIn(outcome["reason"], SHOWN | {"timeout"}, outcome)
                    self.assertTrue(server.played[row.name])

    def test_never_put_off(self):
        """What has no proof is told at once, however well the lineage is."""
        tricks = {}
        with world.Upstream(self.current) as honest, impostors.Impostor(tricks) as server:
            for version in VERSIONS:
                name = "as{}.example.com".format(version.replace(".", "-"))
                lying = Trick(version, ders("renewal"), made_up(version))
                ending = Trick(version, ders("renewal"), [alert(1, 0)])
                tricks.update({name: lying, "end-" + name: ending})
            for name in tricks:
                self.lineage(name, honest.source, "renewal")
            self.assertEqual(0, self.renew()[0])
            for name in tricks:
                self.configure(name, server.source)
            status, found = self.renew()
        self.assertEqual(1, status)
        for name, outcome in found.items():
            with self.subTest(name):
                if TELLS or not name.startswith("end-"):
                    self.assertEqual(("refused", "unproven"), results(outcome), outcome)


def results(outcome):
    """(result, reason) of a JSON object."""
    return outcome["result"], outcome["reason"]


class Forgeries(ImpostorCase):
    """A proof that is none: made up, left out, another's, or of another connection."""

    def rows(self, after, whole=True, expected=SHOWN):
        """A row for each of {(version, what): what follows the certificates}."""
        turns = itertools.cycle(itertools.product(PROTOCOLS, KINDS))
        ends = itertools.cycle([[], [alert(1, 0)]])
        for (version, what), content in sorted(after.items()):
            for protocol, kind in itertools.islice(turns, 36 if FULL else 1):
                for end in itertools.islice(ends, 2 if FULL else 1):
                    trick = Trick(version, ders(kind), content + end, whole=whole)
                    yield Row(kind, protocol, trick, expected, what)

    def test_made_up_signatures(self):
        """One of the right form, in each version, in the clear and after each dialogue."""
        rows = []
        kinds = itertools.cycle(KINDS)
        for protocol, version in itertools.product(PROTOCOLS, VERSIONS):
            for kind in itertools.islice(kinds, len(KINDS) if FULL else 1):
                trick = Trick(version, ders(kind), made_up(version))
                rows.append(Row(kind, protocol, trick, LYING, "a made-up signature"))
        self.attack(world.in_turn(rows))

    def test_no_signature(self):
        """The message with the signature is left out, or others come in its place."""
        done = message(impostors.SERVER_HELLO_DONE)
        early = (impostors.CHANGE_CIPHER_SPEC, b"\1")
        again = message(impostors.CERTIFICATE, impostors.vector(3))
        finished = {version: handshake(impostors.finished(version)) for version in VERSIONS}
        self.attack(
            self.rows(
                {
                    ("1.2", "no key exchange"): [handshake(done)],
                    ("1.2", "key exchange unsigned"): [
                        handshake(impostors.key_exchange(signature=b""), done)
                    ],
                    ("1.2", "an empty signature"): [
                        handshake(impostors.key_exchange(signature=b"\4\3\0\0"), done)
                    ],
                    ("1.2", "an anonymous signature"): [
                        handshake(impostors.key_exchange(signature=b"\0\0\0\0"), done)
                    ],
                    ("1.2", "finished at once"): [finished["1.2"]],
                    ("1.2", "early change of cipher"): [early, finished["1.2"]],
                    ("1.2", "a request to begin again"): [
                        handshake(message(impostors.HELLO_REQUEST))
                    ],
                    ("1.2", "no more certificates"): [handshake(again, done)],
                    ("1.2", "data"): [(impostors.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\n\r\n")],
                    ("1.2", "a heartbeat"): [(impostors.HEARTBEAT, b"\1\x40\0")],
                    ("1.2", "a client certificate demanded at once"): [
                        handshake(message(impostors.CERTIFICATE_REQUEST, b"\1\x40\0\0\0\0"))
                    ],
                    ("1.3", "finished at once"): [finished["1.3"]],
                    ("1.3", "an empty signature"): [
                        handshake(message(impostors.CERTIFICATE_VERIFY, b"\4\3\0\0")),
                        finished["1.3"],
                    ],
                    ("1.3", "a ticket"): [
                        handshake(message(impostors.NEW_SESSION_TICKET, bytes(16)))
                    ],
                    ("1.3", "an update of keys"): [handshake(message(24, b"\0"))],
                    ("1.3", "certificates once more"): [handshake(again)],
                    ("1.3", "data"): [(impostors.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\n\r\n")],
                    ("1.3", "data in the clear"): [impostors.record(23, b"x" * 40)],
                    ("1.3", "finished in the clear"): [impostors.record(*finished["1.3"])],
                    ("1.3", "a record of nothing"): [(0, b"")],
                }
            )
        )

    def test_no_certificate(self):
        """None is shown at all, as where both sides know each other."""
        done = message(impostors.SERVER_HELLO_DONE)
        rows = self.rows(
            {
                ("1.2", "key exchange"): made_up("1.2"),
                ("1.2", "unsigned"): [handshake(impostors.key_exchange(signature=b""), done)],
                ("1.2", "nothing"): [handshake(done)],
                ("1.3", "signature"): made_up("1.3"),
                ("1.3", "finished"): [handshake(impostors.finished("1.3"))],
            },
            whole=False,
            expected=NOT_SHOWN,
        )
        self.attack(rows)

    def test_no_proof_by_choice(self):
        """The server chooses what was not offered: no signature, no encryption, an old version."""
        choices = {
            "RSA key transport": (b"\3\3", b"\0\x9c"),
            "nobody's key, ECDH": (b"\3\3", b"\xc0\x18"),
            "nobody's key, DH": (b"\3\3", b"\0\xa6"),
            "no encryption": (b"\3\3", b"\xc0\6"),
            "nothing at all": (b"\3\3", b"\0\0"),
            "a key shared before": (b"\3\3", b"\0\xa8"),
            "TLS 1.0": (b"\3\1", b"\xc0\x09"),
            "TLS 1.1": (b"\3\2", b"\xc0\x09"),
            "SSL 3": (b"\3\0", b"\xc0\x09"),
            "a TLS to come": (b"\3\5", b"\xc0\x2b"),
        }
        done = handshake(message(impostors.SERVER_HELLO_DONE))
        rows = []
        turns = itertools.cycle(itertools.product(PROTOCOLS, KINDS))
        for what, chosen in sorted(choices.items()):
            afters = ([alert(1, 0)], made_up("1.2"), [done])
            for after in afters[: 3 if FULL else 1 + len(what) % 2]:
                protocol, kind = next(turns)
                trick = Trick("1.2", ders(kind), after, chosen=chosen)
                rows.append(Row(kind, protocol, trick, NOT_SHOWN, what))
        self.attack(rows)

    def test_another_key(self):
        """Real signatures, by a key that is not the certificate's, of both types."""
        rsa = self.authority.issue([NAME], key="rsa:2048")
        stranger = self.authority.issue([NAME])
        with contextlib.ExitStack() as stack:
            for version, kind in itertools.product(VERSIONS, KINDS):
                server = world.Impostor(shown_to(kind), stranger, version)
                name = "{}-{}.example.com".format(kind, version.replace(".", "-"))
                self.lineage(name, stack.enter_context(server).source, kind)
            server = stack.enter_context(world.Impostor(rsa))
            self.lineage("rsa.example.com", server.source)
            self.there.key("rsa.example.com", rsa)
            before = treasures(self.there)
            status, found = self.renew()
        self.assertEqual(1, status)
        self.assertEqual(9, len(found))
        for name, outcome in found.items():
            with self.subTest(name):
                self.assertEqual(("refused", "unproven"), results(outcome), outcome)
        self.assert_nothing_written(before)

    def test_a_leaf_of_its_own(self):
        """It proves the key of its own certificate and sends ours as if it were an issuer."""
        own = self.authority.issue([NAME])
        sent = [self.renewed.cert, self.authority.intermediate.cert]
        with contextlib.ExitStack() as stack:
            for version in VERSIONS:
                server = world.Upstream(own, send=sent, minimum=version, maximum=version)
                name = "as{}.example.com".format(version.replace(".", "-"))
                self.lineage(name, stack.enter_context(server).source, "renewal")
            before = treasures(self.there)
            _, found = self.renew()
        for outcome in found.values():
            self.assertEqual(("refused", "key-mismatch"), results(outcome), outcome)
        self.assert_nothing_written(before)

    def test_two_faces(self):
        """It proves a key of its own to the first handshake, and shows ours to those after it."""
        own = {"rsa": "rsa:2048", "ecdsa": "P-256"}
        own = {kind: self.authority.issue([NAME], key=key) for kind, key in own.items()}
        ending = Trick("1.2", ders("renewal"), [alert(1, 0)])
        faces = {"rsa": [ending], "ecdsa": [ending], "then-silent": [ending._replace(after=())]}
        with contextlib.ExitStack() as stack:
            for name, tricks in faces.items():
                server = stack.enter_context(TwoFaced(own.get(name, own["rsa"]), tricks))
                self.lineage(name + ".example.com", server.source, "renewal")
            before = treasures(self.there)
            status, found = self.renew()
        self.assertEqual(1, status)
        for name, outcome in found.items():
            with self.subTest(name):
                self.assertIn(outcome["reason"], {"key-mismatch"} | EITHER, outcome)
                self.assertFalse(outcome["changed"], outcome)
        self.assert_nothing_written(before)

    def test_commands(self):
        """`certferry NAME`, a dry run and --force believe no more; options are not remembered."""
        trick = Trick("1.3", ders("renewal"), [alert(1, 0)])
        with impostors.Impostor({NAME: trick}) as server:
            self.there.key(NAME, self.current)
            before = self.there.snapshot()
            for options in (["--dry-run"], ["--force"], []):
                status, outcome = self.cross(server.source, *options)
                self.assertEqual(1, status)
                self.assertIn(outcome["reason"], SHOWN, outcome)
                self.assertFalse(outcome["changed"])
        left = world.changed(before, self.there.snapshot())
        self.assertEqual([], [path for path in left if path.startswith(("live/", "archive"))])
        self.assertFalse(os.path.exists(self.there.conf(NAME)))

    def test_sources_in_turn(self):
        """The honest one of several is believed; where none is, no proof is graver than no TLS."""
        trick = Trick("1.3", ders("renewal"), [alert(1, 0)])
        tricks = dict.fromkeys(("good.example.com", "bad.example.com"), trick)
        with impostors.Impostor(tricks) as server, world.Upstream(self.renewed) as honest:
            self.lineage("good.example.com", [server.source, honest.source], "renewal")
            self.lineage("bad.example.com", [server.source, self.closed()], "renewal")
            status, found = self.renew()
        self.assertEqual(1, status)
        good, bad = found["good.example.com"], found["bad.example.com"]
        self.assertEqual(("installed", honest.source), (good["result"], good["source"]), good)
        self.there.assert_fits(self, "good.example.com", self.renewed)
        self.assertIn(bad["reason"], SHOWN, bad)

    def test_a_service_without_the_key(self):
        """What a --served-at service shows counts with the proof alone, too."""
        trick = Trick("1.3", ders("renewal"), [alert(1, 0)])
        python = self.patched("certferry.SERVED_SECONDS = 0.3")
        with world.Upstream(self.renewed) as honest, impostors.Impostor({NAME: trick}) as server:
            self.lineage(NAME, honest.source, "renewal", **{"served-at": server.source})
            status, found = self.renew(python=python)
        self.assertEqual(1, status)
        self.assertEqual(("pending", "not-served"), results(found[NAME]), found)

    def test_a_client_certificate_demanded(self):
        """In TLS 1.3 the proof comes before the demand counts; in TLS 1.2 there never is any."""
        root = self.authority.root
        with contextlib.ExitStack() as stack:
            for version in VERSIONS:
                server = world.Upstream(
                    self.renewed, client_ca=root, minimum=version, maximum=version
                )
                name = "as{}.example.com".format(version.replace(".", "-"))
                self.lineage(name, stack.enter_context(server).source, "renewal")
            _, found = self.renew()
        self.assertEqual("installed", found["as1-3.example.com"]["result"], found)
        self.assertIn(found["as1-2.example.com"]["reason"], SHOWN, found)
        if TELLS:
            self.assertRegex(found["as1-2.example.com"]["detail"], "client certificate")


class TwoFaced(world.Server):
    """A proper server with a certificate of its own to the first client, then an impostor."""

    def __init__(self, own, tricks):
        super().__init__()
        self._honest = world.Upstream(own)
        self._tricks = itertools.cycle(tricks)

    def talk(self, sock):
        """The first connection is honest."""
        if self.connections == 1:
            self._honest.talk(sock)
            return
        hello = impostors.read_hello(sock)
        trick = next(self._tricks)
        sock.sendall(impostors.flight(hello, trick)[0])
        impostors.end(sock, trick.ending)


class Dialogues(ProofCase):
    """What the impostors speak before TLS is right: it is their lack of a key that fails."""

    def test_honest_servers(self):
        with contextlib.ExitStack() as stack:
            for protocol in impostors.DIALOGUES:
                before = impostors.after_dialogue(protocol)
                server = stack.enter_context(world.Upstream(self.renewed, before=before))
                source = "{}://{}".format(protocol, server.source)
                self.lineage(protocol + ".example.com", source, "renewal")
            status, found = self.renew()
        for name, outcome in found.items():
            with self.subTest(name):
                self.assertEqual("installed", outcome["result"], outcome)
        self.assertEqual(0, status)

    def test_words_before_the_handshake(self):
        """What is said in the clear beyond the last answer belongs to nobody, and ends it."""
        more = {"xmpp": b"<features/>", "postgres": b"N", "ldap": b"\x30\0", "mysql": b"\1\0\0\2\0"}
        with contextlib.ExitStack() as stack:
            for protocol in impostors.DIALOGUES:
                said = more.get(protocol, b"250 more\r\n")
                before = impostors.after_dialogue(protocol, said)
                server = stack.enter_context(world.Upstream(self.renewed, before=before))
                source = "{}://{}".format(protocol, server.source)
                self.lineage(protocol + ".example.com", source, "renewal", timeout="5")
            before = treasures(self.there)
            status, found = self.renew()
        self.assertEqual(1, status)
        for name, outcome in found.items():
            with self.subTest(name):
                self.assertEqual("unreachable", outcome["reason"], outcome)
        self.assert_nothing_written(before)


# ---------------------------------------------------------------- what a process may answer


class KeysFromHandshakes(unittest.TestCase):
    """A network process that has been taken over answers with a key."""

    def forms(self):
        """The same private key in each form that openssl writes, and one that it cannot read."""
        _, current, _, _ = minted()
        rsa = minted()[0].issue([NAME], key="rsa:2048").key
        encrypt = ("-passout", "pass:x", "-aes128")
        yield world.read(current.key).decode()
        yield world.openssl("ec", "-in", current.key)
        yield world.openssl("rsa", "-in", rsa, *TRADITIONAL)
        yield world.openssl("pkey", "-in", current.key, *encrypt)
        yield "-----BEGIN ANY PRIVATE KEY-----\nAAAA\n-----END ANY PRIVATE KEY-----\n"

    def test_a_key_from_a_handshake(self):
        _, current, _, _ = minted()
        shown = world.read(current.fullchain)
        sources = ["up.example.net"] + [each + "://up.example.net" for each in PROTOCOLS[1:]]
        forms = [form.encode() for form in self.forms()]
        taken = []
        for text, form in itertools.product(sources, forms):
            for data in (shown + form, form + shown):
                answer = certferry.Answer("", "", "", "192.0.2.1:443", data)
                try:
                    certferry.read_offer(certferry.parse_source(text), answer)
                    taken.append((text, form.split(b"\n")[0]))
                except certferry.Failure as failure:
                    self.assertEqual("malformed", failure.reason)
        self.assertEqual([], taken[:5], "{} were taken".format(len(taken)))

    def test_where_a_key_may_come_from(self):
        _, current, _, _ = minted()
        data = world.read(current.fullchain) + world.read(current.key)
        answer = certferry.Answer("", "", "", "", data)
        for text in ("file:/x", "exec:x", "vault://v.example.net/a/b", "azure://v/n"):
            offer = certferry.read_offer(certferry.parse_source(text), answer)
            self.assertIn(world.read(current.key).strip(), offer.key.pem)


# From OpenSSL 3 on it writes PKCS 8 unless it is told not to; before there was nothing to tell.
TRADITIONAL = ("-traditional",) if re.match("OpenSSL [3-9]", world.openssl("version")) else ()


# ---------------------------------------------------------------- processes


class Wrapper:
    """An `openssl` that comes first on PATH, notes as what it runs, and runs the real one.

    It writes to a pipe: those who may write no file may do that. It starts nothing, which those may
    not do either.
    """

    NOTE = """#!/bin/sh
{{
    echo ": $1"
    read -r line </proc/$$/stat
    echo "$line"
    while read -r line; do
        case $line in [UG]id:* | Groups:*) echo "$line" ;; esac
    done </proc/$$/status
    if true </dev/tty; then echo "tty: open"; else echo "tty: none"; fi
    echo "cwd:"
    pwd -P
    export -p
}} >{pipe} 2>/dev/null
{then}
exec {real} "$@"
"""

    def __init__(self, case, then=""):
        self.folder = world.scratch(case)
        os.chmod(self.folder, 0o755)
        pipe = os.path.join(self.folder, "pipe")
        os.mkfifo(pipe)
        os.chmod(pipe, 0o666)
        # read and write: neither side waits for the other
        self._notes = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        case.addCleanup(os.close, self._notes)
        script = self.NOTE.format(pipe=pipe, then=then, real=shutil.which("openssl"))
        world.write(os.path.join(self.folder, "openssl"), script, 0o755)
        self.path = self.folder + os.pathsep + os.environ["PATH"]

    def notes(self):
        """What was noted since, as Notes in their order."""
        content = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                content += os.read(self._notes, 65536)
        found = re.split("^: ", content.decode("utf-8", "replace"), flags=re.M)
        return [Note(text) for text in found[1:]]


class Note:
    """As what an openssl process ran: .command, .process, .session, .terminal, .user, ..."""

    def __init__(self, text):
        lines = text.splitlines()
        self.command = lines[0]
        fields = lines[1].rpartition(")")[2].split()
        self.process = int(lines[1].split(" ")[0])
        self.session, self.terminal = int(fields[3]), int(fields[4])
        facts = {}
        for line in lines[2:]:
            key, _, value = line.partition(":")
            facts[key] = value.strip()
        self.users = set(facts["Uid"].split())
        self.groups = set(facts["Gid"].split())
        self.more_groups = facts["Groups"].split()
        self.terminal_opens = facts["tty"] == "open"
        self.folder = lines[lines.index("cwd:") + 1]
        # `export NAME='value'`, or bash's `declare -x NAME="value"`
        self.environment = set(re.findall(r"(?m)^(?:export|declare -x) (\w+)", text))

    def __repr__(self):
        return "openssl {} by {}".format(self.command, sorted(self.users))


CREDENTIALS = {
    "VAULT_TOKEN": "s.token-that-is-secret",
    "VAULT_ROLE_ID": "role-that-is-secret",
    "VAULT_SECRET_ID": "secret-id-that-is-secret",
    "AZURE_CLIENT_SECRET": "azure-that-is-secret",
}


class Confinement(ProofCase):
    """As what the processes run that meet what came from outside."""

    def on_a_terminal(self, *arguments, env):
        """Run the command as from a shell at a terminal; returns (its session, status)."""
        master, slave = pty.openpty()
        command = world.command() + arguments + ("--config-dir", self.there.config)

        def take_terminal():
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            command,
            env=dict(os.environ, **env),
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=take_terminal,
        )
        try:
            out, err = process.communicate(timeout=60)
        finally:
            os.close(master)
            os.close(slave)
        return process.pid, process.returncode, out.decode() + err.decode()

    @unittest.skipUnless(ROOT, "needs root")
    def test_openssl_processes(self):
        """No terminal, no session of root's, no group, no credential, no folder of the caller's."""
        wrapper = Wrapper(self)
        env = dict(CREDENTIALS, PATH=wrapper.path, SECRET_OF_ROOT="x")
        folder = world.scratch(self)
        for name, path in (("privkey", self.current.key), ("fullchain", self.current.fullchain)):
            world.write(os.path.join(folder, name + ".pem"), world.read(path), 0o600)
        with world.Upstream(self.renewed) as upstream:
            self.lineage("a.example.com", upstream.source)
            self.configure("b.example.com", "file:" + folder)
            session, status, said = self.on_a_terminal("renew", env=env)
        self.assertEqual(0, status, said)
        notes = wrapper.notes()
        self.assertTrue({"x509", "verify", "pkey"} <= {note.command for note in notes}, notes)
        groups_of_network = {"65534", str(os.stat("/").st_gid)}
        for note in notes:
            if note.command == "s_client":
                continue  # the network's, before Python 3.10: see below
            with self.subTest(note):
                if note.users == {"0"}:
                    # what root gives openssl itself is its own: keys that are here
                    self.assertIn(note.command, ("pkey", "version", "rsa", "ec"))
                    continue
                self.assertEqual({"65534"}, note.users)
                self.assertFalse(note.groups & groups_of_network)
                self.assertEqual([], note.more_groups)
                self.assertEqual(note.process, note.session)
                self.assertNotEqual(session, note.session)
                self.assertEqual(0, note.terminal)
                self.assertFalse(note.terminal_opens)
                self.assertEqual("/", note.folder)
                secret = set(CREDENTIALS) | {"SECRET_OF_ROOT", "HOME", "USER"}
                self.assertFalse(note.environment & secret)

    @unittest.skipUnless(ROOT, "needs root")
    @world.needs("setsid", "sleep")
    def test_nothing_is_left_behind(self):
        """An openssl that has been taken over leaves no process: it could trace those to come.

        They are of its user and group, hold keys that came with offers, and are believed.
        """
        left = os.path.join(world.scratch(self), "left")
        os.mkfifo(left)
        os.chmod(left, 0o666)
        os.chmod(os.path.dirname(left), 0o755)
        reading = os.open(left, os.O_RDWR | os.O_NONBLOCK)
        self.addCleanup(os.close, reading)
        then = "setsid sleep 300 >/dev/null 2>&1 & echo $! >" + left
        wrapper = Wrapper(self, "if [ $1 = x509 ]; then {}; fi".format(then))
        with world.Upstream(self.renewed) as upstream:
            self.lineage(NAME, upstream.source)
            self.renew(env={"PATH": wrapper.path})
        self.assertIn("x509", {note.command for note in wrapper.notes()})
        with contextlib.suppress(BlockingIOError):
            survivors = {int(process) for process in os.read(reading, 65536).split()}
            alive = not is_gone(survivors)
            for each in survivors:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            self.assertFalse(alive)

    @unittest.skipUnless(ROOT, "needs root")
    def test_what_children_hold(self):
        """While upstreams keep them waiting: no key, no credential, no terminal, no folder."""
        secrets = Secrets(self)
        with world.Silent() as tls, world.Silent() as vault:
            self.hold(tls.source, tls, secrets)
            self.hold(secrets.source(vault), vault, secrets)

    def hold(self, source, served, secrets):
        """Look at all processes of a run that waits for this source."""
        self.there.key(NAME, self.current)
        keys = (self.current, self.following)
        options = ("--from", source, "--key", "-", "--timeout", "60")
        process = self.there.start(NAME, *options, env=secrets.environment)
        try:
            process.stdin.write(world.read(self.following.key))
            process.stdin.close()
            process.stdin = None
            world.eventually(lambda: served.connections)
            children = children_of(process.pid)
            talking = [child for child in children if has_socket(child)]
            self.assertEqual(1, len(talking), children)
            for child in children:
                is_store = (child in talking) == source.startswith("vault:")
                with self.subTest(source, is_store=is_store):
                    its_own = ("token", "given") if is_store else ()
                    self.assertEqual([], secrets.found_in(child, keys, its_own))
                    self.assert_holds_nothing(child, process.pid)
        finally:
            for each in children_of(process.pid) + [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.communicate()

    def assert_holds_nothing(self, process, parent):
        """It is nobody, for good, in a session and a folder of its own."""
        status = world.read("/proc/{}/status".format(process)).decode()
        for word in ("Uid", "Gid"):
            self.assertEqual({"65534"}, set(re.search(word + r":\s+(.*)", status).group(1).split()))
        self.assertEqual("", re.search(r"Groups:[ \t]*(.*)", status).group(1).strip())
        self.assertEqual("0" * 16, re.search(r"CapEff:\s+(\w+)", status).group(1))
        fields = world.read("/proc/{}/stat".format(process)).decode().rpartition(")")[2].split()
        self.assertEqual([str(process), "0"], fields[3:5])
        self.assertEqual("/", os.readlink("/proc/{}/cwd".format(process)))
        self.assertNotEqual(os.getsid(parent), os.getsid(process))

    @unittest.skipUnless(ROOT, "needs root")
    def test_environment_of_the_network(self):
        """What it starts, which tells its environment, has no credential; it starts nothing now.

        Before Python 3.10 s_client tells the chain.
        """
        wrapper = Wrapper(self)
        env = dict(CREDENTIALS, PATH=wrapper.path, SECRET_OF_ROOT="x")
        with world.Upstream(self.renewed) as upstream:
            self.lineage(NAME, upstream.source)
            self.assertEqual(0, self.renew(env=env)[0])
        notes = [note for note in wrapper.notes() if note.command == "s_client"]
        self.assertEqual(TELLS, not notes)
        for note in notes:
            self.assertFalse(note.environment & (set(CREDENTIALS) | {"SECRET_OF_ROOT"}))
            self.assertEqual("/", note.folder)


class Secrets:
    """Credentials, two in files of root's and one given, and how they are looked for."""

    def __init__(self, case):
        folder = world.scratch(case)
        self._values = {"token": "s.%032x", "azure": "azure.%032x", "given": "given.%032x"}
        for name, form in self._values.items():
            self._values[name] = form % int.from_bytes(os.urandom(16), "big")
        paths = {
            name: world.write(os.path.join(folder, name), value, 0o600)
            for name, value in self._values.items()
        }
        self.environment = {
            "VAULT_TOKEN_FILE": paths["token"],
            "VAULT_CACERT": case.authority.root,
            "AZURE_CLIENT_SECRET_FILE": paths["azure"],
            "AZURE_TENANT_ID": "tenant",
            "AZURE_CLIENT_ID": "client",
            "VAULT_SECRET_ID": self._values["given"],
        }

    @staticmethod
    def source(server):
        """A Vault at that server."""
        return "vault://{}/secret/example".format(server.source)

    def found_in(self, process, keys, its_own):
        """The names of what the memory of a process holds, apart from what it has to know."""
        wanted = {name: self._values[name].encode() for name in self._values if name not in its_own}
        for number, credential in enumerate(keys):
            for form, pieces in pieces_of_key(credential.key).items():
                wanted["key {} as {}".format(number, form)] = pieces
        memory = memory_of(process)
        assert memory, "no memory to read"
        return [name for name, value in wanted.items() if value in memory]


def pieces_of_key(path):
    """{form: bytes} by which a private key is known: as text, and the secret number itself."""
    text = world.read(path)
    der = ssl.PEM_cert_to_DER_cert(
        text.decode().replace("PRIVATE KEY", "CERTIFICATE")  # the same form, another word
    )
    head = b"\x02\x01\x01\x04\x20"
    start = der.index(head) + len(head)
    return {"text": text.splitlines()[1][24:56], "number": der[start : start + 32]}


def memory_of(process):
    """All that a process can write to, in one piece.

    But for its stack: the kernel puts the environment there before a program begins, and as the
    README says, a credential that is given in the environment itself stays readable there.
    """
    content = []
    with open("/proc/{}/maps".format(process)) as maps, open(
        "/proc/{}/mem".format(process), "rb", 0
    ) as memory:
        for line in maps:
            where, mode = line.split()[:2]
            start, end = (int(part, 16) for part in where.split("-"))
            if mode.startswith("rw") and "[stack]" not in line:
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(start)
                    content.append(memory.read(end - start))
    return b"".join(content)


def children_of(process):
    """The processes that it has started and that live."""
    found = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = world.read(path).decode("ascii", "replace").rpartition(")")[2].split()
            if int(fields[1]) == process and fields[0] != "Z":
                found.append(int(path.split("/")[2]))
    return sorted(found)


def has_socket(process):
    """Say whether a process has a connection open."""
    for path in glob.glob("/proc/{}/fd/*".format(process)):
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("socket:"):
                return True
    return False


class Deadlines(ProofCase):
    """Whatever a process does, it is not waited for without an end."""

    @world.needs("sleep")
    def test_openssl_that_falls_silent(self):
        """It closes its outputs and sleeps, at each thing that it is asked for."""
        running = []
        with world.Upstream(self.renewed) as upstream:
            for command in ("x509", "verify", "pkey"):
                there = world.Downstream().started(self)
                os.chmod(os.path.dirname(there.config), 0o755)
                self.lineage(NAME, upstream.source, there=there)
                then = "[ $1 = {} ] && exec sleep 300 >&- 2>&-".format(command)
                wrapper = Wrapper(self, then)
                python = self.patched("certferry.OPENSSL_SECONDS = 1")
                how = {"env": {"PATH": wrapper.path}, "python": python}
                process = there.start("renew", "--json", **how)
                running.append((command, there, wrapper, process, time.monotonic()))
            for command, there, wrapper, process, started in running:
                with self.subTest(command):
                    self.assert_ends(process, started, there)
                    notes = [note for note in wrapper.notes() if note.command == command]
                    self.assertTrue(notes)
                    gone = functools.partial(is_gone, {note.process for note in notes})
                    world.eventually(gone, 5)

    def test_a_job_longer_than_a_pipe(self):
        """A store is given all roots of the system, say: the whole job arrives."""
        code = """import certferry
child = certferry.Child(lambda texts: certferry.Answer(data=b"%d" % len(texts[0])))
print(child.answer(child.submit(["x" * 1000000], 5)).data.decode())
child.close()
"""
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=world.REPOSITORY, stdout=subprocess.PIPE, timeout=60)
        self.assertEqual((0, b"1000000\n"), (ended.returncode, ended.stdout))

    @unittest.skipUnless(ROOT, "needs root")
    def test_network_process_that_drips(self):
        """Pieces of an answer without end do not move the deadline of that answer.

        The network process has been taken over: it stands still, the test writes into its pipe.
        """
        python = self.patched("certferry._GRACE = 0.5")
        with world.Silent() as server:
            self.lineage(NAME, server.source, timeout="0.5")
            process = self.there.start("renew", "--json", python=python)
            started = time.monotonic()
            world.eventually(lambda: server.connections)
            (child,) = filter(has_socket, children_of(process.pid))
            os.kill(child, signal.SIGSTOP)
            with open(pipe_written_by(child), "wb", 0) as pipe:
                while process.poll() is None and time.monotonic() < started + 8:
                    with contextlib.suppress(OSError):
                        pipe.write(b"A" * 40000)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
            took = time.monotonic() - started
            self.assert_ends(process, started, self.there)
        self.assertLess(took, 8)

    def assert_ends(self, process, started, there):
        """The command ends soon, with nothing accepted."""
        try:
            out, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            self.fail("still running after {:.0f} s".format(time.monotonic() - started))
        self.assertEqual(1, process.returncode)
        outcome = json.loads(out.decode())["lineages"][0]
        self.assertIn(outcome["result"], ("refused", "failed"), outcome)
        self.assertFalse(os.path.lexists(there.live(NAME, ".current")))


def pipe_written_by(process):
    """The path of the one pipe that a process can write to."""
    for path in glob.glob("/proc/{}/fd/*".format(process)):
        may_read = os.lstat(path).st_mode & stat.S_IRUSR
        if os.readlink(path).startswith("pipe:") and not may_read:
            return path
    raise AssertionError("it has no pipe to write to")


def is_gone(processes):
    """Say whether none of them lives."""
    states = []
    for process in processes:
        with contextlib.suppress(OSError):
            content = world.read("/proc/{}/stat".format(process)).decode("ascii", "replace")
            states.append(content.rpartition(")")[2].split()[0])
    return not [state for state in states if state != "Z"]


# ---------------------------------------------------------------- many commands in one process


class CommandsCase(ProofCase):
    """Runs many commands in forks of one process: half of a short command is its start."""

    RUNNER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import certferry
given = json.load(sys.stdin)
for number, (arguments, environment) in enumerate(given):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in enumerate(("out", "err"), 1):
            path = "%s/%d.%s" % (sys.argv[2], number, name)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        os.environ.update(environment)
        try:
            status = certferry.main(arguments)
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    status = os.waitpid(process, 0)[1]
    with open("%s/%d.status" % (sys.argv[2], number), "w") as file:
        file.write(str(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1))
"""

    def commands(self, *commands):
        """Run each (arguments, environment); returns their Results in order."""
        folder = world.scratch(self)
        where = ["--config-dir", self.there.config]
        given = [(list(arguments) + where, environment) for arguments, environment in commands]
        runner = [sys.executable, "-S", "-c", self.RUNNER, world.module_folder(), folder]
        subprocess.run(
            runner, input=json.dumps(given).encode(), check=True, timeout=120, cwd=folder
        )
        found = []
        for number in range(len(given)):
            texts = [
                world.read("{}/{}.{}".format(folder, number, name)).decode("utf-8", "replace")
                for name in ("status", "out", "err")
            ]
            found.append(world.Result(int(texts[0]), *texts[1:]))
        return found


class Devices(CommandsCase):
    """--metrics replaces a regular file, and nothing else."""

    def places(self, folder):
        """{what: path} of what is no regular file."""
        kept = world.write(os.path.join(folder, "kept"), "kept")
        names = (
            "a fifo",
            "a link",
            "a link to nothing",
            "a link to a fifo",
            "a folder",
            "a socket",
        )
        places = {name: os.path.join(folder, name.replace(" ", "-")) for name in names}
        os.mkfifo(places["a fifo"])
        os.symlink(kept, places["a link"])
        os.symlink(os.path.join(folder, "missing"), places["a link to nothing"])
        os.symlink(places["a fifo"], places["a link to a fifo"])
        os.mkdir(places["a folder"])
        listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(listening.close)
        listening.bind(places["a socket"])
        if ROOT:
            places["a device"] = os.path.join(folder, "null")
            os.mknod(places["a device"], 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        return places

    def test_no_regular_file(self):
        self.lineage(NAME, self.closed(), "renewal", timeout="1")
        folder = world.scratch(self)
        places = self.places(folder)
        before = {what: facts_of(path) for what, path in places.items()}
        rows = []
        for what, path in sorted(places.items()):
            for command in ("status", "renew"):
                rows.append((what, [command, "--metrics", path], {}))
            rows.append((what, ["renew"], {"CERTFERRY_METRICS": path}))
        results = self.commands(*(row[1:] for row in rows))
        for (what, arguments, _), result in zip(rows, results):
            with self.subTest(what, arguments=arguments):
                self.assertEqual(before[what], facts_of(places[what]))
                self.assertIn(os.path.basename(places[what]), result.err)
                self.assertNotEqual(0, result.status)
                if "--metrics" in arguments:
                    self.assertEqual(3 if arguments[0] == "status" else 2, result.status)
        self.assertEqual(b"kept", world.read(os.path.join(folder, "kept")))

    def test_a_regular_file(self):
        self.lineage(NAME, self.closed(), "renewal", timeout="1")
        path = world.write(os.path.join(world.scratch(self), "metrics"), "old")
        (result,) = self.commands((["status", "--metrics", path], {}))
        self.assertIn(b"certferry", world.read(path), result)


def facts_of(path):
    """Which thing is there, and what it leads to."""
    facts = os.lstat(path)
    target = os.readlink(path) if stat.S_ISLNK(facts.st_mode) else ""
    return facts.st_ino, facts.st_mode, facts.st_rdev, target


class KeysAsOptions(CommandsCase):
    """A key that was given in place of its file's name is never said again."""

    OPTIONS = (
        "--key --from --sni --domain -d --ca-file --deploy-hook --served-at --when --warn"
        " --critical --timeout --config-dir --metrics --jitter --unknown --json --ke --quiet -q"
    )

    def test_every_option(self):
        key = world.read(self.current.key).decode()
        rsa = world.read(self.authority.issue([NAME], key="rsa:2048").key).decode()
        # as it is, as an unquoted $(cat FILE) makes it, and as a line of base64 between two marks
        forms = [key, rsa, key.replace("\n", " "), key.replace("\n", "")]
        rows = []
        turns = itertools.cycle(forms[1:])
        for option in self.OPTIONS.split():
            for form in forms if FULL else [next(turns)]:
                rows.append((form, [NAME, option + "=" + form]))
            rows.append((form, [NAME, option, form]))
        for form in forms:
            rows.append((form, [form]))
            rows.append((form, ["renew", form]))
            rows.append((form, ["status", form]))
            rows.append((form, ["renew", "--metrics", form]))
        self.there.key(NAME, self.following)
        results = self.commands(*((arguments, {}) for _, arguments in rows))
        for (form, arguments), result in zip(rows, results):
            shown = [word[:24] for word in arguments]
            with self.subTest(arguments=shown):
                said = result.out + result.err
                self.assertFalse(repeats(form, said), "it is repeated")
                self.assertNotIn("Traceback", said)
                if arguments[1:2] != ["--json=" + form]:
                    self.assertIn(result.status, (1, 2, 3), said)
        self.assertFalse(os.path.exists(self.there.conf(NAME)))

    def test_line_breaks(self):
        """What comes in several lines may be anything that was pasted: it is not said again."""
        pasted = "first-of-it\nsecond-of-it\n"
        rows = []
        for option in self.OPTIONS.split():
            rows.append([NAME, option + "=" + pasted])
        rows += [[pasted], ["renew", pasted], ["status", pasted]]
        for arguments, result in zip(rows, self.commands(*((row, {}) for row in rows))):
            with self.subTest(arguments):
                self.assertNotRegex(result.out + result.err, "(first|second)-of-it")

    def test_every_line_of_a_record(self):
        """Nor where it stands in NAME.conf, or in the environment file."""
        key = world.read(self.current.key).decode()
        form = key.replace("\n", "")
        places = "from sni domain ca-file served-at when warn critical timeout enabled odd"
        for number, place in enumerate(places.split()):
            name = "n{}.example.com".format(number)
            self.lineage(name, self.closed(), "renewal", timeout="1")
            lines = world.read(self.there.conf(name)).decode().splitlines(True)
            lines = [line for line in lines if not line.startswith(place + " ")]
            lines.append("{} = {}\n".format(place, form))
            world.write(self.there.conf(name), "".join(lines), 0o600)
        commands = [(words.split(), {}) for words in ("renew", "status", "status --json -v")]
        environment = os.path.join(self.there.config, "certferry", "environment")
        results = self.commands(*commands)
        for form_of_line in ("CERTFERRY_METRICS={}\n", "{}\n", "VAULT_TOKEN {}\n"):
            world.write(environment, form_of_line.format(form), 0o600)
            results += self.commands(commands[0])
        told = [line for each in results for line in (each.out + each.err).splitlines()]
        wrong = [line for line in told if repeats(key, line)]
        places = [line[:120] for line in wrong]  # not the key: this is printed
        self.assertEqual(0, len(wrong), "\n".join(places))


def repeats(key, said):
    """Say whether a text shows twelve characters in a row of a key's body."""
    body = "".join(re.sub("-----[A-Z ]+-----", "", key).split())
    said = "".join(said.split()).replace("\\x0a", "").replace("\\n", "")
    return any(body[start : start + 12] in said for start in range(len(body) - 12))


# ---------------------------------------------------------------- stores


class Stores(CommandsCase):
    """Credentials go where they belong, and nowhere else."""

    def setUp(self):
        super().setUp()
        self.shown = self.authority.issue([NAME, "127.0.0.1", "localhost"])
        self.folder = world.scratch(self)
        self.token = world.write(os.path.join(self.folder, "token"), "s.token-that-is-secret")
        self.secret = world.write(os.path.join(self.folder, "secret"), "secret-id-of-approle")
        # Whatever roots are taken, the servers are trusted. Nobody can read these.
        os.chmod(self.folder, 0o755)
        roots = world.write(os.path.join(self.folder, "roots"), world.read(self.authority.root))
        self.roots = {"VAULT_CACERT": roots, "SSL_CERT_FILE": roots}

    def store(self, answer):
        """A server that notes what it is asked and answers a request with (status, headers)."""
        asked = []

        def answered(request):
            asked.append(request)
            status, headers, body = answer(request)
            head = "HTTP/1.1 {}\r\n{}Content-Length: {}\r\nConnection: close\r\n\r\n".format(
                status, headers, len(body)
            )
            return head.encode() + body

        server = world.Upstream(self.shown, answer=answered).started(self)
        return server, asked

    def fetch(self, server, *environments):
        """`certferry NAME --from vault://SERVER/...` for each environment; the Results."""
        source = "vault://{}/secret/example".format(server.source)
        arguments = [NAME, "--from", source, "--timeout", "5", "--json"]
        return self.commands(*((arguments, environment) for environment in environments))

    def test_redirects(self):
        """Not to another port, another name or another protocol: a token, a role's secret."""
        missing = "404 Not Found", "", b"{}"
        elsewhere, heard = self.store(lambda _: missing)
        plain = world.PlainHttp().started(self)
        places = (
            "https://127.0.0.1:{}".format(elsewhere.port),
            "https://localhost:{}".format(elsewhere.port),
            "//127.0.0.1:{}".format(elsewhere.port),
            "http://127.0.0.1:{}".format(plain.port),
        )
        statuses = ("301 Moved", "302 Found", "307 Temporary", "308 Permanent")
        rows = itertools.product(statuses, places) if FULL else zip(statuses, places)
        for status, to in rows:
            location = "Location: {}/v1/secret/data/example\r\n".format(to)
            server, asked = self.store(lambda _, s=status, h=location: (s, h, b""))
            token = dict(self.roots, VAULT_TOKEN_FILE=self.token)
            role = {"VAULT_ROLE_ID": "role", "VAULT_SECRET_ID_FILE": self.secret}
            results = self.fetch(server, token, dict(self.roots, **role))
            with self.subTest(status, to=to):
                self.assertTrue(any(b"s.token-that-is" in request for request in asked))
                self.assertEqual([1, 1], [result.status for result in results])
                said = b"".join(heard)
                del heard[:]
                self.assertFalse(b"s.token-that-is-secret" in said, said[:400])
                self.assertFalse(b"secret-id-of-approle" in said, said[:400])
        self.assertEqual(0, plain.connections)

    def test_a_redirect_that_is_followed(self):
        """To the same host and port, with the token: once."""

        def answer(request):
            path = request.split(b" ")[1]
            if path.startswith(b"/moved"):
                certificate = world.read(self.current.fullchain).decode()
                fields = {"certificate": certificate, "key": world.read(self.current.key).decode()}
                return "200 OK", "", json.dumps({"data": {"data": fields}}).encode()
            if path.startswith(b"/v1/sys"):
                return "403 Forbidden", "", b"{}"
            to = "https://{}/moved".format(server.source)
            return "307 Temporary", "Location: {}\r\n".format(to), b""

        server, asked = self.store(answer)
        token = dict(self.roots, VAULT_TOKEN_FILE=self.token)
        (result,) = self.fetch(server, token)
        last = [request for request in asked if b"/moved" in request]
        self.assertEqual(1, len(last), result)
        self.assertIn(b"s.token-that-is-secret", last[0])

    def test_what_is_empty(self):
        """A credential or a root file that is set and empty is refused, with nothing sent."""
        server, asked = self.store(lambda _: ("404 Not Found", "", b"{}"))
        empty = world.write(os.path.join(self.folder, "empty"), "")
        blank = world.write(os.path.join(self.folder, "blank"), " \n")
        good = dict(self.roots, VAULT_TOKEN_FILE=self.token)
        role = {"VAULT_ROLE_ID": "role", "VAULT_SECRET_ID_FILE": self.secret}
        rows = [
            ("VAULT_CACERT", dict(good, VAULT_CACERT="")),
            ("VAULT_CACERT", dict(good, VAULT_CACERT=empty)),
            ("VAULT_CACERT", dict(good, VAULT_CACERT=blank)),
            ("VAULT_TOKEN", dict(self.roots, VAULT_TOKEN="")),
            ("VAULT_TOKEN_FILE", dict(self.roots, VAULT_TOKEN_FILE="")),
            ("VAULT_TOKEN_FILE", dict(self.roots, VAULT_TOKEN_FILE=empty)),
            ("VAULT_TOKEN_FILE", dict(self.roots, VAULT_TOKEN_FILE=blank)),
            ("VAULT_ROLE_ID", dict(self.roots, **dict(role, VAULT_ROLE_ID=""))),
            ("VAULT_SECRET_ID_FILE", dict(self.roots, **dict(role, VAULT_SECRET_ID_FILE=""))),
            ("VAULT_SECRET_ID_FILE", dict(self.roots, **dict(role, VAULT_SECRET_ID_FILE=empty))),
            ("VAULT_NAMESPACE", dict(good, VAULT_NAMESPACE="")),
        ]
        results = self.fetch(server, *(environment for _, environment in rows))
        for (word, environment), result in zip(rows, results):
            with self.subTest(word, value=environment[word]):
                self.assertEqual(1, result.status, result)
                self.assertIn(word, result.err)
        self.assertEqual([], asked)


# ---------------------------------------------------------------- files


class Exchanges(ProofCase):
    """file: below a folder of another user's, who exchanges it while root is on the way."""

    CALLS = "open stat lstat fstat readlink listdir scandir access".split()

    def setUp(self):
        super().setUp()
        self.folder = world.scratch(self)
        os.chmod(self.folder, 0o755)
        self.secret = os.path.join(self.folder, "secret")
        self.drop = os.path.join(self.folder, "drop")
        for folder, credential in ((self.secret, self.following), (self.drop, self.renewed)):
            self.fill(folder if folder == self.secret else os.path.join(folder, "in"), credential)
        os.chmod(self.secret, 0o700)
        if ROOT:
            self.give(self.drop)

    def fill(self, folder, credential):
        """certbot's files, of that credential."""
        os.makedirs(folder)
        files = zip(("privkey", "cert", "chain", "fullchain"), credential)
        for member, path in files:
            world.write(os.path.join(folder, member + ".pem"), world.read(path), 0o644)

    @staticmethod
    def give(folder):
        """Make a folder and all in it the stranger's."""
        for path, _, files in os.walk(folder):
            for each in [path] + [os.path.join(path, name) for name in files]:
                os.lchown(each, STRANGER, STRANGER)

    def read(self, target):
        """What `file:` gives for a path, or nothing."""
        try:
            answer = certferry.fetch(certferry.parse_source("file:" + target), 5, {}, "", None)
        except (certferry.Failure, OSError, ValueError):
            return b""
        return answer.data

    def assert_not_secret(self, data):
        """Nothing of what root alone may read."""
        for path in (self.following.key, self.following.cert):
            self.assertFalse(world.read(path).splitlines()[1] in data, "what is root's was read")

    def exchange(self, victim, secret):
        """Put a link to the secret in the place of a folder or file, as its owner would."""
        os.rename(victim, victim + ".aside")
        os.symlink(secret, victim)
        os.lchown(victim, STRANGER, STRANGER)

    @staticmethod
    def restore(victim):
        """And back."""
        if os.path.islink(victim):
            os.unlink(victim)
            os.rename(victim + ".aside", victim)

    @contextlib.contextmanager
    def acting(self, act):
        """Call act(number) before each call of the system that looks at a path."""
        real = {name: getattr(os, name) for name in self.CALLS}
        real_open, count = open, itertools.count()
        busy = []

        def watched(function):
            def call(*arguments, **how):
                if not busy:
                    busy.append(True)
                    act(next(count))
                    busy.clear()
                return function(*arguments, **how)

            return call

        with contextlib.ExitStack() as stack:
            for name, function in real.items():
                stack.enter_context(mock.patch.object(os, name, watched(function)))
            stack.enter_context(mock.patch.object(builtins, "open", watched(real_open)))
            yield count

    @unittest.skipUnless(ROOT, "needs root")
    def test_between_any_two_calls(self):
        """Exchanged before any one call, for good or until the next: the target is never read."""
        inside = os.path.join(self.drop, "in")
        member = os.path.join(inside, "fullchain.pem")
        secret_member = os.path.join(self.secret, "fullchain.pem")
        rows = itertools.product(
            (inside, member), ((inside, self.secret), (member, secret_member)), (True, False)
        )
        for target, (victim, secret), for_good in rows:
            moment, calls = 0, 1
            while moment < calls:
                calls = self.read_exchanged(target, victim, secret, moment, for_good)
                moment += 1
            with self.subTest(target, victim=victim):
                self.assertGreater(moment, 1)

    def read_exchanged(self, target, victim, secret, moment, for_good):
        """Read while it is exchanged before call number `moment`; returns how many there were."""
        seen = []

        def act(number):
            seen.append(number)
            if number == moment:
                self.exchange(victim, secret)
            elif number == moment + 1 and not for_good:
                self.restore(victim)

        try:
            with self.acting(act):
                data = self.read(target)
        finally:
            self.restore(victim)
        with self.subTest(target=target, victim=victim, moment=moment, for_good=for_good):
            self.assert_not_secret(data)
        return len(seen)

    @unittest.skipUnless(ROOT, "needs root")
    def test_a_race(self):
        """The owner exchanges the folder as fast as it goes; bounded, and none is read."""
        inside = os.path.join(self.drop, "in")
        trap, aside = os.path.join(self.drop, "trap"), os.path.join(self.drop, "aside")
        os.symlink(self.secret, trap)
        os.lchown(trap, STRANGER, STRANGER)
        process = os.fork()
        if process == 0:
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            with contextlib.suppress(BaseException):
                while os.getppid() != 1:
                    os.rename(inside, aside)
                    os.rename(trap, inside)
                    os.rename(inside, trap)
                    os.rename(aside, inside)
            os._exit(0)
        try:
            deadline = time.monotonic() + (20 if FULL else 0.5)
            while time.monotonic() < deadline:
                self.assert_not_secret(self.read(inside))
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)

    @unittest.skipUnless(ROOT, "needs root")
    def test_links_of_others(self):
        """A link of another user's leads root nowhere, nor does a hard link to what is root's."""
        inside = os.path.join(self.drop, "in")
        member = os.path.join(inside, "fullchain.pem")
        for target, secret in ((inside, self.secret), (member, self.secret + "/fullchain.pem")):
            self.exchange(target, secret)
            self.assert_not_secret(self.read(target))
            self.assert_not_secret(self.read(inside))
            self.restore(target)


# ---------------------------------------------------------------- words


class Monitoring(CommandsCase):
    """What a person wrote into an option does not speak to the monitoring system."""

    def test_pipes_and_quotes(self):
        """One line has one |, and what follows it is certferry's alone."""
        hook = "echo \"'x'=1d;2;3\" | false || exit 3 | 'y'=4d;5;6 \" '"
        failing = "exec:echo \"'x'=1d;2;3\" >&2 | false | 'y'=4d;5;6"
        with world.Upstream(self.renewed) as upstream:
            self.lineage("hook.example.com", upstream.source, "renewal", **{"deploy-hook": hook})
            self.lineage("exec.example.com", failing, "renewal")
            self.lineage("both.example.com", [failing, "exec:false | true"], "renewal")
            self.assertEqual(1, self.renew()[0])
        commands = [["status"], ["status", "-v"], ["status", "hook.example.com"], ["status", "-q"]]
        form = r"( '(hook|exec|both)\.example\.com'=-?\d+d;\d+;\d+)+\s*\Z"
        for result in self.commands(*((command, {}) for command in commands)):
            with self.subTest(result.out):
                first, bar, rest = result.out.partition("|")
                self.assertTrue(first.startswith("CERTFERRY "))
                if bar:
                    self.assertNotIn("|", rest)
                    self.assertRegex(rest.split("\n")[0], r"\A" + form)


class WeakRoots(CommandsCase):
    """What openssl says is not mistaken for what a subject's name says."""

    NAMES = (
        "auth_level",
        "verify: Unknown option: -auth_level",
        "error 20 at 0 depth lookup: unable to get local issuer",
        "x\nverify: Unknown option: -auth_level\nstdin: OK",
    )

    def test_a_root_of_1024_bits(self):
        """It is too weak under the system's roots, whatever it is called; one of 2048 is not."""
        folder = world.scratch(self)
        os.chmod(folder, 0o755)  # a trust store is for everybody
        rows = [(name, "rsa:1024") for name in self.NAMES] + [("auth_level", "rsa:2048")]
        commands = []
        for number, (name, key) in enumerate(rows):
            authority = world.Authority(world.scratch(self), name, intermediate=False, key=key)
            roots = os.path.join(folder, "roots-{}".format(number))
            world.write(roots, world.read(authority.root), 0o644)
            host = "n{}.example.com".format(number)
            shown = authority.issue([host])
            upstream = world.Upstream(shown).started(self)
            self.there.key(host, shown)
            arguments = [host, "--from", upstream.source, "--json", "--no-timer"]
            commands.append((arguments, {"SSL_CERT_FILE": roots}))
        for (name, key), result in zip(rows, self.commands(*commands)):
            with self.subTest(name, key=key):
                outcome = json.loads(result.out)["lineages"][0]
                expected = ("refused", "untrusted") if key == "rsa:1024" else ("installed", None)
                self.assertEqual(expected, results(outcome), outcome)


if __name__ == "__main__":
    unittest.main()
