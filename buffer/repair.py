"""Puts a ledger that does not balance in order: every ticket in exactly one place again, counters that say so.

What the server lost as a whole (a last second that was not on disk, a failover to a replica that lagged) needs no
repair: scripts are atomic, so an earlier state balances too, and the learner puts right what it knows better (`Scripts`
repeats its last writes, `commit` takes tickets from wherever they are). Repair is for what nothing of ours does: keys
evicted, deleted or changed by other hands.
"""

from buffer.scripts import Scripts

_FINDINGS = (
    "{} tickets that no structure held are taken as done: the counters remember more than the bitmap",
    "{} tickets that no structure held are generated again",
    "{} groups are dropped: damaged, delivered twice, or of tickets that are done or were never issued",
    "{} leases, retries or dead tickets are dropped: malformed, in two places, done, or never issued",
    "{} payloads without a group are deleted",
)


def repair_run(scripts: Scripts) -> list[str]:
    """Repair in one atomic script; harmless while actors and learner work.

    Returns:
        What was changed apart from counters, in words.

    Raises:
        BufferUnavailableError: the run's own description is gone, so that nothing can be derived.
    """
    counts = scripts.run("repair")
    return [text.format(count) for text, count in zip(_FINDINGS, counts, strict=True) if count]
