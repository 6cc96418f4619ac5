"""The real command against real TLS servers: arguments -> status, stdout, stderr, what is on disk.

One authority serves the whole module. FIRST and NEWER are for one key, OTHER is for another one. A
lineage in service is made once, and copied by the tests that begin with one. Where many cases have
one command in common, each is a lineage of its own, and the command runs once.

With CERTFERRY_FULL=1 there are more tests: those that wait as long as certferry does (for a lock,
for a stale service), and tables that test_judge.py and test_health.py have in short. They are no
skipped tests otherwise, since CI counts a skip as a failure.
"""

import contextlib
import datetime
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import unittest

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

ROOT = os.geteuid() == 0
NAME = "example.com"
NAMES = [NAME, "*.example.com"]
STATE = "certferry/example.com.state"
FIELDS = """name result reason detail changed source not_before not_after serial fingerprint_sha256
    public_key_sha256 staged_keys domains version health""".split()
AUTHORITY = STRANGER = FIRST = NEWER = OTHER = OLDER = FEWER = SHOP = None
TEMPLATE = TEMPLATE_SOURCE = None  # a config dir with FIRST in service, and whom its conf names


def setUpModule():
    """Mint what all tests share, once in a process however many classes it runs."""
    global AUTHORITY, STRANGER, FIRST, NEWER, OTHER, OLDER, FEWER, SHOP
    if AUTHORITY:
        return
    AUTHORITY = world.Authority(world.scratch(), "Example Root")
    STRANGER = world.Authority(world.scratch(), "Another Root")
    FIRST = AUTHORITY.issue(NAMES)
    NEWER = again()
    OTHER = AUTHORITY.issue(NAMES)
    OLDER = again(not_before=world.days(-20), not_after=world.days(200))
    FEWER = again([NAME])
    SHOP = again(["shop.example.org"])
    make_template()


def make_template():
    """Cross FIRST into the config dir that lineages in service are copied from."""
    global TEMPLATE, TEMPLATE_SOURCE
    downstream = world.Downstream()
    downstream.__enter__()
    with world.Upstream(FIRST) as upstream:
        downstream.key(NAME, FIRST)
        arguments = (NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root)
        if downstream.run(*arguments).status != 0:
            return  # FirstCrossing tells why
        TEMPLATE_SOURCE = upstream.source
    TEMPLATE = downstream.config


@functools.lru_cache(maxsize=None)
def rolled_back():
    """Return a config dir where NEWER came and was rolled back from, and whom its conf names."""
    downstream = world.Downstream()
    downstream.__enter__()
    with world.Upstream(NEWER) as upstream:
        downstream.become(TEMPLATE, TEMPLATE_SOURCE, upstream.source)
        for command in (("renew",), ("rollback", NAME)):
            result = downstream.run(*command)
            if result.status != 0:
                raise AssertionError("{}: {}".format(command, result))
    return downstream.config, upstream.source


def again(names=NAMES, **how):
    """Return a certificate for FIRST's key, as Authority.issue makes it."""
    return AUTHORITY.issue(names, key=FIRST.key, **how)


def leaf_of(credential):
    """Return a credential's certificate as DER."""
    return world.certificates(credential.cert)[0]


def fingerprint(credential):
    """Return the SHA-256 of a credential's certificate in hexadecimal digits."""
    return hashlib.sha256(leaf_of(credential)).hexdigest()


def key_fingerprint(credential):
    """Return the SHA-256 of a credential's public key, as TLSA records have it."""
    pem = world.public_key(credential.cert)
    return hashlib.sha256(world.base64.b64decode("".join(pem.splitlines()[1:-1]))).hexdigest()


def bare(digits):
    """Return hexadecimal digits without what people put between them."""
    return digits.replace(":", "").strip().lower()


def iso_time(text):
    """Return openssl's date as ISO 8601."""
    moment = datetime.datetime.strptime(text, "%b %d %H:%M:%S %Y %Z")
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


class Scene(unittest.TestCase):
    """A downstream, and short ways to say what happens on it."""

    def setUp(self):
        self.downstream = world.Downstream().started(self)
        self.run_command = self.downstream.run

    def upstream(self, credential=None, **how):
        """Start a TLS server with a credential, FIRST if not told otherwise; the test ends it."""
        return world.Upstream(credential or FIRST, **how).started(self)

    def cross(self, *arguments, **how):
        """Run certferry example.com --ca-file ROOT ...; return its Result."""
        return self.run_command(NAME, "--ca-file", AUTHORITY.root, *arguments, **how)

    def in_service(self, **options):
        """Return an upstream whose certificate is in service, with more options in the conf."""
        upstream = self.upstream()
        self.assertTrue(TEMPLATE, "there was no first crossing")
        self.downstream.become(TEMPLATE, TEMPLATE_SOURCE, upstream.source)
        self.add_to_conf(**options)
        return upstream

    def rolled_back(self):
        """Return an upstream that still shows NEWER, which was rolled back from."""
        upstream = self.upstream(NEWER)
        self.assertTrue(TEMPLATE, "there was no first crossing")
        folder, source = rolled_back()
        self.downstream.become(folder, source, upstream.source)
        return upstream

    def copy_lineage(self, name, source, template=None, **options):
        """Make a lineage that is a copy of the template's, by links; source as the conf has it."""
        config, old = template or (TEMPLATE, TEMPLATE_SOURCE)
        for folder in glob.glob(os.path.join(config, "archive", NAME + "@*")):
            target = os.path.relpath(folder, config).replace(NAME, name)
            shutil.copytree(folder, os.path.join(self.downstream.config, target))
        live = shutil.copytree(
            os.path.join(config, "live", NAME), self.downstream.live(name), symlinks=True
        )
        current = os.path.join(live, ".current")
        target = os.readlink(current).replace(NAME, name)
        os.unlink(current)
        os.symlink(target, current)
        records = os.path.join(config, "certferry", NAME)
        os.makedirs(os.path.dirname(self.downstream.conf(name)), 0o700, exist_ok=True)
        conf = world.read(records + ".conf").decode().replace("= " + old, "= " + source)
        world.write(self.downstream.conf(name), conf)
        self.add_to_conf(name, **options)
        state = world.read(records + ".state").decode().replace(old, source.split()[-1])
        world.write(self.downstream.state(name), state, 0o600)

    def lineage(self, name, source, shown=None, **options):
        """Make a lineage by hand: its conf, and plain live files of a credential or a key alone."""
        self.downstream.key(name, shown or FIRST)
        if shown:
            for file in ("cert", "chain", "fullchain"):
                path = self.downstream.live(name, file + ".pem")
                world.write(path, world.read(getattr(shown, file)))
        os.makedirs(os.path.dirname(self.downstream.conf(name)), 0o700, exist_ok=True)
        text = "from = {}\nca-file = {}\n".format(source, AUTHORITY.root)
        world.write(self.downstream.conf(name), text)
        self.add_to_conf(name, **options)

    def add_to_conf(self, name=NAME, **options):
        """Write options into a lineage's conf, as an administrator's editor does."""
        with open(self.downstream.conf(name), "a") as conf:
            for key, value in options.items():
                conf.write("{} = {}\n".format(key.replace("_", "-"), value))

    def conf(self, name=NAME):
        """Return the text of a lineage's conf."""
        return world.read(self.downstream.conf(name)).decode()

    def record(self):
        """Return the text of the state file."""
        return world.read(self.downstream.state(NAME)).decode()

    def owed(self, number):
        """Return the hooks that a version owes, None where it owes nothing."""
        path = self.downstream.archive(NAME, number, "pending")
        if not os.path.exists(path):
            return None
        return world.read(path).decode().splitlines()

    def staged(self, name=NAME):
        """Return the paths of staged keys."""
        folder = self.downstream.live(name)
        files = sorted(os.listdir(folder))
        return [os.path.join(folder, file) for file in files if file.startswith("privkey-")]

    def seen(self, *arguments, **how):
        """Run a command with --json; return its Result and the object of its only lineage."""
        result, lineages = self.seen_all(*arguments, **how)
        self.assertEqual(1, len(lineages), result)
        return result, list(lineages.values())[0]

    def seen_all(self, *arguments, **how):
        """Run a command with --json; return its Result and {name: object}."""
        result = self.run_command(*(arguments + ("--json",)), **how)
        self.assertTrue(result.out, result)
        lineages = json.loads(result.out)["lineages"]
        return result, {lineage["name"]: lineage for lineage in lineages}

    def assert_ended(self, seen, status, result, reason=None):
        """See that a command of one lineage ended so; return its Result and object for more."""
        ended = (seen[0].status, seen[1]["result"], seen[1]["reason"])
        self.assertEqual((status, result, reason), ended, seen)
        return seen

    def assert_one_problem(self, result, *words, **who):
        """See that standard error is one line, `certferry: NAME: ...`, with these words in it."""
        start = "certferry: {}: ".format(who.get("name", NAME))
        self.assertRegex(result.err, r"\A{}[ -~]+\n\Z".format(re.escape(start)))
        for word in words:
            self.assertIn(word, result.err)

    def log(self):
        """Return a new file's path, for hooks to append to, and a function that reads its lines."""
        path = os.path.join(world.scratch(self), "log")

        def lines():
            return world.read(path).decode().splitlines() if os.path.exists(path) else []

        return path, lines

    def wrapper(self, script):
        """Return an interpreter that is a shell script: `exec "$PYTHON" "$@"` is its last line."""
        head = "#!/bin/sh\nPYTHON={}\n".format(shlex.quote(sys.executable))
        return world.write(os.path.join(world.scratch(self), "python"), head + script, 0o755)


class Usage(Scene):
    """Wrong words: one line that says so, exit status 2, nothing written."""

    def test_no_argument(self):
        """Short help on standard error."""
        result = self.run_command(bare=True)
        self.assertEqual((2, ""), (result.status, result.out))
        self.assertLessEqual(len(result.err.splitlines()), 6)
        for command in ("certferry NAME", "certferry renew", "certferry status", "rollback"):
            self.assertIn(command, result.err)

    def test_help_and_version(self):
        """A screen of at most 80 columns for each command, with its options."""
        for words, mentioned in (
            ([], "certferry renew"),
            ([NAME], "--served-at"),
            (["renew"], "--jitter"),
            (["status"], "--metrics"),
            (["rollback"], "rollback NAME"),
        ):
            result = self.run_command("--help", *words)
            self.assertEqual((0, ""), (result.status, result.err))
            self.assertIn(mentioned, result.out)
            self.assertLessEqual(max(map(len, result.out.splitlines())), 80)
        self.assertRegex(self.run_command("--version").out, r"\Acertferry \d+\.\d+\S*\n\Z")

    def test_wrong(self):
        """Each is named; the other letters of a name get the advice to write its xn-- form."""
        self.in_service()
        before = self.downstream.snapshot()
        pem = world.read(FIRST.key).decode()
        secret = pem.splitlines()[1]
        for words, *mentioned in (
            (["example"], "example", "renew", "status", "rollback"),
            (["stra\u00dfe.example"], "xn--"),
            ([NAME, "-d", "stra\u00dfe.example"], "xn--"),
            ([NAME, "--from", "\u03c3.example:443"], "xn--"),
            (["renew", "--force"], "NAME"),
            (["renew", "--from", "up.example.net"], "--from"),
            (["rollback"], "NAME"),
            ([NAME, "other.example.com"], "NAME"),
            ([NAME, "--colour", "green"], "--colour"),
            ([NAME, "--from", "ldaps://up.example.net"], "--from"),
            (["renew", "--jitter", "-1"], "--jitter"),
            ([NAME, "--key=" + pem], "--key"),
            ([NAME, "--key", secret, "--colour"], "--colour"),
        ):
            with self.subTest(words[:3]):
                result = self.run_command(*words)
                self.assertEqual((2, ""), (result.status, result.out), result)
                self.assertRegex(result.err, r"\Acertferry: [ -~]+\n\Z")
                self.assertNotIn(secret[:40], result.err)
                for word in mentioned:
                    self.assertIn(word, result.err)
        result = self.run_command("status", "--colour")
        self.assertEqual((3, ""), (result.status, result.out))
        self.assertEqual(before, self.downstream.snapshot())

    def test_options_before_and_after(self):
        """Every option works before and after the word."""
        self.in_service()
        config = ("--config-dir", self.downstream.config)
        for words in (("--json",) + config + ("renew", NAME), ("renew", "--json", NAME) + config):
            result = self.run_command(*words, bare=True)
            self.assertEqual(0, result.status, result)
            self.assertEqual("unchanged", json.loads(result.out)["lineages"][0]["result"])


