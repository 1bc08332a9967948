"""Three ways from hidden states to the gradient of the VESPO loss, and what one pass of each costs in its process.

`ours` is the learner's: tiles of logits. `plain` is the formula as it stands: all logits, log_softmax, gather. `trl` is
what TRL 1.16's GRPOTrainer runs with `loss_type="vespo"`: its chunked head and its kernel weights, called as the
trainer calls them. All compute the entropy of every token too, which both trainers report. On the CPU, in float32.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.9
TRL_CHUNK = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py
KERNEL: dict[str, Any] = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}


@dataclass(frozen=True, slots=True)
class Size:
    """What is computed: `sequences` times `length` tokens, `width` numbers each, of a `vocabulary`."""

    name: str
    vocabulary: int
    sequences: int
    length: int
    width: int


@dataclass(frozen=True, slots=True)
class Cost:
    """One forward and backward pass: wall time, memory above what the inputs take, and what it computed.

    Attributes:
        peak_bytes: most resident memory at any moment, gradients included, minus that before.
        results: loss, norm of the gradient by hidden states, norm of the gradient by the head's weight.
    """

    seconds: float
    peak_bytes: int
    results: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Inputs:
    hidden: "Tensor"  # [B · T, H] float32
    weight: "Tensor"  # [V, H] float32
    targets: "Tensor"  # [B · T] int64
    behaviour: "Tensor"  # [B, T] float32
    advantages: "Tensor"  # [B] float32
    mask: "Tensor"  # [B, T] bool


def prepare(path: str, libraries: Path | None) -> None:
    """Make this process ready for `measure`: threads, imports and a small pass that starts every kernel."""
    import torch

    if libraries is not None:
        sys.path.append(str(libraries))  # last: what the run itself uses stays what it was
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure(path, Size("warm-up", 64, 2, 4, 8))


def measure(path: str, size: Size) -> Cost:
    """Forward and backward once; memory freed earlier is given back to the system before, so that it counts again."""
    inputs, loss_of = _inputs(size), _path(path)
    inputs.hidden.grad = inputs.weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before, started = _status_bytes("VmRSS"), time.perf_counter()
    loss = loss_of(inputs)
    loss.backward()
    seconds, peak = time.perf_counter() - started, _status_bytes("VmHWM")
    norms = (float(tensor.grad.norm()) for tensor in (inputs.hidden, inputs.weight) if tensor.grad is not None)
    return Cost(seconds, peak - before, (float(loss.detach()), *norms))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@lru_cache(maxsize=4)
def _inputs(size: Size) -> _Inputs:
    """The same numbers in every process: weights near zero, sampled under a policy that is a little older."""
    import torch

    random = torch.Generator().manual_seed(0)
    tokens = size.sequences * size.length
    hidden = torch.randn(tokens, size.width, generator=random)
    weight = torch.randn(size.vocabulary, size.width, generator=random) * 0.02 / size.width**0.5
    uniform = torch.full((size.sequences, size.length), float(size.vocabulary)).log().neg()
    return _Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=torch.randint(0, size.vocabulary, (tokens,), generator=random),
        behaviour=uniform + 0.01 * torch.randn(size.sequences, size.length, generator=random),
        advantages=torch.randn(size.sequences, generator=random),
        mask=torch.ones(size.sequences, size.length, dtype=torch.bool),
    )


@lru_cache(maxsize=1)
def _path(name: str) -> Callable[[_Inputs], Any]:
    paths = {"ours": _ours, "plain": _plain, "trl": _trl}
    return paths[name]()


def _ours() -> Callable[[_Inputs], Any]:
    from types import SimpleNamespace

    from learner.logprobs import LogitShape, LogprobHead, scatter_rows
    from learner.objectives import compute_objective

    def loss(inputs: _Inputs) -> Any:
        head = LogprobHead(SimpleNamespace(weight=inputs.weight))
        logprobs, _ = head(inputs.hidden, inputs.targets, LogitShape(temperature=TEMPERATURE))
        grid = scatter_rows(logprobs, inputs.mask)
        return compute_objective("vespo", grid, inputs.behaviour, inputs.advantages, inputs.mask, **KERNEL).loss

    return loss


def _plain() -> Callable[[_Inputs], Any]:
    import torch

    from learner.objectives import compute_objective

    def loss(inputs: _Inputs) -> Any:
        distribution = ((inputs.hidden @ inputs.weight.T) / TEMPERATURE).log_softmax(-1)
        logprobs = distribution.gather(1, inputs.targets[:, None]).view(inputs.mask.shape)
        with torch.no_grad():
            (distribution.exp() * distribution).sum(-1)
        return compute_objective("vespo", logprobs, inputs.behaviour, inputs.advantages, inputs.mask, **KERNEL).loss

    return loss


def _trl() -> Callable[[_Inputs], Any]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.grpo_trainer import GRPOTrainer

    def loss(inputs: _Inputs) -> Any:
        outputs = ("log_probs", "entropy")
        flat, *_ = ChunkedLogProbFunction.apply(
            inputs.hidden, inputs.weight, None, inputs.targets, TEMPERATURE, TRL_CHUNK, None, 1.0, outputs
        )
        logprobs, advantages = flat.view(inputs.mask.shape), inputs.advantages[:, None]
        log_ratio = logprobs - inputs.behaviour
        phi = GRPOTrainer.get_gamma_weights(advantages, log_ratio, inputs.mask, None, **KERNEL)
        return (-phi * advantages * logprobs * inputs.mask).sum() / inputs.mask.sum()

    return loss
