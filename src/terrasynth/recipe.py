"""Recipes: everything a run depends on, typed, in YAML, every default explained.

A recipe holds no logic. `terrasynth recipe NAME` prints one with these descriptions; any value can be set from the
command line as `--set generator.train.steps=2000`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

__all__ = [
    "ArmConfig",
    "AutoencoderConfig",
    "CurationConfig",
    "DataConfig",
    "GeneratorConfig",
    "PairsConfig",
    "PairsSamplingConfig",
    "Recipe",
    "RefinerConfig",
    "RoughConfig",
    "SamplingConfig",
    "SearchConfig",
    "SegmentorConfig",
    "SourceConfig",
    "SplitConfig",
    "SteeringConfig",
    "StudyConfig",
    "TrainConfig",
    "UpscalerConfig",
    "WorldConfig",
]

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "auto"]
Mix = Literal["none", "cutout", "cutmix", "mosaic", "classmix", "copy-paste", "plausible-copy-paste"]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic takes `true` for 1: `generator.layouts=true` would leave no sample to learn images from.
        if isinstance(value, bool) and info.field_name is not None:
            wanted = cls.model_fields[info.field_name].annotation
            types = {wanted, *get_args(wanted)}
            types |= {getattr(each, "__origin__", None) for each in types}  # of Annotated
            if bool not in types and types & {int, float}:
                raise ValueError(f"a number is wanted, not {str(value).lower()}")
        return value


class WorldConfig(_Config):
    """The embedded sample: procedural scenes with exact masks (`kind: world`)."""

    region: Literal["temperate", "arid", "tropical"] = "temperate"
    """Which regional look the scenes have."""
    gsd: Annotated[float, Field(ge=0.1, le=10)] = 0.5
    """Ground sampling distance in metres per pixel, 0.1 to 10."""
    train: Positive = 16
    """Labelled training tiles."""
    validation: Positive = 16
    """Validation tiles: model selection only."""
    test: Positive = 64
    """Test tiles: evaluated once per finished cell, and audited; nothing learns from them or is chosen by them."""
    seed: NonNegative = 0
    """Which world; every tile derives from this seed, its split and its index."""


class SplitConfig(_Config):
    """Where the tiles of one split are."""

    folder: str
    """What `{split}` in `images` and `masks` stands for."""
    root: Path | None = None
    """Folder under `data.root` that this split is in, with its list: tiles of another place may lie apart."""
    list: str | None = None
    """Text file (beside `images`) with one tile name a line, without suffix; null takes every image of the folder."""


class SourceConfig(_Config):
    """Images without labels, of any size, cut into windows."""

    images: str
    """Which files: a pattern under `root`, as `images/train/*.jpg`."""
    windows: Positive = 8
    """Windows cut from every image."""
    scale: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] | None = (1.4, 2.0)
    """Side of a window before it is shrunk to `image_size`, in multiples of it: from, to. Null takes the whole image,
    or the square in its middle."""
    caption: str = "a satellite image"
    """Caption of the windows; with `generator.pseudo_labels`, `data.caption` takes its place."""

    @model_validator(mode="after")
    def _ordered(self) -> SourceConfig:
        if self.scale is None:
            if self.windows != 1:
                raise ValueError(f"scale: null takes whole images, so windows must be 1, not {self.windows}")
        elif self.scale[0] > self.scale[1]:
            raise ValueError(
                f"scale must go from the smaller to the larger, not from {self.scale[0]} to {self.scale[1]}"
            )
        return self


class DataConfig(_Config):
    """The tiles."""

    kind: Literal["world", "folder", "unlabelled"] = "world"
    """`world` renders procedural scenes; `folder` reads image and mask files; `unlabelled` is for base models: windows
    of unlabelled images under pseudo-masks, and the scenes of `worlds`."""
    root: Path | None = None
    """Folder of the tiles (`kind: folder` and `unlabelled`). `--data DIR` sets it."""
    unlabelled: tuple[SourceConfig, ...] = ()
    """Unlabelled images. With `kind: folder` the generator sees them beside the labelled tiles, under a wholly
    unlabelled mask or what the study's teachers read in them (`generator.pseudo_labels`); segmentors are trained on
    them only in arms that say so (`pseudo_labels`)."""
    worlds: tuple[WorldConfig, ...] = ()
    """Procedural scenes that a base model learns from (`kind: unlabelled`); the `train` scenes of each."""
    clusters: Annotated[int, Field(ge=2, le=64)] = 8
    """Classes of the pseudo-masks of unlabelled images (`kind: unlabelled`)."""
    images: str = "images/{split}"
    """Folder of the images under `root`."""
    masks: str = "masks/{split}"
    """Folder of the masks under `root`; image and mask share their name, the suffix may differ."""
    train: SplitConfig = SplitConfig(folder="train", list="train.txt")
    """Training tiles: the generator, the steering segmentor and every arm see exactly these."""
    validation: SplitConfig = SplitConfig(folder="val", list="val.txt")
    """Validation tiles: model selection only."""
    test: SplitConfig = SplitConfig(folder="test", list="test.txt")
    """Test tiles: evaluated once per finished cell, and audited; nothing learns from them or is chosen by them."""
    label_schema: Path | None = None
    """YAML file of class names, colours and ignore index (`kind: folder`), relative to the recipe, then to `root`; or
    the name of a packaged one (`loveda`, `potsdam`, ...)."""
    mask_coding: Literal["auto", "index", "color"] = "auto"
    """How mask files are coded: `index` (pixel value = class), `color` (palette or RGB colours of the schema);
    `auto` takes the one that fits and refuses where both would."""
    image_size: Annotated[int, Field(gt=0, le=8192)] = 128
    """Side of the square tiles in pixels, everywhere downstream."""
    fit: Literal["resize", "crop"] = "resize"
    """How larger tiles become `image_size`: shrink the whole tile, or cut its centre out."""
    skip_bad: bool = False
    """Go on without tiles and images that can not be used, and list them; otherwise one of them ends the run.
    `--skip-bad` sets it."""
    caption: str = "a satellite image of {classes}"
    """Caption of a tile; `{classes}` becomes the names of the classes present."""
    world: WorldConfig = WorldConfig()
    """Settings of `kind: world`."""


#: What painted tiles there are (`ArmConfig.kind`).
KINDS = (
    *("plain", "steered", "plain-like", "steered-like", "pairs"),
    *("plain-on-pairs", "steered-on-pairs", "plain-like-on-pairs", "steered-like-on-pairs"),
)
#: Settings of a training that change no weight: it may go on with others.
HARMLESS = {"checkpoint_every", "log_every", "workers", "gradient_checkpointing", "offload_optimizer"}


class TrainConfig(_Config):
    """One training run of the single training loop, for a generator or a segmentor."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive = 16
    """Samples computed together in one process, at most."""
    accumulate: Positive = 1
    """Micro-batches per optimiser step: `batch_size` x `accumulate` samples, however many processes share them."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate (AdamW)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: cosine decay to zero at `steps`, or constant."""
    warmup_steps: NonNegative = 50
    """Linear warm-up; fewer than `steps`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW weight decay, on matrices only (not on biases, norms and gates)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW betas."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient norm clipping; null switches it off."""
    precision: Precision = "fp32"
    """`bf16` computes in bfloat16 over fp32 master weights; `auto` does so where the processor has instructions for
    it, which makes matrix products several times faster."""
    ema_decay: Decay = 0.0
    """Decay of the exponential moving average of the weights, warmed up as (1 + n) / (10 + n); 0 switches it off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_optimizer: bool = False
    """Keep AdamW's moments in main memory and update the weights there: twice the trained weights less on the card,
    for a slower update."""
    workers: NonNegative = 0
    """Data-loading processes."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints; one more is written at the end."""
    evaluate_every: Positive = 250
    """Steps between validations (segmentor) or previews (generator)."""
    log_every: Positive = 10
    """Steps between lines of `log.jsonl`."""


