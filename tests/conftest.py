import threading

import pytest
import torch
from tqdm import tqdm

# The networks of the tests are too small to be worth splitting between cores.
torch.set_num_threads(1)

# tqdm shares a lock with forked children: one that is killed while it holds it stops everything.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(autouse=True)
def defaults_of_torch():
    """A test that trains on CUDA switches TF32 and cuDNN's search on, which must not reach the
    tests after it."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes the directory that pytest was started in."""
    monkeypatch.chdir(tmp_path)
