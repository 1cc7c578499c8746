"""EBGAN: D is an autoencoder that reconstructs real images well, and others badly.

Zhao, Mathieu, LeCun 2016, Energy-based Generative Adversarial Network.
https://arxiv.org/abs/1609.03126

The energy of an image is D(x) = ||Dec(Enc(x)) - x||, the norm over all its pixels. D lowers the
energies of real images, and raises those of generated ones, but not beyond the margin m. S are the
codes Enc(G(z)) of a batch, and PT, the pulling-away term, keeps them apart.

    D:  min  E[D(x)] + E[max(0, m - D(G(z)))]
    G:  min  E[D(G(z))] + pt_weight PT(S)
             PT = mean_{i != j} (S_i . S_j / (||S_i|| ||S_j||))^2

Differs from dcgan.py in: D is an autoencoder, its loss has a margin, and G's loss has the
pulling-away term.

Deviations from the paper:
- G is that of dcgan.py, D's encoder has the layers of its D, and D's decoder mirrors them. On MNIST
  the paper's networks are fully connected.
- The pulling-away term is on by default (the paper's EBGAN-PT); --pt-weight 0 leaves it out.
- Pixels are in [-1, 1]. The paper does not state its range; with [0, 1], its distances would be
  half as large. The margin is the paper's 10 of MNIST all the same, as 20 scored worse
  (docs/experiments.md).

The run on MNIST in docs/results.md:

    python ebgan.py --width 16 --steps 12000
"""

from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog="ebgan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument(
        "--width", type=runs.positive_int, default=64, help="base channels: sets size and speed"
    )
    p.add_argument("--lr", type=runs.positive_float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--margin",
        type=runs.positive_float,
        default=10.0,
        help="m: fakes with a higher energy no longer count",
    )
    p.add_argument(
        "--pt-weight",
        type=runs.non_negative_float,
        default=0.1,
        help="weight of the pulling-away term",
    )
    args = runs.parse_args(p, argv)
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2 per process: pulling-away compares images")
    return args


# ----------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1].

    The comments have the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        c = width * image_size // 8

        # 256 x 4x4
        layers = [nn.ConvTranspose2d(z_dim, c, 4, bias=False), nn.BatchNorm2d(c), nn.ReLU()]

        # 128 x 8x8, 64 x 16x16: one more stage each time the size doubles
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
    their reconstruction. `encode(x)` gives their codes, (N, 256, 4, 4) with the default width."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        c = width

        # 64 x 16x16
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        # 128 x 8x8, 256 x 4x4
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c * 2), nn.LeakyReLU(0.2)]
            c *= 2
        self.encoder = nn.Sequential(*layers).apply(init_weights)

        # 128 x 8x8, 64 x 16x16
        layers = []
        while c > width:
            layers += [nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c // 2), nn.LeakyReLU(0.2)]
            c //= 2

        # channels x 32x32
        layers += [nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.decoder = nn.Sequential(*layers).apply(init_weights)

    def encode(self, x):
        return self.encoder(x)

    def energy(self, x, code):
        """The energies (N,) of images x, from their codes."""
        return torch.linalg.vector_norm(self.decoder(code) - x, dim=(1, 2, 3))

    def forward(self, x):
        return self.energy(x, self.encode(x))


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02 (DCGAN, section 4); gains of batch norm with
    mean 1 and standard deviation 0.02, biases 0 (the authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
    if isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
    if getattr(m, "bias", None) is not None:
        nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake, margin):
    """E[D(x)] + E[max(0, margin - D(G(z)))], from energies (N,): eq. 1. The margin is for
    each fake, not for their mean, so that those beyond it have no gradient."""
    return d_real.mean() + nn.functional.relu(margin - d_fake).mean()


def g_loss(d_fake):
    """E[D(G(z))], from energies (N,): eq. 2."""
    return d_fake.mean()


def pulling_away(s):
    """PT, the mean squared cosine between the codes s (N, ...) of two different images, in [0, 1]:
    eq. 14."""
    n = len(s)
    s = nn.functional.normalize(s.flatten(1))
    squares = (s @ s.T).square()
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


# ----------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, fused=True)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = torch.randn(common.grid_size(args), args.z_dim, device=args.device)

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        d_real, d_fake = D(x_real), D(x_fake)
        loss_D = d_loss(d_real, d_fake, args.margin)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step():
        """One update of G: minimise g_loss + pt_weight * pulling_away, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        code = D.encode(x_fake)
        loss_G = g_loss(D.energy(x_fake, code)) + args.pt_weight * pulling_away(code)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step()
        return {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}

    @torch.no_grad()
    def sample(z):
        """G's images of z in evaluation mode, in which batch norm uses its running statistics."""
        x = G.eval()(z)
        G.train()
        return x

    def draw(n):
        """n images of new noise, for --generate."""
        return sample(torch.randn(n, args.z_dim, device=args.device))

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    first = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, draw)
    if first == 0:
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        values = update()
        save_due = step % args.save_every == 0 or step == args.steps

        # A loss that is not finite stops the run here, before anything is saved.
        if save_due or step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values), refresh=False)
        if save_due:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)
    runs.finish_run(args)


if __name__ == "__main__":
    main()
