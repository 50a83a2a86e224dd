import pytest
import timm
import torch
import torch.nn.functional as F

from terrasynth.models.alignment import Alignment

SMALL = {"pretrained": False, "width": 24}


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return Alignment(6, "test_vit", **SMALL)


@torch.no_grad()
def test_the_loss_is_minus_the_mean_cosine_of_patch_tokens(transformer):
    """Against the definition, place by place in float64, with the tokens of timm's other interface."""
    images, features = torch.rand(2, 3, 96, 64), torch.randn(2, 6, 3, 2)
    model = transformer.teacher
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    resized = F.interpolate(images, (6 * 16, 4 * 16), mode="bicubic")
    tokens = model.forward_features((resized - mean) / std)[:, model.num_prefix_tokens :].double()
    student = transformer.projector(features.flatten(2).mT).mT.unflatten(2, (3, 2))
    student = F.interpolate(student.double(), (6, 4), mode="bilinear").flatten(2).mT
    expected = [
        -sum(a @ b / (a.norm() * b.norm()) for a, b in zip(*rows, strict=True)) / 24
        for rows in zip(student, tokens, strict=True)
    ]
    torch.testing.assert_close(transformer(features, images).double(), torch.stack(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_student_that_says_the_same_has_the_lowest_loss():
    alignment, features = Alignment(6, "test_vit", **SMALL), torch.randn(2, 6, 4, 4)
    alignment.projector = torch.nn.Identity()
    alignment.see = lambda images: features
    torch.testing.assert_close(alignment(features, torch.zeros(0)), -torch.ones(2))
    torch.testing.assert_close(alignment(-features, torch.zeros(0)), torch.ones(2))


def test_a_student_of_zeros_has_no_loss_and_no_gradient_and_others_have(transformer):
    features = torch.randn(2, 6, 2, 2)
    features[0] = 0
    features.requires_grad_()
    loss = transformer(features, torch.rand(2, 3, 64, 64))
    assert loss[0] == 0
    assert loss[1] != 0
    loss.sum().backward()
    assert features.grad.isfinite().all()
    assert not features.grad[0].any()
    assert features.grad[1].any()
    assert all(parameter.grad is None for parameter in transformer.teacher.parameters())


def test_the_projector_learns_what_the_teacher_sees(transformer):
    images, features = torch.rand(4, 3, 64, 64), torch.randn(4, 6, 4, 4)
    optimizer = torch.optim.AdamW(transformer.projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(transformer(features, images).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("teacher", ["test_resnet", "test_convnext"])
def test_a_teacher_may_be_convolutional_and_stays_as_it_is(teacher):
    alignment = Alignment(6, teacher, **SMALL).train()
    before = {name: tensor.clone() for name, tensor in alignment.teacher.state_dict().items()}
    images = torch.rand(2, 3, 64, 96)
    assert alignment(torch.randn(2, 6, 2, 3), images).shape == (2,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in alignment.teacher.state_dict().items())
    assert not alignment.teacher.training
    config = alignment.teacher.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(alignment.see(images), alignment.teacher.forward_features((images - mean) / std))


def test_sixteen_pixels_are_a_token_and_the_projector_is_as_published():
    """The published teacher has patches of 14 pixels and 1536 channels."""
    alignment, seen = Alignment(1280, "test_vit", pretrained=False), []
    alignment.teacher.forward_intermediates = lambda x, **_: seen.append(x.shape) or [x]
    alignment.patch_size = 14
    alignment.see(torch.rand(1, 3, 512, 512))
    assert seen == [(1, 3, 448, 448)]
    *hidden, last = (layer for layer in alignment.projector if hasattr(layer, "weight"))
    count = sum(p.numel() for layer in hidden for p in layer.parameters())
    assert round((count + (last.in_features + 1) * 1536) / 1e6, 2) == 9.97


@torch.no_grad()
def test_a_teacher_of_one_size_sees_images_brought_to_it():
    alignment, images = Alignment(6, "mixer_s32_224", **SMALL), torch.rand(1, 3, 64, 96)
    assert alignment.size == [224, 224]
    assert alignment(torch.randn(1, 6, 4, 6), images).isfinite().all()
    resized = F.interpolate(images, (224, 224), mode="bicubic")
    torch.testing.assert_close(alignment.see(images), alignment.see(resized), atol=1e-5, rtol=0)


def test_a_teacher_without_feature_maps_is_refused_at_once(monkeypatch):
    real = timm.create_model

    def without(*given, **settings):
        model = real(*given, **settings)
        model.forward_intermediates = None
        return model

    monkeypatch.setattr(timm, "create_model", without)
    with pytest.raises(ValueError, match="test_resnet gives no feature maps"):
        Alignment(6, "test_resnet", **SMALL)
