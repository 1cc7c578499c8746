"""StyleGAN2: G draws with styles, which are computed from z and scale the channels of each layer.

Karras et al. 2019, Analyzing and Improving the Image Quality of StyleGAN.
https://arxiv.org/abs/1912.04958

    D:  min  -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))]
             + gamma/2 E[||grad D(x)||^2]    (R1: after every 16th update only, 16 times as strong)
    G:  min  -E[log sigmoid(D(G(z)))]

Two layers map z to w. From w, each layer of G computes its style, a factor for each of its input
channels.

Differs from dcgan.py in: G starts from a learnt constant, its layers have styles and noise, and
each size adds to the picture of the size before; D blurs before it halves, and compares the images
of a batch; demodulation takes the place of batch norm in G, and equalised learning rates replace
the initialisation; D has the R1 penalty; the images are drawn by an average of G.

These are the authors' settings for CIFAR-10: without the paper's path length regularisation, style
mixing and residual connections. Deviations from them (more in docs/papers.md): no augmentation.
On MNIST, where G collapses with the default --r1, use --r1 10.

A run on MNIST, scored in docs/results.md:

    python stylegan2.py --width-at-64 4 --batch-size 16 --r1 10 --lr 5e-3 --steps 11000
"""

import copy
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs

R1_EVERY = 16  # updates of D between two steps of the penalty


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=512, help="dimensions of z and w")
    p.add_argument(
        "--width-at-64",
        type=runs.positive_int,
        default=512,
        help="channels at 64x64; twice as many with each halving of the size, up to 512",
    )
    p.add_argument("--lr", type=float, default=2.5e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.99, help="Adam's beta2")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--r1", type=float, default=0.01, help="weight gamma of the R1 penalty")
    p.add_argument(
        "--truncation",
        type=float,
        default=1.0,
        help="with --generate: factor for w - mean; less than 1 gives safer, less varied images",
    )
    args = runs.parse_args(p, argv)
    if args.truncation != 1 and not args.generate:
        p.error("--truncation goes with --generate")
    return args


# networks -----------------------------------------------------------------------------------------


