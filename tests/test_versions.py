"""Versions: what lies in live/ and archive/ before a command, and what lies there after it.

Most tests are tables. A row lays files by hand, as CONTRACT.md's Files describes them, lets the
source offer a certificate, runs one command, and says what must have come of it.
"""

import collections
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import types
import unittest

from tests import world

NAME = "example.com"
MEMBERS = ("cert.pem", "chain.pem", "fullchain.pem", "privkey.pem")
CERTIFICATES = MEMBERS[:3]
KEY = "privkey.pem"
LITTER = ".certferry-new"
HOOK = 'echo ran >>"$RENEWED_LINEAGE/../../../hooks.log"'
STRANGER = 12345  # a user and group that nobody is

needs_root = unittest.skipIf(os.geteuid(), "needs root")

# ---------------------------------------------------------------- a downstream laid by hand


@functools.lru_cache(maxsize=None)
def made():
    """All credentials that the tables speak of, each newer than the one before it.

    old, other, current, chained, renewed, rekeyed, latest, other_latest, rekeyed_latest; `other`
    and `rekeyed` have keys of their own, `chained` is current's leaf with another chain.
    """
    folder = world.scratch()
    authority = world.Authority(folder)
    expired = authority.issue([NAME], not_after=world.days(-0.5))
    old = authority.issue([NAME], key=expired.key)
    other = authority.issue([NAME])
    current = authority.issue([NAME], key=old.key)
    renewed = authority.issue([NAME], key=old.key)
    rekeyed = authority.issue([NAME])
    return types.SimpleNamespace(
        authority=authority,
        expired=expired,
        old=old,
        other=other,
        current=current,
        chained=_with_another_chain(authority, current),
        renewed=renewed,
        rekeyed=rekeyed,
        latest=authority.issue([NAME], key=old.key),
        other_latest=authority.issue([NAME], key=other.key),
        rekeyed_latest=authority.issue([NAME], key=rekeyed.key),
    )


def _with_another_chain(authority, credential):
    """The same leaf below the same intermediate, as the root could have issued that again."""
    again = authority.issue(
        [],
        subject="/O=Example/CN=Example Root Intermediate",
        ca=True,
        key=authority.intermediate.key,
        issuer=authority.root_credential,
    )
    fullchain = world.read(credential.cert) + world.read(again.cert)
    path = world.write(os.path.join(os.path.dirname(again.cert), "longer.pem"), fullchain)
    return world.Credential(credential.key, credential.cert, again.cert, path)


def contents(credential):
    """The bytes of a credential's four files, by name."""
    paths = (credential.cert, credential.chain, credential.fullchain, credential.key)
    return {name: world.read(path) for name, path in zip(MEMBERS, paths)}


