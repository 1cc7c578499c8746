"""Stacked GAN: one GAN draws features from a label, another draws an image from the features.

Huang, Li, Poursaeed, Hopcroft, Belongie 2016, Stacked Generative Adversarial Networks.
https://arxiv.org/abs/1612.04357

First, an encoder E learns to classify; after that it is fixed. h = E(x) are the features of its
last hidden layer. G1 draws h from a label y and noise z1, and G0 draws x from h and noise z0. Each
D has a second head, Q1 or Q0, which recovers the noise.

    E:   min  E[-log p(y | h)], in the first --encoder-steps steps
    D1:  min  -1/2 E[log sigmoid(D1(h))] - 1/2 E[log(1 - sigmoid(D1(G1(y, z1))))]
              + 10 E[(Q1(G1(y, z1)) - z1)^2]
    G1:  min  -E[log sigmoid(D1(G1(y, z1)))] + E[-log p(y | G1(y, z1))]
              + 10 E[(Q1(G1(y, z1)) - z1)^2]
    D0:  min  -1/2 E[log sigmoid(D0(x))] - 1/2 E[log(1 - sigmoid(D0(G0(h, z0))))]
              + 10 E[(Q0(G0(h, z0)) - z0)^2]
    G0:  min  -E[log sigmoid(D0(G0(h, z0)))] + E[(E(G0(h, z0)) - h)^2]
              + 10 E[(Q0(G0(h, z0)) - z0)^2]

The last term of each D and G is the entropy loss: without it, G could ignore the noise. From step
--joint-from on, G0 gets the features that G1 draws instead of E's, and has them as its target.

Differs from cgan.py in: two GANs instead of one; the label is an input of G1 alone; E, rather than
a D that sees the label, makes each G obey its input; D has a head that recovers the noise, 5x5
convolutions and no batch norm; z is uniform in [0, 1).

Follows the authors' MNIST code (github.com/xunhuang1995/SGAN, commit e235644), in which, unlike in
the paper, G1 never learns from G0. Deviations from it:
- MNIST's images are padded to 32x32, and are in [-1, 1]; theirs are in [0, 1]. G0 doubles the size
  three times; theirs doubles it twice and adds 4 pixels twice, to reach 28x28.
- E is trained here, from PyTorch's initialisation, by Adam with a learning rate of 1e-3. Their code
  has only its weights.
- Minibatches are drawn with replacement, not in epochs. Theirs trains for 120,000 updates.
- --joint-from switches within one run. The authors have a script for each way; in the joint one, D1
  and D0 have ReLU dense layers and other initial weights.
- Adam's epsilon, 1e-4, is added to the root. Theirs, 1e-8, is added inside it.
- Images are drawn with batch norm's running statistics; theirs uses those of the batch.
- Colour images have the same networks. The authors have others for CIFAR-10, where both D classify,
  G's loss saturates, G1 also learns from a hundredth of G0's loss in the joint phase, and G gets 1,
  3, 5 or 7 updates, depending on D's loss. Here that number is fixed: --n-gen.

--init is refused: it would load G and D, but not E, on whose features they were trained.

A run of nine minutes on one core (docs/experiments.md):

    python stacked_gan.py --width 32 --z-dim 8 --lr 1e-3 --batch-size 64 --steps 7000
"""

import math
from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog="stacked_gan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=100, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=50, help="dimensions of z1 and of z0")
    p.add_argument(
        "--width", type=runs.positive_int, default=64, help="base channels: sets size and speed"
    )
    p.add_argument("--lr", type=runs.positive_float, default=1e-4, help="learning rate of G and D")
    p.add_argument("--beta1", type=runs.fraction, default=0.5, help="Adam's beta1, of G and D")
    p.add_argument("--beta2", type=runs.fraction, default=0.999, help="Adam's beta2, of G and D")
    p.add_argument("--n-gen", type=runs.positive_int, default=1, help="G updates per D update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--entropy-weight",
        type=runs.non_negative_float,
        default=10.0,
        help="weight of the error of the recovered noise; 0 lets G ignore the noise",
    )
    p.add_argument(
        "--encoder-steps",
        type=runs.positive_int,
        default=1200,
        help="steps at the start, out of --steps, that train E alone",
    )
    p.add_argument(
        "--joint-from",
        type=runs.positive_int,
        help="first step at which G0 gets G1's features instead of E's (default: never)",
    )
    p.add_argument("--label", help="class to --generate, by name or number (default: all in turn)")
    args = runs.parse_args(p, argv, generate_only=("label",))
    if args.label is not None and not args.generate:
        p.error("--label goes with --generate")
    if args.init:
        p.error("--init cannot be used here, as it does not load E: leave it out")
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2 per process: G's batch norm compares images")
    return args


