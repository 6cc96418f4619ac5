"""Bytes to facts: certificates and keys out of any text, names, chains, what clients refuse.

Whatever the bytes are, an offer of them ends in a word of CONTRACT's. The usual run damages some
thousand in this process, and has a few dozen judged by the command. CERTFERRY_FULL=1 tries 200,000
of the first and 4,000 of the second.
"""

import base64
import itertools
import json
import os
import random
import re
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

DAMAGED = 100000 if world.FULL else 3000  # texts in each sweep
REASONS = ("malformed", "key-mismatch", "names", "expired", "not-yet-valid", "untrusted")
NAME = "example.com"
NOW = int(time.time())


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


def der_of(credential):
    """The DER of a credential's certificate."""
    return world.certificates(credential.cert)[0]


def parsed(credential):
    """The Certificate of a credential."""
    return certferry.parse_certificate(der_of(credential))


def read_all(data):
    """All that is read of an offer without openssl; ValueError where it is none."""
    found = [certferry.parse_certificate(der) for der in certferry.read_pem(data)[0]]
    for each in found:
        certferry.candidate_chains(each, found, NOW)
        certferry.chain_flaw(each, found, True)
        certferry.describe_key(each.public_key)
        certferry.describe_name(each.issuer)
        certferry.algorithm_flaw(each)
        certferry.for_clients(each)
    return found


class Damage:
    """Bytes that are not quite what they were, the same in every run under one Python."""

    def __init__(self):
        # Short sweeps do not all try the same: each release of Python has a seed of its own.
        self.random = random.Random(20270101 + sys.version_info[1])

    def to(self, data):
        """The bytes with a few of them changed, cut out, doubled or cut off."""
        data = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            self._once(data)
            if not data:
                return b"\0"
        return bytes(data)

    def _once(self, data):
        at = self.random.randrange(len(data))
        size = self.random.choice((1, 2, 4, 30))
        how = self.random.choice(("byte", "bit", "byte", "cut", "double", "end"))
        if how == "bit":
            data[at] ^= 1 << self.random.randrange(8)
        elif how == "byte":
            data[at] = self.random.choice((0, 0x80, 0xFF, self.random.randrange(256)))
        elif how == "cut":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        else:
            del data[self.random.randrange(len(data)) :]


# --------------------------------------------------------------------------------------------------
# One certificate
# --------------------------------------------------------------------------------------------------


