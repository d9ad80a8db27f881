"""What Ray executes instead of Python to start a worker: `worker_shim.py SOCKET WORKER.py ARGUMENT...`.

Asks the template at SOCKET to fork the worker and ends. Imports the standard library alone: it runs for every worker,
isolated, so that it takes hundredths of a second.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

READY, ANSWER_BYTES = b"+", 16
PATIENCE_S = 45.0
"""For a template that still imports. Ray gives a worker 60 s to register."""
_OOM_SCORE = "/proc/self/oom_score_adj"


def main() -> None:
    address, command = sys.argv[1], sys.argv[2:]
    if not handed_over(address, command):
        sys.stderr.write("treadle: no template process answers; this worker starts by itself\n")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *command])


def handed_over(address: str, command: list[str]) -> bool:
    """Whether the template has forked the worker. Once asked it is not asked elsewhere: one worker, one process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as template:
        template.settimeout(PATIENCE_S)
        try:
            template.connect(address)
            if template.recv(1) != READY:
                return False
        except OSError:
            return False
        request = json.dumps(_surroundings() | {"command": command}).encode()
        socket.send_fds(template, [len(request).to_bytes(4, "big")], [0, 1, 2])
        template.sendall(request)
        if not template.recv(ANSWER_BYTES):
            sys.exit("treadle: the template process died while it forked this worker")
        return True


def _surroundings() -> dict[str, object]:
    """What a child inherits when it is executed and not forked elsewhere."""
    with open(_OOM_SCORE) as file:
        score = file.read().strip()
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score": score,
        "blocked_signals": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


if __name__ == "__main__":
    main()
