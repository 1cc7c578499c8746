"""What one step does to both networks, what a run leaves behind, and that every variant learns."""

import csv
import itertools
import json

import common
import numpy as np
import pytest
import torch
from helpers import DEVICES, NAMES, SCRIPTS, changed, open_script, picture, picture_folder, snapshot
from PIL import Image


def spied(run, monkeypatch):
    """What every optimiser's step moved: (D or G, {network: names of its changed parameters}, max |D's|)."""
    events = []
    for which, optimiser in (("D", run.opt_D), ("G", run.opt_G)):

        def watched(which=which, step=optimiser.step):
            before = {"D": snapshot(run.D), "G": snapshot(run.G)}
            step()
            moved = {n: changed(getattr(run, n), before[n]) for n in "GD"}
            events.append((which, moved, max(p.abs().max().item() for p in run.D.parameters())))

        monkeypatch.setattr(optimiser, "step", watched)
    return events


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_isolated_and_in_order(name, tmp_path, monkeypatch):
    """n_critic updates of D that leave every parameter of G as it was, bit for bit, then one of G that leaves
    D as it was; each moves the network that is its own."""
    run = open_script(name, tmp_path, "--n-critic", 3, "--lr", 1e-2)
    events, before = spied(run, monkeypatch), snapshot(run.D)
    run.step()
    assert [which for which, *_ in events] == ["D", "D", "D", "G"]
    assert not any(p.requires_grad for p in run.D.parameters()), "G's update is to leave D's gradients out"
    for which, moved, _ in events:
        assert moved[which] and not moved["G" if which == "D" else "D"]
    # The last bias cancels in E[D(G(z))] - E[D(x)].
    constant = {k for k in before if k.endswith("bias") and before[k].numel() == 1}
    assert changed(run.D, before) >= set(before) - constant, "every parameter of D learns"
    g_before = snapshot(run.G)
    for _ in range(3):
        run.step()
    assert changed(run.G, g_before) == set(g_before), "every parameter of G learns"


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_leaks_between_updates(name, tmp_path, monkeypatch):
    """The gradient each optimiser steps on is that of its own loss alone: zeroed before, not added to."""
    run, largest = open_script(name, tmp_path, "--n-critic", 2), []
    for optimiser in (run.opt_D, run.opt_G):
        params = optimiser.param_groups[0]["params"]
        for p in params:
            p.grad = torch.full_like(p, 1e6)

        def watched(step=optimiser.step, params=params):
            largest.append(max(p.grad.abs().max().item() for p in params))
            step()

        monkeypatch.setattr(optimiser, "step", watched)
    run.step()
    assert max(largest) < 1e4


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_and_every_noise_is_used_once(name, tmp_path):
    """Real batches in order and each in one piece, apart from the fakes; fresh noise for each update, G's
    included; and, in cgan, D sees with a fake the label that G was given."""
    run = open_script(name, tmp_path, "--n-critic", 3)
    noise, labels_G, seen, labels_D = [], [], [], []

    def watch(module, inputs, output):
        if module is run.G:
            noise.append(inputs[0])
            labels_G.append(inputs[1:])
            fakes.append(output.detach())
            carries_graph.append(output.requires_grad)
        elif not (name == "wgan_gp" and inputs[0].requires_grad and inputs[0].is_leaf):  # the penalty's x_hat
            seen.append(inputs[0].detach())
            labels_D.append(inputs[1:])

    fakes, carries_graph = [], []
    run.G.register_forward_hook(watch)
    run.D.register_forward_hook(watch)
    expected = common.batches(run.args, run.data)
    run.step()
    assert len(noise) == 4 and len(seen) == 7
    assert carries_graph == [False, False, False, True], "D's fakes are data, G's are not"
    assert len({tuple(z.flatten().tolist()) for z in noise}) == 4, "noise was used twice"
    assert all(z.shape == (4, 6) for z in noise)
    assert all(z.min() < 0 and z.max() > 1 for z in noise), "z is N(0, I), not uniform"
    real = [next(expected) for _ in range(3)]
    for k, (x_real, _) in enumerate(real):
        assert any(torch.equal(x, x_real) for x in seen[2 * k : 2 * k + 2])
        assert any(torch.equal(x, fakes[k]) for x in seen[2 * k : 2 * k + 2])
    assert torch.equal(seen[-1], fakes[-1])
    if name == "cgan":
        for k, (_, y) in enumerate(real):
            assert torch.equal(labels_G[k][0], y)
            assert torch.equal(labels_D[2 * k][0], y) and torch.equal(labels_D[2 * k + 1][0], y)
        assert torch.equal(labels_G[-1][0], labels_D[-1][0])


