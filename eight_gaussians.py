"""Eight Gaussians: ten methods of training a GAN on a mixture that you can plot.

    python eight_gaussians.py                    all ten: about three minutes of one CPU core
    python eight_gaussians.py --only gan-slow-d  one of them

The real points come from eight Gaussians on a circle. G maps noise to points, and D scores points.
Each method has the losses of its script, on networks of the same size. In --out-dir this writes

    picture.png     a row for each method, a column for each moment: real points grey, G's in colour
    movie.gif       the same in motion
    table.csv       how many modes G has found, and how well it hits them

The methods, and what they add:

    gan             Goodfellow et al. 2014
    gan-slow-d      the same, but D learns at a twentieth of G's rate
    gan-saturating  the loss of G that saturates
    lsgan           least squares
    wgan            clipped weights, RMSprop, five updates of D
    wgan_gp         a gradient penalty, five updates of D
    sngan           spectral norm on each layer of D, hinge loss
    gan-r1          gan with R1 (Mescheder et al. 2018, 1801.04406)
    r3gan           a loss on pairs with R1 and R2
    r3gan-r1        the same with R1 alone

The learning rate falls linearly to 0 over the second half of the run: with a constant one, G's
points keep moving. The settings of each method were chosen on seeds 0 to 2, except that gan-slow-d
has those of gan: it is there to show collapse (docs/eight-gaussians.md). The data and the networks
are those of gan_toy.py by the authors of WGAN-GP, with narrower layers (docs/papers.md).

The script runs on the CPU, which is enough for networks of this size.
"""

import csv
import functools
import json
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
class Method:
    """The losses of a script, and settings."""

    d_loss: Callable  # of D's scores of real points and of fakes
    g_loss: Callable  # of D's scores of fakes; with `pairs`, those of real points come first
    colour: str
    lr: float = 2e-3
    lr_D: float | None = None  # None: the same as lr
    betas: tuple = (0.5, 0.9)  # of Adam, as in gan_toy.py
    n_critic: int = 1  # updates of D per update of G
    pairs: bool = False
    clip: float | None = None  # D's weights stay in [-clip, clip]; RMSprop takes Adam's place
    gp_weight: float = 0.0  # of WGAN-GP's gradient penalty
    r1: float = 0.0  # weight gamma of the penalty at real points
    r2: float = 0.0  # the same at fakes
    score_scale: float | None = None  # with spectral norm in D, whose scores are multiplied by it


saturating = functools.partial(gan.g_loss, saturating=True)
no_momentum = (0.0, 0.9)  # the authors of R1 train without momentum, too, but by RMSprop
METHODS = {
    "gan": Method(gan.d_loss, gan.g_loss, "#d1495b", betas=no_momentum),
    "gan-slow-d": Method(gan.d_loss, gan.g_loss, "#8c2f39", lr_D=1e-4, betas=no_momentum),
    "gan-saturating": Method(gan.d_loss, saturating, "#e07b39"),
    "lsgan": Method(lsgan.d_loss, lsgan.g_loss, "#2e8b57", betas=no_momentum),
    "wgan": Method(wgan.d_loss, wgan.g_loss, "#2878b5", lr=1e-3, n_critic=5, clip=0.3),
    "wgan_gp": Method(wgan_gp.d_loss, wgan_gp.g_loss, "#6a4c93", n_critic=5, gp_weight=1.0),
    "sngan": Method(sngan.d_loss, sngan.g_loss, "#a0522d", score_scale=10.0),
    "gan-r1": Method(gan.d_loss, gan.g_loss, "#008080", betas=no_momentum, r1=0.1),
    "r3gan": Method(
        r3gan.d_loss, r3gan.g_loss, "#b8860b", betas=no_momentum, pairs=True, r1=0.1, r2=0.1
    ),
    "r3gan-r1": Method(
        r3gan.d_loss, r3gan.g_loss, "#708238", betas=no_momentum, pairs=True, r1=1.0
    ),
}

# The mixture: the circle's radius, and the standard deviation of each Gaussian.
RADIUS = 2.0
STD = 0.02

# G's points are kept at the start and at 30 moments after it, of which the picture shows some.
MOMENTS = 30
COLUMNS = (0, 1, 3, 9, 18, 30)


