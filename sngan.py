"""SNGAN: every layer of D divided by its spectral norm, which bounds how steep D can be, at no extra pass.

Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks.
https://arxiv.org/abs/1802.05957

    D:  min  E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]
    G:  min  -E[D(G(z))]

Differs from wgan_gp.py in: the hinge loss, the networks of the paper's Table 3, spectral norm on every layer
of D where the gradient penalty was, N(0, 0.02) in D again, one D update per G update, and Adam's settings.

D's widths are those of Table 3; the lab's pfnet-research/chainer-gan-lib doubles them one layer earlier.
Optimiser: setting C of Table 1. The paper's main loss is cross entropy (eq. 15); hinge, eqs. 16 and 17, gave
its standard CNN the better FID (Table 2). Deviations from the paper: batch norm and ReLU after G's dense
layer too, as in that code, but per channel; one power iteration in every forward pass of D, as in that code,
where Algorithm 1 has one per update. The authors' pfnet-research/sngan_projection also has, for CIFAR-10, a
rate that falls linearly to 0, twice D's batch for G, and dequantised pixels. Spectral norm bounds D's slope
up to a factor: it is taken of the weight as a matrix, not of the convolution.

    python sngan.py --width 16 --lr 1e-3 --beta1 0 --beta2 0.9 --steps 2900
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import common
import torch
from torch import nn


def parse_args(argv=None):
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch-size", type=int, default=64, help="images per update")
    p.add_argument("--z-dim", type=int, default=128, help="dimensions of the noise z")
    p.add_argument("--width", type=int, default=64, help="channels of the layer next to the image")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate of both optimisers")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam: decay of the mean gradient")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam: decay of the mean squared gradient")
    p.add_argument("--n-critic", type=int, default=1, help="D updates per G update")
    p.add_argument("--dataset", default="mnist", help="mnist, fashion-mnist, cifar10, digits, or a folder")
    p.add_argument("--data-dir", default="data", help="where datasets are looked for and downloaded to")
    p.add_argument("--image-size", type=int, default=32, help="side in pixels: 16, 32, 64, ... 1024")
    p.add_argument("--steps", type=int, default=20_000, help="generator updates")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same run")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1, ...")
    p.add_argument("--out-dir", default="runs/{script}-{dataset}", help="this run's folder")
    p.add_argument("--log-every", type=int, default=50, help="steps between rows of log.csv")
    p.add_argument("--save-every", type=int, default=500, help="steps between grids and checkpoints")
    p.add_argument("--resume", action="store_true", help="continue the run in --out-dir")
    p.add_argument("--generate", type=int, metavar="N", help="write N images from the run in --out-dir, stop")
    p.add_argument("--tensorboard", action="store_true", help="also log there, into --out-dir")
    p.add_argument("--cuda-graph", action="store_true", help="on CUDA: replay both steps as graphs")
    return common.parse_args(p, argv, __file__)


# ---------------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        c, s = width * 8, image_size // 8
        layers = [nn.Linear(z_dim, c * s * s, bias=False), nn.Unflatten(1, (c, s, s))]
        layers += [nn.BatchNorm2d(c), nn.ReLU()]
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2
        layers += [nn.Conv2d(c, channels, 3, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,). Every weight has spectral norm about 1."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        layers, c_in = [], channels
        for c in (width, width * 2, width * 4):
            layers += [sn(nn.Conv2d(c_in, c, 3, padding=1)), nn.LeakyReLU(0.1)]
            layers += [sn(nn.Conv2d(c, c, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
            c_in = c
        layers += [sn(nn.Conv2d(c_in, width * 8, 3, padding=1)), nn.LeakyReLU(0.1)]
        layers += [nn.Flatten(), sn(nn.Linear(width * 8 * (image_size // 8) ** 2, 1))]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x).flatten()


def sn(layer):
    """The layer, its weight divided by an estimate of its largest singular value: Algorithm 1, at every pass.
    Initialised first: once wrapped, `weight` is computed, and filling it would do nothing."""
    return torch.nn.utils.parametrizations.spectral_norm(layer.apply(init_weights))


def init_weights(m):
    """Weights N(0, 0.02) (DCGAN, section 4), batch norm gains N(1, 0.02) and biases 0 (its authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------ losses


def d_loss(d_real, d_fake):
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))], from scores (N,): Miyato et al. 2018, eq. 16."""
    return torch.relu(1 - d_real).mean() + torch.relu(1 + d_fake).mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Miyato et al. 2018, eq. 17."""
    return -d_fake.mean()


# ---------------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = common.load_data(args)

    G = Generator(args.z_dim, args.width, data.channels, args.image_size).to(device)
    D = Discriminator(args.width, data.channels, args.image_size).to(device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    fixed_z = torch.randn(64, args.z_dim, device=device)
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
        d_real, d_fake = D(x_real), D(x_fake)
        loss_D = d_loss(d_real, d_fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
        loss_G = g_loss(D(x_fake))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    @torch.no_grad()
    def sample(z):
        """G's images of z in evaluation mode: batch norm uses its running statistics."""
        x = G.eval()(z)
        G.train()
        return x

    def save(step):
        common.save_grid(args, step, sample(fixed_z))
        common.save_checkpoint(args, step, state)

    if args.generate:
        return common.generate(args, state, lambda n: sample(torch.randn(n, args.z_dim, device=device)))
    first = common.open_run(args, state)
    save(first)
    d_step, g_step = common.cuda_graphs(args, d_step, g_step)
    batches = common.batches(args, data, first * args.n_critic)
    for step, log_due, save_due in common.steps(args, first):
        for _ in range(args.n_critic):
            x_real, _ = next(batches)
            loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step()
        if log_due:
            common.log(args, step, loss_D=loss_D, loss_G=loss_G, d_real=d_real, d_fake=d_fake)
        if save_due:
            save(step)


if __name__ == "__main__":
    main()
