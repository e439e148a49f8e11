"""Adapters: off they are the base model, merged they are themselves; runs that train them; files of peft, both ways.

`golden/adapter` was made by peft, with `python -m tests.policy.test_lora`: an adapter of the model of digits, and the
log-probabilities that peft computes with it.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import train
from grpo.batch import Batch
from grpo.config import Config
from grpo.kernels.compiled import compile_layers
from grpo.optimizer import make_optimizer
from grpo.policy import (
    Policy,
    add_adapters,
    frozen_copy,
    linear_layers,
    load_policy,
    load_shapes,
    mix_in,
    reference_of,
    save_adapters,
    save_model,
    token_logprobs,
    trained,
)
from grpo.policy.lora import adapted, merge, merged
from grpo.run.inputs import of_weights
from grpo.sampler import Sampler
from grpo.sampler.products import fits
from tests.fakes import runs
from tests.fakes.compiling import aot_eager  # noqa: F401
from tests.fakes.models import byte_tokenizer, in_float64, tiny_policy
from tests.fakes.runs import assert_alike
from tests.policy.test_model import make_batch

GOLDEN = Path(__file__).parent / "golden" / "adapter"
IDS = [[0, 6, 3, 7, 1, 2], [4, 4, 6, 0, 7, 9]]
with_peft = pytest.mark.skipif(not find_spec("peft"), reason="peft is not installed (pip install --no-deps peft)")


def with_adapters(policy: Policy, seed: int | None = 1, rank: int = 4, alpha: float = 8.0, targets="all") -> Policy:
    """The policy with adapters; with a seed, B is random too."""
    add_adapters(policy, rank, alpha, targets, seed=0)
    if seed is not None:
        random = torch.Generator().manual_seed(seed)
        for layer in adapted(policy).values():
            layer.adapter.B.data = 0.3 * torch.randn(layer.adapter.B.shape, generator=random, dtype=torch.float64).to(
                layer.adapter.B
            )
    return policy


def logprobs_of(policy, batch=None) -> torch.Tensor:
    with torch.no_grad():
        return token_logprobs(policy, batch or make_batch(), 1.0)[0]


# ---- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma"])  # biases; not tied; of transformers
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_new_adapters_and_adapters_that_are_off_are_the_base_model_to_the_bit(precision, family):
    policy = tiny_policy(family, precision, tie_word_embeddings=family != "phi3").train()
    expected = logprobs_of(policy)
    with_adapters(policy, seed=None)
    reference = reference_of(policy)
    assert torch.equal(logprobs_of(policy), expected) and torch.equal(logprobs_of(reference), expected)
    assert torch.equal(token_logprobs(policy, make_batch(), 1.0)[0], expected)  # with a gradient
    for layer in adapted(policy).values():
        torch.nn.init.normal_(layer.adapter.B)
    assert torch.equal(logprobs_of(reference), expected) and not torch.equal(logprobs_of(policy), expected)


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_merged_weights_compute_what_weight_and_adapter_do(family):
    policy = with_adapters(tiny_policy(family, "fp64"))
    expected, before = logprobs_of(policy), of_weights(policy)
    copy = frozen_copy(policy)
    assert not adapted(copy) and len(adapted(policy)) == 14
    torch.testing.assert_close(logprobs_of(copy), expected, rtol=0, atol=1e-12)
    for layer in adapted(policy).values():
        layer.adapter.B.data.mul_(2)
    moved = logprobs_of(policy)
    mix_in(copy, policy, 1.0)
    torch.testing.assert_close(logprobs_of(copy), moved, rtol=0, atol=1e-12)
    assert (moved - expected).abs().max() > 1e-2
    for layer in adapted(policy).values():
        layer.adapter.B.data.div_(2)
    assert of_weights(policy) == before  # nothing was merged into the policy's own weights


class Twin(torch.nn.Module):
    """A linear layer with an adapter, as one would write it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.A, self.B = (torch.nn.Parameter(x.detach().clone()) for x in (layer.adapter.A, layer.adapter.B))

    def forward(self, x):
        weight = self.layer.weight.detach() + 2.0 * self.B @ self.A  # alpha 8 / rank 4
        return F.linear(x, weight, None if self.layer.bias is None else self.layer.bias.detach())


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_plain_twin(checkpointing):
    policy, other = (with_adapters(tiny_policy("qwen2", "fp64")) for _ in range(2))
    if checkpointing:
        policy.checkpoint_activations()
    twins = {name: Twin(layer) for name, layer in adapted(other.model).items()}
    for name, twin in twins.items():
        owner, _, leaf = name.rpartition(".")
        setattr(other.model.get_submodule(owner), leaf, twin)
    upstream = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for each in (policy, other):
        (token_logprobs(each, make_batch(), 0.7)[0] * upstream).sum().backward()
    for name, layer in adapted(policy.model).items():
        assert layer.weight.grad is None
        for factor in ("A", "B"):
            gradient = getattr(layer.adapter, factor).grad
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(gradient, getattr(twins[name], factor).grad, rtol=1e-9, atol=1e-12)
    learned = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in policy.named_parameters() if ".adapter." in name}


