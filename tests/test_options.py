"""Options and records: what the command line, NAME.conf, NAME.state and environment take."""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import unittest
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

NAME = "example.com"
REMEMBERED = """--from --sni --domain --ca-file --deploy-hook --served-at --when --warn --critical
    --timeout""".split()
OF_A_RUN = "--config-dir --dry-run --json --quiet --verbose --help --version".split()
NOT_ASCII = "b\u00fccher.example"

# --------------------------------------------------------------------------------------------------
# Sources and names
# --------------------------------------------------------------------------------------------------


class Sources(unittest.TestCase):
    """--from: what a source is, its default port, and how messages show it."""

    UP = "up.example.net"
    SHELL = "ssh up.example.net cat 'a b' | tee c"
    VAULT = "vault.example.net"

    GOOD = (  # text, kind, host, port, target, what a person reads ("" for the text itself)
        (UP, "tls", UP, 443, "", UP + ":443"),
        ("UP.Example.Net", "tls", UP, 443, "", UP + ":443"),
        ("up.example.net:8443", "tls", UP, 8443, "", ""),
        ("up", "tls", "up", 443, "", "up:443"),
        ("192.0.2.1", "tls", "192.0.2.1", 443, "", "192.0.2.1:443"),
        ("[2001:db8::1]:8443", "tls", "2001:db8::1", 8443, "", ""),
        ("[2001:db8::1]", "tls", "2001:db8::1", 443, "", "[2001:db8::1]:443"),
        ("2001:DB8:0::1", "tls", "2001:db8::1", 443, "", "[2001:db8::1]:443"),
        # an absolute name: no search domain is tried
        ("up.example.net.", "tls", "up.example.net.", 443, "", "up.example.net.:443"),
        ("Up.example.net.:8443", "tls", "up.example.net.", 8443, "", "up.example.net.:8443"),
        ("smtp://up.", "smtp", "up.", 25, "", "smtp://up.:25"),
        ("vault://up.:1/kv/a", "vault", "up.", 1, "kv/a", ""),
        ("smtp://mx.example.com", "smtp", "mx.example.com", 25, "", "smtp://mx.example.com:25"),
        ("smtp://mx.example.com:587", "smtp", "mx.example.com", 587, "", ""),
        ("imap://[::1]", "imap", "::1", 143, "", "imap://[::1]:143"),
        ("pop3://up", "pop3", "up", 110, "", "pop3://up:110"),
        ("ftp://up", "ftp", "up", 21, "", "ftp://up:21"),
        ("ldap://up", "ldap", "up", 389, "", "ldap://up:389"),
        ("xmpp://up", "xmpp", "up", 5222, "", "xmpp://up:5222"),
        ("postgres://up", "postgres", "up", 5432, "", "postgres://up:5432"),
        ("mysql://up", "mysql", "up", 3306, "", "mysql://up:3306"),
        ("file:/media/usb/example.com", "file", "", 0, "/media/usb/example.com", ""),
        ("exec:" + SHELL, "exec", "", 0, SHELL, ""),
        ("vault://vault.example.net/kv/certs/a.b", "vault", VAULT, 8200, "kv/certs/a.b", ""),
        ("vault://vault.example.net:443/kv/a", "vault", VAULT, 443, "kv/a", ""),
        ("azure://corp/a-b", "azure", "corp.vault.azure.net", 443, "a-b", ""),
        ("azure://a.vault.azure.cn/a-b", "azure", "a.vault.azure.cn", 443, "a-b", ""),
    )
    BAD = (
        *("", " ", "a b", "up.example.net:", "up.example.net:0", "up.example.net:65536"),
        *("up.example.net:https", "up.example.net/", "user@up.example.net", "-up.example.net"),
        *("up..example.net", "up.example.net..", ".", "*.example.net", "a" * 64 + ".example.net"),
        *("x." * 127 + "xx", "256.0.0.1", "192.0.2", "[192.0.2.1]:443", "[::1", "[::g]:443"),
        *("fe80::1%eth0", "[fe80::1%a b]:443", "http://up", "https://up.example.net", "smtp://"),
        *("smtp://mx/inbox", "file:", "exec:", "exec:  ", "vault://vault.example.net"),
        *("vault://vault.example.net/secret", "vault://vault.example.net/../secret/a"),
        *("azure://vault", "azure://vault/a/b", "azure://vault/a b", "up\n", "up\x00"),
        *("up\x1b[2J", "exec:a\nb", "file:/a\rb", "up:\u0664\u0664\u0663", "vault://up/kv/\u00e4"),
    )

    def test_good(self):
        """Each is taken apart as it should be."""
        for text, kind, host, port, target, shown in self.GOOD:
            with self.subTest(text):
                wanted = certferry.Source(kind, host, port, target, shown or text)
                self.assertEqual(certferry.parse_source(text), wanted)

    def test_bad(self):
        """Each is a ValueError in printable words that fit a line."""
        for text in self.BAD:
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    certferry.parse_source(text)
                self.assertRegex(str(caught.exception), r"\A[ -~]{1,400}\Z")


