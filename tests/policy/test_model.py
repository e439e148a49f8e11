"""The policy against transformers' own models, row by row; what is refused; saving, loading."""

import copy

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from grpo.batch import Batch
from grpo.logprobs import linear_logprobs
from grpo.policy import (
    EMBEDDED,
    Policy,
    attention,
    attention_parts,
    eos_ids,
    load_policy,
    load_shapes,
    model_directory,
    positions_of,
    prepare_saving,
    save_model,
    token_logprobs,
)
from grpo.policy.load import own_logprobs, refuse_if_different
from grpo.sampler import Sampler
from tests.fakes.models import (
    FAMILIES,
    byte_tokenizer,
    keep_float64,
    plain_logprobs,
    plain_twin,
    save_tiny,
    tiny_model,
    tiny_policy,
)

TOLERANCE = {"fp64": {"rtol": 1e-9, "atol": 1e-9}, "fp32": {"rtol": 1e-4, "atol": 1e-4}}

# two prompts that share a beginning and one that does not; equal siblings, a prefix of a sibling, an empty completion
PROMPTS = [[10, 20, 30, 40], [10, 20, 31], [7]]
COMPLETIONS = [[[1, 2, 3], [1, 2, 3], [1, 2]], [[5], [], [6, 7, 8, 256]], [[9, 9, 9], [8, 256], [0]]]
WIDTH = 5  # one column more than the longest completion


def make_batch(prompts=PROMPTS, completions=COMPLETIONS, width=WIDTH, fill=0):
    rows = [row for group in completions for row in group]
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(prompt_ids=prompts, completion_ids=ids, completion_mask=torch.arange(width) < lengths[:, None])


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


# ---- equal to the plain forward --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("weights_for_onednn")
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_c11_c18_c39_c41_token_logprobs_equal_the_plain_forward_row_by_row(family, tied, precision):
    policy = tiny_policy(family, precision, tie_word_embeddings=tied)
    plain = plain_twin(policy, family, tie_word_embeddings=tied)
    ours = token_logprobs(policy, make_batch(), temperature=0.7)
    theirs = plain_logprobs(plain, PROMPTS, COMPLETIONS, 0.7, policy.vocab_size, WIDTH)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == (9, WIDTH) and our.dtype == their.dtype
        torch.testing.assert_close(our, their, **TOLERANCE[precision])
    upstream = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0)).to(ours[0].dtype)
    loss, plain_loss = (((upstream * torch.stack(out)).sum()) for out in (ours, theirs))
    our_gradients, their_gradients = gradients(policy.model, loss), gradients(plain, plain_loss)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = float(their_gradients[name].abs().max())
        assert scale > 0
        torch.testing.assert_close(gradient / scale, their_gradients[name] / scale, **TOLERANCE[precision])