def channels_at(size, width):
    """The number of channels of layers with `size` x `size` pixels: `width` at 64 pixels, and twice
    as many with each halving, up to 512. With the default width, all sizes up to 64 have 512."""
    return max(1, min(512, 64 * width // size))


def activate(x):
    """Leaky ReLU times sqrt(2), which keeps the mean square of a normal x about as it is."""
    return 2**0.5 * nn.functional.leaky_relu(x, 0.2)


def blur(x, padding):
    """x (N, C, S, S), blurred with [1, 3, 3, 1] / 8 in both directions, as three means of 2x2
    pixels, with `padding` zeros around it. Without a blur, fine detail turns into false patterns
    (aliasing) when the size changes."""
    x = nn.functional.pad(x, [padding] * 4)
    for _ in range(3):
        x = nn.functional.avg_pool2d(x, 2, stride=1)
    return x


def enlarge(image):
    """A picture (N, C, S, S) at twice its size: each pixel repeated, then blurred with [1, 2, 1] /
    4 in both directions, as two means of 2x2 pixels."""
    image = nn.functional.interpolate(image, scale_factor=2)
    image = nn.functional.avg_pool2d(image, 2, stride=1, padding=1)
    return nn.functional.avg_pool2d(image, 2, stride=1)


class Linear(nn.Module):
    """x (N, n_in) -> (N, n_out), with an equalised learning rate (Karras et al. 2017, section 4.1):
    the weights are N(0, 1) / rate, and are multiplied by rate / sqrt(n_in) in each forward pass.
    Adam's steps are of one size for all weights, so the layer learns `rate` times as fast."""

    def __init__(self, n_in, n_out, bias=0.0, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / rate)
        self.bias = nn.Parameter(torch.full((n_out,), bias))
        self.scale = rate / n_in**0.5
        self.rate = rate

    def forward(self, x):
        return nn.functional.linear(x, self.scale * self.weight, self.rate * self.bias)


class Conv(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S, S), or (N, n_out, S/2, S/2) with `down`; its learning rate
    is equalised as in Linear."""

    def __init__(self, n_in, n_out, kernel_size, down=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale = 1 / (n_in * kernel_size**2) ** 0.5
        self.padding = kernel_size // 2
        self.down = down

    def forward(self, x):
        weight = self.scale * self.weight
        if self.down:
            return nn.functional.conv2d(blur(x, padding=2), weight, self.bias, stride=2)
        return nn.functional.conv2d(x, weight, self.bias, padding=self.padding)


class ModulatedConv(nn.Module):
    """x (N, n_in, S, S), w (N, w_dim) -> (N, n_out, S, S), or (N, n_out, 2S, 2S) with `up`.

    Section 2.2: the style s = affine(w) scales the weights of each input channel, W' = s W (eq. 1),
    and demodulation divides those of each output channel by their norm, sqrt(sum W'^2) (eq. 3).
    Each image would need weights of its own. Scaling x before the convolution, and the result after
    it, gives the same with one convolution for the whole batch.
    """

    def __init__(self, n_in, n_out, kernel_size, w_dim, demodulate=True, up=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.affine = Linear(w_dim, n_in, bias=1.0)
        self.scale = 1 / (n_in * kernel_size**2) ** 0.5
        self.padding = kernel_size // 2
        self.demodulate = demodulate
        self.up = up

    def forward(self, x, w):
        s = self.affine(w)  # (N, n_in)
        weight = self.scale * self.weight
        x = x * s[:, :, None, None]
        if self.up:
            # The factor of 4 makes up for the zeros between the pixels of x.
            x = nn.functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = 4 * blur(x, padding=1)
        else:
            x = nn.functional.conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            squared_norm = s.square() @ weight.square().sum((2, 3)).T  # (N, n_out)
            x = x * (squared_norm + 1e-8).rsqrt()[:, :, None, None]
        return x


class Layer(nn.Module):
    """x (N, n_in, S, S), w (N, w_dim) -> (N, n_out, size, size): a modulated convolution, noise and
    a nonlinearity (section 2.2, figure 2d)."""

    def __init__(self, n_in, n_out, size, w_dim, up=False):
        super().__init__()
        self.conv = ModulatedConv(n_in, n_out, 3, w_dim, up=up)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.constant_noise = nn.Buffer(torch.randn(1, 1, size, size))

    def forward(self, x, w):
        x = self.conv(x, w)
        # In training each image has its own noise, and in evaluation mode all have the same.
        noise = self.constant_noise
        if self.training:
            noise = torch.randn_like(x[:, :1])
        return activate(x + self.noise_strength * noise + self.bias[:, None, None])


class ToRGB(nn.Module):
    """Features (N, n_in, S, S), w (N, w_dim) -> a picture (N, channels, S, S). There is no
    demodulation, so that the style decides how much this size adds."""

    def __init__(self, n_in, channels, w_dim):
        super().__init__()
        self.conv = ModulatedConv(n_in, channels, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, w):
        return self.conv(x, w) + self.bias[:, None, None]


class Mapping(nn.Module):
    """z (N, z_dim) -> w (N, z_dim), by two layers that learn 100 times as slowly as the others."""

    def __init__(self, z_dim):
        super().__init__()
        self.first = Linear(z_dim, z_dim, rate=0.01)
        self.second = Linear(z_dim, z_dim, rate=0.01)

    def forward(self, z):
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        return activate(self.second(activate(self.first(z))))


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size). G learns to keep them in
    [-1, 1], where the real ones are: there is no tanh.

    Each size adds its picture to the enlarged one of the size before: section 4.1, figure 7b. Sizes
    are powers of 2. The comments give the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        self.mapping = Mapping(z_dim)

        # 512 x 4x4
        c = channels_at(4, width)
        self.constant = nn.Parameter(torch.randn(c, 4, 4))
        self.layers = nn.ModuleList([Layer(c, c, 4, z_dim)])
        self.to_rgb = nn.ModuleList([ToRGB(c, channels, z_dim)])

        # 512 x 8x8, 512 x 16x16, 512 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_in = c
            c = channels_at(size, width)
            self.layers += [Layer(n_in, c, size, z_dim, up=True), Layer(c, c, size, z_dim)]
            self.to_rgb += [ToRGB(c, channels, z_dim)]

    def forward(self, z):
        return self.synthesise(self.mapping(z))

    def synthesise(self, w):
        """Images from w: (N, z_dim) for all layers, or (N, len(self.layers) + 1, z_dim), of which
        layer k uses w[:, k], and the picture after it w[:, k + 1]."""
        if w.ndim == 2:
            w = w[:, None].expand(-1, len(self.layers) + 1, -1)

        # 4x4
        x = self.constant.expand(len(w), -1, -1, -1)
        x = self.layers[0](x, w[:, 0])
        image = self.to_rgb[0](x, w[:, 1])

        # 8x8, 16x16, 32x32: two layers and a picture each
        for k in range(1, len(self.layers), 2):
            x = self.layers[k](x, w[:, k])
            x = self.layers[k + 1](x, w[:, k + 1])
            image = enlarge(image) + self.to_rgb[(k + 1) // 2](x, w[:, k + 2])
        return image


class MinibatchDeviation(nn.Module):
    """Features (N, C, S, S) -> (N, C + 1, S, S): adds the standard deviation over a group of
    images, averaged over channels and pixels. It shows D whether images are too alike (Karras et
    al. 2017, section 3). Groups have `group` images, or the next smaller number that divides N."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        n = len(x)
        group = min(self.group, n)
        while n % group:
            group -= 1
        groups = x.reshape(group, n // group, *x.shape[1:])  # image i: group i % (n // group)
        variance = groups.var(0, correction=0)
        deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))  # (n // group,)
        plane = deviation.repeat(group)[:, None, None, None].expand(n, 1, *x.shape[2:])
        return torch.cat([x, plane], 1)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,): the logit of "this is real"."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        size, c = image_size, channels_at(image_size, width)
        self.from_rgb = Conv(channels, c, 1)

        # 32x32 -> 16x16 -> 8x8 -> 4x4
        self.convs = nn.ModuleList()
        while size > 4:
            n_out = channels_at(size // 2, width)
            self.convs += [Conv(c, c, 3), Conv(c, n_out, 3, down=True)]
            size = size // 2
            c = n_out

        # 4x4
        self.deviation = MinibatchDeviation(group=32)
        self.conv = Conv(c + 1, c, 3)
        self.dense = Linear(c * 16, c)
        self.out = Linear(c, 1)

    def forward(self, x):
        x = activate(self.from_rgb(x))
        for conv in self.convs:
            x = activate(conv(x))
        x = activate(self.conv(self.deviation(x)))
        return self.out(activate(self.dense(x.flatten(1)))).flatten()


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))], from scores (N,): Goodfellow et al.
    2014, eq. 1."""
    return -nn.functional.logsigmoid(d_real).mean() - nn.functional.logsigmoid(-d_fake).mean()


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate."""
    return -nn.functional.logsigmoid(d_fake).mean()


