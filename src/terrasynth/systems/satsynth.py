"""SatSynth: images and their masks from one diffusion over the channels of both.

Toker, Eisenberger, Cremers, Leal-Taixé: SatSynth: Augmenting Image-Mask Pairs through Diffusion Models for Aerial
Semantic Segmentation, CVPR 2024 (arXiv 2403.16605). Reads like the method section: the joint code, what may be asked
for or given, the diffusion loss, sampling, the 2x stage. Label codes are `models.label_codes`, the diffusion is
`sampling.diffusion`. No code of it was published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin, UNet2DModel
from torch import Tensor, nn

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.condition import ConditionEmbedding
from terrasynth.models.label_codes import CodeKind, LabelCodes
from terrasynth.sampling.diffusion import Epsilon, Prediction, diffusion_batch, min_snr, sample_ddim
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.sampling.guidance import condition_or_null, guided_velocity
from terrasynth.systems.loading import check_whole, loading, paints_no_numbers
from terrasynth.systems.pipeline import SavedPipeline, check_choice
from terrasynth.training.precision import autocast

if TYPE_CHECKING:
    from terrasynth.recipe import Precision

__all__ = ["PUBLISHED", "Condition", "Given", "Pairs", "SatSynthPipeline", "check_shares", "class_shares", "halve"]

Condition = Literal["none", "given", "half"]

#: Arguments of `from_scratch` for the published size. The paper says 128 x 128 pixels, bits, and that the noise is
#: predicted; the rest is the U-Net of Nichol and Dhariwal 2021, which it does not contradict.
PUBLISHED: dict[str, Any] = {
    "codes": "bits",
    "prediction_type": "epsilon",
    "patch_size": 1,
    "widths": (128, 128, 256, 384, 512),
    "layers": 2,
    "attention": (16, 8),
    "asks_classes": False,
    "image_size": 128,
}
#: Improved DDPM's schedule; at its end there is no signal left.
_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
#: Images and codes lie within ±1, and so do estimates of them. Few steps begin where the noise is, and end at the last
#: estimate itself.
_SAMPLING = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
#: Numbers a pixel that say of image and mask whether it is given.
_FLAGS = 2


class Pairs(NamedTuple):
    """Painted images uint8 (B, 3, H, W) and their masks uint8 (B, H, W), class indices."""

    images: Tensor
    masks: Tensor


class Given(NamedTuple):
    """What of pairs is given, and not to be painted."""

    images: Tensor | None = None
    """uint8 (B, 3, H, W)."""
    known: Tensor | None = None
    """Which of their pixels are given, boolean (B, H, W); None for all."""
    masks: Tensor | None = None
    """Class indices (B, H, W), with the ignore index where the class is to be painted."""

    def halved(self, num_classes: int) -> Given:
        """In half the size: colours where all four pixels are given, classes where one of them is."""
        images, known, masks = self
        if images is not None:
            images = (F.avg_pool2d(images.float(), 2)).round().byte()
        if known is not None:
            known = F.avg_pool2d(known[:, None].float(), 2)[:, 0] == 1
        if masks is not None:
            _, masks = halve(torch.zeros(len(masks), 3, *masks.shape[-2:], device=masks.device), masks, num_classes)
        return Given(images, known, masks)


class _Filled(NamedTuple):
    images: Tensor
    known: Tensor
    masks: Tensor
    labelled: Tensor

    def beside(self, painted: Pairs) -> Pairs:
        """What is given as it is, and the rest of what is painted."""
        return Pairs(
            torch.where(self.known.unsqueeze(1), self.images, painted.images),
            torch.where(self.labelled, self.masks.byte(), painted.masks),
        )


class SatSynthPipeline(SavedPipeline):
    """Paints images and their masks together; loads and saves in the diffusers folder layout.

    `SatSynthPipeline.from_pretrained(FOLDER)` loads what TerraSynth saved, `from_unet` the weights of a diffusers
    `UNet2DModel` that denoises RGB and bits.

    Attributes:
        network: what is trained.
        class_dropout: probability that training tells nothing of the classes, so that painting without asking stays
            possible and `guidance_scale` has something to move away from.
        given_dropout: probability that training gives nothing, where there is something to give (`condition`).
        max_augmentation: the strongest noise on the smaller pair in the training of a 2x stage.
        min_snr: how noise levels are weighed in the loss, see `sampling.diffusion.min_snr`; None for all alike, as in
            the simple loss of what is predicted.

    Args:
        unet: what denoises.
        scheduler: any of diffusers' with the noise schedule of the U-Net; sampling is DDIM.
        label_codes: the classes as points; None for new ones.
        embedding: of what the U-Net is told; None for a new one, where there is something to tell.
        label_schema: the classes, as `LabelSchema.to_dict()`.
        codes: what the points are, see `LabelCodes`, where there are no `label_codes`.
        asks_classes: whether it can be told what share of the pixels classes shall have. A U-Net that was trained
            without learns to listen, and at first paints what it did.
        condition: what else the U-Net sees: `none`; `given`, the parts of image and mask that are not to be painted;
            or `half`, a pair of half the size to be enlarged.
        prediction_type: what the U-Net predicts, see `sampling.diffusion`; None for what the scheduler says.
        patch_size: side of the squares of pixels that the U-Net sees as one.
        image_size: side of the images it is trained on, in pixels.
    """

    model_cpu_offload_seq = "embedding->unet"
    _optional_components = ["label_codes", "embedding"]  # noqa: RUF012 - diffusers' form
    EXPECTED = "a pipeline that TerraSynth saved"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        label_codes: LabelCodes | None = None,
        embedding: ConditionEmbedding | None = None,
        label_schema: dict[str, Any] | None = None,
        # Not Literals: diffusers checks the types of what it loads, and can not read these.
        codes: Any = "bits",
        asks_classes: bool = False,
        condition: Any = "none",
        prediction_type: str | None = None,
        patch_size: int = 1,
        image_size: int = 128,
    ) -> None:
        super().__init__()
        if label_schema is None:
            raise TerraSynthError(
                "the pipeline has no label schema", expected="`label_schema=`", fix="name the classes"
            )
        check_choice("condition", condition, Condition)
        check_choice("prediction_type", prediction_type or "sample", Prediction)
        if condition == "half" and asks_classes:
            raise TerraSynthError(
                "a 2x stage is told its classes by the pair that it enlarges", found="asks_classes", fix="leave it out"
            )
        self.schema = LabelSchema.from_dict(label_schema)
        if label_codes is None:
            label_codes = LabelCodes(self.schema.num_classes, codes)
        if label_codes.config.kind == "learned":
            raise TerraSynthError(
                "what is painted can not be learned meanwhile: points that all lie together are easiest to guess",
                found="codes: learned",
                expected="bits or onehot",
            )
        if label_codes.config.num_classes != self.schema.num_classes:
            raise TerraSynthError(
                "the classes do not fit the model",
                found=f"{self.schema.num_classes} classes",
                expected=f"{label_codes.config.num_classes}",
                fix="leave out `label_schema` to load the model with its own",
            )
        joint = 3 + label_codes.channels
        _check_channels(unet, patch_size**2 * joint, patch_size**2 * condition_channels(condition, joint))
        features = 1 if condition == "half" else 2 * self.schema.num_classes if asks_classes else 0
        if features and embedding is None:
            unet = _listening(unet)
            embedding = ConditionEmbedding(features, unet.time_embedding.linear_2.out_features)
            # Not diffusers' own `to`, which warns about an empty list of layers to keep in float32.
            embedding = nn.Module.to(embedding, unet.device, unet.dtype)
        settings = _SAMPLING | ({} if prediction_type is None else {"prediction_type": prediction_type})
        scheduler = DDIMScheduler.from_config(scheduler.config, **settings)
        if scheduler.config.prediction_type == "epsilon" and scheduler.config.rescale_betas_zero_snr:
            raise TerraSynthError(
                "where no signal is left, the noise says nothing of the pair",
                found="prediction_type epsilon with rescale_betas_zero_snr",
                expected="prediction_type sample or v_prediction, or another noise schedule",
                fix="check what the weights were trained with",
            )
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            label_codes=label_codes,
            embedding=embedding,
        )
        self.register_to_config(
            label_schema=label_schema,
            codes=label_codes.config.kind,
            asks_classes=asks_classes,
            condition=condition,
            prediction_type=self.scheduler.config.prediction_type,
            patch_size=patch_size,
            image_size=image_size,
        )
        self.noising = DDPMScheduler.from_config(self.scheduler.config)
        self.network = nn.ModuleDict({"unet": unet} | ({} if embedding is None else {"embedding": embedding}))
        self.class_dropout = 0.2
        self.given_dropout = 0.3
        self.max_augmentation = 0.5
        self.min_snr: float | None = None
        self._precision: Precision = "fp32"

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.label_codes.config.num_classes)

    @property
    def multiple(self) -> int:
        """What the sides of the pairs that it paints must be multiples of."""
        return int(self.config.patch_size * 2 ** (len(self.unet.config.block_out_channels) - 1))

    # The joint code

    def encode(self, images: Tensor, masks: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and masks (B, H, W) to what is noised, (B, p² (3 + C), H / p, W / p) within ±1.

        The codes of pixels without a class are zero.
        """
        return self._patches(torch.cat([images * 2 - 1, self.label_codes.encode(masks)], dim=1))

    def decode(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: images float32 (B, 3, H, W) in [0, 1] and masks uint8 (B, H, W) of the nearest classes."""
        pixels = F.pixel_shuffle(joint.float(), self.config.patch_size).clamp(-1, 1)
        return pixels[:, :3] / 2 + 0.5, self.label_codes.decode(pixels[:, 3:])

    def _patches(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.config.patch_size)

    def _channels(self, of_image: Tensor, of_mask: Tensor) -> Tensor:
        """Numbers of pixels (B, H, W), of image and of mask, at every channel of the joint code."""
        image, mask = of_image.float().unsqueeze(1), of_mask.float().unsqueeze(1)
        channels = [image.expand(-1, 3, -1, -1), mask.expand(-1, self.label_codes.channels, -1, -1)]
        return self._patches(torch.cat(channels, dim=1))

    # What is asked for or given

    def ask(self, shares: Mapping[str, float], count: int) -> Tensor:
        """What to tell `count` paintings, (count, K): shares of the pixels by class name, NaN for all other classes.

        Raises:
            TerraSynthError: there is no such class, or the shares sum to more than 1.
        """
        check_shares(shares, self.schema)
        return torch.tensor([shares.get(name, math.nan) for name in self.schema.names]).expand(count, -1)

    def see(self, joint: Tensor, image_given: Tensor, mask_given: Tensor) -> tuple[Tensor, Tensor]:
        """What a network with the condition `given` sees.

        Args:
            joint: of image and mask, from `encode`; only what is given of it counts.
            image_given: pixels whose colour is given, boolean (B, H, W).
            mask_given: pixels whose class is given, boolean (B, H, W).

        Returns:
            The condition, (B, p² (5 + C), H / p, W / p): what is given, zero elsewhere, and where that is. And which of
            the numbers of `joint` are given, shaped as it.
        """
        given = self._channels(image_given, mask_given)
        flags = self._patches(torch.stack([image_given, mask_given], dim=1).to(joint.dtype))
        return torch.cat([joint * given, flags], dim=1), given.bool()

    def enlarge(self, images: Tensor, masks: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """What a 2x stage sees: the smaller pair at twice its size, c ← √(1 − s²) c + s ε (Ho et al. 2022, CDM).

        Args:
            images: (B, 3, H / 2, W / 2) in [0, 1].
            masks: (B, H / 2, W / 2).
            level: s, (B,) in [0, 1): a network that learned to see through noise forgives what the first stage leaves.
            noise: ε, (B, 3 + C, H, W).
        """
        larger = F.interpolate(images, scale_factor=2, mode="bilinear")
        codes = F.interpolate(self.label_codes.encode(masks), scale_factor=2, mode="nearest")
        s = level.view(-1, 1, 1, 1)
        return self._patches((1 - s**2).sqrt() * torch.cat([larger * 2 - 1, codes], dim=1) + s * noise)

    # Training

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Diffusion loss: mean squared error of what is predicted, over what is known and not given of each sample.

        With `min_snr`, weighed by the noise level.

        Pixels without a class have a code of zero and their code channels carry no loss, their colours do.

        Args:
            batch: `image` (B, 3, H, W) in [0, 1]; `mask` (B, H, W), class indices, whose other values are unlabelled;
                `seed` (B,), from which each sample's timestep, noise, and what is told or given derive.
        """
        images, masks = batch["image"], batch["mask"].long()
        joint = self.encode(images, masks)
        labelled = (masks >= 0) & (masks < self.num_classes)
        weight = self._channels(torch.ones_like(labelled), labelled)
        # One stream of random numbers a sample: what it is told and given, then its timestep and noise.
        generators = [seeded_generator(seed) for seed in batch["seed"].tolist()]
        told = condition = None
        if self.config.asks_classes:
            hidden = torch.stack([_hidden(self.num_classes, self.class_dropout, each) for each in generators])
            shares = class_shares(masks, self.num_classes)
            told = _told(shares.masked_fill(hidden.to(shares.device), math.nan))
        if self.config.condition == "given":
            drawn = [_given(masks.shape[-2:], self.given_dropout, each) for each in generators]
            image_given, mask_given = torch.stack(drawn).to(masks.device).unbind(1)
            condition, given = self.see(joint, image_given, mask_given & labelled)
            weight = weight * ~given
        elif self.config.condition == "half":
            level = self.max_augmentation * torch.stack([torch.rand((), generator=each) for each in generators])
            shape = 3 + self.label_codes.channels, *masks.shape[-2:]
            noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
            level, noise = level.to(masks.device), noise.to(masks.device)
            condition = self.enlarge(*halve(images, masks, self.num_classes), level, noise)
            told = level.unsqueeze(1)
        noisy, target, timestep = diffusion_batch(joint, generators, self.noising)
        predicted = self._evaluate(noisy, timestep, condition, told)
        error = weight * (predicted - target).square()
        loss = error.flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1)
        if self.min_snr is not None:
            loss = loss * min_snr(timestep, self.noising, self.min_snr)
        return loss.mean()

    def _evaluate(self, x: Tensor, timestep: Tensor, condition: Tensor | None, told: Tensor | None) -> Tensor:
        """The network's prediction, float32."""
        seen = x if condition is None else torch.cat([x, condition], dim=1)
        labels = None if told is None else self.embedding(told)
        predicted: Tensor = self.unet(seen.to(self.unet.dtype), timestep, labels, return_dict=False)[0]
        return predicted.float()

    # Sampling

    @torch.no_grad()
    def __call__(
        self,
        *,
        seeds: Sequence[int],
        shares: Tensor | None = None,
        images: Tensor | None = None,
        known: Tensor | None = None,
        masks: Tensor | None = None,
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        size: tuple[int, int] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        precision: Precision | None = None,
    ) -> Pairs:
        """Paint pairs, or what is missing of pairs. What is given is in the result as it is.

        A network that was trained for it (condition `given`) sees what is given. Any other is kept to it: in every step
        the given pixels are where their own noise leads them (as in Lugmayr et al. 2022, RePaint, without its
        repetitions).

        Args:
            seeds: B seeds; a pair depends on its own seed and what is asked and given (to float tolerance).
            shares: what share of the pixels each class shall have, (B, K), NaN where that is left open; see `ask`.
                Needs `asks_classes`.
            images: uint8 (B, 3, H, W).
            known: which of their pixels are given, boolean (B, H, W); None for all.
            masks: class indices (B, H, W), with the ignore index where the class is to be painted.
            num_steps: DDIM steps.
            guidance_scale: by how much what is asked for is exaggerated against not asking; 1 is off.
            size: H and W, where nothing is given; None for those of the training.
            callback: told each step's index and its estimate of the clean pair.
            precision: `bf16` or `auto` evaluate float32 weights in bfloat16. By default that of `place`, or `fp32`.

        Raises:
            TerraSynthError: sizes or numbers do not fit, there are shares and the network can not be asked, or it is a
                2x stage.
        """
        if self.config.condition == "half":
            raise TerraSynthError("a 2x stage enlarges pairs", found="a call of the pipeline", fix="call `upscale`")
        if not math.isfinite(guidance_scale):
            raise TerraSynthError("`guidance_scale` is no number", found=guidance_scale)
        parts = Given(images, known, masks)
        size = self.check(seeds, shares, parts, size)
        device, count = self._execution_device, len(seeds)
        given = self._filled(parts, count, size)
        joint = self.encode(given.images.float() / 255, given.masks)
        condition, kept = self.see(joint, given.known, given.labelled)
        told = None
        if self.config.asks_classes:
            open_ = torch.full((count, self.num_classes), math.nan)
            told = _told((open_ if shares is None else shares).to(device))
        with autocast(device, precision or self._precision):
            latents = sample_ddim(
                self.denoiser(
                    condition if self.config.condition == "given" else None,
                    told,
                    1.0 if shares is None else guidance_scale,
                    kept=(joint, kept) if kept.any() else None,
                ),
                seeded_noise(seeds, joint.shape[1:], device),
                self.scheduler,
                num_steps,
                callback=callback,
            )
        self.maybe_free_model_hooks()
        return given.beside(self._pairs(latents))

    @torch.no_grad()
    def upscale(
        self,
        images: Tensor,
        masks: Tensor,
        *,
        seeds: Sequence[int],
        given: Given | None = None,
        num_steps: int = 50,
        augmentation: float = 0.1,
        callback: Callable[[int, Tensor], None] | None = None,
        precision: Precision | None = None,
    ) -> Pairs:
        """Pairs of twice the size, by a pipeline with the condition `half` (the paper's equation 5).

        Args:
            images: uint8 (B, 3, H, W).
            masks: class indices (B, H, W); unlabelled pixels are painted too.
            seeds: B seeds.
            given: what of the larger pairs is given; it is in the result as it is, and the rest is painted beside it.
            num_steps: DDIM steps.
            augmentation: noise on what is enlarged, as in `enlarge`; up to `max_augmentation` of the training.
            callback: see `__call__`.
            precision: see `__call__`.

        Raises:
            TerraSynthError: it is no 2x stage, or sizes or numbers do not fit.
        """
        if self.config.condition != "half":
            raise TerraSynthError(
                "the pipeline was not trained to enlarge pairs",
                found=f"condition {self.config.condition}",
                expected="half",
                fix="load a 2x stage",
            )
        if not 0 <= augmentation < 1:
            raise TerraSynthError(
                "no such noise on what is enlarged", found=augmentation, expected="from 0 on, less than 1"
            )
        factor = self.multiple // math.gcd(self.multiple, 2)  # what is enlarged is half as large
        height, width = self.check(seeds, None, Given(images, None, masks), None, factor)
        device, joint = self._execution_device, 3 + self.label_codes.channels
        larger, p = (2 * height, 2 * width), self.config.patch_size
        given = given or Given()
        self.check(seeds, None, given, larger)
        filled = self._filled(given, len(seeds), larger)
        kept = self._channels(filled.known, filled.labelled).bool()
        # Two streams of one seed would be the same noise.
        both = seeded_noise(seeds, (2, joint, *larger), device)
        level = torch.full((len(seeds),), augmentation, device=device)
        condition = self.enlarge(images.to(device).float() / 255, masks.to(device), level, both[:, 0])
        with autocast(device, precision or self._precision):
            latents = sample_ddim(
                self.denoiser(
                    condition,
                    level.unsqueeze(1),
                    kept=(self.encode(filled.images.float() / 255, filled.masks), kept) if kept.any() else None,
                ),
                F.pixel_unshuffle(both[:, 1], p),
                self.scheduler,
                num_steps,
                callback=callback,
            )
        self.maybe_free_model_hooks()
        return filled.beside(self._pairs(latents))

    def denoiser(
        self,
        condition: Tensor | None = None,
        told: Tensor | None = None,
        guidance_scale: float = 1.0,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Epsilon:
        """What is predicted of noisy pairs.

        Args:
            condition: what the network sees beside them, (B, c, h, w).
            told: what it is told, (B, F); all zero is nothing.
            guidance_scale: see `__call__`.
            kept: a joint code, and which of its numbers are given, both (B, c, h, w). There the prediction is the one
                that leads to the code itself, so that a sampler goes the path of its noise.
        """

        def predict(x: Tensor, timestep: Tensor, uses: dict[str, Tensor]) -> Tensor:
            seen = None if condition is None else condition.repeat(len(x) // len(condition), 1, 1, 1)
            if told is None:
                return self._evaluate(x, timestep, seen, None)
            return self._evaluate(x, timestep, seen, condition_or_null(uses["told"], told, torch.zeros_like(told[:1])))

        guided = guided_velocity(predict, {"told": guidance_scale})
        if kept is None:
            return guided
        x_0, given = kept
        alpha_bars = self.scheduler.alphas_cumprod.to(x_0)

        def keep(x: Tensor, timestep: Tensor) -> Tensor:
            alpha_bar = alpha_bars[timestep].view(-1, 1, 1, 1)
            epsilon = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
            known = {
                "sample": x_0,
                "epsilon": epsilon,
                "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0,
            }[self.scheduler.config.prediction_type]
            return torch.where(given, known, guided(x, timestep))

        return keep

    def _pairs(self, latents: Tensor) -> Pairs:
        images, masks = self.decode(latents)
        if not latents.isfinite().all():
            raise paints_no_numbers()
        return Pairs((images * 255).round().byte(), masks)

    def _filled(self, given: Given, count: int, size: tuple[int, int]) -> _Filled:
        """The same of `count` pairs, with something in all places, on the device."""
        images, known, masks = given
        if images is None:
            images, known = torch.zeros(count, 3, *size, dtype=torch.uint8), torch.zeros(count, *size, dtype=torch.bool)
        known = torch.ones(count, *size, dtype=torch.bool) if known is None else known
        masks = torch.full((count, *size), self.schema.ignore_index) if masks is None else masks.long()
        images, known, masks = (each.to(self._execution_device) for each in (images, known, masks))
        return _Filled(images, known, masks, masks != self.schema.ignore_index)

    def check(
        self,
        seeds: Sequence[int],
        shares: Tensor | None,
        given: Given,
        size: tuple[int, int] | None,
        factor: int | None = None,
    ) -> tuple[int, int]:
        """The size of what is painted, by default a multiple of `multiple`.

        Raises:
            TerraSynthError: something does not fit, see `__call__`.
        """
        images, known, masks = given
        tensors = {"images": images, "known": known, "masks": masks}
        sizes = {name: tuple(tensor.shape[-2:]) for name, tensor in tensors.items() if tensor is not None}
        height, width = size or next(iter(sizes.values()), (self.config.image_size,) * 2)
        factor = factor or self.multiple
        if not len(seeds):
            raise TerraSynthError("no seeds, so nothing to paint", expected="one for each pair")
        if height % factor or width % factor or min(height, width) < 1:
            raise TerraSynthError(
                "the size does not divide into the levels of the network",
                found=f"{height} x {width} pixels",
                expected=f"multiples of {factor}",
            )
        expected = {
            "images": (len(seeds), 3, height, width),
            "known": (len(seeds), height, width),
            "masks": (len(seeds), height, width),
        }
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != expected[name]:
                raise TerraSynthError(
                    f"`{name}` does not fit the seeds, or what else is given",
                    found=tuple(tensor.shape),
                    expected=expected[name],
                )
        if images is not None and images.dtype != torch.uint8:
            raise TerraSynthError("the images are no bytes", found=images.dtype, expected="uint8")
        if known is not None and known.dtype != torch.bool:
            raise TerraSynthError("`known` says of each pixel yes or no", found=known.dtype, expected="bool")
        if masks is not None and masks.is_floating_point():
            raise TerraSynthError("the masks are no class indices", found=masks.dtype, expected="whole numbers")
        if known is not None and images is None:
            raise TerraSynthError("`known` says which pixels of `images` are given, and there are none")
        if masks is not None:
            foreign = (masks != self.schema.ignore_index) & ((masks < 0) | (masks >= self.num_classes))
            if foreign.any():
                raise TerraSynthError(
                    "the masks have classes that the model does not know",
                    found=f"class {int(masks[foreign].max())}",
                    expected=f"0 to {self.num_classes - 1}, or {self.schema.ignore_index} where it is to be painted",
                )
        if shares is not None and not self.config.asks_classes:
            raise TerraSynthError(
                "the model can not be asked for classes",
                found="a model that was trained without",
                expected="asks_classes",
                fix="leave out `shares`, or train one",
            )
        if shares is not None and tuple(shares.shape) != (len(seeds), self.num_classes):
            raise TerraSynthError(
                "the shares do not fit seeds and classes",
                found=tuple(shares.shape),
                expected=(len(seeds), self.num_classes),
            )
        if shares is not None and ((shares < 0).any() or (shares.nansum(1) > 1 + 1e-6).any()):
            raise TerraSynthError(
                "these are no shares of the pixels", found=shares.tolist(), expected="from 0 on, with a sum up to 1"
            )
        return height, width

    # Construction

    @classmethod
    def from_scratch(
        cls,
        schema: LabelSchema,
        *,
        codes: CodeKind = "bits",
        prediction_type: Prediction = "sample",
        patch_size: int = 4,
        widths: Sequence[int] = (56, 96, 128),
        layers: int = 1,
        attention: Sequence[int] = (8, 4),
        asks_classes: bool = True,
        condition: Condition = "none",
        image_size: int = 64,
        seed: int = 0,
    ) -> Self:
        """An untrained pipeline of any size; by default one that two processor cores can train.

        Args:
            schema: the classes.
            codes: see `LabelCodes`; `onehot` is an ablation of the paper.
            prediction_type: what the U-Net predicts, see `sampling.diffusion`. The paper's is `epsilon`; with patches
                the noise has more numbers than the network's channels can hold, the clean pair has not.
            patch_size: see the class.
            widths: channels of every level, from the outermost inwards.
            layers: residual blocks of a level.
            attention: sides of the feature maps that have self-attention.
            asks_classes: see the class; without effect in a 2x stage.
            condition: see the class.
            image_size: side of the images it will be trained on.
            seed: of the initial weights.

        Raises:
            TerraSynthError: there are no such codes, predictions, conditions or sizes.
        """
        check_choice("condition", condition, Condition)
        if patch_size < 1 or min(widths, default=0) < 1:
            raise TerraSynthError(
                "no U-Net is so small",
                found=f"patch_size {patch_size}, widths {tuple(widths)}",
                expected="a patch_size from 1 on, and one width or more, all from 1 on",
            )
        label_codes = LabelCodes(schema.num_classes, codes)
        joint = 3 + label_codes.channels
        attends = [image_size // patch_size // 2**level in attention for level in range(len(widths))]
        asks = asks_classes and condition != "half"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=image_size // patch_size,
                in_channels=patch_size**2 * (joint + condition_channels(condition, joint)),
                out_channels=patch_size**2 * joint,
                down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
                up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
                block_out_channels=tuple(widths),
                layers_per_block=layers,
                norm_num_groups=math.gcd(32, *widths),
                attention_head_dim=math.gcd(64, *widths),
                resnet_time_scale_shift="scale_shift",
            )
            return cls(
                unet=unet,
                scheduler=DDIMScheduler(**_SCHEDULE),
                label_codes=label_codes,
                label_schema=schema.to_dict(),
                asks_classes=asks,
                condition=condition,
                prediction_type=prediction_type,
                patch_size=patch_size,
                image_size=image_size,
            )

    @classmethod
    def from_unet(
        cls,
        folder: str | Path,
        schema: LabelSchema,
        *,
        codes: CodeKind = "bits",
        prediction_type: Prediction | None = None,
        asks_classes: bool = False,
    ) -> Self:
        """Weights of a diffusers `UNet2DModel` that denoises RGB and codes, in that order, within ±1.

        Args:
            folder: of the U-Net alone, or a pipeline's folder with `unet` and `scheduler`, as `DDPMPipeline` saves it.
                Without a scheduler the noise schedule is the cosine's.
            schema: the classes.
            codes: see the class.
            prediction_type: None for what the scheduler says.
            asks_classes: see the class; it has to be trained then.

        Raises:
            TerraSynthError: there are no such weights, their channels are not those of RGB and codes, or the U-Net is
                told classes of its own.
        """
        folder = Path(folder)
        subfolder = {"subfolder": "unet"} if (folder / "unet").is_dir() else {}
        with loading(folder, "a UNet2DModel of diffusers, or a pipeline with one"):
            unet = UNet2DModel.from_pretrained(folder, use_safetensors=True, **subfolder)
            scheduler = DDIMScheduler(**_SCHEDULE)
            if (folder / "scheduler").is_dir():
                scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        pipeline = cls(
            unet=unet,
            scheduler=scheduler,
            label_schema=schema.to_dict(),
            codes=codes,
            asks_classes=asks_classes,
            prediction_type=prediction_type,
            image_size=unet.config.sample_size or 128,
        )
        check_whole(pipeline, folder)
        return pipeline


def condition_channels(condition: Condition, joint: int) -> int:
    """Numbers a pixel that a network sees beside the noisy pair, which has `joint`."""
    return {"none": 0, "given": joint + _FLAGS, "half": joint}[condition]


def check_shares(shares: Mapping[str, float], schema: LabelSchema) -> None:
    """Refuse what can not be asked for: shares of the pixels by class name.

    Raises:
        TerraSynthError: there is no such class, or the shares sum to more than 1.
    """
    unknown = sorted(set(shares) - set(schema.names))
    if unknown:
        raise TerraSynthError("no such class to ask for", found=unknown[0], expected=", ".join(schema.names))
    if min(shares.values(), default=0) < 0 or sum(shares.values()) > 1 + 1e-6:
        raise TerraSynthError("these are no shares of the pixels", found=dict(shares), expected="a sum up to 1")


def class_shares(masks: Tensor, num_classes: int) -> Tensor:
    """What share of the labelled pixels of each mask (B, H, W) has each class, (B, K); NaN where none is labelled."""
    masks = masks.long()
    labelled = (masks >= 0) & (masks < num_classes)
    counts = torch.zeros(len(masks), num_classes, device=masks.device)
    counts.scatter_add_(1, masks.where(labelled, 0).flatten(1), labelled.flatten(1).float())
    return counts / counts.sum(1, keepdim=True)


def halve(images: Tensor, masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Pairs of half the size: images by area, and of four pixels the class that most of the labelled ones have.

    Args:
        images: float (B, 3, H, W).
        masks: (B, H, W); other values than 0 to K − 1 are unlabelled, and the largest stands where all four are.
        num_classes: K.
    """
    masks = masks.long()
    labelled = (masks >= 0) & (masks < num_classes)
    votes = F.one_hot(masks.where(labelled, num_classes), num_classes + 1).movedim(-1, 1).float()
    votes = F.avg_pool2d(votes[:, :num_classes], 2)
    unlabelled = F.max_pool2d(masks[:, None].float(), 2)[:, 0].long()
    return F.avg_pool2d(images, 2), torch.where(votes.any(1), votes.argmax(1), unlabelled)


def _told(shares: Tensor) -> Tensor:
    """Shares (B, K), NaN where open, as numbers (B, 2 K): whether a class is told, and the root of its share.

    The root tells one percent from none better than half from all, and rare classes are what is asked for.
    """
    return torch.cat([shares.isfinite().float(), shares.nan_to_num(0).sqrt()], dim=1)


def _hidden(num_classes: int, dropout: float, generator: torch.Generator) -> Tensor:
    """Which classes a training sample is told nothing of, boolean (K,): none to all, and all with `dropout` besides."""
    u, share, *each = torch.rand(2 + num_classes, generator=generator)
    return (u < dropout) | (torch.stack(each) < share)


def _given(size: Sequence[int], dropout: float, generator: torch.Generator) -> Tensor:
    """Which pixels of image and mask a training sample is given, boolean (2, H, W).

    Of each: nothing, everything, or what lies inside or outside of a rectangle; not everything of both.
    """
    u, *corners = torch.rand(5, generator=generator).tolist()
    kinds = torch.randint(4, (2,), generator=generator)
    if u < dropout or kinds.tolist() == [1, 1]:
        return torch.zeros(2, *size, dtype=torch.bool)
    inside = torch.zeros(2, *size, dtype=torch.bool)
    (top, bottom), (left, right) = (
        sorted(round(c * side) for c in pair) for pair, side in zip((corners[:2], corners[2:]), size, strict=True)
    )
    inside[:, top:bottom, left:right] = True
    kind = kinds.view(2, 1, 1)
    return (kind == 1) | ((kind == 2) & inside) | ((kind == 3) & ~inside)


def _listening(unet: UNet2DModel) -> UNet2DModel:
    """The same U-Net, which adds what it is told to its time embedding."""
    if unet.config.class_embed_type == "identity":
        return unet
    with torch.random.fork_rng(devices=[]):
        listening = UNet2DModel.from_config(unet.config, class_embed_type="identity")
    listening.load_state_dict(unet.state_dict())
    return nn.Module.to(listening, unet.device, unet.dtype)


def _check_channels(unet: UNet2DModel, joint: int, condition: int) -> None:
    found, expected = (unet.config.in_channels, unet.config.out_channels), (joint + condition, joint)
    if found != expected:
        raise TerraSynthError(
            "the channels of the U-Net are not those of image and label codes",
            path=unet.config.get("_name_or_path") or None,
            found=f"{found[0]} in, {found[1]} out",
            expected=f"{expected[0]} in, {expected[1]} out",
            fix="give the label schema, the codes and the patch size that it was trained with",
        )
    if unet.config.num_class_embeds is not None or unet.config.class_embed_type not in (None, "identity"):
        raise TerraSynthError(
            "the U-Net is told classes of images",
            path=unet.config.get("_name_or_path") or None,
            found=f"{unet.config.num_class_embeds or unet.config.class_embed_type}",
            expected="a U-Net that is told a timestep alone",
        )
