"""Choosing the strongest sandbox that really holds on this machine.

What a kernel, a container's profile or a missing package allows cannot be read off anywhere; so a program
that tries to break out is run in each tier, once, before anything else is.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.actors.verify.programs.landlock import abi
from treadle.actors.verify.programs.languages import toolchain
from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import MIB, Command, Limits, Sandbox, SandboxError
from treadle.actors.verify.programs.seccomp import bpf
from treadle.platform.errors import ConfigError

LOCAL_TIERS = ("bubblewrap", "landlock", "rlimits")
"""From the strongest to the weakest of those that `auto` looks at; `gvisor` must be asked for."""
_PROBE_S = 10.0

_PROBE = """
import json, os, socket, sys, time
port, secret, folder, judge, token = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
breaches = []
def attempt(name, action):
    try:
        action()
        breaches.append(name)
    except OSError:
        pass
def connect():
    with socket.socket() as link:
        link.settimeout(1)
        link.connect(("127.0.0.1", port))
def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.sendto(b"x", ("127.0.0.1", port))
def read():
    open(secret).close()
def write():
    open(folder + "/written", "w").close()
def signal():
    os.kill(judge, 0)
attempt("reaches the network", connect)
try:
    send()  # within a network of its own it may; what counts is what arrives
except OSError:
    pass
attempt("reads the host's files", read)
attempt("writes the host's files", write)
attempt("signals other processes", signal)
if any(name not in ("PATH HOME TMPDIR LANG PYTHONHASHSEED PYTHONDONTWRITEBYTECODE MALLOC_ARENA_MAX "
                    "OPENSSL_CONF PWD LC_CTYPE OLDPWD SHLVL _").split() for name in os.environ):
    breaches.append("inherits the environment")
print(json.dumps(breaches), flush=True)
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the configuration says about the sandbox of this machine. `toolchains` are folders with a `bin`
    that programs may read besides the system's."""

    sandbox: str = "auto"
    allow_rlimits_only: bool = False
    toolchains: tuple[str, ...] = ()


def open_local(choice: Choice) -> Sandbox:
    """The strongest tier that holds, or the one that is asked for. Raises `ConfigError` naming what is wrong
    with each and what to install."""
    wanted = LOCAL_TIERS if choice.sandbox == "auto" else (choice.sandbox,)
    failures = []
    for tier in wanted:
        if tier == "rlimits" and not choice.allow_rlimits_only:
            continue
        try:
            sandbox = make_local(tier, choice.toolchains)
            try:
                failure = probed(sandbox, choice.toolchains) if tier != "rlimits" else ""
            except BaseException:
                sandbox.close()
                raise
            if not failure:
                return sandbox
            sandbox.close()
        except SandboxError as error:
            failure = error.message
        failures.append(f"{tier}: {failure}")
    raise ConfigError(
        "No sandbox for programs holds on this machine." + "".join(f" {failure}." for failure in failures),
        "Install bubblewrap and libseccomp2 (apt-get install bubblewrap libseccomp2), or set "
        "verify.options.code.allow_rlimits_only=true to run programs unprotected.",
    )


def make_local(tier: str, toolchains: Sequence[str] = ()) -> LocalSandbox:
    """A sandbox of one tier, not probed. Raises `SandboxError` where its parts are missing."""
    settings: dict[str, object] = {"tier": tier, "toolchains": list(toolchains)}
    if tier == "bubblewrap":
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError("bwrap is not installed")
        nested = "--disable-userns" in _output(bwrap, "--help")
        settings |= {"bwrap": bwrap, "disable_userns": nested}
        words = f"bubblewrap {_version(bwrap)}, seccomp, rlimits"
        return LocalSandbox(words, settings, bpf(keep_group=False))
    if tier == "gvisor":
        runsc = shutil.which("runsc")
        if runsc is None:
            raise SandboxError("runsc is not installed")
        return LocalSandbox(f"gvisor {_version(runsc)}, rlimits", settings | {"runsc": runsc}, b"")
    if tier == "landlock":
        if (version := abi()) == 0:
            raise SandboxError("the kernel has no Landlock")
        words = f"landlock {version}, seccomp, rlimits"
        return LocalSandbox(words, settings, bpf(keep_group=True))
    if tier == "rlimits":
        return LocalSandbox("rlimits only, unsafe", settings, b"")
    raise SandboxError(f"there is no tier {tier!r} on this machine")


def probed(sandbox: Sandbox, toolchains: Sequence[str]) -> str:
    """What a program gets away with in this sandbox; empty where it holds."""
    token = secrets.token_hex(16)
    python = toolchain("python", toolchains).tools["python3"]
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket() as server,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
    ):
        os.chmod(folder, 0o777)
        secret = f"{folder}/secret"
        with open(secret, "w") as file:
            file.write(token)
        os.chmod(secret, 0o644)
        server.bind(("127.0.0.1", 0))
        server.listen()
        datagrams.bind(server.getsockname())
        arguments = (str(server.getsockname()[1]), secret, folder, str(os.getpid()), token)
        ended = sandbox.run(
            Command(
                argv=(python, "-B", "-s", "probe.py", *arguments),
                files={"probe.py": _PROBE.encode()},
                limits=Limits(wall_s=_PROBE_S, cpu_s=_PROBE_S, file_bytes=16 * MIB),
            )
        )
        arrived = bool(select.select([datagrams], [], [], 0)[0])
    if not ended.succeeded:
        shown = " ".join(ended.stderr.decode(errors="replace").split())[-300:]
        return f"a program ends by {ended.reason.value}, status {ended.exit_code}: {shown}"
    breaches = [str(breach) for breach in json.loads(ended.stdout)]
    if arrived:
        breaches.append("sends datagrams")
    if running(token):
        breaches.append("leaves a process behind")
    return f"a program {', '.join(breaches)}" if breaches else ""


def running(token: str) -> list[int]:
    """Processes with this text in their command line."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                if token.encode() in file.read():
                    found.append(int(path.split("/")[2]))
        except OSError:  # it ended meanwhile
            continue
    return found


def _version(program: str) -> str:
    found = re.search(r"\S*\d\.\d\S*", _output(program, "--version"))
    return found.group() if found else "of unknown version"


def _output(*argv: str) -> str:
    try:
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"{argv[0]} does not run: {error}") from error
    return ended.stdout + ended.stderr
