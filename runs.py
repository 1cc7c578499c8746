"""The bookkeeping of a run, which a copy of a script can do without: shared flags, files, resume,
the log, CUDA graphs and several GPUs. What is trained, and on what, is up to the scripts.

Errors that a user can fix end the program with one line on stderr: argparse's, with exit code
2, for a wrong flag, and "error: ..." with exit code 1 for anything else.
"""

import argparse
import atexit
import csv
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import filelock
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
    "tensorboard",
    "cuda_graph",
}

# Flags of the run that may change when it is resumed. The dataset may have moved: check_data
# compares its size, channels and classes. All others decide what the run computes.
MAY_CHANGE = {"dataset", "data_dir", "steps", "log_every", "save_every"}

# The contents of a checkpoint, those of its "data", and their types.
CHECKPOINT = {"args": dict, "data": dict, "step": int, "state": dict, "device": str, "random": list}
DATA = {"number": int, "channels": int, "classes": list}

# The locks on the folders in which this process is training.
LOCKS = {}


# -------------------------------------------------------------------------------------------- flags


def whole_number(text):
    """argparse type: a whole number between -2^31 and 2^31."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
    if abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be less than 2^31, not {text}")
    return value


def positive_int(text):
    """argparse type: a whole number from 1 to 2^31 - 1."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def non_negative_int(text):
    """argparse type: a whole number from 0 to 2^31 - 1."""
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def finite_float(text):
    """argparse type: a number, neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def positive_float(text):
    """argparse type: a finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def non_negative_float(text):
    """argparse type: a finite number, 0 or above."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def fraction(text):
    """argparse type: a number in [0, 1)."""
    value = finite_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, not {text}")
    return value


def path(text):
    """argparse type: a path, in which ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def absolute_path(text):
    """argparse type: a path that still holds when a run is resumed from another directory."""
    return os.path.abspath(path(text))


def dataset(text):
    """argparse type: the name of a dataset, or else the absolute path of a folder of images."""
    if text in common.DATASETS:
        return text
    return absolute_path(text)