def test_c17_c39_a_row_does_not_depend_on_other_rows_on_padding_or_on_what_stands_in_it():
    policy = tiny_policy(precision="fp64")
    with torch.no_grad():
        together, _ = token_logprobs(policy, make_batch(), 1.0)
        wide, _ = token_logprobs(policy, make_batch(width=9, fill=77), 1.0)
        torch.testing.assert_close(wide[:, :WIDTH], together, rtol=0, atol=0)
        assert (wide[:, WIDTH:] == 0).all()
        for i, prompt in enumerate(PROMPTS):
            for j, completion in enumerate(COMPLETIONS[i]):
                alone, _ = token_logprobs(policy, make_batch([prompt], [[completion]]), 1.0)
                torch.testing.assert_close(alone[0], together[3 * i + j], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", range(9))
def test_c39_changing_a_row_moves_nothing_else(row):
    policy = tiny_policy(precision="fp64")
    changed = copy.deepcopy(COMPLETIONS)
    changed[row // 3][row % 3] = [100, 101, 102, 103, 104]
    with torch.no_grad():
        before, _ = token_logprobs(policy, make_batch(), 1.0)
        after, _ = token_logprobs(policy, make_batch(completions=changed), 1.0)
    others = torch.arange(9) != row
    torch.testing.assert_close(after[others], before[others], rtol=1e-12, atol=1e-12)
    assert ((after[row] - before[row]).abs() > 1e-3).all()


@pytest.mark.parametrize("column", range(5))
def test_c18_a_token_moves_its_own_logprob_and_later_ones_never_earlier_ones(column):
    policy = tiny_policy(precision="fp64")
    row = [11, 12, 13, 14, 15]
    other = [*row[:column], 99, *row[column + 1 :]]
    with torch.no_grad():
        before, after = (token_logprobs(policy, make_batch([[1, 2]], [[r]]), 1.0)[0][0] for r in (row, other))
    torch.testing.assert_close(after[:column], before[:column], rtol=1e-12, atol=1e-12)
    assert ((after - before)[column:].abs() > 1e-3).all()


def test_c18_a_hole_in_the_mask_keeps_the_tokens_behind_it_in_place():
    policy = tiny_policy(precision="fp64")
    whole, holed = make_batch([[1, 2]], [[[3, 4, 5, 6]]]), make_batch([[1, 2]], [[[3, 4, 5, 6]]])
    holed.completion_mask[0, 1:3] = False
    assert torch.equal(token_logprobs(policy, whole, 1.0)[0], token_logprobs(policy, holed, 1.0)[0])


def test_c04_rows_and_batches_without_a_token_are_zero_and_carry_no_gradient():
    policy = tiny_policy()
    batch = make_batch()
    batch.completion_mask[3:6] = False
    logprobs, entropy = token_logprobs(policy, batch, 1.0)
    assert (logprobs[3:6] == 0).all() and (entropy[3:6] == 0).all() and (logprobs[:3, :2] < 0).all()
    batch.completion_mask[:] = False
    logprobs, entropy = token_logprobs(policy, batch, 1.0)
    assert (logprobs == 0).all() and (entropy == 0).all()
    logprobs.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in policy.parameters())
    assert token_logprobs(policy, make_batch(width=0, completions=[[[]]] * 3), 1.0)[0].shape == (3, 0)


def test_c19_learning_uses_the_sampled_ids_never_the_text():
    tokenizer = byte_tokenizer(["ab"])
    policy = tiny_policy(tokenizer=tokenizer)
    a, b, ab = tokenizer.convert_tokens_to_ids(["a", "b", "ab"])
    assert tokenizer.decode([a, b]) == tokenizer.decode([ab]) == "ab"
    with torch.no_grad():
        two, one = (token_logprobs(policy, make_batch([[1, 2]], [[ids]]), 1.0)[0][0] for ids in ([a, b], [ab]))
    assert two.count_nonzero() == 2 and one.count_nonzero() == 1 and two[0] != one[0]


def test_c41_vocabulary_rows_that_the_tokenizer_lacks_have_no_part():
    policy = tiny_policy(tie_word_embeddings=False)
    head = policy.model.lm_head.weight
    assert len(head) == 260 and policy.vocab_size == 257 == len(policy.head)
    before = token_logprobs(policy, make_batch(), 1.0)
    with torch.no_grad():
        head[257:] = 100.0
    after = token_logprobs(policy, make_batch(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (after[0].sum() + after[1].sum()).backward()
    assert (head.grad[257:] == 0).all() and (head.grad[:257] != 0).any(1).all()


def test_c27_under_bfloat16_autocast_the_head_is_not_rounded():
    policy = tiny_policy(precision="bf16")
    batch = make_batch([[1, 2]], [[[3, 4, 5]]])
    seen = []
    handle = policy.model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    logprobs, _ = token_logprobs(policy, batch, 1.0)
    handle.remove()
    hidden = seen[0][1:4].double()
    exact, _ = linear_logprobs(hidden, policy.head.double(), torch.tensor([3, 4, 5]))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[0, :3].double(), exact, rtol=1e-5, atol=1e-5)
    full, _ = token_logprobs(tiny_policy(), batch, 1.0)
    assert 1e-4 < (full - logprobs).abs().max() < 0.5  # autocast is on


# ---- dropout, checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dropout"),  # as an argument of the attention, as numbers that layers keep, as modules
    [
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    ],
)
def test_c22_dropout_is_off_in_train_mode(family, dropout, tmp_path):
    path = save_tiny(tmp_path, family, **dropout)
    policy, _ = load_policy(path)
    assert policy.training
    with torch.no_grad():
        first, second = (token_logprobs(policy, make_batch(), 1.0)[0] for _ in range(2))
        evaluated, _ = token_logprobs(policy.eval(), make_batch(), 1.0)
    assert torch.equal(first, second) and torch.equal(first, evaluated)


def test_activation_checkpointing_gives_the_same_gradients_and_computes_layers_again(tmp_path, monkeypatch):
    """And reads no state of a random generator, which a CUDA graph being captured may not: nothing here is random."""
    path = save_tiny(tmp_path)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("read the state of a random generator"))
    results = []
    for activation_checkpointing in (False, True):
        policy, _ = load_policy(path, precision="fp64", activation_checkpointing=activation_checkpointing)
        calls = []
        policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, entropy = token_logprobs(policy, make_batch(), 0.7)
        found = gradients(policy, (logprobs * 2 + entropy).sum())
        results.append((len(calls), logprobs, found))
    (plain_calls, plain, plain_gradients), (calls, logprobs, found) = results
    assert (plain_calls, calls) == (1, 2)
    torch.testing.assert_close(logprobs, plain, rtol=0, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-12, atol=1e-12)


