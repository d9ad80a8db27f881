"""How ranks find each other: a store on rank 0's own free port, then gloo or NCCL."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from treadle.platform.errors import LearnerError


def open_store(host: str, ranks: int, deadline_s: float) -> TCPStore:
    """Rank 0's rendezvous point. The port is chosen by the system and held from here on (`store.port`), so no
    other process can take it before the ranks arrive."""
    return TCPStore(
        host, 0, ranks, is_master=True, timeout=timedelta(seconds=deadline_s), wait_for_workers=False
    )


def join(
    rank: int, ranks: int, host: str, port: int, deadline_s: float, store: TCPStore | None = None
) -> None:
    """Joins the process group of this learner. Every collective fails after `deadline_s` instead of hanging.

    Raises LearnerError when the others do not come.
    """
    # DeepSpeed reads its place in the group from the environment.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    timeout = timedelta(seconds=deadline_s)
    try:
        store = store or TCPStore(host, port, ranks, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistError) as error:
        raise LearnerError(
            f"learner rank {rank} found no process group of {ranks} ranks at {host}:{port}: {error}.",
            "Check that the ranks' nodes reach each other, and the log of rank 0.",
        ) from error


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of_rank(gpus: float) -> torch.device:
    """The rank's GPU (Ray shows it only one), or the CPU."""
    return torch.device("cuda", 0) if gpus > 0 else torch.device("cpu")
