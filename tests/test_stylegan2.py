"""stylegan2.py: each part against the paper's own form, the lazy penalty, the average, and one
picture."""

import copy
import math
import shutil

import pytest
import torch
from helpers import (
    SCRIPTS,
    changed,
    checkpoint,
    log_rows,
    open_script,
    recorded,
    snapshot,
    train,
)
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d

import runs
import stylegan2

FILTER = torch.outer(*2 * [torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8])


@pytest.mark.parametrize("up", [False, True])
def test_modulation_is_that_of_the_paper(up):
    """Scaled and demodulated weights for each image, as one grouped convolution: eqs. 1 and 3."""
    torch.manual_seed(0)
    conv = stylegan2.ModulatedConv(6, 5, 3, w_dim=4, up=up)
    x, w = torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    s = conv.affine(w)
    weight = conv.weight / (6 * 9) ** 0.5
    weight = weight[None] * s[:, None, :, None, None]  # (N, out, in, 3, 3)
    weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    flat = x.reshape(1, 18, 8, 8)
    if up:
        weight = weight.transpose(1, 2).reshape(18, 5, 3, 3)
        y = conv_transpose2d(flat, weight, stride=2, groups=3)
        expected = conv2d(y, 4 * FILTER.expand(15, 1, 4, 4), padding=1, groups=15)
    else:
        expected = conv2d(flat, weight.reshape(15, 6, 3, 3), padding=1, groups=3)
    assert torch.allclose(conv(x, w), expected.reshape(3, 5, *expected.shape[2:]), atol=1e-5)


def test_without_demodulation():
    x, w = torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    plain = stylegan2.ModulatedConv(6, 3, 1, w_dim=4, demodulate=False)
    s = plain.affine(w)
    weight = plain.weight[None] / 6**0.5 * s[:, None, :, None, None]
    expected = conv2d(x.reshape(1, 18, 8, 8), weight.reshape(9, 6, 1, 1), groups=3)
    assert torch.allclose(plain(x, w), expected.reshape(3, 3, 8, 8), atol=1e-5)


def test_pictures_of_all_sizes_are_added():
    """Each enlarged: their biases alone are 1, 2 and 3. A style decides how much a size adds."""
    G = stylegan2.Generator(6, 8, 3, 16)
    for k, to_rgb in enumerate(G.to_rgb):
        nn.init.zeros_(to_rgb.conv.weight)
        nn.init.constant_(to_rgb.bias, k + 1)
    inside = G(torch.randn(2, 6))[:, :, 4:-4, 4:-4]
    assert torch.allclose(inside, torch.tensor(6.0), atol=1e-4)

    to_rgb, x, w = stylegan2.ToRGB(4, 3, 6), torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    y = to_rgb(x, w)
    with torch.no_grad():
        to_rgb.conv.affine.weight *= 2
        to_rgb.conv.affine.bias *= 2
    assert torch.allclose(to_rgb(x, w), 2 * y, atol=1e-5)


def test_each_layer_has_its_style():
    G = stylegan2.Generator(6, 8, 3, 16)
    seen = {}
    for name, m in G.named_modules():
        if isinstance(m, (stylegan2.Layer, stylegan2.ToRGB)):
            m.register_forward_hook(
                lambda m, inputs, out, name=name: seen.update({name: inputs[1][0, 0].item()})
            )
    G.synthesise(torch.arange(6.0)[None, :, None].expand(2, -1, 6))
    assert [seen[f"layers.{k}"] for k in range(5)] == [0, 1, 2, 3, 4]
    assert [seen[f"to_rgb.{k}"] for k in range(3)] == [1, 3, 5]


def test_filters():
    """The blur is a convolution with [1, 3, 3, 1] / 8 in both directions; enlarging is the
    transposed one, with a step of 2."""
    x = torch.randn(2, 3, 8, 8)
    kernel = FILTER.expand(3, 1, 4, 4)
    for padding in (1, 2):
        expected = conv2d(x, kernel, padding=padding, groups=3)
        assert torch.allclose(stylegan2.blur(x, padding), expected, atol=1e-6)
    doubled = conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=3)
    assert torch.allclose(stylegan2.enlarge(x), doubled, atol=1e-6)


