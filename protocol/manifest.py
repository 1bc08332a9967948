"""What a weight version is: its tensors with their checksums, where the payload lies, and the parity probe."""

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.errors import CodecError

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
MAX_MANIFEST_BYTES = 64 << 20
_PAYLOAD = re.compile(r"[A-Za-z0-9._-]{1,200}")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Frozen):
    """One tensor of a version, named as in the Hugging Face checkpoint; `xxh3` is xxh3-64 of its bytes, in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    xxh3: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's contiguous data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


class Probe(_Frozen):
    """Token sequences and the learner's log-probs on them at temperature 1, to measure parity.

    `logprobs[i][t]` belongs to `tokens[i][t + 1]` given the tokens before it.
    """

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Probe":
        if [len(t) - 1 for t in self.tokens] != [len(p) for p in self.logprobs]:
            raise ValueError("a probe has one log-prob for each token after the first")
        return self


class Manifest(_Frozen):
    """A published policy version. `payload` is a plain file name inside the weight store.

    A `full` payload is a safetensors file of all tensors. A `delta` payload turns the tensors of version `base` into
    this version's (`buffer.delta`). `tensors` and their checksums are those of the whole version either way.
    """

    version: int = Field(ge=0)
    step: int = Field(ge=0)
    epoch: int = Field(ge=1)
    kind: Literal["full", "delta"]
    base: int | None = Field(default=None, ge=0)
    payload: str
    payload_bytes: int = Field(gt=0)
    tensors: tuple[TensorEntry, ...] = Field(min_length=1)
    probe: Probe

    @model_validator(mode="after")
    def _safe(self) -> "Manifest":
        if not _PAYLOAD.fullmatch(self.payload) or self.payload.startswith("."):
            raise ValueError(f"payload {self.payload!r} is not a plain file name")
        for tensor in self.tensors:
            if tensor.dtype not in DTYPE_BYTES or min(tensor.shape, default=0) < 0:
                raise ValueError(f"tensor {tensor.name}: unknown dtype {tensor.dtype} or negative shape")
        if self.kind == "full" and sum(t.num_bytes for t in self.tensors) > self.payload_bytes:
            raise ValueError("payload is smaller than its tensors")
        if (self.kind == "delta") != (self.base is not None):
            raise ValueError(f"a {self.kind} version names {'no' if self.base is None else 'a'} base")
        if self.base is not None and self.base >= self.version:
            raise ValueError(f"version {self.version} cannot build on version {self.base}")
        return self

    @classmethod
    def parse(cls, data: bytes) -> "Manifest":
        """Parse a manifest's JSON.

        Raises:
            CodecError: too large, not JSON, or not a valid manifest.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise CodecError(f"weight manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise CodecError(f"weight manifest is invalid: {error.errors()[0]['msg']}") from error
