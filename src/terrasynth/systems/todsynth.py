"""TODSynth: images painted under masks by a text-image-mask MM-DiT (Yang et al., CVPR 2026).

Reads like the method section: the conditions, the flow-matching loss, guided and steered sampling. The network is
`models.mmdit`, the flow `sampling.flow`, the steering `sampling.rectify`; training is in `systems.fit`. What it adds to
the paper, after SatSynth, is that the masks may be painted first, by the same network (`layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from terrasynth.data.schema import Coding, LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import PatchPCA, spatial_factor
from terrasynth.models.control import CONTROL_SCHEMES
from terrasynth.models.mmdit import MaskMMDiT
from terrasynth.models.text import PromptCache, encode_prompts, word_encoder, word_tokenizer
from terrasynth.packaged import packaged_or
from terrasynth.sampling.categories import category_loss, category_scores, category_velocity, to_codes, to_points
from terrasynth.sampling.flow import (
    FlowBatch,
    FlowStep,
    Solver,
    Steering,
    Velocity,
    flow_batch,
    sample_flow,
    seeded_generator,
    seeded_noise,
)
from terrasynth.sampling.guidance import condition_or_null, guided_velocity
from terrasynth.systems.loading import blind, cast, check_whole, loading, paints_no_layouts, paints_no_numbers
from terrasynth.systems.pipeline import MaskPipeline
from terrasynth.training.precision import autocast, computes_in_bfloat16, round_linear

if TYPE_CHECKING:
    from terrasynth.recipe import GeneratorConfig, Precision, SamplingConfig

__all__ = ["TODSynthPipeline", "untrained_autoencoder", "untrained_transformer"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
#: How often a layout is learned without its prompt, at least: to paint any layout is the rule, and images have prompts.
_ANY_LAYOUT = 0.5


class TODSynthPipeline(MaskPipeline):
    """Paints images under masks; loads and saves in the diffusers folder layout.

    `TODSynthPipeline.from_pretrained(FOLDER)` loads what TerraSynth trained. A Stable Diffusion 3 or 3.5 folder or hub
    name loads by the same call with `label_schema=` given: its transformer then gets a mask branch that at first
    changes nothing.

    Args:
        transformer: the text-image-mask transformer, or SD3's, which is extended.
        scheduler: the flow's Euler scheduler; its `shift` holds in training and sampling.
        vae: an autoencoder with the interface of `AutoencoderKL`.
        text_encoder, text_encoder_2: CLIP text models with projection; small models have only the first.
        text_encoder_3: T5, or None.
        tokenizer, tokenizer_2, tokenizer_3: their tokenizers.
        label_schema: the classes, as `LabelSchema.to_dict()`.
        mask_coding: how masks enter the transformer: `onehot` and `bits` without loss, `grey` through the autoencoder.
        mask_init: how SD3's transformer gets its mask branch: as a `copy` of the image branch, or at `random`.
        caption: template of the default prompts.
        image_size: side of the images it was trained on; any multiple of a token's pixels can be painted, up to the
            transformer's grid of positions.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]  # noqa: RUF012 - diffusers' form

    def __init__(
        self,
        transformer: MaskMMDiT | SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | PatchPCA,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        label_schema: dict[str, Any] | None = None,
        # Not Literals: diffusers checks the types of what it loads, and can not read these.
        mask_coding: Any = "onehot",
        mask_init: Any = "copy",
        caption: str = "a satellite image of {classes}",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.schema = self.known_classes(label_schema)
        self.factor = spatial_factor(vae)
        if not isinstance(transformer, MaskMMDiT):
            channels = mask_channels(self.schema, mask_coding, vae)
            transformer = MaskMMDiT.from_sd3(transformer, mask_channels=channels, mask_init=mask_init)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.register_to_config(
            label_schema=label_schema,
            mask_coding=mask_coding,
            mask_init=mask_init,
            caption=caption,
            image_size=image_size,
        )
        self.prompts = PromptCache(self.encode_prompts, folder=None, identity="")
        self._null_masks: dict[torch.Size, Tensor] = {}
        self._trained_on = torch.float32
        self._precision: Precision = "fp32"
        self.text_dropout = self.mask_dropout = self.reference_dropout = 0.0
        self.layout_share = 0.0
        self.density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"

    @property
    def network(self) -> MaskMMDiT:
        """What is trained."""
        return self.transformer

    @property
    def looks(self) -> bool:
        """Whether it learned to look at references."""
        return bool(self.transformer.config.reference)

    @property
    def paints_layouts(self) -> bool:
        """Whether it learned to paint masks."""
        return bool(self.transformer.config.layouts)

    def add_layouts(self) -> Self:
        """Let it learn to paint masks, without changing what it paints under masks, and return self.

        Raises:
            TerraSynthError: masks are not coded one-hot, or the transformer does not update mask tokens.
        """
        if self.config.mask_coding != "onehot":
            raise TerraSynthError(
                "the model can not learn to paint layouts",
                found=f"masks coded as {self.config.mask_coding}",
                expected="mask_coding: onehot",
                fix="start from another model",
            )
        self.transformer.add_layouts(self.factor)
        return self

    # Conditions

    @property
    def text_encoders(self) -> list[CLIPTextModelWithProjection | T5EncoderModel]:
        """Those that there are."""
        every = (self.text_encoder, self.text_encoder_2, self.text_encoder_3)
        return [encoder for encoder in every if encoder is not None]

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts to prompt embeddings (B, L, D) and pooled embeddings (B, P); `prompts` is the same with a cache.

        One by one: in a batch each would be rounded as its neighbours have it. Text encoders in main memory come to the
        autoencoder's device for this, and leave it again.
        """
        clip = [(self.tokenizer, self.text_encoder)]
        if self.text_encoder_2 is not None:
            clip.append((self.tokenizer_2, self.text_encoder_2))
        t5 = None if self.text_encoder_3 is None else (self.tokenizer_3, self.text_encoder_3)
        visitors = [encoder for encoder in self.text_encoders if encoder.device.type == "cpu"]
        try:
            for encoder in visitors:
                encoder.to(self.vae.device)
            embeds, pooled = zip(*(encode_prompts([prompt], clip, t5) for prompt in prompts), strict=True)
            return torch.cat(embeds), torch.cat(pooled)
        finally:
            for encoder in visitors:
                encoder.to("cpu")

    def encode_masks(self, masks: Tensor) -> Tensor:
        """Masks (B, H, W) of class indices to mask latents (B, C, h, w) on the grid of the image latents."""
        code = self.schema.encode(masks, self.config.mask_coding)
        if self.config.mask_coding == "grey":
            return self.encode_images(code / 2 + 0.5).to(self.transformer.dtype)
        return self._mask_latents(code)

    def _mask_latents(self, code: Tensor) -> Tensor:
        """A code (B, K, H, W) as mask latents: nothing is lost, the pixels under one latent become its channels."""
        return F.pixel_unshuffle(code, self.factor).to(self.transformer.dtype)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Images uint8 (B, 3, H, W) through the autoencoder and back: uint8 on the CPU, the best a painting can be."""
        parts = (part.to(self.device).float() / 255 for part in images.split(batch_size))
        return torch.cat([(self.decode(self.encode_images(part)) * 255).round().byte().cpu() for part in parts])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or hub name; see `DiffusionPipeline.from_pretrained`. Only safetensors are read.

        Everything is float32 unless a precision is asked for, however it is stored.

        `terrasynth-tiny` is the small base model that comes with the package. With `label_schema`, a model that knows
        other classes is given these (`adapt`), and `caption` and `image_size` if they are named too.

        Raises:
            TerraSynthError: there is no such model, a part of it is missing or damaged, or it knows no classes.
        """
        pretrained_model_name_or_path = packaged_or(pretrained_model_name_or_path)
        expected = "a pipeline that TerraSynth saved, or Stable Diffusion 3 / 3.5 as a folder or hub name"
        with loading(pretrained_model_name_or_path, expected):
            wanted: dict[str, Any] = {}
            if "label_schema" in kwargs:
                where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
                if "label_schema" in cls.load_config(pretrained_model_name_or_path, **where):
                    # The coding is the model's own.
                    names = ("label_schema", "caption", "image_size", "mask_coding", "mask_init")
                    wanted = {name: kwargs.pop(name, None) for name in names}
            pipeline = super().from_pretrained(str(pretrained_model_name_or_path), use_safetensors=True, **kwargs)
            check_whole(pipeline, pretrained_model_name_or_path)
            pipeline._trained_on = pipeline.text_encoder.dtype  # text encoders come in the precision of their files
            if not kwargs.keys() & {"torch_dtype", "dtype", "device_map"}:
                cast(pipeline, torch.float32)
            if wanted:
                pipeline.adapt(LabelSchema.from_dict(wanted["label_schema"]), wanted["caption"])
                pipeline.register_to_config(image_size=wanted["image_size"] or pipeline.config.image_size)
            return pipeline

    def place(self, device: str | torch.device, precision: Precision) -> Self:
        """Bring the networks where they paint, in as little of a card's memory as that takes, and return self.

        The text encoders, most of the weights of a large model, stay in main memory but for the prompts that
        `encode_prompts` meets; stored in bfloat16, as they were in training, they are used in it. What is painted in
        bfloat16 has its linear layers in it.

        Args:
            device: where to paint.
            precision: of every call of the pipeline from now on.
        """
        device, self._precision = torch.device(device), precision
        if computes_in_bfloat16(device, precision):
            self.transformer.requires_grad_(False)
            round_linear(self.transformer)
            if self._trained_on == torch.bfloat16:
                for encoder in self.text_encoders:
                    encoder.to(torch.bfloat16)
        for part in (self.transformer, self.vae):
            part.to(device)
        return self

    def adapt(self, schema: LabelSchema, caption: str | None = None) -> Self:
        """Change the classes, keep everything that was learned, and return self.

        A class that the model knows by name keeps its embedding; the others start as the mean of all.

        Args:
            schema: the new classes.
            caption: template of the default prompts, if it changes too.

        Raises:
            TerraSynthError: the masks are not coded one-hot, so the classes are not told apart in the weights.
        """
        if self.config.mask_coding != "onehot" and schema.names != self.schema.names:
            raise TerraSynthError(
                "the model can not be given other classes",
                found=f"masks coded as {self.config.mask_coding}",
                expected="a model trained with mask_coding: onehot, or the classes it was trained with",
                fix="train from another base",
            )
        if self.config.mask_coding == "onehot":
            known = {name: k for k, name in enumerate(self.schema.names)}
            self.transformer.remap_mask_classes(len(known), [known.get(name) for name in schema.names])
        self.schema = schema
        self.register_to_config(label_schema=schema.to_dict(), **({} if caption is None else {"caption": caption}))
        self._null_masks.clear()
        return self

    # Training

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Flow-matching loss: mean squared error of the velocity epsilon - x_0 (as Stable Diffusion 3, weighting 1).

        Of the samples with labels, `layout_share` learn their layout instead: the image is pure noise, the mask is
        noised, and the loss is the cross-entropy of its labelled pixels (`sampling.categories`), of what the tokens say
        and of what the pixels make of it (`LayoutHead`). So p(mask) is learned beside p(image | mask), and both
        together are the joint distribution.

        Args:
            batch: `latents` (B, C, h, w); `mask` (B, H, W) uint8, or `mask_latents` when masks pass the autoencoder;
                `prompt_embeds` (B, L, D); `pooled` (B, P); `seed` (B,), from which each sample's timestep, noise and
                dropped conditions derive; `reference_latents` (B, C, h, w), if the model shall look at references.
        """
        latents = batch["latents"]
        # One stream of random numbers a sample: its timestep and noise, then whether its conditions are dropped.
        generators = [seeded_generator(seed) for seed in batch["seed"].tolist()]
        flow = flow_batch(latents, generators, density=self.density, shift=self.scheduler.config.shift)
        u = torch.stack([torch.rand(2, generator=generator) for generator in generators]).to(latents.device)
        keep_text, keep_mask = u[:, 0] >= self.text_dropout, u[:, 1] >= self.mask_dropout
        null_embeds, null_pooled = (null.to(latents.device) for null in self.prompts([""]))
        if "mask_latents" in batch:
            null_mask = self.null_mask_latents(batch["mask"][:1])
            mask_latents = condition_or_null(keep_mask, batch["mask_latents"], null_mask)
        else:
            unlabelled = torch.full_like(batch["mask"][:1], self.schema.ignore_index)
            mask_latents = self.encode_masks(condition_or_null(keep_mask, batch["mask"], unlabelled))
        reference = sees = None
        if "reference_latents" in batch:
            v = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(latents.device)
            reference = self.transformer.reference_features(batch["reference_latents"])
            sees = v >= self.reference_dropout
        noisy, timestep, mask_sigma = flow.noisy, flow.timestep, None
        if self.layout_share:
            w = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(latents.device)
            maps = self._noised(batch["mask"], generators)
            labelled = (batch["mask"] < self.schema.num_classes).flatten(1).any(1)
            learned = (w < self.layout_share) & labelled
            each = learned.view(-1, 1, 1, 1)
            noisy = torch.where(each, noisy + (1 - flow.sigma).view(-1, 1, 1, 1) * flow.velocity, noisy)
            timestep = torch.where(learned, 1000.0, timestep)
            keep_text = keep_text & ~(learned & (u[:, 0] < _ANY_LAYOUT))
            mask_latents = torch.where(each, self._mask_latents(to_codes(maps.noisy)), mask_latents)
            mask_sigma = torch.where(learned, maps.sigma, 0.0)
            sees = None if sees is None else sees & ~learned
        predicted, *context = self.transformer(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=condition_or_null(keep_text, batch["prompt_embeds"], null_embeds),
            pooled_projections=condition_or_null(keep_text, batch["pooled"], null_pooled),
            mask_latents=mask_latents,
            mask_sigma=mask_sigma,
            reference=reference,
            sees=sees,
            return_dict=False,
        )
        if not self.layout_share:
            return F.mse_loss(predicted.float(), flow.velocity)
        of_image = (predicted.float() - flow.velocity).square().flatten(1).mean(1)
        of_layout = torch.zeros_like(of_image)
        for each in context:
            scores = category_scores(maps.noisy, maps.sigma, F.pixel_shuffle(each, self.factor))
            of_layout = of_layout + category_loss(scores, batch["mask"])
        return torch.where(learned, of_layout, of_image).mean()

    def _noised(self, masks: Tensor, generators: Sequence[torch.Generator]) -> FlowBatch:
        """Masks (B, H, W) noised to random times, in one-hot points.

        Uniform times: at each of them some of the layout is decided, at the first what there is at all.
        """
        return flow_batch(
            to_points(self.schema.to_onehot(masks)), generators, density="uniform", shift=self._layout_shift
        )

    @property
    def _layout_shift(self) -> float:
        """Timestep shift of masks: the latents', times the pixels of a latent's side (Esser et al. 2024, 5.3.2)."""
        return float(self.scheduler.config.shift * self.factor)

    def null_mask_latents(self, like: Tensor) -> Tensor:
        """Latents (1, C, h, w) of a wholly unlabelled mask of the size of `like` (1, H, W), encoded once."""
        if like.shape not in self._null_masks:
            self._null_masks[like.shape] = self.encode_masks(torch.full_like(like, self.schema.ignore_index))
        return self._null_masks[like.shape].to(like.device)

    # Sampling

    @torch.no_grad()
    def __call__(
        self,
        masks: Tensor,
        prompts: Sequence[str] | None = None,
        references: Tensor | None = None,
        *,
        seeds: Sequence[int],
        num_inference_steps: int = 23,
        solver: Solver = "euler",
        shift: float | None = None,
        text_scale: float = 1.0,
        mask_scale: float = 1.5,
        reference_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        steering: Steering | None = None,
        callback: Callable[[FlowStep, Tensor], None] | None = None,
        precision: Precision | None = None,
        output_type: Literal["pt", "pil"] = "pil",
    ) -> ImagePipelineOutput:
        """Paint one image under each mask.

        Args:
            masks: (B, H, W) class indices; H and W divisible by the pixels of one token.
            prompts: B texts; by default captions of the classes present.
            references: (B, 3, h, w) in [0, 1], images in whose look to paint, of any size that the model paints; None
                for no reference.
            seeds: B seeds; an image depends on its own mask, prompt, reference and seed only (to float tolerance).
            num_inference_steps: evaluations of the velocity.
            solver: `euler` or `adams`, see `sampling.flow.sample_flow`.
            shift: timestep shift of the sampling, if other than the scheduler's.
            text_scale: guidance scale of the prompt against the empty one; 1 is off.
            mask_scale: guidance scale of the mask against an unlabelled one; 1 is off.
            reference_scale: guidance scale of the reference against none; 1 is off.
            guidance_interval: noise levels above the first and up to the second are guided.
            steering: changes the velocity in each step, as `ControlRectify`.
            callback: told each step and its estimate of the clean latents.
            precision: `bf16` or `auto` evaluate float32 weights in bfloat16; the latents stay in float32. By default
                that of `place`, or `fp32`.
            output_type: `pt` for a float tensor (B, 3, H, W) in [0, 1], `pil` for a list of images.

        Raises:
            TerraSynthError: the masks' or references' size does not fit, there are not as many of each, or the model
                can not look at references.
        """
        self._check(masks, prompts, seeds, references)
        device = self._execution_device
        masks = masks.to(device)
        references = None if references is None else references.to(device)
        shape = (self.transformer.config.in_channels, *(side // self.factor for side in masks.shape[-2:]))
        with autocast(device, precision or self._precision):
            latents = sample_flow(
                self.velocity(masks, prompts, text_scale, mask_scale, guidance_interval, references, reference_scale),
                seeded_noise(seeds, shape).to(device),
                self.shifted(shift),
                num_inference_steps,
                solver=solver,
                steering=steering,
                decode=self.decode,
                callback=callback,
            )
            images = self.decode(latents)
        if output_type == "pil":
            images = self.numpy_to_pil(images.movedim(1, -1).cpu().numpy())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    @torch.no_grad()
    def layouts(
        self,
        prompts: Sequence[str] | None = None,
        *,
        seeds: Sequence[int],
        num_inference_steps: int = 50,
        text_scale: float = 1.0,
        precision: Precision | None = None,
    ) -> Tensor:
        """Paint masks, to paint images under: a layout, then an image of it, is a sample of both.

        Args:
            prompts: B texts, as of the images; by default empty, which is any layout.
            seeds: B seeds; a mask depends on its own prompt and seed only (to float tolerance). Its image may have the
                same seed.
            num_inference_steps: evaluations of the network.
            text_scale: guidance scale of the prompt against the empty one; 1 is off.
            precision: as in `__call__`.

        Returns:
            Class indices, uint8 (B, H, W), of the size of the training; no pixel is unlabelled.

        Raises:
            TerraSynthError: the model did not learn to paint layouts, there are not as many prompts as seeds, or it
                paints no numbers.
        """
        if not self.paints_layouts:
            raise paints_no_layouts()
        if not len(seeds):
            raise TerraSynthError("no seeds, so nothing to paint", expected="one for each layout")
        if isinstance(prompts, str):
            raise TerraSynthError("`prompts` is one text", found=prompts, expected="a list, one for each seed")
        prompts = [""] * len(seeds) if prompts is None else prompts
        if len(prompts) != len(seeds):
            raise TerraSynthError("`prompts` and `seeds` differ in number", found=len(prompts), expected=len(seeds))
        device, dtype, transformer = self._execution_device, self.transformer.dtype, self.transformer.config
        side = self.config.image_size or transformer.sample_size * self.factor
        # First the noise that an image of this seed begins with, then that of its mask.
        generators = [seeded_generator(seed) for seed in seeds]
        image, noise = (
            torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)
            for shape in (
                (transformer.in_channels, side // self.factor, side // self.factor),
                (self.schema.num_classes, side, side),
            )
        )
        with torch.autocast(device.type, enabled=False):
            embeds, pooled = (x.to(device, dtype) for x in self.prompts(prompts))
            null_embeds, null_pooled = (x.to(device, dtype) for x in self.prompts([""]))

        def predict(z: Tensor, timestep: Tensor, uses: dict[str, Tensor]) -> Tensor:
            sigma = timestep / 1000
            _, context, _ = self.transformer(
                hidden_states=image.repeat(len(z) // len(image), 1, 1, 1).to(dtype),
                timestep=torch.full_like(timestep, 1000),
                encoder_hidden_states=condition_or_null(uses["text"], embeds, null_embeds),
                pooled_projections=condition_or_null(uses["text"], pooled, null_pooled),
                mask_latents=self._mask_latents(to_codes(z)),
                mask_sigma=sigma,
                return_dict=False,
            )
            return category_velocity(z, sigma, category_scores(z, sigma, F.pixel_shuffle(context, self.factor)))

        with autocast(device, precision or self._precision):
            painted = sample_flow(
                guided_velocity(predict, {"text": text_scale}),
                noise,
                self.shifted(self._layout_shift),
                num_inference_steps,
            )
        if not painted.isfinite().all():
            raise paints_no_numbers()
        self.maybe_free_model_hooks()
        return painted.argmax(1).to(torch.uint8)

    @torch.no_grad()
    def velocity(
        self,
        masks: Tensor,
        prompts: Sequence[str] | None = None,
        text_scale: float = 1.0,
        mask_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        references: Tensor | None = None,
        reference_scale: float = 1.0,
    ) -> Velocity:
        """The guided velocity under B masks (B, H, W), prompts and references; see `__call__`. It takes B latents.

        What does not depend on the timestep is computed once: the conditions, and what the image sees of a reference.
        """
        device, dtype = masks.device, self.transformer.dtype
        if prompts is None:
            prompts = self.captions(masks)
        # In the precision of the encoders, whatever the caller paints in: some of it is kept for other calls.
        with torch.autocast(device.type, enabled=False):
            embeds, pooled = (x.to(device, dtype) for x in self.prompts(prompts))
            null_embeds, null_pooled = (x.to(device, dtype) for x in self.prompts([""]))
            mask_latents, null_mask = self.encode_masks(masks), self.null_mask_latents(masks[:1])
        # The mask comes in last: its guidance is between two paintings of the same look.
        scales = {"text": text_scale, "reference": reference_scale, "mask": mask_scale}
        features = None
        if references is None:
            scales.pop("reference")
        else:
            features = self.transformer.reference_features(self.encode_images(references).to(dtype))

        known: dict[tuple[bool, ...], dict[str, Any]] = {}

        def predict(z: Tensor, timestep: Tensor, uses: dict[str, Tensor]) -> Tensor:
            used = tuple(torch.cat(list(uses.values())).tolist())
            if used not in known:  # they are the same in every step with and in every one without guidance
                known[used] = {
                    "encoder_hidden_states": condition_or_null(uses["text"], embeds, null_embeds),
                    "pooled_projections": condition_or_null(uses["text"], pooled, null_pooled),
                    "mask_latents": condition_or_null(uses["mask"], mask_latents, null_mask),
                    "sees": uses.get("reference"),
                }
            given = {"hidden_states": z.to(dtype), "timestep": timestep, "reference": features, **known[used]}
            return self.transformer(**given, return_dict=False)[0]

        return guided_velocity(predict, scales, guidance_interval)

    @staticmethod
    def sampling_arguments(sampling: SamplingConfig) -> dict[str, Any]:
        """A recipe's sampling as arguments of the call."""
        arguments = sampling.model_dump(exclude={"batch_size"})
        return {"num_inference_steps": arguments.pop("steps"), **arguments}

    def shifted(self, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler, with another timestep shift if one is given."""
        if shift is None:
            return self.scheduler
        return type(self.scheduler).from_config(self.scheduler.config, shift=shift)

    def _check(
        self, masks: Tensor, prompts: Sequence[str] | None, seeds: Sequence[int], references: Tensor | None
    ) -> None:
        side = self.factor * self.transformer.config.patch_size
        height, width = masks.shape[-2:]
        most = side * self.transformer.config.pos_embed_max_size
        if masks.ndim != 3 or height % side or width % side or max(height, width) > most:
            raise TerraSynthError(
                "the masks do not fit the model",
                found=f"shape {tuple(masks.shape)}",
                expected=f"(B, H, W) with H and W multiples of {side}, at most {most}",
                fix="resize or crop them",
            )
        for name, given in (("prompts", prompts), ("seeds", seeds), ("references", references)):
            if given is not None and len(given) != len(masks):
                raise TerraSynthError(f"`{name}` and `masks` differ in number", found=len(given), expected=len(masks))
        if references is None:
            return
        if not self.looks:
            raise blind()
        height, width = references.shape[-2:]
        if (
            not references.is_floating_point()
            or references.shape[1:-2] != (3,)
            or height % side
            or width % side
            or max(height, width) > most
        ):
            raise TerraSynthError(
                "the references do not fit the model",
                found=f"shape {tuple(references.shape)}, {references.dtype}",
                expected=f"floating point in [0, 1], (B, 3, H, W) with H and W multiples of {side}, at most {most}",
                fix="resize or crop them; divide bytes by 255",
            )

    # Construction

    @classmethod
    def from_scratch(
        cls, config: GeneratorConfig, images: Tensor, schema: LabelSchema, caption: str, texts: Sequence[str]
    ) -> Self:
        """An untrained pipeline of the sizes in `config`.

        Args:
            config: sizes, scheme of control, mask coding and seed.
            images: (N, 3, H, W) in [0, 1]; the autoencoder is fitted on them.
            schema: the classes.
            caption: template of the default prompts.
            texts: the vocabulary of the tokenizer is their words.
        """
        assert config.mask_coding != "ids", "the recipe was checked"
        vae = untrained_autoencoder(config)
        vae.fit(images * 2 - 1)
        tokenizer = word_tokenizer([*texts, caption.replace("{classes}", ", ".join(schema.names))])
        text_encoder = word_encoder(tokenizer, seed=config.seed)
        transformer = untrained_transformer(
            config,
            images.shape[-1],
            text_encoder.config,
            mask_channels=mask_channels(schema, config.mask_coding, vae),
            latent_std=vae.std.tolist(),
        )
        return cls(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
            vae=vae.eval().requires_grad_(False),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            label_schema=schema.to_dict(),
            mask_coding=config.mask_coding,
            caption=caption,
            image_size=images.shape[-1],
        )


def untrained_autoencoder(config: GeneratorConfig) -> PatchPCA:
    """The autoencoder of a generator from scratch, whose components are still to be fitted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return PatchPCA(
            **config.autoencoder.model_dump(exclude={"train", "refiner_noise", "channels"}),
            latent_channels=config.autoencoder.channels,
        )


def untrained_transformer(
    config: GeneratorConfig, image_size: int, text: CLIPTextConfig, *, mask_channels: int, latent_std: Sequence[float]
) -> MaskMMDiT:
    """The transformer of a generator from scratch, with its scheme of control.

    Args:
        config: sizes and seed.
        image_size: side of the images in pixels.
        text: sizes of the text encoder.
        mask_channels: channels of the mask latents.
        latent_std: standard deviation of each channel of the image latents.
    """
    grid = image_size // config.autoencoder.patch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CONTROL_SCHEMES[config.control](
            sample_size=grid,
            patch_size=config.patch_size,
            in_channels=config.autoencoder.channels,
            out_channels=config.autoencoder.channels,
            num_layers=config.blocks,
            attention_head_dim=config.width // config.heads,
            num_attention_heads=config.heads,
            caption_projection_dim=config.width,
            joint_attention_dim=text.hidden_size,
            pooled_projection_dim=text.projection_dim,
            # Twice the training size can be painted too.
            pos_embed_max_size=2 * grid // config.patch_size,
            qk_norm="rms_norm",
            mask_channels=mask_channels,
            latent_std=list(latent_std),
            reference=config.reference is not None,
        ).initialize_from_scratch()


def mask_channels(schema: LabelSchema, coding: Coding, vae: AutoencoderKL | PatchPCA) -> int:
    """Channels of the mask latents under a coding."""
    if coding == "grey":
        return int(vae.config.latent_channels)
    return schema.channels(coding) * spatial_factor(vae) ** 2
