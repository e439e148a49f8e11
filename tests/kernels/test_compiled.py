"""Compiled layers against the same layers as written: numbers, names, how many graphs, and what stays plain."""

import copy
import shutil

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from grpo.batch import Batch
from grpo.doctor.facts import sizes
from grpo.doctor.memory import kept
from grpo.kernels import compiled
from grpo.kernels.compiled import any_size, can_compile, compile_layers
from grpo.logprobs import _add_tile, _tile_gradient, linear_logprobs
from grpo.policy import attention_flex, frozen_copy, token_logprobs
from grpo.policy.attention_flex import FlexAttention
from grpo.sampler import Sampler
from grpo.tree import pack
from tests.fakes import known_facts, saved
from tests.fakes.compiling import aot_eager, forget, graphs  # noqa: F401  (a fixture)
from tests.fakes.models import byte_tokenizer, tiny_policy
from tests.policy.test_model import gradients

SIZES = (3, 40, 1)  # completions of a tree; the second one is padded to another size


def tree_of(rows):
    return pack([list(range(1, 50))], [[[i] * 30 for i in range(1, 1 + rows)]])


def learned(policy, module, rows):
    """Log-probabilities [M] and the gradient of every weight."""
    logprobs, entropy = module(tree_of(rows), 0.7)
    return logprobs.detach(), gradients(policy, (2 * logprobs + entropy).sum())


def assert_equal(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        scale = float(theirs[1][name].abs().max())
        torch.testing.assert_close(gradient / scale, theirs[1][name] / scale, **tolerance)


def a_pair(**options):
    """A compiled policy and the same one as written."""
    plain = tiny_policy(head_dim=16, **options)
    policy = copy.deepcopy(plain)
    compile_layers(policy)
    return policy, plain


def use_flex(monkeypatch, policy, dtype=torch.float32):
    """FlexAttention on a CPU, where autocast would name the dtype on a GPU."""
    monkeypatch.setattr(attention_flex, "usable", lambda *_: True)
    monkeypatch.setattr(attention_flex, "FlexAttention", lambda ends, _: FlexAttention(ends, dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_plain_layers_with_one_graph_for_all_layers_and_sizes(
    checkpointing, monkeypatch
):
    policy, plain = a_pair(num_hidden_layers=3)
    use_flex(monkeypatch, policy)
    policy.train()
    if checkpointing:
        policy.checkpoint_activations()
    for rows in SIZES:
        assert_equal(learned(policy, policy, rows), learned(plain, plain, rows), rtol=1e-4, atol=1e-4)
    assert graphs() <= 4  # a chunk's values and gradient; layers: one graph, the first apart if checkpointed


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_compiled_layers_keep_what_the_estimate_counts(monkeypatch):
    """Of a token in a layer, with what Inductor partitions by: nothing that elementwise work brings back."""
    monkeypatch.setitem(compiled.SETTINGS, "backend", "aot_eager_decomp_partition")
    grown, counted = [], []
    for layers in (1, 3):
        widths = {"hidden_size": 64, "intermediate_size": 320}  # a layer as it usually is: an MLP several times as wide
        policy, _ = a_pair(family="llama", precision="bf16", num_hidden_layers=layers, **widths)
        use_flex(monkeypatch, policy, torch.bfloat16)
        kept_bytes = []
        for length in (1100, 1500):  # padded to 1,280 and 1,536
            with saved.noted() as seen:
                policy(pack([[7] * 10], [[[8] * (length - 10)]]), 1.0)
            kept_bytes.append(saved.num_bytes(seen, policy))
        grown.append((kept_bytes[1] - kept_bytes[0]) / 256)
        recipe = known_facts.config(precision="bf16", compile=True)
        counted.append(kept(recipe, known_facts.facts(sizes=sizes(policy.model))))
    assert grown[1] - grown[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_attention_in_parts_stays_out_of_the_graphs():
    policy, plain = a_pair()
    assert_equal(learned(policy, policy, 3), learned(plain, plain, 3), rtol=1e-4, atol=1e-4)
    before = graphs()
    assert before > 0
    assert_equal(learned(policy, policy, 9), learned(plain, plain, 9), rtol=1e-4, atol=1e-4)
    assert graphs() == before


def test_names_stay_and_copies_are_plain():
    policy, plain = a_pair()
    assert list(policy.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in policy.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert policy.compiled and len(policy.layers) == 2 and all(layer._compiled_call_impl for layer in policy.layers)
    frozen = frozen_copy(policy)
    assert not frozen.compiled and not any(module._compiled_call_impl for module in frozen.modules())


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # the policy itself; a copy
def test_sampling_compiles_nothing_and_draws_the_same(precision):
    policy, plain = a_pair(precision=precision)
    options = {"group_size": 3, "max_new_tokens": 5, "temperature": 1.0, "seed": 0, "step": 1}
    ours, theirs = (Sampler(p, byte_tokenizer()).generate([[1, 2, 3], [1, 4]], **options) for p in (policy, plain))
    assert graphs() == 0
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    assert torch.equal(ours.sampling_logprobs, theirs.sampling_logprobs)


@pytest.mark.slow
@pytest.mark.usefixtures("aot_eager")
def test_ddp_may_wrap_a_compiled_policy_and_cuts_no_layer_in_pieces(monkeypatch, tmp_path):
    """DDP would, with layers of over a megabyte."""
    made, backend = [], torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setitem(compiled.SETTINGS, "backend", lambda *graph: made.append(graph) or backend(*graph))
    policy, plain = a_pair(hidden_size=160, intermediate_size=512)
    assert sum(4 * weight.numel() for weight in policy.layers[0].parameters()) > 1 << 20
    use_flex(monkeypatch, policy)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(policy, broadcast_buffers=False, gradient_as_bucket_view=True)
        assert_equal(learned(policy, wrapped, 3), learned(plain, plain, 3), rtol=1e-4, atol=1e-4)
        assert len(made) <= 4  # a layer, a chunk's values and its gradient, and one without an operation
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("aot_eager")
def test_c37_compiled_chunks_equal_plain_ones():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (50, 30))
    targets = torch.randint(30, (50,), generator=generator)
    results = []
    for compiled_chunks in (True, False):
        out = linear_logprobs(hidden, weight, targets, 0.6, chunk=16, compiled=compiled_chunks)
        results.append([*out, *torch.autograd.grad(out[0].sum() + 2 * out[1].sum(), (hidden, weight))])
    assert 0 < graphs() <= 4  # values, gradient; a last chunk of another size
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("aot_eager")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_compiled_tiles_only_read_the_logits(temperature):
    """What is done in place would be written back to memory, several times the size of anything that is asked for."""
    logits, place, rows = torch.randn(9, 40), torch.randint(40, (9, 1)), torch.rand(6, 9)
    arguments = logits, None, place, rows[5] < 0.5, temperature
    for function, more in ((_add_tile, rows[:4]), (_tile_gradient, [*rows[:4], torch.float32])):
        before = logits.clone()
        compiled_result = any_size(function)(*arguments, *more)
        assert torch.equal(logits, before)
        torch.testing.assert_close(compiled_result, function(before, *arguments[1:], *more), rtol=1e-5, atol=1e-5)
        assert not torch.equal(logits, before)  # without being compiled, in place


def test_any_size_compiles_a_function_once():
    assert any_size(torch.sin) is any_size(torch.sin)


def test_a_machine_without_a_compiler_can_not_compile(monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled.Path, "exists", lambda self: True)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert can_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_c22_with_kernels_of_a_cpu_old_policy_and_reference_agree_exactly():
    forget()
    policy, plain = a_pair(precision="bf16")
    reference = frozen_copy(policy)
    compile_layers(reference)
    values, found = learned(policy, policy, 9)
    with torch.no_grad():
        old, referred = (p(tree_of(9), 0.7)[0] for p in (policy, reference))
    assert torch.equal(values, old) and torch.equal(values, referred)
    assert_equal((values, found), learned(plain, plain, 9), rtol=0.1, atol=0.1)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


on_gpu = pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])],
)


