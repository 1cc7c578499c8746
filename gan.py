"""GAN: the original adversarial game, with fully connected networks.

Goodfellow et al. 2014, Generative Adversarial Networks. https://arxiv.org/abs/1406.2661

    D:  min  -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))]
    G:  min  -E[log sigmoid(D(G(z)))]    (--saturating: E[log(1 - sigmoid(D(G(z))))])

Read dcgan.py beside this: the same losses, but convolutional networks.

The paper leaves sizes open; layers, maxout and dropout are those of the authors' mnist.yaml.
Deviations from it (more in docs/papers.md):
- Adam with a learning rate of 1e-3, not SGD with momentum and a rate that decays from 0.1.
- z is N(0, I), not uniform. G ends in tanh, and D maps its images back to [0, 1].

A run on MNIST, scored in docs/results.md:

    python gan.py --width 800 --steps 18700
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=100, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=1200, help="units of G's layers")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--saturating", action="store_true", help="G's loss of the paper's eq. 1")
    return runs.parse_args(p, argv)


# networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1].

    The comments give the number of units at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        layers = [nn.Linear(z_dim, width), nn.ReLU()]  # 1200
        layers += [nn.Linear(width, width), nn.ReLU()]  # 1200
        layers += [nn.Linear(width, channels * image_size**2), nn.Tanh()]  # channels * 32 * 32
        layers += [nn.Unflatten(1, (channels, image_size, image_size))]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z)


class Maxout(nn.Module):
    """(N, n_in) -> (N, n_out), each output the largest of 5 linear functions: arXiv 1302.4389."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out * 5)

    def forward(self, x):
        return self.linear(x).unflatten(1, (5, -1)).amax(1)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,): the logit of "this is real"."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        units = max(1, width // 5)  # 240 at the default width, as in the authors' code
        layers = [nn.Flatten(), nn.Dropout(0.2)]  # channels * 32 * 32
        layers += [Maxout(channels * image_size**2, units), nn.Dropout(0.5)]  # 240
        layers += [Maxout(units, units), nn.Dropout(0.5)]  # 240
        layers += [nn.Linear(units, 1)]  # 1
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, x):
        x = (x + 1) / 2  # to [0, 1], so that a dropped pixel is black and not grey
        return self.net(x).flatten()


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02, biases 0."""
    if isinstance(m, nn.Linear):
        nn.init.normal_(m.weight, 0.0, 0.02)
        nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))], from scores (N,): Goodfellow et al.
    2014, eq. 1."""
    return -nn.functional.logsigmoid(d_real).mean() - nn.functional.logsigmoid(-d_fake).mean()


def g_loss(d_fake, saturating=False):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate. With `saturating`, E[log(1 - sigmoid(D(G(z))))]: G's side of eq. 1. Its slope
    at a score s is -sigmoid(s), which vanishes where D is sure (s very negative)."""
    if saturating:
        return nn.functional.logsigmoid(-d_fake).mean()
    return -nn.functional.logsigmoid(d_fake).mean()


# training -----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device)
    D = D.to(args.device)
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
        loss_G = g_loss(D(G(noise(args.batch_size))), args.saturating)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def sample(z):
        """G's images from z."""
        return G(z)

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
