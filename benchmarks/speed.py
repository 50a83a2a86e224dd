"""Where the time goes: every row a ratio of two things that this run measured, one right after the other.

    python benchmarks/speed.py [RECIPE] [--threads 1] [--rounds 5] [--profile] [--set generator.train.batch_size=8]

`RECIPE` (default `demo`) gives sizes, precision, sampling and steering; weights and tiles are random. What is compared
alternates, round by round, and the fastest round counts, in processor time, so that a busy machine disturbs little.

- The matmul peak is what this machine reaches in the very matrix products of the transformer's linear layers, forward
  and backward, alone. Operations are counted from the shapes: 2 a multiply-add, and three times the forward pass for
  forward and backward (inputs and weights are differentiated), without what attention recomputes.
- The whole step is that of the training loop: reading, noise, dropped conditions, forward, backward, clipping, AdamW,
  the moving average and the log.
- Memory is of tensors, at the peak, weights included.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.planning import parts
from terrasynth.planning.footprint import count, flops
from terrasynth.recipe import Recipe
from terrasynth.recipe_io import load_recipe
from terrasynth.sampling.flow import Steering
from terrasynth.systems.generate import steering_for
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.keys import Key
from terrasynth.training.loop import Average, make_optimizer, train
from terrasynth.training.precision import autocast

_aten = torch.ops.aten
#: What is compared, the ratio, its target, what was measured, MiB of tensors at the peak.
Row = tuple[str, float, str, str, str]
_KINDS = {
    "linear layers": ("mm", "addmm", "mkldnn", "convolution"),
    "attention": ("flash",),
    "GELU": ("gelu",),
    "layer norm": ("layer_norm",),
    "AdamW": ("adamw",),
    "concatenate, copy, fill": ("cat", "copy_", "fill_", "zero_", "clone", "split", "slice"),
    "sums over tokens": ("sum",),
    "multiply, add": ("mul", "add", "lerp", "sub"),
    "squares, means, roots (q/k norm)": ("pow", "mean", "rsqrt", "rms_norm", "linalg_vector_norm"),
}


class Tiles:
    """Encoded tiles at random, as the training loop indexes them."""

    def __init__(self, recipe: Recipe, pipeline: TODSynthPipeline) -> None:
        side, channels = recipe.data.image_size // pipeline.factor, pipeline.transformer.config.in_channels
        embeds, pooled = pipeline.prompts([""])
        size = recipe.data.image_size
        mask = torch.randint(WORLD_SCHEMA.num_classes, (size // 16, size // 16), dtype=torch.uint8)
        self.item = {
            "latents": torch.randn(channels, side, side),
            "mask": mask.repeat_interleave(16, 0).repeat_interleave(16, 1),
            "prompt_embeds": embeds[0],
            "pooled": pooled[0],
        }

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        return self.item


def fastest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Shortest processor time of each in seconds; they alternate."""
    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first one warms up
        for name, function in functions.items():
            gc.collect()
            begun = time.process_time()
            function()
            taken = time.process_time() - begun
            best[name] = min(taken, best.get(name, float("inf")))
    return best


class Products(TorchDispatchMode):
    """Notes the shapes of the matrix products of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.mm.default, _aten.addmm.default):
            factors = args[-2:]
            self.seen[tuple((x.shape, x.stride(), x.dtype) for x in factors)] += 1
        return func(*args, **(kwargs or {}))

    def alone(self) -> tuple[float, float]:
        """Seconds of all of them, each alone at its fastest, and their operations."""
        seconds = operations = 0.0
        for ((left, *layout), (right, *other)), times in self.seen.items():
            a, b = (
                torch.empty_strided(shape, stride, dtype=dtype).normal_()
                for shape, (stride, dtype) in ((left, layout), (right, other))
            )
            repeats = max(5, int(2e8 / (left[0] * left[1] * right[1])))  # processor time has a resolution
            seconds += times * min(self._seconds(a, b) for _ in range(min(repeats, 40)))
            operations += times * 2 * left[0] * left[1] * right[1]
        return seconds, operations

    @staticmethod
    def _seconds(a: Tensor, b: Tensor) -> float:
        calls = 4
        begun = time.process_time()
        for _ in range(calls):
            a @ b
        return (time.process_time() - begun) / calls


def kernels(step: Callable[[], object]) -> dict[str, float]:
    """Seconds per kind of kernel in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    totals: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        if event.key.startswith("aten::"):
            name = event.key.removeprefix("aten::")
            kind = next((k for k, words in _KINDS.items() if any(word in name for word in words)), "other")
            totals[kind] += event.self_cpu_time_total / 1e6
    return dict(totals)


def help_seconds() -> float:
    """Processor time of `terrasynth --help`, shortest of five."""
    command = [sys.executable, "-m", "terrasynth", "--help"]
    taken = []
    for _ in range(5):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(taken)


def peak(function: Callable[[], object], held: Iterable[Tensor]) -> str:
    """MiB of tensors at the peak, `held` ones included."""
    with count(held) as needs:
        function()
    return f"{needs.peak / 2**20:.0f}"


def tensors(*modules: torch.nn.Module) -> list[Tensor]:
    return [x for module in modules for x in (*module.parameters(), *module.buffers())]


