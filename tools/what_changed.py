"""Writes docs/what-changed.md, how the scripts differ, from the scripts: `python
tools/what_changed.py`."""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-changed.md"

INTRODUCTION = """# What changed

Eight ideas, each a small change to a script before it: what its paper had in mind, what D and G
are trained for before and after, and every line that differs, except docstrings and flags. The
first idea is that of [`gan.py`](../gan.py): D learns to tell real images from G's, and G to draw
images that D takes for real.
"""

IDEAS = """
gan dcgan: Images are local and alike everywhere, so both networks become convolutional: strides
take the place of pooling, and batch norm in every layer but the first of D and the last of both
lets deep ones learn.

dcgan cgan: If G and D are both told the class of each image, D can refuse a good 3 where a 7 was
asked for, and G learns to draw what it is asked for.

dcgan lsgan: Cross entropy has hardly any gradient left for a fake that D already takes for real,
however far it is from the data; squared distances to target scores pull on every fake.

dcgan wgan: Where real and generated images hardly overlap, a D that tells them apart perfectly
teaches nothing reliable. One that must not be steep, here by clipped weights, estimates how far
apart they are, up to a factor, and has a slope to follow.

wgan wgan_gp: Clipping wastes what D could be. The best D has a slope of 1 between real and
generated images: ask for that slope by a penalty, and leave the weights free.

dcgan sngan: A layer is at most as steep as its largest singular value. Dividing each weight by an
estimate of it bounds how steep D can be everywhere, at hardly any cost and with no second gradient.

gan ssgan: A classifier with few labels can still learn from images without: each belongs to one of
its classes, whichever, and G's belong to none. G does not try to deceive D here: it
matches D's features on average.
"""


def objectives(text):
    """The lines of a script's docstring with the objectives of D and G."""
    return re.findall(r"^    ([DG]:  .*(?:\n {8,}\S.*)*)$", text, flags=re.MULTILINE)


def parts(text):
    """The lines of a script under each of its banners, such as "networks", without docstrings."""
    text = re.sub(r' *""".*?"""\n+', "", text, flags=re.DOTALL)
    _, *pieces = re.split(r"\n+# -+ (\w+)\n+", text)
    return {name: part.splitlines() for name, part in zip(pieces[::2], pieces[1::2], strict=True)}


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


def page():
    """The text of docs/what-changed.md."""
    page = INTRODUCTION
    for before, after, idea in re.findall(r"(\w+) (\w+): (.*?)\n\n", IDEAS + "\n", flags=re.DOTALL):
        texts = {name: (ROOT / f"{name}.py").read_text("utf-8") for name in (before, after)}
        page += f"\n## {before} → {after}\n\n{idea}\n\n```\n"
        for name, text in texts.items():
            for objective in objectives(text):
                page += f"{name:<8}{objective}\n".replace("\n    ", "\n" + " " * 8)
        page += "```\n"

        old, new = parts(texts[before]), parts(texts[after])
        for section, rows in new.items():
            rows = list(difference(old.get(section, []), rows))
            title = "Steps" if section == "training" else section.capitalize()
            if rows:
                page += f"\n{title}:\n\n```diff\n" + "\n".join(rows).rstrip() + "\n```\n"
    return page


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