class Laid(world.Downstream):
    """A downstream whose files are laid by hand; .offer is the path of what its source has."""

    def __enter__(self):
        super().__enter__()
        self.outside = os.path.dirname(self.config)
        self.offer = os.path.join(self.outside, "offer.pem")
        return self

    def lay(self, credential, *names, folder=None, mode=0o600):
        """Put plain files of a credential (all four, or these) into live/NAME/ or `folder`."""
        folder = folder or self.live(NAME)
        os.makedirs(folder, 0o755, exist_ok=True)
        for name, content in contents(credential).items():
            if name in (names or MEMBERS):
                path = os.path.join(folder, name)
                self.unlink(path)
                world.write(path, content, mode if name == KEY else 0o644)

    def lay_versions(self, *credentials, current=None):
        """Make them versions 1, 2, ... and the last one, or `current`, the one in service."""
        for number, credential in enumerate(credentials, 1):
            self.lay(credential, folder=self.archive(NAME, number))
        os.makedirs(self.live(NAME), exist_ok=True)
        self.point(current or len(credentials))
        for name in MEMBERS:
            os.symlink(".current/" + name, self.live(NAME, name))

    def point(self, number):
        """Let .current lead to that version."""
        self.unlink(self.live(NAME, ".current"))
        os.symlink("../../archive/{}@{}".format(NAME, number), self.live(NAME, ".current"))

    def lay_certbots(self, credential):
        """Links into archive/NAME/, as certbot makes them."""
        folder = os.path.join(self.config, "archive", NAME)
        self.lay(credential, folder=folder)
        os.makedirs(self.live(NAME))
        for name in MEMBERS:
            numbered = name.replace(".", "1.")
            os.rename(os.path.join(folder, name), os.path.join(folder, numbered))
            os.symlink("../../archive/{}/{}".format(NAME, numbered), self.live(NAME, name))

    def lay_followed(self, *credentials):
        """What `cp -rL` leaves of versions: .current is a folder, and the names are files."""
        self.lay_versions(*credentials)
        followed = self.live(NAME) + ".followed"
        shutil.copytree(self.live(NAME), followed)
        shutil.rmtree(self.live(NAME))
        os.rename(followed, self.live(NAME))

    def lay_conf(self, *lines, source=None, hook=HOOK):
        """NAME.conf with that source (.offer where none is given), the root, a hook and lines."""
        os.makedirs(os.path.dirname(self.conf(NAME)), 0o700, exist_ok=True)
        given = ["from = " + (source or "file:" + self.offer), "deploy-hook ="]
        given += ["    " + line for line in hook.splitlines()]
        given += ["ca-file = " + made().authority.root]
        given += lines
        world.write(self.conf(NAME), "\n".join(given) + "\n", 0o600)

    def offers(self, credential, key=None):
        """Let the source have this certificate, and a key where one is given."""
        brought = world.read(key) if key else b""
        world.write(self.offer, world.read(credential.fullchain) + brought, 0o600)

    def note(self, number, name, text=""):
        """Write `pending` or `rolled-back` into a version's folder."""
        return world.write(self.archive(NAME, number, name), text, 0o600)

    def spoil(self, name, content=b"junk\n"):
        """Overwrite a live name where it is: through its links, if it is one."""
        world.write(self.live(NAME, name), content)

    @staticmethod
    def unlink(path):
        """Remove a file or link if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def tell(self, *arguments, **how):
        """Run a command with --json; returns (Result, the lineage's object or None)."""
        result = self.run(*(arguments + ("--json",)), **how)
        objects = json.loads(result.out)["lineages"]
        return result, next((each for each in objects if each["name"] == NAME), None)

    def shown(self):
        """{name: bytes, or None where nothing is to be read} as servers see live/NAME/."""
        found = {}
        for name in MEMBERS:
            try:
                found[name] = world.read(self.live(NAME, name))
            except OSError:
                found[name] = None
        return found

    def versions(self):
        """The numbers of the versions that there are, sorted."""
        archive = os.path.join(self.config, "archive")
        names = os.listdir(archive) if os.path.isdir(archive) else []
        found = (re.match(re.escape(NAME) + "@([1-9][0-9]*)$", name) for name in names)
        return sorted(int(match.group(1)) for match in found if match)

    def current(self):
        """The number of the version in service, None where .current is no link to one."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(os.readlink(self.live(NAME, ".current")).rsplit("@", 1)[1])
        return None

    def staged(self):
        """The public keys of the staged keys, sorted; a file that is no key counts as its name."""
        found = []
        for name in os.listdir(self.live(NAME)):
            if re.match("privkey-.*[.]pem$", name):
                try:
                    found.append(world.public_key(self.live(NAME, name)))
                except AssertionError:
                    found.append(name)
        return sorted(found)

    def hooks_run(self):
        """The lines that hooks have left so far."""
        with contextlib.suppress(FileNotFoundError):
            return world.read(os.path.join(self.outside, "hooks.log")).decode().splitlines()
        return []

    def linked(self):
        """Whether the four names are links through .current, which leads to a version."""
        number = self.current()
        if number is None:
            return False
        leads = os.path.realpath(self.live(NAME, ".current"))
        names = [self.target(name) == ".current/" + name for name in MEMBERS]
        return leads == os.path.realpath(self.archive(NAME, number)) and all(names)

    def target(self, name=".current"):
        """Where a link in live/NAME/ leads, "" where it is none."""
        with contextlib.suppress(OSError):
            return os.readlink(self.live(NAME, name))
        return ""

    def servable(self):
        """The snapshot of live/ and archive/ without times."""
        return {
            path: entry._replace(mtime_ns=0)
            for path, entry in self.snapshot().items()
            if path.startswith(("live", "archive"))
        }


class VersionsCase(unittest.TestCase):
    """Helpers of the tables."""

    def fresh(self):
        """A downstream with an empty config dir, kept until the test ends."""
        return Laid().started(self)

    def assert_told(self, told, result, reason=None, **fields):
        """Check exit status, result, reason and more fields of what tell() returned."""
        ended, lineage = told
        self.assertNotIn("Traceback", ended.err)
        self.assertIsNotNone(lineage, ended)
        wanted = dict(fields, result=result, reason=reason)
        found = {field: lineage[field] for field in wanted}
        self.assertEqual(wanted, found, (lineage["detail"], ended.err))
        good = result in ("installed", "unchanged", "deferred", "not-due")
        self.assertEqual(0 if good else 1, ended.status, ended)

    def assert_shows(self, host, credential, linked=True):
        """live/NAME/ shows this credential, by four links through .current where asked."""
        paths = (credential.cert, credential.chain, credential.fullchain)
        for name, path in zip(CERTIFICATES, paths):
            found = world.certificates(host.live(NAME, name))
            self.assertEqual(world.certificates(path), found, name)
        self.assertEqual(world.public_key(credential.key), world.public_key(host.live(NAME, KEY)))
        if linked:
            self.assertTrue(host.linked(), os.listdir(host.live(NAME)))
            self.assertEqual([], [path for path in host.snapshot() if path.endswith(LITTER)])

    def assert_kept(self, host, credential):
        """Some version holds exactly this credential."""
        wanted = contents(credential)
        kept = []
        for number in host.versions():
            paths = {name: host.archive(NAME, number, name) for name in MEMBERS}
            if all(os.path.exists(path) for path in paths.values()):
                kept.append({name: world.read(path) for name, path in paths.items()})
        self.assertIn(wanted, kept)

    def keys(self, *credentials):
        """The public keys of credentials as Laid.staged() returns them."""
        return sorted(world.public_key(credential.key) for credential in credentials)


# ---------------------------------------------------------------- what live/NAME/ is made of


def lay_beside(credential, *names):
    """A start: two versions of which `current` is in service, and plain files of a credential."""

    def lay(host):
        host.lay_versions(made().old, made().current)
        host.lay(credential, *names)

    return lay


def lay_other_lines(host):
    """A start: certificates in PEM of other line lengths, the key in its traditional form."""
    host.lay(made().current)
    for name, length in (("cert.pem", 76), ("chain.pem", 9999)):
        begin, *lines, end = world.read(host.live(NAME, name)).decode().split("\n")[:-1]
        digits = "".join(lines)
        lines = [digits[at : at + length] for at in range(0, len(digits), length)]
        host.spoil(name, "\n".join([begin] + lines + [end, ""]).encode())
    traditional = world.openssl("ec", "-in", made().current.key)
    host.spoil(KEY, traditional.encode())


def starts():
    """{name: (function that lays it, the credential that it shows, the versions settling leaves)}.

    The pair fits in each of them.
    """
    a = made()
    table = collections.OrderedDict()
    table["certferry's links"] = lambda host: host.lay_versions(a.old, a.current), a.current, [1, 2]
    table["plain files"] = lambda host: host.lay(a.current), a.current, [1]
    table["plain, no cert.pem and chain.pem"] = (
        lambda host: host.lay(a.current, "fullchain.pem", KEY),
        a.current,
        [1],
    )
    table["plain, other lines"] = lay_other_lines, a.current, [1]
    table["certbot's links"] = lambda host: host.lay_certbots(a.current), a.current, [1]
    table["links followed"] = lambda host: host.lay_followed(a.old, a.current), a.current, None
    for names in ((KEY,), ("fullchain.pem",), MEMBERS):
        title = "copies beside .current: " + " ".join(names)
        table[title] = lay_beside(a.current, *names), a.current, [1, 2]
    table["a pair by hand beside .current"] = lay_beside(a.other, *MEMBERS), a.other, [1, 2, 3]
    table["older ones beside .current"] = lay_beside(a.old, *CERTIFICATES), a.old, [1, 2, 3]
    return table


NEWER = {"a pair by hand beside .current": "other_latest"}  # its key is the one in service


class Starts(VersionsCase):
    """`renew`, `certferry NAME` and a newer offer, from whatever live/NAME/ is made of."""

    def test_nothing_new(self):
        """`renew` leaves it as it is, `certferry NAME` settles it, and neither runs a hook."""
        for title, (lay, shown, versions) in starts().items():
            with self.subTest(title):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                host.offers(shown)
                links, before = host.linked(), host.servable()
                told = host.tell("renew")
                self.assert_told(told, "unchanged", changed=False)
                self.assertEqual("", told[0].err)
                self.assertEqual([], world.changed(before, host.servable()))
                self.assert_told(host.tell(NAME), "unchanged", changed=not links)
                self.assert_shows(host, shown)
                self.assertEqual(versions or host.versions(), host.versions())
                self.assertEqual([], host.hooks_run())

    def test_nothing_to_write(self):
        """A run that finds nothing new and four links touches the state file alone."""
        host = self.fresh()
        host.lay_followed(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assertEqual(0, host.run(NAME).status)
        before = host.snapshot()
        self.assert_told(host.tell("renew"), "unchanged", changed=False)
        changed = world.changed(before, host.snapshot())
        self.assertEqual([], [path for path in changed if path != "certferry/" + NAME + ".state"])
        self.assert_told(host.tell(NAME), "unchanged", changed=False)

    def test_status(self):
        """It says where the names are no links yet, and is content with them."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assertEqual(0, host.run("renew").status)
        settled = host.run("status")
        host.lay(made().current, "fullchain.pem")
        loose = host.run("status")
        self.assertEqual((0, 0), (settled.status, loose.status), loose)
        self.assertNotIn("link", settled.out)
        self.assertIn("link", loose.out)

    def test_newer_offer(self):
        """It is installed in four links, and what was shown is kept to go back to."""
        for title, (lay, shown, _) in starts().items():
            with self.subTest(title):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                new = getattr(made(), NEWER.get(title, "renewed"))
                host.offers(new)
                self.assert_told(host.tell("renew"), "installed", changed=True)
                self.assert_shows(host, new)
                self.assertEqual(["ran"], host.hooks_run())
                if title != "plain, other lines":  # these are written in the ordinary way
                    self.assert_kept(host, shown)
                self.assertEqual([], host.staged())

    def test_links_that_are_missing(self):
        """Beside .current they become links again, for `renew` too."""
        for missing in (MEMBERS, MEMBERS[:1], MEMBERS[3:]):
            with self.subTest(missing=missing):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().current)
                for name in missing:
                    os.unlink(host.live(NAME, name))
                self.assert_told(host.tell("renew"), "unchanged")
                self.assert_shows(host, made().current)
                self.assertEqual(([1, 2], []), (host.versions(), host.hooks_run()))

    def test_dry_run(self):
        """It tells what would be, and writes nothing: not even the lock file."""
        for title, (lay, shown, _) in list(starts().items())[::3]:
            with self.subTest(title):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                before = host.snapshot()
                host.offers(shown)
                told = host.tell(NAME, "--dry-run")
                self.assert_told(told, "unchanged", changed=not host.linked())
                host.offers(getattr(made(), NEWER.get(title, "renewed")))
                self.assert_told(host.tell("renew", "--dry-run"), "installed", changed=True)
                self.assertEqual([], world.changed(before, host.snapshot()))

    def test_followed_twice(self):
        """A second restoration with links followed is settled as the first one was."""
        host = self.fresh()
        host.lay_followed(made().old, made().current)
        host.lay_conf()
        for offer in (made().renewed, made().latest):
            host.offers(offer)
            self.assert_told(host.tell("renew"), "installed")
            self.assert_shows(host, offer)
            shown = host.shown()
            host.unlink(host.live(NAME, ".current"))
            shutil.copytree(host.archive(NAME, max(host.versions())), host.live(NAME, ".current"))
            for name, content in shown.items():
                host.unlink(host.live(NAME, name))
                world.write(host.live(NAME, name), content, 0o600 if name == KEY else 0o644)

    def test_what_cannot_be_settled(self):
        """It is told, with the command that helps, and nothing is touched."""
        secret = world.read(made().current.cert) + world.read(made().current.key)

        def a_key_in_a_certificate_file(host):
            host.lay_versions(made().old, made().current)
            os.unlink(host.live(NAME, "cert.pem"))
            world.write(host.live(NAME, "cert.pem"), secret, 0o600)

        def links_through_a_folder(host):
            host.lay_versions(made().old, made().current)
            os.unlink(host.live(NAME, ".current"))
            shutil.copytree(host.archive(NAME, 2), host.live(NAME, ".current"))

        for lay in (a_key_in_a_certificate_file, links_through_a_folder):
            with self.subTest(lay.__name__):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                host.offers(made().renewed)
                before = host.servable()
                told = host.tell("renew")
                self.assert_told(told, "failed")
                self.assertIn(host.live(NAME), told[0].err)
                self.assertEqual([], world.changed(before, host.servable()))
                self.assertEqual([], host.hooks_run())

    def test_first_crossing(self):
        """From nothing, with a key that waits, comes with the command or with the certificate."""
        a = made()
        cases = [
            ("privkey.pem", lambda host: host.lay(a.current, KEY), (), a.current),
            ("--key", None, ("--key", a.current.key), a.current),
            ("staged", lambda host: host.key(NAME, a.rekeyed, "privkey-next.pem"), (), a.rekeyed),
            ("the source", None, (), a.rekeyed),
            ("over another", lambda host: host.lay(a.other, KEY), (), a.rekeyed),
        ]
        for title, lay, options, new in cases:
            with self.subTest(title):
                host = self.fresh()
                if lay:
                    lay(host)
                brought = title in ("the source", "over another")
                host.offers(new, new.key if brought else None)
                command = (NAME, "--from", "file:" + host.offer, "--ca-file", a.authority.root)
                told = host.tell(*command + ("--deploy-hook", HOOK) + options)
                self.assert_told(told, "installed", changed=True, version=1)
                self.assert_shows(host, new)
                self.assertEqual((["ran"], [1]), (host.hooks_run(), host.versions()))
                waiting = self.keys(a.other) if title == "over another" else []
                self.assertEqual(waiting, host.staged())

    def test_administrators_links(self):
        """The config dir, live, archive or live/NAME may be links of root's to elsewhere."""
        for path, elsewhere in (
            ("", "../elsewhere"),
            ("live", "elsewhere"),
            ("archive", "../elsewhere"),
            ("live/" + NAME, "live/.elsewhere"),
            ("certferry", "../elsewhere"),
        ):
            with self.subTest(path or "config dir"):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().renewed)
                link = os.path.join(host.config, path).rstrip("/")
                moved = os.path.normpath(os.path.join(host.config, elsewhere))
                os.rename(link, moved)
                os.symlink(moved, link)
                self.assert_told(host.tell("renew"), "installed")
                self.assert_shows(host, made().renewed)
                self.assertTrue(os.path.islink(link))