def test_noise():
    """None at strength 0, which is where it starts; another for each image, and a constant one in
    evaluation mode."""
    layer = stylegan2.Layer(4, 4, 8, 6)
    x, w = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.randn(1, 6).expand(2, -1)
    assert layer.noise_strength.item() == 0
    assert torch.equal(layer(x, w), layer(x, w))
    nn.init.constant_(layer.noise_strength, 0.5)
    first, second = layer(x, w), layer(x, w)
    assert not torch.allclose(first, second) and not torch.allclose(first[0], first[1])
    nn.init.zeros_(layer.conv.weight)
    alone = layer(x, w)
    assert torch.equal(alone[:, 0], alone[:, 1]), "the same in all channels"
    layer.eval()
    assert torch.equal(layer(x, w), layer(x, w)) and torch.allclose(layer(x, w)[0], layer(x, w)[1])


def test_activation():
    y = stylegan2.activate(torch.tensor([-1.0, 2.0]))
    assert y.tolist() == pytest.approx([-0.2 * 2**0.5, 2 * 2**0.5])


def test_equalised_layers():
    linear = stylegan2.Linear(100, 50, bias=1.0, rate=0.01)
    assert linear.weight.std().item() == pytest.approx(100, rel=0.05)
    y = linear(torch.randn(2000, 100))
    assert y.std().item() == pytest.approx(1, rel=0.05)
    assert y.mean().item() == pytest.approx(0.01, abs=0.03), "the bias learns slowly as well"
    conv = stylegan2.Conv(32, 16, 3)
    assert conv.weight.std().item() == pytest.approx(1, rel=0.05)
    assert conv(torch.randn(16, 32, 16, 16)).std().item() == pytest.approx(1, rel=0.1)
    down = stylegan2.Conv(32, 16, 3, down=True)
    assert down(torch.randn(2, 32, 16, 16)).shape == (2, 16, 8, 8)
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(2, 32, 16, 16)
    assert down(stripes)[:, :, 2:-2, 2:-2].abs().max() < 1e-5, "the blur takes them away"
    assert stylegan2.ModulatedConv(4, 4, 3, 6).affine.bias.tolist() == [1.0] * 4


def test_mapping_normalises_z():
    mapping, z = stylegan2.Mapping(8), torch.randn(5, 8)
    assert mapping.first.rate == mapping.second.rate == 0.01
    assert torch.allclose(mapping(z), mapping(3 * z), atol=1e-5)


def test_channels():
    """64 width / size, at most 512."""
    sizes = (4, 8, 16, 32, 64, 128, 256)
    expected = [512, 512, 512, 512, 512, 256, 128]
    assert [stylegan2.channels_at(size, 512) for size in sizes] == expected
    expected = [128, 64, 32, 16, 8, 4, 2]
    assert [stylegan2.channels_at(size, 8) for size in sizes] == expected


def test_minibatch_deviation():
    """One number for each group, as one more channel."""

    def deviation(x, group):
        return stylegan2.MinibatchDeviation(group)(x)[:, 3:]

    x = torch.randn(6, 3, 4, 4)
    assert torch.equal(stylegan2.MinibatchDeviation(3)(x)[:, :3], x)
    y = deviation(x, group=3)
    assert y.shape == (6, 1, 4, 4)
    for first in (0, 1):
        members = x[[first, first + 2, first + 4]]
        expected = members.std(0, correction=0).mean().item()
        for i in (first, first + 2, first + 4):
            assert y[i].flatten().tolist() == pytest.approx([expected] * 16, rel=1e-4)
    whole = x.std(0, correction=0).mean()
    assert torch.allclose(deviation(x, group=math.inf), whole.expand(6, 1, 4, 4), rtol=1e-4)
    assert deviation(torch.zeros(4, 3, 4, 4), group=32).abs().max() < 1e-3
    x = torch.randn(7, 3, 4, 4)
    whole = deviation(x, group=4)
    assert torch.allclose(whole, torch.full_like(whole, 1e-4), atol=1e-5), "7 has no group of 4"


def test_D_compares_the_images_of_a_batch():
    D = stylegan2.Discriminator(8, 3, 16)
    x = torch.randn(3, 3, 16, 16)
    assert not torch.allclose(D(x[[0, 1]])[0], D(x[[0, 2]])[0])


def test_lazy_adam():
    """Rate times c and betas to the c: c = 16/17 for D, 4/5 for G."""
    run = open_script("stylegan2", "--lr", 0.01, "--beta1", 0.5, "--beta2", 0.9)
    for opt, c in ((run.opt_D, 16 / 17), (run.opt_G, 4 / 5)):
        group = opt.param_groups[0]
        assert group["lr"] == pytest.approx(0.01 * c)
        assert group["betas"] == pytest.approx((0.5**c, 0.9**c))


