"""Renews docs/what-changed.md, a page that compares the scripts:

    python tools/what_changed.py

The ideas on the page are written by hand. The objectives, the defaults and the changed lines come
from the scripts. A section whose changed lines are too many describes them by hand instead.
"""

import argparse
import difflib
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-changed.md"


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


def renewed(section):
    """A section of the page, with its heading and idea as they are, and the rest from the scripts.
    If the section describes the changes by hand, that stays, too: all from the first paragraph that
    begins in bold or with "The lines: "."""

    def is_computed(paragraph):
        return not paragraph.startswith(("**", "The lines: "))

    heading, idea, *paragraphs = section.strip().split("\n\n")
    by_hand = list(itertools.dropwhile(is_computed, paragraphs))

    # The objectives of both scripts, and their defaults.
    before, after = heading.split(" → ")
    texts = {script: (ROOT / f"{script}.py").read_text("utf-8") for script in (before, after)}
    text = f"{heading}\n\n{idea}\n\n```\n"
    width = max(8, len(before) + 1, len(after) + 1)
    for script, source in texts.items():
        for objective in objectives(source):
            text += f"{script:<{width}}{objective}\n".replace("\n    ", "\n" + " " * width)
    text += "```\n" + changed_defaults(before, after, texts)
    if by_hand:
        return text + "\n" + "\n\n".join(by_hand) + "\n"
    return text + changed_lines(parts(texts[before]), parts(texts[after]))


def page():
    """The text of the page, renewed. No line of a diff begins with ##."""
    introduction, *sections = PAGE.read_text("utf-8").split("\n## ")
    return "\n## ".join([introduction, *[renewed(section) for section in sections]])


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
