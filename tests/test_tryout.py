"""The newcomer's first minute comes out as it says, and leaves nothing behind."""

import os
import subprocess
import sys
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

TRYOUT = os.path.join(world.REPOSITORY, "tests", "tryout.py")


class Tryout(unittest.TestCase):
    """tests/tryout.py as a person starts it."""

    def test_all_as_expected(self):
        """Exit 0, the closing line, nothing on standard error, an empty temporary folder after."""
        folder = world.scratch(self)
        done = subprocess.run([sys.executable, TRYOUT], env=dict(os.environ, TMPDIR=folder),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        text = done.stdout.decode()
        self.assertEqual((0, b""), (done.returncode, done.stderr), text)
        self.assertRegex(text.splitlines()[-1], r"\AAll was as expected")
        self.assertEqual([], os.listdir(folder))
        for line in text.splitlines():
            if line.startswith("$ "):
                self.assertRegex(line, r"\A\$ \./certferry .*--config-dir letsencrypt")

    def test_no_openssl(self):
        """Without openssl it says so in one line, exit 1."""
        done = subprocess.run([sys.executable, TRYOUT], env={"PATH": world.scratch(self)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual((1, b""), (done.returncode, done.stderr))
        self.assertIn(b"openssl", done.stdout)


if __name__ == "__main__":
    unittest.main()
