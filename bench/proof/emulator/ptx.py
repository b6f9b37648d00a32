"""PTX as text: one entry's parameters, registers, labels and instructions, each with its line of Python."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from .bits import type_bits

__all__ = ["Guard", "Instruction", "Listing", "parse", "split_operands"]

_LABEL = re.compile(r"(\$?[\w$]+):")
_GUARDED = re.compile(r"@(!?)(%\w+)\s+(.*)", re.S)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)


@dataclasses.dataclass(frozen=True)
class Guard:
    """The predicate of an instruction: a register, perhaps negated."""

    register: str
    negated: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        words: the opcode, split at its dots: ``("ld", "global", "v4", "b32")``.
        operands: each as text; vectors and addresses keep their brackets.
        guard: its predicate, or None.
        text: all of it, as it was written.
        line: file and line of the Python source, as ``match_tokens.py:87``, or "" where the compiler gives none.
    """

    words: tuple[str, ...]
    operands: tuple[str, ...]
    guard: Guard | None
    text: str
    line: str

    @property
    def type(self) -> str:
        """The last word: the type of a plain instruction."""
        return self.words[-1]

    @property
    def kind(self) -> str:
        """The opcode with its state space where it has one: ``ld.global``, ``cp.async``, ``fma``."""
        first, second = self.words[0], self.words[1] if len(self.words) > 1 else ""
        spaces = {"global", "shared", "param", "async", "mma_async", "wait_group", "commit_group"}
        space = second.split("::")[0]
        if first == "cp" and self.words[2] in spaces:
            return f"cp.async.{self.words[2]}"
        return f"{first}.{space}" if space in spaces else first

    @property
    def vector(self) -> int:
        """Return how many elements a load or store moves: 1, 2, 4 or 8."""
        found = [int(word[1:]) for word in self.words if re.fullmatch(r"v\d", word)]
        return found[0] if found else 1


@dataclasses.dataclass(frozen=True)
class Listing:
    """The entry of one kernel.

    Attributes:
        name: the kernel's.
        parameters: names of the parameters, in order.
        registers: name -> width in bits, 1 for predicates.
        instructions: in order.
        labels: name -> index of the instruction that it stands before.
    """

    name: str
    parameters: tuple[str, ...]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas, those within brackets apart."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def _declared(line: str) -> Iterator[tuple[str, int]]:
    """Return the registers of a ``.reg`` line, with their width."""
    found = re.match(r"\.reg\s+\.(\w+)\s+([^;]+);", line)
    assert found is not None, line
    width = type_bits(found[1])
    for name in found[2].split(","):
        ranged = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
        if ranged is None:
            yield name.strip(), width
        else:
            yield from ((f"{ranged[1]}{number}", width) for number in range(int(ranged[2])))


def _instruction(text: str, line: str) -> Instruction:
    guard, rest = None, text
    if (found := _GUARDED.match(text)) is not None:
        guard, rest = Guard(found[2], found[1] == "!"), found[3]
    opcode, _, operands = rest.partition(" ")
    return Instruction(tuple(opcode.split(".")), split_operands(operands), guard, text, line)


def parse(ptx: str) -> Listing:
    """Read what Triton compiled: one entry.

    Raises:
        ValueError: a text without an entry.
    """
    start = ptx.find(".visible .entry")
    if start < 0:
        raise ValueError("no .visible .entry in the PTX")
    files = {number: name.rsplit("/", 1)[-1] for number, name in _FILE.findall(ptx)}
    head, _, body = ptx[start:].partition("{")
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    line = ""
    for row in re.sub(r"//[^\n]*", "", body).replace("\t", " ").splitlines():
        row = row.strip()
        if row.startswith(".reg"):
            registers |= dict(_declared(row))
        elif (location := _LOCATION.match(row)) is not None:
            line = f"{files.get(location[1], location[1])}:{location[2]}"
        elif row.startswith((".section", ".file")):
            break  # debug data follows the code
        else:
            for part in (part.strip(" {}" if part.strip() in ("{", "}") else " ") for part in row.split(";")):
                if (label := _LABEL.fullmatch(part)) is not None:
                    labels[label[1]] = len(instructions)
                elif part and not part.startswith("."):
                    instructions.append(_instruction(part, line))
    name = re.search(r"\.entry\s+(\w+)", head)
    assert name is not None, head
    parameters = tuple(re.findall(r"\.param\s+[^,)]*?(\w+_param_\d+)", head))
    return Listing(name[1], parameters, registers, tuple(instructions), labels)