# ---------------------------------------------------------------- making whole


def spoilt(*credentials, **spoils):
    """A start: versions of these, where live names (privkey for privkey.pem) are overwritten."""

    def lay(host):
        host.lay_versions(*credentials)
        for name, content in spoils.items():
            host.spoil(name + ".pem", content)

    return lay


def lay_plain_but(*names, **spoils):
    """A start: current's plain files without these, where some are overwritten."""

    def lay(host):
        host.lay(made().current)
        for name in names:
            os.unlink(host.live(NAME, name))
        for name, content in spoils.items():
            host.spoil(name + ".pem", content)

    return lay


def also(*steps):
    """A start that is made in several steps."""

    def lay(host):
        for step in steps:
            step(host)

    return lay


class Whole(VersionsCase):
    """What is in service and not whole is made whole, and no private key is thrown away."""

    def by_what_is_here(self):
        """Rows of (title, start, credentials whose keys are staged then); `current` is shown."""
        old, current, other = made().old, made().current, made().other
        wrong_key = world.read(other.key)
        wrong_leaf = world.read(other.cert)
        junk = b"junk\n"
        two = spoilt(old, current)
        one = spoilt(current)
        lonely = spoilt(current, privkey=wrong_key)
        truncated = lay_plain_but(privkey=world.read(current.key)[:90])

        def stage(host):
            host.key(NAME, current, "privkey-kept.pem")

        def lose_key(host):
            os.unlink(host.archive(NAME, host.current(), KEY))

        def lose_pointer(host):
            os.unlink(host.live(NAME, ".current"))

        return [
            ("unfit key beside .current", lay_beside(other, KEY), [other]),
            ("unfit key through the link", spoilt(old, current, privkey=wrong_key), [other]),
            ("unfit key, the fitting one is staged", also(lonely, stage), [other]),
            ("no key but in a version", also(two, lose_key), []),
            ("no key but a staged one", also(one, lose_key, stage), []),
            ("plain, no fullchain.pem", lay_plain_but("fullchain.pem"), []),
            ("plain, truncated key, the fitting one is staged", also(truncated, stage), []),
            ("cert.pem is junk", spoilt(old, current, cert=junk), []),
            ("cert.pem is empty", spoilt(current, cert=b""), []),
            ("cert.pem of another leaf", spoilt(current, cert=wrong_leaf), []),
            ("cert.pem of another leaf beside .current", lay_beside(old, "cert.pem"), []),
            ("chain.pem is junk", spoilt(current, chain=junk), []),
            ("fullchain.pem is empty", spoilt(old, current, fullchain=b""), []),
            (".current leads to a version that is gone", also(two, lambda it: it.point(9)), []),
            (".current is gone", also(two, lose_pointer), []),
            ("live/NAME is gone", also(two, lambda it: shutil.rmtree(it.live(NAME))), []),
        ]

    def by_an_offer(self):
        """Rows of (title, start, offer, key that comes with it, keys that are staged then)."""
        a = made()
        wrong_key = world.read(a.other.key)
        junk = b"junk\n"
        lonely = spoilt(a.current, privkey=wrong_key)
        plain = lay_plain_but(privkey=wrong_key)
        ruin = spoilt(a.current, cert=junk, chain=junk, fullchain=junk)
        by_hand = lay_beside(a.rekeyed, KEY)
        return [
            ("unfit key, the source has the other", lonely, a.current, a.current.key, [a.other]),
            ("unfit key, its offer comes", lonely, a.other_latest, None, []),
            ("unfit key by hand, its offer is there", by_hand, a.rekeyed, None, []),
            ("plain, unfit key, its offer comes", plain, a.other_latest, None, []),
            ("all certificates are junk", ruin, a.renewed, None, []),
        ]

    def test_made_whole(self):
        """`installed`, with all hooks; the next run finds nothing to do."""
        current = made().current
        rows = [(row[0], row[1], current, None, row[2]) for row in self.by_what_is_here()]
        for index, (title, lay, offer, key, staged) in enumerate(rows + self.by_an_offer()):
            with self.subTest(title):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                host.offers(offer, key)
                kept = host.versions()
                self.assert_told(host.tell("renew"), "installed", changed=True)
                self.assert_shows(host, offer)
                self.assertLess(0, len(host.hooks_run()))
                self.assertEqual(self.keys(*staged), host.staged())
                self.assertLessEqual(set(kept), set(host.versions()))
                damaged = os.path.exists(host.live(NAME, KEY + ".damaged"))
                self.assertEqual("truncated" in title, damaged)
                if index % 3 == 0:
                    told = host.tell("renew")
                    self.assert_told(told, "unchanged", changed=False, health="ok")

    def test_without_a_source(self):
        """What is here suffices: no source has to answer."""
        host = self.fresh()
        lay_beside(made().other, KEY)(host)
        host.lay_conf()
        ended, lineage = host.tell("renew")
        self.assertEqual((1, "unreachable"), (ended.status, lineage["reason"]), ended)
        self.assert_shows(host, made().current)
        self.assertEqual((["ran"], self.keys(made().other)), (host.hooks_run(), host.staged()))

    def test_no_regular_file(self):
        """A FIFO or a folder in place of a file holds up nobody, and widens no key."""
        for name in ("fullchain.pem", KEY):
            for make in (os.mkfifo, os.mkdir):
                with self.subTest(name, by=make.__name__):
                    host = self.fresh()
                    host.lay_versions(made().old, made().current)
                    host.lay_conf()
                    host.offers(made().current)
                    os.unlink(host.live(NAME, name))
                    make(host.live(NAME, name))
                    result = host.run("renew", timeout=30)
                    self.assertNotIn("Traceback", result.err)
                    for number in host.versions():
                        mode = os.stat(host.archive(NAME, number, KEY)).st_mode
                        self.assertEqual(0o600, stat.S_IMODE(mode), result)

    def test_without_a_fitting_key(self):
        """Where none is anywhere it is refused and critical, and the unfit key is not lost."""
        for title, lay in (
            ("through the link", spoilt(made().current, privkey=world.read(made().other.key))),
            ("plain", lay_plain_but(privkey=world.read(made().other.key))),
        ):
            with self.subTest(title):
                host = self.fresh()
                lay(host)
                host.lay_conf()
                host.offers(made().current)
                for _ in range(2):
                    told = host.tell("renew")
                    self.assert_told(told, "refused", "key-mismatch", health="critical")
                found = host.staged()
                with contextlib.suppress(AssertionError, FileNotFoundError):
                    found.append(world.public_key(host.live(NAME, KEY)))
                self.assertIn(world.public_key(made().other.key), found)
                self.assertEqual([], host.hooks_run())
                told = host.tell(NAME, "--key", made().current.key)
                self.assert_told(told, "installed", changed=True, health="ok")
                self.assert_shows(host, made().current)

    def test_no_key(self):
        """Said before any network, where no source may bring one."""
        host = self.fresh()
        host.lay(made().current, *CERTIFICATES)
        host.lay_conf(source="127.0.0.1:1")
        told = host.tell("renew")
        self.assert_told(told, "refused", "no-key", health="critical")
        self.assertIn(host.live(NAME, KEY), told[0].err)

    def test_pointer_to_no_version(self):
        """A .current that leads to none of NAME's versions makes no lineage of a folder."""
        for target in ("/etc", "../../archive", "../../archive/other.example.com@1"):
            with self.subTest(target):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay(made().other, folder=host.config + "/archive/other.example.com@1")
                os.unlink(host.live(NAME, ".current"))
                os.symlink(target, host.live(NAME, ".current"))
                before = host.servable()
                result = host.run("renew")
                self.assertEqual(0, result.status, result)
                self.assertIn("nothing is set up yet", result.out + result.err)
                self.assertEqual([], world.changed(before, host.servable()))


