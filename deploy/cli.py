"""The `vespo` command. Commands import what they need when they run, so that `vespo --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.bench.command import bench
from deploy.buffer_admin import buffer_app
from deploy.console import fail
from protocol.errors import VespoError

app = typer.Typer(
    help="Asynchronous reinforcement learning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(buffer_app, name="buffer")

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file that describes the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that overrule the recipe.")
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives; default runs/{run.name}.")]


def main() -> None:
    """Run the command line; an error raised on purpose becomes one line, any other keeps its traceback."""
    sys.path.append(str(Path.cwd()))  # tasks of one's own, last so that they hide nothing
    try:
        app(prog_name="vespo")
    except VespoError as error:
        fail(error)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train: start server, learner and actors on this machine, or resume the run of that directory."""
    from deploy.rundir import RunDirectory
    from protocol.recipe import resolve

    resolved = resolve(recipe, overrides or [], os.environ)
    directory = RunDirectory(run_dir or Path("runs") / resolved.settings.run.name)
    from deploy.launcher import launch

    launch(resolved, directory)


@app.command()
def config(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show every setting with its value, where the value comes from, and what it means."""
    import json
    from dataclasses import asdict

    from deploy.console import format_settings
    from protocol.recipe import resolve

    rows = resolve(recipe, overrides or [], os.environ).rows()
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else format_settings(rows))


@app.command()
def learner(recipe: Recipe, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Run the learner by hand, without Ray. Ctrl-C drains the run: a checkpoint is written, actors return tickets.

    Several processes make one learner when they are started with torchrun's environment: RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT. All need the run directory under the same path; rank 0 alone needs the server.
    """
    from deploy.by_hand import follower_by_hand, learner_by_hand
    from deploy.roles import learner_rank
    from deploy.rundir import RunDirectory
    from protocol.recipe import resolve

    resolved = resolve(recipe, overrides or [], os.environ)
    by_hand = learner_by_hand if learner_rank() == 0 else follower_by_hand
    by_hand(resolved, RunDirectory(run_dir or Path("runs") / resolved.settings.run.name))


@app.command()
def actor(
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    name: Annotated[str, typer.Option(help="Name in the registry; each start gets a suffix of its own.")] = "actor",
) -> None:
    """Run an actor by hand, on any machine that reaches the server and the weight store, at any time."""
    from deploy.by_hand import actor_by_hand
    from deploy.rundir import RunDirectory
    from protocol.recipe import resolve

    resolved = resolve(recipe, overrides or [], os.environ)
    actor_by_hand(resolved, RunDirectory(run_dir or Path("runs") / resolved.settings.run.name), name)


@app.command()
def server(
    directory: Annotated[Path, typer.Option("--dir", help="Where the server keeps its data; DIR/buffer of a run.")],
) -> None:
    """Run an embedded server in the foreground and print its URL; Ctrl-C stops it, its data stay."""
    from deploy.by_hand import server_by_hand

    server_by_hand(directory)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory.")],
    png: Annotated[Path | None, typer.Option(help="Also write a picture of the main plots.")] = None,
) -> None:
    """Write report.html anew from what the run directory holds."""
    from deploy.report import write_picture, write_report
    from deploy.rundir import RunDirectory

    directory = RunDirectory(run_dir)
    print(write_report(directory))
    if png is not None:
        print(write_picture(directory, png))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Where the model goes.")],
    checkpoint: Annotated[int | None, typer.Option(metavar="STEP", help="Step of the checkpoint; the newest.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as trained by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what DIR holds.")] = False,
) -> None:
    """Write the model of a checkpoint as a Hugging Face directory, which transformers and vLLM load."""
    from deploy.export import export_model

    name = export_model(run_dir.expanduser(), target.expanduser(), step=checkpoint, dtype=dtype, force=force)
    print(f"{target}: model of checkpoint {name}")


@app.command()
def status(run_dir: Annotated[Path, typer.Option("--run-dir", help="Run directory.")]) -> None:
    """Say where a run stands, whether it is running or not."""
    from deploy.rundir import RunDirectory
    from deploy.status import print_status

    print_status(RunDirectory(run_dir))


app.command()(bench)
