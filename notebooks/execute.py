"""Execute the notebooks in place: ``python notebooks/execute.py``, or with the names of some of them."""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).resolve().parent


def execute(path: Path, directory: Path, *, timeout: int = 300) -> NotebookNode:
    """Run a notebook top to bottom in a fresh kernel and return it with its outputs; the file stays as it is.

    Args:
        path: The notebook.
        directory: The kernel's working directory.
        timeout: Seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # One thread: for models this small a second one costs more than it brings.
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    search = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # a local kernel's transport is nothing to warn about
        record_timing=False,
    )
    client.execute(env=os.environ | settings | {"PYTHONPATH": search})
    # What the kernel says of itself would change with every machine.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def shrink_images(notebook: NotebookNode) -> None:
    """Reduce each picture to a palette of 128 colours, a third of the bytes for what a chart needs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                small = io.BytesIO()
                image.quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
                data["image/png"] = base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for notebook in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as directory:
            executed = execute(notebook, Path(directory))
        shrink_images(executed)
        nbformat.write(executed, notebook)
        print(f"executed {notebook.name}: {notebook.stat().st_size / 1024:.0f} KB")
