"""Each trick of tricks.py against a closed form, in the run it is part of, and on one picture."""

from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
from helpers import SCRIPTS, open_script, picture, picture_folder
from PIL import Image
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import tricks

REAL, FAKE = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([-0.3, 1.2, -2.0])
SMALL = "--image-size 16 --width 8 --batch-size 4 --z-dim 6 --log-every 1 --save-every 5 --device cpu"
BAD = ("--smooth 1", "--noise -1", "--r1 nan", "--ema 1", "--r1 1 --minibatch-kernels 3")
BAD += ("--feature-matching --minibatch-kernels 3",)
ONE = "smooth 0.1,flip 0.05,noise 0.2,replay 16,feature-matching,minibatch-kernels 4,r1 0.1,ema 0.9,diffaug"
ALL = "--smooth 0.1 --flip 0.1 --replay 9 --feature-matching --r1 1 --ema 0.9 --diffaug"


def train(tmp_path, script, folder, flags):
    """Runs a script on two pictures; returns its checkpoint."""
    data, run = picture_folder(tmp_path / "pictures", (0, 1)), tmp_path / folder
    argv = f"--dataset {data} --data-dir {tmp_path}/data --out-dir {run} {SMALL} {flags}"
    SCRIPTS[script].main(argv.split())
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def losses(saved):
    return [row.split(",")[2:] for row in saved["log"].splitlines()]


def test_without_flags_it_is_dcgan(tmp_path):
    ours, theirs = (train(tmp_path, name, name, "--steps 6") for name in ("tricks", "dcgan"))
    assert losses(ours) == losses(theirs) and same(ours["state"]["G"], theirs["state"]["G"])
    grids = [(tmp_path / name / "samples" / "000006.png").read_bytes() for name in ("tricks", "dcgan")]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("flags", [ALL, "--minibatch-kernels 3 --replay 9"])
def test_resume_is_bit_for_bit(flags, tmp_path):
    """The pool and the average go on."""
    whole = train(tmp_path, "tricks", "whole", f"{flags} --steps 10")
    train(tmp_path, "tricks", "parts", f"{flags} --steps 5")
    parts = train(tmp_path, "tricks", "parts", f"{flags} --steps 10 --resume")
    assert losses(parts) == losses(whole) and torch.equal(parts["state"]["pool"], whole["state"]["pool"])
    assert all(same(parts["state"][part], whole["state"][part]) for part in ("G", "D", "average"))


