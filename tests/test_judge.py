"""CONTRACT's table of reasons, row by row and in its order, and what browsers refuse.

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
from tests import world

NAME = "example.com"
LEAF, CA = world.LEAF, world.INTERMEDIATE

Row = collections.namedtuple("Row", "name offer reason words key conf")
Row.__doc__ = "A lineage's label, its offer (bytes), what is expected, its key's path, its options."


def row(name, offer, reason=None, words=".", key=None, **conf):
    """A Row; offer is a Credential or bytes, words are alternatives parted by "|"."""
    if isinstance(offer, world.Credential):
        key, offer = key or offer.key, world.read(offer.fullchain)
    return Row(name, offer, reason, words, key, conf)


def join(*paths):
    """The contents of files, one after the other."""
    return b"".join(map(world.read, paths))


def pem(der):
    """A certificate as PEM."""
    return (b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der)
            + b"-----END CERTIFICATE-----\n")


def lying_key(path):
    """A P-256 key file whose public half is that key's and whose secret half is another's."""
    head, body, tail = re.match(
        b"(-----BEGIN.*?-----\n)(.*)(-----END.*)", world.read(path), re.S).groups()
    before, mark, secret = base64.b64decode(body).partition(b"\x02\x01\x01\x04\x20")
    return head + base64.encodebytes(before + mark + b"\1" * 32 + secret[32:]) + tail


class JudgeCase(unittest.TestCase):
    """One authority for the class; expect() has a table judged."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())

    def setUp(self):
        self.there = world.Downstream().started(self)
        self.offers = world.scratch(self)

    def issue(self, *names, **how):
        """A certificate, for NAME unless other names are given."""
        return self.authority.issue(names or [NAME], **how)

    def prepare(self, rows):
        """Write each row's key, offer and options."""
        os.makedirs(os.path.dirname(self.there.conf(NAME)), 0o700, exist_ok=True)
        for each in rows:
            lineage = self.lineage(each)
            offer = world.write(os.path.join(self.offers, each.name), each.offer)
            options = {"from": "file:" + offer, "ca-file": self.authority.root, "domain": NAME}
            options.update((key.replace("_", "-"), value) for key, value in each.conf.items())
            options.pop("from-", None)
            world.write(self.there.conf(lineage), "".join(
                "{} = {}\n".format(*option) for option in options.items() if option[1]), 0o600)
            if each.key and not os.path.lexists(self.there.live(lineage, "privkey.pem")):
                self.there.key(lineage, each.key)

    @staticmethod
    def lineage(each):
        """The certificate name of a row."""
        return each.name + "." + NAME

    def run_all(self):
        """What one run says: {lineage: its JSON object}, {lineage: its lines of problems}."""
        result, lines = self.there.run("renew", "--json"), collections.defaultdict(list)
        self.assertNotIn("Traceback", result.err)
        for line in result.err.splitlines():
            lines[line.split(": ")[1]].append(line)
        return {each["name"]: each for each in json.loads(result.out)["lineages"]}, lines

    def expect(self, rows):
        """Have a table judged and compare; refused: one line that says it, and nothing written."""
        self.prepare(rows)
        found, lines = self.run_all()
        for each in rows:
            with self.subTest(each.name):
                lineage = self.lineage(each)
                outcome = found[lineage]
                self.assertEqual(each.reason, outcome["reason"], outcome["detail"])
                self.check_words(each, outcome, lines[lineage])

    def check_words(self, each, outcome, lines):
        """The words of a refusal are in its detail and in its one line."""
        if each.reason is None:
            self.assertIn(outcome["result"], ("installed", "unchanged"))
            return
        refused = each.reason not in ("unreachable", "timeout", "storage")
        self.assertEqual("refused" if refused else "failed", outcome["result"])
        self.assertEqual(1, len(lines), lines)
        self.assertRegex(lines[0], r"\Acertferry: [^:]+: [ -~]+: [ -~]+\Z")
        for text in (outcome["detail"], lines[0]):
            self.assertRegex(text, "(?i)" + each.words)
        self.assertFalse(os.path.lexists(self.there.live(self.lineage(each), ".current")))


