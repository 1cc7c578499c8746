"""Runs that survive: resume, kill -9, init, --overwrite; generated images, grids and logs; devices
and CUDA graphs."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    LARGE,
    NAMES,
    SCRIPTS,
    checkpoint,
    images_in,
    killed_after_save,
    log_rows,
    open_script,
    picture_folder,
    same,
    same_images,
    train,
)

import common
import runs


def assert_same_run(a, b):
    """Weights, optimisers, spectral norm vectors, log rows and grids."""
    assert same(checkpoint(a), checkpoint(b))
    assert log_rows(a) == log_rows(b)
    grids = [{p.name: p.read_bytes() for p in Path(run, "samples").iterdir()} for run in (a, b)]
    assert grids[0] == grids[1]


TRICKS = "--smooth 0.1 --flip 0.1 --noise 0.1 --replay 9 --feature-matching --r1 1 --ema 0.9"
RESUMED = [(name, "--n-critic 2") for name in NAMES]
RESUMED += [
    ("tricks", f"--decay --n-critic 2 {TRICKS} --diffaug color translation cutout"),
    ("tricks", "--minibatch-kernels 3"),
    ("ssgan", ""),
    ("stacked_gan", "--joint-from 8"),
    ("stacked_gan", "--joint-from 4"),
    ("ebgan", ""),
    ("began", "--lambda-k 0.5"),
    ("progan", "--stage-steps 3"),
    ("stylegan", "--stage-steps 3"),
    ("stylegan2", ""),
    ("r3gan", "--lr 0.01"),
]


@pytest.mark.parametrize("name, flags", RESUMED)
def test_resume_is_bit_for_bit(name, flags, monkeypatch, capsys):
    """A run that is stopped after a checkpoint and resumed ends as one that was not stopped.
    Networks that grow are stopped in a fade. No grid is drawn again, and stacked_gan does not train
    E again."""
    monkeypatch.setattr(SCRIPTS["stylegan2"], "R1_EVERY", 4)
    flags = ["--steps", 9, "--save-every", 5, "--log-every", 1, *flags.split()]
    train(name, "whole", *flags)
    with killed_after_save(5):
        train(name, "parts", *flags)
    capsys.readouterr()

    grids, save_grid = [], common.save_grid
    monkeypatch.setattr(common, "save_grid", lambda *a: grids.append(a[1]) or save_grid(*a))
    SCRIPTS[name].main(["--out-dir", "parts", "--resume", "--device", "cpu"])
    assert grids == [9] and "E classifies" not in capsys.readouterr().err
    assert_same_run("whole", "parts")
    averages = name in (*LARGE, "ssgan") or "--ema" in flags
    assert ("average" in checkpoint("parts")["state"]) == averages


def test_resume_needs_no_flags():
    """The run's own are the defaults; where things are and how often it saves are free."""
    train("dcgan", "run", "--steps", 15)
    Path("pictures").rename("moved")
    Path("run").rename("run elsewhere")
    argv = "--dataset moved --data-dir elsewhere --resume --steps 17 --log-every 1 --save-every 2"
    SCRIPTS["dcgan"].main([*argv.split(), "--out-dir", "run elsewhere", "--device", "cpu"])
    assert checkpoint("run elsewhere")["step"] == 17


def test_paths(monkeypatch):
    """~ is the home directory; what a resumed run must find again is absolute; the names of
    datasets stay; and the default folder is named after script and dataset."""
    home = str(Path("home").absolute())
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)
    flags = ["--dataset", "~/pictures", "--data-dir", "data", "--out-dir", "~/run"]
    args = SCRIPTS["dcgan"].parse_args(flags)
    assert args.dataset == str(Path(home, "pictures")) and args.out_dir == str(Path(home, "run"))
    assert args.data_dir == str(Path("data").absolute())
    assert SCRIPTS["dcgan"].parse_args(["--dataset", "cifar10"]).dataset == "cifar10"
    default = SCRIPTS["wgan_gp"].parse_args(flags[:2]).out_dir
    assert default == str(Path("runs", "wgan_gp-pictures"))


def test_a_run_survives_a_new_flag():
    """It has its default in an older run, and a flag that is gone has no effect."""
    train("gan", "run", "--steps", 5)
    saved = checkpoint("run")
    del saved["args"]["saturating"]
    saved["args"]["gone"] = 3
    torch.save(saved, "run/checkpoint.pt")
    train("gan", "run", "--steps", 10, "--resume")
    assert checkpoint("run")["args"]["saturating"] is False
    assert "gone" not in checkpoint("run")["args"]


