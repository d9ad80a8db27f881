"""The naive way to publish with Ray: the source puts everything once for each receiver, who gets it.

The objects are real, of real actors of a private Ray on this machine. Its object store has no link to throttle here, so
the source is: every byte waits for the one uplink before it is put, as on a network where the store's pulls share it. A
bucket is got while the next one waits. Ray's own work comes on top, as it would.

    python -m tests.benchmarks.ray_naive MEGABYTES RECEIVERS BYTES_PER_S

prints the seconds. A process of its own: Ray reads its authentication when it is imported.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.throttled import DEADLINE_S, Finish, Link

from treadle.actors.broadcast.buckets import check, unpack
from treadle.kernels.digest import state_digest
from treadle.platform.records import WeightManifest


class Getter:
    """A receiver; the last bucket of a version makes it whole."""

    def __init__(self) -> None:
        self._buckets: list[NDArray[np.uint8]] = []

    def ready(self) -> None:
        """Returns when the process is there."""

    def take(self, references: list[Any]) -> None:
        import ray

        self._buckets += ray.get(references)

    def digest(self, manifest: WeightManifest) -> str:
        check(manifest, self._buckets)
        return state_digest(unpack(manifest, self._buckets))


def put_and_get(
    manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]], receivers: int, bytes_per_s: float
) -> list[Finish]:
    """One version to all receivers over one uplink of `bytes_per_s`; seconds until the last byte is got. Ray is started
    for it and ended."""
    folder = tempfile.mkdtemp(prefix="tb", dir="/tmp")
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=receivers,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        actor = ray.remote(Getter)
        getters = [actor.remote() for _ in range(receivers)]
        ray.get([getter.ready.remote() for getter in getters], timeout=DEADLINE_S)
        uplink, began, last = Link(bytes_per_s), time.monotonic(), []
        for getter in getters:
            for bucket in buckets:
                for start in range(0, len(bucket), 65_536):
                    uplink(len(bucket[start : start + 65_536]))
                last.append(getter.take.remote([ray.put(bucket)]))
        ray.get(last, timeout=DEADLINE_S)
        wall_s = time.monotonic() - began
        digests = ray.get([getter.digest.remote(manifest) for getter in getters], timeout=DEADLINE_S)
        return [Finish(receiver=index, wall_s=wall_s, digest=digest) for index, digest in enumerate(digests)]
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def seconds(megabytes: int, receivers: int, bytes_per_s: float) -> float:
    """`put_and_get` in a process with a token of its own. Raises `RuntimeError` with its words when it fails."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.ray_naive",
        *map(str, (megabytes, receivers, bytes_per_s)),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **token},
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return float(done.stdout.split()[-1])


def main() -> None:
    from tests.benchmarks.bench_weights import demand, version

    megabytes, receivers, bytes_per_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    manifest, buckets = version(102, megabytes)
    print(demand(put_and_get(manifest, buckets, receivers, bytes_per_s), manifest))


if __name__ == "__main__":
    main()