@pytest.mark.parametrize("name", NAMES)
def test_reported_numbers(name, tmp_path):
    """loss_D, loss_G and mean scores of the last D update, as the script's own losses give them."""
    run = open_script(name, tmp_path)
    module, scores = SCRIPTS[name], []
    run.D.register_forward_hook(lambda m, i, o: scores.append(o.detach()))
    n = run.args.n_critic
    loss_D, loss_G, d_real, d_fake = (t.item() for t in run.step())
    per_update = len(scores) // n
    real, fake = scores[(n - 1) * per_update : (n - 1) * per_update + 2]
    assert (d_real, d_fake) == pytest.approx((real.mean().item(), fake.mean().item()), abs=1e-6)
    assert loss_G == pytest.approx(module.g_loss(scores[-1]).item(), rel=1e-5, abs=1e-6)
    if name == "wgan_gp":
        assert loss_D > module.d_loss(real, fake).item()
    else:
        assert loss_D == pytest.approx(module.d_loss(real, fake).item(), rel=1e-5, abs=1e-6)


def test_wgan_clips_every_parameter_after_every_update(tmp_path, monkeypatch):
    run = open_script("wgan", tmp_path, "--n-critic", 2, "--lr", 0.1, "--clip", 0.03)
    events = spied(run, monkeypatch)
    for _ in range(3):
        run.step()
        assert max(p.abs().max().item() for p in run.D.parameters()) <= 0.03 + 1e-9
    assert all(largest <= 0.03 + 1e-9 for which, _, largest in events if which == "G")
    assert all(largest > 0.03 for which, _, largest in events if which == "D"), "the optimiser steps first"
    assert isinstance(run.opt_D, torch.optim.RMSprop) and isinstance(run.opt_G, torch.optim.RMSprop)


def test_wgan_gp_weighs_the_penalty(tmp_path, monkeypatch):
    """loss_D = d_loss + gp_weight * gradient_penalty, with the penalty of this update's images."""
    run, module, made, given = open_script("wgan_gp", tmp_path, "--gp-weight", 7), SCRIPTS["wgan_gp"], [], []
    run.G.register_forward_hook(lambda module, z, x: made.append(x))
    monkeypatch.setattr(module, "gradient_penalty", lambda D, *x: given.append(x) or D(x[0])[0] * 0 + 2)
    monkeypatch.setattr(module, "d_loss", lambda d_real, d_fake: d_real.mean() * 0 + 3)
    expected = [x for x, _ in itertools.islice(common.batches(run.args, run.data), 5)]
    assert run.step()[0].item() == 3 + 7 * 2
    for x_real, x_fake, (x, fake) in zip(expected, made[:5], given, strict=True):
        assert torch.equal(x, x_real) and torch.equal(fake, x_fake)


@pytest.mark.parametrize("name", NAMES)
def test_optimisers_are_those_of_the_flags(name, tmp_path):
    names = ("--momentum", "--alpha") if name == "wgan" else ("--beta1", "--beta2")
    run = open_script(name, tmp_path, "--lr", 0.125, names[0], 0.25, names[1], 0.75)
    for optimiser in (run.opt_G, run.opt_D):
        (group,) = optimiser.param_groups
        assert group["lr"] == 0.125
        if name == "wgan":
            assert (group["momentum"], group["alpha"]) == (0.25, 0.75)
        else:
            assert group["betas"] == (0.25, 0.75) and isinstance(optimiser, torch.optim.Adam)
    owned = {n: {id(p) for g in getattr(run, f"opt_{n}").param_groups for p in g["params"]} for n in "GD"}
    assert all(owned[n] == {id(p) for p in getattr(run, n).parameters()} for n in "GD")


