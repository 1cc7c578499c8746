"""The notebook docs/tour.ipynb, run from its first cell to its last with fewer steps."""

import os

import pytest
from helpers import ROOT

nbclient = pytest.importorskip(
    "nbclient", reason="needs nbclient: pip install nbclient ipykernel matplotlib"
)
pytest.importorskip(
    "ipykernel", reason="needs ipykernel: pip install nbclient ipykernel matplotlib"
)
pytest.importorskip(
    "matplotlib", reason="needs matplotlib: pip install nbclient ipykernel matplotlib"
)


def test_every_cell_runs(tmp_path, monkeypatch):
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert len(kept) > 8 and (ROOT / "docs" / "tour.ipynb").stat().st_size < 2**20

    # Its kernel works in an empty folder, and finds the scripts by their path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for cell in notebook.cells:
        cell.source = cell.source.replace('"900"', '"20"').replace('"100"', '"4"')
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
    assert (tmp_path / "runs" / "tour" / "samples" / "000020.png").exists()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    assert len(pictures) == 7
