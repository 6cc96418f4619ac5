"""The set in service through every storage fault: kills, errors, full and closed disks, a reader.

The sweep starts from everything that live/NAME/ may be made of, and disturbs a command there at
each of its storage calls: it looks at live/ after the call, kills the command at it, or lets the
call fail. A reader looks all the time. Then one plain run has to end whole. Each run takes a
sample, another one under each Python release; CERTFERRY_FULL=1 tries all and prints how many.
"""

import collections
import contextlib
import errno
import functools
import itertools
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
from concurrent import futures

from tests import world
from tests.test_versions import CERTIFICATES, KEY, LITTER, MEMBERS, NAME, Laid, contents, made

FULL = bool(os.environ.get("CERTFERRY_FULL"))
SCENE_STRIDE = 1 if FULL else 25 if world.MORE else 42  # every so many scenes are tried
POINTS = 1000 if FULL else 2 if world.MORE else 1  # of each kind in one scene, at most
TELLING = ("copies of fullchain, staged key",)  # what the first edition did not survive
TURN = sys.version_info[1]  # which ones: other ones under each release
WORKERS = os.cpu_count() or 1

# A question mark: strace passes over what this architecture does not have.
CALLS = """
    open openat creat write pwrite64 writev sendfile copy_file_range rename renameat renameat2
    symlink symlinkat link linkat fsync fdatasync mkdir mkdirat chmod fchmod fchmodat chown fchown
    lchown fchownat unlink unlinkat rmdir utimensat setxattr lsetxattr fsetxattr removexattr
    fremovexattr ftruncate""".split()
ERRORS = ("EIO", "ENOSPC")

needs_root = unittest.skipIf(os.geteuid(), "needs root")

Call = collections.namedtuple("Call", "name number changes")
Call.__doc__ = "The number-th such call of a command; whether it may change what is on the disk."


# ---------------------------------------------------------------- looking


@functools.lru_cache(maxsize=None)
def public_half(pem):
    """The public key of a certificate or private key as openssl prints it; None for junk."""
    words = ("x509", "-noout", "-pubkey") if b"CERTIFICATE" in pem else ("pkey", "-pubout")
    try:
        return world.openssl(*words, input=pem)
    except AssertionError:
        return None


def fits(leaf, key):
    """Whether a certificate and a private key (PEM bytes) belong together."""
    return public_half(leaf) is not None and public_half(leaf) == public_half(key)


def leaf_of(pem):
    """The first certificate in PEM bytes, as PEM bytes; None for None."""
    end = b"-----END CERTIFICATE-----\n"
    return pem and pem[: pem.find(end) + len(end)]


def is_whole(shown):
    """Whether four files, as Laid.shown() returns them, are one complete set."""
    if None in shown.values():
        return False
    joined = shown["cert.pem"] + shown["chain.pem"]
    return shown["fullchain.pem"] == joined and fits(shown["cert.pem"], shown[KEY])


class Reader:
    """Looks at live/NAME/ and keeps what nobody may see there, in `.bad`.

    From the first fitting pair on there is one at every instant. Where all four files are a set at
    the start they are one at every instant, too; exact() looks at that, while nothing moves.
    """

    def __init__(self, host):
        self.host = host
        self.bad = []
        self.looks = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._was_whole = is_whole(host.shown())
        self._had_pair = False
        self._look()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def exact(self, where):
        """Look once, when the command stands still; `where` says where."""
        self._look(where)
        if self._was_whole and not is_whole(self.host.shown()):
            self.bad.append("no whole set " + where)

    def _poll(self):
        while not self._end.wait(world.BREATH):
            self._look()

    def _read(self, name):
        try:
            return world.read(self.host.live(NAME, name))
        except OSError:
            return None

    def _look(self, where="for a reader"):
        before, key, after = (
            self._read("fullchain.pem"),
            self._read(KEY),
            self._read("fullchain.pem"),
        )
        if before != after:
            return  # the one rename fell between the two: whoever reads both reads again
        self.looks += 1
        pair = after is not None and key is not None and fits(leaf_of(after), key)
        if self._had_pair and not pair:
            self.bad.append("no fitting pair " + where)
        self._had_pair = self._had_pair or pair


# ---------------------------------------------------------------- disturbing


def start_disturbed(host, arguments, *options):
    """Start the command under strace with these options; returns (Popen, path of strace's log)."""
    log = os.path.join(host.outside, "strace.log")
    if not os.path.exists(log):
        world.write(log, "")
    # The filter in the kernel makes it three times as fast, but loses signals.
    quick = () if any("signal=" in option for option in options) else ("--seccomp-bpf",)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("CERTFERRY_")
    }
    words = ("strace", "-f", "-y", "-s", "9999", "--quiet=attach,path-resolution", "-o", log)
    words += quick + options
    words += world.command() + tuple(arguments) + ("--config-dir", host.config)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, **pipes), log