class Reasons(JudgeCase):
    """Each row of the table that an offer meets, the first crossing of its lineage."""

    def test_before_any_offer(self):
        good = self.issue()
        silent = world.Silent().started(self)
        encrypted = os.path.join(self.offers, "encrypted.pem")
        world.openssl("pkey", "-in", good.key, "-aes128", "-passout", "pass:x", "-out", encrypted)
        broken = world.write(os.path.join(self.offers, "broken.pem"),
                             world.read(good.key)[:90] + b"\n-----END PRIVATE KEY-----\n")
        text = world.write(os.path.join(self.offers, "text.pem"), b"hello\n")
        tls = {"from": silent.source}
        self.expect([
            row("no-key", b"", "no-key", "live/no-key.example.com.*privkey.pem", **tls),
            row("no-key-offered", join(good.fullchain), "no-key", "no private key"),
            row("encrypted", b"", "no-key", "privkey.pem.*encrypted", key=encrypted, **tls),
            row("broken", b"", "no-key", "privkey.pem.*openssl cannot read", key=broken, **tls),
            row("text", b"", "no-key", "privkey.pem.*no private key", key=text, **tls)])
        self.assertEqual(0, silent.connections)

    def test_certbot(self):
        """A lineage of certbot's, even where the key lacks too."""
        os.makedirs(os.path.join(self.there.config, "renewal"))
        world.write(os.path.join(self.there.config, "renewal", "certbot." + NAME + ".conf"),
                    "version = 2.1\n")
        self.expect([row("certbot", b"", "certbot", "mv .*/renewal/certbot.example.com.conf away")])

    def test_nothing_given(self):
        good = self.issue()
        empty = os.path.join(self.offers, "empty")
        os.mkdir(empty)
        self.expect([
            row("missing", good, "unreachable", "no such file", **{"from": "file:/nonexistent"}),
            row("folder", good, "unreachable", "fullchain.pem: no such file",
                **{"from": "file:" + empty}),
            row("failing", good, "unreachable", "status 3", **{"from": "exec:exit 3"}),
            row("failing-late", good, "unreachable", "status 7",
                **{"from": "exec:cat %s; exit 7" % good.fullchain}),
            row("mute", good, "unreachable", "nothing", **{"from": "exec:true"}),
            row("stuck", good, "timeout", "1 s", timeout="1", **{"from": "exec:exec sleep 60"}),
            row("accepted", good, **{"from": "exec:cat %s" % good.fullchain})])

    def test_forms(self):
        """PEM in any order with what lies around it, DER, a folder: leaf and issuers are found."""
        good, other = self.issue(), self.issue()
        leaf, issuer, root = map(world.read, (good.cert, good.chain, self.authority.root))
        direct = self.authority.issue([NAME], issuer=self.authority.root_credential)
        folder = os.path.join(self.offers, "directory")
        os.mkdir(folder)
        for name in ("fullchain.pem", "privkey.pem"):
            world.write(os.path.join(folder, name),
                        world.read(getattr(other, name[:-4].replace("privkey", "key"))))
        rows = [row("reversed", issuer + leaf, key=good.key),
                row("root-first", root + issuer + leaf, key=good.key),
                row("twice", leaf + issuer + leaf + issuer, key=good.key),
                row("lines", (leaf + issuer).replace(b"\n", b"\r\n"), key=good.key),
                row("words", b"s:/CN=x\n" + leaf + b"\xff and\n" + issuer + b"...", key=good.key),
                row("folder", other, key=good.key, **{"from": "file:" + folder})]
        self.expect(rows + [
            row("der", world.certificates(direct.cert)[0], key=direct.key)])
        for each in rows[:5]:
            self.there.assert_fits(self, self.lineage(each), good)
        self.there.assert_fits(self, "folder." + NAME, other)

    def test_text_of_a_peer(self):
        """What a certificate says of itself is printed as ASCII on one line."""
        good = self.issue()
        issuer = self.issue(subject="/O=\x1b[31mred\nforged: installed\t" + "\u00e9" * 20, ca=True)
        self.expect([
            row("issuer", self.issue(issuer=issuer), "key-mismatch", "another key", good.key),
            row("names", self.issue(*("%s%d.example.net" % ("x" * 50, n) for n in range(40))),
                "names", "for xxx")])

    def test_malformed(self):
        good = self.issue()
        der = world.certificates(good.cert)[0]
        self.expect([
            row("text", b"hello", "malformed", "no certificate", good.key),
            row("empty", b"", "malformed", "no certificate", good.key),
            row("key-only", join(good.key), "malformed", "no certificate", good.key),
            row("base64", join(good.cert).replace(b"MII", b"M!I"), "malformed", "base64", good.key),
            row("seventeen", b"".join(pem(der[:-1] + bytes([n])) for n in range(17)), "malformed",
                "16 certificates", good.key),
            row("megabyte", join(good.fullchain) + b"\n" * (1 << 20), "malformed", "1 MiB|1048576",
                good.key),
            row("cut", pem(der[:-7]), "malformed", "strict DER", good.key),
            row("more", pem(der + b"\0\0"), "malformed", "strict DER", good.key),
            row("bad-issuer", join(good.cert) + pem(b"\x30\x80\0\0"), "malformed", "strict DER",
                good.key),
            row("two-keys", join(good.fullchain, good.key, self.issue().key), "malformed",
                "more than one private key", good.key)])

    def test_keys(self):
        good, other = self.issue(), self.issue()
        self.expect([
            row("another", other, "key-mismatch", "another key", good.key),
            row("another-type", self.issue(key="rsa:2048"), "key-mismatch",
                "RSA 2048.*ECDSA P-256", good.key),
            row("misfit", join(good.fullchain, other.key), "key-mismatch", "does not fit",
                good.key),
            row("misfit-without-own", join(good.fullchain, other.key), "key-mismatch",
                "does not fit"),
            row("brought", join(good.fullchain, good.key)),
            row("brought-new", join(other.fullchain, other.key), key=good.key),
            row("own", good)])

    def test_names(self):
        wild = self.issue("*.example.com", NAME)
        self.expect([
            row("covered", self.issue("covered.example.com"), domain=None),
            row("below", self.issue("*.below.example.com"), domain=None),
            row("above", wild, domain=None),
            row("neither", self.issue(), "names", "neither.example.com", domain=None),
            row("wildcard-missing", self.issue(), "names", r"\*\.example\.com",
                domain="*.example.com"),
            row("wildcard-there", wild, domain="*.example.com"),
            row("one-of-two", self.issue(), "names", "example.net",
                domain="\n    example.com\n    example.net"),
            row("two-labels", self.issue("*.example.com"), "names", "a.b.example.com",
                domain="a.b.example.com"),
            row("address", self.issue("192.0.2.7", "2001:db8::7"),
                domain="\n    192.0.2.7\n    2001:db8::7"),
            row("other-address", self.issue("192.0.2.7"), "names", "192.0.2.8",
                domain="192.0.2.8"),
            row("idn", self.issue("xn--bcher-kva.example.com"),
                domain="xn--bcher-kva.example.com")])

    def test_dates(self):
        day = world.days
        self.expect([
            row("expired", self.issue(not_before=day(-90), not_after=day(-1)), "expired",
                "expired .from 20.* to 20.*renew it"),
            row("future", self.issue(not_before=day(1)), "not-yet-valid", "not yet valid .*clock")])

    def test_first_reason_counts(self):
        """An offer that breaks several rules is refused by the first in the table."""
        past = {"not_before": world.days(-90), "not_after": world.days(-1)}
        stranger = world.Authority(world.scratch(self), name="Stranger")
        good = self.issue()
        wrong = stranger.issue(["example.net"], **past)
        self.expect([
            row("malformed", pem(b"\x30\0") + join(wrong.fullchain), "malformed", ".", good.key),
            row("key", wrong, "key-mismatch", "another key", good.key),
            row("names", wrong, "names", "not for example.com"),
            row("expired", stranger.issue([NAME], **past), "expired"),
            row("future", stranger.issue([NAME], not_before=world.days(1)), "not-yet-valid"),
            row("untrusted", stranger.issue([NAME]), "untrusted", "no trusted root")])

    def test_rehearsal(self):
        """A key file whose public half lies: servers would find out at their reload."""
        good = self.issue()
        path = world.write(os.path.join(self.offers, "lying.pem"), lying_key(good.key))
        self.prepare([row("liar", good, key=path)])
        before = self.there.snapshot()
        status, document = self.there.json("renew")
        self.assertEqual((1, "refused", "rehearsal"), (
            status, document["lineages"][0]["result"], document["lineages"][0]["reason"]))
        self.assertEqual(before["live/liar.example.com"],
                         self.there.snapshot()["live/liar.example.com"])

    def test_storage(self):
        """A disk that takes nothing: here the limit of a file's size is zero."""
        self.prepare([row("full", self.issue())])
        shell = world.write(os.path.join(self.offers, "python"), "#!/bin/sh\nulimit -f 0\n"
                            "exec {} \"$@\"\n".format(sys.executable), 0o755)
        status, document = self.there.json("renew", python=shell)
        self.assertEqual((1, "failed", "storage"), (
            status, document["lineages"][0]["result"], document["lineages"][0]["reason"]))
        self.assertFalse(os.path.lexists(self.there.live("full." + NAME, ".current")))


