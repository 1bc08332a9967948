"""What is asked and how it is scored. A task of your own is a class named in the recipe as `package.module:Class`.

    class Capitals:
        def __init__(self, path: str):            # keyword arguments are the recipe's [task.options]
            self.rows = [json.loads(line) for line in open(path)]
        @property
        def num_prompts(self) -> int:
            return len(self.rows)
        def prompt(self, index: int) -> str:      # or a list of {"role": ..., "content": ...} chat messages
            return self.rows[index]["question"]
        def score(self, index: int, completion: str) -> float:
            return float(completion.strip() == self.rows[index]["answer"])

`score` may raise: the ticket then fails and is tried again; it never becomes a reward.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from protocol.errors import SettingsError

BUILT_IN = {"arithmetic": "actors.tasks.arithmetic:Arithmetic"}

Message = dict[str, str]


@runtime_checkable
class Task(Protocol):
    """A finite set of prompts with a reward for each answer."""

    @property
    def num_prompts(self) -> int:
        """Number of prompts, at least 1; fixed for the whole run."""

    def prompt(self, index: int) -> str | list[Message]:
        """Prompt `index` in `[0, num_prompts)`: plain text, or chat messages for the tokenizer's template."""

    def score(self, index: int, completion: str) -> float:
        """Reward of a completion (decoded, special tokens removed) of prompt `index`; finite."""


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """Import and build the task that a recipe names.

    Raises:
        SettingsError: there is no such class, it does not take these options, or it is no `Task`.
    """
    module_name, _, class_name = BUILT_IN.get(name, name).partition(":")
    if not class_name:
        raise SettingsError(f'task.name = {name!r} is neither one of {sorted(BUILT_IN)} nor "package.module:Class"')
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"task.name = {name!r} cannot be imported: {error}") from error
    try:
        inspect.signature(factory).bind(**options)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"[task.options] do not fit {name}: {error}") from error
    task = factory(**options)
    if not isinstance(task, Task) or task.num_prompts < 1:
        raise SettingsError(f"{name} is no task: it needs num_prompts ≥ 1, prompt(index) and score(index, completion)")
    return task
