"""What one update does to both networks, what a script's loop does, and that every variant
learns."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LARGE,
    NAMES,
    SCRIPTS,
    WITHOUT_N_CRITIC,
    changed,
    checkpoint,
    first_image,
    log_rows,
    open_script,
    picture,
    picture_folder,
    recorded,
    same,
    snapshot,
    train,
)
from PIL import Image
from torch.nn.functional import interpolate

import common
import runs

ALL = [name for name in SCRIPTS if name != "tricks"]


def open_update(name, *flags, n_critic):
    """An opened script, its update as a function without arguments, and the number of updates of D
    in it."""
    if name not in WITHOUT_N_CRITIC:
        flags = (*flags, "--n-critic", n_critic)
    run = open_script(name, *flags)
    if name in ("progan", "stylegan"):
        return run, lambda: run.update(2, 0.5), n_critic  # in the fade to 16x16
    if name == "r3gan":
        return run, lambda: run.update(0.05), 1
    return run, run.update, 1 if name in WITHOUT_N_CRITIC else n_critic


def networks_of(run):
    """The networks of an opened script that have an optimiser, by name."""
    return {n: getattr(run, n) for n in run.state if f"opt_{n}" in run.state}


def watch_optimisers(run):
    """What each step of an optimiser moves: its network's name, the parameters that have changed
    by network, and the largest one of D before and after it."""
    networks, events, before = networks_of(run), [], {}

    def largest():
        if "D" in networks:
            return max(p.abs().max().item() for p in run.D.parameters())

    for which in networks:

        def remember(*_):
            before.update({n: snapshot(network) for n, network in networks.items()})
            before["largest"] = largest()

        def compare(*_, which=which):
            moved = {n: changed(network, before[n]) for n, network in networks.items()}
            events.append((which, moved, before["largest"], largest()))

        optimiser = run.state[f"opt_{which}"]
        optimiser.register_step_pre_hook(remember)
        optimiser.register_step_post_hook(compare)
    return events


@pytest.mark.parametrize("name", ALL)
def test_updates_are_isolated_and_in_order(name):
    """n_critic updates of D that leave every parameter of G as it was, bit for bit, then one of
    G that leaves D as it was; each moves the network that is its own."""
    run, update, n = open_update(name, "--lr", 1e-2, n_critic=3)
    networks, events = networks_of(run), watch_optimisers(run)
    before = {which: snapshot(network) for which, network in networks.items()}
    for network in networks.values():
        network.register_forward_pre_hook(lambda network, _: modes.append(network.training))
    modes = []
    update()
    assert all(modes), "D's fakes come from a G in training mode, and D's norms are, too"
    expected = ["D1", "G1", "D0", "G0"] if name == "stacked_gan" else n * ["D"] + ["G"]
    assert [which for which, *_ in events] == expected
    for which, moved, *_ in events:
        assert moved.pop(which) and not any(moved.values())
        if which[0] == "D":
            fixed = networks[which].parameters()
            assert not any(p.requires_grad for p in fixed), "G's update needs no gradient of D"
    # The last bias cancels in E[D(G(z))] - E[D(x)]; at 16x16, networks that grow do not use the
    # layers between 4x4 and colours.
    unused = ("from_rgb.0.", "to_rgb.0.") if name in ("progan", "stylegan") else ()
    # In r3gan, most weights wait for those behind them, which begin as 0.
    for _ in range(3):
        update()
    for which, network in networks.items():
        learning = {k for k in before[which] if not k.startswith(unused)}
        if which == "D":
            learning -= {k for k in learning if k.endswith("bias") and before["D"][k].numel() == 1}
        assert changed(network, before[which]) >= learning, f"every parameter of {which} learns"


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_leaks_between_updates(name):
    """The gradient that an optimiser steps on is that of its own loss: zeroed before, not added
    to."""
    (run, update, n), largest = open_update(name, n_critic=2), []
    optimisers = [run.state[f"opt_{which}"] for which in networks_of(run)]
    for optimiser in optimisers:
        params = optimiser.param_groups[0]["params"]
        for p in params:
            p.grad = torch.full_like(p, 1e9)
        optimiser.register_step_pre_hook(
            lambda *_, params=params: largest.append(
                max(p.grad.abs().max().item() for p in params if p.grad is not None)
            )
        )
    update()
    assert len(largest) == n + len(optimisers) - 1 and max(largest) < 1e8


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_and_every_noise_is_used_once(name, monkeypatch):
    """A new minibatch for each update of D, real and fake in separate passes; new noise for each
    update, G's included; and in cgan D sees with a fake the label that G was given."""
    run = open_script(name, "--n-critic", 3)
    noise, labels_G, seen, labels_D, fakes, has_graph = [], [], [], [], [], []

    def watch(module, inputs, output):
        if module is run.G:
            noise.append(inputs[0])
            labels_G.append(inputs[1:])
            fakes.append(output.detach())
            has_graph.append(output.requires_grad)
        else:
            seen.append(inputs[0].detach())
            labels_D.append(inputs[1:])

    run.G.register_forward_hook(watch)
    run.D.register_forward_hook(watch)
    if name == "wgan_gp":
        monkeypatch.setattr(SCRIPTS[name], "gradient_penalty", lambda *_: 0.0)
    real = recorded(monkeypatch, "sample_batch")
    run.update()
    assert len(real) == 3 and len(noise) == 4 and len(seen) == 7
    assert has_graph == [False, False, False, True], "D's fakes are data, G's are not"
    assert len({tuple(z.flatten().tolist()) for z in noise}) == 4, "noise was used twice"
    assert all(z.shape == (4, 6) for z in noise)
    assert all(z.min() < 0 and z.max() > 1 for z in noise), "z is N(0, I), not uniform"
    for k, (x_real, _) in enumerate(real):
        assert torch.equal(seen[2 * k], x_real) and torch.equal(seen[2 * k + 1], fakes[k])
    assert torch.equal(seen[-1], fakes[-1])
    if name == "cgan":
        for k, (_, y) in enumerate(real):
            assert torch.equal(labels_G[k][0], y)
            assert torch.equal(labels_D[2 * k][0], y) and torch.equal(labels_D[2 * k + 1][0], y)
        assert torch.equal(labels_G[-1][0], labels_D[-1][0])


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_last_updates(name):
    """loss_D, loss_G and mean scores, as the script's own losses give them."""
    run = open_script(name, "--n-critic", 2)
    module, scores = SCRIPTS[name], []
    run.D.register_forward_hook(lambda m, i, o: scores.append(o.detach()))
    values = {k: v.item() for k, v in run.update().items()}
    assert list(values) == ["loss_D", "loss_G", "d_real", "d_fake"]
    real, fake = scores[3:5] if name == "wgan_gp" else scores[2:4]
    assert values["d_real"] == pytest.approx(real.mean().item(), abs=1e-6)
    assert values["d_fake"] == pytest.approx(fake.mean().item(), abs=1e-6)
    loss_G = module.g_loss(scores[-1]).item()
    assert values["loss_G"] == pytest.approx(loss_G, rel=1e-5, abs=1e-6)
    loss_D = module.d_loss(real, fake).item()
    if name == "wgan_gp":
        assert values["loss_D"] > loss_D
    else:
        assert values["loss_D"] == pytest.approx(loss_D, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["dcgan", "tricks"])
