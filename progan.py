"""ProGAN: both networks learn coarse pictures first, and grow while they learn finer ones.

Karras et al. 2017, Progressive Growing of GANs for Improved Quality, Stability, and Variation.
https://arxiv.org/abs/1710.10196

    D:  min  E[D(G(z))] - E[D(x)] + gp_weight / gamma^2 E[(||grad D(x_hat)||_2 - gamma)^2]
             + 0.001 E[D(x)^2]
             with x_hat = eps x + (1 - eps) G(z), eps ~ U(0, 1)
    G:  min  -E[D(G(z))]

The images are 4x4 first, then 8x8, 16x16, ... With each doubling, a new block of both networks
fades in for --stage-steps updates, and trains for as many.

Differs from wgan_gp.py in:
- both networks grow, and Adam's state is emptied whenever a fade begins or ends;
- equalised learning rates, pixel norm in G, and the deviation over the batch as a feature in D;
- the penalty asks for slopes of gamma instead of 1, and another one keeps scores near 0;
- one update of D per update of G, and the images are drawn by an average of G.

Deviations from the authors' settings for CIFAR-10 (more in docs/papers.md): --stage-steps is 2,500
in a run of 20,000, not 25,000 in one of 1,250,000; G and D are updated in turn, on different fakes.

A run on MNIST, scored in docs/results.md:

    python progan.py --width 16 --gamma 1 --lr 1.2e-2 --stage-steps 500 --steps 10900
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
    p.add_argument("--batch-size", type=runs.positive_int, default=16, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=128, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=128, help="channels up to 32x32")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.99, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--gp-weight", type=float, default=10.0, help="weight of the gradient penalty")
    p.add_argument("--gamma", type=float, default=750.0, help="slope that the penalty asks for")
    p.add_argument(
        "--stage-steps",
        type=int,
        default=2500,
        help="updates of each fade, and of the training after it; 32x32 has faded in after 6 times"
        " as many; 0: all layers from the start",
    )
    return runs.parse_args(p, argv)


# networks -----------------------------------------------------------------------------------------


def channels_at(size, width):
    """The number of channels of layers with `size` x `size` pixels: `width` up to 32x32, and half
    as many with each doubling."""
    return max(1, min(width, 32 * width // size))


class Linear(nn.Module):
    """x (N, n_in) -> (N, n_out), with an equalised learning rate: the weights are N(0, 1) and are
    multiplied by gain / sqrt(n_in) in each forward pass (section 4.1)."""

    def __init__(self, n_in, n_out, gain=2**0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale = gain / n_in**0.5

    def forward(self, x):
        return nn.functional.linear(x, self.scale * self.weight, self.bias)


class Conv(nn.Module):
    """x (N, n_in, S, S) -> (N, n_out, S, S), with an equalised learning rate as in Linear."""

    def __init__(self, n_in, n_out, kernel_size, gain=2**0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.scale = gain / (n_in * kernel_size**2) ** 0.5
        self.padding = kernel_size // 2

    def forward(self, x):
        return nn.functional.conv2d(x, self.scale * self.weight, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """x (N, C, ...), divided at each pixel by the root mean square over the channels, so that
    signals in G cannot grow without bound: section 4.2."""

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, S, S), with S = 4 * 2**stage. G learns to keep them in
    [-1, 1], where the real ones are: there is no tanh.

    The block of the stage draws them. In a fade, they are mixed with those of the stage before,
    enlarged: figure 2. The comments give the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        # 128 x 4x4; the scale of the first layer is that of a 4x4 convolution.
        c = channels_at(4, width)
        layers = [PixelNorm(), Linear(z_dim, c * 16, gain=2**0.5 / 4), nn.Unflatten(1, (c, 4, 4))]
        layers += [nn.LeakyReLU(0.2), PixelNorm()]
        layers += [Conv(c, c, 3), nn.LeakyReLU(0.2), PixelNorm()]
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])
        self.to_rgb = nn.ModuleList([Conv(c, channels, 1, gain=1.0)])

        # 128 x 8x8, 128 x 16x16, 128 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_in = c
            c = channels_at(size, width)
            layers = [nn.Upsample(scale_factor=2)]  # repeats each pixel
            layers += [Conv(n_in, c, 3), nn.LeakyReLU(0.2), PixelNorm()]
            layers += [Conv(c, c, 3), nn.LeakyReLU(0.2), PixelNorm()]
            self.blocks.append(nn.Sequential(*layers))
            self.to_rgb += [Conv(c, channels, 1, gain=1.0)]

    def forward(self, z, stage, fade=None):
        x = z
        for block in self.blocks[:stage]:
            x = block(x)
        image = self.to_rgb[stage](self.blocks[stage](x))
        if fade is not None:
            coarse = nn.functional.interpolate(self.to_rgb[stage - 1](x), scale_factor=2)
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


class Discriminator(nn.Module):
    """Images (N, channels, S, S) with S = 4 * 2**stage -> scores (N,).

    They enter at the block of the stage. In a fade, its features are mixed with those of the image
    of half the size, which enters at the block of the stage before: figure 2.
    """

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 128 x 4x4: the last block, with the deviation over the whole batch
        c = channels_at(4, width)
        layers = [MinibatchDeviation(group=math.inf), Conv(c + 1, c, 3), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), Linear(c * 16, c), nn.LeakyReLU(0.2), Linear(c, 1, gain=1.0)]
        self.blocks = nn.ModuleList([nn.Sequential(*layers)])
        self.from_rgb = nn.ModuleList([nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2))])

        # 128 x 8x8, 128 x 16x16, 128 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_out = c
            c = channels_at(size, width)
            layers = [Conv(c, c, 3), nn.LeakyReLU(0.2), Conv(c, n_out, 3), nn.LeakyReLU(0.2)]
            self.blocks.append(nn.Sequential(*layers, nn.AvgPool2d(2)))
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
    """E[D(G(z))] - E[D(x)], from scores (N,): minus an estimate of the Wasserstein distance, up to
    a factor. Arjovsky et al. 2017, Algorithm 1."""
    return d_fake.mean() - d_real.mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Arjovsky et al. 2017, Algorithm 1."""
    return -d_fake.mean()


