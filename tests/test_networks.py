"""Shapes, ranges and structure of the seven pairs of networks."""

import re

import pytest
import torch
from helpers import CONVOLUTIONAL, DEVICES, NAMES, ROOT, SCRIPTS, networks
from torch import nn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_ranges(name, image_size, channels, device):
    G, D = (net.to(device) for net in networks(name, channels, image_size))
    x = G(3 * torch.randn(5, 6, device=device))
    assert x.shape == (5, channels, image_size, image_size)
    assert x.abs().max() <= 1
    # A far larger last layer must still end in [-1, 1]: tanh, and no other range.
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    last = [m for m in G.modules() if isinstance(m, kinds)][-1]
    with torch.no_grad():
        last.weight.mul_(1000)
        wide = G(3 * torch.randn(5, 6, device=device))
    assert wide.max() <= 1 and wide.min() >= -1 and wide.max() > 0.5 and wide.min() < -0.5
    scores = D(x)
    assert scores.shape == (5,)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_norm_has_one_argument(name):
    """A second one, such as 0.8, would be eps."""
    text = (ROOT / f"{name}.py").read_text("utf-8")
    assert not re.search(r"BatchNorm\dd\([^)]*,", text)


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"gan", "ssgan", "stacked_gan"}))
def test_other_sizes_are_refused(name):
    """Such as MNIST's 28, for which some would draw images of 24 or 32 pixels."""
    n_classes = [3] if name == "cgan" else []
    with pytest.raises(ValueError, match=r"image_size is 28, but must be 16, 32, 64, \.\.\. 1024"):
        SCRIPTS[name].Generator(6, 8, 3, 28, *n_classes)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_raw(name):
    """No sigmoid: scaling the last layer scales the scores, to any sign and size."""
    _, D = networks(name)
    D.eval()
    x = torch.randn(6, 3, 16, 16)
    last = [m for m in D.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    weight = last.parametrizations.weight.original if name == "sngan" else last.weight
    with torch.no_grad():
        weight.normal_(0, 100)  # under spectral norm the scale goes, the signs stay
        last.bias.fill_(-7)
        low = D(x)
        last.bias.fill_(7)
        high = D(x)
    assert torch.allclose(high - low, torch.full((6,), 14.0), rtol=1e-3, atol=1e-3)
    assert low.min() < 0 and high.max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_width_is_the_layer_next_to_the_image(name):
    for width in (8, 20):
        G, D = networks(name, width=width)
        weights = [
            m.weight.shape
            for m in G.modules()
            if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        ]
        first = next(m for m in D.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        if name == "gan":
            assert weights[-1] == (3 * 16 * 16, width) and first.out_features == width // 5 * 5
        elif name == "sngan":
            assert weights[-1] == (3, width, 3, 3) and first.out_channels == width
        else:
            assert weights[-1] == (width, 3, 4, 4) and first.out_channels == width


@pytest.mark.parametrize("name", NAMES)
def test_initialisation(name):
    """Weights N(0, 0.02), gains N(1, 0.02), biases 0: DCGAN section 4; in sngan the weight under
    the norm. wgan_gp's critic: N(0, 2 / (1.04 fan_in)), He et al. 2015, eq. 15 with a slope of
    0.2."""
    for net in networks(name, width=40, image_size=32):
        for m in net.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                parametrized = hasattr(m, "parametrizations")
                w = m.parametrizations.weight.original if parametrized else m.weight
                if w.numel() > 300:
                    he = name == "wgan_gp" and isinstance(m, nn.Conv2d)
                    std = (2 / 1.04 / w[0].numel()) ** 0.5 if he else 0.02
                    assert abs(w.mean()) < 0.2 * std
                    assert w.std().item() == pytest.approx(std, rel=0.15)
                assert m.bias is None or (m.bias == 0).all()
            if isinstance(m, nn.BatchNorm2d):
                assert m.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert m.weight.std().item() == pytest.approx(0.02, rel=0.5)
                assert (m.bias == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm(name):
    """The usual eps and momentum (0.8 as a second positional argument would be eps), no bias
    before it, none next to the images, and none in the discriminators that must judge each image
    alone."""
    G, D = networks(name, image_size=32)
    for net in (G, D):
        layers = [m for m in net.modules() if not list(m.children())]
        norms = [i for i, m in enumerate(layers) if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for i in norms:
            assert layers[i].eps == 1e-5 and layers[i].momentum == 0.1
            before = layers[i - 1] if not isinstance(layers[i - 1], nn.Unflatten) else layers[i - 2]
            assert before.bias is None
        expected = {"gan": (0, 0), "wgan_gp": (3, 0), "sngan": (4, 0)}.get(name, (3, 2))
        assert len(norms) == expected[net is D]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in list(D.modules())[-2:])


@pytest.mark.parametrize("name", ["gan", "wgan_gp", "sngan"])
def test_scores_do_not_mix_samples(name):
    """dD(x_i)/dx_j = 0 for i != j where the penalty or the norm is about single images."""
    _, D = networks(name, width=80)  # wide enough that gan's dropout leaves something
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    for i in range(4):
        (grad,) = torch.autograd.grad(D(x)[i], x)
        assert grad[i].abs().max() > 0
        assert grad[[j for j in range(4) if j != i]].abs().max() == 0


def test_maxout_takes_the_largest_of_five():
    maxout = SCRIPTS["gan"].Maxout(3, 2)
    x = torch.randn(7, 3)
    pieces = x @ maxout.linear.weight.T + maxout.linear.bias
    expected = torch.stack([pieces[:, 0::2].max(1).values, pieces[:, 1::2].max(1).values], 1)
    assert torch.allclose(maxout(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_slopes(name):
    """LeakyReLU of 0.2 in D, as DCGAN has it; 0.1 in SNGAN's Table 3; ReLU in G."""
    G, D = networks(name)
    assert {m.negative_slope for m in D.modules() if isinstance(m, nn.LeakyReLU)} == {
        0.1 if name == "sngan" else 0.2
    }
    assert not any(isinstance(m, nn.LeakyReLU) for m in G.modules())


def test_gan_dropout():
    """0.2 on the pixels, 0.5 on both hidden layers; D sees [0, 1]: on [-1, 1] a dropped pixel is
    grey."""
    _, D = networks("gan")
    assert [m.p for m in D.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    seen = []
    D.net[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    D(torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 16, 16))
    assert [row.unique().tolist() for row in seen[0]] == [[0], [0.5], [1]]


def test_every_weight_of_sngans_discriminator_has_spectral_norm_1():
    """sigma by SVD: at least 1 while the power iteration is still on its way, 1 when it has
    arrived."""
    _, D = networks("sngan", image_size=16, width=4)
    x = torch.randn(2, 3, 16, 16)
    layers = [m for m in D.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 8

    def sigmas():
        D.eval()
        values = [torch.linalg.matrix_norm(m.weight.flatten(1), ord=2).item() for m in layers]
        D.train()
        return values

    assert all(s >= 1 - 1e-4 for s in sigmas())
    for _ in range(200):
        D(x)
    assert sigmas() == pytest.approx([1] * 8, abs=1e-2)
    weights = {k for k, p in D.named_parameters() if p.ndim > 1}
    assert len(weights) == 8 and all("parametrizations.weight.original" in k for k in weights)


def test_sngan_is_table_3():
    G, D = networks("sngan", image_size=32, width=64, z_dim=128)
    convs = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in convs]
    assert shapes == [
        (64, 3, 1),
        (64, 4, 2),
        (128, 3, 1),
        (128, 4, 2),
        (256, 3, 1),
        (256, 4, 2),
        (512, 3, 1),
    ]
    deconvs = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    shapes = [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in deconvs]
    assert shapes == [(256, 4, 2), (128, 4, 2), (64, 4, 2)]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_one_stage_per_doubling(name):
    """dcgan's networks grow by a stage and stay at 4 x 4 inside; sngan's keep their stages, as
    in Table 3."""
    for size in (16, 32, 64):
        G, _ = networks(name, image_size=size)
        stages = sum(isinstance(m, nn.ConvTranspose2d) and m.stride == (2, 2) for m in G.modules())
        assert stages == (3 if name == "sngan" else {16: 2, 32: 3, 64: 4}[size])
