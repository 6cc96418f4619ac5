"""What the tests are made of: authorities, upstreams good and bad, and a downstream.

Test modules say `from tests import world`; `python3 -m unittest` in the repository's root finds
them. Everything is minted at run time with the openssl command, listens on 127.0.0.1 or [::1]
only, on ports chosen by the kernel, and is stopped and removed where its `with` block or its
test ends.

    authority = world.Authority(world.scratch(case))
    first, second = (authority.issue(["example.com", "*.example.com"]) for _ in range(2))
    with world.Upstream(first) as upstream, world.Downstream() as downstream:
        downstream.key("example.com", first)
        downstream.run("example.com", "--from", upstream.source, "--ca-file", authority.root)
        upstream.switch(second)
"""

import atexit
import base64
import collections
import datetime
import functools
import hashlib
import itertools
import json
import marshal
import os
import py_compile
import re
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# CERTFERRY_SCRIPT names another one, so that tests can be seen failing on an older certferry.py.
SCRIPT = os.path.abspath(
    os.environ.get("CERTFERRY_SCRIPT") or os.path.join(REPOSITORY, "certferry.py")
)
CERTFERRY = SCRIPT
DAY = 86400
# CI sets it for each interpreter but one: what no interpreter does otherwise is done less often.
QUICK = bool(os.environ.get("CERTFERRY_QUICK"))
# CI sets it once: whole tables and sweeps, of which the plain test command takes a sample.
FULL = bool(os.environ.get("CERTFERRY_FULL"))
# .ci/run sets it for some modules: larger samples, for which the plain command has no time.
MORE = FULL or bool(os.environ.get("CERTFERRY_MORE"))
BREATH = 0.002 if QUICK else 0.0005  # seconds between two looks of one who looks all the time

Credential = collections.namedtuple("Credential", "key cert chain fullchain")
Credential.__doc__ = "Paths of a private key, its certificate, the issuers (no root), and both."

Result = collections.namedtuple("Result", "status out err")
Result.__doc__ = "How a command ended: exit status, standard output and standard error as text."

Entry = collections.namedtuple("Entry", "kind mode content mtime_ns")
Entry.__doc__ = "One path of a snapshot; content is a file's SHA-256, a link's target, else ''."


# --------------------------------------------------------------------------------------------------
# Small helpers
# --------------------------------------------------------------------------------------------------


def scratch(case=None):
    """A new folder that goes when the test case (or class, or else the process) ends."""
    folder = os.path.realpath(tempfile.mkdtemp(prefix="certferry-test-"))
    if case is None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    else:
        case.addCleanup(shutil.rmtree, folder, ignore_errors=True)
    return folder


def needs(*tools):
    """Decorator: skip the test or class, by name, where one of these commands is missing."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    return unittest.skipIf(missing, "needs " + ", ".join(missing))


def eventually(predicate, seconds=60):
    """The first true value of predicate(), asked until the deadline; AssertionError after it."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("still not so after {} s: {}".format(seconds, predicate))
        time.sleep(0.02)


def free_port(address="127.0.0.1"):
    """A port that nothing listened on a moment ago; Closed() or port 0 are safer where they do."""
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def port_for(case):
    """A port for a program that the test starts, kept from all others until the test ends."""
    kept = Closed()
    case.addCleanup(kept.__exit__)
    return kept.port


def days(count):
    """The time that many days from now, in Unix seconds."""
    return time.time() + count * DAY


