"""Writes two pages that compare the scripts, docs/what-changed.md and docs/what-changed-large.md:
`python tools/what_changed.py`."""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

INTRODUCTION = """# What changed

Each part compares two scripts: the idea of the second paper, the objectives of D and G, the
defaults that differ, and every line of the networks, losses and steps that differs. It all starts
with [`gan.py`](../gan.py): D learns to tell real images from G's, and G learns to draw images that
D takes for real.
"""

# The pages, and the changes on each.
PAGES = {
    "what-changed.md": [
        "gan dcgan",
        "dcgan cgan",
        "dcgan lsgan",
        "dcgan wgan",
        "wgan wgan_gp",
        "dcgan sngan",
        "dcgan ebgan",
        "ebgan began",
    ],
    "what-changed-large.md": [
        "gan ssgan",
        "cgan stacked_gan",
        "wgan_gp progan",
        "progan stylegan",
        "stylegan stylegan2",
        "dcgan stylegan2",
        "stylegan2 r3gan",
    ],
}

IDEAS = """
gan dcgan: Image features are local and can appear anywhere, so both networks become convolutional.
Strides take the place of pooling. Batch norm in all layers but the first of D and the last of both
lets deep networks learn.

dcgan cgan: If G and D are both told the class of each image, D can refuse a good 3 where a 7 was
asked for, and G learns to draw what it is asked for.

dcgan lsgan: Cross entropy has hardly any gradient left for a fake that D already takes for real,
however far it is from the data; squared distances to target scores pull on every fake.

dcgan wgan: Where real and generated images hardly overlap, a D that tells them apart perfectly
gives G no useful gradient. If D's slope is bounded (here by clipping its weights), D estimates the
distance between the two, up to a factor, and always gives G a gradient.

wgan wgan_gp: Clipping limits what D can represent. The best D has a slope of 1 between real and
generated images, so a penalty asks for that slope, and the weights are free.

dcgan sngan: A layer is at most as steep as its largest singular value. Dividing each weight by an
estimate of it bounds how steep D can be everywhere, at hardly any cost and with no second gradient.

gan ssgan: A classifier with few labels can also learn from images without labels: each real image
belongs to some class, each fake to none. G does not try to deceive D here: it matches D's features
on average.

cgan stacked_gan: The features of a classifier lie between a label and an image. One GAN draws them
from the label, another draws the image from them, and each has an easier task. The classifier tells
both whether they drew what they were asked for, and a second head of each D whether they used their
noise.

dcgan stylegan2: z need not be the input of the first layer of G. StyleGAN2 computes a style from
it, which says in each layer how strong each feature is. The input of the first layer is a learnt
constant.

dcgan ebgan: From a classifier, G gets one number per image to learn from; from an autoencoder, one
per pixel. D learns to reconstruct real images, and G to draw images that D reconstructs. A margin
keeps D from wasting effort on fakes that it already reconstructs badly.

ebgan began: A margin has to be chosen for the data, and what suits the start of a run may not suit
its end. BEGAN adjusts a weight k instead, so that D's error on generated images stays a fixed share
gamma of that on real ones.

wgan_gp progan: Large structures are easier to learn than fine detail. Networks that begin with 4x4
images and grow learn them in this order.

stylegan2 r3gan: With a loss that compares each real image with a generated one, and a penalty on
D's slope at both kinds of images, training converges locally, and G has to cover all of the data.
Then the tricks of StyleGAN2 can go, and both networks become plain residual ones.

progan stylegan: z need not be the input of the first layer. A mapping turns it into w, and w sets
the mean and the scale of every feature in every layer: a style for each size. Noise draws what is
random, such as where each hair lies.

stylegan stylegan2: Instance norm lets G hide how strong a feature is, which showed as blobs.
Demodulation works on the weights instead. Skip connections do what growing was for: coarse pictures
come first by themselves, in networks of a fixed size.
"""