def test_targets_seed_and_what_is_trained():
    policy = with_adapters(tiny_policy(), seed=None, targets=("q_proj", "down_proj"))
    assert sorted(name.rpartition(".")[2] for name in adapted(policy)) == ["down_proj"] * 2 + ["q_proj"] * 2
    optimizer = make_optimizer(policy, Config(lora_rank=4))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 8 == len(optimizer.state)
    assert {id(p) for p in held} == {id(p) for p in trained(policy).parameters()}
    assert {p.dtype for p in held} == {torch.float32}
    again, other = (tiny_policy() for _ in range(2))
    torch.manual_seed(5)  # what others have drawn does not matter
    add_adapters(again, 4, 8.0, ("q_proj", "down_proj"), seed=0)
    add_adapters(other, 4, 8.0, ("q_proj", "down_proj"), seed=1)
    state, same, different = (trained(each).state_dict() for each in (policy, again, other))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not any(torch.equal(state[name], different[name]) for name in state if name.endswith("A"))
    assert trained(tiny := tiny_policy()) is tiny


@pytest.mark.parametrize(("family", "targets", "said"), [
    ("qwen2", ("q_proj", "lm_head"), "it must be all, or of down_proj, gate_proj"),
    ("gpt2", "all", "there is no linear layer to adapt"),
])  # fmt: skip
def test_targets_that_the_model_lacks(family, targets, said):
    with pytest.raises(ValueError, match=f"lora_targets is .*: for this model {said}"):
        add_adapters(tiny_policy(family), 4, 8.0, targets, seed=0)


