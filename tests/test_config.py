"""The options of a run: ranges, recipes, what a resumed run may change."""

import ast
import dataclasses
import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grpo import config as module
from grpo.advantages import ADVANTAGES
from grpo.config import Config, check_resumable, from_yaml, parse_args, refuse_auto, to_yaml
from grpo.evaluation.protocol import EvalOptions
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.options import facts_of
from grpo.prompts.source import Source
from grpo.tables import constants, lookup
from grpo.weighting import WEIGHTINGS

RECIPES = Path(__file__).parent.parent / "recipes"
FIELDS = [field.name for field in dataclasses.fields(Config)]


def test_every_field_is_explained_and_help_shows_it(capsys):
    explained = {}
    lines = [line for kind in (Source, Config) for line in ast.parse(inspect.getsource(kind)).body[0].body]
    for field, after in zip(lines, lines[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            explained[field.target.id] = after.value.value
    assert list(explained) == FIELDS
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit_.value.code == 0
    for name, text in explained.items():
        assert f"--{name} " in shown
        assert " ".join(text.split()) in shown, name


ADDED = '''
    memory: float = option(0.5, "> 0 and <= 1"{facts})
    """Share of something that is added here."""
'''


@pytest.mark.parametrize("facts", ["", ", may_change=True"])
def test_a_new_option_is_one_line_and_its_doc(tmp_path, capsys, facts):
    """In a copy of the file: flag, recipe key, range, --help and the rule of a resumed run know it."""
    where = "    clip_low: float"
    (file := tmp_path / "with_another.py").write_text(
        inspect.getsource(module).replace(where, ADDED.format(facts=facts).lstrip("\n") + where)
    )
    spec = importlib.util.spec_from_file_location("with_another", file)
    copy = sys.modules["with_another"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(copy)
        assert copy.parse_args([]).memory == 0.5 and copy.parse_args(["--memory", "1"]).memory == 1.0
        (recipe := tmp_path / "recipe.yaml").write_text("memory: 0.25\n")
        assert copy.parse_args(["--recipe", str(recipe)]) == copy.from_yaml(recipe) == copy.Config(memory=0.25)
        for wrong in (0, 1.5, float("nan"), "much"):
            with pytest.raises(ValueError, match=f"memory is {wrong!r}: must be > 0 and <= 1"):
                copy.Config(memory=wrong)
        resumed = copy.Config(memory=0.25)
        if facts:
            check_resumable(copy.Config(), resumed)
        else:
            with pytest.raises(ValueError, match="memory is 0.25, but the run to resume has 0.5"):
                check_resumable(copy.Config(), resumed)
        with pytest.raises(SystemExit):
            copy.parse_args(["--help"])
        shown = "--memory > 0 and <= 1 Share of something that is added here. (default: 0.5)"
        assert shown in " ".join(capsys.readouterr().out.split())
    finally:
        del sys.modules["with_another"]


def test_the_demo_recipe_says_nothing_but_the_defaults():
    assert from_yaml(RECIPES / "demo.yaml") == Config()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_survives_being_written(path, tmp_path):
    config = parse_args(["--recipe", str(path)])
    to_yaml(config, tmp_path / "config.yaml")
    assert parse_args(["--recipe", str(tmp_path / "config.yaml")]) == config


def test_the_published_recipe():
    config = from_yaml(RECIPES / "gsm8k-qwen2.5-0.5b.yaml")
    assert (config.model, config.data, config.num_shots) == ("Qwen/Qwen2.5-0.5B", "gsm8k", 8)
    assert (config.prompts_per_step, config.group_size) == (32, 8)
    assert (config.max_new_tokens, config.temperature, config.clip_low, config.clip_high) == (256, 1.0, 0.2, 0.2)
    assert (config.kl, config.kl_coef, config.weighting) == ("k3", 0.04, "token_mean")


def test_what_is_auto_follows_the_task_of_the_data_and_what_is_given_stays():
    code = Config(data="code")
    assert (code.rewards, code.reward_weights) == (("code.correctness", "code.compiles"), (1.0, 1.0))
    assert (code.eval_correct, code.eval_format, code.reward_timeout) == ("code.correctness", None, 20.0)
    plain = Config(data="gsm8k")
    assert (plain.rewards, plain.reward_weights) == (("gsm8k.format", "gsm8k.correctness"), (1.0, 1.0))
    assert (plain.eval_correct, plain.eval_format, plain.reward_timeout) == ("gsm8k.correctness", "gsm8k.format", 5.0)
    given = {"rewards": ("gsm8k.format",), "reward_timeout": 3.0, "eval_correct": "a.b", "eval_format": None}
    config = Config(data="code", **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.reward_weights == (1.0,)
    assert Config(rewards=("a.b", "c.d"), reward_weights=(2.0, 3.0)).reward_weights == (2.0, 3.0)


def test_the_task_is_written_into_the_config_of_a_run(tmp_path):
    """So a run means the same when a data file states another task later."""
    config = parse_args(["--data", "code", "--rewards", "auto", "--eval_format", "none"])
    to_yaml(config, tmp_path / "config.yaml")
    assert "auto" not in (tmp_path / "config.yaml").read_text().partition("rewards:")[2].partition("combine")[0]
    assert from_yaml(tmp_path / "config.yaml") == config == Config(data="code")


def test_flags_go_on_top_of_the_recipe():
    config = parse_args(["--recipe", str(RECIPES / "demo.yaml"), "--seed", "3", "--final_eval", "False"])
    assert config == replace(Config(), seed=3, final_eval=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed is -1: must be a whole number >= 0 and < 2**63"),
        ({"seed": 2**63}, "seed is 9223372036854775808: must be a whole number >= 0 and < 2**63"),
        ({"group_size": 0}, "group_size is 0: must be a whole number >= 1"),
        ({"num_steps": 0}, "num_steps is 0: must be a whole number >= 1"),
        ({"num_steps": 3.5}, "num_steps is 3.5: must be a whole number >= 1"),
        ({"num_steps": True}, "num_steps is True: must be a whole number >= 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0: must be a whole number >= 1"),
        ({"chat": "yes"}, "chat is 'yes': must be True or False"),
        ({"model": Path("here")}, "model is PosixPath('here'): must be a text"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4': must be >= 0 and finite"),
        ({"temperature": 0.0}, "temperature is 0.0: must be > 0 and finite"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"reward_timeout": float("inf")}, "reward_timeout is inf: must be auto or > 0 and finite"),
        ({"ddp_timeout": 1e20}, "ddp_timeout is 1e+20: must be > 0 and <= 1e9"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001: must be >= 0"),
        ({"kl_coef": float("nan")}, "kl_coef is nan"),
        ({"eval_threshold": float("nan")}, "eval_threshold is nan: must be None or finite"),
        ({"pool_weights": (0.0, 0.0, 0.0)}, "pool_weights is (0.0, 0.0, 0.0): must be three numbers, not all 0"),
        ({"pool_weights": (1.0, 1.0)}, "pool_weights is (1.0, 1.0): must be three numbers"),
        ({"pool_weights": (1.0, 1.0, -1.0)}, "pool_weights is (1.0, 1.0, -1.0): must be a list, each item >= 0"),
        ({"curriculum": "pass_rate", "eval_correct": "x.y"}, "eval_correct is 'x.y': must be one of rewards ('gsm8k"),
        ({"kl_target": 0.1, "kl_horizon": 25}, "kl_horizon is 25: must be above a fifth of prompts_per_step"),
        ({"entropy_share": 0.0}, "entropy_share is 0.0: must be > 0 and <= 1"),
        ({"clip_low": 1.5}, "clip_low is 1.5: must be >= 0 and <= 1"),
        ({"clip_high": -0.1}, "clip_high is -0.1: must be >= 0"),
        ({"correction_cap": 0.5}, "correction_cap is 0.5: must be >= 1"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0"),
        ({"adam_beta2": -0.1}, "adam_beta2 is -0.1"),
        ({"minibatch_size": 12}, "minibatch_size is 12: must be 0 or a multiple of group_size (8)"),
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch is 0: must be auto or a whole number >= 1"),
        ({"compile": "x"}, "compile is 'x': must be auto or True or False"),
        ({"rewards": ()}, "rewards is ()"),
        ({"rewards": ("a.b", "a.b")}, "none twice"),
        ({"reward_weights": (1.0,)}, "reward_weights is (1.0,): must be one number for each of"),
        (
            {"reward_weights": (1.0, float("nan"))},
            "weights is (1.0, nan): must be auto or a list, each item finite",
        ),
        ({"eval_shots": ()}, "eval_shots is ()"),
        ({"eval_shots": (0, -1)}, "eval_shots is (0, -1)"),
        ({"eval_shots": (0, 0)}, "one or more, none twice"),
        ({"precision": "int8"}, "precision is 'int8': must be one of auto, fp32, bf16, fp16, fp64"),
        ({"device": "tpu"}, "device is 'tpu': must be one of auto, cpu, cuda"),
        ({"schedule": "step"}, "schedule is 'step': must be one of constant, linear, cosine"),
        ({"combine": "sum"}, "combine is 'sum'"),
        ({"resume": "always"}, "resume is 'always'"),
        *(({"run_name": name}, "must be a plain name") for name in ("", "a/b", "..", "../x", "a b", "a\n", "-x")),
    ],
)
def test_a_value_out_of_range_names_option_value_and_what_is_allowed(changes, said):
    with pytest.raises(ValueError) as error:
        Config(**changes)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 1},  # a group of one has advantage 0, but is a run
        {"learning_rate": 0.0, "kl_coef": 0.0, "max_grad_norm": 0.0},
        {"clip_low": 1.0, "clip_high": float("inf")},
        {"minibatch_size": 16},
        {"reward_weights": (-1.0, 0.0)},
        {"eval_shots": (0, 8)},
        {"ddp_timeout": 1e9},
        {"run_name": "lr=1e-5,seed=0"},
    ],
)
def test_values_at_the_border_are_allowed(changes):
    assert all(getattr(Config(**changes), name) == value for name, value in changes.items())


def test_an_error_of_the_command_line_is_a_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--temperature", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "train.py: error: temperature is 0.0: must be > 0 and finite\n"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_named_like_its_file(recipe):
    config = from_yaml(recipe)
    assert config.run_name == recipe.stem
    lookup(LOSSES, config.loss, "loss"), lookup(ADVANTAGES, config.advantage, "advantage")
    lookup(WEIGHTINGS, config.weighting, "weighting"), lookup(KL, config.kl, "kl")


def another(name: str):
    """A valid value of the field that is not the default's."""
    value = getattr(Config(), name)
    special = {
        "device": "cpu", "precision": "fp32", "resume": "auto", "combine": "advantages", "schedule": "linear",
        "revision": "v1", "data_path": "d", "rewards": ("gsm8k.correctness", "gsm8k.format"),
        "reward_weights": (2.0, 1.0), "clip_low": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.5,
        "ratio_max": 3.0, "tv_max": 0.5, "kl_in": "reward", "ratio_to": "sampler", "correction_floor": 0.1,
        "max_tokens_per_microbatch": 7, "compile": True, "eval_shots": (3,), "minibatch_size": 8, "eval_threshold": 0.5,
        "final_dtype": "base", "flat_groups": "drop", "kl_stop": 0.1, "optimizer": "sgd",
        "muon_momentum": 0.5, "tracker": "wandb", "sgd_momentum": 0.5, "reference_mix": 0.5,
        "curriculum": "pass_rate", "pool_weights": (0.0, 1.0, 0.5), "entropy_step": 0.1, "entropy_share": 0.2,
        "lora_targets": ("q_proj",), "shard": "full",
    }  # fmt: skip
    if name in special:
        return special[name]
    if value is None:
        return "x"
    return not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_either_fixed_or_free_when_resuming(name):
    changed = replace(Config(), **{name: another(name)})
    if name in facts_of(Config, "may_change"):
        check_resumable(Config(), changed)
    else:
        with pytest.raises(ValueError, match=f"^{name} is .*, but the run to resume has .*: must be the same"):
            check_resumable(Config(), changed)


def test_what_decides_the_updates_is_fixed_when_resuming():
    fixed = set(FIELDS) - set(facts_of(Config, "may_change"))
    assert {"seed", "precision", "model", "data", "loss", "learning_rate", "schedule", "group_size", "rewards"} <= fixed


def test_what_is_right_is_fixed_when_it_decides_what_is_drawn():
    saved = Config(curriculum="pass_rate")
    check_resumable(saved, replace(saved, num_steps=60))
    for change in ({"eval_correct": "gsm8k.format"}, {"eval_threshold": 0.5}):
        check_resumable(Config(), replace(Config(), **change))
        with pytest.raises(ValueError, match=f"^{next(iter(change))} is .*: must be the same"):
            check_resumable(saved, replace(saved, **change))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_stretches_to_num_steps_fixes_it(schedule):
    saved = Config(schedule=schedule)
    check_resumable(saved, replace(saved, resume="auto"))
    with pytest.raises(ValueError, match="num_steps is 60, but the run to resume has 30"):
        check_resumable(saved, replace(saved, num_steps=60))
    check_resumable(Config(), replace(Config(), num_steps=60))


def test_c54_an_auto_that_was_not_settled_is_named():
    values = {"device": "cpu", "precision": "fp32", "compile": False, "max_tokens_per_microbatch": 9}
    refuse_auto(Config(**values, resume="auto"))  # which says what it means by itself
    for name in values:
        with pytest.raises(ValueError, match=f"^{name} is 'auto': must have a value by now"):
            refuse_auto(Config(**values | {name: "auto"}))


def test_lookup_names_what_is_known():
    table = {"grpo": 1, "dr_grpo": 2, "rloo": 3}
    assert lookup(table, "rloo", "advantage") == 3
    with pytest.raises(ValueError, match="^advantage is 'rlo': must be one of grpo, dr_grpo, rloo; did you mean rloo"):
        lookup(table, "rlo", "advantage")


def test_constants_of_a_loss_are_the_options_of_their_names():
    def loss(logprobs, *, clip_low, clip_high=9.0):
        """Its default is not used."""

    assert constants(loss, Config(clip_low=0.5, clip_high=0.3)) == {"clip_low": 0.5, "clip_high": 0.3}


def test_a_constant_without_an_option_names_loss_constant_and_what_to_do():
    def sapo(logprobs, *, clip_low, clip_hi=1.05):
        """Its default must not be used in silence."""

    def positional(logprobs, old_logprobs, advantages, mask, clip_hi=1.05):
        """Nor this one."""

    with pytest.raises(ValueError, match="^loss positional has the constant clip_hi, but no option has that name"):
        constants(positional, Config())
    with pytest.raises(ValueError) as error:
        constants(sapo, Config())
    assert str(error.value) == (
        "loss sapo has the constant clip_hi, but no option has that name: "
        "add the field clip_hi to Config in grpo/config.py; did you mean clip_high?"
    )


def test_c54_one_text_is_not_a_list_of_names():
    """The kind: a text where a list of texts is meant, taken letter by letter."""
    with pytest.raises(ValueError, match="rewards is 'gsm8k.format': must be a tuple of names, not one text"):
        Config(rewards="gsm8k.format", reward_weights=(1.0,))
    with pytest.raises(ValueError, match="graders is 'marker': must be a tuple of names, not one text"):
        EvalOptions(model="embedded", graders="marker")


def test_files_of_data_and_rewards_may_lie_elsewhere_when_a_run_goes_on():
    began = Config(data="a/task.py", rewards=("a/own.py:short", "gsm8k.format"))
    check_resumable(began, replace(began, data="/b/c/task.py", rewards=("own.py:short", "gsm8k.format")))
    for changes in ({"data": "a/other.py"}, {"rewards": ("a/own.py:long", "gsm8k.format")}, {"data": "task"}):
        with pytest.raises(ValueError, match="must be the same"):
            check_resumable(began, replace(began, **changes))
