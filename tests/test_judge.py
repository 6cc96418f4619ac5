"""CONTRACT's table of reasons, in its order: the judge by itself, then offers through the command.

The offers of one table lie in files, one lineage each, and all are judged by one run.
"""

import base64
import collections
import json
import os
import re
import sys
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

NAME = "example.com"
DAY = world.DAY
LEAF, CA = world.LEAF, world.INTERMEDIATE

# --------------------------------------------------------------------------------------------------
# The judge by itself
# --------------------------------------------------------------------------------------------------

NOW = 1800000000
NOTHING = certferry.Certificate._make([b""] * len(certferry.Certificate._fields))
OURS, THEIRS = b"the key that is here", b"another key"


def leaf(begin=-1, end=89, names=(NAME,), der=None):
    """A Certificate that is valid from `begin` to `end`, in days from NOW; no two are the same."""
    leaf.count += 1
    return NOTHING._replace(
        der=der or b"leaf %d" % leaf.count,
        not_before=NOW + int(begin * DAY),
        not_after=NOW + int(end * DAY),
        issuer=b"\x06\x03\x55\x04\x03\x0c\x08Their CA",
        domains=tuple(names),
    )


leaf.count = 0
CURRENT = leaf(-30, 60)
NEWER = leaf()


def version(one, rolled_back=False):
    """A Version of the archive."""
    return certferry.Version(7, one, (), rolled_back)


def facts(**changes):
    """The Facts of an offer that is accepted, but for the changes."""
    given = {
        "name": NAME,
        "domains": (),
        "leaf": NEWER,
        "source": certferry.parse_source("up.example.net"),
        "current": CURRENT,
        "address": "192.0.2.1:443",
        "public_key": OURS,
        "accepted_keys": (OURS,),
        "our_key": OURS,
        "bring_key": "certferry example.com --key -",
        "force_command": "certferry renew example.com --force",
        "versions": [version(CURRENT)],
    }
    given.update(changes)
    return certferry.Facts(**given)


def reason(force=False, now=NOW, **changes):
    """The word of the verdict, None where the offer is accepted."""
    verdict = certferry.judge(facts(**changes), now, force, certferry.RULES)
    return verdict and verdict.reason


