"""What a study did, in words for its report: its parts, which tiles it used for what, and what it can not say."""

from __future__ import annotations

from terrasynth.recipe import ArmConfig, PairsConfig, Recipe, SteeringConfig, TrainConfig
from terrasynth.study.read import Results
from terrasynth.study.statistics import points

__all__ = ["kind_name", "limitations", "setup", "touched"]


def setup(results: Results) -> list[tuple[str, str]]:
    """The recipe in words: what was done, part by part."""
    recipe, data = results.recipe, results.data
    study, segmentor, generator = recipe.study, recipe.segmentor, recipe.generator
    weights = f"weights {segmentor.weights}" if segmentor.weights else "from scratch"
    rows = [
        (
            "Data",
            f"{data.train} training, {data.validation} validation and {data.test} test tiles of {data.image_size} × "
            f"{data.image_size} pixels ({data.source}); {len(results.classes)} classes"
            + (f"; {data.unlabelled} windows of unlabelled images" if data.unlabelled else "")
            + (f"; left out, because they could not be used: {data.left_out} tiles" if data.left_out else ""),
        ),
        ("Segmentor", f"{segmentor.architecture}, {segmentor.encoder}, {weights}; {_segmentor_training(results)}"),
        (
            "Seeds",
            f"{', '.join(map(str, study.seeds))}; every arm is trained once under each, and compared seed by seed",
        ),
    ]
    if results.painted_arms:
        counts = ", ".join(f"{painted.count} ({kind_name(kind)})" for kind, painted in results.synthetic.items())
        rows.insert(
            1,
            (
                "Painted tiles",
                f"per seed {counts}; {100 * study.real_fraction:g} % of each training batch stays real"
                + "".join(f"; {exception}" for exception in _exceptions(results)),
            ),
        )
    if results.labels is not None:
        rows.insert(1, ("Pairs", _pairs(recipe.pairs)))
    if results.under_masks:
        sampling, steering = recipe.sampling, recipe.steering
        if generator.system == "tisynth":
            system = "U-Net with all-in-attention on mask and reference (TISynth)"
            sizes = f"levels of {', '.join(map(str, generator.unet.widths))} channels"
        else:
            system, sizes = "text-image-mask MM-DiT (TODSynth)", f"{generator.blocks} blocks of width {generator.width}"
        origin = generator.base or f"from scratch, {sizes}"
        referenced = any("-like" in kind for kind in results.synthetic)
        rows[1:1] = [
            ("Generator", f"{system}, {origin}; {_training(generator.train)}"),
            (
                "Sampling",
                f"{sampling.steps} steps ({sampling.solver if generator.system == 'todsynth' else 'DDIM'}"
                + ("" if sampling.shift is None else f", shift {sampling.shift:g}")
                + f"), guidance of the mask {sampling.mask_scale:g}, of the text "
                f"{sampling.text_scale:g}"
                + (f", of the reference {sampling.reference_scale:g}" if referenced else "")
                + (
                    ""
                    if sampling.guidance_interval == (0, 1)
                    else ", between the noise levels {:g} and {:g}".format(*sampling.guidance_interval)
                ),
            ),
        ]
        if results.steered:
            rows.insert(
                3,
                (
                    "Steering",
                    f"control-rectify flow matching (CRFM) in {_steered(steering, sampling.steps)}, strength "
                    f"{steering.strength:g}, {steering.schedule}, normalisation: {steering.normalise}",
                ),
            )
    if results.painted_arms:
        if results.filtered:
            drops = "; ".join(
                f"{arm}: {points(shares['dropped'], signed=False)} % ({_by_class(shares)})"
                for arm, shares in results.filtered.items()
            )
            rows.insert(
                -2,
                (
                    "Filter",
                    "painted pixels whose loss under the teaching segmentor is above 1.25 times their class's mean "
                    f"on the training tiles are left unlabelled (FreeMask). {drops}",
                ),
            )
        if results.curated:
            rows.insert(-2, ("Curation", "; ".join(_curation(results, arm) for arm in study.arms if arm.curate)))
    return rows


def _exceptions(results: Results) -> list[str]:
    """How single arms use painted tiles otherwise than the others."""
    arms = [arm for arm in results.recipe.study.arms if arm.synthetic != "none"]
    fewer = [
        f"“{arm.name}” has the first {count} of them"
        for arm in arms
        if (count := (arm.ratio or results.recipe.study.ratio) * results.data.train) < results.synthetic[arm.kind].count
    ]
    first = [
        f"“{arm.name}” trains on painted tiles alone for the first half of its steps and on real ones for the second"
        for arm in arms
        if arm.synthetic_first
    ]
    return fewer + first


