"""Tricks: dcgan.py with nine well-known ones, each a function to copy and a flag that is off by default.

    --smooth P              one-sided label smoothing            Salimans et al. 2016, arXiv 1606.03498, 3.4
    --flip P                noisy labels                         github.com/soumith/ganhacks
    --noise STD             instance noise, fading to 0          Sonderby et al. 2016, 1610.04490
    --replay N              half of D's fakes are earlier ones   Shrivastava et al. 2016, 1612.07828, 2.3
    --feature-matching      G matches D's mean features          Salimans et al. 2016, 3.1
    --minibatch-kernels B   D compares the images of a batch     Salimans et al. 2016, 3.2
    --r1 GAMMA              flat D at real images, no batch norm Mescheder et al. 2018, 1801.04406, eq. 9
    --ema BETA              pictures by G's moving average       Yazici et al. 2018, 1806.04498
    --diffaug               all that D sees is augmented         Zhao et al. 2020, 2006.10738

Differs from dcgan.py in: these and their calls. Without flags it trains as dcgan.py does, bit for bit.

    python tricks.py --width 16 --lr 1e-3 --steps 5000 --ema 0.99
"""

import copy
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
    p.add_argument("--smooth", type=float, default=0.0, metavar="P", help="real images' target is 1 - P")
    p.add_argument("--flip", type=float, default=0.0, metavar="P", help="share of D's labels swapped")
    p.add_argument("--noise", type=float, default=0.0, metavar="STD", help="on all D sees, 0 at --steps")
    p.add_argument("--replay", type=int, default=0, metavar="N", help="earlier fakes kept, as half of D's")
    p.add_argument("--feature-matching", action="store_true", help="D's mean features as G's loss")
    p.add_argument("--minibatch-kernels", type=int, default=0, metavar="B", help="to compare images in D")
    p.add_argument("--r1", type=float, default=0.0, metavar="GAMMA", help="weight; D has no batch norm")
    p.add_argument("--ema", type=float, default=0.0, metavar="BETA", help="G's average; (n-1)/(n+9) at most")
    p.add_argument("--diffaug", action="store_true", help="augment all that D sees")
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
    for flag, top in {"smooth": 1, "flip": 1, "ema": 1, "noise": 1e3, "r1": 1e6}.items():
        if not 0 <= getattr(args, flag) < top:
            p.error(f"--{flag} is {getattr(args, flag)}: it must be 0 or more, and below {top:g}")
    if args.minibatch_kernels and (args.r1 or args.feature_matching):
        p.error("--minibatch-kernels does not go with --r1 or --feature-matching: leave one out")
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
    """Images (N, channels, image_size, image_size) -> scores (N,): the logit of "this is real"."""

    def __init__(self, width, channels, image_size, kernels, norm):
        super().__init__()
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(c * 2), nn.LeakyReLU(0.2)] if norm else [nn.LeakyReLU(0.2)]
            c *= 2
        layers += [MinibatchDiscrimination(c * 16, kernels)] if kernels else []
        self.net = nn.Sequential(*layers, nn.Conv2d(c + kernels, 1, 4)).apply(init_weights)
        for conv in () if norm else self.net[::2]:  # as in wgan_gp.py: batch norm ties images together, and
            nn.init.kaiming_normal_(conv.weight, 0.2)  # without it N(0, 0.02) takes the signal away

    def forward(self, x):
        return self.net(x).flatten()


class MinibatchDiscrimination(nn.Module):
    """Features (N, C, 4, 4) -> (N, C + kernels, 4, 4): how close each image is to the others of its batch, in
    `kernels` learnt spaces of 5 dimensions: Salimans et al. 2016, section 3.2."""

    def __init__(self, n_in, kernels):
        super().__init__()
        self.linear = nn.Linear(n_in, kernels * 5, bias=False)

    def forward(self, h):
        m = self.linear(h.flatten(1)).unflatten(1, (-1, 5))
        near = torch.exp(-(m[:, None] - m).abs().sum(3)).sum(1) - 1  # but for its distance to itself
        return torch.cat([h, near[:, :, None, None].expand(-1, -1, 4, 4)], 1)


def init_weights(m):
    """Weights N(0, 0.02) (DCGAN, section 4), batch norm gains N(1, 0.02) and biases 0 (its authors' code)."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------ losses


def d_loss(d_real, d_fake, smooth=0.0, flip=0.0):
    """Cross entropy of scores (N,), with the target 1 - `smooth` for what is labelled real and 0 for fakes
    (Salimans et al. 2016, section 3.4), and a share `flip` of the labels swapped."""
    log = nn.functional.logsigmoid
    y_real = (1 - smooth) * flipped(torch.ones_like(d_real), flip)
    y_fake = (1 - smooth) * flipped(torch.zeros_like(d_fake), flip)
    loss_real = -(y_real * log(d_real) + (1 - y_real) * log(-d_real)).mean()
    return loss_real - (y_fake * log(d_fake) + (1 - y_fake) * log(-d_fake)).mean()


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): non-saturating, Goodfellow et al. 2014, section 3."""
    return -nn.functional.logsigmoid(d_fake).mean()


# ------------------------------------------------------------------------------------------------ tricks


def flipped(y, p):
    """Labels of 0 and 1 (N,), each swapped with probability p: the ganhacks list."""
    return torch.where(torch.rand_like(y) < p, 1 - y, y) if p else y