class Order(unittest.TestCase):
    """judge: the first rule that an offer breaks counts."""

    def test_good(self):
        """With and without a certificate in service, with -d, for the key that is here."""
        for name, changes in (
            ("the next", {}),
            ("the first", {"current": None, "versions": []}),
            ("what is in service", {"leaf": CURRENT}),
            ("with -d", {"domains": (NAME,)}),
            ("with its own key", {"public_key": THEIRS, "carried_key": THEIRS}),
            ("shorter", {"leaf": leaf(-1, 6)}),
            ("of the same second", {"leaf": leaf(-30, 60)}),
        ):
            with self.subTest(name):
                self.assertIsNone(reason(**changes))

    def test_one_by_one(self):
        """What breaks every rule from `older` on is mended rule by rule, in CONTRACT's order."""
        names = (NAME, "www.example.com")
        worst = leaf(-50, -10, ["example.net"])
        changes = {
            "leaf": worst,
            "current": CURRENT._replace(domains=names),
            "versions": [version(worst)],
            "public_key": THEIRS,
            "carried_key": b"a third key",
            "trust_flaw": ("no root", "Look"),
        }
        for expected, mended in (
            ("older", {}),
            ("key-mismatch", {"versions": []}),
            ("key-mismatch", {"carried_key": None}),
            ("names", {"public_key": OURS}),
            ("expired", {"leaf": worst._replace(domains=(NAME,))}),
            ("untrusted", {"leaf": leaf(-50, 10)}),
            ("older", {"trust_flaw": None}),
            ("names-lost", {"leaf": leaf(-20, 10)}),
            (None, {"leaf": leaf(-20, 10, names)}),
        ):
            changes.update(mended)
            with self.subTest(expected, mended=sorted(mended)):
                self.assertEqual(reason(**changes), expected)

    def test_rolled_back(self):
        """The leaf of a marked version stays out where it is newer than what is in service.

        It comes before all others; one that is not newer comes from a stale member of a pool.
        """
        worse = {"public_key": THEIRS, "trust_flaw": ("no root", "Look"), "domains": ("a.b",)}
        same, before = leaf(-30, 60), leaf(-40, 50)
        for one, marked, expected in (
            (NEWER, True, "rolled-back"),
            (NEWER, False, None),
            (same, True, "older"),
            (same, False, "older"),
            (before, True, "older"),
            (before, False, "older"),
            (CURRENT, True, None),
        ):
            with self.subTest(expected, begin=one.not_before, marked=marked):
                changes = {"leaf": one, "versions": [version(CURRENT), version(one, marked)]}
                self.assertEqual(reason(**changes), expected)
                if expected:
                    self.assertEqual(reason(**dict(worse, **changes)), expected)
        self.assertIsNone(reason(leaf=leaf(-0.5), versions=[version(NEWER, True)]))

    def test_force(self):
        """It takes what is older, loses names or was rolled back from, and nothing else."""
        old = leaf(-50, 50)
        lost = CURRENT._replace(domains=(NAME, "www.example.com"))
        for name, changes, expected in (
            ("rolled back", {"versions": [version(NEWER, True)]}, None),
            ("known", {"leaf": old, "versions": [version(old)]}, None),
            ("older", {"leaf": old}, None),
            ("fewer names", {"current": lost}, None),
            ("older and untrusted", {"leaf": old, "trust_flaw": ("no root", "")}, "untrusted"),
            ("known, another key", {"leaf": old, "public_key": THEIRS}, "key-mismatch"),
            ("names", {"domains": ("a.b",)}, "names"),
            ("expired", {"leaf": leaf(-9, -1)}, "expired"),
            ("not yet valid", {"leaf": leaf(1, 9)}, "not-yet-valid"),
        ):
            with self.subTest(name):
                self.assertEqual(reason(True, **changes), expected)
                self.assertIsNotNone(reason(False, **changes))

    def test_names(self):
        """-d is the whole requirement; without it NAME or *.NAME, either will do."""
        for names, domains, expected in (
            ([NAME], (), None),
            (["*.example.com"], (), None),
            (["www.example.com"], (), "names"),
            ([], (), "names"),
            (["*.example.com"], (NAME,), "names"),
            (["www.example.com"], ("www.example.com",), None),
            ([NAME], ("*.example.com",), "names"),
            (["*.example.com", NAME], ("*.example.com", NAME), None),
            ([NAME], (NAME, "example.net"), "names"),
            (["*.example.com"], ("a.b.example.com",), "names"),
            (["192.0.2.7", "2001:db8::7"], ("192.0.2.7", "2001:db8::7"), None),
            (["192.0.2.7"], ("192.0.2.8",), "names"),
        ):
            with self.subTest(names=names, domains=domains):
                found = reason(leaf=leaf(names=names), domains=domains, current=None)
                self.assertEqual(found, expected)
        wild = {"leaf": leaf(names=["*.example.com"]), "current": None}
        self.assertIsNone(reason(name="www.example.com", **wild))

    def test_names_lost(self):
        """What the current one covers must stay covered, unless -d says what is needed."""
        for before, after, expected in (
            ([NAME, "www.example.com"], [NAME], "names-lost"),
            ([NAME, "www.example.com"], [NAME, "*.example.com"], None),
            ([NAME, "*.example.com"], [NAME, "www.example.com"], "names-lost"),
            ([NAME], [NAME, "www.example.com"], None),
        ):
            with self.subTest(before=before, after=after):
                changes = {"current": leaf(-30, 60, before), "leaf": leaf(names=after)}
                self.assertEqual(reason(**changes), expected)
                self.assertIsNone(reason(domains=(NAME,), **changes))

    def test_dates(self):
        """The first and the last second count (RFC 5280, 4.1.2.5)."""
        for now, expected in (
            (NEWER.not_before - 1, "not-yet-valid"),
            (NEWER.not_before, None),
            (NEWER.not_after, None),
            (NEWER.not_after + 1, "expired"),
        ):
            self.assertEqual(reason(now=now), expected)

    def test_keys(self):
        """Accepted are those that are here; one that came along must fit, whatever is here."""
        for expected, changes in (
            (None, {"accepted_keys": (THEIRS, OURS)}),
            ("key-mismatch", {"accepted_keys": ()}),
            ("key-mismatch", {"public_key": THEIRS}),
            ("key-mismatch", {"carried_key": THEIRS}),
            (None, {"carried_key": OURS, "accepted_keys": ()}),
        ):
            with self.subTest(**changes):
                self.assertEqual(reason(**changes), expected)

    def test_what_another_key_means(self):
        """The likeliest failure of all: what is shown tells its cause, and what to do."""
        path = "/etc/letsencrypt/live/example.com/privkey-41ab.pem"
        given = {"given_key": (OURS, path)}
        for name, changes, words in (
            ("another host", {"leaf": leaf(names=["shop.example.org"])}, "shop.*--sni"),
            ("a wrong key given", given, "key that you gave.*rm " + path),
            ("a CDN", {"current": None}, "Their CA.*CDN.*--from.*--key -"),
            ("a new key", {}, "Their CA.*--key -.*reuse_key.*60 more days"),
        ):
            with self.subTest(name):
                verdict = certferry.judge(
                    facts(public_key=THEIRS, **changes), NOW, False, certferry.RULES
                )
                self.assertEqual(verdict.reason, "key-mismatch")
                self.assertRegex(f"{verdict} {verdict.hint}", words)
                self.assertIn("up.example.net:443", str(verdict))

    def test_words(self):
        """Each verdict says what is wrong and what to do; the clock is told where it matters."""
        old = leaf(-50, 50)
        lost = CURRENT._replace(domains=(NAME, "www.example.com"))
        for words, changes in (
            ("192.0.2.1.*renew example.com --force", {"leaf": old}),
            ("renew example.com --force", {"versions": [version(NEWER, True)]}),
            ("a.b.*--sni.*-d", {"domains": ("a.b",)}),
            (
                "expired certificate .from 20.* to 20.*the clock here says 2027",
                {"leaf": leaf(-9, -1)},
            ),
            ("not yet valid .*the clock here says 2027.*clock", {"leaf": leaf(1, 9)}),
            ("not trusted: no root.*Look", {"trust_flaw": ("no root", "Look")}),
            ("no longer covers www.example.com.*--force.*-d", {"current": lost}),
        ):
            with self.subTest(words):
                verdict = certferry.judge(facts(**changes), NOW, False, certferry.RULES)
                self.assertRegex(f"{verdict} {verdict.hint}", words)

    def test_in_service(self):
        """What is in service already is asked its names and dates alone, from four facts."""
        source = certferry.parse_source("up.example.net")
        for expected, domains, now in (
            (None, (), NOW),
            ("names", ("a.b",), NOW),
            ("names", ("a.b",), NOW - 99 * DAY),
            ("expired", (), NOW + 61 * DAY),
            ("not-yet-valid", (), NOW - 31 * DAY),
        ):
            with self.subTest(expected):
                few = certferry.Facts(NAME, domains, CURRENT, source)
                verdict = certferry.judge(few, now, False, certferry.RULES_IN_SERVICE)
                self.assertEqual(verdict and verdict.reason, expected)

    def test_graver(self):
        """Where several sources failed the gravest counts, the first of equal ones."""
        ranks = (
            ("key-mismatch",),
            ("names", "expired", "untrusted", "unproven", "malformed", "names-lost", "rehearsal"),
            ("unreachable", "timeout"),
            ("rolled-back",),
            ("older",),
        )
        failures = []
        for rank, words in enumerate(ranks):
            failures += [(rank, certferry.Failure(word, word)) for word in words]
        for rank, one in failures:
            self.assertIs(certferry.graver(None, one), one)
            for other_rank, other in failures:
                wanted = other if other_rank < rank else one
                self.assertIs(certferry.graver(one, other), wanted, f"{one} {other}")


