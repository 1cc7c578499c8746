"""eight_gaussians.py: its data and counting in closed form, its losses, and two steps of each."""

import csv
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import SCRIPTS, recorded
from PIL import Image, ImageColor

import eight_gaussians
import r3gan
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
    modes, high_quality, divergence = eight_gaussians.coverage(points, centres)
    assert modes == 8 and divergence < 0.001
    assert high_quality == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    offsets = points - centres[torch.cdist(points, centres).argmin(1)]
    assert offsets.std(0).tolist() == pytest.approx([0.02, 0.02], rel=0.02)


def test_counting():
    """A point 2.9 standard deviations from a mode counts, one 3.1 away does not."""
    centres = eight_gaussians.mode_centres(4)
    near, far = torch.tensor([[0.058, 0.0]]), torch.tensor([[0.0, 0.062]])
    points = torch.cat([centres[:1], centres[:1] + near, centres[1:2] - near, centres[2:3] + far])
    modes, high_quality, divergence = eight_gaussians.coverage(points, centres)
    assert modes == 2 and high_quality == 0.75
    expected = 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 3)
    assert divergence == pytest.approx(expected, rel=1e-5)
    assert eight_gaussians.coverage(centres, centres) == (4, 1.0, 0.0)
    modes, high_quality, divergence = eight_gaussians.coverage(centres[:1], centres)
    assert modes == 1 and divergence == pytest.approx(math.log(4), rel=1e-5)
    assert eight_gaussians.coverage(torch.zeros(5, 2), centres)[:2] == (0, 0.0)


def test_the_losses_are_those_of_the_scripts():
    scripts = {"gan-slow-d": "gan", "gan-saturating": "gan", "gan-r1": "gan", "r3gan-r1": "r3gan"}
    for name, method in eight_gaussians.METHODS.items():
        module = SCRIPTS[scripts.get(name, name)]
        assert method.d_loss is module.d_loss
        if name == "gan-saturating":
            assert isinstance(method.g_loss, functools.partial)
            assert method.g_loss.func is module.g_loss
            assert method.g_loss.keywords == {"saturating": True}
        else:
            assert method.g_loss is module.g_loss


