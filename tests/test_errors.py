"""Bad input: one clear line on stderr, the right exit code, no traceback, and nothing changed on disk."""

import math
import os
import shutil
import subprocess
import sys
import urllib.request

import common
import pytest
import torch
from helpers import ROOT, SCRIPTS, picture_folder, write_cifar10, write_mnist


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


# Flags of dcgan.py and what the message says; {t} is the test's folder. Exit code 2:
USAGE = {
    **dict.fromkeys(
        ["--dataset imagenet", "--dataset {t}/file", "--dataset {t}/loop", "--dataset digits\a"],
        ": it must be mnist, fashion-mnist, cifar10, digits, or a folder of images",
    ),
    **dict.fromkeys(
        ["--image-size 8", "--image-size 48", "--image-size 2048"], "a power of two from 16 to 1024"
    ),
    **dict.fromkeys(
        [
            f"--{flag} 0"
            for flag in ("image-size", "steps", "n-critic", "width", "log-every", "save-every", "generate")
        ],
        " is 0: it must be 1 or more",
    ),
    **dict.fromkeys(["--image-size big", "--steps 1.5"], "invalid int value"),
    **dict.fromkeys(["--seed -1", "--seed 2147483648"], "0 or more, and below 2^31"),
    **dict.fromkeys(["--lr 0", "--lr=-1e-3"], "it must be above 0"),
    **dict.fromkeys(["--lr nan", "--lr inf"], "a finite number"),
    **dict.fromkeys(["--beta1 1", "--beta2 -0.1"], "it must be in [0, 1)"),
    **dict.fromkeys(["--device tpu", "--device meta"], "it must be one of this machine's: cpu"),
    "--batch-size 1": "--batch-size is 1: it must be 2 or more",
    "--z-dim -1": "--z-dim is -1: it must be 1 or more",
    "--resume --generate 3": "--generate is 3: it must be left out, or --resume",
    "--cuda-graph": "--cuda-graph is True: it must be left out",
    "--epochs 3": "unrecognized arguments: --epochs",
    "--tensorboard": "pip install tensorboard",
}
WORLD = {  # exit code 1
    **{f"--dataset digits --out-dir {{t}}/{x}": f"{x}'" for x in ("file", "file/x", "loop")},
    **dict.fromkeys(["--resume --out-dir {t}/x", "--generate 3 --out-dir {t}/x"], "checkpoint.pt is missing"),
    **dict.fromkeys(["--dataset {t}/empty", "--dataset {t}/texts"], "holds no images"),
    **{f"--data-dir {{t}}/{x}": "is damaged, or missing" for x in ("cut", "half", "wrong", "labels", "no")},
    "--data-dir {t}/none": "cannot be downloaded",
    "--data-dir {t}/label200": "labels up to 200",
    "--dataset cifar10 --data-dir {t}/cifar": "is damaged, or missing",
    "--dataset {t}/broken": "holds 3 image files, of which none can be read",
    "--dataset {t}/pictures --data-dir {t}/file": "cannot be written",
}  # fmt: skip


