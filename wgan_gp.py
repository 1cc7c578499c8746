"""WGAN-GP: the critic kept Lipschitz by a penalty on its gradient instead of clipped weights.

Gulrajani et al. 2017, Improved Training of Wasserstein GANs. https://arxiv.org/abs/1704.00028

    D:  min  E[D(G(z))] - E[D(x)] + gp_weight E[(||grad D(x_hat)||_2 - 1)^2],  x_hat = eps x + (1 - eps) G(z)
    G:  min  -E[D(G(z))]

Differs from wgan.py in: the penalty where the clipping was, D without batch norm, He's initialisation, Adam.

Adam's betas are those of the authors' gan_cifar.py (github.com/igul222/improved_wgan_training), not (0, 0.9)
as in Algorithm 1. It has 5x5 kernels of variance 4 / (fan_in + fan_out), width 128 (it suggests 64), z of 128
dimensions, and batch norm per unit after G's dense layer. Not the paper's ResNet.

    python wgan_gp.py --width 16 --lr 1e-3 --batch-size 32 --n-critic 2 --beta1 0 --steps 10000
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
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate of both optimisers")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam: decay of the mean gradient")
    p.add_argument("--beta2", type=float, default=0.9, help="Adam: decay of the mean squared gradient")
    p.add_argument("--n-critic", type=int, default=5, help="D updates per G update")
    p.add_argument("--gp-weight", type=float, default=10.0, help="lambda, the weight of the gradient penalty")
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
    args = common.parse_args(p, argv, __file__)
    if args.gp_weight < 0:
        p.error(f"--gp-weight is {args.gp_weight}: it must be 0 or more")
    return args


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
    """Images (N, channels, image_size, image_size) -> scores (N,). The paper calls it a critic."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            c *= 2
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 4))
        for conv in self.net[::2]:  # without batch norm, N(0, 0.02) would take the signal away layer by layer
            nn.init.kaiming_normal_(conv.weight, 0.2)  # He et al. 2015, eq. 15
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        return self.net(x).flatten()


def init_weights(m):
    """Weights N(0, 0.02) (DCGAN, section 4), batch norm gains N(1, 0.02) and biases 0 (its authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------ losses


def d_loss(d_real, d_fake):
    """E[D(G(z))] - E[D(x)], from scores (N,): minus the estimated distance. Arjovsky et al., Algorithm 1."""
    return d_fake.mean() - d_real.mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Arjovsky et al. 2017, Algorithm 1."""
    return -d_fake.mean()


def gradient_penalty(D, x_real, x_fake):
    """E[(||grad D(x_hat)||_2 - 1)^2] at x_hat = eps x_real + (1 - eps) x_fake, eps ~ U(0, 1) for each image
    (N, C, S, S): Gulrajani et al. 2017, eq. 3. Without batch norm the sum's gradient is each image's own."""
    eps = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)
    x_hat = (eps * x_real + (1 - eps) * x_fake).requires_grad_()
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


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
        """One update of D: minimise d_loss and the penalty, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
        d_real, d_fake = D(x_real), D(x_fake)
        loss_D = d_loss(d_real, d_fake) + args.gp_weight * gradient_penalty(D, x_real, x_fake)
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
