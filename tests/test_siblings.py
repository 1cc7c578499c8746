"""What the seven scripts have in common is written seven times; this keeps the copies equal.

dcgan.py is the reference. A script's `main` may differ from dcgan's in the blocks listed here and in nothing
else: to change the shared body, change all seven; to make a variant differ, list the block.
"""

import ast
import difflib
import re

import pytest
import what_changed
from helpers import NAMES, ROOT

Z, N = "torch.randn(args.batch_size, args.z_dim, device=device)", "torch.randn(n, args.z_dim, device=device)"
ADAM = "Adam({}.parameters(), lr=args.lr, betas=(args.beta1, args.beta2), fused=True)"
RMSPROP = "RMSprop({}.parameters(), lr=args.lr, momentum=args.momentum, alpha=args.alpha)"
# script: what stands in dcgan's main, what stands there instead, and how often
DIFFERENCES = {
    "dcgan": [],
    "gan": [("D(x_fake))\n", "D(x_fake), args.saturating)\n", 1)],
    "lsgan": [("d_fake)\n        opt", "d_fake, args.a, args.b)\n        opt", 1),
              ("D(x_fake))\n", "D(x_fake), args.c)\n", 1)],
    "wgan": [*((ADAM.format(net), RMSPROP.format(net), 1) for net in "GD"),
             ("opt_D.step()\n", "opt_D.step()\n        for w in D.parameters():\n"
              "            w.detach().clamp_(-args.clip, args.clip)\n", 1)],
    "wgan_gp": [("d_fake)\n        opt",
                 "d_fake) + args.gp_weight * gradient_penalty(D, x_real, x_fake)\n        opt", 1),
                ("minimise d_loss, with", "minimise d_loss and the penalty, with", 1)],
    "sngan": [],
    "cgan": [("load_data(args", "load_data(args, labelled=True", 1),
             ("args.image_size)", "args.image_size, data.n_classes)", 2),
             ("    fixed_z = torch.randn(64,",
              "    fixed_y = torch.arange(data.n_classes, device=device)[:16].repeat(8)  "
              "# a class per column, 16 at most\n    fixed_z = torch.randn(len(fixed_y),", 1),
             (f"G({Z})", f"G({Z}, y)", 2), ("D(x_real), D(x_fake)", "D(x_real, y), D(x_fake, y)", 1),
             ("d_step(x_real)", "d_step(x_real, y)", 2), ("g_step()", "g_step(y)", 2),
             ("g_loss(D(x_fake))", "g_loss(D(x_fake, y))", 1), ("sample(z)", "sample(z, y)", 1),
             ("images of z in", "images of z and y in", 1), ("eval()(z)", "eval()(z, y)", 1),
             ("sample(fixed_z))", "sample(fixed_z, fixed_y), columns=len(fixed_y) // 8)", 1),
             (f"n: sample({N})", f"n, y: sample({N}, y)", 1), ("x_real, _ =", "x_real, y =", 1)],
}  # fmt: skip


def source(name):
    return (ROOT / f"{name}.py").read_text()


def part(name, wanted):
    """(first line, text) of a top-level function or class of a script."""
    text = source(name)
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == wanted:
            return node.lineno, "".join(text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"{name}.py has no {wanted}")


