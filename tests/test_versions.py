"""Versions on disk: adoption, other users, rollback, pruning, recovery, locking, clocks, damage."""

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import unittest

from tests import world

NAME = "example.com"
MEMBERS = ("cert.pem", "chain.pem", "fullchain.pem", "privkey.pem")
STRANGER = 12345  # a user and group that nobody is
LITTER = re.search('^LITTER = "(.*?)"', world.read(world.CERTFERRY).decode(), re.M).group(1)

needs_root = unittest.skipIf(os.geteuid(), "needs root")


class VersionsCase(unittest.TestCase):
    """A downstream whose source is a file: self.offer(credential) is what the next run meets."""

    @classmethod
    def setUpClass(cls):
        cls.folder = world.scratch()
        cls.authority = world.Authority(cls.folder)
        cls.first = None  # what _install_first() made: its Credential, config dir and `outside`

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder, ignore_errors=True)

    def setUp(self):
        self.new_downstream()

    def new_downstream(self):
        """Start over with an empty config dir."""
        self.downstream = world.Downstream().started(self)
        self.outside = world.scratch(self)
        self.source = os.path.join(self.outside, "offer.pem")
        self.hooks_log = os.path.join(self.outside, "hooks.log")

    def issue(self, key=None, **how):
        """A certificate that is newer than the one issued before, for that key if it is given."""
        return self.authority.issue([NAME], key=key, **how)

    def offer(self, credential, with_key=False):
        """Let the source have this certificate; returns the credential."""
        key = world.read(credential.key) if with_key else b""
        world.write(self.source, world.read(credential.fullchain) + key, 0o600)
        return credential

    def ferry(self, *options, **how):
        """`certferry NAME` with the source, the root and a hook that leaves a line."""
        return self.downstream.run(
            NAME, "--from", "file:" + self.source, "--ca-file", self.authority.root,
            "--deploy-hook", "echo $RENEWED_LINEAGE >>" + self.hooks_log, *options, **how)

    def renew(self, *options, **how):
        """`certferry renew`."""
        return self.downstream.run("renew", *options, **how)

    def assert_done(self, result, word="installed"):
        """The command ended well with that result."""
        self.assertEqual(0, result.status, result)
        self.assertIn("{}: {}".format(NAME, word), result.out)

    def assert_refused(self, result, *words):
        """The command ended with status 1, and said these words in a problem line."""
        self.assertEqual(1, result.status, result)
        self.assertNotIn("Traceback", result.err)
        for word in words:
            self.assertIn(word, result.err)

    def install(self, count=1, key=None):
        """That many versions, one after the other, of one key; the last Credential."""
        for _ in range(count):
            if not os.path.lexists(self.downstream.live(NAME, ".current")):
                credential = self._install_first()
            else:
                credential = self.offer(self.issue(key))
                self.assert_done(self.renew())
            key = credential.key
        return credential

    def _install_first(self):
        """The first version: in an empty config dir a copy of the one that the class made first."""
        empty = not os.listdir(self.downstream.config)
        if empty and self.first:
            credential, config, outside = self.first
            self.downstream.become(config, outside, self.outside)
            shutil.copy(config + ".hooks", self.hooks_log)
            return self.offer(credential)
        credential = self.offer(self.issue())
        self.downstream.key(NAME, credential)
        self.assert_done(self.ferry())
        if empty:
            config = os.path.join(self.folder, "first")
            shutil.copytree(self.downstream.config, config, symlinks=True)
            shutil.copy(self.hooks_log, config + ".hooks")
            type(self).first = credential, config, self.outside
        return credential

    def hooks(self):
        """How often the deploy hook ran so far."""
        with contextlib.suppress(FileNotFoundError):
            return len(world.read(self.hooks_log).splitlines())
        return 0

    def versions(self):
        """The numbers of the versions that there are, sorted."""
        names = os.listdir(os.path.join(self.downstream.config, "archive"))
        return sorted(int(name.split("@")[1]) for name in names if name.startswith(NAME + "@"))

    def current(self):
        """The number of the version in service."""
        return int(os.readlink(self.downstream.live(NAME, ".current")).rsplit("@", 1)[1])

    def staged(self):
        """Paths of the staged keys."""
        return [self.downstream.live(NAME, name) for name in os.listdir(self.downstream.live(NAME))
                if re.match("privkey-.*[.]pem$", name)]

    def lay_plain(self, credential, names=MEMBERS):
        """Plain files in live/NAME/, as an administrator copies them."""
        os.makedirs(self.downstream.live(NAME), exist_ok=True)
        paths = credential.cert, credential.chain, credential.fullchain, credential.key
        for name, path in zip(MEMBERS, paths):
            if name in names:
                world.write(self.downstream.live(NAME, name), world.read(path),
                            0o600 if name == "privkey.pem" else 0o644)

    def lay_certbot(self, credential, number=1):
        """Links into archive/NAME/, as certbot makes them."""
        self.lay_plain(credential)
        archive = os.path.join(self.downstream.config, "archive", NAME)
        os.makedirs(archive)
        for name in MEMBERS:
            target = name.replace(".", "{}.".format(number))
            os.rename(self.downstream.live(NAME, name), os.path.join(archive, target))
            os.symlink("../../archive/{}/{}".format(NAME, target),
                       self.downstream.live(NAME, name))

    def contents(self):
        """What servers read: {name: bytes}."""
        return {name: world.read(self.downstream.live(NAME, name)) for name in MEMBERS}

    def overwrite_key(self, other):
        """Another key, written through the link over that of the version in service."""
        world.write(self.downstream.live(NAME, "privkey.pem"), world.read(other.key))

    def told(self, *arguments):
        """What one command tells of the lineage: (exit status, its object in JSON)."""
        status, document = self.downstream.json(*arguments)
        return status, document["lineages"][0]

    def assert_linked(self):
        """The four names are links through .current, which is a link to a version."""
        for name in MEMBERS:
            self.assertEqual(".current/" + name, os.readlink(self.downstream.live(NAME, name)))
        self.assertRegex(os.readlink(self.downstream.live(NAME, ".current")),
                         "archive/{}@[0-9]+$".format(NAME))


# ---------------------------------------------------------------- a set that somebody broke

