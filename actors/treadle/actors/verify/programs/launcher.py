"""The process that starts programs: `python -m treadle.actors.verify.programs.launcher`, a socket as stdin.

It stands between a judge and the programs because three things need a parent that outlives neither: it is the
subreaper to which every orphan comes, it notices by the closing of the socket that the judge is gone (killed
or not) and ends all there is, and it is small and has one thread, so that forking it is cheap and safe.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from treadle.actors.verify.programs import control
from treadle.actors.verify.programs.bubblewrap import Bubblewrap
from treadle.actors.verify.programs.confinement import MARK_FD, Confinement, Job, Prepared, memory_file
from treadle.actors.verify.programs.gvisor import GVisor
from treadle.actors.verify.programs.processes import end_children, threads_of, usage
from treadle.actors.verify.programs.records import Reason
from treadle.actors.verify.programs.scratch import LandlockScratch, Scratch

_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36
FIRST_UID = 0x7000_0000
"""A launcher that is root runs programs as this plus its own process id: an id that nobody else has, so that
limits per user count one program's processes and no signal reaches anyone."""
_BEGINS_MS = 5
"""How often a mark that is a file is looked for."""
_LOOK_S = 0.05
_LOOKS_SHARE = 20
"""Looking at `/proc` takes at most one part in this many of the launcher's time."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    link = socket.socket(fileno=os.dup(0))
    _LIBC.prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    hello = control.receive(link)
    if hello is None:
        return
    header, blobs, _ = hello
    confinement = make_confinement(header, blobs[0])
    control.send(link, {"ready": os.getpid()})
    while (request := control.receive(link, max_fds=2)) is not None:
        header, blobs, fds = request
        if "kill" in header:  # it came when the program had already ended
            continue
        try:
            answer = Run(link, confinement, header, blobs, fds).to_the_end()
        except Exception as error:  # noqa: BLE001  the judge is told; the next command may do better
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            control.send(link, answer)
        except BrokenPipeError:  # the judge is gone
            return
        finally:
            confinement.finish()  # after the answer: a program may have made it take long


def make_confinement(header: dict[str, Any], filter_: bytes) -> Confinement:
    """The tier that a judge has asked for."""
    toolchains = header["toolchains"]
    match header["tier"]:
        case "bubblewrap":
            return Bubblewrap(header["bwrap"], filter_, toolchains, header["disable_userns"])
        case "gvisor":
            return GVisor(header["runsc"], toolchains)
        case "landlock":
            return LandlockScratch(filter_, toolchains)
        case "rlimits":
            return Scratch(toolchains)
    raise ValueError(f"no tier {header['tier']!r}")


class Run:
    """One command.

    waits for: the program's end; unblocked by: its end, a limit, the judge's wish or the judge's death;
    produces: how it ended, after all its processes have."""

    def __init__(
        self,
        link: socket.socket,
        confinement: Confinement,
        header: dict[str, Any],
        blobs: list[bytes],
        outputs: list[int],
    ) -> None:
        self._link = link
        self._confinement = confinement
        self._limits: dict[str, float] = header["limits"]
        self._outputs = outputs
        self._stdin, *contents = blobs
        self._seen_cpu_s = 0.0
        owner = FIRST_UID + os.getpid() if os.getuid() == 0 else None
        others = 0 if owner is not None or confinement.counts_alone else threads_of(os.getuid())
        self._job = Job(
            argv=tuple(header["argv"]),
            files=dict(zip(header["names"], contents, strict=True)),
            limits=self._limits,
            file_bytes=int(self._limits["file_bytes"]),
            processes=int(self._limits["processes"]) + others,
            owner=owner,
        )

    def to_the_end(self) -> dict[str, Any]:
        """The answer to the judge; never returns when the judge is gone."""
        marks, mark = os.pipe()
        with open(marks, "rb", buffering=0) as told:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            stdin = memory_file("stdin", self._stdin)
            try:
                prepared = self._confinement.prepare(self._job)
                pid = self._fork(prepared, stdin, mark)
            finally:
                for fd in (stdin, mark, *self._outputs):
                    os.close(fd)
            self._until_it_begins(pid, told.fileno(), prepared.mark)
            began_s = time.monotonic()
            reason = self._watch(pid, began_s)
            status = end_children(pid)
            wall_s = time.monotonic() - began_s
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            said = told.read(4096)
            if prepared.mark and not said:
                said = read_mark(prepared.mark)
        if said != b".":
            return {"unstarted": said.decode(errors="replace")}
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        cpu_s = max(cpu_s, self._seen_cpu_s)  # the kernel does not count what a namespace's end has ended
        answer = {"reason": reason.value, "wall_s": wall_s, "cpu_s": cpu_s}
        return answer | self._ending(reason, status, cpu_s)

    def _fork(self, prepared: Prepared, stdin: int, mark: int) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(prepared, stdin, mark, parent)
        return pid

    def _become(self, prepared: Prepared, stdin: int, mark: int, parent: int) -> NoReturn:
        """The forked process until it executes the command."""
        try:
            os.setsid()
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
                signal.signal(number, signal.SIG_DFL)
            self._arrange(prepared, (stdin, *self._outputs, mark))
            mark = MARK_FD
            os.chdir(prepared.folder)
            self._limit()
            if self._job.owner is not None:
                os.setgroups([])
                os.setresgid(*(self._job.owner,) * 3)
                os.setresuid(*(self._job.owner,) * 3)
            # After the change of user, which clears it.
            _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:
                self._confinement.confine()
                os.execve(prepared.argv[0], prepared.argv, prepared.environment)
        except BaseException as error:  # noqa: BLE001  a forked process must not return into its parent's code
            os.write(mark, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(126)

    def _arrange(self, prepared: Prepared, standard: tuple[int, ...]) -> None:
        """Standard streams and the mark at 0 to 3, then what bubblewrap reads; all else is closed."""
        # First out of the way: a descriptor may be where another one belongs.
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MARK_FD + 1) for fd in standard]
        kept = {*prepared.inherited, *prepared.private}
        if min(kept, default=MARK_FD + 1) <= MARK_FD:
            raise OSError("a descriptor lies among the standard streams")
        for number, fd in enumerate(moved):
            os.dup2(fd, number)
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > MARK_FD and fd not in kept:
                try:
                    os.close(fd)
                except OSError:  # the one that listed them
                    continue
        for fd in prepared.inherited:
            os.set_inheritable(fd, True)

    def _limit(self) -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        _set_limit(resource.RLIMIT_CORE, 0, 0)
        if self._confinement.limits_inside:
            return
        seconds = max(1, math.ceil(self._limits["cpu_s"]))
        _set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)
        _set_limit(resource.RLIMIT_FSIZE, *(int(self._limits["file_bytes"]),) * 2)
        _set_limit(resource.RLIMIT_NOFILE, *(int(self._limits["open_files"]),) * 2)
        if space := int(self._limits["address_space_bytes"]):
            _set_limit(resource.RLIMIT_AS, space, space)

    def _until_it_begins(self, pid: int, told: int, mark: str) -> None:
        """Returns when the program starts, or ends before. Setting a sandbox up is not the program's time: on a busy
        machine it takes longer than many programs may."""
        until_s = time.monotonic() + control.SETUP_S
        ended = os.pidfd_open(pid)
        poll = select.poll()
        for fd in (ended, self._link.fileno(), *(() if mark else (told,))):
            poll.register(fd, select.POLLIN)
        try:
            while time.monotonic() < until_s and not (mark and os.path.getsize(mark)):
                if poll.poll(_BEGINS_MS if mark else 1000 * control.SETUP_S):
                    return
        finally:
            os.close(ended)

    def _watch(self, pid: int, began_s: float) -> Reason:
        """Returns when the program is over, or has to be."""
        until_s = began_s + self._limits["wall_s"]
        look_s = began_s + _LOOK_S
        ended = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        try:
            while (now_s := time.monotonic()) < until_s:
                ready = dict(poll.poll(max(1.0, 1000 * (min(until_s, look_s) - now_s))))
                if self._link.fileno() in ready:
                    self._obey(pid)
                    return Reason.OUTPUT_LIMIT
                if ended in ready:
                    return Reason.EXITED
                if (now_s := time.monotonic()) >= look_s:
                    if excess := self._excess():
                        return excess
                    look_s = time.monotonic() + max(_LOOK_S, _LOOKS_SHARE * (time.monotonic() - now_s))
            return Reason.WALL_TIME
        finally:
            os.close(ended)

    def _obey(self, pid: int) -> None:
        """The judge wants the end, or has met its own."""
        try:
            message = control.receive(self._link)
        except OSError:
            message = None
        if message is None:
            end_children(pid)
            self._confinement.finish()
            sys.exit(0)

    def _excess(self) -> Reason | None:
        used = usage(os.getpid())
        self._seen_cpu_s = max(self._seen_cpu_s, used.cpu_s)
        if used.resident_bytes > self._limits["memory_bytes"] + self._confinement.overhead_bytes:
            return Reason.MEMORY
        if used.cpu_s > self._limits["cpu_s"]:
            return Reason.CPU_TIME
        return Reason.FILE_LIMIT if self._confinement.overfull() else None

    def _ending(self, reason: Reason, status: int | None, cpu_s: float) -> dict[str, Any]:
        """Exit code or signal. bubblewrap reports a signal the way a shell does, as 128 and its number."""
        if reason is not Reason.EXITED or status is None:
            return {"exit": None, "signal": None}
        code = os.waitstatus_to_exitcode(status)
        number = -code if code < 0 else code - 128 if 128 < code <= 128 + signal.NSIG else 0
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= self._limits["cpu_s"]):
            return {"reason": Reason.CPU_TIME.value, "exit": None, "signal": None}
        return {"exit": None, "signal": number} if number else {"exit": code, "signal": None}


def read_mark(path: str) -> bytes:
    """The beginning of a file that a program could write to as well."""
    with open(path, "rb") as file:
        return file.read(4096)[:1]


def _set_limit(limit: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(limit)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(limit, (soft, hard))


if __name__ == "__main__":
    main()