def test_a_typed_flag_wins_and_is_said(capsys):
    """The run goes on with it, and so does the next resume."""
    train("dcgan", "run", "--steps", 5)
    capsys.readouterr()
    train("dcgan", "run", "--resume", "--steps", 6, "--lr", 1e-5, small=False)
    assert capsys.readouterr().err.startswith(
        "lr was 0.0002, and is 1e-05 now\nsteps was 5, and is 6 now\n"
    )
    SCRIPTS["dcgan"].main(["--out-dir", "run", "--resume", "--device", "cpu", "--steps", "7"])
    saved = checkpoint("run")
    assert saved["args"]["lr"] == 1e-5
    assert saved["state"]["opt_G"]["param_groups"][0]["lr"] == 1e-5
    assert "lr was" not in capsys.readouterr().err


def test_each_step_has_its_own_seed(monkeypatch):
    """A resumed run, and one with more steps, draw what an uninterrupted one draws; another process
    and another seed draw something else."""

    def drawn(steps, done=0, seed=3):
        args = SimpleNamespace(seed=seed, steps=steps, device="cpu", out_dir="run", script="x")
        return {step: torch.randn(3).tolist() for step in runs.steps(args, done)}

    whole = drawn(6)
    assert list(whole) == [1, 2, 3, 4, 5, 6] and len({tuple(z) for z in whole.values()}) == 6
    assert drawn(6, done=4) == {step: whole[step] for step in (5, 6)}
    assert drawn(4) == {step: whole[step] for step in (1, 2, 3, 4)}
    assert drawn(6, seed=4)[1] != whole[1]
    monkeypatch.setattr(common, "rank", lambda: 1)
    assert drawn(6)[1] != whole[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_cuda_optimisers_count_their_steps_on_the_gpu(device):
    Path("run").mkdir()
    optimiser = torch.optim.RMSprop([torch.zeros(1)])
    args = {"device": device, "out_dir": "run", "batch_size": 4}
    args |= dict.fromkeys(["resume", "init", "generate", "overwrite"])
    runs.start_run(SimpleNamespace(**args), common.Data(1, 3, []), {"opt": optimiser})
    assert optimiser.param_groups[0]["capturable"] is (device == "cuda")


def test_resume_from_another_kind_of_device():
    """The optimisers run as they do here."""
    train("dcgan", "run", "--steps", 5)
    saved = checkpoint("run")
    for optimiser in ("opt_G", "opt_D"):
        saved["state"][optimiser]["param_groups"][0]["capturable"] = True
    torch.save(saved, "run/checkpoint.pt")
    train("dcgan", "run", "--steps", 10, "--resume")
    for optimiser in ("opt_G", "opt_D"):
        (group,) = checkpoint("run")["state"][optimiser]["param_groups"]
        assert group["capturable"] is False


def test_resume_drops_the_rows_after_the_checkpoint():
    """And a torn last one. Other lines stay."""
    train("dcgan", "run", "--steps", 10)
    file = Path("run/log.csv")
    file.write_text(file.read_text() + "a note\n11,1.5,9,9,9,9\n12,1.5,9,9,9,9\n1")
    train("dcgan", "run", "--steps", 20, "--resume")
    rows = file.read_text()
    assert rows.count("a note\n") == 1
    file.write_text(rows.replace("a note\n", ""))
    train("dcgan", "whole", "--steps", 20)
    assert_same_run("run", "whole")
    assert [row["step"] for row in log_rows("run")] == [5, 10, 15, 20]


def in_child(function):
    """Runs a function in a forked process, which has torch loaded already; returns the process."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, autograd has threads, which a forked process lacks")
    process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
    process.start()
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process")
def test_kill_9():
    """Killed at any moment, the run goes on from the last complete checkpoint."""
    rng, step = random.Random(0), 1
    every = ["--save-every", 1, "--log-every", 1]
    train("dcgan", "run", "--steps", 1, *every)
    for k in range(6):
        child = in_child(lambda: train("dcgan", "run", "--steps", 10**6, *every, "--resume"))
        # Every other time, wait until it has saved something.
        while k % 2 and child.is_alive() and checkpoint("run")["step"] == step:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        assert child.is_alive()
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        step, last = checkpoint("run")["step"], step
        assert step >= last
        json.loads(Path("run/args.json").read_text())
    train("dcgan", "run", "--steps", step + 1, *every, "--resume")
    train("dcgan", "whole", "--steps", step + 1, *every)
    assert_same_run("run", "whole")


def test_a_write_that_fails_leaves_the_old_file():
    file = Path("file")
    file.write_bytes(b"old")
    with pytest.raises(OSError), runs.atomic_write(file) as f:
        f.write(b"half of the n")
        raise OSError("the disk is full")
    assert file.read_bytes() == b"old"
    with runs.atomic_write(file) as f:
        f.write(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new" and [p.name for p in Path().iterdir()] == ["file"]


def test_a_write_is_on_the_disk_before_it_replaces_the_file(monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: events.append(os.fstat(f).st_size) or fsync(f))
    monkeypatch.setattr(os, "replace", lambda *files: events.append("replace") or replace(*files))
    with runs.atomic_write(Path("file")) as f:
        f.write(b"new")
    assert events == [3, "replace"], "all three bytes"


def test_overwrite_deletes_the_files_of_the_run_and_no_others(monkeypatch):
    """Also those of a run that ended before its first checkpoint, or while it wrote a file."""
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, "save_checkpoint", mock.Mock(side_effect=KeyboardInterrupt))
        train("dcgan", "run", "--steps", 20, "--log-every", 2)
    assert len(log_rows("run")) == 2 and len(list(Path("run/samples").iterdir())) == 2
    others = ["notes.txt", "samples/cat.png", "samples/1.png", "generated/000000.png"]
    others += ["checkpoint.pt.best", "log.csv.bak", "weights.pt"]
    for name in others:
        Path("run", name).parent.mkdir(exist_ok=True)
        Path("run", name).write_text("mine")
    left = ["events.out.tfevents.1", "checkpoint.pt.tmp", "log.csv.tmp", "args.json.tmp"]
    for name in left:
        Path("run", name).touch()
    train("dcgan", "run", "--steps", 20, "--save-every", 10, "--overwrite")
    assert not any(Path("run", name).exists() for name in left)
    for name in others:
        assert Path("run", name).read_text() == "mine"
        Path("run", name).unlink()
    train("dcgan", "whole", "--steps", 20, "--save-every", 10)
    assert_same_run("run", "whole")


def test_kept_checkpoints_are_runs_of_their_own():
    """That of step 20 draws images, and trained on to step 40 ends as the run that it is from."""
    train("dcgan", "run", "--steps", 40, "--save-every", 20, "--keep-checkpoints")
    assert checkpoint("run/step-000020")["step"] == 20
    assert same(checkpoint("run/step-000040"), checkpoint("run"))
    assert len(generate("dcgan", 2, run="run/step-000020")) == 2
    SCRIPTS["dcgan"].main(["--out-dir", "run/step-000020", "--resume", "--device", "cpu"])
    assert same(checkpoint("run/step-000020"), checkpoint("run"))
    train("dcgan", "run", "--steps", 10, "--overwrite")
    assert Path("run/step-000040/checkpoint.pt").exists()


def test_the_last_line_names_the_last_grid_and_the_way_on(capsys):
    """The command can be pasted."""
    train("dcgan", "my run", "--steps", 7)
    command = "python dcgan.py --out-dir 'my run' --resume --steps 14"
    line = f"done: {Path('my run', 'samples', '000007.png')}. To train on: {command}"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_init_begins_a_new_run_with_the_networks_of_another():
    train("dcgan", "run", "--steps", 5)
    saved = checkpoint("run")["state"]
    picture_folder(Path("others"), (1,))
    init = ["--init", "run/checkpoint.pt"]
    new = open_script("dcgan", *init, "--lr", 1e-5, "--seed", 1, run="new", dataset=Path("others"))
    assert same(new.G.state_dict(), saved["G"]) and same(new.D.state_dict(), saved["D"])
    assert not new.opt_G.state and not torch.equal(new.fixed_z, saved["fixed_z"])
    assert new.opt_G.param_groups[0]["lr"] == 1e-5
    train("dcgan", "new", "--steps", 5, *init, "--lr", 1e-5, "--overwrite")
    assert checkpoint("new")["step"] == 5 and len(log_rows("new")) == 1


# -------------------------------------------------------------------------------- generate and logs


def generate(name, *flags, run="run"):
    argv = ["--out-dir", run, "--device", "cpu", "--generate", *flags]
    SCRIPTS[name].main([str(flag) for flag in argv])
    images = images_in(Path(run, "generated"))
    Path(run, "generated").rename(f"generated {flags}")
    return images


@pytest.mark.parametrize("name", ["dcgan", "cgan"])
def test_generate(name, monkeypatch):
    """Numbered images of the checkpoint's G, from its flags, with no dataset; the same for a
    seed."""
    train(name, "run", "--steps", 10, "--lr", 0.01)  # enough to tell one z from another
    Path("pictures").rename("gone")
    images = generate(name, 103)
    label = "_class{}" if name == "cgan" else ""
    assert list(images) == [f"{i:06d}{label.format(i % 2)}.png" for i in range(103)]
    inputs, Generator = [], SCRIPTS[name].Generator
    forward = Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda G, *x: inputs.append(x) or forward(G, *x))
    again = generate(name, 103, "--seed", 0)
    assert same_images(images, again) and [len(x[0]) for x in inputs] == [100, 3]
    z = inputs[0]
    other = generate(name, 103, "--seed", 1)
    assert sum(np.array_equal(other[k], images[k]) for k in images) < 10

    run = open_script(
        name, "--resume", "--steps", 11, "--lr", 0.01, run="run", dataset=Path("gone")
    )
    with torch.no_grad():
        x = run.G.eval()(*z)
    expected = ((x + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    drawn = np.stack(list(images.values()))
    assert np.abs(drawn[:100] - expected).max() <= 0.51
    assert any(not np.array_equal(drawn[i], drawn[100 + i]) for i in range(3)), "new z each time"
    if name == "cgan":
        assert z[1].tolist() == [0, 1] * 50


def test_generate_one_label(capsys):
    """Which is no change of the run to report."""
    train("cgan", "run", "--steps", 5)
    images = generate("cgan", 3, "--label", 1)
    assert "label was" not in capsys.readouterr().err
    assert list(images) == [f"{i:06d}_class1.png" for i in range(3)]
    by_name = generate("cgan", 3, "--label", "class1")
    assert list(by_name) == list(images)
    for label in ("2", "b"):
        with pytest.raises(SystemExit, match=f"--label is {label}: the classes are class0, class1"):
            generate("cgan", 3, "--label", label)
    with pytest.raises(SystemExit):
        SCRIPTS["cgan"].parse_args(["--label", "1"])


def test_file_names_have_the_names_of_numbered_classes():
    """They take turns, also across batches of 100."""
    for name in ("1", "2", "10"):
        picture_folder(Path("numbers", name))
    train("cgan", "run", "--steps", 1, data="numbers")
    expected = [f"{i:06d}_class{(1, 2, 10)[i % 3]}.png" for i in range(103)]
    assert list(generate("cgan", 103)) == expected
    assert list(generate("cgan", 1, "--label", 10)) == ["000000_class10.png"]


def test_other_columns_in_the_log_end_the_run_in_one_line():
    """As after a change of the script."""
    train("dcgan", "run", "--steps", 5)
    file = Path("run/log.csv")
    before = file.read_text().replace(",d_fake", ",D(G(z))")
    file.write_text(before)
    with pytest.raises(
        SystemExit, match=r"log\.csv has other columns than the script logs \(step,"
    ):
        train("dcgan", "run", "--steps", 10, "--resume")
    assert file.read_text() == before and checkpoint("run")["step"] == 5


def test_a_log_that_was_saved_with_other_line_ends_is_continued():
    train("dcgan", "run", "--steps", 5)
    file = Path("run/log.csv")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    train("dcgan", "run", "--steps", 10, "--resume")
    assert [row["step"] for row in log_rows("run")] == [5, 10]


def test_tensorboard(monkeypatch):
    module = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: True)
    common.summary_writer.cache_clear()
    train("dcgan", "run", "--steps", 10, "--tensorboard")
    common.summary_writer.cache_clear()
    module.SummaryWriter.assert_called_once_with("run")
    calls = module.SummaryWriter().method_calls
    images = [c.args for c in calls if c[0] == "add_image"]
    assert [step for _, _, step in images] == [0, 5, 10]
    assert all(x.ndim == 3 and x.min() >= 0 and x.max() <= 1 for _, x, _ in images)
    names = ("loss_D", "loss_G", "d_real", "d_fake")
    scalars = [(c.args[0], c.args[2]) for c in calls if c[0] == "add_scalar"]
    assert scalars == [(name, step) for step in (5, 10) for name in names]


# -------------------------------------------------------------------------- devices and CUDA graphs


def test_the_default_device_is_the_gpu(monkeypatch):
    """And all that a start asks of torch.cuda before the data is loaded works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert SCRIPTS["dcgan"].parse_args([]).device == "cuda"
    assert SCRIPTS["dcgan"].parse_args(["--device", "cuda:1"]).device == "cuda:1"
    assert chosen == [1] and torch.backends.cudnn.benchmark


def test_mps_is_accepted_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        SCRIPTS["dcgan"].parse_args(["--device", "mps"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert SCRIPTS["dcgan"].parse_args(["--device", "mps"]).device == "mps"
    assert SCRIPTS["dcgan"].parse_args([]).device == "cpu"


def fake_cuda_graphs(monkeypatch):
    """Stands in for what `cuda_graph` uses of torch.cuda; returns a list of the captures and
    replays."""
    events = []

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        events.append("capture")
        yield

    fakes = {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.append("replay"))}
    fakes["graph"] = graph
    for name in ("Stream", "synchronize", "set_stream", "current_stream"):
        fakes[name] = lambda *_: None
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return events


def test_an_update_is_captured_once_and_replayed(monkeypatch):
    events, weight = fake_cuda_graphs(monkeypatch), torch.ones((), requires_grad=True)

    def update():
        events.append("update")
        return {"loss": weight * 2}

    args = SimpleNamespace(cuda_graph=True)
    data = SimpleNamespace(images=torch.empty(1, device="meta"))
    graphed = runs.cuda_graph(args, data, update)
    results = [graphed() for _ in range(6)]
    assert events == ["update"] * 3 + ["capture", "update"] + ["replay"] * 3
    assert all(result["loss"].item() == 2 for result in results)
    assert not results[-1]["loss"].requires_grad, (
        "with its history it would keep the update's memory"
    )


def test_where_nothing_is_captured(monkeypatch):
    """With images in host memory or on MPS, with --no-cuda-graph, under torchrun."""
    args = SimpleNamespace(cuda_graph=True)
    for device in ("cpu", "mps"):
        data = SimpleNamespace(images=SimpleNamespace(device=torch.device(device)))
        assert runs.cuda_graph(args, data, len) is len

    data = SimpleNamespace(images=torch.empty(1, device="meta"))
    assert runs.cuda_graph(SimpleNamespace(cuda_graph=False), data, len) is len
    monkeypatch.setattr(common, "world_size", lambda: 2)
    assert runs.cuda_graph(args, data, len) is len


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"r3gan"}))
def test_graphed_and_eager_runs_agree(name, monkeypatch):
    """A run with CUDA graphs logs what one without them does, and so does one that begins without
    and is resumed with them: in a fade, where networks grow. By default, cuDNN rounds anew each
    time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = ["--log-every", 1, "--save-every", 10]
    if name in ("progan", "stylegan"):
        flags += ["--stage-steps", 6]
    train(name, "eager", "--steps", 20, *flags, "--no-cuda-graph", device="cuda")
    train(name, "graphed", "--steps", 20, *flags, device="cuda")
    train(name, "both", "--steps", 10, *flags, "--no-cuda-graph", device="cuda")
    train(name, "both", "--steps", 20, *flags, "--resume", device="cuda")
    for other in ("graphed", "both"):
        for a, b in zip(log_rows("eager"), log_rows(other), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@needs_cuda
def test_resume_across_devices():
    train("dcgan", "run", "--steps", 5)
    train("dcgan", "run", "--steps", 10, "--resume", device="cuda")
    train("dcgan", "run", "--steps", 15, "--resume")
    assert checkpoint("run")["step"] == 15


@needs_cuda
def test_images_that_do_not_fit_on_the_device_stay_where_they_are(monkeypatch):
    train("dcgan", "near", "--steps", 5, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    train("dcgan", "far", "--steps", 5, device="cuda")
    assert log_rows("near")[0] == pytest.approx(log_rows("far")[0], rel=2e-3, abs=2e-3)
