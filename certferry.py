#!/usr/bin/env python3
"""certferry: ferry a renewed certificate from the server that has it to every server that needs it.

    certferry example.com --from up.example.net

makes a TLS handshake with up.example.net, takes the certificate that it shows, checks it, and puts
it into live/example.com/ as certbot would; then it runs the deploy hooks. A timer runs
`certferry renew` twice a day, which does the same again for every lineage.

The bargain. This file runs as root, so read it. It is one file, and nothing in it is used above its
definition: whoever starts at `main`, at the end, can go up as deep as they like. The private key is
the credential. It is put on this host once, and from then on a server can only hand over a
certificate for a key that is already here (a file, a command or a store may bring both). In a TLS
handshake the peer proves that it holds that key too. So the upstream needs no configuration, and
nobody else can take part. Who controls the path can withhold a renewal, which is seen as `due` and
then as `warning`. Revocation is not checked.

The story of one lineage, in the section Ferry:

    options -> Lineage -> look -> InService -> ask -> Offer -> examine -> Facts -> judge -> Choice
            -> install -> InService -> hooks -> Outcome -> record, report

    1. look: what live/NAME/ shows is what is in service
    2. see that the lineage is not certbot's
    3. tidy: remove what an interrupted run left; stage --key; make whole what is not
    4. choose: ask source after source, judge each offer, rehearse what passes, take the first
    5. install the offer, if it is news
    6. remember the options that this command gave
    7. finish, also after a failure above: run the hooks that are owed, look at the services
    8. conclude: the outcome, the state file, alert hooks, the report

Words. An *upstream* has the certificate and serves it; the *downstream* is this host. A *lineage*
is one certificate name and all its versions, live/NAME/. A *source* is where its certificate is
fetched from. The *leaf* is the end-entity certificate, the *chain* its issuers in order, without
the root. An *offer* is what a source handed over, not yet trusted. A *version* is one complete set
of cert.pem, chain.pem, fullchain.pem and privkey.pem, kept in archive/NAME@N/. A *staged key* waits
in live/NAME/privkey-*.pem until an offer fits it. To *settle* is to turn whatever live/NAME/ is
made of into four links, while it goes on showing the same. To *deploy* is to make an accepted offer
the current version (it is then *in service*) and to run the deploy hooks. A *crossing* is one
lineage's way through the steps above. A lineage is *pending* while its version still owes hooks, or
a service does not show it yet.

Privilege. As root, whatever talks to the network is a process that has become nobody, forked
before a key is read. openssl reads what came from outside as nobody too, under another group. What
the network process says counts for bytes only: it is this process that decides. Hooks and `exec:`
commands are the administrator's own, and run as the caller.

Exit status: 0 all is well; 1 something failed, was refused or is pending; 2 wrong usage; 130
interrupted. `status`: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN or wrong usage.
"""

# --------------------------------------------------------------------------------------------------
# Imports, limits
# --------------------------------------------------------------------------------------------------

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

__version__ = "2.0.0"

MAX_OFFER = 1 << 20  # bytes: sixteen certificates of any sane size are under 64 KiB
MAX_CERTIFICATES = 16  # a public chain has two to four
MAX_ROOTS = 1000  # in a --ca-file; browsers' stores have under 200
MAX_KEY = 65536  # bytes: an RSA key of 16,384 bits takes 13 KiB as PEM
MAX_RECORD = 262144  # bytes of a NAME.conf, NAME.state or environment file
MAX_LINKS = 40  # on the way to a file, as many as the kernel follows
MAX_TEXT = 300  # characters of a peer's words that are shown
MAX_VARIABLE = 32000  # characters of a list of names: the kernel takes 128 KiB for one variable
SIDE_BY_SIDE = 8  # exchanges at the same time; more gain nothing against one upstream
OPENSSL_SECONDS = 20  # an openssl process takes 5 ms; a stuck one must not hold up the run
HOOK_SECONDS = 600  # a hook may restart a large database; a hanging one must not block for ever
SERVED_SECONDS = 15  # reloads are asynchronous: workers exit when their connections do
LOCK_SECONDS = 60  # a second run waits that long for the first
KEPT_VERSIONS = 5  # of the newest; the current one and a rollback's stay even if they are older
SILENT_HOURS = 48  # the timer runs twice a day: four runs missed are no accident
SIGKILL = 9  # everywhere; the module signal takes half a millisecond
DAY = 86400  # seconds

CONFIG_DIR = "/usr/local/etc/letsencrypt" if "freebsd" in sys.platform else "/etc/letsencrypt"
MEMBERS = ("cert.pem", "chain.pem", "fullchain.pem", "privkey.pem")
LITTER = ".certferry-new"  # ends every temporary name, so that a later run knows what it may remove
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE:DHE:!aNULL:!eNULL:!PSK:!SRP"
SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

memoized = functools.lru_cache(maxsize=None)  # for functions that are asked the same again

# --------------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------------

# namedtuple, since typing costs 2.5 ms at every start and dataclasses 10. No private key is in any
# of them, for repr() prints them: keys are paths, or a Secret.


class Source(collections.namedtuple("Source", "kind host port target text")):
    """Where a certificate is fetched from.

    `kind` is tls, a STARTTLS protocol (smtp, ...), file, exec, vault or azure. `host` may end with
    a dot (an absolute name). `target` is the path or command of file and exec, and the secret's
    path in a store. `text` is what a person reads.
    """


class Options(
    collections.namedtuple(
        "Options",
        "sources sni domains ca_file deploy_hooks served_at when warn critical timeout enabled",
    )
):
    """The remembered options of a lineage, as values; NO_OPTIONS holds the defaults."""


class Place(
    collections.namedtuple("Place", "config name live pointer archive records conf state renewal")
):
    """Where the files of one lineage are: Place(config dir, the lineage's name), then paths.

    `live` is the folder that servers are pointed at, `pointer` the link whose rename is the one
    instant of change, `archive` the folder of all versions of all lineages, `records` that of what
    certferry remembers: `conf` the options, `state` what happened last. `renewal` is certbot's
    file of that name: is_certbots() says whether it counts.
    """

    def __new__(cls, config, name):
        """Make the paths."""
        live = f"{config}/live/{name}"
        records = f"{config}/certferry"
        return super().__new__(
            cls,
            config=config,
            name=name,
            live=live,
            pointer=f"{live}/.current",
            archive=f"{config}/archive",
            records=records,
            conf=f"{records}/{name}.conf",
            state=f"{records}/{name}.state",
            renewal=f"{config}/renewal/{name}.conf",
        )

    def member(self, name):
        """Return the path of a live name, such as fullchain.pem."""
        return f"{self.live}/{name}"

    def version(self, number):
        """Return the folder of version `number`."""
        return f"{self.archive}/{self.name}@{number}"


class Certificate(
    collections.namedtuple(
        "Certificate",
        "der serial not_before not_after subject issuer public_key algorithm extensions domains",
    )
):
    """The facts of one certificate.

    `serial` is hexadecimal, times are seconds since 1970, `subject` and `issuer` DER bytes,
    `public_key` is the SubjectPublicKeyInfo, `algorithm` that of the signature (both DER),
    `extensions` {OID bytes: value bytes}, `domains` the usable DNS names and IP addresses of the
    subject alternative name, in its order.
    """

    @property
    def lifetime(self):
        """Return the seconds from notBefore to notAfter, at least 1."""
        return max(1, self.not_after - self.not_before)


class State(
    collections.namedtuple(
        "State",
        "result reason detail culprit since runs good source upstream_not_after key_file told "
        "told_at",
    )
):
    """What happened last to a lineage, for reports alone.

    `culprit` is the source, service or hook that it failed for, or "". `since` and `runs` tell how
    long the same refusal or failure lasts, `good` is the time of the last good exchange where that
    was not the last run, `source` where the last accepted certificate came from and
    `upstream_not_after` its end. `key_file` marks a key file that was seen to fit (a cache), `told`
    and `told_at` are the health that alert hooks were run for, and when.
    """


class Lineage(
    collections.namedtuple("Lineage", "place given options state last_run notices failure")
):
    """What is remembered of a lineage.

    `given` are the options as NAME.conf has them, {key: [text, ...]}; `options` those in force in
    this run; `last_run` is in seconds since 1970 or None; `notices` are warnings about the records,
    `failure` is what keeps the lineage from being ferried, or None.
    """

    @property
    def name(self):
        """Return the lineage's name."""
        return self.place.name


class InService(
    collections.namedtuple("InService", "number leaf chain key_path staged owed linked flaw litter")
):
    """What live/NAME/ shows, whatever it is made of.

    `number` is that of the version that .current leads to, None without one. `leaf` is a
    Certificate or None, `chain` its issuers as DER. `key_path` is the private key's file or None,
    `staged` the paths of the staged keys. `owed` are the hooks that the version owes, () where only
    the services are still to be looked at, None where nothing is pending. `linked` says that the
    four names are links through .current. `flaw` says what is not whole, "" where all is. `litter`
    are the paths of what an interrupted run left beside it.
    """

    @property
    def is_whole(self):
        """Say whether there is a certificate, and a key that fits it."""
        return self.leaf is not None and self.flaw == ""


class Offer(collections.namedtuple("Offer", "source address leaf chain key")):
    """What a source handed over, not yet trusted: DER bytes, and a Secret where a key came too."""


class Facts(
    collections.namedtuple(
        "Facts",
        "name domains leaf source current address public_key carried_key accepted_keys our_key "
        "given_key bring_key force_command trust_flaw versions",
    )
):
    """All that the judge sees of an offer, and of what it is compared with.

    `domains` are the required names, `leaf` and `current` Certificates (current may be None).
    Public keys are DER: the leaf's as openssl prints it, the one of a key that came along or None,
    and those that are accepted. `our_key` is the first of these, `given_key` (public key, path) of
    the one that this command gave, or None; `bring_key` is the command that brings another,
    `force_command` the one that takes the offer all the same.
    `trust_flaw` is (what, hint) of a chain that is not trusted, else None. `versions` are those
    that are here. Of what is in service already the first four are enough.
    """


Facts.__new__.__defaults__ = (None, "", None, None, (), None, None, "", "", None, ())


class Version(collections.namedtuple("Version", "number leaf chain rolled_back")):
    """A version in the archive that can be read; `rolled_back` says that it bears that mark."""


class Health(collections.namedtuple("Health", "word why cause")):
    """How a lineage is: ok, due, warning, critical or unknown, and why, in words.

    `cause` is what makes it bad: `files`, `expiry`, `pending`, `last run` or `silence`; "" where
    it is ok or due.
    """


class Outcome(
    collections.namedtuple(
        "Outcome", "lineage in_service result problem said changed deployed source health lines"
    )
):
    """How a lineage's run ended.

    `lineage` and `in_service` are what they have become (in a dry run what they would). `problem`
    is the Failure that ended it, or for which it waits, or None; `said` what else there is to say,
    or "". `deployed` says that another certificate, or a whole one, is in service. `source` is a
    source's text or None, `lines` are shown below the result.
    """

    @property
    def reason(self):
        """Return the word of the README's table for the problem, or None."""
        return (self.problem.reason or None) if self.problem else None


class Secret:
    """A private key as PEM bytes, in one object that never shows them."""

    __slots__ = ("pem",)

    def __init__(self, pem):
        """Hold the PEM bytes."""
        self.pem = pem

    def __repr__(self):
        """Show nothing."""
        return "<private key>"


NO_OPTIONS = Options((), None, (), None, (), (), "always", "25%", "10%", 20.0, "yes")
NO_STATE = State(None, None, "", "", None, 0, None, None, None, "", "", None)

# results after which the options of a command are remembered
REMEMBERING = ("installed", "unchanged", "pending", "not-due", "deferred")

# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


class Reason(collections.namedtuple("Reason", "result gravity warns_after")):
    """What a reason means for a run that ends with it.

    `result` is how the run ends. Where several sources failed, the highest `gravity` counts.
    `warns_after` so many runs in a row health is a warning: 1 where nothing heals by itself, 2
    where the next run may find it gone, NEVER where other rules of health see to it.
    """


NEVER = 1 << 30
# The README's table of reasons. None is a broken record, a held lock or a missing program, "" a
# rollback with nowhere to go.
REASONS = {
    None: Reason("failed", 3, NEVER),
    "": Reason("refused", 3, NEVER),
    "certbot": Reason("refused", 3, 1),
    "no-key": Reason("refused", 3, 1),
    "unreachable": Reason("failed", 2, NEVER),
    "timeout": Reason("failed", 2, NEVER),
    "unproven": Reason("refused", 3, 2),
    "malformed": Reason("refused", 3, 2),
    "rolled-back": Reason("refused", 1, NEVER),
    "older": Reason("refused", 0, NEVER),
    "key-mismatch": Reason("refused", 4, 1),
    "names": Reason("refused", 3, 1),
    "expired": Reason("refused", 3, 2),
    "not-yet-valid": Reason("refused", 3, 2),
    "untrusted": Reason("refused", 3, 1),
    "names-lost": Reason("refused", 3, 1),
    "rehearsal": Reason("refused", 3, 1),
    "storage": Reason("failed", 3, 1),
    "hook": Reason("pending", 3, NEVER),
    "not-served": Reason("pending", 3, NEVER),
}


class Failure(Exception):
    """What ends a lineage's crossing.

    `reason` is a word of REASONS. The message says what is wrong, `hint` what to do about it,
    `culprit` with which source, service or hook, as far as that is known.
    """

    def __init__(self, reason, message, hint="", culprit=""):
        """Keep the words apart."""
        Exception.__init__(self, message)
        self.reason = reason
        self.hint = hint
        self.culprit = culprit

    @property
    def result(self):
        """Return how a run ends with it: `failed`, `refused`, or `pending` once deployed."""
        return REASONS[self.reason].result


class UnusableKey(Failure):
    """A private key that cannot be used (no-key)."""

    def __init__(self, message, hint):
        """Keep the words apart."""
        Failure.__init__(self, "no-key", message, hint)


def graver(one, other):
    """Return the graver of two Failures, the first where they are equal; `one` may be None."""
    if one is None or REASONS[other.reason].gravity > REASONS[one.reason].gravity:
        return other
    return one


def plain(text, limit=MAX_TEXT):
    """Return `text` from anywhere as printable ASCII on one line, at most `limit` characters."""
    # what a peer says must not steer the terminal that shows it
    text = re.sub("[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", str(text))
    text = re.sub("-----BEGIN [A-Z ]*PRIVATE KEY.*", "(a private key)", text)
    if len(text) > limit:
        return text[: limit - 3] + "..."
    return text


def words_of(error):
    """Return what an exception says, without number and path."""
    return str(getattr(error, "strerror", None) or error)


def quietly(step, *arguments):
    """Do a step of cleaning up, without which nothing is lost, whether it succeeds or not."""
    try:
        step(*arguments)
    except (OSError, ValueError):
        pass


def shell_quote(word):
    """Return a word as a shell takes it (shlex is not in python3-minimal)."""
    if re.match(r"[\w@%+=:,./-]+\Z", word, re.ASCII):
        return word
    return "'" + word.replace("'", "'\\''") + "'"


# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------

# A name ends up in paths, in hooks' environments and in openssl's arguments: letters and no more.
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME = rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z"
DEFAULT_PORTS = {
    "tls": 443,
    "smtp": 25,
    "imap": 143,
    "pop3": 110,
    "ftp": 21,
    "ldap": 389,
    "xmpp": 5222,
    "postgres": 5432,
    "mysql": 3306,
}


class StoreKind(collections.namedtuple("StoreKind", "form port domain path settings roots")):
    """A kind of source that is asked over HTTPS and needs credentials.

    `form` is how it is written, `port` the default one; `domain` is added to a host without a dot,
    `path` a pattern of what follows the host. `settings` are the variables that are its own, in the
    order in which they count; one in _FILE names a file that holds the value. `roots` is the
    variable that names a file of roots to trust.
    """


STORES = {
    "vault": StoreKind(
        form="vault://HOST[:PORT]/MOUNT/PATH",
        port=8200,
        domain="",
        path=r"(?!.*\.\.)[\w.@=+-]+(/[\w.@=+-]+)+\Z",  # no part of it climbs with `..`
        settings="VAULT_TOKEN VAULT_TOKEN_FILE VAULT_ROLE_ID VAULT_SECRET_ID VAULT_SECRET_ID_FILE "
        "VAULT_NAMESPACE VAULT_CACERT".split(),
        roots="VAULT_CACERT",
    ),
    "azure": StoreKind(
        form="azure://VAULT/NAME",
        port=443,
        domain=".vault.azure.net",
        path=r"[A-Za-z0-9-]{1,127}\Z",
        settings="AZURE_TENANT_ID AZURE_CLIENT_ID AZURE_CLIENT_SECRET AZURE_CLIENT_SECRET_FILE "
        "AZURE_AUTHORITY_HOST AZURE_POD_IDENTITY_AUTHORITY_HOST".split(),
        roots="SSL_CERT_FILE",
    ),
}
KEY_HOLDING = ("file", "exec", *STORES)  # the kinds of source that may bring a key too
# the stores' settings: neither hooks nor the network process see them, `exec:` does
CREDENTIALS = sum([store.settings for store in STORES.values()], [])


def is_address(host):
    """Say whether a host is meant as an IP address: no top-level domain is a number (RFC 3696)."""
    return ":" in host or host.rpartition(".")[2].isdigit()


def host_name(text):
    """Return a host name in lower-case ASCII without a trailing dot, or an IP address.

    ValueError says what is wrong. Other than ASCII letters are refused: what they become depends on
    the edition of IDNA.
    """
    if max(text, default="") > "\x7f":
        raise ValueError(f"{plain(text, 80)}: write the name in its ASCII form (xn--...)")
    name = re.sub(r"\.\Z", "", text.lower())
    if is_address(name) and "%" not in name:  # one with a scope is of this host alone
        import ipaddress  # 3 ms

        return ipaddress.ip_address(name).compressed
    if not re.match(HOST_NAME, name):
        raise ValueError(f"{plain(text, 80)} is no host name and no address")
    return name


def lineage_name(text):
    """Return the name of a lineage: a host name with a dot, or an address; or ValueError."""
    name = host_name(text)
    # a disk takes names of 255 characters, and those of temporary files are longer
    if len(name) > 214 or not ("." in name or is_address(name)):
        raise ValueError("no full host name")
    return name


def is_lineage_name(text):
    """Say whether a text is the name of a lineage as it is written on the disk."""
    try:
        return lineage_name(text) == text
    except ValueError:
        return False


def parse_endpoint(text, port):
    """Return (host, port) of HOST, HOST:PORT, [V6]:PORT or a bare V6 address; or ValueError.

    A trailing dot, of an absolute name, stays: the resolver then appends no search domain.
    """
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    match = re.match(r"(\[[^]]*:[^]]*\]|[^][:]*)(?::(\d{1,5}))?\Z", text, re.ASCII)
    if match is None or not 0 < int(match[2] or port) < 65536:
        raise ValueError(
            f"{plain(text, 80)}: write HOST, HOST:PORT or [ADDRESS]:PORT, with a port of 1 to 65535"
        )
    host = match[1].strip("[]")
    name = host_name(host)
    if host.endswith(".") and not is_address(name):
        name += "."
    return name, int(match[2] or port)


def endpoint_text(host, port):
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@memoized  # many lineages, few upstreams
def parse_source(text):
    """Return the Source that `text` names; or ValueError with what is wrong."""
    kind, _, target = text.partition(":")
    if kind in ("file", "exec"):
        if not target.strip() or re.search("[\0\r\n]", target):
            raise ValueError(f"{kind}: needs a path or command on one line")
        return Source(kind, "", 0, target, text)
    kind, slashes, rest = text.partition("://")
    if not slashes:
        kind, rest = "tls", text
    host, slash, path = rest.partition("/")
    if kind in STORES:
        store = STORES[kind]
        if not re.match(store.path, path, re.ASCII):
            raise ValueError(f"{plain(text, 80)}: write {store.form}")
        if "." not in host:
            host += store.domain
        return Source(kind, *parse_endpoint(host, store.port), path, text)
    if slash or kind not in DEFAULT_PORTS:
        forms = ", ".join(store.form for store in STORES.values())
        raise ValueError(
            f"{plain(text, 80)}: write HOST[:PORT], file:PATH, exec:COMMAND, {forms}, or one of "
            f"{' '.join(DEFAULT_PORTS)} with ://HOST[:PORT]"
        )
    host, port = parse_endpoint(host, DEFAULT_PORTS[kind])
    shown = endpoint_text(host, port)
    if kind != "tls":
        shown = f"{kind}://{shown}"
    return Source(kind, host, port, "", shown)


def parse_served(text):
    """Return the Source of a local service, which is asked by TLS; or ValueError."""
    source = parse_source(text)
    if source.kind in KEY_HOLDING:
        raise ValueError(f"{plain(text, 40)}: write [PROTOCOL://]HOST:PORT")
    return source


def parse_domain(text):
    """Return a domain that a certificate must cover, `*.` allowed; or ValueError."""
    if text.startswith("*."):
        return "*." + host_name(text[2:])
    return host_name(text)


def _matching(pattern, words, convert=str):
    """Return a reader of what matches a pattern; its ValueError says to write `words`."""

    def read(text):
        """Return the value, converted; or ValueError."""
        if not re.match(rf"(?:{pattern})\Z", text):
            raise ValueError(f"{plain(text, 40)}: write {words}")
        return convert(text)

    return read


_read_line = _matching("[^\0\r\n#][^\0\r\n]*", "one line that begins with no #")  # for the records
_read_share = _matching(
    r"(100|\d{1,2})(\.\d+)?%|\d{1,4}(\.\d+)?d",
    "a share of the lifetime such as 25%, or days such as 10d",
)

# Each option that is remembered, and how one text is read; Options has their values in this order.
REMEMBERED = {
    "from": parse_source,
    "sni": host_name,
    "domain": parse_domain,
    "ca-file": _read_line,
    "deploy-hook": _read_line,
    "served-at": parse_served,
    "when": _matching("always|due", "always or due"),
    "warn": _read_share,
    "critical": _read_share,
    "timeout": _matching(r"(?!0+(\.0+)?\Z)\d{1,4}(\.\d+)?", "seconds", float),
    "enabled": _matching("yes|no", "yes or no"),
}


def _read_values(given, readers, defaults):
    """Return a named tuple like `defaults`, a field for each reader, of {key: [text, ...]}.

    A field whose default is a tuple may repeat; keys without a reader are skipped. ValueError(key,
    what is wrong).
    """
    values = dict(zip(readers, defaults))
    for key, texts in given.items():
        if key not in readers:
            continue
        repeats = isinstance(values[key], tuple)
        if len(texts) > 1 and not repeats:
            raise ValueError(key, "it takes one value")
        try:
            found = tuple(readers[key](text) for text in texts)
        except ValueError as error:
            raise ValueError(key, plain(error))
        values[key] = found if repeats else found[0]
    return defaults._make(values.values())


def parse_options(given):
    """Return the Options that {key: [text, ...]} gives; or ValueError(key, what is wrong)."""
    for key in given:
        if key not in REMEMBERED:
            raise ValueError(key, f"unknown key (known: {' '.join(REMEMBERED)})")
    return _read_values(given, REMEMBERED, NO_OPTIONS)


def merge_options(given, changes):
    """Return remembered options with the changes: an empty value forgets what was remembered."""
    merged = dict(given)
    for key, texts in changes.items():
        merged[key] = [text for text in texts if text]
        if not merged[key]:
            del merged[key]
    return merged


def config_flags(config):
    """Return the words with which a command finds the config dir, none for the default one."""
    return () if config == CONFIG_DIR else ("--config-dir", config)


def sources_of(lineage):
    """Return the Sources to ask for a lineage, in order."""
    return lineage.options.sources or (parse_source(lineage.name),)


def command_text(word, changes, extra=()):
    """Return a whole command, `word` being a NAME or a command, quoted for a shell."""
    words = ["certferry", word, *extra]
    for key, texts in changes.items():
        for text in texts:
            words += [f"--{key}", text]
    return " ".join(shell_quote(word) for word in words)


def _bad_line(path, number, what):
    """Return the Failure of a line in a record."""
    return Failure(None, f"{path} line {number}: {what}", "Correct it by hand")


def _read_record(text, path):
    """Return ({key: [text, ...]}, [the key that each line belongs to]) of a record; or Failure.

    KEY = VALUE lines, with what INI files have in common: texts below a key are indented deeper, #
    begins a comment line. Nothing is interpolated, for `date +%F` in a hook. configparser would
    cost 2 ms to import. Comments and blank lines belong to the key "".
    """
    found = {}
    owners = []
    key = ""
    key_indent = MAX_RECORD  # the first line is not below another, whatever its indent
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits inside hooks
        words = line.strip()
        if words[:1] in ("", "#"):
            owners.append("")
            continue
        indent = len(line) - len(line.lstrip())
        if indent <= key_indent:
            key, equals, words = [part.strip() for part in line.partition("=")]
            if not equals or len(key.split()) != 1 or "\0" in line:
                raise _bad_line(path, number, "not a KEY = VALUE line; there are no sections")
            if key in owners:
                raise _bad_line(path, number, f"{plain(key)} is given twice")
            key_indent = indent
        owners.append(key)
        if words:
            found.setdefault(key, []).append(words)
    return found, owners


def _parse_record(text, path, parse):
    """Return ({key: [text, ...]}, what parse() makes of that) of a record.

    Failure with file and line where it is wrong.
    """
    given, owners = _read_record(text, path)
    try:
        return given, parse(given)
    except ValueError as error:
        key, what = error.args
        raise _bad_line(path, owners.index(key) + 1, f"{plain(key)}: {what}")


def parse_conf(text, path):
    """Return ({key: [text, ...]}, Options) of a NAME.conf; Failure with file and line if wrong."""
    return _parse_record(text, path, parse_options)


def edit_conf(text, given, path):
    """Return the text of a NAME.conf with other options: comments, order and the rest are kept."""
    found, owners = _read_record(text, path)
    changed = [key for key in REMEMBERED if found.get(key) != given.get(key)]
    edited = ""
    for line, key in zip(text.rstrip("\n").split("\n"), owners):
        if key not in changed:
            edited += line + "\n"
    for key in changed:
        texts = given.get(key, [])
        if texts:
            # one text beside its key, several below it
            before = " " if len(texts) == 1 else "\n    "
            edited += before.join([f"{key} =", *texts]) + "\n"
    return edited.lstrip("\n")