def _by_class(shares: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name.removeprefix('dropped/')} {points(share, signed=False)}"
        for name, share in shares.items()
        if name != "dropped"
    )


def _pairs(pairs: PairsConfig) -> str:
    """What paints images and masks together, in words."""
    origin = pairs.base or f"from scratch, levels of {', '.join(map(str, pairs.widths))} channels"
    asked = ", ".join(f"{name} {points(share, signed=False)} %" for name, share in pairs.sampling.shares.items())
    second = f"at half the size, doubled by a second stage ({_training(pairs.upscaler.train)}); "
    stages = second if pairs.two_stages else ""
    return (
        f"pixel diffusion of image and mask together (SatSynth), {origin}; {_training(pairs.train)}; {stages}"
        f"{pairs.sampling.steps} steps (DDIM)" + (f", asked for {asked} of the pixels" if asked else "")
    )


def kind_name(kind: str) -> str:
    """How a report calls the painted tiles of a kind (`ArmConfig.kind`)."""
    if kind == "pairs":
        return "with their masks"
    bare = kind.removesuffix("-on-pairs")
    how = {"plain": "plain", "steered": "CRFM-steered"}[bare.removesuffix("-like")]
    name = how if not bare.endswith("-like") else "referenced" if how == "plain" else f"{how}, referenced"
    return name if bare == kind else f"{name}, under painted masks"


def touched(results: Results) -> list[tuple[str, str]]:
    """Which tiles did what: the statement that no test tile leaked."""
    teacher = f"“{results.recipe.study.teacher or results.arms[0].name}”"
    compared = [
        *(["finished painted tiles with the tiles of all splits"] if results.audit else []),
        *(["what is learned from with validation and test tiles"] if results.audit_of_splits else []),
    ]
    audited = " but the audit" if compared else ""
    rows = [
        ("Training tiles", "train every segmentor"),
        (
            "Validation tiles",
            "choose the checkpoint of a segmentor"
            + (", and every arm's learning rate and steps," if results.recipe.study.search else ",")
            + " nothing else"
            + audited,
        ),
        ("Test tiles", f"score finished segmentors, once, and nothing else{audited}: no training, no selection"),
    ]
    if results.painted_arms:
        painters = " and ".join(
            name
            for name, there in (("the generator", results.under_masks), ("what paints pairs", results.labels))
            if there
        )
        of_masks = {kind for kind in results.synthetic if "pairs" not in kind}
        rows[0] = (
            "Training tiles",
            f"train every segmentor and {painters}" + ("; their masks are painted" if of_masks else ""),
        )
        rows.insert(
            1, ("Painted tiles", "train the segmentors of the arms with synthetic data, beside the training tiles")
        )
        rows[-1] = (
            "Test tiles",
            f"score finished segmentors, once, and nothing else{audited}: no training, no painting, no steering, "
            "no selection",
        )
    if results.data.unlabelled:
        uses = _self_training(results.recipe, teacher)
        if results.under_masks:
            uses.insert(
                0, f"train the generator beside the training tiles, under {_unlabelled_masks(results.recipe, teacher)}"
            )
        if any(arm.references for arm in results.recipe.study.arms):
            uses.append("tiles are painted like them")
        if not any(arm.pseudo_labels is not None for arm in results.recipe.study.arms):
            uses.append("no segmentor is trained on them")
        rows.insert(
            1 + bool(results.painted_arms),
            ("Unlabelled images", f"{results.data.unlabelled} windows of them " + "; ".join(uses)),
        )
    if compared:
        rows.append(("Audit", f"compares {', and '.join(compared)}, and only reports: nothing reads it"))
    if results.steered:
        rows.append(
            ("Steering", f"the segmentor that steers the painting under a seed is that of {teacher}, same seed")
        )
    if results.filtered or results.curated:
        rows.append(
            ("Filter", f"the segmentor that filters painted tiles under a seed is that of {teacher}, same seed")
        )
    return rows


def _curation(results: Results, arm: ArmConfig) -> str:
    """The rules of an arm that are in force, and what they left."""
    assert arm.curate is not None
    rules = {key: value for key, value in arm.curate.model_dump(mode="json").items() if value is not None}
    for rule, setting in (("rare", "valid_share"), ("balance", "max_weight")):
        if rule not in rules:
            del rules[setting]
    used, dropped = (
        points(share, signed=False) for share in (results.curated[arm.name].used, results.curated[arm.name].dropped)
    )
    told = ", ".join(f"{key} {value}" for key, value in rules.items()) or "none"
    return f"{arm.name}: rules {told}; {used} % of the painted tiles are used, {dropped} % of all their pixels dropped"


