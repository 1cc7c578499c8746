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

This is the configuration in which the authors train CIFAR-10 (`cifar` in train.py of
github.com/NVlabs/stylegan2-ada-pytorch): without the paper's path length regularisation, style
mixing and residual connections. Deviations from it:
- No augmentation, no mixed precision, and none of the clamping that the latter needs.
- D is updated before G. The penalty has a minibatch of its own, and is added for the first time
  after 16 updates.
- The mean of w for --truncation is computed when it is needed, from 10,000 z.

The default of --r1 is theirs for CIFAR-10. On MNIST with a width of 4, G collapses with it, and
learns with 10 (docs/experiments.md).

The two-hour run on CIFAR-10 in docs/experiments.md:

    python stylegan2.py --dataset cifar10 --width 8 --batch-size 16 --steps 106000
"""

import copy
from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs

R1_EVERY = 16  # updates of D between two steps of the penalty


def parse_args(argv=None):
    p = ArgumentParser(prog="stylegan2.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=512, help="dimensions of z and w")
    p.add_argument(
        "--width",
        type=runs.positive_int,
        default=512,
        help="channels at 64 pixels; twice as many with each halving, up to 512",
    )
    p.add_argument("--lr", type=runs.positive_float, default=2.5e-3, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.99, help="Adam's beta2")
    p.add_argument(
        "--image-size", type=int, choices=[16, 32, 64, 128, 256], default=32, help="pixels"
    )
    p.add_argument(
        "--r1", type=runs.non_negative_float, default=0.01, help="weight gamma of the R1 penalty"
    )
    p.add_argument(
        "--truncation",
        type=runs.non_negative_float,
        default=1.0,
        help="with --generate: factor for w - mean; less than 1 gives safer, less varied images",
    )
    return runs.parse_args(p, argv, generate_only=("truncation",))


# ----------------------------------------------------------------------------------------- networks


def channels_at(size, width):
    """The number of channels of layers with `size` x `size` pixels: `width` at 64 pixels, and twice
    as many with each halving, up to 512. With the default width, all sizes up to 64 have 512."""
    return max(1, min(512, 64 * width // size))


def activate(x):
    """Leaky ReLU times sqrt(2), which keeps the mean square of a normal x about as it is."""
    return 2**0.5 * nn.functional.leaky_relu(x, 0.2)


class Filter(nn.Module):
    """Blurs each channel of x (N, C, H, W) with the filter [1, 3, 3, 1] / 8 in both directions;
    `up` doubles H and W. Without a blur, fine detail turns into false patterns (aliasing) when the
    size changes. A gain of 4 makes up for the zeros that doubling puts in three of four pixels."""

    def __init__(self, padding=0, gain=1.0, up=False):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", gain * taps[:, None] * taps, persistent=False)
        self.padding = padding
        self.up = up

    def forward(self, x):
        n_channels = x.shape[1]
        kernel = self.kernel.expand(n_channels, 1, 4, 4)
        if self.up:
            return nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1, groups=n_channels)
        return nn.functional.conv2d(x, kernel, padding=self.padding, groups=n_channels)


class Linear(nn.Module):
    """x (N, n_in) -> (N, n_out), with an equalised learning rate (Karras et al. 2017, section 4.1):
    the weights are N(0, 1) / rate, and are multiplied by rate / sqrt(n_in) in each forward pass.
    Adam's steps are of one size for all weights, so that the layer learns `rate` times as fast."""

    def __init__(self, n_in, n_out, bias=0.0, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / rate)
        self.bias = nn.Parameter(torch.full((n_out,), bias))
        self.rate = rate

    def forward(self, x):
        weight = self.weight * (self.rate / self.weight.shape[1] ** 0.5)
        return nn.functional.linear(x, weight, self.rate * self.bias)


