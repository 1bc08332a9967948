"""How the command line speaks: errors on one line each, settings as annotated TOML, aligned columns."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from protocol.errors import VespoError
from protocol.recipe import Row

RED, DIM, PLAIN = "\x1b[31m", "\x1b[2m", "\x1b[0m"
ORIGIN_COLUMN = 44


def coloured(text: str, colour: str, stream: TextIO) -> str:
    """`text` in a colour if the stream is a terminal that shows colours."""
    able = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    return f"{colour}{text}{PLAIN}" if able else text


def fail(error: VespoError) -> NoReturn:
    """Print the error to standard error, a line for each problem, and exit with its code."""
    for line in str(error).splitlines() or [type(error).__name__]:
        print(coloured(f"vespo: {line}", RED, sys.stderr), file=sys.stderr)
    sys.exit(error.exit_code)


def format_settings(rows: Sequence[Row]) -> str:
    """Settings as TOML with origin and meaning as comments."""
    sections: dict[str, list[str]] = {}
    for row in rows:
        section, _, name = row.key.rpartition(".")
        lines = sections.setdefault(section, [f"[{section}]"])
        shown = f"# {name} is not set" if row.value is None else f"{name} = {json.dumps(row.value, ensure_ascii=False)}"
        lines.append(f"{shown:<{ORIGIN_COLUMN}} # {row.origin}")
        if row.doc:
            lines.append(coloured(f"    # {row.doc}", DIM, sys.stdout))
    return "\n\n".join("\n".join(lines) for lines in sections.values())


def format_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns; numbers to the right."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(heading), *(len(row[i]) for row in table)]) for i, heading in enumerate(headings)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(line(row) for row in [list(headings), *table])


def format_counts(title: str, counts: Mapping[str, Any]) -> str:
    """`title  name value  name value` on one line."""
    return f"{title:<9} " + "  ".join(f"{name} {value}" for name, value in counts.items())
