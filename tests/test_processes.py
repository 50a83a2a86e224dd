"""Training in several real processes, as `torchrun` and `accelerate launch` start them, against training in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from terrasynth.cli import app
from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import GeneratorConfig
from terrasynth.systems.todsynth import TODSynthPipeline
from terrasynth.training.loop import train
from test_training import config, contents, log, metric, run

HERE = Path(__file__).parent
#: batch_size x accumulate: what two and three processes can not share evenly, and what they get in unequal parts.
UNEVEN = {"one part": {"batch_size": 7}, "parts": {"batch_size": 2, "accumulate": 3}}
#: (scheme, trainable, gate): whatever trains must get a gradient in every process.
VARIANTS = [
    ("unified", "all", False),
    ("unified", "image+mask", True),
    ("unified", "lora", True),
    ("siamese", "mask", True),
    ("adapter", "all", False),
    ("controlnet", "all", False),
]


class Latents:
    """Latents, masks and prompts at random, a function of the key alone."""

    def __len__(self):
        return 8

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key[1])
        return {
            "latents": torch.randn(16, 8, 8, generator=generator),
            "mask": torch.randint(0, 3, (32, 32), generator=generator, dtype=torch.uint8),
            "prompt_embeds": torch.randn(32, 64, generator=generator),
            "pooled": torch.randn(64, generator=generator),
        }


def train_variant(folder, control, trainable, gate):
    """Two steps of a generator that loses half of its conditions; a process may lose all of its mask or text."""
    schema = LabelSchema(("land", "water", "road"), ((9, 9, 9), (0, 0, 255), (255, 255, 255)))
    settings = GeneratorConfig(width=32, heads=2, blocks=2, control=control)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipeline = TODSynthPipeline.from_scratch(settings, images, schema, "{classes}", ["land"])
    if gate:
        pipeline.transformer = type(pipeline.transformer)(**{**pipeline.transformer.config, "mask_gate": True})
        torch.manual_seed(0)
        pipeline.transformer.initialize_from_scratch()
    torch.manual_seed(0)
    pipeline.transformer.set_trainable(trainable, lora_rank=4)
    pipeline.text_dropout = pipeline.mask_dropout = 0.5
    training = config(steps=2, batch_size=4, log_every=1, gradient_checkpointing=True)
    train(pipeline.transformer, pipeline.training_loss, Latents(), training, folder, seed=3)


def name(variant):
    return "-".join(str(part) for part in variant).replace("+", "-")


# Forked after the imports, which take longer than everything else here.
TOGETHER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch.distributed import TCPStore
torch.set_num_threads(1)
from test_processes import UNEVEN, VARIANTS, config, metric, name, run, train_variant
from terrasynth.cli import _every_process
from terrasynth.errors import TerraSynthError
from terrasynth.training.processes import process_state
root = Path(sys.argv[1])

def launch(count, work):
    # The launcher keeps the store and outlives them all, as torchrun and accelerate do.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    children = []
    for rank in range(count):
        if pid := os.fork():
            children.append(pid)
            continue
        os.environ |= {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with _every_process():
            work()
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]

def train_all():
    for kind, sizes in UNEVEN.items():
        settings = config(**sizes, ema_decay=0.5)
        run(root / kind, settings, plain=True, evaluate=metric, monitor="score")
        for folder in ("begun for one", "begun for three"):
            for _ in range(2):
                run(root / f"{kind} {folder}", settings, plain=True, evaluate=metric, monitor="score", max_minutes=0)
    for variant in VARIANTS:
        train_variant(root / name(variant), *variant)

def go_on_then_fail():
    for kind, sizes in UNEVEN.items():
        settings = config(**sizes, ema_decay=0.5)
        run(root / f"{kind} begun for three", settings, plain=True, evaluate=metric, monitor="score")
    if process_state().process_index == 1:
        raise TerraSynthError("a tile is damaged", path="tiles/7.png")
    process_state().wait_for_everyone()

def begin_with_fewer_samples():
    run(root / "refused", config(batch_size=1))

def stop():
    if process_state().process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    process_state().wait_for_everyone()

works = ((2, train_all), (3, go_on_then_fail), (2, stop), (2, begin_with_fewer_samples))
print(json.dumps([launch(count, work) for count, work in works]))
"""