class AutoencoderConfig(_Config):
    """The autoencoder of a generator from scratch: principal components of pixel patches, fitted in closed form."""

    patch_size: Positive = 4
    """Side of the patches: the downsampling factor of the latents."""
    channels: Positive = 16
    """Principal components kept per patch (at most 3 x patch_size^2): the latent channels."""
    whiten: Fraction = 0.5
    """0 keeps each component's variance, 1 makes all equal; between them, noise hides fine detail first."""
    refiner_width: NonNegative = 0
    """Channels of the convolutions that correct what the components decode to; 0 for none."""
    refiner_blocks: NonNegative = 4
    """Residual blocks of the correction."""
    refiner_noise: Annotated[float, Field(ge=0)] = 0.3
    """The correction learns to decode latents with noise of up to this deviation, as a generator leaves it."""
    train: TrainConfig | None = None
    """Training of the correction."""

    @model_validator(mode="after")
    def _enough_components(self) -> AutoencoderConfig:
        if bool(self.refiner_width) != (self.train is not None):
            raise ValueError("refiner_width and train belong together: both, or neither")
        if self.channels > 3 * self.patch_size**2:
            raise ValueError(
                f"channels ({self.channels}) must be at most 3 x patch_size^2 ({3 * self.patch_size**2}), the numbers "
                "in a patch"
            )
        return self


class UNetConfig(_Config):
    """Sizes of TISynth's U-Net from scratch; `generator.heads` are its attention heads."""

    widths: Annotated[tuple[Positive, ...], Field(min_length=2)] = (64, 128, 256, 256)
    """Channels of every level, from the outermost inwards; all but the last have transformers."""
    layers: Positive = 2
    """Residual blocks of a level."""
    timestep_free: bool = False
    """The encoders of mask and reference see neither the noisy image nor the timestep, so their features are computed
    once an image; published encoders see both. Holds with Stable Diffusion as a `base` too."""