def test_the_loop(name, monkeypatch):
    """What main does in which order: n_critic minibatches and updates of D, one of G in training
    mode, a row and then a grid and a checkpoint where they are due, and nothing twice. The loops of
    the seven have the same text (test_siblings.py)."""
    events, real = [], recorded(monkeypatch, "sample_batch")

    def start_run(args, data, state, start_run=runs.start_run):
        G = state["G"]
        state["opt_D"].register_step_post_hook(lambda *_: events.append(f"D on batch {len(real)}"))
        state["opt_G"].register_step_post_hook(lambda *_: events.append(f"G {G.training}"))
        return start_run(args, data, state)

    def noted(module, name):
        function = getattr(module, name)

        def call(args, *rest):
            step = next(value for value in rest if isinstance(value, int))
            events.append(f"{name} {step}")
            return function(args, *rest)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(runs, "start_run", start_run)
    noted(runs, "log")
    noted(common, "save_grid")
    noted(runs, "save_checkpoint")
    flags = ["--n-critic", 2, "--steps", 7, "--log-every", 2, "--save-every", 3]
    train(name, "run", *flags)

    expected = ["save_grid 0"]
    for step in range(1, 8):
        expected += [f"D on batch {2 * step - 1}", f"D on batch {2 * step}", "G True"]
        if step in (2, 4, 6):
            expected.append(f"log {step}")
        if step in (3, 6, 7):
            expected += [f"save_grid {step}", f"save_checkpoint {step}"]
    assert events == expected
    assert len({tuple(x.flatten().tolist()) for x, _ in real}) > 7, "another minibatch each time"
    assert [row["step"] for row in log_rows("run")] == [2, 4, 6]

    # The files of a run. The second column of its log is the time in Unix seconds.
    assert {p.name for p in Path("run").iterdir()} == {
        "samples",
        "log.csv",
        "checkpoint.pt",
        "args.json",
    }
    header, first, *_ = Path("run", "log.csv").read_text().splitlines()
    assert header == "step,time,loss_D,loss_G,d_real,d_fake"
    assert abs(float(first.split(",")[1]) - time.time()) < 600


