"""The page: what it holds, that nothing a model wrote can act in it, and that it works in a browser.

Run directories are written here, as `train.py` leaves them; no model runs.
"""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from grpo.evaluation import headline
from grpo.report import page as report
from grpo.report.__main__ import main
from tests.fakes import browser

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>&lt;b\u2028\ud800 {{data}}"
NO_BROWSER = "no Chromium found (one of: " + ", ".join(browser.NAMES) + ")"
needs_browser = pytest.mark.skipif(browser.find() is None, reason=NO_BROWSER)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """matplotlib is slow and has its own test; `test_a_run_becomes_one_page_and_pictures` undoes this."""
    monkeypatch.setattr(report.curves, "draw", lambda panels, series, directory: directory.mkdir(exist_ok=True))


def metrics_line(step: int, seed: int) -> dict:
    line = {"step": step, "reward/mean": 0.1 * step + 0.01 * seed, "reward/gsm8k.format": 0.05 * step}
    line |= {"reward/flat_groups": 0.5, "policy/kl": None if step == 1 else 0.001 * step, "policy/clip_fraction": 0.0}
    return line | {"completion/length": 20.0 - step, "time/step": 1.5, "tokens/sampled": 100}


def group(prompt: int, text: str) -> dict:
    shared = {"prompt_index": prompt, "question": f"How many? {text}", "answer": "1,080"}
    shared["prompt"] = f"A worked example.\n\nQuestion: How many? {text}\nSolution:"
    return shared | {"completions": [completion(sample, text) for sample in (0, 1, 2)]}


def completion(sample: int, text: str) -> dict:
    tokens = [f" word{i}" for i in range(4)] + ["\n", text, "\n\nQuestion:"]
    return {
        "sample": sample,
        "completion": "".join(tokens[:-1]),
        "rewards": {"gsm8k.format": 1.0, "gsm8k.correctness": None if sample == 2 else float(sample)},
        "reward": None if sample == 2 else 1.0 + sample,
        "advantage": (-1.0, 1.0, 0.0)[sample],
        "finished": sample != 1,
        "tokens": tokens,
        "logprobs": [-0.1, -0.2, -0.3, -0.4, -0.5, -3.0, -0.0],
    }


def graded() -> dict:
    base, tuned = (
        {"correct": 20, "accuracy": 0.2, "ci95": [0.13, 0.29]},
        {"correct": 60, "accuracy": 0.6, "ci95": [0.5, 0.69]},
    )
    keys = [(stop, grader) for stop in ("stop_string", "eos") for grader in ("last_number", "published")]
    more = {"shots": 0, "n": 100, "format_rate": 0.9, "finished": 0.8, "run_on": 0.1, "mean_tokens": 50.0}
    more |= {"lenient_accuracy": None, "lenient_ci95": None}
    rates = (("base", base), ("tuned", tuned))
    pair = {"shots": 0, "n": 100, "difference": 0.4, "ci95": [0.3, 0.5], "p_value": 1e-6}
    parts = {"total": 0.45, "stopping": 0.1, "grader": -0.05, "left": 0.4}
    return {
        "cells": [{"model": m, "stop": s, "grader": g, **rate, **more} for m, rate in rates for s, g in keys],
        "paired": [{"stop": stop, "grader": grader, **pair} for stop, grader in keys],
        "split": [{"shots": 0, **parts, "ci95": {name: [value - 0.1, value + 0.1] for name, value in parts.items()}}],
        "format": [],
    }


