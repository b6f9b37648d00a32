"""Processes that work for another one and never outlive it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

__all__ = ["WorkerLost", "Workers"]


class WorkerLost(RuntimeError):
    """A process that died in the middle of its task."""

    def __init__(self) -> None:
        super().__init__(
            "a process that trains was killed, as the system does when memory runs out; fewer --jobs need less"
        )


@contextlib.contextmanager
def _loss_is_said() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise WorkerLost from error


def _end_with(stop: Connection) -> None:
    """End this process, and those that load images for it, as soon as its parent is gone or says so."""
    parent = multiprocessing.parent_process()
    wait_for_any([stop, *([] if parent is None else [parent.sentinel])])
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)


def _start(stop: Connection, initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal: the parent alone decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(stop,), daemon=True).start()
    initializer(*arguments)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts, which would answer it with a traceback before it can ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers:
    """Processes that run named tasks, to be used in a ``with`` statement.

    They end with the parent however it ends: each watches a pipe that the system closes when the parent dies, by
    SIGKILL too. An exception inside the ``with`` statement ends them at once, in the middle of their tasks.

    Args:
        count: how many.
        context: how they are started, from ``multiprocessing.get_context``.
        initializer: called in each with ``arguments``.
        *arguments: for it.
    """

    def __init__(self, count: int, context: BaseContext, initializer: Callable[..., None], *arguments: Any):
        self._stop, self._stopper = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(count, context, _start, (self._stop, initializer, arguments))
        self._running: dict[Future[Any], str] = {}
        self._others = {*multiprocessing.active_children()}
        self._started: set[Any] = set()

    def submit(self, name: str, task: Callable[..., Any], *arguments: Any) -> None:
        """Queue a task."""
        with _without_interrupts(), _loss_is_said():
            self._running[self._pool.submit(task, *arguments)] = name
            self._started |= self._alive()

    def _alive(self) -> set[Any]:
        return {*multiprocessing.active_children()} - self._others

    def finished(self, timeout: float) -> list[tuple[str, Any]]:
        """Wait for a task to end, at most ``timeout`` seconds -> names and results of those that did.

        Raises:
            WorkerLost: a process was killed.
            Exception: whatever a task raised.
        """
        results = []
        done = wait(self._running, timeout=timeout, return_when=FIRST_COMPLETED).done
        # The pool watches only those that had started when it last looked.
        if self._started - self._alive():
            raise WorkerLost
        for task in done:
            name = self._running.pop(task)
            with _loss_is_said():
                results.append((name, task.result()))
        return results

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stopper.send_bytes(b"stop")  # it stays unread, so that every worker sees it
        self._pool.shutdown(cancel_futures=True)
        self._stopper.close()
        self._stop.close()
