"""certferry.service and certferry.timer: what systemd makes of them, and what a hook must not miss.

tests/platforms.sh starts them in a booted system.
"""

import os
import re
import shutil
import subprocess
import unittest

from tests import world

NAMES = ("certferry.service", "certferry.timer")


def settings(name):
    """{section: [(key, value, whether a comment stands above)]} of a unit file."""
    sections, explained = {}, False
    for line in world.read(os.path.join(world.REPOSITORY, name)).decode().splitlines():
        if line.startswith("["):
            entries = sections.setdefault(line.strip("[]"), [])
        elif "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            entries.append((key, value, explained))
            continue  # a comment is for all the lines up to the next blank or comment
        explained = line.startswith("#")
    return sections


def value_of(name, section, key):
    """The one value of a key."""
    (value,) = [value for found, value, _ in settings(name)[section] if found == key]
    return value


def systemd_analyze(*words):
    """What it says, on both streams, as text."""
    environment = dict(os.environ, TZ="UTC")
    command = ("systemd-analyze",) + words
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    return done.stdout.decode()


class UnitCase(unittest.TestCase):
    """What a unit file says."""

    def assert_values(self, name, section, values):
        """Each of these keys is there once, with this value."""
        for key, value in values.items():
            self.assertEqual(value, value_of(name, section, key), key)


class Service(UnitCase):
    def test_takes_nothing_from_a_hook(self):
        """No sandbox, no namespace, no filter: what works in root's shell works in the unit."""
        found = {key for key, _, _ in settings("certferry.service")["Service"]}
        wanted = "Type ExecStart Environment LimitCORE KillMode TimeoutStartSec"
        self.assertEqual(set(wanted.split()), found)

    def test_runs_renew_once_and_waits_for_it(self):
        values = {
            "Type": "oneshot",
            "ExecStart": "/usr/local/bin/certferry renew",
            "TimeoutStartSec": "infinity",
            "KillMode": "process",
        }
        self.assert_values("certferry.service", "Service", values)
        after = {"After": "network-online.target time-sync.target"}
        self.assert_values("certferry.service", "Unit", after)

    def test_each_directive_is_explained(self):
        plain = {"Type", "ExecStart", "Description", "WantedBy"}
        for name in NAMES:
            for section, entries in settings(name).items():
                for key, _, explained in entries:
                    self.assertTrue(explained or key in plain, (name, section, key))


class Timer(UnitCase):
    def test_spreads_a_fleet_over_the_time_between_two_runs(self):
        values = {"RandomizedDelaySec": "12h", "FixedRandomDelay": "true", "Persistent": "true"}
        self.assert_values("certferry.timer", "Timer", values)
        self.assert_values("certferry.timer", "Install", {"WantedBy": "timers.target"})

    @world.needs("systemd-analyze")
    def test_twelve_hours_apart_and_not_at_the_full_hour(self):
        calendar = value_of("certferry.timer", "Timer", "OnCalendar")
        since = "--base-time=2027-01-01 00:00:00 UTC"
        said = systemd_analyze("calendar", "--iterations=3", since, calendar)
        times = re.findall(r"(?:elapse|#[23]): \w+ (\S+ \S+) UTC", said)
        expected = ["2027-01-01 01:17:00", "2027-01-01 13:17:00", "2027-01-02 01:17:00"]
        self.assertEqual(expected, times, said)


@world.needs("systemd-analyze")
class Verify(unittest.TestCase):
    def test_systemd_has_nothing_to_say(self):
        """Its status is 0 for unknown keys too: any word is a failure."""
        folder = world.scratch(self)
        paths = [os.path.join(folder, name) for name in NAMES]
        for name, path in zip(NAMES, paths):
            text = world.read(os.path.join(world.REPOSITORY, name)).decode()
            # The program need not be installed where the tests run.
            world.write(path, text.replace("/usr/local/bin/certferry", shutil.which("true")))
        self.assertEqual("", systemd_analyze("verify", *paths))


if __name__ == "__main__":
    unittest.main()