class Browsers(JudgeCase):
    """What browsers refuse is refused, with --ca-file too; what they take is taken."""

    def test_leaf(self):
        usage = "digitalSignature,keyEncipherment"
        authority_leaf = "basicConstraints = critical,CA:TRUE\nsubjectAltName = {names}\n"
        unknown = LEAF + "1.2.3.4.5.6 = critical,DER:0500\n"
        self.expect([
            row("no-san", self.issue(extensions=LEAF.replace("subjectAltName", "issuerAltName")),
                "names", "subject alternative name.*common name"),
            row("version-1", self.issue(extensions=""), "names", "subject alternative name"),
            row("eku", self.issue(extensions=LEAF.replace("serverAuth", "clientAuth")),
                "untrusted", "leaf.*serverAuth"),
            row("eku-any", self.issue(extensions=LEAF.replace("serverAuth", "anyExtendedKeyUsage")),
                "untrusted", "leaf.*serverAuth"),
            row("eku-none", self.issue(extensions=LEAF.replace(
                "extendedKeyUsage = serverAuth\n", ""))),
            row("authority", self.issue(ca=True, extensions=authority_leaf), "untrusted",
                "leaf.*authority"),
            row("keycertsign", self.issue(extensions=LEAF.replace(usage, usage + ",keyCertSign")),
                "untrusted", "leaf.*sign certificates"),
            row("rsa-1024", self.issue(key="rsa:1024"), "untrusted", "leaf.*RSA 1024"),
            row("p-224", self.issue(key="secp224r1"), "untrusted", "leaf.*(key|curve)"),
            row("k1", self.issue(key="secp256k1"), "untrusted", "leaf.*(key|curve)"),
            row("sha-1", self.issue(digest="sha1"), "untrusted", "leaf.*SHA-1"),
            row("unknown-critical", self.issue(extensions=unknown), "untrusted",
                "leaf.*critical extension"),
            row("unknown", self.issue(extensions=unknown.replace("critical,", ""))),
            row("p-384", self.issue(key="P-384")), row("rsa-2048", self.issue(key="rsa:2048"))])

    def test_md5(self):
        rsa = world.Authority(world.scratch(self), intermediate=False, key="rsa:2048")
        self.expect([
            row("md5", rsa.issue([NAME], digest="md5"), "untrusted", "leaf.*MD5",
                ca_file=rsa.root),
            row("sha-1", rsa.issue([NAME], digest="sha1"), "untrusted", "leaf.*SHA-1",
                ca_file=rsa.root),
            row("sha-256", rsa.issue([NAME], digest="sha256"), ca_file=rsa.root)])

    def test_wildcards_and_odd_names(self):
        """A name that cannot count is as good as none: what is required is not covered."""
        nul = self.issue("wwwXexample.com", "example.net")
        der = world.certificates(nul.cert)[0].replace(b"wwwX", b"www\0")
        www = {"domain": "www.example.com"}
        rows = [row("part-%d" % number, self.issue(name, "example.net"), "names",
                    "not for .*example", **www)
                for number, name in enumerate((
                    "w*.example.com", "*w.example.com", "*ww.example.com", "www.*.com", "*.*.com",
                    "*"))]
        self.expect(rows + [
            row("top", self.issue("*.com", "example.net"), "names", "not for example.com"),
            row("nul", pem(der), "names", "not for", nul.key, **www),
            row("alphabet", self.issue("example.net", "www .example.com"), "names", **www),
            row("uri", self.issue("example.net", "URI:https://www.example.com/"), "names", **www),
            row("address-as-name", self.issue("example.net", "DNS:192.0.2.1"), "names",
                domain="192.0.2.1")])

    def test_issuer(self):
        def under(subject, leaf=LEAF, **how):
            """A leaf under an intermediate of that kind."""
            issuer = self.authority.issue([], subject="/CN=" + subject,
                                          issuer=self.authority.root_credential,
                                          **dict({"ca": True}, **how))
            return self.issue(issuer=issuer, extensions=leaf)

        permitted = CA + "nameConstraints = critical,permitted;DNS:{}\n"
        excluded = CA + "nameConstraints = critical,excluded;DNS:example.com\n"
        lower = self.authority.issue([], subject="/CN=Lower", ca=True)
        no_authority = LEAF.replace("subjectAltName = {names}\n", "")
        self.expect([
            row("good", under("good")),
            row("pathlen", self.authority.issue([NAME], issuer=lower), "untrusted", "path length"),
            row("permitted", under("permitted", extensions=permitted.format(NAME))),
            row("not-permitted", under("not permitted", extensions=permitted.format("example.net")),
                "untrusted", "name constraints"),
            row("excluded", under("excluded", extensions=excluded), "untrusted",
                "name constraints"),
            row("no-authority", under("no authority", extensions=no_authority), "untrusted",
                "issuer 1.*(authority|sign)"),
            row("no-certsign", under("no certsign", extensions=CA.replace("keyCertSign,", "")),
                "untrusted", "issuer 1.*sign"),
            row("purpose", under("purpose", extensions=CA.replace("serverAuth,", "")), "untrusted",
                "issuer 1.*serverAuth"),
            row("version-1", under("version 1", extensions="", leaf=LEAF.replace(
                "authorityKeyIdentifier = keyid\n", "")), "untrusted", "issuer 1.*version 1"),
            row("weak", under("weak", key="rsa:1024"), "untrusted", "issuer 1.*RSA 1024"),
            row("sha-1", under("sha-1", digest="sha1"), "untrusted", "issuer 1.*SHA-1"),
            row("unknown", under("unknown", extensions=CA + "1.2.3.4 = critical,DER:0500\n"),
                "untrusted", "critical extension"),
            row("expired", under("expired", not_after=world.days(-1), not_before=world.days(-9)),
                "untrusted", "issuer 1.*expired"),
            row("future", under("future", not_before=world.days(1)), "untrusted",
                "issuer 1.*not yet valid")])

    def test_trust(self):
        good, authority = self.issue(), self.authority
        stranger = world.Authority(world.scratch(self), name="Stranger")
        impostor = world.Authority(world.scratch(self))  # of the same names, with other keys
        own = authority.issue([NAME], issuer="self", ca=True,
                              extensions=CA.replace("authorityKeyIdentifier = keyid\n", "")
                              + "subjectAltName = {names}\n")
        alone = authority.issue([NAME], issuer="self", extensions=LEAF.replace(
            "authorityKeyIdentifier = keyid\n", ""))
        broken = bytearray(world.certificates(good.cert)[0])
        broken[-1] ^= 1
        self.expect([
            row("good", good),
            row("no-issuer", join(good.cert), "untrusted", "issuer.*fullchain", good.key),
            row("wrong-issuer", join(good.cert, stranger.intermediate.cert), "untrusted",
                "issuer.*fullchain", good.key),
            row("same-names", impostor.issue([NAME]), "untrusted", "no trusted root|signature"),
            row("signature", pem(bytes(broken)) + join(good.chain), "untrusted", "signature",
                good.key),
            row("other-root", good, "untrusted", "no trusted root|another authority",
                ca_file=stranger.root),
            row("system-store", good, "untrusted", "--ca-file|ca-certificates", ca_file=None),
            row("intermediate-as-root", good, "untrusted", "give the root",
                ca_file=authority.intermediate.cert),
            row("self-signed-authority", own, "untrusted", "authority", ca_file=own.cert),
            row("self-signed", alone, "untrusted", "self-signed"),
            row("leaf-as-root", good, "untrusted", "give the root", ca_file=good.cert),
            row("missing-ca-file", good, "untrusted", "--ca-file /nonexistent",
                ca_file="/nonexistent"),
            row("root-and-more", good, ca_file=world.write(
                os.path.join(self.offers, "more.pem"), join(
                    authority.intermediate.cert, stranger.root, authority.root))),
            row("two-roots", good, ca_file=world.write(os.path.join(self.offers, "roots.pem"), join(
                stranger.root, authority.root)))])

    def test_must_staple(self):
        """Accepted, with one line of warning."""
        self.prepare([row("staple", self.issue(extensions=LEAF + "tlsfeature = status_request\n"))])
        result = self.there.run("renew")
        self.assertEqual(0, result.status, result)
        self.assertEqual(1, len(result.err.splitlines()), result.err)
        self.assertRegex(result.err, "(?i)certferry: staple.example.com: .*stapl")


