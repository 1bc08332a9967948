"""From a TOML recipe, `VESPO_SECTION__KEY` variables and `section.key=value` arguments to one `Settings`, with origins.

Later layers win: defaults, recipe, environment, command line. Every mistake of every layer is collected and reported at
once, each with the place it came from. Values of variables and arguments are read as TOML, or else as plain text; an
empty value returns the key to its default. If one layer gives `model.path` and another `model.toy`, the later one is
meant and the other dropped; if a layer chooses another objective, what earlier layers set for the old one is dropped
too. Relative paths are relative to the working directory.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from protocol import objectives
from protocol.errors import SettingsError
from protocol.recipe_keys import KeyPath, all_keys, describe, find_field, is_section, nearest, sections, takes_text
from protocol.settings import Settings

DEFAULT = "default"
COMMAND_LINE = "command line"
ENVIRONMENT_PREFIX = "VESPO_"
REDACTED = "***"
_URL_PASSWORD = re.compile(r"(?<=//)([^/@\s]*:)?[^/@\s]+(?=@)|(?<=[?&]password=)[^&\s]+")
_SECRET_NAME = re.compile(r"password|secret|token$|api_?key|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Row:
    """One resolved setting, fit for showing: secrets are redacted."""

    key: str
    value: Any
    origin: str
    doc: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings of a run, and for every leaf (`section.key`) where its value came from."""

    settings: Settings
    origins: dict[str, str]

    def rows(self) -> list[Row]:
        """Every setting in the order of its definition."""
        values = dict(_leaves(self.settings.model_dump(mode="json"), ()))
        return [
            Row(".".join(path), redact(path[-1], value), self.origins[".".join(path)], describe(path))
            for path, value in values.items()
        ]


@dataclass(frozen=True, slots=True)
class _Assignment:
    path: KeyPath
    value: Any
    origin: str
    layer: int


def resolve(recipe_path: Path | str, overrides: Sequence[str], environ: Mapping[str, str]) -> Resolved:
    """Merge all layers and validate.

    Args:
        recipe_path: TOML file.
        overrides: `section.key=value` arguments; a later one wins.
        environ: environment; only names with `__` after `VESPO_` count, so other tools' variables do not collide.

    Raises:
        SettingsError: the file cannot be read, or any layer holds an unknown key or an invalid value; one line each.
    """
    problems: list[str] = []
    assignments = [
        *_from_recipe(Path(recipe_path), problems),
        *_from_environment(environ, problems),
        *_from_arguments(overrides, problems),
    ]
    assignments = _one_objective(_one_model_source(assignments))
    merged: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for assignment in assignments:
        _assign(merged, origins, assignment)
    settings: Settings | None = None
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        objective = merged.get("objective", {}).get("name", objectives.DEFAULT)
        problems += [_translate(e, origins, Path(recipe_path), objective) for e in error.errors()]
    if problems or settings is None:
        raise SettingsError("\n".join(dict.fromkeys(problems)))
    leaves = _leaves(settings.model_dump(mode="json"), ())
    return Resolved(settings, {".".join(path): origins.get(path, DEFAULT) for path, _ in leaves})


def redact(name: str, value: Any) -> Any:
    """`value` of the setting `name` without passwords: those inside URLs, and values of keys named like a secret."""
    if isinstance(value, list | tuple):
        return [redact(name, item) for item in value]
    if isinstance(value, str):
        if _SECRET_NAME.search(name):
            return REDACTED
        return _URL_PASSWORD.sub(lambda match: (match[1] or "") + REDACTED, value)
    return value


def _from_recipe(path: Path, problems: list[str]) -> list[_Assignment]:
    origin = f"recipe {path}"
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"recipe {path} does not exist") from None
    except OSError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {path} is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"recipe {path} is not valid TOML: {error}") from error
    return list(_checked(_leaves(document, ()), origin, 1, problems))


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> list[_Assignment]:
    found: list[_Assignment] = []
    for variable in sorted(environ):
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or "__" not in name:
            continue
        path = tuple(name.lower().split("__"))
        found += _checked(_parsed(path, environ[variable]), f"environment {variable}", 2, problems)
    return found


def _from_arguments(overrides: Sequence[str], problems: list[str]) -> list[_Assignment]:
    found: list[_Assignment] = []
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals or not key.strip():
            problems.append(f"{COMMAND_LINE}: {argument!r} is not of the form section.key=value")
            continue
        found += _checked(_parsed(tuple(key.strip().split(".")), text), COMMAND_LINE, 3, problems)
    return found


def _parsed(path: KeyPath, text: str) -> Iterator[tuple[KeyPath, Any]]:
    """Leaves that one variable or argument sets; an inline table may set several, an empty text resets (None)."""
    if not text.strip():
        yield path, None
        return
    value: Any = text
    try:
        document = tomllib.loads(f"value = {text}")
        value = document["value"] if len(document) == 1 else text
    except tomllib.TOMLDecodeError:
        pass
    if takes_text(path) and not isinstance(value, str):
        value = text  # a run may be called 2024
    if isinstance(value, dict):
        yield from _leaves(value, path)
    else:
        yield path, value


