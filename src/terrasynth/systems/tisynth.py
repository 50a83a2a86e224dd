"""TISynth: images painted under masks in the look of a reference image (Dong et al., Information Fusion 2025).

Reads like the method section: the conditions, the diffusion loss, guided sampling. The network is
`models.all_in_attention`, the diffusion `sampling.diffusion`, the reference of training `data.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.all_in_attention import AllInAttentionUNet
from terrasynth.models.autoencoder import Autoencoder, PatchPCA, spatial_factor
from terrasynth.models.text import PromptCache, encode_prompts_sd1, word_encoder, word_tokenizer
from terrasynth.sampling.diffusion import Epsilon, diffusion_batch, sample_ddim
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.sampling.guidance import Guided, condition_or_null, guidance_chain
from terrasynth.systems.pipeline import MaskPipeline, SavedPipeline
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from terrasynth.recipe import Precision, SamplingConfig

__all__ = ["MaskCoding", "TISynthPipeline"]

MaskCoding = Literal["onehot", "bits", "grey", "ids"]

_NOISE_LEVELS = 1000
#: Stable Diffusion's noise schedule and its DDIM timesteps.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
#: Widths of a ControlNet's hint, which halves the resolution between any two.
_HINT_CHANNELS = (16, 32, 96, 256)


class TISynthPipeline(SavedPipeline, MaskPipeline):
    """Paints images under masks in the look of reference images; loads and saves in the diffusers folder layout.

    `TISynthPipeline.from_pretrained(FOLDER)` loads what TerraSynth saved. A Stable Diffusion 1.5 folder or hub name
    loads by the same call with `label_schema=` given: its U-Net then gets the encoders of mask and reference, copies of
    its own, and at first paints what it did.

    Args:
        unet: the U-Net with all-in-attention, or Stable Diffusion 1.x's, which is extended.
        scheduler: any of diffusers' with the noise schedule of the U-Net; sampling is DDIM.
        vae: an autoencoder with the interface of `AutoencoderKL`.
        text_encoder: a CLIP text model.
        tokenizer: its tokenizer.
        label_schema: the classes, as `LabelSchema.to_dict()`.
        mask_coding: how masks enter their encoder: a `LabelSchema` coding, or `ids` as published: class indices / 255,
            unlabelled 1, on three channels.
        timestep_free: encoders whose features are the same in all steps (see `AllInAttentionUNet`), where Stable
            Diffusion is extended.
        caption: template of the default prompts.
        image_size: side of the images it was trained on; any multiple of a latent's pixels can be painted.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    EXPECTED = "a pipeline that TerraSynth saved, or Stable Diffusion 1.5 as a folder or hub name"

    def __init__(
        self,
        unet: AllInAttentionUNet | UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | PatchPCA,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        label_schema: dict[str, Any] | None = None,
        # Not a Literal: diffusers checks the types of what it loads, and can not read these.
        mask_coding: Any = "onehot",
        timestep_free: bool = False,
        caption: str = "a satellite image of {classes}",
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.schema = self.known_classes(label_schema)
        self.factor = spatial_factor(vae)
        channels = mask_channels(self.schema, mask_coding)
        if not isinstance(unet, AllInAttentionUNet):
            unet = AllInAttentionUNet.from_unet(
                unet, mask_channels=channels, hint_channels=hint_channels(self.factor), timestep_free=timestep_free
            )
        if unet.config.mask_channels != channels:
            raise TerraSynthError(
                "the classes do not fit the model",
                found=f"{channels} channels of the mask code ({len(self.schema.names)} classes, {mask_coding})",
                expected=f"{unet.config.mask_channels}",
                fix="leave out `label_schema` and `mask_coding` to load the model with its own",
            )
        if scheduler.config.get("prediction_type", "epsilon") != "epsilon":
            raise TerraSynthError(
                "the base model does not predict the noise",
                found=f"prediction_type {scheduler.config.prediction_type}",
                expected="epsilon",
                fix="choose Stable Diffusion 1.5 as a base",
            )
        self.register_modules(
            unet=unet,
            scheduler=DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            label_schema=label_schema,
            mask_coding=mask_coding,
            timestep_free=unet.config.timestep_free,
            caption=caption,
            image_size=image_size,
        )
        self.noising = DDPMScheduler.from_config(self.scheduler.config)
        self.prompts = PromptCache(self.encode_prompts, folder=None, identity="")
        self.text_dropout = self.mask_dropout = self.reference_dropout = 0.0
        self._precision: Precision = "fp32"

    @property
    def network(self) -> AllInAttentionUNet:
        """What is trained."""
        return self.unet

    @property
    def looks(self) -> bool:
        """It always learns to look at references."""
        return True

    @property
    def text_encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """The one that there is."""
        return [self.text_encoder]

    # Conditions

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts to prompt embeddings (B, L, D), and no pooled ones (B, 0); `prompts` is the same with a cache."""
        return encode_prompts_sd1(prompts, self.tokenizer, self.text_encoder)

    def encode_masks(self, masks: Tensor) -> Tensor:
        """Masks (B, H, W) of class indices to the code that the mask's encoder reads, (B, Cm, H, W)."""
        if self.config.mask_coding == "ids":
            ids = torch.where(masks == self.schema.ignore_index, 255, masks)
            return (ids / 255).to(self.unet.dtype).unsqueeze(1).expand(-1, 3, -1, -1)
        return self.schema.encode(masks, self.config.mask_coding).to(self.unet.dtype)

    # Training

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Diffusion loss: mean squared error of the noise (Ho et al. 2020, equation 14).

        Text, mask and reference are each dropped with a probability of their own (`text_dropout`, …): for the empty
        prompt, a wholly unlabelled mask, and latents that are zero (as in Brooks et al. 2023).

        Args:
            batch: `latents` (B, C, h, w); `mask` (B, H, W) uint8; `reference_latents` (B, C, h, w), of images as
                `data.reference` makes them; `prompt_embeds` (B, L, D); `seed` (B,), from which each sample's timestep,
                noise and dropped conditions derive.
        """
        latents = batch["latents"]
        # One stream of random numbers a sample: its timestep and noise, then whether its conditions are dropped.
        generators = [seeded_generator(seed) for seed in batch["seed"].tolist()]
        noisy, noise, timestep = diffusion_batch(latents, generators, self.noising)
        u = torch.stack([torch.rand(3, generator=generator) for generator in generators])
        dropout = torch.tensor([self.text_dropout, self.mask_dropout, self.reference_dropout])
        keep_text, keep_mask, keep_reference = (u >= dropout).to(latents.device).unbind(1)
        null_embeds = self.prompts([""])[0].to(latents.device)
        unlabelled = torch.full_like(batch["mask"][:1], self.schema.ignore_index)
        reference = batch["reference_latents"]
        predicted = self.unet(
            noisy,
            timestep,
            condition_or_null(keep_text, batch["prompt_embeds"], null_embeds),
            mask=self.encode_masks(condition_or_null(keep_mask, batch["mask"], unlabelled)),
            reference=condition_or_null(keep_reference, reference, torch.zeros_like(reference[:1])),
            return_dict=False,
        )[0]
        return F.mse_loss(predicted.float(), noise)

    # Sampling

    @torch.no_grad()
    def __call__(
        self,
        masks: Tensor,
        prompts: Sequence[str] | None = None,
        references: Tensor | None = None,
        *,
        seeds: Sequence[int],
        num_inference_steps: int = 50,
        text_scale: float = 1.0,
        mask_scale: float = 1.5,
        reference_scale: float = 1.0,
        callback: Callable[[int, Tensor], None] | None = None,
        precision: Precision | None = None,
        output_type: Literal["pt", "pil"] = "pil",
    ) -> ImagePipelineOutput:
        """Paint one image under each mask.

        Args:
            masks: (B, H, W) class indices; H and W divisible by the pixels of one latent.
            prompts: B texts; by default captions of the classes present.
            references: (B, 3, H, W) in [0, 1], whose look the images shall have; None for no reference.
            seeds: B seeds; an image depends on its own mask, reference, prompt and seed only (to float tolerance).
            num_inference_steps: DDIM steps.
            text_scale: guidance scale of the prompt against the empty one; 1 is off. Published sampling has 9, and 1
                for the others.
            mask_scale: guidance scale of the mask against an unlabelled one; 1 is off.
            reference_scale: guidance scale of the reference against none; 1 is off.
            callback: told each step's index and its estimate of the clean latents.
            precision: `bf16` or `auto` evaluate float32 weights in bfloat16; the latents stay in float32. By default
                that of `place`, or `fp32`.
            output_type: `pt` for a float tensor (B, 3, H, W) in [0, 1], `pil` for a list of images.

        Raises:
            TerraSynthError: the masks' size does not fit, or differs from the references'; or there are not as many of
                each.
        """
        self._check(masks, references, prompts, seeds)
        device = self._execution_device
        shape = (self.unet.config.in_channels, *(side // self.factor for side in masks.shape[-2:]))
        references = None if references is None else references.to(device)
        with autocast(device, precision or self._precision):
            latents = sample_ddim(
                self.epsilon(masks.to(device), prompts, references, text_scale, mask_scale, reference_scale),
                seeded_noise(seeds, shape).to(device),
                self.scheduler,
                num_inference_steps,
                callback=callback,
            )
            images = self.decode(latents)
        if output_type == "pil":
            images = self.numpy_to_pil(images.movedim(1, -1).cpu().numpy())
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    @torch.no_grad()
    def epsilon(
        self,
        masks: Tensor,
        prompts: Sequence[str] | None = None,
        references: Tensor | None = None,
        text_scale: float = 1.0,
        mask_scale: float = 1.5,
        reference_scale: float = 1.0,
    ) -> Epsilon:
        """The guided noise under B masks (B, H, W), prompts and references; see `__call__`. It takes B latents.

        Conditions come in in the order mask, reference, text, so that the published guidance, by text alone beside the
        same mask and reference, is one of the scales.

        What does not depend on the timestep is computed here, once: the prompts' embeddings, the reference's latents
        and the hints of both encoders; with `timestep_free` their features too. Encoders of the published form read the
        noisy latents, so their features are new in every step; terms that share a condition share them.
        """
        device, dtype, count = masks.device, self.unet.dtype, len(masks)
        scales = {"mask": mask_scale, "reference": reference_scale, "text": text_scale}
        if references is None:
            scales.pop("reference")
        terms = guidance_chain(scales)
        coefficients = torch.tensor([term.coefficient for term in terms], device=device)
        sees = {
            name: torch.tensor([name in term.sees for term in terms], device=device).repeat_interleave(count)
            for name in ("mask", "reference", "text")
        }
        # In full precision, whatever the caller paints in: some of it is kept for other calls.
        with torch.autocast(device.type, enabled=False):
            prompts = self.captions(masks) if prompts is None else prompts
            embeds, null_embeds = (self.prompts(texts)[0].to(device, dtype) for texts in (prompts, [""]))
        text = condition_or_null(sees["text"], embeds, null_embeds)
        codes = self.encode_masks(torch.cat([masks, torch.full_like(masks[:1], self.schema.ignore_index)]))
        latent_size = [side // self.factor for side in masks.shape[-2:]]
        latents = torch.zeros(count + 1, self.unet.config.in_channels, *latent_size, device=device, dtype=dtype)
        if references is not None:
            latents[:-1] = self.encode_images(references)
        hints = {
            name: condition_or_null(sees[name], hint[:-1], hint[-1:])
            for name, hint in self.unet.hints(codes, latents).items()
        }

        branches = [
            (encoder, hints[name], *_distinct(terms, (name, "text"), count, device))
            for name, encoder in (("mask", self.unet.mask_encoder), ("reference", self.unet.reference_encoder))
        ]

        def features(x: Tensor, timestep: Tensor) -> list[list[Tensor]]:
            found = []
            for encoder, hint, rows, back in branches:
                maps = self.unet.features(encoder, hint[rows], x[rows], timestep[rows], text[rows])
                found.append([each[back] for each in maps])
            return found

        kept: list[list[Tensor]] | None = None

        def predict(z: Tensor, timestep: Tensor) -> Tensor:
            nonlocal kept
            x, t = z.to(dtype).repeat(len(terms), 1, 1, 1), timestep.repeat(len(terms))
            found = features(x, t) if kept is None else kept
            if self.unet.config.timestep_free:
                kept = found
            noise = self.unet.denoise(x, t, text, *found).float().unflatten(0, (len(terms), count))
            return (coefficients.view(-1, 1, 1, 1, 1) * noise).sum(0)

        return predict

    def place(self, device: str | torch.device, precision: Precision) -> Self:
        """Bring the networks where they paint, in `precision` from now on, and return self."""
        self._precision = precision
        for part in (self.unet, self.vae, self.text_encoder):
            torch.nn.Module.to(part, device)  # not the pipeline's `to`, which warns
        return self

    @staticmethod
    def sampling_arguments(sampling: SamplingConfig) -> dict[str, Any]:
        """A recipe's sampling as arguments of the call.

        Raises:
            TerraSynthError: it has settings that are TODSynth's alone, or more steps than noise levels.
        """
        settings = type(sampling).model_fields
        foreign = [
            f"{name}: {getattr(sampling, name)}"
            for name in ("solver", "shift", "guidance_interval")
            if getattr(sampling, name) != settings[name].default
        ]
        if foreign:
            raise TerraSynthError(
                "TISynth has no such settings of its sampling, which is DDIM",
                found=", ".join(foreign),
                fix="leave them out of `sampling`",
            )
        if sampling.steps > _NOISE_LEVELS:
            raise TerraSynthError(
                f"`sampling.steps` is more than the {_NOISE_LEVELS} noise levels that Stable Diffusion knows",
                found=sampling.steps,
                expected=f"1 to {_NOISE_LEVELS}",
                fix="DDIM needs 20 to 50 steps",
            )
        scales = sampling.model_dump(include={"text_scale", "mask_scale", "reference_scale"})
        return {"num_inference_steps": sampling.steps, "precision": sampling.precision, **scales}

    def _check(
        self, masks: Tensor, references: Tensor | None, prompts: Sequence[str] | None, seeds: Sequence[int]
    ) -> None:
        height, width = masks.shape[-2:]
        if height % self.factor or width % self.factor:
            raise TerraSynthError(
                "the masks do not divide into latents",
                found=f"{height} x {width} pixels",
                expected=f"multiples of {self.factor}",
                fix="resize or crop them",
            )
        for name, given in (("references", references), ("prompts", prompts), ("seeds", seeds)):
            if given is not None and len(given) != len(masks):
                raise TerraSynthError(f"`{name}` and `masks` differ in number", found=len(given), expected=len(masks))
        if references is None:
            return
        if references.shape[1:] != (3, height, width) or not references.is_floating_point():
            raise TerraSynthError(
                "the references are not RGB images of the masks' size",
                found=f"{tuple(references.shape[1:])}, {references.dtype}",
                expected=f"{(3, height, width)}, floating point in [0, 1]",
                fix="crop or resize them; divide bytes by 255",
            )

    # Construction

    @classmethod
    def from_scratch(
        cls,
        vae: Autoencoder,
        schema: LabelSchema,
        texts: Sequence[str],
        *,
        caption: str = "a satellite image of {classes}",
        image_size: int | None = None,
        widths: Sequence[int] = (64, 128, 256, 256),
        heads: int = 8,
        layers: int = 2,
        mask_coding: MaskCoding = "onehot",
        timestep_free: bool = False,
        seed: int = 0,
    ) -> Self:
        """An untrained pipeline of any size.

        Args:
            vae: a trained autoencoder, such as `PatchPCA().fit(images)`.
            schema: the classes.
            texts: the vocabulary of the tokenizer is their words.
            caption: template of the default prompts.
            image_size: side of the images it will be trained on.
            widths: channels of every level, at least two; all but the innermost have transformers.
            heads: of every transformer; divides every width.
            layers: residual blocks of a level.
            mask_coding: see the class.
            timestep_free: see the class.
            seed: of the initial weights.
        """
        tokenizer = word_tokenizer([*texts, caption.replace("{classes}", ", ".join(schema.names))])
        text_encoder = word_encoder(tokenizer, seed=seed)
        factor, channels, outer = spatial_factor(vae), vae.config.latent_channels, len(widths) - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = AllInAttentionUNet(
                sample_size=(image_size or 512) // factor,
                in_channels=channels,
                out_channels=channels,
                down_block_types=(*["CrossAttnDownBlock2D"] * outer, "DownBlock2D"),
                up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * outer),
                block_out_channels=tuple(widths),
                layers_per_block=layers,
                norm_num_groups=math.gcd(32, *widths),
                cross_attention_dim=text_encoder.config.hidden_size,
                attention_head_dim=heads,
                mask_channels=mask_channels(schema, mask_coding),
                hint_channels=hint_channels(factor),
                timestep_free=timestep_free,
            )
        return cls(
            unet=unet,
            scheduler=DDIMScheduler(**_SCHEDULE),
            vae=vae.eval().requires_grad_(False),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            label_schema=schema.to_dict(),
            mask_coding=mask_coding,
            caption=caption,
            image_size=image_size,
        )


def mask_channels(schema: LabelSchema, coding: MaskCoding) -> int:
    """Channels of the mask code.

    Raises:
        TerraSynthError: there is no such coding.
    """
    if coding not in get_args(MaskCoding):
        raise TerraSynthError("no such mask coding", found=coding, expected=", ".join(get_args(MaskCoding)))
    return 3 if coding == "ids" else schema.channels(coding)


def hint_channels(factor: int) -> tuple[int, ...]:
    """Widths of the hints' convolutions for an autoencoder of so many pixels per latent along one side.

    Raises:
        TerraSynthError: these are no power of two up to 8.
    """
    halvings = factor.bit_length() - 1
    if factor != 2**halvings or halvings >= len(_HINT_CHANNELS):
        raise TerraSynthError(
            "the autoencoder's latents have a size that the mask's encoder can not bring its features to",
            found=f"{factor} x {factor} pixels per latent",
            expected="1, 2, 4 or 8 pixels along one side",
            fix="choose another autoencoder",
        )
    return _HINT_CHANNELS[: halvings + 1]


def _distinct(terms: Sequence[Guided], names: Iterable[str], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows, of `count` images per term, that differ in what they see of `names`; and for every row, which of these."""
    seen = [term.sees.intersection(names) for term in terms]
    distinct = list(dict.fromkeys(seen))
    images = torch.arange(count, device=device)
    rows = torch.cat([images + count * seen.index(each) for each in distinct])
    return rows, torch.cat([images + count * distinct.index(each) for each in seen])
