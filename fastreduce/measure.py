"""Clocks, ratios and the description of a machine: what every measurement here shares."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import statistics
import subprocess
import time
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ._flops import count_fused_attention
from ._version import __version__

__all__ = [
    "CaptureError",
    "Clock",
    "capture",
    "count_gmacs",
    "cut_to_whole_rounds",
    "environment",
    "free_memory",
    "keep_memory",
    "load_average",
    "own_code",
    "processor_seconds_of",
    "quartiles",
    "ratio",
    "recompile_limits",
    "seconds_of",
    "speed",
    "take_turns",
    "usual_troubles",
]

Name = TypeVar("Name")
Clock = Callable[[Callable[[], object], torch.device], float]  # the seconds of one call


def keep_memory() -> bool:
    """Have malloc keep what is freed, for the rest of this process, as users of a tuned allocator have it.

    glibc hands large blocks back to the system and gets them again page by page: up to 15 % of a forward pass's CPU
    time, by the chance of where they lie. What takes turns is compared without that.

    Returns:
        Whether it could be done: False without glibc.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call: by events on a CUDA device, by the host's clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def processor_seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call by what the CPU spends on this process: others on the machine do not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def take_turns(
    calls: Mapping[Name, Callable[[], object]],
    device: torch.device,
    rounds: int | Callable[[int], bool],
    *,
    seconds: dict[Name, list[float]] | None = None,
    clock: Clock | None = None,
    ends: bool = False,
    moved: Callable[[float], None] = lambda done: None,
    failed: Callable[[Name, RuntimeError], None] | None = None,
) -> dict[Name, list[float]]:
    """Time every call once a round, backwards in every second round, so that drifts hit all alike.

    Args:
        calls: what takes turns, in the order of the first round.
        device: where the calls work.
        rounds: how many, or whether another one follows so many.
        seconds: the dictionary to fill, for a caller that may be interrupted: see :func:`cut_to_whole_rounds`.
        clock: gives the seconds of a call on a device; :func:`seconds_of` by default.
        ends: leave the first and the last call at their ends of every round.
        moved: is told before every call how many rounds are done, the part of this one included.
        failed: is told of a call that raises RuntimeError, which then takes no more turns. By default it is raised.

    Returns:
        ``seconds``: of each call one number a round.
    """
    seconds = {} if seconds is None else seconds
    seconds.clear()
    seconds.update({name: [] for name in calls})
    order, moving, out = list(calls), slice(1, -1) if ends else slice(None), set()
    done, clock = 0, clock or seconds_of
    while rounds(done) if callable(rounds) else done < rounds:
        for place, name in enumerate(order):
            moved(done + place / len(order))
            if name in out:
                continue
            try:
                seconds[name].append(clock(calls[name], device))
            except RuntimeError as error:
                if failed is None:
                    raise
                failed(name, error)
                out.add(name)
        order[moving] = order[moving][::-1]
        done += 1
    return seconds


def cut_to_whole_rounds(seconds: Mapping[Name, list[float]]) -> None:
    """Take away, in place, what a round that was not finished left behind."""
    rounds = min(map(len, seconds.values()), default=0)
    for values in seconds.values():
        del values[rounds:]


class CaptureError(RuntimeError):
    """A call that no CUDA graph can hold."""


def capture(
    call: Callable[[], object], warmups: int = 3, stream: torch.cuda.Stream | None = None, pool: Any = None
) -> Callable[[], None]:
    """Return the call as a CUDA graph, of which replaying is all that the host still does.

    Args:
        call: what to capture.
        warmups: calls before.
        stream: where to capture: the forward pass's stream, if the call is a backward pass. Default: a new one.
        pool: ``torch.cuda.graph_pool_handle()`` for graphs that share their memory; what one leaves there, such as its
            results, is lost when another is replayed.

    Raises:
        CaptureError: the call synchronises with the host.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            call()
        # What synchronises is found before the capture: one that fails halfway leaves CUDA in a bad state.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"it cannot be a CUDA graph: {str(error).splitlines()[0]}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        call()
    return graph.replay


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile; of a single value itself, twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def speed(images: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Return images per second, their quartiles over the rounds, and the seconds, ready for JSON."""
    return {
        "images_per_second": images / statistics.median(seconds),
        "images_per_second_quartiles": list(quartiles([images / value for value in seconds])),
        "seconds": list(seconds),
    }


def ratio(name: str, of: Sequence[float], to: Sequence[float]) -> dict[str, Any]:
    """Return how many times faster ``of`` is than ``to``: the median of the rounds, and the quartiles."""
    ratios = [b / a for a, b in zip(of, to, strict=True)]
    return {name: statistics.median(ratios), f"{name}_quartiles": list(quartiles(ratios))}


def _git_commit() -> str | None:
    """Return the commit of the checkout that this file is in, else FASTREDUCE_COMMIT, or None."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return os.environ.get("FASTREDUCE_COMMIT")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip() or None
    return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Return how many processes wanted a CPU in the last minute, or None where the system does not say."""
    with contextlib.suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


def _number_in(file: str, label: str = "", otherwise: float = math.inf) -> float:
    """Return the first number behind the label in a file of the kernel's."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(label) and (found := re.search("[0-9]+", line[len(label) :])):
                return float(found[0])
    return otherwise


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still have, in a container what that allows; None if unknown."""
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = 1024 * _number_in("/proc/meminfo", "MemAvailable:")
    group = "/sys/fs/cgroup/memory"
    for most, used, files in (
        (f"{group}.max", f"{group}.current", (f"{group}.stat", "inactive_file ")),
        (
            f"{group}/memory.limit_in_bytes",
            f"{group}/memory.usage_in_bytes",
            (f"{group}/memory.stat", "inactive_file "),
        ),
    ):
        # What is cached from files goes when memory is wanted.
        free = min(free, _number_in(most) - _number_in(used, otherwise=0) + _number_in(*files, otherwise=0))
    return int(max(free, 0)) if math.isfinite(free) else None


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine on which a measurement was made."""
    return {
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "fastreduce": __version__,
        "commit": _git_commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def usual_troubles() -> tuple[type[Exception], ...]:
    """Return exceptions that end a measurement and are no mistake in the code: no memory, compilation or graph."""
    return (torch.OutOfMemoryError, MemoryError, torch._dynamo.exc.TorchDynamoException, CaptureError)


def recompile_limits(limit: int) -> dict[str, int]:
    """Return the settings of torch.compile, under the names that the installed version has."""
    names = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
    return {name: limit for name in names if hasattr(torch._dynamo.config, name)}


def own_code(function: Callable[..., Any]) -> Any:
    """Give the function a code object of its own: Dynamo tries all compilations of one code object in turn."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def count_gmacs(model: nn.Module, images: Tensor) -> float:
    """Count the 10⁹ multiply-adds for each of the images, in matrix products, convolutions and attention."""
    count_fused_attention()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2e9 / len(images)
