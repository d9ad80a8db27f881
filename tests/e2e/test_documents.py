"""What the documents show is executed: the README's program, and CONTRIBUTING's examples against the suites that
say what such a part must do."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tests.actors.rollout.tiny_models import write_model
from tests.contracts import test_engine_contract as engines
from tests.contracts import test_verifier_contract as verifiers
from tests.e2e.programs import MARK, REPOSITORY, plain_environment, survivors_of, wait_until
from transformers import AutoModelForCausalLM

from treadle.actors.broadcast.buckets import pack
from treadle.actors.broadcast.transports import TRANSPORTS, fetch
from treadle.actors.rollout.engines import ENGINES, build_engine
from treadle.actors.verify.registry import VERIFIERS, make_verifier
from treadle.platform.contracts import Transport, Verifier
from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.objectives.base import Objective, ScoredGroup, TokenInputs
from treadle.platform.records import WeightVersion

pytestmark = pytest.mark.processes

V0 = WeightVersion(step=0)


def block(document: str, info: str) -> str:
    """The fenced block of a document with this info string."""
    found = re.findall(rf"^```{info}\n(.*?)^```$", (REPOSITORY / document).read_text(), re.M | re.S)
    assert len(found) == 1, f"{document} has {len(found)} blocks ```{info}"
    return str(found[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the examples become modules that any process can import."""
    path = tmp_path_factory.mktemp("examples")
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


def example(folder: Path, kind: str) -> ModuleType:
    name = f"contributed_{kind}"
    (folder / f"{name}.py").write_text(block("CONTRIBUTING.md", f"python {kind}"))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def promises(suite: ModuleType, *arguments: str) -> list[Callable[..., None]]:
    """The tests of a contract suite that ask for nothing but these fixtures."""
    return [
        test
        for name, test in vars(suite).items()
        if name.startswith("test_") and set(inspect.signature(test).parameters) <= set(arguments)
    ]


def called(test: Callable[..., None], **fixtures: object) -> None:
    test(**{name: fixtures[name] for name in inspect.signature(test).parameters})


@pytest.fixture
def verifier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Verifier:
    """CONTRIBUTING's verifier, registered by its one line."""
    example(folder, "verifier")
    monkeypatch.setitem(VERIFIERS, "parity", "contributed_verifier:Parity")  # type: ignore[arg-type]
    case = verifiers.Case({"even": True}, "132", "133", {"even": "yes"})
    monkeypatch.setitem(verifiers.CASES, "parity", case)
    return make_verifier("parity", {}, {})


@pytest.mark.parametrize("test", promises(verifiers, "name", "verifier"), ids=lambda test: test.__name__)
def test_the_verifier_example_keeps_every_promise(test: Callable[..., None], verifier: Verifier) -> None:
    called(test, name="parity", verifier=verifier)


@pytest.mark.parametrize(
    "text", ["", " ", "<answer>", "\x00", "\ud800", "1e4", "-2", "\N{ARABIC-INDIC DIGIT TWO}"]
)
def test_the_verifier_example_raises_for_nothing_a_policy_writes(text: str, verifier: Verifier) -> None:
    assert verifier.score(text, {"even": False}) == (("accuracy", 0.0),)