# ---- refused ---------------------------------------------------------------------------------------------------------


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None}, "logit soft-capping"),
        ("gemma2", {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None}, "logit soft-capping"),
        ("llama", {"rope_parameters": DYNAMIC}, "rope_type 'dynamic'"),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "its own attention code"),
        ("phi", {"tie_word_embeddings": False}, "an output head other than"),
        ("llama", {"vocab_size": 256}, "257 output rows for its tokenizer, and has 256"),
        ("mamba", {}, "kind 'linear_attention'"),
    ],
)
def test_what_is_not_supported_is_refused(family, changes, reason):
    with pytest.raises(ValueError, match=rf"model: \w+ needs .*({reason})"):
        Policy(tiny_model(family, **{"eos_token_id": 0} | changes), byte_tokenizer())


@pytest.mark.parametrize("fault", ["blind to ancestors", "sees siblings", "NaN"])
def test_attention_that_differs_is_noticed(fault, monkeypatch):
    policy = tiny_policy("gemma")
    own = own_logprobs(policy.model)
    refuse_if_different(policy, own)
    attend = attention.TreeAttention.attend

    def wrong(self, layer, query, key, value, scaling):
        if fault == "blind to ancestors":
            return value.repeat_interleave(2, 1)
        if fault == "sees siblings":
            everything = attention_parts.Rectangle(0, len(query), 0, len(query))
            self.parts = self.parts._replace(rectangles=[everything])
        return attend(self, layer, query, key, value, torch.nan if fault == "NaN" else scaling)

    monkeypatch.setattr(attention.TreeAttention, "attend", wrong)
    with pytest.raises(ValueError, match="computes something"):
        refuse_if_different(policy, own)


def test_loading_compares_with_the_plain_forward(tmp_path):
    path = save_tiny(tmp_path, "cohere", logit_scale=3.0)
    with pytest.raises(ValueError, match="CohereForCausalLM computes something that tree attention does not support"):
        load_policy(path)


class OfSomebodyElse(LlamaForCausalLM):
    """A class over the config and the weights of a known family, which may compute something of its own."""


def test_c47_the_decoder_computes_only_what_it_knows_by_class_and_by_every_weight():
    """The kind: a model that is computed by other code than its own because it looks like another."""
    assert tiny_policy("llama").is_decoder
    assert not tiny_policy("gemma").is_decoder
    assert not Policy(OfSomebodyElse(tiny_model("llama").config), byte_tokenizer()).is_decoder
    model = tiny_model("llama")
    model.model.layers[0].input_layernorm.register_parameter("shift", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="holds 1 weights for which a LlamaForCausalLM of its config has no place"):
        Policy(model, byte_tokenizer())


