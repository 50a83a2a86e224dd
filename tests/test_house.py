"""The rules of the house, checked by the tools that state them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = sorted((REPO / "src").rglob("*.py"))
PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])


def check(*command):
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, env=environment)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_lint_is_clean():
    check("ruff", "check", "src", "tests", "benchmarks")


def test_format_is_clean():
    check("ruff", "format", "--check", "src", "tests", "benchmarks")


def test_types_are_clean():
    check("mypy", "src/terrasynth")


@pytest.mark.parametrize(
    "module", ["terrasynth", "terrasynth.cli", "terrasynth.recipe", "terrasynth.recipe_io", "terrasynth.doctor"]
)
def test_the_way_to_the_command_line_loads_nothing_heavy(module):
    heavy = "{'torch', 'torchvision', 'diffusers', 'transformers', 'numpy', 'PIL', 'rasterio', 'matplotlib'}"
    command = f"import {module}, sys; print(*sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPO / "src").as_posix())
def test_a_module_says_what_it_is_and_loads_no_pickle(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, "an empty module alone needs no docstring"
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").partition(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    # Each of them runs code that the file brings along.
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "torch.load", "numpy.load", "np.load"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_pages_name_no_place_on_somebodys_machine(path):
    assert (
        re.findall(r"(?<![\w.:/-])/(?:root|home|work|tmp|mnt|data|Users)/\S*", path.read_text(encoding="utf-8")) == []
    )


def test_links_between_pages_lead_somewhere():
    broken = []
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(REPO)}: {target}")
    assert broken == []
