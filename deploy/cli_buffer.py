"""`vespo buffer ...`: look into a run's buffer from outside, prove that it balances, or delete it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import SettingsError

if TYPE_CHECKING:
    from buffer.run import Buffer

buffer_app = typer.Typer(help="Look into the buffer of a run.", no_args_is_help=True)

Recipe = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe of the run, if it names buffer.url.")]
Url = Annotated[str | None, typer.Option("--url", help="Redis URL; together with --run.")]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run directory.")]

ALIVE_SECONDS = 30.0
RECONNECT_SECONDS = 5.0


@buffer_app.command()
def stats(recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None) -> None:
    """Clock, depth, tickets by state, and the actors that are alive."""
    from deploy.console import format_counts, format_table

    buffer = _find(recipe, url, run, run_dir)
    clock = buffer.clock.read()
    if clock is None:
        print(f"run {buffer.run}: no learner has begun it")
        return
    depth = buffer.groups.depth()
    ledger = buffer.ledger()
    state, reason = buffer.control.state(), buffer.control.reason()
    print(f"run {buffer.run}: {state}" + (f" ({reason})" if reason else ""))
    print(format_counts("clock", {"version": clock.version, "step": clock.step, "epoch": clock.epoch}))
    print(format_counts("admission", {"max_lag": clock.max_lag, "groups/version": clock.groups_per_version}))
    print(format_counts("groups", {"buffered": depth.buffered, "leased": depth.leased, "bytes": depth.num_bytes}))
    print(format_counts("tickets", ledger.states))
    print(format_counts("events", ledger.events))
    actors = buffer.actors.list(ALIVE_SECONDS)
    print(format_counts("actors", {"alive": len(actors)}))
    if actors:
        rows = [
            (name, s.state, f"{age:.1f}", s.served_version, f"{s.parity:.1e}", s.tokens_generated, s.groups_submitted)
            for name, age, s in actors
        ]
        print(format_table(["actor", "state", "heard s ago", "version", "parity", "tokens", "groups"], rows))


@buffer_app.command()
def audit(recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None) -> None:
    """Prove that every ticket ever issued is in exactly one state; exit code 1 if it is not so."""
    from deploy.console import format_counts

    ledger = _find(recipe, url, run, run_dir).ledger()
    print(format_counts("tickets", ledger.states))
    print(format_counts("events", ledger.events))
    for discrepancy in ledger.discrepancies:
        print(f"discrepancy: {discrepancy}")
    print("the ledger balances" if ledger.balanced else "THE LEDGER DOES NOT BALANCE")
    raise typer.Exit(0 if ledger.balanced else 1)


@buffer_app.command()
def purge(
    recipe: Recipe = None,
    url: Url = None,
    run: RunName = None,
    run_dir: RunDir = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete everything that one run keeps in Redis; checkpoints and weights stay."""
    buffer = _find(recipe, url, run, run_dir)
    if not yes:
        typer.confirm(f"Delete all buffered groups and counters of run {buffer.run}?", abort=True)
    print(f"run {buffer.run}: " + ("deleted" if buffer.purge() else "there was nothing"))


def _find(recipe: Path | None, url: str | None, run: str | None, run_dir: Path | None) -> "Buffer":
    """The buffer that the command line points at."""
    from buffer.run import Buffer
    from deploy.connect import connect_url, server_url, settings_of
    from deploy.rundir import RunDirectory
    from protocol.recipe import resolve

    if url is not None:
        if run is None:
            raise SettingsError("--url needs --run NAME too: one server holds many runs")
        name, where = run, url
    elif run_dir is not None:
        directory = RunDirectory(run_dir)
        name, where = settings_of(directory)
    elif recipe is not None:
        settings = resolve(recipe, [], os.environ).settings
        name = run or settings.run.name
        where = server_url(settings, RunDirectory(Path("runs") / settings.run.name))
    else:
        raise SettingsError("say which run: RECIPE, --run-dir DIR, or --url URL --run NAME")
    client = connect_url(where, RECONNECT_SECONDS, wait=False)
    try:
        return Buffer(client, name)
    except ValueError as error:
        raise SettingsError(f"--run: {error}") from error
