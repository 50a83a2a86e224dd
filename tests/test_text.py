import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from terrasynth.models.text import PromptCache, encode_prompts, word_encoder, word_tokenizer

TEXTS = ["a satellite image of building, land", "a satellite image of water"]


def test_words_have_their_own_tokens_and_others_are_unknown():
    tokenizer = word_tokenizer(TEXTS)
    words = tokenizer.convert_ids_to_tokens(tokenizer("A satellite image of WATER, lava!").input_ids)
    assert words == ["<s>", "a", "satellite", "image", "of", "water", "<unk>", "</s>"]
    assert tokenizer.model_max_length == 8


def test_prompts_that_differ_are_encoded_differently_and_alike_every_time():
    tokenizer = word_tokenizer(TEXTS)
    first = encode_prompts([*TEXTS, ""], [(tokenizer, word_encoder(tokenizer))])
    again = encode_prompts([*TEXTS, ""], [(tokenizer, word_encoder(tokenizer))])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    embeds, pooled = first
    assert embeds.shape == (3, 8, 64)
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
