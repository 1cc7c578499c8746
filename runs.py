"""What keeps a run: its flags and files, resume, the log, CUDA graphs, and several GPUs. No network
and no loss is in here, and nothing that an image depends on.

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
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import common

# Flags of one start of a script. All others belong to the run and are kept in its checkpoint.
START_FLAGS = {"out_dir", "resume", "init", "generate", "device", "tensorboard", "cuda_graph"}

# Flags of the run that may change when it is resumed. The dataset may have moved, and check_data
# compares what it holds. All others decide what the run computes.
MAY_CHANGE = {"dataset", "data_dir", "steps", "log_every", "save_every"}


# -------------------------------------------------------------------------------------------- flags


def positive_int(text):
    """argparse type: a whole number from 1 to 2^31 - 1."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 2^31 - 1")
    return value


def non_negative_int(text):
    """argparse type: a whole number from 0 to 2^31 - 1."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^31 - 1")
    return value


def finite_float(text):
    """argparse type: a number, neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def positive_float(text):
    """argparse type: a finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative_float(text):
    """argparse type: a finite number, 0 or above."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def fraction(text):
    """argparse type: a number in [0, 1)."""
    value = finite_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def any_path(text):
    """argparse type: a path, in which ~ is the home directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


def absolute_path(text):
    """argparse type: a path that still holds when a run is resumed from another directory."""
    return os.path.abspath(any_path(text))


def dataset_name(text):
    """argparse type: the name of a dataset, or else the absolute path of a folder of images."""
    if text in common.TORCHVISION_DATASETS or text == "digits":
        return text
    return absolute_path(text)


def available_devices():
    """What --device may be on this machine: cpu, mps if it has it, cuda, cuda:0, cuda:1, ..."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.cuda.is_available():
        devices.append("cuda")
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return devices


