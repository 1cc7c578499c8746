"""Data in, pictures out: what the scripts share. No network and no loss is in here, and nothing of
a run: its flags, files and devices are in runs.py.

Errors that a user can fix end the program with one line on stderr, "error: ...", and exit code 1.
"""

import functools
import itertools
import math
import os
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from tqdm import tqdm

TORCHVISION_DATASETS = {
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "cifar10": torchvision.datasets.CIFAR10,
}
IMAGE_SIZES = [16, 32, 64, 128, 256, 512, 1024]
DATASET_HELP = "mnist, fashion-mnist, cifar10, digits (needs no download), or a folder of images"


def fail(message):
    """Exits with code 1 and `message` as one line on stderr."""
    sys.exit(f"error: {message}")


def say(message):
    """Prints `message` as one line on stderr: under torchrun, once for all processes."""
    if rank() == 0:
        print(message, file=sys.stderr)


def warn(message):
    """Says `message` as a warning."""
    say(f"warning: {message}")


def world_size():
    """The number of processes that train together: 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number of this process among them, from 0. Rank 0 writes the files of the run."""
    return int(os.environ.get("RANK", 0))


# ------------------------------------------------------------------------------------------ data in


@dataclass
class Data:
    """A dataset in memory. With --generate, only what the checkpoint knows of it."""

    number: int  # of images
    channels: int  # 1 or 3
    classes: list  # names of the classes; empty if the images have no labels
    images: torch.Tensor | None = None  # uint8 (number, channels, image_size, image_size)
    labels: torch.Tensor | None = None  # int64 (number,), indices of `classes`


