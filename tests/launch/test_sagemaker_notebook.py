"""The notebook for SageMaker: it is valid, its cells compile, it starts the job it says, and it runs from start to end.

There is no AWS: moto takes the requests and keeps the files. It says Completed at once, so a cell of ours runs the job
that was sent, in a container without a GPU. The data are ours in the form of GSM8K, and the model is that of the demo.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
from grpo.options import parse
from launch.sagemaker import launch
from tests.fakes import runs, sagemaker

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


# Cells of ours: before the first one, and after the one that starts the job.
BEFORE = """
import datasets
from tests.fakes import sagemaker

cloud = sagemaker.cloud()
_, requests = cloud.__enter__()
splits = {{split: datasets.Dataset.from_json("{place}/" + split + ".jsonl") for split in ("train", "test")}}
datasets.load_dataset = lambda *_: splits
"""
AFTER_START = """
(request,) = requests
container = sagemaker.Container(Path("{place}", "job"), request, s3)
assert container.start().wait() == 0, container.log
container.collect()
"""
OTHER_RUN = """theirs += ["--model", "embedded", "--num_shots", "0", "--max_new_tokens", "96", "--eval_every", "0"]
theirs += ["--num_steps", "12", "--prompts_per_step", "16", "--learning_rate", "2e-4", "--kl_coef", "0.01"]
theirs += ["--eval_shots", "0", "--final_eval_limit", "60", "--device", "cpu", "--warmup_steps", "0"]
"""


def write_gsm8k(place: Path) -> None:
    """Problems of the demo as GSM8K writes its own."""
    for split in ("train", "test"):
        rows = [
            {"question": p.info["question"], "answer": f"{p.info['solution']}\n#### {p.answer}"}
            for p in data.load("arithmetic", split)
        ]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch):
    reasons = dict.fromkeys(("nbformat", "nbclient", "ipykernel"), "needs nbclient and ipykernel") | sagemaker.NEEDED
    nbformat, nbclient, *_ = [pytest.importorskip(name, reason=reason) for name, reason in reasons.items()]
    if subprocess.run(sagemaker.APART + ["true"], capture_output=True).returncode:
        pytest.skip("namespaces can not be made here (unshare)")
    repository = tmp_path / "grpo"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "runs", "docs", "shared"))
    write_gsm8k(tmp_path)
    start = "launch.main([*ours, *theirs])"
    changes = {
        "arn:aws:iam::ACCOUNT:role/NAME": sagemaker.ROLE,
        '"BUCKET"': f'"{sagemaker.BUCKET}"',
        start: OTHER_RUN + start,
        "--model Qwen/Qwen2.5-0.5B": "--model embedded",
        "--shots 0,8 --limit 200": "--shots 0 --limit 40",
    }
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [BEFORE.format(place=tmp_path)]
    for source in (cell.source for cell in notebook.cells if cell.cell_type == "code"):
        for before in [before for before in changes if before in source]:
            source = source.replace(before, changes.pop(before))
        cells += [source, AFTER_START.format(place=tmp_path)] if start in source else [source]
    assert not changes
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    monkeypatch.setenv("PYTHONPATH", str(repository))
    here = {"metadata": {"path": str(repository / "launch" / "sagemaker")}}
    nbclient.NotebookClient(notebook, timeout=runs.PATIENCE, kernel_name="python3", resources=here).execute()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs)
    run = repository / "runs" / "gsm8k-sagemaker"
    found = {cell["model"]: cell for cell in json.loads((run / "eval" / "eval.json").read_text())["cells"]}
    assert found["tuned"]["accuracy"] > found["base"]["accuracy"] + 0.2, found
    again = json.loads((run / "again" / "eval.json").read_text())["cells"]
    assert {cell["model"]: cell["n"] for cell in again} == {"base": 40, "tuned": 40}
    assert (run / "report.html").exists() and len(re.findall(r"^(base|tuned) .* 60 ", shown, re.M)) == 2, shown