class Keys(VersionsCase):
    """Staged keys, keys that a source brings, and keys of other users."""

    def test_staged(self):
        """Rows of (title, staged keys, offer, key with it, result or reason, still staged)."""
        a = made()
        both = [a.rekeyed, a.other]
        rows = [
            ("its own key", [a.current], a.current, None, "unchanged", []),
            ("a key that waits", [a.rekeyed], a.renewed, None, "installed", [a.rekeyed]),
            ("its offer comes", [a.rekeyed], a.rekeyed, None, "installed", []),
            ("one of two", both, a.rekeyed, None, "installed", [a.other]),
            ("brought along", [], a.rekeyed, a.rekeyed.key, "installed", []),
            ("brought along, staged too", [a.rekeyed], a.rekeyed, a.rekeyed.key, "installed", []),
            ("brought along, unfit", [], a.renewed, a.other.key, "key-mismatch", []),
            ("for a key that is nowhere", [], a.rekeyed, None, "key-mismatch", []),
        ]
        for title, staged, offer, key, word, left in rows:
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(a.old, a.current)
                host.lay_conf()
                host.offers(offer, key)
                for number, credential in enumerate(staged):
                    host.key(NAME, credential, "privkey-{}.pem".format(number))
                if word == "key-mismatch":
                    self.assert_told(host.tell("renew"), "refused", word)
                else:
                    self.assert_told(host.tell("renew"), word)
                self.assert_shows(host, offer if word == "installed" else a.current)
                self.assertEqual(self.keys(*left), host.staged())

    def test_command(self):
        """`--key`: the one in service is nothing new, another one waits, and stays if it fails."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell(NAME, "--key", made().current.key), "unchanged", changed=False)
        self.assertEqual([], host.staged())
        with open(made().rekeyed.key) as key:
            told = host.tell(NAME, "--key", "-", stdin=key.read())
        self.assert_told(told, "unchanged", changed=True)
        told = host.tell(NAME, "--key", made().rekeyed.key)
        self.assert_told(told, "unchanged", changed=False)
        os.unlink(host.offer)
        told = host.tell(NAME, "--key", made().other.key)
        self.assert_told(told, "failed", "unreachable")
        self.assertEqual(self.keys(made().rekeyed, made().other), host.staged())
        modes = {oct(os.stat(path).st_mode & 0o777) for path in self.staged_files(host)}
        self.assertEqual({"0o600"}, modes)

    @staticmethod
    def staged_files(host):
        """The paths of the staged keys."""
        names = [name for name in os.listdir(host.live(NAME)) if name.startswith("privkey-")]
        return [host.live(NAME, name) for name in names]

    def test_no_key_in_a_staged_file(self):
        """Junk, an empty file or a FIFO there neither stops a renewal nor goes."""
        for title, make in (("junk", world.write), ("empty", world.write), ("FIFO", os.mkfifo)):
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().renewed)
                path = host.live(NAME, "privkey-x.pem")
                make(
                    *(
                        (path, "" if title == "empty" else "junk")
                        if make is world.write
                        else (path,)
                    )
                )
                self.assert_told(host.tell("renew", timeout=30), "installed")
                self.assert_shows(host, made().renewed)
                self.assertTrue(os.path.lexists(path))

    @needs_root
    def test_another_users(self):
        """It is told, neither staged nor accepted: a service that may read its key brings none."""
        for title, name in (("staged", "privkey-next.pem"), ("in place", KEY)):
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().rekeyed)
                os.chown(host.key(NAME, made().rekeyed, name), STRANGER, STRANGER)
                told = host.tell("renew")
                self.assertEqual(1, told[0].status, told)
                self.assertIn(name, told[0].err)
                self.assertEqual(
                    contents(made().current)["fullchain.pem"], host.shown()["fullchain.pem"]
                )
                for number in host.versions():
                    key = world.public_key(host.archive(NAME, number, KEY))
                    self.assertNotEqual(self.keys(made().rekeyed), [key])

    @needs_root
    def test_given_where_another_users_lies(self):
        """--key is staged in place of the same key that another user brought, and counts."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell(NAME, "--key", made().rekeyed.key), "unchanged")
        (path,) = self.staged_files(host)
        os.chown(path, STRANGER, STRANGER)
        self.assertEqual(0, host.run(NAME, "--key", made().rekeyed.key).status)
        host.offers(made().rekeyed)
        self.assert_told(host.tell("renew"), "installed")
        self.assert_shows(host, made().rekeyed)

    def test_key_of_a_version(self):
        """It comes back by --force alone."""
        host = self.fresh()
        host.lay_versions(made().other, made().current)
        host.lay_conf()
        host.offers(made().other_latest)
        self.assert_told(host.tell("renew"), "refused", "key-mismatch")
        self.assert_shows(host, made().current)
        self.assert_told(host.tell("renew", NAME, "--force"), "installed")
        self.assert_shows(host, made().other_latest)


# ---------------------------------------------------------------- modes


