"""The bookkeeping of a run, which a copy of a script can do without: shared flags, files, resume,
the log, CUDA graphs and several GPUs. What is trained, and on what, is up to the scripts.

Errors that a user can fix end the program with one line on stderr: argparse's, with exit code
2, for a wrong flag, and "error: ..." with exit code 1 for anything else.
"""

import argparse
import atexit
import datetime
import difflib
import importlib.util
import json
import math
import os
import re
import shlex
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common

# Flags of one start of a script. All others belong to the run and are kept in its checkpoint.
START_FLAGS = {
    "out_dir",
    "resume",
    "overwrite",
    "init",
    "generate",
    "device",
    "cuda_graph",
    "tensorboard",
}


# flags --------------------------------------------------------------------------------------------


def positive_int(text):
    """argparse type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text}")
    return int(text)


def image_size(text):
    """argparse type: the side of square images in pixels, a power of 2 from 16 to 1024."""
    sizes = ["16", "32", "64", "128", "256", "512", "1024"]
    if text not in sizes:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(sizes)}, not {text}: images are cropped to squares"
        )
    return int(text)


def dataset(text):
    """argparse type: the name of a dataset, or else the absolute path of a folder of images."""
    return text if text in common.DATASETS else absolute_path(text)


def absolute_path(text):
    """argparse type: a path that still holds when a run is resumed from another directory."""
    return os.path.abspath(os.path.expanduser(text))


def device(text):
    """argparse type: a device that PyTorch finds on this machine: cpu, mps, cuda, cuda:0, ..."""
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.cuda.is_available():
        found.append("cuda")
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if text not in found:
        raise argparse.ArgumentTypeError(
            f"{text} is not a device that PyTorch {torch.__version__} finds: {', '.join(found)}"
        )
    return text


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of flags with a value."""

    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def parse_args(p, argv, signed=()):
    """Adds the flags of data, run and device to `p`, an ArgumentParser whose `prog` is the name of
    the script, and parses `argv` (None: the command line).

    With --resume or --generate, the flags of the run in --out-dir are the defaults. A flag on the
    command line overrides the saved one; with --resume, the change is reported. Otherwise, makes
    the folder of a new run. Exits with an error if a flag is wrong, such as a negative number other
    than those named in `signed`, if there is no run, or if a new run cannot have --out-dir as its
    folder.
    """
    # Without its list of all flags, argparse says in one line which flag is wrong.
    p.usage = argparse.SUPPRESS
    p.allow_abbrev = False
    p.formatter_class = HelpFormatter
    p.epilog = "README.md begins with an example, and docs/results.md has one for each script."
    add_shared_flags(p)
    p.set_defaults(script=Path(p.prog).stem)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], flag_names(p), n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        p.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    for name, value in vars(args).items():
        lowest = -(2**63) if name in signed else 0
        is_number = type(value) in (int, float)  # and not a bool
        if is_number and not lowest <= value < 2**63:
            allowed = "finite" if name in signed else "finite and not negative"
            p.error(f"argument --{name.replace('_', '-')}: must be {allowed}, not {value}")
    if args.init and (args.resume or args.generate):
        p.error("--init begins a new run: leave out --resume and --generate")

    # --resume and --generate need a run in the folder; a new run needs an empty one.
    if args.out_dir is None:
        name = f"{args.script}-{os.path.basename(args.dataset)}"
        args.out_dir = os.path.join("runs", name)
    if args.resume or args.generate:
        args = parse_with_run(p, argv, args)
    else:
        if args.init and Path(args.init).resolve().parent == Path(args.out_dir).resolve():
            p.error(f"{args.init} is in --out-dir, whose run is replaced: choose another --out-dir")
        make_folder(p, args)

    # Flags that need something of this machine.
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        p.error("--tensorboard needs a package that is missing: pip install tensorboard")

    # Under torchrun, each process has a GPU of its own and a share of the batch.
    if common.world_size() > 1:
        args.device = join_processes(p, args)
        args.batch_size //= common.world_size()

    # torch.cuda.set_device does not take "cuda" without an index, which means the current device.
    if "cuda:" in args.device:
        torch.cuda.set_device(args.device)
    # TF32 for matrix products, as cuDNN has it for convolutions anyway, and the fastest of cuDNN's
    # algorithms for each shape.
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return args


