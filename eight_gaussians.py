"""Eight Gaussians: six losses on a mixture that one can see, with and without mode collapse.

    python eight_gaussians.py                 all six: five minutes of one CPU core
    python eight_gaussians.py --only wgan_gp  one of them

The real points come from eight Gaussians on a circle. G maps noise to points, and D scores points.
Each loss gets the same two networks, and is the very function of its script (gan.py, lsgan.py,
wgan.py, wgan_gp.py, sngan.py), so that the loss is what differs. In --out-dir this writes

    picture.png     a row for each loss, a column for each moment: real points grey, G's in colour
    movie.gif       the same in motion
    table.csv       how many modes G has found, and how well it hits them

The data are those of gan_toy.py (github.com/igul222/improved_wgan_training), before it divides them
by 1.414: radius 2, standard deviation 0.02, after Metz et al. 2016
(https://arxiv.org/abs/1611.02163). The networks have its three hidden layers, but 128 units in
each, not 512, and PyTorch's initialisation, not He's. Modes are counted as in PacGAN, Lin et
al. 2018 (https://arxiv.org/abs/1712.04086).

Adam's betas are (0.5, 0.9), as in gan_toy.py; its learning rate is 1e-4, and it trains for 100,000
steps. What a loss has of its own:
- wgan: clipped weights, RMSprop, and five updates of D for one of G, as in its paper; but a clip of
  0.05 and a tenth of the learning rate, 1e-4, where the paper has 0.01 and 5e-5.
- wgan_gp: a gradient penalty of weight 0.1 (gan_toy.py), five updates of D for one of G.
- sngan: spectral norm on each layer of D. Its slope of at most 1 cannot tell points apart that
  are 0.02 from each other, so that its scores are multiplied by 20.

It runs on the CPU, which is enough for networks of this size.
"""

import csv
import functools
import math
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import common
import gan
import lsgan
import runs
import sngan
import wgan
import wgan_gp

# D's and G's loss of each script, as functions of scores.
LOSSES = {
    "gan": (gan.d_loss, gan.g_loss),
    "gan-saturating": (gan.d_loss, functools.partial(gan.g_loss, saturating=True)),
    "lsgan": (lsgan.d_loss, lsgan.g_loss),
    "wgan": (wgan.d_loss, wgan.g_loss),
    "wgan_gp": (wgan_gp.d_loss, wgan_gp.g_loss),
    "sngan": (sngan.d_loss, sngan.g_loss),
}

# The mixture: the circle's radius, and the standard deviation of each Gaussian.
RADIUS = 2.0
STD = 0.02

# What a loss needs of its own.
CLIP = 0.05  # wgan: D's largest weight
PENALTY = 0.1  # wgan_gp: weight of the gradient penalty
SCALE = 20.0  # sngan: factor of D's scores

# G's points are kept at the start and at 30 moments after it, of which the picture shows some.
MOMENTS = 30
COLUMNS = (0, 1, 3, 9, 18, 30)
COLOURS = ("#d1495b", "#e07b39", "#2e8b57", "#2878b5", "#6a4c93", "#a0522d")


def parse_args(argv=None):
    p = ArgumentParser(
        prog="eight_gaussians.py",
        description=__doc__.splitlines()[0],
        usage=SUPPRESS,
        allow_abbrev=False,
        formatter_class=runs.HelpFormatter,
    )
    p.add_argument("--only", choices=LOSSES, help="train with this loss alone")
    p.add_argument("--modes", type=runs.positive_int, default=8, help="Gaussians on the circle")
    p.add_argument("--batch-size", type=runs.positive_int, default=256, help="points per update")
    p.add_argument("--width", type=runs.positive_int, default=128, help="units of a hidden layer")
    p.add_argument("--lr", type=runs.positive_float, default=1e-3, help="learning rate")
    p.add_argument("--steps", type=runs.positive_int, default=3000, help="updates of G")
    p.add_argument("--seed", type=runs.non_negative_int, default=0, help="of all random numbers")
    p.add_argument("--out-dir", type=runs.path, default="runs/eight_gaussians", help="for results")
    p.add_argument("--overwrite", action="store_true", help="replace the results in --out-dir")
    args = p.parse_args(argv)
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
        self.net = nn.Sequential(
            *[nn.Linear(2, width), nn.ReLU()],
            *[nn.Linear(width, width), nn.ReLU()],
            *[nn.Linear(width, width), nn.ReLU()],
            nn.Linear(width, 2),
        )

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    """Points (N, 2) -> scores (N,), with spectral norm and a scale if `spectral`."""

    def __init__(self, width, spectral):
        super().__init__()
        layers = [nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, width)]
        layers += [nn.Linear(width, 1)]
        if spectral:
            layers = [sngan.sn(layer) for layer in layers]
        first, second, third, last = layers
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), last)
        self.scale = SCALE if spectral else 1

    def forward(self, x):
        return self.scale * self.net(x).flatten()


