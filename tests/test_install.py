"""install.sh in every shell: what it puts where, twice, upgraded, removed, cut off, tampered with.

`python3 tests/test_install.py --write-sums` puts the current sums into install.sh. The trees are
scratch folders (DESTDIR), the program is a stub; tests/platforms.sh runs the real thing.
"""

import contextlib
import datetime
import hashlib
import http.server
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

INSTALL = os.path.join(world.REPOSITORY, "install.sh")
FILES = ("certferry.py", "certferry.service", "certferry.timer")
PROGRAM, CRON = "usr/local/bin/certferry", "etc/cron.d/certferry"
MODULE, CACHE = "usr/local/lib/certferry/certferry.py", "usr/local/lib/certferry/__pycache__/"
UNITS = ["etc/systemd/system/certferry.service", "etc/systemd/system/certferry.timer"]
BOTH = "/usr/local/bin/certferry, /usr/local/lib/certferry"  # as the messages name them
WANTS = "etc/systemd/system/timers.target.wants/"
LAUNCHER = """#!{python} -IS
# install.sh made this. The program is {lib}/certferry.py.
import sys

sys.path.append("{lib}")
import certferry

certferry.command()
"""
STUB = """#!/usr/bin/env python3
import sys

def command():
    print("certferry", *sys.argv[1:])
    if "-" in sys.argv:
        print("key:", sys.stdin.read())

if __name__ == "__main__":
    command()
"""
SHELLS = (["dash"], ["bash"], ["busybox", "sh"]) if world.MORE else (["dash"],)
# What install.sh runs in any case; openssl, sha256sum, curl and wget are each test's own choice.
COMMANDS = (
    "basename cat chmod chown cp cut dirname grep head id mkdir mktemp mv readlink rm rmdir sed "
    "sort uname"
).split()


def with_sums(script, folder):
    """The script's text with the SHA-256 sums of the files in that folder."""

    def line(match):
        content = world.read(os.path.join(folder, match.group(1)))
        return hashlib.sha256(content).hexdigest() + "  " + match.group(1)

    return re.sub("^[0-9a-f]{64}  (certferry[.][a-z]+)$", line, script, flags=re.M)


def install_text():
    """The text of install.sh."""
    return world.read(INSTALL).decode()


def become_nobody():
    """For a child process: from now on it is nobody's."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def in_every_shell(test):
    """Run the test method in each of SHELLS, as self.shell, with folders of its own."""

    def run(self):
        for self.shell in SHELLS:
            with self.subTest(shell=self.shell[0]), contextlib.ExitStack() as self.stack:
                self.set_up()
                test(self)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return world.needs(*(shell[0] for shell in SHELLS))(run)


def load_tests(loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK those of Python: shells are the same everywhere."""
    if world.QUICK:
        cases = (Script, Launcher)
        return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in cases)
    return tests


