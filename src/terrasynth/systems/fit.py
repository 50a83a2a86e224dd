"""From labelled tiles to a trained generator: encode everything constant once, then run the training loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from terrasynth.data.folder import Tiles
from terrasynth.data.sheet import contact_sheet
from terrasynth.io import atomic_dir, atomic_write, digest
from terrasynth.models.text import PromptCache
from terrasynth.systems.autoencode import fit_correction
from terrasynth.systems.build import build
from terrasynth.systems.loading import cast
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.systems.views import EncodedViews, JoinedViews
from terrasynth.training.keys import mixed_keys
from terrasynth.training.loop import Outcome, global_batch, train
from terrasynth.training.precision import computes_in_bfloat16, round_linear
from terrasynth.training.processes import process_state

if TYPE_CHECKING:
    from terrasynth.recipe import DataConfig, GeneratorConfig, SamplingConfig

__all__ = ["fit_generator"]

_UNLABELLED_VIEWS = 8
#: Painted layouts in a preview, and their steps.
_LAYOUTS, _LAYOUT_STEPS = 4, 20
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    # Beside each other, text encoders and the network may be more than a card holds.
    for encoder in pipeline.text_encoders:
        encoder.to(_DEVICE)
    if config.base is None and config.autoencoder.train is not None:
        corrected = fit_correction(
            pipeline.vae, tiles, config.autoencoder, folder / "autoencoder", seed=config.seed, max_minutes=max_minutes
        )
        if not corrected.finished:
            return corrected
    pipeline.prompts = PromptCache(
        pipeline.encode_prompts,
        folder / "cache" / "prompts",
        identity=digest(config.base, str(pipeline.tokenizer), str(pipeline.text_encoder.dtype)),
    )
    process = process_state()
    with process.main_process_first():  # it encodes, the others read what it wrote
        labelled = EncodedViews.encode(pipeline, tiles, config.views, folder / "cache", config.reference)
        dataset: EncodedViews | JoinedViews = labelled
        keys = None
        if unlabelled is not None:
            # The windows are many as they are: flips and turns alone.
            others = EncodedViews.encode(pipeline, unlabelled, _UNLABELLED_VIEWS, folder / "cache", config.reference)
            dataset = JoinedViews(labelled, others)
            batch = global_batch(config.train)
            keys = mixed_keys(len(labelled), len(others), batch, config.labelled_fraction, config.seed)
        # The first tile, and three more spread over the others: the same in every preview.
        shown = [round(i * (len(tiles) - 1) / 3) for i in range(4)] if len(tiles) >= 4 else list(range(len(tiles)))
        pipeline.prompts.prepare(["", *pipeline.captions(tiles.masks[shown])])
    if config.base is not None:
        # Every prompt is encoded by now; three text encoders would only hold memory.
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            part = getattr(pipeline, name, None)
            if part is not None and process.is_main_process:
                part.to("cpu")  # to be saved with the model
            elif part is not None:
                setattr(pipeline, name, None)
    network, precision = pipeline.network, config.train.precision
    exact = round_linear(network) if computes_in_bfloat16(_DEVICE, precision) else {}
    network.to(_DEVICE)

    def preview(step: int) -> dict[str, float]:
        looks = tiles.images[shown].roll(1, 0)  # each like another tile
        arguments = pipeline.sampling_arguments(sampling.model_copy(update={"precision": precision}))
        images = pipeline(
            tiles.masks[shown],
            references=None if config.reference is None else looks.to(_DEVICE).float() / 255,
            seeds=list(range(len(shown))),
            output_type="pt",
            **arguments,
        ).images
        rows = {"real": tiles.images[shown], **({} if config.reference is None else {"like": looks}), "painted": images}
        sheet = contact_sheet(rows, tiles.masks[shown], tiles.schema)
        with atomic_write(folder / "previews" / f"step-{step:08d}.png") as partial:
            sheet.save(partial)
        if config.layouts and isinstance(pipeline, TODSynthPipeline):
            masks = pipeline.layouts(seeds=range(_LAYOUTS), num_inference_steps=_LAYOUT_STEPS, precision=precision)
            images = pipeline(masks, seeds=range(_LAYOUTS), output_type="pt", **arguments).images
            sheet = contact_sheet({"painted": images}, masks.cpu(), tiles.schema)
            with atomic_write(folder / "previews" / f"layouts-{step:08d}.png") as partial:
                sheet.save(partial)
        return {}

    outcome = train(
        network,
        pipeline.training_loss,
        dataset,
        config.train,
        folder,
        seed=config.seed,
        keys=keys,
        identity={
            "generator": {name: value for name, value in config.identity().items() if name != "train"},
            "data": tiles.fingerprint(),
            "unlabelled": None if unlabelled is None else unlabelled.fingerprint(),
        },
        evaluate=preview,
        max_minutes=None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - begun) / 60),
        label="training the generator",
    )
    if outcome.finished and process.is_main_process and not (folder / "model").is_dir():
        torch.nn.Module.to(network, "cpu", torch.float32)
        for layer, weight in exact.items():
            layer.weight.data = weight
        with atomic_dir(folder / "model") as partial:
            if config.save_precision == "fp16":
                cast(pipeline, torch.float16)  # to start from, not to compute in
            pipeline.save_pretrained(partial)
    return outcome
