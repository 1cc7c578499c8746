"""How fast the scripts train, and where the time goes.

    python tools/benchmark.py [--device cuda] [--dataset mnist --data-dir data]

For each of seven scripts, at its defaults for 32 px and at 64 px, it times two ways of training the
same networks with the same losses, taking turns in one process. One is the loop of the script. The
usual way has torchvision's dataset in a DataLoader with 2 workers, PyTorch's default optimiser,
gradients of D also in G's update, and `.item()` of every value in every step.

images/s counts the real images that D sees. overhead is what the loop adds to its calls of
`update`: progress bar and log. Medians over `--rounds` turns of about `--seconds` each, after a
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
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import runs

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")


class Done(Exception):
    """Ends a script's loop."""


def usual_batches(args, channels):
    """Endless minibatches of a torchvision dataset, by a DataLoader."""
    middle = [0.5] * channels
    steps = [
        transforms.Resize(args.image_size),
        transforms.ToTensor(),
        transforms.Normalize(middle, middle),
    ]
    dataset_class = common.TORCHVISION_DATASETS[args.dataset]
    dataset = dataset_class(args.data_dir, transform=transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=args.device != "cpu",
    )
    while True:
        for x, y in loader:
            yield x.to(args.device), y.to(args.device)


def plain(optimiser):
    """The same optimiser as torch makes it by default: neither fused nor capturable."""
    group = optimiser.param_groups[0]
    settings = {k: group[k] for k in ("lr", "betas") if k in group}
    return type(optimiser)(group["params"], **settings)


def measure(name, argv, rounds, seconds):
    """Medians of the seconds per step of our loop, of its updates alone, and of the usual way, by
    name; and the number of images per step.

    Runs the script's main, whose calls of `runs.log` say when a turn of its loop has ended; the
    other turns are taken in between.
    """
    times = {"ours": [], "updates": [], "usual": []}
    run = SimpleNamespace(step=None, started=None)

    def now():
        if run.args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def start_run(args, data, state, start_run=runs.start_run):
        run.args, run.state = args, state
        run.optimisers = {k: plain(state[k]) for k in ("opt_G", "opt_D")}
        run.batches = usual_batches(args, data.channels)
        return start_run(args, data, state)

    def cuda_graph(args, data, update, cuda_graph=runs.cuda_graph):
        run.plain_update = update
        run.update = cuda_graph(args, data, update)
        return run.update

    def updates(n):
        start = now()
        for _ in range(n):
            run.update()
        return (now() - start) / n

    def usual(n):
        D = run.state["D"].requires_grad_(True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(D, "requires_grad_"))
            stack.enter_context(
                mock.patch.object(common, "sample_batch", lambda *_: next(run.batches))
            )
            for which, optimiser in run.optimisers.items():
                stack.enter_context(mock.patch.object(run.state[which], "step", optimiser.step))
            start = now()
            for _ in range(n):
                for value in run.plain_update().values():
                    value.item()
            return (now() - start) / n

    def log(args, step, values, log=runs.log):
        numbers = log(args, step, values)
        if run.step is None:
            usual(2)  # starts the workers
            args.log_every = max(1, round(seconds / usual(2)))
        else:
            n = step - run.step
            times["ours"].append((now() - run.started) / n)
            times["updates"].append(updates(n))
            usual(min(n, 5))  # uses up what the workers loaded during our turns
            times["usual"].append(usual(n))
        if len(times["usual"]) == rounds:
            raise Done
        run.step, run.started = step, now()
        return numbers

    patches = {"start_run": start_run, "cuda_graph": cuda_graph, "log": log}
    with mock.patch.multiple(runs, **patches), contextlib.suppress(Done):
        importlib.import_module(name).main(argv)
    medians = {way: statistics.median(t) for way, t in times.items()}
    return medians, run.args.batch_size * run.args.n_critic


def main(argv=None):
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("scripts", nargs="*", help="all seven when none is named")
    p.add_argument("--device", type=runs.device, default="cpu")
    p.add_argument("--dataset", default="mnist", choices=common.TORCHVISION_DATASETS)
    p.add_argument("--data-dir", type=os.path.expanduser, default="data")
    p.add_argument("--sizes", type=runs.image_size, nargs="+", default=[32, 64])
    p.add_argument("--rounds", type=runs.positive_int, default=5)
    p.add_argument("--seconds", type=float, default=3.0, help="length of one turn")
    p.add_argument("--no-cuda-graph", action="store_true")
    args = p.parse_args(argv)
    if unknown := set(args.scripts) - set(NAMES):
        p.error(f"no such script: {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")

    cuda = torch.device(args.device).type == "cuda"
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    if cuda:
        hardware = torch.cuda.get_device_name(args.device)
    versions = f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{args.dataset} on {hardware}, {versions}; images/s:")
    print(
        f"{'script':8} {'px':>3} {'ours':>9} {'usual':>9} {'ratio':>6} {'overhead':>9}", flush=True
    )
    for size, name in itertools.product(args.sizes, args.scripts or NAMES):
        with tempfile.TemporaryDirectory() as out:
            argv = ["--dataset", args.dataset, "--data-dir", args.data_dir]
            argv += ["--out-dir", str(Path(out, "run")), "--device", args.device]
            argv += ["--image-size", str(size), "--steps", str(10**6)]
            argv += ["--log-every", "5", "--save-every", str(10**8)]
            if args.no_cuda_graph:
                argv += ["--no-cuda-graph"]
            seconds, images = measure(name, argv, args.rounds, args.seconds)
        ours, usual, updates = (seconds[way] for way in ("ours", "usual", "updates"))
        print(
            f"{name:8} {size:3} {images / ours:9.0f} {images / usual:9.0f} "
            f"{usual / ours:6.2f} {ours / updates - 1:9.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
