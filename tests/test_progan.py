"""progan.py: growing, its layers by hand, the penalty, and one picture through all stages."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    checkpoint,
    killed_after_save,
    open_script,
    recorded,
    same,
    train,
)
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

import progan
import wgan_gp


def test_stages():
    """Each trains for 10 steps, and the next one fades in for 10, linearly."""
    expected = {1: (0, None), 10: (0, None), 11: (1, 0), 12: (1, 0.1), 20: (1, 0.9), 21: (1, None)}
    expected |= {30: (1, None), 31: (2, 0), 40: (2, 0.9), 41: (2, None), 1000: (2, None)}
    for step, stage_and_fade in expected.items():
        assert progan.stage_and_fade(step, 10, 16) == pytest.approx(stage_and_fade)
    assert progan.stage_and_fade(1, 0, 16) == (2, None), "without growing"


def test_a_fade_begins_with_the_networks_of_the_stage_before():
    torch.manual_seed(0)
    G, D = progan.Generator(6, 8, 3, 16), progan.Discriminator(8, 3, 16)
    z = torch.randn(4, 6)
    for stage in (1, 2):
        size = 4 * 2**stage
        small, image = G(z, stage - 1), G(z, stage, 0.0)
        assert image.shape == (4, 3, size, size)
        assert torch.allclose(image, interpolate(small, scale_factor=2), atol=1e-6)
        x = torch.randn(4, 3, size, size)
        expected = D(avg_pool2d(x, 2), stage - 1)
        assert torch.allclose(D(x, stage, 0.0), expected, atol=1e-5)


def test_a_fade_goes_on_evenly_and_ends_without_the_stage_before():
    torch.manual_seed(0)
    G, D = progan.Generator(6, 8, 3, 16), progan.Discriminator(8, 3, 16)
    z, x = torch.randn(4, 6), torch.randn(4, 3, 16, 16)
    start, middle, end = (G(z, 2, fade) for fade in (0.0, 0.5, None))
    assert torch.allclose(middle, (start + end) / 2, atol=1e-5)
    assert torch.allclose(G(z, 2, 1 - 1e-6), end, atol=1e-4)
    assert torch.allclose(D(x, 2, 1 - 1e-6), D(x, 2), atol=1e-4)
    assert not torch.allclose(D(x, 2, 0.5), D(x, 2), atol=1e-3)
    G(z, 2).sum().backward()
    assert G.to_rgb[1].weight.grad is None and G.to_rgb[2].weight.grad is not None


def test_real_images_fade_too():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    x = interpolate(x, scale_factor=2)  # 8x8, pairs of equal pixels
    assert torch.equal(progan.reals_at(x, 0, None), x[:, :, ::2, ::2])
    assert torch.equal(progan.reals_at(x, 1, None), x)
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 0, 0] = 8
    faded = progan.reals_at(x, 1, 0.25)[0, 0]
    assert faded[0, :3].tolist() == [0.75 * 2 + 0.25 * 8, 0.75 * 2, 0]
    assert faded[1, :2].tolist() == [0.75 * 2, 0.75 * 2]


@pytest.mark.parametrize("name", ["progan", "stylegan"])
def test_all_that_D_sees_is_at_the_stage_and_fade_of_the_update(name, monkeypatch):
    """Real images, fakes, and the images of progan.py's penalty."""
    run, seen = open_script(name), []
    batches = recorded(monkeypatch, "sample_batch")

    def watch(module, inputs, named_inputs, output):
        seen.append((*inputs, *named_inputs.values()))

    run.D.register_forward_hook(watch, with_kwargs=True)
    run.update(2, 0.25)
    assert torch.equal(seen[0][0], progan.reals_at(batches[0][0], 2, 0.25))
    assert [part[1:] for part in seen] == [(2, 0.25)] * (4 if name == "progan" else 3)


def test_layers():
    linear, conv = progan.Linear(100, 50), progan.Conv(32, 16, 3, gain=1.0)
    for layer in (linear, conv):
        assert layer.weight.std().item() == pytest.approx(1, rel=0.05)
        assert not layer.bias.any()
    x = torch.randn(2000, 100)
    assert torch.allclose(linear(x), (2 / 100) ** 0.5 * x @ linear.weight.T, atol=1e-4)
    assert conv(torch.randn(16, 32, 16, 16)).std().item() == pytest.approx(1, rel=0.1)
    x = torch.randn(2, 5, 3, 3)
    expected = x / (x.pow(2).sum(1, keepdim=True) / 5).sqrt()
    assert torch.allclose(progan.PixelNorm()(x), expected, atol=1e-5)
    assert progan.PixelNorm()(torch.zeros(2, 5)).isfinite().all()