def test_frozen_layers_are_stored_rounded_where_that_loses_nothing():
    exact = tiny_policy("qwen2", "bf16")
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    inexact, expected = tiny_policy("qwen2", "bf16"), logprobs_of(exact)
    for policy, dtype in ((exact, torch.bfloat16), (inexact, torch.float32)):
        with_adapters(policy, seed=None)
        assert {layer.weight.dtype for layer in linear_layers(policy.model).values()} == {dtype}
        assert {p.dtype for p in trained(policy).parameters()} == {policy.head.dtype} == {torch.float32}
    assert torch.equal(logprobs_of(exact), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_has_merged_weights_and_fast_paths_and_shares_what_is_frozen(precision):
    policy = with_adapters(tiny_policy("qwen2", precision))
    sampler = Sampler(policy, byte_tokenizer())
    assert fits(sampler.policy) and not fits(policy)
    shared = {p.data_ptr() for p in sampler.policy.parameters()} & {p.data_ptr() for p in policy.parameters()}
    others = [p for name, p in policy.named_parameters() if "_proj" not in name]
    assert shared == {p.data_ptr() for p in others}
    with torch.no_grad():
        for parameter in trained(policy).parameters():
            parameter.add_(0.1)
    sampler.refresh(policy)
    drawn = sampler.generate([[1, 2, 3], [1, 2, 4]], group_size=2, max_new_tokens=6, temperature=1.0, seed=0, step=1)
    learned = logprobs_of(policy, drawn.batch([[1, 2, 3], [1, 2, 4]]))
    if precision == "fp32":
        assert (learned - drawn.sampling_logprobs).abs().max() < 1e-5
    assert all(map(torch.equal, sampler.policy.parameters(), frozen_copy(policy).parameters()))


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_compiled_layers_have_a_variant_without_adapters():
    policy = with_adapters(tiny_policy("qwen2", "bf16", num_hidden_layers=1).train(), seed=None)
    reference = reference_of(policy)
    compile_layers(policy, reference)
    expected = logprobs_of(reference)
    assert torch.equal(token_logprobs(policy, make_batch(), 1.0)[0], expected)
    for parameter in trained(policy).parameters():
        torch.nn.init.normal_(parameter)
    assert torch.equal(logprobs_of(reference), expected) and not torch.equal(logprobs_of(policy), expected)


# ---- runs ------------------------------------------------------------------------------------------------------------

RUN = {
    "lora_rank": 3,
    "lora_alpha": 6,
    "num_steps": 4,
    "prompts_per_step": 5,
    "minibatch_size": 8,
    "max_tokens_per_microbatch": 40,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = runs.new_place(tmp_path_factory)
    return str(place / "model"), str(place / "data"), place


@pytest.fixture(scope="module")
def whole(inputs) -> Path:
    runs.run(runs.flags(*inputs, "whole", **RUN), inputs[2] / "whole")
    return inputs[2] / "whole"


def test_a_run_trains_adapters_alone_and_the_kl_begins_at_exactly_0(inputs, whole):
    lines = runs.metrics(whole)
    assert all(line["optim/grad_norm"] > 0 for line in lines) and lines[-1]["policy/kl"] > 1e-6
    held = runs.weights(whole / "checkpoints" / "step_000004")
    state = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert len(held) == len(state) == 28 and all(3 in p.shape for p in held.values())
    moments = torch.load(whole / "checkpoints" / "step_000004" / "optimizer.pt")["state"]
    assert len(moments) == 28
    base, final = load_policy(inputs[0])[0], load_policy(str(whole / "final"))[0]
    for (name, old), new in zip(base.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(old, new) == ("_proj.weight" not in name), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_kl_of_step_1_is_exactly_0(inputs, precision, monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)
    name = f"kl_{precision}"
    assert train.main(runs.flags(*inputs, name, **RUN | {"minibatch_size": 0, "precision": precision})) == 0
    lines = runs.metrics(inputs[2] / name)
    assert lines[0]["policy/kl"] == 0.0 < lines[-1]["policy/kl"]
    if precision == "fp32":
        assert max(line["policy/sampler_gap_max"] for line in lines) < 1e-5


def test_a_resumed_run_is_the_same_to_the_bit(inputs, whole):
    argv = runs.flags(*inputs, "cut", **RUN, resume="auto")
    before = runs.killed("grpo.update:Learner.learn", 4)
    assert runs.start(argv, inputs[2] / "cut", before=before).wait() == -9
    runs.run(argv, inputs[2] / "cut")
    runs.assert_same_run(whole, inputs[2] / "cut")


def test_two_processes_make_the_same_run(inputs, whole):
    ranks = runs.start_train_ranks(runs.flags(*inputs, "two", **RUN), 2, inputs[2] / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert_alike(whole, inputs[2] / "two")


def test_a_run_begins_with_the_adapter_of_another(inputs, whole, monkeypatch):
    """Its base model, and so its reference, is the model with that adapter merged; so is what is evaluated as base."""
    monkeypatch.setattr(train, "report", runs.no_report)
    merged_model = load_policy(str(whole / "adapter"), precision="fp64")[0]
    other = load_policy(str(whole / "final"), precision="fp64")[0]
    torch.testing.assert_close(of_ids(merged_model), of_ids(other), rtol=0, atol=1e-9)
    options = RUN | {"num_steps": 2, "final_eval": True, "minibatch_size": 0}
    assert train.main(runs.flags(str(whole / "adapter"), *inputs[1:], "second", **options)) == 0
    second = inputs[2] / "second"
    assert runs.metrics(second)[0]["policy/kl"] == 0.0
    assert len(json.loads((second / "eval" / "eval.json").read_text())["cells"]) == 2
    upon, final = (load_policy(str(second / part), precision="fp64")[0] for part in ("adapter", "final"))
    torch.testing.assert_close(of_ids(upon), of_ids(final), rtol=0, atol=1e-9)
    assert (of_ids(upon) - of_ids(other)).abs().max() > 1e-4


def test_the_reward_rises(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "report", runs.no_report)
    data = runs.write_problems(tmp_path / "data", num_train=60, answer="3")
    options = {"precision": "fp32", "num_steps": 15, "prompts_per_step": 8, "group_size": 8, "lora_rank": 8}
    options |= {"rewards": "gsm8k.last_number", "reward_weights": 1, "checkpoint_every": 0, "kl_coef": 0}
    assert train.main(runs.flags(inputs[0], data, tmp_path, "learns", **options)) == 0
    rewards = [line["reward/mean"] for line in runs.metrics(tmp_path / "learns")]
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-3:]) / 3 > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns_with_rank_8(seed, tmp_path):
    options = {"lora_rank": 8, "learning_rate": 2e-3, "seed": seed, "out_dir": tmp_path, "run_name": "demo"}
    options |= {"num_steps": 20, "final_eval_limit": 200, "device": "cpu"}
    assert train.main([word for name, value in options.items() for word in (f"--{name}", str(value))]) == 0
    base, tuned = json.loads((tmp_path / "demo" / "eval" / "eval.json").read_text())["cells"]
    assert tuned["ci95"][0] > base["ci95"][1]


@pytest.mark.parametrize(("changes", "said"), [
    ({"reference_sync_every": 2}, "reference_sync_every is 2: must be 0 with lora_rank"),
    ({"lora_targets": "q_proj,oproj"}, "lora_targets is ('q_proj', 'oproj'): for this model it must be all, or of"),
])  # fmt: skip
def test_options_that_do_not_fit(inputs, changes, said, capsys):
    try:
        code = train.main(runs.flags(*inputs, "wrong", **RUN | changes))
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and said in capsys.readouterr().err


# ---- files -----------------------------------------------------------------------------------------------------------


def saved_digits(place: Path) -> tuple[Path, Path]:
    """The model of digits, and the adapter that peft has made of it."""
    runs.save_digits(place / "model")
    shutil.copytree(GOLDEN, place / "adapter")
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place / "model")
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return place / "model", place / "adapter"


def of_ids(policy: Policy) -> torch.Tensor:
    """[2,5] log-probabilities of `IDS`."""
    ids = torch.tensor(IDS)
    batch = Batch([row[:1] for row in IDS], ids[:, 1:], torch.ones(2, 5, dtype=torch.bool))
    return logprobs_of(policy, batch)


def test_an_adapter_of_peft_is_merged_when_it_is_loaded(tmp_path):
    model, adapter = saved_digits(tmp_path)
    expected = torch.tensor(json.loads((GOLDEN / "logprobs.json").read_text()), dtype=torch.float64)
    torch.testing.assert_close(of_ids(load_policy(adapter, precision="fp64")[0]), expected, rtol=0, atol=1e-6)
    assert (of_ids(load_policy(model, precision="fp64")[0]) - expected).abs().max() > 0.1
    assert len(load_shapes(adapter)[1].get_vocab()) == len(runs.ALPHABET) + 1


def test_what_is_written_is_read_again_and_final_loads_in_transformers(tmp_path):
    model, _ = saved_digits(tmp_path)
    policy, tokenizer = load_policy(model, precision="fp64")
    with_adapters(policy, rank=2, alpha=5.0)
    save_adapters(policy, tmp_path / "ours", str(model))
    save_model(policy, tokenizer, tmp_path / "final")
    torch.testing.assert_close(of_ids(load_policy(tmp_path / "ours", precision="fp64")[0]), of_ids(policy))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float64)
    torch.testing.assert_close(of_ids(Policy(theirs, tokenizer, "fp64")), of_ids(policy), rtol=0, atol=1e-12)
    save_adapters(load_policy(model)[0], tmp_path / "none", str(model))
    assert not (tmp_path / "none").exists()


