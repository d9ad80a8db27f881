"""What a sandbox and its launcher say to each other: a JSON header, bytes behind it, descriptors beside it."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = struct.Struct(">II")
SETUP_S = 10.0
"""Longest that setting a sandbox up may take, which is not the program's time."""
KILL = {"kill": True}
"""Asks for the end of what runs."""


def send(
    link: socket.socket, header: Mapping[str, Any], blobs: Sequence[bytes] = (), fds: Sequence[int] = ()
) -> None:
    """One message. Raises `OSError` when the other side is gone or does not read (by the socket's timeout)."""
    head = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode("ascii")
    start = _SIZES.pack(len(head), sum(map(len, blobs))) + head
    sent = socket.send_fds(link, [start], list(fds)) if fds else link.send(start)
    for piece in (start[sent:], *blobs):
        link.sendall(piece)


def receive(link: socket.socket, max_fds: int = 0) -> tuple[dict[str, Any], list[bytes], list[int]] | None:
    """The next message: header, blobs, descriptors; None when the other side has closed."""
    start, fds, _, _ = socket.recv_fds(link, _SIZES.size, max_fds)
    if len(start) < _SIZES.size:
        return None
    head_size, body_size = _SIZES.unpack(start)
    head, body = _exactly(link, head_size), _exactly(link, body_size)
    if head is None or body is None:
        return None
    header = json.loads(head)
    blobs, begin = [], 0
    for size in header.pop("sizes"):
        blobs.append(body[begin : begin + size])
        begin += size
    return header, blobs, fds


def _exactly(link: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        chunk = link.recv(min(size - len(received), 2**20))
        if not chunk:
            return None
        received += chunk
    return bytes(received)
