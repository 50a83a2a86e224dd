import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from terrasynth import __version__
from terrasynth.cli import Commands, app
from terrasynth.errors import TerraSynthError
from terrasynth.recipe_io import load_recipe, packaged

COMMANDS = [
    "demo",
    "prepare",
    "train",
    "generate",
    "predict",
    "export",
    "curate",
    "audit",
    "study",
    "refine",
    "boundaries",
    "report",
    "recipe",
    "doctor",
]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_help_is_there_at_once():
    # What takes seconds to load is loaded when something is done; `benchmarks/speed.py` measures what is left.
    asked = "from terrasynth.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{asked}", "--help"], capture_output=True, text=True)
    assert "Usage" in done.stdout
    slow = {"torch", "numpy", "diffusers", "transformers", "rasterio", "scipy", "matplotlib", "pydantic", "PIL"}
    assert not slow & set(done.stderr.split())
    assert "typer" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_suffices_on_its_own(command):
    assert command in invoke("--help").output
    text = invoke(command, "--help").output
    assert f"Example: terrasynth {command}" in text


def test_version_is_that_of_the_package():
    assert invoke("--version").output == f"terrasynth {__version__}\n"
    module = subprocess.run(
        [sys.executable, "-m", "terrasynth", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == f"terrasynth {__version__}\n"


def test_recipe_without_a_name_lists_the_packaged_ones():
    lines = invoke("recipe").output.splitlines()
    assert [line.split()[0] for line in lines] == list(packaged())


def test_recipe_prints_what_loads_back(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(invoke("recipe", "demo").output, encoding="utf-8")
    assert load_recipe(path).recipe == load_recipe("demo").recipe


def test_a_printed_recipe_still_finds_its_label_schema_from_another_folder(tmp_path):
    from terrasynth.data.folder import load_tiles

    path = tmp_path / "mine.yaml"
    path.write_text(invoke("recipe", "dubai16").output, encoding="utf-8")
    for kind, color in (("images", "#123456"), ("masks", "#E2A929")):
        folder = tmp_path / "tiles" / kind / "train"
        folder.mkdir(parents=True)
        Image.new("RGB", (128, 128), color).save(folder / "a.png")
    loaded = load_recipe(path, ["data.train.list=null"], data=tmp_path / "tiles")
    tiles = load_tiles(loaded.recipe.data, "train", base=loaded.base)
    assert tiles.schema.names[tiles.masks[0, 0, 0]] == "water"


@pytest.mark.parametrize("command", [["train"], ["study"], ["generate"]])
def test_a_fault_is_a_message_and_exit_code_2(command):
    result = invoke(*command, "demo", "--set", "sampling.stepps=3")
    assert result.exit_code == 2
    assert "did you mean `sampling.steps`?" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_shards_belong_to_webdataset_alone(tmp_path):
    result = invoke("export", str(tmp_path), "--to", "mmseg", "--out", str(tmp_path / "out"), "--shard-size", "3")
    assert (result.exit_code, "only webdataset has shards" in result.stderr) == (2, True)


def test_a_typing_mistake_shows_before_torch_is_loaded():
    program = (
        "import os, sys; from terrasynth.cli import app; sys.argv = ['terrasynth', 'study', 'nope']\n"
        "try: app()\n"
        "except SystemExit as end: print(end.code, {'torch', 'diffusers'} & set(sys.modules) or 'none')\n"
        "print(os.environ['DIFFUSERS_DISABLE_REMOTE_CODE'])"  # which diffusers reads when it is imported
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "none", "1"]


def test_a_model_is_painted_for_given_masks_only(tmp_path):
    assert "--masks" in invoke("generate", str(tmp_path)).stderr
    result = invoke("generate", str(tmp_path), "--masks", str(tmp_path), "--set", "a=1")
    assert (result.exit_code, "sampling.… or steering.…" in result.stderr) == (2, True)
    result = invoke("generate", str(tmp_path), "--masks", str(tmp_path), "--run", str(tmp_path))
    assert (result.exit_code, "--run" in result.stderr) == (2, True)


@pytest.mark.parametrize("switched_off", [True, False], ids=["by our switch", "by diffusers' own refusal"])
@pytest.mark.parametrize(
    "index",
    [{"_class_name": ["evil", "Evil"]}, {"_class_name": "TODSynthPipeline", "transformer": ["evil", "Evil"]}],
    ids=["pipeline", "component"],
)
def test_code_in_the_folder_of_a_model_is_not_run(tmp_path, monkeypatch, index, switched_off):
    # What diffusers made of the environment when it was imported, here perhaps by another test.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.DIFFUSERS_DISABLE_REMOTE_CODE", switched_off)
    model, trace = tmp_path / "model", tmp_path / "trace"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.38.0", **index}))
    for folder in (model, model / "transformer"):
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    result = invoke("generate", str(model), "--masks", str(tmp_path))
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert ("remote code is disabled" if switched_off else "contains custom code in evil.py") in said, said
    assert not trace.exists()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (TerraSynthError("it is broken", fix="mend it"), 2, "it is broken\n  to do:    mend it\n"),
        (KeyboardInterrupt(), 130, "Interrupted. The same command goes on from here."),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "runs/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (OSError(errno.ENOTDIR, "Not a directory", "file/x"), 2, "file/x: Not a directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), 2, "xxx: File name too long"),
    ],
)
def test_what_a_user_can_mend_ends_in_words(raised, code, said):
    commands = typer.Typer(cls=Commands)

    @commands.callback()
    def group():
        pass

    @commands.command()
    def command():
        raise raised

    result = CliRunner().invoke(commands, ["command"])
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


