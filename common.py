"""Data in, pictures out: what the scripts share. Nothing in here knows a network or a loss.

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
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF
from tqdm import tqdm

TORCHVISION_DATASETS = {
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "cifar10": torchvision.datasets.CIFAR10,
}
DATASETS = [*TORCHVISION_DATASETS, "digits"]
DATASET_HELP = "mnist, fashion-mnist, cifar10, digits (needs no download), or a folder of images"

# The endings of image files.
ENDINGS = {*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif", ".heic", ".heif"}
# Folders that operating systems and storage devices make.
NO_DATA = {"@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information"}


def fail(message):
    """Exits with code 1 and `message` as one line on stderr."""
    sys.exit(f"error: {printable(message)}")


def say(message):
    """Prints `message` as one line on stderr, above a progress bar if there is one: under torchrun,
    once for all processes."""
    if rank() == 0:
        tqdm.write(printable(message), file=sys.stderr)


def warn(message):
    """Says `message` as a warning."""
    say(f"warning: {message}")


def printable(message):
    """`message` with its line breaks and control characters, as a file's name may have, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def first_ten(names):
    """The first ten names, separated by commas, and how many there are if there are more."""
    more = f", ... ({len(names):,} in all)" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def reason(error):
    """The kind of an exception and its message, which may have several lines, as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def world_size():
    """The number of processes that train together: 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def rank():
    """The index of this process, from 0. Rank 0 writes the files of the run."""
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def started_by_torchrun():
    """Whether torchrun has started this process. RANK and WORLD_SIZE do not prove it: clusters may
    set them, too."""
    return dist.is_available() and dist.is_torchelastic_launched()


# data ---------------------------------------------------------------------------------------------


@dataclass
class Data:
    """A dataset in memory or, with --generate, what the checkpoint records about it."""

    number: int  # of images
    channels: int  # 1 or 3
    classes: list  # names of the classes; empty if the images have no labels
    images: torch.Tensor | None = None  # uint8 (number, channels, image_size, image_size)
    labels: torch.Tensor | None = None  # int64 (number,), indices of `classes`