class Facts(unittest.TestCase):
    """parse_certificate: the facts of what openssl made."""

    NO_NAMES = (  # beside a good one they do not count
        "*",
        "*.com",
        "f*.example.com",
        "*f.example.com",
        "a.*.example.com",
        "*.*.example.com",
        "DNS:192.0.2.1",
        "DNS:*.0.2.1",
        "DNS:-a.example.com",
        "DNS:a..example.com",
        "DNS:.example.com",
        "DNS:a b.example.com",
        "DNS:a/b.example.com",
        "URI:https://other.example.com/",
        "email:a@other.example.com",
    )

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch(), intermediate=False)
        cls.good = cls.authority.issue([NAME])

    def test_serial_validity_and_key(self):
        """For keys of each kind, and serials with the highest bit set and of 20 bytes."""
        dates = {"not_before": 1600000000, "not_after": 2900000000}
        for key, serial in (("P-256", 1), ("rsa:2048", 0x80), ("ed25519", 2**158 + 5)):
            with self.subTest(key):
                credential = self.authority.issue([NAME], key=key, serial=serial, **dates)
                found = parsed(credential)
                self.assertEqual(found.der, der_of(credential))
                self.assertEqual(int(found.serial, 16), serial)
                self.assertEqual((found.not_before, found.not_after), tuple(dates.values()))
                self.assertEqual(found.lifetime, 1300000000)
                text = world.public_key(credential.key).encode()
                ((_, _, content),) = certferry.pem_blocks(text)
                self.assertEqual(found.public_key, base64.b64decode(content))

    def test_times_around_2050(self):
        """UTCTime ends with 2049 (RFC 5280, 4.1.2.5)."""
        for moment in (2524607999, 2524608000, 253402300799):
            with self.subTest(moment):
                credential = self.authority.issue([NAME], not_after=moment)
                self.assertEqual(parsed(credential).not_after, moment)

    def test_names(self):
        """Names and addresses in the certificate's order, in lower case."""
        names = ["b.example.com", "*.example.com", "192.0.2.1", "2001:db8::1", "A.Example.NET"]
        wanted = (*names[:-1], "a.example.net")
        self.assertEqual(parsed(self.authority.issue(names)).domains, wanted)

    def test_names_that_do_not_count(self):
        """Wildcards of another shape, what is outside the alphabet, other kinds of names."""
        credential = self.authority.issue([NAME, *self.NO_NAMES])
        self.assertEqual(parsed(credential).domains, (NAME,))

    def test_name_with_nul(self):
        """A browser would read what stands before it."""
        der = der_of(self.authority.issue([NAME, "aXb.example.com"]))
        damaged = der.replace(b"aXb.", b"a\0b.")
        self.assertEqual(certferry.parse_certificate(damaged).domains, (NAME,))

    def test_no_alternative_name(self):
        """The common name does not count."""
        for extensions in (None, ""):
            credential = self.authority.issue([], subject="/CN=" + NAME, extensions=extensions)
            self.assertEqual(parsed(credential).domains, ())

    def test_no_certificate(self):
        """What is none is refused with words: nothing is behind it, nothing is missing."""
        good = der_of(self.good)
        indefinite = b"\x30\x80" + good[4:] + b"\0\0"
        longer = b"\x30\x83" + (len(good) - 3).to_bytes(3, "big") + good[4:]
        huge = b"\x30\x84" + (1 << 24).to_bytes(4, "big") + good[4:]
        february = good.replace(b"\x17\x0d", b"\x17\x0d260230000000Z" + b"#" * 15, 1)
        request = element(0x30, element(0x30), element(0x30), b"\x03\x01\0")
        for name, data in (
            ("nothing", b""),
            ("a null", b"\x05\0"),
            ("an empty sequence", b"\x30\0"),
            ("text", b"hello"),
            ("cut off", good[:-1]),
            ("something behind it", good + b"\0"),
            ("two", good * 2),
            ("a request's shape", request),
            ("a key", parsed(self.good).public_key),
            ("no end told", indefinite),
            ("a longer length", longer),
            ("16 MiB", huge),
            ("a tag of several bytes", b"\x3f" + good[1:]),
            ("a February of 30 days", february),
            ("a thousand deep", nested(1000)),
        ):
            with self.subTest(name), self.assertRaises(ValueError):
                certferry.parse_certificate(data)

    def test_an_extension_that_is_given_twice(self):
        """Clients would go by different ones."""
        usage = world.LEAF.replace(
            "keyUsage", "2.5.29.99 = DER:0500\n2.5.29.98 = DER:0500\nkeyUsage"
        )
        good = der_of(self.authority.issue([NAME], extensions=usage))
        certferry.parse_certificate(good)
        with self.assertRaises(ValueError):
            certferry.parse_certificate(good.replace(b"\x55\x1d\x62", b"\x55\x1d\x63"))

    def test_words(self):
        """Who issued it, and its key, as a person reads them; other bytes harm nothing."""
        leaf = parsed(self.good)
        self.assertEqual(certferry.describe_name(leaf.issuer), "Example Example Root")
        digits = certferry.fingerprint(leaf.public_key)
        self.assertIn("ECDSA P-256 sha256:" + digits[:16], certferry.describe_key(leaf.public_key))
        for data in (b"", b"\x30\0", b"\x30\x03\x02\x01\0", b"\x06\x03\x55\x04\x03", nested(9)):
            with self.subTest(data):
                self.assertIsInstance(certferry.describe_name(data), str)
                self.assertIsInstance(certferry.key_kind(data), str)


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


