"""Runs that survive: resume, checkpoints, Ctrl-C, kill -9, a full disk; generate; logs; CUDA graphs."""

import csv
import errno
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import NAMES, ROOT, SCRIPTS, open_script, picture_folder
from PIL import Image

import common

SMALL = "--image-size 16 --width 8 --batch-size 4 --z-dim 6 --log-every 5 --save-every 5 --device cpu"


@pytest.fixture
def train(tmp_path):
    """Runs a script on two pictures into tmp_path/<folder>."""
    data = picture_folder(tmp_path / "pictures", (0, 1), classes=True)

    def run(name, folder, *flags):
        argv = ["--dataset", data, "--data-dir", tmp_path / "data", "--out-dir", tmp_path / folder]
        SCRIPTS[name].main([str(a) for a in [*argv, *SMALL.split(), *flags]])

    return run


def same(a, b, where=""):
    """Two checkpoints' contents are equal bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Weights, optimisers, spectral norm vectors, random state, log rows but for the seconds, and grids."""
    first, second = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    for saved in (first, second):
        for flag in ("out_dir", "resume", "steps"):
            saved["args"].pop(flag)
    same(first, second)
    rows = [[r[:1] + r[2:] for r in csv.reader((run / "log.csv").open())] for run in (a, b)]
    assert rows[0] == rows[1]
    grids = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (a, b)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_for_bit(name, train, tmp_path):
    train(name, "whole", "--steps", 20)
    train(name, "parts", "--steps", 10)
    train(name, "parts", "--steps", 20, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    saved = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 20
    seconds = [float(r["seconds"]) for r in csv.DictReader((tmp_path / "parts" / "log.csv").open())]
    assert seconds == sorted(seconds), "the clock goes on where it stopped"


def test_sngan_checkpoint_holds_the_power_iteration(tmp_path):
    """The vectors u and v of spectral norm are part of the state: without them a resumed run would differ."""
    run = open_script("sngan", tmp_path)
    saved = torch.load(tmp_path / "run-sngan" / "checkpoint.pt", weights_only=True)["state"]["D"]
    assert sum(k.endswith(("0._u", "0._v")) for k in saved) == 16
    assert any(torch.equal(saved[k], v) for k, v in run.D.state_dict().items() if k.endswith("_u"))


def test_resume_takes_other_cadence_device_and_place(train, tmp_path):
    train("dcgan", "run", "--steps", 10)
    (tmp_path / "pictures").rename(tmp_path / "moved")
    argv = f"--dataset {tmp_path / 'moved'} --data-dir {tmp_path / 'elsewhere'} --out-dir {tmp_path / 'run'}"
    argv += f" {SMALL} --steps 12 --log-every 1 --save-every 2 --resume"
    SCRIPTS["dcgan"].main(argv.split())
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 12


def test_resume_names_every_flag_that_differs(train, tmp_path):
    train("dcgan", "run", "--steps", 5)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "run", "--steps", 9, "--resume", "--width", 12, "--lr", 0.5)
    message = stop.value.code
    assert "--width is 12, the run has 8" in message and "--lr is 0.5, the run has 0.0002" in message
    assert "--z-dim" not in message and "--steps" not in message
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_resume_notices_other_data(train, tmp_path):
    train("dcgan", "run", "--steps", 5)
    (tmp_path / "pictures" / "class1" / "picture.png").unlink()
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "run", "--steps", 9, "--resume")
    assert "(images, channels, classes) [1, 3, 1], the run has [2, 3, 2]" in stop.value.code


def test_resume_of_a_finished_run_does_nothing(train, tmp_path, monkeypatch):
    path, log = tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "log.csv"
    train("dcgan", "run", "--steps", 5)
    before, rows = torch.load(path, weights_only=True), log.read_text()
    monkeypatch.setattr(SCRIPTS["dcgan"], "d_loss", None)  # not one more step
    train("dcgan", "run", "--steps", 5, "--resume")
    after = torch.load(path, weights_only=True)
    assert after["step"] == 5 and log.read_text() == rows
    same(before["state"], after["state"])
    same(before["rng"], after["rng"])


