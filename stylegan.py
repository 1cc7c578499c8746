"""StyleGAN: G draws with styles, which are computed from z and set each feature's mean and scale.

Karras, Laine, Aila 2018, A Style-Based Generator Architecture for Generative Adversarial Networks.
https://arxiv.org/abs/1812.04948

    D:  min  -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))] + gamma/2 E[||grad D(x)||^2]  (R1)
    G:  min  -E[log sigmoid(D(G(z)))]

Eight layers map z to w. From w, each layer of G computes its style, a scale and a shift for each
feature. In nine of ten batches, the layers from a random one on have the style of another w.

Differs from progan.py in: G starts from a learnt constant, its layers have styles and noise, and
instance norm in place of pixel norm; both networks blur where the size changes; cross entropy and
R1 take the place of WGAN-GP; the images are 8x8 at first; D's statistic is of groups of 4 images.

Follows the authors' code (github.com/NVlabs/stylegan), which has no configuration for 32x32.
Deviations from it:
- --stage-steps is 2,500, so that the default 20,000 steps reach 32x32 after 10,000. Theirs are
  600,000 images for each stage and each fade: 9,375 steps.
- The batch size is the same at all sizes. Theirs is 128 up to 16x16.
- D is updated before G, on other fakes. The average of G moves after both.

The networks grow, which one CUDA graph cannot follow, so none is used. With --init,
--stage-steps 0 goes on with the whole networks.

A small run on MNIST, which docs/results.md has with 18,000 steps:

    python stylegan.py --width 16 --z-dim 64 --batch-size 16 --lr 6e-3 --stage-steps 1000
"""

