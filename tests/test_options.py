"""Options, on the command line and in NAME.conf: what is taken, what is not, and who says so."""

import os
import re
import sys
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

NAME = "example.com"
REMEMBERED = """--from --sni --domain --ca-file --deploy-hook --served-at --when --warn --critical
    --timeout""".split()
OF_A_RUN = "--key --config-dir --dry-run --force --no-timer --json --quiet --verbose".split()


class Sources(unittest.TestCase):
    """--from: what a source is, its default port, and how messages show it."""

    GOOD = (  # text, kind, host, port, target, what a person reads
        ("up.example.net", "tls", "up.example.net", 443, "", "up.example.net:443"),
        ("UP.Example.Net.", "tls", "up.example.net", 443, "", "up.example.net:443"),
        ("up.example.net:8443", "tls", "up.example.net", 8443, "", "up.example.net:8443"),
        ("up", "tls", "up", 443, "", "up:443"),
        ("192.0.2.1", "tls", "192.0.2.1", 443, "", "192.0.2.1:443"),
        ("[2001:db8::1]:8443", "tls", "2001:db8::1", 8443, "", "[2001:db8::1]:8443"),
        ("[2001:db8::1]", "tls", "2001:db8::1", 443, "", "[2001:db8::1]:443"),
        ("2001:DB8:0::1", "tls", "2001:db8::1", 443, "", "[2001:db8::1]:443"),
        ("smtp://mx.example.com", "smtp", "mx.example.com", 25, "", "smtp://mx.example.com:25"),
        ("smtp://mx.example.com:587", "smtp", "mx.example.com", 587, "",
         "smtp://mx.example.com:587"),
        ("imap://[::1]", "imap", "::1", 143, "", "imap://[::1]:143"),
        ("pop3://up", "pop3", "up", 110, "", "pop3://up:110"),
        ("ftp://up", "ftp", "up", 21, "", "ftp://up:21"),
        ("ldap://up", "ldap", "up", 389, "", "ldap://up:389"),
        ("xmpp://up", "xmpp", "up", 5222, "", "xmpp://up:5222"),
        ("postgres://up", "postgres", "up", 5432, "", "postgres://up:5432"),
        ("mysql://up", "mysql", "up", 3306, "", "mysql://up:3306"),
        ("file:/media/usb/example.com", "file", "", 0, "/media/usb/example.com",
         "file:/media/usb/example.com"),
        ("exec:ssh up.example.net cat 'a b' | tee c", "exec", "", 0,
         "ssh up.example.net cat 'a b' | tee c", "exec:ssh up.example.net cat 'a b' | tee c"),
        ("vault://vault.example.net/secret/certs/example.com", "vault", "vault.example.net", 8200,
         "secret/certs/example.com", "vault://vault.example.net/secret/certs/example.com"),
        ("vault://vault.example.net:443/kv/a", "vault", "vault.example.net", 443, "kv/a",
         "vault://vault.example.net:443/kv/a"))

    BAD = ("", " ", "a b", "up.example.net:", "up.example.net:0", "up.example.net:65536",
           "up.example.net:https", "up.example.net/", "user@up.example.net", "-up.example.net",
           "up..example.net", "*.example.net", "a" * 64 + ".example.net", "x." * 127 + "xx",
           "256.0.0.1", "192.0.2", "[192.0.2.1]:443", "[::1", "[::g]:443",
           "fe80::1%eth0", "[fe80::1%a b]:443",
           "http://up", "https://up.example.net", "smtp://", "smtp://mx/inbox", "file:", "exec:",
           "exec:  ", "vault://vault.example.net", "vault://vault.example.net/secret",
           "vault://vault.example.net/../secret/a", "azure://vault", "azure://vault/a/b",
           "azure://vault/a b", "up\n", "up\x00", "up\x1b[2J", "exec:a\nb", "file:/a\rb")

    def test_good(self):
        """Each is taken apart as it should be."""
        for text, *wanted in self.GOOD:
            with self.subTest(text):
                source = certferry.parse_source(text)
                self.assertEqual(wanted, [source.kind, source.host, source.port, source.target,
                                          source.text])

    def test_azure(self):
        """A vault's short name is one of Azure's public cloud."""
        for text, host in (("azure://corp/example-com", "corp.vault.azure.net"),
                           ("azure://corp.vault.azure.cn/example-com", "corp.vault.azure.cn")):
            source = certferry.parse_source(text)
            self.assertEqual(("azure", host, 443, "example-com"), (
                source.kind, source.host, source.port, source.target))

    def test_bad(self):
        """Each is a ValueError in printable words that fit a line."""
        for text in self.BAD:
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    certferry.parse_source(text)
                self.assertRegex(str(caught.exception), r"\A[ -~]{1,400}\Z")


