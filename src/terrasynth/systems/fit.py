"""From labelled tiles to a trained generator: encode everything constant once, then run the training loop."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from terrasynth.data.augment import view
from terrasynth.data.folder import Tiles
from terrasynth.data.reference import reference_view
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, atomic_write, digest
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.models.text import PromptCache
from terrasynth.progress import say, track
from terrasynth.recipe import HARMLESS
from terrasynth.systems.autoencode import fit_refiner
from terrasynth.systems.generate import sampling_arguments
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.keys import Key, hash63, mixed_keys
from terrasynth.training.loop import Outcome, global_batch, train
from terrasynth.training.precision import computes_in_bfloat16, round_linear
from terrasynth.training.processes import process_state

if TYPE_CHECKING:
    from terrasynth.recipe import DataConfig, GeneratorConfig, SamplingConfig

__all__ = ["EncodedViews", "build", "check_divides", "check_positions", "fit_generator"]

_UNLABELLED_VIEWS = 8
#: Stream of a sample's seed: which other view is its reference.
_OTHER_VIEW = 11
Reference = Literal["view", "augmented"]
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class EncodedViews(Dataset[dict[str, Tensor]]):
    """Every tile under fixed augmentations, with its latents and prompt encoded once.

    Item (index, seed) has `latents` (C, h, w), `mask` (H, W) uint8, `prompt_embeds` (L, D), `pooled` (P,),
    `mask_latents` (C, h, w) where masks pass through the autoencoder, and `reference_latents` (C, h, w) where the
    generator learns to look at a reference.
    """

    def __init__(
        self, path: Path, prompts: Tensor, prompt_embeds: Tensor, pooled: Tensor, *, tiles: int, other_view: bool
    ) -> None:
        self._path = path
        self._tiles = tiles
        self._other_view = other_view
        self._prompts = prompts
        self._prompt_embeds = prompt_embeds
        self._pooled = pooled

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        item = {name: self._file.get_slice(name)[index] for name in self._names}
        if self._other_view:
            # The views of a tile are `tiles` rows apart.
            step = 1 + hash63(seed, _OTHER_VIEW) % (len(self) // self._tiles - 1)
            item["reference_latents"] = self._file.get_slice("latents")[(index + step * self._tiles) % len(self)]
        item |= {name: item[name].float() for name in ("latents", "reference_latents") if name in item}
        prompt = int(self._prompts[index])
        return {**item, "prompt_embeds": self._prompt_embeds[prompt], "pooled": self._pooled[prompt]}

    # Rows are read when they are asked for: at 512 px a few thousand tiles are more than fits in memory. Each process
    # opens the file for itself, so what is sent to a loader's worker has no open file.

    @cached_property
    def _file(self) -> Any:
        return safe_open(self._path, framework="pt")

    @cached_property
    def _names(self) -> list[str]:
        return list(self._file.keys())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_file", "_names")}

    @classmethod
    def encode(
        cls, pipeline: TODSynthPipeline, tiles: Tiles, views: int, folder: Path, reference: Reference | None = None
    ) -> EncodedViews:
        """Encode `views` augmentations of every tile, or read them back from `folder`."""
        encoder = pipeline.vae.buffers() if isinstance(pipeline.vae, PatchPCA) else pipeline.vae.parameters()
        weights = [float(p.detach().double().sum()) for p in encoder]
        augmented = reference == "augmented"
        name = digest(
            "views", tiles.fingerprint(), views, pipeline.config.mask_coding, weights, *(["augmented"] * augmented)
        )
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            with atomic_write(path) as partial:
                save_file(_encode_views(pipeline, tiles, views, augmented=augmented), partial)
        with safe_open(path, framework="pt") as file:
            captions = [
                pipeline.schema.caption(mask, tiles.template(row % len(tiles)))
                for row, mask in enumerate(file.get_tensor("mask"))
            ]
        texts = sorted(set(captions))
        position = {text: i for i, text in enumerate(texts)}
        prompts = torch.tensor([position[caption] for caption in captions])
        return cls(path, prompts, *pipeline.prompts(texts), tiles=len(tiles), other_view=reference == "view")


def _encode_views(pipeline: TODSynthPipeline, tiles: Tiles, views: int, *, augmented: bool) -> dict[str, Tensor]:
    """Masks, and the latents of images (and of masks, where they pass the autoencoder), of every view of every tile.

    If asked, of an augmented copy of each view too.
    """
    jobs = [(tile, index) for index in range(views) for tile in range(len(tiles))]
    # An autoencoder's activations grow with the pixels: about 4 GB for four million.
    batch_size = max(1, 2**20 // tiles.images[0, 0].numel())
    rows: dict[str, list[Tensor]] = {"mask": [], "latents": []}
    with track(len(jobs), "encoding tiles", unit="views") as progress:
        for start in range(0, len(jobs), batch_size):
            pairs = [
                view(tiles.images[tile], tiles.masks[tile], index) for tile, index in jobs[start : start + batch_size]
            ]
            images, masks = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            rows["mask"].append(masks)
            # Half precision: its rounding is far below the noise of the smallest timestep.
            latents = pipeline.encode_images(images.to(pipeline.vae.device).float() / 255)
            rows["latents"].append(latents.half().cpu())
            if augmented:
                copies = [reference_view(image, start + row) for row, image in enumerate(images)]
                latents = pipeline.encode_images(torch.stack(copies).to(pipeline.vae.device))
                rows.setdefault("reference_latents", []).append(latents.half().cpu())
            if pipeline.config.mask_coding == "grey":
                mask_latents = pipeline.encode_masks(masks.to(pipeline.vae.device))
                rows.setdefault("mask_latents", []).append(mask_latents.cpu())
            progress.advance(len(masks))
    return {name: torch.cat(tensors).contiguous() for name, tensors in rows.items()}


class _Joined(Dataset[dict[str, Tensor]]):
    """Two sets of views one behind the other."""

    def __init__(self, first: EncodedViews, second: EncodedViews) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        beyond = index - len(self.first)
        return self.first[(index, seed)] if beyond < 0 else self.second[(beyond, seed)]


def check_divides(image_size: int, token: int) -> None:
    """Refuse tiles that do not divide into tokens of so many pixels."""
    if image_size % token:
        raise TerraSynthError(
            "the tiles do not divide into tokens",
            found=f"data.image_size {image_size}",
            expected=f"a multiple of {token} (pixels per latent x latents per token)",
            fix="change data.image_size",
        )


def check_positions(image_size: int, pipeline: TODSynthPipeline, base: str) -> None:
    """Refuse tiles that are larger than the base model's grid of positions."""
    transformer = pipeline.transformer.config
    most = pipeline.factor * transformer.patch_size * transformer.pos_embed_max_size
    if image_size > most:
        raise TerraSynthError(
            "the tiles are larger than the base model's grid of positions",
            path=base,
            found=f"data.image_size {image_size}",
            expected=f"at most {most}",
            fix="lower data.image_size",
        )