def test_networks():
    """Pixel norm in G alone, after every convolution and on z; nothing bounds the images."""
    torch.manual_seed(0)
    G, D = progan.Generator(6, 8, 3, 32), progan.Discriminator(8, 3, 32)
    z = torch.randn(4, 6)
    assert torch.allclose(G(z, 3), G(5 * z, 3), atol=1e-4)
    norms = [sum(isinstance(m, progan.PixelNorm) for m in net.modules()) for net in (G, D)]
    assert norms == [9, 0]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in D.modules())
    assert G(z, 3).shape == (4, 3, 32, 32) and D(G(z, 3), 3).shape == (4,)
    channels = [progan.channels_at(size, 128) for size in (4, 8, 16, 32, 64)]
    assert channels == [128, 128, 128, 128, 64]
    # The first layer has the gain of a 4x4 convolution.
    _, first, *_ = G.blocks[0]
    noise = progan.PixelNorm()(torch.randn(2000, 6))
    assert first(noise).std().item() == pytest.approx(2**0.5 / 4, rel=0.1)
    with torch.no_grad():
        G.to_rgb[3].bias += 5
    assert G(z, 3).max() > 4


def test_D_compares_the_images_of_a_batch():
    """All of them."""
    D = progan.Discriminator(8, 3, 16)
    assert D.blocks[0][0].group == math.inf
    x = torch.randn(3, 3, 16, 16)
    assert not torch.allclose(D(x[[0, 1]], 2)[0], D(x[[0, 2]], 2)[0])


def test_gradient_penalty():
    """(||w|| - gamma)^2 / gamma^2 for D(x) = wx."""
    gamma = 750.0
    w = torch.randn(3 * 16 * 16)
    x_real, x_fake = torch.randn(5, 3, 16, 16), torch.randn(5, 3, 16, 16)
    penalty = progan.gradient_penalty(lambda x: x.flatten(1) @ w, x_real, x_fake, gamma)
    assert penalty.item() == pytest.approx((w.norm().item() / gamma - 1) ** 2, rel=1e-4)


def test_gradient_penalty_with_gamma_1_is_that_of_wgan_gp():
    """Of a D that is not linear, with its gradient, from the same random numbers."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Softplus(), nn.Linear(8, 1))
    x_real, x_fake = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    results = []
    for penalty, gamma in ((progan.gradient_penalty, [1.0]), (wgan_gp.gradient_penalty, [])):
        torch.manual_seed(0)
        value = penalty(lambda x: D(x).flatten(), x_real, x_fake, *gamma)
        results.append((value, torch.autograd.grad(value, D[1].weight)[0]))
    assert torch.allclose(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])


def test_the_loss_of_D(monkeypatch):
    """The loss, the weighted penalty, and the one on scores of real images; real and fake images
    never share a batch, whose statistic would tell them apart."""
    flags = ["--stage-steps", 0, "--gamma", 1500, "--gp-weight", 7]
    run, scores = open_script("progan", *flags), []
    images, penalised = [], []

    def penalty(D, x_real, x_fake, gamma):
        penalised.extend([x_real, x_fake])
        return torch.tensor(gamma / 750)

    def watch(module, inputs, output):
        images.append(inputs[0])
        scores.append(output.detach())

    monkeypatch.setattr(progan, "gradient_penalty", penalty)
    run.D.register_forward_hook(watch)
    with torch.no_grad():
        run.D.blocks[0][-1].weight *= 50
        run.D.blocks[0][-1].bias += 100
    loss_D = run.update(2, None)["loss_D"]
    assert penalised[0] is images[0] and penalised[1] is images[1]
    real, fake, _ = scores
    expected = fake.mean() - real.mean() + 7 * 2 + 0.001 * real.square().mean()
    assert loss_D.item() == pytest.approx(expected.item(), rel=1e-4)
    assert real.square().mean() > 1000 and [len(part) for part in scores] == [4, 4, 4]


def test_adam_starts_anew_with_each_part_of_a_stage():
    """With 3 steps each, at steps 4, 7, 10 and 13 of 16 pixels."""
    flags = ["--save-every", 1, "--keep-checkpoints"]
    train("progan", "run", "--stage-steps", 3, "--steps", 17, *flags)
    for steps, done in ((3, 3), (4, 1), (8, 2), (15, 3), (17, 5)):
        saved = checkpoint(f"run/step-{steps:06d}")["state"]
        for opt in ("opt_D", "opt_G"):
            counts = {int(s["step"]) for s in saved[opt]["state"].values()}
            assert counts == {done}


def test_the_average():
    """It moves by a thousandth of the way in each step."""
    before = open_script("progan").G.state_dict()
    train("progan", "run", "--steps", 1, "--lr", 1)
    saved = checkpoint("run")["state"]
    for name, average in saved["average"].items():
        expected = 0.999 * before[name] + 0.001 * saved["G"][name]
        assert torch.allclose(average, expected, atol=1e-6)
    assert not same(saved["average"], dict(before))


def test_generate_draws_at_the_stage_of_the_run():
    """Also of one that was stopped in its first stage, whose pixels are repeated 4 times."""
    with killed_after_save(5):
        train("progan", "small", "--stage-steps", 10, "--steps", 100)
    progan.main(["--out-dir", "small", "--device", "cpu", "--generate", "1"])
    image = np.asarray(Image.open("small/generated/000000.png"), int)
    assert (image == image[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
    train("progan", "run", "--stage-steps", 1, "--steps", 6)
    progan.main(["--out-dir", "run", "--device", "cpu", "--generate", "1"])
    image = np.asarray(Image.open("run/generated/000000.png"), int)
    assert image.shape == (16, 16, 3)
    assert (image[::4] != image[1::4]).any(), "more than 4 rows"
