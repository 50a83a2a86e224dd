import itertools
import os
import signal

# Whatever the shell says: a process forked from one with several threads hangs, results must not hang on how many there
# are, and two processes of two threads on two cores spin more than they compute.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TERRASYNTH_QUIET", "1")
# Wide enough for any message: no path, long as those of tests can be, is broken over two lines.
os.environ["COLUMNS"] = "500"

import pytest
import torch

from terrasynth.recipe import Recipe


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def killed():
    """`killed(run, owner, name, number)`: `run()` in a process that dies right before its call `number`, counted from
    0, of `owner.name`. Whether it came so far."""

    def killed(run, owner, name, number) -> bool:
        child = os.fork()
        if child == 0:
            original, calls = getattr(owner, name), itertools.count()

            def counted(*arguments, **named):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)

            setattr(owner, name, counted)
            try:
                torch.set_num_threads(1)
                run()
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    return killed


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """A whole study in seconds: four procedural tiles a split, models of a few thousand weights."""
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "kind": "world",
                "image_size": 32,
                "world": {"gsd": 2.0, "train": 4, "validation": 2, "test": 2},
            },
            "generator": {
                "width": 32,
                "heads": 2,
                "blocks": 2,
                "views": 4,
                "train": {
                    "steps": 6,
                    "batch_size": 4,
                    "evaluate_every": 3,
                    "checkpoint_every": 2,
                    "ema_decay": 0.9,
                    "warmup_steps": 2,
                },
            },
            "sampling": {"steps": 3, "batch_size": 2},
            "steering": {"steps": 2},
            "segmentor": {
                "encoder": "tu-test_resnet",
                "options": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]},
                "train": {"steps": 4, "batch_size": 4, "evaluate_every": 2, "checkpoint_every": 2, "warmup_steps": 1},
            },
            "study": {"seeds": [0, 1], "ratio": 1},
        }
    )


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A small Stable Diffusion 3.5 with all its parts, saved as the hub has it."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from terrasynth.models.text import word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(["a satellite image of land road water bare ground field tree building"])

    def clip(width, projection):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        return CLIPTextModelWithProjection(config)

    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    folder = tmp_path_factory.mktemp("sd3")
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(16, 8),
        tokenizer=tokenizer,
        text_encoder_2=clip(16, 12),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd15(tmp_path_factory):
    """A small Stable Diffusion 1.5 with the parts and the scheduler that the hub's has."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from terrasynth.models.text import word_tokenizer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(["a satellite image of land road water"])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = PNDMScheduler(**schedule, skip_prk_steps=True, set_alpha_to_one=False)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(folder)
    return folder, pipeline