class HostNames(unittest.TestCase):
    """Names become lower-case ASCII, addresses their short form."""

    GOOD = (
        ("example.com", "example.com"),
        ("Example.COM.", "example.com"),
        ("a", "a"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        ("a-b.example.com", "a-b.example.com"),
        ("3com.example", "3com.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("x" * 63 + ".com", "x" * 63 + ".com"),
    )
    BAD = (
        *("", ".", "..", "a..b", "a b", "a/b", "../a", "a\n", "a\tb", "-a.com", "a-.com"),
        *("*.a.com", "x" * 64 + ".com", "1.2.3", "1.2.3.4.5", "999.1.1.1", "a\x00b", "a:b"),
        *("\udcff.com", "\u202e.com", "a,b", "$(id)", "a;b", "x" * 254, "fe80::1%eth0"),
        "::1%a\nb",
    )
    OTHER_LETTERS = (  # what they become depends on the edition of IDNA
        NOT_ASCII,
        "stra\u00dfe.example",
        "\u03c3\u03c2.example",
        "a\u200db.example",
        "\u212aelvin.example",
    )

    def test_good(self):
        """As certferry writes them."""
        for text, wanted in self.GOOD:
            self.assertEqual(certferry.host_name(text), wanted)

    def test_bad(self):
        """Each is a ValueError."""
        for text in self.BAD:
            with self.subTest(text), self.assertRaises(ValueError):
                certferry.host_name(text)

    def test_other_letters(self):
        """They are refused, wherever a name is written, with what to write instead."""
        for name in self.OTHER_LETTERS:
            for function, text in (
                (certferry.host_name, name),
                (certferry.parse_source, name),
                (certferry.parse_source, f"smtp://{name}:25"),
                (certferry.parse_source, f"vault://{name}/kv/a"),
                (certferry.parse_domain, "*." + name),
                (certferry.parse_served, name + ":443"),
            ):
                with self.subTest(text, function=function.__name__):
                    self.assertRaisesRegex(ValueError, "xn--", function, text)


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


class Conf(unittest.TestCase):
    """NAME.conf: read, its mistakes told by line, edited with comments kept."""

    GOOD = (
        ("nothing", "", {}),
        ("comments and blanks", "# by hand\n\n   # more\n", {}),
        ("one value", "from = up.example.net\n", {"from": ["up.example.net"]}),
        ("no space", "from=up.example.net", {"from": ["up.example.net"]}),
        ("another system", "from = up\r\nwhen = due\r\n", {"from": ["up"], "when": ["due"]}),
        (
            "lists",
            "from =\n    up.example.net\n    file:/media/usb\ndomain = *.example.com\n",
            {"from": ["up.example.net", "file:/media/usb"], "domain": ["*.example.com"]},
        ),
        ("tabs", "from =\n\tup\n\tother\n", {"from": ["up", "other"]}),
        ("a value and more", "from = up\n    other\n", {"from": ["up", "other"]}),
        ("a comment in a list", "from =\n  up\n  # spare\n  other\n", {"from": ["up", "other"]}),
        (
            "no interpolation",
            "deploy-hook = date +%F > /run/$USER %(x)s\n",
            {"deploy-hook": ["date +%F > /run/$USER %(x)s"]},
        ),
        (
            "shell",
            "deploy-hook =\n    [ -x /bin/true ] && A=b true; :\n    x=y\n",
            {"deploy-hook": ["[ -x /bin/true ] && A=b true; :", "x=y"]},
        ),
        ("nothing given", "deploy-hook =\nenabled = no\n", {"enabled": ["no"]}),
    )
    EVERYTHING = {
        "from": ["a", "file:/b"],
        "sni": ["b"],
        "domain": ["c", "*.d"],
        "ca-file": ["/d"],
        "deploy-hook": ["e", "f"],
        "served-at": ["localhost:443", "smtp://localhost"],
        "when": ["due"],
        "warn": ["30d"],
        "critical": ["5%"],
        "timeout": ["2.5"],
        "enabled": ["yes"],
    }
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
        ("in a hook above", "deploy-hook =\n  timeout 9 true\ntimeout = soon\n", (3,), "soon"),
        ("in another key", "warn = 9d\ndomain = a\ntimeout = 9\nwhen = x\n", (4,), "x"),
        ("an enabled that is neither", "\n\nenabled = maybe\n", (3,), "maybe"),
        ("an escape", "from = up\nsni = \x1b[2J\n", (2,), "x1b"),
        ("other letters", f"from = up\ndomain = {NOT_ASCII}\n", (2,), "xn--"),
        ("NUL", "from = up\nwhen = \0\n", (2,), ""),
    )

    def test_good(self):
        """As given, in the file's order of values."""
        for what, text, wanted in self.GOOD:
            with self.subTest(what):
                self.assertEqual(certferry.parse_conf(text, "x.conf")[0], wanted)

    def test_everything(self):
        """Written and read again; the options in force are values of their kinds."""
        text = certferry.edit_conf("", self.EVERYTHING, "x")
        given, options = certferry.parse_conf(text, "x.conf")
        self.assertEqual(given, self.EVERYTHING)
        self.assertEqual([source.kind for source in options.sources], ["tls", "file"])
        self.assertEqual([service.port for service in options.served_at], [443, 25])
        self.assertEqual((options.timeout, options.warn, options.when), (2.5, "30d", "due"))
        self.assertEqual(options.deploy_hooks, ("e", "f"))

    def test_defaults(self):
        """CONTRACT's."""
        options = certferry.parse_conf("", "x.conf")[1]
        found = (options.when, options.warn, options.critical, options.timeout, options.enabled)
        self.assertEqual(found, ("always", "25%", "10%", 20, "yes"))

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
        good = {
            "timeout": "1 0.5 20 3600",
            "when": "always due",
            "warn": "25% 0.5% 100% 10d 1.5d",
            "critical": "10% 3d",
            "enabled": "yes no",
            "domain": "a.b *.a.b 192.0.2.1",
            "served-at": "localhost:443 [::1]:443 smtp://localhost 192.0.2.1:25 localhost.:443",
            "sni": "a.b",
        }
        bad = {
            "timeout": "0 0.0 -1 soon 1e9 nan inf",
            "when": "never Due",
            "warn": "25 d 101% -1d",
            "critical": "10 % ten",
            "enabled": "true 1 off",
            "domain": "*.*.a a/b *",
            "served-at": "file:/a exec:true vault://a/b/c azure://a/b",
            "sni": "a/b *.a",
        }
        for key, texts in good.items():
            for text in texts.split():
                given = certferry.parse_conf(f"{key} = {text}\n", "x")[0]
                self.assertEqual(given, {key: [text]})
        for key, texts in bad.items():
            for text in texts.split():
                with self.subTest(f"{key} {text}"), self.assertRaises(certferry.Failure):
                    certferry.parse_conf(f"{key} = {text}\n", "x")

    def test_a_name_to_ask_for(self):
        """It never has the dot of an absolute name (RFC 6066, 3)."""
        self.assertEqual(certferry.parse_conf("sni = a.b.\n", "x")[1].sni, "a.b")
        self.assertEqual(certferry.parse_conf("domain = a.b.\n", "x")[1].domains, ("a.b",))

    def test_edit(self):
        """What changed is changed, the rest is the same byte for byte, and it reads back."""
        text = (
            "# the fleet\nfrom =\n    up\n    # spare, in the cellar\n    other\n\n"
            "# quick\ndeploy-hook = true\nwhen = due\n"
        )
        given = {"from": ["up", "other"], "deploy-hook": ["true"], "when": ["due"]}
        for what, changes in (
            ("nothing", {}),
            ("another value", {"when": ["always"]}),
            ("gone", {"when": []}),
            ("a list shorter", {"from": ["up"]}),
            ("a list gone", {"from": []}),
            ("a list for a value", {"deploy-hook": ["[ -e /x ] && true", "A=b date +%F"]}),
            ("new", {"timeout": ["3"], "domain": ["a.b", "*.a.b"]}),
        ):
            with self.subTest(what):
                after = dict(given, **changes)
                after = {key: texts for key, texts in after.items() if texts}
                edited = certferry.edit_conf(text, after, "x")
                self.assertEqual(certferry.parse_conf(edited, "x")[0], after)
                for comment in ("# the fleet\n", "# spare, in the cellar\n", "# quick\n"):
                    self.assertIn(comment, edited)
                if not changes:
                    self.assertEqual(edited, text)
                self.assertEqual(certferry.edit_conf(edited, after, "x"), edited)

    def test_edit_without_a_last_line_end(self):
        """What an editor left open does not run into what is added."""
        after = {"from": ["up"], "sni": ["a"]}
        edited = certferry.edit_conf("from = up", after, "x")
        self.assertEqual(certferry.parse_conf(edited, "x")[0], after)

    def test_a_new_file(self):
        """One value on the key's line, several below it."""
        given = {"from": ["up", "other"], "sni": ["a"]}
        text = "from =\n    up\n    other\nsni = a\n"
        self.assertEqual(certferry.edit_conf("", given, "x"), text)

    def test_merge(self):
        """What is given again replaces, an empty value forgets, the rest is kept."""
        given = {"from": ["up", "other"], "sni": ["a"]}
        for changes, wanted in (
            ({}, given),
            ({"from": ["new"]}, {"from": ["new"], "sni": ["a"]}),
            ({"sni": [""]}, {"from": ["up", "other"]}),
            ({"from": ["", "new"]}, {"from": ["new"], "sni": ["a"]}),
            ({"when": ["due"]}, {"from": ["up", "other"], "sni": ["a"], "when": ["due"]}),
        ):
            self.assertEqual(certferry.merge_options(given, changes), wanted)

    def test_advice(self):
        """A whole command, every option in it, as a shell takes it apart again."""
        changes = {
            "from": ["exec:cat 'a b'", "up"],
            "deploy-hook": ["systemctl reload-or-restart nginx", 'echo "$(id)"; true', ""],
        }
        text = certferry.command_text("a.b", changes, ("--key", "-"))
        words = ["certferry", "a.b", "--key", "-"]
        for key, texts in changes.items():
            for each in texts:
                words += ["--" + key, each]
        self.assertEqual(shlex.split(text), words)


class State(unittest.TestCase):
    """NAME.state: written and read again; damage is told by line, and loses nothing."""

    FULL = certferry.State(
        result="refused",
        reason="key-mismatch",
        detail="up.example.net:443 shows = another [key] # really",
        culprit="up.example.net:443",
        since=1800000000,
        runs=14,
        good=1790000000,
        source="exec:cat 'a = b'",
        upstream_not_after=1810000000,
        key_file="1:2:3",
        told="warning",
        told_at=1800000001,
    )

    def test_round_trip(self):
        """Whole, empty, and each field alone."""
        states = [self.FULL, certferry.NO_STATE._replace(result="unchanged")]
        for field in certferry.State._fields[1:]:
            value = {field: getattr(self.FULL, field)}
            states.append(certferry.NO_STATE._replace(result="failed", **value))
        for state in states:
            text = certferry.format_state(state)
            self.assertEqual(certferry.parse_state(text, "x"), state)

    def test_others(self):
        """Nothing at all is no state, and what a later version wrote does no harm."""
        self.assertEqual(certferry.parse_state("", "x"), certferry.NO_STATE)
        text = certferry.format_state(self.FULL) + "colour = green\n"
        self.assertEqual(certferry.parse_state(text, "x"), self.FULL)

    def test_damage(self):
        """Told with file and line, as a broken NAME.conf is."""
        for text in (
            "result = unchanged\nruns = many\n",
            "result = unchanged\nsince = yesterday\n",
            "result = unchanged\ngood = 2026-02-30T00:00:00Z\n",
            "result = unchanged\n\0\0\0\0",
            "\x7fELF",
        ):
            with self.subTest(text):
                with self.assertRaises(certferry.Failure) as caught:
                    certferry.parse_state(text, "/x/y.state")
                self.assertRegex(str(caught.exception), r"\A/x/y\.state line \d+: [ -~]+\Z")

    def test_times(self):
        """ISO 8601 in UTC, any year of the calendar."""
        for seconds, text in (
            (0, "1970-01-01T00:00:00Z"),
            (951827696, "2000-02-29T12:34:56Z"),
            (4107542399, "2100-02-28T23:59:59Z"),
            (253402300799, "9999-12-31T23:59:59Z"),
        ):
            self.assertEqual(certferry.iso_time(seconds), text)
            self.assertEqual(certferry.utc_seconds(text), seconds)
        self.assertIsNone(certferry.iso_time(None))
        for text in ("2100-02-29T00:00:00Z", "2026-13-01T00:00:00Z", "2026-01-01T24:00:00Z", ""):
            with self.subTest(text), self.assertRaises(ValueError):
                certferry.utc_seconds(text)


class Environment(unittest.TestCase):
    """certferry/environment, read as systemd reads an EnvironmentFile."""

    def test_good(self):
        """The last of a key counts, an indent is no matter, only a pair of quotes is taken off."""
        for text, wanted in (
            ("A=1\nA=2\n", {"A": "2"}),
            ("A=1\n  B=2\n# C=3\n\n", {"A": "1", "B": "2"}),
            ("A=it\"\nB='a\"'\n", {"A": 'it"', "B": 'a"'}),
            ('A="a b"\r\nB=\n', {"A": "a b", "B": ""}),
        ):
            with self.subTest(text):
                self.assertEqual(certferry.parse_environment(text, "x"), wanted)

    def test_bad(self):
        """What is no name of a variable is refused with its line."""
        for line in ("1X=2", "\ufeffA=2", "nonsense", "export A=1", "A=a\0b"):
            with self.subTest(line):
                with self.assertRaises(certferry.Failure) as caught:
                    certferry.parse_environment(f"A=1\n{line}\n", "x")
                self.assertIn("x line 2: ", str(caught.exception))


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


class Slept(BaseException):
    """In place of a sleep, which takes long; no exception that a command line ends with."""


class Jitter(unittest.TestCase):
    """A delay that is fixed for a host and spread over a fleet."""

    def delay(self, machine, host, seconds=3600, *before):
        """How long `renew --jitter` sleeps on a host with this machine-id and name."""
        names = os.uname_result(["Linux", host, "6.1", "#1", "x86_64"])
        machine_id = mock.mock_open(read_data=machine)
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(mock.patch.object(certferry.os, "uname", lambda: names))
            enter(mock.patch.object(certferry, "open", machine_id, create=True))
            sleep = enter(mock.patch.object(certferry.time, "sleep", side_effect=Slept))
            stack.enter_context(self.assertRaises(Slept))
            certferry.main(["renew", *before, "--jitter", str(seconds)])
        return sleep.call_args[0][0]

    def test_fixed_and_within(self):
        """The same for the same host, from 0 to below SECONDS, in proportion."""
        for seconds in (0, 1, 3600, 39600):
            delay = self.delay("0123456789abcdef", "down1", seconds)
            self.assertEqual(delay, self.delay("0123456789abcdef", "down1", seconds))
            self.assertTrue(0 <= delay < max(seconds, 0.001), delay)
        self.assertAlmostEqual(2 * self.delay("a", "b", 1800), self.delay("a", "b", 3600))

    def test_clones(self):
        """Machine-id and host name together: clones share the one, strangers the other."""
        delays = [self.delay(machine, host) for machine in "ab" for host in ("web1", "web2")]
        self.assertEqual(len(set(delays)), 4)

    def test_spread(self):
        """A thousand hosts with numbered names: every tenth of the time has its share."""
        tenths = [0] * 10
        for number in range(1000):
            tenths[int(certferry.jitter_delay(10, f"cloned web{number}"))] += 1
        self.assertTrue(all(60 < count < 140 for count in tenths), tenths)


@contextlib.contextmanager
def captured(descriptor):
    """Collect what is written to a descriptor; the value has it as text when the block ends."""
    text = io.StringIO()
    kept = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)
            file.seek(0)
            text.write(file.read().decode("utf-8", "backslashreplace"))


