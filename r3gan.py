r"""R3GAN: a plain ResNet, a loss on pairs of real and generated images, and two gradient penalties.

Huang et al. 2024, The GAN is dead; long live the GAN! A Modern Baseline GAN.
https://arxiv.org/abs/2501.05441

    D:  min  E[log(1 + exp(D(G(z)) - D(x)))]
             + gamma/2 (E[||grad D(x)||^2] + E[||grad D(G(z))||^2])    (R1 and R2)
    G:  min  E[log(1 + exp(D(x) - D(G(z))))]

Each real image is paired with the generated image at the same place in the batch, and D is asked
which of the two looks more real. Only the difference of their scores matters. Together, R1 and R2
make D flat around both kinds of images; the paper proves local convergence with either of them.

Differs from stylegan2.py in: pairs in both losses; R2 beside R1, both at every step; residual
networks, without normalisation, equalised learning rates, styles, noise, minibatch deviation and
images at the smaller sizes; the learning rate, gamma, Adam's beta2 and the half-life of G's average
change in the course of a run.

Deviations from the authors' settings for CIFAR-10 (more in docs/papers.md): the batch size is 64,
not 512; no labels, no augmentation, no bfloat16; the schedules span --steps.

A run on MNIST, scored in docs/results.md:

    python r3gan.py --width 16 --batch-size 8 --lr 2e-3 --lr-end 4e-4 --gamma 10 --gamma-end 1 \
        --steps 3900
"""

import copy
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
    p.add_argument("--z-dim", type=runs.positive_int, default=64, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=768, help="channels, a multiple of 8")
    p.add_argument("--lr", type=float, default=2e-4, help="learning rate at the start")
    p.add_argument("--lr-end", type=float, default=5e-5, help="the same at the end")
    p.add_argument("--beta2", type=float, default=0.9, help="Adam's beta2 at the start")
    p.add_argument("--beta2-end", type=float, default=0.99, help="the same at the end")
    p.add_argument("--gamma", type=float, default=0.05, help="weight of R1 and R2 at the start")
    p.add_argument("--gamma-end", type=float, default=0.005, help="the same at the end")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    args = runs.parse_args(p, argv)
    if args.width % 8:
        p.error(f"--width is {args.width}, which is not a multiple of 8")
    return args


# networks -----------------------------------------------------------------------------------------


class GroupedConvFunction(torch.autograd.Function):
    """The 3x3 convolution of x (N, C, S, S) in groups, with padding 1. It computes what
    nn.functional.conv2d does, but has a faster second derivative, which R1 and R2 need: PyTorch's
    own takes one group after the other, which is slow on a GPU. Here, the gradient of x is written
    as a transposed convolution, and the derivative of that takes all groups at once."""

    @staticmethod
    def forward(ctx, x, weight, groups):
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return nn.functional.conv2d(x, weight, padding=1, groups=groups)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = nn.functional.conv_transpose2d(grad, weight, padding=1, groups=ctx.groups)
        if ctx.needs_input_grad[1]:
            grad_weight = nn.grad.conv2d_weight(x, weight.shape, grad, padding=1, groups=ctx.groups)
        return grad_x, grad_weight, None


class GroupedConv(nn.Conv2d):
    """A 3x3 nn.Conv2d without bias, by GroupedConvFunction."""

    def forward(self, x):
        return GroupedConvFunction.apply(x, self.weight, self.groups)


def conv(n_in, n_out, kernel_size, gain=1.0, groups=1):
    """A convolution without bias, which keeps the size; its weights are N(0, gain^2 / fan_in)."""
    kind = nn.Conv2d if groups == 1 else GroupedConv
    layer = kind(n_in, n_out, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
    nn.init.normal_(layer.weight, 0.0, gain / layer.weight[0].numel() ** 0.5)
    return layer


class Activation(nn.Module):
    """Leaky ReLU of x (N, C, S, S) plus a bias for each channel."""

    def __init__(self, n_channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_channels))

    def forward(self, x):
        return nn.functional.leaky_relu(x + self.bias[:, None, None], 0.2)


