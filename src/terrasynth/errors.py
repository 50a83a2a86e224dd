"""The one exception that TerraSynth raises for anything a user can mend."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TerraSynthError"]


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
