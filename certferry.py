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

    @property
    def may_hold_key(self):
        """Say whether this kind of source can hand over a private key."""
        return self.kind in ("file", "exec", "vault", "azure")


class Certificate(collections.namedtuple("Certificate", (
        "der serial not_before not_after subject issuer public_key algorithm version extensions "
        "domains"))):
    """The facts of one certificate: names as DER bytes, times in seconds since 1970.

    `public_key` is the SubjectPublicKeyInfo, `extensions` {OID bytes: (critical, value bytes)},
    `domains` the usable DNS names and IP addresses of the subject alternative name, in its order.
    """

    __slots__ = ()

    @property
    def lifetime(self):
        """Return the seconds from notBefore to notAfter, at least one."""
        return max(1, self.not_after - self.not_before)


class Place(collections.namedtuple("Place", "config name")):
    """Where the files of one lineage are."""

    __slots__ = ()
    live = property(lambda self: "%s/live/%s" % self)
    archive = property(lambda self: "%s/archive" % self.config)
    pointer = property(lambda self: "%s/live/%s/.current" % self)
    conf = property(lambda self: "%s/certferry/%s.conf" % self)
    state = property(lambda self: "%s/certferry/%s.state" % self)

    def version(self, number):
        """Return the directory of version `number`."""
        return "%s/archive/%s@%d" % (self.config, self.name, number)


# What is in service: `number` is None for plain files or certbot's links that are not adopted yet.
Version = collections.namedtuple("Version", "number folder leaf chain")

# What a source handed over; `chain` is None where the exchange did not show it, `key` a Secret.
Offer = collections.namedtuple("Offer", "source address leaf chain key way")

# An offer with what openssl says of it: public keys as DER, `trust` is "" or what is wrong.
Evidence = collections.namedtuple("Evidence", "offer public_key carried_key trust")

# What the judge compares an offer with: `keys` {public key DER: path}, the sets hold fingerprints.
Wanted = collections.namedtuple("Wanted", (
    "name domains current keys retired replaced rolled_back rolled_keys"))

# reason is "" for an offer that is accepted; message and hint make the line that a person reads.
Verdict = collections.namedtuple("Verdict", "reason message hint")

# One lineage during a run. `checked` is the time of the last check, `given` the remembered options
# as they were written, `key` the path of its private key or None, `notices` lines to print.
Lineage = collections.namedtuple("Lineage", (
    "place given options state checked current key notices"))

# How a crossing ended; `fresh` says that a certificate was deployed, `changed` that anything was
# written, `lines` what is shown below the result.
Outcome = collections.namedtuple("Outcome", (
    "name result reason message hint changed fresh source version health why lines"))


class Secret:
    """A private key as PEM bytes, in one object that never shows them."""

    __slots__ = ("pem",)

    def __init__(self, pem):
        self.pem = pem

    def __repr__(self):
        return "<private key>"


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


class Failure(Exception):
    """What ends a crossing: `reason` is a word of the README's table, or None for a broken record,
    a held lock or a missing program; `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, reason, message, hint=""):
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
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME = re.compile(r"%s(?:\.%s)*\Z" % (_LABEL, _LABEL))
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!\Z)|\Z)){4}")

Options = collections.namedtuple("Options", (
    "sources sni domains ca_file deploy_hooks served_at when warn critical timeout enabled"))

# Times are seconds since 1970 or None, sets of fingerprints and hooks are tuples of words.
State = collections.namedtuple("State", (
    "result reason detail since runs good source upstream_not_after way owed_version owed unserved "
    "retired rolled_back key told told_at"))
NO_STATE = State(None, None, "", None, 0, None, None, None, "", None, (), False, (), (), "", "",
                 None)
_LISTS = ("owed", "retired", "rolled_back")
_TIMES = ("since", "good", "upstream_not_after", "told_at")
_NUMBERS = ("runs", "owed_version")


def plain(text, limit=300):
    """Return `text` from anywhere as printable ASCII on one line, at most `limit` characters."""
    text = str(text).encode("ascii", "backslashreplace").decode("ascii")
    text = "".join(c if " " <= c <= "~" else "\\x%02x" % ord(c) for c in text)
    return text if len(text) <= limit else text[:limit - 3] + "..."


def is_address(host):
    """Say whether `host` is an IP address as host_name() returns it."""
    return ":" in host or bool(_IPV4.match(host))


def host_name(text):
    """Return a host name in lower-case ASCII or an IP address in its short form; or ValueError."""
    text = text.lower()
    if ":" in text:
        import ipaddress  # 3 ms
        return ipaddress.IPv6Address(text.split("%")[0].strip("[]")).compressed
    if not text.isascii() if hasattr(text, "isascii") else max(text, default="a") > "\x7f":
        text = text.encode("idna").decode("ascii")
    text = text[:-1] if text.endswith(".") else text
    if len(text) > 253 or not HOST_NAME.match(text):
        raise ValueError("%s is no host name" % plain(text, 80))
    if text.replace(".", "").isdigit() and not _IPV4.match(text):
        raise ValueError("%s is no IP address" % plain(text, 80))
    return text


def parse_endpoint(text, port):
    """Return (host, port) of HOST, HOST:PORT, [V6]:PORT or a bare V6 address; or ValueError."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        if not rest.startswith(":") and rest:
            raise ValueError("%s: write [ADDRESS]:PORT" % plain(text, 80))
        given = rest[1:]
        host = host if ":" in host else ""
    elif text.count(":") > 1:
        host, given = text, ""
    else:
        host, colon, given = text.partition(":")
        if colon and not given:
            raise ValueError("%s: the port is missing" % plain(text, 80))
    if given:
        if not re.match(r"[0-9]{1,5}\Z", given) or not 0 < int(given) < 65536:
            raise ValueError("%s: the port must be 1 to 65535" % plain(text, 80))
        port = int(given)
    return host_name(host), port


