"""The command line: every command loads a recipe, calls one function of one room and says what came out.

Rooms are imported inside the commands, so that `terrasynth --help` never loads torch.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from terrasynth import __version__
from terrasynth.errors import TerraSynthError

if TYPE_CHECKING:
    from terrasynth.data.folder import Tiles
    from terrasynth.study.run import Study

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Turns what a user can mend into a message and an exit code; anything else keeps its stack trace."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 = something for the user to mend, 130 = interrupted."""
        try:
            return super().invoke(ctx)
        except TerraSynthError as error:
            typer.echo(error, err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            if not _is_mendable(error):
                raise
            where = error.filename or "writing"
            typer.echo(f"{where}: {error.strerror}\n  to do:    mend that, then run the same command again", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("\nInterrupted. The same command goes on from here.", err=True)
            raise typer.Exit(130) from error


def _is_mendable(error: OSError) -> bool:
    """Whether a folder or a disk refused; a file that we expected and that is not there is a fault of ours."""
    if error.errno in (errno.ENOENT, errno.EEXIST):
        return traceback.extract_tb(error.__traceback__)[-1].name == "mkdir"
    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
    return error.errno in (*refused, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First steps: [cyan]terrasynth doctor[/], then [cyan]terrasynth demo[/].",
)


def _example(command: str) -> str:
    return f"Example: [cyan]{command}[/]"


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A packaged recipe (`terrasynth recipe` lists them) or a YAML file.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", exists=True, file_okay=False, help="Folder of your tiles: sets `data.root`."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", file_okay=False, help="Folder of the run. (default: runs/NAME)"),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes",
        metavar="M",
        min=0,
        help="Stop in good order after M minutes, with exit code 75; the same command goes on.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Processes that share the work. On processors, as many as there are cores is fastest for small networks; "
        "each needs memory of its own.",
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Go on without tiles, masks and images that can not be used, and list them. (default: list them and end)",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one value of the recipe, by its dotted key; repeatable."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"terrasynth {__version__}")
        raise typer.Exit


class ExportFormat(StrEnum):
    """The keys of `terrasynth.data.export.FORMATS`, known before anything heavy is loaded."""

    MMSEG = "mmseg"
    COCO_PANOPTIC = "coco-panoptic"
    COCO_SEMANTIC = "coco-semantic"
    WEBDATASET = "webdataset"


@app.callback()
def terrasynth(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Would synthetic training data help your remote-sensing task? TerraSynth makes it and measures the answer."""
    # A model is data, never code. diffusers reads this when it is first imported, and then runs no code of a model's
    # folder or of the hub, whatever the folder asks for.
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"


@app.command(epilog=_example("terrasynth demo"))
def demo(out: Out = None) -> None:
    """Run a whole small study: no data, no GPU and no network needed.

    Paints procedural scenes, trains a generator on 16 labelled tiles, paints more with it, trains a segmentor with
    and without them, and writes a report. Repeating the command shows the finished report.
    """
    _study("demo", None, out, None, (), jobs=None)


@app.command(epilog=_example("terrasynth train dubai16 --data tiles/dubai --set generator.train.steps=2000"))
def train(
    recipe: RecipeName,
    data: Data = None,
    out: Out = None,
    max_minutes: MaxMinutes = None,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Train the generator of RECIPE, and nothing that it does not need.

    Stopped or killed, the same command goes on from the last checkpoint.
    """
    with _time_limit():
        unit = _open(recipe, data, out, max_minutes, _settings(overrides, skip_bad)).generator
    model = unit.folder / "model"
    typer.echo(f"{model}\nPaint with it: terrasynth generate {shlex.quote(str(model))} --masks DIR")


@app.command(
    epilog=_example(
        "terrasynth generate runs/dubai16/generator-1a2b3c4d/model --masks tiles/dubai/masks/train --count 48"
    )
)
def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe (its generator is trained if the run's folder has none) or a model's folder.",
        ),
    ],
    data: Data = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of the run whose generator paints: what --out was in `train` or `study`. (default: runs/NAME)",
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of the masks to paint. (default: the recipe's training masks)",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many images. (default: one per mask)"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", file_okay=False, help="Folder of the data set. (default: synthetic/ beside the model)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run; image i derives its own from it and i.")] = 0,
    steer: Annotated[
        Path | None,
        typer.Option(
            metavar="SEGMENTOR_DIR",
            exists=True,
            file_okay=False,
            help="Steer with this trained segmentor (control-rectify flow matching).",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Licence of the images, for the card, as `cc-by-4.0`. (default: what the card says, or unknown)",
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes",
            metavar="M",
            min=0,
            help="If the generator is still to be trained, stop that in good order after M minutes, with exit code 75; "
            "the same command goes on. Painting is not limited.",
        ),
    ] = None,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Paint labelled images for masks: a data set of images, masks, metadata and a card.

    Image i depends on its mask, the seed and i alone. Stopped or killed, the same command adds what is missing. With a
    model's folder, `--set` takes keys of `sampling` and `steering` only.
    """
    from terrasynth.recipe_io import override_defaults

    model = Path(source)
    if model.is_dir():
        if masks is None:
            raise typer.BadParameter("a model alone has no masks to paint; give their folder", param_hint="--masks")
        if data or run or max_minutes is not None:
            raise typer.BadParameter(
                "these belong to a recipe, and a model's folder was given", param_hint="--data, --run, --max-minutes"
            )
        painted: Path | Tiles = masks
        settings = override_defaults(overrides or (), ("sampling", "steering"))
    else:
        with _time_limit():
            opened = _open(source, data, run, max_minutes, _settings(overrides, skip_bad))
            model, painted = opened.generator.folder / "model", masks or opened.train
        settings = opened.recipe

    from terrasynth.study.generate import generate as paint

    _silence_libraries()
    folder = paint(
        model,
        painted,
        out or model.parent / "synthetic",
        sampling=settings.sampling,
        steering=settings.steering,
        segmentor=steer,
        count=count,
        seed=seed,
        license=license,
        skip_bad=skip_bad,
    )
    typer.echo(folder)


@app.command(epilog=_example("terrasynth export painted --to mmseg --out exports/mmseg"))
def export(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET", exists=True, file_okay=False, help="Folder that `terrasynth generate` wrote."
        ),
    ],
    to: Annotated[
        ExportFormat,
        typer.Option(
            help="`mmseg`: image and annotation folders with a config; `coco-panoptic`: JSON and a PNG of segments; "
            "`coco-semantic`: JSON with run lengths; `webdataset`: tar shards."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the export: new, empty, or an earlier one.")],
    shard_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Samples in a tar file of webdataset. (default: 1000)")
    ] = None,
) -> None:
    """Write a synthetic data set in the layout of another tool.

    DATASET itself is a Hugging Face image folder, which `datasets.load_dataset` reads, and torchgeo reads it with
    `terrasynth.data.torchgeo.SyntheticTiles`. Killed, the same command starts again and ends with the same files.
    """
    if shard_size is not None and to != ExportFormat.WEBDATASET:
        raise typer.BadParameter("only webdataset has shards", param_hint="--shard-size")

    from terrasynth.data.export import export as write

    typer.echo(write(dataset, to, out, shard_size=shard_size or 1000))


@app.command(epilog=_example("terrasynth study dubai16 --data tiles/dubai --set study.seeds=[0,1,2,3,4]"))
def study(
    recipe: RecipeName,
    data: Data = None,
    out: Out = None,
    max_minutes: MaxMinutes = None,
    jobs: Jobs = 1,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Answer the question for RECIPE: would synthetic data help this task, by how much, and how sure is that?

    Trains the generator, paints, trains the segmentor once per arm and seed, and writes report.html. Stopped or
    killed, the same command goes on from what is finished.
    """
    _study(recipe, data, out, max_minutes, _settings(overrides, skip_bad), jobs)


@app.command(epilog=_example("terrasynth report runs/demo"))
def report(
    run: Annotated[
        Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="Folder of a finished study.")
    ],
) -> None:
    """Write report.html again from the results in DIR; nothing is trained."""
    from terrasynth.study.report import write_report

    typer.echo(write_report(run))


