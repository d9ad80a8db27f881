"""Programs that want to be judged right without being right. None may pass a single test.

The tests they face call `secret_sum(a, b)`, whose right answers hold a random number that no program can
know; `EXPECTED` stands for nothing they could find, because it never enters the sandbox.
"""

from __future__ import annotations

FORGERIES: dict[str, str] = {
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def secret_sum(a, b): return Equal()
""",
    "an integer that is always equal": """
class Equal(int):
    def __eq__(self, other): return True
    def __int__(self): return 42
    def __add__(self, other): return self
    __repr__ = __str__ = lambda self: "true"
def secret_sum(a, b): return Equal(1)
""",
    "a text that is always equal": """
class Equal(str):
    def __eq__(self, other): return True
    def __str__(self): return self
def secret_sum(a, b): return Equal("x")
""",
    "a list of anything": """
class All(list):
    def __eq__(self, other): return True
    def __len__(self): return 1
    def __iter__(self): return iter([True])
def secret_sum(a, b): return All()
""",
    "a type that lies": """
class Liar:
    __class__ = bool
    def __bool__(self): return True
def secret_sum(a, b): return Liar()
""",
    "leaving while it loads": "import sys; sys.exit(0)",
    "leaving hard while it loads": "import os; os._exit(0)",
    "leaving when called": "import sys\ndef secret_sum(a, b): sys.exit(0)",
    "leaving hard when called": "import os\ndef secret_sum(a, b): os._exit(0)",
    "leaving in a handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef secret_sum(a, b): return 0",
    "another status at the end": "import atexit\natexit.register(print, 'passed')\nraise SystemExit(0)",
    "markers on stdout": """
print("passed"); print("OK"); print('{"returned": true}'); print("1 passed")
def secret_sum(a, b):
    print("passed")
    return True
""",
    "records without names": """
import os
def secret_sum(a, b):
    for fd in range(3, 64):
        try: os.write(fd, b'x {"returned": 0}\\n')
        except OSError: pass
    return 0
""",
    "records while it loads": """
import os
for fd in range(64):
    try: os.write(fd, b'x {"returned": 0}\\n')
    except OSError: pass
def secret_sum(a, b): return 0
""",
    "records of its own, with names read beforehand": """
import json, os
for fd in range(3, 64):
    try: text = os.pread(fd, 10 ** 6, 0)
    except OSError: continue
    for line in text.splitlines():
        try: test = json.loads(line)
        except ValueError: continue
        for out in range(3, 64):
            try: os.write(out, ('%s {"returned": 0}\\n' % test["nonce"]).encode())
            except OSError: pass
def secret_sum(a, b): return 0
""",
    "records of its own, with names found in frames": """
import os, sys
def secret_sum(a, b):
    frame = sys._getframe()
    while frame:
        test = frame.f_locals.get("test")
        if test:
            for fd in range(3, 64):
                try: os.write(fd, ('%s {"returned": 0}\\n' % test["nonce"]).encode())
                except OSError: pass
        frame = frame.f_back
    return 0
""",
    "a record in place of the harness's": """
import os, sys
def secret_sum(a, b):
    frame = sys._getframe()
    while frame:
        test = frame.f_locals.get("test")
        if test:
            for fd in range(3, 64):
                try: os.write(fd, ('%s {"returned": 0}\\n' % test["nonce"]).encode())
                except OSError: pass
            os._exit(0)
        frame = frame.f_back
""",
    "answers found in frames": """
import sys
def secret_sum(a, b):
    frame = sys._getframe()
    while frame:
        for name in ("expected", "returns", "answer", "result", "solution"):
            if name in frame.f_locals: return frame.f_locals[name]
            test = frame.f_locals.get("test")
            if isinstance(test, dict) and name in test: return test[name]
        frame = frame.f_back
""",
    "answers found by the collector": """
import gc
def secret_sum(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for name in ("expected", "returns", "stdout", "answer"):
                if name in thing and isinstance(thing[name], (int, str)): return thing[name]
""",
    "answers found in files": """
import os
def secret_sum(a, b):
    for folder in (".", "/tmp", "/box", "/dev/shm", "/proc/self"):
        for path, _, names in os.walk(folder):
            for name in names:
                try: text = open(os.path.join(path, name), "rb").read(10 ** 6)
                except OSError: continue
                at = text.find(b"expected")
                digits = [chr(byte) for byte in text[at:at + 40] if 48 <= byte < 58]
                if at >= 0: return int("".join(digits) or 0)
""",
    "overwriting the harness": """
import os, sys
with open("harness_python.py", "w") as file: file.write("print('passed')")
os.execv(sys.executable, [sys.executable, "harness_python.py"])
""",
    "overwriting the harness's functions": """
import sys
main = sys.modules["__main__"]
main.encode = lambda value, depth=0: True
main.decode = lambda value: value
def secret_sum(a, b): return 0
""",
    "patching json": """
import json
json.dumps = lambda *_: '{"returned": true}'
json.encoder.c_make_encoder = None
json.JSONEncoder.encode = lambda *_: "true"
def secret_sum(a, b): return 0
""",
    "patching built-ins": """
import builtins
builtins.isinstance = lambda *_: True
builtins.type = lambda *_: bool
builtins.int = builtins.float = builtins.str = lambda *_: 0
def secret_sum(a, b): return 0
""",
    "patching modules": """
import sys
for name in list(sys.modules):
    if name in ("json", "os", "math", "types"): sys.modules[name] = None
def secret_sum(a, b): return 0
""",
    "another function of that name later": """
import threading, time
def secret_sum(a, b): return 0
threading.Thread(target=lambda: (time.sleep(0.01), globals().update(secret_sum=lambda a, b: True))).start()
""",
    "nothing": "",
    "no function": "x = 1",
    "not a program": "this is no program",
    "not a number": 'def secret_sum(a, b): return float("nan")',
    "infinity": 'def secret_sum(a, b): return float("inf")',
    "a number of 100000 digits": """
import sys
sys.set_int_max_str_digits(0)
def secret_sum(a, b): return 10 ** 100000
""",
    "a generator": "def secret_sum(a, b): yield a + b",
    "a list in itself": "def secret_sum(a, b):\n    x = []\n    x.append(x)\n    return x",
    "lists in lists": "def secret_sum(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a list that doubles": "def secret_sum(a, b):\n    x = 0\n    for _ in range(60): x = [x, x]\n    return x",
    "text that is no text": 'def secret_sum(a, b): return "\\ud800"',
    "bytes": 'def secret_sum(a, b): return b"x"',
    "true": "def secret_sum(a, b): return True",
    "all small numbers": "def secret_sum(a, b): return set(range(1000))",
    "tags of our own": 'def secret_sum(a, b): return {"$tuple": [a + b]}',
    "an exception that pretends": """
class Fine(BaseException):
    __name__ = "passed"
def secret_sum(a, b): raise Fine(a + b)
""",
    "a harness of its own": """
import os
if os.fork(): os._exit(0)
def secret_sum(a, b): return 0
""",
}

NODE_FORGERIES: dict[str, str] = {
    "leaving while it loads": "process.exit(0);",
    "leaving hard": "process.reallyExit(0);",
    "leaving when called": "function secret_sum(a, b) { process.exit(0); }",
    "patching JSON": "JSON.stringify = () => '{\"returned\": true}'; function secret_sum(a, b) { return 0; }",
    "toJSON": "function secret_sum(a, b) { return { toJSON() { return true; }, valueOf() { return 1; } }; }",
    "patching prototypes": "Object.prototype.returned = true; "
    "Array.prototype.map = () => [0]; function secret_sum() { return 0; }",
    "markers": "console.log('passed'); function secret_sum() { console.log('passed'); return true; }",
    "records of its own": (
        'const fs = require("fs"); for (const line of fs.readFileSync(0, "utf8").split("\\n")) '
        "if (line) fs.writeSync(1, JSON.parse(line).nonce + ' {\"returned\": 0}\\n'); "
        "function secret_sum(a, b) { return 0; }"
    ),
    "not a number": "const secret_sum = () => NaN;",
    "a list in itself": "function secret_sum() { const x = []; x.push(x); return x; }",
    "a proxy": "function secret_sum() { return new Proxy({}, { get: () => true, ownKeys: () => [] }); }",
    "nothing": "",
}
