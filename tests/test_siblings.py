"""What the seven scripts have in common is written seven times; this keeps the copies equal.

dcgan.py is the reference. A script's `main` may differ from dcgan's in the blocks listed here and in nothing
else: to change the shared body, change all seven; to make a variant differ, list the block.
"""

import ast
import difflib
import re

import pytest
from helpers import NAMES, ROOT

Z = "torch.randn(args.batch_size, args.z_dim, device=device)"
# script: what stands in dcgan's main -> what stands there instead
DIFFERENCES = {
    "dcgan": [],
    "gan": [(f"g_loss(D(G({Z})))", f"g_loss(D(G({Z})), args.saturating)")],
    "lsgan": [
        ("d_loss(d_real, d_fake)", "d_loss(d_real, d_fake, args.a, args.b)"),
        (f"g_loss(D(G({Z})))", f"g_loss(D(G({Z})), args.c)"),
    ],
    "wgan": [
        (
            'adam = {"lr": args.lr, "betas": (args.beta1, args.beta2), "fused": True, ',
            'rms = {"lr": args.lr, "momentum": args.beta1, "alpha": args.beta2, ',
        ),
        ("torch.optim.Adam(G.parameters(), **adam)", "torch.optim.RMSprop(G.parameters(), **rms)"),
        ("torch.optim.Adam(D.parameters(), **adam)", "torch.optim.RMSprop(D.parameters(), **rms)"),
        (
            "            opt_D.step()\n",
            "            opt_D.step()\n"
            "            with torch.no_grad():\n"
            "                for w in D.parameters():\n"
            "                    w.clamp_(-args.clip, args.clip)\n",
        ),
    ],
    "wgan_gp": [
        (
            "loss_D = d_loss(d_real, d_fake)",
            "loss_D = d_loss(d_real, d_fake) + args.gp_weight * gradient_penalty(D, x_real, x_fake)",
        ),
        ("minimise d_loss, with", "minimise d_loss and the penalty, with"),
    ],
    "sngan": [],
}
DIFFERENCES["cgan"] = [
    ("data = common.load_data(args)", "data = common.load_data(args, labelled=True)"),
    ("    channels = data.images.shape[1]\n",
     "    channels = data.images.shape[1]\n    n_classes = data.n_classes\n"),
    ("G = Generator(args.z_dim, args.width, channels, args.image_size)",
     "G = Generator(args.z_dim, args.width, channels, args.image_size, n_classes)"),
    ("Discriminator(args.width, channels, args.image_size)",
     "Discriminator(args.width, channels, args.image_size, n_classes)"),
    (
        "    fixed_z = torch.randn(64, args.z_dim, device=device)\n",
        "    fixed_y = torch.arange(n_classes, device=device)[:16].repeat(8)  "
        "# 8 rows; a class per column, 16 at most\n"
        "    fixed_z = torch.randn(len(fixed_y), args.z_dim, device=device)\n",
    ),
    ("    state = {", "    walk_y = fixed_y[:8].repeat_interleave(10)\n    state = {"),
    ("sample(walk_z)", "sample(walk_z, walk_y)"),
    (
        "for x_real in x_reals.chunk(args.n_critic):",
        "for x_real, y in zip(x_reals.chunk(args.n_critic), ys.chunk(args.n_critic), strict=True):",
    ),
    (f"x_fake = G({Z})", f"x_fake = G({Z}, y)"),
    ("D(x_real), D(x_fake)", "D(x_real, y), D(x_fake, y)"),
    (f"g_loss(D(G({Z})))", f"g_loss(D(G({Z}, y), y))"),
    ("# G: minimise g_loss, with D fixed", "# G: minimise g_loss, with D fixed and y as in the last batch"),
    ("def sample(z):", "def sample(z, y):"),
    ("G's images of z in", "G's images of z and y in"),
    ("x = G.eval()(z)", "x = G.eval()(z, y)"),
    ("step, sample(fixed_z))", "step, sample(fixed_z, fixed_y), columns=len(fixed_y) // 8)"),
    (
        "        common.generate(args, state, lambda i: sample("
        "torch.randn(len(i), args.z_dim, device=device)))\n",
        "        common.generate(\n"
        "            args,\n"
        "            state,\n"
        "            lambda i: sample(torch.randn(len(i), args.z_dim, device=device), i % n_classes),\n"
        "            n_classes,\n"
        "        )\n",
    ),
]  # fmt: skip


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