# A long change is told in parts. Each has a title, the classes and functions that it shows (or the
# section of the script), and what they are for.
HEADINGS = """
dcgan stylegan2, Equal learning rates (init_weights activate Linear Conv): All weights are N(0, 1)
and get their scale in each forward pass. Adam moves every weight at the same pace, whatever its
size, so without this, layers with small weights would learn faster than those with large ones.

dcgan stylegan2, Mapping (Mapping): z comes from one fixed distribution. Two layers turn it into w,
whose distribution is learnt, and from which the styles are computed.

dcgan stylegan2, Modulation (ModulatedConv): A style scales the input channels of a convolution.
Demodulation then brings the output back to unit variance. Batch norm would do that too, but here
the factor comes from the weights alone: no image depends on others.

dcgan stylegan2, Noise (Layer): Details that are random in photographs, such as where each hair
lies, need not be encoded in z: every layer can add noise, and learns how much.

dcgan stylegan2, Skip connections (Filter ToRGB Generator): Each size adds to an enlarged picture of
the size before. G can learn the coarse picture first, without layers that fade in.

dcgan stylegan2, The discriminator (channels_at Discriminator minibatch_deviation): D has two
convolutions per size, blurs before it halves the size, and sees how much the images of a batch
differ.

dcgan stylegan2, The R1 penalty (losses): The two losses are those of dcgan.py. D also gets a
penalty on its slope at real images, which keeps that slope small.

dcgan stylegan2, Lazy steps and an average of G (training): The penalty is costly and changes
slowly, so it has a step of its own after every 16th update. The images are drawn by an average of
G's weights.
"""


def objectives(text):
    """The lines of a script's docstring with the objectives of its networks, and BEGAN's rule for
    k."""
    return re.findall(r"^    ([DEGk]\d?:  .*(?:\n {8,}\S.*)*)$", text, flags=re.MULTILINE)


def parts(text):
    """The lines of a script under each of its banners, such as "networks", without docstrings."""
    text = re.sub(r' *""".*?"""\n+', "", text, flags=re.DOTALL)
    _, *pieces = re.split(r"\n+# -+ (\w+)\n+", text)
    return {name: part.splitlines() for name, part in zip(pieces[::2], pieces[1::2], strict=True)}


def definitions(rows):
    """The rows of each class and function that the rows of a section define, by its name."""
    found = {}
    for row in rows:
        if start := re.match(r"(?:class|def) (\w+)", row):
            name = start[1]
            found[name] = []
        found[name].append(row)
    return found


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
        if a:
            yield f"@@ {enclosing(a, min(first, len(a) - 1))} @@"
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                yield from (f" {row}".rstrip() for row in a[i1:i2])
            else:
                yield from (f"-{row}" for row in a[i1:i2])
                yield from (f"+{row}" for row in b[j1:j2])


def block(rows):
    """Rows of a difference in a block of their own; nothing if there are none."""
    text = re.sub(r"(\n[+-]?)+$", "", "\n".join(rows))  # without blank lines at the end
    return f"\n```diff\n{text}\n```\n" if text else ""


def by_section(old, new):
    """The changes of a script, section by section, from the parts of both scripts."""
    text = ""
    for section, rows in new.items():
        title = "Steps" if section == "training" else section.capitalize()
        changes = block(difference(old.get(section, []), rows))
        if changes:
            text += f"\n{title}:\n{changes}"
    return text


def by_heading(old, new, headings):
    """The same under headings (title, names of what each shows, explanation)."""
    old |= definitions(old.pop("networks"))
    new |= definitions(new.pop("networks"))
    text = ""
    for title, names, explanation in headings:
        text += f"\n### {title}\n\n{explanation}\n"
        for name in names.split():
            text += block(difference(old.pop(name, []), new.pop(name, [])))
    assert not new, f"HEADINGS lacks {set(new)}"
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


def page(name):
    """The text of one of the PAGES."""
    ideas = dict(re.findall(r"(\w+ \w+): (.*?)\n\n", IDEAS + "\n", flags=re.DOTALL))
    changes = [change.split() for change in PAGES[name]]
    text = INTRODUCTION + "\n"
    for before, after in changes:
        text += f"- [{before} → {after}](#{before}--{after})\n"
    for other in PAGES.keys() - {name}:
        there = ", ".join(dict.fromkeys(change.split()[1] for change in PAGES[other]))
        text += f"- on [another page](./{other}): {there}\n"

    for before, after in changes:
        texts = {script: (ROOT / f"{script}.py").read_text("utf-8") for script in (before, after)}
        idea = ideas[f"{before} {after}"]
        text += f"\n## {before} → {after}\n\n{idea}\n\n```\n"
        width = max(8, len(after) + 1)
        for script, source in texts.items():
            for objective in objectives(source):
                text += f"{script:<{width}}{objective}\n".replace("\n    ", "\n" + " " * width)
        text += "```\n"
        text += changed_defaults(before, after, texts)

        old, new = parts(texts[before]), parts(texts[after])
        pattern = rf"{before} {after}, (.*?) \((.*?)\): (.*?)\n\n"
        headings = re.findall(pattern, HEADINGS + "\n", flags=re.DOTALL)
        if headings:
            text += by_heading(old, new, headings)
        else:
            text += by_section(old, new)
    return text


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / "docs" / name).write_text(page(name), "utf-8")
