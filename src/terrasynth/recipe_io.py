"""Recipes in YAML: loaded, overridden from the command line, explained.

A recipe file says only what differs from the defaults: its sections are laid over those of `Recipe`, then the
`key.sub=value` overrides over both. Lists and plain values replace what was there.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from terrasynth.errors import TerraSynthError
from terrasynth.recipe import CurationConfig, Recipe

__all__ = [
    "LoadedRecipe",
    "choose_arms",
    "curation_config",
    "explain",
    "load_recipe",
    "load_yaml",
    "override_defaults",
    "packaged",
]

_FOLDER = Path(__file__).parent / "recipes"
_WIDTH = 110
#: Of a YAML file: values, aliases written out, and levels of them. A recipe has some hundred values on six levels.
_LARGEST = 100_000
_DEEPEST = 50


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the validated recipe.
        base: folder of its file, where a relative `data.label_schema` starts.
    """

    recipe: Recipe
    base: Path


def packaged() -> dict[str, str]:
    """Names of the recipes that come with TerraSynth, each with the first comment line of its file."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(_FOLDER.glob("*.yaml"))
    }


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, data: str | Path | None = None
) -> LoadedRecipe:
    """Read a recipe.

    Args:
        name_or_path: a packaged recipe's name, or the path of a YAML file.
        overrides: `key.sub=value` strings, later ones last; the value is read as YAML, a list is entered by position
            (`study.arms.1.mix=classmix`).
        data: folder of the tiles, for `data.root`.

    Raises:
        TerraSynthError: no such recipe, not YAML, or keys or values that `Recipe` does not take: all of them,
            one a line.
    """
    path = _FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in packaged() else Path(name_or_path)
    # One key has no default; everything else is filled in here, so that a file may give a part of a section.
    defaults = Recipe(name="").model_dump(mode="json", exclude={"name"})
    recipe = _validate(_merge(defaults, _read(path), Recipe), str(path))
    values = recipe.model_dump(mode="json")
    for override in overrides:
        _assign(values, override)
    recipe = _validate(values, "--set")
    if data is not None:
        if recipe.data.kind == "world":
            raise TerraSynthError(
                "the recipe reads no folder, so it has no use for --data",
                path=path,
                found=f"data.kind: {recipe.data.kind}",
                expected="data.kind: folder",
                fix="leave --data out, or start from `terrasynth recipe dubai16`, which reads a folder",
            )
        values["data"]["root"] = str(data)
        recipe = _validate(values, "--data")
    return LoadedRecipe(recipe, path.parent)


def choose_arms(recipe: Recipe, names: Sequence[str]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with some arms of its study, and the names of the others.

    The baseline and the teacher stay. `NAME` stands for all of `NAME 1:1`, `NAME 1:3`, ... as well.

    Raises:
        TerraSynthError: there is no such arm.
    """
    study, chosen = recipe.study, {recipe.study.arms[0].name, recipe.study.teacher}
    for name in names:
        found = {arm.name for arm in study.arms if re.fullmatch(re.escape(name) + r"( 1:\d+)?", arm.name)}
        if not found:
            raise TerraSynthError("no such arm", found=name, expected=", ".join(f"'{arm.name}'" for arm in study.arms))
        chosen |= found
    kept = tuple(arm for arm in study.arms if arm.name in chosen)
    others = tuple(arm.name for arm in study.arms if arm.name not in chosen)
    return recipe.model_copy(update={"study": study.model_copy(update={"arms": kept})}), others


def override_defaults(overrides: Sequence[str], sections: Sequence[str]) -> Recipe:
    """The default values with overrides in some sections: the settings of a command that was given no recipe.

    Args:
        overrides: as `load_recipe` takes them.
        sections: dotted keys of `Recipe` that they may enter.

    Raises:
        TerraSynthError: an override of anything else, or one that `Recipe` does not take.
    """
    values = Recipe(name="defaults").model_dump(mode="json")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(f"{key}.".startswith(f"{section}.") for section in sections):
            raise TerraSynthError(
                f"--set {override}: no recipe is given, so there is no such value to set",
                expected=" or ".join(f"{section}.…" for section in sections),
                fix="give the recipe instead, or leave this out",
            )
        _assign(values, override)
    return _validate(values, "--set")


