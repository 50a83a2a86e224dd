import re
from typing import get_args

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.recipe import ArmConfig, DataConfig, Mix, Recipe, SegmentorConfig, StudyConfig, TrainConfig
from terrasynth.recipe_io import explain, load_recipe, override_defaults, packaged


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def fault(*arguments, **keywords):
    with pytest.raises(TerraSynthError) as error:
        load_recipe(*arguments, **keywords)
    return str(error.value)


# --- packaged -----------------------------------------------------------------------------------------------------


def test_every_packaged_recipe_loads_and_says_what_it_is():
    assert {"demo", "dubai16", "dubai16-tiny", "sd35"} <= set(packaged())
    for name, description in packaged().items():
        assert load_recipe(name).recipe.name == name
        assert len(description) > 20


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_recipe_explained_loads_back_to_itself(name, write):
    recipe = load_recipe(name).recipe
    assert load_recipe(write(explain(recipe))).recipe == recipe


def test_a_packaged_recipe_finds_its_label_schema_beside_it():
    loaded = load_recipe("dubai16")
    schema = yaml.safe_load((loaded.base / loaded.recipe.data.label_schema).read_text())
    assert [entry["name"] for entry in schema["classes"]] == ["building", "land", "road", "vegetation", "water"]
    assert all(re.fullmatch("#[0-9A-F]{6}", entry["color"]) for entry in schema["classes"])


# --- loading ------------------------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_folder_of_the_file(write, tmp_path):
    assert load_recipe(write("name: mine")).base == tmp_path


def test_a_file_says_only_what_differs_from_the_defaults(write):
    recipe = load_recipe(write("{name: mine, generator: {train: {learning_rate: 1e-4}}}")).recipe
    default = Recipe(name="mine").generator.train
    assert recipe.generator.train == default.model_copy(update={"learning_rate": 1e-4})


def test_a_list_replaces_the_default_list(write):
    recipe = load_recipe(write("{name: mine, study: {seeds: [7]}}")).recipe
    assert recipe.study == StudyConfig(seeds=(7,))


def test_a_packaged_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_recipe("demo").recipe.name == "demo"


# --- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_one_counts():
    recipe = load_recipe("demo", ["study.seeds=[3, 4]", "sampling.steps=5", "sampling.steps=6", "generator.base=null"])
    assert recipe.recipe.study.seeds == (3, 4)
    assert recipe.recipe.sampling.steps == 6
    assert recipe.recipe.generator.base is None


def test_an_override_enters_lists_by_position_and_options_by_name():
    overrides = ["study.arms.1.mix=copy-paste", "segmentor.options={a: 1}", "segmentor.options.b=2"]
    recipe = load_recipe("demo", overrides).recipe
    assert [arm.mix for arm in recipe.study.arms] == ["none", "copy-paste", "none", "none"]
    assert recipe.segmentor.options == {"a": 1, "b": 2}
    assert load_recipe("demo", [*overrides, "segmentor.options={}"]).recipe.segmentor.options == {}


def test_a_section_given_as_an_override_is_laid_over_the_old_one():
    before, after = (load_recipe("demo", overrides).recipe for overrides in ([], ["generator.train={steps: 77}"]))
    assert after.generator.train == before.generator.train.model_copy(update={"steps": 77})


def test_data_sets_the_root_whatever_its_name(tmp_path):
    folder = tmp_path / "tiles: [odd] #1"
    folder.mkdir()
    assert load_recipe("dubai16", data=folder).recipe.data.root == folder


