from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from terrasynth.models import text
from terrasynth.models.text import PromptCache, encode_prompts, word_encoder, word_tokenizer

TEXTS = ["a satellite image of building, land", "a satellite image of water"]
TOKENIZER = word_tokenizer()


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


def test_known_words_have_their_own_tokens_and_others_are_spelt():
    tokenizer = word_tokenizer([*TEXTS, "a zeppelin"])
    assert tokens(tokenizer, "A satellite image of WATER, zeppelin!") == [
        *["a", "satellite", "image", "of", "water", "zeppelin"]
    ]
    assert tokens(tokenizer, "lava") == ["l", "##a", "##v", "##a"]
    assert tokens(tokenizer, "") == []
    assert tokenizer("water").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("water").input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 32


def test_every_word_of_remote_sensing_is_one_token_without_being_given():
    words = (Path(text.__file__).parent / "words.txt").read_text(encoding="utf-8").split()
    assert len(words) > 250
    assert len(set(words)) == len(words)
    tokenizer = word_tokenizer()
    assert [tokens(tokenizer, word) for word in words] == [[word] for word in words]
    usual = ["building", "road", "water", "forest", "bareland", "low vegetation", "impervious surface"]
    assert [tokens(tokenizer, name) for name in usual] == [name.split() for name in usual]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abcxyzw0189", min_size=1, max_size=12), min_size=1, max_size=4))
def test_spelling_loses_nothing(words):
    found = tokens(TOKENIZER, " ".join(words))
    assert "<unk>" not in found
    spelt = "".join(piece.removeprefix("##") if piece.startswith("##") else f" {piece}" for piece in found)
    assert spelt.split() == words


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Forêt, ÉTANG", "foret etang"),
        ("bare_ground", "bare ground"),
        ("low-vegetation", "low vegetation"),
        ("İzmir", "izmir"),
        ("ﬁeld", "field"),
        ("m²", "m2"),
    ],
)
def test_case_accents_and_punctuation_make_no_difference(text, same):
    assert tokens(TOKENIZER, text) == tokens(TOKENIZER, same)
    # Nor in what the vocabulary is made from.
    assert tokens(word_tokenizer([text]), same) == same.split()


def test_unknown_is_a_word_of_another_script_unless_it_was_given():
    assert "<unk>" not in tokens(TOKENIZER, "Straße øre þing œuvre łąka ħaġar ŋ ĳ")
    assert tokens(TOKENIZER, "лес water 水 αβγ") == ["<unk>", "water", "<unk>", "<unk>"]
    given = word_tokenizer(["лес 水"])
    assert tokens(given, "лес, 水") == ["лес", "水"]
    assert tokens(given, "сел") == ["с", "##е", "##л"]


def test_a_long_text_lengthens_every_encoding():
    assert word_tokenizer(["water " * 30]).model_max_length == 32
    assert word_tokenizer(["water " * 31]).model_max_length == 40


def test_a_text_that_is_too_long_keeps_its_end_token():
    encoder = word_encoder(TOKENIZER)
    embeds, pooled = encode_prompts(["water " * 50, "water " * 30], [(TOKENIZER, encoder)])
    assert embeds.shape == (2, 32, 64)
    assert torch.equal(pooled[0], pooled[1])


def test_prompts_that_differ_are_encoded_differently_and_alike_every_time():
    tokenizer = word_tokenizer(TEXTS)
    first = encode_prompts([*TEXTS, ""], [(tokenizer, word_encoder(tokenizer))])
    again = encode_prompts([*TEXTS, ""], [(tokenizer, word_encoder(tokenizer))])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    embeds, pooled = first
    assert embeds.shape == (3, 32, 64)
    assert pooled.shape == (3, 64)
    distances = torch.cdist(pooled, pooled)[torch.triu(torch.ones(3, 3), 1).bool()]
    assert distances.min() > 0.1 * pooled.norm(dim=1).mean()


def test_saved_tokenizer_and_encoder_give_the_same_embeddings(tmp_path):
    tokenizer = word_tokenizer(TEXTS)
    encoder = word_encoder(tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        CLIPTextModelWithProjection.from_pretrained(tmp_path / "encoder").eval(),
    )
    for a, b in zip(encode_prompts(TEXTS, [(tokenizer, encoder)]), encode_prompts(TEXTS, [loaded]), strict=True):
        assert torch.equal(a, b)


def test_three_encoders_are_joined_as_diffusers_pipeline_does():
    tokenizer = word_tokenizer([*TEXTS, "one two three four five six seven eight nine ten"])

    def clip(width, projection):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        return CLIPTextModelWithProjection(config).eval()

    torch.manual_seed(0)
    one, two = clip(16, 8), clip(24, 12)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
    reference = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=one,
        text_encoder_2=two,
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer,
    )
    reference.tokenizer_max_length = tokenizer.model_max_length
    expected, _, expected_pooled, _ = reference.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=24, device="cpu"
    )
    embeds, pooled = encode_prompts(TEXTS, [(tokenizer, one), (tokenizer, two)], (tokenizer, t5), t5_length=24)
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_each_prompt_is_encoded_once_in_a_lifetime(tmp_path):
    seen = []

    def encode(prompts):
        seen.extend(prompts)
        values = torch.tensor([[float(len(p))] for p in prompts])
        return values[:, None], values

    cache = PromptCache(encode, tmp_path, "encoder A")
    embeds, _ = cache(["a", "bb", "a"], batch_size=1)
    assert embeds.flatten().tolist() == [1, 2, 1]
    PromptCache(encode, tmp_path, "encoder A")(["bb", "a"])
    assert seen == ["a", "bb"]
    PromptCache(encode, tmp_path, "encoder B")(["a"])
    assert seen == ["a", "bb", "a"]


@pytest.mark.parametrize("identity", ["x", "y"])
def test_memory_only_cache_keeps_the_order_asked_for(identity):
    cache = PromptCache(lambda ps: (torch.tensor([[[float(p)]] for p in ps]), torch.zeros(len(ps), 1)), None, identity)
    assert cache(["3", "1", "2", "1"])[0].flatten().tolist() == [3, 1, 2, 1]
