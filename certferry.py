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

import os
import sys

if __name__ == "__main__" and sys.path[:1] == [os.path.dirname(os.path.realpath(__file__))]:
    del sys.path[0]  # what lies beside this file, in a folder of downloads maybe, is no module

# Modules that take a millisecond or more to import are imported where they are needed: the usual
# run finds nothing new, twice a day on every server, and has to cost next to nothing.
import binascii
import collections
import errno
import functools
import re
import select
import stat
import time

__version__ = "1.0.0"

MAX_OFFER = 1 << 20  # bytes: sixteen certificates of any sane size are under 64 KiB
MAX_CERTIFICATES = 16  # a public chain has two to four
MAX_KEY = 65536  # bytes: an RSA key of 16,384 bits takes 13 KiB as PEM
MAX_RECORD = 262144  # bytes of a NAME.conf, NAME.state or environment file
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
SIGKILL = 9  # everywhere; the module takes half a millisecond
DAY = 86400
memoized = functools.lru_cache(maxsize=None)  # decorates functions that are asked the same again

CONFIG_DIR = "/usr/local/etc/letsencrypt" if "freebsd" in sys.platform else "/etc/letsencrypt"
MEMBERS = "cert.pem chain.pem fullchain.pem privkey.pem".split()
LITTER = ".certferry-new"  # ends every temporary name, so that a later run knows what it may remove
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE:DHE:!aNULL:!eNULL:!PSK:!SRP"
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CREDENTIALS = """VAULT_TOKEN VAULT_TOKEN_FILE VAULT_ROLE_ID VAULT_SECRET_ID VAULT_SECRET_ID_FILE
    VAULT_CACERT VAULT_NAMESPACE AZURE_TENANT_ID AZURE_CLIENT_ID AZURE_CLIENT_SECRET
    AZURE_CLIENT_SECRET_FILE""".split()

# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------

# namedtuple, since typing costs 2.5 ms at every start and dataclasses 10; no private key is in any,
# for repr() prints them: keys are paths, or a Secret.


# Where a chain is fetched: kind `tls`, a STARTTLS protocol, file, exec, vault or azure; `text` is
# what a person reads, `target` the path or command of a source that is no host.
Source = collections.namedtuple("Source", "kind host port target text")


class Certificate(collections.namedtuple(
        "Certificate", "der serial not_before not_after subject issuer public_key algorithm "
        "version extensions domains")):
    """The facts of one certificate: names as DER bytes, times in seconds since 1970.

    `public_key` is the SubjectPublicKeyInfo, `extensions` {OID bytes: value bytes}, `domains` the
    usable DNS names and IP addresses of the subject alternative name, in its order.
    """

    lifetime = property(lambda self: max(1, self.not_after - self.not_before))


class Place(collections.namedtuple(
        "Place", "config name live members pointer archive records conf state renewal")):
    """Where the files of one lineage are."""

    def __new__(cls, config, name):
        """Find them all at once: they are asked for often."""
        live, records = config + "/live/" + name, config + "/certferry"
        record = records + "/" + name
        return super().__new__(
            cls, config, name, live, tuple(live + "/" + member for member in MEMBERS),
            live + "/.current", config + "/archive", records, record + ".conf", record + ".state",
            config + "/renewal/" + name + ".conf")

    def version(self, number):
        """Return the folder of version `number`."""
        return "%s/%s@%d" % (self.archive, self.name, number)


# What is in service: `number` is None for plain files or certbot's links that are not adopted yet.
Version = collections.namedtuple("Version", "number folder leaf chain")

# What a source handed over; `chain` is None where the exchange did not show it, `key` a Secret.
Offer = collections.namedtuple("Offer", "source address leaf chain key way")

# What the judge sees: an offer, parsed, with what openssl says of it (public keys as DER, `trust`
# "" or what is wrong), and what it is compared with: a leaf, `keys` {public key: path}, marks.
Evidence = collections.namedtuple(
    "Evidence", "name domains current offer leaf public_key carried_key trust keys retired "
    "replaced rolled_back rolled_keys")
Evidence.__new__.__defaults__ = (None, None, "", {}, (), (), (), ())

# reason is "" for an offer that is accepted; message and hint make the line that a person reads.
Verdict = collections.namedtuple("Verdict", "reason message hint")

# One lineage: `given` are the remembered options as they were written, None without a NAME.conf;
# `checked` is the time of the last check, `key` the path of its private key or None.
Lineage = collections.namedtuple("Lineage", "place given options state checked current key notices")

# How a crossing ended: `changed` says that anything was written, `lines` is shown below the result.
Outcome = collections.namedtuple(
    "Outcome", "name result reason message hint changed source version health why lines")

SOUND = "installed unchanged pending".split()  # results of a good exchange
REMEMBERING = SOUND + "not-due deferred".split()  # results after which options are remembered


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
        self.reason, self.hint = reason, hint

    @property
    def result(self):
        """Return `failed` where nothing was judged, `pending` once deployed, else `refused`."""
        if self.reason in (None, "unreachable", "timeout", "storage"):
            return "failed"
        return "pending" if self.reason in ("hook", "not-served") else "refused"


class Usage(Exception):
    """A wrong command line: the message is what is wrong and what to do."""


def why(error):
    """Return what an error says, without number and path."""
    return getattr(error, "strerror", None) or error


def failure_of(error, where="the config dir"):
    """Return the Failure that an error is, or for an OSError of the disk the errno in words, and
    the path: `where` for write() and fsync(), which tell none."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, ImportError):
        return Failure(None, "this Python has no module %s" % error.name,
                       "install python3, not only python3-minimal")
    if not isinstance(error, OSError):
        return Failure(None, "this is a bug in certferry (%r, line %d)" % (
            error, error.__traceback__.tb_lineno), "please report it: nothing was lost")
    where, number = error.filename2 or error.filename or where, error.errno
    hint = {errno.ENOSPC: "free some space", errno.EROFS: "remount it writable",
            errno.ENOENT: "check the path", errno.EPERM: "see to its owner and attributes",
            errno.EACCES: "run it as root", errno.ELOOP: "put the file itself there"}
    return Failure(None if number == errno.ELOOP else "storage", "%s: %s" % (where, str(
        why(error)).lower()), hint.get(number, "see to the disk") + "; what is in service stays")


def quietly(step, *arguments):
    """Do a step without which nothing is lost; return what it returns, None where it fails."""
    try:
        return step(*arguments)
    except (OSError, ValueError, Failure, AttributeError):
        return None  # AttributeError: FreeBSD's Python knows no extended attributes


# --------------------------------------------------------------------------------------------------
# Options and records
# --------------------------------------------------------------------------------------------------

# A name ends up in paths, in hooks' environments and in openssl's arguments: letters and no more.
HOST_NAME = r"(?=.{1,253}\Z)%s(?:\.%s)*\Z" % ((r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?",) * 2)
_PORTS = dict(each.split(":") for each in (
    "tls:443 smtp:25 imap:143 pop3:110 ftp:21 ldap:389 xmpp:5222 postgres:5432 mysql:3306 "
    "vault:8200 azure:443").split())
# What follows the host: only a store has a path, and no part of it climbs with `..`.
_PATHS = {"vault": r"(?!.*\.\.)(/[\w.@=+-]+){2,}\Z", "azure": r"/[A-Za-z0-9-]{1,127}\Z"}


def plain(text, limit=300):
    """Return `text` from anywhere as printable ASCII on one line, at most `limit` characters."""
    # what a peer says must not steer the terminal that shows it
    text = re.sub("[^ -~]", lambda match: "\\x%02x" % ord(match[0]), str(text))
    return text if len(text) <= limit else text[:limit - 3] + "..."


def is_address(host):
    """Say whether a host is meant as an IP address: no top-level domain is a number (RFC 3696)."""
    return ":" in host or host.rpartition(".")[2].isdigit()


def host_name(text):
    """Return a host name in lower-case ASCII or an IP address in its short form; or ValueError."""
    text = text.lower()
    if ":" in text and "%" not in text:  # a scope could hold anything
        import ipaddress  # 3 ms
        return ipaddress.IPv6Address(text).compressed
    if max(text, default="") > "\x7f":
        text = os.fsencode(text).decode().encode("idna").decode()  # 4 ms
    text = text[:-1] if text.endswith(".") else text
    numbers = [part.isdigit() and int(part) < 256 for part in text.split(".")]
    if not re.match(HOST_NAME, text) or is_address(text) and numbers != [True] * 4:
        raise ValueError("%s is no host name and no address" % plain(text, 80))
    return text


def is_lineage_name(text):
    """Say whether a text is a lineage's name as it is: with a dot, or an address."""
    # a disk takes names of 255 characters, and those of temporary files are longer
    return quietly(host_name, text) == text and len(text) < 215 and (
        "." in text or is_address(text))


def parse_endpoint(text, port):
    """Return (host, port) of HOST, HOST:PORT, [V6]:PORT or a bare V6 address; or ValueError."""
    bare = text.count(":") > 1 and not text.startswith("[")
    match = re.match(r"(?:\[(.*:.*)\]|([^:]*))(?::(\d{1,5}))?\Z", "[%s]" % text if bare else text)
    port = int(match[3] or port) if match else 0
    if not 0 < port < 65536:
        raise ValueError("%s: write HOST, HOST:PORT or [ADDRESS]:PORT" % plain(text, 80))
    return host_name(match[1] or match[2]), port


def endpoint_text(host, port):
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


@memoized  # many lineages, few upstreams
def parse_source(text):
    """Return the Source that `text` names; or ValueError with what is wrong."""
    kind, _, target = text.partition(":")
    scheme, _, rest = (text if "://" in text else "tls://" + text).partition("://")
    host, slash, path = rest.partition("/")
    if kind in ("file", "exec"):
        if target.strip() and not re.search("[\0\r\n]", target):
            return Source(kind, "", 0, target, text)
    elif scheme in _PORTS and re.match(_PATHS.get(scheme, r"\Z"), slash + path, re.ASCII):
        if scheme == "azure" and "." not in host:
            host += ".vault.azure.net"
        host, port = parse_endpoint(host, _PORTS[scheme])
        shown = text if path else scheme + "://" + endpoint_text(host, port)
        return Source(scheme, host, port, path, shown.replace("tls://", ""))
    raise ValueError("%s: write HOST[:PORT], file:PATH, exec:COMMAND, or one of %s with ://HOST"
                     "[:PORT], for vault /MOUNT/PATH, for azure /NAME" % (
                         plain(text, 80), " ".join(_PORTS)))


def _parse_domain(text):
    """Return a domain that a certificate must cover, `*.` allowed; or ValueError."""
    return "*." + host_name(text[2:]) if text.startswith("*.") else host_name(text)


def _pattern(pattern, words, convert=str):
    """Return a reader of what matches a pattern; its ValueError says to write `words`."""
    def read(text):
        """Return the value, converted; or ValueError."""
        if not re.match(pattern + r"\Z", text):
            raise ValueError("%s: write %s" % (plain(text, 40), words))
        return convert(text)
    return read


_line = _pattern("[^\0\r\n#][^\0\r\n]*", "one line that begins with no #")  # for the records
_share = _pattern(r"(100|\d{1,2})(\.\d+)?%|\d{1,4}(\.\d+)?d",
                  "a share of the lifetime such as 25%, or days such as 10d")

# Each option that is remembered, and how one text is read; Options has their values in this order.
REMEMBERED = {
    "from": parse_source, "sni": host_name, "domain": _parse_domain, "ca-file": _line,
    "deploy-hook": _line, "served-at": _pattern(
        "(?!file:|exec:|vault:|azure:).*", "[PROTOCOL://]HOST:PORT", parse_source),
    "when": _pattern("always|due", "always or due"), "warn": _share, "critical": _share,
    "timeout": _pattern(r"(?!0+(\.0+)?\Z)\d{1,4}(\.\d+)?", "seconds", float),
    "enabled": _pattern("yes|no", "yes or no")}
Options = collections.namedtuple("Options", (
    "sources sni domains ca_file deploy_hooks served_at when warn critical timeout enabled"))
NO_OPTIONS = Options((), None, (), None, (), (), "always", "25%", "10%", 20.0, "yes")


def parse_options(given, readers=REMEMBERED, nothing=NO_OPTIONS):
    """Return the Options that {key: [text, ...]} gives; or ValueError(key, what is wrong).

    Or another named tuple, a field for each reader: `nothing` without any; its tuples may repeat.
    """
    values = dict(zip(readers, nothing))
    for key, texts in given.items():
        if key not in readers:
            raise ValueError(key, "unknown key (known: %s)" % " ".join(readers))
        repeats = isinstance(values[key], tuple)
        try:
            if len(texts) > 1 and not repeats:
                raise ValueError("it takes one value")
            found = tuple(map(readers[key], texts))
        except ValueError as error:
            raise ValueError(key, plain(error))
        values[key] = found if repeats else found[0]
    return nothing._make(values.values())


def merge_options(given, changes):
    """Return remembered options with the changes: an empty value forgets what was remembered."""
    return {key: list(filter(None, texts)) for key, texts in dict(given, **changes).items()
            if any(texts)}


def _bad_line(path, number, what):
    """Return the Failure of a line in a record."""
    return Failure(None, "%s line %d: %s" % (path, number, what), "correct it by hand")


def _read_record(text, path):
    """Return {key: (line number, [text, ...])} of KEY = VALUE lines; Failure where one is none.

    What INI files have in common: texts below a key are indented deeper, # begins a comment line.
    Nothing is interpolated, for `date +%F` in a hook. configparser would cost 2 ms to import.
    """
    found, depth = {}, MAX_RECORD  # the first line is not below another, whatever its indent
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits inside hooks
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if not words or words.startswith("#"):
            continue
        if indent <= depth:
            key, equals, words = words.partition("=")
            key, words = key.strip(), words.strip()
            if not equals or len(key.split()) != 1 or "\0" in line:
                raise _bad_line(path, number, "not a KEY = VALUE line; there are no sections")
            if key in found:
                raise _bad_line(path, number, "%s is given twice" % plain(key))
            depth, found[key] = indent, (number, [])
        if words:
            found[key][1].append(words)
    return found


def _parse_record(found, path, readers, nothing):
    """Return ({key: [text, ...]}, what parse_options() makes of it) of a record; Failure with file
    and line if it is wrong."""
    given = {key: texts for key, (_, texts) in found.items() if texts}
    try:
        return given, parse_options(given, readers, nothing)
    except ValueError as error:
        key, what = error.args
        raise _bad_line(path, found[key][0], plain(key) + ": " + what)


def parse_conf(text, path):
    """Return ({key: [text, ...]}, Options) of a NAME.conf; Failure with file and line if wrong."""
    return _parse_record(_read_record(text, path), path, REMEMBERED, NO_OPTIONS)


def _entry(key, texts):
    """Return the lines of a key: one text beside it, several below it."""
    return "%s =%s%s\n" % (key, " " if len(texts) == 1 else "\n    ", "\n    ".join(texts))


def edit_conf(text, before, after):
    """Return the text of a NAME.conf with the options of `after`: comments and order are kept."""
    edited, dropping = "", False
    changed = [key for key in REMEMBERED if before.get(key) != after.get(key)]
    keys = {number: key for key, (number, _) in _read_record(text, "").items()}
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        dropping = keys[number] in changed if number in keys else dropping
        # a comment stays, even among what goes
        if not dropping or line.lstrip().startswith("#"):
            edited += line + "\n"
    return edited.lstrip("\n") + "".join(_entry(key, after[key]) for key in changed if key in after)


@memoized  # a thousand lineages are looked at in the same second
def iso_time(seconds):
    """Return a time as ISO 8601 in UTC, or None for None."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _days_before(month):
    """Return the days before a month, counted from March of the year 0: leap days end its years."""
    return month // 12 * 365 + month // 48 - month // 1200 + month // 4800 + (
        month % 12 * 153 + 2) // 5


@memoized  # many lineages, few times
def utc_seconds(text):
    """Return seconds since 1970 of a time with the digits YYYYMMDDhhmmss, in UTC; or ValueError."""
    digits = "".join(filter(str.isdigit, text))
    century, year, month, day, hour, minute, second = (
        int(digits[at:at + 2]) for at in range(0, 14, 2))
    count = (century * 100 + year) * 12 + month - 3
    days = _days_before(count) + day
    if not (1 <= month <= 12 and 1 <= day and days <= _days_before(count + 1)
            and hour < 24 and minute < 60 and second < 60):
        raise ValueError("no such date")
    return (days - 719469) * DAY + (hour * 60 + minute) * 60 + second


# Times are seconds since 1970 or None; fingerprints and hooks are tuples of words.
State = collections.namedtuple(
    "State", "result reason detail since runs good source upstream_not_after way owed unserved "
    "unfinished retired rolled_back key told told_at")
NO_STATE = State(None, None, "", None, 0, None, None, None, "", (), False, 0, (), (), "", "", None)
# How a text of the state is read, if not as it is; what is False, 0 or empty is never written.
_READERS = {"since": utc_seconds, "good": utc_seconds, "upstream_not_after": utc_seconds,
            "told_at": utc_seconds, "runs": int, "unfinished": int, "unserved": bool}
_STORED = {field.replace("_", "-"): _READERS.get(field, str) for field in State._fields}


def parse_state(text, path):
    """Return the State of a NAME.state; Failure with file and line where it is damaged."""
    if "[state]\n" not in text:
        raise _bad_line(path, 1, "there is no [state] in it")
    found = _read_record(text.replace("[state]\n", "\n", 1), path)
    # a later version may have written more
    return _parse_record({key: found[key] for key in found if key in _STORED}, path, _STORED,
                         NO_STATE)[1]


def format_state(state):
    """Return a State as INI text; what does not apply is left out."""
    text = "# what certferry saw last; its time of change is the time of the last check\n[state]\n"
    for (key, reader), value in zip(_STORED.items(), state):
        if value:
            text += _entry(key, value if isinstance(value, tuple) else [
                iso_time(value) if reader == utc_seconds else str(value)])
    return text


def parse_environment(text, path):
    """Return {KEY: VALUE} of the environment file; Failure with file and line where it is bad."""
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*([A-Za-z_]\w*)=(['\"]?)([^\0]*?)\2\s*\Z", line)
        if match:
            values[match[1]] = match[3]
        elif not re.match(r"\s*(#|\Z)", line):
            raise _bad_line(path, number, "not a KEY=VALUE line")
    return values


# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------

# Object identifiers as DER has them: extensions are 2.5.29.N, the others 1.3.6.1.5.5.7.N.
(_SUBJECT_KEY, _KEY_USAGE, _ALTERNATIVE_NAME, _BASIC_CONSTRAINTS, _AUTHORITY_KEY,
 _EXTENDED_USAGE) = (b"\x55\x1d%c" % number for number in (14, 15, 17, 19, 35, 37))
MUST_STAPLE = b"\x2b\x06\x01\x05\x05\x07\x01\x18"
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
    found, at, end = [], 0, len(data)
    while at < end:
        start = at + 2
        if start > end or data[at] & 0x1f == 0x1f:
            raise ValueError("an element that is cut off, or a tag of several bytes")
        length = data[at + 1]
        if length & 0x80:
            size = length & 0x7f
            length = int.from_bytes(data[start:start + size], "big")
            start += size
            if not 1 <= size <= 3 or length < 0x80 or length >> 8 * (size - 1) == 0:
                raise ValueError("a length that is not the shortest, or over 16 MiB")
        if start + length > end:
            raise ValueError("an element longer than what holds it")
        found.append((data[at], data[start:start + length], data[at:start + length]))
        at = start + length
    return found


def _sequence(data, *tags):
    """Return the elements of a SEQUENCE's bytes, of exactly these tags if any; or ValueError."""
    (outer, content, _), = _elements(data)
    found = _elements(content)
    if outer != 0x30 or tags and tags != tuple(tag for tag, _, _ in found):
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
    """Raise ValueError unless the bytes are strict DER all the way down (X.690, clauses 8 to 11 but
    for DEFAULT values and sorted sets), the values of the extensions of RFC 5280 included."""
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
            defined = content.startswith((_KEY_USAGE[:2], MUST_STAPLE[:-1]))