@pytest.mark.parametrize("name", ["gan", "dcgan", "cgan"])
def test_grids_show_the_same_z(name, monkeypatch):
    """Every grid is what the G of its step makes of the z that was drawn before the first step, in
    evaluation mode; cgan: one class per column. Other scripts have dcgan.py's text
    (test_siblings.py)."""
    grids, save_grid = [], common.save_grid
    monkeypatch.setattr(
        common, "save_grid", lambda *a: grids.append((a[1], a[2].clone(), a[3:])) or save_grid(*a)
    )
    train(name, "run", "--steps", 10, "--lr", 0.01)
    assert [step for step, *_ in grids] == [0, 5, 10]
    new = open_script(name, run="new", dataset=Path("pictures"))
    run = open_script(
        name, "--resume", "--steps", 11, "--lr", 0.01, run="run", dataset=Path("pictures")
    )
    assert torch.equal(new.fixed_z, run.fixed_z)
    y = [torch.arange(2).repeat(8)] if name == "cgan" else []
    with torch.no_grad():
        x = run.G.eval()(run.fixed_z, *y)
    assert torch.allclose(grids[2][1], x, atol=1e-6)
    assert grids[2][2] == ((2,) if name == "cgan" else ())


def test_wgan_clips_every_parameter_after_every_update():
    run = open_script("wgan", "--n-critic", 2, "--lr", 0.1, "--clip", 0.03)
    events = watch_optimisers(run)
    for _ in range(3):
        run.update()
        assert max(p.abs().max().item() for p in run.D.parameters()) <= 0.03 + 1e-9
    assert all(largest <= 0.03 + 1e-9 for which, _, largest, _ in events if which == "G")
    steps_of_D = [(before, after) for which, _, before, after in events if which == "D"]
    assert all(after > 0.03 for _, after in steps_of_D), "it steps first"
    assert all(before <= 0.03 + 1e-9 for before, _ in steps_of_D[1:]), "each is followed by a clip"


@pytest.mark.parametrize(
    "name, flags",
    [
        ("wgan_gp", "--n-critic 1 --gp-weight"),
        ("tricks", "--r1"),
        ("progan", "--stage-steps 0 --gp-weight"),
        ("stylegan", "--stage-steps 0 --r1"),
        ("r3gan", "--lr 0.01 --gamma-end 0 --gamma"),
    ],
)
def test_the_penalty_trains_D(name, flags):
    """Two updates with it lead to another D than two without it."""
    trained = []
    for run, weight in (("with", 10), ("without", 1e-9)):
        train(name, run, "--steps", 2, *flags.split(), weight)
        trained.append(checkpoint(run)["state"]["D"])
    assert not same(*trained)


