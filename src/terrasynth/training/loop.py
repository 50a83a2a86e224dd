"""The one training loop: for generators, segmentors and whatever comes next.

It owns the optimiser, the schedule, mixed precision, processes, the moving average, checkpoints, logs and progress; the
caller brings a model, a dataset and a loss. It is exactly resumable because nothing random outlives a step: which
samples enter step n, their seeds (`training.keys`) and the state of the global generators of torch, numpy and Python
(for dropout layers) are functions of (run seed, n). So a checkpoint holds no random state, and on one machine and one
set of library versions, a CPU run that was interrupted equals one that was not, bit for bit.

The samples of a step are a matter of the settings, how many processes share them one of the launch: a run may go on in
more processes or in fewer than it was begun with. Its gradients differ by rounding, except where samples look at each
other (batch norm) or the global generators are used.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, full_disk, remove_incomplete
from terrasynth.progress import say, track
from terrasynth.recipe import HARMLESS, TrainConfig
from terrasynth.training import checkpoint
from terrasynth.training.keys import Key, KeyedDataset, hash63, mixed_keys, sequenced_keys, shuffled_keys
from terrasynth.training.offload import Twins
from terrasynth.training.precision import autocast
from terrasynth.training.processes import process_state

__all__ = ["Key", "Outcome", "global_batch", "learning_rate", "mixed_keys", "sequenced_keys", "shuffled_keys", "train"]

#: What may differ when a run goes on: it changes no weight, or (the processes) by rounding alone.
_HARMLESS = frozenset(f"config.{key}" for key in HARMLESS) | {"processes"}
#: Every process holds the whole model.
_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)

# Streams of random numbers, apart from those of `training.keys`.
_TRAINING, _EVALUATION = 11, 12


@dataclass(frozen=True)
class Outcome:
    """How a training run stands.

    Attributes:
        step: optimiser steps done.
        finished: whether that is all of them; the model then holds the final weights.
        best: `step` and metrics of the best evaluation, if a metric is monitored.
        seconds: wall time over all sittings; what a killed one did after its last checkpoint is not counted.
    """

    step: int
    finished: bool
    best: dict[str, float] | None
    seconds: float


def global_batch(config: TrainConfig) -> int:
    """Samples per optimiser step, over all micro-batches and processes: the number of keys of a step."""
    return config.batch_size * config.accumulate


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update from `step` to `step + 1`.

    Linear warm-up over w = `warmup_steps`: peak (step + 1) / w. Then the peak, or half a cosine that ends in zero at
    `steps`: peak (1 + cos(pi (step - w) / (steps - w))) / 2.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup))) / 2


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over those of some parameters that are trained; weight decay on two or more dimensions only."""
    trained = [(name, p) for name, p in named if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel is about three times as fast as the default one, on the CPU as well.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


class Average:
    """Exponential moving average of the trainable parameters: a <- d a + (1 - d) p.

    The decay of update n (from 0) is d = min(decay, (1 + n) / (10 + n)), so that the average soon forgets the
    initialisation. The running statistics of batch norms are averaged alike: those of the last ten batches do not fit
    weights averaged over hundreds, and a segmentor's accuracy would jump from one evaluation to the next.

    Attributes:
        values: the averages by the names of parameters and statistics.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                self._parameters |= {
                    f"{name}.{stat}": module.get_buffer(stat) for stat in ("running_mean", "running_var")
                }
        self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    def update(self, n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(list(self.values.values()), list(self._parameters.values()), n)

    def swap(self) -> None:
        """Exchange averages and parameters, without a copy."""
        for name, parameter in self._parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data


class _Objective(nn.Module):
    """The loss as a module around the model: gradients are averaged over processes only if a module's forward ran."""

    def __init__(self, model: nn.Module, loss: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.loss(batch)


class _Log:
    """`log.jsonl`, and TensorBoard beside it where that is installed."""

    def __init__(self, folder: Path, step: int, enabled: bool) -> None:
        """Open the log for appending; lines of steps beyond `step`, and one that was torn, are dropped."""
        self._file = self._board = None
        if not enabled:
            return
        path = folder / "log.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    beyond = json.loads(line)["step"] > step
                except ValueError:
                    break
                if beyond or not line.endswith(b"\n"):
                    break
                kept.append(line)
        with atomic_write(path) as partial:
            partial.write_bytes(b"".join(kept))
        self._file = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def line(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None or not values:
            return
        # NaN is no JSON; a metric that is undefined is null.
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with full_disk(self._file.name):
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make the lines as durable as the checkpoint that follows."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _seed(device: torch.device, *values: int) -> None:
    """Set the global generators. `torch.manual_seed` would do, but takes 0.1 ms to ask every kind of device."""
    seed = hash63(*values)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Put the caller's global generators back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _deal(keys: Sequence[Key], config: TrainConfig, process: PartialState) -> list[list[Key]]:
    """This process's micro-batches of a step: its share of the keys, in parts of at most `batch_size`."""
    mine = keys[process.process_index :: process.num_processes]
    count = math.ceil(len(mine) / config.batch_size)
    return [list(mine[micro::count]) for micro in range(count)]


def _batches(
    dataset: Any, config: TrainConfig, keys: Callable[[int], Sequence[Key]], start: int, state: PartialState
) -> Generator[dict[str, Any]]:
    """This process's micro-batches from step `start` to the end, in order, whatever the number of workers."""

    def deal() -> Iterator[list[Key]]:
        for step in range(start, config.steps):
            yield from _deal(keys(step), config, state)

    loader: DataLoader[Any] = DataLoader(
        KeyedDataset(dataset),  # type: ignore[arg-type]  # indexed by keys
        batch_sampler=deal(),
        num_workers=config.workers,
        # Forked workers inherit locked threads, of GDAL and OpenMP among others, and then hang.
        multiprocessing_context="spawn" if config.workers else None,
        pin_memory=state.device.type == "cuda",
    )
    for batch in loader:
        yield {
            name: value.to(state.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


class _Run:
    """The parts of a run and how far it came; `train` says in which order things happen.

    Attributes:
        micro_batches: of this process in every step.
        step: optimiser steps done.
        seconds: wall time over all sittings, up to the newest checkpoint.
        best: `step` and metrics of the best evaluation.
        recent: [loss, gradient norm] of the steps since the last line of the log.
        fresh: the same of the newest steps, still on the device: fetching them each step would make it wait.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[dict[str, Any]], Tensor],
        config: TrainConfig,
        folder: Path,
        seed: int,
        identity: Mapping[str, object],
        monitor: str | None,
        label: str,
    ) -> None:
        self.began = self.counted = time.monotonic()
        self.model, self.config, self.folder = model, config, folder
        self.seed, self.monitor, self.label = seed, monitor, label
        self.process = process_state()
        # Precision is handled in `update`: accelerate's would patch `model.forward`, and hold for the whole process.
        # Without the view, every gradient would lie in memory twice.
        views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[views])
        self.device: torch.device = self.accelerator.device
        self._check_launch()

        if config.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.trainable:
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        self.objective = self.accelerator.prepare(_Objective(model, loss))
        self.twins = Twins(model) if config.offload_optimizer else None
        self.optimizer = make_optimizer(self.twins.named.items() if self.twins else model.named_parameters(), config)
        self.average = Average(model, config.ema_decay) if config.ema_decay else None

        self.settings: dict[str, Any] = {
            "seed": seed,
            "processes": self.process.num_processes,
            "monitor": monitor,
            "config": config.model_dump(mode="json"),
            "identity": json.loads(json.dumps(dict(identity))),
        }
        self.micro_batches = len(_deal([(0, 0)] * global_batch(config), config, self.process))
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, float] | None = None
        self.recent: list[list[float]] = []
        self.fresh: list[Tensor] = []

    def _check_launch(self) -> None:
        batch, processes = global_batch(self.config), self.process.num_processes
        if self.accelerator.distributed_type not in _DATA_PARALLEL:
            raise TerraSynthError(
                f"{self.label}: every process trains a whole copy of the model, nothing else is supported",
                found=f"a launch for {self.accelerator.distributed_type.value}",
                expected="data-parallel processes",
                fix="launch with `torchrun`, or with `accelerate launch --multi_gpu`",
            )
        if batch < processes:
            raise TerraSynthError(
                f"{self.label}: there are more processes than samples in a step",
                found=f"{processes} processes, batch_size x accumulate = {batch}",
                expected="at least one sample for every process",
                fix=f"start at most {batch} processes, or raise accumulate",
            )

    def resume(self) -> None:
        """Clear up after a killed sitting and go on from the newest checkpoint, if there is one."""
        if self.process.is_main_process:
            remove_incomplete(self.folder)
            remove_incomplete(self.folder / "checkpoints")
            checkpoint.tidy(self.folder)
        self.process.wait_for_everyone()
        if self.process.is_main_process:
            checkpoint.restore_best(checkpoint.latest(self.folder), self.folder)
        self.process.wait_for_everyone()
        saved = checkpoint.latest(self.folder)
        self._check_shared(saved)
        if saved is None:
            return
        state = checkpoint.read_state(saved, (*self.settings, "step", "seconds", "best", "recent", "versions"))
        # How often it is evaluated matters only where the best is kept.
        harmless = _HARMLESS if self.monitor else _HARMLESS | {"config.evaluate_every"}
        checkpoint.check_resume(saved, {key: state[key] for key in self.settings}, self.settings, harmless)
        checkpoint.warn_of_versions(state)
        was, now = state["processes"], self.process.num_processes
        if was != now and self.process.is_main_process:
            say(f"{self.label}: it goes on in {now} process(es) after {was}, with the same samples in every step")
        averages = self.average.values if self.average else None
        checkpoint.restore(saved, model=self.model, optimizer=self.optimizer, ema=averages)
        if self.twins:
            self.twins.take_weights()
        self.step, self.seconds = state["step"], state["seconds"]
        self.best, self.recent = state["best"], state["recent"]

    def _check_shared(self, saved: Path | None) -> None:
        """Where processes saw different checkpoints, they would train from different steps, or wait for each other."""
        mine = saved.name if saved else "no checkpoint"
        main = broadcast_object_list([mine])[0]
        if mine != main:
            raise TerraSynthError(
                f"{self.label}: the processes do not see the same run",
                path=self.folder,
                found=f"{mine} here, {main} in the main process",
                expected="one folder that all machines share",
                fix="put the run on a shared file system (--out)",
            )

    def update(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimiser step."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        total = torch.zeros((), device=self.device)
        for micro in range(self.micro_batches):
            batch = next(batches)
            batch["step"] = self.step
            _seed(self.device, self.seed, _TRAINING, self.step, micro, self.process.process_index)
            # A sample counts the same wherever it is; the mean over processes is taken of the gradients.
            parts = global_batch(config) / (len(batch["seed"]) * self.process.num_processes)
            last = micro == self.micro_batches - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                # Checkpointed blocks round their weights twice; kept, they would be half as much memory as the weights.
                with autocast(self.device, config.precision, keep_casts=not config.gradient_checkpointing):
                    loss = self.objective(batch) / parts
                self.accelerator.backward(loss)
            total += loss.detach()
        if config.clip_norm is None:
            norm = get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        else:
            norm = clip_grad_norm_(self.trainable, config.clip_norm)
        if self.twins:
            self.twins.take_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.twins:
            self.twins.give_weights()
        if self.average:
            self.average.update(self.step)
        self.fresh.append(torch.stack((total, norm)))
        self.step += 1

    def settle(self) -> None:
        """Fetch the losses of the newest steps.

        Raises:
            TerraSynthError: one of them, or its gradient, is not finite.
        """
        if not self.fresh:
            return
        values = self.accelerator.reduce(torch.stack(self.fresh), "mean").tolist()
        self.fresh.clear()
        for step, (loss, norm) in enumerate(values, self.step - len(values) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, loss, norm)
        self.recent.extend(values)

    def _not_finite(self, step: int, loss: float, norm: float) -> TerraSynthError:
        whole = checkpoint.latest(self.folder)
        return TerraSynthError(
            f"{self.label}: the loss or its gradient is not finite",
            path=self.folder,
            found=f"loss {loss}, gradient norm {norm} at step {step}, "
            f"learning rate {learning_rate(self.config, step - 1):.3g}",
            expected=f"finite numbers; the last checkpoint ({whole.name if whole else 'none yet'}) is as it was",
            fix="lower learning_rate, raise warmup_steps, set clip_norm"
            + (" or precision: fp32" if self.config.precision == "bf16" else "")
            + f"; then start over in another folder (--out), or delete {self.folder}",
        )

    def log_losses(self, log: _Log) -> float:
        """Write the means since the last line; returns that of the loss."""
        losses, norms = zip(*self.recent, strict=True)
        mean, norm = sum(losses) / len(losses), sum(norms) / len(norms)
        rate = learning_rate(self.config, self.step - 1)
        log.line(self.step, {"loss": mean, "gradient_norm": norm, "learning_rate": rate})
        self.recent.clear()
        return mean

    def assess(self, evaluate: Callable[[int], Mapping[str, float]], log: _Log) -> None:
        """Evaluate with the moving average in place; keep the weights if they are the best so far."""
        self.model.eval()
        _seed(self.device, self.seed, _EVALUATION, self.step)
        if self.average:
            self.average.swap()
        try:
            metrics: dict[str, float] = {}
            if self.process.is_main_process:
                metrics = {name: float(value) for name, value in evaluate(self.step).items()}
            metrics = broadcast_object_list([metrics])[0]
            log.line(self.step, metrics)
            # Not `<=`: an undefined metric (NaN) is never the best.
            if self.monitor and metrics[self.monitor] > (self.best or {self.monitor: -math.inf})[self.monitor]:
                self.best = {"step": self.step, **metrics}
                if self.process.is_main_process:
                    checkpoint.save_weights(self.folder / "best.safetensors", self.model)
        finally:
            if self.average:
                self.average.swap()
            self.model.train()

    def save(self) -> None:
        """Write a checkpoint."""
        now = time.monotonic()
        self.seconds, self.counted = self.seconds + now - self.counted, now
        if self.process.is_main_process:
            checkpoint.save(
                self.folder,
                model=self.model,
                optimizer=self.optimizer,
                ema=self.average.values if self.average else None,
                state={
                    "step": self.step,
                    **self.settings,
                    "seconds": self.seconds,
                    "best": self.best,
                    "recent": self.recent,
                },
            )
        self.process.wait_for_everyone()


def train(
    model: nn.Module,
    loss: Callable[[dict[str, Any]], Tensor],
    dataset: Any,
    config: TrainConfig,
    folder: Path,
    *,
    seed: int,
    keys: Callable[[int], Sequence[Key]] | None = None,
    identity: Mapping[str, object] | None = None,
    evaluate: Callable[[int], Mapping[str, float]] | None = None,
    monitor: str | None = None,
    max_minutes: float | None = None,
    label: str = "training",
) -> Outcome:
    """Train `model` in `folder`; go on from the last checkpoint there, or return at once when it is finished.

    At the end, `model` is in evaluation mode and holds the final weights: those of the best evaluation if a metric is
    monitored, else the moving average if there is one, else the last ones.

    Args:
        model: what is trained; parameters with `requires_grad` in half precision are raised to float32 first.
        loss: batch -> scalar, by way of `model`. May use the global generators (dropout layers do); whatever must not
            depend on batch size and number of processes is drawn from the seeds in `batch["seed"]`, int64 (B,).
            `batch["step"]` is the number of the step, from 0.
        dataset: `dataset[(index, seed)]` is a dict that torch's `default_collate` can stack, a function of the key
            alone. The loop adds seed and step to it. With `workers` it is pickled.
        config: see `TrainConfig`. `gradient_checkpointing` calls the model's `enable_gradient_checkpointing`, if any.
        folder: of this run alone; see `training.checkpoint` for what is in it.
        seed: of the order of the samples, their seeds, and the global generators.
        keys: step -> the step's `global_batch(config)` keys; by default `shuffled_keys` over `len(dataset)`. Process r
            of w takes keys[r::w]; if these are a times `batch_size`, micro-batch m takes every a-th from m on.
        identity: what else must be the same for a run to go on (JSON-able): model settings, the data's fingerprint.
        evaluate: step -> metrics, called every `evaluate_every` steps and at the end on the main process, in evaluation
            mode, with the moving average in place of the weights, in full precision. May return nothing.
        monitor: the metric (higher is better) by which the best weights are chosen, kept in `best.safetensors`.
        max_minutes: stop after this time, at a checkpoint; at least one step is done.
        label: shown with the progress.

    Raises:
        TerraSynthError: the folder holds another run or a damaged checkpoint; loss or gradient is not finite; the disk
            is full. The last checkpoint stays whole.
    """
    run = _Run(model, loss, config, folder, seed, identity or {}, monitor, label)
    keys = keys or shuffled_keys(len(dataset), global_batch(config), seed)
    if len(keys(0)) != global_batch(config):
        raise ValueError(f"keys(0) has {len(keys(0))} keys, not global_batch(config) = {global_batch(config)}")
    run.resume()
    stopped = False
    if run.step < config.steps:
        with (
            _own_random_state(run.device),
            _Log(folder, run.step, run.process.is_main_process) as log,
            track(config.steps, label, done=run.step, quiet=not run.process.is_main_process) as progress,
            closing(_batches(dataset, config, keys, run.step, run.process)) as batches,
        ):
            model.train()
            while run.step < config.steps and not stopped:
                run.update(batches)
                end = run.step == config.steps
                if end or run.step % config.log_every == 0:
                    run.settle()
                    progress.advance(0, loss=run.log_losses(log))
                progress.advance()
                if evaluate and (end or run.step % config.evaluate_every == 0):
                    run.settle()
                    run.assess(evaluate, log)
                if max_minutes is not None and not end:
                    stopped = broadcast_object_list([time.monotonic() - run.began >= 60 * max_minutes])[0]
                if end or stopped or run.step % config.checkpoint_every == 0:
                    run.settle()
                    log.sync()
                    run.save()

    model.eval()
    if stopped and run.process.is_main_process:
        step = f"step {run.step} of {config.steps}"
        say(f"{label}: stopped after {max_minutes} minutes at {step}; run the same command again to go on")
    if not stopped and run.best:
        checkpoint.load_weights(model, folder / "best.safetensors")
    elif not stopped and run.average:
        run.average.swap()
    return Outcome(run.step, not stopped, run.best, run.seconds)