@pytest.mark.parametrize("name", NAMES)
def test_common_flags(name):
    """The same flags in the same order, defaults and help masked; a script's own come after --cuda-graph."""

    def masked(n):
        line, text = part(n, "parse_args")
        lines = text.splitlines()
        end = next(i for i, row in enumerate(lines) if "--cuda-graph" in row) + 1
        own = [row for row in lines[end:] if "add_argument" in row]
        kept = lines[:end] + [row for row in lines[end:] if row not in own]
        kept = [
            re.sub(r"default=[^,]+", "default=...", re.sub(r'help=".*?"', 'help="..."', row)) for row in kept
        ]
        return line, "\n".join(kept)

    assert_same(name, *masked(name), masked("dcgan")[1], "common flags")


@pytest.mark.parametrize("name", NAMES)
def test_main(name):
    expected = part("dcgan", "main")[1]
    for old, new in DIFFERENCES[name]:
        assert expected.count(old) == 1, f"listed for {name}, but not once in dcgan.py: {old}"
        expected = expected.replace(old, new)
    assert_same(name, *part(name, "main"), expected, "main")


SHARED = {  # what else is written more than once: (reference, the scripts that copy it)
    "init_weights": ("dcgan", NAMES),
    "Generator": ("dcgan", ("lsgan", "wgan", "wgan_gp")),
    "d_loss": ("dcgan", ("gan", "cgan")),
    "g_loss": ("dcgan", ("cgan",)),
}


@pytest.mark.parametrize(("wanted", "name"), [(w, n) for w, (_, names) in SHARED.items() for n in names])
def test_shared_parts(wanted, name):
    assert_same(name, *part(name, wanted), part(SHARED[wanted][0], wanted)[1], wanted)


@pytest.mark.parametrize(
    ("wanted", "name", "reference"),
    [("Discriminator", "lsgan", "dcgan"), ("Discriminator", "wgan", "dcgan"),
     ("d_loss", "wgan_gp", "wgan"), ("g_loss", "wgan_gp", "wgan")],
)  # fmt: skip
def test_shared_parts_but_for_their_docstring(wanted, name, reference):
    def without_docstring(n):
        line, text = part(n, wanted)
        return line, re.sub(r'""".*?"""', '"""..."""', text, count=1, flags=re.DOTALL)

    assert_same(name, *without_docstring(name), without_docstring(reference)[1], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_length(name):
    """A script is read at one sitting: 200 lines, its train_step 25."""
    assert len(source(name).splitlines()) <= 200
    node = next(
        n
        for n in ast.walk(ast.parse(source(name)))
        if isinstance(n, ast.FunctionDef) and n.name == "train_step"
    )
    assert node.end_lineno - node.lineno < 25


def changed_lines(a, b):
    """Lines of `b` that are not in `a` or the reverse, a replaced line counting once, outside docstrings."""

    def rows(name):
        text = re.sub(r'""".*?"""', "", source(name), flags=re.DOTALL)
        return [row for row in text.splitlines() if row.strip()]

    opcodes = difflib.SequenceMatcher(None, rows(a), rows(b), autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in opcodes if tag != "equal")


@pytest.mark.parametrize(("a", "b", "limit"), [("dcgan", "lsgan", 10), ("wgan", "wgan_gp", 30)])
def test_distance_between_siblings(a, b, limit):
    """`diff` shows the difference between two papers."""
    assert changed_lines(a, b) <= limit


def test_a_drift_is_named_by_file_and_line(capsys):
    """The check itself: a renamed variable in one script is found, with its line."""
    line, text = part("sngan", "main")
    row = next(i for i, t in enumerate(text.splitlines()) if "opt_D.zero_grad()" in t)
    with pytest.raises(pytest.fail.Exception, match=rf"sngan.py:{line + row}: main"):
        assert_same("sngan", line, text.replace("opt_D.zero_grad()", "D.zero_grad()"), text, "main")
