"""What README and docs tell a reader to do, done: snippets, the notebook and commands."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPTS, fewer_digits, train
from PIL import Image

import eight_gaussians
import runs


def test_python_snippets(monkeypatch):
    """The blocks of docs/python.md run one after the other, on runs of the names that they have
    there, in fewer steps."""
    monkeypatch.syspath_prepend(ROOT)
    fewer_digits(monkeypatch, 100)
    flags = ["--steps", 2, "--save-every", 1, "--log-every", 1]
    train("cgan", "runs/cgan-digits", *flags)
    train("stylegan2", "runs/stylegan2-digits", *flags)
    page = ROOT / "docs" / "python.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
        block = block.replace("range(300)", "range(3)")
        exec(compile(block, page.name, "exec"), names)
    assert Image.open("walk.png").size[0] > 100
    assert Image.open("mixed.png").size == (9 * 18 + 2, 9 * 18 + 2)
    assert Image.open("thicker.png").size == (9 * 18 + 2, 2 * 18 + 2)
    assert Image.open("found.png").size == (2 * 18 + 2, 18 + 2)
    assert Image.open("run.gif").n_frames == 3


def test_the_notebook(monkeypatch):
    """The cells of docs/tour.ipynb run one after the other, with fewer steps, without Jupyter."""
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    matplotlib.use("Agg")
    fewer_digits(monkeypatch, 100)
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    names = {"display": shown.append}

    file = ROOT / "docs" / "tour.ipynb"
    cells = json.loads(file.read_text("utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"]).replace('"900"', '"20"').replace('"100"', '"4"')
        source = source.replace("from IPython.display import display", "")
        source = re.sub(r"(?m)^( *)!.*", r"\1pass", source)  # Jupyter's shell commands
        exec(compile(source, file.name, "exec"), names)
    assert Path("runs/tour/samples/000020.png").exists()
    assert len(shown) == 7

    # The saved notebook shows these seven, too.
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("data" in output for output in outputs) == 7 and file.stat().st_size < 2**20


def with_joined_lines(file):
    """The text of a file; a line that ends with a backslash is joined to the next one."""
    return re.sub(r" \\\n +", " ", file.read_text("utf-8"))


def test_commands_have_flags_that_exist(monkeypatch):
    """Every `python <script>.py ...` in README, docs and docstrings is a command that parses."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += [ROOT / f"{name}.py" for name in SCRIPTS]
    parsers = {**SCRIPTS, "eight_gaussians": eight_gaussians}
    # A run to continue or to draw from is not here.
    monkeypatch.setattr(runs, "parse_with_run", lambda p, argv, args: args)
    commands = set()
    for page in pages:
        commands |= set(re.findall(r"python (\w+)\.py ([^`\n|]*)", with_joined_lines(page)))
    parsed = 0
    for name, flags in commands:
        argv = flags.split()
        if name in parsers and "--help" not in argv:
            parsers[name].parse_args(argv)
            parsed += 1
    assert parsed > 15


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_of_the_docstring_is_scored_in_docs(name):
    """It stands below "scored in docs/<page>:", and word for word on that page."""
    text = with_joined_lines(ROOT / f"{name}.py")
    page, command = re.search(r"scored in (docs/\S+\.md):\n\n +(python .*)\n", text).groups()
    assert re.search(re.escape(command) + r"\b", (ROOT / page).read_text("utf-8"))


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    headings = [re.sub(r"[^\w\- ]", "", heading) for heading in re.findall(r"(?m)^#+ (.*)", text)]
    return {heading.lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if not link.startswith("http"):
                file, _, anchor = link.partition("#")
                target = page.parent / file if file else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_script_has_its_row():
    readme = (ROOT / "README.md").read_text("utf-8")
    for name in (*SCRIPTS, "eight_gaussians"):
        assert f"| [{name}.py]({name}.py) |" in readme
