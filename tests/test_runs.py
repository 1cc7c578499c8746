"""Runs that survive: resume, kill -9, init; generated images, grids and logs; devices and CUDA
graphs."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    NAMES,
    SCRIPTS,
    checkpoint,
    images_in,
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
    """Weights, optimisers, spectral norm vectors, random numbers, log rows and grids."""
    first, second = checkpoint(a), checkpoint(b)
    for saved in (first, second):
        del saved["args"]["steps"]
    assert same(first, second)
    assert log_rows(a) == log_rows(b)
    grids = [{p.name: p.read_bytes() for p in Path(run, "samples").iterdir()} for run in (a, b)]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_for_bit(name):
    flags = ["--n-critic", 2]
    train(name, "whole", "--steps", 12, *flags)
    train(name, "parts", "--steps", 7, *flags)
    train(name, "parts", "--steps", 12, "--resume", "--save-every", 6, *flags)
    whole, parts = checkpoint("whole"), checkpoint("parts")
    for saved in (whole, parts):
        del saved["args"]["steps"], saved["args"]["save_every"]
    assert same(whole, parts) and whole["step"] == 12
    assert log_rows("whole")[-1] == log_rows("parts")[-1]


def test_resume_needs_no_flags():
    """The run's own are the defaults; where things are and how often it saves are free."""
    train("dcgan", "run", "--steps", 10)
    SCRIPTS["dcgan"].main(["--out-dir", "run", "--resume", "--device", "cpu", "--steps", "15"])
    train("dcgan", "whole", "--steps", 15)
    assert_same_run("run", "whole")
    Path("pictures").rename("moved")
    Path("run").rename("run elsewhere")
    argv = "--dataset moved --data-dir elsewhere --resume --steps 17 --log-every 1 --save-every 2"
    SCRIPTS["dcgan"].main([*argv.split(), "--out-dir", "run elsewhere", "--device", "cpu"])
    assert checkpoint("run elsewhere")["step"] == 17


def test_resume_finds_its_dataset_from_another_directory(monkeypatch):
    train("dcgan", "run", "--steps", 5)
    Path("other").mkdir()
    monkeypatch.chdir("other")
    SCRIPTS["dcgan"].main(["--out-dir", "../run", "--resume", "--device", "cpu", "--steps", "6"])
    assert checkpoint("../run")["step"] == 6


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
    train("gan", "whole", "--steps", 10)
    assert same(checkpoint("run")["state"], checkpoint("whole")["state"])


def test_a_new_flag_does_not_change_an_older_run(capsys):
    train("gan", "run", "--steps", 5)
    saved = checkpoint("run")
    del saved["args"]["saturating"]
    torch.save(saved, "run/checkpoint.pt")
    with pytest.raises(SystemExit):
        train("gan", "run", "--steps", 10, "--resume", "--saturating")
    message = "--resume cannot change --saturating: the run has False, not True"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_cuda_optimisers_count_their_steps_on_the_gpu(device):
    optimiser = torch.optim.RMSprop([torch.zeros(1)])
    runs.prepare_optimisers(SimpleNamespace(device=device), {"opt": optimiser})
    assert optimiser.param_groups[0]["capturable"] is (device == "cuda")


def test_resume_from_another_kind_of_device():
    """The run goes on with new random numbers; the optimisers run as they do here."""
    train("dcgan", "run", "--steps", 5)
    saved = checkpoint("run")
    saved["device"], saved["random"] = "cuda", [torch.zeros(16, dtype=torch.uint8)]
    for optimiser in ("opt_G", "opt_D"):
        saved["state"][optimiser]["param_groups"][0]["capturable"] = True
    torch.save(saved, "run/checkpoint.pt")
    train("dcgan", "run", "--steps", 10, "--resume")
    after = checkpoint("run")
    assert after["state"]["opt_G"]["param_groups"][0]["capturable"] is False
    train("dcgan", "whole", "--steps", 10)
    assert not same(after["state"]["G"], checkpoint("whole")["state"]["G"])