# --------------------------------------------------------------------------------------------------
# Through the command
# --------------------------------------------------------------------------------------------------

Row = collections.namedtuple("Row", "name offer reason words key conf")
Row.__doc__ = "A lineage's label, its offer (bytes), what is expected, its key's path, its options."


def row(name, offer, reason=None, words=".", key=None, **conf):
    """A Row; offer is a Credential or bytes, words are alternatives parted by "|"."""
    if isinstance(offer, world.Credential):
        key = key or offer.key
        offer = world.read(offer.fullchain)
    return Row(name, offer, reason, words, key, conf)


def join(*paths):
    """The contents of files, one after the other."""
    return b"".join(map(world.read, paths))


def pem(der):
    """A certificate as PEM."""
    return b"-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n" % base64.encodebytes(der)


def lying_key(path):
    """A P-256 key file whose public half is that key's and whose secret half is another's."""
    parts = re.match(b"(-----BEGIN.*?-----\n)(.*)(-----END.*)", world.read(path), re.S)
    head, body, tail = parts.groups()
    before, mark, secret = base64.b64decode(body).partition(b"\x02\x01\x01\x04\x20")
    return head + base64.encodebytes(before + mark + b"\1" * 32 + secret[32:]) + tail


class JudgeCase(unittest.TestCase):
    """One authority for the class; expect() has a table judged."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())
        cls.good, cls.other = (cls.authority.issue([NAME]) for _ in range(2))

    def setUp(self):
        self.there = world.Downstream().started(self)
        self.offers = world.scratch(self)

    def issue(self, *names, **how):
        """A certificate, for NAME unless other names are given."""
        return self.authority.issue(names or [NAME], **how)

    def path(self, name):
        """A path among the offers."""
        return os.path.join(self.offers, name)

    def prepare(self, rows):
        """Write each row's key, offer and options."""
        os.makedirs(os.path.dirname(self.there.conf(NAME)), 0o700, exist_ok=True)
        for each in rows:
            lineage = self.lineage(each)
            offer = world.write(self.path(each.name), each.offer)
            options = {"from": "file:" + offer, "ca_file": self.authority.root, "domain": NAME}
            options.update(each.conf)
            text = ""
            for option, value in options.items():
                if value:
                    text += "{} = {}\n".format(option.replace("_", "-"), value)
            world.write(self.there.conf(lineage), text, 0o600)
            if each.key and not os.path.lexists(self.there.live(lineage, "privkey.pem")):
                self.there.key(lineage, each.key)

    @staticmethod
    def lineage(each):
        """The certificate name of a row."""
        return each.name + "." + NAME

    def run_all(self, **how):
        """What one run says: {lineage: its JSON object}, {lineage: its lines of problems}."""
        result = self.there.run("renew", "--json", **how)
        self.assertNotIn("Traceback", result.err)
        lines = collections.defaultdict(list)
        for line in result.err.splitlines():
            lines[line.split(": ")[1]].append(line)
        return {each["name"]: each for each in json.loads(result.out)["lineages"]}, lines

    def expect(self, rows, **how):
        """Have a table judged and compare; refused: one line that says it, and nothing written."""
        self.prepare(rows)
        found, lines = self.run_all(**how)
        for each in rows:
            with self.subTest(each.name):
                lineage = self.lineage(each)
                outcome = found[lineage]
                self.assertEqual(outcome["reason"], each.reason, outcome["detail"])
                self.check_words(each, outcome, lines[lineage])

    def check_words(self, each, outcome, lines):
        """The words of a refusal are in its detail and in its one line."""
        if each.reason is None:
            self.assertIn(outcome["result"], ("installed", "unchanged"))
            return
        failed = each.reason in ("unreachable", "timeout", "storage")
        self.assertEqual(outcome["result"], "failed" if failed else "refused")
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], r"\Acertferry: [^:]+: [ -~]+\Z")
        for text in (outcome["detail"], lines[0]):
            self.assertRegex(text, "(?i)" + each.words)
        self.assertFalse(os.path.lexists(self.there.live(self.lineage(each), ".current")))


