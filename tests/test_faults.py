"""The set in service through every storage fault: kills, errors, full and closed disks, a reader.

The sweep stops a first crossing, a rotation and two adoptions at their storage calls, one call at
a time, with SIGKILL, ENOSPC and EIO. It takes minutes: each run tries every STRIDE-th point, from
another one under each Python release; CERTFERRY_SWEEP=full tries them all and prints how many.
"""

import collections
import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import unittest

from tests import world

NAME = "example.com"
MEMBERS = ("cert.pem", "chain.pem", "fullchain.pem", "privkey.pem")
HOOK = 'echo ran >>"$RENEWED_LINEAGE/../../../hooks.log"'
FULL = os.environ.get("CERTFERRY_SWEEP") == "full"
STRIDE = 1 if FULL else 111 if world.QUICK else 37
WORKERS = os.cpu_count() or 1

# A question mark: strace passes over what this architecture does not have.
CALLS = [
    "open", "openat", "creat", "write", "pwrite64", "writev", "sendfile", "copy_file_range",
    "rename", "renameat", "renameat2", "symlink", "symlinkat", "link", "linkat", "fsync",
    "fdatasync", "mkdir", "mkdirat", "chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown",
    "fchownat", "unlink", "unlinkat", "rmdir", "utimensat", "setxattr", "lsetxattr", "fsetxattr",
    "ftruncate"]
TRACE = "trace=" + ",".join("?" + call for call in CALLS)
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")

# What ends the names of files that are under way, to aim at the one rename.
LITTER = re.search('^LITTER = "(.*?)"', world.read(world.CERTFERRY).decode(), re.M).group(1)
CURRENT = "live/{}/.current{}".format(NAME, LITTER)
STAGED = "archive/.{}@2{}".format(NAME, LITTER)
STATE = "certferry/.{}.state{}".format(NAME, LITTER)

needs_root = unittest.skipIf(os.geteuid(), "needs root")

Scene = collections.namedtuple("Scene", "name folder arguments before after")
Scene.__doc__ = """What is swept: a config dir to start from, and the command that is disturbed.

before (a list) and after are the sets that readers may see, as read_set() returns them.
"""

Point = collections.namedtuple("Point", "scene fault call number expected")
Point.__doc__ = "The number-th such call of the scene's command; expected says that there is one."


# ---------------------------------------------------------------- looking and disturbing

def read_set(downstream):
    """{name: bytes, or None where there is nothing} as a server finds them in live/NAME/."""
    found = {}
    for name in MEMBERS:
        try:
            found[name] = world.read(downstream.live(NAME, name))
        except FileNotFoundError:
            found[name] = None
    return found


def hooks_run(downstream):
    """How often HOOK ran since the scene was set."""
    try:
        return len(world.read(os.path.dirname(downstream.config) + "/hooks.log").splitlines())
    except FileNotFoundError:
        return 0


def set_scene(downstream, folder):
    """Make the config dir a fresh copy of that folder, at the same path as ever."""
    shutil.rmtree(downstream.config, ignore_errors=True)
    shutil.copytree(folder, downstream.config, symlinks=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.dirname(downstream.config) + "/hooks.log")


def paths_of(downstream):
    """The paths in the config dir, relative, with every version's number as N."""
    return {re.sub("@[0-9]+", "@N", path) for path in downstream.snapshot()}


def broken_versions(downstream, good):
    """The versions of which a file is missing, or whose certificate and key are no pair in good."""
    broken = []
    for folder in os.listdir(os.path.join(downstream.config, "archive")):
        if "@" not in folder:
            continue
        try:
            files = [world.read(os.path.join(downstream.config, "archive", folder, name))
                     for name in MEMBERS]
        except FileNotFoundError as error:
            broken.append("{}: {}".format(folder, error))
            continue
        if good.get(files[0]) != files[3] or files[2] != files[0] + files[1]:
            broken.append(folder + ": does not fit")
    return broken