class Text(unittest.TestCase):
    """read_pem: certificates and at most one key out of whatever an administrator has."""

    @classmethod
    def setUpClass(cls):
        authority = world.Authority(world.scratch())
        cls.credential = authority.issue([NAME])
        paths = (cls.credential.cert, cls.credential.chain, cls.credential.key)
        cls.leaf, cls.issuer, cls.key = map(world.read, paths)
        cls.ders = world.certificates(cls.credential.fullchain)

    def test_certificates(self):
        """In the order of the text, each once, whatever stands around them."""
        leaf, issuer = self.leaf, self.issuer
        other = b"-----BEGIN DH PARAMETERS-----\nMAA=\n-----END DH PARAMETERS-----\n"
        one_line = leaf.replace(b"\n", b"").replace(b"CERTIFICATE-----", b"CERTIFICATE-----\n", 1)
        for name, data, expected in (
            ("two", leaf + issuer, self.ders),
            ("the other order", issuer + leaf, self.ders[::-1]),
            ("twice", leaf + issuer + leaf, self.ders),
            ("CRLF", (leaf + issuer).replace(b"\n", b"\r\n"), self.ders),
            ("words around", b"s:/CN=x\n" + leaf + b"\xff\0 i:...\n" + issuer + b"bye", self.ders),
            ("other blocks", other + leaf + other + issuer, self.ders),
            ("a key between", leaf + self.key + issuer, self.ders),
            ("the old label", leaf.replace(b" CERT", b" X509 CERT"), self.ders[:1]),
            ("a long line", one_line.replace(b"-----END", b"\n-----END"), self.ders[:1]),
            ("spaces", leaf.replace(b"\n", b"  \n \t"), self.ders[:1]),
            ("DER", self.ders[0], self.ders[:1]),
            ("nothing", b"", []),
            ("words", b"nothing here", []),
            ("cut off", leaf[:-10], []),
            ("a head only", b"-----BEGIN ", []),
            ("heads only", b"-----BEGIN CERTIFICATE-----\n" * 50, []),
        ):
            with self.subTest(name):
                self.assertEqual(list(certferry.read_pem(data)[0]), expected)

    def test_key(self):
        """It is found wherever it stands, and nothing shows it."""
        leaf, issuer, key = self.leaf, self.issuer, self.key
        for name, data in (
            ("behind", leaf + issuer + key),
            ("in front", key + leaf),
            ("alone", key),
            ("twice the same", key + leaf + key),
            ("beside one certificate many times", key + leaf * 17),
            ("CRLF", key.replace(b"\n", b"\r\n")),
        ):
            with self.subTest(name):
                secret = certferry.read_pem(data)[1]
                self.assertEqual(secret.pem.strip(), key.strip())
                self.assertNotIn("KEY-----", f"{secret!r} {secret} {[secret]}")
        self.assertIsNone(certferry.read_pem(leaf)[1])

    def test_refused(self):
        """What could be misread is refused in words."""
        leaf, issuer, key = self.leaf, self.issuer, self.key
        many = [self.ders[0][:-1] + bytes([number]) for number in range(17)]
        trusted = leaf.replace(b" CERT", b" TRUSTED CERT")
        empty = b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"
        for name, data, words in (
            ("broken base64", leaf.replace(b"MII", b"M*I", 1), "base64"),
            ("a character lost", leaf.replace(b"MII", b"MI", 1), "base64"),
            ("two lost", leaf.replace(b"MII", b"M", 1), "base64"),
            ("three lost", leaf.replace(b"MII", b"", 1), "base64"),
            ("an empty block", empty, ""),
            ("17 certificates", certferry.to_pem(many), "16"),
            ("two keys", key + leaf + key.replace(b"M", b"N", 1), "more than one private key"),
            # else the intermediate would be taken for the leaf
            ("openssl's own label", trusted + issuer, "TRUSTED CERTIFICATE"),
            ("openssl's own label above", issuer + trusted, "TRUSTED CERTIFICATE"),
        ):
            with self.subTest(name):
                self.assertRaisesRegex(ValueError, words, certferry.read_pem, data)

    def test_written_as_openssl_writes_it(self):
        """Lines of 64 characters."""
        self.assertEqual(certferry.to_pem(self.ders), self.leaf + self.issuer)

    def test_sizes(self):
        """A megabyte of anything is read in no time."""
        head = b"-----BEGIN CERTIFICATE-----\n"
        rows = {
            "heads": head * 37000,
            "dashes": b"-" * 1000000,
            "one block": head + b"A" * 1000000 + head.replace(b"BEGIN", b"END"),
            "one block of dashes": head + b"- " * 500000 + head.replace(b"BEGIN", b"END"),
            "labels": b"-----BEGIN " + b"A" * 1000000 + b"-----",
            "ends": head.replace(b"BEGIN", b"END") * 37000,
        }
        for name, data in rows.items():
            with self.subTest(name):
                started = time.process_time()
                try:
                    read_all(data)
                except ValueError:
                    pass
                self.assertLess(time.process_time() - started, 1)


