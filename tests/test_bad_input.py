"""Bad input: one clear line on stderr, the right exit code, and nothing changed on disk."""

import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from helpers import ROOT, SCRIPTS, checkpoint, picture_folder, train, write_cifar10, write_mnist

import common
import runs


def tree():
    """Every path below this folder with what it holds."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


def refused(name, argv, capsys):
    """The one line with which a script ends, and its exit code; nothing has changed on disk."""
    before = tree()
    capsys.readouterr()
    quick = ["--steps", "1", "--width", "4"]  # should it start in spite of the mistake
    if "--resume" in argv or "--generate" in argv:
        quick = []
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main([*quick, *(str(flag) for flag in argv)])
    line, code = capsys.readouterr().err, stop.value.code
    if isinstance(code, str):  # Python prints it and exits with 1
        line, code = line + code + "\n", 1
    assert line.count("\n") == 1 and "Traceback" not in line
    assert tree() == before
    return line, code


FLAGS = {
    "--image-size 48": "argument --image-size: invalid choice: ",
    "--image-size big": "argument --image-size: invalid int value: 'big'",
    **{
        f"--{flag} 0": f"argument --{flag}: must be 1 or more, not 0"
        for flag in ("steps", "n-critic", "width", "log-every", "save-every", "generate", "z-dim")
    },
    "--steps 1e3": "argument --steps: must be a whole number, not '1e3'",
    "--seed -1": "argument --seed: must be 0 or more, not -1",
    "--seed 2147483648": "argument --seed: must be less than 2^31, not 2147483648",
    "--lr fast": "argument --lr: must be a number, not 'fast'",
    "--lr 0": "argument --lr: must be above 0, not 0",
    "--lr nan": "argument --lr: must be a finite number, not nan",
    "--beta1 1": "argument --beta1: must be at least 0 and less than 1, not 1",
    "--device tpu": "argument --device: tpu is not a device of this machine: choose from cpu",
    "--out-dir=": "argument --out-dir: the path is empty",
    "--dataset=": "argument --dataset: the path is empty",
    "--resume --generate 3": "argument --generate: not allowed with argument --resume",
    "--resume --overwrite": "--overwrite starts a new run: leave out --resume and --generate",
    "--epochs 3": "unrecognized arguments: --epochs",
    "--cuda": "unrecognized arguments: --cuda",
    "--out-dir file": "--out-dir file cannot be used: ",
    "--out-dir file/below": "--out-dir file/below cannot be used: ",
    f"--out-dir {'long' * 100}": "cannot be used: ",
    "--tensorboard": "pip install tensorboard",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(flags, capsys, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    Path("file").touch()
    line, code = refused("dcgan", flags.split(), capsys)
    assert code == 2 and line.startswith("dcgan.py: error: ") and FLAGS[flags] in line


OWN_FLAGS = {
    "wgan": ("--clip 0", "--alpha 1", "--momentum -1"),
    "wgan_gp": ("--gp-weight -1",),
    "lsgan": ("--a nan",),
    "cgan": ("--label 1", "--label -1"),
    "ebgan": ("--batch-size 1",),
    "ssgan": ("--batch-size 1",),
    "tricks": (
        "--smooth 1",
        "--noise -1",
        "--r1 nan",
        "--ema 1",
        "--minibatch-kernels 3 --r1 1",
        "--minibatch-kernels 3 --replay 9",
    ),
}


@pytest.mark.parametrize("name", OWN_FLAGS)
def test_bad_flags_of_one_script(name, capsys):
    for flags in OWN_FLAGS[name]:
        line, code = refused(name, flags.split(), capsys)
        assert code == 2 and flags.split()[0] in line


DATA = {
    "--dataset imagenet": "imagenet. --dataset is mnist, fashion-mnist, cifar10, digits (needs no ",
    "--dataset CIFAR10": "or a folder of images. Did you mean cifar10?",
    "--dataset file": "there is no folder ",
    "--dataset empty": "no images found in ",
    "--dataset texts": "no images found in ",
    "--dataset broken": "broken: cannot read 3 images: cut.png (image file is truncated), ",
    "--data-dir cut": "MNIST cannot be read (",
    "--data-dir half": "raw/train-images-idx3-ubyte is missing, and the download failed (HTTP ",
    "--data-dir wrong": "MNIST cannot be read (",
    "--data-dir labels": "MNIST cannot be read (",
    "--data-dir label200": "MNIST cannot be read (ValueError: its labels do not match its images)",
    "--data-dir none": "raw/train-images-idx3-ubyte is missing, raw/train-labels-idx1-ubyte is ",
    "--dataset cifar10 --data-dir cifar": "cifar-10-batches-py: data_batch_1 is damaged, data_b",
}


@pytest.mark.parametrize("flags", DATA)
def test_missing_and_damaged_data(flags, capsys, monkeypatch):
    picture_folder(Path("pictures"))
    Path("file").write_text("content")
    for folder in ("empty", "texts", "broken", "none/MNIST/raw", "none/runs"):
        Path(folder).mkdir(parents=True)
    Path("texts/notes.txt").write_text("text")
    Path("broken/text.jpg").write_text("text")
    Path("broken/zero.png").touch()
    Path("broken/cut.png").write_bytes(Path("pictures/picture0.png").read_bytes()[:60])
    images, labels = (f"MNIST/raw/train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for folder in ("cut", "half", "wrong", "labels", "label200"):
        write_mnist(folder)
    os.truncate(f"cut/{images}", 5000)
    Path("half", images).unlink()
    Path("wrong", images).write_text("not an idx file at all")
    shutil.copy(f"labels/{labels}", f"labels/{images}")
    Path("label200", labels).write_bytes(Path("half", labels).read_bytes()[:-1] + bytes([200]))
    with pytest.MonkeyPatch.context() as m:
        write_cifar10("cifar", m)  # torchvision's own checksums are those of the real files

    def forbidden(*_, **__):
        raise urllib.error.HTTPError("http://here", 403, "Forbidden", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    line, code = refused("dcgan", ["--device", "cpu", *flags.split()], capsys)
    assert code == 1 and line.startswith("error: ") and DATA[flags] in line
    advises_deletion = "delete the folder to download it again" in line
    assert advises_deletion == ("MNIST cannot be read" in line), "whole files are never to blame"


def test_a_data_dir_without_permission(monkeypatch, capsys):
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied", "data/MNIST/raw"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", denied)
    line, code = refused("dcgan", ["--device", "cpu"], capsys)
    assert code == 1 and "MNIST cannot be read: Permission denied: data/MNIST/raw" in line


def edit(change):
    """A function that puts a checkpoint in the place of another, with one thing changed in it."""

    def write(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return write


def change_a_bit(path):
    """One bit of one weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGED = "checkpoint.pt is damaged, or not a checkpoint"


