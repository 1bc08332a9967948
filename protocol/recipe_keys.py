"""Which keys a recipe may hold, what they mean, which one somebody meant: derived from `protocol.settings` alone.

Under `[objective]` stand the keys of every objective; which of them the chosen one has is for its table to say.
"""

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from protocol.objectives import TABLES, ObjectiveSettings
from protocol.settings import Settings

KeyPath = tuple[str, ...]
SIMILAR_ENOUGH = 0.55
NAME_WEIGHT = 0.75


def sections() -> tuple[str, ...]:
    """Names of the top-level sections."""
    return tuple(Settings.model_fields)


@lru_cache(maxsize=1)
def _fields() -> dict[KeyPath, FieldInfo]:
    fields: dict[KeyPath, FieldInfo] = {}
    for path, field in _walk(Settings, ()):
        fields.setdefault(path, field)  # the first table that has a key documents it
    return fields


@lru_cache(maxsize=1)
def all_keys() -> tuple[str, ...]:
    """Every valid full key, such as `model.toy.hidden_size`, in the order of definition."""
    return tuple(".".join(path) for path in _fields() if not is_section(path))


def find_field(path: KeyPath) -> FieldInfo | None:
    """The field a path names, None if there is none; a key below a free table (`task.options.x`) gets the table's."""
    fields = _fields()
    if path in fields:
        return fields[path]
    for length in range(len(path) - 1, 1, -1):
        field = fields.get(path[:length])
        if field is not None:
            return field if _is_free_table(field) else None
    return None


def takes_text(path: KeyPath) -> bool:
    """Whether any text is a valid value of the key."""
    field = _fields().get(path)
    if field is None or _is_free_table(field):
        return False
    return str in (field.annotation, *get_args(field.annotation))


def _is_free_table(field: FieldInfo) -> bool:
    return dict in {get_origin(annotation) for annotation in (field.annotation, *get_args(field.annotation))}


def is_section(path: KeyPath) -> bool:
    """Whether the path names a table with fixed keys, not a value."""
    field = _fields().get(path)
    return field is not None and _model_of(field.annotation) is not None


def describe(path: KeyPath) -> str:
    """The setting's docstring on one line, empty for a key inside a free table."""
    field = _fields().get(path)
    return " ".join((field.description or "").split()) if field is not None else ""


def nearest(wrong: str) -> str | None:
    """The valid full key that `wrong` most likely means: names count most, so a name in the wrong section is found."""
    wrong_section, _, wrong_name = wrong.rpartition(".")

    def score(key: str) -> float:
        section, _, name = key.rpartition(".")
        initials = "".join(word[0] for word in name.split("_"))
        names = 1.0 if wrong_name in (name, initials) else _similarity(wrong_name, name)
        return NAME_WEIGHT * names + (1 - NAME_WEIGHT) * _similarity(wrong_section, section)

    best = max(all_keys(), key=score)
    return best if score(best) >= SIMILAR_ENOUGH else None


def _similarity(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _walk(model: type[BaseModel], prefix: KeyPath) -> Iterator[tuple[KeyPath, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name), field
        if (inner := _model_of(field.annotation)) is not None:
            for table in TABLES if inner is ObjectiveSettings else (inner,):
                yield from _walk(table, (*prefix, name))


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
