#!/usr/bin/env python3
"""certferry: ferry a renewed certificate from the server that has it to every server that needs it.

    certferry example.com --from up.example.net

makes a TLS handshake with up.example.net, takes the certificate that it shows, checks it, and puts
it into live/example.com/ as certbot would; then runs the deploy hooks. `certferry renew`, twice a
day from a timer, does that again for every lineage.

The bargain. This file runs as root, so read it: it is one file, nothing in it is used above its
definition, and whoever starts at `main`, at the end, can go up as deep as they like. The private
key is the credential: it is put on this host once, and only a certificate for a key that is
already here is accepted. In a TLS handshake the peer proves that it holds that key too, so the
upstream needs no configuration and nobody else can take part. Who controls the path can withhold
a renewal, which is seen as `due` and then `warning`; revocation is not checked.

How data travels, one way:

    options -> Lineage -> fetch -> Offer -> judge -> Verdict -> deploy -> hooks -> Outcome -> report

Words: an *upstream* has the certificate and serves it; the *downstream* is this host. A *lineage*
is one certificate name and all its versions, live/NAME/. A *source* is where its chain is fetched
from. The *leaf* is the end-entity certificate, the *chain* its issuers in order, without the root.
An *offer* is what a source handed over, not yet trusted. A *version* is one complete set of
cert.pem, chain.pem, fullchain.pem and privkey.pem, kept in archive/NAME@N/. A *staged key* waits
in live/NAME/privkey-*.pem until an offer fits it. To *deploy* is to make an accepted offer the
current version and to run the deploy hooks.

Privilege. As root, whatever talks to the network is a process that has become nobody, forked
before a key is read; openssl reads what came from outside as nobody too, under another group.
What the network process says counts for bytes only: it is this process that decides.

Exit status: 0 all is well; 1 something failed, was refused or is pending; 2 wrong usage;
`status`: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
"""

# Modules that take a millisecond or more to import are imported where they are needed: the usual
# run finds nothing new, twice a day on every server, and has to cost next to nothing.
import binascii
import collections
import errno
import functools
import os
import re
import select
import signal
import stat
import sys
import time

__version__ = "1.0.0"

MAX_OFFER = 1 << 20  # bytes: sixteen certificates of any sane size are under 64 KiB
MAX_CERTIFICATES = 16  # a public chain has two to four
MAX_KEY = 1 << 16  # bytes: an RSA key of 16,384 bits takes 13 KiB as PEM
MAX_RECORD = 1 << 18  # bytes of a NAME.conf, NAME.state or environment file
MAX_DEPTH = 24  # of nested DER elements; certificates need about twelve
SIDE_BY_SIDE = 8  # exchanges that make progress; more gain nothing against one upstream
PATIENCE = 0.5  # seconds after which an exchange waits on its peer and frees its place
MAX_RUNNING = 256  # exchanges in all, so that dead upstreams do not exhaust descriptors
OPENSSL_SECONDS = 20  # an openssl process takes 5 ms; a stuck one must not hold up the run
HOOK_SECONDS = 600  # a hook may restart a large database; a hanging one must not block for ever
SERVED_SECONDS = 15  # reloads are asynchronous: workers exit when their connections do
LOCK_SECONDS = 60  # a second run waits that long for the first
KEPT_VERSIONS = 5  # besides the current one, if it is older
STAGED_KEY_DAYS = 30  # a key that waits longer was probably forgotten
DAY = 86400

CONFIG_DIR = "/usr/local/etc/letsencrypt" if "freebsd" in sys.platform else "/etc/letsencrypt"
MEMBERS = ("cert.pem", "chain.pem", "fullchain.pem", "privkey.pem")
LITTER = ".certferry-new"  # ends every temporary name, so that a later run knows what it may remove
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE:DHE:!aNULL:!eNULL:!PSK:!SRP"
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CREDENTIALS = ("VAULT_TOKEN", "VAULT_TOKEN_FILE", "VAULT_ROLE_ID", "VAULT_SECRET_ID_FILE",
               "VAULT_SECRET_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET",
               "AZURE_CLIENT_SECRET_FILE")

# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------


class Source(collections.namedtuple("Source", "kind host port target text")):
    """Where a chain is fetched: kind `tls`, a STARTTLS protocol, file, exec, vault or azure.

    `text` is what a person reads; `target` is the path or command of a source that is no host.
    """

    __slots__ = ()
    may_hold_key = property(lambda self: self.kind in ("file", "exec", "vault", "azure"))


class Certificate(collections.namedtuple("Certificate", (
        "der serial not_before not_after subject issuer public_key algorithm version extensions "
        "domains"))):
    """The facts of one certificate: names as DER bytes, times in seconds since 1970.

    `public_key` is the SubjectPublicKeyInfo, `extensions` {OID bytes: (critical, value bytes)},
    `domains` the usable DNS names and IP addresses of the subject alternative name, in its order.
    """

    __slots__ = ()
    lifetime = property(lambda self: max(1, self.not_after - self.not_before))


class Place(collections.namedtuple("Place", "config name")):
    """Where the files of one lineage are."""

    __slots__ = ()
    live = property(lambda self: "%s/live/%s" % self)
    archive = property(lambda self: "%s/archive" % self.config)
    records = property(lambda self: "%s/certferry" % self.config)
    pointer = property(lambda self: "%s/live/%s/.current" % self)
    conf = property(lambda self: "%s/certferry/%s.conf" % self)
    state = property(lambda self: "%s/certferry/%s.state" % self)
    renewal = property(lambda self: "%s/renewal/%s.conf" % self)

    def version(self, number):
        """Return the folder of version `number`."""
        return "%s/archive/%s@%d" % (self.config, self.name, number)


# What is in service: `number` is None for plain files or certbot's links that are not adopted yet.
Version = collections.namedtuple("Version", "number folder leaf chain")

# What a source handed over; `chain` is None where the exchange did not show it, `key` a Secret.
Offer = collections.namedtuple("Offer", "source address leaf chain key way")

# An offer, parsed, and what openssl says of it: public keys as DER, `trust` "" or what is wrong.
Evidence = collections.namedtuple("Evidence", "offer leaf public_key carried_key trust")

# What the judge compares an offer with: `keys` {public key DER: path}, the others fingerprints.
Wanted = collections.namedtuple("Wanted", (
    "name domains current keys retired replaced rolled_back rolled_keys"))

# reason is "" for an offer that is accepted; message and hint make the line that a person reads.
Verdict = collections.namedtuple("Verdict", "reason message hint")

# One lineage: `given` are the remembered options as they were written, None without a NAME.conf;
# `checked` is the time of the last check, `key` the path of its private key or None.
Lineage = collections.namedtuple("Lineage", "place given options state checked current key notices")

# How a crossing ended: `fresh` says that a certificate was deployed, `changed` that anything was
# written, `lines` what is shown below the result.
Outcome = collections.namedtuple("Outcome", (
    "name result reason message hint changed fresh source version health why lines"))

SOUND = ("installed", "unchanged", "pending")  # results of a good exchange
WELL = ("installed", "unchanged", "not-due", "deferred")  # results that exit with 0


class Secret:
    """A private key as PEM bytes, in one object that never shows them."""

    __slots__ = ("pem",)

    def __init__(self, pem):
        """Hold the PEM bytes."""
        self.pem = pem

    def __repr__(self):
        """Show nothing."""
        return "<private key>"


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


class Failure(Exception):
    """What ends a crossing: `reason` is a word of the README's table, or None for a broken record,
    a held lock or a missing program; `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, reason, message, hint=""):
        """Keep the words apart."""
        Exception.__init__(self, message)
        self.reason, self.message, self.hint = reason, message, hint

    @property
    def result(self):
        """Return `failed` where nothing could be judged, else `refused`."""
        return "failed" if self.reason in (None, "unreachable", "timeout", "storage") else "refused"


class Usage(Exception):
    """A wrong command line: the message is what is wrong and what to do."""


def storage_failure(error):
    """Return the Failure for an OSError of the disk: the errno in words, and the path."""
    where = error.filename2 or error.filename or "the config dir"
    hint = {errno.ENOSPC: "free some space", errno.EDQUOT: "raise the quota or free some space",
            errno.EROFS: "remount it writable", errno.EACCES: "run it as the owner, mostly root",
            errno.EPERM: "run it as root, and look for lsattr's i flag",
            errno.EMFILE: "raise ulimit -n"}.get(error.errno, "see to the disk")
    if isinstance(where, bytes):
        where = where.decode("utf-8", "replace")
    words = os.strerror(error.errno) if error.errno else str(error)
    return Failure("storage", "%s: %s" % (where, words.lower()),
                   hint + "; the certificate in service is untouched")


# --------------------------------------------------------------------------------------------------
# Options and records
# --------------------------------------------------------------------------------------------------

STARTTLS = {"smtp": 25, "imap": 143, "pop3": 110, "ftp": 21, "ldap": 389, "xmpp": 5222,
            "postgres": 5432, "mysql": 3306}
HOST_NAME = re.compile(r"(?=.{1,253}\Z)%s(?:\.%s)*\Z" % (
    (r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?",) * 2))
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!\Z)|\Z)){4}(?<!\.)\Z")

Options = collections.namedtuple("Options", (
    "sources sni domains ca_file deploy_hooks served_at when warn critical timeout enabled"))

# Times are seconds since 1970 or None; fingerprints and hooks are tuples of words.
State = collections.namedtuple("State", (
    "result reason detail since runs good source upstream_not_after way owed_version owed unserved "
    "retired rolled_back key told told_at"))
NO_STATE = State(None, None, "", None, 0, None, None, None, "", 0, (), False, (), (), "", "", None)


def plain(text, limit=300):
    """Return `text` from anywhere as printable ASCII on one line, at most `limit` characters."""
    text = str(text).encode("ascii", "backslashreplace").decode("ascii")
    text = re.sub("[^ -~]", lambda match: "\\x%02x" % ord(match.group()), text)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def is_address(host):
    """Say whether `host` is an IP address as host_name() returns it."""
    return ":" in host or bool(_IPV4.match(host))


def host_name(text):
    """Return a host name in lower-case ASCII or an IP address in its short form; or ValueError."""
    text = text.lower()
    if ":" in text:
        import ipaddress  # 3 ms
        return ipaddress.IPv6Address(text).compressed
    if max(text, default="") > "\x7f":
        text = text.encode("idna").decode("ascii")
    text = text[:-1] if text.endswith(".") else text
    if not HOST_NAME.match(text) or text.replace(".", "").isdigit() and not _IPV4.match(text):
        raise ValueError("%s is no host name and no address" % plain(text, 80))
    return text


def parse_endpoint(text, port):
    """Return (host, port) of HOST, HOST:PORT, [V6]:PORT or a bare V6 address; or ValueError."""
    match = re.match(r"\[(.*:.*)\](?::(\d{1,5}))?\Z", text) or (
        re.match(r"(.*:.*:.*)()\Z", text) or re.match(r"([^:]*)(?::(\d{1,5}))?\Z", text))
    if not match or match.group(2) and not 0 < int(match.group(2)) < 65536:
        raise ValueError("%s: write HOST, HOST:PORT or [ADDRESS]:PORT" % plain(text, 80))
    return host_name(match.group(1)), int(match.group(2) or port)


def endpoint_text(host, port):
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def parse_source(text):
    """Return the Source that `text` names; or ValueError with what is wrong."""
    scheme, separator, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    if text.startswith(("file:", "exec:")):
        kind, _, target = text.partition(":")
        if target.strip():
            return Source(kind, "", 0, target, text)
    elif not separator:
        host, port = parse_endpoint(text, 443)
        return Source("tls", host, port, "", endpoint_text(host, port))
    elif scheme == "vault" and re.match(r"(?!.*\.\.)[\w.@=+-]+(/[\w.@=+-]+)+\Z", path, re.ASCII):
        return Source("vault", *parse_endpoint(host, 8200), target=path, text=text)
    elif scheme == "azure" and re.match(r"[A-Za-z0-9-]{1,127}\Z", path):
        host = host if "." in host else host + ".vault.azure.net"
        return Source("azure", *parse_endpoint(host, 443), target=path, text=text)
    elif scheme in STARTTLS and not slash:
        host, port = parse_endpoint(rest, STARTTLS[scheme])
        return Source(scheme, host, port, "", "%s://%s" % (scheme, endpoint_text(host, port)))
    raise ValueError("%s: write HOST[:PORT], file:PATH, exec:COMMAND, vault://HOST/MOUNT/PATH, "
                     "azure://VAULT/NAME, or one of %s with ://HOST[:PORT]" % (
                         plain(text, 80), " ".join(sorted(STARTTLS))))


def _parse_domain(text):
    """Return a domain that a certificate must cover, `*.` allowed; or ValueError."""
    return "*." + host_name(text[2:]) if text.startswith("*.") else host_name(text)


def _parse_served(text):
    """Return the Source of a local service: one with a host, and no store; or ValueError."""
    source = parse_source(text)
    if source.may_hold_key:
        raise ValueError("%s: write [PROTOCOL://]HOST:PORT" % plain(text, 80))
    return source


def _pattern(pattern, convert, words):
    """Return a parser of what matches a pattern; its ValueError says to write `words`."""
    def parse(text):
        if not re.match(pattern + r"\Z", text):
            raise ValueError("%s: write %s" % (plain(text, 40), words))
        return convert(text)
    return parse


_line = _pattern("[^\0\r\n]+", str, "one line")
_share = _pattern(r"(100|\d{1,2})(\.\d+)?%|\d{1,4}(\.\d+)?d", lambda text: (
    text[-1], float(text[:-1])), "a share of the lifetime such as 25%, or days such as 10d")

# Each option that is remembered: how one value is read, what holds without it, may it repeat.
REMEMBERED = collections.OrderedDict((
    ("from", (parse_source, (), True)),
    ("sni", (host_name, None, False)),
    ("domain", (_parse_domain, (), True)),
    ("ca-file", (_line, None, False)),
    ("deploy-hook", (_line, (), True)),
    ("served-at", (_parse_served, (), True)),
    ("when", (_pattern("always|due", str, "always or due"), "always", False)),
    ("warn", (_share, ("%", 25.0), False)),
    ("critical", (_share, ("%", 10.0), False)),
    ("timeout", (_pattern(r"(?!0+(\.0+)?\Z)\d{1,4}(\.\d+)?", float, "seconds"), 20.0, False)),
    ("enabled", (_pattern("yes|no", str, "yes or no"), "yes", False)),
))


NO_OPTIONS = Options(*[default for _, default, _ in REMEMBERED.values()])
_FIELDS = dict(zip(REMEMBERED, Options._fields))


def parse_options(given):
    """Return the Options that {key: [text, ...]} gives; or ValueError(key, what is wrong)."""
    values = {}
    for key, texts in given.items():
        parse, _, repeats = REMEMBERED[key]
        try:
            if len(texts) > 1 and not repeats:
                raise ValueError("it takes one value")
            parsed = tuple(parse(text) for text in texts)
        except ValueError as error:
            raise ValueError(key, plain(error))
        if parsed:
            values[_FIELDS[key]] = parsed if repeats else parsed[0]
    return NO_OPTIONS._replace(**values)


def merge_options(given, changes):
    """Return remembered options with the changes: an empty value forgets what was remembered."""
    merged = dict(given, **changes)
    merged = {key: [text for text in texts if text] for key, texts in merged.items()}
    return {key: texts for key, texts in merged.items() if texts}


_PARSERS = []  # one serves all files of a run: making one costs more than reading a record with it


def _read_sections(text, path, shift=0):
    """Return {section: {key: [line, ...]}} of INI text; Failure with file and line where it is bad.

    `shift` lines were put before what is in the file.
    """
    import configparser  # 2 ms
    if not _PARSERS:
        _PARSERS.append(configparser.RawConfigParser(
            delimiters=("=",), comment_prefixes=("#",), default_section="\0"))
    parser = _PARSERS[0]
    parser.clear()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or (getattr(error, "errors", None) or [(1, "")])[0][0]
        what = "given twice" if "Duplicate" in type(error).__name__ else "not a KEY = VALUE line"
        raise Failure(None, "%s line %d: %s" % (path, line - shift, what), "correct it by hand")
    return {section: {key: [line.strip() for line in value.split("\n") if line.strip()]
                      for key, value in parser.items(section)} for section in parser.sections()}


def parse_conf(text, path):
    """Return ({key: [text, ...]}, Options) of a NAME.conf; Failure with file and line if wrong."""
    sections = _read_sections("[lineage]\n" + text, path, 1)
    given = {key: texts for key, texts in sections.pop("lineage", {}).items() if texts}
    wrong = [("[" + section, "a conf has no sections") for section in sections]
    wrong += [(key, "unknown key %s (known: %s)" % (plain(key, 40), " ".join(REMEMBERED)))
              for key in given if key not in REMEMBERED]
    try:
        if not wrong:
            return given, parse_options(given)
    except ValueError as error:
        wrong = [(error.args[0], "%s: %s" % error.args)]
    key, what = wrong[0]
    lines = [number for number, line in enumerate(text.splitlines(), 1)
             if line.partition("=")[0].rstrip().lower().startswith(key.lower())]
    raise Failure(None, "%s line %d: %s" % (path, (lines or [1])[0], what), "correct it by hand")


def edit_conf(text, before, after):
    """Return the text of a NAME.conf with the options of `after`: comments and order are kept."""
    kept, dropping = [], False
    changed = [key for key in REMEMBERED if before.get(key) != after.get(key)]
    for line in text.splitlines():
        if line[:1] not in ("", " ", "\t", "#"):
            dropping = line.partition("=")[0].strip().lower() in changed
        if not dropping or line.lstrip().startswith("#"):
            kept.append(line)
    for key in changed:
        texts = after.get(key, [])
        kept += ["%s = %s" % (key, texts[0])] if len(texts) == 1 else (
            texts and ["%s =" % key] + ["    " + text for text in texts])
    return "".join(line + "\n" for line in kept)


def iso_time(seconds):
    """Return a time as ISO 8601 in UTC, or None for None."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def utc_seconds(year, month, day, hour, minute, second):
    """Return seconds since 1970 of a UTC date; ValueError for one that does not exist."""
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not (1 <= month <= 12 and 1 <= day <= lengths[month - 1]
            and hour < 24 and minute < 60 and second < 60):
        raise ValueError("no such date")
    past = year - 1
    days = past * 365 + past // 4 - past // 100 + past // 400 - 719163 + sum(lengths[:month - 1])
    return (days + day) * DAY + hour * 3600 + minute * 60 + second


