"""EBGAN: D is an autoencoder that reconstructs real images well, and others badly.

Zhao, Mathieu, LeCun 2016, Energy-based Generative Adversarial Network.
https://arxiv.org/abs/1609.03126

The energy of an image is D(x) = ||Dec(Enc(x)) - x||, the norm over all its pixels. D lowers the
energies of real images, and raises those of fakes, but not beyond the margin m. PT, the
pulling-away term, makes the codes S = Enc(G(z)) of a batch point in different directions, so that
G does not draw one image again and again.

    D:  min  E[D(x)] + E[max(0, m - D(G(z)))]
    G:  min  E[D(G(z))] + pt_weight PT(S)
             PT = mean_{i != j} (S_i . S_j / (||S_i|| ||S_j||))^2

Differs from dcgan.py in: D is an autoencoder, whose encoder is dcgan.py's D without its last
layer; the two losses; the batch size and the learning rate.

Deviations from the paper (more in docs/papers.md): the networks are convolutional; the paper's for
MNIST are fully connected. The margin is the paper's 10 for MNIST, with pixels in [-1, 1]; the paper
does not state the range of its pixels.

A run on MNIST, scored in docs/results.md:

    python ebgan.py --width 16 --steps 10500
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
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=64, help="base number of channels")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument(
        "--margin", type=float, default=10.0, help="m: energy above which fakes are left alone"
    )
    p.add_argument("--pt-weight", type=float, default=0.1, help="weight of the pulling-away term")
    args = runs.parse_args(p, argv)
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2 per process: pulling-away compares images")
    return args


# networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1].

    The comments give the shapes at the default width and size. Other sizes are powers of 2.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        # c channels at 4x4; each stage halves them and doubles the size.
        c = width * image_size // 8

        # 256 x 4x4
        layers = [nn.ConvTranspose2d(z_dim, c, 4, bias=False), nn.BatchNorm2d(c), nn.ReLU()]

        # 128 x 8x8, 64 x 16x16
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2

        # channels x 32x32
        layers += [nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> energies (N,), at least 0: the distance from
    their reconstruction. `encoder(x)` gives their codes, (N, 256, 4, 4) at the default width
    and size."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 64 x 16x16; each further stage doubles the channels and halves the size.
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        # 128 x 8x8, 256 x 4x4
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c * 2), nn.LeakyReLU(0.2)]
            c *= 2
        self.encoder = nn.Sequential(*layers).apply(init_weights)

        # And back: 128 x 8x8, 64 x 16x16
        layers = []
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.LeakyReLU(0.2)]
            c //= 2

        # channels x 32x32
        layers += [nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.decoder = nn.Sequential(*layers).apply(init_weights)

    def energy(self, x, code):
        """The energies (N,) of images x, from their codes."""
        return torch.linalg.vector_norm(self.decoder(code) - x, dim=(1, 2, 3))

    def forward(self, x):
        return self.energy(x, self.encoder(x))


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02 (DCGAN, section 4); gains of batch norm with
    mean 1 and standard deviation 0.02, biases 0 (DCGAN's code)."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    if isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
    if getattr(m, "bias", None) is not None:
        nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake, margin):
    """E[D(x)] + E[max(0, margin - D(G(z)))], from energies (N,): Zhao et al. 2016, eq. 1. The
    margin is for each fake, not for their mean, so those beyond it have no gradient."""
    return d_real.mean() + nn.functional.relu(margin - d_fake).mean()


def g_loss(d_fake):
    """E[D(G(z))], from energies (N,): Zhao et al. 2016, eq. 2."""
    return d_fake.mean()


def pulling_away(s):
    """PT, from 0 to 1: the mean squared cosine between the codes s (N, ...) of different images:
    Zhao et al. 2016, eq. 14."""
    n = len(s)
    s = nn.functional.normalize(s.flatten(1))
    squares = (s @ s.T).square()
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


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
        # D: minimise d_loss, with G fixed. Real and fake images go through D separately, because
        # batch norm must not mix them.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            d_real, d_fake = D(x_real), D(x_fake)
            loss_D = d_loss(d_real, d_fake, args.margin)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss and the pulling-away term, with D fixed.
        D.requires_grad_(False)
        x_fake = G(noise(args.batch_size))
        code = D.encoder(x_fake)
        loss_G = g_loss(D.energy(x_fake, code)) + args.pt_weight * pulling_away(code)
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
