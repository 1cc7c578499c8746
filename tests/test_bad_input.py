"""Bad input: one clear line on stderr, the right exit code, and nothing changed on disk."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SCRIPTS, checkpoint, picture_folder, train, write_cifar10, write_mnist

import common
import eight_gaussians
import runs


def tree():
    """Every file below this folder with what it holds, and every link."""
    paths = [p for p in sorted(Path().rglob("*")) if p.is_file() or p.is_symlink()]
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


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
    assert line.count("\n") == 1
    assert tree() == before
    return line, code


FLAGS = {
    "--image-size 48": "512, 1024, not 48: images are cropped to squares",
    "--image-size 256x192": "argument --image-size: must be one of 16, 32, ",
    **{
        f"--{flag} 0": f"argument --{flag}: must be a whole number, 1 or more, not 0"
        for flag in ("steps", "n-critic", "width", "log-every", "save-every", "generate", "z-dim")
    },
    "--steps 1e3": "argument --steps: must be a whole number, 1 or more, not 1e3",
    "--seed -1": "argument --seed: must be finite and not negative, not -1",
    "--lr fast": "argument --lr: invalid float value: 'fast'",
    "--seed 18446744073709551616": "argument --seed: must be finite and not negative, not 184467",
    "--lr nan": "argument --lr: must be finite and not negative, not nan",
    "--beta1 -1": "argument --beta1: must be finite and not negative, not -1",
    "--device tpu": f"tpu is not a device that PyTorch {torch.__version__} finds: cpu",
    "--resume --generate 3": "argument --generate: not allowed with argument --resume",
    "--resume --overwrite": "argument --overwrite: not allowed with argument --resume",
    "--resume --init x": "--init begins a new run: leave out --resume and --generate",
    "--out-dir new --init new/checkpoint.pt": "new/checkpoint.pt is in --out-dir, whose",
    "--epochs 3": "unrecognized arguments: --epochs 3: did you mean --steps?",
    "--batch_size 64": "unrecognized arguments: --batch_size 64: did you mean --batch-size?",
    "--cuda": "unrecognized arguments: --cuda\n",
    "--out-dir file": "--out-dir file cannot be used: ",
    "--out-dir file/below": "--out-dir file/below cannot be used: ",
    f"--out-dir {'long' * 100}": "cannot be used: ",
    f"--dataset {'long' * 100}": "cannot be used: ",
    "--tensorboard": "pip install tensorboard",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(flags, capsys, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    Path("file").touch()
    line, code = refused("dcgan", flags.split(), capsys)
    assert code == 2 and line.startswith("dcgan.py: error: ") and FLAGS[flags] in line


OWN_FLAGS = {
    "wgan": ("--clip -1",),
    "wgan_gp": ("--gp-weight -1",),
    "lsgan": ("--a nan",),
    "cgan": ("--label 1",),
    "ebgan": ("--batch-size 1",),
    "ssgan": ("--batch-size 1",),
    "stacked_gan": ("--batch-size 1", "--init x"),
    "r3gan": ("--width 12",),
    "stylegan": ("--truncation 0.5",),
    "tricks": ("--noise -1", "--r1 nan", "--minibatch-kernels 3 --r1 1"),
}


@pytest.mark.parametrize("name", OWN_FLAGS)
def test_bad_flags_of_one_script(name, capsys):
    for flags in OWN_FLAGS[name]:
        line, code = refused(name, flags.split(), capsys)
        assert code == 2 and flags.split()[0] in line


def test_targets_may_be_negative():
    assert SCRIPTS["lsgan"].parse_args(["--a", "-1"]).a == -1


DATA = {
    "--dataset imagenet": "imagenet is not a folder. --dataset is mnist, fashion-mnist, cifar10, ",
    "--dataset file": "file is not a folder. --dataset is mnist, fashion-mnist, cifar10, digits",
    "--dataset empty": "empty, which holds no files",
    "--dataset texts": "texts, which holds notes.txt",
    "--dataset broken": "broken can be read: cut.png (OSError: image file is truncated), ",
    "--data-dir cut": "cannot load mnist from ",
    "--data-dir half": "half (RuntimeError: Error downloading train-images",
    "--data-dir wrong": "cannot load mnist from ",
    "--data-dir labels": "cannot load mnist from ",
    "--data-dir none/deep": "deep (RuntimeError: Error downloading train-images",
    "--data-dir fewer": "(ValueError: there are 20 images, but 19 labels)",
    "--dataset cifar10 --data-dir cifar": "cannot load cifar10 from ",
}


@pytest.mark.parametrize("flags", DATA)
def test_missing_and_damaged_data(flags, capsys, monkeypatch):
    picture_folder(Path("pictures"))
    Path("file").write_text("content")
    for folder in ("empty", "texts", "broken", "none"):
        Path(folder).mkdir(parents=True)
    Path("texts/notes.txt").write_text("text")
    Path("broken/text.jpg").write_text("text")
    Path("broken/zero.png").touch()
    Path("broken/cut.png").write_bytes(Path("pictures/picture0.png").read_bytes()[:60])
    images, labels = (f"MNIST/raw/train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for folder in ("cut", "half", "wrong", "labels", "fewer"):
        write_mnist(folder)
    os.truncate(f"cut/{images}", 5000)
    Path("half", images).unlink()
    Path("wrong", images).write_text("not an idx file at all")
    shutil.copy(f"labels/{labels}", f"labels/{images}")
    header = struct.pack(">II", 2049, 19)
    Path("fewer", labels).write_bytes(header + Path("half", labels).read_bytes()[8:-1])
    with pytest.MonkeyPatch.context() as m:
        write_cifar10("cifar", m)  # torchvision's own checksums are those of the real files

    def forbidden(*_, **__):
        raise urllib.error.HTTPError("http://here", 403, "Forbidden", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    line, code = refused("dcgan", ["--device", "cpu", *flags.split()], capsys)
    assert code == 1 and line.startswith("error: ") and DATA[flags] in line


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


DAMAGED = r"cannot load run.checkpoint\.pt \("


class Mark:
    """What would leave a mark if it were unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("mark",))


CHECKPOINTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), DAMAGED),
    "one bit": (change_a_bit, "ValueError: the checksum of archive/data/[0-9]+ is wrong"),
    "a program": (lambda path: path.write_bytes(pickle.dumps(Mark())), DAMAGED),
    "a newer program": (lambda path: torch.save(Mark(), path), DAMAGED),
    "another dict": (lambda path: torch.save({"G": {}}, path), "is not a checkpoint of this"),
    "another script's": (
        edit(lambda saved: saved["args"].update(script="wgan")),
        "checkpoint.pt was written by wgan.py, not by dcgan.py",
    ),
    "a weight missing": (
        edit(lambda saved: saved["state"]["G"].popitem()),
        "checkpoint.pt does not fit: G: Missing key",
    ),
    "no optimiser": (edit(lambda saved: saved["state"].pop("opt_D")), "fit: it has no opt_D"),
    "other moments": (
        edit(lambda saved: saved["state"]["opt_G"]["state"][0].update(exp_avg=torch.zeros(3))),
        "does not fit: opt_G: the shape of exp_avg 0 differs",
    ),
    "another tensor": (
        edit(lambda saved: saved["state"].update(fixed_z=torch.zeros(1, 6))),
        r"does not fit: fixed_z: its shape was \(1, 6\), and is \(64, 6\) now",
    ),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_bad_checkpoints(how, capsys):
    train("dcgan", "run", "--steps", 1)
    damage, message = CHECKPOINTS[how]
    damage(Path("run/checkpoint.pt"))
    capsys.readouterr()
    before = tree()
    for flags in ("--resume --steps 9", "--generate 3"):
        with pytest.raises(SystemExit, match=message):
            SCRIPTS["dcgan"].main(f"--out-dir run --device cpu {flags}".split())
        assert tree() == before and not Path("mark").exists()


def test_resume_of_a_finished_run_says_so(capsys):
    train("dcgan", "run", "--steps", 5)
    line, code = refused("dcgan", ["--out-dir", "run", "--resume"], capsys)
    assert code == 1 and "run is already at step 5: raise --steps" in line


def test_resume_and_generate_need_a_checkpoint(capsys):
    for flags in (["--resume"], ["--generate", "3"]):
        line, code = refused("dcgan", flags, capsys)
        file = Path("runs", "dcgan-mnist", "checkpoint.pt")
        assert code == 1 and f"there is no {file}: set --out-dir to the folder of a run" in line


