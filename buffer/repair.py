"""Puts a ledger that does not balance in order: every ticket in exactly one place again, counters that say so.

What the server lost as a whole (a last second that was not on disk, a failover to a replica that lagged) needs no
repair: scripts are atomic, so an earlier state balances too, and the learner puts right what it knows better (`Scripts`
repeats its last writes, `commit` takes tickets from wherever they are). Repair is for what nothing of ours does: keys
evicted, deleted or changed by other hands.
"""

import re
from collections.abc import Iterator

import redis

from buffer.connection import command
from buffer.keys import Keys
from buffer.scripts import Scripts

KEYS_PER_SCAN = 1000
NO_TIME_TO_LIVE = -1

_FINDINGS = (
    "{} tickets that no structure held are taken as done: the counters remember more than the bitmap",
    "{} tickets that no structure held are generated again",
    "{} groups are dropped: damaged, delivered twice, or of tickets that are done or were never issued",
    "{} leases, retries or dead tickets are dropped: malformed, in two places, done, or never issued",
)


def repair_run(client: redis.Redis, keys: Keys, scripts: Scripts) -> list[str]:
    """Repair in one atomic script; harmless while actors and learner work.

    Returns:
        What was changed apart from counters, in words.

    Raises:
        BufferUnavailableError: the run's own description is gone, so that nothing can be derived.
    """
    counts = scripts.run("repair")
    changes = [text.format(count) for text, count in zip(_FINDINGS, counts, strict=True) if count]
    if num_orphans := _delete_orphans(client, keys):
        changes.append(f"{num_orphans} payloads without a group are deleted")
    return changes


def payload_keys(client: redis.Redis, keys: Keys) -> Iterator[list[bytes]]:
    """Every payload of the run, some at a time; looks through all keys of the server."""
    pattern = re.sub(r"([*?\[\]\\])", r"\\\1", keys.payload) + ":*"
    cursor = 0
    while True:
        cursor, found = command(client, "SCAN", cursor, "MATCH", pattern, "COUNT", KEYS_PER_SCAN)
        if found:
            yield found
        if cursor == 0:
            return


def _delete_orphans(client: redis.Redis, keys: Keys) -> int:
    """Delete payloads that were accepted, and whose entry other hands deleted."""
    accepted = [
        key for found in payload_keys(client, keys) for key in found if command(client, "PTTL", key) == NO_TIME_TO_LIVE
    ]
    # read after them: what was accepted since is not among them, and what was committed since is gone already
    entries = command(client, "XRANGE", keys.groups, "-", "+")
    named = {keys.payload.encode() + b":" + fields.get(b"payload", b"") for _, fields in entries}
    return sum(command(client, "UNLINK", key) for key in accepted if key not in named)
