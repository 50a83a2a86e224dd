import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from test_convert_idgbr import published
from torch.utils.flop_counter import FlopCounterMode

from terrasynth.data.schema import LabelSchema
from terrasynth.errors import TerraSynthError
from terrasynth.models.autoencoder import encode_images
from terrasynth.models.label_codes import LabelCodes
from terrasynth.models.unet import decode, encode
from terrasynth.recipe import TrainConfig
from terrasynth.sampling.flow import seeded_generator, seeded_noise
from terrasynth.systems.idgbr import IDGBRPipeline, decide
from terrasynth.training.loop import train

SCHEMA = LabelSchema(("land", "road", "water"), ((200, 150, 90), (90, 90, 90), (20, 60, 160)))
SMALL = {"widths": (8, 16), "guidance_width": 8, "image_size": 16, "patch_size": 2}
LAYOUTS = pytest.mark.parametrize("conditions", ["joint", "separate"])


def shaken(pipeline):
    """As after some training: no zero-initialised layer hides a fault."""
    torch.manual_seed(1)
    for parameter in pipeline.network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipeline.network.eval()
    return pipeline


def small_pipeline(schema=SCHEMA, **changes):
    return shaken(IDGBRPipeline.from_scratch(schema, **SMALL | changes))


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.fixture
def images():
    return F.interpolate(torch.rand(3, 3, 4, 4), 16, mode="bilinear")


@pytest.fixture
def rough():
    rough = torch.randint(0, 3, (3, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    rough[0, :3] = 255
    return rough


def batch(images, rough):
    mask = rough.roll(1, 2)
    mask[1, 5:9] = 255
    return {"image": images, "rough": rough, "mask": mask, "seed": torch.tensor([3, 4, 2**40 + 5])}


# Refinement


def test_a_refinement_depends_on_its_own_row_only(pipeline, images, rough):
    options = {"num_steps": 3, "strength": 0.7, "guidance_scale": 1.5}
    together = pipeline.scores(images, rough, seeds=[5, 6, 7], **options)
    rows = [slice(i, i + 1) for i in (2, 0, 1)]
    alone = torch.cat([pipeline.scores(images[r], rough[r], seeds=[5 + r.start], **options) for r in rows])
    torch.testing.assert_close(together, alone[[1, 2, 0]], atol=1e-4, rtol=0)
    assert together.shape == (3, 3, 16, 16)
    assert 0 <= together.min() < together.max() <= 1


def test_image_rough_map_and_seed_each_change_the_scores(pipeline, images, rough):
    def scores(images, rough, seed, **options):
        return pipeline.scores(images[1:2], rough[1:2], seeds=[seed], num_steps=2, **options)

    first = scores(images, rough, 1)
    assert torch.equal(first, scores(images, rough, 1))
    for other in (
        scores(images, rough, 2),
        scores(1 - images, rough, 1),
        scores(images, rough.flip(1), 1),
        scores(images, rough, 1, strength=0.5),
        scores(images, rough, 1, guidance_scale=2.0),
    ):
        assert (first - other).abs().max() > 1e-3


def test_without_the_rough_map_the_image_alone_is_seen(images, rough):
    for conditions in ("joint", "separate"):
        blind = small_pipeline(sees_rough=False, conditions=conditions)
        assert blind.rough_start == 0
        maps = [blind.scores(images, given, seeds=[1, 2, 3], num_steps=1) for given in (rough, rough.flip(1))]
        assert torch.equal(*maps)
        assert (maps[0] - blind.scores(1 - images, rough, seeds=[1, 2, 3], num_steps=1)).abs().max() > 1e-3


def evaluations(pipeline, run):
    """How many images each encoder, the guidance and the decoder see."""
    counts = {}
    parts = {"encoder": pipeline.unet.conv_in, "decoder": pipeline.unet.conv_out}
    parts |= {"conditions": pipeline.condition_encoder.conv_in, "guidance": pipeline.guidance_net.blocks[0]}
    hooks = [
        part.register_forward_hook(
            lambda module, given, output, name=name: counts.__setitem__(name, counts.get(name, 0) + len(output))
        )
        for name, part in parts.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@LAYOUTS
def test_what_is_computed_once_changes_nothing(conditions, images, rough):
    """Against the released way: conditions in every step, and whole U-Nets of diffusers' with and without guidance."""
    pipeline = small_pipeline(conditions=conditions)
    found = {}
    for cache in (True, False):
        for scale in (1.0, 3.0):

            def run(cache=cache, scale=scale):
                options = {"num_steps": 4, "guidance_scale": scale, "cache": cache}
                found[cache, scale] = pipeline.scores(images, rough, seeds=[1, 2, 3], **options)

            counts = evaluations(pipeline, run)
            read = 3 if conditions == "joint" else 6
            if cache:
                expected = {"conditions": read, "encoder": 12, "guidance": 12, "decoder": 12 if scale == 1 else 24}
            else:
                expected = {"conditions": 4 * read, "encoder": 36, "guidance": 12, "decoder": 24}
            assert counts == expected
    for scale in (1.0, 3.0):
        torch.testing.assert_close(found[True, scale], found[False, scale], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_published_layout_needs_half_the_operations_of_the_released_code():
    """Counted at the published size: two encoders of the conditions, guidance, 25 steps."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        x, t, text = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)
        with FlopCounterMode(display=False) as whole:
            features = encode(unet, x, t, text)
        encoder = whole.get_total_flops()
        with FlopCounterMode(display=False) as half:
            decode(unet, features, text)
        decoder = half.get_total_flops()
    released = 25 * (2 * encoder + encoder + 2 * (encoder + decoder))
    print(f"encoder {encoder / 1e9:.0f}, decoder {decoder / 1e9:.0f} · 10⁹ operations")
    for scale, ours in (("1", 2 * encoder + 25 * (encoder + decoder)), ("3", 2 * encoder + 25 * (encoder + 2 * decoder))):
        print(f"guidance {scale}: {released / ours:.2f} times less")
