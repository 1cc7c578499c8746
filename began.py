"""BEGAN: D is an autoencoder, and a weight k balances its errors on real and generated images.

Berthelot, Schumm, Metz 2017, BEGAN: Boundary Equilibrium Generative Adversarial Networks.
https://arxiv.org/abs/1703.10717

The energy of an image is D(x) = mean |Dec(Enc(x)) - x|, over all its pixels.

    D:  min  E[D(x)] - k E[D(G(z))]
    G:  min  E[D(G(z))]
    k:  starts at 0, and becomes k + lambda (gamma E[D(x)] - E[D(G(z))]) after each update of G,
        but stays in [0, 1]

gamma is the ratio of the two errors, E[D(G(z))] / E[D(x)], that k aims at: a lower one gives better
but less varied images. With at most 1, G can reach it by drawing only what D reconstructs easily,
such as ones on MNIST. With 2, all ten digits appear, crudely drawn (docs/experiments.md).

Differs from ebgan.py in: the error is absolute, a weight k takes the place of the margin, and there
is no pulling-away term; the networks have no normalisation. log.csv also has k and M = E[D(x)] +
|gamma E[D(x)] - E[D(G(z))]|, the paper's measure of convergence.

The networks and the betas of Adam are those of github.com/carpedm20/BEGAN-tensorflow. Deviations
from the paper and that code:
- The learning rate halves every --halve-every steps, 100,000 as in that code. The paper lowers it
  when M no longer falls.
- D and G are updated in turn, on different noise. That code updates them at once, on the same. So k
  moves by E[D(x)] from before D's update and E[D(G(z))] from after it.
- The paper's skip connections, which are optional, are left out, as in that code.

The run on MNIST in docs/results.md:

    python began.py --width 8 --lr 4e-4 --gamma 2 --halve-every 3000 --steps 18000
"""

import math
from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog="began.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=16, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=64, help="dimensions of z")
    p.add_argument(
        "--width", type=runs.positive_int, default=64, help="base channels: sets size and speed"
    )
    p.add_argument("--lr", type=runs.positive_float, default=1e-4, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.9, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--gamma", type=runs.positive_float, default=0.5, help="E[D(G(z))] / E[D(x)] to aim at"
    )
    p.add_argument(
        "--lambda-k", type=runs.non_negative_float, default=1e-3, help="how fast k moves"
    )
    p.add_argument(
        "--halve-every",
        type=runs.positive_int,
        default=100_000,
        help="steps from one halving of the learning rate to the next",
    )
    return runs.parse_args(p, argv)


# ----------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, z_dim), uniform in [-1, 1) -> images (N, channels, image_size, image_size). G learns to
    keep them in [-1, 1], where the real ones are: there is no tanh."""

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
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
        layers = conv(channels, c) + conv(c, c) + conv(c, c)

        # 128 x 16x16, 192 x 8x8: with each halving, `width` channels more
        for _ in range(int(math.log2(image_size // 8))):
            layers += [nn.Conv2d(c, c, 3, stride=2, padding=1), nn.ELU()]
            layers += conv(c, c + width) + conv(c + width, c + width)
            c += width

        # The code has as many numbers as z.
        layers += [nn.Flatten(), nn.Linear(c * 64, z_dim)]
        layers += decoder(z_dim, width, channels, image_size)
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, x):
        return (self.net(x) - x).abs().mean((1, 2, 3))


def decoder(z_dim, width, channels, image_size):
    """The layers of G, and of D from its code (N, z_dim) to a reconstruction."""
    # 64 x 8x8
    layers = [nn.Linear(z_dim, width * 64), nn.Unflatten(1, (width, 8, 8))]
    layers += conv(width, width) + conv(width, width)

    # 64 x 16x16, 64 x 32x32
    for _ in range(int(math.log2(image_size // 8))):
        layers += [nn.Upsample(scale_factor=2)]  # repeats each pixel
        layers += conv(width, width) + conv(width, width)

    # channels x 32x32
    return [*layers, nn.Conv2d(width, channels, 3, padding=1)]


def conv(n_in, n_out):
    """A 3x3 convolution that keeps the size, and an ELU."""
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ELU()]


def init_weights(m):
    """Glorot's uniform weights and biases 0, as in the public code."""
    if isinstance(m, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(m.weight)
        nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake, k):
    """E[D(x)] - k E[D(G(z))], from energies (N,): section 3.4."""
    return d_real.mean() - k * d_fake.mean()


def g_loss(d_fake):
    """E[D(G(z))], from energies (N,): section 3.4."""
    return d_fake.mean()


@torch.no_grad()
def move_k(k, l_real, l_fake, gamma, lambda_k):
    """Moves k towards gamma E[D(x)] = E[D(G(z))], in place, and returns the measure of convergence,
    M = E[D(x)] + |gamma E[D(x)] - E[D(G(z))]|: section 3.4. `l_real` and `l_fake` are the two
    means."""
    balance = gamma * l_real - l_fake
    k.add_(lambda_k * balance).clamp_(0, 1)
    return l_real + balance.abs()


# ----------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.z_dim, args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    # A CUDA graph reads a learning rate that changes from a tensor.
    lr = torch.full((), args.lr, device=args.device)
    opt_G = torch.optim.Adam(G.parameters(), lr=lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=lr, betas=betas, fused=True)

    # The weight of D's loss on generated images. A CUDA graph needs it as a tensor.
    k = torch.zeros((), device=args.device)

    def noise(n):
        """z (n, z_dim), uniform in [-1, 1)."""
        return 2 * torch.rand(n, args.z_dim, device=args.device) - 1

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(noise(args.batch_size))
        d_real, d_fake = D(x_real), D(x_fake)
        loss_D = d_loss(d_real, d_fake, k)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(noise(args.batch_size))
        loss_G = g_loss(D(x_fake))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update():
        """One step: n_critic updates of D, each on its own minibatch, one of G, then k moves."""
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step()
        M = move_k(k, d_real, loss_G, args.gamma, args.lambda_k)
        values = {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}
        return {**values, "k": k, "M": M}

    @torch.no_grad()
    def sample(z):
        """G's images of z."""
        return G(z)

    def draw(n):
        """n images of new noise, for --generate."""
        return sample(noise(n))

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["k"] = k
    first = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, draw)
    if first == 0:
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        # The learning rate of this step.
        halvings = (step - 1) // args.halve_every
        for opt in (opt_G, opt_D):
            opt.param_groups[0]["lr"].fill_(args.lr / 2**halvings)
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
