"""stacked_gan.py: its encoder, the losses of both levels, the joint phase, and two pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    open_script,
    picture,
    picture_folder,
    recorded,
    same,
    snapshot,
    train,
)
from PIL import Image
from torch import nn

import stacked_gan


def watched(run):
    """A list to which every later call of E, G1, G0, D1 and D0 adds (name, inputs, output)."""
    calls = []
    for name in ("E", "G1", "G0", "D1", "D0"):
        getattr(run, name).register_forward_hook(
            lambda m, inputs, output, name=name: calls.append((name, inputs, output))
        )
    return calls


def found(calls, name):
    """The (inputs, output) of each call of `name`."""
    return [(inputs, output) for called, inputs, output in calls if called == name]


def open_stacked(joint):
    """An opened script in one of the phases, with weights of D1, D0 and E that are large enough for
    each input to give another output."""
    run = open_script("stacked_gan", "--entropy-weight", 7)
    run.joint.fill_(joint)
    with torch.no_grad():
        for w in (*run.D1.parameters(), *run.D0.parameters(), *run.E.parameters()):
            w.mul_(4)
    return run


def test_losses_of_equal_scores():
    """Cross entropy at logits of 0 is log 2, and D's loss is the mean of two."""
    zero = torch.zeros(4)
    assert stacked_gan.d_loss(zero, zero).item() == pytest.approx(np.log(2))
    assert stacked_gan.g_loss(zero).item() == pytest.approx(np.log(2))
    assert stacked_gan.d_loss(zero + 2, zero - 3).item() == pytest.approx(
        (np.log1p(np.exp(-2)) + np.log1p(np.exp(-3))) / 2
    )
    a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0], [3, 1]])
    assert stacked_gan.feature_loss(a, b).item() == pytest.approx(13 / 4)
    assert stacked_gan.entropy_loss(a, b).item() == pytest.approx(13 / 4)
    logits = torch.zeros(2, 5)
    assert stacked_gan.label_loss(logits, torch.tensor([0, 4])).item() == pytest.approx(np.log(5))


@pytest.mark.parametrize("image_size, channels", [(16, 3), (32, 1), (64, 3)])
def test_networks(image_size, channels):
    E = stacked_gan.Encoder(8, channels, image_size, 5)
    G1 = stacked_gan.FeatureGenerator(6, 8, 5)
    G0 = stacked_gan.ImageGenerator(6, 8, channels, image_size)
    D1 = stacked_gan.FeatureDiscriminator(6, 8)
    D0 = stacked_gan.ImageDiscriminator(6, 8, channels, image_size)
    h = G1(torch.rand(4, 6), torch.arange(4))
    x = G0(torch.rand(4, 6), h)
    assert h.shape == (4, 32) and (h >= 0).all()
    assert x.shape == (4, channels, image_size, image_size) and x.abs().max() <= 1
    assert E(x).shape == h.shape and E.classify(h).shape == (4, 5)
    for score, z in (D1(h), D0(x)):
        assert score.shape == (4,) and z.shape == (4, 6)
        assert (z > 0).all() and (z < 1).all()


def test_the_published_sizes():
    """Parameters of the authors' MNIST networks: G1, D1 with Q1, and D0 with Q0."""

    def size(network):
        return sum(p.numel() for p in network.parameters())

    # Without the biases before batch norm, which has its own; 2 * 2 * 512 are those of batch norm.
    g1 = 60 * 512 + 512 * 512 + 512 * 256 + 256 + 2 * 2 * 512
    assert size(stacked_gan.FeatureGenerator(50, 64, 10)) == g1
    d1 = 2 * (256 * 256 + 256) + 257 + 256 * 50 + 50
    assert size(stacked_gan.FeatureDiscriminator(50, 64)) == d1
    convs = 25 * (32 + 32 * 64 + 64 * 128) + 32 + 64 + 128
    d0 = convs + 2048 * 256 + 256 + 257 + 256 * 50 + 50
    assert size(stacked_gan.ImageDiscriminator(50, 64, 1, 32)) == d0


