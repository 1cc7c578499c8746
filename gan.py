"""GAN: the original adversarial game, with fully connected networks.

Goodfellow et al. 2014, Generative Adversarial Networks. https://arxiv.org/abs/1406.2661

    D:  min  -E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))]
    G:  min  -E[log sigmoid(D(G(z)))]    (--saturating: E[log(1 - sigmoid(D(G(z))))])

Read dcgan.py beside it: the same losses, but convolutional networks.

The paper leaves sizes open. Layers, maxout and dropout follow the authors' mnist.yaml
(github.com/goodfeli/adversarial). Deviations from it:
- Adam with a learning rate of 1e-3; theirs is SGD with momentum and a learning rate that decays
  from 0.1.
- z is N(0, I), not U(-sqrt(3), sqrt(3)).
- G ends in tanh, not a sigmoid, and D maps its images to [0, 1].
- D's loss is the sum of both expectations, not half of it.
- Weights start as N(0, 0.02), not uniform, and G's output biases as 0, not from the pixels' means.
- Images are 32x32: MNIST's 28x28 images are padded.
- D and G are updated in turn, as in Algorithm 1, not at once on the same fakes.

The run on MNIST in docs/results.md:

    python gan.py --width 800 --steps 19000
"""

from argparse import ArgumentParser

import torch
from torch import nn
from tqdm import tqdm

import common
import runs


def parse_args(argv=None):
    p = ArgumentParser(prog="gan.py", description=__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=runs.positive_int, default=100, help="images per update")
    p.add_argument("--z-dim", type=runs.positive_int, default=100, help="dimensions of z")
    p.add_argument("--width", type=runs.positive_int, default=1200, help="units of G's layers")
    p.add_argument("--lr", type=runs.positive_float, default=1e-3, help="learning rate")
    p.add_argument("--beta1", type=runs.fraction, default=0.5, help="Adam's beta1")
    p.add_argument("--beta2", type=runs.fraction, default=0.999, help="Adam's beta2")
    p.add_argument("--n-critic", type=runs.positive_int, default=1, help="D updates per G update")
    p.add_argument("--image-size", type=int, choices=common.IMAGE_SIZES, default=32, help="pixels")
    p.add_argument(
        "--saturating", action="store_true", help="G minimises log(1 - sigmoid(D(G(z))))"
    )
    return runs.parse_args(p, argv)


# ----------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, z_dim) -> images (N, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, z_dim, width, channels, image_size):
        super().__init__()
        layers = [nn.Linear(z_dim, width), nn.ReLU()]  # 1200
        layers += [nn.Linear(width, width), nn.ReLU()]  # 1200
        layers += [nn.Linear(width, channels * image_size**2), nn.Tanh()]  # channels * 32 * 32
        layers += [nn.Unflatten(1, (channels, image_size, image_size))]
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, z):
        return self.net(z)


class Maxout(nn.Module):
    """(N, n_in) -> (N, n_out), each output the largest of 5 linear functions: arXiv 1302.4389."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear = nn.Linear(n_in, n_out * 5)

    def forward(self, x):
        return self.linear(x).unflatten(1, (5, -1)).amax(1)


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) -> scores (N,): the logit of "this is real"."""

    def __init__(self, width, channels, image_size):
        super().__init__()
        c = max(1, width // 5)  # maxout units: 240 at the default width, as in the authors' code
        layers = [nn.Flatten(), nn.Dropout(0.2)]  # channels * 32 * 32
        layers += [Maxout(channels * image_size**2, c), nn.Dropout(0.5)]  # 240
        layers += [Maxout(c, c), nn.Dropout(0.5)]  # 240
        layers += [nn.Linear(c, 1)]  # 1
        self.net = nn.Sequential(*layers).apply(init_weights)

    def forward(self, x):
        x = (x + 1) / 2  # to [0, 1], so that a dropped pixel is black and not grey
        return self.net(x).flatten()


def init_weights(m):
    """Weights with mean 0 and standard deviation 0.02, biases 0. The authors' mnist.yaml has
    U(-0.05, 0.05) in G and U(-0.005, 0.005) in D."""
    if isinstance(m, nn.Linear):
        nn.init.normal_(m.weight, 0.0, 0.02)
        nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------- losses


def d_loss(d_real, d_fake):
    """-E[log sigmoid(D(x))] - E[log(1 - sigmoid(D(G(z))))], from scores (N,): Goodfellow et al.
    2014, eq. 1."""
    return -nn.functional.logsigmoid(d_real).mean() - nn.functional.logsigmoid(-d_fake).mean()


def g_loss(d_fake, saturating=False):
    """-E[log sigmoid(D(G(z)))], from scores (N,): Goodfellow et al. 2014, section 3, the loss that
    does not saturate. With `saturating`, E[log(1 - sigmoid(D(G(z))))]: G's side of their eq. 1."""
    if saturating:
        return nn.functional.logsigmoid(-d_fake).mean()
    return -nn.functional.logsigmoid(d_fake).mean()


# ----------------------------------------------------------------------------------------- training


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
        loss_G = g_loss(D(x_fake), args.saturating)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        return loss_G

    def update():
        """One step: n_critic updates of D, each on its own minibatch, then one of G."""
        for _ in range(args.n_critic):
            x_real, _ = common.sample_batch(args, data)
            loss_D, d_real, d_fake = d_step(x_real)
        loss_G = g_step()
        return {"loss_D": loss_D, "loss_G": loss_G, "d_real": d_real, "d_fake": d_fake}

    @torch.no_grad()
    def sample(z):
        """G's images of z in evaluation mode, in which batch norm uses its running statistics."""
        x = G.eval()(z)
        G.train()
        return x

    def draw(n):
        """n images of new noise, for --generate."""
        return sample(torch.randn(n, args.z_dim, device=args.device))

    # A new run begins at step 0, a resumed one at that of its checkpoint.
    state = {"G": G, "D": D, "opt_G": opt_G, "opt_D": opt_D, "fixed_z": fixed_z}
    first = runs.start_run(args, data, state)
    if args.generate:
        return common.generate(args, draw)
    if first == 0:
        common.save_grid(args, 0, sample(fixed_z))

    # Train.
    update = runs.cuda_graph(args, data, update)
    progress = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps)
    for step in progress:
        values = update()
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