def ask(*arguments):
    """How a command ends that is over before it begins: help or wrong usage, in this process."""
    with captured(1) as out, captured(2) as err:
        status = certferry.main(list(arguments))
    return world.Result(status, out.getvalue(), err.getvalue())


class Systemctl(unittest.TestCase):
    """The timer is started where systemd runs."""

    def test_start_timer(self):
        """What systemctl says is read; the line tells when the timer runs next."""
        folder = world.scratch(self)
        script = "#!/bin/sh\ncase $1 in is-active) exit 3;; show) echo 'Next 03:17:00 UTC';; esac\n"
        world.write(os.path.join(folder, "systemctl"), script, 0o755)
        run = mock.Mock(config=certferry.CONFIG_DIR, dry_run=False)
        path = "{}:{}".format(folder, os.environ["PATH"])
        with mock.patch.dict(os.environ, PATH=path), mock.patch("os.path.isdir", lambda _: True):
            self.assertTrue(certferry.start_timer(run))
        run.report.line.assert_called_once_with("certferry.timer: started, next run 03:17")


class Usage(unittest.TestCase):
    """The command line: one line that says what to do, the right status, nothing written."""

    WRONG = (  # arguments, a word of the line; the status is 3 for the command status, else 2
        (["certificates"], "status"),
        (["localhost"], "host name"),
        (["example", "--from", "up"], "renew, status, rollback"),
        ([""], "host name"),
        (["a/b.example"], "host name"),
        (["../example.com"], "host name"),
        ([".."], "host name"),
        (["exam ple.com"], "host name"),
        (["example.com\n"], "host name"),
        (["\x1b[2J\udcff.com"], ""),
        (["*.*.example.com"], "host name"),
        (["x" * 5000], "host name"),
        ([".".join(["x" * 59] * 3 + ["x" * 60])], "host name"),
        (["fe80::1%eth0"], "host name"),
        (["::1%a\nb"], "host name"),
        (["1.2.3"], "host name"),
        ([NOT_ASCII], "xn--"),
        (["*." + NOT_ASCII], "xn--"),
        (["renew", NOT_ASCII], "xn--"),
        ([NAME, "-d", NOT_ASCII], "xn--"),
        ([NAME, "--from", NOT_ASCII], "xn--"),
        ([NAME, "--sni", NOT_ASCII], "xn--"),
        ([NAME, "--served-at", NOT_ASCII + ":443"], "xn--"),
        ([NAME, "other.example.com"], "one NAME"),
        (["rollback"], "NAME"),
        (["rollback", NAME, "other.example.com"], "NAME"),
        ([NAME, "--colour"], "--colour"),
        ([NAME, "--colour=green"], "--colour"),
        ([NAME, "--forc"], "--forc"),
        ([NAME, "-x"], "-x"),
        (["--renew"], "--renew"),
        ([NAME, "--enabled", "no"], "--enabled"),
        ([NAME, "--from"], "--from"),
        ([NAME, "--deploy-hook", "--dry-run"], "--deploy-hook"),
        ([NAME, "--from", "http://up"], "--from"),
        ([NAME, "--from", "up", "--from", "a b"], "--from"),
        ([NAME, "--sni", "a b"], "--sni"),
        ([NAME, "-d", "*"], "domain"),
        ([NAME, "--timeout", "0"], "--timeout"),
        ([NAME, "--when", "never"], "--when"),
        ([NAME, "--warn", "25"], "--warn"),
        ([NAME, "--deploy-hook", "a\nb"], "--deploy-hook"),
        ([NAME, "--deploy-hook", "true", "--deploy-hook", "# quick"], "--deploy-hook"),
        ([NAME, "--served-at", "file:/a"], "--served-at"),
        ([NAME, "--sni", "a", "--sni", "b"], "--sni"),
        ([NAME, "--dry-run=yes"], "--dry-run"),
        (["renew", "--force"], "NAME"),
        (["rollback", NAME, "--force"], "--force"),
        (["renew", "--from", "up"], "--from"),
        (["renew", NAME, "--key", "-"], "--key"),
        (["renew", "--jitter", "soon"], "--jitter"),
        (["renew", "--jitter", "-1"], "--jitter"),
        (["renew", "--jitter", ""], "--jitter"),
        ([NAME, "--jitter", "1"], "--jitter"),
        ([NAME, "--metrics", "x"], "--metrics"),
        ([NAME, "--key="], "--key"),
        (["renew", "--config-dir", ""], "--config-dir"),
        (["status", "statuss"], "host name"),
        (["status", "--colour"], "--colour"),
        (["--colour", "status"], "--colour"),
        (["status", "--force"], "--force"),
        (["status", "--metrics", ""], "--metrics"),
        (["--json", "status", "--metrics"], "--metrics"),
        (["status", "--deploy-hook", "true"], "--deploy-hook"),
    )

    @classmethod
    def setUpClass(cls):
        cls.downstream = world.Downstream().__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.downstream.__exit__()

    def test_wrong(self):
        """Each mistake of the table: one printable line."""
        for arguments, word in self.WRONG:
            with self.subTest(" ".join(arguments)[:60]):
                result = ask(*arguments)
                status = 3 if "status" in arguments else 2
                self.assertEqual((result.status, result.out), (status, ""), result)
                self.assertRegex(result.err, r"\Acertferry: [ -~]{1,600}\n\Z")
                self.assertIn(word, result.err)

    def test_the_process(self):
        """The same from a shell, and nothing is written."""
        before = self.downstream.snapshot()
        for arguments in (["localhost"], ["status", "--colour"], ["\x1b\udcff"]):
            result = self.downstream.run(*arguments)
            status = 3 if "status" in arguments else 2
            self.assertEqual((result.status, result.out), (status, ""))
            self.assertRegex(result.err, r"\Acertferry: [ -~]{1,600}\n\Z")
        self.assertEqual(self.downstream.snapshot(), before)
        result = self.downstream.run(NAME, "--key=--")  # a list to argparse before Python 3.13
        self.assertIn(result.status, (1, 2))
        self.assertRegex(result.err, r"\Acertferry: [ -~]{1,600}\n\Z")

    def test_a_value_that_reads_status(self):
        """Only the command status has the statuses of monitoring."""
        self.assertEqual(ask(NAME, "--deploy-hook", "status", "--x").status, 2)

    def test_given_again(self):
        """The last value of a run's option counts, as in other commands."""
        delays = Jitter().delay("a", "b", 9), Jitter().delay("a", "b", 9, "--jitter", "soon")
        self.assertEqual(*delays)

    def test_metrics_that_are_no_file(self):
        """A FIFO, a folder or a link would be replaced for the whole host: refused at once."""
        folder = world.scratch(self)
        os.mkfifo(folder + "/fifo")
        os.mkdir(folder + "/folder")
        os.symlink(world.write(folder + "/file", "before\n"), folder + "/link")
        kinds = {name: os.lstat(f"{folder}/{name}") for name in ("fifo", "folder", "link")}
        for name, before in kinds.items():
            for command, status in (("renew", 2), ("status", 3)):
                with self.subTest(name, command=command):
                    result = ask(command, "--metrics", f"{folder}/{name}")
                    self.assertEqual((result.status, result.out), (status, ""), result)
                    self.assertRegex(result.err, rf"\Acertferry: [ -~]*{name}[ -~]+\n\Z")
                    self.assertEqual(os.lstat(f"{folder}/{name}"), before)
        self.assertEqual(world.read(folder + "/file"), b"before\n")

    def test_the_end_of_options(self):
        """What follows `--` are names."""
        options = ["--config-dir", self.downstream.config, "--from", "up.invalid"]
        for arguments in (["--", NAME], [NAME, "--"]):
            result = self.downstream.run(*options, *arguments, bare=True)
            self.assertEqual(result.status, 1, result)
            self.assertRegex(result.err, rf"\Acertferry: {NAME}: ")

    def test_options_before_and_after(self):
        """Every option is taken on either side; without a key the end is no-key, not usage."""
        words = (
            f"--from up.invalid --sni=a.example.com -d {NAME} --domain {NAME} --ca-file /x "
            "--deploy-hook true --served-at localhost:443 --when due --warn 20% --critical 3d "
            "--timeout 1 --dry-run --force --no-timer"
        ).split()
        config = ["--config-dir", self.downstream.config]
        for arguments in (
            [*words, *config, NAME],
            [*config, NAME, *words],
            [*words[:5], NAME, *words[5:], *config],
        ):
            status, document = self.downstream.json(*arguments, bare=True)
            found = (status, document["lineages"][0]["reason"], document["dry_run"])
            self.assertEqual(found, (1, "no-key", True))
        for arguments in (["-q", "--jitter", "0", "renew"], ["renew", "--jitter=0", "-v"]):
            self.assertEqual(self.downstream.run(*arguments).status, 0)
        for arguments in (["-q", "status"], ["status", NAME, "--verbose"]):
            self.assertEqual(self.downstream.run(*arguments).status, 3)