def load_data(args):
    """The dataset `args.dataset` as Data, on `args.device`. If it would take more than half of a
    GPU's free memory, it stays in host memory. Exits with an error if it is missing, damaged or
    empty."""
    if args.generate:
        # runs.parse_args has found and checked this checkpoint.
        file = Path(args.out_dir, "checkpoint.pt")
        return Data(**torch.load(file, map_location="cpu", weights_only=True)["data"])

    size = args.image_size
    if args.dataset == "digits":
        number = min(20_000, 2**31 // size**2)
        images, labels = draw_digits(number, size, args.seed)
        classes = list("0123456789")
    elif args.dataset in TORCHVISION_DATASETS:
        images, labels, classes = load_torchvision(args.dataset, args.data_dir)
        images = resize(images, size)
    else:
        images, labels, classes = load_folder(args.dataset, size)

    # Only CUDA can say how much memory is free; mps shares the host's.
    device = args.device
    if "cuda" in device and images.nbytes >= torch.cuda.mem_get_info()[0] / 2:
        device = "cpu"
        warn(
            f"{args.dataset} takes {images.nbytes / 2**20:,.0f} MiB, over half of the GPU's free "
            "memory: it stays in host memory, and training is slower"
        )
    number, channels = images.shape[:2]
    line = f"{args.out_dir} on {args.device}: {number:,} images of "
    line += f"{channels}x{size}x{size} from {args.dataset}"
    if classes:
        line += f", classes: {first_ten(classes)}"
    say(line)
    return Data(number, channels, classes, images.to(device), labels.to(device))


def resize(images, size):
    """Images uint8 (N, C, S, S) as (N, C, size, size), with antialiasing. In parts, which takes
    less memory."""
    parts = [TF.resize(part, [size, size], antialias=True) for part in images.split(1000)]
    return torch.cat(parts)


def sample_batch(args, data):
    """A minibatch, drawn i.i.d. with replacement as in Algorithm 1 of Goodfellow et al. 2014:
    images float32 (batch_size, C, S, S) in [-1, 1], labels int64 (batch_size,), both on
    `args.device`."""
    index = torch.randint(data.number, (args.batch_size,), device=args.device)
    index = index.to(data.images.device)  # elsewhere only if the dataset is in host memory
    x = data.images[index].to(args.device)
    y = data.labels[index].to(args.device)
    return scaled(x), y


def scaled(images):
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def class_number(label, classes):
    """The index of the class called `label`. If the classes have other names than numbers, `label`
    may also be an index. Exits with an error if there is no such class."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes) and not are_numbers(classes):
        return int(label)
    fail(f"--label is {label}: the classes are {first_ten(classes)}")


def are_numbers(classes):
    """Whether all names of classes are whole numbers."""
    return all(name.isdecimal() for name in classes)


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
    # Rank 0 alone downloads; the other processes wait, and then find the files.
    if rank() > 0:
        dist.barrier()
    dataset_class = TORCHVISION_DATASETS[name]
    try:
        dataset = dataset_class(data_dir, train=train, download=True)
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets)
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images):,} images, but {len(labels):,} labels")
    except Exception as error:  # torchvision's readers assert, index and unpickle
        advice = "check the connection, or delete a damaged file to download it again"
        fail(f"cannot load {name} from {data_dir} ({reason(error)}): {advice}")
    if world_size() > 1 and rank() == 0:
        dist.barrier()

    if images.ndim == 3:
        images = F.pad(images, (2, 2, 2, 2))[:, None]
    else:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels, list(dataset.classes)


# a folder of images -------------------------------------------------------------------------------


def load_folder(folder, size):
    """The images of a folder: uint8 (N, C, size, size), where C is 1 if all are grey, else 3;
    labels int64 (N,); names of the classes.

    These are either the images in the folder itself, or those in its subfolders, whichever are
    more. Each subfolder is a class, with all that is below it. Classes are in the order of their
    names, or of their numbers if all names are whole numbers. Warns of images and files that are
    ignored. Exits with an error if there is nothing to read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"{folder} is not a folder. --dataset is {DATASET_HELP}")
    files, has_classes = find_images(folder)

    # Decode them, and keep three channels only if some image is in colour.
    images, readable = decode_images(folder, files, size)
    if all((part == part[:, :1]).all() for part in images.split(1000)):
        images = images[:, :1].contiguous()
    brightest = int(images.max())
    if brightest < 64:
        warn(f"the brightest pixel of {folder} is {brightest} of 255: are these 12-bit images?")

    # Their classes. A subfolder without a readable image is none.
    if not has_classes:
        return images, torch.zeros(len(images), dtype=torch.int64), []
    parents = [file.parts[0] for file in readable]
    classes = sorted(set(parents))
    if are_numbers(classes):
        classes.sort(key=int)
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[parent] for parent in parents])
    without = sorted({file.parts[0] for file in files} - set(classes))
    if without:
        warn(f"no readable image in these subfolders: {first_ten(without)}")
    return images, labels, classes


def find_images(folder):
    """The image files of a folder, relative to it, and whether they are in one subfolder per class.
    Says what is ignored. Exits with an error if there are none."""
    found = files_below(folder)
    images = [file for file in found if file.suffix.lower() in ENDINGS]
    others = [file.as_posix() for file in found if file.suffix.lower() not in ENDINGS]
    if not images:
        fail(f"no images found in {folder}, which holds {first_ten(others) or 'no files'}")
    if others:
        warn(f"ignored files that are not images: {first_ten(others)}")

    # Flat, or with classes: whichever holds more.
    flat = [file for file in images if len(file.parts) == 1]
    in_subfolders = [file for file in images if len(file.parts) > 1]
    has_classes = len(in_subfolders) > len(flat)
    used, unused = flat, in_subfolders
    if has_classes:
        used, unused = in_subfolders, flat
    if unused:
        where = "beside the class folders" if has_classes else "in subfolders"
        warn(f"ignored images {where}: {first_ten([file.as_posix() for file in unused])}")

    # The user's classes may be one level deeper: in train and test, or in an archive's only folder.
    nested = sorted({file.parts[0] for file in used if len(file.parts) > 2})
    if nested:
        warn(f"each of these is one class, with all that is below it: {first_ten(nested)}")
    return used, has_classes


def files_below(folder):
    """The files in a folder and its subfolders, relative to it, in an order that is the same on
    every system. Left out are hidden files, folders of the system (NO_DATA), and folders that hold
    a run. Links to folders are followed in the first level only, so that none leads in a circle.
    Warns of subfolders that cannot be read."""

    def is_data(path):
        is_run = os.path.exists(path / "args.json")
        return not path.name.startswith(".") and path.name not in NO_DATA and not is_run

    def warn_of(error):
        warn(f"{error.filename} cannot be read: {error.strerror}")

    try:
        first_level = list(folder.iterdir())
    except OSError as error:
        fail(f"{folder} cannot be read: {error.strerror}")
    files = []
    for path in first_level:
        if not is_data(path):
            continue
        if os.path.isdir(path):  # Path.is_dir may raise PermissionError
            for parent, subfolders, names in os.walk(path, onerror=warn_of):
                subfolders[:] = [name for name in subfolders if is_data(Path(parent, name))]
                files += [Path(parent, name) for name in names if not name.startswith(".")]
        else:
            files.append(path)
    return sorted([file.relative_to(folder) for file in files], key=Path.as_posix)


