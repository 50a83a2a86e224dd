r"""What does the base model know before any fine-tuning? The numbers and the picture of its card.

    python benchmarks/base.py --data tiles/dubai --out runs/base

On images that it never saw, at its native size: what the autoencoder loses (PSNR, SSIM), and its flow-matching loss at
five noise levels, relative to that of the best linear guess in each channel (1 is a model that knows only the latents'
variances). Procedural scenes are read under their masks and under an unlabelled one; the tiles of DIR, whose classes it
does not know, under an unlabelled one. The picture shows unseen tiles, their reconstructions, and what is painted under
masks of unseen scenes and for two prompts alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from terrasynth.data.folder import Tiles, load_tiles
from terrasynth.data.sheet import contact_sheet
from terrasynth.io import atomic_write
from terrasynth.progress import track
from terrasynth.recipe_io import load_recipe
from terrasynth.sampling.flow import seeded_noise
from terrasynth.study.quality import psnr, ssim
from terrasynth.systems.todsynth import TODSynthPipeline

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def scenes(region: str, count: int, size: int) -> Tiles:
    """Procedural scenes of a seed that no recipe trains on."""
    values = {"region": region, "gsd": 0.5, "test": count, "seed": 77_000}
    settings = [f"data.world.{key}={value}" for key, value in values.items()]
    return load_tiles(load_recipe("demo", [*settings, f"data.image_size={size}"]).recipe.data, "test")


def loss(pipeline: TODSynthPipeline, latents: Tensor, masks: Tensor, captions: list[str], sigma: float) -> Tensor:
    """Squared error of the velocity of every sample and channel at one noise level, (B, C)."""
    noise = seeded_noise(range(len(latents)), latents.shape[1:])
    embeds, pooled = pipeline.prompts(captions)
    predicted = pipeline.transformer(
        hidden_states=(1 - sigma) * latents + sigma * noise,
        timestep=torch.full((len(latents),), 1000 * sigma),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        mask_latents=pipeline.encode_masks(masks),
        return_dict=False,
    )[0]
    return (predicted - (noise - latents)).square().mean((2, 3))


def linear_loss(latents: Tensor, sigma: float) -> Tensor:
    """The least squared error of a guess of the velocity that is linear in each channel by itself, (C,).

    With x = (1 - s) z + s e and v = e - z, of variances 1 for e and w for z: var v - cov(v, x)^2 / var x.
    """
    w = latents.movedim(1, 0).flatten(1).var(1)
    return 1 + w - (sigma - (1 - sigma) * w).square() / ((1 - sigma) ** 2 * w + sigma**2)


@torch.no_grad()
def main() -> None:
    """Print a table and write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="terrasynth-tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder of the Dubai tiles")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=96, help="unseen images of each kind")
    arguments = parser.parse_args()
    if arguments.count < 4:
        parser.error("--count: the picture shows 4 scenes of each kind, so it must be at least 4")
    pipeline = TODSynthPipeline.from_pretrained(arguments.model)
    size, ignore = pipeline.config.image_size, pipeline.schema.ignore_index

    recipe = load_recipe("dubai16", [f"data.image_size={size}"], data=arguments.data)
    tiles = load_tiles(recipe.recipe.data, "test", base=recipe.base)
    chosen = torch.arange(min(arguments.count, len(tiles))) * len(tiles) // min(arguments.count, len(tiles))
    dubai = tiles.images[chosen]
    worlds = {region: scenes(region, arguments.count, size) for region in ("temperate", "arid", "tropical")}

    def known(masks: Tensor, tiles: Tiles) -> Tensor:
        """Masks in the classes of the model."""
        lookup = torch.full((256,), ignore)
        lookup[: tiles.schema.num_classes] = torch.tensor([pipeline.schema.names.index(n) for n in tiles.schema.names])
        return lookup[masks.long()]

    def empty(count: int) -> Tensor:
        return torch.full((count, size, size), ignore)

    sets = {"Dubai, test": (dubai, empty(len(dubai)), ["a satellite image"] * len(dubai))}
    for region, made in worlds.items():
        captions = ["a rendered image of " + made.schema.caption(mask, "{classes}") for mask in made.masks]
        sets[f"{region} scenes, their masks"] = (made.images, known(made.masks, made), captions)
        sets[f"{region} scenes, no mask"] = (made.images, empty(len(made)), captions)

    print(f"| unseen images | PSNR, dB | SSIM | {' | '.join(f'loss at {sigma}' for sigma in SIGMAS)} |")
    print(f"|---|--:|--:|{'--:|' * len(SIGMAS)}")
    with track(len(sets) * len(SIGMAS), "measuring", unit="noise levels") as progress:
        for name, (images, masks, captions) in sets.items():
            latents = torch.cat([pipeline.encode_images(part.float() / 255) for part in images.split(16)])
            decoded = pipeline.reconstruct(images)
            cells = [f"{psnr(decoded, images).mean():.1f}", f"{ssim(decoded, images).mean():.3f}"]
            for sigma in SIGMAS:
                errors = [
                    loss(pipeline, latents[rows], masks[rows], [captions[i] for i in rows.tolist()], sigma)
                    for rows in torch.arange(len(images)).split(16)
                ]
                cells.append(f"{torch.cat(errors).mean() / linear_loss(latents, sigma).mean():.3f}")
                progress.advance()
            print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def painted(masks: Tensor, prompts: list[str], scale: float) -> Tensor:
        out = pipeline(
            masks,
            prompts,
            seeds=range(len(masks)),
            num_inference_steps=12,
            solver="adams",
            shift=1.0,
            mask_scale=scale,
            output_type="pt",
        )
        return (out.images * 255).round().byte()

    shown = torch.cat([known(made.masks[:4], made) for made in worlds.values()])
    captions = [sets[f"{region} scenes, their masks"][2][i] for region in worlds for i in range(4)]
    prompts = ["a satellite image"] * 6 + ["an aerial image of farmland"] * 6
    real = dubai[torch.arange(12) * len(dubai) // 12]
    rows = {
        "unseen": real,
        "reconstructed": pipeline.reconstruct(real),
        "painted": painted(shown, captions, 2.0),
        "prompts alone": painted(empty(12), prompts, 1.0),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out / "base.png") as partial:
        contact_sheet(rows, shown.byte(), pipeline.schema, columns=12).save(partial, format="PNG")


if __name__ == "__main__":
    main()
