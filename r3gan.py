"""R3GAN: a plain ResNet, a loss on pairs of real and generated images, and two gradient penalties.

Huang et al. 2024, The GAN is dead; long live the GAN! A Modern Baseline GAN.
https://arxiv.org/abs/2501.05441

    D:  min  E[log(1 + exp(D(G(z)) - D(x)))]
             + gamma/2 (E[||grad D(x)||^2] + E[||grad D(G(z))||^2])    (R1 and R2)
    G:  min  E[log(1 + exp(D(x) - D(G(z))))]

Each real image is paired with the generated image at the same place in the batch, and D is asked
which of the two looks more real. Only the difference of their scores matters.

Differs from stylegan2.py in: pairs in both losses; R2 beside R1, both at every step; residual
networks, without normalisation, styles, noise, minibatch deviation and images at the smaller sizes;
the learning rate, gamma, Adam's beta2 and the half-life of G's average change in the course of a
run.

This is the configuration in which the authors train CIFAR-10 (train.py of
github.com/brownvc/R3GAN), at 32x32 with a width of 768 and a batch of 512. Deviations from it:
- The batch size is 64, as 512 images at this width do not fit in the 80 GB of an H100.
- Images have no labels, and are not augmented. (The authors also flip them.)
- Everything is computed in float32; the authors use bfloat16 in most layers.
- The schedules span --steps, so resuming with more --steps raises the learning rate again. The
  authors' span the first 20 million images of 250 million.
- The half-life of G's average ends at 2% of the run's images. Theirs ends at 5 million images,
  which is 2% of their 250 million.
- For other image sizes, the width is still the same at every resolution.

A small run on MNIST, which docs/results.md has with 11,500 steps:

    python r3gan.py --width 16 --batch-size 8 --lr 1e-3 --lr-end 2e-4 --gamma 10 --gamma-end 1
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
    p = ArgumentParser(prog="r3gan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=64, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=64, help="dimensions of z")
    p.add_argument(
        "--width",
        type=runs.positive_int,
        default=768,
        help="channels at all sizes, a multiple of 8: sets size and speed",
    )
    p.add_argument(
        "--lr", type=runs.positive_float, default=2e-4, help="learning rate at the start"
    )
    p.add_argument(
        "--lr-end", type=runs.positive_float, default=5e-5, help="learning rate at the end"
    )
    p.add_argument("--beta2", type=runs.fraction, default=0.9, help="Adam's beta2 at the start")
    p.add_argument("--beta2-end", type=runs.fraction, default=0.99, help="Adam's beta2 at the end")
    p.add_argument(
        "--gamma",
        type=runs.non_negative_float,
        default=0.05,
        help="weight of R1 and R2 at the start",
    )
    p.add_argument(
        "--gamma-end", type=runs.non_negative_float, default=0.005, help="the same at the end"
    )
    p.add_argument(
        "--image-size", type=int, choices=[16, 32, 64, 128, 256], default=32, help="pixels"
    )
    args = runs.parse_args(p, argv)
    if args.width % 8:
        p.error(f"--width is {args.width}, which is not a multiple of 8")
    return args


# ----------------------------------------------------------------------------------------- networks


class ConvInGroups(torch.autograd.Function):
    """nn.functional.conv2d of x (N, C, S, S), for the gradient penalties. PyTorch takes the second
    derivative of conv2d by a loop over the groups, which is slow on a GPU with hundreds of them.
    Here the gradient of x is a transposed convolution, whose derivative needs no loop."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        groups = x.shape[1] // weight.shape[1]
        ctx.settings = {"stride": stride, "padding": padding, "groups": groups}
        return nn.functional.conv2d(x, weight, **ctx.settings)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = nn.functional.conv_transpose2d(grad, weight, **ctx.settings)
        if ctx.needs_input_grad[1]:
            grad_weight = nn.grad.conv2d_weight(x, weight.shape, grad, **ctx.settings)
        return grad_x, grad_weight, None, None


