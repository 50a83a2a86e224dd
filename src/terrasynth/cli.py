"""The command line: every command loads a recipe, calls one function of one room and says what came out.

Rooms are imported inside the commands, so that `terrasynth --help` never loads torch.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from terrasynth import __version__
from terrasynth.errors import OutOfTime, TerraSynthError

if TYPE_CHECKING:
    from terrasynth.data.folder import Tiles
    from terrasynth.study.run import Study

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Turns what a user can mend into a message and an exit code; anything else keeps its stack trace."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 = something for the user to mend, 75 = out of time, 130 = interrupted."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if (explained := _explain(error)) is None:
                raise
            text, code = explained
            typer.echo(text, err=True)
            raise typer.Exit(code) from error


def _explain(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of what a user can mend or has asked for; None for anything else."""
    if isinstance(error, TerraSynthError):
        return str(error), 2
    if isinstance(error, OutOfTime):
        return "The minutes are over. The same command goes on from here.", 75
    if isinstance(error, KeyboardInterrupt):
        return "\nInterrupted. The same command goes on from here.", 130
    if isinstance(error, OSError) and _is_mendable(error):
        where = error.filename or "writing"
        return f"{where}: {error.strerror}\n  to do:    mend that, then run the same command again", 2
    return None


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


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _distance(text: str) -> tuple[float, str]:
    return float(text.removesuffix("px").removesuffix("m")), "m" if text.endswith("m") else "px"