PUBLISHED = {  # lr, beta1, beta2, n_critic, batch_size, variant flags
    "gan": (1e-3, 0.5, 0.999, 1, 100, {"saturating": False}),  # the authors: SGD
    "dcgan": (2e-4, 0.5, 0.999, 1, 128, {}),
    "cgan": (2e-4, 0.5, 0.999, 1, 128, {}),
    "lsgan": (2e-4, 0.5, 0.999, 1, 64, {"a": 0, "b": 1, "c": 1}),
    "wgan": (5e-5, 0.0, 0.99, 5, 64, {"clip": 0.01}),
    "wgan_gp": (1e-4, 0.5, 0.9, 5, 64, {"gp_weight": 10}),
    "sngan": (2e-4, 0.5, 0.999, 1, 64, {}),
}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_papers(name):
    args = SCRIPTS[name].parse_args(["--dataset", "digits"])
    lr, beta1, beta2, n_critic, batch_size, variant = PUBLISHED[name]
    betas = (args.momentum, args.alpha) if name == "wgan" else (args.beta1, args.beta2)
    assert (args.lr, *betas) == (lr, beta1, beta2)
    assert (args.n_critic, args.batch_size) == (n_critic, batch_size)
    assert all(getattr(args, flag) == value for flag, value in variant.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_run(name, device, tmp_path):
    """A few iterations through the command line: finite losses, and the files that are promised."""
    data = picture_folder(tmp_path / "pictures", (0, 1), classes=True)
    out = tmp_path / "run"
    flags = "--image-size 32 --width 8 --batch-size 4 --steps 6 --log-every 2 --save-every 3"
    argv = f"--dataset {data} --data-dir {tmp_path}/data --out-dir {out} --device {device} {flags}"
    SCRIPTS[name].main(argv.split())
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert list(rows[0]) == ["step", "seconds", "loss_D", "loss_G", "d_real", "d_fake"]
    assert [int(r["step"]) for r in rows] == [2, 3, 4, 6]
    assert all(np.isfinite(float(v)) for r in rows for v in r.values())
    assert float(rows[-1]["seconds"]) > 0
    grids = {"000000.png", "000003.png", "000006.png"}
    assert {p.name for p in (out / "samples").iterdir()} == grids
    assert {p.name for p in out.iterdir()} == {*("samples", "log.csv", "checkpoint.pt", "args.json", ".lock")}
    saved = json.loads((out / "args.json").read_text())
    assert (saved["width"], saved["batch_size"], saved["images"]) == (8, 4, 2)
    columns = 2 if name == "cgan" else 8  # of 32 px and a border, enlarged to at least 512
    assert Image.open(out / "samples" / "000006.png").size == (2 * (columns * 34 + 2), 2 * (8 * 34 + 2))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 6


# Flags under which one picture is learnt quickly: few steps at a high rate.
QUICK = {
    "gan": "--steps 400 --width 100",
    "dcgan": "--steps 200 --width 16",
    "cgan": "--steps 300 --width 16",
    "lsgan": "--steps 250 --width 16",
    "wgan": "--steps 150 --width 16 --n-critic 2",
    "wgan_gp": "--steps 130 --width 16 --n-critic 2",
    "sngan": "--steps 160 --width 8",
}


@pytest.mark.parametrize("name", NAMES)
def test_learns_one_picture(name, tmp_path):
    """On a dataset of one picture G must come to draw it; cgan: of two, each for its own label. No sign error
    survives this: an adversary that plays for the wrong side drives G away from the picture."""
    kinds = (0, 1) if name == "cgan" else (0,)
    data = picture_folder(tmp_path / "pictures", kinds, classes=len(kinds) > 1)
    run = f"--out-dir {tmp_path}/run --device cpu"
    flags = f"--image-size 16 --batch-size 8 --lr 1e-3 --log-every 50 --save-every 1000 {QUICK[name]}"
    SCRIPTS[name].main(f"--dataset {data} --data-dir {tmp_path}/data {flags} {run}".split())
    SCRIPTS[name].main(f"--generate 8 {run}".split())
    files = sorted((tmp_path / "run" / "generated").iterdir())
    assert len(files) == 8
    for file in files:
        kind = int(file.stem.endswith("class1"))
        image = np.asarray(Image.open(file), float)
        distance = [np.abs(image - picture(k)).mean() for k in (kind, 1 - kind)]
        assert distance[0] < 45 and distance[0] < distance[1], f"{file}: {distance}"


def test_losses_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    """The message names the step; the last good checkpoint stays."""
    data = picture_folder(tmp_path / "pictures")
    module, calls = SCRIPTS["dcgan"], []
    g_loss = module.g_loss

    def breaks_at_step_7(d_fake):
        calls.append(1)
        return g_loss(d_fake) * (float("nan") if len(calls) >= 7 else 1)

    monkeypatch.setattr(module, "g_loss", breaks_at_step_7)
    argv = f"--dataset {data} --data-dir {tmp_path}/data --out-dir {tmp_path}/run --device cpu"
    argv += " --image-size 16 --width 8 --batch-size 4 --steps 20 --log-every 2 --save-every 5"
    with pytest.raises(SystemExit, match=r"step 8 is not finite .*'loss_G': 'nan'"):
        module.main(argv.split())
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 5
    assert all(t.isfinite().all() for t in saved["state"]["G"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = open_script("dcgan", tmp_path)
    with torch.no_grad():
        next(run.G.parameters())[0] = float("nan")
    before = (tmp_path / "run-dcgan" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match="the weights are not finite at step 9"):
        common.save_checkpoint(run.args, 9, run.state)
    assert (tmp_path / "run-dcgan" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_seed(name, tmp_path):
    """The same seed gives the same networks, fixed_z, noise and batches; another seed gives others."""

    def numbers(seed, folder):
        (tmp_path / folder).mkdir()
        run = open_script(name, tmp_path / folder, "--seed", seed)
        noise = torch.randn(5)  # what the first step would draw
        return [*run.G.parameters(), *run.D.parameters(), run.fixed_z, noise, *next(run.batches)]

    a, again, other = numbers(3, "a"), numbers(3, "again"), numbers(4, "other")
    assert all(torch.equal(x, y) for x, y in zip(a, again, strict=True))
    drawn = [(x, y) for x, y in zip(a, other, strict=True) if len(x) > 1 and x.double().std() > 0]
    assert not any(torch.equal(x, y) for x, y in drawn)


def flag_changes(name, tmp_path, *flags):
    """A few numbers that depend on everything a run computes: the losses of two steps, the data, the grid."""
    run = open_script(name, tmp_path, "--n-critic", 2, *flags)
    torch.manual_seed(1)
    losses = [t.item() for _ in range(2) for t in run.step()]
    return losses, sum(p.numel() for p in run.G.parameters()), [tuple(t.shape) for t in next(run.batches)]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_changes_something(name, tmp_path):
    variant = {"gan": ["--saturating"], "lsgan": ["--a 0.3", "--b 0.7", "--c 0.6"], "wgan": ["--clip 0.5"]}
    variant["wgan_gp"] = ["--gp-weight 3"]
    flags = ["--lr 0.03", "--n-critic 3", "--batch-size 6", "--z-dim 9", "--width 12", "--image-size 32"]
    flags += ["--seed 5", *variant.get(name, ["--beta1 0.3"])]
    flags += ["--momentum 0.3", "--alpha 0.3"] if name == "wgan" else ["--beta1 0.3", "--beta2 0.3"]
    (tmp_path / "base").mkdir()
    base = flag_changes(name, tmp_path / "base")
    for k, flag in enumerate(flags):
        (tmp_path / str(k)).mkdir()
        assert flag_changes(name, tmp_path / str(k), *flag.split()) != base, f"{flag} changes nothing"
