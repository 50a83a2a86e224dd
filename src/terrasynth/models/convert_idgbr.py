"""Import of the published IDGBR layout: the guidance network, the table of label codes, and what is diffusers' own.

| published, in `attn_blocks_down.N.` and `attn_blocks_mid.` | here, in `blocks.N.`, the middle last |
|---|---|
| `conv.X` | `conv.X` |
| `attn.positional_embedding` | `attn.positions` |
| `attn.conv1_{q,k}.X` | `attn.to_{query,key}.X` |
| `attn.ln_pre_{q,k}.X` | `attn.norm_{query,key}.X` |
| `attn.transformer.resblocks.0.ln_1{q,k,v}.X` | `attn.attn_norm_{query,key,value}.X` |
| `attn.transformer.resblocks.0.attn.X` | `attn.attn.X` |
| `attn.transformer.resblocks.0.ln_2.X` | `attn.mlp_norm.X` |
| `attn.transformer.resblocks.0.mlp.c_{fc,proj}.X` | `attn.mlp_{in,out}.X` |
| `attn.ln_post.X` | `attn.norm_out.X` |
| `attn.proj.X` | `attn.proj.X` |

Left out: the convolutions that decode labels, in place of which the nearest code is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from terrasynth.errors import TerraSynthError
from terrasynth.models.convert import check_fit, first, read_checkpoint
from terrasynth.models.guidance_net import GuidanceNet
from terrasynth.models.label_codes import LabelCodes
from terrasynth.models.unet import UNetEncoder

__all__ = ["load_published_codes", "load_published_guidance", "load_published_parts"]

#: What diffusers calls the file of a model in its folder.
_FILE = "diffusion_pytorch_model.safetensors"
_TABLE = "embedding_table.weight"
_HEADS = 8
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"conv\.(weight|bias)", r"conv.\1"),
        (r"attn\.positional_embedding", "attn.positions"),
        (r"attn\.conv1_q\.weight", "attn.to_query.weight"),
        (r"attn\.conv1_k\.weight", "attn.to_key.weight"),
        (r"attn\.ln_pre_q\.(\w+)", r"attn.norm_query.\1"),
        (r"attn\.ln_pre_k\.(\w+)", r"attn.norm_key.\1"),
        (r"attn\.transformer\.resblocks\.0\.ln_1q\.(\w+)", r"attn.attn_norm_query.\1"),
        (r"attn\.transformer\.resblocks\.0\.ln_1k\.(\w+)", r"attn.attn_norm_key.\1"),
        (r"attn\.transformer\.resblocks\.0\.ln_1v\.(\w+)", r"attn.attn_norm_value.\1"),
        (r"attn\.transformer\.resblocks\.0\.attn\.(.+)", r"attn.attn.\1"),
        (r"attn\.transformer\.resblocks\.0\.ln_2\.(\w+)", r"attn.mlp_norm.\1"),
        (r"attn\.transformer\.resblocks\.0\.mlp\.c_fc\.(\w+)", r"attn.mlp_in.\1"),
        (r"attn\.transformer\.resblocks\.0\.mlp\.c_proj\.(\w+)", r"attn.mlp_out.\1"),
        (r"attn\.ln_post\.(\w+)", r"attn.norm_out.\1"),
        (r"attn\.proj\.weight", "attn.proj.weight"),
    )
)


def load_published_guidance(source: str | Path | Mapping[str, Tensor]) -> GuidanceNet:
    """Load an `interact_net` in the layout of the published code.

    Where the attention of all blocks is zero, as training leaves it in the released code, it is left out: it adds
    nothing, and is two thirds of the parameters.

    Args:
        source: the safetensors file, the folder that holds it, or a state dict.

    Returns:
        The network in float32 on the CPU.

    Raises:
        TerraSynthError: no safetensors file, another layout, foreign or missing tensors, or tensors of another size.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    published = source if isinstance(source, Mapping) else read_checkpoint(Path(source), _FILE)
    down = sum(bool(re.fullmatch(r"attn_blocks_down\.\d+\.conv\.weight", name)) for name in published)
    prefixes = [*(f"attn_blocks_down.{i}." for i in range(down)), "attn_blocks_mid."]
    needed = [prefix + name for prefix in prefixes for name in ("conv.weight", "attn.positional_embedding")]
    if not down or any(name not in published for name in needed):
        raise TerraSynthError(
            "not a guidance network in the published IDGBR layout",
            path=path,
            found=f"tensors {first(published)}",
            expected="attn_blocks_down.…, attn_blocks_mid.conv.weight and attn_blocks_mid.attn.… among them",
            fix="load folders that TerraSynth saved with `from_pretrained`",
        )
    alive = any(tensor.any() for name, tensor in published.items() if ".attn." in name)
    tables = [published[f"{prefix}attn.positional_embedding"] for prefix in prefixes]
    grids = tuple(round(len(table) ** 0.5) for table in tables)
    model = GuidanceNet(
        channels=tuple(len(published[f"{prefix}conv.weight"]) for prefix in prefixes),
        grids=grids,
        conditions=2,
        max_grid=max(grids) if alive else 0,
        width=tables[0].shape[1],
        heads=_HEADS,
    )
    renamed = {name: _rename(name, prefixes) for name in published if alive or ".attn." not in name}
    state = {new: published[name].float() for name, new in renamed.items()}
    check_fit(
        renamed,
        state,
        model.state_dict(),
        path=path,
        layout=f"the published layout for feature maps of {', '.join(map(str, model.config.channels))} channels",
        fix="load the `interact_net` of the published code",
    )
    model.load_state_dict(state)
    return model


