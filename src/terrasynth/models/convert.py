"""Import of the published TODSynth checkpoint layout.

| published | here |
|---|---|
| `sd3_transformer.X` | `X` |
| `mmdit_blocks.N.sd3_block.X` | `transformer_blocks.N.X` |
| `mmdit_blocks.N.attn.sd3_attn.X` | `transformer_blocks.N.attn.X` |
| `mmdit_blocks.N.attn2.X` | `transformer_blocks.N.attn2.X` |
| `msk_pos_embed.proj.X` | `mask_embed.proj.X` |
| `mmdit_blocks.N.norm1.linear.X` | `transformer_blocks.N.mask.modulation.X`, the rows that are read |
| `mmdit_blocks.N.attn.to_out.0.X` | `transformer_blocks.N.mask.to_out.X` |
| `mmdit_blocks.N.{attn,ff}.X` | `transformer_blocks.N.mask.{,ff.}X` |

Left out: the mask's own positional grid (equal to the image's), and what has no effect: in the last block the mask's
query, output, feed-forward and all of its modulation but the attention's shift and scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from terrasynth.errors import TerraSynthError
from terrasynth.models.mmdit import TEXT_BRANCH, MaskMMDiT, MlpModulation

__all__ = ["check_fit", "first", "load_published", "read_checkpoint"]

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"sd3_transformer\.(.+)", r"\1"),
        (r"mmdit_blocks\.(\d+)\.sd3_block\.(.+)", r"transformer_blocks.\1.\2"),
        (r"mmdit_blocks\.(\d+)\.attn\.sd3_attn\.(.+)", r"transformer_blocks.\1.attn.\2"),
        (r"mmdit_blocks\.(\d+)\.attn2\.(.+)", r"transformer_blocks.\1.attn2.\2"),
        (r"msk_pos_embed\.(.+)", r"mask_embed.\1"),
        (r"mmdit_blocks\.(\d+)\.norm1\.linear\.(.+)", r"transformer_blocks.\1.mask.modulation.\2"),
        (r"mmdit_blocks\.(\d+)\.attn\.to_out\.0\.(.+)", r"transformer_blocks.\1.mask.to_out.\2"),
        (r"mmdit_blocks\.(\d+)\.attn\.(.+)", r"transformer_blocks.\1.mask.\2"),
        (r"mmdit_blocks\.(\d+)\.ff\.(.+)", r"transformer_blocks.\1.mask.ff.\2"),
    )
)
_MASK_EMBED = "msk_pos_embed.proj.weight"


def load_published(
    source: str | Path | Mapping[str, Tensor],
    base: SD3Transformer2DModel | Mapping[str, Any],
    *,
    mask_mlp_modulation: MlpModulation = "image",
) -> MaskMMDiT:
    """Load a checkpoint in the layout of the published TODSynth code.

    Args:
        source: a safetensors file, the `checkpoint-N` folder that holds it as `model.safetensors`, or a state dict.
        base: the transformer that the checkpoint was trained from; published checkpoints lack its frozen text branch.
            For a complete state dict its configuration alone (a mapping) is enough.
        mask_mlp_modulation: "image" computes what the published code computes, where the image stream's shift, scale
            and gate modulate the mask's feed-forward. "own" takes the mask branch's, which that code never trains.

    Returns:
        The model, in the dtype and on the device of `base` (float32 on the CPU for a configuration).

    Raises:
        TerraSynthError: no safetensors file, another layout, foreign or missing tensors, or tensors of another size.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    published = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
    if _MASK_EMBED not in published:
        raise TerraSynthError(
            "not a checkpoint in the published TODSynth layout",
            path=path,
            found=f"tensors {first(published)}",
            expected=f"{_MASK_EMBED} among them",
            fix="load folders that TerraSynth or diffusers saved with `from_pretrained`",
        )
    mask_channels = published[_MASK_EMBED].shape[1]
    if isinstance(base, SD3Transformer2DModel):
        model = MaskMMDiT.from_sd3(
            base, mask_channels=mask_channels, mask_init="random", mask_mlp_modulation=mask_mlp_modulation
        )
        optional: tuple[str, ...] = TEXT_BRANCH
    else:
        config = {name: value for name, value in base.items() if not name.startswith("_")}
        model = MaskMMDiT(**config, mask_channels=mask_channels, mask_mlp_modulation=mask_mlp_modulation)
        optional = ()

    expected = model.state_dict()
    renamed = {name: _rename(name) for name in published}
    state = {renamed[name]: tensor for name, tensor in published.items() if renamed[name] in expected}
    for name in state:
        if ".mask.modulation." in name:
            state[name] = _modulation_rows(state[name], chunks=expected[name].shape[0] // model.inner_dim)
    check_fit(
        {name: new for name, new in renamed.items() if not _without_effect(new, model)},
        state,
        {
            name: tensor
            for name, tensor in expected.items()
            if name in state or not (name.endswith(".pos_embed") or any(part in name for part in optional))
        },
        path=path,
        layout=f"the published layout for {model.config.num_layers} blocks of width {model.inner_dim}",
        fix="give the base model that the checkpoint was trained from",
    )
    model.load_state_dict(state, strict=False)
    return model


def _rename(name: str) -> str:
    """Our name of a published tensor; empty if the published layout has no such tensor."""
    for pattern, replacement in _RENAMES:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return ""


def _without_effect(name: str, model: MaskMMDiT) -> bool:
    """Whether a renamed tensor is one that changes nothing and that our model therefore does not have."""
    last = f"transformer_blocks.{model.config.num_layers - 1}.mask."
    return name == "mask_embed.pos_embed" or name.startswith(
        tuple(last + part for part in ("to_q.", "norm_q.", "to_out.", "ff."))
    )


def _modulation_rows(tensor: Tensor, chunks: int) -> Tensor:
    """The rows that are read, of: shift, scale and gate of the attention, then of the feed-forward."""
    shift, scale, *rest = tensor.chunk(6)
    if chunks == 2:  # the last block, in SD3's order for streams that only provide keys and values
        return torch.cat([scale, shift])
    return torch.cat([shift, scale, *rest[: chunks - 2]])


def check_fit(
    renamed: Mapping[str, str],
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    path: Path | None,
    layout: str,
    fix: str,
) -> None:
    """Refuse a published checkpoint that is not of a model's size and layout.

    Args:
        renamed: our name of each published tensor that has an effect.
        state: the tensors by our names.
        expected: what the model needs.
        path: of the checkpoint.
        layout: what was expected, in words.
        fix: what to do.

    Raises:
        TerraSynthError: it has foreign tensors, lacks some, or some are of another size; they are named.
    """
    problems = {
        "tensors that are foreign to it": [name for name, new in renamed.items() if new not in expected],
        "missing tensors": [name for name in expected if name not in state],
        "tensors of another size (was -> expected)": [
            f"{name} {tuple(tensor.shape)} -> {tuple(expected[name].shape)}"
            for name, tensor in state.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise TerraSynthError(
                f"the checkpoint does not fit the base model: {problem}",
                path=path,
                found=first(names),
                expected=layout,
                fix=fix,
            )


def read_checkpoint(path: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the one called `name` in a folder.

    Raises:
        TerraSynthError: it is of another kind, not there, or damaged.
    """
    file = path / name if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise TerraSynthError(
            "only safetensors checkpoints are read",
            path=file,
            found=f"{file.suffix or 'no suffix'}; files of other kinds can run code when they are opened",
            expected=".safetensors",
            fix="convert it with `safetensors.torch.save_file`, on a machine where you trust the file",
        )
    if not file.is_file():
        raise TerraSynthError("no such file", path=file, fix="check the path")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise TerraSynthError(
            "the checkpoint is damaged", path=file, found=str(error), fix="copy it again from its source"
        ) from error


def first(names: Iterable[str], count: int = 4) -> str:
    """Some of many names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
