"""A network link between this machine and a second one that is made up: a network namespace of its own.

Packets pass through this process, which may hold them up or lose them: what is behind the link is as slow, or as gone,
as on a real network. Nobody is told that a packet is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.benchmarks.throttled import Link as Pace

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_PACKET = 2**16
MTU = 9000


class Link:
    """Both ends of it. `near` and `far` are their addresses; `within` are the words in front of a command that is to
    run at the far end."""

    def __init__(self, number: int) -> None:
        mark = secrets.token_hex(3)
        self.near, self.far = f"10.231.{number}.1", f"10.231.{number}.2"
        self._names, self._space = (f"tr{mark}a", f"tr{mark}b"), f"trc-{mark}"
        self.within = ("ip", "netns", "exec", self._space)
        self.up = True
        self.lost = 0
        self._paces: tuple[Pace, Pace] | None = None
        self._ends = [_tun(name) for name in self._names]
        self._connect()
        self._over = threading.Event()
        self._pumps = [
            threading.Thread(target=self._pump, args=(at,), name=f"link {mark}", daemon=True) for at in (0, 1)
        ]
        for pump in self._pumps:
            pump.start()

    def slow(self, bytes_per_s: float) -> None:
        """From now on each direction carries no more; 0 is as much as it can."""
        self._paces = (Pace(bytes_per_s), Pace(bytes_per_s)) if bytes_per_s else None

    def listen(self) -> socket.socket:
        """A socket that listens at the far end."""
        made: list[socket.socket] = []

        def make() -> None:
            with open(f"/run/netns/{self._space}") as space:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(space.fileno(), _CLONE_NEWNET):  # of this thread alone
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.create_server((self.far, 0), backlog=128))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def close(self) -> None:
        self._over.set()
        subprocess.run(["ip", "link", "del", self._names[0]], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self._space], check=False, capture_output=True)
        for pump in self._pumps:
            pump.join(5)
        for end in self._ends:
            os.close(end)

    def _connect(self) -> None:
        near, far = self._names
        _ip("netns", "add", self._space)
        _ip("link", "set", far, "netns", self._space)
        for where, address, name in (((), self.near, near), (("-n", self._space), self.far, far)):
            _ip(*where, "link", "set", "lo", "up")
            _ip(*where, "addr", "add", f"{address}/30", "dev", name)
            _ip(*where, "link", "set", name, "mtu", str(MTU), "up")
        _ip("-n", self._space, "route", "add", "default", "via", self.near)
        # Machines behind two links reach each other through this one.
        Path(f"/proc/sys/net/ipv4/conf/{near}/forwarding").write_text("1")

    def _pump(self, at: int) -> None:
        """Carries packets from one end to the other until the link is closed."""
        source, target = self._ends[at], self._ends[1 - at]
        while not self._over.is_set():
            if not select.select([source], [], [], 0.2)[0]:
                continue
            try:
                packet = os.read(source, _PACKET)
            except OSError:  # the device is gone
                return
            if not self.up:
                self.lost += 1
                continue
            if self._paces is not None:
                self._paces[at](len(packet))
            with contextlib.suppress(OSError):  # full, or gone
                os.write(target, packet)


@contextmanager
def link_to_a_second_machine(number: int) -> Iterator[Link]:
    """While the block lasts. `number` tells links that live at the same time apart."""
    link = Link(number)
    try:
        yield link
    finally:
        link.close()


def _possible() -> bool:
    """Whether this process may make namespaces and devices."""
    return (
        os.geteuid() == 0 and os.access("/dev/net/tun", os.R_OK | os.W_OK) and shutil.which("ip") is not None
    )


NEEDS_LINKS = pytest.mark.skipif(not _possible(), reason="needs root, /dev/net/tun and ip (iproute2)")
"""The mark of tests with a second machine."""


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
