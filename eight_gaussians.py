"""Eight Gaussians: ten ways to train a GAN on a mixture that you can plot.

    python eight_gaussians.py                    all ten: about two minutes of one CPU core
    python eight_gaussians.py --only gan-slow-d  one of them

The real points come from eight Gaussians on a circle. G maps noise to points, and D scores points.
Each way has the losses of its script, on networks of the same size. In --out-dir this writes

    picture.png     a row for each way, a column for each moment: real points grey, G's in colour
    movie.gif       the same in motion
    table.csv       how many modes G has found, and how well it hits them

The ways, and what each has of its own (its strength):

    gan             Goodfellow et al. 2014                                     Adam's beta1
    gan-slow-d      the same, but D's learning rate is a fraction of G's       that fraction
    gan-saturating  the loss of G that saturates                               Adam's beta1
    lsgan           least squares                                              Adam's beta1
    wgan            clipped weights, RMSprop, five updates of D                the clip
    wgan_gp         a gradient penalty, five updates of D                      its weight
    sngan           spectral norm on each layer of D, hinge loss               factor of D's scores
    gan-r1          gan with R1 (Mescheder et al. 2018, 1801.04406)            its weight gamma
    r3gan           a loss on pairs with R1 and R2                             their weight gamma
    r3gan-r1        the same with R1 alone                                     its weight gamma

The learning rate falls linearly to 0 over the second half of the run: with a constant one, G's
points keep moving. Learning rates and strengths were chosen for each way on seeds 0 to 2, from nine
pairs (docs/experiments.md), except that gan-slow-d has the settings of gan: it is there to show
collapse.

The data are those of gan_toy.py (github.com/igul222/improved_wgan_training), before it divides them
by 1.414: radius 2, standard deviation 0.02, after Metz et al. 2016
(https://arxiv.org/abs/1611.02163). The networks have its three hidden layers, but 64 units in each
instead of 512, and PyTorch's initialisation instead of He's. gan_toy.py trains for 100,000
steps at a constant learning rate of 1e-4. Modes are counted as in PacGAN, Lin et al. 2018
(https://arxiv.org/abs/1712.04086).

The script runs on the CPU, which is enough for networks of this size.
"""

import csv
import functools
import math
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import common
import gan
import lsgan
import r3gan
import runs
import sngan
import wgan
import wgan_gp


@dataclass
class Way:
    """A way to train: the losses of a script, and its settings."""

    d_loss: Callable  # of D's scores of real points and of fakes
    g_loss: Callable  # of D's scores of fakes; r3gan's takes those of real points first
    lr: float
    strength: float  # see the docstring
    colour: str


saturating = functools.partial(gan.g_loss, saturating=True)
WAYS = {
    "gan": Way(gan.d_loss, gan.g_loss, 2e-3, 0.0, "#d1495b"),
    "gan-slow-d": Way(gan.d_loss, gan.g_loss, 2e-3, 0.05, "#8c2f39"),
    "gan-saturating": Way(gan.d_loss, saturating, 2e-3, 0.5, "#e07b39"),
    "lsgan": Way(lsgan.d_loss, lsgan.g_loss, 2e-3, 0.0, "#2e8b57"),
    "wgan": Way(wgan.d_loss, wgan.g_loss, 1e-3, 0.3, "#2878b5"),
    "wgan_gp": Way(wgan_gp.d_loss, wgan_gp.g_loss, 2e-3, 1.0, "#6a4c93"),
    "sngan": Way(sngan.d_loss, sngan.g_loss, 2e-3, 10.0, "#a0522d"),
    "gan-r1": Way(gan.d_loss, gan.g_loss, 2e-3, 0.1, "#008080"),
    "r3gan": Way(r3gan.d_loss, r3gan.g_loss, 2e-3, 0.1, "#b8860b"),
    "r3gan-r1": Way(r3gan.d_loss, r3gan.g_loss, 2e-3, 1.0, "#708238"),
}