class Broken(VersionsCase):
    """What was damaged through live/ is made whole; a private key is never thrown away."""

    def test_certificates(self):
        """Whichever certificate file is emptied or overwritten, the next run has a whole set."""
        for name, word, content in world.in_turn(
                (name, word, content) for content in ("", "junk\n") for name, word in (
                    ("fullchain.pem", "installed"), ("cert.pem", "unchanged"),
                    ("chain.pem", "unchanged"))):
            with self.subTest(name, content=content):
                self.new_downstream()
                credential = self.install()
                world.write(self.downstream.live(NAME, name), content)
                self.assert_done(self.renew(), word)
                self.downstream.assert_fits(self, NAME, credential)

    def test_what_servers_read(self):
        """A link that is gone or leads elsewhere is critical, also with -q; NAME makes it again."""
        credential, other = self.install(), self.issue()
        path = self.downstream.live(NAME, "fullchain.pem")
        for content in ("", world.read(other.fullchain)):
            os.unlink(path)
            if content:
                world.write(path, content)
            result = self.downstream.run("status", "-q")
            self.assertEqual((2, 1), (result.status, len(result.out.splitlines())), result)
            self.assertIn(path, result.out)
            # a command that fails turns nothing back
            failed = self.downstream.run(NAME, "--from", "file:/nonexistent")
            self.assertEqual((1, content), (failed.status, content and world.read(path)))
            if content:
                self.assertFalse(os.path.islink(path))
            else:
                os.unlink(path)
            seen = self.downstream.json(NAME)[1]["lineages"][0]
            self.assertEqual(("unchanged", True, "ok"),
                             (seen["result"], seen["changed"], seen["health"]))
            self.downstream.assert_fits(self, NAME, credential)
            self.assertEqual((0, "", ""), self.downstream.run("status", "-q"))

    def test_key_opened_to_all(self):
        """It is said once, whenever it happened."""
        self.install()
        os.chmod(self.downstream.archive(NAME, 1, "privkey.pem"), 0o644)
        self.assertIn("can be read by everybody", self.renew().err)
        self.assertEqual("", self.renew().err)

    def test_dangling_current(self):
        """.current points to a version that is gone: the others stay, with their keys."""
        self.install(2)
        pointer = self.downstream.live(NAME, ".current")
        os.unlink(pointer)
        os.symlink("../../archive/{}@9".format(NAME), pointer)
        self.assert_refused(self.renew(), "no private key")
        self.assertEqual([1, 2], self.versions())

    def test_current_is_gone(self):
        """Somebody removed .current: no version is taken for an unfinished one, no key is lost."""
        self.install(2)
        os.unlink(self.downstream.live(NAME, ".current"))
        self.assert_refused(self.renew(), "no private key")
        self.assertEqual([1, 2], self.versions())

    def test_repointed_by_hand(self):
        """Somebody points .current to the version before: the newer one stays."""
        self.install(2)
        pointer = self.downstream.live(NAME, ".current")
        os.unlink(pointer)
        os.symlink("../../archive/{}@1".format(NAME), pointer)
        self.renew("--dry-run")
        self.assertNotIn("interrupted", self.renew().err)
        self.assertLessEqual({1, 2}, set(self.versions()))

    def test_only_key_overwritten(self):
        """With no older version: a failure until the right key is brought, which mends it."""
        credential, other = self.install(), self.issue()
        world.write(self.downstream.live(NAME, "privkey.pem"), world.read(other.key))
        self.renew()
        self.assert_refused(self.renew(), "does not fit", "--key")
        self.assertEqual(2, self.downstream.run("status").status)
        self.assert_done(self.downstream.run(NAME, "--key", credential.key), "unchanged")
        self.downstream.assert_fits(self, NAME, credential)
        self.assertEqual(0, self.downstream.run("status").status)

    def test_key_is_gone(self):
        """It is put back from wherever it is found, which is told as a change."""
        for case in world.in_turn((
                "another version", "by hand", "by hand over an empty one", "--key", "source")):
            with self.subTest(case):
                self.new_downstream()
                first = self.install(2 if case == "another version" else 1)
                path = self.downstream.archive(NAME, self.current(), "privkey.pem")
                if case == "by hand over an empty one":
                    world.write(path, "")
                else:
                    os.unlink(path)
                if case.startswith("by hand"):
                    self.downstream.key(NAME, first)
                self.offer(first, with_key=case == "source")
                status, lineage = self.told(*(
                    (NAME, "--key", first.key) if case == "--key" else ("renew",)))
                self.assertEqual(
                    (0, "installed" if case == "source" else "unchanged", True),
                    (status, lineage["result"], lineage["changed"]), lineage)
                self.downstream.assert_fits(self, NAME, first)
                self.assert_done(self.renew(), "unchanged")
                self.assertEqual(0, self.downstream.run("status").status)

    def test_junk_staged_key(self):
        """It is named, and neither stops a renewal nor hides the health of the set in service."""
        credential = self.install()
        junk = self.downstream.live(NAME, "privkey-junk.pem")
        world.write(junk, "junk\n", 0o600)
        status = self.downstream.run("status")
        self.assertEqual(0, status.status, status)
        self.assertIn("privkey-junk.pem", status.out)
        new = self.offer(self.issue(credential.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)
        self.assertTrue(os.path.exists(junk))

    def test_alias(self):
        """A second name for a lineage's folder is no lineage, and nothing is said of it."""
        self.install()
        os.symlink(NAME, os.path.join(self.downstream.config, "live", "alias.example.com"))
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertEqual("", result.err)

    def test_a_crossing_of_an_alias(self):
        """It is refused by that name: its .current is another lineage's, which stays as it is."""
        both = self.offer(self.authority.issue([NAME, "alias.example.com"]))
        self.downstream.key(NAME, both)
        self.assert_done(self.ferry())
        os.symlink(NAME, os.path.join(self.downstream.config, "live", "alias.example.com"))
        before = self.downstream.snapshot()
        self.assert_refused(self.downstream.run(
            "alias.example.com", "--from", "file:" + self.source, "--ca-file", self.authority.root),
            ".current points to", "which is no version of it")
        self.assertEqual([], [path for path in world.changed(before, self.downstream.snapshot())
                              if path.startswith(("live", "archive"))])
        self.assert_linked()

    def test_dangling_links(self):
        """A folder of links into an archive that is gone is no lineage, and one notice at most."""
        self.install()
        live = self.downstream.live("old.example.com")
        os.mkdir(live)
        for name in MEMBERS:
            os.symlink("../../archive/old.example.com/" + name.replace(".", "1."),
                       os.path.join(live, name))
        before = self.downstream.snapshot()
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertLessEqual(len(result.err.splitlines()), 1, result)
        status, document = self.downstream.json("renew")
        self.assertEqual((0, [NAME]), (status, [each["name"] for each in document["lineages"]]))
        self.assertEqual([], [path for path in world.changed(before, self.downstream.snapshot())
                              if path.startswith(("live", "archive"))])

    def test_renew_adopts_nothing(self):
        """Another tool's files are not taken by `renew NAME`, nor is a name that is not here."""
        self.lay_plain(self.offer(self.issue()))
        before = self.downstream.snapshot()
        for name in (NAME, "other.example.com"):
            self.assert_refused(self.renew(name), "no such lineage")
            self.assert_refused(self.downstream.run("rollback", name), "no such lineage")
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))

    def test_pending_outweighs_deferred(self):
        """A hook that fails after a rollback is told at every run, whatever the source offers."""
        self.install(2)
        flag = os.path.join(self.outside, "flag")
        self.downstream.hook("deploy", "flagged", "test -e " + flag)
        self.assertEqual(1, self.downstream.run("rollback", NAME).status)
        self.assert_refused(self.renew(), "hook")
        world.write(flag, "")
        self.assertEqual(0, self.renew().status)

    def test_refused_rollback_is_not_recorded(self):
        """The source was not asked: what is known of it stays."""
        self.install()
        before = world.read(self.downstream.state(NAME))
        self.assert_refused(self.downstream.run("rollback", NAME), "no earlier version")
        self.assertEqual(before, world.read(self.downstream.state(NAME)))

    def test_switched_off(self):
        """enabled = no: nothing is touched, one line says so."""
        self.install()
        with open(self.downstream.conf(NAME), "a") as conf:
            conf.write("enabled = no\n")
        os.unlink(self.downstream.live(NAME, "cert.pem"))
        before = self.downstream.snapshot()
        result = self.renew(NAME)
        self.assertEqual((0, ""), (result.status, result.err))
        self.assertIn("enabled = no", result.out)
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))

    def test_retired_key_by_force(self):
        """--force takes back a retired key from the version that is kept."""
        first = self.install()
        second = self.offer(self.issue(), with_key=True)
        self.assert_done(self.renew())
        again = self.offer(self.issue(first.key))
        self.assert_refused(self.renew(), "retired")
        self.downstream.assert_fits(self, NAME, second)
        self.assert_done(self.renew(NAME, "--force"))
        self.downstream.assert_fits(self, NAME, again)

    def test_status_of_another_user(self):
        """Monitoring that may not read is told UNKNOWN: not that all is well, nor of a bug."""
        self.install()
        script = ("import os, runpy, sys\nsys.argv[:] = sys.argv[1:]\n"
                  "os.geteuid() or os.setuid(65534)\n"
                  "runpy.run_path(sys.argv[0], run_name='__main__')")
        for folder in ("certferry", "."):
            os.chmod(os.path.join(self.downstream.config, folder), 0 if os.geteuid() else 0o700)
            done = subprocess.run(
                ["/usr/bin/python3", "-c", script, world.CERTFERRY, "status", "--config-dir",
                 self.downstream.config], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((3, b""), (done.returncode, done.stderr))
            self.assertIn(b"CERTFERRY UNKNOWN", done.stdout)
        os.chmod(self.downstream.config, 0o700)


# ---------------------------------------------------------------- adoption

class Adoption(VersionsCase):
    """Files that others made become version 1, as they are, before anything changes."""

    LAYINGS = [
        ("plain files", VersionsCase.lay_plain, True),
        ("no cert.pem and chain.pem",
         lambda self, it: self.lay_plain(it, ("fullchain.pem", "privkey.pem")), True),
        ("no fullchain.pem",
         lambda self, it: self.lay_plain(it, ("cert.pem", "chain.pem", "privkey.pem")), True),
        ("certbot's links", VersionsCase.lay_certbot, False),
    ]

    def test_current_offer(self):
        """`certferry NAME` adopts where the source has nothing newer."""
        for case, lay, says_mount in world.in_turn(self.LAYINGS):
            with self.subTest(case):
                self.new_downstream()
                first = self.offer(self.issue())
                lay(self, first)
                result = self.ferry()
                self.assert_done(result, "unchanged")
                self.downstream.assert_fits(self, NAME, first)
                self.assert_linked()
                self.assertEqual([1], self.versions())
                self.assertEqual(says_mount, "mount" in result.err + result.out, result)
                result = self.ferry()
                self.assertNotIn("mount", result.err + result.out)

    def test_newer_offer(self):
        """With a newer offer the old set is version 1, byte for byte, the new one version 2."""
        for case, lay, _ in world.in_turn(self.LAYINGS):
            with self.subTest(case):
                self.new_downstream()
                first = self.issue()
                lay(self, first)
                second = self.offer(self.issue(first.key))
                self.assert_done(self.ferry())
                self.downstream.assert_fits(self, NAME, second)
                self.assert_linked()
                self.assertEqual([1, 2], self.versions())
                for name, path in zip(MEMBERS, (first.cert, first.chain, first.fullchain,
                                                first.key)):
                    self.assertEqual(world.read(path),
                                     world.read(self.downstream.archive(NAME, 1, name)))
                self.assertEqual(1, self.hooks())
                self.assert_done(self.downstream.run("rollback", NAME))
                self.downstream.assert_fits(self, NAME, first)

    def test_renew_leaves_it_alone(self):
        """`renew` names a folder of another tool in one notice, and touches nothing."""
        self.lay_plain(self.issue())
        before = self.downstream.snapshot()
        result = self.renew()
        self.assertIn("certferry " + NAME, result.out + result.err)
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))

    def test_dry_run(self):
        """A dry run adopts nothing."""
        first = self.issue()
        self.lay_plain(first)
        self.offer(self.issue(first.key))
        before = self.downstream.snapshot()
        self.assertEqual(0, self.ferry("--dry-run").status)
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))

    def test_refused_offer(self):
        """Nothing is adopted for an offer that is refused."""
        self.lay_plain(self.issue())
        self.offer(self.issue())
        before = self.downstream.snapshot()
        self.assert_refused(self.ferry(), "another key")
        after = self.downstream.snapshot()
        self.assertEqual([], [path for path in world.changed(before, after)
                              if path.startswith(("live", "archive"))])

    def test_certificates_without_key(self):
        """Certificates alone are no set; the source brings certificate and key."""
        self.lay_plain(self.issue(), ("fullchain.pem",))
        new = self.offer(self.issue(), with_key=True)
        self.assert_done(self.ferry())
        self.downstream.assert_fits(self, NAME, new)
        self.assert_linked()

    def test_other_lines(self):
        """PEM of another line length is as good: `renew` finds nothing to make whole."""
        first = self.offer(self.issue())
        self.lay_plain(first)
        for name, length in (("cert.pem", 76), ("chain.pem", 9999)):
            path = self.downstream.live(NAME, name)
            begin, *lines, end = world.read(path).decode().split("\n")[:-1]
            digits = "".join(lines)
            lines = [digits[at:at + length] for at in range(0, len(digits), length)]
            world.write(path, "\n".join([begin] + lines + [end, ""]))
        self.assert_done(self.ferry(), "unchanged")
        before = self.downstream.snapshot()
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertEqual("", result.err)
        after = self.downstream.snapshot()
        self.assertEqual([], [path for path in world.changed(before, after) if "archive" in path])

    def test_a_chain_alone(self):
        """An issuer's certificate beside a key is not taken for the one in service."""
        self.lay_plain(self.issue(), ("chain.pem", "privkey.pem"))
        result = self.downstream.run("status", NAME)
        self.assertEqual(2, result.status, result)
        self.assertIn("has no certificate", result.out)

    def test_no_config_dir(self):
        """Where there is nothing at all, a source with a key is enough."""
        os.rmdir(self.downstream.config)
        new = self.offer(self.issue(), with_key=True)
        self.assert_done(self.ferry())
        self.downstream.assert_fits(self, NAME, new)

    def test_certbots(self):
        """While certbot renews it nothing is touched; with an empty conf the ferry goes on."""
        first = self.issue()
        self.lay_certbot(first)
        second = self.offer(self.issue(first.key))
        os.mkdir(self.downstream.config + "/renewal")
        conf = self.downstream.config + "/renewal/" + NAME + ".conf"
        world.write(conf, "version = 2.1.0\n")
        before = self.downstream.snapshot()
        self.assert_refused(self.ferry(), "certbot", "mv ")
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))
        world.write(conf, "")
        self.assert_done(self.ferry())
        self.downstream.assert_fits(self, NAME, second)

    def test_misfitting_key(self):
        """Plain files whose key does not fit: no version of them; the key serves its own offer."""
        old, other = self.issue(), self.issue()
        self.lay_plain(old)
        self.downstream.key(NAME, other)
        before = self.contents()
        self.offer(old)
        self.assert_refused(self.ferry(), "another key")
        self.assertEqual(before, self.contents())
        new = self.offer(self.issue(other.key))
        self.assert_done(self.ferry())
        self.downstream.assert_fits(self, NAME, new)
        for number in self.versions():
            cert, key = (self.downstream.archive(NAME, number, name)
                         for name in ("cert.pem", "privkey.pem"))
            self.assertEqual(world.public_key(cert), world.public_key(key))

    def test_more_than_certificates(self):
        """A file that holds anything but certificates is not adopted: everybody can read a copy.

        The text alone is what a planted hard link to another file of root's leads to.
        """
        first = self.issue()
        cert, text = world.read(first.cert), b"root:$6$salt$hash:19000:0:::::\n"
        for case, content in world.in_turn((
                ("a key too", cert + world.read(first.key)), ("text", text),
                ("text too", cert + text), ("text before", text + cert))):
            with self.subTest(case):
                self.new_downstream()
                self.lay_plain(first)
                os.unlink(self.downstream.live(NAME, "cert.pem"))
                planted = world.write(os.path.join(self.outside, "planted"), content, 0o600)
                path = self.downstream.live(NAME, "cert.pem")
                os.link(planted, path)
                self.offer(self.issue(first.key))
                before = self.contents()
                self.assert_refused(self.ferry(), path)
                self.assertEqual(before, self.contents())

    def test_unrelated_files(self):
        """What else lies in live/NAME/ stays, and stays as it is."""
        first = self.issue()
        self.lay_plain(first)
        live = self.downstream.live(NAME)
        for name in ("README", ".keep", "combined.pem", ".fullchain.pem.swp", "dhparam.pem"):
            world.write(live + "/" + name, name)
        os.mkdir(live + "/old")
        os.symlink("privkey.pem", live + "/fullchain.pem.key")
        before = self.downstream.snapshot()
        for _ in range(2):
            self.offer(self.issue(first.key))
            self.assert_done(self.ferry())
        after = self.downstream.snapshot()
        for path in before:
            if path.startswith("live/") and os.path.basename(path) not in MEMBERS + (NAME,):
                self.assertEqual(before[path], after.get(path), path)
        self.assertEqual(world.read(first.key), world.read(live + "/fullchain.pem.key"))


