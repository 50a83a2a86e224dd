"""Checkpoints: what they hold, and what happens when they are missing, damaged or foreign."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_dir
from terrasynth.recipe import TrainConfig
from terrasynth.training import checkpoint
from terrasynth.training.checkpoint import load_weights
from terrasynth.training.loop import make_optimizer, train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TERRASYNTH_QUIET", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


CONFIG = TrainConfig(steps=4, batch_size=4, checkpoint_every=2, ema_decay=0.9)


class Noise:
    def __len__(self) -> int:
        return 12

    def __getitem__(self, key):
        return {"image": torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(key[1]))}


def network(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 3))


def run(folder: Path, model: nn.Module | None = None, config: TrainConfig = CONFIG, **arguments) -> nn.Module:
    model = model or network()
    train(model, lambda batch: model(batch["image"]).square().mean(), Noise(), config, folder, seed=1, **arguments)
    return model


def stop_after_two(folder: Path) -> None:
    """Leaves a run with the checkpoint of step 2."""

    class Stop(Exception):
        pass

    def evaluate(step):
        if step == 3:
            raise Stop
        return {}

    with pytest.raises(Stop):
        run(folder, config=CONFIG.model_copy(update={"evaluate_every": 1}), evaluate=evaluate)
    assert checkpoint.latest(folder).name == "step-00000002"


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_checkpoint_holds_what_its_anatomy_says(tmp_path):
    run(tmp_path, evaluate=lambda step: {"score": step}, monitor="score")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last", "step-00000004"}
    last = tmp_path / "checkpoints/last"
    assert last.is_symlink()
    assert {path.name for path in last.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "best.safetensors",
        "state.json",
    }
    parameters = {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert load_file(last / "ema.safetensors").keys() == parameters | {"1.running_mean", "1.running_var"}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert load_file(last / "model.safetensors").keys() == parameters | buffers
    optimizer = load_file(last / "optimizer.safetensors")
    assert optimizer.keys() == {f"{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    assert optimizer["0.weight.step"] == 4
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == 4
    assert state["config"] == CONFIG.model_dump(mode="json")
    assert state["versions"]["torch"] == torch.__version__
    assert state["best"] == {"step": 4, "score": 4.0}
    # A hard link: the best weights take their space once.
    assert (tmp_path / "best.safetensors").samefile(last / "best.safetensors")


def test_weights_can_be_read_by_whoever_can_read_a_new_file(tmp_path):
    run(tmp_path)
    (tmp_path / "new").touch()
    for path in (tmp_path / "checkpoints/last").iterdir():
        assert path.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_restoring_puts_everything_back_to_the_bit_in_its_own_memory_layout(tmp_path):
    def parts():
        model = network().to(memory_format=torch.channels_last)
        return model, make_optimizer(model.named_parameters(), CONFIG)

    def step(model, optimizer):
        model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = parts()
    step(model, optimizer)
    checkpoint.save(tmp_path, model=model, optimizer=optimizer, ema=None, state={"step": 1})
    other, other_optimizer = parts()
    checkpoint.restore(tmp_path / "checkpoints/last", model=other, optimizer=other_optimizer, ema=None)
    moment = other_optimizer.state[other[0].weight]["exp_avg"]
    assert moment.stride() == other[0].weight.stride() == model[0].weight.stride()
    step(model, optimizer)
    step(other, other_optimizer)
    assert equal(model, other)


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Linear(3, 3, bias=False)
            self.out = nn.Linear(3, 3, bias=False)
            self.out.weight = self.into.weight
            self.register_buffer("table", torch.zeros(2), persistent=False)

    model = Tied()
    checkpoint.save_weights(tmp_path / "tied.safetensors", model)
    assert load_file(tmp_path / "tied.safetensors").keys() == {"into.weight"}
    other = Tied()
    load_weights(other, tmp_path / "tied.safetensors")
    assert torch.equal(other.out.weight, model.into.weight)


def test_a_failed_write_keeps_the_checkpoint_before_whole(tmp_path, monkeypatch):
    stop_after_two(tmp_path / "run")
    run(tmp_path / "straight")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/checkpoints/last").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = 1500
    assert any(len(content) > limit for content in before.values())

    def on_a_full_disk(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return atomic_dir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_dir", on_a_full_disk)
        try:
            with pytest.raises(TerraSynthError, match=r"step-00000004: no space to write") as caught:
                run(tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "what was there before is unchanged" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/checkpoints/last").iterdir()} == before
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"last", "step-00000002"}
    run(tmp_path / "run")
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/last/{name}.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_the_best_weights_take_their_space_once_after_a_resume_too(tmp_path):
    model = network()
    optimizer = make_optimizer(model.named_parameters(), CONFIG)
    best = tmp_path / "best.safetensors"
    checkpoint.save_weights(best, model)
    saved = checkpoint.save(tmp_path, model=model, optimizer=optimizer, ema=None, state={"step": 1})
    checkpoint.restore_best(saved, tmp_path)
    assert best.samefile(saved / best.name)
    before = best.read_bytes()
    with torch.no_grad():
        model[0].weight.zero_()
    checkpoint.save_weights(best, model)  # a better evaluation that no checkpoint followed
    assert (saved / best.name).read_bytes() == before != best.read_bytes()
    checkpoint.restore_best(saved, tmp_path)
    assert best.read_bytes() == before
    assert best.samefile(saved / best.name)
    assert {path.name for path in tmp_path.iterdir()} == {best.name, "checkpoints"}
    checkpoint.restore_best(None, tmp_path)
    assert not best.exists()


def test_it_goes_on_from_the_newest_folder_whatever_became_of_the_link(tmp_path):
    stop_after_two(tmp_path / "run")
    # As a copy that follows links, or a store that knows none, leaves it.
    shutil.copytree(tmp_path / "run", tmp_path / "copied")
    assert not (tmp_path / "copied/checkpoints/last").is_symlink()
    shutil.copytree(tmp_path / "run", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/checkpoints/last")
    expected = run(tmp_path / "run")
    for name in ("copied", "bare"):
        assert equal(run(tmp_path / name), expected)
        assert (tmp_path / name / "checkpoints/last").readlink() == Path("step-00000004")


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_an_error_and_never_a_new_run(tmp_path, name, damage):
    stop_after_two(tmp_path)
    file = tmp_path / "checkpoints/last" / name
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.write_bytes(pickle.dumps(print))
    with pytest.raises(TerraSynthError) as caught:
        run(tmp_path)
    assert name in str(caught.value)
    assert "to do:" in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "half", "cut"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(tmp_path, damage):
    stop_after_two(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    whole, damaged = tmp_path / "run/checkpoints/step-00000002", tmp_path / "run/checkpoints/step-99999999"
    shutil.copytree(whole, damaged)
    for file in damaged.iterdir():
        if damage == "empty" or (damage == "half" and file.name == "state.json"):
            file.unlink()
        elif damage == "cut" and file.name == "optimizer.safetensors":
            file.write_bytes(file.read_bytes()[:-20])
    assert checkpoint.latest(tmp_path / "run") == whole
    assert equal(run(tmp_path / "run"), run(tmp_path / "whole"))


def test_a_state_without_its_step_and_a_foreign_optimiser_state_are_named(tmp_path):
    stop_after_two(tmp_path)
    folder = tmp_path / "checkpoints/step-00000002"
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(json.dumps({k: v for k, v in json.loads(state).items() if k != "step"}))
    with pytest.raises(TerraSynthError, match=r"(?s)state\.json.*no step.*delete .*step-00000002 and run again"):
        run(tmp_path)
    (folder / "state.json").write_text(state)
    shutil.copy(folder / "model.safetensors", folder / "optimizer.safetensors")
    with pytest.raises(TerraSynthError, match=r"(?s)optimizer\.safetensors.*delete .*step-00000002 and run again"):
        run(tmp_path)


def test_the_state_of_another_program_is_refused(tmp_path):
    stop_after_two(tmp_path)
    (tmp_path / "checkpoints/last/state.json").write_text('{"global_step": 7}')
    with pytest.raises(TerraSynthError, match="terrasynth checkpoint 1"):
        run(tmp_path)


def test_weights_of_another_model_are_refused_before_any_is_copied(tmp_path):
    stop_after_two(tmp_path)
    wider = network(width=8)
    before = network(width=8)
    with pytest.raises(TerraSynthError) as caught:
        run(tmp_path, wider)
    message = str(caught.value)
    assert "0.weight: float32 [4, 3, 3, 3] -> float32 [8, 3, 3, 3]" in message
    assert "tensors differ" in message
    assert equal(wider, before)
    deeper = network().append(nn.Conv2d(1, 1, 1))
    with pytest.raises(TerraSynthError, match=r"3\.weight: absent -> float32 \[1, 1, 1, 1\]"):
        run(tmp_path, deeper)


def test_other_library_versions_are_allowed_with_a_warning(tmp_path):
    stop_after_two(tmp_path)
    path = tmp_path / "checkpoints/last/state.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.6.0"'))
    with pytest.warns(UserWarning, match=r"torch: 2\.6\.0 -> "):
        run(tmp_path)


def test_the_best_of_a_killed_sitting_is_no_part_of_the_next(tmp_path):
    checkpoint.save_weights(tmp_path / "best.safetensors", network())
    run(tmp_path, evaluate=lambda step: {"score": float("nan")}, monitor="score")
    assert not list(tmp_path.rglob("best.safetensors"))


def test_trained_weights_load_from_run_checkpoint_or_file(tmp_path):
    trained = run(tmp_path, evaluate=lambda step: {"score": -step}, monitor="score", config=CONFIG)
    last = tmp_path / "checkpoints/last"
    for source in (tmp_path, str(last), last.resolve()):
        average, plain = network(), network()
        load_weights(average, source)
        load_weights(plain, source, "model")
        for which, model in (("ema", average), ("model", plain)):
            for name, tensor in load_file(last / f"{which}.safetensors").items():
                assert torch.equal(model.state_dict()[name], tensor), (which, name)
        assert not torch.equal(average[1].running_mean, plain[1].running_mean)
        assert torch.equal(average[1].num_batches_tracked, plain[1].num_batches_tracked)
        assert not torch.equal(average[0].weight, plain[0].weight)
    best = network()
    load_weights(best, tmp_path / "best.safetensors")
    assert equal(best, trained)


def test_parameters_that_are_not_in_the_file_stay(tmp_path):
    save_file({"0.bias": torch.full((4,), 5.0)}, tmp_path / "bias.safetensors")
    model = network()
    load_weights(model, tmp_path / "bias.safetensors")
    assert model[0].bias.tolist() == [5.0] * 4
    assert torch.equal(model[0].weight, network()[0].weight)


def test_a_checkpoint_asked_for_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(TerraSynthError, match="there is no checkpoint here"):
        load_weights(network(), tmp_path)
    run(tmp_path, config=CONFIG.model_copy(update={"ema_decay": 0.0}))
    with pytest.raises(TerraSynthError, match="no moving average"):
        load_weights(network(), tmp_path)
    load_weights(network(), tmp_path, "model")
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(print))
    with pytest.raises(TerraSynthError, match="not a whole safetensors file"):
        load_weights(network(), tmp_path / "evil.safetensors")
