"""A run's place behind `broadcast.url`: checked before anything starts, empty when the run has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.platform.object_store import Faults, s3_server, silent_endpoint

from treadle.actors.broadcast.config import BroadcastConfig
from treadle.platform.errors import ConfigError, StorageError
from treadle.platform.storage import open_store
from treadle.workflows import weights_url as module
from treadle.workflows.folder import RunFolder
from treadle.workflows.weights_url import check_weights_url, weights_url

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    with s3_server(monkeypatch) as served:
        yield served


def config(url: str) -> BroadcastConfig:
    return BroadcastConfig(transport="url", url=url, url_timeout_s=1.0)


def run_in(folder: Path) -> RunFolder:
    """A run folder at the start of one more attempt."""
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    run.set_state(attempts=int(run.state().get("attempts", 0)) + 1)
    return run


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_a_run_removes_what_it_and_its_earlier_attempts_wrote_and_nothing_else(
    bucket: tuple[str, Faults], tmp_path: Path
) -> None:
    url = f"{bucket[0]}/shared"
    said: list[str] = []
    with weights_url(config(url), run_in(tmp_path / "other"), said.append) as other:
        open_store(other.url).write_bytes("0001-aa/000001/00000000", b"another run's")
        killed = weights_url(config(url), run_in(tmp_path / "mine"), said.append)
        first = open_store(killed.__enter__().url)  # and nobody leaves it
        first.write_bytes("0001-bb/000001/00000000", b"of an attempt that was killed")
        with weights_url(config(url), run_in(tmp_path / "mine"), said.append) as again:
            assert again.url.rpartition("/")[0] == first.url.rpartition("/")[0]
            assert again.url != first.url
            again.check()
            second = open_store(again.url)
            second.write_bytes("0001-cc/000001/00000000", b"of the next one")
            assert soon(lambda: not first.files())
            first.write_bytes("0001-bb/000002/00000000", b"of the first one, which wakes")
            killed.__exit__(None, None, None)
            assert second.files(), "what was replaced removes nothing of its successor's"
        assert list(open_store(url).files()) == [f"{other.url[len(url) + 1 :]}/0001-aa/000001/00000000"]
    assert open_store(url).files() == {}
    assert said == []


def test_what_cannot_be_removed_is_told_and_holds_up_no_end(
    bucket: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.5)
    url, faults = bucket
    said: list[str] = []
    with weights_url(config(f"{url}/x"), run_in(tmp_path / "run"), said.append) as mine:
        open_store(mine.url).write_bytes("0001-aa/000001/00000000", b"1")
        faults.whole_bucket, faults.always, began = True, "stall", time.monotonic()
    assert time.monotonic() - began < 3
    faults.always = ""
    (line,) = said
    assert mine.url in line
    assert "was not removed: it took longer than 0.5 s" in line


def test_a_url_that_cannot_be_used_is_told_before_anything_starts(
    bucket: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, faults = bucket
    check_weights_url(config(f"{url}/checked"))
    check_weights_url(config(str(tmp_path / "x")))
    check_weights_url(BroadcastConfig())
    assert open_store(f"{url}/checked").files() == {}
    assert os.listdir(tmp_path / "x") == []
    faults.always = "403"
    with pytest.raises(StorageError, match=f"cannot create {url}/x/probe-.*access denied"):
        check_weights_url(config(f"{url}/x"))
    faults.always = ""
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x/probe-.*does not exist"):
        check_weights_url(config("s3://no-such-bucket/x"))
    with pytest.raises(StorageError, match=r"cannot create http://127\.0\.0\.1:9/x/probe-"):
        check_weights_url(config("http://127.0.0.1:9/x"))
    for read_only in ("data://x", "github://x"):
        with pytest.raises(ConfigError, match=rf"broadcast\.url={read_only} cannot be written to"):
            check_weights_url(config(read_only))
    with silent_endpoint() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=f"{url}/y: the S3 endpoint {endpoint} does not answer"):
            check_weights_url(config(f"{url}/y"))