class KeysByHand(VersionsCase):
    """An administrator's own hands on privkey.pem and on the links."""

    def test_replaced(self):
        """Another key in place of the link is staged, the current one kept, its offer deployed."""
        for case in ("renew", "crossing"):
            with self.subTest(case):
                self.new_downstream()
                first = self.install()
                other = self.issue()
                self.downstream.key(NAME, other)
                self.assertEqual(0, (self.renew() if case == "renew" else self.ferry()).status)
                self.downstream.assert_fits(self, NAME, first)
                self.assert_linked()
                self.assertEqual([world.public_key(other.key)],
                                 [world.public_key(path) for path in self.staged()])
                new = self.offer(self.issue(other.key))
                self.assert_done(self.renew())
                self.downstream.assert_fits(self, NAME, new)
                self.assertEqual([], self.staged())

    def test_replaced_with_its_offer(self):
        """The other key is put in place when the source already has its certificate."""
        self.install()
        other = self.offer(self.issue())
        self.downstream.key(NAME, other)
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, other)
        self.assertEqual([], self.staged())

    def test_replaced_by_itself(self):
        """The same key as a plain file is left alone until the next command, nothing is staged."""
        first = self.install()
        self.downstream.key(NAME, first)
        path = self.downstream.live(NAME, "privkey.pem")
        for again in (path, first.key + ".other"):  # in another encoding, too
            if again != path:
                world.openssl("ec", "-in", first.key, "-out", again)
                world.write(path, world.read(again), 0o600)
            self.assert_done(self.renew(), "unchanged")
            self.assertFalse(os.path.islink(path))
            self.downstream.assert_fits(self, NAME, first)
        self.assert_done(self.ferry(), "unchanged")
        self.downstream.assert_fits(self, NAME, first)
        self.assert_linked()
        self.assertEqual([], self.staged())

    def test_written_through_the_link(self):
        """The key that was there comes back from an older version, the new one is staged."""
        second = self.install(2)
        other = self.issue()
        world.write(self.downstream.live(NAME, "privkey.pem"), world.read(other.key))
        result = self.renew()
        self.assertNotIn("Traceback", result.err)
        self.downstream.assert_fits(self, NAME, second)
        self.assertEqual([world.public_key(other.key)],
                         [world.public_key(path) for path in self.staged()])
        new = self.offer(self.issue(other.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)

    def test_put_back_is_a_change(self):
        """A key that is staged and the fitting one put back: the document says so, once."""
        self.install(2)
        self.overwrite_key(self.issue())
        for changed in (True, False):
            status, lineage = self.told("renew")
            self.assertEqual((0, "unchanged", changed),
                             (status, lineage["result"], lineage["changed"]))

    def test_pair_by_hand(self):
        """A pair that fits, in place of the links, stays until the next deploy or command."""
        for up, case in world.in_turn(
                (up, case) for up in (True, False) for case in ("crossing", "deploy")):
            with self.subTest(case, up=up):
                self.new_downstream()
                first, other = self.install(), self.issue()
                for name in MEMBERS:
                    os.unlink(self.downstream.live(NAME, name))
                self.lay_plain(other)
                before = self.contents()
                if not up:
                    os.unlink(self.source)
                for _ in range(2):
                    self.assertNotIn("Traceback", self.renew().err)
                    self.assertEqual(before, self.contents())
                if case == "crossing":
                    self.offer(first)
                    self.assert_done(self.ferry(), "unchanged")
                else:
                    first = self.offer(self.issue(first.key))
                    self.assert_done(self.renew())
                self.downstream.assert_fits(self, NAME, first)
                self.assert_linked()
                self.assertEqual([world.public_key(other.key)],
                                 [world.public_key(path) for path in self.staged()])

    def test_written_through_the_only_version(self):
        """With no older version the misfit is critical, until an offer for the new key comes."""
        self.install()
        other = self.issue()
        world.write(self.downstream.live(NAME, "privkey.pem"), world.read(other.key))
        self.assertIn("staged as", self.renew().err)
        staged = self.staged()
        self.assertNotIn("staged as", self.renew().err)  # once
        self.assertEqual(staged, self.staged())
        status, document = self.downstream.json("status")
        self.assertEqual((2, "critical"), (status, document["lineages"][0]["health"]))
        new = self.offer(self.issue(other.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)

    def test_missing_links(self):
        """Links that are missing beside .current are made again, all or some of them."""
        for missing in world.in_turn((MEMBERS, MEMBERS[:1], MEMBERS[3:])):
            with self.subTest(missing=missing):
                self.new_downstream()
                first = self.install()
                for name in missing:
                    os.unlink(self.downstream.live(NAME, name))
                self.assert_done(self.renew(), "unchanged")
                self.downstream.assert_fits(self, NAME, first)
                self.assert_linked()
                self.assertEqual(1, self.hooks())

    def test_key_is_a_new_file_each_time(self):
        """The first version has the administrator's own file, every further one a copy."""
        first = self.issue()
        self.lay_plain(first)
        number = os.stat(self.downstream.live(NAME, "privkey.pem")).st_ino
        for _ in range(2):
            self.offer(self.issue(first.key))
            self.assert_done(self.ferry())
        inodes = [os.stat(self.downstream.archive(NAME, version, "privkey.pem")).st_ino
                  for version in self.versions()]
        self.assertEqual(number, inodes[0])
        self.assertEqual(3, len(set(inodes)))

    def test_staged_key(self):
        """A staged key waits; with its offer it becomes the key and its staging file goes."""
        first = self.install()
        other = self.issue()
        self.downstream.key(NAME, other, "privkey-next.pem")
        second = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, second)
        self.assertEqual(1, len(self.staged()))
        new = self.offer(self.issue(other.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)
        self.assertEqual([], self.staged())
        self.assertEqual(2, self.hooks() - 1)


class DryRun(VersionsCase):
    """What a dry run tells is what the run after it does and tells."""

    def test_after_a_hand(self):
        """Result, reason, change and version are the same, and the dry run writes nothing."""
        cases = [
            ("a key with its offer", 1,
             lambda other: self.downstream.key(NAME, self.offer(other))),
            ("a key", 1, lambda other: self.downstream.key(NAME, other)),
            ("its own key, staged", 1, lambda _: shutil.copy(
                self.downstream.live(NAME, "privkey.pem"),
                self.downstream.live(NAME, "privkey-copy.pem"))),
            ("a key through the link", 2, self.overwrite_key),
            ("other content", 1,
             lambda _: world.write(self.downstream.live(NAME, "cert.pem"), "junk\n")),
            ("rollback", 2, lambda _: os.unlink(self.downstream.archive(NAME, 1, "cert.pem"))),
        ]
        for case, count, spoil in world.in_turn(cases):
            with self.subTest(case):
                self.new_downstream()
                self.install(count)
                spoil(self.issue())
                before, told = self.downstream.snapshot(), []
                for options in (("--dry-run",), ()):
                    status, lineage = self.told(
                        *(("rollback", NAME) if case == "rollback" else ("renew",)), *options)
                    told.append([status] + [lineage[name] for name in (
                        "result", "reason", "changed", "version")])
                    if options:
                        self.assertEqual([], world.changed(before, self.downstream.snapshot()))
                self.assertEqual(told[1], told[0])
                self.assertTrue(told[1][3], told)
                self.downstream.assert_fits(self, NAME)


class Modes(VersionsCase):
    """Nothing gets wider; owner, group, mode and ACL of a key go on to the next."""

    def _facts(self, number):
        facts = os.stat(self.downstream.archive(NAME, number, "privkey.pem"))
        return stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid

    def test_modes(self):
        """Modes after a crossing and a rotation, whatever the umask."""
        for umask in world.in_turn((0o077, 0o022, 0o000)):
            with self.subTest(umask=oct(umask)):
                self.new_downstream()
                first = self.offer(self.issue())
                before = os.umask(umask)
                try:
                    self.assert_done(self.ferry("--key", first.key))
                    self.offer(self.issue(first.key))
                    self.assert_done(self.renew())
                finally:
                    os.umask(before)
                for number in (1, 2):
                    for name in MEMBERS:
                        mode = os.stat(self.downstream.archive(NAME, number, name)).st_mode
                        self.assertEqual(0o600 if name == "privkey.pem" else 0o644,
                                         stat.S_IMODE(mode), name)
                    folder = os.stat(self.downstream.archive(NAME, number))
                    self.assertEqual(0o755, stat.S_IMODE(folder.st_mode))
                for name, mode in (("certferry", 0o700), ("archive", 0o755)):
                    folder = os.stat(os.path.join(self.downstream.config, name))
                    self.assertEqual(mode, stat.S_IMODE(folder.st_mode), name)

    def test_put_back(self):
        """A key that is put back has the mode that it had, not that of what was in its place."""
        self.install(2)
        path = self.downstream.archive(NAME, 2, "privkey.pem")
        world.write(path, world.read(self.issue().key), 0o644)
        self.renew()
        self.downstream.assert_fits(self, NAME)
        self.assertEqual(0o600, self._facts(2)[0])

    def test_put_back_no_wider(self):
        """A key that is put back from an open file has the mode of what was in its place."""
        self.install(2)
        os.chmod(self.downstream.archive(NAME, 1, "privkey.pem"), 0o644)
        os.chmod(self.downstream.archive(NAME, 2, "privkey.pem"), 0o600)
        self.overwrite_key(self.issue())
        self.assert_done(self.renew(), "unchanged")
        self.downstream.assert_fits(self, NAME)
        self.assertEqual(0o600, self._facts(2)[0])

    def test_rolled_back(self):
        """A key that is gone back to is like the one that it replaces."""
        self.install(2)
        path = self.downstream.archive(NAME, 2, "privkey.pem")
        if not os.geteuid():
            os.chown(path, 0, STRANGER)
        os.chmod(path, 0o640)
        self.assert_done(self.downstream.run("rollback", NAME))
        self.assertEqual(0o640, self._facts(1)[0])
        self.assertEqual(self._facts(2), self._facts(1))

    def test_rolled_back_no_wider(self):
        """A key that is gone back to from one that others can read stays closed to them."""
        self.install(2)
        os.chmod(self.downstream.archive(NAME, 2, "privkey.pem"), 0o644)
        self.assert_done(self.downstream.run("rollback", NAME))
        self.assertEqual(1, self.current())
        self.assertEqual(0o600, self._facts(1)[0])

    def test_closed_parent(self):
        """Folders have the mode of their parent: in a 0700 tree everything is 0700."""
        os.chmod(self.downstream.config, 0o700)
        first = self.offer(self.issue())
        self.assert_done(self.ferry("--key", first.key))
        for path, entry in self.downstream.snapshot().items():
            if entry.kind == "directory":
                self.assertEqual(0o700, entry.mode, path)

    def test_folder_of_a_version(self):
        """A version's folder has the mode of the one before."""
        first = self.install()
        os.chmod(self.downstream.archive(NAME, 1), 0o750)
        self.install(2, first.key)
        for number in (2, 3):
            self.assertEqual(0o750, stat.S_IMODE(os.stat(
                self.downstream.archive(NAME, number)).st_mode))

    @needs_root
    def test_owner_and_group(self):
        """0640 and a group's: for each way in which the next key comes."""
        for case in world.in_turn(("adopted", "installed", "staged", "from the source", "--key")):
            with self.subTest(case):
                self.new_downstream()
                first = self.issue()
                self.lay_plain(first)
                path = self.downstream.live(NAME, "privkey.pem")
                os.chown(path, 0, STRANGER)
                os.chmod(path, 0o640)
                self.offer(first)
                if case != "adopted":
                    self.assert_done(self.ferry(), "unchanged")
                new = self.issue(None if case in ("staged", "from the source", "--key")
                                 else first.key)
                if case == "staged":
                    self.downstream.key(NAME, new, "privkey-next.pem")
                self.offer(new, with_key=case == "from the source")
                self.assert_done(self.ferry(*(("--key", new.key) if case == "--key" else ())))
                self.downstream.assert_fits(self, NAME, new)
                for number in self.versions():
                    self.assertEqual((0o640, 0, STRANGER), self._facts(number), number)

    @world.needs("setfacl", "getfacl")
    def test_access_list(self):
        """An ACL on the key is on the next version's key too."""
        first = self.issue()
        self.lay_plain(first)
        entry = "user:{}:r--".format(STRANGER)
        try:
            subprocess.run(["setfacl", "-m", entry, self.downstream.live(NAME, "privkey.pem")],
                           check=True, stderr=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            self.skipTest("needs a file system with ACLs")
        self.offer(self.issue(first.key))
        self.assert_done(self.ferry())
        for number in (1, 2):
            listed = subprocess.run(
                ["getfacl", "-n", "-p", self.downstream.archive(NAME, number, "privkey.pem")],
                stdout=subprocess.PIPE, check=True).stdout.decode()
            self.assertIn(entry, listed)
            self.assertIn("other::---", listed)

    @world.needs("setfacl", "getfacl")
    def test_default_access_list(self):
        """What a folder gives to each new file in it does not come to a key."""
        first = self.install()
        os.chmod(self.downstream.archive(NAME, 1, "privkey.pem"), 0o640)
        try:
            subprocess.run(["setfacl", "-d", "-m", "user:{}:rwx".format(STRANGER),
                            self.downstream.config + "/archive"], check=True,
                           stderr=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            self.skipTest("needs a file system with ACLs")
        self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        listed = subprocess.run(
            ["getfacl", "-n", "-p", self.downstream.archive(NAME, 2, "privkey.pem")],
            stdout=subprocess.PIPE, check=True).stdout.decode()
        self.assertNotIn(str(STRANGER), listed)
        self.assertIn("group::r--", listed)

    def test_readable_key(self):
        """A key that others can read gets one warning line, at most, and no other mode."""
        first = self.issue()
        self.lay_plain(first)
        os.chmod(self.downstream.live(NAME, "privkey.pem"), 0o644)
        self.offer(self.issue(first.key))
        result = self.ferry()
        self.assert_done(result)
        lines = [line for line in result.err.splitlines() if "privkey.pem" in line]
        self.assertEqual(1, len(lines), result)


# ---------------------------------------------------------------- other users

class OtherUsers(VersionsCase):
    """What another user can plant: nothing is followed, read as root or written through."""

    def _assert_untouched(self, result, before, *words):
        self.assert_refused(result, *words)
        after = self.downstream.snapshot()
        self.assertEqual([], [path for path in world.changed(before, after)
                              if path.startswith(("live/", "archive/"))])

    def test_planted(self):
        """Links out of the config dir, FIFOs and folders in place of files."""
        secret = world.write(os.path.join(self.outside, "secret"), "root:secret\n", 0o600)
        made = self.issue()

        def link(path):
            os.symlink(secret, path)

        def link_to_key(path):
            os.symlink(made.key, path)

        plants = [(link, name) for name in ("privkey.pem", "fullchain.pem", "cert.pem")]
        plants += [(make, name) for make in (os.mkfifo, os.mkdir)
                   for name in ("privkey.pem", "fullchain.pem")]
        plants += [(link_to_key, "privkey.pem")]
        for make, name in world.in_turn(plants):
            with self.subTest(name, by=make.__name__):
                self.new_downstream()
                self.lay_plain(made)
                path = self.downstream.live(NAME, name)
                os.unlink(path)
                make(path)
                self.offer(self.issue(made.key))
                before = self.downstream.snapshot()
                result = self.ferry(timeout=50)
                self._assert_untouched(result, before)
                self.assertNotIn("secret\n", result.out + result.err)

    def test_planted_staged_key(self):
        """A FIFO or a link out of the config dir as a staged key is not followed."""
        other = self.issue()
        for make in (os.mkfifo, lambda path: os.symlink(other.key, path)):
            self.new_downstream()
            first = self.install()
            make(self.downstream.live(NAME, "privkey-x.pem"))
            self.offer(self.issue(other.key))
            self.assert_refused(self.renew(timeout=50))
            self.downstream.assert_fits(self, NAME, first)

    @needs_root
    def test_owners(self):
        """Files of another user are refused with file and owner."""
        for name in world.in_turn((
                "live/{0}/privkey.pem", "live/{0}/fullchain.pem", "live/{0}", "live",
                "certferry/{0}.conf", "certferry")):
            with self.subTest(name):
                self.new_downstream()
                first = self.issue()
                self.lay_plain(first)
                os.makedirs(self.downstream.config + "/certferry", 0o700)
                world.write(self.downstream.conf(NAME), "deploy-hook = touch {}/bad\n".format(
                    self.outside), 0o600)
                self.offer(self.issue(first.key))
                path = os.path.join(self.downstream.config, name.format(NAME))
                os.chown(path, STRANGER, 0)
                before = self.downstream.snapshot()
                self._assert_untouched(self.ferry(), before, path, str(STRANGER))
                result = self.renew()
                self.assertNotIn("Traceback", result.err)
                self.assertEqual([], [change for change in world.changed(
                    before, self.downstream.snapshot()) if change.startswith(("live", "archive"))])
                self.assertFalse(os.path.exists(self.outside + "/bad"))

    @needs_root
    def test_owner_of_a_versions_key(self):
        """The key in service, given to a service's user, stays so, and the next ones are that
        user's; not where its folder is that user's too."""
        first = self.install(2)
        path = self.downstream.archive(NAME, 2, "privkey.pem")
        os.chown(path, STRANGER, STRANGER)
        os.utime(path)  # the record of the key does not fit any more
        self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.offer(self.issue(), with_key=True)
        self.assert_done(self.renew())
        for number in (3, 4):
            facts = os.stat(self.downstream.archive(NAME, number, "privkey.pem"))
            self.assertEqual((STRANGER, STRANGER, 0o600), (
                facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)))
        path = self.downstream.archive(NAME, 4, "privkey.pem")
        key, foreign = world.read(path), self.issue()
        with open(path, "wb") as file:  # as that user could
            file.write(world.read(foreign.key))
        self.offer(foreign)
        self.assert_refused(self.renew(), path, str(STRANGER))
        self.assertEqual([], self.staged())
        with open(path, "wb") as file:
            file.write(key)
        folder = self.downstream.archive(NAME, 4)
        os.chown(folder, STRANGER, STRANGER)
        before = self.downstream.snapshot()
        self._assert_untouched(self.renew(), before, folder, str(STRANGER), "chown it to root")

    @needs_root
    def test_hook_in_another_users_folder(self):
        """A hook that is a link of root's to where another user could put something else."""
        first = self.install()
        folder = os.path.join(self.outside, "home")
        os.mkdir(folder)
        world.write(folder + "/hook", "#!/bin/sh\ntouch {}/bad\n".format(self.outside), 0o755)
        os.chown(folder, STRANGER, STRANGER)
        os.unlink(self.downstream.hook("deploy", "hook", "true"))
        os.symlink(folder + "/hook", self.downstream.config + "/renewal-hooks/deploy/hook")
        self.offer(self.issue(first.key))
        self.assert_refused(self.renew(), folder, str(STRANGER))
        os.rename(folder + "/hook", self.outside + "/hook")
        os.symlink(self.outside + "/hook", folder + "/hook")
        os.lchown(folder + "/hook", STRANGER, STRANGER)
        self.assert_refused(self.renew(), "another user's")
        self.assertFalse(os.path.exists(self.outside + "/bad"))

    @needs_root
    def test_another_users_link(self):
        """A link of another user in live/NAME/, or one that stands for a folder."""
        for name in world.in_turn((
                "live/{0}/fullchain.pem", "live/{0}/privkey.pem", "live/{0}", "live", "archive")):
            with self.subTest(name):
                self.new_downstream()
                first = self.issue()
                self.lay_certbot(first)
                path = os.path.join(self.downstream.config, name.format(NAME))
                if not os.path.islink(path):
                    shutil.move(path, self.outside + "/moved")
                    os.symlink(self.outside + "/moved", path)
                os.lchown(path, STRANGER, STRANGER)
                self.offer(self.issue(first.key))
                before = self.downstream.snapshot()
                self._assert_untouched(self.ferry(), before, path)

    def test_open_folders(self):
        """A folder that others can write is refused by its path."""
        for name, mode in world.in_turn(
                (name, mode) for name in ("live", "live/" + NAME, "certferry", "archive")
                for mode in (0o775, 0o1777)):
            with self.subTest(name, mode=oct(mode)):
                self.new_downstream()
                first = self.install()
                path = os.path.join(self.downstream.config, name)
                os.chmod(path, mode)
                self.offer(self.issue(first.key))
                before = self.downstream.snapshot()
                self._assert_untouched(self.renew(), before, path)
                self.downstream.assert_fits(self, NAME, first)

    def test_conf_that_is_a_link(self):
        """It is refused for what it is: nothing is wrong with the disk."""
        self.install()
        conf = self.downstream.conf(NAME)
        os.rename(conf, self.outside + "/conf")
        os.symlink(self.outside + "/conf", conf)
        status, lineage = self.told("renew")
        self.assertEqual((1, "failed", None), (status, lineage["result"], lineage["reason"]))
        self.assertIn(conf, lineage["detail"])

    def test_open_conf(self):
        """A conf that others can write is refused, not run."""
        first = self.install()
        os.chmod(self.downstream.conf(NAME), 0o666)
        self.offer(self.issue(first.key))
        before = self.downstream.snapshot()
        self._assert_untouched(self.renew(), before, self.downstream.conf(NAME))
        self.assertEqual(1, self.hooks())

    @needs_root
    def test_planted_litter(self):
        """What looks like an interrupted run's is removed without following it."""
        self.install()
        keep = os.path.join(self.outside, "keep")
        os.mkdir(keep)
        world.write(keep + "/file", "precious")
        os.symlink(keep, "{}/archive/.{}@2{}".format(self.downstream.config, NAME, LITTER))
        os.symlink(keep, self.downstream.live(NAME, ".current" + LITTER))
        self.assertNotIn("Traceback", self.renew().err)
        self.assertEqual(["file"], os.listdir(keep))


class AdministratorsLinks(VersionsCase):
    """config-dir, live, archive or NAME may be links to elsewhere, where root made them."""

    def test_elsewhere(self):
        """First crossing, rotation and rollback through each of them."""
        for case in world.in_turn((
                "live", "archive", "live/" + NAME, "", "certferry", "live and archive")):
            with self.subTest(case or "config-dir"):
                self.new_downstream()
                first = self.offer(self.issue())
                self.downstream.key(NAME, first)
                for name in case.split(" and "):
                    self._move_away(os.path.join(self.downstream.config, name).rstrip("/"), name)
                self.assert_done(self.ferry())
                self.downstream.assert_fits(self, NAME, first)
                second = self.offer(self.issue(first.key))
                self.assert_done(self.renew())
                self.downstream.assert_fits(self, NAME, second)
                self.assert_done(self.downstream.run("rollback", NAME))
                self.downstream.assert_fits(self, NAME, first)
                for name in case.split(" and "):
                    path = os.path.join(self.downstream.config, name).rstrip("/")
                    self.assertTrue(os.path.islink(path), path)
                    self.assertTrue(os.listdir(path))

    def test_certbots_links_through_archive(self):
        """certbot's links, where archive is a link to another disk, are adopted."""
        first = self.issue()
        self.lay_certbot(first)
        self._move_away(os.path.join(self.downstream.config, "archive"), "archive")
        self.offer(first)
        self.assert_done(self.ferry(), "unchanged")
        self.assertEqual(1, self.current())
        self.downstream.assert_fits(self, NAME, first)

    def test_key_of_a_version(self):
        """A version's key may be a link to elsewhere in the config dir: it stays one."""
        first = self.install()
        path = self.downstream.archive(NAME, 1, "privkey.pem")
        keys = os.path.join(self.downstream.config, "keys")
        os.mkdir(keys, 0o700)
        os.rename(path, os.path.join(keys, "k.pem"))
        os.symlink("../../keys/k.pem", path)
        os.utime(path)  # the record of the key does not fit any more
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertEqual("", result.err)
        self.assertEqual("../../keys/k.pem", os.readlink(path))
        self.downstream.assert_fits(self, NAME, first)

    def _move_away(self, path, name):
        away = os.path.join(self.outside, "deep", "er", name.replace("/", "-") or "config")
        os.makedirs(os.path.dirname(away), exist_ok=True)
        if os.path.exists(path):
            shutil.move(path, away)
        else:
            os.mkdir(away, 0o755)
        os.symlink(away, path)


# ---------------------------------------------------------------- rollback and pruning

class Rollback(VersionsCase):
    """Back to the version before, and forward again."""

    def rollback(self, *options, **how):
        """`certferry rollback NAME`."""
        return self.downstream.run("rollback", NAME, *options, **how)

    def test_back_and_back(self):
        """One more each time; what was gone back from stays out; a newer offer goes on."""
        first = self.install()
        second = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        third = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        for hooks, version in ((4, second), (5, first)):
            self.assert_done(self.rollback())
            self.downstream.assert_fits(self, NAME, version)
            self.assertEqual(hooks, self.hooks())
            result = self.renew()
            self.assertEqual(0, result.status, result)
            self.assertIn("deferred", result.out)
            self.downstream.assert_fits(self, NAME, version)
        result = self.rollback()
        self.assert_refused(result)
        self.assertEqual(1, len(result.err.splitlines()), result)
        self.downstream.assert_fits(self, NAME, first)
        self.assertEqual(5, self.hooks())
        self.offer(second)  # gone back from as well
        self.assertIn("deferred", self.renew().out)
        self.downstream.assert_fits(self, NAME, first)
        self.offer(third)
        self.assertIn("deferred", self.renew().out)
        newer = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, newer)

    def test_skips_what_was_rolled_back_from(self):
        """After going back and on, back leads to what was current before, not to what failed."""
        first = self.install()
        self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        third = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, third)
        self.assert_done(self.rollback())
        self.downstream.assert_fits(self, NAME, first)

    def _other_intermediate(self, **how):
        """The authority's intermediate once more, as its root could have issued it again."""
        return self.authority.issue([], subject="/O=Example/CN=Example Root Intermediate", ca=True,
                                    key=self.authority.intermediate.key,
                                    issuer=self.authority.root_credential, **how)

    def _offer_chain(self, credential, *issuers):
        """Let the source have the leaf with another chain."""
        world.write(self.source, b"".join(
            world.read(one.cert) for one in (credential,) + issuers))

    def test_another_chain(self):
        """Where only the chain is new, back leads to the chain before; then to the leaf before."""
        first = self.install()
        second = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self._offer_chain(second, self._other_intermediate())
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        self.downstream.assert_fits(self, NAME, second)
        self.assertEqual(2, self.current())
        self.assertIn("deferred", self.renew().out)
        self.assert_done(self.rollback())
        self.downstream.assert_fits(self, NAME, first)
        self.assert_refused(self.rollback())

    def test_what_a_chain_rolled_back_from_leaves(self):
        """The leaf in service is no worse for it: with its chain, with a third, to go back to."""
        second = self.install(2)
        self._offer_chain(second, self._other_intermediate())
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        self.offer(second)
        self.assert_done(self.ferry("-d", NAME), "unchanged")
        self.offer(self.issue(second.key))
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        self.assertEqual(2, self.current())
        self._offer_chain(second, self._other_intermediate())
        self.assert_done(self.renew())

    def test_killed_before_its_rename(self):
        """A rollback that did not happen leaves the version in service one to go back to."""
        second = self.install(2)
        dies = world.patched(self, "certferry.point_to = lambda *_: os.kill(os.getpid(), 9)")
        self.rollback(python=dies)
        self.assertEqual("ok", self.told("status")[1]["health"])
        self.assert_done(self.renew(), "unchanged")
        self.assertEqual(2, self.hooks())
        self.offer(self.issue(second.key))
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        self.assertEqual(2, self.current())

    def test_killed_while_hooks_were_owed(self):
        """What was owed before is owed after it, though the runs in between were refused."""
        first = self.install()
        fails = self.downstream.hook("deploy", "fails", "exit 1")
        second = self.offer(self.issue(first.key))
        self.assert_refused(self.renew(), fails)
        self.offer(self.issue())
        self.assert_refused(self.renew(), "another key")
        dies = world.patched(self, "certferry.point_to = lambda *_: os.kill(os.getpid(), 9)")
        self.rollback(python=dies)
        self.offer(second)
        self.downstream.hook("deploy", "fails", "touch {}/mended".format(self.outside))
        self.assert_done(self.renew(), "unchanged")
        self.assertTrue(os.path.exists(self.outside + "/mended"))

    def test_a_chain_with_a_choice(self):
        """An issuer that was issued again beside the one in service: which of them is judged."""
        leaf, old = self.issue(), self._other_intermediate(not_after=world.days(40))
        self.downstream.key(NAME, leaf)
        self._offer_chain(leaf, old)
        self.assert_done(self.ferry())
        new = self._other_intermediate()
        self._offer_chain(leaf, new, old)
        self.assert_done(self.renew())
        self.assertEqual(world.read(new.cert), world.read(self.downstream.live(NAME, "chain.pem")))

    def test_json(self):
        """The object says installed, the version, and that something changed."""
        self.install(2)
        status, document = self.downstream.json("rollback", NAME)
        lineage = document["lineages"][0]
        self.assertEqual((0, "installed", None, True),
                         (status, lineage["result"], lineage["reason"], lineage["changed"]))
        self.assertEqual(self.current(), lineage["version"])
        status, document = self.downstream.json("renew")
        lineage = document["lineages"][0]
        self.assertEqual((0, "deferred", "rolled-back"),
                         (status, lineage["result"], lineage["reason"]))

    def test_forward_by_force(self):
        """`renew NAME --force` takes the offer that was rolled back from."""
        first = self.install()
        second = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        self.assert_done(self.renew(NAME, "--force"))
        self.downstream.assert_fits(self, NAME, second)
        self.assert_done(self.renew(), "unchanged")
        self.assert_done(self.rollback())
        self.downstream.assert_fits(self, NAME, first)

    def test_key_change(self):
        """Across a key change both change, it is said, and forward takes the key along."""
        first = self.install()
        second = self.issue()
        self.downstream.key(NAME, second, "privkey-next.pem")
        self.offer(second)
        self.assert_done(self.renew())
        result = self.rollback()
        self.assert_done(result)
        self.assertIn("key", result.out)
        self.downstream.assert_fits(self, NAME, first)
        status, document = self.downstream.json("renew")
        self.assertEqual((0, "rolled-back"), (status, document["lineages"][0]["reason"]))
        self.downstream.assert_fits(self, NAME, first)
        third = self.offer(self.issue(first.key))  # no longer retired
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, third)

    def roll_back_a_key(self):
        """Change the key, then go back; return (what is in service, what was)."""
        first, second = self.install(), self.issue()
        self.downstream.key(NAME, second, "privkey-next.pem")
        self.offer(second)
        self.assert_done(self.renew())
        self.assert_done(self.rollback())
        return first, second

    def test_key_change_forward(self):
        """Forward again by force, with the key from its version; then the old key is retired."""
        first, second = self.roll_back_a_key()
        self.assert_done(self.renew(NAME, "--force"))
        self.downstream.assert_fits(self, NAME, second)
        self.offer(self.issue(first.key))
        self.assert_refused(self.renew())
        self.downstream.assert_fits(self, NAME, second)

    def test_key_change_forward_without_the_key(self):
        """Where the key is nowhere any more force says why it does not go, and stays."""
        first, _ = self.roll_back_a_key()
        os.unlink(self.downstream.archive(NAME, 2, "privkey.pem"))
        result = self.renew(NAME, "--force", "--json")
        self.assert_refused(result, "another key")
        self.assertIn('"key-mismatch"', result.out)
        self.assertNotIn("bug in certferry", result.err)
        self.downstream.assert_fits(self, NAME, first)

    def test_key_is_not_there(self):
        """It comes back from where it is found, else the version in service stays as it is."""
        for spoilt, found in world.in_turn((
                ("overwritten", "staged"), ("overwritten", ""), ("removed", "another version"),
                ("removed", "staged"), ("removed", ""))):
            with self.subTest(spoilt, found=found):
                self.new_downstream()
                first = self.install()
                second = self.issue(first.key if found == "another version" else None)
                if spoilt == "overwritten":
                    self.overwrite_key(second)
                self.offer(second, with_key=spoilt == "removed")
                self.assert_done(self.renew())
                if spoilt == "removed":
                    os.unlink(self.downstream.archive(NAME, 1, "privkey.pem"))
                if found == "staged":
                    self.downstream.key(NAME, first, "privkey-old.pem")
                before, result = self.contents(), self.rollback()
                if found:
                    self.assert_done(result)
                    self.downstream.assert_fits(self, NAME, first)
                else:
                    self.assert_refused(result, "no private key that fits")
                    self.assertEqual(before, self.contents())
                    self.downstream.assert_fits(self, NAME, second)

    def test_certificate_is_not_there(self):
        """A cert.pem that the version gone back to has lost is made again."""
        first = self.install()
        self.install(1, first.key)
        os.unlink(self.downstream.archive(NAME, 1, "cert.pem"))
        self.assert_done(self.rollback())
        self.downstream.assert_fits(self, NAME, first)

    @world.needs("faketime")
    def test_previous_is_not_valid(self):
        """A version that has expired by now is not gone back to."""
        first = self.issue(not_after=world.days(10))
        self.downstream.key(NAME, self.offer(first))
        self.assert_done(self.ferry())
        second = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        result = self.rollback(python=world.under_clock(self, "+20d"))
        self.assert_refused(result, "not valid")
        self.downstream.assert_fits(self, NAME, second)
        self.assertEqual(2, self.hooks())

    @world.needs("faketime")
    def test_previous_is_not_valid_nor_whole(self):
        """Where it has expired its key is not seen to either: nothing is written but the state."""
        first = self.issue(not_after=world.days(10))
        self.downstream.key(NAME, self.offer(first))
        self.assert_done(self.ferry())
        self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        other = self.issue()
        world.write(self.downstream.archive(NAME, 1, "privkey.pem"), world.read(other.key))
        before = self.downstream.snapshot()
        self.assert_refused(self.rollback(python=world.under_clock(self, "+20d")), "not valid")
        record = os.path.relpath(self.downstream.state(NAME), self.downstream.config)
        self.assertEqual([], [path for path in world.changed(before, self.downstream.snapshot())
                              if path not in (record, os.path.dirname(record))])

    def test_nothing_to_go_back_to(self):
        """One line and status 1: with one version, with plain files, with nothing at all."""
        for case in ("one version", "plain files", "nothing"):
            with self.subTest(case):
                self.new_downstream()
                if case == "one version":
                    self.install()
                elif case == "plain files":
                    self.lay_plain(self.issue())
                before = self.downstream.snapshot()
                result = self.rollback()
                self.assert_refused(result)
                self.assertEqual(1, len(result.err.splitlines()), result)
                after = self.downstream.snapshot()
                self.assertEqual([], [path for path in world.changed(before, after)
                                      if path.startswith(("live", "archive"))])

    def test_dry_run(self):
        """Nothing is written, no hook runs, and none is said to be pending."""
        self.install(2)
        before = self.downstream.snapshot()
        self.assertIn(self.hooks_log + ": would run\n", self.rollback("--dry-run").out)
        status, document = self.downstream.json("rollback", NAME, "--dry-run")
        self.assertEqual((0, "ok"), (status, document["lineages"][0]["health"]))
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))
        self.assertEqual(2, self.hooks())