def start_disturbed(downstream, arguments, *options):
    """Start the command under strace with these options; returns (Popen, path of strace's log)."""
    log = world.write(os.path.join(os.path.dirname(downstream.config), "strace.log"), b"")
    # The filter in the kernel makes it twice as fast, but loses signals without an error.
    quick = () if any("signal=" in option for option in options) else ("--seccomp-bpf",)
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("CERTFERRY_")}
    return subprocess.Popen(
        ("strace", "-f", "-y", "-s", "9999", "-o", log) + quick + options
        + world.command() + tuple(arguments)
        + ("--config-dir", downstream.config), env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE), log


def finish(process, log):
    """Wait for what start_disturbed() started; returns (Result, strace's log).

    A command that is killed takes strace with it: the status then says which signal it was.
    """
    out, err = process.communicate(timeout=120)
    return (world.Result(process.returncode, out.decode(), err.decode()),
            world.read(log).decode("utf-8", "replace"))


def disturbed(downstream, arguments, *options):
    """Run the command under strace with these options, to its end; returns what finish() does."""
    return finish(*start_disturbed(downstream, arguments, *options))


def touched_paths(downstream, arguments):
    """Run undisturbed: the paths in the config dir that storage calls name or hold open."""
    _, log = disturbed(downstream, arguments, "-e", TRACE)
    paths = set(re.findall(r'[<"](' + re.escape(downstream.config) + r'[^">]*)[">]', log))
    return sorted(path for path in paths if "/../" not in path)  # which is HOOK's


def only(paths):
    """strace's options for these paths."""
    return tuple(word for path in paths for word in ("-P", path))


def count_calls(log):
    """{call: how many of it one process made, at most}."""
    made = collections.Counter(re.findall(r"^([0-9]+ +[a-z0-9_]+)\(", log, re.M))
    most = collections.Counter()
    for who, number in made.items():
        call = who.split()[1]
        most[call] = max(most[call], number)
    return most


class FaultCase(unittest.TestCase):
    """An authority, and config dirs to start from, made once for a class."""

    @classmethod
    def setUpClass(cls):
        cls.folder = world.scratch()
        cls.authority = world.Authority(cls.folder)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder, ignore_errors=True)

    @classmethod
    def issue(cls, key=None):
        """A certificate that is newer than the one issued before."""
        return cls.authority.issue([NAME, "*." + NAME], key=key)

    @classmethod
    def crossing(cls, offer, *more):
        """Arguments of a first crossing from that file."""
        return (NAME, "--from", "file:" + offer, "--ca-file", cls.authority.root,
                "--deploy-hook", HOOK) + more

    def installed(self, downstream):
        """A lineage with one version, from a file that is then the test's own to change."""
        first = self.issue()
        offer = os.path.join(os.path.dirname(downstream.config), "offer.pem")
        shutil.copy(first.fullchain, offer)
        downstream.key(NAME, first)
        result = downstream.run(*self.crossing(offer))
        self.assertEqual(0, result.status, result)
        os.unlink(os.path.dirname(downstream.config) + "/hooks.log")
        return first, offer

    def assert_no_traceback(self, result):
        """The promise that holds whatever happens."""
        self.assertNotIn("Traceback", result.out + result.err)


# ---------------------------------------------------------------- the sweep

