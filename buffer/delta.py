"""What changed between two versions of a tensor: the positions whose bits differ, and their new bits.

    u64 changed elements | u64 bytes of the gaps | u64 bytes of the next | zstd(gaps) | zstd(new bits)

One optimizer update in bfloat16 moves few elements to the next number, so gaps between changed positions are small:
each is written as its remainder by 255 behind as many bytes 255 as it has wholes, which numpy decodes at once. New bits
are written as planes, every element's first byte before every element's second, since high bytes repeat and low ones do
not. A tensor that changed everywhere has no gaps. New bits replace old ones, they are not added: applying a delta twice
is applying it once, and nothing is rounded. Which tensors there are, and whether the result is right, is the manifest's
business (`buffer.store`).
"""

import struct
from typing import Any

import numpy as np
import zstandard

from protocol.errors import WeightsDamagedError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Positions = np.ndarray[Any, np.dtype[np.int64]]

HEAD = struct.Struct("<QQQ")
WHOLE = 255
LEVEL = 1
"""Of zstd: higher levels cost many times the time for a few percent."""
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(old: memoryview, new: memoryview, item_bytes: int) -> bytes:
    """How to get from `old` to `new`, two tensors of as many elements of `item_bytes` bytes; empty if they are equal.

    Raises:
        ValueError: they differ in size.
    """
    if old.nbytes != new.nbytes:
        raise ValueError(f"a delta between tensors of {old.nbytes} and {new.nbytes} bytes")
    before, after = (np.frombuffer(data, _INTEGERS[item_bytes]) for data in (old, new))
    if before.ctypes.data == after.ctypes.data:  # frozen: the same memory, which need not be read
        return b""
    different = before != after
    num_changed = int(np.count_nonzero(different))
    if num_changed == 0:
        return b""
    if num_changed == len(after):
        gaps, values = np.zeros(0, np.uint8), after
    else:
        positions = np.flatnonzero(different)
        gaps, values = _gaps(positions), after[positions]
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(num_changed, item_bytes).T)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    packed_gaps = compressor.compress(gaps.data)
    head = HEAD.pack(num_changed, gaps.nbytes, len(packed_gaps))
    return head + packed_gaps + compressor.compress(planes.reshape(-1).data)


def apply(target: bytearray, delta: bytes, item_bytes: int) -> None:
    """Turn `target`, the old tensor, into the new one.

    Raises:
        WeightsDamagedError: the delta is malformed, or of another tensor; `target` may be spoilt.
    """
    elements = np.frombuffer(target, _INTEGERS[item_bytes])
    if len(delta) < HEAD.size:
        raise WeightsDamagedError("the delta is too short")
    num_changed, gap_bytes, packed_bytes = HEAD.unpack_from(delta)
    if not 0 < num_changed <= len(elements):
        raise WeightsDamagedError(f"the delta changes {num_changed} of {len(elements)} elements")
    if gap_bytes > num_changed + len(elements) // WHOLE:
        raise WeightsDamagedError(f"{gap_bytes} bytes of gaps are too many for {num_changed} changes")
    split = HEAD.size + packed_bytes
    gaps = _decompress(delta[HEAD.size : split], gap_bytes)
    planes = _decompress(delta[split:], num_changed * item_bytes)
    values = np.ascontiguousarray(planes.reshape(item_bytes, num_changed).T).reshape(-1)
    if num_changed == len(elements):
        if gap_bytes:
            raise WeightsDamagedError("a delta of every element has gaps")
        elements[:] = values.view(elements.dtype)
        return
    elements[_positions(gaps, num_changed, len(elements))] = values.view(elements.dtype)


def _gaps(positions: Positions) -> Bytes:
    """Bytes of the distances from each position to the one before, less one; the first counts from the start."""
    distances = np.diff(positions, prepend=-1) - 1
    wholes, remainders = distances // WHOLE, (distances % WHOLE).astype(np.uint8)
    gaps = np.full(len(distances) + int(wholes.sum()), WHOLE, np.uint8)
    gaps[np.cumsum(wholes + 1) - 1] = remainders
    return gaps


def _positions(gaps: Bytes, num_changed: int, num_elements: int) -> Positions:
    """The positions, ascending, from their gaps."""
    ends = gaps != WHOLE
    if int(np.count_nonzero(ends)) != num_changed or not ends[-1]:
        raise WeightsDamagedError(f"the gaps are not those of {num_changed} changes")
    # each gap stands for as many elements and the changed one behind it; sums stay far below 2**63
    positions: Positions = np.cumsum(gaps.astype(np.int64) + ends)[ends] - 1
    if positions[-1] >= num_elements:
        raise WeightsDamagedError(f"the delta changes element {positions[-1]} of {num_elements}")
    return positions


def _decompress(data: bytes, num_bytes: int) -> Bytes:
    """The content of a zstd frame, which must be exactly `num_bytes` bytes."""
    try:
        # the decoder allocates what the frame's head claims, and never more
        claimed_bytes = zstandard.frame_content_size(data)
        if claimed_bytes != num_bytes:
            raise WeightsDamagedError(f"a part of the delta holds {claimed_bytes} bytes instead of {num_bytes}")
        content = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WeightsDamagedError(f"the delta cannot be decompressed: {error}") from error
    return np.frombuffer(content, np.uint8)
