"""Servers that show a certificate without holding its key: TLS records made by hand.

    trick = impostors.Trick("1.3", world.certificates(credential.fullchain),
                            [impostors.alert(1, 0)])
    with impostors.Impostor({"a.example.com": trick}, protocol="smtp") as server: ...

An impostor plays the trick that is named by the server name that a client asks for, so one port
serves a whole table. In TLS 1.3 a certificate is encrypted, under keys that need no certificate's
key: the impostor's share of the X25519 exchange is the base point itself, so that the shared secret
is the client's own share, and neither side of it takes any arithmetic here.
"""

import collections
import hashlib
import hmac
import os
import socket
import struct

from tests import world

Trick = collections.namedtuple("Trick", "version shown after ending cut chosen whole")
Trick.__new__.__defaults__ = ((), "close", None, None, True)
Trick.__doc__ = """What an impostor does.

version  "1.2" or "1.3"
shown    the certificates to show, as DER, the leaf first
after    what follows them: (record type, payload) pairs, encrypted in TLS 1.3, and whole records
ending   what then happens to the connection: "close", "reset" or "silence"
cut      send so many bytes of it all, then that ending; None for all
chosen   (protocol version, cipher suite) that the server says it chose, in TLS 1.2, as bytes
whole    False: leave out the certificates
"""

Hello = collections.namedtuple("Hello", "name session share message")
Hello.__doc__ = "A client's hello: server name, session id, X25519 share, and all of its message."

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA, HEARTBEAT = range(20, 25)
HELLO_REQUEST, NEW_SESSION_TICKET, ENCRYPTED_EXTENSIONS, CERTIFICATE = 0, 4, 8, 11
SERVER_KEY_EXCHANGE, CERTIFICATE_REQUEST, SERVER_HELLO_DONE = 12, 13, 14
CERTIFICATE_VERIFY, FINISHED, CERTIFICATE_STATUS = 15, 20, 22
X25519 = 0x001D
ECDSA_SHA256, RSA_PSS_SHA256 = 0x0403, 0x0804
BASE_POINT = b"\x09" + bytes(31)


# ---------------------------------------------------------------- messages


def number(value, size):
    """A whole number in that many bytes."""
    return value.to_bytes(size, "big")


def vector(size, *parts):
    """Bytes with their length before them, in that many bytes."""
    content = b"".join(parts)
    return number(len(content), size) + content


def message(kind, *parts):
    """A handshake message."""
    return bytes([kind]) + vector(3, *parts)


def record(kind, content):
    """A record in the clear."""
    return bytes([kind]) + b"\x03\x03" + vector(2, content)


def alert(level, code):
    """An alert, to follow the certificates."""
    return ALERT, bytes([level, code])


def handshake(*messages):
    """Handshake messages in one record, to follow the certificates."""
    return HANDSHAKE, b"".join(messages)


def made_up_signature(rsa=False):
    """What has the form of a signature and is nobody's."""
    if rsa:
        return number(RSA_PSS_SHA256, 2) + vector(2, b"\x01" + os.urandom(255))
    half = b"\x02\x20\x01" + os.urandom(31)
    return number(ECDSA_SHA256, 2) + vector(2, b"\x30\x44", half, half)


def key_exchange(rsa=False, signature=None):
    """TLS 1.2's ServerKeyExchange; signature b"" for none at all."""
    if signature is None:
        signature = made_up_signature(rsa)
    share = b"\x03" + number(X25519, 2) + vector(1, BASE_POINT)
    return message(SERVER_KEY_EXCHANGE, share, signature)


def certificate_verify(rsa=False):
    """TLS 1.3's CertificateVerify with a signature that is nobody's."""
    return message(CERTIFICATE_VERIFY, made_up_signature(rsa))


def finished(version):
    """A Finished that fits nothing."""
    return message(FINISHED, os.urandom(12 if version == "1.2" else 32))


# ---------------------------------------------------------------- what the client says


def receive(sock, size):
    """Exactly so many bytes; ValueError where the peer ends before."""
    content = b""
    while len(content) < size:
        piece = sock.recv(size - len(content))
        if not piece:
            raise ValueError("the peer hung up")
        content += piece
    return content