@app.command(epilog=_example("terrasynth recipe demo > mine.yaml"))
def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A packaged recipe or a YAML file; without it, list them.")
    ] = None,
) -> None:
    """List the packaged recipes, or print one whole: every key described, every default filled in."""
    from terrasynth.recipe_io import explain, load_recipe, packaged

    if name is not None:
        typer.echo(explain(load_recipe(name).recipe), nl=False)
        return
    width = max(map(len, packaged()))
    for packaged_name, description in packaged().items():
        typer.echo(f"{packaged_name:<{width}}  {description}")


@app.command(epilog=_example("terrasynth doctor"))
def doctor() -> None:
    """Check this machine: Python, torch, the device, memory, disk, dependencies, extras, the hub.

    Exit code 1 if something that TerraSynth can not do without is missing or broken.
    """
    from terrasynth.doctor import run

    raise typer.Exit(0 if run() else 1)


def _study(
    name: str,
    data: Path | None,
    out: Path | None,
    max_minutes: float | None,
    overrides: Sequence[str],
    jobs: int | None,
) -> None:
    """`jobs: None` takes one process for each of the cores, up to four."""
    study = _open(name, data, out, max_minutes, overrides)

    import torch

    from terrasynth.study.workers import workers

    jobs = jobs or min(4, torch.get_num_threads())
    with _time_limit(), workers(jobs - 1, study.recipe, study.base, study.out, max_minutes):
        page = study.run(shlex.join(["terrasynth", *sys.argv[1:]]))

    from terrasynth.study.report import read_results, verdict

    typer.echo(f"{verdict(read_results(page.parent)).headline}\n{page}")


def _settings(overrides: list[str] | None, skip_bad: bool) -> list[str]:
    return [*(overrides or ()), *(["data.skip_bad=true"] if skip_bad else [])]


def _open(name: str, data: Path | None, out: Path | None, max_minutes: float | None, overrides: Sequence[str]) -> Study:
    """The study of a recipe. The recipe is read before torch is: a typing mistake shows at once."""
    from terrasynth.recipe_io import load_recipe

    loaded = load_recipe(name, overrides, data=data)

    from terrasynth.study.run import Study

    _silence_libraries()
    folder = re.sub(r"[^\w.-]+", "-", loaded.recipe.name).strip(".-") or "unnamed"
    return Study(loaded.recipe, loaded.base, out or Path("runs", folder), max_minutes=max_minutes)


def _silence_libraries() -> None:
    """Our own progress bars say what is going on; those of the libraries would interrupt them."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()


@contextmanager
def _time_limit() -> Iterator[None]:
    from terrasynth.study.units import OutOfTime

    try:
        yield
    except OutOfTime as over:
        typer.echo("The minutes are over. The same command goes on from here.", err=True)
        raise typer.Exit(75) from over


def main() -> None:
    """Entry point of the `terrasynth` command."""
    app()
