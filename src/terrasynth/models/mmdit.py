"""The text-image-mask MM-DiT with unified triple attention.

Stable Diffusion 3's transformer (Esser et al. 2024, arXiv 2403.03206) keeps one stream of tokens per modality, each
with weights of its own, and lets the streams meet in one joint attention. TODSynth (Yang et al. 2025, arXiv 2512.16740)
adds the mask as a third stream. One block, for every stream s of image, text and mask:

    h̃_s = (1 + scale_s) LN(h_s) + shift_s
    O    = softmax(Q Kᵀ / √d) V          over the tokens of all streams, in the order [image, text, mask]
    h_s += gate_s W_s O_s
    h_s += gate'_s FF_s((1 + scale'_s) LN(h_s) + shift'_s)

where shift, scale and gate are linear in the embedding of the timestep and the pooled text. The image is read out; a
transformer that paints layouts (`MaskMMDiT.add_layouts`) reads classes from the mask as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput

# Not used here, but a pipeline finds the loading methods of its parts by this name in their modules.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.normalization import RMSNorm
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from terrasynth.errors import TerraSynthError
from terrasynth.models.layout_head import LayoutHead

__all__ = [
    "TEXT_BRANCH",
    "Block",
    "Feature",
    "JointBlock",
    "MaskBranch",
    "MaskMMDiT",
    "MaskMMDiTOutput",
    "MlpModulation",
    "Projected",
    "Stream",
    "Trainable",
    "TripleBlock",
    "attention",
    "joint_attention",
    "opened",
]

Trainable = Literal["all", "image+mask", "mask", "lora"]
MlpModulation = Literal["own", "image"]
#: Queries, keys and values of a stream, each (B, N, heads, d); no queries where nobody reads its tokens again.
Projected = tuple[Tensor | None, Tensor, Tensor]
#: Keys and values of a reference image in one block, each (B, N, heads, d).
Feature = tuple[Tensor, Tensor]
Block = Callable[..., tuple[Tensor, ...]]

_GATE_GAIN = 32
#: Up to how many tokens attention in bfloat16 on a CPU is computed plainly, and how many scores at a time.
PLAIN_ATTENTION, _SCORES = 1024, 2**21
_EPS = 1e-6
#: What the published training keeps frozen with "image+mask": everything that only the text stream uses.
TEXT_BRANCH = (
    "time_text_embed.",
    "context_embedder.",
    ".norm1_context.",
    ".ff_context.",
    ".add_q_proj.",
    ".add_k_proj.",
    ".add_v_proj.",
    ".to_add_out.",
    ".norm_added_q.",
    ".norm_added_k.",
)
#: The image stream's attention and feed-forward layers, which low-rank adapters go on.
_IMAGE_LINEARS = r"transformer_blocks\.\d+\.(attn2?\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"


@dataclass
class MaskMMDiTOutput(Transformer2DModelOutput):
    """What `MaskMMDiT` predicts.

    Attributes:
        sample: the velocity of the image, (B, C, h, w).
        layout: a number for every channel of the mask code, (B, Cm, h, w), where the mask has noise levels.
        coarse: what the tokens alone make of it, of the same shape.
    """

    layout: Tensor | None = None
    coarse: Tensor | None = None


class Modulation(NamedTuple):
    """Modulation of one residual branch, x + gate · branch((1 + scale) LN(x) + shift); each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Stream:
    """One modality inside one block: views of the modules that act on its tokens.

    Without `modulation` it looks at nothing but its own tokens.

    Streams whose tokens nobody reads afterwards (text and mask in the last block) provide keys and values and have no
    `out` and `feed_forward`. SD3's text stream asks there all the same; without that, results would differ from SD3's
    in the last bits.
    """

    heads: int
    modulation: nn.Linear | None
    query: nn.Module | None
    key: nn.Module
    value: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    out: nn.Module | None
    feed_forward: nn.Module | None

    def modulate(self, conditioning: Tensor) -> tuple[Modulation, ...]:
        """Modulation of each residual branch, from the conditioning (B, D)."""
        if self.modulation is None:
            nothing = torch.zeros_like(conditioning).unsqueeze(1)
            return (Modulation(nothing, nothing, nothing),)
        chunks = self.modulation(conditioning).unsqueeze(1).split(conditioning.shape[-1], dim=-1)
        if len(chunks) == 2:  # keys and values only, nothing to add; SD3 stores these two the other way round
            scale, shift = chunks
            return (Modulation(shift, scale, gate=torch.zeros_like(scale)),)
        return tuple(Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3))

    def project(self, x: Tensor) -> Projected:
        """Queries, keys and values (B, N, heads, D / heads) of tokens (B, N, D)."""
        shape = (*x.shape[:2], self.heads, -1)
        query = None if self.query is None else _normed(self.query(x).view(shape), self.query_norm)
        return query, _normed(self.key(x).view(shape), self.key_norm), self.value(x).view(shape)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


