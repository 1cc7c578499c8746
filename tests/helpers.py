"""What the tests share: the scripts, small datasets in the real formats, and a way into a script's main."""

import hashlib
import importlib
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import common
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

NAMES = ("gan", "dcgan", "cgan", "lsgan", "wgan", "wgan_gp", "sngan")
CONVOLUTIONAL = NAMES[1:]
SCRIPTS = {name: importlib.import_module(name) for name in (*NAMES, "tricks")}
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
    return np.asarray(Image.fromarray(image.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST))


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
    """CIFAR-10's python files with n random images in each of 5 batches, torchvision knowing their sums."""
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


class _EnoughError(Exception):
    pass


def open_script(name, tmp_path, *flags, dataset=None):
    """Runs a script's main up to its loop, on small networks and a small folder of pictures unless the flags
    say otherwise. Returns its own d_step, g_step, G, D, opt_G, opt_D, fixed_z, args and batches, and `step`,
    which takes one step of its loop."""
    pictures, caught = tmp_path / "pictures", SimpleNamespace()
    for k in range(0 if dataset or pictures.exists() else 3):
        (pictures / f"class{k}").mkdir(parents=True)
        for i in range(3):
            image = np.roll(picture(k % 2), 3 * i + k, axis=1)
            Image.fromarray(image).save(pictures / f"class{k}" / f"{i}.png")

    def open_run(args, state, open_run=common.open_run):
        caught.__dict__.update(state, state=state)
        return open_run(args, state)

    def cuda_graphs(args, *steps):
        caught.d_step, caught.g_step = steps
        return steps

    def batches(args, data, start):
        caught.args, caught.data = args, data
        raise _EnoughError

    argv = f"--data-dir {tmp_path}/data --out-dir {tmp_path}/run-{name} --image-size 16 --width 8 --z-dim 6"
    argv = ["--dataset", dataset or pictures, *argv.split(), "--batch-size", 4, "--device", "cpu", *flags]
    spies = mock.patch.multiple(common, open_run=open_run, cuda_graphs=cuda_graphs, batches=batches)
    with spies, pytest.raises(_EnoughError):
        SCRIPTS[name].main([str(a) for a in argv])
    caught.batches = common.batches(caught.args, caught.data)
    caught.step = lambda: take_step(name, caught)
    return caught


def take_step(name, run):
    """n_critic updates of D, each on its own batch, then one of G: the losses and mean scores of the last."""
    for _ in range(run.args.n_critic):
        x_real, *y = next(run.batches)[: 2 if name == "cgan" else 1]
        loss_D, d_real, d_fake = run.d_step(x_real, *y)
    return loss_D, run.g_step(*([x_real] if name == "tricks" else y)), d_real, d_fake


def networks(name, channels=3, image_size=16, width=8, z_dim=6, seed=0):
    """A script's own G and D as functions of (z,) and (x,): in cgan the labels are 0, 1, 2, 0, 1, ..."""
    torch.manual_seed(seed)
    module = SCRIPTS[name]
    n_classes = [3] if name == "cgan" else []
    G = module.Generator(z_dim, width, channels, image_size, *n_classes)
    D = module.Discriminator(width, channels, image_size, *n_classes)
    if name == "cgan":
        for net in (G, D):
            net.forward = lambda x, forward=net.forward: forward(x, torch.arange(len(x), device=x.device) % 3)
    return G, D


def snapshot(module):
    """Copies of a module's parameters, by name."""
    return {k: p.detach().clone() for k, p in module.named_parameters()}


def changed(module, before):
    """The names of the parameters that are not bit for bit what they were."""
    return {k for k, p in module.named_parameters() if not torch.equal(p, before[k])}
