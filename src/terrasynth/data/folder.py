"""Labelled tiles in memory, from image and mask files, from a synthetic dataset or from the procedural world.

A split of a few hundred or thousand small tiles fits in memory many times over, so it is read once, checked whole, and
never touched again: whatever is wrong with the files is said before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from terrasynth.data.read import common_coding, read_image, read_mask, refuse_bad_files, without_recipe
from terrasynth.data.schema import LabelSchema, packaged_labels
from terrasynth.data.unlabelled import cut_windows, find_images, merged_schema, pseudo_masks
from terrasynth.data.view import View
from terrasynth.data.world import WORLD_SCHEMA, render
from terrasynth.data.write import Rows, read_manifest
from terrasynth.errors import TerraSynthError, listed
from terrasynth.io import IMAGE_SUFFIXES, digest
from terrasynth.progress import say
from terrasynth.recipe import DataConfig, SplitConfig, WorldConfig

__all__ = [
    "Sample",
    "Split",
    "Tiles",
    "check_splits",
    "files_by_name",
    "join",
    "load_masks",
    "load_references",
    "load_synthetic",
    "load_tiles",
    "read_samples",
    "turn_digest",
    "unlabelled_windows",
]

Split = Literal["train", "validation", "test"]
_Array = NDArray[np.uint8]


class Sample(TypedDict):
    """One labelled tile, in torchgeo's convention."""

    image: Tensor
    """float32 (3, S, S) in [0, 1]."""
    mask: Tensor
    """int64 (S, S): class index, or the schema's `ignore_index`."""
    id: str
    caption: str


