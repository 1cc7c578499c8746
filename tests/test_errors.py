"""Bad input: one clear line on stderr, the right exit code, no traceback, and nothing changed on disk."""

import math
import os
import shutil
import subprocess
import sys

import common
import numpy as np
import pytest
import torch
from helpers import ROOT, SCRIPTS, picture, picture_folder, write_cifar10, write_mnist
from PIL import Image


def good_run(tmp_path, name="dcgan"):
    data = picture_folder(tmp_path / "good")
    flags = "--image-size 16 --width 8 --batch-size 2 --steps 1 --device cpu"
    argv = f"--dataset {data} --data-dir {tmp_path / 'data'} --out-dir {tmp_path / 'run'} {flags}"
    SCRIPTS[name].main(argv.split())
    return argv


def tree(folder):
    """Every path below a folder with what it holds."""
    return {
        str(p.relative_to(folder)): None if p.is_dir() or p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }


# name: (flags, exit code, what the message says). {t} is the test's folder, where `digits` could be drawn.
ARGUMENTS = {
    "no such dataset": (
        "--dataset imagenet",
        2,
        "--dataset is imagenet: it must be mnist, fashion-mnist, cifar10, digits, or a folder",
    ),
    "no such folder": ("--dataset {t}/nowhere", 2, "or a folder of images"),
    "dataset is a file": ("--dataset {t}/file", 2, "or a folder of images"),
    "dataset is a circular link": ("--dataset {t}/loop", 2, "or a folder of images"),
    "image size 48": (
        "--dataset digits --image-size 48",
        2,
        "--image-size is 48: it must be a power of two from 16 to 1024",
    ),
    "image size 8": ("--dataset digits --image-size 8", 2, "power of two from 16"),
    "image size 0": ("--dataset digits --image-size 0", 2, "--image-size is 0: it must be 1 or more"),
    "image size 2048": ("--dataset digits --image-size 2048", 2, "power of two from 16 to 1024"),
    "image size no number": ("--dataset digits --image-size big", 2, "invalid int value: 'big'"),
    "batch size 1": ("--dataset digits --batch-size 1", 2, "--batch-size is 1: it must be 2 or more"),
    "steps 0": ("--dataset digits --steps 0", 2, "--steps is 0: it must be 1 or more"),
    "steps -5": ("--dataset digits --steps -5", 2, "1 or more"),
    "steps 1.5": ("--dataset digits --steps 1.5", 2, "invalid int value"),
    "n-critic 0": ("--dataset digits --n-critic 0", 2, "--n-critic is 0"),
    "width 0": ("--dataset digits --width 0", 2, "--width is 0"),
    "z-dim -1": ("--dataset digits --z-dim -1", 2, "--z-dim is -1"),
    "lr 0": ("--dataset digits --lr 0", 2, "--lr is 0.0: it must be above 0"),
    "lr negative": ("--dataset digits --lr=-1e-3", 2, "above 0"),
    "lr nan": ("--dataset digits --lr nan", 2, "a finite number"),
    "lr inf": ("--dataset digits --lr inf", 2, "a finite number"),
    "beta1 1": ("--dataset digits --beta1 1", 2, "--beta1 is 1.0: it must be in [0, 1)"),
    "beta2 -0.1": ("--dataset digits --beta2 -0.1", 2, "in [0, 1)"),
    "seed negative": ("--dataset digits --seed -1", 2, "--seed is -1"),
    "log-every 0": ("--dataset digits --log-every 0", 2, "--log-every is 0"),
    "save-every 0": ("--dataset digits --save-every 0", 2, "--save-every is 0"),
    "generate 0": ("--generate 0", 2, "--generate is 0"),
    "resume and generate": ("--resume --generate 3", 2, "--generate is 3: it must be left out, or --resume"),
    "control characters": ("--dataset digits\a", 2, "--dataset is digits\\x07: it must be mnist"),
    "a seed too large": ("--dataset digits --seed 2147483648", 2, "0 or more, and below 2^31"),
    "--cuda-graph on a CPU": (
        "--dataset digits --cuda-graph",
        2,
        "--cuda-graph is True: it must be left out",
    ),
    "unknown flag": ("--dataset digits --epochs 3", 2, "unrecognized arguments: --epochs"),
    "unknown device": (
        "--dataset digits --device tpu",
        2,
        "--device is tpu: it must be one of this machine's: cpu",
    ),
    "device meta": ("--dataset digits --device meta", 2, "one of this machine's: cpu"),
    "no tensorboard": ("--dataset digits --tensorboard", 2, "pip install tensorboard"),
    "out-dir is a file": ("--dataset digits --out-dir {t}/file", 1, "t/file cannot be written"),
    "out-dir below a file": ("--dataset digits --out-dir {t}/file/run", 1, "t/file/run cannot be written"),
    "out-dir is a circular link": ("--dataset digits --out-dir {t}/loop", 1, "t/loop cannot be written"),
    "nothing to resume": ("--dataset digits --out-dir {t}/new --resume", 1, "new holds no checkpoint"),
    "nothing to generate from": ("--out-dir {t}/new --generate 3", 1, "new holds no checkpoint"),
    "no MNIST, no network": ("--dataset mnist --data-dir {t}/none", 1, "--dataset digits"),
    "empty folder": ("--dataset {t}/empty", 1, "holds no images"),
    "folder of text files": ("--dataset {t}/texts", 1, "holds no images"),
    "folder of unreadable images": (
        "--dataset {t}/broken",
        1,
        "holds 3 image files, of which none can be read",
    ),
    "truncated MNIST": ("--dataset mnist --data-dir {t}/truncated", 1, "incomplete or damaged"),
    "incomplete MNIST": ("--dataset mnist --data-dir {t}/incomplete", 1, "incomplete or damaged"),
    "MNIST that is something else": ("--dataset mnist --data-dir {t}/wrong", 1, "incomplete or damaged"),
    "MNIST with too few labels": ("--dataset mnist --data-dir {t}/labels", 1, "incomplete or damaged"),
    "MNIST with a label of 200": ("--dataset mnist --data-dir {t}/label200", 1, "labels up to 200"),
    "MNIST is a file": ("--dataset mnist --data-dir {t}/notdir", 1, "incomplete or damaged"),
    "CIFAR-10 with a wrong checksum": ("--dataset cifar10 --data-dir {t}/cifar", 1, "incomplete or damaged"),
    "data-dir is a file": ("--dataset {t}/pictures --data-dir {t}/file", 1, "cannot be written"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_and_data(case, tmp_path, capsys, monkeypatch):
    flags, code, message = ARGUMENTS[case]
    t = tmp_path / "t"
    t.mkdir()
    (t / "file").write_text("content")
    (t / "loop").symlink_to(t / "loop")
    picture_folder(t / "pictures")
    for folder in ("empty", "texts", "broken"):
        (t / folder).mkdir()
    (t / "texts" / "notes.txt").write_text("text")
    (t / "broken" / "zero.png").touch()
    (t / "broken" / "text.jpg").write_text("text")
    (t / "broken" / "cut.png").write_bytes((t / "pictures" / "picture0.png").read_bytes()[:60])
    for folder in ("truncated", "incomplete", "wrong", "labels", "label200"):
        write_mnist(t / folder)
    raw = "MNIST/raw/train-images-idx3-ubyte"
    with (t / "truncated" / raw).open("r+b") as f:
        f.truncate(5000)
    (t / "incomplete" / raw).unlink()
    (t / "wrong" / raw).write_text("not an idx file at all")
    shutil.copy(t / "labels" / raw.replace("images-idx3", "labels-idx1"), t / "labels" / raw)
    labels = t / "label200" / raw.replace("images-idx3", "labels-idx1")
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([200]))
    (t / "notdir").mkdir()
    (t / "notdir" / "MNIST").write_text("a file")
    with pytest.MonkeyPatch.context() as m:
        write_cifar10(t / "cifar", m)  # torchvision's own checksums are those of the real files
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(t)

    class NoNetwork:
        def __init__(self, root, train, download=False):
            raise OSError("no network")

    if "no network" in case:
        monkeypatch.setattr(common.torchvision.datasets, "MNIST", NoNetwork)
    before = tree(t)
    argv = [
        "--steps",
        "1",
        "--width",
        "4",
        *flags.format(t=t).split(),
    ]  # so that a miss does not train for hours
    if "--device" not in argv:
        argv += ["--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["dcgan"].main(argv)
    err = capsys.readouterr().err
    if isinstance(stop.value.code, str):  # Python prints it and exits with 1
        err, stop.value.code = err + stop.value.code + "\n", 1
    assert stop.value.code == code
    assert message in err
    said = ("images of", "image/s")  # what was loaded, and how fast, may come first
    lines = [line for line in err.splitlines() if line and not any(word in line for word in said)]
    assert len(lines) == 1 and "Traceback" not in err
    assert tree(t) == before


def edited(edit):
    """Puts a checkpoint in the place of another, with one thing changed in it."""

    def corrupt(path):
        saved = torch.load(path, weights_only=True)
        edit(saved)
        torch.save(saved, path)

    return corrupt


def adam(saved):
    return saved["state"]["opt_D"]["state"][0]


BAD_CHECKPOINTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a foreign pickle": lambda path: torch.save({"model": print}, path),
    "another dictionary": lambda path: torch.save({"state_dict": {}}, path),
    "a bare tensor": lambda path: torch.save(torch.zeros(3), path),
    "another script's": edited(lambda saved: saved.update(script="wgan")),
    "a part missing": edited(lambda saved: saved["state"]["G"].popitem()),
    "a NaN in the weights": edited(
        lambda saved: saved["state"]["G"]["net.0.weight"].view(-1)[3:].fill_(math.nan)
    ),
    "a weight of another shape": edited(
        lambda saved: saved["state"]["G"].update({"net.0.weight": torch.ones(3)})
    ),
    "an average of another shape": edited(lambda saved: adam(saved).update(exp_avg=torch.zeros(2))),
    "an average missing": edited(lambda saved: adam(saved).pop("exp_avg_sq")),
    "a count that is a word": edited(lambda saved: adam(saved).update(step="one")),
    "a step that is a word": edited(lambda saved: saved.update(step="five")),
    "a flag that is a list": edited(lambda saved: saved["args"].update(width=[8])),
    "flags that are a list": edited(lambda saved: saved.update(args=[])),
    "a flag missing": edited(lambda saved: saved["args"].pop("lr")),
    "data that is a word": edited(lambda saved: saved.update(data="mnist")),
    "a random state that is a list": edited(lambda saved: saved.update(rng=[1, 2])),
    "a log that is a number": edited(lambda saved: saved.update(log=3)),
}


@pytest.mark.parametrize("how", BAD_CHECKPOINTS)
@pytest.mark.parametrize("flags", ["--resume", "--generate 3"])
def test_bad_checkpoints(how, flags, tmp_path, capsys):
    argv = good_run(tmp_path)
    path = tmp_path / "run" / "checkpoint.pt"
    BAD_CHECKPOINTS[how](path)
    before = tree(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["dcgan"].main([*argv.split(), *flags.split()])
    assert f"{path} is damaged, or no checkpoint of this dcgan.py" in stop.value.code
    assert "\n" not in stop.value.code and "weights_only" not in stop.value.code
    assert tree(tmp_path) == before


def test_a_run_is_never_overwritten(tmp_path):
    argv = good_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS["dcgan"].main(argv.split())
    assert "holds a run" in stop.value.code
    assert "--resume" in stop.value.code and "--out-dir" in stop.value.code
    assert tree(tmp_path) == before


def test_a_run_that_came_first_is_not_overwritten(tmp_path, monkeypatch):
    """The same command twice, the second started while the first was loading its data."""
    load_data = common.load_data

    def load_slowly(args):
        monkeypatch.setattr(common, "load_data", load_data)
        good_run(tmp_path)
        before.update(tree(tmp_path / "run"))
        return load_data(args)

    before = {}
    monkeypatch.setattr(common, "load_data", load_slowly)
    with pytest.raises(SystemExit) as stop:
        good_run(tmp_path)
    assert "holds a run" in stop.value.code
    assert before and tree(tmp_path / "run") == before


def test_cgan_needs_labels(tmp_path):
    flat = picture_folder(tmp_path / "pictures", (0, 1))
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        argv = ["--dataset", flat, "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "run"]
        SCRIPTS["cgan"].main([str(a) for a in argv])
    assert "holds no images in one subfolder per class" in stop.value.code
    assert tree(tmp_path) == before


def test_variant_flags(capsys, tmp_path):
    for name, flags, message in (
        ("wgan", "--clip 0", "--clip is 0.0: it must be above 0"),
        ("wgan", "--alpha 1", "--alpha is 1.0: it must be in [0, 1)"),
        ("wgan_gp", "--gp-weight -1", "--gp-weight is -1.0: it must be 0 or more"),
        ("lsgan", "--a nan", "--a is nan: it must be a finite number"),
    ):
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[name].parse_args(
                ["--dataset", "digits", "--out-dir", str(tmp_path / "run"), *flags.split()]
            )
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_no_permission(tmp_path, monkeypatch):
    """Root may write anywhere, so it is told no here."""

    def no(*_, **__):
        raise PermissionError(13, "Permission denied")

    args = SCRIPTS["dcgan"].parse_args(["--dataset", "digits", "--out-dir", str(tmp_path / "run")])
    monkeypatch.setattr(os, "mkdir", no)
    with pytest.raises(SystemExit) as stop:
        common.open_run(args, {})
    assert "run cannot be written ([Errno 13] Permission denied" in stop.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(capsys, tmp_path):
    argv = good_run(tmp_path).split()
    for flags in ([], ["--resume"], ["--generate", "3"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            SCRIPTS["dcgan"].parse_args([*argv, "--device", "cuda", *flags])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "--device is cuda: it must be one of" in err and err.count("\n") == 1


def test_as_a_program(tmp_path):
    """Through the shell: exit codes, one line, and no traceback even where the error is not ours."""
    script = [sys.executable, str(ROOT / "dcgan.py")]
    wrong = subprocess.run([*script, "--lr", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("dcgan.py: error: --lr is 0.0")
    argv = [*script, "--dataset", str(tmp_path), "--device", "cpu"]
    world = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert world.returncode == 1 and world.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_errors_of_the_world_are_one_line(capsys):
    common._one_line_excepthook(PermissionError, PermissionError(13, "Permission denied", "/x"), None)
    common._one_line_excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "Permission denied" in err
    for error in (
        torch.OutOfMemoryError("CUDA\nout of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ):
        common._one_line_excepthook(type(error), error, None)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "lower --batch-size, --width or --image-size" in err


def test_a_bug_keeps_its_traceback(capsys):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    common._one_line_excepthook(RuntimeError, error, None)
    assert "illegal memory access" in capsys.readouterr().err


def test_an_ascii_terminal(tmp_path):
    """Help, and names that it cannot show."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    data = picture_folder(tmp_path / "caf\u00e9")
    for flags in (["--help"], ["--dataset", str(data), "--steps", "1", "--width", "8", "--device", "cpu"]):
        command = [sys.executable, str(ROOT / "dcgan.py"), *flags]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env)
        assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        SCRIPTS["wgan"].parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for default in (
        "64",
        "5e-05",
        "0.0",
        "0.99",
        "0.01",
        "mnist",
        "data",
        "32",
        "20000",
        "runs/{script}-{dataset}",
    ):
        assert f"(default: {default})" in out


def test_odd_files_beside_good_ones(tmp_path, capsys):
    """16-bit, palette, CMYK, RGBA and animated files are read; empty files and text are skipped by name."""
    folder = picture_folder(tmp_path / "pictures")
    rgb = Image.fromarray(picture(0))
    Image.fromarray(np.full((16, 16), 30_000, np.uint16)).save(folder / "sixteen.png")
    rgb.quantize(8).save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb, rgb])
    (folder / "zero.png").touch()
    (folder / "text.png").write_text("text")
    argv = f"--dataset {folder} --data-dir {tmp_path / 'data'} --out-dir {tmp_path / 'run'} --device cpu"
    SCRIPTS["dcgan"].main([*argv.split(), "--image-size", "16", "--width", "8", "--steps", "1"])
    err = capsys.readouterr().err
    assert "2 unreadable, skipped: text.png, zero.png" in err and "Traceback" not in err