def test_smoothing_is_of_real_targets_alone():
    expected = bce(REAL, torch.full((3,), 0.9)) + bce(FAKE, torch.zeros(3))
    assert tricks.d_loss(REAL, FAKE, smooth=0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_flipped_labels():
    torch.manual_seed(0)
    ones, zeros = torch.ones(10_000), torch.zeros(10_000)
    assert tricks.flipped(ones, 0.0) is ones
    for y, share in ((tricks.flipped(ones, 0.3), 0.7), (tricks.flipped(zeros, 0.3), 0.3)):
        assert y.unique().tolist() == [0, 1] and y.mean().item() == pytest.approx(share, abs=0.03)
    d, one, zero = torch.full((20_000,), 2.0), torch.ones(20_000), torch.zeros(20_000)
    expected = 0.75 * (bce(d, one) + bce(-2 * d, zero)) + 0.25 * (bce(d, zero) + bce(-2 * d, one))
    assert tricks.d_loss(d, -2 * d, flip=0.25).item() == pytest.approx(expected.item(), rel=0.05)


def seen_by_D(tmp_path, monkeypatch, flags, steps):
    """What D got in a run, three batches in each step, and what G made, two in each."""
    seen, made = [], []
    for module in (tricks.Discriminator, tricks.Generator):

        def watched(self, x, forward=module.forward):
            y = forward(self, x)
            if self.training:
                (seen if isinstance(self, tricks.Discriminator) else made).append((x, y))
            return y

        monkeypatch.setattr(module, "forward", watched)
    train(tmp_path, "tricks", "seen", f"--batch-size 32 --steps {steps} {flags}")
    return [x.detach() for x, _ in seen], [y.detach() for _, y in made]


def test_noise_fades_to_0_on_all_that_D_sees(tmp_path, monkeypatch):
    seen, made = seen_by_D(tmp_path, monkeypatch, "--noise 0.5", steps=4)
    real = torch.tensor(np.stack([picture(k).transpose(2, 0, 1) for k in (0, 1)]) / 127.5 - 1).float()
    for k in range(4):
        x_real = real[torch.cdist(seen[3 * k].flatten(1), real.flatten(1)).argmin(1)]
        clean = [x_real, made[2 * k], made[2 * k + 1]]
        for x, without in zip(seen[3 * k : 3 * k + 3], clean, strict=True):
            assert (x - without).std().item() == pytest.approx(0.5 * (1 - (k + 1) / 4), rel=0.05, abs=1e-6)


def test_the_pool_keeps_the_newest_at_random_places():
    torch.manual_seed(0)
    pool = torch.arange(6.0)[:, None, None, None].clone()
    fakes = torch.arange(10.0, 14)[:, None, None, None]
    mixed = tricks.replayed(pool, fakes).flatten().tolist()
    assert mixed[2:] == [12, 13] and len(set(mixed[:2])) == 2 and set(mixed[:2]) < set(range(6))
    assert len(set(pool.flatten().tolist()) & set(range(6))) == 4 and {12, 13} < set(pool.flatten().tolist())
    places = set()
    for k in range(100):
        tricks.replayed(pool, fakes + 100 * k)
        places |= set((pool.flatten() == 12 + 100 * k).nonzero().flatten().tolist())
    assert places == set(range(6))


def test_half_of_Ds_fakes_come_from_the_pool(tmp_path, monkeypatch):
    seen, made = seen_by_D(tmp_path, monkeypatch, "--replay 40", steps=1)
    assert torch.equal(seen[1][16:], made[0][16:]) and torch.equal(seen[2], made[1])
    assert not any(torch.equal(a, b) for a in seen[1][:16] for b in made[0])


def test_feature_matching(tmp_path, monkeypatch):
    """0 for equal batches; (mean - mean)^2 for an activation that is the image; a gradient for G alone."""
    D = tricks.Discriminator(8, 3, 16, kernels=0, norm=True)
    x, fake = torch.randn(2, 6, 3, 16, 16)
    assert tricks.feature_distance(D, x, x).item() == 0
    x.requires_grad_(), fake.requires_grad_(), D.requires_grad_(False)
    tricks.feature_distance(D, x, fake).backward()
    assert fake.grad.abs().max() > 0 and x.grad is None
    D.net = nn.Sequential(nn.LeakyReLU(1.0), nn.Identity())
    expected = (x.mean(0) - fake.mean(0)).square().sum()
    assert tricks.feature_distance(D, x, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    monkeypatch.setattr(tricks, "feature_distance", lambda D, real, fake: fake.mean() * 0 + len(real))
    assert open_script("tricks", tmp_path, "--feature-matching").step()[1].item() == 4, "instead of g_loss"


def test_minibatch_discrimination():
    """exp(-distance) to each other image, summed: it sees the rest of its own batch, and nothing else."""
    layer = tricks.MinibatchDiscrimination(16, 1)
    with torch.no_grad():
        layer.linear.weight.zero_()[:, 0] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])  # both read feature 0
    h = torch.zeros(3, 1, 4, 4)
    h[:, 0, 0, 0] = torch.tensor([0.0, 1.0, 3.0])
    out = layer(h)
    assert out.shape == (3, 2, 4, 4) and torch.equal(out[:, :1], h)
    e = [float(np.exp(-2 * d)) for d in (1, 3, 2)]
    assert out[:, 1].std((1, 2)).max() == 0
    assert out[:, 1, 0, 0].tolist() == pytest.approx([e[0] + e[1], e[0] + e[2], e[1] + e[2]], rel=1e-5)


def test_r1(tmp_path, monkeypatch):
    """E||grad D||^2 = ||w||^2 for D(x) = wx; gamma / 2 of it in loss_D, at real images; no batch norm, He."""
    w = torch.randn(3 * 16 * 16, requires_grad=True)
    penalty = tricks.r1_penalty(lambda x: x.flatten(1) @ w, torch.randn(5, 3, 16, 16))
    assert penalty.item() == pytest.approx(w.detach().square().sum().item(), rel=1e-4)
    penalty.backward()
    assert torch.allclose(w.grad, 2 * w.detach(), rtol=1e-4)
    run, at = open_script("tricks", tmp_path, "--r1", 3, "--diffaug"), []
    assert not any(isinstance(m, nn.BatchNorm2d) for m in run.D.modules())
    assert run.D.net[2].weight.std().item() == pytest.approx((2 / 1.04 / (8 * 16)) ** 0.5, rel=0.1)  # He's
    d_loss = tricks.d_loss
    monkeypatch.setattr(tricks, "r1_penalty", lambda D, x: at.append(x) or torch.tensor(5.0))
    monkeypatch.setattr(tricks, "d_loss", lambda *a: d_loss(*a) * 0)
    expected = next(common.batches(run.args, run.data))[0]
    assert run.step()[0].item() == 7.5 and torch.equal(at[0], expected)


