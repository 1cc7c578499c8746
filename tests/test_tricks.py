"""Each trick of tricks.py against a closed form, in the run it is part of, and on one picture."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    checkpoint,
    open_script,
    picture,
    recorded,
    train,
)
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import runs
import tricks

REAL, FAKE = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-0.3, 1.2, -2.0])
POLICY = "color translation cutout"


def test_without_flags_it_is_dcgan():
    """To rounding."""
    for name in ("tricks", "dcgan"):
        train(name, name, "--steps", 5, "--n-critic", 2)
    ours, dcgans = (checkpoint(name)["state"] for name in ("tricks", "dcgan"))
    for part in ("G", "D"):
        for name, weight in ours[part].items():
            assert torch.allclose(weight, dcgans[part][name], rtol=1e-3, atol=1e-4), name


def test_smoothed_and_flipped_labels():
    """In closed form: what is labelled real has the target 0.9, what is labelled fake 0; with
    flip, a share of the images gets the other label."""

    def loss(y_real, y_fake):
        return bce(REAL, torch.full((3,), y_real)) + bce(FAKE, torch.full((3,), y_fake))

    for smooth, flip, expected in ((0.1, 0.0, loss(0.9, 0.0)), (0.1, 1.0, loss(0.0, 0.9))):
        ours = tricks.d_loss(REAL, FAKE, smooth, flip).item()
        assert ours == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(0)
    ones, zeros = torch.ones(10_000), torch.zeros(10_000)
    assert tricks.swap_labels(ones, 0.0) is ones
    for y, share in ((tricks.swap_labels(ones, 0.3), 0.7), (tricks.swap_labels(zeros, 0.3), 0.3)):
        assert y.unique().tolist() == [0, 1] and y.mean().item() == pytest.approx(share, abs=0.03)


def test_labels_are_smoothed_and_flipped_in_the_loss_of_D_alone(monkeypatch):
    run, given = open_script("tricks", "--smooth", 0.2, "--flip", 0.3), []
    d_loss, scores = tricks.d_loss, []
    monkeypatch.setattr(tricks, "d_loss", lambda *a: given.append(a[2:]) or d_loss(*a))
    run.D.register_forward_hook(lambda m, i, o: scores.append(o.detach()))
    loss_G = run.update()["loss_G"].item()
    assert given == [(0.2, 0.3)]
    assert loss_G == pytest.approx(bce(scores[-1], torch.ones(4)).item(), rel=1e-5)


def seen_by_D(monkeypatch, *flags):
    """What D got in a run, three batches in each step, and what G made, two in each."""
    seen, made = [], []
    D_forward, G_forward = tricks.Discriminator.forward, tricks.Generator.forward

    def watched_D(D, x):
        seen.append(x.detach())
        return D_forward(D, x)

    def watched_G(G, z):
        x = G_forward(G, z)
        if G.training:
            made.append(x.detach().clone())
        return x

    monkeypatch.setattr(tricks.Discriminator, "forward", watched_D)
    monkeypatch.setattr(tricks.Generator, "forward", watched_G)
    train("tricks", "seen", "--batch-size", 32, *flags)
    return seen, made


def test_noise_fades_to_0_on_all_that_D_sees(monkeypatch):
    seen, made = seen_by_D(monkeypatch, "--noise", 0.5, "--steps", 4)
    real = torch.tensor(
        np.stack([picture(k).transpose(2, 0, 1) for k in (0, 1)]) / 127.5 - 1
    ).float()
    for k in range(4):
        x_real = real[torch.cdist(seen[3 * k].flatten(1), real.flatten(1)).argmin(1)]
        clean = [x_real, made[2 * k], made[2 * k + 1]]
        for x, without in zip(seen[3 * k : 3 * k + 3], clean, strict=True):
            noise, strength = x - without, 0.5 * (1 - k / 4)
            assert noise.std().item() == pytest.approx(strength, rel=0.05)
            assert not torch.allclose(noise[0], noise[1], atol=0.01), "another for each image"


def test_the_pool():
    """Half of the fakes are replaced by others from the pool, each once, and take random places
    there, which need not be those of the ones that were drawn."""
    torch.manual_seed(0)
    places, drawn_stays = set(), 0
    for _ in range(100):
        pool = torch.arange(8.0)[:, None, None, None].clone()
        fakes = torch.arange(10.0, 18)[:, None, None, None]
        earlier, latest = tricks.swap_with_pool(pool, fakes)
        assert latest.flatten().tolist() == [14, 15, 16, 17]
        earlier = set(earlier.flatten().tolist())
        assert len(earlier) == 4 and earlier < set(range(8))
        after = pool.flatten().tolist()
        assert {x for x in after if x >= 10} == {10, 11, 12, 13}
        places |= {place for place, x in enumerate(after) if x == 10}
        drawn_stays += len(earlier & set(after))
    assert places == set(range(8))
    assert 100 < drawn_stays < 300, "about half of those drawn stay in the pool"
    pool = torch.zeros(2, 1, 1, 1)
    earlier, latest = tricks.swap_with_pool(pool, fakes)
    assert (len(earlier), len(latest)) == (2, 6)
    assert pool.flatten().tolist() in ([10, 11], [11, 10])


def test_half_of_Ds_fakes_come_from_the_pool(monkeypatch):
    """In a batch of their own, whose statistics are not mixed with those of the other half."""
    seen, made = seen_by_D(monkeypatch, "--replay", 40, "--steps", 1)
    *pool, for_D, for_G = made
    pool = torch.cat(pool)
    assert len(pool) == 40
    earlier, latest, for_G_step = seen[1:]
    assert torch.equal(latest, for_D[16:]) and torch.equal(for_G_step, for_G)
    assert len(earlier) == 16
    assert all(any(torch.equal(a, b) for b in pool) for a in earlier)


def test_feature_distance():
    """0 for equal batches; the sum of (mean - mean)^2 over all activations; a gradient for fakes
    alone."""
    D = tricks.Discriminator(8, 3, 16, kernels=0, norm=True)
    x, fake = torch.randn(2, 6, 3, 16, 16)
    assert tricks.feature_distance(D, x, x).item() == 0
    x.requires_grad_(), fake.requires_grad_(), D.requires_grad_(False)
    tricks.feature_distance(D, x, fake).backward()
    assert fake.grad.abs().max() > 0 and x.grad is None

    first, second = nn.LeakyReLU(1.0), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    D.net = nn.Sequential(first, second, nn.LeakyReLU(1.0), nn.Identity())
    expected = (x.mean(0) - fake.mean(0)).square().sum()
    expected = expected + (second(x).mean(0) - second(fake).mean(0)).square().sum()
    assert tricks.feature_distance(D, x, fake).item() == pytest.approx(expected.item(), rel=1e-5)


def test_feature_matching_compares_augmented_images(monkeypatch):
    run, given = open_script("tricks", "--feature-matching", "--diffaug", "color"), []
    marked = []
    monkeypatch.setattr(tricks, "diffaug", lambda x, policy: marked.append(x + 2) or marked[-1])
    monkeypatch.setattr(
        tricks, "feature_distance", lambda D, *x: given.append(x) or x[1].mean() * 0 + 4
    )
    assert run.update()["loss_G"].item() == 4, "instead of g_loss"
    ((real, fake),) = given
    assert real is marked[-2] and fake is marked[-1]


def test_minibatch_discrimination():
    """exp(-distance) to each other image, summed, in each space apart: it sees the rest of its
    own batch, and the gradient reaches the others."""
    layer = tricks.MinibatchDiscrimination(16, 2)
    with torch.no_grad():
        layer.linear.weight.zero_()
        layer.linear.weight[0:2, 0] = 1  # in the first space, two dimensions read feature 0
        layer.linear.weight[5, 1] = 1  # in the second, one reads feature 1
    h = torch.zeros(3, 1, 4, 4)
    h[:, 0, 0, 0] = torch.tensor([0.0, 1.0, 3.0])
    h[:, 0, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    h.requires_grad_()
    out = layer(h)
    assert out.shape == (3, 3, 4, 4) and torch.equal(out[:, :1], h)
    assert out[:, 1:].std((2, 3)).max() == 0
    e = [math.exp(-2 * d) for d in (1, 3, 2)]
    expected = [e[0] + e[1], e[0] + e[2], e[1] + e[2]]
    assert out[:, 1, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    expected = [1 + math.exp(-1), 1 + math.exp(-1), 2 * math.exp(-1)]
    assert out[:, 2, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    (grad,) = torch.autograd.grad(out[0, 1, 0, 0], h)
    assert grad[1, 0, 0, 0].item() == pytest.approx(-2 * e[0], rel=1e-5)

    run = open_script("tricks", "--minibatch-kernels", 3)
    layers = [m for m in run.D.modules() if isinstance(m, tricks.MinibatchDiscrimination)]
    assert len(layers) == 1 and layers[0].linear.weight.shape[0] == 3 * 5


def test_r1(monkeypatch):
    """gamma / 2 of the penalty in loss_D, at real images; biases in place of batch norm, He."""
    run, at = open_script("tricks", "--r1", 3, "--diffaug", "color"), []
    assert not any(isinstance(m, nn.BatchNorm2d) for m in run.D.modules())
    assert all(m.bias is not None for m in run.D.net if isinstance(m, nn.Conv2d))
    he = (2 / 1.04 / (8 * 16)) ** 0.5
    assert run.D.net[2].weight.std().item() == pytest.approx(he, rel=0.1)

    def r1_penalty(d_real, x_real):
        at.append((d_real, x_real))
        return torch.tensor(5.0)

    d_loss = tricks.d_loss
    monkeypatch.setattr(tricks, "r1_penalty", r1_penalty)
    monkeypatch.setattr(tricks, "d_loss", lambda *a: d_loss(*a) * 0)
    real = recorded(monkeypatch, "sample_batch")
    augmented = recorded(monkeypatch, "diffaug", tricks)
    passes = []
    run.D.register_forward_hook(lambda m, inputs, scores: passes.append((inputs[0], scores)))
    assert run.update()["loss_D"].item() == 7.5
    ((d_real, x_real),) = at
    assert x_real is real[0][0]
    assert passes[0][0] is augmented[0] and passes[0][1] is d_real, "D sees it augmented"


def test_move_average():
    """Of the weights; the statistics of batch norm are copied. At beta 0 it is G."""
    G, average = (tricks.Generator(6, 8, 3, 16) for _ in range(2))
    G(torch.randn(4, 6))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    tricks.move_average(average, G, 0.75)
    buffers = dict(G.named_buffers())
    for k, v in average.state_dict().items():
        beta = 0.0 if k in buffers else 0.75
        expected = beta * before[k] + (1 - beta) * G.state_dict()[k]
        assert torch.allclose(v.float(), expected.float(), atol=1e-6)
    tricks.move_average(average, G, 0.0)
    for k, v in average.state_dict().items():
        assert torch.allclose(v, G.state_dict()[k], atol=1e-7)


def test_the_average_moves_in_each_step(monkeypatch):
    """By hand from G's weights of all steps; it begins as G, and its decay grows up to --ema."""
    moved, move_average = [], tricks.move_average

    def watched(average, G, beta):
        moved.append((beta, G.net[0].weight.detach().clone()))
        move_average(average, G, beta)

    monkeypatch.setattr(tricks, "move_average", watched)
    train("tricks", "run", "--steps", 6, "--ema", 0.25, "--lr", 0.02)
    assert [beta for beta, _ in moved] == pytest.approx([0, 1 / 11, 2 / 12, 3 / 13, 0.25, 0.25])
    expected = torch.zeros(())
    for beta, weight in moved:
        expected = beta * expected + (1 - beta) * weight
    saved = checkpoint("run")["state"]
    assert torch.allclose(saved["average"]["net.0.weight"], expected, atol=1e-6)


