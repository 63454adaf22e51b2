"""The notebooks run from start to end, and what is saved in them is the output of such a run."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_every_assertion_in_it_holds(path):
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_saved_after_one_run_with_pictures_and_assertions_and_without_paths_of_a_machine(path):
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all("assert" in c.source for c in cells[1:] if "class Toy" not in c.source)  # all but imports and the toy
    outputs = [o for c in cells for o in c.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    printed = " ".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"(?<![\w.])/(?:[\w.-]+/)+", printed), "an absolute path"
