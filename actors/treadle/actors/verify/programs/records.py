"""What a sandbox is asked and what it answers; the contract that every backend keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from treadle.platform.errors import VerifierError

MIB = 2**20
BOX = "/box"
"""Where a program finds its files and may write; its working directory. A backend without a file system of
its own puts another folder here, so programs use relative paths."""


class SandboxError(VerifierError):
    """The sandbox could not do its work. Says nothing about the program: the verdict is "failed"."""


class Reason(Enum):
    """Why a program came to its end."""

    EXITED = "exited"  # by itself, a signal of its own making included
    WALL_TIME = "wall time"
    CPU_TIME = "cpu time"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output limit"
    FILE_LIMIT = "file limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one command may use up, all its processes together unless said otherwise.

    `memory_bytes` is resident memory and kills; `address_space_bytes` is per process and makes allocation
    fail (0: not limited, which Java and Node need). `file_bytes` bounds each file and the writable folder.
    `processes` counts threads as well. `output_bytes` holds for each of stdout and stderr.

    Example: `Limits(wall_s=2.0, cpu_s=2.0, address_space_bytes=512 * MIB)`.
    """

    wall_s: float = 2.0
    cpu_s: float = 2.0
    memory_bytes: int = 512 * MIB
    address_space_bytes: int = 0
    file_bytes: int = 64 * MIB
    processes: int = 64
    open_files: int = 64
    output_bytes: int = MIB

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s", "memory_bytes", "file_bytes", "processes", "output_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits.{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command. `files` are put into the working folder first (plain names, no folders), readable and
    executable. The environment holds nothing of the caller's.

    Example: `Command(argv=("/usr/bin/python3", "main.py"), stdin=b"3 4", files={"main.py": b"…"})`.
    """

    argv: tuple[str, ...]
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.argv:
            raise ValueError("Command.argv is empty.")
        for name in self.files:
            if not name or "/" in name or "\0" in name or name in (".", ".."):
                raise ValueError(f"Command.files: {name!r} is not a plain file name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command went. One of `exit_code` and `signal` is set where the reason is `EXITED`.

    A backend that sees a shell's status only reads 128 + n as signal n. `stdout` and `stderr` hold at most
    the limit. `cpu_s` counts the processes that were waited for.
    """

    reason: Reason
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    wall_s: float
    cpu_s: float

    @property
    def succeeded(self) -> bool:
        """Ended by itself with status 0."""
        return self.reason is Reason.EXITED and self.exit_code == 0


class Sandbox(Protocol):
    """Runs commands of someone who means harm. One at a time; further callers wait their turn.

    When `run` returns, no process of the command is left; when the caller is killed, none is left a moment
    later. Whatever the command does is in the record; only the sandbox's own failure raises `SandboxError`.
    """

    tier: str
    """What isolates, in words; part of every verdict."""

    def run(self, command: Command) -> Ended: ...

    def close(self) -> None: ...