def read_hello(sock):
    """The client's hello, which may come in several records."""
    content = b""
    while len(content) < 4 or len(content) < 4 + int.from_bytes(content[1:4], "big"):
        kind, _, size = struct.unpack(">BHH", receive(sock, 5))
        if kind != HANDSHAKE:
            raise ValueError("no handshake")
        content += receive(sock, size)
    return parse_hello(content)


def parse_hello(content):
    """A Hello from the bytes of its message."""
    session_end = 39 + content[38]
    ciphers_end = session_end + 2 + int.from_bytes(content[session_end : session_end + 2], "big")
    offset = ciphers_end + 1 + content[ciphers_end] + 2
    name, share = None, None
    while offset < len(content):
        kind, size = struct.unpack_from(">HH", content, offset)
        extension = content[offset + 4 : offset + 4 + size]
        offset += 4 + size
        if kind == 0:
            name = extension[5:].decode("ascii")
        elif kind == 51:
            share = _find_share(extension[2:])
    return Hello(name, content[39:session_end], share, content)


def _find_share(shares):
    while shares:
        group, size = struct.unpack_from(">HH", shares)
        if group == X25519:
            return shares[4 : 4 + size]
        shares = shares[4 + size :]
    return None


# ---------------------------------------------------------------- what an impostor says


def flight(hello, trick):
    """All that the server says, and how much of it is the part that ends with the certificates."""
    if trick.version == "1.2":
        return _old_flight(hello, trick)
    return _new_flight(hello, trick)


def _join(opening, trick, protect):
    """The opening, and what the trick has after it, record by record."""
    content = opening
    for each in trick.after:
        content += protect(*each) if isinstance(each, tuple) else each
    return content, len(opening)


def _old_flight(_hello, trick):
    """TLS 1.2: everything is in the clear."""
    version, cipher = trick.chosen or (b"\3\3", b"\xc0\x2b")  # ECDHE-ECDSA-AES128-GCM-SHA256
    # renegotiation_info, without which OpenSSL 3 hangs up
    extensions = vector(2, b"\xff\x01\x00\x01\x00")
    hello = message(2, version, os.urandom(32), b"\0", cipher, b"\0", extensions)
    opening = record(HANDSHAKE, hello)
    if trick.whole:
        shown = vector(3, *(vector(3, der) for der in trick.shown))
        opening += record(HANDSHAKE, message(CERTIFICATE, shown))
    return _join(opening, trick, record)


def _new_flight(hello, trick):
    """TLS 1.3: what follows the hello is encrypted."""
    share = number(51, 2) + vector(2, number(X25519, 2), vector(2, BASE_POINT))
    version = number(43, 2) + vector(2, b"\x03\x04")
    session = vector(1, hello.session)
    answer = message(
        2, b"\x03\x03", os.urandom(32), session, b"\x13\x03\0", vector(2, version, share)
    )
    protect = Protection(hello, answer).protect
    opening = record(HANDSHAKE, answer) + record(CHANGE_CIPHER_SPEC, b"\x01")
    opening += protect(HANDSHAKE, message(ENCRYPTED_EXTENSIONS, b"\0\0"))
    if trick.whole:
        shown = vector(3, *(vector(3, der) + b"\0\0" for der in trick.shown))
        opening += protect(HANDSHAKE, message(CERTIFICATE, b"\0", shown))
    return _join(opening, trick, protect)


class Protection:
    """The server's handshake traffic keys of TLS 1.3: ChaCha20-Poly1305 with SHA-256."""

    def __init__(self, hello, answer):
        nothing = bytes(32)
        secret = hmac.new(nothing, nothing, hashlib.sha256).digest()
        secret = expand_label(secret, "derived", hashlib.sha256(b"").digest(), 32)
        # the impostor's secret is 1, so to speak: what is shared is the client's own share
        secret = hmac.new(secret, hello.share, hashlib.sha256).digest()
        transcript = hashlib.sha256(hello.message + answer).digest()
        secret = expand_label(secret, "s hs traffic", transcript, 32)
        self._key = expand_label(secret, "key", b"", 32)
        self._iv = int.from_bytes(expand_label(secret, "iv", b"", 12), "big")
        self._sequence = 0

    def protect(self, kind, content):
        """One encrypted record."""
        nonce = number(self._iv ^ self._sequence, 12)
        self._sequence += 1
        header = b"\x17\x03\x03" + number(len(content) + 17, 2)
        return header + seal(self._key, nonce, content + bytes([kind]), header)