@world.needs("strace")
class Sweep(FaultCase):
    """Every storage call of a deployment fails once, or is the last that the process makes."""

    longMessage = False  # sets of files do not make readable messages

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.scenes = {}
        cls.good = {}  # the key that belongs to each certificate, as bytes
        for make in (cls._first_crossing, cls._rotation, cls._adoption, cls._takeover):
            with world.Downstream() as downstream:
                cls._make_scene(downstream, *make(downstream))

    @classmethod
    def _credential(cls, key=None):
        credential = cls.issue(key)
        cls.good[world.read(credential.cert)] = world.read(credential.key)
        return credential

    @classmethod
    def _first_crossing(cls, downstream):
        """Nothing is there, the key comes with the command."""
        new = cls._credential()
        before = [dict.fromkeys(MEMBERS), dict(dict.fromkeys(MEMBERS),
                                               **{"privkey.pem": world.read(new.key)})]
        return ("first crossing", cls.crossing(new.fullchain, "--key", new.key), before, new)

    @classmethod
    def _rotation(cls, downstream):
        """As many versions as are kept, and a staged key that the next certificate is for."""
        offer = os.path.join(cls.folder, "rotation.pem")
        old = cls._credential()
        downstream.key(NAME, old)
        for _ in range(5):
            shutil.copy(old.fullchain, offer)
            downstream.run(*cls.crossing(offer))
            old = cls._credential(old.key)
        new = cls._credential()
        downstream.key(NAME, new, "privkey-next.pem")
        shutil.copy(new.fullchain, offer)
        return "rotation", ("renew",), [read_set(downstream)], new

    @classmethod
    def _adoption(cls, downstream):
        """Plain files, and a newer certificate for their key."""
        old = cls._credential()
        downstream.key(NAME, old)
        for name, path in zip(MEMBERS, (old.cert, old.chain, old.fullchain)):
            shutil.copy(path, downstream.live(NAME, name))
        new = cls._credential(old.key)
        return "adoption", cls.crossing(new.fullchain), [read_set(downstream)], new

    @classmethod
    def _takeover(cls, downstream):
        """Links as certbot makes them, and a newer certificate for their key."""
        _, arguments, before, new = cls._adoption(downstream)
        archive = os.path.join(downstream.config, "archive", NAME)
        os.makedirs(archive)
        for name in MEMBERS:
            os.rename(downstream.live(NAME, name), archive + "/" + name.replace(".", "1."))
            os.symlink("../../archive/{}/{}".format(NAME, name.replace(".", "1.")),
                       downstream.live(NAME, name))
        return "takeover", arguments, before, new

    @classmethod
    def _make_scene(cls, downstream, name, arguments, before, new):
        folder = os.path.join(cls.folder, name)
        shutil.copytree(downstream.config, folder, symlinks=True)
        result = downstream.run(*arguments)
        assert result.status == 0, result
        downstream.assert_fits(unittest.TestCase(), NAME, new)
        scene = Scene(name, folder, arguments, before, read_set(downstream))
        expected = paths_of(downstream)
        set_scene(downstream, folder)
        paths = touched_paths(downstream, arguments)
        set_scene(downstream, folder)
        _, log = disturbed(downstream, arguments, "-e", TRACE, *only(paths))
        relative = [os.path.relpath(path, downstream.config) for path in paths]
        cls.scenes[name] = scene, relative, count_calls(log), expected

    def test_points(self):
        """Old or new and whole after each point; the next run completes it and leaves no litter."""
        points = [Point(name, fault, call, number, number <= made)
                  for name, (_, _, calls, _) in sorted(self.scenes.items())
                  for fault in FAULTS
                  for call, made in sorted(calls.items())
                  for number in range(1, made + 2)]
        points = points[sys.version_info[1] % STRIDE::STRIDE]
        stages = queue.Queue()
        with contextlib.ExitStack() as stack:
            for _ in range(WORKERS):
                stages.put(stack.enter_context(world.Downstream()))
            with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
                wrong = list(filter(None, pool.map(lambda point: self._try(point, stages), points)))
        if FULL:
            tried = collections.Counter(point.scene for point in points if point.expected)
            print("\nfault sweep: {} points ({}), {} not survived".format(
                sum(tried.values()), ", ".join("{} {}".format(name, number)
                                               for name, number in sorted(tried.items())),
                len(wrong)), file=sys.stderr)
        self.assertFalse(wrong, "{} of {} points:\n{}".format(
            len(wrong), len(points), "\n".join(wrong[:40])))

    def _try(self, point, stages):
        """One point; returns "" or what was wrong."""
        downstream = stages.get()
        try:
            self._survive(point, downstream)
            return ""
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            return "{0.scene}, {0.call} {0.number}, {0.fault}: {1}".format(point, error)
        finally:
            stages.put(downstream)

    def _survive(self, point, downstream):
        scene, paths, _, expected = self.scenes[point.scene]
        set_scene(downstream, scene.folder)
        allowed = expected | paths_of(downstream)
        result, log = disturbed(
            downstream, scene.arguments, "-e", "trace=" + point.call, "-e",
            "inject={}:{}:when={}".format(point.call, point.fault, point.number),
            *only(os.path.join(downstream.config, path) for path in paths))
        hit = "(INJECTED)" in log or result.status == -signal.SIGKILL
        self.assertEqual(point.expected, hit, "injected: {}".format(hit))
        seen, left = read_set(downstream), paths_of(downstream) - allowed
        self.assertIn(seen, scene.before + [scene.after], "neither old nor new through live/")
        self._assert_next_run_completes(downstream, scene, expected, hooks_run(downstream))
        if "error=" in point.fault and hit:
            self._assert_said(point, result, seen in scene.before)
            # Where clearing up is what failed, after the deploy, the next run does it.
            clearing = ("unlink", "rmdir") + (("openat",) if seen == scene.after else ())
            if point.call not in clearing:
                self.assertFalse(left, "left by the run that failed: {}".format(sorted(left)))

    def _assert_said(self, point, result, stands):
        """What the user is told of a call that failed."""
        what = "status {}, {}".format(result.status, result.err.strip())
        self.assertNotIn("Traceback", result.err, what)
        self.assertIn(result.status, (1,) if stands else (0, 1), what)
        if result.status:
            words = {"error=ENOSPC": "no space left on device", "error=EIO": "input/output error"}
            self.assertIn(words[point.fault], result.err.lower(), what)

    def _assert_next_run_completes(self, downstream, scene, expected, hooks_before):
        """One run without faults: the new set, no litter, hooks run."""
        result = downstream.run(*scene.arguments)
        self.assertEqual(0, result.status, "the next run: {}".format(result))
        self.assertEqual(scene.after, read_set(downstream), "not the new set after the next run")
        paths = paths_of(downstream)
        self.assertEqual(expected, paths, "left after the next run: {}, missing: {}".format(
            sorted(paths - expected), sorted(expected - paths)))
        broken = broken_versions(downstream, self.good)
        self.assertFalse(broken, "after the next run: {}".format(broken))
        leaves = [world.read(os.path.join(downstream.config, path)) for path
                  in downstream.snapshot() if re.match("archive/[^/]*@[0-9]+/cert.pem", path)]
        self.assertEqual(len(set(leaves)), len(leaves), "one certificate in two versions")
        # Killed between a hook's end and the record of it, a run cannot know that it ran.
        hooks = hooks_run(downstream)
        self.assertIn(hooks, (1, 2) if hooks_before else (1,), "hooks ran {} times".format(hooks))


