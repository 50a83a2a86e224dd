"""What does steering do? Settings of control-rectify flow matching against each other, on one generator.

    python benchmarks/steering.py MODEL dubai16 --data DIR --segmentor DIR --rulers DIR DIR --out DIR

Every row paints the same masks from the same seeds; only the steering differs from the base: the first half of the
steps, strength 0.3, decreasing, relative to the velocity. The masks are the validation tiles',
which the generator never saw. The first ruler, a segmentor trained on all training tiles, reads the paintings: its mIoU
against the masks is the agreement. It steers nothing, except in the rows that are called oracles, which a second ruler
reads. Rows that are in OUT already, made of the same things, are not painted again.

Columns: agreement, mIoU %; KID to the real validation tiles (whitened random features); how far the pixels move from
the unsteered painting (mean absolute difference, of 255); diversity of five paintings of one mask, relative to
unsteered.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.io import digest, read_json, write_json
from terrasynth.recipe import Recipe, SteeringConfig
from terrasynth.recipe_io import load_recipe
from terrasynth.study.quality import kid, random_features, whitening
from terrasynth.systems.generate import load_pipeline, model_digest, steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor

#: Name of the row, who steers ("few" or "oracle"; None nobody), settings over the base.
Row = tuple[str, str | None, dict[str, Any]]
BASE: dict[str, Any] = {"strength": 0.3, "schedule": "decreasing", "normalise": "velocity"}


def rows(total: int) -> list[Row]:
    """One setting varied at a time around the base, which steers the first half of the `total` steps."""
    half, quarter = total // 2, total // 4

    def vary(who: str = "few", **settings: Any) -> Row:
        name = ", ".join(f"{name} {value}" for name, value in settings.items()) or "base"
        return ("oracle: " * (who == "oracle") + name, who, {"steps": half} | settings)

    return [
        ("none", None, {}),
        vary(),
        *(vary(steps=k) for k in (quarter, total)),
        *(vary(strength=a) for a in (0.03, 0.1, 1.0)),
        *(vary(schedule=s) for s in ("constant", "increasing")),
        *(vary(normalise=n, strength=a) for n, a in (("none", 100.0), ("unit", 10.0), ("x0", 0.1), ("x0", 0.3))),
        vary(start=quarter),
        vary(start=half),
        vary(wrong_pixels_only=False),
        vary(repeats=3, strength=0.1),
        vary(normalise="unit", strength=0.1, clamp=1.0, blend=True),
        *(vary(strength=0.0, clamp=c) for c in (1.0, 3.0)),
        vary("oracle"),
        vary("oracle", steps=total, strength=1.0),
        vary("oracle", start=half),
    ]


def paint(
    pipeline: TODSynthPipeline, masks: Tensor, recipe: Recipe, steering: SteeringConfig | None, by: Segmentor | None
) -> Tensor:
    """One painting a mask, uint8 (N, 3, S, S); image n from seed n."""
    steer = None if steering is None or by is None else steering_for(steering, by.loss)
    images = []
    for start in range(0, len(masks), recipe.sampling.batch_size):
        batch = masks[start : start + recipe.sampling.batch_size].long()
        images.append(
            pipeline(
                batch,
                seeds=list(range(start, start + len(batch))),
                steering=None if steer is None else steer(batch),
                output_type="pt",
                **TODSynthPipeline.sampling_arguments(recipe.sampling),
            ).images
        )
    return (torch.cat(images) * 255).round().byte()


def spread(images: Tensor, copies: int) -> float:
    """Mean absolute difference between the paintings of one mask, over all pairs; masks repeat every `copies` rows."""
    groups = images.float().unflatten(0, (-1, copies))
    pairs = itertools.combinations(range(copies), 2)
    return torch.stack([(groups[:, i] - groups[:, j]).abs().mean() for i, j in pairs]).mean().item()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--segmentor", type=Path, required=True, help="trained on the few labelled tiles")
    parser.add_argument("--rulers", type=Path, nargs=2, required=True, help="two segmentors trained on all tiles")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64, help="masks")
    parser.add_argument("--only", default="", help="rows whose name contains this, and none")
    arguments = parser.parse_args()

    loaded = load_recipe(arguments.recipe, arguments.set, data=arguments.data)
    recipe = loaded.recipe
    tiles: Tiles = load_tiles(recipe.data, "validation", base=loaded.base)
    shown = torch.linspace(0, len(tiles) - 1, min(arguments.count, len(tiles))).round().long()
    masks, features = tiles.masks[shown], random_features(tiles.images)
    whiten = whitening(features)
    few_masks = masks[:: max(1, len(masks) // 8)][:8].repeat_interleave(5, dim=0)
    pipeline = load_pipeline(arguments.model)
    few = Segmentor.from_pretrained(arguments.segmentor)
    ruler, second = (Segmentor.from_pretrained(path) for path in arguments.rulers)

    def agreement(images: Tensor, reader: Segmentor) -> float:
        painted = Tiles(tuple(map(str, range(len(images)))), images, masks, tiles.schema)
        return 100 * reader.evaluate(painted).mean_iou

    for reader in (few, ruler, second):
        reader.check_schema(pipeline.schema)
        reader.check_schema(tiles.schema)
    made_of = digest(
        *map(model_digest, (arguments.model, arguments.segmentor, *arguments.rulers)),
        *(tiles.fingerprint(), shown.tolist(), recipe.sampling.model_dump(mode="json")),
    )
    path = arguments.out / f"steering-{made_of[:8]}.json"
    done: dict[str, Any] = read_json(path) if path.is_file() else {}
    plain = paint(pipeline, masks, recipe, None, None)
    for name, who, settings in rows(recipe.sampling.steps):
        if name in done or (name != "none" and arguments.only not in name):
            continue
        steering = SteeringConfig(**BASE | settings)
        by = {"few": few, "oracle": ruler, None: None}[who]
        begun = time.monotonic()
        images = paint(pipeline, masks, recipe, steering, by)
        seconds = time.monotonic() - begun
        copies = paint(pipeline, few_masks, recipe, steering, by)
        value, error = kid(whiten(features), whiten(random_features(images)), torch.arange(len(tiles)), shown)
        done[name] = {
            "agreement": agreement(images, ruler if who != "oracle" else second),
            "steering segmentor": None if by is None else agreement(images, by),
            "kid": value,
            "kid error": error,
            "moved": (images.float() - plain.float()).abs().mean().item(),
            "spread": spread(copies, 5),
            "seconds": seconds,
        }
        write_json(path, done)
        print(name, {key: round(number, 2) for key, number in done[name].items() if number is not None}, flush=True)
    print("\n| steering | agreement | by its own segmentor | KID | moved | diversity | time |")
    print("|---|---|---|---|---|---|---|")
    for name, row in done.items():
        cells = [
            name,
            f"{row['agreement']:.1f}",
            "–" if row["steering segmentor"] is None else f"{row['steering segmentor']:.1f}",
            f"{row['kid']:.2f} ± {row['kid error']:.2f}",
            f"{row['moved']:.1f}",
            f"{row['spread'] / done['none']['spread']:.2f}",
            f"{row['seconds'] / done['none']['seconds']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