def load_data(args):
    """The dataset `args.dataset` as Data: on `args.device` if half of its free memory is enough,
    else in host memory. Exits with an error if it is missing, damaged or empty."""
    if args.generate:
        # The flags came from this checkpoint, so that it has been found and read before.
        file = Path(args.out_dir, "checkpoint.pt")
        return Data(**torch.load(file, map_location="cpu", weights_only=True)["data"])

    size = args.image_size
    left_out = []
    if args.dataset == "digits":
        number = min(20_000, 2**31 // size**2)
        images, labels = draw_digits(number, size, args.seed)
        classes = list("0123456789")
    elif args.dataset in TORCHVISION_DATASETS:
        images, labels, classes = load_torchvision(args.dataset, args.data_dir)
        images = resize(images, size)
    else:
        images, labels, classes, left_out = load_folder(args.dataset, size)

    number, channels = images.shape[:2]
    line = f"{args.out_dir}: {number:,} images of {channels}x{size}x{size} from {args.dataset}"
    if classes:
        line += f", {len(classes)} classes: {first_ten(classes)}"
    say(line)
    for message in left_out:
        warn(message)

    # Only CUDA can say how much memory is free; mps shares the host's.
    if args.device in ("cpu", "mps") or images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(args.device)
        labels = labels.to(args.device)
    return Data(number, channels, classes, images, labels)


def resize(images, size):
    """Images uint8 (N, C, S, S) as (N, C, size, size), with antialiasing."""
    parts = [TF.resize(part, [size, size], antialias=True) for part in images.split(1000)]
    return torch.cat(parts)


def first_ten(names):
    """The first ten names, separated by commas."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def sample_batch(args, data):
    """A minibatch, drawn i.i.d. with replacement as in Algorithm 1 of Goodfellow et al. 2014:
    images float32 (batch_size, C, S, S) in [-1, 1], labels int64 (batch_size,), both on
    `args.device`."""
    index = torch.randint(data.number, (args.batch_size,), device=args.device)
    index = index.to(data.images.device)  # elsewhere only if the dataset is in host memory
    x = data.images[index].to(args.device)
    y = data.labels[index].to(args.device)
    return x.float().div(127.5).sub(1), y


def draw_digits(n, size, seed):
    """White digits on black, each one turned, sheared, scaled and shifted at random: images uint8
    (n, 1, size, size) and labels int64 (n,), the same ones for the same `seed`."""
    # Ten digits in four weights, drawn four times as large so that thin strokes stay smooth.
    large = 4 * size
    font = ImageFont.load_default(size=large)
    glyphs = []
    for weight, digit in itertools.product((0, 0.01, 0.02, 0.03), "0123456789"):
        canvas = Image.new("L", (large, large))
        middle = (large / 2, large / 2)
        stroke = round(weight * large)
        ImageDraw.Draw(canvas).text(middle, digit, 255, font, anchor="mm", stroke_width=stroke)
        glyphs.append(TF.pil_to_tensor(canvas.reduce(4)))
    glyphs = torch.stack(glyphs).float()

    # For each image a glyph and an affine map, (2, 3), from the image's coordinates to the glyph's.
    rng = np.random.default_rng(seed)
    pick = torch.from_numpy(rng.integers(len(glyphs), size=n))
    angle = rng.uniform(-0.17, 0.17, n)
    shear = rng.uniform(-0.15, 0.15, n)
    zoom = rng.uniform(1, 1.33, n)
    shift_x, shift_y = rng.uniform(-0.1, 0.1, (2, n))
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    to_x = np.stack([cos, sin + shear * cos, shift_x], axis=1)
    to_y = np.stack([-sin, cos - shear * sin, shift_y], axis=1)
    maps = torch.from_numpy(np.stack([to_x, to_y], axis=1)).float()

    # In parts, as all images at once would take much memory as floats.
    images = []
    for part in torch.arange(n).split(max(1, 2**20 // size**2)):
        grid = F.affine_grid(maps[part], (len(part), 1, size, size), align_corners=False)
        images.append(F.grid_sample(glyphs[pick[part]], grid, align_corners=False).byte())
    return torch.cat(images), pick % 10


def load_torchvision(name, data_dir, train=True):
    """A dataset of torchvision, downloaded into `data_dir` if it is not there: images uint8 (N,
    C, 32, 32), MNIST's 28 pixels with a border of zeros; labels int64 (N,); names of the
    classes. Exits with an error if its files are damaged, or missing and cannot be downloaded."""
    dataset_class = TORCHVISION_DATASETS[name]
    folder = Path(data_dir, getattr(dataset_class, "base_folder", dataset_class.__name__))
    has_files = any(file.is_file() for file in folder.rglob("*"))
    try:
        # Rank 0 alone downloads; the other processes wait, and then find the files.
        if rank() > 0:
            dist.barrier()
        dataset = dataset_class(data_dir, train=train, download=True)
        if world_size() > 1 and rank() == 0:
            dist.barrier()
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets)
        if len(images) != len(labels) or labels.max() >= len(dataset.classes):
            raise ValueError("its labels do not match its images")
    # torchvision's readers assert, index and unpickle: anything can come
    except Exception as error:
        if has_files:
            fail(f"{folder} cannot be read ({one_line(error)}): delete it to download it again")
        fail(f"{folder} is missing, and the download failed ({one_line(error)})")

    if images.ndim == 3:
        images = F.pad(images, (2, 2, 2, 2))[:, None]
    else:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels, list(dataset.classes)


def one_line(error):
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def load_folder(folder, size):
    """The images of a folder: uint8 (N, C, size, size), where C is 1 if all are grey, else 3;
    labels int64 (N,); names of the classes; and messages that say what was left out.

    The images are in the folder itself or in one subfolder per class, wherever there are more.
    Classes are numbered in the order of their names; a subfolder without a readable image is not
    one. Hidden files do not count. Exits with an error if there is nothing to read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"{folder} is not a folder: --dataset is {DATASET_HELP}")

    # What there is, in an order that is the same on every system.
    found = [file.relative_to(folder) for file in (*folder.glob("*"), *folder.glob("*/*"))]
    found = [file for file in found if not any(part.startswith(".") for part in file.parts)]
    found.sort(key=lambda file: file.as_posix())

    # The image files among it.
    endings = Image.registered_extensions()
    files = [f for f in found if f.suffix.lower() in endings and (folder / f).is_file()]
    flat = [file for file in files if len(file.parts) == 1]
    in_subfolders = [file for file in files if len(file.parts) == 2]
    files = in_subfolders if len(in_subfolders) > len(flat) else flat
    if not files:
        fail(f"{folder} holds no images, neither in itself nor in one subfolder per class")

    # Their pixels. Threads speed this up, as Pillow releases the interpreter's lock.
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    readable = []
    with ThreadPool() as pool:
        decoded = pool.imap(lambda file: decode_image(folder / file, size), files)
        for file, image in zip(files, tqdm(decoded, "decoding", len(files), delay=2), strict=True):
            if image is not None:
                pixels[len(readable)] = image
                readable.append(file)
    if not readable:
        fail(f"{folder} holds {len(files)} image files, and none of them can be read")
    images = torch.from_numpy(pixels[: len(readable)])
    if all((part == part[:, :1]).all() for part in images.split(1000)):
        images = images[:, :1].contiguous()

    # Their labels. A flat folder has one nameless parent, which is no class.
    parents = [file.parent.name for file in readable]
    names = sorted(set(parents))
    number_of = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([number_of[parent] for parent in parents])
    classes = [name for name in names if name]

    # What was left out.
    was_read = set(readable)
    unreadable = [file.as_posix() for file in files if file not in was_read]
    used = {*files, *map(Path, classes)}
    ignored = [file.as_posix() for file in found if file not in used]
    messages = []
    if unreadable:
        reason = "cannot be read (damaged, too large, or with 32-bit or float pixels)"
        messages.append(f"{len(unreadable):,} images {reason}: {first_ten(unreadable)}")
    if ignored:
        messages.append(f"{len(ignored):,} files and folders are ignored: {first_ten(ignored)}")
    return images, labels, classes, messages


