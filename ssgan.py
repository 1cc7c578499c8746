"""SSGAN: semi-supervised learning, in which ten labels per class are enough to learn to classify.

Salimans et al. 2016, Improved Techniques for Training GANs, section 5.
https://arxiv.org/abs/1606.03498

D has a logit for each class, l_1 ... l_K, and "fake" is one class more, whose logit is fixed at 0.
With s = log sum_k exp(l_k), "real" has the probability sigmoid(s). G matches D's features f.

    D:  min  E[-l_y(x) + s(x)]                          labelled images x, y
             - 1/2 E[log sigmoid(s(x))]                 unlabelled images
             - 1/2 E[log(1 - sigmoid(s(G(z))))]
    G:  min  mean_i (E[f_i(x)] - E[f_i(G(z))])^2        unlabelled images

Differs from gan.py in: D classifies, and learns from a few labelled images as well; it has weight
norm and noise in place of maxout and dropout; G has batch norm, and matches features; z is uniform
in [0, 1); the test error is that of an average of D's weights; and the defaults.

Deviations from the authors' code (more in docs/papers.md): images are 32x32; unlabelled images are
drawn with replacement, not in epochs; the average moves faster at first.

A run of 60 epochs on MNIST, scored in docs/ssgan.md:

    python ssgan.py --labels 100 --steps 36000
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
    p.add_argument("--batch-size", type=runs.positive_int, default=100, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=1000, help="units of D's first layer")
    p.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    p.add_argument("--beta1", type=float, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=float, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=runs.image_size, default=32, help="side in pixels")
    p.add_argument("--labels", type=runs.positive_int, default=100, help="labelled images in total")
    p.add_argument("--label-seed", type=int, default=0, help="which images are labelled")
    p.add_argument(
        "--unlabelled-weight",
        type=float,
        default=1.0,
        help="weight of D's loss of unlabelled images and fakes; 0 learns from the labels alone",
    )
    args = runs.parse_args(p, argv)
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2 per process: G's batch norm compares images")
    return args


# data ---------------------------------------------------------------------------------------------


def hold_out_test(args, data):
    """The training images as Data, and the test images and labels: those of the dataset, or else a
    tenth of its images, which are taken out of the training images. Exits with an error if the
    images have no labels."""
    if not data.classes:
        common.fail(f"{args.dataset} has no classes: use a folder with one subfolder per class")
    if args.dataset in common.TORCHVISION_DATASETS:
        images, labels, _ = common.load_torchvision(args.dataset, args.data_dir, train=False)
        images = common.resize(images, args.image_size)
        return data, images.to(data.images.device), labels.to(data.images.device)

    order = torch.randperm(data.number, generator=torch.Generator().manual_seed(0))
    order = order.to(data.images.device)
    n = max(1, data.number // 10)
    test, train = order[:n], order[n:]
    images, labels = data.images[test], data.labels[test]
    kept = data.images[train], data.labels[train]
    return common.Data(len(train), data.channels, data.classes, *kept), images, labels


def choose_labelled(args, data):
    """Indices of the images whose labels D may see, (labels,) int64: equally many of each class,
    the same ones for the same `args.label_seed`. Exits with an error if that is not possible."""
    n_classes = len(data.classes)
    each = args.labels // n_classes
    if each * n_classes != args.labels:
        common.fail(f"--labels is {args.labels}, but must be a multiple of the {n_classes} classes")
    rng = torch.Generator().manual_seed(args.label_seed)
    order = torch.randperm(data.number, generator=rng).to(data.labels.device)
    chosen = []
    for k in range(n_classes):
        of_class = order[data.labels[order] == k][:each]
        if len(of_class) < each:
            name = data.classes[k]
            common.fail(f"--labels needs {each} images of {name}, but there are {len(of_class)}")
        chosen.append(of_class)
    return torch.cat(chosen)


# networks -----------------------------------------------------------------------------------------


class Generator(nn.Module):
    """z (N, z_dim), uniform in [0, 1) -> images (N, channels, image_size, image_size) in [-1, 1].

    The comments give the number of units at the default width.
    """

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        c = max(1, width // 2)
        layers = [nn.Linear(z_dim, c, bias=False), nn.BatchNorm1d(c), nn.Softplus()]  # 500
        layers += [nn.Linear(c, c, bias=False), nn.BatchNorm1d(c), nn.Softplus()]  # 500
        layers += [WeightNormLinear(c, channels * image_size**2, learn_scale=True), nn.Sigmoid()]
        layers += [nn.Unflatten(1, (channels, image_size, image_size))]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return 2 * self.net(z) - 1


class WeightNormLinear(nn.Module):
    """x (N, n_in) -> (N, n_out), with weights scale v / ||v||: Salimans, Kingma 2016, 1602.07868.
    The scale starts at 1, and is trained only with `learn_scale`."""

    def __init__(self, n_in, n_out, learn_scale=False):
        super().__init__()
        self.v = nn.Parameter(0.1 * torch.randn(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))
        scale = torch.ones(n_out, 1)
        self.scale = nn.Parameter(scale) if learn_scale else nn.Buffer(scale)

    def forward(self, x):
        weight = self.scale * nn.functional.normalize(self.v)
        return nn.functional.linear(x, weight, self.bias)


class Noise(nn.Module):
    """Adds noise of standard deviation `std` in training mode."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x):
        if self.training:
            x = x + self.std * torch.randn_like(x)
        return x


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) in [-1, 1] -> logits of the classes (N, K).

    `features(x)` are the activations of the last hidden layer, (N, width / 4).
    """

    def __init__(self, width, channels, image_size, n_classes):
        super().__init__()
        # 1000, 500, 250, 250, 250 units, with noise before each of them
        units = [width, max(1, width // 2)] + [max(1, width // 4)] * 3
        layers = [nn.Flatten()]
        n_in, std = channels * image_size**2, 0.3
        for n_out in units:
            layers += [Noise(std), WeightNormLinear(n_in, n_out), nn.ReLU()]
            n_in, std = n_out, 0.5
        self.hidden = nn.Sequential(*layers)
        self.noise = Noise(0.5)
        self.last = WeightNormLinear(n_in, n_classes, learn_scale=True)

    def features(self, x):
        return self.hidden((x + 1) / 2)

    def forward(self, x):
        return self.last(self.noise(self.features(x)))

    @torch.no_grad()
    def normalise(self, x):
        """Scales and shifts each layer so that its outputs for the images x have mean 0 and
        variance 1, before any nonlinearity."""
        h = (x + 1) / 2
        for layer in [*self.hidden, self.noise, self.last]:
            if isinstance(layer, WeightNormLinear):
                std, mean = torch.std_mean(layer(h), 0, correction=0)
                layer.scale.div_(std[:, None])
                layer.bias.copy_(-mean / std)
            h = layer(h)


def init_weights(m):
    """Glorot's uniform weights and biases 0, as in the authors' G."""
    if isinstance(m, nn.Linear):
        nn.init.xavier_uniform_(m.weight)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    if isinstance(m, WeightNormLinear):
        nn.init.xavier_uniform_(m.v)


# losses -------------------------------------------------------------------------------------------


def d_loss_labelled(logits, y):
    """E[-l_y + s], the cross entropy of the classes, from logits (N, K) and labels (N,):
    Salimans et al. 2016, section 5."""
    return nn.functional.cross_entropy(logits, y)


def d_loss_unlabelled(logits_real, logits_fake):
    """-1/2 E[log sigmoid(s(x))] - 1/2 E[log(1 - sigmoid(s(G(z))))], from logits (N, K) of
    unlabelled images and of fakes: Salimans et al. 2016, section 5."""
    real = -nn.functional.logsigmoid(logits_real.logsumexp(1)).mean()
    fake = -nn.functional.logsigmoid(-logits_fake.logsumexp(1)).mean()
    return 0.5 * (real + fake)


def g_loss(f_real, f_fake):
    """The mean over D's features of (E[f(x)] - E[f(G(z))])^2, from features (N, F): Salimans et
    al. 2016, section 3.1."""
    return (f_real.mean(0) - f_fake.mean(0)).square().mean()


# training -----------------------------------------------------------------------------------------


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
    if not args.generate:
        data, test_images, test_labels = hold_out_test(args, data)
        labelled = choose_labelled(args, data)
        x_labelled = common.scaled(data.images[labelled]).to(args.device)
        y_labelled = data.labels[labelled].to(args.device)

    # Networks and optimisers. The authors add an epsilon of 1e-8 inside Adam's root, which is like
    # 1e-4 outside of it.
    G = Generator(args.z_dim, args.width, data.channels, args.image_size)
    D = Discriminator(args.width, data.channels, args.image_size, len(data.classes))
    G = G.to(args.device)
    D = D.to(args.device)
    betas = (args.beta1, args.beta2)
    opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=betas, eps=1e-4, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=betas, eps=1e-4, fused=True)

    if not args.generate:
        D.normalise(common.scaled(data.images[:500]).to(args.device))

    # The average of D's weights, which is tested, and the share of test images that it gets wrong:
    # measured at each save, and 1 until then.
    average = copy.deepcopy(D).eval()
    test_error = torch.ones((), device=args.device)

    def noise(n):
        """n draws of z, uniform in [0, 1)."""
        return torch.rand(n, args.z_dim, device=args.device)

    def labelled_batch():
        """All labelled images in random order: repeated in other orders if the batch is larger, cut
        off if it is smaller."""
        repeats = math.ceil(args.batch_size / args.labels)
        order = torch.rand(repeats, args.labels, device=args.device).argsort(1)
        index = order.flatten()[: args.batch_size]
        return x_labelled[index], y_labelled[index]

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        # D: minimise d_loss_labelled + unlabelled_weight * d_loss_unlabelled, with G fixed.
        D.requires_grad_(True)
        for _ in range(args.n_critic):
            x, y = labelled_batch()
            x_real, _ = common.sample_batch(args, data)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            d_labelled, d_real, d_fake = D(x), D(x_real), D(x_fake)
            loss_unlabelled = d_loss_unlabelled(d_real, d_fake)
            loss_D = d_loss_labelled(d_labelled, y) + args.unlabelled_weight * loss_unlabelled
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()

        # G: minimise g_loss on another minibatch, with D fixed.
        D.requires_grad_(False)
        x_real, _ = common.sample_batch(args, data)
        f_real, f_fake = D.features(x_real), D.features(G(noise(args.batch_size)))
        loss_G = g_loss(f_real, f_fake)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()

        # The logits of "this is real".
        s_real, s_fake = d_real.logsumexp(1), d_fake.logsumexp(1)
        scores = {"d_real": s_real.mean(), "d_fake": s_fake.mean()}
        return {"loss_D": loss_D, "loss_G": loss_G, **scores}

    @torch.no_grad()
    def count_errors():
        """How many test images the average classifies wrongly, without noise."""
        wrong = 0
        for x, y in zip(test_images.split(1000), test_labels.split(1000), strict=True):
            predicted = average(common.scaled(x.to(args.device))).argmax(1)
            wrong += (predicted != y.to(args.device)).sum()
        return wrong

    @torch.no_grad()
    def sample(z):
        """G's images from z in evaluation mode, in which batch norm uses its running statistics."""
        x = G.eval()(z)
        G.train()
        return x

    # All grids use the same noise, so they show the same images changing.
    fixed_z = noise(common.grid_size(args))

    # Steps already done: 0 in a new run, or the checkpoint's with --resume.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    state.update(average=average, test_error=test_error)
    done = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, lambda n: sample(noise(n)))
    if done == 0:
        average.load_state_dict(D.state_dict())  # --init may have replaced D
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = runs.steps(args, done)
    for step in progress:
        values = update()
        # The authors' 0.9999 is too slow for the first 100,000 steps.
        move_average(average, D, min(0.9999, (step - 1) / (step + 9)))
        if step % args.save_every == 0 or step == args.steps:
            wrong = count_errors()
            test_error.copy_(wrong / len(test_labels))
        if step % args.log_every == 0:
            progress.set_postfix(runs.log(args, step, {**values, "test_error": test_error}))
        if step % args.save_every == 0 or step == args.steps:
            common.save_grid(args, step, sample(fixed_z))
            runs.save_checkpoint(args, data, step, state)
    common.say(f"errors: {int(wrong):,} of {len(test_labels):,} test images")


if __name__ == "__main__":
    main()
