"""Writes a script as one file that needs nothing else of this collection.

    python tools/standalone.py wgan_gp.py my_gan.py

The docstring, networks, losses, updates, and the script's own flags with their defaults stay as
they are. The calls of common.py and runs.py become a few plain lines, which load MNIST,
Fashion-MNIST, CIFAR-10 or a folder of class folders (in colour), save a grid of images now and
then, and the weights at the end. A copy has no --resume, --init or --generate (nor --label and
--truncation, which belong to it), no log, CUDA graphs, several GPUs or seed for each step, and does
not check its input.

tricks.py, ssgan.py and eight_gaussians.py use more of the collection than this can replace.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_COPIED = ("tricks.py", "ssgan.py", "eight_gaussians.py")

FLAGS = """\
    p.add_argument("--dataset", default="mnist", help="mnist, fashion-mnist, cifar10 or a folder")
    p.add_argument("--data-dir", default="data", help="where downloads go")
    p.add_argument("--out-dir", default="out", help="output folder")
    p.add_argument("--steps", type=int, default=20_000, help="training steps")
    p.add_argument("--save-every", type=int, default=500, help="steps between grids")
    p.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=device, help="cpu, cuda or mps")
"""

DATA = '''\
# data ---------------------------------------------------------------------------------------------


def load_data(args):
    """All images of the dataset, uint8 (N, C, image_size, image_size), and their labels (N,)."""
    size = args.image_size
    if args.dataset == "cifar10":
        dataset = datasets.CIFAR10(args.data_dir, download=True)
        images = torch.as_tensor(dataset.data).permute(0, 3, 1, 2)
    elif args.dataset in ("mnist", "fashion-mnist"):
        kind = datasets.MNIST if args.dataset == "mnist" else datasets.FashionMNIST
        dataset = kind(args.data_dir, download=True)
        images = nn.functional.pad(dataset.data, (2, 2, 2, 2))[:, None]  # 28x28 to 32x32
    else:
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
        dataset = datasets.ImageFolder(args.dataset, transforms.Compose(steps))
        images = torch.stack([image for image, _ in dataset])
    images = transforms.functional.resize(images, [size, size])
    labels = torch.as_tensor(dataset.targets)
    return images.to(args.device), labels.to(args.device)


'''

PARSER = """\
    p = ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
"""

BATCH = """\
index = torch.randint(len(images), (args.batch_size,), device=args.device)
x_real = images[index].float().div(127.5).sub(1)"""

LOOP = """\
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    progress = tqdm(range(1, args.steps + 1))
"""

END_OF_LOOP = """\
        if step % args.save_every == 0 or step == args.steps:
            progress.set_postfix({name: value.item() for name, value in values.items()})
            x = DRAWN
            file = out_dir / f"{step:06d}.png"
            save_image(x, fileCOLUMNS, normalize=True, value_range=(-1, 1))
    networks = {NETWORKS}
    weights = {name: network.state_dict() for name, network in networks.items()}
    torch.save(weights, out_dir / "weights.pt")