def openssl(*arguments, **options):
    """Standard output of one openssl process as text; AssertionError where it fails."""
    done = subprocess.run(
        ("openssl",) + arguments,
        input=options.get("input"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        raise AssertionError(
            "openssl {}: status {}: {}".format(
                " ".join(arguments), done.returncode, done.stderr.decode("utf-8", "replace")
            )
        )
    return done.stdout.decode("utf-8", "replace")


def read(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def write(path, content, mode=None):
    """Put bytes or text into a file, with that mode where one is given; returns the path."""
    with open(path, "wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(content.encode() if isinstance(content, str) else content)
    return path


def certificates(path):
    """The certificates in a PEM file, each as DER, in their order."""
    blocks = re.findall(b"-----BEGIN CERTIFICATE.*?-----END CERTIFICATE-----", read(path), re.S)
    return [ssl.PEM_cert_to_DER_cert(block.decode()) for block in blocks]


def public_key(path):
    """The public key of a certificate or private key file, as openssl prints it."""
    return _public_key(read(path))


@functools.lru_cache(maxsize=None)
def _public_key(pem):
    command = ("x509", "-noout", "-pubkey") if b"BEGIN CERTIFICATE" in pem else ("pkey", "-pubout")
    return openssl(*command, input=pem)


def without(tests, *cases):
    """A module's tests, but with CERTFERRY_QUICK none of these cases: CI would count a skip."""
    return unittest.TestSuite(
        suite for suite in tests if not QUICK or not any(isinstance(test, cases) for test in suite)
    )


def in_turn(cases):
    """All cases of a table that is no matter of Python, or with CERTFERRY_QUICK a third of them.

    Which third changes with the release of Python, so that all interpreters together try them all.
    """
    cases = list(cases)
    return cases[sys.version_info[1] % 3 :: 3] if QUICK else cases


@functools.lru_cache(maxsize=None)
def script():
    """The certferry.py to run: the repository's, compiled once: that is half of a short run."""
    folder = scratch()
    code = compile(read(CERTFERRY), CERTFERRY, "exec", dont_inherit=True)
    compiled = write(os.path.join(folder, "code"), marshal.dumps(code))
    return write(
        os.path.join(folder, "certferry.py"),
        (
            "import marshal, sys\nsys.argv[0] = {!r}\nwith open({!r}, 'rb') as file:\n"
            "    code = marshal.load(file)\nexec(code)\n"
        ).format(CERTFERRY, compiled),
    )


def command():
    """The words that run it, without Python's site, as what install.sh installs is run."""
    return sys.executable, "-S", script()


@functools.lru_cache(maxsize=None)
def module_folder():
    """A folder to import the module certferry from, compiled once as well."""
    folder = scratch()
    py_compile.compile(CERTFERRY, os.path.join(folder, "certferry.pyc"), doraise=True)
    return folder


def patched(case, patch):
    """An interpreter that changes the module before it runs the command: give it as python=..."""
    folder = scratch(case)
    runner = write(
        os.path.join(folder, "runner.py"),
        (
            "import os, sys\nsys.path.insert(0, {!r})\nimport certferry\n{}\n"
            "sys.exit(certferry.main(sys.argv[2:]))\n"
        ).format(module_folder(), patch),
    )
    return write(
        os.path.join(folder, "python"),
        '#!/bin/sh\nexec {} {} "$@"\n'.format(sys.executable, runner),
        0o755,
    )


def under_clock(case, specification, variables=""):
    """An interpreter for which the clock is another one: give it as python=...

    specification is what `faketime -f` takes, variables are set for it: "NO_FAKE_STAT=1".
    """
    # What is killed under faketime leaves files named after its process's number in /dev/shm: the
    # next to have that number would end with "sem_open: File exists". They are of no living one.
    stale = "/dev/shm/sem.faketime_sem_$$ /dev/shm/faketime_shm_$$"
    command = "{} exec faketime -f '{}' {}".format(variables, specification, sys.executable)
    return write(
        os.path.join(scratch(case), "python"),
        '#!/bin/sh\nrm -f {}\n{} "$@"\n'.format(stale, command),
        0o755,
    )


def certferry(*arguments, **how):
    """Run the command in a fresh config dir that goes at once; a Result, as Downstream.run."""
    with Downstream() as downstream:
        return downstream.run(*arguments, **how)


def _family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# --------------------------------------------------------------------------------------------------
# Authorities
# --------------------------------------------------------------------------------------------------

ROOT = """\
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
"""
INTERMEDIATE = """\
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
LEAF = """\
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature,keyEncipherment
extendedKeyUsage = serverAuth
subjectAltName = {names}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""

_CONFIG = """\
[req]
prompt = no
distinguished_name = nobody
[nobody]
CN = nobody
[ca]
default_ca = here
[here]
database = {folder}/index.txt
serial = {folder}/serial.txt
new_certs_dir = {folder}
default_md = {digest}
unique_subject = no
policy = any
copy_extensions = none
{use}
[any]
countryName = optional
organizationName = optional
commonName = optional
[extensions]
{extensions}
"""


class Authority:
    """A certificate authority: a root, an intermediate unless told otherwise, and what they issue.

    .root is the path of the root's PEM. Every certificate issued begins one second after the one
    before, so that with default dates the next one is newer in certferry's sense.
    """

    _roots = set()  # paths of self-signed certificates: no chain includes one

    def __init__(self, folder, name="Example Root", intermediate=True, key="P-256"):
        self.folder = folder
        self._counter = itertools.count()
        self._requests = {}  # paths of signing requests by key and subject: all that is in one
        lifetime = {"key": key, "not_before": days(-3650), "not_after": days(3650), "ca": True}
        self.root_credential = self.issue(
            [], subject="/O=Example/CN=" + name, issuer="self", extensions=ROOT, **lifetime
        )
        self.root = self.root_credential.cert
        self.issuer = self.root_credential
        if intermediate:
            self.issuer = self.issue(
                [], subject="/O=Example/CN={} Intermediate".format(name), **lifetime
            )
        self.intermediate = self.issuer if intermediate else None

    def issue(
        self,
        names,
        key=None,
        not_before=None,
        not_after=None,
        extensions=None,
        subject=None,
        ca=False,
        serial=None,
        issuer=None,
        digest="default",
    ):
        """Mint a certificate; returns its Credential, in a folder of its own.

        names       of the subject: host names, IP addresses, or openssl's own "URI:..." form
        key         "P-256" or another curve, "ed25519", or the path of a key; "rsa:2048": the
                    process's one RSA key of that size, since making one takes a quarter second
        not_before, not_after    datetime (naive: UTC) or Unix seconds; now - 1 day, now + 89 days
        extensions  text in place of LEAF; {names} stands for the names, "" for no extension at all
        subject     "/CN=..." in place of the first name, "/" for an empty one
        ca          make it an authority's certificate (INTERMEDIATE's extensions)
        serial      a whole number
        issuer      Credential of another authority's certificate that signs, or "self"
        digest      "sha1", "md5", ... in place of the signer's default
        """
        folder = tempfile.mkdtemp(dir=self.folder)
        config = self._configure(folder, names, extensions, ca, serial, digest)
        if key and key.startswith("rsa:"):
            key = write(os.path.join(folder, "privkey.pem"), _rsa_key(key[4:]), 0o600)
        key_path, request = self._request(folder, config, key or "P-256", subject, names)
        begin = days(-1) + next(self._counter) if not_before is None else not_before
        cert = os.path.join(folder, "cert.pem")
        issuer = issuer or self.issuer
        end = days(89) if not_after is None else not_after
        if issuer == "self":
            signer = ["-selfsign", "-keyfile", key_path]
        else:
            signer = ["-keyfile", issuer.key, "-cert", issuer.cert]
        command = ["ca", "-batch", "-notext", "-preserveDN", "-config", config]
        command += ["-in", request, "-out", cert]
        command += ["-startdate", _asn1_time(begin), "-enddate", _asn1_time(end)]
        openssl(*command, *signer)
        if issuer == "self":
            Authority._roots.add(cert)
        by_root = issuer == "self" or issuer.cert in Authority._roots
        chain = b"" if by_root else read(issuer.fullchain)
        return Credential(
            key_path,
            cert,
            write(os.path.join(folder, "chain.pem"), chain),
            write(os.path.join(folder, "fullchain.pem"), read(cert) + chain),
        )

    @staticmethod
    def _configure(folder, names, extensions, ca, serial, digest):
        if extensions is None:
            extensions = INTERMEDIATE if ca else LEAF
        if not names:
            lines = extensions.splitlines(True)
            extensions = "".join(line for line in lines if "{names}" not in line)
        extensions = extensions.replace("{names}", ",".join(map(_general_name, names)))
        write(os.path.join(folder, "index.txt"), "")
        number = int.from_bytes(b"\x01" + os.urandom(15), "big") if serial is None else serial
        digits = "{:x}".format(number)
        write(os.path.join(folder, "serial.txt"), "0" * (len(digits) % 2) + digits + "\n")
        use = "x509_extensions = extensions" if extensions else ""
        return write(
            os.path.join(folder, "openssl.cnf"),
            _CONFIG.format(folder=folder, digest=digest, use=use, extensions=extensions),
        )

    def _request(self, folder, config, key, subject, names):
        if subject is None:
            # A common name holds 64 characters at most, and is only for display.
            subject = "/CN=" + names[0] if names and len(names[0]) <= 64 else "/"
        request, key_path = os.path.join(folder, "request.pem"), os.path.join(folder, "privkey.pem")
        if os.path.exists(key):
            if (read(key), subject) in self._requests:
                return key, self._requests[read(key), subject]
            how, key_path = ["-key", key], key
        elif key.startswith(("P-", "secp")):
            how = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:" + key, "-keyout", key_path]
            how += ["-pkeyopt", "ec_param_enc:named_curve"]
        else:
            how = ["-newkey", key, "-keyout", key_path]
        command = ["req", "-new", "-nodes", "-config", config, "-utf8", "-subj", subject]
        openssl(*command, "-out", request, *how)
        self._requests[read(key_path), subject] = request
        return key_path, request


@functools.lru_cache(maxsize=None)
def _rsa_key(bits):
    return openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:" + bits)


def _general_name(name):
    """A name in openssl's words: DNS:, IP:, or as it is where it says its own kind."""
    if re.match("(DNS|IP|URI|RID|email|dirName|otherName):", name):
        return name
    return ("IP:" if ":" in name or re.match(r"[0-9.]+\Z", name) else "DNS:") + name


def _asn1_time(moment):
    if not isinstance(moment, datetime.datetime):
        moment = datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)
    elif moment.tzinfo:
        moment = moment.astimezone(datetime.timezone.utc)
    return moment.strftime("%Y%m%d%H%M%SZ")


# --------------------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------------------


class Server:
    """A TCP server in threads: accepts and holds, until a subclass's talk() says something better.

    .port, .source ("127.0.0.1:PORT"), .connections (how many were accepted). A context manager;
    also start() and stop() for setUpClass, or started(case) for one test.
    """

    def __init__(self, address="127.0.0.1", port=0):
        self.address, self.port = address, port
        self.connections = 0
        self._open, self._threads = set(), []
        self._change = threading.Condition()
        self._stopped = threading.Event()
        self._listener = self._holder = None

    @property
    def source(self):
        """What --from takes."""
        return ("[{}]:{}" if ":" in self.address else "{}:{}").format(self.address, self.port)

    def start(self):
        """Listen; returns self."""
        self._holder = Closed(self.address, self.port)
        self.port = self._holder.port
        self._listener = socket.socket(_family(self.address))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.address, self.port))
        self._listener.listen(128)
        self._spawn(self._accept)
        return self

    def started(self, case):
        """Listen until the test case ends; returns self."""
        self.start()
        case.addCleanup(self.stop)
        return self

    def gone(self, case):
        """Stop; until the test case ends the port is nobody's, but who asks for this very one."""
        case.addCleanup(self._holder.__exit__)
        self._stop()

    def stop(self):
        """Close the port and every connection, and wait for the threads."""
        self._stop()
        self._holder.__exit__()

    def _stop(self):
        if self._stopped.is_set():
            return  # by now the port may be another's
        self._stopped.set()
        with socket.socket(_family(self.address)) as nudge:
            # accept() does not notice that its socket is closed, so it is given a connection.
            nudge.settimeout(5)
            try:
                nudge.connect((self.address, self.port))
            except OSError:
                pass
        for sock in list(self._open):
            _hang_up(sock)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    __enter__ = start

    def __exit__(self, *_):
        self.stop()

    def talk(self, sock):
        """Serve one connection: hold it in silence until the server stops."""
        self._stopped.wait()

    def _spawn(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            sock, _ = self._listener.accept()
            if self._stopped.is_set():
                sock.close()
                return
            with self._change:
                self.connections += 1
            self._open.add(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock):
        try:
            sock.settimeout(30)
            self.talk(sock)
        except (OSError, ValueError):
            pass  # a peer that gives up is nothing to a server
        finally:
            self._open.discard(sock)
            sock.close()


def _hang_up(sock):
    """Wake a thread that waits on this socket; the thread closes it."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


class Upstream(Server):
    """A TLS server that shows a credential, or several (RSA and ECDSA side by side).

    minimum, maximum  TLS versions, "1.0" to "1.3"
    ciphers           OpenSSL cipher list (TLS 1.2 and below)
    send              paths of PEM files to send after the leaf in place of its chain, as they are
    hosts             {server name: Credential} shown to those who ask for that name
    strict            names served at all: others, or none, get the alert unrecognized_name
    client_ca         demand a client certificate by this authority (path of its PEM)
    tickets           False: no session tickets and so no resumption
    before            called with the plain socket first: a STARTTLS dialogue
    answer            bytes, or a function of the request's bytes, sent after a first read

    .handshakes (completed), .resumed (of these), .asked (server names in turn, None for none).
    """

    def __init__(self, credential, address="127.0.0.1", port=0, before=None, answer=None, **how):
        super().__init__(address, port)
        self._how, self._before, self._answer = how, before, answer
        self._shaking, self._completed = 0, 0
        self.resumed, self.asked = 0, []
        self.context = None
        self.switch(credential)

    @property
    def handshakes(self):
        """How many handshakes completed; waits for those that are under way."""
        with self._change:
            # In TLS 1.3 the client is through before the server has read its last message.
            self._change.wait_for(lambda: not self._shaking, 30)
            return self._completed

    def switch(self, credential, keep_sessions=False):
        """Show another credential from the next connection on.

        With keep_sessions earlier tickets stay good: who resumes still meets the old certificate.
        """
        if keep_sessions:
            _load(self.context, credential, self._how.get("send"))
        else:
            self.context = self._make_context(credential, **self._how)

    def talk(self, sock):
        """One TLS connection: handshake, an answer if there is one, then wait for the end."""
        with self._change:
            self._shaking += 1
        try:
            if self._before:
                self._before(sock)
            tls = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except BaseException:
            self._shaken(None)
            raise
        self._open.add(tls)
        try:
            self._shake(tls)
            self._converse(tls)
        finally:
            self._open.discard(tls)
            tls.close()

    def _shake(self, tls):
        completed = None
        try:
            tls.do_handshake()
            completed = tls
        finally:
            self._shaken(completed)

    def _shaken(self, tls):
        """Count a handshake that is over; tls is None where it failed."""
        with self._change:
            self._shaking -= 1
            self._completed += tls is not None
            self.resumed += tls is not None and bool(tls.session_reused)
            self._change.notify_all()

    def _converse(self, tls):
        request = tls.recv(65536)
        if self._answer is not None and request:
            tls.sendall(self._answer(request) if callable(self._answer) else self._answer)
            tls.unwrap()
        while request:
            request = tls.recv(65536)

    def _make_context(
        self,
        credential,
        minimum=None,
        maximum=None,
        ciphers=None,
        send=None,
        hosts=None,
        strict=None,
        client_ca=None,
        tickets=True,
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _limit_versions(context, minimum, maximum)
        # Level 0: tests also show keys and signatures that openssl would not load otherwise.
        context.set_ciphers((ciphers or "DEFAULT") + ":@SECLEVEL=0")
        _load(context, credential, send)
        if not tickets:
            context.options |= ssl.OP_NO_TICKET
            if hasattr(context, "num_tickets"):
                context.num_tickets = 0
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_ca)
        others = {
            name: self._make_context(shown, minimum, maximum, ciphers, tickets=tickets)
            for name, shown in (hosts or {}).items()
        }
        self._watch_names(context, others, strict)
        return context

    def _watch_names(self, context, others, strict):
        def choose(tls, name, _):
            self.asked.append(name)
            if name in others:
                tls.context = others[name]
            elif strict is not None and name not in strict:
                return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
            return None

        if hasattr(context, "sni_callback"):
            context.sni_callback = choose
        else:
            context.set_servername_callback(choose)  # Python 3.6


def _load(context, credential, send=None):
    """Load one credential or several into a server's context."""
    for one in [credential] if isinstance(credential, Credential) else credential:
        if send is None:
            context.load_cert_chain(one.fullchain, one.key)
            continue
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(map(read, [one.cert] + list(send))))
            file.flush()
            context.load_cert_chain(file.name, one.key)


_VERSIONS = {"1.0": "TLSv1", "1.1": "TLSv1_1", "1.2": "TLSv1_2", "1.3": "TLSv1_3"}


def _limit_versions(context, minimum, maximum):
    """Allow these TLS versions and no others, on every Python."""
    low, high = minimum or "1.2", maximum or "1.3"
    if hasattr(ssl, "TLSVersion"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 1.0 and 1.1: asked for on purpose
            context.minimum_version = ssl.TLSVersion[_VERSIONS[low]]
            context.maximum_version = ssl.TLSVersion[_VERSIONS[high]]
        return
    for version, name in _VERSIONS.items():  # Python 3.6
        refused = getattr(ssl, "OP_NO_" + name)
        if low <= version <= high:
            context.options &= ~refused
        else:
            context.options |= refused


class StaticRsaOnly(Upstream):
    """TLS 1.2 with RSA key transport only, where the server signs nothing; wants RSA keys."""

    def __init__(self, credential, **how):
        super().__init__(
            credential,
            maximum="1.2",
            ciphers="AES128-GCM-SHA256:AES128-SHA256:AES256-SHA256:AES128-SHA",
            **how,
        )


# --------------------------------------------------------------------------------------------------
# Servers that misbehave
# --------------------------------------------------------------------------------------------------

Silent = type("Silent", (Server,), {"__doc__": "Accepts and never says a word."})


class Dripping(Server):
    """Sends the head of a long handshake record, then a byte every so many seconds."""

    def __init__(self, interval=1, **where):
        super().__init__(**where)
        self._interval = interval

    def talk(self, sock):
        """Drip until the peer or the server has had enough."""
        for byte in itertools.chain(b"\x16\x03\x03\x40\x00\x02", itertools.repeat(0)):
            sock.sendall(bytes([byte]))
            if self._stopped.wait(self._interval):
                return


class HelloThenHang(Server):
    """Answers the client's hello with a good TLS 1.2 hello and never says another word."""

    def talk(self, sock):
        """One hello, then silence."""
        sock.recv(65536)
        # ECDHE-RSA-AES128-GCM-SHA256; renegotiation_info, without which OpenSSL 3 hangs up.
        hello = b"\x03\x03" + os.urandom(32) + b"\0\xc0\x2f\0" + b"\x00\x05\xff\x01\x00\x01\x00"
        message = b"\x02" + struct.pack(">I", len(hello))[1:] + hello
        sock.sendall(b"\x16\x03\x03" + struct.pack(">H", len(message)) + message)
        self._stopped.wait()


class PlainHttp(Server):
    """An HTTP server on the port, which answers whatever comes with a redirect."""

    def talk(self, sock):
        """One answer, then the end."""
        sock.recv(65536)
        sock.sendall(
            b"HTTP/1.1 301 Moved Permanently\r\nLocation: http://example.com/\r\n"
            b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )


class Garbage(Server):
    """Sends bytes that are no TLS, then closes; with endless=True it never stops sending."""

    def __init__(self, content=bytes(range(256)) * 16, endless=False, **where):
        super().__init__(**where)
        self._content, self._endless = content, endless

    def talk(self, sock):
        """Speak first, as no TLS server does."""
        sock.sendall(self._content)
        while self._endless and not self._stopped.is_set():
            sock.sendall(self._content)
        _read_to_end(sock)


class ClosesAtOnce(Server):
    """Accepts and closes; with reset=True by a reset."""

    def __init__(self, reset=False, **where):
        super().__init__(**where)
        self._reset = reset

    def talk(self, sock):
        """Nothing, but for how the end looks to the peer."""
        if self._reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Closed:
    """A port where nothing listens, kept from others as long as the block lasts.

    Who asks for this very port may listen on it all the same.
    """

    def __init__(self, address="127.0.0.1", port=0):
        self._holder = socket.socket(_family(address))
        # Lets a listener that sets it too in, but nobody to whom the kernel gives a port.
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((address, port))
        self.address, self.port = address, self._holder.getsockname()[1]

    source = Server.source

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._holder.close()


class Impostor(Server):
    """Shows a certificate without holding its key, in TLS "1.3" or "1.2".

    then="bad-signature": signs with another key (P-256: real_key's where given).
    then="alert": sends the certificate and then, in place of a signature, a fatal alert (in TLS 1.3
    an unencrypted one, which clients call a bad record). then="close": nothing more.
    """

    def __init__(
        self, shown, real_key=None, version="1.3", then="bad-signature", before=None, **where
    ):
        super().__init__(**where)
        self._then, self._before = then, before
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _limit_versions(self._context, version, version)
        with tempfile.NamedTemporaryFile() as file:
            file.write(_lying_key(read(shown.key), read(real_key.key) if real_key else None))
            file.flush()
            self._context.load_cert_chain(shown.fullchain, file.name)

    def talk(self, sock):
        """A handshake that no careful client completes."""
        if self._before:
            self._before(sock)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                tls.do_handshake()
                break  # the client took it: the test that waits for a refusal will say so
            except ssl.SSLWantReadError:
                flight = outgoing.read()
                if flight and self._then != "bad-signature":
                    sock.sendall(_up_to_certificate(flight))
                    if self._then == "alert":
                        sock.sendall(b"\x15\x03\x03\x00\x02\x02\x50")  # fatal, internal_error
                    sock.shutdown(socket.SHUT_WR)
                    break
                sock.sendall(flight)
                received = sock.recv(65536)
                if not received:
                    return
                incoming.write(received)
        sock.sendall(outgoing.read())
        _read_to_end(sock)


def _read_to_end(sock):
    """Read what the peer still sends: closing with unread bytes would reset what was sent to it."""
    while sock.recv(65536):
        pass


def _up_to_certificate(flight):
    """A server's first flight without the records that follow its certificate."""
    kept, encrypted, offset = b"", 0, 0
    while offset < len(flight):
        kind, end = flight[offset], offset + 5 + struct.unpack_from(">H", flight, offset + 3)[0]
        # TLS 1.2: plain handshake records, message 11 is Certificate. TLS 1.3 hides the kinds: the
        # second encrypted record is the certificate, after EncryptedExtensions.
        encrypted += kind == 23
        kept += flight[offset:end]
        if encrypted == 2 or kind == 22 and flight[offset + 5] == 11:
            break
        offset = end
    return kept


def _lying_key(pem, other=None):
    """A private key file (PKCS 8) whose public half is pem's but whose secret half is not.

    openssl believes the public half when it loads a key beside a certificate, so an ordinary TLS
    server then shows that certificate and makes signatures that do not fit it.
    """
    der = bytearray(_key_der(pem))
    head = b"\x02\x01\x01\x04\x20"  # version 1 and a scalar of 32 bytes: an elliptic-curve key
    if head in der:
        start = der.index(head) + len(head)
        secret = b"\x01" * 32
        if other:
            secret = _key_der(other)
            secret = secret[secret.index(head) + len(head) :][:32]
        der[start : start + 32] = secret
    else:
        places = _rsa_integers(der)
        for index in (3, 6, 7):  # d, d mod p-1, d mod q-1: p and q must stay odd, n and e are shown
            start, length = places[index]
            der[start + length - 1] ^= 4
    body = base64.encodebytes(bytes(der)).decode()
    return ("-----BEGIN PRIVATE KEY-----\n" + body + "-----END PRIVATE KEY-----\n").encode()


def _key_der(pem):
    """A private key as PKCS 8 DER."""
    return subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-nocrypt", "-outform", "DER"],
        input=pem,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    ).stdout


def _rsa_integers(der):
    """(start, length) of an RSA key's whole numbers in PKCS 8: version, n, e, d, p, q, ..."""
    places, offset = [], der.index(b"\x02\x01\x00\x02\x82")  # version 0, then a long modulus
    while offset < len(der):
        length, start = der[offset + 1], offset + 2
        if length & 0x80:
            size = length & 0x7F
            length, start = int.from_bytes(der[start : start + size], "big"), start + size
        places.append((start, length))
        offset = start + length
    return places


# --------------------------------------------------------------------------------------------------
# The downstream
# --------------------------------------------------------------------------------------------------


class Downstream:
    """A fresh config dir (.config), and the command to run on it."""

    def __init__(self):
        self.config = None
        self._folder = None

    def __enter__(self):
        self._folder = scratch()
        self.config = os.path.join(self._folder, "letsencrypt")
        os.mkdir(self.config, 0o755)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self._folder, ignore_errors=True)

    def started(self, case):
        """Set up until the test case ends; returns self."""
        case.addCleanup(self.__exit__)
        return self.__enter__()

    def start(self, *arguments, **how):
        """The command, started: a Popen with pipes, leader of a process group of its own.

        env: variables to add, None to take one away; python; bare=True: without --config-dir.
        """
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CERTFERRY_", "VAULT_", "AZURE_", "SSL_CERT_"))
        }
        environment.update(how.get("env") or {})
        environment = {name: value for name, value in environment.items() if value is not None}
        where = () if how.get("bare") else ("--config-dir", self.config)
        words = command()
        if how.get("python"):
            words = (how["python"], script())
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            words + arguments + where,
            env=environment,
            cwd=self._folder,
            start_new_session=True,
            **pipes,
        )

    def run(self, *arguments, stdin=None, env=None, timeout=60, python=None, bare=False):
        """Run the command to its end, text or bytes on its standard input; returns a Result."""
        with self.start(*arguments, env=env, python=python, bare=bare) as process:
            try:
                out, err = process.communicate(
                    stdin.encode() if isinstance(stdin, str) else stdin, timeout
                )
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise AssertionError(
                    "certferry {}: still running after {} s:\n{}\n{}".format(
                        " ".join(arguments), timeout, _text(out), _text(err)
                    )
                )
        return Result(process.returncode, _text(out), _text(err))

    def json(self, *arguments, **how):
        """Run the command with --json; returns (status, document)."""
        result = self.run(*(arguments + ("--json",)), **how)
        try:
            return result.status, json.loads(result.out)
        except ValueError:
            raise AssertionError("no JSON: certferry {}: {}".format(" ".join(arguments), result))

    def key(self, name, key, file="privkey.pem"):
        """Drop a private key, by path or Credential, at live/NAME/FILE, mode 0600; its path."""
        os.makedirs(self.live(name), exist_ok=True)
        source = key.key if isinstance(key, Credential) else key
        path = self.live(name, file)
        # As mv does it: a link in its place is replaced, the version behind it stays as it is.
        os.replace(write(path + ".new", read(source), 0o600), path)
        return path

    def live(self, name, *file):
        """Path of live/NAME, or of a file in it."""
        return os.path.join(self.config, "live", name, *file)

    def archive(self, name, number, *file):
        """Path of version N, or of a file in it."""
        return os.path.join(self.config, "archive", "{}@{}".format(name, number), *file)

    def conf(self, name):
        """Path of the remembered options."""
        return os.path.join(self.config, "certferry", name + ".conf")

    def state(self, name):
        """Path of what happened last."""
        return os.path.join(self.config, "certferry", name + ".state")

    def hook(self, directory, name, script, mode=0o755):
        """Put a shell script into renewal-hooks/DIRECTORY; returns its path."""
        folder = os.path.join(self.config, "renewal-hooks", directory)
        os.makedirs(folder, exist_ok=True)
        return write(os.path.join(folder, name), "#!/bin/sh\n" + script + "\n", mode)

    def become(self, folder, old, new):
        """Make the config dir a copy of that one, with a word of its records replaced."""
        shutil.rmtree(self.config)
        shutil.copytree(folder, self.config, symlinks=True)
        records = os.path.join(self.config, "certferry")
        for path in (os.path.join(records, name) for name in os.listdir(records)):
            facts = os.stat(path)
            write(path, read(path).replace(old.encode(), new.encode()))
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # when a source was asked

    def snapshot(self):
        """{path relative to the config dir: Entry} of all that is there, "." included."""
        found = {".": _entry(self.config)}
        for folder, directories, files in os.walk(self.config):
            for name in directories + files:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, self.config)] = _entry(path)
        return found

    def served_leaf(self, name):
        """DER of the certificate that a server pointed at live/NAME/fullchain.pem shows."""
        return certificates(self.live(name, "fullchain.pem"))[0]

    def assert_fits(self, case, name, credential=None):
        """What live/NAME/ shows belongs together, and is this credential's where one is given."""
        cert, chain, fullchain, key = (
            self.live(name, file + ".pem") for file in ("cert", "chain", "fullchain", "privkey")
        )
        case.assertEqual(1, len(certificates(cert)))
        case.assertEqual(read(fullchain), read(cert) + read(chain))
        case.assertEqual(public_key(cert), public_key(key))
        if credential is not None:
            case.assertEqual(certificates(credential.cert), certificates(cert))
            case.assertEqual(certificates(credential.chain), certificates(chain))


def changed(before, after):
    """Sorted paths that two snapshots do not agree on."""
    return sorted(path for path in set(before) | set(after) if before.get(path) != after.get(path))


def _entry(path):
    facts = os.lstat(path)
    kind = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}.get(
        stat.S_IFMT(facts.st_mode), "other"
    )
    content = ""
    if kind == "file":
        content = hashlib.sha256(read(path)).hexdigest()
    elif kind == "link":
        content = os.readlink(path)
    return Entry(kind, stat.S_IMODE(facts.st_mode), content, facts.st_mtime_ns)


def _text(output):
    return output.decode("utf-8", "backslashreplace")
