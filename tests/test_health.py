"""Health by the clock, status, metrics, JSON, alerts, lines, and proof that a service serves it.

Lineages are ferried from files where the source is no matter: that is quick, and `warn = 100%` in
a conf makes any of them one to warn of.
"""

import json
import os
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


def parsed(credential):
    """The Certificate of a credential."""
    return certferry.parse_certificate(world.certificates(credential.cert)[0])


# --------------------------------------------------------------------------------------------------
# Clocks, in this process
# --------------------------------------------------------------------------------------------------

NOW = 1800000000
STATE = certferry.NO_STATE._replace(result="unchanged")


def made(kind, **fields):
    """A named tuple of that kind, None in every other field."""
    return kind._make([None] * len(kind._fields))._replace(**fields)


def leaf_of(lifetime):
    """A Certificate that began at NOW."""
    return made(
        certferry.Certificate,
        der=b"",
        not_before=NOW,
        not_after=NOW + lifetime,
        issuer=b"",
        public_key=b"",
        domains=("example.com",),
        serial="03",
    )


def in_service(lifetime, **changes):
    """A whole InService of such a certificate, but for the changes."""
    shown = made(certferry.InService, number=1, leaf=leaf_of(lifetime), key_path="privkey.pem")
    return shown._replace(chain=(), staged=(), linked=True, flaw="")._replace(**changes)


def lineage(state=STATE, last_run=0, name=NAME, **given):
    """A Lineage with these options; `last_run` is in seconds after NOW, None for never."""
    given = {key.replace("_", "-"): [text] for key, text in given.items()}
    options = certferry.parse_options(given)
    if last_run is not None:
        last_run += NOW
    place = certferry.Place("/etc/letsencrypt", name)
    return made(
        certferry.Lineage,
        place=place,
        given=given,
        options=options,
        state=state,
        last_run=last_run,
        notices=(),
    )


def health(one, shown, after):
    """The health so many seconds after NOW."""
    return certferry.health_of(one, shown, NOW + int(after))[0]


def turn(wanted, at, end):
    """The first second in [0, end] at which the health that at(second) tells is `wanted` or worse.

    It never gets better.
    """
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
    TURNS = {
        6: (72, 36, 14.4),
        10: (120, 60, 24),
        47: (376, 282, 112.8),
        90: (720, 540, 216),
        398: (3184, 2388, 955.2),
    }
    SILENT = {6: 14.4, 47: 112.8, 90: 216, 398: 955.2}  # hours without a good exchange

    def assert_turns(self, days, hours, seconds=0, **options):
        """While a source confirms it at every moment, it turns at these hours before the end."""
        lifetime = int(days * DAY) + seconds

        def at(second):
            """The health at that second, in which a source confirmed it."""
            return health(lineage(last_run=second, **options), in_service(lifetime), second)

        for word, left in zip(HEALTHS[1:], hours):
            with self.subTest(days=days, word=word, **options):
                self.assertAlmostEqual(lifetime - turn(word, at, lifetime), left * HOUR, delta=2)

    def assert_silent(self, hours, days, **how):
        """Confirmed at NOW for the last time, it warns after so many hours."""
        shown = in_service(days * DAY)
        since = turn("warning", lambda second: health(lineage(**how), shown, second), days * DAY)
        self.assertAlmostEqual(since, hours * HOUR, delta=2, msg=f"{days} days")

    def test_shares_of_the_lifetime(self):
        """certbot's rule for due, then --warn and --critical."""
        for days, hours in self.TURNS.items():
            self.assert_turns(days, hours)
            self.assert_turns(days, hours, seconds=-1)  # the last second counts (RFC 5280)
        self.assert_turns(10.5, (84,))  # a third of more than ten days, half of less

    def test_thresholds(self):
        """Shares and days, each with its own."""
        for days, hours, warn, critical in (
            (90, (720, 240, 72), "10d", "3d"),
            (90, (1080, 1080, 540), "50%", "25%"),
            (47, (376, 141, 12), "12.5%", "0.5d"),
            (6, (72, 48, 24), "2d", "1d"),
            (398, (3184, 2400, 955.2), "100d", "10%"),
            (90, (720, 240, 240), "5%", "10d"),
        ):
            self.assert_turns(days, hours, warn=warn, critical=critical)

    def test_no_run(self):
        """For 48 hours, whatever the last one ended with; a tenth of a short lifetime is less."""
        for result, reason in (
            ("installed", None),
            ("unchanged", None),
            ("pending", None),
            ("deferred", "rolled-back"),
        ):
            state = STATE._replace(result=result, reason=reason)
            for days, hours in self.SILENT.items():
                with self.subTest(result, days=days):
                    self.assert_silent(min(48, hours), days, state=state)
        why = certferry.health_of(lineage(), in_service(90 * DAY), NOW + 49 * HOUR)[1]
        self.assertRegex(why, "no run since 2027-01-15 08:00.*timer.*systemctl enable --now")

    def test_no_good_exchange(self):
        """For a tenth of the lifetime, while runs go on: the last good one counts."""
        for result, reason in (
            ("refused", "older"),
            ("refused", "expired"),
            ("failed", "unreachable"),
            ("failed", None),
            ("deferred", "timeout"),
            ("deferred", "not-yet-valid"),
        ):
            for good, after, expected in (
                (None, 0, "warning"),
                (0, 8.9, "ok"),
                (0, 9, "warning"),
                (2, 10.9, "ok"),
                (2, 11, "warning"),
            ):
                with self.subTest(reason, good=good, after=after):
                    good_at = None if good is None else NOW + good * DAY
                    state = STATE._replace(result=result, reason=reason, good=good_at)
                    one = lineage(state, int(after * DAY))
                    self.assertEqual(health(one, in_service(90 * DAY), after * DAY), expected)

    def test_never(self):
        """No stored time, and one later than now, which counts as none."""
        shown = in_service(90 * DAY)
        for last_run, good in ((None, None), (20 * DAY, None), (20 * DAY, 30 * DAY)):
            state = STATE
            if good is not None:
                state = STATE._replace(result="refused", reason="older", good=NOW + good)
            one = lineage(state, last_run)
            self.assertEqual(health(one, shown, 10 * DAY), "warning")
            self.assertIsNone(certferry.last_good(one, NOW + 10 * DAY))
        self.assertEqual(health(lineage(last_run=20 * DAY), shown, 20 * DAY), "ok")

    def test_when_due(self):
        """Nobody is asked before: silence counts from when it is due."""
        quiet = {"warn": "1%", "critical": "0.5%", "when": "due"}
        not_due = STATE._replace(result="not-due", good=NOW)
        for days, (due, _, _) in self.TURNS.items():
            shown = in_service(days * DAY)
            start = days * 24 - due
            with self.subTest(days=days):
                self.assert_turns(days, (due,), **quiet)
                for last_run in (None, 0):
                    one = lineage(last_run=last_run, **quiet)
                    self.assertEqual(health(one, shown, (start - 1) * HOUR), "ok")
                    self.assertEqual(health(one, shown, (start + 1) * HOUR), "due")
                    self.assertEqual(health(one, shown, (start + 49) * HOUR), "warning")
                silent = days * 2.4
                for hours, expected in ((silent - 1, "due"), (silent + 1, "warning")):
                    second = int((start + hours) * HOUR)
                    one = lineage(not_due, second, **quiet)
                    self.assertEqual(health(one, shown, second), expected)

    def test_what_does_not_heal_by_itself(self):
        """It warns at once; what may be gone at the next run, from the second time on."""
        at_once = (
            *("certbot", "no-key", "key-mismatch", "names", "untrusted", "names-lost"),
            *("rehearsal", "storage"),
        )
        twice = ("unproven", "malformed", "expired", "not-yet-valid")
        never = ("unreachable", "timeout", "older", None)
        for words, expected in (
            (at_once, ("warning", "warning")),
            (twice, ("ok", "warning")),
            (never, ("ok", "ok")),
        ):
            for reason in words:
                for runs, wanted in zip((1, 2), expected):
                    with self.subTest(reason, runs=runs):
                        result = certferry.Failure(reason, "").result
                        state = STATE._replace(result=result, reason=reason, runs=runs, good=NOW)
                        state = state._replace(detail="what it met")
                        found = certferry.health_of(lineage(state), in_service(90 * DAY), NOW + 1)
                        self.assertEqual(found[0], wanted)
                        if wanted == "warning":
                            self.assertEqual(found[1:], ("what it met", "last run"))

    def test_disabled(self):
        """`enabled = no` exempts from silence, and from nothing else."""
        refused = STATE._replace(result="refused", reason="key-mismatch", runs=1)
        shown = in_service(90 * DAY)
        for one, after, expected in (
            (lineage(enabled="no"), 50, "ok"),
            (lineage(last_run=None, state=certferry.NO_STATE, enabled="no"), 50, "ok"),
            (lineage(enabled="no"), 61, "due"),
            (lineage(enabled="no"), 70, "warning"),
            (lineage(enabled="no"), 85, "critical"),
            (lineage(refused, enabled="no"), 1, "warning"),
        ):
            with self.subTest(after=after):
                self.assertEqual(health(one, shown, after * DAY), expected)

    def test_at_least(self):
        """What is pending, expired, missing, misfit; each worse than the clock says or as bad."""
        long = 90 * DAY
        no_thresholds = {"warn": "0%", "critical": "0%"}
        for name, one, shown, after, expected in (
            ("fresh", lineage(), in_service(long), 1, "ok"),
            ("a hook is owed", lineage(), in_service(long, owed=("true",)), 1, "warning"),
            ("a look is owed", lineage(), in_service(long, owed=()), 1, "warning"),
            ("both", lineage(), in_service(long, owed=()), 85 * DAY, "critical"),
            ("last second", lineage(last_run=long), in_service(long), long - 1, "critical"),
            ("expired", lineage(last_run=long), in_service(long), long + 1, "critical"),
            (
                "expired, no thresholds",
                lineage(last_run=long, **no_thresholds),
                in_service(long),
                long + 1,
                "critical",
            ),
            ("nothing", lineage(), certferry.NOTHING, 1, "critical"),
            ("no fit", lineage(), in_service(long, flaw="has another key"), 1, "critical"),
        ):
            with self.subTest(name):
                self.assertEqual(health(one, shown, after), expected)

    def test_last_good(self):
        """The last run where it ended well, else the one before that did."""
        good = NOW + 3
        for expected, last_run, result, reason, before in (
            (5, 5, "unchanged", None, None),
            (5, 5, "installed", None, None),
            (5, 5, "pending", "hook", None),
            (5, 5, "deferred", "rolled-back", None),
            (3, 5, "deferred", "unreachable", good),
            (3, 5, "refused", "untrusted", good),
            (3, 5, "not-due", None, good),
            (None, 5, "failed", "timeout", None),
            (None, None, None, None, None),
            (None, 11, "unchanged", None, None),
        ):
            state = STATE._replace(result=result, reason=reason, good=before)
            found = certferry.last_good(lineage(state, last_run), NOW + 10)
            self.assertEqual(found, None if expected is None else NOW + expected)

    def test_alerts(self):
        """To, within and from bad health at once, daily while it lasts, recovery once."""
        bad = ("warning", "critical", "unknown")
        for told in ("", "ok", "due", *bad):
            for word in (*HEALTHS, "unknown"):
                expected = word in bad
                told_at = None
                if told in bad:
                    expected = told != word
                    told_at = NOW - DAY + HOUR
                with self.subTest(told=told, word=word):
                    state = STATE._replace(told=told, told_at=told_at)
                    self.assertEqual(certferry.alert_wanted(state, word, NOW), expected)
        for word in bad:
            # a timer is not exact to the second; a time later than now counts as never
            for told_at in (NOW - DAY, NOW - DAY + 60, NOW - 9 * DAY, NOW + DAY, None):
                state = STATE._replace(told=word, told_at=told_at)
                self.assertTrue(certferry.alert_wanted(state, word, NOW), told_at)