class FirstCrossing(Scene):
    """A private key on one server, a certificate on another, one command."""

    def test_installs_and_says_where(self):
        """The result, the paths, the cron line; one complete version behind links; the modes."""
        upstream = self.upstream()
        key = self.downstream.key(NAME, FIRST)
        os.chmod(key, 0o640)
        group = os.getegid()
        if ROOT:
            group = 12345
            os.chown(key, 0, group)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertRegex(
            result.out,
            r"\Aexample\.com: installed: example\.com \*\.example\.com, "
            r"valid until \d{4}-\d\d-\d\d \(8[89] days\), from " + upstream.source,
        )
        for file in ("fullchain.pem", "privkey.pem"):
            path = re.escape(self.downstream.live(NAME, file))
            self.assertRegex(result.out, r"(?m)^  \S.* {}$".format(path))
        self.assertRegex(result.out, r"(?m)^  .*hook.* none.*--deploy-hook")
        config = re.escape(self.downstream.config)
        self.assertRegex(result.out, r"(?m)^.*cron.* renew .*--config-dir {}$".format(config))
        self.downstream.assert_fits(self, NAME, FIRST)
        pointer = os.readlink(self.downstream.live(NAME, ".current"))
        self.assertEqual("../../archive/example.com@1", pointer)
        for file in ("cert", "chain", "fullchain", "privkey"):
            link = os.readlink(self.downstream.live(NAME, file + ".pem"))
            self.assertEqual(".current/{}.pem".format(file), link)
        self.assert_modes(group)

    def assert_modes(self, group):
        """See that certificates are open, the key as it was, the records closed."""
        entries = self.downstream.snapshot()
        files = {"cert": 0o644, "chain": 0o644, "fullchain": 0o644, "privkey": 0o640}
        for file, mode in files.items():
            self.assertEqual(mode, entries["archive/example.com@1/{}.pem".format(file)].mode)
        self.assertEqual(0o755, entries["archive/example.com@1"].mode)
        self.assertEqual(0o700, entries["certferry"].mode)
        self.assertEqual(0o600, entries["certferry/.lock"].mode)
        key = os.stat(self.downstream.archive(NAME, 1, "privkey.pem"))
        self.assertEqual(group, key.st_gid)

    def test_the_cron_line(self):
        """What is to be put into cron works as it stands, wherever the config dir is."""
        config = os.path.join(world.scratch(self), "let's encrypt")
        upstream = self.upstream()
        arguments = ("--from", upstream.source, "--key", FIRST.key, "--config-dir", config)
        result = self.cross(*arguments, bare=True)
        self.assertEqual((0, ""), (result.status, result.err))
        command = re.search(r"\d+ [\d,]+ \* \* \* (.+)", result.out).group(1)
        command = re.sub(r"--jitter \d+", "--jitter 0", command)
        upstream.switch(NEWER)
        done = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE)
        self.assertEqual((0, b""), (done.returncode, done.stdout))
        self.assertTrue(os.path.exists(os.path.join(config, "archive", NAME + "@2")))

    def test_options_are_remembered_as_given(self):
        """The conf has what was given, paths made absolute; renew needs no more."""
        folder = os.path.dirname(self.downstream.config)
        shutil.copy(AUTHORITY.root, os.path.join(folder, "root.pem"))
        upstream = self.upstream()
        arguments = ("-d", NAME, "--timeout", "7.5", "--warn", "20d", "--ca-file", "root.pem")
        hooks = ("--deploy-hook", "date +%F", "--deploy-hook", "true")
        self.downstream.key(NAME, FIRST)
        result = self.run_command(NAME, "--from", upstream.source, *(arguments + hooks))
        self.assertEqual((0, ""), (result.status, result.err))
        remembered = {
            "from = " + upstream.source,
            "domain = example.com",
            "ca-file = {}/root.pem".format(folder),
            "deploy-hook =",
            "    date +%F",
            "    true",
            "timeout = 7.5",
            "warn = 20d",
        }
        self.assertEqual(remembered, set(self.conf().splitlines()))
        upstream.switch(NEWER)
        self.assertEqual(0, self.run_command("renew").status)
        self.downstream.assert_fits(self, NAME, NEWER)

    def test_no_key(self):
        """Said with the path and what to do, with every option given; nobody is asked."""
        upstream = self.upstream()
        result = self.cross("--from", upstream.source, "--deploy-hook", "it's on")
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, "no private key", self.downstream.live(NAME, "privkey.pem"))
        advice = re.search(
            r"ssh root@127\.0\.0\.1 cat \S+/privkey\.pem \| (certferry .*)", result.err
        )
        words = shlex.split(advice.group(1).partition(". The options")[0])
        given = [
            ("--key", "-"),
            ("--from", upstream.source),
            ("--ca-file", AUTHORITY.root),
            ("--deploy-hook", "it's on"),
            ("--config-dir", self.downstream.config),
        ]
        for pair in given:
            self.assertIn(pair, list(zip(words, words[1:])))
        self.assert_ended(self.seen(NAME, "--from", upstream.source), 1, "refused", "no-key")
        entries = set(self.downstream.snapshot()) - {"."}
        self.assertLessEqual(entries, {"certferry", "certferry/.lock"})
        self.assertEqual(0, upstream.connections)

    def test_no_config_dir(self):
        """Neither renew nor status makes one; the first crossing does."""
        os.rmdir(self.downstream.config)
        self.assertEqual(0, self.run_command("renew").status)
        self.assertEqual(3, self.run_command("status").status)
        self.assertFalse(os.path.exists(self.downstream.config))
        result = self.cross("--from", self.upstream().source, "--key", FIRST.key)
        self.assertEqual(0, result.status, result)
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_unusable_keys(self):
        """An encrypted, a broken, an empty key and a certificate: no-key, in words, no network."""
        upstream = self.upstream()
        encrypted = world.openssl("pkey", "-in", FIRST.key, "-aes128", "-passout", "pass:secret")
        whole = world.read(FIRST.key).decode()
        contents = {
            "encrypted": encrypted,
            "broken": whole[:90] + whole[-30:],
            "empty": "",
            "certificate": world.read(FIRST.cert).decode(),
        }
        paths = {}
        for label, content in contents.items():
            name = label + ".example.com"
            self.lineage(name, upstream.source)
            paths[name] = world.write(self.downstream.live(name, "privkey.pem"), content, 0o600)
        before = {name: world.read(path) for name, path in paths.items()}
        result, lineages = self.seen_all("renew")
        self.assertEqual(1, result.status)
        for name, path in paths.items():
            with self.subTest(name):
                self.assertEqual("no-key", lineages[name]["reason"])
                self.assertIn(path, lineages[name]["detail"])
                self.assertEqual(before[name], world.read(path))
        self.assertIn("encrypted", lineages["encrypted.example.com"]["detail"])
        self.assertEqual(0, upstream.connections)

    def test_unusable_keys_as_option(self):
        """The same given by --key: nothing is staged, and the advice claims nothing else."""
        encrypted = world.openssl("pkey", "-in", FIRST.key, "-aes128", "-passout", "pass:secret")
        upstream = self.upstream()
        for stdin in (encrypted, "", "no key\n", world.read(FIRST.cert).decode()):
            with self.subTest(stdin[:20]):
                seen = self.seen(NAME, "--from", upstream.source, "--key", "-", stdin=stdin)
                self.assert_ended(seen, 1, "refused", "no-key")
                self.assert_one_problem(seen[0])
                self.assertNotIn("key was kept", seen[0].err)
                self.assertFalse(os.path.exists(self.downstream.live(NAME)))
        self.assertEqual(0, upstream.connections)

    def test_kinds_of_keys(self):
        """RSA as PKCS 1, a curve with its parameters before the key, Ed25519; beside a conf."""
        credentials = {}
        for kind in ("rsa:2048", "P-384", "ed25519"):
            name = kind.replace(":", "-").lower() + ".example.com"
            credentials[name] = AUTHORITY.issue([name], key=kind)
        upstream = self.upstream(hosts=credentials)
        for name, credential in credentials.items():
            self.lineage(name, upstream.source)
            key = world.read(credential.key).decode()
            if not name.startswith("ed25519"):
                key = world.openssl("pkey", "-in", credential.key, "-traditional")
            if name.startswith("p-384"):
                key = world.openssl("ecparam", "-name", "secp384r1") + key
            world.write(self.downstream.live(name, "privkey.pem"), key)
        result = self.run_command("renew")
        self.assertEqual((0, ""), (result.status, result.err))
        for name, credential in credentials.items():
            self.downstream.assert_fits(self, name, credential)

    def test_a_key_that_others_can_read(self):
        """One warning line; its mode is the administrator's to change."""
        path = self.downstream.key(NAME, FIRST)
        os.chmod(path, 0o644)
        result = self.cross("--from", self.upstream().source)
        self.assertEqual(0, result.status)
        self.assert_one_problem(result, "privkey.pem")

    def test_a_key_that_lies(self):
        """A key file with another's public half: found out by the rehearsal, before the rename."""
        upstream = self.upstream()
        lying = world._lying_key(world.read(FIRST.key))
        world.write(self.downstream.key(NAME, FIRST), lying, 0o600)
        for options in (["--dry-run"], []):
            seen = self.seen(NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root, *options)
            self.assert_ended(seen, 1, "refused", "rehearsal")
            self.assert_one_problem(seen[0])
        self.assertFalse(os.path.lexists(self.downstream.live(NAME, ".current")))

    def test_which_name_is_asked_for(self):
        """The first -d without *., else NAME; --sni before both."""
        upstream = self.upstream()
        options = {
            "a.example.com": {},
            "b.example.com": {"domain": "*.b.example.com"},
            "c.example.com": {"domain": "\n    *.c.example.com\n    www.c.example.com"},
            "d.example.com": {"sni": "shop.example.net"},
        }
        for name, more in options.items():
            self.lineage(name, upstream.source, **more)
        self.assertEqual(1, self.run_command("renew").status)
        wanted = {"a.example.com", "b.example.com", "www.c.example.com", "shop.example.net"}
        self.assertEqual(wanted, set(upstream.asked))

    def test_which_names_are_wanted(self):
        """*.example.com is lineage example.com with *.example.com required; else either will do."""
        upstream = self.upstream(FEWER)
        arguments = ("*.example.com", "--from", upstream.source, "--ca-file", AUTHORITY.root)
        self.downstream.key(NAME, FIRST)
        self.assert_ended(self.seen(*arguments), 1, "refused", "names")
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        upstream.switch(again(["*.example.com"]))
        self.lineage("sub.example.com", upstream.source)
        self.downstream.key("sub.example.com", FIRST)
        _, lineages = self.seen_all("renew")
        reasons = {name: lineage["reason"] for name, lineage in lineages.items()}
        self.assertEqual({NAME: "names-lost", "sub.example.com": None}, reasons)
        self.assert_ended(self.seen(*arguments), 0, "installed")
        self.assertIn("domain = *.example.com\n", self.conf())

    def test_self_crossing(self):
        """NAME without --from is this very machine: it says so and asks for --from."""
        self.downstream.key("127.0.0.1", FIRST)
        seen = self.seen("127.0.0.1")
        self.assert_ended(seen, 1, "failed", "unreachable")
        self.assert_one_problem(seen[0], "this very machine", "--from", name="127.0.0.1")
        self.assertFalse(os.path.exists(self.downstream.conf("127.0.0.1")))

    def test_a_working_directory_that_is_gone(self):
        """A file by its absolute path is a good source all the same."""
        gone = os.path.join(world.scratch(self), "gone")
        python = self.wrapper(
            'mkdir {0} && cd {0} && rmdir {0} && exec "$PYTHON" "$@"\n'.format(gone)
        )
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", "file:" + FIRST.fullchain, python=python)
        self.assertEqual((0, ""), (result.status, result.err), result)

    def test_addresses(self):
        """A certificate for an IP address, from an IPv6 one; no server name is sent for one."""
        credential = AUTHORITY.issue(["192.0.2.1"])
        upstream = self.upstream(credential, address="::1")
        self.assertRegex(upstream.source, r"\A\[::1\]:\d+\Z")
        arguments = ("--from", upstream.source, "--key", credential.key)
        result = self.run_command("192.0.2.1", "--ca-file", AUTHORITY.root, *arguments)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertIn("from " + upstream.source, result.out)
        self.assertEqual({None}, set(upstream.asked))

    def test_absolute_names(self):
        """The last dot is kept for resolving, and is no part of the name that is asked for."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        sources = ("--from", "nowhere.invalid.:4433", "--from", upstream.source)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--sni", "example.com.", *sources)
        self.assert_ended(seen, 0, "installed")
        self.assertIn("    nowhere.invalid.:4433\n", self.conf())
        self.assertEqual({NAME}, set(upstream.asked))

    def test_an_environment_that_is_in_the_way(self):
        """A key log that cannot be written, proxies: nothing to a handshake with the upstream.

        With --no-timer nothing is said of cron.
        """
        self.downstream.key(NAME, FIRST)
        proxy = "http://127.0.0.1:1"
        env = {"SSLKEYLOGFILE": "/nonexistent/keys", "https_proxy": proxy, "ALL_PROXY": proxy}
        result = self.cross("--from", self.upstream().source, "--no-timer", env=env)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertNotIn("cron", result.out)


class Unchanged(Scene):
    """The usual run finds nothing new and costs next to nothing."""

    def test_one_handshake_and_the_states_time(self):
        """Exactly one handshake, no hook, no openssl that matters, the state touched."""
        log, lines = self.log()
        upstream = self.in_service(deploy_hook="echo ran >> " + log)
        self.run_command("renew")
        handshakes, connections = upstream.handshakes, upstream.connections
        os.utime(self.downstream.state(NAME), (1, 1))
        before = self.downstream.snapshot()
        folder = world.scratch(self)
        os.chmod(folder, 0o755)
        world.write(os.path.join(folder, "openssl"), "#!/bin/sh\nexit 9\n", 0o755)
        env = {"PATH": folder + ":/usr/bin:/bin"}
        if sys.version_info < (3, 10):
            env = None  # openssl tells the chain there
        result, lineage = self.assert_ended(self.seen("renew", env=env), 0, "unchanged")
        self.assertEqual(("", False), (result.err, lineage["changed"]))
        if sys.version_info >= (3, 10):
            self.assertEqual(1, upstream.connections - connections)
            self.assertEqual(1, upstream.handshakes - handshakes)
        after = self.downstream.snapshot()
        self.assertEqual([STATE], world.changed(before, after))
        self.assertEqual(before[STATE].content, after[STATE].content)
        self.assertGreater(after[STATE].mtime_ns, before[STATE].mtime_ns)
        self.assertEqual([], lines())

    def test_the_same_command_again(self):
        """The same options again are unchanged and change nothing."""
        upstream = self.in_service()
        before = self.downstream.snapshot()
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", upstream.source)
        self.assert_ended(seen, 0, "unchanged")
        self.assertFalse(seen[1]["changed"])
        changed = world.changed(before, self.downstream.snapshot())
        self.assertLessEqual(set(changed), {STATE, "certferry"})

    def test_names_and_clock_are_asked_all_the_same(self):
        """A current leaf that does not cover what the conf wants by now is refused."""
        self.in_service(domain="shop.example.org")
        self.assert_ended(self.seen("renew"), 1, "refused", "names")

    def test_new_requirements_judge_the_current_leaf(self):
        """With -d or --ca-file on the command line the current leaf has to pass every row."""
        self.in_service()
        before = self.conf()
        for reason, arguments in (
            ("names", ("-d", "shop.example.org")),
            ("untrusted", ("--ca-file", STRANGER.root)),
        ):
            self.assert_ended(self.seen(NAME, *arguments), 1, "refused", reason)
        self.assertEqual(before, self.conf())


class Rotation(Scene):
    """The upstream renewed: the next run has the new certificate in service."""

    def test_renewed(self):
        """A second version, the first kept; the key is the same in a file of its own."""
        upstream = self.in_service()
        upstream.switch(NEWER, keep_sessions=True)
        seen = self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual((2, True), (seen[1]["version"], seen[1]["changed"]))
        self.downstream.assert_fits(self, NAME, NEWER)
        kept = world.certificates(self.downstream.archive(NAME, 1, "cert.pem"))
        self.assertEqual([leaf_of(FIRST)], kept)
        keys = [self.downstream.archive(NAME, number, "privkey.pem") for number in (1, 2)]
        self.assertFalse(os.path.samefile(*keys))
        self.assertEqual(0, upstream.resumed)

    def test_no_session_is_resumed(self):
        """A server that would resume with its old certificate is not asked to."""
        upstream = self.upstream(maximum="1.2")
        self.lineage(NAME, upstream.source, FIRST)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        upstream.switch(NEWER, keep_sessions=True)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual(0, upstream.resumed)

    def test_progress(self):
        """What is newer and what is not: by the begin of validity, whatever is in the leaf."""
        begin = {"not_before": world.days(-2)}
        both = world.LEAF.replace("serverAuth", "serverAuth,clientAuth")
        equal = [again(**begin) for _ in "12"]
        short = again(not_after=world.days(6))
        # {case: in service, offered, offered later}; an equal begin is new once, then stale
        cases = {
            "shorter": (FIRST, short, OLDER),
            "equal": (equal[0], equal[1], equal[0]),
            "fewer": (FIRST, FEWER, FEWER),
            "client": (again(extensions=both, **begin), short, short),
        }
        upstream = self.upstream(hosts={case + ".example.com": cases[case][1] for case in cases})
        for case, (shown, _, _) in cases.items():
            self.lineage(case + ".example.com", upstream.source, shown)
        self.add_to_conf("fewer.example.com", domain=NAME, sni="fewer.example.com")
        result, lineages = self.seen_all("renew")
        for case, (_, offered, _) in cases.items():
            with self.subTest(case):
                name = case + ".example.com"
                self.assertEqual("installed", lineages[name]["result"], result)
                self.downstream.assert_fits(self, name, offered)
        self.assert_one_problem(result, "client", name="client.example.com")
        with world.Upstream(
            FIRST, hosts={case + ".example.com": cases[case][2] for case in cases}
        ) as later:
            for case in ("shorter", "equal"):
                path = self.downstream.conf(case + ".example.com")
                text = world.read(path).decode().replace(upstream.source, later.source)
                world.write(path, text)
            result, lineages = self.seen_all("renew", "shorter.example.com", "equal.example.com")
        reasons = [lineage["reason"] for lineage in lineages.values()]
        self.assertEqual(["older", "older"], reasons, result)


class Chains(Scene):
    """What is written: leaf first, issuers in order, no root, nothing that does not belong."""

    @staticmethod
    def repaired(shown, **how):
        """Return another certificate for an authority's name and key."""
        name = world.openssl("x509", "-in", shown.cert, "-noout", "-subject", "-nameopt", "compat")
        subject = name.partition("=")[2].strip()
        how.setdefault("issuer", AUTHORITY.root_credential)
        return AUTHORITY.issue([], key=shown.key, subject=subject, ca=True, **how)

    def test_disorder(self):
        """A root, a stranger, a duplicate and a wrong order come out as they should be."""
        longer = world.INTERMEDIATE.replace(",pathlen:0", "")
        middle = AUTHORITY.issue(
            [], subject="/CN=Upper", ca=True, issuer=AUTHORITY.root_credential, extensions=longer
        )
        lower = AUTHORITY.issue([], subject="/CN=Lower", ca=True, issuer=middle)
        leaf = AUTHORITY.issue(NAMES, issuer=lower)
        stranger = STRANGER.intermediate.cert
        sent = [AUTHORITY.root, middle.cert, stranger, lower.cert, middle.cert, leaf.cert]
        upstream = self.upstream(leaf, send=sent)
        self.downstream.key(NAME, leaf)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.downstream.assert_fits(self, NAME)
        chain = world.certificates(self.downstream.live(NAME, "chain.pem"))
        self.assertEqual([leaf_of(lower), leaf_of(middle)], chain)
        self.assert_ended(self.seen("renew"), 0, "unchanged")

    if world.FULL:

        def test_what_is_superfluous(self):
            """A weak or odd certificate above a chain that reaches a trusted root is left out."""
            old = world.Authority(world.scratch(self), "Old Root", intermediate=False)
            root = AUTHORITY.root_credential
            weak = {"digest": "sha1", "extensions": world.ROOT}
            past = {"not_before": world.days(-900), "not_after": world.days(-9)}
            above = {
                "sha1.example.com": self.repaired(root, issuer=old.root_credential, **weak),
                "expired.example.com": self.repaired(root, issuer=old.root_credential, **past),
                "version1.example.com": self.repaired(
                    root, issuer=old.root_credential, extensions=""
                ),
            }
            folder = world.scratch(self)
            for name, odd in above.items():
                path = os.path.join(folder, name)
                world.write(path, world.read(FIRST.fullchain) + world.read(odd.cert))
                self.lineage(name, "file:" + path)
            result, lineages = self.seen_all("renew")
            for name in above:
                with self.subTest(name):
                    self.assertEqual("installed", lineages[name]["result"], result.err)
                    self.downstream.assert_fits(self, name, FIRST)

    def test_what_comes_along_with_the_current_leaf(self):
        """A root or a stranger beside the same chain is nothing to judge, trusted or not."""
        folder = world.scratch(self)
        more = world.read(AUTHORITY.root) + world.read(STRANGER.intermediate.cert)
        path = os.path.join(folder, "offer.pem")
        world.write(path, world.read(FIRST.fullchain) + more)
        self.lineage(NAME, "file:" + path, FIRST)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        world.write(self.downstream.conf(NAME), self.conf().replace(AUTHORITY.root, STRANGER.root))
        self.assert_ended(self.seen("renew"), 0, "unchanged")

    def test_a_repaired_chain(self):
        """The current leaf with another chain is news; back again it is a pool's other member."""
        log, lines = self.log()
        upstream = self.in_service(deploy_hook="echo ran >> " + log)
        issuer = self.repaired(AUTHORITY.intermediate)
        chain = world.read(issuer.cert)
        fullchain = os.path.join(world.scratch(self), "fullchain.pem")
        world.write(fullchain, world.read(FIRST.cert) + chain)
        repaired = FIRST._replace(chain=issuer.cert, fullchain=fullchain)
        upstream.switch(repaired)
        seen = self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual((2, True), (seen[1]["version"], seen[1]["changed"]))
        self.downstream.assert_fits(self, NAME, repaired)
        upstream.switch(FIRST)
        for _ in range(2):
            self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.downstream.assert_fits(self, NAME, repaired)
        self.assertEqual(["ran"], lines())
        self.assert_ended(self.seen("renew", NAME, "--force"), 0, "installed")
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_one_offer_whole(self):
        """A pool with another certificate at each handshake: leaf and chain belong together."""
        pool = []
        for number in "12":
            issuer = AUTHORITY.issue(
                [], subject="/CN=Issuer " + number, ca=True, issuer=AUTHORITY.root_credential
            )
            pool.append(again(issuer=issuer))
        turns = []

        def rotate(_):
            turns.append(upstream.connections)
            upstream.switch(pool[len(turns) % 2])

        upstream = self.upstream(pool[0], before=rotate)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        leaf = self.downstream.served_leaf(NAME)
        shown = [one for one in pool if leaf_of(one) == leaf]
        self.downstream.assert_fits(self, NAME, shown[0])


