"""Every script starts with its defaults on a machine with a GPU, on Windows, and in a thread."""

import signal
import threading

import pytest
import torch
from helpers import SCRIPTS, picture_folder

SMALL = "--image-size 16 --width 8 --batch-size 4 --z-dim 6 --steps 2 --device cpu"


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_where_there_is_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: None, raising=False)
    assert SCRIPTS[name].parse_args([]).device == "cuda"
    assert SCRIPTS[name].parse_args(["--device", "cuda:1"]).device == "cuda:1"


def test_without_the_signals_that_windows_lacks(tmp_path, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    data = picture_folder(tmp_path / "pictures")
    SCRIPTS["dcgan"].main(f"--dataset {data} --out-dir {tmp_path}/run {SMALL}".split())
    assert (tmp_path / "run" / "samples" / "000002.png").exists()


def test_in_a_thread(tmp_path):
    """As in a notebook or a window, where main is not called by the main thread."""
    data = picture_folder(tmp_path / "pictures")
    argv = f"--dataset {data} --out-dir {tmp_path}/run {SMALL}".split()
    thread = threading.Thread(target=SCRIPTS["dcgan"].main, args=(argv,))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "samples" / "000002.png").exists()
