"""Shared buffers that may be overwritten while an asynchronous dot still reads them, found in a kernel's TTGIR.

On sm_90 a product of four warps (``ttng.warp_group_dot`` with ``isAsync``) goes on reading its operands in shared
memory until a wait says otherwise. The software pipeline keeps several buffers of a load for that reason, but one too
few where the load feeds something else too (https://github.com/triton-lang/triton/issues/6691). Neither the interpreter
nor the assembler knows of it; here the order of copies, dots and waits is followed through some iterations of every
loop.

Not seen: two allocations that the compiler puts into one place because it takes one of them for dead.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

__all__ = ["overwritten"]

_RESULT = re.compile(r"(%[\w.$-]+)(?::(\d+))? = ")
_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_LOCATION = re.compile(r"\s*\bloc\((?:[^()]|\([^()]*\))*\)")
_OPENS = re.compile(r"scf\.(?:for|if|while)\b")
_VIEWS = ("memdesc_trans", "memdesc_reshape", "memdesc_reinterpret", "memdesc_subslice", "memdesc_subview")
_WRITES = {"async_copy_global_to_local": 1, "local_store": 1}  # place of the target among the values


@dataclasses.dataclass
class _Operation:
    """One operation: its results, its name, its text, and the blocks that it holds."""

    result: str | None
    results: int
    name: str
    text: str
    blocks: list[list[_Operation]] = dataclasses.field(default_factory=list)

    @property
    def values(self) -> list[str]:
        """Names of the values that it takes, in order."""
        return _VALUE.findall(self.text.split(" : ")[0])


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """One buffer of an allocation; no slot: any of them."""

    allocation: str
    slot: int | None = None

    def meets(self, other: _Buffer) -> bool:
        same = None in (self.slot, other.slot) or self.slot == other.slot
        return self.allocation == other.allocation and same


def _parsed(lines: Iterator[str]) -> list[_Operation]:
    """Return the operations up to the end of a block; lines hold no locations."""
    operations = []
    for line in lines:
        text = line.strip()
        if text.startswith("}"):
            operations.append(_Operation(None, 0, "}", text))
            return operations
        found = _RESULT.match(text)
        result, results = (found[1], int(found[2] or 1)) if found else (None, 0)
        rest = text[found.end() :] if found else text
        operation = _Operation(result, results, re.split(r"[\s(]", rest, maxsplit=1)[0], rest)
        operations.append(operation)
        if _OPENS.match(rest) or rest.startswith("tt.func"):
            more = True
            while more:
                block = _parsed(lines)
                end = block.pop() if block and block[-1].name == "}" else None
                operation.blocks.append(block)
                more = end is not None and end.text.endswith("{")  # "} else {", "} do {"
        elif rest.endswith("({"):  # of a reduction or a scan: nothing in shared memory
            for inner in lines:
                if inner.strip().startswith("})"):
                    break
    return operations


class _Walk:
    """Operations in the order of execution, and the dots that may still be reading.

    Scalars of the pipeline (which buffer is next) are computed; others are unknown, and so are conditions: both sides
    of them are walked.
    """

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.known: dict[str, int | _Buffer | None] = {}
        self.reading: list[tuple[str, set[_Buffer]]] = []
        self.found: dict[str, None] = {}

    def walk(self, block: Sequence[_Operation]) -> list[str]:
        """Walk over a block; return the values that the block yields."""
        yielded: list[str] = []
        for operation in block:
            if operation.name in ("scf.yield", "scf.condition"):
                yielded = operation.values
            elif operation.name == "scf.for":
                self._loop(operation)
            elif operation.blocks:
                for _ in range(self.rounds if operation.name == "scf.while" else 1):
                    for inner in operation.blocks:
                        self.walk(inner)
            else:
                self._step(operation)
        return yielded

    def _loop(self, loop: _Operation) -> None:
        arguments = re.search(r"iter_args\(([^)]*)\)", loop.text)
        pairs = re.findall(rf"({_VALUE.pattern}) = ({_VALUE.pattern})", arguments[1] if arguments else "")
        names = [name for name, _ in pairs]
        values = [self.known.get(start) for _, start in pairs]
        for _ in range(self.rounds):
            self.known.update(zip(names, values, strict=True))
            values = [self.known.get(value) for value in self.walk(loop.blocks[0])]
        self._give(loop, values)

    def _give(self, operation: _Operation, values: Sequence[int | _Buffer | None]) -> None:
        if operation.result is not None:
            self.known[operation.result] = values[0] if values else None
            self.known.update({f"{operation.result}#{i}": value for i, value in enumerate(values)})

    def _buffer(self, name: str) -> _Buffer | None:
        value = self.known.get(name)
        return value if isinstance(value, _Buffer) else None

    def _step(self, operation: _Operation) -> None:
        name, values = operation.name.rpartition(".")[2], operation.values
        if name == "local_alloc":
            buffer = _Buffer(str(operation.result))
            if values:  # of a value that is stored at once
                self._write(buffer, operation)
            self._give(operation, [buffer])
        elif name == "memdesc_index":
            whole, index = self._buffer(values[0]), self.known.get(values[1])
            slot = index if isinstance(index, int) else None
            self._give(operation, [whole and _Buffer(whole.allocation, slot)])
        elif name in _VIEWS:
            self._give(operation, [self._buffer(values[0])])
        elif name == "warp_group_dot":
            if "isAsync = true" in operation.text:
                self.reading.append((str(operation.result), set(filter(None, map(self._buffer, values)))))
        elif name == "warp_group_dot_wait":
            pending = int(re.search(r"pendings = (\d+)", operation.text)[1])  # type: ignore[index]
            self.reading = self.reading[-pending:] if pending else []
            self._give(operation, [self._buffer(value) for value in values])
        elif name in _WRITES or name.startswith("async_tma_copy_global"):
            for value in values[_WRITES.get(name, 0) :]:
                if buffer := self._buffer(value):
                    self._write(buffer, operation)
        else:
            self._give(operation, [_scalar(name, operation.text, [self.known.get(value) for value in values])])

    def _write(self, buffer: _Buffer, operation: _Operation) -> None:
        for dot, read in self.reading:
            if any(buffer.meets(other) for other in read):
                self.found[f"{operation.name} into {buffer.allocation} while {dot} may read it"] = None


def _scalar(name: str, text: str, values: Sequence[int | _Buffer | None]) -> int | None:
    """Return the value of an operation on known integers, else None."""
    if name == "constant":
        found = re.match(r"arith\.constant (-?\d+) : i(?:32|64)$", text)
        return int(found[1]) if found else {"true": 1, "false": 0}.get(text.split()[1].rstrip(":"))
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) < len(values) or not numbers:
        return None
    if name == "select":
        return numbers[1] if numbers[0] else numbers[2]
    if len(numbers) != 2:
        return None
    a, b = numbers
    if name == "cmpi":
        word = text.split()[1].rstrip(",")
        return {"sge": a >= b, "sgt": a > b, "slt": a < b, "sle": a <= b, "eq": a == b, "ne": a != b}.get(word)
    return {"addi": a + b, "subi": a - b, "muli": a * b, "remsi": a % b if b else None}.get(name)


def overwritten(ttgir: str) -> list[str]:
    """Return a line for every write to a shared buffer that a dot may still be reading, empty if there is none."""
    if "isAsync = true" not in ttgir:
        return []
    lines = (_LOCATION.sub("", line) for line in ttgir.splitlines())
    depths = [int(depth) for depth in re.findall(r"local_alloc\b.*-> !ttg\.memdesc<(\d+)x", ttgir)]
    functions = _parsed(line for line in lines if line.strip() and not line.startswith(("#", "module")))
    found: dict[str, None] = {}
    for function in functions:
        for block in function.blocks:
            walk = _Walk(rounds=2 * min(max(depths, default=1), 8) + 2)
            walk.walk(block)
            found.update(walk.found)
    return list(found)