class Refusals(Scene):
    """What an offer must pass, in CONTRACT's order, against a lineage in service.

    Each case is a lineage of its own, CASE.example.com, with FIRST's files in service and an offer
    that one server has for that name.
    """

    def refused(self, offers, source="{}"):
        """Offer {case: credential} at one renew; return its Result and {case: object}."""
        hosts = {case + ".example.com": credential for case, credential in offers.items()}
        upstream = self.upstream(hosts=hosts)
        for name in hosts:
            self.lineage(name, source.format(upstream.source), FIRST)
        before = self.downstream.snapshot()
        result, lineages = self.seen_all("renew")
        changed = world.changed(before, self.downstream.snapshot())
        self.assertEqual(set(), {path.partition("/")[0] for path in changed} - {"certferry"})
        self.assertEqual((1, len(hosts)), (result.status, len(lineages)))
        return result, {name.partition(".")[0]: each for name, each in lineages.items()}

    def assert_refused(self, offers, reasons, **words):
        """See that each offer is refused for its reason, told in one line with these words."""
        result, lineages = self.refused(offers)
        for case, reason in reasons.items():
            lineage, name = lineages[case], case + ".example.com"
            with self.subTest(case):
                self.assertEqual(
                    ("refused", reason), (lineage["result"], lineage["reason"]), result
                )
                problems = [line for line in result.err.splitlines() if name + ": " in line]
                self.assertEqual(1, len(problems), problems)
                for word in words.get(case, ()):
                    self.assertIn(word, problems[0])
                self.assertEqual((False, None), (lineage["changed"], lineage["version"]))
                self.assertEqual(fingerprint(FIRST), bare(lineage["fingerprint_sha256"]))
                self.assertIn(reason, world.read(self.downstream.state(name)).decode())

    def test_names_dates_and_keys(self):
        """What the leaf says of itself: the common name does not count, nor does *.com."""
        past = {"not_before": world.days(-90), "not_after": world.days(-1)}
        offers = {
            "another": again(["www.example.org"]),
            "common": again([], subject="/CN=common.example.com"),
            "short": again(["*.com"]),
            "past": again(["*.example.com", NAME], **past),
            "future": again(["*.example.com", NAME], not_before=world.days(1)),
            "older": OLDER,
            "lost": again(["*.example.com"]),
            "key": OTHER,
            "shop": AUTHORITY.issue(["shop.example.org"]),
        }
        reasons = dict.fromkeys(["another", "common", "short"], "names")
        reasons.update(past="expired", future="not-yet-valid", older="older", lost="names-lost")
        reasons.update(key="key-mismatch", shop="key-mismatch")
        self.assert_refused(
            offers,
            reasons,
            another=["www.example.org", "--sni"],
            lost=[NAME, "-d", "--force"],
            key=["ECDSA P-256", "reuse_key", "certferry key.example.com --key", "more days"],
            shop=["shop.example.org", "--sni"],
        )

    def test_trust(self):
        """No way to the root, or nothing that clients take."""
        client = world.LEAF.replace("serverAuth", "clientAuth")
        exchange = world.LEAF.replace("digitalSignature,keyEncipherment", "keyAgreement")
        no_signer = AUTHORITY.issue([], subject="/CN=No Authority")
        bare_leaf = again()
        offers = {
            "stranger": STRANGER.issue(NAMES, key=FIRST.key),
            "itself": again(issuer="self"),
            "client": again(extensions=client),
            "authority": again(extensions=world.LEAF.replace("CA:FALSE", "CA:TRUE")),
            "exchange": again(extensions=exchange),
            "weak": again(digest="sha1"),
            "unsigned": again(issuer=no_signer),
            "alone": bare_leaf._replace(fullchain=bare_leaf.cert),
        }
        self.assert_refused(offers, dict.fromkeys(offers, "untrusted"))

    if world.FULL:

        def test_order(self):
            """An offer that breaks two rows is refused for the first."""
            past = {"not_before": world.days(-90), "not_after": world.days(-1)}
            older = {"not_before": world.days(-20)}
            offers = {
                "key": AUTHORITY.issue(["www.example.org"], **past),
                "names": again(["www.example.org"], **past),
                "expired": STRANGER.issue(NAMES, key=FIRST.key, **past),
                "untrusted": STRANGER.issue(NAMES, key=FIRST.key, **older),
                "older": again(["*.example.com"], **older),
            }
            reasons = {case: case for case in offers}
            reasons["key"] = "key-mismatch"
            self.assert_refused(offers, reasons)

    def test_malformed(self):
        """More than sixteen certificates, no certificate, more than 1 MiB, a broken one."""
        issuer = leaf_of(AUTHORITY.intermediate)
        others = [issuer[:-1] + bytes([number]) for number in range(16)]
        crowd = "".join(map(world.ssl.DER_cert_to_PEM_cert, others))
        path = world.write(os.path.join(world.scratch(self), "crowd.pem"), crowd)
        upstream = self.upstream(send=[path])
        whole = world.read(FIRST.fullchain)
        broken = whole.replace(b"MII", b"MIA", 1)
        contents = {"empty": b"", "text": b"no certificate\n", "broken": broken}
        contents["large"] = whole + b"#" * (1 << 20)
        folder = world.scratch(self)
        sources = {"crowd.example.com": upstream.source}
        for case, content in contents.items():
            path = world.write(os.path.join(folder, case), content)
            sources[case + ".example.com"] = "file:" + path
        for name, source in sources.items():
            self.lineage(name, source, FIRST)
        result, lineages = self.seen_all("renew")
        for name in sources:
            with self.subTest(name):
                self.assertEqual("malformed", lineages[name]["reason"], result)


class Trust(Scene):
    """--ca-file replaces the system store, and is guarded, since who writes it decides."""

    def store(self, mode=0o644):
        """Return the environment in which AUTHORITY's root is the system store, and its path."""
        folder = world.scratch(self)
        os.chmod(folder, 0o755)  # the system store is read by whoever verifies
        path = world.write(os.path.join(folder, "store.pem"), world.read(AUTHORITY.root), mode)
        return {"SSL_CERT_FILE": path}, path

    def test_a_root_of_the_system_store_does_not_count(self):
        """The same root by SSL_CERT_FILE: trusted without --ca-file, not under another one."""
        self.downstream.key(NAME, FIRST)
        system, _ = self.store()
        arguments = (NAME, "--from", self.upstream().source)
        seen = self.seen(*arguments + ("--ca-file", STRANGER.root), env=system)
        self.assert_ended(seen, 1, "refused", "untrusted")
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assert_ended(self.seen(*arguments, env=system), 0, "installed")

    if world.FULL:

        def test_algorithms(self):
            """Short RSA keys and odd curves are refused under the system's roots."""
            system, _ = self.store()
            for kind in ("rsa:1024", "secp256k1"):
                name = kind.replace(":", "-") + ".example.com"
                credential = AUTHORITY.issue([name], key=kind)
                self.downstream.key(name, credential)
                os.makedirs(os.path.dirname(self.downstream.conf(name)), 0o700, exist_ok=True)
                world.write(self.downstream.conf(name), "from = file:" + credential.fullchain)
            result, lineages = self.seen_all("renew", env=system)
            reasons = [lineage["reason"] for lineage in lineages.values()]
            self.assertEqual(["untrusted", "untrusted"], reasons, result)

    @unittest.skipUnless(ROOT, "root alone has files that nobody cannot read")
    def test_a_store_that_root_alone_reads(self):
        """The file is named, not the certificate blamed."""
        system, path = self.store(mode=0o600)
        self.downstream.key(NAME, FIRST)
        result = self.run_command(NAME, "--from", self.upstream().source, env=system)
        self.assertEqual(1, result.status)
        self.assert_one_problem(result, path)

    def test_a_ca_file_that_is_none(self):
        """Missing, empty, or where everybody can write: refused with the path and what to do."""
        upstream = self.upstream()
        folder = world.scratch(self)
        empty = world.write(os.path.join(folder, "empty.pem"), "")
        loose = world.write(os.path.join(folder, "loose.pem"), world.read(AUTHORITY.root))
        os.chmod(loose, 0o666)
        common = os.path.join(folder, "common")
        os.mkdir(common)
        os.chmod(common, 0o777)
        beneath = shutil.copy(AUTHORITY.root, common)
        paths = {"empty": empty, "missing": empty + ".missing", "loose": loose, "beneath": beneath}
        for case, path in paths.items():
            name = case + ".example.com"
            self.lineage(name, upstream.source)
            world.write(
                self.downstream.conf(name),
                self.conf(name).replace(AUTHORITY.root, path),
            )
        result, lineages = self.seen_all("renew")
        for case, path in paths.items():
            with self.subTest(case):
                lineage = lineages[case + ".example.com"]
                self.assertEqual("refused", lineage["result"], lineage)
                self.assertIn(path, lineage["detail"])
                if path in (loose, beneath):
                    self.assertIn("install -m 644 " + path, result.err)
        os.chmod(common, 0o1777)
        self.downstream.key(NAME, FIRST)
        result = self.run_command(NAME, "--from", upstream.source, "--ca-file", beneath)
        self.assertEqual((0, ""), (result.status, result.err))


class FirstMismatch(Scene):
    """The first key-mismatch of a lineage is mostly something in front of the upstream."""

    def assert_mismatch(self, credential, *words):
        """See that crossing to it is a key-mismatch in these words; nothing is remembered."""
        upstream = self.upstream(credential)
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--from", upstream.source, "--deploy-hook", "true")
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assert_one_problem(seen[0], upstream.source, *words)
        self.assertRegex(seen[0].err, "options were not (kept|remembered)")
        self.assertNotIn("reuse_key", seen[0].err)
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assertFalse(os.path.lexists(self.downstream.live(NAME, ".current")))

    def test_a_cdn(self):
        """Right names, another key: the issuer is named, --from is the hint."""
        self.assert_mismatch(STRANGER.issue(NAMES), "Another Root", NAME, "CDN", "--from")

    def test_another_virtual_host(self):
        """Names that do not fit: --sni is the hint."""
        self.assert_mismatch(AUTHORITY.issue(["shop.example.org"]), "shop.example.org", "--sni")

    def test_the_wrong_key_given(self):
        """It is named and waits; how to remove it is said."""
        upstream = self.upstream()
        result = self.cross("--from", upstream.source, "--key", OTHER.key)
        self.assertEqual(1, result.status)
        (path,) = self.staged()
        self.assert_one_problem(result, "rm " + path, key_fingerprint(OTHER)[:16])