def test_wgan_gp_weighs_the_penalty(monkeypatch):
    """loss_D = d_loss + gp_weight * gradient_penalty, with the penalty of this update's images."""
    run, module = open_script("wgan_gp", "--gp-weight", 7), SCRIPTS["wgan_gp"]
    made, given, real = [], [], recorded(monkeypatch, "sample_batch")
    run.G.register_forward_hook(lambda module, z, x: made.append(x))
    monkeypatch.setattr(
        module, "gradient_penalty", lambda D, *x: given.append(x) or D(x[0])[0] * 0 + 2
    )
    monkeypatch.setattr(module, "d_loss", lambda d_real, d_fake: d_real.mean() * 0 + 3)
    assert run.update()["loss_D"].item() == 3 + 7 * 2
    for (x_real, _), x_fake, (x, fake) in zip(real, made[:5], given, strict=True):
        assert torch.equal(x, x_real) and torch.equal(fake, x_fake)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("stylegan2", "r3gan")])
def test_optimisers_are_those_of_the_flags(name):
    """stylegan2.py and r3gan.py change the flags' values, and have tests of their own."""
    betas = [] if name == "wgan" else ["--beta1", 0.25, "--beta2", 0.75]
    run = open_script(name, "--lr", 0.125, *betas)
    for which, network in networks_of(run).items():
        optimiser = run.state[f"opt_{which}"]
        (group,) = optimiser.param_groups
        assert float(group["lr"]) == 0.125
        if name == "wgan":
            assert isinstance(optimiser, torch.optim.RMSprop)
            assert (group["momentum"], group["alpha"]) == (0, 0.99)
        else:
            assert group["betas"] == (0.25, 0.75) and isinstance(optimiser, torch.optim.Adam)
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}


PUBLISHED = {  # lr, beta1, beta2, n_critic, batch_size, variant flags
    "gan": (1e-3, 0.5, 0.999, 1, 100, {"saturating": False}),  # the authors: SGD
    "dcgan": (2e-4, 0.5, 0.999, 1, 128, {}),
    "cgan": (2e-4, 0.5, 0.999, 1, 128, {}),
    "lsgan": (2e-4, 0.5, 0.999, 1, 64, {"a": 0, "b": 1, "c": 1}),
    "wgan": (5e-5, 0.0, None, 5, 64, {"clip": 0.01}),
    "wgan_gp": (1e-4, 0.5, 0.9, 5, 64, {"gp_weight": 10}),
    "sngan": (2e-4, 0.5, 0.999, 1, 64, {}),
    "ssgan": (3e-3, 0.5, 0.999, 1, 100, {"labels": 100, "unlabelled_weight": 1}),
    "ebgan": (1e-3, 0.5, 0.999, 1, 64, {"margin": 10, "pt_weight": 0.1}),
    "began": (1e-4, 0.9, 0.999, 1, 16, {"gamma": 0.5, "lambda_k": 0.001}),
    "progan": (1e-3, 0.0, 0.99, 1, 16, {"gp_weight": 10, "gamma": 750}),
    "stylegan2": (2.5e-3, 0.0, 0.99, 1, 64, {"r1": 0.01}),
    "stylegan": (1e-3, 0.0, 0.99, 1, 64, {"r1": 10, "z_dim": 512, "width": 512}),
    "r3gan": (2e-4, 0.0, 0.9, 1, 64, {"lr_end": 5e-5, "beta2_end": 0.99, "gamma": 0.05}),
    "stacked_gan": (1e-4, 0.5, 0.999, 1, 100, {"entropy_weight": 10, "n_gen": 1, "z_dim": 50}),
}