def expand_label(secret, label, context, size):
    """RFC 8446, 7.1: HKDF-Expand-Label, for at most 32 bytes."""
    info = number(size, 2) + vector(1, b"tls13 ", label.encode()) + vector(1, context)
    return hmac.new(secret, info + b"\x01", hashlib.sha256).digest()[:size]


# ---------------------------------------------------------------- RFC 8439


def seal(key, nonce, content, associated):
    """ChaCha20-Poly1305: the encrypted bytes and their tag."""
    blocks = [chacha_block(key, nonce, count) for count in range(len(content) // 64 + 2)]
    stream = int.from_bytes(b"".join(blocks[1:])[: len(content)], "big")
    hidden = number(stream ^ int.from_bytes(content, "big"), len(content))
    padded = b"".join(part + bytes(-len(part) % 16) for part in (associated, hidden))
    sizes = struct.pack("<QQ", len(associated), len(hidden))
    return hidden + poly1305(blocks[0][:32], padded + sizes)


def chacha_block(key, nonce, count):
    """One block of 64 bytes of the key stream."""
    start = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
    start += struct.unpack("<8L", key) + (count,) + struct.unpack("<3L", nonce)
    state = list(start)
    for _ in range(10):
        for place in range(4):
            _quarter_round(state, place, place + 4, place + 8, place + 12)
        for place in range(4):
            _quarter_round(
                state, place, 4 + (place + 1) % 4, 8 + (place + 2) % 4, 12 + (place + 3) % 4
            )
    return struct.pack("<16L", *((a + b) & 0xFFFFFFFF for a, b in zip(state, start)))


def _quarter_round(state, i, j, k, m):
    a, b, c, d = state[i], state[j], state[k], state[m]
    a = (a + b) & 0xFFFFFFFF
    d ^= a
    d = (d << 16 | d >> 16) & 0xFFFFFFFF
    c = (c + d) & 0xFFFFFFFF
    b ^= c
    b = (b << 12 | b >> 20) & 0xFFFFFFFF
    a = (a + b) & 0xFFFFFFFF
    d ^= a
    d = (d << 8 | d >> 24) & 0xFFFFFFFF
    c = (c + d) & 0xFFFFFFFF
    b ^= c
    state[i], state[j], state[k], state[m] = a, (b << 7 | b >> 25) & 0xFFFFFFFF, c, d


def poly1305(key, content):
    """The tag of a whole number of blocks of 16 bytes."""
    factor = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for offset in range(0, len(content), 16):
        block = int.from_bytes(content[offset : offset + 16] + b"\x01", "little")
        total = (total + block) * factor % ((1 << 130) - 5)
    total += int.from_bytes(key[16:], "little")
    return (total & ((1 << 128) - 1)).to_bytes(16, "little")


# ---------------------------------------------------------------- dialogues before TLS


def _lines(sock):
    """The lines that the peer sends, without their ends; no byte more is read than is there."""
    unread = b""
    while True:
        piece = receive(sock, 1)
        if piece == b"\n":
            yield unread.strip()
            unread = b""
        else:
            unread += piece


def _in_lines(greeting, last, answers):
    """A dialogue in lines, {word: answer}, over once `last` was answered; %s is the first word."""

    def hold(sock, more):
        sock.sendall(greeting)
        for line in _lines(sock):
            word = next((word for word in answers if word in line.upper()), b"")
            answer = answers.get(word, b"500 what?\r\n").replace(b"%s", line.split(b" ")[0])
            sock.sendall(answer + (more if word == last else b""))
            if word == last:
                return

    return hold


def _read_until(sock, ending):
    """All that the peer says until these bytes."""
    content = b""
    while ending not in content:
        content += receive(sock, 1)
    return content


def _ldap(sock, more):
    """RFC 4511's StartTLS: an ExtendedRequest, an ExtendedResponse with resultCode 0."""
    request = receive(sock, receive(sock, 2)[1])
    identifier = request[: 2 + request[1]]
    answer = identifier + b"\x78\x07\x0a\x01\0\x04\0\x04\0"
    sock.sendall(b"\x30" + vector(1, answer) + more)


def _xmpp(sock, more):
    """RFC 6120, 5.4: stream features, starttls, proceed."""
    space = b"xmlns='urn:ietf:params:xml:ns:xmpp-tls'"
    _read_until(sock, b"stream:stream")
    _read_until(sock, b">")
    sock.sendall(
        b"<?xml version='1.0'?><stream:stream xmlns:stream='http://etherx.jabber.org/streams' "
        b"xmlns='jabber:client' id='1' version='1.0'><stream:features><starttls "
        + space
        + b"><required/></starttls></stream:features>"
    )
    _read_until(sock, b"<starttls")
    _read_until(sock, b">")
    sock.sendall(b"<proceed " + space + b"/>" + more)


def _postgres(sock, more):
    """SSLRequest, eight bytes; S for yes."""
    receive(sock, 8)
    sock.sendall(b"S" + more)


def _mysql(sock, more):
    """A greeting of protocol 10 with CLIENT_SSL among the capabilities, then an SSLRequest."""
    greeting = b"\x0a8.0.0\0" + b"\1\0\0\0" + b"12345678\0" + b"\x00\x8a\x21\x02\0\xff\x81\x15"
    greeting += bytes(10) + b"123456789012\0"
    sock.sendall(len(greeting).to_bytes(3, "little") + b"\0" + greeting)
    head = receive(sock, 4)
    receive(sock, int.from_bytes(head[:3], "little"))
    sock.sendall(more)


# {protocol: function of a socket and of bytes to add to the last answer}
DIALOGUES = {
    "smtp": _in_lines(
        b"220-mail.example.com\r\n220 ESMTP\r\n",
        b"STARTTLS",
        {
            b"EHLO": b"250-mail.example.com\r\n250-SIZE 1000\r\n250 STARTTLS\r\n",
            b"STARTTLS": b"220 go ahead\r\n",
        },
    ),
    "imap": _in_lines(
        b"* OK ready\r\n",
        b"STARTTLS",
        {
            b"CAPABILITY": b"* CAPABILITY IMAP4rev1 STARTTLS\r\n%s OK done\r\n",
            b"STARTTLS": b"%s OK begin\r\n",
        },
    ),
    "pop3": _in_lines(
        b"+OK ready\r\n",
        b"STLS",
        {b"CAPA": b"+OK\r\nSTLS\r\n.\r\n", b"STLS": b"+OK begin\r\n"},
    ),
    "ftp": _in_lines(
        b"220 ready\r\n",
        b"AUTH TLS",
        {
            b"FEAT": b"211-Features:\r\n AUTH TLS\r\n211 End\r\n",
            b"AUTH TLS": b"234 begin\r\n",
        },
    ),
    "ldap": _ldap,
    "xmpp": _xmpp,
    "postgres": _postgres,
    "mysql": _mysql,
}


# ---------------------------------------------------------------- the server


class Impostor(world.Server):
    """Plays tricks: {server name: Trick}, after the protocol's dialogue where there is one.

    .played counts by server name how often a client was shown a trick.
    """

    def __init__(self, tricks, protocol=None, **where):
        super().__init__(**where)
        self.tricks, self.protocol = tricks, protocol
        self.played = collections.Counter()

    @property
    def source(self):
        """What --from takes, the protocol included."""
        endpoint = super().source
        return self.protocol + "://" + endpoint if self.protocol else endpoint

    def talk(self, sock):
        """One trick."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.protocol:
            DIALOGUES[self.protocol](sock, b"")
        hello = read_hello(sock)
        trick = self.tricks[hello.name]
        content, _ = flight(hello, trick)
        sock.sendall(content[: trick.cut])
        self.played[hello.name] += 1
        end(sock, trick.ending)


def end(sock, ending):
    """Do to a connection what a trick ends with; its owner closes it."""
    if ending == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return
    if ending == "close":
        sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass  # closing with unread bytes would reset what was sent


def after_dialogue(protocol, more=b""):
    """What world.Upstream takes as before=: the dialogue, with more bytes after its last answer."""
    return lambda sock: DIALOGUES[protocol](sock, more)