class Modes(VersionsCase):
    """Owner, group, mode and ACL of a key go on to the next one, and nothing gets wider."""

    @staticmethod
    def facts(path):
        """(mode, owner, group) of a file."""
        found = os.stat(path)
        return oct(stat.S_IMODE(found.st_mode)), found.st_uid, found.st_gid

    def restrict(self, path):
        """Let a service's group read the key; returns the facts of it."""
        if not os.geteuid():
            os.chown(path, 0, STRANGER)
        os.chmod(path, 0o640)
        return self.facts(path)

    @needs_root
    def test_a_key_that_a_service_owns(self):
        """It fits, and is its owner's too in the version that is made whole."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        os.chown(host.archive(NAME, 2, KEY), STRANGER, STRANGER)
        os.unlink(host.archive(NAME, 2, "cert.pem"))
        before = self.facts(host.archive(NAME, 2, KEY))
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell("renew"), "installed", version=3)
        self.assertEqual(before, self.facts(host.archive(NAME, 3, KEY)))

    def test_umask(self):
        """After a first crossing and a rotation, whatever the umask."""
        for umask in world.in_turn((0o077, 0o000)):
            with self.subTest(umask=oct(umask)):
                host = self.fresh()
                host.offers(made().current)
                command = (NAME, "--from", "file:" + host.offer, "--key", made().current.key)
                before = os.umask(umask)
                try:
                    host.run(*command + ("--ca-file", made().authority.root))
                    host.offers(made().renewed)
                    self.assert_told(host.tell("renew"), "installed", version=2)
                finally:
                    os.umask(before)
                found = {path: oct(entry.mode) for path, entry in host.snapshot().items()}
                for number in (1, 2):
                    folder = "archive/{}@{}".format(NAME, number)
                    self.assertEqual("0o755", found[folder])
                    for name in MEMBERS:
                        wanted = "0o600" if name == KEY else "0o644"
                        self.assertEqual(wanted, found[folder + "/" + name], name)
                private = (found["certferry"], found["certferry/.lock"])
                self.assertEqual(("0o700", "0o600"), private)

    def test_closed_parent(self):
        """Folders have the mode of their parent: in a 0700 tree everything is 0700."""
        host = self.fresh()
        os.chmod(host.config, 0o700)
        host.offers(made().current, made().current.key)
        host.run(NAME, "--from", "file:" + host.offer, "--ca-file", made().authority.root)
        self.assert_shows(host, made().current)
        for path, entry in host.snapshot().items():
            if entry.kind == "directory":
                self.assertEqual(0o700, entry.mode, path)

    def test_next_key(self):
        """Each version's key is like the one that it replaces, however it came."""
        a = made()
        for title, offer, key in (
            ("the same", a.renewed, None),
            ("staged", a.rekeyed, None),
            ("brought along", a.rekeyed, a.rekeyed.key),
        ):
            for lay in ("links", "plain"):
                with self.subTest(title, lay=lay):
                    host = self.fresh()
                    if lay == "plain":
                        host.lay(a.current)
                    else:
                        host.lay_versions(a.old, a.current)
                    host.lay_conf()
                    host.offers(offer, key)
                    if title == "staged":
                        host.key(NAME, a.rekeyed, "privkey-next.pem")
                    wanted = self.restrict(host.live(NAME, KEY))
                    self.assert_told(host.tell("renew"), "installed")
                    self.assert_shows(host, offer)
                    self.assertEqual(wanted, self.facts(host.live(NAME, KEY)))

    def test_first_key(self):
        """A key that lay in live/ alone keeps what it was given, one by the source is 0600."""
        host = self.fresh()
        host.lay(made().current, KEY)
        wanted = self.restrict(host.live(NAME, KEY))
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell("renew"), "installed")
        self.assertEqual(wanted, self.facts(host.archive(NAME, 1, KEY)))

    def test_rollback(self):
        """The key that is gone back to is like the one that it replaces."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        wanted = self.restrict(host.archive(NAME, 2, KEY))
        self.assert_told(host.tell("rollback", NAME), "installed", version=1)
        self.assertEqual(wanted, self.facts(host.archive(NAME, 1, KEY)))

    @needs_root
    def test_owner(self):
        """A key that was given to a service's user stays so, and the next one is that user's."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        os.chown(host.archive(NAME, 2, KEY), STRANGER, STRANGER)
        self.assert_told(host.tell("renew"), "installed")
        wanted = ("0o600", STRANGER, STRANGER)
        self.assertEqual(wanted, self.facts(host.archive(NAME, 3, KEY)))

    def test_no_key_before(self):
        """What is no key passes no mode on: the one that replaces it is not opened to all."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        os.unlink(host.live(NAME, KEY))
        world.write(host.live(NAME, KEY), "junk\n", 0o644)
        self.assert_told(host.tell("renew"), "installed")
        self.assertEqual("0o600", self.facts(host.live(NAME, KEY))[0])

    def test_folder(self):
        """A version's folder has the mode of the one before."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        os.chmod(host.archive(NAME, 2), 0o750)
        self.assert_told(host.tell("renew"), "installed")
        self.assertEqual("0o750", self.facts(host.archive(NAME, 3))[0])

    @world.needs("setfacl", "getfacl")
    def test_access_lists(self):
        """An ACL of the key goes on to the next; a folder's default ACL does not reach it."""
        entry = "user:{}:r--".format(STRANGER)
        for path, listed in ((KEY, True), ("..", False)):
            with self.subTest(path):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().renewed)
                path = host.archive(NAME, 2, path)
                words = (
                    ("setfacl", "-m", entry, path)
                    if listed
                    else ("setfacl", "-d", "-m", entry, path)
                )
                if subprocess.run(words, stderr=subprocess.DEVNULL).returncode:
                    self.skipTest("needs a file system with ACLs")
                self.assert_told(host.tell("renew"), "installed")
                words = ("getfacl", "-n", "-p", host.archive(NAME, 3, KEY))
                found = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout.decode()
                self.assertEqual(listed, entry in found, found)
                self.assertIn("other::---", found)

    def test_key_that_others_can_read(self):
        """One warning line, and no other mode than it had."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        os.chmod(host.archive(NAME, 2, KEY), 0o644)
        told = host.tell("renew")
        self.assert_told(told, "installed")
        lines = [line for line in told[0].err.splitlines() if KEY in line]
        self.assertEqual(1, len(lines), told[0])


# ---------------------------------------------------------------- rollback


class Rollback(VersionsCase):
    """Back to the version before, and forward again."""

    def rows(self):
        """Rows of (title, versions, marked ones, a step, what it goes back to or None)."""
        a = made()

        def damage(host):
            os.unlink(host.archive(NAME, 2, "fullchain.pem"))

        def take_key(host):
            os.unlink(host.archive(NAME, 2, KEY))

        def change_key(host):
            shutil.copy(a.other.key, host.archive(NAME, 2, KEY))

        def follow_one(host):
            host.lay(a.renewed, "fullchain.pem")

        def lay_pair(host):
            host.lay(a.other)

        def first_again(host):
            host.point(1)

        three = (a.old, a.current, a.renewed)
        return [
            ("two versions", (a.old, a.current), (), None, a.old),
            ("three versions", three, (), None, a.current),
            ("another key", (a.other, a.current), (), None, a.other),
            ("another chain alone", (a.old, a.chained, a.current), (), None, a.chained),
            ("one was rolled back from", three, (2,), None, a.old),
            ("all were rolled back from", three, (1, 2), None, None),
            ("the same again", (a.old, a.current, a.current), (), None, a.old),
            ("a damaged one", three, (), damage, a.old),
            ("one without a key", three, (), take_key, a.old),
            ("one with an unfit key", three, (), change_key, a.old),
            ("an expired one", (a.expired, a.current), (), None, None),
            ("a copy beside .current", three, (), follow_one, a.current),
            ("a pair by hand", (a.old, a.current), (), lay_pair, a.current),
            ("one version", (a.current,), (), None, None),
            ("the first is in service", (a.old, a.current), (), first_again, None),
        ]

    def test_where_it_goes(self):
        """One way back for each row, or a refusal that touches no version and runs no hook."""
        for title, versions, marked, step, target in self.rows():
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(*versions)
                host.lay_conf()
                for number in marked:
                    host.note(number, "rolled-back")
                if step:
                    step(host)
                before, shown = host.current(), host.shown()
                told = host.tell("rollback", NAME)
                if target is None:
                    self.assertEqual((1, "refused"), (told[0].status, told[1]["result"]), told)
                    self.assertEqual(1, len(told[0].err.splitlines()), told[0])
                    self.assertEqual(
                        (shown, before, []), (host.shown(), host.current(), host.hooks_run())
                    )
                    continue
                self.assert_told(told, "installed", changed=True, version=host.current())
                self.assert_shows(host, target)
                self.assertEqual(["ran"], host.hooks_run())
                left = max(number for number in host.versions() if number > host.current())
                self.assertTrue(os.path.exists(host.archive(NAME, left, "rolled-back")))
                self.assertFalse(os.path.exists(host.archive(NAME, host.current(), "pending")))

    def test_unfit_key(self):
        """A key in live/ that fits nothing is kept where what is left is not whole."""
        host = self.fresh()
        host.lay_versions(made().other, made().current)
        host.lay_conf()
        os.unlink(host.archive(NAME, 2, KEY))
        host.lay(made().rekeyed, KEY)
        self.assert_told(host.tell("rollback", NAME), "installed", version=1)
        self.assert_shows(host, made().other)
        self.assertEqual(self.keys(made().rekeyed), host.staged())

    def test_line(self):
        """It names both versions."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        line = host.run("rollback", NAME).out.splitlines()[0]
        self.assertRegex(line, r"\b1\b.*\b2\b|\b2\b.*\b1\b")

    def test_again_and_again(self):
        """A second one goes back one more; in between `renew` defers what was gone back from."""
        host = self.fresh()
        host.lay_versions(made().old, made().current, made().renewed)
        host.lay_conf()
        host.offers(made().renewed)
        for version in (2, 1):
            self.assert_told(host.tell("rollback", NAME), "installed", version=version)
            told = host.tell("renew")
            self.assert_told(told, "deferred", "rolled-back", changed=False, version=version)
        self.assertEqual(1, host.run("rollback", NAME).status)
        host.offers(made().current)
        self.assert_told(host.tell("renew"), "deferred", "rolled-back")
        host.offers(made().latest)
        self.assert_told(host.tell("renew"), "installed", version=4)
        host.offers(made().renewed)  # in a version, and not newer any more
        self.assert_told(host.tell("renew"), "refused", "older")
        self.assert_told(host.tell("rollback", NAME), "installed", version=1)

    def test_what_is_offered_then(self):
        """Rows of (title, versions, offer, command, result or reason).

        The second version was rolled back from, the first one is in service again.
        """
        a = made()
        leaf, key, chain = (a.old, a.current), (a.old, a.rekeyed), (a.current, a.chained)
        commands = {"NAME": (NAME,), "renew": ("renew",), "--force": ("renew", NAME, "--force")}
        rows = [
            ("its leaf", leaf, a.current, "renew", "rolled-back"),
            ("its leaf, by NAME", leaf, a.current, "NAME", "rolled-back"),
            ("its leaf, by force", leaf, a.current, "--force", "installed"),
            ("a newer one", leaf, a.renewed, "renew", "installed"),
            ("the one in service", leaf, a.old, "renew", "unchanged"),
            ("its leaf, its key", key, a.rekeyed, "renew", "rolled-back"),
            ("newer for its key", key, a.rekeyed_latest, "renew", "installed"),
            ("its key, by force", key, a.rekeyed, "--force", "installed"),
            ("its chain", chain, a.chained, "renew", "unchanged"),
            ("its chain, by force", chain, a.chained, "--force", "installed"),
        ]
        for title, versions, offer, command, word in rows:
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(*versions, current=1)
                host.note(2, "rolled-back")
                host.lay_conf()
                host.offers(offer)
                told = host.tell(*commands[command])
                if word == "rolled-back":
                    self.assert_told(told, "deferred", word)
                else:
                    self.assert_told(told, word)
                self.assert_shows(host, offer if word == "installed" else versions[0])
                if command == "--force":
                    self.assert_told(host.tell("renew"), "unchanged")

    def test_deferred_and_settled(self):
        """`certferry NAME` settles where what it was offered is deferred, too."""
        host = self.fresh()
        host.lay_versions(made().old, made().current, current=1)
        host.note(2, "rolled-back")
        host.lay(made().old, *CERTIFICATES)
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell(NAME), "deferred", "rolled-back", changed=True)
        self.assert_shows(host, made().old)

    def test_mark_of_the_version_in_service(self):
        """A rollback killed before its rename left it: it means nothing, and goes."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        mark = host.note(2, "rolled-back")
        self.assert_told(host.tell("renew"), "unchanged")
        self.assertFalse(os.path.exists(mark))
        host.offers(made().renewed)
        self.assert_told(host.tell("renew"), "installed")
        self.assert_told(host.tell("rollback", NAME), "installed", version=2)

    def test_failing_hook(self):
        """It outweighs what is deferred, until it succeeds."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        flag = os.path.join(host.outside, "flag")
        host.lay_conf(hook="test -e " + flag)
        host.offers(made().current)
        for command in (("rollback", NAME), ("renew",)):
            self.assert_told(host.tell(*command), "pending", "hook", version=1)
        world.write(flag, "")
        self.assert_told(host.tell("renew"), "deferred", "rolled-back")

    def test_nothing_to_go_back_from(self):
        """Plain files without a version, and a name that is not set up."""
        host = self.fresh()
        self.assertEqual(1, host.run("rollback", NAME).status)
        host.lay(made().current)
        host.lay_conf()
        result = host.run("rollback", NAME)
        self.assertEqual(1, result.status, result)
        settled, refused = result.err.splitlines()
        self.assertIn("holds links now", settled)
        self.assertIn("there is no earlier version", refused)
        self.assert_shows(host, made().current, linked=False)

    def test_dry_run(self):
        """Nothing is written, no hook runs."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        before = host.snapshot()
        told = host.tell("rollback", NAME, "--dry-run")
        self.assert_told(told, "installed", changed=True, version=1)
        self.assertEqual([], world.changed(before, host.snapshot()))
        self.assertEqual([], host.hooks_run())


# ---------------------------------------------------------------- pools, pruning


class Offers(VersionsCase):
    """Which leaf and chain are news."""

    def test_pool_with_two_chains(self):
        """Each is installed once at most, whoever answers first."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        results = []
        for turn in range(6):
            host.offers((made().chained, made().current)[turn % 2])
            results.append(host.tell("renew")[1]["result"])
        self.assertEqual(["installed"] + 5 * ["unchanged"], results)
        self.assert_shows(host, made().chained)
        self.assertEqual(["ran"], host.hooks_run())
        host.offers(made().current)
        self.assert_told(host.tell("renew", NAME, "--force"), "installed")
        self.assert_shows(host, made().current)

    def test_stale_member(self):
        """A leaf of a version here that is not newer is refused, but for --force."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().old)
        self.assert_told(host.tell("renew"), "refused", "older", version=2)
        self.assert_told(host.tell("renew", NAME, "--force"), "installed", changed=True)
        self.assert_shows(host, made().old)

    def test_by_force_unchanged(self):
        """The hooks run although nothing is new."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assertEqual(0, host.run("renew", NAME, "--force").status)
        self.assertEqual(["ran"], host.hooks_run())