# --------------------------------------------------------------------------------------------------
# Names and chains
# --------------------------------------------------------------------------------------------------


class Names(unittest.TestCase):
    """covers: RFC 9525's wildcard, one whole label."""

    TABLE = (
        ("example.com", "example.com", True),
        ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "a.b.example.com", False),
        ("*.example.com", "*.example.com", True),
        ("*.example.com", "*.www.example.com", False),
        ("www.example.com", "*.example.com", False),
        ("*.com", "*.example.com", False),
        ("192.0.2.1", "192.0.2.1", True),
        ("::1", "::1", True),
    )

    def test_covers(self):
        """Row by row, beside a name that is no matter."""
        for name, wanted, expected in self.TABLE:
            with self.subTest(name=name, wanted=wanted):
                self.assertEqual(certferry.covers(("other.example.net", name), wanted), expected)


class Chains(unittest.TestCase):
    """possible_chains and candidate_chains: the issuers in order, no root, nothing else."""

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())
        root = cls.authority.root_credential
        lower = cls.authority.issue([], subject="/CN=Lower", ca=True)
        twin_name = "/O=Example/CN=Example Root Intermediate"
        upper = cls.authority.intermediate
        how = {"ca": True, "subject": twin_name, "key": upper.key, "issuer": root}
        past = {"not_before": world.days(-9)}
        credentials = {
            "leaf": cls.authority.issue([NAME], issuer=lower),
            "lower": lower,
            "upper": upper,
            "twin": cls.authority.issue([], **how),
            "weak": cls.authority.issue([], digest="sha1", **how),
            "expired": cls.authority.issue([], not_after=world.days(-1), **dict(how, **past)),
            "root": root,
            "other": world.Authority(world.scratch(), name="Other").intermediate,
        }
        cls.known = {name: parsed(credential) for name, credential in credentials.items()}

    def named(self, chain):
        """The names of a chain's members, as the tables write them."""
        return " ".join(name for each in chain for name in self.known if self.known[name] == each)

    def chains(self, function, handed, *more):
        """The chains that a function makes of what was handed over beside the leaf."""
        others = [self.known[name] for name in handed.split()]
        return [self.named(chain) for chain in function(self.known["leaf"], others, *more)]

    def test_possible(self):
        """In order, whatever else was handed over; of an issuer made twice there are two."""
        for handed, expected in (
            ("lower upper", ["", "lower", "lower upper"]),
            ("upper lower", ["", "lower", "lower upper"]),
            ("root other upper leaf lower", ["", "lower", "lower upper"]),
            ("lower", ["", "lower"]),
            ("upper", [""]),
            ("other root", [""]),
            ("", [""]),
            ("lower upper twin", ["", "lower", "lower upper", "lower twin"]),
        ):
            with self.subTest(handed):
                self.assertEqual(self.chains(certferry.possible_chains, handed), expected)

    def test_candidates(self):
        """The longest first, then shorter ones, since a superfluous one condemns nothing.

        Those with one that is weak or not valid now come last.
        """
        for handed, expected in (
            ("lower upper", ["lower upper", "lower", ""]),
            ("", [""]),
            ("upper", [""]),
            ("weak lower", ["lower", "", "lower weak"]),
            ("expired lower", ["lower", "", "lower expired"]),
        ):
            with self.subTest(handed):
                found = self.chains(certferry.candidate_chains, handed, NOW)
                self.assertEqual(found, expected)

    def test_a_root_that_was_certified_by_the_one_before(self):
        """Of the same name, yet no root: who trusts the one before needs it."""
        old = self.authority.root_credential
        name = "/O=Example/CN=Example Root"
        new = self.authority.issue([], subject=name, ca=True, issuer=old)
        leaf = parsed(self.authority.issue([NAME], issuer=new))
        chains = certferry.possible_chains(leaf, [parsed(old), parsed(new)])
        self.assertEqual(chains, [(), (parsed(new),)])

    def test_ring(self):
        """Issuers that certified each other, every one by every one: it ends, and soon."""
        ring = []
        for number, issuer in itertools.product(range(4), range(4)):
            member = self.known["lower"]._replace(der=b"%d %d" % (number, issuer), extensions={})
            ring.append(member._replace(subject=b"%d" % number, issuer=b"%d" % issuer))
        leaf = self.known["leaf"]._replace(issuer=b"1", extensions={})
        self.assertLessEqual(len(certferry.possible_chains(leaf, ring)), 64)
        self.assertLessEqual(len(certferry.candidate_chains(leaf, ring, NOW)), 16)


