"""A disk that fills up while a checkpoint is written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, patiently, samples_of, summary_of
from tests.platform.small_disk import small_disk

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.timeout(7200)]


def test_a_full_disk_stops_the_run_in_one_sentence_and_with_room_it_resumes(
    tmp_path: Path, undisturbed: Path
) -> None:
    with small_disk(tmp_path / "disk", "320k") as disk:
        folder = disk / "run"
        program, ended = patiently("run", str(TINY), WITH_PROMPTS, "--dir", str(folder))
        assert ended.code == 1, ended
        assert "No space left" in ended.complaint or "full" in ended.complaint
        assert program.all_gone(), program.survivors()
        assert not list(folder.glob("checkpoints/*/*/COMMITTED"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        program, ended = patiently("resume", str(folder))
        assert ended.code == 0, ended
        assert summary_of(folder)["weights_digest"] == summary_of(undisturbed)["weights_digest"]
        assert samples_of(folder) == samples_of(undisturbed)
        assert program.all_gone(), program.survivors()