def assert_same(name, line, text, expected, what):
    """Fails with file and line of the first place where `text`, which starts at `line`, differs."""
    ours, theirs = text.splitlines(), expected.splitlines()
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag != "equal":
            pytest.fail(
                f"{name}.py:{line + i1}: {what}: has {ours[i1:i2]}, the siblings have {theirs[j1:j2]}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_imports(name):
    def header(n):
        text = source(n)
        start = text.index('"""', 3) + 3
        return text[:start].count("\n") + 1, text[start : text.index("def parse_args")]

    assert_same(name, *header(name), header("dcgan")[1], "imports")


OWN_FLAGS = {"gan": ["saturating"], "cgan": ["label"], "lsgan": ["a", "b", "c"], "wgan": ["clip"]}
OWN_FLAGS["wgan_gp"] = ["gp-weight"]


@pytest.mark.parametrize("name", NAMES)
def test_common_flags(name):
    """The same flags in the same order, defaults and help of the paper's masked, RMSprop's in the place of
    Adam's; a script's own stand apart."""

    def masked(n):
        line, text = part(n, "parse_args")
        rows = [row for row in text.splitlines() if "add_argument" in row]
        rows = [row for row in rows if row.split('"')[1][2:] not in OWN_FLAGS.get(n, [])]
        paper = next(i for i, row in enumerate(rows) if "--dataset" in row)
        for i, row in enumerate(rows[:paper]):
            rows[i] = re.sub(r'default=[^,]+|help=".*?"', "...", row)
        rows = [row.replace("momentum", "beta1").replace("alpha", "beta2") for row in rows]
        return line, "\n".join(rows)

    assert_same(name, *masked(name), masked("dcgan")[1], "common flags")


@pytest.mark.parametrize("name", NAMES)
def test_main(name):
    expected = part("dcgan", "main")[1]
    for old, new, times in DIFFERENCES[name]:
        assert expected.count(old) == times, f"listed for {name}, but not {times} times in dcgan.py: {old}"
        expected = expected.replace(old, new)
    assert_same(name, *part(name, "main"), expected, "main")


SHARED = [  # what else is written more than once: the part, its reference, the scripts that copy it
    ("init_weights", "dcgan", NAMES),
    ("Generator", "dcgan", ("lsgan", "wgan", "wgan_gp")),
    ("d_loss", "dcgan", ("gan", "cgan")),
    ("g_loss", "dcgan", ("cgan",)),
    ("g_loss", "wgan", ("wgan_gp",)),
    ("Discriminator", "dcgan", ("lsgan", "wgan")),  # these two but for the docstring
    ("d_loss", "wgan", ("wgan_gp",)),
]


@pytest.mark.parametrize(
    ("wanted", "reference", "name"), [(w, r, n) for w, r, names in SHARED for n in names]
)
def test_shared_parts(wanted, reference, name):
    def text(n):
        line, text = part(n, wanted)
        own = (wanted, reference) in (("Discriminator", "dcgan"), ("d_loss", "wgan"))
        return line, re.sub(r'""".*?"""', '"""..."""', text, count=1, flags=re.DOTALL) if own else text

    assert_same(name, *text(name), text(reference)[1], wanted)


def lines(*patterns):
    return sum(len(p.read_text().splitlines()) for pattern in patterns for p in ROOT.glob(pattern))


def test_budgets(capsys):
    """Minimal stays true: a script is read at one sitting. `pytest -s` prints where each file stands."""
    budgets = {f"{name}.py": 190 for name in NAMES} | {"common.py": 520, "tests/*.py": 2800, "README.md": 150}
    counted = {pattern: lines(pattern) for pattern in budgets}
    with capsys.disabled():
        print("\n" + ", ".join(f"{p} {n} of {budgets[p]}" for p, n in counted.items()))
    assert all(counted[p] <= budgets[p] for p in budgets)


@pytest.mark.parametrize("step", ["d_step", "g_step"])
@pytest.mark.parametrize("name", NAMES)
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


def test_a_drift_is_named_by_file_and_line(capsys):
    """The check itself: a renamed variable in one script is found, with its line."""
    line, text = part("sngan", "main")
    row = next(i for i, t in enumerate(text.splitlines()) if "opt_D.zero_grad()" in t)
    with pytest.raises(pytest.fail.Exception, match=rf"sngan.py:{line + row}: main"):
        assert_same("sngan", line, text.replace("opt_D.zero_grad()", "D.zero_grad()"), text, "main")


def test_what_changed_is_up_to_date():
    assert what_changed.PAGE.read_text() == what_changed.page(), "renew it: python tests/what_changed.py"