# The mixture: the circle's radius, and the standard deviation of each Gaussian.
RADIUS = 2.0
STD = 0.02

# G's points are kept at the start and at 30 moments after it, of which the picture shows some.
MOMENTS = 30
COLUMNS = (0, 1, 3, 9, 18, 30)


def parse_args(argv=None):
    p = ArgumentParser(
        prog="eight_gaussians.py",
        description=__doc__.splitlines()[0],
        usage=SUPPRESS,
        allow_abbrev=False,
        formatter_class=runs.HelpFormatter,
    )
    p.add_argument("--only", choices=WAYS, help="train in this way alone")
    p.add_argument("--modes", type=runs.positive_int, default=8, help="Gaussians on the circle")
    p.add_argument("--batch-size", type=runs.positive_int, default=256, help="points per update")
    p.add_argument("--width", type=runs.positive_int, default=64, help="units of a hidden layer")
    p.add_argument("--lr", type=runs.positive_float, help="learning rate (default: each way's own)")
    p.add_argument(
        "--strength",
        type=runs.non_negative_float,
        help="what a way has of its own, such as wgan's clip (default: each way's own)",
    )
    p.add_argument("--steps", type=runs.positive_int, default=2000, help="updates of G")
    p.add_argument(
        "--seed", type=runs.non_negative_int, default=0, help="seed of all random numbers"
    )
    p.add_argument(
        "--out-dir", type=runs.path, default="runs/eight_gaussians", help="output folder"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the results in --out-dir")
    args = p.parse_args(argv)
    if args.strength is not None:
        if args.only is None:
            p.error("--strength goes with --only, as each way has its own")
        if args.only in ("gan", "gan-saturating", "lsgan") and args.strength >= 1:
            p.error(f"--strength is {args.strength}: beta1 must be less than 1")
    runs.check_writable(p, args.out_dir)
    if runs.is_used(args.out_dir) and not args.overwrite:
        p.error(
            f"{args.out_dir} is not empty: choose another --out-dir, or --overwrite its results"
        )
    return args


# --------------------------------------------------------------------------------------------- data


def mode_centres(modes):
    """The middles of the Gaussians, (modes, 2), at equal distances on the circle."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def real_points(n, centres):
    """n points of the mixture, (n, 2): each of a Gaussian that is drawn at random."""
    middle = centres[torch.randint(len(centres), (n,))]
    return middle + STD * torch.randn(n, 2)


def count(points, centres):
    """How well points (N, 2) cover the mixture: the number of modes that are captured, the share of
    points of high quality, and the KL divergence of their histogram over the modes from a uniform
    one, in nats.

    A point is of high quality within 3 standard deviations of its nearest mode, which 98.9% of
    real points are, and a mode is captured by at least one such point: Lin et al. 2018, section
    4.1. As one is a lax threshold, the divergence, of the points of high quality, is given as
    well: 0 for equal shares, log(modes) if all points are in one mode, NaN without any.
    """
    distance, nearest = torch.cdist(points, centres).min(1)
    good = distance <= 3 * STD
    hits = torch.bincount(nearest[good], minlength=len(centres))
    share = hits / hits.sum()
    divergence = torch.xlogy(share, share * len(centres)).sum()
    return int((hits > 0).sum()), good.double().mean().item(), divergence.item()


# ----------------------------------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, 2) -> points (N, 2)."""

    def __init__(self, width):
        super().__init__()
        layers = [nn.Linear(2, width), nn.ReLU()]
        layers += [nn.Linear(width, width), nn.ReLU()]
        layers += [nn.Linear(width, width), nn.ReLU()]
        layers += [nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    """Points (N, 2) -> scores (N,). With `scale`, each layer has spectral norm, and the scores are
    multiplied by it."""

    def __init__(self, width, scale=None):
        super().__init__()
        layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, width)]
        layers += [nn.Linear(width, 1)]
        if scale is not None:
            layers = [sngan.sn(layer) for layer in layers]
        first, second, third, last = layers
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last)
        self.scale = 1.0 if scale is None else scale

    def forward(self, x):
        return self.scale * self.net(x).flatten()