def make_run(
    path: Path, *, seed: int = 0, steps: int = 3, evaluation: dict | None = None, text: str = "fine", **options
) -> Path:
    (path / "rollouts").mkdir(parents=True)
    config = {"run_name": path.name, "seed": seed, "model": "embedded", "data": "arithmetic", "num_shots": 0}
    config |= {"prompts_per_step": 2, "group_size": 3, "learning_rate": 2e-4, "clip_high": float("inf")} | options
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(json.dumps({"commit": "abc", "command": ["train.py", text]}))
    lines = [json.dumps(metrics_line(step, seed)) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for step in range(1, steps + 1):
        lines = [json.dumps(group(prompt, text)) + "\n" for prompt in (0, 1)]
        (path / "rollouts" / f"step_{step:06d}.jsonl").write_text("".join(lines))
    if evaluation:
        (path / "eval").mkdir()
        (path / "eval" / "eval.json").write_text(json.dumps(evaluation))
    return path


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_a_run_becomes_one_page_and_pictures(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = make_run(tmp_path / "one", evaluation=graded())
    out = report.write_report([run])
    assert out == run / "report.html"
    data = data_of(out)
    assert data["evaluations"][0]["claim"] == headline.claim(graded()["paired"][0])
    facts = {label: (value, note) for label, value, note in data["series"][0]["facts"]}
    assert facts["Accuracy, base to tuned"][0] == "20.0 \u2192 60.0 %"
    assert facts["Gain"] == ("+40.0 points", "95 % interval +30.0 to +50.0")
    value, note = facts["Published gain"]
    assert value == "+45.0 points"
    assert note.endswith("+10.0 learning to stop, \u22125.0 grader's errors, +40.0 better answers")
    assert facts["Training reward"][0] == "0.10 \u2192 0.30"
    assert facts["Steps"] == ("3", "4 s, 300 tokens sampled")
    assert {file.name for file in (run / "curves").iterdir()} >= {"rewards.png", "policy.png", "completions.png"}
    changed = {row["name"] for row in data["options"] if row["changed"]}
    assert "prompts_per_step" in changed and "learning_rate" not in changed


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    page = report.write_report([make_run(tmp_path / "one")]).read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!#)[^\s"'>]+|@import|url\(""", page) == []
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_richest_evaluation_is_taken(tmp_path):
    simple = graded() | {"cells": graded()["cells"][:1], "paired": [], "split": []}
    run = make_run(tmp_path / "one", evaluation=simple)
    assert report.read_run(run).evaluation == simple
    (run / "eval_full").mkdir()
    (run / "eval_full" / "eval.json").write_text(json.dumps(graded()))
    assert report.read_run(run).evaluation == graded()


def test_c70_claim_and_facts_go_by_the_grader_of_the_run(tmp_path):
    """The kind is that of tests/evaluation/test_headline.py: the page must not contradict the table."""
    own = graded()
    for entry in (*own["cells"], *own["paired"]):
        entry["grader"] = {"published": "my.reward"}.get(entry["grader"], entry["grader"])
    for entry in own["paired"]:
        if entry["grader"] == "last_number":
            entry.update(difference=0.0, ci95=[-0.03, 0.03], p_value=1.0)
    run = make_run(tmp_path / "one", evaluation=own | {"split": []}, eval_correct="my.reward")
    (run / "eval_full").mkdir()
    (run / "eval_full" / "eval.json").write_text(json.dumps(graded()))
    data = data_of(report.write_report([run]))
    assert data["evaluations"][0]["claim"].startswith("The tuned model is better (grader my.reward, stop stop_string")
    facts = {label: (value, note) for label, value, note in data["series"][0]["facts"]}
    assert facts["Gain"] == ("+40.0 points", "95 % interval +30.0 to +50.0")
    assert facts["Accuracy, base to tuned"][1].startswith("grader my.reward")


def test_hostile_text_stays_a_string(tmp_path):
    run = make_run(tmp_path / "one", text=HOSTILE)
    out = report.write_report([run])
    assert out.read_text().count("<script") == 2 and "onerror" not in out.read_text().split('id="data">')[0]
    assert not set("<>&") & set(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1])
    assert data_of(out)["rollouts"][0]["steps"][0]["groups"][0]["rows"][0]["tokens"][5] == HOSTILE


def test_runs_that_differ_in_the_seed_are_one_series_with_a_band(tmp_path):
    runs = [make_run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 2)] + [
        make_run(tmp_path / "b", learning_rate=0.1)
    ]
    out = report.write_report(runs)
    assert out == tmp_path / "report.html"
    data = data_of(out)
    assert [series["name"] for series in data["series"]] == ["learning_rate 0.0002 (seeds 0, 2)", "b"]
    curve = data["series"][0]["metrics"]["reward/mean"]
    assert (curve["mean"], curve["low"], curve["high"]) == ([0.11, 0.21, 0.31], [0.1, 0.2, 0.3], [0.12, 0.22, 0.32])
    assert {row["name"] for row in data["options"] if row["differs"]} == {"seed", "learning_rate"}


