"""Verifiers that misbehave on demand, for the pool's tests. The completion says how."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping


class Odd:
    """`ok`, `sleep 5`, `spin`, `exit 3`, …: the methods below, by name and argument."""

    name = "odd"
    version = "7"

    def __init__(self, *, bonus: float = 0.0) -> None:
        self._bonus = bonus

    def score(self, completion: str, payload: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
        word, _, rest = completion.partition(" ")
        return (("accuracy", self._bonus + float(getattr(self, f"do_{word}")(rest))),)

    def do_ok(self, rest: str) -> float:
        return 1.0

    def do_sleep(self, rest: str) -> float:
        time.sleep(float(rest))
        return 1.0

    def do_spin(self, rest: str) -> float:
        return float(10 ** (10**10) > 0)  # one instruction of C that no signal interrupts

    def do_exit(self, rest: str) -> float:
        sys.exit(int(rest))

    def do_segv(self, rest: str) -> float:
        return float(ctypes.string_at(0)[0])

    def do_kill(self, rest: str) -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    def do_stop(self, rest: str) -> float:
        os.kill(os.getpid(), signal.SIGSTOP)
        return 1.0

    def do_hog(self, rest: str) -> float:
        return float(len([bytearray(2**20) for _ in range(100_000)]))

    def do_raise(self, rest: str) -> float:
        raise KeyError(rest)

    def do_nan(self, rest: str) -> float:
        return float("nan")

    def do_print(self, rest: str) -> float:
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * int(rest))
            stream.flush()
        return 1.0

    def do_read(self, rest: str) -> float:
        return float(sys.stdin.read() == "")

    def do_children(self, rest: str) -> float:
        """Leaves a process behind that ignores being asked to go."""
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(60)
        return 1.0

    def do_env(self, rest: str) -> float:
        """1 where the environment holds the named variable."""
        return float(rest in os.environ)

    def do_modules(self, rest: str) -> float:
        """How many of the named modules this process has imported."""
        return float(sum(name in sys.modules for name in rest.split(",")))

    def do_files(self, rest: str) -> float:
        files = [open(os.devnull) for _ in range(1000)]  # noqa: SIM115
        return float(len(files))

    def do_once(self, rest: str) -> float:
        """Dies the first time, does well the second."""
        if not os.path.exists(rest):
            with open(rest, "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        return 1.0


class Unbuildable:
    """A verifier whose factory raises."""

    def __init__(self) -> None:
        raise OSError("the word list is missing")


class SlowToBuild(Odd):
    """Imports for longer than a completion may take."""

    def __init__(self) -> None:
        super().__init__()
        time.sleep(1.5)


class UnknownPart:
    """Returns a part without a weight."""

    name = "unknown-part"
    version = "1"

    def score(self, completion: str, payload: Mapping[str, object]) -> tuple[tuple[str, float], ...]:
        return (("elegance", 1.0),)


class DiesWhenBuilt:
    """Takes its process along."""

    def __init__(self) -> None:
        os._exit(9)