class InstallCase(unittest.TestCase):
    """self.source is a checkout with a stub, self.tree the DESTDIR of a host without systemd."""

    shell = SHELLS[0]
    become = None  # called in the child before it becomes the shell

    def set_up(self):
        """Make the folders; self.stack takes them away."""
        self.folder = world.scratch()
        self.stack.callback(shutil.rmtree, self.folder)
        self.source, self.tree = (os.path.join(self.folder, name) for name in ("source", "tree"))
        os.mkdir(self.source)
        for name in FILES[1:]:
            shutil.copy(os.path.join(world.REPOSITORY, name), self.source)
        self.release(STUB)
        for folder in ("etc/cron.d", "usr/bin"):
            os.makedirs(os.path.join(self.tree, folder))
        self.touch("usr/sbin/cron")

    def release(self, program):
        """Make the checkout one of this program."""
        world.write(os.path.join(self.source, "certferry.py"), program)
        script = with_sums(install_text(), self.source)
        world.write(os.path.join(self.source, "install.sh"), script)

    def as_nobody(self):
        """Run install.sh without root from now on: with no DESTDIR it could reach this host."""
        self.become = None
        if os.getuid() == 0:
            self.become = become_nobody
            for folder in (self.folder, self.source, self.tree):
                os.chown(folder, 65534, 65534)

    def touch(self, path, content="", mode=0o755):
        """Put a file into the tree; returns its path."""
        path = os.path.join(self.tree, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return world.write(path, content, mode)

    def link(self, target, path):
        """Put a link into the tree; returns its path."""
        path = os.path.join(self.tree, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
        return path

    def install(self, *arguments, script=None, stdin=b"", **environment):
        """Run install.sh, or the script given ("-s": the one on standard input)."""
        variables = dict(os.environ, DESTDIR=self.tree, TMPDIR=self.folder)
        variables.pop("PYTHON", None)
        variables.update(environment)
        command = self.shell + [script or os.path.join(self.source, "install.sh")]
        done = subprocess.run(
            command + list(arguments),
            executable=shutil.which(command[0]),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            preexec_fn=self.become,
            env=variables,
        )
        return world.Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def installed(self, *arguments, **environment):
        """Run install.sh, which has to succeed and complain of nothing; returns its output."""
        result = self.install(*arguments, **environment)
        self.assertEqual((0, ""), (result.status, result.err))
        return result.out

    def snapshot(self, times=False):
        """{path: (mode, content, time)} of all that is in the tree; a folder's content is None."""
        found = {}
        for folder, folders, files in os.walk(self.tree):
            for path in (os.path.join(folder, name) for name in folders + files):
                facts = os.lstat(path)
                content = None
                if os.path.islink(path):
                    content = os.readlink(path)
                elif os.path.isfile(path):
                    content = world.read(path)
                when = (facts.st_ino, facts.st_mtime_ns) if times else None
                found[os.path.relpath(path, self.tree)] = (oct(facts.st_mode), content, when)
        return found

    def added(self, before):
        """The files that are in the tree now and were not, but for what Python compiled."""
        paths = [path for path, (_, content, _) in self.snapshot().items() if content is not None]
        return sorted(path for path in set(paths) - set(before) if not path.startswith(CACHE))

    def assert_mode(self, mode, path):
        """The path in the tree has that mode."""
        facts = os.stat(os.path.join(self.tree, path))
        self.assertEqual(oct(mode), oct(facts.st_mode & 0o7777), path)

    def content(self, path):
        """The text of a file in the tree."""
        return world.read(os.path.join(self.tree, path)).decode()

    def path_of(self, *commands):
        """A PATH with these commands and what every run needs, and nothing else."""
        folder = os.path.join(self.folder, "-".join(("bin",) + commands))
        os.mkdir(folder)
        for name in COMMANDS + list(commands):
            os.symlink(shutil.which(name), os.path.join(folder, name))
        return folder


class Script(unittest.TestCase):
    """The text of install.sh."""

    def test_sums_are_those_of_the_files(self):
        stale = "stale sums: run python3 tests/test_install.py --write-sums"
        self.assertTrue(with_sums(install_text(), world.REPOSITORY) == install_text(), stale)
        self.assertEqual(3, len(re.findall("^[0-9a-f]{64}  certferry", install_text(), re.M)))

    def test_last_line_starts_it(self):
        self.assertTrue(install_text().endswith('\n{ main "$@"; exit; }\n'))

    def test_no_name_cut_short_is_a_command(self):
        """A download that ends inside a function's name runs what is left of the name."""
        harmless = {"install"}  # complains that it has no operand
        names = re.findall(r"^([a-z_]+)\(\) \{", install_text(), re.M)
        self.assertIn("install_certferry", names)
        for name in names:
            for end in range(1, len(name)):
                if name[:end] not in harmless:
                    self.assertIsNone(shutil.which(name[:end]), name)


class Install(InstallCase):
    """What goes where."""

    @in_every_shell
    def test_with_systemd(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        before = self.snapshot()
        expected = "installed {}, certferry.service, certferry.timer\n".format(BOTH)
        self.assertEqual(expected, self.installed())
        self.assertEqual(sorted([PROGRAM, MODULE] + UNITS), self.added(before))
        for path in UNITS:
            original = os.path.join(world.REPOSITORY, os.path.basename(path))
            self.assertEqual(world.read(original), self.content(path).encode())
            self.assert_mode(0o644, path)

    @in_every_shell
    def test_with_cron(self):
        before = self.snapshot()
        self.assertEqual("installed {}, /{}\n".format(BOTH, CRON), self.installed())
        self.assertEqual([CRON, PROGRAM, MODULE], self.added(before))
        schedule = "17 1,13 * * * root /usr/local/bin/certferry renew --jitter 43200 -q"
        self.assertEqual(schedule, self.content(CRON).splitlines()[-1])
        self.assertIn("\nPATH=/usr/local/sbin:", self.content(CRON))
        self.assert_mode(0o644, CRON)

    @in_every_shell
    def test_a_cron_that_brought_systemd_along_stays(self):
        os.remove(os.path.join(self.tree, "usr/sbin/cron"))
        self.installed()
        self.touch("usr/sbin/cron")
        self.touch("usr/lib/systemd/systemd")
        before = self.snapshot(times=True)
        self.assertEqual("unchanged /usr/local/bin/certferry\n", self.installed())
        self.assertEqual(before, self.snapshot(times=True))

    @in_every_shell
    def test_a_host_that_left_cron_for_systemd(self):
        self.installed()
        os.remove(os.path.join(self.tree, "usr/sbin/cron"))
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        self.assertIn(", certferry.service, certferry.timer\n", self.installed())
        self.assertFalse(os.path.exists(os.path.join(self.tree, CRON)))

    @in_every_shell
    def test_with_busybox_crond(self):
        os.remove(os.path.join(self.tree, "usr/sbin/cron"))
        self.link("/bin/busybox", "usr/sbin/crond")
        before = self.snapshot()
        out = self.installed()
        self.assertEqual([PROGRAM, MODULE], self.added(before))
        table = os.path.join(self.tree, "etc/crontabs/root")
        line = "17 1,13 * * * /usr/local/bin/certferry renew --jitter 43200 -q"
        advice = "nothing runs it twice a day. Try: echo '{}' >>{}".format(line, table)
        self.assertEqual(advice, out.splitlines()[-1])
        self.touch("etc/crontabs/root", line + "\n")
        self.assertEqual("unchanged /usr/local/bin/certferry\n", self.installed())

    @in_every_shell
    def test_a_package_in_the_making(self):
        """The folder DESTDIR need not be there, nor the one above it."""
        shutil.rmtree(self.tree)
        self.tree = os.path.join(self.tree, "a b", "package")
        self.installed()
        made = self.snapshot()
        self.assertEqual(sorted([PROGRAM, MODULE] + UNITS), self.added({}))
        self.assertTrue(
            self.content(PROGRAM).startswith(
                LAUNCHER.format(python="/usr/bin/python3", lib="/usr/local/lib/certferry")
            )
        )
        self.assertIn("unchanged", self.installed())
        self.assertEqual(made, self.snapshot())
        self.installed("--uninstall")
        self.assertEqual([], os.listdir(self.tree))

    @in_every_shell
    def test_prefix(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        self.installed(PREFIX="/opt/tls/")
        self.assertIn('("/opt/tls/lib/certferry")', self.content("opt/tls/bin/certferry"))
        self.assertEqual(STUB, self.content("opt/tls/lib/certferry/certferry.py"))
        self.assertIn("\nExecStart=/opt/tls/bin/certferry renew\n", self.content(UNITS[0]))
        for prefix in ("opt", "/opt/a b", "/opt/$x", "/opt/a|b"):
            result = self.install(PREFIX=prefix)
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertIn("must be an absolute path", result.err)

    @in_every_shell
    def test_modes_with_any_umask(self):
        folder = os.path.dirname(MODULE)
        for umask, there_before in ((0o077, False), (0o777, False), (0o000, True)):
            if there_before:
                os.makedirs(os.path.join(self.tree, folder), 0o700)
            self.become = lambda umask=umask: os.umask(umask)
            self.installed()
            (compiled,) = os.listdir(os.path.join(self.tree, CACHE))
            for path in (folder, CACHE, PROGRAM):
                self.assert_mode(0o755, path)
            for path in (MODULE, CACHE + compiled, CRON):
                self.assert_mode(0o644, path)
            self.installed("--uninstall")

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    @in_every_shell
    def test_the_module_is_roots(self):
        module = self.touch(MODULE, STUB)
        for path in (module, os.path.dirname(module)):
            os.chown(path, 65534, 65534)
        self.installed()
        for path in (module, os.path.dirname(module)):
            self.assertEqual((0, 0), (os.stat(path).st_uid, os.stat(path).st_gid))

    @in_every_shell
    def test_interpreter(self):
        lib = "/usr/local/lib/certferry"
        platform_python = "usr/libexec/platform-python"
        for path in (platform_python, "usr/bin/python3"):
            self.touch(path)
            self.installed()
            launcher = LAUNCHER.format(python="/" + path, lib=lib)
            self.assertEqual(launcher, self.content(PROGRAM).split("# install.sh made these")[0])
            # What is another system's is not run here.
            self.assertFalse(os.path.exists(os.path.join(self.tree, CACHE)))
        self.touch("opt/python")
        self.installed(PYTHON="/opt/python")
        self.assertEqual("#!/opt/python -IS", self.content(PROGRAM).splitlines()[0])

    @in_every_shell
    def test_twice_is_the_same(self):
        self.installed()
        before = self.snapshot(times=True)
        self.assertEqual("unchanged /usr/local/bin/certferry\n", self.installed())
        self.assertEqual(before, self.snapshot(times=True))

    @in_every_shell
    def test_upgrade(self):
        remembered = self.touch("etc/letsencrypt/certferry/example.com.conf", "warn = 20%\n")
        self.installed()
        before = self.snapshot()
        self.touch(CACHE + "certferry.cpython-30.pyc", "of an older Python")
        self.release(STUB + "# the next version\n")
        self.assertEqual("installed /usr/local/lib/certferry\n", self.installed())
        after = self.snapshot()
        self.assertEqual(set(before), set(after))
        changed = {path for path in after if after[path] != before[path]}
        (compiled,) = os.listdir(os.path.join(self.tree, CACHE))
        self.assertEqual({MODULE, CACHE + compiled}, changed)
        self.assertIn("# the next version\n", self.content(MODULE))
        self.assertEqual(b"warn = 20%\n", world.read(remembered))
        self.installed("--uninstall")
        self.assertFalse(os.path.exists(os.path.join(self.tree, "usr/local")))

    @in_every_shell
    def test_upgrade_from_a_single_file(self):
        """The first edition was one script in bin; its last line told the folders it made."""
        before = self.snapshot()
        made = "# install.sh made these folders: /usr/local/bin /usr/local \n"
        self.touch(PROGRAM, "#!/usr/bin/python3 -IS\nprint('the first edition')\n" + made)
        self.touch(CRON, "# its own\n", 0o644)
        self.assertEqual("installed {}, /{}\n".format(BOTH, CRON), self.installed())
        self.assertNotIn("the first edition", self.content(PROGRAM))
        self.assertNotIn("its own", self.content(CRON))
        self.installed("--uninstall")
        self.assertEqual(before, self.snapshot())

    @in_every_shell
    def test_an_edited_file_is_installed_and_named(self):
        world.write(os.path.join(self.source, "certferry.py"), STUB + "# mine\n")
        result = self.install()
        self.assertEqual(0, result.status)
        expected = "certferry: certferry.py is not as it came with install.sh: installed as it is\n"
        self.assertEqual(expected, result.err)
        self.assertIn("# mine\n", self.content(MODULE))

    @in_every_shell
    def test_without_root(self):
        """With a PREFIX of one's own nothing else is touched, and NAME is passed on."""
        self.as_nobody()
        prefix = os.path.join(self.folder, "home")
        arguments = ("example.com", "--key", "-", "--from", "up.example.net")
        result = self.install(*arguments, stdin=b"KEY", DESTDIR="", PREFIX=prefix)
        lines = result.out.splitlines()
        self.assertEqual(0, result.status, result.err)
        expected = "installed {0}/bin/certferry, {0}/lib/certferry".format(prefix)
        self.assertEqual(expected, lines[0])
        schedule = "put into crontab -e: 17 1,13 * * * {}/bin/certferry renew".format(prefix)
        self.assertIn(schedule, lines[1])
        self.assertEqual(["certferry " + " ".join(arguments), "key: KEY"], lines[-2:])
        self.assertEqual(["bin", "lib"], sorted(os.listdir(prefix)))
        current = "etc/letsencrypt/live/example.com/.current"
        self.link("../../archive/example.com@1", current)
        result = self.install("--uninstall", DESTDIR=self.tree, PREFIX=prefix)
        self.assertNotIn("nothing renews", result.out)  # root's own copy may
        self.installed("--uninstall", DESTDIR="", PREFIX=prefix)
        self.assertFalse(os.path.exists(prefix))
        result = self.install(DESTDIR="")
        self.assertEqual((1, ""), (result.status, result.out))
        self.assertIn("certferry: root is needed (", result.err)

    @in_every_shell
    def test_a_key_does_not_come_through_the_pipe_that_brings_the_script(self):
        self.as_nobody()
        script = world.read(os.path.join(self.source, "install.sh"))
        for key in (["--key", "-"], ["--key=-"]):
            result = self.install(
                "--", "example.com", *key, script="-s", stdin=script, DESTDIR="", PREFIX="/nowhere"
            )
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertIn("can bring no key: give --key FILE", result.err)
        self.assertFalse(os.path.exists("/nowhere"))

    @in_every_shell
    def test_what_is_missing_is_said(self):
        self.as_nobody()
        path = self.path_of()
        script = world.write(
            os.path.join(self.source, "nothing-here.sh"),
            install_text().replace("/usr/bin/python3 python3 /usr", "/nowhere"),
        )
        for manager, way in (
            ("", "install python3 openssl with this system's package manager"),
            ("apk", "apk add python3 openssl"),
            ("dnf", "dnf install python3 openssl"),
            ("apt-get", "apt-get install python3-minimal openssl"),
        ):
            if manager:
                world.write(os.path.join(path, manager), "", 0o755)
            result = self.install(script=script, DESTDIR="", PATH=path, PREFIX="/nowhere")
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertIn("certferry: this host lacks python3 openssl", result.err)
            self.assertEqual(way, result.err.strip().split("Try: ")[1])
        self.assertFalse(os.path.exists("/nowhere"))

    @in_every_shell
    def test_an_interpreter_that_does_not_start_names_itself(self):
        self.as_nobody()
        old = world.write(os.path.join(self.folder, "python3.5"), "#!/bin/sh\nexit 1\n", 0o755)
        for python in ("/nope", "/no such", old, "no-such-python"):
            result = self.install(DESTDIR="", PREFIX="/nowhere", PYTHON=python)
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertIn(
                "certferry: PYTHON={} does not start, is older".format(python), result.err
            )
        self.assertFalse(os.path.exists("/nowhere"))

    @in_every_shell
    def test_a_program_that_does_not_start_is_not_installed(self):
        self.as_nobody()
        prefix = os.path.join(self.folder, "home")
        for program in ("import no_such_module\n", "print('as a script alone')\n"):
            self.release(program)
            result = self.install(DESTDIR="", PREFIX=prefix)
            self.assertEqual(1, result.status)
            self.assertIn("certferry does not start with", result.err)
            self.assertFalse(os.path.exists(prefix))

    @in_every_shell
    def test_usage(self):
        before = self.snapshot()
        for arguments, status, out in (
            (["--help"], 0, True),
            (["--unistall"], 2, False),
            (["example.com"], 1, None),
        ):
            result = self.install(*arguments)
            self.assertEqual(status, result.status)
            if out is not None:
                self.assertIn("usage: sh install.sh", result.out if out else result.err)
        self.assertEqual(before, self.snapshot())

    @in_every_shell
    def test_a_script_that_was_cut_off_does_nothing(self):
        whole = world.read(os.path.join(self.source, "install.sh"))
        before = self.snapshot()
        cuts = set(range(0, len(whole) - 1, 100)) | set(range(len(whole) - 30, len(whole) - 1))
        script = os.path.join(self.source, "cut.sh")
        for cut in cuts:
            world.write(script, whole[:cut])
            result = self.install(script=script)
            self.assertEqual("", result.out, cut)
        self.assertEqual(before, self.snapshot())
        world.write(script, whole[:-1])  # only the last newline is missing: nothing was cut off
        self.installed(script=script)


class Launcher(InstallCase):
    """What was installed, run with the Python that runs the tests."""

    def setUp(self):
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        self.set_up()
        self.prefix = os.path.join(self.folder, "prefix")
        self.program = os.path.join(self.prefix, "bin", "certferry")
        self.lib = os.path.join(self.prefix, "lib", "certferry")
        self.module = os.path.join(self.lib, "certferry.py")
        self.cache = os.path.join(self.lib, "__pycache__")
        self.compiled = os.path.join(
            self.cache, "certferry.{}.pyc".format(sys.implementation.cache_tag)
        )

    def put(self, program=STUB):
        """Install the program there as without root: nothing of this host is touched."""
        self.release(program)
        tools = os.path.join(self.folder, "tools")
        os.makedirs(tools, exist_ok=True)
        world.write(os.path.join(tools, "id"), "#!/bin/sh\necho 1000\n", 0o755)
        result = self.install(
            DESTDIR="",
            PREFIX=self.prefix,
            PYTHON=sys.executable,
            PATH=tools + ":" + os.environ["PATH"],
        )
        self.assertEqual(0, result.status, result.err)

    def run_it(self, *before, umask=0o022, become=None, **environment):
        """Standard output of the installed command, which has to succeed in silence."""

        def prepare():
            os.umask(umask)
            if become:
                become()

        done = subprocess.run(
            before + (self.program, "word"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            preexec_fn=prepare,
            env=dict(os.environ, **environment),
        )
        self.assertEqual((0, b""), (done.returncode, done.stderr))
        return done.stdout.decode()

    def spoil(self):
        """Make the cache one of another Python's magic number."""
        world.write(self.compiled, b"\0\0\0\0" + world.read(self.compiled)[4:])

    def assert_compiled_anew(self):
        """The cache is one of this Python's again."""
        self.assertEqual(importlib.util.MAGIC_NUMBER, world.read(self.compiled)[:4])

    def test_it_runs_what_was_compiled_for_it(self):
        self.put(STUB.replace('"certferry"', '"compiled"'))
        self.assertEqual([os.path.basename(self.compiled)], os.listdir(self.cache))
        facts = os.stat(self.module)
        world.write(self.module, STUB.replace('"certferry"', '"fromtext"'))
        self.assertEqual(len(STUB) - 1, os.stat(self.module).st_size)
        os.utime(self.module, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        self.assertEqual("compiled word\n", self.run_it())

    def test_an_upgrade_within_a_second_runs_the_new_one(self):
        for number in range(4):
            self.put(STUB.replace('"certferry"', '"number%d"' % number))
            self.assertEqual("number%d word\n" % number, self.run_it())

    def test_it_imports_from_the_standard_library_and_its_own_folder_alone(self):
        show = 'print(*sys.path, sep="\\n"); print(tuple(sys.flags)[:10], "site" in sys.modules)'
        self.put("import sys\n\ndef command():\n    import ssl, argparse\n    {}\n".format(show))
        for folder in (self.folder, os.path.dirname(self.program)):
            for name in ("ssl.py", "argparse.py", "certferry.py", "sitecustomize.py"):
                world.write(os.path.join(folder, name), "raise SystemExit('harm')\n")
        world.write(os.path.join(self.lib, "ssl.py"), "raise SystemExit('harm')\n")
        probe = [sys.executable, "-IS", "-c", "import sys; " + show]
        expected = subprocess.check_output(probe).decode().splitlines()
        expected.insert(-1, self.lib)
        found = self.run_it(
            PYTHONPATH=self.folder, PYTHONSTARTUP=os.path.join(self.folder, "ssl.py")
        )
        self.assertEqual(expected, found.splitlines())

    def test_another_python_compiles_it_anew_for_all_to_read(self):
        self.put()
        self.spoil()
        self.assertEqual("certferry word\n", self.run_it())
        self.assert_compiled_anew()
        self.assertEqual(0o644, os.stat(self.compiled).st_mode & 0o777)

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    def test_nobody_reads_it_whatever_umask_it_was_compiled_under(self):
        self.put()
        os.chmod(self.folder, 0o755)
        os.remove(self.compiled)
        self.assertEqual("certferry word\n", self.run_it(umask=0o077))
        self.assert_compiled_anew()
        # Pythons of the tests may lie in root's home, which is closed to nobody.
        words = self.run_it("/usr/bin/python3", "-IS", become=become_nobody)
        self.assertEqual("certferry word\n", words)

    @unittest.skipUnless(os.getuid() == 0, "needs root")
    @world.needs("unshare")
    def test_where_it_may_not_write_it_runs_all_the_same(self):
        self.put()
        self.spoil()
        spoiled = world.read(self.compiled)
        read_only = (
            "mount --bind {0} {0} && mount -o remount,ro,bind {0} && ! touch {0}/x 2>&- && "
            'exec "$@"'
        ).format(self.prefix)
        self.assertEqual(
            "certferry word\n", self.run_it("unshare", "-m", "sh", "-c", read_only, "sh")
        )
        self.assertEqual(spoiled, world.read(self.compiled))


class Another(InstallCase):
    """Another program of this name: a compiled one, with certferry-renew.timer."""

    @in_every_shell
    def test_its_timer_is_named_and_nothing_is_changed(self):
        self.touch(PROGRAM, b"\x7fELF\0\0")
        self.touch("etc/systemd/system/certferry-renew.timer", "[Timer]\n", 0o644)
        timer = self.link(
            "/etc/systemd/system/certferry-renew.timer", WANTS + "certferry-renew.timer"
        )
        before = self.snapshot()
        result = self.install()
        self.assertEqual((1, ""), (result.status, result.out))
        advice = "systemctl --root='{}' disable certferry-renew.timer".format(self.tree)
        expected = (
            "certferry: certferry-renew.timer of another program of this name is active. Try: "
        )
        self.assertEqual(expected + advice + "\n", result.err)
        self.assertEqual(before, self.snapshot())
        os.remove(timer)
        result = self.install()
        self.assertEqual(0, result.status)
        replaced = "/usr/local/bin/certferry was another program of this name, and is replaced"
        self.assertEqual("certferry: " + replaced + "\n", result.err)
        self.assertTrue(self.content(PROGRAM).startswith("#!/"))

    @in_every_shell
    def test_uninstall_leaves_it(self):
        self.touch(PROGRAM, b"\x7fELF\0\0")
        self.touch("usr/local/lib/certferry/__pycache__/other.pyc")
        before = self.snapshot()
        out = self.installed("--uninstall").splitlines()
        kept = "kept /usr/local/lib/certferry, which holds files that are not certferry's"
        self.assertEqual(["certferry was not here", kept], out)
        self.assertEqual(before, self.snapshot())


class Back(InstallCase):
    """Lineages are here, and certferry comes again."""

    def lineages(self, *paths):
        """Make the tree one of a host with systemd and these paths in /etc/letsencrypt."""
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        for path in paths:
            path = "etc/letsencrypt/" + path
            if path.endswith(".current"):
                name = path.split("/")[-2]
                self.link("../../archive/{}@1".format(name), path)
            else:
                self.touch(path)

    @in_every_shell
    def test_what_nothing_renews_is_told(self):
        advice = "Try: systemctl --root='{}' enable certferry.timer"
        for paths, who in (
            (["certferry/example.com.conf"], "example.com is"),
            (["live/example.com/.current"], "example.com is"),
            (["live/example.com/.current", "certferry/example.com.conf"], "example.com is"),
            (["live/b.example/.current", "certferry/a.example.conf"], "a.example and 1 more are"),
        ):
            with contextlib.ExitStack() as self.stack:
                self.set_up()
                self.lineages(*paths)
                expected = who + " set up here and no timer is on. " + advice.format(self.tree)
                for _ in range(2):
                    self.assertEqual(expected, self.installed().splitlines()[-1])

    @in_every_shell
    def test_what_is_no_lineage_is_not_told(self):
        self.lineages("live/example.org/cert.pem", "certferry/example.org.state")
        self.link("../../archive/example.org@1", "etc/letsencrypt/live/example.org.bak/.current")
        self.assertEqual(1, len(self.installed().splitlines()))

    @in_every_shell
    def test_with_the_timer_on_nothing_is_told(self):
        self.lineages("live/example.com/.current")
        self.link("/" + UNITS[1], WANTS + "certferry.timer")
        self.assertEqual(1, len(self.installed().splitlines()))

    @in_every_shell
    def test_with_cron_nothing_is_told(self):
        self.link("../../archive/example.com@1", "etc/letsencrypt/live/example.com/.current")
        self.assertEqual(1, len(self.installed().splitlines()))


class Uninstall(InstallCase):
    """What goes, what stays, and what is said of it."""

    @in_every_shell
    def test_the_tree_is_as_it_was(self):
        for folders, timetable in (
            ((), "/" + CRON),
            (("usr/local/bin",), "/" + CRON),
            (("run/systemd/system",), "certferry.service, certferry.timer"),
            (("usr/lib/systemd", "etc/systemd/system", "usr/local/lib"), "/" + CRON),
        ):
            for folder in folders:
                os.makedirs(os.path.join(self.tree, folder), exist_ok=True)
            before = self.snapshot()
            self.installed()
            self.installed()
            self.assertNotEqual(before, self.snapshot())
            self.touch(CACHE + "certferry.cpython-399.pyc", "a later Python's")
            self.touch(CACHE + "certferry.cpython-399.pyc.1234", "half of it")
            for folder in (os.path.dirname(path) for path in (PROGRAM, MODULE)):
                self.touch(folder + "/.certferry.new", "of a killed upgrade")
            expected = "removed {}, {}\n".format(BOTH, timetable)
            self.assertEqual(expected, self.installed("--uninstall"))
            self.assertEqual(before, self.snapshot())
            self.assertEqual("certferry was not here\n", self.installed("--uninstall"))
            if "run/systemd/system" in folders:
                shutil.rmtree(os.path.join(self.tree, "run"))

    @in_every_shell
    def test_a_file_that_is_not_ours_stays(self):
        self.installed()
        self.touch("usr/local/lib/certferry/notes", "mine")
        out = self.installed("--uninstall").splitlines()
        kept = "kept /usr/local/lib/certferry, which holds files that are not certferry's"
        self.assertEqual(["removed {}, /{}".format(BOTH, CRON), kept], out)
        folder = os.path.join(self.tree, "usr/local/lib/certferry")
        self.assertEqual(["notes"], os.listdir(folder))

    @in_every_shell
    def test_what_systemd_keeps_goes_and_what_an_administrator_made_stays(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        self.touch("etc/systemd/system/certferry.timer.d/override.conf", "[Timer]\n", 0o644)
        self.touch(WANTS + "other.timer")
        self.touch("var/lib/systemd/timers/stamp-other.timer")
        before = self.snapshot()
        self.installed()
        self.touch("var/lib/systemd/timers/stamp-certferry.timer")
        self.link("/" + UNITS[1], WANTS + "certferry.timer")
        kept = "kept /etc/systemd/system/certferry.timer.d, which systemctl edit made\n"
        self.assertIn(kept, self.installed("--uninstall"))
        self.assertEqual(before, self.snapshot())

    @in_every_shell
    def test_says_what_runs_out_and_when(self):
        """As fullchain.pem says, whatever it is; certbot's are no business of ours."""
        live = os.path.join(self.tree, "etc/letsencrypt/live")
        authority = world.Authority(self.folder, intermediate=False)
        february, december = datetime.datetime(2027, 2, 1), datetime.datetime(2027, 12, 31, 23)
        for name, end, file in (
            ("example.com", february, "fullchain.pem"),
            ("example.net", december, "cert.pem"),
            ("copied.example.org", december, "fullchain.pem"),
            ("certbot.example.org", december, "fullchain.pem"),
            ("broken.example.org", None, None),
        ):
            os.makedirs(os.path.join(live, name))
            if end:
                cert = authority.issue([name], not_after=end).cert
                shutil.copy(cert, os.path.join(live, name, file))
            if not name.startswith("c"):
                os.symlink("../../archive/{}@1".format(name), os.path.join(live, name, ".current"))
        for name in ("copied.example.org", "not-yet.example.org"):
            self.touch("etc/letsencrypt/certferry/{}.conf".format(name))
        before = self.snapshot()
        self.installed()
        out = self.installed("--uninstall")
        expected = (
            "kept /etc/letsencrypt: nothing renews these now: broken.example.org (until unknown), "
            "copied.example.org (until 2027-12-31), example.com (until 2027-02-01), "
            "example.net (until 2027-12-31)"
        )
        self.assertEqual(expected, out.splitlines()[-1])
        self.assertEqual(before, self.snapshot())


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves .files; /away/NAME redirects to http, and anything else is not there."""

    def do_GET(self):
        name = os.path.basename(self.path)
        if self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", self.server.plain + name)
            self.end_headers()
            return
        self.send_response(200 if name in self.server.files else 404)
        self.send_header("Content-Length", str(len(self.server.files.get(name, b""))))
        self.end_headers()
        self.wfile.write(self.server.files.get(name, b""))

    def log_message(self, *_):
        pass


class QuietServer(http.server.HTTPServer):
    def handle_error(self, *_):
        pass  # a client that does not trust it hangs up


@world.needs("curl", "wget")
class Download(InstallCase):
    """The script comes through a pipe and fetches the rest from CERTFERRY_URL."""

    @classmethod
    def setUpClass(cls):
        folder = world.scratch()
        authority = world.Authority(folder, intermediate=False)
        credential = authority.issue(["127.0.0.1"])
        cls.undo = []
        cls.plain = cls.serve()
        cls.secure = cls.serve()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(credential.fullchain, credential.key)
        cls.secure.socket = context.wrap_socket(cls.secure.socket, server_side=True)
        cls.secure.plain = "http://127.0.0.1:{}/".format(cls.plain.server_port)
        cls.url = "https://127.0.0.1:{}".format(cls.secure.server_port)
        wgetrc = world.write(os.path.join(folder, "wgetrc"), "ca_certificate = " + authority.root)
        cls.trust = {"CURL_CA_BUNDLE": authority.root, "WGETRC": wgetrc, "no_proxy": "127.0.0.1"}

    @classmethod
    def serve(cls):
        server = QuietServer(("127.0.0.1", 0), Mirror)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        cls.undo += [server.shutdown, thread.join, server.server_close]
        return server

    @classmethod
    def tearDownClass(cls):
        for undo in cls.undo:
            undo()

    def set_up(self):
        super().set_up()
        files = {name: world.read(os.path.join(self.source, name)) for name in FILES}
        self.secure.files = self.plain.files = files
        self.script = world.read(os.path.join(self.source, "install.sh"))
        # Neither a file named as the shell nor the folder that one happens to be in is trusted.
        for name in FILES + (self.shell[0], "sh"):
            world.write(os.path.join(self.folder, name), "echo harm")

    def tools(self):
        """What to fetch with; busybox prefers its own wget, which checks no certificate."""
        return ("curl",) if self.shell[0] == "busybox" else ("curl", "wget")

    def fetch(self, url=None, path=None):
        where = {
            "CERTFERRY_URL": self.url if url is None else url,
            "PATH": path or os.environ["PATH"],
        }
        return self.install(script="-s", stdin=self.script, **where, **self.trust)

    def refused(self, saying, *arguments, **options):
        before = self.snapshot()
        result = self.fetch(*arguments, **options)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assertIn(saying, result.err.splitlines()[-1])
        self.assertEqual(before, self.snapshot())
        self.assertEqual([], [name for name in os.listdir(self.folder) if name.startswith("tmp.")])

    @in_every_shell
    def test_fetched_and_installed(self):
        for tool in self.tools():
            result = self.fetch(self.url + "/", self.path_of(tool, "openssl"))
            self.assertEqual((0, ""), (result.status, result.err))
            self.assertEqual(STUB, self.content(MODULE))
            self.installed("--uninstall")

    @in_every_shell
    def test_tampered_or_cut_off(self):
        for name in FILES:
            right = self.secure.files[name]
            for wrong in (right + b"#", right[:-1], b""):
                self.secure.files[name] = wrong
                damaged = "/{} is damaged, or not of this script's version: nothing was changed"
                self.refused(damaged.format(name))
            del self.secure.files[name]
            self.refused("could not fetch {}/{}: nothing was changed".format(self.url, name))
            self.secure.files[name] = right

    @in_every_shell
    def test_only_https(self):
        self.refused("must begin with https://", self.secure.plain)
        for tool in self.tools():
            self.refused("could not fetch", self.url + "/away", self.path_of(tool, "sha256sum"))
        if "wget" in self.tools():
            self.refused("curl or wget is needed here", path=self.path_of("sha256sum"))
        self.refused("certferry.py is not beside this script: set CERTFERRY_URL=", "")

    @in_every_shell
    def test_an_untrusted_server(self):
        self.trust = {"no_proxy": "127.0.0.1"}
        for tool in self.tools():
            self.refused("could not fetch", path=self.path_of(tool, "sha256sum"))


def write_sums():
    """Put the sums of the files that are here into install.sh."""
    world.write(INSTALL, with_sums(install_text(), world.REPOSITORY))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-sums"]:
        write_sums()
    else:
        unittest.main()
