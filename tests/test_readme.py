"""What README and docs tell a reader to do, done: snippets and commands."""

import importlib.util
import itertools
import re

from helpers import NAMES, ROOT, SCRIPTS, train
from PIL import Image

PAGES = [ROOT / "README.md", ROOT / "docs" / "python.md"]


def test_python_snippets(monkeypatch):
    """Each block runs by itself, on runs of the names that they have there."""
    monkeypatch.syspath_prepend(ROOT)
    flags = ["--steps", 2, "--save-every", 1, "--log-every", 1]
    train("cgan", "runs/cgan-digits", *flags)
    train("tricks", "runs/tricks-digits", *flags, "--ema", 0.9)
    train("stylegan2", "runs/stylegan2-digits", *flags)
    blocks = [re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S) for page in PAGES]
    assert len(blocks[0]) >= 1 and len(blocks[1]) >= 3
    for block in itertools.chain(*blocks):
        if "pandas" not in block or importlib.util.find_spec("pandas"):
            exec(compile(block, "README", "exec"), {})
    assert Image.open("walk.png").size[0] > 100
    assert Image.open("mixed.png").size == (9 * 18 + 2, 9 * 18 + 2)
    assert Image.open("thicker.png").size == (9 * 18 + 2, 2 * 18 + 2)
    assert Image.open("found.png").size == (2 * 18 + 2, 18 + 2)
    assert Image.open("run.gif").n_frames == 3


def test_commands_have_flags_that_exist():
    """Every `python <script>.py ...` in README, docs and docstrings is a command that parses."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += [ROOT / f"{name}.py" for name in SCRIPTS]
    commands = set()
    for page in pages:
        commands |= set(re.findall(r"python (\w+)\.py ([^`\n|]*)", page.read_text("utf-8")))
    parsed = 0
    for name, flags in commands:
        argv = flags.split()
        # A run to continue or to draw from is not here.
        if name in SCRIPTS and not {"--resume", "--generate", "--init", "--help"} & set(argv):
            SCRIPTS[name].parse_args(argv)
            parsed += 1
    assert parsed > 15


def test_every_script_has_its_row():
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in NAMES:
        assert f"| [{name}.py]({name}.py) | [" in readme