def test_a_folder_that_can_not_be_made_ends_in_words(tmp_path):
    (tmp_path / "file").touch()
    commands = typer.Typer(cls=Commands)

    @commands.callback()
    def group():
        pass

    @commands.command()
    def command(out: Path):
        out.mkdir(parents=True, exist_ok=True)

    for out in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/none/x")):
        result = CliRunner().invoke(commands, ["command", str(out)])
        assert result.exit_code == 2
        assert "to do:" in result.stderr


def test_a_fault_of_ours_keeps_its_stack_trace():
    commands = typer.Typer(cls=Commands)

    @commands.callback()
    def group():
        pass

    @commands.command()
    def command():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    assert isinstance(CliRunner().invoke(commands, ["command"]).exception, FileNotFoundError)


def test_the_commands_follow_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = "{steps: 2, batch_size: 2, evaluate_every: 2, warmup_steps: 1}"
    tmp_path.joinpath("tiny.yaml").write_text(f"""
        name: tiny / recipe
        data: {{image_size: 32, world: {{train: 4, validation: 2, test: 2}}}}
        generator: {{width: 16, heads: 2, blocks: 1, views: 1, train: {training}}}
        sampling: {{steps: 2}}
        segmentor:
          encoder: tu-test_resnet
          options: {{encoder_depth: 3, decoder_channels: [16, 16, 8]}}
          train: {training}
        study:
          seeds: [0, 1]
          ratio: 1
          plateau_check: none
          arms: [{{name: real}}, {{name: synthetic, synthetic: plain}}]
    """)

    def run(*arguments):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    late = invoke("study", "tiny.yaml", "--max-minutes", "0")
    assert (late.exit_code, late.stdout) == (75, "")
    assert "The same command goes on from here" in late.stderr

    # How it is computed is no part of what it is: the study goes on with it, in the same folder.
    model = run("train", "tiny.yaml", "--set", "generator.train.offload_optimizer=true")[0]
    assert len(list(tmp_path.glob("runs/tiny-recipe/generator-*"))) == 1
    assert run("train", "tiny.yaml")[0] == model
    headline, page = run("study", "tiny.yaml")
    assert "mIoU" in headline
    assert page == "runs/tiny-recipe/report.html"
    assert run("report", "runs/tiny-recipe") == [page]
    assert run("study", "tiny.yaml") == [headline, page]

    (segmentor,) = tmp_path.glob("runs/tiny-recipe/cells/real-seed-0-*/segmentor")
    first = run("generate", "tiny.yaml", "--count", "2")[-1]
    options = ["--steer", str(segmentor), "--set", "sampling.steps=3", "--out", "painted"]
    again = run("generate", model, "--masks", f"{first}/masks", *options)[-1]
    row = json.loads((tmp_path / again / "metadata.jsonl").read_text().splitlines()[0])
    assert row["sampling"]["steps"] == 3
    assert (tmp_path / first).samefile(tmp_path / model / "../synthetic")
    assert len(list((tmp_path / again / "images").iterdir())) == 2

    # The licence is stated afterwards, and goes along.
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / first).rglob("*.png")}
    assert run("generate", "tiny.yaml", "--count", "2", "--license", "cc-by-4.0")[-1] == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / first).rglob("*.png")} == images
    assert run("export", first, "--to", "mmseg", "--out", "elsewhere/mmseg") == ["elsewhere/mmseg"]
    assert "license: cc-by-4.0\n" in (tmp_path / "elsewhere/mmseg/README.md").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "elsewhere")

    # A run elsewhere keeps its generator; the limit would stop a training.
    tmp_path.joinpath("runs/tiny-recipe").rename(tmp_path / "elsewhere")
    limited = ["generate", "tiny.yaml", "--count", "3", "--max-minutes", "0"]
    assert run(*limited, "--run", "elsewhere")[-1].startswith("elsewhere/generator-")
    assert not (tmp_path / "runs" / "tiny-recipe").exists()
    assert invoke(*limited).exit_code == 75