class Reasons(JudgeCase):
    """Each row of the table that an offer meets, the first crossing of its lineage."""

    def test_before_any_offer(self):
        """Without a key no source is asked, but for one that may bring it; certbot's come first."""
        good = self.good
        silent = world.Silent().started(self)
        encrypted = self.path("encrypted.pem")
        world.openssl("pkey", "-in", good.key, "-aes128", "-passout", "pass:x", "-out", encrypted)
        cut = world.read(good.key)[:90] + b"\n-----END PRIVATE KEY-----\n"
        broken = world.write(self.path("broken.pem"), cut)
        text = world.write(self.path("text.pem"), b"hello\n")
        renewal = os.path.join(self.there.config, "renewal")
        os.mkdir(renewal)
        world.write(os.path.join(renewal, "certbot.example.com.conf"), "version = 2.1\n")
        tls = {"from": silent.source}
        self.expect(
            [
                row("no-key", b"", "no-key", "live/no-key.example.com/privkey.pem", **tls),
                row("no-key-came", join(good.fullchain), "no-key", "no private key"),
                row("encrypted", b"", "no-key", "privkey.pem.*encrypted", encrypted, **tls),
                row("broken", b"", "no-key", "privkey.pem.*openssl cannot read", broken, **tls),
                row("text", b"", "no-key", "privkey.pem.*no private key", text, **tls),
                row("certbot", b"", "certbot", "mv .*/renewal/certbot.example.com.conf", **tls),
            ]
        )
        self.assertEqual(silent.connections, 0)

    def test_nothing_given(self):
        """A file or command that gave nothing, and one that took too long."""
        good = self.good
        os.mkdir(self.path("empty"))
        rows = (
            ("missing", "file:/nonexistent", "unreachable", "no such file"),
            ("folder", "file:" + self.path("empty"), "unreachable", "fullchain.pem: no such file"),
            ("failing", "exec:exit 3", "unreachable", "status 3"),
            ("late", f"exec:cat {good.fullchain}; exit 7", "unreachable", "status 7"),
            ("mute", "exec:true", "unreachable", "nothing"),
            ("stuck", "exec:exec sleep 60", "timeout", "0.5 s"),
            ("accepted", f"exec:cat {good.fullchain}", None, "."),
        )
        table = []
        for name, source, word, words in rows:
            table.append(row(name, good, word, words, timeout="0.5", **{"from": source}))
        self.expect(table)

    def test_forms(self):
        """PEM in any order with what lies around it, DER, a folder: leaf and issuers are found."""
        good, other = self.good, self.other
        cert, issuer, root = map(world.read, (good.cert, good.chain, self.authority.root))
        direct = self.issue(issuer=self.authority.root_credential)
        os.mkdir(self.path("parts"))
        world.write(self.path("parts/fullchain.pem"), join(other.fullchain))
        world.write(self.path("parts/privkey.pem"), join(other.key))
        forms = {
            "reversed": issuer + cert,
            "root-first": root + issuer + cert,
            "twice": cert + issuer + cert + issuer,
            "lines": (cert + issuer).replace(b"\n", b"\r\n"),
            "words": b"s:/CN=x\n" + cert + b"\xff and\n" + issuer + b"...",
        }
        rows = [row(name, data, key=good.key) for name, data in forms.items()]
        folder = row("folder", other, key=good.key, **{"from": "file:" + self.path("parts")})
        self.expect(rows + [folder, row("der", world.certificates(direct.cert)[0], key=direct.key)])
        for each in rows:
            self.there.assert_fits(self, self.lineage(each), good)
        self.there.assert_fits(self, self.lineage(folder), other)

    def test_malformed(self):
        """No certificate, too much, one that cannot be read, two keys."""
        good = self.good
        der = world.certificates(good.cert)[0]
        many = b"".join(pem(der[:-1] + bytes([number])) for number in range(17))
        trusted = join(good.cert).replace(b" CERT", b" TRUSTED CERT")
        rows = (
            ("text", b"hello", "no certificate"),
            ("empty", b"", "no certificate"),
            ("key-only", join(good.key), "no certificate"),
            ("base64", join(good.cert).replace(b"MII", b"M!I", 1), "base64"),
            ("seventeen", many, "16 certificates"),
            ("megabyte", join(good.fullchain) + b"\n" * (1 << 20), "1 MiB|1048576"),
            ("cut", pem(der[:-7]), "."),
            ("more", pem(der + b"\0\0"), "."),
            ("bad-issuer", join(good.cert) + pem(b"\x30\x80\0\0"), "."),
            ("two-keys", join(good.fullchain, good.key, self.other.key), "more than one"),
            ("openssls-own", trusted + join(good.chain), "TRUSTED CERTIFICATE"),
        )
        table = [row(name, data, "malformed", words, good.key) for name, data, words in rows]
        self.expect(table)
        for each in table:  # it says which file
            self.assertIn(self.path(each.name), self.state(each))

    def state(self, each):
        """What is remembered of a row's lineage."""
        return world.read(self.there.state(self.lineage(each))).decode()

    def test_keys(self):
        """Which one must fit, as openssl says."""
        good, other = self.good, self.other
        rsa = self.issue(key="rsa:2048")
        misfit = join(good.fullchain, other.key)
        self.expect(
            [
                row("another", other, "key-mismatch", "another key", good.key),
                row("type", rsa, "key-mismatch", "RSA 2048.*ECDSA P-256", good.key),
                row("misfit", misfit, "key-mismatch", "does not fit", good.key),
                row("misfit-alone", misfit, "key-mismatch", "does not fit"),
                row("brought", join(good.fullchain, good.key)),
                row("brought-new", join(other.fullchain, other.key), key=good.key),
                row("ours", good),
            ]
        )

    def test_names_and_dates(self):
        """Required names, and the clock; a name that cannot count is as good as none."""
        nul = self.issue("wwwXexample.com", "example.net")
        der = world.certificates(nul.cert)[0].replace(b"wwwX", b"www\0")
        www = {"domain": "www.example.com"}
        past = {"not_before": world.days(-90), "not_after": world.days(-1)}
        no_san = LEAF.replace("subjectAltName", "issuerAltName")
        self.expect(
            [
                row("below", self.issue("*.below.example.com"), domain=None),
                row("neither", self.good, "names", "neither.example.com", domain=None),
                row("part", self.issue("w*.example.com", "example.net"), "names", **www),
                row("nul", pem(der), "names", "not for", nul.key, **www),
                row("no-san", self.issue(extensions=no_san), "names", "common name"),
                row("version-1", self.issue(extensions=""), "names", "alternative name"),
                row("expired", self.issue(**past), "expired", "expired certificate .from 20"),
                row("future", self.issue(not_before=world.days(1)), "not-yet-valid", "clock"),
            ]
        )

    def test_text_of_a_peer(self):
        """What a certificate says of itself is printed as ASCII on one line, and not all of it."""
        good = self.good
        subject = "/O=\x1b[31mred\nforged: installed\t" + "\u00e9" * 20
        issuer = self.issue(subject=subject, ca=True)
        many = ["%s%d.example.net" % ("x" * 50, number) for number in range(40)]
        self.expect(
            [
                row("issuer", self.issue(issuer=issuer), "key-mismatch", "another key", good.key),
                row("names", self.issue(*many), "names", "for xxx"),
            ]
        )
        found, lines = self.run_all()
        self.assertLess(max(map(len, lines["names.example.com"])), 800)

    def test_rehearsal(self):
        """A key file whose public half lies: servers would find out at their reload."""
        good = self.good
        path = world.write(self.path("lying.pem"), lying_key(good.key))
        liar = row("liar", good, "rehearsal", "handshake", path)
        self.prepare([liar])
        before = self.there.snapshot()
        self.expect([liar])
        after = self.there.snapshot()
        changed = world.changed(before, after)
        self.assertEqual([path for path in changed if "certferry" not in path], [])

    def test_storage(self):
        """A disk that takes nothing: here the limit of a file's size is zero."""
        shell = f'#!/bin/sh\nulimit -f 0\nexec {sys.executable} "$@"\n'
        python = world.write(self.path("python"), shell, 0o755)
        self.prepare([row("full", self.good)])
        outcome = self.run_all(python=python)[0]["full.example.com"]
        self.assertEqual((outcome["result"], outcome["reason"]), ("failed", "storage"))
        self.assertFalse(os.path.lexists(self.there.live("full.example.com", ".current")))


