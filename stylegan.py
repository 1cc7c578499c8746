r"""StyleGAN: G draws with styles, which are computed from z and set each feature's mean and scale.

Karras, Laine, Aila 2018, A Style-Based Generator Architecture for Generative Adversarial Networks.
https://arxiv.org/abs/1812.04948

    D:  min  -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))] + gamma/2 E[||grad D(x)||^2]  (R1)
    G:  min  -E[log sigmoid(D(G(z)))]

Eight layers map z to w. From w, each layer of G computes its style, a scale and a shift for each
feature. In nine of ten batches, the layers from a random one on have the style of another w.

Differs from progan.py in: G starts from a learnt constant, its layers have styles and noise, and
instance norm in place of pixel norm; both networks blur where the size changes; cross entropy and
R1 take the place of WGAN-GP; the images are 8x8 at first; D's statistic is of groups of 4 images.

Deviations from the authors' code (more in docs/papers.md), which has no settings for 32x32:
--stage-steps is 2,500 in a run of 20,000 instead of 9,375 in one of 390,000; the batch size is the
same at all sizes.

A run on MNIST, scored in docs/results.md:

    python stylegan.py --width 16 --z-dim 64 --batch-size 16 --lr 6e-3 --stage-steps 1000 \
        --steps 9400
"""