class HostNames(unittest.TestCase):
    """Names become lower-case ASCII, addresses their short form."""

    GOOD = (("example.com", "example.com"), ("Example.COM.", "example.com"), ("a", "a"),
            ("_dmarc.example.com", "_dmarc.example.com"), ("a-b.example.com", "a-b.example.com"),
            ("3com.example", "3com.example"), ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("b\u00fccher.example", "xn--bcher-kva.example"), ("192.0.2.1", "192.0.2.1"),
            ("2001:DB8:0:0::1", "2001:db8::1"), ("x" * 63 + ".com", "x" * 63 + ".com"))
    BAD = ("", ".", "..", "a..b", "a b", "a/b", "../a", "a\n", "a\tb", "-a.com", "a-.com",
           "*.a.com", "x" * 64 + ".com", "1.2.3", "1.2.3.4.5", "999.1.1.1", "a\x00b", "a:b",
           "\udcff.com",
           "\u202e.com", "a,b", "$(id)", "a;b", "x" * 254, "fe80::1%eth0", "::1%a\nb")

    def test_good(self):
        """As certferry writes them."""
        for text, wanted in self.GOOD:
            self.assertEqual(wanted, certferry.host_name(text))

    def test_bad(self):
        """Each is a ValueError."""
        for text in self.BAD:
            with self.subTest(text), self.assertRaises(ValueError):
                certferry.host_name(text)


