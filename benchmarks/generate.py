"""How many tiles a second are painted, plain and steered.

    python benchmarks/generate.py [MODEL] [--threads 2] [--batch 16] [--precision auto]

`MODEL` is a folder, or `terrasynth-tiny` (the default). Plain and steered painting alternate with the bare network on
the same rows and with this machine's own matrix products, so that a busy machine slows all of them; the best of several
rounds counts. The segmentor that steers is a U-Net of random weights: its time does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from terrasynth.recipe import SamplingConfig, SegmentorConfig, SteeringConfig
from terrasynth.sampling.rectify import ControlRectify
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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[SamplingConfig().steps, 8, 5])
    parser.add_argument("--scale", type=float, default=1.5, help="guidance of the mask; 1 is off")
    parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), help="noise levels that are guided")
    parser.add_argument("--shift", type=float, help="of the timesteps (default: the model's)")
    parser.add_argument("--solver", choices=("euler", "adams"), default="euler")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer first")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pipeline = TODSynthPipeline.from_pretrained(args.model)
    transformer, device = pipeline.transformer, pipeline.device
    masks = torch.randint(pipeline.schema.num_classes, (args.batch, args.size // 16, args.size // 16))
    masks = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    segmentor = Segmentor.build(
        SegmentorConfig(options={"encoder_depth": 4, "decoder_channels": [128, 64, 32, 16]}),
        pipeline.schema.num_classes,
    )
    settings = SteeringConfig()
    steering = ControlRectify(
        lambda images, targets: segmentor.loss(images, targets, "wrong"),
        masks,
        **settings.model_dump(exclude={"wrong_pixels_only"}),
    )

    def paint(steps: int, steer: ControlRectify | None) -> None:
        pipeline(
            masks,
            seeds=range(args.batch),
            num_inference_steps=steps,
            solver=args.solver,
            shift=args.shift,
            mask_scale=args.scale,
            guidance_interval=tuple(args.interval),
            steering=steer,
            precision=args.precision,
            output_type="pt",
        )

    rows = args.batch * (1 if args.scale == 1 else 2)
    side = args.size // pipeline.factor
    embeds, pooled = pipeline.prompts([""] * rows)
    inputs = {
        "hidden_states": torch.randn(rows, transformer.config.in_channels, side, side),
        "timestep": torch.rand(rows) * 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "mask_latents": pipeline.encode_masks(masks).repeat(rows // args.batch, 1, 1, 1),
    }

    def network() -> None:
        with torch.no_grad(), autocast(device, args.precision):
            transformer(**inputs)

    square = torch.randn(2048, 2048)

    def product() -> None:
        with autocast(device, args.precision):
            square @ square

    seen: list[int] = []  # rows of every evaluation
    handle = transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    evaluated = {}
    for steps in dict.fromkeys(args.steps):
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
        for steps in dict.fromkeys(args.steps):
            taken[f"{steps}"] = seconds(lambda: paint(steps, None))  # noqa: B023
            taken[f"{steps}, CRFM"] = seconds(lambda: paint(steps, steering))  # noqa: B023
        best = {name: min(value, best.get(name, value)) for name, value in taken.items()}

    peak = 2 * 2048**3 / best["product"]
    print(
        f"{args.threads} thread(s), batch {args.batch}, {args.size} px, {args.solver}, guidance {args.scale:g} for "
        f"noise levels above {args.interval[0]:g} up to {args.interval[1]:g}, {args.precision}"
    )
    print(f"first painting: {first:.0f} s", end="; ")
    print(f"matrix products: {peak / 1e9:.0f} GFLOP/s; network: {rows / best['network']:.1f} rows/s\n")
    print("| steps | tiles/s | share in the network | CRFM, tiles/s | CRFM costs |\n|---|--:|--:|--:|--:|")
    for steps in dict.fromkeys(args.steps):
        plain, steered = best[f"{steps}"], best[f"{steps}, CRFM"]
        print(
            f"| {steps} | {args.batch / plain:.2f} | {evaluated[steps] / rows * best['network'] / plain:.2f} "
            f"| {args.batch / steered:.2f} | {steered / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
