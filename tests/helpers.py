"""What the tests share: the scripts, small datasets in the real formats, and ways into a main."""

import contextlib
import csv
import hashlib
import importlib
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import common
import runs

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")
CONVOLUTIONAL = NAMES[1:]
LARGE = ("progan", "stylegan", "stylegan2", "r3gan")
OTHERS = ("tricks", "ssgan", "stacked_gan", "ebgan", "began", *LARGE)
SCRIPTS = {name: importlib.import_module(name) for name in (*NAMES, *OTHERS)}
# Every kind of update: plain, a penalty, more networks, two GANs, a k, stages, a lazy penalty.
BY_TORCHRUN = ("dcgan", "wgan_gp", "ssgan", "stacked_gan", "began", "stylegan", "stylegan2")
WITHOUT_N_CRITIC = ("stylegan2", "r3gan", "stacked_gan")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROOT = Path(__file__).parent.parent


def picture(kind, size=16):
    """Two pictures that no network draws by chance: uint8 (size, size, 3)."""
    y, x = np.mgrid[0:16, 0:16]
    image = np.stack([40 + 10 * x, 200 - 8 * y, np.full_like(x, 90)], -1)
    if kind == 0:
        image[(x - 8) ** 2 + (y - 8) ** 2 < 20] = (230, 60, 30)
    else:
        image[(abs(x - 8) + abs(y - 8) < 3) | (x < 3)] = (20, 220, 240)
    return np.asarray(
        Image.fromarray(image.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    )


def picture_folder(folder, kinds=(0,), classes=False):
    """A folder of one PNG per kind; with classes, each in a subfolder of its own."""
    for k in kinds:
        path = folder / f"class{k}" / "picture.png" if classes else folder / f"picture{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(k)).save(path)
    return folder


def write_mnist(data_dir, n=20, folder="MNIST", seed=0):
    """MNIST's four files, with n random images each: the images (n, 28, 28) and labels (n,)."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10
    raw = Path(data_dir, folder, "raw")
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes()
        )
        header = struct.pack(">II", 2049, n)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images, labels


def write_cifar10(data_dir, monkeypatch, n=10, seed=0):
    """CIFAR-10's files with n random images in each of 5 batches, torchvision knowing their
    sums."""
    rng = np.random.default_rng(seed)
    folder = Path(data_dir, "cifar-10-batches-py")
    folder.mkdir(parents=True)
    images, labels, train_list = [], [], []

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    for b in range(1, 6):
        x, y = rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 10, n).tolist()
        train_list.append(write(f"data_batch_{b}", {"data": x, "labels": y}))
        images.append(x.reshape(n, 3, 32, 32))
        labels += y
    test = write("test_batch", {"data": images[0].reshape(n, 3072), "labels": labels[:n]})
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return np.concatenate(images), np.array(labels)


def fewer_digits(monkeypatch, number):
    """Lets `draw_digits` draw at most `number` images."""
    draw = common.draw_digits
    monkeypatch.setattr(
        common, "draw_digits", lambda n, size, seed: draw(min(n, number), size, seed)
    )


def class_folder(folder, each=20):
    """A folder of two pictures, each `each` times with another brightness, in a subfolder per
    class."""
    rng = np.random.default_rng(0)
    for k in (0, 1):
        for i in range(each):
            file = folder / f"class{k}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = picture(k) * rng.uniform(0.8, 1.0)
            Image.fromarray(image.astype(np.uint8)).save(file)
    return folder


SMALL_WIDTH = {
    "ssgan": "--width 32",
    "stacked_gan": "--width 8 --encoder-steps 2",
    "stylegan2": "--width-at-64 2",
}


def small_flags(name):
    """Flags with which a script's networks are small."""
    width = SMALL_WIDTH.get(name, "--width 8")
    return f"--image-size 16 --batch-size 4 --z-dim 6 {width}".split()


def train(name, run, *flags, data=None, small=True, device="cpu"):
    """Runs a script's main into the folder `run`, with small networks unless `small` is False: on
    two pictures, one per class, or for ssgan on 40 of them with one label per class."""
    if name == "ssgan":
        flags = ["--labels", 2, *flags]
    if small:
        flags = [*small_flags(name), "--log-every", 5, "--save-every", 5, *flags]
    if data is None:
        data = Path("many" if name == "ssgan" else "pictures")
        if name == "ssgan" and not data.exists():
            class_folder(data)
        elif not data.exists():
            picture_folder(data, (0, 1), classes=True)
    argv = ["--dataset", data, "--out-dir", run, "--device", device, *flags]
    SCRIPTS[name].main([str(flag) for flag in argv])


@contextlib.contextmanager
def killed_after_save(step):
    """Interrupts a run right after its checkpoint of `step`."""

    def save(args, data, saved_step, state, save_checkpoint=runs.save_checkpoint):
        save_checkpoint(args, data, saved_step, state)
        if saved_step == step:
            raise KeyboardInterrupt

    with mock.patch.object(runs, "save_checkpoint", save), pytest.raises(KeyboardInterrupt):
        yield


def checkpoint(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def first_image(run, step):
    """The first image of a grid, as (3, 16, 16) in [-1, 1]. The grid has it 4 times as large."""
    grid = torch.from_numpy(np.array(Image.open(Path(run, "samples", f"{step:06}.png"))))
    return grid[8:72:4, 8:72:4].permute(2, 0, 1) / 127.5 - 1


def log_rows(run):
    """The rows of a log.csv without the times, as numbers."""
    rows = csv.DictReader(Path(run, "log.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if k != "time"} for row in rows]


def same(a, b):
    """Two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class _Enough(Exception):
    pass


def open_script(name, *flags, run=None, dataset=None):
    """Runs a script's main up to its loop, on small networks and six pictures of three classes.
    Returns the local variables of main: args, data, networks, update, state ..."""
    if dataset is None:
        dataset = Path("six")
        for k in range(0 if dataset.exists() else 6):
            file = dataset / f"class{k % 3}" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(picture(k % 2), 3 * k, axis=1)).save(file)
    caught = SimpleNamespace()

    def steps(args, done):
        caught.__dict__.update(sys._getframe(1).f_locals)
        raise _Enough

    argv = ["--dataset", dataset, "--out-dir", run or f"opened-{name}", "--device", "cpu"]
    argv += small_flags(name)
    if name == "ssgan":
        argv += ["--labels", 3]
    argv += flags
    with mock.patch.object(runs, "steps", steps), pytest.raises(_Enough):
        SCRIPTS[name].main([str(flag) for flag in argv])
    return caught


def recorded(monkeypatch, name, module=common):
    """A list to which every later call of the function `name` of a module adds its result."""
    results, function = [], getattr(module, name)

    def recording(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(module, name, recording)
    return results


def networks(name, channels=3, image_size=16, width=8, z_dim=6, seed=0):
    """A script's own G and D as functions of (z,) and (x,): in cgan the labels are 0, 1, 2, 0,
    1, ..."""
    torch.manual_seed(seed)
    module = SCRIPTS[name]
    n_classes = [3] if name == "cgan" else []
    G = module.Generator(z_dim, width, channels, image_size, *n_classes)
    D = module.Discriminator(width, channels, image_size, *n_classes)
    if name == "cgan":
        for net in (G, D):
            net.forward = lambda x, forward=net.forward: forward(
                x, torch.arange(len(x), device=x.device) % 3
            )
    return G, D


def snapshot(module):
    """Copies of a module's parameters, by name."""
    return {k: p.detach().clone() for k, p in module.named_parameters()}


def changed(module, before):
    """The names of the parameters that are not bit for bit what they were."""
    return {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}


def images_in(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(Path(folder).iterdir())}


def same_images(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
