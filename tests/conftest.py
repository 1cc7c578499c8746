import torch

# The networks of the tests are too small to be worth splitting between cores.
torch.set_num_threads(1)
