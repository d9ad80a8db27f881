"""A run whose machine is gone is continued from its bucket by a machine that has never seen it, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.runs import events_of
from tests.e2e.buckets import MIRRORED, Bucket, kinds, lose_a_run, made, served_bucket
from tests.e2e.programs import TINY, WITH_PROMPTS, Program, patiently, samples_of, summary_of, wait_until

from treadle.platform.mirror import Mirror

pytestmark = [
    pytest.mark.ray,
    pytest.mark.deepspeed,
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Of a run that is gone, for all tests of this file."""
    with served_bucket() as found:
        lose_a_run(tmp_path_factory.mktemp("lost") / "run", found)
        yield found


def commits(url: str) -> list[int]:
    return [commit.step for commit in Mirror(url, timeout_s=10).commits()]


def test_a_run_continues_from_its_bucket_alone_through_an_outage_of_the_bucket(
    bucket: Bucket, undisturbed: Path, tmp_path: Path
) -> None:
    url, folder = bucket.copy("outage"), tmp_path / "elsewhere" / "run"
    program = Program(words=("resume", url, "--dir", str(folder)))
    process = program.start()
    try:
        assert wait_until(lambda: folder.exists() or process.poll() is not None, 300)
        bucket.faults.always = "503"
        assert wait_until(lambda: made(folder, 6) or process.poll() is not None, 900)
        assert wait_until(lambda: "mirror_failing" in kinds(folder) or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        bucket.faults.always = ""
        out, err = process.communicate(timeout=300)
    except BaseException:
        process.kill()
        raise
    finally:
        bucket.faults.always = ""
    assert process.returncode == 0, (out, err)
    assert program.all_gone(), program.survivors()
    (fetched,) = events_of(folder, "mirror_fetched")
    assert "(rl, step 4)" in fetched["message"]
    same_as(undisturbed, folder)
    assert kinds(folder).count("mirror_failing") == kinds(folder).count("mirror_recovered") == 1
    told = summary_of(folder)["mirror"]
    assert (told["complete"], told["stage"], told["step"], told["error"]) == (True, "rl", 6, "")
    assert commits(url)[-1] == 6
    assert f"mirror {url}: rl, step 6" in Program(words=("status", str(folder))).run().out


def same_as(undisturbed: Path, folder: Path) -> None:
    mine, theirs = summary_of(folder), summary_of(undisturbed)
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["eval"] == theirs["eval"]
    assert samples_of(folder) == samples_of(undisturbed)
    assert (mine["samples"]["lost"], mine["samples"]["doubled"]) == (0, 0)
    assert mine["samples"]["trained"] == theirs["samples"]["trained"]


def test_a_damaged_commit_is_passed_over_aloud_and_its_steps_are_made_again(
    bucket: Bucket, undisturbed: Path, tmp_path: Path
) -> None:
    url, folder = bucket.copy("damaged"), tmp_path / "run"
    mirror = Mirror(url, timeout_s=10)
    newest = mirror.commits()[-1]
    path = next(
        file.path for name, file in mirror.manifest(newest).items() if name.endswith("00000.safetensors")
    )
    data = mirror.store.read_bytes(path)
    mirror.store.write_bytes(path, data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    _, ended = patiently("resume", url, "--dir", str(folder))
    assert ended.code == 0, ended
    (passed_over,) = events_of(folder, "mirror_passed_over")
    assert f"{newest} of {url} is passed over: {url}/{path} is damaged" in passed_over["message"]
    assert passed_over["message"] in ended.out
    assert "(rl, step 2)" in events_of(folder, "mirror_fetched")[0]["message"]
    same_as(undisturbed, folder)


def test_a_mirror_of_another_run_is_refused_before_a_folder_exists(bucket: Bucket, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = Program(
        words=("run", str(TINY), WITH_PROMPTS, f"{MIRRORED}{bucket.url}", "--dir", str(folder))
    ).run()
    assert ended.code == 2
    assert f"checkpoint.mirror={bucket.url} holds the mirror of another run" in ended.complaint
    assert f"treadle resume {bucket.url} --dir NEW" in ended.complaint
    assert not folder.exists()