def test_the_pool_begins_with_images_of_the_G_of_init(monkeypatch):
    """Of a G whose images are all grey, because its weights are 0."""
    train("tricks", "first", "--steps", 1)
    saved = checkpoint("first")
    for weight in saved["state"]["G"].values():
        weight.zero_()
    torch.save(saved, "grey.pt")
    monkeypatch.setattr(runs, "cuda_graph", lambda args, data, update: lambda: {})
    monkeypatch.setattr(runs, "log", lambda *_: {})
    train("tricks", "run", "--steps", 1, "--init", "grey.pt", "--replay", 9)
    assert checkpoint("run")["state"]["pool"].abs().max() == 0


def test_the_rates_fall_linearly(monkeypatch):
    """From --lr in the first step, and for both optimisers, also in a resumed run."""
    rates, step = [], torch.optim.Adam.step

    def watched(self, *args):
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train("tricks", "falling", "--steps", 10, "--lr", 0.01, "--decay")
    expected = [0.01 * (10 - k) / 10 for k in range(10)]
    assert rates[::2] == pytest.approx(expected) and rates[1::2] == pytest.approx(expected)
    train("tricks", "falling", "--resume", "--steps", 20, small=False)
    assert rates[20] == pytest.approx(0.01 * 10 / 20), "as --steps has it"


