"""Checkpoints: the whole state of a training run as safetensors and JSON, never pickle.

    RUN/
    ├── log.jsonl                      one line per `log_every` steps, one per evaluation
    ├── best.safetensors               best weights so far, of a run that monitors a metric
    └── checkpoints/
        ├── last -> step-00000500      for people and scripts; the folders themselves decide
        └── step-00000500/
            ├── model.safetensors      trainable parameters and buffers, by their name in the model
            ├── ema.safetensors        moving average of the trainable parameters and of batch norms' statistics, if any
            ├── optimizer.safetensors  "NAME.exp_avg", "NAME.exp_avg_sq", "NAME.step" of every trainable parameter
            ├── best.safetensors       hard link to (or copy of) RUN/best.safetensors as it was at this step
            └── state.json             step, config, identity, seconds, best, pending log values, versions

A checkpoint folder appears by one rename, so it is whole or absent; only then is its predecessor deleted. A folder that
lost files since (a broken copy, a full quota) is passed over if an older whole one lies beside it. There is no
file of random states: every random number of a run is a function of (seed, step), see `terrasynth.training.loop`.
Frozen parameters are not stored: whoever builds the model puts them back.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import terrasynth
from terrasynth.errors import TerraSynthError, changes
from terrasynth.io import atomic_dir, atomic_write, read_json, write_json

__all__ = [
    "check_resume",
    "latest",
    "load_weights",
    "read_state",
    "restore",
    "restore_best",
    "save",
    "save_weights",
    "tidy",
    "warn_of_versions",
    "weights",
]

_FORMAT = "terrasynth checkpoint 1"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
#: What AdamW keeps of every parameter.
_MOMENTS = {"exp_avg", "exp_avg_sq", "step"}
_STEP = re.compile(r"step-(\d{8,})")
_BEST = "best.safetensors"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name; a tensor shared by two names appears under the first."""
    persistent = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write `weights(model)` to a safetensors file that replaces `path` in one step."""
    with atomic_write(path) as partial:
        _write(partial, weights(model))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    saved = optimizer.state_dict()
    return {
        f"{name}.{key}": value
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
        for key, value in saved["state"].get(index, {}).items()
    }


def save(
    run: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `state["step"]`, then delete the one before.

    Args:
        run: folder of the run.
        model: its `weights` are written.
        optimizer: made from named parameters; every value of its state is a tensor.
        ema: moving averages of the trainable parameters by name, if there are any.
        state: JSON-able; what `read_state` gives back, with `versions` added.

    Raises:
        TerraSynthError: the disk is full; the checkpoint before is still whole.
    """
    checkpoints = run / "checkpoints"
    folder = checkpoints / f"step-{state['step']:08d}"
    with atomic_dir(folder) as partial:
        _write(partial / _WEIGHTS, weights(model))
        _write(partial / _OPTIMIZER, _optimizer_tensors(optimizer))
        if ema is not None:
            _write(partial / "ema.safetensors", ema)
        if (run / _BEST).is_file():
            _link(run / _BEST, partial / _BEST)
        write_json(partial / _STATE, {"format": _FORMAT, **state, "versions": _versions()})
    tidy(run)
    return folder