_STORED = {  # how a field of the state is read from its lines, where it is no plain word
    tuple: tuple, int: lambda lines: int(lines[0]), bool: lambda lines: lines[0] == "yes",
    "time": lambda lines: utc_seconds(*map(int, re.match(
        r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z\Z", lines[0]).groups()))}


def _kind_of(field):
    """Return (key in the file, (field, how it is stored)) of a field of the state."""
    times = ("since", "good", "upstream_not_after", "told_at")
    return field.replace("_", "-"), (
        field, "time" if field in times else type(getattr(NO_STATE, field)))


_KINDS = collections.OrderedDict(_kind_of(field) for field in State._fields)


def parse_state(text, path):
    """Return the State of a NAME.state; Failure where it is damaged."""
    values = {}
    for key, lines in _read_sections(text, path).get("state", {}).items():
        field, kind = _KINDS.get(key, (None, None))
        try:
            if field and lines:
                values[field] = _STORED[kind](lines) if kind in _STORED else lines[0]
        except (ValueError, AttributeError):
            raise Failure(None, "%s: %s cannot be read" % (path, key), "remove it")
    return NO_STATE._replace(**values)


def format_state(state):
    """Return a State as INI text; what does not apply is left out."""
    text = "# what certferry saw last; its time of change is the time of the last check\n[state]\n"
    for value, (key, (_, kind)) in zip(state, _KINDS.items()):
        if value:
            text += "%s = %s\n" % (key, iso_time(value) if kind == "time" else "yes" if (
                value is True) else "\n    ".join(("",) + value) if kind is tuple else value)
    return text


def parse_environment(text, path):
    """Return {KEY: VALUE} of the environment file; Failure with file and line where it is bad."""
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*([A-Za-z_]\w*)=(['\"]?)([^\0]*?)\2\s*\Z", line)
        if match:
            values[match.group(1)] = match.group(3)
        elif line.strip() and not line.lstrip().startswith("#"):
            raise Failure(None, "%s line %d: not a KEY=VALUE line" % (path, number),
                          "correct it by hand")
    return values
# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------

# Object identifiers as DER has them: extensions are 2.5.29.N, the others 1.3.6.1.5.5.7.N.
_SUBJECT_KEY, _KEY_USAGE, _ALTERNATIVE_NAME, _BASIC_CONSTRAINTS = (
    b"\x55\x1d%c" % number for number in (14, 15, 17, 19))
_NAME_CONSTRAINTS, _AUTHORITY_KEY, _EXTENDED_USAGE, *_POLICY_CONSTRAINTS = (
    b"\x55\x1d%c" % number for number in (30, 35, 37, 36, 54))
_MUST_STAPLE = b"\x2b\x06\x01\x05\x05\x07\x01\x18"
_SERVER_AUTH = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01"

_KEY_KINDS = {  # the AlgorithmIdentifiers of keys that browsers take (RFC 3279, 5480, 8410)
    "300d06092a864886f70d0101010500": "RSA",
    "301306072a8648ce3d020106082a8648ce3d030107": "ECDSA P-256",
    "301006072a8648ce3d020106052b81040022": "ECDSA P-384",
    "301006072a8648ce3d020106052b81040023": "ECDSA P-521",
    "300506032b6570": "Ed25519", "300506032b6571": "Ed448"}

_SIGNATURES = (  # and of signatures: with SHA-256, 384 or 512
    "30..(06092a864886f70d01010[bcd](0500)?"  # RSA (RFC 4055: the NULL may be missing)
    "|06092a864886f70d01010a30..a0..30..060960864801650304020[123].*"  # RSA-PSS
    r"|06082a8648ce3d04030[234]|06032b657[01])\Z")  # ECDSA, Ed25519 and Ed448


def _elements(data):
    """Return [(tag, content, whole)] of the DER elements that the bytes are; ValueError else."""
    found, at = [], 0
    while at < len(data):
        start = at + 2
        if start > len(data) or data[at] & 0x1f == 0x1f:
            raise ValueError("an element that is cut off, or a tag of several bytes")
        length = data[at + 1]
        if length & 0x80:
            size = length & 0x7f
            length = int.from_bytes(data[start:start + size], "big")
            start += size
            if not 1 <= size <= 3 or length < 0x80 or length >> 8 * (size - 1) == 0:
                raise ValueError("a length that is not the shortest, or over 16 MiB")
        if start + length > len(data):
            raise ValueError("an element longer than what holds it")
        found.append((data[at], data[start:start + length], data[at:start + length]))
        at = start + length
    return found


def _expect(data, *tags):
    """Return the elements where they have exactly these tags; else ValueError."""
    found = _elements(data)
    if tuple(tag for tag, _, _ in found) != tags:
        raise ValueError("other elements than X.509 has there")
    return found


def _is_loose(tag, content):
    """Say whether DER has another form for a primitive value, or no such tag."""
    if tag in (0x02, 0x0a):  # an integer, an enumerated: the shortest
        return not content or len(content) > 1 and content[0] in (0, 0xff) and (
            content[0] ^ content[1] < 0x80)
    if tag == 0x03:  # a bit string: what is unused is zero
        return not content or content[0] > 7 or content[-1] & (1 << content[0]) - 1
    if tag == 0x06:
        return not content or content[-1] & 0x80
    return {0x01: content not in (b"\0", b"\xff"), 0x05: content}.get(tag, tag in (0, 0x10, 0x11))


def check_strict(data, depth=0):
    """Raise ValueError unless the bytes are strict DER all the way down (X.690, clauses 8 to 11).

    That includes the values of the extensions that RFC 5280 defines.
    """
    defined = False
    for tag, content, _ in _elements(data):
        if tag & 0x20 and tag & 0xc0 == 0 and tag not in (0x30, 0x31):
            raise ValueError("a string in pieces")
        if tag & 0x20 or tag == 0x04 and defined:
            if depth >= MAX_DEPTH:
                raise ValueError("nested too deeply")
            check_strict(content, depth + 1)
        elif _is_loose(tag, content):
            raise ValueError("a value of tag %d that is not in its one form" % tag)
        if tag == 0x06:  # 2.5.29 and 1.3.6.1.5.5.7.1: to DER their values are but bytes
            defined = content.startswith((_KEY_USAGE[:2], _MUST_STAPLE[:-1]))


def _der_time(tag, content):
    """Return the seconds of a UTCTime or GeneralizedTime as RFC 5280, 4.1.2.5 wants them."""
    text = content.decode("ascii")
    if not re.match(r"\d+Z\Z", text) or (tag, len(text)) not in ((0x17, 13), (0x18, 15)):
        raise ValueError("a time that RFC 5280 does not allow")
    if tag == 0x17:
        text = ("20" if text < "50" else "19") + text
    return utc_seconds(int(text[:4]), *[int(text[at:at + 2]) for at in range(4, 14, 2)])


def _extensions(data):
    """Return {OID bytes: (critical, value bytes)} of the Extensions in some DER."""
    found = {}
    for tag, content, _ in _elements(_expect(data, 0x30)[0][1]):
        (first, oid, _), *flag, (last, value, _) = _elements(content)
        if (tag, first, last) != (0x30, 0x06, 0x04) or [part[0] for part in flag] not in ([], [1]):
            raise ValueError("an extension of another shape")
        if oid in found:
            raise ValueError("an extension given twice")
        found[oid] = bool(flag) and flag[0][1] != b"\0", value
    return found


def _domains(value):
    """Return the names of a subject alternative name that can count, in its order.

    A name with NUL or outside the host names' alphabet, an address as a DNS name, and a wildcard
    that is not one whole leftmost label above a registrable name (RFC 9525, 6.3) are left out.
    """
    names = []
    for tag, content, _ in _elements(_expect(value, 0x30)[0][1]):
        if tag == 0x82:
            name = content.decode("latin-1").lower()  # NUL too is for HOST_NAME to judge
            bare = name[2:] if name.startswith("*.") else name
            if HOST_NAME.match(bare) and not bare.replace(".", "").isdigit() and (
                    bare is name or "." in bare):
                names.append(name)
        elif tag == 0x87 and len(content) in (4, 16):
            import ipaddress  # 3 ms
            names.append(str(ipaddress.ip_address(content)))
    return tuple(names)


def parse_certificate(der):
    """Return the Certificate that the DER bytes hold; ValueError where they hold none."""
    body, algorithm, _ = _expect(_expect(der, 0x30)[0][1], 0x30, 0x30, 0x03)
    fields, number = _elements(body[1]), b"\0"  # version 1 is not written
    if fields and fields[0][0] == 0xa0:
        (_, number, _), = _expect(fields.pop(0)[1], 0x02)
    if [tag for tag, _, _ in fields[:6]] != [0x02] + [0x30] * 5 or len(number) != 1:
        raise ValueError("other elements than X.509 has there")
    serial, _, issuer, validity, subject, key = fields[:6]
    not_before, not_after = [_der_time(*time[:2]) for time in _elements(validity[1])]
    held = [content for tag, content, _ in fields[6:] if tag == 0xa3]
    extensions = _extensions(held[0]) if held else {}
    names = _domains(extensions[_ALTERNATIVE_NAME][1]) if _ALTERNATIVE_NAME in extensions else ()
    return Certificate(der, serial[1].hex(), not_before, not_after, subject[2], issuer[2], key[2],
                       algorithm[2], number[0] + 1, extensions, names)


def fingerprint(der):
    """Return the SHA-256 of some DER as hexadecimal digits."""
    import hashlib  # loads libcrypto, 3 ms
    return hashlib.sha256(der).hexdigest()


def covers(names, wanted):
    """Say whether one of a certificate's names covers `wanted`, itself maybe a wildcard.

    A wildcard stands for exactly one label (RFC 9525, 6.3) and never for part of an address.
    """
    label, dot, rest = wanted.partition(".")
    return wanted in names or bool(dot) and label != "*" and not is_address(wanted) and (
        "*." + rest in names)


def attribute(name, which):
    """Return an attribute of a distinguished name (DER bytes) as text to show, "" without it."""
    kind = {"common name": b"\x06\x03\x55\x04\x03", "organization": b"\x06\x03\x55\x04\x0a"}[which]
    value = name.partition(kind)[2]
    return value[2:2 + value[1]].decode("utf-8", "replace") if value[2:] else ""


def key_kind(public_key):
    """Return what a person calls a SubjectPublicKeyInfo: `RSA 2048`, `ECDSA P-256`, `Ed25519`."""
    try:
        (_, _, algorithm), (_, bits, _) = _expect(_expect(public_key, 0x30)[0][1], 0x30, 0x03)
        kind = _KEY_KINDS.get(algorithm.hex(), "another kind")
        if kind == "RSA":
            modulus, _ = _expect(_expect(bits[1:], 0x30)[0][1], 0x02, 0x02)
            return "RSA %d" % int.from_bytes(modulus[1], "big").bit_length()
    except ValueError:
        return "an unreadable key"
    return "ECDSA on another curve" if "2a8648ce3d0201" in algorithm.hex() and (
        kind == "another kind") else kind


def _value(certificate, oid):
    """Return the value of a certificate's extension, empty where it has none."""
    return certificate.extensions.get(oid, (False, b""))[1]


def _is_critical(certificate, oid, without=False):
    """Say whether a certificate's extension is critical, or what holds without the extension."""
    return certificate.extensions.get(oid, (without,))[0]


def flaw(certificate, is_leaf):
    """Return why browsers would refuse a leaf or an issuer whatever its root, or "".

    openssl accepts all of these: the CA/Browser Forum's baseline requirements and RFC 5280 do not.
    """
    extensions, serial, version = certificate.extensions, certificate.serial, certificate.version
    key, limits = key_kind(certificate.public_key), _value(certificate, _BASIC_CONSTRAINTS)
    kind, _, bits = key.partition(" ")
    usage = _value(certificate, _KEY_USAGE)[3:4]
    signs = bool(usage) and usage[0] & 4  # keyCertSign is bit 5 (RFC 5280, 4.2.1.3)
    authority = limits[2:5] == b"\x01\x01\xff"
    rules = (
        (version != 3, "is X.509 version %d, not 3" % version),
        (len(serial) > 40 or serial[:1] > "7" or not serial.strip("0"),
         "has a serial number that is not a positive one of at most 20 bytes"),
        # a modulus of other than whole bytes: baseline requirements, 6.1.6
        (int(bits) < 2048 or int(bits) % 8 if kind == "RSA" else key not in _KEY_KINDS.values(),
         "has a key that browsers refuse (%s)" % key),
        (not re.match(_SIGNATURES, certificate.algorithm.hex()),
         "is signed with an algorithm that browsers refuse (SHA-1, MD5 or an unusual one)"),
        (len(certificate.issuer) <= 2, "names no issuer"),
        (_is_critical(certificate, _SUBJECT_KEY), "has a critical subject key identifier"),
        (_is_critical(certificate, _AUTHORITY_KEY), "has a critical authority key identifier"),
        (_EXTENDED_USAGE in extensions and _SERVER_AUTH not in _value(certificate, _EXTENDED_USAGE),
         "is not meant for servers (its extended key usage lacks serverAuth)"))
    # what openssl checks by itself (purpose, path length, name constraints) is left to it
    rules += (
        (authority, "is an authority's certificate, not a server's"),
        (signs, "may sign certificates (its key usage), and is no authority's"),
        (limits[2:] not in (b"", b"\x01\x01\0"), "limits a path, and is no authority's"),
        (_NAME_CONSTRAINTS in extensions, "has name constraints, and is no authority's"),
        (len(certificate.subject) <= 2 and not _is_critical(certificate, _ALTERNATIVE_NAME, True),
         "has no subject, and its subject alternative name is not critical")) if is_leaf else (
        (not authority, "is no authority's"),
        (usage and not signs, "may not sign certificates (its key usage)"),
        (not all(_is_critical(certificate, oid, True) for oid in _POLICY_CONSTRAINTS),
         "has policy constraints that are not critical"))
    return next((words for broken, words in rules if broken), "")


def must_staple(certificate):
    """Say whether a leaf asks that its server staples an OCSP answer (RFC 7633)."""
    return _MUST_STAPLE in certificate.extensions


def _may_have_issued(issuer, certificate):
    """Say whether names and key identifiers allow that: openssl goes by the same."""
    wanted, own = _value(certificate, _AUTHORITY_KEY), _value(issuer, _SUBJECT_KEY)[2:]
    return issuer.subject == certificate.issuer and (
        not own or wanted[2:3] != b"\x80" or own in wanted)


def order_chains(leaf, others, limit=8):
    """Return the possible chains for a leaf: issuers in order, no root, nothing that is not one.

    Nothing is verified: openssl says which of them holds. The limit is for issuers that were
    certified again and again, by each other maybe.
    """
    chains, unfinished = [], [()]
    # a root issued itself; what another key of the same name issued (a rollover) is none
    issuers = [other for other in others if other != leaf and not _may_have_issued(other, other)]
    while unfinished and len(chains) < limit:
        chain = unfinished.pop()
        longer = [chain + (issuer,) for issuer in reversed(issuers) if issuer not in chain
                  and _may_have_issued(issuer, ((leaf,) + chain)[-1])]
        unfinished += longer
        chains += [] if longer else [chain]
    return chains


def to_pem(ders):
    """Return certificates (DER) as PEM bytes with lines of 64 characters (RFC 7468)."""
    # 48 bytes make such a line
    return b"".join(b"-----BEGIN CERTIFICATE-----\n%s-----END CERTIFICATE-----\n" % b"".join(
        binascii.b2a_base64(der[at:at + 48]) for at in range(0, len(der), 48)) for der in ders)


def pem_blocks(data):
    """Return [(label, content, whole block)] of PEM text, in linear time whatever it is."""
    blocks = []
    # cut at every BEGIN, so that none without its END makes the rest be searched again and again
    for piece in data.split(b"-----BEGIN ")[1:]:
        label, _, rest = piece.partition(b"-----")
        content, end, _ = rest.partition(b"-----END %s-----" % label[:60])
        if end:
            blocks.append((label, content, b"-----BEGIN %s-----%s%s" % (label, content, end)))
    return blocks


def read_pem(data):
    """Return (certificates as DER, private key as Secret or None) of PEM text or one DER file.

    Text around the blocks, CRLF, any order and other blocks are allowed. A certificate that is
    given twice counts once. ValueError with what is wrong.
    """
    if data[:1] == b"\x30" and b"-----BEGIN " not in data:
        return [data], None
    certificates, keys, count = [], set(), 0
    for label, content, block in pem_blocks(data):
        if label in (b"CERTIFICATE", b"X509 CERTIFICATE"):
            count += 1
            content = b"".join(content.split())
            try:
                der = binascii.a2b_base64(content)
            except binascii.Error:
                der = b""
            # a2b_base64 skips what is no base64: its way back tells
            if not der or binascii.b2a_base64(der, newline=False) != content:
                raise ValueError("a certificate whose base64 is broken")
            if der not in certificates:
                certificates.append(der)
            if count > MAX_CERTIFICATES:
                raise ValueError("more than %d certificates" % MAX_CERTIFICATES)
        elif label.endswith(b"PRIVATE KEY"):
            keys.add(block.replace(b"\r\n", b"\n") + b"\n")
    if len(keys) > 1:
        raise ValueError("more than one private key")
    return certificates, Secret(keys.pop()) if keys else None


def holds_only_certificates(data):
    """Say whether PEM text is certificates and nothing else, not even around them."""
    for label, _, block in pem_blocks(data):
        data = data.replace(block, b"") if label == b"CERTIFICATE" else data
    return not data.strip()


# --------------------------------------------------------------------------------------------------
# OpenSSL
# --------------------------------------------------------------------------------------------------


def _nobody():
    """Return (uid, gid) of the user that owns nothing."""
    import pwd
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        return 65534, 65534
    return entry.pw_uid or 65534, entry.pw_gid or 65534


def confine(verifier=False):
    """Give up root's privileges for good and bound what this process can use; OSError if one stays.

    A verifier has a group of its own: a process can trace another one of its user and group, and
    what talks to the network must not be able to forge what the verifiers say.
    """
    try:
        import resource
        limits = ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS,
                  1 << 30), (resource.RLIMIT_NOFILE, 1024), (resource.RLIMIT_CPU, 600))
    except ImportError:
        limits = ()  # Debian 11's python3-minimal; the bounds are a second line of defence
    # no core with a secret in it, no file; under 512 MiB of address space threads cannot start;
    # RLIMIT_NPROC would count all of nobody's processes
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        most = hard if 0 <= hard < most else most  # infinity is -1 on Linux
        resource.setrlimit(kind, (most, most))
    if os.geteuid() != 0:
        return
    user, group = _nobody()
    if verifier:
        group = 65533 if group != 65533 else 65532
    os.setgroups([])
    os.setgid(group)  # root's change the saved ids too
    os.setuid(user)
    try:
        os.setuid(0)
    except OSError:
        return
    raise OSError(errno.EPERM, "could not give up root's privilege")


def _load_before_confined():
    """Import what a process of nobody's may need where Python's own folder is closed to nobody."""
    folder = os.path.dirname(os.__file__)
    while folder != "/" and os.stat(folder).st_mode & 0o005 == 0o005:
        folder = os.path.dirname(folder)
    if folder != "/" and os.geteuid() == 0:
        for module in ("calendar", "encodings.idna", "ipaddress", "json", "ssl", "subprocess",
                       "threading", "urllib.parse", "http.client"):
            try:
                __import__(module)
            except ImportError:
                pass  # python3-minimal lacks some, and who needs them says so


def own_process(serve, unprivileged):
    """Fork a process that runs serve(read descriptor, write descriptor) and ends; return
    (pid, descriptor to write to it, descriptor to read from it).

    It holds no other descriptor, has nothing on its standard ones and is nobody if it should be;
    where it can't become nobody it writes one line that says so. Called while single-threaded.
    """
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(to_read)
        os.close(from_write)
        return pid, to_write, from_read
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        jobs = max(to_read, from_write, 2) + 1  # above both, so that neither is overwritten
        os.dup2(to_read, jobs, False)
        os.dup2(from_write, jobs + 1, False)
        for descriptor in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        inherited = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []
        # locks, listening sockets, a shell's files: nothing for what talks to the network
        os.closerange(3, jobs)
        os.closerange(jobs + 2, max([4096] + [int(name) + 1 for name in inherited]))
        if unprivileged:
            _load_before_confined()
            confine()
        serve(jobs, jobs + 1)
    except OSError as error:
        os.write(jobs + 1, b"! %s\n" % plain(error).encode("ascii"))
    finally:
        os._exit(0)


def kill_group(process):
    """Kill a process that leads a session of its own, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()


def converse(process, feeds, deadline, limit):
    """Write {descriptor: bytes} to a process and return (its output, its errors), both bounded.

    TimeoutError when the deadline (monotonic seconds) passes, ValueError over the limit; the
    process is killed then. Ends when both pipes end.
    """
    outputs = [bytearray(), bytearray()]
    reading = dict(zip((process.stdout.fileno(), process.stderr.fileno()), outputs))
    feeds = {descriptor: memoryview(data) for descriptor, data in feeds.items()}
    try:
        while reading:
            left = deadline - time.monotonic()
            readable, writable, _ = select.select(reading, feeds, [], max(0, left))
            if left < 0 or not readable and not writable:
                raise TimeoutError("it took too long")
            for descriptor in writable:
                try:  # so much fits into a pipe that select calls writable
                    written = os.write(descriptor, feeds[descriptor][:select.PIPE_BUF])
                    feeds[descriptor] = feeds[descriptor][written:]
                except OSError:
                    feeds[descriptor] = b""  # it reads no further: its status tells
                if not feeds[descriptor]:
                    del feeds[descriptor]
                    os.close(descriptor)
            for descriptor in readable:
                piece = os.read(descriptor, 65536)
                reading[descriptor].extend(piece)
                if len(reading[descriptor]) > limit:
                    raise ValueError("more than %d bytes" % limit)
                if not piece:
                    del reading[descriptor]
        return tuple(bytes(output) for output in outputs)
    finally:
        for descriptor in feeds:
            os.close(descriptor)
        if reading:
            kill_group(process)
        process.stdout.close()
        process.stderr.close()


def _environment(system_roots):
    """Return the environment of an openssl process: nothing of ours but the trust store, if any."""
    # -CAfile alone adds to the system's roots: with these it replaces them
    own = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": "/nonexistent"}
    if system_roots:
        own = {name: os.environ[name] for name in own if name in os.environ}
    return dict(own, PATH=os.environ.get("PATH") or SAFE_PATH, LC_ALL="C")


def run_openssl(arguments, data=b"", files=(), deadline=None, system_roots=False, trusted=False):
    """Run the openssl command and return (exit status, output, its words on standard error).

    `data` goes to its standard input, each of `files` (option, bytes) to a pipe that the option
    names. It runs unprivileged unless its input is `trusted`, in an environment of our own; without
    `system_roots` it sees no trust store. Failure where it cannot be run; TimeoutError and
    ValueError as converse() has them are for who gave a deadline, others get them as words.
    """
    import subprocess  # 4 ms
    confined = os.geteuid() == 0 and not trusted
    reads, writes = zip(*[os.pipe() for _ in range(1 + len(files))])
    feeds = dict(zip(writes, [data] + [content for _, content in files]))
    command = ["openssl"] + arguments
    for (option, _), read in zip(files, reads[1:]):
        command += [option, "/dev/fd/%d" % read]
        if confined:
            os.fchown(read, _nobody()[0], -1)  # a pipe of root's is closed to nobody
    try:
        # cwd: ours may be closed to nobody; a session: to be killed with whatever it starts
        process = subprocess.Popen(
            command, stdin=reads[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
            env=_environment(system_roots), pass_fds=reads[1:], start_new_session=True,
            preexec_fn=(lambda: confine(verifier=True)) if confined else None)
    except (OSError, subprocess.SubprocessError) as error:
        reads += writes
        raise Failure(None, "there is no openssl command here that runs (%s)" % plain(
            getattr(error, "strerror", None) or error, 80), "install the package openssl")
    finally:
        for read in reads:
            os.close(read)
    try:
        output, errors = converse(
            process, feeds, deadline or time.monotonic() + OPENSSL_SECONDS, 2 * MAX_OFFER)
    except (TimeoutError, ValueError) as error:
        if deadline:
            raise
        output, errors = b"", str(error).encode("ascii")
    return process.wait(), output, errors.decode("ascii", "replace")


def _public_key(pem):
    """Return the DER of a PUBLIC KEY that openssl printed, or None where it printed none."""
    return next((binascii.a2b_base64(content) for label, content, _ in pem_blocks(pem)
                 if label == b"PUBLIC KEY"), None)


def leaf_public_key(leaf):
    """Return the public key (DER) of a certificate (DER) as openssl prints it, or None."""
    return _public_key(run_openssl(["x509", "-pubkey", "-noout"], to_pem([leaf]))[1])


def public_half(pem, trusted):
    """Return the public key (DER) of a private key (PEM bytes); ValueError with why not, in words.

    `trusted` for a key of this host; a key that came with an offer is read unprivileged.
    """
    if b"ENCRYPTED" in pem:
        raise ValueError("is encrypted: certferry asks no passphrase, nor do servers at boot")
    if b"PRIVATE KEY-----" not in pem:
        raise ValueError("holds no private key in PEM form")
    # -passin, so that nothing ever prompts
    status, output, errors = run_openssl(["pkey", "-pubout", "-passin", "pass:"], pem,
                                         trusted=trusted)
    public_key = _public_key(output) if status == 0 else None
    if public_key is None:
        raise ValueError("is a private key that openssl cannot read: %s" % (
            "it is cut off or damaged" if status >= 0 else plain(errors or "it crashed", 80)))
    return public_key


def _trust_store_missing():
    """Say whether openssl's own folder of trusted roots is empty or not there."""
    output = run_openssl(["version", "-d"])[1].decode("ascii", "replace")
    folder = (re.findall(r'"(.+)"', output) or ["/nonexistent"])[0]
    paths = [os.environ.get("SSL_CERT_FILE", folder + "/cert.pem"),
             os.environ.get("SSL_CERT_DIR", folder + "/certs")]
    return not any(os.path.isfile(path) or os.path.isdir(path) and os.listdir(path)
                   for path in paths)


_VERIFY_WORDS = {  # by openssl's X509_V_ERR; 24 before OpenSSL 3 is 79 since
    7: "has a broken signature", 9: "is not yet valid", 10: "has expired", 24: "is no authority's",
    25: "breaks a path length", 26: "is not meant for servers",
    34: "has a critical extension that nobody knows", 47: "is outside its name constraints",
    48: "is inside excluded name constraints", 66: "has a key that is too small",
    67: "has an issuer key that is too small", 68: "is signed with a weak digest",
    79: "is no valid authority's certificate"}


def _trust_words(number, depth, text, has_chain, roots):
    """Return what an error of `openssl verify` means, and what to do about it."""
    if number not in (2, 18, 19, 20, 21, 27):
        who = "issuer %d of the chain" % depth if depth else "the leaf"
        return "%s %s" % (who, _VERIFY_WORDS.get(number, "fails openssl's check: " + text))
    if roots is None and _trust_store_missing():
        return "this host has no trusted roots: install the package ca-certificates"
    if number == 18:
        return "it is self-signed, and not among the trusted roots: --ca-file if it should be"
    if roots is not None and not any(root.subject == root.issuer for root in roots):
        return "the --ca-file holds no self-signed root: give the root, not an intermediate"
    if depth == 0 and not has_chain and number in (20, 21):
        return ("its issuer did not come with it and is no trusted root: serve fullchain.pem "
                "there, or --ca-file for a private authority")
    return "its chain leads to no trusted root (%s): --ca-file for a private authority" % (
        "the --ca-file given is another authority's" if roots else "system store")


def verify_chain(leaf, chain, roots, roots_pem, now):
    """Return "" where leaf and chain lead to a trusted root at the time `now`, else why not.

    `roots` (Certificates, with their PEM bytes) replace the system store; None means the system's.
    """
    files = [] if roots is None else [("-CAfile", roots_pem)]
    files += [("-untrusted", to_pem(issuer.der for issuer in chain))] if chain else []
    # not -x509_strict: it refuses roots that everybody has
    for level in (["-auth_level", "2"], []):
        status, output, errors = run_openssl(
            ["verify", "-purpose", "sslserver", "-attime", "%d" % now] + level,
            to_pem([leaf.der]), files, system_roots=roots is None)
        if "auth_level" not in errors:  # LibreSSL has no such option: our own rules cover it
            break
    if status == 0:
        return ""
    match = re.search(r"error (\d+) at (\d+) depth lookup: ?([^\r\n]*)",
                      errors + output.decode("ascii", "replace"))
    if not match:
        return "openssl cannot verify it: %s" % plain(errors.strip().split("\n")[-1], 120)
    return _trust_words(int(match.group(1)), int(match.group(2)), plain(match.group(3), 100),
                        bool(chain), roots)


def open_pkcs12(data):
    """Return the PEM bytes inside a PKCS#12 container with an empty password."""
    for legacy in ([], ["-legacy"]):  # OpenSSL 3 keeps RC2 and 3DES containers behind a switch
        status, output, _ = run_openssl(
            ["pkcs12", "-nodes", "-passin", "stdin"] + legacy, b"\n", [("-in", data)])
        if status == 0:
            return output
    raise ValueError("a PKCS#12 container that openssl cannot open without a password")


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------

# What the network process is asked: `known` is a checksum of the leaf in service, so that the chain
# is asked only for another one; `want` the key type to ask for where a server has several, `way`
# how that worked last time; `own` refuses this very machine; `skip` are addresses asked already.
Job = collections.namedtuple("Job", "kind host port sni timeout known want way own skip")

# What it answers: reason "" with certificates (PEM), or a reason and what is wrong.
Answer = collections.namedtuple("Answer", "reason detail hint address way data")

# Where a server has several key types, TLS 1.2 settles with the cipher which one it shows, TLS 1.3
# with the signature algorithms, and these only s_client can tell it.
_TYPES = {"RSA": (":!aECDSA", "rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:RSA+SHA256:RSA+SHA384"),
          "ECDSA": (":!aRSA", "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512"),
          "Ed25519": (":!aRSA", "ed25519")}

# What the kernel, the ssl module or s_client says; the reason, what that means, what to do.
_LOOK, _PORT = "look at what answers there", "check the protocol and the port"
_SIGNS = (
    ("bad signature", "unproven", "showed a certificate and signed with another key", _LOOK),
    ("unrecognized name", "unreachable", "does not serve %(sni)s", "--sni HOST, a name it serves"),
    ("find starttls", "unreachable", "does not offer STARTTLS", _PORT),
    ("wrong version|http request|unknown protocol|packet length too|record layer fail",
     "unreachable", "does not speak TLS", _PORT),
    (r"excessive message|more than \d+ ", "malformed", "showed more than a chain can be", _LOOK),
    ("asn1|x509 lib|public key param", "malformed", "showed what is no certificate", _LOOK),
    ("connection refused", "unreachable", "refuses connections", "is the service running there?"),
    ("timed out", "timeout", "gave no certificate in %(timeout)g s",
     "is it overloaded or behind a firewall? --timeout SECONDS"))


def checksum(der):
    """Return a short number for a leaf, only to save asking for the chain of a known one."""
    return binascii.crc32(der)


def _is_own(family, where):
    """Say whether an address is this machine's: then a packet to it would leave from itself."""
    import socket
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            return probe.getsockname()[0] == where[0] or where[0].startswith("127.")
    except OSError:
        return False


def _resolve(job):
    """Return [(family, socket address)] of the job's host, in the resolver's order."""
    import socket
    try:  # bytes, because text is encoded by a module that takes 4 ms to load
        found = socket.getaddrinfo(job.host.encode("ascii"), job.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Failure("unreachable", "does not resolve (%s)" % error.strerror.lower(),
                      "check the name, and this host's resolver")
    addresses = collections.OrderedDict(((family, where), 1) for family, _, _, _, where in found)
    others = [address for address in addresses if not (job.own and _is_own(*address))]
    if not others:
        raise Failure("unreachable", "is this very machine",
                      "name the server that has the certificate with --from HOST[:PORT]")
    return [other for other in others if other[1][0] not in job.skip.split(",")][:MAX_CERTIFICATES]


def _known_failure(error, job):
    """Return the Failure that an exception or s_client's words are a sign of, or None."""
    # socket.timeout is a TimeoutError from Python 3.10 on
    text = "timed out" if isinstance(error, TimeoutError) else str(error).lower()
    return next((Failure(reason, words % job._asdict(), hint)
                 for sign, reason, words, hint in _SIGNS if re.search(sign, text)), None)


def _show_certificates(job, where, deadline, way):
    """Return (exit status, certificates, error text) of `openssl s_client -showcerts`."""
    arguments = ["s_client", "-connect", endpoint_text(*where[:2]), "-showcerts", "-no_tls1",
                 "-no_tls1_1", "-cipher", CIPHERS + (_TYPES[job.want][0] if way == "1.2" else "")]
    arguments += ["-no_tls1_3"] if way == "1.2" else []
    arguments += ["-sigalgs", _TYPES[job.want][1]] if way == "sigalgs" else []
    arguments += [] if is_address(job.sni) else ["-servername", job.sni]
    arguments += [] if job.kind == "tls" else ["-starttls", job.kind]
    arguments += ["-xmpphost", job.sni] if job.kind == "xmpp" else []
    status, output, errors = run_openssl(arguments, deadline=deadline)
    # only what begins a line: a subject can hold the text of another certificate
    blocks = re.findall(rb"(?m)^-----BEGIN CERTIFICATE-----\n[\w+/=\n]+-----END CERTIFICATE-----$",
                        output)
    return status, read_pem(b"\n".join(blocks))[0], errors


def _by_command(job, where, deadline, way):
    """Return the certificates that s_client alone has seen: its exit status is the proof."""
    status, certificates, errors = _show_certificates(job, where, deadline, way)
    if certificates and status != 0:  # it prints an impostor's too
        raise Failure("unproven", "showed a certificate and did not prove that it holds its key",
                      "an impostor, or it demands a client certificate: use another port or source")
    if not certificates:
        raise _known_failure(errors, job) or Failure("unreachable", "completes no TLS handshake "
                                                     "(TLS 1.2 or later, ephemeral keys)", _PORT)
    return certificates


@functools.lru_cache(maxsize=None)  # a thousand exchanges share it, and no session
def _context(want, way):
    """Return an SSL context: TLS 1.2 or 1.3, ephemeral keys, nothing verified but the proof."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the peer's signature is checked all the same
    for version in ("SSLv3", "TLSv1", "TLSv1_1") + (("TLSv1_3",) if way == "1.2" else ()):
        context.options |= getattr(ssl, "OP_NO_" + version, 0)  # 3.6 may have no TLSv1_3
    # no static RSA: that would be a handshake without a signature
    context.set_ciphers(CIPHERS + (_TYPES[want][0] if way == "1.2" else ""))
    return context


def _handshake(job, connection, deadline, way):
    """Return (leaf that the peer proved to hold the key of, chain or None where Python can't tell);
    OSError where the handshake fails."""
    name = None if is_address(job.sni) else job.sni
    if name and sys.version_info >= (3, 7):
        name = name.encode("ascii")  # as in _resolve
    with _context(job.want, way).wrap_socket(connection, server_hostname=name,
                                             do_handshake_on_connect=False) as peer:
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        peer.do_handshake()
        tells = hasattr(peer, "get_unverified_chain")  # public from Python 3.13 on
        return peer.getpeercert(binary_form=True), peer.get_unverified_chain() if tells else None


def _by_module(job, family, where, deadline, way):
    """Return (certificates, is the whole chain there) of a handshake that the ssl module completed.

    The chain is of the same handshake, or from s_client, and then only with the same leaf.
    """
    import socket
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.connect(where)
        try:
            leaf, chain = _handshake(job, connection, deadline, way)
        except OSError as error:
            failure = _known_failure(error, job)
            if failure:
                raise failure
            # s_client tells a server that has shown a certificate first from one that has not
            return _by_command(job, where, deadline, way), True
    if chain is not None or checksum(leaf) == int(job.known or 0):
        return [leaf] + [der for der in chain or [] if der != leaf], chain is not None
    for _ in range(3):  # a pool, or a rotation between the two handshakes
        certificates = _show_certificates(job, where, deadline, way)[1]
        if certificates[:1] == [leaf]:
            return certificates, True
    raise Failure("unreachable", "showed another certificate at each handshake",
                  "try again, or --from one member of the pool")


def _ask_address(job, family, where, deadline):
    """Return the Answer of one address: in the way that gives a certificate of the wanted type."""
    ways = [job.way or "1.2", "1.2", "sigalgs", ""] if job.want in _TYPES else [""]
    for position, way in enumerate(ways, 1):
        try:
            if job.kind != "tls" or way == "sigalgs":
                certificates, whole = _by_command(job, where, deadline, way), True
            else:
                certificates, whole = _by_module(job, family, where, deadline, way)
            return Answer("", "whole" if whole else "", "", where[0], way, to_pem(certificates))
        except Failure:
            if position == len(ways):
                raise


def _refusal(failure, address=""):
    """Return the Answer that tells a Failure."""
    return Answer(failure.reason or "none", str(failure), failure.hint, address, "", b"")


def _failure_in(answer, where=""):
    """Return the Failure that an Answer of another process tells."""
    if answer.reason == "none":  # this host lacks something
        return Failure(None, answer.detail, answer.hint)
    known = answer.reason in ("unreachable", "timeout", "unproven", "malformed", "rehearsal")
    return Failure(answer.reason if known else "malformed", where + answer.detail, answer.hint)


def exchange(job):
    """Return the Answer to a Job: the first address that gives a proven certificate."""
    deadline = time.monotonic() + job.timeout
    try:
        addresses = _resolve(job)
    except Failure as failure:
        return _refusal(failure)
    answer = _refusal(Failure("unreachable", "has no other address"))
    for position, (family, where) in enumerate(addresses):
        # an address that is dead leaves the others their share of the time
        share = (deadline - time.monotonic()) / (len(addresses) - position)
        try:
            return _ask_address(job, family, where, time.monotonic() + share)
        except Failure as error:
            failure = error
        except (OSError, ValueError) as error:
            failure = _known_failure(error, job) or Failure(
                "unreachable", "cannot be reached (%s)" % plain(error, 120).lower(),
                "check the network and the address")
        if answer.reason not in ("unproven", "malformed"):  # graver than what a dead one says
            answer = _refusal(failure, where[0])
    return answer


def _answer_line(number, answer):
    """Return an Answer as a line for the pipe, what it holds in hexadecimal digits."""
    words = [plain(field).encode("ascii") for field in answer[:-1]]
    return b"\t".join([number] + words + [binascii.hexlify(answer.data)]) + b"\n"


class _Pool:
    """The network process's exchanges: side by side, each with its deadline, answered as they end.

    An exchange that waits on its peer for PATIENCE frees its place; an upstream that was waited for
    in vain is not waited for again in the same run.
    """

    def __init__(self):
        """Begin with nothing to do."""
        self.waiting, self.done, self.unsent = (collections.deque() for _ in range(3))
        self.running = {}  # number: (job, when it started)
        self.held = {}  # endpoint: [(number, job)] that wait for its first answer
        self.fate = {}  # endpoint: None where it answered, else (timeout, Answer) of a vain wait
        self.woken, self.wake = os.pipe()

    def work(self, number, job):
        """Run one exchange in its thread and hand its answer over."""
        try:
            answer = exchange(job)
        except Exception as error:  # whatever a peer provokes ends as an answer
            answer = _refusal(Failure("unreachable", "broke the exchange: " + repr(error)))
        self.done.append((number, answer))
        os.write(self.wake, b".")

    def start(self, now):
        """Start what may be started now."""
        import threading
        young = sum(now - started < PATIENCE for _, started in self.running.values())
        while self.waiting and young < SIDE_BY_SIDE and len(self.running) < MAX_RUNNING:
            number, job = self.waiting.popleft()
            endpoint = job[:3]
            fate = self.fate.get(endpoint)
            if fate and fate[0] >= job.timeout:
                self.unsent.append(_answer_line(number, fate[1]))
            elif endpoint not in self.fate and any(
                    other[:3] == endpoint and now - started >= PATIENCE
                    for other, started in self.running.values()):
                self.held.setdefault(endpoint, []).append((number, job))
            else:
                self.running[number] = job, now
                young += 1
                threading.Thread(target=self.work, args=(number, job), daemon=True).start()

    def finish(self, now):
        """Send the answers that are ready, and a timeout for what is late."""
        for number, (job, started) in self.running.items():
            if now > started + job.timeout + 0.2:  # its thread hangs in the resolver, mostly
                self.done.append((number, _refusal(_known_failure(TimeoutError(), job))))
        while self.done:
            number, answer = self.done.popleft()
            if number not in self.running:
                continue  # too late: its timeout was told
            job, _ = self.running.pop(number)
            if answer.reason != "timeout":
                self.fate[job[:3]] = None
            elif self.fate.get(job[:3], True):
                self.fate[job[:3]] = job.timeout, answer
            self.unsent.append(_answer_line(number, answer))
            self.waiting.extendleft(self.held.pop(job[:3], ()))


def _serve_jobs(jobs, answers):
    """Be the network process: read jobs, a line each, and answer them until no more can come."""
    import ssl  # noqa: F401  (20 ms, while the other process reads its files)
    import threading
    threading.stack_size(256 * 1024)
    pool, unread = _Pool(), b""
    os.set_blocking(answers, False)
    while True:
        now = time.monotonic()
        pool.finish(now)
        pool.start(now)
        # deadlines are looked at ten times a second; answers and jobs wake it by themselves
        readable, writable, _ = select.select([jobs, pool.woken], [answers] if pool.unsent else [],
                                              [], 0.1 if pool.running else None)
        if writable:
            line = pool.unsent.popleft()
            rest = line[os.write(answers, line):]
            pool.unsent.extendleft([rest] if rest else [])
        if pool.woken in readable:
            os.read(pool.woken, 4096)
        if jobs in readable:
            piece = os.read(jobs, 65536)
            if not piece:
                return
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                number, *fields = line.split(b"\t")
                job = Job(*[field.decode("ascii") for field in fields])
                pool.waiting.append((number, job._replace(
                    port=int(job.port), timeout=float(job.timeout))))


class Network:
    """The unprivileged process that does every handshake of a run, as the deciding one sees it.

    It is believed in nothing but bytes: what breaks the protocol, floods or stays silent ends it,
    and every exchange that it still owed.
    """

    def __init__(self, serve=_serve_jobs, unprivileged=True, who="the network process"):
        """Fork it."""
        self.pid, self.to_jobs, self.from_answers = own_process(serve, unprivileged)
        os.set_blocking(self.to_jobs, False)
        self.who, self.count, self.longest, self.kept, self.buffer = who, 0, 0.0, 0, b""
        self.answers, self.open, self.broken = {}, set(), ""

    def submit(self, job):
        """Ask for an exchange; return the number under which answer() tells how it went."""
        self.count += 1
        self.longest = max(self.longest, job.timeout)
        number = b"%d" % self.count
        self.open.add(number)
        line = "\t".join(plain(field, MAX_KEY) for field in (self.count,) + job) + "\n"
        try:
            if not self.broken and not select.select([], [self.to_jobs], [], 5)[1]:
                self.broken = "does not listen"
            os.write(self.to_jobs, line.encode("ascii"))
        except OSError:
            pass  # answer() tells what became of it
        return number

    def answer(self, number, seconds=None):
        """Return the Answer to a job, waiting for it."""
        # its own deadlines come first: this one is for a process that does not keep them
        seconds = seconds or self.longest + 5
        if not self.has(number, seconds) and not self.broken:
            self.broken = "gave no answer in %g s" % seconds
        if number not in self.answers:
            words = "cannot be asked: %s %s" % (self.who, self.broken)
            return _refusal(Failure("timeout", words, "--timeout SECONDS") if "no answer" in words
                            else Failure("unreachable", words, "run it again, with -v"))
        self.kept -= len(self.answers[number].data)
        return self.answers.pop(number)

    def has(self, number, seconds=0.0):
        """Say whether the Answer to a job is here, waiting while any comes within `seconds`."""
        deadline = time.monotonic() + seconds
        while number not in self.answers and not self.broken:
            left = max(0, deadline - time.monotonic())
            if not select.select([self.from_answers], [], [], left)[0]:
                return False
            piece = os.read(self.from_answers, 1 << 16)
            *lines, self.buffer = (self.buffer + piece).split(b"\n")
            for line in lines:
                self.take(line)
                deadline = time.monotonic() + seconds
            if not piece or len(self.buffer) > 3 * MAX_OFFER:
                self.broken = self.broken or ("floods" if piece else "died")
        return True

    def take(self, line):
        """Keep the Answer that a line holds; break off at anything that is none."""
        try:
            number, *words, data = line.split(b"\t")
            self.open.remove(number)
            answer = Answer(*[plain(word.decode("latin-1")) for word in words],
                            data=binascii.unhexlify(data))
            self.answers[number] = answer
            self.kept += len(answer.data)
            # in a large run all the others wait for one slow upstream
            if self.kept > 64 * MAX_OFFER + self.count * (MAX_OFFER >> 6):
                self.broken = self.broken or "floods"
        except (KeyError, TypeError, ValueError):
            self.broken = self.broken or ("said what was not asked" if line[:2] != b"! " else
                                          "stopped: " + plain(line[2:].decode("latin-1")))

    def close(self):
        """End the process: it holds nothing that matters."""
        os.close(self.to_jobs)
        os.close(self.from_answers)
        os.kill(self.pid, signal.SIGKILL)  # or its remains, until it is waited for
        os.waitpid(self.pid, 0)


def in_own_process(function, seconds, unprivileged=True):
    """Return the bytes that function() returns in a process of its own; Failure as it raised."""
    def serve(_, answers):
        try:
            answer = Answer("", "", "", "", "", function()[:MAX_OFFER + 1])
        except Failure as failure:
            answer = _refusal(failure)
        except Exception as error:
            answer = _refusal(Failure("unreachable", "cannot be understood: " + repr(error)))
        line = _answer_line(b"1", answer)
        while line:
            line = line[os.write(answers, line):]

    process = Network(serve, unprivileged, "its process")
    process.open.add(b"1")
    try:
        answer = process.answer(b"1", seconds)
    finally:
        process.close()
    if answer.reason:
        raise _failure_in(answer)
    return answer.data


def _offer_of(source, data, address="", way=""):
    """Return the Offer in PEM or DER bytes from a source, in its order; Failure otherwise."""
    try:
        if len(data) > MAX_OFFER:
            raise ValueError("more than %d bytes" % MAX_OFFER)
        certificates, key = read_pem(data)
        if not certificates:
            raise ValueError("no certificate in it")
    except ValueError as error:
        raise Failure("malformed", "%s: %s" % (source.text, error), "look at what it holds")
    return Offer(source, address, certificates[0], tuple(certificates[1:]), key, way)


def tls_offer(source, answer):
    """Return the Offer in an Answer of the network process; Failure with the answer's reason."""
    if answer.reason:
        where = source.text if answer.address in ("", source.host) else "%s (%s)" % (
            source.text, answer.address)
        raise _failure_in(answer, where + " ")
    offer = _offer_of(source, answer.data, answer.address, answer.way)
    return offer if answer.detail else offer._replace(chain=None)


def _leaf_first(offer):
    """Return an offer in any order with its leaf first: the certificate that issued no other."""
    try:
        parsed = [parse_certificate(der) for der in (offer.leaf,) + offer.chain]
    except ValueError:
        return offer  # the judge says which word that is
    issuers = {one.issuer for one in parsed if one.issuer != one.subject}
    leaf = min(parsed, key=lambda one: (one.subject in issuers, one.issuer == one.subject))
    return offer._replace(leaf=leaf.der, chain=tuple(c.der for c in parsed if c is not leaf))


def _read_source_file(path):
    """Return the bytes of a regular file, at most one more than an offer may have; only links of
    root or the caller are followed, or another user could lead to what only root can read."""
    here, parts, links = "/", os.path.abspath(path).split("/"), 0
    while parts:
        step = os.path.join(here, parts.pop(0))
        if not os.path.islink(step):
            here = step
            continue
        links += 1
        if os.lstat(step).st_uid not in (0, os.geteuid()) or links > 40:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        parts = os.readlink(step).split("/") + parts
        here = "/" if not parts[0] else here
    descriptor = os.open(here, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return file.read(MAX_OFFER + 1)


def _file_offer(source, job, environment):
    """Return the Offer of file:PATH: a PEM file, or a folder with fullchain.pem or cert.pem."""
    del job, environment
    names = ("/fullchain.pem", "/cert.pem", "/chain.pem", "/privkey.pem")
    pieces, missing = [], "there is no such file, or nothing in it"
    for name in names if os.path.isdir(source.target) else ("",):
        try:
            pieces.append(_read_source_file(source.target + name))
        except FileNotFoundError:
            continue
        except OSError as error:
            pieces, missing = [], os.strerror(error.errno).lower()
            break
    if not pieces:
        raise Failure("unreachable", "%s: %s" % (source.text, missing), "is the medium in place?")
    return _leaf_first(_offer_of(source, b"\n".join(pieces)))


def _exec_offer(source, job, environment):
    """Return the Offer that a shell command prints, if it ends with status 0 in time."""
    import subprocess
    deadline = time.monotonic() + job.timeout
    process = subprocess.Popen(
        source.target.encode("utf-8", "surrogateescape"), shell=True, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)
    try:
        output, errors = converse(process, {}, deadline, MAX_OFFER)
        status = process.wait(max(0.01, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        kill_group(process)
        raise Failure("timeout", "%s did not end in %g s" % (source.text, job.timeout),
                      "run it by hand, or --timeout SECONDS")
    except ValueError:
        raise Failure("malformed", "%s prints more than 1 MiB" % source.text, "run it by hand")
    wrong = "" if output.strip() else "printed nothing"
    if status != 0:
        last = plain(errors.decode("utf-8", "replace").strip().split("\n")[-1], 120)
        wrong = "ended with status %d%s" % (status, last and " (%s)" % last)
    if wrong:
        raise Failure("unreachable", "%s %s" % (source.text, wrong), "run it by hand")
    return _leaf_first(_offer_of(source, output))


# What a store reads from a file: {kind: ((variable, variable that holds its path), ...)}
_SECRETS = {"vault": (("VAULT_TOKEN", "VAULT_TOKEN_FILE"), ("roots", "VAULT_CACERT"),
                      ("VAULT_SECRET_ID", "VAULT_SECRET_ID_FILE")),
            "azure": (("AZURE_CLIENT_SECRET", "AZURE_CLIENT_SECRET_FILE"),
                      ("roots", "SSL_CERT_FILE"))}

_CORRECT = "correct it in certferry/environment"

# What a store's status, or its first digit, means.
_STATUS = {403: ("forbids reading it", "check the policy and the token's age"),
           404: ("has no such secret, or it is deleted", "check the path"),
           503: ("is sealed or in maintenance", "unseal it"),
           3: ("redirects to what is not followed", "name that place as the source"),
           4: ("refuses the request", "check the credentials and the path")}

# The logins of sovereign clouds, by the end of their vaults' names.
_LOGINS = {"vault.usgovcloudapi.net": "login.microsoftonline.us",
           "vault.azure.cn": "login.chinacloudapi.cn"}


def _dig(document, *names):
    """Return what is at the end of nested names in a JSON document, or None."""
    for name in names:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _request(environment, url, headers, body):
    """Return the response to one request and its body: HTTPS, a POST where it has a body."""
    import http.client
    import ssl
    host, path = re.match(r"https?://([^/]+)(/.*)\Z", url).groups()
    try:
        if "Metadata" in headers:  # a managed identity's endpoint is link-local and speaks HTTP
            connection = http.client.HTTPConnection(host)
        else:
            connection = http.client.HTTPSConnection(
                host, context=ssl.create_default_context(cadata=environment.get("roots")))
        connection.request("POST" if body else "GET", path, body, headers)
        response = connection.getresponse()
        return response, response.read(4 * MAX_OFFER)
    except ssl.SSLError as error:
        raise Failure("unreachable", "shows no accepted TLS certificate (%s)" % getattr(
            error, "verify_message", error.reason), "VAULT_CACERT for a private authority")
    except ValueError:  # its own words would show the token
        raise Failure("unreachable", "cannot be asked: HTTP forbids a character of a credential",
                      _CORRECT)
    except (OSError, http.client.HTTPException) as error:
        raise Failure("unreachable", "gives no answer (%s)" % error, "is it running there?")


def _ask_store(environment, url, headers, body=None, allowed=()):
    """Return the JSON document that a store answers with; None for a status that is allowed."""
    import json
    import urllib.parse
    response, data = _request(environment, url, headers, body)
    target = urllib.parse.urljoin(url, response.getheader("Location", ""))
    if response.status // 100 == 3 and target.startswith("https://"):  # followed once
        if urllib.parse.urlsplit(target).hostname != urllib.parse.urlsplit(url).hostname:
            headers, body = {}, None  # what is secret is for the host that was named
        response, data = _request(environment, target, headers, body)
    if response.status in allowed:
        return None
    if response.status != 200:
        words, hint = _STATUS.get(response.status) or _STATUS.get(response.status // 100, (
            "does not give it", "look there"))
        raise Failure("unreachable", "%s (status %d)" % (words, response.status), hint)
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Failure("malformed", "answers with what is no JSON", "is it the right address?")


def _vault_secret(source, environment):
    """Return the PEM bytes of a KV secret: version 2, or 1 where the mount is."""
    import json

    def ask(path, body=None, allowed=()):
        return _ask_store(environment, "https://%s/v1/%s" % (
            endpoint_text(source.host, source.port), path), headers, body, allowed)

    space, token = environment.get("VAULT_NAMESPACE"), environment.get("VAULT_TOKEN")
    headers = {"X-Vault-Namespace": space} if space else {}
    if not token:
        if not environment.get("VAULT_ROLE_ID"):
            raise Failure("unreachable", "needs VAULT_TOKEN_FILE=PATH, or VAULT_ROLE_ID and "
                          "VAULT_SECRET_ID_FILE", _CORRECT)
        login = json.dumps({"role_id": environment["VAULT_ROLE_ID"],
                            "secret_id": environment.get("VAULT_SECRET_ID", "")})
        token = str(_dig(ask("auth/approle/login", login.encode("ascii")), "auth", "client_token"))
    headers["X-Vault-Token"] = token
    info = ask("sys/internal/ui/mounts/" + source.target, allowed=(403, 404))
    mount = str(_dig(info, "data", "path"))
    if not source.target.startswith(mount):
        mount = source.target.partition("/")[0] + "/"
    second = info is None or _dig(info, "data", "options", "version") == "2"
    document = ask(mount + ("data/" if second else "") + source.target[len(mount):])
    values = [_dig(document, *["data"] * (1 + second), name) for name in (
        "fullchain certificate cert chain ca_chain private_key privkey key").split()]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    pem = "\n".join(text for text in texts if isinstance(text, str) and "-----BEGIN " in text)
    if not pem:
        raise Failure("malformed", "holds no PEM in a field that is known", "fields: certificate, "
                      "chain or fullchain, and private_key")
    return pem.replace("\\n", "\n").encode("utf-8", "replace")


def _azure_secret(source, environment):
    """Return the bytes of a Key Vault secret: PEM, or the DER of a PKCS#12 container."""
    import urllib.parse
    cloud, client = source.host.partition(".")[2], environment.get("AZURE_CLIENT_ID", "")
    if environment.get("AZURE_CLIENT_SECRET"):
        login = environment.get("AZURE_AUTHORITY_HOST") or _LOGINS.get(
            cloud, "login.microsoftonline.com")
        url = "https://%s/%s/oauth2/v2.0/token" % (
            login.split("://")[-1].strip("/"), environment.get("AZURE_TENANT_ID", ""))
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = urllib.parse.urlencode({
            "grant_type": "client_credentials", "client_id": client, "scope": "https://%s/.default"
            % cloud, "client_secret": environment["AZURE_CLIENT_SECRET"]}).encode("ascii")
    else:  # the managed identity
        url = "%s/metadata/identity/oauth2/token?%s" % (
            environment.get("AZURE_POD_IDENTITY_AUTHORITY_HOST") or "http://169.254.169.254",
            urllib.parse.urlencode(dict({"client_id": client} if client else {}, **{
                "api-version": "2018-02-01", "resource": "https://" + cloud})))
        headers, body = {"Metadata": "true"}, None
    token = _dig(_ask_store(environment, url, headers, body), "access_token")
    document = _ask_store(environment, "https://%s/secrets/%s?api-version=7.4" % (
        endpoint_text(source.host, source.port), source.target),
        {"Authorization": "Bearer %s" % token})
    value = str(_dig(document, "value"))
    if "pkcs12" in str(_dig(document, "contentType")):
        return binascii.a2b_base64(value)
    return value.replace("\\n", "\n").encode("utf-8", "replace")


def _read_credentials(kind, environment):
    """Return the environment with what a store needs from files; nobody can't read them later."""
    environment = dict(environment)
    for name, path_name in _SECRETS[kind]:
        path = environment.get(path_name)
        if path and not environment.get(name):
            try:
                with open(path, "rb") as file:
                    environment[name] = file.read(MAX_OFFER).decode("ascii", "ignore").strip()
            except OSError as error:
                raise Failure("unreachable", "cannot be asked: %s=%s: %s" % (
                    path_name, path, os.strerror(error.errno).lower()), _CORRECT)
    return environment


def _store_offer(source, job, environment):
    """Return the Offer of a vault: or azure: secret, fetched in a process of its own."""
    fetch = {"vault": _vault_secret, "azure": _azure_secret}[source.kind]
    try:
        import http.client  # noqa: F401
        import json  # noqa: F401
        environment = _read_credentials(source.kind, environment)
        data = in_own_process(lambda: fetch(source, environment), job.timeout)
        data = open_pkcs12(data) if data[:1] == b"\x30" else data
    except ImportError:
        raise Failure("unreachable", "%s: this Python lacks json or http.client" % source.text,
                      "install python3, not only python3-minimal")
    except Failure as failure:
        raise Failure(failure.reason, "%s %s" % (source.text, failure), failure.hint)
    except ValueError as error:
        raise Failure("malformed", "%s holds %s" % (source.text, error), "export it without one")
    return _leaf_first(_offer_of(source, data))


# The sources that are no handshake: (Source, Job, environment) in, an Offer out within the timeout.
FETCHERS = {"file": _file_offer, "exec": _exec_offer, "vault": _store_offer, "azure": _store_offer}
# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------


def days_left(certificate, now):
    """Return the whole days until a certificate expires, negative afterwards."""
    return int((certificate.not_after - now) // DAY)


def describe_key(public_key):
    """Return the kind and fingerprint of a public key as messages show them."""
    return "%s sha256:%s" % (key_kind(public_key), fingerprint(public_key)[:16])


def _covers_wanted(leaf, wanted):
    """Say whether a leaf covers what is required: every -d, or without any NAME or *.NAME."""
    return all(covers(leaf.domains, domain) for domain in wanted.domains or (wanted.name,)) or (
        not wanted.domains and "*." + wanted.name in leaf.domains)


def _mismatch(evidence, wanted, now):
    """Return the Verdict on a leaf for a key that is not here: what to do depends on what it is."""
    leaf, source, current = evidence.leaf, evidence.offer.source.text, wanted.current
    own = next(iter(wanted.keys), None)
    keys = "%s, ours is %s" % (describe_key(evidence.public_key), describe_key(own) if own else "?")
    shown = "%s shows a certificate by %s for %s, for another key" % (
        source, attribute(leaf.issuer, "organization") or attribute(leaf.issuer, "common name")
        or "an unnamed issuer", " ".join(leaf.domains[:4]) or "no name")
    if not _covers_wanted(leaf, wanted):
        return Verdict("key-mismatch", shown, "--sni HOST, a name under which the upstream serves "
                       "this one")
    if current is None:
        return Verdict("key-mismatch", "%s (%s)" % (shown, keys), (
            "a CDN or load balancer shows its own: name the origin with --from HOST[:PORT]; or "
            "bring its key with --key"))
    return Verdict("key-mismatch", "%s has a certificate for another key (%s)" % (source, keys), (
        "on purpose: certferry %s --key NEW.pem; by accident: on the upstream, certbot renew "
        "--cert-name %s --reuse-key; the certificate here lasts %d more days" % (
            wanted.name, wanted.name, days_left(current.leaf, now))))


def _key_rule(evidence, wanted, now):
    """The leaf is for a private key that is here, or that came with it, and that is not retired."""
    public, carried, source = evidence.public_key, evidence.carried_key, evidence.offer.source.text
    again = "certferry renew %s --force takes it back" % wanted.name
    if carried not in (None, public):
        return Verdict("key-mismatch", "%s has a private key (%s) that does not fit its certificate"
                       " (%s)" % (source, describe_key(carried), describe_key(public)),
                       "put the matching pair there")
    if public in wanted.rolled_keys:
        return Verdict("rolled-back", "%s offers a certificate for the key that was rolled back "
                       "from" % source, again)
    if fingerprint(public) in wanted.retired:
        return Verdict("key-mismatch", "%s has a certificate for a key that was retired here (%s)"
                       % (source, describe_key(public)), again)
    return None if carried or public in wanted.keys else _mismatch(evidence, wanted, now)


def _names_rule(evidence, wanted, _):
    """The leaf covers every required name, by its subject alternative name alone."""
    names = evidence.leaf.domains
    lacking = [name for name in wanted.domains or (wanted.name,) if not covers(names, name)]
    return not _covers_wanted(evidence.leaf, wanted) and Verdict(
        "names", "the certificate of %s %s, not for %s" % (
            evidence.offer.source.text, "is for " + " ".join(names[:6]) if names else
            "has no usable subject alternative name (the common name does not count)",
            " ".join(lacking)), "--sni HOST, or -d DOMAIN if less is wanted")


def _validity_rule(evidence, _, now):
    """The clock is inside the leaf's validity."""
    source, leaf = evidence.offer.source.text, evidence.leaf
    clock = "check the clock (it says %s)" % iso_time(now)
    if now > leaf.not_after:
        return Verdict("expired", "the certificate of %s expired on %s" % (
            source, iso_time(leaf.not_after)), "renew it on the upstream, or " + clock)
    return now < leaf.not_before and Verdict("not-yet-valid", "the certificate of %s is valid from "
                                             "%s on" % (source, iso_time(leaf.not_before)), clock)


def _trust_rule(evidence, *_):
    """Leaf and chain, as they would be written, lead to a root, and browsers take them."""
    message, _, hint = evidence.trust.partition(": ")
    return message and Verdict("untrusted", "the certificate of %s is not trusted: %s" % (
        evidence.offer.source.text, message), hint or "see to it on the upstream")


def _order_rule(evidence, wanted, _):
    """The leaf is newer than the current one: a later notBefore, never a later notAfter."""
    current, leaf, offer = wanted.current and wanted.current.leaf, evidence.leaf, evidence.offer
    if not current or leaf.der == current.der or leaf.not_before > current.not_before or (
            leaf.not_before == current.not_before and fingerprint(leaf.der) not in wanted.replaced):
        return None
    return Verdict("older", "%s%s offers the certificate of %s, older than the one here (%s)" % (
        offer.source.text, " (%s)" % offer.address if offer.address else "", iso_time(
            leaf.not_before), iso_time(current.not_before)), "a stale member of a pool? --force "
        "takes it")


def _lost_rule(evidence, wanted, _):
    """Without -d, no name of the current certificate is lost."""
    lost = [] if wanted.domains or not wanted.current else [
        name for name in wanted.current.leaf.domains if not covers(evidence.leaf.domains, name)]
    return lost and Verdict("names-lost", "the certificate of %s no longer covers %s" % (
        evidence.offer.source.text, " ".join(lost)), "if that is meant: --force, or -d for each "
        "name needed")


def _rolled_back_rule(evidence, wanted, _):
    """The leaf is not one that an administrator rolled back from."""
    return fingerprint(evidence.leaf.der) in wanted.rolled_back and Verdict(
        "rolled-back", "%s still offers the certificate of %s, which was rolled back from" % (
            evidence.offer.source.text, iso_time(evidence.leaf.not_before)), "it stays out until "
        "there is a newer one, or certferry renew %s --force" % wanted.name)


_RULES = (_key_rule, _names_rule, _validity_rule, _trust_rule, _order_rule, _lost_rule,
          _rolled_back_rule)


def judge(evidence, wanted, now, same=False, force=False):
    """Return the Verdict on an offer: the first rule that it breaks, in the README's order.

    `same` asks of the current leaf only what may have changed about it: the names and the clock.
    """
    for rule in _RULES[1:3] if same else _RULES[:4] if force else _RULES:
        verdict = rule(evidence, wanted, now)
        if verdict:
            return verdict
    return Verdict("", "", "")


def gravity(failure):
    """Return how grave a Failure is: a changed key most, a stale member of a pool least."""
    return {"key-mismatch": 3, "unreachable": 1, "timeout": 1, "older": 0}.get(failure.reason, 2)


def due_time(leaf):
    """Return when a renewal is due: a third of the lifetime is left, or half of ten days or less.

    certbot's rule since 4.0.
    """
    return leaf.not_after - leaf.lifetime / (2 if leaf.lifetime <= 10 * DAY else 3)


def threshold(share, lifetime):
    """Return the seconds of a threshold ("%" or "d", number) for a lifetime in seconds."""
    return share[1] * DAY if share[0] == "d" else lifetime * share[1] / 100


def last_good(lineage, now):
    """Return when a source was last heard to good effect, or None; a time after now is none."""
    state = lineage.state
    sound = state.result in SOUND or (state.result, state.reason) == ("deferred", "rolled-back")
    good = lineage.checked if sound else state.good
    return good if good is not None and good <= now else None


def is_confirmed(lineage, now):
    """Say whether there was a good exchange within a tenth of the lifetime."""
    leaf, good = lineage.current.leaf, last_good(lineage, now)
    if lineage.options.when == "due":  # nobody is asked before
        good = max(good or 0, min(due_time(leaf), now))
    return good is not None and now - good <= leaf.lifetime / 10


def health_of(lineage, now, misfit=False):
    """Return (ok, due, warning or critical; why) of what is in service."""
    if lineage.current is None or lineage.key is None:
        return "critical", "has no certificate" if lineage.current is None else "has no private key"
    leaf, options, state = lineage.current.leaf, lineage.options, lineage.state
    left = leaf.not_after - now
    if misfit or left <= 0:
        return "critical", "has a private key that does not fit its certificate" if misfit else (
            "expired on %s" % iso_time(leaf.not_after))
    ends = "expires in %d %s" % ((left // DAY, "days") if left >= 2 * DAY else (
        left // 3600, "hours"))
    for health, share in (("critical", options.critical), ("warning", options.warn)):
        if left <= threshold(share, leaf.lifetime):
            return health, ends
    if state.owed or state.unserved:
        return "warning", "has something pending"
    if options.enabled == "yes" and not is_confirmed(lineage, now):
        good = iso_time(last_good(lineage, now))
        return "warning", "was not confirmed by its source since %s" % good if good else (
            "was never confirmed by its source")
    return "due" if now >= due_time(leaf) else "ok", ends


# --------------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------------


def refuse_foreign(path, info, private=True):
    """Raise Failure where a file or folder is another user's, or others can write it."""
    if info.st_uid not in (0, os.geteuid()):
        raise Failure(None, "%s belongs to uid %d" % (path, info.st_uid), "chown it to root")
    if private and info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode):
        raise Failure(None, "%s can be written by others" % path, "chmod go-w")


@functools.lru_cache(maxsize=None)  # a thousand lineages share three of their four folders
def check_folder(path):
    """Raise Failure where a folder, or the link to it, is another user's or open to others."""
    refuse_foreign(path, os.lstat(path))
    refuse_foreign(path, os.stat(path))


def read_file(path, limit, private=False):
    """Return the bytes of a regular file that root or the caller owns, following no link.

    `private` refuses one that others can write. Failure for a file that is somebody else's.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        refuse_foreign(path, info, private)
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            raise Failure(None, "%s is no regular file of at most %d bytes" % (path, limit),
                          "put the right one there")
        return os.read(descriptor, limit)
    finally:
        os.close(descriptor)


def read_text(path):
    """Return the text of a record that nobody else can write."""
    return read_file(path, MAX_RECORD, private=True).decode("utf-8", "surrogateescape")


def real_path(place, path):
    """Return where a live file is, through an administrator's links that end in the config dir."""
    if not os.path.islink(path):
        return path
    real = os.path.realpath(path)
    refuse_foreign(path, os.lstat(path))
    if not real.startswith(os.path.realpath(place.config) + "/"):
        raise Failure(None, "%s is a link out of the config dir" % path, "put the file there")
    if os.path.exists(real):
        check_folder(os.path.dirname(real))
    return real


def _flush(descriptor, path):
    """Make what an open file or folder holds durable; an OSError names it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = path
        raise


def _sync(path):
    """Make what a folder lists durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flush(descriptor, path)
    finally:
        os.close(descriptor)


def _dress(descriptor, like, mode):
    """Give a new file owner and group of the stat result `like`, then its mode: never wider."""
    info = os.fstat(descriptor)
    if (like.st_uid, like.st_gid) != (info.st_uid, info.st_gid):
        try:
            os.fchown(descriptor, like.st_uid, like.st_gid)
        except PermissionError:
            mode &= 0o2700  # not root: the group's rights would go to another group
    os.fchmod(descriptor, mode)


def _create(path, data, mode, like=None):
    """Make a new file of `data`, synced, with owner and group of the stat result `like`."""
    if os.path.lexists(path):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            _dress(descriptor, like or os.fstat(descriptor), mode)
            _flush(descriptor, path)
    except OSError as error:
        error.filename = error.filename or path  # write() tells none
        os.unlink(path)
        raise


def _hidden(path):
    """Return the temporary name beside a path."""
    folder, name = os.path.split(path)
    return "%s/.%s%s" % (folder, name.lstrip("."), LITTER)


def _replace(path):
    """Let what was made under the temporary name take the place of `path`."""
    try:
        os.rename(_hidden(path), path)
    except OSError:
        os.unlink(_hidden(path))
        raise


def write_file(path, data, mode=0o600):
    """Replace a file in one rename by one that is complete and synced."""
    _create(_hidden(path), data, mode)
    _replace(path)
    _sync(os.path.dirname(path))


def _set_link(target, path):
    """Make `path` a link to `target` in one rename."""
    if os.path.lexists(_hidden(path)):
        os.unlink(_hidden(path))
    os.symlink(target, _hidden(path))
    _replace(path)


def make_folder(path, mode=None):
    """Make a folder with the mode of its parent, closed to other writers; or check it."""
    if not os.path.lexists(path):
        os.mkdir(path, 0o700)
        parent = os.path.dirname(path)
        os.chmod(path, mode or stat.S_IMODE(os.stat(parent).st_mode) & 0o2755)
        _sync(parent)
    check_folder(path)


def _remove_folder(folder):
    """Remove a version's folder; nothing where there is none."""
    if os.path.isdir(folder):
        if not folder.endswith(LITTER):  # half removed it is no version, but litter
            os.rename(folder, _hidden(folder))
            folder = _hidden(folder)
        for name in os.listdir(folder):
            os.unlink("%s/%s" % (folder, name))
        os.rmdir(folder)


def find_litter(folder):
    """Return the paths of what an interrupted run left in a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return ["%s/%s" % (folder, name) for name in names if name.endswith(LITTER)]


def remove_litter(paths):
    """Remove what an interrupted run left."""
    for path in paths:
        remove = _remove_folder if os.path.isdir(path) and not os.path.islink(path) else os.unlink
        remove(path)


def _copy_key(source, target, like):
    """Copy a key to a new inode, so that a write through the live link spoils one version only.

    It gets owner, group, mode and ACL of the file `like`.
    """
    info = os.stat(like)
    _create(target, read_file(source, MAX_KEY), stat.S_IMODE(info.st_mode), info)
    try:
        os.setxattr(target, "system.posix_acl_access", os.getxattr(like, "system.posix_acl_access"))
    except (OSError, AttributeError):
        pass  # it has no ACL, or the file system knows none


def _label(path):
    """Return the SELinux label of a path, None where there is none."""
    try:
        return os.getxattr(path, "security.selinux")
    except (OSError, AttributeError):
        return None


def save_state(place, state):
    """Write NAME.state in one rename."""
    make_folder(place.records, 0o700)
    write_file(place.state, format_state(state).encode("utf-8", "surrogateescape"))


def touch_state(place, now):
    """Set the time of the last check."""
    os.utime(place.state, (now, now))


def save_conf(place, given):
    """Write the remembered options to NAME.conf, touching only the lines that changed."""
    make_folder(place.records, 0o700)
    text = read_text(place.conf) if os.path.lexists(place.conf) else ""
    edited = edit_conf(text, parse_conf(text, place.conf)[0], given)
    write_file(place.conf, edited.encode("utf-8", "surrogateescape"))


def version_numbers(place):
    """Return the numbers of the versions that there are, the newest first."""
    pattern = re.compile(re.escape(place.name) + r"@([1-9]\d{0,8})\Z")
    names = os.listdir(place.archive) if os.path.isdir(place.archive) else ()
    return sorted((int(match.group(1)) for match in map(pattern.match, names) if match),
                  reverse=True)


def next_number(place):
    """Return the number of the version that is made next."""
    return max(version_numbers(place) + [0]) + 1


def _load(number, folder, paths):
    """Return the Version in certificate files, or None where they are missing or damaged."""
    try:
        leaf, *chain = read_pem(b"".join(read_file(path, MAX_OFFER) for path in paths))[0]
        return Version(number, folder, parse_certificate(leaf), tuple(chain))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def load_version(place, number):
    """Return a Version from the archive, or None where its certificates are missing or damaged."""
    folder = place.version(number)
    return _load(number, folder, [folder + "/fullchain.pem"])


def load_versions(place):
    """Return the versions in the archive that can be read, the newest first."""
    return [version for version in (load_version(place, number)
                                    for number in version_numbers(place)) if version]


def pointed_number(place):
    """Return the number of the version that .current points to, 0 without one; or Failure."""
    if not os.path.islink(place.pointer):
        return 0
    target = os.readlink(place.pointer)
    folder, _, name = target.rpartition("/")
    name, _, number = name.rpartition("@")
    if name != place.name or not number.isdigit() or folder != "../../archive" and os.path.realpath(
            "%s/%s" % (place.live, folder)) != os.path.realpath(place.archive):
        raise Failure(None, "%s points to %s, which is no version of it" % (
            place.pointer, plain(target)), "point it to one, or move it away")
    return int(number)


def find_current(place):
    """Return the Version in service: through .current, else loose files in live/NAME, or None."""
    number = pointed_number(place)
    if not number:
        full, cert, chain = (real_path(place, "%s/%s" % (place.live, name))
                             for name in ("fullchain.pem", "cert.pem", "chain.pem"))
        return _load(None, place.live, [full] if os.path.lexists(full) else [cert, chain] if (
            os.path.lexists(chain)) else [cert])
    return load_version(place, number)


def find_key(place, current):
    """Return the path of the lineage's private key, or None where there is none."""
    path = (current.folder if current and current.number else place.live) + "/privkey.pem"
    path = real_path(place, path)
    return path if os.path.lexists(path) else None


def key_record(path, public_key):
    """Return a word that changes when a key file, or the public key that it fits, does."""
    info = os.stat(path)
    return "%d:%d:%d:%d" % (info.st_ino, info.st_size, info.st_mtime_ns, checksum(public_key))


def staged_keys(place):
    """Return the paths of the staged keys, sorted."""
    names = os.listdir(place.live) if os.path.isdir(place.live) else ()
    paths = ["%s/%s" % (place.live, name) for name in sorted(names)
             if re.match(r"privkey-.+\.pem\Z", name)]
    return [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]


def stage_key(place, pem, public_key, first=False):
    """Put a private key (PEM) into live/NAME, as its key if it is the first; return its path."""
    for folder in (place.config, place.config + "/live", place.live):
        make_folder(folder)
    path = "%s/privkey%s.pem" % (place.live, "" if first else "-" + fingerprint(public_key)[:16])
    write_file(path, pem)
    return path


def _stage_version(place, number, before, members, key, link):
    """Make the hidden folder of a version, complete and synced; return its path.

    `members` are the three certificate files, `key` a path or a Secret, `before` the Version whose
    owner and modes it takes over, `link` adopts the key's own file where that can be.
    """
    folder, target = _hidden(place.version(number)), _hidden(place.version(number)) + "/privkey.pem"
    old = find_key(place, before)
    _remove_folder(folder)
    os.mkdir(folder, 0o700)
    for name, data in zip(MEMBERS, members):
        _create("%s/%s" % (folder, name), data, 0o644)
    if isinstance(key, Secret):
        _create(target, key.pem, 0o600)
        key, link = target, False
        if old:
            _copy_key(key, _hidden(target), old)
            _replace(target)
    elif link and "@" not in os.path.dirname(key) and _label(key) == _label(place.archive):
        try:
            os.link(key, target, follow_symlinks=False)
        except OSError:
            pass  # another file system, or one that has no links
    if not os.path.lexists(target):
        _copy_key(key, target, key if link or not old else old)
    like = os.stat(before.folder if before and before.number else place.archive)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _dress(descriptor, like if before and before.number else os.fstat(descriptor),
               stat.S_IMODE(like.st_mode) & 0o2755)
        _flush(descriptor, folder)
    finally:
        os.close(descriptor)
    return folder


def _shake_hands(folder, leaf):
    """Complete a handshake in memory with a version's files; Failure where a server could not."""
    import ssl
    server, client = (ssl.SSLContext(protocol) for protocol in (ssl.PROTOCOL_TLS_SERVER,
                                                                ssl.PROTOCOL_TLS_CLIENT))
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    try:
        server.load_cert_chain(folder + "/fullchain.pem", folder + "/privkey.pem", lambda: "")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
        for turn in range(12):
            try:
                ends[turn % 2].do_handshake()
            except ssl.SSLWantReadError:
                pass
        if ends[0].getpeercert(binary_form=True) == leaf:
            return b"done"
        words = "another certificate"
    except (ssl.SSLError, ValueError) as error:
        words = plain(getattr(error, "reason", None) or error, 80)
    raise Failure("rehearsal", "key and certificate do not complete a handshake (%s)" % words,
                  "is the key file damaged? bring the upstream's again with --key")


def _rehearse(folder, leaf):
    """Find out before the rename what a server would find out at its reload; Failure then."""
    try:
        in_own_process(lambda: _shake_hands(folder, leaf), OPENSSL_SECONDS, unprivileged=False)
    except Failure as failure:
        raise Failure("rehearsal", str(failure), failure.hint)


def _give_up(place, number):
    """Remove, as far as the disk lets, a version that has not become the current one."""
    try:
        for folder in (place.archive, place.live, place.records):
            remove_litter(find_litter(folder))
        if not os.path.realpath(place.pointer).endswith("/%s@%d" % (place.name, number)):
            _remove_folder(place.version(number))
    except OSError:
        pass  # the next run does it


def _point(place, number):
    """Make a version the current one: the one instant of change; then whatever is no link yet.

    1. names that are missing become links to .current/NAME.pem, dangling if need be
    2. .current is replaced in one rename
    3. plain files and other links, of the same content by now, are replaced by links
    4. the links' own times are touched: inotify on a path through a link sees nothing otherwise
    """
    paths = [("%s/%s" % (place.live, name), ".current/" + name) for name in MEMBERS]
    for path, target in paths:  # 1
        if not os.path.lexists(path):
            _set_link(target, path)
    archive = os.path.relpath(os.path.realpath(place.archive), os.path.realpath(place.live))
    _set_link("%s/%s@%d" % (archive, place.name, number), place.pointer)  # 2
    _sync(place.live)
    kept = [place.version(number) + "/privkey.pem"] + staged_keys(place)
    for path, target in paths:
        if not os.path.islink(path) or os.readlink(path) != target:  # 3
            if path.endswith("/privkey.pem") and read_file(real_path(place, path), MAX_KEY) not in [
                    read_file(each, MAX_KEY) for each in kept]:
                continue  # put there just now: the next run stages it
            _set_link(target, path)
        os.utime(path, follow_symlinks=False)  # 4
    _sync(place.live)


def install_version(lineage, leaf, chain, key, state, members=None, link=False):
    """Make a new version of leaf, chain (DER) and key, and make it current; return it.

    `members` and `link` adopt what is there as it is. The `state` is recorded before the rename,
    with the hooks that it owes, so that a run that dies in between has them run by the next one.
    """
    place = lineage.place
    for folder in (place.archive, place.config + "/live", place.live):
        make_folder(folder)
    number = next_number(place)
    pems = members or (to_pem([leaf.der]), to_pem(chain), to_pem((leaf.der,) + chain))
    try:
        staged = _stage_version(place, number, lineage.current, pems, key, link)
        if not members:
            _rehearse(staged, leaf.der)
        try:
            save_state(place, state._replace(owed_version=number))
        except OSError:
            pass  # said at the end of the run: it does not stop a deployment
        os.rename(staged, place.version(number))
        _sync(place.archive)
        _point(place, number)
    except (Failure, OSError):
        _give_up(place, number)
        raise
    return Version(number, place.version(number), leaf, tuple(chain))


def point_back(lineage, version, state):
    """Make an older version current again, its hooks recorded as owed before."""
    save_state(lineage.place, state._replace(owed_version=version.number))
    _point(lineage.place, version.number)


def adopt(lineage):
    """Return the lineage with loose files as a version: identical, then links, then one rename.

    As it was where there is nothing to adopt.
    """
    place, current = lineage.place, lineage.current
    if current is None or current.number or lineage.key is None:
        return lineage
    members = [to_pem([current.leaf.der]), to_pem(current.chain),
               to_pem((current.leaf.der,) + current.chain)]
    for position, name in enumerate(MEMBERS[:3]):
        path = "%s/%s" % (place.live, name)
        if os.path.lexists(path):
            members[position] = read_file(real_path(place, path), MAX_OFFER)
            if not holds_only_certificates(members[position]):
                raise Failure(None, "%s holds more than certificates" % path, "take the rest out")
    version = install_version(lineage, current.leaf, current.chain, lineage.key, lineage.state,
                              members, link=True)
    return lineage._replace(current=version, key=version.folder + "/privkey.pem")


def prune(place, current):
    """Remove versions: kept are the current one, the five newest, at most two keys among them.

    Of keys that are not the current one only the newest version stays.
    """
    others = 0
    for position, number in enumerate(version_numbers(place)):
        version = load_version(place, number)
        other = version is not None and version.leaf.public_key != current.leaf.public_key
        others += other
        if number != current.number and (position >= KEPT_VERSIONS or version is None or (
                other and others > 1)):
            _remove_folder(place.version(number))
    _sync(place.archive)


def rollback_target(lineage):
    """Return the newest Version before the current one that was not itself rolled back from."""
    current = lineage.current
    for version in load_versions(lineage.place) if current and current.number else ():
        if version.number < current.number and version.leaf.der != current.leaf.der and fingerprint(
                version.leaf.der) not in lineage.state.rolled_back:
            return version
    return None


def remove_unfinished(lineage, litter):
    """Remove litter, and a version that was named and never made current; return the paths."""
    place, number = lineage.place, lineage.state.owed_version
    found = find_litter(place.live) + [path for path in litter if os.path.basename(
        path).startswith((".%s@" % place.name, ".%s." % place.name))]
    remove_litter(found)
    if number > pointed_number(place) and os.path.isdir(place.version(number)):
        _remove_folder(place.version(number))
        found.append(place.version(number))
    return found


def mend_links(place, current):
    """Make live links whole beside a .current; return (paths mended, a Secret put there or None).

    A plain file of the same content becomes a link again. A private key of another content is
    returned, to be staged, and the current one is kept. Somebody's own certificate stays until the
    next deploy.
    """
    mended, key = [], None
    for name in MEMBERS:
        path, target = "%s/%s" % (place.live, name), ".current/" + name
        if os.path.islink(path) and os.readlink(path) == target:
            continue
        real = real_path(place, path)
        if os.path.lexists(real):
            data = read_file(real, MAX_OFFER)
            if data != read_file("%s/%s" % (current.folder, name), MAX_OFFER):
                if name != "privkey.pem":
                    continue
                key = Secret(data)
        mended.append((path, target))
    return mended, key


def link_again(place, mended):
    """Replace the paths that mend_links() found by links."""
    for path, target in mended:
        _set_link(target, path)
    if mended:
        _sync(place.live)


def restore_key(lineage):
    """Put back the key of the current version: another version's, or a staged one, that fits it;
    say whether one did."""
    current, target = lineage.current, lineage.current.folder + "/privkey.pem"
    paths = [version.folder + "/privkey.pem" for version in load_versions(lineage.place)
             if version.number != current.number
             and version.leaf.public_key == current.leaf.public_key]
    for path in paths + staged_keys(lineage.place):
        try:
            if public_half(read_file(path, MAX_KEY), True) == current.leaf.public_key:
                _copy_key(path, _hidden(target), path if path in paths else target)
                _replace(target)
                _sync(current.folder)
                return True
        except (FileNotFoundError, ValueError, Failure):
            pass
    return False


def mend_certificates(current):
    """Make cert.pem and chain.pem of the current version again where they are not what its
    fullchain.pem says; return the paths."""
    mended = []
    for name, ders in (("cert.pem", [current.leaf.der]), ("chain.pem", list(current.chain))):
        path = "%s/%s" % (current.folder, name)
        try:
            sound = read_pem(read_file(path, MAX_OFFER))[0] == ders
        except (ValueError, FileNotFoundError):
            sound = False
        if not sound:
            write_file(path, to_pem(ders), 0o644)
            mended.append(path)
    return mended


def remove_key(path):
    """Remove a staged key that has become the lineage's."""
    os.unlink(path)


def lock(config):
    """Hold the config dir for this run; Failure where another process holds it for a minute.

    The lock is on the folder itself and ends with the process: nothing is left behind.
    """
    import fcntl
    descriptor = os.open(config, os.O_RDONLY | os.O_DIRECTORY)
    deadline, holder = time.monotonic() + LOCK_SECONDS, "another process"
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    try:
        inode = ":%d" % os.fstat(descriptor).st_ino
        with open("/proc/locks") as file:  # 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
            found = [line.split() for line in file if "FLOCK" in line and inode + " " in line]
        holder = "process " + found[0][4]
    except (OSError, IndexError):
        pass
    raise Failure(None, "%s holds %s for over %d s" % (holder, config, LOCK_SECONDS),
                  "wait for it, or look at what it does")


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------


def hook_files(config, kind):
    """Return the hooks in renewal-hooks/KIND as certbot would run them: executable, sorted."""
    folder = "%s/renewal-hooks/%s" % (config, kind)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
    paths = [folder + "/" + name for name in names if not name.endswith("~")]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def deploy_hooks(config, options):
    """Return what a deploy runs: the directory's files, then the lineage's own, each once."""
    return list(collections.OrderedDict.fromkeys(
        hook_files(config, "deploy") + list(options.deploy_hooks)))


def _start_hook(hook, inside, environment):
    """Return the started process of a hook: a program in renewal-hooks, or a shell command."""
    import subprocess
    command = hook.encode("utf-8", "surrogateescape")
    for arguments in [command] if inside else ["/bin/sh", "-c", command], ["/bin/sh", command]:
        try:
            return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, cwd="/", env=environment,
                                    start_new_session=True)
        except OSError as error:
            if error.errno != errno.ENOEXEC or len(arguments) > 1:  # no #! line: sh's, as ever
                raise


def run_hook(hook, config, environment, variables, pass_on):
    """Run a hook and return ("" or what went wrong, seconds it took).

    Its output goes to pass_on(bytes) as it comes. It is over when its own process ends: what it
    started in the background may live on, with the pipe.
    """
    started, last, ended = time.monotonic(), b"", False
    inside = hook.startswith(config + "/renewal-hooks/")
    environment = {key: value for key, value in environment.items() if key not in CREDENTIALS}
    environment.update(variables, PATH=":".join(filter(None, (environment.get("PATH"), SAFE_PATH))))
    try:
        for path in (os.path.dirname(hook), hook, os.path.realpath(hook)) if inside else ():
            refuse_foreign(path, os.lstat(path))
        process = _start_hook(hook, inside, environment)
    except Failure as failure:
        return "%s: %s" % (failure, failure.hint), 0.0
    except OSError as error:
        return os.strerror(error.errno or 0).lower(), 0.0
    with process.stdout as output:
        while not ended:
            ended = process.poll() is not None
            if time.monotonic() - started > HOOK_SECONDS:
                kill_group(process)
                return "did not end in %d s" % HOOK_SECONDS, time.monotonic() - started
            while select.select([output], [], [], 0 if ended else 0.05)[0]:
                piece = os.read(output.fileno(), 65536)
                pass_on(piece)
                last = (last + piece)[-400:]
                if not piece:
                    time.sleep(0 if process.poll() is not None else 0.01)
                    break
    words = plain(last.decode("utf-8", "replace").strip().split("\n")[-1], 120)
    status = process.returncode
    return status and "status %d%s" % (status, words and ", " + words) or "", (
        time.monotonic() - started)


def hook_variables(place, domains):
    """Return the environment of a deploy hook, as certbot sets it."""
    return {"RENEWED_LINEAGE": place.live, "RENEWED_DOMAINS": " ".join(domains)}


def alert_wanted(state, health, now):
    """Say whether alert hooks have to run: at a turn to, within or from bad health, and daily."""
    bad = ("warning", "critical", "unknown")
    if health in bad:
        # a timer's accuracy must not make it a day and a half
        return state.told != health or not 0 <= now - (state.told_at or 0) < DAY - 600
    return state.told in bad


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

_PRIORITIES = {"problem": "<3>", "warning": "<4>", "detail": "<7>"}
HEALTHS = ("ok", "due", "warning", "critical", "unknown")


def describe(outcome, now):
    """Return what a result line says after the result: names, end of validity, source."""
    if outcome.version is None:
        return plain(outcome.message or outcome.reason or "")
    leaf = outcome.version.leaf
    text = "%s, valid until %s (%d days)" % (
        plain(" ".join(leaf.domains[:8]), 200), iso_time(leaf.not_after)[:10], days_left(leaf, now))
    if outcome.result == "deferred":
        text += ", " + outcome.reason
    return text + (", from " + outcome.source if outcome.source else "")


class Reporter:
    """What a run says: results on standard output, problems on standard error, or one JSON."""

    def __init__(self, quiet=False, verbose=False, as_json=False, now=0):
        """Look whether it is the journal that reads: then lines carry priorities."""
        self.quiet, self.verbose, self.as_json, self.now = quiet, verbose, as_json, now
        self.mark = ""  # what is said after a result: that it is a dry run
        self.progress, self.failed, journal = False, False, os.environ.get("JOURNAL_STREAM")
        info = os.fstat(2) if journal else None
        self.priorities = _PRIORITIES if info and journal == "%d:%d" % (
            info.st_dev, info.st_ino) else {}

    def _write(self, stream, line):
        """Write one line; a reader that has gone away is no reason to stop ferrying."""
        try:
            self.clear()
            stream.write(line.encode("ascii", "backslashreplace").decode("ascii") + "\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass

    def line(self, text):
        """Write a line of results."""
        if not (self.quiet or self.as_json):
            self._write(sys.stdout, text)

    def problem(self, name, message, hint="", kind="problem"):
        """Write the line of a problem or a warning: what is wrong, what to do about it."""
        self.failed = self.failed or kind == "problem"
        parts = [part for part in ("certferry", name, plain(message), hint) if part]
        self._write(sys.stderr, self.priorities.get(kind, "") + ": ".join(
            plain(part, 600) for part in parts))

    def detail(self, name, text):
        """Write what only --verbose shows."""
        if self.verbose:
            self._write(sys.stderr, "%scertferry: %s: %s" % (
                self.priorities.get("detail", ""), name, plain(text)))

    def short_help(self, text):
        """Write what there is to type, where nothing was."""
        self._write(sys.stderr, text)

    def step(self, position, count, name):
        """Show how far a long run is, on a terminal only."""
        if count > 9 and not (self.quiet or self.as_json) and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K[%*d/%d] %s ..." % (len(str(count)), position, count, name))
            sys.stderr.flush()
            self.progress = True

    def clear(self):
        """Take the line of progress away."""
        if self.progress:
            self.progress = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def pass_on(self, data):
        """Pass a hook's output on; what a quiet run needs of it stands in its problem's line."""
        if self.quiet:
            return
        stream = sys.stderr if self.as_json else sys.stdout
        try:
            stream.flush()
            os.write(stream.fileno(), data)
        except (OSError, ValueError, AttributeError):
            pass

    def outcome(self, outcome):
        """Write the result of one lineage, or its problem; warnings are a problem that can wait."""
        name, result = outcome.name, outcome.result
        if result in WELL + SOUND:
            self.line("%s: %s: %s%s" % (name, result, describe(outcome, self.now), self.mark))
            for line in outcome.lines:
                self.line("  " + line)
        if result in ("refused", "failed", "pending", "deferred"):
            self.problem(name, outcome.message, outcome.hint,
                         "warning" if result == "deferred" else "problem")

    def document(self, objects, dry_run=False):
        """Write the one JSON document."""
        import json
        document = {"lineages": sorted(objects, key=lambda item: item["name"])}
        if dry_run:
            document["dry_run"] = True
        self._write(sys.stdout, json.dumps(document, indent=2))


def as_object(outcome):
    """Return one lineage as JSON shows it."""
    version = outcome.version
    leaf = version.leaf if version else None
    detail = ": ".join(part for part in (outcome.message, outcome.hint) if part)
    return collections.OrderedDict((
        ("name", outcome.name), ("result", outcome.result), ("reason", outcome.reason or None),
        ("detail", plain(detail, 600) or None), ("changed", outcome.changed),
        ("source", outcome.source or None),
        ("not_before", iso_time(leaf.not_before) if leaf else None),
        ("not_after", iso_time(leaf.not_after) if leaf else None),
        ("serial", leaf.serial if leaf else None),
        ("fingerprint_sha256", fingerprint(leaf.der) if leaf else None),
        ("domains", list(leaf.domains) if leaf else None),
        ("version", version.number if version else None), ("health", outcome.health)))


_METRICS = (  # name, what it is, its value from (lineage, outcome, seconds of the run)
    ("certificate_not_after_timestamp_seconds", "When the certificate in service expires.",
     lambda lineage, outcome: outcome.version and outcome.version.leaf.not_after),
    ("certificate_not_before_timestamp_seconds", "When the certificate in service began.",
     lambda lineage, outcome: outcome.version and outcome.version.leaf.not_before),
    ("last_check_timestamp_seconds", "When certferry last looked.",
     lambda lineage, outcome: lineage and lineage.checked),
    ("last_success_timestamp_seconds", "When a source last confirmed or renewed the certificate.",
     lambda lineage, outcome: lineage and last_good(lineage, float("inf"))),
    ("health", "0 ok, 1 due, 2 warning, 3 critical, 4 unknown.",
     lambda lineage, outcome: HEALTHS.index(outcome.health)),
    ("pending", "1 while a hook or a service that must show the new leaf is waited for.",
     lambda lineage, outcome: int(bool(lineage and (
         lineage.state.owed or lineage.state.unserved)))),
    ("upstream_not_after_timestamp_seconds", "When the certificate accepted last expires.",
     lambda lineage, outcome: lineage and lineage.state.upstream_not_after))


def format_metrics(pairs, seconds):
    """Return Prometheus text format for [(Lineage or None, Outcome)] and a run's duration."""
    lines = []
    for name, what, value in _METRICS:
        samples = [(outcome.name, value(lineage, outcome)) for lineage, outcome in pairs]
        samples = [sample for sample in samples if sample[1] is not None]
        if samples:
            lines += ["# HELP certferry_%s %s" % (name, what), "# TYPE certferry_%s gauge" % name]
            lines += ['certferry_%s{name="%s"} %d' % ((name,) + sample) for sample in samples]
    lines += ["# HELP certferry_run_duration_seconds How long this run took.",
              "# TYPE certferry_run_duration_seconds gauge",
              "certferry_run_duration_seconds %.3f" % seconds]
    return "".join(line + "\n" for line in lines).encode("ascii")


def _status_sentence(lineage, outcome):
    """Return what the first line of `status` says of one lineage."""
    text = "%s %s" % (outcome.name, outcome.why)
    state = lineage.state if lineage else NO_STATE
    if state.result in ("refused", "failed", "deferred", "pending") and state.reason:
        text += ": %s %s for %d runs: %s since %s" % (
            state.source or "its source", state.result, state.runs, state.reason,
            (iso_time(state.since) or "?")[:10])
    elif state.result in ("installed", "unchanged") and outcome.why.startswith("expires"):
        text += ": %s still offers the same certificate" % state.source
    return text


def _status_row(lineage, outcome, now):
    """Return the cells of one lineage's row."""
    if lineage is None:
        return (outcome.name, outcome.health, "-", "-", "-", "-", plain(outcome.message, 120))
    state, options, left = lineage.state, lineage.options, "-"
    if outcome.version:
        leaf = outcome.version.leaf
        left = "%d of %d (%d%%)" % (days_left(leaf, now), leaf.lifetime // DAY, max(
            0, 100 * (leaf.not_after - now) // leaf.lifetime))
    pending = list(state.owed) + (["not-served"] if state.unserved else [])
    if state.result in ("refused", "failed", "deferred"):
        pending.append("%s (%d runs)" % (state.reason or state.result, state.runs))
    good = last_good(lineage, now)
    return (outcome.name, outcome.health, left,
            " ".join(source.text for source in options.sources) or "%s:443" % outcome.name,
            (iso_time(lineage.checked) or "never")[:16], (iso_time(good) or "never")[:16],
            plain(", ".join(pending + list(outcome.lines)), 200))


def _table(rows, columns):
    """Return rows of cells as lines; wider than the terminal, times and source go."""
    for dropped in (None, 5, 4, 3):
        rows = [row[:dropped] + row[dropped + 1:] if dropped else row for row in rows]
        widths = [max(map(len, cells)) for cells in zip(*rows)][:-1] + [0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                 for row in rows]
        if max(map(len, lines)) <= columns:
            break
    return lines


def status_lines(pairs, now, columns=1000):
    """Return the lines of `status`: a plugin line for monitoring, then a table for a person."""
    words = {"ok": "OK", "due": "OK", "warning": "WARNING", "critical": "CRITICAL",
             "unknown": "UNKNOWN"}
    order = ("critical", "unknown", "warning", "due", "ok")
    worst = sorted(pairs, key=lambda pair: order.index(pair[1].health))
    word = words[worst[0][1].health] if worst else "UNKNOWN"
    bad = [pair for pair in worst if words[pair[1].health] != "OK"]
    said = "; ".join(_status_sentence(*pair) for pair in bad[:3]) + (
        "; and %d more" % (len(bad) - 3) if len(bad) > 3 else "")
    if not bad:
        said = "%d lineage%s" % (len(pairs), "" if len(pairs) == 1 else "s") if pairs else (
            "there is no lineage: certferry NAME sets one up")
    data = []
    for lineage, outcome in pairs:
        if lineage and outcome.version:
            leaf = outcome.version.leaf
            data.append("'%s'=%dd;%d;%d" % (
                (outcome.name, days_left(leaf, now)) + tuple(
                    int(threshold(share, leaf.lifetime) // DAY)
                    for share in (lineage.options.warn, lineage.options.critical))))
    data = " | " + " ".join(data) if data else ""
    lines = ["CERTFERRY %s - %s%s" % (word, plain(said, 600), data)]
    rows = [("NAME", "HEALTH", "DAYS LEFT", "SOURCE", "LAST CHECKED", "LAST SUCCESS", "PENDING")]
    rows += [_status_row(lineage, outcome, now) for lineage, outcome in pairs]
    return lines + (_table(rows, columns) if pairs else [])


# --------------------------------------------------------------------------------------------------
# Ferry
# --------------------------------------------------------------------------------------------------

# What holds for every lineage of a run; `command` is crossing (certferry NAME), renew or rollback,
# `now` the clock, read once; `changes` are the options that this command gave, `pem` its --key,
# `litter` the paths of what an interrupted run left.
Run = collections.namedtuple("Run", (
    "config environment now command dry_run force network report changes pem litter"))

# What is to be deployed, or that there is nothing new (`same`); `key` is a path or a Secret.
Decision = collections.namedtuple("Decision", "offer leaf chain key same")


def is_certbots(place):
    """Say whether a lineage is certbot's: its conf is not empty, its links avoid .current."""
    if not os.path.isfile(place.renewal) or not os.path.getsize(place.renewal):
        return False
    paths = ["%s/%s" % (place.live, name) for name in MEMBERS]
    return not os.path.lexists(place.pointer) or any(
        os.path.islink(path) and not os.readlink(path).startswith(".current/") for path in paths)


def load_record(place):
    """Return the Lineage that its state alone makes.

    A damaged state is a notice and counts as none: what it held is found out again.
    """
    lineage = Lineage(place, None, NO_OPTIONS, NO_STATE, None, None, None, ())
    if not os.path.lexists(place.state):
        return lineage
    check_folder(place.records)
    lineage = lineage._replace(checked=int(os.stat(place.state).st_mtime))
    try:
        return lineage._replace(state=parse_state(read_text(place.state), place.state))
    except Failure as failure:
        return lineage._replace(notices=("%s: what it held is found out again" % failure,))


def load_lineage(place):
    """Return the Lineage that the files in the config dir make; Failure where they cannot be."""
    for folder in (place.config + "/live", place.live, place.records, place.archive):
        if os.path.lexists(folder):
            check_folder(folder)
    given, options = parse_conf(read_text(place.conf), place.conf) if os.path.lexists(
        place.conf) else (None, NO_OPTIONS)
    current = find_current(place)
    return load_record(place)._replace(given=given, options=options, current=current,
                                       key=find_key(place, current))


def discover(config):
    """Return ([Place] that `renew` takes, [(name, notice)]) of what is in the config dir."""
    places, notices = [], []
    names, records = (os.listdir(folder) if os.path.isdir(folder) else () for folder in (
        config + "/live", config + "/certferry"))
    confs = {name[:-5] for name in records if name.endswith(".conf") and name[0] != "."}
    for place in (Place(config, name) for name in sorted(confs.union(names))):
        name, here = place.name, os.path.isdir(place.live)
        try:
            valid = host_name(name) == name and ("." in name or is_address(name))
        except ValueError:
            valid = False
        if os.path.islink(place.live) and os.path.dirname(os.path.realpath(
                place.live)) == os.path.realpath(config + "/live"):
            continue  # an administrator's other name for a lineage
        if not valid or here and os.stat(place.live).st_uid not in (0, os.geteuid()):
            if here or name in confs:  # not certbot's README
                notices.append((plain(name, 80), "skipped: it %s" % (
                    "belongs to another user" if valid else "is no host name")))
        elif name in confs or os.path.lexists(place.pointer):
            places.append(place)
        elif os.path.lexists(place.live + "/privkey.pem") and not is_certbots(place):
            if any(file.endswith((".pem", ".crt", ".cer")) and not file.startswith("privkey")
                   for file in os.listdir(place.live)):
                notices.append((name, "%s holds certificates of another tool: left alone until "
                                "certferry %s adopts them" % (place.live, name)))
            else:
                places.append(place)
    return places, notices


def _no_key(lineage):
    """Return the Failure of a lineage without a private key."""
    name, sources = lineage.place.name, lineage.options.sources
    return Failure("no-key", "no private key in %s/privkey.pem" % lineage.place.live, (
        "bring the upstream's: ssh %s cat %s/live/%s/privkey.pem | certferry %s --key -%s" % (
            sources[0].host if sources and sources[0].host else "UPSTREAM", CONFIG_DIR, name, name,
            "".join(" --from " + source.text for source in sources[:1]))))


def read_roots(path):
    """Return ([Certificate], PEM bytes) of a --ca-file, (None, b"") without one; or Failure."""
    if path is None:
        return None, b""
    try:
        with open(path, "rb") as file:  # as the caller: its folder may be closed to nobody
            data = file.read(4 * MAX_OFFER)
        roots = [parse_certificate(binascii.a2b_base64(content))
                 for label, content, _ in pem_blocks(data) if label == b"CERTIFICATE"]
        if roots:
            return roots, data
        words = "there is no certificate in PEM form in it"
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
    raise Failure("untrusted", "the --ca-file %s cannot be used (%s)" % (path, words),
                  "give a PEM file of roots")


def _parse_offer(offer):
    """Return [Certificate] of an offer, its leaf first; Failure where one is no strict DER."""
    try:
        ders = (offer.leaf,) + (offer.chain or ())
        if len(ders) > MAX_CERTIFICATES:
            raise ValueError("more than %d certificates" % MAX_CERTIFICATES)
        for der in ders:
            check_strict(der)
        return [parse_certificate(der) for der in ders]
    except (ValueError, IndexError) as error:
        raise Failure("malformed", "%s: a certificate that is no strict DER (%s)" % (
            offer.source.text, error), "look at what it holds")


def run_hooks(run, hooks, variables, name=""):
    """Run hooks that are not tried again, alert or post hooks; say whether any started."""
    started = False
    for hook in hooks:
        wrong, seconds = run_hook(hook, run.config, run.environment, variables,
                                  run.report.pass_on)
        started = started or seconds > 0
        if wrong:
            run.report.problem(name, "the hook %s failed (%s)" % (hook, wrong), (
                "run it by hand: it is not tried again"), "warning" if name else "problem")
    return started


def alert(run, lineage, outcome):
    """Run the alert hooks where health calls for it; return the state that remembers it."""
    state, leaf = lineage.state, lineage.current and lineage.current.leaf
    hooks = hook_files(run.config, "alert")
    if not hooks or not alert_wanted(state, outcome.health, run.now):
        return state
    variables = {
        "CERTFERRY_NAME": outcome.name, "CERTFERRY_HEALTH": outcome.health,
        "CERTFERRY_WAS": state.told or "ok", "CERTFERRY_REASON": outcome.reason or "",
        "CERTFERRY_DETAIL": plain(outcome.message or outcome.why),
        "CERTFERRY_NOT_AFTER": iso_time(leaf.not_after) if leaf else "",
        "CERTFERRY_DAYS_LEFT": str(days_left(leaf, run.now)) if leaf else ""}
    if run_hooks(run, hooks, variables, outcome.name):
        return state._replace(told=outcome.health, told_at=run.now)
    return state


def fits(public_key, leaf):
    """Say whether a public key, as openssl printed it, is a leaf's."""
    return public_key == leaf.public_key or public_key == leaf_public_key(leaf.der)


class Crossing:
    """One lineage's way through a run: from its files to an Outcome.

    What goes wrong is kept in `failure`, the first that did: every step is an attempt, and what
    was pending before is tried again all the same.
    """

    def __init__(self, run, place):
        """Begin with nothing known."""
        self.run, self.place, self.lineage, self.failure = run, place, None, None
        self.state, self.decision, self.fresh, self.changed = NO_STATE, None, False, False
        self.keys, self.added, self.number, self.served = None, None, None, []
        self.misfit, self.lines, self.due, self.waits, self.skipped = False, [], True, False, False

    def attempt(self, step):
        """Do a step and return what it returns, or None where it failed."""
        started = time.monotonic()
        try:
            return step()
        except Failure as failure:
            self.failure = self.failure or failure
        except OSError as error:
            self.failure = self.failure or storage_failure(error)
        finally:
            self.run.report.detail(self.place.name, "%s: %.3f s" % (
                step.__name__.replace("_", " "), time.monotonic() - started))
        return None

    def say(self, message, hint=""):
        """Write a warning line about this lineage."""
        self.run.report.problem(self.place.name, message, hint, "warning")

    def prepare(self):
        """Read the lineage and make whole what an interrupted run or a hand left; Failure where
        nothing can be ferried, before any network."""
        run, place = self.run, self.place
        if is_certbots(place):
            raise Failure("certbot", "certbot renews it here (renewal/%s.conf)" % place.name, (
                "to hand it over, mv %s away (not 'certbot delete', which removes the files that "
                "your servers read), then the same command again" % place.renewal))
        self.lineage = load_lineage(place)
        self.state = self.lineage.state
        if run.command != "crossing" and self.lineage.given is None and not os.path.lexists(
                place.pointer) and (self.lineage.current or not self.lineage.key):
            words = "is another tool's" if self.lineage.current else "is not here"
            raise Failure(None, "there is no such lineage: %s %s" % (place.live, words),
                          "certferry %s sets it up" % place.name)
        self.skipped = run.command == "renew" and self.lineage.options.enabled == "no"
        if self.skipped:
            return
        if run.changes:
            given = merge_options(self.lineage.given or {}, run.changes)
            self.lineage = self.lineage._replace(options=parse_options(given))
        if os.path.lexists(place.renewal):
            self.say("renewal/%s.conf is %s" % (place.name, "beside a lineage of certferry's" if (
                os.path.getsize(place.renewal)) else "empty, left by a certbot run that failed"),
                "move it away, 'certbot renew' fails over it")
        for notice in self.lineage.notices:
            self.say(notice)
        number = self.lineage.current and self.lineage.current.number
        if self.state.owed and self.state.owed_version != number:  # a run died before its rename
            before = self.state.owed if self.state.result == "pending" else ()
            self.state = self.state._replace(owed=before, owed_version=number or 0)
        if not run.dry_run:
            self.mend()
        if run.pem is not None:
            self.add_key()
        self.check_key()
        current, options = self.lineage.current, self.lineage.options
        self.due = options.when == "always" or run.command != "renew" or run.force or (
            not current or run.now >= due_time(current.leaf))

    def mend(self):
        """Remove what an interrupted run left, make live links whole, see to staged keys."""
        place, current = self.place, self.lineage.current
        removed = remove_unfinished(self.lineage, self.run.litter)
        if removed:
            self.say("removed what an interrupted run left: " + " ".join(removed))
        if current and current.number:
            mended, key = mend_links(place, current)
            if key:
                try:
                    self.say("%s/privkey.pem does not fit the certificate: it is staged as %s" % (
                        place.live, stage_key(place, key.pem, public_half(key.pem, True))))
                except ValueError as error:
                    raise Failure("no-key", "%s/privkey.pem %s" % (place.live, error),
                                  "put the right key there, or remove it")
            link_again(place, mended)
            again = [path for path, _ in mended] + mend_certificates(current)
            if again:
                self.say("made whole again from the current version: " + " ".join(again))
        for path in staged_keys(place):
            key = self.lineage.key
            try:
                if key and read_file(path, MAX_KEY) == read_file(key, MAX_KEY):
                    remove_key(path)  # it has become the lineage's, and the run died there
                    continue
            except (OSError, Failure) as error:
                self.say("the staged key %s is left alone (%s)" % (path, error))
                continue
            if self.run.now - os.stat(path).st_mtime > STAGED_KEY_DAYS * DAY:
                self.say("%s waits for over %d days" % (path, STAGED_KEY_DAYS), "remove it if it "
                         "was forgotten")

    def add_key(self):
        """Take the private key of --key: the lineage's if it has none, else a staged one."""
        try:
            key = read_pem(self.run.pem)[1]
            public = public_half(key.pem if key else b"", True)
        except ValueError as error:
            raise Failure("no-key", "--key: %s" % error, "give one private key as PEM")
        if public in self.own_keys():
            return
        first = self.lineage.key is None
        self.added = key if self.run.dry_run else stage_key(self.place, key.pem, public, first)
        self.keys[public], self.changed = self.added, True
        self.lines.append("%s  %s" % (
            "key added  " if first else "staged key ", describe_key(public)))
        if first and not self.run.dry_run:
            self.lineage = self.lineage._replace(key=self.added)

    def check_key(self):
        """See that there is a usable key; Failure (no-key) otherwise.

        The record in the state spares the openssl process as long as key file and leaf stay what
        they are. A key that was written through the link and does not fit is staged, and the one
        that fits is put back.
        """
        lineage, current, place = self.lineage, self.lineage.current, self.place
        if lineage.key is None:
            if self.added or any(source.may_hold_key for source in lineage.options.sources):
                return
            raise _no_key(lineage)
        record = current and key_record(lineage.key, current.leaf.public_key)
        if current and record == lineage.state.key:
            return
        try:
            try:
                pem = read_file(lineage.key, MAX_KEY)
            except Failure as failure:
                raise ValueError("cannot be used (%s)" % failure)
            public = public_half(pem, True)
        except ValueError as error:
            raise Failure("no-key", "%s/privkey.pem %s" % (place.live, error), "put the right one "
                          "there")
        if current is None or fits(public, current.leaf):
            self.state = self.state._replace(key=record or "")
            if lineage.key and os.stat(lineage.key).st_mode & 0o004:
                self.say("%s/privkey.pem can be read by everybody" % place.live, "chmod o-r")
        elif current.number is None:
            self.lineage = lineage._replace(current=None)  # no set: a key that waits for its offer
        else:
            self.misfit = True
            if not self.run.dry_run:
                path = stage_key(place, pem, public)
                self.misfit = not restore_key(lineage)
                self.say("a key that does not fit was written over %s: it is staged as %s%s" % (
                    lineage.key, path, "" if self.misfit else ", and the one that fits is back"))

    def job(self, source, own=""):
        """Return the Job that asks a source for this lineage's certificate."""
        options, current = self.lineage.options, self.lineage.current
        want, _, way = self.state.way.partition(" ")
        named = [domain for domain in options.domains if not domain.startswith("*.")]
        return Job(source.kind, source.host, source.port, options.sni or (
            named or [self.place.name])[0], options.timeout, checksum(
                current.leaf.der) if current else "", want, way, own, "")

    def sources(self):
        """Return the sources in the order in which they are asked."""
        return self.lineage.options.sources or (parse_source(endpoint_text(self.place.name, 443)),)

    def begin(self):
        """Have the network process ask the first source and look at what is served, by now."""
        if self.due and not self.sources()[0].may_hold_key:
            self.number = self.submit(self.sources()[0])
        if self.run.command == "renew" or "served-at" in self.run.changes:
            self.look()

    def submit(self, source, **asked):
        """Ask the network process for an exchange; return its number."""
        own = "" if self.lineage.options.sources else "own"
        return self.run.network.submit(self.job(source, own)._replace(**asked))

    def look(self):
        """Ask the network process what the local services present."""
        self.served = [(source, self.run.network.submit(self.job(source)))
                       for source in self.lineage.options.served_at]

    def not_served(self):
        """Return what is wrong with the services that look() asked, one line each."""
        wrong, leaf = [], self.lineage.current.leaf
        for source, number in self.served:
            try:
                offer = tls_offer(source, self.run.network.answer(number))
                if offer.leaf != leaf.der:
                    other = parse_certificate(offer.leaf)
                    wrong.append("%s still serves the certificate of %s (serial %s)" % (
                        source.text, iso_time(other.not_before)[:10], other.serial[:20]))
            except (Failure, ValueError) as error:
                wrong.append(str(error))
        self.served = []
        return wrong

    def own_keys(self):
        """Return {public key: path, or a Secret that is not on disk} of the keys to fit."""
        if self.keys is None:
            self.keys = collections.OrderedDict()
            paths = [self.lineage.key] if self.lineage.key else []
            for path in paths + staged_keys(self.place):
                try:
                    self.keys.setdefault(public_half(read_file(path, MAX_KEY), True), path)
                except (ValueError, OSError, Failure) as error:
                    self.say("%s %s" % (path, error), "remove it, or bring it again with --key")
        return self.keys

    def wanted(self, whole=True):
        """Return what the judge compares an offer with; without `whole`, for the current leaf."""
        state, domains, current = self.state, self.lineage.options.domains, self.lineage.current
        wanted = Wanted(self.place.name, domains, current, {}, (), (), (), ())
        if not whole:
            return wanted
        keys, marks, rolled = self.own_keys(), set(), {}
        for version in load_versions(self.place):
            if current and version.leaf.der != current.leaf.der:
                marks.add(fingerprint(version.leaf.der))
                if fingerprint(version.leaf.der) in state.rolled_back:
                    rolled.setdefault(version.leaf.public_key, version.folder + "/privkey.pem")
        rolled = {public: path for public, path in rolled.items() if public not in keys}
        if self.run.force:
            for version in load_versions(self.place):
                keys.setdefault(version.leaf.public_key, version.folder + "/privkey.pem")
            return wanted._replace(keys=keys, replaced=marks)
        return wanted._replace(keys=keys, replaced=marks, retired=state.retired,
                               rolled_back=state.rolled_back, rolled_keys=rolled)

    def trust(self, leaf, others):
        """Return ("" or why a leaf is not trusted, its chain as it would be written)."""
        roots, pem = read_roots(self.lineage.options.ca_file)
        results = []
        for chain in order_chains(leaf, others):
            flaws = [("the leaf " if depth == 0 else "issuer %d of the chain " % depth) + wrong
                     for depth, wrong in enumerate(flaw(each, each is leaf)
                                                   for each in (leaf,) + chain) if wrong]
            wrong = flaws[0] if flaws else verify_chain(leaf, chain, roots, pem, self.run.now)
            results.append((wrong, chain))
            if not wrong:
                break
        return results[-1] if not results[-1][0] else results[0]

    def examine(self, offer):
        """Return the Decision on an offer; Failure where the judge refuses it."""
        current, now = self.lineage.current, self.run.now
        same = current is not None and offer.leaf == current.leaf.der
        strict = "domain" in self.run.changes or "ca-file" in self.run.changes
        if same and not strict and offer.chain in (None, current.chain):
            evidence = Evidence(offer, current.leaf, None, None, "")
            verdict = judge(evidence, self.wanted(False), now, same=True)
            decision = Decision(offer, current.leaf, current.chain, self.lineage.key, True)
        else:
            leaf, *others = _parse_offer(offer._replace(chain=current.chain) if (
                offer.chain is None and same) else offer)
            public, carried = leaf_public_key(leaf.der), None
            try:
                carried = public_half(offer.key.pem, False) if offer.key else None
                wrong = "" if public else "openssl cannot read its certificate"
            except ValueError as error:
                wrong = "its private key %s" % error
            if wrong:
                raise Failure("malformed", "%s: %s" % (offer.source.text, wrong), "look at it")
            trust, chain = self.trust(leaf, others)
            chain, wanted = tuple(issuer.der for issuer in chain), self.wanted()
            if not wanted.keys and carried is None:
                raise _no_key(self.lineage)
            verdict = judge(Evidence(offer, leaf, public, carried, trust), wanted, now,
                            force=self.run.force)
            decision = Decision(offer, leaf, chain, wanted.keys.get(public, offer.key),
                                same and chain == current.chain)
            if must_staple(leaf) and not same and not verdict.reason:
                self.say("the certificate asks for OCSP stapling", "see that the server staples")
        if verdict.reason:
            raise Failure(*verdict)
        return decision

    def ask(self, source):
        """Return the Decision on what a source offers: of the key type that is here, and of the
        other addresses of its name where one hands out an older certificate."""
        if source.may_hold_key:
            return self.examine(FETCHERS[source.kind](source, self.job(source),
                                                      self.run.environment))
        number, self.number = self.number or self.submit(source), None
        asked, stale = [], None
        while True:
            answer = self.run.network.answer(number)
            if stale and answer.reason:
                raise stale
            offer = tls_offer(source, answer)
            try:
                return self.examine(offer._replace(way=self.state.way and offer.way and (
                    "%s %s" % (self.state.way.split()[0], offer.way))))
            except Failure as failure:
                if failure.reason == "key-mismatch":
                    return self.ask_other_type(source, offer, failure)
                if failure.reason != "older" or len(asked) > MAX_CERTIFICATES:
                    raise
                stale = stale or failure
                asked.append(offer.address)
                number = self.submit(source, skip=",".join(asked))

    def ask_other_type(self, source, offer, failure):
        """Return the Decision on the certificate of another key type that the server may have."""
        def kind(public_key):
            return key_kind(public_key).split()[0]

        offered = kind(parse_certificate(offer.leaf).public_key)
        for want in sorted({kind(public) for public in self.own_keys()} - {offered}):
            if want in ("RSA", "ECDSA", "Ed25519"):
                answer = self.run.network.answer(self.submit(source, want=want, way="", known=""))
                other = None if answer.reason else tls_offer(source, answer)
                if other and kind(parse_certificate(other.leaf).public_key) == want:
                    return self.examine(other._replace(way="%s %s" % (want, answer.way)))
        raise failure

    def decide(self):
        """Return the Decision of the first source with an acceptable offer; or the gravest Failure.

        Where a renewal is due and a source has only the current leaf, the next one is asked too.
        """
        failures, unchanged = [], None
        current = self.lineage.current
        due = current and self.run.now >= due_time(current.leaf)
        for source in self.sources():
            started, result = time.monotonic(), "unchanged"
            try:
                decision = self.ask(source)
                if not decision.same:
                    return decision
                unchanged = unchanged or decision
            except Failure as failure:
                failures.append(failure)
                result = str(failure)
            self.run.report.detail(self.place.name, "%s: %s (%.3f s)" % (
                source.text, result, time.monotonic() - started))
            if unchanged and not due:
                break
        if unchanged:
            return unchanged
        raise max(failures, key=gravity)

    def owing(self, state):
        """Return a state that owes everything that a deploy runs."""
        return state._replace(owed=tuple(deploy_hooks(self.run.config, self.lineage.options)))

    def deploy(self):
        """Make the decided offer the current version."""
        place, decision, leaf = self.place, self.decision, self.decision.leaf
        before_key, before = self.lineage.key, self.lineage.current
        if self.run.dry_run:
            self.lineage = self.lineage._replace(key=before_key or place.live, current=Version(
                next_number(place), "", leaf, decision.chain))
            return
        if before is None and before_key and decision.key != before_key:
            pem = read_file(before_key, MAX_KEY)  # the key without a certificate waits on, staged
            stage_key(place, pem, public_half(pem, True))
        self.take_over()
        key = self.lineage.key if decision.key == before_key and before else decision.key
        retired = set(self.state.retired) - {fingerprint(leaf.public_key)}
        if before and before.leaf.public_key != leaf.public_key:
            retired.add(fingerprint(before.leaf.public_key))
        kept = {fingerprint(version.leaf.der) for version in load_versions(place)}
        state = self.owing(self.state)._replace(
            retired=tuple(sorted(retired)), way=decision.offer.way, rolled_back=tuple(
                mark for mark in self.state.rolled_back if mark in kept - {fingerprint(leaf.der)}))
        version = install_version(self.lineage, leaf, decision.chain, key, state,
                                  link=before is None)
        path = version.folder + "/privkey.pem"
        self.lineage = self.lineage._replace(current=version, key=path)
        self.state = state._replace(owed_version=version.number,
                                    key=key_record(path, leaf.public_key))
        if decision.key in staged_keys(place):
            remove_key(decision.key)
        self.show_paths()
        prune(place, version)

    def show_paths(self):
        """Show where servers find what was put in place, after `certferry NAME`."""
        if self.run.command == "crossing":
            self.lines += ["certificate  %s/fullchain.pem" % self.place.live,
                           "private key  %s/privkey.pem" % self.place.live]

    def take_over(self):
        """Make a version of loose files; say once what that means for containers."""
        if self.lineage.current is None or self.lineage.current.number:
            return
        self.changed = True
        if self.run.dry_run:
            self.lineage = self.lineage._replace(current=self.lineage.current._replace(
                number=next_number(self.place)))
        else:
            plain_files = not os.path.islink(self.place.live + "/fullchain.pem")
            self.lineage = adopt(self.lineage)
            self.state = self.state._replace(key=key_record(
                self.lineage.key, self.lineage.current.leaf.public_key))
            if plain_files:
                self.say("%s/ holds links now" % self.place.live, "a container needs live and "
                         "archive both mounted")

    def remember(self):
        """Write the options that this command gave."""
        given = self.lineage.given or {}
        merged = merge_options(given, self.run.changes)
        if merged != given:
            if not self.run.dry_run:
                save_conf(self.place, merged)
            self.changed = True

    def hooks_due(self):
        """Return (hooks to run now, whether something was pending before)."""
        every = deploy_hooks(self.run.config, self.lineage.options)
        state = self.state
        pending = state.owed_version == self.lineage.current.number and bool(
            state.owed or state.unserved)
        if self.fresh or self.decision and self.run.force or pending and state.unserved:
            return every, pending
        hooks = [hook for hook in every if pending and hook in state.owed]
        if (self.decision or self.waits) and "deploy-hook" in self.run.changes:
            before = (self.lineage.given or {}).get("deploy-hook", ())
            hooks += [hook for hook in every if hook in self.lineage.options.deploy_hooks
                      and hook not in before and hook not in hooks]
        return hooks, pending

    def finish(self):
        """Run the hooks that are due, then look at the services: what is unfinished is pending."""
        hooks, pending = self.hooks_due()
        if not (hooks or pending or self.fresh or self.served):
            return
        run, lineage, unfinished = self.run, self.lineage, collections.OrderedDict()
        variables = hook_variables(self.place, lineage.current.leaf.domains)
        for hook in hooks:
            wrong, seconds = run_hook(hook, run.config, run.environment, variables,
                                      run.report.pass_on)
            self.lines.append("hook         %s: %s" % (
                plain(hook), wrong or "done (%.1f s)" % seconds))
            if wrong:
                unfinished[hook] = wrong
            self.served = []  # what was seen before tells nothing now
        self.state = self.state._replace(owed=tuple(unfinished), unserved=False,
                                         owed_version=lineage.current.number)
        if unfinished:
            hook, wrong = next(iter(unfinished.items()))
            raise Failure("hook", "%s, but a hook failed (%s): %s" % (
                "installed" if self.fresh else "unchanged", wrong, plain(hook)),
                "it is tried again at every run; to change it: --deploy-hook")
        self.check_served(SERVED_SECONDS if hooks or pending or self.fresh else 0)

    def check_served(self, patience):
        """See that the services present the new leaf within `patience` seconds; Failure if not."""
        deadline, wrong = time.monotonic() + patience, []
        while self.lineage.options.served_at:
            if not self.served:
                self.look()
            wrong = self.not_served()
            if not wrong or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        self.state = self.state._replace(unserved=bool(wrong))
        if wrong:
            waited = ": hooks ran, %d s waited" % patience if patience else ""
            raise Failure("not-served", "; ".join(wrong) + waited, (
                "the hooks run again at the next run; does the daemon read %s/fullchain.pem?"
                % self.place.live))

    def can_wait(self):
        """Say whether a failure is only deferred: nothing is lost by trying at the next run."""
        reason, lineage, now = self.failure.reason, self.lineage, self.run.now
        if reason == "not-yet-valid":  # no clock at boot
            return bool(lineage.current) and now < lineage.current.leaf.not_before
        return reason == "rolled-back" or reason in ("unreachable", "timeout") and (
            self.run.command == "renew" and not self.run.network.broken
            and lineage.current is not None and health_of(lineage, now, self.misfit)[0] == "ok")

    def ferry(self):
        """Ask, judge, deploy, run hooks: the story of one lineage. Return (Lineage, Outcome)."""
        if not self.failure:
            if self.due:
                self.decision = self.attempt(self.decide)
            self.fresh = bool(self.decision and not self.decision.same)
            if self.fresh:
                self.attempt(self.deploy)
                self.fresh = not self.failure
            elif self.decision and self.run.command == "crossing":
                self.attempt(self.take_over)
                if self.changed:
                    self.show_paths()
            if self.decision and self.decision.same and self.misfit:
                self.failure = Failure("key-mismatch", (
                    "%s/privkey.pem does not fit the certificate in service" % self.place.live),
                    "bring the right one: certferry %s --key PEM" % self.place.name)
            self.waits = bool(self.failure) and self.can_wait()
            if self.failure and self.failure.reason == "storage":
                self.attempt(self.reload)
            if self.run.command == "crossing" and (self.waits or not self.failure):
                self.attempt(self.remember)
        if self.lineage and self.lineage.current and not self.run.dry_run:
            waiting, self.failure = (self.failure, None) if self.waits else (None, self.failure)
            self.attempt(self.finish)
            self.waits = self.waits and not self.failure  # what is pending comes first
            self.failure = self.failure or waiting
        return self.conclude()

    def reload(self):
        """Read again what is on the disk after a fault: the state may owe hooks by now."""
        self.lineage = load_lineage(self.place)._replace(options=self.lineage.options)
        current, state = self.lineage.current, self.lineage.state
        if current and current.number and state.owed_version == current.number:
            self.state = state

    def roll_back(self):
        """Make the version before current again, and keep the one rolled back from out."""
        place, now, before = self.place, self.run.now, self.lineage.current
        target = rollback_target(self.lineage)
        if target is None:
            raise Failure(None, "there is no earlier version to go back to", (
                "versions are kept in %s/%s@N" % (place.archive, place.name)))
        leaf = target.leaf
        if not leaf.not_before <= now <= leaf.not_after:
            raise Failure("expired" if now > leaf.not_after else "not-yet-valid", (
                "version %d is not valid now (%s to %s)" % (target.number, iso_time(
                    leaf.not_before), iso_time(leaf.not_after))), "the version in service stays")
        if leaf.public_key != before.leaf.public_key:
            self.lines.append("private key  goes back too, to %s" % describe_key(leaf.public_key))
        retired = set(self.state.retired) - {fingerprint(leaf.public_key)}
        if not self.run.dry_run:
            self.state = self.owing(self.state)._replace(
                retired=tuple(sorted(retired)),
                rolled_back=self.state.rolled_back + (fingerprint(before.leaf.der),))
            point_back(self.lineage, target, self.state)
            self.state = self.state._replace(owed_version=target.number, key=key_record(
                target.folder + "/privkey.pem", leaf.public_key))
        self.lineage = self.lineage._replace(current=target, key=target.folder + "/privkey.pem")
        self.fresh = True

    def result(self):
        """Return the result word of this crossing."""
        if not self.failure:
            return "installed" if self.fresh else "unchanged" if self.decision else "not-due"
        return "pending" if self.failure.reason in ("hook", "not-served") else (
            "deferred" if self.waits else self.failure.result)

    def recorded(self, result):
        """Return the State after this crossing: how it ended, since when and for how many runs."""
        state, failure, offer = self.state, self.failure, self.decision and self.decision.offer
        if result == "not-due":
            return state
        if not failure:
            state = state._replace(reason=None, detail="", runs=0, since=None)
        else:
            again = (state.result, state.reason) == (result, failure.reason or "record")
            state = state._replace(
                reason=failure.reason or "record", detail=plain(failure), since=(
                    state.since if again else self.run.now), runs=state.runs + 1 if again else 1)
        sound = result in SOUND or failure and failure.reason == "rolled-back"
        state = state._replace(result=result, good=None if sound else last_good(
            self.lineage, self.run.now))
        return state if not offer else state._replace(
            source=offer.source.text, way=offer.way,
            upstream_not_after=self.decision.leaf.not_after)

    def conclude(self):
        """Record how the crossing ended, alert who wants it, and return (Lineage, Outcome)."""
        run, failure, result = self.run, self.failure, self.result()
        readable, health, why = self.lineage is not None, "unknown", ""
        if not readable and os.path.lexists(self.place.conf):
            self.lineage = self.attempt(self.recall)  # what its state alone remembers
            self.state = self.lineage.state if self.lineage else NO_STATE
        lineage = self.lineage
        version = lineage.current if lineage else self.attempt(self.peek)
        if lineage:
            lineage = lineage._replace(state=self.recorded(result), checked=(
                lineage.checked if result == "not-due" else run.now))
        if readable:
            health, why = health_of(lineage, run.now, self.misfit and not self.fresh)
        outcome = Outcome(
            self.place.name, result, failure.reason if failure else None, str(failure or ""),
            failure.hint if failure else "", self.changed or self.fresh, self.fresh,
            self.decision and self.decision.offer.source.text, version, health, why, self.lines)
        ours = version.number if version else run.command == "renew" and lineage and lineage.key
        known = not failure or os.path.lexists(self.place.conf) or ours
        if lineage and known and not run.dry_run and (run.command != "rollback" or self.fresh):
            lineage = lineage._replace(state=alert(run, lineage, outcome))
            try:
                self.keep(lineage, result)
            except (Failure, OSError) as error:
                run.report.problem(self.place.name, "not recorded: %s" % error, "see to the disk")
        return lineage, outcome

    def peek(self):
        """Return the certificate in service of a lineage that cannot be ferried."""
        return find_current(self.place)

    def recall(self):
        """Return what the state alone remembers of a lineage whose files cannot be used."""
        return load_record(self.place)

    def keep(self, lineage, result):
        """Write the state where it changed, else only its time."""
        if lineage.state != self.lineage.state or self.lineage.checked is None:
            save_state(self.place, lineage.state)
        if result != "not-due":
            touch_state(self.place, self.run.now)
        return True


def _in_turn(crossings, network):
    """Yield crossings in order; one whose upstream keeps it waiting lets the others go first."""
    patience = time.monotonic() + PATIENCE
    while crossings:
        late = []
        for crossing in crossings:
            if crossing.number is None or network.has(crossing.number, max(
                    0, patience - time.monotonic())):
                yield crossing
            else:
                late.append(crossing)
        if len(late) == len(crossings):
            network.has(None, 0.2)
        crossings = late


def ferry_all(run, places):
    """Return [(Lineage or None, Outcome)] of many lineages, in order.

    All first exchanges are under way before the first answer is judged.
    """
    crossings, pairs = [], []
    for place in sorted(set(places)):
        crossing = Crossing(run, place)
        crossing.attempt(crossing.prepare)
        if crossing.skipped:
            run.report.line("%s: skipped: enabled = no in its conf" % place.name)
            continue
        if not crossing.failure and run.command != "rollback":
            crossing.begin()
        crossings.append(crossing)
    for position, crossing in enumerate(_in_turn(crossings, run.network), 1):
        run.report.step(position, len(crossings), crossing.place.name)
        if run.command == "rollback":
            if not crossing.failure:
                crossing.attempt(crossing.roll_back)
            if not crossing.failure and not run.dry_run:
                crossing.attempt(crossing.finish)
            pairs.append(crossing.conclude())
        else:
            pairs.append(crossing.ferry())
        run.report.outcome(pairs[-1][1])
    run.report.clear()
    return pairs


def post_hooks(run, pairs):
    """Run certbot's post hooks once where something was deployed."""
    names = {"RENEWED_DOMAINS": [], "FAILED_DOMAINS": []}
    for _, outcome in pairs:
        if outcome.fresh or outcome.result in ("failed", "refused"):
            names["RENEWED_DOMAINS" if outcome.fresh else "FAILED_DOMAINS"].extend(
                outcome.version.leaf.domains if outcome.version else (outcome.name,))
    if names["RENEWED_DOMAINS"] and not run.dry_run:
        run_hooks(run, hook_files(run.config, "post"), {
            key: " ".join(domains) for key, domains in names.items()})


def inspect(place, now):
    """Return the (Lineage or None, Outcome) of what is on the disk, without touching anything."""
    try:
        lineage = load_lineage(place)
        current, state, lines, misfit = lineage.current, lineage.state, [], False
        if lineage.given is None and current is None and lineage.key is None:
            raise Failure(None, "there is no such lineage", "certferry %s sets it up" % place.name)
        if current and lineage.key and state.key != key_record(lineage.key,
                                                               current.leaf.public_key):
            public = public_half(read_file(lineage.key, MAX_KEY), True)
            misfit = not fits(public, current.leaf)
        for path in staged_keys(place):
            try:
                public = public_half(read_file(path, MAX_KEY), True)
                lines.append("staged key %s" % describe_key(public))
            except (ValueError, OSError, Failure) as error:
                lines.append("%s %s" % (path, error))
        if current and current.leaf.lifetime <= 10 * DAY:
            lines.append("lives %d days: let the timer run hourly (systemctl edit certferry.timer)"
                         % (current.leaf.lifetime // DAY))
        if lineage.options.enabled == "no":
            lines.append("enabled = no")
        health, why = health_of(lineage, now, misfit)
        return lineage, Outcome(place.name, state.result, state.reason, state.detail, "", False,
                                False, state.source, current, health, why, lines)
    except (ValueError, OSError, Failure) as error:
        failure = storage_failure(error) if isinstance(error, OSError) else error if isinstance(
            error, Failure) else Failure(None, "its private key %s" % error)
    return None, Outcome(place.name, "failed", failure.reason, str(failure), failure.hint, False,
                         False, None, None, "unknown", "cannot be read: %s" % failure, [])


def write_metrics(path, pairs, places, now, started, report):
    """Write the metrics of a run, and of the other lineages from disk."""
    names = {outcome.name for _, outcome in pairs}
    pairs = pairs + [inspect(place, now) for place in places if place.name not in names]
    pairs.sort(key=lambda pair: pair[1].name)
    try:
        write_file(path, format_metrics(pairs, time.monotonic() - started), 0o644)
    except OSError as error:
        report.problem("", "metrics: %s" % storage_failure(error), "look at --metrics")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

COMMANDS = ("renew", "status", "rollback")

SHORT_HELP = """\
certferry NAME [--from HOST[:PORT]] [options]   set up lineage NAME, ferry it now, start the timer
certferry renew [NAME...]                       ferry every lineage: what the timer runs
certferry status [NAME...]                      what is here, how healthy it is, what is pending
certferry rollback NAME                         make the previous version current again
certferry --help                                all options"""

HELP = {
    "": """\
usage: certferry NAME [options] | renew [NAME...] | status [NAME...] | rollback NAME

  ssh up.example.net cat /etc/letsencrypt/live/example.com/privkey.pem |
    certferry example.com --key - --from up.example.net --deploy-hook 'systemctl reload nginx'

remembered with the lineage (an empty value forgets it):
  --from SOURCE          HOST[:PORT], file:PATH, exec:COMMAND, vault://HOST[:PORT]/MOUNT/PATH,
                         azure://VAULT/NAME, or PROTOCOL://HOST[:PORT] with STARTTLS
                         (%s);
                         may repeat, tried in order (default NAME:443)
  --sni HOST             the name to ask a TLS source for
  -d, --domain DOMAIN    a name that the certificate must cover; may repeat
  --ca-file PEM          trust these roots and no others
  --deploy-hook CMD      shell command run after a deploy; may repeat
  --served-at HOST:PORT  a local service that must present the new leaf then; may repeat
  --when always|due      ask the source on every run, or only when a renewal is due
  --warn P, --critical P health thresholds: a share of the lifetime (25%%) or days (10d)
  --timeout SECONDS      for the whole exchange with one source (default 20)
for this run:
  --key PEM, --key -     add this private key, - from standard input
  --config-dir DIR       instead of %s
  --dry-run              say what would happen, write nothing
  --force                accept what is refused as older, names-lost or rolled-back; run the hooks
  --no-timer             do not start the timer
  --json, -q, -v         one JSON document; only problems; more detail
more: certferry renew --help, status --help, rollback --help; exit status: 0 well, 1 not, 2 usage
""" % (" ".join(sorted(STARTTLS)), CONFIG_DIR),
    "renew": """\
usage: certferry renew [NAME...] [options]

  certferry renew                       every lineage, as the timer does
  certferry renew example.com --force   one, also where it was refused as older or rolled back

  --jitter SECONDS   sleep first, a delay below SECONDS that is fixed for this host
  --metrics FILE     write Prometheus metrics there, also when something failed
  --dry-run, --force (with a NAME), --config-dir DIR, --json, -q, -v
exit status: 0 all is well, 1 something failed, was refused or is pending
""",
    "status": """\
usage: certferry status [NAME...] [options]

  certferry status                      a line for monitoring, then a table; no network
  certferry status --json example.com

  --metrics FILE     write Prometheus metrics there
  --config-dir DIR, --json, -q, -v
exit status: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN
""",
    "rollback": """\
usage: certferry rollback NAME [options]

  certferry rollback example.com        the previous version is current again, the hooks run
  certferry renew example.com --force   forward again

  --dry-run, --config-dir DIR, --json, -q, -v
exit status: 0 all is well, 1 it was refused or a hook failed
"""}

_HABITS = {"certificates": "status", "list": "status", "show": "status", "certonly": "NAME",
           "run": "NAME", "install": "NAME", "update": "renew", "revert": "rollback"}


def _parse_words(arguments):
    """Return (options, the words that are none) of a command line.

    The parser knows no positional arguments, so that options may stand before and after words.
    """
    import argparse

    def error(message):
        raise Usage(message.replace("argument ", ""))

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = error
    for key in REMEMBERED:
        flags = ("-d", "--domain") if key == "domain" else ("--" + key,)
        if key != "enabled":
            parser.add_argument(*flags, dest=key, action="append")
    for key in ("key", "config-dir", "jitter", "metrics"):
        parser.add_argument("--" + key)
    for flags in (("--dry-run",), ("--force",), ("--no-timer",), ("--json",), ("--version",),
                  ("-q", "--quiet"), ("-v", "--verbose"), ("-h", "--help")):
        parser.add_argument(*flags, action="store_true")
    options, words = parser.parse_known_args(arguments)
    return options, [word for word in words if word != "--"]


def _nearest(word):
    """Return the command that a word was meant to be, certbot's habits included."""
    import difflib
    word = word.strip("-")
    return _HABITS.get(word) or (difflib.get_close_matches(word, COMMANDS, 1, 0) or COMMANDS)[0]


def _absolute(key, text):
    """Return an option's value, a path in it absolute: the timer starts in another folder."""
    if key == "from" and text.startswith("file:"):
        return "file:" + os.path.abspath(text[5:]) if text[5:] else text
    return os.path.abspath(text) if key == "ca-file" and text else text


def command_of(words):
    """Return the command that the words begin with: crossing for a NAME, "" without any."""
    first = [word for word in words if not word.startswith("-")][:1]
    return "".join(first if first and first[0] in COMMANDS else ["crossing"] * bool(words))


def parse_names(words, command, changes):
    """Return [NAME] of the words after a command; Usage for what is none. *.NAME adds a domain."""
    names = []
    for word in words:
        if word.startswith("-"):
            raise Usage("unknown option %s: did you mean certferry %s? certferry --help lists all"
                        % (plain(word, 60), _nearest(word)))
        wildcard = command == "crossing" and word.startswith("*.")
        try:
            if word != command or names:
                names.append(host_name(word[2 * wildcard:]))
                if "." not in names[-1] and not is_address(names[-1]):
                    raise ValueError
        except ValueError:
            raise Usage("%s is no host name and no command: did you mean certferry %s?" % (
                plain(word, 60), _nearest(word)))
        if wildcard:
            changes["domain"] = changes.get("domain", []) + ["*." + names[-1]]
    return names


def check_arguments(options, command, names, changes):
    """Raise Usage where options and command do not go together, or a value is wrong."""
    takes = {"key": "crossing", "jitter": "renew", "metrics": "renew status",
             "force": "crossing renew"}
    stray = [] if command == "crossing" else list(changes)
    stray += [key for key, commands in takes.items()
              if getattr(options, key) and command not in commands.split()]
    if stray:
        raise Usage("--%s does not go with %s: see certferry --help" % (
            stray[0], "a NAME" if command == "crossing" else command))
    if len(names) != 1 and command in ("crossing", "rollback"):
        raise Usage("one NAME at a time is needed: see certferry --help")
    if options.config_dir == "":
        raise Usage("--config-dir: it is empty")
    if options.force and not names:
        raise Usage("renew --force needs a NAME: certferry renew NAME --force")
    if options.jitter and not re.match(r"\d{1,6}\Z", options.jitter):
        raise Usage("--jitter %s: write whole seconds" % plain(options.jitter, 40))
    try:
        parse_options({key: [text for text in texts if text] for key, texts in changes.items()})
    except ValueError as error:
        raise Usage("--%s: %s" % error.args)


def jitter_delay(seconds, host_id=None):
    """Return a delay in [0, seconds) that is fixed for this host and spread evenly over a fleet.

    `host_id` is the text of /etc/machine-id, or the host's name where there is none.
    """
    import hashlib
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/hostid"):
        if not host_id and os.access(path, os.R_OK):
            with open(path, "rb") as file:
                host_id = file.read(256).decode("latin-1").strip()
    digest = hashlib.sha256(b"certferry " + (host_id or os.uname().nodename).encode()).digest()
    return seconds * (int.from_bytes(digest[:6], "big") / float(1 << 48))


def _read_key_option(value):
    """Return the PEM bytes that --key names; Failure where they cannot be read."""
    try:
        with open(0 if value == "-" else value, "rb", closefd=value != "-") as file:
            return file.read(MAX_KEY)
    except (OSError, ValueError) as error:
        raise Failure("no-key", "--key %s: %s" % (value, getattr(error, "strerror", None) or error),
                      "give a PEM file, or - for standard input")


def _systemctl(*arguments):
    """Return (exit status, output) of systemctl."""
    import subprocess
    done = subprocess.run(("systemctl",) + arguments, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    return done.returncode, plain(done.stdout.decode("utf-8", "replace").strip(), 120)


def start_timer(run):
    """Start the timer, or say what to put into cron; say whether it was started now."""
    import subprocess
    default = run.config == CONFIG_DIR
    if default and os.path.isdir("/run/systemd/system") and any(
            os.path.exists(folder + "/systemd/system/certferry.timer")
            for folder in ("/etc", "/usr/local/lib", "/usr/lib", "/lib")):
        try:
            if not any(_systemctl(word, "certferry.timer")[0] for word in ("is-active",
                                                                           "is-enabled")):
                return False
            status, words = _systemctl("enable", "--now", "certferry.timer")
            shown = _systemctl("show", "-p", "NextElapseUSecRealtime", "certferry.timer")[1]
        except (OSError, subprocess.SubprocessError) as error:
            status, words = 1, plain(error, 120)
        if status == 0:
            at = re.search(r"\d\d:\d\d", shown)
            run.report.line("certferry.timer: started" + (at and ", next run " + at.group() or ""))
            return True
        run.report.problem("", "certferry.timer could not be started (%s)" % words,
                           "systemctl enable --now certferry.timer")
    elif not (default and os.path.exists("/etc/cron.d/certferry")):
        script = os.path.realpath(sys.argv[0])
        words = ([] if os.access(script, os.X_OK) else [sys.executable]) + [
            script, "renew", "--jitter", "43200", "-q"]
        words += [] if default else ["--config-dir", run.config]
        run.report.line("no timer was started: for cron: 17 1,13 * * * " + " ".join(
            word if re.match(r"[\w./@=+-]+\Z", word) else "'%s'" % word.replace(
                "'", "'\\''").replace("%", "\\%") for word in words))
    return False


def _run_status(config, names, options, now, report):
    """Show what is on the disk; return the exit status that monitoring expects."""
    started = time.monotonic()
    try:
        places = [Place(config, name) for name in names] if names else discover(config)[0]
        os.listdir(config)
    except OSError as error:
        report.line("CERTFERRY UNKNOWN - %s" % storage_failure(error).message)
        if options.json:
            report.document([])
        return 3
    pairs = [inspect(place, now) for place in sorted(places)]
    if options.metrics:
        write_metrics(options.metrics, pairs, [], now, started, report)
    if options.json:
        report.document([as_object(outcome) for _, outcome in pairs])
    columns = os.get_terminal_size(1).columns if os.isatty(1) else 1000
    for line in status_lines(pairs, now, columns or 1000):
        report.line(line)
    healths = [outcome.health for _, outcome in pairs] or ["unknown"]
    return ([status for health, status in (("critical", 2), ("unknown", 3), ("warning", 1))
             if health in healths] + [0])[0]


def _open_config(run, options):
    """Hold the config dir, made for a first key; return the Run with what is read before work."""
    pem = _read_key_option(options.key) if options.key else None
    run = run._replace(pem=pem)
    if not os.path.lexists(run.config):
        if run.command != "crossing":
            raise Failure(None, "there is no %s" % run.config, "certferry NAME sets it up")
        if pem is None or run.dry_run:
            return run
        make_folder(run.config)
    check_folder(run.config)
    lock(run.config)
    run = run._replace(litter=find_litter(run.config + "/archive") + find_litter(
        run.config + "/certferry"))
    path = run.config + "/certferry/environment"
    if not os.path.lexists(path):
        return run
    check_folder(os.path.dirname(path))
    return run._replace(environment=dict(
        run.environment, **parse_environment(read_text(path), path)))


def _places(run, names, with_notices):
    """Return the places that a run is about: the names', or without any all that `renew` takes."""
    if names:
        return [Place(run.config, name) for name in names]
    places, notices = discover(run.config)
    for name, notice in notices if with_notices else ():
        run.report.problem(name, notice, kind="warning")
    return places


def _fail_all(run, names, failure):
    """Return [(Lineage or None, Outcome)] of a run that could not begin: what is on the disk."""
    pairs = []
    for place in names and _places(run, names, False):
        lineage, seen = inspect(place, run.now)
        pairs.append((lineage, seen._replace(
            result=failure.result, reason=failure.reason, message=str(failure), hint=failure.hint,
            source=None, lines=[])))
        run.report.outcome(pairs[-1][1])
    if not pairs:
        run.report.problem("", failure, failure.hint)
    return pairs


def _run_ferry(run, names, options):
    """Do what was asked; return [(Lineage or None, Outcome)]."""
    started, metrics = time.monotonic(), options.metrics
    try:
        run = _open_config(run, options)
        metrics = metrics or run.environment.get("CERTFERRY_METRICS")
        pairs = ferry_all(run, _places(run, names, with_notices=True))
        post_hooks(run, pairs)
    except Failure as error:
        pairs = _fail_all(run, names, error)
    except OSError as error:
        pairs = _fail_all(run, names, storage_failure(error))
    if metrics and run.command == "renew" and not run.dry_run:
        places = _places(run, (), False) if os.path.isdir(run.config) else ()
        write_metrics(metrics, pairs, places, run.now, started, run.report)
    if run.command == "crossing" and not (options.no_timer or run.dry_run) and (
            pairs[0][1].result in WELL + SOUND):
        (lineage, outcome), = pairs
        pairs = [(lineage, outcome._replace(changed=start_timer(run) or outcome.changed))]
    return pairs


def main(arguments):
    """Do what the command line asks; return the exit status."""
    command = "status" if "status" in arguments else ""  # as far as is known by now
    try:
        options, words = _parse_words(arguments)
        command = command_of(words)
        changes = {key: [_absolute(key, text) for text in texts]
                   for key, texts in vars(options).items() if key in REMEMBERED and texts}
        names = parse_names(words, command, changes)
        if options.version or options.help:
            Reporter().line("certferry " + __version__ if options.version else
                            HELP.get(command, HELP[""]).rstrip())
            return 0
        if not command:
            Reporter().short_help(SHORT_HELP)
            return 2
        check_arguments(options, command, names, changes)
    except Usage as error:
        Reporter().problem("", error)
        return 3 if command == "status" else 2
    if options.jitter:
        time.sleep(jitter_delay(int(options.jitter)))
    now, config = int(time.time()), os.path.abspath(options.config_dir or CONFIG_DIR)
    report = Reporter(options.quiet, options.verbose, options.json, now)
    report.mark = " (dry run: nothing was written)" if options.dry_run else ""
    if command == "status":
        return _run_status(config, names, options, now, report)
    network = Network()
    run = Run(config, dict(os.environ), now, command, options.dry_run, options.force, network,
              report, changes, None, ())
    try:
        pairs = _run_ferry(run, names, options)
    finally:
        network.close()
    if options.json:
        report.document([as_object(outcome) for _, outcome in pairs], options.dry_run)
    return 1 if report.failed else 0


if __name__ == "__main__":
    try:
        STATUS = main(sys.argv[1:])
    except KeyboardInterrupt:
        Reporter().problem("", "interrupted", "the next run takes up what is unfinished")
        STATUS = 130
    except Exception as error:
        Reporter().problem("", "this is a bug in certferry (%r, line %d)" % (
            error, error.__traceback__.tb_lineno), "please report it: nothing was lost")
        STATUS = 3 if "status" in sys.argv else 1
    os._exit(STATUS)  # every line was flushed; taking the interpreter down properly takes 7 ms
