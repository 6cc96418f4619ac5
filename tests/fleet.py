#!/usr/bin/env python3
"""What a fleet of downstreams does to one upstream: `python3 tests/fleet.py [HOSTS...]`.

A week, second by second, of 1,000 to 1,000,000 hosts that each ask at the place which
certferry.py's own jitter_delay() gives them: a calm week, a rotation at the upstream, one at the
beginning of a six-hour outage, a reboot of the whole fleet at one instant. Then, where there is an
nginx, how many handshakes one of its workers completes in a second of its processor's time.

systemd hashes the machine's identity in its own way for RandomizedDelaySec= with FixedRandomDelay=;
it spreads as evenly, so the same delays stand for it.
"""

import array
import collections
import importlib.util
import itertools
import os
import re
import subprocess
import sys

# Run as a script, Python looks for modules in tests/ only.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import bench, world  # noqa: E402

HOUR = 3600
WEEK = 7 * world.DAY
ROTATION = 2 * world.DAY + 12 * HOUR  # Wednesday noon: when the upstream renews, or all reboot
OUTAGE = 6 * HOUR
LIFETIMES = ((90, 30), (47, 47 / 3.0), (6, 3))  # days, and how many before the end certbot renews

Timer = collections.namedtuple("Timer", "label period first window persistent")
Timer.__doc__ = """When hosts run: each at first + delay, then every period; all in seconds.

window is what the delays are spread over. A persistent timer makes up for a run that was missed
while the host was off, at its delay after the boot; cron does not.
"""


