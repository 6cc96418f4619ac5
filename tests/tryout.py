"""The first minute with certferry: a practice upstream and downstream, nothing left behind.

    python3 tests/tryout.py

needs python3 and openssl and nothing else: no root, no network but 127.0.0.1, no real certificate.
What it prints after a $ are the commands that it runs, to the letter, in a folder that it removes.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

NAMES = ["example.com", "*.example.com"]
# In each command {up} is the upstream's host and port. What must come of it: the exit status, and
# words of the output. `shown` is what the upstream serves meanwhile, by its place in `issued`.
SCENES = [
    (0, "The upstream serves a certificate for {names}. The downstream\n"
        "has nothing yet, not even the private key, and certferry says how to bring it:",
     "./certferry example.com --from {up} --ca-file root.pem --config-dir letsencrypt",
     1, "no private key in .*--key -"),
    (0, "The key is brought once (over ssh, in real life), with a hook for the web server:",
     "./certferry example.com --from {up} --ca-file root.pem --config-dir letsencrypt \\\n"
     "    --deploy-hook 'echo nginx would reload now' --key - < upstream/privkey.pem",
     0, "example.com: installed: .*nginx would reload now"),
    (0, "From now on the timer does this twice a day. Nothing is new, so nothing happens:",
     "./certferry renew --config-dir letsencrypt",
     0, "example.com: unchanged"),
    (1, "The upstream has renewed its certificate and kept its key (certbot --reuse-key).\n"
        "The next run ferries it, all four files in one rename, and runs the hook:",
     "./certferry renew --config-dir letsencrypt",
     0, "example.com: installed: .*nginx would reload now"),
    (1, "This is what an administrator, or a monitoring system, looks at:",
     "./certferry status --config-dir letsencrypt",
     0, "CERTFERRY OK"),
    (2, "The upstream has another key: was --reuse-key forgotten, or is it another server?\n"
        "The key is what certferry trusts, so it refuses, and what is here stays in service:",
     "./certferry renew --config-dir letsencrypt",
     1, "example.com: .*another key.*--key"),
    (2, "It was on purpose: so bring the new key, and the crossing is made:",
     "./certferry example.com --config-dir letsencrypt --key upstream/privkey-2.pem",
     0, "example.com: installed"),
    (2, "Next time there need not be a gap: the key is staged on each downstream beforehand,",
     "./certferry example.com --config-dir letsencrypt --key upstream/privkey-3.pem",
     0, "example.com: unchanged"),
    (3, "then the upstream switches, and each downstream follows at its next run:",
     "./certferry renew --config-dir letsencrypt",
     0, "example.com: installed"),
]


def issue_all(folder):
    """What the upstream serves in turn: two certificates for one key, then two with new keys."""
    authority = world.Authority(folder, "Practice Root")
    first = authority.issue(NAMES)
    issued = [first, authority.issue(NAMES, key=first.key), authority.issue(NAMES),
              authority.issue(NAMES)]
    os.mkdir(os.path.join(folder, "upstream"))
    for number in (1, 2, 3):
        file = "privkey-{}.pem".format(number) if number > 1 else "privkey.pem"
        world.write(os.path.join(folder, "upstream", file), world.read(issued[number].key), 0o600)
    world.write(os.path.join(folder, "root.pem"), world.read(authority.root))
    return issued


def run(command, folder):
    """Run a command in the folder as a shell does; returns its exit status and what it printed."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("CERTFERRY_")}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def main():
    """Play the scenes; 0 where all came out as expected, else 1."""
    if shutil.which("openssl") is None:
        print("tryout.py: there is no openssl command here: install the package openssl")
        return 1
    folder = world.scratch()
    issued = issue_all(folder)
    os.mkdir(os.path.join(folder, "letsencrypt"))
    world.write(os.path.join(folder, "certferry"), "#!/bin/sh\nexec {} {} \"$@\"\n".format(
        shlex.quote(sys.executable), shlex.quote(world.CERTFERRY)), 0o755)
    print("All of this is in {}, which goes at the end.".format(folder))
    live, surprises = os.path.join(folder, "letsencrypt/live/example.com/fullchain.pem"), []
    with world.Upstream(issued[0]) as upstream:
        for number, (shown, story, command, status, words) in enumerate(SCENES, 1):
            upstream.switch(issued[shown])
            command = command.format(up=upstream.source)
            print("\n{}. {}\n\n$ {}".format(number, story.format(names=" ".join(NAMES)), command))
            ended, output = run(command, folder)
            print(output + "(exit status {})".format(ended), flush=True)
            if ended != status or not re.search(words, output, re.S):
                surprises.append("{}: expected exit status {} and '{}'".format(
                    number, status, words))
    if not surprises and world.certificates(live) != world.certificates(issued[-1].fullchain):
        surprises.append("the downstream does not have what the upstream serves last")
    print("\n" + ("\n".join(["not as expected:"] + surprises) if surprises else
                  "All was as expected: the downstream followed the upstream to the end."))
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
