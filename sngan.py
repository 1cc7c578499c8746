"""SNGAN: each layer of D divided by its spectral norm, which bounds how steep D can be.

Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks.
https://arxiv.org/abs/1802.05957

    D:  min  E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]
    G:  min  -E[D(G(z))]

Differs from dcgan.py in: the hinge loss, the networks (Table 3), spectral norm in D instead of
batch norm, and the sizes of z and of a batch.

Deviations from the paper (more in docs/papers.md): one power iteration per pass of D, not per
update; batch norm after G's dense layer; no decay of the learning rate.

A run on MNIST, scored in docs/results.md:

    python sngan.py --width 16 --lr 1e-3 --beta1 0 --beta2 0.9 --steps 4100
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=128, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=64, help="base number of channels")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    return runs.parse_args(p, argv)


# networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1].

    The comments give the shapes at the default width and size. Other sizes are powers of 2.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        # 512 x 4x4; each stage halves the channels and doubles the size.
        c = width * 8
        start = image_size // 8
        layers = [nn.Linear(z_dim, c * start**2, bias=False), nn.Unflatten(1, (c, start, start))]
        layers += [nn.BatchNorm2d(c), nn.ReLU()]

        # 256 x 8x8, 128 x 16x16, 64 x 32x32
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2

        # channels x 32x32
        layers += [nn.Conv2d(c, channels, 3, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,). Each weight has a
    spectral norm of about 1."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        layers = []

        # 64 x 16x16, 128 x 8x8, 256 x 4x4
        c_in = channels
        for c in (width, width * 2, width * 4):
            layers += [spectral_norm(nn.Conv2d(c_in, c, 3, padding=1)), nn.LeakyReLU(0.1)]
            layers += [spectral_norm(nn.Conv2d(c, c, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
            c_in = c

        # 512 x 4x4, 1
        layers += [spectral_norm(nn.Conv2d(c_in, width * 8, 3, padding=1)), nn.LeakyReLU(0.1)]
        layers += [nn.Flatten(), spectral_norm(nn.Linear(width * 8 * (image_size // 8) ** 2, 1))]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x).flatten()


def spectral_norm(layer):
    """The layer with its weight divided by an estimate of its largest singular value, which one
    power iteration per pass refines (Miyato et al. 2018, Algorithm 1: one per update)."""
    # First initialise: afterwards `weight` is computed from another tensor.
    layer.apply(init_weights)
    return torch.nn.utils.parametrizations.spectral_norm(layer)


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02 (DCGAN, section 4); gains of batch norm with
    mean 1 and standard deviation 0.02, biases 0 (DCGAN's code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    if isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
    if getattr(m, "bias", None) is not None:
        nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))], from scores (N,): Miyato et al. 2018, eq. 16.
    A real image that scores above 1, or a fake below -1, no longer changes D."""
    return torch.relu(1 - d_real).mean() + torch.relu(1 + d_fake).mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Miyato et al. 2018, eq. 17."""
    return -d_fake.mean()


# training -----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks, in the layout that is faster for convolutions, and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, fused=True)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        # D: minimise d_loss, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            d_real, d_fake = D(x_real), D(x_fake)
            loss_D = d_loss(d_real, d_fake)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        loss_G = g_loss(D(G(noise(args.batch_size))))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def sample(z):
        """G's images from z in evaluation mode, in which batch norm uses its running statistics."""
        x = G.eval()(z)
        G.train()
        return x

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n)))
    if done == 0:
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = runs.steps(args, done)
    for step in progress:
        values = update()
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