class Help(unittest.TestCase):
    """Help, on one screen, whatever the terminal."""

    def test_nothing(self):
        """Short help on standard error, six lines at most."""
        result = world.certferry(bare=True)
        self.assertEqual((result.status, result.out), (2, ""))
        self.assertLessEqual(len(result.err.splitlines()), 6)
        for word in ("NAME", "renew", "status", "rollback", "--help"):
            self.assertIn(word, result.err)

    def test_screens(self):
        """A screen for each command, which names its options and no other command's."""
        common, of_renew = OF_A_RUN, ["--jitter", "--metrics", "--force"]
        screens = {
            (): ([*common, "renew", "status", "rollback", "-q", "-v"], []),
            ("renew",): ([*common, *of_renew], ["--key", "--from"]),
            ("status",): ([*common, "--metrics"], ["--force", "--jitter"]),
            ("rollback",): (common, ["--force PEM", "--metrics", "--from"]),
            (NAME,): ([*common, *REMEMBERED, "-d", "--key", "--force", "--no-timer"], ["--jitter"]),
        }
        seen = set()
        for words, (named, others) in screens.items():
            for arguments in ([*words, "--help"], ["-h", *words]):
                with self.subTest(" ".join(arguments)):
                    result = ask(*arguments)
                    self.assertEqual((result.status, result.err), (0, ""))
                    seen.add(result.out)
                    for word in named:
                        self.assertRegex(result.out, rf"(?m)(^|[ ,(]){re.escape(word)}\b")
                    for word in others:
                        self.assertNotIn(word, result.out)
                    self.assertLessEqual(max(map(len, result.out.splitlines())), 80)
                    self.assertLessEqual(len(result.out.splitlines()), 40)
        self.assertEqual(len(seen), len(screens))

    def test_version(self):
        """Anywhere, and from a shell."""
        for arguments in (["--version"], ["renew", "--version"], [NAME, "--version"]):
            result = ask(*arguments)
            self.assertEqual((result.status, result.err), (0, ""))
            self.assertRegex(result.out, r"\Acertferry \d+\.\d+(\.\d+)?\n\Z")
        self.assertEqual(world.certferry("--version", bare=True), result)


