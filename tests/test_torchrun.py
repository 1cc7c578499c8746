"""Two processes, started once by torchrun on the CPU: they train one network together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    BY_TORCHRUN,
    ROOT,
    WITHOUT_N_CRITIC,
    checkpoint,
    class_folder,
    log_rows,
    picture_folder,
    same,
    train,
)

import common
import dcgan

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes saved, by rank, their folder, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    picture_folder(folder / "pictures", (0, 1), classes=True)
    class_folder(folder / "many")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    program = [*command, str(ROOT / "tests" / "two_processes.py")]
    done = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return saved, folder, done.stderr


@pytest.mark.parametrize("name", BY_TORCHRUN)
def test_the_networks_stay_equal_and_the_gradients_are_means(both, name):
    first, second = (saved[name] for saved in both[0])
    for part in ("networks", "fixed_z"):
        assert same(first[part], second[part])
    for network in first["networks"]:
        steps = 3 if network[0] == "G" or name in WITHOUT_N_CRITIC else 6
        own, mean = f"opt_{network} own", f"opt_{network} mean"
        assert len(first[own]) == len(first[mean]) == steps
        for k in range(steps):
            expected = (first[own][k] + second[own][k]) / 2
            assert torch.allclose(first[mean][k], expected, atol=1e-7)
            assert torch.equal(first[mean][k], second[mean][k])
        assert not same(first[own], second[own]), "noise and images of its own"


def test_a_resumed_run_equals_an_uninterrupted_one(both):
    _, folder, _ = both
    whole, parts = checkpoint(folder / "whole"), checkpoint(folder / "parts")
    assert same(whole, parts)
    assert log_rows(folder / "whole") == log_rows(folder / "parts")
    assert [row["step"] for row in log_rows(folder / "parts")] == [1, 2, 3, 4, 5, 6]


def test_rank_0_alone_prints_and_writes(both):
    _, folder, printed = both
    assert len(re.findall(r"dcgan on cpu.*: 2 images of 3x16x16", printed)) == 1
    assert printed.count(str(Path("done: dcgan", "samples", "000003.png"))) == 1
    assert printed.count("| 0/3 [00:00<?") == len(BY_TORCHRUN), "a bar each"
    assert printed.count("E classifies") == 1
    assert len(list(folder.glob("dcgan/samples/*.png"))) == 2
    rows = (folder / "whole" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *"123456"]


def test_the_average_of_G_counts_the_images_of_all_processes(both):
    """In stylegan.py, 10,000 are its half-life; here, they come in batches of 4."""
    expected = [0.5 ** (4 / 10_000)] * 3
    assert both[0][0]["betas"] == both[0][1]["betas"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank, expected", [(0, ["load", "wait"]), (1, ["wait", "load"])])
def test_rank_0_downloads_and_the_others_wait(rank, expected, monkeypatch):
    events = []

    def dataset(*args, **kwargs):
        events.append("load")
        images = torch.zeros(1, 28, 28, dtype=torch.uint8)
        return SimpleNamespace(data=images, targets=[0], classes=["a"])

    monkeypatch.setattr(common, "rank", lambda: rank)
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("wait"))
    monkeypatch.setitem(common.TORCHVISION_DATASETS, "mnist", dataset)
    common.load_torchvision("mnist", "data")
    assert events == expected


def test_rank_1_writes_no_grid(monkeypatch):
    monkeypatch.setattr(common, "rank", lambda: 1)
    common.save_grid(SimpleNamespace(out_dir="run"), 0, torch.zeros(4, 1, 8, 8))
    assert not Path("run").exists()


def test_a_loss_that_is_not_finite_anywhere_ends_all(both):
    saved, folder, _ = both
    assert saved[0]["nan"] == saved[1]["nan"] == "error: loss_D is nan at step 7: try a lower --lr"
    assert not (folder / "nan").exists()


def test_the_batch_size_is_the_total_and_one_process_can_go_on(both):
    _, folder, _ = both
    assert checkpoint(folder / "whole")["args"]["batch_size"] == 4
    assert json.loads((folder / "whole" / "args.json").read_text())["batch_size"] == 4
    run = Path(folder, "whole")
    train("dcgan", run, "--resume", "--steps", 7, data=folder / "pictures", small=False)
    assert checkpoint(run)["args"]["batch_size"] == 4 and checkpoint(run)["step"] == 7


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 5", "--batch-size is 5, which 2 processes cannot share equally"),
        ("--out-dir run --generate 3", "--generate needs one process: start it without torchrun"),
    ],
)
def test_what_torchrun_cannot_do(flags, message, monkeypatch, capsys):
    train("dcgan", "run", "--steps", 1)
    environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        dcgan.parse_args(flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_cluster_sets_does_not_make_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train("dcgan", "run", "--steps", 2)
    assert checkpoint("run")["step"] == 2
