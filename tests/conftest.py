import pytest
import torch

# The networks of the tests are too small to be worth splitting between cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or writes the directory that pytest was started in."""
    monkeypatch.chdir(tmp_path)