ENDING = {
    "gpt2": {"max_position_embeddings": 64, "num_key_value_heads": 4},
    "opt": {"max_position_embeddings": 64, "num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mistral": {"sliding_window": 64},
    "qwen2": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("family", ENDING)
def test_c50_positions_end_with_a_learned_table_or_a_sliding_window(family, tmp_path):
    """The kind: prompt and completion beyond what can be computed at all, or rightly."""
    policy, tokenizer = load_policy(save_tiny(tmp_path, family, **ENDING[family]))
    assert policy.positions == 64 == positions_of(load_shapes(str(tmp_path))[0])
    sampler, run = Sampler(policy, tokenizer), {"group_size": 1, "temperature": 1.0, "seed": 0, "step": 0}
    assert sampler.generate([[65] * 40], max_new_tokens=24, **run).completion_mask.sum() <= 24
    with pytest.raises(ValueError, match="max_new_tokens: prompts of up to 40 tokens and 25 new ones go beyond the 64"):
        sampler.generate([[65] * 30, [65] * 40], max_new_tokens=25, **run)
    token_logprobs(policy, make_batch([[65] * 40], [[[65] * 25]], 25), 1.0)  # the last token is only a target
    with pytest.raises(ValueError, match="a sequence of 65 tokens goes beyond the 64 positions of the model"):
        token_logprobs(policy, make_batch([[65] * 40], [[[65] * 26]], 26), 1.0)


def test_c50_positions_that_are_computed_do_not_end():
    assert {tiny_policy(family).positions for family in FAMILIES} == {None}
    assert tiny_policy("qwen2", sliding_window=64, use_sliding_window=False).positions is None


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_c54_a_model_of_transformers_keeps_its_memory_and_what_is_frozen_in_it(family):
    """The kind: a part that somebody froze, which would be trained without a word."""
    model = tiny_model(family)
    model.model.layers[1].requires_grad_(False)
    policy = Policy(model, byte_tokenizer())
    for name, weight in policy.model.named_parameters():
        assert weight.requires_grad == ("layers.1." not in name), name
    memory = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in policy.parameters()} == memory


def test_c54_what_only_a_run_resolves_and_a_path_that_is_a_text(tmp_path):
    """The kind: a value that a run would have settled, given to the library as it is."""
    tiny = tiny_model(), byte_tokenizer()
    for load in (lambda: load_policy("embedded", precision="auto"), lambda: Policy(*tiny, "auto")):
        with pytest.raises(ValueError, match="precision is 'auto': must be one of fp32, fp64, bf16, fp16"):
            load()
    with pytest.raises(ValueError, match="device is 'auto': must be cpu or cuda"):
        load_policy("embedded", device="auto")
    save_model(*load_policy(save_tiny(tmp_path / "tiny")), str(tmp_path / "saved"))
    load_policy(str(tmp_path / "saved"))


# ---- loading and saving ----------------------------------------------------------------------------------------------


def test_a_name_that_cannot_be_loaded_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for path in ("nobody/no-such-model", str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        with pytest.raises(ValueError, match="model: ") as error:
            load_policy(path)
        assert repr(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_and_missing_weights_are_errors(tmp_path):
    path = save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it lacks 1 weights of its config, such as model.norm.weight"):
        load_policy(path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="can not be loaded"):
        load_policy(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_c26_master_weights_are_float32_whatever_the_file_holds(precision, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy, _ = load_policy(str(tmp_path), precision=precision)
    expected = torch.float64 if precision == "fp64" else torch.float32
    assert {parameter.dtype for parameter in policy.parameters()} == {expected}
    weight = policy.head.view(-1)[0]
    with torch.no_grad():
        weight.fill_(0.1).add_(1e-5)
    assert weight > 0.100009
    assert policy.autocast().fast_dtype == policy.autocast_dtype or policy.autocast_dtype is None


def test_fp64_is_float64_throughout(tmp_path):
    policy, _ = load_policy(save_tiny(tmp_path, "llama"), precision="fp64")
    expected = tiny_model("llama").double()
    keep_float64(expected)
    batch = make_batch()
    exact = token_logprobs(Policy(expected, byte_tokenizer(), "fp64"), batch, 1.0)[0]
    torch.testing.assert_close(token_logprobs(policy, batch, 1.0)[0], exact, rtol=1e-12, atol=1e-12)


def test_embedded_is_a_directory_of_ours():
    assert model_directory("embedded") == str(EMBEDDED) and model_directory("some/name") == "some/name"


@pytest.mark.parametrize("tied", [True, False])
def test_saving_round_trips_through_transformers(tied, tmp_path):
    policy, tokenizer = load_policy(save_tiny(tmp_path / "base", tie_word_embeddings=tied))
    with torch.no_grad():
        policy.head[0, 0] += 1
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "stale").touch()
    save_model(policy, tokenizer, tmp_path / "final")
    assert not (tmp_path / "final" / "stale").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "final"]
    assert again.config._attn_implementation != "tree"
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    theirs = plain_logprobs(again, PROMPTS, COMPLETIONS, 1.0, policy.vocab_size, WIDTH)
    torch.testing.assert_close(token_logprobs(policy, make_batch(), 1.0), theirs, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").get_vocab() == tokenizer.get_vocab()
    assert again.generation_config.eos_token_id == policy.model.generation_config.eos_token_id


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("asked", "dtype"), [("base", torch.bfloat16), ("float32", torch.float32)])
def test_c60_final_has_the_dtype_of_the_base_or_the_one_that_is_asked_for(tied, asked, dtype, tmp_path):
    """Kind: a run does not leave what was expected of it: `final/` had twice the size of its base."""
    path = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    half.save_pretrained(path)
    policy, tokenizer = load_policy(path)
    save_model(policy, tokenizer, tmp_path / "final", prepare_saving(policy, tokenizer, path, dtype=asked))
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (tmp_path / "final", tmp_path / "base"))
    assert ours.keys() == theirs.keys() and {weight.dtype for weight in ours.values()} == {dtype}
    assert all(torch.equal(weight.to(dtype), ours[name]) for name, weight in theirs.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto").dtype == dtype
    assert policy.head.dtype == torch.float32


def refuse_sampling(config, directory, **options):
    """As transformers 5.0 does."""
    if not config.do_sample and config.temperature not in (None, 1.0):
        raise ValueError("GenerationConfig is invalid")


def test_c61_a_generation_config_that_can_not_be_saved_loses_its_sampling_numbers(tmp_path, monkeypatch):
    """Kind: what can not be written shows when `final/` is written, after the last step."""
    policy, tokenizer = load_policy(save_tiny(tmp_path / "base"))
    policy.model.generation_config.update(do_sample=False, temperature=0.6, eos_token_id=[3, 4])
    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse_sampling)
    prepare_saving(policy, tokenizer, str(tmp_path / "base"))
    save_model(policy, tokenizer, tmp_path / "final")
    assert policy.model.generation_config.temperature in (None, 1.0)
    assert policy.model.generation_config.eos_token_id == [3, 4]


@pytest.mark.parametrize("part", ["tokenizer", "config", "generation_config"])
def test_c61_what_can_not_be_saved_at_all_shows_before_the_first_step(part, tmp_path, monkeypatch):
    """Kind: as above. Looked at: tokenizer, config, generation config."""
    policy, tokenizer = load_policy(save_tiny(tmp_path / "base"))
    owner = {"tokenizer": tokenizer, "config": policy.model.config, "generation_config": policy.model.generation_config}

    def refuse(*arguments, **options):
        raise ValueError("no such thing")

    monkeypatch.setattr(type(owner[part]), "save_pretrained", refuse)
    with pytest.raises(ValueError, match="^model: .*base' can not be saved, .*: no such thing"):
        prepare_saving(policy, tokenizer, str(tmp_path / "base"))


def test_c15_every_eos_of_tokenizer_config_and_generation_config_counts():
    model, tokenizer = tiny_model(eos_token_id=[3, 4]), byte_tokenizer()
    model.generation_config.eos_token_id = [5, 4]
    assert eos_ids(model, tokenizer) == [3, 4, 5, 256]
    model.config.eos_token_id, model.generation_config.eos_token_id = None, 7
    assert eos_ids(model, tokenizer) == [7, 256]
    tokenizer.eos_token, model.generation_config.eos_token_id = None, -1
    assert eos_ids(model, tokenizer) == []


def test_c11_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(tiny_policy(), make_batch(), 0.0)