def training(recipe: Recipe, args: argparse.Namespace) -> list[Row]:
    """Forward and backward of the transformer, and the whole step around them."""
    config = recipe.generator.train
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, recipe.generator.trainable, gpu=False)
    pipeline.text_dropout, pipeline.mask_dropout = recipe.generator.text_dropout, recipe.generator.mask_dropout
    transformer, tiles, batch_size = pipeline.transformer, Tiles(recipe, pipeline), config.batch_size

    def inputs(rows: int) -> dict[str, Tensor]:
        embeds, pooled = pipeline.prompts([""] * rows)
        return {
            "hidden_states": tiles.item["latents"].repeat(rows, 1, 1, 1),
            "timestep": torch.rand(rows) * 1000,
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "mask_latents": pipeline.encode_masks(tiles.item["mask"].long().repeat(rows, 1, 1)),
        }

    batch, single = inputs(batch_size), inputs(1)

    def forward(given: dict[str, Tensor]) -> Tensor:
        with autocast(transformer.device, config.precision):
            return F.mse_loss(transformer(**given).sample.float(), given["hidden_states"])

    def network() -> None:
        forward(batch).backward()
        transformer.zero_grad()

    def one_by_one() -> None:
        for _ in range(batch_size):
            forward(single).backward()
        transformer.zero_grad()

    settings = config.model_copy(update={"steps": args.steps + 1, "checkpoint_every": 10**9, "warmup_steps": 1})
    steps: list[float] = []

    def whole() -> None:
        begun: list[float] = []

        def keys(step: int) -> list[Key]:
            begun.append(time.process_time())
            return [(i, step * batch_size + i) for i in range(batch_size * config.accumulate)]

        with tempfile.TemporaryDirectory() as folder:
            train(transformer, pipeline.training_loss, tiles, settings, Path(folder), seed=0, keys=keys)
        transformer.train()
        # The first call asks how many keys there are; the next begins the first step, which makes the moments.
        steps.extend(b - a for a, b in pairwise(begun[2:]))

    with torch.no_grad(), count() as counted:
        forward(batch)
    operations = 3 * flops(counted.operations)
    with Products() as products:
        network()
    alone, of_alone = products.alone()
    best = fastest({"network": network, "one by one": one_by_one, "whole": whole}, args.rounds)
    rate = of_alone / min(alone, products.alone()[0])
    optimizer, average = make_optimizer(transformer.named_parameters(), config), Average(transformer, 0.9)

    def step() -> None:
        forward(batch).backward()
        optimizer.step()
        transformer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    if args.profile:
        totals = kernels(network)
        print("| kernels of one profiled forward and backward | ms | share |\n|---|--:|--:|")
        for kind, taken in sorted(totals.items(), key=lambda item: -item[1]):
            print(f"| {kind} | {taken * 1e3:.0f} | {taken / sum(totals.values()):.1%} |")
        print()
    about = f"{operations / 1e9:.1f} GFLOP in {best['network'] * 1e3:.0f} ms; peak {rate / 1e9:.1f} GFLOP/s"
    memory = peak(step, [*tensors(transformer), *state, *average.values.values()])
    return [
        ("forward and backward: FLOP/s of the matmul peak", operations / best["network"] / rate, "≥ 0.75", about, ""),
        ("forward and backward, of a whole step", best["network"] / min(steps), "≥ 0.9", ms(min(steps)), memory),
        (f"{batch_size} samples at once, of one by one", best["network"] / best["one by one"], "",
         ms(best["one by one"]), peak(one_by_one, [*tensors(transformer), *state, *average.values.values()])),
    ]  # fmt: skip


def painting(recipe: Recipe, args: argparse.Namespace) -> list[Row]:
    """Images with and without steering, together and one by one."""
    pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, None, gpu=False)
    segmentor = parts.segmentor_of(recipe, WORLD_SCHEMA).eval()
    masks = Tiles(recipe, pipeline).item["mask"].long().repeat(8, 1, 1)
    steering = steering_for(recipe.steering, segmentor.loss)(masks)

    def paint(count: int, steering: Steering | None = None) -> None:
        arguments = TODSynthPipeline.sampling_arguments(recipe.sampling)
        pipeline(masks[:count], [""] * count, seeds=range(count), steering=steering, output_type="pt", **arguments)

    plain, steered, single = partial(paint, 8), partial(paint, 8, steering), partial(paint, 1)
    best = fastest({"plain": plain, "steered": steered, "single": single}, args.rounds)
    held = tensors(*parts.modules(pipeline), segmentor)
    what = f"painting 8 with CRFM, 4 of {recipe.sampling.steps} steps, of plain"
    return [
        (what, best["steered"] / best["plain"], "≤ 1.35", ms(best["steered"]), peak(steered, held)),
        ("painting 8 at once, of one by one", best["plain"] / 8 / best["single"], "",
         ms(best["plain"]), peak(plain, held)),
        ("painting 1", 1.0, "", ms(best["single"]), peak(single, held)),
    ]  # fmt: skip


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="training steps of a round")
    parser.add_argument("--profile", action="store_true", help="print the kernels of forward and backward as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    published = ["sampling.solver=euler", "sampling.steps=23", "steering.start=0", "steering.steps=4"]
    recipe = load_recipe(args.recipe, [*published, *args.set]).recipe
    rows = [*training(recipe, args), *painting(recipe, args)]
    rows.append(("`terrasynth --help`, in s", help_seconds(), "≤ 0.5", "", ""))
    print(
        f"{recipe.name}, {args.threads} thread(s), {recipe.data.image_size} px, batch "
        f"{recipe.generator.train.batch_size}, {recipe.generator.train.precision}\n"
    )
    print("| what | ratio | target | measured | MiB of tensors |\n|---|--:|--:|--:|--:|")
    for what, ratio, target, about, memory in rows:
        print(f"| {what} | {ratio:.2f} | {target} | {about} | {memory} |")


if __name__ == "__main__":
    main()