def curation_config(**options: Any) -> CurationConfig:
    """The options of `terrasynth curate` as settings; those that are None keep their defaults.

    `margin` may be "none", `rare` "auto" or names with commas between them, `balance` "uniform", "real" or NAME=SHARE
    with commas between them.

    Raises:
        TerraSynthError: `CurationConfig` does not take them: all faults, one a line. Or an option has no effect, since
            the one that it belongs to is not given.
    """
    values = {key: value for key, value in options.items() if value is not None}
    for option, of in (("valid_share", "rare"), ("max_weight", "balance")):
        if option in values and of not in values:
            raise TerraSynthError(
                f"--{option.replace('_', '-')} is a part of --{of}, which is not given",
                fix=f"give --{of}, or leave it out",
            )
    if values.get("margin") == "none":
        values["margin"] = None
    if values.get("rare", "auto") != "auto":
        values["rare"] = [name.strip() for name in values["rare"].split(",")]
    if "=" in values.get("balance", ""):
        # A class's name may hold `=`; its share may not.
        pairs = [part.rpartition("=") for part in values["balance"].split(",")]
        values["balance"] = {name.strip(): share for name, _, share in pairs}
    try:
        return CurationConfig.model_validate(values)
    except ValidationError as error:
        # A choice between forms is a fault for each of them.
        lines = dict.fromkeys(_fault({**details, "loc": details["loc"][:1]}) for details in error.errors())
        raise TerraSynthError(
            "\n  ".join(["these rules can not be applied", *lines]), fix="`terrasynth curate --help` describes them"
        ) from error


def explain(recipe: Recipe) -> str:
    """The whole recipe as YAML, every default filled in, every key described; it loads back to the same recipe."""
    return "\n".join(_explain(recipe, "")) + "\n"


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that 1e-5 is a number and that all it raises is YAMLError.

    A key given twice is a mistake. Aliases are fine, but not those that make a small file huge or endless.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """Measure the document, then do as PyYAML does."""
        self._measure(node, {})
        return super().construct_document(node)

    def _measure(self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int]], above: int = 0) -> tuple[int, int]:
        """How many values a node has, and how deep they go, with its aliases written out."""
        if node not in known:
            if above > _DEEPEST:
                raise yaml.composer.ComposerError(None, None, "nested too deeply", node.start_mark)
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
            below = [self._measure(part, known, above + 1) for part in inner]
            known[node] = 1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0)
        size, depth = known[node]
        if size > _LARGEST or above + depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "too large, or nested too deeply", node.start_mark)
        return size, depth

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Do as PyYAML does; what it can not make sense of (31 February) is a fault at a place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, LookupError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"not a valid {kind}: {error}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key given twice, then do as PyYAML does."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `load_yaml` reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML loses some line breaks in any other style.
        style = None if data.splitlines() == [data] else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _class in (_Loader, _Dumper):
    # YAML 1.1 wants a dot in the number and a sign in the exponent; nobody else does.
    _exponent = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _exponent, list("-+.0123456789"))


def load_yaml(text: str | bytes) -> Any:
    """The values of a YAML document: plain ones, lists and dicts.

    Raises:
        yaml.YAMLError: whatever is wrong with it.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        document = load_yaml(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        near = difflib.get_close_matches(path.stem, packaged(), n=1)
        raise TerraSynthError(
            "no such recipe",
            path=path,
            expected=f"a YAML file, or one of the packaged recipes: {', '.join(packaged())}",
            fix=(f"did you mean `{near[0]}`? " if near else "")
            + "`terrasynth recipe` lists them; `terrasynth recipe demo > mine.yaml` starts one of your own",
        ) from error
    except yaml.YAMLError as error:
        raise TerraSynthError("not a YAML file", path=path, found=_position(error), fix="mend that line") from error
    if not isinstance(document, dict):
        raise TerraSynthError(
            "not a recipe",
            path=path,
            found="an empty file" if document is None else f"a {type(document).__name__}",
            expected="lines of `key: value`",
            fix="`terrasynth recipe demo` prints a whole one",
        )
    return document


def _position(error: yaml.YAMLError) -> str:
    """What the parser stumbled over, with line and column counted from 1."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _inline(value: Any) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf")
    )
    return text.removesuffix("...\n").rstrip("\n")


# --- laying values over values ------------------------------------------------------------------------------------


def _section(annotation: Any) -> type[BaseModel] | None:
    """The configuration class that `annotation` is, if it is one."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _section_at(keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The configuration class at a place in the recipe; None where there is a value, or nothing."""
    annotation: Any = Recipe
    for key in keys:
        if section := _section(annotation):
            field = section.model_fields.get(str(key))
            annotation = field.annotation if field else None
        else:  # an element of tuple[Section, ...]
            annotation = next(iter(get_args(annotation)), None)
    return _section(annotation)


