"""How much of a MM-DiT training step is matrix multiplication, and how fast it runs.

    python benchmarks/mmdit.py [--threads 1] [--qk-norm rms_norm] [--gate]

Prints the time of forward + backward against what this machine's own matrix multiplication would take for the same
operations, and where the rest goes. Operations are counted by hand: 2 per multiply-add, three times the forward pass
for a training step (inputs and weights are differentiated), without what attention recomputes in its backward pass.
Times are processor time, shortest of several repeats, so that a busy machine disturbs them little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from terrasynth.models import MaskMMDiT

WIDTH, HEADS, BLOCKS = 192, 6, 6
LATENT, CHANNELS, MASK_CHANNELS, PROMPT, POOLED = 32, 16, 96, 64, 64
IMAGE, MASK, TEXT = (LATENT // 2) ** 2, (LATENT // 2) ** 2, 16


def linear_shapes() -> list[tuple[int, int, int]]:
    """(tokens per sample, in, out) of every linear layer on tokens in one forward pass."""
    embed = [(IMAGE, 4 * CHANNELS, WIDTH), (MASK, 4 * MASK_CHANNELS, WIDTH), (TEXT, PROMPT, WIDTH)]
    per_token = [(WIDTH, WIDTH)] * 4 + [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]  # q k v out, feed-forward
    inner = [(n, a, b) for n in (IMAGE, MASK, TEXT) for a, b in per_token] * (BLOCKS - 1)
    last = [(IMAGE, a, b) for a, b in per_token]
    last += [(MASK, WIDTH, WIDTH)] * 2 + [(TEXT, WIDTH, WIDTH)] * 3  # keys and values; SD3's text asks as well
    return embed + inner + last + [(IMAGE, WIDTH, 4 * CHANNELS)]


def attention_shapes(gate: bool) -> list[tuple[int, int]]:
    """(queries, keys) of every attention in one forward pass."""
    both, everything = IMAGE + TEXT, IMAGE + TEXT + MASK
    shapes = [(everything, everything)] * (BLOCKS - 1) + [(both, everything)]
    return shapes + [(both, both)] * BLOCKS if gate else shapes


def best(function: Callable[[], object], repeats: int = 7) -> float:
    """Shortest processor time in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def matmul_seconds(batch: int) -> tuple[float, float]:
    """Time of the linear layers' multiplications alone, forward and both gradients, and their operations."""
    seconds: dict[tuple[int, int, int], float] = {}
    total = operations = 0.0
    for shape in linear_shapes():
        if shape not in seconds:
            n, a, b = shape
            x, y, w = torch.randn(batch * n, a), torch.randn(batch * n, b), torch.randn(b, a)
            seconds[shape] = best(lambda: x @ w.T) + best(lambda: y @ w) + best(lambda: y.T @ x)  # noqa: B023
        total += seconds[shape]
        operations += 3 * 2 * batch * shape[0] * shape[1] * shape[2]
    return total, operations


def attention_seconds(batch: int, gate: bool) -> tuple[float, float]:
    """Time of the attention kernels alone, forward and backward, and their operations."""
    seconds: dict[tuple[int, int], float] = {}
    total = operations = 0.0
    for shape in attention_shapes(gate):
        if shape not in seconds:
            q, k, v = (torch.randn(batch, n, HEADS, WIDTH // HEADS).transpose(1, 2) for n in (*shape, shape[1]))
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            out = torch.randn_like(q)
            seconds[shape] = best(lambda: F.scaled_dot_product_attention(q, k, v).backward(out))  # noqa: B023
        total += seconds[shape]
        operations += 3 * 4 * batch * shape[0] * shape[1] * WIDTH
    return total, operations


def kernels(step: Callable[[], object]) -> dict[str, float]:
    """Seconds per kind of kernel in one step."""
    kinds = {
        "linear layers": ("mm", "addmm", "mkldnn", "convolution"),
        "attention": ("flash",),
        "GELU": ("gelu",),
        "layer norm": ("layer_norm",),
        "concatenate, copy, fill": ("cat", "copy_", "fill_", "zero_", "clone", "split", "slice"),
        "sums over tokens": ("sum",),
        "multiply, add": ("mul", "add", "lerp", "sub"),
        "squares, means, roots (q/k norm)": ("pow", "mean", "rsqrt", "rms_norm"),
    }
    step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    totals: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        if event.key.startswith("aten::"):
            name = event.key.removeprefix("aten::")
            kind = next((k for k, parts in kinds.items() if any(part in name for part in parts)), "other")
            totals[kind] += event.self_cpu_time_total / 1e6
    return dict(totals)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--qk-norm", choices=["rms_norm"])
    parser.add_argument("--gate", action="store_true", help="with the per-head gate of a model that starts from SD3")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = MaskMMDiT(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=PROMPT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=LATENT // 2,
        qk_norm=args.qk_norm,
        mask_channels=MASK_CHANNELS,
        mask_gate=args.gate,
    )
    inputs = {
        "hidden_states": torch.randn(args.batch, CHANNELS, LATENT, LATENT),
        "timestep": torch.rand(args.batch) * 1000,
        "encoder_hidden_states": torch.randn(args.batch, TEXT, PROMPT),
        "pooled_projections": torch.randn(args.batch, POOLED),
        "mask_latents": torch.randn(args.batch, MASK_CHANNELS, LATENT, LATENT),
    }
    target = torch.randn_like(inputs["hidden_states"])

    def step() -> None:
        model.zero_grad()
        F.mse_loss(model(**inputs).sample, target).backward()

    step()
    times = [best(step, repeats=1) for _ in range(args.repeats)]
    seconds = min(times)
    linear, linear_ops = matmul_seconds(args.batch)
    attention, attention_ops = attention_seconds(args.batch, args.gate)
    operations = linear_ops + attention_ops
    rate = linear_ops / linear

    print(f"batch {args.batch}, {IMAGE} + {TEXT} + {MASK} tokens, width {WIDTH}, {BLOCKS} blocks")
    print(f"| {args.threads} thread(s) | GFLOP | ms | GFLOP/s |\n|---|--:|--:|--:|")
    for name, ops, time_taken in (
        ("matrix products of the linear layers", linear_ops, linear),
        ("attention kernels", attention_ops, attention),
        ("forward + backward", operations, seconds),
    ):
        print(f"| {name} | {ops / 1e9:.1f} | {time_taken * 1e3:.0f} | {ops / time_taken / 1e9:.1f} |")
    print(f"\nmedian of {len(times)} steps: {statistics.median(times) * 1e3:.0f} ms")
    print(f"share of the matmul peak: {operations / rate / seconds:.2f}")
    print(f"share of the step in matrix products and attention kernels: {(linear + attention) / seconds:.2f}")
    print("\n| kernels of one profiled step | ms | share |\n|---|--:|--:|")
    totals = kernels(step)
    for kind, share in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {share * 1e3:.0f} | {share / sum(totals.values()):.1%} |")


if __name__ == "__main__":
    main()
