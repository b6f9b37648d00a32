"""Arithmetic, logic, comparison, selection and conversion, each thread by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import FROM_FLOAT, SIGNED, TO_FLOAT, UNSIGNED, Bits, Floats, halves, rounded_to_tf32, type_bits
from .machine import Batch, Mask, Step
from .operands import Decoder, Operands, Reader, integer, vector
from .ptx import Instruction

__all__ = ["DECODERS"]

Function = Callable[..., np.ndarray]

# The largest relative error of each approximation by the PTX manual. A division's is two units in the last place.
_ERRORS = {"ex2": 2.0**-22.5, "lg2": 2.0**-22, "rsqrt": 2.0**-22.4, "sqrt": 2.0**-23, "rcp": 2.0**-23}
_ERRORS |= {"sin": 2.0**-20.5, "cos": 2.0**-20.5, "tanh": 2.0**-11}
_ROUNDING = 2.0**-24  # of the result to float32, which is part of the error
_UNITS = 2.0


def _in_double(function: Function) -> Function:
    """Compute in float64 and round once, as the hardware's exact instructions do."""
    return lambda *values: function(*(value.astype(np.float64) for value in values)).astype(np.float32)


_APPROXIMATED: dict[str, Function] = {
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "div": np.divide,
}
_FLOAT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _in_double(lambda a, b, c: a * b + c),
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    **{name: _in_double(function) for name, function in _APPROXIMATED.items()},
    "div": np.divide,
    "sqrt": np.sqrt,
}


def _flushed(values: Floats) -> Floats:
    """Turn subnormal numbers to zero of their sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _worst(name: str, operands: list[Floats]) -> Floats:
    """Compute with the whole error that is allowed, up or down as a fixed function of the operands' bits says."""
    mixed = np.zeros((), np.uint32)
    for operand in operands:
        mixed = (mixed ^ np.asarray(operand, np.float32).view(np.uint32)) * np.uint32(0x9E3779B1)
    sign = np.where(mixed >> np.uint32(31), 1.0, -1.0)
    exact = _APPROXIMATED[name](*(operand.astype(np.float64) for operand in operands))
    if name == "div":
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        moved = exact + sign * (_UNITS - 0.5) * np.where(np.isfinite(unit), unit, 0.0)
        return np.where(exact == 0.0, exact, moved).astype(np.float32)
    return (exact * (1.0 + sign * (_ERRORS[name] - _ROUNDING))).astype(np.float32)


def _float(instruction: Instruction, operands: Operands) -> Step:
    words, kind = instruction.words, instruction.type
    function, convert, back = _FLOAT[words[0]], TO_FLOAT[kind], FROM_FLOAT[kind]
    if "NaN" in words:
        function = {"min": np.minimum, "max": np.maximum}[words[0]]
    readers = [operands.read(text, type_bits(kind)) for text in instruction.operands[1:]]
    write = operands.write(instruction.operands[0])
    flush = "ftz" in words
    approximate = "approx" in words or "full" in words

    def step(batch: Batch, mask: Mask) -> None:
        values = [convert(np.asarray(reader(batch))) for reader in readers]
        if flush:
            values = [_flushed(value) for value in values]
        approximated = approximate and batch.schedule.worst
        result = _worst(words[0], values) if approximated else function(*values)
        write(batch, back(_flushed(result) if flush else result), mask)

    return step


def _packed(instruction: Instruction, operands: Operands) -> Step:
    """Compute two halves at once: ``fma.rn.bf16x2``."""
    kind = instruction.type.removesuffix("x2")
    function, convert, back = _FLOAT[instruction.words[0]], TO_FLOAT[kind], FROM_FLOAT[kind]
    readers = [operands.read(text, 32) for text in instruction.operands[1:]]
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        split = [halves(np.asarray(reader(batch))) for reader in readers]
        low, high = (back(function(*(convert(part) for part in parts))) for parts in zip(*split, strict=True))
        write(batch, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)), mask)

    return step


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers, rounding toward zero; by zero gives all ones."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(b == 0, np.asarray(-1).astype(a.dtype), quotient).astype(a.dtype)