# ---------------------------------------------------------------- single faults

@world.needs("strace")
class Injected(FaultCase):
    """Faults at one named place."""

    def setUp(self):
        self.downstream = world.Downstream().started(self)
        self.first, self.offer = self.installed(self.downstream)
        self.second = self.issue(self.first.key)
        shutil.copy(self.second.fullchain, self.offer)

    def _renew(self, call, what, path, *more):
        """`renew` with a fault at every such call on that path, relative to the config dir."""
        result, log = disturbed(
            self.downstream, ("renew",) + more, "-e", "trace=" + call,
            "-e", "inject={}:{}".format(call, what), "-P",
            os.path.join(self.downstream.config, path))
        self.assertTrue("(INJECTED)" in log or result.status == -signal.SIGKILL, log)
        self.assert_no_traceback(result)
        return result

    def test_junk_at_the_rename(self):
        """A key file overwritten in the instant of change is told, and no hook is forgotten."""
        pointer, key = (self.downstream.live(NAME, name) for name in (".current", "privkey.pem"))
        before, junk = os.readlink(pointer), world.write(os.path.join(self.folder, "junk"), "junk")

        def plant():
            """Put the junk there as soon as the new version is current."""
            world.eventually(lambda: os.readlink(pointer) != before)
            os.rename(junk, key)

        planter = threading.Thread(target=plant)
        planter.start()
        result, log = disturbed(
            self.downstream, ("renew",), "-e", "trace=rename", "-e",
            "inject=rename:delay_exit=3000000", "-P", os.path.join(self.downstream.config, CURRENT))
        planter.join()
        self.assertIn("(DELAYED)", log)
        self.assertEqual(1, result.status, result)
        self.assertIn(key, result.err)
        os.unlink(key)
        self.assertEqual(0, self.downstream.run("renew").status)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(1, hooks_run(self.downstream))

    def test_what_was_rolled_back_stays_out(self):
        """A deploy by force that fails leaves what an administrator decided before."""
        for arguments in (("renew",), ("rollback", NAME)):
            self.assertEqual(0, self.downstream.run(*arguments).status)
        self.assertEqual(1, self._renew("rename", "error=EIO", CURRENT, NAME, "--force").status)
        self.assertEqual(0, self.downstream.run("renew").status)
        self.downstream.assert_fits(self, NAME, self.first)

    def test_errors_in_words(self):
        """Reason storage, the error in words, the path, exit 1, and the old version in service."""
        cases = [
            ("EDQUOT", "mkdir", STAGED), ("EROFS", "mkdir", STAGED), ("EACCES", "mkdir", STAGED),
            ("EPERM", "rename", CURRENT), ("EMFILE", "openat", STAGED + "/privkey.pem"),
            ("ENOSPC", "write", STAGED + "/fullchain.pem"), ("EIO", "fsync", STAGED),
        ]
        for name, call, path in cases:
            with self.subTest(name, call=call):
                result = self._renew(call, "error=" + name, path, "--json")
                lineage = json.loads(result.out)["lineages"][0]
                self.assertEqual((1, "failed", "storage"),
                                 (result.status, lineage["result"], lineage["reason"]))
                words = os.strerror(getattr(errno, name))
                self.assertIn(words.lower(), lineage["detail"].lower())
                self.assertIn(self.downstream.config, lineage["detail"])
                self.assertIn(words.lower(), result.err.lower())
                self.downstream.assert_fits(self, NAME, self.first)
                self.assertEqual(0, hooks_run(self.downstream))
        self._assert_completes()

    def _assert_completes(self):
        result = self.downstream.run("renew")
        self.assertEqual(0, result.status, result)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(1, hooks_run(self.downstream))
        self.assertEqual(0, self.downstream.run("renew").status)
        self.assertEqual(1, hooks_run(self.downstream), "hooks run again")

    def test_killed_between_rename_and_hooks(self):
        """The new set is in service, pending, and the next run runs the hooks, once."""
        self._renew("fsync", "signal=SIGKILL:when=1", "live/" + NAME)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(0, hooks_run(self.downstream))
        status, document = self.downstream.json("status")
        self.assertEqual((1, "warning"), (status, document["lineages"][0]["health"]), document)
        self._assert_completes()

    def test_killed_before_the_rename(self):
        """What is owed is recorded before the rename; without the rename nothing is owed."""
        self._renew("rename", "signal=SIGKILL:when=1", CURRENT)
        self.downstream.assert_fits(self, NAME, self.first)
        shutil.copy(self.first.fullchain, self.offer)  # the upstream takes the new one back
        result = self.downstream.run("renew")
        self.assertEqual(0, result.status, result)
        self.assertIn("interrupted", result.out + result.err)
        self.downstream.assert_fits(self, NAME, self.first)
        self.assertEqual(0, hooks_run(self.downstream))
        shutil.copy(self.second.fullchain, self.offer)
        self._assert_completes()

    def test_state_cannot_be_written(self):
        """It does not stop a deployment, and is said."""
        result = self._renew("openat", "error=ENOSPC", STATE)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(1, hooks_run(self.downstream))
        self.assertIn("no space left", result.err.lower())
        self.assertEqual(0, self.downstream.run("renew").status)
        self.downstream.assert_fits(self, NAME, self.second)

    def test_state_cannot_be_read(self):
        """It is not written anew then: what was rolled back, and the hooks owed, are remembered."""
        self.assertEqual(0, self.downstream.run("renew").status)
        flag = os.path.join(os.path.dirname(self.downstream.config), "flag")
        self.downstream.hook("deploy", "flagged", "test -e " + flag)
        self.assertEqual(1, self.downstream.run("rollback", NAME).status)
        state = self.downstream.state(NAME)
        before = world.read(state)
        for error in ("EIO", "EMFILE", "EACCES"):
            with self.subTest(error):
                result = self._renew("openat", "error=" + error + ":when=1",
                                     "certferry/{}.state".format(NAME), "--json")
                lineage = json.loads(result.out)["lineages"][0]
                self.assertEqual((1, "failed", "storage"),
                                 (result.status, lineage["result"], lineage["reason"]))
                self.assertEqual(before, world.read(state))
        status, document = self.downstream.json("renew")
        self.assertEqual((1, "hook"), (status, document["lineages"][0]["reason"]))
        world.write(flag, "")
        self.downstream.run("renew")
        status, document = self.downstream.json("renew")
        self.assertEqual((0, "rolled-back"), (status, document["lineages"][0]["reason"]))
        self.downstream.assert_fits(self, NAME, self.first)

    def test_rollback(self):
        """Killed at its rename a rollback did not happen, killed after it its hooks follow."""
        self.assertEqual(0, self.downstream.run("renew").status)
        config = self.downstream.config
        for call, path, shown in (("rename", CURRENT, self.second),
                                  ("fsync", "live/" + NAME, self.first)):
            disturbed(self.downstream, ("rollback", NAME), "-e", "trace=" + call, "-e",
                      "inject={}:signal=SIGKILL:when=1".format(call), "-P",
                      os.path.join(config, path))
            self.downstream.assert_fits(self, NAME, shown)
        self.assertEqual(1, hooks_run(self.downstream))
        result = self.downstream.run("renew")
        self.assertEqual(0, result.status, result)
        self.downstream.assert_fits(self, NAME, self.first)
        self.assertEqual(2, hooks_run(self.downstream))


