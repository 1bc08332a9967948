"""Tasks: the built-in one, and loading of one's own."""

import pytest

from actors.tasks import Task, load_task
from actors.tasks.arithmetic import Arithmetic
from protocol.errors import SettingsError


class OwnTask:
    num_prompts = 2

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def prompt(self, index: int) -> str:
        return str(index)

    def score(self, index: int, completion: str) -> float:
        return self.factor * len(completion)


def test_arithmetic_covers_every_pair_once() -> None:
    task = Arithmetic(max_operand=3)
    prompts = [task.prompt(i) for i in range(task.num_prompts)]
    assert len(set(prompts)) == 16
    assert all(task.score(i, str(eval(p[:-1]))) == 1.0 for i, p in enumerate(prompts))
    assert task.score(0, "1") == 0.0


def test_a_class_of_ones_own_is_found_by_name() -> None:
    task = load_task("tests.unit.test_actors_tasks:OwnTask", {"factor": 3})
    assert isinstance(task, Task)
    assert task.score(0, "ab") == 6.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmetics", {}, "neither one of"),
        ("no.such.module:X", {}, "cannot be imported"),
        ("actors.tasks.arithmetic:Nothing", {}, "cannot be imported"),
        ("arithmetic", {"max_operands": 3}, "do not fit"),
        ("fractions:Fraction", {}, "is no task"),
    ],
)
def test_a_wrong_task_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_task(name, options)
