"""What the folder of a segmentor says of it: known before the network is built, and without the libraries it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.io import read_json
from terrasynth.recipe import SegmentorConfig

__all__ = ["Description", "not_whole"]


@dataclass(frozen=True)
class Description:
    """The `config.json` of a segmentor, as `Segmentor.save_pretrained` writes it.

    Attributes:
        config: architecture, encoder and options.
        num_classes: K.
        ignore_index: the value of unlabelled pixels.
        class_names: K names, or None.
        schema: the label schema of its training tiles; None if it was saved without.
        network: all sizes of a network of transformers; None for others.
    """

    config: SegmentorConfig
    num_classes: int
    ignore_index: int
    class_names: tuple[str, ...] | None
    schema: LabelSchema | None
    network: dict[str, Any] | None

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read it from the folder of a segmentor.

        Raises:
            TerraSynthError: it is not one, or its description is not whole.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise TerraSynthError(
                "not the folder of a segmentor",
                path=folder,
                found="no config.json",
                fix="give a folder called `segmentor`, from `cells/` of a study",
            )
        values = read_json(folder / "config.json")
        if not isinstance(values, dict) or values.get("kind") != "segmentor":
            raise TerraSynthError(
                "not the folder of a segmentor",
                path=folder,
                expected="a config.json with kind: segmentor",
                fix="give a folder that `Segmentor.save_pretrained` wrote",
            )
        try:
            names, schema = values["class_names"], values.get("label_schema")  # older files have no schema
            return cls(
                config=SegmentorConfig(**{key: values[key] for key in ("architecture", "encoder", "options")}),
                num_classes=int(values["num_classes"]),
                ignore_index=int(values["ignore_index"]),
                class_names=None if names is None else tuple(names),
                schema=None if schema is None else LabelSchema.from_dict(schema, path=folder / "config.json"),
                network=values.get("network"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise not_whole(folder, error) from error


def not_whole(folder: str | Path, error: Exception) -> TerraSynthError:
    """What to say of a folder that holds only parts of a segmentor, or damaged ones."""
    return TerraSynthError(
        "the segmentor can not be loaded",
        path=folder,
        found=str(error),
        expected="config.json and model.safetensors of one `Segmentor.save_pretrained`",
        fix="copy the folder again, or train the segmentor again",
    )
