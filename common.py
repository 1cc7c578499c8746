"""Data in, pictures out: what the scripts share. Nothing in here knows a network or a loss.

Errors that a user can fix end the program with one line on stderr, "error: ...", and exit code 1.
"""

import difflib
import functools
import itertools
import math
import os
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import (
    Image,
    ImageDraw,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)
from torch.nn import functional as F
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as TF
from tqdm import tqdm

TORCHVISION_DATASETS = {
    "mnist": torchvision.datasets.MNIST,
    "fashion-mnist": torchvision.datasets.FashionMNIST,
    "cifar10": torchvision.datasets.CIFAR10,
}
DATASETS = [*TORCHVISION_DATASETS, "digits"]
IMAGE_SIZES = [16, 32, 64, 128, 256, 512, 1024]
DATASET_HELP = "mnist, fashion-mnist, cifar10, digits (needs no download), or a folder of images"

# Endings of images that Pillow cannot read, and names of folders that are rarely meant as classes.
UNSUPPORTED = (".heic", ".heif")
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def fail(message):
    """Exits with code 1 and `message` as one line on stderr."""
    sys.exit(f"error: {message}")


def say(message):
    """Prints `message` as one line on stderr, above a progress bar if there is one: under torchrun,
    once for all processes."""
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)


def warn(message):
    """Says `message` as a warning."""
    say(f"warning: {message}")


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


# ------------------------------------------------------------------------------------------ data in


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
        facts = torch.load(file, map_location="cpu", weights_only=True)["data"]
        return Data(facts["number"], facts["channels"], facts["classes"])

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
    line = f"{args.out_dir} on {device_name(args.device)}: {number:,} images of "
    line += f"{channels}x{size}x{size} from {args.dataset}"
    if classes:
        line += f", {count(classes, 'class', 'classes')}: {first_ten(classes)}"
    say(line)
    for message in left_out:
        warn(message)

    # Only CUDA can say how much memory is free; mps shares the host's.
    if args.device in ("cpu", "mps") or images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(args.device)
        labels = labels.to(args.device)
    else:
        warn(
            f"{args.dataset} takes {images.nbytes / 2**20:,.0f} MiB, over half of the GPU's free "
            "memory: it stays in host memory, and training is slower"
        )
    return Data(number, channels, classes, images, labels)


def device_name(device):
    """The name of a device as a user knows it."""
    if "cuda" in device:
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device == "cpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return "cpu (PyTorch sees no GPU)"
    return device


def empty_images(number, channels, size):
    """Memory for images uint8 (number, channels, size, size). Exits with an error if there is not
    enough of it."""
    try:
        return torch.from_numpy(np.empty((number, channels, size, size), np.uint8))
    except MemoryError:
        gib = number * channels * size**2 / 2**30
        fail(
            f"{number:,} images of {channels}x{size}x{size} need {gib:,.1f} GiB of memory: "
            "choose a smaller --image-size"
        )


def resize(images, size):
    """Images uint8 (N, C, S, S) as (N, C, size, size), with antialiasing."""
    resized = empty_images(*images.shape[:2], size)
    for part, target in zip(images.split(1000), resized.split(1000), strict=True):
        target.copy_(TF.resize(part, [size, size], antialias=True))
    return resized


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
    # Rank 0 alone downloads; the other processes wait, and then find the files.
    if rank() > 0:
        dist.barrier()
    try:
        dataset = dataset_class(data_dir, train=train, download=True)
        if world_size() > 1 and rank() == 0:
            dist.barrier()
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets)
        if len(images) != len(labels) or labels.max() >= len(dataset.classes):
            raise ValueError("its labels do not match its images")
    except MemoryError:
        raise
    except Exception as error:  # torchvision's readers assert, index and unpickle
        fail(what_is_wrong(dataset_class, data_dir, error))

    if images.ndim == 3:
        images = F.pad(images, (2, 2, 2, 2))[:, None]
    else:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, labels, list(dataset.classes)


