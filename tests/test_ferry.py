"""The real command against real TLS servers: arguments -> status, stdout, stderr, what is on disk.

One authority serves the whole module. FIRST and NEWER are for one key, OTHER is for another one.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import re
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

NAME = "example.com"
NAMES = [NAME, "*.example.com"]
FIELDS = """name result reason detail changed source not_before not_after serial fingerprint_sha256
    domains version health""".split()
STATE = "certferry/example.com.state"
AUTHORITY = STRANGER = FIRST = NEWER = OTHER = None


def setUpModule():
    """Mint what all tests share."""
    global AUTHORITY, STRANGER, FIRST, NEWER, OTHER
    AUTHORITY = world.Authority(world.scratch(), "Example Root")
    STRANGER = world.Authority(world.scratch(), "Another Root")
    FIRST = AUTHORITY.issue(NAMES)
    NEWER = AUTHORITY.issue(NAMES, key=FIRST.key)
    OTHER = AUTHORITY.issue(NAMES)


def again(names=NAMES, **how):
    """A certificate for FIRST's key: names, dates, extensions, issuer as Authority.issue says."""
    return AUTHORITY.issue(names, key=FIRST.key, **how)


class Scene(unittest.TestCase):
    """A downstream, and short ways to say what happens on it."""

    def setUp(self):
        self.downstream = world.Downstream(plain=True).started(self)
        self.run_command = self.downstream.run

    def upstream(self, credential=None, **how):
        """A TLS server with a credential, FIRST unless told otherwise, until the test ends."""
        return world.Upstream(credential or FIRST, **how).started(self)

    def cross(self, *arguments, **how):
        """certferry example.com --ca-file ROOT ...: a Result."""
        return self.run_command(NAME, "--ca-file", AUTHORITY.root, *arguments, **how)

    def gone(self, upstream):
        """Stop an upstream; its port is kept from others until the test ends."""
        upstream.gone(self)

    def in_service(self, *arguments, **how):
        """An upstream whose certificate the downstream has crossed; returns it."""
        upstream = self.upstream(how.get("credential"))
        self.downstream.key(NAME, how.get("credential") or FIRST)
        result = self.cross("--from", upstream.source, *arguments)
        self.assertEqual((0, ""), (result.status, result.err), result)
        return upstream

    def seen(self, *arguments, **how):
        """The Result of a command with --json, and the object of its only lineage."""
        result = self.run_command(*(arguments + ("--json",)), **how)
        document = json.loads(result.out)
        self.assertEqual(1, len(document["lineages"]), result)
        return result, document["lineages"][0]

    def assert_ended(self, seen, status, result, reason=None):
        """A command of one lineage ended so; its Result and object are returned for more."""
        self.assertEqual((status, result, reason),
                         (seen[0].status, seen[1]["result"], seen[1]["reason"]), seen)
        return seen

    def assert_one_problem(self, result, *words, **who):
        """Standard error is one line, `certferry: NAME: ...`, with these words in it."""
        start = "certferry: " + who.get("name", NAME) + ": "
        self.assertRegex(result.err, r"\A{}[ -~]+\n\Z".format(re.escape(start)))
        for word in words:
            self.assertIn(word, result.err)

    def log(self):
        """A new file's path, for hooks to append to, and a function that reads its lines."""
        path = os.path.join(world.scratch(self), "log")

        def lines():
            return world.read(path).decode().splitlines() if os.path.exists(path) else []
        return path, lines

    def record(self):
        """The text of the state file."""
        return world.read(self.downstream.state(NAME)).decode()


class FirstCrossing(Scene):
    """A private key on one server, a certificate on another, one command."""

    def test_installs_and_says_where(self):
        """The result, the paths, the cron line; one complete version behind links."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertRegex(result.out, r"\Aexample\.com: installed: example\.com \*\.example\.com, "
                         r"valid until \d{4}-\d\d-\d\d \(8[89] days\), from " + upstream.source)
        for file in ("fullchain.pem", "privkey.pem"):
            self.assertRegex(result.out, r"(?m)^  \S.* {}$".format(
                re.escape(self.downstream.live(NAME, file))))
        self.assertRegex(result.out, r"(?m)^.*cron.*certferry.* renew .*--config-dir {}$".format(
            re.escape(self.downstream.config)))
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertEqual(world.read(FIRST.key),
                         world.read(self.downstream.live(NAME, "privkey.pem")))
        self.assertEqual("../../archive/example.com@1",
                         os.readlink(self.downstream.live(NAME, ".current")))
        for file in ("cert", "chain", "fullchain", "privkey"):
            self.assertEqual(".current/{}.pem".format(file),
                             os.readlink(self.downstream.live(NAME, file + ".pem")))

    def test_the_cron_line(self):
        """What is to be put into cron works as it stands, wherever the config dir is."""
        upstream, config = self.upstream(), os.path.join(world.scratch(self), "let's encrypt")
        result = self.cross("--from", upstream.source, "--key", FIRST.key, "--config-dir", config,
                            bare=True)
        self.assertEqual((0, ""), (result.status, result.err))
        command = re.search(r"\d+ [\d,]+ \* \* \* (.+)", result.out).group(1)
        jitter = re.search(r" --jitter [0-9]+", command).group()
        upstream.switch(NEWER)
        done = subprocess.run(["/bin/sh", "-c", command.replace(jitter, " --jitter 0")],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((0, b""), (done.returncode, done.stdout))
        self.assertTrue(os.path.exists(os.path.join(config, "archive", NAME + "@2")))

    def test_modes(self):
        """Certificates 0644, the key as it was, the folders as their parents, the records 0700."""
        upstream = self.upstream()
        key = self.downstream.key(NAME, FIRST)
        os.chmod(key, 0o640)
        if os.geteuid() == 0:
            os.chown(key, 0, 12345)
        group = os.stat(key).st_gid
        self.cross("--from", upstream.source)
        entries = self.downstream.snapshot()
        self.assertEqual([0o644, 0o644, 0o644, 0o640], [
            entries["archive/example.com@1/{}.pem".format(file)].mode
            for file in ("cert", "chain", "fullchain", "privkey")])
        self.assertEqual([0o755, 0o755, 0o700], [entries[folder].mode for folder in (
            "archive", "archive/example.com@1", "certferry")])
        os.chmod(self.downstream.archive(NAME, 1), 0o710)
        upstream.switch(NEWER)
        self.assertEqual(0, self.run_command("renew").status)
        entries = self.downstream.snapshot()
        self.assertEqual(0o640, entries["archive/example.com@2/privkey.pem"].mode)
        self.assertEqual(0o710, entries["archive/example.com@2"].mode)
        for number in (1, 2):
            path = self.downstream.archive(NAME, number, "privkey.pem")
            self.assertEqual(group, os.stat(path).st_gid)

    def test_options_are_remembered_as_given(self):
        """The conf has what was given, as it was given, and renew needs no more."""
        upstream = self.in_service("-d", NAME, "--timeout", "7.5", "--deploy-hook", "date +%F",
                                   "--deploy-hook", "true")
        self.assertEqual(
            ["from = " + upstream.source, "domain = example.com",
             "ca-file = " + AUTHORITY.root, "deploy-hook =", "    date +%F", "    true",
             "timeout = 7.5"], world.read(self.downstream.conf(NAME)).decode().splitlines())
        upstream.switch(NEWER)
        self.assertEqual(0, self.run_command("renew").status)
        self.downstream.assert_fits(self, NAME, NEWER)

    def test_no_key(self):
        """Said with the path and what to do; nothing is written and nobody is asked."""
        upstream, before = self.upstream(), self.downstream.snapshot()
        result = self.cross("--from", upstream.source)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, "no private key in " + self.downstream.live(NAME),
                                "certferry example.com --key - --from " + upstream.source)
        seen = self.seen(NAME, "--from", "up.example.net:4433")
        self.assert_ended(seen, 1, "refused", "no-key")
        self.assert_one_problem(seen[0], "ssh up.example.net cat",
                                "--from up.example.net:4433 --config-dir " + self.downstream.config)
        self.assertEqual(before, self.downstream.snapshot())
        self.assertEqual(0, upstream.connections)

    def test_no_key_and_no_config_dir(self):
        """Without a key no config dir is made; with one it is."""
        upstream = self.upstream()
        os.rmdir(self.downstream.config)
        self.assertEqual(1, self.cross("--from", upstream.source).status)
        self.assertFalse(os.path.exists(self.downstream.config))
        self.assertEqual(0, self.cross("--from", upstream.source, "--key", FIRST.key).status)
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_unusable_keys(self):
        """An encrypted, a broken, an empty key and a certificate: no-key, in words, no network."""
        upstream = self.upstream()
        encrypted = world.openssl("pkey", "-in", FIRST.key, "-aes128", "-passout", "pass:secret")
        whole = world.read(FIRST.key).decode()
        for words, text in (("encrypted", encrypted), ("", whole[:90] + whole[-30:]), ("", ""),
                            ("", world.read(FIRST.cert).decode())):
            with self.subTest(words or text[:40]):
                path = self.downstream.key(NAME, FIRST)
                world.write(path, text)
                before = self.downstream.snapshot()
                seen = self.seen(NAME, "--from", upstream.source)
                self.assert_ended(seen, 1, "refused", "no-key")
                self.assert_one_problem(seen[0], path, words)
                self.assertEqual(before, self.downstream.snapshot())
        os.unlink(path)
        before = self.downstream.snapshot()
        result = self.run_command(NAME, "--from", upstream.source, "--key", "-", stdin=encrypted)
        self.assertEqual((1, before), (result.status, self.downstream.snapshot()))
        self.assertEqual(0, upstream.connections)

    def test_key_types(self):
        """RSA, two curves and Ed25519."""
        for kind in ("rsa:2048", "P-384", "ed25519"):
            with self.subTest(kind):
                credential = AUTHORITY.issue(NAMES, key=kind)
                name = kind.replace(":", "-").lower() + ".example.com"
                result = self.run_command(name, "--from", self.upstream(credential).source,
                                          "--key", credential.key, "--ca-file", AUTHORITY.root)
                self.assertEqual((0, ""), (result.status, result.err))
                self.downstream.assert_fits(self, name, credential)

    def test_key_forms(self):
        """Keys as older tools write them: PKCS 1, and EC parameters before the key."""
        rsa = AUTHORITY.issue(NAMES, key="rsa:2048")
        parameters = world.openssl("ecparam", "-name", "prime256v1")
        for credential, before in ((rsa, ""), (FIRST, parameters)):
            upstream = self.upstream(credential)
            key = before + world.openssl("pkey", "-in", credential.key, "-traditional")
            with world.Downstream() as downstream:
                result = downstream.run(NAME, "--from", upstream.source, "--ca-file",
                                        AUTHORITY.root, "--key", "-", stdin=key)
                self.assertEqual((0, ""), (result.status, result.err))
                downstream.assert_fits(self, NAME, credential)

    def test_a_key_that_others_can_read(self):
        """One warning line; its mode is the administrator's to change."""
        upstream = self.upstream()
        path = self.downstream.key(NAME, FIRST)
        os.chmod(path, 0o644)
        result = self.cross("--from", upstream.source)
        self.assertEqual(0, result.status)
        self.assert_one_problem(result, "privkey.pem")

    def test_a_key_that_lies(self):
        """A key file with another's public half: found out by the rehearsal, before the rename."""
        upstream = self.upstream()
        lying = world.write(self.downstream.key(NAME, FIRST), world._lying_key(
            world.read(FIRST.key)), 0o600)
        self.assertEqual(world.public_key(FIRST.cert), world.public_key(lying))
        for options in (["--dry-run"], []):
            seen = self.seen(NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root, *options)
            self.assert_ended(seen, 1, "refused", "rehearsal")
            self.assert_one_problem(seen[0])
        self.assertFalse(os.path.lexists(self.downstream.live(NAME, ".current")))

    def test_the_key_of_two_certificates_is_found(self):
        """A server with RSA and ECDSA gives the one for the key that is here."""
        rsa, ecdsa = AUTHORITY.issue(NAMES, key="rsa:2048"), AUTHORITY.issue(NAMES)
        upstream = self.upstream([rsa, ecdsa])
        self.downstream.key(NAME, rsa)
        self.assertEqual(0, self.cross("--from", upstream.source).status)
        self.downstream.assert_fits(self, NAME, rsa)

    def test_ipv6(self):
        """[::1]:PORT."""
        upstream = self.upstream(address="::1")
        self.assertRegex(upstream.source, r"\A\[::1\]:\d+\Z")
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertIn("from " + upstream.source, result.out)

    def test_which_name_is_asked_for(self):
        """The first -d without *., else NAME; --sni before both."""
        upstream = self.upstream(again(NAMES + ["www.example.com"]))
        self.downstream.key(NAME, FIRST)
        for wanted, arguments in (
                (NAME, ()), (NAME, ("-d", "*.example.com")),
                ("www.example.com", ("-d", "*.example.com", "-d", "www.example.com")),
                ("shop.example.net", ("--sni", "shop.example.net"))):
            del upstream.asked[:]
            self.assertEqual(0, self.cross("--from", upstream.source, *arguments).status)
            self.assertEqual({wanted}, set(upstream.asked))

    def test_wildcard_name(self):
        """*.example.com is lineage example.com with *.example.com required."""
        upstream = self.upstream(again([NAME]))
        self.downstream.key(NAME, FIRST)
        arguments = ("*.example.com", "--from", upstream.source, "--ca-file", AUTHORITY.root)
        self.assert_ended(self.seen(*arguments), 1, "refused", "names")
        upstream.switch(again(["*.example.com"]))
        self.assert_ended(self.seen(*arguments), 0, "installed")
        self.assertIn(b"domain = *.example.com\n", world.read(self.downstream.conf(NAME)))

    def test_either_name_will_do(self):
        """Without -d the certificate needs NAME or *.NAME."""
        for names in ([NAME], ["*.example.com"]):
            with world.Downstream() as downstream, world.Upstream(again(names)) as upstream:
                downstream.key(NAME, FIRST)
                self.assertEqual(0, downstream.run(NAME, "--from", upstream.source, "--ca-file",
                                                   AUTHORITY.root).status)

    def test_self_crossing(self):
        """NAME without --from is this very machine: it says so and asks for --from."""
        self.downstream.key("127.0.0.1", FIRST)
        seen = self.seen("127.0.0.1")
        self.assert_ended(seen, 1, "failed", "unreachable")
        self.assert_one_problem(seen[0], "this very machine", "--from", name="127.0.0.1")
        self.assertFalse(os.path.exists(self.downstream.conf("127.0.0.1")))

    def test_a_working_directory_that_is_gone(self):
        """A file by its absolute path is a good source all the same."""
        folder = world.scratch(self)
        python = world.write(os.path.join(folder, "python"), (
            "#!/bin/sh\nmkdir {0} && cd {0} && rmdir {0} && exec {1} \"$@\"\n".format(
                os.path.join(folder, "gone"), sys.executable)), 0o755)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", "file:" + FIRST.fullchain, python=python)
        self.assertEqual((0, ""), (result.status, result.err), result)
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_address_as_name(self):
        """A certificate for an IP address; no server name is sent for one."""
        credential = AUTHORITY.issue(["192.0.2.1"])
        upstream = self.upstream(credential)
        result = self.run_command("192.0.2.1", "--from", upstream.source, "--key", credential.key,
                                  "--ca-file", AUTHORITY.root)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertEqual({None}, set(upstream.asked))


