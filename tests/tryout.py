#!/usr/bin/env python3
"""The first minute with certferry: a practice upstream and downstream.

It needs python3 and openssl, and nothing else: no root, no network but
127.0.0.1, no real certificate. What it prints after a $ are the commands that
it runs, to the letter, in a folder that it removes at the end. It takes a few
seconds.
"""

import argparse
import os
import re
import sys

try:
    import collections
    import shlex
    import shutil
    import subprocess

    # Run as a script, Python looks for modules in tests/ only.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from tests import world
except ImportError as error:
    sys.exit("tryout.py: this Python has no {}. Try: apt-get install python3".format(error.name))

NAMES = ["example.com", "*.example.com"]

Scene = collections.namedtuple("Scene", "shown story command status words")
Scene.__doc__ = """A command, and what must come of it.

shown is what the upstream serves meanwhile, by its place in issue_all(). In the command {up} is the
upstream's host and port. status and words are how it must end and what it must say.
"""

SCENES = [
    Scene(
        0,
        "The upstream serves a certificate for example.com *.example.com. The downstream\n"
        "has nothing yet, not even the private key, and certferry says how to bring it:",
        "./certferry example.com --from {up} --ca-file root.pem --config-dir letsencrypt",
        1,
        "no private key in .*--key -",
    ),
    Scene(
        0,
        "The key is brought once (over ssh, in real life), with a hook for the web server:",
        "./certferry example.com --from {up} --ca-file root.pem --config-dir letsencrypt \\\n"
        "    --deploy-hook 'echo nginx would reload now' --key - < upstream/privkey.pem",
        0,
        "nginx would reload now.*example.com: installed: ",
    ),
    Scene(
        0,
        "From now on the timer does this twice a day. Nothing is new, so nothing happens:",
        "./certferry renew --config-dir letsencrypt",
        0,
        "example.com: unchanged",
    ),
    Scene(
        1,
        "The upstream has renewed its certificate and kept its key (certbot --reuse-key).\n"
        "The next run ferries it, all four files in one rename, and runs the hook:",
        "./certferry renew --config-dir letsencrypt",
        0,
        "nginx would reload now.*example.com: installed: ",
    ),
    Scene(
        1,
        "This is what an administrator, or a monitoring system, looks at:",
        "./certferry status --config-dir letsencrypt",
        0,
        "CERTFERRY OK",
    ),
    Scene(
        2,
        "The likeliest failure of all: the upstream has renewed with a new key, because\n"
        "--reuse-key was forgotten. The key is what certferry trusts, so it refuses this\n"
        "certificate, and what is here stays in service:",
        "./certferry renew --config-dir letsencrypt",
        1,
        "example.com: .*another key.*--key -",
    ),
    Scene(
        2,
        "This does not heal by itself, so monitoring hears of it from the first run on:",
        "./certferry status --config-dir letsencrypt",
        1,
        "CERTFERRY WARNING.*key-mismatch",
    ),
    Scene(
        2,
        "The message says what helps: bring the new key (over ssh, in real life). It has to\n"
        "be done on each downstream. Then set reuse_key on the upstream, as the README\n"
        "shows, so that it does not happen again. `certbot renew --reuse-key` does not help:\n"
        "it renews nothing that is not due.",
        "cat upstream/privkey-2.pem | ./certferry example.com --key - --config-dir letsencrypt",
        0,
        "nginx would reload now.*example.com: installed: ",
    ),
    Scene(
        2,
        "A key that is changed on purpose makes no gap: the next key is staged on each\n"
        "downstream beforehand,",
        "./certferry example.com --config-dir letsencrypt --key upstream/privkey-3.pem",
        0,
        "example.com: unchanged",
    ),
    Scene(
        3,
        "then the upstream switches, and each downstream follows at its next run:",
        "./certferry renew --config-dir letsencrypt",
        0,
        "nginx would reload now.*example.com: installed: ",
    ),
]


def issue_all(folder):
    """Return what the upstream serves in turn: two certificates for one key, two with new keys."""
    authority = world.Authority(folder, "Practice Root")
    first = authority.issue(NAMES)
    same_key = authority.issue(NAMES, key=first.key)
    issued = [first, same_key, authority.issue(NAMES), authority.issue(NAMES)]
    keys = os.path.join(folder, "upstream")
    os.mkdir(keys)
    for name, credential in zip(("privkey", "privkey-2", "privkey-3"), issued[1:]):
        path = os.path.join(keys, name + ".pem")
        world.write(path, world.read(credential.key), 0o600)
    world.write(os.path.join(folder, "root.pem"), world.read(authority.root))
    return issued


def run(command, folder):
    """Run a command in the folder as a shell does; return its exit status and what it printed."""
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("CERTFERRY_"):
            environment[name] = value
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


def play(folder):
    """Play the scenes in a folder; return what was not as expected, as lines."""
    issued = issue_all(folder)
    os.mkdir(os.path.join(folder, "letsencrypt"))
    words = '#!/bin/sh\nexec {} {} "$@"\n'
    program = words.format(shlex.quote(sys.executable), shlex.quote(world.SCRIPT))
    world.write(os.path.join(folder, "certferry"), program, 0o755)
    surprises = []
    with world.Upstream(issued[0]) as upstream:
        for number, scene in enumerate(SCENES, 1):
            upstream.switch(issued[scene.shown])
            command = scene.command.format(up=upstream.source)
            print("\n{}. {}\n\n$ {}".format(number, scene.story, command))
            status, output = run(command, folder)
            print("{}(exit status {})".format(output, status), flush=True)
            if status != scene.status or not re.search(scene.words, output, re.S):
                expected = "{}: expected exit status {} and '{}'"
                surprises.append(expected.format(number, scene.status, scene.words))
    live = os.path.join(folder, "letsencrypt/live/example.com/fullchain.pem")
    last = world.certificates(issued[-1].fullchain)
    if not surprises and world.certificates(live) != last:
        surprises.append("the downstream does not have what the upstream serves last")
    return surprises


def main():
    """Play it; return 0 where all came out as expected, else 1."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if shutil.which("openssl") is None:
        print("tryout.py: there is no openssl command here: install the package openssl")
        return 1
    folder = world.scratch()
    print("All of this is in {}, which goes at the end.".format(folder))
    surprises = play(folder)
    if surprises:
        print("\n" + "\n".join(["not as expected:"] + surprises))
        return 1
    print("\nAll was as expected: the downstream followed the upstream to the end.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
