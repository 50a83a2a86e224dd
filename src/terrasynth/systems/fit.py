"""From labelled tiles to a trained generator: encode everything constant once, then run the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, atomic_write, digest
from terrasynth.models.text import PromptCache
from terrasynth.progress import track
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.keys import Key
from terrasynth.training.loop import Outcome, train

if TYPE_CHECKING:
    from terrasynth.recipe import DataConfig, GeneratorConfig, SamplingConfig

__all__ = ["EncodedViews", "build", "fit_generator"]


class EncodedViews(Dataset[dict[str, Tensor]]):
    """Every tile under fixed augmentations, with its latents and prompt encoded once.

    Item (index, seed) has `latents` (C, h, w), `mask` (H, W) uint8, `prompt_embeds` (L, D), `pooled` (P,), and
    `mask_latents` (C, h, w) where masks pass through the autoencoder.
    """

    def __init__(self, encoded: dict[str, Tensor], prompt_embeds: Tensor, pooled: Tensor) -> None:
        self._encoded = encoded
        self._prompt_embeds = prompt_embeds
        self._pooled = pooled

    def __len__(self) -> int:
        return len(self._encoded["mask"])

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, _ = key
        item = {name: tensor[index] for name, tensor in self._encoded.items() if name != "prompt"}
        prompt = int(self._encoded["prompt"][index])
        item["latents"] = item["latents"].float()
        return {**item, "prompt_embeds": self._prompt_embeds[prompt], "pooled": self._pooled[prompt]}

    @classmethod
    def encode(
        cls, pipeline: TODSynthPipeline, tiles: Tiles, views: int, folder: Path, batch_size: int = 64
    ) -> EncodedViews:
        """Encode `views` augmentations of every tile, or read them back from `folder`."""
        jobs = [(tile, index) for index in range(views) for tile in range(len(tiles))]
        pairs = [view(tiles.images[tile], tiles.masks[tile], index) for tile, index in jobs]
        masks = torch.stack([mask for _, mask in pairs])
        captions = [pipeline.schema.caption(mask, pipeline.config.caption) for mask in masks]
        texts = sorted(set(captions))
        prompt_embeds, pooled = pipeline.prompts(texts)

        weights = [float(p.double().sum()) for p in (*pipeline.vae.parameters(), *pipeline.vae.buffers())]
        name = digest("views", tiles.fingerprint(), views, pipeline.config.mask_coding, weights)
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            latents, mask_latents = [], []
            device = pipeline.vae.device
            with track(len(jobs), "encoding tiles", unit="views") as progress:
                for start in range(0, len(jobs), batch_size):
                    some = slice(start, start + batch_size)
                    images = torch.stack([image for image, _ in pairs[some]]).to(device).float() / 255
                    # Half precision: its rounding is far below the noise of the smallest timestep.
                    latents.append(pipeline.encode_images(images).half().cpu())
                    if pipeline.config.mask_coding == "grey":
                        mask_latents.append(pipeline.encode_masks(masks[some].to(device)).cpu())
                    progress.advance(len(images))
            tensors = {"latents": torch.cat(latents)}
            if mask_latents:
                tensors["mask_latents"] = torch.cat(mask_latents)
            with atomic_write(path) as partial:
                save_file(tensors, partial)
        encoded = load_file(path)
        encoded["mask"] = masks
        encoded["prompt"] = torch.tensor([texts.index(caption) for caption in captions])
        return cls(encoded, prompt_embeds, pooled)


def build(config: GeneratorConfig, data: DataConfig, tiles: Tiles) -> TODSynthPipeline:
    """The untrained pipeline of a recipe: from its base model, or from scratch."""
    captions = sorted(set(tiles.captions(data.caption)))
    if config.base is None:
        side = config.autoencoder.patch_size * config.patch_size
        if data.image_size % side or config.width % config.heads:
            raise TerraSynthError(
                "the generator's sizes do not fit",
                found=f"image_size {data.image_size}, autoencoder.patch_size x patch_size = {side}, "
                f"width {config.width}, heads {config.heads}",
                expected="image_size divisible by the product, width divisible by heads",
                fix="change data.image_size or the sizes under generator",
            )
        images = tiles.images.float() / 255
        return TODSynthPipeline.from_scratch(config, images, tiles.schema, data.caption, captions)
    pipeline = TODSynthPipeline.from_pretrained(
        config.base,
        label_schema=tiles.schema.to_dict(),
        mask_coding=config.mask_coding,
        mask_init=config.mask_init,
        caption=data.caption,
    )
    return pipeline


def fit_generator(
    tiles: Tiles,
    config: GeneratorConfig,
    data: DataConfig,
    sampling: SamplingConfig,
    folder: Path,
    *,
    max_minutes: float | None = None,
) -> Outcome:
    """Train the generator on labelled tiles; `folder/model` is the finished pipeline.

    Run again after an interruption it goes on from the last checkpoint; finished, it returns at once.
    """
    pipeline = build(config, data, tiles)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.to(device)
    pipeline.prompts = PromptCache(
        pipeline.encode_prompts, folder / "cache" / "prompts", identity=digest(config.base, str(pipeline.tokenizer))
    )
    dataset = EncodedViews.encode(pipeline, tiles, config.views, folder / "cache")
    pipeline.prompts([""])
    if config.base is not None:
        # Every prompt is encoded by now; three text encoders would only hold memory.
        for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if part is not None:
                part.to("cpu")
    pipeline.text_dropout, pipeline.mask_dropout = config.text_dropout, config.mask_dropout
    pipeline.density = config.density
    transformer = pipeline.transformer
    transformer.set_trainable(config.trainable, lora_rank=config.lora_rank)

    # The first tile, and three more spread over the others: the same in every preview.
    shown = [round(i * (len(tiles) - 1) / 3) for i in range(4)] if len(tiles) >= 4 else list(range(len(tiles)))

    def preview(step: int) -> dict[str, float]:
        from terrasynth.study.figures import contact_sheet

        images = pipeline(
            tiles.masks[shown],
            seeds=list(range(len(shown))),
            num_inference_steps=sampling.steps,
            text_scale=sampling.text_scale,
            mask_scale=sampling.mask_scale,
            output_type="pt",
        ).images
        sheet = contact_sheet({"real": tiles.images[shown], "painted": images}, tiles.masks[shown], tiles.schema)
        with atomic_write(folder / "previews" / f"step-{step:08d}.png") as partial:
            sheet.save(partial)
        return {}

    outcome = train(
        transformer,
        pipeline.training_loss,
        dataset,
        config.train,
        folder,
        seed=config.seed,
        identity={
            "generator": config.model_dump(mode="json", exclude={"train"}),
            "data": tiles.fingerprint(),
        },
        evaluate=preview,
        max_minutes=max_minutes,
        label="training the generator",
    )
    if outcome.finished and not (folder / "model").is_dir():
        with atomic_dir(folder / "model") as partial:
            pipeline.save_pretrained(partial)
    return outcome