def parse_args(argv=None):
    p = ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__.splitlines()[0],
        usage=SUPPRESS,
        allow_abbrev=False,
        formatter_class=runs.HelpFormatter,
    )
    p.add_argument("--only", choices=METHODS, help="train with this method alone")
    p.add_argument("--modes", type=runs.positive_int, default=8, help="Gaussians on the circle")
    p.add_argument("--batch-size", type=runs.positive_int, default=256, help="points per update")
    p.add_argument("--width", type=runs.positive_int, default=64, help="units of a hidden layer")
    p.add_argument("--steps", type=runs.positive_int, default=2000, help="updates of G")
    p.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    p.add_argument("--out-dir", default="runs/eight_gaussians", help="output folder")
    p.add_argument("--overwrite", action="store_true", help="replace the results in --out-dir")
    args = p.parse_args(argv)
    owner = runs.script_of(Path(args.out_dir))
    if owner not in (None, "eight_gaussians"):
        p.error(f"{args.out_dir} holds a run of another script: choose another --out-dir")
    if owner and not args.overwrite:
        p.error(f"{args.out_dir} holds results: --overwrite them, or choose another --out-dir")
    runs.make_folder(p, args)
    return args


# data ---------------------------------------------------------------------------------------------


def mode_centres(modes):
    """The centres of the Gaussians, (modes, 2), equally spaced on a circle."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def real_points(n, centres):
    """n points of the mixture, (n, 2): each from a Gaussian chosen at random."""
    middle = centres[torch.randint(len(centres), (n,))]
    return middle + STD * torch.randn(n, 2)


def coverage(points, centres):
    """How well points (N, 2) cover the mixture: the number of modes that are captured, the share of
    points of high quality, and the KL divergence of their histogram over the modes from a uniform
    one, in nats.

    A point is of high quality within 3 standard deviations of its nearest mode, which 98.9% of
    real points are, and a mode is captured by at least one such point: Lin et al. 2018, section
    4.1. Because a single point is a lax threshold, the KL divergence of the points of high quality
    is returned, too: 0 for equal shares, log(modes) if all are in one mode, NaN without any.
    """
    distance, nearest = torch.cdist(points, centres).min(1)
    good = distance <= 3 * STD
    hits = torch.bincount(nearest[good], minlength=len(centres))
    share = hits / hits.sum()
    divergence = torch.xlogy(share, share * len(centres)).sum()
    return int((hits > 0).sum()), good.double().mean().item(), divergence.item()


# networks -----------------------------------------------------------------------------------------


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
    """Points (N, 2) or (N, 2, 1, 1) -> scores (N,). With `score_scale`, each layer has spectral
    norm, and the scores are multiplied by it."""

    def __init__(self, width, score_scale=None):
        super().__init__()
        layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, width)]
        layers += [nn.Linear(width, 1)]
        if score_scale is not None:
            layers = [sngan.spectral_norm(layer) for layer in layers]
        first, second, third, last = layers
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last)
        self.score_scale = 1.0 if score_scale is None else score_scale

    def forward(self, x):
        return self.score_scale * self.net(x.flatten(1)).flatten()


# training -----------------------------------------------------------------------------------------


def train(name, args):
    """Trains with one of the METHODS. Returns G's points for the same noise, (2500, 2) each, at the
    start and at MOMENTS moments after it. Exits with an error if they are not finite."""
    torch.manual_seed(args.seed)
    centres = mode_centres(args.modes)
    method = METHODS[name]
    G, D = Generator(args.width), Discriminator(args.width, method.score_scale)
    lr_D = method.lr if method.lr_D is None else method.lr_D
    if method.clip is None:
        opt_G = torch.optim.Adam(G.parameters(), lr=method.lr, betas=method.betas, fused=True)
        opt_D = torch.optim.Adam(D.parameters(), lr=lr_D, betas=method.betas, fused=True)
    else:
        opt_G = torch.optim.RMSprop(G.parameters(), lr=method.lr)
        opt_D = torch.optim.RMSprop(D.parameters(), lr=lr_D)

    def noise(n):
        """n draws of z ~ N(0, I)."""
        return torch.randn(n, 2)

    def penalties(d_real, d_fake, x_real, x_fake):
        """What is added to D's loss."""
        penalty = 0.0
        if method.gp_weight:
            images = x_real[:, :, None, None], x_fake[:, :, None, None]
            penalty = penalty + method.gp_weight * wgan_gp.gradient_penalty(D, *images)
        if method.r1:
            penalty = penalty + method.r1 / 2 * r3gan.r1_penalty(d_real, x_real)
        if method.r2:
            penalty = penalty + method.r2 / 2 * r3gan.r1_penalty(d_fake, x_fake)
        return penalty

    def update():
        """One step: n_critic updates of D, each on its own points, then one of G."""
        # D: minimise d_loss and its penalties, with G fixed.
        D.requires_grad_(True)
        for _ in range(method.n_critic):
            x_real = real_points(args.batch_size, centres)
            with torch.no_grad():
                x_fake = G(noise(args.batch_size))
            # R1 and R2 need the gradients at the points.
            x_real.requires_grad_()
            x_fake.requires_grad_()
            d_real, d_fake = D(x_real), D(x_fake)
            loss_D = method.d_loss(d_real, d_fake) + penalties(d_real, d_fake, x_real, x_fake)
            opt_D.zero_grad()
            loss_D.backward()
            opt_D.step()
            if method.clip is not None:
                with torch.no_grad():
                    for w in D.parameters():
                        w.clamp_(-method.clip, method.clip)

        # G: minimise g_loss, with D fixed.
        D.requires_grad_(False)
        d_fake = D(G(noise(args.batch_size)))
        if method.pairs:
            loss_G = method.g_loss(D(real_points(args.batch_size, centres)), d_fake)
        else:
            loss_G = method.g_loss(d_fake)
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()

    fixed_z = noise(2500)
    kept = [G(fixed_z).detach()]
    for step in tqdm(range(1, args.steps + 1), name):
        # The learning rates fall to 0 over the second half.
        left = min(1.0, 2 * (1 - (step - 1) / args.steps))
        opt_G.param_groups[0]["lr"] = method.lr * left
        opt_D.param_groups[0]["lr"] = lr_D * left

        update()
        while step * MOMENTS >= len(kept) * args.steps:
            kept.append(G(fixed_z).detach())
            if not kept[-1].isfinite().all():
                common.fail(f"{name}: a point is not finite at step {step}")
    return kept