def test_the_average_has_a_half_life_in_images(monkeypatch):
    """5% of the images seen, or 500,000."""
    betas = []
    monkeypatch.setattr(stylegan2, "move_average", lambda average, G, beta: betas.append(beta))
    train("stylegan2", "run", "--steps", 3, "--batch-size", 4)
    assert betas == pytest.approx([0.5 ** (4 / (0.05 * seen)) for seen in (4, 8, 12)])
    # At a step after which 500,000 images are fewer than 5% of those seen.
    monkeypatch.setattr(runs, "steps", lambda args, done: [9_999_999])
    train("stylegan2", "late", "--batch-size", 4)
    assert betas[3] == pytest.approx(0.5 ** (4 / 500_000), rel=1e-9)


def test_the_update_of_R1(monkeypatch):
    """An update of D with the gradient of 16 gamma / 2 times the penalty at real images."""
    run, gradients = open_script("stylegan2", "--r1", 3), []
    weights = list(run.D.parameters())
    g_before, d_before = snapshot(run.G), copy.deepcopy(run.D)
    run.opt_D.register_step_pre_hook(lambda *_: gradients.extend(w.grad for w in weights))
    real = recorded(monkeypatch, "sample_batch")
    run.update_r1()
    assert not changed(run.G, g_before) and changed(run.D, dict(d_before.named_parameters()))
    x_real = real[0][0].detach().requires_grad_()
    penalty = 16 * 3 / 2 * stylegan2.r1_penalty(d_before(x_real), x_real)
    expected = torch.autograd.grad(penalty, list(d_before.parameters()), allow_unused=True)
    for ours, wanted in zip(gradients, expected, strict=True):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.allclose(ours, wanted, rtol=1e-3, atol=1e-6)


def test_the_penalty_comes_after_every_16th_update(monkeypatch):
    """Here after every 4th, with a minibatch of its own. --r1 0 leaves it out."""
    assert stylegan2.R1_EVERY == 16
    monkeypatch.setattr(stylegan2, "R1_EVERY", 4)
    penalties = recorded(monkeypatch, "r1_penalty", stylegan2)
    real, batches, r1_penalty = recorded(monkeypatch, "sample_batch"), [], stylegan2.r1_penalty
    monkeypatch.setattr(
        stylegan2, "r1_penalty", lambda *args: batches.append(len(real)) or r1_penalty(*args)
    )
    train("stylegan2", "run", "--steps", 9)
    assert batches == [5, 10]
    assert log_rows("run")[0]["r1"] == pytest.approx(penalties[0].item(), rel=1e-4)
    assert checkpoint("run")["state"]["r1"].item() == penalties[1].item(), "the last one is kept"
    train("stylegan2", "without", "--steps", 9, "--r1", 0)
    assert batches == [5, 10]


@pytest.mark.parametrize(
    "name, last_bias", [("stylegan", "mapping.net.14.bias"), ("stylegan2", "mapping.second.bias")]
)
def test_truncation(name, last_bias, monkeypatch):
    """w = mean + truncation (w - mean), with the average of G and its mapping, which differs here
    from that of G."""
    module = SCRIPTS[name]
    train(name, "run", "--steps", 6, "--lr", 0.02)
    saved = checkpoint("run")
    saved["state"]["average"][last_bias] += 100
    torch.save(saved, "run/checkpoint.pt")
    average = copy.deepcopy(open_script(name).G).eval()
    average.load_state_dict(saved["state"]["average"])

    used, synthesise = [], module.Generator.synthesise
    monkeypatch.setattr(
        module.Generator,
        "synthesise",
        lambda G, w, *stage: used.append(w) or synthesise(G, w, *stage),
    )
    mapped = recorded(monkeypatch, "forward", module.Mapping)
    for truncation in (0, 0.5, 1):
        flags = f"--out-dir run --device cpu --generate 4 --seed 3 --truncation {truncation}"
        module.main(flags.split())
        shutil.rmtree("run/generated")
    none, half, whole = used
    assert torch.allclose(whole, mapped[-1], atol=1e-4)
    with torch.no_grad():
        mean_w = average.mapping(torch.randn(10_000, 6)).mean(0)
    assert torch.allclose(none, mean_w.expand(4, -1), atol=0.05)
    assert torch.allclose(half, (none + whole) / 2, atol=1e-4)
    assert whole.std(0).max() > 0.1
