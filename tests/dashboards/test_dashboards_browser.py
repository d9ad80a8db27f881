"""The report in a real browser: what it draws, and that it asks for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.dashboards.synthetic_run import write_run

from treadle.dashboards.report import write_report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--log-level=0",
)


def _browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def _open(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The DOM after loading, and the browser's log with the console's messages in it."""
    done = subprocess.run(
        [_browser(), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("browser") / "run"))


def test_the_browser_sees_curves_ten_chains_and_no_error(report: Path, tmp_path: Path) -> None:
    dom, log = _open(report, tmp_path / "profile", "--dump-dom")
    curves = re.findall(r'<path class="curve[^"]*" d="M[^"]+L[^"]+"', dom)
    assert len(curves) >= 4 * 3 + 14
    assert dom.count('<article class="chain card">') == 10
    assert dom.count('class="bar"') >= 4
    assert "<title>miniature R1 · Treadle run report</title>" in dom
    assert dom.count("<script") == 0
    assert [line for line in log.splitlines() if ":CONSOLE" in line] == []


def test_the_error_log_would_show_a_page_that_asks_for_something(report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(report.read_text().replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'))
    _, log = _open(broken, tmp_path / "profile", "--dump-dom")
    assert [line for line in log.splitlines() if ":CONSOLE" in line] != []


@pytest.mark.parametrize("size", ["1280,900", "400,900"])
def test_the_page_is_drawn_on_a_desktop_and_on_a_phone(report: Path, tmp_path: Path, size: str) -> None:
    picture = tmp_path / "page.png"
    _open(report, tmp_path / "profile", f"--window-size={size}", f"--screenshot={picture}")
    assert picture.stat().st_size > 20_000
