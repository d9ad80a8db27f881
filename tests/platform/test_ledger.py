"""The ledger: every group once, across rollbacks, writers and faults."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.platform.small_disk import small_disk

from treadle.platform.errors import LedgerError, StorageError
from treadle.platform.failpoints import ENV
from treadle.platform.ledger import Ledger, Mark

STAGE = "grpo"


def gid(number: int, stage: str = STAGE) -> str:
    return f"{stage}/{number:08d}"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite") as opened:
        yield opened


def issue(ledger: Ledger, numbers: range, stage: str = STAGE) -> list[str]:
    ids = [gid(number, stage) for number in numbers]
    for id in ids:
        ledger.issue(id, f"prompt-{id}", 0)
    return ids


def score(ledger: Ledger, ids: list[str]) -> None:
    for id in ids:
        ledger.drawn(id, 0, 0, 100)
        ledger.scored(id, scored=8, failed=0, timed_out=0, mean_reward=0.5)


def train(ledger: Ledger, numbers: range, step: int) -> list[str]:
    ids = issue(ledger, numbers)
    score(ledger, ids)
    ledger.lease(ids, step)
    return ledger.trained(STAGE, step)


def test_a_group_walks_from_issued_to_trained(ledger: Ledger) -> None:
    assert train(ledger, range(3), 0) == [gid(0), gid(1), gid(2)]
    audit = ledger.audit()
    assert (audit.issued, audit.trained, audit.in_flight, audit.lost, audit.doubled) == (3, 3, 0, 0, 0)
    assert ledger.trained_ids(STAGE) == {0: [gid(0), gid(1), gid(2)]}


def test_drops_are_counted_by_reason_and_samples_by_verdict(ledger: Ledger) -> None:
    ids = issue(ledger, range(4))
    ledger.drop(ids[:1], "stale")
    ledger.drawn(ids[1], 0, 1, 50)
    ledger.scored(ids[1], scored=5, failed=2, timed_out=1)
    ledger.drop(ids[1:3], "zero variance")
    audit = ledger.audit(STAGE)
    assert audit.dropped == {"stale": 1, "zero variance": 2}
    assert (audit.failed, audit.timed_out, audit.in_flight, audit.issued) == (2, 1, 1, 4)


def test_the_figures_of_a_group_are_kept_with_it(ledger: Ledger, tmp_path: Path) -> None:
    (id,) = issue(ledger, range(1))
    ledger.drawn(id, 3, 4, 77)
    ledger.scored(id, scored=8, failed=0, timed_out=0, mean_reward=math.nan)
    row = (
        sqlite3.connect(ledger.path)
        .execute("SELECT oldest, newest, tokens, scored, reward FROM groups")
        .fetchone()
    )
    assert row == (3, 4, 77, 8, None)


def test_stages_have_their_own_steps_marks_and_accounts(ledger: Ledger) -> None:
    train(ledger, range(2), 0)
    ledger.commit_mark(STAGE, 1, 2)
    issue(ledger, range(3), "other")
    assert ledger.audit(STAGE).in_flight == 0
    assert ledger.audit("other").in_flight == 3
    assert ledger.rollback_to("other", 0).pending == ()
    assert ledger.audit(STAGE).trained == 2
    assert ledger.audit().returned == 3


ILLEGAL: list[tuple[Callable[[Ledger], object], str]] = [
    (lambda led: led.drawn(gid(9), 0, 0, 1), r"group grpo/00000009 cannot become drawn: it is unknown"),
    (lambda led: led.scored(gid(0), scored=1, failed=0, timed_out=0), r"cannot become scored: it is issued"),
    (
        lambda led: led.lease([gid(0)], 1),
        r"group grpo/00000000 cannot become leased: it is issued, not scored",
    ),
    (lambda led: led.issue(gid(0), "prompt-grpo/00000000", 0), r"cannot be issued .* it is issued"),
    (lambda led: led.trained(STAGE, 4), r"step 4 of grpo cannot be trained: nothing is leased"),
    (lambda led: led.drop([gid(5)], "late"), r"group grpo/00000005 cannot become dropped: it is trained"),
    (lambda led: led.drop([gid(0)], ""), r"without a reason"),
    (lambda led: led.drop([gid(0), gid(0)], "twice"), r"named twice"),
    (lambda led: led.lease([gid(1)], 0), r"step 0 of grpo is trained already, e.g. with group grpo/00000005"),
    (lambda led: led.issue("7", "p", 0), r"is not <stage>/<number with 8 digits>"),
    (lambda led: led.issue("grpo/7", "p", 0), r"is not <stage>/<number with 8 digits>"),
    (lambda led: led.rollback_to(STAGE, 3), r"no mark 3 of grpo; known: none"),
]


@pytest.mark.parametrize(("call", "said"), ILLEGAL, ids=[said for _, said in ILLEGAL])
def test_an_illegal_transition_is_refused_by_id_and_state_and_changes_nothing(
    ledger: Ledger, call: Callable[[Ledger], object], said: str
) -> None:
    issue(ledger, range(1))
    score(ledger, issue(ledger, range(1, 2)))
    train(ledger, range(5, 6), 0)
    before = ledger.audit()
    with pytest.raises(LedgerError, match=said):
        call(ledger)
    assert ledger.audit() == before


def test_one_bad_group_in_a_call_leaves_the_good_ones_as_they_were(ledger: Ledger) -> None:
    ids = issue(ledger, range(3))
    score(ledger, ids[:2])
    with pytest.raises(LedgerError, match=r"group grpo/00000002 cannot become leased: it is issued"):
        ledger.lease(ids, 0)
    ledger.lease(ids[:2], 0)


def test_a_batch_happens_as_a_whole_or_not_at_all(ledger: Ledger) -> None:
    with pytest.raises(LedgerError):
        _issue_and_draw(ledger, gid(0), gid(1))
    assert ledger.audit().issued == 0
    _issue_and_draw(ledger, gid(0), gid(0))
    assert ledger.audit().in_flight == 1


def _issue_and_draw(ledger: Ledger, issued: str, drawn: str) -> None:
    with ledger.batch():
        ledger.issue(issued, "p", 0)
        ledger.drawn(drawn, 0, 0, 1)


def test_a_rollback_returns_what_came_after_the_mark_and_nothing_else(ledger: Ledger) -> None:
    train(ledger, range(2), 0)
    early = issue(ledger, range(2, 5))  # in flight at the mark
    ledger.drop(early[:1], "before the mark")
    ledger.commit_mark(STAGE, 1, 5)
    score(ledger, early[1:])
    ledger.lease(early[1:2], 1)
    ledger.trained(STAGE, 1)
    ledger.drop(early[2:], "after the mark")
    issue(ledger, range(5, 8))
    restored = ledger.rollback_to(STAGE, 1)
    assert (restored.step, restored.cursor, restored.pending) == (1, 5, (3, 4))
    audit = ledger.audit()
    assert (audit.trained, audit.dropped, audit.returned) == (2, {"before the mark": 1}, 5)
    for number in (3, 4, 5):
        ledger.issue(gid(number), f"prompt-{gid(number)}", 1)
    audit = ledger.audit()
    assert (audit.reissued, audit.in_flight, audit.lost, audit.doubled) == (3, 3, 0, 0)


def test_a_group_that_is_not_issued_again_counts_as_lost(ledger: Ledger) -> None:
    train(ledger, range(1), 0)
    issue(ledger, range(1, 4))
    ledger.commit_mark(STAGE, 1, 4)
    ledger.rollback_to(STAGE, 1)
    ledger.issue(gid(3), f"prompt-{gid(3)}", 1)
    assert ledger.audit().lost == 2  # 1 and 2
    ledger.issue(gid(9), "p", 1)
    assert ledger.audit().lost == 7  # and 4 to 8, never issued


def test_a_returned_group_keeps_its_prompt(ledger: Ledger) -> None:
    issue(ledger, range(1))
    ledger.rollback_to(STAGE, 0)
    with pytest.raises(LedgerError, match="cannot be issued for prompt other: it is returned"):
        ledger.issue(gid(0), "other", 0)


def test_a_doubled_training_would_be_counted(ledger: Ledger) -> None:
    train(ledger, range(1), 0)
    db = sqlite3.connect(ledger.path)
    with db:
        db.execute(
            "INSERT INTO history SELECT NULL, id, event, before, step, incarnation, reason, unix_s FROM history"
        )
    db.close()
    assert ledger.audit().doubled == 1


def test_marks_only_go_forward(ledger: Ledger) -> None:
    train(ledger, range(1), 0)
    assert (
        ledger.commit_mark(STAGE, 1, 1)
        == ledger.commit_mark(STAGE, 1, 1)
        == Mark(stage=STAGE, step=1, cursor=1)
    )
    for step, cursor in ((0, 0), (1, 2)):
        with pytest.raises(LedgerError, match="comes after mark 1"):
            ledger.commit_mark(STAGE, step, cursor)
    train(ledger, range(1, 2), 1)
    ledger.commit_mark(STAGE, 2, 2)
    ledger.rollback_to(STAGE, 1)
    assert ledger.marks(STAGE) == [Mark(stage=STAGE, step=1, cursor=1)]


def test_a_mark_over_an_untrained_step_is_refused(ledger: Ledger) -> None:
    ids = issue(ledger, range(1))
    score(ledger, ids)
    ledger.lease(ids, 0)
    with pytest.raises(LedgerError, match=r"mark 1 of grpo: group grpo/00000000 .* is leased, not trained"):
        ledger.commit_mark(STAGE, 1, 1)
    ledger.commit_mark(STAGE, 0, 1)


def test_a_newer_writer_fences_off_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    old = Ledger.open(path)
    ids = issue(old, range(1))
    score(old, ids)
    old.lease(ids, 0)
    new = Ledger.open(path)
    assert new.incarnation == old.incarnation + 1
    for write in (
        lambda: old.trained(STAGE, 0),
        lambda: old.drop(ids, "x"),
        lambda: old.commit_mark(STAGE, 1, 1),
    ):
        with pytest.raises(LedgerError, match="this is writer 1, writer 2 has taken over"):
            write()
    with pytest.raises(LedgerError, match="is leased by another writer"):
        new.trained(STAGE, 0)
    assert new.rollback_to(STAGE, 0).pending == ()
    with pytest.raises(LedgerError, match="was replaced by writer 2"):
        Ledger.open(path, incarnation=1)
    assert Ledger.open(path, incarnation=2).incarnation == 2


def test_a_frozen_writer_that_wakes_up_cannot_write(tmp_path: Path) -> None:
    """SIGSTOP a real process, let its successor start, SIGCONT it."""
    path = tmp_path / "ledger.sqlite"
    code = (
        "import sys; from treadle.platform.ledger import Ledger; led = Ledger.open(sys.argv[1])\n"
        "print('open', flush=True); sys.stdin.readline()\n"
        f"led.issue('{gid(0)}', 'p', 0)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=-1, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    os.kill(process.pid, signal.SIGSTOP)
    with Ledger.open(path) as successor:
        successor.issue(gid(1), "p", 0)
        os.kill(process.pid, signal.SIGCONT)
        _, errors = process.communicate("go\n", timeout=60)
        assert process.returncode != 0
        assert "writer 2 has taken over" in errors
        assert successor.audit().issued == 1


def test_a_killed_writer_loses_nothing_it_was_told_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    code = (
        "import sys; from treadle.platform.ledger import Ledger; from treadle.platform.failpoints import failpoint\n"
        "led = Ledger.open(sys.argv[1])\n"
        "for n in range(100):\n"
        "    led.issue(f'grpo/{n:08d}', 'p', 0); failpoint('driver.after_issue')"
    )
    environ = {**os.environ, ENV: "driver.after_issue=kill@42"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environ, timeout=60)
    assert done.returncode == -9
    with Ledger.open(path) as ledger:
        assert ledger.audit().issued == 42
        assert ledger.incarnation == 2


def test_a_reader_neither_creates_nor_fences(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger.open(path, read_only=True)
    assert not path.exists()
    with Ledger.open(path) as writer:
        with Ledger.open(path, read_only=True) as reader:
            issue(writer, range(2))
            assert reader.audit().issued == 2
            with pytest.raises(LedgerError, match="opened to read"):
                reader.issue(gid(5), "p", 0)
        issue(writer, range(2, 3))


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("name: x\n" * 100)
    with pytest.raises(LedgerError, match="is no ledger, or is damaged"):
        Ledger.open(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE groups (x)")
    other.commit()
    other.close()
    with pytest.raises(LedgerError, match="ledger format 0, this version reads 1"):
        Ledger.open(tmp_path / "other.sqlite")
    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger.open(tmp_path / "nowhere" / "ledger.sqlite")


def test_a_locked_ledger_is_one_error(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="is locked by another process"):
        issue(ledger, range(1))
    other.execute("ROLLBACK")
    issue(ledger, range(1))


def test_a_full_disk_is_one_error_and_the_ledger_stays_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "512k") as folder:
        _fill(folder / "ledger.sqlite")


def _fill(path: Path) -> None:
    with Ledger.open(path) as ledger:
        with pytest.raises(StorageError, match=r"disk full: cannot write .* bytes are free"):
            _issue_without_end(ledger)
        whole = ledger.audit()
        assert whole.issued > 10
        assert whole.lost == 0
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def _issue_without_end(ledger: Ledger) -> None:
    for number in range(100_000):
        ledger.issue(gid(number), "p" * 200, 0)


def test_threads_may_share_a_ledger(ledger: Ledger) -> None:
    def work(start: int) -> None:
        score(ledger, issue(ledger, range(start, start + 50)))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 200, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (ledger.audit().in_flight, ledger.audit().lost) == (200, 0)


def test_a_snapshot_is_a_ledger_of_its_own(ledger: Ledger, tmp_path: Path) -> None:
    train(ledger, range(2), 0)
    ledger.snapshot(tmp_path / "copy.sqlite")
    with Ledger.open(tmp_path / "copy.sqlite") as copy:
        assert copy.audit() == ledger.audit()


def test_a_steps_bookkeeping_costs_milliseconds(ledger: Ledger) -> None:
    def step(number: int) -> float:
        start = time.perf_counter()
        train(ledger, range(number * 24, number * 24 + 24), number)
        return time.perf_counter() - start

    # The best of many: other work on the machine only ever adds.
    assert min(step(number) for number in range(20)) < 0.02
