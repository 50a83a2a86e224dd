"""Are painted images copies? Of training images, of each other, or of images that must stay unseen: a leak.

And are there copies of what must stay unseen among real images that are learned from?

Nothing is filtered, chosen or trained here, and nothing else reads what comes out: it only reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from terrasynth.curation.copies import (
    HIGHEST_LIMIT,
    LEAST_DETAIL,
    LEAST_IMAGES,
    LEAST_SIDE,
    Nearest,
    detail,
    limit,
    nearest_images,
)
from terrasynth.curation.images import Images, Labelled, joined, read_folder, read_painted
from terrasynth.data.augment import dihedral, view
from terrasynth.data.folder import load_masks, turn_digest
from terrasynth.data.sheet import contact_sheet
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import atomic_write, write_json
from terrasynth.progress import track

__all__ = ["AMONG", "HELD_OUT", "Audit", "Layouts", "audit", "audit_folders", "audit_splits"]

_Array = NDArray[np.uint8]
#: Kinds of sets: images that must not be in the dataset, and the dataset itself.
HELD_OUT, AMONG = "held out", "one another"
#: A mask with more of one class than this is too plain to tell where it comes from.
_PLAIN_MASK = 0.98
#: Of the other set's own distances in features, the share that a painted image's is compared with.
_NEAR = 0.01
#: Findings and closest pairs of each set on the sheet, columns, and the side of a picture.
_SHOWN, _CLOSEST, _COLUMNS, _PICTURE = 24, 8, 8, 128
_PROBES = 256


@dataclass(frozen=True, eq=False)
class Layouts:
    """Masks that nothing may be painted under.

    Attributes:
        name: of the set.
        ids: M names.
        masks: uint8 (M, S, S), as large as the painted ones.
    """

    name: str
    ids: tuple[str, ...]
    masks: Tensor


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        report: all of it, JSON-able. `painted` images, of them `too_plain` to tell a copy by; `sets`, what they were
            compared with, with how many of its images are too plain or too small for that; `findings`; `images`, the
            nearest of every set for every image. (`audit_splits` says what its own has.)
        sheet: the findings and the closest pairs side by side.
    """

    report: dict[str, Any]
    sheet: Image.Image

    @property
    def leaks(self) -> list[dict[str, Any]]:
        """The findings that are leaks."""
        return [finding for finding in self.report["findings"] if finding["leak"]]

    def table(self) -> str:
        """One line a set, then the findings."""
        titles = ("", "images", "too plain", "limit", "closest", "copies", "under own mask", "leaks")
        lines: list[tuple[str, ...]] = [titles]
        for entry in self.report["sets"]:
            closest = None if entry["closest"] is None else entry["closest"]["likeness"]
            keys = ("copies", "copies_under_own_mask", "leaks")
            bound = _shown(entry["limit"]) + "*" * (entry["limit_measured"] is False)
            numbers = (entry["images"], entry["too_plain"], bound, closest, *(entry[key] for key in keys))
            lines.append((f"{entry['name']} ({entry['kind']})", *map(_shown, numbers)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join([first.ljust(widths[0]), *(t.rjust(w) for t, w in zip(others, widths[1:], strict=True))])
            for first, *others in lines
        ]
        if any(entry["limit_measured"] is False for entry in self.report["sets"]):
            rows += ["", f"* not measured, for want of {LEAST_IMAGES} images with enough detail: the highest limit"]
        found = [_sentence(finding) for finding in self.report["findings"]]
        plain = (
            f"{self.report['painted']} painted images, {self.report['too_plain']} of them too plain to tell a copy by"
        )
        return "\n".join([plain, "", *rows, *(["", listed(found, "\n", 20)] if found else [])])


def _shown(number: float | str | None) -> str:
    return "-" if number is None else f"{number:.2f}" if isinstance(number, float) else str(number)


def _sentence(finding: Mapping[str, Any]) -> str:
    likeness = "" if finding["likeness"] is None else f", likeness {finding['likeness']:.2f}"
    pair = f"{finding['painted']} ~ {finding['set']}/{finding['other']}"
    return f"{'LEAK' if finding['leak'] else 'copy'}  {pair}: {finding['how']}{likeness}"


def audit(
    painted: Labelled, train: Sequence[Images], against: Sequence[Images], layouts: Sequence[Layouts] = ()
) -> Audit:
    """Compare painted images with training images, with images they must not show, and with each other.

    A painted image is a copy if its file or its pixels (flips and turns included) are those of the other; or if its
    likeness to the other reaches the limit of the set and both have enough detail (`curation.copies`).

    Args:
        painted: what is audited.
        train: the images that the generator learned from; copies of them are told.
        against: images of validation and test; copies of them are leaks.
        layouts: masks of validation and test; to be painted under one of them is a leak.
    """
    plain = detail(painted.thumbnails) < LEAST_DETAIL
    compared = [_with_real(painted, plain, other, "training") for other in train]
    compared += [_with_real(painted, plain, other, HELD_OUT) for other in against]
    compared.append(_among_painted(painted, plain, compared))
    under = [(layout, _under(painted, layout)) for layout in layouts]
    findings = [finding for c in compared for finding in c.findings(painted)]
    findings += [
        _finding(painted.ids[index], layout.name, layout.ids[position], "painted under this mask", None, leak=True)
        for layout, found in under
        for index, position in found.items()
    ]
    report = {
        "painted": len(painted),
        "too_plain": int(plain.sum()),
        "sets": [*(c.summary(painted, plain) for c in compared), *(_of_masks(*each) for each in under)],
        "findings": sorted(findings, key=lambda finding: not finding["leak"]),
        "images": [
            {
                "id": id_,
                "too_plain": bool(plain[index]),
                "nearest": {c.other.name: c.nearest(index) for c in compared if c.found.likeness[index] > -1},
            }
            for index, id_ in enumerate(painted.ids)
        ],
    }
    return Audit(report, _sheet(painted, plain, compared))


def audit_splits(learned: Sequence[Labelled], held_out: Sequence[Labelled]) -> Audit:
    """Compare real images that are learned from with those that must stay unseen: a copy of one of these is a leak.

    All are compared in one search, which describes each set once. The limit is the highest one, as for paintings.

    Args:
        learned: training tiles, unlabelled images.
        held_out: validation and test tiles.

    Returns:
        As its report: `sets`, what is learned from, with how many images of each are too plain and how many copies;
        `held_out`, the others; `findings`, in which `painted` is an image that is learned from.
    """
    images, other = joined(learned), joined(held_out)
    plain = detail(images.thumbnails) < LEAST_DETAIL
    plain_other = detail(other.thumbnails) < LEAST_DETAIL
    with track(len(images) + len(other), f"comparing with {other.name}", unit="images") as progress:
        found = nearest_images(images.thumbnails, other.thumbnails, between=progress.advance)
    copies = _copies(images, plain, other, plain_other, found, HIGHEST_LIMIT)
    compared = _Compared(other, HELD_OUT, found, copies, int(plain_other.sum()), HIGHEST_LIMIT, None)
    copied = torch.tensor([index in compared.copies for index in range(len(images))])
    sizes = [len(of) for of in learned]
    sets = [
        {"name": of.name, "images": len(of), "too_plain": int(plains.sum()), "copies": int(leaking.sum())}
        for of, plains, leaking in zip(learned, plain.split(sizes), copied.split(sizes), strict=True)
    ]
    report = {"sets": sets, "held_out": compared.summary(images, plain), "findings": compared.findings(images)}
    return Audit(report, _sheet(images, plain, [compared], "learned"))


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compared:
    """The painted images with one other set; `copies` has for some of them how, and of which, they are one."""

    other: Images
    kind: str
    found: Nearest
    copies: Mapping[int, tuple[str, int]]
    too_plain: int
    limit: float
    measured: bool | None
    """Whether real images gave the limit; where there are too few, it is the highest one. None: they were not asked."""
    own_mask: frozenset[int] = frozenset()
    """The copies that were painted under the mask of what they are a copy of: they share its layout by design."""
    measures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leaking(self) -> bool:
        return self.kind == HELD_OUT

    def closest(self, plain: Tensor) -> list[int]:
        """The painted images that come nearest, nearest first."""
        order = self.found.likeness.argsort(descending=True, stable=True).tolist()
        return [i for i in order if not plain[i] and self.found.likeness[i] > -1][:_CLOSEST]

    def told(self, index: int) -> bool:
        """Whether a painted image is called a copy of this one: that pair needs no second look."""
        position = int(self.found.position[index])
        return self.kind == AMONG and self.copies.get(position, ("", -1))[1] == index

    def nearest(self, index: int) -> dict[str, Any]:
        found, ids = self.found, self.other.ids
        return {
            "id": ids[int(found.position[index])],
            "likeness": round(float(found.likeness[index]), 4),
            "turn": int(found.turn[index]),
            "id_in_features": ids[int(found.by_features[index])],
            "distance_in_features": round(float(found.distance[index]), 4),
        }

    def findings(self, painted: Images) -> list[dict[str, Any]]:
        return [
            _finding(
                painted.ids[index],
                self.other.name,
                self.other.ids[position],
                f"{how}, under its own mask" if index in self.own_mask else how,
                float(self.found.likeness[index]) if position == self.found.position[index] else None,
                leak=self.leaking,
            )
            for index, (how, position) in sorted(self.copies.items())
        ]

    def summary(self, painted: Images, plain: Tensor) -> dict[str, Any]:
        closest = self.closest(plain)[:1]
        return {
            "name": self.other.name,
            "kind": self.kind,
            "images": len(self.other),
            "too_plain": self.too_plain,
            "too_small": sum(side < LEAST_SIDE for side in self.other.sides),
            "limit": self.limit,
            "limit_measured": self.measured,
            **self.measures,
            "copies": len(self.copies),
            "copies_under_own_mask": len(self.own_mask),
            "leaks": len(self.copies) if self.leaking else None,
            "closest": {"painted": painted.ids[closest[0]], **self.nearest(closest[0])} if closest else None,
        }


def _with_real(painted: Labelled, plain: Tensor, other: Images, kind: str) -> _Compared:
    count = len(painted)
    # The other images among themselves are the yardstick; together, because that saves describing them twice.
    itself = torch.cat([torch.full((count,), -1), torch.arange(len(other))])
    together = torch.cat([painted.thumbnails, other.thumbnails])
    with track(count + 2 * len(other), f"comparing with {other.name}", unit="images") as progress:
        found, among = nearest_images(together, other.thumbnails, itself=itself, between=progress.advance).split(count)
    plain_other = detail(other.thumbnails) < LEAST_DETAIL
    real = among.likeness[~plain_other & ~plain_other[among.position] & (among.likeness > -1)]
    measures = {
        "likeness_among_real": None
        if not len(real)
        else {"median": float(real.median()), "p99": float(real.quantile(0.99)), "highest": float(real.max())},
        "share_nearer_in_features": None
        if len(other) == 1
        else float((found.distance < among.distance.quantile(_NEAR)).float().mean()),
    }
    # A leak is an accusation: by a percentile, one painting in a hundred would be one by chance.
    bound, measured = (HIGHEST_LIMIT, None) if kind == HELD_OUT else (limit(real), len(real) >= LEAST_IMAGES)
    copies = _copies(painted, plain, other, plain_other, found, bound)
    own = frozenset(i for i, (_, position) in copies.items() if painted.sources[i] == other.tiles[position])
    return _Compared(other, kind, found, copies, int(plain_other.sum()), bound, measured, own, measures)


def _among_painted(painted: Labelled, plain: Tensor, real: Sequence[_Compared]) -> _Compared:
    """The painted images with each other, at the highest of the limits that were measured."""
    bounds = [c.limit for c in real if c.measured]
    bound, measured = max(bounds, default=HIGHEST_LIMIT), bool(bounds)
    itself = torch.arange(len(painted))
    with track(2 * len(painted), "comparing the painted images", unit="images") as progress:
        found = nearest_images(painted.thumbnails, painted.thumbnails, itself=itself, between=progress.advance)
    firsts: dict[str, int] = {}
    copies = {
        index: ("same pixels", firsts[pixels])
        for index, pixels in enumerate(painted.pixels)
        if pixels is not None and firsts.setdefault(pixels, index) != index
    }
    near = (found.likeness >= bound) & ~plain & ~plain[found.position]
    for index in near.nonzero().flatten().tolist():
        # Of two that are copies of each other, the second is told.
        position = int(found.position[index])
        if position < index or int(found.position[position]) != index:
            copies.setdefault(index, ("near copy", position))
    sources = painted.sources
    own = frozenset(i for i, (_, other) in copies.items() if sources[i] is not None and sources[i] == sources[other])
    return _Compared(painted, AMONG, found, copies, int(plain.sum()), bound, measured, own)


def _copies(
    painted: Images, plain: Tensor, other: Images, plain_other: Tensor, found: Nearest, bound: float
) -> dict[int, tuple[str, int]]:
    """Which painted images are copies of which others, and how."""
    copies = _same(painted, other)
    near = (found.likeness >= bound) & ~plain & ~plain_other[found.position]
    for index in near.nonzero().flatten().tolist():
        copies.setdefault(index, ("near copy", int(found.position[index])))
    return copies


def _same(painted: Images, other: Images) -> dict[int, tuple[str, int]]:
    """Which painted images have the bytes or the pixels of which others."""
    files = {file: i for i, file in enumerate(other.files) if file is not None}
    pixels = {pixel: i for i, pixel in enumerate(other.pixels) if pixel is not None}
    found = {}
    for index, (file, pixel) in enumerate(zip(painted.files, painted.pixels, strict=True)):
        if pixel in pixels:
            found[index] = ("same file", files[file]) if file in files else ("same pixels", pixels[pixel])
    return found


def _under(painted: Labelled, layouts: Layouts) -> dict[int, int]:
    """Which painted images have which mask, turned or in the view that their metadata name."""
    turned = {turn_digest(mask.numpy()): index for index, mask in enumerate(layouts.masks)}
    flat, size = layouts.masks.flatten(1), layouts.masks.shape[-1]
    places = torch.arange(size * size, dtype=torch.float64).view(size, size)
    probes = torch.arange(0, size * size, max(1, size * size // _PROBES))
    found = {}
    with track(len(painted), f"comparing masks with {layouts.name}", unit="masks") as progress:
        for index, shown in enumerate(painted.views):
            progress.advance()
            mask = torch.from_numpy(painted.open_mask(index))
            if mask.flatten().bincount().max() > _PLAIN_MASK * mask.numel() or mask.shape != (size, size):
                continue
            if (same := turned.get(turn_digest(mask.numpy()))) is not None:
                found[index] = same
            elif shown is not None:
                # Where each pixel of the view comes from; a few of them rule nearly all masks out.
                _, source = view(torch.zeros(3, size, size, dtype=torch.uint8), places, shown)
                source = source.long().flatten()
                fits = (flat[:, source[probes]] == mask.flatten()[probes]).all(1).nonzero().flatten().tolist()
                whole = [i for i in fits if flat[i, source].equal(mask.flatten())]
                if whole:
                    found[index] = whole[0]
    return found


def _of_masks(layouts: Layouts, found: Mapping[int, int]) -> dict[str, Any]:
    return {
        "name": layouts.name,
        "kind": "masks, held out",
        "images": len(layouts.ids),
        "too_plain": None,
        "too_small": None,
        "limit": None,
        "limit_measured": None,
        "copies": len(found),
        "copies_under_own_mask": None,
        "leaks": len(found),
        "closest": None,
    }


def _finding(painted: str, name: str, other: str, how: str, likeness: float | None, *, leak: bool) -> dict[str, Any]:
    rounded = None if likeness is None else round(likeness, 4)
    return {"painted": painted, "set": name, "other": other, "how": how, "likeness": rounded, "leak": leak}


# --- showing ---------------------------------------------------------------------------------------------------------


def _sheet(painted: Labelled, plain: Tensor, compared: Sequence[_Compared], label: str = "painted") -> Image.Image:
    """Leaks, copies, then the closest pairs of every set; the other image lies as the painted one does."""
    copies = [(c, i) for c in sorted(compared, key=lambda c: not c.leaking) for i in sorted(c.copies)][:_SHOWN]
    closest = [(c, i) for c in compared for i in c.closest(plain) if i not in c.copies and not c.told(i)]
    pictures: dict[str, list[Tensor]] = {label: [], "nearest": []}
    masks, captions = [], []
    for c, index in [*copies, *closest]:
        how, position = c.copies.get(index, ("closest", int(c.found.position[index])))
        other, likeness = _picture(c.other.open(position)), ""
        if position == c.found.position[index]:
            other, likeness = dihedral(other, int(c.found.turn[index])), f" {c.found.likeness[index]:.2f}"
        pictures[label].append(_picture(painted.open(index)))
        pictures["nearest"].append(other)
        masks.append(torch.from_numpy(_square(painted.open_mask(index), Image.Resampling.NEAREST)))
        words = f"{'LEAK: ' if c.leaking and index in c.copies else ''}{how}{likeness}"
        captions.append(f"{words}\n{painted.ids[index]}\n{c.other.name}\n{c.other.ids[position]}")
    if not masks:  # one painted image, and nothing to compare it with
        return Image.new("RGB", (_PICTURE, _PICTURE), "white")
    images = {row: torch.stack(column) for row, column in pictures.items()}
    return contact_sheet(images, torch.stack(masks), painted.schema, columns=_COLUMNS, captions=captions)


def _picture(image: _Array) -> Tensor:
    way = Image.Resampling.BOX if min(image.shape[:2]) >= _PICTURE else Image.Resampling.NEAREST
    return torch.from_numpy(_square(image, way)).permute(2, 0, 1)


def _square(values: _Array, way: Image.Resampling) -> _Array:
    height, width = values.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(values[top : top + side, left : left + side]))
    return np.array(square.resize((_PICTURE, _PICTURE), way))


# --- the command -----------------------------------------------------------------------------------------------------


def audit_folders(
    dataset: str | Path,
    against: Sequence[str | Path],
    train: Sequence[str | Path] = (),
    masks: Sequence[str | Path] = (),
) -> tuple[Audit, list[Path], list[str]]:
    """Audit a synthetic dataset; writes `DATASET-audit.json` and `DATASET-audit.png` beside it.

    Args:
        dataset: folder of the dataset; nothing in it is changed.
        against: folders of images that must not be in it (validation, test).
        train: folders of the images that the generator learned from.
        masks: folders of masks that nothing may be painted under.

    Returns:
        What was found, the files written, and remarks on what was not looked at.

    Raises:
        TerraSynthError: no such dataset, or files that can not be used.
    """
    dataset = Path(dataset).resolve()
    names = _distinct([*train, *against, *masks])
    taken = dataset.name in names.values()
    painted = read_painted(dataset, name=f"{dataset.name} (painted)" if taken else dataset.name)
    report, sheet = (dataset.with_name(f"{dataset.name}-audit{suffix}") for suffix in (".json", ".png"))
    # The sheet of an earlier audit may lie among them, and is none of them.
    learned, held_out = ([read_folder(f, names[Path(f)], sheet) for f in folders] for folders in (train, against))
    layouts = []
    if masks:
        height, width = painted.open_mask(0).shape
        if height != width:
            raise TerraSynthError(
                "masks can only be compared with square tiles",
                path=dataset,
                found=f"{width} x {height}",
                fix="leave out --masks",
            )
        layouts = [Layouts(names[Path(folder)], *load_masks(folder, painted.schema, height)) for folder in masks]
    done = audit(painted, learned, held_out, layouts)
    remarks = [
        f"{entry['name']}: {entry['too_small']} of {entry['images']} images have a side below {LEAST_SIDE} pixels; "
        "copies of them can not be found by likeness, only by bytes and pixels"
        for entry in done.report["sets"]
        if entry["too_small"]
    ]
    stems = {Path(id_).stem for images in held_out for id_ in images.ids}
    if not masks and (named := sum(source in stems for source in painted.sources)):
        remarks.append(
            f"{named} painted images name a source mask that an image of --against is called as well: give the masks "
            "with --masks to see whether it is the same"
        )
    write_json(report, done.report)
    with atomic_write(sheet) as partial:
        done.sheet.save(partial)
    return done, [report, sheet], remarks


def _distinct(folders: Sequence[str | Path]) -> Mapping[Path, str]:
    """Short names of folders: as many of their last parts as it takes to tell them apart."""
    paths = list(dict.fromkeys(map(Path, folders)))
    for parts in range(1, 1 + max((len(path.resolve().parts) for path in paths), default=1)):
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(paths, names, strict=True)) if paths else {}
