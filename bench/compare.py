"""Ratios of two result files: python bench/compare.py OURS.jsonl THEIRS.jsonl

Numbers are matched by case, metric, workload and arrivals; the bench may differ. Where a file has several of
a kind (another dtype, a repeated run), its best counts: the most for rates and ratios, the least for times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.results import read_results

_LESS_IS_BETTER = ("s", "ms", "us", "bytes")


class Key(NamedTuple):
    """What two numbers must agree in to be compared."""

    case: str
    metric: str
    workload: str
    arrivals: str


def best_of(records: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """The best record of each kind, in order of first appearance."""
    best: dict[Key, Mapping[str, Any]] = {}
    for record in records:
        key = Key(
            record["case"], record["metric"], record.get("workload") or "", record.get("arrivals") or ""
        )
        less = record["unit"] in _LESS_IS_BETTER or record["metric"].endswith("waste_share")
        sign = -1 if less else 1
        if key not in best or sign * record["value"] > sign * best[key]["value"]:
            best[key] = record
    return best


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[tuple[Key, Mapping[str, Any], Mapping[str, Any], float]]:
    """(key, our record, their record, ours / theirs) for everything that both have."""
    mine, others = best_of(ours), best_of(theirs)
    return [
        (key, record, others[key], record["value"] / others[key]["value"] if others[key]["value"] else 0.0)
        for key, record in mine.items()
        if key in others
    ]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 if the files have nothing in common."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    args = parser.parse_args(argv)
    found = ratios(read_results([args.ours]), read_results([args.theirs]))
    if not found:
        print(f"{args.ours} and {args.theirs} have no case and metric in common", file=sys.stderr)
        return 1
    table = Table()
    for name in ("case", "metric", "unit", args.ours.stem, args.theirs.stem, "ratio"):
        table.add_column(
            name, no_wrap=True, justify="left" if name in ("case", "metric", "unit") else "right"
        )
    for key, mine, other, ratio in found:
        case = " ".join(part for part in (key.case, key.workload, key.arrivals) if part)
        table.add_row(case, key.metric, mine["unit"], _shown(mine), _shown(other), f"{ratio:.3f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


def _shown(record: Mapping[str, Any]) -> str:
    dtype = record.get("dtype")
    return f"{record['value']:g}" + (f" ({dtype})" if dtype else "")


if __name__ == "__main__":
    sys.exit(main())