class Unchanged(Scene):
    """The usual run finds nothing new and costs next to nothing."""

    def broken_openssl(self):
        """A folder for PATH, in which whoever runs openssl does not get far."""
        folder = world.scratch(self)
        os.chmod(folder, 0o755)
        world.write(os.path.join(folder, "openssl"), "#!/bin/sh\nexit 9\n", 0o755)
        return folder

    def test_one_handshake_and_the_states_time(self):
        """Exactly one handshake, no hook, no process but the network's, the state touched."""
        log, lines = self.log()
        upstream = self.in_service("--deploy-hook", "echo ran >> " + log)
        self.run_command("renew")
        handshakes, connections = upstream.handshakes, upstream.connections
        os.utime(self.downstream.state(NAME), (1, 1))
        before = self.downstream.snapshot()
        result, lineage = self.seen("renew", env={"PATH": self.broken_openssl()})
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertEqual(("unchanged", None, False),
                         (lineage["result"], lineage["reason"], lineage["changed"]))
        self.assertEqual(1, upstream.handshakes - handshakes)
        self.assertEqual(1, upstream.connections - connections)
        after = self.downstream.snapshot()
        self.assertEqual([STATE], world.changed(before, after))
        self.assertEqual(before[STATE].content, after[STATE].content)
        self.assertGreater(after[STATE].mtime_ns, before[STATE].mtime_ns)
        self.assertEqual(["ran"], lines())

    def test_a_second_certferry_name(self):
        """The same command again is unchanged and changes nothing."""
        upstream = self.in_service()
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", upstream.source)
        self.assert_ended(seen, 0, "unchanged")
        self.assertFalse(seen[1]["changed"])

    def test_names_and_clock_are_asked_all_the_same(self):
        """A current leaf that does not cover what the conf wants by now is refused."""
        self.in_service()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("domain = shop.example.org\n")
        self.assert_ended(self.seen("renew"), 1, "refused", "names")

    def test_new_requirements_judge_the_current_leaf(self):
        """With -d or --ca-file on the command line the current leaf has to pass every row."""
        upstream = self.in_service()
        for reason, arguments in (("names", ("-d", "shop.example.org")),
                                  ("untrusted", ("--ca-file", STRANGER.root))):
            seen = self.seen(NAME, "--from", upstream.source, *arguments)
            self.assert_ended(seen, 1, "refused", reason)
        self.assertNotIn(b"shop", world.read(self.downstream.conf(NAME)))

    def test_missing_links_are_made_again(self):
        """A live link that is gone beside .current is mended by renew."""
        self.in_service()
        os.unlink(self.downstream.live(NAME, "fullchain.pem"))
        self.assertEqual(0, self.run_command("renew").status)
        self.downstream.assert_fits(self, NAME, FIRST)


class Rotation(Scene):
    """The upstream renewed: the next run has the new certificate in service."""

    def test_renewed(self):
        """A second version, the first kept; the key is the same in a file of its own."""
        upstream = self.in_service()
        upstream.switch(NEWER, keep_sessions=True)
        seen = self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual((2, True), (seen[1]["version"], seen[1]["changed"]))
        self.downstream.assert_fits(self, NAME, NEWER)
        self.assertEqual(world.certificates(FIRST.cert),
                         world.certificates(self.downstream.archive(NAME, 1, "cert.pem")))
        keys = [os.stat(self.downstream.archive(NAME, number, "privkey.pem")) for number in (1, 2)]
        self.assertNotEqual(keys[0].st_ino, keys[1].st_ino)
        self.assertEqual(0, upstream.resumed)

    def test_no_session_is_resumed(self):
        """A server that would resume with its old certificate is not asked to."""
        upstream = self.upstream(maximum="1.2")
        self.downstream.key(NAME, FIRST)
        self.assertEqual(0, self.cross("--from", upstream.source).status)
        upstream.switch(NEWER, keep_sessions=True)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual(0, upstream.resumed)

    def test_newer_is_a_later_begin(self):
        """A move to shorter lifetimes is progress, a later end is not."""
        upstream = self.in_service()
        upstream.switch(again(not_after=world.days(6)))
        self.assert_ended(self.seen("renew"), 0, "installed")
        upstream.switch(again(not_before=world.days(-3), not_after=world.days(300)))
        self.assert_ended(self.seen("renew"), 1, "refused", "older")

    def test_a_name_less_where_that_was_said(self):
        """With -d the names given are all that must be covered."""
        upstream = self.in_service("-d", NAME)
        upstream.switch(again([NAME]))
        self.assert_ended(self.seen("renew"), 0, "installed")

    def test_two_of_the_same_second(self):
        """An equal begin is new once; the one that was replaced is a stale member of a pool."""
        begin = world.days(-2)
        first, second = (again(not_before=begin) for _ in "12")
        upstream = self.in_service(credential=first)
        upstream.switch(second)
        self.assert_ended(self.seen("renew"), 0, "installed")
        upstream.switch(first)
        self.assert_ended(self.seen("renew"), 1, "refused", "older")
        self.downstream.assert_fits(self, NAME, second)

    def test_another_chain_for_the_same_leaf(self):
        """An upstream that serves other issuers: the chain as written is what counts."""
        upstream = self.upstream(send=[AUTHORITY.intermediate.cert, AUTHORITY.root])
        self.downstream.key(NAME, FIRST)
        self.assertEqual(0, self.cross("--from", upstream.source).status)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assert_ended(self.seen("renew"), 0, "unchanged")

    def test_what_a_source_sends_along_with_the_current_leaf(self):
        """A root or a stranger beside the same chain is nothing to judge, trusted or not."""
        self.downstream.key(NAME, FIRST)
        path = os.path.join(world.scratch(self), "offer.pem")
        world.write(path, world.read(FIRST.fullchain) + world.read(AUTHORITY.root)
                    + world.read(STRANGER.intermediate.cert))
        self.assertEqual(0, self.cross("--from", "file:" + path).status)
        self.downstream.assert_fits(self, NAME, FIRST)
        conf = self.downstream.conf(NAME)
        world.write(conf, world.read(conf).replace(
            AUTHORITY.root.encode(), STRANGER.root.encode()))
        self.assert_ended(self.seen("renew"), 0, "unchanged")


