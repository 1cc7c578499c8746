"""stacked_gan.py: its encoder, the losses of both levels, the joint phase, and two pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    checkpoint,
    log_rows,
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

import common
import stacked_gan


def watched(run):
    """A list to which every later call of a part of G, D and E adds (name, inputs, output)."""
    calls = []

    def watch(network, name):
        method = getattr(network, name)

        def watched_method(*inputs):
            output = method(*inputs)
            calls.append((f"{type(network).__name__}.{name}", inputs, output))
            return output

        setattr(network, name, watched_method)

    for network in (run.G, run.D):
        watch(network, "features")
        watch(network, "images")
    watch(run.E, "forward")
    return calls


def found(calls, name):
    """The (inputs, output) of each call of `name`."""
    return [(inputs, output) for called, inputs, output in calls if called == name]


def open_stacked(joint):
    """An opened script in one of the phases, with weights of D and E that are large enough for
    each input to give another output."""
    run = open_script("stacked_gan", "--entropy-weight", 7)
    run.joint.fill_(joint)
    with torch.no_grad():
        for w in (*run.D.parameters(), *run.E.parameters()):
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
    G = stacked_gan.Generator(6, 8, channels, image_size, 5)
    D = stacked_gan.Discriminator(6, 8, channels, image_size)
    y = torch.arange(4)
    h = G.features(torch.rand(4, 6), y)
    x = G.images(torch.rand(4, 6), h)
    assert h.shape == (4, 32) and (h >= 0).all()
    assert x.shape == (4, channels, image_size, image_size) and x.abs().max() <= 1
    assert E(x).shape == h.shape and E.classify(h).shape == (4, 5)
    for score, z in (D.features(h), D.images(x)):
        assert score.shape == (4,) and z.shape == (4, 6)
        assert (z > 0).all() and (z < 1).all()


def test_the_published_sizes():
    """Parameters of the authors' MNIST networks: G1, D1 with Q1, and D0 with Q0."""
    G, D = stacked_gan.Generator(50, 64, 1, 32, 10), stacked_gan.Discriminator(50, 64, 1, 32)
    # Without the biases before batch norm, which has its own; 2 * 2 * 512 are those of batch norm.
    g1 = 60 * 512 + 512 * 512 + 512 * 256 + 256 + 2 * 2 * 512
    assert sum(p.numel() for p in G.g1.parameters()) == g1
    d1 = [*D.d1.parameters(), *D.score1.parameters(), *D.q1.parameters()]
    assert sum(p.numel() for p in d1) == 2 * (256 * 256 + 256) + 257 + 256 * 50 + 50
    d0 = [*D.d0.parameters(), *D.score0.parameters(), *D.q0.parameters()]
    convs = 25 * (32 + 32 * 64 + 64 * 128) + 32 + 64 + 128
    assert sum(p.numel() for p in d0) == convs + 2048 * 256 + 256 + 257 + 256 * 50 + 50


@pytest.mark.parametrize("joint", [False, True])
def test_d_step(joint):
    """The losses of D1 and D0, each with the error of the noise that its own Q recovers from
    fakes. G0 draws from E's features, in the joint phase from G1's."""
    run = open_stacked(joint)
    x_real, y = common.sample_batch(run.args, run.data)
    calls, before = watched(run), snapshot(run.E)
    loss_D, d_real, d_fake = run.d_step(x_real, y)

    ((_, h_real),) = found(calls, "Encoder.forward")
    (((z1, labels), h_fake),) = found(calls, "Generator.features")
    (((z0, h), x_fake),) = found(calls, "Generator.images")
    assert torch.equal(labels, y) and torch.equal(h, h_fake if joint else h_real)
    assert not torch.equal(h_fake, h_real) and not torch.equal(z0, z1)
    for z in (z0, z1):
        assert z.shape == (4, 6) and z.min() >= 0 and z.max() < 1

    expected = 0
    for part, real, fake, z in (("features", h_real, h_fake, z1), ("images", x_real, x_fake, z0)):
        (real_in, (real_score, _)), (fake_in, (fake_score, z_recovered)) = found(
            calls, f"Discriminator.{part}"
        )
        assert torch.equal(real_in[0], real) and torch.equal(fake_in[0], fake)
        loss = stacked_gan.d_loss(real_score, fake_score)
        expected += loss + 7 * (z_recovered - z).square().mean()
    assert loss_D.item() == pytest.approx(expected.item(), rel=1e-5)
    assert d_real.item() == pytest.approx(real_score.mean().item(), abs=1e-6)
    assert d_fake.item() == pytest.approx(fake_score.mean().item(), abs=1e-6)
    assert same(snapshot(run.E), before)