@memoized  # a thousand lineages are looked at in the same second
def iso_time(seconds):
    """Return a time as ISO 8601 in UTC, or None for None."""
    if seconds is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@memoized  # many lineages, few times
def utc_seconds(text):
    """Return seconds since 1970 of YYYYMMDDhhmmssZ, or of ISO 8601 as iso_time(); or ValueError."""
    import datetime  # 1 ms; time has no such function, and a calendar of our own is longer

    match = re.match(r"(\d{4})-?(\d\d)-?(\d\d)T?(\d\d):?(\d\d):?(\d\d)Z\Z", text)
    if match is None:
        raise ValueError("no time in UTC")
    moment = datetime.datetime(*map(int, match.groups()), tzinfo=datetime.timezone.utc)
    return int(moment.timestamp())


# How a text of the state is read; what is None, 0 or empty is never written.
_STATE_READERS = {
    "result": str,
    "reason": str,
    "detail": str,
    "culprit": str,
    "since": utc_seconds,
    "runs": int,
    "good": utc_seconds,
    "source": str,
    "upstream-not-after": utc_seconds,
    "key-file": str,
    "told": str,
    "told-at": utc_seconds,
}


def parse_state(text, path):
    """Return the State of a NAME.state; Failure with file and line where it is damaged."""
    # what a later version may have written besides is skipped
    _, state = _parse_record(
        text, path, lambda given: _read_values(given, _STATE_READERS, NO_STATE)
    )
    return state


def format_state(state):
    """Return the text of a NAME.state; what does not apply is left out."""
    text = (
        "# What certferry saw last. The time of change of this file is the time of the last run.\n"
    )
    for (key, reader), value in zip(_STATE_READERS.items(), state):
        if value:
            text += f"{key} = {iso_time(value) if reader is utc_seconds else value}\n"
    return text


def parse_environment(text, path):
    """Return {KEY: VALUE} of the environment file; Failure with file and line where it is bad."""
    values = {}
    for number, line in enumerate(text.split("\n"), 1):
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
_SUBJECT_KEY = b"\x55\x1d\x0e"
_KEY_USAGE = b"\x55\x1d\x0f"
_ALTERNATIVE_NAME = b"\x55\x1d\x11"
_BASIC_CONSTRAINTS = b"\x55\x1d\x13"
_AUTHORITY_KEY = b"\x55\x1d\x23"
_EXTENDED_USAGE = b"\x55\x1d\x25"
_SERVER_AUTH = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01"
_CLIENT_AUTH = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02"

_KEY_KINDS = {  # the AlgorithmIdentifiers of keys that browsers take (RFC 3279, 5480, 8410)
    "300d06092a864886f70d0101010500": "RSA",
    "301306072a8648ce3d020106082a8648ce3d030107": "ECDSA P-256",
    "301006072a8648ce3d020106052b81040022": "ECDSA P-384",
    "301006072a8648ce3d020106052b81040023": "ECDSA P-521",
    "300506032b6570": "Ed25519",
    "300506032b6571": "Ed448",
}
_OTHER_KEY = "another curve or algorithm"

_SIGNATURES = (  # the AlgorithmIdentifiers of signatures with SHA-256, 384 or 512
    "30..(06092a864886f70d01010[bcd](0500)?"  # RSA (RFC 4055: the NULL may be missing)
    "|06092a864886f70d01010a30..a0..30..060960864801650304020[123].*"  # RSA-PSS
    r"|06082a8648ce3d04030[234]|06032b657[01])\Z"  # ECDSA, Ed25519 and Ed448
)

# A DNS name that can count: a wildcard is one whole leftmost label, not directly above a top-level
# domain (RFC 9525, 6.3).
_DNS_NAME = rf"(?:\*\.(?=[^.]+\.))?{HOST_NAME}"


def _elements(data):
    """Return [(tag, content, whole)] of the DER elements that the bytes are; ValueError else."""
    found = []
    start = 0
    while start < len(data):
        begin = start + 2
        if begin > len(data) or data[start] & 0x1F == 0x1F:
            raise ValueError("an element that is cut off, or a tag of several bytes")
        length = data[start + 1]
        if length >= 0x80:  # it tells how many bytes of length follow
            begin += length & 0x7F
            if not 1 <= length & 0x7F <= 3:
                raise ValueError("a length that is indefinite or over 16 MiB")
            length = int.from_bytes(data[start + 2 : begin], "big")
        end = begin + length
        if end > len(data):
            raise ValueError("an element longer than what holds it")
        found.append((data[start], data[begin:end], data[start:end]))
        start = end
    return found


def _sequence(data, *shapes):
    """Return the elements of a SEQUENCE's bytes; ValueError where their tags are none of `shapes`.

    Without a shape they may be anything.
    """
    outer = _elements(data)
    if len(outer) != 1 or data[0] != 0x30:
        raise ValueError("no DER sequence")
    found = _elements(outer[0][1])
    tags = bytes(tag for tag, _, _ in found)
    if shapes and tags not in shapes:
        raise ValueError("other elements than X.509 has there")
    return found


def _der_time(element):
    """Return the seconds of a UTCTime or GeneralizedTime as RFC 5280, 4.1.2.5 wants them."""
    tag, content, _ = element
    text = content.decode("latin-1")
    if tag == 0x17:  # a UTCTime is of the years 1950 to 2049
        text = ("20" if text < "50" else "19") + text
    return utc_seconds(text)


def _extensions(data):
    """Return {OID bytes: value bytes} of the Extensions in some DER."""
    values = {}
    for _, _, whole in _sequence(data):
        # an OID, perhaps a BOOLEAN (critical), an OCTET STRING
        parts = _sequence(whole, b"\x06\x04", b"\x06\x01\x04")
        oid = parts[0][1]
        if oid in values:
            raise ValueError("an extension that is given twice")
        values[oid] = parts[-1][1]
    return values


def _domains(value):
    """Return the names of a subject alternative name that can count, in its order."""
    names = []
    for tag, content, _ in _sequence(value):
        if tag == 0x82:
            name = content.decode("latin-1").lower()
            # a client compares an address with addresses alone
            if re.match(_DNS_NAME, name) and not is_address(name):
                names.append(name)
        elif tag == 0x87 and len(content) in (4, 16):
            import ipaddress  # 3 ms

            names.append(str(ipaddress.ip_address(content)))
    return tuple(names)


@memoized  # it is asked again about what is in service
def parse_certificate(der):
    """Return the Certificate that the DER bytes hold; ValueError where they hold none."""
    body, algorithm, _ = _sequence(der, b"\x30\x30\x03")
    # without the version, which version 1 does not write
    fields = [field for field in _elements(body[1]) if field[0] != 0xA0]
    # whether the rest is a certificate openssl says: it reads each new leaf before it counts
    if len(fields) < 6:
        raise ValueError("a certificate with parts missing")
    serial, _, issuer, validity, subject, key = fields[:6]
    not_before, not_after = map(_der_time, _elements(validity[1]))
    extensions = {}
    for tag, content, _ in fields[6:]:
        if tag == 0xA3:
            extensions = _extensions(content)
    return Certificate(
        der,
        serial[1].hex(),
        not_before,
        not_after,
        subject[2],
        issuer[2],
        key[2],
        algorithm[2],
        extensions,
        _domains(extensions.get(_ALTERNATIVE_NAME, b"\x30\0")),
    )


def fingerprint(der):
    """Return the SHA-256 of some DER as hexadecimal digits."""
    import hashlib  # loads libcrypto, 3 ms

    return hashlib.sha256(der).hexdigest()


def covers(names, wanted):
    """Say whether one of a certificate's names (`domains`) covers `wanted`.

    A wildcard stands for exactly one label (RFC 9525, 6.3); one that is wanted is covered by itself
    alone.
    """
    return wanted in names or "*." + wanted.partition(".")[2] in names


def describe_name(name):
    """Return organization and common name of a distinguished name (DER bytes) as text to show."""
    found = []
    for kind in (b"\x06\x03\x55\x04\x0a", b"\x06\x03\x55\x04\x03"):
        value = name.partition(kind)[2]
        if len(value) > 2:
            found.append(value[2 : 2 + value[1]].decode("utf-8", "replace"))
    return " ".join(found) or "an unnamed issuer"


def key_kind(public_key):
    """Return what a person calls a SubjectPublicKeyInfo: `RSA 2048`, `ECDSA P-256`, `Ed25519`."""
    try:
        algorithm, bits = _sequence(public_key, b"\x30\x03")
        kind = _KEY_KINDS[algorithm[2].hex()]
        if kind != "RSA":
            return kind
        modulus = _sequence(bits[1][1:], b"\x02\x02")[0][1]
        return f"RSA {int.from_bytes(modulus, 'big').bit_length()}"
    except (KeyError, ValueError):
        return _OTHER_KEY


def describe_key(public_key):
    """Return the kind and fingerprint of a public key as messages show them."""
    return f"{key_kind(public_key)} sha256:{fingerprint(public_key)[:16]}"


def for_clients(certificate):
    """Say whether a certificate may be used by a TLS client too: mail servers, mutual TLS."""
    return _CLIENT_AUTH in certificate.extensions.get(_EXTENDED_USAGE, _CLIENT_AUTH)


def algorithm_flaw(certificate):
    """Return why browsers refuse the key or the signature of a certificate, or ""."""
    kind = key_kind(certificate.public_key)
    is_small = kind.startswith("RSA") and int(kind[4:]) < 2048
    if is_small or kind == _OTHER_KEY:
        return f"has a key that browsers refuse ({kind})"
    if not re.match(_SIGNATURES, certificate.algorithm.hex()):
        return "is signed with an algorithm that browsers refuse (SHA-1, MD5 or an unusual one)"
    return ""


def _may(certificate, bit):
    """Say whether the key usage allows what this bit stands for; without one all is allowed."""
    usage = certificate.extensions.get(_KEY_USAGE, b"\x03\x02\0\xff")
    return int.from_bytes(usage[3:4], "big") & bit != 0


def _is_authority(certificate):
    """Say whether the basic constraints make it an authority's certificate."""
    return certificate.extensions.get(_BASIC_CONSTRAINTS, b"")[2:5] == b"\x01\x01\xff"


def leaf_flaw(leaf):
    """Return why clients refuse a leaf whatever its root, or "": openssl accepts some of these."""
    if _is_authority(leaf):
        return "is an authority's certificate, not a server's"
    if _SERVER_AUTH not in leaf.extensions.get(_EXTENDED_USAGE, _SERVER_AUTH):
        return "is not meant for servers (its extended key usage lacks serverAuth)"
    if not _may(leaf, 0x80):  # digitalSignature is bit 0 (RFC 5280, 4.2.1.3)
        return "may not sign handshakes (its key usage lacks digitalSignature)"
    return ""


def issuer_flaw(issuer):
    """Return why clients refuse an issuer whatever its root, or ""."""
    if not _is_authority(issuer):
        return "is no authority's"
    if not _may(issuer, 0x04):  # keyCertSign is bit 5
        return "may not sign certificates (its key usage)"
    return ""


def chain_flaw(leaf, chain, public_trust):
    """Return why clients refuse a leaf or its chain (Certificates) whatever the root, or "".

    `public_trust` adds browsers' rules on algorithms: a private authority decides its own.
    """
    for number, certificate in enumerate([leaf, *chain]):
        name = f"issuer {number} of the chain" if number else "the leaf"
        flaw = issuer_flaw(certificate) if number else leaf_flaw(certificate)
        if public_trust and not flaw:
            flaw = algorithm_flaw(certificate)
        if flaw:
            return f"{name} {flaw}"
    return ""


def _may_have_issued(issuer, certificate):
    """Say whether names and key identifiers allow that: openssl goes by the same."""
    if issuer.subject != certificate.issuer:
        return False
    wanted = certificate.extensions.get(_AUTHORITY_KEY, b"")
    if wanted[2:3] != b"\x80":  # it names no key
        return True
    # an issuer without an identifier may be the one
    return issuer.extensions.get(_SUBJECT_KEY, b"")[2:] in wanted


def possible_chains(leaf, others):
    """Return the possible chains for a leaf, shorter ones first: issuers in order, no root.

    `others` and the chains' members are Certificates. At most 64: authorities may have certified
    each other. Nothing is verified: openssl says which of them holds.
    """
    # a root issued itself; what another key of the same name issued (a rollover) is none
    issuers = [each for each in others if not _may_have_issued(each, each)]
    chains = []
    unfinished = [(leaf,)]
    while unfinished and len(chains) < 64:
        path = unfinished.pop(0)
        chains.append(path[1:])
        for issuer in issuers:
            if issuer not in path and _may_have_issued(issuer, path[-1]):
                unfinished.append((*path, issuer))
    return chains


def candidate_chains(leaf, others, now):
    """Return the chains to try for a leaf: the longest first, at most sixteen.

    Those with a certificate that is weak or not valid now come last: openssl may stop at a root
    below it, and find nothing wrong.
    """
    # a bad certificate above a good chain condemns nothing: the shorter chains are tried too
    bad = [
        each
        for each in others
        if algorithm_flaw(each) or not each.not_before <= now <= each.not_after
    ]
    chains = possible_chains(leaf, others)
    chains.sort(key=lambda chain: (any(each in bad for each in chain), -len(chain)))
    return chains[:MAX_CERTIFICATES]


def to_pem(ders):
    """Return certificates (DER) as PEM bytes with lines of 64 characters (RFC 7468)."""
    lines = []
    for der in ders:
        lines.append(b"-----BEGIN CERTIFICATE-----\n")
        for at in range(0, len(der), 48):  # 48 bytes make such a line
            lines.append(binascii.b2a_base64(der[at : at + 48]))
        lines.append(b"-----END CERTIFICATE-----\n")
    return b"".join(lines)


def pem_blocks(data):
    """Return [(whole block, label, content)] of PEM text, in linear time whatever it is."""
    # no five dashes inside, so that no BEGIN without its END has all the rest searched for it;
    # some single ones: DEK-Info of a key that is encrypted as of old
    return re.findall(
        rb"(-----BEGIN ([^-]{1,60})-----([^-]*(?:-(?!----)[^-]*){0,64})-----END \2-----)", data
    )


def _decode(content):
    """Return the DER of a certificate's base64; or ValueError."""
    text = b"".join(content.split())
    try:
        der = binascii.a2b_base64(text)
    except ValueError:
        der = b""
    # a2b_base64 skips what is no base64: the way back tells
    if not der or binascii.b2a_base64(der, newline=False) != text:
        raise ValueError("a certificate whose base64 is broken")
    return der


def read_pem(data, most=MAX_CERTIFICATES):
    """Return (certificates as DER, private key as Secret or None) of PEM text or one DER file.

    Text around the blocks, CRLF, any order and other blocks are allowed. A certificate that is
    given twice counts once. ValueError with what is wrong.
    """
    if data[:1] == b"\x30" and b"-----BEGIN " not in data:
        return [data], None
    ders = {}  # in the order of the text
    key = None
    for block, label, content in pem_blocks(data):
        if label in (b"CERTIFICATE", b"X509 CERTIFICATE"):
            ders[_decode(content)] = True
        elif label == b"TRUSTED CERTIFICATE":
            raise ValueError("it holds a TRUSTED CERTIFICATE, which only openssl reads")
        elif label.endswith(b"PRIVATE KEY"):
            block = block.replace(b"\r\n", b"\n") + b"\n"
            if key not in (None, block):
                raise ValueError("more than one private key")
            key = block
    if len(ders) > most:
        raise ValueError(f"more than {most} certificates")
    return list(ders), Secret(key) if key else None


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------

_NOBODY = 65534  # where no user or group of that name is
# A process can trace another one of its user and group. What talks to the network must not be able
# to forge what openssl says, so openssl has a group of its own.
_OPENSSL_GROUP = 65532
_GRACE = 5  # seconds beyond its own deadlines that a process is waited for, on a busy machine
_MAX_HELD = 1 << 27  # bytes of answers that wait to be asked for; 10,000 lineages hold half of that
_MAX_ERRORS = 4096  # bytes of what a process says on standard error, its end, that are kept
_PIPE_HOLDS = 1 << 20  # bytes at most: one read takes all that is in it


# The reasons that a process is believed: nothing that would be a verdict is among them.
_BELIEVED = {
    "unreachable": "unreachable",
    "timeout": "timeout",
    "unproven": "unproven",
    "malformed": "malformed",
    "local": None,
}


class Answer(collections.namedtuple("Answer", "reason message hint address data")):
    """What a process of our own answers.

    `reason` is "" where `data` holds what was asked for; else it is a Failure's, "local" for None.
    """

    @property
    def failure(self):
        """Return the Failure that it tells."""
        return Failure(_BELIEVED.get(self.reason, "malformed"), self.message, self.hint)


Answer.__new__.__defaults__ = ("", "", "", "", b"")


def make_usual():
    """See that this process has what others count on, whoever started it.

    A closed standard file would be replaced by the next pipe or key file. Where SIGCHLD is ignored
    no exit status is to be had, and Python takes it for 0.
    """
    import _signal  # built in; signal takes half a millisecond

    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


@memoized
def _nobody():
    """Return (uid, gid) of the user that owns nothing."""
    import pwd

    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        return _NOBODY, _NOBODY
    # never root's, whatever stands there
    return entry.pw_uid or _NOBODY, entry.pw_gid or _NOBODY


def _forbid(*limits):
    """Let this process have none of what these limits are for, nor what it starts."""
    try:
        import resource
    except ImportError:
        return  # a second line of defence, which Debian 11's python3-minimal does not have
    for limit in limits:
        resource.setrlimit(getattr(resource, limit), (0, 0))


def _confine(group):
    """Leave no core and no file, and as root become nobody in that group for good; or Failure."""
    # not AS, which kills threads, nor NPROC, which counts all processes of nobody
    _forbid("RLIMIT_CORE", "RLIMIT_FSIZE")
    if os.geteuid() != 0:
        return
    try:
        # groups first: whoever is nobody can't give them up; root's calls change the saved ids too
        capability = "CAP_SETGID"
        os.setgroups([])
        os.setgid(group)
        capability = "CAP_SETUID"
        os.setuid(_nobody()[0])
    except OSError as error:
        raise Failure(
            "unreachable",
            f"cannot become nobody: {words_of(error)}, {capability} is missing",
            f"Give root {capability} here (a container or a unit may take it away)",
        )
    try:
        os.setuid(0)
    except OSError:
        return
    raise Failure("unreachable", "could become root again", "Is this kernel's root a usual one?")


def _confine_openssl():
    """Become what openssl runs as: no process of its own may outlive it and trace the next one."""
    _confine(_OPENSSL_GROUP)
    # set by whoever is nobody already, it forbids to fork and not to execute
    _forbid("RLIMIT_NPROC")


def _check_dev_fd(descriptor):
    """See that the system shows a process its open descriptors; Failure where it does not."""
    if not os.path.exists(f"/dev/fd/{descriptor}"):
        raise Failure(
            None,
            "/dev/fd does not show the open files of a process",
            "Mount fdescfs on /dev/fd (FreeBSD), or /proc (Linux)",
        )


def _give_up(modules, jobs, answers):
    """Give up what the parent has and a child needs not: terminal, folder, files, secrets, root.

    Only the descriptors `jobs` and `answers` stay. Failure where that is not possible.
    """
    os.setsid()  # with root's terminal it could push keystrokes into root's shell
    os.chdir("/")  # nobody may read by relative path what lies below a closed folder
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    _check_dev_fd(jobs)
    for name in os.listdir("/dev/fd"):
        if int(name) not in (0, 1, 2, jobs, answers):
            quietly(os.close, int(name))  # the one that listed them is closed already
    # the log is a file that nobody can't write
    for name in (*CREDENTIALS, "SSLKEYLOGFILE"):
        os.environ.pop(name, None)
    for module in modules:  # now, for Python's own folder may be closed to nobody
        try:
            __import__(module)
        except ImportError as error:
            hint = "Install python3, not only python3-minimal"
            raise Failure(None, f"this Python has no module {error.name}", hint)
    _confine(_nobody()[1])


def _pack(*fields):
    """Return a line for a pipe: texts or bytes, with NUL between them, as base64."""
    return binascii.b2a_base64(b"\0".join(os.fsencode(field) for field in fields))


def _answer_of(handler, *arguments):
    """Return what a handler returns, or the Answer that tells how it failed."""
    try:
        return handler(*arguments)
    except Failure as failure:
        return Answer(failure.reason or "local", str(failure), failure.hint)
    except Exception as error:  # without an answer the parent would wait for its deadline
        words = f"cannot be asked ({type(error).__name__}: {error})"
        return Answer("unreachable", words, "Please report this")


def _end():
    """End this process with all that it started: an openssl that waits for an answer, maybe."""
    quietly(os.killpg, os.getpid(), SIGKILL)
    os._exit(0)


def _be_child(handler, modules, jobs, answers):
    """Be a child: answer a line a job, some of them side by side, until no more can come.

    What prevents that is told as the answer to the job number 0, which nobody gave.
    """
    import _thread  # built in; threading takes 2 ms

    to_read = open(jobs, "rb")
    to_write = open(answers, "wb")
    reading = _thread.allocate_lock()
    writing = _thread.allocate_lock()

    def write(number, answer):
        """Write an Answer to the pipe, as Child reads it."""
        texts = [plain(text) for text in answer[:-1]]
        line = _pack(number, *texts, answer.data[: MAX_OFFER + 1])
        with writing:
            to_write.write(line)
            to_write.flush()

    def work():
        """Answer a line a job."""
        try:
            while True:
                with reading:
                    line = to_read.readline()
                if not line:
                    return
                number, *texts = os.fsdecode(binascii.a2b_base64(line)).split("\0")
                write(number, _answer_of(handler, texts))
        finally:
            _end()

    prevented = _answer_of(_give_up, modules, jobs, answers)
    if prevented is not None:
        write("0", prevented)
        return
    for _ in range(SIDE_BY_SIDE - 1):
        _thread.start_new_thread(work, ())
    work()


class Child:
    """A process of our own that answers a line a job, as the network process does.

    It is believed in nothing but bytes: what breaks the protocol, floods or misses the deadline of
    an answer ends it, and every answer that it still owed. Started while there are no threads.
    """

    def __init__(self, handler, modules=()):
        """Fork it. It imports `modules`, becomes nobody, and calls handler(texts) for each job."""
        jobs, self.to_jobs = os.pipe()
        self.from_answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _be_child(handler, modules, jobs, answers)
            finally:
                _end()
        os.close(jobs)
        os.close(answers)
        os.set_blocking(self.to_jobs, False)
        self.unsent = b""
        self.unread = b""
        self.seconds = {}  # by number, from "1": what a job may take, 0 once it is answered
        self.answers = {}  # by number, those that were not asked for yet
        self.failure = None

    @property
    def broken(self):
        """Return why no more answers can come, "" while all is well."""
        return str(self.failure or "")

    def submit(self, texts, seconds):
        """Give it a job that may take that long; return the number that answer() takes."""
        number = f"{len(self.seconds) + 1}"
        self.seconds[number] = seconds
        self.unsent += _pack(number, *texts)
        self._send()
        return number

    def answer(self, number):
        """Return the Answer to a job, waiting for it; Failure where it tells one or none comes."""
        # Jobs are begun in their order, so many at a time. This deadline is fixed: whatever comes
        # meanwhile does not move it.
        submitted = list(self.seconds.values())[: int(number)]
        owed = [seconds for seconds in submitted if seconds]
        rounds = 1 + len(owed) // SIDE_BY_SIDE
        deadline = time.monotonic() + rounds * max(owed, default=0) + _GRACE
        while number not in self.answers and self.failure is None:
            left = max(0, deadline - time.monotonic())
            writing = [self.to_jobs] if self.unsent else []
            readable, writable, _ = select.select([self.from_answers], writing, [], left)
            if writable:
                self._send()
            if left == 0:
                self._fail("gave no answer in time")
            elif readable:
                self._read()
        if self.failure is not None:
            raise self.failure
        answer = self.answers.pop(number)
        if answer.reason:
            raise answer.failure
        return answer

    def close(self):
        """End it: it holds nothing that matters."""
        os.close(self.to_jobs)
        os.close(self.from_answers)
        quietly(os.killpg, self.pid, SIGKILL)  # which it may not lead yet
        os.kill(self.pid, SIGKILL)
        quietly(os.waitpid, self.pid, 0)

    def _fail(self, words):
        """Believe nothing more of it."""
        hint = "Run it again; please report it if that happens again"
        self.failure = Failure("unreachable", f"cannot be asked: its process {words}", hint)

    def _send(self):
        """Write what the pipe takes of the jobs: the child may be busy, and is not waited for."""
        try:
            written = os.write(self.to_jobs, self.unsent)
            self.unsent = self.unsent[written:]
        except (BlockingIOError, BrokenPipeError):
            pass  # what it said before it died is still to be read

    def _read(self):
        """Read what it says next, and keep the answers."""
        piece = os.read(self.from_answers, 65536)
        if not piece:
            self._fail("died")
            return
        *lines, self.unread = (self.unread + piece).split(b"\n")
        for line in lines:
            self._keep(line)
        held = sum(len(answer.data) for answer in self.answers.values())
        if held > _MAX_HELD or len(self.unread) > 2 * MAX_OFFER:
            self._fail("floods")

    def _keep(self, line):
        """Keep the Answer of a line if it is owed; believe nothing more after any other line."""
        try:
            *texts, data = binascii.a2b_base64(line).split(b"\0", 5)
            number, reason, message, hint, address = [plain(os.fsdecode(text)) for text in texts]
            answer = Answer(reason, message, hint, address, data)
        except ValueError:
            number = ""  # what is no answer answers no job
        if number == "0":
            self.failure = answer.failure
        elif self.seconds.get(number):
            self.seconds[number] = 0
            self.answers[number] = answer
        else:
            self._fail("said what was not asked")


