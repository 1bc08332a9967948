"""A bench that measures nothing: three rounds of known readings, or one if it has to be quick."""

import os
import sys
from collections.abc import Iterator

from deploy.bench.harness import Reading, Round, Target

TARGETS = (
    Target("ours", 3.0),
    Target("ours_over_theirs", 2.0),
    Target("seconds", 0.5, at_most=True),
    Target("only_on_large_machines", 1.0),
)
SPEEDS = (4.0, 1.0, 3.0)


def rounds(quick: bool) -> Iterator[Round]:
    """`ours` in requests/s, its ratio to theirs, and `seconds` in the first round alone."""
    for number, ours in enumerate(SPEEDS[:1] if quick else SPEEDS):
        print("a library is talkative")
        os.system("echo and so is a child")
        sys.stdout.flush()
        first = {"seconds": Reading(0.25, "s")} if number == 0 else {}
        yield {"ours": Reading(ours, "requests/s"), "ours_over_theirs": Reading(ours / 2)} | first
