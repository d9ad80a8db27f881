"""Programs that try to get out. Each prints `held` when it was refused and something else when it was not, so
that passing the one test (`held`) proves both that it ran and that it got nowhere.

Standard input tells them what to go for: see `Target`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

CANARY = "TREADLE_TEST_CANARY"

PRELUDE = """
import ctypes, errno, json, os, socket, sys
target = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def write(path, text):
    return os.write(os.open(path, os.O_WRONLY), text)
def refused(action):
    try:
        return "out: %r" % (action(),)
    except OSError:
        return "held"
"""


@dataclass(frozen=True)
class Target:
    """What there is to reach outside: a listening port (TCP and UDP), sockets, a readable file and a writable
    folder of the host, the judge's process id, and a secret that stands in its environment and in the file."""

    port: int
    socket_path: str
    abstract: str
    secret_path: str
    folder: str
    judge: int
    secret: str

    def stdin(self) -> str:
        return json.dumps(asdict(self))


@contextmanager
def opened_target(folder: Path) -> Iterator[tuple[Target, list[str]]]:
    """A target, and what has reached it."""
    reached: list[str] = []
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    secret = "canary-" + os.urandom(8).hex()
    secret_path = folder / "secret"
    secret_path.write_text(secret)
    secret_path.chmod(0o644)
    abstract = "\0treadle-test-" + os.urandom(8).hex()
    links = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
    for link, name in zip(links, (str(folder / "s"), abstract, ("127.0.0.1", 0)), strict=True):
        link.bind(name)
        link.listen()
    (folder / "s").chmod(0o777)
    address = links[-1].getsockname()
    links.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    links[-1].bind(address)
    for link in links:
        threading.Thread(target=_listen, args=(link, reached), daemon=True).start()
    os.environ[CANARY] = secret
    try:
        there = Target(
            address[1], str(folder / "s"), abstract, str(secret_path), str(folder), os.getpid(), secret
        )
        yield there, reached
    finally:
        for link in links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # wakes the thread, which a close would not
            link.close()
        del os.environ[CANARY]


def _listen(link: socket.socket, reached: list[str]) -> None:
    """Notes who comes, until the socket is shut."""
    stream = link.type == socket.SOCK_STREAM
    while True:
        try:
            if stream:
                link.accept()[0].close()
            elif not link.recv(100):
                return
        except OSError:
            return
        reached.append("connection" if stream else "datagram")


def _connecting(family: str, kind: str, address: str) -> str:
    return f"""
def action():
    link = socket.socket(socket.{family}, socket.{kind})
    link.settimeout(0.5)
    link.connect({address})
    link.send(b"hello")
print(refused(action))
"""


def _calling(x86_64: int, arguments: str) -> str:
    return f"print(refused(lambda: call({x86_64}, {arguments})))\n"