def build(config: GeneratorConfig, data: DataConfig, tiles: Tiles) -> TODSynthPipeline:
    """The untrained pipeline of a recipe: from its base model, or from scratch.

    Raises:
        TerraSynthError: the sizes, the mask coding or the words of the captions do not fit the model.
    """
    captions = sorted(set(tiles.captions()))
    if config.base is None:
        factor, patch_size = config.autoencoder.patch_size, config.patch_size
    else:
        # The text encoders, most of the weights, are never trained and need no more than bfloat16.
        text = torch.bfloat16 if computes_in_bfloat16(_DEVICE, config.train.precision) else torch.float32
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # what the base does not have starts at random
            pipeline = TODSynthPipeline.from_pretrained(
                config.base,
                dtype={"transformer": torch.float32, "vae": torch.float32, "default": text},
                label_schema=tiles.schema.to_dict(),
                mask_coding=config.mask_coding,
                mask_init=config.mask_init,
                caption=data.caption,
                image_size=data.image_size,
            )
            if config.reference is not None:
                pipeline.transformer.add_reference()
            pipeline.transformer.set_trainable(config.trainable, lora_rank=config.lora_rank)
        factor, patch_size = pipeline.factor, pipeline.transformer.config.patch_size
    check_divides(data.image_size, factor * patch_size)
    if config.base is None:
        images = tiles.images.float() / 255
        pipeline = TODSynthPipeline.from_scratch(config, images, tiles.schema, data.caption, captions)
        pipeline.transformer.set_trainable(config.trainable, lora_rank=config.lora_rank)
        return pipeline
    if config.reference is None:
        for name, parameter in pipeline.transformer.named_parameters():
            if name.endswith("reference_gate"):
                parameter.requires_grad_(False)  # it keeps what the base learned of references, which are not shown
    check_positions(data.image_size, pipeline, config.base)
    if pipeline.config.mask_coding != config.mask_coding:
        raise TerraSynthError(
            "the base model was trained with another mask coding",
            path=config.base,
            found=pipeline.config.mask_coding,
            expected=config.mask_coding,
            fix=f"set generator.mask_coding to {pipeline.config.mask_coding}",
        )
    tokens = {caption: pipeline.tokenizer(caption).input_ids for caption in captions}
    unknown = [caption for caption, ids in tokens.items() if pipeline.tokenizer.unk_token_id in ids]
    if pipeline.tokenizer.unk_token == "<unk>" and unknown:
        raise TerraSynthError(
            "the captions have words that the base model can not spell",
            path=config.base,
            found="; ".join(unknown[:3]),
            expected="words in the Latin script",
            fix="change data.caption or the class names",
        )
    longest, room = max(captions, key=lambda caption: len(tokens[caption])), pipeline.tokenizer.model_max_length
    if len(tokens[longest]) > room:
        say(f"the base model reads {room} tokens of a caption; cut off: {longest!r} ({len(tokens[longest])} tokens)")
    return pipeline