class Pruning(VersionsCase):
    """The five newest and the current one stay, one of them at most with a replaced key."""

    def _rotate(self, keys):
        """One version for each letter, which stands for a key."""
        made = {}
        for letter in keys:
            new = self.issue(made.get(letter))
            made[letter] = new.key
            self.offer(new, with_key=True)
            if not os.path.exists(self.downstream.live(NAME)):
                self.downstream.key(NAME, new)
                self.assert_done(self.ferry())
            else:
                self.assert_done(self.renew())
            self.downstream.assert_fits(self, NAME, new)

    def test_kept(self):
        """Which versions are left after rotations with these keys."""
        cases = [
            ("AAA", [1, 2, 3]), ("AAAAA", [1, 2, 3, 4, 5]), ("AAAAAAAA", [4, 5, 6, 7, 8]),
            ("AAAB", [3, 4]), ("AAABBB", [3, 4, 5, 6]), ("AABBCC", [4, 5, 6]),
            ("ABC", [2, 3]), ("ABBBBBB", [3, 4, 5, 6, 7]),
        ]
        for keys, kept in world.in_turn(cases):
            with self.subTest(keys):
                self.new_downstream()
                self._rotate(keys)
                self.assertEqual(kept, self.versions())

    def test_current_is_old(self):
        """After rollbacks the version in service is kept by the next deploy's pruning, too."""
        first = self.install(5)
        for _ in range(4):
            self.assert_done(self.downstream.run("rollback", NAME))
        self.assertEqual(1, self.current())
        self.assertEqual([1, 2, 3, 4, 5], self.versions())
        new = self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)
        self.assertEqual([1, 2, 3, 4, 5, 6], self.versions())
        self.assert_done(self.downstream.run("rollback", NAME))
        self.assertEqual(1, self.current())

    def test_in_service_until_the_deploy(self):
        """It stays, too, where a third key replaces it, and is what is gone back to."""
        first = self.install()
        for command in (("renew",), ("rollback", NAME), ("renew",), ("rollback", NAME)):
            if command == ("renew",):
                new = self.offer(self.issue())
                self.downstream.key(NAME, new, "privkey-next.pem")
            self.assert_done(self.downstream.run(*command))
            self.downstream.assert_fits(self, NAME, first if "rollback" in command else new)
        self.assertEqual((1, True), (self.current(), 3 in self.versions()))

    def test_folder_in_a_version(self):
        """What an administrator put into a version goes with it, and stops nothing."""
        self._rotate("A")
        os.mkdir(self.downstream.archive(NAME, 1, "old"))
        world.write(self.downstream.archive(NAME, 1, "old", "notes"), "")
        self._rotate("BC")
        self.assertEqual([2, 3], self.versions())
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertEqual("", result.err)

    def test_others_are_left(self):
        """Neither certbot's archive nor another lineage's versions are pruned."""
        archive = os.path.join(self.downstream.config, "archive")
        for name in (NAME, "www." + NAME + "@1", NAME + "@x", NAME + "@1.old", NAME + "@0"):
            os.makedirs(os.path.join(archive, name))
            world.write(os.path.join(archive, name, "cert1.pem"), name)
        before = self.downstream.snapshot()
        self.install(7)
        after = self.downstream.snapshot()
        for path in before:
            if path.startswith("archive/"):
                self.assertEqual(before[path], after.get(path), path)