def test_large_rollouts_are_thinned_and_the_page_says_so(tmp_path, monkeypatch):
    run = make_run(tmp_path / "one", steps=20)
    size = (run / "rollouts" / "step_000001.jsonl").stat().st_size
    assert [step["step"] for step in data_of(report.write_report([run]))["rollouts"][0]["steps"]] == list(range(1, 21))
    monkeypatch.setattr(report, "ROLLOUT_BYTES", 4 * size)  # eight steps of half their prompts
    found = data_of(report.write_report([run]))["rollouts"][0]
    assert [step["step"] for step in found["steps"]][:: report.FEWEST_STEPS - 1] == [1, 20]
    assert len(found["steps"]) == report.FEWEST_STEPS
    assert [(len(step["groups"]), step["prompts"]) for step in found["steps"]] == [(1, 2)] * report.FEWEST_STEPS
    assert all(len(step["groups"][0]["rows"]) == 3 for step in found["steps"])
    assert all(step["groups"][0]["prompt"].startswith("A worked example.") for step in found["steps"])
    assert found["left_out"] == "8 of 20 steps, at least the first 1 prompts of each"


def test_rollouts_of_earlier_versions_with_a_line_for_each_completion_are_read(tmp_path):
    run = make_run(tmp_path / "one")
    now = data_of(report.write_report([run]))["rollouts"]
    for file in (run / "rollouts").iterdir():
        groups = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [line | row for line in groups for row in line.pop("completions")]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data_of(report.write_report([run]))["rollouts"] == now and now


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path):
    run = make_run(tmp_path / "one", steps=0)
    assert data_of(report.write_report([run]))["rollouts"] == []
    (run / "metrics.jsonl").write_text('{"step": 1, "optim/loss": 1e999, "optim/lr": NaN}\n{"step": 2, "rew')
    assert report.read_run(run).metrics == [{"step": 1, "optim/loss": None, "optim/lr": None}]
    assert main([str(run)]) == 0


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_another_directory_is_an_error(tmp_path, capsys, missing):
    run = make_run(tmp_path / "one")
    (run / missing).unlink()
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"report: error: {run} is not a run directory: it has no {missing}\n"


ROLLOUTS = "rollouts/step_000002.jsonl"
WRONG = [  # (file, content, what is said of it)
    ("metrics.jsonl", '{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n', ", line 2: not JSON"),
    ("metrics.jsonl", '{"reward/mean": 1}\n', ", line 1: lacks 'step'"),
    ("metrics.jsonl", '{"step": 1, "time/step": "x"}\n', ", line 1: time/step is 'x': must be of type int | float"),
    ("metrics.jsonl", "\xff\n", ", line 1: not JSON"),
    ("eval/eval.json", '{"cells": [', ": not JSON"),
    ("eval/eval.json", "{}", ": lacks 'cells'"),
    ("eval/eval.json", json.dumps(graded() | {"paired": "x"}), ": paired is 'x': must be of type list"),
    ("eval/eval.json", json.dumps(graded() | {"cells": [1]}), " does not hold what this version writes"),
    ("eval/eval.json", json.dumps(graded() | {"split": [{"shots": 0}]}), " does not hold what this version writes"),
    (ROLLOUTS, '{"prompt_ind', ", line 1: not JSON"),
    (ROLLOUTS, "{}\n", ", line 1: lacks 'question'"),
    (ROLLOUTS, json.dumps(group(0, "x") | {"completions": 3}) + "\n", ", line 1: completions is 3"),
    (ROLLOUTS, json.dumps(group(0, "x") | {"completions": [{"completion": 3}]}), ", line 1: completion is 3"),
    ("config.yaml", "a: [1", " is not YAML"),
    ("config.yaml", "", " must hold `name: value` lines"),
    ("config.yaml", "1: 2\n", " must hold `name: value` lines"),
    ("config.yaml", "\xff", " is not YAML"),
    ("environment.json", "null", ": must be a JSON object, not None"),
    ("environment.json", '{"earlier": 3}', " does not hold what a run writes"),
]


