"""Settings of publications."""

from __future__ import annotations

import os
from dataclasses import dataclass

import fsspec

from treadle.actors.broadcast.transports import AUTO, URL, check_name
from treadle.platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastConfig:
    """How weights travel, how long anyone may take, and when engine and learner are compared."""

    transport: str = "object_store"
    """One of the transports' names: object_store, gloo, chain, url; or auto: url where `url` is set and the nodes are
    in several regions (Ray's label ray.io/availability-region), chain for more than 64 MiB to engines on more than
    two nodes, otherwise object_store."""
    url: str = ""
    """For transport=url (or auto): an fsspec URL, such as s3://bucket/prefix, that the learner writes versions to and
    engines fetch them from. Many runs may share it."""
    url_timeout_s: float = 20.0
    """After how many seconds without a byte a request to `url` is given up and repeated."""
    bucket_bytes: int = 64 * 2**20
    """Largest bucket; a tensor larger than this gets its own."""
    delta: str = "off"
    """off: every version travels whole. auto: only what changed travels where engines hold an earlier version; costs
    the learner's first rank and every engine a second copy of the weights in host memory."""
    anchor_every: int = 50
    """With deltas, every how many publications the whole version travels all the same; 0 never but the first."""
    dense_above: float = 0.5
    """With deltas, the share of changed elements above which the whole version travels."""
    gather_deadline_s: float = 300.0
    """For the learner's ranks to gather, pack and offer a version."""
    stage_deadline_s: float = 120.0
    """For an engine to fetch and check a version, one repetition included; then it is left behind."""
    flip_deadline_s: float = 60.0
    """For an engine to reach the end of a decode step and adopt the version."""
    heartbeat_s: float = 5.0
    """How often the coordinator is asked whether it lives while a publication is waited for."""
    silence_deadline_s: float = 60.0
    """A coordinator that does not answer that for so long hangs or is frozen, and another one takes its place."""
    max_restarts: int = 3
    """Coordinators that may be replaced in a stage."""
    probe_every: int = 1
    """Every how many publications engine and learner log-probabilities are compared; 0 never."""
    probe_limit: float = 1e-3
    """Largest difference of a token's log-probability, in nats. fp32: 1e-3; bf16: about 0.1."""
    probe_sequences: int = 4
    """Sequences in the probe."""
    probe_tokens: int = 24
    """Tokens per sequence of the probe."""

    def check(self) -> None:
        """Raises `ConfigError` naming the setting."""
        if self.transport != AUTO:
            check_name(self.transport)
        self._check_url()
        for name in (
            "bucket_bytes",
            "url_timeout_s",
            "gather_deadline_s",
            "stage_deadline_s",
            "flip_deadline_s",
            "heartbeat_s",
            "silence_deadline_s",
            "probe_limit",
        ):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"broadcast.{name}={value} must be positive.", "Choose a larger value.")
        if self.delta not in ("off", "auto"):
            raise ConfigError(f"broadcast.delta={self.delta!r} is unknown.", "Use off or auto.")
        if self.anchor_every < 0:
            raise ConfigError(f"broadcast.anchor_every={self.anchor_every} is negative.", "Use 0 for never.")
        if not 0 <= self.dense_above <= 1:
            raise ConfigError(
                f"broadcast.dense_above={self.dense_above} is no share.", "Use a number from 0 to 1."
            )
        if self.max_restarts < 0:
            raise ConfigError(f"broadcast.max_restarts={self.max_restarts} is negative.", "Use 0 for none.")
        if self.probe_every < 0:
            raise ConfigError(f"broadcast.probe_every={self.probe_every} is negative.", "Use 0 for never.")
        if self.probe_every and (self.probe_sequences < 1 or self.probe_tokens < 2):
            raise ConfigError(
                f"broadcast.probe_sequences={self.probe_sequences} with probe_tokens={self.probe_tokens} "
                "give no log-probability to compare.",
                "Use at least 1 sequence of 2 tokens, or broadcast.probe_every=0.",
            )

    def _check_url(self) -> None:
        if self.transport == URL and not self.url:
            raise ConfigError(
                "broadcast.transport=url needs broadcast.url.",
                "Name a URL that learner and engines can open, such as broadcast.url=s3://bucket/prefix.",
            )
        if self.url and self.transport not in (URL, AUTO):
            raise ConfigError(
                f"broadcast.url={self.url} is not used with broadcast.transport={self.transport}.",
                "Set broadcast.transport=url, or leave broadcast.url out.",
            )
        if self.url:
            _check_shared(self.url)

    @property
    def publish_deadline_s(self) -> float:
        """The longest a publication may take: every phase uses up its deadline, the fetch one repetition."""
        return self.gather_deadline_s + 2 * (self.stage_deadline_s + self.flip_deadline_s) + 10.0


def _check_shared(url: str) -> None:
    """Whether other processes can open it; asks nobody. Raises `ConfigError`."""
    scheme, found, path = url.partition("://")
    if not found:
        scheme, path = "file", url
    if scheme == "memory":
        raise ConfigError(f"broadcast.url={url} is the memory of one process.", "Use s3:// or file://.")
    if scheme in ("file", "local") and not os.path.isabs(path):
        raise ConfigError(
            f"broadcast.url={url} is a relative path, which every process takes from a folder of its own.",
            "Give the whole path.",
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"broadcast.url={url}: no storage for {scheme}:// ({error}).", "Use s3:// or file://."
        ) from error
