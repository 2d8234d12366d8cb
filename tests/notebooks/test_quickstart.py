"""The notebook runs from its first cell to its last on a small run, and its two files say the same."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.experiments.tiny import ENVIRONMENT, tiny_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def execute(devices: int) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, 4)
    env = os.environ | ENVIRONMENT
    env |= {
        "SCANROUTE_RUN": str(tiny_run()),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    client = NotebookClient(notebook, timeout=240, kernel_name="python3")
    return client.execute(cwd=str(NOTEBOOK.parent), env=env)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_notebook_runs_on_any_number_of_devices(devices):
    """The run was trained on two."""
    outputs = [output for cell in execute(devices).cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert f"on {devices} x cpu" in printed
    assert "parameters after 20 steps" in printed
    assert "def main(" in printed and "largest difference" in printed
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2, "loss and expert load"
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_the_pair_is_in_step_and_holds_no_output():
    """`jupytext --sync notebooks/quickstart.ipynb` brings them together; outputs stay out of git."""
    notebook, script = nbformat.read(NOTEBOOK, 4), jupytext.read(NOTEBOOK.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
