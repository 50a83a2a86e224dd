"""What TISynth's sampler saves by computing once an image what does not depend on the timestep.

    python benchmarks/tisynth.py [--steps 10] [--side 64] [--widths 32,64] [--rounds 3]

Two tables. The first counts the operations of one step at Stable Diffusion 1.5's size and 512 pixels, without weights
or memory, a multiply-add as two. The second compares the pipeline with the network called afresh in every step, all
terms of the guidance in one batch: by operations at that size, and by time, of a small network on this machine, in
which the hints weigh more. There the two alternate, in processor time, and the fastest round of each counts. The
difference is the largest between their predictions, over all steps of a sampling, as
a share of the largest prediction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from terrasynth.data.schema import LabelSchema
from terrasynth.models.all_in_attention import AllInAttentionUNet
from terrasynth.models.autoencoder import PatchPCA
from terrasynth.planning.footprint import count, enter, flops, pretend
from terrasynth.sampling.diffusion import Epsilon, sample_ddim
from terrasynth.sampling.flow import seeded_noise
from terrasynth.sampling.guidance import Guided, guidance_chain
from terrasynth.systems.tisynth import TISynthPipeline

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
#: Scales of text, mask and reference.
GUIDANCE = {
    "none": (1.0, 1.0, 1.0),
    "as published: text 9": (9.0, 1.0, 1.0),
    "default: mask 1.5": (1.0, 1.5, 1.0),
    "all three": (2.0, 1.5, 1.25),
}


def operations() -> dict[str, int]:
    """Of one evaluation for one image, part by part."""
    with torch.device("meta"):
        unet = AllInAttentionUNet().requires_grad_(False)
    text_attentions = [block.attn2 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    counted = {}

    def counting(name: str, run: Callable[[], Any]) -> Any:
        with count() as needs:
            found = run()
        counted[name] = flops(needs.operations)
        return found

    with torch.no_grad(), pretend(gpu=False):
        enter(unet)
        latents, mask, text = torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 512, 512), torch.zeros(1, 77, 768)
        seen = latents, torch.zeros(1), text
        hint = counting("hint of the mask", lambda: unet.mask_hint(mask))
        counting("hint of the reference", lambda: unet.reference_hint(latents))
        features = counting("encoder of a condition", lambda: unet.features(unet.mask_encoder, hint, *seen))
        counting("U-Net", lambda: unet.denoise(*seen, features, features))
        layers = [layer for attention in text_attentions for layer in (attention.to_k, attention.to_v)]
        counting("of these three, keys and values of the text", lambda: [layer(text) for layer in layers])
    return counted


def saved_operations(counted: dict[str, int], steps: int, scales: Sequence[float], timestep_free: bool) -> float:
    """The share that is saved of a sampling at Stable Diffusion 1.5's size; `test_tisynth` counts the evaluations."""
    terms = chain(scales)
    encoder, hints = counted["encoder of a condition"], counted["hint of the mask"] + counted["hint of the reference"]
    afresh = steps * len(terms) * (counted["U-Net"] + 2 * encoder + hints)
    distinct = sum(len({term.sees & {name, "text"} for term in terms}) for name in ("mask", "reference"))
    kept = steps * len(terms) * counted["U-Net"] + (1 if timestep_free else steps) * distinct * encoder
    return 1 - (kept + 2 * hints) / afresh  # one hint of the image's condition, one of none


def chain(scales: Sequence[float]) -> list[Guided]:
    """The terms of guidance by text, mask and reference."""
    text_scale, mask_scale, reference_scale = scales
    return guidance_chain({"mask": mask_scale, "reference": reference_scale, "text": text_scale})


