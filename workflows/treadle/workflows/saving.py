"""When and how a stage's checkpoint is written and committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from treadle.platform.checkpoints import CheckpointMeta, Checkpoints, Skipped
from treadle.platform.contracts import Learner
from treadle.platform.errors import ConfigError, TreadleError
from treadle.platform.failpoints import failpoint
from treadle.platform.ledger import Ledger

if TYPE_CHECKING:
    from treadle.workflows.mirroring import RunMirror


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a stage is saved, and how many committed checkpoints are kept per stage, on the disk and in
    the mirror."""

    every_steps: int = 50
    """0 saves nothing between stages; a stage's end is always kept as its artefact."""
    keep: int = 2
    mirror: str = ""
    """A URL (s3://bucket/prefix, or any fsspec one) that every commit is copied to in the background, complete enough
    to continue from on a new machine with `treadle resume URL --dir NEW`; empty: none."""
    mirror_deadline_s: float = 120.0
    """How long the end of a run waits for its last commit to arrive in the mirror, in seconds."""
    mirror_timeout_s: float = 20.0
    """After how many seconds without a byte a request to the mirror is given up and repeated."""

    def check(self) -> None:
        if self.mirror_deadline_s < 0 or self.mirror_timeout_s <= 0:
            raise ConfigError(
                f"checkpoint.mirror_deadline_s={self.mirror_deadline_s:g} must be >= 0 and "
                f"checkpoint.mirror_timeout_s={self.mirror_timeout_s:g} above 0."
            )
        if self.every_steps < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint.every_steps={self.every_steps} must be >= 0 and checkpoint.keep={self.keep} >= 1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a stage continues: the next step, the next prompt never issued, and the indices of groups that
    were issued before the checkpoint and reached no terminal state."""

    step: int = 0
    cursor: int = 0
    pending: tuple[int, ...] = ()


class CheckpointKeeper:
    """Writes and finds the checkpoints of a run's stages.

    The order is: the learner's shards, the ledger's mark, the marker of the checkpoint. Whatever dies in between,
    the newest committed checkpoint has its mark, and the ledger can be rolled back to it.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        root: str,
        ledger: Ledger,
        learner: Learner,
        *,
        mirror: RunMirror | None = None,
        passed_over: Callable[[Skipped], None] = lambda _: None,
    ) -> None:
        self._config, self._ledger, self._learner = config, ledger, learner
        self._mirror, self._passed_over = mirror, passed_over
        self._checkpoints = Checkpoints(root)
        self._hurried = False

    async def restore(self, stage: str) -> Position:
        """Loads the newest valid checkpoint of a stage into the learner and rolls the ledger back to it; without
        one, the stage begins anew. Damaged ones are passed over, told, and made again; one that another version
        wrote is a `DataError`, and stays."""
        self._checkpoints.remove_uncommitted(stage)
        newest = self._checkpoints.newest_valid(stage)
        for skipped in newest.skipped:
            self._passed_over(skipped)
        if newest.ref is None or newest.meta is None:
            self._ledger.rollback_to(stage, 0)
            return Position()
        await self._learner.load(newest.ref.url)
        self._checkpoints.remove_after(stage, newest.ref.step)
        position = self._rolled_back(stage, newest.meta)
        if self._mirror and not self._mirror.holds(stage, position.step):
            await self._mirror.offer(stage, position.step, newest.ref.url)
        return position

    def _rolled_back(self, stage: str, meta: CheckpointMeta) -> Position:
        if meta.ledger_mark < 0:
            return Position(step=meta.step, cursor=meta.cursor)
        restored = self._ledger.rollback_to(stage, meta.ledger_mark)
        return Position(step=restored.step, cursor=restored.cursor, pending=restored.pending)

    def hurry(self) -> None:
        """The next step is saved, whether it would be due or not: what was made since the last commit is in danger."""
        self._hurried = True

    def due(self, step: int) -> bool:
        """Whether `step` steps are a multiple of `every_steps`, or somebody has said `hurry`."""
        every = self._config.every_steps
        return self._hurried or (every > 0 and step % every == 0)

    def figures(self) -> dict[str, float]:
        """The mirror's metrics; none without a mirror."""
        return self._mirror.figures() if self._mirror else {}

    async def after_step(self, stage: str, step: int, cursor: int, *, with_groups: bool) -> bool:
        """Saves if a checkpoint is due. Returns whether it did."""
        if self._mirror:
            self._mirror.check()
        if not self.due(step):
            return False
        folder = self._checkpoints.begin(stage, step)
        try:
            await self._learner.save(folder, {"stage": stage, "step": step})
        except TreadleError:
            self._checkpoints.remove_uncommitted(stage)  # on a full disk, what follows needs the room
            raise
        failpoint("driver.after_shards")
        self._ledger.check_held()  # the shards may have taken long
        if with_groups:
            self._ledger.commit_mark(stage, step, cursor)
        failpoint("driver.after_mark")
        meta = CheckpointMeta(step=step, cursor=cursor, ledger_mark=step if with_groups else -1)
        self._checkpoints.commit(stage, meta)
        if self._mirror:
            await self._mirror.offer(stage, step, folder)
        held = self._mirror.held(stage) if self._mirror else frozenset()
        self._checkpoints.retain(stage, self._config.keep, held)
        self._hurried = False
        failpoint("driver.after_checkpoint")
        return True
