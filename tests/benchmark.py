"""How fast the scripts' own loops are, and where the time goes.

    python tests/benchmark.py [--device cuda] [--dataset mnist --data-dir data]

For each script, at its defaults for 32 px and at 64 px, two ways of training the same networks with the same
losses, in this process, in turns: ours, the script's own main loop; and the usual way, torchvision's dataset
in a DataLoader with 2 workers, PyTorch's default optimiser, D not frozen for G, `.item()` of every loss.

images/s counts the real images that D sees. overhead is the share of our loop that is not d_step and g_step,
measured by leaving these out. Medians over `--rounds` turns of about `--seconds` each, after a
warm-up; the device is synchronised around every turn.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")


def usual_batches(args, data):
    middle = [0.5] * data.channels
    steps = [transforms.Resize(args.image_size), transforms.ToTensor(), transforms.Normalize(middle, middle)]
    dataset_class = getattr(datasets, common._TORCHVISION[args.dataset])
    dataset = dataset_class(args.data_dir, transform=transforms.Compose(steps))
    batch = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True}
    workers = {"num_workers": 2, "persistent_workers": True, "pin_memory": args.device != "cpu"}
    loader = torch.utils.data.DataLoader(dataset, **batch, **workers)
    while True:
        for x, y in loader:
            yield x.to(args.device), y.to(args.device)


def measure(name, argv, rounds, seconds):
    """Medians of the seconds per step: ours, usual, and the loop without its step; and the images per step.

    Runs the script's main, with an iterator in the place of `common.steps` that looks at the clock between
    the steps, and takes the usual way's turns while the script's loop waits for its next step.
    """
    real_cuda_graphs, real_open_run, real_load_data = common.cuda_graphs, common.open_run, common.load_data
    times = {"ours": [], "usual": [], "empty": []}
    run, stepping, optimisers = SimpleNamespace(), True, None

    def load_data(args, **labelled):
        run.data = real_load_data(args, **labelled)
        return run.data

    def open_run(args, state):
        run.args, run.state = args, state
        return real_open_run(args, state)

    def cuda_graphs(args, d_step, g_step):
        run.d_step, run.g_step = d_step, g_step
        d_graphed, g_graphed = real_cuda_graphs(args, d_step, g_step)
        nothing = torch.zeros((), device=args.device)
        return (
            lambda *batch: d_graphed(*batch) if stepping else (nothing, nothing, nothing),
            lambda *y: g_graphed(*y) if stepping else nothing,
        )

    def now():
        if torch.device(run.args.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def usual(n, batches):
        D = run.state["D"].requires_grad_(True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(D, "requires_grad_"))
            for which, optimiser in optimisers.items():
                stack.enter_context(mock.patch.object(run.state[which], "step", optimiser.step))
            start = now()
            for _ in range(n):
                for _ in range(run.args.n_critic):
                    x_real, *y = next(batches)[: 2 if name == "cgan" else 1]
                    for loss in run.d_step(x_real, *y):
                        loss.item()
                run.g_step(*y).item()
            return (now() - start) / n

    def ours(n, count):
        start = now()
        for _ in range(n):
            step = next(count)
            yield step, step % run.args.log_every == 0, False
        times["ours" if stepping else "empty"].append((now() - start) / n)

    def steps(args, first):
        nonlocal stepping, optimisers
        args.run.started = time.monotonic()
        optimisers = {which: plain(run.state[which]) for which in ("opt_G", "opt_D")}
        batches, count = usual_batches(run.args, run.data), itertools.count(1)
        for _ in range(4):  # warm-up, and the capture of the CUDA graphs
            yield next(count), False, False
        usual(2, batches)
        n = max(1, round(seconds / usual(2, batches)))
        for _ in range(rounds):
            yield from ours(n, count)
            stepping = False
            yield from ours(10 * n, count)
            stepping = True
            usual(min(n, 5), batches)  # uses up what the workers loaded while ours had its turn
            times["usual"].append(usual(n, batches))

    patches = {"steps": steps, "cuda_graphs": cuda_graphs, "open_run": open_run, "load_data": load_data}
    with mock.patch.multiple(common, **patches):
        importlib.import_module(name).main(argv)
    return {way: statistics.median(t) for way, t in times.items()}, run.args.batch_size * run.args.n_critic


def plain(optimiser):
    """The same optimiser as torch makes it by default: neither fused nor capturable."""
    group = optimiser.param_groups[0]
    settings = {k: group[k] for k in ("lr", "betas", "alpha", "momentum") if k in group}
    return type(optimiser)(group["params"], **settings)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("scripts", nargs="*", help="all seven when none is named")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dataset", default="mnist", choices=common._TORCHVISION)
    p.add_argument("--data-dir", default="data")
    p.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=3.0, help="of one way in one round")
    p.add_argument("--cuda-graph", action="store_true")
    args = p.parse_args()
    if unknown := set(args.scripts) - set(NAMES):
        p.error(f"no such script: {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")

    cuda = torch.device(args.device).type == "cuda"
    hardware = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"{args.dataset} on {hardware}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; images/s:")
    print(f"{'script':8} {'px':>3} {'ours':>9} {'usual':>9} {'ratio':>6} {'overhead':>9}", flush=True)
    for size, name in itertools.product(args.sizes, args.scripts or NAMES):
        with tempfile.TemporaryDirectory() as out:
            argv = f"--dataset {args.dataset} --data-dir {args.data_dir} --device {args.device}"
            argv += f" --out-dir {out}/run --image-size {size} --steps {10**9} --save-every {10**8}"
            argv = argv.split() + ["--cuda-graph"] * args.cuda_graph
            seconds, images = measure(name, argv, args.rounds, args.seconds)
        print(
            f"{name:8} {size:3} {images / seconds['ours']:9.0f} {images / seconds['usual']:9.0f} "
            f"{seconds['usual'] / seconds['ours']:6.2f} {seconds['empty'] / seconds['ours']:9.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
