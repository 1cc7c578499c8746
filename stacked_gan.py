"""Stacked GAN: one GAN draws features from a label, another draws an image from the features.

Huang, Li, Poursaeed, Hopcroft, Belongie 2016, Stacked Generative Adversarial Networks.
https://arxiv.org/abs/1612.04357

First, an encoder E (Enc in the formulas) learns to classify; after that it is fixed. h = Enc(x) are
the features of its last hidden layer. G1 draws h from a label y and noise z1, and G0 draws x from h
and noise z0. Each D has a second head, Q1 or Q0, which recovers the noise.

    E:   min  E[-log p(y | h)]
    D1:  min  -1/2 E[log sigmoid(D1(h))] - 1/2 E[log(1 - sigmoid(D1(G1(z1, y))))]
              + 10 E[(Q1(G1(z1, y)) - z1)^2]
    G1:  min  -E[log sigmoid(D1(G1(z1, y)))] + E[-log p(y | G1(z1, y))]
              + 10 E[(Q1(G1(z1, y)) - z1)^2]
    D0:  min  -1/2 E[log sigmoid(D0(x))] - 1/2 E[log(1 - sigmoid(D0(G0(z0, h))))]
              + 10 E[(Q0(G0(z0, h)) - z0)^2]
    G0:  min  -E[log sigmoid(D0(G0(z0, h)))] + E[(Enc(G0(z0, h)) - h)^2]
              + 10 E[(Q0(G0(z0, h)) - z0)^2]

The last term of each is the entropy loss: without it, G could ignore the noise. From step
--joint-from on, G0 gets the features that G1 draws instead of E's, and they are its target, too.

Differs from cgan.py in: two GANs instead of one; the label is an input of G1 alone; E, rather than
a D that sees the label, makes each G obey its input; D has a head that recovers the noise, 5x5
convolutions and no batch norm; z is uniform in [0, 1); and the defaults.

Deviations from the paper (more in docs/papers.md): as in the authors' MNIST code, G1 never learns
from G0. Images are 32x32 in [-1, 1].

A run on MNIST, scored in docs/results.md:

    python stacked_gan.py --width 32 --z-dim 8 --lr 1e-3 --batch-size 64 --steps 7200
"""

import math
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog=Path(__file__).name, description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=100, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=50, help="dimensions of z1 and of z0")
    p.add_argument("--width", type=runs.positive_int, default=64, help="base number of channels")
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate of G and D")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1, of G and D")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2, of G and D")
    p.add_argument("--n-gen", type=runs.positive_int, default=1, help="G updates per D update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--entropy-weight", type=float, default=10.0, help="weight of the entropy loss")
    p.add_argument(
        "--encoder-steps",
        type=runs.positive_int,
        default=1200,
        help="updates of E, before --steps",
    )
    p.add_argument(
        "--joint-from",
        type=runs.positive_int,
        help="first step at which G0 gets G1's features instead of E's (default: never)",
    )
    p.add_argument("--label", default="all", help="class to --generate, by name or number")
    args = runs.parse_args(p, argv)
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2 per process: G's batch norm compares images")
    if args.label != "all" and not args.generate:
        p.error("--label goes with --generate")
    if args.init:
        p.error("--init cannot be used here, as it does not load E: leave it out")
    return args