def test_resume_drops_the_rows_after_the_checkpoint():
    """And a torn last one."""
    train("dcgan", "run", "--steps", 10)
    with Path("run/log.csv").open("a") as f:
        f.write("11,1.5,9,9,9,9\n12,1.5,9,9,9,9\n1")
    train("dcgan", "run", "--steps", 20, "--resume")
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
    for k in range(20):
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
    assert step > 10, "the run got on in spite of it"
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


def test_a_write_waits_for_a_program_that_has_the_file_open(monkeypatch):
    """As Windows demands it; and then the old file stays."""
    refusals = [3]

    def refuses(source, target, replace=os.replace):
        if refusals[0] > 0:
            refusals[0] -= 1
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    file = Path("file")
    with runs.atomic_write(file) as f:
        f.write(b"new")
    assert file.read_bytes() == b"new"
    refusals[0] = 1000
    message = "file cannot be replaced: is it open in another program"
    with pytest.raises(SystemExit, match=message), runs.atomic_write(file) as f:
        f.write(b"newer")
    assert file.read_bytes() == b"new"


def test_a_write_replaces_the_file_and_does_not_change_it_in_place():
    file = Path("file")
    file.write_bytes(b"old")
    os.link(file, "link")
    with runs.atomic_write(file) as f:
        f.write(b"new")
    assert file.read_bytes() == b"new" and Path("link").read_bytes() == b"old"


def test_overwrite_deletes_the_files_of_the_run_and_no_others(monkeypatch):
    """Also those of a run that ended before its first checkpoint."""
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, "save_checkpoint", mock.Mock(side_effect=KeyboardInterrupt))
        train("dcgan", "run", "--steps", 20, "--log-every", 2)
    assert len(log_rows("run")) == 3 and len(list(Path("run/samples").iterdir())) == 2
    others = ["notes.txt", "samples/cat.png", "samples/1.png", "generated/000000.png"]
    for name in others:
        Path("run", name).parent.mkdir(exist_ok=True)
        Path("run", name).write_text("mine")
    Path("run/events.out.tfevents.1").touch()
    train("dcgan", "run", "--steps", 20, "--save-every", 10, "--overwrite")
    assert not Path("run/events.out.tfevents.1").exists()
    for name in others:
        assert Path("run", name).read_text() == "mine"
        Path("run", name).unlink()
    train("dcgan", "whole", "--steps", 20, "--save-every", 10)
    assert_same_run("run", "whole")


def test_a_new_run_can_begin_with_the_networks_that_it_overwrites():
    train("dcgan", "run", "--steps", 5)
    before = checkpoint("run")["state"]["G"]
    init = ["--init", "run/checkpoint.pt", "--overwrite", "--lr", 1e-12]
    train("dcgan", "run", "--steps", 1, *init)
    after = checkpoint("run")["state"]["G"]
    assert torch.allclose(before["net.0.weight"], after["net.0.weight"], atol=1e-9)


@pytest.mark.skipif(sys.platform == "win32", reason="forks a process")
def test_one_process_at_a_time_trains_in_a_folder():
    """The other gets one line; the folder is free again when the run has ended, or was killed."""
    train("dcgan", "run", "--steps", 1)
    resume = ["--steps", 10**6, "--save-every", 1, "--resume"]
    child = in_child(lambda: train("dcgan", "run", *resume))
    while checkpoint("run")["step"] == 1:
        time.sleep(0.01)
    for flags in (resume, ["--overwrite"]):
        with pytest.raises(
            SystemExit, match="another process is training in run, or is a notebook"
        ):
            train("dcgan", "run", *flags)
    child.kill()
    child.join()
    step = checkpoint("run")["step"] + 1
    train("dcgan", "run", "--steps", step, "--resume")
    assert checkpoint("run")["step"] == step


def test_the_last_line_names_the_last_grid_and_the_way_on(capsys):
    train("dcgan", "run", "--steps", 7)
    command = "python dcgan.py --out-dir run --resume --steps 14"
    line = f"done: {Path('run', 'samples', '000007.png')}. To train on: {command}"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_resume_keeps_what_somebody_else_wrote_into_the_log():
    train("dcgan", "run", "--steps", 10)
    file = Path("run/log.csv")
    rows = file.read_bytes().splitlines(keepends=True)
    mine = [b"a note\r\n", b"\n", b"\0\0\0"]
    file.write_bytes(b"".join([*rows[:2], *mine[:2], rows[2], b"11,1.5,9\n", mine[2]]))
    train("dcgan", "run", "--steps", 15, "--resume")
    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[:6] == [*rows[:2], *mine[:2], rows[2], mine[2] + b"\n"]
    assert len(lines) == 7 and lines[6].startswith(b"15,")


