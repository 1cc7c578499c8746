"""Writes a script as one file that needs nothing else of this collection.

    python tools/standalone.py wgan_gp.py my_gan.py

The docstring, networks, losses, steps, and the script's own flags with their defaults stay as they
are. The calls of common.py and runs.py become a few plain lines, which load MNIST, Fashion-MNIST,
CIFAR-10 or a folder of class folders (in colour), save a grid of images now and then, and the
weights at the end. Resuming, the log, CUDA graphs, several GPUs and the checks of the input are
lost.

tricks.py, ssgan.py and eight_gaussians.py use more of the collection than this can replace.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

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
# --------------------------------------------------------------------------------------------- data


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
    torch.save({"G": G.state_dict(), "D": D.state_dict()}, out_dir / "weights.pt")
"""

# Text in the scripts, and what replaces it. The order matters.
REPLACEMENTS = [
    # Imports.
    ("from argparse import", "from argparse import ArgumentDefaultsHelpFormatter,"),
    (" ArgumentParser\n", " ArgumentParser\nfrom pathlib import Path\n"),
    ("from tqdm import tqdm\n\nimport common\nimport runs\n", "from tqdm import tqdm\n"),
    ("from tqdm", "from torchvision import datasets, transforms\nfrom tqdm"),
    ("from tqdm", "from torchvision.utils import save_image\nfrom tqdm"),
    # Flags.
    ("runs.positive_int", "int"),
    ("runs.non_negative_int", "int"),
    ("runs.finite_float", "float"),
    ("runs.positive_float", "float"),
    ("runs.non_negative_float", "float"),
    ("runs.fraction", "float"),
    ("choices=common.IMAGE_SIZES", "choices=[16, 32, 64, 128]"),
    ("at least 2 per process", "at least 2"),
    ("    return runs.parse_args(p, argv)\n", FLAGS + "    return p.parse_args(argv)\n"),
    ("    args = runs.parse_args(p, argv)\n", FLAGS + "    args = p.parse_args(argv)\n"),
    # Data.
    ("data = common.load_data(args)", "images, labels = load_data(args)"),
    ("data.channels", "images.shape[1]"),
    ("len(data.classes)", "int(labels.max()) + 1"),
    # Grids.
    ("math.isqrt(common.grid_size(args))", "8"),
    ("common.grid_size(args)", "64"),
    # The loop.
    ("common.say(", "print("),
    ("# Train. Under torchrun, args.batch_size is the part of this process.", "# Train."),
    ("args.batch_size * common.world_size()", "args.batch_size"),
    ("    update = runs.cuda_graph(args, data, update)\n", ""),
    ("    r1_step = runs.cuda_graph(args, data, r1_step)\n", ""),
    ('        return {"r1": penalty}  # runs.cuda_graph takes a dict; it is not logged\n', ""),
]

# Parts of the scripts that have no place in a copy: from the first text up to the second one.
CUTS = [
    # --label and --truncation, which go with --generate.
    ('    p.add_argument("--label"', "    args = runs.parse_args("),
    ("    if args.label is not None and", "    return args\n"),
    ("def class_number(", "def main("),
    ('    p.add_argument(\n        "--truncation"', "    return runs.parse_args("),
    ("- The mean of w for --truncation", "\n"),
    # The check of the classes by cgan.py and stacked_gan.py.
    ("    if n_classes == 0:", "\n    # Networks"),
    # Images for --generate, and the start of a run.
    ("    def draw(", "    # A new run begins"),
    ("\n\n    # A new run begins", "\n\n"),
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
    text = re.sub(r"    progress = tqdm\(.*\)\n", LOOP, text)
    found = re.search(r"save_grid\(args, step, (.*?\))(, columns)?\)\n", text)
    if found:
        end = END_OF_LOOP.replace("DRAWN", found[1])
        end = end.replace("COLUMNS", ", nrow=columns" if found[2] else "")
        text = cut(text, "        save_due = ", "    runs.finish_run(args)\n")
        text = text.replace("    runs.finish_run(args)\n", end)
    return text


def join_short_calls(text):
    """`text` with the arguments of a call on the line of its name where 100 columns are enough, as
    a formatter has them."""

    def joined(match):
        line = f"{match[1]}{match[2]})"
        return line if len(line) <= 100 else match[0]

    return re.sub(r"(?m)^( *[\w.]+\()\n +(.*[^,\n])\n *\)$", joined, text)


def standalone(name, text):
    """The text of a script as one that needs nothing else of the collection. Exits with an error if
    it uses more than this can replace."""
    text = re.sub(r"    p = ArgumentParser\(.*\)\n", PARSER, text)
    text = re.sub(r", generate_only=\(.*?\)", "", text)
    for start, end in CUTS:
        text = cut(text, start, end)
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    text = re.sub(r"(?=# -+ networks\n)", lambda _: DATA, text, count=1)
    text = replace_loop(replace_batch(text))

    # Remove what only the replaced lines needed.
    if "labels[index]" not in text:
        text = text.replace("images, labels = load_data(args)", "images, _ = load_data(args)")
    if "math." not in text:
        text = text.replace("import math\n", "")

    # Anything else that belongs to the collection has no place in a copy.
    if re.search(r"\b(common|runs)\.(?!py\b)|args\.(resume|generate)", text):
        fail(f"{name} uses more of common.py and runs.py than this can replace: copy them with it")
    return join_short_calls(text)


def main(argv=None):
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("script", type=Path, help="a script of this collection, such as wgan_gp.py")
    p.add_argument("target", type=Path, help="the file to write, which must not exist")
    args = p.parse_args(argv)

    source = ROOT / args.script.name
    is_another = args.script.exists() and args.script.resolve() != source.resolve()
    if is_another or not source.is_file():
        fail(f"{args.script} is not a script of this collection")
    if args.target.exists():
        fail(f"{args.target} exists: choose another name")
    if not args.target.parent.is_dir():
        fail(f"{args.target.parent} is not a folder")
    text = standalone(source.name, source.read_text("utf-8"))
    args.target.write_text(text, "utf-8")
    print(args.target)


if __name__ == "__main__":
    main()
