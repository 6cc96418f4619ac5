"""install.sh in every shell: what it puts where, twice, upgraded, removed, cut off, tampered with.

`python3 tests/test_install.py --write-sums` puts the current sums into install.sh. The trees are
scratch folders (DESTDIR), the program is a stub; tests/platforms.sh runs the real thing.
"""

import contextlib
import datetime
import hashlib
import http.server
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
UNITS = ["etc/systemd/system/certferry.service", "etc/systemd/system/certferry.timer"]
STUB = """#!/usr/bin/env python3
import sys
print('certferry', *sys.argv[1:])
if '-' in sys.argv:
    print('key:', sys.stdin.read())
"""
SHELLS = (["dash"], ["bash"], ["busybox", "sh"])
# What install.sh runs in any case; openssl, sha256sum, curl and wget are each test's own choice.
COMMANDS = ("basename chmod cp cut dirname grep head id mkdir mktemp mv readlink rm rmdir sed "
            "uname").split()


def with_sums(script, folder):
    """The script's text with the SHA-256 sums of the files in that folder."""
    def line(match):
        content = world.read(os.path.join(folder, match.group(1)))
        return hashlib.sha256(content).hexdigest() + "  " + match.group(1)
    return re.sub("^[0-9a-f]{64}  (certferry[.][a-z]+)$", line, script, flags=re.M)


def install_text():
    return world.read(INSTALL).decode()


def become_nobody():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def in_every_shell(test):
    """Run the test method once in each shell, as self.shell, with folders of its own."""
    def run(self):
        for self.shell in SHELLS:
            with self.subTest(shell=self.shell[0]), contextlib.ExitStack() as self.stack:
                self.set_up()
                test(self)
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return world.needs(*(shell[0] for shell in SHELLS))(run)


def load_tests(loader, tests, _pattern):
    """All tests, or with CERTFERRY_QUICK those of the sums: shells are the same everywhere."""
    if world.QUICK:
        return loader.loadTestsFromTestCase(Script)
    return tests


