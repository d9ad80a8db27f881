"""Row 8: Ray's head service dies and is started again at its address; the run goes on by itself."""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.chaos.attached import attached, drain, family
from tests.chaos.book import Row, write_row
from tests.chaos.runs import WHOLE_RUN, account, clean, events_of, same_bits
from tests.clusters import Node, RunningCluster, cluster_of
from tests.e2e.programs import samples_of, summary_of

pytestmark = WHOLE_RUN

AWAY_S = 8.0
SLOWLY = {"TREADLE_FAILPOINTS": "learner.before_step[1]=sleep:6@*"}
BUDGET_S = 60.0
"""After which Ray's drivers end themselves."""


class Head:
    """The cluster's GCS, to be ended and started again as it was."""

    def __init__(self, cluster: RunningCluster) -> None:
        [self._gcs] = family(cluster.nodes[0], "gcs_server")
        self._command, self._environment = self._gcs.cmdline(), self._gcs.environ()
        self._folder, self._log = self._gcs.cwd(), cluster.folder / "gcs_again.log"
        self._again: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        self._gcs.kill()
        self._gcs.wait(10)

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._again = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdout=log, stderr=log
            )
        time.sleep(0.5)
        assert self._again.poll() is None, self._log.read_text()

    def close(self) -> None:
        if self._again is not None:
            self._again.kill()
            self._again.wait(10)


def test_row_08_the_gcs_is_killed_and_comes_back_and_the_run_goes_on(
    tmp_path: Path, undisturbed: Path
) -> None:
    """With Ray's embedded store. While it is away a rollout worker dies; when it is back a verifier dies, and a node is
    told to leave."""
    with (
        tempfile.TemporaryDirectory(prefix="gcs", dir="/tmp") as store,
        cluster_of(
            Node(kept=True), Node(cpus=4), RAY_gcs_storage="rocksdb", RAY_gcs_storage_path=store, **SLOWLY
        ) as cluster,
        closing(Head(cluster)) as head,
        attached(tmp_path, cluster) as run,
    ):
        killed = time.time()
        head.kill()
        struck(cluster, "ray::RolloutActor")
        time.sleep(AWAY_S)
        head.start()
        back = time.time()
        run.until(lambda: bool(events_of(run.folder, "replaced")), 120)
        mended = time.time()
        drain(cluster, cluster.nodes[1], 600)
        struck(cluster, "ray::VerifyActor")
        run.end()
    made = [line["time"] for line in run.steps()]
    found = account(run.folder)
    write_row(
        Row(
            row=8,
            fault=f"kill -9 of the GCS, back {AWAY_S:g} s later (embedded store); a rollout worker dies meanwhile",
            seconds=[min(at for at in made if at > back) - killed],
            budget_s=BUDGET_S,
            account=found,
            same_bits=same_bits(run.folder, undisturbed),
            figures={
                "longest stall s": round(max(b - a for a, b in itertools.pairwise(made)), 1),
                "steps made while it was away": sum(killed < at < back for at in made),
                "worker replaced s after it was back": round(mended - back, 1),
                "replacements": json.dumps(summary_of(run.folder)["replacements"]),
                "recoveries": summary_of(run.folder)["recoveries"],
            },
        )
    )
    assert clean(found), found
    assert same_bits(run.folder, undisturbed)
    assert samples_of(run.folder) == samples_of(undisturbed)
    assert summary_of(run.folder)["replacements"] == {"rollout": 1, "verify": 1}
    assert len(events_of(run.folder, "leaving")) == 1, "the driver no longer hears which nodes leave"
    assert min(at for at in made if at > back) - killed <= BUDGET_S


def struck(cluster: RunningCluster, title: str) -> None:
    """kill -9 of a role's process."""
    next(one for node in cluster.nodes for one in family(node, title)).kill()
