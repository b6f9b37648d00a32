"""Gates with known, explained exceptions, and what the two reports without a GPU share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from bench.primitives import Primitive, load_primitives

__all__ = ["Gate", "Known", "check_words", "choose_primitives", "table"]


@dataclasses.dataclass(frozen=True)
class Known:
    """A gate that is missed, the figure that it may reach, and why."""

    limit: float
    reason: str


class Gate:
    """Holds figures against a bound, or against the limit of a known exception; the worst figure of a key decides.

    Args:
        name: what is bounded.
        bound: the figure allowed.
        known: key -> exception. A key covers itself and every key that begins with it and a space.
        at_least: figures have to reach the bound; otherwise they must not pass it.
    """

    def __init__(self, name: str, bound: float, known: Mapping[str, Known] | None = None, *, at_least: bool = False):
        self.name, self.bound, self.known, self.at_least = name, bound, known or {}, at_least
        self.worst: dict[str, float] = {}

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound

    def _exception(self, key: str) -> str | None:
        """Return the exception that says most about the key."""
        covering = [name for name in self.known if key == name or key.startswith(f"{name} ")]
        return max(covering, key=len, default=None)

    def check(self, key: str, value: float) -> str:
        """Return ``"ok"``, ``"known"`` or ``"MISSED"``."""
        if key not in self.worst or not self._holds(value, self.worst[key]):
            self.worst[key] = value
        if self._holds(value, self.bound):
            return "ok"
        exception = self._exception(key)
        return "known" if exception is not None and self._holds(value, self.known[exception].limit) else "MISSED"

    def failures(self, stale: Literal["none", "seen", "all"] = "all") -> list[str]:
        """List the figures that miss their bound, and the exceptions that nothing needed.

        Args:
            stale: which of these: none, those of figures that were seen, or also those of which no figure was.
        """
        found = []
        needed, seen = set(), {self._exception(key) for key in self.worst}
        side = "at least" if self.at_least else "at most"
        for key, value in self.worst.items():
            if self._holds(value, self.bound):
                continue
            exception = self._exception(key)
            needed.add(exception)
            if exception is None:
                found.append(f"{self.name}: {key} has {value:.4g}, {side} {self.bound:g} is allowed")
            elif not self._holds(value, self.known[exception].limit):
                limit = self.known[exception].limit
                found.append(f"{self.name}: {key} has {value:.4g}, its known exception allows {side} {limit:g}")
        for key in self.known:
            if key not in needed and (stale == "all" or (stale == "seen" and key in seen)):
                found.append(f"{self.name}: the exception of {key} is stale")
        return found

    def reasons(self) -> list[str]:
        """Return the exceptions that were made use of, in words: those with the same reason in one line."""
        used = {self._exception(key) for key, value in self.worst.items() if not self._holds(value, self.bound)}
        lines: dict[str, list[str]] = {}
        for key, known in self.known.items():
            if key in used:
                lines.setdefault(known.reason, []).append(f"{key} ({known.limit:g})")
        return [f"{', '.join(keys)}: {reason}" for reason, keys in lines.items()]


def check_words(words: Iterable[str], choices: Iterable[str], what: str) -> None:
    """Raise ValueError about the first word that is none of the choices."""
    for word in words:
        if word not in choices:
            raise ValueError(f"unknown {what} {word!r}; expected one of {', '.join(choices)}")


def choose_primitives(names: str | None) -> dict[str, Primitive]:
    """Return the primitives named, comma separated, or all."""
    primitives = load_primitives()
    if names is None:
        return primitives
    check_words(names.split(","), primitives, "primitive")
    return {name: primitives[name] for name in names.split(",")}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return the rows as aligned text: numbers to the right."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)

    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells), 0) for i, column in enumerate(columns)]
    right = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        )
        for line in [list(columns), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)