def test_a_log_that_cannot_be_written_for_a_moment_does_not_end_the_run(monkeypatch, capsys):
    def locked_at_step_5(file, mode="r", *rest, **options):
        if str(file).endswith("log.csv") and mode == "a" and not failed:
            failed.append(file)
            raise PermissionError(13, "Permission denied")
        return open(file, mode, *rest, **options)

    failed = []
    monkeypatch.setattr(runs, "open", locked_at_step_5, raising=False)
    train("dcgan", "run", "--steps", 10)
    assert "log.csv cannot be written, so step 5 is missing from it" in capsys.readouterr().err
    assert [row["step"] for row in log_rows("run")] == [10]


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


@pytest.mark.parametrize("name", NAMES)
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


def test_generate_one_label():
    train("cgan", "run", "--steps", 5)
    images = generate("cgan", 3, "--label", 1)
    assert list(images) == [f"{i:06d}_class1.png" for i in range(3)]
    by_name = generate("cgan", 3, "--label", "class1")
    assert list(by_name) == list(images)
    for label in ("2", "b"):
        with pytest.raises(
            SystemExit, match=f"--label is {label}: the classes are class0, class1 "
        ):
            generate("cgan", 3, "--label", label)
    with pytest.raises(SystemExit):
        SCRIPTS["cgan"].parse_args(["--label", "1"])


def test_drawing_grids_does_not_change_the_run():
    train("dcgan", "often", "--steps", 10, "--save-every", 1)
    train("dcgan", "seldom", "--steps", 10, "--save-every", 10)
    assert same(checkpoint("often")["state"], checkpoint("seldom")["state"])


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


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_default_device_is_the_gpu(name, monkeypatch):
    """And all that a start asks of torch.cuda before the data is loaded works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert SCRIPTS[name].parse_args([]).device == "cuda"
    assert SCRIPTS[name].parse_args(["--device", "cuda:1"]).device == "cuda:1"
    assert chosen == [1]


def test_mps_is_accepted_where_there_is_one(monkeypatch):
    with pytest.raises(SystemExit):
        SCRIPTS["dcgan"].parse_args(["--device", "mps"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert SCRIPTS["dcgan"].parse_args(["--device", "mps"]).device == "mps"
    assert SCRIPTS["dcgan"].parse_args([]).device == "cpu"


def test_without_the_signals_that_windows_lacks(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    train("dcgan", "run", "--steps", 2)
    assert checkpoint("run")["step"] == 2


def test_in_a_thread_and_nothing_of_the_process_is_replaced():
    """As in a notebook or a window, where main is not called by the main thread."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    before = (sys.stdout, sys.stderr, sys.excepthook, handlers)
    thread = threading.Thread(target=train, args=("dcgan", "run", "--steps", 2))
    thread.start()
    thread.join()
    assert checkpoint("run")["step"] == 2
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert before == (sys.stdout, sys.stderr, sys.excepthook, handlers)


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
@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - {"progan", "stylegan"}))
def test_graphed_and_eager_runs_agree(name, monkeypatch):
    """Also where a graphed run continues an eager one. By default, cuDNN rounds anew each time; in
    r3gan.py, eager runs differ a little even so."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = ["--log-every", 1, "--save-every", 10]
    train(name, "eager", "--steps", 20, *flags, "--no-cuda-graph", device="cuda")
    train(name, "graphed", "--steps", 20, *flags, device="cuda")
    train(name, "both", "--steps", 10, *flags, "--no-cuda-graph", device="cuda")
    train(name, "both", "--steps", 20, *flags, "--resume", device="cuda")
    tolerance = 2e-2 if name == "r3gan" else 1e-4
    for other in ("graphed", "both"):
        for a, b in zip(log_rows("eager"), log_rows(other), strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


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