class Chains(Scene):
    """What is written: leaf first, issuers in order, no root, nothing that does not belong."""

    def test_disorder(self):
        """A root, a stranger, a duplicate and a wrong order come out as they should be."""
        middle = AUTHORITY.issue([], subject="/CN=Upper", ca=True, issuer=AUTHORITY.root_credential,
                                 extensions=world.INTERMEDIATE.replace(",pathlen:0", ""))
        lower = AUTHORITY.issue([], subject="/CN=Lower", ca=True, issuer=middle)
        leaf = AUTHORITY.issue(NAMES, issuer=lower)
        upstream = self.upstream(leaf, send=[
            AUTHORITY.root, middle.cert, STRANGER.intermediate.cert, lower.cert, middle.cert,
            leaf.cert])
        self.downstream.key(NAME, leaf)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.downstream.assert_fits(self, NAME)
        self.assertEqual([world.certificates(path)[0] for path in (lower.cert, middle.cert)],
                         world.certificates(self.downstream.live(NAME, "chain.pem")))

    def test_one_offer_whole(self):
        """A pool with another certificate at each handshake: leaf and chain belong together."""
        issuers = [AUTHORITY.issue([], subject="/CN=Issuer " + number, ca=True,
                                   issuer=AUTHORITY.root_credential) for number in "12"]
        pool = [AUTHORITY.issue(NAMES, key=FIRST.key, issuer=issuer) for issuer in issuers]
        turns = []

        def rotate(_):
            turns.append(upstream.connections)
            upstream.switch(pool[len(turns) % 2])
        upstream = self.upstream(pool[0], before=rotate)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual((0, ""), (result.status, result.err))
        self.downstream.assert_fits(self, NAME)
        leaf = self.downstream.served_leaf(NAME)
        shown = [one for one in pool if world.certificates(one.cert)[0] == leaf]
        self.downstream.assert_fits(self, NAME, shown[0])


class Refusals(unittest.TestCase):
    """What an offer must pass, in CONTRACT's order, against a lineage in service.

    Nothing that is refused changes anything but the record, so all share one downstream.
    """

    seen, assert_ended = Scene.seen, Scene.assert_ended
    assert_one_problem = Scene.assert_one_problem

    @classmethod
    def setUpClass(cls):
        cls.downstream, cls.upstream = world.Downstream().__enter__(), world.Upstream(FIRST).start()
        cls.run_command = staticmethod(cls.downstream.run)
        cls.downstream.key(NAME, FIRST)
        cls.first = cls.downstream.run(NAME, "--from", cls.upstream.source, "--ca-file",
                                       AUTHORITY.root)

    @classmethod
    def tearDownClass(cls):
        cls.upstream.stop()
        cls.downstream.__exit__()

    def refuse(self, credential, reason, *words):
        """renew refuses the credential for that reason, in these words, and nothing moves."""
        self.assertEqual(0, self.first.status, self.first)
        self.upstream.switch(credential)
        before = self.downstream.snapshot()
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "refused", reason)
        self.assert_one_problem(seen[0], self.upstream.source, *words)
        self.assertIn(reason, world.read(self.downstream.state(NAME)).decode())
        self.assertEqual([], [path for path in world.changed(before, self.downstream.snapshot())
                              if path not in (STATE, "certferry")])
        self.assertEqual((False, 1), (seen[1]["changed"], seen[1]["version"]))
        self.assertEqual(hashlib.sha256(world.certificates(FIRST.cert)[0]).hexdigest(),
                         _bare(seen[1]["fingerprint_sha256"]))

    def test_names(self):
        """Another host's certificate; the common name does not count."""
        self.refuse(again(["www.example.org"]), "names", "www.example.org", "--sni")
        self.refuse(again([], subject="/CN=example.com"), "names")
        self.refuse(again(["*.com"]), "names")
        self.refuse(again(["www.example.com"]), "names")

    def test_validity(self):
        """The clock is outside."""
        self.refuse(again(not_before=world.days(-90), not_after=world.days(-1)), "expired")
        self.refuse(again(not_before=world.days(1)), "not-yet-valid")

    def test_trust(self):
        """No way to the root, or nothing that browsers take."""
        client = world.LEAF.replace("serverAuth", "clientAuth")
        for what, credential in (
                ("a stranger", STRANGER.issue(NAMES, key=FIRST.key)),
                ("itself", again(issuer="self")), ("a client", again(extensions=client)),
                ("an authority", again(extensions=world.LEAF.replace("CA:FALSE", "CA:TRUE"))),
                ("a weak digest", again(digest="sha1"))):
            with self.subTest(what):
                self.refuse(credential, "untrusted")

    def test_missing_chain(self):
        """A leaf without its issuer, as misconfigured servers send it."""
        bare = again()
        self.refuse(bare._replace(fullchain=bare.cert), "untrusted", "fullchain.pem")

    def test_too_many(self):
        """More than sixteen certificates are no chain."""
        crowd = os.path.join(os.path.dirname(NEWER.cert), "crowd.pem")
        others = [AUTHORITY.issue([], subject="/CN=Issuer {}".format(number), ca=True)
                  for number in range(15)]
        world.write(crowd, b"".join(world.read(one.cert) for one in
                                    [NEWER, AUTHORITY.intermediate] + others))
        self.refuse(NEWER._replace(fullchain=crowd), "malformed")

    def test_older(self):
        """An earlier begin, even with a later end."""
        self.refuse(again(not_before=world.days(-20), not_after=world.days(200)), "older")

    def test_names_lost(self):
        """Without -d no name of the current certificate may go."""
        self.refuse(again([NAME]), "names-lost", "*.example.com", "-d", "--force")

    def test_another_key(self):
        """The key changed upstream: what to do there and what to do here."""
        self.refuse(OTHER, "key-mismatch", "--reuse-key", "certferry example.com --key",
                    "ECDSA P-256", "more days")
        self.refuse(AUTHORITY.issue(["shop.example.org"]), "key-mismatch", "shop.example.org",
                    "--sni")

    def test_order(self):
        """An offer that breaks two rows is refused for the first."""
        past = {"not_before": world.days(-90), "not_after": world.days(-1)}
        older = {"not_before": world.days(-20)}
        for reason, credential in (
                ("key-mismatch", AUTHORITY.issue(["www.example.org"], **past)),
                ("names", again(["www.example.org"], **past)),
                ("expired", STRANGER.issue(NAMES, key=FIRST.key, **past)),
                ("untrusted", STRANGER.issue(NAMES, key=FIRST.key, **older)),
                ("older", again([NAME], **older))):
            with self.subTest(reason):
                self.refuse(credential, reason)


class Trust(Scene):
    """--ca-file replaces the system store."""

    def test_a_root_of_the_system_store_does_not_count(self):
        """The same root by SSL_CERT_FILE: trusted without --ca-file, not under another one."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        folder = world.scratch(self)
        os.chmod(folder, 0o755)  # the system store is read by whoever verifies
        store = world.write(os.path.join(folder, "store.pem"), world.read(AUTHORITY.root), 0o644)
        system = {"SSL_CERT_FILE": store}
        arguments = (NAME, "--from", upstream.source)
        seen = self.seen(*arguments + ("--ca-file", STRANGER.root), env=system)
        self.assert_ended(seen, 1, "refused", "untrusted")
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assert_ended(self.seen(*arguments), 1, "refused", "untrusted")
        self.assert_ended(self.seen(*arguments, env=system), 0, "installed")

    def test_a_ca_file_that_is_none(self):
        """A missing and an empty --ca-file: refused with the path."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        empty = world.write(os.path.join(world.scratch(self), "empty.pem"), "")
        for path in (empty, empty + ".missing"):
            result = self.run_command(NAME, "--from", upstream.source, "--ca-file", path)
            self.assertEqual(1, result.status)
            self.assert_one_problem(result, path)


class FirstMismatch(Scene):
    """The first key-mismatch of a lineage is mostly something in front of the upstream."""

    def refused(self, credential, *words):
        """Crossing to it is a key-mismatch with these words; nothing is remembered."""
        upstream = self.upstream(credential)
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source, "--deploy-hook", "true")
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, upstream.source, *words)
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assertFalse(os.path.lexists(self.downstream.live(NAME, ".current")))
        return result

    def test_a_cdn(self):
        """Right names, another key: the issuer is named, --from is the hint."""
        front = world.Authority(world.scratch(self), "Example Trust WE1")
        result = self.refused(front.issue(NAMES), "Example", NAME, "--from")
        self.assertNotIn("--reuse-key", result.err)

    def test_another_virtual_host(self):
        """Names that do not fit: --sni is the hint."""
        result = self.refused(AUTHORITY.issue(["shop.example.org"]), "shop.example.org", "--sni")
        self.assertNotIn("--reuse-key", result.err)


