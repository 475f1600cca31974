"""Writes the tables of docs/serving.md that are made from the code; tests/docs fails where they differ.

uv run scripts/update_docs.py
"""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxserve import config
from jaxserve.server.config import ConnectionConfig, ServerConfig

ROOT = Path(__file__).resolve().parent.parent
SERVING = ROOT / "docs" / "serving.md"
# The default of this one depends on the environment.
_SHOWN_DEFAULTS = {"cache_dir": "`~/.cache/jaxserve`"}


def engine_table() -> str:
    """One row for each option of the engine."""
    hints: dict[str, Any] = dict(get_type_hints(config.EngineConfig))
    for section in config.SECTIONS:
        hints |= get_type_hints(hints[section])
    return _table((name, hints[name], field) for name, field in config.flat_fields())


def dataclass_table(kind: type) -> str:
    """One row for each field of a dataclass that holds options."""
    hints = get_type_hints(kind)
    return _table((field.name, hints[field.name], field) for field in dataclasses.fields(kind))


TABLES = {
    "engine options": engine_table,
    "server options": lambda: dataclass_table(ServerConfig),
    "connection options": lambda: dataclass_table(ConnectionConfig),
}


def with_tables(text: str) -> str:
    """The text with every table between its markers made anew. Raises ValueError if a marker is missing."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text, count = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _: begin + make() + end,  # noqa: B023 - used before the next turn
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"docs/serving.md has {count} tables of {name}, must have one")
    return text


def main() -> None:
    """Rewrites docs/serving.md."""
    SERVING.write_text(with_tables(SERVING.read_text(encoding="utf-8")), encoding="utf-8")


def _table(rows: Any) -> str:
    lines = ["| option | flag | default | meaning |", "|---|---|---|---|"]
    for name, hint, field in rows:
        default = _SHOWN_DEFAULTS.get(name) or _shown(field.default)
        meaning = f"{field.metadata['help']}{_choices(hint)}".replace("|", "\\|")
        lines.append(f"| `{name}` | `--{name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    return "" if default is None else f"`{default}`"


def _choices(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = [name for part in parts if get_origin(part) is Literal for name in get_args(part)]
    if names and str in parts:
        names.append("FILE.py:CLASS")
    return f" ({', '.join(names)})" if names else ""


if __name__ == "__main__":
    main()
