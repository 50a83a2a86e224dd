"""Semantic segmentation: build, train, predict, evaluate, and the loss that steers a sampler.

Any architecture of segmentation_models_pytorch, and SegFormer and UperNet of transformers, behind one module.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from terrasynth.data.augment import augment, classmix, copy_paste, cutmix, cutout, dihedral, mosaic
from terrasynth.data.folder import Tiles
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir, write_json
from terrasynth.progress import track
from terrasynth.recipe import Mix, SegmentorConfig
from terrasynth.tasks.confusion import Confusion
from terrasynth.tasks.description import Description, not_whole
from terrasynth.training.loop import Key, Outcome, global_batch, mixed_keys, sequenced_keys
from terrasynth.training.loop import train as train_loop

__all__ = ["Segmentor", "adapt", "batch_norms", "fit", "label"]

Reduction = Literal["mean", "image", "wrong", "none"]

#: Share of the steps on painted tiles alone, where these come first.
_FIRST = 0.5

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

#: The transformers architectures: configuration class, model class, and the sizes that `encoder: tiny` stands for.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, object]]] = {
    "transformers/segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 32, 64, 128],
            "num_attention_heads": [1, 2, 4, 8],
            "decoder_hidden_size": 64,
        },
    ),
    "transformers/upernet": (
        "UperNetConfig",
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {
                "model_type": "resnet",
                "layer_type": "basic",
                "embedding_size": 16,
                "hidden_sizes": [16, 32, 64, 128],
                "depths": [1, 1, 1, 1],
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "hidden_size": 64,
        },
    ),
}
# Both downsample by 32 at the coarsest stage.
_TRANSFORMERS_STRIDE = 32

# What `Segmentor` itself decides, or what would change the form of the output.
_RESERVED = {"self", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "kwargs"}


class Segmentor(nn.Module):
    """A segmentation network from images in [0, 1] to logits at the same resolution.

    Images are normalised with ImageNet's mean and deviation, padded at the right and lower edge (by repeating the last
    pixel) to a multiple of the encoder's stride, and the logits are cropped back, so every size fits. Computes in
    channels-last memory order, which makes convolutions on a CPU nearly twice as fast.

    Attributes:
        network: the wrapped model.
        num_classes: K.
        ignore_index: the value of unlabelled pixels in targets.
        class_names: K names in the order of the logits; None as long as they are not known.
        schema: the label schema of its training tiles, with their colours; None as long as it is not known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        config: SegmentorConfig,
        *,
        stride: int,
        num_classes: int,
        ignore_index: int,
        class_names: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.config = config
        self.stride = stride
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_names = class_names
        self.schema: LabelSchema | None = None
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).reshape(3, 1, 1), persistent=False)

    @classmethod
    def build(
        cls,
        config: SegmentorConfig,
        num_classes: int,
        ignore_index: int = 255,
        seed: int = 0,
        *,
        class_names: Sequence[str] | None = None,
    ) -> Self:
        """A new segmentor, in evaluation mode.

        `weights: null` starts from scratch. For segmentation_models_pytorch, `encoder` and `weights` are its own names.
        For transformers, `encoder` is `tiny` or a hub name or folder; without `weights` only its sizes are used,
        `weights: pretrained` loads what is stored there, with a new classifier where the classes differ.

        Args:
            config: architecture, encoder, weights and options; `train` is not used here.
            num_classes: K.
            ignore_index: the value of unlabelled pixels.
            seed: of the random initial weights; the global random state is left as it was.
            class_names: K names, if they are known already; `fit` takes them from the training tiles.

        Raises:
            TerraSynthError: the architecture, encoder, weights or an option do not exist or do not fit together, or
                pretrained weights can not be had.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if config.architecture in _TRANSFORMERS:
                network, stride = _build_transformers(config, num_classes), _TRANSFORMERS_STRIDE
            else:
                network, stride = _build_smp(config, num_classes, config.weights)
        return cls(
            network,
            config,
            stride=stride,
            num_classes=num_classes,
            ignore_index=ignore_index,
            class_names=None if class_names is None else tuple(class_names),
        ).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float (B, K, H, W), of images, float (B, 3, H, W) in [0, 1]."""
        height, width = images.shape[-2:]
        normalised = (images - self.mean) / self.std
        if height % self.stride or width % self.stride:
            normalised = F.pad(normalised, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        outputs = self.network(normalised.contiguous(memory_format=torch.channels_last))
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        if logits.shape[-2:] != normalised.shape[-2:]:
            logits = F.interpolate(logits, size=normalised.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def loss(self, images: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Cross-entropy, differentiable in weights and images; unlabelled pixels never count.

        Args:
            images: float (B, 3, H, W) in [0, 1].
            targets: int64 (B, H, W), class indices or `ignore_index`.
            reduction: "mean" over all labelled pixels of the batch, scalar; "image", the same for each image, (B,);
                "wrong", the mean for each image over its labelled pixels that are predicted wrong, (B,), the loss that
                control-rectify flow matching descends; "none", (B, H, W), 0 where unlabelled.
                The mean of no pixels is 0.
        """
        return self._reduced(self(images), targets, reduction)

    def training_loss(self, images: Tensor, targets: Tensor, dice: float = 0.0) -> Tensor:
        """What `fit` descends, scalar: the mean cross-entropy, and `dice` times the Dice loss of the batch.

        Dice (Milletari et al. 2016) is one minus twice the overlap over the sum of what is predicted and what is true,
        over all tiles of the batch, averaged over classes: a class counts the same however few pixels it has.
        """
        logits = self(images)
        loss = self._reduced(logits, targets, "mean")
        if dice:
            with torch.autocast(logits.device.type, enabled=False):  # sums over all pixels of a batch
                overlap = DiceLoss("multiclass", ignore_index=self.ignore_index)
                loss = loss + dice * overlap(logits.to(loss.dtype), targets)
        return loss

    def _reduced(self, logits: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="none")
        labelled = targets != self.ignore_index
        match reduction:
            case "none":
                return losses
            case "mean":
                return losses.sum() / labelled.sum().clamp_min(1)
            case "image":
                return losses.sum((1, 2)) / labelled.sum((1, 2)).clamp_min(1)
            case "wrong":
                wrong = labelled & (logits.detach().argmax(1) != targets)
                return (losses * wrong).sum((1, 2)) / (wrong.sum((1, 2)) + 1e-10)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(training)

    def predict(self, images: Tensor) -> Tensor:
        """The most likely class of every pixel, int64 (B, H, W), of images, float (B, 3, H, W) in [0, 1]."""
        with self._evaluating():
            classes = self(images).argmax(1)
        # A tensor made in inference mode could not serve as the target of a loss.
        return classes.clone()

    def evaluate(self, tiles: Tiles, batch_size: int = 16) -> Confusion:
        """The confusion matrix over all labelled pixels of `tiles`.

        Raises:
            TerraSynthError: the classes of `tiles` are not those of the segmentor.
        """
        self.check_schema(tiles.schema)
        confusion = Confusion.empty(self.num_classes)
        for images, masks in zip(tiles.images.split(batch_size), tiles.masks.split(batch_size), strict=True):
            prediction = self.predict(images.to(self.device).float() / 255)
            confusion.update(prediction, masks.to(self.device), self.ignore_index)
        return confusion

    def probabilities(self, images: Tensor) -> Tensor:
        """The probability of every class in every pixel, averaged over the eight flips and turns of the square.

        Args:
            images: float (B, 3, S, S) in [0, 1].

        Returns:
            float32 (B, K, S, S), summing to 1 over the classes.
        """
        with self._evaluating():
            turned = [self(dihedral(images, element)).float().softmax(1) for element in range(8)]
            return torch.stack([dihedral(p, element, inverse=True) for element, p in enumerate(turned)]).mean(0)

    def pixel_losses(self, tiles: Tiles, batch_size: int = 16) -> Tensor:
        """The cross-entropy of every pixel of `tiles`, float32 (N, S, S) on the CPU, 0 where unlabelled.

        Raises:
            TerraSynthError: the classes of `tiles` are not those of the segmentor.
        """
        self.check_schema(tiles.schema)
        losses = []
        for images, masks in zip(tiles.images.split(batch_size), tiles.masks.split(batch_size), strict=True):
            losses.append(self.compare(images, masks)[0])
        return torch.cat(losses)

    def compare(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the segmentor sees, beside the masks.

        Args:
            images: uint8 (B, 3, H, W).
            masks: class indices or `ignore_index`, (B, H, W).

        Returns:
            On the CPU: the cross-entropy of every pixel, float32 (B, H, W), 0 where unlabelled; the most likely class
            of every pixel, int64 (B, H, W).
        """
        with self._evaluating():
            logits = self(images.to(self.device).float() / 255)
            losses = self._reduced(logits, masks.to(self.device).long(), "none")
        # Tensors made in inference mode could not serve in a loss.
        return losses.float().cpu().clone(), logits.argmax(1).cpu().clone()

    def check_schema(self, schema: LabelSchema) -> None:
        """Refuse labels that mean something else than they did in training.

        Raises:
            TerraSynthError: class names or ignore index differ.
        """
        was: dict[str, object] = {"number of classes": self.num_classes, "ignore_index": self.ignore_index}
        now: dict[str, object] = {"number of classes": schema.num_classes, "ignore_index": schema.ignore_index}
        if self.class_names is not None:
            was["classes"], now["classes"] = ", ".join(self.class_names), ", ".join(schema.names)
        changes = [f"{key}: {was[key]} -> {now[key]}" for key in was if was[key] != now[key]]
        if changes:
            raise TerraSynthError(
                "the labels are not those that the segmentor was made for",
                found="; ".join(changes),
                expected="the same classes in the same order, and the same ignore index",
                fix="use the label schema of the segmentor's training, or train a segmentor on these labels",
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; the folder appears whole or not at all."""
        description = {
            "kind": "segmentor",
            **self.config.model_dump(mode="json", include={"architecture", "encoder", "options"}),
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "ignore_index": self.ignore_index,
            "label_schema": None if self.schema is None else self.schema.to_dict(),
        }
        if self.config.architecture in _TRANSFORMERS:
            # All sizes, so that loading never asks the hub.
            sizes: Any = self.network.config
            description["network"] = json.loads(sizes.to_json_string(use_diff=False))
        # safetensors takes no channels-last tensors.
        weights = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
        with atomic_dir(folder) as partial:
            write_json(partial / "config.json", description)
            save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, schema: LabelSchema | None = None) -> Self:
        """Read what `save_pretrained` wrote; in evaluation mode, on the CPU, without network access.

        Args:
            folder: the segmentor's folder.
            schema: the labels it is going to be used with, to be checked.

        Raises:
            TerraSynthError: the folder holds no whole segmentor, or its labels are not those of `schema`.
        """
        folder = Path(folder)
        saved = Description.read(folder)
        try:
            if saved.config.architecture in _TRANSFORMERS:
                if saved.network is None:
                    raise KeyError("network")
                network: nn.Module = _transformers_network(saved.config.architecture, saved.network)
                stride = _TRANSFORMERS_STRIDE
            else:
                network, stride = _build_smp(saved.config, saved.num_classes, None)
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise not_whole(folder, error) from error
        segmentor = cls(
            network,
            saved.config,
            stride=stride,
            num_classes=saved.num_classes,
            ignore_index=saved.ignore_index,
            class_names=saved.class_names,
        )
        segmentor.schema = saved.schema
        if schema is not None:
            segmentor.check_schema(schema)
        return segmentor.eval()


def label(segmentors: Sequence[Segmentor], tiles: Tiles, confidence: float = 0.0, batch_size: int = 16) -> Tensor:
    """Pseudo-masks: what segmentors of the same classes read in `tiles` together, by their mean probabilities.

    Args:
        segmentors: one or more; all count alike.
        tiles: their images alone are looked at.
        confidence: pixels whose likeliest class is less probable than this are left unlabelled.
        batch_size: tiles computed together.

    Returns:
        uint8 masks (N, S, S) on the CPU.
    """
    masks = []
    with track(len(tiles), "reading unlabelled images", unit="images") as progress:
        for images in tiles.images.split(batch_size):
            pixels = images.to(segmentors[0].device).float() / 255
            shares = torch.stack([segmentor.probabilities(pixels) for segmentor in segmentors]).mean(0)
            most, classes = shares.max(1)
            masks.append(torch.where(most >= confidence, classes, segmentors[0].ignore_index).byte().cpu())
            progress.advance(len(images))
    return torch.cat(masks).clone()


class _Augmented:
    """Real tiles, then painted ones, augmented anew on every visit."""

    def __init__(self, real: Tiles, *painted: Tiles) -> None:
        self.images = torch.cat([tiles.images for tiles in (real, *painted)])
        self.masks = torch.cat([tiles.masks for tiles in (real, *painted)])
        self.real = len(real)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        index, seed = key
        image, mask = augment(self.images[index], self.masks[index], seed)
        return {"image": image, "mask": mask, "painted": torch.tensor(index >= self.real)}


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch as usual, but their running statistics do not hear of it."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def batch_norms(segmentor: Segmentor) -> list[_BatchNorm]:
    """The batch norms of a segmentor.

    Raises:
        TerraSynthError: it has none, so there is nothing to `adapt`.
    """
    norms = [module for module in segmentor.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise TerraSynthError(
            "the segmentor has no batch norms to adapt",
            found=type(segmentor.network).__name__,
            fix="leave out `adapt`, or choose another `segmentor.architecture`",
        )
    return norms


@torch.no_grad()
def adapt(segmentor: Segmentor, images: Tensor, batch_size: int = 16) -> None:
    """Estimate the statistics of batch norms anew on images of another place (AdaBN, Li et al. 2016, arXiv 1603.04779).

    All else is as in prediction: nothing is dropped, no weight changes.

    Args:
        segmentor: trained; changed in place.
        images: uint8 (N, 3, S, S), without labels.
        batch_size: images looked at together, at least; their statistics are averaged over the batches.

    Raises:
        TerraSynthError: it has no batch norms, or there is only one image.
    """
    norms = batch_norms(segmentor)
    if len(images) < 2:
        raise TerraSynthError(
            "one image has no statistics of a place", found=f"{len(images)} unlabelled images", expected="2 or more"
        )
    segmentor.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    # Equal to one image: a small rest would weigh as much as a whole batch.
    for batch in images.tensor_split(max(1, len(images) // batch_size)):
        segmentor(batch.to(segmentor.device).float() / 255)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    segmentor.eval()


def fit(
    segmentor: Segmentor,
    train: Tiles,
    validation: Tiles,
    config: SegmentorConfig,
    folder: Path,
    *,
    seed: int,
    synthetic: Tiles | None = None,
    real_fraction: float = 0.5,
    synthetic_first: bool = False,
    mix: Mix = "none",
    max_minutes: float | None = None,
    label: str = "training the segmentor",
) -> Outcome:
    """Train a segmentor in place; when finished, it has the weights with the best validation mIoU.

    Args:
        segmentor: as `Segmentor.build` made it from `config`.
        train: real tiles.
        validation: chooses among the evaluations every `evaluate_every` steps, and does nothing else.
        config: its `train` part says how.
        folder: checkpoints and `log.jsonl` (`miou`, `oa` and `macc` of the validation); a run found here goes on.
        seed: of the order of the tiles, their augmentation and everything else random in training.
        synthetic: painted tiles, or others that are added to the real ones, drawn by their weights. Where a batch has
            two or more of each kind, the kinds lend each other nothing, and the running statistics of batch norms are
            those of the real ones.
        real_fraction: share of real tiles in every batch when there are painted ones.
        synthetic_first: instead of mixing them, train on painted tiles alone for the first half of the steps and on
            real ones alone for the second.
        mix: what the tiles of a batch lend each other, or lose.
        max_minutes: stop at a checkpoint after about this long.
        label: shown beside the progress.

    Raises:
        TerraSynthError: the sets do not fit together or have no labels, or `folder` holds another run.
    """
    parts = {"training": train, "validation": validation} | ({} if synthetic is None else {"painted": synthetic})
    if segmentor.class_names is None and segmentor.num_classes == train.schema.num_classes:
        segmentor.class_names = train.schema.names
    for name, tiles in parts.items():
        segmentor.check_schema(tiles.schema)
        if not bool((tiles.masks != segmentor.ignore_index).any()):
            raise TerraSynthError(
                f"the {name} tiles have no labelled pixel",
                found=f"{len(tiles)} tiles, every pixel {segmentor.ignore_index}",
                fix="check the label schema and the coding of the masks",
            )
    segmentor.schema = train.schema
    dataset = _Augmented(train) if synthetic is None else _Augmented(train, synthetic)

    def mixed_loss(batch: dict[str, Tensor], kept: Tensor) -> Tensor:
        images, masks, seeds = (batch[name][kept] for name in ("image", "mask", "seed"))
        match mix:
            case "cutout":
                images, masks = cutout(images, masks, seeds, segmentor.ignore_index)
            case "cutmix":
                images, masks = cutmix(images, masks, seeds)
            case "mosaic":
                images, masks = mosaic(images, masks, seeds)
            case "classmix":
                images, masks = classmix(images, masks, seeds, segmentor.ignore_index)
            case "copy-paste":
                images, masks = copy_paste(images, masks, seeds, segmentor.ignore_index)
            case "plausible-copy-paste":
                images, masks = copy_paste(images, masks, seeds, segmentor.ignore_index, where="plausible")
        return segmentor.training_loss(images, masks, config.dice)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        # Batch norms see each kind by itself, and remember real tiles alone: these are what is read later, and painted
        # ones have other colours and less detail. (One tile has no batch statistics, so it goes with the others.)
        painted = batch["painted"]
        if min(painted.sum(), (~painted).sum()) < 2:
            return mixed_loss(batch, torch.ones_like(painted))
        real = mixed_loss(batch, ~painted)
        with _statistics_kept(segmentor):
            synthetic = mixed_loss(batch, painted)
        # Every labelled pixel counts alike, whatever a filter has left.
        labelled = (batch["mask"] != segmentor.ignore_index).flatten(1).sum(1).float()
        return torch.lerp(real, synthetic, (labelled * painted).sum() / labelled.sum().clamp_min(1))

    def evaluate(step: int) -> dict[str, float]:
        confusion = segmentor.evaluate(validation)
        return {"miou": confusion.mean_iou, "oa": confusion.overall_accuracy, "macc": confusion.mean_accuracy}

    keys = None
    if synthetic is not None:
        batch, switch = global_batch(config.train), round(_FIRST * config.train.steps)
        keys = (
            sequenced_keys(len(train), len(synthetic), batch, switch, seed, synthetic.weights)
            if synthetic_first
            else mixed_keys(len(train), len(synthetic), batch, real_fraction, seed, synthetic.weights)
        )
    return train_loop(
        segmentor,
        loss,
        dataset,
        config.train,
        folder,
        seed=seed,
        keys=keys,
        identity={
            "segmentor": config.model_dump(mode="json", exclude={"train"}),
            "data": {name: tiles.fingerprint() for name, tiles in parts.items()},
            "real_fraction": None if synthetic is None or synthetic_first else real_fraction,
            "synthetic_first": synthetic is not None and synthetic_first,
            "mix": mix,
        },
        evaluate=evaluate,
        monitor="miou",
        max_minutes=max_minutes,
        label=label,
    )


def _unknown_options(config: SegmentorConfig, known: Sequence[str]) -> None:
    unknown = sorted(set(config.options) - set(known))
    if unknown:
        raise TerraSynthError(
            f"{config.architecture} has no such options",
            found=", ".join(unknown),
            expected=", ".join(sorted(known)),
            fix="correct `segmentor.options` in the recipe",
        )


def _build_smp(config: SegmentorConfig, num_classes: int, weights: str | None) -> tuple[nn.Module, int]:
    """The model and the multiple that its input sides must be of."""
    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    name = config.architecture.lower()
    if name not in architectures:
        raise TerraSynthError(
            "no such segmentation architecture",
            found=config.architecture,
            expected=", ".join([*architectures, *_TRANSFORMERS]),
            fix="correct `segmentor.architecture` in the recipe",
        )
    # timm's encoders take any further argument; for all others smp drops what it does not know, misspellings too.
    if not config.encoder.startswith("tu-"):
        _unknown_options(
            config, [key for key in inspect.signature(architectures[name]).parameters if key not in _RESERVED]
        )
    try:
        network = smp.create_model(
            name, encoder_name=config.encoder, encoder_weights=weights, classes=num_classes, **config.options
        )
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise TerraSynthError(
            "the segmentor can not be built",
            found=error.args[0] if error.args else error,
            expected="an architecture, encoder, weights and options of segmentation_models_pytorch that fit together",
            fix="correct `segmentor` in the recipe; `weights` need a connection to their hub, or a filled cache",
        ) from error
    if not config.encoder.startswith("tu-"):
        _drop_unused_stages(network.encoder)
    # The decoder of DPT halves its coarsest features once more.
    return network, 2 * max(network.encoder.output_strides) if name == "dpt" else network.encoder.output_stride


def _drop_unused_stages(encoder: nn.Module) -> None:
    """Remove the stages that `encoder_depth` cuts off.

    Encoders of segmentation_models_pytorch build them all the same: at depth 4, three quarters of a ResNet-18 would be
    weights that never train, in every file and on every device.
    """
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    features = encoder.eval()(torch.zeros(1, 3, 128, 128))
    reached = sum(feature.sum() for feature in features if feature.requires_grad)
    gradients = torch.autograd.grad(reached, parameters, allow_unused=True)
    used = {name.partition(".")[0] for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    for name, stage in encoder.named_children():
        if name not in used and next(stage.parameters(), None) is not None:
            setattr(encoder, name, nn.Identity())


def _transformers_network(architecture: str, sizes: Mapping[str, Any]) -> nn.Module:
    config_class, model_class, _ = _TRANSFORMERS[architecture]
    network: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class).from_dict(dict(sizes)))
    return network


def _build_transformers(config: SegmentorConfig, num_classes: int) -> nn.Module:
    config_name, model_name, tiny = _TRANSFORMERS[config.architecture]
    config_class, model_class = getattr(transformers, config_name), getattr(transformers, model_name)
    _unknown_options(config, [key for key in config_class().to_dict() if not key.startswith("_")])
    # The auxiliary head of UperNet only serves a loss of its own, which `Segmentor.loss` does not have.
    options: dict[str, Any] = {"use_auxiliary_head": False} if config_class.model_type == "upernet" else {}
    options |= {**config.options, "num_labels": num_classes}
    try:
        if config.encoder == "tiny":
            if config.weights is not None:
                raise ValueError("the encoder `tiny` has no pretrained weights")
            return _transformers_network(config.architecture, {**tiny, **options})
        if config.weights is None:
            return model_class(config_class.from_pretrained(config.encoder, **options))
        network: nn.Module = model_class.from_pretrained(
            config.encoder, use_safetensors=True, ignore_mismatched_sizes=True, dtype=torch.float32, **options
        )
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise TerraSynthError(
            "the segmentor can not be built",
            found=str(error),
            expected=f"`encoder: tiny`, or the hub name or folder of a {config_class.model_type} model",
            fix="correct `segmentor` in the recipe; a hub name needs a connection to the hub, or a filled cache",
        ) from error
    return network
