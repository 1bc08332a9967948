"""Every objective once more, in plain Python and token by token: what each says about a token's loss and gradient."""

import math
from collections.abc import Callable
from typing import Any

Rows = list[list[float]]
Coefficient = tuple[list[float], list[float]]
"""Of a row's counted tokens, both over the advantage: minus the loss's derivative by the log-prob, minus the loss."""


def reference(
    name: str, logprobs: Rows, behaviour: Rows, advantages: list[float], mask: Rows, aggregation: str, **settings: Any
) -> tuple[float, Rows]:
    """Loss and gradient `[B][T]` of finite inputs."""
    ratios = [[p - q for p, q, m in zip(*row, strict=True) if m] for row in zip(logprobs, behaviour, mask, strict=True)]
    if name == "bapo":
        settings["bounds"] = bapo_bounds(ratios, advantages, **settings)
    num_tokens = sum(len(row) for row in ratios)
    num_rows = sum(bool(row) for row in ratios)
    loss, gradient = 0.0, [[0.0] * len(row) for row in logprobs]
    for b, (row, advantage) in enumerate(zip(ratios, advantages, strict=True)):
        if not row:
            continue
        share = 1 / num_tokens if aggregation == "token-mean" else 1 / (num_rows * len(row))
        counted = [t for t, m in enumerate(mask[b]) if m]
        slopes, values = ROWS[name](row, [logprobs[b][t] for t in counted], advantage, **settings)
        loss -= share * advantage * sum(values)
        for t, slope in zip(counted, slopes, strict=True):
            gradient[b][t] = -share * advantage * slope
    return loss, gradient


def _weighted(weights: list[float], logprobs: list[float]) -> Coefficient:
    return weights, [w * p for w, p in zip(weights, logprobs, strict=True)]


def _ratio(log_ratio: float) -> float:
    return math.exp(min(max(log_ratio, -20.0), 20.0))


def vespo(
    row: list[float],
    logprobs: list[float],
    advantage: float,
    *,
    k_pos: float = 2,
    lambda_pos: float = 3,
    k_neg: float = 3,
    lambda_neg: float = 2,
) -> Coefficient:
    log_w = min(max(sum(min(max(x, -20.0), 20.0) for x in row), math.log(1e-8)), 20.0)
    k, rate = (k_pos, lambda_pos) if advantage >= 0 else (k_neg, lambda_neg)
    phi = math.exp(k * log_w + rate * (1 - math.exp(log_w)))
    return _weighted([phi] * len(row), logprobs)


def _surrogate(r: float, advantage: float, low: float, high: float, dual_clip: float | None) -> tuple[float, bool]:
    """The ratio that counts, and whether it is the token's own."""
    inside = min(max(r, low), high)
    if advantage >= 0:
        return (r, True) if r <= high else (inside, False)
    if r < low:
        return inside, False
    return (r, True) if dual_clip is None or r < dual_clip else (dual_clip, False)


def _clipped(row: list[float], advantage: float, low: float, high: float, dual_clip: float | None) -> Coefficient:
    pairs = [_surrogate(_ratio(x), advantage, low, high, dual_clip) for x in row]
    return [r if own and abs(x) <= 20 else 0.0 for (r, own), x in zip(pairs, row, strict=True)], [r for r, _ in pairs]


def grpo(
    row: list[float],
    logprobs: list[float],
    advantage: float,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3,
) -> Coefficient:
    return _clipped(row, advantage, 1 - clip_low, 1 + clip_high, dual_clip)


def gspo(
    row: list[float], logprobs: list[float], advantage: float, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Coefficient:
    mean = sum(row) / len(row)
    s, own = _surrogate(math.exp(min(mean, 10.0)), advantage, 1 - clip_low, 1 + clip_high, None)
    return [s if own and mean <= 10 else 0.0] * len(row), [s] * len(row)


def sapo(
    row: list[float], logprobs: list[float], advantage: float, *, tau_pos: float = 1, tau_neg: float = 1.05
) -> Coefficient:
    tau = tau_pos if advantage > 0 else tau_neg
    gates = [1 / (1 + math.exp(-min(max(tau * (_ratio(x) - 1), -700), 700))) for x in row]
    slopes = [4 * g * (1 - g) * _ratio(x) if abs(x) <= 20 else 0.0 for g, x in zip(gates, row, strict=True)]
    return slopes, [4 / tau * g for g in gates]


def cispo(
    row: list[float], logprobs: list[float], advantage: float, *, ratio_min: float = 0, ratio_max: float = 5
) -> Coefficient:
    return _weighted([min(max(_ratio(x), ratio_min), ratio_max) for x in row], logprobs)


def tis(row: list[float], logprobs: list[float], advantage: float, *, ratio_max: float = 2) -> Coefficient:
    return _weighted([min(_ratio(x), ratio_max) for x in row], logprobs)


def topr(row: list[float], logprobs: list[float], advantage: float, *, ratio_max: float = 1) -> Coefficient:
    weight = 1.0 if advantage >= 0 else min(math.exp(min(sum(row), 700)), ratio_max)
    return _weighted([weight] * len(row), logprobs)


def reinforce(row: list[float], logprobs: list[float], advantage: float) -> Coefficient:
    return _weighted([1.0] * len(row), logprobs)


def bapo(
    row: list[float],
    logprobs: list[float],
    advantage: float,
    *,
    bounds: tuple[float, float],
    dual_clip: float | None = 3,
    **_: float,
) -> Coefficient:
    return _clipped(row, advantage, *bounds, dual_clip)


def bapo_bounds(
    ratios: Rows,
    advantages: list[float],
    *,
    positive_share: float = 0.5,
    low_start: float = 0.6,
    low_max: float = 0.9,
    low_step: float = 0.05,
    high_start: float = 1.2,
    high_max: float = 3.0,
    high_step: float = 0.05,
    **_: float | None,
) -> tuple[float, float]:
    """The search as the authors' code does it: one bound after the other, all tokens looked at again at every step."""
    tokens = [(_ratio(x), a) for row, a in zip(ratios, advantages, strict=True) for x in row]
    wanted = positive_share / (1 - positive_share)  # the authors' target is positive over negative

    def reached(low: float, high: float) -> bool:
        positive = math.fsum(min(r, high) * a for r, a in tokens if a > 0)
        negative = math.fsum(-max(r, low) * a for r, a in tokens if a < 0)
        return positive >= wanted * negative

    low, high, steps = low_start, high_start, 0
    while not reached(low, high) and low < low_max:
        steps += 1
        low = min(low_start + steps * low_step, low_max)
    steps = 0
    while not reached(low, high) and high < high_max:
        steps += 1
        high = min(high_start + steps * high_step, high_max)
    return low, high


ROWS: dict[str, Callable[..., Coefficient]] = {
    f.__name__: f for f in (vespo, grpo, gspo, sapo, cispo, topr, bapo, tis, reinforce)
}
