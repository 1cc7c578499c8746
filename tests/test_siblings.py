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

SIBLINGS = (*NAMES, "tricks")


def section(name, start, end):
    """The text of a script from the first `start` up to the `end` after it."""
    text = (ROOT / f"{name}.py").read_text("utf-8")
    assert start in text
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


def test_a_new_section_of_what_changed_is_filled_in(monkeypatch, tmp_path):
    """From its heading and idea, in the middle of the page and at its end."""
    head, heading, rest = what_changed.PAGE.read_text("utf-8").partition("\n## dcgan → lsgan\n")
    whole, next_heading, after = rest.partition("\n## ")
    idea = whole.partition("\n```")[0]
    monkeypatch.setattr(what_changed, "PAGE", tmp_path / "page.md")
    for tail in (next_heading + after, ""):
        what_changed.PAGE.write_text(head + heading + idea + tail, "utf-8")
        assert what_changed.page() == head + heading + whole + tail


@pytest.mark.parametrize("name", SIBLINGS)
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


def loop(name):
    """The lines of main from the state on, without the labels that cgan.py has in some of them."""
    main = section(name, "    # Steps already done: ", "\n\nif __name__")
    for text in (", y", ", fixed_y", ", columns", ", labels, data.classes"):
        main = main.replace(text, "")
    return [line.strip() for line in main.splitlines() if line.strip()]


@pytest.mark.parametrize("name", [*SIBLINGS, "ebgan", "began"])
def test_the_loop_is_the_same(name):
    """Every line of dcgan.py's is in each script, in this order."""
    expected = loop("dcgan")
    assert [line for line in loop(name) if line in expected] == expected


@pytest.mark.parametrize("name", ["lsgan", "wgan", "wgan_gp", "sngan", "ebgan", "ssgan"])
def test_images_are_drawn_in_the_same_way(name):
    """`sample` and fixed_z, which are tested with gan.py, dcgan.py and cgan.py."""
    ends = "\n    @torch.no_grad()\n    def sample", "\n    # Steps already done"
    assert section(name, *ends) == section("dcgan", *ends)


@pytest.mark.parametrize("name", SIBLINGS)
def test_common_flags(name):
    """The first flags are the same, in order, type and help; only the defaults are a paper's.
    RMSprop has no betas. A script's own flags come after them."""

    def first_flags(name):
        flags = section(name, "\ndef parse_args", "return")
        rows = re.findall(r"p\.add_argument\(\s*(.*?),?\s*\)\n", flags, re.DOTALL)
        rows = [re.sub(r"default=[^,]+", "default", row) for row in rows]
        last = next(index for index, row in enumerate(rows) if "--image-size" in row)
        return rows[: last + 1]

    expected = first_flags("dcgan")
    if name == "gan":
        expected = [
            row.replace("base number of channels", "units of G's layers") for row in expected
        ]
    if name == "wgan":
        expected = [row for row in expected if "beta" not in row]
    assert first_flags(name) == expected


@pytest.mark.parametrize(
    "name, other, shared",
    [
        ("dcgan", "gan", "d_loss"),
        ("cgan", "dcgan", "d_loss g_loss init_weights"),
        ("lsgan", "dcgan", "Generator"),
        ("wgan", "dcgan", "Generator"),
        ("wgan_gp", "dcgan", "Generator"),
        ("wgan_gp", "wgan", "d_loss g_loss"),
        ("tricks", "dcgan", "Generator g_loss"),
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