_INTEGER: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
}


def _numbers(kind: str) -> Callable[[Bits], np.ndarray]:
    """Return what turns bits into the numbers of a PTX type."""
    if kind in TO_FLOAT:
        return TO_FLOAT[kind]
    if kind.startswith("s"):
        return lambda bits: bits.view(SIGNED[type_bits(kind)])
    return lambda bits: bits


def _integers(instruction: Instruction, operands: Operands) -> Step:
    words, kind = instruction.words, instruction.type
    bits, view = type_bits(kind), _numbers(kind)
    wide, high = "wide" in words, "hi" in words
    function = _INTEGER[words[0]]
    factors = instruction.operands[1:3] if words[0] == "mad" else instruction.operands[1:]
    readers = [operands.read(text, bits) for text in factors]
    added = operands.read(instruction.operands[3], 2 * bits if wide else bits) if words[0] == "mad" else None
    write = operands.write(instruction.operands[0])
    double = SIGNED[2 * bits] if wide and kind[0] == "s" else UNSIGNED.get(2 * bits)

    def step(batch: Batch, mask: Mask) -> None:
        values = [view(np.asarray(reader(batch))) for reader in readers]
        if wide:
            result = np.asarray(values[0].astype(double) * values[1].astype(double)).view(UNSIGNED[2 * bits])
            write(batch, result if added is None else result + added(batch), mask)
        elif added is not None:
            write(batch, np.asarray(values[0] * values[1]).view(UNSIGNED[bits]) + added(batch), mask)
        else:
            write(batch, np.asarray(function(*values)).view(UNSIGNED[bits]), mask)

    if high:
        return _upper_half(instruction, operands)
    return step


def _upper_half(instruction: Instruction, operands: Operands) -> Step:
    """Return the upper 32 bits of a product, perhaps plus a third operand."""
    kind, bits = instruction.type, type_bits(instruction.type)
    if bits != 32:
        raise NotImplementedError(instruction.text)
    view, double = _numbers(kind), np.int64 if kind[0] == "s" else np.uint64
    a, b, *rest = (operands.read(text, bits) for text in instruction.operands[1:])
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        product = view(np.asarray(a(batch))).astype(double) * view(np.asarray(b(batch))).astype(double)
        upper = (product.view(np.uint64) >> np.uint64(32)).astype(np.uint32)
        write(batch, upper + rest[0](batch) if rest else upper, mask)

    return step


def _arithmetic(instruction: Instruction, operands: Operands) -> Step:
    if instruction.type in ("bf16x2", "f16x2"):
        return _packed(instruction, operands)
    if instruction.type in FROM_FLOAT:
        return _float(instruction, operands)
    return _integers(instruction, operands)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


def _logic(instruction: Instruction, operands: Operands) -> Step:
    function = _LOGIC[instruction.words[0]]
    readers = [operands.read(text, type_bits(instruction.type)) for text in instruction.operands[1:]]
    write = operands.write(instruction.operands[0])
    return lambda batch, mask: write(batch, function(*(reader(batch) for reader in readers)), mask)


def _shift(instruction: Instruction, operands: Operands) -> Step:
    """Shift; by the width or more gives zero, or the sign."""
    left, kind = instruction.words[0] == "shl", instruction.type
    bits, view = type_bits(kind), _numbers(kind)
    value, amount = operands.read(instruction.operands[1], bits), operands.read(instruction.operands[2], 32)
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        number, by = view(np.asarray(value(batch))), np.asarray(amount(batch))
        within = np.minimum(by, bits - 1).astype(number.dtype)
        moved = np.asarray(np.left_shift(number, within) if left else np.right_shift(number, within))
        if left or kind[0] != "s":
            moved = np.where(by >= bits, moved.dtype.type(0), moved)
        write(batch, moved.view(UNSIGNED[bits]), mask)

    return step


