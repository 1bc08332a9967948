"""The wire format: round trip, refusal of anything damaged, and limits checked before allocation."""

import random
import struct

import msgpack
import numpy as np
import pytest
import xxhash

from protocol.codec import MAX_BODY_BYTES, PRELUDE, decode_group, encode_group
from protocol.errors import CodecError
from protocol.trajectory import Completion, Group, Ticket, VersionSpan


def make_completion(length: int = 3, reward: float = 1.0, version: int = 2, **changes: object) -> Completion:
    fields: dict[str, object] = {
        "tokens": np.arange(length, dtype=np.int32),
        "logprobs": np.full(length, -0.25, np.float32),
        "mask": np.ones(length, np.uint8),
        "spans": (VersionSpan(0, length, version),),
        "reward": reward,
        "finish_reason": "stop",
    }
    return Completion(**(fields | changes))  # type: ignore[arg-type]


def make_group(completions: tuple[Completion, ...] | None = None, index: int = 7) -> Group:
    if completions is None:
        spans = (VersionSpan(0, 2, 4), VersionSpan(2, 5, 6))
        completions = (make_completion(), make_completion(5, 0.0, spans=spans, finish_reason="length"))
    return Group(Ticket(index, 1), 3, np.array([5, 6], np.int32), completions, "actor-0", 0.5)


def reseal(header: dict[str, object], body: bytes) -> bytes:
    packed = msgpack.packb(header)
    payload = PRELUDE.pack(b"VSPG", 1, 0, len(packed), len(body)) + packed + body
    return payload + xxhash.xxh3_64_digest(payload)


def parts(payload: bytes) -> tuple[dict[str, object], bytes]:
    _, _, _, header_bytes, body_bytes = PRELUDE.unpack_from(payload)
    end = PRELUDE.size + header_bytes
    return msgpack.unpackb(payload[PRELUDE.size : end]), payload[end : end + body_bytes]


def test_round_trip_keeps_everything() -> None:
    group = make_group()
    back = decode_group(encode_group(group))
    assert back.ticket == group.ticket
    assert (back.prompt_index, back.actor, back.generation_seconds) == (3, "actor-0", 0.5)
    assert back.prompt_tokens.tolist() == [5, 6]
    assert back.oldest_version == 2
    assert back.num_tokens == 8
    for ours, theirs in zip(group.completions, back.completions, strict=True):
        for name in ("tokens", "logprobs", "mask"):
            expected, actual = getattr(ours, name), getattr(theirs, name)
            assert actual.dtype == expected.dtype
            assert actual.tobytes() == expected.tobytes()
        assert (theirs.spans, theirs.reward, theirs.finish_reason) == (ours.spans, ours.reward, ours.finish_reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprobs": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({"logprobs": np.array([-1, 0.5, -1], np.float32)}, "above zero"),
        ({"logprobs": np.zeros(2, np.float32)}, "2 log-probs"),
        ({"tokens": np.array([1, -1, 2], np.int32)}, "negative token"),
        ({"reward": float("nan")}, "reward is nan"),
        ({"spans": (VersionSpan(0, 2, 1),)}, "tile"),
        ({"spans": (VersionSpan(0, 2, 1), VersionSpan(1, 3, 1))}, "tile"),
        ({"spans": ()}, "tile"),
        ({"finish_reason": "abort"}, "finish reason"),
    ],
)
def test_what_cannot_be_trained_on_is_not_sent(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        encode_group(make_group((make_completion(), make_completion(**changes))))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(CodecError, match="at least 2"):
        encode_group(make_group((make_completion(),)))


def test_every_flipped_byte_is_noticed() -> None:
    payload = encode_group(make_group())
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(CodecError):
            decode_group(bytes(damaged))


def test_mutations_with_a_valid_checksum_raise_only_typed_errors() -> None:
    rng = random.Random(0)
    header, body = parts(encode_group(make_group()))
    values = [None, -1, 1 << 60, "x", [], {}, 1.5, True, [[0, 1, 2]] * 5, float("inf"), b"\x00"]
    keys = list(header)
    for _ in range(3000):
        changed = dict(header)
        if rng.random() < 0.5:
            changed[rng.choice(keys)] = rng.choice(values)
        else:
            first = dict(header["completions"][0])  # type: ignore[index]
            first[rng.choice(list(first))] = rng.choice(values)
            changed["completions"] = [first, *header["completions"][1:]]  # type: ignore[index]
        try:
            decode_group(reseal(changed, body))
        except CodecError:
            continue


def test_a_claimed_size_is_checked_before_allocation() -> None:
    payload = PRELUDE.pack(b"VSPG", 1, 0, 10, MAX_BODY_BYTES + 1) + bytes(64)
    with pytest.raises(CodecError, match="over the limits"):
        decode_group(payload)
    header, body = parts(encode_group(make_group()))
    with pytest.raises(CodecError, match="add up"):
        decode_group(reseal(header | {"prompt_tokens": 1 << 40}, body))


def test_another_format_version_is_named() -> None:
    payload = bytearray(encode_group(make_group()))
    struct.pack_into("<H", payload, 4, 2)
    with pytest.raises(CodecError, match="format 2"):
        decode_group(bytes(payload))
