"""The ledger's account: sums that show at a glance that nothing was lost or doubled."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerAudit:
    """The account of a stage, or of the whole run. Counts are groups, except `failed` and `timed_out`, which
    are samples.

    issued = trained + sum(dropped) + in_flight: groups of the surviving lineage, each counted once.
    returned: rolled back and not issued again (a resumed run may end before it needs them).
    doubled: groups trained more than once in the surviving lineage, i.e. whose trainings outnumber the
    rollbacks that undid one by more than one. lost: numbers below the highest issued one of their stage that
    have no group, or whose group was rolled back and not issued again. Both must be 0 when a run ends.
    """

    issued: int
    trained: int
    dropped: dict[str, int]
    in_flight: int
    returned: int
    failed: int
    timed_out: int
    reissued: int  # groups that were issued more than once
    doubled: int
    lost: int


_IN_STAGE = "(:stage IS NULL OR stage = :stage)"
# Numbers run from 0 without gaps; a stage's highest group that is not returned says how many there must be.
_LOST = f"""
SELECT COALESCE(SUM(top.number + 1 - (
    SELECT COUNT(*) FROM groups g WHERE g.stage = top.stage AND g.number <= top.number AND g.state <>
    'returned'
)), 0)
FROM (SELECT stage, MAX(number) AS number FROM groups WHERE state <> 'returned' AND {_IN_STAGE} GROUP BY
stage) top
"""
_DOUBLED = f"""
SELECT COUNT(*) FROM (
    SELECT h.id FROM history h JOIN groups ON groups.id = h.id WHERE {_IN_STAGE} GROUP BY h.id
    HAVING SUM(h.event = 'trained') - SUM(h.event = 'returned' AND h.before = 'trained') > 1
)
"""


def read_audit(db: sqlite3.Connection, stage: str | None) -> LedgerAudit:
    """The account of a stage (of all stages for None), from an open ledger."""
    where = {"stage": stage}
    states = dict(db.execute(f"SELECT state, COUNT(*) FROM groups WHERE {_IN_STAGE} GROUP BY state", where))
    dropped = f"state = 'dropped' AND {_IN_STAGE}"
    reasons = f"SELECT reason, COUNT(*) FROM groups WHERE {dropped} GROUP BY reason ORDER BY reason"
    sums = f"SELECT TOTAL(failed), TOTAL(timed_out), TOTAL(attempts > 1) FROM groups WHERE {_IN_STAGE}"
    failed, timed_out, reissued = db.execute(sums, where).fetchone()
    returned, trained = states.pop("returned", 0), states.get("trained", 0)
    issued = sum(states.values())
    return LedgerAudit(
        issued=issued,
        trained=trained,
        dropped=dict(db.execute(reasons, where)),
        in_flight=issued - trained - states.get("dropped", 0),
        returned=returned,
        failed=int(failed),
        timed_out=int(timed_out),
        reissued=int(reissued),
        doubled=db.execute(_DOUBLED, where).fetchone()[0],
        lost=db.execute(_LOST, where).fetchone()[0],
    )
