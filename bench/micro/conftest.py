"""Options of the microbenchmarks: ``python -m pytest bench/micro --shapes all``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from bench.microbenchmark import DIRECTIONS, Microbenchmark, device_clock
from bench.primitives import BATCHES, DTYPES, MODELS, TOKENS, Primitive, Shape, load_primitives, parse_shapes

_CONTENDERS = ("fastreduce", "reference", "compiled", "plain")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastreduce")
    group.addoption(
        "--shapes",
        default="few",
        help="few (default: DeiT-S at 197 tokens, batch 1 and 64), all (four models x 197, 577, 1025, 4097 tokens x "
        "batch 1, 64, 256), or MODEL-TOKENS-BATCH[-DTYPE], comma separated",
    )
    group.addoption("--dtype", default=None, choices=list(DTYPES), help="float32 on the CPU, bfloat16 on CUDA")
    group.addoption(
        "--contenders",
        default=None,
        help="of fastreduce, reference, compiled, plain and what a primitive names besides, comma separated (default: "
        "all; compiled not on the CPU, where compiling takes minutes)",
    )


def _shapes(wanted: str, dtype: torch.dtype) -> list[Shape]:
    if wanted == "few":
        return [Shape("deit_small", 197, batch, dtype) for batch in BATCHES[:2]]
    if wanted == "all":
        return [Shape(*point, dtype) for point in itertools.product(MODELS, TOKENS, BATCHES)]
    try:
        return parse_shapes(wanted, dtype)
    except ValueError as error:
        raise pytest.UsageError(f"--shapes takes few, all, or shapes: {error}") from None


def _contenders(wanted: str | None, primitives: Iterable[Primitive]) -> list[str]:
    """Return the contenders that are wanted, of those that the primitives have."""
    on_cuda = _device().type == "cuda"
    others = {name: other for primitive in load_primitives().values() for name, other in primitive.others.items()}
    names = wanted.split(",") if wanted else [name for name in (*_CONTENDERS, *others) if on_cuda or name != "compiled"]
    for name in names:
        if name not in (*_CONTENDERS, *others):
            raise pytest.UsageError(f"--contenders takes {', '.join((*_CONTENDERS, *others))}, got {name!r}")
    mine = {
        name
        for primitive in primitives
        for name, other in primitive.others.items()
        if other.serves(_device().type, "forward")
    }
    # On the CPU fastreduce is the reference.
    return [name for name in names if name in mine or (name in _CONTENDERS and (on_cuda or name != "reference"))]


def pytest_report_header(config: pytest.Config) -> str:
    contenders = ", ".join(_contenders(config.getoption("--contenders"), load_primitives().values()))
    return f"fastreduce microbenchmarks on {_device()}: {contenders}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    options = metafunc.config
    dtype = options.getoption("--dtype") or ("bfloat16" if _device().type == "cuda" else "float32")
    shapes = _shapes(options.getoption("--shapes"), DTYPES[dtype])
    primitives = load_primitives().values()
    cases = [
        pytest.param(primitive, shape, direction, contender, id=f"{primitive.name}-{shape}-{direction}-{contender}")
        for primitive in primitives
        for shape in shapes
        for direction in (DIRECTIONS if primitive.gradients else DIRECTIONS[:1])
        for contender in _contenders(options.getoption("--contenders"), [primitive])
    ]
    metafunc.parametrize(("primitive", "shape", "direction", "contender"), cases)


@functools.lru_cache(maxsize=1)  # contenders follow one another, and share its truth
def _prepared(name: str, primitive: Any, shape: Shape, direction: str) -> Microbenchmark:
    return Microbenchmark(primitive, shape, _device(), direction)


@pytest.fixture
def speed(request: pytest.FixtureRequest, primitive: Primitive, shape: Shape, direction: str, contender: str) -> Any:
    """Check, then time; a red parity fails the test and reports no time."""
    bench = _prepared(primitive.name, primitive, shape, direction)
    if contender not in bench.contenders:
        pytest.skip(f"{contender} has no {direction} pass")
    try:
        wrong = bench.parity(contender)
        run = None if wrong is not None else bench.prepare(contender)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
    if run is None:
        pytest.fail(f"{contender} is not right, so no time is told: {wrong}")
    # pytest-benchmark keeps the timer: it must not hold the buffers. It counts its time in what the timer tells.
    repeats, device = run.repeats, bench.device
    request.node.add_marker(pytest.mark.benchmark(timer=lambda: device_clock(device) / repeats, max_time=1.0 / repeats))
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{primitive.name} {direction} {shape}"
    benchmark(run.call)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info.update(bench.facts(run, benchmark.stats.stats.median))
