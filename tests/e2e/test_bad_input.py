"""Bad input on the command line: one clear sentence, an exit code that is not 0, nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from treadle.workflows.cli import main

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "tests" / "workflows" / "recipes" / "tiny.yaml"
PROMPTS = REPOSITORY / "tests" / "workflows" / "recipes" / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Calls the command line in this process, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["treadle", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


def rows(folder: Path, *lines: str) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return f"stages.rl.prompts.url={file}"


def row(**fields: object) -> str:
    return json.dumps({"prompt": "1+2=", "answer": "3", **fields})


def many(count: int = 30) -> list[str]:
    return [row(id=f"p{i}", prompt=f"{i}+1=") for i in range(count)]


def refused(cli: Cli, *words: str | Path, naming: tuple[str, ...]) -> Answer:
    """Runs the recipe for real (no --dry-run) and checks how it is refused."""
    settings = (
        words
        if any("prompts.url=" in str(w) for w in words)
        else (f"stages.rl.prompts.url={PROMPTS}", *words)
    )
    answer = cli("run", TINY, *settings, "--dir", "refused")
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.startswith("treadle: ")
    assert answer.err.count("\n") == 1, answer.err
    for word in naming:
        assert word in answer.err, answer.err
    assert not Path("refused").exists()
    return answer


SETTINGS = {
    "an unknown key": (["stages.rl.group_siz=4"], ("group_siz", "group_size")),
    "an unknown section": (["rollouts.workers=3"], ("rollouts", "rollout")),
    "a word for a number": (["stages.rl.steps=many"], ("stages.rl.steps", "many")),
    "a number for a list": (["stages.rl.optim.betas=3"], ("stages.rl.optim.betas",)),
    "an override without a value": (["stages.rl.steps"], ("stages.rl.steps", "key=value")),
    "an unknown objective": (["stages.rl.objective.kind=grop"], ("grop", "grpo")),
    "an unknown stage to start from": (
        ["~stages.rl.model", "stages.rl.model.stage=nope"],
        ("stages.rl.model.stage=nope", "earlier stage"),
    ),
    "a group of one with a group baseline": (
        ["stages.rl.group_size=1"],
        ("stages.rl.group_size=1", "2 or more"),
    ),
    "truncated sampling off-policy": (
        ["stages.rl.top_p=0.9", "stages.rl.staleness=1"],
        ("stages.rl.top_p=0.9", "stages.rl.staleness=1"),
    ),
    "tied embeddings with vLLM on the CPU": (
        ["stages.rl.model.tie_embeddings=true", "rollout.engine=vllm"],
        ("stages.rl.model.tie_embeddings", "rollout.engine"),
    ),
    "a completion longer than the context": (
        ["stages.rl.max_new_tokens=32"],
        ("stages.rl.max_new_tokens=32", "rollout.max_context_tokens=32"),
    ),
    "a reward that is always zero": (
        ["verify.parts.accuracy=0", "verify.parts.digits=0"],
        ("verify.parts", "verify.parts.accuracy=1"),
    ),
    "a weight that is no number": (["verify.parts.accuracy=.inf"], ("verify.parts.accuracy",)),
    "cuda without a GPU to ask for": (["rollout.device=cuda"], ("rollout.gpus",)),
    "a transport without its URL": (
        ["broadcast.transport=url"],
        ("broadcast.transport=url", "broadcast.url=s3"),
    ),
    "a URL for weights that travel otherwise": (
        ["broadcast.url=s3://b/x"],
        ("broadcast.url=s3://b/x", "broadcast.transport=url"),
    ),
    "a URL in the memory of one process": (
        ["broadcast.transport=url", "broadcast.url=memory://x"],
        ("broadcast.url=memory://x", "s3://"),
    ),
    "an unknown engine": (["rollout.engine=vlm"], ("rollout.engine=vlm", "vllm")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_work_is_refused_by_name(cli: Cli, case: str) -> None:
    words, naming = SETTINGS[case]
    words = [word for word in words if not word.startswith("~")]
    if case == "an unknown stage to start from":
        words += ["stages.rl.model.architecture=''"]
    refused(cli, *words, naming=naming)


def test_a_missing_file_is_named(cli: Cli) -> None:
    refused(cli, "stages.rl.prompts.url=nowhere.jsonl", naming=("nowhere.jsonl", "does not exist"))


def test_an_empty_file_is_named(cli: Cli, tmp_path: Path) -> None:
    refused(cli, rows(tmp_path), naming=("prompts.jsonl is empty",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nonsense", "not valid JSON"),
        ('["a list"]', "no JSON object"),
        ('{"prompt": "1+1="}', "says what is right"),
        ('{"answer": "2"}', '"prompt" is missing'),
        (row(id="p3"), "already used"),
    ],
)
def test_a_broken_line_is_named_with_its_number(cli: Cli, tmp_path: Path, line: str, said: str) -> None:
    lines = many()
    lines.insert(17, line)
    refused(cli, rows(tmp_path, *lines), naming=("prompts.jsonl:18", said, "skip_bad"))


def test_broken_lines_are_counted_where_that_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    lines = [*many(), "{nonsense", "{more"]
    answer = cli(
        "run", TINY, rows(tmp_path, *lines), "stages.rl.prompts.skip_bad=true", "--dry-run", "--json"
    )
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["skipped_rows"] == {"rl": 2}


def test_a_prompt_longer_than_the_context_is_named(cli: Cli, tmp_path: Path) -> None:
    lines = [*many(), row(id="the-long-one", prompt="1+" * 20 + "1=")]
    refused(
        cli, rows(tmp_path, *lines), "stages.rl.prompts.heldout_fraction=0.2", naming=("the-long-one", "26")
    )


def test_a_character_without_a_token_is_named_with_its_prompt(cli: Cli, tmp_path: Path) -> None:
    lines = [*many(), row(id="foreign", prompt="1 plus 2=")]
    refused(cli, rows(tmp_path, *lines), naming=("foreign", "'l'", "alphabet"))


def test_a_split_without_a_single_prompt_is_refused(cli: Cli, tmp_path: Path) -> None:
    refused(
        cli,
        rows(tmp_path, *many()),
        "stages.rl.prompts.heldout_fraction=0",
        naming=("no verifiable prompt", "heldout", "heldout_fraction=0"),
    )


def test_an_unknown_verifier_is_refused_with_those_there_are(cli: Cli, tmp_path: Path) -> None:
    lines = [*many(), row(id="odd", prompt="5+5=", verifier="oracle_of_delphi")]
    refused(cli, rows(tmp_path, *lines), naming=("oracle_of_delphi", "stages.rl.prompts", "numeric"))


def test_a_tokenizer_without_an_end_is_refused(cli: Cli, tmp_path: Path) -> None:
    from treadle.workflows.data.tokenization import character_tokenizer

    folder = tmp_path / "endless"
    character_tokenizer("0123456789+=").save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["eos_token"]
    config.write_text(json.dumps(settings))
    recipe = tmp_path / "folder.yaml"
    text = TINY.read_text()
    start, end = text.index("tokenizer:"), text.index("rollout:")
    recipe.write_text(f"{text[:start]}tokenizer: {{kind: folder, path: {folder}}}\n{text[end:]}")
    answer = cli("run", recipe, f"stages.rl.prompts.url={PROMPTS}", "--dir", "refused")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "no EOS token" in answer.err
    assert "tokenizer_config.json" in answer.err
    assert not Path("refused").exists()


@pytest.mark.slow
def test_an_s3_endpoint_that_does_not_answer_is_named_in_time(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        began = time.monotonic()
        answer = cli("run", TINY, "stages.rl.prompts.url=s3://data/p.jsonl", "--dir", "refused")
        assert time.monotonic() - began < 60
    assert answer.code != 0
    assert answer.err.count("\n") == 1, answer.err
    assert "127.0.0.1" in answer.err
    assert not Path("refused").exists()


def test_an_unknown_recipe_is_refused_with_those_there_are(cli: Cli) -> None:
    answer = cli("run", "dmeo")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "dmeo" in answer.err
    assert "demo" in answer.err
    assert not Path("runs").exists()


def test_a_broken_recipe_is_refused_with_its_line(cli: Cli) -> None:
    Path("broken.yaml").write_text("name: x\nstages:\n  rl: {kind: grpo\n")
    answer = cli("run", "broken.yaml")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "broken.yaml:" in answer.err


@pytest.mark.parametrize("command", ["status", "resume", "export", "report"])
def test_a_folder_without_a_run_is_refused_by_every_command_that_needs_one(cli: Cli, command: str) -> None:
    answer = cli(command, "nowhere")
    assert (answer.code, answer.out) == (2, "")
    assert (
        answer.err
        == "treadle: DataError: nowhere holds no run (no config.yaml). Name a folder that `treadle run` made.\n"
    )
    assert not Path("nowhere").exists()


def test_a_model_folder_that_is_none_is_refused(cli: Cli) -> None:
    answer = cli("eval", "nowhere", "--recipe", "demo")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "nowhere" in answer.err


def test_a_folder_with_somebodys_files_is_never_written_to(cli: Cli) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("x")
    for words in ([], ["--fresh"]):
        answer = cli("run", TINY, f"stages.rl.prompts.url={PROMPTS}", "--dir", "mine", *words)
        assert answer.code == 2
        assert "not empty and holds no run" in answer.err
    assert [file.name for file in Path("mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", str(TINY), "stages.rl.group_siz=4"),
        ("status", "nowhere"),
        ("run", "dmeo"),
        ("no-such-command",),
        ("run",),
        ("status", "x", "--no-such-option"),
    ],
)
def test_with_json_an_error_is_an_object_on_standard_output(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli(*words, "--json")
    assert answer.code != 0
    error = json.loads(answer.out)
    assert set(error) == {"error", "remedy", "kind"}
    assert error["error"]
    assert error["kind"] in ("ConfigError", "DataError")


COMMANDS = (
    "run",
    "demo",
    "resume",
    "submit",
    "scale",
    "chaos",
    "status",
    "eval",
    "export",
    "report",
    "recipes",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    answer = cli(command, "--help")
    assert answer.code == 0
    assert "--json" in answer.out
    assert answer.err == ""


def test_the_help_names_every_command(cli: Cli) -> None:
    answer = cli("--help")
    assert answer.code == 0
    for command in COMMANDS:
        assert command in answer.out


def test_asking_for_help_imports_nothing_heavy() -> None:
    program = """
import sys
sys.argv = ["treadle", "--help"]
from treadle.workflows.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "ray", "transformers", "numpy", "omegaconf", "mlflow", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout


def test_looking_at_a_run_imports_neither_torch_nor_ray() -> None:
    program = """
import sys
from treadle.workflows.cli import main
sys.argv = ["treadle", "status", "nowhere"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 2
heavy = {"torch", "ray", "transformers", "mlflow"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_installed_command_refuses_in_one_sentence_too(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "treadle"), "run", str(TINY), "stages.rl.group_siz=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "group_size" in done.stderr
    assert os.listdir(tmp_path) == []
