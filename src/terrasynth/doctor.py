"""What of this machine and of the installation works, and whether a recipe would fit it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Check", "check_hub", "check_package", "checks", "plan", "run"]

# Where the name to import is not the name to install with underscores.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
#: What the extras of the package are for.
EXTRAS = {
    "peft": "low-rank adapters (`trainable: lora`)",
    "torchgeo": "datasets to and from torchgeo (`terrasynth.data.torchgeo`)",
    "track": "TensorBoard logs of training",
    "vector": "masks from GeoPackage, Shapefile and FlatGeobuf",
}
_COLORS = {"ok": "green", "note": "yellow", "FAILED": "red"}
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report: `FAILED` is what TerraSynth can not do without, `note` what it can."""

    name: str
    status: Literal["ok", "note", "FAILED"]
    detail: str


def run(console: Console | None = None) -> bool:
    """Print a table of all checks; False if one failed."""
    console = console or Console()
    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    failed = []
    with console.status("importing the dependencies takes a few seconds ..."):
        for check in checks():
            table.add_row(Text(check.name), Text(check.status, _COLORS[check.status]), Text(check.detail))
            if check.status == "FAILED":
                failed.append(check.name)
    console.print(table)
    console.print(f"\n{len(failed)} failed: {', '.join(failed)}" if failed else "\nEverything that is needed works.")
    return not failed


def checks() -> Iterator[Check]:
    """All checks, in the order in which one would look for a fault."""
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _machine()
    core = [check_package(*requirement) for requirement in _requirements(None)]
    yield from core
    for extra, enables in EXTRAS.items():
        yield _extra(extra, enables)
    if all(check.status == "ok" for check in core if check.name == "torch"):
        yield from _torch()
    yield check_hub(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def _requirements(extra: str | None) -> Iterator[tuple[str, str]]:
    """Name and lower bound of what an extra needs; None asks for what is always needed."""
    for requirement in metadata.requires("terrasynth") or []:
        belongs = re.search(r"extra == ['\"](.+?)['\"]", requirement)
        bounds = re.match(r"([\w.-]+)(?:\s*>=\s*([\w.]+))?", requirement)
        if bounds and (belongs[1] if belongs else None) == extra:
            yield bounds[1], bounds[2] or "0"


def _numbers(version: str) -> list[int]:
    """The release part of a version, for comparison."""
    release = re.match(r"[\d.]*\d", version)
    return [int(part) for part in release[0].split(".")] if release else []


def check_package(name: str, minimum: str = "0") -> Check:
    """Whether a package is installed, new enough and really imports."""
    install = f"pip install --upgrade '{name}>={minimum}'"
    try:
        version = metadata.version(name)
        if _numbers(version) < _numbers(minimum):
            return Check(name, "FAILED", f"{version} is older than {minimum}; {install}")
        importlib.import_module(_MODULES.get(name.lower(), name.replace("-", "_")))
    except metadata.PackageNotFoundError:
        return Check(name, "FAILED", f"not installed; {install}")
    except Exception as error:  # A broken installation can raise anything on import; the doctor's job is to say so.
        return Check(name, "FAILED", f"does not import: {type(error).__name__}: {error}; {install}")
    return Check(name, "ok", version)


def _extra(extra: str, enables: str) -> Check:
    missing = [check for check in (check_package(*needed) for needed in _requirements(extra)) if check.status != "ok"]
    if missing:
        problems = "; ".join(f"{check.name} {check.detail.partition(';')[0]}" for check in missing)
        return Check(f"extra {extra}", "note", f"{enables}: {problems}; pip install 'terrasynth[{extra}]'")
    return Check(f"extra {extra}", "ok", enables)


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / _GIB:.0f} GiB memory"
    yield Check("processor", "ok", f"{cores} cores{memory}")
    free = shutil.disk_usage(".").free / _GIB
    yield Check("disk", "ok" if free > 5 else "note", f"{free:.0f} GiB free here")
    try:
        with tempfile.TemporaryFile(dir="."):
            yield Check("this folder", "ok", "can be written: runs/ goes here")
    except OSError as error:
        yield Check("this folder", "note", f"can not be written ({error.strerror}): give every command --out DIR")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("speed, CPU", "ok", f"{_gflops('cpu'):,.0f} GFLOP/s in float32, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
    elif shutil.which("nvidia-smi"):
        yield Check(
            "GPU", "note", f"the driver is there, but this torch ({torch.__version__}) can not use it; see pytorch.org"
        )
    else:
        yield Check("GPU", "note", "none: the demo and small studies run on the CPU, pretrained base models need one")


def _gpu(index: int) -> Check:
    import torch

    device = torch.cuda.get_device_properties(index)
    about = f"{device.name}, {device.total_memory / _GIB:.0f} GiB"
    try:
        speed = _gflops(f"cuda:{index}")
    except RuntimeError as error:
        # A driver or a build of torch that does not fit shows here first, and would end every run.
        return Check(f"GPU {index}", "FAILED", f"{about}, does not compute: {error}")
    bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
    return Check(f"GPU {index}", "ok", f"{about}, {bf16} bfloat16, {speed:,.0f} GFLOP/s in float32")


def plan(
    name: str,
    cards: Sequence[str] = (),
    overrides: Sequence[str] = (),
    console: Console | None = None,
    *,
    what: Literal["generator", "refiner", "pairs"] = "generator",
) -> None:
    """Print what a recipe needs of a card.

    Args:
        name: of the recipe, or its file.
        cards: names of cards, or their memory in GiB; none for what this machine has.
        overrides: `KEY=VALUE` of the recipe.
        console: where to; by default standard output.
        what: is trained, as `terrasynth train --what`.

    Raises:
        TerraSynthError: the recipe has faults, there is no such card, or the configuration of the recipe's base model
            is not here.
    """
    from terrasynth.recipe_io import load_recipe

    loaded = load_recipe(name, overrides)

    from terrasynth.planning.cards import here, named
    from terrasynth.planning.plan import make_plan, show_plan

    machines = [named(card) for card in cards] or here()
    planned = make_plan(loaded.recipe, loaded.base, gpu=machines[0].gpu, what=what)
    show_plan(planned, machines, console or Console())


def _gflops(device: str, seconds: float = 1.0) -> float:
    """Speed of float32 matrix products over about `seconds`."""
    import torch

    size = 1024 if device == "cpu" else 4096
    matrix = torch.ones(size, size, device=device)
    # The first product pays for starting threads and kernels; reading one value waits for the device.
    (matrix @ matrix)[0, 0].item()
    products, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        (matrix @ matrix)[0, 0].item()
        products += 1
    return products * 2 * size**3 / elapsed / 1e9


def check_hub(address: str, timeout: float = 3.0) -> Check:
    """Whether the model hub answers; never a failure, since only pretrained base models come from there."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return Check("hub", "note", "HF_HUB_OFFLINE is set: only models that are already here load")
    answers: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")  # noqa: S310 (the user's own HF_ENDPOINT)
        try:
            with urllib.request.urlopen(request, timeout=timeout):  # noqa: S310
                answers.append("")
        except (OSError, ValueError) as error:
            answers.append(str(error))

    # In a thread of its own: the timeout does not cover the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if answers == [""]:
        return Check("hub", "ok", address)
    reason = answers[0] if answers else f"no answer within {timeout:.0f} s"
    return Check("hub", "note", f"{address} can not be reached ({reason}): everything from scratch works without it")