class Impostors(Scene):
    """Servers that show a certificate whose key they do not hold."""

    def test_no_proof_no_crossing(self):
        """A broken signature, an alert or the end in its place, in TLS 1.3 and 1.2."""
        self.downstream.key(NAME, FIRST)
        for version in ("1.3", "1.2"):
            for then in ("bad-signature", "alert", "close"):
                with self.subTest(version + " " + then):
                    impostor = world.Impostor(FIRST, version=version, then=then).started(self)
                    seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", impostor.source)
                    self.assert_ended(seen, 1, "refused", "unproven")
                    self.assert_one_problem(seen[0], impostor.source)
                    self.assertFalse(os.path.lexists(self.downstream.live(NAME, ".current")))
                    self.assertFalse(os.path.exists(self.downstream.conf(NAME)))

    def test_not_for_the_current_leaf_either(self):
        """Who shows the certificate in service without its key is no confirmation."""
        upstream = self.in_service()
        self.gone(upstream)
        with world.Impostor(FIRST, port=upstream.port):
            self.assert_ended(self.seen("renew"), 1, "refused", "unproven")

    def test_rsa_impostor(self):
        """The same with an RSA certificate, where a key exchange without signature exists."""
        rsa = AUTHORITY.issue(NAMES, key="rsa:2048")
        self.downstream.key(NAME, rsa)
        with world.Impostor(rsa, version="1.2") as impostor:
            self.assert_ended(self.seen(NAME, "--ca-file", AUTHORITY.root, "--from",
                                        impostor.source), 1, "refused", "unproven")

    def test_static_rsa(self):
        """A key exchange in which the server signs nothing is not taken."""
        rsa = AUTHORITY.issue(NAMES, key="rsa:2048")
        self.downstream.key(NAME, rsa)
        with world.StaticRsaOnly(rsa) as upstream:
            self.assert_ended(self.seen(NAME, "--ca-file", AUTHORITY.root, "--from",
                                        upstream.source), 1, "failed", "unreachable")
            self.assertEqual(0, upstream.handshakes)

    def test_old_tls(self):
        """TLS 1.2 at least."""
        self.downstream.key(NAME, FIRST)
        upstream = self.upstream(minimum="1.0", maximum="1.1")
        self.assert_ended(self.seen(NAME, "--from", upstream.source), 1, "failed", "unreachable")


class Unreachable(Scene):
    """No connection, no TLS, no answer in time."""

    def test_words(self):
        """Each says the source and its reason; nothing is remembered."""
        self.downstream.key(NAME, FIRST)
        for server in (world.Closed(), world.PlainHttp(), world.ClosesAtOnce(), world.Silent()):
            reason, seconds = ("timeout", "0.5") if type(server) is world.Silent else (
                "unreachable", "20")
            with self.subTest(type(server).__name__), server:
                seen = self.seen(NAME, "--from", server.source, "--timeout", seconds)
                self.assert_ended(seen, 1, "failed", reason)
                self.assert_one_problem(seen[0], server.source)
                self.assertFalse(os.path.exists(self.downstream.conf(NAME)))

    def test_a_name_that_does_not_resolve(self):
        """.invalid never does (RFC 6761)."""
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--from", "nowhere.invalid", "--timeout", "5")
        self.assertIn(seen[1]["reason"], ("unreachable", "timeout"))
        self.assert_one_problem(seen[0], "nowhere.invalid")

    def test_tomorrow_is_early_enough(self):
        """renew defers it while the certificate is well; certferry NAME fails."""
        upstream = self.in_service()
        self.gone(upstream)
        seen = self.seen("renew")
        self.assert_ended(seen, 0, "deferred", "unreachable")
        self.assert_one_problem(seen[0], upstream.source)
        self.assert_ended(self.seen(NAME), 1, "failed", "unreachable")

    def test_a_tenth_of_the_lifetime_is_too_late(self):
        """Nine days without a good exchange, or a clock that went back: renew fails."""
        self.gone(self.in_service())
        for moment in (world.days(-10), world.days(10)):
            os.utime(self.downstream.state(NAME), (moment, moment))
            self.assert_ended(self.seen("renew", "--dry-run"), 1, "failed", "unreachable")


class SeveralSources(Scene):
    """--from may repeat: in order until one gives an acceptable offer."""

    def test_the_next_one_helps(self):
        """A dead first source, a good second one, which is the one named."""
        self.downstream.key(NAME, FIRST)
        upstream = self.upstream()
        with world.Closed() as dead:
            seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", dead.source,
                             "--from", upstream.source)
            self.assert_ended(seen, 0, "installed")
            self.assertEqual(upstream.source, seen[1]["source"])
            self.assertIn("from =\n    {}\n    {}\n".format(dead.source, upstream.source),
                          world.read(self.downstream.conf(NAME)).decode())

    def test_the_first_good_one_is_enough(self):
        """The second is not asked when the first is well."""
        spare = self.upstream()
        self.in_service("--from", spare.source)
        self.assertEqual(0, spare.connections)

    def test_the_gravest_reason_counts(self):
        """key-mismatch before another refusal before unreachable before older."""
        upstream = self.in_service()
        upstream.switch(again(not_before=world.days(-20)))
        other, lost = self.upstream(OTHER), self.upstream(again([NAME]))
        with world.Closed() as dead:
            for reason, sources in (
                    ("key-mismatch", (dead, lost, other)), ("names-lost", (upstream, dead, lost)),
                    ("unreachable", (upstream, dead)), ("older", (upstream,))):
                arguments = [word for one in sources for word in ("--from", one.source)]
                seen = self.seen(NAME, *arguments)
                self.assertEqual((1, reason), (seen[0].status, seen[1]["reason"]), seen)

    def test_when_due_the_next_is_asked_too(self):
        """A source that still has the current leaf does not hide one that has a new one."""
        current = again(not_before=world.days(-80), not_after=world.days(10))
        stale, renewed = self.upstream(current), self.upstream(current)
        self.downstream.key(NAME, FIRST)
        self.cross("--from", stale.source, "--from", renewed.source)
        renewed.switch(NEWER)
        seen = self.seen("renew")
        self.assert_ended(seen, 0, "installed")
        self.assertEqual(renewed.source, seen[1]["source"])


