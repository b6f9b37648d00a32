"""One primitive at one shape: parity first, then the clock, then launches and memory.

Contenders are fastreduce (its kernels on CUDA, its reference on the CPU), on CUDA also the reference eager, the
reference under ``torch.compile``, the official algorithm in plain words, and what else a primitive names.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch.profiler import ProfilerActivity, profile

from fastreduce.measure import CaptureError, capture, own_code, quartiles, seconds_of

from .primitives import (
    Inputs,
    Outputs,
    Primitive,
    Shape,
    differentiate,
    disagreement,
    in_float64,
    misshapen,
    nbytes,
    shaken,
)
from .proof.operator_counts import OperatorCounts

__all__ = ["DIRECTIONS", "Microbenchmark", "copy_bandwidth", "device_clock"]

# A backward pass that is repeated needs its buffers again.
functorch_config.donated_buffer = False

DIRECTIONS = ("forward", "backward")
_CHECKED = 4  # images in the check of parity: no route depends on the batch
_FEWEST_REPEATS = 16  # calls in one CUDA graph
_MOST_NODES = 4096  # launches in one, roughly
_INTERVAL = 2e-3  # seconds on CUDA between two events, so that the launch of a graph does not count
_WARM = 0.2  # seconds on CUDA before the first time is taken: clocks rise


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second, read and written, of copying a tensor far larger than the caches."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(7))


_ticks: dict[torch.device, tuple[torch.cuda.Event, float]] = {}


def device_clock(device: torch.device) -> float:
    """Return seconds: the host's on the CPU; on CUDA, those at which the device has done all of its work."""
    if device.type != "cuda":
        return time.perf_counter()
    now = torch.cuda.Event(enable_timing=True)
    now.record(torch.cuda.current_stream(device))
    now.synchronize()
    last, total = _ticks.get(device, (now, 0.0))
    total += last.elapsed_time(now) / 1e3  # from tick to tick, because a float32 of ten minutes is coarse
    _ticks[device] = now, total
    return total


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the values as integers of the same size: NaN is equal to itself, and 0 is not -0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().contiguous().view(kinds[values.element_size()])


def _is_counted(contender: str, device: torch.device) -> bool:
    return contender == "fastreduce" if device.type == "cuda" else contender != "compiled"


def _fill_caches(device: torch.device) -> None:
    """Write more than the caches of a GPU hold, so that the next call meets its data elsewhere and runs otherwise."""
    if device.type == "cuda":
        torch.full((1 << 24,), math.nan, device=device)


@dataclasses.dataclass
class Run:
    """Work to time: ``call`` does it ``repeats`` times, on CUDA over rotating buffers.

    Attributes:
        once: the work on the first set of buffers, eagerly.
        floor: bytes of one piece of work at least.
        rotated: bytes of all inputs and results that take turns; three times the L2 cache unless the work is made of
            so many launches that no graph should hold more of it.
        graphed: whether ``call`` replays a CUDA graph; if not, the host's launches are in the time.
        counted: whether its launches are: on CUDA only of ours, since the profiler takes its time, on the CPU of all
            whose operators no compiler hides.
    """

    call: Callable[[], object]
    once: Callable[[], Outputs]
    repeats: int
    floor: int
    rotated: int
    graphed: bool
    counted: bool