def flag_names(p):
    """The flags that `p` knows, such as --batch-size. argparse has no public list of them."""
    return [name for action in p._actions for name in action.option_strings]


def add_shared_flags(p):
    """Adds the flags that all scripts share: data, run and device."""
    group = p.add_argument_group("data")
    group.add_argument("--dataset", type=dataset, default="mnist", help=common.DATASET_HELP)
    group.add_argument("--data-dir", type=absolute_path, default="data", help="where downloads go")

    group = p.add_argument_group("run")
    group.add_argument("--steps", type=positive_int, default=20_000, help="training steps")
    group.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    group.add_argument(
        "--out-dir",
        type=os.path.expanduser,
        help="output folder (default: runs/<script>-<dataset>)",
    )
    group.add_argument(
        "--log-every", type=positive_int, default=50, help="steps between rows of log.csv"
    )
    group.add_argument(
        "--save-every", type=positive_int, default=500, help="steps between grids and checkpoints"
    )
    group.add_argument(
        "--keep-checkpoints",
        action="store_true",
        help="keep the checkpoint of each save, as step-000500/checkpoint.pt",
    )
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out-dir")
    start.add_argument("--generate", type=positive_int, metavar="N", help="draw N images and stop")
    start.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the run in --out-dir, but not generated/ and step-*/",
    )
    group.add_argument(
        "--init",
        metavar="CHECKPOINT",
        type=os.path.expanduser,
        help="start with the G and D of another run",
    )

    group = p.add_argument_group("device")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1, mps, ...")
    group.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="on NVIDIA GPUs: launch each operation by itself, which is slower",
    )


def parse_with_run(p, argv, args):
    """Parses `argv` again, with the flags of the run in `args.out_dir` as defaults; with --resume,
    reports which of them `argv` changes. Exits with an error if there is no run of this script, or
    if --resume has no steps left."""
    folder = Path(args.out_dir)
    file = folder / "checkpoint.pt"
    if not file.exists():
        common.fail(f"there is no {file}: set --out-dir to the folder of a run")
    saved = read_checkpoint(file)
    writer = saved["args"]["script"]
    if writer != args.script:
        common.fail(f"{file} was written by {writer}.py, not by {args.script}.py")

    # Flags added since the run was saved have their defaults; flags removed since are ignored.
    names = vars(args).keys() - START_FLAGS
    before = {name: value for name, value in saved["args"].items() if name in names}
    p.set_defaults(**before, out_dir=args.out_dir)
    args = p.parse_args(argv)
    for name, value in before.items():
        now = getattr(args, name)
        if args.resume and now != value:
            common.say(f"{name} was {value}, and is {now} now")
    if args.resume and saved["step"] >= args.steps:
        common.fail(f"{folder} is already at step {saved['step']}: raise --steps")
    return args


def run_flags(args):
    """The flags that belong to the run, by name, with the total batch size."""
    flags = {name: value for name, value in vars(args).items() if name not in START_FLAGS}
    flags["batch_size"] *= common.world_size()
    return flags


# folder -------------------------------------------------------------------------------------------


