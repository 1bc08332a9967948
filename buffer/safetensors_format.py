"""The header of a safetensors file, written and read piecewise so that tensors stream to and from any file system.

The library of that name wants the whole file in memory or on a local disk. Format: u64 header bytes | JSON object of
tensor name → dtype, shape, data_offsets | data.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import WeightsDamagedError

PRELUDE = struct.Struct("<Q")
MAX_HEADER_BYTES = 100 << 20
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """Where in the file a tensor lies; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Header of a file that holds tensors (name, dtype, shape, bytes) one after the other.

    Raises:
        ValueError: a name occurs twice.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        if name in header:
            raise ValueError(f"tensor {name} occurs twice")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return PRELUDE.pack(len(text)) + text


def read_header(file: Any, file_bytes: int) -> dict[str, Placement]:
    """Where each tensor of an open file of `file_bytes` bytes lies, checked to be inside it.

    Raises:
        WeightsDamagedError: the header is malformed.
    """
    prelude = file.read(PRELUDE.size)
    if len(prelude) != PRELUDE.size:
        raise WeightsDamagedError("the file is too short to be safetensors")
    (header_bytes,) = PRELUDE.unpack(prelude)
    start = PRELUDE.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > file_bytes:
        raise WeightsDamagedError(f"the safetensors header claims {header_bytes} bytes of a file of {file_bytes}")
    try:
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        placements = {name: _placement(value, start) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsDamagedError(f"the safetensors header is malformed: {error!r}") from error
    for name, placement in placements.items():
        if not start <= placement.offset <= placement.offset + placement.num_bytes <= file_bytes:
            raise WeightsDamagedError(f"tensor {name} lies outside the safetensors file")
    return placements


def _placement(value: dict[str, Any], start: int) -> Placement:
    begin, end = (int(offset) for offset in value["data_offsets"])
    return Placement(str(value["dtype"]), tuple(int(size) for size in value["shape"]), start + begin, end - begin)