def _merge(old: dict[str, Any], new: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """`new` laid over `old`: sections key by key, everything else replaced."""
    merged = dict(old)
    for key, value in new.items():
        inner = _section(section.model_fields[key].annotation) if key in section.model_fields else None
        merged[key] = _merge(old[key], value, inner) if inner and isinstance(value, dict) and key in old else value
    return merged


def _assign(values: dict[str, Any], override: str) -> None:
    """Carry out one `key.sub=value` in place; whether the key exists is left to the validation."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise TerraSynthError(f"--set {override}", found="no key and value", expected="--set key.sub=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise TerraSynthError(
            f"--set {override}: the value is not YAML", found=_position(error), fix="put it in quotes"
        ) from error

    node: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            place: Any = int(key)
        elif isinstance(node, dict):
            place = key
            node.setdefault(key, {})
        else:
            found = f"{len(node)} entries, counted from 0" if isinstance(node, list) else _inline(node)
            raise TerraSynthError(
                f"--set {override}: nothing is called `{key}` in `{'.'.join(keys[:depth])}`", found=found
            )
        if not last:
            node = node[place]
    section = _section_at(keys)
    node[place] = _merge(node[place], value, section) if section and isinstance(value, dict) else value


# --- faults -------------------------------------------------------------------------------------------------------


def _validate(values: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [f"  {line}" for details in error.errors() for line in _fault(details).splitlines()]
        count = "one fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise TerraSynthError(
            "\n".join([f"{where}: {count} in the recipe", *lines]),
            fix="`terrasynth recipe demo` prints every key with its description",
        ) from error


def _fault(details: Any) -> str:
    """One line for one of pydantic's errors: dotted key, what was found, what was expected."""
    keys = details["loc"]
    dotted = ".".join(map(str, keys))
    kind, message = details["type"], details["msg"]
    if kind in ("extra_forbidden", "invalid_key"):
        nearest = _nearest(keys)
        return f"{dotted}: no such key" + (f"; did you mean `{nearest}`?" if nearest else "")
    if kind == "missing":
        return f"{dotted}: missing"
    if kind == "value_error":
        # A fault between sections has no place of its own.
        return (f"{dotted}: " if dotted else "") + message.removeprefix("Value error, ")
    expected = "a section of `key: value` lines" if kind == "model_type" else message.removeprefix("Input should be ")
    return f"{dotted}: found {textwrap.shorten(_inline(details['input']), 60)}, expected {expected}"


def _nearest(keys: Sequence[str | int]) -> str | None:
    """The valid dotted key most like `keys`: beside it if possible, else anywhere in the recipe."""
    *parents, wrong = map(str, keys)
    section = _section_at(parents)
    beside = difflib.get_close_matches(wrong, section.model_fields if section else (), n=1)
    if beside:
        return ".".join([*parents, *beside])
    everywhere = list(_all_keys(Recipe, ""))
    names = [key.rpartition(".")[2] for key in everywhere]
    match = difflib.get_close_matches(wrong, names, n=1, cutoff=0.8)
    candidates = [key for key, name in zip(everywhere, names, strict=True) if match and name == match[0]]
    # `steps` is a key of four sections: the one whose path shares most with what was written is meant.
    return max(
        candidates,
        key=lambda key: difflib.SequenceMatcher(None, key, ".".join([*parents, wrong])).ratio(),
        default=None,
    )


def _all_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := _section(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


# --- explaining ---------------------------------------------------------------------------------------------------


def _explain(config: BaseModel, indent: str) -> Iterator[str]:
    plain = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        if not indent and name != next(iter(type(config).model_fields)):
            yield ""
        yield from _comment(_description(field), indent)
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _explain(value, indent + "  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for key, entry in type(value[0]).model_fields.items():
                yield from _comment(f"- {key}: {_description(entry)}", indent)
            yield f"{indent}{name}:"
            yield from (f"{indent}  - {_inline(entry)}" for entry in plain[name])
        else:
            yield f"{indent}{name}: {_inline(plain[name])}".rstrip(" ")


def _description(field: FieldInfo) -> str:
    description = " ".join((field.description or "").split())
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    unnamed = [choice for choice in choices if f"`{choice}`" not in description]
    return f"{description} One of: {', '.join(choices)}." if unnamed else description


def _comment(text: str, indent: str) -> list[str]:
    lead = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False)
