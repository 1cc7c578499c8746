"""Conditional GAN: the class is an input of both networks, so that it can be asked for.

Mirza, Osindero 2014, Conditional Generative Adversarial Nets. https://arxiv.org/abs/1411.1784

    D:  max  E[log sigmoid(D(x, y))] + E[log(1 - sigmoid(D(G(z, y), y)))]
    G:  max  E[log sigmoid(D(G(z, y), y))]

Differs from dcgan.py in: y, one-hot, joined to z in G and to the image as extra channels in D; the grid has
one class per column.

Deviations from the paper: dcgan.py's loss of G and its convolutional networks, where the paper has fully
connected ones, maxout in D, and dropout of 0.5 in both; Adam where it has SGD with momentum and a decaying
rate, in batches of 100; z is N(0, I), not uniform.

    python cgan.py --width 16 --lr 1e-3 --batch-size 64 --steps 12000
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import common
import torch
from torch import nn


def parse_args(argv=None):
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch-size", type=int, default=128, help="images per update")
    p.add_argument("--z-dim", type=int, default=100, help="dimensions of the noise z")
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
    p.add_argument("--label", type=int, metavar="K", help="--generate images of class K alone")
    p.add_argument("--tensorboard", action="store_true", help="also log there, into --out-dir")
    p.add_argument("--cuda-graph", action="store_true", help="on CUDA: replay both steps as graphs")
    return common.parse_args(p, argv, __file__)


# ---------------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, z_dim), y (N,) -> images (N, channels, image_size, image_size) in [-1, 1] of the classes y."""

    def __init__(self, z_dim, width, channels, image_size, n_classes):
        super().__init__()
        self.register_buffer("one_hot", torch.eye(n_classes))
        c = width * image_size // 8  # at 4x4; halved by every stage, and `width` before the last
        layers = [nn.ConvTranspose2d(z_dim + n_classes, c, 4, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2
        layers += [nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z, y):
        return self.net(torch.cat([z, self.one_hot[y]], 1)[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size), y (N,) -> scores (N,): the logit of "a real y"."""

    def __init__(self, width, channels, image_size, n_classes):
        super().__init__()
        self.register_buffer("one_hot", torch.eye(n_classes))
        c = width
        layers = [nn.Conv2d(channels + n_classes, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c * 2), nn.LeakyReLU(0.2)]
            c *= 2
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 4)).apply(init_weights)

    def forward(self, x, y):
        y = self.one_hot[y][:, :, None, None].expand(-1, -1, *x.shape[2:])  # one constant channel per class
        return self.net(torch.cat([x, y], 1)).flatten()


def init_weights(m):
    """Weights N(0, 0.02) (DCGAN, section 4), batch norm gains N(1, 0.02) and biases 0 (its authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------ losses


def d_loss(d_real, d_fake):
    """-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))], scores (N,): Goodfellow et al. 2014, eq. 1."""
    return -nn.functional.logsigmoid(d_real).mean() - nn.functional.logsigmoid(-d_fake).mean()


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): non-saturating, Goodfellow et al. 2014, section 3."""
    return -nn.functional.logsigmoid(d_fake).mean()


# ---------------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = common.load_data(args, labelled=True)

    G = Generator(args.z_dim, args.width, data.channels, args.image_size, data.n_classes).to(device)
    D = Discriminator(args.width, data.channels, args.image_size, data.n_classes).to(device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    fixed_y = torch.arange(data.n_classes, device=device)[:16].repeat(8)  # a class per column, 16 at most
    fixed_z = torch.randn(len(fixed_y), args.z_dim, device=device)
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}

    def d_step(x_real, y):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device), y)
        d_real, d_fake = D(x_real, y), D(x_fake, y)
        loss_D = d_loss(d_real, d_fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step(y):
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device), y)
        loss_G = g_loss(D(x_fake, y))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    @torch.no_grad()
    def sample(z, y):
        """G's images of z and y in evaluation mode: batch norm uses its running statistics."""
        x = G.eval()(z, y)
        G.train()
        return x

    def save(step):
        common.save_grid(args, step, sample(fixed_z, fixed_y), columns=len(fixed_y) // 8)
        common.save_checkpoint(args, step, state)

    if args.generate:
        return common.generate(args, state, lambda n, y: sample(torch.randn(n, args.z_dim, device=device), y))
    first = common.open_run(args, state)
    save(first)
    d_step, g_step = common.cuda_graphs(args, d_step, g_step)
    batches = common.batches(args, data, first * args.n_critic)
    for step, log_due, save_due in common.steps(args, first):
        for _ in range(args.n_critic):
            x_real, y = next(batches)
            loss_D, d_real, d_fake = d_step(x_real, y)
        loss_G = g_step(y)
        if log_due:
            common.log(args, step, loss_D=loss_D, loss_G=loss_G, d_real=d_real, d_fake=d_fake)
        if save_due:
            save(step)


if __name__ == "__main__":
    main()