def test_a_new_run_needs_an_empty_folder(capsys):
    """Anything but a hidden file is in its way. --overwrite replaces a run of ours, and nothing
    else."""
    train("dcgan", "run", "--steps", 5)
    argv = ["--dataset", "pictures", "--out-dir"]
    line, code = refused("dcgan", [*argv, "run"], capsys)
    message = "run holds a run: --resume it, --overwrite it, or choose another --out-dir"
    assert code == 2 and message in line
    for k, name in enumerate(("args.json", "log.csv", "samples/000123.png", "checkpoint.pt")):
        file = Path(f"mine{k}", name)
        file.parent.mkdir(parents=True)
        file.write_text('{"lr": 1, "script": "train.sh"}')
        for flags in ([], ["--overwrite"]):
            for script in ("dcgan", "eight_gaussians"):
                main = (SCRIPTS.get(script) or eight_gaussians).main
                before = tree()
                with pytest.raises(SystemExit):
                    main(["--out-dir", f"mine{k}", *flags])
                message = f"mine{k} is not empty: choose another --out-dir"
                assert message in capsys.readouterr().err and tree() == before
    with pytest.raises(SystemExit):
        eight_gaussians.main(["--out-dir", "run", "--overwrite"])
    assert "run holds a run of another script" in capsys.readouterr().err
    Path("hidden").mkdir()
    Path("hidden/.DS_Store").touch()
    train("dcgan", "hidden", "--steps", 1)


def test_of_two_runs_that_begin_together_one_has_the_folder():
    data = picture_folder(Path("pictures"))
    args = SCRIPTS["dcgan"].parse_args(["--dataset", str(data), "--out-dir", "run"])
    Path("run/args.json").write_text("another's")
    with pytest.raises(SystemExit, match=r"args.json cannot be created: File exists"):
        runs.start_run(args, common.Data(1, 3, []), {})
    assert Path("run/args.json").read_text() == "another's"


@pytest.mark.skipif(sys.platform == "win32", reason="makes symbolic links")
@pytest.mark.parametrize(
    "name, kind",
    [("samples", "link"), ("samples", "file"), ("checkpoint.pt", "link"), ("log.csv", "folder")],
)
def test_overwrite_looks_before_it_deletes(name, kind):
    """A link, or a folder in the place of a file, is not what a run has made."""
    train("dcgan", "run", "--steps", 1)
    path = Path("run", name)
    if path.exists():
        path.rename("moved")
    if kind == "link":
        path.symlink_to(Path("moved").absolute())
    elif kind == "file":
        path.write_text("a file")
    else:
        path.mkdir()
    before = tree()
    with pytest.raises(SystemExit, match=f"{path.name} is not the (file|folder) that a run makes"):
        train("dcgan", "run", "--steps", 1, "--overwrite")
    assert tree() == before


def test_resume_and_init_say_how_the_data_differ(capsys):
    """Other channels do not fit."""
    train("dcgan", "run", "--steps", 5)
    Path("pictures").rename("before")
    picture_folder(Path("pictures/class0"))
    picture_folder(Path("pictures/class7"), (0, 1))
    number = "the data were 2 images, and are 3 now\n"
    classes = "the classes were class0, class1, and are class0, class7 now: they are matched by "
    for run, flags in (("new", ["--init", "run/checkpoint.pt"]), ("run", ["--resume"])):
        train("dcgan", run, "--steps", 6, *flags)
        err = capsys.readouterr().err
        assert number in err and classes + "their order\n" in err
    write_mnist("data")
    with pytest.raises(SystemExit, match=r"does not fit: G: size mismatch for net\."):
        train("dcgan", "run", "--steps", 7, "--resume", data="mnist")
    assert "the classes were class0, class7, and are 0 - zero" in capsys.readouterr().err
    assert checkpoint("run")["step"] == 6


def test_init_takes_any_checkpoint_that_fits():
    """Such as dcgan.py's in lsgan.py, or in a copy of it."""
    train("dcgan", "run", "--steps", 5)
    init = ["--init", "run/checkpoint.pt"]
    train("lsgan", "new", "--steps", 1, "--lr", 0, *init)
    weights = [checkpoint(run)["state"]["D"]["net.0.weight"] for run in ("run", "new")]
    assert torch.equal(*weights)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt does not fit: G: size mismatch for net"):
        train("dcgan", "other", "--steps", 5, *init, "--width", 12)
    with pytest.raises(SystemExit, match=r"cannot load other\.pt \(FileNotFoundError: "):
        train("dcgan", "another", "--steps", 5, "--init", "other.pt")


@pytest.mark.parametrize("name", ["cgan", "stacked_gan", "ssgan"])
def test_classes_are_needed(name):
    picture_folder(Path("flat"), (0, 1))
    with pytest.raises(SystemExit, match=r"flat has no (classes|labels)"):
        train(name, "run", data="flat")


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


def test_as_a_program():
    """Through the shell: exit code, and one line."""
    command = [sys.executable, str(ROOT / "dcgan.py"), "--device", "cpu", "--dataset", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "is not a folder" in done.stderr


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        SCRIPTS["wgan"].parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for default in ["64", "5e-05", "0.01", "mnist", "20000"]:
        assert f"(default: {default})" in out
    assert "None" not in out and "False" not in out and "True" not in out