@pytest.mark.parametrize("name", ALL)
def test_defaults_are_the_papers(name):
    args = SCRIPTS[name].parse_args(["--dataset", "digits"])
    lr, beta1, beta2, n_critic, batch_size, variant = PUBLISHED[name]
    betas = (getattr(args, "beta1", 0.0), getattr(args, "beta2", None))
    assert (args.lr, *betas) == (lr, beta1, beta2)
    assert (getattr(args, "n_critic", 1), args.batch_size) == (n_critic, batch_size)
    assert all(getattr(args, flag) == value for flag, value in variant.items())


# Scripts, and flags under which they learn one picture quickly: few steps at a high rate.
QUICK = [
    "gan --steps 250 --width 100",
    "dcgan --steps 150 --width 12",
    "cgan --steps 220 --width 12",
    "lsgan --steps 210 --width 12",
    "wgan --steps 120 --width 12 --n-critic 2",
    "wgan_gp --steps 100 --width 12 --n-critic 2",
    "sngan --steps 120 --width 6",
    "tricks --steps 130 --width 16 --lr 1e-3 --feature-matching",
    "tricks --steps 130 --width 16 --lr 1e-3 --diffaug color translation cutout",
    "ebgan --steps 240 --width 8 --batch-size 4 --z-dim 6 --lr 3e-3",
    "began --steps 160 --width 8 --batch-size 4 --z-dim 6 --lr 3e-3",
    "progan --steps 140 --width 8 --batch-size 4 --z-dim 6 --lr 6e-3 --stage-steps 20 --gamma 1",
    "stylegan --steps 120 --width 8 --batch-size 4 --z-dim 6 --lr 1e-2 --stage-steps 10 --r1 0.1",
    "stylegan2 --steps 120 --width-at-64 2 --batch-size 4 --z-dim 16 --lr 1e-2",
    "r3gan --steps 100 --width 8 --batch-size 4 --z-dim 6 --lr 4e-3 --lr-end 2e-3",
]


@pytest.mark.parametrize("command", QUICK)
def test_learns_one_picture(command, monkeypatch):
    """On a dataset of one picture G must come to draw it; cgan: of two, each for its own label.
    No sign error survives this: an adversary that plays for the wrong side drives G away from
    the picture."""
    name, *flags = command.split()
    if name in LARGE:
        # Its average takes longer than this: here it is G.
        module, move_average = SCRIPTS[name], SCRIPTS[name].move_average
        monkeypatch.setattr(
            module, "move_average", lambda average, G, _: move_average(average, G, 0)
        )
    kinds = (0, 1) if name == "cgan" else (0,)
    data = picture_folder(Path("pictures"), kinds, classes=len(kinds) > 1)
    run = ["--out-dir", "run", "--device", "cpu"]
    shared = f"--dataset {data} --image-size 16 --batch-size 8 --lr 2e-3 --save-every 1000".split()
    SCRIPTS[name].main([*shared, *flags, *run])
    SCRIPTS[name].main(["--generate", "8", *run])
    files = sorted(Path("run", "generated").iterdir())
    assert len(files) == 8
    distances = {kind: [] for kind in kinds}
    for file in files:
        kind = int(file.stem.endswith("class1"))
        image = np.asarray(Image.open(file), float)
        own, other = (np.abs(image - picture(k)).mean() for k in (kind, 1 - kind))
        assert own < other, f"{file}: {own}, {other}"
        distances[kind].append(own)
    # Their mean, because a single image may be far off on one kind of CPU and near on another. The
    # nearest image of a single colour has a distance of 39.3.
    for kind in kinds:
        assert np.mean(distances[kind]) < 39, distances


