"""The report: complete from a whole run folder, honest about a broken one, safe against what models write."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.dashboards.synthetic_run import CHAIN_COUNT, STEPS, write_run

from treadle.dashboards.report import write_report
from treadle.platform.errors import DataError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return write_report(run_folder).read_text()


NAMES = ["summary.json", "run.json", "config_diff.json", "chains.json", "metrics.jsonl", "events.jsonl"]
NAMES += ["config.yaml", "ledger.sqlite", "rollouts/grpo-000190.parquet"]


@pytest.fixture(scope="module")
def short_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with few steps, for the tests that draw many pages."""
    folder = tmp_path_factory.mktemp("short") / "run"
    shutil.copytree(run_folder, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[230:245] + lines[-350:-330]))
    return folder


class _Elements(HTMLParser):
    """Counts elements and collects the text and the attributes that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.loads: list[str] = []
        self.text = ""
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "action", "data", "poster") or name.startswith("on"):
                self.loads.append(f"{tag}.{name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def _parse(page: str) -> _Elements:
    parser = _Elements()
    parser.feed(page)
    return parser


def test_every_section_has_data(page: str) -> None:
    seen = _parse(page)
    assert "summary.json holds no evaluation" not in seen.text
    for text in ("miniature R1", "done", "9f3c1a77d20b", "Accuracy on held-out prompts", "0.902", "0.957"):
        assert text in seen.text
    for stage in STEPS:
        assert f">{stage}</h3>" in page
    for title in ("Reward parts", "Response length", "Entropy", "Staleness", "Throughput", "Gradient norm"):
        assert f"<h4>{title}" in page
    assert "worker 3 did not answer within 2 s" in seen.text
    assert "gradient norm is not finite" in seen.text
    assert seen.text.count("expected") == CHAIN_COUNT
    assert seen.text.count("timed out") >= 2


def test_what_was_not_recorded_is_said(page: str) -> None:
    assert "No data recorded: KL to the reference." in page


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    seen = _parse(page)
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert [load for load in seen.loads if not re.match(r"a\.href=#|link\.href=data:,$", load)] == []
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


def test_a_hostile_completion_is_shown_as_text(page: str) -> None:
    assert "<script>document" not in page
    assert "document.title=&#39;owned&#39;" in page
    assert "<script>document.title='owned'</script>" in _parse(page).text
    assert "<img src=x onerror=alert(1)>" in _parse(page).text


def test_secrets_of_the_settings_are_not_on_the_page(page: str) -> None:
    assert "canary" not in page
    assert "[redacted]" in page


def test_ids_are_unique_and_charts_name_theirs(page: str) -> None:
    ids = _parse(page).ids
    assert len(ids) == len(set(ids))
    for labelled in re.findall(r'aria-labelledby="([^"]+)"', page):
        assert set(labelled.split()) <= set(ids)


def test_the_resumed_attempt_replaces_the_steps_that_were_rolled_back(page: str, run_folder: Path) -> None:
    table = re.search(r"<h4>Reward</h4>.*?<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert table is not None
    rows = re.findall(r'<td class="n">(.*?)</td><td class="n">(.*?)</td>', table[1])
    assert (rows[0][0], rows[-1][0]) == ("0", "199")
    assert len(rows) == 12


def test_a_running_run_says_so_and_a_crashed_one_is_not_called_finished(
    run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "run.json").unlink()
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[:-1]))
    assert "running, or killed" in write_report(folder).read_text()


def test_an_empty_folder_gives_an_honest_page(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert page.count("No data recorded") == 8
    assert "NaN" not in page


@pytest.mark.parametrize(
    "name",
    NAMES,
)
@pytest.mark.parametrize("garbage", [b"", b"\x00\xff\xfe garbage {", b"[]", b"[[1, 2], {}, null]", b'"text"'])
def test_a_damaged_piece_never_stops_the_page(
    short_run: Path, tmp_path: Path, name: str, garbage: bytes
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(short_run, folder)
    (folder / name).write_bytes(garbage)
    assert "miniature R1" in write_report(folder).read_text() or name in ("summary.json", "events.jsonl")


def test_strange_values_in_the_summary_do_not_stop_the_page(tmp_path: Path) -> None:
    summary = {
        "eval": {
            "sft": {"sampled": "0.5", "ci95": [0.4, 0.6], "n": None},
            "grpo": "none",
            "x": {"sampled": None},
        },
        "samples": {"issued": "many"},
        "steps": {"sft": 3, "grpo": 4},
        "wall_s": "long",
        "weights_digest": 12,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    assert '<td class="n big">0.500</td><td class="n dim">0.100</td>' in page
    assert "<dd>7</dd>" in page


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_no_unfinished_file_is_left_behind(run_folder: Path) -> None:
    write_report(run_folder)
    assert [path.name for path in run_folder.iterdir() if "report" in path.name] == ["report.html"]


def test_the_account_is_the_ledgers_and_shows_that_nothing_was_lost(page: str) -> None:
    row = re.search(r"<td>whole run</td>(.*?)</tr>", page, re.DOTALL)
    assert row is not None
    issued, trained, dropped, open_, again, lost, doubled, failed, _ = re.findall(r">(\d+)</td>", row[1])
    assert (issued, open_, again, lost, doubled, failed) == ("480", "0", "120", "0", "0", "0")
    assert int(trained) + int(dropped) == 480
    assert "no signal" in page


def test_a_ledger_of_another_making_is_named(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("ledger.sqlite*"))
    with contextlib.closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        connection.execute("CREATE TABLE something_else (x)")
    page = write_report(folder).read_text()
    assert "ledger.sqlite could not be read" in page
    assert "there is no readable ledger" in page