# The sums below are in place because the product before them is needed by nobody else: same bits, one allocation less.
def _shift_and_scale(normed: Tensor, modulation: Modulation) -> Tensor:
    return (normed * (1 + modulation.scale)).add_(modulation.shift)


def _add_residual(x: Tensor, branch: Tensor, modulation: Modulation) -> Tensor:
    return (modulation.gate * branch).add_(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full bidirectional attention; everything is (B, N, heads, d)."""
    bfloat16 = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if q.device.type == "cpu" and bfloat16 and q.shape[1] <= PLAIN_ATTENTION:
        return _plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as two matrix products around a softmax, a few images and one head at a time.

    On a CPU, PyTorch's fused kernel gains nothing from bfloat16, the matrix products run at several times the rate of
    float32. For a few hundred tokens such a part's scores fit the cache, and this takes less than half the time.
    """
    nothing, scale = q.new_empty(1, 1, 1), q.shape[-1] ** -0.5
    images = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    parts = []
    for a, b, c in zip(*(x.split(images) for x in (q, k, v)), strict=True):
        heads = []
        for queries, keys, values in zip(a.unbind(2), b.unbind(2), c.unbind(2), strict=True):
            scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scale)
            heads.append(torch.bmm(scores.softmax(-1), values))
        parts.append(torch.stack(heads, dim=2))
    return torch.cat(parts)


def joint_attention(projected: Sequence[Projected]) -> list[Tensor]:
    """What the tokens of all streams find in the tokens of all streams, for each stream that has queries."""
    queries = [q for q, _, _ in projected if q is not None]
    q = torch.cat(queries, dim=1)
    k = torch.cat([k for _, k, _ in projected], dim=1)
    v = torch.cat([v for _, _, v in projected], dim=1)
    return list(attention(q, k, v).split([q.shape[1] for q in queries], dim=1))


def opened(gate: Tensor, like: Tensor) -> Tensor:
    """Values (heads, 1) of the gates that are stored as `gate` (heads,); see `MaskBranch`."""
    return _GATE_GAIN * gate.to(like.dtype)[:, None]


class MaskBranch(nn.Module):
    """The mask stream of one block.

    Args:
        width: D, the width of the tokens.
        heads: attention heads.
        qk_norm: "rms_norm" or None, as in the base model.
        last: of the last block, where the mask only provides keys and values.
        own_mlp_modulation: modulate the feed-forward by this branch's own shift, scale and gate (six chunks), not by
            the image stream's (three chunks).
        gated: a learnable gate per head between the base model's attention (0) and the unified attention (1), stored
            as a 32nd of its value: an optimiser moves every number by about the learning rate a step, and at the 1e-5
            of fine-tuning a plain gate could not open in a whole run.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: str | None, last: bool, own_mlp_modulation: bool, gated: bool
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, (2 if last else 6 if own_mlp_modulation else 3) * width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_k = RMSNorm(width // heads, _EPS) if qk_norm else None
        self.to_q = None if last else nn.Linear(width, width)
        self.norm_q = RMSNorm(width // heads, _EPS) if qk_norm and not last else None
        self.to_out = None if last else nn.Linear(width, width)
        self.ff = None if last else FeedForward(width, activation_fn="gelu-approximate")
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    @torch.no_grad()
    def copy_image_branch(self, block: JointTransformerBlock) -> None:
        """Start from the weights of the block's image stream."""
        width = self.to_k.in_features
        # Rows: shift, scale and gate of the attention, then of the feed-forward, then of SD3.5's second attention.
        for name, rows in block.norm1.linear.state_dict().items():
            if self.to_q is None:
                shift, scale = rows[: 2 * width].chunk(2)
                rows = torch.cat([scale, shift])
            self.modulation.get_parameter(name).copy_(rows[: self.modulation.out_features])
        sources = {
            "to_q": block.attn.to_q,
            "to_k": block.attn.to_k,
            "to_v": block.attn.to_v,
            "norm_q": block.attn.norm_q,
            "norm_k": block.attn.norm_k,
            "to_out": block.attn.to_out[0],
            "ff": block.ff,
        }
        for name, source in sources.items():
            own = getattr(self, name)
            if own is not None:
                own.load_state_dict(source.state_dict())


