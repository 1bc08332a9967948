"""Bytes of a group: fixed prelude, msgpack header, raw little-endian arrays, checksum. Nothing is ever executed.

    magic "VSPG" | u16 format | u16 reserved | u32 header bytes | u32 body bytes | header | body | xxh3-64 of all before

The header lists lengths and scalars; the body is, for the prompt and then each completion, its int32 tokens, float32
log-probs and uint8 mask (the prompt has tokens only). Sizes are checked against the limits and against the bytes that
arrived before anything is allocated.
"""

import math
import struct
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray

from protocol.errors import CodecError
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

MAGIC = b"VSPG"
FORMAT = 1
PRELUDE = struct.Struct("<4sHHII")
CHECKSUM_BYTES = 8
MAX_HEADER_BYTES = 4 << 20
MAX_BODY_BYTES = 256 << 20
MAX_COMPLETIONS = 4096
MAX_SPANS = 1 << 16
BYTES_PER_TOKEN = 4 + 4 + 1
INT32, FLOAT32, UINT8 = np.dtype("<i4"), np.dtype("<f4"), np.dtype("u1")


def encode_group(group: Group) -> bytes:
    """Serialise a group.

    Raises:
        CodecError: the group is not one a learner could train on, or is over the size limits.
    """
    if (problem := group.problem()) is not None:
        raise CodecError(f"ticket {group.ticket.index}: {problem}; not submitted")
    header = msgpack.packb(
        {
            "index": group.ticket.index,
            "attempt": group.ticket.attempt,
            "prompt": group.prompt_index,
            "prompt_tokens": len(group.prompt_tokens),
            "actor": group.actor,
            "seconds": float(group.generation_seconds),
            "completions": [
                {
                    "tokens": len(c.tokens),
                    "spans": [[s.start, s.end, s.version] for s in c.spans],
                    "reward": float(c.reward),
                    "finish": c.finish_reason,
                }
                for c in group.completions
            ],
        }
    )
    arrays: list[NDArray[Any]] = [np.ascontiguousarray(group.prompt_tokens, INT32)]
    for c in group.completions:
        arrays += [
            np.ascontiguousarray(c.tokens, INT32),
            np.ascontiguousarray(c.logprobs, FLOAT32),
            np.ascontiguousarray(c.mask, UINT8),
        ]
    body_bytes = sum(a.nbytes for a in arrays)
    if len(header) > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES or len(group.completions) > MAX_COMPLETIONS:
        raise CodecError(
            f"ticket {group.ticket.index}: group of {len(group.completions)} completions, header {len(header)} and "
            f"body {body_bytes} bytes is over the limits ({MAX_COMPLETIONS}, {MAX_HEADER_BYTES}, {MAX_BODY_BYTES})"
        )
    parts = [PRELUDE.pack(MAGIC, FORMAT, 0, len(header), body_bytes), header, *arrays]
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    return b"".join([*parts, checksum.digest()])


def decode_group(payload: bytes) -> Group:
    """Parse and validate one group; arrays are read-only views of `payload`.

    Raises:
        CodecError: anything about the bytes is wrong; the message says what.
    """
    header, body = _split(payload)
    try:
        group = _build(header, body)
    except CodecError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CodecError(f"group header is malformed: {error!r}") from error
    if (problem := group.problem()) is not None:
        raise CodecError(f"ticket {group.ticket.index}: {problem}")
    return group


def _split(payload: bytes) -> tuple[dict[str, Any], memoryview]:
    if len(payload) < PRELUDE.size + CHECKSUM_BYTES:
        raise CodecError(f"group of {len(payload)} bytes is shorter than its prelude")
    magic, version, _, header_bytes, body_bytes = PRELUDE.unpack_from(payload)
    if magic != MAGIC or version != FORMAT:
        raise CodecError(f"not a group of format {FORMAT}: magic {magic!r}, format {version}")
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise CodecError(f"group claims header {header_bytes} and body {body_bytes} bytes, over the limits")
    end = PRELUDE.size + header_bytes + body_bytes
    if len(payload) != end + CHECKSUM_BYTES:
        raise CodecError(f"group claims {end + CHECKSUM_BYTES} bytes, {len(payload)} arrived")
    view = memoryview(payload)
    if xxhash.xxh3_64_digest(view[:end]) != bytes(view[end:]):
        raise CodecError("group checksum does not match")
    try:
        header = msgpack.unpackb(
            view[PRELUDE.size : PRELUDE.size + header_bytes], max_array_len=MAX_SPANS, max_map_len=64, max_ext_len=0
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CodecError(f"group header is not msgpack: {error!r}") from error
    if not isinstance(header, dict):
        raise CodecError("group header is not a map")
    return header, view[end - body_bytes : end]


def _build(header: dict[str, Any], body: memoryview) -> Group:
    lengths = [_count(c["tokens"]) for c in header["completions"]]
    num_prompt_tokens = _count(header["prompt_tokens"])
    if len(lengths) > MAX_COMPLETIONS or 4 * num_prompt_tokens + BYTES_PER_TOKEN * sum(lengths) != len(body):
        raise CodecError("group header's lengths do not add up to its body")
    offset = 0

    def take(dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        nonlocal offset
        array: NDArray[Any] = np.frombuffer(body, dtype, count, offset)
        offset += array.nbytes
        return array

    prompt_tokens = take(INT32, num_prompt_tokens)
    completions = tuple(
        Completion(
            tokens=take(INT32, length),
            logprobs=take(FLOAT32, length),
            mask=take(UINT8, length),
            spans=tuple(VersionSpan(_count(s), _count(e), _count(v)) for s, e, v in c["spans"]),
            reward=_number(c["reward"]),
            finish_reason=_text(c["finish"]),
        )
        for c, length in zip(header["completions"], lengths, strict=True)
    )
    return Group(
        ticket=Ticket(_count(header["index"]), _count(header["attempt"])),
        prompt_index=_count(header["prompt"]),
        prompt_tokens=prompt_tokens,
        completions=completions,
        actor=_text(header["actor"]),
        generation_seconds=_number(header["seconds"]),
    )


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise CodecError(f"group header holds {_shown(value)} where a count belongs")
    return value


def _number(value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise CodecError(f"group header holds {_shown(value)} where a finite float belongs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise CodecError("group header holds something else where a short text belongs")
    return value


def _shown(value: object) -> str:
    """A number as it is; of anything else the type, since the text of what arrived may be huge or endlessly nested."""
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"
