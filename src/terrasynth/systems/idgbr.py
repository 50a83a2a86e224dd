"""IDGBR: class maps whose boundaries a diffusion model draws anew, from the image and a rough map.

Wang, Hu, Guo, Li, Tao: A Gift from the Integration of Discriminative and Diffusion-based Generative Learning, TPAMI
2026, doi 10.1109/TPAMI.2026.3654243 (arXiv 2507.01573). Reads like the method section: label codes, conditions, the
diffusion loss, refinement. What conditions add to the U-Net is `models.guidance_net`, the diffusion
`sampling.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.alignment import Alignment
from terrasynth.models.autoencoder import Autoencoder, PatchPCA, decode_latents, encode_images, spatial_factor
from terrasynth.models.convert_idgbr import load_published_parts
from terrasynth.models.guidance_net import GuidanceNet
from terrasynth.models.label_codes import CodeKind, LabelCodes
from terrasynth.models.snap import snap
from terrasynth.models.text import encode_prompts_sd1
from terrasynth.models.unet import Features, UNetEncoder, check_halves, decode, encode, repeat_mean
from terrasynth.sampling.diffusion import Epsilon, Prediction, Timesteps, diffusion_batch, sample_ddim
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.sampling.guidance import condition_or_null
from terrasynth.systems.loading import loading
from terrasynth.systems.pipeline import SavedPipeline, check_choice
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from terrasynth.recipe import Precision

__all__ = ["Conditions", "IDGBRPipeline", "decide"]

Conditions = Literal["joint", "separate"]

#: Stable Diffusion's noise schedule, at whose end there is no signal left: codes are smooth over large areas, and would
#: shine through the noise in training.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
#: Few steps begin where the noise is, and end at the last estimate itself.
_SAMPLING = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
#: The timestep at which encoders read conditions, as published.
_CONDITION_TIMESTEP = 1
#: Up to this side the guidance has attention.
_MAX_GRID = 16
_IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class IDGBRPipeline(SavedPipeline):
    """Refines rough class maps; loads and saves in the diffusers folder layout.

    `IDGBRPipeline.from_pretrained(FOLDER)` loads what TerraSynth saved. A Stable Diffusion 1.5 folder or hub name loads
    by the same call, and then gets encoders of the conditions, copies of its own, and a guidance network that at first
    adds nothing. `from_scratch` needs neither, nor an autoencoder. `from_published` reads the layout of the released
    code.

    Attributes:
        network: what is trained.
        ignore_index: the value of unlabelled pixels in maps, 255 unless the classes have another.
        factor: pixels, along one side, of what the networks see as one.
        condition_dropout: probability that training leaves the guidance out, so that `guidance_scale` has something to
            move away from.
        rough_start: probability that training noises the rough map in place of the true one, while the true one is
            still to be predicted; refinement that starts from the rough map (`strength` below 1) meets just that. Only
            where the clean code is predicted (`sample`), else 0.
        timesteps: how training draws them, see `sampling.diffusion.diffusion_batch`.
        alignment: a loss on what the guidance adds, or None; see `align`.

    Args:
        unet: what denoises. Of Stable Diffusion 1.x, or one that reads no text.
        scheduler: any of diffusers' with the noise schedule of the U-Net; sampling is DDIM.
        vae: the autoencoder in whose latents maps and images are; None for pixels, see `patch_size`.
        text_encoder: a CLIP text model, for U-Nets that read text. The text is always empty.
        tokenizer: its tokenizer.
        condition_encoder: what reads the conditions; None to copy the U-Net's.
        guidance_net: what they add to the U-Net; None for a new one.
        label_codes: the classes as points; None for new ones.
        label_schema: the classes, as `LabelSchema.to_dict()`; None for two classes without names.
        each_class: whether these two are one class, whichever, against the rest: such a refiner refines maps of any
            classes, see `each_class` of `scores`. None for what a saved refiner of two classes without names was before
            this was stored: one that does. Of any other refiner, it does not.
        trained_on: a note of what it learned from, which nothing reads: how many tiles, of which classes and size, and
            what is known of their pixels (`gsd`, `bands`, `ranges`).
        codes: what the points are, see `LabelCodes`, where there are no `label_codes`.
        conditions: `separate` reads image and rough map one after the other by the same encoder, as published; `joint`
            reads them at once, beside each other.
        trains_conditions: whether the encoder of the conditions is trained. By default `joint` ones are.
        sees_rough: whether the rough map is a condition; without, the image alone is, to see what the map is worth.
        prediction_type: what the U-Net predicts, see `sampling.diffusion`; None for what the scheduler says.
        patch_size: without a VAE, the side of the squares of pixels that the U-Net sees as one.
        image_size: side of the images it is trained on, in pixels; any multiple of `factor` can be refined.
        snap_rounds: in how many rounds rough maps follow the colours of the image before they are looked at, see
            `models.snap`; 0 takes them as they are, as published. `joint` conditions have both the map that follows
            the image and the one as it is, since to follow is not always right.
        corrects: whether the U-Net predicts what is to be added to the rough map's code, in place of the clean code
            itself. Only where that is predicted (`sample`).
        imagenet_statistics: bring images to ImageNet's mean and deviation in place of [-1, 1], as the released code
            does.
    """

    model_cpu_offload_seq = "text_encoder->condition_encoder->guidance_net->unet->vae"
    _optional_components = [  # noqa: RUF012 - diffusers' form
        *("vae", "text_encoder", "tokenizer", "condition_encoder", "guidance_net", "label_codes")
    ]
    EXPECTED = "a pipeline that TerraSynth saved, or Stable Diffusion 1.5 as a folder or hub name"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | PatchPCA | None = None,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        condition_encoder: UNetEncoder | None = None,
        guidance_net: GuidanceNet | None = None,
        label_codes: LabelCodes | None = None,
        label_schema: dict[str, Any] | None = None,
        # Not Literals: diffusers checks the types of what it loads, and can not read these.
        codes: Any = "bits",
        conditions: Any = "separate",
        trains_conditions: bool | None = None,
        sees_rough: bool = True,
        prediction_type: str | None = None,
        patch_size: int = 1,
        image_size: int = 512,
        snap_rounds: int = 0,
        corrects: bool = False,
        imagenet_statistics: bool = False,
        each_class: bool | None = None,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_halves(unet)
        check_choice("conditions", conditions, Conditions)
        check_choice("prediction_type", prediction_type or "sample", Prediction)
        if corrects and (predicts := prediction_type or scheduler.config.prediction_type) != "sample":
            raise TerraSynthError(
                "a refiner that corrects the rough map's code predicts clean codes",
                found=f"corrects, and prediction_type {predicts}",
                expected="prediction_type sample",
                fix="leave out `prediction_type`",
            )
        if corrects and not sees_rough:
            raise TerraSynthError(
                "a refiner that corrects the rough map's code shows the map that it is not to see",
                found="corrects, and sees_rough false",
                fix="leave out `sees_rough`, or train from scratch without the rough map",
            )
        self.schema = None if label_schema is None else LabelSchema.from_dict(label_schema)
        trained = label_codes is not None  # Stable Diffusion has none
        num_classes = 2 if label_codes is None else label_codes.config.num_classes
        num_classes = num_classes if self.schema is None else self.schema.num_classes
        self.ignore_index = 255 if self.schema is None else self.schema.ignore_index
        for part in (vae, text_encoder):
            if part is not None:
                part.requires_grad_(False)
        self.factor = patch_size if vae is None else spatial_factor(vae)
        image_channels = 3 * patch_size**2 if vae is None else vae.config.latent_channels
        if label_codes is None:
            # An autoencoder of images wants three channels, and so does an encoder that reads images as well.
            label_codes = LabelCodes(num_classes, codes, 3 if vae is not None or conditions == "separate" else None)
        if label_codes.config.num_classes != num_classes:
            raise TerraSynthError(
                "the classes do not fit the model",
                found=f"{num_classes} classes",
                expected=f"{label_codes.config.num_classes}",
                fix="leave out `label_schema` to load the model with its own",
            )
        if each_class is None:
            each_class = trained and label_schema is None and num_classes == 2
        if each_class and (label_schema is not None or num_classes != 2):
            raise TerraSynthError(
                "one class against the rest are two classes without names",
                found=f"{num_classes} classes" + (" with names" if label_schema is not None else ""),
                fix="leave out `each_class` or `label_schema`",
            )
        code_channels = label_codes.channels * patch_size**2 if vae is None else image_channels
        channels = image_channels + _maps_beside(conditions, snap_rounds) * code_channels
        if condition_encoder is None:
            condition_encoder = UNetEncoder.from_unet(unet, in_channels=channels)
        if condition_encoder.config.in_channels != channels:
            raise TerraSynthError(
                "the encoder of the conditions was made for others",
                found=f"{condition_encoder.config.in_channels} channels",
                expected=f"{channels}, for {conditions} conditions and snap_rounds {snap_rounds}",
                fix="leave out `conditions` and `snap_rounds` to load a refiner with its own",
            )
        if guidance_net is None:
            count = 1 if conditions == "joint" else 2
            guidance_net = GuidanceNet.for_unet(unet, image_size // self.factor, conditions=count, max_grid=_MAX_GRID)
            # Not diffusers' own `to`, which warns about an empty list of layers to keep in float32.
            guidance_net = nn.Module.to(guidance_net, unet.device, unet.dtype)
        if trains_conditions is None:
            trains_conditions = conditions == "joint"
        settings = dict(_SAMPLING) | ({} if prediction_type is None else {"prediction_type": prediction_type})
        self.register_modules(
            unet=unet,
            scheduler=DDIMScheduler.from_config(scheduler.config, **settings),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            condition_encoder=condition_encoder.requires_grad_(trains_conditions),
            guidance_net=guidance_net,
            label_codes=label_codes,
        )
        self.register_to_config(
            label_schema=label_schema,
            codes=label_codes.config.kind,
            conditions=conditions,
            trains_conditions=trains_conditions,
            sees_rough=sees_rough,
            prediction_type=self.scheduler.config.prediction_type,
            patch_size=patch_size,
            image_size=image_size,
            snap_rounds=snap_rounds,
            corrects=corrects,
            imagenet_statistics=imagenet_statistics,
            each_class=each_class,
            trained_on=trained_on,
        )
        self.noising = DDPMScheduler.from_config(self.scheduler.config)
        self.network = nn.ModuleDict({"unet": unet, "guidance_net": guidance_net})
        if trains_conditions:
            self.network["condition_encoder"] = condition_encoder
        self.condition_dropout = 0.1
        self.rough_start = 0.5 if sees_rough and self.config.prediction_type == "sample" else 0.0
        self.timesteps: Timesteps = "uniform"
        self.alignment: Alignment | None = None
        self.alignment_weight = 0.0
        self.alignment_steps: int | None = None
        self._empty_text: Tensor | None = None
        self._precision: Precision = "fp32"

    @property
    def num_classes(self) -> int:
        """K, of the refiner itself; see `each_class` of `refine` for maps of others."""
        return int(self.label_codes.config.num_classes)

    def adapt(self, schema: LabelSchema | None, codes: CodeKind = "bits") -> Self:
        """Change the classes, keep what was learned of images and boundaries, and return self.

        If the new codes have another number of channels, each starts as the mean of the old ones: after one class
        against the rest, every channel starts as just that.

        Args:
            schema: the new classes; None for one class, whichever, against the rest.
            codes: see `LabelCodes`.

        Raises:
            TerraSynthError: an autoencoder, or conditions that are read apart, leave too few channels for the codes.
        """
        before, fixed = self.label_codes.channels, self.vae is not None or self.config.conditions == "separate"
        num_classes = 2 if schema is None else schema.num_classes
        label_codes = LabelCodes(num_classes, codes, before if fixed else None)
        after = label_codes.channels
        if after != before:
            group = self.config.patch_size**2
            read, condition, drawn = self.unet.conv_in, self.condition_encoder.conv_in, self.unet.conv_out
            beside = _maps_beside(self.config.conditions, self.config.snap_rounds)
            for conv, times in ((read, 1), (condition, beside)):
                weight = repeat_mean(conv.weight, 1, before, after, group=group, times=times)
                with torch.no_grad():
                    weight[:, weight.shape[1] - times * after * group :] *= before / after  # what they sum to stays
                conv.weight, conv.in_channels = weight, weight.shape[1]
            drawn.weight = repeat_mean(drawn.weight, 0, before, after, group=group)
            drawn.bias = repeat_mean(drawn.bias, 0, before, after, group=group)
            drawn.out_channels = after * group
            self.unet.register_to_config(in_channels=after * group, out_channels=after * group)
            self.condition_encoder.register_to_config(in_channels=condition.in_channels)
        self.register_modules(label_codes=label_codes.to(self.unet.device))
        self.schema = schema
        self.ignore_index = 255 if schema is None else schema.ignore_index
        self.register_to_config(
            label_schema=None if schema is None else schema.to_dict(), each_class=schema is None, codes=codes
        )
        return self

    # Label codes

    def encode_labels(self, codes: Tensor) -> Tensor:
        """Label codes (B, C, H, W) to what is noised, (B, c, h, w): latents, or patches of pixels."""
        if self.vae is None:
            return F.pixel_unshuffle(codes, self.config.patch_size)
        return encode_images(self.vae, codes / 2 + 0.5)

    def decode_labels(self, latents: Tensor) -> Tensor:
        """The way back, to label codes float32 (B, C, H, W) within ±1."""
        if self.vae is None:
            return F.pixel_shuffle(latents.float(), self.config.patch_size).clamp(-1, 1)
        return decode_latents(self.vae, latents) * 2 - 1

    @torch.no_grad()
    def round_trip(self, masks: Tensor) -> Tensor:
        """What becomes of class maps (B, H, W) on the way to latents and back, uint8: the best a refiner can do."""
        return self.label_codes.decode(self.decode_labels(self.encode_labels(self.label_codes.encode(masks))))

    # Conditions

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to what the conditions' encoder sees of them, (B, c, h, w)."""
        if self.config.imagenet_statistics:
            images = (images - _IMAGENET_MEAN.to(images)) / _IMAGENET_STD.to(images) / 2 + 0.5
        if self.vae is None:
            return F.pixel_unshuffle(images * 2 - 1, self.config.patch_size)
        return encode_images(self.vae, images)

    def read(self, images: Tensor, rough: Tensor) -> list[Features]:
        """Feature maps of the conditions, which are the same at all timesteps.

        Args:
            images: (B, 3, H, W) in [0, 1].
            rough: see `rough_codes`.
        """
        image = self.encode_images(images)
        if self.config.conditions == "separate":
            return [self._encode_condition(image), self._read_rough(rough)]
        return [self._encode_condition(torch.cat([image, self._seen_of(rough)], dim=1))]

    def _read_rough(self, rough: Tensor) -> Features:
        return self._encode_condition(self._seen_of(rough))

    def _seen_of(self, rough: Tensor) -> Tensor:
        """What the encoder is shown of the rough map; where it is not to be seen zeros, as in the released code."""
        maps = rough.split(self.label_codes.channels, dim=1)
        labels = torch.cat([self.encode_labels(codes) for codes in maps], dim=1)
        return labels if self.config.sees_rough else torch.zeros_like(labels)

    def rough_codes(self, shares: Tensor, rough: Tensor) -> Tensor:
        """Label codes of rough maps, as conditions have them.

        Args:
            shares: of the classes in the votes, (B, K, H, W), see `models.snap`.
            rough: class indices (B, H, W); other values are unlabelled.

        Returns:
            (B, C, H, W): the mean code of the shares; or (B, 2C, H, W), then the code of the map as it is, where
            conditions have both (`snap_rounds`).
        """
        codes = self.label_codes.mean(shares)
        both = _maps_beside(self.config.conditions, self.config.snap_rounds) == 2
        return torch.cat([codes, self.label_codes.encode(rough)], dim=1) if both else codes

    def start_of(self, rough: Tensor) -> Tensor:
        """What refinement may start from, and `corrects` adds to, (B, c, h, w), given `rough_codes`."""
        return self.encode_labels(rough[:, : self.label_codes.channels])

    def _encode_condition(self, condition: Tensor) -> Features:
        timestep = torch.full((len(condition),), _CONDITION_TIMESTEP, device=condition.device)
        encoder = self.condition_encoder
        return encoder(condition.to(encoder.dtype), timestep, self._text(len(condition)))

    def _text(self, count: int) -> Tensor | None:
        """The empty prompt, (count, L, D), for U-Nets that read text."""
        if self.text_encoder is None:
            return None
        if self._empty_text is None:
            with torch.autocast(self.unet.device.type, enabled=False):
                self._empty_text, _ = encode_prompts_sd1([""], self.tokenizer, self.text_encoder)
        return self._empty_text.to(self.unet.device, self.unet.dtype).expand(count, -1, -1)

    # Training

    def align(self, teacher: str, weight: float = 0.5, *, steps: int | None = None, **settings: Any) -> Self:
        """Train with an alignment loss as well, and return self.

        Published is `vit_giant_patch14_dinov2` with a weight of 0.5, in the first 200 of 80,000 steps.

        Args:
            teacher: of `timm`, see `Alignment`.
            weight: of the loss.
            steps: in how many it is computed, the first; None for all.
            settings: other arguments of `Alignment`.

        Raises:
            TerraSynthError: there is no such backbone, or its weights can not be had.
        """
        channels = self.guidance_net.config.channels[-2]
        with loading(teacher, "a backbone of timm: one of timm.list_models(), hf-hub:NAME or local-dir:FOLDER"):
            self.alignment = Alignment(channels, teacher, **settings).to(self.unet.device)
        self.alignment_weight, self.alignment_steps = weight, steps
        self.network["projector"] = self.alignment.projector
        return self

    def training_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Diffusion loss: mean squared error of what is predicted, over the labelled pixels of each sample.

        Args:
            batch: `image` (B, 3, H, W) in [0, 1]; `rough` and `mask` (B, H, W), class indices, whose other values
                are unlabelled: in `rough` they are coded as zero, in `mask` they carry no loss; `seed` (B,), from which
                each sample's timestep, noise and what is dropped derive; and the number of the `step`, by which the
                alignment loss ends, by default the first.

        Raises:
            TerraSynthError: see `check_rough_start`.
        """
        self.check_rough_start()
        step = int(batch.get("step", 0))
        images, rough, masks = batch["image"], batch["rough"].long(), batch["mask"].long()
        labelled = (masks >= 0) & (masks < self.num_classes)
        shares = snap(images, rough, self.num_classes, self.config.snap_rounds)
        rough_codes = self.rough_codes(shares, rough)
        # What is unknown is noised as the rough map has it, so that nothing else is to be seen than in refinement.
        truth = self.encode_labels(self.label_codes.encode(torch.where(labelled, masks, rough)))
        # One stream of random numbers a sample: what is dropped and where it starts, then its timestep and noise.
        generators = [seeded_generator(seed) for seed in batch["seed"].tolist()]
        u = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        dropped, starts_rough = (
            (u < torch.tensor([self.condition_dropout, self.rough_start])).to(truth.device).unbind(1)
        )
        start = None
        if self.rough_start:
            start = condition_or_null(starts_rough, self.start_of(rough_codes), truth)
        noisy, target, timestep = diffusion_batch(
            truth, generators, self.noising, timesteps=self.timesteps, start=start
        )
        text = self._text(len(images))
        encoded = encode(self.unet, noisy.to(self.unet.dtype), timestep, text)
        residuals = self.guidance_net(encoded, self.read(images, rough_codes))
        predicted = decode(self.unet, encoded.plus(residuals.times((~dropped).to(self.unet.dtype))), text).float()
        if self.config.corrects:
            predicted = predicted + self.start_of(rough_codes) * (~dropped).view(-1, 1, 1, 1)
        weight = self._weight(labelled, target)
        error = weight * (predicted - target).square()
        losses = error.flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)
        if self.alignment is not None and self.alignment_steps is not None and step >= self.alignment_steps:
            # Processes that share a step wait for the gradient of every parameter.
            losses = losses + 0 * sum(parameter.sum() for parameter in self.alignment.projector.parameters())
        elif self.alignment is not None:
            losses = losses + self.alignment_weight * self.alignment(residuals.skips[-1], images)
        return losses.mean()

    def check_rough_start(self) -> None:
        """Refuse a `rough_start` that can not be.

        Raises:
            TerraSynthError: something else than the clean code is predicted, or the rough map is not to be seen.
        """
        if self.rough_start and self.config.prediction_type != "sample":
            raise TerraSynthError(
                "training from rough starts needs a network that predicts the clean code",
                found=f"rough_start {self.rough_start} and prediction_type {self.config.prediction_type}",
                expected="prediction_type sample",
                fix="set `rough_start` to 0, or choose `sample`",
            )
        if self.rough_start and not self.config.sees_rough:
            raise TerraSynthError(
                "rough starts show the rough map to a refiner that is not to see it",
                found=f"rough_start {self.rough_start} and sees_rough false",
                fix="set `rough_start` to 0",
            )

    def _weight(self, labelled: Tensor, target: Tensor) -> Tensor:
        """Which numbers of the target carry a loss: of latents, those of wholly labelled squares; (B, c, h, w)."""
        by_pixel = labelled.float().unsqueeze(1)
        if self.vae is None:
            return F.pixel_unshuffle(by_pixel.expand(-1, self.label_codes.channels, -1, -1), self.config.patch_size)
        return (1 - F.max_pool2d(1 - by_pixel, self.factor)).expand_as(target)

    # Refinement

    @torch.no_grad()
    def refine(self, images: Tensor, rough: Tensor, *, band: Tensor | None = None, **sampling: Any) -> Tensor:
        """Class maps with boundaries drawn anew.

        Args:
            images: (B, 3, H, W) in [0, 1]; H and W divisible by `factor`.
            rough: class maps (B, H, W) of any integer type; `ignore_index` is unlabelled.
            band: which pixels may change, boolean (B, H, W); None for all, unlabelled ones too. Others keep their
                class exactly.
            sampling: see `scores`.

        Returns:
            uint8 (B, H, W). Where no class has a higher score than the rough map's, this stays.

        Raises:
            TerraSynthError: as of `scores`, or the band is of another size.
        """
        if band is not None and band.shape != rough.shape:
            raise TerraSynthError(
                "the band does not fit the maps", found=tuple(band.shape), expected=tuple(rough.shape)
            )
        return decide(self.scores(images, rough, **sampling), rough, band)

    @torch.no_grad()
    def scores(
        self,
        images: Tensor,
        rough: Tensor,
        *,
        seeds: Sequence[int],
        num_steps: int = 2,
        strength: float = 1.0,
        guidance_scale: float = 1.0,
        each_class: bool = False,
        num_classes: int | None = None,
        precision: Precision | None = None,
    ) -> Tensor:
        """How much each class is the one of a pixel; `decide` makes class maps of it, also of averages over windows.

        Args:
            images: see `refine`.
            rough: see `refine`.
            seeds: B seeds; a map depends on its own image, rough map and seed only (to float tolerance).
            num_steps: DDIM steps, each an evaluation of the network (two with guidance); 0 for none: what the votes of
                `models.snap` say, or the map as it is where the refiner begins without.
            strength: where it starts: 1 from noise alone, below from the rough map under so much noise.
            guidance_scale: by how much the conditions are exaggerated against none; 1 is off, and the cheapest.
                Published is 3, with a U-Net that was never trained without conditions.
            each_class: refine every class of the map against the rest, one after the other, by a refiner that was made
                for that.
            num_classes: K of the map, with `each_class`; None for the highest in it, plus one.
            precision: `bf16` or `auto` evaluate float32 weights in bfloat16. By default that of `place`, or `fp32`.

        Returns:
            float32 (B, K, H, W) in [0, 1].

        Raises:
            TerraSynthError: sizes or numbers do not fit, the map has classes that the refiner does not know, or
                `each_class` with a refiner that was not made for it.
        """
        self._check(images, rough, seeds, each_class)
        device = self._execution_device
        images, rough = images.to(device), rough.to(device).long()
        reads_once = each_class and self.config.conditions == "separate"
        count = self.num_classes
        if each_class:
            count = num_classes or int(rough.where(rough != self.ignore_index, 0).max().item()) + 1
        shares = snap(images, rough, count, self.config.snap_rounds)
        if not num_steps:
            return shares

        def of_rows(rows: Tensor, shares: Tensor, rough: Tensor) -> Tensor:
            codes = self.rough_codes(shares, rough)
            of_image = None if image_features is None else image_features.rows(rows)
            predict = self.denoiser(images[rows], codes, guidance_scale, of_image)
            start = self.start_of(codes)
            noise = seeded_noise([seeds[row] for row in rows.tolist()], start.shape[1:], device)
            latents = sample_ddim(predict, noise, self.scheduler, num_steps, start=start, strength=strength)
            return self.label_codes.scores(self.decode_labels(latents))

        with autocast(device, precision or self._precision):
            image_features = self._encode_condition(self.encode_images(images)) if reads_once else None
            if not each_class:
                return of_rows(torch.arange(len(images), device=device), shares, rough)
            known = rough != self.ignore_index
            found = torch.zeros(len(images), count, *rough.shape[1:], device=device)
            for k in range(count):
                rows = (rough == k).flatten(1).any(1).nonzero().squeeze(1)
                if len(rows):
                    share, there = shares[rows, k : k + 1], known[rows]
                    binary = (rough[rows] == k).long().where(there, self.ignore_index)
                    both = torch.cat([1 - share, share], dim=1) * there.unsqueeze(1)
                    found[rows, k] = of_rows(rows, both, binary)[:, 1]
            return found

    @torch.no_grad()
    def denoiser(
        self, images: Tensor, rough: Tensor, guidance_scale: float = 1.0, of_image: Features | None = None
    ) -> Epsilon:
        """What is predicted of noisy codes, given images and rough maps; see `scores`.

        The conditions are read here, once. One evaluation of the U-Net's encoder serves the decoder with and without
        guidance, since there is one text, the empty one.

        Args:
            images: (B, 3, H, W) in [0, 1].
            rough: see `rough_codes`.
            guidance_scale: see `scores`.
            of_image: what the encoder finds in the images, where it is known and `conditions` are `separate`.
        """
        text = self._text(len(images))
        conditions = self.read(images, rough) if of_image is None else [of_image, self._read_rough(rough)]
        added = self.start_of(rough) if self.config.corrects else 0

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            encoded = encode(self.unet, x.to(self.unet.dtype), timestep, text)
            seen = decode(self.unet, encoded.plus(self.guidance_net(encoded, conditions)), text).float() + added
            if guidance_scale == 1:
                return seen
            unseen = decode(self.unet, encoded, text).float()
            return unseen + guidance_scale * (seen - unseen)

        return predict

    def place(self, device: str | torch.device, precision: Precision) -> Self:
        """Bring the networks where they compute, the alignment too, in `precision` from now on, and return self."""
        if self.alignment is not None:
            self.alignment.to(device)
        return super().place(device, precision)

    def _check(self, images: Tensor, rough: Tensor, seeds: Sequence[int], each_class: bool) -> None:
        height, width = rough.shape[-2:]
        if height % self.factor or width % self.factor:
            raise TerraSynthError(
                "the maps do not divide into latents",
                found=f"{height} x {width} pixels",
                expected=f"multiples of {self.factor}",
                fix="resize or crop them",
            )
        if images.shape != (len(rough), 3, height, width) or not images.is_floating_point():
            raise TerraSynthError(
                "the images are not RGB images of the maps' number and size",
                found=f"{tuple(images.shape)}, {images.dtype}",
                expected=f"{(len(rough), 3, height, width)}, floating point in [0, 1]",
                fix="crop or resize them; divide bytes by 255",
            )
        if len(seeds) != len(rough):
            raise TerraSynthError("`seeds` and maps differ in number", found=len(seeds), expected=len(rough))
        if each_class and not self.config.each_class:
            raise TerraSynthError(
                "only a refiner of one class against the rest can refine class by class",
                found=f"a refiner of {self.num_classes} classes",
                fix="leave out `each_class`; a refiner of two classes that was trained so loads with `each_class=True`",
            )
        classes = [value for value in rough.unique().tolist() if value != self.ignore_index]
        if not each_class and any(value >= self.num_classes for value in classes):
            raise TerraSynthError(
                "the map has classes that the refiner does not know",
                found=f"class {max(classes)}",
                expected=f"0 to {self.num_classes - 1}, or {self.ignore_index} where unlabelled",
                fix="set `each_class` to refine them one after the other" if self.config.each_class else None,
            )

    # Construction

    @classmethod
    def from_scratch(
        cls,
        schema: LabelSchema | None = None,
        *,
        vae: Autoencoder | None = None,
        codes: CodeKind = "bits",
        conditions: Conditions = "joint",
        sees_rough: bool = True,
        prediction_type: Prediction = "sample",
        patch_size: int = 4,
        widths: Sequence[int] = (48, 64, 96, 128),
        layers: int = 1,
        guidance_width: int = 64,
        image_size: int = 256,
        snap_rounds: int = 16,
        seed: int = 0,
    ) -> Self:
        """An untrained pipeline of any size, that reads no text; by default five million parameters.

        Args:
            schema: the classes; None for one class, whichever, against the rest.
            vae: an autoencoder in whose latents to refine, or None for pixels.
            codes: see `LabelCodes`.
            conditions: see the class.
            sees_rough: see the class.
            prediction_type: what the U-Net predicts, see `sampling.diffusion`. The clean code needs the fewest steps.
            patch_size: without a VAE, the side of the squares of pixels that the U-Net sees as one.
            widths: channels of every level; the innermost has self-attention in its encoder.
            layers: residual blocks of a level.
            guidance_width: of the guidance's attention, which has four heads.
            image_size: side of the images it will be trained on.
            snap_rounds: see the class.
            seed: of the initial weights.
        """
        check_choice("conditions", conditions, Conditions)
        num_classes = 2 if schema is None else schema.num_classes
        factor = patch_size if vae is None else spatial_factor(vae)
        outer = len(widths) - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            label_codes = LabelCodes(num_classes, codes, 3 if vae is not None or conditions == "separate" else None)
            image, label = (
                count * patch_size**2 if vae is None else vae.config.latent_channels
                for count in (3, label_codes.channels)
            )
            unet = UNet2DConditionModel(
                sample_size=image_size // factor,
                in_channels=label,
                out_channels=label,
                down_block_types=(*["DownBlock2D"] * outer, "AttnDownBlock2D"),
                mid_block_type="UNetMidBlock2D",
                up_block_types=("UpBlock2D",) * len(widths),
                block_out_channels=tuple(widths),
                layers_per_block=layers,
                norm_num_groups=math.gcd(8, *widths),
                attention_head_dim=math.gcd(32, widths[-1]),
            )
            corrects = sees_rough and prediction_type == "sample"
            if corrects:  # it starts with the rough map, nearly: were it zero, the guidance would wait for a gradient
                unet.conv_out.weight.data.mul_(0.1)
                unet.conv_out.bias.data.zero_()
            joint = conditions == "joint"
            beside = _maps_beside(conditions, snap_rounds)
            encoder = UNetEncoder.from_config(unet.config, in_channels=image + beside * label)
            guidance_net = GuidanceNet.for_unet(
                unet,
                image_size // factor,
                conditions=1 if joint else 2,
                max_grid=_MAX_GRID,
                width=guidance_width,
                heads=4,
            )
        schedule = _SCHEDULE | {"rescale_betas_zero_snr": prediction_type != "epsilon"}
        return cls(
            unet=unet,
            scheduler=DDIMScheduler(**schedule),
            vae=None if vae is None else vae.eval().requires_grad_(False),
            condition_encoder=encoder,
            guidance_net=guidance_net,
            label_codes=label_codes,
            label_schema=None if schema is None else schema.to_dict(),
            each_class=schema is None,
            conditions=conditions,
            trains_conditions=True,
            sees_rough=sees_rough,
            prediction_type=prediction_type,
            patch_size=1 if vae is not None else patch_size,
            image_size=image_size,
            snap_rounds=snap_rounds,
            corrects=corrects,
        )

    @classmethod
    def from_published(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        label_codes: str | Path | None = None,
        label_schema: dict[str, Any] | None = None,
        *,
        sees_rough: bool = True,
    ) -> Self:
        """Load a folder in the layout of the released code, stored as safetensors.

        Args:
            folder: a finished run, or a `checkpoint-N`, which has `unet_gen` and `interact_net` alone.
            base: the Stable Diffusion 1.5 that a checkpoint was trained from; a finished run has what is needed of it.
            label_codes: the `label_embed_net` that a checkpoint was trained with; a finished run has its own.
            label_schema: the classes, the first of those that the codes are for; None for two without names.
            sees_rough: whether it was trained with the rough map. Of an ablation without (`use_rough_guidance: false`)
                the weights do not tell: they are as many, and of the same names.

        Raises:
            TerraSynthError: something is missing, damaged, or of another layout.
        """
        num_classes = None if label_schema is None else len(LabelSchema.from_dict(label_schema).names)
        with loading(folder, "a run of the released code; of a checkpoint, `base` and `label_codes` as well"):
            parts = load_published_parts(folder, base, label_codes, num_classes)
        return cls(
            **parts,
            label_schema=label_schema,
            conditions="separate",
            sees_rough=sees_rough,
            imagenet_statistics=True,
            each_class=False,
        )


def _maps_beside(conditions: Conditions, snap_rounds: int) -> int:
    """How many maps the encoder of the conditions reads beside an image."""
    if conditions == "separate":
        return 0
    return 2 if snap_rounds else 1


def decide(scores: Tensor, rough: Tensor, band: Tensor | None = None) -> Tensor:
    """The class of the highest score, and where none is higher than the rough map's, that.

    Args:
        scores: (B, K, H, W).
        rough: class maps (B, H, W) of any integer type; what is no class is unlabelled.
        band: which pixels may change, boolean (B, H, W); None for all.

    Returns:
        uint8 (B, H, W).
    """
    rough = rough.to(scores.device).long()
    known = rough < scores.shape[1]
    highest, best = scores.max(1)
    of_rough = scores.gather(1, rough.where(known, 0).unsqueeze(1)).squeeze(1)
    stays = known & (of_rough >= highest)
    if band is not None:
        stays = stays | ~band.to(scores.device)
    return torch.where(stays, rough, best).to(torch.uint8)