@world.needs("strace")
class Overtaken(FaultCase):
    """An administrator puts a key in place at the very moment of the rename."""

    def test_key_put_there_meanwhile(self):
        """It is not lost: the next run has it staged, and a set in service that fits."""
        for case in ("adoption", "rotation"):
            with self.subTest(case), world.Downstream() as downstream:
                first, offer = self._prepare(downstream, case)
                second, other = self.issue(first.key), self.issue()
                shutil.copy(second.fullchain, offer)
                process, log = start_disturbed(
                    downstream, self.crossing(offer), "-e", "trace=rename", "-e",
                    "inject=rename:signal=SIGSTOP:when=1", *only([os.path.join(
                        downstream.config, CURRENT)]))
                stopped = world.eventually(functools.partial(self._find_stopped, log), 30)
                downstream.key(NAME, other)
                os.kill(stopped, signal.SIGCONT)
                result, _ = finish(process, log)
                self.assert_no_traceback(result)
                self.assertIn(downstream.run(*self.crossing(offer)).status, (0, 1))
                self.assertEqual(0, downstream.run("renew").status)
                downstream.assert_fits(self, NAME, second)
                names = [name for name in os.listdir(downstream.live(NAME))
                         if re.match("privkey-.*[.]pem$", name)]
                self.assertEqual([world.public_key(other.key)], [
                    world.public_key(downstream.live(NAME, name)) for name in names])

    @staticmethod
    def _find_stopped(log):
        found = re.search("^([0-9]+) .*stopped by SIGSTOP", world.read(log).decode(), re.M)
        return found and int(found.group(1))

    def _prepare(self, downstream, case):
        if case == "rotation":
            return self.installed(downstream)
        first = self.issue()
        downstream.key(NAME, first)
        for name, path in zip(MEMBERS, (first.cert, first.chain, first.fullchain)):
            shutil.copy(path, downstream.live(NAME, name))
        return first, os.path.join(os.path.dirname(downstream.config), "offer.pem")