import copy
import math
from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog="stylegan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=512, help="dimensions of z and w")
    p.add_argument("--width", type=runs.positive_int, default=512, help="channels up to 32x32")
    p.add_argument("--lr", type=runs.positive_float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.99, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--r1", type=runs.non_negative_float, default=10.0, help="weight gamma of the R1 penalty"
    )
    p.add_argument(
        "--stage-steps",
        type=runs.non_negative_int,
        default=2500,
        help="updates of each fade, and of the training after it; 32x32 has faded in after 4 times"
        " as many; 0: all layers from the start",
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
    """The number of channels of layers with `size` x `size` pixels: `width` up to 32x32, and half
    as many with each doubling."""
    return max(1, min(width, 32 * width // size))


class Linear(nn.Module):
    """x (N, n_in) -> (N, n_out), with an equalised learning rate (Karras et al. 2017, section 4.1):
    the weights are N(0, 1) / rate, and are multiplied by rate * gain / sqrt(n_in) in each forward
    pass. Adam's steps are of one size for all weights, so that the layer learns `rate` times as
    fast."""

    def __init__(self, n_in, n_out, gain=2**0.5, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / rate)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale = rate * gain / n_in**0.5
        self.rate = rate

    def forward(self, x):
        return nn.functional.linear(x, self.scale * self.weight, self.rate * self.bias)


class Conv(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S, S), with an equalised learning rate as in Linear."""

    def __init__(self, n_in, n_out, kernel_size, gain=2**0.5, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.scale = gain / (n_in * kernel_size**2) ** 0.5
        self.padding = kernel_size // 2

    def forward(self, x):
        return nn.functional.conv2d(x, self.scale * self.weight, self.bias, padding=self.padding)


class SymmetricConv(torch.autograd.Function):
    """Convolves each channel of x (N, C, S, S) with its symmetric kernel, of (C, 1, 3, 3). PyTorch
    takes the second derivative of nn.functional.conv2d, which R1 needs, by a loop over the
    channels: slow on a GPU. As this convolution is symmetric, its derivative is itself."""

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(kernel)
        return nn.functional.conv2d(x, kernel, padding=1, groups=len(kernel))

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return SymmetricConv.apply(grad, kernel), None


class Blur(nn.Module):
    """Blurs each channel of x (N, C, S, S) with the filter [1, 2, 1] / 4 in both directions.
    Without a blur, fine detail turns into false patterns (aliasing) when the size changes."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", taps[:, None] * taps, persistent=False)

    def forward(self, x):
        kernel = self.kernel.expand(x.shape[1], 1, 3, 3)
        return SymmetricConv.apply(x, kernel)


class Mapping(nn.Module):
    """z (N, z_dim) -> w (N, z_dim), by eight layers that learn 100 times as slowly as the others.
    In training it keeps an average of w, for truncation."""

    def __init__(self, z_dim):
        super().__init__()
        layers = []
        for _ in range(8):
            layers += [Linear(z_dim, z_dim, rate=0.01), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers)
        self.register_buffer("mean_w", torch.zeros(z_dim))

    def forward(self, z):
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        w = self.net(z)
        if self.training:
            self.mean_w.lerp_(w.detach().mean(0), 0.005)
        return w


class Layer(nn.Module):
    """x (N, n_in, S, S), w (N, w_dim) -> (N, n_out, size, size): a convolution (not in the first
    layer of G), noise and a nonlinearity, then instance norm and the style (figure 1b, eq. 1)."""

    def __init__(self, n_in, n_out, size, w_dim, first=False, up=False):
        super().__init__()
        self.up = up
        self.conv = None if first else Conv(n_in, n_out, 3, bias=False)
        self.blur = Blur()
        self.noise_strength = nn.Parameter(torch.zeros(n_out))
        self.register_buffer("constant_noise", torch.randn(1, 1, size, size))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.affine = Linear(w_dim, 2 * n_out, gain=1.0)

    def forward(self, x, w):
        if self.up:
            x = nn.functional.interpolate(x, scale_factor=2)  # repeats each pixel
        if self.conv is not None:
            x = self.conv(x)
        if self.up:
            x = self.blur(x)

        # In training each image has its own noise, and in evaluation mode all have the same.
        noise = self.constant_noise
        if self.training:
            noise = torch.randn_like(x[:, :1])
        x = x + self.noise_strength[:, None, None] * noise
        x = nn.functional.leaky_relu(x + self.bias[:, None, None], 0.2)

        # The style takes the place of the mean and the scale that the norm takes away.
        x = nn.functional.instance_norm(x, eps=1e-8)
        scale, shift = self.affine(w)[:, :, None, None].chunk(2, 1)
        return (scale + 1) * x + shift


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, S, S), with S = 4 * 2**stage. G learns to keep them in
    [-1, 1], where the real ones are: there is no tanh.

    The layers of the stage draw them. With fade < 1, they are mixed with those of the stage before,
    enlarged. The comments have the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        self.mapping = Mapping(z_dim)

        # 512 x 4x4
        c = channels_at(4, width)
        self.constant = nn.Parameter(torch.ones(c, 4, 4))
        self.layers = nn.ModuleList([Layer(c, c, 4, z_dim, first=True), Layer(c, c, 4, z_dim)])
        self.to_rgb = nn.ModuleList([Conv(c, channels, 1, gain=1.0)])

        # 512 x 8x8, 512 x 16x16, 512 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_in = c
            c = channels_at(size, width)
            self.layers += [Layer(n_in, c, size, z_dim, up=True), Layer(c, c, size, z_dim)]
            self.to_rgb += [Conv(c, channels, 1, gain=1.0)]

    def forward(self, z, stage, fade):
        w = self.mapping(z)
        return self.synthesise(w[:, None].expand(-1, 2 * stage + 2, -1), stage, fade)

    def synthesise(self, w, stage, fade):
        """Images of one w for each layer of the stage, (N, 2 * stage + 2, z_dim)."""
        x = self.constant.expand(len(w), -1, -1, -1)
        for k in range(stage + 1):
            before = x
            x = self.layers[2 * k](x, w[:, 2 * k])
            x = self.layers[2 * k + 1](x, w[:, 2 * k + 1])
        image = self.to_rgb[stage](x)
        if fade < 1:
            coarse = nn.functional.interpolate(self.to_rgb[stage - 1](before), scale_factor=2)
            image = torch.lerp(coarse, image, fade)
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


class Down(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S/2, S/2): blur, a 3x3 convolution, the mean of each 2x2
    pixels, and a leaky ReLU."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.blur = Blur()
        self.conv = Conv(n_in, n_out, 3)

    def forward(self, x):
        # The mean of the bias is the bias, so that it may come before.
        return nn.functional.leaky_relu(nn.functional.avg_pool2d(self.conv(self.blur(x)), 2), 0.2)


class Discriminator(nn.Module):
    """Images (N, channels, S, S) with S = 4 * 2**stage -> scores (N,): the logit of "this is real".

    They enter at the block of the stage. With fade < 1, its features are mixed with those of the
    image of half the size, which enters at the next block.
    """

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 512 x 4x4, with one more channel for minibatch_deviation
        c = channels_at(4, width)
        layers = [Conv(c + 1, c, 3), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), Linear(c * 16, c), nn.LeakyReLU(0.2), Linear(c, 1, gain=1.0)]
        self.last = nn.Sequential(*layers)
        self.from_rgb = nn.ModuleList([nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2))])
        self.blocks = nn.ModuleList()

        # 512 x 8x8, 512 x 16x16, 512 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_out = c
            c = channels_at(size, width)
            self.blocks.append(nn.Sequential(Conv(c, c, 3), nn.LeakyReLU(0.2), Down(c, n_out)))
            self.from_rgb.append(nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2)))

    def forward(self, image, stage, fade):
        # The newest block, which a fade mixes with the image of half the size
        x = self.from_rgb[stage](image)
        if stage > 0:
            x = self.blocks[stage - 1](x)
        if fade < 1:
            coarse = self.from_rgb[stage - 1](nn.functional.avg_pool2d(image, 2))
            x = torch.lerp(coarse, x, fade)

        # Those of the stages before, down to 4x4
        for k in range(stage - 1, 0, -1):
            x = self.blocks[k - 1](x)
        x = torch.cat([x, minibatch_deviation(x, group=4)], 1)
        return self.last(x).flatten()


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