class Conv(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S, S), or (N, n_out, S/2, S/2) with `down`; its learning rate
    is equalised as in Linear."""

    def __init__(self, n_in, n_out, kernel_size, down=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.filter = Filter(padding=2) if down else None

    def forward(self, x):
        weight = self.weight / self.weight[0].numel() ** 0.5
        if self.filter is None:
            return nn.functional.conv2d(x, weight, self.bias, padding=weight.shape[2] // 2)
        return nn.functional.conv2d(self.filter(x), weight, self.bias, stride=2)


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
        self.demodulate = demodulate
        self.filter = Filter(padding=1, gain=4.0) if up else None

    def forward(self, x, w):
        s = self.affine(w)  # (N, n_in)
        weight = self.weight / self.weight[0].numel() ** 0.5
        x = x * s[:, :, None, None]
        if self.filter is None:
            x = nn.functional.conv2d(x, weight, padding=weight.shape[2] // 2)
        else:
            x = nn.functional.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = self.filter(x)  # the size is doubled: only the blur is left to do
        if self.demodulate:
            squared_norm = s.square() @ weight.square().sum((2, 3)).T  # (N, n_out)
            x = x * (squared_norm + 1e-8).rsqrt()[:, :, None, None]
        return x


class Layer(nn.Module):
    """x (N, n_in, S, S), w (N, w_dim) -> (N, n_out, size, size): a modulated convolution, noise and
    a nonlinearity (section 2.1, figure 2c)."""

    def __init__(self, n_in, n_out, size, w_dim, up=False):
        super().__init__()
        self.conv = ModulatedConv(n_in, n_out, 3, w_dim, up=up)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("constant_noise", torch.randn(1, 1, size, size))

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
    """z (N, z_dim) -> images (N, channels, image_size, image_size), about in [-1, 1].

    Each size adds its picture to the enlarged one of the size before: section 4.1, figure 7b.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        self.mapping = Mapping(z_dim)
        c = channels_at(4, width)
        self.constant = nn.Parameter(torch.randn(c, 4, 4))
        self.layers = nn.ModuleList([Layer(c, c, 4, z_dim)])
        self.to_rgb = nn.ModuleList([ToRGB(c, channels, z_dim)])
        size = 4
        while size < image_size:
            size *= 2
            n_in = c
            c = channels_at(size, width)
            self.layers += [Layer(n_in, c, size, z_dim, up=True), Layer(c, c, size, z_dim)]
            self.to_rgb += [ToRGB(c, channels, z_dim)]
        self.enlarge = Filter(gain=4.0, up=True)

    def forward(self, z):
        return self.synthesise(self.mapping(z))

    def synthesise(self, w):
        """Images of w (N, z_dim), or of one w for each layer and one more for the last picture: (N,
        len(self.layers) + 1, z_dim). Every other picture shares its w with the first layer of the
        next size."""
        if w.ndim == 2:
            w = w[:, None].expand(-1, len(self.layers) + 1, -1)

        # 4x4
        x = self.constant.expand(len(w), -1, -1, -1)
        x = self.layers[0](x, w[:, 0])
        image = self.to_rgb[0](x, w[:, 1])

        # 8x8, 16x16, 32x32
        for k, to_rgb in enumerate(self.to_rgb[1:]):
            x = self.layers[2 * k + 1](x, w[:, 2 * k + 1])
            x = self.layers[2 * k + 2](x, w[:, 2 * k + 2])
            image = self.enlarge(image) + to_rgb(x, w[:, 2 * k + 3])
        return image


def minibatch_deviation(x, group=32):
    """Features (N, C, S, S) -> (N, 1, S, S): the standard deviation over a group of images,
    averaged over channels and pixels. It shows D whether images are too alike (Karras et al. 2017,
    section 3). Groups have `group` images, or the next smaller number that divides N."""
    n = len(x)
    while n % group:
        group -= 1
    groups = x.reshape(group, n // group, *x.shape[1:])  # image i is in group i mod (n // group)
    variance = groups.var(0, correction=0)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))  # (n // group,)
    return deviation.repeat(group)[:, None, None, None].expand(n, 1, *x.shape[2:])


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

        # 4x4, with one more channel for minibatch_deviation
        self.conv = Conv(c + 1, c, 3)
        self.dense = Linear(c * 16, c)
        self.out = Linear(c, 1)

    def forward(self, x):
        x = activate(self.from_rgb(x))
        for conv in self.convs:
            x = activate(conv(x))
        x = torch.cat([x, minibatch_deviation(x)], 1)
        x = activate(self.conv(x))
        return self.out(activate(self.dense(x.flatten(1)))).flatten()


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake):
    """-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))], from scores (N,): Goodfellow et al.
    2014, eq. 1."""
    return -nn.functional.logsigmoid(d_real).mean() - nn.functional.logsigmoid(-d_fake).mean()


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate."""
    return -nn.functional.logsigmoid(d_fake).mean()


def r1_penalty(D, x_real):
    """E[||grad D(x)||^2] at real images (N, C, S, S): Mescheder et al. 2018, eq. 9, without gamma /
    2. It is the gradient of the sum of the scores, to which minibatch_deviation adds a part from
    other images of the group, as in the authors' code."""
    x_real = x_real.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_real).sum(), x_real, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