def _der_time(tag, content):
    """Return the seconds of a UTCTime or GeneralizedTime as RFC 5280, 4.1.2.5 wants them."""
    if not content[:-1].isdigit() or (tag, len(content), content[-1:]) not in (
            (0x17, 13, b"Z"), (0x18, 15, b"Z")):
        raise ValueError("a time that RFC 5280 does not allow")
    century = "" if tag == 0x18 else "20" if content < b"50" else "19"
    return utc_seconds(century + content.decode())


def _extensions(data):
    """Return {OID bytes: value bytes} of the Extensions in some DER."""
    values = {}
    for outer, content, _ in _sequence(data):
        (first, oid, _), *flag, (last, value, _) = _elements(content)
        if (outer, first, last) != (0x30, 0x06, 0x04) or oid in values or (
                [tag for tag, _, _ in flag] not in ([], [1])):
            raise ValueError("an extension of another shape, or given twice")
        values[oid] = value
    return values


def _domains(value):
    """Return the names of a subject alternative name that can count, in its order.

    A name with NUL or outside the host names' alphabet, an address as a DNS name, and a wildcard
    that is not one whole leftmost label above a registrable name (RFC 9525, 6.3) are left out.
    """
    names = []
    for tag, content, _ in _sequence(value):
        if tag == 0x82:
            name = content.decode("latin-1").lower()  # NUL too is for HOST_NAME to judge
            bare = name[2:] if name.startswith("*.") else name
            if re.match(HOST_NAME, bare) and not is_address(bare) and (bare is name or "." in bare):
                names.append(name)
        elif tag == 0x87 and len(content) in (4, 16):
            import ipaddress  # 3 ms
            names.append(str(ipaddress.ip_address(content)))
    return tuple(names)


@memoized  # it is asked again about what is in service
def parse_certificate(der):
    """Return the Certificate that the DER bytes hold; ValueError where they hold none."""
    body, algorithm, _ = _sequence(der, 0x30, 0x30, 0x03)
    fields, number = _elements(body[1]), b"\0"  # version 1 is not written
    if fields and fields[0][0] == 0xa0:
        (_, number, _), = _elements(fields.pop(0)[1])
    # whether the rest is a certificate openssl says: it reads each new leaf before it counts
    serial, _, issuer, validity, subject, key, *others = fields
    not_before, not_after = [_der_time(*time[:2]) for time in _elements(validity[1])]
    extensions = _extensions(next((value for tag, value, _ in others if tag == 0xa3), b"\x30\0"))
    return Certificate(der, serial[1].hex(), not_before, not_after, subject[2], issuer[2], key[2],
                       algorithm[2], int.from_bytes(number, "big") + 1, extensions,
                       _domains(extensions.get(_ALTERNATIVE_NAME, b"\x30\0")))


def fingerprint(der):
    """Return the SHA-256 of some DER as hexadecimal digits."""
    import hashlib  # loads libcrypto, 3 ms
    return hashlib.sha256(der).hexdigest()


def marks_of(leaf, chain):
    """Return what a leaf (Certificate), and it with this very chain (DER), are remembered by."""
    return fingerprint(leaf.der), fingerprint(b"".join((leaf.der,) + chain))


def covers(names, wanted):
    """Say whether one of a certificate's names covers `wanted`, itself maybe a wildcard, which
    stands for exactly one label (RFC 9525, 6.3) and never for part of an address."""
    label, _, rest = wanted.partition(".")
    return wanted in names or label != "*" and not is_address(wanted) and "*." + rest in names


def describe_name(name):
    """Return organization and common name of a distinguished name (DER bytes) as text to show."""
    values = [name.partition(b"\x06\x03\x55\x04" + kind)[2] for kind in (b"\x0a", b"\x03")]
    return " ".join(value[2:2 + value[1]].decode("utf-8", "replace")
                    for value in values if value[2:]) or "an unnamed issuer"


def key_kind(public_key):
    """Return what a person calls a SubjectPublicKeyInfo: `RSA 2048`, `ECDSA P-256`, `Ed25519`."""
    try:
        (_, _, algorithm), (_, bits, _) = _sequence(public_key, 0x30, 0x03)
        kind = _KEY_KINDS[algorithm.hex()]
        if kind == "RSA":
            modulus, _ = _sequence(bits[1:], 0x02, 0x02)
            kind = "RSA %d" % int.from_bytes(modulus[1], "big").bit_length()
        return kind
    except (KeyError, ValueError):
        return "another curve or algorithm"


def flaw(certificate, is_leaf):
    """Return why browsers would refuse a leaf or an issuer whatever its root, or "":
    openssl accepts all of these, the CA/Browser Forum's requirements and RFC 5280 do not."""
    extensions, serial = certificate.extensions, certificate.serial
    key, limits = key_kind(certificate.public_key), extensions.get(_BASIC_CONSTRAINTS, b"")
    kind, _, bits = key.partition(" ")
    usage = extensions.get(_KEY_USAGE, b"")[3:4]
    signs = usage and usage[0] & 4  # keyCertSign is bit 5 (RFC 5280, 4.2.1.3)
    authority = limits[2:5] == b"\x01\x01\xff"
    rules = (
        (certificate.version != 3, "is X.509 version %d, not 3" % certificate.version),
        (len(serial) > 40 or serial[:1] > "7" or not serial.strip("0"),
         "has a serial number that is not a positive one of at most 20 bytes"),
        # a modulus of other than whole bytes: baseline requirements, 6.1.6
        (int(bits) < 2048 or int(bits) % 8 if kind == "RSA" else key not in _KEY_KINDS.values(),
         "has a key that browsers refuse (%s)" % key),
        (not re.match(_SIGNATURES, certificate.algorithm.hex()),
         "is signed with an algorithm that browsers refuse (SHA-1, MD5 or an unusual one)"),
        (_SERVER_AUTH not in extensions.get(_EXTENDED_USAGE, _SERVER_AUTH),
         "is not meant for servers (its extended key usage lacks serverAuth)"))
    # what openssl checks by itself (purpose, path length, name constraints) is left to it
    rules += (
        (authority, "is an authority's certificate, not a server's"),
        (signs, "may sign certificates, and is no authority's")) if is_leaf else (
        (not authority, "is no authority's"),
        (usage and not signs, "may not sign certificates (its key usage)"))
    return next((words for broken, words in rules if broken), "")


def _may_have_issued(issuer, certificate):
    """Say whether names and key identifiers allow that: openssl goes by the same."""
    own = issuer.extensions.get(_SUBJECT_KEY, b"")[2:]
    wanted = certificate.extensions.get(_AUTHORITY_KEY, b"")
    return issuer.subject == certificate.issuer and (
        not own or wanted[2:3] != b"\x80" or own in wanted)


def order_chains(leaf, others):
    """Return the possible chains for a leaf: issuers in order, no root, nothing that is not one.
    Nothing is verified: openssl says which of them holds."""
    chains, unfinished = [], [()]
    # a root issued itself; what another key of the same name issued (a rollover) is none
    issuers = [other for other in others if other != leaf and not _may_have_issued(other, other)]
    while unfinished and len(chains) < 8:  # there are issuers that certified each other
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
    """Return [(whole block, label, content)] of PEM text, in linear time whatever it is."""
    # no five dashes inside, so that no BEGIN without its END has all the rest searched for it;
    # some single ones: DEK-Info of a key that is encrypted as of old
    return re.findall(
        rb"(-----BEGIN ([^-]{1,60})-----([^-]*(?:-(?!----)[^-]*){0,64})-----END \2-----)", data)


def read_pem(data):
    """Return (certificates as DER, private key as Secret or None) of PEM text or one DER file.

    Text around the blocks, CRLF, any order and other blocks are allowed. A certificate that is
    given twice counts once. ValueError with what is wrong.
    """
    if data[:1] == b"\x30" and b"-----BEGIN " not in data:
        return [data], None
    blocks = pem_blocks(data)
    texts = [b"".join(content.split()) for _, label, content in blocks
             if label in (b"CERTIFICATE", b"X509 CERTIFICATE")]
    keys = {block.replace(b"\r\n", b"\n") + b"\n" for block, label, _ in blocks
            if label.endswith(b"PRIVATE KEY")}
    if len(set(texts)) > MAX_CERTIFICATES or len(keys) > 1:
        raise ValueError("more than %d certificates, or more than one private key"
                         % MAX_CERTIFICATES)
    ders = quietly(list, map(binascii.a2b_base64, texts)) or []
    # a2b_base64 skips what is no base64: its way back tells
    if b"" in texts or texts != [binascii.b2a_base64(der, newline=False) for der in ders]:
        raise ValueError("a certificate whose base64 is broken")
    return list(dict.fromkeys(ders)), Secret(keys.pop()) if keys else None


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
    return entry.pw_uid or 65534, entry.pw_gid or 65534  # never root's, whatever stands there


def confine(verifier=False):
    """Give up root's privileges for good and bound what this process can use; OSError if one stays.

    A verifier has a group of its own: a process can trace another one of its user and group, and
    what talks to the network must not be able to forge what the verifiers say.
    """
    if os.geteuid() != 0:
        return
    try:
        import resource
        # no core with a secret in it, no file; not AS: malloc reserves 64 MiB for each thread;
        # RLIMIT_NPROC would count all of nobody's processes
        for name, most in dict(CORE=0, FSIZE=0, DATA=1 << 30, NOFILE=1024, CPU=600).items():
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ImportError, ValueError):
        pass  # a second line of defence: not in Debian 11's python3-minimal; lower in a container
    user, group = _nobody()
    # groups first: whoever is nobody can't give them up
    os.setgroups([])
    os.setgid(65532 if verifier else group)  # root's change the saved ids too
    os.setuid(user)
    try:
        os.setuid(0)
    except OSError:
        return
    raise OSError(errno.EPERM, "could not give up root's privilege")


def _is_closed(path):
    """Say whether nobody can't read what a folder, such as Python's own, holds."""
    return ~os.stat(path).st_mode & 0o005 or path != "/" and _is_closed(os.path.dirname(path))


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
        os.setsid()  # Ctrl-C is for the deciding process, which ends this one
        jobs = max(to_read, from_write, 2) + 1  # above both, so that neither is overwritten
        os.dup2(to_read, jobs, False)
        os.dup2(from_write, jobs + 1, False)
        for descriptor in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        # locks, listening sockets, a shell's files: nothing for what talks to the network
        os.closerange(3, jobs)
        os.closerange(jobs + 2, max([4096] + [int(name) + 1 for name in os.listdir("/dev/fd")]))
        if unprivileged:
            if os.geteuid() == 0 and _is_closed(os.path.dirname(os.path.realpath(os.__file__))):
                for module in "ssl subprocess encodings.idna encodings.punycode".split():
                    __import__(module)  # the last two for Python 3.6 alone
            confine()
        serve(jobs, jobs + 1)
    except OSError as error:
        os.write(jobs + 1, b"! %s\n" % plain(error).encode())
    finally:  # with what it started, an openssl that waits for an answer
        quietly(os.killpg, os.getpid(), SIGKILL)
        os._exit(0)


def kill_group(process):
    """Kill a process, and what it started where it leads a session of its own."""
    quietly(os.killpg, process.pid, SIGKILL)
    process.kill()
    process.wait()


def last_line(output):
    """Return the last line of what a process said, as text to quote."""
    return plain(output.decode("utf-8", "replace").strip().split("\n")[-1], 120)


def converse(process, feeds, deadline, limit):
    """Write {descriptor: memoryview} to a process; return (its output, its errors), both bounded.

    TimeoutError when the deadline (monotonic seconds) passes, ValueError over the limit; the
    process is killed then. Ends when both pipes end, or with the process.
    """
    outputs = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    reading = list(outputs)
    try:
        while reading:
            left = deadline - time.monotonic()
            over = process.poll() is not None
            readable, writable, _ = select.select(
                reading, feeds, [], 0 if over else max(0, min(left, 0.1)))
            if over and not readable:
                break  # what it left behind holds the pipes
            if left < 0:
                raise TimeoutError("it took too long")
            for descriptor in writable:
                # so much fits into a pipe that select calls writable; None: it reads no further
                written = quietly(os.write, descriptor, feeds[descriptor][:select.PIPE_BUF])
                feeds[descriptor] = feeds[descriptor][written:] if written else b""
                if not feeds[descriptor]:
                    del feeds[descriptor]
                    os.close(descriptor)
            for descriptor in readable:
                piece = os.read(descriptor, 65536)
                outputs[descriptor] = (outputs[descriptor] + piece)[-limit - 1:]
                if len(outputs[process.stdout.fileno()]) > limit:
                    raise ValueError("more than %d bytes" % limit)
                if not piece:
                    reading.remove(descriptor)
        return outputs.values()
    finally:
        for descriptor in feeds:
            os.close(descriptor)
        if reading and process.poll() is None:
            kill_group(process)
        process.stdout.close()
        process.stderr.close()


def _environment(system_roots):
    """Return the environment of an openssl process: nothing of ours but the trust store, if any."""
    # -CAfile alone adds to the system's roots: with these it replaces them
    own = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": "/nonexistent"}
    if system_roots:
        own = {name: os.environ[name] for name in own if name in os.environ}
    # LC_ALL, because its words are looked at
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
    feeds = dict(zip(writes, map(memoryview, [data] + [content for _, content in files])))
    command = ["openssl"] + arguments
    for (option, _), read in zip(files, reads[1:]):
        command += [option, "/dev/fd/%d" % read]
        if confined:
            os.fchown(read, _nobody()[0], -1)  # a pipe of root's is closed to nobody
    try:
        # cwd: ours may be closed to nobody
        process = subprocess.Popen(
            command, stdin=reads[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
            env=_environment(system_roots), pass_fds=reads[1:],
            # safe because whoever comes here as root has no threads
            preexec_fn=(lambda: confine(verifier=True)) if confined else None)
    except (OSError, subprocess.SubprocessError) as error:
        reads += writes
        raise Failure(None, "there is no openssl command here that runs (%s)" % plain(
            error, 80), "install the package openssl")
    finally:
        for read in reads:
            os.close(read)
    try:
        output, errors = converse(
            process, feeds, deadline or time.monotonic() + OPENSSL_SECONDS, 2 * MAX_OFFER)
    except (TimeoutError, ValueError) as error:
        if deadline:
            raise
        output, errors = b"", str(error).encode()
    return process.wait(), output, errors.decode("ascii", "replace")


def _public_key(pem):
    """Return the DER of a PUBLIC KEY that openssl printed, or None where it printed none."""
    block = re.search(b"-----BEGIN PUBLIC KEY-----([^-]*)-----END PUBLIC KEY-----", pem)
    return block and binascii.a2b_base64(block[1])


def leaf_public_key(leaf):
    """Return the public key (DER) of a certificate (DER) as openssl prints it, or None."""
    return _public_key(run_openssl(["x509", "-pubkey", "-noout"], to_pem([leaf]))[1])


def public_half(pem, trusted):
    """Return the public key (DER) of a private key (PEM bytes); ValueError with why not, in words.
    `trusted` for a key of this host; a key that came with an offer is read unprivileged."""
    if b"ENCRYPTED" in pem:
        raise ValueError("it is encrypted: certferry asks no passphrase, nor do servers at boot")
    # -passin, so that nothing ever prompts; -inform, because servers read no DER
    status, output, _ = run_openssl(["pkey", "-inform", "PEM", "-pubout", "-passin", "pass:"], pem,
                                    trusted=trusted)
    public_key = _public_key(output)
    if status != 0 or public_key is None:
        raise ValueError("it holds no private key, or one that openssl cannot read")
    return public_key


def verify_chain(leaf, chain, roots, now):
    """Return "" where leaf and chain lead to a trusted root at the time `now`, else why not.
    `roots` (Certificates) replace the system store; None means the system's."""
    files = [] if roots is None else [("-CAfile", to_pem(root.der for root in roots))]
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
    number, depth, words = match.groups() if match else ("0", "0", errors.strip().split("\n")[-1])
    # a subtree is what openssl calls a name constraint
    words = plain(words).replace("subtree", "name constraints")
    if number not in "2 18 19 20 21 27".split():  # X509_V_ERR: no issuer, no root
        return "%s is refused (%s)" % (
            "the leaf" if depth == "0" else "issuer %s of the chain" % depth, words)
    if roots and not any(root.subject == root.issuer for root in roots):
        return "the --ca-file holds no self-signed root: give the root, not an intermediate"
    return "it leads to no trusted root (%s%s): %s--ca-file for a private authority" % (
        words, "" if roots else "; is the package ca-certificates here?",
        "" if chain else "serve fullchain.pem there, or ")


def open_pkcs12(data):
    """Return the PEM bytes inside a PKCS#12 container with an empty password."""
    for legacy in ([], ["-legacy"]):  # OpenSSL 3 keeps RC2 and 3DES containers behind a switch
        status, output, _ = run_openssl(["pkcs12", "-nodes", "-passin", "pass:"] + legacy, data)
        if status == 0:
            return output
    raise ValueError("a PKCS#12 container that openssl cannot open without a password")


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------

# What the network process is asked: `known` is the CRC of the leaf in service, so that the chain is
# asked only for another one; `want` the key type to ask for where a server has several, `way`
# how that worked last time; `own` refuses this very machine; `skip` are addresses asked already.
Job = collections.namedtuple("Job", "kind host port timeout sni known want way own skip")

# What a process answers: reason "" with data (PEM, mostly), or a reason and what is wrong.
Answer = collections.namedtuple("Answer", "reason detail hint address way data")
Answer.__new__.__defaults__ = ("",) * 5 + (b"",)

# The reasons that a process is believed; "missing" tells what this host lacks.
_REASONS = {"unreachable": "unreachable", "timeout": "timeout", "unproven": "unproven",
            "missing": None}

# Where a server has several key types, TLS 1.2 settles with the cipher which one it shows, TLS 1.3
# with the signature algorithms, and these only s_client can tell it.
_TYPES = {"RSA": (":!aECDSA", "rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:RSA+SHA256:RSA+SHA384"),
          "ECDSA": (":!aRSA", "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512")}

# What the kernel, the ssl module or s_client says; the reason, what that means, what to do. A bad
# signature is no row: s_client is asked then, and tells an impostor from what is no TLS.
_SIGNS = (
    ("unrecognized name", "unreachable", "does not serve %(sni)s", "--sni HOST, a name it serves"),
    ("starttls|wrong version|http request|unknown protocol|packet length too|record layer fail",
     "unreachable", "offers no TLS and no STARTTLS there", "check the protocol and the port"),
    (r"excessive message|more than \d+ ", "malformed", "showed more than a chain can be",
     "look at what answers there"),
    ("asn1|x509 lib|public key param|cert length", "malformed", "showed what is no certificate",
     "look at what answers there"),
    ("connection refused", "unreachable", "refuses connections", "is the service running there?"),
    ("timed out", "timeout", "gave no certificate in %(timeout)g s",
     "is it overloaded or behind a firewall? --timeout SECONDS"))


def _is_own(family, where):
    """Say whether an address is this machine's: then a packet to it would leave from itself."""
    import socket
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)  # sends nothing
        return probe.getsockname()[0] == where[0] or where[0].startswith("127.")