def what_is_wrong(dataset_class, data_dir, error):
    """Why torchvision could not load a dataset: a file is missing or damaged and could not be
    downloaded, or else its files cannot be read."""
    folder = Path(data_dir, getattr(dataset_class, "base_folder", dataset_class.__name__))
    if isinstance(error, PermissionError):
        return f"{folder} cannot be read: {error.strerror}: {error.filename}"

    # The names of the files and, where torchvision knows them, their checksums.
    if hasattr(dataset_class, "resources"):
        names = [Path(url).stem for url, _ in dataset_class.resources]
        checksums = dict.fromkeys([f"raw/{name}" for name in names])
    else:
        meta = (dataset_class.meta["filename"], dataset_class.meta["md5"])
        checksums = dict([*dataset_class.train_list, *dataset_class.test_list, meta])
    wrong = []
    for name, checksum in checksums.items():
        if not (folder / name).exists():
            wrong.append(f"{name} is missing")
        elif not check_integrity(folder / name, checksum):
            wrong.append(f"{name} is damaged")

    # The network error is on the last line of torchvision's message.
    last_line = (str(error).strip().splitlines() or [""])[-1]
    if wrong:
        return f"{folder}: {first_ten(wrong)}, and the download failed ({last_line})"
    return (
        f"{folder} cannot be read ({type(error).__name__}: {last_line}), so one of its files is "
        "damaged: delete the folder to download it again"
    )


def one_line(error):
    """The kind of an exception and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def load_folder(folder, size):
    """The images of a folder: uint8 (N, C, size, size), where C is 1 if all are grey, else 3;
    labels int64 (N,); names of the classes; and messages that say what was left out, and why.

    Images are taken from the folder itself or from its subfolders, one per class at any depth,
    whichever holds more. Classes are numbered in the order of their names; a subfolder without a
    readable image is not one. Hidden files do not count. Exits with an error if there is nothing to
    read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        message = f"there is no folder {folder}. --dataset is {DATASET_HELP}"
        similar = difflib.get_close_matches(folder.name.lower(), DATASETS, n=1)
        if similar:
            message += f". Did you mean {similar[0]}?"
        fail(message)
    files, has_classes, messages = find_images(folder)

    # Decode them, and keep three channels only if some image is in colour.
    images, readable, unreadable = decode_images(folder, files, size)
    if unreadable:
        messages.append(f"cannot read {count(unreadable, 'image')}: {first_three(unreadable)}")
    if not readable:
        fail(f"{folder}: {messages[-1]}")
    if all((part == part[:, :1]).all() for part in images.split(1000)):
        images = images[:, :1].contiguous()

    # Their classes.
    if not has_classes:
        return images, torch.zeros(len(images), dtype=torch.int64), [], messages
    parents = [file.parts[0] for file in readable]
    classes = sorted(set(parents))
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[parent] for parent in parents])
    subfolders = [path.name for path in folder.iterdir() if path.is_dir()]
    empty = [name for name in sorted(subfolders) if name not in classes and name[0] != "."]
    if empty:
        names = first_ten(empty)
        messages.append(f"ignored {count(empty, 'subfolder')} without a readable image: {names}")
    return images, labels, classes, messages


def find_images(folder):
    """The image files of a folder, relative to it; whether they are in one subfolder per class; and
    messages that say what is ignored. Exits with an error if there are none."""
    found = files_below(folder)
    endings = {*Image.registered_extensions(), *UNSUPPORTED}
    images = [file for file in found if file.suffix.lower() in endings]
    flat = [file for file in images if len(file.parts) == 1]
    in_subfolders = [file for file in images if len(file.parts) > 1]
    if not images:
        fail(f"no images found in {folder} or its subfolders")

    has_classes = len(in_subfolders) > len(flat)
    if has_classes:
        used, unused, where = in_subfolders, flat, "beside the class folders"
        check_class_folders(folder, used)
    else:
        used, unused, where = flat, in_subfolders, "in subfolders"

    messages = []
    if unused:
        names = first_ten([file.as_posix() for file in unused])
        messages.append(f"ignored {count(unused, 'image')} {where}: {names}")
    others = [file for file in found if file.suffix.lower() not in endings]
    if others:
        names = first_ten([file.as_posix() for file in others])
        messages.append(f"ignored {count(others, 'file')} without the ending of an image: {names}")
    return used, has_classes, messages


def decode_images(folder, files, size):
    """The images that can be read: uint8 (N, 3, size, size), their N files, and the names of the
    others with the reason."""
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # for large colour profiles
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    images = empty_images(len(files), 3, size)
    readable, unreadable = [], []
    # Threads help, as Pillow releases the interpreter's lock.
    with ThreadPool() as pool:
        decoded = pool.imap(lambda file: try_to_decode(folder / file, size), files)
        for file, result in zip(files, tqdm(decoded, "decoding", len(files), delay=2), strict=True):
            if isinstance(result, str):
                unreadable.append(f"{file.as_posix()} ({result})")
            else:
                images[len(readable)] = torch.from_numpy(result)
                readable.append(file)
    return images[: len(readable)], readable, unreadable