class GeneratorConfig(_Config):
    """What paints, and its training."""

    system: Literal["todsynth", "tisynth"] = "todsynth"
    """`todsynth`, a text-image-mask MM-DiT trained by flow matching (Yang et al. 2025); or `tisynth`, a diffusion U-Net
    that looks at a mask and at a reference image (Dong et al. 2025)."""
    base: str | None = None
    """Start from this pipeline: `terrasynth-tiny`, which comes with the package; Stable Diffusion 3 / 3.5 (TODSynth) or
    1.5 (TISynth) as a hub name or folder; or a folder that TerraSynth saved. Null trains from scratch with the sizes
    below."""
    width: Positive = 192
    """Width of the token streams (TODSynth from scratch), a multiple of `heads` and of 4."""
    heads: Positive = 6
    """Attention heads (from scratch)."""
    blocks: Positive = 6
    """Transformer blocks (TODSynth from scratch)."""
    patch_size: Positive = 2
    """Latent pixels per token side (TODSynth from scratch)."""
    unet: UNetConfig = UNetConfig()
    """Sizes of the U-Net (TISynth from scratch)."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """Autoencoder (from scratch)."""
    mask_coding: Literal["onehot", "bits", "grey", "ids"] = "onehot"
    """How a mask enters: `onehot` or `bits` without loss; `grey` levels, with TODSynth through the autoencoder, after
    the published idea; `ids`, class indices as grey levels, as TISynth is published."""
    control: Literal["unified", "siamese", "adapter", "controlnet"] = "unified"
    """How the mask reaches the image (from scratch; a `base` keeps its own): `unified` attention of image, text and
    mask, the published choice; or what the paper compares it with: `siamese`, one attention for text and one for the
    mask; `adapter`, cross-attention to features of the mask alone; `controlnet`, a control stream that is added."""
    mask_init: Literal["copy", "random"] = "copy"
    """With a `base` that has no mask branch: start it as a copy of the image branch (with a gate that makes step 0
    equal the base model), or at random."""
    trainable: Literal["all", "image+mask", "mask", "lora"] = "all"
    """Which branches train: all three; image and mask (as published); the mask branch alone (with TISynth, the branches
    of mask and reference); the mask branch with low-rank adapters on the image branch (`terrasynth[peft]`). Gates of
    references train with any."""
    lora_rank: Positive = 16
    """Rank of the adapters (`trainable: lora`)."""
    text_dropout: Fraction = 0.1
    """How often the prompt is replaced by the empty one, so that text guidance works."""
    mask_dropout: Fraction = 0.1
    """How often the mask is replaced by an unlabelled one, so that mask guidance works."""
    reference: Literal["view", "augmented", "recolored"] | None = None
    """Learn to paint in the look of a reference image. In training that is another `view` of the same tile (flipped,
    turned, zoomed); the tile `augmented` as published (shifted, scaled, turned by up to 18 degrees; Dong et al. 2025,
    "TISynth"); or that with other brightness, contrast, saturation and hue as well (`recolored`)."""
    reference_dropout: Fraction = 0.1
    """How often the reference is left out, so that guidance by it works, and painting without one."""
    layouts: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How often a labelled sample teaches what layouts there are instead of the image under one (TODSynth, `onehot`
    masks). Above 0 the generator paints masks too: `terrasynth generate --pairs`."""
    density: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    """Density of the training timesteps (Esser et al. 2024, section 3.1)."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """Timestep shift of the flow, in training and sampling: sigma = shift s / (1 + (shift - 1) s). With a `base`, the
    base's own is kept."""
    views: Positive = 32
    """Fixed augmentations (flips, quarter turns, zooms) under which every tile is encoded once."""
    labelled_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of labelled tiles in each batch where `data.unlabelled` names more images."""
    pseudo_labels: Fraction | None = None
    """Give the windows of `data.unlabelled` the classes that the teachers (`study.teacher`) read in them with at least
    this probability (after You et al. 2023, "DPT"); null leaves them unlabelled."""
    save_precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the saved weights; `fp16` halves the files and is enough to start from."""
    seed: NonNegative = 0
    """Seed of initialisation, data order, timesteps and noise."""
    train: TrainConfig = TrainConfig(steps=4000, batch_size=16, ema_decay=0.999)
    """The training run."""

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, JSON-able; what belongs to another choice is not among it."""
        idle: dict[str, Any] = {"train": HARMLESS, "autoencoder": {"train": HARMLESS}}
        if self.system == "todsynth":
            idle |= {"system": True, "unet": True}
        if self.reference is None:
            idle |= {"reference": True, "reference_dropout": True}
        if not self.layouts:
            idle |= {"layouts": True}
        return self.model_dump(mode="json", exclude=idle)

    @model_validator(mode="after")
    def _sizes_fit(self) -> GeneratorConfig:
        # The 4 is the position embedding's: sine and cosine of rows and columns.
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads}) and of 4")
        if self.control == "controlnet" and self.blocks < 2:
            raise ValueError("control: controlnet needs at least 2 blocks: what it adds goes between them")
        if self.system == "tisynth":
            if self.reference is None:
                raise ValueError("system: tisynth needs a reference: augmented, as published, or view")
            if self.trainable not in ("all", "mask"):
                raise ValueError(f"system: tisynth trains all or mask, not {self.trainable}")
            if odd := [width for width in self.unet.widths if self.base is None and width % self.heads]:
                raise ValueError(f"unet.widths ({odd[0]}) must be multiples of heads ({self.heads})")
        elif self.mask_coding == "ids":
            raise ValueError("mask_coding: ids is that of system: tisynth")
        if self.layouts:
            if self.system == "tisynth":
                raise ValueError("layouts are painted by system: todsynth")
            if self.mask_coding != "onehot":
                raise ValueError(f"layouts need mask_coding: onehot, not {self.mask_coding}")
            if self.base is None and (self.control not in ("unified", "siamese") or self.blocks < 2):
                raise ValueError("layouts need control: unified or siamese, and at least 2 blocks")
        if self.reference == "view" and self.views < 2:
            raise ValueError("reference: view needs another view of each tile, so views must be at least 2")
        return self


class SamplingConfig(_Config):
    """Sampling of the flow."""

    steps: Positive = 23
    """Sampling steps (the published number)."""
    solver: Literal["euler", "adams"] = "euler"
    """`euler` as published, or `adams` (Adams-Bashforth of second order), as good in fewer steps of the same cost."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Timestep shift in sampling alone; smaller than the model's own (null) spends more of the steps on fine detail."""
    text_scale: Annotated[float, Field(ge=0)] = 1.0
    """Guidance scale of the prompt; 1 is off, anything else needs the dropouts of the prompt and of what comes in after
    it: with TODSynth reference and mask, with TISynth nothing."""
    mask_scale: Annotated[float, Field(ge=0)] = 1.5
    """Guidance scale of the mask; 1 is off, anything else needs `mask_dropout`, and with TISynth, where the mask comes
    first, the dropouts of reference and prompt."""
    reference_scale: Annotated[float, Field(ge=0)] = 1.0
    """Guidance scale of the reference, where there is one; 1 is off, anything else needs `reference_dropout`."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Noise levels between which guidance applies. At high noise it makes dark classes darker and bright ones brighter
    than they are; `[0.2, 0.8]` keeps the colours, and spares evaluations (Kynkäänniemi et al. 2024)."""
    batch_size: Positive = 16
    """Images painted together; the result does not depend on it."""
    precision: Precision = "fp32"
    """As in training: `bf16`, or `auto` for bf16 where the processor has instructions for it."""

    @model_validator(mode="after")
    def _ordered(self) -> SamplingConfig:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"guidance_interval must go from the smaller to the larger, not from {low} to {high}")
        return self