def test_a_wrapped_family_is_saved_merged(tmp_path):
    policy = with_adapters(tiny_policy("gemma"))
    save_model(policy, byte_tokenizer(), tmp_path / "final")
    assert not [name for name in load_file(tmp_path / "final" / "model.safetensors") if "adapter" in name]
    torch.testing.assert_close(logprobs_of(load_policy(tmp_path / "final")[0]), logprobs_of(policy))


@with_peft
def test_peft_reads_what_is_written(tmp_path):
    import peft

    model, _ = saved_digits(tmp_path)
    policy, tokenizer = load_policy(model, precision="fp64")
    with_adapters(policy, rank=2, alpha=5.0)
    save_adapters(policy, tmp_path / "ours", str(model))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours", autocast_adapter_dtype=False)
    merged_by_peft = Policy(theirs.merge_and_unload(), tokenizer, "fp64")
    torch.testing.assert_close(of_ids(merged_by_peft), of_ids(policy), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("changes", "said"), [
    ({"use_dora": True}, "adapters with use_dora True are not supported, it must be False"),
    ({"rank_pattern": {"q_proj": 1}}, "adapters with rank_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' are not supported: they change the base model"),
    ({"base_model_name_or_path": None}, "must name its base model"),
    ({"base_model_name_or_path": "SELF"}, "must name its base model"),
    ({"r": 3}, r"has factors \[2, \d+\] and \[\d+, 2\], of rank 3"),
])  # fmt: skip
def test_adapters_that_are_refused(changes, said, tmp_path):
    _, adapter = saved_digits(tmp_path)
    file = adapter / "adapter_config.json"
    changes = {key: str(adapter) if value == "SELF" else value for key, value in changes.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        load_policy(adapter)


def test_factors_of_something_else_are_refused(tmp_path):
    _, adapter = saved_digits(tmp_path)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    save_file(held | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, file)
    with pytest.raises(ValueError, match="lm_head.lora_A.weight has no B beside it, or no linear layer"):
        load_policy(adapter)
    save_file(held | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 11)}, file)
    with pytest.raises(ValueError, match="lora_embedding_A, which is no adapter of a linear layer"):
        load_policy(adapter)


def test_merge_makes_a_model_plain():
    policy = with_adapters(tiny_policy("qwen2", "fp64"))
    expected, weights = logprobs_of(policy), dict(merged(policy))
    merge(policy)
    assert {type(layer) for layer in linear_layers(policy.model).values()} == {torch.nn.Linear}
    assert {name: p.shape for name, p in policy.named_parameters()} == {name: p.shape for name, p in weights.items()}
    torch.testing.assert_close(logprobs_of(policy), expected, rtol=0, atol=1e-12)


def make() -> None:
    """Make `golden/adapter` with peft: random factors of rank 2, on a grid so that a few digits hold them."""
    import peft

    model = runs.digit_model().double()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=random) * 64).round() / 256
        with in_float64():
            logits = adapter.double()(input_ids=torch.tensor(IDS)).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(2, torch.tensor(IDS)[:, 1:, None])[..., 0]
    adapter.float().save_pretrained(GOLDEN)
    (GOLDEN / "README.md").unlink(missing_ok=True)
    (GOLDEN / "logprobs.json").write_text(json.dumps(logprobs.tolist()) + "\n")


if __name__ == "__main__":
    make()