class Clients(JudgeCase):
    """What clients would refuse is refused; what they take is taken."""

    def test_leaf(self):
        """Usages and unknown extensions, under a private authority too."""
        usage = "digitalSignature,keyEncipherment"
        no_purpose = LEAF.replace("extendedKeyUsage = serverAuth\n", "")
        authority = "basicConstraints = critical,CA:TRUE\nsubjectAltName = {names}\n"
        unknown = LEAF + "1.2.3.4.5.6 = critical,DER:0500\n"
        rows = (
            ("eku", LEAF.replace("serverAuth", "clientAuth"), "leaf.*serverAuth"),
            ("eku-none", no_purpose, None),
            ("authority", authority, "leaf.*authority"),
            ("encipher", LEAF.replace(usage, "keyEncipherment"), "leaf.*digitalSignature"),
            ("unknown-critical", unknown, "leaf.*critical extension"),
            ("unknown", unknown.replace("critical,", ""), None),
        )
        table = []
        for name, extensions, words in rows:
            offer = self.issue(extensions=extensions, ca=name == "authority")
            table.append(row(name, offer, words and "untrusted", words or "."))
        self.expect(table)

    def test_algorithms(self):
        """Browsers' rules under the system's roots, which nobody can read."""
        os.chmod(self.offers, 0o755)
        roots = world.write(self.path("roots.pem"), join(self.authority.root), 0o644)
        table = [row("p-256", self.good, ca_file=None)]
        for name, how in {
            "p-224": {"key": "secp224r1"},
            "rsa-1024": {"key": "rsa:1024"},
            "sha-1": {"digest": "sha1"},
        }.items():
            offer = self.issue(**how)
            table.append(row(name, offer, "untrusted", "browsers refuse", ca_file=None))
        self.expect(table, env={"SSL_CERT_FILE": roots})
        os.chmod(roots, 0o600)
        closed = row("closed", self.good, "untrusted", "nobody.*" + roots, ca_file=None)
        if os.geteuid() == 0:
            self.expect([closed], env={"SSL_CERT_FILE": roots})

    def test_issuer(self):
        """Constraints, purposes and dates of the intermediates."""

        def under(subject, extensions=CA, **how):
            """A leaf under an intermediate of that kind."""
            root = self.authority.root_credential
            how.update(subject="/CN=" + subject, extensions=extensions, ca=True, issuer=root)
            return self.issue(issuer=self.authority.issue([], **how))

        elsewhere = CA + "nameConstraints = critical,permitted;DNS:example.net\n"
        lower = self.authority.issue([], subject="/CN=Lower", ca=True)
        no_authority = LEAF.replace("subjectAltName = {names}\n", "")
        no_sign = CA.replace("keyCertSign,", "")
        past = {"not_before": world.days(-9), "not_after": world.days(-1)}
        rows = (
            ("good", under("good"), None),
            ("pathlen", self.issue(issuer=lower), "path length"),
            ("elsewhere", under("elsewhere", elsewhere), "name constraints"),
            ("no-authority", under("no authority", no_authority), "issuer|no trusted root"),
            ("no-certsign", under("no certsign", no_sign), "issuer.*sign|no trusted root"),
            ("purpose", under("purpose", CA.replace("serverAuth,", "")), "issuer 1.*purpose"),
            ("expired", under("expired", **past), "expired|no trusted root"),
        )
        self.expect(
            row(name, offer, words and "untrusted", words or ".") for name, offer, words in rows
        )

    def expect(self, rows, **how):
        """Have a table judged, which may be written as a generator."""
        super().expect(list(rows), **how)

    def test_superfluous_issuer(self):
        """A bad certificate above a chain that reaches a trusted root condemns nothing."""
        older = world.Authority(world.scratch(self), name="Older Root")
        subject = "/O=Example/CN=Example Root"
        how = {"ca": True, "subject": subject, "key": self.authority.root_credential.key}
        how["issuer"] = older.root_credential
        past = {"not_before": world.days(-9), "not_after": world.days(-1)}
        good = self.good
        rows = {
            "sha-1": self.authority.issue([], digest="sha1", **how),
            "version-1": self.authority.issue([], extensions="", **how),
            "stranger": older.intermediate,
            "expired": self.authority.issue([], **dict(how, **past)),
        }
        table = []
        for name, above in rows.items():
            table.append(row(name, join(good.fullchain, above.cert), key=good.key))
        self.expect(table)
        for each in table:
            self.there.assert_fits(self, self.lineage(each), good)

    def test_trust(self):
        """Missing and wrong issuers, other roots, a --ca-file that holds no root."""
        good, authority = self.good, self.authority
        stranger = world.Authority(world.scratch(self), name="Stranger")
        impostor = world.Authority(world.scratch(self))  # of the same names, with other keys
        alone = LEAF.replace("authorityKeyIdentifier = keyid\n", "")
        broken = bytearray(world.certificates(good.cert)[0])
        broken[-1] ^= 1
        more = join(authority.intermediate.cert, stranger.root, authority.root)
        more = world.write(self.path("more.pem"), more)
        wrong = join(good.cert, stranger.intermediate.cert)
        damaged = pem(bytes(broken)) + join(good.chain)
        own = self.issue(issuer="self", extensions=alone)

        def refused(name, offer, words, **conf):
            """A row of an offer that is not trusted."""
            return row(name, offer, "untrusted", words, good.key, **conf)

        self.expect(
            [
                row("good", good),
                row("root-and-more", good, ca_file=more),
                refused("no-issuer", join(good.cert), "no trusted root|issuer"),
                refused("wrong-issuer", wrong, "no trusted root|issuer"),
                row("same-names", impostor.issue([NAME]), "untrusted", "root|signature"),
                refused("signature", damaged, "signature"),
                refused("other-root", good, "no trusted root.*--ca-file", ca_file=stranger.root),
                refused("system-store", good, "--ca-file|ca-certificates", ca_file=None),
                refused("no-root", good, "give the root", ca_file=authority.intermediate.cert),
                refused("leaf-as-root", good, "give the root", ca_file=good.cert),
                refused("no-file", good, "--ca-file /nonexistent", ca_file="/nonexistent"),
                refused(
                    "no-pem",
                    good,
                    "no certificate.*--ca-file|--ca-file.*no certificate",
                    ca_file=good.key,
                ),
                row("self-signed", own, "untrusted", "self-signed|no trusted root"),
            ]
        )

    @unittest.skipIf(os.geteuid(), "only root can give a file away")
    def test_whose_roots(self):
        """Who can change the --ca-file decides what is trusted: not everybody, no other user."""
        good = self.good
        table = []
        for name, folder_mode, file_mode, folder_owner, file_owner in (
            ("well", 0o755, 0o644, 0, 0),
            ("sticky", 0o1777, 0o644, 0, 0),
            ("folder-of-all", 0o777, 0o644, 0, 0),
            ("file-of-all", 0o755, 0o666, 0, 0),
            ("folder-of-another", 0o755, 0o644, 65534, 0),
            ("file-of-another", 0o755, 0o644, 0, 65534),
        ):
            folder = self.path("roots-" + name)
            os.mkdir(folder)
            path = world.write(folder + "/root.pem", join(self.authority.root), file_mode)
            os.chown(path, file_owner, file_owner)
            os.chown(folder, folder_owner, folder_owner)
            os.chmod(folder, folder_mode)
            if name in ("well", "sticky"):
                table.append(row(name, good, ca_file=path))
            else:
                words = "--ca-file.*install -m 644"
                table.append(row(name, good, "untrusted", words, ca_file=path))
        self.expect(table)