def test_data_for_a_recipe_without_a_folder_is_refused(tmp_path):
    assert "data.kind: world" in fault("demo", data=tmp_path)
    assert load_recipe("demo", ["data.kind=folder"], data=tmp_path).recipe.data.root == tmp_path


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("generator.tarin.steps", "generator.train"),
        ("generator.train.leaning_rate", "generator.train.learning_rate"),
        ("study.arms.1.mixx", "study.arms.1.mix"),
        ("genrator.train.steps", "generator"),
        # Right name, wrong section.
        ("generator.learning_rate", "generator.train.learning_rate"),
        ("gsd", "data.world.gsd"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(key, nearest):
    message = fault("demo", [f"{key}=1"])
    assert f"did you mean `{nearest}`?" in message
    assert "--set" in message


def test_all_faults_of_a_file_come_at_once_with_found_and_expected(write):
    path = write("{nmae: mine, data: {kind: word, image_size: -3}, sampling: {steps: many}, study: {seeds: [1, 1]}}")
    message = fault(path)
    assert message.splitlines()[0] == f"{path}: 6 faults in the recipe"
    assert "  name: missing\n" in message
    assert "  nmae: no such key; did you mean `name`?\n" in message
    assert "  data.kind: found word, expected 'world', 'folder' or 'unlabelled'\n" in message
    assert "  data.image_size: found -3, expected greater than 0\n" in message
    assert "  sampling.steps: found many, expected a valid integer" in message
    assert "  study: seeds must be distinct, and there must be at least one\n" in message


def test_a_section_that_is_no_section_is_a_fault(write):
    assert "study: found null, expected a section" in fault(write("name: mine\nstudy:\n"))
    assert "sampling: found 3, expected a section" in fault("demo", ["sampling=3"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("name: mine\ndata: {\n", "line 3, column 1"),
        ("name: mine\nname: yours\n", "line 2, column 1: the key `name` is given twice"),
        ("name: !!python/object/apply:os.getcwd []", "line 1, column 7"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(write, text, found):
    message = fault(write(text))
    assert "not a YAML file" in message
    assert found in message


@pytest.mark.parametrize(("text", "found"), [("", "an empty file"), ("- a\n", "a list"), ("demo", "a str")])
def test_yaml_that_is_no_recipe_is_refused(write, text, found):
    assert f"found:    {found}" in fault(write(text))


@pytest.mark.parametrize("name", ["nope", "nope.yaml", "."])
def test_a_missing_recipe_lists_the_packaged_ones(name):
    message = fault(name)
    assert "no such recipe" in message
    assert all(packaged_name in message for packaged_name in packaged())


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=3", "study.arms.9.mix=none", "name.x=1", "name=[1"])
def test_an_override_that_can_not_be_carried_out_is_named(override):
    assert override in fault("demo", [override])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["generator.train.steps=20"],
            "generator.train.warmup_steps (20) must be less than",
        ),
        (["segmentor.train.steps=9"], "segmentor.train.warmup_steps (20) must be less than"),
        (["generator.mask_dropout=0"], "sampling.mask_scale (1.5) needs generator.mask_dropout > 0"),
        (
            ["generator.text_dropout=0", "sampling.text_scale=3"],
            "sampling.text_scale (3.0) needs generator.text_dropout",
        ),
        # Prompts are compared under the null mask.
        (
            ["generator.mask_dropout=0", "sampling={text_scale: 3, mask_scale: 1}"],
            "sampling.text_scale (3.0) needs generator.mask_dropout > 0",
        ),
        (["generator.heads=5"], "generator: width (192) must be a multiple of heads (5) and of 4"),
        (["generator={width: 6, heads: 3}"], "generator: width (6) must be a multiple of heads (3) and of 4"),
        (["generator.train.betas=[0.9, 1]"], "generator.train.betas.1: found 1, expected less than 1"),
        (["generator.layouts=true"], "generator.layouts: a number is wanted, not true"),
        (["generator.pseudo_labels=false"], "generator.pseudo_labels: a number is wanted, not false"),
        (["data.world.gsd=11"], "data.world.gsd: found 11, expected less than or equal to 10"),
        (
            ["generator.autoencoder={refiner_width: 8, train: {steps: 50}}"],
            "generator.autoencoder.train.warmup_steps (50) must be less than",
        ),
        (["generator.autoencoder.refiner_width=8"], "generator.autoencoder: refiner_width and train belong together"),
        (["data.unlabelled=[{images: '*.png'}]"], "data.unlabelled names images, but data.kind is world"),
        (["data.unlabelled=[{images: '*', scale: [2, 1]}]"], "data.unlabelled.0: scale must go from the smaller"),
        (["data.unlabelled=[{images: '*', scale: [0.5, 1]}]"], "data.unlabelled.0.scale.0: found 0.5"),
    ],
)
def test_values_that_can_not_work_are_refused_before_anything_runs(overrides, said):
    lines = fault("demo", overrides).splitlines()
    assert any(line.startswith(f"  {said}") for line in lines), lines


def test_without_guidance_no_condition_needs_dropping():
    recipe = load_recipe("demo", ["generator={text_dropout: 0, mask_dropout: 0}", "sampling.mask_scale=1"]).recipe
    assert recipe.sampling.mask_scale == 1


def test_without_a_recipe_only_the_sections_in_use_are_set():
    sections = ("sampling", "steering")
    settings = override_defaults(["sampling.steps=5", "steering={strength: 0.2}"], sections)
    default = Recipe(name="mine")
    assert settings.sampling == default.sampling.model_copy(update={"steps": 5})
    assert settings.steering == default.steering.model_copy(update={"strength": 0.2})
    for override in ("generator.seed=1", "name=x", "samplings.steps=3"):
        with pytest.raises(TerraSynthError, match=r"sampling\.… or steering\.…"):
            override_defaults([override], sections)
    with pytest.raises(TerraSynthError, match=r"did you mean `sampling\.steps`"):
        override_defaults(["sampling.stepps=3"], sections)


# --- explaining ---------------------------------------------------------------------------------------------------


def test_every_key_is_explained():
    text = explain(Recipe(name="mine"))

    def check(section):
        for field in section.model_fields.values():
            words = " ".join(field.description.split())
            assert words in " ".join(re.sub(r"\n *# ", " ", text).split()), words
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(Recipe)
    check(ArmConfig)


def test_choices_are_listed_where_the_description_does_not():
    assert "One of: resize, crop." in explain(Recipe(name="mine"))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@example(name="", caption="\xa0", rate=1.0, clip=None, seeds=[0], arms=[ArmConfig(name="")], options={})
@given(
    name=texts,
    caption=texts,
    rate=positive,
    clip=st.none() | positive,
    seeds=st.lists(st.integers(min_value=0), min_size=1, unique=True),
    arms=st.lists(
        st.builds(ArmConfig, name=texts, mix=st.sampled_from(get_args(Mix))), min_size=1, unique_by=lambda arm: arm.name
    ),
    options=st.dictionaries(
        texts, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
    ),
)
def test_an_explained_recipe_loads_back_to_itself(tmp_path_factory, name, caption, rate, clip, seeds, arms, options):
    recipe = Recipe(
        name=name,
        data=DataConfig(caption=caption),
        segmentor=SegmentorConfig(options=options, train=TrainConfig(steps=99, learning_rate=rate, clip_norm=clip)),
        study=StudyConfig(seeds=tuple(seeds), arms=tuple(arms)),
    )
    path = tmp_path_factory.getbasetemp() / "explained.yaml"
    path.write_text(explain(recipe), encoding="utf-8")
    assert load_recipe(path).recipe == recipe


def test_sizes_that_can_not_be_are_refused_and_a_misspelt_recipe_is_recognised():
    with pytest.raises(TerraSynthError, match=r"data\.image_size: found 100000"):
        load_recipe("demo", ["data.image_size=100000"])
    with pytest.raises(TerraSynthError, match=r"generator\.autoencoder: channels \(49\) must be at most .* \(48\)"):
        load_recipe("demo", ["generator.autoencoder.channels=49", "generator.autoencoder.patch_size=4"])
    with pytest.raises(TerraSynthError, match="did you mean `demo`"):
        load_recipe("dmeo")


# --- whatever is typed ------------------------------------------------------------------------------------------------


def dotted(section=Recipe, prefix=""):
    """Every key of a recipe."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from dotted(field.annotation, f"{prefix}{name}.")


KEYS = sorted([*dotted(), "study.arms.1.mix", "study.seeds.0", "segmentor.options.a"])
#: YAML that some part of PyYAML takes and another can not make sense of, or that grows without end.
ODD = [
    "2001-02-31",
    "2001-01-01",
    "!!timestamp x",
    "!!int x",
    "!!int ''",
    "!!bool x",
    "!!binary '%'",
    "&a [*a]",
    "&a {b: *a}",
    "[&x0 [1, 1]" + "".join(f", &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)) + "]",
    "{[1]: 2}",
    "{<<: 3}",
    "1:99",
    ".inf",
    "9" * 5000,
    "[" * 300 + "]" * 300,
    "[" * 1200,
    "!!python/object/apply:os.system [x]",
    "\ud800",
    "%",
    "*x",
    "? a",
]


def told(call) -> str:
    """The message of what `call` refuses, empty if it takes it; no other exception passes."""
    try:
        call()
    except TerraSynthError as error:
        return str(error)
    return ""


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.text(max_size=30)
    | st.builds(
        "{}={}".format, st.sampled_from(KEYS) | st.text(max_size=12), st.sampled_from(ODD) | st.text(max_size=12)
    )
)
def test_any_override_is_taken_or_explained(override):
    message = told(lambda: load_recipe("demo", [override]))
    assert not message or "--set" in message
    assert "Traceback" not in message


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.binary(max_size=40)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode)
    | st.builds("name: x\n{}: {}\n".format, st.sampled_from(KEYS), st.sampled_from(ODD)).map(
        lambda text: text.encode(errors="ignore")
    )
)
def test_any_file_is_a_recipe_or_explained(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    message = told(lambda: load_recipe(path))
    assert not message or message.startswith(f"{path}: ")


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_explained_in_a_label_schema_too(tmp_path, value):
    path = tmp_path / "classes.yaml"
    path.write_bytes(f"classes: {value}\nignore_index: {value}\n".encode(errors="ignore"))
    assert str(path) in told(lambda: LabelSchema.from_yaml(path))


def test_aliases_that_stay_small_are_fine(write):
    text = "name: mine\ngenerator: {train: &train {steps: 77, batch_size: 3}}\nsegmentor: {train: *train}\n"
    recipe = load_recipe(write(text)).recipe
    assert recipe.segmentor.train.steps == recipe.generator.train.steps == 77


def mistakes(name):
    """`name` with one letter more, less or other, or two exchanged."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cuts = [(name[:place], name[place:]) for place in range(len(name) + 1)]
    more = {left + letter + right for left, right in cuts for letter in letters}
    less = {left + right[1:] for left, right in cuts}
    other = {left + letter + right[1:] for left, right in cuts for letter in letters}
    swapped = {left + right[1::-1] + right[2:] for left, right in cuts}
    return (more | less | other | swapped) - {name}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_a_typing_mistake_in_any_key_is_answered_with_that_key(data):
    """In a key of five letters or more, and if no other key beside it may be meant as well (`world`, `worlds`)."""
    key = data.draw(st.sampled_from([key for key in dotted() if len(key.rpartition(".")[2]) >= 5]))
    parents, dot, name = key.rpartition(".")
    typed = data.draw(st.sampled_from(sorted(mistakes(name))))
    siblings = {other.rpartition(".")[2] for other in dotted() if other.rpartition(".")[0] == parents} - {name}
    assume(not any(typed == other or typed in mistakes(other) for other in siblings))
    assert f"did you mean `{key}`?" in fault("demo", [f"{parents}{dot}{typed}=1"])


@pytest.mark.parametrize(
    ("generator", "sampling", "references", "needed"),
    [
        ({"text_dropout": 0}, {"text_scale": 3}, False, ["text"]),
        ({"mask_dropout": 0}, {"text_scale": 3}, False, ["mask"]),
        ({"reference_dropout": 0}, {"text_scale": 3}, True, ["reference"]),
        ({"reference_dropout": 0}, {"mask_scale": 1.5}, True, []),
        ({"reference_dropout": 0}, {"reference_scale": 2}, True, ["reference"]),
        ({"system": "tisynth", "text_dropout": 0, "reference_dropout": 0}, {}, True, ["reference", "text"]),
        ({"system": "tisynth", "mask_dropout": 0}, {"text_scale": 9, "mask_scale": 1}, True, []),
        ({"system": "tisynth", "text_dropout": 0}, {"text_scale": 9, "mask_scale": 1}, True, ["text"]),
    ],
)
def test_guidance_needs_the_null_conditions_that_it_looks_at(generator, sampling, references, needed):
    """By the chain itself: a condition that some term does not see must have been dropped in training."""
    from terrasynth.sampling.guidance import guidance_chain

    values = {"name": "x", "data": {"kind": "folder", "unlabelled": [{"images": "*"}]}}
    values["generator"] = {"reference": "view", "heads": 8, **generator}
    values["sampling"] = {"mask_scale": 1.5, **sampling}
    values["study"] = {"arms": [{"name": "real"}, {"name": "p", "synthetic": "plain", "references": references}]}
    order = ["mask", "reference", "text"] if "system" in generator else ["text", "reference", "mask"]
    scales = {name: values["sampling"].get(f"{name}_scale", 1.0) for name in order if references or name != "reference"}
    unseen = {name for term in guidance_chain(scales) for name in scales if name not in term.sees}
    assert {name for name in unseen if generator.get(f"{name}_dropout") == 0} == set(needed)
    if not needed:
        Recipe.model_validate(values)
        return
    with pytest.raises(ValueError, match="needs generator") as error:
        Recipe.model_validate(values)
    for name in needed:
        assert f"needs generator.{name}_dropout > 0" in str(error.value)


def test_painting_without_references_has_to_be_learned_too():
    values = {"name": "x", "generator": {"reference": "view", "reference_dropout": 0}}
    with pytest.raises(ValueError, match="to paint without references"):
        Recipe.model_validate(values)


def test_whole_images_are_one_window_each():
    from terrasynth.recipe import SourceConfig

    assert SourceConfig(images="*", windows=1, scale=None).scale is None
    with pytest.raises(ValueError, match="windows must be 1, not 8"):
        SourceConfig(images="*", scale=None)
