"""What two processes of a chain say to each other over TCP: a handshake, chunks, and small messages.

Whoever connects names the version and proves that it has the version's key, and so does the one who answers; the key
came with the ticket, through the cluster's own authenticated channel. The bytes that follow are protected against
accidents by the ticket's checksums, and not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Address: TypeAlias = tuple[str, int]

CHUNKS, CONTROL = b"d", b"c"
"""Why somebody connects: to be sent chunks, or to talk to the source about who sends to whom."""
HEARTBEAT = 0xFFFFFFFF
"""The index of a frame without bytes: the sender lives, and waits for the next chunk itself."""
SERIAL_BYTES = 16

_MAGIC = b"TRDLCHN1"
_HELLO = struct.Struct("<8s1s16s16s")
_FRAME = struct.Struct("<IIQ")
_SIZE = struct.Struct("<I")
_MOST_MESSAGE_BYTES = 16 * 2**20
_PROOF_BYTES = 32


class ChainError(OSError):
    """The other side left, or is not who it should be."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The header of a chunk: its index, its bytes, and how long the sender had to wait for it itself."""

    index: int
    size: int
    waited_s: float


def listen(host: str) -> socket.socket:
    """A listener on one address of this machine and no other."""
    return socket.create_server((host, 0), backlog=512)


def dial(
    address: Address, own_host: str, serial: bytes, key: bytes, purpose: bytes, timeout_s: float
) -> socket.socket:
    """A connection to a process that holds version `serial`. Raises `OSError`, also when it does not hold it."""
    line = socket.create_connection(address, timeout=timeout_s, source_address=(own_host, 0))
    try:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = secrets.token_bytes(16)
        line.sendall(_HELLO.pack(_MAGIC, purpose, serial, mine))
        theirs = _read(line, 16)
        said = purpose + mine + theirs
        if not hmac.compare_digest(_read(line, _PROOF_BYTES), _proof(key, b"answers", said)):
            raise ChainError(f"{address[0]}:{address[1]} does not have the version's key")
        line.sendall(_proof(key, b"asks", said))
        _read(line, 1)
    except BaseException:
        line.close()
        raise
    return line


def hang_up(line: socket.socket) -> None:
    """Closes a socket, and wakes threads that wait for it."""
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


def welcome(line: socket.socket, key_of: Callable[[bytes], bytes | None]) -> tuple[bytes, bytes]:
    """The answering side: serial and purpose. Raises `OSError` for an unknown version or a caller without its key."""
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    magic, purpose, serial, theirs = _HELLO.unpack(_read(line, _HELLO.size))
    key = key_of(serial)
    if magic != _MAGIC or purpose not in (CHUNKS, CONTROL) or key is None:
        raise ChainError("a caller asked for a version that is not here")
    mine = secrets.token_bytes(16)
    said = purpose + theirs + mine
    line.sendall(mine + _proof(key, b"answers", said))
    if not hmac.compare_digest(_read(line, _PROOF_BYTES), _proof(key, b"asks", said)):
        raise ChainError("a caller did not have the version's key")
    line.sendall(b"\x01")
    return serial, purpose


def send_message(line: socket.socket, message: object) -> None:
    body = json.dumps(message).encode()
    line.sendall(_SIZE.pack(len(body)) + body)


def read_message(line: socket.socket) -> dict[str, object]:
    """Raises `OSError` when the other side left or says what is no message."""
    (size,) = _SIZE.unpack(_read(line, _SIZE.size))
    if size > _MOST_MESSAGE_BYTES:
        raise ChainError(f"a message of {size} bytes")
    try:
        message = json.loads(_read(line, size))
    except ValueError as error:
        raise ChainError("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise ChainError("a message that is no object")
    return message


def send_frame(line: socket.socket, index: int, payload: memoryview, waited_s: float) -> None:
    line.sendall(_FRAME.pack(index, len(payload), int(1e6 * waited_s)))
    line.sendall(payload)


def read_frame(line: socket.socket) -> Frame:
    index, size, waited_us = _FRAME.unpack(_read(line, _FRAME.size))
    return Frame(index, size, waited_us / 1e6)


def read_into(line: socket.socket, place: memoryview, pace: Callable[[int], None]) -> None:
    """Fills `place`; `pace` is told of every piece, and may hold the reading up."""
    while place:
        count = line.recv_into(place)
        if not count:
            raise ChainError("the sender left in the middle of a chunk")
        pace(count)
        place = place[count:]


def _read(line: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    place = memoryview(found)
    while place:
        count = line.recv_into(place)
        if not count:
            raise ChainError("the other side left")
        place = place[count:]
    return bytes(found)


def _proof(key: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(key, role + said, "sha256")
