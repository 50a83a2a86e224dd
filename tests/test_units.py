"""A unit of work survives a kill at any moment, has one worker at a time, and says which of its records is damaged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json, write_json
from terrasynth.training import checkpoint
from terrasynth.training.units import Clock, OutOfTime, Unit, do

STEPS = 3
CHANGES = ("open", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.rmdir")


def sitting(root: Path) -> Unit:
    """A unit that trains with a checkpoint a step, keeps the weights, and notes its steps in `root/steps`."""

    def work(folder: Path) -> float:
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
        checkpoint.tidy(folder)
        saved, step = checkpoint.latest(folder), 0
        if saved is not None:
            step = checkpoint.read_state(saved)["step"]
            checkpoint.restore(saved, model=model, optimizer=optimizer, ema=None)
        while step < STEPS:
            with (root / "steps").open("a") as file:
                file.write(f"{step}\n")
            model(torch.tensor([[1.0, step]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            checkpoint.save(folder, model=model, optimizer=optimizer, ema=None, state={"step": step})
        checkpoint.save_weights(folder / "model" / "weights.safetensors", model)
        return float(model.weight.detach().sum())

    root.mkdir(exist_ok=True)
    return do(root / "units", "train", {}, Clock(), work, scratch=("checkpoints",))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold a time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("unit.json", "seconds.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def killed(root: Path, change: int) -> bool:
    """A sitting in a process that dies right before its given change to the file system; False if it makes fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def crash(event, arguments):
            nonlocal count
            if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            count += 1
            if count == change:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(crash)
            sitting(root)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_before_any_change_to_the_file_system_it_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    # A killed process loses nothing that it handed to the system.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    expected = sitting(tmp_path / "straight")
    assert set(contents(expected.folder)) == {".lock", "model/weights.safetensors"}
    change, root = 1, tmp_path / "killed"
    while killed(root, change):
        unit = sitting(root)
        assert (unit.key, unit.result) == (expected.key, expected.result), change
        assert contents(unit.folder) == contents(expected.folder), change
        assert not (unit.folder / "checkpoints").exists(), change
        steps = (root / "steps").read_text().split()
        assert len(steps) <= STEPS + 1, f"killed before change {change}, it took the steps {steps}"
        shutil.rmtree(root)
        change += 1
    assert change > 40


def test_scratch_stays_until_the_unit_is_finished(tmp_path):
    def work(folder):
        (folder / "a" / "cache").mkdir(parents=True, exist_ok=True)
        if len(list(tmp_path.rglob("seconds.json"))) == 0:
            raise OutOfTime

    with pytest.raises(OutOfTime):
        do(tmp_path, "unit", {}, Clock(), work, scratch=("a/cache", "b"))
    assert len(list(tmp_path.glob("*/a/cache"))) == 1
    unit = do(tmp_path, "unit", {}, Clock(), work, scratch=("a/cache", "b"))
    assert (unit.folder / "a").is_dir()
    assert not (unit.folder / "a" / "cache").exists()


WORKER = """
import sys, time
from pathlib import Path
from terrasynth.training.units import Clock, do

def work(folder):
    print("at work", flush=True)
    time.sleep(60)

do(Path(sys.argv[1]), "unit", {}, Clock(), work)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", WORKER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "at work\n"
        (folder,) = tmp_path.iterdir()
        half = folder / f"half.incomplete-{first.pid}.png"
        half.touch()
        with pytest.raises(TerraSynthError, match="another run is working here") as caught:
            do(tmp_path, "unit", {}, Clock(), lambda folder: "second")
        assert caught.value.path == folder
        assert "--out" in str(caught.value.fix)
        assert half.exists()
        assert do(tmp_path, "another", {}, Clock(), lambda folder: "free").result == "free"
    finally:
        first.kill()
        first.wait()
    assert do(tmp_path, "unit", {}, Clock(), lambda folder: "second").result == "second"
    assert not half.exists()


def test_what_a_killed_run_left_half_written_goes_at_any_depth(tmp_path):
    def stopped(folder):
        for path in ("training", "dataset/images", "training/checkpoints/step-00000004.incomplete-7/deep"):
            (folder / path).mkdir(parents=True)
        for path in ("training/best.incomplete-7.safetensors", "dataset/images/1.incomplete-7.png", "dataset/kept.png"):
            (folder / path).touch()
        raise OutOfTime

    with pytest.raises(OutOfTime):
        do(tmp_path, "unit", {}, Clock(), stopped)
    unit = do(tmp_path, "unit", {}, Clock(), lambda folder: sorted(path.name for path in folder.rglob("*")))
    assert unit.result == [".lock", "checkpoints", "dataset", "images", "kept.png", "seconds.json", "training"]


@pytest.mark.parametrize("content", ["", '{"name": "unit", "res', "{}", "[1]", '{"result": 1, "seconds": null}'])
def test_a_damaged_stamp_is_named_and_deleting_it_computes_the_unit_again(tmp_path, content):
    unit = do(tmp_path, "unit", {}, Clock(), lambda folder: 1)
    stamp = unit.folder / "unit.json"
    stamp.write_text(content)
    with pytest.raises(TerraSynthError, match="damaged") as caught:
        do(tmp_path, "unit", {}, Clock(), lambda folder: 2)
    assert caught.value.path == stamp
    assert "delete this file and run the same command again" in str(caught.value)
    stamp.unlink()
    assert do(tmp_path, "unit", {}, Clock(), lambda folder: 2).result == 2


@pytest.mark.parametrize("content", ["", "1.", '"long"'])
def test_a_damaged_count_of_seconds_is_named_and_deleting_it_costs_only_the_count(tmp_path, content):
    unit = do(tmp_path, "unit", {}, Clock(), lambda folder: 1)
    (unit.folder / "unit.json").unlink()
    sittings = unit.folder / "seconds.json"
    assert read_json(sittings) == unit.seconds
    sittings.write_text(content)
    with pytest.raises(TerraSynthError, match=r"seconds\.json: .* damaged") as caught:
        do(tmp_path, "unit", {}, Clock(), lambda folder: 2)
    assert "only the time counted so far is lost" in str(caught.value)
    write_json(sittings, 100)
    assert do(tmp_path, "unit", {}, Clock(), lambda folder: 2).seconds > 100