def finish(process):
    """Wait for what start_disturbed() started; returns a Result.

    A command that is killed takes strace with it: the status then says which signal it was.
    """
    out, err = process.communicate(timeout=120)
    return world.Result(process.returncode, out.decode(), err.decode())


def disturbed(host, arguments, *options):
    """Run the command under strace with these options; returns (Result, strace's log)."""
    process, log = start_disturbed(host, arguments, *options)
    return finish(process), world.read(log).decode("utf-8", "replace")


def calls(names=CALLS):
    """strace's words for these calls."""
    return ",".join("?" + name for name in names)


def inject(what, *names):
    """strace's options that let these calls meet a fault."""
    words = calls(names)
    return ("-e", "trace=" + words, "-e", "inject={}:{}".format(words, what))


def only(paths):
    """strace's options for these paths."""
    return tuple(word for path in paths for word in ("-P", path))


def storage_calls(host, arguments):
    """Run undisturbed; returns (Result, the paths in the config dir that it names, [Call]).

    A process of its own has numbers of its own: those of the one that calls most are taken.
    """
    result, log = disturbed(host, arguments, "-e", "trace=" + calls())
    pattern = re.compile(r'[<"](' + re.escape(host.config) + r'(?:/[^">]*)?)[">]')
    paths, found = set(), collections.defaultdict(list)
    for line in log.splitlines():
        call = line.rpartition(" = ")[0]  # -P does not look at the result either
        match = re.match(r"([0-9]+) +([a-z0-9_]+)\((.*)", call)
        named = [path for path in pattern.findall(call) if "/../" not in path]  # which is HOOK's
        if match and named:
            paths.update(named)
            process, name, words = match.groups()
            numbers = found[process, name]
            reads = name in ("open", "openat") and not re.search("O_(CREAT|WRONLY|RDWR)", words)
            numbers.append(Call(name, len(numbers) + 1, not reads))
    most = {}
    for (_, name), numbers in found.items():
        if len(numbers) > len(most.get(name, ())):
            most[name] = numbers
    return result, sorted(paths), list(itertools.chain.from_iterable(most.values()))


def step_through(host, arguments, paths, look):
    """Run the command with look() called after each storage call, while it stands still."""
    fifo = os.path.join(host.outside, "strace.log")
    Laid.unlink(fifo)
    os.mkfifo(fifo)
    process, _ = start_disturbed(host, arguments, *inject("signal=SIGSTOP", *CALLS) + only(paths))
    call = ""
    with open(fifo, errors="replace") as log:
        for line in log:
            if "stopped by SIGSTOP" in line:
                look("after " + call)
                os.kill(int(line.split()[0]), signal.SIGCONT)
            elif "(" in line:
                call = line.strip()[:200]
    os.unlink(fifo)
    return finish(process)


def set_scene(host, folder):
    """Make the config dir a fresh copy of that folder, at the same path as ever."""
    shutil.rmtree(host.config, ignore_errors=True)
    shutil.copytree(folder, host.config, symlinks=True)
    host.unlink(os.path.join(host.outside, "hooks.log"))


# ---------------------------------------------------------------- scenes

Scene = collections.namedtuple("Scene", "name lay offer arguments ends hooks staged again obstacle")
Scene.__doc__ = """A command and where it starts.

lay        function that lays the files of a Laid
offer      "renewed", "rekeyed" or another credential of made(), "rekeyed+key" with its key
arguments  of the command that is disturbed
ends       the credential that is shown at the end; a rollback may also not have happened
hooks      whether deploy hooks are to run
staged     the credentials whose keys are staged at the end
again      arguments of the plain run
obstacle   what keeps a live name from being replaced, until the plain run
"""


def renewals():
    """{change: (offer, the key that is staged or None)}."""
    return {
        "renewal": ("renewed", None),
        "staged key": ("rekeyed", "rekeyed"),
        "key of the source": ("rekeyed+key", None),
    }


def lay_beside(shown, names):
    """Lay two versions, and beside .current plain files of what is shown."""

    def lay(host):
        host.lay_versions(made().old, made().current)
        host.lay(getattr(made(), shown), *names)

    return lay


def starts():
    """{name: function that lays it}: all show made().current, four whole files that fit."""
    found = collections.OrderedDict()
    found["links"] = lambda host: host.lay_versions(made().old, made().current)
    found["plain files"] = lambda host: host.lay(made().current)
    found["certbot's links"] = lambda host: host.lay_certbots(made().current)
    found["links followed"] = lambda host: host.lay_followed(made().old, made().current)
    for size in range(1, 5):
        for names in itertools.combinations(MEMBERS, size):
            short = " ".join(name[: -len(".pem")] for name in names)
            found["copies of " + short] = lay_beside("current", names)
    return found