# ----------------------------------------------------------------------------------------- training


def lazy_adam(network, args, interval):
    """Adam for a network with one step for a penalty after every `interval` other ones. To make up
    for the additional step, the learning rate is multiplied by c = interval / (interval + 1), and
    the betas are raised to its power (appendix B, "Lazy regularization")."""
    c = interval / (interval + 1)
    betas = (args.beta1**c, args.beta2**c)
    return torch.optim.Adam(network.parameters(), lr=c * args.lr, betas=betas, fused=True)


@torch.no_grad()
def move_average(average, G, seen, batch_size):
    """Moves the weights of `average` towards G's, with a half-life of 500,000 images or of 5% of
    the images `seen` so far, whichever is less. Copies the buffers."""
    half_life = min(500_000, 0.05 * seen)
    beta = 0.5 ** (batch_size / half_life)
    # The third argument of `move` is a number of updates, which it ignores
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(beta)
    move(list(average.parameters()), list(G.parameters()), None)
    for a, b in zip(average.buffers(), G.buffers(), strict=True):
        a.copy_(b)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks and optimisers. In the authors' code, G has a penalty after every 4th step. It is off
    # in this configuration, which nevertheless keeps the correction of Adam for it.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    opt_G = lazy_adam(G, args, 4)
    opt_D = lazy_adam(D, args, R1_EVERY)

    # The average of G, which draws all images.
    average = copy.deepcopy(G).eval()

    # All grids use the same noise, so they show the same images changing.
    fixed_z = torch.randn(common.grid_size(args), args.z_dim, device=args.device)

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        d_real, d_fake = D(x_real), D(x_fake)
        loss_D = d_loss(d_real, d_fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        loss_G = g_loss(D(x_fake))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update():
        """One step: an update of D, then one of G."""
        x_real, _ = common.sample_batch(args, data)
        loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step()
        return {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}

    def r1_step():
        """One update of D: minimise the penalty, times the number of steps without it."""
        D.requires_grad_(True)
        x_real, _ = common.sample_batch(args, data)
        penalty = r1_penalty(D, x_real)
        opt_D.zero_grad()
        (R1_EVERY * args.r1 / 2 * penalty).backward()
        opt_D.step()
        return {"r1": penalty}  # runs.cuda_graph takes a dict; it is not logged

    @torch.no_grad()
    def sample(z):
        """Images of z, drawn by the average of G."""
        return average(z)

    def draw(n):
        """n images of new noise, for --generate: w = mean + truncation (w - mean)."""
        with torch.no_grad():
            w = average.mapping(torch.randn(n, args.z_dim, device=args.device))
            return average.synthesise(mean_w + args.truncation * (w - mean_w))

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    first = runs.start_run(args, data, state)
    if args.generate:
        with torch.no_grad():
            mean_w = average.mapping(torch.randn(10_000, args.z_dim, device=args.device)).mean(0)
        return common.generate(args, draw)
    if first == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z))

    # Train. Under torchrun, args.batch_size is the part of this process.
    n_images = args.batch_size * common.world_size()
    update = runs.cuda_graph(args, data, update)
    r1_step = runs.cuda_graph(args, data, r1_step)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        values = update()
        if step % R1_EVERY == 0 and args.r1:
            r1_step()
        move_average(average, G, n_images * step, n_images)
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
