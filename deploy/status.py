"""`vespo status`: where a run stands, from its directory and, while its server lives, from its buffer."""

from buffer.run import Buffer
from deploy.connect import connect_url, settings_of
from deploy.live import clock, figures
from deploy.rundir import RunDirectory
from deploy.snapshot import Snapshot, Trend, take_snapshot
from deploy.summary import format_summary, read_metrics, read_summary
from protocol.errors import LauncherError

RECONNECT_SECONDS = 2.0


def print_status(directory: RunDirectory) -> None:
    """Print what is known.

    Raises:
        LauncherError: the directory holds no run.
    """
    run = directory.read()
    if run is None:
        raise LauncherError(f"{directory.path} holds no run: it has no {directory.identity.name}")
    records = read_metrics(directory.metrics)
    print(f"run {run.name} in {directory.path}: {records[-1].step if records else 0} steps in metrics.jsonl")
    try:
        name, url = settings_of(directory)
    except LauncherError:
        summary = read_summary(directory)
        print("not running" if summary is None else f"not running; its summary:\n{format_summary(summary, directory)}")
        return
    client = connect_url(url, name, RECONNECT_SECONDS, wait=False)
    try:
        buffer = Buffer(client, name)
        snapshot = take_snapshot(buffer)
        trend = Trend(records[-1].step if records else 0, records)
        trend.add(snapshot)
        print(f"state {snapshot.state} {buffer.control.reason()}".rstrip())
        for title, text in figures(snapshot, trend):
            print(f"{title:<9} {text}")
        for line in actor_lines(snapshot):
            print(line)
    finally:
        client.close()


def actor_lines(snapshot: Snapshot) -> list[str]:
    """A line for each living actor: what it serves, for how long it has, its parity, and what went wrong."""
    width = max((len(name) for name, _, _ in snapshot.actors), default=0)
    lines = []
    for name, heartbeat_age, status in snapshot.actors:
        facts = [f"{status.state:<11}"]
        if status.served_version >= 0:
            age = clock(status.served_seconds + heartbeat_age)
            facts.append(f"v{status.served_version} for {age}, parity {status.parity:.1e}")
        for number, what in (
            (status.parity_violations, "parity violations"),
            (status.reloads, "reloads"),
            (status.engine_rebuilds, "engines replaced"),
        ):
            if number:
                facts.append(f"{number} {what}")
        if status.error:
            facts.append(status.error)
        lines.append(f"  {name:<{width}}  {'  '.join(facts)}".rstrip())
    return lines