def last_stage(image_size):
    """The stage of the whole networks: 3 for 32x32."""
    return int(math.log2(image_size // 4))


def stage_and_fade(step, stage_steps, image_size):
    """The stage at an update (0 for 4x4, 1 for 8x8, ...), and how far it has faded in, from 0 to
    1. Each stage trains for `stage_steps`, and the next one fades in for as many."""
    last = last_stage(image_size)
    if stage_steps == 0:
        return last, 1.0
    stage, done = divmod(step - 1, 2 * stage_steps)
    if done >= stage_steps and stage < last:
        return stage + 1, (done - stage_steps) / stage_steps
    return min(stage, last), 1.0


def reals_at(x_real, stage, fade):
    """Real images (N, C, S, S), averaged down to 4 * 2**stage pixels. With fade < 1, they are mixed
    with their own copy of half the size, enlarged, as G's are."""
    x = nn.functional.adaptive_avg_pool2d(x_real, 4 * 2**stage)
    if fade < 1:
        coarse = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
        x = torch.lerp(coarse, x, fade)
    return x


def mix_styles(w, other):
    """One w for each layer, (N, n_layers, w_dim), from two of them for each image. With a
    probability of 0.9, the layers from a random one on, the same for the batch and never the first,
    take theirs from `other`: section 3.1."""
    n_layers = w.shape[1]
    layer = torch.arange(n_layers, device=w.device)[:, None]
    cutoff = torch.randint(1, n_layers, (), device=w.device)
    mixes = torch.rand((), device=w.device) < 0.9
    return torch.where(mixes & (layer >= cutoff), other, w)


@torch.no_grad()
def move_average(average, G, batch_size):
    """Moves the weights of `average` towards G's, with a half-life of 10,000 images. Copies the
    buffers."""
    beta = 0.5 ** (batch_size / 10_000)
    # The third argument of `move` is a number of updates, which it ignores
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(beta)
    move(list(average.parameters()), list(G.parameters()), None)
    for a, b in zip(average.buffers(), G.buffers(), strict=True):
        a.copy_(b)


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

    # The average of G, which draws all images.
    average = copy.deepcopy(G).eval()

    # All grids use the same noise, so they show the same images changing.
    fixed_z = torch.randn(common.grid_size(args), args.z_dim, device=args.device)

    def fakes(stage, fade):
        """A batch of G's images of new noise, whose styles are mixed."""
        z, other = torch.randn(2, args.batch_size, args.z_dim, device=args.device)
        w, other = G.mapping(z), G.mapping(other)
        n_layers = 2 * stage + 2
        w = w[:, None].expand(-1, n_layers, -1)
        return G.synthesise(mix_styles(w, other[:, None].expand(-1, n_layers, -1)), stage, fade)

    def d_step(x_real, stage, fade):
        """One update of D: minimise d_loss + r1/2 * r1_penalty, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = fakes(stage, fade)
        d_real, d_fake = D(x_real, stage, fade), D(x_fake, stage, fade)
        penalty = r1_penalty(lambda x: D(x, stage, fade), x_real)
        loss_D = d_loss(d_real, d_fake) + args.r1 / 2 * penalty
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step(stage, fade):
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        loss_G = g_loss(D(fakes(stage, fade), stage, fade))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update(stage, fade):
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            loss_D, d_real, d_fake = d_step(reals_at(x_real, stage, fade), stage, fade)
        loss_G = g_step(stage, fade)
        return {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}

    def stage_at(step):
        """The stage and the fade at an update. The images begin as 8x8: the stage of 4x4 and the
        fade after it are skipped."""
        skipped = 2 * args.stage_steps
        return stage_and_fade(step + skipped, args.stage_steps, args.image_size)

    @torch.no_grad()
    def sample(z, step):
        """Images of z, drawn by the average of G at its stage, enlarged to the final size."""
        return nn.functional.interpolate(average(z, *stage_at(step)), args.image_size)

    def draw(n):
        """n images of new noise, for --generate: w = mean + truncation (w - mean)."""
        stage, fade = stage_at(first)
        with torch.no_grad():
            w = average.mapping(torch.randn(n, args.z_dim, device=args.device))
            mean_w = average.mapping.mean_w
            w = (mean_w + args.truncation * (w - mean_w))[:, None].expand(-1, 2 * stage + 2, -1)
            return nn.functional.interpolate(average.synthesise(w, stage, fade), args.image_size)

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    first = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, draw)
    if first == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z, 1))

    # Adam's state is emptied whenever a fade begins or ends.
    n_changes = 2 * (last_stage(args.image_size) - 1)
    changes = [k * args.stage_steps + 1 for k in range(1, n_changes + 1)]

    # Train. Under torchrun, args.batch_size is the part of this process.
    n_images = args.batch_size * common.world_size()
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        stage, fade = stage_at(step)
        if step in changes:
            opt_G.state.clear()
            opt_D.state.clear()
        values = update(stage, fade)
        move_average(average, G, n_images)
        save_due = step % args.save_every == 0 or step == args.steps

        # A loss that is not finite stops the run here, before anything is saved.
        if save_due or step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values), refresh=False)
        if save_due:
            common.save_grid(args, step, sample(fixed_z, step))
            runs.save_checkpoint(args, data, step, state)
    runs.finish_run(args)


if __name__ == "__main__":
    main()
