"""The losses against values worked out by hand, two-sided, on unequal real and fake scores."""

import functools
import math

import pytest
import torch
from helpers import DEVICES, SCRIPTS
from torch.nn.functional import binary_cross_entropy_with_logits as bce

gan, lsgan, wgan, wgan_gp, sngan, progan = (
    SCRIPTS[n] for n in ("gan", "lsgan", "wgan", "wgan_gp", "sngan", "progan")
)
REAL, FAKE = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-0.3, 1.2, -2.0])
LN2 = math.log(2)


@pytest.mark.parametrize("name", ["gan", "dcgan", "cgan"])
def test_cross_entropy(name):
    module, zero = SCRIPTS[name], torch.zeros(4)
    assert module.d_loss(zero, zero).item() == pytest.approx(2 * LN2)
    assert module.g_loss(zero).item() == pytest.approx(LN2)
    expected = bce(REAL, torch.ones(3)) + bce(FAKE, torch.zeros(3))
    assert module.d_loss(REAL, FAKE).item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.g_loss(FAKE).item() == pytest.approx(bce(FAKE, torch.ones(3)).item(), rel=1e-5)
    # A sigmoid before the log would be infinite.
    far = torch.tensor([200.0])
    assert module.d_loss(-far, far).item() == pytest.approx(400)


def test_saturating():
    assert gan.g_loss(torch.zeros(3), saturating=True).item() == pytest.approx(-LN2)
    assert gan.g_loss(FAKE, saturating=True).item() == pytest.approx(
        -bce(FAKE, torch.zeros(3)).item(), rel=1e-5
    )


def test_least_squares():
    zero = torch.zeros(4)
    assert lsgan.d_loss(zero, zero).item() == 0.5
    assert lsgan.g_loss(zero).item() == 0.5
    d = ((0.5 - 1) ** 2 + (2 - 1) ** 2 + (-1 - 1) ** 2) / 6 + (0.3**2 + 1.2**2 + 2**2) / 6
    assert lsgan.d_loss(REAL, FAKE).item() == pytest.approx(d, rel=1e-5)
    assert lsgan.g_loss(FAKE).item() == pytest.approx((1.3**2 + 0.2**2 + 3**2) / 6, rel=1e-5)
    d = ((0.5 - 3) ** 2 + (2 - 3) ** 2 + (-1 - 3) ** 2) / 6 + (1.7**2 + 3.2**2 + 0) / 6
    assert lsgan.d_loss(REAL, FAKE, a=-2.0, b=3.0).item() == pytest.approx(d, rel=1e-5)
    assert lsgan.g_loss(FAKE, c=-2.0).item() == pytest.approx((1.7**2 + 3.2**2 + 0) / 6, rel=1e-5)


@pytest.mark.parametrize("name", ["wgan", "wgan_gp"])
def test_wasserstein(name):
    module = SCRIPTS[name]
    assert module.d_loss(REAL, FAKE).item() == pytest.approx(-1.1 / 3 - 1.5 / 3, rel=1e-5)
    assert module.g_loss(FAKE).item() == pytest.approx(1.1 / 3, rel=1e-5)


def test_hinge():
    zero = torch.zeros(4)
    assert sngan.d_loss(zero, zero).item() == 2
    assert sngan.g_loss(zero).item() == 0
    assert sngan.d_loss(REAL, FAKE).item() == pytest.approx(
        (0.5 + 2) / 3 + (0.7 + 2.2) / 3, rel=1e-5
    )
    assert sngan.g_loss(FAKE).item() == pytest.approx(1.1 / 3, rel=1e-5)
    real = torch.tensor([1.5, 3.0], requires_grad=True)
    fake = torch.tensor([-1.5, -3.0], requires_grad=True)
    loss = sngan.d_loss(real, fake)
    loss.backward()
    assert loss == 0 and (real.grad == 0).all() and (fake.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_gradient_penalty_of_a_linear_critic(shape, device):
    """D(x) = w.x has the gradient w everywhere, so the penalty is (|w| - 1)^2 over all numbers
    of x."""
    w = torch.randn(math.prod(shape), device=device, requires_grad=True)
    x_real, x_fake = torch.randn(2, 5, *shape, device=device)
    penalty = wgan_gp.gradient_penalty(lambda x: x.flatten(1) @ w, x_real, x_fake)
    norm = w.detach().norm()
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-4)
    penalty.backward()  # reaches D's weights: d/dw (|w| - 1)^2 = 2 (|w| - 1) w / |w|
    assert torch.allclose(w.grad, 2 * (norm - 1) * w.detach() / norm, rtol=1e-4, atol=1e-5)


def test_gradient_penalty_does_not_reach_g():
    """Also where x_fake has a history, as in code that has no torch.no_grad around G."""
    x_fake = torch.randn(4, 3, 8, 8, requires_grad=True)
    w = torch.randn(3 * 64, requires_grad=True)
    penalty = wgan_gp.gradient_penalty(lambda x: (x.flatten(1) @ w) ** 2, x_fake * 0, x_fake * 2)
    penalty.backward()
    assert x_fake.grad is None and w.grad.abs().max() > 0


def test_gradient_penalty_averages_over_images_not_norms():
    """D(x) = |x|^2 / 2 has the gradient x, another norm for each image; at x_real = x_fake it is
    known."""
    x = torch.randn(6, 3, 8, 8)
    penalty = wgan_gp.gradient_penalty(lambda x: x.flatten(1).pow(2).sum(1) / 2, x, x)
    expected = ((x.flatten(1).norm(dim=1) - 1) ** 2).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "gradient_penalty",
    [wgan_gp.gradient_penalty, functools.partial(progan.gradient_penalty, gamma=1.0)],
)
def test_gradient_penalty_at_zero_gradient(gradient_penalty):
    """A critic that is flat has the penalty 1, and its gradient is a number."""
    w = torch.zeros(3 * 64, requires_grad=True)
    x = torch.randn(4, 3, 8, 8)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, x, -x)
    penalty.backward()
    assert penalty.item() == 1
    assert w.grad.isfinite().all()


def test_gradient_penalty_mixes_each_image_with_one_uniform_number():
    """x_hat seen by D: between x_real = 1 and x_fake = 0 it is eps itself, constant within an
    image."""
    torch.manual_seed(0)
    seen = []

    def D(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    wgan_gp.gradient_penalty(D, torch.ones(2000, 3, 2, 2), torch.zeros(2000, 3, 2, 2))
    (x_hat,) = seen
    eps = x_hat[:, 0, 0, 0]
    assert (x_hat == eps[:, None, None, None]).all()
    assert eps.min() >= 0 and eps.max() <= 1
    assert eps.mean().item() == pytest.approx(0.5, abs=0.03)
    assert eps.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.02)


@pytest.mark.parametrize("name", ["tricks", "stylegan2", "r3gan"])  # stylegan's is stylegan2's
@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4, 4)])
def test_r1_penalty(name, shape):
    """D(x) = w.x^2 / 2 has the gradient w x, with another norm for each image. It reaches w."""
    x = torch.randn(shape, requires_grad=True)
    w = torch.randn(math.prod(shape[1:]), requires_grad=True)
    scores = x.flatten(1).square() @ w / 2
    penalty = SCRIPTS[name].r1_penalty(scores, x)
    squares = x.detach().flatten(1).square()
    expected = (w.detach() ** 2 * squares).sum(1).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    (grad,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(grad, 2 * w.detach() * squares.mean(0), rtol=1e-4)
