"""The command line. Commands import what they need when they run, so that `treadle --help` is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from treadle.platform.errors import ConfigError, Interrupted, TreadleError

app = typer.Typer(
    name="treadle",
    help="Train reasoning models: pretraining, SFT, GRPO, distillation, as one Ray program.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TYPERS_CTRL_C = 130  # what it returns instead of raising KeyboardInterrupt

RecipeArg = Annotated[
    str,
    typer.Argument(
        help="A recipe: a YAML file or URL, or the name of a shipped one (see `treadle recipes`)."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Settings to change, dotted: stages.grpo.steps=100."),
]
RunArg = Annotated[Path, typer.Argument(help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout and nothing else.")]
Address = Annotated[
    str, typer.Option(help="A running Ray cluster as host:port; empty starts one here, for this run only.")
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach",
        help="On the cluster at --address: a controller there runs it and goes on when this command ends, is killed or "
        "is left with Ctrl-C (see attach, stop).",
    ),
]
Folder = Annotated[
    Path | None, typer.Option("--dir", help="The run folder; the default is runs/<recipe's name>.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Replace a run that lies in the folder already.")]
JudgeOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Settings of the pool: verify.deadline_s=5."),
]
Out = Annotated[
    Path | None, typer.Option(help="Write every verdict (rescore: every change) there, as JSON lines.")
]
ShownRows = Annotated[int, typer.Option("--rows", min=0, help="Rows of the table.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the resolved recipe, start nothing.")
]


@app.command()
def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    folder: Folder = None,
    address: Address = "",
    fresh: Fresh = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe here, on an embedded Ray, or on the cluster at --address."""
    from treadle.workflows import commands

    how = {"fresh": fresh, "dry_run": dry_run, "as_json": as_json, "detach": detach}
    _finish(commands.run(recipe, overrides or [], folder, address, **how), as_json)


@app.command()
def demo(
    overrides: Overrides = None, folder: Folder = None, fresh: Fresh = False, as_json: AsJson = False
) -> None:
    """Run the shipped miniature R1 (`treadle run demo`) in runs/demo."""
    from treadle.workflows import commands

    _finish(
        commands.run("demo", overrides or [], folder, "", fresh=fresh, dry_run=False, as_json=as_json),
        as_json,
    )


@app.command()
def resume(
    run: Annotated[
        str, typer.Argument(help="A run folder, or the URL of a mirror, which is continued in --dir.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of roles, cluster, checkpoint, tracking and recovery: learner.ranks=4 ..."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="With a URL: the new run folder; the default is runs/<last part of it>."),
    ] = None,
    address: Address = "",
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Also where another process seems to run it: that one is fenced off."
        ),
    ] = False,
    detach: Detach = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run that was stopped or killed, from its newest committed checkpoint, here or in its mirror."""
    from treadle.workflows import commands

    how = {"take_over": take_over, "as_json": as_json, "detach": detach}
    _finish(commands.resume(run, overrides or [], folder, address, **how), as_json)


@app.command()
def attach(
    run_folder: RunArg,
    address: Annotated[
        str, typer.Option(help="Its cluster as host:port; the default is what the run folder says.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Follow a run again, to its end: its progress, its last sentence, its exit code. Ctrl-C leaves it running."""
    from treadle.workflows import attach_commands

    _finish(attach_commands.attach(run_folder, address, as_json=as_json), as_json)