class SteeringConfig(_Config):
    """Control-rectify flow matching (CRFM): the segmentor steers the velocity in the first steps."""

    steps: NonNegative = 4
    """K: how many steps are rectified."""
    start: NonNegative = 0
    """How many steps are left alone before these; 0 rectifies the first K, as published."""
    strength: Annotated[float, Field(ge=0)] = 0.1
    """alpha: the largest step along the gradient. With `normalise: velocity` it is relative to the velocity's norm."""
    schedule: Literal["constant", "increasing", "decreasing"] = "decreasing"
    """alpha over the steps i of N: alpha, alpha (i + 1) / N, or alpha (1 - (i + 1) / N)."""
    normalise: Literal["none", "unit", "velocity", "x0"] = "velocity"
    """Per image: the bare gradient; the gradient over its norm (as published, "l2_norm"); the same times the norm of
    the velocity, so that alpha means the same at every size; or scaled so that the clean estimate moves by alpha of its
    norm."""
    blend: bool = False
    """Multiply the velocity by 1 - alpha first (published as "is_synth")."""
    repeats: Positive = 1
    """Rectifications per step."""
    wrong_pixels_only: bool = True
    """Only pixels that the segmentor gets wrong enter the loss."""
    clamp: Annotated[float, Field(gt=0)] | None = None
    """Clip the whole velocity to plus or minus this; the published code always clips at 1, which distorts it."""


class SegmentorConfig(_Config):
    """The downstream segmentor."""

    architecture: str = "unet"
    """A decoder of segmentation_models_pytorch (`unet`, `fpn`, `deeplabv3plus`, `segformer`, ...), or
    `transformers/segformer`, `transformers/upernet`."""
    encoder: str = "resnet18"
    """Encoder name of segmentation_models_pytorch (`tu-NAME` for any of timm), or for transformers a hub name, a folder
    or `tiny`."""
    weights: str | None = None
    """Pretrained encoder weights (`imagenet`, ...; needs a hub); null trains from scratch."""
    options: dict[str, object] = {}
    """Further arguments of the architecture's constructor."""
    dice: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the Dice loss beside cross-entropy in training: rare classes, as roads, are learned sooner."""
    train: TrainConfig = TrainConfig(steps=1000, batch_size=8, weight_decay=0.05, clip_norm=None)
    """The training run of one cell."""


class RoughConfig(_Config):
    """The rough maps that a refiner learns to mend."""

    folds: Annotated[int, Field(ge=2)] = 4
    """The training tiles are divided into so many parts; what `segmentor` reads in each, trained on the others, are
    the rough maps. On tiles that it learned from it would be too good."""
    invented: Fraction = 0.25
    """How often the rough map is instead the true one with moved boundaries. Never with `noise` 0: it would be perfect.
    """
    noise: Annotated[float, Field(ge=0)] = 6.0
    """How far these are moved at most, in pixels; and every other one that a segmentor read, by a quarter of it."""


class RefinerConfig(_Config):
    """What sharpens the boundaries of class maps by diffusion (IDGBR, Wang et al. 2026), and its training."""

    base: str | None = None
    """Start from this: Stable Diffusion 1.5 as a hub name or folder, or a refiner that TerraSynth saved, of any classes
    and with these `conditions`. Null trains from scratch, in pixels, with the sizes below."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=2)] = (48, 96, 128)
    """Channels of every level of the U-Net, from the outermost inwards (from scratch)."""
    patch_size: Positive = 4
    """Side of the squares of pixels that make one of the network's (from scratch)."""
    codes: Literal["bits", "onehot", "learned"] = "bits"
    """How a class map is written in numbers: `bits` of the class index, one channel a class, or three learned numbers
    as published."""
    each_class: bool = False
    """Learn one class against the rest, drawn anew for every tile: the refiner then works on maps of any classes, at
    the cost of one evaluation for each."""
    conditions: Literal["joint", "separate"] = "joint"
    """Image and rough map enter one encoder together, or one after the other, as published."""
    sees_rough: bool = True
    """Whether the rough map is a condition; without, the image alone is (an ablation of the paper)."""
    snap_rounds: NonNegative = 16
    """In how many rounds rough maps first follow the colours of the image, by a vote of similar pixels nearby: it is
    from there that the refiner begins. 0 takes them as they are, as published. A refiner as `base` has its own."""
    prediction_type: Literal["sample", "epsilon", "v_prediction"] | None = None
    """What is predicted: the clean map, the noise, or what lies between. Null: what the base predicts (Stable
    Diffusion the noise), and from scratch the clean map, which needs the fewest steps."""
    alignment: str | None = None
    """A backbone of timm that features are aligned to: a name (any `vit_*_dinov2*` as published; needs a hub) or
    `local-dir:FOLDER`; null does without."""
    alignment_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of that loss; 0.5 is published."""
    alignment_steps: Positive | None = None
    """In how many steps it is computed, the first ones; null for all. Published are 200 of 80,000."""
    timesteps: Literal["uniform", "cubic"] = "uniform"
    """How noise levels are drawn in training: alike, or most of them high, as published."""
    condition_dropout: Fraction = 0.1
    """How often image and rough map are left out, so that guidance works."""
    rough_start: Fraction | None = None
    """How often the noisy map is made of the rough one, so that sampling may begin there (`strength` below 1). Null:
    0.5, or 0 where it can not be: if something else than the clean map is predicted, or `sees_rough` is off."""
    crop: Positive | None = 128
    """Side of the squares cut from each tile; null takes all of it."""
    rough: RoughConfig = RoughConfig()
    """What it learns to mend."""
    seed: NonNegative = 0
    """Seed of initialisation, data order, rough maps and noise."""
    train: TrainConfig = TrainConfig(steps=2000, batch_size=8, learning_rate=7e-4, ema_decay=0.999)
    """The training run."""

    @model_validator(mode="after")
    def _can_be_done(self) -> RefinerConfig:
        faults = []
        if self.rough_start and not self.sees_rough:
            faults.append(
                f"rough_start ({self.rough_start:g}) shows the rough map that sees_rough: false hides: set it to 0 or "
                "null"
            )
        if self.rough_start and self.prediction_type in ("epsilon", "v_prediction"):
            faults.append(
                f"rough_start ({self.rough_start:g}) needs prediction_type: sample, not {self.prediction_type}: set it "
                "to 0 or null"
            )
        if self.base is not None:
            sizes = ("widths", "patch_size")
            changed = [name for name in sizes if getattr(self, name) != type(self).model_fields[name].default]
            faults += [f"{name} is of refiners from scratch, and base has its own: leave it out" for name in changed]
        elif self.crop is not None and self.crop % self.patch_size:
            faults.append(f"crop ({self.crop}) must be a multiple of patch_size ({self.patch_size})")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, JSON-able."""
        return self.model_dump(mode="json", exclude={"train": HARMLESS})