# pictures -----------------------------------------------------------------------------------------


def panel(points, real, colour, size):
    """A square image of the plane from -2.6 to 2.6, `size` pixels wide, in a frame: `real` points
    (M, 2) in grey, G's `points` (N, 2) in `colour`."""
    large = 3 * size  # reduced at the end, for smooth dots
    image = Image.new("RGB", (large, large), "white")
    pen = ImageDraw.Draw(image)
    for dots, fill, radius in ((real, "#b8b8b8", 9), (points, colour, 3)):
        for x, y in ((dots / 5.2 + 0.5) * large).tolist():
            y = large - y
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
    pen.rectangle([0, 0, large - 1, large - 1], outline="#cccccc", width=3)
    return image.reduce(3)


def write_pictures(kept, centres, steps, out_dir):
    """Writes picture.png and movie.gif. `kept` has what `train` returned for `steps` steps, by the
    name of the method."""
    torch.manual_seed(0)
    real = real_points(60 * len(centres), centres)  # the same ones in all panels
    font = ImageFont.load_default(size=14)
    size = 150  # of a panel, in pixels

    # A row for each method, below headings with the steps.
    picture = Image.new("RGB", (120 + size * len(COLUMNS), 24 + size * len(kept)), "white")
    pen = ImageDraw.Draw(picture)
    for column, moment in enumerate(COLUMNS):
        step = math.ceil(moment * steps / MOMENTS)
        middle = 120 + (column + 0.5) * size
        pen.text((middle, 12), f"step {step:,}", "black", font, anchor="mm")
    for row, (name, moments) in enumerate(kept.items()):
        pen.text((6, 24 + (row + 0.5) * size), name, "black", font, anchor="lm")
        for column, moment in enumerate(COLUMNS):
            tile = panel(moments[moment], real, METHODS[name].colour, size)
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
            tile = panel(moments[moment], real, METHODS[name].colour, size)
            frame.paste(tile, (left, top + 20))
        frames.append(frame)
    durations = [150] * MOMENTS + [2000]  # milliseconds: the last one stays
    frames[0].save(
        out_dir / "movie.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


def main(argv=None):
    args = parse_args(argv)
    centres = mode_centres(args.modes)
    kept = {name: train(name, args) for name in METHODS if args.only in (None, name)}

    # The table: how G's points cover the mixture at the end, and how many modes they covered on
    # average over the run. Real points are there for comparison.
    rows = [["method", "modes", "high_quality", "kl", "mean_modes"]]
    for name, moments in kept.items():
        modes, high_quality, divergence = coverage(moments[-1], centres)
        all_modes = [coverage(points, centres)[0] for points in moments[1:]]
        mean_modes = sum(all_modes) / len(all_modes)
        rows.append([name, modes, f"{high_quality:.3f}", f"{divergence:.3f}", f"{mean_modes:.1f}"])
    modes, high_quality, divergence = coverage(real_points(2500, centres), centres)
    rows.append(["real points", modes, f"{high_quality:.3f}", f"{divergence:.3f}", f"{modes:.1f}"])
    for row in rows:
        print("{:15} {:>6} {:>13} {:>7} {:>11}".format(*row))

    # args.json says whose folder this is.
    out_dir = Path(args.out_dir)
    about = {"script": "eight_gaussians", **vars(args), "torch": torch.__version__}
    about = json.dumps(about, indent=1)
    (out_dir / "args.json").write_text(about, "utf-8")
    write_pictures(kept, centres, args.steps, out_dir)
    with open(out_dir / "table.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    common.say(f"done: {out_dir / 'picture.png'}")


if __name__ == "__main__":
    main()