@app.command()
def stop(
    run_folder: RunArg,
    deadline_s: Annotated[
        float,
        typer.Option("--deadline", min=0, help="Seconds that the step at hand may take to be committed."),
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """End a run, detached or not: a commit after the step at hand, then everything ends; `treadle resume` goes on."""
    from treadle.workflows import attach_commands

    _finish(attach_commands.stop(run_folder, deadline_s), as_json)


@app.command()
def submit(
    recipe: RecipeArg,
    address: Annotated[str, typer.Option(help="The cluster's dashboard, http://host:8265.")],
    overrides: Overrides = None,
    folder: Annotated[
        str, typer.Option("--dir", help="The run folder as the cluster sees it (a shared path).")
    ] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once the job is accepted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe as a Ray job: the code is shipped as a wheel, the log is followed, the exit code is the job's.

    The token is read from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    """
    from treadle.workflows import commands

    _finish(
        commands.submit(recipe, overrides or [], address, folder, wait=not no_wait, as_json=as_json), as_json
    )


@app.command()
def chaos(
    recipe: RecipeArg,
    plan: Annotated[
        Path,
        typer.Option(
            help="YAML with the faults, what must hold, and the longest it may take: docs/operations.md."
        ),
    ],
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The run folder; the default is runs/<recipe's name>-chaos.")
    ] = None,
    address: Address = "",
    compare: Annotated[
        Path | None,
        typer.Option(
            help="A run without faults, which must have the same weights digest; made first if nothing lies there."
        ),
    ] = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check plan and recipe, list the faults, start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A game day: run a recipe, disturb it as planned, and account for it. Exit code 1 if an invariant breaks."""
    from treadle.workflows.gamedays import command

    _finish(
        command.chaos(
            *(recipe, plan, overrides or [], folder, address, compare),
            fresh=fresh,
            dry_run=dry_run,
            as_json=as_json,
        ),
        as_json,
    )


@app.command()
def scale(
    run_folder: RunArg,
    sizes: Annotated[
        list[str], typer.Argument(metavar="[key=value]...", help="rollout.workers=4, verify.processes=3")
    ],
    as_json: AsJson = False,
) -> None:
    """Let rollout workers and verifier processes join or leave a run that goes on."""
    from treadle.workflows import elastic

    _finish(elastic.ask(run_folder, sizes), as_json)


@app.command()
def status(run_folder: RunArg, as_json: AsJson = False) -> None:
    """Say where a run stands: state, stage, step, samples, last figures."""
    from treadle.workflows import inspection

    _finish(inspection.status(run_folder), as_json)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder: an artifact of a run, or an export.")],
    recipe: Annotated[
        str, typer.Option(help="The recipe whose held-out prompts and verifier are used.")
    ] = "demo",
    overrides: Overrides = None,
    address: Address = "",
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on a recipe's held-out prompts: greedy, sampled, pass@k, confidence interval."""
    from treadle.workflows import commands

    _finish(commands.evaluate_model(model, recipe, overrides or [], address), as_json)


@app.command()
def export(
    run_folder: RunArg,
    stage: Annotated[
        str, typer.Argument(help="Whose model; the default is the last stage that has one.")
    ] = "",
    to: Annotated[Path | None, typer.Option(help="Target folder; the default is RUN/export/<stage>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a stage's model as Hugging Face safetensors, checked by reading it back."""
    from treadle.workflows import inspection

    _finish(inspection.export(run_folder, stage, to), as_json)


@app.command()
def verify(
    file: Annotated[
        str,
        typer.Argument(help='JSON lines or Parquet, with "completion" and "answer" (or "payload") per row.'),
    ],
    overrides: JudgeOverrides = None,
    verifier: Annotated[str, typer.Option(help="Who judges the rows that do not name a verifier.")] = "",
    out: Out = None,
    rows: ShownRows = 20,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count broken rows and leave them out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge the completions of a file and print a table. Exit code 1 if a verifier failed on one."""
    from treadle.workflows import judge_commands

    _finish(judge_commands.verify(file, verifier, overrides or [], out, rows, skip_bad=skip_bad), as_json)


@app.command()
def rescore(
    run_folder: RunArg,
    overrides: JudgeOverrides = None,
    verifier: Annotated[str, typer.Option(help="Another verifier; the default is each prompt's own.")] = "",
    out: Out = None,
    rows: ShownRows = 20,
    as_json: AsJson = False,
) -> None:
    """Judge the completions a run has kept once more and show whose reward changed."""
    from treadle.workflows import judge_commands

    _finish(judge_commands.rescore(run_folder, verifier, overrides or [], out, rows), as_json)


@app.command()
def report(run_folder: RunArg, as_json: AsJson = False) -> None:
    """Draw RUN/report.html: one self-contained page."""
    from treadle.workflows import inspection

    _finish(inspection.report(run_folder), as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from treadle.workflows import commands

    _finish(commands.list_recipes(), as_json)


def _finish(result: dict[str, Any], as_json: bool) -> None:
    """Prints a command's result: JSON on stdout, or its `text`."""
    text = result.pop("text", "")
    code = result.get("exit_code", 0)
    if as_json:
        print(json.dumps(result, indent=1, sort_keys=True, default=str))
    elif text:
        print(text)
    if code:
        sys.exit(code)


def _fail(error: TreadleError, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": error.message, "remedy": error.remedy, "kind": type(error).__name__}))
    print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """Entry point. A `TreadleError` ends as one sentence on stderr and its exit code; anything else is a defect
    and keeps its traceback."""
    try:
        if any(name.startswith("TREADLE_FAILPOINTS") for name in os.environ):
            from treadle.platform.failpoints import read_faults

            read_faults(os.environ)  # a misspelt fault is said here, not by some process later
        if app(standalone_mode=False) == _TYPERS_CTRL_C:
            raise Interrupted("Stopped by the operator.")
    except TreadleError as error:
        _fail(error, "--json" in sys.argv)
    except typer.TyperException as error:  # usage: an unknown command, option or argument
        _fail(ConfigError(str(error), "See `treadle --help`."), "--json" in sys.argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