def endpoint_text(host, port):
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def parse_source(text):
    """Return the Source that `text` names; or ValueError with what is wrong."""
    if re.match("(file|exec):", text):
        kind, _, target = text.partition(":")
        if not target.strip() or "\0" in target:
            raise ValueError("%s: needs a %s" % (kind, "path" if kind == "file" else "command"))
        return Source(kind, "", 0, target, text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        host, port = parse_endpoint(text, 443)
        return Source("tls", host, port, "", endpoint_text(host, port))
    if scheme == "vault":
        host, _, path = rest.partition("/")
        host, port = parse_endpoint(host, 8200)
        if not re.match(r"[\w.@=+-]+(/[\w.@=+-]+)+\Z", path, re.ASCII) or ".." in path.split("/"):
            raise ValueError("%s: write vault://HOST[:PORT]/MOUNT/PATH" % plain(text, 80))
        return Source("vault", host, port, path, text)
    if scheme == "azure":
        match = re.match(r"([A-Za-z0-9.-]+)(:\d{1,5})?/([A-Za-z0-9-]{1,127})\Z", rest)
        if not match:
            raise ValueError("%s: write azure://VAULT/NAME" % plain(text, 80))
        host = match.group(1) if "." in match.group(1) else match.group(1) + ".vault.azure.net"
        host, port = parse_endpoint(host + (match.group(2) or ""), 443)
        return Source("azure", host, port, match.group(3), text)
    if scheme not in STARTTLS:
        raise ValueError("%s: write HOST[:PORT], or PROTOCOL:// with one of %s vault azure" % (
            plain(text, 80), " ".join(sorted(STARTTLS))))
    host, port = parse_endpoint(rest, STARTTLS[scheme])
    return Source(scheme, host, port, "", "%s://%s" % (scheme, endpoint_text(host, port)))


def _parse_domain(text):
    """Return a domain that a certificate must cover, `*.` allowed; or ValueError."""
    return "*." + host_name(text[2:]) if text.startswith("*.") else host_name(text)


def _parse_share(text):
    """Return ("%" or "d", number) of a threshold such as 25% or 10d; or ValueError."""
    match = re.match(r"([0-9]{1,4}(?:\.[0-9]+)?)([%d])\Z", text)
    if not match or match.group(2) == "%" and float(match.group(1)) > 100:
        raise ValueError("%s: write a share of the lifetime such as 25%%, or days such as 10d"
                         % plain(text, 40))
    return match.group(2), float(match.group(1))


def _parse_seconds(text):
    """Return the seconds of a timeout, 1 to 3600; or ValueError."""
    if not re.match(r"[0-9]{1,4}(\.[0-9]+)?\Z", text) or not 0 < float(text) <= 3600:
        raise ValueError("%s: write seconds, up to 3600" % plain(text, 40))
    return float(text)


def _parse_choice(*words):
    """Return a parser that accepts only these words."""
    def parse(text):
        if text not in words:
            raise ValueError("%s: write %s" % (plain(text, 40), " or ".join(words)))
        return text
    return parse


def _parse_text(text):
    """Return a command or path as it is; or ValueError where it cannot be one line."""
    if re.search("[\0\r\n]", text):
        raise ValueError("it must be one line")
    return text


def _parse_served(text):
    """Return the Source of a local service: PROTOCOL:// with a host, or HOST:PORT."""
    source = parse_source(text)
    if source.may_hold_key:
        raise ValueError("%s: write [PROTOCOL://]HOST:PORT" % plain(text, 80))
    return source


# Each option that is remembered: how one value is read, what holds without it, may it repeat.
REMEMBERED = collections.OrderedDict((
    ("from", (parse_source, (), True)),
    ("sni", (host_name, None, False)),
    ("domain", (_parse_domain, (), True)),
    ("ca-file", (_parse_text, None, False)),
    ("deploy-hook", (_parse_text, (), True)),
    ("served-at", (_parse_served, (), True)),
    ("when", (_parse_choice("always", "due"), "always", False)),
    ("warn", (_parse_share, ("%", 25.0), False)),
    ("critical", (_parse_share, ("%", 10.0), False)),
    ("timeout", (_parse_seconds, 20.0, False)),
    ("enabled", (_parse_choice("yes", "no"), "yes", False)),
))


def parse_options(given):
    """Return the Options that {key: [text, ...]} gives; or ValueError(key, what is wrong)."""
    values = []
    for key, (parse, default, repeats) in REMEMBERED.items():
        texts = given.get(key)
        if not texts:
            values.append(default)
            continue
        try:
            parsed = tuple(parse(text) for text in texts)
            if len(parsed) > 1 and not repeats:
                raise ValueError("it takes one value")
        except (ValueError, UnicodeError) as error:
            raise ValueError(key, plain(error))
        values.append(parsed if repeats else parsed[0])
    return Options(*values)


def merge_options(given, changes):
    """Return remembered options with the changes: an empty value forgets what was remembered."""
    merged = dict(given)
    for key, texts in changes.items():
        texts = [text for text in texts if text]
        if texts:
            merged[key] = texts
        else:
            merged.pop(key, None)
    return merged


_PARSERS = []


def _read_sections(text, path, shift):
    """Return {section: {key: [line, ...]}} of INI text; Failure with file and line where it is bad.

    `shift` lines were put before what is in the file. One parser serves all files of a run: making
    one costs more than reading a record with it.
    """
    import configparser  # 2 ms
    if not _PARSERS:
        _PARSERS.append(configparser.RawConfigParser(
            delimiters=("=",), comment_prefixes=("#",), empty_lines_in_values=False,
            default_section="\0"))
    parser = _PARSERS[0]
    parser.clear()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or (getattr(error, "errors", None) or [(1, "")])[0][0]
        raise Failure(None, "%s line %d: %s" % (path, line - shift, (
            "given twice" if "Duplicate" in type(error).__name__ else "not a KEY = VALUE line")),
            "correct it by hand")
    return {section: {key: [line.strip() for line in value.split("\n") if line.strip()]
                      for key, value in parser.items(section)} for section in parser.sections()}


def parse_conf(text, path):
    """Return {key: [text, ...]} of a NAME.conf; Failure with file and line where it is wrong."""
    sections = _read_sections("[lineage]\n" + text, path, 1)
    given = sections.pop("lineage", {})

    def failure(key, what):
        lines = [n for n, line in enumerate(text.splitlines(), 1)
                 if re.match(r"\[?%s\b" % re.escape(key), line.strip(), re.I)]
        return Failure(None, "%s line %d: %s" % (path, (lines or [1])[0], what),
                       "correct it by hand")
    for section in sections:
        raise failure(section, "[%s]: a conf has no sections" % plain(section, 40))
    for key in given:
        if key not in REMEMBERED:
            raise failure(key, "unknown key %s (known: %s)" % (
                plain(key, 40), " ".join(REMEMBERED)))
    try:
        parse_options(given)
    except ValueError as error:
        raise failure(error.args[0], "%s: %s" % error.args)
    return {key: texts for key, texts in given.items() if texts}


def edit_conf(text, before, after):
    """Return the text of a NAME.conf with the options of `after`: comments and order are kept."""
    lines, kept, dropping = text.splitlines(), [], False
    changed = [key for key in REMEMBERED if before.get(key) != after.get(key)]
    for line in lines:
        if line[:1] not in ("", " ", "\t", "#"):
            dropping = line.partition("=")[0].strip().lower() in changed
        if not dropping or line.lstrip().startswith("#"):
            kept.append(line)
    for key in changed:
        texts = after.get(key, [])
        if REMEMBERED[key][2] and len(texts) > 1:
            kept.append("%s =" % key)
            kept.extend("    " + text for text in texts)
        elif texts:
            kept.append("%s = %s" % (key, texts[0]))
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
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400 - 719162
    days += sum(lengths[:month - 1]) + day - 1
    return days * DAY + hour * 3600 + minute * 60 + second


def _iso_seconds(text):
    """Return seconds since 1970 of what iso_time() wrote; ValueError where it is no time."""
    return utc_seconds(*[int(part) for part in re.match(
        r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)Z\Z", text).groups()])


def parse_state(text, path):
    """Return the State of a NAME.state; Failure where it is damaged."""
    record = _read_sections(text, path, 0).get("state", {})
    values = {}
    try:
        for field in State._fields:
            lines = record.get(field.replace("_", "-"))
            if not lines:
                continue
            if field in _LISTS:
                values[field] = tuple(lines)
            elif field in _TIMES:
                values[field] = _iso_seconds(lines[0])
            elif field in _NUMBERS:
                values[field] = int(lines[0])
            else:
                values[field] = lines[0] == "yes" if field == "unserved" else lines[0]
    except (ValueError, AttributeError):
        raise Failure(None, "%s: %s cannot be read" % (path, field.replace("_", "-")), "remove it")
    return NO_STATE._replace(**values)


def format_state(state):
    """Return a State as INI text; what does not apply is left out."""
    lines = ["# what certferry saw last; its time of change is the time of the last check", "[state]"]
    for field, value in zip(State._fields, state):
        key = field.replace("_", "-")
        if not value:
            continue
        if field in _LISTS:
            lines.append("%s =" % key)
            lines.extend("    " + item for item in value)
        elif field in _TIMES:
            lines.append("%s = %s" % (key, iso_time(value)))
        else:
            lines.append("%s = %s" % (key, "yes" if value is True else value))
    return "".join(line + "\n" for line in lines)


def parse_environment(text, path):
    """Return {KEY: VALUE} of the environment file; Failure with file and line where it is bad."""
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.match(r"([A-Za-z_][A-Za-z0-9_]*)=([^\0]*)\Z", line)
        if not match:
            raise Failure(None, "%s line %d: not a KEY=VALUE line" % (path, number),
                          "correct it by hand")
        value = match.group(2).strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[match.group(1)] = value
    return values


# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------


def _oid(dotted):
    """Return the DER content bytes of a dotted object identifier."""
    numbers = [int(part) for part in dotted.split(".")]
    content = bytearray([numbers[0] * 40 + numbers[1]])
    for number in numbers[2:]:
        septets = [number & 0x7f]
        while number > 0x7f:
            number >>= 7
            septets.append(number & 0x7f | 0x80)
        content.extend(reversed(septets))
    return bytes(content)


_OIDS = {}


def _named(name):
    """Return the OID bytes of an extension or algorithm that certferry knows by name."""
    if not _OIDS:  # made on first use: the usual run never asks
        _OIDS.update((word, _oid(dotted)) for word, dotted in (
            ("key usage", "2.5.29.15"), ("basic constraints", "2.5.29.19"),
            ("extended key usage", "2.5.29.37"), ("subject key identifier", "2.5.29.14"),
            ("authority key identifier", "2.5.29.35"), ("server auth", "1.3.6.1.5.5.7.3.1"),
            ("must-staple", "1.3.6.1.5.5.7.1.24"), ("rsa", "1.2.840.113549.1.1.1"),
            ("ec", "1.2.840.10045.2.1"), ("ed25519", "1.3.101.112"), ("ed448", "1.3.101.113"),
            ("P-256", "1.2.840.10045.3.1.7"), ("P-384", "1.3.132.0.34"), ("P-521", "1.3.132.0.35"),
            ("pss", "1.2.840.113549.1.1.10"), ("sha256", "2.16.840.1.101.3.4.2.1"),
            ("sha384", "2.16.840.1.101.3.4.2.2"), ("sha512", "2.16.840.1.101.3.4.2.3"),
            ("rsa-sha256", "1.2.840.113549.1.1.11"), ("rsa-sha384", "1.2.840.113549.1.1.12"),
            ("rsa-sha512", "1.2.840.113549.1.1.13"), ("ecdsa-sha256", "1.2.840.10045.4.3.2"),
            ("ecdsa-sha384", "1.2.840.10045.4.3.3"), ("ecdsa-sha512", "1.2.840.10045.4.3.4"),
            ("common name", "2.5.4.3"), ("organization", "2.5.4.10")))
    return _OIDS[name]


_SUBJECT_ALTERNATIVE_NAME = b"\x55\x1d\x11"  # 2.5.29.17, read on every run


def _element(data, at, end):
    """Return (tag, start, stop) of the DER element at `at`; ValueError unless it is strict."""
    if at + 2 > end:
        raise ValueError("an element is cut off")
    tag, length, start = data[at], data[at + 1], at + 2
    if tag & 0x1f == 0x1f:
        raise ValueError("a tag of several bytes")
    if length & 0x80:
        size = length & 0x7f
        if not 1 <= size <= 3 or start + size > end:
            raise ValueError("a length of %d bytes" % size)
        length = int.from_bytes(data[start:start + size], "big")
        start += size
        if length < 0x80 or length >> 8 * (size - 1) == 0:
            raise ValueError("a length that is not the shortest")
    if start + length > end:
        raise ValueError("an element longer than what holds it")
    return tag, start, start + length


def _children(data, start, stop):
    """Return [(tag, start, stop, where its tag is)] of the elements from start to stop."""
    found = []
    while start < stop:
        tag, inner, end = _element(data, start, stop)
        found.append((tag, inner, end, start))
        start = end
    return found


def _expect(data, start, stop, *tags):
    """Return the children where they have exactly these tags; else ValueError."""
    found = _children(data, start, stop)
    if tuple(child[0] for child in found) != tags:
        raise ValueError("other elements than X.509 has there")
    return found


def check_strict(data, start=0, stop=None, depth=0):
    """Raise ValueError unless the bytes are strict DER all the way down (X.690, clauses 8 to 11)."""
    for tag, inner, end, _ in _children(data, start, len(data) if stop is None else stop):
        content = data[inner:end]
        if tag & 0x20:
            if depth >= MAX_DEPTH:
                raise ValueError("nested too deeply")
            if tag & 0xc0 == 0 and tag not in (0x30, 0x31):
                raise ValueError("a string in pieces")
            check_strict(data, inner, end, depth + 1)
        elif tag == 0x01 and content not in (b"\0", b"\xff"):
            raise ValueError("a boolean that is neither true nor false")
        elif tag in (0x02, 0x0a) and (not content or len(content) > 1 and (
                content[0] == 0 and content[1] < 0x80 or content[0] == 0xff and content[1] > 0x7f)):
            raise ValueError("an integer that is not the shortest")
        elif tag == 0x03 and (not content or content[0] > 7 or len(content) == 1 and content[0]
                              or len(content) > 1 and content[-1] & (1 << content[0]) - 1):
            raise ValueError("a bit string with loose bits")
        elif tag == 0x05 and content:
            raise ValueError("a null with content")
        elif tag == 0x06 and (not content or content[-1] & 0x80):
            raise ValueError("an object identifier that is cut off")
        elif tag in (0x00, 0x30, 0x31):
            raise ValueError("a tag that DER does not have")


def _der_time(tag, content):
    """Return the seconds of a UTCTime or GeneralizedTime as RFC 5280, 4.1.2.5 wants them."""
    text = content.decode("ascii")
    if not re.match(r"\d{12}Z\Z" if tag == 0x17 else r"\d{14}Z\Z", text) or tag not in (0x17, 0x18):
        raise ValueError("a time that RFC 5280 does not allow")
    if tag == 0x17:
        text = ("20" if text < "50" else "19") + text
    return utc_seconds(int(text[:4]), *[int(text[at:at + 2]) for at in range(4, 14, 2)])


def _extensions(data, start, stop):
    """Return {OID bytes: (critical, value bytes)} of the Extensions between start and stop."""
    found = {}
    (_, start, stop, _), = _expect(data, start, stop, 0x30)
    for tag, inner, end, _ in _children(data, start, stop):
        parts = _children(data, inner, end)
        tags = tuple(part[0] for part in parts)
        if tag != 0x30 or tags not in ((0x06, 0x04), (0x06, 0x01, 0x04)):
            raise ValueError("an extension of another shape")
        oid = data[parts[0][1]:parts[0][2]]
        if oid in found:
            raise ValueError("an extension given twice")
        found[oid] = (len(parts) == 3 and data[parts[1][1]] != 0, data[parts[-1][1]:parts[-1][2]])
    return found


def _domains(value):
    """Return the names of a subject alternative name that can count, in its order.

    A name with NUL or outside the host names' alphabet, an address as a DNS name, and a wildcard
    that is not one whole leftmost label above a registrable name (RFC 9525, 6.3) are left out.
    """
    names = []
    (_, start, stop, _), = _expect(value, 0, len(value), 0x30)
    for tag, inner, end, _ in _children(value, start, stop):
        content = value[inner:end]
        if tag == 0x82:
            name = content.decode("latin-1").lower()
            bare = name[2:] if name.startswith("*.") else name
            if HOST_NAME.match(bare) and not bare.replace(".", "").isdigit() and len(name) < 256 and (
                    bare is name or "." in bare):
                names.append(name)
        elif tag == 0x87 and len(content) == 4:
            names.append("%d.%d.%d.%d" % tuple(content))
        elif tag == 0x87 and len(content) == 16:
            names.append(host_name(":".join("%x" % (content[at] << 8 | content[at + 1])
                                            for at in range(0, 16, 2))))
    return tuple(names)


def parse_certificate(der):
    """Return the Certificate that the DER bytes hold; ValueError where they hold none."""
    (_, start, stop, _), = _expect(der, 0, len(der), 0x30)
    body, algorithm, _ = _expect(der, start, stop, 0x30, 0x30, 0x03)
    fields = _children(der, body[1], body[2])
    version = 1
    if fields and fields[0][0] == 0xa0:
        _, inner, end, _ = fields.pop(0)
        (_, inner, end, _), = _expect(der, inner, end, 0x02)
        version = int.from_bytes(der[inner:end], "big") + 1
    if [field[0] for field in fields[:6]] != [0x02, 0x30, 0x30, 0x30, 0x30, 0x30]:
        raise ValueError("other elements than X.509 has there")
    serial, _, issuer, validity, subject, key = fields[:6]
    times = [_der_time(tag, der[inner:end])
             for tag, inner, end, _ in _children(der, validity[1], validity[2])]
    extensions = {}
    for tag, inner, end, _ in fields[6:]:
        if tag == 0xa3:
            extensions = _extensions(der, inner, end)
    names = extensions.get(_SUBJECT_ALTERNATIVE_NAME)
    if len(times) != 2:
        raise ValueError("a validity without two times")
    return Certificate(
        der, der[serial[1]:serial[2]].hex(), times[0], times[1], der[subject[3]:subject[2]],
        der[issuer[3]:issuer[2]], der[key[3]:key[2]], der[algorithm[3]:algorithm[2]], version,
        extensions, _domains(names[1]) if names else ())


def fingerprint(der):
    """Return the SHA-256 of some DER as hexadecimal digits."""
    import hashlib  # loads libcrypto, 3 ms
    return hashlib.sha256(der).hexdigest()


def covers(names, wanted):
    """Say whether one of a certificate's names covers `wanted`, itself maybe a wildcard.

    A wildcard stands for exactly one label (RFC 9525, 6.3) and never for part of an address.
    """
    if wanted in names:
        return True
    label, dot, rest = wanted.partition(".")
    return bool(dot) and label != "*" and not is_address(wanted) and "*." + rest in names


def attribute(name, which):
    """Return one attribute of a distinguished name (DER bytes) as text, "" where it has none."""
    oid = _named(which)
    try:
        (_, start, stop, _), = _expect(name, 0, len(name), 0x30)
        for _, start, stop, _ in _children(name, start, stop):
            for _, inner, end, _ in _children(name, start, stop):
                kind, value = _children(name, inner, end)
                if name[kind[1]:kind[2]] == oid:
                    return name[value[1]:value[2]].decode("utf-8", "replace")
    except ValueError:
        pass
    return ""


def _key_parts(public_key):
    """Return (algorithm OID, parameters element, key bytes) of a SubjectPublicKeyInfo."""
    (_, start, stop, _), = _expect(public_key, 0, len(public_key), 0x30)
    algorithm, bits = _expect(public_key, start, stop, 0x30, 0x03)
    parts = _children(public_key, algorithm[1], algorithm[2])
    return (public_key[parts[0][1]:parts[0][2]],
            public_key[parts[1][1]:parts[1][2]] if len(parts) > 1 else b"",
            public_key[bits[1] + 1:bits[2]])


def key_kind(public_key):
    """Return what a person calls a public key: `RSA 2048`, `ECDSA P-256`, `Ed25519`."""
    try:
        oid, parameters, key = _key_parts(public_key)
        if oid == _named("rsa"):
            (_, start, stop, _), = _expect(key, 0, len(key), 0x30)
            _, inner, end, _ = _children(key, start, stop)[0]
            return "RSA %d" % int.from_bytes(key[inner:end], "big").bit_length()
    except (ValueError, IndexError):
        return "an unreadable key"
    if oid == _named("ec"):
        return "ECDSA " + ([curve for curve in ("P-256", "P-384", "P-521")
                            if parameters == _named(curve)] or ["on another curve"])[0]
    return {_named("ed25519"): "Ed25519", _named("ed448"): "Ed448"}.get(oid, "another kind")


def _weak_key(public_key):
    """Say whether browsers refuse a key: RSA under 2048 bits, other curves and kinds than these."""
    kind, _, size = key_kind(public_key).partition(" ")
    return int(size) < 2048 if kind == "RSA" else (kind, size) not in (
        ("ECDSA", "P-256"), ("ECDSA", "P-384"), ("ECDSA", "P-521"), ("Ed25519", ""), ("Ed448", ""))


def _weak_signature(algorithm):
    """Say whether an AlgorithmIdentifier is none of those that browsers accept (no SHA-1, MD5)."""
    (_, start, stop, _), = _expect(algorithm, 0, len(algorithm), 0x30)
    parts = _children(algorithm, start, stop)
    oid = algorithm[parts[0][1]:parts[0][2]]
    if oid == _named("pss"):
        return not any(b"\x06\x09" + _named(hash) in algorithm[parts[0][2]:]
                       for hash in ("sha256", "sha384", "sha512"))
    return oid not in [_named(word) for word in (
        "rsa-sha256", "rsa-sha384", "rsa-sha512", "ecdsa-sha256", "ecdsa-sha384", "ecdsa-sha512",
        "ed25519", "ed448")]


def _is_authority(certificate):
    """Say whether the basic constraints make a certificate an authority's."""
    value = certificate.extensions.get(_named("basic constraints"), (False, b""))[1]
    return b"\x01\x01\xff" in value[:5]


def _key_usage(certificate):
    """Return the key usage bits (bit 5 is keyCertSign, RFC 5280, 4.2.1.3), or None without any."""
    value = certificate.extensions.get(_named("key usage"), (False, b""))[1]
    return value[3] if len(value) > 3 else None


def flaw(certificate, is_leaf):
    """Return why browsers would refuse a leaf or an issuer whatever its root, or "".

    openssl accepts all of these: the CA/Browser Forum's baseline requirements and RFC 5280 do not.
    """
    extensions = certificate.extensions
    usage = _key_usage(certificate)
    serial = certificate.serial
    purposes = extensions.get(_named("extended key usage"))
    if certificate.version != 3:
        return "is X.509 version %d, not 3" % certificate.version
    if len(serial) > 40 or serial[:1] > "7" or not serial.strip("0"):
        return "has a serial number that is not a positive one of at most 20 bytes"
    if _weak_key(certificate.public_key):
        return "has a key that browsers refuse (%s)" % key_kind(certificate.public_key)
    if _weak_signature(certificate.algorithm):
        return "is signed with an algorithm that browsers refuse (SHA-1, MD5 or an unusual one)"
    for name in ("subject key identifier", "authority key identifier"):
        if extensions.get(_named(name), (False,))[0]:
            return "has a critical %s" % name
    if purposes and b"\x06\x08" + _named("server auth") not in purposes[1]:
        return "is not meant for servers (its extended key usage lacks serverAuth)"
    if not is_leaf:
        return "" if usage is None or usage & 4 else "may not sign certificates (its key usage)"
    if _is_authority(certificate):
        return "is an authority's certificate, not a server's"
    if usage is not None and usage & 4:
        return "may sign certificates (its key usage), and is no authority's"
    if len(certificate.subject) <= 2 and not extensions.get(_SUBJECT_ALTERNATIVE_NAME, (True,))[0]:
        return "has no subject, and its subject alternative name is not critical"
    return ""


def must_staple(certificate):
    """Say whether a leaf asks that its server staples an OCSP answer (RFC 7633)."""
    return _named("must-staple") in certificate.extensions


def order_chains(leaf, others, limit=6):
    """Return the possible chains for a leaf: issuers in order, no root, nothing that is not one.

    Only names are compared: openssl says which of them holds. Issuers that the leaf's authority
    key identifier points at come first, then the order in which they were handed over.
    """
    chains, unfinished = [], [()]
    while unfinished and len(chains) < limit:
        chain = unfinished.pop(0)
        last = chain[-1] if chain else leaf
        identifier = last.extensions.get(_named("authority key identifier"), (False, b""))[1]
        issuers = [other for other in others if other.subject == last.issuer
                   and other.subject != other.issuer and other not in chain and other != leaf]
        issuers.sort(key=lambda other: other.extensions.get(
            _named("subject key identifier"), (False, b"\0\0"))[1][2:] not in identifier)
        if issuers:
            unfinished[:0] = [chain + (issuer,) for issuer in issuers[:limit]]
        else:
            chains.append(chain)
    return chains


def to_pem(ders):
    """Return certificates (DER) as PEM bytes with lines of 64 characters (RFC 7468)."""
    blocks = []
    for der in ders:
        text = binascii.b2a_base64(der, newline=False)
        lines = [text[at:at + 64] for at in range(0, len(text), 64)]
        blocks.append(b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"
                      % b"\n".join(lines))
    return b"".join(blocks)


def pem_blocks(data):
    """Return [(label, content, whole block)] of PEM text, in linear time whatever it is."""
    blocks, at = [], 0
    while True:
        at = data.find(b"-----BEGIN ", at)
        middle = data.find(b"-----", at + 11)
        if at < 0 or middle < 0 or middle - at > 60:
            if at < 0 or middle < 0:
                return blocks
            at += 11
            continue
        label = data[at + 11:middle]
        end = data.find(b"-----END " + label + b"-----", middle)
        if end < 0:
            return blocks
        after = end + len(label) + 14
        blocks.append((label, data[middle + 5:end], data[at:after]))
        at = after


def read_pem(data):
    """Return (certificates as DER, private key as Secret or None) of PEM text or one DER file.

    Text around the blocks, CRLF, any order and other blocks are allowed. A certificate that is
    given twice counts once. ValueError with what is wrong.
    """
    if data[:1] == b"\x30" and b"-----BEGIN " not in data:
        return [data], None
    certificates, keys = [], []
    for label, content, block in pem_blocks(data):
        if label in (b"CERTIFICATE", b"X509 CERTIFICATE"):
            content = b"".join(content.split())
            try:
                der = binascii.a2b_base64(content)
            except binascii.Error:
                der = b""
            if not re.match(rb"[A-Za-z0-9+/]+={0,2}\Z", content) or not der:
                raise ValueError("a certificate whose base64 is broken")
            if der not in certificates:
                certificates.append(der)
            if len(certificates) > MAX_CERTIFICATES:
                raise ValueError("more than %d certificates" % MAX_CERTIFICATES)
        elif label.endswith(b"PRIVATE KEY"):
            if block not in keys:
                keys.append(block)
    if len(keys) > 1:
        raise ValueError("more than one private key")
    return certificates, Secret(b"\n".join(keys[0].split(b"\r\n")) + b"\n") if keys else None


def holds_only_certificates(data):
    """Say whether PEM text is certificates and nothing else, as far as certferry reads it."""
    return not [label for label, _, _ in pem_blocks(data) if label != b"CERTIFICATE"]


# --------------------------------------------------------------------------------------------------
# OpenSSL
# --------------------------------------------------------------------------------------------------

# The verifiers' group: a process can trace another one of its user and group, and what talks to
# the network must not be able to forge what the verifiers say.
_VERIFIERS_GROUP = 65533


def _nobody():
    """Return (uid, gid) of the user that owns nothing."""
    import pwd
    try:
        entry = pwd.getpwnam("nobody")
        return entry.pw_uid or 65534, entry.pw_gid or 65534
    except KeyError:
        return 65534, 65534


def confine(group=None):
    """Give up every privilege of root for good, and bound what this process can use.

    Not root: only the bounds. OSError where a privilege stays. `group` replaces nobody's own.
    """
    import resource
    # under 512 MiB of address space threads cannot start; RLIMIT_NPROC would count all of nobody's
    for limit, most in (("CORE", 0), ("FSIZE", 0), ("AS", 1 << 30), ("NOFILE", 1024),
                        ("CPU", 600)):
        kind = getattr(resource, "RLIMIT_" + limit, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    if os.geteuid() != 0:
        return
    user, own_group = _nobody()
    os.setgroups([])
    for change, value in ((os.setresgid, group or own_group), (os.setresuid, user)):
        change(value, value, value)
    try:
        os.setuid(0)
    except OSError:
        return
    raise OSError(errno.EPERM, "could not give up root's privilege")


def verifiers_group():
    """Return the group of the verifiers: another one than nobody's own."""
    return _VERIFIERS_GROUP if _nobody()[1] != _VERIFIERS_GROUP else _VERIFIERS_GROUP - 1


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
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(to_read, 200, False)
        os.dup2(from_write, 201, False)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(3, 200)
        os.closerange(202, 4096)
        if unprivileged:
            _load_before_confined()
            try:
                confine()
            except OSError as error:
                os.write(201, b"! %s\n" % plain(error).encode())
                os._exit(1)
        serve(200, 201)
        status = 0
    finally:
        os._exit(status)


def _load_before_confined():
    """Import what an unprivileged process may need where Python's folder is closed to nobody."""
    folder = os.path.dirname(os.__file__)
    while folder != "/" and os.stat(folder).st_mode & 0o005 == 0o005:
        folder = os.path.dirname(folder)
    if folder != "/" and os.geteuid() == 0:
        import calendar, encodings.idna, ipaddress, ssl, subprocess, threading  # noqa: E401,F401
        try:
            import http.client  # noqa: F401
        except ImportError:
            pass  # python3-minimal has none, and says so where it is needed


def converse(process, feeds, deadline, limit):
    """Write {descriptor: bytes} to a process and return (its output, its errors), both bounded.

    TimeoutError when the deadline (monotonic seconds) passes, ValueError over the limit; the
    process is killed then. Ends when both pipes end.
    """
    outputs = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    kept, reading, feeds = list(outputs.values()), set(outputs), dict(feeds)
    for descriptor in feeds:
        os.set_blocking(descriptor, False)
    try:
        while reading:
            ready, writable, _ = select.select(reading, feeds, [], max(0, deadline
                                                                       - time.monotonic()))
            if not ready and not writable:
                raise TimeoutError("it took too long")
            for descriptor in writable:
                try:
                    feeds[descriptor] = feeds[descriptor][os.write(descriptor, feeds[descriptor]):]
                except OSError:
                    feeds[descriptor] = b""  # it reads no further: its status tells
                if not feeds[descriptor]:
                    del feeds[descriptor]
                    os.close(descriptor)
            for descriptor in ready:
                piece = os.read(descriptor, 65536)
                outputs[descriptor].extend(piece)
                if not piece:
                    reading.discard(descriptor)
                if len(outputs[descriptor]) > limit:
                    raise ValueError("more than %d bytes" % limit)
        return bytes(kept[0]), bytes(kept[1])
    finally:
        for descriptor in feeds:
            os.close(descriptor)
        if reading:
            kill_group(process)
        process.stdout.close()
        process.stderr.close()


def kill_group(process):
    """Kill a process that leads a session of its own, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()


def run_openssl(arguments, data=b"", files=(), deadline=None, system_roots=False, trusted=False):
    """Run the openssl command and return (exit status, output, last words on standard error).

    `data` goes to its standard input, each of `files` (bytes) to a pipe whose path replaces the
    next None in the arguments. It runs unprivileged unless its input is `trusted`, in an
    environment of our own; without `system_roots` it sees no trust store. Failure where there is
    no openssl, TimeoutError after the deadline.
    """
    import subprocess  # 4 ms
    environment = {"PATH": os.environ.get("PATH", "") + ":" + SAFE_PATH, "LC_ALL": "C",
                   "SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": "/nonexistent"}
    if system_roots:
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            environment.pop(name)
            if name in os.environ:
                environment[name] = os.environ[name]
    arguments, feeds, passed = list(arguments), {}, []
    root = os.geteuid() == 0 and not trusted
    group = verifiers_group() if root else None
    for content in files:
        read, write = os.pipe()
        if root:
            os.fchown(read, _nobody()[0], group)  # a pipe of root's is closed to nobody
        feeds[write] = content
        passed.append(read)
        arguments[arguments.index(None)] = "/dev/fd/%d" % read
    try:
        process = subprocess.Popen(
            ["openssl"] + arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment, pass_fds=passed, start_new_session=True,
            cwd="/", preexec_fn=(lambda: confine(group)) if root else None)
    except FileNotFoundError:
        for descriptor in list(feeds):
            os.close(descriptor)
        raise Failure(None, "there is no openssl command here", "install the package openssl")
    finally:
        for descriptor in passed:
            os.close(descriptor)
    feeds[os.dup(process.stdin.fileno())] = data
    process.stdin.close()
    if not data:
        os.close(feeds.popitem()[0])
    deadline = deadline or time.monotonic() + OPENSSL_SECONDS
    output, errors = converse(process, feeds, deadline, 2 * MAX_OFFER)
    return process.wait(), output, errors.decode("ascii", "replace")


def _decode_public_key(pem):
    """Return the DER of a PUBLIC KEY that openssl printed, or None where it printed none."""
    for label, content, _ in pem_blocks(pem):
        if label == b"PUBLIC KEY":
            return binascii.a2b_base64(content)
    return None


def leaf_public_key(leaf):
    """Return the public key (DER) of a certificate (DER) as openssl prints it, or None."""
    return _decode_public_key(run_openssl(["x509", "-pubkey", "-noout"], to_pem([leaf]))[1])


def public_half(pem, trusted):
    """Return the public key (DER) of a private key (PEM bytes); ValueError with why not, in words.

    `trusted` for a key of this host; a key that came with an offer is read unprivileged.
    """
    head = pem[:400]
    if b"ENCRYPTED" in head:
        raise ValueError("is encrypted: certferry asks no passphrase, nor do servers at boot")
    if b"PRIVATE KEY-----" not in pem:
        raise ValueError("holds no private key in PEM form")
    status, output, _ = run_openssl(["pkey", "-pubout", "-passin", "pass:"], pem, trusted=trusted)
    public_key = _decode_public_key(output) if status == 0 else None
    if public_key is None:
        raise ValueError("is a private key that openssl cannot read: it is cut off or damaged")
    return public_key


def _trust_store_missing():
    """Say whether openssl's own folder of trusted roots is empty or not there."""
    output = run_openssl(["version", "-d"])[1].decode("ascii", "replace")
    folder = (re.findall(r'"(.+)"', output) or ["/nonexistent"])[0]
    paths = [os.environ.get("SSL_CERT_FILE", folder + "/cert.pem"),
             os.environ.get("SSL_CERT_DIR", folder + "/certs")]
    return not any(os.path.isfile(path) or os.path.isdir(path) and os.listdir(path)
                   for path in paths)


def _trust_words(number, depth, text, has_chain, roots):
    """Return what an error of `openssl verify` means, and what to do about it."""
    who = "the leaf" if depth == 0 else "issuer %d of the chain" % depth
    if number in (2, 20, 21, 18, 19, 27):
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
    known = {10: "has expired", 9: "is not yet valid", 24: "is no authority's",
             25: "breaks a path length", 26: "is not meant for servers",
             34: "has a critical extension that nobody knows", 47: "is outside its name constraints",
             48: "is inside excluded name constraints", 66: "has a key that is too small",
             67: "has an issuer key that is too small", 68: "is signed with a weak digest",
             7: "has a broken signature", 79: "is no valid authority's certificate"}
    return "%s %s" % (who, known.get(number, "fails openssl's check: " + text))


def verify_chain(leaf, chain, roots, roots_pem, now):
    """Return "" where leaf and chain lead to a trusted root at the time `now`, else why not.

    `roots` (Certificates, with their PEM bytes) replace the system store; None means the system's.
    """
    arguments = ["verify", "-purpose", "sslserver", "-attime", "%d" % now, "-auth_level", "2"]
    files = []
    if roots is not None:
        arguments += ["-CAfile", None]
        files.append(roots_pem)
    if chain:
        arguments += ["-untrusted", None]
        files.append(to_pem(issuer.der for issuer in chain))
    status, output, errors = run_openssl(
        arguments, to_pem([leaf.der]), files, system_roots=roots is None)
    if status and "auth_level" in errors:  # LibreSSL has no such option; ours cover it
        at = arguments.index("-auth_level")
        arguments[at:at + 2] = []
        status, output, errors = run_openssl(
            arguments, to_pem([leaf.der]), files, system_roots=roots is None)
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
            ["pkcs12", "-in", None, "-nodes", "-passin", "stdin"] + legacy, b"\n", [data])
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

_WANTED = {  # key type: (TLS 1.2 ciphers, signature algorithms)
    "RSA": ("aRSA", "rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:RSA+SHA256:RSA+SHA384"),
    "ECDSA": ("aECDSA", "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512"),
    "Ed25519": ("aECDSA", "ed25519")}


def checksum(der):
    """Return a short number for a leaf, only to save asking for the chain of a known one."""
    return binascii.crc32(der)


def _is_own(family, where):
    """Say whether an address is this machine's: then a packet to it would leave from itself."""
    import socket
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(where)
            return probe.getsockname()[0] == where[0] or where[0].startswith("127.")
        except OSError:
            return False


def _resolve(job):
    """Return [(family, socket address)] of the job's host, in the resolver's order."""
    import socket
    try:
        found = socket.getaddrinfo(job.host.encode("ascii"), job.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Failure("unreachable", "%s does not resolve (%s)" % (job.host, error.strerror.lower()),
                      "check the name, and this host's resolver")
    addresses = []
    for family, _, _, _, where in found:
        if (family, where) not in addresses:
            addresses.append((family, where))
    others = [a for a in addresses if not (job.own and _is_own(*a))]
    if not others:
        raise Failure("unreachable", "%s is this very machine" % job.host,
                      "name the server that has the certificate with --from HOST[:PORT]")
    return [a for a in others if a[1][0] not in job.skip.split(",")][:MAX_CERTIFICATES]


def _context(job, way):
    """Return an SSL context: TLS 1.2 or later, ephemeral keys, nothing verified but the proof."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the peer's signature is checked all the same
    context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.set_ciphers(CIPHERS)
    if way == "1.2":
        context.options |= ssl.OP_NO_TLSv1_3
        own = _WANTED[job.want][0]
        context.set_ciphers(":".join("%s+%s" % (part, own) for part in ("ECDHE", "DHE"))
                            + ":!aNULL:!eNULL:!PSK" if own == "aRSA" else "ECDHE+aECDSA:!aNULL")
    return context


def _show_certificates(job, where, deadline, extra=()):
    """Return (exit status, certificates, error text) of `openssl s_client -showcerts`."""
    arguments = ["s_client", "-connect", ("[%s]:%d" if ":" in where[0] else "%s:%d") % where[:2],
                 "-showcerts", "-no_tls1", "-no_tls1_1", "-cipher", CIPHERS]
    if not is_address(job.sni):
        arguments += ["-servername", job.sni]
    if job.kind != "tls":
        arguments += ["-starttls", job.kind]
    if job.kind == "xmpp":
        arguments += ["-xmpphost", job.sni]
    status, output, errors = run_openssl(arguments + list(extra), deadline=deadline)
    return status, read_pem(output)[0], errors


def _failed_words(job, errors):
    """Return the Failure for an s_client that showed no certificate."""
    known = (("onnection refused", "refuses connections", "is the service running there?"),
             ("STARTTLS", "does not offer STARTTLS", "check the protocol and the port"),
             ("unrecognized name", "does not serve %s" % job.sni, "--sni HOST, a name that it serves"),
             ("unreachable", "cannot be reached", "check the network"))
    for mark, message, hint in known:
        if mark in errors:
            return Failure("unreachable", message, hint)
    return Failure("unreachable", "does not complete a TLS handshake (TLS 1.2 or later, with an "
                   "ephemeral key exchange)", "is it a TLS service of that protocol?")


def _by_command(job, where, deadline, extra=()):
    """Return the certificates that s_client alone has seen: its exit status is the proof."""
    status, certificates, errors = _show_certificates(job, where, deadline, extra)
    if not certificates:
        raise _failed_words(job, errors)
    if status != 0:
        raise Failure("unproven", "showed a certificate and did not prove that it holds its key",
                      "an impostor, or a server that demands a client certificate")
    return certificates


def _handshake_failure(job, where, deadline, error):
    """Return the Failure for a handshake that the ssl module did not complete."""
    reason = getattr(error, "reason", None) or ""
    if "BAD_SIGNATURE" in reason:
        return Failure("unproven", "showed a certificate and signed with another key",
                       "an impostor or a broken server: look at what answers there")
    if getattr(error, "library", "") in ("ASN1", "X509", "X509V3"):
        return Failure("malformed", "showed something that is no certificate", "look at it there")
    if "UNRECOGNIZED_NAME" in reason:
        return Failure("unreachable", "does not serve %s" % job.sni,
                       "--sni HOST, a name under which it serves this certificate")
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
        return Failure("unreachable", "does not speak TLS", "is it the right port?")
    if "EXCESSIVE_MESSAGE_SIZE" in reason:
        return Failure("malformed", "showed more than a certificate chain can be", "look at it")
    # a server that demands a client certificate, or an impostor, has shown one before it failed
    status, certificates, errors = _show_certificates(job, where, deadline)
    if certificates and status != 0:
        return Failure("unproven", "showed a certificate and ended the handshake before it proved "
                       "that it holds its key", "an impostor, or a server that demands a client "
                       "certificate: use another port or source")
    return _failed_words(job, errors)


def _connect(family, where, deadline):
    """Return a connected socket; Failure where there is none in time."""
    import socket
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        connection.connect(where)
        return connection
    except socket.timeout:
        connection.close()
        raise TimeoutError("no answer")
    except OSError as error:
        connection.close()
        if error.errno == errno.ECONNREFUSED:
            raise Failure("unreachable", "refuses connections", "is the service running there?")
        raise Failure("unreachable", "cannot be reached (%s)" % os.strerror(
            error.errno or 0).lower(), "check the network and the address")


def _by_module(job, family, where, deadline, way):
    """Return the certificates of a handshake that the ssl module completed.

    The leaf is the one that the peer proved to hold the key of. The chain comes from the same
    handshake where Python can tell (3.13), else from s_client, and only with the same leaf.
    """
    import socket
    import ssl
    context = _context(job, way)
    name = None if is_address(job.sni) else job.sni
    if name and sys.version_info >= (3, 7):
        name = name.encode("ascii")  # as text it is encoded by a module that takes 4 ms to load
    connection = _connect(family, where, deadline)
    try:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        peer = context.wrap_socket(connection, server_hostname=name, do_handshake_on_connect=False)
        connection = peer
        peer.do_handshake()
        leaf = peer.getpeercert(binary_form=True)
        chain = peer.get_unverified_chain() if hasattr(peer, "get_unverified_chain") else None
    except socket.timeout:
        raise TimeoutError("no answer")
    except (ssl.SSLError, OSError) as error:
        raise _handshake_failure(job, where, deadline, error)
    finally:
        connection.close()
    if not leaf:
        raise Failure("unproven", "showed no certificate", "look at what answers there")
    if chain is not None or checksum(leaf) == int(job.known or 0):
        return [leaf] + [der for der in chain or () if der != leaf], chain is not None
    extra = ["-no_tls1_3", "-cipher", _WANTED[job.want][0]] if way == "1.2" else ()
    for _ in range(3):  # a pool, or a rotation between the two handshakes
        _, certificates, _ = _show_certificates(job, where, deadline, extra)
        if certificates and certificates[0] == leaf:
            return certificates, True
    raise Failure("unreachable", "showed another certificate at each handshake", "try again, or "
                  "--from one member of the pool")


def _ask_address(job, family, where, deadline):
    """Return the Answer of one address: in the way that gives a certificate of the wanted type."""
    ways = [""] if not job.want else [job.way or "1.2", "1.2", "sigalgs", ""]
    if job.kind != "tls":
        ways = ["sigalgs"] if job.want else [""]
    for position, way in enumerate(ways):
        try:
            if job.kind != "tls" or way == "sigalgs":
                certificates, whole = _by_command(job, where, deadline, [
                    "-sigalgs", _WANTED[job.want][1]] if job.want else ()), True
            else:
                certificates, whole = _by_module(job, family, where, deadline, way)
            break
        except Failure:
            if position == len(ways) - 1:
                raise
    return Answer("", "whole" if whole else "", "", where[0], way, to_pem(certificates))


def exchange(job):
    """Return the Answer to a Job: the first address that gives a proven certificate."""
    deadline = time.monotonic() + job.timeout
    answer = Answer("unreachable", "has no other address", "", "", "", b"")
    try:
        addresses = _resolve(job)
        for position, (family, where) in enumerate(addresses):
            left = deadline - time.monotonic()
            until = time.monotonic() + left / (len(addresses) - position)
            try:
                return _ask_address(job, family, where, until)
            except TimeoutError:
                answer = Answer("timeout", "gave no certificate in %g s" % job.timeout,
                                "is it overloaded or behind a firewall? --timeout SECONDS",
                                where[0], "", b"")
            except Failure as failure:
                answer = Answer(failure.reason, str(failure), failure.hint, where[0], "", b"")
            except ValueError as error:
                answer = Answer("malformed", str(error), "look at what it serves", where[0], "",
                                b"")
    except Failure as failure:
        answer = Answer(failure.reason, str(failure), failure.hint, "", "", b"")
    except OSError as error:
        answer = Answer("unreachable", plain(error), "look at this host's limits", "", "", b"")
    return answer


class _Pool:
    """The network process's exchanges: side by side, each with its deadline, answered as they end.

    An exchange that waits on its peer for PATIENCE frees its place; an upstream that was waited for
    in vain is not waited for again in the same run.
    """

    def __init__(self):
        self.waiting = collections.deque()
        self.running = {}  # number: (job, started)
        self.held = {}  # endpoint: numbered jobs that wait for its first answer
        self.dead = {}  # endpoint: the Answer that its timeout gave
        self.alive = set()
        self.done = collections.deque()
        self.woken, self.wake = os.pipe()

    def work(self, number, job):
        """Run one exchange in its thread and hand its answer over."""
        try:
            answer = exchange(job)
        except Exception as error:  # whatever a peer provokes ends as an answer
            answer = Answer("unreachable", "the exchange broke: %s" % plain(error, 120), "", "", "",
                            b"")
        self.done.append((number, answer))
        os.write(self.wake, b".")

    def start(self, now):
        """Start what may be started now."""
        import threading
        young = sum(1 for _, started in self.running.values() if now - started < PATIENCE)
        while self.waiting and young < SIDE_BY_SIDE and len(self.running) < MAX_RUNNING:
            number, job = self.waiting.popleft()
            endpoint = job[:3]
            dead = self.dead.get(endpoint)
            if dead and dead[0] >= job.timeout:
                self.running[number] = (job, now)
                self.done.append((number, dead[1]))
            elif endpoint not in self.alive and any(
                    other[:3] == endpoint and now - started >= PATIENCE
                    for other, started in self.running.values()):
                self.held.setdefault(endpoint, []).append((number, job))
            else:
                self.running[number] = (job, now)
                young += 1
                threading.Thread(target=self.work, args=(number, job), daemon=True).start()

    def finish(self, now):
        """Return the answers that are ready, as bytes for the pipe."""
        for number, (job, started) in list(self.running.items()):
            if now > started + job.timeout + 0.2:  # its thread hangs in the resolver, mostly
                self.done.append((number, Answer(
                    "timeout", "gave no certificate in %g s" % job.timeout,
                    "does the name resolve? is it overloaded? --timeout SECONDS", "", "", b"")))
        out = b""
        while self.done:
            number, answer = self.done.popleft()
            if number not in self.running:
                continue  # too late: its timeout was told
            job, _ = self.running.pop(number)
            endpoint = job[:3]
            if answer.reason == "timeout" and endpoint not in self.alive:
                self.dead[endpoint] = (job.timeout, answer)
            elif answer.reason != "timeout":
                self.alive.add(endpoint)
            self.waiting.extendleft(self.held.pop(endpoint, ()))
            out += _frame(number, answer)
        return out

    def pause(self, now):
        """Return the seconds until something has to be done without being asked."""
        moments = [started + job.timeout + 0.25 for job, started in self.running.values()]
        if self.waiting:
            moments += [started + PATIENCE for _, started in self.running.values()
                        if now - started < PATIENCE]
        return max(0.0, min(moments) - now) if moments else None


def _frame(number, answer):
    """Return an Answer as bytes for the pipe: number and length in a line, then what it says."""
    head = "\t".join(plain(part) for part in answer[:5]).encode("ascii")
    return b"%d %d\n%s\n%s" % (number, len(head) + 1 + len(answer.data), head, answer.data)


def _serve_jobs(jobs, answers):
    """Be the network process: read jobs, answer them, end when no more can come."""
    import threading
    threading.stack_size(256 * 1024)
    import ssl  # noqa: F401  (20 ms, while the other process reads its files)
    pool, unread, unsent = _Pool(), b"", b""
    os.set_blocking(answers, False)
    while jobs is not None or pool.waiting or pool.running or unsent:
        now = time.monotonic()
        pool.start(now)
        unsent += pool.finish(now)
        reading = [pool.woken] + ([jobs] if jobs is not None else [])
        pause = 0 if pool.done else pool.pause(now)
        readable, writable, _ = select.select(reading, [answers] if unsent else [], [], pause)
        if writable:
            unsent = unsent[os.write(answers, unsent):]
        if pool.woken in readable:
            os.read(pool.woken, 4096)
        if jobs in readable:
            piece = os.read(jobs, 65536)
            if not piece:
                jobs = None
                pool.waiting.clear()
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                number, kind, host, port, sni, timeout, *rest = line.decode("ascii").split("\t")
                pool.waiting.append((int(number), Job(
                    kind, host, int(port), sni, float(timeout), *rest)))


class Network:
    """The unprivileged process that does every handshake of a run, as the deciding one sees it.

    It is believed in nothing but bytes: what breaks the protocol, floods or stays silent ends it,
    and every exchange that it still owed.
    """

    def __init__(self):
        self.pid, self.to_jobs, self.from_answers = own_process(_serve_jobs, unprivileged=True)
        self.count, self.longest, self.stored, self.buffer = 0, 0.0, 0, b""
        self.answers, self.open, self.broken = {}, set(), ""

    def submit(self, job):
        """Ask for an exchange; return the number under which answer() tells how it went."""
        self.count += 1
        self.longest = max(self.longest, job.timeout)
        self.open.add(self.count)
        line = ("%d\t" % self.count) + "\t".join(str(part) for part in job) + "\n"
        try:
            os.write(self.to_jobs, line.encode("ascii"))
        except OSError:
            self.broken = self.broken or "the network process died"
        return self.count

    def answer(self, number):
        """Return the Answer to a job, waiting for it."""
        while number not in self.answers and not self.broken:
            # its own deadlines come first: this one is for a process that does not keep them
            ready, _, _ = select.select([self.from_answers], [], [], self.longest + 5)
            piece = os.read(self.from_answers, 1 << 16) if ready else b""
            if not piece:
                self.broken = "the network process %s" % ("died" if ready else "does not answer")
            self.buffer += piece
            self.take()
        if number not in self.answers:
            return Answer("unreachable", self.broken, "run it again, with -v", "", "", b"")
        return self.answers.pop(number)

    def take(self):
        """Move whole answers out of the buffer; break off at anything that is none."""
        while self.buffer and not self.broken:
            if self.buffer.startswith(b"! "):
                self.broken = "the network process stopped: " + plain(
                    self.buffer[2:200].decode("ascii", "replace").strip())
                return
            match = re.match(rb"(\d{1,9}) (\d{1,7})\n", self.buffer)
            if not match and len(self.buffer) < 20 and b"\n" not in self.buffer:
                return
            number, size = (int(part) for part in match.groups()) if match else (0, 0)
            self.stored += size if size > 1 << 17 else 0
            if number not in self.open or size > 2 * MAX_OFFER or self.stored > 64 * MAX_OFFER:
                self.broken = "the network process said what was not asked"
                return
            if len(self.buffer) < match.end() + size:
                self.stored -= size if size > 1 << 17 else 0
                return
            payload = self.buffer[match.end():match.end() + size]
            self.buffer = self.buffer[match.end() + size:]
            head, _, data = payload.partition(b"\n")
            parts = [plain(part) for part in head.decode("ascii", "replace").split("\t")]
            self.open.discard(number)
            self.answers[number] = Answer(*((parts + [""] * 5)[:5] + [data]))

    def close(self):
        """End the process: it holds nothing that matters."""
        os.close(self.to_jobs)
        os.close(self.from_answers)
        try:
            os.kill(self.pid, signal.SIGKILL)
        except OSError:
            pass
        os.waitpid(self.pid, 0)


def tls_offer(source, answer):
    """Return the Offer in an Answer of the network process; Failure with the answer's reason."""
    if answer.reason:
        words = ("unreachable", "timeout", "unproven", "malformed")
        where = source.text if answer.address in ("", source.host) else "%s (%s)" % (
            source.text, answer.address)
        message = answer.detail if answer.detail.startswith((source.host, "the network")) else (
            "%s %s" % (where, answer.detail))
        raise Failure(answer.reason if answer.reason in words else "malformed", message,
                      answer.hint)
    offer = _offer_of(source, answer.data, answer.address, answer.way)
    return offer if answer.detail else offer._replace(chain=None)


def _offer_of(source, data, address="", way=""):
    """Return the Offer in PEM or DER bytes from a source, its leaf first; Failure otherwise."""
    try:
        if len(data) > MAX_OFFER:
            raise ValueError("more than %d bytes" % MAX_OFFER)
        certificates, key = read_pem(data)
        if not certificates:
            raise ValueError("no certificate in it")
    except ValueError as error:
        raise Failure("malformed", "%s: %s" % (source.text, error), "look at what it holds")
    return Offer(source, address, certificates[0], tuple(certificates[1:]), key, way)


def _leaf_first(offer):
    """Return an offer in any order with its leaf first: the certificate that issued no other."""
    try:
        parsed = [parse_certificate(der) for der in (offer.leaf,) + offer.chain]
    except ValueError:
        return offer  # the judge says which word that is
    issuers = {certificate.issuer for certificate in parsed
               if certificate.issuer != certificate.subject}
    leaves = [c for c in parsed if c.subject not in issuers and c.issuer != c.subject] or [
        c for c in parsed if c.subject not in issuers] or parsed
    return offer._replace(leaf=leaves[0].der,
                          chain=tuple(c.der for c in parsed if c is not leaves[0]))


def _file_offer(source, job, environment):
    """Return the Offer of file:PATH: a PEM file, or a folder with fullchain.pem or cert.pem."""
    del job, environment
    path = source.target
    names = ["fullchain.pem", "cert.pem", "chain.pem", "privkey.pem"] if os.path.isdir(path) else [
        ""]
    pieces = []
    for name in names:
        try:
            pieces.append(_read_source_file(os.path.join(path, name) if name else path))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Failure("unreachable", "%s: %s" % (
                source.text, os.strerror(error.errno or 0).lower()), "is the medium in place?")
    if not pieces:
        raise Failure("unreachable", "%s: there is no such file, or nothing in it" % source.text,
                      "is the medium mounted?")
    return _leaf_first(_offer_of(source, b"\n".join(pieces)))


def _read_source_file(path):
    """Return the bytes of a regular file, at most one more than an offer may have."""
    if os.path.islink(path) and os.lstat(path).st_uid not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))  # only an administrator's own link
    descriptor = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return file.read(MAX_OFFER + 1)


def _exec_offer(source, job, environment):
    """Return the Offer that a shell command prints, if it ends with status 0 in time."""
    import subprocess
    process = subprocess.Popen(
        ["/bin/sh", "-c", source.target.encode("utf-8", "surrogateescape")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, start_new_session=True)
    try:
        output, errors = converse(process, {}, time.monotonic() + job.timeout, MAX_OFFER)
        status = process.wait(job.timeout)
    except (TimeoutError, subprocess.TimeoutExpired):
        kill_group(process)
        raise Failure("timeout", "%s did not end in %g s" % (source.text, job.timeout),
                      "run it by hand, or --timeout SECONDS")
    except ValueError:
        raise Failure("malformed", "%s prints more than 1 MiB" % source.text, "run it by hand")
    if status != 0:
        last = errors.decode("ascii", "replace").strip().split("\n")[-1]
        raise Failure("unreachable", "%s ended with status %d%s" % (
            source.text, status, last and " (%s)" % plain(last, 120)), "run it by hand")
    if not output.strip():
        raise Failure("unreachable", "%s printed nothing" % source.text, "run it by hand")
    return _leaf_first(_offer_of(source, output))


def in_own_process(function, seconds, unprivileged=True):
    """Return the bytes that function() returns in a process of its own; Failure as it raised."""
    def serve(_, answers):
        try:
            data = b"+" + function()
        except Failure as failure:
            data = "\t".join(("-" + str(failure.reason), plain(failure), failure.hint)).encode()
        except Exception as error:
            data = b"-unreachable\t%s\t" % plain(error, 200).encode()
        while data:
            data = data[os.write(answers, data):]

    pid, to_write, to_read = own_process(serve, unprivileged)
    os.close(to_write)
    deadline, data = time.monotonic() + seconds, b""
    try:
        while True:
            ready, _, _ = select.select([to_read], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(to_read, 65536) if ready else b""
            data += piece
            if not piece or len(data) > 4 * MAX_OFFER:
                break
    finally:
        os.close(to_read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not ready:
        raise Failure("timeout", "gave no answer in %g s" % seconds, "--timeout SECONDS")
    if data[:1] == b"+":
        return data[1:]
    reason, message, hint = (data[1:].decode("ascii", "replace").split("\t") + ["", ""])[:3]
    if data[:1] != b"-":
        reason, message = "unreachable", "its process died: %s" % plain(data[:100].decode("latin-1"))
    raise Failure(reason, message, hint)


def _credential(environment, name):
    """Return a credential from the environment, or from the file that NAME_FILE names, or ""."""
    if environment.get(name):
        return environment[name].strip()
    path = environment.get(name + "_FILE")
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_KEY).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise Failure("unreachable", "%s_FILE %s: %s" % (name, path, (
            os.strerror(error.errno).lower() if getattr(error, "errno", None) else "not text")),
            "correct it in certferry/environment")


def _https(host, port, method, path, headers, roots, deadline, body=None, redirects=1, secure=True):
    """Return (status, body) of one request, its redirect followed once to the same host."""
    try:
        import http.client
    except ImportError:
        raise Failure("unreachable", "this Python has no http.client", "install python3, not only "
                      "python3-minimal, for vault: and azure:")
    import ssl
    if secure:
        context = ssl.create_default_context(cafile=roots)
        left = max(0.01, deadline - time.monotonic())
        connection = http.client.HTTPSConnection(host, port, timeout=left, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=deadline - time.monotonic())
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(4 * MAX_OFFER)
    except ssl.SSLError as error:
        raise Failure("unreachable", "its TLS certificate is not accepted (%s)" % plain(
            getattr(error, "verify_message", "") or error.reason, 120), "VAULT_CACERT for a "
            "private authority")
    except (OSError, http.client.HTTPException) as error:
        late = "timed out" in str(error)
        raise Failure("timeout" if late else "unreachable", "gives no answer (%s)" % plain(
            error, 120), "is it running, and reachable from here?")
    finally:
        connection.close()
    if response.status in (301, 302, 303, 307, 308):
        target = response.getheader("Location", "")
        match = re.match(r"https://([^/?#@]+)(/[^#]*)\Z", target)
        if not (match and redirects and secure):
            raise Failure("unreachable", "redirects to %s" % plain(target, 120), "name that "
                          "address as the source, if it is yours")
        try:
            new_host, new_port = parse_endpoint(match.group(1), 443)
        except ValueError as error:
            raise Failure("unreachable", "redirects to nowhere (%s)" % error)
        if new_host != host:  # what is secret is told only to the host that was named
            headers = {key: value for key, value in headers.items() if key not in (
                "X-Vault-Token", "Authorization")}
        return _https(new_host, new_port, method, match.group(2), headers, roots, deadline, body, 0)
    return response.status, data


def _json_of(status, data, what):
    """Return the document in a store's answer; Failure for what is no good answer, in words."""
    try:
        import json
    except ImportError:
        raise Failure("unreachable", "this Python has no json", "install python3, not only "
                      "python3-minimal, for vault: and azure:")
    words = {400: "refuses the request", 401: "refuses the credentials",
             403: "forbids reading it", 404: "has no such secret, or it is deleted",
             429: "is asked too often", 473: "is a standby", 503: "is sealed or in maintenance"}
    if status != 200:
        raise Failure("unreachable", "%s (status %d)" % (words.get(status, what), status),
                      {403: "check the policy and the token's age", 404: "check the path",
                       503: "unseal it"}.get(status, "check the store and the credentials"))
    try:
        document = json.loads(data.decode("utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no object")
        return document
    except (ValueError, RecursionError):
        raise Failure("malformed", "answers with something that is no JSON object",
                      "is it the right address?")


def _vault_token(ask, environment):
    """Return a token: as it is given, or by an AppRole login."""
    token = _credential(environment, "VAULT_TOKEN")
    if token:
        return token
    role = _credential(environment, "VAULT_ROLE_ID")
    if not role:
        raise Failure("unreachable", "needs a credential", "VAULT_TOKEN_FILE=... or VAULT_ROLE_ID "
                      "and VAULT_SECRET_ID_FILE in certferry/environment")
    import json
    login = json.dumps({"role_id": role, "secret_id": _credential(environment, "VAULT_SECRET_ID")})
    document = ask("POST", "/v1/auth/approle/login", {}, login.encode("utf-8"))
    token = (document.get("auth") or {}).get("client_token")
    if not token:
        raise Failure("unreachable", "gave no token for the role", "check the role")
    return token


def _pem_fields(fields):
    """Return the PEM text of a secret's fields, whichever of the usual names they have."""
    pieces = []
    for name in ("fullchain", "certificate", "cert", "chain", "ca_chain", "private_key", "privkey",
                 "key"):
        value = fields.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "-----BEGIN " in text:
                pieces.append(text.replace("\\n", "\n"))
    return "\n".join(pieces).encode("utf-8", "replace")


def _vault_secret(source, environment, deadline):
    """Return the PEM bytes of a KV secret, version 2, or 1 where the mount is (Vault's HTTP API)."""
    def ask(method, path, headers, body=None, also=()):
        if environment.get("VAULT_NAMESPACE"):
            headers = dict(headers, **{"X-Vault-Namespace": environment["VAULT_NAMESPACE"]})
        status, data = _https(source.host, source.port, method, path, headers,
                              environment.get("VAULT_CACERT") or None, deadline, body)
        return None if status in also else _json_of(status, data, "does not give it")

    headers = {"X-Vault-Token": _vault_token(ask, environment)}
    mount, _, path = source.target.partition("/")
    version = 2
    info = ask("GET", "/v1/sys/internal/ui/mounts/" + source.target, headers, None, (403, 404))
    if info:
        mounted = info.get("data") or {}
        real = str(mounted.get("path") or "").strip("/")
        if real and source.target.startswith(real + "/"):
            mount, path = real, source.target[len(real) + 1:]
        version = 1 if (mounted.get("options") or {}).get("version") != "2" else 2
    document = ask("GET", "/v1/%s/data/%s" % (mount, path) if version == 2 else
                   "/v1/%s/%s" % (mount, path), headers)
    fields = document.get("data") or {}
    if version == 2:
        fields = fields.get("data") or {}
    pem = _pem_fields(fields)
    if not pem:
        raise Failure("malformed", "holds no PEM in a field that is known", "fields: certificate, "
                      "chain or fullchain, and private_key")
    return pem


def _azure_token(environment, resource, deadline):
    """Return an access token: by client credentials, or from the managed identity's endpoint."""
    client = environment.get("AZURE_CLIENT_ID", "")
    secret = _credential(environment, "AZURE_CLIENT_SECRET")
    from urllib.parse import quote, urlsplit
    if secret:
        authority = urlsplit(environment.get("AZURE_AUTHORITY_HOST")
                             or "https://login.microsoftonline.com")
        body = "grant_type=client_credentials&client_id=%s&client_secret=%s&scope=%s" % (
            quote(client, ""), quote(secret, ""), quote(resource + "/.default", ""))
        status, data = _https(
            authority.hostname, authority.port or 443, "POST", "/%s/oauth2/v2.0/token" % quote(
                environment.get("AZURE_TENANT_ID", ""), ""),
            {"Content-Type": "application/x-www-form-urlencoded"},
            environment.get("SSL_CERT_FILE"), deadline, body.encode("ascii"))
    else:
        path = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + quote(
            resource, "")
        path += "&client_id=" + quote(client, "") if client else ""
        endpoint = urlsplit(environment.get("AZURE_POD_IDENTITY_AUTHORITY_HOST")
                            or "http://169.254.169.254")
        status, data = _https(endpoint.hostname, endpoint.port or 80, "GET", path,
                              {"Metadata": "true"}, None, deadline, secure=False)
    token = _json_of(status, data, "gives no token").get("access_token")
    if not isinstance(token, str):
        raise Failure("unreachable", "gives no token", "check AZURE_TENANT_ID and AZURE_CLIENT_ID")
    return token


def _azure_secret(source, environment, deadline):
    """Return the bytes of a Key Vault secret: PEM, or the DER of a PKCS#12 container."""
    suffix = source.host.partition(".")[2]
    token = _azure_token(environment, "https://" + suffix, deadline)
    status, data = _https(source.host, source.port, "GET", "/secrets/%s?api-version=7.4"
                          % source.target, {"Authorization": "Bearer " + token},
                          environment.get("SSL_CERT_FILE"), deadline)
    document = _json_of(status, data, "does not give it")
    value = document.get("value")
    if not isinstance(value, str):
        raise Failure("malformed", "holds no value", "is it a certificate?")
    if "pkcs12" in str(document.get("contentType")):
        return b"P" + binascii.a2b_base64(value.encode("ascii", "replace"))
    return b"." + value.replace("\\n", "\n").encode("utf-8", "replace")


def _vault_offer(source, job, environment):
    """Return the Offer of a Vault or OpenBao secret, fetched in a process of its own."""
    deadline = time.monotonic() + job.timeout
    try:
        data = in_own_process(lambda: _vault_secret(source, environment, deadline), job.timeout)
    except Failure as failure:
        raise Failure(failure.reason, "%s %s" % (source.text, failure), failure.hint)
    return _leaf_first(_offer_of(source, data))


def _azure_offer(source, job, environment):
    """Return the Offer of an Azure Key Vault secret, fetched in a process of its own."""
    deadline = time.monotonic() + job.timeout
    try:
        data = in_own_process(lambda: _azure_secret(source, environment, deadline), job.timeout)
        if data[:1] == b"P":
            try:
                data = b"." + open_pkcs12(data[1:])
            except ValueError as error:
                raise Failure("malformed", "holds %s" % error, "export it without a password")
    except Failure as failure:
        raise Failure(failure.reason, "%s %s" % (source.text, failure), failure.hint)
    return _leaf_first(_offer_of(source, data[1:]))


# The sources that are no handshake: (Source, Job, environment) in, an Offer out within the timeout.
FETCHERS = {"file": _file_offer, "exec": _exec_offer, "vault": _vault_offer,
            "azure": _azure_offer}


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------


def days_left(certificate, now):
    """Return the whole days until a certificate expires, negative afterwards."""
    return int((certificate.not_after - now) // DAY)


def describe_key(public_key):
    """Return the kind and fingerprint of a public key as messages show them."""
    return "%s sha256:%s" % (key_kind(public_key), fingerprint(public_key)[:16])


def _key_rule(offer, leaf, wanted, now, evidence):
    """The leaf is for a private key that is here, or that came with it, and that is not retired."""
    public, carried, source = evidence.public_key, evidence.carried_key, offer.source.text
    if carried is not None and carried != public:
        return Verdict("key-mismatch", "%s has a private key (%s) that does not fit its certificate"
                       " (%s)" % (source, describe_key(carried), describe_key(public)),
                       "put the matching pair there")
    if public in wanted.rolled_keys:
        return Verdict("rolled-back", "%s offers the certificate of %s, which was rolled back from"
                       % (source, iso_time(leaf.not_before)[:10]), "to take it all the same: "
                       "certferry renew %s --force" % wanted.name)
    if public in wanted.keys and fingerprint(public) in wanted.retired or (
            carried and fingerprint(public) in wanted.retired):
        return Verdict("key-mismatch", "%s has a certificate for a key that was retired here (%s)"
                       % (source, describe_key(public)), "certferry renew %s --force takes it back"
                       % wanted.name)
    if carried is not None or public in wanted.keys:
        return None
    issuer = attribute(leaf.issuer, "organization") or attribute(leaf.issuer, "common name")
    own = next(iter(wanted.keys), None)
    shown = "%s shows a certificate by %s" % (source, issuer or "an unnamed issuer")
    if not _covers_wanted(leaf, wanted):
        return Verdict("key-mismatch", "%s for %s, for another key" % (
            shown, " ".join(leaf.domains[:4]) or "no name"),
            "--sni HOST, a name under which the upstream serves this one")
    if wanted.current is None:
        return Verdict("key-mismatch", "%s for %s, for another key (%s, ours is %s)" % (
            shown, " ".join(leaf.domains[:4]), describe_key(public),
            describe_key(own) if own else "missing"), "a CDN or load balancer shows its own: name "
            "the origin with --from HOST[:PORT]; or bring its key with --key")
    return Verdict("key-mismatch", "%s has a certificate for another key (%s, ours is %s)" % (
        source, describe_key(public), describe_key(own) if own else "missing"),
        "on purpose: certferry %s --key NEW.pem; by accident: on the upstream, certbot renew "
        "--cert-name %s --reuse-key; the certificate here lasts %d more days" % (
            wanted.name, wanted.name, days_left(wanted.current.leaf, now)))


def _covers_wanted(leaf, wanted):
    """Say whether a leaf covers what is required: every -d, or without any NAME or *.NAME."""
    if wanted.domains:
        return all(covers(leaf.domains, domain) for domain in wanted.domains)
    return covers(leaf.domains, wanted.name) or "*." + wanted.name in leaf.domains


def _names_rule(offer, leaf, wanted, now, evidence):
    """The leaf covers every required name, by its subject alternative name alone."""
    del now, evidence
    if _covers_wanted(leaf, wanted):
        return None
    lacking = [d for d in wanted.domains or (wanted.name,) if not covers(leaf.domains, d)]
    has = "is for %s" % " ".join(leaf.domains[:6]) if leaf.domains else (
        "has no usable subject alternative name (the common name does not count)")
    return Verdict("names", "the certificate of %s %s, not for %s" % (
        offer.source.text, has, " ".join(lacking)), "--sni HOST, or -d DOMAIN if less is wanted")


def _validity_rule(offer, leaf, wanted, now, evidence):
    """The clock is inside the leaf's validity."""
    del evidence
    clock = "check the clock (it says %s)" % iso_time(now)
    if now > leaf.not_after:
        return Verdict("expired", "the certificate of %s expired on %s" % (
            offer.source.text, iso_time(leaf.not_after)), "renew it on the upstream, or " + clock)
    if now < leaf.not_before:
        return Verdict("not-yet-valid", "the certificate of %s is valid from %s on" % (
            offer.source.text, iso_time(leaf.not_before)), clock)
    return None


def _trust_rule(offer, leaf, wanted, now, evidence):
    """Leaf and chain, as they would be written, lead to a root, and browsers take them."""
    del leaf, wanted, now
    if not evidence.trust:
        return None
    message, _, hint = evidence.trust.partition(": ")
    return Verdict("untrusted", "the certificate of %s is not trusted: %s" % (
        offer.source.text, message), hint or "see to it on the upstream")


def _order_rule(offer, leaf, wanted, now, evidence):
    """The leaf is newer than the current one: a later notBefore, never a later notAfter."""
    del now, evidence
    current = wanted.current and wanted.current.leaf
    if not current or leaf.not_before > current.not_before or leaf.der == current.der:
        return None
    if leaf.not_before == current.not_before and fingerprint(leaf.der) not in wanted.replaced:
        return None
    where = " (%s)" % offer.address if offer.address else ""
    return Verdict("older", "%s%s offers the certificate of %s, older than the one here (%s)" % (
        offer.source.text, where, iso_time(leaf.not_before), iso_time(current.not_before)),
        "a stale member of a pool? --force takes it")


def _lost_rule(offer, leaf, wanted, now, evidence):
    """Without -d, no name of the current certificate is lost."""
    del now, evidence
    lost = [] if wanted.domains or not wanted.current else [
        name for name in wanted.current.leaf.domains if not covers(leaf.domains, name)]
    return lost and Verdict("names-lost", "the certificate of %s no longer covers %s" % (
        offer.source.text, " ".join(lost)), "if that is meant: --force, or -d for each name needed")


def _rolled_back_rule(offer, leaf, wanted, now, evidence):
    """The leaf is not one that an administrator rolled back from."""
    del now, evidence
    return fingerprint(leaf.der) in wanted.rolled_back and Verdict(
        "rolled-back", "%s still offers the certificate of %s, which was rolled back from" % (
            offer.source.text, iso_time(leaf.not_before)), "it stays out until there is a newer "
        "one, or certferry renew %s --force" % wanted.name)


_RULES = (_key_rule, _names_rule, _validity_rule, _trust_rule, _order_rule, _lost_rule,
          _rolled_back_rule)
_CURRENT_RULES = (_names_rule, _validity_rule)


def judge(evidence, leaf, wanted, now, same=False, force=False):
    """Return the Verdict on an offer: the first rule that it breaks, in the README's order.

    `same` asks of the current leaf only what may have changed about it: the names and the clock.
    """
    for rule in _CURRENT_RULES if same else _RULES[:-3] if force else _RULES:
        verdict = rule(evidence.offer, leaf, wanted, now, evidence)
        if verdict:
            return verdict
    return Verdict("", "", "")


def gravity(reason):
    """Return how grave a reason is, for several sources: a changed key most, a stale member least."""
    return {"key-mismatch": 3, "unreachable": 1, "timeout": 1, "older": 0}.get(reason, 2)


def is_due(leaf, now):
    """Say whether a renewal is due: a third of the lifetime is left, a half of a short one.

    certbot's rule: short is ten days or less.
    """
    share = 2 if leaf.lifetime <= 10 * DAY else 3
    return leaf.not_after - now <= leaf.lifetime / share


def threshold(share, lifetime):
    """Return the seconds of a threshold ("%" or "d", number) for a lifetime in seconds."""
    return share[1] * DAY if share[0] == "d" else lifetime * share[1] / 100


def last_good(lineage, now):
    """Return when a source was last heard to good effect, or None; a later time than now is none."""
    state = lineage.state
    good = lineage.checked if state.result in ("installed", "unchanged", "pending") or (
        state.result == "deferred" and state.reason == "rolled-back") else state.good
    return good if good is not None and good <= now else None


def is_silent(lineage, now):
    """Say whether there was no good exchange for a tenth of the lifetime, or ever."""
    leaf = lineage.current.leaf
    good = last_good(lineage, now)
    if lineage.options.when == "due":
        share = 2 if leaf.lifetime <= 10 * DAY else 3
        due = leaf.not_after - leaf.lifetime / share
        good = max(good or 0, min(due, now))
    return good is None or now - good > leaf.lifetime / 10


def health_of(lineage, now, misfit=False):
    """Return (ok, due, warning or critical; why) of what is in service."""
    if lineage.current is None:
        return "critical", "has no certificate"
    leaf, options, state = lineage.current.leaf, lineage.options, lineage.state
    left = leaf.not_after - now
    if misfit:
        return "critical", "has a private key that does not fit its certificate"
    if left <= 0:
        return "critical", "expired on %s" % iso_time(leaf.not_after)
    ends = "expires in %d days" % (left // DAY) if left >= 2 * DAY else (
        "expires in %d hours" % (left // 3600))
    if left <= threshold(options.critical, leaf.lifetime):
        return "critical", ends
    if left <= threshold(options.warn, leaf.lifetime):
        return "warning", ends
    if state.result == "pending":
        return "warning", "has something pending (%s)" % state.reason
    if is_silent(lineage, now):
        good = last_good(lineage, now)
        return "warning", "was not confirmed by its source since %s" % (
            iso_time(good) if good else "ever")
    return ("due" if is_due(leaf, now) else "ok"), ends


# --------------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------------


def check_folder(path):
    """Raise Failure where a folder, or the link to it, is another user's or open to others."""
    for info in (os.lstat(path), os.stat(path)):
        open_to_others = info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode)
        if info.st_uid not in (0, os.geteuid()) or open_to_others:
            raise Failure(None, "%s %s" % (path, "can be written by others" if open_to_others else (
                "belongs to uid %d" % info.st_uid)), "chown it to root, chmod go-w")


def read_file(path, limit, private=False):
    """Return the bytes of a regular file that root or the caller owns, following no link.

    `private` refuses one that others can write. Failure for a file that is somebody else's.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", 0) as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise Failure(None, "%s is no regular file" % path, "remove it")
        if info.st_uid not in (0, os.geteuid()):
            raise Failure(None, "%s belongs to uid %d" % (path, info.st_uid), "chown it to root")
        if private and info.st_mode & 0o022:
            raise Failure(None, "%s can be written by others" % path, "chmod go-w")
        if info.st_size > limit:
            raise Failure(None, "%s has more than %d bytes" % (path, limit), "is it the right one?")
        return file.read(limit + 1)


def real_path(place, path):
    """Return where a live file is, through an administrator's links that end in the config dir."""
    if not os.path.islink(path):
        return path
    real = os.path.realpath(path)
    if os.lstat(path).st_uid not in (0, os.geteuid()) or not real.startswith(
            os.path.realpath(place.config) + "/"):
        raise Failure(None, "%s is a link out of the config dir, or another user's" % path,
                      "put the file itself there")
    if os.path.exists(real):
        check_folder(os.path.dirname(real))
    return real


def _sync(path):
    """Make what a folder lists durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path, data, mode, like=None):
    """Make a new file of `data`, synced; `like` is a stat result whose owner and group it gets."""
    if os.path.lexists(path):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            _dress(file.fileno(), mode, like)
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(path)
        raise


def _dress(descriptor, mode, like=None):
    """Give a file its owner and group, then its mode: never wider in between."""
    info = os.fstat(descriptor)
    if like and (like.st_uid, like.st_gid) != (info.st_uid, info.st_gid):
        try:
            os.fchown(descriptor, like.st_uid, like.st_gid)
        except PermissionError:
            mode &= 0o700  # not root: the group's rights would go to another group
    os.fchmod(descriptor, mode)


def write_file(path, data, mode=0o600):
    """Replace a file in one rename by one that is complete and synced."""
    folder, name = os.path.split(path)
    temporary = "%s/.%s%s" % (folder, name, LITTER)
    _create(temporary, data, mode)
    os.rename(temporary, path)
    _sync(folder)


def make_folder(path, mode=None):
    """Make a folder with the mode of its parent, unless it is there; nobody else may write it."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    parent = os.path.dirname(path)
    os.chmod(path, mode or stat.S_IMODE(os.stat(parent).st_mode) & 0o2755)
    _sync(parent)


def _set_link(target, path):
    """Make `path` a link to `target` in one rename."""
    folder, name = os.path.split(path)
    temporary = "%s/.%s%s" % (folder, name.lstrip("."), LITTER)
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.rename(temporary, path)


def _copy_key(source, target, like):
    """Copy a key file to a new one with the owner, group, mode and ACL of the file `like`."""
    info = os.stat(like)
    _create(target, read_file(source, MAX_KEY), stat.S_IMODE(info.st_mode), info)
    try:
        os.setxattr(target, "system.posix_acl_access",
                    os.getxattr(like, "system.posix_acl_access"))
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
    make_folder(os.path.dirname(place.state), 0o700)
    write_file(place.state, format_state(state).encode("utf-8", "surrogateescape"))


def save_conf(place, given):
    """Write the remembered options to NAME.conf, touching only the lines that changed."""
    make_folder(os.path.dirname(place.conf), 0o700)
    try:
        text = read_file(place.conf, MAX_RECORD, True).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        text = ""
    edited = edit_conf(text, parse_conf(text, place.conf), given)
    if edited != text or not text:
        write_file(place.conf, edited.encode("utf-8", "surrogateescape"))


def version_numbers(place):
    """Return the numbers of the versions that there are, the newest first."""
    pattern = re.compile(re.escape(place.name) + r"@([1-9]\d{0,8})\Z")
    try:
        names = os.listdir(place.archive)
    except FileNotFoundError:
        return []
    return sorted((int(m.group(1)) for m in map(pattern.match, names) if m), reverse=True)


def load_version(place, number):
    """Return a Version from the archive, or None where its certificates are missing or damaged."""
    folder = place.version(number)
    try:
        data = read_file(folder + "/fullchain.pem", MAX_OFFER)
        leaf, *chain = read_pem(data)[0]
        return Version(number, folder, parse_certificate(leaf), tuple(chain))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def find_current(place):
    """Return the Version in service: through .current, else loose files in live/NAME, or None."""
    try:
        target = os.readlink(place.pointer)
    except OSError:
        return _find_loose(place)
    match = re.match(r".*/%s@([1-9]\d{0,8})\Z" % re.escape(place.name), target)
    if not match or target != "../../archive/" + target.rsplit("/", 1)[1] and os.path.realpath(
            place.pointer) != os.path.realpath(place.version(int(match.group(1)))):
        raise Failure(None, "%s points to %s, which is no version" % (place.pointer, target),
                      "remove it")
    return load_version(place, int(match.group(1)))


def _find_loose(place):
    """Return the plain files or certbot's links in live/NAME as a Version without a number."""
    for names in (("fullchain.pem",), ("cert.pem", "chain.pem")):
        try:
            data = b"".join(read_file(real_path(place, "%s/%s" % (place.live, name)), MAX_OFFER)
                            for name in names
                            if name != "chain.pem" or os.path.exists(place.live + "/chain.pem"))
            leaf, *chain = read_pem(data)[0]
            return Version(None, place.live, parse_certificate(leaf), tuple(chain))
        except FileNotFoundError:
            continue
        except ValueError:
            return None
    return None


def find_key(place, current):
    """Return the path of the lineage's private key, or None where there is none."""
    path = (current.folder if current and current.number else place.live) + "/privkey.pem"
    try:
        path = real_path(place, path)
        return path if stat.S_ISREG(os.lstat(path).st_mode) else None
    except FileNotFoundError:
        return None


def key_stamp(path):
    """Return what changes when a key file does: inode, size, times."""
    info = os.stat(path)
    return "%d:%d:%d" % (info.st_ino, info.st_size, info.st_mtime_ns)


def staged_keys(place):
    """Return the paths of the staged keys, sorted."""
    try:
        names = os.listdir(place.live)
    except FileNotFoundError:
        return []
    return [place.live + "/" + name for name in sorted(names)
            if re.match(r"privkey-.+\.pem\Z", name)]


def stage_key(place, pem, public_key, first):
    """Put a private key (PEM bytes) into live/NAME: as its key if it is the first, else staged."""
    for folder in (place.config, place.config + "/live", place.live):
        make_folder(folder)
        check_folder(folder)
    name = "privkey.pem" if first else "privkey-%s.pem" % fingerprint(public_key)[:16]
    write_file("%s/%s" % (place.live, name), pem)
    return "%s/%s" % (place.live, name)


def _stage_version(place, number, before, members, key, link):
    """Make the hidden folder of a version, complete and synced; return its path.

    `members` are the three certificate files, `key` a path or a Secret, `before` the version or
    folder whose owner and mode the folder gets, `link` adopts the key's own file where it can.
    """
    folder = "%s/.%s@%d%s" % (place.archive, place.name, number, LITTER)
    _remove_tree(folder)
    os.mkdir(folder, 0o700)
    for name, data in zip(MEMBERS, members):
        _create("%s/%s" % (folder, name), data, 0o644)
    target, old = folder + "/privkey.pem", find_key(place, before)
    if isinstance(key, Secret):
        _create(target, key.pem, 0o600)
        if old:
            _copy_key(target, folder + "/.privkey.pem" + LITTER, old)
            os.rename(folder + "/.privkey.pem" + LITTER, target)
    else:
        if link and _label(key) == _label(place.archive):
            try:
                os.link(key, target, follow_symlinks=False)
            except OSError:
                link = False  # another file system, or one that has no links
        if not os.path.exists(target):
            _copy_key(key, target, old if old and not link else key)
    info = os.stat(before.folder if before and before.number else place.archive)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _dress(descriptor, stat.S_IMODE(info.st_mode) & 0o2755,
               info if before and before.number else None)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return folder


def _remove_tree(folder):
    """Remove a version's folder; nothing where there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        os.unlink("%s/%s" % (folder, name))
    os.rmdir(folder)


def _rehearse(folder, leaf):
    """Load a staged version as a server does and shake hands with it in memory; Failure if not.

    What nginx would find out at its reload is found out before; a key file whose public half lies
    too. It costs a few milliseconds in a process of its own.
    """
    def shake():
        import ssl
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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
            shown = ends[0].getpeercert(binary_form=True)
        except (ssl.SSLError, ValueError) as error:
            raise Failure("rehearsal", "key and certificate do not work together in a handshake "
                          "(%s)" % plain(getattr(error, "reason", None) or error, 80),
                          "is the key file damaged? bring the upstream's again with --key")
        if shown != leaf:
            raise Failure("rehearsal", "a server would show another certificate", "report this")
        return b"shaken"
    in_own_process(shake, OPENSSL_SECONDS, unprivileged=False)


def _point(place, number):
    """Make a version the current one: the one instant of change; then whatever is no link yet.

    1. names that are missing become links to .current/NAME.pem, dangling if need be
    2. .current is replaced in one rename
    3. plain files and other links, of the same content by now, are replaced by links
    4. the links' own times are touched: inotify on a path through a link sees nothing otherwise
    """
    for name in MEMBERS:
        if not os.path.lexists("%s/%s" % (place.live, name)):
            _set_link(".current/" + name, "%s/%s" % (place.live, name))
    archive = os.path.relpath(os.path.realpath(place.archive), os.path.realpath(place.live))
    _set_link("%s/%s@%d" % (archive, place.name, number), place.pointer)
    _sync(place.live)
    for name in MEMBERS:
        path = "%s/%s" % (place.live, name)
        if not os.path.islink(path) or os.readlink(path) != ".current/" + name:
            _set_link(".current/" + name, path)
        os.utime(path, follow_symlinks=False)
    _sync(place.live)


def install_version(lineage, leaf, chain, key, state, members=None, link=False):
    """Make a new version of leaf, chain (DER) and key, and make it current; return it.

    `state` is recorded before the rename, with the hooks that it owes, so that a run that dies in
    between has them run by the next one. `members` and `link` adopt what is there as it is. Steps:
    1 stage, 2 rehearse, 3 record, 4 give it its name, 5 point at it.
    """
    place = lineage.place
    for folder in (place.archive, place.live):
        make_folder(folder)
        check_folder(folder)
    number = max(version_numbers(place) + [0]) + 1
    pems = members or (to_pem([leaf.der]), to_pem(chain), to_pem((leaf.der,) + chain))
    staged = _stage_version(place, number, lineage.current, pems, key, link)
    if not members:
        _rehearse(staged, leaf.der)
    try:
        save_state(place, state._replace(owed_version=number))
    except OSError:
        pass  # said when the run ends; a record that cannot be written does not stop a deployment
    os.rename(staged, place.version(number))
    _sync(place.archive)
    _point(place, number)
    return Version(number, place.version(number), leaf, tuple(chain))


def adopt(lineage):
    """Return the lineage with loose files as a version: identical, then links, then one rename.

    As it was where there is nothing to adopt, or the key does not fit.
    """
    place, current = lineage.place, lineage.current
    if current is None or current.number is not None or lineage.key is None:
        return lineage
    full = to_pem((current.leaf.der,) + current.chain)
    members = []
    for name, made in zip(MEMBERS, (to_pem([current.leaf.der]), to_pem(current.chain), full)):
        path = "%s/%s" % (place.live, name)
        data = read_file(real_path(place, path), MAX_OFFER) if os.path.exists(path) else made
        if not holds_only_certificates(data):
            raise Failure(None, "%s holds more than certificates" % path, "take the rest out of it")
        members.append(data)
    note = [] if os.path.islink(place.live + "/fullchain.pem") else [
        "%s/ holds links now: containers need live and archive both mounted" % place.live]
    version = install_version(lineage, current.leaf, current.chain, lineage.key, lineage.state,
                              members, link=True)
    return lineage._replace(current=version, key=version.folder + "/privkey.pem",
                            notices=lineage.notices + note)


def prune(place, current):
    """Remove versions: kept are the current one, the five newest, at most two keys among them.

    Of the key that is not the current one only the newest version stays.
    """
    kept_other = False
    for position, number in enumerate(version_numbers(place)):
        if number == current.number:
            continue
        version = load_version(place, number)
        other = version is None or version.leaf.public_key != current.leaf.public_key
        if position >= KEPT_VERSIONS or version is None or other and kept_other:
            _remove_tree(place.version(number))
        kept_other = kept_other or other
    _sync(place.archive)


def rollback_target(lineage):
    """Return the newest Version before the current one that was not itself rolled back from."""
    current = lineage.current
    for number in version_numbers(lineage.place):
        version = load_version(lineage.place, number) if current and current.number and (
            number < current.number) else None
        if version and version.leaf.der != current.leaf.der and fingerprint(
                version.leaf.der) not in lineage.state.rolled_back:
            return version
    return None


def point_back(lineage, version, state):
    """Make an older version current again, its hooks recorded as owed before."""
    save_state(lineage.place, state._replace(owed_version=version.number))
    _point(lineage.place, version.number)


def recover(place, state, current):
    """Remove what an interrupted run left; return lines that say so."""
    done = []
    for folder, pattern in ((place.live, r"\..+"), (os.path.dirname(place.state), r"\.%s\.\w+"),
                            (place.archive, r"\.%s@\d+")):
        pattern = re.compile((pattern.replace("%s", re.escape(place.name))) + re.escape(LITTER)
                             + r"\Z")
        for name in filter(pattern.match, os.listdir(folder) if os.path.isdir(folder) else ()):
            path = "%s/%s" % (folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                _remove_tree(path)
            else:
                os.unlink(path)
            done.append(path)
    number = state.owed_version
    if number and number > (current.number or 0 if current else 0) and os.path.isdir(
            place.version(number)):
        _remove_tree(place.version(number))
        done.append(place.version(number))
    return ["removed what an interrupted run left: " + " ".join(done)] if done else []


def mend_links(place, current):
    """Make live links whole beside a .current; return (lines that say so, a key put there or None).

    A plain file of the same content becomes a link again; a private key of another content is
    returned, to be staged, and the current one is kept.
    """
    lines, key = [], None
    for name in MEMBERS:
        path, kept = "%s/%s" % (place.live, name), "%s/%s" % (current.folder, name)
        link = os.readlink(path) if os.path.islink(path) else None
        if link == ".current/" + name:
            continue
        if os.path.lexists(path):
            try:
                data = read_file(real_path(place, path), MAX_OFFER)
            except FileNotFoundError:
                data = None
            if data is not None and data != read_file(kept, MAX_OFFER):
                if name != "privkey.pem":
                    continue  # somebody's own certificate: the next deploy replaces it
                key = data
        _set_link(".current/" + name, path)
        lines.append("made %s a link to the current version again" % path)
    if lines:
        _sync(place.live)
    return lines, Secret(key) if key else None


def restore_key(lineage):
    """Put back the key of the current version from an older one that fits; say whether one did."""
    place, current = lineage.place, lineage.current
    for number in version_numbers(place):
        path = place.version(number) + "/privkey.pem"
        version = load_version(place, number) if number != current.number else None
        if version is None or version.leaf.public_key != current.leaf.public_key:
            continue
        try:
            if public_half(read_file(path, MAX_KEY), True) != current.leaf.public_key:
                continue
        except (OSError, ValueError):
            continue
        temporary = "%s/.privkey.pem%s" % (current.folder, LITTER)
        _copy_key(path, temporary, path)
        os.rename(temporary, current.folder + "/privkey.pem")
        _sync(current.folder)
        return True
    return False


def lock(config):
    """Hold the config dir for this run; Failure where another process holds it for a minute.

    The lock is on the folder itself and ends with the process: nothing is left behind.
    """
    import fcntl
    descriptor = os.open(config, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    holder = "another process"
    try:
        with open("/proc/locks") as file:
            for line in file:
                parts = line.split()
                if len(parts) > 5 and parts[1] == "FLOCK" and parts[5].endswith(
                        ":%d" % os.fstat(descriptor).st_ino):
                    holder = "process %s" % parts[4]
    except OSError:
        pass
    os.close(descriptor)
    raise Failure(None, "%s holds %s for over %d s" % (holder, config, LOCK_SECONDS),
                  "wait for it, or look at what it does")


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------


def hook_files(config, kind):
    """Return the hooks in renewal-hooks/KIND as certbot would run them: executable, sorted."""
    folder = "%s/renewal-hooks/%s" % (config, kind)
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [folder + "/" + name for name in names if not name.endswith("~")]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def deploy_hooks(config, options):
    """Return what a deploy runs: the directory's files, then the lineage's own, each once."""
    hooks = hook_files(config, "deploy")
    return hooks + [hook for hook in options.deploy_hooks if hook not in hooks]


def _refused(path):
    """Return why a hook file must not be run by this user, or ""."""
    for each in (os.path.dirname(path), path, os.path.realpath(path)):
        info = os.lstat(each)
        if info.st_uid not in (0, os.geteuid()):
            return "%s belongs to uid %d: chown it to root" % (each, info.st_uid)
        if info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode):
            return "%s can be written by others: chmod go-w" % each
    return ""


def run_hook(hook, config, environment, variables, pass_on):
    """Run a hook and return ("" or what went wrong, seconds it took).

    A path inside renewal-hooks is run as a program, anything else by a shell. Its output goes to
    pass_on(bytes) as it comes. The hook is over when its own process ends: what it started in the
    background may live on.
    """
    import subprocess
    inside = hook.startswith(config + "/renewal-hooks/")
    refused = _refused(hook) if inside else ""
    if refused:
        return refused, 0.0
    environment = {key: value for key, value in environment.items() if key not in CREDENTIALS}
    environment.update(variables)
    environment["PATH"] = ":".join(filter(None, (environment.get("PATH"), SAFE_PATH)))
    command = hook.encode("utf-8", "surrogateescape")
    started, last = time.monotonic(), b""
    for arguments in ([command], ["/bin/sh", command]) if inside else (["/bin/sh", "-c", command],):
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd="/",
                stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            break
        except OSError as error:
            if error.errno != errno.ENOEXEC or len(arguments) > 1:  # a script without #! is sh's
                return os.strerror(error.errno).lower(), 0.0
    with process.stdout as output:
        ended = False
        while not ended:
            ended = process.poll() is not None
            if time.monotonic() - started > HOOK_SECONDS:
                kill_group(process)
                return "did not end in %d s" % HOOK_SECONDS, time.monotonic() - started
            while select.select([output], [], [], 0 if ended else 0.05)[0]:
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    process.wait(max(0.1, HOOK_SECONDS + started - time.monotonic()))
                    ended = True
                    break
                pass_on(piece)
                last = (last + piece)[-400:]
    seconds = time.monotonic() - started
    if process.returncode == 0:
        return "", seconds
    words = last.decode("utf-8", "replace").strip().split("\n")[-1]
    return "status %d%s" % (process.returncode, words and ", " + plain(words, 120)), seconds


def hook_variables(place, domains):
    """Return the environment of a deploy hook, as certbot sets it."""
    return {"RENEWED_LINEAGE": place.live, "RENEWED_DOMAINS": " ".join(domains)}


def alert_wanted(state, health, now):
    """Say whether the alert hooks have to run: at a turn to, within or from bad health, and daily."""
    bad = ("warning", "critical", "unknown")
    if health in bad:
        return state.told != health or state.told_at is None or not 0 <= now - state.told_at < DAY
    return state.told in bad


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

_PRIORITIES = {"problem": "<3>", "warning": "<4>", "detail": "<7>"}
HEALTHS = ("ok", "due", "warning", "critical", "unknown")


class Reporter:
    """What a run says: results on standard output, problems on standard error, or one JSON."""

    def __init__(self, quiet=False, verbose=False, as_json=False):
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self.progress = False
        try:
            info = os.fstat(2)
            journal = os.environ.get("JOURNAL_STREAM") == "%d:%d" % (info.st_dev, info.st_ino)
        except OSError:
            journal = False
        self.priorities = _PRIORITIES if journal else {}

    def _write(self, stream, line):
        """Write one line; a reader that has gone away is no reason to stop ferrying."""
        try:
            self.clear()
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass

    def line(self, text):
        """Write a line of results."""
        if not (self.quiet or self.as_json):
            self._write(sys.stdout, text)

    def problem(self, name, message, hint="", kind="problem"):
        """Write the line of a problem or a warning: what is wrong, what to do about it."""
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
        """Pass a hook's output on."""
        stream = sys.stderr if self.as_json else sys.stdout
        try:
            stream.flush()
            os.write(stream.fileno(), data)
        except (OSError, ValueError, AttributeError):
            pass

    def outcome(self, outcome):
        """Write the result of one lineage, or its problem; warnings are a problem that can wait."""
        name, result = outcome.name, outcome.result
        if result in ("installed", "unchanged", "not-due", "pending", "deferred"):
            self.line("%s: %s: %s" % (name, result, describe(outcome)))
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


def describe(outcome):
    """Return what a result line says after the result: names, end of validity, source."""
    if outcome.version is None:
        return plain(outcome.message or outcome.reason or "")
    leaf = outcome.version.leaf
    text = "%s, valid until %s (%s)" % (
        " ".join(leaf.domains[:8]), iso_time(leaf.not_after)[:10], outcome.why)
    if outcome.result == "deferred":
        text += ", " + outcome.reason
    return text + (", from " + outcome.source if outcome.source else "")


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
    ("upstream_not_after_timestamp_seconds", "When the certificate that was offered last expires.",
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
    return text


def status_lines(pairs, now):
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
    lines = ["CERTFERRY %s - %s%s" % (word, plain(said, 600), data and " | " + " ".join(data) or "")]
    rows = [("NAME", "HEALTH", "DAYS LEFT", "SOURCE", "LAST CHECKED", "LAST SUCCESS", "PENDING")]
    rows += [_status_row(lineage, outcome, now) for lineage, outcome in pairs]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows if pairs else ():
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths + [0])).rstrip())
    return lines


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


# --------------------------------------------------------------------------------------------------
# Ferry
# --------------------------------------------------------------------------------------------------

# What holds for every lineage of a run; `command` is crossing (certferry NAME), renew or rollback,
# `now` the clock, read once; `asked` are keys of options that this command gave.
Run = collections.namedtuple("Run", (
    "config environment now command dry_run force network report asked"))

# What a crossing has decided to deploy, or that there is nothing new (`same`).
Decision = collections.namedtuple("Decision", "offer leaf chain key same")

_SOUND = ("installed", "unchanged", "pending")


def _certbots(place):
    """Say whether a lineage is certbot's: its conf is not empty, its links avoid .current."""
    try:
        if os.stat("%s/renewal/%s.conf" % place).st_size == 0:
            return False
    except OSError:
        return False
    paths = ["%s/%s" % (place.live, name) for name in MEMBERS]
    return not os.path.lexists(place.pointer) or any(
        os.path.islink(path) and not os.readlink(path).startswith(".current/") for path in paths)


def _stray_conf(place):
    """Return a warning about a conf of certbot's beside a lineage of certferry's, or ""."""
    name = "renewal/%s.conf" % place.name
    try:
        size = os.stat("%s/%s" % (place.config, name)).st_size
    except OSError:
        return ""
    if size == 0:
        return ("%s is empty, left by a certbot run that failed: remove it, 'certbot renew' fails "
                "over it" % name)
    return "%s is certbot's, and this lineage is certferry's: move it away" % name


def load_lineage(place):
    """Return the Lineage that the files in the config dir make; Failure where they cannot be used.

    A damaged state is a notice and counts as none: what it held is found out again.
    """
    notices = []
    for folder in (place.config + "/live", place.live, os.path.dirname(place.conf), place.archive):
        if os.path.lexists(folder):
            check_folder(folder)
    try:
        text = read_file(place.conf, MAX_RECORD, True).decode("utf-8", "surrogateescape")
        given = parse_conf(text, place.conf)
    except FileNotFoundError:
        given = None
    state, checked = NO_STATE, None
    try:
        text = read_file(place.state, MAX_RECORD, True).decode("utf-8", "surrogateescape")
        checked = int(os.stat(place.state).st_mtime)
        state = parse_state(text, place.state)
    except FileNotFoundError:
        pass
    except Failure as failure:
        notices.append("%s: what it held is found out again" % failure)
    current = find_current(place)
    return Lineage(place, given, parse_options(given or {}), state, checked, current,
                   find_key(place, current), tuple(notices))


def discover(config):
    """Return ([Place] that `renew` takes, [(name, notice)]) of what is in the config dir."""
    places, notices, names = [], [], set()
    try:
        names.update(os.listdir(config + "/live"))
    except FileNotFoundError:
        pass
    try:
        records = os.listdir(config + "/certferry")
    except FileNotFoundError:
        records = []
    confs = {name[:-5] for name in records if name.endswith(".conf") and name[0] != "."}
    for name in sorted(names | confs):
        place = Place(config, name)
        here = os.path.isdir(place.live)
        if name not in confs and not here:
            continue  # certbot's README, mostly
        try:
            if host_name(name) != name:
                raise ValueError
        except ValueError:
            notices.append((plain(name, 80), "is no host name: skipped"))
            continue
        if here and os.stat(place.live).st_uid not in (0, os.geteuid()):
            notices.append((name, "%s belongs to another user: skipped" % place.live))
        elif name in confs or os.path.lexists(place.pointer):
            places.append(place)
        elif os.path.exists(place.live + "/privkey.pem") and not _certbots(place):
            others = [file for file in os.listdir(place.live) if file.endswith((
                ".pem", ".crt", ".cer")) and not file.startswith("privkey")]
            if others:
                notices.append((name, "%s holds certificates of another tool: left alone until "
                                "certferry %s adopts them" % (place.live, name)))
            else:
                places.append(place)
    return places, notices


class Crossing:
    """One lineage's way from its options to a Decision; it remembers what was asked already."""

    def __init__(self, run, lineage, added=None):
        self.run, self.lineage, self.added = run, lineage, added
        self.keys, self.roots, self.number, self.misfit = None, None, None, False
        self.served = []
        options = lineage.options
        self.sources = options.sources or (parse_source(
            endpoint_text(lineage.place.name, 443)),)
        name = lineage.place.name
        named = [domain for domain in options.domains if not domain.startswith("*.")]
        self.sni = options.sni or (named or [name])[0]

    def say(self, text):
        """Tell what only --verbose shows."""
        self.run.report.detail(self.lineage.place.name, text)

    def job(self, source, want="", way="", skip=()):
        """Return the Job that asks a source for this lineage's certificate."""
        current = self.lineage.current
        return Job(source.kind, source.host, source.port, self.sni, self.lineage.options.timeout,
                   checksum(current.leaf.der) if current else "", want, way,
                   "" if self.lineage.options.sources else "own", ",".join(skip))

    def begin(self):
        """Have the network process ask the first source, and look at what is served, by now."""
        want, _, way = self.lineage.state.way.partition(" ")
        if not self.sources[0].may_hold_key:
            self.number = self.run.network.submit(self.job(self.sources[0], want, way))
        if self.run.command == "renew":
            self.look()

    def look(self):
        """Ask the network process what the local services present."""
        want, _, way = self.lineage.state.way.partition(" ")
        self.served = [(source, self.run.network.submit(self.job(source, want, way)._replace(
            own=""))) for source in self.lineage.options.served_at]

    def not_served(self, leaf):
        """Return what is wrong with the local services that look() asked, one line each."""
        wrong = []
        for source, number in self.served:
            answer = self.run.network.answer(number)
            try:
                offer = tls_offer(source, answer)
                if offer.leaf == leaf.der:
                    continue
                other = parse_certificate(offer.leaf)
                wrong.append("%s still serves the certificate of %s (serial %s)" % (
                    source.text, iso_time(other.not_before)[:10], other.serial[:20]))
            except (Failure, ValueError) as error:
                wrong.append(plain(error))
        self.served = []
        return wrong

    def own_keys(self):
        """Return {public key: path, or a Secret that is not on disk} of the keys an offer may fit."""
        if self.keys is None:
            self.keys = collections.OrderedDict()
            paths = [self.lineage.key] if self.lineage.key else []
            for path in paths + staged_keys(self.lineage.place):
                try:
                    public = public_half(read_file(path, MAX_KEY), True)
                    self.keys.setdefault(public, path)
                except (ValueError, OSError) as error:
                    self.run.report.problem(self.lineage.place.name, "%s %s" % (path, error),
                                            "remove it, or bring it again with --key", "warning")
            if self.added:
                self.keys.setdefault(*self.added)
        return self.keys

    def wanted(self):
        """Return what the judge compares an offer with."""
        lineage, place, force = self.lineage, self.lineage.place, self.run.force
        replaced, rolled = set(), {}
        for number in version_numbers(place):
            version = load_version(place, number)
            if version and lineage.current and version.leaf.der != lineage.current.leaf.der:
                mark = fingerprint(version.leaf.der)
                replaced.add(mark)
                if mark in lineage.state.rolled_back:
                    rolled.setdefault(version.leaf.public_key, version.folder + "/privkey.pem")
        keys = self.own_keys()
        rolled = {public: path for public, path in rolled.items() if public not in keys}
        if force:
            keys = collections.OrderedDict(list(keys.items()) + list(rolled.items()))
            self.keys = keys
        return Wanted(place.name, lineage.options.domains, lineage.current, keys,
                      () if force else lineage.state.retired, replaced,
                      () if force else lineage.state.rolled_back, () if force else rolled)

    def trusted_roots(self):
        """Return (roots or None for the system's, their PEM bytes)."""
        path = self.lineage.options.ca_file
        if path is None:
            return None, b""
        if self.roots is None:
            try:
                data = _read_ca_file(path)
                self.roots = [parse_certificate(der) for label, content, _ in pem_blocks(data)
                              if label == b"CERTIFICATE"
                              for der in [binascii.a2b_base64(content)]], data
            except (OSError, ValueError) as error:
                self.roots = [], b""
                raise Failure("untrusted", "--ca-file %s cannot be read: %s" % (
                    path, getattr(error, "strerror", None) or error), "give a PEM file of roots")
        return self.roots

    def trust(self, leaf, others):
        """Return ("" or why a leaf is not trusted, its chain as it would be written)."""
        roots, pem = self.trusted_roots()
        wrong, first = "", None
        for chain in order_chains(leaf, others):
            flaws = ["the leaf " + flaw(leaf, True)] if flaw(leaf, True) else [
                "issuer %d of the chain %s" % (depth, flaw(issuer, False))
                for depth, issuer in enumerate(chain, 1) if flaw(issuer, False)]
            wrong = flaws[0] if flaws else verify_chain(leaf, chain, roots, pem, self.run.now)
            if not wrong:
                return "", chain
            first = first or (wrong, chain)
        return first

    def examine(self, offer):
        """Return the Decision on an offer; Failure where the judge refuses it."""
        current, now = self.lineage.current, self.run.now
        same = current is not None and offer.leaf == current.leaf.der
        whole = same and bool({"domain", "ca-file"} & set(self.run.asked))
        if same and not whole and offer.chain in (None, current.chain):
            evidence, chain = Evidence(offer, None, None, ""), current.chain
            verdict = judge(evidence, current.leaf, self.wanted_names(), now, same=True)
            leaf, key = current.leaf, self.lineage.key
        else:
            leaf, others = _parse_offer(offer)
            trust, chain = self.trust(leaf, others if offer.chain is not None else [
                parse_certificate(der) for der in current.chain])
            chain = tuple(issuer.der for issuer in chain)
            same = same and (offer.chain is None or chain == current.chain)
            public, carried = leaf_public_key(leaf.der), None
            if public is None:
                raise Failure("malformed", "%s: openssl cannot read its certificate"
                              % offer.source.text, "look at what it holds")
            if offer.key:
                try:
                    carried = public_half(offer.key.pem, trusted=False)
                except ValueError as error:
                    raise Failure("malformed", "%s: its private key %s" % (
                        offer.source.text, error), "look at what it holds")
            wanted = self.wanted()
            if not wanted.keys and carried is None:
                raise _no_key(self.lineage)
            verdict = judge(Evidence(offer, public, carried, trust), leaf, wanted, now,
                            force=self.run.force)
            key = wanted.keys.get(public, offer.key)
        if verdict.reason:
            raise Failure(*verdict)
        if leaf and must_staple(leaf) and not same:
            self.run.report.problem(self.lineage.place.name, "the certificate asks for OCSP "
                                    "stapling", "see that the server staples", "warning")
        return Decision(offer, leaf, chain, key, same)

    def wanted_names(self):
        """Return what the judge asks of the current leaf: names alone."""
        return Wanted(self.lineage.place.name, self.lineage.options.domains, None, {}, (), (), (),
                      ())

    def ask(self, source):
        """Return the Decision on what a source offers: of the key type that is here, and of the
        other addresses of its name where one hands out an older certificate."""
        if source.may_hold_key:
            return self.examine(FETCHERS[source.kind](source, self.job(source),
                                                      self.run.environment))
        want, _, way = self.lineage.state.way.partition(" ")
        number, self.number = self.number, None
        if number is None:
            number = self.run.network.submit(self.job(source, want, way))
        asked, stale = [], None
        while True:
            answer = self.run.network.answer(number)
            if stale and answer.reason:
                raise stale
            offer = tls_offer(source, answer)
            try:
                return self.examine(offer)
            except Failure as failure:
                if failure.reason == "older":
                    stale = stale or failure
                    asked.append(offer.address)
                    number = self.run.network.submit(self.job(source, want, way, asked))
                    continue
                if failure.reason != "key-mismatch" or self.run.network.broken:
                    raise
                return self.ask_other_type(source, offer, failure)

    def ask_other_type(self, source, offer, failure):
        """Return the Decision on the certificate of another key type that the server may have."""
        offered = key_kind(parse_certificate(offer.leaf).public_key).split()[0]
        types = {key_kind(public).split()[0] for public in self.own_keys()} - {offered}
        for want in sorted(types & {"RSA", "ECDSA", "Ed25519"}):
            answer = self.run.network.answer(self.run.network.submit(self.job(source, want)))
            if answer.reason:
                continue
            other = tls_offer(source, answer)
            if key_kind(parse_certificate(other.leaf).public_key).split()[0] == want:
                decision = self.examine(other)
                return decision._replace(offer=other._replace(way="%s %s" % (want, answer.way)))
        raise failure

    def decide(self):
        """Return the Decision of the first source with an acceptable offer; else the gravest Failure.

        Where a renewal is due and a source has only the current leaf, the next one is asked too.
        """
        failures, unchanged = [], None
        due = self.lineage.current and is_due(self.lineage.current.leaf, self.run.now)
        for source in self.sources:
            started = time.monotonic()
            try:
                decision = self.ask(source)
                if not decision.same:
                    return decision
                unchanged = unchanged or decision
            except Failure as failure:
                failures.append(failure)
                self.say("%s: %s" % (source.text, failure))
            self.say("asked %s (%.3f s)" % (source.text, time.monotonic() - started))
            if unchanged and not due:
                break
        if unchanged:
            return unchanged
        raise max(failures, key=lambda failure: gravity(failure.reason))


def _read_ca_file(path):
    """Return the bytes of a --ca-file, read with this process's rights."""
    with open(path, "rb") as file:
        data = file.read(4 * MAX_OFFER)
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise ValueError("there is no certificate in PEM form in it")
    return data


def _parse_offer(offer):
    """Return (leaf, others) of an offer as Certificates; Failure where one is no strict DER."""
    try:
        ders = (offer.leaf,) + (offer.chain or ())
        if len(ders) > MAX_CERTIFICATES:
            raise ValueError("more than %d certificates" % MAX_CERTIFICATES)
        for der in ders:
            check_strict(der)
        leaf, *others = [parse_certificate(der) for der in ders]
        return leaf, others
    except (ValueError, IndexError) as error:
        raise Failure("malformed", "%s: a certificate that is no strict DER (%s)" % (
            offer.source.text, error), "look at what it holds")


def _no_key(lineage):
    """Return the Failure of a lineage without a private key."""
    name, sources = lineage.place.name, lineage.options.sources
    upstream = sources[0].host if sources and sources[0].host else "UPSTREAM"
    again = "".join(" --from " + source.text.replace(":443", "") for source in sources[:1])
    return Failure("no-key", "no private key in %s/privkey.pem" % lineage.place.live,
                   "bring the upstream's: ssh %s cat %s/live/%s/privkey.pem | certferry %s --key -%s"
                   % (upstream, CONFIG_DIR, name, name, again))


def _check_key(run, lineage):
    """Return (lineage, key record) with a key that is usable; Failure (no-key) before any network.

    The record spares the openssl process as long as the key file and the leaf stay what they are.
    A key put in place by hand, or written through the link, that does not fit the current
    certificate is staged, and the one that fits is put back.
    """
    place, current, state = lineage.place, lineage.current, lineage.state
    if lineage.key is None:
        if any(source.may_hold_key for source in lineage.options.sources):
            return lineage, ""
        raise _no_key(lineage)
    record = "%s %d" % (key_stamp(lineage.key), checksum(current.leaf.public_key) if current else 0)
    if record == state.key and current:
        return lineage, record
    try:
        pem = read_file(lineage.key, MAX_KEY)
        public = public_half(pem, True)
    except ValueError as error:
        raise Failure("no-key", "%s/privkey.pem %s" % (place.live, error), "put the right key there")
    if current is None:
        return lineage, ""
    if public == current.leaf.public_key or public == leaf_public_key(current.leaf.der):
        return lineage, record
    if current.number is None:
        return lineage._replace(current=None), ""  # no set: the key counts as one without
    if run.dry_run:
        return lineage, "misfit"
    path = stage_key(place, pem, public, first=False)
    if not restore_key(lineage):
        return lineage, "misfit"
    notices = lineage.notices + ("a key was written over the current one: it is staged as %s, and "
                                 "the one that fits is back" % path,)
    return lineage._replace(notices=notices), ""


def prepare(run, place, changes=None, pem=None):
    """Return a Crossing of a lineage that is whole and ready to be asked for; Failure otherwise."""
    if _certbots(place):
        raise Failure("certbot", "certbot renews it here (renewal/%s.conf)" % place.name,
                      "to hand it over, mv %s/renewal/%s.conf away (not 'certbot delete', which "
                      "removes the files that your servers read), then the same command again"
                      % place)
    lineage = load_lineage(place)
    if changes:
        given = merge_options(lineage.given or {}, changes)
        lineage = lineage._replace(options=parse_options(given))
    if _stray_conf(place):
        lineage = lineage._replace(notices=lineage.notices + (_stray_conf(place),))
    number = lineage.current.number if lineage.current else None
    if not run.dry_run:
        lines = recover(place, lineage.state, lineage.current)
        if number:
            mended, other = mend_links(place, lineage.current)
            lines += mended
            if other:
                try:
                    stage_key(place, other.pem, public_half(other.pem, True), first=False)
                except ValueError as error:
                    lines.append("the privkey.pem put there %s: it is dropped" % error)
        lineage = lineage._replace(notices=lineage.notices + tuple(lines))
    added = None
    if pem is not None:
        added = _add_key(run, lineage, pem)
        if added and not run.dry_run:
            lineage = lineage._replace(key=find_key(place, lineage.current))
    if not (added and lineage.key is None):
        lineage, record = _check_key(run, lineage)
    else:
        record = ""
    crossing = Crossing(run, lineage, added)
    crossing.misfit, crossing.record = record == "misfit", record
    return crossing


def _add_key(run, lineage, pem):
    """Take the private key of --key; return (public key, path or Secret) where it is a new one."""
    try:
        key = read_pem(pem)[1]
        if key is None:
            raise ValueError("holds no private key in PEM form")
        public = public_half(key.pem, True)
    except ValueError as error:
        raise Failure("no-key", "the private key of --key %s" % error, "give one key in PEM form")
    for path in ([lineage.key] if lineage.key else []) + staged_keys(lineage.place):
        try:
            if public_half(read_file(path, MAX_KEY), True) == public:
                return None
        except (ValueError, OSError):
            continue
    if run.dry_run:
        return public, key
    return public, stage_key(lineage.place, key.pem, public, first=lineage.key is None)


def _deploy(crossing, decision):
    """Make the decided offer the current version; return (lineage, state) as they are then."""
    lineage = crossing.lineage
    old_key = lineage.key
    lineage = adopt(lineage)
    place, state, leaf, before = lineage.place, lineage.state, decision.leaf, lineage.current
    key = lineage.key if decision.key == old_key and before else decision.key
    if before is None and old_key and decision.key != old_key:
        pem = read_file(old_key, MAX_KEY)  # the key without a certificate waits on, staged
        stage_key(place, pem, public_half(pem, True), first=False)
    rolled, public = list(state.rolled_back), leaf.public_key
    retired = [mark for mark in state.retired if mark != fingerprint(public)]
    if before and before.leaf.public_key != public:
        retired.append(fingerprint(before.leaf.public_key))
    if fingerprint(leaf.der) in rolled:
        rolled.remove(fingerprint(leaf.der))
    state = state._replace(
        owed=tuple(deploy_hooks(place.config, lineage.options)), unserved=bool(
            lineage.options.served_at), retired=tuple(retired), rolled_back=tuple(rolled))
    version = install_version(lineage, leaf, decision.chain, key, state, link=before is None)
    for path in staged_keys(place):
        if path == decision.key:
            os.unlink(path)
    prune(place, version)
    kept = {fingerprint(each.leaf.der) for each in map(
        lambda number: load_version(place, number), version_numbers(place)) if each}
    path = version.folder + "/privkey.pem"
    lineage = lineage._replace(current=version, key=path)
    return lineage, state._replace(
        owed_version=version.number, rolled_back=tuple(mark for mark in rolled if mark in kept),
        key="%s %d" % (key_stamp(path), checksum(public)))


def _run_hooks(run, lineage, hooks):
    """Run hooks; return (those that did not finish, {hook: what is shown of it})."""
    unfinished, shown = [], collections.OrderedDict()
    variables = hook_variables(lineage.place, lineage.current.leaf.domains)
    for hook in hooks:
        wrong, seconds = run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
        shown[hook] = wrong or "done (%.1f s)" % seconds
        if wrong:
            unfinished.append(hook)
    return unfinished, shown


def _finish_hooks(run, crossing, lineage, state, hooks, again):
    """Run the hooks that are due and look at the services; return (state, Failure or None, lines).

    `again` says that the hooks ran or that this is a retry: then services get time to reload.
    """
    lines, unfinished = [], []
    if hooks:
        unfinished, shown = _run_hooks(run, lineage, hooks)
        lines = ["hook         %s: %s" % (plain(hook), what) for hook, what in shown.items()]
        state = state._replace(owed=tuple(unfinished), owed_version=lineage.current.number)
        if unfinished:
            return state, Failure("hook", "%s, but a hook failed (%s): %s" % (
                "installed" if again else "unchanged", shown[unfinished[0]], plain(unfinished[0])),
                "it is tried again at every run; to change it: --deploy-hook"), lines
    deadline = time.monotonic() + (SERVED_SECONDS if hooks or again else 0)
    wrong = []
    while lineage.options.served_at:
        if not crossing.served:
            crossing.look()
        wrong = crossing.not_served(lineage.current.leaf)
        if not wrong or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    state = state._replace(owed=() if not wrong else state.owed, unserved=bool(wrong),
                           owed_version=lineage.current.number)
    if not wrong:
        return state, None, lines
    return state, Failure("not-served", wrong[0] + (": hooks ran, %d s waited" % SERVED_SECONDS
                                                    if hooks or again else ""),
                          "the hooks run again at the next run; does the daemon read "
                          "%s/fullchain.pem?" % lineage.place.live), lines


def _deferred(run, lineage, failure, health):
    """Say whether a failure can wait: nothing is lost by trying at the next run."""
    if failure.reason == "rolled-back":
        return True
    if failure.reason == "not-yet-valid":
        return lineage.current is not None and run.now < lineage.current.leaf.not_before
    return (failure.reason in ("unreachable", "timeout") and run.command == "renew"
            and health == "ok" and not run.network.broken)


def _record(run, lineage, state, result, failure, decision):
    """Return the State after a crossing: what it ended with, since when and for how many runs."""
    reason = failure.reason if failure else None
    bad = failure is not None
    repeated = bad and state.reason == (reason or "record") and state.result == result
    source = decision.offer.source.text if decision else state.source
    return state._replace(
        result=result, reason=(reason or "record") if bad else None,
        detail=plain(failure) if bad else "", runs=(state.runs + 1 if repeated else 1) if bad else 0,
        since=(state.since if repeated else run.now) if bad else None,
        good=None if result in _SOUND or reason == "rolled-back" else last_good(lineage, run.now),
        source=source, way=decision.offer.way if decision else state.way,
        upstream_not_after=decision.leaf.not_after if decision else state.upstream_not_after)


def _keep(run, lineage, state):
    """Write the state where it changed, else only its time; say where that cannot be done."""
    place = lineage.place
    try:
        if state != lineage.state or lineage.checked is None:
            save_state(place, state)
        os.utime(place.state, (run.now, run.now))
        return ""
    except OSError as error:
        return str(storage_failure(error))


def _alert(run, name, state, health, outcome, leaf):
    """Run the alert hooks where health calls for it; return the state that remembers it."""
    hooks = hook_files(run.config, "alert")
    if run.dry_run or not hooks or not alert_wanted(state, health, run.now):
        return state
    variables = {
        "CERTFERRY_NAME": name, "CERTFERRY_HEALTH": health, "CERTFERRY_WAS": state.told or "ok",
        "CERTFERRY_REASON": outcome.reason or "", "CERTFERRY_DETAIL": plain(
            outcome.message or outcome.why),
        "CERTFERRY_NOT_AFTER": iso_time(leaf.not_after) if leaf else "",
        "CERTFERRY_DAYS_LEFT": str(days_left(leaf, run.now)) if leaf else ""}
    for hook in hooks:
        wrong, _ = run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
        if wrong:
            run.report.problem(name, "the alert hook %s failed (%s)" % (hook, wrong), "mend it")
    return state._replace(told=health, told_at=run.now)


def _remember(run, crossing, changes, lineage):
    """Write the options that this command gave; return whether any changed."""
    if not changes:
        return False
    merged = merge_options(lineage.given or {}, changes)
    if merged == (lineage.given or {}):
        return False
    if not run.dry_run:
        save_conf(lineage.place, merged)
    return True


def ferry(run, crossing, changes=None):
    """Return the (Lineage, Outcome) of one lineage's crossing: ask, judge, deploy, hooks, record."""
    lineage, state = crossing.lineage, crossing.lineage.state
    name, place, current = lineage.place.name, lineage.place, lineage.current
    failure, decision, fresh, lines, changed = None, None, False, [], bool(crossing.added)
    health, _ = health_of(lineage, run.now, crossing.misfit)
    due = lineage.options.when == "always" or run.command != "renew" or run.force or not (
        current) or is_due(current.leaf, run.now)
    if crossing.record and crossing.record != "misfit":
        state = state._replace(key=crossing.record)
    hooks, retry = [], False
    try:
        if due:
            decision = crossing.decide()
        fresh = bool(decision and not decision.same)
        if fresh and run.dry_run:
            lineage = lineage._replace(current=Version(max(version_numbers(place) + [0]) + 1, "",
                                                       decision.leaf, decision.chain))
        elif fresh:
            lineage, state = _deploy(crossing, decision)
            hooks = list(state.owed)
        elif run.command == "crossing" and current and current.number is None and not run.dry_run:
            lineage, changed = adopt(lineage), True
            state = state._replace(key="%s %d" % (key_stamp(lineage.key), checksum(
                lineage.current.leaf.public_key)))
    except Failure as error:
        failure = error
    except OSError as error:
        failure = storage_failure(error)
        lineage = load_lineage(place)
        state = lineage.state
    can_wait = failure and _deferred(run, lineage, failure, health)
    try:
        if run.command == "crossing" and (not failure or can_wait):
            changed = _remember(run, crossing, changes, lineage) or changed
    except OSError as error:
        failure = storage_failure(error)
    if not run.dry_run and lineage.current:
        if not fresh:
            hooks, retry = _hooks_again(run, lineage, state, decision, changes)
        if hooks or retry or fresh or (not failure and crossing.served):
            state, pending, shown = _finish_hooks(run, crossing, lineage, state, hooks,
                                                  fresh or retry)
            lines += shown
            failure = failure or pending
    return _conclude(run, crossing, lineage, state, failure, decision, can_wait,
                     (fresh, changed or fresh, lines))


def _hooks_again(run, lineage, state, decision, changes):
    """Return (hooks to run though nothing is new, whether something was pending)."""
    every = deploy_hooks(run.config, lineage.options)
    pending = state.owed_version == lineage.current.number and (state.owed or state.unserved)
    if run.force and decision or pending and state.unserved:
        return every, bool(pending)
    hooks = [hook for hook in every if hook in state.owed] if pending else []
    if decision and changes and "deploy-hook" in changes:
        before = (lineage.given or {}).get("deploy-hook", ())
        hooks += [hook for hook in lineage.options.deploy_hooks
                  if hook not in before and hook not in hooks]
    return hooks, bool(pending)


def _conclude(run, crossing, lineage, state, failure, decision, can_wait, done):
    """Record how a crossing ended and return (Lineage, Outcome)."""
    (fresh, changed, lines), name = done, lineage.place.name
    if failure:
        result = "pending" if failure.reason in ("hook", "not-served") else (
            "deferred" if can_wait else failure.result)
    else:
        result = "installed" if fresh else "unchanged" if decision else "not-due"
    after = _record(run, lineage, state, result, failure, decision) if result != "not-due" else state
    known = lineage.given is not None or lineage.current or run.command == "renew" or not failure
    seen = lineage._replace(state=after, checked=run.now if result != "not-due" else
                            lineage.checked)
    health, why = health_of(seen, run.now, crossing.misfit and not fresh)
    if lineage.current:
        why = "%d days" % days_left(lineage.current.leaf, run.now)
    outcome = Outcome(name, result, failure.reason if failure else None,
                      str(failure) if failure else "", failure.hint if failure else "", changed,
                      fresh, decision.offer.source.text if decision else None, lineage.current,
                      health, why, lines)
    if not run.dry_run and known and (result != "not-due" or after != lineage.state):
        after = _alert(run, name, after, health, outcome,
                       lineage.current.leaf if lineage.current else None)
        wrong = _keep(run, lineage, after)
        if wrong:
            run.report.problem(name, wrong, "what happened is not recorded: see to the disk")
            outcome = outcome._replace(lines=outcome.lines + [None])
        seen = seen._replace(state=after)
    return seen, outcome


def roll_back(run, place):
    """Return the (Lineage, Outcome) of going back to the version before; Failure where none can."""
    crossing = prepare(run, place)
    lineage, state = crossing.lineage, crossing.lineage.state
    target, current = rollback_target(lineage), lineage.current
    if target is None:
        raise Failure(None, "there is no earlier version to go back to", "versions are kept in %s/"
                      "%s@N" % (place.archive, place.name))
    leaf = target.leaf
    if not leaf.not_before <= run.now <= leaf.not_after:
        raise Failure("expired" if run.now > leaf.not_after else "not-yet-valid",
                      "version %d is not valid now (%s to %s)" % (
                          target.number, iso_time(leaf.not_before), iso_time(leaf.not_after)),
                      "the version in service stays")
    lines = []
    if leaf.public_key != current.leaf.public_key:
        lines.append("private key  goes back to %s too" % describe_key(leaf.public_key))
    state = state._replace(
        rolled_back=state.rolled_back + (fingerprint(current.leaf.der),),
        retired=tuple(mark for mark in state.retired if mark != fingerprint(leaf.public_key)),
        owed=tuple(deploy_hooks(run.config, lineage.options)), unserved=bool(
            lineage.options.served_at))
    failure = None
    lineage = lineage._replace(current=target, key=target.folder + "/privkey.pem")
    if not run.dry_run:
        point_back(lineage, target, state)
        state = state._replace(owed_version=target.number, key="%s %d" % (
            key_stamp(lineage.key), checksum(leaf.public_key)))
        state, failure, shown = _finish_hooks(run, crossing, lineage, state, list(state.owed), True)
        lines += shown
    return _conclude(run, crossing, lineage, state, failure, None, False, (True, True, lines))


def inspect(place, now):
    """Return the (Lineage or None, Outcome) of what is on the disk, without touching anything."""
    try:
        lineage = load_lineage(place)
        current, state, lines, misfit = lineage.current, lineage.state, [], False
        if lineage.given is None and current is None and lineage.key is None:
            raise Failure(None, "there is no such lineage", "certferry %s sets it up" % place.name)
        if current and lineage.key and state.key != "%s %d" % (
                key_stamp(lineage.key), checksum(current.leaf.public_key)):
            public = public_half(read_file(lineage.key, MAX_KEY), True)
            misfit = public not in (current.leaf.public_key, leaf_public_key(current.leaf.der))
        for path in staged_keys(place):
            lines.append("staged key %s" % describe_key(public_half(read_file(path, MAX_KEY), True)))
        health, why = health_of(lineage, now, misfit)
        if current and lineage.key is None:
            health, why = "critical", "has no private key"
        if current and current.leaf.lifetime <= 10 * DAY:
            lines.append("lives %d days: let the timer run hourly (systemctl edit certferry.timer)"
                         % (current.leaf.lifetime // DAY))
        if lineage.options.enabled == "no":
            lines.append("disabled in its conf")
        return lineage, Outcome(place.name, state.result, state.reason, state.detail, "", False,
                                False, state.source, current, health, why, lines)
    except ValueError as error:
        failure = Failure(None, "its private key %s" % error, "bring it again with --key")
    except OSError as error:
        failure = storage_failure(error)
    except Failure as error:
        failure = error
    return None, Outcome(place.name, "failed", failure.reason, str(failure), failure.hint, False,
                         False, None, None, "unknown", "cannot be read: %s" % failure, [])


def _failed(run, place, failure):
    """Return the (Lineage or None, Outcome) of a lineage that ended before or outside its ferry,
    recorded where there is a lineage to speak of."""
    try:
        lineage = load_lineage(place)
        if failure.reason != "certbot" and not (run.dry_run or failure.reason is None) and (
                lineage.given is not None or lineage.current):
            crossing = Crossing(run, lineage)
            return _conclude(run, crossing, lineage, lineage.state, failure, None, False,
                             (False, False, []))
        health, why = health_of(lineage, run.now)
        version = lineage.current
    except (Failure, OSError):
        lineage, version, health, why = None, None, "unknown", ""
    return lineage, Outcome(place.name, failure.result, failure.reason, str(failure), failure.hint,
                            False, False, None, version, health, why, [])


def ferry_all(run, places, changes=None, pem=None):
    """Return [(Lineage or None, Outcome)] of many lineages, in order; the one place that catches.

    All first exchanges are under way before the first answer is judged.
    """
    ready, done = [], []
    for place in places:
        try:
            crossing = prepare(run, place, changes, pem)
            if run.command == "renew" and crossing.lineage.options.enabled == "no":
                run.report.detail(place.name, "disabled in its conf: skipped")
                continue
            options, current = crossing.lineage.options, crossing.lineage.current
            if options.when == "always" or run.command != "renew" or run.force or not current or (
                    is_due(current.leaf, run.now)):
                crossing.begin()
            else:
                crossing.look()
            ready.append((place, crossing))
        except Failure as failure:
            ready.append((place, failure))
        except OSError as error:
            ready.append((place, storage_failure(error)))
    for position, (place, crossing) in enumerate(ready, 1):
        run.report.step(position, len(ready), place.name)
        started = time.monotonic()
        try:
            if isinstance(crossing, Failure):
                raise crossing
            for notice in crossing.lineage.notices:
                run.report.problem(place.name, notice, kind="warning")
            pair = ferry(run, crossing, changes)
        except Failure as failure:
            pair = _failed(run, place, failure)
        except OSError as error:
            pair = _failed(run, place, storage_failure(error))
        run.report.outcome(pair[1])
        run.report.detail(place.name, "done (%.3f s)" % (time.monotonic() - started))
        done.append(pair)
    run.report.clear()
    return done


def post_hooks(run, pairs):
    """Run certbot's post hooks once where something was deployed; say whether all succeeded."""
    if run.dry_run or not any(outcome.fresh for _, outcome in pairs):
        return True
    variables = {"RENEWED_DOMAINS": [], "FAILED_DOMAINS": []}
    for _, outcome in pairs:
        names = outcome.version.leaf.domains if outcome.version else (outcome.name,)
        if outcome.fresh or outcome.result in ("failed", "refused"):
            variables["RENEWED_DOMAINS" if outcome.fresh else "FAILED_DOMAINS"].extend(names)
    variables = {key: " ".join(names) for key, names in variables.items()}
    sound = True
    for hook in hook_files(run.config, "post"):
        wrong, _ = run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
        if wrong:
            run.report.problem("", "the post hook %s failed (%s)" % (hook, wrong),
                               "run it by hand: it is not tried again")
            sound = False
    return sound


def write_metrics(path, pairs, places, now, seconds, report):
    """Write the metrics of a run, the lineages that were not in it from disk; say whether it went."""
    names = {outcome.name for _, outcome in pairs}
    pairs = pairs + [inspect(place, now) for place in places if place.name not in names]
    pairs.sort(key=lambda pair: pair[1].name)
    try:
        write_file(path, format_metrics(pairs, seconds), 0o644)
        return True
    except OSError as error:
        report.problem("", "metrics: %s" % storage_failure(error), "look at --metrics")
        return False


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
  --from SOURCE          where to fetch: HOST[:PORT], PROTOCOL://HOST (%s),
                         file:PATH, exec:COMMAND, vault://HOST/MOUNT/PATH, azure://VAULT/NAME;
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

  certferry renew                          every lineage, as the timer does
  certferry renew example.com --force -v   one, whatever it was refused for as older

  --jitter SECONDS   sleep first, a delay below SECONDS that is fixed for this host
  --metrics FILE     write Prometheus metrics there, also when something failed
  --dry-run, --force (with a NAME), --config-dir DIR, --json, -q, -v
exit status: 0 all is well, 1 something failed, was refused or is pending
""",
    "status": """\
usage: certferry status [NAME...] [options]

  certferry status                 a line for monitoring, then a table; never uses the network
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


def _make_parser():
    """Return the argument parser: options alone, so that they may stand before and after words."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """A parser that raises what is wrong instead of printing and ending."""

        def error(self, message):
            """Raise Usage with argparse's words."""
            raise Usage(message.replace("argument ", ""))

    parser = Parser(add_help=False, allow_abbrev=False)
    for key, (_, _, repeats) in REMEMBERED.items():
        if key != "enabled":
            flags = ("-d", "--domain") if key == "domain" else ("--" + key,)
            parser.add_argument(*flags, dest=key, action="append")
    for key in ("key", "config-dir", "jitter", "metrics"):
        parser.add_argument("--" + key, dest=key.replace("-", "_"))
    for key in ("dry-run", "force", "no-timer", "json", "version"):
        parser.add_argument("--" + key, dest=key.replace("-", "_"), action="store_true")
    for flags in (("-q", "--quiet"), ("-v", "--verbose"), ("-h", "--help")):
        parser.add_argument(*flags, action="store_true")
    return parser


def _nearest(word):
    """Return the command or certbot habit that a word was meant to be."""
    habits = {"certificates": "status", "list": "status", "show": "status", "certonly": "NAME",
              "run": "NAME", "update": "renew", "revert": "rollback"}
    word = word.strip("-")
    if word in habits:
        return habits[word]
    import difflib
    return (difflib.get_close_matches(word, COMMANDS, 1, 0.0) or COMMANDS)[0]


def parse_arguments(arguments):
    """Return (options, command or "", [NAME], {remembered key: texts}); Usage for what is wrong."""
    options, words = _make_parser().parse_known_args(arguments)
    for word in words:
        if word.startswith("-") and word != "--":
            raise Usage("unknown option %s: did you mean certferry %s? certferry --help lists all"
                        % (plain(word, 60), _nearest(word)))
    words = [word for word in words if word != "--"]
    changes = {key: value for key, value in vars(options).items()
               if key in REMEMBERED and value is not None}
    if not words:
        return options, "", [], changes
    command = words.pop(0) if words[0] in COMMANDS else "crossing"
    names = []
    for word in words:
        wildcard = command == "crossing" and word.startswith("*.")
        try:
            name = host_name(word[2:] if wildcard else word)
            if "." not in name and not is_address(name):
                raise ValueError
        except (ValueError, UnicodeError):
            raise Usage("%s is no host name and no command: did you mean certferry %s?" % (
                plain(word, 60), _nearest(word)))
        names.append(name)
        if wildcard:
            changes["domain"] = changes.get("domain", []) + ["*." + name]
    return options, command, names, changes


def check_arguments(options, command, names, changes):
    """Raise Usage where options and command do not go together."""
    if command in ("crossing", "rollback") and len(names) != 1:
        raise Usage("one NAME at a time: certferry %s" % (
            "rollback NAME" if command == "rollback" else "NAME [options]"))
    stray = [key for key in changes if command != "crossing"]
    stray += ["key"] if options.key is not None and command != "crossing" else []
    stray += ["jitter"] if options.jitter is not None and command != "renew" else []
    stray += ["metrics"] if options.metrics is not None and command not in ("renew", "status") else []
    stray += ["force"] if options.force and command in ("status", "rollback") else []
    if stray:
        raise Usage("--%s does not go with %s: certferry --help says with what" % (stray[0], command))
    if options.force and command == "renew" and not names:
        raise Usage("renew --force needs a NAME: certferry renew NAME --force")
    if options.jitter is not None and not re.match(r"\d{1,6}\Z", options.jitter):
        raise Usage("--jitter %s: write whole seconds" % plain(options.jitter, 40))
    for key, texts in changes.items():
        try:
            parse_options({key: [text for text in texts if text]})
        except ValueError as error:
            raise Usage("--%s: %s" % error.args)
        if not REMEMBERED[key][2] and len(texts) > 1:
            raise Usage("--%s: it takes one value" % key)


def jitter_delay(seconds, host_id=None):
    """Return a delay in [0, seconds) that is fixed for this host and spread evenly over a fleet.

    `host_id` is the text of /etc/machine-id, or the host's name where there is none.
    """
    import hashlib
    if host_id is None:
        host_id = os.uname().nodename
        for path in ("/etc/machine-id", "/var/lib/dbus/machine-id", "/etc/hostid"):
            try:
                with open(path) as file:
                    host_id = file.read(256).strip() or host_id
                    break
            except OSError:
                continue
    digest = hashlib.sha256(b"certferry " + host_id.encode("utf-8", "replace")).digest()
    return seconds * int.from_bytes(digest[:8], "big") / float(1 << 64)


def _read_key_option(value):
    """Return the PEM bytes that --key names; Failure where they cannot be read."""
    try:
        if value == "-":
            return sys.stdin.buffer.read(MAX_KEY)
        with open(value, "rb") as file:
            return file.read(MAX_KEY)
    except (OSError, AttributeError, ValueError) as error:
        raise Failure("no-key", "--key %s: %s" % (value, getattr(error, "strerror", None) or error),
                      "give a PEM file, or - for standard input")


def start_timer(run, no_timer):
    """Start the timer, or say what to put into cron; return (line or "", whether it was started)."""
    import subprocess

    def systemctl(*arguments):
        return subprocess.run(("systemctl",) + arguments, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)

    if no_timer or run.dry_run:
        return "", False
    folders = ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system",
               "/lib/systemd/system")
    default = run.config == CONFIG_DIR
    if default and os.path.isdir("/run/systemd/system") and any(
            os.path.exists(folder + "/certferry.timer") for folder in folders):
        try:
            if systemctl("is-active", "certferry.timer").returncode == 0 and systemctl(
                    "is-enabled", "certferry.timer").returncode == 0:
                return "", False
            done = systemctl("enable", "--now", "certferry.timer")
            if done.returncode == 0:
                shown = systemctl("show", "-p", "NextElapseUSecRealtime", "certferry.timer").stdout
                at = re.search(rb"\d\d:\d\d", shown)
                return "certferry.timer: started" + (
                    ", next run " + at.group().decode() if at else ""), True
            words = plain(done.stderr.decode("utf-8", "replace").strip().split("\n")[-1], 120)
        except (OSError, subprocess.SubprocessError) as error:
            words = plain(error, 120)
        run.report.problem("", "certferry.timer could not be started (%s)" % words,
                           "systemctl enable --now certferry.timer")
        return "", False
    if default and os.path.exists("/etc/cron.d/certferry"):
        return "", False
    script = os.path.realpath(sys.argv[0])
    command = script if os.access(script, os.X_OK) and not script.endswith(".py") else (
        "%s %s" % (sys.executable, script))
    return "no timer was started: for cron: 23 5,17 * * * %s renew -q --jitter 39600%s" % (
        command, "" if default else " --config-dir " + run.config), False


def _run_status(config, names, options, now, report):
    """Show what is on the disk; return the exit status that monitoring expects."""
    started = time.monotonic()
    places = [Place(config, name) for name in names] if names else discover(config)[0]
    pairs = [inspect(place, now) for place in sorted(places)]
    if options.metrics:
        write_metrics(options.metrics, pairs, [], now, time.monotonic() - started, report)
    if options.json:
        report.document([as_object(outcome) for _, outcome in pairs])
    else:
        for line in status_lines(pairs, now):
            report.line(line)
    healths = {outcome.health for _, outcome in pairs} or {"unknown"}
    for health, status in (("critical", 2), ("unknown", 3), ("warning", 1)):
        if health in healths:
            return status
    return 0


def _open_config(run, pem):
    """Hold the config dir, made for a first key; read the environment file into the run."""
    if not os.path.isdir(run.config):
        if pem is None or run.dry_run:
            return run
        make_folder(run.config)
    check_folder(run.config)
    lock(run.config)
    path = run.config + "/certferry/environment"
    try:
        check_folder(os.path.dirname(path))
        text = read_file(path, MAX_RECORD, True).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return run
    return run._replace(environment=dict(run.environment, **parse_environment(text, path)))


def _run_command(run, names, options, changes):
    """Do what was asked; return the [(Lineage or None, Outcome)] of it and whether all hooks ran."""
    started, places = time.monotonic(), [Place(run.config, name) for name in names]
    all_places = None
    try:
        pem = _read_key_option(options.key) if options.key is not None else None
        run = _open_config(run, pem)
        if run.command == "renew" and not (names and not options.metrics):
            all_places, notices = discover(run.config)
            for name, notice in notices if not names else ():
                run.report.problem(name, notice, kind="warning")
            places = places or all_places
        if run.command == "rollback":
            pairs = [roll_back(run, places[0])]
            run.report.outcome(pairs[0][1])
        else:
            pairs = ferry_all(run, places, changes, pem)
    except (Failure, OSError) as error:
        failure = error if isinstance(error, Failure) else storage_failure(error)
        pairs = [_failed(run, place, failure) for place in places]
        for _, outcome in pairs:
            run.report.outcome(outcome)
        if not pairs:
            run.report.problem("", failure, failure.hint)
            pairs = [(None, None)]
    sound = pairs == [(None, None)] or post_hooks(run, pairs)
    path = options.metrics or run.environment.get("CERTFERRY_METRICS")
    if path and run.command == "renew" and pairs != [(None, None)] and not run.dry_run:
        sound = write_metrics(path, pairs, all_places if all_places is not None else discover(
            run.config)[0], run.now, time.monotonic() - started, run.report) and sound
    return pairs, sound


def _show_crossing(run, outcome, options):
    """Start the timer after a crossing that was remembered; return the outcome as it is then."""
    if outcome.result not in ("installed", "unchanged", "pending", "deferred"):
        return outcome
    line, started = start_timer(run, options.no_timer)
    if line:
        run.report.line(line)
    return outcome._replace(changed=outcome.changed or started)


def main(arguments):
    """Do what the command line asks; return the exit status."""
    status_asked = "status" in arguments
    try:
        options, command, names, changes = parse_arguments(arguments)
        report = Reporter(options.quiet, options.verbose, options.json)
        if options.version or options.help:
            Reporter().line("certferry " + __version__ if options.version else
                            HELP.get(command, HELP[""]).rstrip("\n"))
            return 0
        if not command:
            Reporter().short_help(SHORT_HELP)
            return 2
        check_arguments(options, command, names, changes)
    except Usage as error:
        Reporter().problem("", error)
        return 3 if status_asked else 2
    now, config = int(time.time()), os.path.abspath(options.config_dir or CONFIG_DIR)
    if command == "status":
        return _run_status(config, names, options, now, report)
    if options.jitter:
        time.sleep(jitter_delay(int(options.jitter)))
        now = int(time.time())
    network = Network()
    run = Run(config, dict(os.environ), now, command, options.dry_run, options.force, network,
              report, tuple(changes))
    try:
        pairs, sound = _run_command(run, names, options, changes)
        if command == "crossing" and pairs[0][1]:
            pairs = [(pairs[0][0], _show_crossing(run, pairs[0][1], options))]
    finally:
        network.close()
    outcomes = [outcome for _, outcome in pairs if outcome]
    if options.json:
        report.document([as_object(outcome) for outcome in outcomes], options.dry_run)
    well = all(outcome.result in ("installed", "unchanged", "not-due", "deferred")
               for outcome in outcomes)
    return 0 if well and sound and len(outcomes) == len(pairs) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        Reporter().problem("", "interrupted", "the next run takes up what is unfinished")
        sys.exit(130)
    except Exception as error:
        Reporter().problem("", "this is a bug in certferry (%s, line %d)" % (
            repr(error), error.__traceback__.tb_lineno), "please report it; nothing was lost")
        sys.exit(1)
