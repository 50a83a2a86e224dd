"""The report of a study: its results and the verdict on them, written as one self-contained page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from terrasynth.errors import TerraSynthError
from terrasynth.io import atomic_write, open_image, read_json
from terrasynth.study.canvas import arm_color
from terrasynth.study.figures import class_figure, curve_figure, difference_figure
from terrasynth.study.read import AuditedSet, ClassEntry, Results, read_results
from terrasynth.study.statistics import Summary, difference_text, points
from terrasynth.study.sweep import ClassGains
from terrasynth.study.sweep_figures import frequency_figure, frequency_picture, ratio_figure, ratio_picture
from terrasynth.study.verdict import Verdict, verdict
from terrasynth.study.wording import kind_name, limitations, setup, touched

__all__ = ["write_report"]

#: Widths of the charts in inches: for a page and for a phone.
_WIDE, _NARROW = 8.6, 3.7
#: Larger pictures of the gallery are shrunk to this, so that the page stays small enough to send.
_THUMBNAIL = 256
#: What an audit calls the painted tiles compared with each other (`curation.audit.AMONG`, which would load torch).
_AMONG = "one another"
_METRICS = (("miou", "mIoU"), ("oa", "OA"), ("macc", "mAcc"), ("f1", "F1"))


def write_report(folder: Path) -> Path:
    """Write `report.html` of a study: one file that needs nothing else, from nowhere.

    Beside it, `ratio.png` and `frequency.png` have two of its charts, where it has them.

    Args:
        folder: holds `results.json` and, if anything was painted, `gallery.json` (a list of `mask`, `real`, `reference`
            and the kinds of painted tiles: picture files relative to `folder`, all but `mask` optional; and `caption`).

    Raises:
        TerraSynthError: the results are missing or unreadable, or a picture of the gallery is.
    """
    results = read_results(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "tight": _tight,
        "duration": _duration,
        "points": points,
        "difference": difference_text,
        "score": _score,
        "kind": kind_name,
        "signed": lambda number: f"{number + 0.0:+.2f}".replace("-", "−"),
    }
    template = environment.from_string(files("terrasynth.study").joinpath("report.html.j2").read_text("utf-8"))
    page = template.render(_context(results, folder))
    _write_pictures(results, folder)
    report = folder / "report.html"
    with atomic_write(report) as partial:
        partial.write_text(page, encoding="utf-8")
    return report


def _write_pictures(results: Results, folder: Path) -> None:
    pictures: dict[str, bytes | None] = {"ratio.png": None, "frequency.png": None}
    if lines := results.lines:
        pictures["ratio.png"] = ratio_picture(lines, results.arms[0].name)
    if gains := _shown_gains(results, verdict(results)):
        classes = [(entry.name, entry.color) for entry in results.scored_classes]
        pictures["frequency.png"] = frequency_picture(gains, classes)
    for name, picture in pictures.items():
        if picture is None:
            (folder / name).unlink(missing_ok=True)
        else:
            with atomic_write(folder / name) as partial:
                partial.write_bytes(picture)


def _shown_gains(results: Results, answer: Verdict) -> ClassGains | None:
    """Of the synthetic arm of the answer, else of the first arm."""
    gains = results.class_gains
    return next((each for each in gains if each.arm == answer.best), next(iter(gains), None))


def _context(results: Results, folder: Path) -> dict[str, Any]:
    answer = verdict(results)
    baseline = results.arms[0]
    summaries = {arm.name: arm.summary() for arm in results.arms}
    return {
        "results": results,
        "study": results.recipe.study,
        "verdict": answer,
        "tone": {"helps": "good", "does not help": "bad", "can not tell": "open"}[answer.outcome],
        "metrics": [(key, label) for key, label in _METRICS if key in baseline.metrics],
        "rows": [
            {
                "name": arm.name,
                "color": arm_color(position),
                "scores": {key: arm.summary(key) for key, _ in _METRICS if key in arm.metrics},
                "difference": arm.minus(baseline) if position else None,
                "seeds": summaries[arm.name].values,
                "best": arm.name == answer.best,
            }
            for position, arm in enumerate(results.arms)
        ],
        "class_rows": [
            (entry, [arm.summary(f"iou/{entry.name}") for arm in results.arms]) for entry in results.scored_classes
        ],
        "lines": results.lines,
        "ratios": sorted({ratio for line in results.lines for ratio, _ in line.points}),
        "class_gains": results.class_gains,
        "shown_gains": _shown_gains(results, answer),
        "figures": _figures(results, answer),
        "gallery": _gallery(folder),
        "labels": _labels(results),
        "steered": results.steered,
        "audit": _audit(results, folder),
        "splits": _splits(results, folder),
        "setup": setup(results),
        "touched": touched(results),
        "recipe_yaml": yaml.safe_dump(results.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "longest": max((entry.seconds for entry in results.timing), default=1.0) or 1.0,
        "limitations": limitations(results),
    }


def _figures(results: Results, answer: Verdict) -> dict[str, dict[str, Markup] | None]:
    baseline = results.arms[0]
    position = {arm.name: index for index, arm in enumerate(results.arms)}
    classes = results.scored_classes
    by_class = {arm.name: [arm.summary(f"iou/{entry.name}") for entry in classes] for arm in results.arms}
    differences = [(arm.name, arm.minus(baseline), position[arm.name]) for arm in results.arms[1:]]
    best = next((arm for arm in results.arms if arm.name == answer.best), None)
    rival = results.best_rival
    if best and rival:
        differences.append((f"{best.name}, minus {rival.name}", best.minus(rival), position[best.name]))
    differences += [
        (f"{plateau.arm}, twice the steps", plateau.difference, position[plateau.arm]) for plateau in results.plateaus
    ]
    curves = {name: [(curve.steps, curve.miou) for curve in seeds] for name, seeds in results.curves.items() if seeds}
    colors = [(entry.name, entry.color) for entry in classes]
    lines, gains = results.lines, _shown_gains(results, answer)
    return {
        "classes": _both(lambda width: class_figure(colors, by_class, width=width)) if classes else None,
        "differences": _both(lambda width: difference_figure(differences, width=width)) if differences else None,
        "ratios": _both(lambda width: ratio_figure(lines, baseline.name, width=width)) if lines else None,
        "frequencies": _both(lambda width: frequency_figure(gains, colors, width=width)) if gains else None,
        "curves": _both(lambda width: curve_figure(curves, width=width)) if curves else None,
    }


def _both(draw: Callable[[float], str]) -> dict[str, Markup]:
    # Inside a page the namespaces are implied. The charts escape the names in them; nothing else here is foreign.
    return {
        size: Markup(re.sub(r' xmlns(:\w+)?="[^"]*"', "", draw(width)))  # noqa: S704
        for size, width in (("wide", _WIDE), ("narrow", _NARROW))
    }


def _gallery(folder: Path) -> dict[str, Any] | None:
    """Column titles and rows of pictures (data URIs)."""
    if not (folder / "gallery.json").is_file():
        return None
    entries = read_json(folder / "gallery.json")
    titles = {
        "mask": "Mask",
        "read": "Mask, as teachers read it",
        "real": "Real tile",
        "plain": "Painted",
        "steered": "Painted, CRFM",
        "reference": "Reference",
        "plain-like": "Painted like it",
        "steered-like": "Painted like it, CRFM",
        "painted-mask": "Mask, painted",
        "pairs": "Painted with it",
        "plain-on-pairs": "Painted under it",
        "steered-on-pairs": "Painted under it, CRFM",
        "plain-like-on-pairs": "Painted under it, like another",
        "steered-like-on-pairs": "Painted under it, like another, CRFM",
    }
    # A mask that segmentors read is often wrong about the tile beside it; it must not pass for a label.
    for entry in entries:
        if not entry.get("labelled", True):
            entry["read"] = entry.pop("mask")
    kinds = [kind for kind in titles if any(entry.get(kind) for entry in entries)]
    rows = [
        {
            "caption": entry["caption"],
            "pictures": [(kind, titles[kind], _data_uri(folder, entry[kind])) for kind in kinds if entry.get(kind)],
        }
        for entry in entries
    ]
    return {"columns": max(len(row["pictures"]) for row in rows), "rows": rows} if rows else None


def _labels(results: Results) -> list[tuple[ClassEntry, str, str]] | None:
    """Every class with its share of the pixels of the training tiles and of pairs, in percent."""
    if results.labels is None:
        return None
    shares = zip(results.classes, results.labels.shares, strict=True)
    return [(entry, points(entry.share, signed=False), points(painted, signed=False)) for entry, painted in shares]


def _audit(results: Results, folder: Path) -> dict[str, Any] | None:
    """What was compared with what, over all painted sets together, and the sheet of the one with most to see."""
    if not results.audit:
        return None
    own = [entry for one in results.audit for entry in one.sets if entry.kind == _AMONG]
    names = dict.fromkeys(entry.name for one in results.audit for entry in one.sets if entry.kind != _AMONG)
    groups = [[e for one in results.audit for e in one.sets if e.name == name and e.kind != _AMONG] for name in names]
    closest = max(
        results.audit,
        key=lambda one: (
            len(one.findings),
            max((entry.closest.likeness or 0.0 for entry in one.sets if entry.closest), default=0.0),
        ),
    )
    return {
        "painted": sum(one.painted for one in results.audit),
        "too_plain": sum(one.too_plain for one in results.audit),
        "unmeasured": any(entry.limit_measured is False for one in results.audit for entry in one.sets),
        "too_small": any(entry.too_small for one in results.audit for entry in one.sets),
        "rows": [_audit_row(group[0].name, group) for group in groups] + [_audit_row("one another", own)],
        "leaks": [(one, finding) for one in results.audit for finding in one.findings if finding.leak],
        "of": f"{closest.kind}, seed {closest.seed}",
        "sheet": _data_uri(folder, closest.sheet, thumbnail=None),
    }


def _splits(results: Results, folder: Path) -> dict[str, Any] | None:
    """What is learned from, compared with what must stay unseen."""
    splits = results.audit_of_splits
    if splits is None:
        return None
    return {
        "copies": splits.copies,
        "sets": splits.sets,
        "held_out": splits.held_out,
        "findings": splits.findings,
        "sheet": _data_uri(folder, splits.sheet, thumbnail=None),
    }


def _audit_row(name: str, group: list[AuditedSet]) -> dict[str, Any]:
    likeness = [entry.closest.likeness for entry in group if entry.closest and entry.closest.likeness is not None]
    return {
        "name": name,
        "images": group[0].images,
        # Of the painted tiles it is told above, of all sets together.
        "too_plain": group[0].too_plain if group[0].kind != _AMONG else None,
        "limit": group[0].limit,
        "measured": group[0].limit_measured is not False,
        "copies": sum(entry.copies for entry in group),
        "own": sum(entry.copies_under_own_mask or 0 for entry in group),
        "held_out": group[0].leaks is not None,
        "closest": max(likeness, default=None),
    }


def _data_uri(folder: Path, name: str, thumbnail: int | None = _THUMBNAIL) -> str:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise TerraSynthError("a picture outside the study's folder", path=folder, found=name, fix="use relative paths")
    picture = Image.fromarray(open_image(path).values)
    # Nearest keeps the exact colours of a mask.
    if thumbnail is not None:
        picture.thumbnail((thumbnail, thumbnail), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _score(summary: Summary) -> str:
    """Mean, and half the width of the interval: "43.0 ± 1.2"."""
    mean = points(summary.mean, signed=False)
    if summary.ci95 is None:
        return mean
    return f"{mean} ± {points((summary.ci95[1] - summary.ci95[0]) / 2, signed=False)}"


def _tight(sentence: str) -> str:
    """Numbers kept on one line with what belongs to them."""
    return sentence.replace(" %", "\u00a0%")
