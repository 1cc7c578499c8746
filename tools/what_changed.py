"""Writes docs/what-changed.md, a page that compares the scripts:

python tools/what_changed.py
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-changed.md"

INTRODUCTION = """# What changed

Each part compares two scripts: the idea of the second paper, the objectives of D and G, and the
defaults that differ. For the small scripts, it also shows every line of the networks, losses and
updates that differs. It all starts with [`gan.py`](../gan.py): D learns to tell real images from
G's, and G learns to draw images that D takes for real.
"""

# Changes that are shown line by line, and changes that are too long for that.
SHORT = [
    "gan dcgan",
    "dcgan cgan",
    "dcgan lsgan",
    "dcgan wgan",
    "wgan wgan_gp",
    "dcgan sngan",
    "dcgan ebgan",
]
LONG = [
    "ebgan began",
    "gan ssgan",
    "cgan stacked_gan",
    "wgan_gp progan",
    "progan stylegan",
    "stylegan stylegan2",
    "dcgan stylegan2",
    "stylegan2 r3gan",
]

IDEAS = """
gan dcgan: Image features are local and can appear anywhere, so both networks become convolutional.
Strides take the place of pooling. Batch norm in all layers but the first of D and the last of both
keeps every layer's signals at the same scale, so that deep networks learn.

dcgan cgan: If G and D are both told the class of each image, D can refuse a good 3 where a 7 was
asked for, and G learns to draw what it is asked for. The class enters as a one-hot vector, not as a
number, because a 7 is not more of anything than a 3.

dcgan lsgan: Cross entropy has hardly any gradient left for a fake that D already takes for real,
however far it is from the data; squared distances to target scores pull on every fake. The targets
are a choice: with a, b, c = -1, 1, 0 instead of 0, 1, 1, G minimises a chi-squared divergence.

dcgan wgan: Where real and generated images hardly overlap, a D that tells them apart perfectly
gives G no useful gradient. If D's slope is bounded (here by clipping its weights), D estimates the
Wasserstein distance between the two, up to a factor, and always gives G a gradient.

wgan wgan_gp: Clipping limits what D can represent. The best D has a slope of 1 between real and
generated images, so a penalty asks for that slope at random points between the two (x_hat), and the
weights are free.

dcgan sngan: A layer is at most as steep as its largest singular value. Dividing each weight by an
estimate of it bounds how steep D can be everywhere, at hardly any cost, without the gradient
of a gradient that a penalty needs.
The hinge loss leaves images alone that D already scores well, so that D works on the others.

gan ssgan: A classifier with few labels can also learn from images without labels: each real image
belongs to some class, each fake to none. G does not try to fool D here: it
makes the mean of D's features on fakes equal to the mean on real images.

cgan stacked_gan: The features of a classifier lie between a label and an image. One GAN draws them
from the label, another draws the image from them, and each has an easier task. The classifier tells
both whether they drew what they were asked for, and a second head of each D whether they used their
noise.

dcgan stylegan2: z need not be the input of the first layer of G. StyleGAN2 computes a style from
it, which says in each layer how strong each feature is. The input of the first layer is a learnt
constant.

dcgan ebgan: A classifier learns from two targets, real and fake. An autoencoder has a target for
every pixel, so D learns more from each image. It learns to reconstruct real images, and G to draw
images that D reconstructs. A margin keeps D from wasting effort on fakes that it already
reconstructs badly. G's pulling-away term makes the codes of different fakes point in different
directions, so that they are not all one image.

ebgan began: A margin has to be chosen for the data, and what suits the start of a run may not suit
its end. BEGAN compares the distributions of D's errors on real and on generated images. It adjusts
a weight k to keep the mean error on generated images at gamma times that on real ones. A smaller
gamma lets G draw only what is easy, so it trades diversity for quality.

wgan_gp progan: Large structures are easier to learn than fine detail. Networks that begin with 4x4
images and grow learn them in this order.