Bands = Annotated[
    Any,
    typer.Option(
        metavar="R,G,B",
        parser=_whole_numbers,
        help="Numbers of the bands to show as red, green and blue, counted from 1; or of one, for grey. Given, they "
        "switch transparency off: an alpha band is one as any other. (default: the only one or the only three beside "
        "alpha)",
    ),
]
StretchRange = Annotated[
    Any,
    typer.Option(
        metavar="LOW,HIGH",
        parser=_numbers,
        help="Stored values that become black and white, in all scenes alike; a pair for all bands, or one after the "
        "other for each. Needed unless the bands are 8-bit, which stay as they are.",
    ),
]
Percentiles = Annotated[
    Any,
    typer.Option(
        metavar="LOW,HIGH",
        parser=_numbers,
        help="Instead of --stretch: these percentiles of each band over all scenes together, as 2,98.",
    ),
]
WindowSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        min=8,
        max=4096,
        help="Side of the windows. (default: 512; of a refiner, the side that it learned from)",
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        min=0,
        help="What neighbouring windows share, where what they say is blended. (default: --size / 4)",
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Windows computed together.")]
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
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Would synthetic training data help your remote-sensing task? TerraSynth makes it and measures the answer."""
    if ctx.invoked_subcommand != "train" and _launched():
        with _every_process():
            raise TerraSynthError(
                f"`terrasynth {ctx.invoked_subcommand}` is for one process",
                found=f"{os.environ['WORLD_SIZE']} processes, as torchrun or accelerate start them",
                expected="that of `terrasynth train` alone",
                fix="start it by itself (`study` takes --jobs, or is started several times with one --out), or unset "
                "WORLD_SIZE",
            )
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


class Edges(StrEnum):
    """What becomes of less than a tile at the right and lower edge."""

    shift = "shift"
    drop = "drop"


class Split(StrEnum):
    """What goes to a split as a whole."""

    scene = "scene"
    blocks = "blocks"


class MaskCoding(StrEnum):
    """How mask rasters are coded."""

    auto = "auto"
    indices = "index"
    colors = "color"


@app.command(
    epilog=_example("terrasynth prepare scenes --out tiles/mine --labels classes.yaml --size 256 --split blocks")
)
def prepare(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", exists=True, file_okay=False, help="Folder of the scenes and their masks."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Folder of the tiles.")],
    labels: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="Label schema: a packaged one (`loveda`, `potsdam`, ...) or a YAML file."
        ),
    ],
    images: Annotated[
        str,
        typer.Option(
            metavar="PATTERN",
            help="The scenes under SRC: GeoTIFF of any size, PNG or JPEG. What the wildcards stand for is a scene's "
            "name.",
        ),
    ] = "images/*",
    masks: Annotated[
        str,
        typer.Option(
            metavar="PATTERN",
            help="Their masks under SRC, whose wildcards stand for the same: index, palette or RGB rasters, GeoJSON or "
            "other polygons (`terrasynth\\[vector]`); or one vector file for all scenes.",
        ),
    ] = "masks/*",
    size: Annotated[int, typer.Option(metavar="PIXELS", min=8, help="Side of the tiles. Nothing is resampled.")] = 256,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=1,
            help="From one tile to the next; less than --size makes them overlap. (default: --size)",
        ),
    ] = None,
    edges: Annotated[
        Edges,
        typer.Option(
            help="What is left at the right and lower edge of a scene or block: `shift` covers it with one more tile, "
            "shifted back; `drop` leaves it out."
        ),
    ] = Edges.shift,
    bands: Bands = None,
    stretch: StretchRange = None,
    percentiles: Percentiles = None,
    mask_coding: Annotated[
        MaskCoding, typer.Option(help="How mask rasters are coded; `auto` refuses what can be read in two ways.")
    ] = MaskCoding.auto,
    class_attribute: Annotated[
        str | None, typer.Option(metavar="NAME", help="What holds the class of a polygon: its name, or its value.")
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="Class of ground without a polygon. (default: it is unlabelled)"),
    ] = None,
    split: Annotated[
        Split,
        typer.Option(
            help="Whole scenes go to training, validation and test, scenes that overlap together; or `blocks` of each. "
            "Never random tiles."
        ),
    ] = Split.scene,
    block: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=1, help="Side of a block. (default: four tiles)")
    ] = None,
    fractions: Annotated[
        Any,
        typer.Option(metavar="TRAIN,VAL,TEST", parser=_numbers, help="Shares of the tiles. (default: 0.7,0.15,0.15)"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which scenes or blocks go where.")] = 0,
    caption: Annotated[
        str, typer.Option(metavar="TEXT", help="Caption of a tile; `{classes}` becomes the classes present.")
    ] = "a satellite image of {classes}",
    skip_unlabelled: Annotated[
        bool, typer.Option("--skip-unlabelled", help="Leave out tiles without a labelled pixel.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without the scenes that can not be used, and list them in DIR.")
    ] = False,
) -> None:
    """Cut scenes and their masks into tiles, split by place, with a recipe that a study runs on.

    Every pixel is read once before anything is written, and all bad files are named together. CRS and transform are
    kept. Stopped or killed, the same command goes on.
    """
    from terrasynth.data.prepare import PrepareSettings
    from terrasynth.data.prepare import prepare as cut

    settings = PrepareSettings(
        labels=labels,
        images=images,
        masks=masks,
        size=size,
        stride=stride,
        edges=edges.value,
        bands=bands,
        ranges=_pairs(stretch),
        percentiles=percentiles,
        mask_coding=mask_coding.value,
        class_attribute=class_attribute,
        background=background,
        split=split.value,
        block=block,
        fractions=fractions or (0.7, 0.15, 0.15),
        seed=seed,
        caption=caption,
        skip_unlabelled=skip_unlabelled,
        skip_bad=skip_bad,
    )
    made = cut(source, out, settings)
    typer.echo(f"{made.histogram}\n")
    if made.stretch:
        typer.echo(f"Shown with {made.stretch}: give `terrasynth predict` the same.")
    typer.echo(f"{made.recipe}\nNext: terrasynth study {shlex.quote(str(made.recipe))}")


def _pairs(numbers: tuple[float, ...] | None) -> tuple[tuple[float, float], ...] | None:
    if numbers is None:
        return None
    if len(numbers) % 2:
        raise typer.BadParameter(
            "give LOW,HIGH for all bands, or LOW,HIGH,LOW,HIGH,... for each", param_hint="--stretch"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


@app.command(epilog=_example("terrasynth train dubai16 --data tiles/dubai --set generator.train.steps=2000"))
def train(
    recipe: RecipeName,
    data: Data = None,
    out: Out = None,
    max_minutes: MaxMinutes = None,
    skip_bad: SkipBad = False,
    what: Annotated[
        Literal["generator", "refiner", "pairs"],
        typer.Option(
            help="What paints tiles under masks; what sharpens class maps, for `terrasynth refine`; or what paints "
            "tiles and masks together."
        ),
    ] = "generator",
    overrides: Overrides = None,
) -> None:
    """Train the generator of RECIPE, its refiner or its painter of pairs, and nothing that it does not need.

    Of `pairs.two_stages`, both are trained, one after the other. Stopped or killed, the same command goes on from the
    last checkpoint. Started by `torchrun` or `accelerate launch`, its processes share every step: the result is the
    same but for rounding, and it may go on in more or in fewer.
    """
    with _every_process() as speaks:
        study = _open(recipe, data, out, max_minutes, _settings(overrides, skip_bad))
        unit = getattr(study, what)
    model = unit.folder / "model"
    if speaks:
        name = shlex.quote(str(model))
        use = {
            "generator": f"Paint with it: terrasynth generate {name} --masks DIR"
            + (", or --pairs N" if study.recipe.generator.layouts else ""),
            "refiner": f"Refine with it: terrasynth refine IMAGE MAP --model {name} --out FILE",
            "pairs": f"Paint with it: terrasynth generate {name} --pairs N",
        }
        typer.echo(f"{model}\n{use[what]}")


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
            help="A recipe (its generator is trained if the run's folder has none), a model's folder, or a packaged "
            "model (`terrasynth-tiny`).",
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
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="MASK",
            exists=True,
            dir_okay=False,
            help="Paint one picture of the size of this mask raster, whatever it is, in the same place on the ground.",
        ),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Paint N images and their masks together, by the recipe's `pairs` (trained first if the run's folder "
            "has none), by its generator if that learns `layouts`, or by the folder of such a model; `--set "
            "'pairs.sampling.shares={road: 0.2}'` asks the first for classes.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Folder of the data set (default: synthetic/ beside the model); with --like, the file (.tif).",
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
    references: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of unlabelled images: each painting has the look of one of them. For a generator that was "
            "trained with `generator.reference`.",
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

    Image i depends on its mask, the seed and i alone, and with --references on these images. Stopped or killed, the
    same command adds what is missing. With a model's folder, `--set` takes keys of `sampling` and `steering` only
    (of `pairs.sampling` with --pairs, and of `sampling` where the model paints layouts first). With --like, one GeoTIFF
    instead; with --pairs, the masks are painted too.
    """
    from terrasynth.packaged import PACKAGED
    from terrasynth.recipe_io import override_defaults

    model = Path(source)
    trained = model.is_dir() or source in PACKAGED
    if trained and (data or run or max_minutes is not None):
        raise typer.BadParameter(
            "these belong to a recipe, and a model's folder was given", param_hint="--data, --run, --max-minutes"
        )
    if pairs is not None:
        if any(option is not None for option in (masks, count, like, steer, references)):
            raise typer.BadParameter(
                "these belong to paintings under masks, and --pairs paints masks too",
                param_hint="--masks, --count, --like, --steer, --references",
            )
        _silence_libraries()
        if trained:
            from terrasynth.systems.generate import model_class

            both = model_class(source) == "SatSynthPipeline"  # else masks first, then images under them
            recipe = override_defaults(overrides or (), ("pairs.sampling",) if both else ("pairs.sampling", "sampling"))
        else:
            opened = _open(source, data, run, max_minutes, _settings(overrides, skip_bad))
            recipe = opened.recipe
            if recipe.generator.layouts and recipe.pairs.sampling.shares:
                from terrasynth.systems.loading import takes_no_shares

                raise takes_no_shares(recipe.pairs.sampling.shares)  # before the model is trained
            model = (opened.generator if recipe.generator.layouts else opened.pairs).folder / "model"
        from terrasynth.systems.pairs import generate_pairs

        folder, how = out or model.parent / "synthetic", recipe.pairs.sampling
        typer.echo(generate_pairs(model, folder, how, count=pairs, images=recipe.sampling, seed=seed, license=license))
        return
    if like is not None and any(option is not None for option in (masks, count, steer, references)):
        raise typer.BadParameter(
            "these belong to a data set, and --like asks for one picture",
            param_hint="--masks, --count, --steer, --references",
        )
    if like is not None and out is None:
        raise typer.BadParameter("name the picture, as painted.tif", param_hint="--out")
    if trained:
        if masks is None and like is None:
            raise typer.BadParameter("a model alone has no masks to paint; give their folder", param_hint="--masks")
        painted: Path | Tiles | None = masks
        settings = override_defaults(overrides or (), ("sampling", "steering"))
    else:
        opened = _open(source, data, run, max_minutes, _settings(overrides, skip_bad))
        if references is not None and opened.recipe.generator.reference is None:
            raise typer.BadParameter(
                "the recipe's generator does not learn to look at references; set generator.reference",
                param_hint="--references",
            )
        model, painted = opened.generator.folder / "model", masks or opened.train
        settings = opened.recipe

    _silence_libraries()
    if like is not None and out is not None:
        from terrasynth.systems.large import paint_like

        typer.echo(paint_like(model, like, out, sampling=settings.sampling, seed=seed))
        return

    from terrasynth.study.generate import generate as paint

    assert painted is not None
    folder = paint(
        model,
        painted,
        out or model.parent / "synthetic",
        sampling=settings.sampling,
        steering=settings.steering,
        segmentor=steer,
        references=references,
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
    view: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A view that `terrasynth curate` made: its samples and labels, and its weights as weights.json. "
            "(default: all there is)",
        ),
    ] = None,
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

    typer.echo(write(dataset, to, out, shard_size=shard_size or 1000, view=view))


