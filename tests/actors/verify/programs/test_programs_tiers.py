"""How a sandbox is chosen, and that the probe it has to pass can be failed."""

from __future__ import annotations

import pytest

from treadle.actors.verify.programs import tiers
from treadle.actors.verify.programs.landlock import abi
from treadle.actors.verify.programs.local import LocalSandbox
from treadle.actors.verify.programs.records import Command, Ended, Reason, SandboxError
from treadle.actors.verify.programs.tiers import Choice, make_local, open_local, probed
from treadle.platform.errors import ConfigError

pytestmark = pytest.mark.processes

BREACHES = [
    "reaches the network",
    "sends datagrams",
    "reads the host's files",
    "writes the host's files",
]


def test_the_probe_finds_what_the_weakest_tier_lets_through() -> None:
    sandbox = make_local("rlimits")
    try:
        found = probed(sandbox, ())
    finally:
        sandbox.close()
    for breach in BREACHES[:3]:
        assert breach in found


@pytest.mark.parametrize(
    "tier", ["bubblewrap", "landlock", pytest.param("gvisor", marks=pytest.mark.hostile)]
)
def test_the_strong_tiers_pass_the_probe(tier: str) -> None:
    sandbox = opened(tier)
    try:
        assert probed(sandbox, ()) == ""
    finally:
        sandbox.close()


def opened(tier: str) -> LocalSandbox:
    try:
        return make_local(tier)
    except SandboxError as error:
        pytest.skip(f"{tier}: {error.message}")


class Says:
    """A sandbox that says what it is told to, and keeps nothing."""

    tier = "says"

    def __init__(self, stdout: bytes, exit_code: int = 0) -> None:
        self._stdout = stdout
        self._exit_code = exit_code

    def run(self, command: Command) -> Ended:
        return Ended(
            reason=Reason.EXITED,
            exit_code=self._exit_code,
            signal=None,
            stdout=self._stdout,
            stderr=b"why\n",
            wall_s=0.1,
            cpu_s=0.1,
        )

    def close(self) -> None:
        pass


def test_a_probe_that_does_not_run_is_a_failure_too() -> None:
    assert "status 3: why" in probed(Says(b"", 3), ())
    assert probed(Says(b'["reaches the network"]'), ()) == "a program reaches the network"
    assert probed(Says(b"[]"), ()) == ""


def test_auto_takes_the_strongest_and_names_it() -> None:
    sandbox = open_local(Choice())
    try:
        assert sandbox.tier.startswith("bubblewrap ")
        assert "seccomp" in sandbox.tier
    finally:
        sandbox.close()


def test_without_bubblewrap_landlock_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox = open_local(Choice())
    try:
        assert sandbox.tier == f"landlock {abi()}, seccomp, rlimits"
    finally:
        sandbox.close()


def test_without_any_it_refuses_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tiers, "abi", lambda: 0)
    with pytest.raises(ConfigError) as refused:
        open_local(Choice())
    assert "bubblewrap: bwrap is not installed" in str(refused.value)
    assert "landlock: the kernel has no Landlock" in str(refused.value)
    assert "apt-get install bubblewrap libseccomp2" in refused.value.remedy
    assert "verify.options.code.allow_rlimits_only=true" in refused.value.remedy


def test_limits_alone_must_be_asked_for_and_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="No sandbox"):
        open_local(Choice(sandbox="rlimits"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tiers, "abi", lambda: 0)
    sandbox = open_local(Choice(allow_rlimits_only=True))
    try:
        assert sandbox.tier == "rlimits only, unsafe"
        assert sandbox.run(Command(argv=("/bin/echo", "x"))).stdout == b"x\n"
    finally:
        sandbox.close()


def test_a_tier_that_is_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="bwrap is not installed"):
        open_local(Choice(sandbox="bubblewrap"))