def test_the_average(tmp_path):
    """At beta 0 it is G, statistics and all; it starts there and is what pictures are drawn with."""
    G, average = (tricks.Generator(6, 8, 3, 16) for _ in range(2))
    G(torch.randn(4, 6))
    before = {k: v.clone() for k, v in average.state_dict().items()}
    tricks.move_average(average, G, 0.75)
    for k, v in average.state_dict().items():
        if v.is_floating_point():
            assert torch.allclose(v, 0.75 * before[k] + 0.25 * G.state_dict()[k], atol=1e-6)
    tricks.move_average(average, G, 0.0)
    assert same(average.state_dict(), G.state_dict())
    saved = train(tmp_path, "tricks", "one", "--steps 1 --ema 0.999")["state"]
    assert same(saved["average"], saved["G"]), "short runs are not held at their start"
    saved = train(tmp_path, "tricks", "run", "--steps 9 --ema 0.999")["state"]
    average.load_state_dict(saved["average"])
    assert not same(saved["average"], saved["G"])
    with torch.no_grad():
        x = average.eval()(saved["fixed_z"])
    common.save_grid(SimpleNamespace(out_dir=tmp_path / "x", run=SimpleNamespace(board=None)), 9, x)
    grids = [np.asarray(Image.open(tmp_path / f / "samples" / "000009.png"), int) for f in ("run", "x")]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_diffaug(tmp_path, monkeypatch):
    """A colour, a shift of up to an eighth and a hole for each image, and a gradient; of real images too."""
    torch.manual_seed(0)
    x = torch.randn(200, 3, 16, 16).requires_grad_()
    y = tricks.diffaug(x)
    dark = (y == 0).all(1)
    assert y.shape == x.shape and len({tuple(d.flatten().tolist()) for d in dark}) > 150
    assert (dark.sum((1, 2)) >= 16).all() and dark.float().mean() < 0.45
    edges = dark.all(2).sum(1)  # whole rows: shifted out, but for where the hole completes them
    assert edges.max() <= 16 // 8 and edges.max() > 0
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert (grad != 0).any((1, 2, 3)).all()
    means = y.sum((1, 2, 3)) / (~dark).sum((1, 2)) / 3 - x.mean((1, 2, 3))
    assert means.min() < -0.3 and means.max() > 0.3, "brighter and darker by up to a half"
    seen, _ = seen_by_D(tmp_path, monkeypatch, "--diffaug", steps=1)
    assert all((image == 0).all(1).any((1, 2)).all() for image in seen), "the real ones too"
    monkeypatch.setattr(torch, "randint", lambda *a, device: torch.full(a[-1], a[-2] - 1))
    dark = (tricks.diffaug(x) == 0).all(1)  # the last places: shifted by 2, a hole around the corner
    assert dark[:, 12:, 12:].all() and dark[:, 14:].all() and not dark[:, :12, :12].any()


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        tricks.parse_args(f"--dataset digits {flags}".split())
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("trick", ONE.split(","))
def test_learns_one_picture(trick, tmp_path):
    data, run = picture_folder(tmp_path / "pictures"), f"--out-dir {tmp_path}/run --device cpu"
    quick = "--image-size 16 --batch-size 8 --width 16 --lr 1e-3 --steps 110 --save-every 1000"
    tricks.main(f"--dataset {data} --data-dir {tmp_path}/data {quick} --{trick} {run}".split())
    tricks.main(f"--generate 4 {run}".split())
    for file in (tmp_path / "run" / "generated").iterdir():
        distance = [np.abs(np.asarray(Image.open(file), float) - picture(k)).mean() for k in (0, 1)]
        assert distance[0] < 45 and distance[0] < distance[1], f"{file}: {distance}"