def _versions() -> dict[str, str]:
    return {"terrasynth": terrasynth.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _link(source: Path, target: Path) -> None:
    """Hard link where the file system can, copy where not; files here are replaced, never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def tidy(run: Path) -> None:
    """Point `last` to the newest whole checkpoint, then delete the older ones."""
    if not (folders := _folders(run)):
        return
    newest = folders[-1]
    older = [folder for folder in _steps(run) if _step(folder) < _step(newest)] if _is_whole(newest) else []
    last, link = newest.with_name("last"), newest.with_name("last.new")
    link.unlink(missing_ok=True)
    link.symlink_to(newest.name)
    if last.is_dir() and not last.is_symlink():
        shutil.rmtree(last)  # the run folder was copied with its links followed
    link.replace(last)
    for folder in older:
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _steps(run: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _is_whole(folder: Path) -> bool:
    """Whether no file is missing or cut; whether they belong to this run is checked when they are used."""
    try:
        read_json(folder / _STATE)
        for name in (_WEIGHTS, _OPTIMIZER):
            with safe_open(folder / name, framework="pt"):
                pass  # compares the header with the length of the file
    except (TerraSynthError, SafetensorError, OSError):
        return False
    return True


def _folders(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first; where none is whole, those that are left: using them says what is wrong."""
    found = _steps(run)
    return [folder for folder in found if _is_whole(folder)] or found


def latest(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder; None when there is none yet.

    Where every checkpoint is damaged it is the newest of them, so that a run never starts over without a word.
    """
    return next(reversed(_folders(Path(run))), None)


def read_state(checkpoint: Path, needed: Iterable[str] = ("step",)) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Args:
        checkpoint: its folder.
        needed: keys that must be there.

    Raises:
        TerraSynthError: it is missing, lacks a key, or was written by something else.
    """
    path = checkpoint / _STATE
    if not path.is_file():
        raise TerraSynthError("the checkpoint is not complete", path=path, found="no such file", fix=_drop(checkpoint))
    state = read_json(path)
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != _FORMAT:
        raise TerraSynthError(
            "not the state of a checkpoint that this version can read",
            path=path,
            found=found,
            expected=_FORMAT,
            fix=f"delete {checkpoint.parent} to start over, or use the version that wrote it",
        )
    if missing := [key for key in needed if key not in state]:
        raise TerraSynthError(
            "the state of the checkpoint is damaged",
            path=path,
            found=f"no {', '.join(missing)}",
            fix=_drop(checkpoint),
        )
    return dict(state)


def _drop(checkpoint: Path) -> str:
    return f"restore the file, or delete {checkpoint} and run again"


def check_resume(checkpoint: Path, was: Mapping[str, Any], now: Mapping[str, Any], harmless: frozenset[str]) -> None:
    """The resume guard: a run goes on only as what it was.

    Args:
        checkpoint: named in the message.
        was: what the run was started with, from its state.
        now: what it is to go on with; plain JSON values, nested as in `was`.
        harmless: dotted keys that may differ.

    Raises:
        TerraSynthError: lists every dotted key that differs, `was -> now`.
    """
    if changed := changes(was, now, harmless):
        run = checkpoint.parent.parent
        raise TerraSynthError(
            "this folder holds a training run with other settings, which can not be continued with these",
            path=run,
            found="\n            ".join(changed),
            expected="the settings that it was started with",
            fix=f"give another folder (--out), restore the settings, or delete {run} to start over",
        )


def warn_of_versions(state: Mapping[str, Any]) -> None:
    """Other library versions are allowed, but only equal ones promise an equal result to the bit."""
    if changed := changes(state["versions"], _versions()):
        warnings.warn(
            f"the run goes on with other versions ({', '.join(changed)}): its numbers may differ in the last digits",
            stacklevel=2,
        )


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, its faults turned into errors that name it."""
    if not path.is_file():
        raise TerraSynthError(
            "the checkpoint is not complete",
            path=path.parent,
            found=f"no {path.name}",
            fix=_drop(path.parent),
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TerraSynthError(
            "not a whole safetensors file",
            path=path,
            found=str(error),
            fix="copy it again from its source, or delete its folder and run again",
        ) from error


@torch.no_grad()
def _fill(path: Path, targets: Mapping[str, Tensor], *, every: bool) -> None:
    """Copy the tensors of a file into those of the same names, in place; before any is copied, all are checked.

    Args:
        path: safetensors file.
        targets: where to put them.
        every: whether every target must be in the file.

    Raises:
        TerraSynthError: names, shapes or dtypes do not fit.
    """
    found = _read(path)
    names = [*found, *(name for name in targets if every and name not in found)]
    wrong = [
        f"{name}: {_signature(found.get(name))} -> {_signature(targets.get(name))}"
        for name in names
        if _signature(found.get(name)) != _signature(targets.get(name))
    ]
    if wrong:
        raise TerraSynthError(
            "these weights belong to another model",
            path=path,
            found=f"{len(wrong)} of {len(names)} tensors differ (file -> model): "
            + "; ".join(wrong[:4] + ["..."] * (len(wrong) > 4)),
            expected="the names, shapes and dtypes of the model",
            fix="build the model with the configuration that it was trained with, or give another folder",
        )
    for name, tensor in found.items():
        targets[name].copy_(tensor)


def _signature(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def restore(
    checkpoint: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None
) -> None:
    """Put weights, optimiser state and moving averages back, in place.

    Raises:
        TerraSynthError: a file is missing, truncated, or of another model.
    """
    _fill(checkpoint / _WEIGHTS, weights(model), every=True)
    if ema is not None:
        _fill(checkpoint / "ema.safetensors", ema, every=True)
    values: dict[str, dict[str, Tensor]] = {}
    saved = optimizer.state_dict()
    # The optimiser's own parameters: they may be elsewhere than the model's.
    indices: dict[str, int] = {}
    parameters: dict[str, Tensor] = {}
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        indices |= dict(zip(group["param_names"], packed["params"], strict=True))
        parameters |= dict(zip(group["param_names"], group["params"], strict=True))
    path = checkpoint / _OPTIMIZER
    moments = _read(path)
    for entry, tensor in moments.items():
        name, _, key = entry.rpartition(".")
        fits = name in indices and {f"{name}.{moment}" for moment in _MOMENTS} <= moments.keys()
        if not fits or (key != "step" and tensor.shape != parameters[name].shape):
            raise TerraSynthError(
                "not the optimiser state of this model",
                path=path,
                found=f"{entry}: {_signature(tensor)}",
                expected="exp_avg, exp_avg_sq and step of every trainable parameter",
                fix=_drop(checkpoint),
            )
        if key != "step":
            # The moments lie in memory as their parameter does (channels last, say): fused kernels rely on it.
            tensor = torch.empty_like(parameters[name]).copy_(tensor)
        values.setdefault(name, {})[key] = tensor
    optimizer.load_state_dict({**saved, "state": {indices[name]: state for name, state in values.items()}})


def restore_best(checkpoint: Path | None, run: Path) -> None:
    """Make RUN/best.safetensors what it was when the checkpoint was written, or at the start of the run."""
    if checkpoint is not None and (checkpoint / _BEST).is_file():
        with atomic_write(run / _BEST) as partial:
            partial.unlink()  # a link is made only where nothing is
            _link(checkpoint / _BEST, partial)
    else:
        (run / _BEST).unlink(missing_ok=True)


def load_weights(model: nn.Module, source: str | Path, which: Literal["ema", "model"] = "ema") -> None:
    """Load trained weights into a model, in place.

    Args:
        model: holds parameters and buffers of the stored names; those that are not stored (frozen in training) stay.
        source: run folder (its newest checkpoint), checkpoint folder, or a safetensors file such as `best.safetensors`.
        which: of a folder, the moving average or the plain weights.

    Raises:
        TerraSynthError: there is no such checkpoint or average, or it does not fit the model.
    """
    source = Path(source)
    targets = model.state_dict()
    if source.is_file():
        _fill(source, targets, every=False)
        return
    checkpoint = source if (source / _WEIGHTS).is_file() else latest(source)
    if checkpoint is None:
        raise TerraSynthError(
            "there is no checkpoint here",
            path=source,
            expected="a run folder, a checkpoint folder or a safetensors file",
            fix="check the path, or train first",
        )
    if which == "ema" and not (checkpoint / "ema.safetensors").is_file():
        raise TerraSynthError(
            "the run keeps no moving average",
            path=checkpoint,
            found="no ema.safetensors",
            fix="load its plain weights (which='model'), or train with ema_decay above 0",
        )
    _fill(checkpoint / _WEIGHTS, targets, every=False)
    if which == "ema":
        _fill(checkpoint / "ema.safetensors", targets, every=False)
