"""What ends a run: the one exception for anything a user can mend, and the end of the time allowed.

Also how changed settings are told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

__all__ = ["OutOfTime", "TerraSynthError", "changes", "combined", "flat", "listed"]


class OutOfTime(Exception):
    """The minutes allowed are over; everything done so far is kept."""


class TerraSynthError(Exception):
    """Says what is wrong, where, what was found, what was expected and what to do next.

    Args:
        problem: one clause naming what is wrong, without a full stop.
        path: the file or folder concerned.
        found: what was there instead.
        expected: what should have been there.
        fix: the next thing to do, as an imperative or a command.

    The command line prints the message alone, without a stack trace.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        self.path = path
        self.found = found
        self.expected = expected
        self.fix = fix
        lines = [f"{path}: {problem}" if path is not None else problem]
        if found is not None:
            lines.append(f"  found:    {found}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if fix is not None:
            lines.append(f"  to do:    {fix}")
        super().__init__("\n".join(lines))

    def line(self) -> str:
        """Where, what is wrong and what was found, on one line."""
        where = "" if self.path is None else f"{self.path}: "
        return where + self.problem + ("" if self.found is None else f" ({self.found})")


def listed(items: Sequence[str], separator: str = ", ", shown: int | None = 10) -> str:
    """Some of many, and how many more there are; `shown: None` lists all."""
    rest = 0 if shown is None else len(items) - shown
    return separator.join(items[:shown]) + (f"{separator}and {rest} more" if rest > 0 else "")


def combined(errors: Sequence[TerraSynthError], problem: str, shown: int | None = 10) -> TerraSynthError:
    """All bad files in one message; a single one keeps its own.

    Args:
        errors: what is wrong with each, at least one.
        problem: what they have in common.
        shown: how many are listed; None lists all.
    """
    if len(errors) == 1:
        return errors[0]

    def distinct(values: Iterable[object]) -> str | None:
        return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or None

    return TerraSynthError(
        problem,
        found="\n    " + listed([error.line() for error in errors], "\n    ", shown),
        expected=distinct(error.expected for error in errors[:10]),
        fix=distinct(error.fix for error in errors[:10]),
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changes(was: Mapping[str, Any], now: Mapping[str, Any], harmless: AbstractSet[str] = frozenset()) -> list[str]:
    """What differs between two nested settings, as `dotted.key: was -> now`; `harmless` keys may."""
    before, after = flat(was), flat(now)
    nothing = "(not set)"
    return [
        f"{key}: {before.get(key, nothing)} -> {after.get(key, nothing)}"
        for key in before | after
        if key not in harmless and before.get(key, nothing) != after.get(key, nothing)
    ]
