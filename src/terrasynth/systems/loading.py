"""Loading a pipeline: what can go wrong as one message, and its precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from terrasynth.errors import TerraSynthError

__all__ = ["blind", "cast", "loading", "paints_no_layouts"]


@contextmanager
def loading(name: str | Path, expected: str) -> Iterator[None]:
    """Turn what diffusers raises for a model that is missing, damaged or of another kind into a `TerraSynthError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TerraSynthError(
            "the model can not be loaded",
            path=name,
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            expected=expected,
            fix="check the folder; for a hub name, the connection, the login and the model's licence",
        ) from error


def cast(pipeline: DiffusionPipeline, dtype: torch.dtype) -> None:
    """Bring every part to a precision, as the pipeline's `to` does, without its warning about modules that are none."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)


def blind() -> TerraSynthError:
    """What to say when a model is given references and never learned to look at them."""
    return TerraSynthError(
        "the model can not look at references",
        found="a model that was trained without them",
        expected="one trained with generator.reference",
        fix="leave out --references (in Python, `references`), or train one",
    )


def paints_no_layouts() -> TerraSynthError:
    """What to say when a model is asked for masks and never learned to paint them."""
    return TerraSynthError(
        "the model can not paint layouts",
        found="a model that was trained without them",
        expected="one trained with generator.layouts",
        fix="paint under masks (--masks), or train one: `terrasynth train RECIPE --set generator.layouts=0.5`, or what "
        "paints both: `terrasynth train RECIPE --what pairs`",
    )
