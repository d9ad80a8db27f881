"""The ledger against a model in plain Python, over random lives of a run."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from treadle.platform.errors import LedgerError
from treadle.platform.ledger import Ledger

STAGE = "grpo"


def gid(number: int) -> str:
    return f"{STAGE}/{number:08d}"


class LedgerMachine(RuleBasedStateMachine):
    """Random lives of a run against a model in plain Python: issue, draw, score, lease, train, drop, mark,
    die and roll back, always with the right answer known."""

    numbers = st.integers(min_value=0, max_value=14)

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger.open(Path(self.folder.name) / "ledger.sqlite")
        self.states: dict[int, str] = {}
        self.attempts: Counter[int] = Counter()
        self.leases: dict[int, int] = {}
        self.trained_in: dict[int, int] = {}
        self.step = 0
        self.marks: dict[int, tuple[int, dict[int, str]]] = {0: (0, {})}

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def _expect(self, legal: bool, call: Callable[[], object]) -> bool:
        if legal:
            call()
            return True
        with pytest.raises(LedgerError):
            call()
        return False

    @rule(number=numbers)
    def issue(self, number: int) -> None:
        legal = self.states.get(number, "returned") == "returned"
        if self._expect(legal, lambda: self.ledger.issue(gid(number), f"p{number}", self.step)):
            self.states[number] = "issued"
            self.attempts[number] += 1

    @rule(number=numbers)
    def draw(self, number: int) -> None:
        if self._expect(self.states.get(number) == "issued", lambda: self.ledger.drawn(gid(number), 0, 0, 1)):
            self.states[number] = "drawn"

    @rule(number=numbers)
    def judge(self, number: int) -> None:
        legal = self.states.get(number) == "drawn"
        if self._expect(legal, lambda: self.ledger.scored(gid(number), scored=1, failed=1, timed_out=0)):
            self.states[number] = "scored"

    @rule(chosen=st.lists(numbers, min_size=1, max_size=4))
    def lease(self, chosen: list[int]) -> None:
        scored = all(self.states.get(number) == "scored" for number in chosen)
        legal = scored and len(set(chosen)) == len(chosen)
        if self._expect(legal, lambda: self.ledger.lease([gid(number) for number in chosen], self.step)):
            for number in chosen:
                self.states[number], self.leases[number] = "leased", self.step

    @rule()
    def lease_all_that_are_scored(self) -> None:
        ready = [number for number, state in self.states.items() if state == "scored"]
        if ready:
            self.lease(ready)

    @rule()
    def train(self) -> None:
        leased = [number for number, state in self.states.items() if state == "leased"]
        if self._expect(bool(leased), lambda: self.ledger.trained(STAGE, self.step)):
            for number in leased:
                self.states[number], self.trained_in[number] = "trained", self.step
            self.step += 1

    @rule(chosen=st.lists(numbers, min_size=1, max_size=3))
    def drop(self, chosen: list[int]) -> None:
        open_states = ("issued", "drawn", "scored", "leased")
        legal = all(self.states.get(n) in open_states for n in chosen) and len(set(chosen)) == len(chosen)
        if self._expect(legal, lambda: self.ledger.drop([gid(n) for n in chosen], "dropped")):
            for number in chosen:
                self.states[number] = "dropped"

    @precondition(lambda self: "leased" not in self.states.values() and self.step not in self.marks)
    @rule()
    def mark(self) -> None:
        cursor = max(self.attempts, default=-1) + 1
        self.ledger.commit_mark(STAGE, self.step, cursor)
        self.marks[self.step] = (cursor, dict(self.states))

    @rule(data=st.data(), restart=st.booleans())
    def roll_back(self, data: st.DataObject, restart: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.marks)))
        if restart:
            path = self.ledger.path
            self.ledger.close()
            self.ledger = Ledger.open(path)
        cursor, then = self.marks[step]
        self.states = {
            number: then[number] if then.get(number) in ("trained", "dropped") else "returned"
            for number in self.states
        }
        self.marks = {marked: value for marked, value in self.marks.items() if marked <= step}
        self.step = step
        restored = self.ledger.rollback_to(STAGE, step)
        pending = sorted(n for n, state in self.states.items() if state == "returned" and n < cursor)
        assert (restored.step, restored.cursor, list(restored.pending)) == (step, cursor, pending)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        count = Counter(self.states.values())
        kept = {number for number, state in self.states.items() if state != "returned"}
        audit = self.ledger.audit()
        assert (audit.trained, sum(audit.dropped.values()), audit.returned) == (
            count["trained"],
            count["dropped"],
            count["returned"],
        )
        assert audit.issued == len(kept)
        assert audit.in_flight == len(kept) - count["trained"] - count["dropped"]
        assert audit.reissued == sum(n > 1 for n in self.attempts.values())
        assert audit.doubled == 0
        assert audit.lost == len(set(range(max(kept, default=-1) + 1)) - kept)

    @invariant()
    def lineage_agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        lineage = {id: step for step, ids in self.ledger.trained_ids(STAGE).items() for id in ids}
        trained = [number for number, state in self.states.items() if state == "trained"]
        assert lineage == {gid(number): self.trained_in[number] for number in trained}


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_every_life_of_a_run_is_accounted_for = LedgerMachine.TestCase