def test_a_cuda_checkpoint_resumes_on_the_cpu_and_back(train, tmp_path):
    """Neither the other device's random state nor how the optimiser ran there comes along."""
    train("dcgan", "run", "--steps", 5)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["cuda_rng"] is None
    saved["cuda_rng"] = torch.zeros(16, dtype=torch.uint8)
    for optimiser in ("opt_G", "opt_D"):
        saved["state"][optimiser]["param_groups"][0]["capturable"] = True
    saved["args"]["device"] = "cuda"
    torch.save(saved, path)
    train("dcgan", "run", "--steps", 10, "--resume")
    group = torch.load(path, weights_only=True)["state"]["opt_G"]["param_groups"][0]
    assert group["capturable"] is False
    train("dcgan", "whole", "--steps", 10)
    assert_states_equal_but_for_the_args(tmp_path)


def assert_states_equal_but_for_the_args(tmp_path):
    a, b = (torch.load(tmp_path / r / "checkpoint.pt", weights_only=True) for r in ("run", "whole"))
    same(a["state"], b["state"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_across_devices(train, tmp_path):
    train("dcgan", "run", "--steps", 5)
    train("dcgan", "run", "--steps", 10, "--resume", "--device", "cuda", "--cuda-graph")
    train("dcgan", "run", "--steps", 15, "--resume", "--device", "cpu")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 15


# -------------------------------------------------------------------------------------------- bad days


def test_ctrl_c_finishes_the_step_saves_and_exits_130(train, tmp_path, monkeypatch, capsys):
    module, calls = SCRIPTS["dcgan"], []
    g_loss = module.g_loss

    def interrupted(d_fake):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return g_loss(d_fake)

    monkeypatch.setattr(module, "g_loss", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "run", "--steps", 20)
    assert stop.value.code == 130
    assert "saved at step 7" in capsys.readouterr().err and len(calls) == 7
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 7
    train("dcgan", "run", "--steps", 20, "--resume")
    train("dcgan", "whole", "--steps", 20)
    a, b = (torch.load(tmp_path / r / "checkpoint.pt", weights_only=True) for r in ("run", "whole"))
    same(a["state"], b["state"])


def in_child(function):
    """Runs function in a forked process, which has torch loaded already; returns the process."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_second_ctrl_c_ends_at_once(train, monkeypatch):
    module = SCRIPTS["dcgan"]

    def hangs(d_fake):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(module, "g_loss", hangs)
    child = in_child(lambda: train("dcgan", "run", "--steps", 20))
    child.join(30)
    assert child.exitcode == -signal.SIGINT


def test_kill_9_fifty_times(train, tmp_path, capfd):
    """Killed at any moment, the run goes on from the last complete checkpoint, and no file is torn."""
    rng, run, step = random.Random(0), tmp_path / "run", 0
    for kill in range(50):
        flags = ["--steps", 10**6, "--save-every", 1, "--log-every", 1]
        flags += ["--resume"] if (run / "checkpoint.pt").exists() else []
        child = in_child(lambda flags=flags: train("dcgan", "run", *flags))
        time.sleep(rng.uniform(0.02, 0.35))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, capfd.readouterr().err
        if not (run / "checkpoint.pt").exists():
            assert kill < 5, "never got as far as a checkpoint"
            continue
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        assert saved["step"] >= step
        step = saved["step"]
        for path in (run / "samples").glob("*.png"):
            Image.open(path).load()
        if (run / "args.json").exists():
            json.loads((run / "args.json").read_text())
        if (run / "log.csv").exists():
            rows = list(csv.reader((run / "log.csv").open()))
            assert all(len(row) == len(common.LOG_COLUMNS) for row in rows)
    assert step > 3, "the run got on in spite of it"
    steps = step + 1
    train("dcgan", "run", "--steps", steps, "--save-every", 1, "--log-every", 1, "--resume")
    train("dcgan", "whole", "--steps", steps, "--save-every", 1, "--log-every", 1)
    assert_same_run(run, tmp_path / "whole")
    assert not list(tmp_path.glob("run/**/*.tmp"))


@pytest.mark.parametrize("part", ["checkpoint.pt", "000010.png", "log.csv"])
def test_full_disk(part, train, tmp_path, monkeypatch, capsys):
    """One clear line; what was there before stays, and the run can go on from it."""
    train("dcgan", "run", "--steps", 5)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open = open

    def open_unless_full(path, *args, **kwargs):
        if os.path.basename(str(path)) in (part, part + ".tmp") and "resumed" in disk:
            no_space()
        return real_open(path, *args, **kwargs)

    disk = set()
    steps = common.steps

    def steps_on_a_full_disk(*args):
        disk.add("resumed")
        return steps(*args)

    monkeypatch.setattr(common, "open", open_unless_full, raising=False)
    monkeypatch.setattr(common, "steps", steps_on_a_full_disk)
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "run", "--steps", 20, "--resume")
    assert part in stop.value.code and "No space left on device" in stop.value.code
    assert "\n" not in stop.value.code
    if part == "checkpoint.pt":
        assert all(p.read_bytes() == content for p, content in before.items() if p.suffix == ".png")
    monkeypatch.undo()
    train("dcgan", "run", "--steps", 20, "--resume")
    train("dcgan", "whole", "--steps", 20)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_file(path, b"old")
    monkeypatch.setattr(common.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SystemExit):
        common.write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_rows_after_the_checkpoint_are_dropped_on_resume(train, tmp_path):
    train("dcgan", "run", "--steps", 10)
    with (tmp_path / "run" / "log.csv").open("a") as f:
        f.write("13,1.0,9,9,9,9\n14,1.1,9,")  # the run went on and was killed in the middle of a row
    train("dcgan", "run", "--steps", 20, "--resume")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [r["step"] for r in rows] == ["5", "10", "15", "20"]


# ------------------------------------------------------------------------------------- generate and logs


def images_in(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", NAMES)
def test_generate(name, train, tmp_path, monkeypatch):
    """Numbered images of the checkpoint's G, from its flags, with no dataset; the same for the same seed."""
    train(name, "run", "--steps", 10, "--lr", 0.01)  # enough to tell one z from another
    run, generated = tmp_path / "run", tmp_path / "run" / "generated"
    (tmp_path / "pictures").rename(tmp_path / "gone")

    def generate(n, *flags):
        with monkeypatch.context() as m:
            m.setattr(common, "_load_folder", None)
            SCRIPTS[name].main(["--generate", str(n), "--out-dir", str(run), "--device", "cpu", *flags])
        images = images_in(generated)
        generated.rename(tmp_path / f"generated{len(list(tmp_path.iterdir()))}")
        return images

    images = generate(103)
    label = "_class{}" if name == "cgan" else ""
    assert list(images) == [f"{i:06d}{label.format(i % 2)}.png" for i in range(103)]
    assert all(x.shape == (16, 16, 3) for x in images.values())
    again, other = generate(5), generate(5, "--seed", "1")
    assert all(np.array_equal(again[k], images[k]) for k in again)
    assert all(not np.array_equal(other[k], images[k]) for k in other)
    pairs = list(zip(images.values(), list(images.values())[100:], strict=False))
    assert len(pairs) == 3 and not any(np.array_equal(*pair) for pair in pairs), "each batch draws new z"

    run = open_script(name, tmp_path, "--resume", "--out-dir", run, "--lr", 0.01, dataset=tmp_path / "gone")
    torch.manual_seed(0)
    z, y = torch.randn(100, 6), torch.arange(100) % 2
    with torch.no_grad():
        x = run.G.eval()(z, y) if name == "cgan" else run.G.eval()(z)
    expected = ((x + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    for image, wanted in zip(list(images.values())[:100], expected, strict=True):
        assert np.abs(image - wanted).max() <= 0.51


def test_generate_does_not_overwrite(train, tmp_path):
    train("dcgan", "run", "--steps", 5)
    argv = ["--generate", "2", "--out-dir", str(tmp_path / "run"), "--device", "cpu"]
    SCRIPTS["dcgan"].main(argv)
    before = (tmp_path / "run" / "generated" / "000000.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["dcgan"].main([*argv, "--seed", "1"])
    assert "generated" in stop.value.code
    assert (tmp_path / "run" / "generated" / "000000.png").read_bytes() == before


def test_grids_map_minus_one_to_black_and_one_to_white(tmp_path):
    args = types.SimpleNamespace(out_dir=tmp_path, tensorboard=False)
    values = torch.tensor([-1.0, 0.0, 1.0])
    common.save_grid(args, 3, values[:, None, None, None].expand(3, 3, 4, 4), columns=3)
    grid = np.asarray(Image.open(tmp_path / "samples" / "000003.png"))
    assert grid.shape == (8, 20, 3)
    assert [int(grid[3, x, 0]) for x in (3, 9, 15)] == pytest.approx([0, 128, 255], abs=1)


@pytest.mark.parametrize("name", ["dcgan", "cgan"])
def test_grids_show_the_same_z(name, train, tmp_path):
    """Every grid is what the G of its step makes of the z that was drawn before the first step; cgan: one
    class per column."""
    train(name, "run", "--steps", 10, "--lr", 0.01)
    folder = tmp_path / "run"
    new = open_script(name, tmp_path, "--lr", 0.01, dataset=tmp_path / "pictures")
    run = open_script(
        name, tmp_path, "--lr", 0.01, "--resume", "--out-dir", folder, dataset=tmp_path / "pictures"
    )
    assert torch.equal(new.fixed_z, run.fixed_z)
    y = [torch.arange(2).repeat(8)] if name == "cgan" else []
    with torch.no_grad():
        x = run.G.eval()(run.fixed_z, *y)
    args = types.SimpleNamespace(out_dir=tmp_path / "expected", tensorboard=False)
    common.save_grid(args, 10, x, columns=2 if name == "cgan" else 8)
    grids = [
        np.asarray(Image.open(f / "samples" / "000010.png"), int) for f in (folder, tmp_path / "expected")
    ]
    assert np.abs(grids[0] - grids[1]).max() <= 1


def test_grids_of_many_classes_show_the_first_16(tmp_path):
    folder = picture_folder(tmp_path / "many", range(20), classes=True)
    open_script("cgan", tmp_path, dataset=folder)
    assert Image.open(tmp_path / "run-cgan" / "samples" / "000000.png").size == (16 * 18 + 2, 8 * 18 + 2)


def test_drawing_grids_does_not_change_the_run(train, tmp_path):
    train("dcgan", "often", "--steps", 10, "--save-every", 1)
    train("dcgan", "seldom", "--steps", 10, "--save-every", 10)
    a, b = (torch.load(tmp_path / r / "checkpoint.pt", weights_only=True) for r in ("often", "seldom"))
    same(a["state"], b["state"])


def test_walk_goes_from_one_z_to_another(tmp_path):
    run = open_script("dcgan", tmp_path)
    walk = np.asarray(Image.open(tmp_path / "run-dcgan" / "samples" / "walk.png"), float)
    grid = np.asarray(Image.open(tmp_path / "run-dcgan" / "samples" / "000000.png"), float)

    def tile(picture, row, column):
        return picture[18 * row + 2 : 18 * row + 18, 18 * column + 2 : 18 * column + 18]

    assert run.fixed_z.shape == (64, 6)
    assert np.array_equal(tile(walk, 3, 0), tile(grid, 0, 3))
    assert np.array_equal(tile(walk, 3, 9), tile(grid, 7, 4))


def test_walk_is_between_images_of_the_grid_after_a_resume(train, tmp_path):
    """A run that comes from another device has another fixed_z than this one would draw."""
    train("dcgan", "run", "--steps", 5)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["fixed_z"].neg_()
    saved["state"]["G"]["net.0.weight"].mul_(100)  # so that pictures of different z differ to the eye
    torch.save(saved, path)
    more = ("--resume", "--out-dir", tmp_path / "run")
    open_script("dcgan", tmp_path, *more, dataset=tmp_path / "pictures")
    walk, grid = (
        np.asarray(Image.open(tmp_path / "run" / "samples" / f"{name}.png"), int)
        for name in ("walk", "000005")
    )
    assert np.abs(grid[2:18, 2:18] - grid[2:18, 20:36]).max() > 5
    assert np.abs(walk[2:18, 2:18] - grid[2:18, 2:18]).max() <= 1


def test_the_progress_bar_may_be_switched_off(tmp_path):
    """TQDM_DISABLE=1, which tqdm itself reads when it is imported."""
    data = picture_folder(tmp_path / "pictures", (0, 1), classes=True)
    argv = f"--dataset {data} --data-dir {tmp_path / 'data'} --out-dir {tmp_path / 'run'} {SMALL} --steps 5"
    command = [sys.executable, str(ROOT / "dcgan.py"), *argv.split()]
    run = subprocess.run(
        command, env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0 and "step/s" not in run.stderr
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 2


def test_tensorboard(train, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(("folder", str(folder)))

        def add_scalar(self, name, value, step):
            assert math.isfinite(value)
            written.append((name, step))

        def add_image(self, name, image, step):
            assert image.ndim == 3 and image.min() >= 0 and image.max() <= 1
            written.append((name, step))

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: True)
    train("dcgan", "run", "--steps", 10, "--tensorboard")
    common._tensorboard.cache_clear()
    assert ("folder", str(tmp_path / "run")) in written
    scalars = {(name, step) for name in common.LOG_COLUMNS[2:] for step in (5, 10)}
    assert scalars | {("samples", 0), ("samples", 5), ("samples", 10)} <= set(written)


# ------------------------------------------------------------------------------------------- CUDA graphs


class FakeCuda:
    """What `cuda_graph` uses of torch.cuda, counting the replays."""

    def __init__(self, monkeypatch, fails=False):
        cuda = self

        class Stream:
            def wait_stream(self, other):
                pass

        class CUDAGraph:
            def replay(self):
                cuda.replays += 1

        class graph:
            def __init__(self, g, capture_error_mode="global"):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *error):
                if fails:
                    raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

        self.replays = 0
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: graph.__new__(graph, None), raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        if fails:  # only the capture fails, not the side stream
            import contextlib

            monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())


def test_graph_is_captured_once_and_replayed(monkeypatch):
    cuda, seen = FakeCuda(monkeypatch), []
    weight = torch.ones((), requires_grad=True)

    def function(x):
        seen.append(x)
        return (x * weight,)

    step = common.cuda_graph(function, types.SimpleNamespace(cuda_graph=True))
    for k in range(10):
        (y,) = step(torch.full((2,), float(k)))
        assert not y.requires_grad, "a result that holds its history keeps that step's nodes, on their stream"
    assert len(seen) == 4 and cuda.replays == 7
    assert seen[-1].tolist() == [9, 9], "each replay's input is copied into the captured buffer"


def test_the_flag_without_a_gpu_says_that_it_does_nothing(train, tmp_path, capsys):
    train("dcgan", "run", "--steps", 1, "--device", "cpu", "--cuda-graph")
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if "--cuda-graph" in line] == [err[0]] and err[0].startswith("warning:")
    assert json.loads((tmp_path / "run/args.json").read_text())["cuda_graph"] is False


def test_a_capture_that_fails_goes_on_without(monkeypatch, capsys):
    cuda = FakeCuda(monkeypatch, fails=True)
    step = common.cuda_graph(lambda x: (x * 2,), types.SimpleNamespace(cuda_graph=True))
    results = [step(torch.full((2,), float(k)))[0].tolist() for k in range(10)]
    assert results == [[2.0 * k] * 2 for k in range(10)] and cuda.replays == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "CUDA out of memory" in err


@pytest.mark.parametrize("name", NAMES)
def test_a_step_may_be_abandoned_anywhere(name, tmp_path):
    """A capture that fails leaves train_step half done; the next call must work all the same."""
    run = open_script(name, tmp_path)
    forward, calls = run.D.forward, []

    def fails_in_the_update_of_g(*args):
        calls.append(1)
        if not args[0].is_leaf and args[0].requires_grad and args[0].grad_fn.name() != "AddBackward0":
            raise RuntimeError
        return forward(*args)

    run.D.forward = fails_in_the_update_of_g
    with pytest.raises(RuntimeError):
        run.train_step(*next(run.batches))
    run.D.forward = forward
    assert all(t.isfinite() for t in run.train_step(*next(run.batches)))


def test_without_the_flag_nothing_is_wrapped():
    def function(x):
        return x

    assert common.cuda_graph(function, types.SimpleNamespace(cuda_graph=False)) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_graphed_and_eager_runs_agree(name, train, tmp_path):
    train(name, "eager", "--steps", 20, "--log-every", 1, "--device", "cuda")
    train(name, "graphed", "--steps", 20, "--log-every", 1, "--device", "cuda", "--cuda-graph")
    logs = [list(csv.DictReader((tmp_path / r / "log.csv").open())) for r in ("eager", "graphed")]
    for a, b in zip(*logs, strict=True):
        for column in common.LOG_COLUMNS[2:]:
            assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3, abs=2e-3), (
                a["step"],
                column,
            )
