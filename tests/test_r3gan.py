"""r3gan.py: the loss on pairs, both penalties, networks that are linear at the start, and the
schedules."""

import copy
import math

import pytest
import torch
from helpers import (
    log_rows,
    open_script,
    recorded,
    train,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import r3gan
import runs


def networks(width=16, image_size=16):
    torch.manual_seed(0)
    return r3gan.Generator(6, width, 3, image_size), r3gan.Discriminator(width, 3, image_size)


def test_losses_at_equal_scores_and_far_apart():
    zero, one = torch.zeros(5), torch.ones(5)
    for loss in (r3gan.d_loss, r3gan.g_loss):
        assert loss(zero, zero).item() == pytest.approx(math.log(2))
        assert loss(7 + zero, 7 + zero).item() == pytest.approx(math.log(2)), "wherever they are"
    assert r3gan.d_loss(3 * one, zero).item() == pytest.approx(math.log(1 + math.exp(-3)))
    assert r3gan.g_loss(3 * one, zero).item() == pytest.approx(math.log(1 + math.exp(3)))


def test_losses_compare_pairs():
    """At the same places of the two batches, not their means."""
    d_real, d_fake = torch.tensor([0.0, 10.0]), torch.tensor([0.0, 10.0])
    assert r3gan.d_loss(d_real, d_fake).item() == pytest.approx(math.log(2))
    crossed = r3gan.d_loss(d_real, d_fake.flip(0)).item()
    assert crossed == pytest.approx((math.log(1 + math.exp(10)) + math.log(1 + math.exp(-10))) / 2)


def test_networks_are_linear_at_the_start():
    """Each block ends in weights of 0, and nothing normalises or bounds."""
    G, D = networks()
    a, b = torch.randn(2, 4, 6)
    assert torch.allclose(G(a + 2 * b), G(a) + 2 * G(b), atol=1e-4)
    x, y = torch.randn(2, 4, 3, 16, 16)
    assert torch.allclose(D(x + 2 * y), D(x) + 2 * D(y), atol=1e-4)
    assert G(a).shape == (4, 3, 16, 16) and D(x).shape == (4,)
    assert G(50 * a).abs().max() > 5
    names = [type(module).__name__ for net in (G, D) for module in net.modules()]
    assert not any("Norm" in name or "Tanh" in name for name in names)


def test_blocks():
    """Inside, the mean square of x falls to 1 / n_blocks, as each of two convolutions has a gain of
    n_blocks^(-1/4); groups have 16 channels."""
    torch.manual_seed(0)
    block = r3gan.Block(64, n_blocks=8)
    first, _, grouped, _, last = block.f
    assert grouped.groups == 8 and grouped.weight.shape == (128, 16, 3, 3)
    assert not last.weight.any()
    x = torch.randn(8, 64, 16, 16)
    before_last = block.f[:4](x)[:, :, 2:-2, 2:-2]
    assert before_last.square().mean().item() == pytest.approx(1 / 8, rel=0.1)
    assert first.bias is grouped.bias is last.bias is None
    assert [p.shape for p in block.f[1].parameters()] == [(128,)]


def test_published_size():
    """20.78 and 21.28 million parameters with the labels that ours lacks: its embedding of 64 in G,
    of which the linear map of z takes 64 more, and 768 scores in D instead of one."""
    with torch.device("meta"):
        networks = r3gan.Generator(64, 768, 3, 32), r3gan.Discriminator(768, 3, 32)
    ours = [sum(p.numel() for p in net.parameters()) for net in networks]
    labels_G = 64 * 768 + 10 * 64
    labels_D = 767 * 768 + 10 * 768
    assert ours[0] + labels_G == pytest.approx(20.78e6, abs=0.005e6)
    assert ours[1] + labels_D == pytest.approx(21.28e6, abs=0.005e6)


def test_resampling_has_the_filter():
    up, down = r3gan.Double(), r3gan.Halve()
    x = torch.randn(1, 1, 8, 8)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (taps[:, None] * taps).expand(1, 1, 4, 4)
    expected = nn.functional.conv2d(x, kernel, stride=2, padding=1)
    assert torch.allclose(down(x), expected, atol=1e-6)
    expected = nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=1)
    assert torch.allclose(up(x), expected, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_in_groups_and_its_derivatives(groups):
    x = torch.randn(2, 4, 4, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.double, requires_grad=True)
    expected = nn.functional.conv2d(x, weight, padding=1, groups=groups)
    inputs = (x, weight, groups)
    assert torch.equal(r3gan.GroupedConvFunction.apply(*inputs), expected)
    assert torch.autograd.gradcheck(r3gan.GroupedConvFunction.apply, inputs)
    assert torch.autograd.gradgradcheck(r3gan.GroupedConvFunction.apply, inputs)


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed within it, those of derivatives included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


def test_the_penalty_needs_no_more_convolutions_in_a_wider_d():
    counts = []
    for width in (16, 64):
        _, D = networks(width)
        x = torch.randn(2, 3, 16, 16, requires_grad=True)
        with Convolutions() as convolutions:
            r3gan.r1_penalty(D(x), x).backward()
        counts.append(convolutions.count)
    assert counts[0] == counts[1] > 0


def test_both_penalties_at_every_step(monkeypatch):
    run, calls = open_script("r3gan"), []
    real = recorded(monkeypatch, "sample_batch")
    fakes = []
    run.G.register_forward_hook(lambda module, z, x: fakes.append(x.detach()))

    def penalty(scores, x):
        torch.autograd.grad(scores.sum(), x, retain_graph=True)  # they are those of these images
        calls.append(x)
        return torch.tensor(float(len(calls)))

    monkeypatch.setattr(r3gan, "r1_penalty", penalty)
    monkeypatch.setattr(r3gan, "d_loss", lambda d_real, d_fake: d_real.mean() * 0 + 3)
    for step in range(3):
        calls.clear()
        loss_D = run.update(0.05)["loss_D"].item()
        assert loss_D == pytest.approx(3 + 0.05 / 2 * (1 + 2))
        assert torch.equal(calls[0], real[2 * step][0]) and torch.equal(calls[1], fakes[2 * step])


def test_G_learns_from_real_images_of_its_own(monkeypatch):
    """The gradient of G changes with them, and they are not those of D's update."""
    run, real = open_script("r3gan"), recorded(monkeypatch, "sample_batch")
    run.update(0.05)
    assert len(real) == 2 and not torch.equal(real[0][0], real[1][0])

    gradients, before = [], [copy.deepcopy(run.state[n].state_dict()) for n in ("G", "D")]
    run.opt_G.register_step_pre_hook(
        lambda *_: gradients.append([p.grad.clone() for p in run.G.parameters()])
    )
    batch = common.sample_batch(run.args, run.data)
    for x_real in (torch.zeros(4, 3, 16, 16) + 0.9, torch.zeros(4, 3, 16, 16) - 0.9):
        # D's update has the same batch in both, and G's another one.
        batches = iter([batch, (x_real, None)])
        monkeypatch.setattr(common, "sample_batch", lambda *_, batches=batches: next(batches))
        for n, weights in zip(("G", "D"), before, strict=True):
            run.state[n].load_state_dict(weights)
        run.opt_D.state.clear()
        torch.manual_seed(0)
        run.update(0.05)
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a.any()]
    assert pairs and not any(torch.equal(a, b) for a, b in pairs)


