"""Import of the published TISynth checkpoint layout: latent diffusion's names to ours.

| published | here |
|---|---|
| `model.diffusion_model.X` | `X` |
| `control_model.X` | `mask_encoder.X` |
| `ssl_stage_model.X` | `reference_encoder.X` |
| `Y.input_hint_block.N.X` | `mask_hint.` and `reference_hint.`, layer N / 2 |
| `Y.zero_convs.N.0.X` | `Y.controlnet_down_blocks.N.X` |
| `attn00_ls_trainable`, `norm00_trainable` | `reference_attn`, `reference_norm` |
| `attn01_ssl_trainable`, `norm01_trainable` | `mask_attn`, `mask_norm` |

and inside of all three networks, in blocks of L layers, what diffusers calls latent diffusion's `input_blocks`,
`middle_block` and `output_blocks`.

Left out: the autoencoder and the text encoder, which are Stable Diffusion 1.5's; the noise schedule; and what has no
effect: zero convolutions whose output no transformer of the decoder looks at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from terrasynth.errors import TerraSynthError
from terrasynth.models.all_in_attention import AllInAttentionUNet
from terrasynth.models.convert import check_fit, first, read_checkpoint

__all__ = ["load_published_tisynth"]

_NETWORKS = {
    "model.diffusion_model.": "",
    "control_model.": "mask_encoder.",
    "ssl_stage_model.": "reference_encoder.",
}
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "middle_block_out.0": "controlnet_mid_block",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_CONDITIONS = {
    "attn00_ls_trainable": "reference_attn",
    "norm00_trainable": "reference_norm",
    "attn01_ssl_trainable": "mask_attn",
    "norm01_trainable": "mask_norm",
}
#: The rest of a Lightning checkpoint of latent diffusion: frozen networks and the noise schedule.
_APART = re.compile(
    r"(first_stage_model|cond_stage_model|model_ema)\..+|logvar|betas|lvlb_weights"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+"
)


def load_published_tisynth(
    source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> AllInAttentionUNet:
    """Load a checkpoint in the layout of the published TISynth code.

    The network alone is loaded, for `mask_coding: ids` (see `systems.tisynth`).

    Args:
        source: a safetensors file, a folder that holds it as `model.safetensors`, or a state dict.
        config: of the network, where it is not Stable Diffusion 1.5's at three channels of the mask.

    Returns:
        The network in float32 on the CPU.

    Raises:
        TerraSynthError: no safetensors file, another layout, foreign or missing tensors, or tensors of another size.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    published = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
    if not any(name.startswith("ssl_stage_model.") for name in published):
        raise TerraSynthError(
            "not a checkpoint in the published TISynth layout",
            path=path,
            found=f"tensors {first(published)}",
            expected="model.diffusion_model.…, control_model.… and ssl_stage_model.… among them",
            fix="load folders that TerraSynth or diffusers saved with `from_pretrained`",
        )
    model = AllInAttentionUNet(**(config or {}))
    expected = model.state_dict()
    names = {name: _rename(name, model) for name in published if not _APART.fullmatch(name)}
    renamed = {name: new for name, new in names.items() if not _without_effect(new, model)}
    state = {new: published[name] for name, new in renamed.items()}
    check_fit(
        renamed,
        state,
        expected,
        path=path,
        layout=f"the published layout for levels of {', '.join(map(str, model.config.block_out_channels))} channels",
        fix="give the configuration of the network that the checkpoint belongs to",
    )
    model.load_state_dict(state)
    return model


def _rename(name: str, model: AllInAttentionUNet) -> str:
    """Our name of a published tensor; empty if the published layout has no such tensor."""
    layers = model.config.layers_per_block
    network = next((prefix for prefix in _NETWORKS if name.startswith(prefix)), None)
    if network is None:
        return ""
    ours, rest = _NETWORKS[network], name.removeprefix(network)
    for theirs, here in _CONDITIONS.items():
        rest = rest.replace(theirs, here)
    if match := re.fullmatch(r"input_hint_block\.(\d+)\.(\w+)", rest):
        convolution, last = int(match[1]) // 2, 2 * len(model.config.hint_channels) - 1
        layer = {0: "conv_in", last: "conv_out"}.get(convolution, f"blocks.{convolution - 1}")
        return f"{ours.replace('_encoder', '_hint')}{layer}.{match[2]}"
    if match := re.fullmatch(r"zero_convs\.(\d+)\.0\.(\w+)", rest):
        return f"{ours}controlnet_down_blocks.{match[1]}.{match[2]}"
    for theirs, here in _TOP.items():
        if rest.startswith(f"{theirs}."):
            return f"{ours}{here}.{_in_resnet(rest.removeprefix(f'{theirs}.'))}"
    if match := re.fullmatch(r"input_blocks\.(\d+)\.(\d)\.(.+)", rest):
        level, layer = divmod(int(match[1]) - 1, layers + 1)
        return f"{ours}down_blocks.{level}.{_in_level(match[2], layer, match[3])}"
    if match := re.fullmatch(r"output_blocks\.(\d+)\.(\d)\.(.+)", rest):
        level, layer = divmod(int(match[1]), layers + 1)
        return f"up_blocks.{level}.{_in_level(match[2], layer, match[3])}"
    return ""


def _in_level(part: str, layer: int, rest: str) -> str:
    """The parts of a level's layer: a residual block, then a transformer if any, then what changes the resolution."""
    if rest.startswith("op."):
        return f"downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"upsamplers.0.{rest}"
    return f"resnets.{layer}.{_in_resnet(rest)}" if part == "0" else f"attentions.{layer}.{rest}"


def _in_resnet(name: str) -> str:
    theirs, _, parameter = name.rpartition(".")
    return f"{_RESNET.get(theirs, theirs)}.{parameter}".removeprefix(".")


def _without_effect(name: str, model: AllInAttentionUNet) -> bool:
    """Whether a renamed tensor is a zero convolution of a level that no transformer looks at."""
    match = re.fullmatch(r"\w+_encoder\.controlnet_down_blocks\.(\d+)\.\w+", name)
    used = len(model.mask_encoder.controlnet_down_blocks)
    every = len(model.config.block_out_channels) * (model.config.layers_per_block + 1)
    return match is not None and used <= int(match[1]) < every