class JointBlock(JointTransformerBlock):
    """SD3's block over image and text tokens, with SD3's parameter names; schemes of control build on it."""

    def __init__(self, width: int, heads: int, *, last: bool, dual_attention: bool, qk_norm: str | None) -> None:
        super().__init__(
            dim=width,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            context_pre_only=last,
            qk_norm=qk_norm,
            use_dual_attention=dual_attention,
        )
        self.heads = heads
        self.register_parameter("reference_gate", None)

    def streams(self) -> tuple[Stream, ...]:
        """Image and text. Made anew for every use, because adapters replace modules."""
        attn = self.attn
        image_stream = Stream(
            heads=self.heads,
            modulation=self.norm1.linear,
            query=attn.to_q,
            key=attn.to_k,
            value=attn.to_v,
            query_norm=attn.norm_q,
            key_norm=attn.norm_k,
            out=attn.to_out[0],
            feed_forward=self.ff,
        )
        text_stream = Stream(
            heads=self.heads,
            modulation=self.norm1_context.linear,
            query=attn.add_q_proj,
            key=attn.add_k_proj,
            value=attn.add_v_proj,
            query_norm=attn.norm_added_q,
            key_norm=attn.norm_added_k,
            out=attn.to_add_out,
            feed_forward=self.ff_context,
        )
        return image_stream, text_stream

    def forward(
        self, conditioning: Tensor, *tokens: Tensor, reference: Feature | None = None, sees: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Update the tokens.

        Args:
            conditioning: SiLU of the timestep and pooled-text embedding, (B, D).
            tokens: of the streams, in their order, each (B, N, D); the last streams may be left out.
            reference: keys and values of a reference image, of `read`; the image looks at them. There may be fewer
                than images, which then take them in turn.
            sees: whether it does, boolean (B,); None where all do.

        Returns:
            The updated tokens of the streams that are read again, in the same order; in the last block, the image's.
        """
        updated, _ = self._updated(conditioning, tokens, reference, sees)
        return updated

    def read(self, conditioning: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An image by itself: its keys and values, each (B, N, heads, D / heads), and its updated tokens (B, N, D)."""
        (tokens,), ((_, key, value),) = self._updated(conditioning, (tokens,), None, None)
        return key.to(value.dtype), value, tokens  # autocast leaves normalised keys in float32

    def _updated(
        self, conditioning: Tensor, tokens: Sequence[Tensor], reference: Feature | None, sees: Tensor | None
    ) -> tuple[tuple[Tensor, ...], list[Projected]]:
        streams = self.streams()[: len(tokens)]
        modulations = self._modulate(streams, conditioning)

        # Every stream prepares its queries, keys and values.
        normed = [_layer_norm(x) for x in tokens]
        projected = [
            stream.project(_shift_and_scale(x, modulation[0]))
            for stream, x, modulation in zip(streams, normed, modulations, strict=True)
        ]

        # The streams meet.
        attended = self._attend(projected)
        query = projected[0][0]
        if reference is not None and query is not None:
            turns = len(query) // len(reference[0])
            seen = attention(query, *(x.repeat(turns, 1, 1, 1) if turns > 1 else x for x in reference))
            if sees is not None:
                seen = seen * sees.view(-1, 1, 1, 1)
            attended[0] = attended[0] + opened(self.reference_gate, seen) * seen

        # Every stream that is read again takes what it found, then passes through its feed-forward.
        updated = []
        for stream, x, found, modulation in zip(streams, tokens, attended, modulations, strict=False):
            if stream.out is None or stream.feed_forward is None:
                break
            attn, mlp, *dual = modulation
            x = _add_residual(x, stream.out(found.flatten(2)), attn)
            if dual:  # SD3.5: the image attends to itself once more
                x = _add_residual(x, self.attn2(_shift_and_scale(normed[0], dual[0])), dual[0])
            x = _add_residual(x, stream.feed_forward(_shift_and_scale(_layer_norm(x), mlp)), mlp)
            updated.append(x)
        return tuple(updated), projected

    def _modulate(self, streams: Sequence[Stream], conditioning: Tensor) -> list[tuple[Modulation, ...]]:
        return [stream.modulate(conditioning) for stream in streams]

    def _attend(self, projected: list[Projected]) -> list[Tensor]:
        """What each stream with queries finds: here, in all tokens."""
        return joint_attention(projected)


class TripleBlock(JointBlock):
    """One block over image, text and mask tokens: SD3's block, with a `mask` branch beside it."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        last: bool,
        dual_attention: bool,
        qk_norm: str | None,
        mlp_modulation: MlpModulation,
        gated: bool,
    ) -> None:
        super().__init__(width, heads, last=last, dual_attention=dual_attention, qk_norm=qk_norm)
        self.mask_borrows_modulation = mlp_modulation == "image"
        self.mask = MaskBranch(
            width,
            heads,
            qk_norm=qk_norm,
            last=last,
            own_mlp_modulation=not self.mask_borrows_modulation,
            gated=gated,
        )

    def streams(self) -> tuple[Stream, ...]:
        """Image, text and mask."""
        mask = self.mask
        mask_stream = Stream(
            heads=self.heads,
            modulation=mask.modulation,
            query=mask.to_q,
            key=mask.to_k,
            value=mask.to_v,
            query_norm=mask.norm_q,
            key_norm=mask.norm_k,
            out=mask.to_out,
            feed_forward=mask.ff,
        )
        return (*super().streams(), mask_stream)

    def _modulate(self, streams: Sequence[Stream], conditioning: Tensor) -> list[tuple[Modulation, ...]]:
        modulations = super()._modulate(streams, conditioning)
        if self.mask_borrows_modulation and len(streams) == 3:
            modulations[2] = (*modulations[2], modulations[0][1])
        return modulations

    def _attend(self, projected: list[Projected]) -> list[Tensor]:
        unified = joint_attention(projected)
        if self.mask.gate is None or len(projected) < 3:
            return unified
        # Image and text move from what the base model sees, O_base, to what the unified attention sees, O_full:
        # O = O_base + g (O_full - O_base), exact at g = 0 and g = 1.
        base = joint_attention(projected[:2])
        gate = opened(self.mask.gate, base[0])
        return [torch.lerp(*pair, gate) for pair in zip(base, unified, strict=False)] + unified[2:]


class MaskMMDiT(SD3Transformer2DModel):
    """SD3's transformer with a mask stream.

    The image and text parameters have SD3's state-dict names, so a Stable Diffusion 3 / 3.5 checkpoint is a subset; the
    mask's are `mask_embed.*` and `transformer_blocks.N.mask.*`. Without `mask_latents` it is the base model.

    Args:
        sample_size: side of the latents that the positional embedding is scaled to.
        patch_size: latent pixels per token side.
        in_channels: C, channels of the latents.
        num_layers: blocks.
        attention_head_dim: width of one head.
        num_attention_heads: heads; the tokens' width D is heads x width of one head.
        joint_attention_dim: width of the prompt embeddings.
        caption_projection_dim: width they are projected to; must be D.
        pooled_projection_dim: width of the pooled prompt embeddings.
        out_channels: channels of the velocity.
        pos_embed_max_size: side, in tokens, of the positional grid that smaller latents are cut from.
        dual_attention_layers: blocks with a second, image-only attention (SD3.5).
        qk_norm: "rms_norm" (SD3.5) or None (SD3).
        mask_channels: Cm, channels of the mask code at latent resolution.
        mask_mlp_modulation: what modulates the mask's feed-forward: the mask branch's own shift, scale and gate, or the
            image stream's, as in the published code.
        mask_gate: a learnable gate per block and head through which the mask enters the image and text tokens. At 0 the
            model is the base model, at 1 the attention is unified as published.
        latent_std: standard deviation of each of the C latent channels. With it the network predicts what the best
            linear denoiser of such data leaves over, scaled to unit variance (`_precondition`); for training from
            scratch. None predicts the velocity itself, as SD3 does.
        reference: whether it can look at reference images (`add_reference`).
        layouts: side, in pixels of the mask, of what a channel of the mask code lays side by side, of a model that can
            denoise masks too (`add_layouts`); 0 for others.
    """

    _no_split_modules = ["TripleBlock"]  # noqa: RUF012 - diffusers' own declaration

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        mask_channels: int = 16,
        mask_mlp_modulation: MlpModulation = "own",
        mask_gate: bool = False,
        latent_std: tuple[float, ...] | None = None,
        reference: bool = False,
        layouts: int = 0,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=0,  # the blocks are ours
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self.register_to_config(num_layers=num_layers)
        self.transformer_blocks: Any
        self._add_blocks(num_layers)
        # Positions are the image's; a second copy of the grid would be 0.9 GB in SD3.5.
        self.mask_embed = PatchEmbed(
            patch_size=patch_size, in_channels=mask_channels, embed_dim=self.inner_dim, pos_embed_type=None
        )
        self.mask_time: nn.Sequential | None = None
        self.mask_out: nn.Linear | None = None
        self.mask_head: LayoutHead | None = None
        if reference:
            self.add_reference()
        if layouts:
            self.add_layouts(layouts)
        self._freeze_dead_parameters()

    def add_reference(self) -> Self:
        """Let the image look at a reference image in every block, and return self.

        The reference passes through the image branch by itself, clean and without a prompt, so its keys and values are
        the same in all steps of a sampling (`reference_features`). What the image finds in them is added to what it
        finds elsewhere (as in IP-Adapter, Ye et al. 2023, arXiv 2308.06721; the shared weights are those of
        StyleAligned, Hertz et al. 2024, arXiv 2312.02133), through a gate per block and head that starts at zero and is
        all that is new.
        """
        for block in self.transformer_blocks:
            if block.reference_gate is None:
                block.reference_gate = nn.Parameter(torch.zeros(block.heads, dtype=self.dtype, device=self.device))
        self.register_to_config(reference=True)
        return self

    def add_layouts(self, factor: int) -> Self:
        """Let it denoise masks beside images, each with a noise level of its own, and return self.

        After UniDiffuser (Bao et al. 2023, arXiv 2303.06555): one transformer, a time for every modality. The noise
        level of the mask is embedded and added to what modulates all streams; as an embedding without biases of what
        is zero without noise it leaves the velocity under given masks as it is, to the bit, whatever it learns. What is
        read out of the mask tokens before the last block, which does not update them, starts at zero, and so does what
        the pixels of the mask say of each other (`LayoutHead`).

        Args:
            factor: pixels of the mask along the side of one latent.

        Raises:
            TerraSynthError: no block updates mask tokens.
        """
        if self.mask_time is not None:
            return self
        if len(self.transformer_blocks) < 2 or not isinstance(self.transformer_blocks[0], TripleBlock):
            raise TerraSynthError(
                "the model can not learn to paint layouts",
                found=f"{type(self).__name__}, {len(self.transformer_blocks)} blocks",
                expected="a mask stream that is updated: generator.control unified or siamese, at least 2 blocks",
                fix="start from another model",
            )
        width, p = self.inner_dim, self.config.patch_size
        frequencies = self.time_text_embed.time_proj.num_channels
        first, second = nn.Linear(frequencies, width, bias=False), nn.Linear(width, width, bias=False)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)  # as SD3 starts its embeddings of time
        out = nn.Linear(width, self.config.mask_channels * p * p)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        place = {"device": self.device, "dtype": self.dtype}
        self.mask_time, self.mask_out = nn.Sequential(first, nn.SiLU(), second).to(**place), out.to(**place)
        self.mask_head = LayoutHead(width).to(**place)
        self.register_to_config(layouts=factor)
        return self

    def drop_layouts(self) -> Self:
        """Leave out what `add_layouts` added, which training without it would leave behind, and return self.

        What it paints under given masks stays as it is.
        """
        self.mask_time = self.mask_out = self.mask_head = None
        self.register_to_config(layouts=0)
        return self

    def _add_blocks(self, count: int) -> None:
        """Make `transformer_blocks`: `count` blocks, and whatever else brings the mask to them."""
        self.transformer_blocks = nn.ModuleList(self._make_block(**self._sizes(i, count)) for i in range(count))

    def _make_block(self, **sizes: Any) -> JointBlock:
        modulation, gated = self.config.mask_mlp_modulation, self.config.mask_gate
        return TripleBlock(**sizes, mlp_modulation=modulation, gated=gated)

    def _sizes(self, index: int, count: int) -> dict[str, Any]:
        """Arguments of the block at `index` of a stack of `count`."""
        return {
            "width": self.inner_dim,
            "heads": self.config.num_attention_heads,
            "last": index == count - 1,
            "dual_attention": index in self.config.dual_attention_layers,
            "qk_norm": self.config.qk_norm,
        }

    def forward(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        mask_latents: Tensor | None = None,
        mask_sigma: Tensor | None = None,
        reference: Sequence[Feature] | None = None,
        sees: Tensor | None = None,
        return_dict: bool = True,
    ) -> MaskMMDiTOutput | tuple[Tensor, ...]:
        """Predict the velocity, and what the mask is.

        Args:
            hidden_states: noisy latents, (B, C, h, w).
            timestep: 1000 sigma, (B,).
            encoder_hidden_states: prompt embeddings, (B, L, joint_attention_dim).
            pooled_projections: pooled prompt embeddings, (B, pooled_projection_dim).
            mask_latents: mask code, (B, Cm, h, w); None leaves the mask tokens out, which is the base model.
            mask_sigma: noise level of each mask in [0, 1], (B,), for a model with `add_layouts` and with
                `mask_latents`; None where all are given, as zero is.
            reference: of `reference_features`, for B images, or for fewer that the batch takes in turn; None is the
                model without a reference.
            sees: which images see their reference, boolean (B,); None where all do.
            return_dict: return a `MaskMMDiTOutput`, else a tuple.

        Returns:
            `sample`, the velocity, (B, C, h, w); with `mask_sigma` also `layout` and `coarse`, (B, Cm, h, w).

        Raises:
            TerraSynthError: `mask_latents` has another shape, or there is only its noise level.
        """
        height, width = hidden_states.shape[-2:]
        scaled = hidden_states
        if self.config.latent_std is not None:
            scale_in, skip, scale_out = self._precondition(timestep, hidden_states)
            scaled = scale_in * hidden_states
        # Contiguous, because the tokens leave the patch embedding with their channels first.
        image = self.pos_embed(scaled).contiguous()
        text = self.context_embedder(encoder_hidden_states)
        mask = None
        if mask_latents is None and mask_sigma is not None:
            raise TerraSynthError("the noise level of masks that are not there", expected="`mask_latents` as well")
        if mask_latents is not None:
            self._check_mask(mask_latents, hidden_states.shape)
            mask = self._embed_mask(mask_latents)
        embedding, noise = self.time_text_embed(timestep, pooled_projections), None
        if mask_sigma is not None:
            noise = self._embed_mask_time(mask_sigma, pooled_projections.dtype)
            embedding = embedding + noise
        image, mask = self._through_blocks(F.silu(embedding), image, text, mask, self._looks(reference, sees))

        patches = self.proj_out(self.norm_out(image, embedding))
        p = self.config.patch_size
        grid = patches.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, self.out_channels))
        velocity = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # b h w p q c -> b c (h p) (w q)
        of_mask: tuple[Tensor, ...] = ()
        if noise is not None:
            assert mask is not None
            assert mask_latents is not None
            of_mask = self._read_layout(mask, mask_latents, noise)
        if self.config.latent_std is not None:
            velocity = skip * hidden_states + scale_out * velocity
        if return_dict:
            return MaskMMDiTOutput(velocity, *of_mask)
        return velocity, *of_mask

    @apply_forward_hook
    def reference_features(self, latents: Tensor) -> list[Feature]:
        """What `forward` looks at of reference images: keys and values in every block.

        Args:
            latents: of the images, (B, C, h, w), of any size up to the grid of positions.
        """
        timestep = latents.new_zeros(len(latents))
        if self.config.latent_std is not None:
            latents = self._precondition(timestep, latents)[0] * latents
        tokens = self.pos_embed(latents).contiguous()
        nothing = latents.new_zeros(len(latents), self.config.pooled_projection_dim)
        conditioning = F.silu(self.time_text_embed(timestep, nothing))
        features = []
        for block in self.transformer_blocks:
            key, value, tokens = self._run(block.read, conditioning, tokens)
            features.append((key, value))
        return features

    def _through_blocks(
        self,
        conditioning: Tensor,
        image: Tensor,
        text: Tensor,
        mask: Tensor | None,
        blocks: Sequence[Block],
    ) -> tuple[Tensor, Tensor | None]:
        """Image tokens after the last block, and mask tokens where they were updated last, if they are."""
        tokens: tuple[Tensor, ...] = (image, text) if mask is None else (image, text, mask)
        for block in blocks:
            mask = None if mask is None else tokens[2]
            tokens = self._run(block, conditioning, *tokens)
        return tokens[0], mask

    def _looks(self, reference: Sequence[Feature] | None, sees: Tensor | None) -> list[Block]:
        """The blocks, each looking at what it sees of the reference."""
        if reference is None:
            return list(self.transformer_blocks)
        pairs = zip(self.transformer_blocks, reference, strict=True)
        return [partial(block, reference=feature, sees=sees) for block, feature in pairs]

    def _run(self, block: Block, *tensors: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *tensors)
        return block(*tensors)

    def _precondition(self, timestep: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input scale, skip and output scale (B, C, 1, 1): Karras et al. 2022, section 5, carried over to the flow.

        For independent Gaussian data of standard deviation s and x = (1 - sigma) x_0 + sigma epsilon, with
        n^2 = (1 - sigma)^2 s^2 + sigma^2 the variance of x, the velocity epsilon - x_0 given x has mean
        x (sigma - (1 - sigma) s^2) / n^2 and standard deviation s / n. Without this, a transformer has to learn to
        carry the noise from its input to its output before it learns anything about images.
        """
        sigma = (timestep / 1000).to(latents.dtype).view(-1, 1, 1, 1)
        s = torch.tensor(self.config.latent_std, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        n = ((1 - sigma) ** 2 * s**2 + sigma**2).sqrt()
        return 1 / n, (sigma - (1 - sigma) * s**2) / n**2, s / n

    def _check_mask(self, mask_latents: Tensor, image_shape: torch.Size) -> None:
        expected = (image_shape[0], self.config.mask_channels, *image_shape[2:])
        if mask_latents.shape != expected:
            raise TerraSynthError(
                "the mask code does not fit the latents",
                found=tuple(mask_latents.shape),
                expected=f"{expected} (batch, mask channels, height, width)",
                fix="code the mask at the size of the image, with the coding that this model was trained with",
            )

    def _embed_mask_time(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding (B, D) of the masks' noise levels (B,); zero where there is no noise."""
        if self.mask_time is None:
            raise TerraSynthError(
                "the model can not denoise masks",
                found="a model that was not trained to paint layouts",
                expected="one with `add_layouts`",
                fix="leave out `mask_sigma`",
            )
        time = self.time_text_embed.time_proj
        return self.mask_time((time(1000 * sigma) - time(torch.zeros_like(sigma))).to(dtype))

    def _read_layout(self, tokens: Tensor, mask_latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`layout` and `coarse`, from the masks' tokens (B, N, D), noisy code and embedded noise levels (B, D)."""
        assert self.mask_out is not None
        assert self.mask_head is not None
        (height, width), p, factor = mask_latents.shape[-2:], self.config.patch_size, self.config.layouts
        numbers = self.mask_out(_layer_norm(tokens)).transpose(1, 2)  # those of a channel side by side
        coarse = F.pixel_shuffle(numbers.unflatten(2, (height // p, width // p)), p)
        fine = self.mask_head(F.pixel_shuffle(mask_latents, factor), F.pixel_shuffle(coarse, factor), noise)
        return F.pixel_unshuffle(fine, factor), coarse

    def _embed_mask(self, mask_latents: Tensor) -> Tensor:
        """Mask tokens (B, N, D), with the positions of the image tokens."""
        tokens = self.mask_embed(mask_latents)
        return (tokens + self.pos_embed.cropped_pos_embed(*mask_latents.shape[-2:])).to(tokens.dtype)

    @classmethod
    def from_sd3(
        cls,
        transformer: SD3Transformer2DModel,
        *,
        mask_channels: int,
        mask_init: Literal["copy", "random"],
        mask_mlp_modulation: MlpModulation = "own",
    ) -> Self:
        """Add a mask branch to a Stable Diffusion 3 / 3.5 transformer, whose weights are copied.

        Args:
            transformer: the base model.
            mask_channels: Cm, channels of the mask code.
            mask_init: "copy" starts the mask branch as a copy of the image branch, behind gates that make the untrained
                model equal the base model exactly; "random" starts it at random without gates, as published.
            mask_mlp_modulation: what modulates the mask's feed-forward.
        """
        config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        model = cls(
            **config,
            mask_channels=mask_channels,
            mask_mlp_modulation=mask_mlp_modulation,
            mask_gate=mask_init == "copy",
        )
        model.load_state_dict(transformer.state_dict(), strict=False)
        if mask_init == "copy":
            model._copy_image_branch()
        # Not diffusers' own `to`, which warns about an empty list of layers to keep in float32.
        return nn.Module.to(model, transformer.device, transformer.dtype)

    def _copy_image_branch(self) -> None:
        """Start what the mask passes through from the weights of the image branch."""
        for block in self.transformer_blocks:
            block.mask.copy_image_branch(block)
        if self.config.mask_channels == self.config.in_channels:
            self.mask_embed.proj.load_state_dict(self.pos_embed.proj.state_dict())
        else:
            _init_patch_embed(self.mask_embed)

    @torch.no_grad()
    def initialize_from_scratch(self) -> Self:
        """Initialise all weights for training without a base model, and return self.

        The modulation starts as plain transformers (shift and scale 0, gate 1) and the read-out at zero, so that the
        first output is zero. Positions get wavelengths that fit the grid (`_position_table`).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        _init_patch_embed(self.pos_embed)
        _init_patch_embed(self.mask_embed)
        self.pos_embed.pos_embed.copy_(_position_table(self.config.pos_embed_max_size, self.inner_dim))
        for embedder in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        for stream in (stream for block in self._blocks() for stream in block.streams()):
            if stream.modulation is not None:
                nn.init.zeros_(stream.modulation.weight)
                for gate in stream.modulation.bias.split(self.inner_dim)[2::3]:
                    gate.fill_(1)
        for name, parameter in self.named_parameters():
            if name.endswith(".mask.gate"):
                nn.init.constant_(parameter, 1 / _GATE_GAIN)
        for readout in (self.norm_out.linear, self.proj_out):
            nn.init.zeros_(readout.weight)
        return self

    @torch.no_grad()
    def remap_mask_classes(self, classes: int, sources: Sequence[int | None]) -> Self:
        """Give the one-hot coded mask other classes, and return self.

        Args:
            classes: how many it has now.
            sources: for each new class, the class of this model whose embedding it takes over; None starts it as the
                mean of all embeddings, which says "some class" and lets training tell them apart.
        """
        p, old = self.config.patch_size, self.mask_embed.proj
        # Channels are class-major: `pixel_unshuffle` lays the pixels under a latent out within each class.
        columns = old.weight.unflatten(1, (classes, -1))
        mean = columns.mean(1)
        weight = torch.stack([mean if source is None else columns[:, source] for source in sources], dim=1).flatten(
            1, 2
        )
        self.mask_embed.proj = nn.Conv2d(weight.shape[1], old.out_channels, p, p).to(weight)
        self.mask_embed.proj.weight.copy_(weight)
        self.mask_embed.proj.bias.copy_(old.bias)
        self.register_to_config(mask_channels=weight.shape[1])
        if self.mask_out is not None:
            weight, bias = (
                _remapped(rows.unflatten(0, (classes, -1)), sources)
                for rows in (self.mask_out.weight, self.mask_out.bias)
            )
            self.mask_out = nn.Linear(weight.shape[1], len(weight)).to(weight)
            self.mask_out.weight.copy_(weight)
            self.mask_out.bias.copy_(bias)
        return self

    def set_trainable(self, which: Trainable, lora_rank: int = 16) -> Self:
        """Choose which parameters train, and return self.

        Args:
            which: "all"; "image+mask" as published, with the text branch frozen; "mask", the mask branch alone; "lora",
                the mask branch and low-rank adapters on the image branch's attention and feed-forward layers. The gates
                of references train with any.
            lora_rank: rank of the adapters.

        Raises:
            TerraSynthError: "lora" without peft installed.
        """
        if which not in get_args(Trainable):
            raise TerraSynthError(
                "no such choice of branches", found=which, expected=", ".join(get_args(Trainable)), fix="choose one"
            )
        if which == "lora" and not getattr(self, "peft_config", None):
            self._add_lora(lora_rank)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_trains(name, which))
        self._freeze_dead_parameters()
        return self

    def _freeze_dead_parameters(self) -> None:
        # SD3 stores a query for the last block's text tokens, but nobody reads what it finds: it never gets a gradient.
        for block in self._blocks():
            if block.context_pre_only:
                block.attn.add_q_proj.requires_grad_(False)
                if block.attn.norm_added_q is not None:
                    block.attn.norm_added_q.requires_grad_(False)

    def _blocks(self) -> Iterator[JointBlock]:
        return (module for module in self.modules() if isinstance(module, JointBlock))

    def _add_lora(self, rank: int) -> None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise TerraSynthError(
                "low-rank adapters need peft, which is not installed", fix="pip install 'terrasynth[peft]'"
            ) from error
        self.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_IMAGE_LINEARS))

    def merge_lora(self) -> Self:
        """Add the low-rank adapters to the weights they belong to, remove them, and return self."""
        self.fuse_lora()
        self.unload_lora()
        return self

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as diffusers does; adapters that are still attached are merged in what is saved, not in this model."""
        if getattr(self, "peft_config", None):
            copy.deepcopy(self).merge_lora().save_pretrained(save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)


def _remapped(rows: Tensor, sources: Sequence[int | None]) -> Tensor:
    """Rows of the new classes, one after the other; `rows` (classes, n, ...) are the old ones'."""
    mean = rows.mean(0)
    return torch.cat([mean if source is None else rows[source] for source in sources])


def _trains(name: str, which: Trainable) -> bool:
    if which == "all" or name.startswith("mask_") or ".mask." in name or name.endswith(".reference_gate"):
        return True
    if which == "image+mask":
        return not any(part in name for part in TEXT_BRANCH)
    return ".lora_" in name


def _position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of both coordinates, (1, side^2, width), with wavelengths from 4 to 2 `side` tokens.

    SD3's reach from 6 to 60 000 positions, in steps of a fraction of a position: on a grid of a few dozen tokens nearly
    all of them are constant, neighbours look alike, and the image takes long to find the mask below it.
    """
    # Named, because transformers, loading a model, takes `linspace` out of what torch's default device applies to.
    wavelengths = 4 * (side / 2) ** torch.linspace(0, 1, width // 4, device="cpu")
    angles = 2 * math.pi * torch.arange(side, device="cpu")[:, None] / wavelengths
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along[:, None].expand(side, side, -1), along[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, side * side, width)


def _init_patch_embed(embed: PatchEmbed) -> None:
    # A linear layer on flattened patches, and initialised as one.
    nn.init.xavier_uniform_(embed.proj.weight.view(embed.proj.weight.shape[0], -1))
    nn.init.zeros_(embed.proj.bias)
