"""The notebook for SageMaker: it is valid, its cells compile, it starts the job it says. To run it needs AWS."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.options import parse
from launch.sagemaker import launch

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "sagemaker" / "gsm8k.ipynb"


def test_the_notebook_is_one_and_its_cells_compile():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6 and not any(cell["outputs"] for cell in cells)
    sources = ["".join(cell["source"]) for cell in cells]
    for source in sources:
        source = "\n".join(line for line in source.splitlines() if not line.startswith("!"))
        compile(source, str(NOTEBOOK), "exec")
    start = next(source for source in sources if source.startswith("from launch.sagemaker"))
    calls = []
    text = start.replace("from launch.sagemaker import launch\n", "")
    names = {
        "launch": SimpleNamespace(main=calls.append),
        "ROLE": "r",
        "BUCKET": "b",
        "REGION": "us-east-1",
        "RUN": "x",
    }
    exec(text, names)
    ((*ours, dry_run, dashes, _, _),) = calls
    job = parse(launch.Job, ours, "launch.py")
    assert (dry_run, dashes, job.spot, job.data) == ("--dry_run", "--", True, "s3://b/gsm8k")
    nbformat = pytest.importorskip("nbformat", reason="only it knows whether the notebook is valid")
    nbformat.validate(nbformat.read(NOTEBOOK, 4))
