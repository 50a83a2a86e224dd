"""Models that come with the package, and how their names are told from folders. Loads nothing heavy."""

from __future__ import annotations

import difflib
from pathlib import Path

from terrasynth.errors import TerraSynthError

__all__ = ["PACKAGED", "packaged_or"]

_WEIGHTS = Path(__file__).parent / "weights"
#: Models that come with the package, by name.
PACKAGED = tuple(sorted(path.parent.name for path in _WEIGHTS.glob("*/model_index.json")))


def packaged_or(model: str | Path) -> str | Path:
    """The folder of a model that comes with the package; anything else as it is.

    Raises:
        TerraSynthError: a bare name, neither packaged nor a folder here: what hubs have is called OWNER/NAME.
    """
    name = str(model)
    if name in PACKAGED:
        return _WEIGHTS / name
    if "/" not in name and not Path(name).exists():
        near = difflib.get_close_matches(name, PACKAGED, n=1)
        raise TerraSynthError(
            "no such model",
            path=name,
            expected=f"{', '.join(PACKAGED)}, a folder, or OWNER/NAME on the hub",
            fix=f"did you mean `{near[0]}`?" if near else "correct the name",
        )
    return model
