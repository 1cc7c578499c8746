"""Started by test_torchrun.py with torchrun, in two processes: trains some scripts, and saves what
this process has seen in <rank>.pt."""

from types import SimpleNamespace

import torch
from helpers import BY_TORCHRUN, WITHOUT_N_CRITIC
from helpers import train as train_without_waiting

import common
import runs
import stylegan


def watched_start_run(args, data, state, start_run=runs.start_run):
    """start_run; afterwards `seen` has the state, and each gradient before and after its mean is
    taken."""

    def recorder(name, when):
        def record(optimiser, *_):
            weights = optimiser.param_groups[0]["params"]
            gradients = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
            seen.setdefault(f"{name} {when}", []).append(gradients)

        return record

    optimisers = [name for name in state if name.startswith("opt_")]
    for name in optimisers:
        state[name].register_step_pre_hook(recorder(name, "own"))
    done = start_run(args, data, state)
    for name in optimisers:
        state[name].register_step_pre_hook(recorder(name, "mean"))
    seen.update(state)
    return done


def train(*args, **options):
    """helpers.train; both processes come out of it when rank 0 has written its files."""
    train_without_waiting(*args, **options)
    torch.distributed.barrier()


start_run = runs.start_run
runs.start_run = watched_start_run
results, betas = {}, []
move_average = stylegan.move_average
stylegan.move_average = lambda *args: betas.append(args[2]) or move_average(*args)
for name in BY_TORCHRUN:
    seen = {}
    n_critic = [] if name in WITHOUT_N_CRITIC else ["--n-critic", 2]
    train(name, name, "--steps", 3, "--lr", 0.01, *n_critic)
    results[name] = {key: seen[key] for key in seen if key.endswith((" own", " mean"))}
    networks = [key for key in seen if f"opt_{key}" in seen]
    results[name]["networks"] = {key: dict(seen[key].named_parameters()) for key in networks}
    results[name]["fixed_z"] = seen["fixed_z"]
results["betas"] = betas

seen = {}
train("dcgan", "whole", "--steps", 6, "--save-every", 2, "--log-every", 1)
train("dcgan", "parts", "--steps", 4, "--save-every", 2, "--log-every", 1)
train("dcgan", "parts", "--steps", 6, "--resume", small=False)

try:
    loss = float("nan") if common.rank() == 1 else 0.0
    runs.log(SimpleNamespace(out_dir="nan"), 7, {"loss_D": torch.tensor(loss)})
except SystemExit as end:
    results["nan"] = str(end)
torch.save(results, f"{common.rank()}.pt")