class Unreachable(Scene):
    """No connection, no TLS, no answer in time."""

    def test_words(self):
        """Each says the source and its reason; nothing is remembered of a command."""
        silent = world.Silent().started(self)
        sources = {"silent": silent.source}
        for kind in (world.PlainHttp, world.ClosesAtOnce):
            sources[kind.__name__.lower()] = kind().started(self).source
        for case, source in sources.items():
            timeout = 0.5 if source == silent.source else 20
            self.lineage(case + ".example.com", source, timeout=timeout)
        result, lineages = self.seen_all("renew")
        for case, source in sources.items():
            with self.subTest(case):
                lineage = lineages[case + ".example.com"]
                reason = "timeout" if source == silent.source else "unreachable"
                self.assertEqual(("failed", reason), (lineage["result"], lineage["reason"]))
                self.assertIn(source, result.err)
        self.downstream.key(NAME, FIRST)
        with world.Closed() as closed:
            seen = self.seen(NAME, "--from", closed.source)
        self.assert_ended(seen, 1, "failed", "unreachable")
        self.assert_one_problem(seen[0], closed.source)
        self.assertRegex(seen[0].err, "options were not (kept|remembered)")
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))

    def test_a_name_that_does_not_resolve(self):
        """.invalid never does (RFC 6761)."""
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--from", "nowhere.invalid", "--timeout", "5")
        self.assertIn(seen[1]["reason"], ("unreachable", "timeout"))
        self.assert_one_problem(seen[0], "nowhere.invalid")

    def test_what_gives_nothing(self):
        """A file that is missing, a command that fails or says nothing."""
        missing = os.path.join(world.scratch(self), "missing.pem")
        sources = ["file:" + missing, "exec:echo no such host >&2; exit 7", "exec:true"]
        words = [missing, "no such host", "true"]
        for number, source in enumerate(sources):
            self.lineage("case{}.example.com".format(number), source)
        _, lineages = self.seen_all("renew")
        for lineage, word in zip(lineages.values(), words):
            self.assertEqual(("failed", "unreachable"), (lineage["result"], lineage["reason"]))
            self.assertIn(word, lineage["detail"])

    def test_an_upstream_that_allows_one_connection(self):
        """One suffices where Python tells the chain; else the second one's failure is told."""

        def limit(sock):
            if upstream.connections > 1:
                reset = world.struct.pack("ii", 1, 0)
                sock.setsockopt(world.socket.SOL_SOCKET, world.socket.SO_LINGER, reset)
                raise OSError("one is enough")

        upstream = self.upstream(before=limit)
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", upstream.source)
        if sys.version_info >= (3, 10):
            self.assert_ended(seen, 0, "installed")
            self.assertEqual(1, upstream.connections)
        else:
            self.assert_ended(seen, 1, "failed", "unreachable")
            self.assertNotIn("another certificate", seen[0].err)


class Deferred(Scene):
    """What can wait for the next run is a warning line and exit status 0."""

    def test_tomorrow_is_early_enough(self):
        """renew defers it while the certificate is well; certferry NAME fails."""
        upstream = self.in_service()
        upstream.gone(self)
        seen = self.assert_ended(self.seen("renew"), 0, "deferred", "unreachable")
        self.assert_one_problem(seen[0], upstream.source)
        self.assertEqual("ok", seen[1]["health"])
        self.assert_ended(self.seen(NAME), 1, "failed", "unreachable")
        self.add_to_conf(warn="100%")
        self.assert_ended(self.seen("renew"), 1, "failed", "unreachable")

    def test_a_tenth_of_the_lifetime_is_too_late(self):
        """Nine days without a good exchange, or a clock that went back: renew fails."""
        cases = {"late": -10, "back": 10, "well": -8}
        with world.Closed() as dead:
            for case, days in cases.items():
                name = case + ".example.com"
                self.copy_lineage(name, dead.source)
                os.utime(self.downstream.state(name), (world.days(days),) * 2)
            result, lineages = self.seen_all("renew", "--dry-run")
        results = [lineages[case + ".example.com"]["result"] for case in cases]
        self.assertEqual(["failed", "failed", "deferred"], results, result)

    def test_what_was_rolled_back_from(self):
        """It stays out until there is a newer one; options are remembered meanwhile."""
        upstream = self.rolled_back()
        seen = self.assert_ended(self.seen("renew"), 0, "deferred", "rolled-back")
        self.assertEqual(fingerprint(FIRST), bare(seen[1]["fingerprint_sha256"]))
        seen = self.seen(NAME, "--timeout", "9")
        self.assert_ended(seen, 0, "deferred", "rolled-back")
        self.assertTrue(seen[1]["changed"])
        self.assertIn("timeout = 9\n", self.conf())
        self.assertEqual("ok", self.seen("status")[1]["health"])
        upstream.switch(again())
        self.assert_ended(self.seen("renew"), 0, "installed")

    @world.needs("faketime")
    def test_a_clock_that_is_behind(self):
        """At boot the current certificate may not be valid either: nothing to complain of."""
        self.in_service().switch(NEWER)
        early = world.under_clock(self, "-3d")
        seen = self.seen("renew", python=early)
        self.assert_ended(seen, 0, "deferred", "not-yet-valid")
        self.downstream.assert_fits(self, NAME, FIRST)


class SeveralSources(Scene):
    """--from may repeat: in order until one gives an acceptable offer."""

    def test_the_next_one_helps(self):
        """A dead first source, a good second one, which is the one named; a third is not asked."""
        self.downstream.key(NAME, FIRST)
        upstream, spare = self.upstream(), self.upstream()
        with world.Closed() as dead:
            sources = (dead.source, upstream.source, spare.source)
            arguments = [word for source in sources for word in ("--from", source)]
            seen = self.seen(NAME, "--ca-file", AUTHORITY.root, *arguments)
        self.assert_ended(seen, 0, "installed")
        self.assertEqual(upstream.source, seen[1]["source"])
        self.assertIn("from =\n    {}\n    {}\n    {}\n".format(*sources), self.conf())
        self.assertEqual(0, spare.connections)

    def test_the_gravest_reason_counts(self):
        """key-mismatch, another refusal, unreachable, rolled-back, older."""
        fewer = again(["*.example.com"])
        stale, newer, lost, other = map(self.upstream, (OLDER, NEWER, fewer, OTHER))
        cases = {}
        with world.Closed() as dead:
            for reason, sources in (
                ("key-mismatch", (dead, lost, other)),
                ("names-lost", (newer, dead, lost)),
                ("unreachable", (stale, newer, dead)),
                ("rolled-back", (stale, newer)),
                ("older", (stale,)),
            ):
                source = "".join("\n    " + one.source for one in sources)
                cases[reason + ".example.com"] = reason
                self.copy_lineage(reason + ".example.com", source, rolled_back())
            result, lineages = self.seen_all("renew", "--dry-run")
        self.assertEqual(cases, {name: each["reason"] for name, each in lineages.items()}, result)

    def test_when_due_the_next_is_asked_too(self):
        """A source that still has the current leaf does not hide one that has a new one."""
        current = again(not_before=world.days(-80), not_after=world.days(10))
        stale, renewed = self.upstream(current), self.upstream(NEWER)
        sources = "\n    {}\n    {}".format(stale.source, renewed.source)
        self.lineage(NAME, sources, current)
        seen = self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual(renewed.source, seen[1]["source"])


class Keys(Scene):
    """--key, staged keys and the change of a key."""

    def test_from_standard_input_and_again(self):
        """--key - is the lineage's key where it has none; the same key again is nothing new."""
        arguments = ("--from", self.upstream().source, "--key", "-", "-v")
        result = self.cross(*arguments, stdin=world.read(FIRST.key))
        self.assertEqual(0, result.status, result)
        path = self.downstream.archive(NAME, 1, "privkey.pem")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        self.assertNotIn("key =", self.conf())
        seen = self.assert_ended(self.seen(NAME, "--key", FIRST.key), 0, "unchanged")
        self.assertEqual(
            (False, [], []), (seen[1]["changed"], seen[1]["staged_keys"], self.staged())
        )
        secret = world.read(FIRST.key).decode().splitlines()[1]
        for text in (result.out, result.err, self.record(), self.conf()):
            self.assertNotIn(secret, text)

    def test_it_stays_though_the_crossing_fails(self):
        """A valid --key is kept; the next command needs it no more."""
        with world.Closed() as dead:
            result = self.cross("--from", dead.source, "--key", FIRST.key)
        self.assertEqual(1, result.status)
        self.assert_one_problem(result, "key was kept", "options were not")
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assertEqual(0, self.cross("--from", self.upstream().source).status)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertEqual([], self.staged())

    def test_a_staged_key_is_named(self):
        """Where the key waits is told, once."""
        self.in_service()
        result = self.cross("--key", OTHER.key)
        self.assertIn(self.staged()[0], result.out)
        self.assertNotIn("staged key", self.cross("--key", OTHER.key).out)

    def test_the_next_key_is_staged(self):
        """Stage, then the upstream switches: key and certificate change in one rename."""
        upstream = self.in_service()
        seen = self.assert_ended(self.seen(NAME, "--key", OTHER.key), 0, "unchanged")
        waiting = [key_fingerprint(OTHER)]
        self.assertEqual((True, waiting), (seen[1]["changed"], seen[1]["staged_keys"]))
        (path,) = self.staged()
        mode = stat.S_IMODE(os.stat(path).st_mode)
        self.assertEqual((0o600, world.read(OTHER.key)), (mode, world.read(path)))
        seen = self.assert_ended(self.seen(NAME, "--key", OTHER.key), 0, "unchanged")
        self.assertEqual((False, [path]), (seen[1]["changed"], self.staged()))
        self.assertEqual(waiting, self.seen("status")[1]["staged_keys"])
        upstream.switch(OTHER)
        seen = self.assert_ended(self.seen("renew"), 0, "installed")
        self.downstream.assert_fits(self, NAME, OTHER)
        self.assertEqual(([], []), (self.staged(), seen[1]["staged_keys"]))
        self.assertEqual(key_fingerprint(OTHER), bare(seen[1]["public_key_sha256"]))

    def test_the_key_before(self):
        """After a change of key the old one's leaf is stale, and a new leaf for it a mismatch.

        --force takes it, and --key with the key of a version is a staged key as any other.
        """
        upstream = self.upstream(OTHER)
        self.lineage(NAME, upstream.source, FIRST)
        self.downstream.key(NAME, OTHER, "privkey-next.pem")
        self.assert_ended(self.seen("renew"), 0, "installed")
        upstream.switch(FIRST)
        self.assert_ended(self.seen("renew"), 1, "refused", "older")
        newest = again()
        upstream.switch(newest)
        self.assert_ended(self.seen("renew"), 1, "refused", "key-mismatch")
        seen = self.seen("renew", NAME, "--force", "--dry-run")
        self.assert_ended(seen, 0, "installed")
        self.assert_ended(self.seen(NAME, "--key", FIRST.key), 0, "installed")
        self.downstream.assert_fits(self, NAME, newest)

    def test_no_standard_input(self):
        """--key - where standard input is closed: one line in words."""
        python = self.wrapper('exec "$PYTHON" "$@" <&-')
        result = self.run_command(NAME, "--key", "-", python=python)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, "standard input")

    def test_a_key_file_that_is_none(self):
        """A --key that is missing: one line with the path, nothing written but the lock."""
        path = os.path.join(world.scratch(self), "missing.pem")
        result = self.cross("--from", "up.invalid", "--key", path)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, path)
        entries = set(self.downstream.snapshot()) - {"."}
        self.assertLessEqual(entries, {"certferry", "certferry/.lock"})