@on_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_c22_a_compiled_step_is_exact_where_it_has_to_be_and_near_the_plain_one(device, checkpointing):
    plain = tiny_policy(precision="bf16", head_dim=64, num_hidden_layers=3).to(device).train()
    assert_exact_and_near(plain, checkpointing, (3, 40, 1, 70, 5), gap=0.3, cosine=0.98)


def assert_exact_and_near(plain, checkpointing, sizes, gap, cosine):
    """A compiled copy of a policy: old policy and reference to the bit, the policy as it was but for rounding."""
    forget()
    policy, reference = copy.deepcopy(plain), frozen_copy(plain)
    if checkpointing:
        policy.checkpoint_activations()
    compile_layers(policy, reference)
    made = []
    for rows in sizes:
        tree = tree_of(rows).to(plain.device)
        with torch.no_grad():
            referred, old = reference(tree, 0.7)[0], policy(tree, 0.7)[0]
        logprobs, entropy = policy(tree, 0.7)
        found = gradients(policy, (2 * logprobs + entropy).sum())
        assert torch.equal(logprobs, referred) and torch.equal(logprobs, old)
        theirs, their_entropy = plain(tree, 0.7)
        their_gradients = gradients(plain, (2 * theirs + their_entropy).sum())
        assert (logprobs - theirs).abs().max() < gap
        for name, gradient in found.items():
            assert torch.cosine_similarity(gradient.flatten(), their_gradients[name].flatten(), 0) > cosine, name
        made.append(graphs())
    assert made[-1] == made[1]  # all after the second tree is a repetition


@on_gpu
def test_a_compiled_step_does_not_wait_for_the_gpu(device):
    forget()
    policy = tiny_policy(precision="bf16", head_dim=64).to(device).train()
    compile_layers(policy)
    tree = tree_of(9).to(device)

    def step():
        logprobs, entropy = policy(tree, 0.7)
        (2 * logprobs + entropy).sum().backward()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_c27_in_bfloat16_sampler_and_compiled_learner_differ_by_rounding_only(device):
    forget()
    policy = tiny_policy(precision="bf16", head_dim=64).to(device).train()
    tokenizer = byte_tokenizer()
    sampler = Sampler(policy, tokenizer)
    compile_layers(policy)
    prompts = [[1, 2, 3, 4], [1, 2, 5]]
    out = sampler.generate(prompts, group_size=8, max_new_tokens=16, temperature=1.0, seed=0, step=1)
    batch = Batch(prompt_ids=prompts, completion_ids=out.completion_ids, completion_mask=out.completion_mask)
    with torch.no_grad():
        logprobs, _ = token_logprobs(policy, batch, 1.0)
    gap = (logprobs - out.sampling_logprobs)[out.completion_mask].abs()
    assert gap.mean() < 0.03 and gap.max() < 0.5
