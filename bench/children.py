"""Processes that do one item after the other: a crash, a hang or a broken device there takes nothing else with it.

The parent writes items to a child's stdin, a line each, and reads rows and the end of each item from its stdout. A
child lives as long as it can be used, so that what it imported, compiled and built serves the next item too. The
parent keeps the other end of stdin open: where that ends without a last word, the parent is dead, and the child ends
with everything that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Child", "Item", "Row", "serve"]

Row = dict[str, Any]
Item = dict[str, Any]

_BROKEN = 3  # exit code of a child whose device answers no more; the item was told
_REASON_LENGTH = 300


def _end_all() -> None:
    """End this process and, where it leads its own group, whatever it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _listen(waiting: queue.SimpleQueue[Item | None]) -> None:
    for line in sys.stdin:
        item = json.loads(line)
        waiting.put(item)
        if item is None:
            return
    _end_all()


def _items() -> Iterator[Item]:
    """Give items from stdin until a null; a thread of its own goes on reading while they are done."""
    waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(waiting,), daemon=True).start()
    while (item := waiting.get()) is not None:
        yield item


def serve(work: Callable[[Item], Iterator[Row]], answers: Callable[[], bool] = lambda: True) -> None:
    """Do the items that come on stdin, and tell each row and each end in a line on what was stdout.

    Args:
        work: item -> rows. An exception becomes a row with ``failed``, and the next item may do better.
        answers: whether the device still works; if not, this process ends.
    """
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # others print too, from C as well

    def tell(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=told, flush=True)

    for item in _items():
        try:
            for row in work(item):
                tell({"row": row})
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            tell({"row": {**item, "failed": reason[:_REASON_LENGTH]}})
        if not answers():
            os._exit(_BROKEN)
        tell({"done": True})


class Child:
    """A process that does items.

    Args:
        command: a program that calls :func:`serve`.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    @property
    def lives(self) -> bool:
        """True if it can take an item."""
        return self.process.poll() is None

    def do(self, item: Item, seconds: float, tell: Callable[[Row], None]) -> str | None:
        """Have the item done, and tell its rows as they come.

        Returns:
            None, or why the process ended before the item did; after ``seconds`` it is killed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(max(seconds, 0.0), self.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(item) + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                said = json.loads(line)
                if "done" in said:
                    return None
                tell(said["row"])
        finally:
            timer.cancel()
        code = self.process.wait()
        return None if code == _BROKEN else f"the process ended with {code}: {self._last_words()}"

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return " ".join(lines[-1:])[:_REASON_LENGTH]

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.lives:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it, and wait until it is gone."""
        self.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
