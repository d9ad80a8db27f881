"""Landlock by its three system calls: what a process and its children may reach of the host's files.

PyPI's binding is a pre-release, and the C library has no wrappers. Numbers are the same on all architectures;
bits and structures are those of `include/uapi/linux/landlock.h`.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 0b11
_SCOPES = 0b11  # abstract sockets, signals
_NO_NEW_PRIVILEGES = 38
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long

READ = _EXECUTE | _READ_FILE | _READ_DIR
"""Reading and executing what lies beneath."""
DEVICE = _READ_FILE | _WRITE_FILE | _TRUNCATE
"""Reading and writing one file."""


def abi() -> int:
    """The kernel's version of the interface; 0 where Landlock is missing or switched off."""
    version: int = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_GET_VERSION))
    return max(version, 0)


class Ruleset:
    """Everything is refused but what is allowed here; from ABI 4 on TCP as well, from 6 on signals to
    processes outside. Raises `OSError` where the kernel refuses."""

    def __init__(self) -> None:
        version = abi()
        self.all = max(rights for least, rights in _RIGHTS_OF_ABI.items() if least <= max(version, 1))
        attributes = struct.pack(
            "=QQQ", self.all, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
        )
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        self.fd = _checked(
            _LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
        )

    def allow(self, paths: Iterable[str], rights: int) -> None:
        """Allows `rights` beneath each path; a path that does not exist is left out."""
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                granted = rights & self.all
                if not os.path.isdir(path):
                    granted &= _ON_FILES
                rule = struct.pack("=Qi", granted, fd)
                _checked(_LIBC.syscall(_ADD_RULE, self.fd, _PATH_BENEATH, rule, ctypes.c_uint(0)))
            finally:
                os.close(fd)

    def restrict(self) -> None:
        """Binds this process and all that it starts, for good."""
        _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
        _checked(_LIBC.syscall(_RESTRICT_SELF, self.fd, ctypes.c_uint(0)))

    def close(self) -> None:
        os.close(self.fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