# networks -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Images (N, channels, image_size, image_size) -> features h (N, 4 * width), and
    `classify(h)`: their logits (N, n_classes).

    The comments give the shapes at the default width and size.
    """

    def __init__(self, width, channels, image_size, n_classes):
        super().__init__()
        # 32 x 14x14, 32 x 5x5
        c = max(1, width // 2)
        layers = [nn.Conv2d(channels, c, 5), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(c, c, 5), nn.ReLU(), nn.MaxPool2d(2)]

        # 256. Each convolution takes away 4 pixels, and each pooling halves the size
        size = ((image_size - 4) // 2 - 4) // 2
        layers += [nn.Flatten(), nn.Linear(c * size**2, 4 * width), nn.ReLU()]
        self.net = nn.Sequential(*layers)
        self.classify = nn.Linear(4 * width, n_classes)

    def forward(self, x):
        return self.net(x)


class FeatureGenerator(nn.Module):
    """G1: noise z1 (N, z_dim), y (N,) -> features h (N, 4 * width) of the classes y."""

    def __init__(self, z_dim, width, n_classes):
        super().__init__()
        self.n_classes = n_classes

        # 512, 512, 256
        layers = dense(z_dim + n_classes, 8 * width) + dense(8 * width, 8 * width)
        layers += [nn.Linear(8 * width, 4 * width), nn.ReLU()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z1, y):
        y = nn.functional.one_hot(y, self.n_classes)
        return self.net(torch.cat([z1, y], 1))


class ImageGenerator(nn.Module):
    """G0: noise z0 (N, z_dim), features h (N, 4 * width) -> images (N, channels, image_size,
    image_size) in [-1, 1].

    The comments give the shapes at the default width and size. Other sizes are powers of 2.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        if image_size not in [16, 32, 64, 128, 256, 512, 1024]:
            raise ValueError(f"image_size is {image_size}, but must be 16, 32, 64, ... 1024")

        # z0 is embedded in 128 units.
        self.z0_embedding = nn.Sequential(*dense(z_dim, 2 * width)).apply(init_weights)

        # 128 x 4x4, from the features and the embedding
        c = width * image_size // 16
        layers = [*dense(4 * width + 2 * width, c * 16), nn.Unflatten(1, (c, 4, 4))]

        # 128 x 8x8
        layers += [upsample(c, c), nn.BatchNorm2d(c), nn.ReLU()]

        # 64 x 16x16: each further stage halves the channels and doubles the size.
        while c > width:
            layers += [upsample(c, c // 2), nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2

        # channels x 32x32
        layers += [upsample(c, channels, bias=True), nn.Tanh()]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z0, h):
        return self.net(torch.cat([h, self.z0_embedding(z0)], 1))


class FeatureDiscriminator(nn.Module):
    """D1 with Q1: features h (N, 4 * width) -> scores (N,), the logit of "this is real", and the
    recovered noise (N, z_dim) in [0, 1]."""

    def __init__(self, z_dim, width):
        super().__init__()
        # 256, 256
        layers = [nn.Linear(4 * width, 4 * width), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(4 * width, 4 * width), nn.LeakyReLU(0.2)]
        self.shared = nn.Sequential(*layers).apply(init_weights)
        self.score = nn.Linear(4 * width, 1).apply(init_weights)
        self.q = nn.Sequential(nn.Linear(4 * width, z_dim), nn.Sigmoid()).apply(init_weights)

    def forward(self, h):
        shared = self.shared(h)
        return self.score(shared).flatten(), self.q(shared)


class ImageDiscriminator(nn.Module):
    """D0 with Q0: images (N, channels, image_size, image_size) -> scores (N,), the logit of "this
    is real", and the recovered noise (N, z_dim) in [0, 1]."""

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        # 32 x 16x16
        c = max(1, width // 2)
        layers = [nn.Conv2d(channels, c, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]

        # 64 x 8x8, 128 x 4x4: each further stage doubles the channels and halves the size.
        for _ in range(int(math.log2(image_size // 8))):
            layers += [nn.Conv2d(c, 2 * c, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
            c *= 2

        # 256
        layers += [nn.Flatten(), nn.Linear(c * 16, 4 * width), nn.LeakyReLU(0.2)]
        self.shared = nn.Sequential(*layers).apply(init_weights)
        self.score = nn.Linear(4 * width, 1).apply(init_weights)
        self.q = nn.Sequential(nn.Linear(4 * width, z_dim), nn.Sigmoid()).apply(init_weights)

    def forward(self, x):
        shared = self.shared(x)
        return self.score(shared).flatten(), self.q(shared)


def dense(n_in, n_out):
    """A linear layer with batch norm and ReLU."""
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]


def upsample(n_in, n_out, bias=False):
    """A 5x5 transposed convolution that doubles the size."""
    return nn.ConvTranspose2d(n_in, n_out, 5, 2, padding=2, output_padding=1, bias=bias)


def init_weights(m):
    """Weights N(0, 0.02) and biases 0, as in the authors' code."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# losses -------------------------------------------------------------------------------------------


def d_loss(d_real, d_fake):
    """-1/2 E[log sigmoid(D(x))] - 1/2 E[log(1 - sigmoid(D(G(z))))], from scores (N,): half of
    gan.py's, as in the authors' code."""
    real = -nn.functional.logsigmoid(d_real).mean()
    fake = -nn.functional.logsigmoid(-d_fake).mean()
    return 0.5 * (real + fake)


def g_loss(d_fake):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate."""
    return -nn.functional.logsigmoid(d_fake).mean()


def label_loss(logits, y):
    """E[-log p(y | h)], the cross entropy of E's classes, from logits (N, K) and labels (N,): E's
    own loss, and what the paper calls the conditional loss of G1."""
    return nn.functional.cross_entropy(logits, y)


def feature_loss(h_fake, h):
    """E[(Enc(G0(z0, h)) - h)^2] from features (N, F), a mean over all: what the paper calls the
    conditional loss of G0."""
    return (h_fake - h).square().mean()


def entropy_loss(z_recovered, z):
    """E[(Q(G(z)) - z)^2] from noise (N, z_dim), a mean over all: what the paper calls the entropy
    loss. With Q a Gaussian around the noise that it recovers, it is a bound on the entropy of what
    G draws."""
    return (z_recovered - z).square().mean()


# training -----------------------------------------------------------------------------------------


def train_encoder(args, data, E):
    """Trains E to classify, by --encoder-steps updates that minimise label_loss. Reports its
    accuracy."""
    opt_E = torch.optim.Adam(E.parameters(), lr=1e-3, fused=True)
    for _ in tqdm(range(args.encoder_steps), "training E", disable=common.rank() > 0):
        x_real, y = common.sample_batch(args, data)
        loss_E = label_loss(E.classify(E(x_real)), y)
        opt_E.zero_grad()
        loss_E.backward()
        opt_E.step()

    right = 0.0
    with torch.no_grad():
        for _ in range(100):
            x_real, y = common.sample_batch(args, data)
            right += (E.classify(E(x_real)).argmax(1) == y).float().mean().item()
    common.say(f"E classifies {right / 100:.1%} of the training images correctly")


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    n_classes = len(data.classes)
    if n_classes == 0:
        common.fail(f"{args.dataset} has no classes: use a folder with one subfolder per class")

    # Networks, in the layout that is faster for convolutions.
    E = Encoder(args.width, data.channels, args.image_size, n_classes)
    G1 = FeatureGenerator(args.z_dim, args.width, n_classes).to(args.device)
    G0 = ImageGenerator(args.z_dim, args.width, data.channels, args.image_size)
    D1 = FeatureDiscriminator(args.z_dim, args.width).to(args.device)
    D0 = ImageDiscriminator(args.z_dim, args.width, data.channels, args.image_size)
    E = E.to(args.device, memory_format=torch.channels_last)
    G0 = G0.to(args.device, memory_format=torch.channels_last)
    D0 = D0.to(args.device, memory_format=torch.channels_last)

    # Optimisers. The authors add an epsilon of 1e-8 inside Adam's root, which is like 1e-4 outside
    # of it.
    adam = {"lr": args.lr, "betas": (args.beta1, args.beta2), "eps": 1e-4, "fused": True}
    opt_G1 = torch.optim.Adam(G1.parameters(), **adam)
    opt_G0 = torch.optim.Adam(G0.parameters(), **adam)
    opt_D1 = torch.optim.Adam(D1.parameters(), **adam)
    opt_D0 = torch.optim.Adam(D0.parameters(), **adam)

    # Whether G0 gets the features of G1. A CUDA graph needs it as a tensor.
    joint = torch.zeros((), dtype=torch.bool, device=args.device)

    def noise(n):
        """n draws of z1 or z0, uniform in [0, 1)."""
        return torch.rand(n, args.z_dim, device=args.device)

    def update():
        """One step: for each of the two GANs one update of D, then n_gen of G, on one minibatch."""
        x_real, y = common.sample_batch(args, data)
        with torch.no_grad():
            h_real = E(x_real)

        # D1: minimise d_loss + entropy_weight * entropy_loss, with G1 fixed. Q1 learns from what G1
        # draws, for which the noise is known.
        D1.requires_grad_(True)
        z1 = noise(args.batch_size)
        with torch.no_grad():
            h_fake = G1(z1, y)
        d1_real, _ = D1(h_real)
        d1_fake, z1_recovered = D1(h_fake)
        loss_D1 = d_loss(d1_real, d1_fake) + args.entropy_weight * entropy_loss(z1_recovered, z1)
        opt_D1.zero_grad()
        loss_D1.backward()
        opt_D1.step()

        # G1: minimise g_loss + label_loss + entropy_weight * entropy_loss, with D1 and E fixed.
        D1.requires_grad_(False)
        for _ in range(args.n_gen):
            z1 = noise(args.batch_size)
            h_fake = G1(z1, y)
            d1_fake, z1_recovered = D1(h_fake)
            loss_label = label_loss(E.classify(h_fake), y)
            loss_z1 = entropy_loss(z1_recovered, z1)
            loss_G1 = g_loss(d1_fake) + loss_label + args.entropy_weight * loss_z1
            opt_G1.zero_grad()
            loss_G1.backward()
            opt_G1.step()

        # What G0 draws from. G1's features are detached, as G1 does not learn from G0.
        h = torch.where(joint, h_fake.detach(), h_real)

        # D0: minimise d_loss + entropy_weight * entropy_loss, with G0 fixed.
        D0.requires_grad_(True)
        z0 = noise(args.batch_size)
        with torch.no_grad():
            x_fake = G0(z0, h)
        d0_real, _ = D0(x_real)
        d0_fake, z0_recovered = D0(x_fake)
        loss_D0 = d_loss(d0_real, d0_fake) + args.entropy_weight * entropy_loss(z0_recovered, z0)
        opt_D0.zero_grad()
        loss_D0.backward()
        opt_D0.step()
        scores = {"d_real": d0_real.mean(), "d_fake": d0_fake.mean()}  # of D0

        # G0: minimise g_loss + feature_loss + entropy_weight * entropy_loss, with D0 and E fixed.
        D0.requires_grad_(False)
        for _ in range(args.n_gen):
            z0 = noise(args.batch_size)
            x_fake = G0(z0, h)
            d0_fake, z0_recovered = D0(x_fake)
            loss_feature = feature_loss(E(x_fake), h)
            loss_z0 = entropy_loss(z0_recovered, z0)
            loss_G0 = g_loss(d0_fake) + loss_feature + args.entropy_weight * loss_z0
            opt_G0.zero_grad()
            loss_G0.backward()
            opt_G0.step()

        losses = {"loss_D1": loss_D1, "loss_G1": loss_G1, "loss_D0": loss_D0, "loss_G0": loss_G0}
        parts = {"loss_label": loss_label, "loss_feature": loss_feature}
        entropy = {"loss_z1": loss_z1, "loss_z0": loss_z0}
        return {**losses, **scores, **parts, **entropy}

    @torch.no_grad()
    def sample(z, y):
        """Images from z = z1, z0 and y in evaluation mode, in which batch norm uses its running
        statistics."""
        z1, z0 = z
        x = G0.eval()(z0, G1.eval()(z1, y))
        G1.train()
        G0.train()
        return x

    # All grids use the same noise and classes, so they show the same images changing: a column per
    # class, at most 16, and fewer if the images are large.
    rows = math.isqrt(common.grid_size(args))
    columns = min(n_classes, 2 * rows)
    fixed_y = torch.arange(columns, device=args.device).repeat(rows)
    fixed_z = torch.stack([noise(len(fixed_y)), noise(len(fixed_y))])

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"E": E, "G1": G1, "G0": G0, "D1": D1, "D0": D0, "fixed_z": fixed_z}
    state.update(opt_G1=opt_G1, opt_G0=opt_G0, opt_D1=opt_D1, opt_D0=opt_D0)
    done = runs.start_run(args, data, state)
    if args.generate:
        labels = torch.arange(args.generate, device=args.device) % n_classes
        if args.label != "all":
            labels.fill_(common.class_number(args.label, data.classes))

        def draw(n, y):
            return sample((noise(n), noise(n)), y)

        return common.generate(args, draw, labels, data.classes)
    if done == 0:
        train_encoder(args, data, E)
        common.save_grid(args, 0, sample(fixed_z, fixed_y), columns)

    # Train. Gradients pass through E, but not into its weights.
    E.requires_grad_(False)
    update = runs.cuda_graph(args, data, update)
    progress = runs.steps(args, done)
    for step in progress:
        joint.fill_(args.joint_from is not None and step >= args.joint_from)
        values = update()
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z, fixed_y), columns)
            runs.save_checkpoint(args, data, step, state)


if __name__ == "__main__":
    main()
