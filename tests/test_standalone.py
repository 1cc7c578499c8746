"""The copy test: each script as one file, written by tools/standalone.py, trains as it does in the
collection."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standalone
import torch
from helpers import (
    ROOT,
    SCRIPTS,
    checkpoint,
    picture_folder,
    same,
    small_flags,
    train,
    write_mnist,
)
from tqdm import tqdm

import runs

COPIED = [name for name in SCRIPTS if f"{name}.py" not in standalone.NOT_COPIED]
FLAGS = ["--steps", "2", "--seed", "3"]

# Runs files as programs, one after the other: its argument has a list of flags for each, as JSON.
RUN_ALL = """
import json, runpy, sys
for file, flags in json.loads(sys.argv[1]).items():
    sys.argv = [file, *flags]
    runpy.run_path(file, run_name="__main__")
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with the copies, trained for two steps on MNIST's files in an isolated Python."""
    folder = tmp_path_factory.mktemp("copies")
    write_mnist(folder / "data")
    programs = {}
    for name in COPIED:
        standalone.main([f"{name}.py", str(folder / f"{name}.py")])
        programs[f"{name}.py"] = [*small_flags(name), *FLAGS, "--device", "cpu", "--out-dir", name]
    command = [sys.executable, "-I", "-c", RUN_ALL, json.dumps(programs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_trains_as_the_script_does(name, copies, monkeypatch):
    """From one seed: a copy has none for each step."""
    monkeypatch.setattr(runs, "steps", lambda args, done: tqdm(range(1, args.steps + 1)))
    train(name, "run", *FLAGS, "--data-dir", copies / "data", data="mnist")
    copied = torch.load(copies / name / "weights.pt", weights_only=True)
    ours = checkpoint("run")["state"]
    assert len(copied) >= 2 and ("average" in copied) == ("average" in ours)
    assert all(same(copied[part], ours[part]) for part in copied)
    assert [file.name for file in (copies / name).glob("*.png")] == ["000002.png"]


@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff")
def test_the_copies_are_formatted_and_without_leftovers(copies):
    for command in (["check"], ["format", "--check"]):
        ruff = ["ruff", *command, "--config", str(ROOT / "pyproject.toml"), str(copies)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", COPIED)
def test_a_copy_does_not_speak_of_what_it_lacks(name, copies):
    text = (copies / f"{name}.py").read_text("utf-8")
    lacking = ("--resume", "--init", "--generate", "log.csv", "CUDA graph", "replay", "processes")
    assert not [word for word in lacking if word in text]


def test_a_copy_reads_a_folder_of_class_folders(copies, monkeypatch):
    picture_folder(Path("pictures"), (0, 1), classes=True)
    monkeypatch.syspath_prepend(copies)
    monkeypatch.delitem(sys.modules, "cgan")
    import cgan

    args = cgan.parse_args(["--dataset", "pictures", "--image-size", "32", "--device", "cpu"])
    images, labels = cgan.load_data(args)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("tricks.py mine.py", "tricks.py uses more of common.py and runs.py than this can replace"),
        ("nothing.py mine.py", "nothing.py is not a script of this collection"),
        ("common.py mine.py", "common.py is not a script of this collection"),
        ("dcgan.py there.py", "there.py exists: choose another name"),
    ],
)
def test_what_cannot_be_copied(argv, message):
    Path("there.py").write_text("mine")
    with pytest.raises(SystemExit, match=message):
        standalone.main(argv.split())
    assert Path("there.py").read_text() == "mine" and not Path("mine.py").exists()
