"""What the scripts have in common is written in each, and the copies are equal.

How two siblings differ is on one page, docs/what-changed.md, made from the scripts. To change
what they share, change all of them; to change what differs, renew the page and read it.
"""

import ast
import inspect
import re

import pytest
import what_changed
from helpers import NAMES, ROOT, SCRIPTS

ALL = (*NAMES, "tricks")


def section(name, start, end):
    """The text of a script from the first `start` up to the `end` after it."""
    text = (ROOT / f"{name}.py").read_text()
    return text.partition(start)[2].partition(end)[0]


@pytest.mark.parametrize("name, ours", [("common", set()), ("runs", {"common"})])
def test_the_shared_modules_import_no_others_of_ours(name, ours):
    modules = {path.stem for path in ROOT.glob("*.py")}
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & modules == ours


def test_what_changed_is_up_to_date():
    page = what_changed.PAGE.read_text("utf-8")
    assert page == what_changed.page(), "renew it: python tools/what_changed.py"


def test_what_changed_has_the_defaults_that_differ():
    """WGAN is as much its five updates of D and its optimiser as its loss."""
    page = what_changed.page()
    part = page.partition("## dcgan → wgan\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.*)` \| (.*) \| (.*) \|$", part, re.MULTILINE)
    assert rows == [
        ("--batch-size", "128", "64"),
        ("--lr", "2e-4", "5e-5"),
        ("--beta1", "0.5", ""),
        ("--beta2", "0.999", ""),
        ("--n-critic", "1", "5"),
        ("--momentum", "", "0.0"),
        ("--alpha", "", "0.99"),
        ("--clip", "", "0.01"),
    ]


def shared_body(name):
    """main of a script, without what papers may differ in: the lines that all of them share."""
    return [
        line.strip()
        for line in section(name, "\ndef main(argv=None):\n", "\n\nif __name__").splitlines()
    ]


@pytest.mark.parametrize("name", ALL)
def test_imports_and_initialisation(name):
    imports = section(name, '\n"""\n', "\ndef parse_args")
    for module in ("copy", "math"):
        imports = imports.replace(f"import {module}\n", "")
    assert imports == section("dcgan", '\n"""\n', "\ndef parse_args")
    if name != "gan":  # which has linear layers alone
        # Each names the kinds of layers that it has.
        texts = [section(script, "\ndef init_weights", "\n\n\n") for script in (name, "dcgan")]
        ours, expected = (re.sub(r"isinstance\(m, .*Conv.*\)", "", text) for text in texts)
        assert ours == expected


@pytest.mark.parametrize("name", ALL)
def test_the_loop_is_the_same(name):
    """All after the optimisers that a paper does not change: every line of dcgan.py's main from the
    state on is in each script, in this order."""
    ours, lines = iter(shared_body(name)), shared_body("dcgan")
    start = lines.index("# Steps already done: 0 in a new run, or the checkpoint's with --resume.")
    for line in lines[start:]:
        if "sample(" in line:  # of z, and in cgan.py of z and y
            line = re.split(r"sample|lambda", line)[0]
        assert any(other.startswith(line) for other in ours), line


@pytest.mark.parametrize("name", ALL)
def test_common_flags(name):
    """The first flags are the same, in order, type and help, with RMSprop's in place of Adam's;
    only the defaults are a paper's. A script's own flags come after them."""

    def first_flags(name):
        flags = section(name, "\ndef parse_args", "return")
        rows = re.findall(r"p\.add_argument\(\s*(.*?),?\s*\)\n", flags, re.DOTALL)[:8]
        return [re.sub(r"default=[^,]+", "default", row) for row in rows]

    expected = "\n".join(first_flags("dcgan"))
    if name == "gan":
        expected = expected.replace("base number of channels", "units of G's layers")
    if name == "wgan":
        expected = expected.replace("Adam's beta1", "RMSprop's momentum").replace(
            "beta1", "momentum"
        )
        expected = expected.replace("Adam's beta2", "RMSprop's alpha").replace("beta2", "alpha")
    assert "\n".join(first_flags(name)) == expected
    assert "--image-size" in expected.splitlines()[-1]


@pytest.mark.parametrize(
    "name, other, shared",
    [
        ("stylegan2", "dcgan", "d_loss g_loss"),
        ("stacked_gan", "cgan", "g_loss"),
        ("ebgan", "dcgan", "Generator init_weights"),
        ("progan", "wgan_gp", "d_loss g_loss"),
        ("progan", "tricks", "move_average"),
        ("ssgan", "tricks", "move_average"),
        ("stylegan2", "tricks", "move_average"),
        ("r3gan", "tricks", "move_average"),
        ("progan", "stylegan2", "MinibatchDeviation"),
        ("stylegan", "stylegan2", "MinibatchDeviation d_loss g_loss r1_penalty"),
        ("stylegan", "progan", "channels_at last_stage stage_and_fade reals_at move_average"),
    ],
)
def test_what_others_share(name, other, shared):
    for part in shared.split():
        ours, theirs = (getattr(SCRIPTS[script], part) for script in (name, other))
        assert inspect.getsource(ours) == inspect.getsource(theirs)
