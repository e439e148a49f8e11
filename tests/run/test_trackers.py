"""The numbers of each step reach the tracker that is asked for, and a run that goes on goes on there too."""

import math
import sys
from types import ModuleType

import pytest

from grpo.config import Config
from grpo.run.log import Log


def log(directory, config, *steps, done=0) -> None:
    with Log(directory, config, done) as opened:
        for step, metrics in enumerate(steps, done + 1):
            opened.write(step, metrics)


def test_tensorboard_gets_the_numbers_that_there_are(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, Config(tracker="tensorboard"), {"reward/mean": 0.5, "policy/kl": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5)]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tracker is 'tensorboard': .*`pip install 'grpo\[tensorboard\]'`"):
        Log(tmp_path, Config(tracker="tensorboard"), 0)


@pytest.fixture(params=["wandb", "trackio"])
def hosted(request, monkeypatch) -> ModuleType:
    """A package with the calls of both, which remembers them."""
    module = ModuleType(request.param)
    module.calls = []
    module.init = lambda **options: module.calls.append(("init", options))
    module.log = lambda numbers, step: module.calls.append((step, numbers))
    module.finish = lambda: module.calls.append("finish")
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_hosted_tracker_gets_config_and_numbers_and_goes_on_after_a_resume(tmp_path, hosted):
    config = Config(tracker=hosted.__name__, run_name="mine")
    log(tmp_path, config, {"reward/mean": 0.5, "policy/kl": math.nan}, {"reward/mean": 0.25})
    log(tmp_path, config, {"reward/mean": 1.0}, done=2)
    (_, first), *steps, end, (_, second), last, _ = hosted.calls
    assert steps == [(1, {"reward/mean": 0.5}), (2, {"reward/mean": 0.25})] and last == (3, {"reward/mean": 1.0})
    assert end == "finish" and hosted.calls[-1] == "finish"
    assert (first["project"], first["name"], first["config"]["tracker"]) == ("grpo", "mine", hosted.__name__)
    assert (first["resume"], second["resume"]) == ("never", "allow") and first.get("id") == second.get("id")
    log(tmp_path, config)
    _, again = hosted.calls[-2]
    assert again["resume"] == "never" and (hosted.__name__ == "trackio" or again["id"] != first["id"])


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path, hosted):
    def init(**_):
        raise RuntimeError("no login\nhere")

    hosted.init = init
    said = rf"^tracker is '{hosted.__name__}': it does not start \(RuntimeError: no login here\)$"
    with pytest.raises(ValueError, match=said):
        Log(tmp_path, Config(tracker=hosted.__name__), 0)


def test_the_earlier_name_of_the_option_is_explained(tmp_path):
    from grpo.config import from_yaml

    (tmp_path / "recipe.yaml").write_text("tensorboard: false\n")
    with pytest.raises(ValueError, match=r"^tensorboard in .*recipe\.yaml is not an option; it is now tracker$"):
        from_yaml(tmp_path / "recipe.yaml")