# ----------------------------------------------------------------------------------------- training


def make_optimisers(name, G, D, lr, strength):
    """The optimisers of G and D for one of the WAYS."""
    if name == "wgan":
        opt_G = torch.optim.RMSprop(G.parameters(), lr=lr)
        return opt_G, torch.optim.RMSprop(D.parameters(), lr=lr)

    # beta1 is 0 with R1, as its authors have it, and 0.5 as in gan_toy.py for most others.
    betas = (0.5, 0.9)
    lr_D = lr
    if name in ("gan", "gan-saturating", "lsgan"):
        betas = (strength, 0.9)
    if name in ("gan-r1", "r3gan", "r3gan-r1"):
        betas = (0.0, 0.9)
    if name == "gan-slow-d":
        betas = (WAYS["gan"].strength, 0.9)
        lr_D = strength * lr
    opt_G = torch.optim.Adam(G.parameters(), lr=lr, betas=betas, fused=True)
    return opt_G, torch.optim.Adam(D.parameters(), lr=lr_D, betas=betas, fused=True)


def train(name, args):
    """Trains in one of the WAYS. Returns G's points of the same noise, (2500, 2) each, at the start
    and at MOMENTS moments after it. Exits with an error if they are not finite."""
    torch.manual_seed(args.seed)
    centres = mode_centres(args.modes)
    way = WAYS[name]
    lr = way.lr if args.lr is None else args.lr
    strength = way.strength if args.strength is None else args.strength
    G = Generator(args.width)
    D = Discriminator(args.width, scale=strength if name == "sngan" else None)
    opt_G, opt_D = make_optimisers(name, G, D, lr, strength)
    start_rates = [opt.param_groups[0]["lr"] for opt in (opt_G, opt_D)]
    n_critic = 5 if name in ("wgan", "wgan_gp") else 1
    fixed_z = torch.randn(2500, 2)

    def d_step(x_real):
        """One update of D: minimise d_loss and its penalty, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, 2))
        loss_D = way.d_loss(D(x_real), D(x_fake))
        if name == "wgan_gp":
            loss_D = loss_D + strength * wgan_gp.gradient_penalty(D, x_real, x_fake)
        if name in ("gan-r1", "r3gan", "r3gan-r1"):
            loss_D = loss_D + strength / 2 * r3gan.gradient_penalty(D, x_real)
        if name == "r3gan":
            loss_D = loss_D + strength / 2 * r3gan.gradient_penalty(D, x_fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        if name == "wgan":
            with torch.no_grad():
                for w in D.parameters():
                    w.clamp_(-strength, strength)

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        d_fake = D(G(torch.randn(args.batch_size, 2)))
        if name in ("r3gan", "r3gan-r1"):
            loss_G = way.g_loss(D(real_points(args.batch_size, centres)), d_fake)
        else:
            loss_G = way.g_loss(d_fake)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()

    kept = [G(fixed_z).detach()]
    for step in tqdm(range(1, args.steps + 1), name):
        # The learning rates fall to 0 over the second half.
        left = 1 - (step - 1) / args.steps
        for opt, rate in zip((opt_G, opt_D), start_rates, strict=True):
            opt.param_groups[0]["lr"] = rate * min(1.0, 2 * left)

        for _ in range(n_critic):
            d_step(real_points(args.batch_size, centres))
        g_step()
        while step * MOMENTS >= len(kept) * args.steps:
            kept.append(G(fixed_z).detach())
            if not kept[-1].isfinite().all():
                common.fail(f"{name}: a point is not finite at step {step}: try a lower --lr")
    return kept


# ----------------------------------------------------------------------------------------- pictures


def panel(points, centres, colour, size=150):
    """A square image of the plane from -2.6 to 2.6, `size` pixels wide, in a frame: real points in
    grey, G's `points` (N, 2) in `colour`."""
    large = 3 * size  # reduced at the end, for smooth dots
    image = Image.new("RGB", (large, large), "white")
    pen = ImageDraw.Draw(image)
    real = real_points(60 * len(centres), centres)
    for dots, fill, radius in ((real, "#b8b8b8", 9), (points, colour, 3)):
        for x, y in ((dots / 5.2 + 0.5) * large).tolist():
            y = large - y
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
    pen.rectangle([0, 0, large - 1, large - 1], outline="#cccccc", width=3)
    return image.reduce(3)