def make_folder(p, args):
    """Makes the folder of a new run. Exits with an error if that fails, or if it holds anything but
    hidden files. With --overwrite, it may hold a run."""
    folder = Path(args.out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_used = any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError as error:
        p.error(f"--out-dir {folder} cannot be used: {error.strerror}")
    if is_used and script_of(folder) is None:
        p.error(f"{folder} is not empty: choose another --out-dir")
    if is_used and not args.overwrite:
        p.error(f"{folder} holds a run: --resume it, --overwrite it, or choose another --out-dir")


def script_of(folder):
    """The script whose run a folder holds, by its args.json; None if it holds none of ours."""
    try:
        about = json.loads((folder / "args.json").read_bytes())
        return about["script"] if "torch" in about else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def files_of_run(folder):
    """The files that training writes into `folder`, by their names. Left out are args.json, which
    shows that they are ours, and what --keep-checkpoints has kept. Exits with an error if one of
    them is a link, or a folder where a file belongs: a run has not made it."""
    samples = folder / "samples"
    if samples.is_symlink() or samples.is_file():
        common.fail(f"{samples} is not the folder that a run makes: move it away")
    names = ["checkpoint.pt", "log.csv", "checkpoint.pt.tmp", "log.csv.tmp", "args.json.tmp"]
    files = [folder / name for name in names]
    files += [file for file in samples.glob("*.png") if re.fullmatch(r"\d{6,}", file.stem)]
    files += folder.glob("events.out.tfevents.*")
    for file in files:
        if file.is_symlink() or file.is_dir():
            common.fail(f"{file} is not the file that a run makes: move it away")
    return files


@contextmanager
def atomic_write(file):
    """Opens a binary file that replaces `file` atomically at the end of the block. Until then,
    and after an error or a kill at any moment, `file` is as it was."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, file)


# run ----------------------------------------------------------------------------------------------


def start_run(args, data, state):
    """Prepares the folder of the run, and its optimisers for CUDA graphs and torchrun. Returns the
    number of steps that are done: 0 in a new run.

    `state` holds the networks, optimisers and tensors of the run by name. With --resume or
    --generate, they are loaded from the checkpoint; with --init, only G and D are. Exits with an
    error if the checkpoint does not fit.
    """
    folder = Path(args.out_dir)
    for part in state.values():
        if isinstance(part, torch.optim.Optimizer):
            # On CUDA, optimisers count their steps on the GPU, where a CUDA graph needs the count.
            for group in part.param_groups:
                group["capturable"] = args.device not in ("cpu", "mps")
            if common.world_size() > 1:
                part.register_step_pre_hook(average_gradients)

    # What a checkpoint has, if there is one.
    if args.generate:
        return load_state(folder / "checkpoint.pt", data, state)
    done = 0
    if args.resume:
        done = load_state(folder / "checkpoint.pt", data, state)
    if args.init:
        load_state(args.init, data, {"G": state["G"], "D": state["D"]})

    # Write the files, once all processes have read the old ones.
    if common.world_size() > 1:
        dist.barrier()
    if common.rank() > 0:
        return done
    if args.resume:
        drop_rows_after(done, folder / "log.csv")
    if args.overwrite:
        for file in files_of_run(folder):
            file.unlink(missing_ok=True)
    about = {**run_flags(args), **facts(data), "torch": torch.__version__}
    file = folder / "args.json"
    try:
        # Of two new runs that are started together, only the first one creates this file.
        if not args.resume and not args.overwrite:
            file.touch(exist_ok=False)
        with atomic_write(file) as f:
            f.write(json.dumps(about, indent=1).encode())
    except OSError as error:
        common.fail(f"{file} cannot be created: {error.strerror}")
    return done


def steps(args, done):
    """A progress bar over the steps of the run after the first `done`. Each step has its own seed,
    and so draws the same random numbers in a resumed run as in an uninterrupted one. After the
    last, says where the last grid is and how to go on."""
    # A larger --steps extends the seeds without changing the earlier ones.
    seeds = np.random.SeedSequence([args.seed, common.rank()]).generate_state(args.steps)

    def seeded():
        for step in range(done + 1, args.steps + 1):
            # Not torch.manual_seed: without a GPU, it takes 0.2 ms to look for one.
            seed = int(seeds[step - 1])
            torch.default_generator.manual_seed(seed)
            if args.device == "mps":
                torch.mps.manual_seed(seed)
            elif args.device != "cpu":
                torch.cuda.manual_seed(seed)
            yield step
        # Close the bar at its full length, so that the last line stands below it.
        progress.n = args.steps
        progress.close()
        last = Path(args.out_dir, "samples", f"{args.steps:06d}.png")
        # Windows' command line does not take the quotes that shlex puts around a backslash.
        out_dir = Path(args.out_dir).as_posix()
        command = ["python", f"{args.script}.py", "--out-dir", out_dir, "--resume"]
        command = shlex.join([*command, "--steps", str(2 * args.steps)])
        common.say(f"done: {last}. To train on: {command}")

    progress = tqdm(seeded(), initial=done, total=args.steps, disable=common.rank() > 0)
    return progress


def save_checkpoint(args, data, step, state):
    """Writes checkpoint.pt in `args.out_dir`: a dict of the run's flags ("args"), "data", "step"
    and "state", for torch.load. With --keep-checkpoints, also writes it in a folder of its own.
    Exits with an error if a weight is not finite; the previous checkpoint is kept."""
    parts = {}
    for name, part in state.items():
        parts[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
        is_network = isinstance(part, torch.nn.Module)
        if is_network and not all(tensor.isfinite().all() for tensor in parts[name].values()):
            common.fail(f"{name} is not finite at step {step}: try a lower --lr")

    if common.rank() == 0:
        saved = {"args": run_flags(args), "data": facts(data), "step": step, "state": parts}
        folder = Path(args.out_dir)
        files = [folder / "checkpoint.pt"]
        if args.keep_checkpoints:
            # A folder of its own makes it a run for --out-dir.
            kept = folder / f"step-{step:06d}"
            kept.mkdir(exist_ok=True)
            files.insert(0, kept / "checkpoint.pt")
        for file in files:
            with atomic_write(file) as f:
                torch.save(saved, f)


def facts(data):
    """What a run keeps of its dataset, by name."""
    return {"number": data.number, "channels": data.channels, "classes": data.classes}


def read_checkpoint(file):
    """The contents of a checkpoint, on the CPU. Exits with an error if it cannot be read, is
    damaged, or is not one of ours."""
    try:
        # torch.load does not compare the checksums.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if not {"args", "data", "step", "state"} <= saved.keys():
            raise ValueError("it is not a checkpoint of this collection")
    except Exception as error:  # damaged files and foreign pickles raise many things
        common.fail(f"cannot load {file} ({common.reason(error)})")
    return saved


def load_state(file, data, state):
    """Loads the parts of `state` from a checkpoint file and returns the number of its steps.
    Reports how the data differ. Exits with an error if it cannot be read or does not fit."""
    saved = read_checkpoint(file)
    before = saved["data"]
    if before["number"] != data.number:
        common.say(f"the data were {before['number']:,} images, and are {data.number:,} now")
    if before["classes"] != data.classes:
        was = common.first_ten(before["classes"]) or "none"
        now = common.first_ten(data.classes) or "none"
        common.say(f"the classes were {was}, and are {now} now: they are matched by their order")

    for name, part in state.items():
        if name not in saved["state"]:
            common.fail(f"{file} does not fit: it has no {name}")
        try:
            load_part(part, saved["state"][name])
        except (ValueError, RuntimeError) as error:
            # The last line of PyTorch's message has the shapes.
            last_line = str(error).strip().splitlines()[-1].strip()
            common.fail(f"{file} does not fit: {name}: {last_line}")
    return saved["step"]


def load_part(part, saved):
    """Loads a network, an optimiser or a tensor. Raises RuntimeError or ValueError if it does not
    fit."""
    if isinstance(part, torch.nn.Module):
        part.load_state_dict(saved)
    elif isinstance(part, torch.Tensor):
        if saved.shape != part.shape:
            raise ValueError(f"its shape was {tuple(saved.shape)}, and is {tuple(part.shape)} now")
        part.copy_(saved)
    else:
        # PyTorch does not compare the shapes, and a fused optimiser crashes on wrong ones.
        weights = [w for group in part.param_groups for w in group["params"]]
        for index, moments in saved["state"].items():
            for name, moment in moments.items():
                if name != "step" and moment.shape != weights[index].shape:
                    raise ValueError(f"the shape of {name} {index} differs")
        # Learning rates and betas come from the flags.
        settings = part.state_dict()["param_groups"]
        part.load_state_dict({"state": saved["state"], "param_groups": settings})


def log(args, step, values):
    """Adds a row to log.csv in `args.out_dir`: step, time in Unix seconds, and `values`, scalar
    tensors by name: under torchrun, their means over all processes. Returns them as numbers, which
    requires waiting for the device. Exits with an error if one is not finite."""
    stacked = torch.stack(list(values.values()))
    if common.world_size() > 1:
        stacked = mean_over_processes(stacked)
    numbers = dict(zip(values, stacked.tolist(), strict=True))
    for name, number in numbers.items():
        if not math.isfinite(number):
            common.fail(f"{name} is {number} at step {step}: try a lower --lr")
    if common.rank() > 0:
        return numbers

    file = Path(args.out_dir, "log.csv")
    header = ",".join(["step", "time", *numbers]) + "\n"
    with open(file, "a+") as f:
        f.seek(0)
        found = f.readline()
        if found not in ("", header):
            common.fail(
                f"{file} has other columns than the script logs ({header[:-1]}): move it away"
            )
        if found == "":
            f.write(header)
        rounded = [f"{number:.5g}" for number in numbers.values()]
        f.write(",".join([str(step), f"{time.time():.2f}", *rounded]) + "\n")
    if args.tensorboard:
        for name, number in numbers.items():
            common.summary_writer(args.out_dir).add_scalar(name, number, step)
    return numbers


def drop_rows_after(step, file):
    """Removes the rows of a log.csv after `step`, which the resumed run will write again, and an
    incomplete last row."""
    if not file.exists():
        return
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        row = re.match(rb"(\d+),", line)
        is_later = row and int(row[1]) > step
        if line.endswith(b"\n") and not is_later:
            kept.append(line)
    with atomic_write(file) as f:
        f.write(b"".join(kept))


# on CUDA ------------------------------------------------------------------------------------------


def cuda_graph(args, data, update):
    """Returns a function that does the same as `update` by replaying a CUDA graph: one launch,
    instead of one for each operation.

    `update()` draws its noise and minibatches itself, never waits for the device, and returns a
    dict of tensors. It is returned as it is without CUDA, with --no-cuda-graph, under torchrun, and
    if the images are in host memory because the GPU's is too small.
    """
    if not args.cuda_graph or common.world_size() > 1:
        return update
    if data.images.device.type in ("cpu", "mps"):
        return update

    # A capture must not depend on work of the default stream.
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())
    graph = torch.cuda.CUDAGraph()
    calls = 0
    values = {}

    def run_update():
        # A tensor that is not detached would keep the memory of the whole update.
        for name, value in update().items():
            values[name] = value.detach()

    def graphed_update():
        nonlocal calls
        calls += 1
        # The first calls run as they are: what they initialise lazily must not be captured.
        if calls <= 3:
            run_update()
            return values
        # Capturing an update records it, without running it.
        if calls == 4:
            # Other threads may use CUDA meanwhile.
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run_update()
        # A replay runs it, and writes to the same tensors.
        graph.replay()
        return values

    return graphed_update


# several GPUs, by torchrun ------------------------------------------------------------------------


def join_processes(p, args):
    """Connects this process to the others that torchrun has started, and returns its device: with
    CUDA, a GPU of its own. Exits with an error if they cannot train together."""
    if args.generate:
        p.error("--generate needs one process: start it without torchrun")
    processes = common.world_size()
    if args.batch_size % processes:
        p.error(
            f"--batch-size is {args.batch_size}, which {processes} processes cannot share equally: "
            "choose a multiple"
        )
    if args.device not in ("cpu", "cuda"):
        p.error(f"--device is {args.device}: torchrun needs cpu, or cuda for a GPU per process")

    device, backend = args.device, "gloo"
    if args.device == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            p.error(f"torchrun has started too many processes: this machine has {gpus} GPUs")
        device, backend = f"cuda:{local_rank}", "nccl"

    # An hour is enough for rank 0 to download a dataset while the others wait.
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        atexit.register(dist.destroy_process_group)
    return device


def average_gradients(optimiser, *_):
    """Averages the gradients of `optimiser` over all processes. Called before each of its steps."""
    parameters = [w for group in optimiser.param_groups for w in group["params"]]
    gradients = [w.grad for w in parameters if w.grad is not None]
    # One message for all of them is faster than one for each.
    means = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means.split(sizes), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def mean_over_processes(x):
    """The mean of a tensor over all processes, computed in place."""
    dist.all_reduce(x)
    return x.div_(common.world_size())
