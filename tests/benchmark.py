"""How fast the scripts' own loops are, and where the time goes.

    python tests/benchmark.py [--device cuda] [--dataset mnist --data-dir data] [--json FILE]

For each script, at its defaults for 32 px and at 64 px, three ways of training the same networks with the
same losses, in this process, in turns:

    ours    the script's own main loop, as `python <script>.py` runs it
    usual   DataLoader with 2 workers and per-image transforms, eager, `.item()` of every loss at every step
    bare    the script's train_step alone, on minibatches that are ready on the device

images/s counts the real images that D sees. ratio is ours over usual; overhead is the share of our loop that
is not the bare step. Medians over `--rounds` turns of about `--seconds` each, after a warm-up; the device is
synchronised around every turn.
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
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")


class OurLoop:
    """A script's main, running in a thread that takes `n` steps whenever `time(n)` asks for them."""

    def __init__(self, name, argv):
        self.go, self.done, self.left, self.ended = threading.Semaphore(0), threading.Semaphore(0), 0, False
        self.error = None
        self.script = importlib.import_module(name)
        self.thread = threading.Thread(target=self._main, args=(argv,), daemon=True)
        self.thread.start()
        self._wait()

    def _wait(self):
        self.done.acquire()
        if self.error is not None:
            sys.exit(f"{self.script.__name__}.py stopped: {self.error}")

    def _main(self, argv):
        try:
            self._run(argv)
        except BaseException as e:  # an exit in a thread would leave the benchmark waiting
            self.error = e
            self.done.release()

    def _run(self, argv):
        loop, cuda_graph, open_run = self, common.cuda_graph, common.open_run

        class Steps(common.steps):
            def __iter__(self):
                loop.done.release()
                for step in itertools.count(1):
                    if loop.left == 0:
                        loop.go.acquire()
                    if loop.ended:
                        return
                    yield step
                    loop.left -= 1
                    if loop.left == 0:
                        synchronise(loop.args)
                        loop.done.release()

        def keep_train_step(train_step, args):
            self.train_step, self.args = train_step, args
            self.step_fn = cuda_graph(train_step, args)
            return self.step_fn

        def keep_data(args, data, state):
            self.data = data
            return open_run(args, data, state)

        with patched(common, steps=Steps, cuda_graph=keep_train_step, open_run=keep_data):
            self.script.main(argv)

    def time(self, n):
        start = time.perf_counter()
        self.left = n
        self.go.release()
        self._wait()
        return (time.perf_counter() - start) / n

    def end(self):
        self.ended = True
        self.go.release()
        self.thread.join()


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


class PerImage(torch.utils.data.Dataset):
    """One PIL image and one chain of transforms at a time, as torchvision's datasets give them."""

    def __init__(self, data, size):
        self.images = data.images.cpu().permute(0, 2, 3, 1).numpy()
        self.labels = data.labels.cpu()
        middle = [0.5] * self.images.shape[3]
        steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(middle, middle)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        return self.transform(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)), self.labels[
            i
        ]


def usual_batches(loop):
    args = loop.args
    loader = torch.utils.data.DataLoader(
        PerImage(loop.data, args.image_size),
        batch_size=args.batch_size * args.n_critic,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=args.device != "cpu",
        persistent_workers=True,
    )
    while True:
        for x, y in loader:
            yield x.to(args.device), y.to(args.device)


def synchronise(args):
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()


def timed(args, n, step):
    start = time.perf_counter()
    for _ in range(n):
        step()
    synchronise(args)
    return (time.perf_counter() - start) / n


def measure(name, argv, rounds, seconds):
    """Medians of the seconds per step of the three ways, and the images per step."""
    loop = OurLoop(name, argv)
    args, usual = loop.args, usual_batches(loop)
    ready = next(common.batches(args, loop.data, 0))

    def usual_step():
        for loss in loop.train_step(*next(usual)):
            loss.item()

    def bare_step():
        loop.step_fn(*ready)

    ways = {
        "ours": loop.time,
        "usual": lambda n: timed(args, n, usual_step),
        "bare": lambda n: timed(args, n, bare_step),
    }
    n = max(2, round(seconds / max(way(5) for way in ways.values())))
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, time_of in ways.items():
            times[way].append(time_of(n))
    loop.end()
    return {way: statistics.median(t) for way, t in times.items()}, args.batch_size * args.n_critic


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("scripts", nargs="*", help="all seven when none is named")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dataset", default="digits")
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
        row.update({f"{way}_images_per_s": images / s for way, s in seconds.items()})
        row["ratio"] = seconds["usual"] / seconds["ours"]
        row["overhead"] = 1 - seconds["bare"] / seconds["ours"]
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