class Descriptors(FaultCase):
    """A process that may open few files."""

    def test_too_few(self):
        """From the first limit at which it starts: old or new, in words, and in the end new."""
        with world.Downstream() as downstream:
            first, offer = self.installed(downstream)
            second = self.issue(first.key)
            shutil.copy(second.fullchain, offer)
            scene = os.path.join(self.folder, "descriptors")
            shutil.copytree(downstream.config, scene, symlinks=True)
            limits = [limit for limit in list(range(4, 20)) + [32, 64, 128, 256]
                      if self._limited(limit, "--version").returncode == 0]
            for limit in world.in_turn(limits[:-1]) + limits[-1:]:
                set_scene(downstream, scene)
                done = self._limited(limit, "renew", "--config-dir", downstream.config)
                error = done.stderr.decode()
                with self.subTest(limit=limit):
                    self.assertNotIn("Traceback", error)
                    if "installed" in done.stdout.decode() or limit == limits[-1]:
                        self.assertEqual(0, done.returncode, done)
                        downstream.assert_fits(self, NAME, second)
                        continue
                    self.assertEqual(1, done.returncode, done)
                    downstream.assert_fits(self, NAME, first)
                    self.assertEqual(0, hooks_run(downstream))
                    self.assertEqual(0, downstream.run("renew").status)
                    downstream.assert_fits(self, NAME, second)

    @staticmethod
    def _limited(limit, *arguments):
        return subprocess.run(
            world.command() + arguments, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))