def r1_penalty(d_real, x_real):
    """E[||grad D(x)||^2] at real images (N, C, S, S), which require gradients, from their scores
    (N,): the mean over the images of the squared norm of each one's gradient, without gamma / 2.
    Mescheder et al. 2018, eq. 9. It keeps D from being steep where the data are. Through D's
    statistic of the batch, an image's gradient also depends on the other scores, as in the authors'
    code."""
    (grad,) = torch.autograd.grad(d_real.sum(), x_real, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


# training -----------------------------------------------------------------------------------------


def lazy_adam(network, args, interval):
    """Adam for a network with one step for a penalty after every `interval` other ones. To make up
    for the additional step, the learning rate is multiplied by c = interval / (interval + 1), and
    the betas are raised to the power c (appendix B, "Lazy regularization")."""
    c = interval / (interval + 1)
    betas = (args.beta1**c, args.beta2**c)
    return torch.optim.Adam(network.parameters(), lr=c * args.lr, betas=betas, fused=True)


@torch.no_grad()
def move_average(average, network, beta):
    """average = beta average + (1 - beta) network, for the weights; the buffers are copied."""
    for a, w in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(w, 1 - beta)
    for a, b in zip(average.buffers(), network.buffers(), strict=True):
        a.copy_(b)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks, in the layout that is faster for convolutions, and optimisers. In the authors' code,
    # G has a penalty after every 4th step. It is off in these settings, which nevertheless keep the
    # correction of Adam for it.
    G = Generator(args.z_dim, args.width_at_64, data.channels, args.image_size)
    D = Discriminator(args.width_at_64, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    opt_G = lazy_adam(G, args, 4)
    opt_D = lazy_adam(D, args, R1_EVERY)

    # The average of G, which draws all images, and the last value of the penalty.
    average = copy.deepcopy(G).eval()
    r1 = torch.zeros((), device=args.device)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def update():
        """One step: an update of D, then one of G."""
        # D: minimise d_loss, with G fixed.
        D.requires_grad_(True)
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

    def update_r1():
        """One update of D on a minibatch of its own: minimise r1/2 * r1_penalty, times R1_EVERY, as
        only one update in R1_EVERY is followed by this one."""
        D.requires_grad_(True)
        x_real, _ = common.sample_batch(args, data)
        x_real.requires_grad_()  # for R1, the gradient at the images
        penalty = r1_penalty(D(x_real), x_real)
        opt_D.zero_grad()
        (R1_EVERY * args.r1 / 2 * penalty).backward()
        opt_D.step()
        # Every row of the log shows the penalty of the last of these updates.
        r1.copy_(penalty.detach())
        return {"r1": r1}

    @torch.no_grad()
    def sample(z, mean_w=0.0, truncation=1.0):
        """Images from z, drawn by the average of G with w = mean + truncation (w - mean)."""
        w = average.mapping(z)
        return average.synthesise(mean_w + truncation * (w - mean_w))

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state.update(average=average, r1=r1)
    done = runs.start_run(args, data, state)
    if args.generate:
        with torch.no_grad():
            mean_w = average.mapping(noise(10_000)).mean(0)
        return common.generate(args, lambda n: sample(noise(n), mean_w, args.truncation))
    if done == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z))

    # Train. n_images are those of all processes.
    n_images = args.batch_size * common.world_size()
    update = runs.cuda_graph(args, data, update)
    update_r1 = runs.cuda_graph(args, data, update_r1)
    progress = runs.steps(args, done)
    for step in progress:
        values = update()
        if step % R1_EVERY == 0 and args.r1:
            update_r1()
        # The half-life of the average: 500,000 images, or 5% of those seen if that is less.
        half_life = min(500_000, 0.05 * n_images * step)
        move_average(average, G, 0.5 ** (n_images / half_life))
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, {**values, "r1": r1}))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