def device(text):
    """argparse type: a device that PyTorch finds on this machine: cpu, mps, cuda, cuda:0, ..."""
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.cuda.is_available():
        found.append("cuda")
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if text in found:
        return text
    if text.startswith("cuda") and "cuda" not in found:
        message = f"PyTorch {torch.__version__} sees no CUDA GPU on this machine"
    else:
        message = f"{text} is not a device of this machine: choose from {', '.join(found)}"
    raise argparse.ArgumentTypeError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults of flags with a value, and keeps the line breaks of the epilog."""

    def _get_help_string(self, action):
        if action.default is None or isinstance(action.default, bool) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def parse_args(p, argv, generate_only=()):
    """Adds the flags of data, run and device to `p`, an ArgumentParser whose `prog` is the name of
    the script, and parses `argv` (None: the command line).

    With --resume and --generate, the flags of the run in --out-dir are the defaults, and a flag
    that is typed with another value is an error, unless it may change or is in `generate_only`,
    the names of the flags that matter to --generate alone. Exits with an error if a flag is
    wrong, or if a new run cannot have --out-dir as its folder.
    """
    # Without its list of all flags, argparse says in one line which flag is wrong.
    p.usage = argparse.SUPPRESS
    p.allow_abbrev = False
    p.formatter_class = HelpFormatter
    p.epilog = (
        f"example: python {p.prog} --dataset cifar10 --out-dir runs/first\n"
        "README.md and docs/ explain more."
    )

    # The script's own flags, then those that all scripts have.
    own_defaults = vars(p.parse_args([]))
    add_shared_flags(p)
    p.set_defaults(script=Path(p.prog).stem)
    args = p.parse_args(argv)
    if args.out_dir is None:
        name = f"{args.script}-{os.path.basename(args.dataset)}"
        args.out_dir = os.path.join("runs", name)

    # --resume and --generate need a run in the folder; a new run needs an empty one.
    if args.overwrite and (args.resume or args.generate):
        p.error("--overwrite starts a new run: leave out --resume and --generate")
    check_writable(p, args.out_dir)
    if args.resume or args.generate:
        args = parse_with_run(p, argv, args, own_defaults, generate_only)
    elif common.rank() == 0 and is_used(args.out_dir) and not args.overwrite:
        p.error(in_the_way(args.out_dir))

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
    # TF32 for matrix products, as cuDNN has it for convolutions anyway.
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")
    return args


def add_shared_flags(p):
    """Adds the flags that all scripts share: data, run and device."""
    group = p.add_argument_group("data")
    group.add_argument("--dataset", type=dataset, default="mnist", help=common.DATASET_HELP)
    group.add_argument("--data-dir", type=absolute_path, default="data", help="where downloads go")

    group = p.add_argument_group("run")
    group.add_argument("--steps", type=positive_int, default=20_000, help="training steps")
    group.add_argument(
        "--seed", type=non_negative_int, default=0, help="seed of all random numbers"
    )
    group.add_argument(
        "--out-dir", type=path, help="output folder (default: runs/<script>-<dataset>)"
    )
    group.add_argument(
        "--log-every", type=positive_int, default=50, help="steps between rows of log.csv"
    )
    group.add_argument(
        "--save-every", type=positive_int, default=500, help="steps between grids and checkpoints"
    )
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    group.add_argument(
        "--overwrite", action="store_true", help="delete the run in --out-dir and start a new one"
    )
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out-dir")
    start.add_argument(
        "--init", type=path, metavar="CHECKPOINT", help="start with the G and D of another run"
    )
    start.add_argument("--generate", type=positive_int, metavar="N", help="draw N images and stop")

    group = p.add_argument_group("device")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", type=device, default=default, help="cpu, cuda, cuda:1, mps, ...")
    group.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="on NVIDIA GPUs: launch each operation by itself, which is slower",
    )


def check_writable(p, folder):
    """Exits with an error if `folder`, which need not exist, cannot be made or written to."""
    existing = Path(folder).absolute()
    while True:
        try:
            existing.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            existing = existing.parent
        except OSError as error:  # such as a name that is too long
            p.error(f"--out-dir {folder} cannot be used: {error.strerror}")
    if not existing.is_dir():
        p.error(f"--out-dir {folder} cannot be used: {existing} is not a folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        p.error(f"--out-dir {folder} cannot be used: no permission to write to {existing}")


def is_used(folder):
    """Whether a folder holds anything but hidden files."""
    return os.path.isdir(folder) and any(not name.startswith(".") for name in os.listdir(folder))


def in_the_way(folder):
    """Why a new run cannot start in a folder that is used, and what to do."""
    if os.path.exists(os.path.join(folder, "checkpoint.pt")):
        return f"{folder} holds a run: --resume it, --overwrite it, or choose another --out-dir"
    return f"{folder} is not empty: choose another --out-dir, or --overwrite the run in it"


def parse_with_run(p, argv, args, own_defaults, generate_only):
    """Parses `argv` again, with the flags of the run in `args.out_dir` as defaults. Exits with an
    error if there is none, or if a flag contradicts it."""
    checkpoint = os.path.join(args.out_dir, "checkpoint.pt")
    if not os.path.exists(checkpoint) and is_used(args.out_dir):
        p.error(f"{args.out_dir} holds no checkpoint yet: start again with --overwrite")
    if not os.path.exists(checkpoint):
        others = [str(file.parent) for file in Path(args.out_dir).parent.glob("*/checkpoint.pt")]
        message = f"{args.out_dir} holds no run"
        if others:
            message += f": set --out-dir, for example to {common.first_ten(sorted(others))}"
        p.error(message)
    saved = read_checkpoint(checkpoint, args.script)

    # Flags added since the run was saved get their defaults; flags removed since are ignored.
    known = run_flags(args)
    saved_flags = {name: value for name, value in saved["args"].items() if name in known}
    saved_flags = {**own_defaults, **saved_flags}
    p.set_defaults(**saved_flags, out_dir=args.out_dir)
    args = p.parse_args(argv)

    # Some flags may be typed with another value.
    may_change = MAY_CHANGE.union(generate_only)
    action = "--resume"
    if args.generate:
        may_change.add("seed")
        action = "--generate"
    for name in sorted(saved_flags.keys() - may_change):
        typed = getattr(args, name)
        if typed != saved_flags[name]:
            # Networks of another size cannot be loaded into a new run.
            if name in ("image_size", "width", "z_dim"):
                advice = "Start a new run in another --out-dir"
            else:
                advice = f"A new run can start from its networks: --init {checkpoint}"
            flag = "--" + name.replace("_", "-")
            difference = f"the run has {saved_flags[name]}, not {typed}"
            p.error(f"{action} cannot change {flag}: {difference}. {advice}")
    if args.resume and saved["step"] >= args.steps:
        p.error(f"{args.out_dir} is already at step {saved['step']}: raise --steps")
    return args


# ----------------------------------------------------------------------------------- files of a run


@contextmanager
def atomic_write(file):
    """Opens a binary file that replaces `file` atomically at the end of the block. Until then,
    and after an error or a kill at any moment, `file` is as it was."""
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    # Windows refuses while another program has the file open, such as --generate.
    for _ in range(50):
        try:
            os.replace(temporary, file)
            return
        except PermissionError:
            time.sleep(0.1)
    common.fail(f"{file} cannot be replaced: is it open in another program?")


def lock_folder(folder):
    """Keeps other processes from training in a folder until `finish_run`, or until this process
    ends in any way. Exits with an error if another one is training there."""
    key = folder.resolve()
    if key in LOCKS:  # by a run of this process that was interrupted, as in a notebook
        return
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        common.fail(
            f"another process is training in {folder}, or is a notebook that did: choose another "
            "--out-dir"
        )
    except OSError as error:
        common.fail(f"{folder} cannot be locked: {error.strerror}")
    LOCKS[key] = lock


def start_run(args, data, state):
    """Prepares the folder of the run and returns the number of steps that are done: 0 in a new run.

    `state` holds the networks, optimisers and tensors of the run by name. With --resume, they
    are loaded from the checkpoint and the random numbers continue where they were; with
    --generate, they are loaded; with --init, only G and D are. Exits with an error if the
    checkpoint or the data does not fit, or if another process writes to the folder.
    """
    folder = Path(args.out_dir)
    checkpoint = folder / "checkpoint.pt"
    prepare_optimisers(args, state)
    if args.generate:
        return load_state(args, data, checkpoint, state)["step"]

    # One process writes to the folder.
    if common.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)

    # The networks of the checkpoint, if there is one, and the random numbers.
    if args.resume:
        saved = load_state(args, data, checkpoint, state)
        check_data(args, data, saved)
        first = saved["step"]
        resume_random_numbers(args, saved)
    else:
        first = 0
        if args.init:
            saved = load_state(args, data, args.init, {"G": state["G"], "D": state["D"]})
            warn_of_other_classes(saved["data"]["classes"], data.classes)
        # All processes have made the same weights; from here on, each has its own noise.
        if common.rank() > 0:
            torch.manual_seed(args.seed + common.rank())

    # The files, once all processes have read those of before.
    if common.world_size() > 1:
        dist.barrier()
    if common.rank() == 0:
        if args.resume:
            drop_rows_after(first, folder / "log.csv")
        elif args.overwrite:
            remove_run(folder)
        elif is_used(folder):
            common.fail(in_the_way(folder))
        about = {**run_flags(args), **facts(data), "torch": torch.__version__}
        with atomic_write(folder / "args.json") as f:
            f.write(json.dumps(about, indent=1).encode())
    return first


def finish_run(args):
    """Says where the last grid is and how to go on, and lets other processes use the folder."""
    if common.rank() == 0:
        last = Path(args.out_dir, "samples", f"{args.steps:06d}.png")
        command = f"python {args.script}.py --out-dir {args.out_dir} --resume"
        common.say(f"done: {last}. To train on: {command} --steps {2 * args.steps}")
        LOCKS.pop(Path(args.out_dir).resolve()).release()


def prepare_optimisers(args, state):
    """Makes the optimisers ready for CUDA graphs and for several processes."""
    for part in state.values():
        if isinstance(part, torch.optim.Optimizer):
            # On CUDA, they count their steps on the GPU, where a CUDA graph needs the count.
            for group in part.param_groups:
                group["capturable"] = args.device not in ("cpu", "mps")
            if common.world_size() > 1:
                part.register_step_pre_hook(average_gradients)


def warn_of_other_classes(before, now):
    """Warns if the numbers of the classes mean something else than in the run before."""
    if before and now and before != now:
        before, now = common.first_ten(before), common.first_ten(now)
        common.warn(f"the classes of --init are {before}, and those of the dataset {now}")


def remove_run(folder):
    """Deletes the files that training writes into `folder`, by their names, and no others. Images
    made by --generate stay."""
    for name in ("checkpoint.pt", "args.json", "log.csv"):
        (folder / name).unlink(missing_ok=True)
    for grid in folder.glob("samples/*.png"):
        if re.fullmatch(r"\d{6,}", grid.stem):
            grid.unlink()
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()


def resume_random_numbers(args, saved):
    """Continues the random numbers of a run. On another kind of device, or with another number
    of processes, they begin again from another seed."""
    device = torch.device(args.device).type
    if saved["device"] == device and len(saved["random"]) == common.world_size():
        try:
            random_module(args).set_rng_state(saved["random"][common.rank()])
        except (TypeError, RuntimeError) as error:
            common.fail(f"{args.out_dir}: the saved random numbers are damaged ({error})")
    else:
        before = f"{saved['device']} in {len(saved['random'])} process(es)"
        now = f"{device} in {common.world_size()}"
        common.warn(f"the run was on {before}, and is now on {now}: its random numbers are new")
        torch.manual_seed(args.seed + saved["step"] + common.rank())


def random_module(args):
    """The module of torch that has the state of a run's random numbers."""
    if args.device == "cpu":
        return torch.random
    if args.device == "mps":
        return torch.mps
    return torch.cuda


