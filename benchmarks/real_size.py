"""A training step and painting at the size of Stable Diffusion 3.5 medium, measured, against what the plan says.

    python benchmarks/real_size.py                 # 512 px, about 2.3 + 1 thousand million parameters: needs a GPU
    python benchmarks/real_size.py --size small    # the same code with a small SD3.5 at 256 px, on a processor too
    python benchmarks/real_size.py --set generator.trainable=mask --set generator.train.gradient_checkpointing=false

Weights are random: neither memory nor time depends on them. The plan is that of `terrasynth doctor --plan`, its times
for the speed that this machine shows between the repeats. Every stage runs in a process of its own. Memory is on a GPU
what PyTorch allocated at the peak, and on a processor by how much the process grew, from before the weights were made;
time is on a processor that of one thread (set OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from terrasynth.data.world import WORLD_SCHEMA
from terrasynth.planning import parts, stages
from terrasynth.planning.cards import here
from terrasynth.planning.footprint import seconds
from terrasynth.planning.plan import make_plan
from terrasynth.recipe_io import load_recipe

GIB = 2**30
#: What makes the published configuration small.
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 6,
        "num_attention_heads": 6,
        "caption_projection_dim": 384,
        "dual_attention_layers": [0, 1, 2],
        "joint_attention_dim": 512,
        "pooled_projection_dim": 384,
        "pos_embed_max_size": 64,
    },
    "vae": {"block_out_channels": [32, 64, 128, 128]},
    "text_encoder": {"hidden_size": 128, "intermediate_size": 512, "projection_dim": 128, "num_attention_heads": 2},
    "text_encoder_2": {"hidden_size": 256, "intermediate_size": 1024, "projection_dim": 256, "num_attention_heads": 4},
    "text_encoder_3": {"d_model": 512, "d_ff": 1024, "num_layers": 4, "num_heads": 8},
}


def small_base(folder: Path) -> Path:
    """A base model's folder with configurations and no weights."""
    published = parts.PUBLISHED / "stable-diffusion-3.5-medium.json"
    configurations = json.loads(published.read_text(encoding="utf-8"))
    for name, configuration in configurations.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({**configuration, **SMALL[name]}), encoding="utf-8")
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    return folder


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def grown() -> int:
    """Most bytes of this process since the last call of `forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(recipe: Any, stage: str, repeats: int) -> dict[str, Any]:
    """Peak bytes, seconds of the fastest repeat, and this machine's speed while they ran."""
    gpu = torch.cuda.is_available()
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads what a first product loads
    forget_peak()
    before = 0 if gpu else grown()
    with torch.device("cuda" if gpu else "cpu"):
        trainable = None if "paint" in stage else recipe.generator.trainable
        pipeline = parts.pipeline_of(recipe, WORLD_SCHEMA, trainable, gpu=gpu)
        segmentor = parts.segmentor_of(recipe, WORLD_SCHEMA).eval() if stage == "steered painting" else None
    if gpu or "paint" not in stage:
        for encoder in pipeline.text_encoders:
            encoder.to("meta")  # they have left by then
    if "paint" in stage:
        work = stages.paint(recipe, pipeline, recipe.sampling.batch_size, segmentor, gpu=gpu)
    else:
        on = recipe.generator.train.gradient_checkpointing == (stage == "training step")
        work = stages.train(recipe, pipeline, checkpointing=on, gpu=gpu)
    forget_peak()
    work()
    wait()
    peak = torch.cuda.max_memory_allocated() if gpu else grown() - before
    if not repeats:
        return {"peak": peak}
    # On a processor, of this process alone: others may be busy there.
    clock = time.perf_counter if gpu else time.process_time
    taken, speeds = [], []
    for _ in range(repeats):
        speeds.append(here()[0].speed)
        begun = clock()
        work()
        wait()
        taken.append(clock() - begun)
    fastest = {name: max(getattr(speed, name) for speed in speeds) for name in ("float32", "bfloat16", "memory")}
    return {"peak": peak, "seconds": min(taken), "speed": fastest}


def in_process(stage: str, more: list[str], environment: dict[str, str]) -> dict[str, Any] | None:
    """`measure` in a new process; None if its memory did not suffice."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--stage", stage]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        if "OutOfMemoryError" in done.stderr or done.returncode < 0:
            return None
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["medium", "small"], default="medium")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe sd35")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = []
        if args.size == "small":
            small = [
                f"generator.base={small_base(Path(folder) / 'base')}",
                "data.image_size=256",
                "generator.train.precision=auto",
            ]
        recipe = load_recipe("sd35", [*small, *args.set]).recipe
        if args.stage:
            print(json.dumps(measure(recipe, args.stage, args.repeats)))
            return
        card = here()[0]
        plan = make_plan(recipe, Path(), gpu=card.gpu)
    train, sampling = recipe.generator.train, recipe.sampling
    stages_of = {stage.name: stage for stage in plan.stages}
    planned = {
        "training step": stages_of["training step"],
        f"training step, {plan.choices[0].name}": plan.choices[0],
        "painting": stages_of[f"paint {sampling.batch_size}"],
        "steered painting": stages_of[f"paint {sampling.batch_size}, steered"],
    }
    print(
        f"{card.name}, torch {torch.__version__}; {recipe.data.image_size} px, {train.batch_size} x {train.accumulate} "
        f"samples a step, {train.precision}, trainable: {recipe.generator.trainable}, gradient checkpointing "
        f"{train.gradient_checkpointing}; {sampling.batch_size} image(s) in {sampling.steps} steps, "
        f"{recipe.steering.steps} of them steered, {sampling.precision}\n"
    )
    print("| stage | GiB planned | measured | ratio | s planned | measured | ratio |\n|---|--:|--:|--:|--:|--:|--:|")
    # Without this, freed memory would stay with the process of a processor.
    at_once = {} if card.gpu else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, stage in planned.items():
        measured = in_process(name, [], {})
        if measured is None:
            print(f"| {name} | {stage.peak / GIB:.2f} | out of memory |", flush=True)
            continue
        peak = (in_process(name, ["--repeats", "0"], at_once) or measured)["peak"] if at_once else measured["peak"]
        expected = seconds(stage.operations, type(card.speed)(**measured["speed"]))
        memory = f"{stage.peak / GIB:.2f} | {peak / GIB:.2f} | {stage.peak / peak:.2f}"
        times = f"{expected:.2f} | {measured['seconds']:.2f} | {expected / measured['seconds']:.2f}"
        print(f"| {name} | {memory} | {times} |", flush=True)


if __name__ == "__main__":
    main()