def afresh(
    pipeline: TISynthPipeline, masks: Tensor, references: Tensor, prompts: Sequence[str], scales: Sequence[float]
) -> Epsilon:
    """The same guided noise, with nothing kept from step to step or shared between terms."""
    terms = chain(scales)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        embeds, null = (pipeline.prompts(texts)[0] for texts in (prompts, [""]))
        reference, unlabelled = pipeline.encode_images(references), torch.full_like(masks, SCHEMA.ignore_index)
        noise = pipeline.unet(
            x.repeat(len(terms), 1, 1, 1),
            timestep.repeat(len(terms)),
            torch.cat([embeds if "text" in term.sees else null for term in terms]),
            mask=pipeline.encode_masks(torch.cat([masks if "mask" in term.sees else unlabelled for term in terms])),
            reference=torch.cat([reference * ("reference" in term.sees) for term in terms]),
        ).sample
        return sum(term.coefficient * row for term, row in zip(terms, noise.split(len(x)), strict=True))

    return predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--widths", default="32,64", help="of the network's levels")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    counted = operations()
    print("| one step at 512 px, Stable Diffusion 1.5's size | 10⁹ operations |")
    print("| --- | --- |")
    for name, each in counted.items():
        print(f"| {name} | {each / 1e9:.1f} |")
    encoder, hints = counted["encoder of a condition"], counted["hint of the mask"] + counted["hint of the reference"]
    whole = counted["U-Net"] + 2 * encoder + hints
    print(f"| **everything** | {whole / 1e9:.1f} |")
    print(f"\nThe hints are {hints / whole:.1%} of a step, and both encoders {2 * encoder / whole:.1%}.\n")

    saved_here = "time saved, small network"
    print(f"| encoders | guidance | operations saved in {arguments.steps} steps | {saved_here} | difference |")
    print("| --- | --- | --- | --- | --- |")
    torch.manual_seed(0)
    references = F.interpolate(torch.rand(1, 3, 8, 8), arguments.side, mode="bilinear")
    masks = torch.randint(0, 3, (1, arguments.side, arguments.side))
    for timestep_free in (False, True):
        torch.manual_seed(0)
        pipeline = TISynthPipeline.from_scratch(
            PatchPCA().fit(references * 2 - 1),
            SCHEMA,
            SCHEMA.names,
            widths=[int(width) for width in arguments.widths.split(",")],
            timestep_free=timestep_free,
        )
        for parameter in pipeline.unet.parameters():  # as after some training: nothing is zero
            parameter.data += 0.05 * torch.randn_like(parameter)
        pipeline.unet.eval().requires_grad_(False)
        noise = seeded_noise([0], (16, arguments.side // 4, arguments.side // 4))
        for name, scales in GUIDANCE.items():
            prompts = pipeline.captions(masks)
            fastest = {"kept": float("inf"), "afresh": float("inf")}
            for _ in range(arguments.rounds):
                begun = time.process_time()
                kept = pipeline.epsilon(masks, prompts, references, *scales)
                sample_ddim(kept, noise, pipeline.scheduler, arguments.steps)
                fastest["kept"] = min(fastest["kept"], time.process_time() - begun)
                begun = time.process_time()
                anew = afresh(pipeline, masks, references, prompts, scales)
                sample_ddim(anew, noise, pipeline.scheduler, arguments.steps)
                fastest["afresh"] = min(fastest["afresh"], time.process_time() - begun)
            differences = []

            def both(
                x: Tensor, t: Tensor, kept: Epsilon = kept, anew: Epsilon = anew, into: list[float] = differences
            ) -> Tensor:
                first, second = kept(x, t), anew(x, t)
                into.append(((first - second).abs().max() / first.abs().max().clamp_min(1)).item())
                return first

            sample_ddim(both, noise, pipeline.scheduler, arguments.steps)
            operations_saved = saved_operations(counted, arguments.steps, scales, timestep_free)
            saved = 1 - fastest["kept"] / fastest["afresh"]
            form = "timestep-free" if timestep_free else "published"
            print(f"| {form} | {name} | {operations_saved:.1%} | {saved:.0%} | {max(differences):.0e} |")


if __name__ == "__main__":
    main()