@pytest.fixture
def watched(monkeypatch):
    """What `train` does: the steps of its optimisers, the inputs of penalties, and its Ds."""
    seen = SimpleNamespace(steps=[], penalties=[], critics=[])
    for optimiser in (torch.optim.Adam, torch.optim.RMSprop):

        def step(self, *args, step=optimiser.step):
            seen.steps.append((self, self.param_groups[0]["lr"]))
            return step(self, *args)

        monkeypatch.setattr(optimiser, "step", step)
    for module, penalty in ((wgan_gp, wgan_gp.gradient_penalty), (r3gan, r3gan.r1_penalty)):

        def watched_penalty(scores, *x, penalty=penalty, name=module.__name__):
            seen.penalties.append((name, x))
            return penalty(scores, *x)

        monkeypatch.setattr(module, penalty.__name__, watched_penalty)

    class Discriminator(eight_gaussians.Discriminator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.critics.append(self)

    monkeypatch.setattr(eight_gaussians, "Discriminator", Discriminator)
    return seen


NO_MOMENTUM = ("gan", "gan-slow-d", "lsgan", "gan-r1", "r3gan", "r3gan-r1")
FLAGS = "--steps 2 --width 16 --batch-size 8"


@pytest.mark.parametrize("name", eight_gaussians.METHODS)
def test_what_a_method_has_of_its_own(name, watched):
    """Updates of D, clipped weights, penalties, spectral norm, and a slow D."""
    args = eight_gaussians.parse_args(FLAGS.split())
    kept = eight_gaussians.train(name, args)
    assert len(kept) == eight_gaussians.MOMENTS + 1 and kept[0].shape == (2500, 2)
    assert torch.stack(kept).isfinite().all() and not torch.equal(kept[0], kept[-1])

    several = name in ("wgan", "wgan_gp")
    optimisers = [optimiser for optimiser, _ in watched.steps]
    assert len(optimisers) == (12 if several else 4)
    assert optimisers.count(optimisers[-1]) == 2, "one update of G per step"
    assert isinstance(optimisers[-1], torch.optim.RMSprop if name == "wgan" else torch.optim.Adam)
    rate_D, rate_G = watched.steps[0][1], watched.steps[-1][1]
    assert rate_G == (1e-3 if name == "wgan" else 2e-3)
    assert rate_D == (1e-4 if name == "gan-slow-d" else rate_G)
    betas = {(0.0, 0.9)} if name in NO_MOMENTUM else {(0.5, 0.9)}
    assert {optimiser.param_groups[0].get("betas", (0.5, 0.9)) for optimiser in optimisers} == betas

    penalties = {"wgan_gp": ["wgan_gp"] * 10, "gan-r1": ["r3gan"] * 2}
    penalties |= {"r3gan-r1": ["r3gan"] * 2, "r3gan": ["r3gan"] * 4}
    assert [module for module, _ in watched.penalties] == penalties.get(name, [])
    if name in ("gan-r1", "r3gan-r1", "r3gan"):
        (x_real,) = watched.penalties[0][1]
        assert x_real.norm(dim=1).min() > 1.5 and x_real.norm(dim=1).max() < 2.5, "R1: real points"
    if name == "r3gan":
        (x_fake,) = watched.penalties[1][1]
        assert x_fake.norm(dim=1).max() < 1.5, "R2: G's points, in the middle at first"

    linear = [m for m in watched.critics[-1].modules() if isinstance(m, torch.nn.Linear)]
    normed = [torch.nn.utils.parametrize.is_parametrized(m) for m in linear]
    assert normed == [name == "sngan"] * 4


def test_wgan_clips_all_weights_of_D(watched, monkeypatch):
    monkeypatch.setattr(eight_gaussians.METHODS["wgan"], "clip", 0.05)
    eight_gaussians.train("wgan", eight_gaussians.parse_args(FLAGS.split()))
    largest = [w.abs().max().item() for w in watched.critics[-1].parameters()]
    assert max(largest) == pytest.approx(0.05) and min(largest) > 0.01


@pytest.mark.parametrize(
    "name, setting",
    [
        ("wgan_gp", "gp_weight"),
        ("sngan", "score_scale"),
        ("gan-r1", "r1"),
        ("r3gan", "r2"),
    ],
)
def test_each_setting_changes_the_run(name, setting, monkeypatch):
    runs = []
    for value in (0.3, 0.6):
        monkeypatch.setattr(eight_gaussians.METHODS[name], setting, value)
        args = eight_gaussians.parse_args(FLAGS.split())
        runs.append(eight_gaussians.train(name, args)[-1])
    assert not torch.equal(*runs)


@pytest.mark.parametrize("flag", ["--modes 5", "--seed 1", "--width 8", "--batch-size 4"])
def test_flags_change_the_run(flag):
    runs = []
    for flags in (FLAGS, f"{FLAGS} {flag}"):
        args = eight_gaussians.parse_args(flags.split())
        runs.append(eight_gaussians.train("gan", args)[-1])
    assert not torch.equal(*runs)


def test_every_update_has_points_and_noise_of_its_own(monkeypatch):
    """Two steps of five updates of D and one of G."""
    drawn = recorded(monkeypatch, "real_points", eight_gaussians)
    made = recorded(monkeypatch, "forward", eight_gaussians.Generator)
    eight_gaussians.train("wgan", eight_gaussians.parse_args(FLAGS.split()))
    assert len({tuple(points.flatten().tolist()) for points in drawn}) == 10
    assert len({tuple(x.flatten().tolist()) for x in made if len(x) == 8}) == 12


@pytest.mark.parametrize("name", ["gan", "r3gan"])  # without and with pairs
def test_learns_one_gaussian(name):
    """No sign error survives this, and no gradient that is not zeroed."""
    flags = "--modes 1 --steps 100 --width 32 --batch-size 32"
    kept = eight_gaussians.train(name, eight_gaussians.parse_args(flags.split()))
    assert (kept[-1] - torch.tensor([2.0, 0.0])).norm(dim=1).mean() < 0.2


def test_the_learning_rates_fall_over_the_second_half(watched):
    args = eight_gaussians.parse_args(["--steps", "10", "--width", "8", "--batch-size", "8"])
    eight_gaussians.train("gan", args)
    expected = [2e-3 * left for left in (1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)]
    assert [lr for _, lr in watched.steps[::2]] == pytest.approx(expected)
    assert [lr for _, lr in watched.steps[1::2]] == pytest.approx(expected)


def test_a_pair_is_compared_with_real_points_of_its_own(monkeypatch):
    """r3gan's loss of G gets scores of real points first."""
    calls = []

    def g_loss(d_real, d_fake):
        calls.append((d_real, d_fake))
        return r3gan.g_loss(d_real, d_fake)

    monkeypatch.setattr(eight_gaussians.METHODS["r3gan"], "g_loss", g_loss)
    drawn = recorded(monkeypatch, "real_points", eight_gaussians)
    eight_gaussians.train("r3gan", eight_gaussians.parse_args(FLAGS.split()))
    assert len(calls) == 2 and len(drawn) == 4, "for D, and again for G"
    assert all(not torch.equal(d_real, d_fake) for d_real, d_fake in calls)


def test_main_writes_its_results(tmp_path, capsys, monkeypatch):
    """Of a G that has points in 8, 1, 2 and 6 modes: the last ones count, and mean_modes is the
    mean over all moments but the start."""
    assert eight_gaussians.COLUMNS[-1] == eight_gaussians.MOMENTS
    monkeypatch.setattr(eight_gaussians, "MOMENTS", 3)
    monkeypatch.setattr(eight_gaussians, "COLUMNS", (0, 1, 3))
    moments = [eight_gaussians.mode_centres(8)[:modes] for modes in (8, 1, 2, 6)]
    monkeypatch.setattr(eight_gaussians, "train", lambda name, args: moments)
    flags = ["--out-dir", str(tmp_path / "run")]
    eight_gaussians.main(flags)
    rows = list(csv.DictReader((tmp_path / "run" / "table.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [*eight_gaussians.METHODS, "real points"]
    assert list(rows[0].values()) == ["gan", "6", "1.000", f"{math.log(8 / 6):.3f}", "3.0"]
    assert rows[-1]["mean_modes"] == "8.0"
    assert float(rows[-1]["high_quality"]) == pytest.approx(0.989, abs=0.01)
    assert rows[-1]["modes"] == "8"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(rows) + 1
    assert printed.err.endswith(f"done: {tmp_path / 'run' / 'picture.png'}\n")
    with Image.open(tmp_path / "run" / "movie.gif") as movie:
        assert movie.n_frames == eight_gaussians.MOMENTS + 1
    with Image.open(tmp_path / "run" / "picture.png") as picture:
        colours = {colour for _, colour in picture.getcolors(2**24)}
    for method in eight_gaussians.METHODS.values():
        assert ImageColor.getrgb(method.colour) in colours
    with pytest.raises(SystemExit):
        eight_gaussians.main(flags)
    line = capsys.readouterr().err
    assert "run holds results: --overwrite them" in line and line.count("\n") == 1
    eight_gaussians.main([*flags, "--overwrite", "--only", "gan"])
    assert len((tmp_path / "run" / "table.csv").read_text().splitlines()) == 3