def gradient_penalty(D, x_real, x_fake, gamma):
    """E[(||grad D(x_hat)||_2 - gamma)^2] / gamma^2 at x_hat = eps x_real + (1 - eps) x_fake, with
    one eps ~ U(0, 1) per image, for images (N, C, S, S): Gulrajani et al. 2017, eq. 3, with the
    target slope gamma of the authors' code. Through D's statistic of the batch, the slope at an
    image also depends on the scores of the others, as in the authors' code."""
    eps = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)
    x_hat = (eps * x_real + (1 - eps) * x_fake).detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - gamma) ** 2).mean() / gamma**2


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
    average = copy.deepcopy(G)
    fade_tensor = torch.ones((), device=args.device)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def update(stage, fade):
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        # D: minimise d_loss and both penalties, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            x_real = reals_at(x_real, stage, fade)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size), stage, fade)
            d_real, d_fake = D(x_real, stage, fade), D(x_fake, stage, fade)
            score = functools.partial(D, stage=stage, fade=fade)
            penalty = gradient_penalty(score, x_real, x_fake, args.gamma)
            loss_D = d_loss(d_real, d_fake) + args.gp_weight * penalty
            loss_D = loss_D + 0.001 * d_real.square().mean()
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        loss_G = g_loss(D(G(noise(args.batch_size), stage, fade), stage, fade))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def sample(z, step):
        """Images from z, drawn by the average of G at its stage, enlarged to the final size."""
        stage, fade = stage_and_fade(step, args.stage_steps, args.image_size)
        return nn.functional.interpolate(average(z, stage, fade), args.image_size)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n), done))
    if done == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z, 1))

    # The steps at which a fade begins or ends.
    n_changes = 2 * last_stage(args.image_size)
    changes = [k * args.stage_steps + 1 for k in range(1, n_changes + 1)]

    # Train.
    progress = runs.steps(args, done)
    for step in progress:
        stage, fade = stage_and_fade(step, args.stage_steps, args.image_size)
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
        move_average(average, G, 0.999)
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z, step))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