# ---------------------------------------------------------------- recovery

class Recovery(VersionsCase):
    """Each run first clears what an interrupted one left."""

    def test_litter(self):
        """Staged folders, half-made links and records go, with one line that says so."""
        first = self.install()
        before = set(self.downstream.snapshot())
        folder = "{}/archive/.{}@2{}".format(self.downstream.config, NAME, LITTER)
        os.mkdir(folder)
        world.write(folder + "/cert.pem", b"half")
        os.symlink("../../archive/{}@2".format(NAME),
                   self.downstream.live(NAME, ".current" + LITTER))
        world.write("{}/certferry/.{}.state{}".format(self.downstream.config, NAME, LITTER), b"")
        result = self.renew()
        self.assert_done(result, "unchanged")
        self.assertEqual(before, set(self.downstream.snapshot()))
        self.assertEqual(1, (result.out + result.err).count("interrupted"), result)
        self.downstream.assert_fits(self, NAME, first)
        self.assertNotIn("interrupted", self.renew().err)

    def test_dry_run_leaves_it(self):
        """A dry run and status clear nothing."""
        self.install()
        world.write("{}/certferry/.{}.state{}".format(self.downstream.config, NAME, LITTER), b"")
        before = self.downstream.snapshot()
        self.renew("--dry-run")
        self.downstream.run("status")
        self.assertEqual([], world.changed(before, self.downstream.snapshot()))

    def test_links_before_the_rename(self):
        """A key alone beside links that lead nowhere yet is still taken by `renew`."""
        name = "127.0.0.1"
        self.downstream.key(name, self.issue())
        for member in MEMBERS[:3]:
            os.symlink(".current/" + member, self.downstream.live(name, member))
        result = self.renew("--json")
        self.assertIn('"name": "{}"'.format(name), result.out)
        self.assertNotIn("another tool", result.err)

    def test_certificate_gone_from_the_version(self):
        """What servers read is missing or empty: critical, until the next run makes it again."""
        self.install()
        path = self.downstream.archive(NAME, 1, "cert.pem")
        for spoil in (os.unlink, lambda path: world.write(path, "")):
            spoil(path)
            status, lineage = self.told("status")
            self.assertEqual((2, "critical"), (status, lineage["health"]))
            self.assert_done(self.renew(), "unchanged")
            self.assertEqual("ok", self.told("status")[1]["health"])

    def test_damaged_version(self):
        """A version that lost a file is not gone back to, and stops nothing."""
        third = self.install(3)
        os.unlink(self.downstream.archive(NAME, 2, "fullchain.pem"))
        self.assert_done(self.renew(), "unchanged")
        self.assert_done(self.downstream.run("rollback", NAME))
        self.assertEqual(1, self.current())
        self.downstream.assert_fits(self, NAME)
        new = self.offer(self.issue(third.key))
        self.assert_done(self.renew())
        self.downstream.assert_fits(self, NAME, new)


