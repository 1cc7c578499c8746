"""Data in, pictures and run files out: what the seven scripts share. Nothing in here knows what a GAN is.

Images are held as one uint8 tensor (N, C, S, S) and leave `batches` as float32 in [-1, 1]. Every function
that a user's mistake or the world can break ends the program with one line on stderr: exit code 2 for a
wrong argument, 1 for anything else.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import functional as TF
from tqdm import tqdm

BUILT_IN = ("mnist", "fashion-mnist", "cifar10", "digits")


def fail(message):
    """Ends the program with exit code 1 and `message` as one line on stderr."""
    sys.exit("error: " + " ".join(str(message).split()))


# ------------------------------------------------------------------------------------------- arguments


def parse_args(parser, argv, script):
    """`parser.parse_args(argv)`, with every value checked and the defaults that depend on others filled in.

    `script` is the caller's `__file__`. Sets `args.script` (its stem), `args.device` ("cuda" where there is
    one) and `args.out_dir` (`runs/<script>-<dataset>`). A wrong argument exits with code 2; an out-dir that
    already holds a run, or holds none where one is to be continued, with code 1.
    """
    parser.prog = Path(script).name
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())}\n")
    args = parser.parse_args(argv)
    sys.excepthook = _one_line_excepthook
    args.script = Path(script).stem

    def check(ok, name, wanted):
        if not ok:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}: it must be {wanted}")

    size = args.image_size
    check(16 <= size <= 4096 and size & (size - 1) == 0, "image_size", "a power of two from 16 to 4096")
    check(2 <= args.batch_size < 2**31, "batch_size", "2 or more, and below 2^31")
    for name in ("steps", "z_dim", "width", "n_critic", "log_every", "save_every"):
        check(1 <= getattr(args, name) < 2**31, name, "1 or more, and below 2^31")
    check(0 <= args.seed < 2**63, "seed", "between 0 and 2^63 - 1")
    check(args.generate is None or args.generate >= 1, "generate", "1 or more")
    for name, value in vars(args).items():
        if isinstance(value, float):
            check(math.isfinite(value), name, "a finite number")
    check(args.lr > 0, "lr", "above 0")
    for name in ("beta1", "beta2"):
        check(0 <= getattr(args, name) < 1, name, "in [0, 1)")
    check(getattr(args, "clip", 1) > 0, "clip", "above 0")
    check(getattr(args, "gp_weight", 0) >= 0, "gp_weight", "0 or more")
    if args.resume and args.generate:
        parser.error("--resume and --generate exclude each other: one trains on, the other only draws")

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not one of cpu, cuda, cuda:1, ...")
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are made on the current device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        parser.error(f"--device {args.device} cannot be used ({reason}): leave it out, or pass --device cpu")
    if args.cuda_graph and device.type != "cuda":
        print(f"warning: --cuda-graph does nothing on {args.device}: it needs --device cuda", file=sys.stderr)
        args.cuda_graph = False
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the tensorboard package: pip install tensorboard")

    args.out_dir = args.out_dir or f"runs/{args.script}-{os.path.basename(os.path.abspath(args.dataset))}"
    if not args.generate and args.dataset not in BUILT_IN and not os.path.isdir(args.dataset):
        what = "is a file, not a folder" if os.path.exists(args.dataset) else "is no dataset and no folder"
        parser.error(f"--dataset {args.dataset} {what}: choose {', '.join(BUILT_IN)}, or a folder of images")
    _check_out_dir(args)
    return args


def _check_out_dir(args):
    out_dir = Path(args.out_dir)
    try:
        checkpoint = (out_dir / "checkpoint.pt").exists()
        holds_run = any((out_dir / f).exists() for f in ("args.json", "log.csv", "checkpoint.pt", "samples"))
        existing = next(p for p in (out_dir, *out_dir.absolute().parents) if os.path.lexists(p))
    except OSError as e:
        fail(f"--out-dir {out_dir} cannot be used: {e.strerror}")
    if not existing.is_dir():
        fail(f"--out-dir {out_dir} cannot be used: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        fail(f"--out-dir {out_dir} cannot be used: no permission to write in {existing}")
    if (args.resume or args.generate) and not checkpoint:
        fail(
            f"there is no checkpoint.pt in {out_dir}: name the run's folder with --out-dir, or train it first"
        )
    if holds_run and not (args.resume or args.generate):
        fail(f"{out_dir} already holds a run: continue it with --resume, or choose another --out-dir")


def _one_line_excepthook(kind, error, trace):
    """What the world does to a program in one line; a traceback only for what is a bug in it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif issubclass(kind, (OSError, MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        print("error:", " ".join(str(error).split()) or kind.__name__, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ------------------------------------------------------------------------------------------------ data


class Data(NamedTuple):
    """A dataset: images uint8 (N, C, S, S), labels int64 (N,) in [0, n_classes). n_classes is 0 where the
    images have no labels, and the labels are then all 0."""

    images: torch.Tensor
    labels: torch.Tensor
    n_classes: int


def load_data(args, labelled=False):
    """The dataset `args.dataset` at `args.image_size`, as `Data`, on `args.device` where it fits.

    Too large for the device, the images stay in host memory and `batches` brings them over. For
    `--generate` no dataset is opened: the images are empty, with the channels and the classes of the run in
    `args.out_dir`, and the flags that shape its networks are copied from it into `args`.
    Exits with code 1 where the data is missing, damaged or empty, or has no labels and must be `labelled`.
    """
    if args.generate:
        saved = _read_checkpoint(args)
        for name in set(saved["args"]) - _MAY_CHANGE - {"seed"}:
            setattr(args, name, saved["args"][name])
        _, channels, n_classes = saved["data"]
        no_images = torch.empty(0, channels, args.image_size, args.image_size, dtype=torch.uint8)
        return Data(no_images, torch.empty(0, dtype=torch.int64), n_classes)

    if args.dataset == "digits":
        images, labels = draw_digits(20_000, args.image_size, args.seed)
        n_classes = 10
    elif args.dataset in BUILT_IN:
        images, labels = load_torchvision(args.dataset, Path(args.data_dir))
        images = _resize(images, args.image_size)
        n_classes = 10
    else:
        images, labels, n_classes = _load_folder(
            Path(args.dataset), Path(args.data_dir), args.image_size, labelled
        )
    if _fits(images, torch.device(args.device)):
        images = images.to(args.device)
    return Data(images, labels.to(args.device), n_classes)


def _fits(images, device):
    """Half of the free memory of a GPU may be data; the rest is for the networks."""
    return device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2


def batches(args, data, first):
    """Endless minibatches for the steps first + 1, first + 2, ...: (x, y) with x float32 (n, C, S, S) in
    [-1, 1] and y int64 (n,), on `args.device`; n = args.n_critic * args.batch_size.

    Sampling is i.i.d., as in Algorithm 1 of Goodfellow et al. 2014. A batch depends on `args.seed` and its
    step alone, so a resumed run, another device, or data in host memory all see the same ones.
    """
    device = torch.device(args.device)
    n = args.n_critic * args.batch_size
    in_place = data.images.device.type == device.type

    def pinned(tensor):  # without it, a copy to the GPU makes the host wait
        return tensor.pin_memory() if device.type == "cuda" else tensor

    def gather(step):
        i = torch.from_numpy(np.random.default_rng((args.seed, step)).integers(len(data.images), size=n))
        return pinned(i), None if in_place else pinned(data.images[i])

    def to_device(i, x):
        i = i.to(device, non_blocking=True)
        x = data.images[i] if in_place else x.to(device, non_blocking=True)
        return x.float().div_(127.5).sub_(1), data.labels[i]

    if in_place:
        for step in itertools.count(first + 1):
            yield to_device(*gather(step))
    with ThreadPoolExecutor(1) as pool:  # reads the next batch while this one is in use
        ahead = pool.submit(gather, first + 1)
        for step in itertools.count(first + 2):
            now, ahead = ahead.result(), pool.submit(gather, step)
            yield to_device(*now)


def draw_digits(n, size, seed):
    """n white-on-black digits in Pillow's built-in font: uint8 (n, 1, size, size), labels int64 (n,).

    Size, stroke width, rotation, shear and shift are random; the same seed gives the same images.
    """
    rng = np.random.default_rng(seed)
    fine = 4 * size  # glyphs are drawn four times larger and reduced, so that thin strokes stay smooth
    heights = np.linspace(0.75, 1.0, 6)
    strokes = np.linspace(0.0, 0.03, 4)
    glyphs = {}
    for h, height in enumerate(heights):
        font = ImageFont.load_default(size=height * fine)
        for s, digit in itertools.product(range(len(strokes)), range(10)):
            canvas = Image.new("L", (fine, fine))
            stroke = round(strokes[s] * fine)
            ImageDraw.Draw(canvas).text(
                (fine / 2, fine / 2), str(digit), 255, font, anchor="mm", stroke_width=stroke
            )
            glyphs[digit, h, s] = canvas.reduce(4)

    labels = rng.integers(10, size=n)
    picks = zip(labels.tolist(), *rng.integers([[len(heights)], [len(strokes)]], size=(2, n)), strict=True)
    angle = np.radians(rng.uniform(-10, 10, n))
    shear = rng.uniform(-0.15, 0.15, n)
    shift = rng.uniform(-0.05, 0.05, (n, 2)) * size
    # Affine maps about the middle of the image, from output to input: rotation, then horizontal shear.
    a, b = np.cos(angle), np.sin(angle) + shear * np.cos(angle)
    c, d = -np.sin(angle), np.cos(angle) - shear * np.sin(angle)
    middle = size / 2 + shift
    x0 = size / 2 - a * middle[:, 0] - b * middle[:, 1]
    y0 = size / 2 - c * middle[:, 0] - d * middle[:, 1]
    maps = np.stack([a, b, x0, c, d, y0], 1).tolist()

    images, bilinear = np.empty((n, 1, size, size), np.uint8), Image.Resampling.BILINEAR
    for k, (pick, coefficients) in enumerate(zip(picks, maps, strict=True)):
        images[k, 0] = glyphs[pick].transform((size, size), Image.Transform.AFFINE, coefficients, bilinear)
    return torch.from_numpy(images), torch.from_numpy(labels)


_TORCHVISION = {  # dataset: class, folder under --data-dir
    "mnist": (torchvision.datasets.MNIST, "MNIST"),
    "fashion-mnist": (torchvision.datasets.FashionMNIST, "FashionMNIST"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
}


def load_torchvision(name, data_dir, train=True):
    """The training or test images of a torchvision dataset, uint8 (N, C, 32, 32), and labels (N,); MNIST's
    28 px padded to 32. Downloads into `data_dir` what is not there; what is there is never written to."""
    dataset_class, folder = _TORCHVISION[name]
    if not (data_dir / folder).exists():
        _download(dataset_class, folder, name, data_dir)
    try:
        dataset = dataset_class(data_dir, train=train)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        if images.ndim == 3:
            images = torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None]
        else:
            images = images.permute(0, 3, 1, 2).contiguous()
        if images.shape[2:] != (32, 32) or len(images) != len(labels) or len(images) == 0:
            raise ValueError(f"images {tuple(images.shape)} with {len(labels)} labels")
    except Exception as e:  # torchvision's readers assert, index and unpickle: any exception can come out
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        fail(
            f"the {name} files in {data_dir / folder} are incomplete or damaged ({reason}): "
            "move that folder away and run again to download it, or name another --data-dir"
        )
    return images, labels


def _download(dataset_class, folder, name, data_dir):
    """Downloads beside the final place and moves the whole folder there: no half of it is ever found."""
    new = not data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as tmp:
            with contextlib.redirect_stdout(io.StringIO()):
                dataset_class(tmp, train=True, download=True)
            with contextlib.suppress(FileExistsError):  # another run was faster
                os.rename(Path(tmp, folder), data_dir / folder)
    except Exception as e:  # urllib, tarfile, the disk: whatever it was, the user needs the same way out
        if new:
            with contextlib.suppress(OSError):
                data_dir.rmdir()
        fail(
            f"{name} is not in {data_dir} and could not be downloaded ({e}): name a folder that has it with "
            "--data-dir, or use --dataset digits, which needs no download"
        )


def _resize(images, size):
    """uint8 (N, C, S, S) -> (N, C, size, size), bilinear with antialiasing, 1,000 images at a time."""
    if images.shape[-1] == size:
        return images
    return torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])


# -------------------------------------------------------------------------------------- folders of images


def _load_folder(folder, data_dir, size, labelled):
    """The images in `folder` (flat, or one subfolder per class) as memory-mapped uint8 (N, C, size, size),
    labels (N,) and the number of classes, 0 for a flat folder.

    Decoded once, into `data_dir/folders/<name>-<place>-<size>-<state>/`, where `state` is a hash of every
    file's name, size and time of change: a folder that has changed is decoded anew.
    """
    files = _list_images(folder)
    if not files:
        fail(f"{folder} holds no images, neither flat nor in one subfolder per class")
    if labelled and not all("/" in name for name, *_ in files):
        fail(f"{folder} has no labels, which this script needs: put the images in one subfolder per class")
    state = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    root, prefix = data_dir / "folders", f"{folder.resolve().name}-{place}-{size}-"
    cache = root / (prefix + state)
    if not cache.exists():
        names = [name for name, *_ in files]
        if all(decode_image(folder / name, size) is None for name in names):
            fail(f"none of the {len(names)} image files in {folder} can be read: {_some(names)}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".decoding-") as tmp:
                _decode_folder(folder, names, size, Path(tmp, "new"))
                with contextlib.suppress(OSError):  # another run was faster: its result is the same
                    os.rename(Path(tmp, "new"), cache)
            for old in root.glob(glob.escape(prefix) + "*"):
                if old != cache:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as e:
            fail(
                f"the decoded images cannot be kept in {root} ({e.strerror or e}): choose another --data-dir"
            )

    try:
        meta = json.loads((cache / "meta.json").read_text())
        images = torch.from_numpy(np.load(cache / "images.npy", mmap_mode="c"))
        labels = torch.from_numpy(np.load(cache / "labels.npy"))
        skipped, n_classes = meta["skipped"], meta["n_classes"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        fail(f"{cache} is damaged ({e}): delete it and run again")
    if skipped:
        print(f"warning: {len(skipped)} unreadable files are skipped: {_some(skipped)}", file=sys.stderr)
    return images, labels, n_classes


def _list_images(folder):
    """Sorted (relative name, bytes, time of change) of every file in `folder` and its subfolders, one level
    deep, whose ending is one that Pillow reads. Hidden ones do not count; a link back up is not followed."""
    endings = tuple(Image.registered_extensions())
    found = []

    def scan(path, prefix, below):
        for entry in os.scandir(path):
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    if below and os.path.realpath(entry.path) not in ancestors:
                        scan(entry.path, entry.name + "/", below=False)
                elif entry.name.lower().endswith(endings):
                    stat = entry.stat()
                    found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
            except OSError:  # a broken or circular link: reported with the unreadable files
                found.append((prefix + entry.name, 0, 0))

    ancestors = {str(p) for p in (folder.resolve(), *folder.resolve().parents)}
    try:
        scan(folder, "", below=True)
    except OSError as e:
        fail(f"{e.filename} cannot be read: {e.strerror}")
    return sorted(found)


def _decode_folder(folder, names, size, out):
    """Writes images.npy, labels.npy and meta.json for the named files into the new folder `out`."""
    out.mkdir()
    images = np.lib.format.open_memmap(out / "all.npy", "w+", np.uint8, (len(names), 3, size, size))
    if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map would kill the process
        with open(out / "all.npy", "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    kept, skipped, all_grey = [], [], True
    # Threads are enough: Pillow decodes and resizes without holding the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = [names[i : i + 64] for i in range(0, len(names), 64)]
        decoded = pool.map(lambda chunk: [decode_image(folder / name, size) for name in chunk], chunks)
        decoded = itertools.chain.from_iterable(decoded)
        for name, image in zip(names, tqdm(decoded, "decoding", len(names), unit="image"), strict=True):
            if image is None:
                skipped.append(name)
                continue
            images[len(kept)] = image
            all_grey = all_grey and len(image) == 1
            kept.append(name)
    if skipped or all_grey:
        np.save(out / "images.npy", images[: len(kept), : 1 if all_grey else 3])
        del images
        (out / "all.npy").unlink()
    else:
        images.flush()
        (out / "all.npy").rename(out / "images.npy")
    classes = sorted({name.split("/")[0] for name in kept}) if all("/" in name for name in kept) else []
    number = {c: i for i, c in enumerate(classes)}
    np.save(out / "labels.npy", np.array([number.get(name.split("/")[0], 0) for name in kept], np.int64))
    meta = {
        "folder": str(folder.resolve()),
        "n_classes": len(classes),
        "classes": classes,
        "skipped": skipped,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=1))


def _some(names):
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def decode_image(path, size):
    """One image file as uint8 (1 or 3, size, size), or None where Pillow cannot read it.

    The first frame, turned upright by its EXIF orientation, transparency on white, the shorter side resized
    to `size` with antialiasing and the middle cut out. Grey modes give one channel.
    """
    try:
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
            image.draft(None, (size, size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, still above `size`
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                values = np.asarray(image, np.float32)
                if image.mode.startswith("I;16") or values.max() > 255:
                    scale = 255 / 65535
                else:  # floats from 0 to 1, or 8 bits in a wider mode
                    scale = 255 if image.mode == "F" and values.max() <= 1 else 1
                image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            if image.mode != ("L" if grey else "RGB"):
                image = image.convert("L" if grey else "RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except Exception:  # Pillow's many readers raise many things; each means that this file is no image
        return None
    pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------- run files

# Flags a run may be continued under with other values; every other one shapes the run.
_MAY_CHANGE = {
    *("steps", "log_every", "save_every", "device", "data_dir", "out_dir"),
    *("resume", "generate", "tensorboard", "cuda_graph"),
}


def write_file(path, content):
    """Writes bytes so that at every moment `path` holds either what it held before or all of `content`.
    Not for two processes at once."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        fail(f"{path} cannot be written ({e.strerror}); no file was changed")


def open_run(args, data, state):
    """The step to go on from: 0 in a new run, or with --resume that of the checkpoint in `args.out_dir`,
    which is read into `state`: names to modules, optimisers and tensors.

    Exits with code 1 where the checkpoint cannot be read, is another script's, or was made under other flags.
    """
    args.data = [len(data.images), data.images.shape[1], data.n_classes]
    _check_out_dir(args)  # again: another run may have come while the data was loading
    if not args.resume:
        return 0
    saved = _read_checkpoint(args)
    then, now = saved["args"], vars(args)
    if os.path.isdir(now["dataset"]) and then["dataset"] not in BUILT_IN:
        then["dataset"] = now["dataset"]  # a folder may have moved: what counts is in `data`
    differences = [
        f"--{k.replace('_', '-')} is {now.get(k)}, the run has {then[k]}"
        for k in then
        if k not in _MAY_CHANGE and then[k] != now.get(k)
    ]
    if saved["data"] != args.data:
        differences.append(
            f"the data is now (images, channels, classes) {args.data}, the run has {saved['data']}"
        )
    if differences:
        fail(f"{args.out_dir} cannot be continued with these flags: {'; '.join(differences)}")
    _load_state(args, state, saved)
    torch.set_rng_state(saved["rng"])
    if torch.device(args.device).type == "cuda":
        if saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], args.device)
        else:  # the run comes from a CPU: go on with new noise, not with the first steps' again
            torch.cuda.manual_seed(args.seed + saved["step"])
    log = Path(args.out_dir, "log.csv")
    if log.exists():  # rows from after the checkpoint will be written again
        rows = [row for row in csv.reader(log.read_text().splitlines()) if len(row) == len(LOG_COLUMNS)]
        rows = [row for row in rows if not row[0].isdigit() or int(row[0]) <= saved["step"]]
        write_file(log, "".join(",".join(row) + "\n" for row in rows).encode())
    return saved["step"]


def _read_checkpoint(args):
    path = Path(args.out_dir, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torn zip files and foreign pickles raise many things
        fail(f"{path} is not a readable checkpoint ({(str(e) or type(e).__name__).splitlines()[0]})")
    if not isinstance(saved, dict) or not {"script", "args", "data", "step", "rng", "state"} <= set(saved):
        fail(f"{path} is not a checkpoint of these scripts")
    if saved["script"] != args.script:
        fail(f"{path} is a checkpoint of {saved['script']}.py, not of {args.script}.py")
    return saved


def _load_state(args, state, saved):
    try:
        for name, part in state.items():
            content = saved["state"][name]
            if isinstance(part, torch.Tensor):
                part.copy_(content)
                continue
            if isinstance(part, torch.optim.Optimizer):
                # How it runs belongs to this machine, not to the file.
                for group, old in zip(part.param_groups, content["param_groups"], strict=True):
                    old.update({k: group[k] for k in ("fused", "foreach", "capturable") if k in group})
            part.load_state_dict(content)
    except (KeyError, RuntimeError, ValueError) as e:
        fail(f"{args.out_dir}/checkpoint.pt does not fit {args.script}.py ({str(e).splitlines()[0]})")


def save_checkpoint(args, step, state):
    """Writes `args.out_dir/checkpoint.pt` (`torch.load` reads it with weights_only=True) and args.json.

    Refuses, with exit code 1, weights that are not finite, so that the last good checkpoint stays.
    """
    parts = {k: v if isinstance(v, torch.Tensor) else v.state_dict() for k, v in state.items()}
    for name, part in parts.items():
        tensors = part.values() if isinstance(state[name], torch.nn.Module) else ()
        if not all(t.isfinite().all() for t in tensors):
            fail(f"the weights of {name} are not finite at step {step}; {_last_checkpoint(args)}")
    on_cuda = torch.device(args.device).type == "cuda"
    flags = {k: v for k, v in vars(args).items() if k not in ("script", "data")}
    buffer = io.BytesIO()
    torch.save(
        {
            "script": args.script,
            "args": flags,
            "data": args.data,
            "step": step,
            "state": parts,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(args.device) if on_cuda else None,
        },
        buffer,
    )
    write_file(Path(args.out_dir, "checkpoint.pt"), buffer.getvalue())
    global _saved
    _saved = step
    flags.update(step=step, torch=torch.__version__)
    write_file(Path(args.out_dir, "args.json"), (json.dumps(flags, indent=1) + "\n").encode())


def _last_checkpoint(args):
    if Path(args.out_dir, "checkpoint.pt").exists():
        return f"checkpoint.pt in {args.out_dir} is from before; try again elsewhere with a lower --lr"
    return "no checkpoint was written"


def save_grid(args, name, images, columns=8):
    """Writes images (N, C, S, S) in [-1, 1] as a grid, `args.out_dir/samples/<name>.png`, `columns` in a row.
    `name` is the step, written with six digits, or a word."""
    file = name if isinstance(name, str) else f"{name:06d}"
    buffer = io.BytesIO()
    torchvision.utils.save_image(images, buffer, "png", nrow=columns, normalize=True, value_range=(-1, 1))
    write_file(Path(args.out_dir, "samples", f"{file}.png"), buffer.getvalue())
    if args.tensorboard and file != name:
        grid = torchvision.utils.make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))
        _tensorboard(args.out_dir).add_image("samples", grid, name)


@functools.cache
def _tensorboard(out_dir):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(out_dir)


def generate(args, state, draw, n_classes=0):
    """Writes `args.generate` images from the checkpoint to `args.out_dir/generated/000000.png`, ...

    `draw(i)` gives the images (100, C, S, S) in [-1, 1] numbered i (int64, (100,)). Where there are classes,
    image i is of class i % n_classes and its file says so: `000003_class3.png`. The same `--seed` gives the
    same images. Exits with code 1 where that folder exists.
    """
    _load_state(args, state, _read_checkpoint(args))
    torch.manual_seed(args.seed)
    folder = Path(args.out_dir, "generated")
    try:
        folder.mkdir()
    except OSError as e:
        fail(f"{folder} cannot be made ({e.strerror}): move or delete what is there")
    bar = tqdm(desc="generating", total=args.generate, unit="image")
    for start in range(0, args.generate, 100):
        i = torch.arange(start, start + 100, device=args.device)
        images = draw(i).add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        for k, image in zip(range(start, args.generate), images, strict=False):
            name = f"{k:06d}_class{k % n_classes}.png" if n_classes else f"{k:06d}.png"
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            try:
                picture.save(folder / name)
            except OSError as e:
                fail(f"{folder / name} cannot be written ({e.strerror})")
            bar.update()
    bar.close()
    print(folder)


# -------------------------------------------------------------------------------------------- the loop

LOG_COLUMNS = ("step", "seconds", "loss_D", "loss_G", "d_real", "d_fake")
_stop = False  # set by Ctrl-C: finish the step in hand, save, end
_saved = None  # the step of the last checkpoint


def log_due(args, step):
    """True at every `args.log_every` steps, and whenever a save is due."""
    return step % args.log_every == 0 or save_due(args, step)


def save_due(args, step):
    """True at every `args.save_every` steps, after the last step, and after Ctrl-C."""
    return step % args.save_every == 0 or step == args.steps or _stop


class steps(tqdm):
    """`for step in steps(args, first)`: the steps first + 1 ... args.steps, with a progress bar on stderr.

    Ctrl-C lets the step in hand end (`save_due` is then true) and exits with code 130, saying how to go on; a
    second Ctrl-C ends the program at once.
    """

    def __init__(self, args, first):
        terminal = sys.stderr.isatty()
        self.args, self.last = args, max(first, args.steps)
        self.started = time.time() - _logged_seconds(args)
        super().__init__(
            range(first + 1, args.steps + 1),
            args.script,
            args.steps,
            initial=first,
            unit="step",
            smoothing=0.05,
            mininterval=0.2 if terminal else 30,
            dynamic_ncols=terminal,
        )

    def __iter__(self):
        global _stop
        _stop = False

        def on_interrupt(*_):
            global _stop
            _stop = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            for step in super().__iter__():
                yield step
                if _stop and _saved == step:  # else it came after this step's save_due: one more step
                    self.close()
                    message = f"stopped and saved at step {step}: the same command with --resume continues"
                    print(message, file=sys.stderr)
                    sys.exit(130)
        finally:
            signal.signal(signal.SIGINT, before)
            _stop = False
        print(f"{self.args.out_dir}/samples/{self.last:06d}.png")


def _logged_seconds(args):
    try:
        return float(Path(args.out_dir, "log.csv").read_text().splitlines()[-1].split(",")[1])
    except (OSError, IndexError, ValueError):
        return 0.0


def log(bar, step, losses):
    """Writes one row of `LOG_COLUMNS` to log.csv and shows the losses on the progress bar.

    `losses` are the four scalar tensors of the step. Reading them is the loop's one host sync. Exits with
    code 1, naming the step, where one is not finite.
    """
    args = bar.args
    values = torch.stack([loss.detach() for loss in losses]).tolist()
    shown = dict(zip(LOG_COLUMNS[2:], (f"{v:.5g}" for v in values), strict=True))
    if not all(map(math.isfinite, values)):
        bar.close()
        fail(
            f"step {step} is not finite ({', '.join(map('='.join, shown.items()))}); {_last_checkpoint(args)}"
        )
    path = Path(args.out_dir, "log.csv")
    seconds = time.time() - bar.started
    header = "" if path.exists() else ",".join(LOG_COLUMNS) + "\n"
    try:
        with open(path, "a") as f:
            f.write(f"{header}{step},{seconds:.2f},{','.join(shown.values())}\n")
    except OSError as e:
        fail(f"{path} cannot be written ({e.strerror})")
    bar.set_postfix(shown, refresh=False)
    if args.tensorboard:
        for name, value in zip(LOG_COLUMNS[2:], values, strict=True):
            _tensorboard(args.out_dir).add_scalar(name, value, step)


def cuda_graph(function, args, warmup=3):
    """`function`, captured at its fourth call as one CUDA graph and replayed from then on, with --cuda-graph.

    `function` takes and returns tensors of fixed shape on the device, and neither waits for the device nor
    depends on values there. The first three calls run as they are, on a side stream, so that lazy
    initialisation is not captured. A capture that fails leaves one warning and the function as it was.
    """
    if not args.cuda_graph:
        return function
    calls, graph, inputs, outputs, side = 0, None, None, None, torch.cuda.Stream()

    def detached(inputs):  # a result with its history would keep autograd's nodes of that step's stream alive
        return [x.detach() for x in function(*inputs)]

    def call(*new_inputs):
        nonlocal calls, graph, inputs, outputs
        calls += 1
        if calls <= warmup:
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = detached(new_inputs)
            current.wait_stream(side)
            return result
        if calls == warmup + 1:
            try:
                inputs = [x.clone() for x in new_inputs]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # batches may be pinning
                    outputs = detached(inputs)
            except RuntimeError as e:
                graph = None
                reason = (str(e) or type(e).__name__).splitlines()[0]
                print(f"warning: no CUDA graph, going on without ({reason})", file=sys.stderr)
        if graph is None:
            return function(*new_inputs)
        for buffer, x in zip(inputs, new_inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return outputs

    return call
