"""Publishing: chains of engines over slow links, real updates as deltas, many small tensors in one call.

    python -m tests.benchmarks.bench_weights [--quick] [--out bench.json]

Eight receivers are processes behind links of 20 MB/s each way, so that two cores are not the limit. Against the time
that one link needs for all bytes; against a source that sends everything to everybody over its one link; with one link
ten times slower than the others; with a relay that is killed while it passes chunks on. Whoever finishes holds the
learner's digest, or the benchmark fails. The naive way is measured twice: over plain sockets, and as Ray objects.

The updates are those of a short training of a small model: density and size of the deltas in bf16 and in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tests.benchmarks import ray_naive
from tests.benchmarks.bench_kernels import EXPERTS, turns
from tests.benchmarks.bench_rows import Row, append_rows, compared, table
from tests.benchmarks.throttled import SOURCE, Finish, Link, Receivers, alone
from tests.kernels.test_delta import adam_like

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.chain import ChainTransport
from treadle.actors.broadcast.kept import Kept
from treadle.actors.broadcast.outgoing import DENSE
from treadle.actors.broadcast.standby import Standby
from treadle.kernels.digest import state_digest
from treadle.platform import metric_names as names
from treadle.platform.records import WeightManifest

COMMAND = "python -m tests.benchmarks.bench_weights"
RECEIVERS = 8
BYTES_PER_S = 20e6
SLOW = 3  # the receiver whose link is ten times slower, and the one that is killed
TRAINING_STEPS = 6

Buckets = list[NDArray[np.uint8]]


def version(step: int, megabytes: int) -> tuple[WeightManifest, Buckets]:
    g = torch.Generator().manual_seed(step)
    state = [(f"layer{i}.weight", torch.randn(megabytes * 25_000, generator=g)) for i in range(10)]
    return pack(state, step, 4 * 2**20)


def demand(found: list[Finish], manifest: WeightManifest) -> float:
    """Seconds of the last one; everybody must hold the version."""
    for finish in found:
        if finish.digest != manifest.version.digest:
            raise SystemExit(f"receiver {finish.receiver}: {finish.failure or 'another digest'}")
    return max(finish.wall_s for finish in found)


def by_chain(receivers: Receivers, steps: range, megabytes: int, left_out: int = -1) -> list[float]:
    """Seconds until the last receiver but `left_out` held each version. The first version, whose links nobody knows
    yet, is not counted."""
    source = ChainTransport(host=SOURCE, pace_out=Link(BYTES_PER_S))
    walls = []
    for step in steps:
        manifest, buckets = version(step, megabytes)
        receivers.fetch(manifest, source.send(manifest, buckets))
        found = receivers.finishes(RECEIVERS)
        demand(found, manifest)
        walls.append(demand([finish for finish in found if finish.receiver != left_out], manifest))
    return walls[1:]


def naive(receivers: Receivers, megabytes: int) -> float:
    manifest, buckets = version(100, megabytes)
    with alone(buckets, Link(BYTES_PER_S)) as port:
        receivers.fetch(manifest, port)
        return demand(receivers.finishes(RECEIVERS), manifest)


def killed(receivers: Receivers, megabytes: int) -> tuple[float, int]:
    """Seconds until the last survivor was done, and how many of them hold the version; the others hold nothing new."""
    source = ChainTransport(host=SOURCE, pace_out=Link(BYTES_PER_S))
    manifest, buckets = version(101, megabytes)
    receivers.fetch(manifest, source.send(manifest, buckets))
    time.sleep(0.5 * manifest.total_bytes / BYTES_PER_S)
    receivers.kill(SLOW)
    found = receivers.finishes(RECEIVERS - 1)
    whole = [finish for finish in found if finish.digest == manifest.version.digest]
    if any(finish.digest for finish in found if finish not in whole):
        raise SystemExit("a receiver holds a version that nobody published")
    return max(finish.wall_s for finish in found), len(whole)


def chains(megabytes: int, rounds: int) -> list[Row]:
    bound_s = version(0, megabytes)[0].total_bytes / BYTES_PER_S
    detail = f"{RECEIVERS} processes, {megabytes} MB over links of {BYTES_PER_S / 1e6:g} MB/s each way"
    even = Receivers([BYTES_PER_S] * RECEIVERS)
    try:
        walls = by_chain(even, range(1, rounds + 2), megabytes)
        alone_s = naive(even, megabytes)
        killed_s, whole = killed(even, megabytes)
    finally:
        even.close()
    rates = [BYTES_PER_S / (10 if i == SLOW else 1) for i in range(RECEIVERS)]
    uneven = Receivers(rates)
    try:
        others = by_chain(uneven, range(20, rounds + 21), megabytes, left_out=SLOW)
    finally:
        uneven.close()
    everybody, without = statistics.median(walls), statistics.median(others)

    def row(name: str, ours: float, theirs: float, unit: str, more: str = "") -> Row:
        return compared(name, ours, theirs, unit, command=COMMAND, detail=f"{detail}{more}")

    by_ray_s = ray_naive.seconds(megabytes, RECEIVERS, BYTES_PER_S)
    return [
        row(
            "publish by chains, against one link's time for all bytes",
            everybody,
            bound_s,
            "s (goal: at most 1.25)",
        ),
        row("everything to everybody, against chains", alone_s, everybody, "s (goal: at least 6)"),
        row("Ray's put and get for everybody, against chains", by_ray_s, everybody, "s (goal: at least 6)"),
        row(
            "others beside a link ten times slower, against eight even ones",
            without,
            everybody,
            "s (goal: at most 1.05)",
        ),
        row(
            "publish with a relay killed half way, against one link's time",
            killed_s,
            bound_s,
            "s",
            f"; {whole} of {RECEIVERS - 1} survivors hold the version, the others the one before",
        ),
    ]


def trained(dtype: torch.dtype, lr: float) -> tuple[list[float], float, float]:
    """Densities of real updates, and mean bytes of deltas and of whole versions: AdamW with fp32 masters on next-token
    prediction of a text with structure, at the learning rates of reinforcement learning."""
    from tests.actors.rollout.tiny_models import write_model
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            write_model(Path(folder), layers=4, width=256, tied=False, spread=0.02)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    kept, held = Kept(), set(DENSE)
    densities, deltas, whole = [], [], []
    g = torch.Generator().manual_seed(0)
    for step in range(TRAINING_STEPS + 1):
        start = torch.randint(2, 38, (16, 1), generator=g)
        ids = 2 + (start + torch.arange(24) * torch.randint(1, 5, (16, 1), generator=g)) % 36
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = ((name, p.detach().to(dtype)) for name, p in model.named_parameters())
        renewed = kept.renew(state, step, held, bucket_bytes=1 << 24, dense_above=1.0)
        held = {renewed.dense.version.digest}
        if step:
            densities.append(renewed.metrics[names.WEIGHTS_DENSITY])
            deltas.append(renewed.ways[0][0].total_bytes)
            whole.append(renewed.dense.total_bytes)
    return densities, statistics.mean(deltas), statistics.mean(whole)


def updates() -> list[Row]:
    rows = []
    for dtype, lr in ((torch.bfloat16, 1e-6), (torch.bfloat16, 1e-5), (torch.float32, 1e-6)):
        densities, delta, whole = trained(dtype, lr)
        told = ", ".join(f"{100 * density:.1f}" for density in densities)
        rows.append(
            compared(
                f"real updates, {str(dtype).removeprefix('torch.')}, lr {lr:g}: delta against the whole version",
                delta,
                whole,
                "bytes (ratio below 1: smaller)",
                command=COMMAND,
                detail=f"{whole / delta:.1f} times smaller; % changed per step: {told}",
            )
        )
    return rows


def experts(rounds: int) -> list[Row]:
    """6,144 matrices of 64 × 128, checked, against an unchecked copy of each: a delta written into the standby and the
    digest of everything afterwards; a whole version's views and digest there; an engine's adoption of a version."""
    old, new = adam_like(EXPERTS * 64 * 128, 0.017)
    named = [f"layers.{e // 128}.mlp.experts.{e % 128}.weight" for e in range(EXPERTS)]
    before, after = (list(t.view(EXPERTS, 64, 128).unbind()) for t in (old, new))
    kept, standby, whole = Kept(), Standby(), Standby()
    settings = {"bucket_bytes": 1 << 24, "dense_above": 1.0}
    first = kept.renew(zip(named, before, strict=True), 1, DENSE, **settings)  # type: ignore[arg-type]
    digests = {first.dense.version.digest}
    second = kept.renew(zip(named, after, strict=True), 2, digests, **settings)  # type: ignore[arg-type]
    back = kept.renew(zip(named, before, strict=True), 3, {second.dense.version.digest}, **settings)  # type: ignore[arg-type]
    standby.put(*first.ways[0])
    ways = [second.ways[0], back.ways[0]]
    assert all(manifest.base is not None for manifest, _ in ways)
    target = [t.clone() for t in before]

    def copy_each() -> None:
        for place, tensor in zip(target, after, strict=True):
            place.copy_(tensor)

    def apply() -> None:
        for manifest, buckets in ways:
            assert standby.put(manifest, buckets) == manifest.version.digest

    def copy_twice() -> None:
        copy_each()
        copy_each()

    def put_whole() -> None:
        manifest, buckets = first.ways[0]
        assert whole.put(manifest, buckets) == manifest.version.digest

    def adopt() -> None:
        copy_each()
        assert state_digest(zip(named, target, strict=True)) == second.dense.version.digest

    threads = f"{torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "1 thread"

    def row(name: str, times: tuple[float, float]) -> Row:
        detail = f"{old.numel():,} bf16 elements, 1.7 % changed; the copies are not checked; {threads}"
        unit = "ms (goal: at most 2)"
        return compared(f"{EXPERTS:,} small tensors: {name}", *times, unit, command=COMMAND, detail=detail)

    by_delta = turns(apply, copy_twice, rounds)
    return [
        row(
            "a delta written and everything digested, against a copy each", (by_delta[0] / 2, by_delta[1] / 2)
        ),
        row("a whole version viewed and digested, against a copy each", turns(put_whole, copy_each, rounds)),
        row("copies and a digest of everything, against the copies", turns(adopt, copy_each, rounds)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less weight, fewer versions")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    megabytes, rounds = (20, 2) if given.quick else (40, 5)
    rows = [*chains(megabytes, rounds), *updates(), *experts(3 if given.quick else 7)]
    append_rows(given.out, rows)
    print(table([asdict(row) for row in rows]))
    for row in rows:
        print(f"{row.name}: {row.detail}")


if __name__ == "__main__":
    main()
