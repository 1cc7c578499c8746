"""stylegan.py: its layers by hand, mixed styles, and growing from 8x8."""

import pytest
import torch
from helpers import (
    checkpoint,
    open_script,
    recorded,
    train,
)
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu

import stylegan


def networks(width=8, image_size=16):
    torch.manual_seed(0)
    return stylegan.Generator(6, width, 3, image_size), stylegan.Discriminator(width, 3, image_size)


def test_shapes_and_fades_at_each_stage():
    G, D = networks()
    z = torch.randn(4, 6)
    for stage in (0, 1, 2):
        size = 4 * 2**stage
        x = G(z, stage)
        assert x.shape == (4, 3, size, size) and D(x, stage).shape == (4,)
    for stage in (1, 2):
        size = 4 * 2**stage
        G.eval()
        small = G(z, stage - 1)
        assert torch.allclose(G(z, stage, 0.0), interpolate(small, scale_factor=2), atol=1e-5)
        x = torch.randn(4, 3, size, size)
        expected = D(avg_pool2d(x, 2), stage - 1)
        assert torch.allclose(D(x, stage, 0.0), expected, atol=1e-5)
    assert [stylegan.channels_at(size, 512) for size in (4, 32, 64, 1024)] == [512, 512, 256, 16]
    assert len(G.layers) == 2 * 4 - 2


def test_a_layer_by_hand():
    """Convolution, blur where it upsampled, noise, bias, leaky ReLU, instance norm, style."""
    torch.manual_seed(0)
    layer = stylegan.Layer(5, 7, 8, 6, up=True).eval()
    with torch.no_grad():
        layer.noise_strength.normal_()
        layer.bias.normal_()
        layer.affine.bias.normal_()
    x, w = torch.randn(3, 5, 4, 4), torch.randn(3, 6)
    y = interpolate(x, scale_factor=2)
    weight = layer.conv.weight * (2 / (5 * 9)) ** 0.5
    y = nn.functional.conv2d(y, weight, padding=1)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = (taps[:, None] * taps).expand(7, 1, 3, 3)
    y = nn.functional.conv2d(y, blur, padding=1, groups=7)
    y = y + layer.noise_strength[:, None, None] * layer.constant_noise
    y = leaky_relu(y + layer.bias[:, None, None], 0.2)
    mean, variance = y.mean((2, 3), keepdim=True), y.var((2, 3), correction=0, keepdim=True)
    y = (y - mean) / (variance + 1e-8).sqrt()
    style = w @ layer.affine.weight.T / 6**0.5 + layer.affine.bias
    scale, shift = style[:, :7, None, None], style[:, 7:, None, None]
    assert torch.allclose(layer(x, w), (scale + 1) * y + shift, atol=1e-5)


def test_a_layer_of_D_by_hand():
    """Blur, convolution, the mean of each 2x2 pixels, bias, leaky ReLU."""
    torch.manual_seed(0)
    down = stylegan.Down(5, 7)
    nn.init.normal_(down.conv.bias)
    x = torch.randn(3, 5, 8, 8)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = (taps[:, None] * taps).expand(5, 1, 3, 3)
    y = nn.functional.conv2d(x, blur, padding=1, groups=5)
    y = nn.functional.conv2d(y, down.conv.weight * (2 / (5 * 9)) ** 0.5, padding=1)
    y = nn.functional.avg_pool2d(y, 2) + down.conv.bias[:, None, None]
    assert torch.allclose(down(x), leaky_relu(y, 0.2), atol=1e-5)


def test_noise():
    """One strength for each channel, 0 at the start; another map for each image in training, the
    same for all in evaluation mode."""
    layer = stylegan.Layer(5, 7, 8, 6)
    assert layer.noise_strength.shape == (7,) and not layer.noise_strength.any()
    assert layer.conv.bias is None
    x, w = torch.randn(1, 5, 8, 8).expand(3, -1, -1, -1), torch.zeros(3, 6)
    assert torch.allclose(layer(x, w)[0], layer(x, w)[1], atol=1e-6)
    with torch.no_grad():
        layer.noise_strength.fill_(1)
    y = layer(x, w)
    assert not torch.allclose(y[0], y[1], atol=0.1) and not torch.equal(y, layer(x, w))
    layer.eval()
    assert torch.allclose(layer(x, w)[0], layer(x, w)[1], atol=1e-6)


def test_the_constant_and_the_first_layer():
    G, _ = networks()
    assert G.constant.shape == (8, 4, 4) and (G.constant == 1).all()
    assert G.layers[0].conv is None and G.layers[1].conv is not None