class PairsSamplingConfig(_Config):
    """How pairs are painted."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """DDIM steps, of each stage; the model knows 1000 noise levels."""
    shares: dict[str, Fraction] = {}
    """What share of the pixels of every painting is asked for, by class name (`{road: 0.2}`): the way to rare classes.
    All others are left open."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """By how much what is asked for (`shares`) is exaggerated; 1 is off."""
    batch_size: Positive = 16
    """Pairs painted together; the result does not depend on it."""
    precision: Precision = "fp32"
    """As in training: `bf16`, or `auto` for bf16 where the processor has instructions for it."""

    @model_validator(mode="after")
    def _sum_to_one_at_most(self) -> PairsSamplingConfig:
        if sum(self.shares.values()) > 1 + 1e-9:
            raise ValueError(f"shares sum to {sum(self.shares.values()):g}, more than 1")
        if self.guidance_scale != 1 and not self.shares:
            raise ValueError("guidance_scale exaggerates what is asked for, and nothing is: name shares")
        return self


class UpscalerConfig(_Config):
    """The second stage of what paints pairs, and its training; what it does not name is as in the first."""

    patch_size: Positive = 4
    """Side of the squares of pixels that make one of the network's; 1 as published."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=2)] = (56, 96, 128)
    """Channels of every level of the U-Net, from the outermost inwards."""
    layers: Positive = 1
    """Residual blocks of a level."""
    attention: tuple[Positive, ...] = (8, 4)
    """Sides of the feature maps that have self-attention: the outermost is that of the tiles over `patch_size`, every
    next one half of it."""
    train: TrainConfig = TrainConfig(steps=4000, batch_size=8, ema_decay=0.999)
    """The training run."""


