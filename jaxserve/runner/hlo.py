"""Reads the text of a compiled program (HLO): what each instruction does, and how large its result is."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
HOST_TRANSFERS = ("infeed", "outfeed", "send", "recv")
_COPIES = ("copy", "transpose")

_INSTRUCTION = re.compile(
    r"\s*(?P<text>(?:ROOT )?%?\S+ = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\(.*)"
)
_ARRAY = re.compile(r"(?P<kind>[a-z]+)(?P<bits>[0-9]*)[a-z0-9]*\[(?P<dims>[0-9,]*)\]")
_ALIAS = re.compile(r"\{[0-9, ]*\}: \((?P<parameter>[0-9]+), \{[0-9, ]*\}, (?:may|must)-alias\)")


class ArrayType(NamedTuple):
    """An array in the type of a result: its sizes, and the bits of an element."""

    dims: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return self.size * self.bits // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        op: what it does; of an asynchronous pair the beginning, without its ``-start``.
        arrays: of its result; the beginning of a pair has its operands among them.
        text: its line.
    """

    op: str
    arrays: tuple[ArrayType, ...]
    text: str


class Collective(NamedTuple):
    """Devices exchanging arrays of a size: ``all-reduce`` and its like, and the bytes of its result."""

    kind: str
    num_bytes: int


def read_instructions(text: str) -> list[Instruction]:
    """Every instruction of every computation; the end of an asynchronous pair is an instruction too."""
    return [
        Instruction(match["op"].removesuffix("-start"), _arrays(match["type"]), match["text"])
        for match in map(_INSTRUCTION.match, text.splitlines())
        if match is not None
    ]


def collectives_of(instructions: Sequence[Instruction]) -> collections.Counter[Collective]:
    """How many of each; those in branches that may not be taken count too."""
    return collections.Counter(
        Collective(each.op, sum(array.num_bytes for array in each.arrays))
        for each in instructions
        if each.op in COLLECTIVES
    )


def copies_of(instructions: Sequence[Instruction], shapes: Sequence[tuple[int, ...]]) -> list[Instruction]:
    """Those that copy, rearrange or gather as much as the first shape holds, or an array of one of the shapes.

    Activations may be as large as a small array, but are not of its shape: so of all but the first shape only
    arrays of that very shape are found.
    """
    return [
        each
        for each in instructions
        if each.op in (*_COPIES, *COLLECTIVES)
        and any(array.size >= math.prod(shapes[0]) or array.dims in shapes for array in each.arrays)
    ]


def aliased_parameters(text: str) -> frozenset[int]:
    """The program's parameters that it writes a result over."""
    header = text.partition("\n")[0]
    return frozenset(int(match["parameter"]) for match in _ALIAS.finditer(header))


def _arrays(result_type: str) -> tuple[ArrayType, ...]:
    return tuple(
        ArrayType(tuple(int(size) for size in match["dims"].split(",") if size), int(match["bits"] or 8))
        for match in _ARRAY.finditer(result_type)
    )
