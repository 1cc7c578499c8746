"""Runs that survive: resume, checkpoints, Ctrl-C, kill -9, a full disk; generate; logs; CUDA graphs."""

import contextlib
import csv
import errno
import gc
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import common
import numpy as np
import pytest
import torch
from helpers import NAMES, ROOT, SCRIPTS, open_script, picture_folder
from PIL import Image

SMALL = "--image-size 16 --width 8 --batch-size 4 --z-dim 6 --log-every 5 --save-every 5 --device cpu"


@pytest.fixture
def train(tmp_path):
    """Runs a script on two pictures into tmp_path/<folder>."""
    data = picture_folder(tmp_path / "pictures", (0, 1), classes=True)

    def run(name, folder, *flags):
        argv = ["--dataset", data, "--data-dir", tmp_path / "data", "--out-dir", tmp_path / folder]
        SCRIPTS[name].main([str(a) for a in [*argv, *SMALL.split(), *flags]])

    return run


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Two checkpoints' contents are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    """Weights, optimisers, spectral norm vectors, random state, log rows but for the seconds, and grids."""
    first, second = checkpoint(a), checkpoint(b)
    for saved in (first, second):
        del saved["args"]["steps"], saved["seconds"]
        saved["log"] = [row.split(",")[::2] for row in saved["log"].splitlines()]  # without the seconds
    assert same(first, second)
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
    assert checkpoint(tmp_path / "whole")["step"] == 20
    seconds = [float(r["seconds"]) for r in csv.DictReader((tmp_path / "parts" / "log.csv").open())]
    assert seconds == sorted(seconds), "the clock goes on where it stopped"


def test_resume_needs_no_flags(train, tmp_path):
    """The run's own are the defaults; how often it logs and saves, and where everything is, are free."""
    train("dcgan", "run", "--steps", 10)
    main = SCRIPTS["dcgan"].main
    main(f"--out-dir {tmp_path}/run --resume --device cpu --steps 15".split())
    train("dcgan", "whole", "--steps", 15)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "run elsewhere")
    argv = f"--dataset {tmp_path}/moved --data-dir {tmp_path}/elsewhere --device cpu --resume --steps 17"
    argv += " --log-every 1 --save-every 2 --out-dir"
    main([*argv.split(), f"{tmp_path}/run elsewhere"])
    assert checkpoint(tmp_path / "run elsewhere")["step"] == 17


