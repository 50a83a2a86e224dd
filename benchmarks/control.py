"""Which scheme of control makes the generator obey its masks, and which tiles help a segmentor?

The comparison of TODSynth's paper (arXiv 2512.16740), small: the same procedural tiles, budget and seeds for unified
triple attention, Siamese attention, a mask adapter and a ControlNet, all trained from scratch; only the scheme differs.
First with equal budgets of samples, then with equal budgets of time, by the step times measured here.

    agreement     mIoU of painted tiles against their masks, as a segmentor reads them that was trained on many other
                  tiles of the same world (it is a ruler here, and trains or steers nothing)
    KID           kernel distance of painted tiles from those many other tiles, in whitened random features
    downstream    mIoU on the world's test tiles of a segmentor trained on the few real tiles and the painted ones
    parameters    of the transformer
    step time     processor time of a training step, relative to unified; the schemes take turns within one run

    python benchmarks/control.py --out control.json --seeds 2 --steps 400

Rows are written to --out as they are finished, work in progress goes to a folder beside it, and --minutes ends a
sitting: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from terrasynth.data.folder import Tiles, load_synthetic, load_tiles
from terrasynth.io import write_json
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.recipe import GeneratorConfig, Recipe
from terrasynth.recipe_io import load_recipe
from terrasynth.study.quality import kid, random_features, whitening
from terrasynth.systems.build import build
from terrasynth.systems.fit import fit_generator
from terrasynth.systems.generate import load_pipeline, paint, plan
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor, fit
from terrasynth.training.loop import make_optimizer
from terrasynth.training.precision import autocast

BUDGETS = ("samples", "time")


class Later(Exception):
    """The sitting is over."""


class Sitting:
    """How much of the time is left."""

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float | None:
        """Minutes, or None without a limit; raises `Later` at the end."""
        if self.end is None:
            return None
        if time.monotonic() >= self.end:
            raise Later
        return (self.end - time.monotonic()) / 60


def settings(recipe: Recipe, scheme: str, seed: int, steps: int) -> GeneratorConfig:
    train = recipe.generator.train.model_copy(update={"steps": steps, "evaluate_every": steps, "precision": "auto"})
    return recipe.generator.model_copy(update={"control": scheme, "seed": seed, "train": train})


def sizes_and_step_times(recipe: Recipe, tiles: Tiles, rounds: int) -> dict[str, dict[str, float]]:
    """Parameters of each scheme, and its step time in seconds and relative to unified."""
    pipelines: dict[str, TODSynthPipeline] = {
        scheme: build(settings(recipe, scheme, 0, 1), recipe.data, tiles) for scheme in CONTROL_SCHEMES
    }
    optimizers = {
        name: make_optimizer(p.transformer.named_parameters(), recipe.generator.train) for name, p in pipelines.items()
    }
    size = recipe.generator.train.batch_size
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for round in range(rounds + 2):
        for name, pipeline in pipelines.items():
            embeds, pooled = pipeline.prompts(tiles.captions()[:size])
            masks, images = tiles.masks[:size], tiles.images[:size].float() / 255
            batch = {"latents": pipeline.encode_images(images), "mask": masks, "prompt_embeds": embeds}
            batch |= {"pooled": pooled, "seed": torch.arange(size) + round * size}
            begun = time.process_time()
            with autocast(pipeline.device, "auto"):
                loss = pipeline.training_loss(batch)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name].append(time.process_time() - begun)
    return {
        name: {
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
            "step_seconds": statistics.median(seconds[name][2:]),
            "relative": statistics.median(
                [own / unified for own, unified in zip(seconds[name], seconds["unified"], strict=True)][2:]
            ),
        }
        for name, pipeline in pipelines.items()
    }


class Benchmark:
    """The data, the ruler and what is known so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.sitting = Sitting(arguments.minutes)
        self.out, self.work = arguments.out, arguments.out.with_suffix(".work")
        self.steps, self.count = arguments.steps, arguments.count
        self.known: dict[str, Any] = {"steps": self.steps, "count": self.count, "rows": {}}
        if self.out.is_file():
            found = json.loads(self.out.read_text())
            if (found["steps"], found["count"]) != (self.steps, self.count):
                raise SystemExit(
                    f"{self.out} has --steps {found['steps']} --count {found['count']}: give another --out"
                )
            self.known = found
        precision = ["sampling.precision=auto", "segmentor.train.precision=auto"]
        self.recipe = load_recipe(Path(__file__).with_name("scratch.yaml"), precision).recipe
        data = self.recipe.data
        self.tiles, self.validation, self.test = (load_tiles(data, split) for split in ("train", "validation", "test"))
        world = data.world.model_copy(update={"train": 512, "seed": 1})
        self.many = load_tiles(data.model_copy(update={"world": world}), "train")

    def save(self) -> None:
        """Keep what is known."""
        write_json(self.out, self.known)

    def run(self, seeds: int) -> None:
        """Find out what is not known yet, equal budgets of samples first; may raise `Later`."""
        if "schemes" not in self.known:
            self.known["schemes"] = sizes_and_step_times(self.recipe, self.tiles, rounds=30)
            self.save()
        ruler = self.ruler()
        features = random_features(self.many.images)
        whiten = whitening(features)
        real = whiten(features)
        if "real" not in self.known:
            self.known["real"] = {
                "agreement": ruler.evaluate(self.test).mean_iou,
                "kid": kid(real, whiten(random_features(self.test.images)))[0],
            }
            self.save()
        for seed in range(seeds):
            self.row(f"real-{seed}", lambda seed=seed: {"downstream": self.downstream(f"real-{seed}", seed, None)})
        for budget in BUDGETS:
            for seed in range(seeds):
                for scheme in CONTROL_SCHEMES:
                    # Unified sets the time.
                    if budget == "samples" or scheme != "unified":
                        name = f"{scheme}-{budget}-{seed}"
                        self.row(name, lambda a=(name, scheme, budget, seed): self.scheme(ruler, whiten, real, *a))

    def row(self, name: str, compute: Callable[[], dict[str, float]]) -> None:
        """Compute a row that is not known yet."""
        if name not in self.known["rows"]:
            self.known["rows"][name] = compute()
            self.save()
            print(name, self.known["rows"][name], flush=True)

    def ruler(self) -> Segmentor:
        """The segmentor that reads painted tiles."""
        train = self.recipe.segmentor.train.model_copy(update={"steps": 1000, "batch_size": 16})
        config = self.recipe.segmentor.model_copy(update={"train": train})
        segmentor = Segmentor.build(config, self.tiles.schema.num_classes, seed=0, class_names=self.tiles.schema.names)
        outcome = fit(
            segmentor,
            self.many,
            self.validation,
            config,
            self.work / "ruler",
            seed=0,
            max_minutes=self.sitting.left(),
            label="training the ruler",
        )
        if not outcome.finished:
            raise Later
        return segmentor

    def scheme(
        self,
        ruler: Segmentor,
        whiten: Callable[[torch.Tensor], torch.Tensor],
        real: torch.Tensor,
        name: str,
        scheme: str,
        budget: str,
        seed: int,
    ) -> dict[str, float]:
        """Train a generator, paint, and measure."""
        steps = self.steps
        if budget == "time":
            steps = round(steps / self.known["schemes"][scheme]["relative"])
        folder = self.work / name
        config, data, sampling = settings(self.recipe, scheme, seed, steps), self.recipe.data, self.recipe.sampling
        outcome = fit_generator(self.tiles, config, data, sampling, folder, max_minutes=self.sitting.left())
        if not outcome.finished:
            raise Later
        jobs = plan(self.count, len(self.tiles), seed)
        paint(
            load_pipeline(folder / "model"),
            self.tiles.masks,
            self.tiles.ids,
            jobs,
            sampling,
            folder / "set",
            provenance={},
            between=self.sitting.left,
        )
        painted = load_synthetic(folder / "set")
        # Paintings under one mask are no independent samples.
        sources = torch.arange(len(self.many)), len(self.many) + torch.tensor([job.source for job in jobs])
        distance, error = kid(real, whiten(random_features(painted.images)), *sources)
        return {
            "steps": steps,
            "agreement": ruler.evaluate(painted).mean_iou,
            "kid": distance,
            "kid_error": error,
            "downstream": self.downstream(name, seed, painted),
            "train_seconds": outcome.seconds,
        }

    def downstream(self, name: str, seed: int, painted: Tiles | None) -> float:
        """Test mIoU of a segmentor trained on the few real tiles, and the painted ones."""
        config, schema = self.recipe.segmentor, self.tiles.schema
        segmentor = Segmentor.build(config, schema.num_classes, seed=seed, class_names=schema.names)
        folder, minutes = self.work / f"segmentor-{name}", self.sitting.left()
        outcome = fit(
            segmentor, self.tiles, self.validation, config, folder, seed=seed, synthetic=painted, max_minutes=minutes
        )
        if not outcome.finished:
            raise Later
        return segmentor.evaluate(self.test).mean_iou

    def table(self) -> str:
        """What is known, in Markdown: means over the seeds, and each seed."""
        rows = self.known["rows"]

        def cells(prefix: str, value: str, scale: int = 100, digits: int = 1) -> str:
            each = [scale * row[value] for name, row in rows.items() if name.startswith(prefix) and value in row]
            mean = f"{statistics.mean(each):.{digits}f}" if each else "–"
            return f"{mean} ({', '.join(f'{number:.{digits}f}' for number in each)})"

        lines = []
        if "real" in self.known:
            agreement, distance = 100 * self.known["real"]["agreement"], self.known["real"]["kid"]
            downstream = cells("real-", "downstream")
            lines += [f"Unseen real tiles: agreement {agreement:.1f}, KID {distance:.2f}."]
            lines += [f"Downstream without painted tiles: {downstream}."]
            lines += [
                f"Standard error of the KID of one seed, on average: {cells('', 'kid_error', 1, 2).split()[0]}.",
                "",
            ]
        lines += ["| control | budget | steps | agreement % | KID | downstream mIoU % | million | step time |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for budget in BUDGETS:
            for scheme, facts in self.known.get("schemes", {}).items():
                prefix = f"{scheme}-{budget}-"
                steps = [row["steps"] for name, row in rows.items() if name.startswith(prefix)]
                if steps:
                    values = [cells(prefix, "agreement"), cells(prefix, "kid", 1, 2), cells(prefix, "downstream")]
                    values += [f"{facts['parameters'] / 1e6:.2f}", f"{facts['relative']:.2f}"]
                    lines.append(f"| {scheme} | {budget} | {steps[0]} | {' | '.join(values)} |")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("control.json"), help="rows are kept here")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the generator with equal samples")
    parser.add_argument("--count", type=int, default=64, help="painted tiles per scheme and seed")
    parser.add_argument("--minutes", type=float, help="end the sitting after about this long")
    arguments = parser.parse_args()
    benchmark = Benchmark(arguments)
    try:
        benchmark.run(arguments.seeds)
    except Later:
        print("\nnot finished: the same command goes on")
    print(f"\n{benchmark.table()}")


if __name__ == "__main__":
    main()