# --------------------------------------------------------------------------------------------------
# What is told of it, in this process
# --------------------------------------------------------------------------------------------------


def outcome(name=NAME, word="ok", why="expires in 89 days", shown=None, lines=(), **state):
    """An Outcome as `status` has it; `pending` is the cause of bad health that owes hooks."""
    given = STATE._replace(**state)
    cause = ""
    if word not in ("ok", "due"):
        cause = "pending" if shown and shown.owed else "expiry"
    problem = certferry.Failure(given.reason, given.detail) if given.runs else None
    return made(
        certferry.Outcome,
        lineage=lineage(given, name=name, **{"from": "up.example.net"}),
        in_service=shown or in_service(90 * DAY),
        result=given.result,
        problem=problem,
        said="",
        changed=False,
        source=given.source,
        health=certferry.Health(word, why, cause),
        lines=list(lines),
    )


class Lines(unittest.TestCase):
    """status_lines: one line for monitoring, then a table for a person."""

    def show(self, *outcomes, columns=1000, verbose=False):
        """Exit status and lines, on the second day."""
        nothing = certferry.Failure(None, "nothing")
        return certferry.status_lines(list(outcomes), nothing, NOW + DAY, columns, verbose)

    def test_exit_status(self):
        """The worst one counts: critical before unknown before warning."""
        for healths, status, word in (
            ("ok", 0, "OK"),
            ("due", 0, "OK"),
            ("warning", 1, "WARNING"),
            ("critical", 2, "CRITICAL"),
            ("unknown", 3, "UNKNOWN"),
            ("ok due", 0, "OK"),
            ("due warning", 1, "WARNING"),
            ("warning unknown", 3, "UNKNOWN"),
            ("unknown critical", 2, "CRITICAL"),
            ("ok due warning critical unknown", 2, "CRITICAL"),
        ):
            outcomes = [outcome(each + ".example.com", each) for each in healths.split()]
            found, lines = self.show(*outcomes)
            with self.subTest(healths):
                self.assertEqual(found, status)
                self.assertTrue(lines[0].startswith(f"CERTFERRY {word} - "), lines[0])
        self.assertEqual(self.show(), (3, ["CERTFERRY UNKNOWN - nothing"]))

    def test_performance_data(self):
        """Days left of each, with its thresholds."""
        lines = self.show(outcome("b.example.com"), outcome("c.example.com"))[1]
        data = lines[0].split("|")[1].split()
        self.assertEqual(data, ["'b.example.com'=89d;22;9", "'c.example.com'=89d;22;9"])

    def test_three_in_the_morning(self):
        """What is wrong, with whom, since when, why; each thing once."""
        mismatch = {
            "result": "refused",
            "reason": "key-mismatch",
            "detail": "the certificate at up.example.net:443 is for another key",
            "culprit": "up.example.net:443",
            "since": NOW - 7 * DAY,
            "runs": 14,
        }
        why = "expires in 8 days"
        line = self.show(outcome(NAME, "critical", why, **mismatch))[1][0]
        wanted = (
            f"CERTFERRY CRITICAL - {NAME} expires in 8 days: up.example.net:443 refused for "
            "14 runs since 2027-01-08 (key-mismatch) | "
        )
        self.assertTrue(line.startswith(wanted), line)
        hook = {"result": "pending", "reason": "hook", "runs": 1, "since": NOW}
        hook["culprit"] = "systemctl reload x"
        shown = in_service(90 * DAY, owed=("systemctl reload x",))
        line = self.show(outcome(NAME, "warning", "something is pending", shown, **hook))[1][0]
        self.assertIn(f"{NAME}: systemctl reload x pending for 1 run since 2027-01-15 (hook)", line)
        self.assertEqual(line.count("pending"), 1)

    def test_many(self):
        """Three of the worst are named, and how many more there are."""
        names = [f"n{number}.example.com" for number in range(50)]
        lines = self.show(*[outcome(name, "critical") for name in names], outcome("z.y"))[1]
        head, data = lines[0].split("|")
        self.assertRegex(head, r"n0\.example.com .*n2\.example\.com .*\band 47 more ")
        self.assertLess(len(head), 500)
        self.assertEqual(len(data.split()), 51)
        self.assertEqual([line.split()[0] for line in lines[2:]], [*names, "z.y"])

    def test_forging(self):
        """No hook, server or file name makes up performance data, lines or a terminal's colours."""
        nasty = "x | 'b'=9d;1;1\nCERTFERRY OK - \x1b[2J\u202e \"q\""
        state = {"result": "pending", "reason": "hook", "detail": nasty, "culprit": nasty}
        shown = in_service(90 * DAY, owed=(nasty,))
        for word in ("ok", "warning", "critical", "unknown"):
            bad = outcome(NAME, word, nasty, shown, [nasty], since=NOW, runs=1, **state)
            for verbose in (False, True):
                _, lines = self.show(bad, outcome("z.y"), verbose=verbose)
                with self.subTest(word, verbose=verbose):
                    self.assertEqual(lines[0].count("|"), 1)
                    self.assertEqual(len(lines[0].split("|")[1].split()), 2)
                    self.assertNotIn("|", "".join(lines[1:]))
                    self.assertNotIn("'", lines[0].split("|")[0])
                    oks = [line for line in lines[1:] if line.startswith("CERTFERRY")]
                    self.assertEqual(oks, [])
        status, (line,) = certferry.status_lines([], certferry.Failure(None, nasty), NOW, 80, False)
        self.assertEqual(status, 3)
        self.assertRegex(line, r"\ACERTFERRY UNKNOWN - [^|\n\x1b]+\Z")

    def test_columns(self):
        """On a narrow terminal those go that matter less."""
        lines = self.show(outcome())[1]
        wide = re.split("  +", lines[1])
        wanted = "NAME,HEALTH,DAYS LEFT,SOURCE,LAST CHECKED,LAST SUCCESS,PENDING"
        self.assertEqual(wide, wanted.split(","))
        cells = re.split("  +", lines[2])
        self.assertEqual(cells[:4], [NAME, "ok", "89 of 90 (98%)", "up.example.net:443"])
        self.assertEqual(cells[4:6], ["2027-01-15 08:00", "2027-01-15 08:00"])
        narrow = re.split("  +", self.show(outcome(), columns=60)[1][1])
        self.assertEqual(narrow[:3] + narrow[-1:], ["NAME", "HEALTH", "DAYS LEFT", "PENDING"])
        self.assertLess(len(narrow), len(wide))

    def test_times_that_count_as_never(self):
        """Later than now; a clock that is wrong gives no share above the whole."""
        one = outcome()
        one = one._replace(lineage=one.lineage._replace(last_run=NOW + 9 * DAY))
        self.assertIn("never", self.show(one)[1][2])
        for now in (NOW - 900 * DAY, NOW + 900 * DAY):
            row = certferry.status_lines([one], None, now, 1000, False)[1][2]
            share = int(re.search(r"\((-?\d+)%\)", row).group(1))
            self.assertTrue(0 <= share <= 100, row)

    def test_verbose(self):
        """It says more: what the certificate is, and what was the matter."""
        state = {"result": "failed", "reason": "timeout", "detail": "up.example.net:443 is slow"}
        less = "\n".join(self.show(outcome(NAME, since=NOW, runs=1, **state))[1])
        more = "\n".join(self.show(outcome(NAME, since=NOW, runs=1, **state), verbose=True)[1])
        self.assertTrue(more.startswith(less))
        for words in ("example.com", "2027-01-15T08:00:00Z", "sha256:", "live/", "is slow"):
            self.assertIn(words, more[len(less) :])


