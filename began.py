"""BEGAN: D is an autoencoder, and a weight k balances its errors on real and generated images.

Berthelot, Schumm, Metz 2017, BEGAN: Boundary Equilibrium Generative Adversarial Networks.
https://arxiv.org/abs/1703.10717

The energy of an image is D(x) = mean |Dec(Enc(x)) - x|, over all its pixels.

    D:  min  E[D(x)] - k E[D(G(z))]
    G:  min  E[D(G(z))]
    k:  starts at 0, and becomes k + lambda (gamma E[D(x)] - E[D(G(z))]) after each update of G,
        but stays in [0, 1]

gamma is the ratio of the two errors, E[D(G(z))] / E[D(x)], that k aims at: a lower one gives better
but less varied images. With a gamma of at most 1, G can reach it by drawing only what D
reconstructs easily, such as ones on MNIST. With 2, nearly all digits appear, crudely drawn
(docs/experiments.md).

Differs from ebgan.py in: the error is absolute, k takes the place of the margin, and there is no
pulling-away term; the networks have other layers, no normalisation and no tanh; z is uniform; the
learning rate halves; and the defaults. k is logged, too, and so is M, the paper's measure of
convergence.

Deviations from the paper (more in docs/papers.md): the learning rate halves every --halve-every
steps, not when M no longer falls; no skip connections.

A run on MNIST, scored in docs/results.md:

    python began.py --width 8 --lr 4e-4 --gamma 2 --halve-every 3000 --steps 14500
"""

import math
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=16, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=64, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=64, help="base number of channels")
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.9, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--gamma", type=float, default=0.5, help="E[D(G(z))] / E[D(x)] to aim at")
    p.add_argument("--lambda-k", type=float, default=1e-3, help="how fast k moves")
    p.add_argument(
        "--halve-every",
        type=runs.positive_int,
        default=100_000,
        help="steps from one halving of the learning rate to the next",
    )
    return runs.parse_args(p, argv)


# networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, z_dim), uniform in [-1, 1) -> images (N, channels, image_size, image_size). G learns to
    keep them in [-1, 1], where the real ones are: there is no tanh.

    The comments give the shapes at the default width and size. Other sizes are powers of 2.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        layers = decoder(z_dim, width, channels, image_size)
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> energies (N,), at least 0: the mean absolute
    error of their reconstruction."""

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        # 64 x 32x32
        c = width
        layers = conv_elu(channels, c) + conv_elu(c, c) + conv_elu(c, c)

        # 128 x 16x16, 192 x 8x8: with each halving, `width` channels more
        for _ in range(int(math.log2(image_size // 8))):
            layers += [nn.Conv2d(c, c, 3, stride=2, padding=1), nn.ELU()]
            layers += conv_elu(c, c + width) + conv_elu(c + width, c + width)
            c += width

        # The code has as many numbers as z.
        layers += [nn.Flatten(), nn.Linear(c * 8 * 8, z_dim)]
        layers += decoder(z_dim, width, channels, image_size)
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, x):
        return (self.net(x) - x).abs().mean((1, 2, 3))


def decoder(z_dim, width, channels, image_size):
    """The layers of G, and of D from its code (N, z_dim) to a reconstruction."""
    # 64 x 8x8
    layers = [nn.Linear(z_dim, width * 8 * 8), nn.Unflatten(1, (width, 8, 8))]
    layers += conv_elu(width, width) + conv_elu(width, width)

    # 64 x 16x16, 64 x 32x32
    for _ in range(int(math.log2(image_size // 8))):
        layers += [nn.Upsample(scale_factor=2)]  # repeats each pixel
        layers += conv_elu(width, width) + conv_elu(width, width)

    # channels x 32x32
    return [*layers, nn.Conv2d(width, channels, 3, padding=1)]


def conv_elu(n_in, n_out):
    """A 3x3 convolution that keeps the size, and an ELU."""
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ELU()]


def init_weights(m):
    """Glorot's uniform weights and biases 0, as in carpedm20/BEGAN-tensorflow."""
    if isinstance(m, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(m.weight)
        nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake, k):
    """E[D(x)] - k E[D(G(z))], from energies (N,): Berthelot et al. 2017, section 3.4."""
    return d_real.mean() - k * d_fake.mean()


def g_loss(d_fake):
    """E[D(G(z))], from energies (N,): Berthelot et al. 2017, section 3.4."""
    return d_fake.mean()


# training -----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks, in the layout that is faster for convolutions, and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.z_dim, args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    # The learning rate changes, so a CUDA graph needs it as a tensor.
    lr = torch.full((), args.lr, device=args.device)
    opt_G = torch.optim.Adam(G.parameters(), lr=lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=lr, betas=betas, fused=True)

    # The weight of D's loss on generated images, a tensor for the same reason.
    k = torch.zeros((), device=args.device)

    def noise(n):
        """n draws of z, uniform in [-1, 1)."""
        return 2 * torch.rand(n, args.z_dim, device=args.device) - 1

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G; then k
        moves."""
        # D: minimise d_loss, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            d_real, d_fake = D(x_real), D(x_fake)
            loss_D = d_loss(d_real, d_fake, k)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        loss_G = g_loss(D(G(noise(args.batch_size))))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()

        # k moves so that E[D(G(z))] stays at gamma E[D(x)]; M measures convergence (section 3.4).
        with torch.no_grad():
            balance = args.gamma * d_real.mean() - loss_G
            k.add_(args.lambda_k * balance).clamp_(0, 1)
            M = d_real.mean() + balance.abs()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores, "k": k, "M": M}

    @torch.no_grad()
    def sample(z):
        """G's images from z."""
        return G(z)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["k"] = k
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n)))
    if done == 0:
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = runs.steps(args, done)
    for step in progress:
        # The learning rate of this step. After --resume, each optimiser has a tensor of its own.
        halvings = (step - 1) // args.halve_every
        for opt in (opt_G, opt_D):
            opt.param_groups[0]["lr"].fill_(args.lr / 2**halvings)
        values = update()
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