@pytest.mark.parametrize("joint", [False, True])
def test_the_losses_of_an_update(joint, monkeypatch):
    """D1 and D0: each with the error of the noise that its own Q recovers from fakes. G1: its D,
    the label and the noise. G0: its D, the features that it got, and the noise. G0 draws from E's
    features, in the joint phase from G1's."""
    run, real = open_stacked(joint), recorded(monkeypatch, "sample_batch")
    calls, before = watched(run), snapshot(run.E)
    values = {name: value.item() for name, value in run.update().items()}
    ((x_real, y),) = real

    h_real = found(calls, "E")[0][1]
    ((z1, y1), h1), ((z1_G, y1_G), h1_G) = found(calls, "G1")
    ((z0, h), x_fake), ((z0_G, h_G), x_fake_G) = found(calls, "G0")
    assert torch.equal(y1, y) and torch.equal(y1_G, y)
    assert torch.equal(h, h1_G if joint else h_real) and h_G is h
    assert not h.requires_grad, "G1 never learns from G0"
    noise = [z1, z1_G, z0, z0_G]
    assert all(z.shape == (4, 6) and z.min() >= 0 and z.max() < 1 for z in noise)
    assert len({tuple(z.flatten().tolist()) for z in noise}) == 4, "noise was used twice"

    for k, x, fake, z in ((1, h_real, h1, z1), (0, x_real, x_fake, z0)):
        (real_in, (d_real, _)), (fake_in, (d_fake, z_recovered)), *_ = found(calls, f"D{k}")
        assert torch.equal(real_in[0], x) and torch.equal(fake_in[0], fake)
        expected = stacked_gan.d_loss(d_real, d_fake) + 7 * (z_recovered - z).square().mean()
        assert values[f"loss_D{k}"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["d_real"] == pytest.approx(d_real.mean().item(), abs=1e-6)
    assert values["d_fake"] == pytest.approx(d_fake.mean().item(), abs=1e-6)

    h_fake = found(calls, "E")[-1][1]
    conditions = [
        (1, h1_G, z1_G, nn.functional.cross_entropy(run.E.classify(h1_G), y), "loss_label"),
        (0, x_fake_G, z0_G, (h_fake - h).square().mean(), "loss_feature"),
    ]
    for k, fake, z, condition, name in conditions:
        (fake_in,), (d_fake, z_recovered) = found(calls, f"D{k}")[-1]
        assert fake_in is fake
        entropy = (z_recovered - z).square().mean()
        expected = stacked_gan.g_loss(d_fake) + condition + 7 * entropy
        assert values[f"loss_G{k}"] == pytest.approx(expected.item(), rel=1e-5)
        assert values[name] == pytest.approx(condition.item(), rel=1e-5)
        assert values[f"loss_z{k}"] == pytest.approx(entropy.item(), rel=1e-5)
    assert same(snapshot(run.E), before) and not any(p.requires_grad for p in run.E.parameters())


def test_the_phases(monkeypatch):
    """E alone learns at first, and never again; then n_gen updates of each G for one of its D, on
    one minibatch; and G0 gets G1's features from --joint-from on."""
    events, real = [], recorded(monkeypatch, "sample_batch")
    step = torch.optim.Adam.step
    optimisers, joints, where = [], [], torch.where

    def watched_step(self, *args):
        if self not in optimisers:
            optimisers.append(self)
        events.append(optimisers.index(self))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr(torch, "where", lambda c, *a: joints.append(c.item()) or where(c, *a))
    flags = ["--encoder-steps", 3, "--n-gen", 2, "--joint-from", 2, "--steps", 3]
    train("stacked_gan", "run", *flags, "--log-every", 1)
    E, D1, G1, D0, G0 = range(5)
    assert events == [E] * 3 + [D1, G1, G1, D0, G0, G0] * 3
    assert joints == [False, True, True]
    assert len(real) == 3 + 100 + 3, "one minibatch for each update, and 100 for E's accuracy"
    assert all(opt.param_groups[0]["eps"] == 1e-4 for opt in optimisers[1:])


def test_each_G_draws_from_its_own_noise():
    run = open_script("stacked_gan")
    calls = watched(run)
    z1, z0, y = run.noise(3), run.noise(3), torch.arange(3)
    x = run.sample((z1, z0), y)
    ((inputs, h),), ((inputs_0, x_0),) = found(calls, "G1"), found(calls, "G0")
    assert inputs[0] is z1 and inputs[1] is y
    assert inputs_0[0] is z0 and inputs_0[1] is h and x_0 is x


def test_learns_two_pictures(capsys):
    """One for each label, and E tells the two apart."""
    data, run = picture_folder(Path("pictures"), (0, 1), classes=True), "--out-dir run --device cpu"
    quick = "--image-size 32 --batch-size 8 --width 16 --z-dim 6 --lr 2e-3 --encoder-steps 100"
    quick = f"{quick} --joint-from 1 --steps 200 --save-every 1000"
    stacked_gan.main(f"--dataset {data} {quick} {run}".split())
    assert "E classifies 100.0% of the training images correctly" in capsys.readouterr().err
    for label in (0, 1):
        stacked_gan.main(f"--generate 4 --label class{label} {run}".split())
    for folder in ("generated", "generated-2"):
        for file in Path("run", folder).iterdir():
            image, kind = np.asarray(Image.open(file), float), int(file.stem.endswith("class1"))
            assert kind == (folder == "generated-2")
            distance = [np.abs(image - picture(k, 32)).mean() for k in (kind, 1 - kind)]
            assert distance[0] < 45 and distance[0] < distance[1], f"{file}: {distance}"