def environment():
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TERRASYNTH_QUIET": "", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes train, what three make of their checkpoints, and how these end when one of them fails."""
    root = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-c", TOGETHER, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=True)
    return root, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


def assert_same_training(one, other):
    """Same log, weights, moments, averages and best weights, but for the rounding of sums in another order."""
    assert len(log(one)) == len(log(other)) > 0
    for line, expected in zip(log(one), log(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors")) != []
    for file in files:
        expected = load_file(other / file)
        for key, tensor in load_file(one / file).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-5, msg=lambda text: f"{file}: {text}")  # noqa: B023


@pytest.mark.parametrize("kind", UNEVEN)
def test_two_processes_train_as_one_does_on_the_same_batches(together, alone, kind):
    root, codes, printed = together
    assert codes[0] == [0, 0], printed
    run(alone, config(**UNEVEN[kind], ema_decay=0.5), plain=True, evaluate=metric, monitor="score")
    assert_same_training(alone, root / kind)
    assert contents(alone).keys() == contents(root / kind).keys()


@pytest.mark.parametrize("kind", UNEVEN)
def test_what_two_began_one_and_three_finish(together, alone, kind, capsys, monkeypatch):
    root, _, printed = together
    settings = config(**UNEVEN[kind], ema_decay=0.5)
    run(alone, settings, plain=True, evaluate=metric, monitor="score")
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    run(root / f"{kind} begun for one", settings, plain=True, evaluate=metric, monitor="score")
    assert "goes on in 1 process(es) after 2" in capsys.readouterr().err
    assert printed.count("goes on in 3 process(es) after 2") == len(UNEVEN)
    for folder in ("begun for one", "begun for three"):
        assert_same_training(alone, root / f"{kind} {folder}")


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_every_variant_of_the_network_trains_in_two_processes_as_in_one(together, alone, variant):
    train_variant(alone, *variant)
    assert_same_training(alone, together[0] / name(variant))


def test_the_fault_of_one_process_ends_all_and_is_told_once(together):
    _, codes, printed = together
    assert codes[1] == [2, 2, 2]
    assert printed.count("tiles/7.png: a tile is damaged") == 1


def test_one_process_that_is_told_to_stop_ends_all(together):
    _, codes, printed = together
    assert codes[2] == [2, 128 + signal.SIGTERM]
    assert printed.count("Process 1 was told to stop (SIGTERM)") == 1


def test_the_same_fault_of_all_processes_is_told_once(together):
    _, codes, printed = together
    assert codes[3] == [2, 2]
    assert printed.count("2 processes, batch_size x accumulate = 1") == 1


def test_a_run_is_begun_by_no_more_processes_than_samples(alone, monkeypatch):
    from terrasynth.training import loop

    class Three:
        num_processes, process_index, is_main_process = 3, 0, True

    monkeypatch.setattr(loop, "process_state", Three)
    with pytest.raises(TerraSynthError, match=r"3 processes, batch_size x accumulate = 2"):
        run(alone, config(batch_size=2))


def test_the_command_line_trains_in_two_processes_and_says_so_once(alone, tiny_recipe):
    recipe = alone / "tiny.yaml"
    values = tiny_recipe.model_dump(mode="json", include={"name", "data", "generator", "sampling", "steering"})
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    single = CliRunner().invoke(app, ["train", str(recipe), "--out", str(alone / "one")])
    assert single.exit_code == 0, single.output
    # Not `--cpu`: accelerate would start one process and say nothing.
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
    module = ("--mixed_precision=no", "--dynamo_backend=no", "-m", "terrasynth", "train", str(recipe), "--out")
    command = [sys.executable, "-m", *launcher, *module]
    limits = {"capture_output": True, "text": True, "env": environment(), "timeout": 300, "check": False}
    done = subprocess.run([*command, str(alone / "two")], **limits)
    assert done.returncode == 0, done.stderr
    assert done.stdout == single.stdout.replace(str(alone / "one"), str(alone / "two"))
    (one,), (two,) = (list((alone / name).glob("generator-*")) for name in ("one", "two"))
    assert one.name == two.name
    assert_same_training(one, two)
    assert contents(one).keys() == contents(two).keys()
    assert json.loads((two / "unit.json").read_text())["name"] == "generator"