class Pruning(VersionsCase):
    """The five newest, the current one and the one that a rollback goes to are kept."""

    def test_kept(self):
        """Rows of (title, versions, marked ones, the one in service, kept after the next)."""
        a = made()
        rows = [
            ("few", [a.old, a.current], (), 2, [1, 2, 3]),
            ("five", [a.old] * 3 + [a.current], (), 4, [1, 2, 3, 4, 5]),
            ("more", [a.old] * 6 + [a.current], (), 7, [4, 5, 6, 7, 8]),
            ("its target is old", [a.old] + [a.expired] * 5, (), 1, [1, 3, 4, 5, 6, 7]),
            ("rolled back far", [a.old] + [a.current] * 5, (2, 3, 4, 5, 6), 1, [1, 3, 4, 5, 6, 7]),
        ]
        for title, versions, marked, current, kept in rows:
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(*versions, current=current)
                for number in marked:
                    host.note(number, "rolled-back")
                host.lay_conf()
                host.offers(a.latest)
                self.assert_told(host.tell("renew"), "installed", version=kept[-1])
                self.assertEqual(kept, host.versions())
                told = host.tell("rollback", NAME)
                self.assert_told(told, "installed", version=current)

    def test_others_are_left(self):
        """Neither certbot's archive nor what only looks like a version is pruned."""
        host = self.fresh()
        host.lay_versions(*[made().old] * 6 + [made().current])
        others = (NAME, "www." + NAME + "@1", NAME + "@x", NAME + "@1.old", NAME + "@0")
        for name in others:
            host.lay(made().old, folder=os.path.join(host.config, "archive", name))
        os.mkdir(host.archive(NAME, 2, "notes"))  # goes with its version
        host.lay_conf()
        host.offers(made().latest)
        before = host.servable()
        self.assert_told(host.tell("renew"), "installed", version=8)
        self.assertEqual([4, 5, 6, 7, 8], host.versions())
        gone = [path for path in before if path not in host.servable()]
        stray = [path for path in gone if not re.match("archive/" + NAME + "@[123](/|$)", path)]
        self.assertEqual([], stray)


# ---------------------------------------------------------------- pending


