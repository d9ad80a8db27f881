"""Programs that use up what they can get. None may pass; each must end in time, and leave nothing behind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exhaustion:
    """`why` are the endings that count; empty: any."""

    code: str
    why: tuple[str, ...] = ()
    language: str = "python"


TIME = ("wall time", "cpu time")

EXHAUSTIONS: dict[str, Exhaustion] = {
    "an endless loop": Exhaustion("while True: pass", TIME),
    "sleeping": Exhaustion("import time; time.sleep(60)", ("wall time",)),
    "one long instruction": Exhaustion("10 ** (10 ** 10)", (*TIME, "memory", "status 1")),
    "a slow expression": Exhaustion('import re; re.match(r"(a+)+$", "a" * 60 + "b")', TIME),
    "stopping itself": Exhaustion("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", ("wall time",)),
    "waiting for input that never comes": Exhaustion(
        "import os; r, w = os.pipe(); os.read(r, 1)", ("wall time",)
    ),
    "ignoring every signal": Exhaustion(
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
""",
        TIME,
    ),
    "a handler for the end of its time": Exhaustion(
        """
import signal
for number in (signal.SIGXCPU, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
while True: pass
""",
        TIME,
    ),
    "patching the clock": Exhaustion(
        """
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
while True: pass
""",
        TIME,
    ),
    "threads that spin": Exhaustion(
        """
import threading
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin).start()
""",
        TIME,
    ),
    "processes that spin": Exhaustion(
        """
import os
for _ in range(6): os.fork()
while True: pass
""",
        (*TIME, "memory"),
    ),
    "a fork bomb": Exhaustion(
        """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        (*TIME, "memory"),
    ),
    "a fork bomb of sessions": Exhaustion(
        """
import os
while True:
    try:
        if os.fork() == 0:
            try:
                os.setsid()
            except OSError:
                pass
    except OSError:
        pass
""",
        (*TIME, "memory"),
    ),
    "a fork bomb whose parents end": Exhaustion(
        """
import os, time
while True:
    try:
        if os.fork(): os._exit(1)
        time.sleep(0.001)
    except OSError:
        time.sleep(0.01)
"""
    ),
    "a shell's fork bomb": Exhaustion(
        ":(){ :|:& };: ; sleep 60", ("wall time", "cpu time", "memory"), "bash"
    ),
    "threads without end": Exhaustion(
        """
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,)).start()
"""
    ),
    "all memory": Exhaustion("x = []\nwhile True: x.append(bytearray(2 ** 20))", ("memory", "status 1")),
    "one large object": Exhaustion("x = bytearray(2 ** 40)", ("status 1",)),
    "memory of many processes": Exhaustion(
        """
import os, time
for _ in range(16):
    if os.fork() == 0:
        x = [bytearray(os.urandom(1) * 2 ** 20) for _ in range(100)]
        time.sleep(60)
time.sleep(60)
""",
        ("memory", *TIME),
    ),
    "shared memory": Exhaustion(
        """
import mmap, os, time
for _ in range(16):
    if os.fork() == 0:
        x = mmap.mmap(-1, 200 * 2 ** 20)
        for offset in range(0, len(x), 4096): x[offset] = 1
        time.sleep(60)
time.sleep(60)
""",
        ("memory", *TIME),
    ),
    "files in memory": Exhaustion(
        """
import os
while True:
    fd = os.memfd_create("x")
    for _ in range(60): os.write(fd, bytes(2 ** 20))
"""
    ),
    "a flood of output": Exhaustion('while True: print("x" * 65536)', ("output limit",)),
    "a flood of errors": Exhaustion(
        'import sys\nwhile True: sys.stderr.write("x" * 65536)', ("output limit",)
    ),
    "a flood by a child": Exhaustion(
        """
import os, time
if os.fork() == 0:
    while True: os.write(1, b"x" * 65536)
time.sleep(60)
""",
        ("output limit",),
    ),
    "a flood of tiny writes": Exhaustion('import os\nwhile True: os.write(1, b"x")', ("output limit", *TIME)),
    "a large file": Exhaustion(
        """
with open("big", "wb") as file:
    while True: file.write(bytes(2 ** 20))
"""
    ),
    "a file with holes": Exhaustion('with open("big", "wb") as file: file.truncate(2 ** 40)'),
    "many large files": Exhaustion(
        """
for n in range(10 ** 6):
    with open("big%d" % n, "wb") as file: file.write(bytes(2 ** 20))
"""
    ),
    "many small files": Exhaustion(
        """
import itertools
for n in itertools.count(): open("small%d" % n, "wb").close()
"""
    ),
    "folders in folders": Exhaustion(
        """
import os
while True:
    os.mkdir("d")
    os.chdir("d")
"""
    ),
    "a locked folder": Exhaustion(
        """
import os
os.mkdir("d"); open("d/x", "w").close(); os.chmod("d", 0); os.chmod(".", 0)
raise SystemExit(3)
""",
        ("status 3",),
    ),
    "the temporary folder": Exhaustion(
        """