def test_resume_names_the_flag_that_differs_and_the_command_that_works(train, tmp_path, capsys):
    train("dcgan", "a run", "--steps", 5)
    before = (tmp_path / "a run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "a run", "--steps", 9, "--resume", "--width", 12)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--width is 12: it must be 8, as in the run" in message
    assert (tmp_path / "a run" / "checkpoint.pt").read_bytes() == before
    command = shlex.split(message[message.index("python dcgan.py") :])
    SCRIPTS["dcgan"].main([*command[2:], "--device", "cpu", "--steps", "6"])


def test_resume_notices_other_data(train, tmp_path):
    """Also of the same number and the same names."""
    black, white = tmp_path / "fa" / "pics", tmp_path / "fb" / "pics"
    for folder, grey in ((black, 0), (white, 255)):
        folder.mkdir(parents=True)
        Image.new("L", (16, 16), grey).save(folder / "a.png")
    train("dcgan", "run", "--dataset", black, "--steps", 5)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    with pytest.raises(SystemExit, match=r"was trained on other images than .*: leave --dataset out"):
        train("dcgan", "run", "--dataset", white, "--steps", 9, "--resume")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")} == before


def test_resume_of_a_finished_run_does_nothing(train, tmp_path, monkeypatch):
    train("dcgan", "run", "--steps", 5)
    before, rows = checkpoint(tmp_path / "run"), (tmp_path / "run" / "log.csv").read_text()
    monkeypatch.setattr(SCRIPTS["dcgan"], "d_loss", None)  # not one more step
    train("dcgan", "run", "--steps", 5, "--resume")
    assert same(before, checkpoint(tmp_path / "run"))
    assert (tmp_path / "run" / "log.csv").read_text() == rows


def test_a_cuda_checkpoint_resumes_on_the_cpu(train, tmp_path):
    """Neither the other device's random state nor how the optimiser ran there comes along."""
    train("dcgan", "run", "--steps", 5)
    saved = checkpoint(tmp_path / "run")
    saved["rng"] = torch.zeros(16, dtype=torch.uint8)
    for optimiser in ("opt_G", "opt_D"):
        saved["state"][optimiser]["param_groups"][0]["capturable"] = True
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    train("dcgan", "run", "--steps", 10, "--resume")
    after = checkpoint(tmp_path / "run")
    assert after["state"]["opt_G"]["param_groups"][0]["capturable"] is False
    torch.manual_seed(0)  # the first steps' noise does not come again
    assert not torch.equal(after["rng"], torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resume_across_devices(train, tmp_path):
    train("dcgan", "run", "--steps", 5)
    train("dcgan", "run", "--steps", 10, "--resume", "--device", "cuda", "--cuda-graph")
    train("dcgan", "run", "--steps", 15, "--resume", "--device", "cpu")
    assert checkpoint(tmp_path / "run")["step"] == 15


# -------------------------------------------------------------------------------------------- bad days


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_after_one_more_step(number, train, tmp_path, monkeypatch, capfd):
    module, calls = SCRIPTS["dcgan"], []
    g_loss = module.g_loss

    def interrupted(d_fake):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        if len(calls) == 8:
            assert "saving after one more step" in capfd.readouterr().err, "said at once"
        return g_loss(d_fake)

    monkeypatch.setattr(module, "g_loss", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train("dcgan", "run", "--steps", 20)
    assert stop.value.code == 128 + number and len(calls) == 8
    err = capfd.readouterr().err
    assert f"saved at step 8: python dcgan.py --out-dir {tmp_path / 'run'} --resume continues" in err
    assert signal.getsignal(number) is handler
    assert checkpoint(tmp_path / "run")["step"] == 8
    train("dcgan", "run", "--steps", 20, "--resume")
    train("dcgan", "whole", "--steps", 20)
    assert same(checkpoint(tmp_path / "run")["state"], checkpoint(tmp_path / "whole")["state"])


def test_nohup_keeps_its_word(train, tmp_path, monkeypatch):
    module, g_loss = SCRIPTS["dcgan"], SCRIPTS["dcgan"].g_loss
    monkeypatch.setattr(module, "g_loss", lambda d: os.kill(os.getpid(), signal.SIGHUP) or g_loss(d))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train("dcgan", "run", "--steps", 5)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("module", ["numpy", "torch._C", "torchvision.datasets", "tqdm"])
def test_ctrl_c_while_the_imports_are_under_way(module, tmp_path):
    """No traceback, and 130. -X importtime tells how far they are."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "dcgan.py"), "--help"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in child.stderr:
        if line.endswith(f" {module}\n"):
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read()
    assert "Traceback" not in rest and child.wait() in (130, -signal.SIGINT)


def in_child(function):
    """Runs function in a forked process, which has torch loaded already; returns the process."""
    process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
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
    child.join()
    assert child.exitcode == -signal.SIGINT


def test_kill_9_fifty_times(train, tmp_path, capfd):
    """Killed at any moment, the run goes on from the last complete checkpoint, and no file is torn."""
    rng, run, step = random.Random(0), tmp_path / "run", 1
    every = ["--save-every", 1, "--log-every", 1]
    train("dcgan", "run", "--steps", 1, *every)
    for _ in range(50):
        child = in_child(lambda: train("dcgan", "run", "--steps", 10**6, *every, "--resume"))
        far = rng.random() < 0.5  # as far as a new step at least
        time.sleep(0 if far else rng.uniform(0, 0.3))
        while far and checkpoint(run)["step"] == step:
            time.sleep(rng.uniform(0, 0.01))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, capfd.readouterr().err
        step, last = checkpoint(run)["step"], step
        assert step >= last
        for path in (run / "samples").glob("*.png"):
            Image.open(path).load()
        json.loads((run / "args.json").read_text())
    assert step > 15, "the run got on in spite of it"
    train("dcgan", "run", "--steps", step + 1, *every, "--resume")
    train("dcgan", "whole", "--steps", step + 1, *every)
    assert_same_run(run, tmp_path / "whole")
    assert {p.name for p in (run / "samples").glob("*.png")} == {f"{k:06d}.png" for k in range(step + 2)}


def test_two_processes_do_not_share_a_run(train, tmp_path, monkeypatch, capfd):
    """The second is told at once; a lock left by kill -9 is no obstacle."""
    train("dcgan", "run", "--steps", 5)
    before = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    child = in_child(lambda: train("dcgan", "run", "--steps", 10**6, "--save-every", 1, "--resume"))
    while (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == before:
        assert child.is_alive()
        time.sleep(0.01)
    with monkeypatch.context() as m:
        m.setattr(common, "load_data", None)  # before the data is even opened
        for flags in (["--resume"], ["--generate", 1]):
            with pytest.raises(SystemExit, match="another process is at work on"):
                train("dcgan", "run", *flags)
    child.kill()
    child.join()
    gc.collect()  # the refused ones' locks, which are this process's
    train("dcgan", "run", "--steps", checkpoint(tmp_path / "run")["step"] + 1, "--resume")


def test_the_grid_of_a_step_is_written_before_its_checkpoint(train, monkeypatch):
    """So that a kill between them loses no grid."""
    order = []
    for name in ("save_grid", "save_checkpoint"):
        monkeypatch.setattr(common, name, lambda args, step, what, name=name: order.append((name, step)))
    train("dcgan", "run", "--steps", 5)
    assert order == [(name, step) for step in (0, 5) for name in ("save_grid", "save_checkpoint")]


@pytest.mark.parametrize(
    "how", ["2>&-", "2>/dev/full", ">&- 2>&-", "2>&1 | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}"]
)
def test_the_display_is_never_load_bearing(how, tmp_path):
    """With stderr closed, full, or a pipe that went away, training and drawing go on."""
    data = picture_folder(tmp_path / "pictures", (0, 1), classes=True)
    start = f"{sys.executable} {ROOT / 'dcgan.py'} --out-dir run --device cpu"
    train = f"{start} --dataset {data} {SMALL} --steps 40 --log-every 1"
    for command in (train, f"{start} --generate 3"):
        done = subprocess.run(["bash", "-c", f"{command} {how}"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done
    assert checkpoint(tmp_path / "run")["step"] == 40
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 41
    assert len(list((tmp_path / "run" / "generated").iterdir())) == 3


@pytest.mark.parametrize("part", ["checkpoint.pt", "000010.png", "log.csv"])
def test_full_disk(part, train, tmp_path, monkeypatch):
    """One clear line; what was there before stays, and the run can go on from it."""
    train("dcgan", "run", "--steps", 5)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    steps = common.steps

    def open_unless_full(path, mode):
        if os.path.basename(path) in (part, part + ".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    def steps_on_a_full_disk(*args):
        monkeypatch.setattr(common, "open", open_unless_full, raising=False)
        yield from steps(*args)

    monkeypatch.setattr(common, "steps", steps_on_a_full_disk)
    with pytest.raises(SystemExit, match=rf"^[^\n]*{part}[^\n]*No space left on device[^\n]*$"):
        train("dcgan", "run", "--steps", 20, "--resume")
    if part == "checkpoint.pt":
        assert all(p.read_bytes() == content for p, content in before.items() if p.suffix == ".png")
    monkeypatch.undo()
    train("dcgan", "run", "--steps", 20, "--resume")
    train("dcgan", "whole", "--steps", 20)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_replacing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(common.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SystemExit), common.replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"13,1,9,9,9,9\n14,1,9,", b"\xff\x00\x80", b"", b"step;seconds\n5;1\n"])
def test_resume_writes_the_log_anew_up_to_the_checkpoint(content, train, tmp_path):
    """Whatever became of the file: rows of after the checkpoint, or another program's."""
    train("dcgan", "run", "--steps", 10)
    with (tmp_path / "run" / "log.csv").open("ab" if content.startswith(b"13") else "wb") as f:
        f.write(content)
    train("dcgan", "run", "--steps", 20, "--resume")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [r["step"] for r in rows] == ["5", "10", "15", "20"]
    assert list(rows[0])[:3] == ["step", "seconds", "loss_D"]


# ------------------------------------------------------------------------------------- generate and logs


def images_in(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", NAMES)
def test_generate(name, train, tmp_path):
    """Numbered images of the checkpoint's G, from its flags, with no dataset; the same for the same seed."""
    train(name, "run", "--steps", 10, "--lr", 0.01)  # enough to tell one z from another
    run, generated = tmp_path / "run", tmp_path / "run" / "generated"
    (tmp_path / "pictures").rename(tmp_path / "gone")

    def generate(flags):
        SCRIPTS[name].main(f"--out-dir {run} --device cpu --generate {flags}".split())
        images = images_in(generated)
        shutil.rmtree(generated)
        return images

    images = generate("103")
    label = "_class{}" if name == "cgan" else ""
    assert list(images) == [f"{i:06d}{label.format(i % 2)}.png" for i in range(103)]
    again, other = generate("5"), generate("5 --seed 1")
    assert all(np.array_equal(again[k], images[k]) and not np.array_equal(other[k], images[k]) for k in again)
    run = open_script(name, tmp_path, "--resume", "--out-dir", run, "--lr", 0.01, dataset=tmp_path / "gone")
    torch.manual_seed(0)
    z, y = torch.randn(100, 6), torch.arange(100) % 2
    with torch.no_grad():
        x = run.G.eval()(z, y) if name == "cgan" else run.G.eval()(z)
    expected = ((x + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(list(images.values()))[:100] - expected).max() <= 0.51
    drawn = list(images.values())
    assert not any(np.array_equal(drawn[i], drawn[100 + i]) for i in range(3)), "each batch draws new z"


def test_generate_does_not_overwrite(train, tmp_path, monkeypatch):
    """And one that was interrupted is no obstacle."""
    train("dcgan", "run", "--steps", 5)
    argv = ["--generate", "2", "--out-dir", str(tmp_path / "run"), "--device", "cpu"]
    with monkeypatch.context() as m:
        m.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            SCRIPTS["dcgan"].main(argv)
    assert (tmp_path / "run" / "generated.tmp").exists() and not (tmp_path / "run" / "generated").exists()
    SCRIPTS["dcgan"].main(argv)
    assert not (tmp_path / "run" / "generated.tmp").exists()
    before = (tmp_path / "run" / "generated" / "000000.png").read_bytes()
    with pytest.raises(SystemExit, match="generated exists: move or delete it"):
        SCRIPTS["dcgan"].main([*argv, "--seed", "1"])
    assert (tmp_path / "run" / "generated" / "000000.png").read_bytes() == before


def test_generate_one_label(train, tmp_path, capsys):
    train("cgan", "run", "--steps", 5)
    argv = ["--out-dir", str(tmp_path / "run"), "--device", "cpu", "--generate", "3"]
    with pytest.raises(SystemExit):
        SCRIPTS["cgan"].main([*argv, "--label", "2"])
    assert "--label is 2: it must be below 2" in capsys.readouterr().err
    SCRIPTS["cgan"].main([*argv, "--label", "1"])
    generated = images_in(tmp_path / "run" / "generated")
    assert list(generated) == [f"{i:06d}_class1.png" for i in range(3)]
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["classes"] == ["class0", "class1"]


def test_grids_map_minus_one_to_black_and_one_to_white(tmp_path):
    args = SimpleNamespace(out_dir=tmp_path, run=SimpleNamespace(board=None))
    values = torch.tensor([-1.0, 0.0, 1.0])
    common.save_grid(args, 3, values[:, None, None, None].expand(3, 3, 4, 4), columns=3)
    grid = np.asarray(Image.open(tmp_path / "samples" / "000003.png"))
    assert grid.shape == (26 * 8, 26 * 20, 3), "enlarged by a whole factor to at least 512"
    assert [int(grid[26 * 3, 26 * x, 0]) for x in (3, 9, 15)] == pytest.approx([0, 128, 255], abs=1)


@pytest.mark.parametrize("name", ["dcgan", "cgan"])
def test_grids_show_the_same_z(name, train, tmp_path):
    """Every grid is what the G of its step makes of the z that was drawn before the first step; cgan: one
    class per column."""
    train(name, "run", "--steps", 10, "--lr", 0.01)
    folder = tmp_path / "run"
    new = open_script(name, tmp_path, "--lr", 0.01, dataset=tmp_path / "pictures")
    resume = ["--lr", 0.01, "--resume", "--out-dir", folder]
    run = open_script(name, tmp_path, *resume, dataset=tmp_path / "pictures")
    assert torch.equal(new.fixed_z, run.fixed_z)
    y = [torch.arange(2).repeat(8)] if name == "cgan" else []
    with torch.no_grad():
        x = run.G.eval()(run.fixed_z, *y)
    args = SimpleNamespace(out_dir=tmp_path / "expected", run=SimpleNamespace(board=None))
    common.save_grid(args, 10, x, columns=2 if name == "cgan" else 8)
    a, b = (np.asarray(Image.open(f / "samples" / "000010.png"), int) for f in (folder, args.out_dir))
    assert np.abs(a - b).max() <= 1


def test_drawing_grids_does_not_change_the_run(train, tmp_path):
    train("dcgan", "often", "--steps", 10, "--save-every", 1)
    train("dcgan", "seldom", "--steps", 10, "--save-every", 10)
    assert same(checkpoint(tmp_path / "often")["state"], checkpoint(tmp_path / "seldom")["state"])


def test_g_is_in_training_mode_after_a_grid(tmp_path):
    run = open_script("dcgan", tmp_path)  # whose first grid is drawn by now
    assert all(m.training for m in run.G.modules())


def test_tensorboard(train, tmp_path, monkeypatch):
    module = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: True)
    train("dcgan", "run", "--steps", 10, "--tensorboard")
    module.SummaryWriter.assert_called_once_with(str(tmp_path / "run"))
    calls = module.SummaryWriter().method_calls
    images = [c.args for c in calls if c[0] == "add_image"]
    assert [step for _, _, step in images] == [0, 5, 10]
    assert all(x.ndim == 3 and x.min() >= 0 and x.max() <= 1 for _, x, _ in images)
    names = ("loss_D", "loss_G", "d_real", "d_fake")
    scalars = [(c.args[0], c.args[2]) for c in calls if c[0] == "add_scalar"]
    assert scalars == [(name, step) for step in (5, 10) for name in names]


# ------------------------------------------------------------------------------------------- CUDA graphs


def fake_cuda(monkeypatch, fails=False):
    """Stands in for what `cuda_graphs` uses of torch.cuda; returns a list of the replays."""
    replays = []

    @contextlib.contextmanager
    def graph(graph):
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")
        yield

    graphs = {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1)), "graph": graph}
    for name in ("Stream", "synchronize", "set_stream"):
        graphs[name] = lambda *_: None
    for name, fake in graphs.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return replays


GRAPHED = SimpleNamespace(cuda_graph=True, run=SimpleNamespace(command="python dcgan.py"))


def test_graphs_are_captured_once_and_replayed(monkeypatch):
    replays, seen = fake_cuda(monkeypatch), []
    weight = torch.ones((), requires_grad=True)

    def one(x):
        seen.append(x)
        return x * weight

    one, two = common.cuda_graphs(GRAPHED, one, lambda: (weight * 2, weight * 3))
    for k in range(10):
        results = [one(torch.full((2,), float(k))), *two()]
        assert not any(y.requires_grad for y in results), "a result that holds its history keeps its stream"
    assert len(seen) == 4 and len(replays) == 14
    assert seen[-1].tolist() == [9, 9], "each replay's input is copied into the captured buffer"


def test_a_capture_that_fails_ends_the_run_in_one_line(monkeypatch):
    fake_cuda(monkeypatch, fails=True)
    (step,) = common.cuda_graphs(GRAPHED, lambda x: x * 2)
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(SystemExit, match=r"^[^\n]*no CUDA graph[^\n]*python dcgan.py goes on without one$"):
        step(torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_graphed_and_eager_runs_agree(name, train, tmp_path):
    train(name, "eager", "--steps", 20, "--log-every", 1, "--device", "cuda")
    train(name, "graphed", "--steps", 20, "--log-every", 1, "--device", "cuda", "--cuda-graph")
    logs = [list(csv.DictReader((tmp_path / r / "log.csv").open())) for r in ("eager", "graphed")]
    for a, b in zip(*logs, strict=True):
        a, b = ([float(row[k]) for k in ("step", "loss_D", "loss_G", "d_real", "d_fake")] for row in (a, b))
        assert a == pytest.approx(b, rel=2e-3, abs=2e-3)
