"""Weights in files: every form of them is read, and what is written gives other libraries the same model."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grpo.policy import load_policy, save_model, weights
from tests.fakes.families import CHECKPOINTS
from tests.fakes.models import byte_tokenizer, save_tiny, tiny_model

ROOT = Path(__file__).parents[2]


def logits(model):
    """[20,V] by transformers' own code."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits[0]


def numbers(policy):
    """All weights, by name."""
    return dict(policy.model.named_parameters())


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_saved_gives_transformers_the_same_logits(name, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", shard)
    family, changes = CHECKPOINTS[name]
    directory = save_tiny(tmp_path / "base", family, **changes)
    policy, tokenizer = load_policy(directory)
    assert policy.is_decoder
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    save_model(policy, tokenizer, tmp_path / "final")
    index = tmp_path / "final" / "model.safetensors.index.json"
    assert index.exists() == (shard != "5GB")
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.01)
    assert type(saved) is type(theirs)
    assert torch.equal(logits(saved), logits(theirs))
    again, _ = load_policy(tmp_path / "final")
    assert all(torch.equal(numbers(again)[key], value) for key, value in numbers(policy).items())


def stored_as(form, directory):
    """Rewrite the one file of a directory in another form."""
    file = directory / "model.safetensors"
    state = load_file(file)
    if form == "in bfloat16":
        save_file({name: value.bfloat16() for name, value in state.items()}, file, metadata={"format": "pt"})
        return
    if form == "without a prefix":
        save_file(
            {name.removeprefix("model."): value for name, value in state.items()}, file, metadata={"format": "pt"}
        )
        return
    file.unlink()
    save = partial(torch.save, _use_new_zipfile_serialization="old" not in form) if "pickled" in form else save_file
    whole = "pytorch_model.bin" if "pickled" in form else "model.safetensors"
    if "parts" not in form:
        save(state, directory / whole)
        return
    names, parts = sorted(state), (f"a-{whole}", f"b-{whole}")
    halves = names[::2], names[1::2]
    for part, half in zip(parts, halves, strict=True):
        save({name: state[name] for name in half}, directory / part)
    weight_map = {name: part for part, half in zip(parts, halves, strict=True) for name in half}
    (directory / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "form", ["in parts", "pickled in parts", "pickled by an old torch", "without a prefix", "in bfloat16"]
)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_every_form_of_files_gives_the_same_weights(form, precision, tmp_path):
    directory = save_tiny(tmp_path)
    before, _ = load_policy(directory, precision=precision)
    stored_as(form, tmp_path)
    after, _ = load_policy(directory, precision=precision)
    for name, value in numbers(before).items():
        assert numbers(after)[name].dtype == value.dtype == {"fp32": torch.float32, "fp64": torch.float64}[precision]
        expected = value.bfloat16().to(value.dtype) if form == "in bfloat16" else value
        assert torch.equal(numbers(after)[name], expected), name


def test_a_revision_of_the_hub_is_read_from_its_own_snapshot(monkeypatch, tmp_path):
    cache = tmp_path / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    for seed, (branch, commit) in enumerate((("main", "a" * 40), ("old", "b" * 40))):
        save_tiny(cache / "snapshots" / commit, seed=seed)
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for seed, revision in enumerate((None, "old")):
        policy, _ = load_policy("someone/tiny", revision=revision)
        expected = tiny_model(seed=seed).model.norm.weight
        assert torch.equal(policy.model.model.norm.weight, expected)
        assert policy.commit == "ab"[seed] * 40


def change(directory, alter):
    """Alter the tensors of a directory's file."""
    state = load_file(directory / "model.safetensors")
    alter(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "a missing weight": (lambda state: state.pop(UP), rf"lacks 1 weights of its config, such as {UP}"),
    "another shape": (lambda state: state.update({UP: torch.ones(3, 32)}), rf"{UP} has the shape \[3, 32\]"),
    "an unknown weight": (
        lambda state: state.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
        "holds 1 weights for which a Qwen2ForCausalLM of its config has no place, such as model.layers.0.*sinks",
    ),
    "a scale": (lambda state: state.update({UP + "_scale": torch.ones(1)}), "is quantized"),
    "NaN": (lambda state: state[UP].fill_(torch.nan), "log-probabilities that are not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_c47_files_that_do_not_fit_are_refused(fault, tmp_path):
    alter, sentence = FAULTS[fault]
    directory = save_tiny(tmp_path)
    change(tmp_path, alter)
    with pytest.raises(ValueError, match=f"model: '{directory}' .*{sentence}"):
        load_policy(directory)


def test_weights_of_no_layer_and_a_tied_head_may_be_left_over(tmp_path):
    directory = save_tiny(tmp_path)
    more = {"lm_head.weight": torch.ones(260, 32), "score.weight": torch.ones(2)}
    change(tmp_path, lambda state: state.update(more))
    policy, _ = load_policy(directory)
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert not (policy.head == 1).all()


MEASURE = r"""
import re, sys
from pathlib import Path
from grpo.policy import load_policy

def memory(name):
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])

load_policy(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is measured anew
before = memory("VmRSS")
policy, _ = load_policy(sys.argv[2])
held = sum(p.numel() * p.element_size() for p in policy.parameters())
print((memory("VmHWM") - before) / held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_lie_in_memory_once_while_they_are_read(dtype, tmp_path):
    small = save_tiny(tmp_path / "small")
    model = tiny_model(intermediate_size=48_000, num_hidden_layers=8, dtype=torch.float32).to(dtype)
    model.save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", MEASURE, small, str(tmp_path / "large")]
    copies = float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert 0.8 < copies < 1.5
