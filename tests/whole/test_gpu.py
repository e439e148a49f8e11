"""What a GPU computes is what a CPU computes: sampling through captured graphs, learning, whole runs.

Compiled layers and the kernels written for GPUs have their own tests. These run on a stand-in too (`stand_in.py`).
"""

import copy
from dataclasses import fields, replace

import pytest
import torch

import train
from grpo.batch import Batch
from grpo.config import from_yaml
from grpo.doctor.memory import MOST_TOKENS
from grpo.metrics import Sums
from grpo.policy import frozen_copy
from grpo.sampler import Sampler
from grpo.update import Learner
from tests.fakes.models import byte_tokenizer, tiny_model, tiny_policy
from tests.fakes.puppet import special_tokenizer
from tests.fakes.runs import flags, metrics, save_digits, timeless, weights, write_problems
from tests.sampler.test_generate import ENDS
from tests.sampler.test_rows import OPTIONS, PROMPTS
from tests.test_update import config, experience

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)


def on_gpu(batch: Batch) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.cuda() for name, x in values.items() if isinstance(x, torch.Tensor)})


def sampler_of(policy) -> Sampler:
    sampler = Sampler(policy, byte_tokenizer())
    sampler.is_eos[ENDS] = True
    return sampler


def test_rows_that_join_end_and_leave_are_those_of_a_cpu(float64):
    cpu = tiny_policy(precision="fp64")
    gpu = copy.deepcopy(cpu).cuda()
    samplers = sampler_of(cpu), sampler_of(gpu)
    for step in (1, 2):
        options = OPTIONS | {"step": step, "max_new_tokens": 70, "stop": ["5"]}
        theirs, ours = (sampler.generate(PROMPTS, max_rows=12, **options) for sampler in samplers)
        assert ours.texts == theirs.texts and len(set(map(len, ours.texts))) > 3
        assert ours.completion_ids.cpu().equal(theirs.completion_ids)
        torch.testing.assert_close(ours.sampling_logprobs.cpu(), theirs.sampling_logprobs, **TIGHT)
        for policy, sampler in zip((cpu, gpu), samplers, strict=True):
            with torch.no_grad():
                policy.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
            sampler.refresh(policy)
    assert len(samplers[1].rows.graphs) > 1


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), special_tokenizer({"<eos>": 259})], ids=["all", "gaps"])
def test_a_model_that_is_on_the_gpu_already_stays_there(tokenizer):
    """Which moves no buffer of ours: neither the angles of positions nor the ids that no token has."""
    rows = {"group_size": 2, "max_new_tokens": 3, "temperature": 1.0, "seed": 0, "step": 1}
    models = tiny_model(), tiny_model().cuda()
    theirs, ours = (Sampler(model, tokenizer).generate(PROMPTS, **rows).completion_ids for model in models)
    assert ours.device.type == "cuda" and ours.cpu().equal(theirs)


# In half precision the steps are kernels, which a stand-in for a GPU interprets: slowly.
@pytest.mark.parametrize("precision, prompts", [("fp32", 7), pytest.param("bf16", 3, marks=pytest.mark.slow)])
def test_a_token_is_drawn_without_waiting_for_the_gpu(precision, prompts, monkeypatch):
    sampler = sampler_of(tiny_policy(precision=precision).cuda())
    decode = sampler.rows.decode

    def without_waiting(steps: int) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = OPTIONS | {"max_rows": 3 * prompts // 2}
    sampler.generate(PROMPTS[:prompts], **options)  # captures
    monkeypatch.setattr(sampler.rows, "decode", without_waiting)
    assert sampler.generate(PROMPTS[:prompts], **options).finished.any()


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_coef": 0.0},
        {"kl_coef": 0.1, "max_tokens_per_microbatch": 20, "max_grad_norm": 1.0},
        {"kl_coef": 0.1, "num_epochs": 2, "minibatch_size": 4, "loss": "gspo", "sampler_correction": "mask"},
    ],
)
def test_an_update_is_that_of_a_cpu(float64, changes):
    def learn(policy, batch):
        reference = frozen_copy(policy) if changes["kl_coef"] else None
        learner = Learner(config(**changes), policy, reference)
        learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        sums = Sums()
        assert learner.learn(batch, 1, sums)
        return sums.reduce()

    cpu = tiny_policy(precision="fp64")
    gpu = copy.deepcopy(cpu).cuda()
    theirs, ours = learn(cpu, experience()), learn(gpu, on_gpu(experience()))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    for (name, our), their in zip(gpu.named_parameters(), cpu.parameters(), strict=True):
        torch.testing.assert_close(our.detach().cpu(), their.detach(), **TIGHT, msg=name)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A run's first arguments; pictures are not what is tested here."""
    monkeypatch.setattr(train, "report", lambda directory: None)
    return save_digits(tmp_path / "model"), write_problems(tmp_path / "data"), tmp_path


def run(digits, name: str, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    assert train.main(flags(*digits, name, compile=False, **changes)) == 0
    directory = digits[-1] / name
    return timeless(metrics(directory)), weights(directory / "final")


UPDATES = {"num_epochs": 2, "minibatch_size": 4, "eval_every": 2}


def test_a_run_is_that_of_a_cpu(digits):
    # Adam would make a sign of a rounding: 2e-3 of a KL, on a processor with AVX2 alone.
    changes = UPDATES | {"optimizer": "sgd", "sgd_momentum": 0.9, "learning_rate": 0.05}
    theirs, _ = run(digits, "cpu", **changes)
    ours, _ = run(digits, "gpu", device="cuda", **changes)
    assert len(ours) == 4
    for our, their in zip(ours, theirs, strict=True):
        said = {name for name, value in their.items() if value is not None}
        assert said == {name for name, value in our.items() if value is not None}
        for name in said:
            assert our[name] == pytest.approx(their[name], rel=1e-3, abs=1e-6), name


def test_a_run_goes_on_where_it_was_stopped(digits):
    ours, whole = run(digits, "gpu", device="cuda", **UPDATES)
    run(digits, "stopped", device="cuda", num_steps=2, **UPDATES)
    again, resumed = run(digits, "stopped", device="cuda", resume="auto", **UPDATES)
    assert len(ours) == 4
    for name in ("gpu", "stopped"):  # what `auto` means with the memory there is, for good
        assert from_yaml(digits[-1] / name / "config.yaml").max_tokens_per_microbatch == MOST_TOKENS
    assert again[2:] == ours[2:]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_sampler_and_learner_differ_by_rounding_only(digits, precision):
    changes = {"activation_checkpointing": precision == "fp16", "final_eval": True}
    lines, _ = run(digits, precision, device="cuda", precision=precision, **changes)
    assert max(line["policy/sampler_gap_mean"] for line in lines) < 0.03
    assert max(line["policy/sampler_gap_max"] for line in lines) < 0.5
    assert lines[0]["policy/kl"] < 1e-3 < lines[1]["policy/kl"]