# --------------------------------------------------------------------------------------------------
# Scenes
# --------------------------------------------------------------------------------------------------


class Scene(unittest.TestCase):
    """A downstream, and short ways to put lineages on it."""

    def setUp(self):
        self.there = world.Downstream().started(self)
        self.drop = world.scratch(self)

    def lineage(self, name=NAME, credential=None, **options):
        """A lineage that is ferried from a file, unless `from` says otherwise; its conf."""
        credential = credential or FIRST
        given = {"from": "file:" + self.offer(name, credential), "ca_file": AUTHORITY.root}
        given.update(options)
        self.there.key(name, credential)
        return self.conf(name, **given)

    def offer(self, name, credential):
        """Put what the lineage's source offers from now on; the file."""
        path = os.path.join(self.drop, name + ".pem")
        os.replace(world.write(path + ".new", world.read(credential.fullchain)), path)
        return path

    def conf(self, name, **options):
        """Write a NAME.conf; `_` stands for `-` in its keys; lists are several lines."""
        path = self.there.conf(name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        text = ""
        for key, value in sorted(options.items()):
            values = [value] if isinstance(value, str) else value
            text += "{} =\n    {}\n".format(key.replace("_", "-"), "\n    ".join(values))
        return world.write(path, text, 0o600)

    def edit(self, name=NAME, **options):
        """Set or take away (None) options in a conf."""
        path = self.there.conf(name)
        text = world.read(path).decode()
        after = certferry.parse_conf(text, path)[0]
        for key, value in options.items():
            after[key.replace("_", "-")] = [value]
        after = {key: values for key, values in after.items() if values != [None]}
        world.write(path, certferry.edit_conf(text, after, path), 0o600)

    def seen(self, *arguments, **how):
        """(exit status, {name: object}) of a command with --json."""
        status, document = self.there.json(*arguments, **how)
        return status, {each["name"]: each for each in document["lineages"]}

    def renew(self, status=0, *arguments, **how):
        """The Result of a `renew` that ends with that status."""
        result = self.there.run("renew", *arguments, **how)
        self.assertEqual(result.status, status, result)
        return result

    def clones(self, count):
        """That many more lineages like NAME, which has been ferried; the names of all."""
        names = [f"n{number:03}.example.com" for number in range(count)]
        for name in names:
            os.mkdir(self.there.archive(name, 1))
            os.mkdir(self.there.live(name))
            os.symlink(f"../../archive/{name}@1", self.there.live(name, ".current"))
            for file in certferry.MEMBERS:
                os.link(self.there.archive(NAME, 1, file), self.there.archive(name, 1, file))
                os.symlink(".current/" + file, self.there.live(name, file))
            for path in (self.there.conf, self.there.state):
                shutil.copy2(path(NAME), path(name))
        return sorted([*names, NAME])

    def ran(self, days, name=NAME):
        """Let the last run have been so many days ago."""
        os.utime(self.there.state(name), (world.days(-days),) * 2)

    def wrapper(self, script):
        """A command to run certferry by, in place of the interpreter, which is its $PYTHON."""
        text = f"#!/bin/sh\nPYTHON='{sys.executable}'\n{script}\n"
        return world.write(os.path.join(world.scratch(self), "python"), text, 0o755)

    patched = world.patched

    def log(self):
        """A new file's path, for hooks to append to, and a function that reads its lines."""
        path = world.write(os.path.join(world.scratch(self), "log"), "")
        return path, lambda: world.read(path).decode().splitlines()


class Status(Scene):
    """What a person and what monitoring see; nothing on the disk changes by it."""

    def make(self, *healths):
        """Lineages of these healths, each called by its own."""
        for word in healths:
            credential = lived(90 * DAY, 28.5 * DAY) if word == "due" else FIRST
            self.lineage(word + ".example.com", credential)
        self.renew()
        for word, option in (("warning", "warn"), ("critical", "critical")):
            if word in healths:
                self.edit(word + ".example.com", **{option: "100%"})
        if "unknown" in healths:
            world.write(self.there.conf("unknown.example.com"), "nonsense\n")

    def test_each_health(self):
        """On the line and in JSON; a broken conf is told once in a line, and blames no source."""
        self.make("ok", "due", "warning", "critical", "unknown")
        before = self.there.snapshot()
        result = self.there.run("status")
        self.assertEqual((result.status, result.err), (2, ""))
        head, *rows = result.out.splitlines()
        self.assertRegex(head, r"\ACERTFERRY CRITICAL - critical\.example\.com [^|]+\| '")
        for data in ("'due.example.com'=28d;22;9", "'critical.example.com'=88d;22;90"):
            self.assertIn(data, head.split("|")[1].split())
        self.assertEqual([head.count("conf line 1"), "".join(rows).count("conf line 1")], [1, 1])
        self.assertNotIn(" runs: ", result.out)
        status, seen = self.seen("status")
        wanted = {word + ".example.com": word for word in (*HEALTHS, "unknown")}
        self.assertEqual({name: each["health"] for name, each in seen.items()}, wanted)
        self.assertEqual(status, 2)
        self.assertEqual(self.there.snapshot(), before)
        for names, status in (("ok due", 0), ("due warning", 1), ("unknown warning", 3)):
            arguments = [name + ".example.com" for name in names.split()]
            quiet = self.there.run("status", "-q", *arguments)
            self.assertEqual(quiet.status, status)
            self.assertEqual(len(quiet.out.splitlines()), int(status > 0))  # only problems

    def test_short_lifetimes(self):
        """Where two runs a day are few, it says how to have more."""
        self.lineage("short.example.com", lived(6 * DAY, 5 * DAY))
        self.lineage("long.example.com")
        self.renew()
        for name, shown in (("short", True), ("long", False)):
            result = self.there.run("status", name + ".example.com")
            self.assertEqual("hourly" in result.out, shown)

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
        for name, words in (
            ("stays", "still offers the same"),
            ("away", "unreachable"),
            ("other", "key-mismatch"),
        ):
            result = self.there.run("status", name + ".example.com")
            with self.subTest(name):
                self.assertEqual(result.status, 1)
                self.assertRegex(result.out, words)

    def test_unknown(self):
        """A lineage that is not there, nothing set up, files that cannot be read."""
        for arguments in (("none.example.com",), ("--bogus",), ()):
            self.assertEqual(self.there.run("status", *arguments).status, 3, arguments)
        self.assertIn("nothing is set up", self.there.run("status").out)
        self.make("ok")
        name = "ok.example.com"
        world.write(self.there.conf(name), "warn = often\n")
        status, seen = self.seen("status", name)
        self.assertEqual((status, seen[name]["health"]), (3, "unknown"))
        self.assertRegex(self.there.run("status").out, r"UNKNOWN - ok\.example\.com.* line 1: warn")

    def test_misfit_and_missing(self):
        """A key that is none of its certificate's, one that is none at all, a key alone."""
        self.make("ok", "warning", "due")
        for name, content in (("ok", world.read(OTHER.key)), ("due", b"no key\n")):
            world.write(self.there.archive(name + ".example.com", 1, "privkey.pem"), content)
        self.lineage("alone.example.com")
        names = [name + ".example.com" for name in ("ok", "due", "alone")]
        status, seen = self.seen("status", *names)
        self.assertEqual(status, 2)
        self.assertEqual({each["health"] for each in seen.values()}, {"critical"})

    def as_nobody(self):
        """An interpreter that runs the command as a user who has no rights here."""
        return self.patched(
            "import argparse, datetime, fcntl, hashlib, ipaddress, json, locale, ssl, subprocess\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        )

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_without_root(self):
        """Whoever may read the files may ask; what is closed is unknown, and hides no other."""
        self.make("ok", "warning")
        for folder, _, files in os.walk(os.path.dirname(self.there.config)):
            os.chmod(folder, 0o755)
            for file in files:
                os.chmod(os.path.join(folder, file), 0o644)
        names = ("ok.example.com", "warning.example.com")
        os.chmod(self.there.archive(names[0], 1, "privkey.pem"), 0o644)
        nobody = self.as_nobody()
        status, seen = self.seen("status", python=nobody)
        self.assertEqual((status, [seen[name]["health"] for name in names]), (1, ["ok", "warning"]))
        os.chmod(self.there.live(names[0]), 0o700)
        status, seen = self.seen("status", python=nobody)
        found = (status, [seen[name]["health"] for name in names])
        self.assertEqual(found, (3, ["unknown", "warning"]))
        line = self.there.run("status", python=nobody).out.splitlines()[0]
        self.assertIn("CERTFERRY UNKNOWN - ok.example.com cannot be read", line)

    def without_openssl(self):
        """How to run the command where there is no openssl."""
        nothing = {"env": {"PATH": world.scratch(self)}}
        if shutil.which("openssl", path=certferry.SAFE_PATH):
            nothing["python"] = self.patched(f"certferry.SAFE_PATH = {self.drop!r}")
        return nothing

    def test_no_source_is_blamed(self):
        """For what is missing on this host, though a source was asked before."""
        self.lineage()
        self.renew()
        self.offer(NAME, NEWER)
        self.assertIn("openssl", self.renew(1, **self.without_openssl()).err)
        self.assertRegex(self.there.run("status").out, r"  failed for 1 run since .*openssl")

    def test_without_openssl(self):
        """A staged key is no matter then; a key that has to be looked at is."""
        self.make("ok")
        name, metrics = "ok.example.com", os.path.join(self.drop, "certferry.prom")
        self.there.key(name, OTHER, "privkey-next.pem")
        nothing = self.without_openssl()
        result = self.there.run("status", **nothing)
        self.assertEqual((result.status, result.err), (0, ""), result)
        self.assertIn("openssl", result.out)
        os.utime(self.there.archive(name, 1, "privkey.pem"))
        status, seen = self.seen("status", **nothing)
        self.assertNotEqual((status, seen[name]["health"]), (0, "ok"))
        self.edit(name, enabled="no")
        self.assertEqual(self.seen("renew", "--metrics", metrics, **nothing), (0, {}))
        self.assertTrue(os.path.exists(metrics))

    def test_a_try_of_something_else(self):
        """Options that failed are not remembered: neither state nor health changes."""
        self.lineage()
        self.renew()
        state = world.read(self.there.state(NAME))
        before = os.stat(self.there.state(NAME)).st_mtime_ns
        self.assertEqual(self.there.run(NAME, "--from", "file:/nonexistent").status, 1)
        self.assertEqual(self.there.run(NAME, "-d", "other.example.net").status, 1)
        self.assertEqual(world.read(self.there.state(NAME)), state)
        self.assertEqual(os.stat(self.there.state(NAME)).st_mtime_ns, before)
        self.assertEqual(self.there.run("status").status, 0)

    def test_what_is_pending(self):
        """A hook that fails is named, and no source is blamed; nor is the one that was good."""
        paths = [os.path.join(self.drop, name) for name in ("first.pem", "second.pem")]
        world.write(paths[1], world.read(FIRST.fullchain))
        self.lineage(deploy_hook="false", **{"from": ["file:" + path for path in paths]})
        self.renew(1)
        line = self.there.run("status").out.splitlines()[0]
        self.assertRegex(line, r"false pending for 1 run since .*\(hook\)")
        self.assertNotIn("file:", line)
        self.edit(deploy_hook="true")
        self.renew()
        world.write(paths[0], world.read(OTHER.fullchain))
        os.unlink(paths[1])
        self.renew(1)
        line = self.there.run("status").out.splitlines()[0]
        self.assertIn(paths[0] + " refused for 1 run since ", line)

    def test_what_else_is_told(self):
        """Files that are no links, a staged key, hooks that do not run, `enabled = no`."""
        self.make("ok")
        name = "ok.example.com"
        self.there.key(name, OTHER, "privkey-next.pem")
        self.edit(name, enabled="no")
        self.there.hook("deploy", "50-forgotten|x", "true", 0o644)
        live = self.there.live(name, "cert.pem")
        content = world.read(live)
        os.unlink(live)
        world.write(live, content, 0o644)
        result = self.there.run("status")
        self.assertEqual(result.status, 0)
        digits = certferry.fingerprint(parsed(OTHER).public_key)[:16]
        for words in (digits, "enabled = no", "no links", "50-forgotten?x is not executable"):
            self.assertIn(words, result.out)
        self.assertEqual(result.out.count("|"), 1)
        before = self.there.snapshot()
        result = self.renew(0, "-v")
        self.assertRegex(result.out, r"ok\.example\.com.*enabled = no")
        self.assertIn("50-forgotten", result.err)
        after = self.there.snapshot()
        changed = [path for path in world.changed(before, after) if "/" in path]
        self.assertEqual(changed, [])
        self.ran(30, name)
        self.assertEqual(self.seen("status")[1][name]["health"], "ok")

    def test_many(self):
        """A large host is told in one line, a row for each, and soon."""
        self.lineage()
        self.renew()
        names = self.clones(30)
        for name in names[:10]:
            self.edit(name, critical="100%")
        result = self.there.run("status")
        head = result.out.splitlines()[0].split("|")
        self.assertEqual(result.status, 2)
        self.assertRegex(head[0], rf"CRITICAL - {names[0]} .*\band 7 more")
        self.assertEqual(len(head[1].split()), 31)
        self.assertLess(len(head[0]), 700)
        rows = result.out.splitlines()[2:]
        self.assertEqual(sorted(row.split()[0] for row in rows), names)
        document = self.there.json("status")[1]
        self.assertEqual([each["name"] for each in document["lineages"]], names)


class Objects(Scene):
    """The JSON document: CONTRACT's fields, and what they describe."""

    FIELDS = (
        "name result reason detail changed source not_before not_after serial fingerprint_sha256 "
        "public_key_sha256 staged_keys domains version health"
    ).split()

    def test_fields(self):
        """Each of them, of what is in service after the run, in a dry run as it would be."""
        self.lineage("b.example.com", OTHER)
        self.lineage()
        next_key = AUTHORITY.issue(["*.example.com"])
        self.there.key(NAME, next_key, "privkey-next.pem")
        for command, dry in (("renew", True), ("renew", False), ("status", False)):
            status, document = self.there.json(command, *["--dry-run"] * dry)
            with self.subTest(command, dry=dry):
                self.assertEqual((status, document.get("dry_run")), (0, dry or None))
                names = [each["name"] for each in document["lineages"]]
                self.assertEqual(names, [NAME, "b.example.com"])
                found = document["lineages"][0]
                self.assertEqual(sorted(found), sorted(self.FIELDS))
                self.assertEqual(found["result"], "installed")
                self.assertEqual(found["changed"], command == "renew")
                self.check_certificate(found, FIRST)
                digits = certferry.fingerprint(parsed(next_key).public_key)
                self.assertEqual(found["staged_keys"], [digits])
        self.offer(NAME, next_key)
        found = self.seen("renew")[1][NAME]
        self.check_certificate(found, next_key, 2)
        self.assertEqual(found["staged_keys"], [])

    def check_certificate(self, found, credential, number=1):
        """The fields that describe a certificate are this one's."""
        leaf = parsed(credential)
        wanted = {
            "not_before": certferry.iso_time(leaf.not_before),
            "not_after": certferry.iso_time(leaf.not_after),
            "fingerprint_sha256": certferry.fingerprint(leaf.der),
            "public_key_sha256": certferry.fingerprint(leaf.public_key),
            "domains": ["*.example.com"],
            "version": number,
            "health": "ok",
            "reason": None,
        }
        self.assertEqual({key: found[key] for key in wanted}, wanted)
        self.assertEqual(int(found["serial"], 16), int(leaf.serial, 16))
        self.assertRegex(found["source"], r"\Afile:/")

    def test_nothing_in_service(self):
        """Fields that do not apply are null; a refused offer is described in `detail`."""
        self.lineage()
        self.offer(NAME, OTHER)
        status, seen = self.seen("renew")
        found = seen[NAME]
        self.assertEqual((status, found["result"], found["reason"]), (1, "refused", "key-mismatch"))
        for field in self.FIELDS[6:11] + ["domains", "version"]:
            self.assertIsNone(found[field], field)
        self.assertEqual((found["changed"], found["staged_keys"]), (False, []))
        self.assertEqual(found["health"], "critical")
        self.assertIn(certferry.fingerprint(parsed(OTHER).public_key)[:16], found["detail"])

    def test_nothing_at_all(self):
        """An empty list, exit 0 for `renew` and 3 for `status`."""
        for command, status in (("renew", 0), ("status", 3)):
            self.assertEqual(self.there.json(command), (status, {"lineages": []}))


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


class Metrics(Scene):
    """Prometheus's text format, whatever happened."""

    GAUGES = [
        "certificate_not_after_timestamp_seconds",
        "certificate_not_before_timestamp_seconds",
        "health",
        "last_check_timestamp_seconds",
        "last_success_timestamp_seconds",
        "pending",
        "run_duration_seconds",
        "upstream_not_after_timestamp_seconds",
    ]

    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.drop, "certferry.prom")

    def parse(self, text):
        """{metric: {lineage: value}} of Prometheus text, its form looked at."""
        found, about = {}, []
        for line in text.decode("ascii").splitlines():
            if line.startswith("#"):
                self.assertRegex(line, r"\A# (HELP certferry_\w+ \S.*|TYPE certferry_\w+ gauge)\Z")
                about.append(tuple(line.split()[1:3]))
                continue
            match = re.match(r'certferry_(\w+)(?:\{name="([a-z0-9.-]+)"\})? ([0-9.]+)\Z', line)
            self.assertTrue(match, line)
            found.setdefault(match.group(1), {})[match.group(2)] = float(match.group(3))
        self.assertEqual(len(about), len(set(about)))
        return found

    def read(self):
        """The same of the file."""
        return self.parse(world.read(self.path))

    def ferried(self):
        """A lineage that is well and one whose hook fails, ferried."""
        self.lineage()
        self.lineage("b.example.com", deploy_hook="false")
        return self.renew(1, "--metrics", self.path)

    def test_values(self):
        """Of what is well, pending, never heard of, unknown; a time later than now is left out."""
        state = {"upstream_not_after": NOW + 5}
        rows = [
            outcome("a.b", **state),
            outcome("c.d", "warning", shown=in_service(90 * DAY, owed=()), **state),
            outcome("e.f", "critical", shown=certferry.NOTHING, result="failed"),
            outcome("g.h", "unknown", shown=certferry.NOTHING),
        ]
        rows[3] = rows[3]._replace(lineage=rows[3].lineage._replace(last_run=NOW + 99))
        found = self.parse(certferry.format_metrics(rows, NOW + 9, 1.5))
        self.assertEqual(sorted(found), self.GAUGES)
        self.assertEqual(found["health"], {"a.b": 0, "c.d": 2, "e.f": 3, "g.h": 4})
        self.assertEqual(found["pending"], {"a.b": 0, "c.d": 1, "e.f": 0, "g.h": 0})
        self.assertEqual(found["run_duration_seconds"], {None: 1.5})
        for gauge, names, value in (
            ("certificate_not_before", "a.b c.d", NOW),
            ("certificate_not_after", "a.b c.d", NOW + 90 * DAY),
            ("upstream_not_after", "a.b c.d", NOW + 5),
            ("last_check", "a.b c.d e.f", NOW),
            ("last_success", "a.b c.d", NOW),
        ):
            wanted = {name: value for name in names.split()}
            self.assertEqual(found[gauge + "_timestamp_seconds"], wanted)

    def test_file(self):
        """Mode 0644 under any umask, in one rename, nothing beside it; by `status` too."""
        masked = self.wrapper('umask 077; exec "$PYTHON" "$@"')
        self.lineage()
        world.write(self.path, "what was there before\n", 0o600)
        for command in ("renew", "status"):
            with open(self.path, "rb") as before:
                result = self.there.run(command, "--metrics", self.path, python=masked)
                self.assertEqual(result.status, 0, result)
                text = before.read()
            self.assertNotEqual(world.read(self.path), text)
            self.assertTrue(text.endswith(b"\n"))
            self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o644)
            self.assertEqual(sorted(os.listdir(self.drop)), [NAME + ".pem", "certferry.prom"])
            self.assertEqual(sorted(self.read()), self.GAUGES)

    def test_everything_failed(self):
        """No upstream, a broken conf; nothing there at all."""
        self.renew(0, "--metrics", self.path)
        self.assertEqual(list(self.read()), ["run_duration_seconds"])
        with world.Closed() as closed:
            self.lineage("away.example.com", **{"from": closed.source})
            self.lineage("broken.example.com")
            world.write(self.there.conf("broken.example.com"), "nonsense\n")
            self.renew(1, "--metrics", self.path)
        found = self.read()
        self.assertEqual(found["health"], {"away.example.com": 3, "broken.example.com": 4})
        self.assertNotIn("certificate_not_after_timestamp_seconds", found)
        self.assertIn("away.example.com", found["last_check_timestamp_seconds"])
        self.assertNotIn("away.example.com", found.get("last_success_timestamp_seconds", ()))

    def test_a_run_that_cannot_begin(self):
        """A broken environment file stops all; the file still says how things stand."""
        self.lineage()
        self.renew()
        environment = os.path.join(self.there.config, "certferry", "environment")
        world.write(environment, "nonsense\n", 0o600)
        self.renew(1, "--metrics", self.path)
        self.assertIn(NAME, self.read()["certificate_not_after_timestamp_seconds"])
        status, found = self.seen("renew")
        ended = (status, found[NAME]["result"], found[NAME]["reason"])
        self.assertEqual(ended, (1, "failed", None), found)
        self.assertIn("environment line 1", found[NAME]["detail"])

    def test_where(self):
        """CERTFERRY_METRICS in certferry/environment; the option wins; a named one keeps others."""
        self.ferried()
        both = {NAME, "b.example.com"}
        other = os.path.join(self.drop, "other.prom")
        environment = os.path.join(self.there.config, "certferry", "environment")
        text = f"# for node_exporter\nCERTFERRY_METRICS={other}\n"
        world.write(environment, text, 0o600)
        os.unlink(self.path)
        self.renew(0, NAME)
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual(set(self.parse(world.read(other))["health"]), both)
        os.unlink(other)
        self.renew(0, NAME, "--metrics", self.path)
        self.assertFalse(os.path.exists(other))
        self.assertEqual(set(self.read()["health"]), both)
        self.there.run("status", NAME, "--metrics", self.path)
        self.assertEqual(set(self.read()["health"]), both)

    def test_relative_and_dry(self):
        """A path is from where the command was given; a dry run writes none."""
        relative = os.path.join(os.path.dirname(self.there.config), "relative.prom")
        self.renew(0, "--metrics", "relative.prom", "--dry-run")
        self.assertFalse(os.path.exists(relative))
        self.renew(0, "--metrics", "relative.prom")
        self.assertTrue(os.path.exists(relative))

    def test_a_place_that_is_none(self):
        """One line says so, where the path comes from too, and the ferry has gone on."""
        self.lineage()
        result = self.renew(1, "--metrics", os.path.join(self.drop, "missing", "x.prom"))
        self.assertRegex(result.err, r"\Acertferry: .*metrics.*missing.*\n\Z")
        self.assertIn(NAME + ": installed", result.out)
        fifo = os.path.join(self.drop, "fifo")
        os.mkfifo(fifo)
        environment = os.path.join(self.there.config, "certferry", "environment")
        world.write(environment, f"CERTFERRY_METRICS={fifo}\n", 0o600)
        result = self.renew(1)
        self.assertRegex(result.err, r"\Acertferry: .*fifo.*CERTFERRY_METRICS.*\n\Z")
        self.assertTrue(stat.S_ISFIFO(os.lstat(fifo).st_mode))

    def test_links_in_a_circle(self):
        """What cannot be listed is told once; document and file are written all the same."""
        os.symlink("live", os.path.join(self.there.config, "live"))
        result = self.renew(1, "--json", "--metrics", self.path)
        self.assertEqual(json.loads(result.out), {"lineages": []})
        self.assertIn("/live", result.err)
        self.assertNotIn("bug", result.err)

    @world.needs("promtool")
    def test_promtool(self):
        """Its own checker has nothing to say."""
        self.ferried()
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(command, input=world.read(self.path), **how)
        self.assertEqual((done.returncode, done.stdout), (0, b""))


