"""Fuzzing of the wire format: whatever arrives ends as a `CodecError` or as a group, in little time and memory."""

import copy
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash

from protocol.codec import MAX_HEADER_BYTES, PRELUDE, decode_group, encode_group
from protocol.errors import CodecError
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

NUM_PAYLOADS = 100_000
SECONDS = 30.0
SECONDS_EACH = 1.0
MEMORY_BYTES = 64 << 20
VALUES: list[object] = [
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 53, (1 << 64) - 1, 0.5, float("nan"), float("inf"), "", "stop", "x" * 300,
    b"\xff", [], {}, [[]], [0, 1, 2], [[0, 1, 2]], [[0, 3, -1]], [[0, 1 << 60, 0]], {"tokens": 1}, ["a", "b"],
]  # fmt: skip


def sample(rng: random.Random) -> Group:
    """A small group with several completions and spans."""

    def completion() -> Completion:
        length = rng.randint(1, 12)
        middle = rng.randint(1, length)
        spans = [VersionSpan(0, middle, 3), VersionSpan(middle, length, 4)][: 1 + (middle < length)]
        tokens = np.arange(length, dtype=np.int32)
        logprobs = -np.arange(length, dtype=np.float32)
        return Completion(tokens, logprobs, np.ones(length, np.uint8), tuple(spans), rng.random(), "length")

    completions = tuple(completion() for _ in range(rng.randint(2, 5)))
    return Group(Ticket(rng.randrange(1000), 1), 3, np.array([5, 6], np.int32), completions, "actor-0", 0.5)


def seal(header: bytes, body: bytes) -> bytes:
    payload = PRELUDE.pack(b"VSPG", 1, 0, len(header), len(body)) + header + body
    return payload + xxhash.xxh3_64_digest(payload)


def split(payload: bytes) -> tuple[bytes, bytes]:
    _, _, _, header_bytes, _ = PRELUDE.unpack_from(payload)
    end = PRELUDE.size + header_bytes
    return payload[PRELUDE.size : end], payload[end:-8]


def flip(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0 if place < len(changed):
                changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xDC, 0xDD, 0xFF, rng.randrange(256)])
            case 1:
                del changed[place : place + rng.randint(1, 8)]
            case 2:
                changed[place:place] = changed[place : place + rng.randint(1, 8)]
            case _:
                changed[place:place] = rng.randbytes(rng.randint(1, 8))
    return bytes(changed)


def damaged(rng: random.Random, payload: bytes) -> bytes:
    """As a bad disk or network would: nothing fits any more."""
    return flip(rng, payload)


def damaged_header(rng: random.Random, payload: bytes) -> bytes:
    header, body = split(payload)
    return seal(flip(rng, header), body)


def damaged_body(rng: random.Random, payload: bytes) -> bytes:
    header, body = split(payload)
    return seal(header, flip(rng, body))


def other_values(rng: random.Random, payload: bytes) -> bytes:
    """A well-formed header that says something else, at any depth."""
    packed, body = split(payload)
    header: Any = msgpack.unpackb(packed)
    for _ in range(rng.randint(1, 3)):
        place = header
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.7:
                place = place[key]
                continue
            place[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return seal(msgpack.packb(header), body)


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [damaged, damaged_header, damaged_body, other_values]


def outcome(payload: bytes) -> str:
    """ "group" or "CodecError"; anything else that is raised fails the test."""
    try:
        group = decode_group(payload)
    except CodecError as error:
        assert 0 < len(str(error)) < 1000
        return "CodecError"
    assert group.problem() is None
    assert encode_group(decode_group(encode_group(group))) == encode_group(group)
    return "group"


def test_a_hundred_thousand_mutated_payloads() -> None:
    rng = random.Random(0)
    payloads = [encode_group(sample(rng)) for _ in range(50)]
    counts = {"group": 0, "CodecError": 0}
    slowest = 0.0
    started = time.process_time()
    for number in range(NUM_PAYLOADS):
        mutated = MUTATIONS[number % len(MUTATIONS)](rng, rng.choice(payloads))
        before = time.process_time()
        counts[outcome(mutated)] += 1
        slowest = max(slowest, time.process_time() - before)
    assert time.process_time() - started < SECONDS
    assert slowest < SECONDS_EACH
    assert sum(counts.values()) == NUM_PAYLOADS
    assert min(counts.values()) > NUM_PAYLOADS / 50, counts  # both outcomes are worth the effort


def test_mutated_payloads_take_little_memory() -> None:
    rng = random.Random(1)
    payloads = [encode_group(sample(rng)) for _ in range(20)]
    tracemalloc.start()
    try:
        for number in range(2000):
            outcome(MUTATIONS[number % len(MUTATIONS)](rng, rng.choice(payloads)))
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


def header_with(key: str, value: bytes) -> bytes:
    """A header whose `key` holds the given msgpack bytes."""
    header = msgpack.unpackb(split(encode_group(sample(random.Random(2))))[0])
    return msgpack.packb(header | {key: "@"}).replace(msgpack.packb(key) + b"\xa1@", msgpack.packb(key) + value)


LARGEST = MAX_HEADER_BYTES - 4096
MONSTERS = {
    **{f"nested {depth} deep": b"\x91" * depth + b"\x00" for depth in (500, 900, 1000, 1020, 1100, LARGEST)},
    "long text": b"\xdb" + LARGEST.to_bytes(4, "big") + b"x" * LARGEST,
    "long bytes": b"\xc6" + LARGEST.to_bytes(4, "big") + b"x" * LARGEST,
    "text that is not there": b"\xdb\xff\xff\xff\xff",
    "array that is not there": b"\xdd\xff\xff\xff\xff",
    "map that is not there": b"\xdf\xff\xff\xff\xff",
    "longest array": b"\xdc\xff\xff" + b"\x00" * 0xFFFF,
    "wide and flat": b"\xdc\xff\xff" + (b"\x9f" + b"\x00" * 15) * 0xFFFF,
    "wide and empty": b"\x9f" + (b"\xdc\xff\xff" + b"\x90" * 0xFFFF) * 15,
    "extension": b"\xc7\xff\x05" + b"x" * 255,
    "time": b"\xd6\xff\x00\x00\x00\x00",
    "no text": b"\xa2\xff\xfe",
}


@pytest.mark.parametrize("key", ["index", "prompt_tokens", "actor", "seconds", "completions"])
@pytest.mark.parametrize("monster", MONSTERS)
def test_monsters_in_the_header(key: str, monster: str) -> None:
    body = split(encode_group(sample(random.Random(2))))[1]
    payload = seal(header_with(key, MONSTERS[monster]), body)
    started = time.process_time()
    tracemalloc.start()
    try:
        assert outcome(payload) == "CodecError"
        assert tracemalloc.get_traced_memory()[1] < 4 * MEMORY_BYTES
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5 * SECONDS_EACH  # watched memory is slow memory
