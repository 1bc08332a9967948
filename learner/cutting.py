"""Which sequences go through the model together, and what that costs.

The unit of cost is a token's passage through the model without attention; attention adds a share that grows with the
token's distance from the start of its sequence. Ranks go through their micro-batches in lock-step and wait for the
slowest in each round, so micro-batches are made equally expensive, and their number a multiple of the ranks'. The
result depends on nothing but the lengths, so that every rank finds the same one by itself.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sequences of a step are cut into micro-batches.

    Attributes:
        micro_batch_tokens: bound on the tokens of a micro-batch, padding included; a longer sequence gets one of its
            own.
        packed: one row of whole sequences, instead of a row each with padding.
        num_ranks: processes that share the micro-batches.
        attention_cost: cost of attending to a whole sequence, per token and token of its length.
    """

    micro_batch_tokens: int
    packed: bool = False
    num_ranks: int = 1
    attention_cost: float = 0.0

    def cost(self, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each sequence `[S]`, alone in its row."""
        return lengths * (1 + self.attention_cost * lengths)

    def cut(self, lengths: NDArray[np.int64], rows: Rows) -> list[Rows]:
        """Micro-batches of `rows`, indices into `lengths` in descending order of length, which each of them keeps."""
        if not len(rows):
            return []
        return self._bins(lengths, rows) if self.packed else self._slices(lengths, rows)

    def _rounded(self, count: int, num_sequences: int) -> int:
        """A number of micro-batches that ranks can share evenly, as far as there are sequences."""
        return min(math.ceil(count / self.num_ranks) * self.num_ranks, num_sequences)

    def _slices(self, lengths: NDArray[np.int64], rows: Rows) -> list[Rows]:
        """Neighbours by length, so that little is padding: the smallest bound on cost that gives the number wanted."""
        longest = lengths[rows]
        costs = self.cost(longest)

        def sliced(bound: float) -> list[int]:
            stops = [0]
            while (first := stops[-1]) < len(rows):
                fitting = min(self.micro_batch_tokens // int(longest[first]), int(bound / costs[first] + 1e-9))
                stops.append(min(first + max(1, fitting), len(rows)))
            return stops

        low, high = float(costs[0]), max(float(costs[0]) * len(rows), 1.0)
        wanted = self._rounded(len(sliced(high)) - 1, len(rows))
        while high - low > 1e-3 * low:
            middle = (low + high) / 2
            low, high = (low, middle) if len(sliced(middle)) - 1 <= wanted else (middle, high)
        stops = sliced(high)
        return [rows[first:stop] for first, stop in pairwise(stops)]

    def _bins(self, lengths: NDArray[np.int64], rows: Rows) -> list[Rows]:
        """The longest first, each into the cheapest micro-batch that has room for it; dearest micro-batches first."""
        sizes, costs = lengths[rows], self.cost(lengths[rows])
        needed = math.ceil(int(sizes.sum()) / self.micro_batch_tokens)
        while (chosen := self._fill(sizes, costs, self._rounded(needed, len(rows)))) is None:
            needed += 1
        bins, spent = chosen
        return [rows[bins == number] for number in np.argsort(-spent, kind="stable") if (bins == number).any()]

    def _fill(
        self, sizes: NDArray[np.int64], costs: NDArray[np.float64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """The micro-batch of each sequence and what each of `count` costs, or None if they do not fit."""
        if count == 1 and sizes.sum() <= self.micro_batch_tokens:
            return np.zeros(len(sizes), dtype=np.int64), costs.sum(keepdims=True)
        bins = np.zeros(len(sizes), dtype=np.int64)
        tokens, spent = np.zeros(count, dtype=np.int64), np.zeros(count)
        for i, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            room = (tokens + size <= self.micro_batch_tokens) | (tokens == 0)
            if not room.any():
                return None
            number = int(np.where(room, spent, np.inf).argmin())
            bins[i] = number
            tokens[number] += size
            spent[number] += cost
        return bins, spent