def _extract(instruction: Instruction, operands: Operands) -> Step:
    """Extract by ``bfe`` with a constant place and length."""
    bits = type_bits(instruction.type)
    value, write = operands.read(instruction.operands[1], bits), operands.write(instruction.operands[0])
    place, length = integer(instruction.operands[2]), integer(instruction.operands[3])
    unsigned = UNSIGNED[bits]
    top = unsigned(1 << (length - 1)) if instruction.type[0] == "s" else unsigned(0)

    def step(batch: Batch, mask: Mask) -> None:
        field = (value(batch) >> unsigned(place)) & unsigned((1 << length) - 1)
        write(batch, (field ^ top) - top, mask)

    return step


def _count_bits(instruction: Instruction, operands: Operands) -> Step:
    bits = type_bits(instruction.type)
    value, write = operands.read(instruction.operands[1], bits), operands.write(instruction.operands[0])
    return lambda batch, mask: write(batch, np.bitwise_count(value(batch)).astype(np.uint32), mask)


def _permute(instruction: Instruction, operands: Operands) -> Step:
    """Permute by ``prmt``: pick four of eight bytes, or the sign of one."""
    readers = [operands.read(text, 32) for text in instruction.operands[1:4]]
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        low, high, selector = (np.asarray(reader(batch)).astype(np.uint64) for reader in readers)
        source, result = low | (high << np.uint64(32)), np.zeros((), np.uint64)
        for place in range(4):
            choice = (selector >> np.uint64(4 * place)) & np.uint64(0xF)
            byte = (source >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(choice & np.uint64(8), sign, byte)
            result = result | (byte << np.uint64(8 * place))
        write(batch, result.astype(np.uint32), mask)

    return step


def _select(instruction: Instruction, operands: Operands) -> Step:
    bits = type_bits(instruction.type)
    yes, no = (operands.read(text, bits) for text in instruction.operands[1:3])
    choice, write = operands.predicate(instruction.operands[3]), operands.write(instruction.operands[0])
    return lambda batch, mask: write(batch, np.where(choice(batch), yes(batch), no(batch)), mask)


def _ordered(compare: Function) -> Function:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


def _unordered(compare: Function) -> Function:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_BASIC: dict[str, Function] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_UNSIGNED_NAMES = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_OF_INTEGERS = _BASIC | _UNSIGNED_NAMES
_OF_FLOATS = {name: _ordered(compare) for name, compare in _BASIC.items()}
_OF_FLOATS |= {f"{name}u": _unordered(compare) for name, compare in _BASIC.items()}
_OF_FLOATS |= {"nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b))}


def _compare(instruction: Instruction, operands: Operands) -> Step:
    kind, name = instruction.type, instruction.words[1]
    if "|" in instruction.operands[0] or len(instruction.operands) > 3:
        raise NotImplementedError(instruction.text)
    compare, view = (_OF_FLOATS if kind in TO_FLOAT else _OF_INTEGERS)[name], _numbers(kind)
    a, b = (operands.read(text, type_bits(kind)) for text in instruction.operands[1:])
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        write(batch, compare(view(np.asarray(a(batch))), view(np.asarray(b(batch)))), mask)

    return step


def _move(instruction: Instruction, operands: Operands) -> Step:
    target, source = instruction.operands
    bits = type_bits(instruction.type)
    if target.startswith("{"):
        return _unpack(vector(target), operands.read(source, bits), bits, operands)
    if source.startswith("{"):
        return _pack(operands, target, vector(source), bits)
    read, write = operands.read(source, bits), operands.write(target)
    return lambda batch, mask: write(batch, read(batch), mask)


def _unpack(targets: tuple[str, ...], read: Reader, bits: int, operands: Operands) -> Step:
    part, writers = bits // len(targets), [operands.write(name) for name in targets]

    def step(batch: Batch, mask: Mask) -> None:
        value = read(batch)
        for place, write in enumerate(writers):
            write(batch, (value >> UNSIGNED[bits](part * place)).astype(UNSIGNED[part]), mask)

    return step


def _pack(operands: Operands, target: str, sources: tuple[str, ...], bits: int) -> Step:
    part, write = bits // len(sources), operands.write(target)
    readers = [operands.read(name, part) for name in sources]

    def step(batch: Batch, mask: Mask) -> None:
        value = np.zeros((), UNSIGNED[bits])
        for place, read in enumerate(readers):
            value = value | (read(batch).astype(UNSIGNED[bits]) << UNSIGNED[bits](part * place))
        write(batch, value, mask)

    return step


_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _saturated(values: np.ndarray, kind: str) -> Bits:
    """Turn whole numbers in float64 to the integers of a type, the nearest where they do not fit, NaN to 0."""
    limits = np.iinfo((SIGNED if kind[0] == "s" else UNSIGNED)[type_bits(kind)])
    values = np.where(np.isnan(values), 0.0, values)
    over, under = values >= float(limits.max), values <= float(limits.min)
    inside = np.where(over | under, 0.0, values).astype(limits.dtype)
    return np.where(over, limits.max, np.where(under, limits.min, inside)).astype(limits.dtype)


def _convert_float(words: tuple[str, ...], target: str, source: str) -> Callable[[Bits], np.ndarray]:
    view = TO_FLOAT[source]
    if target == "tf32":
        return rounded_to_tf32
    if target in FROM_FLOAT:
        back = FROM_FLOAT[target]
        whole = next((_ROUNDINGS[word] for word in words if word in _ROUNDINGS), lambda values: values)
        return lambda bits: back(whole(view(bits)))
    rounding = next(_ROUNDINGS[word] for word in words if word in _ROUNDINGS)
    return lambda bits: _saturated(rounding(view(bits).astype(np.float64)), target)


def _convert_integer(target: str, source: str) -> Callable[[Bits], np.ndarray]:
    view = _numbers(source)
    if target in FROM_FLOAT:
        return lambda bits: FROM_FLOAT[target](view(bits).astype(np.float32))
    dtype = (SIGNED if target[0] == "s" else UNSIGNED)[type_bits(target)]
    return lambda bits: view(bits).astype(dtype)


def _convert(instruction: Instruction, operands: Operands) -> Step:
    target, source = instruction.words[-2:]
    if target in ("bf16x2", "f16x2"):
        return _convert_pair(instruction, operands)
    convert = (
        _convert_float(instruction.words, target, source) if source in TO_FLOAT else _convert_integer(target, source)
    )
    read, write = operands.read(instruction.operands[1], type_bits(source)), operands.write(instruction.operands[0])
    width = operands.widths[instruction.operands[0]]

    def step(batch: Batch, mask: Mask) -> None:
        value = np.asarray(convert(np.asarray(read(batch))))
        if value.dtype.kind == "i":  # a wider register takes the sign too
            value = value.astype(SIGNED[width]).view(UNSIGNED[width])
        write(batch, value, mask)

    return step


def _convert_pair(instruction: Instruction, operands: Operands) -> Step:
    back = FROM_FLOAT[instruction.words[-2].removesuffix("x2")]
    high, low = (operands.read(text, 32) for text in instruction.operands[1:3])
    write = operands.write(instruction.operands[0])

    def step(batch: Batch, mask: Mask) -> None:
        upper, lower = (back(np.asarray(read(batch)).view(np.float32)).astype(np.uint32) for read in (high, low))
        write(batch, lower | (upper << np.uint32(16)), mask)

    return step


DECODERS: dict[str, Decoder] = {name: _arithmetic for name in _FLOAT | _INTEGER}
DECODERS |= {name: _logic for name in _LOGIC}
DECODERS |= {"shl": _shift, "shr": _shift, "bfe": _extract, "popc": _count_bits, "prmt": _permute}
DECODERS |= {"selp": _select, "setp": _compare, "mov": _move, "cvt": _convert}
