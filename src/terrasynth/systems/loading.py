"""Loading a pipeline: what can go wrong as one message, and its precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from terrasynth.errors import TerraSynthError

__all__ = ["blind", "cast", "check_whole", "loading", "paints_no_layouts", "paints_no_numbers", "takes_no_shares"]


def _what(error: Exception, name: str | Path) -> str:
    path = Path(name)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2):  # no OWNER/NAME on the hub, which is asked
        return "no such folder"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def loading(name: str | Path, expected: str) -> Iterator[None]:
    """Turn what diffusers raises for a model that is missing, damaged or of another kind into a `TerraSynthError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise TerraSynthError(
            "the model can not be loaded",
            path=name,
            found=_what(error, name),
            expected=expected,
            fix="check the folder; for a hub name, the connection, the login and the model's licence",
        ) from error


def check_whole(pipeline: DiffusionPipeline, name: str | Path) -> None:
    """Refuse a pipeline of which a network lacks weights, which diffusers loads with a warning and without numbers.

    Raises:
        TerraSynthError: with the first weights that there are not.
    """
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            state = [*module.named_parameters(), *module.named_buffers()]
            if lost := [weight for weight, tensor in state if tensor.is_meta]:
                raise TerraSynthError(
                    "the model lacks weights",
                    path=Path(name, part),
                    found=f"none for {', '.join(lost[:3])}" + (f" and {len(lost) - 3} more" if len(lost) > 3 else ""),
                    expected="what the version of TerraSynth that trained it saves whole",
                    fix="copy the folder again, or train the model again with this version",
                )


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


def paints_no_numbers() -> TerraSynthError:
    """What to say when paintings are not finite."""
    return TerraSynthError("the model paints values that are no numbers", found="NaN or infinity", fix="train it again")


def takes_no_shares(shares: Mapping[str, float]) -> TerraSynthError:
    """What to say when a generator that paints layouts is asked for so much of a class."""
    return TerraSynthError(
        "the model can not be asked for shares of classes",
        found=", ".join(f"{name}: {share:g}" for name, share in shares.items()),
        expected="what `terrasynth train --what pairs` trained",
        fix="leave out pairs.sampling.shares; in Python, name classes: `pipeline.layouts(prompts, seeds=…)`",
    )