@pytest.mark.parametrize(("file", "content", "said"), WRONG)
def test_a_damaged_file_is_one_sentence_that_names_it(tmp_path, capsys, file, content, said):
    run = make_run(tmp_path / "one", evaluation=graded())
    (run / file).write_text(content, encoding="latin-1")
    assert main([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"report: error: {run / file}{said}") and err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_the_command_line_says_where_the_page_is(tmp_path, capsys):
    out = tmp_path / "pages" / "x.html"
    assert main([str(make_run(tmp_path / "one")), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and out.exists() and (out.parent / "curves").is_dir()


def test_a_page_that_is_watched_is_written_again_when_a_step_is_added(tmp_path, monkeypatch):
    run, waits = make_run(tmp_path / "one"), []
    page = run / "report.html"

    def sleep(seconds):
        waits.append((seconds, page.exists()))
        page.unlink(missing_ok=True)
        if len(waits) == 2:
            file = run / "metrics.jsonl"
            os.utime(file, (1, 1))
        elif len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(main.__globals__["time"], "sleep", sleep)
    assert main([str(run), "--watch", "3"]) == 0
    assert waits == [(3, True), (3, False), (3, True)]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_browser
def test_the_reader_answers_to_mouse_and_keyboard(tab, tmp_path):
    tab.show()
    tab.open(report.write_report([make_run(tmp_path / "one", evaluation=graded(), text=HOSTILE)]))
    headings = tab.js("[...document.querySelectorAll('h2')].map((node) => node.textContent)")
    assert headings == ["Result", "Curves", "Evaluation", "Where the gain comes from", "Rollouts", "Configuration"]
    shown = "document.querySelector('#rollouts h3').textContent"
    cards = "[...document.querySelectorAll('.card')].map((card) => Number(card.dataset.sample))"
    assert (tab.js(shown), tab.js(cards)) == ("step 1, prompt 1", [0, 1, 2])
    tab.js("document.getElementById('step-next').click()")
    tab.js("document.getElementById('prompt').focus()")
    tab.key("ArrowDown", 40)
    assert tab.js(shown) == "step 2, prompt 2"
    tab.js("document.querySelector('input[value=reward]').click()")
    assert tab.js(cards) == [1, 0, 2]  # the invalid one last
    ends = tab.js("[...document.querySelectorAll('.card .end')].map((node) => node.textContent)")
    assert ends == ["cut off at 7 tokens", "stopped after 7 tokens", "stopped after 7 tokens"]
    shades = "[...document.querySelectorAll('[data-sample=\"0\"] .tok')].map((t) => t.style.getPropertyValue('--p'))"
    assert tab.js(shades)[4:6] == ["9%", "51%"]
    tab.js("document.querySelector('input[value=advantage]').click()")
    assert tab.js(shades) == ["45%"] * 7
    assert tab.js("document.querySelectorAll('[data-sample=\"0\"] .tok.after').length") == 1  # the stop string
    tab.js('document.querySelector(\'[data-sample="0"] .tok[data-t="3"]\').click()')
    said = tab.js("document.querySelector('.status').value")
    assert said == "Token 4 of 7, \u201c word3\u201d: log-probability \u22120.40, probability 0.67"
    assert tab.js("[window.hacked, document.querySelectorAll('main img, main b:not(.chart b)').length]") == [None, 0]
    assert tab.errors == []


def test_a_run_that_was_resumed_says_on_what_it_ran_in_turn(tmp_path):
    run = make_run(tmp_path / "one")
    starts = {"commit": "b", "threads": 2, "earlier": [{"commit": "a", "threads": 2}, {"commit": "a", "threads": 1}]}
    (run / "environment.json").write_text(json.dumps(starts))
    assert report.read_run(run).environment == {"commit": "a, then b", "threads": "2, then 1"}


@needs_browser
def test_a_gain_in_colour_is_one_that_can_be_claimed(tab, tmp_path):
    found = graded()
    found["paired"][1]["p_value"] = 0.07
    tab.show()
    tab.open(report.write_report([make_run(tmp_path / "one", evaluation=found)]))
    assert tab.js("[...document.querySelectorAll('td.gain')].map((td) => !!td.querySelector('strong'))") == [
        True, False, True, True
    ]  # fmt: skip
    assert tab.errors == []


@needs_browser
def test_samples_failures_and_a_run_of_its_own_grader(tab, tmp_path):
    found = graded() | {"split": [], "format": [{"shots": 0, "total": 0.4, "format": 0.1, "left": 0.3}]}
    found["format"][0]["ci95"] = dict.fromkeys(("total", "format", "left"), [0.0, 0.5])
    rate = {"value": 0.75, "ci95": [0.5, 1.0]}
    several = {"samples": 2, "pass_at": {"1": rate, "2": rate}, "majority": None}
    found["cells"][0] |= several | {"failures": {"gsm8k.format": {"texts": 3, "first": "it <b>broke</b>"}}}
    tab.show()
    tab.open(report.write_report([make_run(tmp_path / "one", evaluation=found)]))
    text = "document.getElementById('%s').textContent"
    assert "Warning: gsm8k.format failed on 3 of 200 texts" in tab.js(text % "evaluation")
    assert "it <b>broke</b>" in tab.js(text % "evaluation")
    assert "0 base stop_string last_number75.0 50.0 to 100.075.0 50.0 to 100.0\u2013" in tab.js(text % "evaluation")
    assert tab.js("document.querySelector('#gain details').open") and "Published" not in tab.js(text % "gain")
    assert tab.errors == []


@needs_browser
def test_curves_are_read_at_a_step(tab, tmp_path):
    tab.show()
    tab.open(report.write_report([make_run(tmp_path / "one", steps=5)]))
    value = "document.querySelector('.chart .value').textContent"
    assert tab.js(value) == "0.5"
    tab.js("document.getElementById('at').focus()")
    tab.key("ArrowLeft", 37)
    assert (tab.js(value), tab.js("document.querySelector('output').value")) == ("0.4", "step 4")
    label = tab.js("document.querySelector('.chart svg').getAttribute('aria-label')")
    assert label == "Reward by step. one: from 0.1 to 0.5."
    assert "Flat groups 0.5 \u00b7 Clip fraction 0" in tab.js("document.getElementById('curves').textContent")
    assert tab.errors == []


@needs_browser
@pytest.mark.parametrize("runs", [0, 1, 4])
def test_phone_dark_and_print(tab, tmp_path, runs):
    made = [make_run(tmp_path / f"r{i}", seed=i, evaluation=graded(), text="long" * 40) for i in range(runs)]
    made = made or [make_run(tmp_path / "empty", steps=0)]
    tab.show(width=390, height=844, mobile=True)
    tab.open(report.write_report(made, tmp_path / "page.html"))
    assert tab.js("document.documentElement.scrollWidth") == 390  # nothing sticks out but what scrolls by itself
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.js(paper)
    tab.show(scheme="dark")
    assert tab.js(paper) != light
    tab.show(media="print", scheme="dark")
    assert tab.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.js("getComputedStyle(document.body).color") == "rgb(29, 31, 35)"  # dark ink on paper
    tab.show()
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.js("[...document.querySelectorAll('details')].every((node) => node.open)")
    assert tab.errors == []


@needs_browser
def test_everything_that_can_be_set_has_a_name(tab, tmp_path):
    tab.show()
    tab.open(report.write_report([make_run(tmp_path / f"r{i}", num_shots=i) for i in (0, 1)]))
    named = "(node) => node.labels?.length || node.ariaLabel || node.textContent.trim()"
    nameless = tab.js(
        f"[...document.querySelectorAll('input, select, button')].filter((node) => !({named})(node)).length"
    )
    assert nameless == 0
    tab.send("Accessibility.enable")
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") == "image"]
    assert images and all(node["name"]["value"] for node in images)
    assert tab.errors == []