def files_below(folder):
    """All files in a folder and its subfolders, relative to it, in an order that is the same on
    every system. Hidden ones do not count. Exits with an error if a subfolder cannot be read."""

    def stop(error):
        fail(f"{error.filename} cannot be read: {error.strerror}")

    files = []
    for parent, subfolders, names in os.walk(folder, onerror=stop, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        files += [Path(parent, name).relative_to(folder) for name in visible]
    return sorted(files, key=Path.as_posix)


def check_class_folders(folder, files):
    """Exits with an error if the class folders are one level deeper, in train and test or in a
    single subfolder. Warns if subfolders with such names become classes. `files` are the images,
    relative to `folder`."""
    subfolders = sorted({file.parts[0] for file in files})
    splits = [name for name in subfolders if name.lower() in SPLITS]
    wrappers = splits
    if len(subfolders) == 1:
        wrappers = subfolders
    for name in wrappers:
        inside = [file for file in files if file.parts[0] == name]
        classes = {file.parts[1] for file in inside}
        if len(classes) > 1 and all(len(file.parts) > 2 for file in inside):
            fail(f"{folder / name} has {count(classes, 'class folder')}: use it as --dataset")
    if splits:
        warn(f"{folder}: the subfolders {', '.join(splits)} are treated as classes")


def count(items, noun, plural=None):
    """The number of items with their noun, such as "2 images"."""
    if len(items) != 1:
        noun = plural or f"{noun}s"
    return f"{len(items):,} {noun}"


def first_three(names):
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def try_to_decode(file, size):
    """The image as `decode_image` returns it, or a string that says why it cannot be read."""
    if file.suffix.lower() in UNSUPPORTED:
        return f"Pillow does not read {file.suffix} files"
    try:
        return decode_image(file, size)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not an image that Pillow knows, or damaged"
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # Pillow's many readers raise many things
        return one_line(error)


def decode_image(file, size):
    """The first frame of an image file as uint8 (3, size, size): turned as its EXIF orientation
    says, with white behind transparent pixels, its middle square resized with antialiasing. Raises
    what Pillow raises if it cannot read it, and ValueError if the pixels would come out wrong."""
    with Image.open(file) as image:
        check_pixels(image, file)

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
        return np.array(image).transpose(2, 0, 1)


def check_pixels(image, file):
    """Raises ValueError for an open image that Pillow would return in another range, inverted or
    without its orientation."""
    # Pillow opens 16-bit PGM files, and in some versions PNG files, as if they had 32 bits.
    has_16_bits = image.mode == "I" and image.format in ("PPM", "PNG")
    if image.mode in ("I", "F") and not has_16_bits:
        raise ValueError("pixels are signed 16-bit, 32-bit or float, whose range is unknown")
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        (bits,) = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE]
        if bits != 16:
            raise ValueError(f"pixels have {bits} bits")
        if image.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == 0:
            raise ValueError("pixels have 16 bits, with 0 for white")
    # Pillow does not read this box, which may say that the image is turned.
    if image.format == "JPEG2000" and b"JpgTiffExif->JP2" in Path(file).read_bytes():
        raise ValueError("JPEG 2000 with EXIF")


# ------------------------------------------------------------------------------------- pictures out


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
    # Level 6, the usual one, takes about four times as long for a file that is hardly smaller.
    TF.to_pil_image(pixels).save(file, compress_level=3)
    if args.tensorboard:
        summary_writer(args.out_dir).add_image("samples", grid, step)


@functools.cache
def summary_writer(folder):
    """TensorBoard's writer for a folder, opened once."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(folder)


def generate(args, draw, labels=None):
    """Writes `args.generate` images to generated/000000.png, ... in `args.out_dir`. If that folder
    exists, they go to generated-2/ or the next free number. `draw(n)` returns n images (n, C, S, S)
    in [-1, 1].

    With `labels`, int64 (`args.generate`,), `draw(n, y)` returns n images of the classes y,
    (n,), and the file names have the class: 000003_class7.png.
    """
    folder = Path(args.out_dir, "generated")
    for number in itertools.count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:
            folder = Path(args.out_dir, f"generated-{number}")

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
    say(str(folder))
