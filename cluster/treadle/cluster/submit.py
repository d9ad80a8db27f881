"""`treadle submit`: a run as a Ray job on a cluster that need not know Treadle's code."""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.cluster.environment import given_token, prepare_environment
from treadle.cluster.reach import check_dashboard
from treadle.cluster.wheel import build_wheel
from treadle.platform.errors import ClusterError

_ENDED = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}
_POLL_S = 1.0
_AGENT_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """A job that the cluster has accepted."""

    id: str
    dashboard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """Where a job stands. `exit_code` is None until it has ended."""

    id: str
    status: str
    message: str
    exit_code: int | None


def submit_recipe(
    recipe_yaml: str, *, name: str, address: str, folder: str = "", wait: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """Runs `treadle run` on a resolved recipe as a job of the cluster whose dashboard listens at `address`.

    `folder` is the run folder as the cluster sees it. With `wait` the job's log is printed until it has ended
    (not if `quiet`). The recipe can be read back from the cluster in clear text: it must hold no secrets, the
    cluster's nodes bring their own credentials. Raises `ClusterError`, also when the job fails.
    """
    client = JobClient(address)
    recipe = f"{name}.yaml"
    words = ["python", "-m", "treadle.workflows.cli", "run", recipe, "--address", "auto"]
    job = client.submit(
        shlex.join([*words, *(("--dir", folder) if folder else ())]), {recipe: recipe_yaml.encode()}
    )
    if not wait:
        return {"job": job.id, "status": "SUBMITTED", "text": f"{job.id} accepted by {job.dashboard}"}
    status = client.follow(job.id, _discard if quiet else _print)
    if status.exit_code:
        failure = ClusterError(
            f"Job {job.id} {status.status.lower()} with exit code {status.exit_code}: "
            f"{_without_log(status.message)}.",
            f"Read its log: ray job logs --address {job.dashboard} {job.id}",
        )
        failure.exit_code = (
            status.exit_code
        )  # a script that submits sees what it would see had it run the recipe
        raise failure
    return {"job": job.id, "status": status.status, "text": f"{job.id} {status.status.lower()}"}


class JobClient:
    """Jobs on the cluster whose dashboard listens at `dashboard` ("http://host:8265")."""

    def __init__(self, dashboard: str, token_file: str = "", deadline_s: float = 10.0) -> None:
        """Raises `ClusterError` when nobody answers in time, or the token is missing or wrong."""
        prepare_environment(token_file)
        token = given_token()
        dashboard = dashboard if "://" in dashboard else f"http://{dashboard}"
        check_dashboard(dashboard, token, deadline_s)
        from ray.job_submission import JobSubmissionClient  # after the environment is complete

        self._dashboard = dashboard.rstrip("/")
        self._client: Any = JobSubmissionClient(
            self._dashboard, headers={"Authorization": f"Bearer {token}"} if token else None
        )

    def submit(self, entrypoint: str, files: Mapping[str, bytes]) -> SubmittedJob:
        """Runs `entrypoint` on the cluster in a folder with `files`, this Treadle importable."""
        folder = Path(tempfile.mkdtemp(prefix="treadle-job-"))
        try:
            work = folder / "work"
            work.mkdir()
            for name, content in files.items():
                (work / name).write_bytes(content)
            runtime_env = {"working_dir": str(work), "py_modules": [str(build_wheel(folder))]}
            job_id = self._submit_when_ready(entrypoint, runtime_env)
        except (RuntimeError, OSError) as error:
            raise ClusterError(
                f"{self._dashboard} refuses the job: {_first_line(error)}", "Look at the dashboard's log."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return SubmittedJob(id=job_id, dashboard=self._dashboard)

    def _submit_when_ready(self, entrypoint: str, runtime_env: Mapping[str, object]) -> str:
        """A cluster that has just started accepts jobs only when its first agent has registered."""
        deadline = time.monotonic() + _AGENT_DEADLINE_S
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=f"treadle-{secrets.token_hex(6)}",
                    runtime_env=dict(runtime_env),
                    metadata={"program": "treadle"},
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)

    def status(self, job_id: str) -> JobStatus:
        """Raises `ClusterError` for an unknown job or a cluster that has gone."""
        try:
            info = self._client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            raise ClusterError(
                f"{self._dashboard} says nothing about job {job_id}: {_first_line(error)}",
                "Check the id, and that the cluster is still running.",
            ) from error
        status = str(getattr(info.status, "value", info.status))
        code = _ENDED.get(status)
        if code == 1 and info.driver_exit_code:
            code = info.driver_exit_code
        return JobStatus(id=job_id, status=status, message=info.message or "", exit_code=code)

    def follow(self, job_id: str, write: Callable[[str], object]) -> JobStatus:
        """Hands the job's log to `write` as it grows, and returns the status when the job has ended."""
        asyncio.run(self._tail(job_id, write))
        status = self.status(job_id)
        if status.status != "SUCCEEDED" and status.message:
            write(f"{status.message}\n")
        return status

    def stop(self, job_id: str) -> None:
        """Asks the job to end."""
        self._client.stop_job(job_id)

    async def _tail(self, job_id: str, write: Callable[[str], object]) -> None:
        """consumes: the job's log; waits for: more of it, or the job's end; unblocked by: either, at the
        latest after a lost connection, which is opened again; produces: each piece once."""
        written = 0
        while True:
            seen = 0
            try:
                async for piece in self._client.tail_job_logs(job_id):
                    fresh = piece[max(written - seen, 0) :]
                    seen += len(piece)
                    if fresh:
                        write(fresh)
                        written += len(fresh)
            except (RuntimeError, OSError):
                pass  # the status below decides whether the job or only the connection has ended
            if self.status(job_id).exit_code is not None:
                return
            await asyncio.sleep(_POLL_S)


def _without_log(message: str) -> str:
    """Ray appends the end of the log, which has been shown already."""
    return message.strip().split("\n", 1)[0].split(", last available logs", 1)[0].rstrip(".")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(text: str) -> None:
    del text
