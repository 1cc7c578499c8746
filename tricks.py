"""Tricks: dcgan.py with ten well-known training tricks, each one flag, off by default.

    --smooth P              one-sided label smoothing     Salimans et al. 2016, 1606.03498, 3.4
    --flip P                noisy labels                  github.com/soumith/ganhacks
    --noise STD             instance noise, fading out    Sønderby et al. 2016, 1610.04490
    --replay N              half of D's fakes are old     Shrivastava et al. 2016, 1612.07828, 2.3
    --feature-matching      G matches D's mean features   Salimans et al. 2016, 3.1
    --minibatch-kernels B   D compares images             Salimans et al. 2016, 3.2
    --r1 GAMMA              penalty on D's gradient       Mescheder et al. 2018, 1801.04406, eq. 9
    --ema BETA              images from an average of G   Yazici et al. 2018, 1806.04498
    --diffaug POLICY        all that D sees is augmented  Zhao et al. 2020, 2006.10738
    --decay                 learning rates fall to 0      github.com/Newmu/dcgan_code

Differs from dcgan.py in: the tricks and the calls to them. Without flags it trains as dcgan.py
does. The noise of --noise and the learning rates of --decay reach 0 at --steps: a --resume with
more --steps raises them again. Under torchrun, --replay, --minibatch-kernels and --feature-matching
work on each process's own images.

A run on MNIST, scored in docs/tricks.md:

    python tricks.py --width 16 --lr 1e-3 --batch-size 64 --steps 14000 --ema 0.999
"""

