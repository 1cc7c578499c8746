"""Data in, pictures and run files out: what the scripts share. Nothing in here knows what a GAN is.

What a user or the world breaks ends in one line on stderr, with exit code 2 for a wrong argument, else 1.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

try:
    import filelock
    import numpy as np
    import torch
    import torchvision
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from torchvision.transforms import functional as TF
    from tqdm import tqdm
except KeyboardInterrupt:  # these imports take seconds, and a Ctrl-C in them deserves no traceback
    sys.exit(130)


def fail(message):
    """Ends the program with exit code 1 and `message` as one line on stderr, below any progress bar."""
    for bar in list(tqdm._instances):
        bar.close()
    sys.exit(f"error: {_printable(message)}")


def _printable(text):
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))  # file names hold anything


def _one_line_excepthook(kind, error, trace):
    """What the world does to a program in one line; a traceback only for what is a bug in it."""
    message = "interrupted" if kind is KeyboardInterrupt else str(error)
    if kind is MemoryError or any(s in message for s in ("out of memory", "allocate", "size calculation")):
        message = "not enough memory: lower --batch-size, --width or --image-size"
    elif not issubclass(kind, (OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    try:
        fail(message)
    except SystemExit as e:
        print(e, file=sys.stderr)


class _Display:
    """A standard stream that nothing depends on: its terminal, pipe or disk may be gone."""

    def __init__(self, stream):
        self.stream = getattr(stream, "stream", stream) or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        """`write` has done it."""


_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_OF_ONE_START = {"out_dir", "device", "resume", "generate", "label", "cuda_graph", "run"}  # not the run's
_MAY_CHANGE = {"dataset", "data_dir", "steps", "log_every", "save_every", "tensorboard"}  # while it goes on


def parse_args(parser, argv, script):
    """`parser.parse_args(argv)`, checked; `script` is the caller's `__file__`. With --resume and --generate
    the flags of the run in --out-dir are the defaults; a typed one that shaped it otherwise is refused."""
    parser.prog = Path(script).name
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {_printable(message)}\n")
    sys.stdout, sys.stderr = _Display(sys.stdout), _Display(sys.stderr)
    sys.excepthook = _one_line_excepthook
    args = parser.parse_args(argv)

    def check(name, ok, wanted):
        if not ok:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be {wanted}")

    check("generate", not args.generate or not args.resume, "left out, or --resume: one draws, one trains on")
    gpus = range(torch.cuda.device_count())
    devices = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in gpus)]
    check("device", args.device in devices, f"one of this machine's: {', '.join(devices)}")
    if ":" in args.device:  # "cuda" alone is the current one, and no name that set_device takes
        torch.cuda.set_device(args.device)  # whose random numbers and graphs they are
    run = args.run = SimpleNamespace(script=Path(script).stem, log="", seconds=0.0, shown={}, board=None)
    run.data = {"images": 0, "channels": 0, "classes": [], "fingerprint": 0}
    run.random = torch if args.device == "cpu" else torch.cuda  # whose generator the run draws from
    folder = f"{run.script}-{os.path.basename(os.path.abspath(args.dataset))}"
    args.out_dir = args.out_dir.replace("{script}-{dataset}", folder)
    doing = f"--generate {args.generate}" if args.generate else "--resume"
    run.command = f"python {parser.prog} --out-dir {shlex.quote(args.out_dir)} {doing}"
    if args.resume or args.generate:
        saved = _read_checkpoint(args, {})
        then, run.data = saved["args"], saved["data"]
        parser.set_defaults(out_dir=args.out_dir, **then)
        args = parser.parse_args(argv, SimpleNamespace(run=run))
        free = _MAY_CHANGE | ({"seed"} if args.generate else set())
        for name, was in then.items():
            check(name, name in free or getattr(args, name) == was, f"{was}, as in the run: {run.command}")

    for name, value in vars(args).items():
        least = {"seed": 0, "label": 0, "batch_size": 2}.get(name, int(parser.get_default(name) != 0))
        check(name, type(value) is not int or least <= value < 2**31, f"{least} or more, and below 2^31")
        check(name, type(value) is not float or math.isfinite(value), "a finite number")
        check(name, name not in ("beta1", "beta2", "momentum", "alpha") or 0 <= value < 1, "in [0, 1)")
    check("image_size", args.image_size in [2**k for k in range(4, 11)], "a power of two from 16 to 1024")
    check("lr", args.lr > 0, "above 0")
    known = args.dataset in (*_TORCHVISION, "digits") or os.path.isdir(args.dataset)
    check("dataset", known or args.generate, f"{', '.join(_TORCHVISION)}, digits, or a folder of images")
    label, n = getattr(args, "label", None), len(run.data["classes"])
    check("label", label is None or (args.generate and label < n), f"below {n}, and with --generate")
    check("cuda_graph", not args.cuda_graph or args.device != "cpu", "left out on a CPU")
    board = not args.tensorboard or importlib.util.find_spec("tensorboard")
    check("tensorboard", board, "left out, or installed: pip install tensorboard")
    _claim(args, lock=args.resume or args.generate)
    return args


def _claim(args, lock=True):
    """Fails where a run is in the way of a new one; locks the run for this process, however that ends."""
    folder, files = Path(args.out_dir), ("checkpoint.pt", "args.json", "log.csv", "samples")
    if not args.resume and not args.generate and any((folder / name).exists() for name in files):
        fail(f"{folder} holds a run: {args.run.command} continues it; or choose another --out-dir")
    if lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            args.run.lock = filelock.FileLock(folder / ".lock", is_singleton=True)
            args.run.lock.acquire(timeout=0)
        except filelock.Timeout:
            fail(f"another process is at work on {folder}: wait for it, or stop it")


# ---------------------------------------------------------------------------------------------- data in


def load_data(args, labelled=False):
    """`args.dataset`: `images` uint8 (N, channels, S, S), on `args.device` if half of its free memory holds
    them; `labels` int64 (N,) below `n_classes` (0: none); with --generate only `channels` and `n_classes`.
    Fails where the data is missing, damaged or empty, or has no labels and must be `labelled`."""
    size, note, then = args.image_size, "", args.run.data
    if args.generate:
        return SimpleNamespace(channels=then["channels"], n_classes=len(then["classes"]))
    if args.dataset == "digits":
        images, labels = draw_digits(min(20_000, 2**31 // size**2), size, args.seed)
        classes = list("0123456789")
    elif args.dataset in _TORCHVISION:
        images, labels, classes = load_torchvision(args.dataset, Path(args.data_dir))
        images = torch.cat([TF.resize(part, [size, size], antialias=True) for part in images.split(1000)])
    else:
        images, labels, classes, note = _load_folder(Path(args.dataset), Path(args.data_dir), size, labelled)
    n, channels = images.shape[:2]
    note = f", {len(classes)} classes{note}" if classes else note
    print(_printable(f"{args.dataset}: {n:,} images of {channels}x{size}x{size}{note}"), file=sys.stderr)
    fingerprint = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    args.run.data = {"images": n, "channels": channels, "classes": classes, "fingerprint": fingerprint}
    if args.device == "cpu" or images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(args.device)
    labels = labels.to(args.device)
    return SimpleNamespace(images=images, labels=labels, channels=channels, n_classes=len(classes))


def batches(args, data, start=0):
    """Endless minibatches from number `start` on: x float32 (batch_size, C, S, S) in [-1, 1], y int64
    (batch_size,), on `args.device`. Drawn i.i.d., as in Algorithm 1 of Goodfellow et al. 2014, from
    `args.seed` and the number alone: a resumed run or another device sees the same ones."""
    for number in itertools.count(start + 1):
        rng = np.random.default_rng((args.seed, number))
        i = torch.from_numpy(rng.integers(len(data.images), size=args.batch_size))
        x = data.images[i.to(data.images.device, non_blocking=True)].to(args.device, non_blocking=True)
        yield x.float().div_(127.5).sub_(1), data.labels[i.to(args.device, non_blocking=True)]


def draw_digits(n, size, seed):
    """White-on-black digits, varied at random by `seed`: uint8 (n, 1, size, size), labels int64 (n,)."""
    rng, glyphs, fine = np.random.default_rng(seed), [], 4 * size
    font = ImageFont.load_default(size=fine)
    for bold, digit in itertools.product((0, 0.01, 0.02, 0.03), "0123456789"):
        canvas, middle = Image.new("L", (fine, fine)), (fine / 2, fine / 2)
        ImageDraw.Draw(canvas).text(middle, digit, 255, font, "mm", stroke_width=round(bold * fine))
        glyphs.append(TF.pil_to_tensor(canvas.reduce(4)))  # drawn larger, so that thin strokes stay smooth
    pick, glyphs = torch.from_numpy(rng.integers(len(glyphs), size=n)), torch.stack(glyphs).float()
    low, high = [-0.17, -0.15, 1, -0.1, -0.1], [0.17, 0.15, 1.33, 0.1, 0.1]
    angle, shear, zoom, x, y = rng.uniform(low, high, (n, 5)).T
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    maps = np.stack([cos, sin + shear * cos, x, -sin, cos - shear * sin, y], 1).reshape(n, 2, 3)
    maps, images = torch.from_numpy(maps).float(), torch.empty(n, 1, size, size, dtype=torch.uint8)
    for part in tqdm(torch.arange(n).split(max(1, 2**20 // size**2)), "drawing digits", delay=2):
        grid = torch.nn.functional.affine_grid(maps[part], (len(part), 1, size, size), align_corners=False)
        images[part] = torch.nn.functional.grid_sample(glyphs[pick[part]], grid, align_corners=False).byte()
    return images, pick % 10


def load_torchvision(name, data_dir, train=True):
    """A torchvision dataset: uint8 (N, C, 32, 32), MNIST's 28 px zero-padded; labels (N,); class names.
    Downloaded into `data_dir` where it is not. Fails where it cannot be, or what is there is damaged."""
    dataset_class = getattr(torchvision.datasets, _TORCHVISION[name])
    folder = data_dir / getattr(dataset_class, "base_folder", _TORCHVISION[name])
    try:
        dataset = dataset_class(data_dir, train=train, download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        if images.ndim == 3:
            images = torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None]
        else:
            images = images.permute(0, 3, 1, 2).contiguous()
        if images.shape[2:] != (32, 32) or len(images) != len(labels) or labels.max() > 9:
            raise ValueError(f"images {tuple(images.shape)}, {len(labels)} labels up to {labels.max()}")
        return images, labels, list(dataset.classes)
    except Exception as e:  # torchvision's readers assert, index, unpickle and download: anything comes out
        problem = f"is damaged, or missing and cannot be downloaded ({type(e).__name__}: {e})"
        fail(f"{folder} {problem}: move it away, or use --dataset digits, which needs no download")


def _load_folder(folder, data_dir, size, labelled):
    """Images uint8 (N, C, size, size), labels (N,), class names, and a note of these and what was left out.
    Flat or in one subfolder per class, whichever holds more; decoded once, into a file under `data_dir`."""
    paths = {p.relative_to(folder).as_posix(): p for p in (*folder.glob("*"), *folder.glob("*/*"))}
    paths = {name: paths[name] for name in sorted(paths) if "/." not in f"/{name}"}  # no hidden ones
    endings = set(Image.registered_extensions())
    images = [name for name, p in paths.items() if p.suffix.lower() in endings and p.is_file()]
    flat = [name for name in images if "/" not in name]
    names = max(flat, [name for name in images if "/" in name], key=len)
    others = [name for name in paths.keys() - set(names) if "/" in name or not paths[name].is_dir()]
    if not names or (labelled and names is flat):
        fail(f"{folder} holds no images{'' if labelled else ', neither flat nor'} in one subfolder per class")
    stats = [(name, paths[name].stat()) for name in names]
    key = zlib.crc32(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode())
    cache = data_dir / "folders" / f"{zlib.crc32(os.fsencode(folder.resolve())):08x}-{size}.pt"
    try:
        images, readable = torch.load(cache, mmap=True, weights_only=True)[key]
    except Exception:  # missing, stale, torn or foreign
        images, readable = _decode([paths[name] for name in names], size)
        if not any(readable):
            fail(f"{folder} holds {len(names)} image files, of which none can be read")
        with replacing(cache, lock=True) as f:
            torch.save({key: (images, readable)}, f)
    skipped = [name for name, ok in zip(names, readable, strict=True) if not ok]
    parents = [name.rpartition("/")[0] for name, ok in zip(names, readable, strict=True) if ok]
    classes = sorted(set(parents) - {""})
    note = f" ({', '.join(classes)})" if classes else ""
    for what, left_out in (("unreadable, skipped", skipped), ("ignored", sorted(others))):
        note += f"; {len(left_out):,} {what}: {', '.join(left_out[:10])}" if left_out else ""
    number = {name: k for k, name in enumerate(classes or [""])}
    return images, torch.tensor([number[parent] for parent in parents]), classes, note


def _decode(paths, size):
    """The readable images as uint8 (N, 1 or 3, size, size), and for each path whether it was one."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def decode(k):
        image = decode_image(paths[k], size)
        images[k] = 0 if image is None else torch.from_numpy(image)
        return image is not None

    with ThreadPool() as pool:  # threads do: Pillow works without the interpreter's lock
        readable = list(tqdm(pool.imap(decode, range(len(paths))), "decoding", len(paths), unit="image"))
    images = images if all(readable) else images[torch.tensor(readable)]
    grey = all((part == part[:, :1]).all() for part in images.split(1000))
    return images[:, :1].contiguous() if grey else images, readable