@memoized  # many lineages, few upstreams
def _resolve(host, port, own):
    """Return [(family, socket address)] of a host, in the resolver's order; or Failure."""
    import socket
    try:  # bytes, because text is encoded by a module that takes 4 ms to load
        found = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Failure("unreachable", "does not resolve (%s)" % error.strerror.lower(),
                      "check the name, and this host's resolver")
    others = [(family, where) for family, _, _, _, where in found
              if not (own and quietly(_is_own, family, where))]
    if not others:
        raise Failure("unreachable", "is this very machine",
                      "name the server that has the certificate with --from HOST[:PORT]")
    return others


def _network_failure(error, job, otherwise, hint):
    """Return the Failure that an exception or s_client's words are a sign of, or `otherwise`."""
    if isinstance(error, Failure):
        return error
    # socket.timeout is a TimeoutError from Python 3.10 on
    text = "timed out" if isinstance(error, TimeoutError) else str(error).lower()
    return next((Failure(reason, words % job._asdict(), known)
                 for sign, reason, words, known in _SIGNS if re.search(sign, text)),
                Failure("unreachable", otherwise, hint))


def _show_certificates(job, where, deadline, way):
    """Return (exit status, certificates, error text) of `openssl s_client -showcerts`."""
    arguments = ["s_client", "-connect", endpoint_text(*where[:2]), "-showcerts", "-no_tls1",
                 "-no_tls1_1", "-cipher", CIPHERS + (_TYPES[job.want][0] if way == "1.2" else "")]
    arguments += ["-no_tls1_3"] if way == "1.2" else []
    arguments += ["-sigalgs", _TYPES[job.want][1]] if way == "sigalgs" else []
    arguments += [] if is_address(job.sni) else ["-servername", job.sni]
    arguments += [] if job.kind == "tls" else ["-starttls", job.kind, "-xmpphost", job.sni]
    # no -sess_in: a resumed handshake shows the old leaf
    status, output, errors = run_openssl(arguments, deadline=deadline)
    # only what begins a line: a subject can hold the text of another certificate
    blocks = re.findall(rb"(?m)^-----BEGIN CERTIFICATE-----\n[\w+/=\n]+-----END CERTIFICATE-----$",
                        output)
    return status, read_pem(b"\n".join(blocks))[0], errors


def _by_command(job, _, where, deadline, way):
    """Return the certificates that s_client alone has seen: its exit status is the proof."""
    status, certificates, errors = _show_certificates(job, where, deadline, way)
    if not certificates:
        raise _network_failure(errors, job, "completes no TLS handshake (TLS 1.2 or later, "
                               "ephemeral keys)", "check the protocol and the port")
    if status != 0:  # it prints an impostor's too
        raise Failure("unproven", "showed a certificate and did not prove that it holds its key",
                      "an impostor, or it demands a client certificate: use another port or source")
    return certificates


def _limit(context, ciphers=CIPHERS):
    """Make an SSL context take TLS 1.2 or later with ephemeral keys, and no less; return it."""
    import ssl
    if sys.version_info >= (3, 7):  # where the options warn, which takes 1 ms
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # novm (vermin sees no condition)
    else:
        context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    # no static RSA: that would be a handshake without a signature
    context.set_ciphers(ciphers)
    return context


@memoized  # a thousand exchanges share it, and no session
def _context(want, way):
    """Return the SSL context of a handshake in which nothing is verified but the proof."""
    import ssl
    # without the trust store, which takes 20 ms to load: a new leaf is verified later, by openssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the peer's signature is checked all the same
    if way != "1.2":
        return _limit(context)
    context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0)  # 3.6 may have none
    return _limit(context, CIPHERS + _TYPES[want][0])


def _handshake(job, connection, deadline, way):
    """Return [leaf that the peer proved to hold the key of, and where Python can tell, its chain];
    OSError where the handshake fails."""
    name = None if is_address(job.sni) else job.sni
    if name and sys.version_info >= (3, 7):
        name = name.encode()  # as in _resolve
    with _context(job.want, way).wrap_socket(connection, server_hostname=name,
                                             do_handshake_on_connect=False) as peer:
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        peer.do_handshake()  # the proof; nothing is read: a client certificate is asked for then
        leaf = peer.getpeercert(binary_form=True)
        shown = getattr(peer, "get_unverified_chain", list)()  # public from Python 3.13 on
        return [leaf] + [der for der in shown if der != leaf]


def _by_module(job, family, where, deadline, way):
    """Return the certificates of a handshake that the ssl module completed: with the chain of the
    same handshake, or from s_client, and then only with the same leaf; a known leaf needs none."""
    import socket
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.connect(where)
        proven = quietly(_handshake, job, connection, deadline, way)
    if not proven:  # s_client tells who showed a certificate first from who is no TLS server
        return _by_command(job, family, where, deadline, way)
    if len(proven) > 1 or str(binascii.crc32(proven[0])) == job.known:
        return proven
    for _ in range(3):  # a pool, or a rotation between the two handshakes
        certificates = _show_certificates(job, where, deadline, way)[1]
        if certificates[:1] == proven:  # then its exit status does not matter
            return certificates
    raise Failure("unreachable", "showed another certificate at each handshake",
                  "try again, or --from one member of the pool")


def _ask_address(job, family, where, deadline):
    """Return the Answer of one address: in the way that gives a certificate of the wanted type."""
    for way in [job.way or "1.2", "1.2", "sigalgs", ""] if job.want in _TYPES else [""]:
        ask = _by_command if job.kind != "tls" or way == "sigalgs" else _by_module
        # before 3.13 Python shows the leaf alone, which says nothing of the chain
        alone = ask is _by_module and sys.version_info < (3, 13)
        try:
            return Answer("", "alone" if alone else "", "", where[0], way and job.want + " " + way,
                          to_pem(ask(job, family, where, deadline, way)))
        except Failure:
            if not way:
                raise


def exchange(job):
    """Return the Answer of the first address that gives a proven certificate; or Failure."""
    deadline = time.monotonic() + job.timeout
    resolved, skip = _resolve(job.host, job.port, job.own), job.skip.split(",")
    addresses = [each for each in resolved if each[1][0] not in skip][:MAX_CERTIFICATES]
    gravest = Failure("unreachable", "has no other address")
    for position, (family, where) in enumerate(addresses):
        # an address that is dead leaves the others their share of the time
        share = (deadline - time.monotonic()) / (len(addresses) - position)
        try:
            return _ask_address(job, family, where, time.monotonic() + share)
        except (Failure, OSError, ValueError) as error:
            failure = _network_failure(error, job, "cannot be reached (%s)" % plain(
                error, 120).lower(), "check the network and the address")
            if failure.reason == "timeout":  # who asks next begins with the others
                resolved[:] = [each for each in tuple(resolved) if each[1] != where] + [
                    (family, where)]
        if gravest.reason not in ("unproven", "malformed"):  # what one shows, not that one is dead
            place = "" if where[0] == job.host else "(%s) " % where[0]
            gravest = Failure(failure.reason, place + str(failure), failure.hint)
    raise gravest


def _answer_of(function, *arguments):
    """Return the Answer that a function returns, or the one that tells how it failed."""
    try:
        return function(*arguments)
    except Failure as failure:
        return Answer(failure.reason or "missing", str(failure), failure.hint)
    except Exception as error:  # whatever a peer provokes ends as an answer
        if isinstance(error, (ValueError, RecursionError)) and not isinstance(error, OSError):
            return Answer("malformed", "answers with what cannot be read", "is it the right one?")
        return Answer("unreachable", "gives no answer (%s)" % getattr(
            error, "verify_message", error), "is it running? vault: VAULT_CACERT for its root")


def _answer_line(number, answer):
    """Return an Answer as a line for the pipe, what it holds in hexadecimal digits."""
    words = "\t".join(map(plain, (number,) + answer[:-1])) + "\t"
    return words.encode() + binascii.hexlify(answer.data[:MAX_OFFER + 1]) + b"\n"


class _Pool:
    """The network process's exchanges: side by side, each with its deadline, answered as they end.

    An exchange that waits on its peer for PATIENCE frees its place, for other upstreams: none is
    asked by more than 8 at once. One that was waited for in vain is not waited for again.
    """

    def __init__(self, answers):
        """Begin with nothing to do; `answers` is where they go."""
        import _thread  # built in; threading takes 2 ms
        _thread.stack_size(256 * 1024)
        self.begin, self.lock = _thread.start_new_thread, _thread.allocate_lock()
        self.waiting = collections.OrderedDict()  # number: job
        self.running = {}  # number: (job, when it started)
        # by upstream and timeout: when it last answered, and the Answer of a vain wait since
        self.heard, self.vain = {}, {}
        self.answers, self.unsent = answers, bytearray()
        os.set_blocking(answers, False)

    def take(self):
        """Return (number, job) of the exchange to make now, or None; as for end(), locked."""
        now, running = time.monotonic(), self.running.values()
        # a pool of 8 means 8 that make progress: who waits on a dead peer frees its place
        old = sum(now - started >= PATIENCE for _, started in running)
        if len(running) >= min(MAX_RUNNING, old + SIDE_BY_SIDE):
            return None
        upstreams = collections.Counter(job[:4] for job, _ in running)
        for number, job in self.waiting.items():
            if job[:4] in self.vain or upstreams[job[:4]] < SIDE_BY_SIDE:
                self.running[number] = self.waiting.pop(number), now
                return number, job
        return None

    def end(self, number, answer):
        """Put out an answer, unless the exchange's timeout was told already."""
        job, started = self.running.pop(number, (None, None))
        if job:
            upstream, now = job[:4], time.monotonic()
            # or unreachable after long: a resolver that is dead
            if answer.reason in ("timeout", "unreachable") and now - started > job.timeout / 4:
                # not one that is slow, and answers others
                if now - self.heard.get(upstream, 0) > job.timeout * 0.75:
                    self.vain.setdefault(upstream, answer)
            elif answer is not self.vain.get(upstream):
                self.heard[upstream] = now
                self.vain.pop(upstream, None)
            self.unsent += _answer_line(number, answer)
            self.send()

    def send(self):
        """Write as much as the pipe takes: the other process may be busy."""
        del self.unsent[:quietly(os.write, self.answers, self.unsent) or 0]

    def work(self, task):
        """Be a thread: make exchanges as long as there is one to make."""
        while task:
            number, job = task
            answer = self.vain.get(job[:4]) or _answer_of(exchange, job)
            with self.lock:
                self.end(number, answer)
                task = self.take()

    def tend(self):
        """Put out what is late, begin what may begin; return (descriptors, seconds) to wait for."""
        with self.lock:
            self.send()
            for number, (job, started) in list(self.running.items()):
                # all else keeps its deadline by itself
                if time.monotonic() > started + job.timeout + 0.2:
                    self.end(number, Answer("timeout", "was not resolved in %g s" % job.timeout,
                                            "look at the resolver"))
            for task in iter(self.take, None):
                try:
                    self.begin(self.work, (task,))
                except RuntimeError:  # no more threads here: those that run go on
                    self.waiting[task[0]] = self.running.pop(task[0])[0]
                    break
            # a tenth of a second is soon enough for what no thread does by itself
            return [self.answers] * bool(self.unsent), 0.1 if self.running or self.waiting else None


def _serve_jobs(jobs, answers):
    """Be the network process: read jobs, a line each, and answer them until no more can come."""
    import ssl  # noqa: F401  (20 ms, while the other process reads its files)
    pool, unread = _Pool(answers), b""
    while True:
        writing, seconds = pool.tend()
        if select.select([jobs], writing, [], seconds)[0]:
            piece = os.read(jobs, 65536)
            if not piece:
                return
            *lines, unread = (unread + piece).split(b"\n")
            with pool.lock:  # a thread may be looking there for its next one
                for line in lines:
                    number, *fields = line.decode().split("\t")
                    fields[3] = float(fields[3])
                    pool.waiting[number] = Job(*fields)


class Network:
    """A process that answers, mostly the unprivileged one that does every handshake of a run.

    It is believed in nothing but bytes: what breaks the protocol, floods or stays silent ends it,
    and every exchange that it still owed.
    """

    def __init__(self, serve=_serve_jobs, unprivileged=True):
        """Fork it."""
        self.pid, self.to_jobs, self.from_answers = own_process(serve, unprivileged)
        os.set_blocking(self.to_jobs, False)
        self.count, self.longest, self.heard = 0, 0.0, time.monotonic()
        self.kept, self.buffer, self.unsent, self.broken = 0, b"", b"", ""
        self.answers = {}  # number: the line that answers it, None while it is owed

    def submit(self, job):
        """Ask for an exchange; return the number under which answer() tells how it went."""
        self.count += 1
        number = b"%d" % self.count
        self.answers[number], self.heard = None, time.monotonic()
        self.longest = max(self.longest, job.timeout)
        line = "\t".join(map(str, (self.count,) + job)) + "\n"
        self.unsent += line.encode("ascii", "replace")
        if len(self.unsent) > select.PIPE_BUF // 4:  # each time wakes that process: not for one
            self.send()
        return number

    def send(self):
        """Write the jobs that wait, which are shorter than PIPE_BUF: at once or not at all."""
        if not self.broken and not select.select([], [self.to_jobs], [], 5)[1]:
            self.broken = "does not listen"
        quietly(os.write, self.to_jobs, self.unsent)  # answer() tells what became of it
        self.unsent = b""

    def has(self, number, seconds):
        """Say whether the answer to a job is here or none can come, waiting up to `seconds`."""
        deadline = time.monotonic() + seconds
        if self.unsent:
            self.send()
        while not self.answers.get(number) and not self.broken:
            readable = select.select([self.from_answers], [], [],
                                     max(0, deadline - time.monotonic()))[0]
            if readable:
                self.read()
            # its own deadlines come first: this one is for a process that does not keep them
            if time.monotonic() > self.heard + self.longest + 5:
                self.broken = self.broken or "gave no answer in time"
            elif not readable:
                return False
        return True

    def read(self):
        """Keep lines that answer what is owed; believe nothing more after any other."""
        piece = os.read(self.from_answers, 65536)  # a pipe holds no more
        *lines, self.buffer = (self.buffer + piece).split(b"\n")
        if lines or len(piece) > 32768:  # a large answer begins; not one that comes in drops
            self.heard = time.monotonic()
        for line in lines:
            number = line.partition(b"\t")[0]
            if self.answers.get(number, line) is not None:
                self.broken = "said what was not asked" if line[:2] != b"! " else (
                    "stopped: " + plain(line[2:].decode("latin-1")))
                return
            self.answers[number] = line
            self.kept += len(line)
        # in a large run all the others wait for one slow upstream
        most = 128 * MAX_OFFER + self.count * MAX_KEY
        if not piece or len(self.buffer) > 3 * MAX_OFFER or self.kept > most:
            self.broken = "floods" if piece else "died"

    def answer(self, number):
        """Return the Answer to a job, waiting for it; Failure where it tells one or none comes."""
        while not self.has(number, self.longest):
            pass
        line = self.answers.pop(number) or b""
        self.kept -= len(line)
        try:
            _, *words, data = line.split(b"\t")
            answer = Answer(*[plain(word.decode("latin-1")) for word in words],
                            data=binascii.unhexlify(data))
        except (TypeError, ValueError):
            self.broken = self.broken or "said what was not asked"
            raise Failure("unreachable", "cannot be asked: its process " + self.broken,
                          "run it again, with -v")
        if answer.reason:  # bytes are believed and such words, nothing that would be a verdict
            raise Failure(_REASONS.get(answer.reason, "malformed"), answer.detail, answer.hint)
        return answer

    def close(self):
        """End the process: it holds nothing that matters."""
        os.close(self.to_jobs)
        os.close(self.from_answers)
        quietly(os.killpg, self.pid, SIGKILL)  # which it may not lead yet
        os.kill(self.pid, SIGKILL)
        os.waitpid(self.pid, 0)


def in_own_process(function, seconds, unprivileged=True):
    """Return the bytes that function() returns in a process of its own; Failure as it raised."""
    def serve(_, answers):
        """Be that process: one answer, to nothing that was asked; not for ever, if ours dies."""
        import signal
        signal.alarm(int(seconds) + 2)
        os.write(answers, _answer_line("1", _answer_of(lambda: Answer(data=function()))))

    process = Network(serve, unprivileged)
    process.answers[b"1"], process.longest = None, seconds
    try:
        if not process.has(b"1", seconds):
            raise Failure("timeout", "gave no answer in %g s" % seconds, "--timeout SECONDS")
        return process.answer(b"1").data
    finally:
        process.close()


def follow(path):
    """Return where a path leads; OSError at a link of another user's: it could lead to root's."""
    folder, name = os.path.split(path)
    if not name:
        return path if folder == path else follow(folder)
    folder = follow(folder)
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return path
    if os.lstat(path).st_uid not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, "a link of another user's", path)
    return follow(os.path.join(folder, os.readlink(path)))


def _read_regular(path):
    """Return the bytes of a regular file, at most one more than an offer may have; or OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # here links in a circle end, too
        raise OSError(errno.EINVAL, "no regular file", path)
    with open(os.open(follow(path), os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        return file.read(MAX_OFFER + 1) or b""  # None: it has become a pipe


def _read_medium(source, _seconds, _environment):
    """Return the Answer of file:PATH: a PEM file, or a folder with certbot's files or some."""
    names = [name for name in "/fullchain.pem /cert.pem /chain.pem /privkey.pem".split()
             if os.path.lexists(source.target + name)]
    names = names or ["/fullchain.pem" * os.path.isdir(source.target)]
    return Answer(data=b"\n".join(_read_regular(source.target + name) for name in names))