# --------------------------------------------------------------------------------------------------
# What clients refuse
# --------------------------------------------------------------------------------------------------

USAGE = "digitalSignature,keyEncipherment"
PURPOSE = "extendedKeyUsage = serverAuth\n"
CA = "basicConstraints = critical,CA:TRUE\nkeyUsage = critical,{}\n"


class Flaws(unittest.TestCase):
    """chain_flaw: what openssl would let pass and clients do not."""

    ALWAYS = (  # words, how the leaf is issued
        ("", {}),
        ("", {"extensions": world.LEAF.replace(PURPOSE, "")}),
        ("", {"extensions": "subjectAltName = {names}\n"}),
        ("", {"extensions": world.LEAF.replace(USAGE, "digitalSignature")}),
        ("authority's", {"ca": True, "extensions": CA.format("keyCertSign,digitalSignature")}),
        ("serverAuth", {"extensions": world.LEAF.replace("serverAuth", "clientAuth")}),
        ("serverAuth", {"extensions": world.LEAF.replace("serverAuth", "anyExtendedKeyUsage")}),
        ("digitalSignature", {"extensions": world.LEAF.replace(USAGE, "keyEncipherment")}),
        ("digitalSignature", {"extensions": world.LEAF.replace(USAGE, "keyAgreement")}),
    )
    BROWSERS = (  # words, how; refused under the system's roots alone
        ("", {"key": "P-384"}),
        ("", {"key": "P-521"}),
        ("", {"key": "rsa:2048"}),
        ("", {"key": "ed25519"}),
        ("RSA 1024", {"key": "rsa:1024"}),
        ("curve", {"key": "secp224r1"}),
        ("curve", {"key": "secp256k1"}),
        ("SHA-1", {"digest": "sha1"}),
    )
    ISSUERS = (  # words, how an issuer is issued
        ("", {"ca": True}),
        ("", {"extensions": CA.format("keyCertSign")}),
        ("", {"extensions": "basicConstraints = critical,CA:TRUE\n"}),
        ("authority", {}),
        ("authority", {"extensions": ""}),
        ("sign", {"extensions": CA.format("cRLSign")}),
    )

    @classmethod
    def setUpClass(cls):
        cls.authority = world.Authority(world.scratch())
        cls.good = parsed(cls.authority.issue([NAME]))

    def check(self, words, *arguments):
        """See that a flaw has these words, and that there is none without."""
        found = certferry.chain_flaw(*arguments)
        self.assertIn(words, found)
        self.assertEqual(found == "", words == "")

    def test_leaf(self):
        """Usages and kind, under any roots."""
        for words, how in self.ALWAYS:
            with self.subTest(words, **how):
                leaf = parsed(self.authority.issue([NAME], **how))
                self.check(words, leaf, (), True)
                self.check(words, leaf, (), False)

    def test_algorithms(self):
        """Browsers' rules are for the system's roots: a private authority decides its own."""
        for words, how in self.BROWSERS:
            with self.subTest(words, **how):
                leaf = parsed(self.authority.issue([NAME], **how))
                self.check(words, leaf, (), True)
                self.check("", leaf, (), False)
                self.assertIn(words, certferry.algorithm_flaw(leaf))

    def test_issuers(self):
        """They may sign; which one of them may not is told."""
        for words, how in self.ISSUERS:
            with self.subTest(words, **how):
                issuer = parsed(self.authority.issue([NAME], **how))
                self.check(words, self.good, (issuer,), False)
                if words:
                    good = parsed(self.authority.intermediate)
                    self.check("issuer 2", self.good, (good, issuer), False)

    def test_md5(self):
        """It takes RSA."""
        rsa = world.Authority(world.scratch(self), intermediate=False, key="rsa:2048")
        self.check("MD5", parsed(rsa.issue([NAME], digest="md5")), (), True)
        self.check("", parsed(rsa.issue([NAME], digest="sha512")), (), True)

    def test_what_is_told(self):
        """Whether clients may use it too: none of these is refused."""
        both = world.LEAF.replace("serverAuth", "serverAuth,clientAuth")
        for extensions, for_clients in (
            (world.LEAF, False),
            (both, True),
            (world.LEAF.replace(PURPOSE, ""), True),
        ):
            with self.subTest(extensions):
                leaf = parsed(self.authority.issue([NAME], extensions=extensions))
                self.assertEqual(certferry.for_clients(leaf), for_clients)
                self.check("", leaf, (), True)