class DryRun(Scene):
    """Everything up to the verdict; nothing written, no hook run."""

    def test_first_crossing(self):
        """What would be, with a key that is not on disk; not even the config dir is made."""
        os.rmdir(self.downstream.config)
        arguments = ("--from", self.upstream().source, "--ca-file", AUTHORITY.root, "--key", "-")
        arguments += ("--deploy-hook", "exit 1", "--dry-run")
        seen = self.seen(NAME, *arguments, stdin=world.read(FIRST.key))
        self.assert_ended(seen, 0, "installed")
        self.assertTrue(json.loads(seen[0].out)["dry_run"])
        expected = {"changed": True, "domains": NAMES, "version": 1, "health": "ok"}
        self.assertEqual(expected, {key: seen[1][key] for key in expected})
        self.assertFalse(os.path.exists(self.downstream.config))

    def test_renew(self):
        """A rotation that would be, options that would change, a refusal."""
        log, lines = self.log()
        upstream = self.in_service(deploy_hook="echo ran >> " + log)
        self.downstream.hook("post", "post", "echo post >> " + log)
        self.downstream.hook("alert", "alert", "echo alert >> " + log)
        before = self.downstream.snapshot()
        upstream.switch(NEWER)
        seen = self.assert_ended(self.seen("renew", "--dry-run"), 0, "installed")
        expected = (2, True, fingerprint(NEWER))
        fields = ("version", "changed", "fingerprint_sha256")
        self.assertEqual(expected, tuple(seen[1][field] for field in fields))
        said = self.run_command("renew", "--dry-run").out
        self.assertRegex(said, "(?m)^  hook .*echo ran >> {}.*would run".format(log))
        upstream.switch(FIRST)
        self.assertNotIn("hook", self.run_command("renew", "--dry-run").out)
        seen = self.seen(NAME, "--dry-run", "--deploy-hook", "echo more >> " + log)
        self.assert_ended(seen, 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        seen = self.seen(NAME, "--dry-run", "--key", OTHER.key)
        self.assertTrue(seen[1]["changed"])
        upstream.switch(OTHER)
        self.assert_ended(self.seen("renew", "--dry-run"), 1, "refused", "key-mismatch")
        self.assertEqual(before, self.downstream.snapshot())
        self.assertEqual([], lines())

    def test_rollback(self):
        """Which version it would be."""
        self.in_service().switch(NEWER)
        self.assertEqual(0, self.run_command("renew").status)
        before = self.downstream.snapshot()
        seen = self.assert_ended(self.seen("rollback", NAME, "--dry-run"), 0, "installed")
        self.assertEqual((1, True), (seen[1]["version"], seen[1]["changed"]))
        self.assertEqual(before, self.downstream.snapshot())


class Force(Scene):
    """--force accepts what is older or for fewer names, and runs the hooks even if unchanged."""

    def test_what_it_takes(self):
        """Older, fewer names, what is unchanged; not a wrong name or key."""
        log, lines = self.log()
        hosts = {
            "older.example.com": OLDER,
            "fewer.example.com": again(["*.example.com"]),
            "same.example.com": FIRST,
            "names.example.com": SHOP,
            "key.example.com": OTHER,
        }
        upstream = self.upstream(hosts=hosts)
        hook = 'echo "$(basename $RENEWED_LINEAGE)" >> ' + log
        for name in hosts:
            self.copy_lineage(name, upstream.source, deploy_hook=hook)
        result, lineages = self.seen_all("renew", "--force", *hosts)
        ended = {name: (each["result"], each["reason"]) for name, each in lineages.items()}
        expected = {
            "older.example.com": ("installed", None),
            "fewer.example.com": ("installed", None),
            "same.example.com": ("unchanged", None),
            "names.example.com": ("refused", "names"),
            "key.example.com": ("refused", "key-mismatch"),
        }
        self.assertEqual((1, expected), (result.status, ended), result)
        for name in sorted(expected):
            shown = hosts[name] if expected[name][0] == "installed" else FIRST
            self.downstream.assert_fits(self, name, shown)
        self.assertEqual(["fewer", "older", "same"], [line.split(".")[0] for line in lines()])

    def test_what_was_rolled_back_from(self):
        """It comes back, and the hooks run."""
        log, lines = self.log()
        self.rolled_back()
        self.add_to_conf(deploy_hook="echo ran >> " + log)
        self.assert_ended(self.seen(NAME, "--force"), 0, "installed")
        self.downstream.assert_fits(self, NAME, NEWER)
        self.assertEqual(["ran"], lines())


class When(Scene):
    """--when due asks only when the certificate is due; certferry NAME always asks."""

    def test_not_due(self):
        """renew asks nobody; the command by name does."""
        upstream = self.in_service(when="due")
        self.assert_ended(self.seen("renew"), 0, "not-due")
        self.assertEqual(0, upstream.connections)
        self.assert_ended(self.seen(NAME), 0, "unchanged")
        self.assertGreater(upstream.connections, 0)

    def test_due(self):
        """From a third of the lifetime on, a half of a short one, it asks."""
        spans = {
            "early": (-59, 31),
            "late": (-61, 29),
            "early-week": (-3.9, 4.1),
            "late-week": (-4.1, 3.9),
        }
        hosts = {}
        for label, (begin, end) in spans.items():
            dates = {"not_before": world.days(begin), "not_after": world.days(end)}
            hosts[label + ".example.com"] = again(**dates)
        upstream = self.upstream(hosts=hosts)
        for name, credential in hosts.items():
            self.lineage(name, upstream.source, credential, when="due")
        _, lineages = self.seen_all("renew")
        results = [lineages[name]["result"] for name in hosts]
        self.assertEqual(["not-due", "unchanged", "not-due", "unchanged"], results)


class Remembered(Scene):
    """Options replace what was remembered, an empty value forgets, the rest is kept."""

    def lines(self):
        """Return the lines of the conf without the ca-file, which every test has."""
        return {line for line in self.conf().splitlines() if not line.startswith("ca-file")}

    def test_replace_forget_keep(self):
        """One command after the other, all unchanged crossings."""
        upstream = self.in_service(deploy_hook="true", timeout="9")
        source = "from = " + upstream.source
        seen = self.assert_ended(self.seen(NAME, "--deploy-hook", ":"), 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        self.assertEqual({source, "timeout = 9", "deploy-hook = :"}, self.lines())
        self.assertEqual(0, self.run_command(NAME, "--deploy-hook", "").status)
        self.assertEqual({source, "timeout = 9"}, self.lines())
        self.assertFalse(self.seen(NAME)[1]["changed"])
        self.assertEqual({source, "timeout = 9"}, self.lines())

    def test_blanks_around_a_value(self):
        """They are not remembered: the same again is nothing new, and blanks alone forget."""
        log, lines = self.log()
        self.in_service()
        for changed in (True, False):
            seen = self.seen(NAME, "--deploy-hook", " echo ran >> {} ".format(log))
            self.assert_ended(seen, 0, "unchanged")
            self.assertEqual((changed, ["ran"]), (seen[1]["changed"], lines()))
        self.assertEqual(0, self.run_command(NAME, "--deploy-hook", "  ").status)
        self.assertNotIn("deploy-hook", self.conf())

    def test_what_was_written_by_hand(self):
        """Comments stay, what is asked for changes, a last line without its end is no matter."""
        self.in_service()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("# the reload is quick\ndeploy-hook =\n    true\n    # twice\n    true\n")
            conf.write("when = always")
        self.assertEqual(0, self.run_command(NAME, "--timeout", "8").status)
        for line in ("# the reload is quick\n", "    # twice\n", "timeout = 8\n"):
            self.assertIn(line, self.conf())
        self.assertEqual(0, self.run_command("renew").status)

    def test_not_after_a_refusal_or_a_dry_run(self):
        """A mistake is not remembered, and changes neither state nor health."""
        self.in_service()
        before, record = self.conf(), self.record()
        other = self.upstream(OTHER)
        self.run_command(NAME, "--timeout", "8", "--dry-run")
        with world.Closed() as dead:
            for source in (other.source, dead.source):
                result = self.run_command(NAME, "--from", source)
                self.assertEqual(1, result.status)
                self.assertRegex(result.err, "options were not (kept|remembered)")
        self.assertEqual((before, record), (self.conf(), self.record()))
        self.assertEqual("ok", self.seen("status")[1]["health"])

    def test_a_run_that_could_not_begin(self):
        """A key that is not there, a broken environment file: the message says so as well."""
        self.in_service()
        for arguments in (("--key", "/nonexistent/key.pem"), ()):
            with self.subTest(arguments):
                result = self.run_command(NAME, "--timeout", "8", *arguments)
                self.assertEqual(1, result.status)
                self.assertRegex(result.err, "options were not (kept|remembered)")
            path = os.path.join(self.downstream.config, "certferry", "environment")
            world.write(path, "nonsense\n", 0o600)
        self.assertNotIn("timeout", self.conf())

    def test_a_service_of_a_failed_try(self):
        """It is not looked at: the status stays as it was, and no hook has to run again."""
        log, lines = self.log()
        upstream = self.in_service(deploy_hook="echo ran >> " + log)
        before, wrong = self.record(), self.upstream(OTHER)
        upstream.switch(OTHER)
        self.assertEqual(1, self.run_command(NAME, "--served-at", wrong.source).status)
        upstream.gone(self)
        self.assertEqual(1, self.run_command(NAME, "--served-at", wrong.source).status)
        self.assertEqual((0, before), (self.run_command("status").status, self.record()))
        self.assert_ended(self.seen("renew"), 0, "deferred", "unreachable")
        self.assertEqual((0, []), (wrong.connections, lines()))

    def test_written_before_the_first_crossing(self):
        """cloud-init: key, conf, timer."""
        self.lineage(NAME, self.upstream().source)
        before = self.conf()
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual(before, self.conf())

    def test_a_broken_conf(self):
        """File and line are named, nobody is asked, the certificate stays; status says unknown."""
        upstream = self.in_service(colour="green")
        where = "{} line {}".format(self.downstream.conf(NAME), len(self.conf().splitlines()))
        seen = self.assert_ended(self.seen("renew"), 1, "failed")
        self.assert_one_problem(seen[0], where, "colour")
        self.assertIn(where, seen[1]["detail"])
        self.assertEqual(1, self.run_command(NAME).status)
        self.assertEqual(3, self.run_command("status").status)
        self.assertEqual(0, upstream.connections)
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_records_that_others_can_write(self):
        """A conf, the environment, their folder: refused with path and, where it is that, owner."""
        upstream = self.in_service()
        records = os.path.join(self.downstream.config, "certferry")
        environment = world.write(os.path.join(records, "environment"), "A=b\n", 0o600)
        for path in (self.downstream.conf(NAME), environment, records):
            mode = os.stat(path).st_mode
            os.chmod(path, mode | 0o022)
            seen = self.assert_ended(self.seen("renew"), 1, "failed")
            self.assert_one_problem(seen[0], path)
            self.assertIn(path, seen[1]["detail"])
            os.chmod(path, mode)
        if ROOT:
            os.chown(environment, 12345, 12345)
            self.assert_one_problem(self.run_command("renew"), environment, "12345")
        self.assertEqual(0, upstream.connections)

    def test_disabled(self):
        """enabled = no: renew leaves the lineage out."""
        upstream = self.in_service(enabled="no")
        result, lineages = self.seen_all("renew")
        self.assertEqual((0, {}), (result.status, lineages))
        self.assertEqual(0, upstream.connections)


class Hooks(Scene):
    """Deploy and post hooks, as certbot runs them."""

    def test_order_and_environment(self):
        """The directory by name, then the lineage's own; certbot's variables; no credentials."""
        log, lines = self.log()
        say = 'echo "{} $RENEWED_LINEAGE $RENEWED_DOMAINS" >> ' + log
        for name in ("20-second", "10-first", "30-backup~"):
            self.downstream.hook("deploy", name, say.format(name))
        text = self.downstream.hook("deploy", "40-text", say.format("40-text"), mode=0o644)
        self.downstream.hook("pre", "pre", say.format("pre"))
        given = self.downstream.hook("deploy", "50-given", say.format("50-given"))
        facts = (
            'echo "own [$VAULT_TOKEN] [$VAULT_CACERT$AZURE_CLIENT_SECRET_FILE] $KEPT '
            '$(readlink /proc/self/fd/0) $PATH" >> ' + log
        )
        env = {
            "VAULT_TOKEN": "s.secret",
            "VAULT_CACERT": "/roots",
            "AZURE_CLIENT_SECRET_FILE": "/secret",
            "KEPT": "kept",
            "PATH": "/usr/bin:/bin",
        }
        self.downstream.key(NAME, FIRST)
        hooks = ("--deploy-hook", facts, "--deploy-hook", given, "-v")
        result = self.cross("--from", self.upstream().source, *hooks, env=env)
        self.assertEqual(0, result.status, result)
        self.assertIn(text, result.err)
        live = self.downstream.live(NAME)
        names = ("10-first", "20-second", "50-given")
        expected = ["{} {} example.com *.example.com".format(name, live) for name in names]
        self.assertEqual(expected, lines()[:3])
        (own,) = lines()[3:]
        self.assertRegex(own, r"\Aown \[\] \[\] kept /dev/null \S*/usr/sbin")
        self.assertIn(text, self.run_command("status").out)

    def test_what_a_hook_says(self):
        """Passed on to standard output, under --json to standard error; the new leaf is there."""
        log, lines = self.log()
        show = "openssl x509 -noout -fingerprint -sha256 -in $RENEWED_LINEAGE/fullchain.pem >> "
        upstream = self.in_service(deploy_hook="echo said; " + show + log)
        upstream.switch(NEWER)
        result = self.run_command("renew")
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertIn("said\n", result.out)
        newest = again()
        upstream.switch(newest)
        seen = self.seen(NAME)
        self.assertIn("said\n", seen[0].err)
        shown = [bare(line.partition("=")[2]) for line in lines()]
        self.assertEqual([fingerprint(NEWER), fingerprint(newest)], shown)

    def test_odd_hooks(self):
        """Closed output, no UTF-8, a reader of standard input: well, and what they leave as well.

        A chatty process in the background that keeps the output open is not waited for.
        """
        log, lines = self.log()
        hooks = (
            "(while sleep 0.1; do echo chatter || exit; done) & echo $! > " + log,
            "exec >&- 2>&-",
            "printf '\\377\\n'",
            "cat",
        )
        started = time.monotonic()
        upstream = self.in_service(deploy_hook="".join("\n    " + hook for hook in hooks))
        upstream.switch(NEWER)
        result = self.run_command("renew")
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(lines()[0]), signal.SIGKILL)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertLess(time.monotonic() - started, 60)
        self.assertIsNone(self.owed(2))

    def test_long_lists_of_names(self):
        """Over 32,000 characters are cut at a blank, with a warning, and the hooks run."""
        log, lines = self.log()
        count = 'echo "$(basename $0) ${#RENEWED_DOMAINS} ${RENEWED_DOMAINS##* }" >> ' + log
        self.downstream.hook("deploy", "deploy", count)
        self.downstream.hook("post", "post", count)
        label = ".".join(["x" * 60] * 3)
        names = ["n{:03}.{}.example.com".format(number, label) for number in range(170)]
        credential = again(NAMES + names)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", "file:" + credential.fullchain)
        self.assertEqual(0, result.status, result)
        self.assertIn("RENEWED_DOMAINS", result.err)
        for line, hook in zip(lines(), ("deploy", "post")):
            name, length, last = line.split()
            self.assertEqual(hook, name)
            self.assertTrue(31700 < int(length) <= 32000, line)
            self.assertIn(last, names)
        self.assertEqual(2, len(lines()))

    def test_post_hooks(self):
        """Once at the end of a run that deployed something, with the names of all."""
        log, lines = self.log()
        say = 'echo "[$RENEWED_DOMAINS] [$FAILED_DOMAINS]" >> ' + log
        self.downstream.hook("post", "once", say)
        hosts = {name: again([name]) for name in ("a.example.com", "b.example.com")}
        hosts["c.example.com"] = OTHER
        upstream = self.upstream(hosts=hosts)
        for name in hosts:
            self.lineage(name, upstream.source, FIRST, domain=name)
        self.assertEqual(1, self.run_command("renew").status)
        self.assertEqual(["[a.example.com b.example.com] [example.com *.example.com]"], lines())
        self.assertEqual(1, self.run_command("renew").status)
        self.assertEqual(1, len(lines()))

    def test_a_failed_post_hook(self):
        """Something failed, which is told; it is not tried again."""
        path = self.downstream.hook("post", "broken", "echo no >&2; exit 3")
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", self.upstream().source)
        self.assertIn(path, result.err)
        self.assertEqual(1, result.status)
        again_result = self.run_command("renew")
        self.assertEqual((0, ""), (again_result.status, again_result.err))

    def test_hooks_that_others_can_write(self):
        """Not run, and named; so is one in a folder of another user's."""
        log, lines = self.log()
        path = self.downstream.hook("deploy", "open", "echo ran >> " + log)
        os.chmod(path, 0o777)
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", self.upstream().source)
        self.assert_ended(seen, 1, "pending", "hook")
        self.assertIn(path, seen[0].err)
        self.assertEqual([], lines())


class Pending(Scene):
    """What a version still owes is in its folder, and is tried again until it succeeds."""

    def test_until_it_succeeds(self):
        """What finished is not run again; the failed line says all that one needs."""
        log, lines = self.log()
        ill = "echo ill >> {0}; test -e {0}.mended || {{ echo not found; exit 5; }}".format(log)
        self.downstream.hook("deploy", "1-well", "echo well >> " + log)
        path = self.downstream.hook("deploy", "2-ill", ill)
        self.downstream.key(NAME, FIRST)
        arguments = ("--from", self.upstream().source, "--deploy-hook", "echo own >> " + log)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, *arguments)
        self.assert_ended(seen, 1, "pending", "hook")
        self.assertTrue(seen[1]["changed"])
        self.assertEqual(["well", "ill", "own"], lines())
        problem = [line for line in seen[0].err.splitlines() if line.startswith("certferry:")]
        self.assertEqual(1, len(problem), seen)
        for words in ("installed", "5", "not found", path, "again", "Correct"):
            self.assertIn(words, problem[0])
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertIn("echo own", self.conf())
        self.assertEqual([path], self.owed(1))
        entry = self.downstream.snapshot()["archive/example.com@1/pending"]
        self.assertEqual(0o600, entry.mode)
        self.assertEqual(1, self.run_command("status").status)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assertEqual(["ill"], lines()[3:])
        world.write(log + ".mended", "")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual((["ill", "ill"], None), (lines()[3:], self.owed(1)))
        self.assertEqual(0, self.run_command("status").status)

    def owing(self, hook, **options):
        """Return an upstream whose certificate is in service and owes this one failing hook."""
        upstream = self.in_service(deploy_hook=hook, **options)
        upstream.switch(NEWER)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assertEqual([hook], self.owed(2))
        return upstream

    def test_beside_a_failure(self):
        """A hook that fails again does not hide that the source was not reached; both are tried."""
        log, lines = self.log()
        self.owing("echo ran >>{}; false".format(log)).gone(self)
        self.assert_ended(self.seen("renew"), 1, "failed", "unreachable")
        self.assertEqual(2, len(lines()))

    def test_a_try_with_another_hook(self):
        """One that failed leaves the hook that is owed, and runs neither."""
        log, lines = self.log()
        old = "echo old >> {0}; test -e {0}.mended".format(log)
        upstream = self.owing(old)
        new = ("--deploy-hook", "echo new >> " + log)
        upstream.switch(OTHER)
        self.assertEqual(1, self.run_command(NAME, *new).status)
        upstream.gone(self)
        self.assertEqual(1, self.run_command(NAME, *new).status)
        seen = self.seen(NAME, "--key", "/dev/null", *new)
        self.assert_ended(seen, 1, "refused", "no-key")
        self.assertEqual((["old"], [old]), (lines(), self.owed(2)))
        self.assertIn("deploy-hook = " + old + "\n", self.conf())
        world.write(log + ".mended", "")
        with world.Upstream(NEWER, port=upstream.port):
            self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["old", "old"], lines())

    def test_done_before_it_is_due(self):
        """With `when = due`: a hook that succeeded at last is not told as pending any more."""
        log, _ = self.log()
        upstream = self.owing("test -e " + log)
        self.add_to_conf(when="due")
        connections = upstream.connections
        world.write(log, "")
        self.assert_ended(self.seen("renew"), 0, "not-due")
        self.assertEqual(connections, upstream.connections)
        seen = self.seen("status")
        self.assertEqual((0, None, "ok"), (seen[0].status, seen[1]["reason"], seen[1]["health"]))

    def test_corrected_by_hand(self):
        """Where the one that is owed is not configured any more, all that are run."""
        log, lines = self.log()
        self.owing("ech0")
        good = "\n    echo one >> {0}\n    echo two >> {0}".format(log)
        world.write(self.downstream.conf(NAME), self.conf().replace("ech0", good))
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["one", "two"], lines())

    def test_what_is_owed_is_never_executed(self):
        """The lines of `pending` are compared with the configured hooks."""
        log, lines = self.log()
        self.in_service(deploy_hook="echo ran >> " + log)
        pending = self.downstream.archive(NAME, 1, "pending")
        world.write(pending, "touch {}.strange\n".format(log), 0o600)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual((["ran"], False), (lines(), os.path.exists(log + ".strange")))

    def test_corrected_by_command(self):
        """A hook given in place of one that failed runs; what had finished does not run again."""
        log, lines = self.log()
        good = "echo good >> " + log
        self.in_service(deploy_hook="\n    {}\n    ech0".format(good)).switch(NEWER)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        hooks = ("--deploy-hook", good, "--deploy-hook")
        self.assert_ended(self.seen(NAME, *hooks, "echo fixed >> " + log), 0, "unchanged")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["good", "fixed"], lines())
        self.assertEqual(1, self.run_command(NAME, *hooks, "ech0").status)
        self.assertEqual(["ech0"], self.owed(2))
        self.assert_ended(self.seen(NAME, "--deploy-hook", good), 0, "unchanged")
        self.assertEqual((["good", "fixed"], None), (lines(), self.owed(2)))

    def test_a_new_hook_runs_on_its_crossing(self):
        """One that is new to the lineage, though the certificate is not; an old one does not."""
        log, lines = self.log()
        old, new = "echo old >> " + log, "echo new >> " + log
        self.in_service(deploy_hook=old)
        seen = self.seen(NAME, "--deploy-hook", old, "--deploy-hook", new)
        self.assert_ended(seen, 0, "unchanged")
        self.assertEqual((["new"], None), (lines(), self.owed(1)))
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assert_ended(self.seen(NAME, "--deploy-hook", "exit 4"), 1, "pending", "hook")
        self.assertIn("deploy-hook = exit 4\n", self.conf())
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assert_ended(self.seen(NAME, "--deploy-hook", ""), 0, "unchanged")
        self.assertEqual((["new"], None), (lines(), self.owed(1)))

    def test_a_run_that_died_at_a_new_hook(self):
        """It is owed from before it is remembered, though no certificate is new."""
        log, lines = self.log()
        self.in_service()
        dies = "test -e {0} || {{ echo died > {0}; kill -9 $PPID; exit 1; }}; echo ran >> {0}"
        dies = dies.format(log)
        self.assertEqual(-9, self.run_command(NAME, "--deploy-hook", dies).status)
        self.assertEqual([dies], self.owed(1))
        self.assertEqual(1, self.run_command("status").status)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual((["died", "ran"], None), (lines(), self.owed(1)))


