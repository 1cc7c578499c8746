"""What the scripts have in common is written in each; this keeps the copies equal and the files short.

How two siblings differ stands on one page, docs/what-changed.md, made from the scripts. To change the
shared body, change all of them; to make a variant differ, renew the page and the counts below.
"""

import ast
import difflib
import re

import pytest
import what_changed
from helpers import NAMES, ROOT

ALL = (*NAMES, "tricks")


def source(name):
    return (ROOT / f"{name}.py").read_text()


def section(name, start, end):
    """The text of a script from the first `start` up to the `end` after it."""
    return source(name).partition(start)[2].partition(end)[0]


def test_what_changed_is_up_to_date():
    assert what_changed.PAGE.read_text() == what_changed.page(), "renew it: python tests/what_changed.py"


@pytest.mark.parametrize(
    ("a", "b", "counts"),  # removed and added lines of networks, losses, steps
    [
        ("gan", "dcgan", (34, 4, 2)),
        ("dcgan", "cgan", (19, 0, 35)),
        ("dcgan", "lsgan", (0, 8, 4)),
        ("dcgan", "wgan", (0, 4, 6)),
        ("wgan", "wgan_gp", (8, 7, 8)),
        ("dcgan", "sngan", (28, 4, 0)),
    ],
)
def test_siblings_differ_in_nothing_else(a, b, counts):
    (old, _), (new, _) = what_changed.parts(a), what_changed.parts(b)
    for part, count in zip(old, counts, strict=True):
        rows = [row for row in what_changed.difference(old[part], new[part]) if row[:1] in ("+", "-")]
        assert len(rows) == count, f"{part} of {b}.py against {a}.py:\n" + "\n".join(rows)


def test_tricks_adds_to_dcgan():
    """Of dcgan's main it changes these lines, and in all else it only adds."""
    theirs, ours = (section(name, "\ndef main", "\nif __name__").splitlines() for name in ("dcgan", "tricks"))
    diff = list(difflib.ndiff(theirs, ours))
    assert [row[2:].strip() for row in diff if row.startswith("- ")] == [
        "D = Discriminator(args.width, data.channels, args.image_size).to(device)",
        "d_real, d_fake = D(x_real), D(x_fake)",
        "loss_D = d_loss(d_real, d_fake)",
        "def g_step():",
        "loss_G = g_loss(D(x_fake))",
        "x = G.eval()(z)",
        "loss_G = g_step()",
    ]
    assert section("tricks", "\nclass Generator", "\nclass") == section(
        "dcgan", "\nclass Generator", "\nclass"
    )


@pytest.mark.parametrize("name", ALL)
def test_imports_and_initialisation(name):
    for start, end in (('\n"""\n', "\ndef parse_args"), ("\ndef init_weights", "\n# ---")):
        assert section(name, start, end).replace("import copy\n", "") == section("dcgan", start, end)


OWN_FLAGS = {"gan": ["saturating"], "cgan": ["label"], "lsgan": ["a", "b", "c"], "wgan": ["clip"]}
OWN_FLAGS["wgan_gp"] = ["gp-weight"]
OWN_FLAGS["tricks"] = ["smooth", "flip", "noise", "replay", "feature-matching", "minibatch-kernels", "r1"]
OWN_FLAGS["tricks"] += ["ema", "diffaug"]


@pytest.mark.parametrize("name", ALL)
def test_common_flags(name):
    """The same flags in the same order, defaults and help of the paper's masked, RMSprop's in the place of
    Adam's; a script's own stand apart."""

    def masked(n):
        rows = re.findall(r"p\.add_argument.*", source(n))
        rows = [row for row in rows if row.split('"')[1][2:] not in OWN_FLAGS.get(n, [])]
        paper = next(i for i, row in enumerate(rows) if "--dataset" in row)
        for i, row in enumerate(rows[:paper]):
            rows[i] = re.sub(r'default=[^,]+|help=".*?"', "...", row)
        return [row.replace("momentum", "beta1").replace("alpha", "beta2") for row in rows]

    assert masked(name) == masked("dcgan")


def lines(*patterns):
    return sum(len(p.read_text().splitlines()) for pattern in patterns for p in ROOT.glob(pattern))


def test_budgets(capsys):
    """Minimal stays true: a script is read at one sitting. `pytest -s` prints where each file stands."""
    budgets = {f"{name}.py": 190 for name in NAMES} | {"tricks.py": 290, "common.py": 530}
    budgets |= {"tests/*.py": 2850, "README.md": 150}
    counted = {pattern: lines(pattern) for pattern in budgets}
    with capsys.disabled():
        print("\n" + ", ".join(f"{p} {n} of {budgets[p]}" for p, n in counted.items()))
    assert all(counted[p] <= budgets[p] for p in budgets)


@pytest.mark.parametrize("step", ["d_step", "g_step"])
@pytest.mark.parametrize("name", ALL)
def test_a_step_has_14_lines(name, step):
    nodes = [n for n in ast.walk(ast.parse(source(name))) if getattr(n, "name", None) == step]
    assert len(nodes) == 1 and nodes[0].end_lineno - nodes[0].lineno < 14


def changed_lines(a, b):
    """Lines of `b` that are not in `a` or the reverse, a replaced line counting once, outside docstrings."""

    def rows(name):
        text = re.sub(r'""".*?"""', "", source(name), flags=re.DOTALL)
        return [row for row in text.splitlines() if row.strip()]

    opcodes = difflib.SequenceMatcher(None, rows(a), rows(b), autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in opcodes if tag != "equal")


@pytest.mark.parametrize(
    ("a", "b", "limit"), [("dcgan", "lsgan", 10), ("dcgan", "cgan", 30), ("wgan", "wgan_gp", 25)]
)
def test_distance_between_siblings(a, b, limit):
    """`diff` shows the difference between two papers."""
    assert changed_lines(a, b) <= limit