def scene(name, lay, offer, arguments=("renew",), **more):
    """A Scene, with what most of them have."""
    fields = dict(ends=offer.split("+")[0], hooks=True, staged=(), again=arguments, obstacle=None)
    fields.update(more)
    return Scene(name, lay, offer, arguments, **fields)


def scenes():
    """All scenes, the most telling ones spread among the others."""
    found = []
    for start, lay in starts().items():
        for change, (offer, staged) in renewals().items():
            found.append(scene(start + ", " + change, with_staged(lay, staged), offer))
        if start != "links":
            found.append(scene(start + ", settling", lay, "current", (NAME,), hooks=False))
    return found + by_hand() + first_crossings() + rollbacks() + making_whole() + obstacles()


def with_staged(lay, *names):
    """Lay that, and stage the keys of these credentials."""

    def both(host):
        lay(host)
        for name in filter(None, names):
            host.key(NAME, getattr(made(), name), "privkey-{}.pem".format(name))

    return both


def by_hand():
    """Plain files beside .current that are another set, which fits."""
    pair, older = lay_beside("other", MEMBERS), lay_beside("old", CERTIFICATES)
    return [
        scene("a pair by hand, renewal", pair, "other_latest"),
        scene("a pair by hand, staged key", with_staged(pair, "rekeyed"), "rekeyed"),
        scene("a pair by hand, settling", pair, "other", (NAME,), hooks=False),
        scene("older ones by hand, renewal", older, "renewed"),
        scene("older ones by hand, key of the source", older, "rekeyed+key"),
        scene("older ones by hand, settling", older, "old", (NAME,), hooks=False),
    ]


def first_crossings():
    """Nothing is shown, and a key comes from somewhere."""

    def nothing(_):
        pass

    def lay_key(name):
        return lambda host: host.lay(getattr(made(), name), KEY)

    key = ("--key", made().current.key)
    return [
        scene("first, --key", nothing, "current", (NAME,) + key),
        scene("first, privkey.pem", lay_key("current"), "current", (NAME,)),
        scene("first, privkey.pem, renew", lay_key("current"), "current"),
        scene("first, staged", with_staged(nothing, "current"), "current", (NAME,)),
        scene("first, key of the source", nothing, "rekeyed+key", (NAME,)),
        scene(
            "first, over another key", lay_key("other"), "rekeyed+key", (NAME,), staged=("other",)
        ),
    ]


def rollbacks():
    """From version 3 to version 2, which has another key in some of them."""

    def versions(*names):
        return lambda host: host.lay_versions(*(getattr(made(), name) for name in names))

    def with_copies(*names):
        def lay(host):
            versions("old", "other", "current")(host)
            host.lay(made().current, *names)

        return lay

    command = ("rollback", NAME)
    table = [
        ("rollback", versions("expired", "old", "current"), "old"),
        ("rollback of a key", versions("old", "other", "current"), "other"),
        ("rollback beside a copy", with_copies("fullchain.pem"), "other"),
        ("rollback beside a key", with_copies(KEY), "other"),
        ("rollback beside copies", with_copies(*MEMBERS), "other"),
    ]
    return [
        scene(name, lay, "current", command, ends=target, again=("renew",))
        for name, lay, target in table
    ]


def making_whole():
    """What is shown is not whole, and is made whole from what is here, or by the offer."""

    def spoilt(name, content, *versions):
        def lay(host):
            host.lay_versions(*(getattr(made(), version) for version in versions))
            host.spoil(name, content)

        return lay

    def without(name, content=None):
        def lay(host):
            host.lay(made().current)
            os.unlink(host.live(NAME, name))
            if content is not None:
                world.write(host.live(NAME, name), content, 0o600)

        return lay

    wrong = world.read(made().other.key)
    junk = b"junk\n"
    unfit = lay_beside("other", (KEY,))
    through = spoilt(KEY, wrong, "old", "current")
    lonely = spoilt(KEY, wrong, "current")
    plain = without(KEY, wrong)
    truncated = without(KEY, wrong[:90])
    damaged = spoilt("cert.pem", junk, "current")
    other = {"staged": ("other",)}
    return [
        scene("unfit key by hand", unfit, "current", **other),
        scene("unfit key by hand, renewal", unfit, "renewed", **other),
        scene("unfit key through the link", through, "current", **other),
        scene("unfit key, one staged", with_staged(lonely, "current"), "current", **other),
        scene("unfit key, its offer", lonely, "other_latest"),
        scene("plain unfit key, its offer", plain, "other_latest"),
        scene("plain unfit key, one staged", with_staged(plain, "current"), "current", **other),
        scene("truncated key, one staged", with_staged(truncated, "current"), "current"),
        scene("no key, one staged", with_staged(without(KEY), "current"), "current"),
        scene("no key, one with the offer", without(KEY), "rekeyed+key"),
        scene("no fullchain.pem", without("fullchain.pem"), "current"),
        scene("no fullchain.pem, renewal", without("fullchain.pem"), "renewed"),
        scene("damaged cert.pem", spoilt("cert.pem", junk, "old", "current"), "current"),
        scene("damaged cert.pem, staged key", with_staged(damaged, "rekeyed"), "rekeyed"),
        scene("damaged fullchain.pem", spoilt("fullchain.pem", b"", "old", "current"), "current"),
        scene("another leaf in cert.pem", lay_beside("other", ("cert.pem",)), "current"),
    ]