@world.needs("promtool")
class Rules(Scene):
    """The README's alert rules, by promtool and with metrics that there are."""

    SAMPLE = """\
      - series: 'certferry_{}{{name="a.example.com"}}'
        values: '{}'
"""
    EXPECTED = """\
      - expr: count(ALERTS{{alertname='{}', alertstate='firing'}}) or vector(0)
        eval_time: {}
        exp_samples: [{{value: {}}}]
"""

    @classmethod
    def setUpClass(cls):
        text = world.read(os.path.join(world.REPOSITORY, "README.md")).decode("utf-8")
        blocks = re.findall(r"^```\w*\n(groups:.*?)^```", text, re.M | re.S)
        cls.rules = "".join(block for block in blocks if "certferry_" in block)

    def promtool(self, command, path):
        """What promtool says of a file; it has to be content."""
        how = {"cwd": self.drop, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(["promtool", command, "rules", path], **how)
        self.assertEqual(done.returncode, 0, done.stdout.decode())
        return done.stdout.decode()

    def test_form(self):
        """Three rules, and no metric in them that is never written."""
        path = world.write(os.path.join(self.drop, "rules.yml"), self.rules)
        self.assertIn("3 rules found", self.promtool("check", path))
        metrics = certferry.format_metrics([outcome(upstream_not_after=NOW)], NOW, 1).decode()
        used, written = (
            set(re.findall(r"\bcertferry_\w+", text)) for text in (self.rules, metrics)
        )
        self.assertLessEqual(used, written)

    def test_what_they_say(self):
        """A host that is well for three days and then badly off in three ways, one at a time."""
        alerts = re.findall(r"- alert: (\w+)", self.rules)  # of health, of time left, of silence
        always, three_days, then = "+0x600", "x288 ", "+0x300"  # steps of a quarter hour
        steady = {
            "health": "0" + always,
            "pending": "0" + always,
            "last_check": "0+900x600",
            "certificate_not_before": "0" + always,
            "certificate_not_after": str(90 * DAY) + always,
        }
        unwell = {"health": "0+0" + three_days + "2" + then}
        stopped = {"last_check": "0+900" + three_days + str(3 * DAY) + then}
        ending = {
            "certificate_not_before": str(-79 * DAY) + always,
            "certificate_not_after": str(11 * DAY) + always,
        }
        text = "rule_files: [rules.yml]\nevaluation_interval: 15m\ntests:\n"
        for changes, when, firing in (
            ({}, "4d", None),
            (unwell, "4d", alerts[0]),
            (ending, "4d", alerts[1]),
            (stopped, "4d", None),
            (stopped, "6d", alerts[2]),
        ):
            text += "  - interval: 15m\n    input_series:\n"
            for metric, values in dict(steady, **changes).items():
                if "_" in metric:
                    metric += "_timestamp_seconds"
                text += self.SAMPLE.format(metric, values)
            text += "    promql_expr_test:\n"
            for alert in alerts:
                text += self.EXPECTED.format(alert, when, int(alert == firing))
        world.write(os.path.join(self.drop, "rules.yml"), self.rules)
        self.promtool("test", world.write(os.path.join(self.drop, "test.yml"), text))


# --------------------------------------------------------------------------------------------------
# Alerts
# --------------------------------------------------------------------------------------------------


class Alerts(Scene):
    """renewal-hooks/alert: who is woken, when, with what."""

    FIELDS = "NAME WAS HEALTH REASON DETAIL NOT_AFTER DAYS_LEFT".split()

    def setUp(self):
        super().setUp()
        self.path, self.lines = self.log()
        fields = "|".join("$CERTFERRY_" + field for field in self.FIELDS)
        self.hook = self.there.hook("alert", "10-mail", f'echo "{fields}" >>{self.path}')
        self.lineage()

    def told(self):
        """[(name, was, health)] of what was told since the last time it was asked."""
        lines = self.lines()
        world.write(self.path, "")
        return [tuple(line.split("|")[:3]) for line in lines]

    def test_turns(self):
        """To bad health, within it and from it at once, and only once."""
        for edits, status, expected in (
            ({}, 0, []),
            ({"warn": "100%"}, 0, [(NAME, "ok", "warning")]),
            ({}, 0, []),
            ({"critical": "100%"}, 0, [(NAME, "warning", "critical")]),
            ({"critical": None}, 0, [(NAME, "critical", "warning")]),
            ({"warn": None}, 0, [(NAME, "warning", "ok")]),
            ({}, 0, []),
        ):
            self.edit(**edits)
            self.renew(status)
            self.assertEqual(self.told(), expected, edits)
        good = world.read(self.there.conf(NAME))
        for content, status, expected in (
            (b"nonsense\n", 1, [(NAME, "ok", "unknown")]),
            (b"nonsense\n", 1, []),
            (good, 0, [(NAME, "unknown", "ok")]),
        ):
            world.write(self.there.conf(NAME), content)
            self.renew(status)
            self.assertEqual(self.told(), expected, content)

    def test_due_is_no_alert(self):
        """Nobody is woken for it; health that woke nobody is told as what it was all the same."""
        self.offer(NAME, lived(3 * DAY, DAY))
        self.assertEqual(self.seen("renew")[1][NAME]["health"], "due")
        self.assertEqual(self.told(), [])
        self.edit(warn="100%")
        self.renew()
        self.assertEqual(self.told(), [(NAME, "due", "warning")])

    def test_environment(self):
        """What it is told, and none of the credentials."""
        self.edit(deploy_hook="false")
        seen, lines = self.log()
        self.there.hook("alert", "20-environment", f"{{ env; wc -c; }} >{seen}")
        self.renew(1, env={"VAULT_TOKEN": "s.not-for-hooks", "PATH": "/usr/bin:/bin"})
        values = dict(line.partition("=")[::2] for line in lines())
        self.assertNotIn("s.not-for-hooks", "\n".join(lines()))
        self.assertIn("0", lines()[-1].split())  # nothing on its standard input
        self.assertIn("/usr/sbin", values["PATH"].split(":"))
        for field, expected in (
            ("NAME", NAME),
            ("WAS", "ok"),
            ("HEALTH", "warning"),
            ("REASON", "hook"),
            ("NOT_AFTER", certferry.iso_time(parsed(FIRST).not_after)),
        ):
            self.assertEqual(values["CERTFERRY_" + field], expected)
        self.assertIn(values["CERTFERRY_DAYS_LEFT"], ("88", "89"))  # 89 in the second of its issue
        self.assertIn("false", values["CERTFERRY_DETAIL"])

    def test_of_a_key_alone(self):
        """No certificate yet: critical, with what is known."""
        os.unlink(os.path.join(self.drop, NAME + ".pem"))
        self.renew(1)
        name, was, word, reason, detail, not_after, left = self.lines()[0].split("|")
        self.assertEqual((name, was, word), (NAME, "ok", "critical"))
        self.assertEqual((reason, not_after, left), ("unreachable", "", ""))
        self.assertIn(NAME + ".pem", detail)

    def test_taken_back_by_certbot(self):
        """A lineage that certbot links to its own files again is told at once."""
        self.renew()
        os.mkdir(os.path.join(self.there.config, "renewal"))
        path = os.path.join(self.there.config, "renewal", NAME + ".conf")
        world.write(path, "version = 2.1.0\n")
        os.unlink(self.there.live(NAME, "cert.pem"))
        os.symlink(f"../../archive/{NAME}@1/cert.pem", self.there.live(NAME, "cert.pem"))
        self.renew(1)
        self.assertEqual(self.told(), [(NAME, "ok", "warning")])
        seen = self.seen("status")[1][NAME]
        self.assertEqual((seen["result"], seen["reason"]), ("refused", "certbot"))

    def test_a_hook_that_fails(self):
        """It is reported, the others run, the run goes on, and it is not tried again."""
        self.there.hook("alert", "05-fails", "echo no network >&2; exit 7")
        self.lineage("b.example.com", warn="100%")
        self.edit(warn="100%")
        result = self.there.run("renew")
        said = r"(?m)^certferry: [ab]\.example\.com: [^\n]*05-fails[^\n]*7[^\n]*no network"
        self.assertEqual(len(re.findall(said, result.err)), 2, result)
        self.assertEqual(len(self.told()), 2)
        self.assertEqual(result.out.count(": installed: "), 2)
        self.there.run("renew")
        self.assertEqual(self.told(), [])

    def test_told_means_that_a_hook_ran(self):
        """One that was not there or was refused told nobody; nor did a dry run or `status`."""
        self.edit(warn="100%")
        self.there.run("renew", "--dry-run")
        self.there.run("status")
        os.rename(self.hook, self.hook + "~")
        self.renew()
        os.rename(self.hook + "~", self.hook)
        for mode in (0o777, 0o644):
            os.chmod(self.hook, mode)
            self.assertEqual(self.hook in self.there.run("renew").err, mode == 0o777)
        self.assertEqual(self.told(), [])
        os.chmod(self.hook, 0o755)
        self.renew()
        self.assertEqual(self.told(), [(NAME, "ok", "warning")])


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


class Output(Scene):
    """Lines for people, for the journal, for a terminal."""

    PROBLEM = rf"certferry: {re.escape(NAME)}: [^\n]+"

    def test_quiet(self):
        """Silent unless there is a problem."""
        self.lineage()
        self.assertEqual(self.there.run("renew", "--quiet"), (0, "", ""))
        self.edit(**{"from": "file:/nonexistent", "warn": "100%"})
        result = self.renew(1, "-q")
        self.assertEqual(result.out, "")
        self.assertRegex(result.err, rf"\A{self.PROBLEM}\n\Z")

    def test_deferred_then_failed(self):
        """An upstream away is a warning line for a tenth of the lifetime, and then a problem.

        What is a journal is told priorities, which it knows by device and inode.
        """
        self.lineage()
        self.renew()
        self.edit(**{"from": "file:/nonexistent"})
        journal = world.write(os.path.join(world.scratch(self), "journal"), "")
        facts = os.stat(journal)
        to_journal = self.wrapper(f'exec "$PYTHON" "$@" 2>{journal}')
        for days, inode, status, priority in (
            (1, 0, 0, "<4>"),
            (8.9, 1, 0, ""),
            (9.1, 0, 1, "<3>"),
        ):
            self.ran(days)
            self.edit_state()
            stream = f"{facts.st_dev}:{facts.st_ino + inode}"
            result = self.renew(status, python=to_journal, env={"JOURNAL_STREAM": stream})
            line = world.read(journal).decode()
            with self.subTest(days=days):
                self.assertRegex(line, rf"\A{priority}{self.PROBLEM}\n\Z")
                self.assertEqual("deferred" in result.out, status == 0)

    def edit_state(self):
        """Let the last run have ended well."""
        path = self.there.state(NAME)
        before = os.stat(path)
        state = certferry.parse_state(world.read(path).decode(), path)
        state = state._replace(result="unchanged", reason=None, runs=0, since=None, good=None)
        world.write(path, certferry.format_state(state))
        os.utime(path, (before.st_mtime, before.st_mtime))

    def test_closed_descriptors(self):
        """With JOURNAL_STREAM set, and standard error closed: as without a journal."""
        self.lineage()
        for closed in ("2>&-", "<&- >&- 2>&-"):
            python = self.wrapper(f'exec "$PYTHON" "$@" {closed}')
            self.renew(0, python=python, env={"JOURNAL_STREAM": "8:12345"})
        self.assertEqual(self.there.run("status").status, 0)

    def test_a_changed_key(self):
        """The loudest: which keys, why, what to do, how long what is here still lasts."""
        self.lineage()
        self.renew()
        other = AUTHORITY.issue(["*.example.com"], key="rsa:2048")
        self.offer(NAME, other)
        line = self.renew(1).err
        self.assertRegex(line, rf"\A{self.PROBLEM}\n\Z")
        for word in ("RSA 2048", "ECDSA P-256", "reuse_key", "--key"):
            self.assertIn(word, line)
        self.assertRegex(line, "lasts 8[89] more days")  # 89 in the second of issue
        for credential in (FIRST, other):
            digits = certferry.fingerprint(parsed(credential).public_key)
            self.assertIn("sha256:" + digits[:16], line)


# --------------------------------------------------------------------------------------------------
# Services
# --------------------------------------------------------------------------------------------------


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
        self.assertEqual(self.lines(), ["hook"])
        self.assertEqual(certferry.SERVED_SECONDS, 15)
        self.patient = self.patched("certferry.SERVED_SECONDS = 60")
        self.hasty = self.patched("certferry.SERVED_SECONDS = 0.1")

    def ended(self, status, result, reason, hooks, python=None):
        """A `renew` ended so, and by now the hook has run so many times; its JSON object."""
        found, seen = self.seen("renew", python=python or self.hasty)
        ended = (found, seen[NAME]["result"], seen[NAME]["reason"])
        self.assertEqual(ended, (status, result, reason), seen)
        self.assertEqual(len(self.lines()), hooks)
        return seen[NAME]

    def test_at_once_and_late(self):
        """The hooks run once, whenever it is seen."""
        for credential, after in ((NEWER, 0), (again(), 2)):
            self.offer(NAME, credential)
            self.service.reload(credential, after)
            self.ended(0, "installed", None, len(self.lines()) + 1, self.patient)
            self.assertIsNone(self.service.waiting)
        self.ended(0, "unchanged", None, 3)

    def test_never(self):
        """Pending, the hooks again at each run, until it is served."""
        self.offer(NAME, NEWER)
        first = self.ended(1, "pending", "not-served", 2)
        self.assertEqual((first["version"], first["changed"]), (2, True))
        old = parsed(FIRST)
        date = certferry.iso_time(old.not_before)[:10]
        path = "live/a.example.com/fullchain.pem"
        for word in (self.service.source, old.serial[:8], date, path, NAME):
            self.assertIn(word, first["detail"])
        second = self.ended(1, "pending", "not-served", 3)
        self.assertEqual((second["changed"], second["health"]), (False, "warning"))
        status = self.there.run("status")
        self.assertEqual(status.status, 1)
        self.assertIn(self.service.source + " pending for 2 runs", status.out)
        self.service.switch(NEWER)
        self.assertEqual(self.ended(0, "unchanged", None, 4)["health"], "ok")
        self.ended(0, "unchanged", None, 4)

    def test_a_stale_copy_is_found(self):
        """Each run looks, though nothing is new; the hooks run at the one after."""
        self.service.switch(lived(90 * DAY, 50 * DAY))
        started = time.monotonic()
        self.ended(1, "pending", "not-served", 1, self.patient)
        self.assertLess(time.monotonic() - started, 50)
        self.ended(1, "pending", "not-served", 2)
        self.service.switch(FIRST)
        self.ended(0, "unchanged", None, 3)


if __name__ == "__main__":
    unittest.main()
