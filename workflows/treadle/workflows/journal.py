"""The book of one stage: where it stands, what became of every group, its figures and its checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from treadle.platform import metric_names as names
from treadle.platform.contracts import Prompts
from treadle.platform.errors import Interrupted, RefusedError
from treadle.platform.failpoints import failpoint
from treadle.platform.ledger import Ledger
from treadle.platform.records import Drawn, Issue, PublishReport, Sampling, StepReport, Verdict, VerdictStatus
from treadle.platform.tracking import StageTracker, rollout_rows
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.metrics import StepClock, step_metrics
from treadle.workflows.rewards import RewardRule
from treadle.workflows.roles import Roles, texts_of
from treadle.workflows.saving import CheckpointKeeper, Position
from treadle.workflows.stream import GroupStream, Ready


class Journal:
    """Writes down a stage as it happens; built by `Run.begin`.

    A step's groups become `trained` in the ledger after the learner has made the step and the version is out.
    The checkpoint carries the ledger's mark: what happened after the newest committed one is rolled back and
    happens again, with the same prompts and, at η=0, the same samples.
    """

    def __init__(
        self,
        *,
        stage: str,
        seed: int,
        position: Position,
        ledger: Ledger,
        tracker: StageTracker,
        keeper: CheckpointKeeper,
        weights: Mapping[str, float] | None = None,
        most_refused: int = 3,
    ) -> None:
        self.stage, self.seed, self.start, self.step = stage, seed, position.step, position.step
        self.clock = StepClock()
        self._position, self._ledger, self._tracker, self._keeper = position, ledger, tracker, keeper
        self._weights = weights
        self._most_refused, self._refused = most_refused, 0
        self._stopping = False
        self._notes: dict[str, float] = {}
        self._stream: GroupStream | None = None
        self._dropped_before: dict[str, int] = {}

    def stream(self, roles: Roles, prompts: Prompts, config: GrpoConfig) -> GroupStream:
        """The stage's stream of groups, continued where the checkpoint left it."""
        sampling = Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            group_size=config.group_size,
            seed=self.seed,
            stop=tuple(config.stop),
        )
        self._stream = GroupStream(
            stage=self.stage,
            prompts=prompts,
            rollouts=roles.rollouts,
            verifiers=roles.verifiers,
            book=self,
            sampling=sampling,
            per_step=config.prompts_per_step,
            steps=config.steps,
            staleness=config.staleness,
            version=roles.broadcast.version,
            pending=self._position.pending,
            cursor=self._position.cursor,
            drop_zero_variance=config.objective.dynamic_sampling,
            min_scored=2 if config.objective.needs_groups else 1,
            take_deadline_s=config.take_deadline_s,
            rewards=RewardRule(config.reward, self._weights),
        )
        self.clock.lap()
        return self._stream

    def issued(self, issue: Issue) -> None:
        self._ledger.issue(issue.id, issue.prompt.id, issue.version.step)
        failpoint("driver.after_issue")

    def drawn(self, drawn: Drawn) -> None:
        self._ledger.drawn(drawn.id, drawn.oldest.step, drawn.newest.step, sum(drawn.lengths))

    def scored(self, drawn: Drawn, verdicts: Sequence[Verdict]) -> None:
        statuses = [verdict.status for verdict in verdicts]
        self._ledger.scored(
            drawn.id,
            scored=statuses.count(VerdictStatus.SCORED),
            failed=statuses.count(VerdictStatus.FAILED),
            timed_out=statuses.count(VerdictStatus.TIMED_OUT),
        )

    def dropped(self, ids: Sequence[str], reason: str) -> None:
        self._ledger.drop(ids, reason)

    def quarantined(self, issue: Issue, cause: str) -> None:
        """A prompt will not be drawn again in this attempt of the run."""
        self._tracker.event("quarantined", {"prompt": issue.prompt.id, "group": issue.id, "message": cause})

    def leased(self, step: int, groups: Sequence[Ready]) -> None:
        self._ledger.lease([group.drawn.id for group in groups], step)
        failpoint("driver.after_lease")

    async def trained(
        self, groups: Sequence[Ready], report: StepReport, published: PublishReport
    ) -> StepReport:
        """A GRPO step is complete: its groups end as trained, or as dropped where a guard refused the update."""
        failpoint("driver.after_publish")
        ids = [group.drawn.id for group in groups]
        if report.skipped:
            self._ledger.drop(ids, report.skipped)
        else:
            self._ledger.trained(self.stage, report.step)
        self._count_refused(report, ids)
        failpoint("driver.after_trained")
        await self._keep_rollouts(groups, report.step)
        assert self._stream is not None
        dropped = self._newly_dropped(self._stream)
        metrics = step_metrics(groups, report, published, self.clock.lap(), dropped) | self._noted()
        metrics |= self._keeper.figures()
        report = replace(report, metrics=metrics, version=published.version)
        self._tracker.log(report.step, metrics)
        await self._checkpoint(report.step + 1, self._stream.cursor, with_groups=True)
        return report

    async def fitted(self, report: StepReport) -> StepReport:
        """A supervised step is complete. Its cursor is the step itself."""
        self._ledger.check_held()
        self._count_refused(report, ())
        timings = self.clock.lap()
        rate = {names.PERF_TOKENS_PER_S: report.tokens / max(timings[names.TIMING_STEP], 1e-9)}
        report = replace(
            report, metrics={**report.metrics, **rate, **timings, **self._noted(), **self._keeper.figures()}
        )
        self._tracker.log(report.step, report.metrics)
        await self._checkpoint(report.step + 1, report.step + 1, with_groups=False)
        return report

    def _count_refused(self, report: StepReport, ids: Sequence[str]) -> None:
        """Tells of an update that a guard refused. Several in a row are no accident: the weights, the data or the
        machine are wrong, and going on would only use up prompts."""
        self._refused = self._refused + 1 if report.skipped else 0
        if not report.skipped:
            return
        groups = ", ".join(ids)
        self._tracker.event("skipped", {"step": report.step, "reason": report.skipped, "groups": groups})
        if self._most_refused and self._refused >= self._most_refused:
            raise RefusedError(
                f"learner.step {report.step} of {self.stage}: {self._refused} updates in a row were refused, the last "
                f"one for a {report.skipped}.",
                "Lower the learning rate, or look at the groups of the `skipped` events in events.jsonl.",
            )

    def hurry(self) -> None:
        """See `CheckpointKeeper.hurry`."""
        self._keeper.hurry()

    def stop(self) -> None:
        """The step at hand is the last one: it is committed, and then `Interrupted` is raised."""
        self._stopping = True
        self.hurry()

    def note(self, figures: Mapping[str, float]) -> None:
        """Figures that go with the next step's: what an evaluation in between has found."""
        self._notes.update(figures)

    def _noted(self) -> dict[str, float]:
        notes, self._notes = self._notes, {}
        return notes

    async def _keep_rollouts(self, groups: Sequence[Ready], step: int) -> None:
        """Texts come to the driver only for the few groups of the few steps that are kept."""
        if self._tracker.wants_rollouts(step):
            rows = []
            for group in groups:
                rows += rollout_rows(group.drawn, await texts_of(group.drawn.texts), group.verdicts)
                if len(rows) >= self._tracker.rollouts_per_step:
                    break
            self._tracker.rollouts(step, rows)

    async def _checkpoint(self, step: int, cursor: int, *, with_groups: bool) -> None:
        self.step = step
        with self.clock("checkpoint"):
            if self._keeper.due(step):  # a step that is never repeated has left all its traces
                await asyncio.to_thread(self._tracker.settle)
            committed = await self._keeper.after_step(self.stage, step, cursor, with_groups=with_groups)
        if committed and self._stopping:
            raise Interrupted(f"Stopped on request after step {step} of {self.stage}, which is committed.")

    def _newly_dropped(self, stream: GroupStream) -> dict[str, int]:
        new = {k: n - self._dropped_before.get(k, 0) for k, n in stream.dropped.items()}
        self._dropped_before = dict(stream.dropped)
        return new
