"""Addition of two small numbers, one character a token: the task of the toy recipe and of most tests."""


class Arithmetic:
    """Prompts "a+b=" for all `0 ≤ a, b ≤ max_operand`; reward 1 for the exact sum, else 0."""

    def __init__(self, max_operand: int = 9) -> None:
        if max_operand < 1:
            raise ValueError(f"max_operand must be at least 1, got {max_operand}")
        self.max_operand = max_operand

    @property
    def num_prompts(self) -> int:
        """Every ordered pair of operands."""
        return (self.max_operand + 1) ** 2

    def _operands(self, index: int) -> tuple[int, int]:
        return divmod(index, self.max_operand + 1)

    def prompt(self, index: int) -> str:
        """For example "3+4="."""
        left, right = self._operands(index)
        return f"{left}+{right}="

    def answer(self, index: int) -> str:
        """For example "7"."""
        return str(sum(self._operands(index)))

    def score(self, index: int, completion: str) -> float:
        """1 if the completion is the sum and nothing else."""
        return float(completion.strip() == self.answer(index))