def load_published_codes(source: str | Path | Mapping[str, Tensor], num_classes: int | None = None) -> LabelCodes:
    """Load the table of a `label_embed_net` in the layout of the published code.

    Args:
        source: as of `load_published_guidance`.
        num_classes: how many there are, where not all codes of the table are used; they are the first.

    Raises:
        TerraSynthError: no safetensors file, no table in it, or not as many codes.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    published = source if isinstance(source, Mapping) else read_checkpoint(Path(source), _FILE)
    if _TABLE not in published:
        raise TerraSynthError(
            "no label codes in the published IDGBR layout",
            path=path,
            found=f"tensors {first(published)}",
            expected=f"{_TABLE} among them",
            fix="load the `label_embed_net` of the published code",
        )
    table = published[_TABLE].float()
    if num_classes is not None and num_classes > len(table):
        raise TerraSynthError("there are less codes than classes", path=path, found=len(table), expected=num_classes)
    table = table[:num_classes]
    codes = LabelCodes(len(table), "learned", table.shape[1])
    codes.table.copy_(table.sigmoid() * 2 - 1)
    return codes


def load_published_parts(
    folder: str | Path, base: str | Path | None, label_codes: str | Path | None, num_classes: int | None
) -> dict[str, Any]:
    """All parts of a refiner, by the names of `systems.idgbr.IDGBRPipeline`'s arguments; see its `from_published`."""
    folder = Path(folder)
    source, safe = str(base or folder), {"use_safetensors": True}
    # What reads the conditions is Stable Diffusion's U-Net, which a finished run keeps under another name.
    reader = "unet_ori" if (folder / "unet_ori").is_dir() and base is None else "unet"
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet_gen", **safe),
        "scheduler": DDIMScheduler.from_pretrained(source, subfolder="scheduler"),
        "vae": AutoencoderKL.from_pretrained(source, subfolder="vae", **safe),
        "text_encoder": CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **safe),
        "tokenizer": AutoTokenizer.from_pretrained(source, subfolder="tokenizer"),
        "condition_encoder": UNetEncoder.from_pretrained(source, subfolder=reader, **safe),
        "guidance_net": load_published_guidance(folder / "interact_net"),
        "label_codes": load_published_codes(label_codes or folder / "label_embed_net", num_classes),
    }


def _rename(name: str, prefixes: list[str]) -> str:
    """Our name of a published tensor; empty if the published layout has no such tensor."""
    for i, prefix in enumerate(prefixes):
        for pattern, replacement in _RENAMES:
            if name.startswith(prefix) and (match := pattern.fullmatch(name.removeprefix(prefix))):
                return f"blocks.{i}.{match.expand(replacement)}"
    return ""