class Served(Scene):
    """--served-at: a deploy is finished when the service shows the new leaf."""

    def service(self, flag, then, **how):
        """Start a service that shows FIRST, and `then` once the file `flag` is there."""

        def reload(_):
            if os.path.exists(flag):
                service.switch(then)

        service = self.upstream(before=reload, **how)
        return service

    def test_at_once_and_late(self):
        """A hook that reloads in the background a second later: it is waited for."""
        log, lines = self.log()
        service = self.service(log + ".reload", NEWER)
        later = "echo ran >> {0}; (sleep 1; touch {0}.reload) > /dev/null 2>&1 &".format(log)
        upstream = self.in_service(served_at=service.source, deploy_hook=later)
        upstream.switch(NEWER)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual((["ran"], None), (lines(), self.owed(2)))

    def test_a_stale_service_is_found(self):
        """Each run looks; then the hooks run at the next one, and it looks again."""
        log, lines = self.log()
        service = self.service(log, FIRST)
        service.switch(OLDER)
        self.in_service(served_at=service.source, deploy_hook="echo ran >> " + log)
        seen = self.assert_ended(self.seen("renew"), 1, "pending", "not-served")
        begin = world.openssl("x509", "-in", OLDER.cert, "-noout", "-startdate").partition("=")[2]
        fullchain = self.downstream.live(NAME, "fullchain.pem")
        for word in (service.source, iso_time(begin.strip())[:10], fullchain):
            self.assertIn(word, seen[1]["detail"])
        self.assertEqual([], lines())
        self.assertEqual(1, self.run_command("status").status)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["ran"], lines())
        self.assertEqual(0, self.run_command("status").status)

    def test_several_one_of_them_down(self):
        """What does not answer is no proof, and named alone."""
        service = self.upstream()
        with world.Closed() as closed:
            both = "\n    {}\n    {}".format(service.source, closed.source)
            self.in_service(served_at=both)
            seen = self.assert_ended(self.seen("renew"), 1, "pending", "not-served")
        self.assertIn(closed.source, seen[1]["detail"])
        self.assertNotIn(service.source, seen[1]["detail"])

    def test_which_name_is_asked_for(self):
        """The lineage's own, never --sni: the first -d without *., else NAME; it is told."""
        service = self.upstream(SHOP, hosts={NAME: FIRST})
        self.in_service(served_at=service.source, sni="up.example.net")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual({NAME}, set(service.asked))
        del service.asked[:]
        self.add_to_conf(domain="\n    *.example.com\n    www.example.com")
        seen = self.assert_ended(self.seen("renew"), 1, "pending", "not-served")
        self.assertEqual({"www.example.com"}, set(service.asked))
        self.assertIn("www.example.com", seen[1]["detail"])

    def test_two_types_of_keys(self):
        """It is asked with our key's type; where it cannot be told to, that is a warning."""
        other = AUTHORITY.issue(NAMES, key="rsa:2048")
        both = self.upstream([FIRST, other])
        rsa_only = self.upstream(other, minimum="1.3")
        self.lineage("rsa.example.com", "file:" + other.fullchain, served_at=both.source)
        self.downstream.key("rsa.example.com", other)
        self.lineage("ecdsa.example.com", "file:" + FIRST.fullchain, served_at=both.source)
        self.lineage("other.example.com", "file:" + FIRST.fullchain, served_at=rsa_only.source)
        result = self.run_command("renew")
        self.assertEqual(0, result.status, result)
        self.assert_one_problem(result, rsa_only.source, "RSA", name="other.example.com")

    def test_first_crossing(self):
        """`certferry NAME --served-at` looks too, and keeps the option though a hook fails."""
        log, _ = self.log()
        service = self.service(log, FIRST)
        service.switch(OTHER)
        self.downstream.key(NAME, FIRST)
        arguments = ("--served-at", service.source, "--deploy-hook", "touch " + log)
        seen = self.seen(
            NAME, "--from", "file:" + FIRST.fullchain, *arguments, "--ca-file", AUTHORITY.root
        )
        self.assert_ended(seen, 0, "installed")
        self.assertGreater(service.connections, 0)
        self.assertIn("served-at = " + service.source, self.conf())

    if world.FULL:

        def test_never(self):
            """After fifteen seconds it is pending; the hooks run again at each run."""
            log, lines = self.log()
            service = self.upstream()
            upstream = self.in_service(served_at=service.source, deploy_hook="echo ran >> " + log)
            upstream.switch(NEWER)
            for count in (1, 2):
                started = time.monotonic()
                seen = self.seen("renew")
                self.assertEqual((1, "not-served"), (seen[0].status, seen[1]["reason"]), seen)
                self.assertTrue(14 < time.monotonic() - started < 40)
                self.assertEqual(count, len(lines()))
            service.switch(NEWER)
            self.assert_ended(self.seen("renew"), 0, "unchanged")