class InstallCase(unittest.TestCase):
    """self.source is a checkout with a stub, self.tree the DESTDIR of a host without systemd."""

    shell = SHELLS[0]
    become = None  # called in the child before it becomes the shell

    def set_up(self):
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
        world.write(os.path.join(self.source, "install.sh"),
                    with_sums(install_text(), self.source))

    def as_nobody(self):
        """Run install.sh without root from now on: with no DESTDIR it could reach this host."""
        self.become = None
        if os.getuid() == 0:
            self.become = become_nobody
            for folder in (self.folder, self.source, self.tree):
                os.chown(folder, 65534, 65534)

    def touch(self, path, content="", mode=0o755):
        path = os.path.join(self.tree, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return world.write(path, content, mode)

    def install(self, *arguments, script=None, stdin=b"", **environment):
        """Run install.sh, or the script given ("-s": the one on standard input)."""
        variables = dict(os.environ, DESTDIR=self.tree, TMPDIR=self.folder)
        variables.update(environment)
        command = self.shell + [script or os.path.join(self.source, "install.sh")]
        done = subprocess.run(
            command + list(arguments), executable=shutil.which(command[0]), input=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder,
            preexec_fn=self.become,
            env=variables)
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
        """The files that are in the tree now and were not."""
        return sorted(path for path, (_, content, _) in self.snapshot().items()
                      if path not in before and content is not None)

    def assert_mode(self, mode, path):
        self.assertEqual(oct(mode), oct(os.stat(os.path.join(self.tree, path)).st_mode & 0o7777))

    def content(self, path):
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
        self.assertTrue(with_sums(install_text(), world.REPOSITORY) == install_text(),
                        "stale sums: run python3 tests/test_install.py --write-sums")
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

    @in_every_shell
    def test_with_systemd(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        before = self.snapshot()
        self.assertEqual(" /".join(["installed", PROGRAM] + UNITS) + "\n", self.installed())
        self.assertEqual(sorted([PROGRAM] + UNITS), self.added(before))
        for path in UNITS:
            self.assertEqual(world.read(os.path.join(world.REPOSITORY, os.path.basename(path))),
                             self.content(path).encode())
            self.assert_mode(0o644, path)
        self.assert_mode(0o755, PROGRAM)

    @in_every_shell
    def test_with_cron(self):
        before = self.snapshot()
        self.installed()
        self.assertEqual([CRON, PROGRAM], self.added(before))
        self.assertEqual("17 1,13 * * * root /usr/local/bin/certferry renew --jitter 43200 -q",
                         self.content(CRON).splitlines()[-1])
        self.assertIn("\nPATH=/usr/local/sbin:", self.content(CRON))
        self.assert_mode(0o644, CRON)

    @in_every_shell
    def test_with_busybox_crond(self):
        os.remove(os.path.join(self.tree, "usr/sbin/cron"))
        os.symlink("/bin/busybox", os.path.join(self.tree, "usr/sbin/crond"))
        before = self.snapshot()
        out = self.installed()
        self.assertEqual([PROGRAM], self.added(before))
        self.assertIn("put into /etc/crontabs/root: 17 1,13 * * * /usr/local/bin/certferry renew "
                      "--jitter 43200 -q\n", out)

    @in_every_shell
    def test_a_package_in_the_making(self):
        shutil.rmtree(self.tree)
        os.mkdir(self.tree)
        self.installed()
        made = self.snapshot()
        self.assertEqual(sorted([PROGRAM] + UNITS), self.added({}))
        self.assertIn("unchanged", self.installed())
        self.assertEqual(made, self.snapshot())
        self.installed("--uninstall")
        self.assertEqual([], os.listdir(self.tree))

    @in_every_shell
    def test_prefix(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        self.installed(PREFIX="/opt/tls")
        self.assertTrue(os.access(os.path.join(self.tree, "opt/tls/bin/certferry"), os.X_OK))
        self.assertIn("\nExecStart=/opt/tls/bin/certferry renew\n", self.content(UNITS[0]))
        for prefix in ("opt", "/opt/a b", "/opt/$x", "/opt/a|b"):
            result = self.install(PREFIX=prefix)
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertIn("must be an absolute path", result.err)

    @in_every_shell
    def test_interpreter(self):
        platform_python = "usr/libexec/platform-python"
        for path in (platform_python, "usr/bin/python3"):
            self.touch(path)
            self.installed()
            self.assertEqual("#!/{} -IS\n{}".format(path, STUB.split("\n", 1)[1]),
                             self.content(PROGRAM).split("# install.sh made")[0])
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
        self.release(STUB + "# the next version\n")
        self.assertEqual("installed /usr/local/bin/certferry\n", self.installed())
        after = self.snapshot()
        self.assertEqual({PROGRAM}, {path for path in after if after[path] != before.get(path)})
        self.assertIn("# the next version\n", self.content(PROGRAM))
        self.assertEqual(b"warn = 20%\n", world.read(remembered))
        self.installed("--uninstall")
        self.assertFalse(os.path.exists(os.path.join(self.tree, "usr/local")))

    @in_every_shell
    def test_an_edited_file_is_installed_and_named(self):
        world.write(os.path.join(self.source, "certferry.py"), STUB + "# mine\n")
        result = self.install()
        self.assertEqual(0, result.status)
        self.assertEqual("certferry: certferry.py is not as it came with install.sh: "
                         "installed as it is\n", result.err)
        self.assertIn("# mine\n", self.content(PROGRAM))

    @in_every_shell
    def test_without_root(self):
        """With a PREFIX of one's own nothing else is touched, and NAME is passed on."""
        self.as_nobody()
        prefix = os.path.join(self.folder, "home")
        arguments = ("example.com", "--key", "-", "--from", "up.example.net")
        result = self.install(*arguments, stdin=b"KEY", DESTDIR="", PREFIX=prefix)
        lines = result.out.splitlines()
        self.assertEqual(0, result.status, result.err)
        self.assertEqual("installed {}/bin/certferry".format(prefix), lines[0])
        self.assertIn("put into crontab -e: 17 1,13 * * * {}/bin/certferry renew".format(prefix),
                      lines[1])
        self.assertEqual(["certferry " + " ".join(arguments), "key: KEY"], lines[-2:])
        self.assertEqual(["certferry"], os.listdir(os.path.join(prefix, "bin")))
        live = os.path.join(self.tree, "etc/letsencrypt/live/example.com")
        os.makedirs(live)
        os.symlink("../../archive/example.com@1", os.path.join(live, ".current"))
        result = self.install("--uninstall", DESTDIR=self.tree, PREFIX=prefix)
        self.assertNotIn("nothing renews", result.out)  # root's own copy may
        self.installed("--uninstall", DESTDIR="", PREFIX=prefix)
        self.assertFalse(os.path.exists(prefix))
        result = self.install(DESTDIR="")
        self.assertEqual((1, "certferry: needs root: sudo sh install.sh; or PREFIX=~/.local\n"),
                         (result.status, result.err))

    @in_every_shell
    def test_what_is_missing_is_said(self):
        self.as_nobody()
        path = self.path_of()
        for manager, way in (("", "install python3 openssl with this system's package manager"),
                             ("apk", "apk add python3 openssl"),
                             ("dnf", "dnf install python3 openssl"),
                             ("apt-get", "apt-get install python3-minimal openssl")):
            if manager:
                world.write(os.path.join(path, manager), "", 0o755)
            result = self.install(DESTDIR="", PATH=path, PREFIX="/nowhere", PYTHON="/nowhere/py")
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertEqual("certferry: needs python3 openssl here (Python 3.6 or later): " + way,
                             result.err.strip())
        self.assertFalse(os.path.exists("/nowhere"))

    @in_every_shell
    def test_a_program_that_does_not_start_is_not_installed(self):
        self.as_nobody()
        self.release("import no_such_module\n")
        prefix = os.path.join(self.folder, "home")
        result = self.install(DESTDIR="", PREFIX=prefix)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assertIn("certferry does not start with", result.err)
        self.assertFalse(os.path.exists(prefix))

    @in_every_shell
    def test_usage(self):
        before = self.snapshot()
        for arguments, status, out in ((["--help"], 0, True), (["--unistall"], 2, False),
                                       (["example.com"], 1, None)):
            result = self.install(*arguments)
            self.assertEqual(status, result.status)
            if out is not None:
                self.assertIn("usage: sh install.sh", result.out if out else result.err)
        self.assertEqual(before, self.snapshot())

    @in_every_shell
    def test_a_script_that_was_cut_off_does_nothing(self):
        whole = world.read(os.path.join(self.source, "install.sh"))
        before = self.snapshot()
        cuts = set(range(0, len(whole) - 1, 50)) | set(range(len(whole) - 30, len(whole) - 1))
        script = os.path.join(self.source, "cut.sh")
        for cut in cuts:
            world.write(script, whole[:cut])
            result = self.install(script=script)
            self.assertEqual("", result.out, cut)
        self.assertEqual(before, self.snapshot())
        world.write(script, whole[:-1])  # only the last newline is missing: nothing was cut off
        self.installed(script=script)


class Older(InstallCase):

    @in_every_shell
    def test_the_rust_cert_ferry_is_named_and_its_timer_disabled(self):
        self.touch(PROGRAM, b"\x7fELF\0\0")
        self.touch("etc/systemd/system/certferry-renew.timer", "[Timer]\n", 0o644)
        link = os.path.join(self.tree, "etc/systemd/system/timers.target.wants")
        os.mkdir(link)
        link = os.path.join(link, "certferry-renew.timer")
        os.symlink("/etc/systemd/system/certferry-renew.timer", link)
        for path in ("example.com/cert.pem", "example.com/privkey.pem", "example.org/cert.pem"):
            self.touch("etc/letsencrypt/live/" + path)
        result = self.install()
        self.assertEqual(0, result.status)
        self.assertEqual(
            "certferry: the older cert-ferry was here: /usr/local/bin/certferry "
            "/etc/systemd/system/certferry-renew.timer: certferry-renew.timer is disabled\n"
            "  to take over its certificate: certferry example.com\n", result.err)
        self.assertFalse(os.path.islink(link))
        self.assertTrue(self.content(PROGRAM).startswith("#!/"))

    @in_every_shell
    def test_uninstall_leaves_it(self):
        self.touch(PROGRAM, b"\x7fELF\0\0")
        before = self.snapshot()
        self.assertEqual("certferry was not here\n", self.installed("--uninstall"))
        self.assertEqual(before, self.snapshot())


class Uninstall(InstallCase):

    @in_every_shell
    def test_the_tree_is_as_it_was(self):
        for folders in ((), ("usr/local/bin",), ("run/systemd/system",),
                        ("lib/systemd", "etc/systemd/system", "usr/local")):
            for folder in folders:
                os.makedirs(os.path.join(self.tree, folder), exist_ok=True)
            before = self.snapshot()
            self.installed()
            self.installed()
            self.assertNotEqual(before, self.snapshot())
            self.assertIn("removed /usr/local/bin/certferry", self.installed("--uninstall"))
            self.assertEqual(before, self.snapshot())
            self.assertEqual("certferry was not here\n", self.installed("--uninstall"))

    @in_every_shell
    def test_what_systemd_keeps_goes_and_what_an_administrator_made_stays(self):
        os.makedirs(os.path.join(self.tree, "run/systemd/system"))
        self.touch("etc/systemd/system/certferry.timer.d/override.conf", "[Timer]\n", 0o644)
        self.touch("etc/systemd/system/timers.target.wants/other.timer")
        self.touch("var/lib/systemd/timers/stamp-other.timer")
        before = self.snapshot()
        self.installed()
        self.touch("var/lib/systemd/timers/stamp-certferry.timer")
        wanted = os.path.join(self.tree, "etc/systemd/system/timers.target.wants/certferry.timer")
        os.symlink("/etc/systemd/system/certferry.timer", wanted)
        self.assertIn("kept /etc/systemd/system/certferry.timer.d, which systemctl edit made\n",
                      self.installed("--uninstall"))
        self.assertEqual(before, self.snapshot())

    @in_every_shell
    def test_says_what_runs_out_and_when(self):
        live = os.path.join(self.tree, "etc/letsencrypt/live")
        authority = world.Authority(os.path.join(self.folder), intermediate=False)
        february, december = datetime.datetime(2027, 2, 1), datetime.datetime(2027, 12, 31, 23)
        for name, end in (("example.com", february), ("example.net", december),
                          ("certbot.example.org", december), ("broken.example.org", None)):
            os.makedirs(os.path.join(live, name))
            cert = os.path.join(live, name, "cert.pem")
            if end:
                shutil.copy(authority.issue([name], not_after=end).cert, cert)
            if not name.startswith("certbot"):
                os.symlink("../../archive/{}@1".format(name), os.path.join(live, name, ".current"))
        before = self.snapshot()
        self.installed()
        out = self.installed("--uninstall")
        self.assertEqual("kept /etc/letsencrypt: nothing renews these now: "
                         "broken.example.org (until unknown), example.com (until 2027-02-01), "
                         "example.net (until 2027-12-31)", out.splitlines()[-1])
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
        where = {"CERTFERRY_URL": self.url if url is None else url,
                 "PATH": path or os.environ["PATH"]}
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
            self.assertEqual(STUB.split("\n", 1)[1],
                             self.content(PROGRAM).split("\n", 1)[1].split("# install.sh made")[0])
            self.installed("--uninstall")

    @in_every_shell
    def test_tampered_or_cut_off(self):
        for name in FILES:
            right = self.secure.files[name]
            for wrong in (right + b"#", right[:-1], b""):
                self.secure.files[name] = wrong
                self.refused("/{} is damaged, or not of this script's version: nothing was changed"
                             .format(name))
            del self.secure.files[name]
            self.refused("could not fetch {}/{}: nothing was changed".format(self.url, name))
            self.secure.files[name] = right

    @in_every_shell
    def test_only_https(self):
        self.refused("must begin with https://", self.secure.plain)
        for tool in self.tools():
            self.refused("could not fetch", self.url + "/away", self.path_of(tool, "sha256sum"))
        if "wget" in self.tools():
            self.refused("needs curl or wget here", path=self.path_of("sha256sum"))
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