@pytest.mark.parametrize(
    "name, flags, stage",
    [
        ("tricks", "--ema 0.9", []),
        ("progan", "--stage-steps 4", [1, 0.25]),
        ("stylegan", "--stage-steps 4", [2, 0.25]),
        ("stylegan2", "", []),
        ("r3gan", "", []),
    ],
)
def test_the_average_of_G_draws_the_grids(name, flags, stage, monkeypatch):
    """Enlarged, where networks grow. Here it moves half of the way to G in each step."""
    module, move = SCRIPTS[name], SCRIPTS[name].move_average
    monkeypatch.setattr(module, "move_average", lambda average, G, _: move(average, G, 0.5))
    train(name, "run", "--steps", 6, "--lr", 0.02, *flags.split())
    saved, drawn = checkpoint("run")["state"], first_image("run", 6)
    width = 2 if name == "stylegan2" else 8
    for part, close in (("average", True), ("G", False)):
        G = module.Generator(6, width, 3, 16)
        G.load_state_dict(saved[part])
        with torch.no_grad():
            image = interpolate(G.eval()(saved["fixed_z"], *stage), 16)[0].clamp(-1, 1)
        assert ((image - drawn).abs().max() < 0.015) == close, part


@pytest.mark.parametrize("name", ["tricks", "ssgan", *LARGE])
def test_an_average_begins_as_the_network_of_init(name, monkeypatch):
    monkeypatch.setattr(SCRIPTS[name], "move_average", lambda *_: None)
    flags = ["--ema", 0.9] if name == "tricks" else []
    train(name, "first", "--steps", 2, "--lr", 0.02)
    train(name, "second", "--steps", 1, "--init", "first/checkpoint.pt", "--seed", 1, *flags)
    of = "D" if name == "ssgan" else "G"
    assert same(checkpoint("second")["state"]["average"], checkpoint("first")["state"][of])


@pytest.mark.parametrize("name, lowest", [("ssgan", 0), ("began", -1)])
def test_z_is_uniform(name, lowest, monkeypatch):
    """In training, in the grids, and with --generate."""
    seen, module = [], SCRIPTS[name]
    forward = module.Generator.forward
    monkeypatch.setattr(module.Generator, "forward", lambda G, z: seen.append(z) or forward(G, z))
    train(name, "run", "--steps", 5)
    module.main(["--out-dir", "run", "--device", "cpu", "--generate", "200"])
    assert len(seen) > 10
    assert all(lowest <= z.min() < lowest + 0.5 and 0.5 < z.max() < 1 for z in seen)


@pytest.mark.parametrize("name", ["ssgan", "ebgan", "began", *LARGE])
def test_each_update_has_noise_and_images_of_its_own(name, monkeypatch):
    """Counts what is drawn. For the seven, test_every_batch_and_every_noise_is_used_once also looks
    at what it is used for."""
    _, update, n = open_update(name, n_critic=2)
    drawn, real = [], recorded(monkeypatch, "sample_batch")
    for function in (torch.randn, torch.rand):

        def draw(*shape, function=function, **options):
            drawn.append(shape)
            return function(*shape, **options)

        monkeypatch.setattr(torch, function.__name__, draw)
    update()
    for_each = 2 if name == "stylegan" else 1  # whose styles are mixed
    assert drawn.count((4, 6)) == for_each * (n + 1)
    for_G = 1 if name in ("ssgan", "r3gan") else 0
    assert len(real) == n + for_G


def results(name, *flags):
    """Numbers that depend on all that a run computes: the values of two updates."""
    run = open_script(name, "--n-critic", 2, *flags, run=f"run {flags}")
    torch.manual_seed(1)
    return [v.item() for _ in range(2) for v in run.update().values()]


OWN_FLAGS = {"gan": ["--saturating"], "lsgan": ["--a 0.3", "--b 0.7", "--c 0.6"]}


@pytest.mark.parametrize("name", [*NAMES, "ebgan", "began"])
def test_every_flag_changes_something(name):
    """Those whose effect no other test measures."""
    base = results(name)
    for flag in ["--width 12", "--seed 5", *OWN_FLAGS.get(name, [])]:
        assert results(name, *flag.split()) != base, f"{flag} changes nothing"