def r1_penalty(D, x_real):
    """E[||grad D(x)||^2] at real images (N, C, S, S), each one's own: Mescheder et al. 2018, eq. 9."""
    x_real = x_real.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_real).sum(), x_real, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


def feature_distance(D, x_real, x_fake):
    """||E[f(x_real)] - E[f(x_fake)]||^2, summed over D's activations f: Salimans et al. 2016, section 3.1,
    of one f; the sum is common practice. Of the images only the fakes get a gradient."""
    distance, real, fake = 0, x_real.detach(), x_fake
    for layer in D.net[:-1]:
        real, fake = layer(real), layer(fake)
        if isinstance(layer, nn.LeakyReLU):
            distance = distance + (real.mean(0).detach() - fake.mean(0)).square().sum()
    return distance


def replayed(pool, x_fake):
    """Half of the fakes (N, C, S, S), and as many random ones of `pool` (M, C, S, S), or all. That half
    then takes random places in the pool: Shrivastava et al. 2016, section 2.3."""
    n = min(len(x_fake) // 2, len(pool))
    drawn, left = (torch.rand(len(pool), device=pool.device).argsort()[:n] for _ in range(2))
    earlier, pool[left] = pool[drawn], x_fake[-n:]
    return torch.cat([earlier, x_fake[n:]])


def move_average(average, G, beta):
    """average = beta average + (1 - beta) G, weights and batch norm's statistics: Yazici et al. 2018."""
    for a, p in zip(average.state_dict().values(), G.state_dict().values(), strict=True):
        a.copy_(beta * a + (1 - beta) * p)


def diffaug(x):
    """Images (N, C, S, S), each in its own colours, shifted by up to S / 8, with a grey hole of side S / 2,
    differentiably: Zhao et al. 2020, section 3.2, and github.com/mit-han-lab/data-efficient-gans."""
    n, _, s, _ = x.shape
    brightness, saturation, contrast = torch.rand(3, n, 1, 1, 1, device=x.device)
    x = x + brightness - 0.5
    x = x.mean(1, keepdim=True).lerp(x, 2 * saturation)
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, contrast + 0.5)
    side, which = torch.arange(s, device=x.device), torch.arange(n, device=x.device)[:, None, None]
    rows, columns = side + torch.randint(-(s // 8), s // 8 + 1, (2, n, 1), device=x.device)
    x = x.permute(0, 2, 3, 1)[which, rows.clamp(0, s - 1)[:, :, None], columns.clamp(0, s - 1)[:, None]]
    away = side - torch.randint(s + 1, (2, n, 1), device=x.device)  # from the hole's middle
    seen, hole = [(k >= 0) & (k < s) for k in (rows, columns)], [(-s <= 4 * k) & (4 * k < s) for k in away]
    seen, hole = (down[:, :, None] & across[:, None] for down, across in (seen, hole))
    return x.permute(0, 3, 1, 2) * (seen & ~hole)[:, None]


# ---------------------------------------------------------------------------------------------- training


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    data = common.load_data(args)

    G = Generator(args.z_dim, args.width, data.channels, args.image_size).to(device)
    kernels, norm = args.minibatch_kernels, not args.r1
    D = Discriminator(args.width, data.channels, args.image_size, kernels, norm).to(device)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)
    fixed_z = torch.randn(64, args.z_dim, device=device)
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    fade = torch.ones((), device=device)  # of the instance noise, to 0 at the last step
    drawn = state["average"] = copy.deepcopy(G) if args.ema else G

    def shown(x):  # what D sees of images
        x = diffaug(x) if args.diffaug else x
        return x + args.noise * fade * torch.randn_like(x) if args.noise else x

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
            x_fake = replayed(state["pool"], x_fake) if args.replay else x_fake
        d_real, d_fake = D(shown(x_real)), D(shown(x_fake))
        loss_D = d_loss(d_real, d_fake, args.smooth, args.flip)
        loss_D += args.r1 / 2 * r1_penalty(lambda x: D(shown(x)), x_real) if args.r1 else 0
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step(x_real):
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=device))
        if args.feature_matching:
            loss_G = feature_distance(D, shown(x_real), shown(x_fake))
        else:
            loss_G = g_loss(D(shown(x_fake)))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    @torch.no_grad()
    def sample(z):
        """G's images of z in evaluation mode: batch norm uses its running statistics."""
        x = drawn.eval()(z)
        G.train()
        return x

    def save(step):
        common.save_grid(args, step, sample(fixed_z))
        common.save_checkpoint(args, step, state)

    if args.replay:
        state["pool"] = sample(torch.randn(args.replay, args.z_dim, device=device))
    if args.generate:
        return common.generate(args, state, lambda n: sample(torch.randn(n, args.z_dim, device=device)))
    first = common.open_run(args, state)
    save(first)
    d_step, g_step = common.cuda_graphs(args, d_step, g_step)
    batches = common.batches(args, data, first * args.n_critic)
    for step, log_due, save_due in common.steps(args, first):
        fade.fill_(1 - step / args.steps)
        for _ in range(args.n_critic):
            x_real, _ = next(batches)
            loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step(x_real)
        if args.ema:
            move_average(drawn, G, min(args.ema, (step - 1) / (step + 9)))  # 0 at first, with nothing to keep
        if log_due:
            common.log(args, step, loss_D=loss_D, loss_G=loss_G, d_real=d_real, d_fake=d_fake)
        if save_due:
            save(step)


if __name__ == "__main__":
    main()