def decode_image(file, size):
    """The first frame of an image file as uint8 (3, size, size): turned as its EXIF orientation
    says, with white behind transparent pixels, its middle square resized with antialiasing. None
    if Pillow cannot read it, or if it has 32-bit or float pixels, whose range is unknown."""
    try:
        with Image.open(file) as image:
            # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster.
            image.draft(None, (size, size))
            # Pillow opens 16-bit PGM files, and in some versions PNG files, as if they had 32 bits.
            has_16_bits = image.mode == "I" and image.format in ("PPM", "PNG")
            if image.mode in ("I", "F") and not has_16_bits:
                return None
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return np.array(image).transpose(2, 0, 1)
    except Exception:  # Pillow's many readers raise many things; each means that this is no image
        return None


# ------------------------------------------------------------------------------------- pictures out


def save_grid(args, step, images, columns=8):
    """Writes images (N, C, S, S) in [-1, 1] as one grid, samples/<step>.png in `args.out_dir`, with
    `columns` images in a row, enlarged by a whole factor to 512 pixels or more."""
    if rank() > 0:
        return
    grid = torchvision.utils.make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))
    factor = math.ceil(512 / max(grid.shape[1:]))
    enlarged = F.interpolate(grid[None], scale_factor=factor)
    file = Path(args.out_dir, "samples", f"{step:06d}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    torchvision.utils.save_image(enlarged, file)
    if args.tensorboard:
        summary_writer(args.out_dir).add_image("samples", grid, step)


@functools.cache
def summary_writer(folder):
    """TensorBoard's writer for a folder, opened once."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(folder)


def generate(args, draw, labels=None):
    """Writes `args.generate` images to generated/000000.png, ... in `args.out_dir`. `draw(n)`
    returns n images (n, C, S, S) in [-1, 1].

    With `labels`, int64 (`args.generate`,), `draw(n, y)` returns n images of the classes y,
    (n,), and the file names have the class: 000003_class7.png. Exits with an error if the folder
    exists.
    """
    folder = Path(args.out_dir, "generated")
    if folder.exists():
        fail(f"{folder} exists: move or delete it")
    folder.mkdir()

    # Do not seed here. The networks were initialised with the first numbers of the same seed, so z
    # would repeat their weights, and the images of such a z are unlike others.
    for first in tqdm(range(0, args.generate, 100), "generating, 100 at a time"):
        n = min(100, args.generate - first)
        if labels is None:
            images = draw(n)
            suffixes = [""] * n
        else:
            y = labels[first : first + n]
            images = draw(n, y)
            suffixes = [f"_class{label}" for label in y.tolist()]
        images = images.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
        for k in range(n):
            file = folder / f"{first + k:06d}{suffixes[k]}.png"
            TF.to_pil_image(images[k]).save(file)
    print(folder)