def fit_generator(
    tiles: Tiles,
    config: GeneratorConfig,
    data: DataConfig,
    sampling: SamplingConfig,
    folder: Path,
    *,
    unlabelled: Tiles | None = None,
    max_minutes: float | None = None,
) -> Outcome:
    """Train the generator on labelled tiles; `folder/model` is the finished pipeline.

    `unlabelled` tiles have a share in every batch (`labelled_fraction`): the generator learns their look, and
    what their masks say, if they say anything.

    Run again after an interruption it goes on from the last checkpoint; finished, it returns at once. Started in
    several processes, these share the training; the main one does everything else.
    """
    begun = time.monotonic()
    pipeline = build(config, data, tiles)
    pipeline.vae.to(_DEVICE)
    # Beside each other, text encoders and transformer may be more than a card holds.
    for encoder in pipeline.text_encoders:
        encoder.to(_DEVICE)
    if config.base is None and config.autoencoder.train is not None:
        refined = fit_refiner(
            pipeline.vae, tiles, config.autoencoder, folder / "autoencoder", seed=config.seed, max_minutes=max_minutes
        )
        if not refined.finished:
            return refined
    pipeline.prompts = PromptCache(
        pipeline.encode_prompts,
        folder / "cache" / "prompts",
        identity=digest(config.base, str(pipeline.tokenizer), str(pipeline.text_encoder.dtype)),
    )
    process = process_state()
    with process.main_process_first():  # it encodes, the others read what it wrote
        labelled = EncodedViews.encode(pipeline, tiles, config.views, folder / "cache", config.reference)
        dataset: EncodedViews | _Joined = labelled
        keys = None
        if unlabelled is not None:
            # The windows are many as they are: flips and turns alone.
            others = EncodedViews.encode(pipeline, unlabelled, _UNLABELLED_VIEWS, folder / "cache", config.reference)
            dataset = _Joined(labelled, others)
            batch = global_batch(config.train)
            keys = mixed_keys(len(labelled), len(others), batch, config.labelled_fraction, config.seed)
        # The first tile, and three more spread over the others: the same in every preview.
        shown = [round(i * (len(tiles) - 1) / 3) for i in range(4)] if len(tiles) >= 4 else list(range(len(tiles)))
        pipeline.prompts.prepare(["", *pipeline.captions(tiles.masks[shown])])
    if config.base is not None:
        # Every prompt is encoded by now; three text encoders would only hold memory.
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            part = getattr(pipeline, name)
            if part is not None and process.is_main_process:
                part.to("cpu")  # to be saved with the model
            elif part is not None:
                setattr(pipeline, name, None)
    transformer, precision = pipeline.transformer, config.train.precision
    exact = round_linear(transformer) if computes_in_bfloat16(_DEVICE, precision) else {}
    transformer.to(_DEVICE)
    pipeline.text_dropout, pipeline.mask_dropout = config.text_dropout, config.mask_dropout
    pipeline.reference_dropout = config.reference_dropout
    pipeline.density = config.density

    def preview(step: int) -> dict[str, float]:
        looks = tiles.images[shown].roll(1, 0)  # each like another tile
        images = pipeline(
            tiles.masks[shown],
            references=None if config.reference is None else looks.to(_DEVICE).float() / 255,
            seeds=list(range(len(shown))),
            output_type="pt",
            **sampling_arguments(sampling.model_copy(update={"precision": precision})),
        ).images
        rows = {"real": tiles.images[shown], **({} if config.reference is None else {"like": looks}), "painted": images}
        sheet = contact_sheet(rows, tiles.masks[shown], tiles.schema)
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
        keys=keys,
        identity={
            "generator": config.model_dump(mode="json", exclude={"train": True, "autoencoder": {"train": HARMLESS}}),
            "data": tiles.fingerprint(),
            "unlabelled": None if unlabelled is None else unlabelled.fingerprint(),
        },
        evaluate=preview,
        max_minutes=None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - begun) / 60),
        label="training the generator",
    )
    if outcome.finished and process.is_main_process and not (folder / "model").is_dir():
        torch.nn.Module.to(transformer, "cpu", torch.float32)
        for layer, weight in exact.items():
            layer.weight.data = weight
        with atomic_dir(folder / "model") as partial:
            if config.save_precision == "fp16":
                pipeline.cast(torch.float16)  # to start from, not to compute in
            pipeline.save_pretrained(partial)
    return outcome