def run_flags(args):
    """The flags that belong to the run, by name, with the total batch size."""
    flags = {name: value for name, value in vars(args).items() if name not in START_FLAGS}
    flags["batch_size"] *= common.world_size()
    return flags


def facts(data):
    """What a run keeps of its dataset, by name."""
    return {"number": data.number, "channels": data.channels, "classes": data.classes}


def check_data(args, data, saved):
    """Exits with an error if the dataset has other channels or classes than that of the saved
    run, and warns if it has another number of images."""
    before = saved["data"]
    if data.number != before["number"]:
        common.warn(
            f"{args.dataset} has {data.number:,} images, but the run in {args.out_dir} had "
            f"{before['number']:,}"
        )
    if data.channels != before["channels"]:
        common.fail(
            f"{args.dataset} has {data.channels} channels, but the run in {args.out_dir} has "
            f"{before['channels']}"
        )
    if data.classes != before["classes"]:
        now = common.first_ten(data.classes) or "(none)"
        then = common.first_ten(before["classes"]) or "(none)"
        common.fail(
            f"{args.dataset} has the classes {now}, but the run in {args.out_dir} has {then}"
        )


# ------------------------------------------------------------------------------ checkpoints and log


def save_checkpoint(args, data, step, state):
    """Writes checkpoint.pt in `args.out_dir`: a dict of the run's flags ("args"), "data",
    "step", "state" and random numbers, for torch.load. Exits with an error if a weight or a
    moment of an optimiser is not finite; the previous checkpoint is kept."""
    parts = {}
    for name, part in state.items():
        parts[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
        if not all(tensor.isfinite().all() for tensor in tensors_in(parts[name])):
            common.fail(f"{name} is not finite at step {step}: try a lower --lr")

    # Each process has random numbers of its own.
    random = [random_module(args).get_rng_state()]
    if common.world_size() > 1:
        mine = random[0]
        random = [None] * common.world_size()
        dist.all_gather_object(random, mine)

    if common.rank() == 0:
        saved = {
            "args": run_flags(args),
            "data": facts(data),
            "step": step,
            "state": parts,
            "device": torch.device(args.device).type,
            "random": random,
        }
        with atomic_write(Path(args.out_dir, "checkpoint.pt")) as f:
            torch.save(saved, f)


def tensors_in(saved):
    """All tensors in what a checkpoint has of a network, an optimiser or a tensor."""
    if isinstance(saved, torch.Tensor):
        return [saved]
    if isinstance(saved, dict):
        return [tensor for value in saved.values() for tensor in tensors_in(value)]
    return []


def read_checkpoint(file, script):
    """The contents of a checkpoint, on the CPU. Exits with an error if it does not exist, cannot
    be read, is damaged, or was written by another script."""
    try:
        # torch.load does not compare the checksums.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except FileNotFoundError:
        common.fail(f"{file} does not exist")
    except OSError as error:
        common.fail(f"{file} cannot be read: {error.strerror}")
    except Exception as error:  # damaged files and foreign pickles raise many things
        common.fail(f"{file} is damaged, or not a checkpoint ({common.one_line(error)})")

    if not has_types(saved, CHECKPOINT) or not has_types(saved["data"], DATA):
        common.fail(f"{file} is not a checkpoint of this collection")
    writer = saved["args"].get("script")
    if writer != script:
        common.fail(f"{file} was written by {writer}.py, not by {script}.py")
    return saved


def has_types(saved, types):
    """Whether a dict has all these keys, with values of these types."""
    return isinstance(saved, dict) and all(
        isinstance(saved.get(key), expected) for key, expected in types.items()
    )


def load_state(args, data, file, state):
    """Loads the parts of `state` from a checkpoint file and returns all that the file holds. Exits
    with an error if it cannot be read, does not fit, or has a number that is not finite."""
    saved = read_checkpoint(file, args.script)

    # Nothing is loaded before everything is known to fit.
    for name, part in state.items():
        before = saved["state"].get(name)
        if not fits(part, before):
            common.fail(f"{file} does not fit: {what_differs(args, data, saved, name)}")
        if not all(tensor.isfinite().all() for tensor in tensors_in(before)):
            common.fail(f"{file} is damaged: {name} is not finite")

    for name, part in state.items():
        before = saved["state"][name]
        if isinstance(part, torch.Tensor):
            part.copy_(before)
        elif isinstance(part, torch.optim.Optimizer):
            # Its settings are in the flags; the rest of its state is in the checkpoint.
            settings = part.state_dict()["param_groups"]
            part.load_state_dict({"state": before["state"], "param_groups": settings})
        else:
            part.load_state_dict(before)
    return saved


def fits(part, saved):
    """Whether `saved`, from a checkpoint, has the shapes of a network, an optimiser or a tensor. An
    optimiser does not check them itself, and a fused one crashes on wrong ones."""
    if isinstance(part, torch.Tensor):
        return isinstance(saved, torch.Tensor) and saved.shape == part.shape
    if not isinstance(saved, dict):
        return False
    if isinstance(part, torch.nn.Module):
        now = part.state_dict()
        return saved.keys() == now.keys() and all(fits(now[name], saved[name]) for name in now)

    # For each weight by its index: moments of its shape, and a number of steps.
    weights = [weight for group in part.param_groups for weight in group["params"]]
    moments_of = saved.get("state")
    if not isinstance(moments_of, dict):
        return False
    for index, moments in moments_of.items():
        if index not in range(len(weights)) or not isinstance(moments, dict):
            return False
        for name, moment in moments.items():
            expected = torch.zeros(()) if name == "step" else weights[index]
            if not fits(expected, moment):
                return False
    return True


def what_differs(args, data, saved, name):
    """Why the part `name` of a checkpoint does not fit: the sizes that differ or, if they are the
    same, all other flags that do."""
    before = {**saved["args"], **saved["data"]}
    now = {**run_flags(args), **facts(data)}
    differ = [key for key in now if key in before and before[key] != now[key]]
    differ = [key for key in differ if key not in MAY_CHANGE and key not in ("seed", "number")]
    sizes = [key for key in differ if key in ("image_size", "channels", "width", "z_dim")]
    names = [f"{key} was {before[key]}, and is {now[key]} now" for key in sizes or differ]
    return f"in its {name}, shapes differ ({common.first_ten(names) or 'it is damaged'})"


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
    is_new = not file.exists()
    rounded = [f"{number:.5g}" for number in numbers.values()]
    try:
        with open(file, "a", newline="") as f:
            rows = csv.writer(f, lineterminator="\n")
            if is_new:
                rows.writerow(["step", "time", *numbers])
            rows.writerow([step, f"{time.time():.2f}", *rounded])
    except PermissionError:  # on Windows, a program that shows the file may keep others out
        common.warn(f"{file} cannot be written, so step {step} is missing from it")
    if args.tensorboard:
        for name, number in numbers.items():
            common.summary_writer(args.out_dir).add_scalar(name, number, step)
    return numbers


def drop_rows_after(step, file):
    """Removes the rows of a log.csv after `step`, which the resumed run will write again, and an
    incomplete last row. Other lines are kept."""
    if not file.exists():
        return
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        row = re.match(rb"(\d+),", line)
        is_torn = not line.endswith(b"\n") and re.match(rb"\d", line)
        if is_torn or (row and int(row[1]) > step):
            continue
        kept.append(line if line.endswith(b"\n") else line + b"\n")
    with atomic_write(file) as f:
        f.write(b"".join(kept))


# ------------------------------------------------------------------------------------------ on CUDA


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
            # Other threads, such as one of NCCL's, may use CUDA meanwhile.
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run_update()
        # A replay runs it, and writes to the same tensors.
        graph.replay()
        return values

    return graphed_update


# ------------------------------------------------------------------------ several GPUs, by torchrun


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

    # One progress bar is enough.
    if common.rank() > 0:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
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