# ---------------------------------------------------------------- locking

class Locking(VersionsCase):
    """Runs wait for each other."""

    def setUp(self):
        super().setUp()
        self.gate = os.path.join(self.outside, "gate")
        os.mkfifo(self.gate)

    def _start_blocked(self):
        """A run that has deployed and is held up in its hook; the Popen."""
        first = self.install()
        self.entered = os.path.join(self.outside, "entered")
        self.downstream.hook("deploy", "gate", "echo >>{}; timeout 60 cat {} >/dev/null".format(
            self.entered, self.gate))
        self.second = self.offer(self.issue(first.key))
        process = self.downstream.start("renew")
        self.addCleanup(self._end, process)
        world.eventually(lambda: os.path.exists(self.entered))
        return process

    def _end(self, process):
        """Whatever is left of a run and its hooks."""
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()

    def test_second_waits(self):
        """The second run waits, then finds nothing to do; hooks run once."""
        first = self._start_blocked()
        second = self.downstream.start("renew")
        self.addCleanup(self._end, second)
        with self.assertRaises(subprocess.TimeoutExpired):
            second.wait(0.5)
        descriptor = os.open(self.gate, os.O_WRONLY)
        os.close(descriptor)
        out, err = first.communicate(timeout=50)
        self.assertEqual((0, b""), (first.returncode, err), out)
        out, err = second.communicate(timeout=50)
        self.assertEqual((0, b""), (second.returncode, err), out)
        self.assertIn(b"unchanged", out)
        self.assertEqual(1, len(world.read(self.entered).splitlines()))
        self.assertEqual(2, self.hooks())
        self.downstream.assert_fits(self, NAME, self.second)

    @world.needs("faketime")
    def test_holder_is_named(self):
        """After a minute (of a fast clock): which process holds it, status 1, nothing touched."""
        first = self._start_blocked()
        before = self.downstream.snapshot()
        for arguments in (("renew",), ("rollback", NAME), (NAME,)):
            with self.subTest(arguments):
                result = self.downstream.run(*arguments, python=world.under_clock(self, "+0 x60"))
                self.assert_refused(result)
                self.assertRegex(result.err, r"\b{}\b".format(first.pid))
                self.assertEqual([], world.changed(before, self.downstream.snapshot()))
        status, document = self.downstream.json("renew", python=world.under_clock(self, "+0 x60"))
        lineage = document["lineages"][0]
        self.assertEqual((1, NAME, "failed", None), (
            status, lineage["name"], lineage["result"], lineage["reason"]))
        self.assertRegex(lineage["detail"], r"\b{}\b".format(first.pid))

    def test_status_does_not_wait(self):
        """What is here can be asked while a run is under way."""
        self._start_blocked()
        result = self.downstream.run("status", timeout=50)
        self.assertIn(NAME, result.out)

    def test_killed_holder(self):
        """A killed run holds up nobody, even while its hook lives on; the hooks run again."""
        first = self._start_blocked()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        os.unlink(os.path.join(self.downstream.config, "renewal-hooks/deploy/gate"))
        result = self.renew(timeout=50)
        self.assertEqual(0, result.status, result)
        self.downstream.assert_fits(self, NAME, self.second)
        self.assertEqual(2, self.hooks())

    def test_at_the_same_time(self):
        """Two and twelve runs deploy once and run the hooks once."""
        for count in (2, 12):
            with self.subTest(count):
                self.new_downstream()
                first = self.install()
                second = self.offer(self.issue(first.key))
                runs = [self.downstream.start("renew") for _ in range(count)]
                outputs = [run.communicate(timeout=60) for run in runs]
                self.assertEqual([0] * count, [run.returncode for run in runs], outputs)
                self.assertEqual(1, sum(b": installed" in out for out, _ in outputs))
                self.assertEqual(count - 1, sum(b": unchanged" in out for out, _ in outputs))
                self.assertEqual(2, self.hooks())
                self.assertEqual([1, 2], self.versions())
                self.downstream.assert_fits(self, NAME, second)

    def test_first_crossings_at_the_same_time(self):
        """Four first crossings make one version."""
        first = self.offer(self.issue())
        self.downstream.key(NAME, first)
        runs = [self.downstream.start(
            NAME, "--from", "file:" + self.source, "--ca-file", self.authority.root,
            "--deploy-hook", "echo ran >>" + self.hooks_log) for _ in range(4)]
        outputs = [run.communicate(timeout=60) for run in runs]
        self.assertEqual([0] * 4, [run.returncode for run in runs], outputs)
        self.assertEqual([1], self.versions())
        self.assertEqual(1, self.hooks())
        self.downstream.assert_fits(self, NAME, first)