stylegan2 r3gan: A loss on pairs asks D which of two images looks more real. In theory, this leaves
no local minimum in which G draws only a few kinds of images (Sun et al. 2020, 2011.04926). On its
own, the loss may not converge. The paper proves local convergence with a penalty on D's slope at
real images (R1) or at fakes (R2), and uses both, as training failed with R1 alone. Then the tricks
of StyleGAN2 can go, and both networks become plain residual ones.

progan stylegan: z need not be the input of the first layer. A mapping turns it into w, and w sets
the mean and the scale of every feature in every layer: a style for each size. z is a round cloud,
but w need not be, so that its directions can stand for single properties. Mixing the styles of two
w keeps the layers from relying on each other. Noise draws what is random, such as where each hair
lies.

stylegan stylegan2: Instance norm removes how strong a feature is; G got round it by drawing blobs.
Demodulation works on the weights instead. Skip connections do what growing was for: coarse pictures
come first by themselves, in networks of a fixed size.
"""

# What is told of long changes, and what to read in the code of the second script.
TOLD = """
wgan_gp progan, Growing (Generator.forward, stage_and_fade): The networks draw 4x4 images at first.
When a block for twice the size is added, its images are mixed with enlarged ones of the block
before, and its share grows from 0 to 1, so that nothing that has been learnt is disturbed at once.

wgan_gp progan, Equalised learning rates (Linear, Conv): All weights are N(0, 1) and get their scale
in each forward pass. Adam moves every weight at the same pace, whatever its size, so without this,
layers with small weights would learn faster than those with large ones.

wgan_gp progan, Pixel norm (PixelNorm): In a contest, G and D may drive each other's signals up
without bound. Dividing each pixel's features by their size prevents that in G, without mixing
images as batch norm does.

wgan_gp progan, Minibatch deviation (MinibatchDeviation): D sees how much the images of a batch
differ. If G draws the same image again and again, D can tell, and G has to vary.

wgan_gp progan, Scores near 0 (update): Adding the same number to all scores changes no gradient,
so nothing keeps the scores near 0. A small penalty on the squares of real images' scores does.

dcgan stylegan2, Equalised learning rates (Linear, Conv): All weights are N(0, 1)
and get their scale in each forward pass. Adam moves every weight at the same pace, whatever its
size, so without this, layers with small weights would learn faster than those with large ones.

dcgan stylegan2, Mapping (Mapping): z comes from one fixed distribution. Two layers turn it into w,
whose distribution is learnt, and from which the styles are computed.

dcgan stylegan2, Modulation (ModulatedConv): A style scales the input channels of a convolution.
Demodulation then brings the output back to unit variance. Batch norm would do that too, but here
the factor comes from the weights alone: no image depends on others.

dcgan stylegan2, Noise (Layer): Details that are random in photographs, such as where each hair
lies, need not be encoded in z: every layer can add noise, and learns how much.

dcgan stylegan2, Skip connections (ToRGB, Generator): Each size adds to an enlarged picture of
the size before. G can learn the coarse picture first, without layers that fade in.

dcgan stylegan2, The discriminator (Discriminator): D has two
convolutions per size, blurs before it halves the size, and sees how much the images of a batch
differ.

dcgan stylegan2, The R1 penalty (r1_penalty): The two losses are those of dcgan.py. D also gets a
penalty on its slope at real images, which keeps that slope small.