def _leaves(table: Mapping[str, Any], prefix: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Flatten nested tables; an empty table is a leaf, since `[model.toy]` alone means something."""
    for name, value in table.items():
        path = (*prefix, name)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value
    if not table and prefix:
        yield prefix, {}


def _checked(
    leaves: Iterator[tuple[KeyPath, Any]], origin: str, layer: int, problems: list[str]
) -> Iterator[_Assignment]:
    for path, value in leaves:
        key = ".".join(path)
        if is_section(path) and value is not None and value != {}:
            problems.append(f"{origin}: {key} is a section and takes keys, not the value {value!r}")
        elif is_section(path) or find_field(path) is not None:
            yield _Assignment(path, value, origin, layer)
        else:
            what = "key" if path[0] in sections() else f"section [{path[0]}] of key"
            problems.append(f"{origin}: unknown {what} {key}{_hint(path)}")


def _hint(path: KeyPath) -> str:
    if (match := nearest(".".join(path))) is not None:
        return f"; did you mean {match}?"
    keys = [key for key in all_keys() if key.startswith(f"{path[0]}.")]
    return f"; [{path[0]}] has {', '.join(keys)}" if keys else f"; sections are {', '.join(sections())}"


def _one_model_source(assignments: list[_Assignment]) -> list[_Assignment]:
    """Where `model.path` and `model.toy` come from different layers, keep only the one of the later layer."""
    given = [a for a in assignments if a.value is not None]
    path_layer = max((a.layer for a in given if a.path == ("model", "path")), default=0)
    toy_layer = max((a.layer for a in given if a.path[:2] == ("model", "toy")), default=0)
    if not path_layer or not toy_layer or path_layer == toy_layer:
        return assignments
    dropped = "path" if toy_layer > path_layer else "toy"
    return [a for a in assignments if a.path[:2] != ("model", dropped)]


def _one_objective(assignments: list[_Assignment]) -> list[_Assignment]:
    """Drop hyperparameters of an objective that a later layer replaces by another."""
    chosen, since = objectives.DEFAULT, 0
    for assignment in assignments:
        if assignment.path == ("objective", "name"):
            name = assignment.value or objectives.DEFAULT
            since = max(since, assignment.layer) if name != chosen else since
            chosen = name
    return [a for a in assignments if not (a.layer < since and _is_hyperparameter(a.path))]


def _is_hyperparameter(path: KeyPath) -> bool:
    return len(path) > 1 and path[0] == "objective" and path[1] not in objectives.COMMON


def _assign(merged: dict[str, Any], origins: dict[KeyPath, str], assignment: _Assignment) -> None:
    *parents, name = assignment.path
    table = merged
    for parent in parents:
        if not isinstance(table.get(parent), dict):
            table[parent] = {}
        table = table[parent]
    if assignment.value is None:
        table.pop(name, None)
        for path in [p for p in origins if p[: len(assignment.path)] == assignment.path]:
            del origins[path]
    elif is_section(assignment.path):
        table.setdefault(name, {})
    else:
        table[name] = assignment.value
        origins[assignment.path] = assignment.origin


def _translate(error: ErrorDetails, origins: Mapping[KeyPath, str], recipe_path: Path, objective: str) -> str:
    """One line a person can act on: key, value, origin, what is wrong, what the key means."""
    path = tuple(part for part in error["loc"] if isinstance(part, str))
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if error["type"] == "missing":
        return f"recipe {recipe_path}: {'.'.join(path)} is missing{_missing_hint(path)}"
    if error["type"] == "extra_forbidden":  # a key of another objective: keys that none has were found before
        return f"{'.'.join(path)} ({_origin(path, origins)}): {objectives.stray(objective, path[-1])}"
    while len(path) > 1 and path not in origins and find_field(path) is None:
        path = path[:-1]
    key = ".".join(path)
    if isinstance(error["input"], (dict, BaseModel)):  # a rule about several keys, of one section or of several
        named = {".".join(p): o for p, o in origins.items() if p[: len(path)] == path}
        named = {name: o for name, o in named.items() if name.removeprefix(f"{key}.") in message}
        where = "; ".join(f"{name} from {origin}" for name, origin in named.items())
        return (f"[{key}]: " if key else "") + message + (f" ({where})" if where else "")
    shown = redact(path[-1], error["input"])
    doc = describe(path)
    return f"{key} = {shown!r} ({origins.get(path, DEFAULT)}): {message}" + (f". {doc}" if doc else "")


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where the value of a key came from; of a free table, where its first one did."""
    return next((origin for key, origin in origins.items() if key[: len(path)] == path), DEFAULT)


def _missing_hint(path: KeyPath) -> str:
    return ': give path = "DIRECTORY" of a Hugging Face model, or a [model.toy] table' if path == ("model",) else ""