class Pending(VersionsCase):
    """The hooks that a version owes lie in its folder."""

    HOOKS = "echo one >>{0}\necho two >>{0}"

    def host(self, owed=None):
        """Two versions, two hooks, and what the one in service owes."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        self.hooks = self.HOOKS.format(os.path.join(host.outside, "hooks.log"))
        host.lay_conf(hook=self.hooks)
        host.offers(made().current)
        self.first, self.second = self.hooks.splitlines()
        self.pending = host.archive(NAME, 2, "pending")
        if owed is not None:
            host.note(2, "pending", owed)
        return host

    def test_owed(self):
        """Rows of (title, lines of `pending`, what runs then)."""
        for title, owed, runs in (
            ("both", "{0}\n{1}\n", ["one", "two"]),
            ("one of them", "{1}\n", ["two"]),
            ("none, the services alone", "", []),
            ("one that is not configured any more", "touch {2}/bad\n", ["one", "two"]),
        ):
            with self.subTest(title):
                host = self.host(owed="")
                host.note(2, "pending", owed.format(self.first, self.second, host.outside))
                before = host.servable()
                self.assert_told(host.tell("renew"), "unchanged")
                self.assertEqual(runs, host.hooks_run())
                self.assertFalse(os.path.exists(host.outside + "/bad"))
                gone = ["archive/{}@2".format(NAME), "archive/{}@2/pending".format(NAME)]
                changed = world.changed(before, host.servable())
                self.assertLessEqual(set(changed), set(gone))
                self.assertFalse(os.path.exists(self.pending))

    def test_failing(self):
        """It alone is tried again; told by status and by exit 1 until it succeeds."""
        host = self.host()
        flag = os.path.join(host.outside, "flag")
        failing = "test -e " + flag
        host.lay_conf(hook=self.first + "\n" + failing)
        host.offers(made().renewed)
        for _ in range(2):
            told = host.tell("renew")
            self.assert_told(told, "pending", "hook", version=3, health="warning")
            path = host.archive(NAME, 3, "pending")
            self.assertEqual([failing], world.read(path).decode().splitlines())
            self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        self.assertEqual(1, host.run("status").status)
        world.write(flag, "")
        self.assert_told(host.tell("renew"), "unchanged", health="ok")
        self.assertEqual(["one"], host.hooks_run())

    def test_carried_over(self):
        """Settling and making whole lose nothing that is owed."""
        for title, step, runs in (
            ("settling", lambda host: host.lay(made().current, "fullchain.pem"), ["two"]),
            ("settling a pair", lambda host: host.lay(made().other), ["two"]),
            ("making whole", lambda host: host.lay(made().other, KEY), ["one", "two"]),
            ("a lost state", lambda host: host.unlink(host.state(NAME)), ["two"]),
        ):
            with self.subTest(title):
                host = self.host(owed="")
                host.note(2, "pending", self.second + "\n")
                step(host)
                if title == "settling a pair":
                    host.offers(made().other)
                self.assertEqual(0, host.run(NAME).status)
                self.assertTrue(host.linked())
                self.assertEqual(runs, host.hooks_run())

    def test_commands(self):
        """A new hook runs on that crossing, one that is replaced or forgotten is owed no more."""
        for title, options, runs in (
            ("nothing given", (), ["two"]),
            ("replaced", ("--deploy-hook", "echo three >>{}"), ["three"]),
            ("one kept", ("--deploy-hook", "echo two >>{}"), ["two"]),
            ("forgotten", ("--deploy-hook", ""), []),
        ):
            with self.subTest(title):
                host = self.host(owed="")
                host.note(2, "pending", self.second + "\n")
                log = os.path.join(host.outside, "hooks.log")
                given = tuple(word.format(log) for word in options)
                self.assertEqual(0, host.run(NAME, *given).status)
                self.assertEqual(runs, host.hooks_run())
                self.assertFalse(os.path.exists(self.pending))


class Reports(VersionsCase):
    """What a run says of itself agrees with what it left on the disk."""

    def test_the_root_in_service(self):
        """Plain files whose fullchain.pem holds the root too: the same offer is nothing new."""
        host = self.fresh()
        host.lay(made().current, "fullchain.pem", KEY)
        root = world.read(made().authority.root)
        host.spoil("fullchain.pem", world.read(made().current.fullchain) + root)
        host.lay_conf()
        host.offers(made().current)
        before = host.servable()
        self.assert_told(host.tell("renew"), "unchanged")
        self.assertEqual([], world.changed(before, host.servable()))
        self.assertEqual([], host.hooks_run())

    def test_a_dry_run_of_what_is_not_whole(self):
        """The key is in a version or given, and the source is ahead: as the run itself would be."""
        for title, given in (("in a version", ()), ("given", ("--key", made().current.key))):
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                os.unlink(host.archive(NAME, 2, KEY))
                host.lay_conf()
                host.offers(made().renewed)
                told = host.tell(NAME, "--dry-run", *given)
                self.assert_told(told, "installed", changed=True, health="ok")
                before = host.servable()
                told = host.tell("rollback", NAME, "--dry-run")
                self.assert_told(told, "installed", health="ok", version=1)
                self.assertEqual([], world.changed(before, host.servable()))

    def test_an_issuer_that_cannot_be_read(self):
        """A chain in service that holds one is damaged, and no bug."""
        host = self.fresh()
        host.lay_versions(made().current)
        junk = b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"
        host.spoil("fullchain.pem", world.read(made().current.fullchain) + junk)
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell("renew"), "installed", version=2)
        self.assert_shows(host, made().current)

    def test_a_rehearsal_that_cannot_be_held(self):
        """What is missing on this host is no verdict on the offer."""
        host = self.fresh()
        host.lay_versions(made().current)
        host.lay_conf()
        host.offers(made().renewed)
        patch = "certferry._shake_hands_in_memory = lambda *pems: __import__('nothing')"
        told = host.tell(NAME, python=world.patched(self, patch))
        self.assert_told(told, "failed", None)
        self.assertIn("the rehearsal cannot be held", told[0].err)
        self.assert_shows(host, made().current)

    def test_forgotten_options(self):
        """They change no health, not even that of the answer itself."""
        host = self.fresh()
        host.lay_versions(made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assert_told(host.tell("renew"), "unchanged", health="ok")
        told = host.tell(NAME, "--warn", "9999d", "--from", "file:/nonexistent")
        self.assert_told(told, "failed", "unreachable", health="ok")
        self.assertIn("The options were not kept", told[0].err)

    def test_remembered_options(self):
        """What fails after they were written does not say that they were not kept."""
        host = self.fresh()
        host.lay_versions(made().current)
        host.lay_conf()
        host.offers(made().current)
        hook = "rm -r {0} && touch {0}".format(host.archive(NAME, 1))
        told = host.tell(NAME, "--deploy-hook", hook)
        self.assert_told(told, "failed", "storage")
        self.assertNotIn("kept", told[0].err)
        self.assertIn(hook, world.read(host.conf(NAME)).decode())


# ---------------------------------------------------------------- what is left alone


class LeftAlone(VersionsCase):
    """What else lies in live/ is nobody's business."""

    def test_silence(self):
        """Copies of a lineage, folders of file systems and tools, aliases: not a word."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        live = os.path.join(host.config, "live")
        shutil.copytree(host.live(NAME), host.live(NAME) + ".bak", symlinks=True)
        for name in ("lost+found", ".snapshot", "@eaDir", "a folder", "plain.example.com"):
            os.mkdir(os.path.join(live, name), 0o700)
        host.lay(made().current, folder=host.live("plain.example.com"))
        host.lay(made().current, KEY, folder=host.live("key.example.com"))
        world.write(os.path.join(live, "README"), "certbot's")
        os.symlink(NAME, host.live("alias.example.com"))
        os.symlink("nowhere", host.live("gone.example.com"))
        before = host.servable()
        for command in (("renew",), ("renew",), ("status", "-q")):
            result = host.run(*command)
            self.assertEqual((0, ""), (result.status, result.err), command)
        self.assertEqual([NAME], [each["name"] for each in host.json("status")[1]["lineages"]])
        changed = world.changed(before, host.servable())
        mine = re.compile("live/{0}(/|$)|archive(/{0}@3.*)?$".format(re.escape(NAME)))
        self.assertEqual([], [path for path in changed if not mine.match(path)])
        self.assert_shows(host, made().renewed)

    def test_beside_the_four(self):
        """Other files in live/NAME/ stay as they are, and HAProxy's link leads to the new key."""
        host = self.fresh()
        host.lay(made().current)
        for name in ("README", ".keep", "combined.pem", ".fullchain.pem.swp", "dhparam.pem"):
            world.write(host.live(NAME, name), name)
        os.mkdir(host.live(NAME, "old"))
        os.symlink(KEY, host.live(NAME, "fullchain.pem.key"))
        host.lay_conf()
        host.offers(made().rekeyed, made().rekeyed.key)
        before = host.servable()
        self.assert_told(host.tell("renew"), "installed")
        self.assert_shows(host, made().rekeyed)
        after = host.servable()
        theirs = [path for path in before if os.path.basename(path) not in MEMBERS + (NAME,)]
        kept = [path for path in theirs if path.startswith("live/")]
        self.assertEqual(
            {path: before[path] for path in kept}, {path: after.get(path) for path in kept}
        )
        key = world.public_key(host.live(NAME, "fullchain.pem.key"))
        self.assertEqual([key], self.keys(made().rekeyed))

    def test_no_lineage(self):
        """Plain files without a NAME.conf are none: `renew` says that nothing is set up."""
        host = self.fresh()
        host.lay(made().current)
        before = host.servable()
        result = host.run("renew")
        self.assertEqual(0, result.status, result)
        self.assertIn("nothing is set up yet", result.out + result.err)
        self.assertEqual(1, host.run("renew", NAME).status)
        self.assertEqual([], world.changed(before, host.servable()))

    def test_certbots(self):
        """While renewal/NAME.conf is its, nothing is touched; the way to take over is told."""
        host = self.fresh()
        host.lay_certbots(made().current)
        host.lay_conf()
        host.offers(made().renewed)
        renewal = os.path.join(host.config, "renewal")
        os.mkdir(renewal)
        conf = world.write(os.path.join(renewal, NAME + ".conf"), "version = 2.1.0\n")
        before = host.servable()
        for command in (("renew",), (NAME,)):
            told = host.tell(*command)
            self.assert_told(told, "refused", "certbot")
            self.assertIn("mv " + conf, told[0].err)
        self.assertEqual([], world.changed(before, host.servable()))
        world.write(conf, "")
        self.assert_told(host.tell("renew"), "installed")

    def test_stray_conf_of_certbots(self):
        """Beside certferry's lineage it is one warning line, and the ferry goes on."""
        for title in ("a file", "a dangling link"):
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().renewed)
                os.mkdir(os.path.join(host.config, "renewal"))
                conf = os.path.join(host.config, "renewal", NAME + ".conf")
                if title == "a file":
                    world.write(conf, "version = 2.1.0\n")
                else:
                    os.symlink("/nonexistent/conf", conf)
                told = host.tell("renew")
                self.assert_told(told, "installed")
                self.assertEqual(1, len(told[0].err.splitlines()), told[0])

    def test_litter(self):
        """What an interrupted run left goes with the next one, and no link is followed."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().current)
        self.assertEqual(0, host.run("renew").status)
        before = set(host.snapshot())
        half = "{}/archive/.{}@3{}".format(host.config, NAME, LITTER)
        host.lay(made().renewed, "cert.pem", folder=half)
        keep = os.path.join(host.outside, "keep")
        host.lay(made().old, folder=keep)
        os.symlink(keep, "{}/archive/.{}@4{}".format(host.config, NAME, LITTER))
        self.assertEqual(0, host.run("renew", "--dry-run").status)
        self.assertTrue(os.path.exists(half))
        self.assert_told(host.tell("renew"), "unchanged")
        self.assertEqual(before, set(host.snapshot()))
        self.assertEqual(sorted(MEMBERS), sorted(os.listdir(keep)))


# ---------------------------------------------------------------- records


class Records(VersionsCase):
    """NAME.state is for reports alone; NAME.conf must be somebody's who may."""

    def test_state(self):
        """Whatever it holds or is, no certificate and no decision is lost."""
        damages = [
            ("gone", os.unlink),
            ("zeros", lambda path: world.write(path, b"\0" * 4096)),
            ("huge", lambda path: world.write(path, b"result = x\n" + b"#" * 5000000)),
            ("a folder", lambda path: (os.unlink(path), os.mkdir(path))),
            ("a FIFO", lambda path: (os.unlink(path), os.mkfifo(path))),
        ]
        host = self.fresh()
        host.lay_versions(made().old, made().current, current=1)
        host.note(2, "rolled-back")
        host.lay_conf()
        host.offers(made().current)
        for title, damage in damages:
            with self.subTest(title):
                if os.path.isdir(host.state(NAME)):
                    os.rmdir(host.state(NAME))
                host.unlink(host.state(NAME))
                world.write(host.state(NAME), "result = unchanged\n", 0o600)
                damage(host.state(NAME))
                ended, lineage = host.tell("renew", timeout=30)
                self.assertNotIn("Traceback", ended.err)
                self.assertEqual(("deferred", 1), (lineage["result"], lineage["version"]))
        self.assert_shows(host, made().old)

    def test_conf_of_others(self):
        """One that others own or can write is refused with file and owner, and runs no hook."""
        cases = [
            ("open", lambda host: os.chmod(host.conf(NAME), 0o666)),
            ("open folder", lambda host: os.chmod(os.path.dirname(host.conf(NAME)), 0o777)),
        ]
        if not os.geteuid():
            cases += [("a stranger's", lambda host: os.chown(host.conf(NAME), STRANGER, 0))]
        for title, step in cases:
            with self.subTest(title):
                host = self.fresh()
                host.lay_versions(made().old, made().current)
                host.lay_conf()
                host.offers(made().renewed)
                step(host)
                before = host.servable()
                told = host.run("renew")
                self.assertEqual(1, told.status, told)
                self.assertIn(os.path.dirname(host.conf(NAME)), told.err)
                self.assertEqual([], world.changed(before, host.servable()))
                self.assertEqual([], host.hooks_run())

    def test_broken_conf(self):
        """It is refused by its path, stays as it is, and the others go on."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        broken = world.write(host.conf("broken.example.net"), "fro = x\n", 0o600)
        result, lineage = host.tell("renew")
        self.assertEqual((1, "installed"), (result.status, lineage["result"]), result)
        self.assertIn(broken, result.err)
        self.assertEqual(b"fro = x\n", world.read(broken))


# ---------------------------------------------------------------- locking


class Locking(VersionsCase):
    """Runs take turns."""

    def setUp(self):
        self.host = self.fresh()
        self.host.lay_versions(made().old, made().current)
        self.gate = os.path.join(self.host.outside, "gate")
        self.entered = os.path.join(self.host.outside, "entered")
        os.mkfifo(self.gate)

    def start_blocked(self):
        """A run that has deployed and is held up in its hook; the Popen."""
        blocked = "echo >>{}; timeout 60 cat {} >/dev/null\n{}"
        self.host.lay_conf(hook=blocked.format(self.entered, self.gate, HOOK))
        self.host.offers(made().renewed)
        process = self.host.start("renew")
        self.addCleanup(self.end, process)
        world.eventually(lambda: os.path.exists(self.entered))
        return process

    def end(self, process):
        """Whatever is left of a run and its hooks."""
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()

    def test_second_waits(self):
        """It finds nothing to do then; status and what has another config dir do not wait."""
        first = self.start_blocked()
        second = self.host.start("renew")
        self.addCleanup(self.end, second)
        self.assertIn(NAME, self.host.run("status", timeout=30).out)
        other = self.fresh()
        self.assertEqual(0, other.run("renew", timeout=30).status)
        self.assertIsNone(second.poll())
        os.close(os.open(self.gate, os.O_WRONLY))
        for process, word in ((first, b"installed"), (second, b"unchanged")):
            out, err = process.communicate(timeout=50)
            self.assertEqual((0, b""), (process.returncode, err), out)
            self.assertIn(word, out)
        self.assertEqual(["ran"], self.host.hooks_run())

    def test_still_held(self):
        """After LOCK_SECONDS: `failed`, reason null, nothing touched."""
        self.start_blocked()
        before = self.host.snapshot()
        hurried = world.patched(self, "certferry.LOCK_SECONDS = 0.3")
        for command in (("renew",), ("renew", "--dry-run"), ("rollback", NAME), (NAME,)):
            told = self.host.tell(*command, python=hurried)
            self.assert_told(told, "failed")
            self.assertIn("another run has held", told[0].err)
            self.assertEqual([], world.changed(before, self.host.snapshot()))

    def test_killed_holder(self):
        """It holds up nobody, even while its hook lives on; the hooks run again."""
        first = self.start_blocked()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        self.assertEqual(2, len(self.hooks_owed()))
        self.host.lay_conf()
        self.assert_told(self.host.tell("renew", timeout=30), "unchanged")
        self.assert_shows(self.host, made().renewed)
        self.assertEqual(["ran"], self.host.hooks_run())

    def hooks_owed(self):
        """The lines of `pending` in version 3."""
        return world.read(self.host.archive(NAME, 3, "pending")).decode().splitlines()

    def test_hook_that_calls_certferry(self):
        """It is refused at once, by a message that says who holds the lock; status is not."""
        log = os.path.join(self.host.outside, "inner.log")
        words = " ".join(world.command())
        line = "timeout 30 {} {} --config-dir {} >>{} 2>&1; echo status $? >>{}"
        hooks = [
            line.format(words, command, self.host.config, log, log)
            for command in ("renew", "rollback " + NAME, "status -q")
        ]
        self.host.lay_conf(hook="\n".join(hooks))
        self.host.offers(made().renewed)
        self.assert_told(self.host.tell("renew", timeout=50), "installed")
        said = world.read(log).decode()
        self.assertEqual(["1", "1"], re.findall("status ([0-9]+)", said)[:2], said)
        self.assertNotIn("status 124", said)
        self.assertIn("lock", said)
        self.assert_shows(self.host, made().renewed)

    def test_at_the_same_time(self):
        """Four runs deploy once and run the hooks once."""
        self.host.lay_conf()
        self.host.offers(made().renewed)
        runs = [self.host.start("renew") for _ in range(4)]
        outputs = [run.communicate(timeout=60) for run in runs]
        self.assertEqual([0] * 4, [run.returncode for run in runs], outputs)
        self.assertEqual(1, sum(b": installed" in out for out, _ in outputs))
        self.assertEqual(3, sum(b": unchanged" in out for out, _ in outputs))
        self.assertEqual((["ran"], [1, 2, 3]), (self.host.hooks_run(), self.host.versions()))


# ---------------------------------------------------------------- clocks


@world.needs("faketime")
class Clocks(VersionsCase):
    """A clock that is years off loses nothing."""

    def test_off(self):
        """Years ahead an offer has expired; years back nothing is valid yet, and all waits."""
        host = self.fresh()
        host.lay_versions(made().old, made().current)
        host.lay_conf()
        host.offers(made().renewed)
        for clock, result, reason in (
            ("+20y", "refused", "expired"),
            ("-20y", "deferred", "not-yet-valid"),
        ):
            with self.subTest(clock):
                told = host.tell("renew", python=world.under_clock(self, clock))
                self.assert_told(told, result, reason)
                self.assertIn("clock", told[0].err)
                self.assert_shows(host, made().current)
        self.assert_told(host.tell("renew"), "installed", health="ok")
        self.assertEqual(["ran"], host.hooks_run())


if __name__ == "__main__":
    unittest.main()
