"""A look at the groups that wait for the learner, for people; changes nothing."""

from dataclasses import dataclass

import redis

from buffer.connection import command
from buffer.keys import Keys
from buffer.tickets import parse_ticket
from protocol.codec import decode_group
from protocol.errors import CodecError
from protocol.trajectory import Group, Ticket


@dataclass(frozen=True, slots=True)
class Peeked:
    """A buffered group without its tokens.

    Attributes:
        ticket: the lease under which it was generated.
        age_seconds: since it was submitted, by the server's clock.
        num_bytes: size of its encoding.
        header: what it says about itself; None if it cannot be decoded.
        problem: why it cannot be decoded, else empty.
    """

    ticket: Ticket
    age_seconds: float
    num_bytes: int
    header: "GroupHeader | None"
    problem: str


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """Of one group. `versions` are the oldest and newest policy version that sampled any of its tokens."""

    actor: str
    prompt_index: int
    num_completions: int
    num_tokens: int
    versions: tuple[int, int]
    reward_mean: float
    generation_seconds: float


def peek_groups(client: redis.Redis, keys: Keys, count: int) -> list[Peeked]:
    """The `count` groups that the learner gets next; their payloads are read for it."""
    if count < 1:
        raise ValueError(f"count is {count}; look at one group at least")
    if not command(client, "EXISTS", keys.groups):
        return []
    delivered = [reader["last-delivered-id"].decode() for reader in command(client, "XINFO GROUPS", keys.groups)]
    start = f"({delivered[0]}" if delivered else "-"
    entries = command(client, "XRANGE", keys.groups, start, "+", "COUNT", count)
    if not entries:
        return []
    payloads = command(client, "MGET", *(f"{keys.payload}:{fields[b'payload'].decode()}" for _, fields in entries))
    now = float(command(client, "TIME")[0])
    return [
        _peeked(parse_ticket(fields[b"ticket"]), now - int(stream_id.partition(b"-")[0]) / 1000, payload)
        for (stream_id, fields), payload in zip(entries, payloads, strict=True)
    ]


def _peeked(ticket: Ticket, age_seconds: float, payload: bytes | None) -> Peeked:
    header, problem = None, ""
    try:
        header = _header(decode_group(payload or b""))
    except CodecError as error:
        problem = str(error)
    return Peeked(ticket, max(0.0, age_seconds), len(payload or b""), header, problem)


def _header(group: Group) -> GroupHeader:
    versions = [span.version for completion in group.completions for span in completion.spans]
    rewards = [completion.reward for completion in group.completions]
    return GroupHeader(
        actor=group.actor,
        prompt_index=group.prompt_index,
        num_completions=len(group.completions),
        num_tokens=group.num_tokens,
        versions=(min(versions), max(versions)),
        reward_mean=sum(rewards) / len(rewards),
        generation_seconds=group.generation_seconds,
    )