class Keys(Scene):
    """--key, staged keys and the change of a key."""

    def staged(self):
        """Paths of staged keys."""
        folder = self.downstream.live(NAME)
        return [os.path.join(folder, file) for file in sorted(os.listdir(folder))
                if file.startswith("privkey-")]

    def test_from_standard_input_and_again(self):
        """--key - is the lineage's key where it has none; the same key again is nothing new."""
        upstream = self.upstream()
        result = self.cross("--from", upstream.source, "--key", "-", stdin=world.read(FIRST.key))
        self.assertEqual((0, ""), (result.status, result.err))
        path = self.downstream.archive(NAME, 1, "privkey.pem")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        self.assertNotIn(b"key =", world.read(self.downstream.conf(NAME)))
        seen = self.seen(NAME, "--key", FIRST.key)
        self.assert_ended(seen, 0, "unchanged")
        self.assertEqual((False, []), (seen[1]["changed"], self.staged()))

    def test_it_stays_though_the_crossing_fails(self):
        """A valid --key is kept; the next command needs it no more."""
        with world.Closed() as dead:
            self.assertEqual(1, self.cross("--from", dead.source, "--key", FIRST.key).status)
        self.assertEqual(world.read(FIRST.key),
                         world.read(self.downstream.live(NAME, "privkey.pem")))
        self.assertFalse(os.path.exists(self.downstream.conf(NAME)))
        self.assertEqual(0, self.cross("--from", self.upstream().source).status)

    def test_the_next_key_is_staged(self):
        """Stage, then the upstream switches: key and certificate change in one rename."""
        upstream = self.in_service()
        seen = self.seen(NAME, "--key", OTHER.key)
        self.assert_ended(seen, 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        (path,) = self.staged()
        self.assertEqual((0o600, world.read(OTHER.key)),
                         (stat.S_IMODE(os.stat(path).st_mode), world.read(path)))
        self.assert_ended(self.seen(NAME, "--key", OTHER.key), 0, "unchanged")
        self.assertEqual([path], self.staged())
        upstream.switch(OTHER)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.downstream.assert_fits(self, NAME, OTHER)
        self.assertEqual([], self.staged())
        upstream.switch(again())
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        seen = self.seen(NAME, "--key", FIRST.key)
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assertIn("retired", seen[0].err)
        self.assert_ended(self.seen("renew", NAME, "--force"), 0, "installed")

    def test_a_key_put_in_place_by_hand(self):
        """A privkey.pem over the link that does not fit yet is a staged key."""
        upstream = self.in_service()
        self.downstream.key(NAME, OTHER)
        self.assertEqual(0, self.run_command("renew").status)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertEqual(1, len(self.staged()))
        upstream.switch(OTHER)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.downstream.assert_fits(self, NAME, OTHER)

    def test_no_standard_input(self):
        """--key - where standard input is closed: one line in words."""
        done = subprocess.run(["/bin/sh", "-c", 'exec "$@" <&-', "sh", sys.executable,
                               world.CERTFERRY, NAME, "--key", "-", "--config-dir",
                               self.downstream.config],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((1, b""), (done.returncode, done.stdout))
        self.assertRegex(done.stderr, rb"\Acertferry: example\.com: [ -~]*standard input[ -~]*\n\Z")
        self.assertNotIn(b"object", done.stderr)

    def test_a_key_file_that_is_none(self):
        """A --key that is missing: one line with the path, nothing written."""
        before = self.downstream.snapshot()
        path = os.path.join(world.scratch(self), "missing.pem")
        result = self.cross("--from", "up.invalid", "--key", path)
        self.assertEqual((1, ""), (result.status, result.out))
        self.assert_one_problem(result, path)
        self.assertEqual(before, self.downstream.snapshot())

    def test_no_key_is_ever_shown(self):
        """Neither in what is printed nor in the records."""
        result = self.cross("--from", self.upstream().source, "-v", "--key", "-",
                            stdin=world.read(FIRST.key))
        secret = world.read(FIRST.key).decode().splitlines()[1]
        for text in (result.out, result.err, self.record(),
                     world.read(self.downstream.conf(NAME)).decode()):
            self.assertNotIn(secret, text)


class DryRun(Scene):
    """Everything up to the deploy; nothing written, no hook run."""

    def test_first_crossing(self):
        """What would be, with a key that is not on disk; not even the config dir is made."""
        upstream = self.upstream()
        os.rmdir(self.downstream.config)
        arguments = (NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root, "--key", "-",
                     "--deploy-hook", "exit 1", "--dry-run")
        status, document = self.downstream.json(*arguments, stdin=world.read(FIRST.key))
        lineage = document["lineages"][0]
        self.assertEqual((0, True, "installed", True), (
            status, document["dry_run"], lineage["result"], lineage["changed"]))
        self.assertEqual((NAMES, 1, "ok"), (
            lineage["domains"], lineage["version"], lineage["health"]))
        self.assertFalse(os.path.exists(self.downstream.config))

    def test_renew(self):
        """A rotation that would be, and options that would change."""
        log, lines = self.log()
        upstream = self.in_service("--deploy-hook", "echo ran >> " + log)
        upstream.switch(NEWER)
        self.downstream.hook("post", "post", "echo post >> " + log)
        before = self.downstream.snapshot()
        status, document = self.downstream.json("renew", "--dry-run")
        lineage = document["lineages"][0]
        self.assertEqual((0, "installed", 2, True),
                         (status, lineage["result"], lineage["version"], lineage["changed"]))
        self.assertEqual(hashlib.sha256(world.certificates(NEWER.cert)[0]).hexdigest(),
                         _bare(lineage["fingerprint_sha256"]))
        said = self.run_command("renew", "--dry-run").out
        self.assertIn("hook         echo ran >> {}: would run\n".format(log), said)
        upstream.switch(FIRST)
        self.assertNotIn("hook", self.run_command("renew", "--dry-run").out)
        seen = self.seen(NAME, "--dry-run", "--deploy-hook", "echo more >> " + log)
        self.assert_ended(seen, 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        self.assertFalse(self.seen("renew", "--dry-run")[1]["changed"])
        upstream.switch(OTHER)
        self.assert_ended(self.seen("renew", "--dry-run"), 1, "refused", "key-mismatch")
        self.assertEqual(before, self.downstream.snapshot())
        self.assertEqual(["ran"], lines())


class Force(Scene):
    """--force accepts older and names-lost and runs the hooks even if unchanged."""

    def test_older_and_names_lost(self):
        """Both are taken for a NAME; a wrong name or key is not."""
        upstream = self.in_service()
        for credential in (again(not_before=world.days(-20)), again([NAME])):
            upstream.switch(credential)
            self.assert_ended(self.seen("renew", NAME, "--force"), 0, "installed")
            self.downstream.assert_fits(self, NAME, credential)
        for reason, credential in (("names", again(["www.example.org"])), ("key-mismatch", OTHER)):
            upstream.switch(credential)
            self.assert_ended(self.seen("renew", NAME, "--force"), 1, "refused", reason)

    def test_the_hint_for_another_source(self):
        """One that is not remembered is not what `renew --force` would ask."""
        self.in_service(credential=NEWER)
        result = self.cross("--from", "file:" + FIRST.fullchain)
        self.assert_one_problem(result, "older", "--force takes it")
        self.assertNotIn("renew", result.err)

    def test_hooks_run_though_unchanged(self):
        """The same certificate, the hooks once more."""
        log, lines = self.log()
        self.in_service("--deploy-hook", "echo ran >> " + log)
        self.assert_ended(self.seen(NAME, "--force"), 0, "unchanged")
        self.assertEqual(["ran", "ran"], lines())


class When(Scene):
    """--when due asks only when the certificate is due; certferry NAME always asks."""

    def test_not_due(self):
        """renew asks nobody; the command by name does."""
        upstream = self.in_service("--when", "due")
        connections = upstream.connections
        self.assert_ended(self.seen("renew"), 0, "not-due")
        self.assertEqual(connections, upstream.connections)
        self.assert_ended(self.seen(NAME), 0, "unchanged")
        self.assertGreater(upstream.connections, connections)

    def test_due(self):
        """From a third of the lifetime on, a half of a short one, it asks."""
        for begin, end, due in ((-61, 29, True), (-59, 31, False), (-4.1, 3.9, True),
                                (-3.9, 4.1, False)):
            with self.subTest(begin), world.Downstream() as downstream:
                upstream = self.upstream(again(not_before=world.days(begin),
                                               not_after=world.days(end)))
                downstream.key(NAME, FIRST)
                downstream.run(NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root,
                               "--when", "due")
                status, document = downstream.json("renew")
                self.assertEqual((0, "unchanged" if due else "not-due"),
                                 (status, document["lineages"][0]["result"]))


class Remembered(Scene):
    """Options replace what was remembered, an empty value forgets, the rest is kept."""

    def conf(self):
        """The lines of the conf without the ca-file, which every test gives."""
        text = world.read(self.downstream.conf(NAME)).decode()
        return {line for line in text.splitlines() if not line.startswith("ca-file")}

    def test_replace_forget_keep(self):
        """One command after the other, all unchanged crossings."""
        upstream = self.in_service("--deploy-hook", "true", "--timeout", "9")
        source = "from = " + upstream.source
        seen = self.seen(NAME, "--deploy-hook", ":")
        self.assert_ended(seen, 0, "unchanged")
        self.assertTrue(seen[1]["changed"])
        self.assertEqual({source, "timeout = 9", "deploy-hook = :"}, self.conf())
        self.assertEqual(0, self.run_command(NAME, "--deploy-hook", "").status)
        self.assertEqual({source, "timeout = 9"}, self.conf())
        self.assertFalse(self.seen(NAME)[1]["changed"])
        self.assertEqual({source, "timeout = 9"}, self.conf())

    def test_blanks_around_a_value(self):
        """They are not remembered: the same again is nothing new, and blanks alone forget."""
        log, lines = self.log()
        self.in_service()
        for changed in (True, False):
            seen = self.seen(NAME, "--deploy-hook", " echo ran >> {} ".format(log))
            self.assert_ended(seen, 0, "unchanged")
            self.assertEqual((changed, ["ran"]), (seen[1]["changed"], lines()))
        self.assertEqual(0, self.run_command(NAME, "--deploy-hook", "  ").status)
        self.assertNotIn(b"deploy-hook", world.read(self.downstream.conf(NAME)))

    def test_comments_survive(self):
        """What was written by hand stays, and what is asked for changes."""
        self.in_service()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("# the reload is quick\ndeploy-hook =\n    true\n    # twice\n    true\n")
        self.assertEqual(0, self.run_command(NAME, "--timeout", "8").status)
        text = world.read(self.downstream.conf(NAME)).decode()
        for line in ("# the reload is quick\n", "    # twice\n", "timeout = 8\n"):
            self.assertIn(line, text)

    def test_a_conf_without_trailing_newline(self):
        """An editor that leaves none: the next option has a line of its own."""
        self.in_service()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("when = always")
        self.assertEqual(0, self.run_command(NAME, "--timeout", "8").status)
        self.assertEqual(0, self.run_command("renew").status)

    def test_not_after_a_refusal_or_a_dry_run(self):
        """A mistake is not remembered."""
        upstream = self.in_service()
        before = world.read(self.downstream.conf(NAME))
        other = self.upstream(OTHER)
        self.run_command(NAME, "--timeout", "8", "--dry-run")
        self.assertEqual(1, self.run_command(NAME, "--from", other.source).status)
        with world.Closed() as dead:
            self.assertEqual(1, self.run_command(NAME, "--from", dead.source).status)
        self.assertEqual(before, world.read(self.downstream.conf(NAME)))
        self.assertGreater(upstream.connections, 1)

    def test_a_service_of_a_failed_try(self):
        """It is not looked at: the status stays as it was, and no hook has to run again."""
        log, lines = self.log()
        upstream = self.in_service("--deploy-hook", "echo ran >> " + log)
        before, wrong = self.record(), self.upstream(OTHER)
        upstream.switch(OTHER)
        self.assertEqual(1, self.run_command(NAME, "--served-at", wrong.source).status)
        self.gone(upstream)
        self.assertEqual(1, self.run_command(NAME, "--served-at", wrong.source).status)
        self.assertEqual((0, before), (self.run_command("status").status, self.record()))
        self.assert_ended(self.seen("renew"), 0, "deferred", "unreachable")
        self.assertEqual(["ran"], lines())

    def test_written_before_the_first_crossing(self):
        """cloud-init: key, conf, timer."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        os.mkdir(os.path.join(self.downstream.config, "certferry"), 0o700)
        text = "# by cloud-init\nfrom = {}\nca-file = {}\n".format(upstream.source, AUTHORITY.root)
        world.write(self.downstream.conf(NAME), text)
        self.assert_ended(self.seen("renew"), 0, "installed")
        self.assertEqual(text, world.read(self.downstream.conf(NAME)).decode())

    def test_a_relative_path(self):
        """Given in root's shell, used by a timer that starts in /."""
        folder = os.path.dirname(self.downstream.config)
        world.write(os.path.join(folder, "root.pem"), world.read(AUTHORITY.root))
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.run_command(NAME, "--from", upstream.source, "--ca-file", "root.pem")
        self.assertIn(result.status, (0, 2), result)
        if result.status == 0:
            upstream.switch(NEWER)
            done = subprocess.run([sys.executable, world.CERTFERRY, "renew", "--config-dir",
                                   self.downstream.config], cwd="/", stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            self.assertIn(b"example.com: installed: ", done.stdout)

    def test_a_broken_conf(self):
        """File and line are named, nobody is asked, the certificate stays; status says unknown."""
        upstream = self.in_service()
        connections = upstream.connections
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("\ncolour = green\n")
        lines = len(world.read(self.downstream.conf(NAME)).splitlines())
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "failed")
        where = "{} line {}".format(self.downstream.conf(NAME), lines)
        self.assert_one_problem(seen[0], where, "colour")
        self.assertIn(where, seen[1]["detail"])
        self.assertEqual(1, self.run_command(NAME).status)
        self.assertEqual(3, self.run_command("status").status)
        self.assertEqual(connections, upstream.connections)
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_a_conf_that_others_can_write(self):
        """It is refused with its path."""
        self.in_service()
        os.chmod(self.downstream.conf(NAME), 0o666)
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "failed")
        self.assert_one_problem(seen[0], self.downstream.conf(NAME))
        self.assertIn(self.downstream.conf(NAME), seen[1]["detail"])

    def test_disabled(self):
        """enabled = no: renew leaves the lineage out."""
        upstream = self.in_service()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("enabled = no\n")
        connections = upstream.connections
        status, document = self.downstream.json("renew")
        self.assertEqual((0, []), (status, document["lineages"]))
        self.assertEqual(connections, upstream.connections)


class Hooks(Scene):
    """Deploy and post hooks, as certbot runs them."""

    def test_pending_beside_a_failure(self):
        """A hook that fails again does not hide that the source was not reached."""
        upstream, (path, lines) = self.upstream(), self.log()
        self.downstream.key(NAME, FIRST)
        self.cross("--from", upstream.source, "--deploy-hook", "echo ran >>{}; false".format(path))
        self.gone(upstream)
        self.assert_ended(self.seen("renew"), 1, "failed", "unreachable")
        self.assertEqual(2, len(lines()))

    def test_order_and_environment(self):
        """The directory by name, then the lineage's own; certbot's variables; no credentials."""
        log, lines = self.log()
        say = 'echo "{} $RENEWED_LINEAGE $RENEWED_DOMAINS" >> ' + log
        for name in ("20-second", "10-first", "30-backup~"):
            self.downstream.hook("deploy", name, say.format(name))
        self.downstream.hook("deploy", "40-text", say.format("40-text"), mode=0o644)
        self.downstream.hook("pre", "pre", say.format("pre"))
        facts = ('echo "own [$VAULT_TOKEN] [$VAULT_CACERT$AZURE_CLIENT_SECRET_FILE] $KEPT '
                 '$(readlink /proc/self/fd/0) $PATH" >> ' + log)
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source, "--deploy-hook", facts, env={
            "VAULT_TOKEN": "s.secret", "VAULT_CACERT": "/roots",
            "AZURE_CLIENT_SECRET_FILE": "/secret", "KEPT": "kept", "PATH": "/usr/bin:/bin"})
        self.assertEqual((0, ""), (result.status, result.err))
        live = self.downstream.live(NAME)
        first, second, own = lines()
        self.assertEqual("10-first {} example.com *.example.com".format(live), first)
        self.assertEqual("20-second {} example.com *.example.com".format(live), second)
        self.assertRegex(own, r"\Aown \[\] \[\] kept /dev/null \S*/usr/sbin")

    def test_the_new_certificate_is_in_place(self):
        """A hook reads the new leaf behind the live link."""
        log, lines = self.log()
        upstream = self.in_service(
            "--deploy-hook", 'openssl x509 -noout -fingerprint -sha256 -in '
            '"$RENEWED_LINEAGE/fullchain.pem" >> ' + log)
        upstream.switch(NEWER)
        self.run_command("renew")
        marks = [_bare(line.partition("=")[2]) for line in lines()]
        self.assertEqual([hashlib.sha256(world.certificates(one.cert)[0]).hexdigest()
                          for one in (FIRST, NEWER)], marks)

    def test_a_file_given_by_path_runs_once(self):
        """certbot's habit: --deploy-hook with a file of the directory."""
        log, lines = self.log()
        path = self.downstream.hook("deploy", "reload", "echo ran >> " + log)
        self.in_service("--deploy-hook", path)
        self.assertEqual(["ran"], lines())

    def test_output_is_passed_on(self):
        """To standard output, under --json to standard error; the hook is named as done."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source, "--deploy-hook", "echo said")
        self.assertIn("said\n", result.out)
        self.assertRegex(result.out, r"(?m)^  hook +echo said: done")
        upstream.switch(NEWER)
        seen = self.seen("renew")
        self.assertIn("said\n", seen[0].err)

    def test_a_daemon_may_stay(self):
        """What a hook leaves in the background is not waited for."""
        log, lines = self.log()
        began = time.monotonic()
        self.in_service("--deploy-hook", "sleep 60 & echo $! > " + log)
        os.kill(int(lines()[0]), signal.SIGKILL)
        self.assertLess(time.monotonic() - began, 50)

    def test_a_daemon_may_still_write(self):
        """What it leaves behind says a word before it closes its output: that does not end it."""
        pid = os.path.join(world.scratch(self), "pid")
        # $(...) takes the child a moment, so that its word comes when the hook itself has ended
        hook = ("set -x; setsid sleep $(expr 99 + 1) </dev/null >/dev/null 2>&1 & "
                "echo $! > {}; :".format(pid))
        for count in range(10):
            if count:
                self.assertEqual(0, self.run_command("renew", NAME, "--force").status)
            else:
                self.in_service("--deploy-hook", hook)
            number = int(world.read(pid))
            try:
                world.eventually(functools.partial(_is_asleep, number), 20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)

    def test_post_hooks(self):
        """Once at the end of a run that deployed something, with the names of all."""
        log, lines = self.log()
        self.downstream.hook("post", "once",
                             'echo "[$RENEWED_DOMAINS] [$FAILED_DOMAINS]" >> ' + log)
        upstreams = []
        for name in ("a.example.com", "b.example.com", "c.example.com"):
            credential = AUTHORITY.issue([name], key=FIRST.key)
            upstreams.append(self.upstream(credential))
            self.downstream.key(name, FIRST)
            self.run_command(name, "--from", upstreams[-1].source, "--ca-file", AUTHORITY.root)
        self.assertEqual(3, len(lines()))
        self.assertEqual("[c.example.com] []", lines()[-1])
        self.assertEqual(0, self.run_command("renew").status)
        self.assertEqual(3, len(lines()))
        for upstream, name in zip(upstreams, ("a.example.com", "b.example.com")):
            upstream.switch(AUTHORITY.issue([name], key=FIRST.key))
        upstreams[2].switch(AUTHORITY.issue(["c.example.com"]))
        self.assertEqual(1, self.run_command("renew").status)
        self.assertEqual("[a.example.com b.example.com] [c.example.com]", lines()[-1])
        self.assertEqual(4, len(lines()))

    def test_a_failed_post_hook(self):
        """A problem line, exit 1, and that is all: it is not tried again."""
        path = self.downstream.hook("post", "broken", "echo no >&2; exit 3")
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual(1, result.status)
        self.assertIn(path, result.err)
        self.assertEqual(0, self.run_command("renew").status)

    def test_what_did_not_finish_is_tried_again(self):
        """Pending until it succeeds; what finished is not run again; options are remembered."""
        log, lines = self.log()
        mended = log + ".mended"
        self.downstream.hook("deploy", "1-well", "echo well >> " + log)
        self.downstream.hook("deploy", "2-ill", "echo ill >> {}; test -e {}".format(log, mended))
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", upstream.source,
                         "--deploy-hook", "echo own >> " + log)
        self.assert_ended(seen, 1, "pending", "hook")
        self.assertIn("2-ill", seen[0].err)
        self.assertTrue(seen[1]["changed"])
        self.assertEqual(["well", "ill", "own"], lines())
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertTrue(os.path.exists(self.downstream.conf(NAME)))
        self.assertEqual(1, self.run_command("status").status)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assertEqual(["ill"], lines()[3:])
        world.write(mended, "")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["ill", "ill"], lines()[3:])
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(5, len(lines()))
        self.assertEqual(0, self.run_command("status").status)

    def test_a_try_with_another_hook(self):
        """One that failed leaves the hook that is owed, and does not run the other one."""
        log, lines = self.log()
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        old, new = "echo old >> {0}; test -e {0}.mended".format(log), "echo new >> " + log
        self.assertEqual(1, self.cross("--from", upstream.source, "--deploy-hook", old).status)
        upstream.switch(OTHER)
        self.assertEqual(1, self.run_command(NAME, "--deploy-hook", new).status)
        self.gone(upstream)
        self.assertEqual(1, self.run_command(NAME, "--deploy-hook", new).status)
        self.assertEqual({"old"}, set(lines()))
        world.write(log + ".mended", "")
        tried = len(lines())
        with world.Upstream(FIRST, port=upstream.port):
            self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["old"], lines()[tried:])

    def test_a_try_with_an_unusable_key(self):
        """Refused before anything: its hook is not run, the hook that is owed still is."""
        log, lines = self.log()
        self.downstream.key(NAME, FIRST)
        upstream, old = self.upstream(), "echo old >> {0}; test -e {0}.mended".format(log)
        self.assertEqual(1, self.cross("--from", upstream.source, "--deploy-hook", old).status)
        seen = self.seen(NAME, "--key", "/dev/null", "--deploy-hook", "touch {}.new".format(log))
        self.assert_ended(seen, 1, "refused", "no-key")
        self.assertFalse(os.path.exists(log + ".new"))
        self.assertIn("deploy-hook = " + old + "\n",
                      world.read(self.downstream.conf(NAME)).decode())
        world.write(log + ".mended", "")
        tried = len(lines())
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual((["old"], False), (lines()[tried:], os.path.exists(log + ".new")))

    def test_done_before_it_is_due(self):
        """With `when = due`: a hook that succeeded at last is not told as pending any more."""
        log, _ = self.log()
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        self.assertEqual(1, self.cross("--from", upstream.source, "--when", "due",
                                       "--deploy-hook", "test -e " + log).status)
        world.write(log, "")
        self.assert_ended(self.seen("renew"), 0, "not-due")
        self.assert_ended(self.seen("status"), 0, "unchanged")

    def test_corrected_by_hand(self):
        """What stands in the conf in place of a hook that failed is run instead."""
        log, lines = self.log()
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        self.assertEqual(1, self.cross("--from", upstream.source, "--deploy-hook", "ech0").status)
        conf = self.downstream.conf(NAME)
        world.write(conf, world.read(conf).replace(b"ech0", b"echo ran >> " + log.encode()))
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["ran"], lines())

    def test_corrected_by_command(self):
        """A hook given in place of one that failed runs; what had finished does not run again."""
        log, lines = self.log()
        good = "echo good >> " + log
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        hooks = ["--deploy-hook", good, "--deploy-hook"]
        self.assertEqual(1, self.cross("--from", upstream.source, *hooks + ["ech0"]).status)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assert_ended(self.seen(NAME, *hooks + ["echo fixed >> " + log]), 0, "unchanged")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["good", "fixed"], lines())
        self.assertEqual(1, self.run_command(NAME, *hooks + ["ech0"]).status)
        self.assert_ended(self.seen(NAME, "--deploy-hook", good), 0, "unchanged")
        self.assertEqual(["good", "fixed"], lines())

    def test_a_run_that_died_over_its_options(self):
        """Killed before the conf was written: what was to be dropped is still owed."""
        log, lines = self.log()
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        self.cross("--from", upstream.source, "--deploy-hook", "echo ran >> {}; false".format(log))
        dies = world.patched(self, "certferry.save_conf = lambda *_: os.kill(os.getpid(), 9)")
        self.run_command(NAME, "--deploy-hook", "", python=dies)
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assertEqual(["ran", "ran"], lines())
        self.assert_ended(self.seen(NAME, "--deploy-hook", ""), 0, "unchanged")
        self.assertEqual(["ran", "ran"], lines())

    def test_a_new_hook_that_succeeded_is_over(self):
        """It ran with the command that gave it, and is not owed afterwards."""
        log, lines = self.log()
        self.in_service()
        self.assertEqual(0, self.run_command("renew").status)
        self.assertEqual(0, self.run_command(NAME, "--deploy-hook", "echo ran >> " + log).status)
        self.assertNotIn("owed", self.record())
        self.assert_ended(self.seen("status"), 0, "unchanged")
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["ran"], lines())

    def test_a_file_of_the_directory_with_arguments(self):
        """That is a shell command as any other."""
        log, lines = self.log()
        path = self.downstream.hook("own", "reload", "echo $1 >> " + log)
        self.in_service("--deploy-hook", path + " nginx && true")
        self.assertEqual(["nginx"], lines())

    def test_the_failed_line(self):
        """Status, last words, the command, and what happens next."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source, "--deploy-hook", "echo not found; exit 5")
        self.assertEqual(1, result.status)
        problem = [line for line in result.err.splitlines() if line.startswith("certferry:")]
        self.assertEqual(1, len(problem), result)
        for words in ("installed", "5", "not found", "echo not found; exit 5", "tried again",
                      "--deploy-hook"):
            self.assertIn(words, problem[0])

    def test_a_run_that_died_before_its_hooks(self):
        """It is pending before the rename: the next run runs what was not run."""
        log, lines = self.log()
        dies = "test -e {0} || {{ echo died > {0}; kill -9 $PPID; exit 1; }}; echo ran >> {0}"
        self.downstream.hook("deploy", "dies", dies.format(log))
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        self.assertEqual(-9, self.cross("--from", upstream.source).status)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertEqual(1, self.run_command("status").status)
        self.assertEqual(0, self.cross("--from", upstream.source).status)
        self.assertEqual(["died", "ran"], lines())

    def test_a_run_that_died_at_a_new_hook(self):
        """It is owed from when it is remembered, though no certificate is new."""
        log, lines = self.log()
        upstream = self.in_service()
        dies = "test -e {0} || {{ echo died > {0}; kill -9 $PPID; exit 1; }}; echo ran >> {0}"
        self.assertEqual(-9, self.cross("--from", upstream.source, "--deploy-hook",
                                        dies.format(log)).status)
        self.assert_ended(self.seen("renew"), 0, "unchanged")
        self.assertEqual(["died", "ran"], lines())

    def test_a_new_hook_runs_on_its_crossing(self):
        """One that is new to the lineage, though the certificate is not; an old one does not."""
        log, lines = self.log()
        old, new = "echo old >> " + log, "echo new >> " + log
        self.in_service("--deploy-hook", old)
        self.assert_ended(self.seen(NAME, "--deploy-hook", old, "--deploy-hook", new), 0,
                          "unchanged")
        self.assertEqual(["old", "new"], lines())
        self.assert_ended(self.seen(NAME, "--deploy-hook", "exit 4"), 1, "pending", "hook")
        self.assertIn(b"deploy-hook = exit 4\n", world.read(self.downstream.conf(NAME)))
        self.assert_ended(self.seen("renew"), 1, "pending", "hook")
        self.assert_ended(self.seen(NAME, "--deploy-hook", ""), 0, "unchanged")

    def test_a_hook_that_others_can_write(self):
        """It is not run, and named."""
        log, lines = self.log()
        path = self.downstream.hook("deploy", "open", "echo ran >> " + log)
        os.chmod(path, 0o777)
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual((1, []), (result.status, lines()))
        self.assertIn(path, result.err)


class Renew(Scene):
    """Every lineage of the config dir, going on after a failure."""

    def test_goes_on(self):
        """Refused, failed and installed side by side: each has its line, the document is sorted."""
        upstreams = {}
        for name in ("z.example.com", "a.example.com", "m.example.com"):
            upstreams[name] = self.upstream(AUTHORITY.issue([name], key=FIRST.key))
            self.downstream.key(name, FIRST)
            self.assertEqual(0, self.run_command(name, "--from", upstreams[name].source,
                                                 "--ca-file", AUTHORITY.root).status)
        upstreams["a.example.com"].switch(AUTHORITY.issue(["a.example.com"]))
        upstreams["z.example.com"].switch(AUTHORITY.issue(["z.example.com"], key=FIRST.key))
        world.write(self.downstream.conf("m.example.com"), "from = a b\n")
        status, document = self.downstream.json("renew")
        self.assertEqual(1, status)
        self.assertEqual([
            ("a.example.com", "refused", "key-mismatch"), ("m.example.com", "failed", None),
            ("z.example.com", "installed", None)], [
                (one["name"], one["result"], one["reason"]) for one in document["lineages"]])
        status, document = self.downstream.json("renew", "z.example.com")
        self.assertEqual((0, ["z.example.com"]),
                         (status, [one["name"] for one in document["lineages"]]))

    def test_a_name_given_twice(self):
        """It is ferried once."""
        self.in_service()
        self.assert_ended(self.seen("renew", NAME, "EXAMPLE.com"), 0, "unchanged")

    def test_nothing_there(self):
        """No lineage is no failure; a NAME that is not there is one."""
        result = self.run_command("renew")
        self.assertEqual(0, result.status, result)
        result = self.run_command("renew", NAME)
        self.assertEqual(1, result.status)
        self.assert_one_problem(result)

    def test_a_key_alone_is_ferried(self):
        """A directory in live/ with a key and no certificate, from NAME:443."""
        path = self.downstream.key("127.0.0.1", FIRST)
        for _ in range(2):
            seen = self.seen("renew")
            self.assert_ended(seen, 1, "failed", "unreachable")
            self.assertIn("127.0.0.1", seen[0].err)
            self.assertEqual("critical", self.seen("status")[1]["health"])
            if os.path.exists(path):
                os.rename(path, path.replace("privkey", "privkey-staged"))
                os.unlink(self.downstream.state("127.0.0.1"))

    def test_certbots_own(self):
        """Skipped by renew; by name refused with the way to take over; never touched."""
        name, live = "certbot.example.com", self.downstream.live("certbot.example.com")
        folder = os.path.join(self.downstream.config, "archive", name)
        for directory in (live, folder, os.path.join(self.downstream.config, "renewal")):
            os.makedirs(directory)
        for file in ("cert", "chain", "fullchain", "privkey"):
            path = getattr(FIRST, "key" if file == "privkey" else file)
            world.write(os.path.join(folder, file + "1.pem"), world.read(path), 0o600)
            os.symlink("../../archive/{}/{}1.pem".format(name, file),
                       os.path.join(live, file + ".pem"))
        conf = world.write(os.path.join(self.downstream.config, "renewal", name + ".conf"),
                           "version = 2.1.0\n")
        upstream, before = self.upstream(), self.downstream.snapshot()
        self.assertEqual(0, self.run_command("renew").status)
        for arguments in ((name, "--from", upstream.source), ("renew", name)):
            seen = self.seen(*arguments)
            self.assert_ended(seen, 1, "refused", "certbot")
            self.assert_one_problem(seen[0], "mv " + conf, "certbot delete", name=name)
        self.assertEqual(before, self.downstream.snapshot())
        self.assertEqual(0, upstream.connections)

    def test_a_stray_conf(self):
        """An empty conf of certbot's, or one beside certferry's lineage: a warning, no more."""
        renewal = os.path.join(self.downstream.config, "renewal")
        os.mkdir(renewal)
        conf = world.write(os.path.join(renewal, NAME + ".conf"), "")
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        result = self.cross("--from", upstream.source)
        self.assertEqual(0, result.status)
        self.assert_one_problem(result, "renewal/example.com.conf")
        world.write(conf, "version = 2.1.0\n")
        result = self.run_command("renew")
        self.assertEqual(0, result.status)
        self.assert_one_problem(result, "renewal/example.com.conf")

    def test_another_tools_directory(self):
        """A key beside certificates: one notice line, left alone until it is adopted by name."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        for file in ("cert", "chain", "fullchain"):
            world.write(self.downstream.live(NAME, file + ".pem"), world.read(getattr(FIRST, file)))
        before = self.downstream.snapshot()
        result = self.run_command("renew")
        self.assertEqual(0, result.status)
        self.assert_one_problem(result, "certferry example.com")
        self.assertEqual(before, self.downstream.snapshot())
        self.assertEqual(0, self.cross("--from", upstream.source).status)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertTrue(os.path.islink(self.downstream.live(NAME, "cert.pem")))

    def test_names_that_are_no_host_names(self):
        """Skipped with a line; certbot's README is not worth one."""
        self.downstream.key("not a host", FIRST)
        world.write(self.downstream.live("README"), "certbot's\n")
        result = self.run_command("renew")
        self.assertEqual((0, ""), (result.status, result.out))
        self.assert_one_problem(result, "no host name", name="not a host")

    @unittest.skipUnless(os.geteuid() == 0, "only root can give a directory away")
    def test_another_users_directory(self):
        """Skipped with a line."""
        self.downstream.key(NAME, FIRST)
        os.chown(self.downstream.live(NAME), 12345, 12345)
        result = self.run_command("renew")
        self.assert_one_problem(result)
        self.assertEqual("", result.out)


class Status(Scene):
    """What is here, from the disk alone."""

    def test_lines(self):
        """A line for monitoring, then one per lineage."""
        upstream = self.in_service()
        connections, before = upstream.connections, self.downstream.snapshot()
        result = self.run_command("status")
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertRegex(result.out.splitlines()[0],
                         r"\ACERTFERRY OK - .*'example\.com'=8[89]d;22;")
        row = [line for line in result.out.splitlines() if line.startswith(NAME)]
        self.assertRegex(row[0], r" ok .*\d+%.* {} +\d{{4}}-\d\d-\d\d".format(upstream.source))
        self.assertEqual(connections, upstream.connections)
        self.assertEqual(before, self.downstream.snapshot())

    def test_what_is_wrong(self):
        """A refusal is told with its reason; the document remembers the last result."""
        upstream = self.in_service()
        upstream.switch(OTHER)
        self.run_command("renew")
        result, lineage = self.seen("status")
        self.assertEqual(("refused", "key-mismatch", False),
                         (lineage["result"], lineage["reason"], lineage["changed"]))
        self.assertEqual(FIELDS, list(lineage))
        self.assertIn("key-mismatch", self.run_command("status", NAME).out)

    def test_expiring(self):
        """Warning and critical by the share that is left, the exit status with them."""
        for status, word, begin, end in ((1, "WARNING", -70, 20), (2, "CRITICAL", -85, 5)):
            with world.Downstream() as downstream:
                upstream = self.upstream(again(not_before=world.days(begin),
                                               not_after=world.days(end)))
                downstream.key(NAME, FIRST)
                downstream.run(NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root)
                result = downstream.run("status")
                self.assertEqual(status, result.status)
                self.assertRegex(result.out, r"\ACERTFERRY {} - example\.com ".format(word))

    def test_no_lineage(self):
        """None at all, and one that is not there: UNKNOWN."""
        for arguments in (("status",), ("status", NAME)):
            result = self.run_command(*arguments)
            self.assertEqual(3, result.status)
            self.assertTrue(result.out.startswith("CERTFERRY UNKNOWN - "), result)


class Output(Scene):
    """Lines, JSON, -q, -v, and what hostile names do to them."""

    def test_document(self):
        """Every field of a lineage, with its type; times in ISO 8601, UTC."""
        upstream = self.in_service()
        status, document = self.downstream.json("renew")
        self.assertEqual((0, ["lineages"]), (status, list(document)))
        (lineage,) = document["lineages"]
        self.assertEqual(FIELDS, list(lineage))
        shown = world.openssl("x509", "-in", FIRST.cert, "-noout", "-serial", "-startdate",
                              "-enddate")
        serial, begin, end = (line.partition("=")[2] for line in shown.splitlines())
        self.assertEqual((int(serial, 16), _iso(begin), _iso(end)), (
            int(_bare(lineage["serial"]), 16), lineage["not_before"], lineage["not_after"]))
        self.assertEqual(hashlib.sha256(world.certificates(FIRST.cert)[0]).hexdigest(),
                         _bare(lineage["fingerprint_sha256"]))
        self.assertEqual(
            (NAME, "unchanged", None, None, False, upstream.source, NAMES, 1, "ok"),
            tuple(lineage[key] for key in ("name", "result", "reason", "detail", "changed",
                                           "source", "domains", "version", "health")))

    def test_document_of_nothing(self):
        """Fields that do not apply are null; a refused offer is described in detail."""
        self.downstream.key(NAME, FIRST)
        upstream = self.upstream(AUTHORITY.issue(["shop.example.org"]))
        seen = self.seen(NAME, "--from", upstream.source)
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assertEqual(FIELDS, list(seen[1]))
        self.assertIn("shop.example.org", seen[1]["detail"])
        self.assertEqual({None}, {seen[1][key] for key in (
            "not_before", "not_after", "serial", "fingerprint_sha256", "domains", "version")})

    def test_quiet_and_verbose(self):
        """-q prints problems only, -v prints more."""
        upstream = self.in_service()
        quiet, verbose = self.run_command("renew", "-q"), self.run_command("renew", "--verbose")
        self.assertEqual((0, "", ""), tuple(quiet))
        self.assertIn("unchanged", verbose.out)
        self.assertIn(upstream.source, verbose.err)
        upstream.switch(OTHER)
        quiet = self.run_command("renew", "-q")
        self.assertEqual((1, ""), (quiet.status, quiet.out))
        self.assert_one_problem(quiet)

    def test_no_timer(self):
        """--no-timer says nothing of cron."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        self.assertNotIn("cron", self.cross("--from", upstream.source, "--no-timer").out)

    def test_long_names(self):
        """Eight names of 250 characters: what comes from a peer takes 300 at most."""
        label = ".".join(["x" * 60] * 3)
        names = NAMES + ["h{}.{}.example.com".format(number, label) for number in range(30)]
        upstream = self.in_service(credential=again(names))
        result = self.run_command("renew")
        match = re.match(r"example\.com: unchanged: (.*), valid until", result.out)
        self.assertLessEqual(len(match.group(1)), 300)
        upstream.switch(AUTHORITY.issue(names[5:]))
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assertLess(len(seen[0].err), 600)

    def test_hostile_names(self):
        """Escapes, line ends, right-to-left marks in an issuer's name: ASCII on one line."""
        nasty = "\x1b[2J\r\ncertferry: x: installed \u202e\u00e9 " + "A" * 20
        issuer = AUTHORITY.issue([], subject="/O={0}/CN={0}".format(nasty), ca=True,
                                 issuer=AUTHORITY.root_credential)
        shown = AUTHORITY.issue([NAME], issuer=issuer, subject="/CN=" + nasty)
        self.in_service().switch(shown)
        seen = self.seen("renew")
        self.assert_ended(seen, 1, "refused", "key-mismatch")
        self.assert_one_problem(seen[0])
        self.assertTrue(all(31 < ord(letter) < 127 for letter in seen[1]["detail"]))
        self.assertRegex(self.record(), r"\A[ -~\n]+\Z")

    def test_hostile_paths(self):
        """Escapes in a path that an administrator was given: ASCII, on a terminal too."""
        path = os.path.join(world.scratch(self), "a\x1b[31mb.pem")
        shutil.copy(FIRST.fullchain, path)
        self.downstream.key(NAME, FIRST)
        for result in (self.cross("--from", "file:" + path), self.run_command("status")):
            self.assertEqual((0, ""), (result.status, result.err))
            self.assertIn(r"a\x1b[31mb.pem", result.out)
            self.assertRegex(result.out, r"\A[ -~\n]+\Z")

    def test_a_language_is_no_matter(self):
        """A bare C locale and a closed standard output are no traceback."""
        self.in_service()
        result = self.run_command("renew", env={"LC_ALL": "C", "LANG": None})
        self.assertEqual((0, ""), (result.status, result.err))
        process = self.downstream.start("renew")
        process.stdout.close()
        with process:
            self.assertEqual(b"", process.stderr.read())
        self.assertEqual(0, process.returncode)


class BadInput(Scene):
    """One line that says what to do, the right exit status, no traceback, nothing written."""

    def test_no_openssl(self):
        """A new certificate cannot be judged without it."""
        upstream = self.upstream()
        self.downstream.key(NAME, FIRST)
        before, empty = self.downstream.snapshot(), world.scratch(self)
        seen = self.seen(NAME, "--from", upstream.source, env={"PATH": empty})
        self.assert_ended(seen, 1, "failed")
        self.assert_one_problem(seen[0], "openssl", "install")
        self.assertIn("openssl", seen[1]["detail"])
        self.assertEqual(before, self.downstream.snapshot())

    def test_no_openssl_for_a_while(self):
        """Status names a failure that has no word in the table of reasons, too."""
        self.in_service().switch(AUTHORITY.issue([NAME], key=FIRST.key))
        for _ in range(2):
            self.assert_ended(self.seen("renew", env={"PATH": world.scratch(self)}), 1, "failed")
        self.assertIn("failed for 2 runs: there is no openssl", self.run_command("status").out)

    def test_no_json(self):
        """Debian's minimal Python has no json: said before the work is done."""
        self.in_service()
        before, folder = self.downstream.snapshot(), world.scratch(self)
        world.write(os.path.join(folder, "json.py"), "raise ImportError('none', name='json')\n")
        for command, status in (("renew", 1), ("status", 3)):
            result = self.run_command(command, "--json", env={"PYTHONPATH": folder})
            self.assertEqual((status, ""), (result.status, result.out))
            self.assertIn("json: install python3", result.err)
        self.assertEqual(before, self.downstream.snapshot())

    def test_no_difflib(self):
        """That Python has none either: what is unknown is wrong usage all the same."""
        folder = world.scratch(self)
        world.write(os.path.join(folder, "difflib.py"), "raise ImportError(name='difflib')\n")
        for arguments, hint in ((["renw"], "certferry renew"), ([NAME, "--forc"], "--force")):
            result = self.run_command(*arguments, env={"PYTHONPATH": folder})
            self.assertEqual((2, ""), (result.status, result.out), result)
            self.assertRegex(result.err, r"\Acertferry: [ -~]+{}[ -~]*\n\Z".format(hint))

    def test_a_conf_that_cannot_be_written(self):
        """What failed after the deploy is not told as if the certificate were the one before."""
        conf = self.downstream.conf(NAME)
        self.downstream.key(NAME, FIRST)
        # a link to nowhere that comes during the run
        command = "mkdir -p -m 700 {}; ln -s nowhere {}; cat {}".format(
            os.path.dirname(conf), conf, FIRST.fullchain)
        seen = self.seen(NAME, "--ca-file", AUTHORITY.root, "--from", "exec:" + command)
        self.assert_ended(seen, 1, "failed")
        self.assert_one_problem(seen[0], conf)
        self.downstream.assert_fits(self, NAME, FIRST)
        self.assertNotIn("untouched", seen[0].err)

    def test_a_module_beside_it(self):
        """What lies in the folder of the script, one of downloads maybe, is not imported."""
        folder, upstream = world.scratch(self), self.upstream()
        for name in ("ssl", "json", "subprocess", "hashlib"):
            world.write(os.path.join(folder, name + ".py"), 'raise SystemExit("planted")\n')
        script = shutil.copy(world.CERTFERRY, folder)
        self.downstream.key(NAME, FIRST)
        done = subprocess.run(
            [sys.executable, script, NAME, "--from", upstream.source, "--ca-file", AUTHORITY.root,
             "--json", "--config-dir", self.downstream.config],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((0, b""), (done.returncode, done.stderr))
        self.downstream.assert_fits(self, NAME, FIRST)

    def test_a_config_dir_that_is_none(self):
        """A file in its place."""
        path = world.write(os.path.join(world.scratch(self), "file"), "")
        for arguments, statuses in (((NAME,), (1,)), (("renew",), (0, 1)), (("status",), (3,))):
            result = self.run_command(*arguments + ("--config-dir", path), bare=True)
            self.assertIn(result.status, statuses, result)
            self.assertNotIn("Traceback", result.err)

    def test_a_config_dir_that_is_not_ours(self):
        """Unreadable, or for root: somebody else's. Each command is one line."""
        if os.geteuid() == 0:
            os.chown(self.downstream.config, 12345, 12345)
        else:
            os.chmod(self.downstream.config, 0)
            self.addCleanup(os.chmod, self.downstream.config, 0o700)
        for arguments in ((NAME, "--from", "up.invalid"), ("renew",)):
            result = self.run_command(*arguments)
            self.assertEqual((1, ""), (result.status, result.out))
            self.assertRegex(result.err, r"\Acertferry: [ -~]*{}[ -~]*\n\Z".format(
                re.escape(self.downstream.config)))

    def test_a_state_that_is_damaged(self):
        """One notice line; what it held is found out again."""
        upstream = self.in_service()
        for text in (b"\0\xff\xfe", b"[state]\nsince = tomorrow\n", b"no = section\n"):
            world.write(self.downstream.state(NAME), text)
            result = self.run_command("renew")
            self.assertEqual(0, result.status, result)
            self.assert_one_problem(result, self.downstream.state(NAME))
        self.assertGreater(upstream.connections, 3)


def _is_asleep(pid):
    """Say whether a process runs the command sleep."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return world.read("/proc/{}/cmdline".format(pid)).startswith(b"sleep")
    return False


def _bare(digits):
    """Hexadecimal digits without what people put between them."""
    return digits.replace(":", "").strip().lower()


def _iso(text):
    """openssl's date as ISO 8601."""
    moment = datetime.datetime.strptime(text, "%b %d %H:%M:%S %Y %Z")
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    unittest.main()