def test_what_changes_in_the_course_of_a_run(monkeypatch):
    assert r3gan.cosine(2, 6, 0) == 2 and r3gan.cosine(2, 6, 1) == 6
    assert r3gan.cosine(2, 6, 0.5) == pytest.approx(4)
    assert r3gan.cosine(2, 6, 0.1) < 2.4, "slow at first"
    seen, averages = {"opt_D": [], "opt_G": []}, []

    def start_run(args, data, state, start_run=runs.start_run):
        for name, rows in seen.items():
            group = state[name].param_groups[0]
            state[name].register_step_pre_hook(
                lambda *_, rows=rows, group=group: rows.append((group["lr"], *group["betas"]))
            )
        return start_run(args, data, state)

    monkeypatch.setattr(runs, "start_run", start_run)
    monkeypatch.setattr(r3gan, "move_average", lambda average, G, beta: averages.append(beta))
    flags = ["--lr", 0.01, "--lr-end", 0.001, "--beta2", 0.5, "--beta2-end", 0.7]
    train("r3gan", "run", "--steps", 8, *flags)
    for rows in seen.values():
        expected = [r3gan.cosine(0.01, 0.001, k / 8) for k in range(8)]
        assert [lr for lr, *_ in rows] == pytest.approx(expected)
        expected = [r3gan.cosine(0.5, 0.7, k / 8) for k in range(8)]
        assert [beta2 for *_, beta2 in rows] == pytest.approx(expected)
        assert all(beta1 == 0 for _, beta1, _ in rows)
    assert averages[-1] == pytest.approx(0.5 ** (1 / 0.16)) and averages[0] < 1e-3
    assert averages == sorted(averages)


def test_gamma_changes_too():
    train("r3gan", "low", "--steps", 6, "--gamma", 1, "--gamma-end", 1, "--log-every", 1)
    train("r3gan", "falls", "--steps", 6, "--gamma", 1, "--gamma-end", 0.1, "--log-every", 1)
    low, falls = log_rows("low"), log_rows("falls")
    assert low[0] == falls[0] and low[-1]["loss_D"] != falls[-1]["loss_D"]