# --------------------------------------------------------------------------------------------------
# Whatever bytes come
# --------------------------------------------------------------------------------------------------


class Anything(unittest.TestCase):
    """No bytes end in anything but a certificate, or words about why they are none."""

    @classmethod
    def setUpClass(cls):
        authority = world.Authority(world.scratch())
        cls.good = authority.issue([NAME])
        cls.ders = world.certificates(cls.good.fullchain)
        cls.text = world.read(cls.good.fullchain) + world.read(cls.good.key)

    def sweep(self, make, count):
        """Read what make(number) makes, so often; how many are certificates all the same."""
        good = 0
        for number in range(count):
            data = make(number)
            try:
                good += len(read_all(data)) > 0
            except ValueError as error:
                self.assertLess(len(str(error)), 300)
            except Exception:
                self.fail(f"not a ValueError: {base64.b64encode(data).decode()}")
        return good

    def test_der(self):
        """One of the two certificates of a good chain is not what it was."""
        damage = Damage()

        def make(number):
            """A chain with damage to its leaf or its issuer."""
            ders = list(self.ders)
            ders[number % 2] = damage.to(ders[number % 2])
            return certferry.to_pem(ders)

        self.assertGreater(self.sweep(make, DAMAGED), 100)

    def test_text(self):
        """The PEM text is not what it was, with the private key in it."""
        damage = Damage()
        self.sweep(lambda _: damage.to(self.text), DAMAGED)

    @unittest.skipUnless(cryptography_vectors, "needs the package cryptography_vectors")
    def test_vectors(self):
        """All of the package's certificates."""
        folder = os.path.join(os.path.dirname(cryptography_vectors.__file__), "x509")
        paths = []
        for where, _, names in os.walk(folder):
            paths += [os.path.join(where, name) for name in names]
        paths = [path for path in paths if re.search(r"\.(pem|der|crt|cer)\Z", path)]
        self.assertGreater(self.sweep(lambda number: world.read(paths[number]), len(paths)), 300)


