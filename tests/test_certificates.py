"""Bytes to facts: the DER and PEM readers, names, chains, flaws, and whatever bytes may come.

CERTFERRY_SWEEP=full tries 10,000 mutations in place of some thousand, and asks openssl each time.
"""

import json
import os
import random
import sys
import time
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

try:
    import cryptography_vectors
except ImportError:
    cryptography_vectors = None

FULL = os.environ.get("CERTFERRY_SWEEP") == "full"
REASONS = ("unproven malformed key-mismatch names expired not-yet-valid untrusted older names-lost "
           "rolled-back").split()


def element(tag, *contents):
    """A DER element with the shortest length, of bytes and other elements."""
    body = b"".join(contents)
    if len(body) < 128:
        return bytes([tag, len(body)]) + body
    size = (len(body).bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + len(body).to_bytes(size, "big") + body


def nested(depth):
    """Sequences in sequences, that many."""
    data = b""
    for _ in range(depth):
        data = element(0x30, data)
    return data


class Strictness(unittest.TestCase):
    """check_strict: X.690's distinguished encoding and nothing beside it."""

    GOOD = (
        ("nothing", b""), ("an empty sequence", element(0x30)), ("true", b"\x01\x01\xff"),
        ("false", b"\x01\x01\0"), ("zero", b"\x02\x01\0"), ("128", b"\x02\x02\0\x80"),
        ("-128", b"\x02\x01\x80"), ("no bits", b"\x03\x01\0"), ("bits", b"\x03\x02\x03\xf8"),
        ("null", b"\x05\0"), ("an identifier", b"\x06\x03\x55\x1d\x11"),
        ("128 bytes", element(0x04, b"x" * 128)), ("300 bytes", element(0x04, b"x" * 300)),
        ("65536 bytes", element(0x04, b"x" * 65536)), ("twelve deep", nested(12)),
        ("a context tag", element(0xa0, b"\x02\x01\x02")), ("two elements", b"\x05\0\x05\0"))

    BAD = (
        ("a tag alone", b"\x30"), ("cut off", b"\x30\x05\x02\x01\0"),
        ("a length that is cut off", b"\x30\x82\x01"), ("an endless length", b"\x30\x80\0\0"),
        ("a long length for a short one", b"\x04\x81\x05hello"),
        ("a length with a leading zero", b"\x04\x82\0\x85" + b"x" * 0x85),
        ("a length of four bytes", b"\x04\x84\x01\0\0\0"),
        ("a length of 127 bytes", b"\x04\xff" + b"\xff" * 127),
        ("a tag of several bytes", b"\x1f\x81\x01\x01\0"), ("a tag of zero", b"\0\0"),
        ("a boolean of 1", b"\x01\x01\x01"), ("a boolean of two bytes", b"\x01\x02\xff\xff"),
        ("an integer of nothing", b"\x02\0"), ("an integer with a zero", b"\x02\x02\0\x7f"),
        ("a negative one with ones", b"\x02\x02\xff\x80"), ("bits of nothing", b"\x03\0"),
        ("eight loose bits", b"\x03\x02\x08\0"), ("loose bits of no bits", b"\x03\x01\x01"),
        ("loose bits that are set", b"\x03\x02\x03\xff"), ("a null with content", b"\x05\x01\0"),
        ("an identifier of nothing", b"\x06\0"), ("an identifier cut off", b"\x06\x02\x55\x9d"),
        ("a sequence that is no container", b"\x10\0"),
        ("an octet string in pieces", element(0x24, b"\x04\x01a", b"\x04\x01b")),
        ("a thousand deep", nested(1000)), ("a fault deep inside", element(0x30, element(
            0x31, element(0xa3, b"\x01\x01\x02")))))

    def test_good(self):
        for name, data in self.GOOD:
            with self.subTest(name):
                certferry.check_strict(data)

    def test_bad(self):
        for name, data in self.BAD:
            with self.subTest(name), self.assertRaises(ValueError):
                certferry.check_strict(data)


class Facts(unittest.TestCase):
    """parse_certificate beside what openssl says of the same bytes."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch(), intermediate=False)

    def parse(self, *arguments, **how):
        """The Certificate of one that is minted for the purpose."""
        credential = self.authority.issue(*arguments, **how)
        return certferry.parse_certificate(world.certificates(credential.cert)[0])

    def test_serial_validity_and_key(self):
        for key, serial in (("P-256", 1), ("rsa:2048", 0x80), ("ed25519", 2 ** 158 + 5)):
            with self.subTest(key):
                credential = self.authority.issue(["example.com"], key=key, serial=serial,
                                                  not_before=1600000000, not_after=2900000000)
                der = world.certificates(credential.cert)[0]
                found = certferry.parse_certificate(der)
                self.assertEqual(der, found.der)
                self.assertEqual(serial, int(found.serial, 16))
                self.assertEqual((1600000000, 2900000000), (found.not_before, found.not_after))
                self.assertEqual(3, found.version)
                self.assertEqual(certferry.pem_blocks(world.public_key(credential.key).encode())[0],
                                 certferry.pem_blocks(world.openssl(
                                     "pkey", "-pubin", "-inform", "DER", "-pubout", "-in",
                                     world.write(os.path.join(self.authority.folder, "public.der"),
                                                 found.public_key)).encode())[0])

    def test_times_around_2050(self):
        for moment in (2524607999, 2524608000, 253402300799):  # UTCTime ends with 2049
            with self.subTest(moment):
                self.assertEqual(moment, self.parse(["example.com"], not_after=moment).not_after)

    def test_names_in_their_order(self):
        names = ["b.example.com", "*.example.com", "192.0.2.1", "2001:db8::1", "a.example.net"]
        self.assertEqual(tuple(names), self.parse(names).domains)

    def test_names_that_do_not_count(self):
        good = "example.com"
        for name in ("*", "*.com", "f*.example.com", "*f.example.com", "a.*.example.com",
                     "*.*.example.com", "DNS:192.0.2.1", "DNS:-a.example.com", "DNS:a..example.com",
                     "DNS:.example.com", "DNS:a b.example.com", "DNS:a/b.example.com",
                     "URI:https://other.example.com/", "email:a@other.example.com"):
            with self.subTest(name):
                self.assertEqual((good,), self.parse([good, name]).domains)

    def test_name_with_nul(self):
        der = self.parse(["example.com", "aXb.example.com"]).der
        self.assertEqual(("example.com",), certferry.parse_certificate(
            der.replace(b"aXb.", b"a\0b.")).domains)

    def test_upper_case_is_lowered(self):
        self.assertEqual(("www.example.com",), self.parse(["WWW.Example.COM"]).domains)

    def test_no_alternative_name(self):
        self.assertEqual((), self.parse([], subject="/CN=example.com").domains)
        self.assertEqual(1, self.parse(["example.com"], extensions="").version)

    def test_no_certificate(self):
        good = self.parse(["example.com"]).der
        for name, data in (
                ("nothing", b""), ("a null", b"\x05\0"), ("an empty sequence", b"\x30\0"),
                ("text", b"hello"), ("cut off", good[:-1]), ("something behind it", good + b"\0"),
                ("two", good * 2), ("a request's shape", element(0x30, element(0x30), element(
                    0x30), b"\x03\x01\0")),
                ("a February of 30 days", good.replace(b"\x17\x0d", b"\x17\x0d3002300000", 1)),
                ("a key", self.parse(["example.com"]).public_key)):
            with self.subTest(name), self.assertRaises(ValueError):
                certferry.parse_certificate(data)


class Text(unittest.TestCase):
    """read_pem: certificates and at most one key out of whatever an administrator has."""

    @classmethod
    def setUpClass(cls):
        authority = world.Authority(world.scratch())
        cls.leaf, cls.issuer = authority.issue(["example.com"]), authority.intermediate
        cls.pem = [world.read(path) for path in (cls.leaf.cert, cls.issuer.cert, cls.leaf.key)]
        cls.ders = [world.certificates(path)[0] for path in (cls.leaf.cert, cls.issuer.cert)]

    def test_certificates(self):
        leaf, issuer, key = self.pem
        request = b"-----BEGIN DH PARAMETERS-----\nMAA=\n-----END DH PARAMETERS-----\n"
        one_line = leaf.replace(b"\n", b"").replace(b"CERTIFICATE-----", b"CERTIFICATE-----\n", 1)
        for name, data, expected in (
                ("two", leaf + issuer, self.ders), ("the other order", issuer + leaf,
                                                    self.ders[::-1]),
                ("twice", leaf + issuer + leaf, self.ders),
                ("CRLF", (leaf + issuer).replace(b"\n", b"\r\n"), self.ders),
                ("text around", b"subject=/CN=x\n" + leaf + b"\xff\0 i:...\n" + issuer + b"bye",
                 self.ders),
                ("other blocks", request + leaf + request + issuer, self.ders),
                ("a key between", leaf + key + issuer, self.ders),
                ("the old label", leaf.replace(b" CERT", b" X509 CERT"), self.ders[:1]),
                ("long lines", one_line.replace(b"-----END", b"\n-----END"), self.ders[:1]),
                ("spaces", leaf.replace(b"\n", b"  \n \t"), self.ders[:1]),
                ("DER", self.ders[0], self.ders[:1]), ("nothing", b"", []),
                ("text", b"nothing here", []), ("cut off", leaf[:-10], []),
                ("a head only", b"-----BEGIN ", []),
                ("heads only", b"-----BEGIN CERTIFICATE-----\n" * 50, [])):
            with self.subTest(name):
                self.assertEqual(expected, list(certferry.read_pem(data)[0]))

    def test_key(self):
        leaf, issuer, key = self.pem
        for name, data in (("behind", leaf + issuer + key), ("in front", key + leaf),
                           ("alone", key), ("twice the same", key + leaf + key),
                           ("beside one certificate many times", key + leaf * 17),
                           ("CRLF", key.replace(b"\n", b"\r\n"))):
            with self.subTest(name):
                secret = certferry.read_pem(data)[1]
                self.assertEqual(key.strip(), secret.pem.strip())
                self.assertNotIn("KEY-----", repr(secret) + str(secret))
        self.assertIsNone(certferry.read_pem(leaf)[1])

    def test_refused(self):
        leaf, _, key = self.pem
        body = world.certificates(self.leaf.cert)[0]
        many = b"".join(certferry.to_pem([body[:-1] + bytes([number])]) for number in range(17))
        other = key.replace(b"M", b"N", 1)
        for name, data in (("broken base64", leaf.replace(b"MII", b"M*I")),
                           ("base64 of no whole bytes", leaf.replace(b"MII", b"MI")),
                           ("an empty block", b"-----BEGIN CERTIFICATE-----\n"
                                              b"-----END CERTIFICATE-----\n"),
                           ("17 certificates", many), ("two keys", key + leaf + other)):
            with self.subTest(name), self.assertRaises(ValueError):
                certferry.read_pem(data)

    def test_written_as_openssl_writes_it(self):
        self.assertEqual(self.pem[0] + self.pem[1], certferry.to_pem(self.ders))


class Names(unittest.TestCase):
    """covers: RFC 9525's wildcard, one whole label."""

    TABLE = (
        ("example.com", "example.com", True), ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com", True), ("*.example.com", "example.com", False),
        ("*.example.com", "a.b.example.com", False), ("*.example.com", "*.example.com", True),
        ("*.example.com", "*.www.example.com", False), ("www.example.com", "*.example.com", False),
        ("192.0.2.1", "192.0.2.1", True),
        ("*.0.2.1", "192.0.2.1", False), ("::1", "::1", True), ("*.com", "*.example.com", False))

    def test_covers(self):
        for name, wanted, expected in self.TABLE:
            with self.subTest(name=name, wanted=wanted):
                self.assertEqual(expected, certferry.covers(("other.example.net", name), wanted))


class Chains(unittest.TestCase):
    """order_chains: the issuers in order, without a root and whatever else was handed over."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())
        lower = cls.authority.issue([], subject="/CN=Lower", ca=True)
        cls.leaf = cls.authority.issue(["example.com"], issuer=lower)
        other = world.Authority(world.scratch(), name="Other")
        cls.known = {name: certferry.parse_certificate(world.certificates(credential.cert)[0])
                     for name, credential in (
                         ("leaf", cls.leaf), ("lower", lower),
                         ("upper", cls.authority.intermediate),
                         ("root", cls.authority.root_credential), ("other", other.intermediate))}

    def test_order(self):
        for handed, expected in (
                ("lower upper", "lower upper"), ("upper lower", "lower upper"),
                ("root other upper leaf lower", "lower upper"),
                ("lower lower upper upper", "lower upper"), ("lower", "lower"), ("upper", ""),
                ("", ""), ("other root", "")):
            with self.subTest(handed):
                chains = certferry.order_chains(self.known["leaf"], [
                    self.known[name] for name in handed.split()])
                self.assertEqual([self.known[name] for name in expected.split()], list(chains[0]))

    def test_two_ways_up(self):
        """Of a re-issued intermediate both are tried, and no more than a few of many."""
        twin = self.authority.issue([], subject="/O=Example/CN=Example Root Intermediate", ca=True,
                                    key=self.authority.intermediate.key,
                                    issuer=self.authority.root_credential)
        twin = certferry.parse_certificate(world.certificates(twin.cert)[0])
        chains = certferry.order_chains(self.known["leaf"], [
            self.known["lower"], self.known["upper"], twin])
        self.assertEqual({self.known["upper"].der, twin.der}, {chain[-1].der for chain in chains})

    def test_ring(self):
        """Issuers that name each other end."""
        ring = [self.known["lower"]._replace(der=b"%d" % number, issuer=b"%d" % (number % 15),
                                             subject=b"%d" % ((number + 1) % 15))
                for number in range(15)]
        leaf = self.known["leaf"]._replace(issuer=b"1")
        self.assertTrue(certferry.order_chains(leaf, ring))


class Flaws(unittest.TestCase):
    """flaw and key_kind: what openssl would let pass and browsers do not."""

    CA = "basicConstraints = critical,CA:TRUE\nkeyUsage = critical,{}\n"

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())

    def parse(self, **how):
        """A certificate as the authority issues it."""
        credential = self.authority.issue(["example.com"], **how)
        return certferry.parse_certificate(world.certificates(credential.cert)[0])

    def test_leaf(self):
        usage = "digitalSignature,keyEncipherment"
        for words, how in (
                ("", {}), ("", {"key": "P-384"}), ("", {"key": "rsa:2048"}),
                ("", {"extensions": world.LEAF.replace("extendedKeyUsage = serverAuth\n", "")}),
                ("P-224|another curve", {"key": "secp224r1"}), ("RSA 1024", {"key": "rsa:1024"}),
                ("another curve|secp256k1", {"key": "secp256k1"}), ("SHA-1", {"digest": "sha1"}),
                ("version 1", {"extensions": ""}), ("serial", {"serial": 0}),
                ("serial", {"serial": 2 ** 170}), ("authority", {"ca": True, "extensions":
                                                                 self.CA.format("keyCertSign")}),
                ("serverAuth", {"extensions": world.LEAF.replace("serverAuth", "clientAuth")}),
                ("sign", {"extensions": world.LEAF.replace(usage, usage + ",keyCertSign")})):
            with self.subTest(**how):
                found = certferry.flaw(self.parse(**how), True)
                self.assertTrue(any(word in found for word in words.split("|")), found)
                self.assertEqual(words == "", found == "")

    def test_issuer(self):
        for words, how in (("", {"ca": True}),
                           ("", {"extensions": self.CA.format("keyCertSign")}),
                           ("sign", {"extensions": self.CA.format("cRLSign")}),
                           ("1024", {"ca": True, "key": "rsa:1024"})):
            with self.subTest(**how):
                found = certferry.flaw(self.parse(**how), False)
                self.assertIn(words, found)
                self.assertEqual(words == "", found == "")

    def test_kinds(self):
        for key, expected in (("P-256", "ECDSA P-256"), ("P-384", "ECDSA P-384"),
                              ("rsa:2048", "RSA 2048"), ("ed25519", "Ed25519")):
            with self.subTest(key):
                self.assertEqual(expected, certferry.key_kind(self.parse(key=key).public_key))

    def test_kinds_of_nonsense(self):
        for data in (b"", b"\x30\0", b"\x30\x03\x02\x01\0", nested(9)):
            with self.subTest(data):
                self.assertIsInstance(certferry.key_kind(data), str)


RUNNER = """\
import sys
sys.path.insert(0, {!r})
import certferry
real, known, count = certferry.run_openssl, {{}}, 0
def run_openssl(arguments, data=b"", *rest, **how):
    global count
    if b"PRIVATE KEY" in data:  # the lineages' one key is read once
        if data not in known:
            known[data] = real(arguments, data, *rest, **how)
        return known[data]
    count += 1
    if count % {}:
        return 2, b"", "error 7 at 0 depth lookup: left out"
    return real(arguments, data, *rest, **how)
certferry.run_openssl = run_openssl
sys.exit(certferry.main(sys.argv[2:]))
"""


class Anything(unittest.TestCase):
    """Whatever bytes an offer has, it ends in a word of CONTRACT's: soon, and nothing written."""

    SIDE = 200  # lineages, each with a file to fetch from: so many offers are judged by one run
    OPENSSL_EVERY = 1 if FULL else 20  # its processes take far longer than all the rest

    @classmethod
    def setUpClass(cls):
        authority = world.Authority(world.scratch())
        cls.good, cls.offers = authority.issue(["example.com"]), world.scratch()
        # Short sweeps do not all try the same: from another seed under each release of Python.
        cls.random = random.Random(20260101 + (sys.version_info[1] if world.QUICK else 0))
        cls.there = world.Downstream()
        cls.there.__enter__()
        cls.names = ["n%d.example.com" % number for number in range(cls.SIDE)]
        os.mkdir(os.path.dirname(cls.there.conf("all")), 0o700)
        for name in cls.names:
            cls.there.key(name, cls.good)
            world.write(cls.there.conf(name), (
                "from = file:{}/{}\nca-file = {}\ndomain = example.com\n").format(
                    cls.offers, name, authority.root), 0o600)
        cls.before = cls.there.snapshot()

    @classmethod
    def tearDownClass(cls):
        cls.there.__exit__()

    def tearDown(self):
        self.assertEqual([], world.changed(self.before, self.there.snapshot()))

    def ask(self, offers, openssl_every=OPENSSL_EVERY):
        """The words that these offers (bytes) end with, judged by one dry run."""
        names = self.names[:len(offers)]
        for name, offer in zip(names, offers):
            world.write(os.path.join(self.offers, name), offer)
        runner = world.write(os.path.join(self.offers, "runner.py"), RUNNER.format(
            world.module_folder(), openssl_every))
        python = world.write(os.path.join(self.offers, "python"), "#!/bin/sh\nexec {} {} \"$@\"\n"
                             .format(sys.executable, runner), 0o755)
        result = self.there.run("renew", "--dry-run", "--json", *names, python=python, timeout=120)
        self.assertNotIn("Traceback", result.err)
        self.assertNotIn("bug", result.err)
        found = {each["name"]: each for each in json.loads(result.out)["lineages"]}
        return [self.word(found[name]) for name in names]

    def word(self, outcome):
        """The reason of an outcome, "" where the good certificate was taken: no other may be."""
        if outcome["result"] == "installed":
            good = certferry.fingerprint(world.certificates(self.good.cert)[0])
            self.assertEqual(good, outcome["fingerprint_sha256"])
            return ""
        self.assertIn(outcome["reason"], REASONS, outcome)
        self.assertRegex(outcome["detail"], r"\A[ -~]{1,700}\Z")
        return outcome["reason"]

    def mutate(self, data):
        """The data with a few bytes other than they were: flipped, cut out, doubled or cut off."""
        data = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            at, size = self.random.randrange(len(data)), self.random.choice((1, 2, 4, 30))
            how = self.random.randrange(6)
            if how < 3:
                data[at] = self.random.choice((data[at] ^ 1 << self.random.randrange(8), 0, 0x80,
                                               0xff, self.random.randrange(256)))
            elif how == 3:
                del data[at:at + size]
            elif how == 4:
                data[at:at] = data[at:at + size]
            else:
                del data[self.random.randrange(len(data)):]
            data = data or bytearray(b"\0")
        return bytes(data)

    def sweep(self, make, count, seconds):
        """Ask of that many offers, or in a short sweep of as many as the time allows; the words."""
        seen, until = set(), time.monotonic() + (seconds / 4 if world.QUICK else seconds)
        for first in range(0, count, self.SIDE):
            seen.update(self.ask([make(first + number) for number in range(self.SIDE)]))
            if time.monotonic() > until and not FULL:
                break
        return seen

    def test_good_one(self):
        self.assertEqual([""], self.ask([world.read(self.good.fullchain)], 1))

    def test_mutated_der(self):
        """One of the two certificates of a good chain is not what it was."""
        ders = world.certificates(self.good.fullchain)

        def make(number):
            changed = list(ders)
            changed[number % 2] = self.mutate(ders[number % 2])
            return certferry.to_pem(changed)
        self.assertLessEqual({"malformed", "untrusted"}, self.sweep(make, 8000, 4))

    def test_mutated_text(self):
        """The PEM text is not what it was, with the private key in it."""
        text = world.read(self.good.fullchain) + world.read(self.good.key)
        self.assertIn("malformed", self.sweep(lambda _: self.mutate(text), 2000, 1))

    def test_hostile_sizes(self):
        leaf = world.certificates(self.good.cert)[0]
        mark = b"-----BEGIN CERTIFICATE-----\n"
        rows = (
            ("more than 1 MiB", world.read(self.good.fullchain) + b"#" * (1 << 20)),
            ("a megabyte of heads", mark * 37000), ("a megabyte of dashes", b"-" * 1000000),
            ("a megabyte of one block", mark + b"A" * 1000000 + mark.replace(b"BEGIN", b"END")),
            ("deep", certferry.to_pem([nested(9000)])),
            ("many small ones", certferry.to_pem(
                element(0x30, bytes([number])) for number in range(200))),
            ("17 certificates", certferry.to_pem(
                leaf[:-1] + bytes([number]) for number in range(17))))
        for (name, _), word in zip(rows, self.ask([data for _, data in rows])):
            with self.subTest(name):
                self.assertEqual("malformed", word)

    @unittest.skipUnless(cryptography_vectors, "needs the package cryptography_vectors")
    def test_vectors(self):
        """All of the package's certificates: none of them is for the key that is here."""
        folder = os.path.join(os.path.dirname(cryptography_vectors.__file__), "x509")
        paths = sorted(os.path.join(where, name) for where, _, names in os.walk(folder)
                       for name in names if name.endswith((".pem", ".der", ".crt", ".cer")))
        self.assertTrue(paths)
        for first in range(0, len(paths), self.SIDE):
            part = paths[first:first + self.SIDE]
            for path, word in zip(part, self.ask([world.read(path) for path in part])):
                with self.subTest(os.path.relpath(path, folder)):
                    self.assertNotEqual("", word)


if __name__ == "__main__":
    unittest.main()