@contextlib.contextmanager
def immutable(path):
    """`chattr +i` for a file."""
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextlib.contextmanager
def mounted(path):
    """A copy of the file is mounted over it, as containers do."""
    copy = os.path.join(world.scratch(), "copy")
    shutil.copy2(path, copy)
    subprocess.run(["mount", "--bind", copy, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def obstacles():
    """Live names that cannot be replaced: the run fails, and what was shown is shown."""
    found = []
    for title, names in (("fullchain.pem", ("fullchain.pem",)), (KEY, (KEY,)), ("all", MEMBERS)):
        lay = lay_beside("current", names)
        held = "fullchain.pem" if title == "all" else title
        for how in (immutable, mounted):
            obstacle = functools.partial(obstructed, how, held)
            for change, (offer, staged) in renewals().items():
                name = "{} {}, {}".format(how.__name__, title, change)
                found.append(scene(name, with_staged(lay, staged), offer, obstacle=obstacle))
    return found


def obstructed(how, held, host):
    """The context in which a live name cannot be replaced."""
    return how(host.live(NAME, held))


# ---------------------------------------------------------------- the sweep


class Stage(Laid):
    """A downstream on which one scene after the other is set."""

    def start_scene(self, scene):
        """Lay the files of a scene, with its conf, and keep a copy in .kept.

        .was_whole says whether they show a whole set.
        """
        shutil.rmtree(self.config, ignore_errors=True)
        os.mkdir(self.config, 0o755)
        self.scene = scene
        scene.lay(self)
        self.was_whole = is_whole(self.shown())
        self.lay_conf()
        name, _, with_key = scene.offer.partition("+")
        credential = getattr(made(), name)
        self.offers(credential, credential.key if with_key else None)
        self.kept = os.path.join(self.outside, "start")
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.config, self.kept, symlinks=True)

    @contextlib.contextmanager
    def set(self, folder=None, obstacle=True):
        """Set the scene (or that folder), with its obstacle unless told otherwise."""
        set_scene(self, folder or self.kept)
        hindered = self.scene.obstacle if obstacle else None
        with hindered(self) if hindered else contextlib.ExitStack():
            yield


class Sweeper:
    """Tries the points of a scene on a stage; .wrong has what did not survive."""

    def __init__(self, stage):
        self.stage = stage
        self.tried = collections.Counter()
        self.wrong = []

    def sweep(self, scene):
        """Look after each call, let the plain run follow kills there, kill, let calls fail."""
        self.stage.start_scene(scene)
        with self.stage.set():
            result, paths, found = storage_calls(self.stage, scene.arguments)
            self._note("undisturbed", self._why_not_done(result))
        if not found:
            return  # strace did not start
        self._step(paths)
        for call in sample([call for call in found if call.changes], 10):
            self._kill(call, paths)
        if scene.obstacle:
            return
        for index, call in enumerate(sample(found, 3)):
            self._fail(call, ERRORS[index % 2], paths)

    def _note(self, point, wrong):
        self.tried[point.split()[0]] += 1
        if wrong:
            self.wrong.append("{}: {}: {}".format(self.stage.scene.name, point, wrong))

    def _why_not_done(self, result):
        """What is wrong with the run that met no fault, "" for nothing."""
        if self.stage.scene.obstacle:
            shown = self.stage.shown() == contents(made().current)
            if result.status == 1 and shown and not self.stage.hooks_run():
                return ""
            return "with an obstacle: {}, {}".format(result, "shown" if shown else "not shown")
        return self._why_not_whole(result)

    def _why_not_whole(self, result, disturbed_before=False):
        """What is wrong after a run that met no fault, "" for nothing."""
        stage, scene = self.stage, self.stage.scene
        shown, ends, hooks = stage.shown(), getattr(made(), scene.ends), scene.hooks
        turned_back = scene.arguments[0] == "rollback" and shown != contents(ends)
        if turned_back:  # it was killed before its rename
            ends, hooks = made().current, False
        # What shows a whole set is left as it is by `renew`: the next deploy settles it.
        loose = turned_back or (disturbed_before and not stage.was_whole)
        ran, most = len(stage.hooks_run()), 2 if disturbed_before else 1
        staged = sorted(world.public_key(getattr(made(), name).key) for name in scene.staged)
        checks = [
            ("status", result.status == 0),
            ("shown", shown == contents(ends)),
            ("links", stage.linked() or (loose and scene.again == ("renew",))),
            ("hooks", (1 <= ran <= most) if hooks else ran == 0),
            ("staged", stage.staged() == staged),
            ("litter", not any(LITTER in path for path in stage.snapshot())),
            ("marks", not self._marks()),
            ("versions", not self._broken_versions()),
            ("live", not self._strangers()),
        ]
        wrong = [what for what, good in checks if not good]
        if not wrong:
            return ""
        return "{} after {}, hooks ran {} times".format(", ".join(wrong), result, ran)

    def _marks(self):
        """What the version in service still owes or is marked with."""
        number = self.stage.current()
        if number is None:
            return []
        names = os.listdir(self.stage.archive(NAME, number))
        return [name for name in names if name not in MEMBERS]

    def _broken_versions(self):
        """New versions of which a file is missing, or that do not belong together."""
        old = os.path.join(self.stage.kept, "archive")
        before = os.listdir(old) if os.path.isdir(old) else []
        broken = []
        for number in self.stage.versions():
            if "{}@{}".format(NAME, number) not in before:
                paths = {name: self.stage.archive(NAME, number, name) for name in MEMBERS}
                there = all(os.path.exists(path) for path in paths.values())
                if not there or not is_whole({name: world.read(paths[name]) for name in paths}):
                    broken.append(number)
        return broken

    def _strangers(self):
        """Names in live/NAME/ that nobody put there."""
        known = MEMBERS + (".current", ".current.folder", KEY + ".damaged")
        names = os.listdir(self.stage.live(NAME))
        return [name for name in names if name not in known and not name.startswith("privkey-")]

    def _step(self, paths):
        """Look after each call, and keep what a kill there would leave: a plain run follows."""
        stage, folders, last = self.stage, [], []

        def look(where):
            reader.exact(where)
            self.tried["look"] += 1
            now = {path: entry._replace(mtime_ns=0) for path, entry in stage.snapshot().items()}
            if last[-1:] != [now]:
                last.append(now)
                folders.append((where, os.path.join(stage.outside, "kill-%d" % len(folders))))
                shutil.copytree(stage.config, folders[-1][1], symlinks=True)
                log = os.path.join(stage.outside, "hooks.log")
                if os.path.exists(log):
                    shutil.copy(log, folders[-1][1] + ".hooks")

        with stage.set():
            reader = Reader(stage)
            result = step_through(stage, stage.scene.arguments, paths, look)
            self._note("stepped", "; ".join(reader.bad[:3]) or self._why_not_done(result))
        chosen = sample(folders)
        for where, folder in folders:
            if (where, folder) in chosen:
                with stage.set(folder, obstacle=False):
                    if os.path.exists(folder + ".hooks"):
                        shutil.copy(folder + ".hooks", os.path.join(stage.outside, "hooks.log"))
                    self._go_on("stopped " + where)
            shutil.rmtree(folder)
            Laid.unlink(folder + ".hooks")

    def _go_on(self, point, wrong=()):
        """The plain run after what went before, with a reader; `wrong` is what was seen so far."""
        with Reader(self.stage) as reader:
            result = self.stage.run(*self.stage.scene.again)
        wrong = list(wrong) + reader.bad + [self._why_not_whole(result, disturbed_before=True)]
        self._note(point, "; ".join(list(filter(None, wrong))[:3]))

    def _kill(self, call, paths):
        """SIGKILL at a call, then the plain run."""
        stage, point = self.stage, "killed at {0.name} {0.number}".format(call)
        with contextlib.ExitStack() as stack:
            stack.enter_context(stage.set())
            fault = inject("signal=SIGKILL:when={}".format(call.number), call.name)
            with Reader(stage) as reader:
                result, _ = disturbed(stage, stage.scene.arguments, *fault + only(paths))
            if result.status != -signal.SIGKILL:
                reader.bad.append("no such call: {}".format(result))
            if stage.scene.obstacle:
                folder = os.path.join(stage.outside, "killed")
                shutil.copytree(stage.config, folder, symlinks=True)
                stack.close()
                stack.enter_context(stage.set(folder, obstacle=False))
                shutil.rmtree(folder)
            self._go_on(point, reader.bad)

    def _fail(self, call, error, paths):
        """An error of a call, then the plain run."""
        stage, point = self.stage, "failed at {0.name} {0.number} with {1}".format(call, error)
        with stage.set():
            fault = inject("error={}:when={}".format(error, call.number), call.name)
            with Reader(stage) as reader:
                result, log = disturbed(stage, stage.scene.arguments, *fault + only(paths))
            words = os.strerror(getattr(errno, error)).lower()
            wrong = reader.bad
            if "(INJECTED)" not in log:
                wrong.append("no such call")
            if "Traceback" in result.err or result.status not in (0, 1):
                wrong.append(str(result))
            if result.status and words not in result.err.lower():
                wrong.append("not told: {}".format(result))
            self._go_on(point, wrong)


def sample(points, stride=1):
    """At most POINTS of the points, spread evenly, other ones under each Python release."""
    stride = max(stride, -(-len(points) // POINTS))
    return points[TURN % stride :: stride]


@world.needs("strace")
class Sweep(unittest.TestCase):
    """Every start, every change, every storage call."""

    longMessage = False

    def test_points(self):
        """At every instant a fitting pair, and a plain run ends whole."""
        waiting = queue.Queue()
        chosen = [one for one in scenes() if not one.obstacle or can_obstruct()]
        for index, one in enumerate(chosen):
            if index % SCENE_STRIDE == TURN % SCENE_STRIDE or one.name in TELLING:
                waiting.put(one)
        count = waiting.qsize()
        with futures.ThreadPoolExecutor(WORKERS) as pool:
            done = list(pool.map(self.sweep_all, [waiting] * WORKERS))
        tried = sum((each.tried for each in done), collections.Counter())
        wrong = [each for one in done for each in one.wrong]
        told = ", ".join("{} {}".format(number, what) for what, number in sorted(tried.items()))
        total = "{} points in {} scenes ({}), {} not survived".format(
            sum(tried.values()), count, told, len(wrong)
        )
        if FULL:
            print("\nfault sweep: " + total, file=sys.stderr)
        self.assertFalse(wrong, "{}:\n{}".format(total, "\n".join(wrong[:60])))

    @staticmethod
    def sweep_all(waiting):
        """Try one scene after the other; returns the Sweeper."""
        with Stage() as stage:
            sweeper = Sweeper(stage)
            while True:
                try:
                    scene = waiting.get_nowait()
                except queue.Empty:
                    return sweeper
                sweeper.sweep(scene)


@functools.lru_cache(maxsize=None)
def can_obstruct():
    """Whether this host lets us make a file immutable and mount over it."""
    path = world.write(os.path.join(world.scratch(), "file"), "")
    try:
        for how in (immutable, mounted):
            with how(path):
                pass
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


# ---------------------------------------------------------------- single faults


class FaultCase(unittest.TestCase):
    """A lineage of two versions, whose source has the next one."""

    def setUp(self):
        self.host = Laid().started(self)
        self.prepare()

    def start_over(self):
        """Lay it in a new config dir."""
        shutil.rmtree(self.host.config)
        os.mkdir(self.host.config, 0o755)
        self.prepare()

    def prepare(self):
        """Lay it, in an empty config dir."""
        self.host.lay_versions(made().old, made().current)
        self.host.lay_conf()
        self.host.offers(made().renewed)
        self.host.unlink(os.path.join(self.host.outside, "hooks.log"))

    def assert_shows(self, credential):
        """Four links that show this credential."""
        self.assertEqual(contents(credential), self.host.shown())
        self.assertTrue(self.host.linked())

    def assert_refused(self, words, *arguments, **how):
        """`renew` ends as `storage` with these words, and nothing has happened."""
        result, lineage = self.host.tell("renew", *arguments, **how)
        self.assert_storage(result, lineage, words)

    def assert_storage(self, result, lineage, words):
        """That was `storage`, told with the path, and what was shown is shown."""
        told = (result.status, lineage["result"], lineage["reason"])
        self.assertEqual((1, "failed", "storage"), told, lineage)
        self.assertIn(words, lineage["detail"].lower())
        self.assertRegex(lineage["detail"], "config dir|" + re.escape(self.host.config))
        self.assert_shows(made().current)
        self.assertEqual([], self.host.hooks_run())

    def assert_completes(self):
        """A plain run installs it, and the next one has nothing to do."""
        for word in (": installed", ": unchanged"):
            result = self.host.run("renew")
            self.assertEqual(0, result.status, result)
            self.assertIn(word, result.out)
        self.assert_shows(made().renewed)
        self.assertEqual(["ran"], self.host.hooks_run())
        self.assertEqual([], [path for path in self.host.snapshot() if LITTER in path])


@world.needs("strace")
class Injected(FaultCase):
    """Faults at one named place."""

    def fault(self, what, call, *paths, arguments=("renew",)):
        """A command with a fault at every such call on these paths of the config dir."""
        full = [os.path.join(self.host.config, path) for path in paths]
        result, log = disturbed(self.host, arguments, *inject(what, call) + only(full))
        self.assertTrue("(INJECTED)" in log or result.status == -signal.SIGKILL, log)
        self.assertNotIn("Traceback", result.out + result.err)
        return result

    def test_errors_in_words(self):
        """Reason storage, the error in words, the path, exit 1, and the old version in service."""
        half = "archive/.{}@3{}".format(NAME, LITTER)
        pointer = "live/{}/.current{}".format(NAME, LITTER)
        for name, call, path in (
            ("EDQUOT", "mkdir", half),
            ("EROFS", "mkdir", half),
            ("EPERM", "rename", pointer),
            ("EMFILE", "openat", half + "/privkey.pem"),
            ("ENOSPC", "write", half + "/fullchain.pem"),
            ("EIO", "fsync", half),
        ):
            with self.subTest(name, call=call):
                self.start_over()
                result = self.fault("error=" + name, call, path, arguments=("renew", "--json"))
                lineage = json.loads(result.out)["lineages"][0]
                words = os.strerror(getattr(errno, name)).lower()
                self.assert_storage(result, lineage, words)
                self.assertIn(words, result.err.lower())
        self.assert_completes()

    def test_killed_between_rename_and_hooks(self):
        """The new set is in service, pending, and the next run runs the hooks, once."""
        self.fault("signal=SIGKILL:when=1", "fsync", "live/" + NAME)
        self.assert_shows(made().renewed)
        self.assertEqual([], self.host.hooks_run())
        status, document = self.host.json("status")
        self.assertEqual((1, "warning"), (status, document["lineages"][0]["health"]), document)
        for ran in (["ran"], ["ran"]):
            self.assertEqual(0, self.host.run("renew").status)
            self.assertEqual(ran, self.host.hooks_run())

    def test_killed_before_the_rename(self):
        """Without the rename nothing is owed, and nothing is left."""
        pointer = "live/{}/.current{}".format(NAME, LITTER)
        self.fault("signal=SIGKILL:when=1", "rename", pointer)
        self.assert_shows(made().current)
        self.host.offers(made().current)  # the upstream takes the new one back
        result = self.host.run("renew")
        self.assertEqual((0, []), (result.status, self.host.hooks_run()), result)
        self.assert_shows(made().current)
        self.host.offers(made().renewed)
        self.assert_completes()

    def test_state(self):
        """One that cannot be read or written stops no deployment, and is said."""
        state, hidden = "certferry/{}.state", "certferry/.{}.state" + LITTER
        self.assertEqual(0, self.host.run("renew").status)
        for what, path in (("EIO", state), ("EACCES", state), ("ENOSPC", hidden)):
            with self.subTest(what, path=path):
                self.start_over()
                self.host.offers(made().current)
                self.assertEqual(0, self.host.run("renew").status)
                self.host.offers(made().renewed)
                result = self.fault("error=" + what, "openat", path.format(NAME))
                self.assertIn(os.strerror(getattr(errno, what)).lower(), result.err.lower())
                self.assertEqual(0, self.host.run("renew").status)
                self.assert_shows(made().renewed)
                self.assertEqual(["ran"], self.host.hooks_run())

    def test_key_put_there_meanwhile(self):
        """A key that an administrator puts in place at the very rename is not lost."""
        pointer = self.host.live(NAME, ".current" + LITTER)
        process, log = start_disturbed(
            self.host, ("renew",), *inject("signal=SIGSTOP:when=1", "rename") + only([pointer])
        )
        stopped = world.eventually(functools.partial(self.find_stopped, log), 30)
        self.host.key(NAME, made().other)
        os.kill(stopped, signal.SIGCONT)
        self.assertNotIn("Traceback", finish(process).err)
        for _ in range(2):
            self.assertEqual(0, self.host.run("renew").status)
        self.assert_shows(made().renewed)
        self.assertEqual([world.public_key(made().other.key)], self.host.staged())

    @staticmethod
    def find_stopped(log):
        """The process that strace says is stopped, or None."""
        found = re.search("^([0-9]+) .*stopped by SIGSTOP", world.read(log).decode(), re.M)
        return found and int(found.group(1))


class Descriptors(FaultCase):
    """A process that may open few files."""

    def test_too_few(self):
        """From the first limit at which it starts: old or new, in words, and in the end new."""
        limits = [limit for limit in list(range(4, 20)) + [32, 256] if self.starts_with(limit)]
        kept = os.path.join(self.host.outside, "kept")
        shutil.copytree(self.host.config, kept, symlinks=True)
        for limit in world.in_turn(limits[:-1])[::2] + limits[-1:]:
            with self.subTest(limit=limit):
                set_scene(self.host, kept)
                done = self.limited(limit, "renew", "--config-dir", self.host.config)
                self.assertNotIn("Traceback", done.stderr.decode())
                if b"installed" not in done.stdout:
                    self.assertEqual(1, done.returncode, done)
                    self.assertNotEqual(limits[-1], limit)
                    self.assert_shows(made().current)
                    self.assertEqual([], self.host.hooks_run())
                    self.assertEqual(0, self.host.run("renew").status)
                self.assert_shows(made().renewed)
                self.assertEqual(["ran"], self.host.hooks_run())

    @staticmethod
    def limited(limit, *arguments):
        """Run the command with so many descriptors."""
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        return subprocess.run(
            world.command() + arguments,
            stdin=subprocess.DEVNULL,
            timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
            **pipes,
        )

    def starts_with(self, limit):
        """Whether Python starts with so many descriptors."""
        return self.limited(limit, "--version").returncode == 0


# ---------------------------------------------------------------- real disks


@needs_root
@world.needs("mount", "umount", "chattr")
class Disks(FaultCase):
    """File systems that are full, closed or hold on to a file."""

    def command(self, *words):
        """Run a system command, or skip the test where this host does not let root do it."""
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            self.skipTest("{}: {}".format(" ".join(words), done.stdout.decode().strip()))

    def mount(self, *options):
        """Mount over the config dir, until the test ends."""
        self.command("mount", *(options + (self.host.config,)))
        self.addCleanup(subprocess.run, ["umount", self.host.config])

    def test_full(self):
        """128 KiB of disk, and another writer takes all that is left."""
        self.mount("-t", "tmpfs", "-o", "size=128k,mode=755", "tmpfs")
        self.prepare()
        self.assertEqual(0, self.host.run("renew", "--dry-run").status)
        filler = os.path.join(self.host.config, "filler")
        with open(filler, "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        for _ in range(2):
            self.assert_refused("no space left")
        os.unlink(filler)
        self.assert_completes()

    def test_out_of_inodes(self):
        """Room for bytes, but not for one more file."""
        self.mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=50,mode=755", "tmpfs")
        self.prepare()
        fillers = []
        with contextlib.suppress(OSError):
            for number in range(60):
                path = os.path.join(self.host.config, "filler-%d" % number)
                fillers.append(world.write(path, b""))
        self.assert_refused("no space left")
        for filler in fillers:
            os.unlink(filler)
        self.assert_completes()

    def test_read_only(self):
        """A tree that is mounted read-only for a while."""
        self.mount("--bind", self.host.config)
        self.command("mount", "-o", "remount,ro,bind", self.host.config)
        self.assert_refused("read-only file system")
        self.command("mount", "-o", "remount,rw,bind", self.host.config)
        self.assert_completes()

    def test_immutable(self):
        """`chattr +i` on a folder, on the lock, or on the state file, which stops nothing."""
        self.host.offers(made().current)
        self.assertEqual(0, self.host.run("renew").status)
        self.host.offers(made().renewed)
        for path in ("live/" + NAME, "archive"):
            with self.subTest(path), immutable(os.path.join(self.host.config, path)):
                self.assert_refused("operation not permitted")
        with immutable(self.host.state(NAME)):
            result = self.host.run("renew")
        self.assert_shows(made().renewed)
        self.assertIn("operation not permitted", result.err.lower())
        self.assertEqual(["ran"], self.host.hooks_run())


# ---------------------------------------------------------------- readers


class Readers(FaultCase):
    """What a reader sees while sets are replaced again and again."""

    def test_rotations(self):
        """Another leaf and key each time, from links and from copies: never a pair that misfits."""
        runs = 60 if FULL else 12 if world.MORE else 6
        turns = itertools.cycle((made().other_latest, made().rekeyed_latest, made().latest))
        copies = itertools.cycle((MEMBERS, CERTIFICATES, (KEY,), ("fullchain.pem",)))
        shown, seen = made().current, 0
        for turn, credential in zip(range(runs), turns):
            if turn % 2:
                self.host.lay(shown, *next(copies))
            self.host.offers(credential, credential.key)
            with Reader(self.host) as reader:
                result = self.host.run("renew", NAME, "--force")
            self.assertEqual((0, []), (result.status, reader.bad), result)
            self.assert_shows(credential)
            shown, seen = credential, seen + reader.looks
        self.assertGreater(seen, runs)


if __name__ == "__main__":
    unittest.main()