# ----------------------------------------------------------------------------------------- networks


class Encoder(nn.Module):
    """Images (N, channels, image_size, image_size) -> features h (N, 4 * width), and
    `classify(h)`: their logits (N, n_classes).

    The comments have the shapes at the default width and size.
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


class Generator(nn.Module):
    """G1 and G0: noise z1 and z0 (N, z_dim), y (N,) -> images (N, channels, image_size,
    image_size) in [-1, 1] of the classes y.

    `features(z1, y)` is G1 and `images(z0, h)` is G0, with features h (N, 4 * width).
    """

    def __init__(self, z_dim, width, channels, image_size, n_classes):
        super().__init__()
        self.register_buffer("one_hot", torch.eye(n_classes))

        # G1: 512, 512, 256
        layers = dense(z_dim + n_classes, 8 * width) + dense(8 * width, 8 * width)
        layers += [nn.Linear(8 * width, 4 * width), nn.ReLU()]
        self.g1 = nn.Sequential(*layers).apply(init_weights)

        # G0: z0 embedded in 128, and with the features 128 x 4x4
        self.z0_embedding = nn.Sequential(*dense(z_dim, 2 * width)).apply(init_weights)
        c = width * image_size // 16
        layers = [*dense(4 * width + 2 * width, c * 16), nn.Unflatten(1, (c, 4, 4))]

        # 128 x 8x8
        layers += [upsample(c, c), nn.BatchNorm2d(c), nn.ReLU()]

        # 64 x 16x16: one more stage each time the size doubles
        while c > width:
            layers += [upsample(c, c // 2), nn.BatchNorm2d(c // 2), nn.ReLU()]
            c //= 2

        # channels x 32x32
        layers += [upsample(c, channels, bias=True), nn.Tanh()]
        self.g0 = nn.Sequential(*layers).apply(init_weights)

    def features(self, z1, y):
        return self.g1(torch.cat([z1, self.one_hot[y]], 1))

    def images(self, z0, h):
        return self.g0(torch.cat([h, self.z0_embedding(z0)], 1))

    def forward(self, z1, z0, y):
        return self.images(z0, self.features(z1, y))


class Discriminator(nn.Module):
    """`features(h)` is D1 with Q1: features (N, 4 * width) -> scores (N,), the logit of "this is
    real", and the recovered noise (N, z_dim) in [0, 1]. `images(x)` is D0 with Q0: the same for
    images (N, channels, image_size, image_size).
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        # D1: 256, 256
        layers = [nn.Linear(4 * width, 4 * width), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(4 * width, 4 * width), nn.LeakyReLU(0.2)]
        self.d1 = nn.Sequential(*layers).apply(init_weights)
        self.score1, self.q1 = heads(4 * width, z_dim)

        # D0: 32 x 16x16
        c = max(1, width // 2)
        layers = [nn.Conv2d(channels, c, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]

        # 64 x 8x8, 128 x 4x4: one more stage each time the size doubles
        for _ in range(int(math.log2(image_size // 8))):
            layers += [nn.Conv2d(c, 2 * c, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
            c *= 2

        # 256
        layers += [nn.Flatten(), nn.Linear(c * 16, 4 * width), nn.LeakyReLU(0.2)]
        self.d0 = nn.Sequential(*layers).apply(init_weights)
        self.score0, self.q0 = heads(4 * width, z_dim)

    def features(self, h):
        shared = self.d1(h)
        return self.score1(shared).flatten(), self.q1(shared)

    def images(self, x):
        shared = self.d0(x)
        return self.score0(shared).flatten(), self.q0(shared)


def dense(n_in, n_out):
    """A linear layer with batch norm and ReLU."""
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]


def upsample(n_in, n_out, bias=False):
    """A 5x5 transposed convolution that doubles the size."""
    return nn.ConvTranspose2d(n_in, n_out, 5, 2, padding=2, output_padding=1, bias=bias)


def heads(n_in, z_dim):
    """The last layers of a D and of its Q."""
    score = nn.Linear(n_in, 1).apply(init_weights)
    q = nn.Sequential(nn.Linear(n_in, z_dim), nn.Sigmoid()).apply(init_weights)
    return score, q


def init_weights(m):
    """Weights N(0, 0.02) and biases 0, as in the authors' code."""
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------- losses


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
    """E[(E(G0(h, z0)) - h)^2] from features (N, F), a mean over all: what the paper calls the
    conditional loss of G0."""
    return (h_fake - h).square().mean()


def entropy_loss(z_recovered, z):
    """E[(Q(G(z)) - z)^2] from noise (N, z_dim), a mean over all: what the paper calls the entropy
    loss. With Q a Gaussian around the noise that it recovers, it is a bound on the entropy of what
    G draws."""
    return (z_recovered - z).square().mean()


# ----------------------------------------------------------------------------------------- training


def class_number(label, classes):
    """The number of the class that `label` names, or whose number it is. Exits with an error if
    there is none."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    common.fail(
        f"--label is {label}: the classes are {common.first_ten(classes)} (0 to {len(classes) - 1})"
    )


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    data = common.load_data(args)
    n_classes = len(data.classes)
    if n_classes == 0:
        common.fail(
            f"{args.dataset} has no classes, which stacked_gan.py needs: one subfolder for each"
        )

    # Networks and optimisers.
    E = Encoder(args.width, data.channels, args.image_size, n_classes)
    G = Generator(args.z_dim, args.width, data.channels, args.image_size, n_classes)
    D = Discriminator(args.z_dim, args.width, data.channels, args.image_size)
    E = E.to(args.device, memory_format=torch.channels_last)
    G = G.to(args.device, memory_format=torch.channels_last)
    D = D.to(args.device, memory_format=torch.channels_last)
    betas = (args.beta1, args.beta2)
    opt_E = torch.optim.Adam(E.parameters(), lr=1e-3, fused=True)
    # The authors add their epsilon of 1e-8 inside Adam's root, which is like 1e-4 outside of it.
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, eps=1e-4, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, eps=1e-4, fused=True)

    # Whether G0 gets the features of G1. A CUDA graph needs it as a tensor.
    joint = torch.zeros((), dtype=torch.bool, device=args.device)

    def noise(n):
        """z1 or z0 (n, z_dim), uniform in [0, 1)."""
        return torch.rand(n, args.z_dim, device=args.device)

    # All grids use the same noise (z1 and z0) and classes, so they show the same images changing.
    rows = math.isqrt(common.grid_size(args))
    columns = min(n_classes, 2 * rows)
    fixed_y = torch.arange(columns, device=args.device).repeat(rows)
    fixed_z = torch.stack([noise(len(fixed_y)), noise(len(fixed_y))])

    def update_encoder():
        """One step of the first phase, one update of E: minimise label_loss."""
        E.requires_grad_(True)
        x_real, y = common.sample_batch(args, data)
        loss_E = label_loss(E.classify(E(x_real)), y)
        opt_E.zero_grad()
        loss_E.backward()
        opt_E.step()
        return {"loss_E": loss_E.detach()}

    def d_step(x_real, y):
        """One update of D1 and D0: minimise d_loss + entropy_weight * entropy_loss of each, with E
        and G fixed."""
        D.requires_grad_(True)
        z1, z0 = noise(args.batch_size), noise(args.batch_size)
        with torch.no_grad():
            h_real = E(x_real)
            h_fake = G.features(z1, y)
            x_fake = G.images(z0, torch.where(joint, h_fake, h_real))

        # Q learns from what G draws, for which the noise is known.
        d1_real, _ = D.features(h_real)
        d1_fake, z1_recovered = D.features(h_fake)
        d0_real, _ = D.images(x_real)
        d0_fake, z0_recovered = D.images(x_fake)
        loss_D1 = d_loss(d1_real, d1_fake) + args.entropy_weight * entropy_loss(z1_recovered, z1)
        loss_D0 = d_loss(d0_real, d0_fake) + args.entropy_weight * entropy_loss(z0_recovered, z0)

        # D1 and D0 have no weights in common, so this is the gradient of each.
        loss_D = loss_D1 + loss_D0
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        return loss_D, d0_real.mean(), d0_fake.mean()

    def g_step(x_real, y):
        """One update of G1 and G0: minimise g_loss + label_loss (G1) or feature_loss (G0) +
        entropy_weight * entropy_loss of each, with E and D fixed."""
        # Gradients pass through E and D, but not into their weights.
        E.requires_grad_(False)
        D.requires_grad_(False)
        z1, z0 = noise(args.batch_size), noise(args.batch_size)

        # G1 draws features of the label.
        h_fake = G.features(z1, y)
        d1_fake, z1_recovered = D.features(h_fake)
        loss_label = label_loss(E.classify(h_fake), y)
        loss_z1 = entropy_loss(z1_recovered, z1)
        loss_G1 = g_loss(d1_fake) + loss_label + args.entropy_weight * loss_z1

        # G0 draws images of features. Those of G1 are detached, as G1 does not learn from G0.
        h = torch.where(joint, h_fake.detach(), E(x_real))
        x_fake = G.images(z0, h)
        d0_fake, z0_recovered = D.images(x_fake)
        loss_feature = feature_loss(E(x_fake), h)
        loss_z0 = entropy_loss(z0_recovered, z0)
        loss_G0 = g_loss(d0_fake) + loss_feature + args.entropy_weight * loss_z0

        # G1 and G0 have no weights in common, so this is the gradient of each.
        loss_G = loss_G1 + loss_G0
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        parts = {"loss_label": loss_label, "loss_feature": loss_feature}
        return loss_G, {**parts, "loss_z1": loss_z1, "loss_z0": loss_z0}

    def update():
        """One step of the second phase: one update of D, then n_gen of G, on one minibatch."""
        x_real, y = common.sample_batch(args, data)
        loss_D, d_real, d_fake = d_step(x_real, y)
        for _ in range(args.n_gen):
            loss_G, parts = g_step(x_real, y)
        # The scores are those of D0.
        values = {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}
        return {**values, **parts}

    @torch.no_grad()
    def accuracy():
        """The share of training images that E classifies correctly, from 100 minibatches."""
        right = 0.0
        for _ in range(100):
            x_real, y = common.sample_batch(args, data)
            right += (E.classify(E(x_real)).argmax(1) == y).float().mean().item()
        return right / 100

    @torch.no_grad()
    def sample(z, y):
        """G's images of z = z1, z0 and y in evaluation mode, in which batch norm uses its running
        statistics."""
        z1, z0 = z
        x = G.eval()(z1, z0, y)
        G.train()
        return x

    def draw(n, y):
        """n images of new noise and the classes y, for --generate."""
        return sample((noise(n), noise(n)), y)

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state.update(E=E, opt_E=opt_E)
    first = runs.start_run(args, data, state)
    if args.generate:
        labels = torch.arange(args.generate, device=args.device) % n_classes
        if args.label is not None:
            labels.fill_(class_number(args.label, data.classes))
        return common.generate(args, draw, labels)
    if first == 0:
        common.save_grid(args, 0, sample(fixed_z, fixed_y), columns)

    # log.csv has 0 for what a step does not compute.
    names = ["loss_E", "loss_D", "loss_G", "d_real", "d_fake"]
    names += ["loss_label", "loss_feature", "loss_z1", "loss_z0"]
    zeros = dict.fromkeys(names, torch.zeros((), device=args.device))

    if args.steps <= args.encoder_steps:
        common.say(
            f"only E is trained in the first {args.encoder_steps} steps: raise --steps for G"
        )

    # Train: E alone at first, then G and D.
    update = runs.cuda_graph(args, data, update)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        if step <= args.encoder_steps:
            values = {**zeros, **update_encoder()}
            if step == args.encoder_steps:
                common.say(f"E classifies {accuracy():.1%} of the training images correctly")
        else:
            joint.fill_(args.joint_from is not None and step >= args.joint_from)
            values = {**zeros, **update()}
        save_due = step % args.save_every == 0 or step == args.steps

        # A loss that is not finite stops the run here, before anything is saved.
        if save_due or step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, values), refresh=False)
        if save_due:
            common.save_grid(args, step, sample(fixed_z, fixed_y), columns)
            runs.save_checkpoint(args, data, step, state)
    runs.finish_run(args)


if __name__ == "__main__":
    main()
