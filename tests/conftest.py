import signal

import pytest
import torch

# The networks of the tests are too small to be worth splitting between cores.
torch.set_num_threads(1)

# As in a terminal, also where pytest was started by nohup or in the background, which ignore some.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes the directory that pytest was started in."""
    monkeypatch.chdir(tmp_path)