def test_mapping():
    """Eight layers at a hundredth of the rate, from a normalised z: a step of Adam moves their
    outputs a hundred times less."""
    mapping = stylegan.Mapping(6)
    linear = [layer for layer in mapping.net if isinstance(layer, stylegan.Linear)]
    assert len(linear) == 8 and all(layer.rate == 0.01 for layer in linear)
    assert linear[0].weight.std().item() == pytest.approx(100, rel=0.5)
    z = torch.randn(50, 6)
    assert torch.allclose(mapping(z), mapping(7 * z), atol=1e-4)
    torch.manual_seed(0)
    slow, fast = stylegan.Linear(100, 100, rate=0.01), stylegan.Linear(100, 100)
    with torch.no_grad():
        slow.weight.copy_(100 * fast.weight)
    x = torch.randn(8, 100)
    before = fast(x).detach()
    assert torch.allclose(slow(x), before, atol=1e-4)
    for layer in (slow, fast):
        opt = torch.optim.Adam(layer.parameters(), lr=1e-3)
        layer(x).square().sum().backward()
        opt.step()
    moved = [(layer(x) - before).norm().item() for layer in (slow, fast)]
    assert moved[0] == pytest.approx(moved[1] / 100, rel=0.05)


def test_mixed_styles():
    """In nine of ten batches; one cutoff for the batch; never all layers."""
    w, other = torch.zeros(5, 3), torch.ones(5, 3)
    torch.manual_seed(0)
    counts = torch.zeros(7)
    for _ in range(2000):
        mixed = stylegan.mix_styles(w, other, 6)
        from_other = mixed[:, :, 0].sum(1)
        assert (from_other == from_other[0]).all(), "the same for all images"
        assert (mixed[:, 1:, 0] >= mixed[:, :-1, 0]).all(), "from a layer on"
        counts[int(from_other[0])] += 1
    assert counts[6] == 0, "the first layer keeps the first w"
    assert counts[0].item() == pytest.approx(200, abs=45)
    assert counts[1:6].min() > 270 and counts[1:6].max() < 450


def test_styles_are_mixed_in_both_updates(monkeypatch):
    run, calls = open_script("stylegan"), []
    mix = stylegan.mix_styles
    monkeypatch.setattr(
        stylegan,
        "mix_styles",
        lambda *w, n_layers: calls.append((*w, n_layers)) or mix(*w, n_layers),
    )
    run.update(2, None)
    assert len(calls) == 2
    for w, other, n_layers in calls:
        assert w.shape == other.shape == (4, 6) and n_layers == 6 and not torch.equal(w, other)


def test_r1_at_every_step(monkeypatch):
    """At the real images of D's update."""
    run, calls = open_script("stylegan", "--r1", 3), []
    real = recorded(monkeypatch, "sample_batch")

    def r1_penalty(d_real, x_real):
        calls.append(x_real)
        return torch.tensor(5.0)

    monkeypatch.setattr(stylegan, "r1_penalty", r1_penalty)
    monkeypatch.setattr(stylegan, "d_loss", lambda d_real, d_fake: d_real.mean() * 0 + 2)
    for k in range(3):
        assert run.update(2, None)["loss_D"].item() == 2 + 3 / 2 * 5
        assert len(calls) == k + 1 and torch.equal(calls[-1], real[k][0])


def test_D_compares_groups_of_four():
    _, D = networks()
    x = torch.randn(8, 3, 16, 16)
    other = x.clone()
    other[1] = torch.randn(3, 16, 16)  # with 2 groups, images 0, 2, 4 and 6 are in one
    changed = (D(x, 2) - D(other, 2)).abs() > 1e-6
    assert changed.tolist() == [False, True] * 4


def test_the_images_begin_as_8x8():
    """With 3 steps each: 8x8, a fade to 16x16, 16x16; Adam's state is emptied at 4 and at 7."""
    run = open_script("stylegan", "--stage-steps", 3)
    stages = [run.stage_at(step) for step in (1, 3, 4, 5, 6, 7, 100)]
    thirds = [0, 1 / 3, 2 / 3]
    assert stages == [(1, None)] * 2 + [(2, pytest.approx(f)) for f in thirds] + [(2, None)] * 2
    flags = ["--save-every", 1, "--keep-checkpoints"]
    train("stylegan", "run", "--stage-steps", 3, "--steps", 14, *flags)
    for steps, done in ((3, 3), (4, 1), (6, 3), (7, 1), (14, 8)):
        saved = checkpoint(f"run/step-{steps:06d}")["state"]
        for opt in ("opt_D", "opt_G"):
            assert {int(s["step"]) for s in saved[opt]["state"].values()} == {done}


def test_the_average(monkeypatch):
    """Half of it is gone after 10,000 images."""
    betas = []
    monkeypatch.setattr(stylegan, "move_average", lambda average, G, beta: betas.append(beta))
    train("stylegan", "run", "--steps", 1)
    assert betas == [pytest.approx(0.5 ** (4 / 10_000))]