def in_own_process(function, seconds):
    """Return the bytes that function() returned in a process of its own; Failure as raised there.

    Failure too where it takes more than these seconds.
    """
    child = Child(lambda _: Answer(data=function()), ["ssl"])
    try:
        return child.answer(child.submit([], seconds)).data
    finally:
        child.close()


def in_time(function, seconds):
    """Return what function() returns; TimeoutError after `seconds`, though nothing interrupts it.

    For processes of our own: it has a thread to itself.
    """
    import _thread

    ended = _thread.allocate_lock()
    ended.acquire()
    results = []

    def run():
        """Call the function, and keep what it returned or raised."""
        try:
            results.append(function())
        except Exception as error:
            results.append(error)
        ended.release()

    _thread.start_new_thread(run, ())
    if not ended.acquire(True, max(0.01, seconds)):
        raise TimeoutError("timed out")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _converse(process, feeds, deadline, pass_on):
    """Return (output, the end of its errors) of a process that is fed {file: bytes}.

    It is over when the process itself has ended or has closed both. TimeoutError when the deadline
    (monotonic seconds) passes, ValueError where its output is more than an offer may be.
    """
    output = bytearray()
    errors = bytearray()
    reading = {process.stdout: output, process.stderr: errors}
    if pass_on is not None:  # both come by one pipe, and only their end is kept
        reading = {process.stdout: errors}
    has_ended = False
    while reading and not has_ended:
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        has_ended = process.poll() is not None  # asked first: what it said last is still read
        # what it left running gets time to turn its output elsewhere: SIGPIPE would end it
        patience = 0.2 if has_ended else 0.05
        readable, writable, _ = select.select(list(reading), list(feeds), [], patience)
        for file in writable:
            # so much fits into a pipe that select calls writable
            written = file.write(feeds[file][: select.PIPE_BUF])
            feeds[file] = feeds[file][written:]
            if not feeds[file]:
                del feeds[file]
                file.close()
        for file in readable:
            piece = os.read(file.fileno(), _PIPE_HOLDS)
            reading[file] += piece
            if not piece:
                del reading[file]
            elif pass_on is not None:
                pass_on(piece)
        del errors[:-_MAX_ERRORS]
        if len(output) > MAX_OFFER:
            raise ValueError(f"more than {MAX_OFFER} bytes")
    return bytes(output), bytes(errors)


def run_process(command, environment, seconds, feeds=(), pass_on=None, **options):
    """Return (exit status, output, the end of its errors) of a command, run in the folder /.

    `feeds` are {file to write to: bytes}, `options` are Popen's. With pass_on(bytes) what it says
    is passed on as it comes, and counts as errors. TimeoutError and ValueError as _converse() has
    them; it is killed then.
    """
    import subprocess  # 4 ms

    deadline = time.monotonic() + seconds
    options.setdefault("stdin", subprocess.DEVNULL)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if pass_on is None else subprocess.STDOUT,
        env=environment,
        cwd="/",
        bufsize=0,
        **options,
    ) as process:
        try:
            output, errors = _converse(process, dict(feeds), deadline, pass_on)
            # it may have closed its output, and sleep
            status = process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError("timed out")
        finally:
            if process.poll() is None:
                quietly(os.killpg, process.pid, SIGKILL)  # what it started, if it leads a session
                process.kill()
    return status, output, errors


def last_line(output):
    """Return the last line of what a process said, as text to quote."""
    return plain(output.decode("utf-8", "replace").strip().split("\n")[-1], 120)


def search_path(environment):
    """Return the PATH of an environment with the folders that hold an administrator's commands."""
    path = environment.get("PATH")
    return f"{path}:{SAFE_PATH}" if path else SAFE_PATH


def command_environment(environment, config):
    """Return the environment of an administrator's command: the sbin folders are found.

    It tells a certferry that the command starts whose run holds the lock of the config dir.
    """
    return dict(environment, PATH=search_path(environment), CERTFERRY_HOOK_OF=config)


def openssl_environment(system_roots):
    """Return the environment of an openssl process: nothing of ours but the trust store, if any."""
    environment = {"PATH": search_path(os.environ), "LC_ALL": "C"}  # its words are looked at
    # -CAfile alone adds to the system's roots: with these it replaces them
    for name, nothing in (("SSL_CERT_FILE", os.devnull), ("SSL_CERT_DIR", "/nonexistent")):
        if not system_roots:
            environment[name] = nothing
        elif name in os.environ:
            environment[name] = os.environ[name]
    return environment


def run_openssl(arguments, data=b"", files=(), trusted=False):
    """Run the openssl command; return (exit status, output, errors), the last two as bytes.

    `data` goes to its standard input, each of `files` (option, bytes) to a pipe that the option
    names; a -CAfile is all that it trusts. It is nobody unless its input is `trusted`. Failure
    where it cannot be run or does not end, ValueError where it prints too much.
    """
    import subprocess

    is_confined = os.geteuid() == 0 and not trusted
    command = ["openssl", *arguments]
    to_read = []
    feeds = {}
    for option, content in [("", data), *files]:
        read, write = os.pipe()
        to_read.append(read)
        feeds[open(write, "wb", 0)] = memoryview(content)
        if option:
            if is_confined:
                os.fchown(read, _nobody()[0], -1)  # a pipe of root's is closed to nobody
            _check_dev_fd(read)
            command += [option, f"/dev/fd/{read}"]
    try:
        return run_process(
            command,
            openssl_environment(system_roots="-CAfile" not in command),
            OPENSSL_SECONDS,
            feeds,
            stdin=to_read[0],
            pass_fds=to_read,
            # with root's terminal it could type into root's shell
            start_new_session=True,
            # safe because whoever comes here as root has no threads
            preexec_fn=_confine_openssl if is_confined else None,
        )
    except TimeoutError:
        words = f"openssl {arguments[0]} did not end in {OPENSSL_SECONDS} s"
        raise Failure(None, words, "Is this host overloaded? Run it again")
    except subprocess.SubprocessError:
        hint = "Give root CAP_SETUID and CAP_SETGID here"
        raise Failure(None, "openssl cannot be run as nobody", hint)
    except OSError as error:
        words = f"there is no openssl command here that runs ({plain(words_of(error), 80)})"
        raise Failure(None, words, "Install the package openssl")
    finally:
        for read in to_read:
            os.close(read)
        for file in feeds:
            file.close()


def _public_key(pem):
    """Return the DER of a PUBLIC KEY that openssl printed, or None where it printed none."""
    for _, label, content in pem_blocks(pem):
        if label == b"PUBLIC KEY":
            return binascii.a2b_base64(content)
    return None


@memoized
def leaf_public_key(der):
    """Return the public key (DER) of a certificate (DER) as openssl prints it, or None."""
    return _public_key(run_openssl(["x509", "-pubkey", "-noout"], to_pem([der]))[1])


def public_half(pem, trusted):
    """Return the public key (DER) of a private key (PEM bytes); ValueError with why not, in words.

    `trusted` is for a key of this host; a key that came with an offer is read unprivileged.
    """
    if b"ENCRYPTED" in pem:
        raise ValueError("it is encrypted: certferry asks no passphrase, nor do servers at boot")
    # -passin, so that nothing ever prompts; -inform, because servers read no DER
    arguments = ["pkey", "-inform", "PEM", "-pubout", "-passin", "pass:"]
    status, output, _ = run_openssl(arguments, pem, trusted=trusted)
    public_key = _public_key(output)
    if status != 0 or public_key is None:
        raise ValueError("it holds no private key, or one that openssl cannot read")
    return public_key


def open_pkcs12(data):
    """Return the PEM bytes inside a PKCS#12 container with an empty password; or ValueError."""
    # OpenSSL 3 keeps containers with RC2 and 3DES behind a switch, which others do not have
    for switches in ([], ["-legacy"]):
        arguments = ["pkcs12", "-nodes", "-passin", "pass:", *switches]
        status, output, _ = run_openssl(arguments, data)
        if status == 0:
            return output
    raise ValueError("a PKCS#12 container that openssl cannot open without a password")


@memoized
def _knows_auth_level():
    """Say whether `openssl verify` has the option -auth_level; LibreSSL's has not."""
    status, _, _ = run_openssl(["verify", "-auth_level", "2", "-help"])
    if status not in (0, 1):  # killed, say: that must not make the rules weaker
        raise Failure(None, f"openssl verify ended with status {status}")
    return status == 0


def _closed_store():
    """Return the path of what nobody can't read of the system's trust store, or ""."""
    _, output, _ = run_openssl(["version", "-d"])
    folder = re.sub(r'^OPENSSLDIR: "|"\s*$', "", os.fsdecode(output))
    roots = os.environ.get("SSL_CERT_DIR", f"{folder}/certs")

    def first_closed():
        """Return the first path that this process may not read, as bytes, or none."""
        paths = [roots, os.environ.get("SSL_CERT_FILE", f"{folder}/cert.pem")]
        if os.access(roots, os.R_OK):
            paths += [f"{roots}/{name}" for name in os.listdir(roots)]
        for path in paths:
            try:
                open(path, "rb").close()
            except PermissionError:
                return os.fsencode(path)
            except OSError:
                pass  # a folder, or it is not there
        return b""

    return os.fsdecode(in_own_process(first_closed, OPENSSL_SECONDS))


def _describe_rootless(words, chain, roots):
    """Return (what is wrong, hint) of a chain that leads to no trusted root."""
    what = f"it leads to no trusted root ({words})"
    if roots is not None:
        if not any(root.subject == root.issuer for root in roots):
            return what, "The --ca-file holds no root: give the root, not an intermediate"
        return what, "Is the --ca-file that of its authority?"
    closed = _closed_store()
    if closed:
        return f"{what}: the user nobody may not read {closed}", f"chmod a+rX {shell_quote(closed)}"
    if not chain:
        return what, "Serve fullchain.pem there, or give --ca-file for a private authority"
    return what, "Give --ca-file for a private authority (or is ca-certificates missing here?)"


def _describe_refusal(errors, chain, roots):
    """Return (what is wrong, hint) of what `openssl verify` says of a chain."""
    # at the beginning of a line only: subjects can hold any text
    match = re.search(r"(?m)^error (\d+) at (\d+) depth lookup: ?(.*)$", errors)
    if match is None:
        return "openssl refuses it", "Look at its chain"
    number, depth, words = match.groups()
    # a subtree is what openssl calls a name constraint
    words = plain(words).replace("subtree", "name constraints")
    if number in ("2", "18", "19", "20", "21", "27"):  # X509_V_ERR: no issuer, no root
        return _describe_rootless(words, chain, roots)
    what = "the leaf" if depth == "0" else f"issuer {depth} of the chain"
    return f"{what} is refused ({words})", "See to it on the upstream"


def verify_chain(leaf, chain, roots, now):
    """Return None where leaf and chain lead to a trusted root at the time `now`, else why not.

    That is (what is wrong, hint). `chain` are the issuers, `roots` what replaces the system's
    store, None means that store; all are Certificates.
    """
    # not -x509_strict: it refuses roots that everybody has
    arguments = ["verify", "-purpose", "sslserver", "-attime", f"{now}"]
    if _knows_auth_level():  # where not, our own rules cover it
        arguments += ["-auth_level", "2"]
    files = []
    if roots is not None:
        files.append(("-CAfile", to_pem(root.der for root in roots)))
    if chain:
        files.append(("-untrusted", to_pem(issuer.der for issuer in chain)))
    status, output, errors = run_openssl(arguments, to_pem([leaf.der]), files)
    if status == 0:
        return None
    words = (errors + b"\n" + output).decode("ascii", "replace")
    return _describe_refusal(words, chain, roots)


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------

TLS_13_ONLY = "TLS 1.3 only"  # said of a server that could not be asked for our type of key

_MAX_SAID = 16384  # bytes of one answer before TLS: an EHLO's has 1 KiB, XMPP's features have 4
_MAX_ADDRESSES = 8  # of one host that are tried

# For each type of key: the ciphers to exclude so that a server which has both types can't show the
# other one, and the algorithm as it stands in a certificate.
_TYPES = {
    "RSA": (":!aECDSA", b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"),
    "ECDSA": (":!aRSA", b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"),
}


class Job(collections.namedtuple("Job", "kind host port timeout server_name key_type role")):
    """A handshake to make.

    `server_name` is the name to ask for (SNI). `key_type` is that of the local key: a server that
    shows another one is asked for it. `role` is upstream, default (an upstream that nobody named,
    and that this very machine can't be) or service (a local one, asked again after a timeout).
    """


def named(text, failure):
    """Return a Failure that begins with the source's text, unless this host lacks something."""
    if failure.reason is None:
        return failure
    return Failure(failure.reason, f"{text} {failure}", failure.hint)


def _left(deadline):
    """Return the seconds until a deadline (monotonic); TimeoutError where it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


# What is said before TLS. A dialogue's steps are (what we say, how long the answer to it is, how a
# good one begins). The second is a function of what was heard so far, and returns more than that
# as long as more must come. {host} and {name} are filled in.


def _as_long_as(pattern):
    """Return a function that measures an answer by a pattern that a whole one matches."""
    match_of = re.compile(pattern, re.DOTALL).match

    def measure(heard):
        """Return the length of the answer, more than was heard while it is not whole."""
        match = match_of(heard)
        return match.end() if match else len(heard) + 1

    return measure


def _measure_ber(heard):
    """Return the length of a BER element, header and all."""
    if len(heard) < 2:
        return 2
    length = heard[1]
    begin = 2
    if length >= 0x80:  # the long form: Active Directory writes even small lengths in four bytes
        begin += length - 0x80
        length = int.from_bytes(heard[2:begin], "big")
    return begin + length


def _measure_mysql(heard):
    """Return the length of a MySQL packet: three bytes say it, the fourth counts packets."""
    return 4 + int.from_bytes(heard[:3], "little")


_NO_ANSWER = _as_long_as(b"")
_ONE_LINE = _as_long_as(rb"[^\n]*\n")
# the lines of an answer begin NNN-, its last one NNN and a blank (RFC 5321, RFC 959); between them
# FTP's may begin with anything; a line without a number is an answer, too, if not a good one
_NUMBERED = _as_long_as(
    rb"(\d{3})-[^\n]*\n(?:(?!\1[ \r\n])[^\n]*\n)*\1(?:[ \r][^\n]*)?\n"
    rb"|\d{3}(?!-)[^\n]*\n|(?!\d{3})[^\n]*\n"
)
_TAGGED = _as_long_as(rb"(?:\*[^\n]*\n)*[^*\n][^\n]*\n")  # IMAP tells other things meanwhile
_FEATURES = _as_long_as(
    rb".*?(</(\w+:)?features\s*>|<(\w+:)?features\s*/>|</(\w+:)?(error|stream)>)"
)
_ELEMENT = _as_long_as(rb"\s*<[^>]*(/>|>\s*</[^>]*>)")
# MySQL's protocol 10: a version that ends with NUL, 4 bytes of thread, 8 of a challenge, NUL, and
# the lower flags, whose second byte has the one for TLS, 0x08
_GREETING = (
    rb".{4}\x0a[^\0]*\0.{14}[\x08-\x0f\x18-\x1f\x28-\x2f\x38-\x3f\x48-\x4f\x58-\x5f\x68-\x6f"
    rb"\x78-\x7f\x88-\x8f\x98-\x9f\xa8-\xaf\xb8-\xbf\xc8-\xcf\xd8-\xdf\xe8-\xef\xf8-\xff]"
)
_STREAM = (
    "<?xml version='1.0'?><stream:stream to='{name}' version='1.0' xmlns='jabber:client' "
    "xmlns:stream='http://etherx.jabber.org/streams'>"
)
# The names are those of DEFAULT_PORTS, and are said to s_client as they are (-starttls).
_DIALOGUES = {
    "tls": (),
    "smtp": (
        ("", _NUMBERED, b"220"),
        ("EHLO {host}\r\n", _NUMBERED, b"250"),
        ("STARTTLS\r\n", _NUMBERED, b"220"),
    ),
    "imap": (
        ("", _ONE_LINE, rb"\* (OK|PREAUTH)"),
        ("a STARTTLS\r\n", _TAGGED, rb"(?:\*[^\n]*\n)*a OK"),
    ),
    "pop3": (
        ("", _ONE_LINE, rb"\+OK"),
        ("STLS\r\n", _ONE_LINE, rb"\+OK"),
    ),
    "ftp": (
        ("", _NUMBERED, b"220"),
        ("AUTH TLS\r\n", _NUMBERED, b"234"),
    ),
    "ldap": (  # an extended request (RFC 4511, 4.14), answered by one with the result 0
        (
            "\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037",
            _measure_ber,
            rb"\x30.{1,5}\x02\x01\x01\x78.{1,5}\x0a\x01\0",  # the lengths take up to five bytes
        ),
    ),
    "xmpp": (
        (_STREAM, _FEATURES, rb".*<starttls[^>]*urn:ietf:params:xml:ns:xmpp-tls"),
        (
            "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
            _ELEMENT,
            rb"\s*<proceed",
        ),
    ),
    "postgres": (("\0\0\0\x08\x04\xd2\x16\x2f", _as_long_as(b"."), b"S"),),
    "mysql": (
        ("", _measure_mysql, _GREETING),
        ("\x20\0\0\x01\x85\xae\x7f\0\0\0\0\x01\x21" + "\0" * 23, _NO_ANSWER, b""),
    ),
}


def _own_name(connection):
    """Return the name that this host gives itself in an EHLO, or the address as a literal."""
    import socket

    name = socket.gethostname().lower()
    if "." in name and re.match(HOST_NAME, name):
        return name
    address = connection.getsockname()[0].partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _hear(connection, measure, deadline):
    """Return what is answered, at least all of an answer; or Failure."""
    heard = b""
    hint = "Check the protocol and the port"
    while measure(heard) > len(heard):
        if len(heard) > _MAX_SAID:
            raise Failure("unreachable", "does not come to TLS", hint)
        connection.settimeout(_left(deadline))
        piece = connection.recv(4096)
        if not piece:
            raise Failure("unreachable", "ends the connection before TLS begins", hint)
        heard += piece
    return heard


def _begin_tls(job, connection, deadline):
    """Hold the dialogue after which TLS begins; Failure where the server does not want it."""
    names = {"name": job.server_name, "host": _own_name(connection)}
    for said, measure, good in _DIALOGUES[job.kind]:
        connection.settimeout(_left(deadline))
        connection.sendall(said.format(**names).encode("latin-1"))
        heard = _hear(connection, measure, deadline)
        if not re.match(good, heard, re.DOTALL):
            # its longest line, or the text in a packet
            words = max(re.findall(rb"[ -~]{4,}", heard), key=len, default=b"without a word")
            raise Failure(
                "unreachable",
                f"refuses STARTTLS ({plain(words.decode(), 120)})",
                f"Does it offer STARTTLS there ({job.kind})?",
            )
        if measure(heard) < len(heard):
            raise Failure(  # said in the clear, it would count as if it had been encrypted
                "unreachable",
                "says more in the clear than was asked, before TLS begins",
                "Who else is on the way there?",
            )


# The handshake


def _limit_tls(context, excluded=""):
    """Make an SSL context take TLS 1.2 or 1.3 with ephemeral keys.

    With `excluded` ciphers TLS 1.2 alone, where the cipher settles the type of the certificate.
    """
    import ssl

    # no static RSA: that would be a handshake without a signature
    context.set_ciphers(CIPHERS + excluded)
    if sys.version_info >= (3, 7):  # where the options warn, which takes 1 ms
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # novm (vermin sees no condition)
        if excluded:
            context.maximum_version = ssl.TLSVersion.TLSv1_2  # novm
        return
    context.options |= ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if excluded:
        context.options |= getattr(ssl, "OP_NO_TLSv1_3", 0)  # the first 3.6 had none


@memoized  # a thousand exchanges share it, and no session: a resumed one shows the old leaf
def _context(excluded):
    """Return the SSL context of a handshake in which nothing is verified but the proof."""
    import ssl

    # without the trust store, which takes 20 ms to load: a new leaf is verified later, by openssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the peer's signature is checked all the same
    _limit_tls(context, excluded)
    return context


def _shown_by(peer):
    """Return the certificates (DER) that a peer has shown; none before Python 3.10, which can't."""
    # _sslobj is None where the connection was reset before TLS began
    if sys.version_info < (3, 10) or peer._sslobj is None:
        return []
    if sys.version_info >= (3, 13):
        return peer.get_unverified_chain()
    # these versions are frozen: what is not public there stays as it is; 2 stands for DER
    return [each.public_bytes(2) for each in peer._sslobj.get_unverified_chain() or ()]


_UNPROVEN = (
    "unproven",
    "showed a certificate and did not prove that it holds its key",
    "It is an impostor, or demands a client certificate: name another port or source",
)
# What an exception's words are a sign of: the reason, what that means, what to do. The first that
# matches counts.
_SIGNS = (
    ("timed out", "timeout", "gave no certificate in {seconds:g} s", "Is a firewall in between?"),
    ("unrecognized name", "unreachable", "does not serve {name}", "--sni HOST, a name it serves"),
    ("bad signature", *_UNPROVEN),
    (
        "wrong version|http request|unknown protocol|packet length too|record layer fail",
        "unreachable",
        "offers no TLS there",
        "Check the protocol and the port",
    ),
    (
        "excessive message|more than|asn1|x509 lib|public key param|cert length",
        "malformed",
        "showed what is no chain of certificates",
        "Look at what answers there",
    ),
    ("refused", "unreachable", "refuses connections", "Is the service running there?"),
    (
        "ssl|eof occurred",
        "unreachable",
        "completes no TLS handshake",
        "Does it have TLS 1.2 or later, with ephemeral keys?",
    ),
    ("", "unreachable", "cannot be reached ({words})", "Check the network and the address"),
)


def _handshake_failure(error, job):
    """Return the Failure that an exception, or a Failure itself, stands for."""
    if isinstance(error, Failure):
        return error
    text = str(error).lower().replace("_", " ")
    details = {"seconds": job.timeout, "name": job.server_name, "words": words_of(error).lower()}
    for pattern, reason, message, hint in _SIGNS:
        if re.search(pattern, text):
            return Failure(reason, message.format(**details), hint)


def _prove(job, excluded, address, deadline):
    """Return the certificates (DER) of a completed handshake, leaf first; or OSError, Failure.

    `address` is (family, socket address). Before Python 3.10 the leaf comes alone.
    """
    import socket

    family, where = address
    name = job.server_name
    if is_address(name):
        name = None
    elif sys.version_info >= (3, 7):
        name = name.encode()  # as in _resolve
    options = {"server_hostname": name, "do_handshake_on_connect": False}
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(_left(deadline))
        connection.connect(where)
        _begin_tls(job, connection, deadline)
        with _context(excluded).wrap_socket(connection, **options) as peer:
            peer.settimeout(_left(deadline))
            try:
                peer.do_handshake()  # the proof; to read would ask for a client certificate
            except OSError as error:
                if "timed out" in str(error) or not _shown_by(peer):
                    raise
                raise Failure(*_UNPROVEN)
            leaf = peer.getpeercert(binary_form=True)
            return [leaf] + [der for der in _shown_by(peer) if der != leaf]


def _add_chain(job, excluded, address, deadline, leaf):
    """Return leaf and chain (DER) where Python can't tell the chain: s_client tells it.

    It is a witness of nothing else: what it shows counts only with the leaf that was proven.
    """
    where = endpoint_text(*address[1][:2])
    command = ["openssl", "s_client", "-connect", where, "-showcerts", "-no_tls1", "-no_tls1_1"]
    command += ["-cipher", CIPHERS + excluded]
    if excluded:
        command.append("-no_tls1_3")
    if not is_address(job.server_name):
        command += ["-servername", job.server_name]
    if job.kind != "tls":
        command += ["-starttls", job.kind, "-xmpphost", job.server_name]
    environment = openssl_environment(system_roots=False)
    for _ in range(3):  # a pool, or a rotation between the two handshakes
        _, output, _ = run_process(command, environment, _left(deadline))
        # only what begins a line: a subject can hold the text of another certificate
        blocks = re.findall(rb"(?ms)^-----BEGIN CERTIFICATE-----$.*?^-----END .*?$", output)
        ders, _ = read_pem(b"\n".join(blocks))
        if not ders:
            raise Failure(
                "unreachable",
                "shows no chain in a second connection, which Python before 3.10 needs",
                "Does it limit connections? Run it again",
            )
        if ders[0] == leaf:
            return ders
    raise Failure(
        "unreachable",
        "showed another certificate at each handshake",
        "Name one member of the pool with --from",
    )


def _ask_address(job, address, deadline):
    """Return the Answer of one address; or OSError, ValueError, Failure."""
    excluded = ""
    note = ""
    ders = _prove(job, excluded, address, deadline)
    other_types, algorithm = _TYPES.get(job.key_type, ("", b""))
    if algorithm not in ders[0]:
        try:
            ders = _prove(job, other_types, address, deadline)
            excluded = other_types
        except (OSError, ValueError, Failure) as error:
            if "protocol" in str(error).lower():  # it has no TLS 1.2: nothing more can be asked
                note = TLS_13_ONLY
    if sys.version_info < (3, 10):
        ders = _add_chain(job, excluded, address, deadline, ders[0])
    return Answer(message=note, address=address[1][0], data=to_pem(ders))


def _is_own(family, where):
    """Say whether an address is this machine's: then a packet to it would leave from itself."""
    import socket

    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return False
    return own == where[0] or own.startswith("127.")


def _resolve(job, deadline):
    """Return [(family, socket address)] of a host, in the resolver's order; or Failure."""
    import socket

    host = job.host.encode()  # because text is encoded by a module that takes 4 ms to load
    hint = "Check the name, and this host's resolver"
    try:  # nothing can interrupt the resolver
        found = in_time(
            lambda: socket.getaddrinfo(host, job.port, type=socket.SOCK_STREAM), _left(deadline)
        )
    except TimeoutError:
        raise Failure("timeout", f"was not resolved in {job.timeout:g} s", hint)
    except OSError as error:
        raise Failure("unreachable", f"does not resolve ({words_of(error).lower()})", hint)
    addresses = [(family, where) for family, _, _, _, where in found]
    if job.role == "default":
        addresses = [address for address in addresses if not _is_own(*address)]
        if not addresses:
            raise Failure(
                "unreachable",
                "is this very machine",
                "Name the server that has the certificate with --from HOST[:PORT]",
            )
    return addresses[:_MAX_ADDRESSES]


def _exchange(job):
    """Return the Answer of the first address that gives a proven certificate; or Failure."""
    deadline = time.monotonic() + job.timeout
    addresses = _resolve(job, deadline)
    gravest = None
    for position, address in enumerate(addresses):
        # an address that is dead leaves the others their share of the time
        share = (deadline - time.monotonic()) / (len(addresses) - position)
        try:
            return _ask_address(job, address, time.monotonic() + share)
        except (OSError, ValueError, Failure) as error:
            gravest = graver(gravest, _handshake_failure(error, job))
    raise gravest


def _answer_job(timed_out, texts):
    """Return the Answer to a job, in the network process; or Failure.

    `timed_out` has the last wait in vain by endpoint, (seconds, Failure): none is repeated that is
    not longer.
    """
    job = Job(*texts)
    job = job._replace(port=int(job.port), timeout=float(job.timeout))
    endpoint = (job.kind, job.host, job.port)
    waited, failure = timed_out.get(endpoint, (0, None))
    if job.role != "service" and job.timeout <= waited:  # a service that restarts may come late
        raise failure
    try:
        return _exchange(job)
    except Failure as failure:
        if failure.reason == "timeout":
            timed_out[endpoint] = (job.timeout, failure)
        raise


class Network(Child):
    """The process that makes every handshake of a run, some of them side by side."""

    def __init__(self):
        """Fork it."""
        modules = ["ssl"]
        if sys.version_info < (3, 10):
            # for s_client, and for names in 3.6
            modules += ["subprocess", "encodings.idna", "encodings.punycode"]
        Child.__init__(self, functools.partial(_answer_job, {}), modules)

    def submit(self, job):
        """Have an exchange made; return the number that answer() takes."""
        return Child.submit(self, [str(field) for field in job], job.timeout)

    def answer(self, number, source):
        """Return the Answer of a source: PEM, the proven leaf first; or a Failure that names it."""
        try:
            return Child.answer(self, number)
        except Failure as failure:
            raise named(source.text, failure)


# Files and commands


# Root reads files for which it must not be led astray. The rules, and where they are:
#
# keys, a --ca-file, file: sources, settings' files, loose live names: no other user controls a
#   folder or link on the way (open_safely)
# a --ca-file besides: root's or the caller's, and not everybody can write it (read_roots)
# a private key that is not yet in service: root's or the caller's (usable_keys)
# records, hooks and the config dir's folders: root's or the caller's, and nobody else can write
#   them (check_folder, read_text); what lies in these folders no other user can exchange


def is_ours(info):
    """Say whether what os.stat() told of belongs to root or the caller."""
    return info.st_uid in (0, os.geteuid())


def _check_control(name, folder, info):
    """See that no other user controls an entry of a folder, given the state of both; or OSError."""
    is_for_all = folder.st_mode & stat.S_IWOTH != 0
    is_sticky = folder.st_mode & stat.S_ISVTX != 0
    if not is_ours(folder) or (is_for_all and not is_sticky):
        raise PermissionError(errno.EPERM, f"other users can exchange {plain(name)}")
    # what lies in a sticky folder for all, such as /tmp, is its owner's
    needs_owner = is_for_all or not stat.S_ISREG(info.st_mode)
    if needs_owner and not is_ours(info):
        raise PermissionError(errno.EPERM, f"{plain(name)} is another user's")


def open_safely(path):
    """Return a descriptor, to read from, of what a path leads to; OSError where another user may.

    It is opened part by part from a folder that is held, so that no part can be exchanged between
    its check and its opening. Links are followed here; they, and all folders on the way, must
    belong to root or the caller.
    """
    passing = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    held = os.open("/", passing)
    names = path.split("/")[::-1]
    links = 0
    try:
        while any(names):
            name = names.pop() or "."
            info = os.lstat(name, dir_fd=held)
            _check_control(name, os.fstat(held), info)
            if stat.S_ISLNK(info.st_mode):
                target = os.readlink(name, dir_fd=held)
                names += target.split("/")[::-1]
                links += 1
                name = "/" if target.startswith("/") else "."
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, "links in a circle")
            # O_NONBLOCK: a pipe would wait for who writes it
            flags = passing if any(names) else os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            below = os.open(name, flags, dir_fd=held)
            os.close(held)
            held = below
    except OSError as error:
        os.close(held)
        error.filename = path  # the calls knew only a part of it
        raise
    return held


def read_regular(descriptor, limit):
    """Return the bytes of an open file, closed then; ValueError where it is not regular or long."""
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            raise ValueError(f"it is no regular file of at most {limit} bytes")
        return os.read(descriptor, info.st_size)  # a buffer of `limit` would cost more
    finally:
        os.close(descriptor)


def read_safely(path, limit):
    """Return the bytes of a regular file that open_safely() opens; OSError, ValueError."""
    return read_regular(open_safely(path), limit)


def _read_medium(path):
    """Return the bytes of a PEM file, or of fullchain.pem and privkey.pem in a folder."""
    if os.path.isfile(path):
        return read_safely(path, MAX_OFFER)
    data = read_safely(path + "/fullchain.pem", MAX_OFFER)
    key_path = path + "/privkey.pem"
    if os.path.lexists(key_path):
        data += b"\n" + read_safely(key_path, MAX_OFFER)
    return data


def _run_command(command, seconds, environment, config):
    """Return what a shell command prints, if it ends with status 0 in time; else Failure."""
    shell = ["/bin/sh", "-c", command]
    environment = command_environment(environment, config)
    try:
        status, output, errors = run_process(shell, environment, seconds, start_new_session=True)
    except TimeoutError:
        raise Failure(
            "timeout",
            f"did not end in {seconds:g} s",
            "Run it by hand, or give --timeout SECONDS",
        )
    if status != 0 or not output.strip():
        words = last_line(errors) or "it printed nothing"
        raise Failure("unreachable", f"ended with status {status} ({words})", "Run it by hand")
    return output


# Vault and Azure Key Vault, in processes of their own


_STATUS = {  # what a store's status, or its first digit, means and what to do
    403: "It forbids reading it: check the policy and the token's age",
    404: "There is no such secret, or it is deleted: check the path",
    503: "It is sealed or in maintenance: unseal it",
    3: "It redirects to what is not followed: name that place as the source",
    4: "It refuses the request: check the credentials and the path",
}


def _dig(data, *names):
    """Return what is at the end of nested names in a JSON document (bytes), or None."""
    import json

    document = json.loads(data.decode())
    for name in names:
        if not isinstance(document, dict):
            return None
        document = document.get(name)
    return document


def _pem_in(document):
    """Return a JSON document as bytes in which PEM has its lines, however it was put in."""
    import json

    # newlines as they should be, Windows' or escaped once more; text around the blocks is allowed
    return re.sub(r"(\\+[rn])+", "\n", json.dumps(document)).encode()


def _end_of(parts):
    """Return (host, port) of an https URL's parts; a trailing dot is for the resolver alone."""
    return parts.hostname.rstrip("."), parts.port or 443


def _connect(given, parts):
    """Return an HTTP connection, over TLS unless it is the local one to a managed identity."""
    import http.client
    import socket
    import ssl

    seconds = float(given["seconds"])
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.netloc, timeout=seconds)
    context = ssl.create_default_context(cadata=given.get("roots"))
    # from Python 3.13 on: it refuses private roots that everybody has
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    _limit_tls(context)
    host, port = _end_of(parts)
    connection = http.client.HTTPSConnection(host, port, context=context)
    plain_socket = socket.create_connection((parts.hostname, port), seconds)
    connection.sock = context.wrap_socket(plain_socket, server_hostname=host)
    return connection