class Mark:
    """What would leave a mark if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("mark",))


CHECKPOINTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), DAMAGED),
    "one bit": (change_a_bit, "the checksum of archive/data/[0-9]+ is wrong"),
    "empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "text": (lambda path: path.write_text("hello"), DAMAGED),
    "a folder": (lambda path: path.unlink() or path.mkdir(), "checkpoint.pt cannot be read: "),
    "a program": (lambda path: path.write_bytes(pickle.dumps(Mark())), DAMAGED),
    "a newer program": (lambda path: torch.save(Mark(), path), DAMAGED),
    "another dict": (lambda path: torch.save({"G": {}}, path), "is not a checkpoint of this"),
    "another type": (edit(lambda saved: saved.update(step="5")), "is not a checkpoint of this"),
    "other data": (edit(lambda saved: saved["data"].pop("classes")), "is not a checkpoint of this"),
    "another script's": (
        edit(lambda saved: saved["args"].update(script="wgan")),
        "checkpoint.pt was written by wgan.py, not by dcgan.py",
    ),
    "a weight missing": (
        edit(lambda saved: saved["state"]["G"].popitem()),
        "fit: in its G, shapes",
    ),
    "a text": (edit(lambda saved: saved["state"].update(D="D")), "does not fit: in its D, shapes"),
    "no optimiser": (edit(lambda saved: saved["state"].pop("opt_D")), "fit: in its opt_D, shapes"),
    "other moments": (
        edit(lambda saved: saved["state"]["opt_G"]["state"][0].update(exp_avg=torch.zeros(3))),
        "does not fit: in its opt_G, shapes differ",
    ),
    "more moments": (
        edit(lambda saved: saved["state"]["opt_D"]["state"].update({99: {}})),
        "does not fit: in its opt_D, shapes differ",
    ),
    "not a number": (
        edit(lambda saved: saved["state"]["G"]["net.0.weight"].fill_(float("nan"))),
        "checkpoint.pt is damaged: G is not finite",
    ),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("flags", ["--resume --steps 9", "--generate 3"])
def test_bad_checkpoints(how, flags, capsys):
    train("dcgan", "run", "--steps", 5)
    damage, message = CHECKPOINTS[how]
    damage(Path("run/checkpoint.pt"))
    capsys.readouterr()
    before = tree()
    with pytest.raises(SystemExit, match=message):
        SCRIPTS["dcgan"].main(f"--out-dir run --device cpu {flags}".split())
    assert "Traceback" not in capsys.readouterr().err
    assert tree() == before and not Path("mark").exists()


def test_resume_names_the_flag_that_differs_and_the_way_that_works(capsys):
    train("dcgan", "run", "--steps", 5)
    argv = ["--out-dir", "run", "--resume", "--steps", "9", "--lr", "1e-5"]
    line, code = refused("dcgan", argv, capsys)
    assert code == 2 and "--resume cannot change --lr: the run has 0.0002, not 1e-05. " in line
    assert f"--init {Path('run', 'checkpoint.pt')}" in line
    argv[-2:] = ["--width", "7"]
    assert "Start a new run in another --out-dir" in refused("dcgan", argv, capsys)[0]
    line, code = refused(
        "dcgan", ["--out-dir", "run", "--resume", "--steps", "9", "--seed", "1"], capsys
    )
    assert code == 2 and "--resume cannot change --seed: the run has 0, not 1. " in line


def test_resume_of_a_finished_run_says_so(capsys):
    train("dcgan", "run", "--steps", 5)
    line, code = refused("dcgan", ["--out-dir", "run", "--resume"], capsys)
    assert code == 2 and "run is already at step 5: raise --steps" in line


def test_a_new_run_needs_an_empty_folder(capsys):
    """Anything but a hidden file is in its way, also a log or an args.json of something else."""
    train("dcgan", "run", "--steps", 5)
    argv = ["--dataset", "pictures", "--out-dir"]
    line, code = refused("dcgan", [*argv, "run"], capsys)
    message = "run holds a run: --resume it, --overwrite it, or choose another --out-dir"
    assert code == 2 and message in line
    for k, name in enumerate(("args.json", "log.csv", "samples/cat.png", "notes.txt")):
        file = Path(f"mine{k}", name)
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        line, code = refused("dcgan", [*argv, f"mine{k}"], capsys)
        message = f"mine{k} is not empty: choose another --out-dir, or --overwrite the run in it"
        assert code == 2 and message in line
    Path("hidden").mkdir()
    Path("hidden/.DS_Store").touch()
    train("dcgan", "hidden", "--steps", 1)


def test_a_folder_that_fills_up_while_the_data_is_loaded():
    picture_folder(Path("pictures"))

    def load_data(args, load_data=common.load_data):
        Path("run").mkdir()
        Path("run/checkpoint.pt").write_text("another's")
        return load_data(args)

    message = "error: run holds a run: --resume it"
    patch = mock.patch.object(common, "load_data", load_data)
    with patch, pytest.raises(SystemExit, match=message):
        train("dcgan", "run", "--steps", 1, data="pictures")
    assert Path("run/checkpoint.pt").read_text() == "another's"


@pytest.mark.skipif(sys.platform == "win32", reason="makes a symbolic link")
def test_a_link_to_nowhere(capsys):
    Path("nowhere").symlink_to("gone")
    line, code = refused("dcgan", ["--out-dir", "nowhere/below"], capsys)
    assert code == 2 and "--out-dir nowhere/below cannot be used: " in line
    assert "nowhere is not a folder" in line


def test_a_folder_without_permission(capsys, monkeypatch):
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    line, code = refused("dcgan", ["--out-dir", "locked/run"], capsys)
    assert code == 2 and "--out-dir locked/run cannot be used: no permission to write to" in line


def test_without_a_run_the_others_are_named(capsys):
    train("dcgan", "runs/dcgan-pictures", "--steps", 1)
    train("dcgan", "runs/second", "--steps", 1)
    for flags in (["--resume"], ["--generate", "3"]):
        line, code = refused("dcgan", flags, capsys)
        runs_there = ", ".join(str(Path("runs", name)) for name in ("dcgan-pictures", "second"))
        message = f"{Path('runs', 'dcgan-mnist')} holds no run: set --out-dir, for example to "
        assert code == 2 and message + runs_there in line
    Path("begun").mkdir()
    Path("begun/args.json").write_text("{}")
    line, code = refused("dcgan", ["--resume", "--out-dir", "begun"], capsys)
    assert code == 2 and "begun holds no checkpoint yet: start again with --overwrite" in line
    line, code = refused("dcgan", ["--resume", "--out-dir", "elsewhere/run"], capsys)
    assert code == 2 and line.endswith("holds no run\n")


def test_cuda_without_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line, code = refused("dcgan", ["--device", "cuda"], capsys)
    assert code == 2 and f"PyTorch {torch.__version__} sees no CUDA GPU on this machine" in line


def test_resume_says_how_the_data_differs(capsys):
    """Another number of images is a warning, other channels or classes end it."""
    train("dcgan", "run", "--steps", 5)
    shutil.copy("pictures/class0/picture.png", "pictures/class0/second.png")
    train("dcgan", "run", "--steps", 6, "--resume")
    assert "pictures has 3 images, but the run in run had 2\n" in capsys.readouterr().err
    before = checkpoint("run")["step"]
    os.rename("pictures/class0", "pictures/class7")
    message = "pictures has the classes class1, class7, but the run in run has class0, class1"
    with pytest.raises(SystemExit, match=message):
        train("dcgan", "run", "--steps", 7, "--resume")
    write_mnist("data")
    with pytest.raises(
        SystemExit, match=r"does not fit: in its G, .*\(channels was 3, and is 1 now\)"
    ):
        train("dcgan", "run", "--steps", 7, "--resume", data="mnist")
    assert checkpoint("run")["step"] == before


def test_init_names_what_does_not_fit():
    train("dcgan", "run", "--steps", 5)
    with pytest.raises(
        SystemExit, match=r"does not fit: in its G, .*\(width was 8, and is 12 now\)"
    ):
        train("dcgan", "new", "--steps", 5, "--init", "run/checkpoint.pt", "--width", 12)
    with pytest.raises(SystemExit, match=r"was written by dcgan\.py, not by wgan\.py"):
        train("wgan", "new", "--steps", 5, "--init", "run/checkpoint.pt")
    with pytest.raises(SystemExit, match=r"other\.pt does not exist"):
        train("dcgan", "new", "--steps", 5, "--init", "other.pt")


def test_init_says_when_class_numbers_mean_something_else(capsys):
    train("cgan", "run", "--steps", 1)
    other = Path("others")
    for name in ("class1", "class7"):
        picture_folder(other / name)
    train("cgan", "new", "--steps", 1, "--init", "run/checkpoint.pt", data=other)
    message = "warning: the classes of --init are class0, class1, and those of the dataset class1, "
    assert message in capsys.readouterr().err


def test_cgan_needs_classes():
    picture_folder(Path("flat"), (0, 1))
    with pytest.raises(SystemExit, match=r"flat has no classes, which cgan\.py needs"):
        train("cgan", "run", data="flat")


def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    """The message names it and the step; the last good checkpoint stays."""
    module, g_loss, calls = SCRIPTS["dcgan"], SCRIPTS["dcgan"].g_loss, []

    def breaks_at_step_7(d_fake):
        calls.append(1)
        return g_loss(d_fake) * (float("nan") if len(calls) >= 7 else 1)

    monkeypatch.setattr(module, "g_loss", breaks_at_step_7)
    with pytest.raises(SystemExit, match=r"loss_. is nan at step 8: try a lower --lr"):
        train("dcgan", "run", "--steps", 20, "--log-every", 2)
    saved = checkpoint("run")
    assert saved["step"] == 5
    assert all(t.isfinite().all() for t in saved["state"]["G"].values())


def test_weights_that_are_not_finite_are_not_saved(monkeypatch):
    """Also where the losses, which are those from before the update, are finite."""
    step = torch.optim.Adam.step

    def breaks_at_the_end(self, *args):
        step(self, *args)
        calls.append(1)
        if len(calls) == 20:
            self.param_groups[0]["params"][0].data[0] = float("nan")

    calls = []
    monkeypatch.setattr(torch.optim.Adam, "step", breaks_at_the_end)
    with pytest.raises(SystemExit, match="G is not finite at step 10: try a lower --lr"):
        train("dcgan", "run", "--steps", 20)
    assert checkpoint("run")["step"] == 5


def test_moments_that_are_not_finite_are_not_saved(monkeypatch):
    step = torch.optim.Adam.step

    def breaks(self, *args):
        step(self, *args)
        next(iter(self.state.values()))["exp_avg_sq"].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    with pytest.raises(SystemExit, match="opt_G is not finite at step 5: try a lower --lr"):
        train("dcgan", "run", "--steps", 20)
    assert not Path("run/checkpoint.pt").exists()


def test_as_a_program():
    """Through the shell: exit code, one line, and no traceback."""
    command = [sys.executable, str(ROOT / "dcgan.py"), "--device", "cpu", "--dataset", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and not list(Path().iterdir())


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        SCRIPTS["wgan"].parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for default in ["64", "5e-05", "0.99", "0.01", "mnist", "20000"]:
        assert f"(default: {default})" in out
    assert "None" not in out and "False" not in out and "True" not in out
    assert "example: python wgan.py " in out
