"""WGAN-GP: D kept Lipschitz by a penalty on its gradient instead of clipped weights.

Gulrajani et al. 2017, Improved Training of Wasserstein GANs. https://arxiv.org/abs/1704.00028

    D:  min  E[D(G(z))] - E[D(x)] + gp_weight E[(||grad D(x_hat)||_2 - 1)^2]
             with x_hat = eps x + (1 - eps) G(z), eps ~ U(0, 1)
    G:  min  -E[D(G(z))]

Differs from wgan.py in: the penalty where the clipping was, D without batch norm, He's
initialisation in D, Adam, and the learning rate.

Deviations from the paper (more in docs/papers.md):
- Adam's betas are those of the authors' code for CIFAR-10, not (0, 0.9) as in Algorithm 1.
- The networks are convolutional; the paper's best ones on CIFAR-10 are ResNets.

A run on MNIST, scored in docs/results.md:

    python wgan_gp.py --width 16 --lr 1e-3 --batch-size 32 --n-critic 2 --beta1 0 --steps 12900
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
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.9, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=5, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--gp-weight", type=float, default=10.0, help="weight of the gradient penalty")
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
    """Images (N, channels, image_size, image_size) -> scores (N,). The paper calls it a critic."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 64 x 16x16; each further stage doubles the channels and halves the size.
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        # 128 x 8x8, 256 x 4x4
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            c *= 2

        # 1 x 1x1
        layers += [nn.Conv2d(c, 1, 4)]
        self.net = nn.Sequential(*layers)

        # He et al. 2015, eq. 15. Without batch norm, N(0, 0.02) would shrink the signal.
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, 0.2)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.net(x).flatten()


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02 (DCGAN, section 4); gains of batch norm with
    mean 1 and standard deviation 0.02, biases 0 (DCGAN's code)."""
    if isinstance(m, nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    if isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
    if getattr(m, "bias", None) is not None:
        nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """E[D(G(z))] - E[D(x)], from scores (N,): minus an estimate of the Wasserstein distance, up to
    a factor. Arjovsky et al. 2017, Algorithm 1."""
    return d_fake.mean() - d_real.mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Arjovsky et al. 2017, Algorithm 1."""
    return -d_fake.mean()


def gradient_penalty(D, x_real, x_fake):
    """E[(||grad D(x_hat)||_2 - 1)^2] at x_hat = eps x_real + (1 - eps) x_fake, with one eps ~
    U(0, 1) per image, for images (N, C, S, S): Gulrajani et al. 2017, eq. 3. D must score each
    image by itself (no batch norm), so that the gradient of the sum is that of each score."""
    eps = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)
    x_hat = (eps * x_real + (1 - eps) * x_fake).detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


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
        # D: minimise d_loss and the penalty, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            d_real, d_fake = D(x_real), D(x_fake)
            penalty = gradient_penalty(D, x_real, x_fake)
            loss_D = d_loss(d_real, d_fake) + args.gp_weight * penalty
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
