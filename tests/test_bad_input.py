"""Bad input: one clear line on stderr, the right exit code, and nothing changed on disk."""

import os
import pickle
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SCRIPTS, checkpoint, picture_folder, train, write_cifar10, write_mnist

import runs


def tree():
    """Every path below this folder with what it holds."""
    return {str(p): None if p.is_dir() else p.read_bytes() for p in sorted(Path().rglob("*"))}


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
        f"--{flag} 0": f"argument --{flag}: 0 is not a whole number from 1 to "
        for flag in ("steps", "n-critic", "width", "log-every", "save-every", "generate", "z-dim")
    },
    "--steps 1.5": "argument --steps: invalid positive_int value: '1.5'",
    "--seed -1": "argument --seed: ",
    "--seed 2147483648": "argument --seed: 2147483648 is not a whole number from 0 to 2^31 - 1",
    "--lr 0": "argument --lr: 0 is not above 0",
    "--lr nan": "argument --lr: nan is not a finite number",
    "--beta1 1": "argument --beta1: 1 is not in [0, 1)",
    "--device tpu": "argument --device: invalid choice: 'tpu'",
    "--out-dir=": "argument --out-dir: the path is empty",
    "--dataset=": "argument --dataset: the path is empty",
    "--resume --generate 3": "argument --generate: not allowed with argument --resume",
    "--device cpu --cuda-graph": "--cuda-graph needs CUDA, and --device is cpu",
    "--epochs 3": "unrecognized arguments: --epochs",
    "--tensorboard": "pip install tensorboard",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(flags, capsys, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
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
    "--dataset imagenet": "imagenet is not a folder: --dataset is mnist, ",
    "--dataset file": "file is not a folder",
    "--dataset empty": "holds no images",
    "--dataset texts": "holds no images",
    "--dataset broken": "holds 3 image files, and none of them can be read",
    "--data-dir cut": "MNIST cannot be read (",
    "--data-dir half": "MNIST cannot be read (",
    "--data-dir wrong": "MNIST cannot be read (",
    "--data-dir labels": "MNIST cannot be read (",
    "--data-dir label200": "MNIST cannot be read (ValueError: its labels do not match its images)",
    "--data-dir none": "MNIST is missing, and the download failed (",
    "--dataset cifar10 --data-dir cifar": "cifar-10-batches-py cannot be read (",
    "--resume --out-dir none": "checkpoint.pt does not exist",
    "--generate 3 --out-dir none": "checkpoint.pt does not exist",
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
    monkeypatch.setattr(urllib.request, "urlopen", None)  # no network
    line, code = refused("dcgan", ["--device", "cpu", *flags.split()], capsys)
    assert code == 1 and line.startswith("error: ") and DATA[flags] in line


def edit(change):
    """A function that puts a checkpoint in the place of another, with one thing changed in it."""

    def write(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return write


class Mark:
    """What would leave a mark if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("mark",))


CHECKPOINTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be read as a"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
    "text": (lambda path: path.write_text("hello"), "cannot be read as a checkpoint"),
    "a program": (lambda path: path.write_bytes(pickle.dumps(Mark())), "cannot be read as a"),
    "a newer program": (lambda path: torch.save(Mark(), path), "cannot be read as a checkpoint"),
    "another dict": (lambda path: torch.save({"G": {}}, path), "cannot be read as a checkpoint"),
    "another script's": (
        edit(lambda saved: saved["args"].update(script="wgan")),
        "checkpoint.pt was written by wgan.py, not by dcgan.py",
    ),
    "a part missing": (edit(lambda saved: saved["state"]["G"].popitem()), "does not fit these"),
    "no optimiser": (edit(lambda saved: saved["state"].pop("opt_D")), "does not fit these"),
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
    assert code == 2 and "--lr is 1e-05, but the run has 0.0002: " in line
    assert f"--init {Path('run', 'checkpoint.pt')}" in line
    line, code = refused(
        "dcgan", ["--out-dir", "run", "--resume", "--steps", "9", "--seed", "1"], capsys
    )
    assert code == 2 and "--seed is 1, but the run has 0: " in line


def test_resume_of_a_finished_run_says_so(capsys):
    train("dcgan", "run", "--steps", 5)
    line, code = refused("dcgan", ["--out-dir", "run", "--resume"], capsys)
    assert code == 2 and "run is already at step 5: raise --steps" in line


def test_a_run_is_never_overwritten(capsys):
    train("dcgan", "run", "--steps", 5)
    argv = ["--dataset", "pictures", "--out-dir", "run"]
    line, code = refused("dcgan", argv, capsys)
    assert code == 2 and "run holds a run: --resume it, or choose another --out-dir" in line


def test_resume_says_how_the_data_differs(capsys):
    """Another number of images is a warning, other channels or classes end it."""
    train("dcgan", "run", "--steps", 5)
    shutil.copy("pictures/class0/picture.png", "pictures/class0/second.png")
    train("dcgan", "run", "--steps", 6, "--resume")
    assert "pictures: number is 3, but the run in run has 2" in capsys.readouterr().err
    before = checkpoint("run")["step"]
    os.rename("pictures/class0", "pictures/class7")
    with pytest.raises(
        SystemExit, match=r"classes is \['class1', 'class7'\], but the run in run has "
    ):
        train("dcgan", "run", "--steps", 7, "--resume")
    write_mnist("data")
    with pytest.raises(SystemExit, match=r"does not fit these networks.*: number 3, channels 3"):
        train("dcgan", "run", "--steps", 7, "--resume", data="mnist")
    assert checkpoint("run")["step"] == before


def test_init_names_what_does_not_fit():
    train("dcgan", "run", "--steps", 5)
    with pytest.raises(SystemExit, match=r"does not fit these networks.*: width 8"):
        train("dcgan", "new", "--steps", 5, "--init", "run/checkpoint.pt", "--width", 12)
    with pytest.raises(SystemExit, match=r"was written by dcgan\.py, not by wgan\.py"):
        train("wgan", "new", "--steps", 5, "--init", "run/checkpoint.pt")
    with pytest.raises(SystemExit, match=r"other\.pt does not exist"):
        train("dcgan", "new", "--steps", 5, "--init", "other.pt")


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
    with pytest.raises(SystemExit, match="a weight of G is not finite at step 10"):
        train("dcgan", "run", "--steps", 20)
    assert checkpoint("run")["step"] == 5


def test_as_a_program():
    """Through the shell: exit code, one line, and no traceback."""
    command = [sys.executable, str(ROOT / "dcgan.py"), "--device", "cpu", "--dataset", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and not list(Path().iterdir())


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        SCRIPTS["wgan"].parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for default in ["64", "5e-05", "0.99", "0.01", "mnist", "20000"]:
        assert f"(default: {default})" in out