class PairsConfig(_Config):
    """What paints images and their masks together (SatSynth, Toker et al. 2024), and its training."""

    base: str | None = None
    """Start from this: a SatSynth folder that TerraSynth saved; its networks are kept, those of both stages if it has
    two. `codes`, `prediction`, `condition`, `asks_classes` and `two_stages` must be as it has them. Null trains from
    scratch."""
    codes: Literal["bits", "onehot"] = "bits"
    """How a mask is written in numbers: `bits` of the class index, or one channel a class (an ablation there)."""
    prediction: Literal["sample", "epsilon", "v_prediction"] = "sample"
    """What the U-Net predicts: the clean pair, the noise (as published) or a mixture of both. With a `patch_size` the
    noise has more numbers than the U-Net has channels for; the clean pair has not."""
    min_snr: Annotated[float, Field(gt=0)] | None = 5.0
    """Weigh noise levels in the loss by their signal-to-noise ratio, at most this (Hang et al. 2023). Null weighs all
    alike, as published: details then count little."""
    patch_size: Positive = 4
    """Side of the squares of pixels that make one of the network's; 1 as published."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=2)] = (56, 96, 128)
    """Channels of every level of the U-Net, from the outermost inwards; published size: docs/systems/satsynth.md."""
    layers: Positive = 1
    """Residual blocks of a level."""
    attention: tuple[Positive, ...] = (8, 4)
    """Sides of the feature maps that have self-attention: the outermost is that of the tiles over `patch_size`, every
    next one half of it."""
    asks_classes: bool = True
    """Learn to be told what share of the pixels classes shall have; the paper's model can not be."""
    class_dropout: Fraction = 0.2
    """How often nothing is told, so that painting without asking works, and guidance."""
    condition: Literal["none", "given"] = "none"
    """`given` learns to complete pairs: images under masks, masks of images, and parts of both."""
    given_dropout: Fraction = 0.3
    """How often nothing is given."""
    views: Positive = 32
    """Fixed augmentations (flips, quarter turns, zooms) under which every tile is seen."""
    seed: NonNegative = 0
    """Seed of initialisation, data order, timesteps and noise."""
    train: TrainConfig = TrainConfig(steps=4000, batch_size=8, ema_decay=0.999)
    """The training run."""
    two_stages: bool = False
    """Paint pairs of half the size of the tiles (`data.image_size`), and enlarge them to it with a second stage. Both
    are trained, one after the other."""
    upscaler: UpscalerConfig = UpscalerConfig()
    """With `two_stages`: the second."""
    sampling: PairsSamplingConfig = PairsSamplingConfig()
    """How pairs are painted."""

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, JSON-able; what belongs to another choice is not among it."""
        idle: dict[str, Any] = {"train": HARMLESS, "sampling": True, "upscaler": {"train": HARMLESS}}
        if not self.two_stages:
            idle |= {"two_stages": True, "upscaler": True}
        return self.model_dump(mode="json", exclude=idle)

    @property
    def multiple(self) -> int:
        """What the side of the tiles must be a multiple of, unless a `base` has other networks."""
        token = self.patch_size * 2 ** (len(self.widths) - 1)
        if not self.two_stages:
            return token
        return math.lcm(2 * token, self.upscaler.patch_size * 2 ** (len(self.upscaler.widths) - 1))

    @model_validator(mode="after")
    def _asks_what_it_learns(self) -> PairsConfig:
        if self.sampling.shares and not self.asks_classes:
            raise ValueError("sampling.shares needs a model that learned to be asked: asks_classes")
        if self.sampling.guidance_scale != 1 and self.class_dropout == 0:
            raise ValueError("sampling.guidance_scale needs class_dropout > 0, or must be 1")
        return self


class CurationConfig(_Config):
    """What of the painted tiles is used, and how often: rules on the scores that a segmentor gave them."""

    margin: Annotated[float, Field(ge=0, le=254 / 64)] | None = 1.25
    """A pixel is left unlabelled where its loss is above this many times its class's mean on real tiles (FreeMask, Yang
    et al. 2023); a multiple of 1/64, below 4. Null keeps every label."""
    min_accuracy: Fraction | None = None
    """Leave out tiles of which the segmentor finds less than this share of the pixels as in the mask."""
    min_miou: Fraction | None = None
    """Leave out tiles whose mask the segmentor finds with less than this mIoU over the classes of the tile. One small
    region that is missed costs a whole class."""
    rare: Literal["auto"] | tuple[str, ...] | None = None
    """Keep a tile if any pixel of these classes is left or enough of it is labelled (`valid_share`), and leave out the
    others (TISynth, Dong et al. 2025). `auto`: those with less than half of an even share of the real pixels."""
    valid_share: Fraction = 0.8
    """For `rare`: how much of a tile without these classes must be labelled after filtering; more than this."""
    resample: Positive | None = None
    """Use the paintings of a mask the more often the harder its classes are, up to this many times (FreeMask,
    published: 20). Null uses all alike."""
    balance: Literal["uniform", "real"] | dict[str, Fraction] | None = None
    """Weigh tiles so that the classes' shares of the drawn pixels come near `uniform` ones, those of the `real` tiles,
    or those given by name (`{water: 0.2}`); classes that are not named share the rest as they do now."""
    max_weight: Annotated[float, Field(ge=1)] = 4.0
    """For `balance`: no tile weighs more than this many times the average, nor less than the average by as much."""

    @model_validator(mode="after")
    def _can_be_done(self) -> CurationConfig:
        steps = 64 * (self.margin or 0)
        if steps != int(steps):
            near = " or ".join(f"{number / 64:.10g}" for number in (int(steps), int(steps) + 1))
            raise ValueError(f"a margin of {self.margin:g} is no multiple of 1/64; near it is {near}")
        if isinstance(self.balance, dict) and sum(self.balance.values()) > 1 + 1e-9:
            raise ValueError(f"the shares of `balance` sum to {sum(self.balance.values()):g}, more than 1")
        return self


class ArmConfig(_Config):
    """One arm of the study: what is added to the real tiles."""

    name: str
    """Shown in the report."""
    mix: Mix = "none"
    """What the training tiles of a batch lend each other, masks included: nothing, rectangles (`cutmix`, Yun et al.
    2019), windows of four (`mosaic`, Bochkovskiy et al. 2020), half of their classes (`classmix`, Olsson et al. 2021)
    or single objects (`copy-paste`, Ghiasi et al. 2021; `plausible-copy-paste`, on what their class borders on alone).
    `cutout` hides a square of each instead (DeVries and Taylor 2017)."""
    synthetic: Literal["none", "plain", "steered", "pairs"] = "none"
    """Painted tiles: none; painted under masks without steering, or with CRFM; or `pairs`, with the masks, by what
    `pairs` describes (SatSynth)."""
    layouts: Literal["pairs"] | None = None
    """Masks to paint, if other than those of `study.layouts`: `pairs` takes the masks of what `pairs` describes, each
    once and as it is."""
    references: bool = False
    """Paint in the look of references: of each tile, one window of `data.unlabelled` (`generator.reference`)."""
    ratio: Positive | None = None
    """Painted tiles per real tile, if other than `study.ratio`; of arms alike in all else, a smaller set is the
    beginning of a larger one. A list, as `[1, 3, 5]`, makes an arm of each (`NAME 1:1`, `NAME 1:3`, `NAME 1:5`)."""
    synthetic_first: bool = False
    """Instead of mixing them in every batch, train on painted tiles alone for the first half of the steps and on real
    ones alone for the second."""
    pseudo_labels: Fraction | None = None
    """Add the windows of `data.unlabelled` themselves, under the classes that the teachers read in them with at least
    this probability (self-training, Lee 2013): what these images teach without being painted."""
    adapt: bool = False
    """Estimate the statistics of batch norms anew on the windows of `data.unlabelled` before testing (AdaBN, Li et al.
    2016): the cheapest way to take a segmentor to another place, and without effect in the same one."""
    filter: bool = False
    """Pixels of painted tiles whose loss under the teacher of the seed is above 1.25 times its class's mean on the
    real tiles are left unlabelled (FreeMask, Yang et al. 2023)."""
    curate: CurationConfig | None = None
    """Instead of `filter`: rules on what the teacher of the seed finds in the painted tiles, as `terrasynth curate` has
    them (docs/curation.md). `{}` is the filter alone."""

    @property
    def kind(self) -> str:
        """Of its painted tiles: `none`, `pairs`, `plain` or `steered`.

        Behind it `-like` if these have references, and `-on-pairs` if their masks are painted too.
        """
        return self.synthetic + "-like" * self.references + "-on-pairs" * (self.layouts is not None)

    @property
    def group(self) -> str:
        """Equal for arms that differ in name and ratio alone."""
        return self.model_copy(update={"name": "", "ratio": None}).model_dump_json()

    @property
    def adds_tiles(self) -> bool:
        """Whether it trains on more than the labelled tiles."""
        return self.synthetic != "none" or self.pseudo_labels is not None

    @model_validator(mode="after")
    def _paints_something(self) -> ArmConfig:
        if self.filter and self.curate:
            raise ValueError("curate filters by its own margin, so filter must be false")
        under_masks = ("references", "layouts")
        idle = [
            name
            for name in ("filter", "curate", "synthetic_first", "ratio", *under_masks)
            if getattr(self, name) and (self.synthetic == "none" or (name in under_masks and self.synthetic == "pairs"))
        ]
        if idle:
            choices = "plain or steered" if idle[0] in under_masks else "plain, steered or pairs"
            raise ValueError(f"{idle[0]} needs painted tiles, so synthetic must be {choices}")
        return self


class SearchConfig(_Config):
    """The same search for every arm: each pair is tried under the first seed, the best validation mIoU wins."""

    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    """Peak learning rates of the segmentor."""
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Numbers of optimiser steps."""


