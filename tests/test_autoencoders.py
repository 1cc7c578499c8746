"""ebgan.py and began.py: their losses in closed form, their energies, k, and one picture."""

import copy

import pytest
import torch
from helpers import SCRIPTS, open_script, train
from torch import nn

import began
import ebgan


def discriminator(name, channels=3, image_size=16):
    """A small D; began's codes have 6 numbers."""
    z_dim = [6] if name == "began" else []
    return SCRIPTS[name].Discriminator(*z_dim, 8, channels, image_size)


def test_ebgan_losses():
    """The margin is for each image, not for their mean; beyond it there is no gradient."""
    d_real, d_fake = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 30.0], requires_grad=True)
    loss = ebgan.d_loss(d_real, d_fake, 20)
    assert loss.item() == pytest.approx(2 + (15 + 0) / 2)
    loss.backward()
    assert d_fake.grad.tolist() == [-0.5, 0]
    assert ebgan.g_loss(d_fake).item() == pytest.approx(17.5)


def test_pulling_away():
    same_way, across = torch.tensor([[1.0, 2], [2, 4]]), torch.tensor([[1.0, 2], [-2, 1]])
    assert ebgan.pulling_away(same_way).item() == pytest.approx(1)
    assert ebgan.pulling_away(across).item() == pytest.approx(0)
    s = torch.randn(4, 3, 2, 2)
    rows = [row.flatten() for row in s]
    squares = [
        (rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm())) ** 2
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    assert ebgan.pulling_away(s).item() == pytest.approx(sum(squares).item() / 12, rel=1e-4)


def test_began_losses():
    d_real, d_fake = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
    assert began.d_loss(d_real, d_fake, torch.tensor(0.5)).item() == pytest.approx(0.5)
    assert began.g_loss(d_fake).item() == pytest.approx(3)


@pytest.mark.parametrize(
    "k, l_fake, new_k, measure",
    [(0.5, 0.4, 0.52, 2.2), (0.5, 3.0, 0.26, 4.4), (0.1, 3.0, 0.0, 4.4), (0.99, 0.4, 1.0, 2.2)],
)
def test_k_and_the_measure(k, l_fake, new_k, measure, monkeypatch):
    """gamma 0.3 and E[D(x)] = 2: k rises when fakes are easier to reconstruct than 0.6, falls when
    they are harder, and stays in [0, 1]."""
    run = open_script("began", "--lambda-k", 0.1, "--gamma", 0.3)
    run.k.fill_(k)
    bias = next(run.D.parameters())
    run.D.forward = lambda x: 2 + 0 * (bias.sum() + x.sum((1, 2, 3)))
    monkeypatch.setattr(began, "g_loss", lambda d_fake: l_fake + 0 * d_fake.mean())
    values = run.update()
    assert values["k"].item() == run.k.item() == pytest.approx(new_k)
    assert values["M"].item() == pytest.approx(measure)
    assert not run.k.requires_grad


def test_energies():
    """The distance from the reconstruction, for each image: a norm, or a mean absolute error."""
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    for name, module in (("ebgan", "decoder"), ("began", "net")):
        D = discriminator(name)
        picture = torch.rand(3, 16, 16)
        D._modules[module] = nn.Identity()
        D._modules[module].forward = lambda h, picture=picture: picture.expand(4, 3, 16, 16)
        error = x - picture
        expected = error.flatten(1).norm(dim=1) if name == "ebgan" else error.abs().mean((1, 2, 3))
        assert torch.allclose(D(x), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["ebgan", "began"])
@pytest.mark.parametrize("image_size", [16, 32])
def test_networks(name, image_size):
    D = discriminator(name, channels=1, image_size=image_size)
    G = SCRIPTS[name].Generator(6, 8, 1, image_size)
    x = G(torch.randn(4, 6))
    assert x.shape == (4, 1, image_size, image_size)
    assert D(x).shape == (4,) and (D(x) > 0).all()
    if name == "ebgan":
        assert D.encoder(x).shape == (4, 4 * image_size // 4, 4, 4)
    normalised = [m for m in [*G.modules(), *D.modules()] if isinstance(m, nn.BatchNorm2d)]
    assert bool(normalised) == (name == "ebgan")


def test_layers_of_began():
    """3x3 convolutions, all with an ELU but the last; the encoder's channels grow by the width."""
    D = began.Discriminator(6, 8, 3, 32)
    layers = list(D.net)
    convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert all(layers[i].kernel_size == (3, 3) for i in convs)
    assert all(isinstance(layers[i + 1], nn.ELU) for i in convs[:-1])
    channels = [layers[i].out_channels for i in convs]
    assert channels == [8, 8, 8, 8, 16, 16, 16, 24, 24] + [8] * 6 + [3]
    assert [i for i in convs if layers[i].stride == (2, 2)] == [convs[3], convs[6]]


@pytest.mark.parametrize("name", ["ebgan", "began"])
def test_the_gradient_of_the_energy_goes_through_image_and_reconstruction(name):
    D = discriminator(name).double().eval()
    x, v = (torch.randn(2, 3, 16, 16, dtype=torch.double) for _ in range(2))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(D(x).sum(), x)
    ahead, behind = D(x + 1e-5 * v).sum(), D(x - 1e-5 * v).sum()
    assert (grad * v).sum().item() == pytest.approx(((ahead - behind) / 2e-5).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["ebgan", "began"])
def test_the_gradient_of_G(name):
    """That of g_loss, with pulling-away in ebgan, through all of D."""
    flags = ["--pt-weight", 3] if name == "ebgan" else []
    run, noise, networks = open_script(name, *flags), [], []
    run.G.register_forward_hook(lambda m, inputs, out: noise.append(inputs[0]))
    run.opt_D.register_step_post_hook(
        lambda *_: networks.extend([copy.deepcopy(run.G), copy.deepcopy(run.D)])
    )
    loss_G = run.update()["loss_G"]
    G, D = networks
    x_fake = G(noise[1])
    expected = D(x_fake).mean()
    if name == "ebgan":
        expected = expected + 3 * ebgan.pulling_away(D.encoder(x_fake))
    G.zero_grad()
    expected.backward()
    assert loss_G.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(run.G.parameters(), G.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_of_D_has_its_margin_and_k():
    for name, flags in (("ebgan", ["--margin", 100]), ("began", ["--lambda-k", 0])):
        run = open_script(name, *flags)
        if name == "began":
            run.k.fill_(0.7)
        values = run.update()
        loss_D, d_real, d_fake = (values[key] for key in ("loss_D", "d_real", "d_fake"))
        expected = d_real + 100 - d_fake if name == "ebgan" else d_real - 0.7 * d_fake
        assert loss_D.item() == pytest.approx(expected.item(), rel=1e-4)
        assert d_real != d_fake


def test_the_learning_rate_of_began_halves(monkeypatch):
    """Of both networks, every --halve-every steps, and a resumed run goes on."""
    rates, step = [], torch.optim.Adam.step

    def watched_step(self, *args):
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    train("began", "run", "--steps", 5, "--lr", 0.5, "--halve-every", 3)
    train("began", "run", "--steps", 8, "--resume", small=False)
    expected = [0.5] * 3 + [0.25] * 3 + [0.125] * 2
    assert rates[::2] == expected and rates[1::2] == expected
