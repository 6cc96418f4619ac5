#!/usr/bin/env python3
"""What a fleet of downstreams does to one upstream, simulated.

A week, second by second, of 1,000 to 1,000,000 hosts that each ask at the place
which certferry.py's own jitter_delay() gives them: with a rotation at the
upstream, one at the beginning of a six-hour outage, a reboot of the whole fleet
at one instant. Then, where there is an nginx, how many handshakes one of its
workers completes in a second of its processor's time.

systemd hashes the machine's identity in its own way for RandomizedDelaySec=
with FixedRandomDelay=; it spreads as evenly, so the same delays stand for it.
A host whose Python is older than 3.10 makes two handshakes for each one here:
there s_client brings the chain.
"""

import argparse
import os
import re
import sys

try:
    import array
    import collections
    import importlib.util
    import itertools
    import subprocess

    # Run as a script, Python looks for modules in tests/ only.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from tests import bench, world
except ImportError as error:
    sys.exit("fleet.py: this Python has no {}. Try: apt-get install python3".format(error.name))

HOUR = 3600
WEEK = 7 * world.DAY
ROTATION = 2 * world.DAY + 12 * HOUR  # Wednesday noon: when the upstream renews, or all reboot
OUTAGE = 6 * HOUR
# Days that a certificate lives, and how many before its end certbot renews it.
LIFETIMES = ((90, 30), (47, 47 / 3.0), (6, 3))
SIZES = (1000, 10000, 100000, 1000000)

Timer = collections.namedtuple("Timer", "label period first window persistent")
Timer.__doc__ = """When hosts run: each at first + delay, then every period; all in seconds.

window is what the delays are spread over. A persistent timer makes up for a run that was missed
while the host was off, at its delay after the boot; cron does not.
"""