def write_pictures(kept, centres, steps, out_dir):
    """Writes picture.png and movie.gif of what `train` returned in `steps` steps, by the names of
    the WAYS."""
    torch.manual_seed(0)  # the same real points in all panels
    font = ImageFont.load_default(size=14)
    size = 150

    # A row for each way, below headings with the steps.
    picture = Image.new("RGB", (120 + size * len(COLUMNS), 24 + size * len(kept)), "white")
    pen = ImageDraw.Draw(picture)
    for column, moment in enumerate(COLUMNS):
        step = math.ceil(moment * steps / MOMENTS)
        middle = 120 + (column + 0.5) * size
        pen.text((middle, 12), f"step {step:,}", "black", font, anchor="mm")
    for row, (name, moments) in enumerate(kept.items()):
        pen.text((6, 24 + (row + 0.5) * size), name, "black", font, anchor="lm")
        for column, moment in enumerate(COLUMNS):
            tile = panel(moments[moment], centres, WAYS[name].colour)
            picture.paste(tile, (120 + size * column, 24 + size * row))
    picture.save(out_dir / "picture.png")

    # Five panels in a row of the movie.
    columns = min(5, len(kept))
    n_rows = math.ceil(len(kept) / columns)
    frames = []
    for moment in range(MOMENTS + 1):
        frame = Image.new("RGB", (size * columns, (size + 20) * n_rows), "white")
        pen = ImageDraw.Draw(frame)
        for k, (name, moments) in enumerate(kept.items()):
            left, top = size * (k % columns), (size + 20) * (k // columns)
            pen.text((left + size / 2, top + 10), name, "black", font, anchor="mm")
            frame.paste(panel(moments[moment], centres, WAYS[name].colour), (left, top + 20))
        frames.append(frame)
    durations = [150] * MOMENTS + [2000]  # milliseconds: the last one stays
    frames[0].save(
        out_dir / "movie.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


def main(argv=None):
    args = parse_args(argv)
    centres = mode_centres(args.modes)
    kept = {name: train(name, args) for name in WAYS if args.only in (None, name)}

    # The table: how G's points cover the mixture at the end, and how many modes they covered on
    # average over the run. Real points are there for comparison.
    rows = [["way", "modes", "high_quality", "kl", "mean_modes"]]
    for name, moments in kept.items():
        modes, high_quality, divergence = count(moments[-1], centres)
        all_modes = [count(points, centres)[0] for points in moments[1:]]
        mean_modes = sum(all_modes) / len(all_modes)
        rows.append([name, modes, f"{high_quality:.3f}", f"{divergence:.3f}", f"{mean_modes:.1f}"])
    modes, high_quality, divergence = count(real_points(2500, centres), centres)
    rows.append(["real points", modes, f"{high_quality:.3f}", f"{divergence:.3f}", f"{modes:.1f}"])
    for row in rows:
        print("{:15} {:>6} {:>13} {:>7} {:>11}".format(*row))

    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_pictures(kept, centres, args.steps, out_dir)
    with open(out_dir / "table.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    common.say(f"done: {out_dir / 'picture.png'}")


if __name__ == "__main__":
    main()
