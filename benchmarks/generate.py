"""How many tiles a second are painted, plain and steered.

    python benchmarks/generate.py [MODEL] [RECIPE] [--size 128] [--steps 8 5] [--set sampling.mask_scale=3]

`MODEL` is a folder, or `terrasynth-tiny` (the default); sampling, steering and the segmentor that steers are those of
the recipe (by default `dubai16-tiny`). Plain and steered painting alternate with the bare network on the same rows and
with this machine's own matrix products, so that a busy machine slows all of them; the best of several rounds counts.
The segmentor has random weights: its time does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from terrasynth.recipe_io import load_recipe
from terrasynth.sampling.flow import Steering
from terrasynth.sampling.guidance import guidance_chain
from terrasynth.systems.generate import steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.tasks.segmentation import Segmentor
from terrasynth.training.precision import autocast


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="terrasynth-tiny")
    parser.add_argument("recipe", nargs="?", default="dubai16-tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", help="of the sampler (default: the recipe's)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer first")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = load_recipe(args.recipe, args.set).recipe
    pipeline = TODSynthPipeline.from_pretrained(args.model)
    transformer, device = pipeline.transformer, pipeline.device
    sampling, batch = recipe.sampling, recipe.sampling.batch_size
    every = list(dict.fromkeys(args.steps or [sampling.steps]))
    masks = torch.randint(pipeline.schema.num_classes, (batch, args.size // 16, args.size // 16))
    masks = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    segmentor = Segmentor.build(recipe.segmentor, pipeline.schema.num_classes)
    steering = steering_for(recipe.steering, segmentor.loss)(masks)

    def paint(steps: int, steer: Steering | None) -> None:
        arguments = {**TODSynthPipeline.sampling_arguments(sampling), "num_inference_steps": steps}
        pipeline(masks, seeds=range(batch), steering=steer, output_type="pt", **arguments)

    rows = batch * len(guidance_chain({"text": sampling.text_scale, "mask": sampling.mask_scale}))
    side = args.size // pipeline.factor
    embeds, pooled = pipeline.prompts([""] * rows)
    inputs = {
        "hidden_states": torch.randn(rows, transformer.config.in_channels, side, side),
        "timestep": torch.rand(rows) * 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "mask_latents": pipeline.encode_masks(masks).repeat(rows // batch, 1, 1, 1),
    }

    def network() -> None:
        with torch.no_grad(), autocast(device, sampling.precision):
            transformer(**inputs)

    square = torch.randn(2048, 2048)

    def product() -> None:
        with autocast(device, sampling.precision):
            square @ square

    seen: list[int] = []  # rows of every evaluation
    handle = transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    evaluated = {}
    for steps in every:
        seen.clear()
        paint(steps, None)
        evaluated[steps] = sum(seen)
    handle.remove()
    if args.compile:
        transformer.compile()
    first = seconds(lambda: paint(1, steering))  # it allocates and compiles
    best: dict[str, float] = {}
    for _ in range(args.rounds):
        taken = {"network": seconds(network), "product": min(seconds(product) for _ in range(5))}
        for steps in every:
            taken[f"{steps}"] = seconds(lambda: paint(steps, None))  # noqa: B023
            taken[f"{steps}, CRFM"] = seconds(lambda: paint(steps, steering))  # noqa: B023
        best = {name: min(value, best.get(name, value)) for name, value in taken.items()}

    peak = 2 * 2048**3 / best["product"]
    low, high = sampling.guidance_interval
    print(
        f"{args.threads} thread(s), batch {batch}, {args.size} px, {sampling.solver}, {sampling.precision}, "
        f"guidance {sampling.mask_scale:g} for noise levels above {low:g} up to {high:g}"
    )
    print(f"first painting: {first:.0f} s", end="; ")
    print(f"matrix products: {peak / 1e9:.0f} GFLOP/s; network: {rows / best['network']:.1f} rows/s\n")
    print("| steps | tiles/s | share in the network | CRFM, tiles/s | CRFM costs |\n|---|--:|--:|--:|--:|")
    for steps in every:
        plain, steered = best[f"{steps}"], best[f"{steps}, CRFM"]
        print(
            f"| {steps} | {batch / plain:.2f} | {evaluated[steps] / rows * best['network'] / plain:.2f} "
            f"| {batch / steered:.2f} | {steered / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