def timers():
    """Return the shipped timer as its file says it, the hourly one of its comment, cron's line."""
    unit = world.read(os.path.join(world.REPOSITORY, "certferry.timer")).decode()
    hours, minute = re.search(r"^OnCalendar=\*-\*-\* ([\d,]+):(\d+):00$", unit, re.M).groups()
    window = int(re.search(r"^RandomizedDelaySec=(\d+)h$", unit, re.M).group(1)) * HOUR
    slots = [int(hour) * HOUR + int(minute) * 60 for hour in hours.split(",")]
    shipped = Timer("shipped timer", world.DAY // len(slots), slots[0], window, True)
    script = world.read(os.path.join(world.REPOSITORY, "install.sh")).decode()
    line = r'^ *echo "(\d+) ([\d,]+) \* \* \* .* --jitter (\d+) -q"$'
    minute, hours, jitter = re.search(line, script, re.M).groups()
    slots = [int(hour) * HOUR + int(minute) * 60 for hour in hours.split(",")]
    label = "cron, --jitter " + jitter
    cron = Timer(label, world.DAY // len(slots), slots[0], int(jitter), False)
    return [shipped, Timer("hourly timer", HOUR, 0, HOUR, True), cron]


def jitter_delay():
    """Return the function itself, out of certferry.py, with no bytecode left behind."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        spec = importlib.util.spec_from_file_location("certferry", world.SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module.jitter_delay


def machine_id(number):
    """Return the content of a host's /etc/machine-id: anything that differs, here digits."""
    return "{:032x}".format(number)


def crowd(hosts, window):
    """Return how many of so many hosts have each whole second in [0, window) as their delay."""
    delay = jitter_delay()
    seconds = array.array("L", [0]) * window
    for number in range(hosts):
        seconds[int(delay(window, machine_id(number)))] += 1
    return seconds


# --------------------------------------------------------------------------------------------------
# One host's runs
# --------------------------------------------------------------------------------------------------


def runs(timer, delay, boot=None):
    """Yield the times of one host's runs from the start of the week on.

    With a boot at that time, as systemd computes it: the next run is at the first slot after the
    last run, or at the boot where that slot has passed by then, plus the host's delay.
    """
    slot = timer.first - timer.period * (2 + timer.window // timer.period)
    while True:
        moment = slot + delay
        if boot is not None and slot < boot <= moment:
            if not timer.persistent:
                # The sleep ended with the host; cron starts the next one at its time.
                slot += timer.period
                continue
            moment = boot + delay
        if moment >= 0:
            yield moment
        # The first slot after this run: a long delay can have passed one by.
        slot += timer.period * max(1, -(-(moment + 1 - slot) // timer.period))


def first_run(timer, delay, since, boot=None):
    """Return when a host first asks from that time on."""
    return next(moment for moment in runs(timer, delay, boot) if moment >= since)


# --------------------------------------------------------------------------------------------------
# The fleet's figures
# --------------------------------------------------------------------------------------------------


def load(timer, seconds, boot=None):
    """Return the handshakes for each second of the week at the upstream."""
    week = array.array("L", [0]) * WEEK
    for delay, hosts in enumerate(seconds):
        if hosts:
            for moment in itertools.takewhile(lambda time: time < WEEK, runs(timer, delay, boot)):
                week[moment] += hosts
    return week


def fullest(week, length):
    """Return the most handshakes in any `length` seconds on end."""
    total = most = sum(week[:length])
    for end in range(length, len(week)):
        total += week[end] - week[end - length]
        most = max(most, total)
    return most


def adopted(timer, seconds, outage=0, boot=None):
    """Return the seconds after the rotation until 50, 99 and 100 % have the new certificate."""
    arrivals = []
    for delay, hosts in enumerate(seconds):
        if hosts:
            arrivals.append((first_run(timer, delay, ROTATION + outage, boot), hosts))
    whole = sum(seconds)
    so_far = 0
    found = []
    for moment, hosts in sorted(arrivals):
        so_far += hosts
        while len(found) < 3 and so_far * 100 >= whole * (50, 99, 100)[len(found)]:
            found.append(moment - ROTATION)
    return found


# --------------------------------------------------------------------------------------------------
# What one upstream can bear
# --------------------------------------------------------------------------------------------------


def processor_seconds(parent):
    """Return the processor time that the one worker of an nginx has used, as Linux tells it."""
    with open("/proc/{0}/task/{0}/children".format(parent)) as file:
        worker = file.read().split()[0]
    with open("/proc/{}/stat".format(worker)) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def handshakes_per_second(key, seconds=4):
    """Return the whole handshakes of one nginx worker in a second of its processor, or None.

    Its own time is what is counted: the clients, on this same machine, take more than it does.
    """
    if bench.lacking("nginx") or not os.path.isdir("/proc/self/task"):
        return None
    folder = world.scratch()
    shown = world.Authority(folder).issue(["example.com"], key=key)
    with bench.upstream(folder, {"example.com": shown}) as upstream:
        before = processor_seconds(upstream.process.pid)
        where = "127.0.0.1:{}".format(upstream.port)
        command = ["openssl", "s_time", "-new", "-connect", where, "-time", str(seconds)]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        clients = [subprocess.Popen(command, **how) for _ in range(2)]
        count = 0
        for client in clients:
            text = client.communicate(timeout=60)[0].decode()
            count += int(re.search(r"^(\d+) connections in \d+ real", text, re.M).group(1))
        return count / (processor_seconds(upstream.process.pid) - before)


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def hours(seconds):
    """Return a duration as 11 h 59 min."""
    return "{} h {:02d} min".format(*divmod(int(seconds) // 60, 60))


def report(hosts):
    """Print the figures of a fleet of that size, for every timer."""
    head = "  {:<54} {:>8} {:>8} {:>8}   {}"
    row = "  {:<54} {:>8.2f} {:>8,} {:>8,}   {}"
    columns = ("handshakes at the upstream", "mean/s", "second", "minute")
    print("\n{:,} downstreams".format(hosts))
    print(head.format(*columns, "50 / 99 / 100 % have the new certificate after"))
    events = (
        ("", None, 0),
        (", upstream away for 6 h", None, OUTAGE),
        (", all reboot at the rotation", ROTATION, 0),
    )
    for timer in timers():
        seconds = crowd(hosts, timer.window)
        for event, boot, outage in events:
            week = load(timer, seconds, boot)
            times = " / ".join(map(hours, adopted(timer, seconds, outage, boot)))
            what = timer.label + event
            print(row.format(what, sum(week) / WEEK, max(week), fullest(week, 60), times))


def lifetimes():
    """Print what the slowest downstream has left of the old certificate, by lifetime."""
    print("\nthe slowest downstream gets the new certificate so long before the old one ends")
    heads = ["{:>15}".format("{} days".format(lifetime)) for lifetime, _ in LIFETIMES]
    print("  {:<34} {}".format("", " ".join(heads)))
    for timer in timers():
        everyone = array.array("L", [1]) * timer.window
        for event, outage, boot in (
            ("", 0, None),
            (", 6 h outage", OUTAGE, None),
            (", reboot", 0, ROTATION),
        ):
            slowest = adopted(timer, everyone, outage, boot)[-1] / world.DAY
            cells = ["{:>10.2f} days".format(before - slowest) for _, before in LIFETIMES]
            print("  {:<34} {}".format(timer.label + event, " ".join(cells)))
    for often, word in ((2, "twice daily"), (24, "hourly")):
        cells = ["{:>15.0f}".format(often * (lifetime - early)) for lifetime, early in LIFETIMES]
        print("  {:<34} {}".format("checks per certificate, " + word, " ".join(cells)))


def capacity():
    """Print what one core of an upstream serves."""
    print("\none nginx worker, whole handshakes per second of one core (loopback)")
    row = (
        "  {:<10} {:>6,.0f}: up to {:,.1f} million downstreams twice a day, {:,.2f} million hourly"
    )
    for key in ("rsa:2048", "P-256"):
        rate = handshakes_per_second(key)
        if rate is None:
            print("  missing: nginx, or Linux's /proc")
            return
        # Half of it: a host whose Python is older than 3.10 asks twice.
        millions = rate / 2 / 1e6
        print(row.format(key, rate, millions * 12 * HOUR, millions * HOUR))


def main():
    """Print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = " ".join(map(str, SIZES))
    parser.add_argument(
        "hosts", nargs="*", type=int, default=SIZES, help="how many there are (%s)" % default
    )
    for size in parser.parse_args().hosts:
        report(size)
    lifetimes()
    capacity()


if __name__ == "__main__":
    main()