def decode_images(folder, files, size):
    """The images that can be read, uint8 (N, 3, size, size), and their N files. Warns of the
    others, with the reason. Exits with an error if there are none."""

    def try_to_decode(file):
        try:
            return decode_image(folder / file, size)
        except Exception as error:  # Pillow's many readers raise many things
            return reason(error)

    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    readable, unreadable = [], []
    # Threads help, as Pillow releases the interpreter's lock.
    with ThreadPool() as pool:
        decoded = pool.imap(try_to_decode, files)
        for file, result in zip(files, tqdm(decoded, "decoding", len(files), delay=2), strict=True):
            if isinstance(result, str):
                unreadable.append(f"{file.as_posix()} ({result})")
            else:
                images[len(readable)] = result
                readable.append(file)
    if not readable:
        fail(f"no image of {folder} can be read: {first_ten(unreadable)}")
    if unreadable:
        warn(f"cannot read these images: {first_ten(unreadable)}")
    return images[: len(readable)], readable


def decode_image(file, size):
    """The first frame of an image file as uint8 (3, size, size): turned as its EXIF orientation
    says, with white behind transparent pixels, its middle square resized with antialiasing. Raises
    what Pillow raises if it cannot read it, and ValueError for pixels of 32 bits or floats."""
    with Image.open(file) as image:
        # Pillow opens 16-bit PGM files, and in some versions PNG files, as if they had 32 bits.
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
            raise ValueError("its pixels are 32-bit or float, whose range is unknown")

        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is faster.
        image.draft(None, (size, size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            if "transparency" in image.info:  # the grey of a PNG that stands for transparent
                pixels = np.where(pixels == image.info["transparency"], 65535, pixels)
            image = Image.fromarray((pixels // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return TF.pil_to_tensor(image)


# pictures -----------------------------------------------------------------------------------------


def grid_size(args):
    """The number of images in a grid: 64, or fewer if the images are large, so that it is at most
    about 2,000 pixels wide."""
    if args.image_size <= 128:
        return 64
    if args.image_size == 256:
        return 16
    return 4


def save_grid(args, step, images, columns=None):
    """Writes images (N, C, S, S) in [-1, 1] as one grid, samples/<step>.png in `args.out_dir`, with
    `columns` images in a row (None: as many as rows), enlarged by a whole factor to 512 pixels or
    more."""
    if rank() > 0:
        return
    if columns is None:
        columns = math.isqrt(len(images))
    grid = torchvision.utils.make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))
    factor = math.ceil(512 / max(grid.shape[1:]))
    enlarged = F.interpolate(grid[None], scale_factor=factor)[0]
    pixels = enlarged.mul(255).round().byte().cpu()
    file = Path(args.out_dir, "samples", f"{step:06d}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Level 3, not the usual 6: it takes a quarter of the time, for a file that is hardly larger.
    TF.to_pil_image(pixels).save(file, compress_level=3)
    if args.tensorboard:
        summary_writer(args.out_dir).add_image("samples", grid, step)


@functools.cache
def summary_writer(folder):
    """TensorBoard's writer for a folder, opened once."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(folder)


def generate(args, draw, labels=None, classes=()):
    """Writes `args.generate` images to generated/000000.png, ... in `args.out_dir`. If that folder
    exists, they go to generated-2/ or the next free number. `draw(n)` returns n images (n, C, S, S)
    in [-1, 1].

    With `labels`, int64 (`args.generate`,), indices of `classes`, `draw(n, y)` returns n images of
    the classes y, (n,), and the file names have the class, 000003_class7.png: its name if all names
    are whole numbers, else its index.
    """
    folder = Path(args.out_dir, "generated")
    number = 1
    while folder.exists():
        number += 1
        folder = Path(args.out_dir, f"generated-{number}")
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
            numbers = classes if are_numbers(classes) else range(len(classes))
            suffixes = [f"_class{numbers[label]}" for label in y.tolist()]
        images = images.add(1).mul(127.5).round().clamp(0, 255).byte().cpu()
        for k in range(n):
            file = folder / f"{first + k:06d}{suffixes[k]}.png"
            TF.to_pil_image(images[k]).save(file)
    say(str(folder))
