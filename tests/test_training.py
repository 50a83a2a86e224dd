"""The training loop against brute force, closed forms and itself, interrupted."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from terrasynth.errors import TerraSynthError
from terrasynth.recipe import TrainConfig
from terrasynth.training import loop, offload
from terrasynth.training.keys import hash63, mixed_keys, shuffled_keys
from terrasynth.training.loop import Average, learning_rate, make_optimizer, train
from terrasynth.training.precision import autocast


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


class Blobs:
    """Noise whose mean is the class: a function of the key alone."""

    def __init__(self, n: int = 20) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key):
        index, seed = key
        noise = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(seed))
        return {"image": noise + index % 3, "label": torch.tensor(index % 3)}


def network(*, plain: bool = False) -> nn.Sequential:
    """A small network; with dropout and batch norm unless `plain`."""
    torch.manual_seed(0)
    extra = [] if plain else [nn.BatchNorm2d(4), nn.Dropout(0.3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *extra, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def cross_entropy(model):
    return lambda batch: nn.functional.cross_entropy(model(batch["image"]), batch["label"])


def config(**values) -> TrainConfig:
    defaults = {"steps": 10, "batch_size": 4, "warmup_steps": 3, "log_every": 3, "checkpoint_every": 100}
    return TrainConfig(**{**defaults, "evaluate_every": 4, **values})


def run(folder: Path, settings: TrainConfig, *, plain: bool = False, seed: int = 7, **arguments):
    model = network(plain=plain)
    outcome = train(model, cross_entropy(model), Blobs(), settings, folder, seed=seed, **arguments)
    return model, outcome


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, object]:
    """Every file that a run leaves, apart from TensorBoard's and from the time it took."""
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            files[name] = str(path.readlink())
        elif path.name == "state.json":
            files[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.is_file() and not name.startswith("tensorboard"):
            files[name] = path.read_bytes()
    return files


def metric(step: int) -> dict[str, float]:
    return {"score": -abs(step - 5.0)}


# Resuming


@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_and_five_steps_equal_ten_to_the_bit(tmp_path, accumulate):
    settings = config(accumulate=accumulate, ema_decay=0.9, checkpoint_every=5)

    class Stop(Exception):
        pass

    def interrupted(step):
        if step == 8:
            raise Stop
        return metric(step)

    model, outcome = run(tmp_path / "straight", settings, evaluate=metric, monitor="score")
    with pytest.raises(Stop):
        run(tmp_path / "resumed", settings, evaluate=interrupted, monitor="score")
    assert (tmp_path / "resumed/checkpoints/last/state.json").exists()
    resumed, resumed_outcome = run(tmp_path / "resumed", settings, evaluate=metric, monitor="score")
    assert contents(tmp_path / "straight") == contents(tmp_path / "resumed")
    assert outcome.best == resumed_outcome.best
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_ten_sittings_of_one_step_equal_one_of_ten(tmp_path, capsys, monkeypatch):
    settings = config(ema_decay=0.9)
    run(tmp_path / "straight", settings)
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    for step in range(1, 10):
        _, outcome = run(tmp_path / "resumed", settings, max_minutes=0)
        assert (outcome.step, outcome.finished) == (step, False)
    assert "stopped after 0 minutes at step 9 of 10; run the same command again" in capsys.readouterr().err
    _, outcome = run(tmp_path / "resumed", settings, max_minutes=0)
    assert outcome.finished
    assert contents(tmp_path / "straight") == contents(tmp_path / "resumed")


def test_a_finished_run_returns_at_once(tmp_path):
    model, outcome = run(tmp_path, config(ema_decay=0.9))
    before = contents(tmp_path)

    def never(batch):
        raise AssertionError

    again = network()
    second = train(again, never, Blobs(), config(ema_decay=0.9), tmp_path, seed=7)
    assert (second.step, second.finished) == (10, True)
    assert second == outcome
    assert contents(tmp_path) == before
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from test_training import config, contents, metric, run

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a killed process loses nothing that it handed to the system
root = Path(sys.argv[1])
settings = config(steps=5, checkpoint_every=2, evaluate_every=3, log_every=2, ema_decay=0.9)
events = ("open", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.rmdir")

def sitting(folder):
    run(folder, settings, evaluate=metric, monitor="score")

def writes(event, arguments):
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return False
    return event in events and str(root) in str(arguments[0]) and "tensorboard" not in str(arguments[0])

def fork(folder, crash_at=0):
    if pid := os.fork():
        return pid
    count = 0
    def crash(event, arguments):
        nonlocal count
        if writes(event, arguments):
            count += 1
            if count == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(crash)
    try:
        sitting(folder)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

sitting(root / "warm-up")
start = time.monotonic()
sitting(root / "straight")
seconds = time.monotonic() - start
expected = contents(root / "straight")
folder = root / "killed"

points = 0
while True:  # before every single change to the file system
    points += 1
    code = wait(fork(folder, points))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert wait(fork(folder)) == 0
    assert contents(folder) == expected, (points, sorted(contents(folder)), sorted(expected))
    shutil.rmtree(folder)

kills = 0
generator = random.Random(0)
for attempt in range(4):  # at any moment, up to four times in a row
    shutil.rmtree(folder)
    for _ in range(4):
        pid = fork(folder)
        time.sleep(generator.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
    assert wait(fork(folder)) == 0
    assert contents(folder) == expected, (attempt, sorted(contents(folder)), sorted(expected))
print(json.dumps({"points": points, "kills": kills}))
"""


def test_killed_at_any_moment_and_run_again_it_equals_an_uninterrupted_run(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["points"] > 40
    assert counts["kills"] > 0


def test_the_resume_guard_lists_every_difference(tmp_path):
    settings = config()
    run(tmp_path, settings, max_minutes=0, identity={"model": {"width": 8, "taps": (1, 2)}, "data": "abc"})
    changed = config(learning_rate=0.5, batch_size=8)
    with pytest.raises(TerraSynthError) as caught:
        run(tmp_path, changed, seed=8, identity={"model": {"width": 16, "taps": [1, 2]}, "data": "abc", "new": 1})
    message = str(caught.value)
    for line in (
        "seed: 7 -> 8",
        "config.learning_rate: 0.001 -> 0.5",
        "config.batch_size: 4 -> 8",
        "identity.model.width: 8 -> 16",
        "identity.new: (not set) -> 1",
        "--out",
        f"delete {tmp_path}",
    ):
        assert line in message
    assert message.count(" -> ") == 5


def test_settings_that_change_no_weight_may_change(tmp_path):
    model, _ = run(tmp_path / "straight", config())
    run(tmp_path / "resumed", config(), max_minutes=0)
    harmless = config(checkpoint_every=1, log_every=1, evaluate_every=9, gradient_checkpointing=True)
    resumed, outcome = run(tmp_path / "resumed", harmless)
    assert outcome.finished
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    run(tmp_path / "monitored", config(), evaluate=metric, monitor="score", max_minutes=0)
    with pytest.raises(TerraSynthError, match=r"config\.evaluate_every: 4 -> 9"):
        run(tmp_path / "monitored", config(evaluate_every=9), evaluate=metric, monitor="score")


def test_an_optimiser_in_main_memory_makes_the_same_model(tmp_path, monkeypatch):
    # Copies, as from a card: on a processor the twins are the parameters themselves.
    monkeypatch.setattr(offload, "_to_main_memory", torch.Tensor.clone)
    plain, _ = run(tmp_path / "plain", config(clip_norm=0.5))
    offloaded = config(clip_norm=0.5, offload_optimizer=True)
    run(tmp_path / "offloaded", offloaded, max_minutes=0)
    model, outcome = run(tmp_path / "offloaded", offloaded)
    assert outcome.finished
    assert log(tmp_path / "offloaded") == log(tmp_path / "plain")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # One that was begun with it goes on without, and the other way round.
    for first, second in ((config(), config(offload_optimizer=True)), (config(offload_optimizer=True), config())):
        folder = tmp_path / str(first.offload_optimizer)
        run(folder, first, max_minutes=0)
        model, _ = run(folder, second)
        for name, tensor in run(tmp_path / "whole", config())[0].state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casts_are_kept_unless_activations_are_not(tmp_path, monkeypatch, checkpointing):
    kept = []
    monkeypatch.setattr(loop, "autocast", lambda *given, keep_casts: kept.append(keep_casts) or autocast(*given))
    run(tmp_path, config(steps=4, gradient_checkpointing=checkpointing))
    assert kept == [not checkpointing] * 4


def test_the_random_state_of_the_caller_is_as_it_was(tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model = network()  # sets torch's seed
    states = (torch.get_rng_state(), *states[1:])
    train(model, cross_entropy(model), Blobs(), config(steps=2), tmp_path, seed=7)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


# Arithmetic


def brute_force(settings: TrainConfig, steps: int, seed: int) -> nn.Module:
    """The same run written out by hand in float64, from the definitions."""
    model = network(plain=True).double()
    keys = shuffled_keys(20, settings.batch_size, seed)
    data = Blobs()
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    beta1, beta2 = settings.betas
    for step in range(steps):
        samples = [data[key] for key in keys(step)]
        images = torch.stack([s["image"] for s in samples]).double()
        loss = nn.functional.cross_entropy(model(images), torch.stack([s["label"] for s in samples]))
        gradients = dict(zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        scale = min(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1.0
        rate = learning_rate(settings, step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = gradients[name] * scale
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g**2
                mean = first[name] / (1 - beta1 ** (step + 1))
                variance = second[name] / (1 - beta2 ** (step + 1))
                decay = settings.weight_decay if p.ndim >= 2 else 0.0
                p -= rate * (decay * p + mean / (variance.sqrt() + 1e-8))
    return model


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_the_loop_equals_adamw_written_out_by_hand(tmp_path, clip_norm):
    settings = config(steps=6, weight_decay=0.3, betas=(0.8, 0.95), clip_norm=clip_norm, learning_rate=0.02)
    model, _ = run(tmp_path, settings, plain=True)
    expected = brute_force(settings, 6, 7)
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-4, atol=2e-6, msg=name)


def test_two_micro_batches_equal_one_batch_of_twice_the_size(tmp_path):
    once, _ = run(tmp_path / "once", config(batch_size=8), plain=True)
    twice, _ = run(tmp_path / "twice", config(batch_size=4, accumulate=2), plain=True)
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for line, other in zip(log(tmp_path / "once"), log(tmp_path / "twice"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_learning_rate_warms_up_linearly_and_ends_in_zero():
    settings = config(steps=20, warmup_steps=4, learning_rate=0.1)
    assert [learning_rate(settings, step) for step in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert learning_rate(settings, 12) == pytest.approx(0.05)
    assert learning_rate(settings, 20) == pytest.approx(0.0)
    flat = config(steps=20, warmup_steps=0, schedule="constant", learning_rate=0.1)
    assert {learning_rate(flat, step) for step in range(20)} == {0.1}
    # A warm-up longer than the run never ends.
    assert learning_rate(config(steps=2, warmup_steps=4, learning_rate=0.1), 1) == pytest.approx(0.05)


def test_only_trainable_matrices_decay():
    model = network()
    model[0].weight.requires_grad = False
    decayed, others = make_optimizer(model.named_parameters(), config(weight_decay=0.2)).param_groups
    assert (decayed["weight_decay"], decayed["param_names"]) == (0.2, ["5.weight"])
    assert others["weight_decay"] == 0
    assert sorted(others["param_names"]) == ["0.bias", "1.bias", "1.weight", "5.bias"]


def test_frozen_parameters_stay_and_are_not_stored(tmp_path):
    model = network()
    model[0].weight.requires_grad = False
    before = model[0].weight.clone()
    train(model, cross_entropy(model), Blobs(), config(), tmp_path, seed=7)
    assert torch.equal(model[0].weight, before)
    stored = load_file(tmp_path / "checkpoints/last/model.safetensors")
    assert "0.weight" not in stored
    assert {"0.bias", "5.weight", "1.running_mean", "1.num_batches_tracked"} <= stored.keys()


def test_the_moving_average_equals_its_closed_form(tmp_path):
    model = network(plain=True)
    history: list[torch.Tensor] = []

    def loss(batch):
        history.append(model[-1].weight.detach().clone().double())
        return cross_entropy(model)(batch)

    train(model, loss, Blobs(), config(steps=12, ema_decay=0.4), tmp_path, seed=7)
    stored = tmp_path / "checkpoints/last"
    history.append(load_file(stored / "model.safetensors")["3.weight"].double())
    decays = [min(0.4, (1 + n) / (10 + n)) for n in range(12)]
    expected = math.prod(decays) * history[0]
    for n in range(12):
        expected = expected + (1 - decays[n]) * math.prod(decays[n + 1 :]) * history[n + 1]
    torch.testing.assert_close(model[-1].weight.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(model[-1].weight, load_file(stored / "ema.safetensors")["3.weight"])


def test_bf16_computes_in_bfloat16_over_float32_weights(tmp_path):
    seen = set()

    def make(half: bool):
        model = network(plain=True)
        if half:
            model.bfloat16()

        def loss(batch):
            logits = model(batch["image"])
            seen.add(logits.dtype)
            return nn.functional.cross_entropy(logits.float(), batch["label"])

        return model, loss

    model, loss = make(half=False)
    train(model, loss, Blobs(), config(precision="bf16", ema_decay=0.5), tmp_path / "a", seed=7)
    assert seen == {torch.bfloat16}
    for name in ("model", "ema", "optimizer"):
        tensors = load_file(tmp_path / f"a/checkpoints/last/{name}.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
    exact, _ = run(tmp_path / "b", config(ema_decay=0.5), plain=True)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert not torch.equal(p, q)
        torch.testing.assert_close(p, q, rtol=0.1, atol=5e-3)
    model, loss = make(half=True)
    train(model, loss, Blobs(), config(precision="bf16"), tmp_path / "c", seed=7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    model = network()

    def loss(batch):
        loss.calls += 1
        return cross_entropy(model)(batch) * (math.nan if loss.calls == 6 else 1)

    loss.calls = 0
    with pytest.raises(TerraSynthError) as caught:
        train(model, loss, Blobs(), config(checkpoint_every=4, clip_norm=None), tmp_path, seed=7, label="fitting")
    message = str(caught.value)
    for part in ("fitting", "loss nan", "at step 6", f"{learning_rate(config(), 5):.3g}", "step-00000004", "clip_norm"):
        assert part in message
    stored = load_file(tmp_path / "checkpoints/last/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    model = network(plain=True)

    def loss(batch):
        loss.calls += 1
        # sqrt(0) has value 0 and an infinite derivative
        trap = (model[0].weight * 0).sum().sqrt() if loss.calls == 4 else 0
        return cross_entropy(model)(batch) + trap

    loss.calls = 0
    with pytest.raises(TerraSynthError, match="gradient norm nan at step 4"):
        train(model, loss, Blobs(), config(checkpoint_every=2), tmp_path, seed=7)
    assert (tmp_path / "checkpoints/last").resolve().name == "step-00000002"


# The moving average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_statistics_of_batch_norms_are_averaged_like_the_weights(tmp_path, accumulate):
    model = network()
    seen, stats = [], ("running_mean", "running_var")

    def loss(batch):
        value = cross_entropy(model)(batch)
        seen.append({name: model[1].get_buffer(name).double() for name in stats})
        return value

    settings = config(ema_decay=0.3, accumulate=accumulate)
    train(model, loss, Blobs(), settings, tmp_path, seed=7)
    of_steps = seen[accumulate - 1 :: accumulate]
    assert len(of_steps) == 10
    for name, start in zip(stats, (0.0, 1.0), strict=True):
        average = torch.full((4,), start, dtype=torch.float64)
        for n, values in enumerate(of_steps):
            decay = min(0.3, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * values[name]
        # Nothing is monitored, so the average is what the run ends with.
        torch.testing.assert_close(model[1].get_buffer(name).double(), average, atol=1e-6, rtol=1e-6)
        key = f"1.{name}"
        assert torch.equal(load_file(tmp_path / "checkpoints/last/ema.safetensors")[key], model[1].get_buffer(name))
        trained = load_file(tmp_path / "checkpoints/last/model.safetensors")[key].double()
        torch.testing.assert_close(trained, of_steps[-1][name], atol=0, rtol=0)
        assert not torch.allclose(trained, average)
    assert model[1].num_batches_tracked == 10 * accumulate


def test_without_an_average_the_statistics_are_the_last_ones(tmp_path):
    model, _ = run(tmp_path, config())
    stored = load_file(tmp_path / "checkpoints/last/model.safetensors")
    assert torch.equal(model[1].running_mean, stored["1.running_mean"])


def test_an_exchange_of_averages_and_weights_is_undone_by_another():
    model = network()
    average = Average(model, 0.9)
    assert average.values.keys() == {*dict(model.named_parameters()), "1.running_mean", "1.running_var"}
    model(torch.randn(8, 3, 6, 6))
    average.update(5)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.values.items()}
    assert not torch.equal(trained["1.running_mean"], averaged["1.running_mean"])
    average.swap()
    for name, tensor in averaged.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    average.swap()
    for name, tensor in trained.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # What follows changes the statistics of the model, and leaves the averages as they are.
    model(torch.randn(8, 3, 6, 6))
    assert not torch.equal(model[1].running_mean, trained["1.running_mean"])
    for name, tensor in averaged.items():
        assert torch.equal(average.values[name], tensor), name


def test_frozen_weights_and_norms_without_statistics_have_no_average():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    model[0].weight.requires_grad = False
    names = {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert Average(model, 0.9).values.keys() == names


def test_automatic_precision_is_one_of_the_two(tmp_path):
    with autocast(torch.device("cpu"), "auto"):
        precision = "bf16" if torch.is_autocast_enabled("cpu") else "fp32"
    for name in ("auto", precision):
        run(tmp_path / name, config(steps=2, precision=name), plain=True)
    auto, chosen = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("auto", precision))
    assert all(torch.equal(auto[name], chosen[name]) for name in chosen)


# Evaluation and logs


def test_evaluation_sees_the_average_in_evaluation_mode_and_the_best_is_restored(tmp_path):
    model = network()
    seen = {}

    def evaluate(step):
        assert not model.training
        seen[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {"score": {4: 0.2, 8: 0.7}.get(step, math.nan), "other": 1}

    settings = config(ema_decay=0.9)
    outcome = train(
        model, cross_entropy(model), Blobs(), settings, tmp_path, seed=7, evaluate=evaluate, monitor="score"
    )
    assert list(seen) == [4, 8, 10]
    assert outcome.best == {"step": 8, "score": 0.7, "other": 1.0}
    for name, tensor in load_file(tmp_path / "best.safetensors").items():
        assert torch.equal(tensor, seen[8][name]), name
        assert torch.equal(tensor, model.state_dict()[name]), name
    stored = load_file(tmp_path / "checkpoints/last/ema.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, seen[10][name]), name
    trained = load_file(tmp_path / "checkpoints/last/model.safetensors")
    assert not torch.equal(trained["5.weight"], stored["5.weight"])


def test_evaluation_does_not_disturb_the_training(tmp_path):
    def noisy(step):
        torch.manual_seed(step)
        np.random.seed(step)
        return {}

    run(tmp_path / "without", config())
    run(tmp_path / "with", config(), evaluate=noisy)
    assert contents(tmp_path / "without") == contents(tmp_path / "with")


def test_the_log_holds_means_since_the_last_line_and_the_metrics(tmp_path):
    model = network()
    losses = []

    def loss(batch):
        value = cross_entropy(model)(batch)
        losses.append(value.item())
        return value

    settings = config(steps=10, log_every=4, evaluate_every=5)
    metrics = {5: {"score": 0.5}, 10: {"score": math.nan}}
    train(model, loss, Blobs(), settings, tmp_path, seed=7, evaluate=metrics.__getitem__, monitor="score")
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 10]
    assert lines[1] == {"step": 5, "score": 0.5}
    assert lines[4] == {"step": 10, "score": None}
    assert lines[2]["loss"] == pytest.approx(np.mean(losses[4:8]))
    assert lines[3]["loss"] == pytest.approx(np.mean(losses[8:]))
    assert list(lines[0]) == ["step", "loss", "gradient_norm", "learning_rate"]
    assert lines[0]["learning_rate"] == learning_rate(settings, 3)


def test_lines_beyond_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    run(tmp_path / "straight", config(log_every=1))
    for torn in ('{"step": 2, "loss": 9}\n', '{"step": 1', '{"step": 1}', "\0\0\0\n"):
        folder = tmp_path / str(abs(hash(torn)))
        run(folder, config(log_every=1), max_minutes=0)
        with (folder / "log.jsonl").open("a") as file:
            file.write(torn)
        run(folder, config(log_every=1))
        assert log(folder) == log(tmp_path / "straight")


def test_tensorboard_holds_the_same_numbers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, config(), evaluate=metric)
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {line["step"]: line["loss"] for line in log(tmp_path) if "loss" in line}
    assert {e.step: pytest.approx(e.value) for e in board.Scalars("loss")} == losses
    assert [e.step for e in board.Scalars("score")] == [4, 8, 10]


# Data


def test_worker_processes_change_nothing(tmp_path):
    keys = shuffled_keys(20, 8, 7)
    # A dict is a dataset too, and one that a worker process can unpickle without importing this module.
    samples = {key: Blobs()[key] for step in range(3) for key in keys(step)}
    for workers in (0, 2):
        model = network()
        settings = config(steps=3, accumulate=2, workers=workers)
        train(model, cross_entropy(model), samples, settings, tmp_path / str(workers), seed=7, keys=keys)
    none, two = contents(tmp_path / "0"), contents(tmp_path / "2")
    states = [files.pop("checkpoints/step-00000003/state.json") for files in (none, two)]
    assert none == two
    assert [state["config"].pop("workers") for state in states] == [0, 2]
    assert states[0] == states[1]


def test_each_batch_holds_its_seeds(tmp_path):
    model = network()
    seeds = []

    def loss(batch):
        seeds.append(batch["seed"])
        return cross_entropy(model)(batch)

    train(model, loss, Blobs(), config(steps=3), tmp_path, seed=7)
    keys = shuffled_keys(20, 4, 7)
    assert seeds[0].dtype == torch.int64
    assert [s.tolist() for s in seeds] == [[seed for _, seed in keys(step)] for step in range(3)]


def test_own_keys_are_used_and_their_number_is_checked(tmp_path):
    model = network()
    labels = []

    def loss(batch):
        labels.append(batch["label"].tolist())
        return cross_entropy(model)(batch)

    def keys(step):
        return [(i, step) for i in range(4)]

    train(model, loss, Blobs(), config(steps=1, batch_size=2, accumulate=2), tmp_path / "a", seed=7, keys=keys)
    assert labels == [[0, 2], [1, 0]]
    with pytest.raises(ValueError, match=r"global_batch\(config\) = 3"):
        train(model, loss, Blobs(), config(batch_size=3), tmp_path / "b", seed=7, keys=keys)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**40))
def test_every_epoch_of_keys_visits_each_sample_once(n, batch, seed):
    keys = shuffled_keys(n, batch, seed)
    epochs = 3
    steps = math.ceil(epochs * n / batch)
    stream = [key for step in range(steps) for key in keys(step)]
    for epoch in range(epochs):
        assert sorted(index for index, _ in stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len({seed for _, seed in stream}) == len(stream)
    assert all(0 <= seed < 2**63 for _, seed in stream)
    # Pure: any step, in any order, from a fresh stream.
    assert shuffled_keys(n, batch, seed)(steps - 1) == keys(steps - 1)


def test_keys_never_change_between_versions():
    # Golden numbers: with them, a run can be repeated on any later version.
    assert shuffled_keys(10, 4, 0)(2) == [
        (2, 2277229716504528119),
        (0, 1712428814379386864),
        (1, 3859625360854431110),
        (6, 4615849632712393873),
    ]
    assert hash63(1, 2, 3) == 7510213797696614745
    assert hash63(0) != hash63(0, 0)


def test_orders_and_seeds_look_random():
    orders = np.array([[i for i, _ in shuffled_keys(8, 8, seed)(epoch)] for seed in range(50) for epoch in range(40)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    # chi-square with 49 degrees of freedom: 95 is far beyond the 99.9th percentile (85)
    assert ((counts - 250) ** 2 / 250).sum() < 95
    bits = np.array(
        [[seed >> b & 1 for b in range(63)] for step in range(500) for _, seed in shuffled_keys(8, 8, 0)(step)]
    )
    assert np.abs(bits.mean(0) - 0.5).max() < 0.04


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 20), batch=st.integers(2, 16), fraction=st.floats(0.05, 0.95))
def test_mixed_batches_hold_the_asked_share_of_real_tiles(n, m, batch, fraction):
    real = round(fraction * batch)
    if real in (0, batch):
        with pytest.raises(TerraSynthError, match="batch_size"):
            mixed_keys(n, m, batch, fraction, 0)
        return
    keys = mixed_keys(n, m, batch, fraction, 0)
    batches = [[index for index, _ in keys(step)] for step in range(40)]
    assert all(sum(index < n for index in indices) == real for indices in batches)
    for low, high, per in ((0, n, real), (n, n + m, batch - real)):
        stream = [index for indices in batches for index in indices if low <= index < high]
        for epoch in range(40 * per // (high - low)):
            assert sorted(stream[epoch * (high - low) : (epoch + 1) * (high - low)]) == list(range(low, high))


def test_nothing_to_train_on_is_an_error(tmp_path):
    model = network()
    with pytest.raises(TerraSynthError, match="nothing to train on"):
        train(model, cross_entropy(model), Blobs(0), config(), tmp_path, seed=7)