class Renew(Scene):
    """Every lineage of the config dir, going on after a failure."""

    def test_goes_on(self):
        """Refused, failed and installed side by side: each has its line, the document is sorted."""
        hosts = {"a.example.com": OTHER, "z.example.com": NEWER}
        upstream = self.upstream(hosts=hosts)
        for name in ("z.example.com", "a.example.com", "m.example.com"):
            self.lineage(name, upstream.source, FIRST)
        world.write(self.downstream.conf("m.example.com"), "from = a b\n")
        result = self.run_command("renew", "--json", "--dry-run")
        self.assertEqual(1, result.status)
        ended = [
            (lineage["name"], lineage["result"], lineage["reason"])
            for lineage in json.loads(result.out)["lineages"]
        ]
        self.assertEqual(
            [
                ("a.example.com", "refused", "key-mismatch"),
                ("m.example.com", "failed", None),
                ("z.example.com", "installed", None),
            ],
            ended,
        )
        result = self.run_command("renew")
        self.assertRegex(result.out, r"\Az\.example\.com: installed: [^\n]+\n\Z")
        problems = [line.split(": ")[:2] for line in result.err.splitlines()]
        expected = [["certferry", "a.example.com"], ["certferry", "m.example.com"]]
        self.assertEqual(expected, problems)
        seen = self.seen("renew", "z.example.com", "Z.Example.com", "*.z.example.com")
        self.assert_ended(seen, 0, "unchanged")

    def test_nothing_there(self):
        """No lineage is no failure; a NAME that is not there is one, and the others are named."""
        result = self.run_command("renew")
        self.assertEqual(0, result.status, result)
        self.assertIn("nothing is set up yet", result.out + result.err)
        self.in_service()
        result = self.run_command("renew", "examle.com")
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, "no such lineage", NAME, name="examle.com")

    def test_what_is_no_lineage(self):
        """A key alone, other tools' files, snapshots, a copy: left alone without a word."""
        upstream = self.in_service()
        self.downstream.key("key.example.com", FIRST)
        self.lineage("tool.example.com", upstream.source, FIRST)
        os.unlink(self.downstream.conf("tool.example.com"))
        for name in ("lost+found", ".snapshot", "@eaDir", "not a host"):
            self.downstream.key(name, FIRST)
        world.write(self.downstream.live("README"), "certbot's\n")
        copy = NAME + ".bak"
        shutil.copytree(self.downstream.live(NAME), self.downstream.live(copy), symlinks=True)
        before = self.downstream.snapshot()
        result, lineages = self.seen_all("renew")
        self.assertEqual((0, "", [NAME]), (result.status, result.err, list(lineages)))
        changed = world.changed(before, self.downstream.snapshot())
        self.assertLessEqual(set(changed), {STATE, "certferry"})
        result, lineages = self.seen_all("status")
        self.assertEqual((0, "", [NAME]), (result.status, result.err, list(lineages)))
        for name in ("key.example.com", copy):
            self.assertEqual(1, self.run_command("renew", name).status)

    def test_plain_files_are_left_as_they_are(self):
        """renew with nothing new leaves them, status says so; certferry NAME makes them links."""
        upstream = self.upstream()
        self.lineage(NAME, upstream.source, FIRST)
        before = self.downstream.snapshot()
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        changed = world.changed(before, self.downstream.snapshot())
        self.assertEqual(set(), {path for path in changed if not path.startswith("certferry")})
        self.assertRegex(self.run_command("status").out, "no links|not.* links")
        seen = self.assert_ended(self.seen(NAME), 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        self.assertEqual(".current/cert.pem", os.readlink(self.downstream.live(NAME, "cert.pem")))
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_certbots_own(self):
        """Refused with the way to take over; never touched; the others go on."""
        upstream = self.in_service()
        name = "certbot.example.com"
        folder = os.path.join(self.downstream.config, "archive", name)
        renewal = os.path.join(self.downstream.config, "renewal")
        for directory in (self.downstream.live(name), folder, renewal):
            os.makedirs(directory)
        for file in ("cert", "chain", "fullchain", "privkey"):
            path = getattr(FIRST, "key" if file == "privkey" else file)
            world.write(os.path.join(folder, file + "1.pem"), world.read(path), 0o600)
            target = "../../archive/{}/{}1.pem".format(name, file)
            os.symlink(target, self.downstream.live(name, file + ".pem"))
        conf = world.write(os.path.join(renewal, name + ".conf"), "version = 2.1.0\n")
        before = self.downstream.snapshot()
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        connections = upstream.connections
        seen = self.seen(name, "--from", upstream.source)
        self.assert_ended(seen, 1, "refused", "certbot")
        words = ("mv " + conf, "certbot delete", "certferry {} ".format(name), upstream.source)
        self.assert_one_problem(seen[0], *words, name=name)
        changed = world.changed(before, self.downstream.snapshot())
        self.assertLessEqual(set(changed), {STATE, "certferry"})
        self.assertEqual(connections, upstream.connections)

    def test_stray_confs(self):
        """An empty conf of certbot's, a whole one, a dangling link: a warning, and it goes on."""
        upstream = self.upstream(NEWER)
        renewal = os.path.join(self.downstream.config, "renewal")
        os.mkdir(renewal)
        world.write(os.path.join(renewal, "empty.example.com.conf"), "")
        world.write(os.path.join(renewal, "whole.example.com.conf"), "version = 2.1.0\n")
        os.symlink("nowhere", os.path.join(renewal, "dangling.example.com.conf"))
        for name in os.listdir(renewal):
            self.copy_lineage(name[: -len(".conf")], upstream.source)
        result, lineages = self.seen_all("renew")
        self.assertEqual((0, 3), (result.status, len(lineages)), result)
        for name, problem in zip(sorted(lineages), result.err.splitlines()):
            with self.subTest(name):
                self.assertEqual("installed", lineages[name]["result"])
                self.assertTrue(problem.startswith("certferry: {}: ".format(name)), problem)
                self.assertIn("renewal/{}.conf".format(name), problem)
        self.assertEqual(3, len(result.err.splitlines()), result)

    @unittest.skipUnless(ROOT, "only root can give a directory away")
    def test_another_users_directory(self):
        """Named with its owner; nobody is asked."""
        upstream = self.upstream()
        self.lineage(NAME, upstream.source, FIRST)
        os.chown(self.downstream.live(NAME), 12345, 12345)
        seen = self.assert_ended(self.seen("renew"), 1, "failed")
        self.assert_one_problem(seen[0], self.downstream.live(NAME), "12345")
        self.assertEqual(0, upstream.connections)


class Status(Scene):
    """What is here, how healthy it is, what is pending: from the disk alone."""

    def test_lines(self):
        """A line for monitoring, then one per lineage."""
        upstream = self.in_service()
        before = self.downstream.snapshot()
        result = self.run_command("status")
        self.assertEqual((0, ""), (result.status, result.err))
        first = result.out.splitlines()[0]
        self.assertRegex(first, r"\ACERTFERRY OK - .*'example\.com'=8[89]d;22;")
        (row,) = [line for line in result.out.splitlines() if line.startswith(NAME)]
        date = time.strftime("%Y-%m-%d", time.gmtime(os.stat(self.downstream.state(NAME)).st_mtime))
        self.assertRegex(row, r" ok .*\d+%.* {} +{}".format(upstream.source, date))
        self.assertIn("CERTFERRY OK", self.run_command("status", "-v").out)
        self.assertEqual(0, upstream.connections)
        self.assertEqual(before, self.downstream.snapshot())

    def test_what_is_wrong(self):
        """A refusal is told with its reason; the document remembers the last result."""
        self.in_service().switch(OTHER)
        self.run_command("renew")
        result, lineage = self.seen("status")
        ended = (result.status, lineage["result"], lineage["reason"], lineage["changed"])
        self.assertEqual((1, "refused", "key-mismatch", False), ended)
        self.assertEqual("warning", lineage["health"])
        self.assertEqual(FIELDS, list(lineage))
        self.assertIn("key-mismatch", self.run_command("status", NAME).out)

    if world.FULL:

        def test_health(self):
            """By the share that is left, by what is missing; the exit status is the worst one's."""
            spans = {"ok": (-1, 89), "due": (-61, 29), "warning": (-70, 20), "critical": (-85, 5)}
            spans["expired"] = (-91, -1)
            expected = {"expired": "critical", "unknown": "unknown", "misfit": "critical"}
            expected.update(missing="critical", days="warning")
            for case, (begin, end) in spans.items():
                dates = {"not_before": world.days(begin), "not_after": world.days(end)}
                expected.setdefault(case, case)
                self.lineage(case + ".example.com", "up.example.net", again(**dates))
            self.lineage("days.example.com", "up.example.net", FIRST, warn="90d")
            self.lineage("misfit.example.com", "up.example.net", FIRST)
            self.downstream.key("misfit.example.com", OTHER)
            self.lineage("missing.example.com", "up.example.net")
            self.lineage("unknown.example.com", "up.example.net", FIRST, colour="green")
            result, lineages = self.seen_all("status")
            # never having been ferried is a warning of its own
            seen = {name.partition(".")[0]: each["health"] for name, each in lineages.items()}
            expected.update(ok="warning", due="warning")
            self.assertEqual((2, expected), (result.status, seen))
            self.assertRegex(self.run_command("status").out, r"\ACERTFERRY CRITICAL - ")
            for names, status in ((("unknown", "warning"), 3), (("warning", "days"), 1)):
                names = [name + ".example.com" for name in names]
                self.assertEqual(status, self.run_command("status", *names).status)

    def test_silence(self):
        """No run for two days, no good exchange for a tenth of the lifetime, a time from ahead."""
        cases = {
            "recent": (47, {}, "ok", ""),
            "silent": (49, {}, "warning", "timer"),
            "ahead": (-24, {}, "warning", "timer"),
            "due": (24 * 10, {"when": "due"}, "ok", ""),
            "disabled": (24 * 10, {"enabled": "no"}, "ok", ""),
        }
        for case, (hours, options, _, _) in cases.items():
            name = case + ".example.com"
            self.copy_lineage(name, "up.example.net", **options)
            moment = time.time() - hours * 3600
            os.utime(self.downstream.state(name), (moment, moment))
        result = self.run_command("status")
        self.assertEqual(1, result.status)
        rows = {line.split(".")[0]: line for line in result.out.splitlines()[1:]}
        for case, (_, _, health, word) in cases.items():
            with self.subTest(case):
                self.assertIn(" {} ".format(health), rows[case])
                self.assertIn(word, rows[case])

    def test_twice_in_a_row(self):
        """What may be gone at the next run is a warning when it came twice."""
        path = os.path.join(world.scratch(self), "offer.pem")
        self.in_service()
        world.write(path, "no certificate\n")
        world.write(self.downstream.conf(NAME), "from = file:{}\n".format(path))
        for health in ("ok", "warning"):
            seen = self.assert_ended(self.seen("renew"), 1, "refused", "malformed")
            self.assertEqual(health, seen[1]["health"])
        world.write(path, world.read(FIRST.fullchain))
        self.assertEqual("ok", self.seen("renew")[1]["health"])

    def test_no_lineage(self):
        """None at all, and one that is not there: UNKNOWN."""
        for arguments in (("status",), ("status", NAME)):
            result = self.run_command(*arguments)
            self.assertEqual(3, result.status)
            self.assertTrue(result.out.startswith("CERTFERRY UNKNOWN - "), result)


class Alerts(Scene):
    """renewal-hooks/alert: who is woken, when, with what."""

    def setUp(self):
        super().setUp()
        self.path, self.lines = self.log()
        fields = "NAME WAS HEALTH REASON DAYS_LEFT NOT_AFTER DETAIL".split()
        text = "|".join("$CERTFERRY_" + field for field in fields)
        self.hook = self.downstream.hook("alert", "mail", 'echo "{}" >> {}'.format(text, self.path))

    def in_service(self, **options):
        """Keep the hook, which the copy of the config dir would lose."""
        script = world.read(self.hook).decode().partition("\n")[2].strip()
        upstream = super().in_service(**options)
        self.hook = self.downstream.hook("alert", "mail", script)
        return upstream

    def told(self):
        """Return [(was, health, reason)] of what was told since this was asked last."""
        lines = self.lines()
        if lines:
            os.unlink(self.path)
        return [tuple(line.split("|")[1:4]) for line in lines]

    def test_turns(self):
        """To bad health, within it and from it at once; neither a dry run nor status tells."""
        upstream = self.in_service()
        upstream.switch(OTHER)
        self.run_command("renew", "--dry-run")
        self.assertEqual([], self.told())
        self.run_command("renew")
        name, was, health, reason, left, not_after, detail = self.lines()[0].split("|")
        self.assertEqual((NAME, "ok", "warning"), (name, was, health))
        self.assertEqual("key-mismatch", reason)
        self.assertIn(int(left), (88, 89))
        end = world.openssl("x509", "-in", FIRST.cert, "-noout", "-enddate").partition("=")[2]
        self.assertEqual(iso_time(end.strip()), not_after)
        self.assertIn(upstream.source, detail)
        self.told()
        self.run_command("renew")
        self.run_command("status")
        self.assertEqual([], self.told())
        conf = self.conf()
        self.add_to_conf(critical="100%")
        self.run_command("renew")
        self.assertEqual([("warning", "critical", "key-mismatch")], self.told())
        world.write(self.downstream.conf(NAME), conf)
        upstream.switch(FIRST)
        self.run_command("renew")
        self.assertEqual([("critical", "ok", "")], self.told())

    if world.FULL:

        @world.needs("faketime")
        def test_daily(self):
            """While it lasts, once in a day, whatever the number of runs."""
            self.in_service(warn="100%")
            self.run_command("renew")
            for hours, times in ((12, 0), (24.1, 1), (36, 0)):
                python = world.under_clock(self, "+{}h".format(hours))
                self.told()
                self.run_command("renew", python=python)
                self.assertEqual(times, len(self.told()), hours)

    def test_told_means_that_a_hook_ran(self):
        """One that was refused has told nobody: it is told at the next run."""
        self.in_service(warn="100%")
        os.chmod(self.hook, 0o777)
        self.assertIn(self.hook, self.run_command("renew").err)
        self.assertEqual([], self.told())
        os.chmod(self.hook, 0o755)
        self.run_command("renew")
        self.assertEqual([("ok", "warning", "")], self.told())


class Metrics(Scene):
    """Prometheus's text format, whatever happened."""

    def read(self, path):
        """Return {(metric, lineage)}: value of a file, its form looked at."""
        found = {}
        for line in world.read(path).decode("ascii").splitlines():
            if line.startswith("#"):
                self.assertRegex(line, r"\A# (HELP certferry_\w+ \S.*|TYPE certferry_\w+ gauge)\Z")
                continue
            match = re.match(r'certferry_(\w+)(?:\{name="([a-z0-9.-]+)"\})? ([0-9.]+)\Z', line)
            self.assertTrue(match, line)
            found[match.group(1), match.group(2)] = float(match.group(3))
        return found

    def test_values(self):
        """One lineage is well, one fails, one is left out: each has its series."""
        upstream = self.in_service()
        self.lineage("broken.example.com", "a b", FIRST)
        self.lineage("away.example.com", "file:/nonexistent", FIRST)
        path = os.path.join(world.scratch(self), "certferry.prom")
        world.write(path, "what was there before\n", 0o600)
        python = self.wrapper('umask 077; exec "$PYTHON" "$@"')
        names = (NAME, "broken.example.com")
        started = int(time.time())
        result = self.run_command("renew", *names, "--metrics", path, python=python)
        self.assertEqual(1, result.status)
        found = self.read(path)
        self.assertEqual((0, 4), tuple(found["health", name] for name in names))
        self.assertIn(("health", "away.example.com"), found)
        self.assertGreaterEqual(found["last_success_timestamp_seconds", NAME], started)
        self.assertEqual(0, found["pending", NAME])
        self.assertIn(("certificate_not_after_timestamp_seconds", NAME), found)
        self.assertIn(("run_duration_seconds", None), found)
        self.assertEqual(0o644, stat.S_IMODE(os.stat(path).st_mode))
        self.assertEqual([os.path.basename(path)], os.listdir(os.path.dirname(path)))
        connections = upstream.connections
        self.run_command("status", "--metrics", path)
        self.assertIn(("health", NAME), self.read(path))
        self.assertEqual(connections, upstream.connections)

    def test_where(self):
        """CERTFERRY_METRICS in certferry/environment; the option wins; not in a dry run."""
        self.in_service()
        folder = world.scratch(self)
        usual, other = (os.path.join(folder, name) for name in ("usual.prom", "other.prom"))
        path = os.path.join(self.downstream.config, "certferry", "environment")
        world.write(path, "# for node_exporter\nCERTFERRY_METRICS={}\n".format(usual), 0o600)
        for arguments, files in (
            (("--dry-run", "--metrics", other), []),
            (("--metrics", other), ["other.prom"]),
            ((), ["other.prom", "usual.prom"]),
        ):
            self.assertEqual(0, self.run_command("renew", *arguments).status)
            self.assertEqual(files, sorted(os.listdir(folder)))

    def test_no_regular_file(self):
        """A FIFO, a folder, a link are refused before anything is done."""
        upstream = self.in_service()
        folder = world.scratch(self)
        fifo, link = os.path.join(folder, "fifo"), os.path.join(folder, "link")
        os.mkfifo(fifo)
        os.symlink("file", link)
        for path in (fifo, folder, link):
            result = self.run_command("renew", "--metrics", path)
            self.assertEqual((2, ""), (result.status, result.out))
            self.assertIn(path, result.err)
        self.assertEqual(0, upstream.connections)


class Output(Scene):
    """Lines, JSON, -q, -v, the journal, and what hostile text does to them."""

    def test_document(self):
        """Every field of a lineage, with its type; times in ISO 8601, UTC."""
        upstream = self.in_service()
        result = self.run_command("renew", "--json")
        document = json.loads(result.out)
        self.assertEqual((0, "", ["lineages"]), (result.status, result.err, list(document)))
        (lineage,) = document["lineages"]
        self.assertEqual(FIELDS, list(lineage))
        dates = ("-serial", "-startdate", "-enddate")
        shown = world.openssl("x509", "-in", FIRST.cert, "-noout", *dates)
        serial, begin, end = (line.partition("=")[2] for line in shown.splitlines())
        self.assertEqual(int(serial, 16), int(bare(lineage["serial"]), 16))
        self.assertEqual(fingerprint(FIRST), bare(lineage["fingerprint_sha256"]))
        self.assertEqual(key_fingerprint(FIRST), bare(lineage["public_key_sha256"]))
        expected = {
            "name": NAME,
            "result": "unchanged",
            "reason": None,
            "detail": None,
            "changed": False,
            "source": upstream.source,
            "not_before": iso_time(begin),
            "not_after": iso_time(end),
            "staged_keys": [],
            "domains": NAMES,
            "version": 1,
            "health": "ok",
        }
        self.assertEqual(expected, {key: lineage[key] for key in expected})

    def test_document_of_nothing(self):
        """Fields that do not apply are null; a refused offer is described in detail."""
        self.downstream.key(NAME, FIRST)
        upstream = self.upstream(AUTHORITY.issue(["shop.example.org"]))
        seen = self.seen(NAME, "--from", upstream.source)
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assertEqual(FIELDS, list(seen[1]))
        self.assertIn("shop.example.org", seen[1]["detail"])
        absent = "not_before not_after serial fingerprint_sha256 public_key_sha256 domains version"
        self.assertEqual({None}, {seen[1][key] for key in absent.split()})

    def test_quiet_and_verbose(self):
        """-q prints problems only, -v prints more."""
        upstream = self.in_service()
        quiet = self.run_command("renew", "-q")
        self.assertEqual((0, "", ""), tuple(quiet))
        plain, verbose = self.run_command("renew"), self.run_command("renew", "--verbose")
        self.assertIn("unchanged", verbose.out)
        self.assertGreater(len(verbose.out + verbose.err), len(plain.out + plain.err))
        upstream.switch(OTHER)
        quiet = self.run_command("renew", "-q")
        self.assertEqual((1, ""), (quiet.status, quiet.out))
        self.assert_one_problem(quiet)

    if world.FULL:

        def test_long_names(self):
            """What comes from a peer takes 300 characters at most."""
            label = ".".join(["x" * 60] * 3)
            names = ["h{}.{}.example.com".format(number, label) for number in range(30)]
            path = os.path.join(world.scratch(self), "offer.pem")
            self.lineage(NAME, "file:" + path)
            world.write(path, world.read(again(NAMES + names).fullchain))
            result = self.run_command("renew")
            match = re.match(r"example\.com: installed: (.*), valid until", result.out)
            self.assertTrue(match, result)
            self.assertLessEqual(len(match.group(1)), 300)
            offers = (AUTHORITY.issue(NAMES + names), AUTHORITY.issue(names), again(names))
            for number, credential in enumerate(offers):
                source = "file:" + credential.fullchain
                self.lineage("offer{}.example.com".format(number), source, FIRST)
            os.unlink(self.downstream.conf(NAME))
            result, lineages = self.seen_all(
                "renew", *["offer%d.example.com" % one for one in range(3)]
            )
            self.assertEqual(3, len(lineages))
            self.assertEqual({"refused"}, {lineage["result"] for lineage in lineages.values()})
            for text in result.err.splitlines() + [each["detail"] for each in lineages.values()]:
                shown = re.findall(r"\S*xxxx\S*", text)
                self.assertLessEqual(len(" ".join(shown)), 300, text)

    def test_hostile_names(self):
        """Escapes, line ends, right-to-left marks in an issuer's name: ASCII on one line."""
        nasty = "\x1b[2J\r\ncertferry: x: installed \u202e\u00e9 " + "A" * 20
        issuer = AUTHORITY.issue(
            [], subject="/O={0}/CN={0}".format(nasty), ca=True, issuer=AUTHORITY.root_credential
        )
        shown = AUTHORITY.issue([NAME], issuer=issuer, subject="/CN=" + nasty)
        self.in_service().switch(shown)
        seen = self.assert_ended(self.seen("renew"), 1, "refused", "key-mismatch")
        self.assert_one_problem(seen[0])
        self.assertRegex(seen[1]["detail"], r"\A[ -~]+\Z")
        self.assertRegex(self.record(), r"\A[ -~\n]+\Z")

    def test_hostile_paths(self):
        """Escapes in a path that an administrator was given: ASCII, in status too."""
        path = os.path.join(world.scratch(self), "a\x1b[31mb.pem")
        shutil.copy(FIRST.fullchain, path)
        self.downstream.key(NAME, FIRST)
        for result in (self.cross("--from", "file:" + path), self.run_command("status")):
            self.assertEqual((0, ""), (result.status, result.err))
            self.assertIn(r"a\x1b[31mb.pem", result.out)
            self.assertRegex(result.out, r"\A[ -~\n]+\Z")

    def test_languages_and_closed_outputs(self):
        """A bare C locale, closed output, a closed standard error that was the journal's."""
        self.in_service()
        result = self.run_command("renew", env={"LC_ALL": "C", "LANG": None})
        self.assertEqual((0, ""), (result.status, result.err))
        process = self.downstream.start("renew")
        process.stdout.close()
        with process:
            self.assertEqual(b"", process.stderr.read())
        self.assertEqual(0, process.returncode)
        closed = self.wrapper('exec "$PYTHON" "$@" 2>&-')
        result = self.run_command("renew", python=closed, env={"JOURNAL_STREAM": "8:12345"})
        self.assertEqual(0, result.status)
        self.assertIn("unchanged", result.out)

    def test_the_journal(self):
        """Priorities where it is the journal that reads, which says so by device and inode."""
        self.in_service().gone(self)
        self.lineage("b.example.com", "file:/nonexistent")
        path = world.write(os.path.join(world.scratch(self), "journal"), "")
        python = self.wrapper('exec "$PYTHON" "$@" 2>{}'.format(path))
        facts = os.stat(path)
        for inode, priorities in ((facts.st_ino, ["<3>", "<4>"]), (facts.st_ino + 1, ["cer"] * 2)):
            stream = "{}:{}".format(facts.st_dev, inode)
            self.run_command("renew", python=python, env={"JOURNAL_STREAM": stream})
            lines = world.read(path).decode().splitlines()
            self.assertEqual(priorities, sorted(line[:3] for line in lines), lines)


class BadInput(Scene):
    """One line that says what to do, the right exit status, no traceback, nothing written."""

    @unittest.skipUnless(ROOT, "only root can hide a command")
    @world.needs("unshare")
    def test_no_openssl(self):
        """A new certificate cannot be judged without it; status names the failure."""
        self.in_service().switch(NEWER)
        where = shutil.which("openssl")
        hidden = 'mount --bind /dev/null {} && exec "$0" "$@"'.format(where)
        python = self.wrapper('exec unshare -m sh -c \'{}\' "$PYTHON" "$@"'.format(hidden))
        for _ in "12":
            seen = self.assert_ended(self.seen("renew", python=python), 1, "failed")
            self.assert_one_problem(seen[0], "openssl", "nstall")
            self.assertIn("openssl", seen[1]["detail"])
        self.assertRegex(self.run_command("status").out, "failed for 2 runs.*openssl")
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_no_json(self):
        """Debian's minimal Python has no json: said before the work is done."""
        self.in_service()
        before, folder = self.downstream.snapshot(), world.scratch(self)
        world.write(os.path.join(folder, "json.py"), "raise ImportError('none', name='json')\n")
        for command in ("renew", "status"):
            result = self.run_command(command, "--json", env={"PYTHONPATH": folder})
            self.assertEqual("", result.out)
            self.assertGreater(result.status, 0)
            self.assertRegex(result.err, r"\Acertferry: [ -~]*json[ -~]*python3[ -~]*\n\Z")
        self.assertEqual(before, self.downstream.snapshot())

    def test_a_conf_that_cannot_be_written(self):
        """A failure after the deploy: the document has what is in service since."""
        conf = self.downstream.conf(NAME)
        self.downstream.key(NAME, FIRST)
        # a link to nowhere that comes during the run
        command = "ln -s nowhere {}; cat {}".format(conf, FIRST.fullchain)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", "exec:" + command)
        self.assertEqual((1, "failed"), (seen[0].status, seen[1]["result"]), seen)
        self.assert_one_problem(seen[0], conf)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertEqual(1, seen[1]["version"])

    def test_a_module_beside_it(self):
        """What lies in the folder of the script, one of downloads maybe, is not imported."""
        folder = world.scratch(self)
        for name in ("ssl", "json", "subprocess", "hashlib"):
            world.write(os.path.join(folder, name + ".py"), 'raise SystemExit("planted")\n')
        script = shutil.copy(world.CERTFERRY, os.path.join(folder, "certferry.py"))
        self.downstream.key(NAME, FIRST)
        python = self.wrapper('shift; exec "$PYTHON" {} "$@"'.format(script))
        arguments = ("--from", self.upstream().source, "--json")
        result = self.cross(*arguments, python=python)
        self.assertEqual((0, ""), (result.status, result.err))
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_a_command_as_source(self):
        """It runs with the hooks' PATH, in /: what works here works under cron."""
        log, lines = self.log()
        command = 'echo "$PWD $PATH" > {}; cat {}'.format(log, FIRST.fullchain)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", "exec:" + command, env={"PATH": "/usr/bin:/bin"})
        self.assertEqual((0, ""), (result.status, result.err))
        folder, path = lines()[0].split()
        self.assertEqual("/", folder)
        self.assertIn("/usr/local/bin", path.split(":"))
        self.assertIn("/usr/sbin", path.split(":"))

    def test_a_config_dir_that_is_none(self):
        """A file in its place."""
        path = world.write(os.path.join(world.scratch(self), "file"), "")
        for arguments, statuses in (((NAME,), (1,)), (("renew",), (0, 1)), (("status",), (3,))):
            result = self.run_command(*arguments + ("--config-dir", path), bare=True)
            self.assertIn(result.status, statuses, result)
            self.assertNotIn("Traceback", result.err)

    def test_a_config_dir_that_is_not_ours(self):
        """Unreadable, or for root: somebody else's. Each command is one line."""
        if ROOT:
            os.chown(self.downstream.config, 12345, 12345)
        else:
            os.chmod(self.downstream.config, 0)
            self.addCleanup(os.chmod, self.downstream.config, 0o700)
        for arguments in ((NAME, "--from", "up.invalid"), ("renew",)):
            result = self.run_command(*arguments)
            self.assertEqual((1, ""), (result.status, result.out))
            path = re.escape(self.downstream.config)
            self.assertRegex(result.err, r"\Acertferry: [ -~]*{}[ -~]*\n\Z".format(path))

    def test_a_state_that_is_damaged(self):
        """One notice line each; what it held is found out again."""
        upstream = self.upstream()
        texts = {"a": b"\0\xff\xfe", "b": b"[state]\nsince = tomorrow\n", "c": b"runs = many\n"}
        for label, text in texts.items():
            name = label + ".example.com"
            self.copy_lineage(name, upstream.source)
            world.write(self.downstream.state(name), text)
        result = self.run_command("renew")
        self.assertEqual(0, result.status, result)
        problems = result.err.splitlines()
        self.assertEqual(3, len(problems), problems)
        for label, problem in zip(sorted(texts), problems):
            self.assertIn(self.downstream.state(label + ".example.com"), problem)
        self.assertEqual(0, self.run_command("status").status)
        self.assertGreaterEqual(upstream.connections, 3)


class Lock(Scene):
    """Runs take turns by certferry/.lock; status and a dry run need not."""

    def path(self):
        """Return where the lock is."""
        return os.path.join(self.downstream.config, "certferry", ".lock")

    def test_a_second_run_waits(self):
        """It goes on when the first one is through; status does not wait."""
        upstream = self.in_service()
        with open(self.path(), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            process = self.downstream.start("renew")
            with process:
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.7)
                self.assertEqual(0, upstream.connections)
                self.assertEqual(0, self.run_command("status").status)
                fcntl.flock(file, fcntl.LOCK_UN)
                out = process.communicate(timeout=60)[0]
        self.assertEqual((0, True), (process.returncode, b"unchanged" in out))

    if world.FULL:

        def test_a_run_that_waits_in_vain(self):
            """After a minute it says who holds the lock: reason null."""
            self.in_service()
            with open(self.path(), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                seen = self.assert_ended(self.seen("renew", timeout=90), 1, "failed")
            self.assert_one_problem(seen[0], self.path())
            self.assertIn(self.path(), seen[1]["detail"])

    def test_a_hook_that_starts_certferry(self):
        """The run that waits for the hook holds the lock: said at once; status works."""
        log, lines = self.log()
        words = " ".join(shlex.quote(word) for word in world.command())
        command = "{} {{}} --config-dir {} >> {} 2>&1; echo {{}} $? >> {}".format(
            words, self.downstream.config, log, log
        )
        hooks = "\n    {}\n    {}".format(
            command.format("renew", "renew"), command.format("status -q", "status")
        )
        self.in_service(deploy_hook=hooks).switch(NEWER)
        started = time.monotonic()
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertLess(time.monotonic() - started, 40)
        self.assertIn("renew 1", lines())
        self.assertTrue([line for line in lines() if "hook" in line and "lock" in line], lines())
        self.assertTrue([line for line in lines() if re.match("status [01]$", line)], lines())

    def test_none_is_made_by_a_dry_run(self):
        """It takes the lock only where there is one."""
        upstream = self.in_service()
        os.unlink(self.path())
        self.assert_ended(self.seen("renew", "--dry-run"), 0, "unchanged")
        self.assertEqual(0, self.run_command("status").status)
        self.assertFalse(os.path.exists(self.path()))
        self.assertEqual(0, self.run_command("renew").status)
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.path()).st_mode))
        self.assertGreater(upstream.connections, 0)