# ---------------------------------------------------------------- real disks

@needs_root
class Disks(FaultCase):
    """File systems that are full, closed or hold on to a file."""

    def setUp(self):
        self.downstream = world.Downstream().started(self)

    def _command(self, *words):
        """Run a system command, or skip the test where this host does not let root do it."""
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            self.skipTest("{}: {}".format(" ".join(words), done.stdout.decode().strip()))

    def _mount(self, *options):
        self._command("mount", *(options + (self.downstream.config,)))
        self.addCleanup(subprocess.run, ["umount", self.downstream.config])

    def _prepare(self):
        self.first, self.offer = self.installed(self.downstream)
        self.second = self.issue(self.first.key)
        shutil.copy(self.second.fullchain, self.offer)

    def _assert_refused(self, words):
        status, document = self.downstream.json("renew")
        lineage = document["lineages"][0]
        self.assertEqual((1, "storage"), (status, lineage["reason"]), lineage)
        self.assertIn(words, lineage["detail"].lower())
        self.assertIn(self.downstream.config, lineage["detail"])
        self.downstream.assert_fits(self, NAME, self.first)
        self.assertEqual(0, hooks_run(self.downstream))

    def _assert_completes(self):
        result = self.downstream.run("renew")
        self.assertEqual(0, result.status, result)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(1, hooks_run(self.downstream))
        self.assertEqual([], [path for path in paths_of(self.downstream) if path.endswith(LITTER)])

    @world.needs("mount", "umount")
    def test_full(self):
        """64 KiB of disk, and another writer takes all that is left."""
        self._mount("-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs")
        self._prepare()
        filler = os.path.join(self.downstream.config, "filler")
        with open(filler, "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        self._assert_refused("no space left")
        before = paths_of(self.downstream)
        self._assert_refused("no space left")
        self.assertEqual(before, paths_of(self.downstream))
        os.unlink(filler)
        self._assert_completes()

    @world.needs("mount", "umount")
    def test_small(self):
        """64 KiB are enough for so many rotations: what is pruned makes room."""
        self._mount("-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs")
        self._prepare()
        for _ in range(6):
            result = self.downstream.run("renew")
            seen = world.certificates(self.downstream.live(NAME, "cert.pem"))
            self.assert_no_traceback(result)
            self.downstream.assert_fits(self, NAME)
            if result.status:
                self.assertIn("no space left", result.err.lower())
                self.assertNotEqual(world.certificates(self.second.cert), seen)
            self.second = self.issue(self.first.key)
            shutil.copy(self.second.fullchain, self.offer)

    @world.needs("mount", "umount")
    def test_out_of_inodes(self):
        """Room for bytes, but not for one more file."""
        self._mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=30,mode=755", "tmpfs")
        self._prepare()
        fillers = []
        with contextlib.suppress(OSError):
            for number in range(40):
                fillers.append(os.path.join(self.downstream.config, "filler-%d" % number))
                world.write(fillers[-1], b"")
        self._assert_refused("no space left")
        for filler in fillers[:-1]:
            os.unlink(filler)
        self._assert_completes()

    @world.needs("mount", "umount")
    def test_read_only(self):
        """A tree that is mounted read-only for a while."""
        self._prepare()
        self._mount("--bind", self.downstream.config)
        self._command("mount", "-o", "remount,ro,bind", self.downstream.config)
        self._assert_refused("read-only file system")
        self._command("mount", "-o", "remount,rw,bind", self.downstream.config)
        self._assert_completes()

    @world.needs("chattr")
    def test_immutable(self):
        """`chattr +i` on a folder or on the link that would be replaced."""
        for path in ("live/" + NAME, "archive"):
            self._prepare()
            path = os.path.join(self.downstream.config, path)
            self._command("chattr", "+i", path)
            try:
                with self.subTest(path):
                    self._assert_refused("operation not permitted")
            finally:
                subprocess.run(["chattr", "-i", path])
            self._assert_completes()
            shutil.rmtree(self.downstream.config)
            os.mkdir(self.downstream.config, 0o755)
            os.unlink(os.path.dirname(self.downstream.config) + "/hooks.log")

    @world.needs("chattr")
    def test_immutable_state(self):
        """A state file that nothing can replace: deployed all the same, and said."""
        self._prepare()
        self._command("chattr", "+i", self.downstream.state(NAME))
        try:
            result = self.downstream.run("renew")
        finally:
            subprocess.run(["chattr", "-i", self.downstream.state(NAME)])
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertIn("operation not permitted", result.err.lower())
        self.assertEqual(1, hooks_run(self.downstream))


# ---------------------------------------------------------------- readers

class Reader(threading.Thread):
    """Opens sets through live/ all the time and counts what does not belong together.

    A reader that opens two files takes them from two versions where the one rename falls between
    its opens: such a pair is left out, and only such a one, by reading .current before and after.
    """

    def __init__(self, lives):
        super().__init__(daemon=True)
        self._lives = lives
        self._done = threading.Event()
        self.reads, self.bad = collections.Counter(), collections.Counter()
        self.good = {}  # private key as bytes by certificate

    def stop(self):
        """Stop reading; the counts stand."""
        self._done.set()
        self.join()

    def run(self):
        """Read until told to stop."""
        while not self._done.wait(world.BREATH):
            for live in self._lives:
                self._read(live)

    def _read(self, live):
        try:
            before = os.readlink(live + "/.current")
            files = [world.read(live + "/" + name) for name in MEMBERS]
            after = os.readlink(live + "/.current")
        except FileNotFoundError:
            self.bad["missing"] += 1
            return
        self.reads[live] += 1
        whole = all(data.endswith(b"-----\n") for data in files)
        self.bad["torn"] += not whole
        if before == after:
            fits = files[2] == files[0] + files[1] and self.good.get(files[0]) == files[3]
            self.bad["mixed"] += not fits


class Readers(FaultCase):
    """What readers see while sets are replaced again and again."""

    def test_rotations(self):
        """A new certificate and another key each time: nothing mixed, torn or missing.

        A run replaces one set after the other: it starts once for six of them.
        """
        runs = 3 if world.QUICK else 50
        names = ["n{}.{}".format(number, NAME) for number in range(6)]
        offer = os.path.join(self.folder, "reader.pem")
        keys = [self.issue().key for _ in range(2)]
        with world.Downstream() as downstream:
            reader = Reader([downstream.live(name) for name in names])
            for turn in range(runs + 1):
                new = self.issue(keys[turn % 2])
                key = world.read(new.key)
                reader.good[world.read(new.cert)] = key
                # A source may bring the key along: both change in the same rename.
                world.write(offer, world.read(new.fullchain) + key, 0o600)
                if turn:
                    result = downstream.run("renew", "--force", *names)
                    self.assertEqual((0, len(names)),
                                     (result.status, result.out.count(": installed: ")), result)
                    continue
                for name in names:
                    downstream.key(name, new)
                    result = downstream.run(name, "--from", "file:" + offer, "--ca-file",
                                            self.authority.root)
                    self.assertEqual(0, result.status, result)
                reader.start()
            reader.stop()
        for live in reader.reads:
            self.assertGreater(reader.reads[live], runs)
        self.assertEqual(len(names), len(reader.reads))
        self.assertEqual({"mixed": 0, "torn": 0, "missing": 0},
                         {kind: reader.bad[kind] for kind in ("mixed", "torn", "missing")})


if __name__ == "__main__":
    unittest.main()