class Succession(JudgeCase):
    """What an offer must pass beside the certificate that is in service."""

    def setUp(self):
        super().setUp()
        self.first = self.issue(NAME, "www.example.com")

    def next(self, *names, **how):
        """The next certificate for the same key."""
        return self.issue(*names or (NAME, "www.example.com"), key=self.first.key, **how)

    def begin(self, *rows):
        """Install the first certificate in the lineages of these rows."""
        self.prepare([each._replace(offer=join(self.first.fullchain)) for each in rows])
        self.assertEqual(0, self.there.run("renew").status)

    def follow(self, *rows):
        """Offer the rows' own; the refused ones must leave the first in service."""
        self.prepare(rows)
        found, lines = self.run_all()
        for each in rows:
            with self.subTest(each.name):
                lineage = self.lineage(each)
                outcome = found[lineage]
                self.assertEqual(each.reason, outcome["reason"], outcome["detail"])
                if each.reason:
                    self.assertRegex(outcome["detail"], each.words)
                    self.assertEqual(1, len(lines[lineage]), lines)
                    self.there.assert_fits(self, lineage, self.first)
                else:
                    self.assertEqual(world.certificates(os.path.join(self.offers, each.name))[0],
                                     self.there.served_leaf(lineage))

    def test_succession(self):
        old = {"not_before": world.days(-5)}
        stranger = world.Authority(world.scratch(self), name="Stranger")
        none = {"domain": None}
        rows = [
            row("newer", self.next()), row("same", self.first),
            row("shorter", self.next(not_after=world.days(6))),
            row("older", self.next(**old), "older", "offers the certificate of 20.*older"),
            row("older-but-longer", self.next(not_after=world.days(300), **old), "older"),
            row("other-key", self.issue(NAME, "www.example.com"), "key-mismatch", "reuse-key",
                key=self.first.key),
            row("untrusted-and-older", stranger.issue([NAME], key=self.first.key, **old),
                "untrusted"),
            row("names-and-older", self.next("example.net", **old), "names"),
            row("expired-and-older", self.next(not_before=world.days(-9), not_after=world.days(-1)),
                "expired"),
            row("fewer-but-d", self.next(NAME))]
        wild = [
            row("lost", self.next("*.example.com"), "names-lost", r"no longer covers example\.com",
                **none),
            row("lost-and-older", self.next("*.example.com", **old), "older", **none),
            row("wider", self.next("*.example.com", NAME), **none)]
        self.first = self.next("*.example.com", NAME, "www.example.com", not_before=world.days(-2))
        self.begin(*rows + wild)
        self.follow(*rows + wild)

    def test_equal_begin(self):
        """Of the same second only a leaf that was already replaced is older."""
        moment = world.days(-2)
        self.first = self.next(not_before=moment)
        second = self.next(not_before=moment)
        begun = row("twin", second)
        self.begin(begun)
        self.follow(begun)
        replaced, self.first = self.first, second
        self.follow(row("twin", replaced, "older"))

    def test_rolled_back(self):
        """It stays out, with exit status 0, until there is a newer one or --force."""
        second, third = self.next(), self.next()
        for offer in (self.first, second):
            self.prepare([row("back", offer)])
            self.assertEqual(0, self.there.run("renew").status)
        name = "back." + NAME
        self.assertEqual(0, self.there.run("rollback", name).status)
        status, document = self.there.json("renew")
        self.assertEqual((0, "deferred", "rolled-back"), (
            status, document["lineages"][0]["result"], document["lineages"][0]["reason"]))
        self.there.assert_fits(self, name, self.first)
        self.prepare([row("back", third)])
        self.assertEqual(0, self.there.run("renew").status)
        self.there.assert_fits(self, name, third)

    def test_key_rolled_back_from(self):
        """An offer for it is judged like any other before it is one that was rolled back."""
        second, stranger = self.issue(), world.Authority(world.scratch(self), name="Stranger")
        own, new = {"key": second.key}, {"key": self.first.key}
        rows = [
            row("good", self.issue(**own), "rolled-back", **new),
            row("expired", self.issue(not_before=world.days(-90), not_after=world.days(-1), **own),
                "expired", **new),
            row("names", self.issue("example.net", **own), "names", **new),
            row("untrusted", stranger.issue([NAME], **own), "untrusted", **new)]
        self.begin(*rows)
        for each in rows:
            self.there.key(self.lineage(each), second, "privkey-next.pem")
        self.prepare([each._replace(offer=join(second.fullchain)) for each in rows])
        self.assertEqual(0, self.there.run("renew").status)
        for each in rows:
            self.assertEqual(0, self.there.run("rollback", self.lineage(each)).status)
        self.follow(*rows)
        self.assertEqual("deferred", self.run_all()[0]["good." + NAME]["result"])

    def test_force(self):
        """--force takes what is older, loses names or was rolled back from, and nothing else."""
        stranger = world.Authority(world.scratch(self), name="Stranger")
        old = {"not_before": world.days(-5)}
        self.first = self.next("force.example.com", "www.example.com")
        self.begin(row("force", self.first, domain=None))
        for offer, reason in ((stranger.issue(["force.example.com"], key=self.first.key),
                               "untrusted"), (self.next("force.example.com", **old), None)):
            self.prepare([row("force", offer, domain=None)])
            document = self.there.json("renew", "force." + NAME, "--force")[1]
            self.assertEqual(reason, document["lineages"][0]["reason"])

    def test_retired_key(self):
        """The key that a staged one replaced is not accepted again, even when it is brought."""
        other = self.issue()
        self.begin(row("retired", self.first))
        self.there.key("retired." + NAME, other, "privkey-next.pem")
        self.prepare([row("retired", other)])
        self.assertEqual(0, self.there.run("renew").status)
        self.first, former = other, self.next()
        self.follow(row("retired", former, "key-mismatch", "retired|another key"),)
        self.follow(row("retired", join(former.fullchain, former.key), "key-mismatch", "retired"))

    def test_after_the_deploy(self):
        """A hook that fails: installed, and pending."""
        self.prepare([row("hook", self.first, **{"deploy-hook": "exit 3"})])
        status, document = self.there.json("renew")
        outcome = document["lineages"][0]
        self.assertEqual((1, "pending", "hook"), (status, outcome["result"], outcome["reason"]))
        self.assertIn("status 3", outcome["detail"])
        self.there.assert_fits(self, "hook." + NAME, self.first)


if __name__ == "__main__":
    unittest.main()