def test_diffaug_against_a_plain_loop(monkeypatch):
    """With the random numbers known: brightness, saturation, contrast, shift and hole of each
    image."""
    torch.manual_seed(0)
    n, s = 6, 16
    x = torch.rand(n, 3, s, s)
    colours = torch.rand(3, n, 1, 1, 1)
    shifts = torch.randint(5, (2, n, 1))
    holes = torch.randint(17, (2, n, 1))
    draws = [shifts, holes]
    with monkeypatch.context() as m:
        m.setattr(torch, "rand", lambda *shape, device: colours)
        m.setattr(torch, "randint", lambda high, shape, device: draws.pop(0))
        ours = tricks.diffaug(x, POLICY.split())
    for i in range(n):
        brightness, saturation, contrast = colours[:, i, 0, 0, 0].tolist()
        image = x[i] + brightness - 0.5
        grey = image.mean(0)
        image = grey + 2 * saturation * (image - grey)
        image = image.mean() + (0.5 + contrast) * (image - image.mean())
        expected = torch.zeros(3, s, s)
        for row in range(s):
            for column in range(s):
                from_row, from_column = row + shifts[0, i, 0] - 2, column + shifts[1, i, 0] - 2
                if 0 <= from_row < s and 0 <= from_column < s:
                    expected[:, row, column] = image[:, from_row, from_column]
                middle_row, middle_column = holes[:, i, 0]
                if -4 <= row - middle_row < 4 and -4 <= column - middle_column < 4:
                    expected[:, row, column] = 0
        assert torch.allclose(ours[i], expected, atol=1e-5)