def _run_command(source, seconds, environment):
    """Return the Answer that a shell command prints, if it ends with status 0 in time."""
    import subprocess
    deadline = time.monotonic() + seconds
    process = subprocess.Popen(
        source.target, shell=True, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = converse(process, {}, deadline, MAX_OFFER)
        status = process.wait(max(0.01, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        kill_group(process)
        raise Failure("timeout", "did not end in %g s" % seconds,
                      "run it by hand, or --timeout SECONDS")
    if status or not output.strip():
        raise Failure("unreachable", "ended with status %d (%s)" % (
            status, last_line(errors) or "and said nothing"), "run it by hand")
    return Answer(data=output)


# What a store's status, or its first digit, means, and what to do.
_STATUS = {403: "it forbids reading it: check the policy and the token's age",
           404: "no such secret, or it is deleted: check the path",
           503: "sealed or in maintenance: unseal it",
           3: "it redirects to what is not followed: name that place as the source",
           4: "it refuses the request: check the credentials and the path"}

# The logins of sovereign clouds, by the end of their vaults' names.
_LOGINS = {"vault.usgovcloudapi.net": "login.microsoftonline.us",
           "vault.azure.cn": "login.chinacloudapi.cn"}


def _dig(document, *names):
    """Return what is at the end of nested names in a JSON document, or None."""
    for name in names:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _pem_in(document):
    """Return a JSON document as bytes in which PEM has its lines, however it was put in."""
    import json
    # newlines as they should be, Windows' or escaped once more; text around the blocks is allowed
    return re.sub(r"(\\+[rn])+", "\n", json.dumps(document)).encode()


def _ask_store(environment, url, headers, body=None, redirects=1):
    """Return the JSON document that a store answers with, to a POST with a body; or Failure."""
    import http.client
    import json
    import ssl
    import urllib.parse
    host = urllib.parse.urlsplit(url).netloc
    if "Metadata" in headers:  # a managed identity's endpoint is link-local and speaks HTTP
        connection = http.client.HTTPConnection(host)
    else:
        connection = http.client.HTTPSConnection(
            host, context=_limit(ssl.create_default_context(cadata=environment.get("roots"))))
    if not "".join(headers.values()).isprintable():  # http.client's own words would show it
        raise Failure("unreachable", "HTTP forbids a character of a credential", "correct it")
    connection.request("POST" if body else "GET", url.partition(host)[2], body, headers)
    response = connection.getresponse()
    data, status = response.read(4 * MAX_OFFER), response.status
    target = urllib.parse.urljoin(url, response.getheader("Location", ""))
    if status // 100 == 3 and redirects and target.startswith("https://"):
        if urllib.parse.urlsplit(target).hostname != urllib.parse.urlsplit(url).hostname:
            headers, body = {}, None  # what is secret is for the host that was named
        return _ask_store(environment, target, headers, body, 0)
    if status != 200:
        raise Failure("unreachable", "does not give it (status %d)" % status, _STATUS.get(
            status, _STATUS.get(status // 100, "look there")))
    return json.loads(data.decode())


def _vault_secret(source, environment):
    """Return the PEM bytes of a KV secret: version 2, or 1 where the mount is."""
    import json
    url = "https://%s/v1/" % endpoint_text(source.host, source.port)
    get, target = environment.get, source.target
    space, token = get("VAULT_NAMESPACE"), get("VAULT_TOKEN")
    headers = {"X-Vault-Namespace": space} if space else {}
    if not token:
        if not get("VAULT_ROLE_ID"):
            raise Failure("unreachable", "needs VAULT_TOKEN_FILE=PATH, or VAULT_ROLE_ID and "
                          "VAULT_SECRET_ID_FILE", "set it in certferry/environment")
        login = json.dumps({"role_id": environment["VAULT_ROLE_ID"],
                            "secret_id": get("VAULT_SECRET_ID", "")})
        token = str(_dig(_ask_store(environment, url + "auth/approle/login", headers,
                                    login.encode()), "auth", "client_token"))
    headers["X-Vault-Token"] = token
    # a policy may forbid it: then the secret's own answer tells
    info = quietly(_ask_store, environment, url + "sys/internal/ui/mounts/" + target, headers)
    mount = str(_dig(info, "data", "path"))
    if not target.startswith(mount):
        mount = target.partition("/")[0] + "/"
    second = info is None or _dig(info, "data", "options", "version") == "2"
    secret = _dig(_ask_store(environment, url + mount + ("data/" if second else "")
                             + target[len(mount):], headers), *["data"] * (1 + second))
    return _pem_in([_dig(secret, name) for name in
                    "fullchain certificate cert chain ca_chain private_key privkey key".split()])


def _azure_secret(source, environment):
    """Return the bytes of a Key Vault secret: PEM, or the DER of a PKCS#12 container."""
    import urllib.parse
    get, cloud = environment.get, source.host.partition(".")[2]
    form = {"client_id": get("AZURE_CLIENT_ID", "")}
    if get("AZURE_CLIENT_SECRET"):
        login = get("AZURE_AUTHORITY_HOST") or _LOGINS.get(cloud, "login.microsoftonline.com")
        form.update(grant_type="client_credentials", scope="https://%s/.default" % cloud,
                    client_secret=environment["AZURE_CLIENT_SECRET"])
        answer = _ask_store(environment, "https://%s/%s/oauth2/v2.0/token" % (
            login.split("://")[-1].strip("/"), get("AZURE_TENANT_ID", "")),
            {"Content-Type": "application/x-www-form-urlencoded"},
            urllib.parse.urlencode(form).encode())
    else:  # the managed identity, of the client where one is named
        form = form if form["client_id"] else {}
        form.update({"api-version": "2018-02-01", "resource": "https://" + cloud})
        answer = _ask_store(environment, "%s/metadata/identity/oauth2/token?%s" % (
            get("AZURE_POD_IDENTITY_AUTHORITY_HOST") or "http://169.254.169.254",
            urllib.parse.urlencode(form)), {"Metadata": "true"})
    document = _ask_store(environment, "https://%s/secrets/%s?api-version=7.4" % (
        endpoint_text(source.host, source.port), source.target),
        {"Authorization": "Bearer %s" % _dig(answer, "access_token")})
    value, kind = str(_dig(document, "value")), str(_dig(document, "contentType"))
    return binascii.a2b_base64(value) if "pkcs12" in kind else _pem_in(value)


def _fetch_secret(source, seconds, environment):
    """Return the Answer of a vault: or azure: secret, fetched in a process of its own."""
    paths = {name[:-5]: name for name in CREDENTIALS
             if name.endswith("_FILE") and name.startswith(source.kind.upper())}
    paths["roots"] = "VAULT_CACERT" if source.kind == "vault" else "SSL_CERT_FILE"
    environment = dict(environment)
    for name, path_name in paths.items():  # nobody can't read them
        if environment.get(path_name) and not environment.get(name):
            environment[name] = _read_regular(environment[path_name]).decode(
                "ascii", "ignore").strip()
    for module in "encodings.idna encodings.punycode http.client json ssl".split():
        __import__(module)  # while it can be read: see own_process()
    fetch = _vault_secret if source.kind == "vault" else _azure_secret
    data = in_own_process(lambda: fetch(source, environment), seconds)
    return Answer(data=open_pkcs12(data) if data[:1] == b"\x30" else data)


# What is no handshake and may hold the key, too: (Source, seconds, environment) in, an Answer out.
FETCHERS = {"file": _read_medium, "exec": _run_command, "vault": _fetch_secret,
            "azure": _fetch_secret}


def offer_of(source, function, *arguments):
    """Return the Offer in the Answer that a function returns, in its order; Failure otherwise."""
    try:
        answer = function(*arguments)
        if len(answer.data) > MAX_OFFER:
            raise ValueError("more than %d bytes" % MAX_OFFER)
        certificates, key = read_pem(answer.data)
        if not certificates:
            raise ValueError("no certificate in it")
        if source.kind in FETCHERS:  # in any order: authorities, by their constraints, come last
            certificates.sort(key=lambda der: bool(re.search(
                rb"\x55\x1d\x13(\x01\x01\xff)?\x04.\x30.\x01\x01\xff", der, re.S)))
    except Failure as failure:
        where = source.text + " " if failure.reason else ""  # else this host lacks something
        raise Failure(failure.reason, where + str(failure), failure.hint)
    except OSError as error:
        raise Failure("unreachable", "%s: %s: %s" % (source.text, error.filename, str(
            error.strerror).lower()), "is it in place?")
    except ValueError as error:
        raise Failure("malformed", "%s: %s" % (source.text, error), "look at what it holds")
    leaf, *others = certificates
    chain = None if answer.detail and not others else tuple(others)
    return Offer(source, answer.address, leaf, chain, key, answer.way)


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------


def days_left(certificate, now):
    """Return the whole days until a certificate expires, negative afterwards."""
    return (certificate.not_after - now) // DAY


def describe_key(public_key):
    """Return the kind and fingerprint of a public key as messages show them."""
    return key_kind(public_key) + " sha256:" + fingerprint(public_key)[:16]


def _lacking(case):
    """Return the names that the leaf must cover and does not: every -d, or else NAME or *.NAME."""
    return [] if not case.domains and "*." + case.name in case.leaf.domains else [
        name for name in case.domains or (case.name,) if not covers(case.leaf.domains, name)]


def _key_objections(case, now):
    """Yield what is wrong with the key that a leaf is for, as _objections() does."""
    public, carried = case.public_key, case.carried_key
    if carried not in (None, public):  # though the lineage's own key would fit
        yield "key-mismatch", "has a private key (%s) that does not fit its certificate (%s)" % (
            describe_key(carried), describe_key(public)), "put the matching pair there"
    if fingerprint(public) in case.retired:
        yield ("key-mismatch", "has a certificate for a key that was retired here (%s)"
               % describe_key(public), "certferry %s --force takes it back, with --key PEM where "
               "it is no longer here" % case.name)
    if carried or public in case.keys or public in case.rolled_keys:
        return
    # mostly not the upstream's new key, but another server: what it shows tells
    if _lacking(case):
        hint = "--sni HOST, a name under which the upstream serves this one"
    elif case.current is None:
        hint = ("a CDN or load balancer shows its own: name the origin with --from HOST[:PORT]; or "
                "bring its key with --key")
    else:
        hint = ("on purpose: certferry %s --key NEW.pem; by accident: on the upstream, certbot "
                "renew --cert-name %s --reuse-key; the certificate here lasts %d more days" % (
                    case.name, case.name, days_left(case.current, now)))
    yield "key-mismatch", "has a certificate for another key (%s, ours is %s), by %s for %s" % (
        describe_key(public), describe_key(next(iter(case.keys))), describe_name(
            case.leaf.issuer), " ".join(case.leaf.domains[:4])), hint


def _objections(case, now):
    """Yield (reason, what the source does, hint) of each rule broken, in the README's order."""
    leaf, current = case.leaf, case.current
    begins, ends = leaf.not_before, leaf.not_after
    if case.public_key:  # the current leaf's key was judged when it was deployed
        yield from _key_objections(case, now)
    lacking = _lacking(case)
    if lacking:  # openssl would fall back to the common name: browsers do not
        yield "names", "shows a certificate for %s, not for %s" % (
            " ".join(leaf.domains[:6]) or "no usable subject alternative name (the common name "
            "does not count)", " ".join(lacking)), "--sni HOST, or -d DOMAIN if less is wanted"
    if not begins <= now <= ends:
        reason = "expired" if now > ends else "not-yet-valid"
        yield reason, "has a certificate that is %s (from %s to %s, and it is %s)" % (
            reason.replace("-", " "), iso_time(begins), iso_time(ends), iso_time(now)), (
                "renew it on the upstream, or check the clock here")
    if case.trust:
        wrong, _, hint = case.trust.partition(": ")
        yield ("untrusted", "has a certificate that is not trusted: " + wrong,
               hint or "see to it on the upstream")
    if current and leaf.der != current.der and (
            # by notBefore, never by notAfter: shorter lifetimes are progress
            begins < current.not_before or begins == current.not_before
            and fingerprint(leaf.der) in case.replaced):
        yield "older", "offers the certificate of %s, older than the one here (%s)" % (
            iso_time(begins), iso_time(current.not_before)), (
                "is %s a stale member of a pool? --force takes it" % (case.offer.address or "it"))
    lost = [] if case.domains or not current else [
        name for name in current.domains if not covers(leaf.domains, name)]
    if lost:
        yield ("names-lost", "no longer covers %s" % " ".join(lost),
               "if that is meant: --force, or -d for each name needed")
    # fingerprint() loads libcrypto: not for the current leaf, twice a day
    if case.public_key in case.rolled_keys or case.rolled_back and (
            set(case.rolled_back).intersection(marks_of(leaf, case.offer.chain))):
        yield ("rolled-back", "offers the certificate of %s, which, or its key, was rolled back "
               "from" % iso_time(begins), "it stays out until there is a newer one, or certferry "
               "renew %s --force" % case.name)


def judge(case, now, force=False):
    """Return the Verdict on an offer: the whole policy, the first rule that it breaks counts."""
    # a generator, so that no later rule is even asked
    for reason, words, hint in _objections(case, now):
        if not force or reason not in ("older", "names-lost", "rolled-back"):
            return Verdict(reason, case.offer.source.text + " " + words, hint)
    return Verdict("", "", "")


def gravity(failure):
    """Return how grave a Failure is: a changed key most, least a stale member of a pool and what
    is pending beside a failure."""
    return {"key-mismatch": 3, "unreachable": 1, "timeout": 1, "older": 0, "hook": 0,
            "not-served": 0}.get(failure.reason, 2)


def due_time(leaf):
    """Return when a renewal is due: a third of the lifetime is left, or half of ten days or less:
    certbot's rule since 4.0."""
    return leaf.not_after - leaf.lifetime / (2 if leaf.lifetime <= 10 * DAY else 3)


def threshold(share, leaf):
    """Return the seconds of a threshold, "25%" of a leaf's lifetime or "10d"."""
    number = float(share[:-1])
    return number * DAY if share.endswith("d") else leaf.lifetime * number / 100


def past(seconds, now):
    """Return a stored time, or None: a clock that once was ahead must not vouch for years."""
    return seconds if not seconds or seconds <= now else None


def last_good(lineage, now):
    """Return when a source was last heard to good effect, or None."""
    state = lineage.state
    sound = state.result in SOUND or (state.result, state.reason) == ("deferred", "rolled-back")
    return past(lineage.checked if sound else state.good, now)


def health_of(lineage, now, misfit="", failure=None):
    """Return (ok, due, warning or critical; why) of what is in service; `misfit` says what of it
    does not fit, `failure` why it cannot be read."""
    if failure:
        return "unknown", "cannot be read: %s" % failure
    if lineage.current is None:
        return "critical", "has no certificate"
    leaf, options, state = lineage.current.leaf, lineage.options, lineage.state
    left, due, good = leaf.not_after - now, due_time(leaf), last_good(lineage, now)
    if options.when == "due":  # nobody is asked before
        good = max(good or 0, min(due, now))
    ends = "expires in %d days" % (left // DAY) if left >= 2 * DAY else (
        "expires in %d hours" % (left // 3600))
    rules = (  # the gravest first
        (lineage.key is None, "critical", "has no private key"),
        (misfit, "critical", misfit),
        (left <= 0, "critical", "has expired"),
        (left <= threshold(options.critical, leaf), "critical", ends),
        (left <= threshold(options.warn, leaf), "warning", ends),
        (state.owed or state.unserved, "warning", "has something pending"),
        (options.enabled == "yes" and (good is None or now - good >= leaf.lifetime / 10), "warning",
         "was not confirmed by its source since %s" % (iso_time(good) or "it is here")),
        (now >= due, "due", ends))
    return next(((health, why) for holds, health, why in rules if holds), ("ok", ends))


# --------------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------------


def refuse_foreign(path, info, private=True):
    """Raise Failure where a file or folder is another user's, or others can write it."""
    owner = info.st_uid
    if owner not in (0, os.geteuid()):
        raise Failure(None, "%s belongs to uid %d" % (path, owner), "chown it to root")
    if private and info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode):
        raise Failure(None, "%s, of uid %d, can be written by others" % (path, owner), "chmod go-w")


@memoized  # a thousand lineages share three of their four folders
def check_folder(path):
    """Raise Failure where a folder or hook, or its link, is another user's or open to others."""
    info = os.lstat(path)
    refuse_foreign(path, info)
    if stat.S_ISLNK(info.st_mode):
        refuse_foreign(path, os.stat(path))


def list_folder(folder):
    """Return the names in a folder, sorted; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_file(path, limit=MAX_KEY, private=False):
    """Return the bytes of a regular file, by default of a key, that root or the caller owns,
    following no link. `private` refuses one that others can write. Failure for somebody else's."""
    # O_NONBLOCK: a planted FIFO would wait for its writer for ever
    descriptor = os.open(path, os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(descriptor)
        if limit == MAX_KEY and "@" in os.path.basename(os.path.dirname(path)):
            check_folder(os.path.dirname(path))  # it may belong to the service that reads it
        else:
            refuse_foreign(path, info, private)
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            raise Failure(None, "%s is no regular file of at most %d bytes" % (path, limit),
                          "put the right one there")
        return os.read(descriptor, info.st_size)  # of `limit`, the buffer costs more than all
    finally:
        os.close(descriptor)


def read_text(path):
    """Return the text of a record that nobody else can write."""
    return os.fsdecode(read_file(path, MAX_RECORD, private=True))  # as arguments are


def real_path(place, path):
    """Return where a live file is, through an administrator's links that end in the config dir."""
    real = os.path.realpath(path) if os.path.islink(path) else path
    if real != path:
        refuse_foreign(path, os.lstat(path))
        if not real.startswith(tuple(os.path.realpath(folder) + "/" for folder in (
                place.config, place.archive))):
            raise Failure(None, "%s is a link out of the config dir" % path, "put the file there")
        if os.path.exists(real):
            check_folder(os.path.dirname(real))
    return real


def _sync(folder):
    """Make what a folder lists durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dress(new, like):
    """Give a new file (by descriptor) or folder owner, group, mode, ACL of `like`: never wider."""
    info, acl = os.stat(like), "system.posix_acl_access"
    quietly(lambda: os.removexattr(new, acl))  # what a folder's default ACL gave
    try:
        os.chown(new, info.st_uid, info.st_gid)
    except PermissionError:  # not root: the group's rights would go to another group
        os.chmod(new, stat.S_IMODE(info.st_mode) & 0o2700)
    else:  # after chown, which clears the set-group-id bit
        os.chmod(new, stat.S_IMODE(info.st_mode))
        quietly(lambda: os.setxattr(new, acl, os.getxattr(like, acl)))


def _create(path, data, mode, like=None):
    """Make a new file of `data`, synced, with that mode; or as _dress() does it."""
    # O_EXCL, then by descriptor only: --metrics may be in a folder where others plant links
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.chmod(descriptor, mode)
        if like:
            _dress(descriptor, like)
        os.fsync(descriptor)


def _hidden(path):
    """Return the temporary name beside a path."""
    folder, name = os.path.split(path)
    return "%s/.%s%s" % (folder, name.lstrip("."), LITTER)


def remove(path):
    """Remove a file, a link or a version's folder, if it is there."""
    if os.path.isdir(path) and not os.path.islink(path):  # a planted link leads to elsewhere
        hidden = _hidden(path)
        os.rename(path, hidden)  # half removed it is no version, but litter
        for name in os.listdir(hidden):
            remove(hidden + "/" + name)
        os.rmdir(hidden)
    elif os.path.lexists(path):
        os.unlink(path)


def _replace(path, make):
    """Let what make(temporary name) makes take the place of `path` in one rename."""
    hidden = _hidden(path)
    try:
        quietly(os.unlink, hidden)  # what a run that died left
        make(hidden)
        os.rename(hidden, path)
    finally:
        quietly(os.unlink, hidden)


def write_file(path, data, mode=0o600, like=None):
    """Replace a file in one rename by one that is complete and synced."""
    _replace(path, lambda hidden: _create(hidden, data, mode, like))
    _sync(os.path.dirname(path))


def _set_link(target, path):
    """Make `path` a link to `target` in one rename."""
    _replace(path, lambda hidden: os.symlink(target, hidden))


def make_folder(path, mode=None):
    """Make a folder with the mode of its parent, closed to other writers; or check it."""
    if not os.path.lexists(path):
        os.mkdir(path, 0o700)
        parent = os.path.dirname(path)
        os.chmod(path, mode or stat.S_IMODE(os.stat(parent).st_mode) & 0o2755)
        _sync(parent)
    check_folder(path)


def find_litter(*folders):
    """Return the paths of what an interrupted run left in folders."""
    return [folder + "/" + name for folder in folders for name in list_folder(folder)
            if name.endswith(LITTER)]


def save_state(place, state):
    """Write NAME.state in one rename."""
    make_folder(place.records, 0o700)  # a hook may hold a password
    write_file(place.state, os.fsencode(format_state(state)))


def touch_state(place, now):
    """Set the time of the last check."""
    os.utime(place.state, (now, now))


def save_conf(place, given):
    """Write the remembered options to NAME.conf, touching only the lines that changed."""
    make_folder(place.records, 0o700)
    text = read_text(place.conf) if os.path.lexists(place.conf) else ""
    write_file(place.conf, os.fsencode(edit_conf(text, parse_conf(text, place.conf)[0], given)))


def _number(place, path):
    """Return the N of a path that ends in NAME@N, 0 for any other."""
    name, _, number = os.path.basename(path).rpartition("@")
    return int(number) if name == place.name and re.match(r"[1-9][0-9]{0,8}\Z", number) else 0


def version_numbers(place):
    """Return the numbers of the versions that there are, the newest first."""
    return sorted(filter(None, (_number(place, name) for name in list_folder(place.archive))),
                  reverse=True)


def next_number(place):
    """Return the number of the version that is made next."""
    return max(version_numbers(place) + [0]) + 1


def pointed_number(place):
    """Return the number of the version that .current points to, 0 without one; Failure where it
    points to another lineage's, or to none."""
    pointer = place.pointer
    target = quietly(os.readlink, pointer) or ""
    if not target and not os.path.lexists(pointer):
        return 0
    number = _number(place, target)
    # live or archive may be a link to elsewhere; None: the version is gone
    if number and quietly(os.path.samefile, pointer, place.version(number)) is not False:
        return number
    raise Failure(None, "%s points to %s, which is no version of it" % (
        pointer, plain(target) or "nothing"), "point it to one, or move it away")


@functools.lru_cache(maxsize=256)  # one wildcard certificate may be in many lineages
def _parse_chain(data):
    """Return (leaf as Certificate, chain as DER) of PEM bytes; ValueError where there is none."""
    leaf, *chain = read_pem(data)[0]
    return parse_certificate(leaf), tuple(chain)


def load_version(place, number):
    """Return a Version from the archive, or with number 0 the loose files in live/NAME; None where
    its certificates are missing or damaged."""
    folder = place.version(number) if number else place.live
    paths = [folder + "/fullchain.pem"]
    if not number and not os.path.lexists(paths[0]):
        cert, chain, *_ = place.members
        paths = [cert] + [chain] * os.path.lexists(chain)
    try:
        data = b"".join([read_file(real_path(place, path), MAX_OFFER) for path in paths])
        return Version(number or None, folder, *_parse_chain(data))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def load_versions(place):
    """Return the versions in the archive that can be read, the newest first."""
    return list(filter(None, (load_version(place, number) for number in version_numbers(place))))


def find_key(place, current):
    """Return the path of the lineage's private key, or None where there is none."""
    path = real_path(place, (current.folder if current else place.live) + "/privkey.pem")
    return path if os.path.lexists(path) else None


def key_record(path, leaf):
    """Return a word that changes when a key file, or the leaf's public key, does."""
    info = os.stat(path)
    return "%d:%o:%d:%d:%d" % (info.st_ino, info.st_mode, info.st_size, info.st_mtime_ns,
                               binascii.crc32(leaf.public_key))


def public_key_of(path):
    """Return the public key (DER) of a private key file; Failure with why not, in words."""
    try:
        return public_half(read_file(path), True)
    except (OSError, ValueError) as error:
        raise Failure("no-key", "%s cannot be used: %s" % (
            path, why(error)), "put the right one there")


def fits(public_key, leaf):
    """Say whether a public key, as openssl printed it, is a leaf's."""
    return public_key == leaf.public_key or public_key == leaf_public_key(leaf.der)


def staged_keys(place):
    """Return the paths of the staged keys, sorted."""
    return [place.live + "/" + name for name in list_folder(place.live)
            if name.startswith("privkey-") and name.endswith(".pem")]


def stage_key(place, pem, public_key, first=False):
    """Put a private key (PEM) into live/NAME, as its key if it is the first; return its path."""
    for folder in (place.config, place.config + "/live", place.live):
        make_folder(folder)
    path = "%s/privkey%s.pem" % (place.live, "" if first else "-" + fingerprint(public_key)[:16])
    write_file(path, pem)
    return path


def unlinked(place, current):
    """Return the live paths that do not lead to the current version, if there is one."""
    return [path for name, path in zip(MEMBERS, place.members) if current and current.number
            and quietly(os.readlink, path) != ".current/" + name]


def astray(place, current):
    """Return the live paths where servers read something else than the current version has."""
    return [path for path in unlinked(place, current) if quietly(
        lambda path: read_file(real_path(place, path), MAX_OFFER), path) != quietly(
            read_file, path.replace(place.live, current.folder), MAX_OFFER)]


def mend_links(place, current, replace=False, write=True):
    """Make live names links through .current where nothing is; return the paths.

    A private key put there by hand that does not fit what lies beside it is staged first. All else
    stays until the next deploy or `certferry NAME`, which come with `replace`.
    """
    mended = []
    for path in reversed(unlinked(place, current)):  # the key first: it may be refused
        words, real = path, real_path(place, path)
        if path == place.members[3] and path in astray(place, current) and os.path.exists(real):
            public = public_key_of(real)
            if not replace and fits(public, (load_version(place, 0) or current).leaf):
                continue
            if not fits(public, current.leaf):  # no private key is ever thrown away
                words += " (what was there is staged as %s)" % (
                    write and stage_key(place, read_file(real), public))
        elif os.path.exists(real) and not replace:
            continue
        if write:
            _set_link(".current/" + os.path.basename(path), path)
        mended.append(words)
    if mended and write:
        _sync(place.live)
    return mended


def mend_certificates(version, write):
    """Make cert.pem, chain.pem again where they lack what fullchain.pem has; return the paths."""
    mended = []
    for name, ders in (("cert.pem", (version.leaf.der,)), ("chain.pem", version.chain)):
        path = version.folder + "/" + name
        info = quietly(os.lstat, path)
        # the size of their PEM; it costs nothing, and what is cut off is not as long
        if info and info.st_size == sum(
                54 + (len(der) + 2) // 3 * 4 + (len(der) + 47) // 48 for der in ders):
            continue
        found = quietly(read_pem, quietly(read_file, path, MAX_OFFER) or b"")
        # adopted files may have other lines, and the root
        if not info or not found or not set(ders).issubset(found[0]):
            mended.append(path)
            if write:
                write_file(path, to_pem(ders), 0o644)
    return mended


def mend_key(place, version, write):
    """See that the private key of a version fits; return (path of one that does or None, what was
    done): another version's, a staged one or one put there by hand is put back, and what was
    written over it is staged."""
    target, done = real_path(place, version.folder + "/privkey.pem"), []
    found = read_file(target) if os.path.lexists(target) else b""
    public = found and public_key_of(target)
    if public and fits(public, version.leaf):
        return target, done
    paths = [each.folder + "/privkey.pem" for each in load_versions(place)
             if each.number != version.number] + [place.members[3]] + staged_keys(place)
    fitting = next((path for path in paths
                    if quietly(public_key_of, path) == version.leaf.public_key), None)
    if public and found not in [quietly(read_file, path) for path in paths]:
        refuse_foreign(target, os.lstat(target), False)  # a service's user brings no key of its own
        done = ["a key that does not fit was written over %s: it is staged as %s" % (
            target, write and stage_key(place, found, public))]
    if fitting:
        done.append("the key of %s is back" % version.folder)
    if not fitting or not write:
        return fitting, done
    # the mode that it has here, unless that is wider
    write_file(target, read_file(fitting), like=min(
        [target] * os.path.isfile(target) + [fitting], key=lambda path: os.stat(path).st_mode & 7))
    return target, done


def key_pem(key):
    """Return the PEM bytes of a private key, a path or a Secret."""
    return key.pem if isinstance(key, Secret) else read_file(key)


def _stage_version(lineage, folder, members, key):
    """Make the folder of a version, complete and synced, of certificates {name: PEM} and a key.

    The key, a path or a Secret, becomes like the one that it replaces, the folder like the one
    before. The first key's own file is adopted by link() where that can be; a copy of its own for
    every further version, so that a write through the live link spoils one version only.
    """
    place, before, target = lineage.place, lineage.current, folder + "/privkey.pem"
    like = find_key(place, before) or (None if isinstance(key, Secret) else key)
    os.mkdir(folder, 0o700)
    for name, data in members.items():
        _create(folder + "/" + name, data, 0o644)
    # a key moved in from a home folder must not keep its SELinux label
    key_label, label = (quietly(lambda path: os.getxattr(path, "security.selinux"), path)
                        for path in (like or folder, place.archive))
    if key == like and not (before and before.number) and key_label == label:
        quietly(os.link, key, target)  # not between file systems
    if not os.path.lexists(target):
        _create(target, key_pem(key), 0o600, like)
    _dress(folder, before.folder if before and before.number else place.archive)
    _sync(folder)


def rehearse(ders, key):
    """Find out before the rename what a server would find out at its reload; Failure then.

    In a process of its own: it parses what came from outside, and holds the key.
    """
    contents = to_pem(ders), key_pem(key)

    def shake_hands():
        """Return the leaf that the server's end shows; Failure where the handshake fails."""
        import _thread
        import ssl
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        paths = []  # pipes, since it only loads files
        for content in contents:
            read, write = os.pipe()
            _thread.start_new_thread(open(write, "wb", 0).write, (content,))  # and is closed then
            paths.append("/dev/fd/%d" % read)
        try:
            server.load_cert_chain(*paths, password=lambda: "")
            up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
            ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
            for end in ends * 6:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    pass  # it is the other end's turn
            return ends[0].getpeercert(binary_form=True)  # ValueError where they are not through
        except (ssl.SSLError, ValueError) as error:
            raise Failure(None, plain(getattr(error, "reason", None) or error))

    try:
        in_own_process(shake_hands, OPENSSL_SECONDS, unprivileged=False)
    except Failure as failure:
        raise Failure("rehearsal", "key and certificate do not complete a handshake (%s)" % failure,
                      "is the key file damaged? bring the upstream's again with --key")


def remove_unfinished(place, number, litter):
    """Remove what is half made of this lineage, and version `number` if it was never made current;
    return the paths. `litter` are paths of any lineage's."""
    found = find_litter(place.live) + [path for path in litter if os.path.basename(
        path).startswith((".%s@" % place.name, ".%s." % place.name))]
    # the state named it before its rename; one that is older was rolled back to
    if number and number > pointed_number(place) and os.path.isdir(place.version(number)):
        found.append(place.version(number))
    for path in found:
        remove(path)
    return found


def point_to(place, version, like=None):
    """Make a version the current one: the one instant of change; then whatever is no link yet.
    Its key gets the mode of the one that it replaces, `like`, unless everybody has a right there.

    1. names that are missing become links to .current/NAME.pem, dangling if need be
    2. .current is replaced in one rename
    3. plain files and other links are replaced by links
    4. the links' own times are touched: inotify on a path through a link sees nothing otherwise
    """
    info = like and quietly(os.stat, like)
    if info and not info.st_mode & 7:
        quietly(_dress, version.folder + "/privkey.pem", like)
    for name, path in zip(MEMBERS, place.members):  # 1
        if not os.path.lexists(path):
            _set_link(".current/" + name, path)
    archive = os.path.relpath(os.path.realpath(place.archive), os.path.realpath(place.live))
    _set_link("%s/%s@%d" % (archive, place.name, version.number), place.pointer)  # 2
    _sync(place.live)  # or a power cut could leave links to a .current that is not there
    mend_links(place, version, replace=True)  # 3
    for path in place.members:  # 4
        os.utime(path, follow_symlinks=False)


def install_version(lineage, leaf, chain, key, state, found=()):
    """Make a new version of leaf, chain (DER) and key, and make it current; return it.

    `found` {name: bytes} are files that are adopted as they are. The `state` is recorded before the
    rename, with the hooks that it owes, so that the run after one that dies in between runs them.
    """
    place, number = lineage.place, next_number(lineage.place)
    for folder in (place.config, place.archive, place.config + "/live", place.live):
        make_folder(folder)
    version = Version(number, place.version(number), leaf, chain)
    members = dict(zip(MEMBERS, (to_pem([leaf.der]), to_pem(chain), to_pem((leaf.der,) + chain))))
    members.update(found)
    staged = _hidden(version.folder)
    try:
        _stage_version(lineage, staged, members, key)
        if not found:
            rehearse((leaf.der,) + chain, staged + "/privkey.pem")
        # said at the end of the run: it does not stop a deployment
        quietly(save_state, place, state._replace(unfinished=number))
        os.rename(staged, version.folder)  # complete and synced by now
        _sync(place.archive)
        point_to(place, version)
    finally:  # what failed leaves nothing; where the disk does not let, the next run sees to it
        quietly(remove_unfinished, place, number, find_litter(place.archive, place.records))
    return version


def adopt(lineage):
    """Make a version of loose files, identical, then links, then one rename; return it."""
    place, current = lineage.place, lineage.current
    found = {os.path.basename(path): read_file(real_path(place, path), MAX_OFFER)
             for path in place.members[:3] if os.path.lexists(path)}
    for name, data in found.items():
        # everybody can read the copy
        if re.sub(b"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----", b"", data).strip():
            raise Failure(None, "%s/%s holds more than certificates" % (place.live, name),
                          "take the rest out")
    return install_version(lineage, current.leaf, current.chain, lineage.key, lineage.state, found)


def prune(place, current, before):
    """Remove versions: kept are the current one, the one `before` it, which a rollback goes to, and
    the five newest; of keys that are not the current one only one version."""
    newest = load_versions(place)[:KEPT_VERSIONS]
    others = [version for version in [before] * bool(before) + newest
              if version.leaf.public_key != current.leaf.public_key]
    kept = [version.number for version in newest if version not in others[1:]] + [
        version.number for version in (current, before) if version]
    for number in version_numbers(place):
        if number not in kept:
            remove(place.version(number))
    _sync(place.archive)


def rollback_target(lineage):
    """Return the newest Version before the current one that was not itself rolled back from."""
    current = lineage.current
    return next((version for version in load_versions(lineage.place)
                 if version.number < (current.number or 0) and version[2:] != current[2:]
                 and not set(lineage.state.rolled_back).intersection(marks_of(*version[2:]))), None)


def lock(config):
    """Hold the config dir for this run; Failure where another process holds it for a minute.
    The lock is on the folder itself and ends with the process: nothing is left behind."""
    import fcntl
    descriptor = os.open(config, os.O_DIRECTORY)
    for _ in range(LOCK_SECONDS * 10):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    # 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
    with open("/proc/locks" if os.path.exists("/proc/locks") else os.devnull) as file:
        holders = re.findall(r"FLOCK +\w+ +\w+ (\d+) \S+:%d " % os.fstat(descriptor).st_ino,
                             file.read())
    raise Failure(None, "process %s holds %s for over %d s" % (
        " ".join(holders) or "?", config, LOCK_SECONDS), "wait for it, or look at what it does")


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------


def hook_files(config, kind):
    """Return the hooks in renewal-hooks/KIND as certbot would run them: executable, sorted."""
    folder = config + "/renewal-hooks/" + kind
    paths = [folder + "/" + name for name in list_folder(folder) if not name.endswith("~")]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def deploy_hooks(config, options):
    """Return what a deploy runs: the directory's files, then the lineage's own, each once."""
    return list(dict.fromkeys(hook_files(config, "deploy") + list(options.deploy_hooks)))


def run_hook(hook, config, environment, variables, pass_on):
    """Run a hook and return ("" or what went wrong, seconds it took).

    Its output goes to pass_on(bytes) as it comes. It is over when its own process ends: what it
    started in the background may live on, with the pipe.
    """
    import subprocess
    started, last, ended, piece = time.monotonic(), b"", False, b""
    environment = {key: value for key, value in environment.items() if key not in CREDENTIALS}
    environment.update(variables, PATH=":".join(filter(None, (environment.get("PATH"), SAFE_PATH))))
    command = [hook]
    try:
        folder = config + "/renewal-hooks"
        if hook.startswith(folder + "/") and os.path.lexists(hook):
            for path in (folder, hook, os.path.dirname(hook), os.path.dirname(follow(hook))):
                check_folder(path)
            command.insert(0, 'exec "$0"')  # by sh, which also runs one without a #! line, as ever
        process = subprocess.Popen(
            ["/bin/sh", "-c"] + command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd="/", env=environment, start_new_session=True)
    except (Failure, OSError) as error:
        return plain(error), 0.0
    with process.stdout as output:
        while piece or not ended:
            ended = process.poll() is not None  # asked first: what it said last is still read
            # what it left behind gets time to turn its output elsewhere: SIGPIPE would end it
            ready = select.select([output], [], [], 0.2 if ended else 0.05)[0]
            piece = os.read(output.fileno(), 65536) if ready else b""
            pass_on(piece)
            last = (last + piece)[-400:]
            if time.monotonic() - started > HOOK_SECONDS:
                kill_group(process)
                return "did not end in %d s" % HOOK_SECONDS, HOOK_SECONDS
            if ready and not piece and not ended:
                time.sleep(0.01)  # it closed its output and goes on
    words = last_line(last)
    status = process.returncode
    wrong = status and "status %d%s" % (status, words and ", " + words) or ""
    return wrong, time.monotonic() - started


def alert_wanted(state, health, now):
    """Say whether alert hooks have to run: at a turn to, within or from bad health, and daily."""
    bad = "warning critical unknown".split()
    if health in bad:
        # a timer's accuracy must not make it a day and a half
        return state.told != health or not 0 <= now - (state.told_at or 0) < DAY - 600
    return state.told in bad


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

_PRIORITIES = {"problem": "<3>", "warning": "<4>", "detail": "<7>"}  # syslog's: sd-daemon(3)
_PLUGIN_STATUS = {"critical": 2, "unknown": 3, "warning": 1}  # the worst first


def _as_object(outcome):
    """Return one lineage as JSON shows it; null where a field does not apply."""
    leaf = outcome.version and outcome.version.leaf
    fields = {name: getattr(outcome, name, getattr(leaf, name, None)) for name in (
        "name result reason detail changed source not_before not_after serial fingerprint_sha256 "
        "domains version health").split()}
    fields["detail"] = plain(": ".join(filter(None, (outcome.message, outcome.hint))), 600) or None
    if leaf:
        fields.update(not_before=iso_time(leaf.not_before), not_after=iso_time(leaf.not_after),
                      fingerprint_sha256=fingerprint(leaf.der), version=outcome.version.number)
    return fields


class Reporter:
    """What a run says: results on standard output, problems on standard error, or one JSON."""

    def __init__(self, options=(), now=0):
        """Look whether it is the journal that reads: then lines carry priorities."""
        self.quiet, self.verbose, self.as_json, self.dry_run = (
            name in options for name in "quiet verbose json dry-run".split())
        self.now, self.started, self.failed = now, time.monotonic(), False
        journal = os.environ.get("JOURNAL_STREAM")  # systemd's, inherited by all below a service
        info = journal and os.fstat(2)
        self.priorities = _PRIORITIES if info and journal == "%d:%d" % (
            info.st_dev, info.st_ino) else {}

    def _write(self, stream, data):
        """Write bytes; a reader that has gone away is no reason to stop ferrying."""
        quietly(lambda: stream.buffer.write(data))  # it may also have been closed at start
        quietly(lambda: stream.buffer.flush())

    def line(self, *texts, stream=None):
        """Write lines of results, on standard output unless told otherwise."""
        if not (self.quiet or self.as_json):
            self._write(stream or sys.stdout, "".join(
                plain(text, MAX_RECORD) + "\n" for text in texts).encode())

    def problem(self, name, message, hint="", kind="problem"):
        """Write the line of a problem, warning or detail: what is wrong, what to do about it."""
        self.failed |= kind == "problem"
        parts = [plain(part, 600) for part in ("certferry", name, plain(message), hint) if part]
        self._write(sys.stderr, (self.priorities.get(kind, "") + ": ".join(parts) + "\n").encode())

    def step(self, position, count, name):
        """Show how far a long run is, on a terminal only."""
        if count > 9 and not (self.quiet or self.as_json) and os.isatty(2):
            # what comes next is written over it; without a name it goes
            self._write(sys.stderr, b"\x1b[K" + b"[%*d/%d] %s ...\r" % (
                len(str(count)), position, count, name.encode()) * bool(name))

    def pass_on(self, data):
        """Pass a hook's output on; what a quiet run needs of it stands in its problem's line."""
        if not self.quiet:
            self._write(sys.stderr if self.as_json else sys.stdout, data)

    def outcome(self, outcome):
        """Write the result of one lineage, and its problem; what is deferred can wait."""
        if outcome.result in REMEMBERING:
            leaf = outcome.version and outcome.version.leaf
            parts = (leaf and "%s, valid until %s (%d days)" % (
                plain(" ".join(leaf.domains), 200), iso_time(leaf.not_after)[:10],
                days_left(leaf, self.now)),
                outcome.reason, outcome.source and "from " + outcome.source)
            self.line("%s: %s: %s" % (outcome.name, outcome.result, ", ".join(filter(None, parts)))
                      + " (dry run: nothing was written)" * self.dry_run,
                      *["  " + line for line in outcome.lines])
        if outcome.message:
            self.problem(outcome.name, outcome.message, outcome.hint,
                         "warning" if outcome.result == "deferred" else "problem")

    def document(self, pairs):
        """Write the one JSON document of [(Lineage, Outcome)]."""
        import json  # 2 ms, and not in python3-minimal
        document = {"lineages": sorted((_as_object(outcome) for _, outcome in pairs),
                                       key=lambda fields: fields["name"])}
        if self.dry_run:
            document["dry_run"] = True
        self._write(sys.stdout, json.dumps(document, indent=2).encode() + b"\n")


def _gauges(lineage, outcome, now):
    """Return [(name, what it is, value or None)] of one lineage's metrics."""
    leaf, state = outcome.version and outcome.version.leaf, lineage.state
    return (
        ("certificate_not_after_timestamp_seconds", "When the certificate in service expires.",
         leaf and leaf.not_after),
        ("certificate_not_before_timestamp_seconds", "When the certificate in service began.",
         leaf and leaf.not_before),
        ("last_check_timestamp_seconds", "When certferry last looked.", past(lineage.checked, now)),
        ("last_success_timestamp_seconds",
         "When a source last confirmed or renewed the certificate.", last_good(lineage, now)),
        ("health", "0 ok, 1 due, 2 warning, 3 critical, 4 unknown.",
         "ok due warning critical unknown".split().index(outcome.health)),
        ("pending", "1 while a hook or a service that must show the new leaf is waited for.",
         bool(state.owed or state.unserved)),
        ("upstream_not_after_timestamp_seconds", "When the certificate accepted last expires.",
         state.upstream_not_after))


def format_metrics(pairs, now, seconds):
    """Return Prometheus text format for [(Lineage, Outcome)] and a run's duration."""
    head = "# HELP certferry_{0} {1}\n# TYPE certferry_{0} gauge\n"
    families = {}  # the format wants a metric's samples side by side
    for lineage, outcome in pairs:
        for name, what, value in _gauges(lineage, outcome, now):
            if value is not None:
                families.setdefault(name, [head.format(name, what)]).append(
                    'certferry_%s{name="%s"} %d\n' % (name, outcome.name, value))
    families["run"] = [head.format("run_duration_seconds", "How long this run took."),
                       "certferry_run_duration_seconds %.3f\n" % seconds]
    return "".join(sum(families.values(), [])).encode()


def _trouble(lineage, outcome):
    """Return what the last runs found wrong with the source of a lineage, else ""."""
    state = lineage.state
    if state.reason or state.result == "failed" and outcome.health != "unknown":
        who = next((text for text in (plain(each.text) for each in lineage.options.sources)
                    if state.detail.startswith((text + " ", text + ":"))), state.source)
        if state.result == "pending":  # the hook or service
            who = plain(", ".join(state.owed) or state.detail.partition(" ")[0])
        return "%s %s for %d run%s: %s since %s" % (
            who or "its source", state.result, state.runs, "s"[state.runs == 1:],
            state.reason or state.detail, (iso_time(state.since) or "?")[:10])
    stale = state.result in ("installed", "unchanged") and (
        outcome.health in _PLUGIN_STATUS and outcome.why.startswith("expires"))
    return "%s still offers the same certificate" % state.source if stale else ""


def _row(lineage, outcome, now):
    """Return the cells of one lineage's row."""
    leaf, state = outcome.version and outcome.version.leaf, lineage.state
    pending = state.owed + (state.unserved and "not-served", _trouble(lineage, outcome))
    return (outcome.name, outcome.health, "%d of %d (%d%%)" % (
        days_left(leaf, now), leaf.lifetime // DAY,
        max(0, 100 * (leaf.not_after - now) // leaf.lifetime)) if leaf else "-",
            " ".join(source.text for source in lineage.options.sources) or outcome.name + ":443",
            (iso_time(past(lineage.checked, now)) or "never")[:16],
            (iso_time(last_good(lineage, now)) or "never")[:16],
            plain(", ".join(filter(None, pending + tuple(outcome.lines)))))


def status_lines(pairs, now, columns, wrong):
    """Return (exit status, lines) of `status`: a line for monitoring, a table for a person;
    `wrong` says why there is no pair."""
    if not pairs:
        return 3, ["CERTFERRY UNKNOWN - %s" % wrong]
    bad = [pair for health in _PLUGIN_STATUS for pair in pairs if pair[1].health == health]
    status = _PLUGIN_STATUS[bad[0][1].health] if bad else 0
    said = "; ".join(": ".join(filter(None, (
        outcome.name + " " + outcome.why, _trouble(lineage, outcome))))
                     for lineage, outcome in bad[:3]) or "lineages: %d" % len(pairs)
    if len(bad) > 3:
        said += "; and %d more" % (len(bad) - 3)
    data = " ".join("'%s'=%dd;%d;%d" % (
        outcome.name, days_left(outcome.version.leaf, now),
        threshold(lineage.options.warn, outcome.version.leaf) // DAY,
        threshold(lineage.options.critical, outcome.version.leaf) // DAY)
                    for lineage, outcome in pairs if outcome.version)
    rows = ["NAME,HEALTH,DAYS LEFT,SOURCE,LAST CHECKED,LAST SUCCESS,PENDING".split(",")]
    rows += [_row(lineage, outcome, now) for lineage, outcome in pairs]
    for dropped in (None, 5, 4, 3):  # a narrow terminal: what is wrong matters more than these
        rows = [row[:dropped] + row[dropped + 1:] if dropped else row for row in rows]
        widths = [max(map(len, cells)) for cells in zip(*rows)]
        if sum(widths[:-1]) + 2 * len(widths) + len("PENDING") <= columns:
            break
    return status, ["CERTFERRY %s - %s%s" % (
        "OK WARNING CRITICAL UNKNOWN".split()[status], plain(said, 600), data and " | " + data)
        ] + ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


# --------------------------------------------------------------------------------------------------
# Ferry
# --------------------------------------------------------------------------------------------------

# What holds for every lineage of a run; `command` is NAME (certferry NAME), renew or rollback,
# `now` the clock, read once; `changes` are the options that this command gave, `pem` its --key,
# `litter` what an interrupted run left, `failure` why this one cannot begin, or None.
Run = collections.namedtuple(
    "Run", "config environment now command dry_run force network report changes pem litter failure")


def is_certbots(place):
    """Say whether a lineage is certbot's: its conf is not empty, its links avoid .current."""
    return quietly(os.path.getsize, place.renewal) and (not os.path.lexists(place.pointer) or any(
        os.path.islink(path) and not os.readlink(path).startswith(".current/")
        for path in place.members))


def is_ours(place):
    """Say whether `renew` takes a lineage: it has a conf or a version, or is a key and no more."""
    # dangling links are ours, from a first crossing that was interrupted
    return os.path.lexists(place.conf) or os.path.lexists(place.pointer) or (
        (os.path.exists(place.members[3]) or quietly(staged_keys, place)) and not any(
            re.match(r"(?!privkey).*\.(pem|crt|cer)\Z", name) and os.path.exists(
                place.live + "/" + name) for name in quietly(list_folder, place.live) or ()))


def load_lineage(place):
    """Return (Lineage, None or the first Failure): what can be read is there, whatever is wrong."""
    failures, notices = [], []

    def attempt(load, *arguments, flaws=failures):
        """Return what load() returns, else None; what is not there is no failure."""
        try:
            return load(*arguments)
        except FileNotFoundError:
            pass
        except Failure as failure:
            flaws.append(failure)
        except OSError as error:
            failures.append(failure_of(error))

    # a damaged state is a notice and counts as none
    state = attempt(lambda: parse_state(read_text(place.state), place.state),
                    flaws=notices) or NO_STATE
    # None also where it could not be read: then it is not written anew
    checked = None if failures else attempt(lambda: int(os.stat(place.state).st_mtime))
    for folder in (place.config + "/live", place.live, place.records, place.archive):
        attempt(check_folder, folder)
    # what other users could have put there is not even read
    current = None if failures else attempt(lambda: load_version(place, pointed_number(place)))
    key = None if failures else attempt(find_key, place, current)
    given, options = attempt(lambda: parse_conf(read_text(place.conf), place.conf)) or (
        None, NO_OPTIONS)
    # a version that never became current owes no hooks, and nothing was rolled back from
    if not failures and state.unfinished not in (0, current and current.number):
        marks = marks_of(*current[2:]) if current else ()
        state = state._replace(
            owed=state.owed if state.result == "pending" else (),
            rolled_back=tuple(each for each in state.rolled_back if each not in marks))
    return Lineage(place, given, options, state, checked, current, key, tuple(notices)), (
        failures[0] if failures else None)


def discover(config, report=None):
    """Return [Place] that `renew` takes in the config dir; what is skipped gets a line."""
    places, live = [], os.path.realpath(config + "/live")
    confs = {name[:-5] for name in list_folder(config + "/certferry") if name.endswith(".conf")}
    for name in sorted(confs.union(list_folder(config + "/live"))):
        place, wrong = Place(config, name), ""
        info = quietly(os.lstat, place.live)
        if info and stat.S_ISLNK(info.st_mode):
            if os.path.dirname(os.path.realpath(place.live)) == live:
                continue  # an administrator's other name for a lineage
            info = quietly(os.stat, place.live)
        here = info and stat.S_ISDIR(info.st_mode)
        if not is_lineage_name(name):
            wrong = "it is no host name"
        elif here and info.st_uid not in (0, os.geteuid()):
            wrong = "it belongs to another user"
        elif name in confs or is_ours(place):
            places.append(place)
        elif os.path.lexists(place.live + "/privkey.pem") and not is_certbots(place):
            wrong = "it holds certificates of another tool: certferry %s adopts them" % name
        if report and wrong and (here or name in confs):  # not certbot's README
            report.problem(name, "skipped: " + wrong, kind="warning")
    return places


def no_lineage(place):
    """Return the Failure of a command for a lineage that is not there."""
    return Failure(None, "there is no such lineage in %s" % place.live,
                   "certferry %s sets it up" % place.name)


def _misfit(place, current, bad_key):
    """Return what of the files that servers read does not fit, or ""."""
    wrong = " ".join(astray(place, current) + (
        mend_certificates(current, False) if current and current.number else []))
    return "has a private key that does not fit its certificate" if bad_key else (
        wrong and not is_certbots(place)
        and "serves something else than its current version: " + wrong)


def inspect(place, now):
    """Return the (Lineage, Outcome) of what is on the disk, without touching anything."""
    lineage, failure = load_lineage(place)
    current, state, lines, bad_key = lineage.current, lineage.state, [], False
    staged = quietly(staged_keys, place) or ()
    if not (failure or staged) and lineage.given is current is lineage.key is None:
        failure = no_lineage(place)
    try:
        bad_key = current and lineage.key and state.key != key_record(
            lineage.key, current.leaf) and not fits(public_key_of(lineage.key), current.leaf)
    except Failure as error:
        failure = failure or error
    for path in staged:
        try:
            lines.append("staged key " + describe_key(public_key_of(path)))
        except Failure as error:
            lines.append(str(error))
    if current and current.leaf.lifetime <= 10 * DAY:
        lines.append("lives %d days: let the timer run hourly (systemctl edit certferry.timer)"
                     % (current.leaf.lifetime // DAY))
    if lineage.options.enabled == "no":
        lines.append("enabled = no")
    shown = failure or Failure(state.reason, state.detail)
    return lineage, Outcome(
        place.name, failure.result if failure else state.result, shown.reason, str(shown),
        shown.hint, False, state.source, current,
        *health_of(lineage, now, _misfit(place, current, bad_key), failure),
        lines=[str(failure)] * bool(failure) + lines)


def _no_key(lineage):
    """Return the Failure of a lineage without a private key."""
    (config, name, *_), sources = lineage.place, lineage.options.sources[:1]
    here = "" if config == CONFIG_DIR else " --config-dir " + config
    return Failure("no-key", "no private key in %s/privkey.pem" % lineage.place.live, (
        "bring the upstream's: ssh %s cat %s/live/%s/privkey.pem | certferry %s --key -%s%s" % (
            sources and sources[0].host or "UPSTREAM", CONFIG_DIR, name, name,
            "".join(" --from " + source.text for source in sources), here)))


def read_roots(path):
    """Return [Certificate] of a --ca-file, None without one; or Failure."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:  # as the caller: its folder may be closed to nobody
            data = file.read(4 * MAX_OFFER)
        roots = [parse_certificate(binascii.a2b_base64(content))
                 for _, label, content in pem_blocks(data) if label == b"CERTIFICATE"]
        if not roots:
            raise ValueError("there is no certificate in PEM form in it")
        return roots
    except (OSError, ValueError) as error:
        raise Failure("untrusted", "the --ca-file %s cannot be used (%s)" % (
            path, why(error)), "give a PEM file of roots")


def run_hooks(run, hooks, variables):
    """Run hooks in order; return [(hook, "" or what went wrong, seconds)]."""
    return [(hook,) + run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
            for hook in hooks]


def run_folder(run, kind, variables, name=""):
    """Run the alert or post hooks, which are not tried again; say whether any started."""
    done = run_hooks(run, hook_files(run.config, kind), variables)
    for hook, wrong, _ in done:
        if wrong:
            run.report.problem(name, "the hook %s failed (%s)" % (hook, wrong), (
                "run it by hand: it is not tried again"), "warning" if name else "problem")
    return any(seconds for _, _, seconds in done)


def alert(run, lineage, outcome):
    """Run the alert hooks where health calls for it; return the state that remembers it."""
    state, leaf = lineage.state, lineage.current and lineage.current.leaf
    if not alert_wanted(state, outcome.health, run.now):
        return state._replace(told=outcome.health)
    told = run_folder(run, "alert", {
        "CERTFERRY_NAME": outcome.name, "CERTFERRY_HEALTH": outcome.health,
        "CERTFERRY_WAS": state.told or "ok", "CERTFERRY_REASON": outcome.reason or "",
        "CERTFERRY_DETAIL": plain(outcome.message or outcome.why),
        "CERTFERRY_NOT_AFTER": iso_time(leaf.not_after) if leaf else "",
        "CERTFERRY_DAYS_LEFT": str(days_left(leaf, run.now)) if leaf else ""}, outcome.name)
    return state._replace(told=outcome.health, told_at=run.now) if told else state


class Crossing:
    """One lineage's way through a run: a Lineage whose fields change, from its files to an Outcome.

    What goes wrong is kept in `failure`, the gravest that did: every step is an attempt, and what
    was pending before is tried again all the same. `waiting` is a failure that is only deferred,
    `offer` what was accepted: with its chain as it is written, its key a path or a Secret.
    """

    def __init__(self, run, place):
        """Read what is there."""
        self.run, self.place, self.failure = run, place, run.failure
        self.name, self.command, self.now, self.dry_run, self.changes = (
            place.name, run.command, run.now, run.dry_run, run.changes)
        self.waiting = self.offer = self.number = self.keys = None
        self.ours = self.fresh = self.changed = self.misfit = self.linked = False
        self.sources, self.served, self.lines = (), [], []
        self.read()

    def read(self):
        """Take what is on the disk."""
        self.before, self.unreadable = load_lineage(self.place)
        self.unread = self.before.checked is None and os.path.lexists(self.place.state)
        _, given, self.options, state, self.checked, self.current, self.key, _ = self.before
        self.given = given or {}
        self.merged = merge_options(self.given, self.changes)
        if self.changes:
            self.options = parse_options(self.merged)
        self.state = state._replace(unfinished=0)

    def attempt(self, step, *sources):
        """Return what a step returns, or None where it failed: the gravest failure counts."""
        started = self.asked if self.number else time.monotonic()
        try:
            return step(*sources)
        except (Failure, OSError, ImportError) as error:
            failure = failure_of(error, self.place.config)
            if not self.failure or gravity(failure) > gravity(self.failure):
                self.failure = failure
        finally:
            if self.run.report.verbose:
                self.run.report.problem(self.name, "%s (%.3f s)" % (
                    " ".join([step.__name__.replace("_", " ")] + [each.text for each in sources]),
                    time.monotonic() - started), kind="detail")

    def say(self, message, hint=""):
        """Write a warning line about this lineage."""
        self.run.report.problem(self.name, message, hint, "warning")

    def check_ours(self):
        """See that there is a lineage, and that it is certferry's to ferry; Failure otherwise."""
        place = self.place
        if is_certbots(place):
            raise Failure("certbot", "certbot renews it here (renewal/%s.conf)" % self.name, (
                "to hand it over, mv %s away (not 'certbot delete', which removes the files that "
                "your servers read), then the same command again" % place.renewal))
        if self.command != "NAME" and not is_ours(place):
            raise no_lineage(place)
        self.ours = True
        if self.unreadable:
            raise self.unreadable

    def prepare(self):
        """Make whole what an interrupted run or a hand left, and have the first source asked by
        now; Failure where nothing can be ferried, before any network."""
        self.check_ours()
        renewal = self.place.renewal
        if os.path.lexists(renewal):
            self.say("renewal/%s.conf is %s" % (self.name, "beside a lineage of certferry's" if (
                os.path.getsize(renewal)) else "empty, left by a certbot run that failed"),
                "move it away, 'certbot renew' fails over it")
        for notice in self.before.notices:
            self.say("%s: what it held is found out again" % notice)
        self.mend()
        if self.run.pem is not None:
            self.add_key()
        self.sources = self.options.sources or (parse_source(self.name),)
        self.check_key()
        self.tend_staged()
        if self.command != "NAME" and not (self.command == "renew" and (
                self.run.force or self.options.when == "always" or not self.current
                or self.now >= due_time(self.current.leaf))):
            self.sources = ()
        elif self.sources[0].kind not in FETCHERS:  # those are asked later, by this process
            self.number = self.submit(self.sources[0])
        if self.command == "renew" or "served-at" in self.changes:
            self.served = self.look()

    def tell_mended(self, paths):
        """Take note of what was made whole, or would be."""
        self.changed |= bool(paths)
        if paths and not self.dry_run:
            self.say("taken care of: " + ", ".join(paths))

    def mend(self):
        """Remove what an interrupted run left, make certificates and live links whole."""
        place, current, write = self.place, self.current, not self.dry_run
        removed = write and remove_unfinished(place, self.before.state.unfinished, self.run.litter)
        if removed:
            self.say("removed what an interrupted run left: " + " ".join(removed))
        if current and current.number:
            self.linked = not unlinked(place, current)
            self.tell_mended(mend_certificates(current, write) + (
                [] if self.linked else mend_links(place, current, False, write)))

    def tend_staged(self):
        """Remove a staged key that has become the lineage's, tell of one that waits for long."""
        own = self.key and not self.misfit and quietly(read_file, self.key)
        for path in staged_keys(self.place):
            if own and quietly(read_file, path) == own:
                self.changed = True
                if not self.dry_run:
                    remove(path)  # the run died there
            elif self.now - os.lstat(path).st_mtime > STAGED_KEY_DAYS * DAY:
                self.say(path + " waits for over 30 days", "remove it if it was forgotten")

    def add_key(self):
        """Take the private key of --key: the lineage's if it has none, else a staged one."""
        try:
            key = read_pem(self.run.pem)[1]
            public = public_half(key.pem if key else self.run.pem, True)
        except ValueError as error:
            raise Failure("no-key", "--key: %s" % error, "give one private key as PEM")
        if public in self.own_keys():
            return
        self.lines.append("key added    " + describe_key(public))
        if not self.dry_run:
            key = stage_key(self.place, key.pem, public, not (self.key or self.current))
            self.key = self.key or key
        self.keys[public], self.changed = key, True

    def check_key(self):
        """See that there is a usable key; Failure (no-key) otherwise.

        The record in the state spares the openssl process as long as key file and leaf stay what
        they are. A key that is gone, or was written over through the link, is put back.
        """
        current = self.current
        if current and self.key and key_record(self.key, current.leaf) == self.state.key:
            return
        if current and current.number:
            fitting, done = mend_key(self.place, current, not self.dry_run)
            self.tell_mended(done)
            self.key = fitting or self.key  # --key in a dry run: only in memory
            self.misfit = not fitting and current.leaf.public_key not in (self.keys or ())
            self.keys = self.keys if self.dry_run else None
        elif self.key:
            public = public_key_of(self.key)
            if current and not fits(public, current.leaf):
                current = self.current = None  # no set: a key that waits for its offer
        if self.key is None:
            if not self.own_keys():
                self.sources = [source for source in self.sources if source.kind in FETCHERS]
            if not self.sources and self.command != "rollback":
                raise _no_key(self)
        elif not self.misfit:
            self.state = self.state._replace(
                key=key_record(self.key, current.leaf) if current else "")
            # a group may be meant to read it (ssl-cert), everybody not
            if os.stat(self.key).st_mode & 0o004:
                self.say("%s/privkey.pem can be read by everybody" % self.place.live, "chmod o-r")

    def submit(self, source, **asked):
        """Have the network process ask for the certificate; return the exchange's number."""
        # remembered, so that later runs need no extra exchange for the type of key
        want, _, way = self.state.way.partition(" ")
        name = self.options.sni or next((domain for domain in self.options.domains
                                         if not domain.startswith("*.")), self.name)
        known = binascii.crc32(self.current.leaf.der) if self.current else ""
        job = Job(*source[:3], self.options.timeout, name, known, want, way,
                  "" if self.options.sources else "own", "")
        if not asked:
            self.asked = time.monotonic()
        return self.run.network.submit(job._replace(**asked))

    def look(self):
        """Have it see what the local services present; return [(Source, exchange's number)]."""
        return [(source, self.submit(source, own="")) for source in self.options.served_at]

    def not_served(self):
        """Return what is wrong with the local services, one line each."""
        wrong, served, self.served = [], self.served or self.look(), []  # later: another look
        for source, number in served:
            try:
                offer = offer_of(source, self.run.network.answer, number)
                if offer.leaf != self.current.leaf.der:
                    other = parse_certificate(offer.leaf)
                    wrong.append("%s still serves the certificate of %s (serial %s)" % (
                        source.text, iso_time(other.not_before)[:10], other.serial[:20]))
            except (Failure, ValueError) as error:
                wrong.append(str(error))
        return wrong

    def own_keys(self):
        """Return {public key: path, or a Secret that is not on disk} of the keys to fit."""
        if self.keys is None:
            self.keys, here = {}, self.current and self.current.folder + "/privkey.pem"
            for path in dict.fromkeys([self.key, here, self.place.members[3]]
                                      + staged_keys(self.place)):
                if path and os.path.lexists(path) and not os.path.islink(path):
                    try:
                        self.keys.setdefault(public_key_of(path), path)
                    except Failure as failure:
                        self.say(failure, failure.hint)
        return self.keys

    def marks(self):
        """Return the last five of Evidence's fields; by force more keys, retired ones too."""
        state, current, keys = self.state, self.current, self.own_keys()
        versions = load_versions(self.place)
        rolled = {version.leaf.public_key for version in versions
                  if fingerprint(version.leaf.der) in state.rolled_back} - set(keys)
        replaced = {fingerprint(version.leaf.der) for version in versions}
        # a run that died at a change of keys may have retired the one in service
        retired = set(state.retired) - {current and fingerprint(current.leaf.public_key)}
        if self.run.force:
            retired = rolled = ()
            for path in [version.folder + "/privkey.pem" for version in versions]:
                keys.setdefault(quietly(public_key_of, path), path)
            keys.pop(None, None)
        return keys, retired, replaced, state.rolled_back, rolled

    def trust(self, leaf, others):
        """Return ("" or why a leaf is not trusted, its chain as it would be written)."""
        roots, refused = read_roots(self.options.ca_file), None
        for chain in order_chains(leaf, others):
            wrong = next((("issuer %d of the chain " % depth if depth else "the leaf ") + words
                          for depth, words in enumerate(flaw(each, each is leaf)
                                                        for each in (leaf,) + chain) if words),
                         "") or verify_chain(leaf, chain, roots, self.now)
            if not wrong:
                return "", chain
            refused = refused or (wrong, chain)
        return refused

    def is_news(self, offer):
        """Say whether an offer is not what is in service, leaf and chain."""
        current = self.current
        return not current or self.misfit and offer.key or (
            offer.leaf, offer.chain) != (current.leaf.der, current.chain)

    def examine(self, offer):
        """Return an offer that the judge accepts, as it is to be installed; Failure otherwise."""
        current = self.current
        if current and offer.leaf == current.leaf.der:
            # what is not written, a root say, is no news; where there is a choice it is judged
            chains = quietly(order_chains, current.leaf, map(parse_certificate, offer.chain or ()))
            shown = [tuple(issuer.der for issuer in chain) for chain in chains or ()]
            if offer.chain is None or shown == [current.chain]:
                offer = offer._replace(chain=current.chain)
        # the usual run ends here: no openssl process, and only names and dates are asked
        if self.is_news(offer) or "domain" in self.changes or "ca-file" in self.changes:
            facts = self.gather(offer)
        else:
            facts = offer, current.leaf
        verdict = judge(Evidence(self.name, self.options.domains, current and current.leaf, *facts),
                        self.now, self.run.force)
        if verdict.reason:
            raise Failure(*verdict)
        return facts[0]

    def gather(self, offer):
        """Return the facts for Evidence of an offer that is not just what is in service."""
        try:
            # what the network process says counts for bytes only: all is parsed here, strictly
            ders = (offer.leaf,) + (offer.chain or ())
            for der in ders:
                check_strict(der)
            leaf, *others = map(parse_certificate, ders)
            public = leaf_public_key(leaf.der)
            carried = public_half(offer.key.pem, False) if offer.key else None
            if not public:
                raise ValueError("openssl cannot read it")
        except (ValueError, IndexError) as error:
            raise Failure("malformed", "%s: a certificate that is no strict DER, or a key that is "
                          "none (%s)" % (offer.source.text, error), "look at what it holds")
        trust, issuers = self.trust(leaf, others)
        keys, *marks = self.marks()
        if not keys and carried is None:
            raise _no_key(self)
        if MUST_STAPLE in leaf.extensions and self.is_news(offer):
            self.say("the certificate asks for OCSP stapling", "see that the server staples")
        chain = tuple(issuer.der for issuer in issuers)
        return (offer._replace(chain=chain, key=keys.get(public, offer.key)), leaf, public, carried,
                trust, keys, *marks)

    def ask(self, source, **asked):
        """Return the accepted offer of a source: of the key type that is here, and of the other
        addresses of its name where one hands out an older certificate."""
        if source.kind in FETCHERS:
            return self.examine(offer_of(source, FETCHERS[source.kind], source,
                                         self.options.timeout, self.run.environment))
        number, self.number = self.number or self.submit(source, **asked), None
        offer = offer_of(source, self.run.network.answer, number)
        if not asked:  # the answer may have lain here while others' hooks ran
            self.asked = max(self.asked, time.monotonic() - self.options.timeout * 0.75)
        try:
            return self.examine(offer)
        except Failure as failure:
            others, skip = [], asked.get("skip", "") + "," + offer.address
            if failure.reason == "older" and skip.count(",") <= MAX_CERTIFICATES:
                others = [{"skip": skip}]
            elif failure.reason == "key-mismatch" and not asked:
                # by TLS's own preference an ECDSA one came: there may be one for our RSA key
                offered = key_kind(parse_certificate(offer.leaf).public_key).split()[0]
                kinds = {key_kind(public).split()[0] for public in self.own_keys()} - {offered}
                others = [{"want": kind, "way": "", "known": ""} for kind in sorted(kinds)]
            for other in others:
                left = self.asked + self.options.timeout - time.monotonic()
                try:
                    return self.ask(source, timeout=max(0.1, round(left, 1)), **other)
                except Failure as second:
                    # what was shown first counts, unless that is one for the right type of key
                    if "want" in other and second.reason not in (
                            "key-mismatch unreachable timeout unproven".split()):
                        raise
            raise

    def owing(self, leaf, **changes):
        """Return the state that owes everything that a deploy of this leaf runs."""
        retired = set(self.state.retired)
        if self.command != "rollback" and self.current:
            retired.add(fingerprint(self.current.leaf.public_key))
        return self.state._replace(
            result="pending" if self.state.owed else self.state.result,  # if this comes to nothing
            owed=tuple(deploy_hooks(self.run.config, self.options)),
            retired=tuple(sorted(retired - {fingerprint(leaf.public_key)})), **changes)

    def put_in_service(self, version, state):
        """Take note of a version that has become the current one, and of the hooks it owes."""
        self.current, self.key = version, version.folder + "/privkey.pem"
        self.fresh, self.changed, self.misfit = True, True, False
        if not self.dry_run:
            self.state = state._replace(unfinished=0, key=key_record(self.key, version.leaf))

    def deploy(self):
        """Make the accepted offer the current version."""
        offer, leaf = self.offer, parse_certificate(self.offer.leaf)
        is_own, before = offer.key == self.key, self.current
        self.take_over()  # so that there is a version to go back to
        previous = self.current
        marks = marks_of(leaf, offer.chain)
        state = self.owing(leaf, way=offer.way, rolled_back=tuple(
            each for each in self.state.rolled_back if each not in marks))
        if self.dry_run:
            rehearse((leaf.der,) + offer.chain, offer.key)
            number = next_number(self.place) + (self.current is not before)  # for loose files
            return self.put_in_service(Version(number, "", leaf, offer.chain), state)
        self.put_in_service(install_version(
            self, leaf, offer.chain, self.key if is_own else offer.key, state), state)
        self.tend_staged()
        prune(self.place, self.current, previous)  # last: what replaced it is synced by now

    def take_over(self):
        """Make a version of loose files; say once what that means for containers."""
        current, place = self.current, self.place
        if not current or current.number or not self.key:
            return
        is_plain = not os.path.islink(place.live + "/fullchain.pem")
        self.current = current._replace(number=next_number(place)) if self.dry_run else adopt(self)
        self.changed, self.key = True, self.current.folder + "/privkey.pem"
        self.state = self.state._replace(key=key_record(self.key, current.leaf))
        if is_plain and not self.dry_run:
            self.say("%s/ holds links now" % place.live, "a container needs live and archive both "
                     "mounted")

    def put_in_place(self):
        """Deploy what is new; else adopt loose files."""
        live, before = self.place.live, self.current
        if self.is_news(self.offer):
            self.deploy()
        elif self.command == "NAME":
            self.take_over()
            self.tell_mended(mend_links(self.place, self.current, True, not self.dry_run))
        if self.command == "NAME" and self.current is not before:
            self.lines += ["certificate  %s/fullchain.pem" % live,
                           "private key  %s/privkey.pem" % live]

    def remember(self):
        """Write the options that this command gave; new hooks are owed now, dropped ones not."""
        if self.merged != self.given:
            known, wanted = self.given.get("deploy-hook", ()), self.options.deploy_hooks
            owed = self.state.owed + tuple(hook for hook in wanted if hook not in known)
            if not self.dry_run:  # owing too much is mended, too little is not
                save_state(self.place, self.state._replace(owed=owed))
                save_conf(self.place, self.merged)
            self.changed, self.state = True, self.state._replace(owed=tuple(
                hook for hook in owed if hook in wanted or hook not in known))

    def finish(self):
        """Run the hooks that are due, all after a deploy, else what is owed; then look at the
        services: what is unfinished is pending."""
        state, run = self.state, self.run
        again = self.fresh or state.unserved or self.offer and run.force
        if not (again or state.owed or self.served):
            return
        hooks = deploy_hooks(run.config, self.options)
        # one that is owed and no longer there was corrected: which is it now?
        if not again and set(state.owed).issubset(hooks):
            hooks = [hook for hook in hooks if hook in state.owed]
        if self.dry_run:
            self.lines += ["hook         %s: would run" % plain(hook) for hook in hooks]
            self.state = state._replace(owed=(), unserved=False)
            return
        done = run_hooks(run, hooks, {  # as certbot sets them
            "RENEWED_LINEAGE": self.place.live,
            "RENEWED_DOMAINS": " ".join(self.current.leaf.domains)})
        self.lines += ["hook         %s: %s" % (plain(hook), wrong or "done (%.1f s)" % seconds)
                       for hook, wrong, seconds in done]
        self.state = state._replace(
            owed=tuple(hook for hook, wrong, _ in done if wrong), unserved=False)
        for hook, wrong, _ in done:
            if wrong:
                raise Failure("hook", "%s, but a hook failed (%s): %s" % (
                    "installed" if self.fresh else "unchanged", wrong, plain(hook)),
                    "it is tried again at every run; to change it: --deploy-hook")
        if hooks:
            self.served = []  # what was seen before tells nothing now
        self.check_served(SERVED_SECONDS if hooks or again or state.owed else 0)

    def check_served(self, patience):
        """See that the services present the new leaf within `patience` seconds; Failure if not."""
        deadline, wrong = time.monotonic() + patience, self.not_served()
        while wrong and time.monotonic() < deadline:  # reloads are asynchronous
            time.sleep(0.5)
            wrong = self.not_served()
        self.state = self.state._replace(unserved=bool(wrong))
        if wrong:
            waited = ": hooks ran, %d s waited" % patience if patience else ""
            raise Failure("not-served", "; ".join(wrong) + waited, (
                "the hooks run again at the next run; does the daemon read %s/fullchain.pem? is "
                "--served-at right?" % self.place.live))

    def health(self):
        """Return (health, why) of what is in service; links that were whole are not looked at."""
        current = None if self.dry_run or self.linked and not self.changed else self.current
        return health_of(self, self.now, _misfit(self.place, current, self.misfit), self.unreadable)

    def can_wait(self):
        """Say whether a failure is only deferred: nothing is lost by trying at the next run."""
        reason = self.failure.reason
        if reason == "not-yet-valid":  # no clock at boot
            return self.current and self.now < self.current.leaf.not_before
        # a network process that broke or kept its privilege is never deferred
        return reason == "rolled-back" or reason in ("unreachable", "timeout") and (
            self.command == "renew" and not self.run.network.broken and self.health()[0] == "ok")

    def cross(self):
        """Ask, judge, deploy and remember, as far as nothing goes wrong.

        Where a renewal is due and a source has only the current leaf, the next one is asked too.
        """
        due = self.current and self.now >= due_time(self.current.leaf)
        for source in self.sources:
            offer = self.attempt(self.ask, source)
            if offer and (not self.offer or self.is_news(offer)):
                self.offer = offer
            if self.offer and (not due or self.is_news(self.offer)):
                break
        if self.offer:
            self.failure = None  # of another source
            self.attempt(self.put_in_place)
        if self.misfit:  # nothing is graver
            self.failure = Failure(
                "key-mismatch", self.place.live + "/privkey.pem does not fit the certificate in "
                "service", "bring the right one: certferry %s --key PEM" % self.name)
        # what can wait is no failure, so that what is pending is still tried and told
        if self.failure and self.can_wait():
            self.failure, self.waiting = None, self.failure
        if self.failure and self.offer:
            state = self.state
            self.read()  # what failed may have come after the rename: then hooks are owed
            if not self.current or self.before.state.unfinished != self.current.number:
                self.state = state
        if not self.failure and self.command == "NAME":
            self.attempt(self.remember)

    def roll_back(self):
        """Make the version before current again, and keep the one rolled back from out."""
        place, now, before = self.place, self.now, self.current
        target = before and rollback_target(self)
        if target is None:
            raise Failure(None, "there is no earlier version to go back to",
                          "versions are kept in %s/%s@N" % (place.archive, self.name))
        leaf = target.leaf
        if not leaf.not_before <= now <= leaf.not_after:
            raise Failure("expired" if now > leaf.not_after else "not-yet-valid", (
                "version %d is not valid now (%s to %s)" % (target.number, iso_time(
                    leaf.not_before), iso_time(leaf.not_after))), "the version in service stays")
        fitting, done = mend_key(place, target, not self.dry_run)
        self.tell_mended(done)
        if not fitting:
            raise Failure("key-mismatch", "version %d has no private key that fits" % target.number,
                          "bring it with certferry %s --key PEM" % self.name)
        if leaf.public_key != before.leaf.public_key:
            self.lines.append("private key  goes back too, to %s" % describe_key(leaf.public_key))
        # marked is the leaf, or where only the chain is another one both
        state = self.owing(leaf, unfinished=target.number, rolled_back=self.state.rolled_back + (
            marks_of(*before[2:])[leaf == before.leaf],))
        if not self.dry_run:
            self.tell_mended(mend_certificates(target, True))
            save_state(place, state)  # first, so that a run that dies in between owes the hooks
            point_to(place, target, self.key)
        self.put_in_service(target, state)

    def ferry(self):
        """Cross, or roll back, then run the hooks: the story of one lineage; return
        (what its Lineage has become, Outcome)."""
        is_rollback = self.command == "rollback"
        if is_rollback and not self.failure:
            self.attempt(self.roll_back)
        elif not self.failure:
            self.cross()
        if self.failure and self.changes and not self.fresh:  # they are not remembered
            self.options, self.served = self.before.options, []
        self.ours &= self.fresh or not is_rollback
        if self.ours and self.current and not self.unreadable:
            self.attempt(self.finish)
        return self, self.conclude()

    def recorded(self, result, failure):
        """Return the State after this crossing: how it ended, since when and for how many runs."""
        state, offer, since, runs = self.state, self.offer, None, 0
        if result == "not-due":
            over = state.result == "pending" and not (state.owed or state.unserved)
            return state._replace(result="unchanged", reason=None, detail="") if over else state
        if offer:
            state = state._replace(source=offer.source.text, way=offer.way,
                                   upstream_not_after=parse_certificate(offer.leaf).not_after)
        if result not in ("installed", "unchanged"):
            again = (state.result, state.reason) == (result, failure.reason)
            since, runs = (state.since, state.runs + 1) if again else (self.now, 1)
        sound = result in SOUND or failure.reason == "rolled-back"
        return state._replace(
            result=result, reason=failure.reason, detail=plain(failure), since=since, runs=runs,
            good=None if sound else last_good(self, self.now))

    def conclude(self):
        """Record how the crossing ended, alert who wants it, and return the Outcome."""
        run, place = self.run, self.place
        failure = self.failure or self.waiting  # what is pending comes first
        result = "installed" if self.fresh else "unchanged" if self.offer else "not-due"
        if failure:
            result = failure.result if self.failure else "deferred"
        shown = failure or Failure(None, "")
        self.state = self.recorded(result, shown)
        if result != "not-due" and not run.failure:
            self.checked = self.now
        outcome = Outcome(
            self.name, result, shown.reason, str(shown), shown.hint, self.changed,
            self.offer and self.offer.source.text, self.current, *self.health(), lines=self.lines)
        # a try with options that are not remembered tells nothing about those that are
        before = self.before.state
        known = self.command != "NAME" or result in REMEMBERING or self.fresh or (
            (before.owed, before.unserved) != (self.state.owed, self.state.unserved)) or (
                run.pem is None and self.given == self.merged
                and (self.given or self.current and self.current.number))
        ours = self.ours or shown.reason == "certbot" and self.command == "renew" and is_ours(place)
        if ours and known and not (self.unread or self.dry_run):
            self.state = alert(run, self, outcome)
            try:
                # where nothing is new only the time of change is set: that of the last check
                is_new = self.changed or self.state != before or self.before.checked is None
                if is_new:
                    save_state(place, self.state)
                if is_new or result != "not-due":
                    touch_state(place, self.checked or self.now)
            except (Failure, OSError) as error:  # it does not stop a deployment
                if shown.reason != "storage":  # which says the same
                    run.report.problem(self.name, "not recorded: %s" % failure_of(
                        error, place.records), "see to the disk")
        return outcome


def _in_turn(crossings, network):
    """Yield crossings in order; one whose upstream keeps it waiting lets the others go first."""
    patience = PATIENCE  # for the first that does not answer; then the others had as long
    while crossings:
        late = []
        for crossing in crossings:
            if crossing.number is None or network.has(crossing.number, patience):
                yield crossing
            else:
                patience = 0
                late.append(crossing)
        # judged last, in order: a dead upstream holds nobody up
        if len(late) == len(crossings):
            network.has(None, 0.2)
        crossings = late


def ferry_all(run, places):
    """Return [(Lineage, Outcome)] of many lineages, in order: all first exchanges are under
    way before the first answer is judged."""
    crossings, pairs = [], []
    # one by one: the first is asked for while the files of the next are read
    for crossing in (Crossing(run, place) for place in sorted(set(places))):
        if run.command == "renew" and crossing.options.enabled == "no":
            run.report.line("%s: skipped: enabled = no in its conf" % crossing.name)
            continue
        if not run.failure:
            crossing.attempt(crossing.prepare)
        crossings.append(crossing)
    for position, crossing in enumerate(_in_turn(crossings, run.network), 1):
        run.report.step(position, len(crossings), crossing.name)
        pairs.append(crossing.ferry())
        run.report.outcome(pairs[-1][1])
    run.report.step(0, len(crossings), "")
    return pairs


def post_hooks(run, pairs):
    """Run certbot's post hooks once where something was deployed."""
    renewed, failed = [], []
    for crossing, outcome in pairs:
        if crossing.fresh or outcome.result in ("failed", "refused"):
            (renewed if crossing.fresh else failed).extend(
                outcome.version.leaf.domains if outcome.version else (outcome.name,))
    if renewed and not run.dry_run:
        run_folder(run, "post", {"RENEWED_DOMAINS": " ".join(renewed),
                                 "FAILED_DOMAINS": " ".join(failed)})


def write_metrics(path, pairs, places, report):
    """Write the metrics of a run, and of the other lineages from disk."""
    path, now = os.path.abspath(path), report.now
    # all of them: the series of a lineage that this run was not about would end
    names = {outcome.name for _, outcome in pairs}
    pairs = pairs + [inspect(place, now) for place in places if place.name not in names]
    try:
        write_file(path, format_metrics(pairs, now, time.monotonic() - report.started), 0o644)
    except OSError as error:
        report.problem("", "metrics: %s" % failure_of(error, path), "look at --metrics")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

COMMANDS = ("renew", "status", "rollback")
SHORT_HELP = """\
certferry NAME [--from HOST] [options]  set up lineage NAME, ferry it now, start the timer
certferry renew [NAME...] [options]     ferry every lineage: what the timer runs
certferry status [NAME...] [options]    what is here, how healthy it is, what is pending
certferry rollback NAME [options]       make the previous version current again""".split("\n")

_EXAMPLE = """
  ssh up.example.net cat /etc/letsencrypt/live/example.com/privkey.pem |
    certferry example.com --key - --from up.example.net --deploy-hook 'systemctl reload nginx'

SOURCE is HOST[:PORT], file:PATH, exec:COMMAND, vault://HOST[:PORT]/MOUNT/PATH, azure://VAULT/NAME,
or with STARTTLS one of ftp imap ldap mysql pop3 postgres smtp xmpp and ://HOST[:PORT].
What is remembered with the lineage stands first; an empty value forgets it.
"""

# What each option takes, the commands it goes with (NAME is `certferry NAME`), what it does.
_TABLE = """\
from         SOURCE      NAME          where to fetch; may repeat: tried in order (NAME:443)
sni          HOST        NAME          the name to ask a TLS source for
domain       DOMAIN      NAME          a name that must be covered; may repeat
ca-file      PEM         NAME          trust these roots and no others
deploy-hook  CMD         NAME          shell command run after a deploy; may repeat
served-at    HOST:PORT   NAME          a local service that must present the new leaf; may repeat
when         always|due  NAME          ask on every run, or only when a renewal is due
warn         P           NAME          health: a share of the lifetime (25%) or days (10d)
critical     P           NAME          the same (10%)
timeout      SECONDS     NAME          for the whole exchange with one source (20)
key          PEM         NAME          add this private key, - from standard input
jitter       SECONDS     renew         sleep first, below SECONDS, fixed for this host
metrics      FILE        renew,status  write Prometheus metrics there, whatever fails
force        -           NAME,renew    accept what is older, names-lost or rolled-back; run hooks
dry-run      -           all           say what would happen, write nothing
no-timer     -           all           do not start the timer
config-dir   DIR         all           instead of the default one
json         -           all           one JSON document
quiet        -           all           only problems
verbose      -           all           more detail
help         -           all           this, of a command too
version      -           all           the version of certferry"""
_OPTIONS = {name: row for name, *row in (line.split(None, 3) for line in _TABLE.split("\n"))}
_TAKING = [name for name, (takes, _, _) in _OPTIONS.items() if takes != "-"]
_SHORT = {"-d": "domain", "-q": "quiet", "-v": "verbose", "-h": "help"}
_FLAGS = dict(_SHORT, **{"--" + name: name for name in _OPTIONS})
_HABITS = {"certificates": "status", "certonly": "NAME"}  # what who knows certbot may type


def _help(command):
    """Return the lines of a command's help, of all where there is none."""
    usage = [line for line in SHORT_HELP if not command or command in line.split()[:2]]
    command, short = command or "NAME", {name: flag + ", " for flag, name in _SHORT.items()}
    lines = ["  %-27s %s" % ("%4s--%s %s" % (short.get(name, ""), name, takes.strip("-")), words)
             for name, (takes, commands, words) in _OPTIONS.items()
             if commands == "all" or command in commands]
    usage = "usage: %s\n%s" % ("\n       ".join(usage), _EXAMPLE * (command == "NAME"))
    return usage.split("\n") + lines


def _nearest(word):
    """Return what a word was meant to be, certbot's habits included."""
    known = list(COMMANDS) + list(_OPTIONS if word.startswith("-") else ())
    word = word.strip("-")
    # by the letters that they share: difflib is not in python3-minimal
    found = _HABITS.get(word) or max(known, key=lambda each: len(
        set(each).intersection(word)) / len(set(each).union(word)))
    return "--" + found if found in _OPTIONS else "certferry " + found


def _parse_words(arguments):
    """Return ({option: [value, or None without one, ...]}, [word, ...]) of a command line.

    Options may stand before and after words; argparse would do it for 5 ms at every start.
    """
    options, words, rest = {}, [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if not word.startswith("-"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = _FLAGS.get(flag, flag)
        if not equals and name in _TAKING and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        options.setdefault(name, []).append(value if equals else None)
    return options, words


def _absolute(key, text):
    """Return an option's value, a path in it absolute: the timer starts in another folder."""
    if key == "from" and re.match("file:.", text):
        return "file:" + os.path.abspath(text[5:])
    return os.path.abspath(text) if key == "ca-file" and text else text


def _parse_names(words, command, options):
    """Return [NAME] of the words after a command; Usage for what is none. *.NAME adds a domain."""
    names = []
    for word in words:
        wildcard = word.startswith("*.")
        names.append(quietly(host_name, word[2 * wildcard:]) or "")
        if not is_lineage_name(names[-1]):
            raise Usage("%s is no full host name and no command: did you mean %s?" % (
                plain(word, 60), _nearest(word)))
        if wildcard and command == "NAME":
            options.setdefault("domain", []).append("*." + names[-1])
    if len(names) != 1 and command in ("NAME", "rollback"):
        raise Usage("one NAME at a time is needed: see certferry --help")
    if "force" in options and not names:
        raise Usage("renew --force needs a NAME: certferry renew NAME --force")
    return names


def _parse_changes(options):
    """Return {option: [text, ...]} of the options to remember; Usage where one is wrong."""
    changes = {key: [_absolute(key, text.strip()) for text in texts]  # as a record gives it back
               for key, texts in options.items() if key in REMEMBERED}
    try:
        parse_options(merge_options({}, changes))
    except ValueError as error:
        raise Usage("--%s: %s" % error.args)
    return changes


def _check_options(options, command):
    """Raise Usage where an option is unknown, lacks its value or does not go with the command."""
    for name, values in options.items():
        if name not in _OPTIONS:
            raise Usage("unknown option %s: did you mean %s? see certferry --help, renew --help" % (
                plain(name, 60), _nearest(name)))
        takes, commands, _ = _OPTIONS[name]
        if (name in _TAKING) != (None not in values):
            raise Usage("--%s takes %s" % (name, takes.replace("-", "no value")))
        if name in _TAKING and name not in REMEMBERED and (len(values) > 1 or not values[0]):
            raise Usage("--%s takes one value, and none that is empty" % name)
        if command and commands != "all" and command not in commands:
            raise Usage("--%s does not go with %s: see certferry --help" % (name, command))
    if not re.match(r"[0-9]{1,6}\Z", options.get("jitter", "0")[0]):
        raise Usage("--jitter %s: write whole seconds" % plain(options["jitter"][0]))


def jitter_delay(seconds, host_id=None):
    """Return a delay in [0, seconds) that is fixed for this host and spread evenly over a fleet.

    `host_id` is the text of /etc/machine-id, or the host's name where there is none.
    """
    import hashlib
    # hashed, since machine ids need not be spread evenly, and are not for others to know
    if not host_id and os.access("/etc/machine-id", os.R_OK):
        with open("/etc/machine-id", "rb") as file:
            host_id = file.read(256).decode("latin-1").strip()
    digest = hashlib.sha256(b"certferry " + (host_id or os.uname().nodename).encode()).digest()
    return seconds * (int.from_bytes(digest[:6], "big") / 2 ** 48)


def _systemctl(*words):
    """Return (exit status, output) of systemctl for the timer."""
    import subprocess
    try:
        done = subprocess.run(("systemctl",) + words + ("certferry.timer",), timeout=60,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
    except (OSError, subprocess.SubprocessError) as error:
        return 1, str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def start_timer(run):
    """Start the timer, or say what to put into cron; say whether it was, or would be."""
    default = run.config == CONFIG_DIR
    if default and os.path.isdir("/run/systemd/system") and _systemctl("cat")[0] == 0:
        # what runs already is no change, for Ansible's sake
        if _systemctl("is-active")[0] == 0 and _systemctl("is-enabled")[0] == 0:
            return False
        if run.dry_run:
            run.report.line("certferry.timer: would be started")
            return True
        status, words = _systemctl("enable", "--now")
        if status == 0:
            at = re.search(r"\d\d:\d\d", _systemctl("show", "-p", "NextElapseUSecRealtime")[1])
            run.report.line("certferry.timer: started" + (at and ", next run " + at[0] or ""))
            return True
        run.report.problem("", "certferry.timer could not be started (%s)" % words.strip(),
                           "systemctl enable --now certferry.timer")
    elif not (run.dry_run or default and os.path.exists("/etc/cron.d/certferry")):
        script = os.path.realpath(sys.argv[0])
        words = ([] if os.access(script, os.X_OK) else [sys.executable]) + [
            script, "renew", "--jitter", "43200", "-q"]
        words += [] if default else ["--config-dir", run.config]
        # cron takes a bare % for the end of the line
        run.report.line("no timer was started: for cron: 17 1,13 * * * " + " ".join(
            word if re.match(r"[\w./@=+-]+\Z", word) else "'%s'" % word.replace(
                "'", "'\\''").replace("%", "\\%") for word in words))
    return False


def _run_status(config, places, options, report):
    """Show what is on the disk; return the exit status that monitoring expects."""
    wrong = "there is no lineage: certferry NAME sets one up"
    try:
        places = places or discover(config, report)
    except OSError as error:
        wrong = failure_of(error)
    pairs = [inspect(place, report.now) for place in sorted(places)]
    if "metrics" in options and not report.dry_run:
        write_metrics(options["metrics"][0], pairs, quietly(discover, config) or (), report)
    if report.as_json:
        report.document(pairs)
    columns = os.get_terminal_size(1).columns if os.isatty(1) else 1000
    status, lines = status_lines(pairs, report.now, columns, wrong)
    if status and report.quiet:  # a problem: the line for monitoring
        report.quiet, lines = False, lines[:1]
    report.line(*lines)
    return status


def _open_config(run, options):
    """Hold the config dir, made for a first key; return the Run with what is read before work."""
    config = run.config
    try:
        for path in options.get("key", ()):
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
                run = run._replace(pem=file.read(MAX_KEY))
    except (OSError, ValueError) as error:
        raise Failure("no-key", "--key %s: %s" % (path, why(error)),
                      "give a PEM file, or - for standard input")
    if run.pem is not None and not run.dry_run:
        make_folder(config)
    if run.command == "NAME" and not os.path.lexists(config):
        return run
    check_folder(config)
    lock(config)
    run = run._replace(litter=find_litter(config + "/archive", config + "/certferry"))
    path = config + "/certferry/environment"
    if os.path.lexists(path):
        check_folder(os.path.dirname(path))
        run.environment.update(parse_environment(read_text(path), path))
    return run


def _run_ferry(run, places, options):
    """Do what was asked; return [(Lineage, Outcome)]."""
    try:
        run = _open_config(run, options)
        places = places or discover(run.config, run.report)
    except (Failure, OSError) as error:
        run = run._replace(failure=failure_of(error))
        places = places or quietly(discover, run.config) or ()
        if not places:
            run.report.problem("", run.failure, run.failure.hint)
    pairs = ferry_all(run, places)
    post_hooks(run, pairs)
    metrics = options.get("metrics", [run.environment.get("CERTFERRY_METRICS")])[0]
    if metrics and run.command == "renew" and not run.dry_run:
        write_metrics(metrics, pairs, quietly(discover, run.config) or (), run.report)
    if run.command == "NAME" and "no-timer" not in options and pairs[0][1].result in REMEMBERING:
        (lineage, outcome), = pairs
        pairs = [(lineage, outcome._replace(changed=start_timer(run) or outcome.changed))]
    return pairs


def main(arguments):
    """Do what the command line asks; return the exit status."""
    options, words = _parse_words(arguments)
    command = "NAME" if words and words[0] not in COMMANDS else "".join(words[:1])
    if "version" in options or "help" in options:
        Reporter().line(*["certferry " + __version__] if "version" in options else _help(command))
        return 0
    try:
        _check_options(options, command)
        names = _parse_names(words[command != "NAME":], command, options)
        changes = _parse_changes(options)
    except Usage as error:
        Reporter().problem("", error)
        return 3 if command == "status" else 2
    if not command:
        Reporter().line(*SHORT_HELP, "certferry --help", stream=sys.stderr)
        return 2
    if "json" in options:  # said before the work, where this is python3-minimal
        import json  # noqa: F401
    # before anything is read: a run that sleeps holds no lock and no key
    if "jitter" in options:
        time.sleep(jitter_delay(int(options["jitter"][0])))
    now = int(time.time())
    config = os.path.abspath(options.get("config-dir", [CONFIG_DIR])[0])
    places, report = [Place(config, name) for name in names], Reporter(options, now)
    if command == "status":
        return _run_status(config, places, options, report)
    network = Network()  # forked before any key or credential is read
    run = Run(config, dict(os.environ), now, command, report.dry_run, "force" in options, network,
              report, changes, None, (), None)
    pairs = _run_ferry(run, places, options)
    network.close()
    if report.as_json:
        report.document(pairs)
    return 1 if report.failed else 0


if __name__ == "__main__":
    try:
        STATUS = main(sys.argv[1:])
    except KeyboardInterrupt:
        Reporter().problem("", "interrupted", "the next run takes up what is unfinished")
        STATUS = 130
    except Exception as error:
        failure = failure_of(error)
        Reporter().problem("", failure, failure.hint)
        STATUS = 3 if "status" in sys.argv else 1
    os._exit(STATUS)  # every line was flushed; taking the interpreter down properly takes 7 ms