def parse_args(p, argv, generate_only=()):
    """Adds the flags of data, run and device to `p`, an ArgumentParser whose `prog` is the name of
    the script, and parses `argv` (None: the command line).

    With --resume and --generate, the flags of the run in --out-dir are the defaults, and a flag
    that is typed with another value is an error, unless it may change or is in `generate_only`,
    the names of the flags that matter to --generate alone. Exits with an error if a flag is
    wrong, or if --out-dir holds a run that a new one would overwrite.
    """
    own_defaults = vars(p.parse_args([]))
    devices = available_devices()
    default_device = "cuda" if "cuda" in devices else "cpu"

    data = p.add_argument_group("data")
    data.add_argument("--dataset", type=dataset_name, default="mnist", help=common.DATASET_HELP)
    data.add_argument("--data-dir", type=absolute_path, default="data", help="folder for downloads")

    run = p.add_argument_group("run")
    run.add_argument("--steps", type=positive_int, default=20_000, help="updates of G")
    run.add_argument("--seed", type=non_negative_int, default=0, help="seed of all random numbers")
    run.add_argument(
        "--out-dir", type=any_path, help="folder of the run; if None, runs/<script>-<dataset>"
    )
    run.add_argument(
        "--log-every", type=positive_int, default=50, help="steps between rows of the log"
    )
    run.add_argument(
        "--save-every", type=positive_int, default=500, help="steps between grids and checkpoints"
    )
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard logs")
    start = run.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the run in --out-dir")
    start.add_argument(
        "--init",
        type=any_path,
        metavar="CHECKPOINT",
        help="start a new run with G and D of another one's checkpoint.pt",
    )
    start.add_argument("--generate", type=positive_int, metavar="N", help="draw N images and stop")

    device = p.add_argument_group("device")
    device.add_argument(
        "--device", choices=devices, default=default_device, help="device to train on"
    )
    device.add_argument("--cuda-graph", action="store_true", help="replay each update as one graph")

    # Without its list of all flags, argparse says in one line which flag is wrong.
    p.usage = argparse.SUPPRESS
    p.set_defaults(script=Path(p.prog).stem)
    args = p.parse_args(argv)
    if args.out_dir is None:
        args.out_dir = os.path.join("runs", f"{args.script}-{os.path.basename(args.dataset)}")

    # Only a checkpoint.pt means that the folder holds a run.
    if args.resume or args.generate:
        args = parse_with_run(p, argv, args, own_defaults, generate_only)
    elif os.path.exists(os.path.join(args.out_dir, "checkpoint.pt")):
        p.error(f"{args.out_dir} holds a run: --resume it, or choose another --out-dir")

    if common.world_size() > 1:
        join_processes(p, args)

    if args.cuda_graph and "cuda" not in args.device:
        p.error(f"--cuda-graph needs CUDA, and --device is {args.device}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        p.error("--tensorboard needs a package that is missing: pip install tensorboard")

    # torch.cuda.set_device does not take "cuda" without an index, which means the current device.
    if "cuda:" in args.device:
        torch.cuda.set_device(args.device)
    # TF32 for matrix products, as cuDNN has it for convolutions anyway.
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")
    return args


def parse_with_run(p, argv, args, own_defaults, generate_only):
    """Parses `argv` again, with the flags of the run in `args.out_dir` as defaults. Exits with an
    error if a flag contradicts the run."""
    checkpoint = os.path.join(args.out_dir, "checkpoint.pt")
    saved = read_checkpoint(checkpoint, args.script)

    # A flag that is newer than the run had its default in it; one that is gone has no effect.
    known = {name: value for name, value in saved["args"].items() if hasattr(args, name)}
    saved_flags = {**own_defaults, **known}
    p.set_defaults(**saved_flags, out_dir=args.out_dir)
    args = p.parse_args(argv)

    may_change = MAY_CHANGE.union(generate_only)
    if args.generate:
        may_change.add("seed")
    for name in saved_flags.keys() - may_change:
        typed = getattr(args, name)
        if typed != saved_flags[name]:
            flag = "--" + name.replace("_", "-")
            p.error(
                f"{flag} is {typed}, but the run has {saved_flags[name]}: leave it out (a new run "
                f"can start from its networks, if they are as large: --init {checkpoint})"
            )
    if args.resume and saved["step"] >= args.steps:
        p.error(f"{args.out_dir} is already at step {saved['step']}: raise --steps")
    return args


# ----------------------------------------------------------------------------------- files of a run


@contextmanager
def atomic_write(file):
    """Opens a binary file that replaces `file` atomically at the end of the block. Until then,
    and after an error or a kill at any moment, `file` is as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, file)


def start_run(args, data, state):
    """Prepares the folder of the run and returns the number of steps that are done: 0 in a new run.

    `state` holds the networks, optimisers and tensors of the run by name. With --resume, they
    are loaded from the checkpoint and the random numbers continue where they were; with
    --generate, they are loaded; with --init, only G and D are. Exits with an error if the
    checkpoint or the data does not fit.
    """
    folder = Path(args.out_dir)
    checkpoint = folder / "checkpoint.pt"

    for part in state.values():
        if isinstance(part, torch.optim.Optimizer):
            # On CUDA, optimisers count their steps on the GPU, where a CUDA graph needs the count.
            for group in part.param_groups:
                group["capturable"] = args.device not in ("cpu", "mps")
            if common.world_size() > 1:
                part.register_step_pre_hook(average_gradients)

    if args.generate:
        saved = load_state(args, data, checkpoint, state)
        return saved["step"]

    if args.resume:
        saved = load_state(args, data, checkpoint, state)
        check_data(args, data, saved)
        first = saved["step"]
        resume_random_numbers(args, saved)
    else:
        first = 0
        if args.init:
            load_state(args, data, args.init, {"G": state["G"], "D": state["D"]})
        # All processes have made the same weights; from here on, each has its own noise.
        if common.rank() > 0:
            torch.manual_seed(args.seed + common.rank())

    if common.rank() == 0:
        if args.resume:
            drop_rows_after(first, folder / "log.csv")
        else:
            clear_unfinished_run(folder)
        about = {**run_flags(args), **facts(data), "torch": torch.__version__}
        with atomic_write(folder / "args.json") as f:
            f.write(json.dumps(about, indent=1).encode())
    return first


def resume_random_numbers(args, saved):
    """Continues the random numbers of a run. On another kind of device, or with another number
    of processes, they begin anew."""
    device = torch.device(args.device).type
    if saved["device"] == device and len(saved["random"]) == common.world_size():
        random_module(args).set_rng_state(saved["random"][common.rank()])
    else:
        before = f"{saved['device']} with {len(saved['random'])} processes"
        now = f"{device} with {common.world_size()}"
        common.warn(f"the run was on {before}, and is now on {now}: its random numbers begin anew")
        torch.manual_seed(args.seed + saved["step"] + common.rank())


def run_flags(args):
    """The flags that belong to the run, by name, as they were typed."""
    flags = {name: value for name, value in vars(args).items() if name not in START_FLAGS}
    flags["batch_size"] *= common.world_size()
    return flags


def facts(data):
    """What a run keeps of its dataset, by name."""
    return {"number": data.number, "channels": data.channels, "classes": data.classes}


def clear_unfinished_run(folder):
    """Removes the log and the grids of a run that ended before its first checkpoint."""
    if (folder / "args.json").exists():
        (folder / "log.csv").unlink(missing_ok=True)
        for grid in folder.glob("samples/*.png"):
            grid.unlink()
    elif (folder / "log.csv").exists():
        common.fail(f"{folder} contains a log.csv that no run wrote: choose another --out-dir")


def random_module(args):
    """The module of torch that has the state of a run's random numbers."""
    if args.device == "cpu":
        return torch.random
    if args.device == "mps":
        return torch.mps
    return torch.cuda


def read_checkpoint(file, script):
    """The contents of a checkpoint, on the CPU. Exits with an error if it does not exist, cannot
    be read, or was written by another script."""
    if not os.path.exists(file):
        common.fail(f"{file} does not exist")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        writer = saved["args"]["script"]
    except Exception as error:  # torn files and foreign pickles raise many things
        common.fail(f"{file} cannot be read as a checkpoint ({common.one_line(error)})")
    if writer != script:
        common.fail(f"{file} was written by {writer}.py, not by {script}.py")
    return saved


def check_data(args, data, saved):
    """Exits with an error if the dataset has other channels or classes than that of the saved
    run, and warns if it has another number of images."""
    for name, now in facts(data).items():
        before = saved["data"][name]
        message = f"{args.dataset}: {name} is {now}, but the run in {args.out_dir} has {before}"
        if now != before and name == "number":
            common.warn(message)
        elif now != before:
            common.fail(message)


def load_state(args, data, file, state):
    """Loads the parts of `state` from a checkpoint file and returns all that the file holds. Exits
    with an error if it cannot be read or does not fit."""
    saved = read_checkpoint(file, args.script)
    try:
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
    except (KeyError, RuntimeError, ValueError):
        before = {**saved["args"], **saved["data"]}
        now = {**run_flags(args), **facts(data)}
        other = [f"{k} {v}" for k, v in before.items() if v != now.get(k) and k not in MAY_CHANGE]
        common.fail(
            f"{file} does not fit these networks. What differs in its run: {', '.join(other)}"
        )
    return saved


def save_checkpoint(args, data, step, state):
    """Writes checkpoint.pt in `args.out_dir`: a dict of the run's flags ("args"), "data",
    "step", "state" and random numbers, for torch.load. Exits with an error if a weight is not
    finite; the checkpoint from before stays."""
    for name, part in state.items():
        if isinstance(part, torch.nn.Module):
            finite = [weight.isfinite().all() for weight in part.state_dict().values()]
            if not all(finite):
                common.fail(f"a weight of {name} is not finite at step {step}: try a lower --lr")

    parts = {}
    for name, part in state.items():
        parts[name] = part if isinstance(part, torch.Tensor) else part.state_dict()
    random = [random_module(args).get_rng_state()]
    if common.world_size() > 1:
        mine = random[0]
        random = [None] * common.world_size()
        dist.all_gather_object(random, mine)
    saved = {
        "args": run_flags(args),
        "data": facts(data),
        "step": step,
        "state": parts,
        "device": torch.device(args.device).type,
        "random": random,  # each process's
    }
    if common.rank() == 0:
        with atomic_write(Path(args.out_dir, "checkpoint.pt")) as f:
            torch.save(saved, f)


def log(args, step, values):
    """Adds a row to log.csv in `args.out_dir`: step, time in Unix seconds, and `values`, scalar
    tensors by name: under torchrun, their means over all processes. Returns them as numbers, for
    which it waits for the device. Exits with an error if one is not finite."""
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
    with open(file, "a", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        if is_new:
            rows.writerow(["step", "time", *numbers])
        rounded = [f"{number:.5g}" for number in numbers.values()]
        rows.writerow([step, f"{time.time():.2f}", *rounded])
    if args.tensorboard:
        for name, number in numbers.items():
            common.summary_writer(args.out_dir).add_scalar(name, number, step)
    return numbers


def drop_rows_after(step, file):
    """Drops the rows of a log.csv that will come again, those after `step`, and a torn last one."""
    if not file.exists():
        return
    header, *rows = file.read_text().splitlines(keepends=True)
    rows = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    with atomic_write(file) as f:
        f.write("".join([header, *rows]).encode())


# ------------------------------------------------------------------------------------------ on CUDA


def cuda_graph(args, data, update):
    """Returns `update`, or with --cuda-graph a function that does the same by replaying a CUDA
    graph.

    `update()` draws its noise and minibatches itself, never waits for the device, and returns a
    dict of tensors. It cannot be captured, and is returned as it is, if the images are in host
    memory.
    """
    if not args.cuda_graph:
        return update
    if data.images.device.type == "cpu":
        common.warn("--cuda-graph has no effect, as the images do not fit in the memory of the GPU")
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
    """Connects this process to the others that torchrun has started, on the machine's next GPU,
    and gives it an equal share of each batch. Exits with an error if that is not possible."""
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

    backend = "gloo"
    if args.device == "cuda":
        backend = "nccl"
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            p.error(f"torchrun has started too many processes: this machine has {gpus} GPUs")
        args.device = f"cuda:{local_rank}"
    args.batch_size //= processes

    # An hour is enough for rank 0 to download a dataset while the others wait.
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
        atexit.register(dist.destroy_process_group)

    # One progress bar is enough.
    if common.rank() > 0:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def average_gradients(optimiser, *_):
    """Replaces the gradients that `optimiser` is going to use by their means over all processes. It
    is called before each of its steps."""
    parameters = [w for group in optimiser.param_groups for w in group["params"]]
    gradients = [w.grad for w in parameters if w.grad is not None]
    # One message for all of them is faster than one for each.
    means = mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, means.split(sizes), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def mean_over_processes(x):
    """The mean of a tensor over all processes, in its place."""
    dist.all_reduce(x)
    return x.div_(common.world_size())
