"""Row 18: disks that are full."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.chaos.book import Row, write_row
from tests.chaos.runs import PATIENT, WHOLE_RUN, account, clean, same_bits
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, wait_until
from tests.platform.small_disk import small_disk

from treadle.platform.checkpoints import Checkpoints

pytestmark = WHOLE_RUN


def test_row_18_the_run_folders_disk_fills_up_behind_a_commit(tmp_path: Path, undisturbed: Path) -> None:
    """Somebody else fills the disk when the first commit is there. Nothing that is there may be damaged by it."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        folder, filler = disk / "run", disk / "filler"
        program = Program(
            words=("run", str(TINY), WITH_PROMPTS, *PATIENT, "--dir", str(folder)),
            environment={"TREADLE_FAILPOINTS": "driver.after_checkpoint=sleep:4@1"},
        )
        process = program.start()
        committed = folder / "checkpoints/rl/step-00000002/COMMITTED"
        assert wait_until(lambda: committed.exists() or process.poll() is not None, 900)
        assert process.poll() is None, process.communicate()
        filled = time.time()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={filler}", "bs=1k"], capture_output=True
        )  # until it is full
        _, err = process.communicate(timeout=900)
        told_s = time.time() - filled
        [complaint] = [line for line in err.splitlines() if line.startswith("treadle: ")]
        kept = Checkpoints(folder / "checkpoints").newest_valid("rl")
        assert process.returncode == 1, err
        assert "No space left" in complaint or "full" in complaint, complaint
        assert str(folder) in complaint
        assert kept.ref is not None
        assert (kept.ref.step, kept.skipped) == (2, ())
        assert program.all_gone(), program.survivors()
        filler.unlink()
        again, ended = patiently("resume", str(folder))
        assert ended.code == 0, ended
        assert again.all_gone(), again.survivors()
        found = account(folder)
        write_row(
            Row(
                row=18,
                fault="the disk of the run folder is full",
                account=found,
                same_bits=same_bits(folder, undisturbed),
                figures={"told after s": round(told_s, 1), "sentence": complaint},
            )
        )
        assert clean(found), found
        assert same_bits(folder, undisturbed)
