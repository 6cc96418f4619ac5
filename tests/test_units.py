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


class Service(unittest.TestCase):

    def test_takes_nothing_from_a_hook(self):
        """No sandbox, no namespace, no filter: what works in root's shell works in the unit."""
        keys = {key for key, _, _ in settings("certferry.service")["Service"]}
        self.assertEqual({"Type", "ExecStart", "Environment", "LimitCORE", "KillMode",
                          "TimeoutStartSec"}, keys)

    def test_runs_renew_once_and_waits_for_it(self):
        for key, value in (("Type", "oneshot"), ("ExecStart", "/usr/local/bin/certferry renew"),
                           ("TimeoutStartSec", "infinity"), ("KillMode", "process")):
            self.assertEqual(value, value_of("certferry.service", "Service", key))
        self.assertEqual("network-online.target time-sync.target",
                         value_of("certferry.service", "Unit", "After"))

    def test_each_directive_is_explained(self):
        plain = {"Type", "ExecStart", "Description", "WantedBy"}
        for name in NAMES:
            for section, entries in settings(name).items():
                for key, _, explained in entries:
                    self.assertTrue(explained or key in plain, (name, section, key))


class Timer(unittest.TestCase):

    def test_spreads_a_fleet_over_the_time_between_two_runs(self):
        for key, value in (("RandomizedDelaySec", "12h"), ("FixedRandomDelay", "true"),
                           ("Persistent", "true")):
            self.assertEqual(value, value_of("certferry.timer", "Timer", key))
        self.assertEqual("timers.target", value_of("certferry.timer", "Install", "WantedBy"))

    @world.needs("systemd-analyze")
    def test_twelve_hours_apart_and_not_at_the_full_hour(self):
        done = subprocess.run(
            ["systemd-analyze", "calendar", "--iterations=3", "--base-time=2027-01-01 00:00:00 UTC",
             value_of("certferry.timer", "Timer", "OnCalendar")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ, TZ="UTC"))
        times = re.findall(r"(?:elapse|#[23]): \w+ (\S+ \S+) UTC", done.stdout.decode())
        self.assertEqual(["2027-01-01 01:17:00", "2027-01-01 13:17:00", "2027-01-02 01:17:00"],
                         times, done.stdout)


@world.needs("systemd-analyze")
class Verify(unittest.TestCase):

    def test_systemd_has_nothing_to_say(self):
        """Its status is 0 for unknown keys too: any word is a failure."""
        folder = world.scratch(self)
        for name in NAMES:
            text = world.read(os.path.join(world.REPOSITORY, name)).decode()
            # The program need not be installed where the tests run.
            here = text.replace("/usr/local/bin/certferry", shutil.which("true"))
            world.write(os.path.join(folder, name), here)
        done = subprocess.run(["systemd-analyze", "verify"] + [
            os.path.join(folder, name) for name in NAMES],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((0, b""), (done.returncode, done.stdout))


if __name__ == "__main__":
    unittest.main()
