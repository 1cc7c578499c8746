"""eight_gaussians.py: its data and counting in closed form, its losses, and two steps of each."""

import csv
import functools
import math

import pytest
import torch
from helpers import SCRIPTS
from PIL import Image

import eight_gaussians
import wgan_gp


def test_the_modes_are_all_different():
    centres = eight_gaussians.mode_centres(8)
    assert centres.norm(dim=1).tolist() == pytest.approx([2.0] * 8)
    distance = torch.cdist(centres, centres) + 10 * torch.eye(8)
    assert distance.min().item() == pytest.approx(4 * math.sin(math.pi / 8), rel=1e-5)
    assert distance.min(1).values.std().item() < 1e-5


def test_real_points():
    """All modes equally often; 98.9%, 1 - exp(-4.5), within three standard deviations."""
    torch.manual_seed(0)
    centres = eight_gaussians.mode_centres(8)
    points = eight_gaussians.real_points(40_000, centres)
    modes, high_quality, divergence = eight_gaussians.count(points, centres)
    assert modes == 8 and divergence < 0.001
    assert high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    offsets = points - centres[torch.cdist(points, centres).argmin(1)]
    assert offsets.std(0).tolist() == pytest.approx([0.02, 0.02], rel=0.02)


def test_counting():
    """A point 2.9 standard deviations from a mode counts, one 3.1 away does not."""
    centres = eight_gaussians.mode_centres(4)
    near, far = torch.tensor([[0.058, 0.0]]), torch.tensor([[0.0, 0.062]])
    points = torch.cat([centres[:1], centres[:1] + near, centres[1:2] - near, centres[2:3] + far])
    modes, high_quality, divergence = eight_gaussians.count(points, centres)
    assert modes == 2 and high_quality == 0.75
    expected = 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3)
    assert divergence == pytest.approx(expected, rel=1e-5)
    assert eight_gaussians.count(centres, centres) == (4, 1.0, 0.0)
    modes, high_quality, divergence = eight_gaussians.count(centres[:1], centres)
    assert modes == 1 and divergence == pytest.approx(math.log(4), rel=1e-5)
    assert eight_gaussians.count(torch.zeros(5, 2), centres)[:2] == (0, 0.0)


def test_the_losses_are_those_of_the_scripts():
    for name, (d_loss, g_loss) in eight_gaussians.LOSSES.items():
        module = SCRIPTS[name.removesuffix("-saturating")]
        assert d_loss is module.d_loss
        if name == "gan-saturating":
            assert isinstance(g_loss, functools.partial)
            assert g_loss.func is module.g_loss and g_loss.keywords == {"saturating": True}
        else:
            assert g_loss is module.g_loss


def test_what_a_loss_needs_of_its_own(monkeypatch):
    """Updates of D, clipped weights, a penalty, and spectral norm."""
    steps, penalties, critics = [], [], []
    for optimiser in (torch.optim.Adam, torch.optim.RMSprop):

        def step(self, *args, step=optimiser.step):
            steps.append(self)
            return step(self, *args)

        monkeypatch.setattr(optimiser, "step", step)

    def penalty(*args, penalty=wgan_gp.gradient_penalty):
        penalties.append(penalty(*args))
        return penalties[-1]

    class Discriminator(eight_gaussians.Discriminator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            critics.append(self)

    monkeypatch.setattr(wgan_gp, "gradient_penalty", penalty)
    monkeypatch.setattr(eight_gaussians, "Discriminator", Discriminator)
    flags = ["--steps", "2", "--width", "16", "--batch-size", "8", "--lr", "0.01"]
    for name in eight_gaussians.LOSSES:
        steps.clear(), penalties.clear()
        kept = eight_gaussians.train(name, eight_gaussians.parse_args(flags))
        assert len(kept) == eight_gaussians.MOMENTS + 1 and kept[0].shape == (2500, 2)
        assert torch.stack(kept).isfinite().all() and not torch.equal(kept[0], kept[-1])

        several = name in ("wgan", "wgan_gp")
        assert len(steps) == (12 if several else 4) and steps.count(steps[-1]) == 2
        assert isinstance(steps[-1], torch.optim.RMSprop if name == "wgan" else torch.optim.Adam)
        assert len(penalties) == (10 if name == "wgan_gp" else 0)
        largest = max(w.abs().max().item() for w in critics[-1].parameters())
        assert (largest < 0.0501) == (name == "wgan")
        linear = [m for m in critics[-1].modules() if isinstance(m, torch.nn.Linear)]
        normed = [torch.nn.utils.parametrize.is_parametrized(m) for m in linear]
        assert normed == [name == "sngan"] * 4


def test_main_writes_its_results(tmp_path, capsys):
    flags = ["--steps", "3", "--width", "8", "--batch-size", "8"]
    flags += ["--out-dir", str(tmp_path / "run")]
    eight_gaussians.main(flags)
    rows = list(csv.DictReader((tmp_path / "run" / "table.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == [*eight_gaussians.LOSSES, "real points"]
    assert float(rows[-1]["high_quality"]) == pytest.approx(0.989, abs=0.01)
    assert rows[-1]["modes"] == "8"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(rows) + 1
    assert printed.err.endswith(f"done: {tmp_path / 'run' / 'picture.png'}\n")
    with Image.open(tmp_path / "run" / "movie.gif") as movie:
        assert movie.n_frames == eight_gaussians.MOMENTS + 1
    with Image.open(tmp_path / "run" / "picture.png") as picture:
        assert len(picture.getcolors(2**24)) > 8, "grey, and a colour for each loss"
    with pytest.raises(SystemExit):
        eight_gaussians.main(flags)
    line = capsys.readouterr().err
    assert "run is not empty: choose another --out-dir" in line and line.count("\n") == 1
    eight_gaussians.main([*flags, "--overwrite", "--only", "gan"])
    assert len((tmp_path / "run" / "table.csv").read_text().splitlines()) == 3
