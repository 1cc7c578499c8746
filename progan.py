"""ProGAN: both networks learn coarse pictures first, and grow while they learn finer ones.

Karras et al. 2017, Progressive Growing of GANs for Improved Quality, Stability, and Variation.
https://arxiv.org/abs/1710.10196

    D:  min  E[D(G(z))] - E[D(x)] + gp_weight / gamma^2 E[(||grad D(x_hat)||_2 - gamma)^2]
             + 0.001 E[D(x)^2]
             with x_hat = eps x + (1 - eps) G(z), eps ~ U(0, 1)
    G:  min  -E[D(G(z))]

The images are 4x4 first, then 8x8, 16x16, ... With each doubling, a new block of both networks
fades in for --stage-steps updates, and trains for as many.

Differs from wgan_gp.py in: both networks grow; they have equalised learning rates in place of
initialisations, pixel norm in G, and in D the standard deviation over the batch as a feature; the
penalty asks for slopes of gamma instead of 1; another one keeps scores near 0; D gets one update
per update of G instead of five; Adam's state is emptied whenever a fade begins or ends; the images
are drawn by an average of G.

This is the configuration in which the authors train CIFAR-10 ("Section 6.5" in config.py of the
Theano version, github.com/tkarras/progressive_growing_of_gans, commit 18d4116). Deviations from it:
- --stage-steps is 2,500, so that the default 20,000 steps reach 32x32. Theirs are 25,000, in a run
  of 1,250,000.
- G and D are updated in turn, on different fakes. Theirs are updated at once, on the same.
- The penalty takes D's slope at images of the stage's size. Theirs takes it at images of the final
  size with repeated pixels, where it is smaller: at 4x4 on the way to 32x32, an eighth. In a run
  here, that was no better (docs/experiments.md).
- The scale of a weight follows from its fan-in; theirs is measured on the initial weights.
- The first layer of G has a bias for each pixel, not one for each channel.
- From 64x64 on, layers have half as many channels as theirs.

The networks grow, which one CUDA graph cannot follow, so none is used. With --init,
--stage-steps 0 goes on with the whole networks.

In short runs with a width of 16, --gamma 1 scored better than the authors' 750
(docs/experiments.md):

    python progan.py --dataset cifar10 --width 16 --gamma 1 --stage-steps 2000 --steps 44000
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
    p = ArgumentParser(prog="progan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=16, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=128, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=128, help="channels up to 32x32")
    p.add_argument("--lr", type=runs.positive_float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.0, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.99, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--gp-weight", type=runs.non_negative_float, default=10.0, help="weight of the penalty"
    )
    p.add_argument(
        "--gamma", type=runs.positive_float, default=750.0, help="slope that the penalty asks for"
    )
    p.add_argument(
        "--stage-steps",
        type=runs.non_negative_int,
        default=2500,
        help="updates of each fade, and of the training after it; 32x32 has faded in after 6 times"
        " as many; 0: all layers from the start",
    )
    return runs.parse_args(p, argv)


# ----------------------------------------------------------------------------------------- networks


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
    """x (N, C, ...), divided at each pixel by the root mean square over the channels: section
    4.2."""

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, S, S), with S = 4 * 2**stage. G learns to keep them in
    [-1, 1], where the real ones are: there is no tanh.

    The block of the stage draws them. With fade < 1, they are mixed with those of the stage before,
    enlarged: figure 2. The comments have the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        # 128 x 4x4; the scale of the first layer is that of a 4x4 convolution
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
            self.to_rgb.append(Conv(c, channels, 1, gain=1.0))

    def forward(self, z, stage, fade):
        x = z
        for block in self.blocks[: stage + 1]:
            before = x
            x = block(x)
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


class Discriminator(nn.Module):
    """Images (N, channels, S, S) with S = 4 * 2**stage -> scores (N,).

    They enter at the block of the stage. With fade < 1, its features are mixed with those of the
    image of half the size, which enters at the next block: figure 2.
    """

    def __init__(self, width, channels, image_size):
        super().__init__()
        # 128 x 4x4, with one more channel for minibatch_deviation
        c = channels_at(4, width)
        layers = [Conv(c + 1, c, 3), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), Linear(c * 16, c), nn.LeakyReLU(0.2), Linear(c, 1, gain=1.0)]
        self.last = nn.Sequential(*layers)
        self.from_rgb = nn.ModuleList([nn.Sequential(Conv(channels, c, 1), nn.LeakyReLU(0.2))])
        self.blocks = nn.ModuleList()

        # 128 x 8x8, 128 x 16x16, 128 x 32x32
        size = 4
        while size < image_size:
            size *= 2
            n_out = c
            c = channels_at(size, width)
            layers = [Conv(c, c, 3), nn.LeakyReLU(0.2), Conv(c, n_out, 3), nn.LeakyReLU(0.2)]
            self.blocks.append(nn.Sequential(*layers, nn.AvgPool2d(2)))
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
        x = torch.cat([x, minibatch_deviation(x, group=len(x))], 1)
        return self.last(x).flatten()


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake):
    """E[D(G(z))] - E[D(x)], from scores (N,): minus an estimate of the Wasserstein distance, up to
    a factor. Arjovsky et al. 2017, Algorithm 1."""
    return d_fake.mean() - d_real.mean()


def g_loss(d_fake):
    """-E[D(G(z))], from scores (N,): Arjovsky et al. 2017, Algorithm 1."""
    return -d_fake.mean()


def gradient_penalty(D, x_real, x_fake, gamma):
    """E[(||grad D(x_hat)||_2 - gamma)^2] / gamma^2 at x_hat = eps x_real + (1 - eps) x_fake, with
    one eps ~ U(0, 1) per image: Gulrajani et al. 2017, eq. 3, with the target slope gamma of the
    authors' code. Inputs (N, ...) may have any shape. Through D's statistic of the batch, the slope
    at an image also depends on the scores of the others, as in the authors' code."""
    one_per_image = [len(x_real)] + [1] * (x_real.ndim - 1)
    eps = torch.rand(one_per_image, device=x_real.device)
    x_hat = (eps * x_real + (1 - eps) * x_fake).detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - gamma) ** 2).mean() / gamma**2


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
    average = copy.deepcopy(G)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = torch.randn(common.grid_size(args), args.z_dim, device=args.device)

    def d_step(x_real, stage, fade):
        """One update of D: minimise d_loss + gp_weight * gradient_penalty + 0.001 E[D(x)^2], with G
        fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device), stage, fade)
        d_real, d_fake = D(x_real, stage, fade), D(x_fake, stage, fade)
        penalty = gradient_penalty(lambda x: D(x, stage, fade), x_real, x_fake, args.gamma)
        loss_D = d_loss(d_real, d_fake) + args.gp_weight * penalty + 0.001 * d_real.square().mean()
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step(stage, fade):
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device), stage, fade)
        loss_G = g_loss(D(x_fake, stage, fade))
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

    def move_average():
        """average = 0.999 average + 0.001 G."""
        # The third argument of `move` is a number of updates, which it ignores
        move = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        move(list(average.parameters()), list(G.parameters()), None)

    @torch.no_grad()
    def sample(z, step):
        """Images of z, drawn by the average of G at its stage, enlarged to the final size."""
        stage, fade = stage_and_fade(step, args.stage_steps, args.image_size)
        return nn.functional.interpolate(average(z, stage, fade), args.image_size)

    def draw(n):
        """n images of new noise, for --generate."""
        return sample(torch.randn(n, args.z_dim, device=args.device), first)

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
    n_changes = 2 * last_stage(args.image_size)
    changes = [k * args.stage_steps + 1 for k in range(1, n_changes + 1)]

    # Train.
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        stage, fade = stage_and_fade(step, args.stage_steps, args.image_size)
        if step in changes:
            opt_G.state.clear()
            opt_D.state.clear()
        values = update(stage, fade)
        move_average()
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