def _request(given, url, headers, body=None, is_redirected=False):
    """Return the bytes that a store answers with, to a POST where there is a body; or Failure.

    Of more than an offer may have they are the first ones. A redirect is followed once, and
    only over TLS.
    """
    import urllib.parse

    if not re.match(r"[ -~]*\Z", "".join(headers.values())):  # http.client's words would show it
        raise Failure(
            "unreachable",
            "needs a credential, and this one has a character that HTTP forbids",
            "Correct it",
        )
    parts = urllib.parse.urlsplit(url)
    target = parts._replace(scheme="", netloc="").geturl()
    connection = _connect(given, parts)
    connection.request("POST" if body else "GET", target, body, headers)
    response = connection.getresponse()
    data = response.read(MAX_OFFER + 1)
    place = urllib.parse.urljoin(url, response.getheader("Location", ""))
    may_follow = place.startswith("https://") and not is_redirected
    if may_follow and response.status // 100 == 3:
        if _end_of(urllib.parse.urlsplit(place)) != _end_of(parts):
            headers = {}  # what is secret is for the host that was named
            body = None
        return _request(given, place, headers, body, is_redirected=True)
    if response.status != 200:
        raise Failure(
            "unreachable",
            f"does not give it (status {response.status})",
            _STATUS.get(response.status) or _STATUS.get(response.status // 100, "Look there"),
        )
    return data


def _vault_token(given, url, headers):
    """Return the token for a Vault, that of a role where none is given."""
    import json

    if "VAULT_TOKEN" in given:
        return given["VAULT_TOKEN"]
    if "VAULT_ROLE_ID" not in given:
        raise Failure(
            "unreachable",
            "needs VAULT_TOKEN_FILE=PATH, or VAULT_ROLE_ID and VAULT_SECRET_ID_FILE",
            "Set it in certferry/environment",
        )
    login = {"role_id": given["VAULT_ROLE_ID"], "secret_id": given.get("VAULT_SECRET_ID", "")}
    answer = _request(given, url + "auth/approle/login", headers, json.dumps(login).encode())
    return str(_dig(answer, "auth", "client_token"))


def _vault_secret(given):
    """Return the PEM bytes of a KV secret: version 2, also where nobody tells, or 1."""
    target = given["target"]
    url = f"https://{given['place']}/v1/"
    headers = {}
    if "VAULT_NAMESPACE" in given:
        headers["X-Vault-Namespace"] = given["VAULT_NAMESPACE"]
    headers["X-Vault-Token"] = _vault_token(given, url, headers)
    mount = target.partition("/")[0] + "/"
    version = "2"
    try:
        info = _request(given, f"{url}sys/internal/ui/mounts/{target}", headers)
        mount = str(_dig(info, "data", "path") or mount)
        version = _dig(info, "data", "options", "version")
    except Failure:
        pass  # a policy may forbid it: then the secret's own answer tells
    path = target[len(mount) :]
    within = ["data"]
    if version == "2":
        path = "data/" + path
        within = ["data", "data"]
    secret = _request(given, url + mount + path, headers)
    names = "fullchain certificate cert chain ca_chain private_key privkey key"
    return _pem_in([_dig(secret, *within, name) for name in names.split()])


def _azure_token(given, cloud):
    """Return the token for an Azure Key Vault: of a client, or of the managed identity."""
    import urllib.parse

    form = {}
    if "AZURE_CLIENT_ID" in given:
        form["client_id"] = given["AZURE_CLIENT_ID"]
    if "AZURE_CLIENT_SECRET" in given:
        form["client_secret"] = given["AZURE_CLIENT_SECRET"]
        form["grant_type"] = "client_credentials"
        form["scope"] = f"https://{cloud}/.default"
        login = given.get("AZURE_AUTHORITY_HOST", "login.microsoftonline.com")
        login = login.split("://")[-1].strip("/")
        url = f"https://{login}/{given.get('AZURE_TENANT_ID', '')}/oauth2/v2.0/token"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = _request(given, url, headers, urllib.parse.urlencode(form).encode())
    else:
        form["api-version"] = "2018-02-01"
        form["resource"] = f"https://{cloud}"
        local = given.get("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://169.254.169.254")
        url = f"{local}/metadata/identity/oauth2/token?{urllib.parse.urlencode(form)}"
        answer = _request(given, url, {"Metadata": "true"})
    return str(_dig(answer, "access_token"))


def _azure_secret(given):
    """Return the bytes of a Key Vault secret: PEM, or the DER of a PKCS#12 container."""
    place = given["place"]
    cloud = place.partition(":")[0].rstrip(".").partition(".")[2]
    headers = {"Authorization": f"Bearer {_azure_token(given, cloud)}"}
    url = f"https://{place}/secrets/{given['target']}?api-version=7.4"
    secret = _request(given, url, headers)
    value = str(_dig(secret, "value"))
    if "pkcs12" in str(_dig(secret, "contentType")):
        return binascii.a2b_base64(value)
    return _pem_in(value)


# How each kind of store is asked: a function from its settings {name without _FILE: value}, with
# the `place` (HOST:PORT), the `target` (a path), the `seconds` that it may take and, where there
# are, `roots` (PEM text), to the bytes of a secret.
_ASK_STORE = {"vault": _vault_secret, "azure": _azure_secret}


def _answer_store(kind, texts):
    """Return the Answer of a store, in its process, given NAME=VALUE texts; or Failure."""
    import http.client

    given = dict(text.split("=", 1) for text in texts)
    seconds = float(given["seconds"])
    try:
        return Answer(data=in_time(lambda: _ASK_STORE[kind](given), seconds))
    except OSError as error:
        words = str(getattr(error, "verify_message", "") or words_of(error))
        if "timed out" in words:
            raise Failure("timeout", f"gave no answer in {seconds:g} s", "Is it overloaded?")
        raise Failure(
            "unreachable",
            f"gives no answer ({words.lower()})",
            f"Is it running? {STORES[kind].roots} names other roots than the system's",
        )
    except (ValueError, RecursionError, http.client.HTTPException):
        raise Failure("malformed", "answers with what cannot be read", "Is it the right one?")


def _read_setting(environment, name, is_path):
    """Return the value of a store's setting, or of the file that it names; Failure without one."""
    value = environment[name].strip()
    if value and is_path:
        try:
            value = read_safely(value, MAX_OFFER).decode("ascii", "ignore").strip()
        except (OSError, ValueError) as error:
            raise Failure(
                "unreachable",
                f"needs {name}, and {value} cannot be read ({words_of(error).lower()})",
                "Is it in place?",
            )
    if not value:
        raise Failure(
            "unreachable",
            f"needs {name}, which is set and empty",
            "Set it in certferry/environment, or remove it",
        )
    return value


def start_stores(kinds):
    """Return {kind: Child that asks it} for those of these kinds of source that are stores.

    Called before any key is read.
    """
    modules = ("encodings.idna", "http.client", "json", "ssl", "urllib.parse")
    return {
        kind: Child(functools.partial(_answer_store, kind), modules)
        for kind in kinds.intersection(STORES)
    }


def _read_store(source, seconds, environment, child):
    """Return the bytes of a secret: PEM, or PKCS#12; or Failure."""
    store = STORES[source.kind]
    place = endpoint_text(source.host, source.port)
    given = {"place": place, "target": source.target, "seconds": seconds}
    # what is in files is read here: nobody can't
    for name in store.settings:
        short = re.sub("_FILE$", "", name)
        if name in environment and short not in given:
            given[short] = _read_setting(environment, name, short != name)
    if store.roots in environment:
        given["roots"] = _read_setting(environment, store.roots, True)
    texts = [f"{name}={value}" for name, value in given.items()]
    return child.answer(child.submit(texts, seconds)).data


# What the rest of the file asks


def fetch(source, seconds, environment, config, stores):
    """Return the Answer of a source of the kinds in KEY_HOLDING; a Failure begins with its text.

    `stores` are the processes of start_stores().
    """
    try:
        if source.kind == "file":
            data = _read_medium(source.target)
        elif source.kind == "exec":
            data = _run_command(source.target, seconds, environment, config)
        else:
            data = _read_store(source, seconds, environment, stores[source.kind])
            if data[:1] == b"\x30":
                data = open_pkcs12(data)
    except Failure as failure:
        raise named(source.text, failure)
    except OSError as error:
        words = words_of(error).lower()
        if error.filename and error.filename not in source.text:
            words = f"{error.filename}: {words}"
        raise Failure("unreachable", f"{source.text}: {words}", "Is it in place?")
    except ValueError as error:
        raise Failure("malformed", f"{source.text}: {error}", "Look at what it holds")
    return Answer(data=data)


def read_offer(source, answer):
    """Return the Offer in a source's Answer; Failure (malformed) where there is none."""
    try:
        if len(answer.data) > MAX_OFFER:
            raise ValueError(f"more than {MAX_OFFER} bytes")
        ders, key = read_pem(answer.data)
        if not ders:
            raise ValueError("no certificate in it")
        for der in ders:
            parse_certificate(der)
        if source.kind in KEY_HOLDING:  # in any order: authorities last
            ders.sort(key=lambda der: issuer_flaw(parse_certificate(der)) == "")
        elif key:
            raise ValueError("a private key, which no handshake brings")
    except ValueError as error:
        raise Failure("malformed", f"{source.text}: {error}", "Look at what it holds")
    return Offer(source, answer.address, ders[0], tuple(ders[1:]), key)


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------


def days_left(leaf, now):
    """Return the whole days until a certificate expires, negative afterwards."""
    return (leaf.not_after - now) // DAY


def is_newer(leaf, other):
    """Say whether a leaf is newer than another one; everything is newer than None.

    By notBefore, never by notAfter: a move to shorter lifetimes is progress.
    """
    return other is None or leaf.not_before > other.not_before


def _lacking(facts):
    """Return the names that the leaf must cover and does not: every -d, or else NAME or *.NAME."""
    if not facts.domains and "*." + facts.name in facts.leaf.domains:
        return []
    wanted = facts.domains or (facts.name,)
    return [name for name in wanted if not covers(facts.leaf.domains, name)]


def _names_of(leaf):
    """Return the names of a leaf as text to show."""
    names = plain(" ".join(leaf.domains), 150)
    return names or "no usable subject alternative name (the common name does not count)"


def _is_replacement(facts):
    """Say whether the leaf is another one than the current one."""
    return facts.current is not None and facts.leaf.der != facts.current.der


def _older(facts):
    """Return the Failure of a leaf that is not newer than the current one."""
    place = facts.address or "the source"
    return Failure(
        "older",
        f"{facts.source.text} offers the certificate of {iso_time(facts.leaf.not_before)}, older "
        f"than the one here ({iso_time(facts.current.not_before)})",
        f"Is {place} a stale member of a pool? To take it all the same: {facts.force_command}",
    )


def _refuse_known(facts, now):
    """What is in a version here is older, or was rolled back from and then stays out."""
    known = [version for version in facts.versions if version.leaf.der == facts.leaf.der]
    if not known or not _is_replacement(facts):
        return None
    if not is_newer(facts.leaf, facts.current):
        return _older(facts)
    if not any(version.rolled_back for version in known):
        return None
    return Failure(
        "rolled-back",
        f"{facts.source.text} offers the certificate of {iso_time(facts.leaf.not_before)}, which "
        "was rolled back from",
        f"It stays out until there is a newer one. To take it all the same: {facts.force_command}",
    )


def _refuse_older(facts, now):
    """What began earlier than the current certificate is older, wherever it comes from."""
    if _is_replacement(facts) and facts.leaf.not_before < facts.current.not_before:
        return _older(facts)
    return None


def _refuse_carried_key(facts, now):
    """A private key that came along must fit, even where the lineage's own key would."""
    if facts.carried_key in (None, facts.public_key):
        return None
    return Failure(
        "key-mismatch",
        f"{facts.source.text} has a private key ({describe_key(facts.carried_key)}) that does not "
        f"fit its certificate ({describe_key(facts.public_key)})",
        "Put the matching pair there",
    )


def _other_key_hint(facts, now):
    """Return what to do about a certificate for another key: a first one is mostly not ours."""
    if facts.current is None:
        return (
            "A CDN or load balancer shows its own: name the origin with --from HOST[:PORT]. If it "
            f"is the right server, bring its key: {facts.bring_key}"
        )
    lasting = max(0, days_left(facts.current, now))
    return (
        f"If the upstream's key was changed: {facts.bring_key} (and set reuse_key on the upstream, "
        f"so that it stays). The certificate here lasts {lasting} more days"
    )


def _refuse_other_key(facts, now):
    """Only a certificate for a key that is already here, or that came along, is accepted."""
    if facts.public_key in (facts.carried_key, *facts.accepted_keys):
        return None
    where = facts.source.text
    names = _names_of(facts.leaf)
    # mostly not the upstream's new key, but another server
    if _lacking(facts):
        return Failure(
            "key-mismatch",
            f"{where} shows a certificate for {names}, not for {' '.join(_lacking(facts))}",
            "Try: --sni HOST, a name under which the upstream serves this one",
        )
    if facts.given_key:
        public_key, path = facts.given_key
        return Failure(
            "key-mismatch",
            f"the key that you gave ({describe_key(public_key)}) is not the one of the certificate "
            f"at {where} ({describe_key(facts.public_key)})",
            f"It waits in {path} (if it was a mistake: rm {shell_quote(path)})",
        )
    ours = ""
    if facts.our_key:
        ours = f", ours is {describe_key(facts.our_key)}"
    return Failure(
        "key-mismatch",
        f"the certificate at {where} is for another key ({describe_key(facts.public_key)}{ours}), "
        f"issued by {plain(describe_name(facts.leaf.issuer), 100)} for {names}",
        _other_key_hint(facts, now),
    )


def _refuse_names(facts, now):
    """A required name must be covered: openssl falls back to the common name, browsers don't."""
    lacking = _lacking(facts)
    if not lacking:
        return None
    return Failure(
        "names",
        f"{facts.source.text} shows a certificate for {_names_of(facts.leaf)}, not for "
        f"{' '.join(lacking)}",
        "Try: --sni HOST, a name under which the upstream serves this one, or -d DOMAIN if less is "
        "wanted",
    )


def _refuse_invalid_now(facts, now):
    """The clock must be inside the validity."""
    begins, ends = facts.leaf.not_before, facts.leaf.not_after
    if begins <= now <= ends:
        return None
    span = f"from {iso_time(begins)} to {iso_time(ends)}, and the clock here says {iso_time(now)}"
    if now > ends:
        hint = "Is the clock here right? Else renew it on the upstream"
        return Failure("expired", f"{facts.source.text} has an expired certificate ({span})", hint)
    return Failure(
        "not-yet-valid",
        f"{facts.source.text} has a certificate that is not yet valid ({span})",
        "Is the clock here right?",
    )


def _refuse_untrusted(facts, now):
    """Leaf and chain must lead to a trusted root, and clients must accept them."""
    if facts.trust_flaw is None:
        return None
    what, hint = facts.trust_flaw
    return Failure(
        "untrusted", f"{facts.source.text} has a certificate that is not trusted: {what}", hint
    )


def _refuse_lost_names(facts, now):
    """Without -d, what the current certificate covers must stay covered."""
    if facts.domains or facts.current is None:
        return None
    lost = [name for name in facts.current.domains if not covers(facts.leaf.domains, name)]
    if not lost:
        return None
    return Failure(
        "names-lost",
        f"{facts.source.text} has a certificate that no longer covers {' '.join(lost)}",
        f"If that is meant: {facts.force_command}, or give -d for each name that is needed",
    )


# The policy, in the README's order; the first rule that an offer breaks counts.
RULES = (
    _refuse_known,
    _refuse_carried_key,
    _refuse_other_key,
    _refuse_names,
    _refuse_invalid_now,
    _refuse_untrusted,
    _refuse_older,
    _refuse_lost_names,
)
# What is asked of the leaf in service: the rest was judged when it was installed.
RULES_IN_SERVICE = (_refuse_names, _refuse_invalid_now)
_FORCED = ("rolled-back", "older", "names-lost")  # what --force accepts all the same


def judge(facts, now, force, rules):
    """Return the Failure that an offer is refused with by RULES, or None where it is accepted.

    For RULES_IN_SERVICE the facts `name`, `domains`, `leaf` and `source` are enough.
    """
    for rule in rules:
        failure = rule(facts, now)
        if failure and not (force and failure.reason in _FORCED):
            return failure
    return None


# --------------------------------------------------------------------------------------------------
# Store
# --------------------------------------------------------------------------------------------------


def storage_failure(error):
    """Return the Failure of an OSError: the path, where the call tells one, and why."""
    path = error.filename2 or error.filename or "the config dir"
    hints = {
        errno.ENOSPC: "Free some space",
        errno.EROFS: "Remount it writable",
        errno.EPERM: "Look at its owner and attributes (lsattr)",
        errno.EACCES: "Run it as root",
        errno.EBUSY: "Is it mounted there by itself?",
    }
    hint = hints.get(error.errno, "Look at the disk")
    return Failure(
        "storage", f"{path}: {words_of(error).lower()}", f"{hint}. What is in service stays"
    )


def _refuse_foreign(path, info):
    """Raise Failure where a file or folder is another user's, or others can write it."""
    if not is_ours(info):
        raise Failure(
            None, f"{path} belongs to uid {info.st_uid}", f"Try: chown root {shell_quote(path)}"
        )
    if info.st_mode & 0o022 and not stat.S_ISLNK(info.st_mode):
        raise Failure(
            None,
            f"{path}, of uid {info.st_uid}, can be written by others",
            f"Try: chmod go-w {shell_quote(path)}",
        )


@memoized  # a thousand lineages share three of their four folders
def check_folder(path):
    """Raise Failure where a folder or hook, or its link, is another user's or open to others."""
    _refuse_foreign(path, os.lstat(path))
    _refuse_foreign(path, os.stat(path))


def list_folder(folder):
    """Return the names in a folder, sorted; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_plain(path, limit):
    """Return the bytes of a regular file that is no link, in a checked folder; OSError, ValueError.

    This takes one call where open_safely() takes four for each folder on the way.
    """
    # O_NONBLOCK: a planted FIFO would wait for its writer for ever
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    return read_regular(os.open(path, flags), limit)


def read_text(path):
    """Return the text of a record that nobody else can write; Failure, OSError."""
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_RECORD:
        raise Failure(
            None,
            f"{path} is no regular file of at most {MAX_RECORD} bytes",
            "Put the file itself there",
        )
    _refuse_foreign(path, info)
    return os.fsdecode(_read_plain(path, MAX_RECORD))  # as arguments are


def read_roots(path):
    """Return the Certificates of a --ca-file, None without one; or Failure (untrusted).

    Who can change it decides what is trusted: open_safely() sees to the folders above it.
    """
    if path is None:
        return None
    try:
        # opened as the caller, since its folder may be closed to nobody
        descriptor = open_safely(path)
        info = os.fstat(descriptor)
        data = read_regular(descriptor, 4 * MAX_OFFER)
        if info.st_mode & stat.S_IWOTH or not is_ours(info):
            raise PermissionError(errno.EPERM, "other users can change it")
        ders = read_pem(data, most=MAX_ROOTS)[0]
        if not ders:
            raise ValueError("there is no certificate in PEM form in it")
        return tuple(map(parse_certificate, ders))
    except (OSError, ValueError) as error:
        hint = "Give a file of roots"
        if isinstance(error, PermissionError):
            name = shell_quote("/etc/ssl/" + os.path.basename(path))
            hint = f"Try: install -m 644 {shell_quote(path)} /etc/ssl/, then --ca-file {name}"
        raise Failure("untrusted", f"the --ca-file {path} cannot be used ({words_of(error)})", hint)


# How files are written


def _sync(folder):
    """Make what a folder lists durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dress(target, like):
    """Give a file or folder (path or descriptor) owner, group, mode and ACL of `like`."""
    info = os.stat(like)
    mode = stat.S_IMODE(info.st_mode)
    try:
        os.chown(target, info.st_uid, info.st_gid)
    except PermissionError:  # not root: the group's rights would go to another group
        os.chmod(target, mode & 0o2700)
        return
    os.chmod(target, mode)  # after chown, which clears the set-group-id bit
    acl = "system.posix_acl_access"
    if hasattr(os, "getxattr"):  # FreeBSD's Python knows no extended attributes
        quietly(os.removexattr, target, acl)  # what a folder's default ACL gave
        quietly(lambda: os.setxattr(target, acl, os.getxattr(like, acl)))


def _create(path, data, mode, like=None):
    """Make a new file of `data`, synced, with that mode; or dressed like another file."""
    # O_EXCL, then by descriptor only: --metrics may be in a folder where others plant links
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.chmod(descriptor, mode)
            if like:
                _dress(descriptor, like)
            os.fsync(descriptor)
    except OSError as error:
        error.filename = path  # which write() and fsync() do not tell
        raise


def _hidden(path):
    """Return the temporary name beside a path."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name.lstrip('.')}{LITTER}"


def _remove(path):
    """Remove a file, a link, or a folder with all that is in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        _remove(f"{path}/{name}")
    os.rmdir(path)


def _replace(path, hidden, make):
    """Let what make() makes under a temporary name take the place of `path` in one rename."""
    # no folder is ever removed here: --metrics may be in a folder of another user
    try:
        quietly(os.unlink, hidden)  # what a run that died left
        make()
        os.rename(hidden, path)
    finally:
        quietly(os.unlink, hidden)


def write_file(path, data, mode=0o600):
    """Replace a file in one rename by one that is complete and synced."""
    hidden = _hidden(path)
    _replace(path, hidden, lambda: _create(hidden, data, mode))
    _sync(os.path.dirname(path))


def _set_link(target, path):
    """Make `path` a link to `target` in one rename."""
    hidden = _hidden(path)
    _replace(path, hidden, lambda: os.symlink(target, hidden))


def make_folder(path, widest=0o2755):
    """Make a folder with the mode of its parent, but none wider than `widest`; or check it."""
    if not os.path.lexists(path):
        os.mkdir(path, 0o700)
        parent = os.path.dirname(path)
        os.chmod(path, stat.S_IMODE(os.stat(parent).st_mode) & widest)
        _sync(parent)
    check_folder(path)


def _make_folders(place):
    """Make the folders of certificates and keys that are missing; Failure where one is not ours."""
    for path in (place.config, place.archive, place.config + "/live", place.live):
        make_folder(path)


def litter_in(folder):
    """Return the paths of what an interrupted run left in a folder."""
    return [f"{folder}/{name}" for name in list_folder(folder) if name.endswith(LITTER)]


def remove_litter(paths):
    """Remove what an interrupted run left. The lock is held."""
    for path in filter(os.path.lexists, paths):
        _remove(path)


# Records on the disk


def touch_state(place, now):
    """Set the time of the last run."""
    os.utime(place.state, (now, now))


def save_conf(place, given):
    """Write the remembered options to NAME.conf, touching only the lines that changed."""
    text = read_text(place.conf) if os.path.lexists(place.conf) else ""
    write_file(place.conf, os.fsencode(edit_conf(text, given, place.conf)))


def lock(config, in_hook, dry_run):
    """Hold the config dir for this run (a dry run only where it was held before); or Failure.

    `in_hook` says that a hook of a run on this config dir started this one: the holder then waits
    for us, so that we would wait in vain. The lock ends with the process.
    """
    import fcntl

    records = config + "/certferry"
    path = records + "/.lock"
    flags = os.O_RDWR | os.O_NOFOLLOW
    if not dry_run:
        make_folder(records, 0o700)  # a hook may hold a password
        flags |= os.O_CREAT
    elif not os.path.lexists(path):
        return
    descriptor = os.open(path, flags, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if in_hook:
            raise Failure(
                None,
                "the run that started this hook holds the lock, and waits for the hook",
                "Start certferry after it, for example: "
                "systemctl start --no-block certferry.service",
            )
        if time.monotonic() >= deadline:
            raise Failure(
                None,
                f"another run has held {path} for over {LOCK_SECONDS} s",
                f"Wait for it, or see what it does: fuser -v {shell_quote(path)}",
            )
        time.sleep(0.1)


# Keys


def public_key_of(path):
    """Return the public key (DER) of a private key file; UnusableKey with why not."""
    try:
        return public_half(read_safely(path, MAX_KEY), trusted=True)
    except ValueError as error:
        raise UnusableKey(f"{path} cannot be used: {error}", "Put the right one there")
    except OSError as error:
        if error.errno != errno.EPERM:  # which open_safely() says of another user's folder or link
            raise
        raise UnusableKey(f"{path}: {words_of(error)}", "Put the file itself there")


def _own_key(path):
    """Return the public key (DER) of a private key file of root's or the caller's; UnusableKey."""
    public = public_key_of(path)
    if not is_ours(os.stat(path)):  # a service that may read its key brings none
        words = f"{path} is another user's key"
        raise UnusableKey(words, f"If it is right: chown root {shell_quote(path)}")
    return public


def fits(public_key, leaf):
    """Say whether a public key, as openssl printed it, is a leaf's."""
    return public_key == leaf.public_key or public_key == leaf_public_key(leaf.der)


def _is_key_for(path, leaf):
    """Say whether there is a file with the private key of a leaf."""
    try:
        return fits(public_key_of(path), leaf)
    except (FileNotFoundError, UnusableKey):
        return False


def key_record(path, leaf):
    """Return a word that changes when a key file, or the leaf's public key, does."""
    info = os.stat(path)
    stamps = f"{info.st_ino}:{info.st_uid}:{info.st_size}:{info.st_mtime_ns}:{info.st_ctime_ns}"
    return f"{stamps}:{binascii.crc32(leaf.public_key)}"


def key_pem(key):
    """Return the PEM bytes of a private key, a path or a Secret; OSError, ValueError."""
    if isinstance(key, Secret):
        return key.pem
    return read_safely(key, MAX_KEY)


def staged_path(place, public_key):
    """Return where a key is staged."""
    return place.member(f"privkey-{fingerprint(public_key)[:16]}.pem")


def stage_key(place, pem, public_key):
    """Put a private key (PEM bytes) into live/NAME, where it waits for an offer that fits it."""
    _make_folders(place)
    write_file(staged_path(place, public_key), pem)


def remove_staged(in_service):
    """Remove the staged keys that are the key in service; return the InService without them."""
    if not in_service.is_whole:
        return in_service
    waiting = []
    for path in in_service.staged:
        if _is_key_for(path, in_service.leaf):
            _remove(path)
        else:
            waiting.append(path)
    return in_service._replace(staged=tuple(waiting))


# Versions


def _number_in(place, path):
    """Return the N of a path that ends in NAME@N, None for any other."""
    name, _, number = os.path.basename(path).rpartition("@")
    if name == place.name and re.match(r"[1-9][0-9]{0,8}\Z", number, re.ASCII):
        return int(number)
    return None


def version_numbers(place):
    """Return the numbers of the versions that there are, the newest first."""
    numbers = [_number_in(place, name) for name in list_folder(place.archive)]
    return sorted(filter(None, numbers), reverse=True)


def next_number(place):
    """Return the number of the version that is made next."""
    return max(version_numbers(place), default=0) + 1


def pointed_number(place):
    """Return the number of the version that .current names, there or not; None for no version."""
    try:
        target = os.readlink(place.pointer)
        # live, or live/NAME, may be a link to elsewhere
        folder = os.path.join(place.live, os.path.dirname(target))
        if os.path.samefile(folder, place.archive):
            return _number_in(place, target)
    except OSError:
        pass  # no link: nothing there, or a folder
    return None


@functools.lru_cache(maxsize=256)  # one wildcard certificate may be in many lineages
def _parse_chain(data):
    """Return (leaf as Certificate, chain as DER) of PEM bytes, (None, ()) where it is damaged."""
    try:
        ders = read_pem(data)[0]
        if ders:
            return [parse_certificate(der) for der in ders][0], tuple(ders[1:])
    except ValueError:
        pass
    return None, ()


def load_versions(place):
    """Return the versions in the archive whose certificates can be read, the newest first."""
    versions = []
    for number in version_numbers(place):
        folder = place.version(number)
        try:
            check_folder(folder)
            leaf, chain = _parse_chain(_read_plain(folder + "/fullchain.pem", MAX_OFFER))
        except (FileNotFoundError, NotADirectoryError, ValueError, Failure):
            continue
        if leaf:
            is_marked = os.path.lexists(folder + "/rolled-back")
            versions.append(Version(number, leaf, chain, is_marked))
    return versions


def version_key(place, version):
    """Return the path of the private key of a version, None where it has none that fits."""
    path = place.version(version.number) + "/privkey.pem"
    if _is_key_for(path, version.leaf):
        return path
    return None


def _read_pending(place, number):
    """Return the hooks that a version owes, None where nothing is pending."""
    try:
        text = read_text(place.version(number) + "/pending")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return tuple(filter(None, text.split("\n")))


def _pending_bytes(hooks):
    """Return the content of a `pending` file."""
    return os.fsencode("".join(hook + "\n" for hook in hooks))


def _mark(place, number, name, data):
    """Write a small file into a version; its temporary name is where the next run looks for it."""
    folder = place.version(number)
    hidden = _hidden(f"{folder}.{name}")
    _replace(f"{folder}/{name}", hidden, lambda: _create(hidden, data, 0o600))
    _sync(folder)


def unmark(place, number, name):
    """Remove a version's `pending` or `rolled-back`, if it is there."""
    path = f"{place.version(number)}/{name}"
    if os.path.lexists(path):
        os.unlink(path)
        _sync(os.path.dirname(path))


def write_pending(place, number, hooks):
    """Make a version owe these hooks; None makes it owe nothing."""
    if hooks is None:
        unmark(place, number, "pending")
    else:
        _mark(place, number, "pending", _pending_bytes(hooks))


# What is in service


def _is_link(place, name):
    """Say whether a live name is the link through .current that it should be."""
    try:
        return os.readlink(place.member(name)) == ".current/" + name
    except OSError:
        return False


def _shown_path(place, number, name):
    """Return the file behind a live name.

    A name that is missing is taken from the current version, whose link it will become.
    """
    path = place.member(name)
    if number is None:
        return path
    if _is_link(place, name) or not os.path.lexists(path):
        return f"{place.version(number)}/{name}"
    return path


def _read_shown(place, path):
    """Return the bytes behind a live name, none of what is missing or no regular file; OSError."""
    read = _read_plain if path.startswith(place.archive + "/") else read_safely
    try:
        return read(path, MAX_OFFER)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return b""


def _shown_files(place, number):
    """Return {name: bytes} of fullchain.pem, and of cert.pem and chain.pem where they are needed.

    Failure where one holds a private key.
    """
    files = {"fullchain.pem": b""}
    for name in MEMBERS[:3]:
        if number is None and not os.path.lexists(place.member(name)):
            continue  # whoever put the others there does not need it
        path = _shown_path(place, number, name)
        files[name] = _read_shown(place, path)
        if b"PRIVATE KEY-----" in files[name]:
            raise Failure(
                None,
                f"{path} holds a private key, which everybody could read in a copy",
                "Take the key out of that file, and put it into privkey.pem",
            )
    return files


def _certificate_flaw(files, leaf, chain):
    """Return what is wrong with certificate files that show a leaf and chain, or ""."""
    for name, data in files.items():
        flaw = f"has no usable {name}"
        try:
            found = read_pem(data)[0]
        except ValueError:
            return flaw
        is_right = set(chain).issubset(found) if name == "chain.pem" else found[:1] == [leaf.der]
        if not is_right:
            return flaw
    return ""


def _shown_certificates(place, number):
    """Return (leaf, chain, what is wrong) of the certificate files behind the live names."""
    files = _shown_files(place, number)
    whole = files["fullchain.pem"]
    parts = files.get("cert.pem", b"") + files.get("chain.pem", b"")
    leaf, chain = _parse_chain(whole)
    if leaf is None:
        leaf, chain = _parse_chain(parts)
        if leaf is None:
            return None, (), "has no certificate that can be read"
        return leaf, chain, "has no usable fullchain.pem"
    if whole == parts:  # as certferry and certbot write them
        return leaf, chain, ""
    return leaf, chain, _certificate_flaw(files, leaf, chain)


def _key_flaw(path, leaf, fitting):
    """Return what is wrong with the file that has the key of a leaf, None for none, or "".

    `fitting` is the key_record() of one that was seen to fit.
    """
    if path is None:
        return "has no private key"
    if fitting == key_record(path, leaf):
        return ""
    try:
        if fits(public_key_of(path), leaf):
            return ""
    except UnusableKey as failure:
        return f"has a private key that cannot be used ({failure})"
    return "has a private key that does not fit its certificate"


def look(place, fitting=""):
    """Return the InService that live/NAME/ shows, whatever it is made of; or Failure, OSError."""
    number = pointed_number(place)
    folders = [place.config + "/live", place.live]
    if number is not None:
        folders.append(place.version(number))
    for folder in filter(os.path.lexists, folders):
        check_folder(folder)
    owed = None if number is None else _read_pending(place, number)
    linked = number is not None and all(_is_link(place, name) for name in MEMBERS)
    leaf, chain, flaw = _shown_certificates(place, number)
    key_path = _shown_path(place, number, "privkey.pem")
    if not os.path.exists(key_path):
        key_path = None
    if leaf:
        flaw = _key_flaw(key_path, leaf, fitting) or flaw
    names = list_folder(place.live)
    litter = tuple(place.member(name) for name in names if name.endswith(LITTER))
    staged = tuple(place.member(name) for name in names if re.match(r"privkey-.*\.pem\Z", name))
    return InService(number, leaf, chain, key_path, staged, owed, linked, flaw, litter)


def usable_keys(place, in_service, versions):
    """Return ({public key: path}, [Failure]): the keys that an offer may be for, and what is none.

    In service, staged, and of `versions`.
    """
    keys = {}
    unusable = []
    brought = in_service.staged
    if in_service.is_whole:
        keys[public_key_of(in_service.key_path)] = in_service.key_path
    elif in_service.key_path:
        brought = (in_service.key_path, *brought)
    for path in filter(os.path.exists, brought):  # a dry run stages nothing
        try:
            keys.setdefault(_own_key(path), path)
        except UnusableKey as failure:
            unusable.append(failure)
    for version in versions:
        path = version_key(place, version)
        if path:
            keys.setdefault(public_key_of(path), path)
    return keys, unusable


# From what is in service to the next


def _model_of(in_service):
    """Return the path of the key whose owner, group and mode the next one gets, or None."""
    path = in_service.key_path
    if path is None or in_service.is_whole:
        return path
    if in_service.leaf and _is_key_for(path, in_service.leaf):
        return path
    try:
        _own_key(path)
    except UnusableKey:
        return None  # what is no key, or was not meant to be here, passes no owner and mode on
    return path


def _make_version(place, in_service, leaf, chain, key, owed):
    """Make a version, complete and synced, that owes these hooks; return its number.

    The key, a path or a Secret, becomes like the one that it replaces, the folder like the one
    before. Killed at any point, there is litter, or a version that was never in service.
    """
    _make_folders(place)
    number = next_number(place)
    folder = place.version(number)
    hidden = _hidden(folder)
    os.mkdir(hidden, 0o700)
    try:
        _create(hidden + "/cert.pem", to_pem([leaf.der]), 0o644)
        _create(hidden + "/chain.pem", to_pem(chain), 0o644)
        _create(hidden + "/fullchain.pem", to_pem((leaf.der,) + chain), 0o644)
        _create(hidden + "/privkey.pem", key_pem(key), 0o600, _model_of(in_service))
        if owed is not None:
            _create(hidden + "/pending", _pending_bytes(owed), 0o600)
        before = place.archive
        if in_service.number is not None and os.path.isdir(place.version(in_service.number)):
            before = place.version(in_service.number)
        _dress(hidden, before)
        _sync(hidden)
        os.rename(hidden, folder)
    finally:
        quietly(_remove, hidden)
    _sync(place.archive)
    return number


def _free_name(path):
    """Return a path, or one like it where there is something already."""
    while os.path.lexists(path):
        path += "~"
    return path


def _clear_pointer(place):
    """Move a .current that is a folder away, where no live name leads through it; or Failure."""
    if os.path.islink(place.pointer) or not os.path.isdir(place.pointer):
        return
    if any(_is_link(place, name) for name in MEMBERS):
        raise Failure(
            None,
            f"{place.pointer} is a folder, and servers read through it",
            f"Try: cd {shell_quote(place.live)} && for name in cert chain fullchain privkey; do "
            "cp -p .current/$name.pem .$name.new && mv .$name.new $name.pem; done",
        )
    os.rename(place.pointer, _free_name(place.pointer + ".folder"))


def _point_to(place, number):
    """Make a version the current one: the one instant of change."""
    archive = os.path.relpath(os.path.realpath(place.archive), os.path.realpath(place.live))
    _set_link(f"{archive}/{place.name}@{number}", place.pointer)
    _sync(place.live)  # or a power cut could leave links to a .current that is not there


def _link_name(place, name):
    """Make a live name a link through .current."""
    _set_link(".current/" + name, place.member(name))


def _link_names(place):
    """Make each live name a link through .current, the key first."""
    for name in reversed(MEMBERS):
        if not _is_link(place, name):
            _link_name(place, name)
    _sync(place.live)


def link_missing_names(place):
    """Make the live names that are missing links through .current; return these names."""
    missing = [name for name in MEMBERS if not os.path.lexists(place.member(name))]
    for name in missing:
        _link_name(place, name)
    return missing


def _shows_version(place, number):
    """Say whether every live name shows the bytes of a version."""
    shown = [_read_shown(place, place.member(name)) for name in MEMBERS]
    return shown == [_read_shown(place, f"{place.version(number)}/{name}") for name in MEMBERS]


def settle(place, in_service):
    """Make the four live names links through .current while they go on showing the same.

    (a) four links: nothing to do;
    (b) no certificate is shown: names that are missing become links, dangling until the rename;
    (c) every name has the bytes of the current version: it becomes a link;
    (d) else a version is made of what is shown, .current leads to it, names become links.
    Every mixture on the way shows the same leaf and key, and a name that the disk does not let be
    replaced ends it there. What is not whole is not worth a version, and stays.
    """
    if in_service.linked:  # (a)
        return
    _clear_pointer(place)
    if in_service.leaf is None:  # (b)
        _make_folders(place)
        link_missing_names(place)
    if not in_service.is_whole:
        return
    if in_service.number is None or not _shows_version(place, in_service.number):  # (d)
        number = _make_version(
            place,
            in_service,
            in_service.leaf,
            in_service.chain,
            in_service.key_path,
            in_service.owed,
        )
        _point_to(place, number)
    _link_names(place)  # (c)


def _put_key_aside(place, in_service, leaf):
    """Keep the private key in service unless it is that of a leaf that goes into service.

    It is staged, where no version has it, or renamed where it is of no use.
    """
    path = in_service.key_path
    if path is None or _is_key_for(path, leaf):
        return
    try:
        public = _own_key(path)
    except UnusableKey:
        if path == place.member("privkey.pem"):
            os.rename(path, _free_name(path + ".damaged"))
    else:
        versions = load_versions(place)
        if not any(fits(public, each.leaf) and version_key(place, each) for each in versions):
            stage_key(place, key_pem(path), public)
    if in_service.leaf is None:
        _link_name(place, "privkey.pem")


def _go_live(place, in_service, number, leaf):
    """Make a version with this leaf the current one in one rename; return the InService then.

    In place of `in_service`, which is settled or not whole.
    """
    if not in_service.is_whole:
        _put_key_aside(place, in_service, leaf)
    _point_to(place, number)  # the one instant of change
    if not in_service.is_whole:  # else there are links, or a new key was put there just now
        _link_names(place)
    for name in MEMBERS:  # inotify through a link sees nothing else
        os.utime(place.member(name), follow_symlinks=False)
    return look(place, key_record(place.version(number) + "/privkey.pem", leaf))


def rollback_target(place, in_service, now):
    """Return the Version that a rollback goes to, None where there is none.

    The newest valid one below the current one that was not itself rolled back from, that has
    another leaf or chain, and a key that fits.
    """
    shown = (in_service.leaf, in_service.chain)
    for version in load_versions(place):
        if in_service.number is None or version.number >= in_service.number:
            continue
        if version.rolled_back or (version.leaf, version.chain) == shown:
            continue
        is_valid = version.leaf.not_before <= now <= version.leaf.not_after
        if is_valid and version_key(place, version):
            return version
    return None


def _prune(place, in_service, now):
    """Remove old versions: kept are the newest, the current one, the one a rollback goes to."""
    numbers = version_numbers(place)
    if len(numbers) <= KEPT_VERSIONS:
        return
    kept = [*numbers[:KEPT_VERSIONS], in_service.number]
    target = rollback_target(place, in_service, now)
    if target:
        kept.append(target.number)
    for number in numbers:
        if number not in kept:
            folder = place.version(number)
            os.rename(folder, _hidden(folder))  # half removed it is no version, but litter
            _remove(_hidden(folder))
    _sync(place.archive)


def install(place, in_service, leaf, chain, key, owed, now):
    """Make leaf (Certificate), chain (DER) and key (path or Secret) the current version.

    1. settle, so that the live names are links that show what they showed before
    2. and 3. make the version, with the hooks that it owes, and rename it into place
    4. rename .current: the one instant of change
    5. make links of what was no link, and touch them; remove the staged key that has become the
       key; prune
    """
    settle(place, in_service)  # 1
    number = _make_version(place, in_service, leaf, chain, key, owed)  # 2, 3
    installed = remove_staged(_go_live(place, in_service, number, leaf))  # 4, 5
    _prune(place, installed, now)
    return installed


def roll_back(place, in_service, target, owed):
    """Make a version (Version) current again, which owes these hooks, and mark the one it leaves.

    Killed before the rename, the mark stands in the version in service, where it means nothing:
    the next run removes it.
    """
    settle(place, in_service)
    like = _model_of(in_service)
    if like:
        _dress(place.version(target.number) + "/privkey.pem", like)
    write_pending(place, target.number, owed)
    if os.path.isdir(place.version(in_service.number)):
        _mark(place, in_service.number, "rolled-back", b"")
    return _go_live(place, in_service, target.number, target.leaf)


def _shake_hands_in_memory(fullchain, key):
    """Complete a handshake with ourselves as a server that loads these PEM bytes; or Failure."""
    import _thread
    import ssl

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    paths = []  # pipes, since it only loads files
    for content in (fullchain, key):
        read, write = os.pipe()
        _thread.start_new_thread(open(write, "wb", 0).write, (content,))  # and is closed then
        paths.append(f"/dev/fd/{read}")
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
        raise Failure("malformed", plain(getattr(error, "reason", None) or error))


def rehearse(leaf, chain, key):
    """Find out before anything is written what a server would find out at its reload.

    `leaf` is a Certificate, `chain` DER, `key` a path or a Secret. In a process of its own: it
    parses what came from outside, and holds the key. Failure (rehearsal; None for this host's).
    """
    pems = to_pem((leaf.der,) + chain), key_pem(key)
    try:
        in_own_process(lambda: _shake_hands_in_memory(*pems), OPENSSL_SECONDS)
    except Failure as failure:
        if failure.reason != "malformed":  # something is missing here, or took too long
            raise Failure(None, f"the rehearsal cannot be held: {failure}", failure.hint)
        raise Failure(
            "rehearsal",
            f"key and certificate do not complete a handshake ({failure})",
            "Is the key file damaged? Bring the upstream's again with --key",
        )


# --------------------------------------------------------------------------------------------------
# Hooks
# --------------------------------------------------------------------------------------------------


def _hook_folder(config, kind):
    """Return the files in renewal-hooks/KIND, sorted, but for an editor's copies (`~`)."""
    folder = f"{config}/renewal-hooks/{kind}"
    paths = [f"{folder}/{name}" for name in list_folder(folder) if not name.endswith("~")]
    return [path for path in paths if not os.path.isdir(path)]


def hook_files(config, kind):
    """Return the hooks in renewal-hooks/KIND, as certbot takes them: executable, sorted."""
    return [path for path in _hook_folder(config, kind) if os.access(path, os.X_OK)]


def skipped_hooks(config):
    """Return a line for each file in the hooks' folders that does not run."""
    lines = []
    try:
        for kind in ("deploy", "post", "alert"):
            for path in _hook_folder(config, kind):
                if not os.access(path, os.X_OK):
                    lines.append(f"{path} is not executable, and does not run")
    except OSError as error:
        lines.append(str(storage_failure(error)))
    return lines


def deploy_hooks(config, options):
    """Return what a deploy runs: the directory's files, then the lineage's own, each once."""
    return tuple(dict.fromkeys(hook_files(config, "deploy") + list(options.deploy_hooks)))


def names_variable(variable, names, report, lineage_name=""):
    """Return the value of a variable of names, cut with a warning where it is too long."""
    text = " ".join(names)
    if len(text) <= MAX_VARIABLE:
        return text
    report.warning(lineage_name, f"{variable} is too long, and was cut")
    return text[: MAX_VARIABLE + 1].rpartition(" ")[0]


def _check_file(path):
    """Raise Failure where somebody else could change what runs, through a link on the way too."""
    folder = os.path.dirname(path)
    check_folder(os.path.realpath(folder))
    check_folder(path)  # OSError for links in a circle
    if os.path.islink(path):
        _check_file(os.path.join(folder, os.readlink(path)))


def run_hook(hook, config, environment, variables, pass_on):
    """Run a hook and return ("" or what went wrong, seconds that it took).

    Its output goes to pass_on(bytes) as it comes. It is over when its own process is. No credential
    is in its environment.
    """
    environment = command_environment(environment, config)
    for name in CREDENTIALS:
        environment.pop(name, None)
    environment.update(variables)
    folder = config + "/renewal-hooks"
    command = ["/bin/sh", "-c", hook]
    started = time.monotonic()
    wrong = ""
    try:
        if hook.startswith(folder + "/") and os.path.lexists(hook):
            check_folder(folder)
            _check_file(hook)
            # by a shell, which also runs a file without a #! line
            command = ["/bin/sh", "-c", 'exec "$0"', hook]
        status, _, said = run_process(
            command, environment, HOOK_SECONDS, pass_on=pass_on, start_new_session=True
        )
        if status != 0:
            wrong = f"status {status}, {last_line(said)}".rstrip(", ")  # it may have said nothing
    except TimeoutError:
        wrong = f"did not end in {HOOK_SECONDS} s"
    except (Failure, OSError) as error:
        return plain(words_of(error)), 0.0
    return wrong, time.monotonic() - started


# --------------------------------------------------------------------------------------------------
# Health
# --------------------------------------------------------------------------------------------------

HEALTHS = ("ok", "due", "warning", "critical", "unknown")
BAD_HEALTHS = {"critical": 2, "unknown": 3, "warning": 1}  # plugins' exit status, the worst first


def due_time(leaf):
    """Return when a renewal is due: a third of the lifetime is left, or half of ten days or less.

    That is certbot's rule since its version 4.0.
    """
    share = 2 if leaf.lifetime <= 10 * DAY else 3
    return leaf.not_after - leaf.lifetime / share


def threshold(share, leaf):
    """Return the seconds of a threshold, "25%" of a leaf's lifetime or "10d"."""
    number = float(share[:-1])
    if share.endswith("d"):
        return int(number * DAY)
    return int(leaf.lifetime * number / 100)


def past(seconds, now):
    """Return a stored time, or None: a clock that once was ahead must not vouch for years."""
    if seconds is None or seconds > now:
        return None
    return seconds


def is_good(result):
    """Say whether a run that ended so has heard its source to good effect, if it asked one."""
    return result in ("installed", "unchanged", "pending")


def last_good(lineage, now):
    """Return when a source was last heard to good effect, or None."""
    state, seconds = lineage.state, lineage.state.good
    if seconds is None and (is_good(state.result) or state.reason == "rolled-back"):
        seconds = lineage.last_run
    return past(seconds, now)


def _time_left(seconds):
    """Return how long a certificate lasts, in words."""
    if seconds <= 0:
        return "has expired"
    if seconds < 2 * DAY:
        return f"expires in {seconds // 3600} hours"
    return f"expires in {seconds // DAY} days"


def since(seconds, length):
    """Return since when, in words: 10 characters of a time are the day, 16 the minute."""
    if seconds is None:
        return "so far"
    return "since " + iso_time(seconds).replace("T", " ")[:length]


def _silence(lineage, leaf, now):
    """Return what has not happened for too long, or ""."""
    options = lineage.options
    if options.enabled == "no":
        return ""
    run, good = past(lineage.last_run, now), last_good(lineage, now)
    # under --when due nobody is asked before
    start = min(due_time(leaf), now) if options.when == "due" else 0
    if now - max(run or 0, start) >= SILENT_HOURS * 3600:
        words = f"no run {since(run, 16)}: is the timer on?"
        if lineage.place.config == CONFIG_DIR:
            words += " systemctl enable --now certferry.timer"
        return words
    if now - max(good or 0, start) >= leaf.lifetime / 10:
        return f"no source confirmed it {since(good, 10)}"
    return ""


def health_of(lineage, in_service, now):
    """Return the Health of a lineage with what is in service; unknown where files cannot be read.

    Where files or the expiry are the cause, `why` goes on from the lineage's name.
    """
    if lineage.failure and lineage.failure.result == "failed":
        return Health("unknown", f"cannot be read: {lineage.failure}", "files")
    if not in_service.is_whole:
        return Health("critical", in_service.flaw, "files")
    leaf, options, state = in_service.leaf, lineage.options, lineage.state
    left = leaf.not_after - now
    expires = _time_left(left)
    for word, share in (("critical", options.critical), ("warning", options.warn)):
        if left <= threshold(share, leaf):
            return Health(word, expires, "expiry")
    if in_service.owed is not None:
        return Health("warning", "something is pending", "pending")
    # a reason that is unknown was written by another version
    if state.runs >= REASONS.get(state.reason, REASONS[None]).warns_after:
        return Health("warning", state.detail, "last run")
    silence = _silence(lineage, leaf, now)
    if silence:
        return Health("warning", silence, "silence")
    word = "due" if now >= due_time(leaf) else "ok"
    return Health(word, expires, "")


def alert_wanted(state, word, now):
    """Say whether alert hooks have to run: at a turn to, within or from bad health, and daily."""
    if word not in BAD_HEALTHS:
        return state.told in BAD_HEALTHS
    told_at = past(state.told_at, now) or 0
    # a timer's accuracy must not make it a day and a half
    return state.told != word or now - told_at >= DAY - 600


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------

_FIELDS = (
    "name result reason detail changed source not_before not_after serial fingerprint_sha256 "
    "public_key_sha256 staged_keys domains version health"
).split()
_LESSER_COLUMNS = ("SOURCE", "LAST CHECKED", "LAST SUCCESS")  # not on a narrow terminal


def with_hint(message, hint):
    """Return what is wrong and, in a sentence of its own, what to do about it.

    A hint that does not begin with a capital letter is a command, or what to add to one.
    """
    if not message or not hint:
        return message + hint
    if not message.endswith((".", "?")):
        message += "."
    if not hint[0].isupper():
        hint = f"Try: {hint}"
    return f"{message} {hint}"


def full_text(failure):
    """Return what a Failure says and what to do about it, as plain text."""
    return with_hint(plain(failure, 2 * MAX_TEXT), plain(failure.hint, MAX_RECORD))


def counted(number, noun):
    """Return a number with its noun, such as 1 day or 2 days."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def _minute(seconds):
    """Return a time to the minute, or `never` for None."""
    if seconds is None:
        return "never"
    return iso_time(seconds)[:16].replace("T", " ")


def _write(descriptor, data):
    """Write bytes; a reader that has gone away is no reason to stop ferrying."""
    try:
        while data:
            select.select([], [descriptor], [])  # a terminal may have been made non-blocking
            data = data[os.write(descriptor, data) :]
    except OSError:
        pass


def _describe(outcome, now):
    """Return what there is to say of a result after which options are remembered."""
    if outcome.said:
        return outcome.said
    leaf = outcome.in_service.leaf
    days = counted(days_left(leaf, now), "day")
    text = plain(" ".join(leaf.domains), 200)
    text += f", valid until {iso_time(leaf.not_after)[:10]} ({days})"
    if outcome.reason:
        text += f", {outcome.reason}"
    if outcome.source:
        text += f", from {outcome.source}"
    return text


def _detail(outcome):
    """Return what went wrong and what to do about it, or what else there is to say, or ""."""
    if outcome.problem:
        return full_text(outcome.problem)
    return outcome.said


def _staged_keys(in_service):
    """Return the SHA-256 of the public keys of the staged keys, for TLSA records and pins."""
    found = []
    for path in in_service.staged:
        try:
            found.append(fingerprint(public_key_of(path)))
        except (Failure, OSError):
            pass  # told where keys are compared
    return found


def _as_object(outcome):
    """Return one lineage as JSON shows it; null where a field does not apply."""
    fields = dict.fromkeys(_FIELDS)
    fields.update(
        name=outcome.lineage.name,
        result=outcome.result,
        reason=outcome.reason,
        detail=_detail(outcome) or None,
        changed=outcome.changed,
        source=outcome.source,
        staged_keys=_staged_keys(outcome.in_service),
        health=outcome.health.word,
    )
    leaf = outcome.in_service.leaf
    if leaf:
        fields.update(
            not_before=iso_time(leaf.not_before),
            not_after=iso_time(leaf.not_after),
            serial=leaf.serial,
            fingerprint_sha256=fingerprint(leaf.der),
            public_key_sha256=fingerprint(leaf.public_key),
            domains=list(leaf.domains),
            version=outcome.in_service.number,
        )
    return fields


class Reporter:
    """What a run says: results on standard output, problems on standard error, or one JSON.

    `options` holds the names of the options that were given.
    """

    def __init__(self, options=(), now=0):
        """Note how much is to be said, and to whom."""
        self.quiet = "quiet" in options
        self.verbose = "verbose" in options
        self.as_json = "json" in options
        self.dry_run = "dry-run" in options
        self.now = now
        self.failed = False
        self.started = time.monotonic()

    def _complain(self, priority, name, failure):
        """Write a line on standard error; systemd's journal reads priorities (sd-daemon(3))."""
        line = ": ".join(filter(None, ("certferry", name, full_text(failure))))
        info = os.fstat(2)
        if os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}":
            line = f"<{priority}>{line}"
        _write(2, f"{line}\n".encode())

    def line(self, *texts):
        """Write lines of results."""
        if not self.quiet and not self.as_json:
            self.show(texts)

    def show(self, texts, descriptor=1):
        """Write lines, on standard output unless told otherwise, however quiet the run is."""
        lines = [plain(text, MAX_RECORD) + "\n" for text in texts]
        _write(descriptor, "".join(lines).encode())

    def problem(self, name, failure):
        """Write what is wrong, with a lineage or with the run (""): the run has failed."""
        self.failed = True
        self._complain(3, name, failure)

    def warning(self, name, message, hint=""):
        """Write what an administrator should know."""
        self._complain(4, name, Failure(None, message, hint))

    def detail(self, name, message):
        """Write what only `--verbose` tells."""
        if self.verbose:
            self._complain(7, name, Failure(None, message))

    def pass_on(self, data):
        """Pass a hook's output on; what a quiet run needs of it stands in its problem's line."""
        if not self.quiet:
            _write(2 if self.as_json else 1, data)

    def outcome(self, outcome):
        """Write the result of one lineage, and its problem; what is deferred can wait."""
        name, problem = outcome.lineage.name, outcome.problem
        if outcome.result in REMEMBERING:
            text = f"{name}: {outcome.result}: {_describe(outcome, self.now)}"
            if self.dry_run:
                text += " (dry run: nothing was written)"
            self.line(text, *[f"  {line}" for line in outcome.lines])
        if problem is None:
            return
        if outcome.result != "deferred":
            self.problem(name, problem)
        elif not self.quiet:  # a medium that is unplugged mails nobody twice a day
            self._complain(4, name, problem)

    def document(self, outcomes):
        """Write the one JSON document; the outcomes are sorted by name."""
        import json  # 2 ms, and not in python3-minimal

        document = {"lineages": [_as_object(outcome) for outcome in outcomes]}
        if self.dry_run:
            document["dry_run"] = True
        _write(1, json.dumps(document, indent=2).encode() + b"\n")


_GAUGES = {
    "certificate_not_after_timestamp_seconds": "When the certificate in service expires.",
    "certificate_not_before_timestamp_seconds": "When the certificate in service began.",
    "last_check_timestamp_seconds": "When certferry last looked.",
    "last_success_timestamp_seconds": "When a source last confirmed or renewed the certificate.",
    "health": "0 ok, 1 due, 2 warning, 3 critical, 4 unknown.",
    "pending": "1 while a hook or a service that must show the new leaf is waited for.",
    "upstream_not_after_timestamp_seconds": "When the certificate accepted last expires.",
    "run_duration_seconds": "How long this run took.",
}


def format_metrics(outcomes, now, seconds):
    """Return Prometheus text format for lineages and a run's duration."""
    found = {"": {"run_duration_seconds": f"{seconds:.3f}"}}  # {labels: {gauge: value or None}}
    for outcome in outcomes:
        lineage, leaf = outcome.lineage, outcome.in_service.leaf
        values = {
            "last_check_timestamp_seconds": past(lineage.last_run, now),
            "last_success_timestamp_seconds": last_good(lineage, now),
            "health": HEALTHS.index(outcome.health.word),
            "pending": int(outcome.in_service.owed is not None),
            "upstream_not_after_timestamp_seconds": lineage.state.upstream_not_after,
        }
        if leaf:
            values["certificate_not_after_timestamp_seconds"] = leaf.not_after
            values["certificate_not_before_timestamp_seconds"] = leaf.not_before
        found[f'{{name="{lineage.name}"}}'] = values
    text = ""
    # the format wants the samples of a metric side by side
    for gauge, what in _GAUGES.items():
        text += f"# HELP certferry_{gauge} {what}\n# TYPE certferry_{gauge} gauge\n"
        for labels, values in found.items():
            if values.get(gauge) is not None:
                text += f"certferry_{gauge}{labels} {values[gauge]}\n"
    return text.encode()


def _explain(outcome):
    """Return why a lineage's health is bad, and what went wrong, each thing once; or ""."""
    state, health = outcome.lineage.state, outcome.health
    trouble = ""
    if state.runs:
        trouble = f"{state.culprit} {state.result} for {counted(state.runs, 'run')} "
        trouble += f"{since(state.since, 10)} ({state.reason or state.detail})"
    elif state.source and health.cause == "expiry":
        trouble = f"{state.source} still offers the same certificate"
    trouble = trouble.strip()  # there may be no culprit
    # the trouble of the last run, or what it left pending, says it in more words
    if not health.cause or (trouble and health.cause in ("pending", "last run")):
        return trouble
    return ": ".join(filter(None, (health.why, trouble)))


def _pending(outcome):
    """Return what a lineage waits for, and what else there is to know of it."""
    texts = [_explain(outcome), *outcome.lines]
    owed = outcome.in_service.owed
    if owed is not None and outcome.lineage.state.result != "pending":
        texts.append("to run: " + ", ".join(owed or ["a look at its services"]))
    return "; ".join(filter(None, texts))


def _row(outcome, now):
    """Return the cells of one lineage's row, {heading: text}; the last one may be of any length."""
    lineage, leaf = outcome.lineage, outcome.in_service.leaf
    left = "-"
    if leaf:
        share = min(100, max(0, 100 * (leaf.not_after - now) // leaf.lifetime))
        left = f"{days_left(leaf, now)} of {leaf.lifetime // DAY} ({share}%)"
    return {
        "NAME": lineage.name,
        "HEALTH": outcome.health.word,
        "DAYS LEFT": left,
        "SOURCE": " ".join(source.text for source in sources_of(lineage)),
        "LAST CHECKED": _minute(past(lineage.last_run, now)),
        "LAST SUCCESS": _minute(last_good(lineage, now)),
        "PENDING": _pending(outcome),
    }


def _align(rows, headings):
    """Return the lines of a table with these columns, the headings first."""
    lines = [""] * (1 + len(rows))
    for heading in headings:
        cells = [heading, *(plain(row[heading]) for row in rows)]
        width = max(map(len, cells)) + 2
        lines = [line + cell.ljust(width) for line, cell in zip(lines, cells)]
    return [line.rstrip() for line in lines]


def _table(outcomes, now, columns):
    """Return the lines of the table; on a narrow terminal without what matters less."""
    rows = [_row(outcome, now) for outcome in outcomes]
    headings = list(rows[0])
    lines = _align(rows, headings)
    if len(lines[0]) > columns:  # the last cell of a row may be longer, and is read in any case
        lines = _align(rows, [each for each in headings if each not in _LESSER_COLUMNS])
    return lines


def _more(outcome):
    """Return the lines that `status --verbose` adds for one lineage, its options among them."""
    lineage, leaf = outcome.lineage, outcome.in_service.leaf
    lines = ["", lineage.name]
    if leaf:
        lines += [
            f"  names        {' '.join(leaf.domains)}",
            f"  validity     {iso_time(leaf.not_before)} to {iso_time(leaf.not_after)}",
            f"  issuer       {describe_name(leaf.issuer)}",
            f"  serial       {leaf.serial}",
            f"  key          {describe_key(leaf.public_key)}",
            f"  files        {lineage.place.live}, version {outcome.in_service.number or '-'}",
        ]
    for key, texts in lineage.given.items():
        lines.append(f"  {key:12} {', '.join(texts)}")
    if outcome.result:
        last_run = f"  last run     {_minute(lineage.last_run)} {outcome.result} {_detail(outcome)}"
        lines.append(last_run.rstrip())
    return lines


def _headline(bad):
    """Return what is wrong with lineages of bad health, at most three of them."""
    texts = []
    for outcome in bad[:3]:
        # of files and the expiry the reason is a verb, and goes on from the name
        between = " " if outcome.health.cause in ("files", "expiry") else ": "
        texts.append(f"{outcome.lineage.name}{between}{_explain(outcome)}")
    if len(bad) > 3:
        texts.append(f"and {len(bad) - 3} more")
    return "; ".join(texts)


def _harmless(text):
    """Return a text that forges no performance data: a hook may hold a pipe or quotes."""
    return re.sub("[|'\"]", "?", plain(text, 2 * MAX_TEXT))


def status_lines(outcomes, failure, now, columns, verbose):
    """Return (exit status, lines) of `status`: a line for monitoring, then for a person.

    `failure` says why there is no outcome.
    """
    if not outcomes:
        return 3, [f"CERTFERRY UNKNOWN - {_harmless(full_text(failure))}"]
    bad = [each for word in BAD_HEALTHS for each in outcomes if each.health.word == word]
    status, head = 0, f"CERTFERRY OK - lineages: {len(outcomes)}"
    if bad:
        worst = bad[0].health.word
        status = BAD_HEALTHS[worst]
        head = f"CERTFERRY {worst.upper()} - {_harmless(_headline(bad))}"
    data = []  # the days left, with the thresholds, as monitoring plugins write them
    for outcome in outcomes:
        leaf, options = outcome.in_service.leaf, outcome.lineage.options
        if leaf:
            warn = threshold(options.warn, leaf) // DAY
            critical = threshold(options.critical, leaf) // DAY
            data.append(f"'{outcome.lineage.name}'={days_left(leaf, now)}d;{warn};{critical}")
    if data:
        head += f" | {' '.join(data)}"
    lines = _table(outcomes, now, columns)
    if verbose:
        for outcome in outcomes:
            lines += _more(outcome)
    return status, [head, *(line.replace("|", "?") for line in lines)]


# --------------------------------------------------------------------------------------------------
# Ferry
# --------------------------------------------------------------------------------------------------


class Run(
    collections.namedtuple(
        "Run",
        "config environment now command names changes dry_run force key_source network report "
        "flags stores key",
    )
):
    """What holds for every lineage of a run.

    `command` is NAME (certferry NAME), renew or rollback; `now` the clock, read once; `changes` are
    the remembered options that this command gave, `flags` the other words that an advice repeats;
    `key` is the GivenKey of --key.
    """


Run.__new__.__defaults__ = ((), None, None)  # the last two are what prepare() finds out

# The private key that --key gave: a Secret, and its public key (DER).
GivenKey = collections.namedtuple("GivenKey", "secret public")


class Crossing(
    collections.namedtuple(
        "Crossing",
        "lineage before in_service given exchange choice failure waiting said lines is_forgotten",
    )
):
    """How far a lineage has come.

    `before` was in service when it was looked at first, `in_service` is now (in a dry run: would
    be), `given` are the remembered options by now. `exchange` is the number of one that is under
    way, `choice` the offer that was taken, `failure` what ended the crossing, `waiting` what only
    defers it: each may be None. `is_forgotten` says that options were given and not remembered.
    `said` are a rollback's words, `lines` what is shown below the
    result.
    """


# An offer that the judge accepted, as it would be written; key is a path or a Secret.
Choice = collections.namedtuple("Choice", "source leaf chain key is_news")

NOTHING = InService(None, None, (), None, (), None, False, "has no certificate", ())


def failure_of(error):
    """Return the Failure that any exception is."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, ImportError):
        return Failure(
            None,
            f"this Python has no module {error.name}",
            "Install python3, not only python3-minimal",
        )
    if isinstance(error, OSError):
        return storage_failure(error)
    origin = error.__traceback__
    while origin.tb_next:
        origin = origin.tb_next
    where = f"{os.path.basename(origin.tb_frame.f_code.co_filename)} line {origin.tb_lineno}"
    return Failure(
        None,
        f"this is a bug in certferry ({where}: {type(error).__name__} {error})",
        "Please report it. What is in service stays",
    )


# Finding lineages


def is_lineage(place):
    """Say whether there is such a lineage: a NAME.conf, or a .current that leads to a version."""
    return os.path.lexists(place.conf) or pointed_number(place) is not None


def is_certbots(place):
    """Say whether a lineage is certbot's: its conf is not empty, its links avoid .current."""
    if not os.path.isfile(place.renewal) or os.path.getsize(place.renewal) == 0:
        return False
    if not os.path.lexists(place.pointer):
        return True
    links = [place.member(name) for name in MEMBERS if os.path.islink(place.member(name))]
    return any(not os.readlink(link).startswith(".current/") for link in links)


def discover(config):
    """Return [Place] of the lineages in the config dir; what else is there is left alone."""
    places = set()
    for file in list_folder(config + "/certferry"):
        name = re.sub(r"\.conf\Z", "", file)
        if is_lineage_name(name) and name != file:
            places.add(Place(config, name))
    for name in list_folder(config + "/live"):
        place = Place(config, name)
        if is_lineage_name(name) and pointed_number(place) is not None:
            places.add(place)
    return sorted(places)


def load_state(lineage):
    """Return a Lineage with what its state file tells; a damaged one is a notice and no more."""
    place = lineage.place
    try:
        lineage = lineage._replace(last_run=int(os.stat(place.state).st_mtime))
        return lineage._replace(state=parse_state(read_text(place.state), place.state))
    except FileNotFoundError:
        return lineage
    except (Failure, OSError) as failure:
        notice = f"{failure}. What it held is found out again"
        return lineage._replace(last_run=None, notices=(notice,))


def load_lineage(place, changes):
    """Return the Lineage of a place, with the changes of this command."""
    lineage = Lineage(place, {}, NO_OPTIONS, NO_STATE, None, (), None)
    try:
        for folder in (place.config, place.records):
            if os.path.lexists(folder):
                check_folder(folder)
        lineage = load_state(lineage)
        given, options = {}, NO_OPTIONS
        if os.path.lexists(place.conf):
            given, options = parse_conf(read_text(place.conf), place.conf)
        if changes:
            options = parse_options(merge_options(given, changes))
        return lineage._replace(given=given, options=options)
    except Exception as error:
        return lineage._replace(failure=failure_of(error))


def load_all(config, names, changes):
    """Return the Lineages with these names, without a name all that there are."""
    places = [Place(config, name) for name in sorted(set(names))]
    if not places:
        places = discover(config)
    return [load_lineage(place, changes) for place in places]


# Advice


def again(run, lineage, *extra):
    """Return the `certferry NAME` command with what this run was given, but for --key."""
    return command_text(lineage.name, run.changes, (*extra, *run.flags))


def force_command(run, lineage):
    """Return the command that takes an offer which is older, lost names or was rolled back from."""
    if run.command == "NAME":
        return again(run, lineage, "--force")
    return command_text("renew", {}, (lineage.name, "--force", *run.flags))


def bring_key(run, lineage):
    """Return the command that brings the upstream's private key."""
    sources = sources_of(lineage)
    hosts = [source.host for source in sources if source.kind not in KEY_HOLDING]
    if not hosts:
        return again(run, lineage, "--key", "PEM")
    path = f"{CONFIG_DIR}/live/{lineage.name}/privkey.pem"
    host = hosts[0].rstrip(".")
    return f"ssh root@{host} cat {path} | {again(run, lineage, '--key', '-')}"


def no_key_failure(run, lineage, unusable):
    """Return the Failure of a lineage without a private key; `unusable` are those that are none."""
    path = lineage.place.member("privkey.pem")
    message = f"there is no private key in {path}"
    if unusable:
        message = str(unusable[0])
    return Failure("no-key", message, f"Try: {bring_key(run, lineage)}")


def no_lineage_failure(config, name="NAME"):
    """Return the Failure of a command for a lineage that is not there, or where there is none."""
    names = [other.name for other in discover(config)]
    if names:
        return Failure(None, f"there is no such lineage here (there are {', '.join(names)})")
    command = command_text(name, {"from": ["HOST"]}, config_flags(config))
    return Failure(None, "nothing is set up yet", f"Try: {command}")


def certbot_failure(run, lineage):
    """Return the Failure of a lineage that certbot renews."""
    return Failure(
        "certbot",
        "certbot renews it here",
        f"To hand it over: mv {shell_quote(lineage.place.renewal)} ~/ (not 'certbot delete', which "
        f"removes the files that your servers read), then {again(run, lineage)}",
    )


# From what is in service to the next: nothing is written in a dry run


def settled(run, lineage, in_service):
    """Return the InService once the live names are links, where what they show is whole."""
    place = lineage.place
    if in_service.linked or not in_service.is_whole:
        return in_service
    if run.dry_run:
        return in_service._replace(linked=True, number=next_number(place))
    settle(place, in_service)
    run.report.warning(
        place.name,
        f"{place.live} holds links now",
        "A container needs live and archive both mounted",
    )
    return look(place, lineage.state.key_file)


def put_in_service(run, lineage, in_service, leaf, chain, key):
    """Make leaf, chain and key the current version, which owes all hooks; return the InService.

    In a dry run the InService that this would lead to.
    """
    place = lineage.place
    owed = deploy_hooks(run.config, lineage.options)
    if not run.dry_run:
        return install(place, in_service, leaf, chain, key, owed, run.now)
    before = settled(run, lineage, in_service)
    if not isinstance(key, Secret):
        before = before._replace(key_path=key)
    number = max(next_number(place), (before.number or 0) + 1)
    return before._replace(number=number, leaf=leaf, chain=chain, owed=owed, linked=True, flaw="")


def owe(run, lineage, in_service, hooks):
    """Make the version in service owe these hooks, None for nothing; return the InService."""
    if in_service.number is not None and not run.dry_run:
        write_pending(lineage.place, in_service.number, hooks)
    return in_service._replace(owed=hooks)


# 3. tidy


def stage_given_key(run, lineage, in_service):
    """Stage the key of --key, unless it is in service or staged; return the InService with it."""
    place = lineage.place
    keys, _ = usable_keys(place, in_service, [])
    if run.key.public in keys:
        return in_service
    path = staged_path(place, run.key.public)
    if not run.dry_run:
        stage_key(place, run.key.secret.pem, run.key.public)
    return in_service._replace(staged=tuple(sorted({*in_service.staged, path})))


def acceptable_keys(run, lineage, in_service, versions):
    """Return ({public key: path or Secret}, [Failure]) of the keys that an offer may be for."""
    if not run.force and in_service.is_whole:
        # one that was rolled back from may come again
        newer = [each for each in versions if is_newer(each.leaf, in_service.leaf)]
        versions = [each for each in newer if each.rolled_back]
    keys, unusable = usable_keys(lineage.place, in_service, versions)
    if run.key:  # in a dry run it is not staged
        keys.setdefault(run.key.public, run.key.secret)
    return keys, unusable


def make_whole(run, lineage, in_service):
    """Make whole what is not, where a key that fits is here; return the InService then."""
    leaf, place = in_service.leaf, lineage.place
    if in_service.is_whole or leaf is None:
        return in_service
    keys, _ = acceptable_keys(run, lineage, in_service, load_versions(place))
    for public, key in keys.items():
        if fits(public, leaf):
            words = f"{in_service.flaw}: to be made whole with the key of {key}"
            run.report.warning(place.name, words)
            return put_in_service(run, lineage, in_service, leaf, in_service.chain, key)
    return in_service


def tell_what_waits(run, lineage, in_service):
    """Warn of what calls for a person and stops nothing."""
    place, warn = lineage.place, run.report.warning
    for notice in lineage.notices:
        warn(place.name, notice)
    if os.path.lexists(place.renewal):
        warn(
            place.name,
            f"renewal/{place.name}.conf lies beside certferry's lineage, and 'certbot renew' fails "
            "over it",
            f"Try: mv {shell_quote(place.renewal)} ~/",
        )
    keys = [in_service.key_path or "", *in_service.staged]
    for path in filter(os.path.exists, keys):
        info = os.stat(path)
        if info.st_mode & 0o004:
            hint = f"Try: chmod o-r {shell_quote(path)}"
            warn(place.name, f"{path} can be read by everybody", hint)
        if path in in_service.staged and not is_ours(info):
            hint = f"If it is right: chown root {shell_quote(path)}"
            warn(place.name, f"{path} is another user's key, and is not used", hint)


def tidy_up(run, name, litter):
    """Remove what an interrupted run left, and tell of it; `name` is the lineage's, or ""."""
    if litter:
        remove_litter(litter)
        run.report.warning(name, f"removed what was left half made: {' '.join(litter)}")


def tidy(run, lineage, in_service):
    """Tell what waits, remove what an interrupted run left, link what is missing, stage --key, and
    make whole; return the InService then."""
    place = lineage.place
    tell_what_waits(run, lineage, in_service)
    if not run.dry_run:
        tidy_up(run, place.name, in_service.litter)
        if in_service.number is not None:
            # of a rollback that was killed before its rename: in service it means nothing
            unmark(place, in_service.number, "rolled-back")
            if in_service.leaf and not in_service.linked:
                linked = link_missing_names(place)
                if linked:
                    run.report.warning(place.name, f"linked again: {' '.join(linked)}")
                    in_service = look(place, lineage.state.key_file)
    if run.key:
        in_service = stage_given_key(run, lineage, in_service)
    in_service = make_whole(run, lineage, in_service)
    if run.dry_run:
        return in_service
    return remove_staged(in_service)


# 4. choose


def name_of(lineage):
    """Return the name that a server is asked for: the first -d that is no wildcard, else NAME."""
    for domain in lineage.options.domains:
        if not domain.startswith("*."):
            return domain
    return lineage.name


def key_type(public_key):
    """Return RSA, ECDSA or another kind of a public key, "" for None."""
    if public_key is None:
        return ""
    return key_kind(public_key).partition(" ")[0]


def submit(run, lineage, source, our_key, is_local=False):
    """Have the network process ask a source, or a local service; return the exchange's number."""
    job = Job(
        kind=source.kind,
        host=source.host,
        port=source.port,
        timeout=lineage.options.timeout,
        server_name=lineage.options.sni or name_of(lineage),
        key_type=key_type(our_key),
        role="upstream" if lineage.options.sources else "default",
    )
    if is_local:  # asked for the lineage's own name, and again and again
        job = job._replace(server_name=name_of(lineage), role="service")
    return run.network.submit(job)


def is_not_due(run, lineage, in_service):
    """Say whether `--when due` keeps this run from asking."""
    if run.command != "renew" or lineage.options.when != "due" or run.force:
        return False
    if not in_service.is_whole:
        return False
    return run.now < due_time(in_service.leaf)


def ask(run, lineage, source, our_key, exchange):
    """Return the Offer of a source; Failure. `exchange` is the number of one that is under way."""
    if source.kind in KEY_HOLDING:
        answer = fetch(source, lineage.options.timeout, run.environment, run.config, run.stores)
    else:
        if exchange is None:
            exchange = submit(run, lineage, source, our_key)
        answer = run.network.answer(exchange, source)
    return read_offer(source, answer)


def as_written(leaf, chain):
    """Return a chain (DER) in order and without a root; as it came where several are possible."""
    chains = possible_chains(leaf, [parse_certificate(der) for der in chain])
    # where there is one of each length each is the beginning of the next
    if len(chains) != len(chains[-1]) + 1:
        return chain
    return tuple(issuer.der for issuer in chains[-1])


def is_here(run, lineage, in_service, leaf, chain):
    """Say whether a leaf with this very chain (DER, as it would be written) is in service.

    Or was, in a version that is not above the current one or was rolled back from: the members of
    a pool may differ. With --force only what is in service counts.
    """
    if leaf != in_service.leaf:
        return False
    if chain == as_written(leaf, in_service.chain):
        return True
    for version in load_versions(lineage.place):
        known = version.rolled_back or version.number <= (in_service.number or 0)
        if known and (version.leaf, version.chain) == (leaf, chain):
            return not run.force
    return False


def find_trust(options, leaf, others, now):
    """Return (None, the first chain that leads to a trusted root).

    Or ((words, hint), ()): what is wrong with the longest chain.
    """
    try:
        roots = read_roots(options.ca_file)
    except Failure as failure:
        return (str(failure), failure.hint), ()
    refused = {}
    for chain in candidate_chains(leaf, others, now):
        words = chain_flaw(leaf, chain, public_trust=roots is None)
        flaw = (words, "See to it on the upstream")
        if not words:
            flaw = verify_chain(leaf, chain, roots, now)
        if flaw is None:
            return None, chain
        refused.setdefault(len(chain), flaw)
    return refused[max(refused)], ()


def gather_facts(run, lineage, in_service, offer, leaf, others):
    """Return (Facts, chain as it would be written, key for it or None) of an offer; Failure."""
    public_key = leaf_public_key(leaf.der)
    if public_key is None:
        words = f"{offer.source.text}: openssl cannot read its certificate"
        raise Failure("malformed", words, "Look at what it holds")
    carried = None
    if offer.key:
        try:
            carried = public_half(offer.key.pem, trusted=False)
        except ValueError as error:
            words = f"{offer.source.text}: its private key: {error}"
            raise Failure("malformed", words, "Look at what it holds")
    versions = load_versions(lineage.place)
    keys, unusable = acceptable_keys(run, lineage, in_service, versions)
    if not keys and carried is None:
        raise no_key_failure(run, lineage, unusable)
    for failure in unusable:
        run.report.warning(lineage.name, full_text(failure))
    trust_flaw, chain = find_trust(lineage.options, leaf, others, run.now)
    given_key = None
    if run.key:
        path = staged_path(lineage.place, run.key.public)
        if path in in_service.staged:
            given_key = (run.key.public, path)
    facts = Facts(
        name=lineage.name,
        domains=lineage.options.domains,
        leaf=leaf,
        source=offer.source,
        current=in_service.leaf,
        address=offer.address,
        public_key=public_key,
        carried_key=carried,
        accepted_keys=tuple(keys),
        our_key=next(iter(keys), None),
        given_key=given_key,
        bring_key=bring_key(run, lineage),
        force_command=force_command(run, lineage),
        trust_flaw=trust_flaw,
        versions=versions,
    )
    chain = tuple(issuer.der for issuer in chain)
    return facts, chain, keys.get(public_key, offer.key)


def examine(run, lineage, in_service, offer):
    """Return the Choice that an offer is; Failure where the judge refuses it."""
    leaf, *others = [parse_certificate(der) for der in (offer.leaf, *offer.chain)]
    current = in_service.leaf
    asked_again = "domain" in run.changes or "ca-file" in run.changes
    written = as_written(leaf, offer.chain)
    is_news = not (in_service.is_whole and is_here(run, lineage, in_service, leaf, written))
    # the usual run: nothing is news, and no openssl process is needed
    facts = Facts(lineage.name, lineage.options.domains, leaf, offer.source)
    chain, key, rules = in_service.chain, in_service.key_path, RULES_IN_SERVICE
    if is_news or asked_again:
        facts, chain, key = gather_facts(run, lineage, in_service, offer, leaf, others)
        rules = RULES
        is_news = not (in_service.is_whole and is_here(run, lineage, in_service, leaf, chain))
    refusal = judge(facts, run.now, run.force, rules)
    if refusal:
        raise refusal
    if is_news:
        rehearse(leaf, chain, key)
        if current and for_clients(current) and not for_clients(leaf):
            run.report.warning(
                lineage.name,
                "the new certificate is for servers only (no clientAuth)",
                "See to what uses it as a client: mail servers, mutual TLS",
            )
    return Choice(offer.source, leaf, chain, key, is_news)


def usable_sources(run, lineage, in_service):
    """Return (the Sources to ask, the public key of ours or None); Failure (no-key) for none."""
    sources = sources_of(lineage)
    if in_service.is_whole:
        return sources, in_service.leaf.public_key
    versions = load_versions(lineage.place)
    keys, unusable = acceptable_keys(run, lineage, in_service, versions)
    if keys:
        return sources, next(iter(keys))
    sources = [source for source in sources if source.kind in KEY_HOLDING]
    if not sources:
        raise no_key_failure(run, lineage, unusable)
    return sources, None


def choose(run, lineage, in_service, exchange):
    """Return the Choice of the first source that gives one, None where this run is not to ask.

    Where a renewal is due and a source has only the current leaf, the next one is asked too.
    Otherwise the gravest Failure.
    """
    if is_not_due(run, lineage, in_service):
        return None
    sources, our_key = usable_sources(run, lineage, in_service)
    due = in_service.leaf is not None and run.now >= due_time(in_service.leaf)
    in_place, gravest = None, None
    for source in sources:
        try:
            offer = ask(run, lineage, source, our_key, exchange)
            choice = examine(run, lineage, in_service, offer)
        except Failure as failure:
            if failure.reason not in (None, "storage"):  # which are this host's trouble
                failure.culprit = source.text
            run.report.detail(lineage.name, str(failure))
            gravest = graver(gravest, failure)
        else:
            begins = iso_time(choice.leaf.not_before)
            run.report.detail(lineage.name, f"{source.text} offers the certificate of {begins}")
            if choice.is_news or not due:
                return choice
            in_place = in_place or choice
        exchange = None
    if in_place is None:
        raise gravest
    return in_place


def next_state(run, lineage, result, failure, choice):
    """Return the State after a run that ended so; `failure` and `choice` may be None."""
    state = lineage.state._replace(
        result=result, reason=None, detail="", culprit="", since=None, runs=0
    )
    state = state._replace(good=last_good(lineage, run.now))
    if choice:
        state = state._replace(source=choice.source.text, upstream_not_after=choice.leaf.not_after)
    if choice and is_good(result):
        state = state._replace(good=None)  # which is the time of this run
    if failure is None:
        return state
    if failure.reason == "rolled-back":
        state = state._replace(good=None)
    since, runs = run.now, 1
    if (lineage.state.result, lineage.state.reason) == (result, failure.reason):
        since, runs = lineage.state.since, lineage.state.runs + 1
    return state._replace(
        reason=failure.reason,
        detail=plain(failure),
        culprit=plain(failure.culprit),
        since=since,
        runs=runs,
    )


def can_wait(run, lineage, in_service, failure):
    """Say whether a failure is only deferred: nothing is lost by trying at the next run."""
    if failure.reason == "rolled-back":
        return True
    if failure.reason == "not-yet-valid":  # no clock at boot
        return in_service.leaf is not None and run.now < in_service.leaf.not_before
    if failure.reason not in ("unreachable", "timeout") or run.command != "renew":
        return False
    if any(process.broken for process in (run.network, *run.stores.values())):
        return False
    state = next_state(run, lineage, "deferred", failure, None)
    after = lineage._replace(state=state, last_run=run.now)
    return health_of(after, in_service, run.now)[0] == "ok"


# 6. remember


def remember(run, lineage, in_service):
    """Write the options that this command gave; return (options as remembered, InService) then.

    A new hook is owed before it is remembered: owing too much is mended, too little is not. A hook
    that was replaced or forgotten is owed no longer.
    """
    given = merge_options(lineage.given, run.changes)
    is_kept = given == lineage.given and os.path.lexists(lineage.place.conf)
    if run.command != "NAME" or is_kept:
        return lineage.given, in_service
    before = lineage.given.get("deploy-hook", [])
    wanted = given.get("deploy-hook", [])
    new = [hook for hook in wanted if hook not in before]
    if new or in_service.owed:
        gone = [hook for hook in before if hook not in wanted]
        owed = [hook for hook in in_service.owed or () if hook not in gone]
        in_service = owe(run, lineage, in_service, tuple(dict.fromkeys(owed + new)))
    if not run.dry_run:
        save_conf(lineage.place, given)
    return given, in_service


# 7. finish


def run_deploy_hooks(run, lineage, in_service, hooks):
    """Run deploy hooks; return (InService, [line to show], None or the Failure of the first)."""
    domains = in_service.leaf.domains
    names = names_variable("RENEWED_DOMAINS", domains, run.report, lineage.name)
    variables = {"RENEWED_LINEAGE": lineage.place.live, "RENEWED_DOMAINS": names}
    left, lines, failure = list(hooks), [], None
    for hook in hooks:
        wrong, seconds = run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
        if not wrong:
            lines.append(f"hook         {plain(hook)}: done ({seconds:.1f} s)")
            left.remove(hook)
            in_service = owe(run, lineage, in_service, tuple(left))
            continue
        lines.append(f"hook         {plain(hook)}: {wrong}")
        if failure is None:
            words = f"this hook failed ({wrong}) and is tried again at every run: {plain(hook)}"
            hint = "Correct it, or give other ones with --deploy-hook"
            failure = Failure("hook", words, hint, hook)
    return in_service, lines, failure


def judge_service(run, lineage, in_service, source, exchange):
    """Return what is wrong with a local service, "" where it presents the leaf in service.

    Also "" where it can't be asked for our type of key: then it is warned of.
    """
    leaf = in_service.leaf
    try:
        answer = run.network.answer(exchange, source)
        offer = read_offer(source, answer)
        other = parse_certificate(offer.leaf)
    except ValueError as error:
        return f"{source.text} shows what cannot be read ({error})"
    except Failure as failure:
        return f"{failure} (asked for {name_of(lineage)})"
    if other.der == leaf.der:
        return ""
    if answer.message == TLS_13_ONLY:
        run.report.warning(
            lineage.name,
            f"{source.text} shows its {key_type(other.public_key)} certificate, and could not be "
            f"asked for the {key_type(leaf.public_key)} one",
        )
        return ""
    return (
        f"{source.text}, asked for {name_of(lineage)}, still serves the certificate of "
        f"{iso_time(other.not_before)[:10]} (serial {other.serial[:20]})"
    )


def wrong_services(run, lineage, in_service, services):
    """Return {service: what is wrong} of those that do not present the leaf in service."""
    key = in_service.leaf.public_key
    # side by side
    asked = {each: submit(run, lineage, each, key, is_local=True) for each in services}
    found = {}
    for service, exchange in asked.items():
        wrong = judge_service(run, lineage, in_service, service, exchange)
        if wrong:
            found[service] = wrong
    if run.network.broken:
        raise Failure("unreachable", run.network.broken, "The services were not looked at")
    return found


def look_at_services(run, lineage, in_service, patience):
    """See that the local services present the leaf within `patience` seconds; or Failure."""
    deadline = time.monotonic() + patience
    wrong = wrong_services(run, lineage, in_service, lineage.options.served_at)
    while wrong and time.monotonic() < deadline:
        time.sleep(0.5)  # reloads are asynchronous
        wrong = wrong_services(run, lineage, in_service, wrong)
    if not wrong:
        return
    words = "; ".join(wrong.values())
    if patience:
        words += f", {patience} s after the hooks ran"
    hint = "The hooks run again at the next run"
    if in_service.number is None:  # plain files have no version that could owe them
        hint = f"Try: {again(run, lineage, '--force')}"
    fullchain = lineage.place.member("fullchain.pem")
    hint += f". Does the daemon read {fullchain}?"
    raise Failure("not-served", words, hint, ", ".join(service.text for service in wrong))


def finish(run, lineage, in_service):
    """Run the hooks that are owed, then look at the services: what is unfinished is pending.

    Return (InService, [line to show], None or Failure).
    """
    configured = deploy_hooks(run.config, lineage.options)
    hooks = [hook for hook in configured if hook in (in_service.owed or ())]
    if len(hooks) < len(in_service.owed or ()):  # one was corrected: which is it now?
        hooks = configured
    if run.dry_run and in_service.owed is not None:
        lines = [f"hook         {plain(hook)}: would run" for hook in hooks]
        return in_service._replace(owed=None), lines, None
    in_service, lines, failure = run_deploy_hooks(run, lineage, in_service, hooks)
    if failure:
        return in_service, lines, failure
    try:
        waited = in_service.owed is not None
        look_at_services(run, lineage, in_service, SERVED_SECONDS if waited else 0)
    except Failure as error:
        if error.reason == "not-served":
            in_service = owe(run, lineage, in_service, configured)
        return in_service, lines, error
    if in_service.owed is not None:
        in_service = owe(run, lineage, in_service, None)
    return in_service, lines, None


# 8. conclude


def run_folder(run, kind, variables, name):
    """Run the alert or post hooks, which are not tried again; say whether any ran."""
    try:
        hooks = hook_files(run.config, kind)
    except OSError as error:
        run.report.problem(name, storage_failure(error))
        return False
    has_run = False
    for hook in hooks:
        wrong, seconds = run_hook(hook, run.config, run.environment, variables, run.report.pass_on)
        if seconds > 0:
            has_run = True
        if not wrong:
            continue
        words, hint = f"the hook {hook} failed ({wrong})", "Run it by hand: it is not tried again"
        if kind == "post":
            run.report.problem(name, Failure(None, words, hint))
        else:
            run.report.warning(name, words, hint)
    return has_run


def alert(run, outcome):
    """Run the alert hooks where health calls for it; return the State that remembers it."""
    lineage, leaf, health = outcome.lineage, outcome.in_service.leaf, outcome.health
    state = lineage.state
    if not alert_wanted(state, health.word, run.now):
        return state._replace(told=health.word)
    variables = {
        "CERTFERRY_NAME": lineage.name,
        "CERTFERRY_HEALTH": health.word,
        "CERTFERRY_WAS": state.told or "ok",
        "CERTFERRY_REASON": outcome.reason or "",
        "CERTFERRY_DETAIL": plain(health.why),
        "CERTFERRY_NOT_AFTER": "",
        "CERTFERRY_DAYS_LEFT": "",
    }
    if outcome.problem:
        variables["CERTFERRY_DETAIL"] = plain(outcome.problem)
    if leaf:
        variables["CERTFERRY_NOT_AFTER"] = iso_time(leaf.not_after)
        variables["CERTFERRY_DAYS_LEFT"] = str(days_left(leaf, run.now))
    if run_folder(run, "alert", variables, lineage.name):
        return state._replace(told=health.word, told_at=run.now)
    return state


def record(run, before, outcome, state):
    """Write the State of an Outcome; what the disk refuses is only told.

    `before` is the Lineage as it was: where nothing is new only the file's time of change is set.
    """
    place, in_service = before.place, outcome.in_service
    try:
        if in_service.is_whole:
            state = state._replace(key_file=key_record(in_service.key_path, in_service.leaf))
        if state != before.state or before.last_run is None:
            write_file(place.state, os.fsencode(format_state(state)))
        touch_state(place, run.now)
    except (Failure, OSError) as error:
        if outcome.reason != "storage":  # which says the same
            failure = failure_of(error)
            failure = Failure(None, f"not recorded: {failure}", failure.hint)
            run.report.problem(place.name, failure)


def not_kept(run, lineage, failure):
    """Return a Failure that says, too, that the options of this command were not remembered."""
    if run.dry_run:
        return failure
    words, command = "The options were not kept", again(run, lineage)
    if run.key and not lineage.failure and failure.reason != "storage":
        words = "The key was kept, the options were not"
    elif run.key_source:
        command = again(run, lineage, "--key", run.key_source)
    hint = failure.hint
    if "certferry " not in hint:
        hint = with_hint(hint, f"Then again: {command}")
    return Failure(failure.reason, f"{failure}. {words}", hint)


def is_installed(crossing):
    """Say whether another leaf or chain is shown than before, or the same with another flaw."""
    before, after = crossing.before, crossing.in_service
    if after.leaf is None:
        return False
    return (after.leaf, after.chain, after.flaw) != (before.leaf, before.chain, before.flaw)


def result_of(crossing):
    """Return how a crossing ended."""
    if crossing.failure:
        return crossing.failure.result
    if crossing.waiting:
        return "deferred"
    if is_installed(crossing):
        return "installed"
    if crossing.choice:
        return "unchanged"
    return "not-due"


def conclude(run, crossing):
    """Return the Outcome of a crossing: recorded, with alert hooks run.

    Options that were given and not remembered change neither state nor health.
    """
    choice, source = crossing.choice, None
    if choice:
        source = choice.source.text
    before = crossing.before._replace(owed=None, litter=())  # these are no change of the lineage
    after = crossing.in_service._replace(owed=None, litter=())
    result = result_of(crossing)
    problem = crossing.failure or crossing.waiting
    lineage = crossing.lineage._replace(given=crossing.given)
    if crossing.is_forgotten:
        problem = not_kept(run, lineage, problem)
        lineage = lineage._replace(options=parse_options(lineage.given))
    else:
        state = next_state(run, lineage, result, problem, choice)
        lineage = lineage._replace(state=state, last_run=run.now)
    outcome = Outcome(
        lineage=lineage,
        in_service=crossing.in_service,
        result=result,
        problem=problem,
        said=crossing.said,
        changed=(before, crossing.lineage.given) != (after, crossing.given),
        deployed=is_installed(crossing),
        source=source,
        health=health_of(lineage, crossing.in_service, run.now),
        lines=crossing.lines,
    )
    if crossing.is_forgotten or run.dry_run or not is_lineage(lineage.place):
        return outcome
    state = alert(run, outcome)
    record(run, crossing.lineage, outcome, state)
    return outcome


# The story


def asks_early(run, lineage, in_service):
    """Say whether a source may be asked before the lineage's turn: its key needs no openssl."""
    if lineage.failure or not in_service.is_whole:
        return False
    if run.command == "rollback" or is_not_due(run, lineage, in_service):
        return False
    return lineage.state.key_file == key_record(in_service.key_path, in_service.leaf)


def begin(run, lineage):
    """Look at a lineage, and have its first source asked where its key is remembered to fit."""
    place, in_service, exchange = lineage.place, NOTHING, None
    try:
        in_service = look(place, lineage.state.key_file)  # 1
        if is_certbots(place):  # 2
            raise certbot_failure(run, lineage)
        if run.command != "NAME" and not is_lineage(place):
            raise no_lineage_failure(run.config, place.name)
        first = sources_of(lineage)[0]
        if asks_early(run, lineage, in_service) and first.kind not in KEY_HOLDING:
            exchange = submit(run, lineage, first, in_service.leaf.public_key)
    except Exception as error:
        lineage = lineage._replace(failure=lineage.failure or failure_of(error))
    return Crossing(
        lineage=lineage,
        before=in_service,
        in_service=in_service,
        given=lineage.given,
        exchange=exchange,
        choice=None,
        failure=None,
        waiting=None,
        said="",
        lines=[],
        is_forgotten=False,
    )


def look_again(run, crossing):
    """Return what is in service after a failure, which may have come after the rename."""
    lineage = crossing.lineage
    if lineage.failure or run.dry_run:
        return crossing.before
    try:
        return look(lineage.place, lineage.state.key_file)
    except (Failure, OSError):
        return crossing.before


def cross(run, crossing):
    """Take a lineage through the steps 3 to 6."""
    lineage = crossing.lineage
    choice, waiting = None, None
    in_service = tidy(run, lineage, crossing.before)  # 3
    try:
        choice = choose(run, lineage, in_service, crossing.exchange)  # 4
    except Failure as error:
        if not can_wait(run, lineage, in_service, error):
            raise
        waiting = error
    if choice and choice.is_news:
        in_service = put_in_service(
            run, lineage, in_service, choice.leaf, choice.chain, choice.key
        )  # 5
    elif run.command == "NAME":
        in_service = settled(run, lineage, in_service)
    given, in_service = remember(run, lineage, in_service)  # 6
    return crossing._replace(in_service=in_service, given=given, choice=choice, waiting=waiting)


def go_back(run, crossing):
    """Make the version before the current one current, and mark the one that it leaves."""
    lineage = crossing.lineage
    place = lineage.place
    left = settled(run, lineage, tidy(run, lineage, crossing.before))
    target = rollback_target(place, left, run.now)
    if target is None:
        words = "there is no earlier version to go back to"
        hint = f"Versions are kept in {place.archive}/{place.name}@N"
        raise Failure("", words, hint)
    owed = deploy_hooks(run.config, lineage.options)
    in_service = left._replace(
        number=target.number,
        leaf=target.leaf,
        chain=target.chain,
        owed=owed,
        linked=True,
        flaw="",
    )
    if not run.dry_run:
        in_service = roll_back(place, left, target, owed)
    said = f"version {target.number} of {iso_time(target.leaf.not_before)[:10]} in place of "
    said += f"version {left.number}"
    if left.leaf:
        said += f" of {iso_time(left.leaf.not_before)[:10]}"
    said += ", which stays out until there is a newer one"
    return crossing._replace(in_service=in_service, said=said)


def cross_or_fail(run, crossing):
    """Return how far a lineage comes, whatever ends that."""
    try:
        if crossing.lineage.failure:
            raise crossing.lineage.failure
        if run.command == "rollback":
            return go_back(run, crossing)
        return cross(run, crossing)
    except Exception as error:
        return crossing._replace(
            in_service=look_again(run, crossing),
            failure=failure_of(error),
            is_forgotten=run.changes != {},
        )


def finish_or_fail(run, crossing):
    """Run the hooks that are owed and look at the services; what ends that is the failure."""
    lineage, in_service = crossing.lineage, crossing.in_service
    lines = []
    try:
        if run.force and crossing.choice:
            hooks = deploy_hooks(run.config, lineage.options)
            in_service = owe(run, lineage, in_service, hooks)
        in_service, lines, failure = finish(run, lineage, in_service)
    except Exception as error:
        failure = failure_of(error)
    crossing = crossing._replace(in_service=in_service, lines=crossing.lines + lines)
    if failure and is_installed(crossing):
        words = f"installed, but {failure}"
        failure = Failure(failure.reason, words, failure.hint, failure.culprit)
    return crossing._replace(failure=crossing.failure or failure)


def describe_files(run, crossing):
    """Return the lines that name the files of what `certferry NAME` staged or put into service."""
    if run.command != "NAME":
        return []
    lineage, known = crossing.lineage, crossing.before.staged
    lines = [f"staged key   {path}" for path in crossing.in_service.staged if path not in known]
    if not is_installed(crossing):
        return lines
    lines += [
        f"certificate  {lineage.place.member('fullchain.pem')}",
        f"private key  {lineage.place.member('privkey.pem')}",
    ]
    if not deploy_hooks(run.config, lineage.options):
        command = again(run, lineage, "--deploy-hook", "systemctl reload-or-restart nginx")
        lines.append(f"hook         none: nothing reloads your server. Try: {command}")
    return lines


def ferry(run, crossing):
    """Take one lineage through the whole story; return its Outcome."""
    crossing = cross_or_fail(run, crossing)
    crossing = crossing._replace(lines=describe_files(run, crossing))
    may_run_hooks = crossing.lineage.failure is None and not crossing.is_forgotten
    if may_run_hooks and crossing.in_service.is_whole:
        crossing = finish_or_fail(run, crossing)  # 7
    return conclude(run, crossing)  # 8


# What is there, without touching it


def remarks(lineage, in_service):
    """Yield what `status` has to say besides health."""
    for path in in_service.staged:
        try:
            yield "staged key " + describe_key(public_key_of(path))
        except (Failure, OSError) as error:
            yield str(error)
    leaf = in_service.leaf
    if leaf:
        if leaf.lifetime <= 10 * DAY:
            days = leaf.lifetime // DAY
            yield f"lives {days} days: let the timer run hourly (systemctl edit certferry.timer)"
        if not in_service.linked:
            yield "its live names are no links of certferry's yet"
    if lineage.options.enabled == "no":
        yield "enabled = no"
    yield from lineage.notices


def inspect(now, lineage):
    """Return the Outcome of what is on the disk, without touching anything."""
    in_service = NOTHING
    try:
        in_service = look(lineage.place, lineage.state.key_file)
    except Exception as error:
        lineage = lineage._replace(failure=lineage.failure or failure_of(error))
    state = lineage.state
    result, problem = state.result, None
    if state.runs:
        problem = Failure(state.reason, state.detail)
    if lineage.failure:
        result, problem = lineage.failure.result, lineage.failure
    return Outcome(
        lineage=lineage,
        in_service=in_service,
        result=result,
        problem=problem,
        said="",
        changed=False,
        deployed=False,
        source=state.source,
        health=health_of(lineage, in_service, now),
        lines=list(remarks(lineage, in_service)),
    )


def ferry_or_tell(run, crossing):
    """Return the Outcome of ferry(), or one that tells of what nobody foresaw: the others go on."""
    try:
        return ferry(run, crossing)
    except Exception as error:
        return inspect(run.now, crossing.lineage._replace(failure=failure_of(error)))


# A run over many lineages


def hold_config(run):
    """Hold the config dir, and remove what an interrupted run left in its shared folders."""
    config = run.config
    if run.command == "NAME" and not run.dry_run:
        make_folder(config)
    if not os.path.lexists(config):
        return
    check_folder(config)
    holder = os.environ.get("CERTFERRY_HOOK_OF")
    in_hook = holder is not None and os.path.realpath(holder) == os.path.realpath(config)
    lock(config, in_hook, run.dry_run)
    if run.dry_run:
        return
    tidy_up(run, "", litter_in(config + "/archive") + litter_in(config + "/certferry"))


def read_given_key(source):
    """Return the GivenKey of --key, a path or - for standard input; Failure (no-key)."""
    where = source
    if source == "-":
        where = os.dup(0)
        if os.isatty(0):
            os.write(2, b"certferry: paste the private key, then Ctrl-D\n")
    try:
        with open(where, "rb") as file:
            data = file.read(MAX_KEY)
    except (OSError, ValueError) as error:
        raise Failure("no-key", f"--key {source}: {words_of(error)}", "Give a PEM file, or -")
    if source == "-" and not data.strip():
        raise Failure(
            "no-key",
            "standard input was empty, and --key - reads the key from it",
            "Did the command before the | fail?",
        )
    try:
        key = read_pem(data)[1] or Secret(data)  # what is no PEM key at all openssl will tell
        return GivenKey(key, public_half(key.pem, trusted=True))
    except ValueError as error:
        raise Failure("no-key", f"--key: {error}", "Give one private key as PEM, not encrypted")


def prepare(run):
    """Return (Run, [Lineage]) with the config dir held, credentials and the key of --key read.

    The processes of the stores are forked before the key and the environment file are read.
    """
    if run.key_source is None:
        hold_config(run)
    lineages = load_all(run.config, run.names, run.changes)
    kinds = {source.kind for lineage in lineages for source in lineage.options.sources}
    run = run._replace(stores=start_stores(kinds))
    if run.key_source is not None:
        run = run._replace(key=read_given_key(run.key_source))
        # only now: who types a passphrase for ssh must not hold up the timer's run
        hold_config(run)
        lineages = load_all(run.config, run.names, run.changes)
    path = run.config + "/certferry/environment"
    if os.path.lexists(path):
        check_folder(os.path.dirname(path))
        run.environment.update(parse_environment(read_text(path), path))
    return run, lineages


def run_post_hooks(run, outcomes):
    """Run certbot's post hooks once where something was deployed."""
    renewed, failed = [], []
    for outcome in outcomes:
        names = [outcome.lineage.name]
        if outcome.in_service.leaf:
            names = outcome.in_service.leaf.domains
        if outcome.deployed:
            renewed.extend(names)
        elif outcome.result in ("failed", "refused"):
            failed.extend(names)
    if run.dry_run or not renewed:
        return
    lists = {"RENEWED_DOMAINS": renewed, "FAILED_DOMAINS": failed}
    variables = {key: names_variable(key, names, run.report) for key, names in lists.items()}
    run_folder(run, "post", variables, "")


def tell_failure(run, failure):
    """Yield an Outcome with the failure of the whole run for each lineage that it was about."""
    try:
        lineages = load_all(run.config, run.names, {})
    except (Failure, OSError):
        lineages = []
    for lineage in lineages:
        problem = failure
        if run.changes:
            problem = not_kept(run, lineage, failure)
        yield inspect(run.now, lineage)._replace(result=problem.result, problem=problem)
    if not lineages:
        run.report.problem("", failure)


def ferry_all(run):
    """Yield the Outcome of each lineage in order: first exchanges that can be are under way then.

    The network process exists already; those of the stores are forked here, before any key is read.
    """
    try:
        run, lineages = prepare(run)
    except Exception as error:
        yield from tell_failure(run, failure_of(error))
        return
    if not lineages:
        run.report.line(f"certferry: {full_text(no_lineage_failure(run.config))}")
    for line in skipped_hooks(run.config):
        run.report.detail("", line)
    begun = []
    for lineage in lineages:
        if run.command == "renew" and lineage.options.enabled == "no":
            run.report.line(f"{lineage.name} is left out: enabled = no in its conf")
        else:
            begun.append(begin(run, lineage))
    outcomes = []
    for crossing in begun:
        outcomes.append(ferry_or_tell(run, crossing))
        yield outcomes[-1]
    run_post_hooks(run, outcomes)


def inspect_all(config, names, now):
    """Return the Outcome of each lineage named, of all without a name; or Failure, OSError."""
    outcomes = []
    for lineage in load_all(config, names, {}):
        if not is_lineage(lineage.place):
            lineage = lineage._replace(failure=no_lineage_failure(config, lineage.name))
        outcomes.append(inspect(now, lineage))
    if not outcomes:
        raise no_lineage_failure(config)
    return outcomes


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

COMMANDS = ("renew", "status", "rollback")

_SHORT_HELP = """\
usage: certferry NAME [options]    set up NAME, ferry it now, start the timer
       certferry renew [NAME...]   ferry every lineage, or those named
       certferry status [NAME...]  what is here, how healthy, what is pending
       certferry rollback NAME     make the previous version current again
More: certferry --help, certferry NAME --help, certferry renew --help, ..."""

_STARTTLS = " ".join(f"{kind}://" for kind in DEFAULT_PORTS if kind != "tls")
_HELP = {
    "": f"""\
{_SHORT_HELP}

certferry takes a renewed TLS certificate from the server that has it to every
server that needs it. The server that has it needs no configuration. Bring its
private key once. From then on each new certificate for that key is fetched:

  ssh root@up.example.net cat /etc/letsencrypt/live/example.com/privkey.pem |
    certferry example.com --key - --from up.example.net \\
      --deploy-hook 'systemctl reload-or-restart nginx'

Options of every command, before or after the words:
""",
    "NAME": f"""\
usage: certferry NAME [options]   set up NAME or change its options, ferry it,
start the timer. These options are remembered (an empty value forgets):
      --from SOURCE      where to fetch; may repeat: tried in order (NAME:443)
      --sni HOST         the name to ask a TLS source for
  -d, --domain DOMAIN    a name that must be covered; may repeat
      --ca-file PEM      trust these roots and no others
      --deploy-hook CMD  shell command to run after a deploy; may repeat
      --served-at HOST:PORT  a service that must present it then; may repeat
      --when always|due  ask at every run, or only when it is due (always)
      --warn P, --critical P  a share of the lifetime (25%, 10%) or days (10d)
      --timeout SECONDS  for the whole exchange with one source (20)
SOURCE is HOST[:PORT], file:PATH, exec:COMMAND, vault://HOST[:PORT]/MOUNT/PATH,
azure://VAULT/NAME, or with STARTTLS HOST[:PORT] after one of
{_STARTTLS}
These are not:
      --key PEM          add this private key; - for standard input
      --force            accept what is older, rolled back or for fewer names;
                         run the hooks even if nothing is new
      --no-timer         do not start the timer
""",
    "renew": """\
usage: certferry renew [NAME...] [options]   ferry all lineages, or those named:
what the timer runs twice a day

      --jitter SECONDS   sleep first: less than SECONDS, fixed for this host
      --metrics FILE     write Prometheus metrics there, whatever fails
      --force            (needs a NAME) accept what is older, rolled back or for
                         fewer names; run the hooks even if nothing is new
""",
    "status": """\
usage: certferry status [NAME...] [options]   what is here, how healthy it is,
what is pending. It uses no network. The exit status is a monitoring plugin's:
0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.

      --metrics FILE     write Prometheus metrics there
""",
    "rollback": """\
usage: certferry rollback NAME [options]   make the previous version current and
run the deploy hooks. The version that was current stays out until the source
has a newer one. Forward again: certferry renew NAME --force

""",
}

_COMMON_HELP = f"""\
      --config-dir DIR   instead of {CONFIG_DIR}
      --dry-run          say what would happen; write nothing, run no hook
      --json             one JSON document instead of lines
  -q, --quiet; -v, --verbose  only problems; more detail
  -h, --help; --version"""

# the options without a value; the commands that accept each option
_FLAGS = "dry-run no-timer json quiet verbose help version force".split()
_EVERY = ("NAME", *COMMANDS)
_GOES_WITH = {
    **dict.fromkeys(REMEMBERED, ("NAME",)),
    **dict.fromkeys(_FLAGS, _EVERY),
    "enabled": (),  # of NAME.conf alone
    "force": ("NAME", "renew"),
    "key": ("NAME",),
    "jitter": ("renew",),
    "metrics": ("renew", "status"),
    "config-dir": _EVERY,
}
_LETTERS = {"domain": ["-d"], "quiet": ["-q"], "verbose": ["-v"], "help": ["-h"]}

# a line break, a key's label, or the base64 of a key's DER
_SECRET = r"[\r\n]|PRIVATE KEY|\AM[A-Z0-9][A-Za-z0-9+/]{30,}=*\Z"


class _Asked(collections.namedtuple("_Asked", "command names options changes")):
    """What a command line asks for.

    `command` is NAME (certferry NAME), renew, status, rollback or "". `options` are those of this
    run, {name: value}, `changes` those to remember, {name: [text, ...]}.
    """


class _Usage(Failure):
    """A wrong command line, in words that repeat no value that may be a secret."""

    def __init__(self, message):
        """Hold what is wrong; what to do is always the same."""
        # what may be a piece of a key is not repeated
        words = re.sub("[A-Za-z0-9+/=]{40,}", "...", message)
        Failure.__init__(self, None, words, "certferry --help")


def _refuse(message):
    """Raise _Usage for what argparse finds wrong; its own words may end with a value."""
    option = re.search("--[a-z-]+", message)[0]
    what = "takes no value" if "ignored explicit argument" in message else "needs a value"
    raise _Usage(f"{option} {what}")


def _split(arguments):
    """Return (command, {option: [value, ...]}, NAMEs, unknown options) of a command line.

    The value of a flag is "". _Usage where an option lacks its value.
    """
    import argparse  # 5 ms

    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        # a width of its own: python3-minimal has no shutil to ask the terminal for it
        formatter_class=functools.partial(argparse.HelpFormatter, width=80),
    )
    parser.error = _refuse
    for name in _GOES_WITH:
        how = {"action": "append"}
        if name in _FLAGS:
            how = {"action": "append_const", "const": ""}
        parser.add_argument(*_LETTERS.get(name, []), f"--{name}", dest=name, **how)
    # without positionals the words are what is left, before and after options alike
    options, left = parser.parse_known_args(arguments)
    words = [word for word in left if not word.startswith("-")]
    unknown = [word for word in left if word not in (*words, "--")]
    command = "NAME"
    if not words:
        command = ""
    elif words[0] in COMMANDS:
        command = words.pop(0)
    return command, vars(options), words, unknown


def _check_metrics(path):
    """Raise _Usage where the file for metrics exists and is no regular file."""
    # the rename would replace a device or a link for the whole host
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise _Usage(f"{plain(path)} is no regular file for metrics")


def _check_options(command, given):
    """Raise _Usage where an option does not go with a command, or its value cannot be used."""
    for name, values in given.items():
        if command not in _GOES_WITH[name]:
            raise _Usage(f"--{name} does not go with {command}")
        for value in values:
            # up to Python 3.12 argparse makes a list of `--key=--`
            if value == [] or re.search(_SECRET, value):
                raise _Usage(f"--{name} takes one line, and a private key only as a file or as -")
            if value == "" and name not in REMEMBERED and name not in _FLAGS:
                raise _Usage(f"--{name} needs a value")
    if "jitter" in given and not re.match(r"[0-9]{1,6}\Z", given["jitter"][-1]):
        raise _Usage("--jitter takes whole seconds")
    if "metrics" in given:
        _check_metrics(given["metrics"][-1])
    if "json" in given:
        import json  # noqa: F401  where there is none, it is told before any work is done


def _read_name(word, command):
    """Return the lineage that a word names, with `*.` before it or not; or _Usage."""
    if max(word, default="") > "\x7f":
        raise _Usage("a NAME with other than ASCII letters is written in its ASCII form (xn--...)")
    if re.search(_SECRET, word):
        raise _Usage("a NAME is a host name on one line, and no key")
    try:
        return lineage_name(re.sub(r"\A\*\.", "", word))
    except ValueError:
        kind = "a full host name (a NAME has a dot)"
    if command == "NAME":
        kind = f"neither a command ({', '.join(COMMANDS)}) nor {kind}"
    else:
        kind = f"not {kind}"
    raise _Usage(f"{shell_quote(plain(word, 60))} is {kind}")


def _absolute(key, text):
    """Return an option's value, a path in it absolute: the timer starts in another folder."""
    text = text.strip()  # as NAME.conf gives it back
    if key == "ca-file" and text:
        return os.path.abspath(text)
    if key == "from" and re.match("file:.", text):
        return "file:" + os.path.abspath(text[5:])
    return text


def _parse(command, given, words, unknown):
    """Return what a command line, as _split() gives it, asks for; _Usage where it is wrong."""
    if unknown:  # no more of it than an option's name: it may be a key
        raise _Usage(f"there is no option {re.match('--?[a-z-]{0,20}', unknown[0])[0]}")
    if not command or "help" in given:
        return _Asked(command, [], given, {})
    names = [_read_name(word, command) for word in words]
    _check_options(command, given)
    if command in ("NAME", "rollback") and len(names) != 1:
        raise _Usage("one NAME at a time is needed")
    if "force" in given and not names:
        raise _Usage("renew --force needs a NAME")
    options, changes = {}, {}
    for name, values in given.items():
        if name in REMEMBERED:
            changes[name] = [_absolute(name, text) for text in values]
        else:
            options[name] = values[-1]  # the last one counts
    try:
        parse_options(merge_options({}, changes))
    except ValueError as error:
        raise _Usage("--{} {}".format(*error.args))
    if command == "NAME" and words[0].startswith("*."):
        changes.setdefault("domain", []).append(f"*.{names[0]}")
    return _Asked(command, names, options, changes)


def jitter_delay(seconds, host):
    """Return a delay in [0, seconds), fixed for a host and spread evenly over a fleet.

    `host` is text that no two hosts share.
    """
    import hashlib

    # hashed, since machine ids need not be spread evenly, and are not for others to know
    digest = hashlib.sha256(f"certferry {host}".encode("utf-8", "replace")).digest()
    return seconds * int.from_bytes(digest[:6], "big") / 2**48


def _host_text():
    """Return machine-id and host name: clones share the one, strangers the other."""
    try:
        with open("/etc/machine-id", encoding="latin-1") as file:
            machine = file.read(256).strip()
    except OSError:
        machine = ""
    return f"{machine} {os.uname().nodename}"


def _systemctl(*words):
    """Return (whether it succeeded, output) of systemctl for the timer."""
    command = ["systemctl", *words, "certferry.timer"]
    try:
        status, output, errors = run_process(command, os.environ, 60)
    except (OSError, ValueError) as error:
        return False, str(error)
    return status == 0, (output + errors).decode("utf-8", "replace")


def _tell_of_cron(run):
    """Show the line for cron that does what the timer does, unless install.sh put it in place."""
    is_there = run.config == CONFIG_DIR and os.path.exists("/etc/cron.d/certferry")
    if is_there or run.dry_run:
        return
    program = os.path.realpath(sys.argv[0])
    words = [program, "renew", "--jitter", "43200", "--quiet", *config_flags(run.config)]
    if not os.access(program, os.X_OK):
        words.insert(0, sys.executable)
    line = " ".join(shell_quote(word) for word in words)
    line = line.replace("%", "\\%")  # cron ends a line at a bare %
    run.report.line(f"no timer was started. For cron: 17 1,13 * * * {line}")


def start_timer(run):
    """Start the timer, or show the line for cron; say whether the timer was or would be started."""
    report = run.report
    # systemd runs here, and the timer, which is for the default config dir, was installed
    is_for_timer = run.config == CONFIG_DIR and os.path.isdir("/run/systemd/system")
    if not is_for_timer or not _systemctl("cat")[0]:
        _tell_of_cron(run)
        return False
    # what runs already is no change, for Ansible's sake
    if _systemctl("is-active")[0] and _systemctl("is-enabled")[0]:
        return False
    if run.dry_run:
        report.line("certferry.timer: would be started")
        return True
    is_started, output = _systemctl("enable", "--now")
    if not is_started:
        words = f"certferry.timer could not be started ({' '.join(output.split())})"
        report.problem("", Failure(None, words, "systemctl enable --now certferry.timer"))
        return False
    text = "certferry.timer: started"
    clock = re.search(r"\d\d:\d\d", _systemctl("show", "-p", "NextElapseUSecRealtime")[1])
    if clock:
        text += f", next run {clock[0]}"
    report.line(text)
    return True


def _write_metrics(path, outcomes, config, report):
    """Write the metrics of all lineages: the series of one that is left out would end."""
    path = os.path.abspath(path)
    others = []
    try:
        others = inspect_all(config, [], report.now)
    except (Failure, OSError):
        pass  # told already
    by_name = {outcome.lineage.name: outcome for outcome in others + outcomes}
    seconds = time.monotonic() - report.started
    try:
        _check_metrics(path)
        write_file(path, format_metrics(by_name.values(), report.now, seconds), 0o644)
    except (Failure, OSError) as error:
        words = f"no metrics were written to {path} ({words_of(error)})"
        hint = f"Look at --metrics, and at CERTFERRY_METRICS in {config}/certferry/environment"
        report.problem("", Failure(None, words, hint))


def _show_status(asked, config, report):
    """Show what is on the disk; return the exit status that monitoring expects."""
    outcomes, failure = [], None
    try:
        outcomes = inspect_all(config, asked.names, report.now)
    except (Failure, OSError) as error:
        failure = failure_of(error)
    if "metrics" in asked.options and not report.dry_run:
        _write_metrics(asked.options["metrics"], outcomes, config, report)
    columns = os.get_terminal_size(1).columns if os.isatty(1) else 1000
    status, lines = status_lines(outcomes, failure, report.now, columns, report.verbose)
    if report.as_json:
        report.document(outcomes)
        if failure:
            report.problem("", failure)
    elif not report.quiet:
        # a | in a name would forge performance data
        report.show(lines + [line.replace("|", "?") for line in skipped_hooks(config)])
    elif status > 0:
        report.show(lines[:1])
    return status


def _ferry(asked, config, report):
    """Ferry what was asked and report it; return the exit status."""
    options = asked.options
    flags = config_flags(config)
    if asked.command == "NAME":
        flags += tuple(f"--{name}" for name in _FLAGS if name in options)
    network = Network()  # forked before any key is read, and before credentials are copied
    run = Run(
        config=config,
        environment=dict(os.environ),
        now=report.now,
        command=asked.command,
        names=asked.names,
        changes=asked.changes,
        flags=flags,
        dry_run=report.dry_run,
        force="force" in options,
        key_source=options.get("key"),
        network=network,
        report=report,
    )
    outcomes = []
    for outcome in ferry_all(run):
        report.outcome(outcome)
        wants_timer = run.command == "NAME" and "no-timer" not in options
        if wants_timer and outcome.result in REMEMBERING:
            is_news = start_timer(run)
            outcome = outcome._replace(changed=is_news or outcome.changed)
        outcomes.append(outcome)
    network.close()
    path = options.get("metrics", run.environment.get("CERTFERRY_METRICS"))
    if path and run.command == "renew" and not run.dry_run:
        _write_metrics(path, outcomes, config, report)
    if report.as_json:
        report.document(outcomes)
    return int(report.failed)


def _obey(asked):
    """Do what the command line asks; return the exit status."""
    options = asked.options
    if "version" in options:
        Reporter().show([f"certferry {__version__}"])
        return 0
    if "help" in options:
        Reporter().show((_HELP[asked.command] + _COMMON_HELP).split("\n"))
        return 0
    if not asked.command:
        Reporter().show(_SHORT_HELP.split("\n"), 2)
        return 2
    # before anything is read: a run that sleeps holds no lock and no key
    if "jitter" in options:
        time.sleep(jitter_delay(int(options["jitter"]), _host_text()))
    config = os.path.abspath(options.get("config-dir", CONFIG_DIR))
    report = Reporter(options, int(time.time()))
    if asked.command == "status":
        return _show_status(asked, config, report)
    return _ferry(asked, config, report)


def main(arguments):
    """Return the exit status of a command line: whatever happens ends so, without a traceback."""
    # where an option lacks its value, nobody knows for sure which word is the command
    word = "status" if "status" in arguments else ""
    try:
        word, *others = _split(arguments)
        return _obey(_parse(word, *others))
    except KeyboardInterrupt:
        failure = Failure(None, "interrupted", "The next run takes up what is unfinished")
        status = 130
    except Exception as error:
        failure = failure_of(error)
        status = 2 if isinstance(error, _Usage) else 1
        if word == "status":
            status = 3  # UNKNOWN
    Reporter().problem("", failure)
    return status


def command():
    """Be the command."""
    make_usual()
    # every line was flushed; taking the interpreter down takes 7 ms
    os._exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