# ---------------------------------------------------------------- clocks

@world.needs("faketime")
class Clocks(VersionsCase):
    """A clock that is years off loses nothing."""

    def _assert_good_again(self, credential):
        self.assert_done(self.renew(), "unchanged")
        self.downstream.assert_fits(self, NAME, credential)
        status, document = self.downstream.json("status")
        self.assertEqual((0, "ok"), (status, document["lineages"][0]["health"]), document)

    def test_forward(self):
        """Years ahead everything has expired: refused, with the clock named."""
        first = self.install()
        for case in ("the current leaf", "a newer one"):
            with self.subTest(case):
                result = self.renew("--json", python=world.under_clock(self, "+20y"))
                self.assert_refused(result, "check the clock")
                self.assertIn('"expired"', result.out)
                self.downstream.assert_fits(self, NAME, first)
                self.assertEqual(1, self.hooks())
                self.offer(self.issue(first.key))
        self.offer(first)
        self._assert_good_again(first)

    def test_back(self):
        """Years back the current one is not yet valid either: deferred, with the clock named."""
        first = self.install()
        for case in ("the current leaf", "a newer one"):
            with self.subTest(case):
                result = self.renew("--json", python=world.under_clock(self, "-20y"))
                self.assertEqual(0, result.status, result)
                self.assertIn("check the clock", result.err)
                self.assertIn('"deferred"', result.out)
                self.assertIn('"not-yet-valid"', result.out)
                self.downstream.assert_fits(self, NAME, first)
                self.assertEqual(1, self.hooks())
                self.offer(self.issue(first.key))
        self.offer(first)
        self._assert_good_again(first)

    def test_offer_from_the_future(self):
        """Where the current one is valid, an offer that is not yet is refused."""
        first = self.install()
        self.offer(self.issue(first.key, not_before=world.days(2)))
        status, document = self.downstream.json("renew")
        self.assertEqual((1, "refused", "not-yet-valid"),
                         (status, document["lineages"][0]["result"],
                          document["lineages"][0]["reason"]))
        self.downstream.assert_fits(self, NAME, first)

    def test_stored_time_is_later_than_now(self):
        """A check that is stored as of next year counts as never."""
        self.install()
        later = world.days(300)
        os.utime(self.downstream.state(NAME), (later, later))
        status, document = self.downstream.json("status")
        self.assertEqual((1, "warning"), (status, document["lineages"][0]["health"]))
        self.assert_done(self.renew(), "unchanged")
        self.assertEqual(0, self.downstream.run("status").status)