class Block(nn.Module):
    """x (N, C, S, S) -> x + f(x): f has twice as many channels inside, and its 3x3 convolution
    works on groups of 16 of them.

    f is 0 at the start, because its last convolution is. The other two are scaled by
    n_blocks^(-1/4) each, so that all blocks together keep the size of x (Zhang et al. 2019, Fixup,
    1901.09321).
    """

    def __init__(self, n_channels, n_blocks):
        super().__init__()
        inner = 2 * n_channels
        # The first factor makes up for the leaky ReLU.
        gain = (2 / (1 + 0.2**2)) ** 0.5 * n_blocks**-0.25
        self.f = nn.Sequential(
            conv(n_channels, inner, 1, gain),
            Activation(inner),
            conv(inner, inner, 3, gain, groups=inner // 16),
            Activation(inner),
            conv(inner, n_channels, 1, gain=0.0),
        )

    def forward(self, x):
        return x + self.f(x)


def blur(x):
    """x (N, C, S, S), blurred with [1, 2, 1] / 4 in both directions, as two means of 2x2 pixels."""
    x = nn.functional.avg_pool2d(x, 2, stride=1, padding=1)
    return nn.functional.avg_pool2d(x, 2, stride=1)


class Double(nn.Module):
    """x (N, C, S, S) -> (N, C, 2S, 2S). With the blur, the filter is [1, 3, 3, 1] / 4."""

    def forward(self, x):
        return blur(nn.functional.interpolate(x, scale_factor=2))


class Halve(nn.Module):
    """x (N, C, S, S) -> (N, C, S/2, S/2). With the blur, the filter is [1, 3, 3, 1] / 8."""

    def forward(self, x):
        return nn.functional.avg_pool2d(blur(x), 2)


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size). G learns to keep them in
    [-1, 1], where the real ones are: there is no tanh.

    The comments give the shapes at the default width and size. Other sizes are powers of 2.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")
        n_doublings = int(math.log2(image_size // 4))
        n_blocks = 2 * (n_doublings + 1)

        # 768 x 4x4: a learnt basis, scaled by a linear map of z
        self.basis = nn.Parameter(torch.randn(width, 4, 4))
        self.linear = nn.Linear(z_dim, width, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, z_dim**-0.5)

        # 768 x 4x4, 768 x 8x8, 768 x 16x16, 768 x 32x32
        layers = [Block(width, n_blocks), Block(width, n_blocks)]
        for _ in range(n_doublings):
            layers += [Double(), Block(width, n_blocks), Block(width, n_blocks)]

        # channels x 32x32
        layers += [conv(width, channels, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, z):
        return self.net(self.basis * self.linear(z)[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,), which mean something only in
    comparison with each other."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        n_halvings = int(math.log2(image_size // 4))
        n_blocks = 2 * (n_halvings + 1)

        # 768 x 32x32
        layers = [conv(channels, width, 1), Block(width, n_blocks), Block(width, n_blocks)]

        # 768 x 16x16, 768 x 8x8, 768 x 4x4
        for _ in range(n_halvings):
            layers += [Halve(), Block(width, n_blocks), Block(width, n_blocks)]

        self.net = nn.Sequential(*layers)

        # 768: for each channel, the inner product with a learnt 4x4 basis
        self.basis = nn.Parameter(torch.randn(width, 4, 4) / 4)
        self.linear = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, width**-0.5)

    def forward(self, x):
        h = (self.net(x) * self.basis).sum((2, 3))
        return self.linear(h).flatten()


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """E[log(1 + exp(D(G(z)) - D(x)))], from scores (N,), in pairs: Huang et al. 2024, eq. 2."""
    return nn.functional.softplus(d_fake - d_real).mean()


def g_loss(d_real, d_fake):
    """E[log(1 + exp(D(x) - D(G(z))))], from scores (N,), in pairs. This is what the authors' code
    minimises; eq. 2 of the paper has minus D's loss instead."""
    return nn.functional.softplus(d_real - d_fake).mean()


def r1_penalty(scores, x):
    """E[||grad D(x)||^2] at images (N, C, S, S), which require gradients, from their scores (N,):
    the mean over the images of the squared norm of each one's gradient, without gamma / 2. R1 at
    real images (Mescheder et al. 2018, eq. 9), R2 at fakes (eq. 10)."""
    (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


# training -----------------------------------------------------------------------------------------


def cosine(start, end, part_done):
    """A number that changes from `start` to `end` while `part_done` does from 0 to 1: slowly at
    both ends, and fastest in the middle."""
    return end + (start - end) * (1 + math.cos(math.pi * part_done)) / 2


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
    betas = (0.0, args.beta2)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, fused=True)

    # The average of G, which draws all images.
    average = copy.deepcopy(G)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, args.z_dim, device=args.device)

    def update(gamma):
        """One step: an update of D, then one of G, each on its own minibatch."""
        # D: minimise d_loss + gamma/2 (R1 + R2), with G fixed.
        D.requires_grad_(True)
        x_real, _ = common.sample_batch(args, data)
        with torch.no_grad():
            x_fake = G(noise(args.batch_size))
        # R1 and R2 need the gradients at the images.
        x_real.requires_grad_()
        x_fake.requires_grad_()
        d_real, d_fake = D(x_real), D(x_fake)
        penalty = r1_penalty(d_real, x_real) + r1_penalty(d_fake, x_fake)
        loss_D = d_loss(d_real, d_fake) + gamma / 2 * penalty
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        x_real, _ = common.sample_batch(args, data)
        loss_G = g_loss(D(x_real), D(G(noise(args.batch_size))))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        scores = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def sample(z):
        """Images from z, drawn by the average of G."""
        return average(z)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n)))
    if done == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z))

    # Train. Adam's beta2 changes, which a CUDA graph cannot follow, so none is used.
    progress = runs.steps(args, done)
    for step in progress:
        part_done = (step - 1) / args.steps
        for opt in (opt_G, opt_D):
            opt.param_groups[0]["lr"] = cosine(args.lr, args.lr_end, part_done)
            opt.param_groups[0]["betas"] = (0.0, cosine(args.beta2, args.beta2_end, part_done))
        values = update(gamma=cosine(args.gamma, args.gamma_end, part_done))
        # The half-life of the average, in steps, grows from 0 to 2% of the run.
        half_life = cosine(0, 0.02 * args.steps, step / args.steps)
        move_average(average, G, 0.5 ** (1 / half_life))
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