@dataclass(frozen=True, eq=False)
class Tiles:
    """A split, held in memory.

    Attributes:
        ids: N distinct names.
        images: uint8 (N, 3, S, S).
        masks: uint8 (N, S, S): class index, or the schema's `ignore_index`.
        schema: the classes.
        caption: template of the captions of `sample`; one for all, or one a tile.
        left_out: how many more the split has that can not be used (`data.skip_bad`).
        weights: of added tiles, how often each is drawn compared with the others; None draws all alike.
    """

    ids: tuple[str, ...]
    images: Tensor
    masks: Tensor
    schema: LabelSchema
    caption: str | tuple[str, ...] = "a satellite image of {classes}"
    left_out: int = 0
    weights: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int) -> Sample:
        """The tile at `index`, as numbers for a network."""
        return {
            "image": self.images[index].float() / 255,
            "mask": self.masks[index].long(),
            "id": self.ids[index],
            "caption": self.schema.caption(self.masks[index], self.template(index)),
        }

    def template(self, index: int) -> str:
        """The template of the caption of the tile at `index`."""
        return self.caption if isinstance(self.caption, str) else self.caption[index]

    def captions(self) -> list[str]:
        """The caption of every tile."""
        return [self.schema.caption(mask, self.template(index)) for index, mask in enumerate(self.masks)]

    def first(self, count: int) -> Tiles:
        """The first `count` tiles."""
        caption = self.caption if isinstance(self.caption, str) else self.caption[:count]
        weights = None if self.weights is None else self.weights[:count]
        return Tiles(self.ids[:count], self.images[:count], self.masks[:count], self.schema, caption, weights=weights)

    def take(self, indices: Sequence[int]) -> Tiles:
        """The tiles at `indices`, in that order."""
        rows = list(indices)
        ids = tuple(self.ids[row] for row in rows)
        caption = self.caption if isinstance(self.caption, str) else tuple(self.caption[row] for row in rows)
        weights = None if self.weights is None else tuple(self.weights[row] for row in rows)
        return Tiles(ids, self.images[rows], self.masks[rows], self.schema, caption, weights=weights)

    @property
    def unlabelled(self) -> int:
        """How many tiles have no labelled pixel."""
        return int((self.masks == self.schema.ignore_index).flatten(1).all(1).sum())

    def fingerprint(self) -> str:
        """SHA-256 of names, pixels and classes, as 64 hex digits: equal for equal content, however it was stored.

        Captions of single tiles and weights are content; one template for all is a setting. Computed once: a study asks
        for it with every unit.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        own: list[Any] = [] if isinstance(self.caption, str) else [self.caption]
        own += [] if self.weights is None else [self.weights]
        state = hashlib.sha256(json.dumps([self.ids, self.schema.to_dict(), self.images.shape, *own]).encode())
        for tensor in (self.images, self.masks):
            state.update(tensor.numpy().tobytes())
        return state.hexdigest()

    @cached_property
    def _by_turn_digest(self) -> Mapping[str, str]:
        """The name of every tile by the digest of its pixels; tiles of one single colour are left out."""
        return {
            turn_digest(image.permute(1, 2, 0).numpy()): id_
            for id_, image in zip(self.ids, self.images, strict=True)
            if (image != image[:, :1, :1]).any()
        }


def load_tiles(config: DataConfig, split: Split, *, base: Path | None = None) -> Tiles:
    """Load one split of the labelled tiles.

    With `kind: folder`, an image and a mask belong together by their name without suffix. Images are 8-bit grey,
    palette or RGB; masks are class indices or the colours of the schema (`mask_coding`). A tile that is not square is
    cut to the square in its centre, then brought to `image_size`: `fit: resize` averages the image's pixels by area
    and takes the most frequent class (by whole factors) or the one in the middle (otherwise); `fit: crop` cuts out the
    centre.

    With `kind: world`, the tiles are rendered; each derives from the world's seed, the split and its index. With `kind:
    unlabelled` there is a training split alone: windows of unlabelled images under pseudo-masks, and rendered scenes.

    Args:
        config: where the tiles are and what they become.
        split: which split.
        base: folder that a relative `label_schema` starts from, before `root`.

    Raises:
        TerraSynthError: anything that is wrong with the data, with every bad file of the split in one message. With
            `skip_bad` such files are listed on standard error, as long as others are left.
    """
    if config.kind == "world":
        return _render_world(config.world, split, config.image_size, config.caption)
    root = _root(config)
    if config.kind == "unlabelled":
        return _load_unlabelled(config, split, root)
    schema = _load_schema(config, root, base)
    images, masks, kept = [], [], []
    problems: list[TerraSynthError] = []
    pairs = _pair_files(config, split, root, problems)
    total = len(pairs) + len(problems)
    for name, image_path, mask_path in pairs:
        try:
            image = read_image(image_path)
            readings = read_mask(mask_path, schema, config.mask_coding)
            shape = next(iter(readings.values())).shape
            if shape != image.shape[:2]:
                raise TerraSynthError(
                    "the mask is not as large as its image",
                    path=mask_path,
                    found=f"{_size(shape)}, and {_size(image.shape)} in {image_path}",
                    fix="export both from the same window",
                )
            images.append(_fit_image(image, config, image_path))
            masks.append({coding: _fit_mask(mask, config) for coding, mask in readings.items()})
            kept.append((name, mask_path))
        except TerraSynthError as error:
            problems.append(error)
    refuse_bad_files(problems, total, f"tiles of the {split} split", skip_bad=config.skip_bad)
    coding = common_coding(masks, [path for _, path in kept], schema, chosen=config.mask_coding)
    tiles = Tiles(
        tuple(name for name, _ in kept),
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack([readings[coding] for readings in masks])),
        schema,
        config.caption,
        len(problems),
    )
    if tiles.unlabelled == len(tiles):
        raise TerraSynthError(
            f"no tile of the {split} split has a labelled pixel",
            path=kept[0][1].parent,
            found=f"{len(tiles)} masks, unlabelled everywhere (read as {coding})",
            fix="check ignore_index and ignore_colors of the label schema, and data.mask_coding",
        )
    return tiles


def load_masks(
    folder: str | Path, schema: LabelSchema, image_size: int, *, skip_bad: bool = False
) -> tuple[tuple[str, ...], Tensor]:
    """Load every mask of a folder, without images: layouts to paint.

    Args:
        folder: mask files, coded as `load_tiles` reads them.
        schema: their classes.
        image_size: what they are brought to, by the most frequent or middle class.
        skip_bad: leave out files that can not be used, and list them on standard error.

    Returns:
        The names without suffix, and uint8 masks (N, S, S).

    Raises:
        TerraSynthError: anything that is wrong, with every bad file in one message, unless `skip_bad`.
    """
    folder = Path(folder)
    config = DataConfig(image_size=image_size)
    files = _by_stem(folder, "--masks")
    if not files:
        raise TerraSynthError("no masks here", path=folder, expected=", ".join(IMAGE_SUFFIXES), fix="correct --masks")
    paths: list[Path] = []
    masks, problems = [], []
    for path, *others in files.values():
        try:
            if others:
                raise _several([path, *others])
            readings = read_mask(path, schema, config.mask_coding)
            shape = next(iter(readings.values())).shape
            if min(shape) < image_size:
                raise TerraSynthError(
                    "the mask is smaller than the model paints",
                    path=path,
                    found=_size(shape),
                    expected=f"at least {image_size} x {image_size}",
                    fix="cut larger masks",
                )
            masks.append({coding: _fit_mask(mask, config) for coding, mask in readings.items()})
            paths.append(path)
        except TerraSynthError as error:
            problems.append(without_recipe(error))
    refuse_bad_files(problems, len(files), f"masks of {folder}", skip_bad=skip_bad)
    try:
        coding = common_coding(masks, paths, schema, chosen=config.mask_coding)
    except TerraSynthError as error:
        raise without_recipe(error) from error
    return tuple(path.stem for path in paths), torch.from_numpy(np.stack([readings[coding] for readings in masks]))


def load_references(folder: str | Path, schema: LabelSchema, image_size: int, *, skip_bad: bool = False) -> Tiles:
    """Load every image of a folder, as references to paint like: under wholly unlabelled masks.

    Args:
        folder: image files.
        schema: the classes.
        image_size: what they are shrunk to, as tiles are.
        skip_bad: leave out files that can not be used, and list them on standard error.

    Raises:
        TerraSynthError: anything that is wrong, with every bad file in one message, unless `skip_bad`.
    """
    folder = Path(folder)
    config = DataConfig(image_size=image_size)
    files = _by_stem(folder, "--references")
    if not files:
        fix = "correct --references"
        raise TerraSynthError("no images here", path=folder, expected=", ".join(IMAGE_SUFFIXES), fix=fix)
    images: dict[str, _Array] = {}
    problems: list[TerraSynthError] = []
    for stem, (path, *others) in files.items():
        try:
            if others:
                raise _several([path, *others])
            image = read_image(path)
            if min(image.shape[:2]) < image_size:
                raise TerraSynthError(
                    "the image is smaller than the model paints",
                    path=path,
                    found=_size(image.shape),
                    expected=f"at least {image_size} x {image_size}",
                    fix="take larger images",
                )
            images[stem] = _fit_image(image, config, path)
        except TerraSynthError as error:
            problems.append(without_recipe(error))
    refuse_bad_files(problems, len(files), f"images of {folder}", skip_bad=skip_bad)
    masks = torch.full((len(images), image_size, image_size), schema.ignore_index, dtype=torch.uint8)
    pixels = torch.from_numpy(np.stack(list(images.values()))).permute(0, 3, 1, 2).contiguous()
    return Tiles(tuple(images), pixels, masks, schema)


def load_synthetic(folder: str | Path, view: str | None = None) -> Tiles:
    """Load a finished dataset of `data.write.SyntheticWriter`.

    Args:
        folder: of the dataset.
        view: name of a view that `terrasynth curate` made: its samples, weights and labels; None loads all there is.

    Raises:
        TerraSynthError: the folder is no such dataset, is unfinished, has files missing, added or damaged, or no such
            view.
    """
    schema, all_rows = read_manifest(folder)
    chosen = None if view is None else View.read(folder, view)
    rows = all_rows if chosen is None else chosen.rows(all_rows)
    ids, images, masks = [], [], []
    for row, image, mask in read_samples(folder, schema, rows, chosen):
        ids.append(row["id"])
        images.append(image)
        masks.append(mask)
    return Tiles(
        tuple(ids),
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(masks)),
        schema,
        weights=None if chosen is None else tuple(chosen.weights[id] for id in ids),
    )


def read_samples(
    folder: str | Path, schema: LabelSchema, rows: Rows | Sequence[Mapping[str, Any]], view: View | None = None
) -> Iterator[tuple[Mapping[str, Any], _Array, _Array]]:
    """Read samples of a synthetic dataset one after the other.

    Args:
        folder: of the dataset.
        schema: its classes.
        rows: which samples; `read_manifest` has them all.
        view: whose labels they get.

    Yields:
        Row, image uint8 (H, W, 3) and mask uint8 (H, W), of every sample that is whole.

    Raises:
        TerraSynthError: some are not: after the last one, with all of them in one message. Or the view's scores are
            damaged: at once, since one command mends them all.
    """
    folder = Path(folder)
    problems: list[TerraSynthError] = []
    for row in rows:
        try:
            image = read_image(folder / row["file_name"])
            mask = read_mask(folder / row["mask_file_name"], schema, "index")["index"]
            if image.shape[:2] != mask.shape:
                raise TerraSynthError(
                    "the mask is not as large as its image",
                    path=folder / row["mask_file_name"],
                    found=_size(mask.shape),
                )
        except TerraSynthError as error:
            problems.append(error)
        else:
            if view is not None:
                mask = view.filtered(row["id"], mask, schema.ignore_index)
            yield row, image, mask
    if problems:
        raise TerraSynthError(
            f"{len(problems)} of {len(rows)} samples are damaged",
            path=folder,
            found="\n    " + listed([f"{e.path}: {e.problem}" for e in problems], separator="\n    "),
            fix="delete these files and run the command that painted them again",
        )


def join(parts: Sequence[Tiles]) -> Tiles:
    """One set of all tiles of `parts`, which have the same size and classes; those without weights weigh 1."""
    weighted = any(tiles.weights is not None for tiles in parts)
    return Tiles(
        tuple(id_ for tiles in parts for id_ in tiles.ids),
        torch.cat([tiles.images for tiles in parts]),
        torch.cat([tiles.masks for tiles in parts]),
        parts[0].schema,
        tuple(tiles.template(index) for tiles in parts for index in range(len(tiles))),
        weights=tuple(w for tiles in parts for w in tiles.weights or (1.0,) * len(tiles)) if weighted else None,
    )


def check_splits(**splits: Tiles) -> None:
    """Refuse splits that share a tile: what is trained on must not be tested on.

    Two tiles are the same if their pixels are equal, flipped and turned as well (images of one single colour apart:
    blank tiles are alike everywhere), or if they have the same name and differ by less than a quarter of their own
    contrast, as a copy that was compressed again does. Equal names alone are fine: many datasets number every split
    from 0.

    Args:
        splits: the splits by name, `check_splits(train=..., test=...)`.

    Raises:
        TerraSynthError: two splits share a tile.
    """
    shared = []
    for (first, a), (second, b) in combinations(splits.items(), 2):
        named, other = a._by_turn_digest, b._by_turn_digest
        shared += [f"{first}/{named[key]} = {second}/{other[key]}" for key in named.keys() & other.keys()]
        positions = {id_: index for index, id_ in enumerate(b.ids)}
        for index, id_ in enumerate(a.ids):
            if id_ in positions and _is_recompressed(a.images[index], b.images[positions[id_]]):
                shared.append(f"{first}/{id_} ~ {second}/{id_}")
    if shared:
        raise TerraSynthError(
            "splits share tiles: the test would reward memory",
            found=listed(sorted(shared), separator=", "),
            expected="every tile in one split only",
            fix="take these tiles out of one of the split lists, or out of data.unlabelled",
        )


def turn_digest(values: _Array) -> str:
    """One digest of all flips and turns of (H, W) or (H, W, C)."""
    ways = [np.rot90(side, turns) for side in (values, values[:, ::-1]) for turns in range(4)]
    # The way whose first row comes first stands for all; the rest of the pixels decides only where several share it.
    rows = [(way.shape, way[0].tobytes()) for way in ways]
    first = min(rows)
    whole = min(way.tobytes() for way, row in zip(ways, rows, strict=True) if row == first)
    return hashlib.sha256(repr(first[0]).encode() + whole).hexdigest()


def _is_recompressed(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.equal(b):
        return False
    a, b = a.float(), b.float()
    contrast = (a - a.mean((1, 2), keepdim=True)).abs().mean()
    return bool((a - b).abs().mean() < contrast / 4)


# --- the procedural world --------------------------------------------------------------------------------------------


def _render_world(world: WorldConfig, split: Split, size: int, caption: str) -> Tiles:
    scenes = [
        render(int(digest("tile", world.seed, split, index), 16) >> 1, size=size, gsd=world.gsd, region=world.region)
        for index in range(getattr(world, split))
    ]
    return Tiles(
        tuple(f"{split}-{index:05d}" for index in range(len(scenes))),
        torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack([mask for _, mask in scenes])),
        WORLD_SCHEMA,
        caption,
    )


# --- images without labels -------------------------------------------------------------------------------------------


def unlabelled_windows(config: DataConfig, schema: LabelSchema) -> Tiles | None:
    """The windows of `data.unlabelled` under wholly unlabelled masks; None if there are none.

    Raises:
        TerraSynthError: as `cut_windows`; or an image is a validation or test tile, by whatever path.
    """
    if not config.unlabelled:
        return None
    root = _root(config)
    _refuse_held_out(config, root)
    ids: list[str] = []
    images, captions = [], []
    for number, source in enumerate(config.unlabelled):
        names, windows = cut_windows(root, source, config.image_size, skip_bad=config.skip_bad)
        ids += [f"source-{number}-{name}" for name in names]
        images.append(windows)
        captions += [source.caption] * len(names)
    joined = torch.cat(images)
    masks = torch.full((len(joined), *joined.shape[2:]), schema.ignore_index, dtype=torch.uint8)
    return Tiles(tuple(ids), joined, masks, schema, tuple(captions))


def _refuse_held_out(config: DataConfig, root: Path) -> None:
    """Refuse unlabelled images that are validation or test tiles; files are compared, not the spelling of paths."""
    held_out: set[Path] = set()
    for split in ("validation", "test"):
        where: SplitConfig = getattr(config, split)
        top = root / (where.root or "")
        folder = top / config.images.replace("{split}", where.folder)
        if not folder.is_dir() or (where.list is not None and not (top / where.list).is_file()):
            continue  # a generator may be trained before there is such a split
        images = _by_stem(folder, f"data.images and data.{split}.folder")
        names = images if where.list is None else _read_list(top / where.list, split, images)
        held_out |= {path.resolve() for name in names for path in images.get(name, ())}
    unlabelled = {path.resolve(): path for source in config.unlabelled for path in find_images(root, source)}
    if shared := sorted(unlabelled[path] for path in held_out & unlabelled.keys()):
        raise TerraSynthError(
            "unlabelled images are validation or test tiles",
            path=root,
            found=f"{len(shared)} of them, as {shared[0]}",
            expected="images of the training split, or others",
            fix="narrow the pattern in data.unlabelled",
        )


def _load_unlabelled(config: DataConfig, split: Split, root: Path) -> Tiles:
    """What a base model learns from: windows under pseudo-masks, then the procedural worlds."""
    if split != "train":
        raise TerraSynthError(
            f"there is no {split} split",
            path=root,
            found="data.kind: unlabelled",
            fix="train a base model with `terrasynth train`; a study needs labelled tiles",
        )
    real = unlabelled_windows(config, WORLD_SCHEMA)
    if real is None:
        raise TerraSynthError("the recipe names no images", found="data.unlabelled: []", fix="name at least one source")
    masks, colors = pseudo_masks(real.images, config.clusters)
    schema = merged_schema(WORLD_SCHEMA, colors)
    worlds = [_render_world(world, split, config.image_size, config.caption) for world in config.worlds]
    return Tiles(
        (*real.ids, *(f"world-{i}-{id_}" for i, tiles in enumerate(worlds) for id_ in tiles.ids)),
        torch.cat([real.images, *(tiles.images for tiles in worlds)]),
        torch.cat([masks + WORLD_SCHEMA.num_classes, *(tiles.masks for tiles in worlds)]),
        schema,
        (*real.caption, *(config.caption for tiles in worlds for _ in tiles.ids)),
    )


# --- finding the files -----------------------------------------------------------------------------------------------


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise TerraSynthError("no data folder is given", fix="name it with --data DIR, or set data.root in the recipe")
    root = config.root.expanduser()
    if not root.is_dir():
        raise TerraSynthError("no such folder", path=root.absolute(), fix="check --data, or data.root in the recipe")
    return root


def _load_schema(config: DataConfig, root: Path, base: Path | None) -> LabelSchema:
    if config.label_schema is None:
        raise TerraSynthError(
            "the recipe names no label schema",
            path=root,
            expected='a YAML file with classes: [{name: building, color: "#3C1098"}, ...], or a packaged schema',
            fix=f"write one and set data.label_schema, or take one of {', '.join(packaged_labels())}",
        )
    return LabelSchema.load(config.label_schema, [base or Path(), root])


def _pair_files(
    config: DataConfig, split: Split, root: Path, problems: list[TerraSynthError]
) -> list[tuple[str, Path, Path]]:
    """Name, image and mask of every tile of the split; what has no partner goes to `problems`."""
    where: SplitConfig = getattr(config, split)
    root = root / (where.root or "")
    images = _by_stem(root / config.images.replace("{split}", where.folder), f"data.images and data.{split}.folder")
    masks = _by_stem(root / config.masks.replace("{split}", where.folder), f"data.masks and data.{split}.folder")
    names = sorted(images) if where.list is None else _read_list(root / where.list, split, images)
    pairs = []
    for name in names:
        if name not in images:
            problem = "named in the split list, but there is no such image"
            problems.append(TerraSynthError(problem, path=name, fix="correct the list or copy the image"))
        elif name not in masks:
            near = next((stem for stem in masks if stem.startswith(name) or name.startswith(stem)), None)
            problems.append(
                TerraSynthError(
                    "the image has no mask",
                    path=images[name][0],
                    found=None if near is None else f"{masks[near][0]}, which has another name",
                    fix="give the mask the image's name, up to the suffix",
                )
            )
        elif len(images[name]) > 1 or len(masks[name]) > 1:
            problems.append(_several(images[name] if len(images[name]) > 1 else masks[name]))
        else:
            pairs.append((name, images[name][0], masks[name][0]))
    if not names:
        raise TerraSynthError(
            f"the {split} split is empty",
            path=root / (where.list or config.images.replace("{split}", where.folder)),
            expected="at least one tile",
            fix=f"add tiles, or correct data.{split}",
        )
    if where.list is None and (unused := len(masks.keys() - images.keys())):
        say(f"{split} split: masks without an image, not used: {unused}")
    return pairs


def files_by_name(folder: str | Path, key: str) -> dict[str, Path]:
    """The images or masks directly in a folder, by their names without suffix.

    Args:
        folder: where they are.
        key: what to correct if it is the wrong one, in messages.

    Raises:
        TerraSynthError: there is no such folder, none of them in it, or several with one name.
    """
    files = _by_stem(Path(folder), key)
    for paths in files.values():
        if len(paths) > 1:
            raise _several(paths)
    if not files:
        raise TerraSynthError("no images here", path=folder, expected=", ".join(IMAGE_SUFFIXES), fix=f"correct {key}")
    return {name: paths[0] for name, paths in files.items()}


def _several(paths: Sequence[Path]) -> TerraSynthError:
    return TerraSynthError(
        "several files with one name", path=paths[0], found=listed([path.name for path in paths]), fix="keep one"
    )


def _by_stem(folder: Path, keys: str) -> dict[str, list[Path]]:
    if not folder.is_dir():
        beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise TerraSynthError(
            "no such folder",
            path=folder,
            found=f"{folder.parent} has {listed(beside)}" if beside else None,
            fix=f"correct {keys}",
        )
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            files.setdefault(path.stem, []).append(path)
    return files


def _read_list(path: Path, split: Split, images: Mapping[str, Any]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise TerraSynthError(
            "the split list is missing",
            path=path,
            expected="a text file with one tile name a line",
            fix=f"write it, or set data.{split}.list (null takes every image of the folder)",
        ) from error
    except UnicodeDecodeError as error:
        raise TerraSynthError("the split list is no UTF-8 text", path=path, found=error) from error
    except OSError as error:
        raise TerraSynthError(
            "the split list can not be read",
            path=path,
            found=error.strerror,
            expected="a text file with one tile name a line",
            fix=f"correct data.{split}.list (null takes every image of the folder)",
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    # `tile.png` for `tile` is plain enough; `tile.5` may be a name.
    names = [
        Path(name).stem if name not in images and Path(name).suffix.lower() in IMAGE_SUFFIXES else name
        for name in names
    ]
    seen: set[str] = set()
    repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        raise TerraSynthError(
            "the split list names tiles more than once",
            path=path,
            found=listed(repeated, separator=", "),
            fix="remove the repetitions: they would weigh these tiles more",
        )
    return names


# --- bringing them to size -------------------------------------------------------------------------------------------


def _fit_image(image: _Array, config: DataConfig, path: Path) -> _Array:
    size = config.image_size
    if min(image.shape[:2]) < size:
        raise TerraSynthError(
            "the tile is smaller than data.image_size",
            path=path,
            found=_size(image.shape),
            expected=f"at least {size} x {size}",
            fix=f"set data.image_size to at most {min(image.shape[:2])}, or cut larger tiles",
        )
    if config.fit == "crop":
        return _centre(image, size)
    square = _centre(image, min(image.shape[:2]))
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BOX))


def _fit_mask(mask: _Array, config: DataConfig) -> _Array:
    size = config.image_size
    if config.fit == "crop":
        return _centre(mask, size)
    square = _centre(mask, min(mask.shape))
    factor, remainder = divmod(len(square), size)
    if remainder:
        middles = ((np.arange(size) + 0.5) * len(square) / size).astype(np.intp)
        return square[np.ix_(middles, middles)]
    if factor == 1:
        return square
    # (factor^2, size, size): the pixels that fall into each one of the result.
    blocks = square.reshape(size, factor, size, factor).transpose(1, 3, 0, 2).reshape(-1, size, size)
    middle = blocks[factor // 2 * (factor + 1)]
    best, votes = middle, np.zeros(middle.shape, dtype=np.int32)
    for value in np.flatnonzero(np.bincount(square.ravel())):
        # Twice the count, plus one for the pixel in the middle, which settles ties.
        count = 2 * (blocks == value).sum(axis=0, dtype=np.int32) + (middle == value)
        best, votes = np.where(count > votes, np.uint8(value), best), np.maximum(count, votes)
    return best


def _centre(pixels: _Array, size: int) -> _Array:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


# --- saying what is wrong --------------------------------------------------------------------------------------------


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