class Conf(unittest.TestCase):
    """NAME.conf: read, its mistakes told by line, edited with comments kept."""

    GOOD = (
        ("nothing", "", {}),
        ("comments and blanks", "# by hand\n\n   # more\n", {}),
        ("one value", "from = up.example.net\n", {"from": ["up.example.net"]}),
        ("no space", "from=up.example.net", {"from": ["up.example.net"]}),
        ("line ends of another system", "from = up\r\nwhen = due\r\n",
         {"from": ["up"], "when": ["due"]}),
        ("a list", "from =\n    up.example.net\n    file:/media/usb\ndomain = *.example.com\n",
         {"from": ["up.example.net", "file:/media/usb"], "domain": ["*.example.com"]}),
        ("tabs", "from =\n\tup\n\tother\n", {"from": ["up", "other"]}),
        ("a value and more", "from = up\n    other\n", {"from": ["up", "other"]}),
        ("a comment in a list", "from =\n    up\n    # spare\n    other\n",
         {"from": ["up", "other"]}),
        ("no interpolation", "deploy-hook = date +%F > /run/$USER %(x)s\n",
         {"deploy-hook": ["date +%F > /run/$USER %(x)s"]}),
        ("shell", "deploy-hook =\n    [ -x /bin/true ] && A=b true; :\n    x=y\n",
         {"deploy-hook": ["[ -x /bin/true ] && A=b true; :", "x=y"]}),
        ("nothing given", "deploy-hook =\nenabled = no\n", {"enabled": ["no"]}),
        ("everything", "from = a\nsni = b\ndomain = c\nca-file = /d\ndeploy-hook = e\n"
         "served-at = localhost:443\nwhen = due\nwarn = 30d\ncritical = 5%\ntimeout = 2.5\n"
         "enabled = yes\n",
         {"from": ["a"], "sni": ["b"], "domain": ["c"], "ca-file": ["/d"], "deploy-hook": ["e"],
          "served-at": ["localhost:443"], "when": ["due"], "warn": ["30d"], "critical": ["5%"],
          "timeout": ["2.5"], "enabled": ["yes"]}))

    BAD = (  # what, text, the lines that may be named, a word of what is said
        ("an unknown key", "from = up\n\n# a\ncolour = green\n", (4,), "colour"),
        ("a key of a run", "force = yes\n", (1,), "force"),
        ("no value", "from = up\nwhen\n", (2,), ""),
        ("a colon", "from: up\n", (1,), ""),
        ("a section", "from = up\n[more]\n", (2,), "section"),
        ("twice", "from = up\nwhen = due\nfrom = other\n", (3,), "from is given twice"),
        ("a bad value", "from = up\nwhen = never\n", (2,), "always"),
        ("a bad value of a list", "when = due\nfrom =\n    up\n    a b\n", (2, 4), "a b"),
        ("two values", "# a\nsni =\n    a\n    b\n", (2, 3, 4), "one value"),
        ("the word in a hook above", "deploy-hook =\n    timeout 9 true\ntimeout = soon\n", (3,),
         "soon"),
        ("the word in another key", "warn = 9d\ndomain = a\ntimeout = 9\nwhen = x\n", (4,), "x"),
        ("an enabled that is neither", "\n\nenabled = maybe\n", (3,), "maybe"),
        ("an escape", "from = up\nsni = \x1b[2J\n", (2,), "x1b"))

    def test_good(self):
        """As given, in the file's order of values."""
        for what, text, wanted in self.GOOD:
            with self.subTest(what):
                self.assertEqual(wanted, {key: list(texts) for key, texts in
                                          certferry.parse_conf(text, "x.conf")[0].items()})

    def test_bad(self):
        """File and line, what is wrong, on one printable line."""
        for what, text, lines, word in self.BAD:
            with self.subTest(what):
                with self.assertRaises(certferry.Failure) as caught:
                    certferry.parse_conf(text, "/etc/x.conf")
                said = str(caught.exception)
                match = re.match(r"/etc/x\.conf line (\d+): [ -~]+\Z", said)
                self.assertIsNotNone(match, said)
                self.assertIn(int(match.group(1)), lines, said)
                self.assertIn(word, said)
                self.assertIsNone(caught.exception.reason)

    def test_values(self):
        """What each key takes."""
        good = {"timeout": "1 0.5 20 3600", "when": "always due", "warn": "25% 0.5% 100% 10d 1.5d",
                "critical": "10% 3d", "enabled": "yes no", "domain": "a.b *.a.b",
                "served-at": "localhost:443 [::1]:443 smtp://localhost 192.0.2.1:25"}
        bad = {"timeout": "0 0.0 -1 soon 1e9 nan inf", "when": "never Due", "warn": "25 d 101% -1d",
               "critical": "10 % ten", "enabled": "true 1 off", "domain": "*.*.a a/b *",
               "served-at": "file:/a exec:true vault://a/b/c", "sni": "a/b *.a"}
        for key, texts in good.items():
            for text in texts.split():
                self.assertEqual({key: [text]},
                                 certferry.parse_conf("{} = {}\n".format(key, text), "x")[0])
        for key, texts in bad.items():
            for text in texts.split():
                with self.subTest(key + " " + text), self.assertRaises(certferry.Failure):
                    certferry.parse_conf("{} = {}\n".format(key, text), "x")

    def test_edit(self):
        """What changed is changed, the rest is the same byte for byte, and it reads back."""
        text = ("# the fleet\nfrom =\n    up\n    # spare, in the cellar\n    other\n\n"
                "# quick\ndeploy-hook = true\nwhen = due\n")
        given = {"from": ["up", "other"], "deploy-hook": ["true"], "when": ["due"]}
        for what, changes in (
                ("nothing", {}), ("another value", {"when": ["always"]}), ("gone", {"when": []}),
                ("a list shorter", {"from": ["up"]}), ("a list gone", {"from": []}),
                ("a list for a value", {"deploy-hook": ["[ -e /x ] && true", "A=b date +%F"]}),
                ("new", {"timeout": ["3"], "domain": ["a.b", "*.a.b"]})):
            with self.subTest(what):
                after = {key: texts for key, texts in dict(given, **changes).items() if texts}
                edited = certferry.edit_conf(text, given, after)
                self.assertEqual(after, certferry.parse_conf(edited, "x")[0])
                for comment in ("# the fleet\n", "# spare, in the cellar\n", "# quick\n"):
                    self.assertIn(comment, edited)
                if not changes:
                    self.assertEqual(text, edited)
                self.assertEqual(edited, certferry.edit_conf(edited, after, after))

    def test_edit_without_a_last_line_end(self):
        """What an editor left open does not run into what is added."""
        edited = certferry.edit_conf("from = up", {"from": ["up"]}, {"from": ["up"], "sni": ["a"]})
        self.assertEqual({"from": ["up"], "sni": ["a"]}, certferry.parse_conf(edited, "x")[0])

    def test_a_new_file(self):
        """One value on the key's line, several below it."""
        self.assertEqual(
            "from =\n    up\n    other\nsni = a\n",
            certferry.edit_conf("", {}, {"from": ["up", "other"], "sni": ["a"]}))