def _self_training(recipe: Recipe, teacher: str) -> list[str]:
    """How the windows train segmentors, one clause an arm."""
    adapted = [f"“{arm.name}”" for arm in recipe.study.arms if arm.adapt]
    return [
        f"train the segmentors of “{arm.name}”, under {_read(arm.pseudo_labels, teacher)}"
        for arm in recipe.study.arms
        if arm.pseudo_labels is not None
    ] + ([f"give the batch norms of {', '.join(adapted)} their statistics"] if adapted else [])


def _read(confidence: float, teacher: str) -> str:
    return (
        f"the classes that the segmentors of {teacher}, all seeds together, read in them with a probability of "
        f"{confidence:g} or more"
    )


def _unlabelled_masks(recipe: Recipe, teacher: str) -> str:
    confidence = recipe.generator.pseudo_labels
    masks = "a wholly unlabelled mask" if confidence is None else _read(confidence, teacher)
    layouts = f"; the layouts that the segmentors of {teacher} read are painted as well"
    return masks if recipe.study.layouts == "labelled" else masks + layouts


def _steered(steering: SteeringConfig, total: int) -> str:
    last = min(steering.start + steering.steps, total)
    if last - steering.start == 1:
        return "the first step" if last == 1 else f"step {last}"
    return f"the first {last} steps" if steering.start == 0 else f"steps {steering.start + 1} to {last}"


def _training(train: TrainConfig) -> str:
    return (
        f"{train.steps} steps of {train.batch_size * train.accumulate} samples, AdamW, learning rate "
        f"{train.learning_rate:g}, {train.schedule}"
    )


def _segmentor_training(results: Results) -> str:
    search, train = results.recipe.study.search, results.recipe.segmentor.train
    if search is None:
        return _training(train)
    rates, steps = (", ".join(f"{value:g}" for value in values) for values in (search.learning_rates, search.steps))
    found = "; ".join(f"{entry.arm}: {entry.learning_rate:g}, {entry.steps}" for entry in results.settings)
    return (
        f"batches of {train.batch_size * train.accumulate} samples, AdamW, {train.schedule}; for every arm the "
        f"learning rate (of {rates}) and the steps (of {steps}) that reached the best validation mIoU under seed "
        f"{results.recipe.study.seeds[0]}: {found}"
    )


def limitations(results: Results) -> list[str]:
    """What the study can not say, a paragraph each."""
    recipe, data = results.recipe, results.data
    seeds = len(recipe.study.seeds)
    limits = []
    if recipe.data.kind == "world":
        limits.append(
            "The tiles are procedural scenes, not imagery. They show what the method and its measurement do, not what "
            "would happen on your sensor and terrain."
        )
    if results.painted_arms:
        both = results.under_masks and results.labels is not None
        painters = "One generator and one painter of pairs painted" if both else "One generator painted"
        if not results.under_masks:
            painters = "One painter of pairs painted"
        painters += " for all seeds"
        limits.append(
            f"{painters}. The intervals contain what varies from seed to seed (the painted tiles and the training of "
            "the segmentor), not what another training of what paints would change."
        )
    if _self_training(recipe, "") or (
        results.painted_arms and (recipe.study.layouts == "all" or recipe.generator.pseudo_labels is not None)
    ):
        limits.append(
            "The segmentors of all seeds read the unlabelled images together, so the arms that learn from them share "
            "them: their scores vary less from seed to seed than those of studies that are independent throughout."
        )
    limits.append(
        f"All seeds share the same {data.train} training and {data.test} test tiles. The intervals do not say how the "
        "result would vary over other tiles, regions or dates."
    )
    if seeds > 1:
        limits.append(
            f"{seeds} seeds: a Student-t interval with {seeds - 1} degree{'s' * (seeds > 2)} of freedom, which takes "
            "the differences as roughly normal. More seeds make it narrower."
        )
    limits.append(
        f"One segmentor ({recipe.segmentor.architecture}, {recipe.segmentor.encoder}), with "
        + ("the same search for its settings" if recipe.study.search else "the same settings and number of steps")
        + " in every arm. Another one may rank the arms differently."
    )
    if results.plateau is None:
        limits.append("It was not checked whether the baseline had learned all it can in its number of steps.")
    return limits