for n in range(10 ** 6):
    with open("/tmp/treadle-test-fill%d" % n, "wb") as file: file.write(bytes(2 ** 20))
"""
    ),
    "shared memory files": Exhaustion(
        """
for n in range(10 ** 6):
    with open("/dev/shm/treadle-test-fill%d" % n, "wb") as file: file.write(bytes(2 ** 20))
"""
    ),
    "recursion": Exhaustion("def f(): f()\nf()", ("status 1",)),
    "recursion without a limit": Exhaustion(
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return [f(n + 1)]\nf(0)"
    ),
    "a crash": Exhaustion("import ctypes; ctypes.string_at(0)", ("signal 11",)),
    "killing its group": Exhaustion("import os; os.killpg(0, 9)"),
    "closing its streams": Exhaustion(
        "import os, time\nfor fd in (0, 1, 2): os.close(fd)\ntime.sleep(60)", ("wall time",)
    ),
    "leaving a reader of its output": Exhaustion(
        """
import os, time
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    time.sleep(60)
raise SystemExit(4)
""",
        ("status 4",),
    ),
    "printing a huge number": Exhaustion(
        "import sys\nsys.set_int_max_str_digits(0)\nprint(3 ** 30000000)", (*TIME, "output limit")
    ),
    "Node: an endless loop": Exhaustion("for (;;) {}", TIME, "javascript"),
    "Node: all memory": Exhaustion(
        "const x = []; for (;;) x.push(Buffer.alloc(2 ** 20, 1));", (), "javascript"
    ),
    "Node: a flood": Exhaustion(
        'const fs = require("fs"); for (;;) fs.writeSync(1, "x".repeat(65536));',
        ("output limit",),
        "javascript",
    ),
    "C: an endless loop": Exhaustion("int main(void) { for (;;); }", TIME, "c"),
    "C: a fork bomb": Exhaustion(
        "#include <unistd.h>\nint main(void) { for (;;) fork(); }", (*TIME, "memory"), "c"
    ),
    "C: all memory": Exhaustion(
        "#include <stdlib.h>\n#include <string.h>\nint main(void) { for (;;) { void *p = malloc(1 << 20); "
        "if (!p) return 5; memset(p, 1, 1 << 20); } }",
        ("memory", "status 5"),
        "c",
    ),
    "C++: an exception storm": Exhaustion(
        "#include <vector>\nint main() { std::vector<std::vector<long>> v; "
        "for (;;) v.emplace_back(1000000, 7); }",
        ("memory", "signal 6", "status 134"),
        "cpp",
    ),
}

COMPILE_BOMBS: dict[str, Exhaustion] = {
    "including endless zeros": Exhaustion('#include "/dev/zero"\nint main(void) { return 0; }', (), "c"),
    "including endless noise": Exhaustion('#include "/dev/urandom"\nint main(void) { return 0; }', (), "c"),
    "including itself": Exhaustion(
        "#include __FILE__\n#include __FILE__\nint main(void) { return 0; }", (), "c"
    ),
    "including a secret": Exhaustion('#include "/etc/shadow"\nint main(void) { return 0; }', (), "c"),
    "a huge object": Exhaustion("char x[1L << 32] = {1}; int main(void) { return 0; }", (), "c"),
    "a huge assembly": Exhaustion(
        'asm(".rept 1000000000\\n.quad 1\\n.endr"); int main(void) { return 0; }', (), "c"
    ),
    "macros that double": Exhaustion(
        "#define A0 x x x x x x x x\n"
        + "\n".join(
            f"#define A{n} A{n - 1} A{n - 1} A{n - 1} A{n - 1} A{n - 1} A{n - 1}" for n in range(1, 14)
        )
        + "\nint main(void) { A13 }",
        (),
        "c",
    ),
    "templates that double": Exhaustion(
        "template <int N, int M> struct F { static constexpr long v = F<N - 1, 2 * M>::v + F<N - 1, 2 * M + 1>::v; };\n"
        "template <int M> struct F<0, M> { static constexpr long v = M; };\n"
        "int main() { return F<28, 0>::v; }",
        (),
        "cpp",
    ),
    "templates without end": Exhaustion(
        "template <int N> struct F { static constexpr long v = F<N + 1>::v; };\nint main() { return F<0>::v; }",
        (),
        "cpp",
    ),
    "an endless constant": Exhaustion(
        "constexpr long f(long n) { long s = 0; for (long i = 0; i < n; ++i) for (long j = 0; j < 250000; ++j) "
        "s += i ^ j; return s; }\nstatic_assert(f(200000) != 1);\nint main() {}",
        (),
        "cpp",
    ),
    "not a program": Exhaustion("this is no program", (), "cpp"),
    "Java that is no program": Exhaustion("class Main { void }", (), "java"),
    "Rust macros that recurse": Exhaustion(
        '#![recursion_limit = "4294967295"]\nmacro_rules! m { ($($t:tt)*) => { m!($($t)* $($t)* x); } }\n'
        "fn main() { m!(x x); }",
        (),
        "rust",
    ),
}