class Advice(Scene):
    """What is advised is a whole command, with every option given, that works when pasted."""

    def setUp(self):
        super().setUp()
        self.folder = world.scratch(self)
        words = " ".join(shlex.quote(word) for word in world.command())
        # without the option it would set to work on this host
        here = (
            'case "$*" in *--config-dir*) exec {} "$@";; esac; echo which config dir? >&2; exit 9'
        )
        self.put("certferry", here.format(words))
        self.put("ssh", "cat " + FIRST.key)

    def put(self, name, script):
        """Put a shell script on the PATH of what is pasted."""
        world.write(os.path.join(self.folder, name), "#!/bin/sh\n" + script + "\n", 0o755)

    def advised(self, text, beginning):
        """Return the command in a text that begins with these words, without what is said then."""
        match = re.search(re.escape(beginning) + r".*", text)
        self.assertTrue(match, text)
        return re.split(r"\. (?:The|Then) | \((?:and|if|not)|, or ", match.group())[0]

    def paste(self, command):
        """Run a command as an administrator would, in another folder; return its Result."""
        path = self.folder + ":" + os.environ.get("PATH", os.defpath)
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.folder,
            env=dict(os.environ, PATH=path, HOME=self.folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return world.Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def test_no_key(self):
        """The upstream's key by ssh, piped into the same command, odd words and all."""
        log, lines = self.log()
        hook = "echo \"it's\" '$HOME' $(echo `echo here`) >> {}".format(log)
        arguments = ("--from", self.upstream().source, "--deploy-hook", hook, "--timeout", "9")
        result = self.cross(*arguments)
        done = self.paste(self.advised(result.err, "ssh "))
        self.assertEqual(0, done.status, done)
        self.assertIn("deploy-hook = {}\n".format(hook), self.conf())
        self.assertIn("timeout = 9\n", self.conf())
        self.assertEqual(1, len(lines()))

    def test_once_it_listens(self):
        """The same command again; then the line about hooks."""
        self.downstream.key(NAME, FIRST)
        with world.Closed() as dead:
            result = self.cross("--from", dead.source, "--sni", "example.com", "--no-timer")
            upstream = self.upstream(port=dead.port)
            command = self.advised(result.err, "certferry " + NAME)
            for word in (upstream.source, AUTHORITY.root, "--sni", "--no-timer"):
                self.assertIn(word, command)
            done = self.paste(command)
        self.assertEqual(0, done.status, done)
        command = self.advised(done.out, "certferry {} ".format(NAME))
        done = self.paste(command.replace("systemctl reload-or-restart nginx", "true"))
        self.assertEqual(0, done.status, done)
        self.assertIn("deploy-hook = true\n", self.conf())
        self.assertIn(upstream.source, self.conf())

    def test_force(self):
        """What is older or for fewer names, from the source that was asked."""
        upstream = self.in_service()
        other = self.upstream(FEWER)
        for source, credential in ((upstream, OLDER), (other, FEWER)):
            source.switch(credential)
            with self.subTest(source is other):
                arguments = () if source is upstream else ("--from", source.source)
                result = self.run_command(NAME, *arguments)
                self.assertEqual(1, result.status)
                done = self.paste(self.advised(result.err, "certferry "))
                self.assertEqual(0, done.status, done)
                self.downstream.assert_fits(self, NAME, credential)

    def test_what_was_rolled_back_from(self):
        """The way forward."""
        self.rolled_back()
        result = self.run_command("renew")
        done = self.paste(self.advised(result.err, "certferry renew"))
        self.assertEqual(0, done.status, done)
        self.downstream.assert_fits(self, NAME, NEWER)

    def test_a_changed_key(self):
        """The upstream's new key by ssh, in renew and in certferry NAME."""
        log, lines = self.log()
        upstream = self.in_service(deploy_hook="echo ran >> " + log)
        upstream.switch(OTHER)
        self.put("ssh", "cat " + OTHER.key)
        result = self.run_command("renew")
        done = self.paste(self.advised(result.err, "ssh "))
        self.assertEqual(0, done.status, done)
        self.downstream.assert_fits(self, NAME, OTHER)
        self.assertEqual(["ran"], lines())

    def test_a_wrong_key(self):
        """How to remove the key that was given by mistake."""
        result = self.cross("--from", self.upstream().source, "--key", OTHER.key)
        self.assertEqual(1, len(self.staged()))
        command = self.advised(result.err, "rm ").partition(")")[0]
        self.assertEqual(0, self.paste(command).status)
        self.assertEqual([], self.staged())

    def test_certbots(self):
        """Move its conf away, then the same command."""
        upstream = self.upstream()
        self.lineage(NAME, upstream.source, FIRST)
        os.unlink(self.downstream.conf(NAME))
        renewal = os.path.join(self.downstream.config, "renewal")
        os.mkdir(renewal)
        conf = world.write(os.path.join(renewal, NAME + ".conf"), "version = 2.1.0\n")
        result = self.cross("--from", upstream.source)
        self.assert_one_problem(result, "certbot")
        for beginning in ("mv " + conf, "certferry {} ".format(NAME)):
            command = self.advised(result.err, beginning)
            self.assertEqual(0, self.paste(command).status, command)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertTrue(os.path.exists(os.path.join(self.folder, NAME + ".conf")))

    def test_what_others_can_write(self):
        """chmod and chown, as they are told."""
        self.in_service()
        conf = self.downstream.conf(NAME)
        os.chmod(conf, 0o666)
        command = self.advised(self.run_command("renew").err, "chmod ")
        self.assertEqual(0, self.paste(command).status, command)
        if ROOT:
            os.chown(conf, 12345, 12345)
            command = self.advised(self.run_command("renew").err, "chown ")
            self.assertEqual(0, self.paste(command).status, command)
        self.assertEqual(0, self.run_command("renew").status)


if __name__ == "__main__":
    unittest.main()