def decode_image(path, size):
    """One image file as uint8 (3, size, size), or None where Pillow cannot read it: the first frame, turned
    as its EXIF orientation says, transparency on white, the middle square resized with antialiasing."""
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, still above `size`
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return np.array(image).transpose(2, 0, 1)
    except Exception:  # Pillow's many readers raise many things; each means that this file is no image
        return None


# ------------------------------------------------------------------------------------------ run files out


@contextlib.contextmanager
def replacing(path, lock=False):
    """`with replacing(path) as f:` a binary file that takes the place of `path` at the end, whole or not at
    all. Fails where it cannot be written."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(".lock")) if lock else contextlib.nullcontext():
            with open(tmp, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # the latter is what torch.save makes of a full disk
        with contextlib.suppress(OSError):
            tmp.unlink()
        fail(f"{path} cannot be written ({e}); what was there is unchanged")


def open_run(args, state):
    """The step to go on from: 0, or with --resume the checkpoint's, read into `state`, names to modules,
    optimisers and tensors. Fails where it is damaged, another script's, or the data is not the run's."""
    _claim(args)
    for part in state.values():
        for group in getattr(part, "param_groups", ()):  # an optimiser's
            group["capturable"] = args.cuda_graph
    if args.tensorboard:
        args.run.board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.out_dir)
    if not args.resume:
        return 0
    saved = _read_checkpoint(args, state)
    if saved["data"] != args.run.data:
        fail(f"{args.out_dir} was trained on other images than {args.dataset}: leave --dataset out")
    args.run.log, args.run.seconds = saved["log"], saved["seconds"]
    with replacing(Path(args.out_dir, "log.csv")) as f:  # rows after the checkpoint will come again
        f.write(saved["log"].encode())
    torch.manual_seed(args.seed + saved["step"])  # for a run from another kind of device: new noise
    if saved["rng"].shape == args.run.random.get_rng_state().shape:
        args.run.random.set_rng_state(saved["rng"])
    return saved["step"]


def _contents(args, step, state):
    flags = {k: v for k, v in vars(args).items() if k not in _OF_ONE_START}
    parts = {k: v if isinstance(v, torch.Tensor) else v.state_dict() for k, v in state.items()}
    run, rng = args.run, args.run.random.get_rng_state()
    saved = {"script": run.script, "args": flags, "data": run.data, "log": run.log, "seconds": run.seconds}
    return {**saved, "step": step, "state": parts, "rng": rng}


def _same_form(now, then):
    """Whether `then` can stand where `now` does: the same entries, types and shapes, and finite numbers."""
    if isinstance(now, dict) and isinstance(then, dict):
        return now.keys() == then.keys() and all(_same_form(now[k], then[k]) for k in now)
    if isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor):
        return (now.shape, now.dtype) == (then.shape, then.dtype) and bool(then.isfinite().all())
    return type(now) is type(then)


def _read_checkpoint(args, state):
    """The checkpoint in `args.out_dir`, read into the parts of `state` after all of it has been checked."""
    path = Path(args.out_dir, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then = {name: saved["state"][name] for name in state}
        for name, part in state.items():
            if isinstance(part, torch.optim.Optimizer):
                if then[name]["state"]:  # empty before the first step
                    for p in part.param_groups[0]["params"]:
                        p.grad = torch.zeros_like(p)
                    part.step()  # moves nothing without gradients, and makes the entries to compare with
                # How it runs, as fused or capturable, is for this start to say; the rest is in the flags.
                then[name] = {**then[name], "param_groups": part.state_dict()["param_groups"]}
        now = _contents(args, 0, state)
        ours = (saved["script"], saved["rng"].ndim) == (args.run.script, 1)
        if not ours or not _same_form(now, {**saved, "state": then, "rng": now["rng"]}):
            raise ValueError
        for name, part in state.items():
            (part.copy_ if isinstance(part, torch.Tensor) else part.load_state_dict)(then[name])
        return saved
    except Exception:  # torn files, foreign pickles and edited dictionaries raise many things
        fail(
            f"{path} is missing, damaged, or no checkpoint of this {args.run.script}.py; nothing was changed"
        )


def save_checkpoint(args, step, state):
    """Writes `args.out_dir/checkpoint.pt`, for `torch.load`, and args.json. Fails where a weight is not
    finite: the last good checkpoint stays."""
    saved = _contents(args, step, state)
    if not _same_form(saved["state"], saved["state"]):
        fail(f"the weights are not finite at step {step}; the checkpoint is from before; try a lower --lr")
    with replacing(Path(args.out_dir, "checkpoint.pt")) as f:
        torch.save(saved, f)
    with replacing(Path(args.out_dir, "args.json")) as f:
        f.write(json.dumps({**saved["args"], **saved["data"], "torch": torch.__version__}, indent=1).encode())


def save_grid(args, step, images, columns=8):
    """Writes images (N, C, S, S) in [-1, 1] as a grid, `args.out_dir/samples/<step>.png`, `columns` in a row,
    enlarged by a whole factor to 512 px or more."""
    grid = torchvision.utils.make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))
    times = math.ceil(512 / max(grid.shape[1:]))
    with replacing(Path(args.out_dir, "samples", f"{step:06d}.png")) as f:
        torchvision.utils.save_image(grid.repeat_interleave(times, 1).repeat_interleave(times, 2), f, "png")
    if args.run.board:
        args.run.board.add_image("samples", grid, step)


def generate(args, state, draw):
    """Writes `args.generate` images to `args.out_dir/generated/000000.png`, ..., the same for the same seed:
    `draw(n)` gives n, (n, C, S, S) in [-1, 1]; with a flag --label `draw(n, y)` does, of that class or all in
    turn, as the names say (`000003_class3.png`). Fails where that folder exists; it appears when complete."""
    folder, tmp = Path(args.out_dir, "generated"), Path(args.out_dir, "generated.tmp")
    if folder.exists():
        fail(f"{folder} exists: move or delete it")
    _read_checkpoint(args, state)
    torch.manual_seed(args.seed)
    y = torch.arange(args.generate + 100, device=args.device) % max(1, len(args.run.data["classes"]))
    y = y if getattr(args, "label", None) is None else torch.full_like(y, args.label)
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir()
        for k in tqdm(range(args.generate), "generating", unit="image"):
            if k % 100 == 0:
                images = draw(100, y[k : k + 100]) if hasattr(args, "label") else draw(100)
                images = images.add(1).mul(127.5).round().byte().cpu()
            label = f"_class{y[k]}" if hasattr(args, "label") else ""
            TF.to_pil_image(images[k % 100]).save(tmp / f"{k:06d}{label}.png")
        tmp.rename(folder)
    except OSError as e:
        fail(f"{tmp} cannot be written ({e})")
    print(folder)


def steps(args, first):
    """(step, log_due, save_due) of the steps first + 1 ... args.steps, with a progress bar. Saves are due
    every `args.save_every` steps and at the last, log rows every `args.log_every` and with each save. At the
    first Ctrl-C, SIGTERM or SIGHUP one more step saves, and exits with 128 plus its number; a second ends."""
    came = []

    def on_signal(number, frame):
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # no print: one may be what was interrupted
            os.write(2, b"\nsaving after one more step; once more ends it at once\n")

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, and a thread may set no handlers
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = numbers if threading.current_thread() is threading.main_thread() else []
    handlers = {s: signal.getsignal(s) for s in numbers}
    for s, handler in handlers.items():
        signal.signal(s, handler if handler == signal.SIG_IGN else on_signal)  # nohup ignores one
    args.run.started = time.monotonic() - args.run.seconds
    bar = tqdm(range(first + 1, args.steps + 1), None, args.steps, initial=first, unit="step", mininterval=1)
    try:
        for step in bar:
            stop = bool(came)
            save_due = stop or step == args.steps or step % args.save_every == 0
            yield step, save_due or step % args.log_every == 0, save_due
            bar.set_postfix(args.run.shown, refresh=False)
            if stop:
                break
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if came:
        print(f"saved at step {step}: {args.run.command} continues", file=sys.stderr)
        sys.exit(128 + came[0])
    print(f"{args.out_dir}/samples/{max(first, args.steps):06d}.png")


def log(args, step, **values):
    """Writes a row to log.csv, step, seconds and the scalar tensors `values`, and shows them on the bar.
    Reading them is the loop's one host sync. Fails where one is not finite."""
    numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
    args.run.shown = {name: f"{v:.4g}" for name, v in numbers.items()}
    if not all(map(math.isfinite, numbers.values())):
        fail(f"step {step} is not finite {args.run.shown}; the checkpoint is from before; try a lower --lr")
    header = "" if args.run.log else ",".join(["step", "seconds", *values]) + "\n"
    args.run.seconds = time.monotonic() - args.run.started
    row = f"{header}{step},{args.run.seconds:.2f},{','.join(f'{v:.5g}' for v in numbers.values())}\n"
    args.run.log += row
    try:
        with open(Path(args.out_dir, "log.csv"), "a") as f:
            f.write(row)
    except OSError as e:
        fail(f"{args.out_dir}/log.csv cannot be written ({e})")
    if args.run.board:
        for name, value in numbers.items():
            args.run.board.add_scalar(name, value, step)


def cuda_graphs(args, *functions):
    """The functions; with --cuda-graph each is captured at its fourth call as one CUDA graph and replayed
    from then on. They take and return tensors of fixed shape on the device, and neither wait for it nor
    depend on values there. Fails where a capture does: CUDA's random numbers cannot be trusted after it."""
    if not args.cuda_graph:
        return functions
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())  # captures must not depend on work of the default stream

    def detached(result):  # with its history it would keep autograd's nodes and their stream
        return result.detach() if isinstance(result, torch.Tensor) else [t.detach() for t in result]

    def calls(function):
        inputs = yield
        for _ in range(3):  # lazy initialisation is not to be captured
            inputs = yield detached(function(*inputs))
        graph, buffers = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        try:
            with torch.cuda.graph(graph):
                outputs = detached(function(*buffers))
        except RuntimeError as e:
            fail(f"no CUDA graph ({e}): {args.run.command} goes on without one")
        while True:
            graph.replay()
            inputs = yield outputs
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x)

    generators = [calls(function) for function in functions]
    for generator in generators:
        next(generator)
    return [lambda *inputs, g=generator: g.send(inputs) for generator in generators]