class Asked(unittest.TestCase):
    """The command, asked of damaged offers: a word of CONTRACT's, one line, nothing written."""

    SIDE = 40  # lineages, each with a file to fetch from: so many offers are judged by one run

    @classmethod
    def setUpClass(cls):
        authority = world.Authority(world.scratch())
        cls.good = authority.issue([NAME])
        cls.ders = world.certificates(cls.good.fullchain)
        cls.offers = world.scratch()
        cls.there = world.Downstream().__enter__()
        cls.names = [f"n{number:02}.example.com" for number in range(cls.SIDE)]
        os.mkdir(os.path.dirname(cls.there.conf(NAME)), 0o700)
        for name in cls.names:
            cls.there.key(name, cls.good)
            options = f"from = file:{cls.offers}/{name}\nca-file = {authority.root}\n"
            world.write(cls.there.conf(name), options + f"domain = {NAME}\n", 0o600)
        cls.before = cls.there.snapshot()

    @classmethod
    def tearDownClass(cls):
        cls.there.__exit__()

    def ask(self, offers):
        """The words that these offers (bytes) end with, judged by one dry run."""
        names = self.names[: len(offers)]
        for name, offer in zip(names, offers):
            world.write(os.path.join(self.offers, name), offer)
        result = self.there.run("renew", "--dry-run", "--json", *names, timeout=120)
        self.assertNotRegex(result.err, "Traceback|bug")
        self.assertRegex(result.err, r"\A([ -~]{1,2000}\n)*\Z")
        found = json.loads(result.out)["lineages"]
        self.assertEqual(world.changed(self.before, self.there.snapshot()), [])
        return [self.word(outcome) for outcome in found]

    def word(self, outcome):
        """The reason of an outcome, "" where the good certificate was taken: no other may be."""
        if outcome["result"] == "installed":
            digits = certferry.fingerprint(self.ders[0])
            self.assertEqual(outcome["fingerprint_sha256"], digits)
            return ""
        self.assertIn(outcome["reason"], REASONS, outcome)
        self.assertRegex(outcome["detail"], r"\A[ -~]{1,1000}\Z")
        return outcome["reason"]

    def test_damaged(self):
        """Some end one way and some another, as openssl says."""
        damage = Damage()
        seen = set()
        for _ in range(100 if world.FULL else 1):
            offers = [certferry.to_pem(self.ders)]
            while len(offers) < self.SIDE:
                ders = list(self.ders)
                # half of it in the last bytes, the signature: that much is left to openssl
                which = len(offers) % 2
                at = len(offers) % 4 // 2 * (len(ders[which]) - 60)
                ders[which] = ders[which][:at] + damage.to(ders[which][at:])
                offers.append(certferry.to_pem(ders))
            words = self.ask(offers)
            self.assertEqual(words[0], "")
            seen.update(words)
        self.assertLessEqual({"malformed", "untrusted"}, seen)

    def test_hostile(self):
        """Sizes, depths and counts: malformed, and soon."""
        leaf = self.ders[0]
        head = b"-----BEGIN CERTIFICATE-----\n"
        many = [leaf[:-1] + bytes([number]) for number in range(17)]
        small = [element(0x30, bytes([number])) for number in range(200)]
        rows = {
            "more than 1 MiB": certferry.to_pem(self.ders) + b"#" * (1 << 20),
            "a megabyte of heads": head * 37000,
            "deep": certferry.to_pem([nested(9000)]),
            "many small ones": certferry.to_pem(small),
            "17 certificates": certferry.to_pem(many),
            "no bytes": b"",
            "NUL": b"\0" * 5000,
        }
        for name, word in zip(rows, self.ask(list(rows.values()))):
            with self.subTest(name):
                self.assertEqual(word, "malformed")


if __name__ == "__main__":
    unittest.main()
