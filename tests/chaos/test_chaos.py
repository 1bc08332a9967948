"""Chaos: a run whose actors, learner, server and network fail at random, and whose ledger balances all the same.

Short by default; VESPO_CHAOS=long, which `make chaos` sets, lasts four minutes. VESPO_CHAOS_SEED picks the schedule.
"""

import os
import time
from pathlib import Path

import pytest
from chaos_learner import newest_checkpoint
from chaos_world import World

from buffer.embedded import EmbeddedServer
from buffer.keys import Keys

SECONDS = {"short": 20.0, "long": 240.0}[os.environ.get("VESPO_CHAOS", "short")]
NUM_AUDITS = 50
SEED = int(os.environ.get("VESPO_CHAOS_SEED", "1"))
NUM_ACTORS = 4
MEAN_GAP_SECONDS = 0.3


@pytest.mark.chaos
@pytest.mark.timeout(SECONDS * 3 + 120)
def test_nothing_is_lost_and_nothing_is_trained_twice(
    server_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(server_directory, SEED, NUM_ACTORS)
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline or world.num_audits < NUM_AUDITS:
            world.pause(2 * MEAN_GAP_SECONDS)
            world.audit()
            world.inject()
            world.audit()
        world.drain()
        world.audit()
    finally:
        world.close()
    check_lineage(world, server_directory)
    with capsys.disabled():
        print("\n" + report(world))


def check_lineage(world: World, directory: Path) -> None:
    """What the surviving checkpoints were trained on is what the ledger says, each ticket and each group once."""
    EmbeddedServer.start(directory)
    lineage = newest_checkpoint(directory).lineage
    tickets, prompts = [index for index, _ in lineage], [prompt for _, prompt in lineage]
    assert len(set(tickets)) == len(tickets), "a ticket was trained twice"
    assert len(set(prompts)) == len(prompts), "a group was trained twice"
    states = world.buffer.ledger().states
    assert states["trained"] == len(tickets)
    done = "".join(f"{byte:08b}" for byte in world.client.get(Keys(world.buffer.run).done))
    assert all(done[index] == "1" for index in tickets)
    assert done.count("1") == states["trained"] + states["filtered"]


def report(world: World) -> str:
    ledger = world.buffer.ledger()
    faults = ", ".join(f"{count} {name}" for name, count in world.faults.most_common())
    counts = ", ".join(f"{count} {name}" for name, count in [*ledger.states.items(), *ledger.events.items()])
    return (
        f"chaos: seed {SEED}, {sum(world.faults.values())} faults injected ({faults}); {world.num_audits} audits, "
        f"{world.sessions} learners; groups and tickets: {counts}"
    )
