"""A sheet of masks and the tiles that belong to them: previews, the README's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from terrasynth.data.schema import LabelSchema

__all__ = ["contact_sheet"]

Color = tuple[int, int, int]
#: Height of a line of a caption.
_LINE = 14


def contact_sheet(
    images: Mapping[str, torch.Tensor],
    masks: torch.Tensor,
    schema: LabelSchema,
    *,
    columns: int = 8,
    zoom: int = 1,
    legend: bool = False,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Masks above what belongs to them: rows of masks, and under each the rows of `images`, labelled.

    Args:
        images: by row label ("real", "painted", ...), (N, 3, H, W): uint8, or float in [0, 1].
        masks: (N, H, W) class indices.
        schema: colours of the classes.
        columns: tiles side by side before the next block of rows starts.
        zoom: whole-number enlargement, pixels kept sharp.
        legend: name the classes below, and unlabelled ground if there is some.
        captions: N texts of equally many lines, each below what belongs to a mask, cut to its width.
    """
    count, height, width = masks.shape
    columns = min(columns, count)
    blocks = -(-count // columns)
    font = ImageFont.load_default(13)
    margin, gap = 12, 4
    ink, paper = (28, 32, 35), (255, 255, 255)
    gutter = margin + int(max(font.getlength(label) for label in ("mask", *images))) + 10
    rows = 1 + len(images)
    cell_x, cell_y = width * zoom + gap, height * zoom + gap
    small = ImageFont.load_default(11)
    lines = 1 + captions[0].count("\n") if captions else 0
    block_height = rows * cell_y + 2 * gap + lines * _LINE
    sheet_width = gutter + columns * cell_x - gap + margin
    named = [*zip(schema.names, schema.colors, strict=True)]
    if (masks == schema.ignore_index).any():
        red, green, blue = schema.to_color(np.array([[schema.ignore_index]]))[0, 0].tolist()
        named.append(("unlabelled", (red, green, blue)))
    entries = _legend_layout(named, font, sheet_width, margin) if legend else []
    foot = entries[-1][2] + 22 if entries else 0
    sheet = Image.new("RGB", (sheet_width, 2 * margin + blocks * block_height - 3 * gap + foot), paper)
    draw = ImageDraw.Draw(sheet)
    for block in range(blocks):
        top = margin + block * block_height
        for row, label in enumerate(("mask", *images)):
            middle = top + row * cell_y + height * zoom // 2
            draw.text((gutter - 10, middle), label, font=font, fill=ink, anchor="rm")
            for column, index in enumerate(range(block * columns, min(count, (block + 1) * columns))):
                tile = np.asarray(schema.to_color(masks[index])) if row == 0 else _pixels(images[label][index])
                picture = Image.fromarray(tile).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
                sheet.paste(picture, (gutter + column * cell_x, top + row * cell_y))
        for column, caption in enumerate(captions[block * columns : (block + 1) * columns]):
            for line, text in enumerate(caption.split("\n")):
                corner = (gutter + column * cell_x, top + rows * cell_y + line * _LINE)
                draw.text(corner, _cut(text, small, width * zoom), font=small, fill=ink)
    base = sheet.height - margin - foot
    for name, x, y, color in entries:
        draw.rectangle((x, base + y + 10, x + 12, base + y + 22), fill=color, outline=(150, 150, 150))
        draw.text((x + 18, base + y + 16), name, font=font, fill=ink, anchor="lm")
    return sheet


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of a text that is too wide: names differ there."""
    while len(text) > 1 and font.getlength(text) > width:
        text = f"…{text.removeprefix('…')[1:]}"
    return text


def _pixels(image: torch.Tensor) -> np.ndarray:
    values = image.detach().cpu().numpy()
    if values.dtype != np.uint8:
        values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def _legend_layout(
    named: Sequence[tuple[str, Color]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, margin: int
) -> list[tuple[str, int, int, Color]]:
    entries: list[tuple[str, int, int, Color]] = []
    x, y = margin, 0
    for name, color in named:
        extent = 18 + int(font.getlength(name)) + 16
        if x > margin and x + extent > width:
            x, y = margin, y + 20
        entries.append((name, x, y, color))
        x += extent
    return entries