import copy
import functools
import math
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=512, help="dimensions of z and w")
    p.add_argument("--width", type=runs.positive_int, default=512, help="channels up to 32x32")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.99, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--r1", type=float, default=10.0, help="weight gamma of the R1 penalty")
    p.add_argument(
        "--stage-steps",
        type=int,
        default=2500,
        help="updates of each fade, and of the training after it; 32x32 has faded in after 4 times"
        " as many; 0: all layers from the start",
    )
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
    """The number of channels of layers with `size` x `size` pixels: `width` up to 32x32, and half
    as many with each doubling."""
    return max(1, min(width, 32 * width // size))


class Linear(nn.Module):
    """x (N, n_in) -> (N, n_out), with an equalised learning rate (Karras et al. 2017, section 4.1):
    the weights are N(0, 1) / rate, and are multiplied by rate * gain / sqrt(n_in) in each forward
    pass. Adam's steps are of one size for all weights, so the layer learns `rate` times as
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


def blur(x):
    """x (N, C, S, S), blurred with [1, 2, 1] / 4 in both directions, as two means of 2x2 pixels.
    Without a blur, fine detail turns into false patterns (aliasing) when the size changes."""
    x = nn.functional.avg_pool2d(x, 2, stride=1, padding=1)
    return nn.functional.avg_pool2d(x, 2, stride=1)


class Mapping(nn.Module):
    """z (N, z_dim) -> w (N, z_dim), by eight layers that learn 100 times as slowly as the others.
    z comes from one fixed distribution, and that of w is learnt."""

    def __init__(self, z_dim):
        super().__init__()
        layers = []
        for _ in range(8):
            layers += [Linear(z_dim, z_dim, rate=0.01), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers)

    def forward(self, z):
        return self.net(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())


class Layer(nn.Module):
    """x (N, n_in, S, S), w (N, w_dim) -> (N, n_out, size, size): a convolution (not in the first
    layer of G), noise and a nonlinearity, then instance norm and the style (figure 1b, eq. 1)."""

    def __init__(self, n_in, n_out, size, w_dim, first=False, up=False):
        super().__init__()
        self.up = up
        self.conv = None if first else Conv(n_in, n_out, 3, bias=False)
        self.noise_strength = nn.Parameter(torch.zeros(n_out))
        self.constant_noise = nn.Buffer(torch.randn(1, 1, size, size))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.affine = Linear(w_dim, 2 * n_out, gain=1.0)

    def forward(self, x, w):
        if self.up:
            x = nn.functional.interpolate(x, scale_factor=2)  # repeats each pixel
        if self.conv is not None:
            x = self.conv(x)
        if self.up:
            x = blur(x)

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

    The layers of the stage draw them. In a fade, they are mixed with those of the stage before,
    enlarged. The comments give the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

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

    def forward(self, z, stage, fade=None):
        return self.synthesise(self.mapping(z), stage, fade)

    def synthesise(self, w, stage, fade=None):
        """Images from w: (N, z_dim) for all layers, or (N, 2 * stage + 2, z_dim), of which layer k
        uses w[:, k]."""
        if w.ndim == 2:
            w = w[:, None].expand(-1, 2 * stage + 2, -1)

        # The layers of earlier stages, and then the two of this stage.
        x = self.constant.expand(len(w), -1, -1, -1)
        for k in range(2 * stage):
            x = self.layers[k](x, w[:, k])
        before = x
        for k in (2 * stage, 2 * stage + 1):
            x = self.layers[k](x, w[:, k])
        image = self.to_rgb[stage](x)
        if fade is not None:
            coarse = nn.functional.interpolate(self.to_rgb[stage - 1](before), scale_factor=2)
            image = torch.lerp(coarse, image, fade)
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


class Down(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S/2, S/2): blur, a 3x3 convolution, the mean of each 2x2
    pixels, and a leaky ReLU."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv = Conv(n_in, n_out, 3)

    def forward(self, x):
        # The mean of a constant is that constant, so the bias may be added first.
        x = nn.functional.avg_pool2d(self.conv(blur(x)), 2)
        return nn.functional.leaky_relu(x, 0.2)


class Discriminator(nn.Module):
    """Images (N, channels, S, S) with S = 4 * 2**stage -> scores (N,): the logit of "this is real".

    They enter at the block of the stage. In a fade, its features are mixed with those of the image
    of half the size, which enters at the block of the stage before.
    """

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 512 x 4x4: the last block
        c = channels_at(4, width)
        layers = [MinibatchDeviation(group=4), Conv(c + 1, c, 3), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), Linear(c * 16, c), nn.LeakyReLU(0.2), Linear(c, 1, gain=1.0)]
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])
        self.from_rgb = nn.ModuleList([nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2))])

        # 512 x 8x8, 512 x 16x16, 512 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_out = c
            c = channels_at(size, width)
            self.blocks.append(nn.Sequential(Conv(c, c, 3), nn.LeakyReLU(0.2), Down(c, n_out)))
            self.from_rgb.append(nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2)))

    def forward(self, image, stage, fade=None):
        x = self.blocks[stage](self.from_rgb[stage](image))
        if fade is not None:
            half = nn.functional.avg_pool2d(image, 2)
            x = torch.lerp(self.from_rgb[stage - 1](half), x, fade)
        for block in reversed(self.blocks[:stage]):
            x = block(x)
        return x.flatten()


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


def last_stage(image_size):
    """The stage of the whole networks: 3 for 32x32."""
    return int(math.log2(image_size // 4))


def stage_and_fade(step, stage_steps, image_size):
    """The stage at an update (0 for 4x4, 1 for 8x8, ...), and how far it has faded in, from 0 to 1,
    or None if it is not fading. Each stage trains for `stage_steps`, and the next one fades in for
    as many."""
    last = last_stage(image_size)
    if stage_steps == 0:
        return last, None
    stage, updates = divmod(step - 1, 2 * stage_steps)
    if updates >= stage_steps and stage < last:
        return stage + 1, (updates - stage_steps) / stage_steps
    return min(stage, last), None


def reals_at(x_real, stage, fade):
    """Real images (N, C, S, S), averaged down to 4 * 2**stage pixels. In a fade, they are mixed
    with their own copy of half the size, enlarged, as G's are."""
    x = nn.functional.adaptive_avg_pool2d(x_real, 4 * 2**stage)
    if fade is not None:
        coarse = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
        x = torch.lerp(coarse, x, fade)
    return x


def mix_styles(w, other, n_layers):
    """One w for each layer, (N, n_layers, w_dim), from two for each image, (N, w_dim). With a
    probability of 0.9, the layers from a random one on, the same for the batch and never the first,
    have their w from `other`, so that each layer's style learns to work with any other: section
    3.1."""
    layer = torch.arange(n_layers, device=w.device)[:, None]
    cutoff = torch.randint(1, n_layers, (), device=w.device)
    mixes = torch.rand((), device=w.device) < 0.9
    return torch.where(mixes & (layer >= cutoff), other[:, None], w[:, None])


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

    # Networks, in the layout that is faster for convolutions, and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, fused=True)

    # The average of G, which draws all images, and how far the stage has faded in. A CUDA graph
    # needs that as a tensor.
    average = copy.deepcopy(G).eval()
    fade_tensor = torch.ones((), device=args.device)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def fakes(stage, fade):
        """A batch of G's images of new noise, whose styles are mixed."""
        w, other = G.mapping(noise(args.batch_size)), G.mapping(noise(args.batch_size))
        return G.synthesise(mix_styles(w, other, n_layers=2 * stage + 2), stage, fade)

    def update(stage, fade):
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        # D: minimise d_loss and r1/2 * r1_penalty, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            x_real = reals_at(x_real, stage, fade)
            with torch.no_grad():
                x_fake = fakes(stage, fade)
            x_real.requires_grad_()  # for R1, the gradient at the images
            d_real, d_fake = D(x_real, stage, fade), D(x_fake, stage, fade)
            loss_D = d_loss(d_real, d_fake) + args.r1 / 2 * r1_penalty(d_real, x_real)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        loss_G = g_loss(D(fakes(stage, fade), stage, fade))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    def stage_at(step):
        """The stage and the fade at an update. The images begin as 8x8: the stage of 4x4 and the
        fade after it are skipped."""
        skipped = 2 * args.stage_steps
        return stage_and_fade(step + skipped, args.stage_steps, args.image_size)

    @torch.no_grad()
    def sample(z, step, mean_w=0.0, truncation=1.0):
        """Images from z, drawn by the average of G at its stage with w = mean + truncation (w -
        mean), enlarged to the final size."""
        stage, fade = stage_at(step)
        w = average.mapping(z)
        images = average.synthesise(mean_w + truncation * (w - mean_w), stage, fade)
        return nn.functional.interpolate(images, args.image_size)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    done = runs.start_run(args, data, state)
    if args.generate:
        with torch.no_grad():
            mean_w = average.mapping(noise(10_000)).mean(0)
        return common.generate(args, lambda n: sample(noise(n), done, mean_w, args.truncation))
    if done == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z, 1))

    # The steps at which a fade begins or ends.
    n_changes = 2 * (last_stage(args.image_size) - 1)
    changes = [k * args.stage_steps + 1 for k in range(1, n_changes + 1)]

    # Train. n_images are those of all processes. The half-life of the average is 10,000 images.
    n_images = args.batch_size * common.world_size()
    progress = runs.steps(args, done)
    for step in progress:
        stage, fade = stage_at(step)
        if fade is not None:
            # In place, because the update that a graph replays reads this tensor.
            fade = fade_tensor.fill_(fade)
        if step in changes:
            opt_G.state.clear()
            opt_D.state.clear()
        if step in changes or step == done + 1:
            # Each stage has a CUDA graph of its own, and so has its fade.
            update_now = functools.partial(update, stage, fade)
            update_now = runs.cuda_graph(args, data, update_now)
        values = update_now()
        move_average(average, G, 0.5 ** (n_images / 10_000))
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z, step))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