def timers():
    """The shipped timer as its file says it, the hourly one of its comment, and cron's line."""
    unit = world.read(os.path.join(world.REPOSITORY, "certferry.timer")).decode()
    hours, minute = re.search(r"^OnCalendar=\*-\*-\* ([\d,]+):(\d+):00$", unit, re.M).groups()
    window = int(re.search(r"^RandomizedDelaySec=(\d+)h$", unit, re.M).group(1)) * HOUR
    first = int(hours.split(",")[0]) * HOUR + int(minute) * 60
    script = world.read(os.path.join(world.REPOSITORY, "install.sh")).decode()
    past, times, jitter = re.search(
        r'^    echo "(\d+) ([\d,]+) \* \* \* .* --jitter (\d+) -q"$', script, re.M).groups()
    return [Timer("shipped timer", world.DAY // len(hours.split(",")), first, window, True),
            Timer("hourly timer", HOUR, 0, HOUR, True),
            Timer("cron, --jitter {}".format(jitter), world.DAY // len(times.split(",")),
                  int(times.split(",")[0]) * HOUR + int(past) * 60, int(jitter), False)]


def jitter_delay():
    """The function itself, out of certferry.py, with no bytecode left behind."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec = importlib.util.spec_from_file_location("certferry", world.CERTFERRY)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module.jitter_delay


def machine_id(number):
    """The content of a host's /etc/machine-id: anything that differs, here a number's digits."""
    return "{:032x}".format(number)


def crowd(hosts, window):
    """How many of so many hosts have each whole second in [0, window) as their delay."""
    delay, seconds = jitter_delay(), array.array("L", [0]) * window
    for number in range(hosts):
        seconds[int(delay(window, machine_id(number)))] += 1
    return seconds


# ---------------------------------------------------------------- one host's runs

def runs(timer, delay, boot=None):
    """Yield the times of one host's runs from the start of the week on.

    With a boot at that time, as systemd computes it: the next run is at the first slot after the
    last run, or at the boot where that slot has passed by then, plus the host's delay.
    """
    slot = timer.first - timer.period * (2 + timer.window // timer.period)
    while True:
        moment = slot + delay
        if boot is not None and slot < boot <= moment:
            if timer.persistent:
                moment = boot + delay
            else:  # the sleep ended with the host, cron starts the next one at its time
                slot += timer.period
                continue
        if moment >= 0:
            yield moment
        # The first slot after this run: a long delay can have passed one by.
        slot += timer.period * max(1, -(-(moment + 1 - slot) // timer.period))


def first_success(timer, delay, since, until=None, boot=None):
    """When a host first asks after `since`, and the upstream is not away until `until`."""
    return next(moment for moment in runs(timer, delay, boot) if moment >= max(since, until or 0))


# ---------------------------------------------------------------- the fleet's figures

def load(timer, seconds, boot=None, rotated=None):
    """Handshakes per second of the week at the upstream.

    After a rotation a host's next run takes two: Python before 3.13 cannot tell the chain of a
    new leaf, so it is asked once more by s_client.
    """
    week = array.array("L", [0]) * WEEK
    for delay, hosts in enumerate(seconds):
        if hosts:
            pending = rotated is not None
            for moment in itertools.takewhile(lambda moment: moment < WEEK,
                                              runs(timer, delay, boot)):
                week[moment] += hosts
                if pending and moment >= rotated:
                    pending = False
                    week[moment] += hosts
    return week


def fullest(week, length):
    """The most handshakes in any `length` seconds on end."""
    total = most = sum(week[:length])
    for end in range(length, len(week)):
        total += week[end] - week[end - length]
        most = max(most, total)
    return most


def adopted(timer, seconds, outage=0, boot=None):
    """Seconds after the rotation until 50, 99 and 100 % of the fleet have the new certificate."""
    arrivals = sorted((first_success(timer, delay, ROTATION, ROTATION + outage, boot), hosts)
                      for delay, hosts in enumerate(seconds) if hosts)
    whole, so_far, found = sum(seconds), 0, []
    for moment, hosts in arrivals:
        so_far += hosts
        while len(found) < 3 and so_far * 100 >= whole * (50, 99, 100)[len(found)]:
            found.append(moment - ROTATION)
    return found


# ---------------------------------------------------------------- what one upstream can bear

def processor_seconds(parent):
    """Processor time that the one worker of an nginx has used, by Linux's account."""
    with open("/proc/{0}/task/{0}/children".format(parent)) as file:
        worker = file.read().split()[0]
    with open("/proc/{}/stat".format(worker)) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def handshakes_per_second(key, seconds=4):
    """Whole handshakes that one nginx worker completes per second of its processor, or None.

    Its own time is what is counted: the clients, on this same machine, take more than it does.
    """
    if bench.have("nginx") or not os.path.isdir("/proc/self/task"):
        return None
    folder = world.scratch()
    shown = world.Authority(folder).issue(["example.com"], key=key)
    with bench.upstream(folder, {"example.com": shown}) as upstream:
        before = processor_seconds(upstream.process.pid)
        clients = [subprocess.Popen(
            ["openssl", "s_time", "-new", "-connect", "127.0.0.1:{}".format(upstream.port),
             "-time", str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for _ in range(2)]
        outputs = [client.communicate(timeout=60)[0].decode() for client in clients]
        counts = [int(re.search(r"^(\d+) connections in \d+ real", text, re.M).group(1))
                  for text in outputs]
        return sum(counts) / (processor_seconds(upstream.process.pid) - before)


# ---------------------------------------------------------------- the report

def hours(seconds):
    """A duration as 11 h 59 min."""
    return "{} h {:02d} min".format(*divmod(int(seconds) // 60, 60))


def report(hosts):
    """Print the figures of a fleet of that size, for every timer."""
    print("\n{:,} downstreams".format(hosts))
    print("  {:<54} {:>8} {:>8} {:>8}   {}".format(
        "handshakes at the upstream", "mean/s", "second", "minute",
        "50 / 99 / 100 % have the new certificate after"))
    for timer in timers():
        seconds = crowd(hosts, timer.window)
        for event, how, outage in (
                ("calm week", {}, None), ("rotation", {"rotated": ROTATION}, 0),
                ("rotation, upstream away for 6 h", {"rotated": ROTATION + OUTAGE}, OUTAGE),
                ("all reboot at the rotation", {"rotated": ROTATION, "boot": ROTATION}, 0)):
            week = load(timer, seconds, **how)
            times = "" if outage is None else " / ".join(map(hours, adopted(
                timer, seconds, outage, how.get("boot"))))
            print("  {:<54} {:>8.2f} {:>8,} {:>8,}   {}".format(
                timer.label + ", " + event, sum(week) / float(WEEK), max(week), fullest(week, 60),
                times))


def lifetimes():
    """Print what the slowest downstream has left of the old certificate, by lifetime."""
    print("\nthe slowest downstream gets the new certificate so long before the old one ends")
    print("  {:<34} {:>15} {:>15} {:>15}".format("", *(
        "{} days".format(lifetime) for lifetime, _ in LIFETIMES)))
    for timer in timers():
        for event, outage, boot in (("", 0, None), (", 6 h outage", OUTAGE, None),
                                    (", reboot", 0, ROTATION)):
            slowest = adopted(timer, array.array("L", [1]) * timer.window, outage, boot)[-1]
            print("  {:<34} {}".format(timer.label + event, " ".join(
                "{:>10.2f} days".format(before - slowest / float(world.DAY))
                for _, before in LIFETIMES)))
    for often, word in ((2, "twice daily"), (24, "hourly")):
        print("  {:<34} {}".format("checks per certificate, " + word, " ".join(
            "{:>15.0f}".format(often * (lifetime - before)) for lifetime, before in LIFETIMES)))


def capacity():
    """Print what one core of an upstream serves."""
    print("\none nginx worker, whole handshakes per second of one core (loopback)")
    for key in ("rsa:2048", "P-256"):
        rate = handshakes_per_second(key)
        if rate is None:
            print("  missing: nginx, or Linux's /proc")
            return
        # Half of it: on the day of a rotation every host asks twice.
        print("  {:<10} {:>6,.0f}: up to {:,.1f} million downstreams twice a day, {:,.2f} million "
              "hourly".format(key, rate, rate / 2 * 12 * HOUR / 1e6, rate / 2 * HOUR / 1e6))


if __name__ == "__main__":
    for size in [int(word) for word in sys.argv[1:]] or [1000, 10000, 100000, 1000000]:
        report(size)
    lifetimes()
    capacity()
