"""The two ways from producer to consumer that the buffer bench compares: our buffer, and plain redis-py on a stream."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import redis

from buffer.connection import connect
from buffer.run import Buffer
from deploy.bench.pair import Start
from protocol.codec import encode_group
from protocol.manifest import Manifest, Probe, TensorEntry
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

BATCH = 32
"""Groups asked for, and committed, at once: `learner.groups_per_step`."""
NUM_COMPLETIONS = 8
VOCABULARY = 150_000
WAIT_SECONDS = 30.0
LEASE_SECONDS = 600.0
RUN, STREAM, READERS, READER = "bench", "raw", "readers", "reader"


@dataclass(frozen=True, slots=True)
class Job:
    """`num_groups` groups of about `num_bytes` encoded bytes each, over the server at `url`."""

    url: str
    num_bytes: int
    num_groups: int


def make_group(num_bytes: int) -> Group:
    """A group of eight completions that is encoded in `num_bytes`, less at most a token."""
    empty = len(encode_group(_group(1, 1)))
    num_tokens = 1 + (num_bytes - empty) // (9 * NUM_COMPLETIONS)
    group = _group(1, max(1, num_tokens))
    spare = num_bytes - len(encode_group(group))
    return _group(1 + max(0, spare) // 4, max(1, num_tokens))


def _group(num_prompt_tokens: int, num_tokens: int) -> Group:
    random = np.random.default_rng(0)
    completions = tuple(
        Completion(
            tokens=random.integers(0, VOCABULARY, num_tokens, dtype=np.int32),
            logprobs=-random.random(num_tokens, dtype=np.float32),
            mask=np.ones(num_tokens, np.uint8),
            spans=(VersionSpan(0, num_tokens, 0),),
            reward=0.5,
            finish_reason="stop",
        )
        for _ in range(NUM_COMPLETIONS)
    )
    prompt = random.integers(0, VOCABULARY, num_prompt_tokens, dtype=np.int32)
    return Group(Ticket(0, 0), 0, prompt, completions, "bench-0", 1.0)


def begin_run(job: Job) -> None:
    """Create the run whose tickets and groups are measured: nothing in it makes a producer wait."""
    buffer = Buffer(connect(job.url), RUN)
    epoch = buffer.begin_epoch(
        run_id=RUN, groups_per_version=max(1, job.num_groups), max_lag=0, max_attempts=1, max_bytes=1 << 40
    )
    tensor = TensorEntry(name="weight", dtype="F32", shape=(1,), xxh3="0" * 16)
    probe = Probe(tokens=((0, 0),), logprobs=((0.0,),))
    buffer.clock.publish(
        Manifest(
            version=0,
            step=0,
            epoch=epoch,
            kind="full",
            payload="bench.safetensors",
            payload_bytes=4,
            tensors=(tensor,),
            probe=probe,
        )
    )


def deliver_groups(job: Job, start: Start) -> None:
    """An actor's part: take tickets, encode and submit a group for each."""
    buffer, group = Buffer(connect(job.url), RUN), make_group(job.num_bytes)
    start()
    num_left = job.num_groups
    while num_left > 0:
        tickets = buffer.tickets.issue(0, min(BATCH, num_left), LEASE_SECONDS).tickets
        for ticket in tickets:
            if not buffer.groups.submit(replace(group, ticket=ticket), WAIT_SECONDS):
                raise RuntimeError(f"the group of {ticket} was refused")
        num_left -= len(tickets)


def train_groups(job: Job, start: Start) -> None:
    """The learner's part: lease and decode groups, and commit them by the batch."""
    buffer = Buffer(connect(job.url), RUN)
    clock = buffer.clock.read()
    assert clock is not None
    start()
    held: list[str] = []
    num_trained = 0
    while num_trained < job.num_groups:
        leased = buffer.groups.lease(clock.epoch, BATCH, WAIT_SECONDS)
        if not leased:
            raise RuntimeError(f"no group came for {WAIT_SECONDS:g} s")
        held += [item.entry_id for item in leased]
        if len(held) >= BATCH or num_trained + len(held) == job.num_groups:
            num_trained += buffer.groups.commit(clock.epoch, held, 1)
            held.clear()


def begin_stream(job: Job) -> None:
    """Create the plain stream with its consumer group."""
    with redis.Redis.from_url(job.url) as client:
        client.xgroup_create(STREAM, READERS, mkstream=True)


def add_entries(job: Job, start: Start) -> None:
    """The producer of the raw limit: the bytes of an encoded group, over and over."""
    client, payload = redis.Redis.from_url(job.url), encode_group(make_group(job.num_bytes))
    client.ping()
    start()
    for _ in range(job.num_groups):
        client.xadd(STREAM, {"payload": payload})


def read_entries(job: Job, start: Start) -> None:
    """The consumer of the raw limit."""
    client = redis.Redis.from_url(job.url)
    client.ping()
    start()
    held: list[bytes] = []
    num_read = 0
    while num_read < job.num_groups:
        reply: Any = client.xreadgroup(READERS, READER, {STREAM: ">"}, count=BATCH, block=round(1000 * WAIT_SECONDS))
        if not reply:
            raise RuntimeError(f"no entry came for {WAIT_SECONDS:g} s")
        held += [entry_id for entry_id, _ in reply[0][1]]
        if len(held) >= BATCH or num_read + len(held) == job.num_groups:
            pipeline: Any = client.pipeline(transaction=False)
            pipeline.xack(STREAM, READERS, *held).xdel(STREAM, *held).execute()
            num_read += len(held)
            held.clear()