import copy
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=128, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=64, help="base number of channels")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--smooth", type=float, default=0.0, help="target of real images is 1 - this")
    p.add_argument("--flip", type=float, default=0.0, help="share of D's labels swapped")
    p.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of noise on all that D sees, falling to 0 at --steps",
    )
    p.add_argument(
        "--replay", type=int, default=0, help="old fakes to keep: half of D's are drawn from them"
    )
    p.add_argument("--feature-matching", action="store_true", help="G matches D's mean features")
    p.add_argument(
        "--minibatch-kernels",
        type=int,
        default=0,
        help="kernels by which D compares the images of a batch",
    )
    p.add_argument(
        "--r1",
        type=float,
        default=0.0,
        help="weight gamma of the R1 penalty; removes batch norm from D",
    )
    p.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="draw with an average of G's weights; this is its decay, such as 0.999",
    )
    p.add_argument(
        "--diffaug",
        nargs="+",
        choices=["color", "translation", "cutout"],
        default=[],
        help="augment all that D sees; the authors' StyleGAN2: color cutout, or all for few images",
    )
    p.add_argument("--decay", action="store_true", help="learning rates fall linearly to 0")
    args = runs.parse_args(p, argv)
    if args.minibatch_kernels and (args.r1 or args.feature_matching or args.replay):
        p.error("--minibatch-kernels excludes --r1, --feature-matching and --replay: leave one out")
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
    """Images (N, channels, image_size, image_size) -> scores (N,): the logit of "this is real"."""

    def __init__(self, width, channels, image_size, kernels, norm):
        super().__init__()
        # 64 x 16x16; each further stage doubles the channels and halves the size.
        c = width
        layers = [nn.Conv2d(channels, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

        # 128 x 8x8, 256 x 4x4
        while c < width * image_size // 8:
            layers += [nn.Conv2d(c, c * 2, 4, stride=2, padding=1, bias=not norm)]
            if norm:
                layers += [nn.BatchNorm2d(c * 2)]
            layers += [nn.LeakyReLU(0.2)]
            c *= 2

        # 1 x 1x1
        if kernels:
            layers += [MinibatchDiscrimination(c * 16, kernels)]
        layers += [nn.Conv2d(c + kernels, 1, 4)]
        self.net = nn.Sequential(*layers).apply(init_weights)

        # As in wgan_gp.py: without batch norm, N(0, 0.02) would shrink the signal.
        for layer in self.net:
            if isinstance(layer, nn.Conv2d) and not norm:
                nn.init.kaiming_normal_(layer.weight, 0.2)

    def forward(self, x):
        return self.net(x).flatten()


class MinibatchDiscrimination(nn.Module):
    """Features (N, C, 4, 4) -> (N, C + kernels, 4, 4): how close each image is to the others of
    its batch, in `kernels` learnt spaces of 5 dimensions: Salimans et al. 2016, section 3.2."""

    def __init__(self, n_in, kernels):
        super().__init__()
        self.linear = nn.Linear(n_in, kernels * 5, bias=False)

    def forward(self, h):
        m = self.linear(h.flatten(1)).unflatten(1, (-1, 5))
        distance = (m[:, None] - m).abs().sum(3)  # (N, N, kernels): between every two images
        near = torch.exp(-distance).sum(1) - 1  # minus exp(0), the image itself
        return torch.cat([h, near[:, :, None, None].expand(-1, -1, *h.shape[2:])], 1)


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


def d_loss(d_real, d_fake, smooth=0.0, flip=0.0):
    """Cross entropy of scores (N,), with the target 1 - `smooth` for what is labelled real and 0
    for fakes (Salimans et al. 2016, section 3.4), and a share `flip` of the labels swapped."""
    y_real = (1 - smooth) * swap_labels(torch.ones_like(d_real), flip)
    y_fake = (1 - smooth) * swap_labels(torch.zeros_like(d_fake), flip)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    return cross_entropy(d_real, y_real) + cross_entropy(d_fake, y_fake)


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate."""
    return -nn.functional.logsigmoid(d_fake).mean()


# tricks -------------------------------------------------------------------------------------------


def swap_labels(y, p):
    """Labels of 0 and 1 (N,), each swapped with probability p: the ganhacks list."""
    if p == 0:
        return y
    return torch.where(torch.rand_like(y) < p, 1 - y, y)


def r1_penalty(d_real, x_real):
    """E[||grad D(x)||^2] at real images (N, C, S, S), which require gradients, from their scores
    (N,): the mean over the images of the squared norm of each one's gradient, without gamma / 2.
    Mescheder et al. 2018, eq. 9. The `reg_param` of their code has no 1/2, so its 10 is --r1 20."""
    (grad,) = torch.autograd.grad(d_real.sum(), x_real, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


def feature_distance(D, x_real, x_fake):
    """||E[f(x_real)] - E[f(x_fake)]||^2, summed over all activations f of D; Salimans et al. 2016,
    section 3.1, use one layer, and weight norm in D. Batch norm hides a part of the distance, as it
    normalises the two batches separately. Only the fakes get a gradient."""
    real = x_real.detach()
    fake = x_fake
    distance = 0
    for layer in D.net[:-1]:
        real = layer(real)
        fake = layer(fake)
        if isinstance(layer, nn.LeakyReLU):
            distance = distance + (real.mean(0).detach() - fake.mean(0)).square().sum()
    return distance


@torch.no_grad()
def fill_with_fakes(pool, G, noise, batch_size):
    """Fills a pool (M, C, S, S) with images of G, a batch at a time."""
    for part in pool.split(batch_size):
        part.copy_(G(noise(len(part))))


def swap_with_pool(pool, x_fake):
    """Two batches for D: n random images of `pool` (M, C, S, S), and the fakes `x_fake[n:]`, where
    `x_fake` is (N, C, S, S) and n is N // 2, or M if that is less. The other fakes, `x_fake[:n]`,
    overwrite random images of the pool: Shrivastava et al. 2016, section 2.3."""
    n = min(len(x_fake) // 2, len(pool))
    # Sorting random numbers gives a random permutation.
    drawn = torch.rand(len(pool), device=pool.device).argsort()[:n]
    renewed = torch.rand(len(pool), device=pool.device).argsort()[:n]
    earlier = pool[drawn]
    pool[renewed] = x_fake[:n]
    return earlier, x_fake[n:]


@torch.no_grad()
def move_average(average, network, beta):
    """average = beta average + (1 - beta) network, for the weights; the buffers are copied."""
    for a, w in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(w, 1 - beta)
    for a, b in zip(average.buffers(), network.buffers(), strict=True):
        a.copy_(b)


def diffaug(x, policy):
    """Images (N, C, S, S), each augmented in its own way by the functions below that are in
    `policy`: Zhao et al. 2020, section 3.2, and github.com/mit-han-lab/data-efficient-gans."""
    if "color" in policy:
        x = color(x)
    if "translation" in policy:
        x = translation(x)
    if "cutout" in policy:
        x = cutout(x)
    return x


def color(x):
    """Images (N, C, S, S), each with a brightness, a saturation and a contrast of its own."""
    brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def translation(x):
    """Images (N, C, S, S), each shifted by up to S / 8 along both axes, with zeros in the strips
    that this leaves empty."""
    n, _, s, _ = x.shape
    pad = s // 8
    # A window of the padded image, which begins at another row and column for each image.
    x = nn.functional.pad(x, [pad] * 4)
    side = torch.arange(s, device=x.device)
    rows, columns = side + torch.randint(2 * pad + 1, (2, n, 1), device=x.device)
    which = torch.arange(n, device=x.device)[:, None, None]
    x = x.permute(0, 2, 3, 1)
    x = x[which, rows[:, :, None], columns[:, None, :]]
    return x.permute(0, 3, 1, 2)


def cutout(x):
    """Images (N, C, S, S), each with a square of side S / 2 set to zero. Its centre may be
    anywhere, so a part of the square may lie outside the image."""
    n, _, s, _ = x.shape
    side = torch.arange(s, device=x.device)
    from_middle = side - torch.randint(s + 1, (2, n, 1), device=x.device)
    in_rows, in_columns = (from_middle >= -(s // 4)) & (from_middle < s // 4)
    hole = in_rows[:, :, None] & in_columns[:, None, :]
    return x * ~hole[:, None]


# training -----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks, in the layout that is faster for convolutions, and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    kernels, norm = args.minibatch_kernels, not args.r1
    D = Discriminator(args.width, data.channels, args.image_size, kernels, norm)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    # With --decay, the learning rate changes, so a CUDA graph needs it as a tensor.
    lr = torch.full((), args.lr, device=args.device) if args.decay else args.lr
    opt_G = torch.optim.Adam(G.parameters(), lr=lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=lr, betas=betas, fused=True)

    # What the tricks keep: the strength of the noise on images, earlier fakes, and G's average.
    fade = torch.ones((), device=args.device)
    if args.replay:
        shape = (args.replay, data.channels, args.image_size, args.image_size)
        pool = torch.zeros(shape, device=args.device)
    if args.ema:
        average = copy.deepcopy(G)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def augment(x):
        """Images as D sees them."""
        if args.diffaug:
            x = diffaug(x, args.diffaug)
        if args.noise:
            x = x + args.noise * fade * torch.randn_like(x)
        return x

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        # D: minimise d_loss, with G fixed. Real and fake images go through D separately, because
        # batch norm must not mix them.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            x_real.requires_grad_(args.r1 > 0)  # for R1, the gradient at the images
            d_real = D(augment(x_real))
            if args.replay:
                # Old and new fakes go through D separately, too.
                old, new = swap_with_pool(pool, x_fake)
                d_fake = torch.cat([D(augment(old)), D(augment(new))])
            else:
                d_fake = D(augment(x_fake))
            loss_D = d_loss(d_real, d_fake, args.smooth, args.flip)
            if args.r1:
                loss_D = loss_D + args.r1 / 2 * r1_penalty(d_real, x_real)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise its loss, with D fixed.
        D.requires_grad_(False)
        x_fake = G(noise(args.batch_size))
        if args.feature_matching:
            loss_G = feature_distance(D, augment(x_real), augment(x_fake))
        else:
            loss_G = g_loss(D(augment(x_fake)))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def sample(z):
        """Images from z, by G or by its average with --ema, in evaluation mode, in which batch norm
        uses its running statistics."""
        network = average if args.ema else G
        x = network.eval()(z)
        G.train()
        return x

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    if args.ema:
        state["average"] = average
    if args.replay:
        state["pool"] = pool
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n)))
    if done == 0:
        if args.ema:
            average.load_state_dict(G.state_dict())  # --init may have replaced G
        if args.replay:
            fill_with_fakes(pool, G, noise, args.batch_size)
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = runs.steps(args, done)
    for step in progress:
        left = 1 - (step - 1) / args.steps
        fade.fill_(left)
        if args.decay:
            # After --resume, each optimiser has a tensor of its own.
            for opt in (opt_G, opt_D):
                opt.param_groups[0]["lr"].fill_(args.lr * left)
        values = update()
        if args.ema:
            # The first weights are not worth keeping, so beta grows from 0 up to --ema. This
            # ramp is ours; the authors begin with a copy of G and a beta of 0.9999.
            move_average(average, G, min(args.ema, (step - 1) / (step + 9)))
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