class Environment(unittest.TestCase):
    """certferry/environment, read as systemd reads an EnvironmentFile."""

    def test_good(self):
        """The last of a key counts, an indent is no matter, only a pair of quotes is taken off."""
        for text, wanted in (
                ("A=1\nA=2\n", {"A": "2"}), ("A=1\n  B=2\n# C=3\n\n", {"A": "1", "B": "2"}),
                ("A=it\"\nB='a\"'\n", {"A": "it\"", "B": "a\""}),
                ("A=\"a b\"\r\nB=\n", {"A": "a b", "B": ""})):
            with self.subTest(text):
                self.assertEqual(wanted, certferry.parse_environment(text, "x"))

    def test_bad(self):
        """What is no name of a variable is refused with its line."""
        for line in ("1X=2", "\ufeffA=2", "nonsense"):
            with self.subTest(line):
                with self.assertRaises(certferry.Failure) as caught:
                    certferry.parse_environment("A=1\n" + line + "\n", "x")
                self.assertIn("x line 2: ", str(caught.exception))


class Jitter(unittest.TestCase):
    """A delay that is fixed for a host and spread over a fleet."""

    def test_fixed_and_within(self):
        """The same for the same host, from 0 to below SECONDS, in proportion."""
        for seconds in (0, 1, 3600, 39600):
            for host in ("0123456789abcdef0123456789abcdef", "down1", "down2"):
                delay = certferry.jitter_delay(seconds, host)
                self.assertEqual(delay, certferry.jitter_delay(seconds, host))
                self.assertTrue(0 <= delay < max(seconds, 0.001), delay)
        self.assertAlmostEqual(2 * certferry.jitter_delay(1800, "a"),
                               certferry.jitter_delay(3600, "a"))

    def test_spread(self):
        """A thousand hosts with numbered names: every tenth of the time has its share."""
        tenths = [0] * 10
        for number in range(1000):
            tenths[int(certferry.jitter_delay(10, "{:032x}".format(number)))] += 1
        self.assertTrue(all(60 < count < 140 for count in tenths), tenths)


