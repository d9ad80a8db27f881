"""The exception tree. Every message names what to change.

TreadleError
├── ConfigError          a setting, or a pair of settings, that cannot work
├── DataError            a file, line or prompt that cannot be used
├── StorageError         a URL that does not answer, refuses, or is full
│   └── CheckpointError  a checkpoint that is missing, uncommitted or damaged
├── LedgerError          a transition the ledger refuses (a group trained twice)
│   └── FencedError      another process has taken the run over: this one may write nothing more
├── PlacementError       roles that can never be placed on this cluster
├── ClusterError         a Ray cluster that cannot be reached, or refuses the token
├── RoleError            a role that failed; carries role, phase and the ids it worked on
│   ├── DeadlineError    a wait that passed its deadline
│   ├── RolloutError     an engine that cannot draw
│   │   └── PoisonedError  a prompt that ends every worker that draws it
│   ├── VerifierError    a pool that cannot judge (a single bad sample is a verdict, not an error)
│   ├── LearnerError     a step that cannot be made
│   │   └── RefusedError  updates that a guard refused, several in a row
│   └── BroadcastError   weights that could not be published
│       └── MismatchError  engine and learner disagree (digest, or log-probabilities on the probe)
├── FailpointError       raised on purpose by a failpoint
└── Interrupted          the operator asked to stop
"""

from __future__ import annotations


class TreadleError(Exception):
    """Base of every error Treadle raises on purpose.

    `remedy` is one imperative sentence. Both arguments are positional so that the error survives the
    pickling between Ray processes (an exception is rebuilt from `args`).
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(TreadleError):
    """A setting that cannot work. Raised before any actor starts."""

    exit_code = 2


class DataError(TreadleError):
    """Input data that cannot be used; names the file and line, or the prompt id."""

    exit_code = 2


class StorageError(TreadleError):
    """A storage URL that does not answer, refuses access, or is full."""


class CheckpointError(StorageError):
    """A checkpoint that is missing, not committed, or fails its checksums."""


class LedgerError(TreadleError):
    """A state transition the ledger refuses."""


class FencedError(LedgerError):
    """Another process has taken the run over."""


class PlacementError(TreadleError):
    """Roles that can never be placed; carries the diagnosis."""


class ClusterError(TreadleError):
    """A Ray cluster that cannot be reached or refuses the token."""


class RoleError(TreadleError):
    """A role failed. The message starts with the role and the phase."""


class DeadlineError(RoleError):
    """A wait passed its deadline."""


class RolloutError(RoleError):
    """An engine cannot draw."""


class PoisonedError(RolloutError):
    """A prompt ended several workers, the last one while nothing else was drawn there."""


class VerifierError(RoleError):
    """The pool cannot judge."""


class LearnerError(RoleError):
    """A learner step cannot be made."""


class RefusedError(LearnerError):
    """A guard refused several updates in a row."""


class BroadcastError(RoleError):
    """Weights could not be published."""


class MismatchError(BroadcastError):
    """Engine and learner disagree on a digest or on log-probabilities."""


class FailpointError(TreadleError):
    """Raised on purpose by `failpoint`."""


class Interrupted(TreadleError):  # noqa: N818  a stop is not an error
    """The operator asked to stop; what was committed stays resumable."""

    exit_code = 130
