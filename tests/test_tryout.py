"""What a newcomer starts from a checkout says what it does, and does what it says."""

import os
import re
import shutil
import subprocess
import sys
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

SCRIPTS = ("tryout.py", "bench.py", "fleet.py")


def start(*words, **how):
    """Run this Python with these words; return its status, standard output and error as text."""
    done = subprocess.run(
        (sys.executable,) + words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
        **how,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def script(name):
    """Return the path of a script in tests/."""
    return os.path.join(world.REPOSITORY, "tests", name)


class Tryout(unittest.TestCase):
    """tests/tryout.py as a person starts it."""

    def test_all_as_expected(self):
        """Exit 0, the closing line, nothing on standard error, an empty temporary folder after."""
        folder = world.scratch(self)
        status, out, err = start(script("tryout.py"), env=dict(os.environ, TMPDIR=folder))
        self.assertEqual((0, ""), (status, err), out)
        self.assertRegex(out.splitlines()[-1], r"\AAll was as expected")
        self.assertEqual([], os.listdir(folder))
        commands = re.findall(r"^\$ (.*)", out, re.M)
        self.assertEqual(10, len(commands))
        for command in commands:
            self.assertRegex(command, r"\A(cat \S+ \| )?\./certferry .*--config-dir letsencrypt")

    def test_no_openssl(self):
        """Without openssl it says so in one line, exit 1."""
        status, out, err = start(script("tryout.py"), env={"PATH": world.scratch(self)})
        self.assertEqual((1, ""), (status, err))
        self.assertRegex(out, r"\Atryout\.py: .*openssl.*\n\Z")


class Scripts(unittest.TestCase):
    """What all scripts in tests/ do."""

    def test_help(self):
        """--help tells what it does, in at most 80 columns."""
        for name in SCRIPTS:
            with self.subTest(script=name):
                environment = dict(os.environ, COLUMNS="80")
                status, out, err = start(script(name), "--help", env=environment)
                self.assertEqual((0, ""), (status, err))
                self.assertTrue(all(len(line) <= 80 for line in out.splitlines()), out)

    def test_python3_minimal(self):
        """Where Python has no unittest, as in python3-minimal, one line says so."""
        folder = world.scratch(self)
        lacks = "raise ModuleNotFoundError('No module named unittest', name='unittest')\n"
        world.write(os.path.join(folder, "unittest.py"), lacks)
        for name in SCRIPTS:
            with self.subTest(script=name):
                status, out, err = start(script(name), env=dict(os.environ, PYTHONPATH=folder))
                self.assertEqual((1, ""), (status, out))
                self.assertEqual(
                    name + ": this Python has no unittest. Try: apt-get install python3\n", err
                )


class TestCommand(unittest.TestCase):
    """`python3 -m unittest` on some tests of which most do not pass.

    Python 3.12.1 counts no skipped test among those that ran.
    """

    FILE = """
import os, tempfile, unittest

def setUpModule():
    global MODULE
    MODULE = 1

class Good(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.what = MODULE

    def test_good(self):
        self.assertEqual(1, self.what)
        tempfile.mkdtemp()

    @unittest.skip("lacks a tool")
    def test_skipped(self):
        pass

    @unittest.expectedFailure
    def test_expected(self):
        self.fail("as expected")

class Bad(unittest.TestCase):
    def test_error(self):
        raise OSError("an error")

    def test_failure(self):
        self.assertEqual(1, 2)

    def test_table(self):
        for row in range(3):
            with self.subTest(row=row):
                self.assertEqual(1, row)

class Dead(unittest.TestCase):
    def test_dies(self):
        os._exit(3)

class Broken(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no set-up")

    def test_nothing(self):
        pass
"""

    def setUp(self):
        self.folder = world.scratch(self)
        self.tests = os.path.join(self.folder, "tests")
        os.mkdir(self.tests)
        shutil.copy(script("__init__.py"), self.tests)
        world.write(os.path.join(self.tests, "test_it.py"), self.FILE)

    def run_tests(self, *words):
        """Run the command there; return its status and what it printed."""
        self.temporary = os.path.join(self.folder, "tmp")
        os.mkdir(self.temporary)
        environment = dict(os.environ, TMPDIR=self.temporary, CERTFERRY_JOBS="2")
        status, out, err = start("-m", "unittest", *words, cwd=self.folder, env=environment)
        self.assertEqual("", out)
        return status, err

    def test_everything(self):
        """Each test is told and counted as if it had run alone, and nothing is left behind."""
        status, text = self.run_tests("-v")
        self.assertEqual(1, status)
        self.assertRegex(text, r"\A8 tests in 4 classes, 2 at a time: about \d+ s\n")
        for told in (
            r"test_good .* ok\n",
            r"test_skipped .* skipped 'lacks a tool'\n",
            r"test_expected .* expected failure\n",
            r"\[ +\d/4\] test_it.Good: 3 tests, \d\.\d s, skipped: lacks a tool\n",
            r"\[ +\d/4\] test_it.Bad: 3 tests, \d\.\d s, FAILED\n",
            r"ERROR: test_error .*\n(.*\n)+Traceback(.*\n)+OSError: an error\n",
            r"FAIL: test_failure .*\n(.*\n)+AssertionError: 1 != 2\n",
            r"FAIL: test_table .*\(row=2\)",
            r"ERROR: setUpClass \(tests\.test_it\.Broken\)",
            r"ERROR: test_dies .*\n(.*\n){2}.*ended with status 3\n",
            r"Ran [56] tests in \d+\.\d+s\n",
        ):
            self.assertRegex(text, told)
        counts = "failures=3, errors=3, skipped=1, expected failures=1"
        self.assertEqual("FAILED ({})".format(counts), text.splitlines()[-1])
        self.assertEqual([], os.listdir(self.temporary))

    def test_some(self):
        """A class that is named runs as always."""
        status, text = self.run_tests("tests.test_it.Good")
        self.assertEqual(0, status)
        self.assertEqual("OK (skipped=1, expected failures=1)", text.splitlines()[-1])

    def test_quiet(self):
        """With --quiet there is no progress."""
        world.write(os.path.join(self.tests, "test_it.py"), "import unittest\n")
        world.write(os.path.join(self.tests, "test_a.py"), self.FILE.split("class Bad")[0])
        status, text = self.run_tests("--quiet")
        self.assertEqual(0, status)
        self.assertRegex(
            text, r"\A-+\nRan [23] tests in .*\n\nOK \(skipped=1, expected failures=1\)"
        )


if __name__ == "__main__":
    unittest.main()