@pytest.mark.parametrize("flags", [*USAGE, *WORLD])
def test_bad_arguments_and_data(flags, tmp_path, capsys, monkeypatch):
    t = tmp_path / "t"
    picture_folder(t / "pictures")
    (t / "file").write_text("content")
    (t / "loop").symlink_to(t / "loop")
    for folder in ("empty", "texts", "broken", "no", "none/MNIST/raw"):
        (t / folder).mkdir(parents=True)
    for path in ("texts/notes.txt", "broken/text.jpg", "no/MNIST"):
        (t / path).write_text("text")
    (t / "broken" / "zero.png").touch()
    (t / "broken" / "cut.png").write_bytes((t / "pictures" / "picture0.png").read_bytes()[:60])
    images, labels = (f"MNIST/raw/train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for folder in ("cut", "half", "wrong", "labels", "label200"):
        write_mnist(t / folder)
    os.truncate(t / "cut" / images, 5000)
    (t / "half" / images).unlink()
    (t / "wrong" / images).write_text("not an idx file at all")
    shutil.copy(t / "labels" / labels, t / "labels" / images)
    (t / "label200" / labels).write_bytes((t / "half" / labels).read_bytes()[:-1] + bytes([200]))
    with pytest.MonkeyPatch.context() as m:
        write_cifar10(t / "cifar", m)  # torchvision's own checksums are those of the real files
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(urllib.request, "urlopen", None)  # no network
    monkeypatch.chdir(t)
    before = tree(t)
    argv = ["--steps", "1", "--width", "4", *flags.format(t=t).split(" ")]  # should one be missed
    with pytest.raises((SystemExit, OSError)) as stop:
        SCRIPTS["dcgan"].main(argv if "--device" in flags else [*argv, "--device", "cpu"])
    if isinstance(stop.value, OSError):
        common._one_line_excepthook(OSError, stop.value, None)
    err = capsys.readouterr().err
    code = getattr(stop.value, "code", 1)
    if isinstance(code, str):  # Python prints it and exits with 1
        err, code = err + code + "\n", 1
    assert code == (2 if flags in USAGE else 1)
    assert {**USAGE, **WORLD}[flags] in err
    said = ("images of", "image/s")  # what was loaded, and how fast, may come first
    lines = [line for line in err.splitlines() if line and not any(word in line for word in said)]
    assert len(lines) == 1 and "Traceback" not in err and "\a" not in err
    assert tree(t) == before


def edited(edit):
    """Puts a checkpoint in the place of another, with one thing changed in it."""

    def corrupt(path):
        saved = torch.load(path, weights_only=True)
        edit(saved)
        torch.save(saved, path)

    return corrupt


def weights(saved):
    return saved["state"]["G"]


def adam(saved):
    return saved["state"]["opt_D"]["state"][0]


BAD_CHECKPOINTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a foreign pickle": lambda path: torch.save({"model": print}, path),
    "another dictionary": lambda path: torch.save({"state_dict": {}}, path),
    "another script's": edited(lambda saved: saved.update(script="wgan")),
    "a part missing": edited(lambda saved: weights(saved).popitem()),
    "a NaN in the weights": edited(lambda saved: weights(saved)["net.0.weight"].view(-1)[3:].fill_(math.nan)),
    "a weight of another shape": edited(lambda saved: weights(saved).update({"net.0.weight": torch.ones(3)})),
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
    assert f"{path} is missing, damaged, or no checkpoint of this dcgan.py" in stop.value.code
    assert "\n" not in stop.value.code and "weights_only" not in stop.value.code
    assert tree(tmp_path) == before


def test_a_run_is_never_overwritten(tmp_path):
    argv = good_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(
        SystemExit, match=r"holds a run: .* --resume continues it; or choose another --out-dir"
    ):
        SCRIPTS["dcgan"].main(argv.split())
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
    with pytest.raises(SystemExit, match="holds a run"):
        good_run(tmp_path)
    assert before and tree(tmp_path / "run") == before


def test_cgan_needs_labels(tmp_path):
    flat = picture_folder(tmp_path / "pictures", (0, 1))
    before = tree(tmp_path)
    with pytest.raises(SystemExit, match="holds no images in one subfolder per class"):
        SCRIPTS["cgan"].main(f"--dataset {flat} --data-dir {tmp_path}/data --out-dir {tmp_path}/run".split())
    assert tree(tmp_path) == before


def test_variant_flags(capsys):
    for name, flags, message in (
        ("wgan", "--clip 0", "--clip is 0.0: it must be above 0"),
        ("wgan", "--alpha 1", "--alpha is 1.0: it must be in [0, 1)"),
        ("wgan_gp", "--gp-weight -1", "--gp-weight is -1.0: it must be 0 or more"),
        ("lsgan", "--a nan", "--a is nan: it must be a finite number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            SCRIPTS[name].parse_args(f"--dataset digits {flags}".split())
        assert message in capsys.readouterr().err


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
    for flags, code, start in (
        ("--lr 0", 2, "dcgan.py: error: --lr is"),
        (f"--dataset {tmp_path}", 1, "error: "),
    ):
        command = [sys.executable, str(ROOT / "dcgan.py"), "--device", "cpu", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code and done.stderr.count("\n") == 1 and done.stderr.startswith(start)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_world_are_one_line(capsys):
    common._one_line_excepthook(PermissionError, PermissionError(13, "Permission denied", "/x"), None)
    common._one_line_excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "Permission denied" in err
    for kind, text in ((torch.OutOfMemoryError, "CUDA\nout of memory"), (MemoryError, ""),
                       (RuntimeError, "can't allocate memory")):  # fmt: skip
        common._one_line_excepthook(kind, kind(text), None)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "lower --batch-size, --width or --image-size" in err
    bug = RuntimeError("CUDA error: an illegal memory access was encountered")
    common._one_line_excepthook(RuntimeError, bug, None)
    assert "illegal memory access" in capsys.readouterr().err, "a bug keeps its traceback"


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
    out, defaults = (
        " ".join(capsys.readouterr().out.split()),
        "64 5e-05 0.99 0.01 mnist 20000",
    )
    assert all(f"(default: {default})" in out for default in defaults.split())
