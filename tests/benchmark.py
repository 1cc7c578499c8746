"""How fast the scripts' own loops are, and where the time goes.

    python tests/benchmark.py [--device cuda] [--dataset mnist --data-dir data] [--json FILE]

For each script, at its defaults for 32 px and at 64 px, two ways of training the same networks with the
same losses, in this process, in turns:

    ours    the script's own main loop, as `python <script>.py` runs it
    usual   torchvision's dataset with its per-image Resize, ToTensor and Normalize in a DataLoader with 2
            workers, eager, the optimiser as PyTorch makes it by default, D not frozen in G's update,
            `.item()` of every loss at every step

images/s counts the real images that D sees. ratio is ours over usual. overhead is the share of our loop that
is not d_step and g_step on ready tensors, measured by leaving these out of the loop. Medians over `--rounds`
turns of about `--seconds` each, after a warm-up; the device is synchronised around every turn.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")
TORCHVISION = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}


@contextlib.contextmanager
def patched(module, **new):
    old = {k: getattr(module, k) for k in new}
    for k, v in new.items():
        setattr(module, k, v)
    try:
        yield
    finally:
        for k, v in old.items():
            setattr(module, k, v)


class Digits(torch.utils.data.Dataset):
    """The built-in digits one PIL image at a time, as torchvision's datasets are read."""

    def __init__(self, data, transform):
        self.images, self.labels = data.images[:, 0].cpu().numpy(), data.labels.cpu()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def usual_dataset(args, data):
    middle = [0.5] * data.images.shape[1]
    steps = [transforms.Resize(args.image_size), transforms.ToTensor(), transforms.Normalize(middle, middle)]
    chain = transforms.Compose(steps)
    if args.dataset == "digits":
        return Digits(data, chain)
    return TORCHVISION[args.dataset](args.data_dir, transform=chain)


def usual_batches(args, data):
    loader = torch.utils.data.DataLoader(
        usual_dataset(args, data),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=args.device != "cpu",
        persistent_workers=True,
    )
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
        with usual_habits(run.state, optimisers):
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
        optimisers = {name: plain(run.state[name]) for name in ("opt_G", "opt_D")}
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

    with patched(common, steps=steps, cuda_graphs=cuda_graphs, open_run=open_run, load_data=load_data):
        importlib.import_module(name).main(argv)
    return {way: statistics.median(t) for way, t in times.items()}, run.args.batch_size * run.args.n_critic


def plain(optimiser):
    """The same optimiser as torch makes it by default: neither fused nor capturable."""
    group = optimiser.param_groups[0]
    settings = {k: group[k] for k in ("lr", "betas", "alpha", "momentum") if k in group}
    return type(optimiser)(group["params"], **settings)


@contextlib.contextmanager
def usual_habits(state, optimisers):
    D = state["D"].requires_grad_(True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(D, requires_grad_=lambda on: D))
        for name, optimiser in optimisers.items():
            stack.enter_context(patched(state[name], step=optimiser.step))
        yield


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("scripts", nargs="*", help="all seven when none is named")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dataset", default="digits", choices=["digits", *TORCHVISION])
    p.add_argument("--data-dir", default="data")
    p.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    p.add_argument("--width", type=int, help="instead of the scripts' defaults")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=3.0, help="of one way in one round")
    p.add_argument("--cuda-graph", action="store_true")
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    if unknown := set(args.scripts) - set(NAMES):
        p.error(f"no such script: {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")

    cuda = torch.device(args.device).type == "cuda"
    about = {
        "hardware": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "dataset": args.dataset,
    }
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(
        f"{'script':8} {'px':>3} {'ours':>9} {'usual':>9} {'ratio':>6} {'overhead':>9}   (images/s)",
        flush=True,
    )
    results = []
    for size, name in itertools.product(args.sizes, args.scripts or NAMES):
        with tempfile.TemporaryDirectory() as out:
            argv = ["--dataset", args.dataset, "--data-dir", args.data_dir, "--device", args.device]
            argv += ["--image-size", str(size), "--out-dir", f"{out}/run", "--steps", str(10**9)]
            argv += ["--save-every", str(10**8)]
            argv += ["--width", str(args.width)] * bool(args.width and name != "gan")
            argv += ["--cuda-graph"] * args.cuda_graph
            seconds, images = measure(name, argv, args.rounds, args.seconds)
        row = {"script": name, "image_size": size, "images_per_step": images}
        row.update({f"{way}_images_per_s": images / seconds[way] for way in ("ours", "usual")})
        row["ratio"] = seconds["usual"] / seconds["ours"]
        row["overhead"] = seconds["empty"] / seconds["ours"]
        results.append(row)
        print(
            f"{name:8} {size:3} {row['ours_images_per_s']:9.0f} {row['usual_images_per_s']:9.0f} "
            f"{row['ratio']:6.2f} {row['overhead']:9.1%}",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
