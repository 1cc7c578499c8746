import signal
import threading

import pytest
import torch
from tqdm import tqdm

# The networks of the tests are too small to be worth splitting between cores.
torch.set_num_threads(1)

# As in a terminal, also where pytest was started by nohup or in the background, which ignore some.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# tqdm's own lock is shared with forked children: one that is killed while it holds it would stop everything.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes the directory that pytest was started in."""
    monkeypatch.chdir(tmp_path)
