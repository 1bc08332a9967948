"""`vespo buffer ...`: look into a run's buffer from outside, prove that it balances, repair, drain or delete it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import SettingsError

if TYPE_CHECKING:
    from buffer.run import Buffer

buffer_app = typer.Typer(help="Look into the buffer of a run, and put it in order.", no_args_is_help=True)

Recipe = Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe of the run, if it names buffer.url.")]
Url = Annotated[str | None, typer.Option("--url", help="Redis URL; together with --run.")]
RunName = Annotated[str | None, typer.Option("--run", help="Name of the run.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run directory.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="How many to show.")]

ALIVE_SECONDS = 30.0
RECONNECT_SECONDS = 5.0
ERROR_WIDTH = 80


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
def audit(
    recipe: Recipe = None,
    url: Url = None,
    run: RunName = None,
    run_dir: RunDir = None,
    repair: Annotated[bool, typer.Option("--repair", help="Put in order what does not add up; asks first.")] = False,
    yes: Yes = False,
) -> None:
    """Prove that every ticket ever issued is in exactly one state; exit code 1 if it is not so."""
    buffer = _find(recipe, url, run, run_dir)
    balanced = _show_ledger(buffer)
    if repair and not balanced:
        if not yes:
            typer.confirm(
                "Repair? Damaged and doubled entries are dropped, tickets that are nowhere are generated again",
                abort=True,
            )
        for change in buffer.repair():
            print(f"repaired: {change}")
        balanced = _show_ledger(buffer)
    raise typer.Exit(0 if balanced else 1)


@buffer_app.command()
def peek(
    recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None, limit: Limit = 10
) -> None:
    """The groups that the learner gets next, without their tokens."""
    from deploy.console import format_table

    peeked = _find(recipe, url, run, run_dir).peek(limit)
    rows: list[tuple[object, ...]] = []
    for item in peeked:
        start = (item.ticket.index, item.ticket.attempt, f"{item.age_seconds:.1f}", item.num_bytes)
        if (h := item.header) is None:
            rows.append((*start, "-", "-", "-", "-", f"DAMAGED: {item.problem}"[:ERROR_WIDTH]))
        else:
            versions = "..".join(map(str, sorted(set(h.versions))))
            rows.append((*start, h.num_completions, h.num_tokens, versions, f"{h.reward_mean:.3f}", h.actor))
    headings = ["ticket", "attempt", "age s", "bytes", "completions", "tokens", "versions", "reward", "actor"]
    print(format_table(headings, rows) if rows else "no group waits")


@buffer_app.command()
def dead(
    recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None, limit: Limit = 20
) -> None:
    """Tickets that were given up, newest first, with their last error."""
    from deploy.console import format_table

    rows = [(t.index, t.attempts, t.error) for t in _find(recipe, url, run, run_dir).tickets.dead(limit)]
    print(format_table(["ticket", "attempts", "error"], rows) if rows else "no ticket is dead")


@buffer_app.command("retry-dead")
def retry_dead(
    recipe: Recipe = None,
    url: Url = None,
    run: RunName = None,
    run_dir: RunDir = None,
    ticket: Annotated[list[int] | None, typer.Option("--ticket", help="Only this one; may be repeated.")] = None,
) -> None:
    """Try tickets that were given up again, with all their attempts."""
    print(f"{_find(recipe, url, run, run_dir).tickets.retry_dead(ticket or None)} tickets are tried again")


@buffer_app.command()
def drain(
    recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None, yes: Yes = False
) -> None:
    """End the run in order: the learner writes a checkpoint, actors return their tickets. It can be resumed."""
    buffer = _find(recipe, url, run, run_dir)
    if (state := buffer.control.state()) != "running":
        print(f"run {buffer.run} is not running: {state}")
        raise typer.Exit(1)
    if not yes:
        typer.confirm(f"Drain run {buffer.run}? Its learner and actors end", abort=True)
    buffer.control.set_state("draining", "vespo buffer drain")
    print(f"run {buffer.run} drains")


@buffer_app.command()
def purge(
    recipe: Recipe = None, url: Url = None, run: RunName = None, run_dir: RunDir = None, yes: Yes = False
) -> None:
    """Delete everything that one run keeps in Redis; checkpoints and weights stay."""
    buffer = _find(recipe, url, run, run_dir)
    if not yes:
        typer.confirm(f"Delete all buffered groups and counters of run {buffer.run}?", abort=True)
    print(f"run {buffer.run}: " + ("deleted" if buffer.purge() else "there was nothing"))


def _show_ledger(buffer: "Buffer") -> bool:
    from deploy.console import format_counts, format_table

    ledger = buffer.ledger()
    print(format_table(["state", "tickets"], list(ledger.states.items())))
    print(format_counts("events", ledger.events))
    for discrepancy in ledger.discrepancies:
        print(f"discrepancy: {discrepancy}")
    print("the ledger balances" if ledger.balanced else "THE LEDGER DOES NOT BALANCE")
    return ledger.balanced


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
    client = connect_url(where, name, RECONNECT_SECONDS, wait=False)
    try:
        return Buffer(client, name)
    except ValueError as error:
        raise SettingsError(f"--run: {error}") from error
