"""Health by the clock, status, metrics, alerts, output, and proof that a service serves it.

Lineages are ferried from files where the source is no matter: that is quick, and `warn = 100%` in
a conf makes any of them one to warn of.
"""

import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import time
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import certferry
from tests import world

NAME = "a.example.com"
HOUR, DAY = 3600, world.DAY
HEALTHS = ("ok", "due", "warning", "critical")
AUTHORITY = FIRST = NEWER = OTHER = None


def load_tests(_loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK those without the README's rules, a matter of promtool."""
    return world.without(tests, Rules)


def setUpModule():
    """Mint what all tests share: FIRST and NEWER are for one key, OTHER is for another."""
    global AUTHORITY, FIRST, NEWER, OTHER
    AUTHORITY = world.Authority(world.scratch())
    FIRST = AUTHORITY.issue(["*.example.com"])
    NEWER, OTHER = again(), AUTHORITY.issue(["*.example.com"])


def again(**how):
    """Another certificate for FIRST's key."""
    return AUTHORITY.issue(["*.example.com"], key=FIRST.key, **how)


def lived(lifetime, left):
    """A certificate of so many seconds, so many of them left."""
    return again(not_before=time.time() + left - lifetime, not_after=time.time() + left)


# ---------------------------------------------------------------- clocks, in this process

NOW = 1800000000


def lineage(lifetime, checked=0, result="unchanged", **how):
    """A Lineage whose certificate began at NOW; times (checked, good) are seconds after that.

    how: options as a conf has them, and fields of the state.
    """
    state = {key: how.pop(key) for key in list(how) if key in certferry.State._fields}
    if state.get("good") is not None:
        state["good"] += NOW
    leaf = certferry.Certificate._make([b""] * len(certferry.Certificate._fields))._replace(
        not_before=NOW, not_after=NOW + lifetime)
    return certferry.Lineage(
        certferry.Place("/etc/letsencrypt", NAME), {}, certferry.parse_options(
            {key: [text] for key, text in how.items()}),
        certferry.NO_STATE._replace(result=result, **state),
        None if checked is None else NOW + checked,
        certferry.Version(1, "", leaf, ()), "privkey.pem", ())


def health(one, after, misfit=False):
    """Its health so many seconds after NOW."""
    return certferry.health_of(one, NOW + int(after), misfit)[0]


def turn(wanted, at, end):
    """The first second in [0, end] at which the health that at(second) tells is `wanted` or worse;
    it never gets better."""
    low, high = 0, end + 1
    while low < high:
        middle = (low + high) // 2
        if HEALTHS.index(at(middle)) >= HEALTHS.index(wanted):
            high = middle
        else:
            low = middle + 1
    return low


class Clock(unittest.TestCase):
    """When health turns, for each lifetime, with no setting and with some."""

    # days: hours left at which it turns due, warning, critical
    TURNS = {6: (72, 36, 14.4), 10: (120, 60, 24), 47: (376, 282, 112.8), 90: (720, 540, 216),
             398: (3184, 2388, 955.2)}

    def assert_turns(self, days, hours, seconds=0, **options):
        """While a source confirms it at every moment, it turns at these hours before the end."""
        lifetime = int(days * DAY) + seconds

        def at(second):
            return health(lineage(lifetime, checked=second, **options), second)
        for word, left in zip(HEALTHS[1:], hours):
            with self.subTest(days=days, word=word, **options):
                self.assertAlmostEqual(left * HOUR, lifetime - turn(word, at, lifetime), delta=2)

    def test_shares_of_the_lifetime(self):
        for days, hours in self.TURNS.items():
            self.assert_turns(days, hours)
            self.assert_turns(days, hours, seconds=-1)  # the last second counts (RFC 5280)

    def test_half_of_ten_days_but_a_third_of_more(self):
        self.assert_turns(10, (120,))
        self.assert_turns(10.5, (84,))

    def test_thresholds(self):
        for days, hours, warn, critical in (
                (90, (720, 240, 72), "10d", "3d"), (90, (1080, 1080, 540), "50%", "25%"),
                (47, (376, 141, 12), "12.5%", "0.5d"), (6, (72, 48, 24), "2d", "1d"),
                (398, (3184, 2400, 955.2), "100d", "10%"), (90, (720, 240, 240), "5%", "10d")):
            self.assert_turns(days, hours, warn=warn, critical=critical)

    def test_silence(self):
        """No good exchange for a tenth of the lifetime: so many hours, and then it warns."""
        for days, hours in ((6, 14.4), (47, 112.8), (90, 216), (398, 955.2)):
            for result, state in (
                    ("installed", {}), ("unchanged", {}), ("pending", {}),
                    ("deferred", {"reason": "rolled-back"})):
                with self.subTest(days=days, result=result):
                    one = lineage(days * DAY, 0, result, **state)
                    after = turn("warning", lambda second, one=one: health(one, second), days * DAY)
                    self.assertAlmostEqual(hours * HOUR, after, delta=2)

    def test_what_is_no_good_exchange(self):
        """The last one before it counts."""
        for result, reason in (("refused", "key-mismatch"), ("failed", "unreachable"),
                               ("deferred", "timeout"), ("deferred", "not-yet-valid")):
            for good, after, expected in ((None, 0, "warning"), (0, 8.9, "ok"), (0, 9, "warning"),
                                          (2 * DAY, 10.9, "ok"), (2 * DAY, 11, "warning")):
                with self.subTest(reason, good=good, after=after):
                    one = lineage(90 * DAY, after * DAY, result, reason=reason, good=good)
                    self.assertEqual(expected, health(one, after * DAY))

    def test_never(self):
        """No stored time, and one later than now, which counts as none."""
        for checked, good in ((None, None), (20 * DAY, None), (20 * DAY, 30 * DAY)):
            result = "refused" if good else "unchanged"
            one = lineage(90 * DAY, checked, result, good=good)
            self.assertEqual("warning", health(one, 10 * DAY))
            self.assertIsNone(certferry.last_good(one, NOW + 10 * DAY))
        self.assertEqual("ok", health(lineage(90 * DAY, 20 * DAY), 20 * DAY))

    def test_when_due(self):
        """Silence counts from when it is due."""
        share = {"warn": "1%", "critical": "0.5%", "when": "due"}
        for days, due, silent in ((6, 72, 57.6), (47, 376, 263.2), (90, 720, 504),
                                  (398, 3184, 2228.8)):
            self.assertEqual("ok", health(lineage(days * DAY, None, None, **share), 0))
            self.assert_turns(days, (due,), **share)
            for checked in (None, 0):
                with self.subTest(days=days, checked=checked):
                    one = lineage(days * DAY, checked, **share)
                    end = days * DAY
                    for word, left in (("due", due), ("warning", silent)):
                        self.assertAlmostEqual(left * HOUR, end - turn(
                            word, lambda second, one=one: health(one, second), end), delta=2)

    def test_at_least(self):
        """What is pending, expired, missing, misfit; each worse than the clock says or as bad."""
        good = lineage(90 * DAY)
        pending = [lineage(90 * DAY, owed=("true",)), lineage(90 * DAY, unserved=True)]
        for name, one, after, expected in (
                ("fresh", good, 1, "ok"),
                ("hook", pending[0], 1, "warning"), ("not served", pending[1], 1, "warning"),
                ("both", pending[0], 85 * DAY, "critical"),
                ("last second", lineage(90 * DAY, 90 * DAY), 90 * DAY - 1, "critical"),
                ("expired", lineage(90 * DAY, 91 * DAY), 91 * DAY, "critical"),
                ("expired, no thresholds", lineage(90 * DAY, 91 * DAY, warn="0%", critical="0%"),
                 91 * DAY, "critical"),
                ("no certificate", good._replace(current=None), 1, "critical"),
                ("no key", good._replace(key=None), 1, "critical")):
            with self.subTest(name):
                self.assertEqual(expected, health(one, after))
        self.assertEqual("critical", health(good, 1, misfit=True))

    def test_last_good(self):
        for expected, one in (
                (5, lineage(DAY, 5)), (5, lineage(DAY, 5, "installed")),
                (5, lineage(DAY, 5, "pending", reason="hook")),
                (5, lineage(DAY, 5, "deferred", reason="rolled-back")),
                (3, lineage(DAY, 5, "deferred", reason="unreachable", good=3)),
                (3, lineage(DAY, 5, "refused", reason="untrusted", good=3)),
                (None, lineage(DAY, 5, "failed", reason="timeout")),
                (None, lineage(DAY, None, None)), (None, lineage(DAY, 11))):
            self.assertEqual(expected if expected is None else NOW + expected,
                             certferry.last_good(one, NOW + 10))

    def test_alerts(self):
        """To, within and from bad health at once, daily while it lasts, recovery once."""
        bad = ("warning", "critical", "unknown")
        for told in (None, "", "ok", "due") + bad:
            for now in HEALTHS + ("unknown",):
                expected = now in bad if told not in bad else told != now
                for ago in (0, DAY - HOUR) if told in bad else (None,):
                    with self.subTest(told=told, now=now, ago=ago):
                        state = certferry.NO_STATE._replace(
                            told=told, told_at=ago if ago is None else NOW - ago)
                        self.assertEqual(expected, certferry.alert_wanted(state, now, NOW))
        for health_word in bad:
            # a timer is not exact to the second
            for told_at in (NOW - DAY, NOW - DAY + 60, NOW - 9 * DAY, NOW + DAY, None):
                state = certferry.NO_STATE._replace(told=health_word, told_at=told_at)
                self.assertTrue(certferry.alert_wanted(state, health_word, NOW), told_at)


# ---------------------------------------------------------------- scenes

class Scene(unittest.TestCase):
    """A downstream, and short ways to put lineages on it."""

    def setUp(self):
        self.there = world.Downstream().started(self)
        self.drop = world.scratch(self)

    def lineage(self, name=NAME, credential=None, **options):
        """A lineage that is ferried from a file, unless `source` says otherwise; its conf."""
        credential = credential or FIRST
        source = "file:" + self.offer(name, credential)
        self.there.key(name, credential)
        return self.conf(name, **dict({"from": source, "ca-file": AUTHORITY.root}, **options))

    def offer(self, name, credential):
        """Put what the lineage's source offers from now on; the file."""
        path = os.path.join(self.drop, name + ".pem")
        os.replace(world.write(path + ".new", world.read(credential.fullchain)), path)
        return path

    def conf(self, name, **options):
        """Write a NAME.conf; `_` stands for `-` in its keys; lists are several lines."""
        path = self.there.conf(name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return world.write(path, "".join(
            "{} = {}\n".format(key.replace("_", "-"), text if isinstance(text, str) else
                               "".join("\n    " + line for line in text))
            for key, text in sorted(options.items())), 0o600)

    def edit(self, name=NAME, **options):
        """Set or take away (None) options in a conf."""
        lines = world.read(self.there.conf(name)).decode().splitlines(True)
        keys = [key.replace("_", "-") for key in options]
        kept = [line for line in lines if line.split(" ")[0] not in keys]
        kept += ["{} = {}\n".format(key, text) for key, text in zip(keys, options.values()) if text]
        world.write(self.there.conf(name), "".join(kept), 0o600)

    def seen(self, *arguments, **how):
        """(exit status, {name: object}) of a command with --json."""
        status, document = self.there.json(*arguments, **how)
        return status, {each["name"]: each for each in document["lineages"]}

    def renew(self, status=0, *arguments, **how):
        """The Result of a `renew` that ends with that status."""
        result = self.there.run("renew", *arguments, **how)
        self.assertEqual(status, result.status, result)
        return result

    def clones(self, count):
        """That many more lineages like NAME, which has been ferried; the names of all."""
        names = ["n{:03}.example.com".format(number) for number in range(count)]
        for name in names:
            os.mkdir(self.there.archive(name, 1))
            os.mkdir(self.there.live(name))
            os.symlink("../../archive/{}@1".format(name), self.there.live(name, ".current"))
            for file in certferry.MEMBERS:  # one inode: the record of the key's file holds
                os.link(self.there.archive(NAME, 1, file), self.there.archive(name, 1, file))
                os.symlink(".current/" + file, self.there.live(name, file))
            for path in (self.there.conf, self.there.state):
                shutil.copy2(path(NAME), path(name))
        return sorted(names + [NAME])

    def wrapper(self, script):
        """A command to run certferry by, in place of the interpreter, which is its $PYTHON."""
        return world.write(os.path.join(world.scratch(self), "python"),
                           "#!/bin/sh\nPYTHON='{}'\n{}\n".format(sys.executable, script), 0o755)

    patched = world.patched

    def later(self, hours):
        """An interpreter to which it is so many hours later; files keep their times."""
        return world.under_clock(self, "{:+d}".format(int(hours * HOUR)), "NO_FAKE_STAT=1")

    def log(self):
        """A new file's path, for hooks to append to, and a function that reads its lines."""
        path = os.path.join(world.scratch(self), "log")
        return path, lambda: (
            world.read(path).decode().splitlines() if os.path.exists(path) else [])


class Hours(Scene):
    """The same hours through the command, with certificates of each age."""

    def test_before_and_after_each_turn(self):
        expected = {}
        for days, hours in Clock.TURNS.items():
            for worse, better, left in zip(HEALTHS[1:], HEALTHS, hours):
                for change, word in ((0.5, better), (-0.1, worse)):
                    name = "d{}-{}-{}.example.com".format(days, worse, "before" if (
                        change > 0) else "after")
                    self.lineage(name, lived(days * DAY, (left + change) * HOUR))
                    expected[name] = word
        self.lineage("expired.example.com", lived(90 * DAY, 10))
        status, seen = self.seen("renew")
        self.assertEqual(0, status)
        self.assertEqual(expected, {name: each["health"] for name, each in seen.items()
                                    if name in expected})
        status, seen = self.seen("status")
        self.assertEqual(2, status)
        self.assertEqual(expected, {name: each["health"] for name, each in seen.items()
                                    if name in expected})

    @world.needs("faketime")
    def test_as_time_passes(self):
        """Nothing is heard any more: hours since, and what is then said of three lifetimes."""
        days = (6, 47, 90)
        for each in days:
            self.lineage("d{}.example.com".format(each), lived(each * DAY, each * DAY - 60))
        self.renew()
        for hours, expected, status in (
                (14, ("ok", "ok", "ok"), 0), (15, ("warning", "ok", "ok"), 1),
                (112, ("warning", "ok", "ok"), 1), (113, ("warning", "warning", "ok"), 1),
                (130, ("critical", "warning", "ok"), 2), (145, ("critical", "warning", "ok"), 2),
                (217, ("critical", "warning", "warning"), 2), (-1, ("warning",) * 3, 1)):
            seen = self.seen("status", python=self.later(hours))
            with self.subTest(hours=hours):
                self.assertEqual(expected, tuple(seen[1]["d{}.example.com".format(each)]["health"]
                                                 for each in days))
                self.assertEqual(status, seen[0])

    @world.needs("faketime")
    def test_deferred_then_failed(self):
        """An upstream away is a warning line for a tenth of the lifetime, and then a problem."""
        self.lineage(credential=lived(90 * DAY, 90 * DAY - 60))
        self.renew()
        os.unlink(os.path.join(self.drop, NAME + ".pem"))
        for hours, status, result, word in (
                (1, 0, "deferred", "ok"), (215, 0, "deferred", "ok"), (217, 1, "failed", "warning"),
                (2200, 1, "failed", "critical")):
            seen = self.seen("renew", python=self.later(hours))
            self.assertEqual((status, result, "unreachable", word), (seen[0], seen[1][NAME][
                "result"], seen[1][NAME]["reason"], seen[1][NAME]["health"]), hours)


class Status(Scene):
    """What a person and what monitoring see; nothing on the disk changes by it."""

    def make(self, *healths):
        """Lineages of these healths, each called by its own."""
        for word in healths:
            name = word + ".example.com"
            self.lineage(name, FIRST if word != "due" else lived(90 * DAY, 28.5 * DAY))
        self.renew()
        for word, option in (("warning", "warn"), ("critical", "critical")):
            if word in healths:
                self.edit(word + ".example.com", **{option: "100%"})
        if "unknown" in healths:
            world.write(self.there.conf("unknown.example.com"), "nonsense\n")

    def test_exit_status(self):
        """The worst one counts: critical before unknown before warning."""
        self.make("ok", "due", "warning", "critical", "unknown")
        for names, status, word in (
                ("ok", 0, "OK"), ("due", 0, "OK"), ("warning", 1, "WARNING"),
                ("critical", 2, "CRITICAL"), ("unknown", 3, "UNKNOWN"), ("ok due", 0, "OK"),
                ("due warning", 1, "WARNING"), ("warning unknown", 3, "UNKNOWN"),
                ("unknown critical", 2, "CRITICAL"), ("ok due warning critical unknown", 2,
                                                      "CRITICAL")):
            arguments = [name + ".example.com" for name in names.split()]
            with self.subTest(names):
                result = self.there.run("status", *arguments)
                self.assertEqual(status, result.status, result)
                self.assertTrue(result.out.startswith("CERTFERRY {} - ".format(word)), result.out)
        before = self.there.snapshot()
        status, seen = self.seen("status")
        self.assertEqual(2, status)
        self.assertEqual({word + ".example.com": word for word in HEALTHS + ("unknown",)},
                         {name: each["health"] for name, each in seen.items()})
        self.assertEqual(before, self.there.snapshot())

    def test_plugin_line(self):
        """Performance data in days, thresholds with them; the worst is named first."""
        self.make("critical", "due", "ok")
        line = self.there.run("status").out.splitlines()[0]
        self.assertRegex(line, r"\ACERTFERRY CRITICAL - critical\.example\.com [^|]+\| '")
        for data in ("'due.example.com'=28d;22;9", "'ok.example.com'=88d;22;9",
                     "'critical.example.com'=88d;22;90"):
            self.assertIn(data, line.split("|")[1].split())
        self.assertNotIn("\x1b", line)

    def test_table(self):
        """A row for each: name, health, days left of the lifetime, source, last check, pending."""
        self.make("ok", "due")
        self.lineage(deploy_hook="false")
        before = time.time()
        self.renew(1)
        rows = self.there.run("status").out.splitlines()[1:]
        cells = {row.split()[0]: row for row in rows}
        days = "|".join(time.strftime("%Y-%m-%d", time.gmtime(moment))
                        for moment in (before, time.time()))  # it may be midnight
        for name, words in (("ok.example.com", ("ok", "88 of 90", "file:", days)),
                            ("due.example.com", ("due", "28 of 90", "file:", days)),
                            (NAME, ("warning", "88 of 90", "false"))):
            for word in words:
                self.assertRegex(cells[name], word)

    def test_what_it_warns_of(self):
        """An upstream that did not renew, one that is away and one with another key differ."""
        left = lived(90 * DAY, 20 * DAY)
        upstream = world.Upstream(left).started(self)
        for name in ("stays", "away", "other"):
            self.lineage(name + ".example.com", left)
        self.edit("stays.example.com", **{"from": upstream.source})
        self.renew()
        os.unlink(os.path.join(self.drop, "away.example.com.pem"))
        self.offer("other.example.com", OTHER)
        self.renew(1)
        for name, words in (("stays", "same|not renewed|itself|still"), ("away", "unreachable"),
                            ("other", "key-mismatch")):
            result = self.there.run("status", name + ".example.com")
            with self.subTest(name):
                self.assertEqual(1, result.status)
                self.assertRegex(result.out, words)

    def test_narrow_terminals(self):
        """As many columns of the table as there is room for: times go first, then the source."""
        self.lineage()
        self.renew()
        lineage, outcome = certferry.inspect(certferry.Place(self.there.config, NAME), 0)
        lineage = lineage._replace(options=lineage.options._replace(
            sources=(certferry.parse_source("up.example.net"),)))
        headings = ["NAME", "HEALTH", "DAYS LEFT", "SOURCE", "LAST CHECKED", "LAST SUCCESS"]
        for columns, shown in ((160, 6), (100, 5), (80, 4), (60, 3)):
            _, lines = certferry.status_lines([(lineage, outcome)], 0, columns, "")
            self.assertEqual(headings[:shown] + ["PENDING"], re.split("  +", lines[1]), columns)

    def test_unknown(self):
        """A lineage that is not there, wrong usage, files that cannot be read."""
        for arguments in (("none.example.com",), ("--deploy-hook", "true"), ("--bogus",), ()):
            self.assertEqual(3, self.there.run("status", *arguments).status, arguments)
        self.make("ok")
        name = "ok.example.com"
        for words, path, content in (
                ("line 1: warn", self.there.conf(name), "warn = often\n"),
                ("private key", self.there.archive(name, 1, "privkey.pem"), "no key\n")):
            before = world.read(path)
            world.write(path, content)
            status, seen = self.seen("status", name)
            with self.subTest(path):
                self.assertEqual((3, "unknown"), (status, seen[name]["health"]))
                self.assertRegex(self.there.run("status").out, words)
            world.write(path, before)
        self.assertEqual(0, self.there.run("status").status)

    def test_misfit_and_missing(self):
        """A key that is none of its certificate's, a key alone: critical."""
        self.make("ok", "warning")
        name = "ok.example.com"
        world.write(self.there.archive(name, 1, "privkey.pem"), world.read(OTHER.key))
        self.lineage("alone.example.com")
        status, seen = self.seen("status", name, "alone.example.com")
        self.assertEqual(2, status)
        self.assertEqual({"critical"}, {each["health"] for each in seen.values()})

    def as_nobody(self):
        """An interpreter that runs the command as a user who has no rights here."""
        return self.patched(
            "import argparse, configparser, fcntl, hashlib, json, shutil, ssl, subprocess\n"
            "argparse.ArgumentParser()  # imports more, maybe from a folder closed to nobody\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)")

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_without_root(self):
        """Whoever may read the files may ask."""
        self.make("ok", "warning")
        for folder, _, files in os.walk(os.path.dirname(self.there.config)):
            os.chmod(folder, 0o755)
            for path in (os.path.join(folder, file) for file in files):
                os.chmod(path, 0o644)
        status, seen = self.seen("status", python=self.as_nobody())
        self.assertEqual((1, ["ok", "warning"]),
                         (status, [each["health"] for each in seen.values()]))

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_a_folder_closed_to_it(self):
        """What cannot be listed is unknown, to `status` and to a run, and hides no other."""
        self.make("ok", "warning")
        names = "ok.example.com", "warning.example.com"
        os.chmod(os.path.dirname(self.there.config), 0o755)
        for folder, _, files in os.walk(self.there.config):
            for path in [folder] + [os.path.join(folder, file) for file in files]:
                os.chown(path, 65534, 65534)
        os.chown(self.there.live("ok.example.com"), 0, 0)
        os.chmod(self.there.live("ok.example.com"), 0o700)
        nobody = self.as_nobody()
        for command, status in (("status", 3), ("renew", 1)):
            with self.subTest(command):
                ended, seen = self.seen(command, *names, python=nobody)
                self.assertEqual((status, "unknown"), (ended, seen[names[0]]["health"]))
                self.assertEqual("warning", seen[names[1]]["health"])
        self.assertIn("CERTFERRY UNKNOWN - ok.example.com cannot be read",
                      self.there.run("status", *names, python=nobody).out)

    def test_without_openssl(self):
        """A staged key is no matter then; a key that has to be looked at makes it unknown."""
        self.make("ok")
        name, metrics = "ok.example.com", os.path.join(self.drop, "certferry.prom")
        self.there.key(name, OTHER, "privkey-next.pem")
        nothing = {"env": {"PATH": world.scratch(self)}}
        result = self.there.run("status", **nothing)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertIn("openssl", result.out)
        os.utime(self.there.archive(name, 1, "privkey.pem"))
        status, seen = self.seen("status", **nothing)
        self.assertEqual((3, "unknown"), (status, seen[name]["health"]))
        self.edit(name, enabled="no")
        self.assertEqual((0, {}), self.seen("renew", "--metrics", metrics, **nothing))
        self.assertTrue(os.path.exists(metrics))

    def test_a_broken_conf(self):
        """It is told once in a line, and no source is blamed for it."""
        self.make("ok")
        world.write(self.there.conf("ok.example.com"), "nonsense\n")
        self.renew(1)
        lines = self.there.run("status").out.splitlines()
        self.assertEqual([1, 0, 1], [line.count("conf line 1") for line in lines])
        self.assertNotIn(" runs: ", "".join(lines))

    def test_what_is_pending(self):
        """A hook that fails is named, and no source is blamed for it."""
        self.lineage(deploy_hook="false")
        self.renew(1)
        line = self.there.run("status").out.splitlines()[0]
        self.assertRegex(line, "something pending: false pending for 1 run: hook since ")
        self.assertNotIn("file:", line)

    def test_a_try_of_something_else(self):
        """Options that failed are not remembered: what is remembered did not fail."""
        self.lineage()
        self.renew()
        state = world.read(self.there.state(NAME))
        self.assertEqual(1, self.there.run(NAME, "--from", "file:/nonexistent").status)
        self.assertEqual(1, self.there.run(NAME, "-d", "other.example.net").status)
        self.assertEqual(state, world.read(self.there.state(NAME)))
        self.assertEqual(0, self.there.run("status").status)
        self.edit(deploy_hook="cd {} && [ -e mended ] && echo ran >> ran".format(self.drop))
        self.offer(NAME, NEWER)
        self.renew(1)
        world.write(os.path.join(self.drop, "mended"), "")
        self.assertEqual(1, self.there.run(NAME, "--from", "file:/nonexistent").status)
        self.renew()  # but what was pending was done, and is not done again
        self.assertEqual(b"ran\n", world.read(os.path.join(self.drop, "ran")))

    def test_which_source_failed(self):
        """The one that is told of, not the one that was good last."""
        paths = [os.path.join(self.drop, name) for name in ("first.pem", "second.pem")]
        world.write(paths[1], world.read(FIRST.fullchain))
        self.lineage(**{"from": ["file:" + path for path in paths]})
        self.renew()
        world.write(paths[0], world.read(OTHER.fullchain))
        os.unlink(paths[1])
        self.renew(1)
        self.assertIn(paths[0] + " refused for 1 run: key-mismatch", self.there.run("status").out)

    @unittest.skipIf(os.geteuid(), "only root can give a directory away")
    def test_what_it_skips(self):
        """Another user's directory is named on standard error, beside what is well."""
        self.make("ok")
        os.chown(os.path.dirname(self.there.key("b.example.com", OTHER)), 12345, 12345)
        result = self.there.run("status")
        self.assertEqual(0, result.status, result)
        self.assertRegex(result.err, r"\Acertferry: b\.example\.com: .*another user.*\n\Z")
        self.assertNotIn("b.example.com", result.out)

    def test_two_hundred(self):
        """A large host is told in one line, a row for each, and soon."""
        self.lineage()
        self.renew()
        names = self.clones(200)
        for name in names[:50]:
            self.edit(name, critical="100%")
        started = time.monotonic()
        result = self.there.run("status")
        self.assertLess(time.monotonic() - started, 20)
        line = result.out.splitlines()[0]
        self.assertEqual(2, result.status)
        self.assertRegex(line.split("|")[0], r"CRITICAL - {} .*\band \d\d more".format(names[0]))
        self.assertEqual(201, len(line.split("|")[1].split()))
        self.assertLess(len(line.split("|")[0]), 700)
        self.assertEqual(names, sorted(row.split()[0] for row in result.out.splitlines()[2:]))
        status, document = self.there.json("status")
        self.assertEqual(names, [each["name"] for each in document["lineages"]])

    def test_short_lifetimes(self):
        """Where two runs a day are few, it says how to have more."""
        self.lineage("six.example.com", lived(6 * DAY, 5 * DAY))
        self.lineage("ninety.example.com")
        self.renew()
        for name, there in (("six.example.com", True), ("ninety.example.com", False)):
            self.assertEqual(there, "hourly" in self.there.run("status", name).out)

    def test_disabled(self):
        """`enabled = no` is shown, and seen as anything else."""
        self.make("ok", "warning")
        self.edit("ok.example.com", enabled="no")
        result = self.there.run("status", "ok.example.com")
        self.assertEqual(0, result.status)
        self.assertIn("enabled = no", result.out)


class Metrics(Scene):
    """Prometheus's text format, whatever happened."""

    GAUGES = ["certificate_not_after_timestamp_seconds", "certificate_not_before_timestamp_seconds",
              "health", "last_check_timestamp_seconds", "last_success_timestamp_seconds", "pending",
              "run_duration_seconds", "upstream_not_after_timestamp_seconds"]

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.drop, "certferry.prom")

    def read(self):
        """{metric: {lineage: value}} of the file, its form looked at."""
        found, about = {}, []
        for line in world.read(self.path).decode("ascii").splitlines():
            if line.startswith("#"):
                self.assertRegex(line, r"\A# (HELP certferry_\w+ \S.*|TYPE certferry_\w+ gauge)\Z")
                about.append(line.split()[1:3])
                continue
            match = re.match(r'certferry_(\w+)(?:\{name="([a-z0-9.-]+)"\})? ([0-9.]+)\Z', line)
            self.assertTrue(match, line)
            found.setdefault(match.group(1), {})[match.group(2)] = float(match.group(3))
        self.assertEqual(sorted(about), sorted(
            [word, "certferry_" + name] for name in found for word in ("HELP", "TYPE")))
        return found

    def ferried(self):
        """A lineage that is well and one whose hook fails, ferried."""
        self.lineage()
        self.lineage("b.example.com", deploy_hook="false")
        return self.renew(1, "--metrics", self.path)

    def test_values(self):
        started = int(time.time())
        self.ferried()
        found = self.read()
        self.assertEqual(self.GAUGES, sorted(found))
        _, seen = self.seen("status")
        leaf = certferry.parse_certificate(world.certificates(FIRST.cert)[0])
        for name, health_value, pending in ((NAME, 0, 0), ("b.example.com", 2, 1)):
            values = {metric: samples[name] for metric, samples in found.items() if name in samples}
            self.assertEqual(pending, values["pending"])
            self.assertEqual(health_value, values["health"])
            for metric in ("certificate_not_after", "upstream_not_after"):
                self.assertEqual(leaf.not_after, values[metric + "_timestamp_seconds"])
            self.assertEqual(leaf.not_before, values["certificate_not_before_timestamp_seconds"])
            for metric in ("last_check", "last_success"):
                self.assertTrue(started <= values[metric + "_timestamp_seconds"] <= time.time())
        self.assertLess(found["run_duration_seconds"][None], 30)

    def test_file(self):
        """Mode 0644 under any umask, in one rename, nothing beside it; by `status` too."""
        masked = self.wrapper('umask 077; exec "$PYTHON" "$@"')
        self.lineage()
        world.write(self.path, "what was there before\n", 0o600)
        for command in ("renew", "status"):
            with open(self.path, "rb") as before:
                result = self.there.run(command, "--metrics", self.path, python=masked)
                self.assertEqual(0, result.status, result)
                text = before.read()
            self.assertNotEqual(text, world.read(self.path))
            self.assertTrue(text.endswith(b"\n"))
            self.assertEqual(0o644, stat.S_IMODE(os.stat(self.path).st_mode))
            self.assertEqual([NAME + ".pem", "certferry.prom"], sorted(os.listdir(self.drop)))
            self.assertEqual(self.GAUGES, sorted(self.read()))

    def test_everything_failed(self):
        """No upstream, a broken conf, certbot's own, a run that cannot begin."""
        with world.Closed() as closed:
            self.lineage("away.example.com", **{"from": closed.source})
            self.lineage("broken.example.com")
            world.write(self.there.conf("broken.example.com"), "nonsense\n")
            self.renew(1, "--metrics", self.path)
        found = self.read()
        self.assertEqual({"away.example.com": 3, "broken.example.com": 4}, found["health"])
        self.assertNotIn("certificate_not_after_timestamp_seconds", found)
        self.assertEqual({None}, set(found["run_duration_seconds"]))
        self.assertIn("last_check_timestamp_seconds", found)
        self.assertNotIn("away.example.com", found.get("last_success_timestamp_seconds", ()))

    def test_a_run_that_cannot_begin(self):
        """A broken environment file stops all; the file still says how things stand."""
        self.lineage()
        self.renew()
        world.write(os.path.join(self.there.config, "certferry", "environment"), "nonsense\n",
                    0o600)
        self.renew(1, "--metrics", self.path)
        self.assertIn(NAME, self.read()["certificate_not_after_timestamp_seconds"])
        status, found = self.seen("renew")
        self.assertEqual((1, "failed", None), (
            status, found[NAME]["result"], found[NAME]["reason"]), found)
        self.assertIn("environment line 1", found[NAME]["detail"])

    def test_nothing_there(self):
        self.renew(0, "--metrics", self.path)
        self.assertEqual(["run_duration_seconds"], list(self.read()))

    def test_where(self):
        """CERTFERRY_METRICS in certferry/environment; the option wins; a named one keeps others."""
        self.ferried()
        other = os.path.join(self.drop, "other.prom")
        world.write(os.path.join(self.there.config, "certferry", "environment"),
                    "# for node_exporter\nCERTFERRY_METRICS={}\n".format(other), 0o600)
        os.unlink(self.path)
        self.renew(0, NAME)
        self.assertFalse(os.path.exists(self.path))
        self.path, other = other, self.path
        self.assertEqual({NAME, "b.example.com"}, set(self.read()["health"]))
        os.unlink(self.path)
        self.renew(0, NAME, "--metrics", other)
        self.assertEqual([False, True], [os.path.exists(path) for path in (self.path, other)])
        self.path = other
        self.there.run("status", NAME, "--metrics", other)
        self.assertEqual({NAME, "b.example.com"}, set(self.read()["health"]))

    def test_a_relative_path(self):
        """From where the command was given."""
        for command in ("renew", "status"):
            self.there.run(command, "--metrics", "relative.prom")
            os.unlink(os.path.join(os.path.dirname(self.there.config), "relative.prom"))

    def test_dry_run(self):
        self.lineage()
        self.renew(0, "--dry-run", "--metrics", self.path)
        self.there.run("status", "--dry-run", "--metrics", self.path)
        self.assertFalse(os.path.exists(self.path))

    def test_a_time_later_than_now(self):
        """It counts as never, here and in the table."""
        self.lineage()
        self.renew()
        os.utime(self.there.state(NAME), (world.days(9),) * 2)
        result = self.there.run("status", "--metrics", self.path)
        self.assertRegex(result.out, r"\.pem +never +never")
        self.assertEqual({"last_check_timestamp_seconds", "last_success_timestamp_seconds"},
                         set(self.GAUGES).difference(self.read()))

    def test_links_in_a_circle(self):
        """What cannot be listed is told once; document and file are written all the same."""
        os.symlink("live", os.path.join(self.there.config, "live"))
        result = self.renew(1, "--json", "--metrics", self.path)
        self.assertEqual({"lineages": []}, json.loads(result.out))
        self.assertRegex(result.err, r"\Acertferry: .*/live.*\n\Z")
        self.assertEqual(["run_duration_seconds"], list(self.read()))

    def test_a_place_that_is_none(self):
        """One line says so, and the ferry has gone on."""
        self.lineage()
        result = self.renew(1, "--metrics", os.path.join(self.drop, "missing", "x.prom"))
        self.assertRegex(result.err, r"\Acertferry: metrics: .*missing.*\n\Z")
        self.assertIn(NAME + ": installed", result.out)

    @world.needs("promtool")
    def test_promtool(self):
        self.ferried()
        done = subprocess.run(["promtool", "check", "metrics"], input=world.read(self.path),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((0, b""), (done.returncode, done.stdout))


@world.needs("promtool")
class Rules(Scene):
    """The README's alert rules, by promtool and with metrics that there are."""

    @classmethod
    def setUpClass(cls):
        text = world.read(os.path.join(world.REPOSITORY, "README.md")).decode("utf-8")
        blocks = re.findall(r"^```\w*\n(groups:.*?)^```", text, re.M | re.S)
        cls.rules = "".join(block for block in blocks if "certferry_" in block)

    def promtool(self, command, path):
        """What promtool says of a file; it has to be content."""
        done = subprocess.run(["promtool", command, "rules", path], cwd=self.drop,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(0, done.returncode, done.stdout.decode())
        return done.stdout.decode()

    def test_form(self):
        path = world.write(os.path.join(self.drop, "rules.yml"), self.rules)
        self.assertIn("3 rules found", self.promtool("check", path))
        self.lineage()
        metrics = os.path.join(self.drop, "certferry.prom")
        self.renew(0, "--metrics", metrics)
        self.assertLessEqual(set(re.findall(r"\bcertferry_\w+", self.rules)),
                             set(re.findall(r"\bcertferry_\w+", world.read(metrics).decode())))

    def test_what_they_say(self):
        """A host that is well for three days and then badly off in three ways, one at a time."""
        alerts = re.findall(r"- alert: (\w+)", self.rules)  # of health, of time left, of silence
        always, three_days, then = "+0x1800", "x864 ", "+0x900"  # steps of five minutes
        stopped = {"last_check": "0+300" + three_days + str(3 * DAY) + then}
        steady = {"health": "0" + always, "pending": "0" + always, "last_check": "0+300x1800",
                  "certificate_not_before": "0" + always,
                  "certificate_not_after": str(90 * DAY) + always}
        tests = ""
        for changes, when, firing in (
                ({}, "4d", None), ({"health": "0+0" + three_days + "2" + then}, "4d", alerts[0]),
                ({"certificate_not_before": str(-79 * DAY) + always,
                  "certificate_not_after": str(11 * DAY) + always}, "4d", alerts[1]),
                (stopped, "4d", None), (stopped, "6d", alerts[2])):
            tests += "  - interval: 5m\n    input_series:\n"
            for metric, values in dict(steady, **changes).items():
                metric += "_timestamp_seconds" * ("_" in metric)
                tests += ("      - series: 'certferry_{}{{name=\"a.example.com\"}}'\n"
                          "        values: '{}'\n").format(metric, values)
            tests += "    promql_expr_test:\n"
            for alert in alerts:
                tests += ("      - expr: count(ALERTS{{alertname='{}', alertstate='firing'}}) or"
                          " vector(0)\n        eval_time: {}\n        exp_samples: [{{value: {}}}]"
                          "\n").format(alert, when, int(alert == firing))
        world.write(os.path.join(self.drop, "rules.yml"), self.rules)
        self.promtool("test", world.write(os.path.join(self.drop, "test.yml"), (
            "rule_files: [rules.yml]\nevaluation_interval: 5m\ntests:\n" + tests)))


class Alerts(Scene):
    """renewal-hooks/alert: who is woken, when, with what."""

    FIELDS = "NAME WAS HEALTH REASON DETAIL NOT_AFTER DAYS_LEFT".split()

    def setUp(self):
        super().setUp()
        self.path, self.lines = self.log()
        self.hook = self.there.hook("alert", "10-mail", 'echo "{}" >>{}'.format(
            "|".join("$CERTFERRY_" + field for field in self.FIELDS), self.path))
        self.lineage()

    def told(self):
        """[(name, was, health)] of what was told since the last time it was asked."""
        lines = self.lines()
        if os.path.exists(self.path):
            os.unlink(self.path)
        return [tuple(line.split("|")[:3]) for line in lines]

    def test_turns(self):
        """To bad health, within it and from it at once; nobody is woken between ok and due."""
        for edits, status, expected in (
                ({}, 0, []), ({}, 0, []),
                ({"warn": "100%"}, 0, [(NAME, "ok", "warning")]), ({}, 0, []),
                ({"critical": "100%"}, 0, [(NAME, "warning", "critical")]), ({}, 0, []),
                ({"critical": None}, 0, [(NAME, "critical", "warning")]), ({}, 0, []),
                ({"warn": None}, 0, [(NAME, "warning", "ok")]), ({}, 0, []),
                ({"nonsense": "1"}, 1, [(NAME, "ok", "unknown")]), ({}, 1, []),
                ({"nonsense": None}, 0, [(NAME, "unknown", "ok")]), ({}, 0, [])):
            self.edit(**edits)
            self.renew(status)
            self.assertEqual(expected, self.told(), edits)

    def test_due_is_no_alert(self):
        for credential, expected in ((lived(3 * DAY, DAY), "due"), (NEWER, "ok")):
            self.offer(NAME, credential)
            self.assertEqual(expected, self.seen("renew")[1][NAME]["health"])
        self.assertEqual([], self.told())

    def test_what_it_was_before(self):
        """Health that woke nobody is told as what it was all the same."""
        self.offer(NAME, lived(3 * DAY, DAY))
        for warn in (None, "100%"):
            self.edit(warn=warn)
            self.renew()
        self.assertEqual([(NAME, "due", "warning")], self.told())

    @world.needs("faketime")
    def test_daily(self):
        """While it lasts, once in a day, whatever the number of runs."""
        self.edit(warn="100%")
        expected = [(NAME, "ok", "warning")]
        for hours in (0, 0.5, 12, 23.5, 24.1, 36, 47, 48.2, 48.3, 120):
            self.renew(python=self.later(hours))
            day = hours in (0, 24.1, 48.2, 120)
            self.assertEqual(expected if day else [], self.told(), hours)
            expected = [(NAME, "warning", "warning")]

    def test_environment(self):
        self.edit(deploy_hook="false")
        world.write(os.path.join(self.drop, "token"), "s.not-for-hooks\n", 0o600)
        seen, lines = self.log()
        self.there.hook("alert", "20-environment", "{{ env; wc -c; }} >{}".format(seen))
        self.renew(1, env={"VAULT_TOKEN": "s.not-for-hooks", "PATH": "/usr/bin:/bin"})
        values = dict(line.partition("=")[::2] for line in lines())
        self.assertNotIn("s.not-for-hooks", "\n".join(lines()))
        self.assertIn("0", lines()[-1].split())  # nothing on its standard input
        self.assertIn("/usr/sbin", values["PATH"].split(":"))
        leaf = certferry.parse_certificate(world.certificates(FIRST.cert)[0])
        for field, expected in (
                ("NAME", NAME), ("WAS", "ok"), ("HEALTH", "warning"), ("REASON", "hook"),
                ("NOT_AFTER", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(leaf.not_after)))):
            self.assertEqual(expected, values["CERTFERRY_" + field])
        self.assertIn(values["CERTFERRY_DAYS_LEFT"], ("88", "89"))  # 89 in the second of its issue
        self.assertIn("false", values["CERTFERRY_DETAIL"])

    def test_of_a_key_alone(self):
        """No certificate yet: critical, with what is known."""
        os.unlink(os.path.join(self.drop, NAME + ".pem"))
        self.renew(1)
        name, was, word, reason, detail, not_after, left = self.lines()[0].split("|")
        self.assertEqual((NAME, "ok", "critical", "unreachable", "", ""),
                         (name, was, word, reason, not_after, left))
        self.assertIn(NAME + ".pem", detail)

    def test_taken_back_by_certbot(self):
        """A lineage that certbot links to its own files again ages, which is recorded and told."""
        self.renew()
        os.mkdir(os.path.join(self.there.config, "renewal"))
        world.write(os.path.join(self.there.config, "renewal", NAME + ".conf"), "version = 2.1.0\n")
        os.unlink(self.there.live(NAME, "cert.pem"))
        os.symlink("../../archive/{}@1/cert.pem".format(NAME), self.there.live(NAME, "cert.pem"))
        os.utime(self.there.state(NAME), (world.days(-20),) * 2)
        self.renew(1)
        self.assertEqual([(NAME, "ok", "warning")], self.told())
        seen = self.seen("status")[1][NAME]
        self.assertEqual(("refused", "certbot"), (seen["result"], seen["reason"]))

    def test_a_run_that_asks_nobody(self):
        """With `when = due`: an alert does not move the time of the last check."""
        self.edit(when="due")
        self.renew()
        os.utime(self.there.state(NAME), (world.days(-20),) * 2)
        before = os.stat(self.there.state(NAME)).st_mtime
        self.edit(warn="100%")
        self.renew()
        self.assertEqual([(NAME, "ok", "warning")], self.told())
        self.assertEqual(int(before), int(os.stat(self.there.state(NAME)).st_mtime))

    def test_a_hook_that_fails(self):
        """It is reported, the others run, the run goes on, and it is not tried again."""
        self.there.hook("alert", "05-fails", "echo no network >&2; exit 7")
        self.lineage("b.example.com", warn="100%")
        self.edit(warn="100%")
        result = self.there.run("renew")
        self.assertEqual(2, len(re.findall(
            r"^certferry: [ab]\.example\.com: [^\n]*05-fails[^\n]*7[^\n]*no network", result.err,
            re.M)), result)
        self.assertEqual(2, len(self.told()))
        self.assertEqual(2, result.out.count(": installed: "))
        self.there.run("renew")
        self.assertEqual([], self.told())

    def test_told_means_that_a_hook_ran(self):
        """One that was not there, or was refused, has told nobody."""
        self.edit(warn="100%")
        os.rename(self.hook, self.hook + "~")
        self.renew()
        os.rename(self.hook + "~", self.hook)
        os.chmod(self.hook, 0o777)
        self.assertIn(self.hook, self.there.run("renew").err)
        self.assertEqual([], self.told())
        os.chmod(self.hook, 0o755)
        self.renew()
        self.assertEqual([(NAME, "ok", "warning")], self.told())

    def test_who_tells_nobody(self):
        """A dry run, `status`, and files that are no hooks."""
        self.edit(warn="100%")
        self.there.run("renew", "--dry-run")
        self.there.run("status")
        os.chmod(self.hook, 0o644)
        self.there.run("renew")
        self.assertEqual([], self.told())


class Output(Scene):
    """Lines for people, for the journal, for a terminal."""

    PROBLEM = r"certferry: {}: [^:\n]+.*: [^\n]+".format(re.escape(NAME))

    def test_quiet(self):
        """Silent unless there is a problem."""
        self.lineage()
        self.assertEqual((0, "", ""), self.there.run("renew", "-q"))
        self.assertEqual((0, "", ""), self.there.run("renew", "--quiet"))
        self.edit(**{"from": "file:/nonexistent"})
        self.edit(warn="100%")
        result = self.renew(1, "-q")
        self.assertEqual("", result.out)
        self.assertRegex(result.err, r"\A{}\n\Z".format(self.PROBLEM))

    def test_verbose(self):
        """Each step with its time, on standard error."""
        self.lineage(deploy_hook="true")
        plain, verbose = self.renew(), self.renew(0, "-v")
        self.assertEqual("", plain.err)
        lines = verbose.err.splitlines()
        self.assertGreater(len(lines), 2)
        for line in lines:
            self.assertRegex(line, r"\Acertferry: {}: .*\b\d+\.\d+ s\)?\Z".format(NAME))
        self.assertNotIn("<", verbose.err)
        self.assertIn(NAME + ": unchanged: ", verbose.out)
        with world.Silent() as dead:  # what others are judged meanwhile does not count
            self.edit(**{"from": dead.source, "timeout": "1"})
            seconds = re.search(r": ask .*\((\d+\.\d+) s\)", self.renew(0, "-v").err).group(1)
        self.assertGreater(float(seconds), 0.9)

    def test_journal(self):
        """Priorities where it is the journal that reads, which says so by device and inode."""
        self.lineage(**{"from": "file:/nonexistent"})
        self.lineage("b.example.com", credential=FIRST)
        self.renew(1)
        self.edit("b.example.com", **{"from": "file:/nonexistent"})
        journal = os.path.join(world.scratch(self), "journal")
        facts = os.stat(world.write(journal, ""))
        to_journal = self.wrapper('exec "$PYTHON" "$@" 2>{}'.format(journal))
        for inode, there in ((facts.st_ino, True), (facts.st_ino + 1, False)):
            stream = "{}:{}".format(facts.st_dev, inode)
            self.renew(1, "-v", python=to_journal, env={"JOURNAL_STREAM": stream})
            found = {(line[:3] if line.startswith("<") else None, line.split(": ")[1])
                     for line in world.read(journal).decode().splitlines()}
            problems = {pair for pair in found if pair[0] != "<7>"}
            self.assertEqual({("<3>", NAME), ("<4>", "b.example.com")} if there else
                             {(None, NAME), (None, "b.example.com")}, problems)
            self.assertEqual(there, ("<7>", NAME) in found)

    def test_progress(self):
        """On a terminal a long run shows how far it is; elsewhere, and with -q, it does not."""
        self.lineage()
        self.renew()
        self.clones(11)
        controller, terminal = pty.openpty()
        self.addCleanup(os.close, controller)
        on_terminal = self.wrapper('exec "$PYTHON" "$@" 2>{}'.format(os.ttyname(terminal)))
        self.assertEqual("", self.renew().err)
        self.renew(0, "-q", python=on_terminal)
        self.renew(0, python=on_terminal)
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(controller, 65536)
            except OSError:  # all has been read
                break
        steps = re.findall(r"\[ *(\d+)/12\] (\S+) \.\.\.", shown.decode())
        self.assertEqual([str(number) for number in range(1, 13)], [step for step, _ in steps])
        self.assertEqual(12, len({name for _, name in steps}))
        self.assertTrue(shown.endswith(b"\x1b[K"))  # nothing of it stays

    def test_a_changed_key(self):
        """The loudest: which keys, why, what to do, how long what is here still lasts."""
        self.lineage()
        self.renew()
        other = AUTHORITY.issue(["*.example.com"], key="rsa:2048")
        self.offer(NAME, other)
        line = self.renew(1).err
        self.assertRegex(line, r"\A{}\n\Z".format(self.PROBLEM))
        for word in ("RSA 2048", "ECDSA P-256", "--reuse-key", "--key"):
            self.assertIn(word, line)
        self.assertRegex(line, "lasts 8[89] more days")  # 89 in the second of issue
        for credential in (FIRST, other):
            leaf = certferry.parse_certificate(world.certificates(credential.cert)[0])
            self.assertIn("sha256:" + certferry.fingerprint(leaf.public_key)[:16], line)


# ---------------------------------------------------------------- services

class Service(world.Upstream):
    """A local service; after reload() it shows another credential from a later connection on."""

    waiting = None

    def reload(self, credential, after=0):
        """Show that credential when so many more connections have met the one before."""
        self.waiting = (credential, self.connections + after)

    def talk(self, sock):
        """One connection."""
        if self.waiting and self.connections > self.waiting[1]:
            self.switch(self.waiting[0])
            self.waiting = None
        super().talk(sock)


class Served(Scene):
    """--served-at: a deploy is finished when the service shows the new leaf."""

    def setUp(self):
        super().setUp()
        self.service = Service(FIRST).started(self)
        self.path, self.lines = self.log()
        self.lineage(served_at=self.service.source, deploy_hook="echo hook >>" + self.path)
        self.renew()
        self.assertEqual(["hook"], self.lines())
        self.patient = self.patched("certferry.SERVED_SECONDS = 60")
        self.hasty = self.patched("certferry.SERVED_SECONDS = 0.2")

    def ended(self, status, result, reason, hooks, python=None, served=None):
        """A `renew` ended so, and by now the hook has run so many times."""
        seen = self.seen("renew", python=python or self.hasty)
        self.assertEqual((status, result, reason), (
            seen[0], seen[1][NAME]["result"], seen[1][NAME]["reason"]), seen)
        self.assertEqual(hooks, len(self.lines()))
        return seen[1][NAME]

    def test_patience(self):
        """Reloads are asynchronous: fifteen seconds."""
        self.assertEqual(15, certferry.SERVED_SECONDS)

    def test_at_once_and_late(self):
        for credential, after in ((NEWER, 0), (again(), 3)):
            self.offer(NAME, credential)
            self.service.reload(credential, after)
            hooks = len(self.lines())
            self.ended(0, "installed", None, hooks + 1, self.patient)
            self.assertIsNone(self.service.waiting)
        self.ended(0, "unchanged", None, 3)

    def test_never(self):
        """Pending, the hooks again at each run, until it is served."""
        self.offer(NAME, NEWER)
        first = self.ended(1, "pending", "not-served", 2)
        self.assertEqual(2, first["version"])
        self.assertTrue(first["changed"])
        old = certferry.parse_certificate(world.certificates(FIRST.cert)[0])
        for word in (self.service.source, old.serial[:8], certferry.iso_time(old.not_before)[:10],
                     "live/a.example.com/fullchain.pem"):
            self.assertIn(word, first["detail"])
        second = self.ended(1, "pending", "not-served", 3)
        self.assertEqual((False, "warning"), (second["changed"], second["health"]))
        status = self.there.run("status")
        self.assertEqual(1, status.status)
        self.assertIn("not-served", status.out)
        self.service.switch(NEWER)
        self.assertEqual("ok", self.ended(0, "unchanged", None, 4)["health"])
        self.ended(0, "unchanged", None, 4)

    def test_down(self):
        """A service that does not answer is no proof either."""
        with world.Closed() as closed:
            self.edit(served_at=closed.source)
            self.offer(NAME, NEWER)
            self.assertIn(closed.source, self.ended(1, "pending", "not-served", 2)["detail"])

    def test_a_stale_copy_is_found(self):
        """Each run looks, though nothing is new; the hooks run at the one after."""
        self.service.switch(lived(90 * DAY, 50 * DAY))
        started = time.monotonic()
        self.ended(1, "pending", "not-served", 1, self.patient)
        self.assertLess(time.monotonic() - started, 50)
        self.ended(1, "pending", "not-served", 2)
        self.service.switch(FIRST)
        self.ended(0, "unchanged", None, 3)

    def test_by_name_and_several(self):
        """The name of the source is asked for; one stale service is enough."""
        second = Service(FIRST).started(self)
        self.edit(sni="b.example.com", served_at=None)
        self.conf(NAME, **{"from": "file:" + self.offer(NAME, NEWER), "ca-file": AUTHORITY.root,
                           "sni": "b.example.com", "served-at": (self.service.source,
                                                                 second.source)})
        self.service.reload(NEWER)
        detail = self.ended(1, "pending", "not-served", 1)["detail"]
        self.assertIn(second.source, detail)
        self.assertNotIn(self.service.source, detail)
        self.assertEqual({"b.example.com"}, set(second.asked))

    def test_first_crossing(self):
        """`certferry NAME --served-at` looks too, and keeps the option though it is pending."""
        name = "b.example.com"
        self.there.key(name, FIRST)
        service = Service(OTHER).started(self)
        status, seen = self.seen(
            name, "--from", "file:" + self.offer(name, FIRST), "--ca-file", AUTHORITY.root,
            "--served-at", service.source, python=self.hasty)
        self.assertEqual((1, "pending", "not-served"),
                         (status, seen[name]["result"], seen[name]["reason"]))
        self.assertIn(service.source, world.read(self.there.conf(name)).decode())
        service.switch(FIRST)
        self.assertEqual("unchanged", self.seen("renew", name)[1][name]["result"])


if __name__ == "__main__":
    unittest.main()