# ----------------------------------------------------------------------------------------- training


def train(name, args):
    """Trains with the loss `name` of LOSSES. Returns G's points of the same noise, (2500, 2) each,
    at the start and at MOMENTS moments after it. Exits with an error if they are not finite."""
    torch.manual_seed(args.seed)
    centres = mode_centres(args.modes)
    d_loss, g_loss = LOSSES[name]
    G = Generator(args.width)
    D = Discriminator(args.width, spectral=name == "sngan")
    if name == "wgan":
        opt_G = torch.optim.RMSprop(G.parameters(), lr=args.lr / 10)
        opt_D = torch.optim.RMSprop(D.parameters(), lr=args.lr / 10)
    else:
        opt_G = torch.optim.Adam(G.parameters(), lr=args.lr, betas=(0.5, 0.9), fused=True)
        opt_D = torch.optim.Adam(D.parameters(), lr=args.lr, betas=(0.5, 0.9), fused=True)
    n_critic = 5 if name in ("wgan", "wgan_gp") else 1
    fixed_z = torch.randn(2500, 2)

    def d_step(x_real):
        """One update of D: minimise d_loss, with G fixed."""
        D.requires_grad_(True)
        with torch.no_grad():
            x_fake = G(torch.randn(args.batch_size, 2))
        loss_D = d_loss(D(x_real), D(x_fake))
        if name == "wgan_gp":
            loss_D = loss_D + PENALTY * wgan_gp.gradient_penalty(D, x_real, x_fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        if name == "wgan":
            with torch.no_grad():
                for w in D.parameters():
                    w.clamp_(-CLIP, CLIP)

    def g_step():
        """One update of G: minimise g_loss, with D fixed."""
        D.requires_grad_(False)
        loss_G = g_loss(D(G(torch.randn(args.batch_size, 2))))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()

    kept = [G(fixed_z).detach()]
    for step in tqdm(range(1, args.steps + 1), name):
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
    """A square image of the plane from -2.6 to 2.6, `size` pixels wide: real points in grey, G's
    `points` (N, 2) in `colour`."""
    large = 3 * size  # reduced at the end, for smooth dots
    image = Image.new("RGB", (large, large), "white")
    pen = ImageDraw.Draw(image)
    real = real_points(60 * len(centres), centres)
    for dots, fill, radius in ((real, "#b8b8b8", 9), (points, colour, 2)):
        for x, y in ((dots / 5.2 + 0.5) * large).tolist():
            y = large - y
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
    return image.reduce(3)


def write_pictures(kept, centres, out_dir):
    """Writes picture.png and movie.gif of what `train` returned, by the names of the losses."""
    torch.manual_seed(0)  # the same real points in all panels
    font = ImageFont.load_default(size=14)
    size = 150

    picture = Image.new("RGB", (110 + size * len(COLUMNS), size * len(kept)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, moments) in enumerate(kept.items()):
        pen.text((6, (row + 0.5) * size), name, "black", font, anchor="lm")
        for column, moment in enumerate(COLUMNS):
            tile = panel(moments[moment], centres, COLOURS[row])
            picture.paste(tile, (110 + size * column, size * row))
    picture.save(out_dir / "picture.png")

    frames = []
    for moment in range(MOMENTS + 1):
        frame = Image.new("RGB", (size * len(kept), size + 20), "white")
        pen = ImageDraw.Draw(frame)
        for column, (name, moments) in enumerate(kept.items()):
            pen.text(((column + 0.5) * size, 12), name, "black", font, anchor="mm")
            frame.paste(panel(moments[moment], centres, COLOURS[column]), (size * column, 20))
        frames.append(frame)
    durations = [150] * MOMENTS + [2000]  # milliseconds: the last one stays
    frames[0].save(
        out_dir / "movie.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


def main(argv=None):
    args = parse_args(argv)
    centres = mode_centres(args.modes)
    kept = {name: train(name, args) for name in LOSSES if args.only in (None, name)}

    # The table: how the last points of each loss cover the mixture, and how real ones do.
    rows = [["loss", "modes", "high_quality", "kl"]]
    results = {name: moments[-1] for name, moments in kept.items()}
    for name, points in {**results, "real points": real_points(2500, centres)}.items():
        modes, high_quality, divergence = count(points, centres)
        rows.append([name, modes, f"{high_quality:.3f}", f"{divergence:.3f}"])
    for row in rows:
        print("{:15} {:>6} {:>13} {:>7}".format(*row))

    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_pictures(kept, centres, out_dir)
    with open(out_dir / "table.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    common.say(f"done: {out_dir / 'picture.png'}")


if __name__ == "__main__":
    main()
