"""Small valid groups and manifests for tests of the buffer."""

import numpy as np
import redis

from buffer.keys import Keys
from buffer.run import Buffer
from protocol.manifest import Manifest, Probe, TensorEntry
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

PROBE = Probe(tokens=((1, 2, 3),), logprobs=((-0.5, -0.25),))


def make_group(ticket: Ticket, *, num_tokens: int = 4, version: int = 0) -> Group:
    """Two completions of `num_tokens` tokens, sampled by `version`."""
    completion = Completion(
        tokens=np.arange(num_tokens, dtype=np.int32),
        logprobs=np.full(num_tokens, -0.5, np.float32),
        mask=np.ones(num_tokens, np.uint8),
        spans=(VersionSpan(0, num_tokens, version),),
        reward=1.0,
        finish_reason="stop",
    )
    return Group(ticket, ticket.index, np.array([1, 2], np.int32), (completion, completion), "actor", 0.5)


def make_manifest(version: int, epoch: int, step: int = 0) -> Manifest:
    """A manifest whose payload does not exist."""
    tensor = TensorEntry(name="weight", dtype="F32", shape=(2,), xxh3="0" * 16)
    payload = f"v{version:08d}-e{epoch}.safetensors"
    return Manifest(
        version=version,
        step=step,
        epoch=epoch,
        kind="full",
        payload=payload,
        payload_bytes=64,
        tensors=(tensor,),
        probe=PROBE,
    )


def begin(
    buffer: Buffer,
    *,
    run_id: str = "run-id",
    groups_per_version: int = 4,
    max_lag: int = 1,
    max_attempts: int = 3,
    max_bytes: int = 1 << 20,
    first_ticket: int = 0,
) -> int:
    """Begin an epoch with settings fit for tests."""
    return buffer.begin_epoch(
        run_id=run_id,
        groups_per_version=groups_per_version,
        max_lag=max_lag,
        max_attempts=max_attempts,
        max_bytes=max_bytes,
        first_ticket=first_ticket,
    )


def publish_next(buffer: Buffer, epoch: int, step: int = 0) -> int:
    """Publish the next version; returns its number."""
    clock = buffer.clock.read()
    assert clock is not None
    buffer.clock.publish(make_manifest(clock.version + 1, epoch, step))
    return clock.version + 1


def submit_new(buffer: Buffer, count: int, served_version: int = 0) -> list[Ticket]:
    """Issue `count` tickets and submit a group for each."""
    tickets = buffer.tickets.issue(served_version, count, 60).tickets
    assert len(tickets) == count
    assert all(buffer.groups.submit(make_group(ticket), 1) for ticket in tickets)
    return tickets


def payload_key(client: redis.Redis, keys: Keys, position: int = 0) -> str:
    """Where the bytes of the stream's entry at `position` are."""
    _, fields = client.xrange(keys.groups)[position]
    return f"{keys.payload}:{fields[b'payload'].decode()}"