class Microbenchmark:
    """One primitive, shape and direction.

    Args:
        primitive: what to measure.
        shape: where.
        device: on what.
        direction: ``"forward"`` or ``"backward"`` (alone, the forward pass was done before).

    Raises:
        ValueError: a backward pass of a primitive that has none.
    """

    def __init__(self, primitive: Primitive, shape: Shape, device: torch.device, direction: str):
        if direction == "backward" and not primitive.gradients:
            raise ValueError(f"{primitive.name} only decides: it has no backward pass")
        self.primitive, self.shape, self.device, self.direction = primitive, shape, device, direction

        def reference(inputs: Inputs) -> Outputs:
            return primitive.call(**inputs, backend="reference")

        self.reference = reference
        self.contenders: dict[str, Callable[[Inputs], Outputs]] = {
            "fastreduce": lambda inputs: primitive.call(**inputs, backend="auto")
        }
        if device.type == "cuda":
            self.contenders["reference"] = reference
        self.contenders["compiled"] = torch.compile(own_code(reference), dynamic=False)
        self.contenders["plain"] = primitive.plain
        for name, other in primitive.others.items():
            if other.serves(device.type, direction):
                self.contenders[name] = other.call

    def _inputs(self, batch: int, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.primitive.make(dataclasses.replace(self.shape, batch=batch), generator)

    def _work(self, call: Callable[[Inputs], Outputs], inputs: Inputs) -> tuple[Callable[[], Outputs], Outputs]:
        """Return the work as a call without arguments, and the outputs of the forward pass."""
        if self.direction == "forward":
            return lambda: call(inputs), call(inputs)
        return differentiate(call, inputs, self.primitive.gradients)

    @functools.cached_property
    def _truth(self) -> tuple[Inputs, Outputs, list[Outputs]]:
        """Few images, what float64 makes of them, and what may be as far off as it is.

        The reference in the same dtype, and float64 again for inputs that are off by a rounding of float32.
        """
        inputs = self._inputs(min(_CHECKED, self.shape.batch), seed=0)
        work, _ = self._work(self.primitive.plain, in_float64(inputs))
        reference, _ = self._work(self.reference, inputs)
        shaken_work, _ = self._work(self.primitive.plain, shaken(inputs))
        return inputs, work(), [reference(), shaken_work()]

    def parity(self, contender: str, more: float = 0.0) -> str | None:
        """Say what is wrong with the contender's result, on up to four images, or None; ask before any timing.

        Our own results may be off by ``more`` of the largest value beyond their four roundings. In float32 a value
        counts as no less than the primitive's ``terms``.
        """
        inputs, exact, others = self._truth
        work, _ = self._work(self.contenders[contender], inputs)
        outputs = work()
        if self.direction == "forward" and self.primitive.compare is not None:
            return misshapen(outputs, exact) or self.primitive.compare(inputs, outputs, exact)
        if contender == "plain" or contender in self.primitive.others:
            steps = self.primitive.plain_steps * torch.finfo(self.shape.dtype).eps
            return disagreement(outputs, exact, (), steps)
        floor = self.primitive.terms if self.shape.dtype == torch.float32 else 0.0
        return disagreement(outputs, exact, others, 4 * torch.finfo(self.shape.dtype).eps + more, floor)

    def once(self, contender: str) -> Outputs:
        """Return the results of a single piece of work, on the whole batch."""
        work, _ = self._work(self.contenders[contender], self._inputs(self.shape.batch, seed=0))
        return work()

    def differing(self, contender: str, calls: int) -> list[dict[str, int]]:
        """Call again and again with the same arguments, and say which outputs had other bits than after the first call.

        Returns:
            A dict for each output that differed: ``output`` (its place), ``elements`` that differed at least once,
            ``of`` how many, and in how many ``calls``.
        """
        work, _ = self._work(self.contenders[contender], self._inputs(self.shape.batch, seed=0))
        first = [_bits(output).clone() for output in work()]
        changed = [torch.zeros_like(bits, dtype=torch.bool) for bits in first]
        times = [0] * len(first)
        for call in range(1, calls):
            if call % 2:
                _fill_caches(self.device)
            for place, output in enumerate(work()):
                differs = _bits(output) != first[place] if output.shape == first[place].shape else True
                changed[place] |= differs
                times[place] += int(torch.as_tensor(differs).any())
        return [
            {"output": place, "elements": int(where.sum()), "of": where.numel(), "calls": times[place]}
            for place, where in enumerate(changed)
            if times[place]
        ]

    def floor(self, inputs: Inputs, outputs: Outputs, gradients: Outputs) -> int:
        """Return the bytes that must be moved at least."""
        if self.direction == "forward":
            return self.primitive.floor(inputs, outputs)
        assert self.primitive.backward_floor is not None
        return self.primitive.backward_floor(inputs, outputs, gradients)

    def prepare(self, contender: str) -> Run:
        """Make buffers, warm up and, on CUDA, capture a graph."""
        call = self.contenders[contender]
        counted = _is_counted(contender, self.device)
        if self.device.type != "cuda":
            inputs = self._inputs(self.shape.batch, seed=0)
            work, outputs = self._work(call, inputs)
            return Run(work, work, 1, self.floor(inputs, outputs, work()), 0, False, counted)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            inputs = self._inputs(self.shape.batch, seed=0)
            work, outputs = self._work(call, inputs)
            with OperatorCounts() as operators:
                results = work()
            floor = self.floor(inputs, outputs, results)
            most = max(1, _MOST_NODES // max(1, operators.counts.total()))
            enough = 3 * torch.cuda.get_device_properties(self.device).L2_cache_size
            size = nbytes(*(value for value in inputs.values() if isinstance(value, torch.Tensor)))
            sets = min(max(1, math.ceil(enough / max(1, size))), most)
            repeats = max(1, min(_FEWEST_REPEATS, most) // sets) * sets
            kept = min(max(1, math.ceil(enough / max(1, nbytes(*results)))), repeats)
            rotated = sets * size + kept * nbytes(*results)
            works = [work, *(self._work(call, self._inputs(self.shape.batch, seed))[0] for seed in range(1, sets))]
            del outputs, results
        stream.synchronize()

        def all_sets() -> None:
            latest: collections.deque[Outputs] = collections.deque(maxlen=kept)  # else all would go to one address
            for work in itertools.islice(itertools.cycle(works), repeats):
                latest.append(work())

        def on_stream() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                all_sets()
            torch.cuda.current_stream().wait_stream(stream)

        try:
            return Run(capture(all_sets, 1, stream), work, repeats, floor, rotated, True, counted)
        except CaptureError:
            torch.cuda.synchronize()
            return Run(on_stream, work, repeats, floor, rotated, False, counted)

    def facts(self, run: Run, seconds: float) -> dict[str, Any]:
        """Return everything but the time: floor, bandwidth, operators or launches, peak memory."""
        bandwidth = copy_bandwidth(self.device)
        return {
            "floor_bytes": run.floor,
            "gigabytes_per_second": run.floor / seconds / 1e9,
            "copy_gigabytes_per_second": bandwidth / 1e9,
            "share_of_copy_bandwidth": run.floor / seconds / bandwidth,
            **(self._launches(run.once) if run.counted else {}),
            "peak_bytes": self._peak(run.once),
            "rotated_bytes": run.rotated,
            "graphed": run.graphed,
        }

    def _launches(self, once: Callable[[], Outputs]) -> dict[str, int]:
        """Count the kernels and copies that the device ran; on the CPU, the operators that were called."""
        if self.device.type != "cuda":
            with OperatorCounts() as operators:
                once()
            return {"operators": operators.counts.total()}
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            once()
            torch.cuda.synchronize(self.device)
        return {"launches": sum(event.count for event in seen.key_averages() if event.device_time_total > 0)}

    def _peak(self, once: Callable[[], Outputs]) -> int:
        """Return the bytes that one piece of work allocates at most at one time, its results included."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            once()
            return torch.cuda.max_memory_allocated(self.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            results = once()
        del results
        changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(changes), default=0)

    def _times(self, run: Run, rounds: int) -> list[float]:
        """Return the seconds of one piece of work, of every round."""
        once, calls = seconds_of(run.call, self.device), 1
        if self.device.type == "cuda":
            warm_until = time.perf_counter() + _WARM
            while time.perf_counter() < warm_until:
                once = seconds_of(run.call, self.device)
            calls = max(1, math.ceil(_INTERVAL / max(once, 1e-6)))

        def several() -> None:
            for _ in range(calls):
                run.call()

        return [seconds_of(several, self.device) / (calls * run.repeats) for _ in range(rounds)]

    def measure(self, contender: str, rounds: int = 7) -> dict[str, Any]:
        """Return a row of a table; without a time if the parity is red, or with the reason why nothing could run."""
        row: dict[str, Any] = {
            "primitive": self.primitive.name,
            **dataclasses.asdict(self.shape),
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "direction": self.direction,
            "contender": contender,
        }
        try:
            row["parity"] = self.parity(contender)
            if row["parity"] is not None:
                return row
            run = self.prepare(contender)
            seconds = self._times(run, rounds)
            row |= {"seconds": statistics.median(seconds), "quartiles": list(quartiles(seconds))}
            row |= self.facts(run, row["seconds"])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