def test_diffaug_draws_anew_for_each_image_in_its_ranges(monkeypatch):
    ranges = []
    randint = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda high, *a, **k: ranges.append(high) or randint(high, *a, **k)
    )
    x = torch.randn(200, 3, 16, 16).requires_grad_()
    y = tricks.diffaug(x, POLICY.split())
    assert ranges == [5, 17], "shifts by -2 to 2, a hole's middle from 0 to 16"
    holes = {tuple(image.flatten().tolist()) for image in (y == 0).all(1)}
    assert len(holes) > 150, "rows and columns are drawn apart, and for each image"
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert (grad != 0).any((1, 2, 3)).all()


def test_the_policy_of_diffaug(monkeypatch):
    x = torch.zeros(4, 3, 16, 16)
    assert tricks.diffaug(x, []) is x
    for number, name in ((1, "color"), (10, "translation"), (100, "cutout")):
        monkeypatch.setattr(tricks, name, lambda x, number=number: x + number)
    for policy, total in (("color", 1), ("translation", 10), ("cutout", 100), (POLICY, 111)):
        assert (tricks.diffaug(x, policy.split()) == total).all()


def test_all_that_D_sees_is_augmented(monkeypatch):
    seen, _ = seen_by_D(monkeypatch, "--diffaug", "cutout", "--steps", 1)
    assert len(seen) == 3
    assert all((image == 0).all(1).any((1, 2)).all() for image in seen)