class Secrets(unittest.TestCase):
    """A value that looks like a private key is never repeated, wherever it was pasted."""

    @classmethod
    def setUpClass(cls):
        pem = world.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout")
        lines = pem.splitlines()
        cls.body = "".join(lines[1:-1])
        cls.forms = {
            "the file": pem,
            "one line": " ".join(lines),
            "no line ends": "".join(lines),
            "without its head": cls.body,
            "the end of it": "".join(lines[1:]),
        }

    def check(self, run, *arguments):
        """The command fails, and no piece of the key is in what it says."""
        result = run(*arguments)
        self.assertNotEqual(result.status, 0)
        for at in range(0, len(self.body) - 24, 8):
            self.assertNotIn(self.body[at : at + 24], result.out + result.err)

    def test_wrong_usage(self):
        """As a NAME, as an option's value, as an option."""
        for form, text in self.forms.items():
            for arguments in (
                [text],
                [text + ".example.com"],
                ["renew", text],
                ["status", text],
                ["--" + text, NAME],
                [NAME, f"--{text}=1"],
                [NAME, "--colour=" + text],
                [NAME, "--force=" + text],
                [NAME, "--from", text],
                [NAME, "--from", "smtp://" + text],
                [NAME, "--sni", text],
                [NAME, "-d", text],
                [NAME, "--served-at", text],
                [NAME, "--when", text],
                [NAME, "--warn", text],
                [NAME, "--timeout", text],
                ["renew", "--jitter", text],
            ):
                with self.subTest(form, arguments=[word[:20] for word in arguments]):
                    self.check(ask, *arguments)

    def test_without_quotes(self):
        """As a shell takes `$(cat privkey.pem)` apart."""
        words = self.forms["the file"].split()
        for before in ([NAME], [NAME, "--key"], [NAME, "--from"], ["renew"], []):
            self.check(ask, *before, *words)

    def test_key(self):
        """--key takes a file's name: the key itself is not found, and not repeated."""
        downstream = world.Downstream().started(self)
        for form, text in self.forms.items():
            with self.subTest(form):
                self.check(downstream.run, NAME, "--from", "up.invalid", "--key", text)
                self.check(downstream.run, NAME, "--from", "up.invalid", "--key=" + text)


if __name__ == "__main__":
    unittest.main()