# ---------------------------------------------------------------- damage

class Damage(VersionsCase):
    """Records that were cut off, or edited by a hand that slipped."""

    BYTES = [
        ("empty", lambda data: b""), ("cut off", lambda data: data[:len(data) // 2]),
        ("zeros", lambda data: b"\0" * 4096), ("no INI", lambda data: b"hello\n[[[\n= =\n"),
        ("bytes", lambda data: bytes(range(256))), ("huge", lambda data: data + b"#" * 5000000),
        ("twice", lambda data: data + data),
        ("values", lambda data: re.sub(b"= .*", b"= \xff~!", data)),
    ]

    def test_state(self):
        """Whatever the state holds, the ferry goes on and writes a good one."""
        for case, damage in world.in_turn(self.BYTES):
            with self.subTest(case):
                self.new_downstream()
                first = self.install()
                path = self.downstream.state(NAME)
                world.write(path, damage(world.read(path)), 0o600)
                if case not in ("empty", "cut off"):  # these may be as good as whole
                    self.assertIn(path, self._notes())
                self.assertNotIn("Traceback", self.downstream.run("status").err)
                second = self.offer(self.issue(first.key))
                self.assert_done(self.renew())
                self.downstream.assert_fits(self, NAME, second)
                self.assertEqual(2, self.hooks())
                self.assertEqual("", self.renew().err)

    def _notes(self):
        result = self.renew("--dry-run")
        self.assertNotIn("Traceback", result.err)
        return result.err

    def test_state_is_no_file(self):
        """A folder or a FIFO in its place is said and stops no deployment."""
        for make in (os.mkdir, os.mkfifo):
            with self.subTest(make.__name__):
                self.new_downstream()
                first = self.install()
                path = self.downstream.state(NAME)
                os.unlink(path)
                make(path)
                second = self.offer(self.issue(first.key))
                result = self.renew(timeout=50)
                self.assertNotIn("Traceback", result.err)
                self.assertIn(path, result.err)
                self.downstream.assert_fits(self, NAME, second)

    def rolled_back(self):
        """A first version, in service again after the second one; its Credential."""
        first = self.install()
        self.offer(self.issue(first.key))
        self.assert_done(self.renew())
        self.assert_done(self.downstream.run("rollback", NAME))
        return first

    def test_state_is_a_link(self):
        """What it holds is not read, nor is it written anew: what was rolled back stays out."""
        first = self.rolled_back()
        path, away = self.downstream.state(NAME), os.path.join(self.outside, "state")
        os.rename(path, away)
        os.symlink(away, path)
        before = self.downstream.snapshot(), world.read(away)
        self.assert_refused(self.renew(), path)
        self.assertEqual(before, (self.downstream.snapshot(), world.read(away)))
        os.unlink(path)
        os.rename(away, path)
        self.assert_done(self.renew(), "deferred")
        self.downstream.assert_fits(self, NAME, first)

    def test_state_of_a_later_version(self):
        """A key that is not known is passed over, and the rest is remembered."""
        first = self.rolled_back()
        path = self.downstream.state(NAME)
        text = world.read(path)
        world.write(path, text + b"colour = green\n", 0o600)
        result = self.renew()
        self.assert_done(result, "deferred")
        self.assertNotIn(path, result.err)
        self.downstream.assert_fits(self, NAME, first)
        self.assertIn(b"\nrolled-back = ", text)  # by this name earlier versions know it too

    def test_state_is_gone(self):
        """Without a state everything is found out again."""
        first = self.install()
        os.unlink(self.downstream.state(NAME))
        self.assert_done(self.renew(), "unchanged")
        self.downstream.assert_fits(self, NAME, first)
        self.assertEqual(1, self.hooks())

    def test_conf(self):
        """A conf that cannot be used is refused by its path and stays as it is."""
        texts = [b"from\n", b"fro = x\n", b"[lineage]\nfrom = x\n", b"when = sometimes\n",
                 b"warn = much\n", b"\0\0\0\0", bytes(range(128, 256)), b"#" * 5000000,
                 b"from = file:\n", b"enabled = perhaps\n"]
        for text in world.in_turn(texts):
            with self.subTest(text[:20]):
                self.new_downstream()
                first = self.install()
                path = world.write(self.downstream.conf(NAME), text, 0o600)
                self.offer(self.issue(first.key))
                status, document = self.downstream.json("renew")
                lineage = document["lineages"][0]
                self.assertEqual((1, "failed", None),
                                 (status, lineage["result"], lineage["reason"]), lineage)
                self.assertIn(path, lineage["detail"])
                self.downstream.assert_fits(self, NAME, first)
                self.assertEqual(text, world.read(path))
                self.assertEqual(1, self.hooks())

    def test_conf_of_another(self):
        """One broken conf leaves the other lineages alone."""
        first = self.install()
        world.write(self.downstream.conf("broken.example.net"), "nonsense\n", 0o600)
        second = self.offer(self.issue(first.key))
        result = self.renew()
        self.assert_refused(result, self.downstream.conf("broken.example.net"))
        self.assertIn(NAME + ": installed", result.out)
        self.downstream.assert_fits(self, NAME, second)

    def test_pointer(self):
        """A .current that leads nowhere: said; the live set is not made worse."""
        self.install(2)
        pointer = self.downstream.live(NAME, ".current")
        for target in ("../../archive/{}@9".format(NAME), "/etc", "../../archive"):
            with self.subTest(target):
                os.unlink(pointer)
                os.symlink(target, pointer)
                result = self.renew()
                self.assertNotIn("Traceback", result.err)
                self.assertTrue(result.err, result)

    def test_pointer_to_another_lineage(self):
        """A .current into another's version is said by all, and no set of it is taken."""
        self.install()
        other, pointer = self.issue(), self.downstream.live(NAME, ".current")
        folder = os.path.join(self.downstream.config, "archive", "other.example.com@1")
        shutil.copytree(self.downstream.archive(NAME, 1), folder)
        for path in (other.cert, other.chain, other.fullchain, other.key):
            shutil.copy(path, folder)
        os.unlink(pointer)
        os.symlink("../../archive/other.example.com@1", pointer)
        result = self.downstream.run("status", NAME)
        self.assertEqual(3, result.status, result)
        self.assertIn("which is no version of it", result.out)
        before = self.downstream.snapshot()
        self.assert_refused(self.renew(), "which is no version of it")
        self.assertEqual([], [path for path in world.changed(before, self.downstream.snapshot())
                              if path.startswith(("live", "archive"))])


if __name__ == "__main__":
    unittest.main()
