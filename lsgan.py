"""LSGAN: least squares instead of cross entropy, so that fakes D takes for real still get a gradient.

Mao et al. 2016, Least Squares Generative Adversarial Networks. https://arxiv.org/abs/1611.04076

    D:  min  1/2 E[(D(x) - b)^2] + 1/2 E[(D(G(z)) - a)^2]
    G:  min  1/2 E[(D(G(z)) - c)^2]

Differs from dcgan.py in: the two losses, --a --b --c, and the batch size.

Deviations from the paper: dcgan.py's networks at 32 px, where the paper has 112 px and a deeper G. The
authors' train_lsun.py (github.com/xudonmao/LSGAN) has a learning rate of 1e-3 and a uniform z of 1024.

    python lsgan.py --width 16 --lr 1e-3 --batch-size 128 --steps 7000
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import common
import torch
from torch import nn


def parse_args(argv=None):
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch-size", type=int, default=64, help="images per update")
    p.add_argument("--z-dim", type=int, default=100, help="dimensions of the noise z")
    p.add_argument("--width", type=int, default=64, help="channels of the layer next to the image")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate of both optimisers")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam: decay of the mean gradient")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam: decay of the mean squared gradient")
    p.add_argument("--n-critic", type=int, default=1, help="D updates per G update")
    p.add_argument("--a", type=float, default=0.0, help="what D aims at for fakes")
    p.add_argument("--b", type=float, default=1.0, help="what D aims at for real images")
    p.add_argument("--c", type=float, default=1.0, help="what G wants D to say of its fakes")
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
        c = width * image_size // 8  # at 4x4; halved by every stage, and `width` before the last
        layers = [nn.ConvTranspose2d(z_dim, c, 4, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2
        layers += [nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,): real images near b, fakes near a."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c * 2), nn.LeakyReLU(0.2)]
            c *= 2
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 4)).apply(init_weights)

    def forward(self, x):
        return self.net(x).flatten()


def init_weights(m):
    """Weights N(0, 0.02) (DCGAN, section 4), batch norm gains N(1, 0.02) and biases 0 (its authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------ losses


def d_loss(d_real, d_fake, a=0.0, b=1.0):
    """1/2 E[(D(x) - b)^2] + 1/2 E[(D(G(z)) - a)^2], from scores (N,): Mao et al. 2016, eq. 2."""
    return 0.5 * ((d_real - b) ** 2).mean() + 0.5 * ((d_fake - a) ** 2).mean()


def g_loss(d_fake, c=1.0):
    """1/2 E[(D(G(z)) - c)^2], from scores (N,): Mao et al. 2016, eq. 2."""
    return 0.5 * ((d_fake - c) ** 2).mean()


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
        loss_D = d_loss(d_real, d_fake, args.a, args.b)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
        loss_G = g_loss(D(x_fake), args.c)
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
