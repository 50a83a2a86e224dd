"""The refiner that comes with the package: one class against the rest, in procedural scenes and tiles of Dubai.

    python benchmarks/boundary_data.py dubai DATA --source DUBAI
    python benchmarks/packaged_refiner.py DATA --out OUT

Rough maps are what U-Nets read in tiles that they did not learn from. Validation tiles of both choose the number of
steps and the strength; no test tile is read. `OUT/terrasynth-refiner` is the result, in half precision. Started again,
it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from boundaries import FIRST, SAMPLING, SEGMENTORS, data, evaluate, refined, spread, voted, worth
from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.io import atomic_dir, read_json, write_json
from terrasynth.progress import say, track
from terrasynth.recipe import DataConfig, RefinerConfig, RoughConfig, TrainConfig, WorldConfig
from terrasynth.systems.idgbr import IDGBRPipeline
from terrasynth.systems.refine import fit_refiner
from terrasynth.tasks.folds import RoughMaps, out_of_fold
from terrasynth.tasks.refiner_scores import score_refiner
from terrasynth.training.units import Clock

NAME = "terrasynth-refiner"
#: Regions, and metres per pixel; other seeds than the scenes that the demo and other models learn from.
WORLDS = [
    WorldConfig(region=region, gsd=gsd, train=150, validation=8, seed=9100 + number)
    for number, (region, gsd) in enumerate(
        (region, gsd) for gsd in (0.3, 0.6) for region in ("temperate", "arid", "tropical")
    )
]


def scenes(split: str) -> Tiles:
    """The procedural scenes of a split."""
    return joined(
        [
            load_tiles(DataConfig(kind="world", image_size=128, world=world), split)  # type: ignore[arg-type]
            for world in WORLDS
        ]
    )


def joined(parts: list[Tiles]) -> Tiles:
    """Tiles of one schema, one after the other."""
    ids = tuple(f"{number}-{name}" for number, part in enumerate(parts) for name in part.ids)
    images, masks = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "masks"))
    return Tiles(ids, images, masks, parts[0].schema)


def beside(first: Tiles, second: Tiles) -> Tiles:
    """Tiles of two schemas as of one: the classes of the second after those of the first."""
    schemas = first.schema, second.schema
    names = tuple(f"{name} {number}" for number, schema in enumerate(schemas) for name in schema.names)
    # Nobody sees the colours, which both could have in common.
    schema = LabelSchema(names, tuple((number, number, number) for number in range(1, len(names) + 1)))
    return Tiles(
        (*first.ids, *second.ids),
        torch.cat([first.images, second.images]),
        torch.cat([first.masks, moved(second.masks, second.schema, by=first.schema)]),
        schema,
    )


def moved(maps: Tensor, schema: LabelSchema, *, by: LabelSchema) -> Tensor:
    """Class maps, uint8, of which the classes come after those of `by`."""
    return torch.where(maps == schema.ignore_index, maps, maps + by.num_classes)


def main() -> None:
    """Train, choose, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="of the refiner's training")
    options = parser.parse_args()
    config = RefinerConfig(
        each_class=True,
        crop=None,
        timesteps="cubic",
        rough=RoughConfig(folds=3, invented=0.5, noise=8.0),
        train=TrainConfig(
            steps=options.steps,
            batch_size=8,
            learning_rate=7e-4,
            ema_decay=0.995,
            checkpoint_every=100,
            evaluate_every=500,
        ),
    )
    train = {"world": scenes("train"), "dubai": data(options.data, "train", 128)}
    validation = {"world": scenes("validation"), "dubai": data(options.data, "validation", 256)}
    # As many as the benchmark looks at, the same: its segmentors serve here.
    validation["dubai"] = validation["dubai"].take(spread(len(validation["dubai"])))
    places = json.loads((options.data / "places.json").read_text())
    groups = {"world": None, "dubai": [places[name] for name in train["dubai"].ids]}
    rough: dict[str, RoughMaps] = {
        name: out_of_fold(
            train[name],
            validation[name],
            SEGMENTORS[FIRST],
            options.out / "folds",
            folds=config.rough.folds,
            seed=0,
            clock=Clock(),
            groups=groups[name],
        )
        for name in train
    }
    both = beside(train["world"], train["dubai"])
    before = torch.cat(
        [
            rough["world"].classes,
            moved(rough["dubai"].classes, train["dubai"].schema, by=train["world"].schema),
        ]
    )
    checked: dict[str, tuple[Tiles, Tensor]] = {}
    for name, tiles in validation.items():
        read = rough[name].validation
        if read is None:
            raise SystemExit(f"{options.out / 'folds'} was made by an earlier version: remove it")
        few = spread(len(tiles))
        checked[name] = tiles.take(few), read[few]

    def score(pipeline: IDGBRPipeline) -> dict[str, float]:
        return {
            f"{name}/{metric}": value
            for name, (tiles, maps) in checked.items()
            for metric, value in score_refiner(pipeline, tiles, maps).items()
        }

    about = {"datasets": ["procedural scenes of TerraSynth", "Dubai aerial imagery (CC0), training split"]}
    fit_refiner(both, before, config, options.out / "refiner", score=score, about=about)
    model = options.out / "refiner" / "model"
    table = {}
    for name, (tiles, maps) in checked.items():
        table[f"{name}, rough"] = evaluate(list(maps), tiles, maps)
        jobs = {"votes alone": voted(tiles.schema.num_classes)}
        jobs |= {f"{each[0]} steps, strength {each[1]}": refined(model, "", *each) for each in SAMPLING}
        for what, (refine, _) in jobs.items():
            found = []
            with track(len(tiles), f"{name}: {what}", unit="tiles") as progress:
                for number, (image, one) in enumerate(zip(tiles.images, maps, strict=True)):
                    found.append(refine(image, one, torch.empty(0), number))  # neither asks for probabilities
                    progress.advance()
            table[f"{name}, {what}"] = evaluate(found, tiles, maps)
    for what, scores in table.items():
        numbers = ", ".join(f"{metric} {100 * scores[metric]:.1f}" for metric in ("miou", "boundary_iou", "bf"))
        say(f"{what}: {numbers}")
    best = max(
        SAMPLING, key=lambda each: sum(worth(table[f"{name}, {each[0]} steps, strength {each[1]}"]) for name in checked)
    )
    say(f"best on validation tiles: {best[0]} steps, strength {best[1]}")
    write_json(options.out / "results.json", {"validation": table, "best": best})
    pipeline = IDGBRPipeline.from_pretrained(model)
    nn.Module.half(pipeline.network)
    with atomic_dir(options.out / NAME) as partial:
        pipeline.save_pretrained(partial)
        for path in partial.rglob("*.json"):  # where it lay on this machine means nothing elsewhere
            config = read_json(path)
            if config.pop("_name_or_path", None) is not None:
                write_json(path, config)


if __name__ == "__main__":
    main()