def _plain(ratio: Any) -> str:
    """How the name of an arm says its ratio: 3 for 3.0."""
    return f"{ratio:g}" if isinstance(ratio, int | float) else str(ratio)


class StudyConfig(_Config):
    """Arms x seeds."""

    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    """Every arm is trained once per seed; arms are compared pairwise by seed."""
    arms: tuple[ArmConfig, ...] = (
        ArmConfig(name="real"),
        ArmConfig(name="real + CutMix", mix="cutmix"),
        ArmConfig(name="real + synthetic", synthetic="plain"),
        ArmConfig(name="real + synthetic (CRFM)", synthetic="steered"),
    )
    """The first arm is the baseline."""
    ratio: Positive = 3
    """Painted tiles per real tile."""
    teacher: str | None = None
    """The arm, one without added tiles, whose segmentors teach: those of all seeds together read unlabelled images,
    that of the same seed steers and filters. Null is the baseline."""
    layouts: Literal["labelled", "all"] = "labelled"
    """Masks to paint: those of the labelled tiles, or in turn one of these and one that the teachers read in a window
    of `data.unlabelled`."""
    real_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of real tiles in each training batch of an arm with painted tiles."""
    search: SearchConfig | None = None
    """Find learning rate and steps for each arm; null gives every arm those of `segmentor.train`."""
    plateau_check: Literal["none", "baseline", "all"] = "baseline"
    """Train the baseline, or every arm, for twice the steps as well, and say whether that moves it."""

    @field_validator("arms", mode="before")
    @classmethod
    def _one_for_each_ratio(cls, arms: Any) -> Any:
        if not isinstance(arms, list | tuple):
            return arms
        spread: list[Any] = []
        for arm in arms:
            ratios = arm.get("ratio") if isinstance(arm, dict) and "name" in arm else None
            if isinstance(ratios, list | tuple) and ratios:
                if None in ratios:
                    raise ValueError(f"each ratio of the arm {arm['name']!r} must be a number, not null")
                spread += [{**arm, "name": f"{arm['name']} 1:{_plain(ratio)}", "ratio": ratio} for ratio in ratios]
            else:
                spread.append(arm)
        return spread

    @model_validator(mode="after")
    def _distinct(self) -> StudyConfig:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ValueError("there must be at least one arm")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"arms need distinct names, but there are two called {twice[0]!r}")
        told: dict[tuple[str, float], str] = {}
        for arm in (arm for arm in self.arms if arm.synthetic != "none"):
            alike = told.setdefault((arm.group, arm.ratio or self.ratio), arm.name)
            if alike != arm.name:
                raise ValueError(f"the arms {alike!r} and {arm.name!r} differ in nothing but their names")
        real = [arm.name for arm in self.arms if not arm.adds_tiles]
        if self.arms[0].name not in real:
            raise ValueError(
                f"the first arm ({names[0]!r}) is the baseline, so it may add no tiles: its synthetic must be none, "
                f"not {self.arms[0].synthetic}, and its pseudo_labels null"
            )
        if self.teacher is not None and self.teacher not in real:
            raise ValueError(f"teacher ({self.teacher!r}) must be an arm without added tiles: {', '.join(real)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must be distinct, and there must be at least one")
        return self


class Recipe(_Config):
    """A whole run: data, generator, sampling, steering, pairs, segmentor, refiner, study."""

    name: str
    """Shown in reports and cards."""
    data: DataConfig = DataConfig()
    """The labelled tiles."""
    generator: GeneratorConfig = GeneratorConfig()
    """The system that paints."""
    sampling: SamplingConfig = SamplingConfig()
    """How it paints."""
    steering: SteeringConfig = SteeringConfig()
    """How the segmentor steers it."""
    pairs: PairsConfig = PairsConfig()
    """What paints images and masks together."""
    segmentor: SegmentorConfig = SegmentorConfig()
    """The downstream task."""
    refiner: RefinerConfig = RefinerConfig()
    """What sharpens the boundaries of class maps."""
    study: StudyConfig = StudyConfig()
    """What is compared."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        trainings = {
            "generator": self.generator.train,
            "generator.autoencoder": self.generator.autoencoder.train,
            "segmentor": self.segmentor.train,
            "refiner": self.refiner.train,
            "pairs": self.pairs.train,
            "pairs.upscaler": self.pairs.upscaler.train,
        }
        faults = [
            f"{section}.train.warmup_steps ({train.warmup_steps}) must be less than {section}.train.steps "
            f"({train.steps})"
            for section, train in trainings.items()
            if train is not None and train.warmup_steps >= train.steps
        ]
        study, batch = self.study, self.segmentor.train.batch_size * self.segmentor.train.accumulate
        faults += [
            f"segmentor.train.warmup_steps ({self.segmentor.train.warmup_steps}) must be less than each of "
            f"study.search.steps ({steps})"
            for steps in (study.search.steps if study.search else ())
            if self.segmentor.train.warmup_steps >= steps
        ]
        # A kind of tiles that never enters a batch would make an arm another one under its name.
        mixed = [arm.name for arm in study.arms if arm.adds_tiles and not arm.synthetic_first]
        if mixed and not 0 < round(study.real_fraction * batch) < batch:
            faults.append(
                f"study.real_fraction ({study.real_fraction:g}) of the {batch} tiles of a batch leaves no place for "
                f"{'added' if round(study.real_fraction * batch) else 'real'} ones in the arm {mixed[0]!r}"
            )
        seen = self.generator.train.batch_size * self.generator.train.accumulate
        share = self.generator.labelled_fraction
        if self.data.kind == "folder" and self.data.unlabelled and not 0 < round(share * seen) < seen:
            faults.append(
                f"generator.labelled_fraction ({share:g}) of the {seen} tiles of a batch leaves no place for "
                f"{'unlabelled' if round(share * seen) else 'labelled'} ones"
            )
        if self.generator.system == "tisynth":
            faults += [
                f"sampling.{name} is TODSynth's alone: leave it out with generator.system: tisynth"
                for name in ("solver", "shift", "guidance_interval")
                if getattr(self.sampling, name) != SamplingConfig.model_fields[name].default
            ]
            faults += [
                f"the arm {arm.name!r} is steered, and generator.system: tisynth can not be"
                for arm in study.arms
                if arm.synthetic == "steered"
            ]
        late = self.steering.start >= self.sampling.steps
        if late and any(arm.synthetic == "steered" for arm in study.arms):
            faults.append(
                f"steering.start ({self.steering.start}) must be less than sampling.steps ({self.sampling.steps}), or "
                "nothing is steered"
            )
        if self.data.unlabelled and self.data.kind == "world":
            faults.append("data.unlabelled names images, but data.kind is world, which reads none")
        faults += [
            f"{key} needs unlabelled images beside the labelled tiles: data.unlabelled, with data.kind: folder"
            for key, asked in (
                ("generator.pseudo_labels", self.generator.pseudo_labels is not None),
                ("study.layouts: all", self.study.layouts == "all"),
                ("pseudo_labels of an arm", any(arm.pseudo_labels is not None for arm in study.arms)),
                ("references of an arm", any(arm.references for arm in study.arms)),
                ("adapt of an arm", any(arm.adapt for arm in study.arms)),
            )
            if asked and not (self.data.unlabelled and self.data.kind == "folder")
        ]
        if self.generator.reference is None and any(arm.references for arm in study.arms):
            faults.append("references of an arm need a generator that learned to look at them: generator.reference")
        pairs, least = [arm.name for arm in study.arms if "pairs" in arm.kind], self.pairs.multiple
        if pairs and self.pairs.base is None and self.data.image_size % least:
            faults.append(
                f"data.image_size ({self.data.image_size}) must be a multiple of {least} (pairs.patch_size, doubled "
                "for each of pairs.widths but one, and for pairs.two_stages; with that also of pairs.upscaler's) in "
                f"the arm {pairs[0]!r}"
            )
        faults += self._untrained_nulls()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _untrained_nulls(self) -> list[str]:
        """Where guidance looks at a null condition that the generator never met in training.

        Conditions come in one after the other (`sampling.guidance`): from the first whose scale is not 1 on, each is
        left out somewhere.
        """
        generator, sampling = self.generator, self.sampling
        order = ("text", "reference", "mask") if generator.system == "todsynth" else ("mask", "reference", "text")
        painted = {arm.references for arm in self.study.arms if arm.synthetic not in ("none", "pairs")} or {False}
        faults = []
        for looks in sorted(painted):
            names = [name for name in order if looks or name != "reference"]
            guided = [name for name in names if getattr(sampling, f"{name}_scale") != 1]
            for name in names[names.index(guided[0]) :] if guided else ():
                scale = f"{guided[0]}_scale"
                value = getattr(sampling, scale)
                if getattr(generator, f"{name}_dropout") == 0:
                    faults.append(f"sampling.{scale} ({value}) needs generator.{name}_dropout > 0, or must be 1")
        if generator.reference is not None and False in painted and generator.reference_dropout == 0:
            faults.append("to paint without references, generator.reference_dropout must be above 0")
        return list(dict.fromkeys(faults))
