"""What control-rectify flow matching costs: K of N steps rectified against plain sampling, within one run.

    python benchmarks/rectify.py [--device cuda] [--size 256] ...

Plain and steered sampling alternate, on the same parts and noise, and the ratio is taken pair by pair, so that a busy
machine slows both. Both include decoding the images. Weights are random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from terrasynth.sampling.flow import sample_flow, seeded_noise
from terrasynth.sampling.rectify import ControlRectify


def build(args: argparse.Namespace) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], nn.Module]:
    """Return the velocity, the decoder and the segmentor."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=args.size // 8,
        in_channels=16,
        out_channels=16,
        num_layers=args.blocks,
        attention_head_dim=64,
        num_attention_heads=args.width // 64,
        caption_projection_dim=args.width,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        pos_embed_max_size=args.size // 16,
    )
    vae = AutoencoderKL(
        block_out_channels=[args.vae_width * m for m in (1, 2, 4, 4)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=args.vae_width // 4,
    )
    segmentor = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, 64, 3, 1, 1)),
        *(nn.SiLU(), nn.Conv2d(64, args.classes, 1), nn.Upsample(scale_factor=4, mode="bilinear")),
    )
    for part in (transformer, vae, segmentor):
        part.eval().requires_grad_(False).to(args.device)
    text = torch.randn(args.batch, 77, 256, device=args.device)
    pooled = torch.randn(args.batch, 256, device=args.device)

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        return transformer(latents, text, pooled, timestep).sample

    def decode(latents: Tensor) -> Tensor:
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    return velocity, decode, segmentor


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=23, help="N")
    parser.add_argument("--rectified", type=int, default=4, help="K")
    parser.add_argument("--width", type=int, default=384, help="width of the transformer, a multiple of 64")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the transformer")
    parser.add_argument("--vae-width", type=int, default=32, help="first width of the autoencoder, a multiple of 4")
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5, help="pairs of plain and steered runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.device(args.device).type == "cuda"

    velocity, decode, segmentor = build(args)
    noise = seeded_noise(range(args.batch), (16, args.size // 8, args.size // 8), args.device)
    targets = torch.randint(0, args.classes, (args.batch, args.size, args.size), device=args.device)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(segmentor(images), targets, reduction="none").mean((1, 2))

    def paint(rectified: int) -> dict[str, float]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        steering = ControlRectify(loss, targets, steps=rectified) if rectified else None
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        latents = sample_flow(velocity, noise, scheduler, args.steps, steering=steering, decode=decode)
        with torch.no_grad():
            decode(latents)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")}

    paint(args.rectified)  # warm-up
    pairs = [(paint(0), paint(args.rectified)) for _ in range(args.repeats)]
    plain, steered = zip(*pairs, strict=True)
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    result = {
        "settings": vars(args),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "plain_seconds": round(statistics.median(run["seconds"] for run in plain), 4),
        "steered_seconds": round(statistics.median(run["seconds"] for run in steered), 4),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    if cuda:
        result["peak_gib"] = {"plain": round(plain[-1]["gib"], 2), "steered": round(steered[-1]["gib"], 2)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