"""

IMPORTS = """\
from torchvision import datasets, transforms
from torchvision.utils import save_image
from tqdm import tqdm
"""

# Text in the scripts, and what replaces it. The order matters.
REPLACEMENTS = [
    # Imports.
    ("from argparse import", "from argparse import ArgumentDefaultsHelpFormatter,"),
    ("from torch import nn\n", f"from torch import nn\n{IMPORTS}"),
    (f"{IMPORTS}from tqdm import tqdm\n", IMPORTS),  # stacked_gan.py has it
    ("\n\nimport common\nimport runs\n", "\n"),
    # Flags.
    ("runs.positive_int", "int"),
    ("runs.image_size", "int"),
    ("at least 2 per process", "at least 2"),
    ("    return runs.parse_args(p, argv)\n", FLAGS + "    return p.parse_args(argv)\n"),
    ("    args = runs.parse_args(p, argv)\n", FLAGS + "    args = p.parse_args(argv)\n"),
    # Data.
    ("data = common.load_data(args)", "images, labels = load_data(args)"),
    ("data.channels", "images.shape[1]"),
    ("len(data.classes)", "int(labels.max()) + 1"),
    # Grids.
    (", at most 16, and fewer if the images are large.", ", at most 16."),
    ("math.isqrt(common.grid_size(args))", "8"),
    ("common.grid_size(args)", "64"),
    # The loop.
    ("common.say(", "print("),
    (", disable=common.rank() > 0", ""),
    ("args.batch_size * common.world_size()", "args.batch_size"),
    (" n_images are those of all processes.", ""),
    ("    update = runs.cuda_graph(args, data, update)\n", ""),
    ("    update_r1 = runs.cuda_graph(args, data, update_r1)\n", ""),
    ("            update_now = runs.cuda_graph(args, data, update_now)\n", ""),
    ("            # Each stage has a CUDA graph of its own, and so has its fade.\n", ""),
    (" A CUDA graph\n    # needs that as a tensor.", ""),
    (" A CUDA graph needs it as a tensor.", ""),
    (", so a CUDA graph needs it as a tensor.", ", so it is a tensor."),
    (" After --resume, each optimiser has a tensor of its own.", ""),
    ("            # In place, because the update that a graph replays reads this tensor.\n", ""),
    (" Adam's beta2 changes, which a CUDA graph cannot follow, so none is used.", ""),
    ("step == done + 1", "step == 1"),
    ("def train_encoder(args, data, E):", "def train_encoder(args, images, labels, E):"),
]

# Parts of the scripts that have no place in a copy: from the first text up to the second one.
CUTS = [
    # --label and --truncation, which go with --generate.
    ('    p.add_argument("--label"', "    args = runs.parse_args("),
    ('    if args.label != "all" and', "    return args\n"),
    ('    p.add_argument(\n        "--truncation"', "    args = runs.parse_args("),
    ("    if args.truncation != 1", "    return args\n"),
    # The check of the classes by cgan.py and stacked_gan.py.
    ("    if n_classes == 0:", "\n    # Networks"),
    # The start of a run.
    ("    # Steps already done", "    # The steps at which"),
    ("    # Steps already done", "    # Train"),
]


def fail(message):
    sys.exit(f"error: {message}")


def cut(text, start, end):
    """`text` without the part from `start` up to `end`, if there is one."""
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        return text
    return before + end + after


def replace_batch(text):
    """`text` with lines in the place of common.sample_batch, indented like its call."""

    def lines(match):
        indent, y = match[1], match[2]
        found = BATCH if y == "_" else f"{BATCH}\ny = labels[index]"
        return "".join(f"{indent}{line}\n" for line in found.splitlines())

    return re.sub(r"( *)x_real, (\w) = common\.sample_batch\(args, data\)\n", lines, text)


def replace_loop(text):
    """`text` with a loop that saves grids, and the weights at the end."""
    state = re.search(r"    state = \{(.*?)\}\n", text)
    networks = re.findall(r'"[EGD]\d?": [EGD]\d?', state[1])
    if "average = copy.deepcopy(G)" in text:
        networks.append('"average": average')
    drawn = re.search(r"save_grid\(args, step, (.*?\))(, columns)?\)\n", text)
    for start, end in CUTS:
        text = cut(text, start, end)
    if "def train_encoder" in text:
        text = text.replace(
            "    # Train.", "    train_encoder(args, images, labels, E)\n\n    # Train."
        )
    text = text.replace("    progress = runs.steps(args, done)\n", LOOP)
    end = END_OF_LOOP.replace("DRAWN", drawn[1]).replace("NETWORKS", ", ".join(networks))
    end = end.replace("COLUMNS", ", nrow=columns" if drawn[2] else "")
    before, _, _ = text.partition("        if step % args.log_every == 0:\n")
    return before + end + 'if __name__ == "__main__":\n    main()\n'


def standalone(text):
    """The text of a script as one that needs nothing else of the collection."""
    text = re.sub(r"    p = ArgumentParser\(.*\)\n", PARSER, text)
    text = re.sub(r"runs.parse_args\(p, argv, .*\)", "runs.parse_args(p, argv)", text)
    text = replace_loop(text)
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    text = re.sub(r"(?=# networks -)", lambda _: DATA, text, count=1)
    text = replace_batch(text)

    # Remove what only the replaced lines needed.
    if "labels[index]" not in text:
        text = text.replace("images, labels = load_data(args)", "images, _ = load_data(args)")
    if "math." not in text:
        text = text.replace("import math\n", "")

    return text


def main(argv=None):
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("script", type=Path, help="a script of this collection, such as wgan_gp.py")
    p.add_argument("target", type=Path, help="the file to write, which must not exist")
    args = p.parse_args(argv)

    if args.script.name in NOT_COPIED:
        fail(f"{args.script.name} uses more of common.py and runs.py than this can replace")
    source = ROOT / args.script.name
    is_another = args.script.exists() and args.script.resolve() != source.resolve()
    is_shared = source.name in ("common.py", "runs.py")
    if is_another or is_shared or not source.is_file():
        fail(f"{args.script} is not a script of this collection")
    if args.target.exists():
        fail(f"{args.target} exists: choose another name")
    if not args.target.parent.is_dir():
        fail(f"{args.target.parent} is not a folder")
    text = standalone(source.read_text("utf-8"))
    args.target.write_text(text, "utf-8")
    print(args.target)


if __name__ == "__main__":
    main()