@pytest.mark.parametrize("joint", [False, True])
def test_g_step(joint):
    """G1: its D, the label and the noise; G0: its D, the features that it got, and the noise."""
    run = open_stacked(joint)
    x_real, y = common.sample_batch(run.args, run.data)
    calls, before = watched(run), snapshot(run.E)
    loss_G, parts = run.g_step(x_real, y)

    (((z1, labels), h_fake),) = found(calls, "Generator.features")
    (((z0, h), x_fake),) = found(calls, "Generator.images")
    images = {id(x): h for (x,), h in found(calls, "Encoder.forward")}
    assert torch.equal(labels, y)
    assert torch.equal(h, h_fake if joint else images[id(x_real)])
    assert not h.requires_grad, "the features that G0 gets are data"

    ((h_in, (d1, z1_recovered)),) = found(calls, "Discriminator.features")
    ((x_in, (d0, z0_recovered)),) = found(calls, "Discriminator.images")
    assert h_in[0] is h_fake and x_in[0] is x_fake
    loss_label = nn.functional.cross_entropy(run.E.classify(h_fake), y)
    loss_feature = (images[id(x_fake)] - h).square().mean()
    loss_z1, loss_z0 = (z1_recovered - z1).square().mean(), (z0_recovered - z0).square().mean()
    expected = stacked_gan.g_loss(d1) + loss_label + 7 * loss_z1
    expected = expected + stacked_gan.g_loss(d0) + loss_feature + 7 * loss_z0
    assert loss_G.item() == pytest.approx(expected.item(), rel=1e-5)
    values = [loss_label, loss_feature, loss_z1, loss_z0]
    for value, theirs in zip(parts.values(), values, strict=True):
        assert value.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert same(snapshot(run.E), before) and all(p.grad is None for p in run.E.parameters())


def test_g1_does_not_learn_from_g0():
    """Its gradient is the same in both phases, in which G0 draws other images."""
    run, gradients = open_script("stacked_gan"), []
    weights = {"G": run.G.state_dict(), "D": run.D.state_dict()}
    weights = {k: {name: w.clone() for name, w in part.items()} for k, part in weights.items()}
    x_real, y = common.sample_batch(run.args, run.data)
    for joint in (False, True):
        run.G.load_state_dict(weights["G"])
        run.joint.fill_(joint)
        torch.manual_seed(0)
        run.g_step(x_real, y)
        parts = (run.G.g1, run.G.g0)
        gradients.append([[p.grad.clone() for p in part.parameters()] for part in parts])
    (g1, g0), (g1_joint, g0_joint) = gradients
    assert same(g1, g1_joint) and not same(g0, g0_joint)


def test_the_phases(monkeypatch):
    """E alone learns in the first steps, and never again; then n_gen updates of G for each of D,
    on one minibatch; and G0 gets G1's features from --joint-from on."""
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
    flags = ["--encoder-steps", 3, "--n-gen", 2, "--joint-from", 5, "--steps", 6]
    train("stacked_gan", "run", *flags, "--log-every", 1)
    E, D, G = range(3)
    assert events == [E] * 3 + [D, G, G] * 3
    assert joints == [False] * 3 + [True] * 6
    assert len(real) == 3 + 100 + 3, "one minibatch for each update, and 100 for E's accuracy"
    rows = log_rows("run")
    assert [row["loss_E"] > 0 for row in rows] == [True] * 3 + [False] * 3
    assert [row["loss_G"] > 0 for row in rows] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_resume_in_each_phase(stop, capsys):
    """Killed while E learns, while G0 learns from E's features, and in the joint phase."""
    flags = ["--encoder-steps", 4, "--joint-from", 8, "--save-every", 1, "--log-every", 1]
    train("stacked_gan", "whole", *flags, "--steps", 10)
    capsys.readouterr()
    train("stacked_gan", "parts", *flags, "--steps", stop)
    warned = "only E is trained in the first 4 steps" in capsys.readouterr().err
    assert warned == (stop < 4)
    train("stacked_gan", "parts", "--steps", 10, "--resume", small="")
    assert log_rows("parts") == log_rows("whole")
    assert same(checkpoint("parts")["state"], checkpoint("whole")["state"])


def test_the_optimisers():
    """Those of G and D have the authors' epsilon; that of E steps on the gradient of its loss
    alone, which is zeroed before."""
    run, largest = open_script("stacked_gan"), []
    for opt in (run.opt_G, run.opt_D):
        assert opt.param_groups[0]["eps"] == 1e-4
    weights = list(run.E.parameters())
    for w in weights:
        w.grad = torch.full_like(w, 1e6)
    run.opt_E.register_step_pre_hook(
        lambda *_: largest.append(max(w.grad.abs().max().item() for w in weights))
    )
    run.update_encoder()
    assert len(largest) == 1 and largest[0] < 1e5


def test_what_is_refused(capsys):
    train("stacked_gan", "run", "--steps", 1)
    with pytest.raises(SystemExit):
        train("stacked_gan", "new", "--init", "run/checkpoint.pt")
    assert "--init cannot be used here, as it does not load E" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("stacked_gan", "new", "--batch-size", 1)
    assert "--batch-size must be at least 2 per process" in capsys.readouterr().err
    picture_folder(Path("flat"), (0, 1))
    with pytest.raises(SystemExit, match=r"flat has no classes, which stacked_gan\.py needs"):
        train("stacked_gan", "other", data="flat")
    with pytest.raises(SystemExit, match="--label is 7: the classes are class0, class1"):
        train("stacked_gan", "run", "--generate", 2, "--label", 7, small="")


def test_learns_two_pictures(capsys):
    """One for each label, and E tells the two apart."""
    data, run = picture_folder(Path("pictures"), (0, 1), classes=True), "--out-dir run --device cpu"
    quick = "--image-size 32 --batch-size 8 --width 8 --z-dim 6 --lr 2e-3 --encoder-steps 100"
    quick = f"{quick} --steps 300 --save-every 1000"
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