class Usage(unittest.TestCase):
    """The command line: one line that says what to do, the right status, nothing written."""

    WRONG = (  # arguments, words of the line; the status is 3 where status was meant, else 2
        (["certificates"], "certferry status"), (["statuss"], "certferry status"),
        (["--renew"], "certferry renew"), (["rolback", NAME], "certferry rollback"),
        ([NAME, "-qv"], "--quiet"),
        (["renw"], "certferry renew"), (["localhost"], "host name"), ([""], "host name"),
        (["a/b.example"], "host name"), (["../example.com"], "host name"), ([".."], "host name"),
        (["exam ple.com"], "host name"), (["example.com\n"], "host name"),
        (["\x1b[2J\udcff.com"], "host name"), (["*.*.example.com"], "host name"),
        (["x" * 5000], "host name"), ([".".join(["x" * 59] * 3 + ["x" * 60])], "host name"),
        (["fe80::1%eth0"], "host name"), (["::1%a\nb"], "host name"),
        ([NAME, "other.example.com"], "one NAME"), (["rollback"], "NAME"),
        ([NAME, "--colour"], "--colour"), ([NAME, "--forc"], "--forc"), ([NAME, "-x"], "-x"),
        ([NAME, "--from"], "--from"), ([NAME, "--from", "http://up"], "--from"),
        ([NAME, "--from", "up", "--from", "a b"], "--from"),
        ([NAME, "--sni", "a b"], "--sni"), ([NAME, "-d", "*"], "domain"),
        ([NAME, "--timeout", "0"], "--timeout"), ([NAME, "--when", "never"], "--when"),
        ([NAME, "--deploy-hook", "a\nb"], "--deploy-hook"),
        ([NAME, "--served-at", "file:/a"], "--served-at"),
        ([NAME, "--sni", "a", "--sni", "b"], "--sni"), ([NAME, "--dry-run=yes"], "--dry-run"),
        (["renew", "--force"], "renew NAME --force"), (["renew", "--from", "up"], "--from"),
        (["renew", NAME, "--key", "-"], "--key"), (["renew", "--jitter", "soon"], "--jitter"),
        ([NAME, "--jitter", "1"], "--jitter"), (["renew", "--jitter", ""], "--jitter"),
        ([NAME, "--key", "a", "--key", "b"], "--key"),
        (["renew", "--config-dir", "a"], "--config-dir"),  # beside the one that all have here
        (["status", "statuss"], "host name"), (["status", "--colour"], "--colour"),
        (["--colour", "status"], "--colour"), (["status", "--force"], "--force"),
        (["status", "--metrics", ""], "--metrics"),
        ([NAME, "--deploy-hook", "true", "--deploy-hook", "# quick"], "--deploy-hook"),
        # where a command is meant, none of the options is the hint
        (["delete"], "mean certferry "), (["plugins"], "mean certferry "),
        (["unregister"], "mean certferry "), (["1.2.3"], "mean certferry "),
        (["foo"], "mean certferry "))

    @classmethod
    def setUpClass(cls):
        cls.downstream = world.Downstream().__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.downstream.__exit__()

    def test_wrong(self):
        """Each mistake of the table."""
        before = self.downstream.snapshot()
        for arguments, word in self.WRONG:
            with self.subTest(" ".join(arguments)[:60]):
                result = self.downstream.run(*arguments)
                self.assertEqual((3 if "status" in arguments else 2, ""),
                                 (result.status, result.out), result)
                self.assertRegex(result.err, r"\Acertferry: [ -~]{1,600}\n\Z")
                self.assertIn(word, result.err)
        self.assertEqual(before, self.downstream.snapshot())

    def test_a_value_that_reads_status(self):
        """Only the command status has the statuses of monitoring."""
        self.assertEqual(2, self.downstream.run(NAME, "--deploy-hook", "status", "--x").status)

    def test_the_end_of_options(self):
        """What follows `--` are names."""
        options = ["--config-dir", self.downstream.config]
        for arguments in (["--", NAME], [NAME, "--"]):
            result = self.downstream.run(*options + ["--from", "up.invalid"] + arguments, bare=True)
            self.assertEqual(1, result.status, result)
            self.assertRegex(result.err, r"\Acertferry: {}: ".format(NAME))
        self.assertEqual(0, self.downstream.run(*options + ["renew", "--"], bare=True).status)

    def test_nothing(self):
        """Short help on standard error, six lines at most."""
        result = self.downstream.run(bare=True)
        self.assertEqual((2, ""), (result.status, result.out))
        self.assertLessEqual(len(result.err.splitlines()), 6)
        for word in ("NAME", "renew", "status", "rollback", "--help"):
            self.assertIn(word, result.err)

    def test_help_and_version(self):
        """Both work anywhere and end well; the help names every option."""
        texts = {}
        for words in ((), ("renew",), ("status",), ("rollback",), (NAME,)):
            arguments = ("-h",) + words if words == (NAME,) else words + ("--help",)
            result = self.downstream.run(*arguments, bare=True)
            self.assertEqual((0, ""), (result.status, result.err))
            texts[words] = result.out
        for option in REMEMBERED + OF_A_RUN[:-2] + ["-d", "-q", "-v"]:
            self.assertRegex(texts[()], r"(?m)(^|[ ,]){}\b".format(re.escape(option)))
        for option in ("--jitter", "--metrics", "--force"):
            self.assertIn(option, texts[("renew",)])
        self.assertIn("--metrics", texts[("status",)])
        self.assertTrue(all(len(line) <= 100 for text in texts.values()
                            for line in text.splitlines()))
        result = self.downstream.run("--version", bare=True)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertRegex(result.out, r"\Acertferry \d+\.\d+(\.\d+)?\n\Z")

    def test_options_before_and_after(self):
        """Every option is taken on either side; without a key the end is no-key, not usage."""
        options = ["--from", "up.invalid", "--sni=a.example.com", "-d", NAME, "--domain", NAME,
                   "--ca-file", "/x", "--deploy-hook", "true", "--served-at", "localhost:443",
                   "--when", "due", "--warn", "20%", "--critical", "3d", "--timeout", "1",
                   "--dry-run", "--force", "--no-timer"]
        config = ["--config-dir", self.downstream.config]
        for arguments in (options + config + [NAME, "--json"], config + ["--json", NAME] + options,
                          ["--json"] + options[:6] + [NAME] + options[6:] + config):
            status, document = self.downstream.json(*arguments, bare=True)
            self.assertEqual((1, "no-key", True), (
                status, document["lineages"][0]["reason"], document["dry_run"]))
        for arguments in (["-q", "--jitter", "0", "renew", "--dry-run"], ["-v", "renew", "--json"],
                          ["--jitter=0", "--quiet", "--verbose", "renew"]):
            self.assertEqual(0, self.downstream.run(*arguments).status)
        for arguments in (["-q", "status"], ["--json", "status"], ["status", NAME, "--verbose"]):
            self.assertEqual(3, self.downstream.run(*arguments).status)


if __name__ == "__main__":
    unittest.main()
