"""A fleet: its delays, the simulation of it, and trees of real downstreams."""

import array
import unittest

from tests import fleet, world

HALF_A_DAY = 12 * fleet.HOUR


def load_tests(loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK the delays alone: the rest is no matter of Python."""
    if world.QUICK:
        return loader.loadTestsFromTestCase(Delays)
    return tests


class Delays(unittest.TestCase):
    """What --jitter makes of the identities of 10,000 hosts."""

    @classmethod
    def setUpClass(cls):
        cls.delay = staticmethod(fleet.jitter_delay())
        cls.delays = [cls.delay(HALF_A_DAY, fleet.machine_id(number)) for number in range(10000)]

    def test_range(self):
        self.assertTrue(all(0 <= delay < HALF_A_DAY for delay in self.delays))
        self.assertLess(min(self.delays), 60)
        self.assertGreater(max(self.delays), HALF_A_DAY - 60)

    def test_no_ten_minutes_get_more_than_half_as_much_again(self):
        seconds = array.array("L", [0]) * HALF_A_DAY
        for delay in self.delays:
            seconds[int(delay)] += 1
        mean = 10000 * 600 / float(HALF_A_DAY)
        self.assertLessEqual(fleet.fullest(seconds, 600), 1.5 * mean)

    def test_a_host_keeps_its_place(self):
        again = [self.delay(HALF_A_DAY, fleet.machine_id(number)) for number in range(100)]
        self.assertEqual(self.delays[:100], again)
        self.assertEqual(10000, len(set(self.delays)))

    def test_the_place_is_a_share_of_the_time(self):
        for identity in ("0" * 32, "", "host1.example.com", "h\u00f6st"):
            share = self.delay(HALF_A_DAY, identity) / HALF_A_DAY
            self.assertAlmostEqual(share, self.delay(600, identity) / 600)
            self.assertEqual(0, self.delay(0, identity))


def one_a_minute(window):
    """A crowd of which one host has each whole minute in [0, window) as its delay."""
    crowd = array.array("L", [0]) * window
    crowd[::60] = array.array("L", [1]) * (window // 60)
    return crowd


class Simulation(unittest.TestCase):
    """The rules that fleet.py computes by."""

    def test_a_week_has_its_runs(self):
        for timer, count in zip(fleet.timers(), (14, 168, 14)):
            crowd = one_a_minute(timer.window)
            self.assertEqual(count * sum(crowd), sum(fleet.load(timer, crowd)), timer.label)

    def test_everyone_has_the_new_certificate_within_a_period(self):
        for timer in fleet.timers():
            crowd = one_a_minute(timer.window)
            for outage in (0, fleet.OUTAGE):
                half, most, whole = fleet.adopted(timer, crowd, outage)
                self.assertTrue(half <= most <= whole <= timer.period + outage, timer.label)

    def test_a_reboot_of_all_is_no_herd(self):
        timer = fleet.timers()[0]
        crowd = one_a_minute(timer.window)
        self.assertLessEqual(max(fleet.load(timer, crowd, boot=fleet.ROTATION)), 2)

    def test_a_missed_run_is_made_up_for_by_the_timer_and_not_by_cron(self):
        shipped, _, cron = fleet.timers()
        for timer, is_made_up in ((shipped, True), (cron, False)):
            slot, delay = next(fleet.runs(timer, 0)), 10 * fleet.HOUR
            first = next(
                moment for moment in fleet.runs(timer, delay, boot=slot + 1) if moment > slot
            )
            expected = slot + 1 + delay if is_made_up else slot + timer.period + delay
            self.assertEqual(expected, first, timer.label)


class Relays(unittest.TestCase):
    """Every downstream that serves the certificate is an upstream for others."""

    def setUp(self):
        self.authority = world.Authority(world.scratch(self))
        self.first = self.authority.issue(["example.com"])
        self.second = self.authority.issue(["example.com"], key=self.first.key)
        self.root = world.Upstream(self.first).started(self)

    def relay(self, upstream, serves=True):
        """Set up a downstream of that upstream, and a server that shows its live/ folder."""
        downstream = world.Downstream().started(self)
        downstream.key("example.com", self.first)
        result = downstream.run(
            "example.com", "--from", upstream.source, "--ca-file", self.authority.root, "--no-timer"
        )
        self.assertEqual(0, result.status, result)
        server = world.Upstream(self.live(downstream)).started(self) if serves else None
        return downstream, server

    @staticmethod
    def live(downstream):
        """The Credential that a daemon pointed at live/ loads."""
        return world.Credential(
            *(
                downstream.live("example.com", file + ".pem")
                for file in ("privkey", "cert", "chain", "fullchain")
            )
        )

    def run_once(self, level):
        """Run each downstream of a level once, two side by side, and reload what they serve."""
        for pair in zip(level[::2], level[1::2] + [None] * (len(level) % 2)):
            started = [(relay[0].start("renew"), relay) for relay in pair if relay]
            for process, (downstream, server) in started:
                with process:
                    out, err = process.communicate(timeout=60)
                self.assertEqual((0, b""), (process.returncode, err))
                self.assertIn(b": installed: ", out)
                if server:
                    server.switch(self.live(downstream))

    def assert_all(self, levels, credential):
        for level in levels:
            for downstream, _ in level:
                downstream.assert_fits(self, "example.com", credential)

    def test_tree(self):
        """One, two and four; with CERTFERRY_FULL one, five and twenty-five."""
        branches = range(5 if world.FULL else 2)
        top = self.relay(self.root)
        middle = [self.relay(top[1]) for _ in branches]
        leaves = [self.relay(server, serves=False) for _, server in middle for _ in branches]
        levels = [[top], middle, leaves]
        self.assert_all(levels, self.first)
        self.root.switch(self.second)
        for level in levels:
            self.run_once(level)
        self.assert_all(levels, self.second)


if __name__ == "__main__":
    unittest.main()