def test_the_algorithm_example_is_the_formula_it_states(folder: Path) -> None:
    objective = example(folder, "algorithm").Unclipped()
    assert isinstance(objective, Objective)
    rewards = [np.array([1.0, 0.0, np.nan, 0.5]), np.array([0.0, 2.0])]
    lengths = [np.array([3, 2, 4, 1]), np.array([2, 5])]
    groups = [
        ScoredGroup(rewards=r, lengths=n, truncated=np.zeros(len(r), np.bool_))
        for r, n in zip(rewards, lengths, strict=True)
    ]
    credits = objective.credit(groups)
    generator = torch.Generator().manual_seed(4)
    expected, total, tokens = 0.0, torch.zeros((), dtype=torch.float64), 0
    for r, n, credit in zip(rewards, lengths, credits, strict=True):
        for i, reward in enumerate(r):
            logprobs = -torch.rand(int(n[i]), generator=generator, dtype=torch.float64)
            old = logprobs + 0.3 * torch.randn(int(n[i]), generator=generator, dtype=torch.float64)
            inputs = TokenInputs(
                logprobs=logprobs,
                old_logprobs=old,
                behaviour_logprobs=None,
                ref_logprobs=None,
                advantages=torch.full_like(logprobs, credit.advantages[i]),
                sequence=torch.zeros(int(n[i]), dtype=torch.int64),
                n_sequences=1,
            )
            total += (credit.weights[i] * objective.token_losses(inputs).losses).sum()
            if not np.isnan(reward):
                ratios = torch.exp(logprobs - old)
                expected -= float((ratios * (reward - np.nanmean(r))).sum())
                tokens += int(n[i])
    assert float(total) == pytest.approx(expected / tokens, abs=1e-12)


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[engines.Subject]:
    """CONTRIBUTING's engine, registered by its one line, with a model."""
    example(folder, "engine")
    model = write_model(tmp_path_factory.mktemp("model"), tied=False)
    other = write_model(tmp_path_factory.mktemp("other"), tied=False, seed=1)
    config = replace(engines.CONFIG, engine="plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "plain", "contributed_engine:build")
        yield engines.Subject(
            make=lambda: build_engine(config, model, V0),
            other=lambda: AutoModelForCausalLM.from_pretrained(other).state_dict(),
        )


@pytest.mark.parametrize("test", promises(engines, "subject"), ids=lambda test: test.__name__)
def test_the_engine_example_keeps_every_promise(test: Callable[..., None], engine: engines.Subject) -> None:
    called(test, subject=engine)


def test_the_engine_example_draws_the_very_samples_of_the_torch_engine(
    engine: engines.Subject, tmp_path: Path
) -> None:
    model = write_model(tmp_path, tied=False)
    mine = engines.drawn_by(engine.make(), engines.issues())
    theirs = engines.drawn_by(build_engine(engines.CONFIG, model, V0), engines.issues())
    assert mine.keys() == theirs.keys()
    for key, finished in mine.items():
        assert finished.sample.token_ids.tolist() == theirs[key].sample.token_ids.tolist()
        assert finished.sample.stop == theirs[key].sample.stop
        assert finished.text == theirs[key].text


@pytest.fixture
def transport(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Transport:
    """CONTRIBUTING's transport, registered by its one line."""
    made: Transport = example(folder, "transport").FolderTransport()
    monkeypatch.setitem(TRANSPORTS, "folder", "contributed_transport:FolderTransport")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return made


RECEIVER = """
import pickle, sys, zlib
from treadle.actors.broadcast.transports import TRANSPORTS, fetch
TRANSPORTS["folder"] = "contributed_transport:FolderTransport"
manifest, ticket = pickle.load(sys.stdin.buffer)
print([zlib.crc32(bucket.tobytes()) for bucket in fetch(manifest, ticket, 20.0)])
"""


def test_the_transport_example_carries_weights_to_another_process(transport: Transport, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = ((f"t{i}", torch.randn(5000, generator=generator)) for i in range(20))
    manifest, buckets = pack(tensors, 1, bucket_bytes=150_000)
    assert len(buckets) > 2
    ticket = transport.send(manifest, buckets)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RECEIVER],
        input=pickle.dumps((manifest, ticket)),
        capture_output=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == list(manifest.bucket_crc32)


def test_the_transport_example_refuses_damage_lateness_and_foreign_tickets(transport: Transport) -> None:
    manifest, buckets = pack([("w", torch.arange(100.0))], 1, bucket_bytes=1000)
    damaged = [bucket.copy() for bucket in buckets]
    damaged[0][7] ^= 1
    with pytest.raises(BroadcastError, match="CRC-32"):
        fetch(manifest, transport.send(manifest, damaged), 5.0)
    ticket = transport.send(manifest, buckets)
    first = Path(str(ticket.folder)) / "0"  # type: ignore[attr-defined]
    first.rename(first.with_suffix(".part"))
    with pytest.raises(DeadlineError):
        fetch(manifest, ticket, 0.2)
    with pytest.raises(BroadcastError, match="no folder ticket"):
        transport.receive("nonsense", 1.0)


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_program_trains_two_steps(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(block("README.md", "python run"))
    mark = secrets.token_hex(8)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**plain_environment(), MARK: mark},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    printed = [line.split() for line in done.stdout.splitlines() if re.match(r"\d+ ", line)]
    assert [int(step) for step, *_ in printed] == [0, 1]
    assert all(0 <= float(reward) <= 2 and float(length) >= 1 for _, reward, length in printed)
    run = tmp_path / "runs" / "mine"
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    assert wait_until(lambda: not survivors_of(mark), 15), survivors_of(mark)


def test_the_readme_names_only_recipes_and_commands_that_exist() -> None:
    from treadle.workflows.recipe import recipe_names

    text = (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r'load_recipe\("(\w+)"', text)) <= set(recipe_names())
    shown = set(re.findall(r"^treadle (\w+)", text, re.M))
    helped = subprocess.run(
        [sys.executable, "-m", "treadle.workflows.cli", "--help"], capture_output=True, text=True, timeout=120
    ).stdout
    assert shown
    assert all(command in helped for command in shown)