class Succession(JudgeCase):
    """What an offer must pass beside the certificate that is in service."""

    def setUp(self):
        super().setUp()
        self.first = self.issue(NAME, "www.example.com", not_before=world.days(-2))

    def next(self, *names, **how):
        """The next certificate for the same key."""
        return self.issue(*names or (NAME, "www.example.com"), key=self.first.key, **how)

    def begin(self, rows):
        """Install the first certificate in the lineages of these rows."""
        self.prepare([each._replace(offer=join(self.first.fullchain)) for each in rows])
        self.assertEqual(self.there.run("renew").status, 0)

    def follow(self, rows, shown=None):
        """Offer the rows' own; the refused ones must leave in service what is shown."""
        self.prepare(rows)
        found, lines = self.run_all()
        for each in rows:
            with self.subTest(each.name):
                lineage = self.lineage(each)
                outcome = found[lineage]
                self.assertEqual(outcome["reason"], each.reason, outcome["detail"])
                if each.reason:
                    self.assertRegex(outcome["detail"], each.words)
                    self.assertEqual(len(lines[lineage]), 1, lines)
                    self.there.assert_fits(self, lineage, shown or self.first)
                else:
                    offered = world.certificates(self.path(each.name))[0]
                    self.assertEqual(self.there.served_leaf(lineage), offered)

    def test_succession(self):
        """One renewal after the first certificate, of each kind."""
        old = {"not_before": world.days(-5)}
        other = self.issue(NAME, "www.example.com")
        lost = self.next("*.example.com")
        rows = [
            row("newer", self.next()),
            row("shorter", self.next(not_after=world.days(6))),
            row("older", self.next(**old), "older", "offers the certificate of 20.*older"),
            row("other-key", other, "key-mismatch", "reuse_key", self.first.key),
            row("www", lost, "names-lost", "no longer covers example.com", domain=None),
        ]
        self.begin(rows)
        self.follow(rows)

    def test_chains(self):
        """The same leaf with another chain is news, once for each of them."""
        root = self.authority.root_credential
        upper = self.authority.intermediate
        how = {"ca": True, "subject": "/O=Example/CN=Example Root Intermediate", "issuer": root}
        twin = self.authority.issue([], key=upper.key, **how)
        other = join(self.first.cert, twin.cert)
        self.begin([row("chain", self.first)])
        for offer, result in (
            (other, "installed"),
            (join(self.first.fullchain), "unchanged"),
            (other + join(root.cert), "unchanged"),
        ):
            self.prepare([row("chain", offer)])
            outcome = self.run_all()[0]["chain.example.com"]
            self.assertEqual(outcome["result"], result)
            chain = world.certificates(self.there.live("chain.example.com", "chain.pem"))
            self.assertEqual(chain, world.certificates(twin.cert))

    def test_going_back(self):
        """What was rolled back from stays out, with exit status 0, until there is a newer one.

        A key that was replaced is accepted under --force alone, or where it is brought; that of a
        version which was rolled back from is accepted, since a newer certificate for it is the way
        forward.
        """
        second = self.next()
        other = self.issue(NAME, "www.example.com", not_before=world.days(-1.5))
        rows = [row(name, self.first) for name in ("back", "key-back", "replaced", "brought")]
        self.begin(rows)
        for each in rows[1:]:
            self.there.key(self.lineage(each), other, "privkey-next.pem")
        self.prepare([each._replace(offer=join(other.fullchain)) for each in rows[1:]])
        self.prepare([row("back", second)])
        self.assertEqual(self.there.run("renew").status, 0)
        for name in ("back", "key-back"):
            self.assertEqual(self.there.run("rollback", name + ".example.com").status, 0)
        former, latter = self.next(), self.issue(NAME, "www.example.com", key=other.key)
        self.prepare([row("replaced", former), row("key-back", latter)])
        self.prepare([row("brought", join(former.fullchain, former.key))])
        found, _ = self.run_all()
        for name, result, word, shown in (
            ("back", "deferred", "rolled-back", self.first),
            ("key-back", "installed", None, latter),
            ("replaced", "refused", "key-mismatch", other),
            ("brought", "installed", None, former),
        ):
            with self.subTest(name):
                outcome = found[name + ".example.com"]
                self.assertEqual((outcome["result"], outcome["reason"]), (result, word))
                self.there.assert_fits(self, name + ".example.com", shown)
        names = ("replaced.example.com", "back.example.com")
        self.assertEqual(self.there.run("renew", *names, "--force").status, 0)
        self.there.assert_fits(self, "replaced.example.com", former)
        self.there.assert_fits(self, "back.example.com", second)


if __name__ == "__main__":
    unittest.main()
