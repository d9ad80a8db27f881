"""Runs that no client owns, on clusters that were started separately, held in the middle for what is to happen."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.clusters import RunningCluster
from tests.e2e.programs import REPOSITORY, TINY, WITH_PROMPTS, Ended, Program, wait_until

HELD = "learner.before_step=sleep:30@3"
"""Two steps and a commit are made, and the third waits for what the test has in store."""


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """The nodes of a cluster can import the tests' verifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield


def credentials(cluster: RunningCluster) -> dict[str, str]:
    return {"HOME": str(cluster.folder), "RAY_AUTH_TOKEN": cluster.token}


def told(cluster: RunningCluster, *words: str, **environment: str) -> Ended:
    """A command on the cluster, to its end."""
    return Program(words=words, environment={**credentials(cluster), **environment}).run()


class Detached:
    """A detached tiny run that is held in its third step, after its first commit, and its first client. `within` are
    words in front of the client's command: the machine it is on."""

    def __init__(
        self,
        cluster: RunningCluster,
        folder: Path,
        *settings: str,
        faults: str = HELD,
        within: tuple[str, ...] = (),
    ) -> None:
        self.cluster, self.folder, self._log = cluster, folder / "run", (folder / "client.log").open("w+")
        where = ("--address", cluster.address, "--detach", "--dir", str(self.folder))
        environment = {**credentials(cluster), "TREADLE_FAILPOINTS": faults}
        self.program = Program(
            words=("run", str(TINY), WITH_PROMPTS, *settings, *where),
            environment=environment,
            within=within,
        )
        self.client: subprocess.Popen[str] = self.program.start_into(self._log)

    def __enter__(self) -> Detached:
        commit = self.folder / "checkpoints/rl/step-00000002/COMMITTED"
        assert wait_until(lambda: commit.exists() or self.client.poll() is not None, 900), self.said()
        assert self.client.poll() is None, self.said()
        assert len(self.program.survivors()) > 5, "the run's processes do not have the mark"
        return self

    def __exit__(self, *_: object) -> None:
        self.client.kill()
        self.client.wait(60)
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            if self.state["state"] == "running":
                psutil.Process(self.pid).kill()
        self._log.close()

    def begin(self) -> None:
        """Waits until the folder says which controller runs it."""
        file = self.folder / "run.json"

        def said() -> bool:
            return file.exists() and bool(self.state.get("controller"))

        assert wait_until(lambda: said() or self.client.poll() is not None, 300), self.said()
        assert said(), self.said()

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run.json").read_text()))

    @property
    def pid(self) -> int:
        return int(self.state["controller"]["pid"])

    def said(self) -> str:
        return Path(self._log.name).read_text()

    def ended(self) -> Ended:
        """How the first client ended."""
        code = self.client.wait(300)
        return Ended(code=code, out=self.said(), err=self.said(), wall_s=0.0)

    def all_gone(self) -> bool:
        return self.program.all_gone(30.0)