ATTEMPTS: dict[str, str] = {
    # the network
    "TCP": _connecting("AF_INET", "SOCK_STREAM", '("127.0.0.1", target["port"])'),
    "UDP": _connecting("AF_INET", "SOCK_DGRAM", '("127.0.0.1", target["port"])'),
    "TCP over IPv6": _connecting("AF_INET6", "SOCK_STREAM", '("::ffff:127.0.0.1", target["port"])'),
    "a socket in a folder": _connecting("AF_UNIX", "SOCK_STREAM", 'target["socket_path"]'),
    "an abstract socket": _connecting("AF_UNIX", "SOCK_STREAM", 'target["abstract"]'),
    "the metadata address": _connecting("AF_INET", "SOCK_STREAM", '("169.254.169.254", 80)'),
    "a raw socket": "print(refused(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)))",
    "netlink": "print(refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)))",
    "name resolution": 'print(refused(lambda: socket.getaddrinfo("example.com", 80)))',
    "docker's socket": _connecting("AF_UNIX", "SOCK_STREAM", '"/var/run/docker.sock"'),
    # the host's files
    "reading a file": 'print(refused(lambda: open(target["secret_path"]).read()))',
    "a symbolic link to a file": """
os.symlink(target["secret_path"], "link")
print(refused(lambda: open("link").read()))
""",
    "a hard link to a file": 'print(refused(lambda: os.link(target["secret_path"], "link")))',
    "reading through process 1's root": 'print(refused(lambda: open("/proc/1/root" + target["secret_path"]).read()))',
    "reading through the judge's root": """
print(refused(lambda: open("/proc/%d/root%s" % (target["judge"], target["secret_path"])).read()))
""",
    "leaving by dot dot": 'print(refused(lambda: open("../" * 20 + target["secret_path"].lstrip("/")).read()))',
    "writing beside it": 'print(refused(lambda: open(target["folder"] + "/written", "w").write("x")))',
    "listing root's folder": 'print(refused(lambda: os.listdir("/root")))',
    "passwords": 'print(refused(lambda: open("/etc/shadow").read()))',
    "users": 'print(refused(lambda: open("/etc/passwd").read()))',
    "writing a program": 'print(refused(lambda: open("/usr/bin/treadle-test", "w")))',
    "writing settings": 'print(refused(lambda: open("/etc/treadle-test", "w")))',
    "a disk": 'print(refused(lambda: open("/dev/vda", "rb").read(1)))',
    "a new device": """
def action():
    os.mknod("disk", 0o060666, os.makedev(254, 0))
    return open("disk", "rb").read(1)
print(refused(action))
""",
    "opening by handle": _calling(304, "-100, None, 0"),
    # the kernel's settings
    "the core pattern": 'print(refused(lambda: write("/proc/sys/kernel/core_pattern", b"|/bin/sh")))',
    "the system request key": 'print(refused(lambda: write("/proc/sysrq-trigger", b"h")))',
    "a control group": """
def action():
    for folder in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"):
        try:
            os.mkdir(folder + "/treadle-test")
            return folder
        except OSError:
            pass
    raise OSError
print(refused(action))
""",
    "being spared when memory runs out": 'print(refused(lambda: write("/proc/self/oom_score_adj", b"-1000")))',
    "the host's name": 'print(refused(lambda: socket.sethostname("mine")))',
    "the clock": "import time\nprint(refused(lambda: time.clock_settime(time.CLOCK_REALTIME, 0)))",
    # other processes
    "tracing the judge": _calling(101, '16, target["judge"], 0, 0'),
    "tracing the parent": _calling(101, "16, os.getppid(), 0, 0"),
    "reading the judge's memory": 'print(refused(lambda: open("/proc/%d/mem" % target["judge"], "rb").read(1)))',
    "reading another process's memory": """
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
print(refused(lambda: call(310, os.getppid(), vector, 1, vector, 1, 0)))
""",
    "taking a descriptor": "print(refused(lambda: call(438, call(434, os.getppid(), 0) or 0, 0, 0)))",
    "signalling the judge": 'print(refused(lambda: os.kill(target["judge"], 0)))',
    "killing all": """
try:
    os.kill(-1, 15)
except OSError:
    pass
print("held")
""",
    "killing the parent": """
if os.getppid() > 1:
    try:
        os.kill(os.getppid(), 9)
    except OSError:
        pass
print("held")
""",
    "limiting the judge": 'print(refused(lambda: __import__("resource").prlimit(target["judge"], 0, (1, 1))))',
    "slowing the judge": 'print(refused(lambda: os.setpriority(os.PRIO_PROCESS, target["judge"], 19)))',
    "moving the judge": 'print(refused(lambda: os.sched_setaffinity(target["judge"], {0})))',
    "environments of others": """
found = []
for pid in range(1, 70000):
    try:
        found.append(open("/proc/%d/environ" % pid, "rb").read())
    except OSError:
        pass
print("out" if any(target["secret"].encode() in text for text in found) else "held")
""",
    "its own environment": """
print("out" if target["secret"] in str(os.environ) or len(os.environ) > 16 else "held")
""",
    "command lines of others": """
found = []
for pid in range(1, 70000):
    try:
        found.append(open("/proc/%d/cmdline" % pid, "rb").read())
    except OSError:
        pass
print("out" if any(b"pytest" in text or b"launcher" in text for text in found) else "held")
""",
    "descriptors left open": """
from fcntl import F_GETFD, fcntl
found = []
for number in range(3, 4096):
    try:
        fcntl(number, F_GETFD)
        found.append(number)
    except OSError:
        pass
print("out: %r" % found if found else "held")
""",
    "typing into a terminal": """
def action():
    import fcntl, termios
    for number in (0, 1, 2):
        try:
            return fcntl.ioctl(number, termios.TIOCSTI, b"x")
        except OSError:
            pass
    return open("/dev/tty", "w")
print(refused(action))
""",
    # more rights
    "becoming root": 'print("out" if os.getuid() == 0 else refused(lambda: os.setuid(0)))',
    "becoming root by a set-uid program": """
import subprocess
ended = subprocess.run(["/usr/bin/su", "-c", "id"], stdin=subprocess.DEVNULL, capture_output=True)
print("out" if b"uid=0" in ended.stdout else "held")
""",
    "other groups": "print(refused(lambda: os.setgroups([0])))",
    "a user namespace": _calling(272, "0x10000000"),
    "a user namespace by clone": _calling(56, "0x10000011, 0, 0, 0, 0"),
    "a network namespace": _calling(272, "0x40000000"),
    "another namespace": 'print(refused(lambda: call(308, os.open("/proc/self/ns/net", 0), 0)))',
    "mounting": _calling(165, 'b"none", b".", b"tmpfs", 0, None'),
    "making /usr writable": _calling(165, 'None, b"/usr", None, 0x1020, None'),
    "unmounting": _calling(166, 'b"/usr", 2'),
    "another root": 'print(refused(lambda: os.chroot(".")))',
    # large attack surfaces
    "BPF": _calling(321, "5, ctypes.create_string_buffer(128), 128"),
    "performance events": _calling(298, "ctypes.create_string_buffer(128), 0, -1, -1, 0"),
    "io_uring": _calling(425, "1, ctypes.create_string_buffer(128)"),
    "user faults": _calling(323, "1"),
    "the keyring": _calling(250, "0, -3, 1"),
    "adding a key": _calling(248, 'b"user", b"x", b"y", 1, -3'),
    "kernel modules": _calling(313, '0, b"", 0'),
    "memory that outlives it": _calling(29, "0, 4096, 0o1666"),
    "memory without a process": _calling(319, 'b"x", 0'),
    "memory shared without a file": "import mmap\nprint(refused(lambda: mmap.mmap(-1, 4096)))",
    "queues that outlive it": _calling(68, "0, 0o1666"),
}
"""By what they reach for; numbers of system calls are those of x86-64."""