@app.command(
    epilog=_example(
        "terrasynth curate painted --segmentor runs/dubai16/cells/real-seed-0-1a2b3c4d/segmentor --real dubai16 "
        "--data tiles/dubai --balance uniform"
    )
)
def curate(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET", exists=True, file_okay=False, help="Folder that `terrasynth generate` wrote."
        ),
    ],
    segmentor: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Score samples that have no scores yet with this segmentor, trained on real tiles. Needs --real.",
        ),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Measure losses by those on the training tiles of this recipe. Needs --segmentor."
        ),
    ] = None,
    data: Data = None,
    view: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the view; one of that name is replaced.")
    ] = "curated",
    margin: Annotated[
        str,
        typer.Option(
            metavar="M",
            help="Drop labels whose loss is above M times their class's mean on real tiles; a multiple of 1/64 below "
            "4, or `none`.",
        ),
    ] = "1.25",
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Leave out samples of which the segmentor finds fewer pixels as in the mask."
        ),
    ] = None,
    min_miou: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Leave out samples whose mask the segmentor finds with a lower mIoU."),
    ] = None,
    rare: Annotated[
        str | None,
        typer.Option(
            metavar="auto|CLASS,...",
            help="Leave out samples that have no pixel of these classes left, unless enough of them is labelled; "
            "`auto`: classes with less than half of an even share of the real pixels.",
        ),
    ] = None,
    valid_share: Annotated[
        float | None, typer.Option(metavar="SHARE", help="For --rare: more than this is enough. (default: 0.8)")
    ] = None,
    resample: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Use a mask up to N times, the more often the harder its classes. Published: 20."
        ),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|real|CLASS=SHARE,...",
            help="Weigh samples so that the classes' shares of the drawn pixels come near these.",
        ),
    ] = None,
    max_weight: Annotated[
        float | None,
        typer.Option(metavar="W", help="For --balance: weights are from 1/W to W; 1 is the average. (default: 4)"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of --resample.")] = 0,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Choose what of a synthetic data set is worth training on: a view of samples, weights and labels.

    A segmentor scores every sample once; after that, views are made without it, as many as you like: leave --segmentor
    and --real out. Nothing is deleted: `views/NAME.json` says what is used, `views/NAME.png` shows it. Stopped or
    killed, the same command goes on.
    """
    if (segmentor is None) != (real is None):
        raise typer.BadParameter("scoring needs a segmentor, and the real tiles", param_hint="--segmentor, --real")
    if real is None and (data or overrides or skip_bad):
        raise typer.BadParameter("these belong to --real", param_hint="--data, --set, --skip-bad")

    from terrasynth.recipe_io import curation_config

    # What is wrong with the options shows before torch is loaded.
    settings = curation_config(
        margin=margin,
        min_accuracy=min_accuracy,
        min_miou=min_miou,
        rare=rare,
        valid_share=valid_share,
        resample=resample,
        balance=balance,
        max_weight=max_weight,
    )
    if segmentor is not None and real is not None:
        training_tiles = _open(real, data, None, None, _settings(overrides, skip_bad)).train

        from terrasynth.curation.score import score_dataset

        score_dataset(dataset, segmentor, training_tiles)

    from terrasynth.curation.curate import curate as make_view
    from terrasynth.curation.curate import report as summary

    typer.echo(summary(make_view(dataset, view, settings, seed=seed)))


@app.command(epilog=_example("terrasynth audit painted --train tiles/images/train --against tiles/images/test"))
def audit(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET", exists=True, file_okay=False, help="Folder that `terrasynth generate` wrote."
        ),
    ],
    against: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of images that must not be in DATASET: validation, test. A copy of one is a leak; repeatable.",
        ),
    ],
    train: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of the images that the generator learned from. Copies are told, but are no leak; repeatable.",
        ),
    ] = None,
    masks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder of masks that nothing may be painted under: those of validation and test. A painted image "
            "under one of them is a leak; repeatable.",
        ),
    ] = None,
) -> None:
    """Look for copies in DATASET: of images it must not show, of training images, of each other.

    Copies are found by their bytes, by their pixels, and by their details even if they are flipped, turned, cut by up
    to a tenth of their side, brightened or compressed again. Prints a table and writes DATASET-audit.json and
    DATASET-audit.png, which shows the closest pairs. DATASET is not changed. Exit code 1 if there is a leak, 0 if not.
    """
    from terrasynth.curation.audit import audit_folders

    done, written, remarks = audit_folders(dataset, against, train or (), masks or ())
    typer.echo(done.table())
    for line in ("", *remarks, *written):
        typer.echo(line)
    raise typer.Exit(1 if done.leaks else 0)


@app.command(epilog=_example("terrasynth study dubai16 --data tiles/dubai --set study.seeds=[0,1,2,3,4]"))
def study(
    recipe: RecipeName,
    data: Data = None,
    out: Out = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this arm, beside the baseline and the teacher; repeatable. A name without its ratio (`1:3`) "
            "stands for all ratios. What other arms need is left as it is. (default: all arms)",
        ),
    ] = None,
    max_minutes: MaxMinutes = None,
    jobs: Jobs = 1,
    skip_bad: SkipBad = False,
    overrides: Overrides = None,
) -> None:
    """Answer the question for RECIPE: would synthetic data help this task, by how much, and how sure is that?

    Trains the generator, paints, trains the segmentor once per arm and seed, and writes report.html. Stopped or
    killed, the same command goes on from what is finished. With --max-minutes, what is left is told before and after.
    """
    _study(recipe, data, out, max_minutes, _settings(overrides, skip_bad), jobs, arms or ())


@app.command(
    epilog=_example("terrasynth predict runs/mine/cells/real-seed-0-1a2b3c4d/segmentor scene.tif --out classes.tif")
)
def predict(
    segmentor: Annotated[
        Path,
        typer.Argument(metavar="SEGMENTOR", exists=True, file_okay=False, help="Folder of a trained segmentor."),
    ],
    scenes: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCENE...", exists=True, help="GeoTIFFs of any size, PNGs or JPEGs, or folders of them."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE|DIR", help="The class map of one scene (.tif), or a folder for those of all."
        ),
    ],
    size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 8,
    bands: Bands = None,
    stretch: StretchRange = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Label schema with the colours and values of the classes. (default: that of the training tiles)",
        ),
    ] = None,
) -> None:
    """Predict the class of every pixel of SCENE: cloud-optimised GeoTIFFs with CRS, colours and class names.

    --bands and --stretch must be those of the training tiles; `terrasynth prepare` prints them. Stopped or killed, the
    same command goes on.
    """
    from terrasynth.data.raster import Stretch
    from terrasynth.data.schema import LabelSchema

    # What is wrong with the options shows before torch is loaded.
    shown = Stretch(bands, _pairs(stretch))
    schema = None if labels is None else LabelSchema.load(labels)

    from terrasynth.tasks.predict import PredictSettings
    from terrasynth.tasks.predict import predict as map_classes

    side = size or 512
    settings = PredictSettings(side, side // 4 if overlap is None else overlap, batch_size, shown)
    for path in map_classes(segmentor, scenes, out, settings, schema=schema):
        typer.echo(path)


@app.command(epilog=_example("terrasynth refine scene.tif classes.tif --out refined.tif --band 4m"))
def refine(
    image: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", exists=True, dir_okay=False, help="GeoTIFF of any size, PNG or JPEG."),
    ],
    class_map: Annotated[
        Path,
        typer.Argument(
            metavar="MAP",
            exists=True,
            dir_okay=False,
            help="Class map of the same pixels, of any model: values in one band, with a palette or without, or RGB "
            "colours.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The refined map (.tif; .png, if MAP is one).")],
    model: Annotated[
        str,
        typer.Option(metavar="DIR|NAME", help="Folder of a refiner, or the name of one in the package."),
    ] = "terrasynth-refiner",
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Label schema of the map. (default: that of the refiner; of one for any class, every value or colour "
            "that occurs is a class; of another, the values are class indices)",
        ),
    ] = None,
    band: Annotated[
        Any,
        typer.Option(
            metavar="PIXELS|METRESm",
            parser=_distance,
            help="Pixels may change that have one of another class this near, as 8 or 4m. (default: 8)",
        ),
    ] = None,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Instead of --band: all pixels may change, far from boundaries too.")
    ] = False,
    confidence: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Raster of how sure MAP is of each pixel: the probability of its class, or the margin over the next.",
        ),
    ] = None,
    below: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="With --confidence: pixels keep their class that have this much or more."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Evaluations of the network for every window; with 0, alike pixels vote, as at its beginning.",
        ),
    ] = 2,
    strength: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0,
            max=1,
            help="How much noise it starts from: 1 for noise alone, below for the map itself under so much noise.",
        ),
    ] = 1.0,
    guidance_scale: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=1,
            help="By how much image and map are exaggerated against none, at twice the cost; 1 is off.",
        ),
    ] = 1.0,
    size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 8,
    bands: Bands = None,
    stretch: StretchRange = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; that of a window derives from its place.")] = 0,
) -> None:
    """Sharpen the boundaries in a class map of any model: a GeoTIFF with its CRS, values, colours and class names.

    Pixels far from a boundary keep their values, and unlabelled ones stay unlabelled. --bands and --stretch must be
    those of the refiner's training. Stopped or killed, the same command goes on.
    """
    from terrasynth.data.raster import Stretch
    from terrasynth.data.schema import LabelSchema

    if everywhere and band is not None:
        raise typer.BadParameter("with --everywhere there is no band", param_hint="--band, --everywhere")
    if (confidence is None) != (below is None):
        raise typer.BadParameter("one needs the other", param_hint="--confidence, --below")
    # What is wrong with the options shows before torch is loaded.
    shown = Stretch(bands, _pairs(stretch))
    schema = None if labels is None else LabelSchema.load(labels)

    from terrasynth.tasks.bands import Tolerance
    from terrasynth.tasks.refine import Confidence, RefineSettings, load_refiner
    from terrasynth.tasks.refine import refine as refine_map

    reach = None if everywhere else Tolerance(*(band or (8, "px")))
    refiner = load_refiner(model, steps=steps, strength=strength, guidance_scale=guidance_scale)
    side = size or refiner.image_size
    settings = RefineSettings(side, side // 4 if overlap is None else overlap, batch_size, shown, reach, seed)
    _silence_libraries()
    unsure = None if confidence is None or below is None else Confidence(confidence, below)
    typer.echo(refine_map(image, class_map, out, refiner, settings, schema=schema, confidence=unsure))


@app.command(epilog=_example("terrasynth boundaries refined.tif truth.tif --labels classes.yaml --tolerance 1m"))
def boundaries(
    prediction: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTION",
            exists=True,
            help="A class map of the values that the label schema names, or a folder of such.",
        ),
    ],
    truth: Annotated[
        Path,
        typer.Argument(
            metavar="TRUTH", exists=True, help="Its true mask; or a folder of masks, with the names of the predictions."
        ),
    ],
    labels: Annotated[str, typer.Option(metavar="NAME|FILE", help="Label schema of both.")],
    tolerance: Annotated[
        Any,
        typer.Option(
            metavar="PIXELSpx|METRESm",
            parser=_distance,
            help="How far from a boundary boundary IoU, BF and the trimap look, as 3px or 1m. (default: 2 % and 0.75 % "
            "of the diagonal, and 3px, as published)",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write all numbers to FILE as well."),
    ] = None,
) -> None:
    """Score how well the boundaries in class maps lie: IoU, boundary IoU, BF, mBA, trimap IoU, weighted F of edges.

    Prints one line a class, and last the means over classes (of mBA, all classes at once). Both rasters must have the
    same size, CRS and transform. Unlabelled true pixels are left out; predicted pixels that are no class are wrong, and
    a truth without a prediction is an error. docs/rasters.md says what each metric is.
    """
    from terrasynth.data.schema import LabelSchema

    schema = LabelSchema.load(labels)

    from terrasynth.io import write_json
    from terrasynth.tasks.bands import Tolerance
    from terrasynth.tasks.boundary_files import as_json, score_files, table

    scores = score_files(prediction, truth, schema, None if tolerance is None else Tolerance(*tolerance))
    typer.echo(table(scores))
    if json_file is not None:
        write_json(json_file, as_json(scores))


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


@app.command(epilog=_example("terrasynth doctor --plan sd35 --card 'RTX 4090' --set generator.trainable=mask"))
def doctor(
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Tell instead what RECIPE needs of a card: parameters, memory of every stage, operations, time. "
            "Nothing is downloaded or trained.",
        ),
    ] = None,
    card: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --plan: the card, as H100, or its memory in GiB; repeatable. (default: this machine's, or its "
            "processor)",
        ),
    ] = None,
    what: Annotated[
        Literal["generator", "refiner", "pairs"], typer.Option(help="With --plan: which of RECIPE's trainings.")
    ] = "generator",
    overrides: Overrides = None,
) -> None:
    """Check this machine: Python, torch, the device, memory, disk, dependencies, extras, the hub.

    Exit code 1 if something that TerraSynth can not do without is missing or broken. With --plan, tell beforehand
    whether a recipe fits a card.
    """
    from terrasynth import doctor as machine

    if plan is not None:
        _silence_libraries()
        machine.plan(plan, card or (), overrides or (), what=what)
        return
    if card or overrides or what != "generator":
        raise typer.BadParameter("these belong to a plan", param_hint="--card, --what, --set")
    raise typer.Exit(0 if machine.run() else 1)


def _study(
    name: str,
    data: Path | None,
    out: Path | None,
    max_minutes: float | None,
    overrides: Sequence[str],
    jobs: int | None,
    arms: Sequence[str] = (),
) -> None:
    """`jobs: None` takes one process for each of the cores, up to four."""
    study = _open(name, data, out, max_minutes, overrides, arms)

    import torch

    from terrasynth.study.left import outlook
    from terrasynth.study.workers import workers

    jobs, command = jobs or min(4, torch.get_num_threads()), shlex.join(["terrasynth", *sys.argv[1:]])
    if max_minutes is not None:
        typer.echo(outlook(study, jobs), err=True)
    try:
        with workers(jobs - 1, study.recipe, study.base, study.out, max_minutes):
            page = study.run(command)
    except OutOfTime:
        typer.echo(f"{outlook(study, jobs)}\nTo go on: {command}", err=True)
        raise

    from terrasynth.study.read import read_results
    from terrasynth.study.verdict import verdict

    typer.echo(f"{verdict(read_results(page.parent)).headline}\n{page}")


def _settings(overrides: list[str] | None, skip_bad: bool) -> list[str]:
    return [*(overrides or ()), *(["data.skip_bad=true"] if skip_bad else [])]


def _open(
    name: str,
    data: Path | None,
    out: Path | None,
    max_minutes: float | None,
    overrides: Sequence[str],
    arms: Sequence[str] = (),
) -> Study:
    """The study of a recipe. The recipe is read before torch is: a typing mistake shows at once."""
    from terrasynth.recipe_io import choose_arms, load_recipe

    loaded = load_recipe(name, overrides, data=data)
    recipe, others = choose_arms(loaded.recipe, arms) if arms else (loaded.recipe, ())

    from terrasynth.study.run import Study

    _silence_libraries()
    folder = re.sub(r"[^\w.-]+", "-", loaded.recipe.name).strip(".-") or "unnamed"
    return Study(recipe, loaded.base, out or Path("runs", folder), max_minutes=max_minutes, others=others)


def _silence_libraries() -> None:
    """Our own progress bars say what is going on; those of the libraries would interrupt them."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _launched() -> bool:
    """Whether this is one of several processes, as `torchrun` and `accelerate launch` start them."""
    return os.environ.get("WORLD_SIZE", "1").isdigit() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def _every_process() -> Iterator[bool]:
    """The block runs in every process of a launch; where it fails in one, all end, and the reason is printed once.

    Yields whether this process is the one that speaks.
    """
    if not _launched():
        yield True
        return
    from terrasynth.training.processes import enter, last_words, leave, left_alone

    process = enter()
    try:
        yield process.is_main_process
        leave()
    except OutOfTime as over:  # in all of them
        text, code = _explain(over) or ("", 1)
        if process.is_main_process:
            typer.echo(text, err=True)
        leave()
        raise typer.Exit(code) from over
    except BaseException as error:
        if left_alone(error):
            error = TerraSynthError(
                "another process of this launch is gone without a word",
                found="the connection to it broke",
                fix="look for the reason above or in its log (memory may have run out); the same command goes on from "
                "the last checkpoint",
            )
        text, code = _explain(error) or (traceback.format_exc(), 1)
        last_words(text)
        # Not a regular end, which would wait for the other processes.
        os._exit(code)


# Line breaks of the docstrings would meet those of the terminal.
for _command in app.registered_commands:
    _paragraphs = inspect.cleandoc(_command.callback.__doc__ or "").split("\n\n")
    _command.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in _paragraphs)


def main() -> None:
    """Entry point of the `terrasynth` command."""
    app()