dcgan stylegan2, Lazy steps and an average of G (update_r1, move_average): The penalty is costly and
changes slowly, so it has a step of its own after every 16th update. The images are drawn by an
average of G's weights.
"""


def objectives(text):
    """The lines of a script's docstring with the objectives of its networks, and BEGAN's rule for
    k."""
    return re.findall(r"^    ([DEGk]\d?:  .*(?:\n {8,}\S.*)*)$", text, flags=re.MULTILINE)


def parts(text):
    """The lines of a script under each of its banners, such as "networks", without docstrings;
    of main, only noise() and update()."""
    text = re.sub(r' *""".*?"""\n+', "", text, flags=re.DOTALL)
    _, *pieces = re.split(r"\n+# (\w+) -+\n+", text)
    found = dict(zip(pieces[::2], pieces[1::2], strict=True))
    main = found.pop("training")
    noise = re.search(r"    def noise\(.*?\n\n", main, flags=re.DOTALL)[0]
    update = re.search(r"    def update\(.*?(?=\n    @)", main, flags=re.DOTALL)[0]
    found["updates"] = re.sub(r"(?m)^    ", "", noise + update)
    return {name: part.rstrip().splitlines() for name, part in found.items()}


def enclosing(rows, k):
    """The names of the class and functions in which rows[k] stands, outermost first."""
    names, indent = [], 99
    for row in reversed(rows[: k + 1]):
        depth = len(row) - len(row.lstrip())
        if row.strip() and depth < indent:
            indent = depth
            names += re.findall(r"^ *(?:class|def) (\w+)", row)
    return ".".join(reversed(names))


def difference(a, b):
    """The changed rows of b against a with two of context, each block headed by where it stands."""
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for group in matcher.get_grouped_opcodes(2):
        first = next(i for tag, i, *_ in group if tag != "equal")
        yield f"@@ {enclosing(a, min(first, len(a) - 1))} @@"
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                yield from (f" {row}".rstrip() for row in a[i1:i2])
            else:
                yield from (f"-{row}" for row in a[i1:i2])
                yield from (f"+{row}" for row in b[j1:j2])


def changed_lines(old, new):
    """The changes of a script, section by section, from the parts of both scripts."""
    text = ""
    for section, rows in new.items():
        changes = "\n".join(difference(old[section], rows))
        if changes:
            text += f"\n{section.capitalize()}:\n\n```diff\n{changes}\n```\n"
    return text


def defaults(text):
    """The script's own flags with their defaults, by name."""
    flags = text.partition("\ndef parse_args")[2].partition("runs.parse_args")[0]
    found = {}
    for name, rest in re.findall(r'"(--[\w-]+)"(.*?)(?=p\.add_argument|$)', flags, flags=re.DOTALL):
        default = re.search(r"default=([^,\n)]+)", rest)
        found[name] = default[1] if default else "off"
    return found


def changed_defaults(before, after, texts):
    """A table of the flags whose defaults differ, or that only one of two scripts has."""
    old, new = defaults(texts[before]), defaults(texts[after])
    rows = []
    for name in {**old, **new}:
        pair = [flags.get(name, "") for flags in (old, new)]
        if pair[0] != pair[1]:
            rows.append(f"| `{name}` | {pair[0]} | {pair[1]} |\n")
    if not rows:
        return "\nThe defaults are the same.\n"
    return f"\n| flag | {before}.py | {after}.py |\n|---|--:|--:|\n" + "".join(rows)


def page():
    """The text of the page."""
    ideas = dict(re.findall(r"(\w+ \w+): (.*?)\n\n", IDEAS + "\n", flags=re.DOTALL))
    text = INTRODUCTION + "\n"
    for change in SHORT + LONG:
        before, after = change.split()
        text += f"- [{before} → {after}](#{before}--{after})\n"

    for change in SHORT + LONG:
        before, after = change.split()
        texts = {script: (ROOT / f"{script}.py").read_text("utf-8") for script in (before, after)}
        text += f"\n## {before} → {after}\n\n{ideas[change]}\n\n```\n"
        width = max(8, len(before) + 1, len(after) + 1)
        for script, source in texts.items():
            for objective in objectives(source):
                text += f"{script:<{width}}{objective}\n".replace("\n    ", "\n" + " " * width)
        text += "```\n"
        text += changed_defaults(before, after, texts)

        if change in SHORT:
            text += changed_lines(parts(texts[before]), parts(texts[after]))
            continue
        told = re.findall(rf"{change}, (.*?): (.*?)\n\n", TOLD + "\n", flags=re.DOTALL)
        for title, explanation in told:
            text += f"\n**{title}.** {explanation}\n"
        text += f"\nThe lines: `git diff --no-index {before}.py {after}.py`\n"
    return text


def main(argv=None):
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    try:
        PAGE.write_text(page(), "utf-8")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} is missing: run this in a whole clone")
    print(PAGE)


if __name__ == "__main__":
    main()
