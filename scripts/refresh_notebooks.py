"""Runs the committed notebooks at their defaults and writes them back without timestamps or widget state.

A cell tagged `nbval-ignore-output` shows what a machine measured: it keeps its stored output, so that a refresh leaves
the files byte-identical, until --redraw stores a new one and draws figures/ anew. Of a widget, which lives only in its
kernel, the picture or table stays that it shows at first.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
MEASURED = "nbval-ignore-output"
KEPT = ("tags", "jupyter")  # of a cell's metadata: the second says that Lab folds its source
WIDGET = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path, redraw: bool) -> bool:
    """Runs one notebook and writes it back; returns whether its bytes changed."""
    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)
    stored = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {name: cell.metadata[name] for name in KEPT if cell.metadata.get(name)}
        if cell.cell_type == "code" and MEASURED in cell.metadata.get("tags", []) and stored[cell.id] and not redraw:
            cell.outputs = stored[cell.id]
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return path.read_bytes() != before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all in notebooks/")
    parser.add_argument("--redraw", action="store_true", help="also store measured outputs anew, and draw figures/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for path in options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
            # Records of a refresh belong to nobody's study; figures are the committed ones only with --redraw.
            os.environ["ATTENTION_STUDY_OUT"] = scratch
            if options.redraw and path.stem != "train":
                del os.environ["ATTENTION_STUDY_OUT"]
            print(f"{path.name}: {'changed' if refresh(path.resolve(), options.redraw) else 'as it was'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