class GroupedConv(nn.Conv2d):
    """nn.Conv2d without bias, by ConvInGroups."""

    def forward(self, x):
        return ConvInGroups.apply(x, self.weight, self.stride, self.padding)


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
    """x (N, C, S, S) -> x + f(x): f has twice as many channels inside, and a 3x3 convolution in
    groups of 16 of them.

    f is 0 at the start, as its last weights are. Those before it keep the mean square of x, times
    1 / sqrt(n_blocks), so that the blocks together do (Zhang et al. 2019, Fixup, 1901.09321).
    """

    def __init__(self, n_channels, n_blocks):
        super().__init__()
        inner = 2 * n_channels
        gain = (2 / 1.04) ** 0.5 * n_blocks**-0.25  # 2 / 1.04 makes up for the leaky ReLU
        self.f = nn.Sequential(
            conv(n_channels, inner, 1, gain),
            Activation(inner),
            conv(inner, inner, 3, gain, groups=inner // 16),
            Activation(inner),
            conv(inner, n_channels, 1, gain=0.0),
        )

    def forward(self, x):
        return x + self.f(x)


class Resample(nn.Module):
    """Doubles (`up`) or halves the size of x (N, C, S, S) with the filter [1, 3, 3, 1] / 8 in both
    directions. A gain of 4 makes up for the zeros that doubling puts in three of four pixels."""

    def __init__(self, up):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        gain = 4.0 if up else 1.0
        self.register_buffer("kernel", gain * taps[:, None] * taps, persistent=False)
        self.up = up

    def forward(self, x):
        n_channels = x.shape[1]
        kernel = self.kernel.expand(n_channels, 1, 4, 4)
        if self.up:
            return nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1, groups=n_channels)
        return ConvInGroups.apply(x, kernel, 2, 1)  # stride 2, padding 1


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size). G has no tanh: it learns to
    stay in [-1, 1], the range of the real images.

    The comments have the shapes at the default width and size.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        n_sizes = int(math.log2(image_size // 4)) + 1

        # 768 x 4x4: a learnt basis, scaled by a linear map of z
        self.basis = nn.Parameter(torch.randn(width, 4, 4))
        self.linear = nn.Linear(z_dim, width, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, z_dim**-0.5)

        # 768 x 4x4, 768 x 8x8, 768 x 16x16, 768 x 32x32
        layers = [Block(width, 2 * n_sizes), Block(width, 2 * n_sizes)]
        for _ in range(n_sizes - 1):
            layers += [Resample(up=True), Block(width, 2 * n_sizes), Block(width, 2 * n_sizes)]

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
        n_sizes = int(math.log2(image_size // 4)) + 1

        # 768 x 32x32
        layers = [conv(channels, width, 1), Block(width, 2 * n_sizes), Block(width, 2 * n_sizes)]

        # 768 x 16x16, 768 x 8x8, 768 x 4x4
        for _ in range(n_sizes - 1):
            layers += [Resample(up=False), Block(width, 2 * n_sizes), Block(width, 2 * n_sizes)]

        # 768 x 1x1: one weight for each channel and pixel
        last = GroupedConv(width, width, 4, groups=width, bias=False)
        nn.init.normal_(last.weight, 0.0, 1 / 4)
        self.net = nn.Sequential(*layers, last, nn.Flatten())
        self.linear = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.linear.weight, 0.0, width**-0.5)

    def forward(self, x):
        return self.linear(self.net(x)).flatten()


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake):
    """E[log(1 + exp(D(G(z)) - D(x)))], from scores (N,), in pairs: Huang et al. 2024, eq. 2."""
    return nn.functional.softplus(d_fake - d_real).mean()


def g_loss(d_real, d_fake):
    """E[log(1 + exp(D(x) - D(G(z))))], from scores (N,), in pairs. This is what the authors' code
    minimises; eq. 2 of the paper has minus D's loss instead."""
    return nn.functional.softplus(d_real - d_fake).mean()


def gradient_penalty(D, x):
    """E[||grad D(x)||^2] at images x (N, ...) of any shape: R1 at real images (Mescheder et al.
    2018, eq. 9), R2 at generated ones (eq. 10), without gamma / 2."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return grad.flatten(1).square().sum(1).mean()


# ----------------------------------------------------------------------------------------- training


class Adam(torch.optim.Optimizer):
    """Adam with beta1 = 0 and an epsilon of 1e-8. Its learning rate and beta2 are 0-dim tensors,
    which may change in the course of a run. (PyTorch's fused Adam takes beta2 as a number, which a
    CUDA graph would keep as it was.)"""

    def __init__(self, parameters, lr, beta2):
        parameters = list(parameters)
        device = parameters[0].device
        settings = {"lr": torch.full((), lr, device=device)}
        settings["beta2"] = torch.full((), beta2, device=device)
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, beta2 = group["lr"], group["beta2"]
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state["step"] = torch.zeros((), device=w.device)
                    state["exp_avg_sq"] = torch.zeros_like(w)
                state["step"] += 1
                state["exp_avg_sq"].lerp_(w.grad.square(), 1 - beta2)
                mean_square = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                w.sub_(lr * w.grad / (mean_square.sqrt() + 1e-8))


def cosine(start, end, progress):
    """A number that changes from `start` to `end` while `progress` does from 0 to 1: slowly at both
    ends, and fastest in the middle."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def move_average(average, G, beta):
    """average = beta average + (1 - beta) G."""
    # The third argument of `move` is a number of updates, which it ignores
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(beta)
    move(list(average.parameters()), list(G.parameters()), None)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)

    # Networks and optimisers.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    opt_G = Adam(G.parameters(), args.lr, args.beta2)
    opt_D = Adam(D.parameters(), args.lr, args.beta2)

    # The weight of the penalties, which changes. A CUDA graph needs it as a tensor.
    gamma = torch.full((), args.gamma, device=args.device)

    # The average of G, which draws all images.
    average = copy.deepcopy(G)

    # All grids use the same noise, so they show the same images changing.
    fixed_z = torch.randn(common.grid_size(args), args.z_dim, device=args.device)

    def d_step(x_real):
        """One update of D: minimise d_loss + gamma/2 (R1 + R2), with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        d_real, d_fake = D(x_real), D(x_fake)
        penalty = gradient_penalty(D, x_real) + gradient_penalty(D, x_fake)
        loss_D = d_loss(d_real, d_fake) + gamma / 2 * penalty
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d_real.mean(), d_fake.mean()

    def g_step(x_real):
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        x_fake = G(torch.randn(args.batch_size, args.z_dim, device=args.device))
        loss_G = g_loss(D(x_real), D(x_fake))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update():
        """One step: an update of D, then one of G, each on its own minibatch."""
        x_real, _ = common.sample_batch(args, data)
        loss_D, d_real, d_fake = d_step(x_real)
        x_real, _ = common.sample_batch(args, data)
        loss_G = g_step(x_real)
        return {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}

    @torch.no_grad()
    def sample(z):
        """Images of z, drawn by the average of G."""
        return average(z)

    def draw(n):
        """n images of new noise, for --generate."""
        return sample(torch.randn(n, args.z_dim, device=args.device))

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state["average"] = average
    first = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, draw)
    if first == 0:
        average.load_state_dict(G.state_dict())  # --init may have replaced G
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        # What the update needs is set before it; the average of G moves after it.
        before, after = (step - 1) / args.steps, step / args.steps
        for opt in (opt_G, opt_D):
            opt.param_groups[0]["lr"].fill_(cosine(args.lr, args.lr_end, before))
            opt.param_groups[0]["beta2"].fill_(cosine(args.beta2, args.beta2_end, before))
        gamma.fill_(cosine(args.gamma, args.gamma_end, before))
        values = update()
        half_life = max(1e-3, cosine(0, 0.02 * args.steps, after))  # in steps
        move_average(average, G, 0.5 ** (1 / half_life))
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
