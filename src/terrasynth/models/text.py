"""Prompts to embeddings: Stable Diffusion 3's encoders, or a small word encoder for small models.

Either way the encoders are frozen, so every distinct prompt is encoded once (`PromptCache` keeps it on disk).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from terrasynth.io import atomic_write, digest

__all__ = ["PromptCache", "encode_prompts", "encode_prompts_sd1", "word_encoder", "word_tokenizer"]

_WORD = r"[^\W_]+"
#: What words are spelt with: digits, and the Latin letters that are left when accents are taken off.
_LETTERS = string.digits + string.ascii_lowercase + "ßæðøþđħıłŋœ"


def word_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of the words of remote sensing and of `texts`; other words are spelt.

    So a model meets no word that it can not tell from others, though only those of its training mean something to it.
    Case, accents and punctuation are dropped (an underscore is punctuation), and `<unk>` is a word of another script.
    Every encoding has the length of the longest text, rounded up to a multiple of eight, and at least 32.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    split = [re.findall(_WORD, normalizer.normalize_str(text)) for text in texts]
    common = re.findall(_WORD, (Path(__file__).parent / "words.txt").read_text(encoding="utf-8"))
    words = {word for words in (common, *split) for word in words}
    letters = set(_LETTERS) | {letter for word in words for letter in word}
    specials = ["<pad>", "<unk>", "<s>", "</s>"]
    # Ids 0...3 are the specials. CLIP takes the embedding at the first `</s>` as the pooled one.
    pieces = sorted(words | letters) + sorted(f"##{letter}" for letter in letters)
    vocabulary = {piece: i for i, piece in enumerate(specials + pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    longest = max(32, 2 + max(map(len, split), default=0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=-(-longest // 8) * 8,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def word_encoder(tokenizer: PreTrainedTokenizerFast, width: int = 64, seed: int = 0) -> CLIPTextModelWithProjection:
    """A one-layer CLIP text model with seeded random weights, for `word_tokenizer`.

    It is never trained: random embeddings of a few hundred words are as good as orthogonal, and the transformer's own
    text stream learns what they mean.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,  # diffusers' convention takes the last but one hidden state
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModelWithProjection(config).eval()
        # CLIP initialises its embeddings at 0.02, which would leave all prompts nearly alike.
        embeddings = encoder.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    return encoder.requires_grad_(False)


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    clip: Sequence[tuple[PreTrainedTokenizerBase, nn.Module]],
    t5: tuple[PreTrainedTokenizerBase, nn.Module] | None = None,
    t5_length: int = 256,
) -> tuple[Tensor, Tensor]:
    """Encode prompts as Stable Diffusion 3 does (Esser et al. 2024, section 4.1.2).

    The last but one hidden states of the CLIP encoders are joined along the channels, zero-padded to the width of T5's
    and followed by T5's tokens; the pooled projections are joined along the channels.

    Args:
        prompts: B texts.
        clip: one or two (tokenizer, `CLIPTextModelWithProjection`).
        t5: (tokenizer, `T5EncoderModel`), or None for models without.
        t5_length: tokens of T5.

    Returns:
        (B, L, D) prompt embeddings and (B, P) pooled embeddings.
    """
    hidden, pooled = [], []
    for tokenizer, encoder in clip:
        ids = _tokens(tokenizer, prompts, tokenizer.model_max_length, encoder)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    embeds = torch.cat(hidden, dim=-1)
    if t5 is not None:
        tokenizer, encoder = t5
        long = encoder(_tokens(tokenizer, prompts, t5_length, encoder))[0]
        embeds = torch.cat([F.pad(embeds, (0, long.shape[-1] - embeds.shape[-1])), long], dim=1)
    return embeds, torch.cat(pooled, dim=-1)


@torch.no_grad()
def encode_prompts_sd1(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: nn.Module
) -> tuple[Tensor, Tensor]:
    """Encode prompts as Stable Diffusion 1 does: the last hidden states of one CLIP encoder.

    Args:
        prompts: B texts.
        tokenizer: the encoder's.
        encoder: `CLIPTextModel`, with or without projection.

    Returns:
        (B, L, D) prompt embeddings, and (B, 0): there is no pooled embedding, but `PromptCache` keeps pairs.
    """
    hidden = encoder(_tokens(tokenizer, prompts, tokenizer.model_max_length, encoder)).last_hidden_state
    return hidden, hidden.new_empty(len(prompts), 0)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], length: int, encoder: nn.Module) -> Tensor:
    batch = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    if tokenizer.is_fast:
        # A fast tokenizer remembers these, and would be saved with or without them as prompts were cached or not.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return batch.input_ids.to(next(encoder.parameters()).device)


class PromptCache:
    """Embeddings of prompts, each encoded once and kept on disk.

    Args:
        encode: maps B prompts to (B, L, D) and (B, P), as `encode_prompts`.
        folder: one safetensors file a prompt is kept here; None keeps them in memory only.
        identity: names the encoders; embeddings of other encoders are never mixed up.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]], folder: Path | None, identity: str
    ) -> None:
        self._encode = encode
        self._folder = folder
        self._identity = identity
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], batch_size: int = 128) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and (B, P) of the prompts; only those never seen before are encoded."""
        self.prepare(prompts, batch_size)
        embeds, pooled = zip(*(self._memory[p] for p in prompts), strict=True)
        return torch.stack(embeds), torch.stack(pooled)

    def prepare(self, prompts: Iterable[str], batch_size: int = 128) -> None:
        """Encode those of many prompts that were never seen before."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._memory and not self._read(p)]
        for start in range(0, len(missing), batch_size):
            some = missing[start : start + batch_size]
            for prompt, embeds, pooled in zip(some, *self._encode(some), strict=True):
                # Copies: a slice would keep the whole batch alive.
                tensors = {"embeds": embeds.cpu().clone(), "pooled": pooled.cpu().clone()}
                self._memory[prompt] = (tensors["embeds"], tensors["pooled"])
                if self._folder is not None:
                    with atomic_write(self._path(prompt)) as partial:
                        save_file(tensors, partial)

    def _path(self, prompt: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{digest(self._identity, prompt)}.safetensors"

    def _read(self, prompt: str) -> bool:
        if self._folder is None or not self._path(prompt).is_file():
            return False
        tensors = load_file(self._path(prompt))
        self._memory[prompt] = (tensors["embeds"], tensors["pooled"])
        return True
