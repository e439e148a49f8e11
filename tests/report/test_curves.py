"""Which curves there are, what seeds make of them, and the PNG files."""

from grpo.metrics import METRIC_NAMES
from grpo.report.curves import draw, mean_and_band, panels_of


def test_one_run_is_its_own_mean():
    steps, metrics = mean_and_band([[{"step": 1, "a": 0.123456789}, {"step": 2, "a": None}]])
    assert steps == [1, 2]
    assert metrics == {"a": {"mean": [0.123457, None]}}


def test_seeds_become_mean_and_extremes_where_all_have_a_value():
    one = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 3.0}]
    two = [{"step": 1, "a": 3.0}, {"step": 2, "a": None}]  # a seed that has not come so far
    steps, metrics = mean_and_band([one, two])
    assert steps == [1, 2]
    assert metrics["a"] == {"mean": [2.0, None], "low": [1.0, None], "high": [3.0, None]}


def test_every_logged_metric_but_two_has_a_panel():
    names = ["reward/x.y" if name == "reward/<term>" else name for name in METRIC_NAMES if name != "step"]
    _, metrics = mean_and_band([[{"step": 1, **dict.fromkeys(names, 1.0), "eval/accuracy": 0.5}]])
    shown = {panel["metric"]: panel["title"] for panel in panels_of([metrics])}
    assert set(names) - set(shown) == {"tokens/computed"}
    assert "eval/accuracy" in shown and shown["reward/x.y"] == "x.y"


def test_a_metric_without_any_value_has_no_panel():
    _, metrics = mean_and_band([[{"step": 1, "policy/kl": None, "policy/entropy": 1.0}]])
    assert [panel["metric"] for panel in panels_of([metrics])] == ["policy/entropy"]


def test_draw_writes_one_picture_per_group(tmp_path):
    runs = [
        [{"step": s, "reward/mean": s + r, "optim/loss": None if s == 2 else 0.1} for s in (1, 2, 3)] for r in (0, 1)
    ]
    series = []
    for name, group in (("seeds", runs), ("alone", runs[:1])):
        steps, metrics = mean_and_band(group)
        series.append({"name": name, "steps": steps, "metrics": metrics})
    series.append({"name": "not begun", "steps": [], "metrics": {}})
    draw(panels_of([one["metrics"] for one in series]), series, tmp_path / "curves")
    files = sorted((tmp_path / "curves").iterdir())
    assert [file.name for file in files] == ["optimiser.png", "rewards.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
