"""Families that the decoder does not compute: over our attention they give transformers' numbers, or are refused."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grpo.batch import Batch
from grpo.policy import Policy, load_policy, token_logprobs
from grpo.policy.load import own_logprobs, refuse_if_different
from grpo.sampler import Sampler
from grpo.tree import pack
from tests.fakes.models import byte_tokenizer, plain_logprobs

MATCHING = """
afmoe apertus arcee aria_text bitnet cwm dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text glm
glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna lfm2 mellum minimax_m2 minimax_m3_vl_text ministral ministral3
mixtral moshi olmo olmo3 olmoe opt persimmon phimoe qwen2_moe qwen3_moe seed_oss solar_open starcoder2
"""
"""Families of transformers 5.23 that give the numbers of their own forward; all others are compared when loaded."""

REFUSED = {
    "bert": "an output head other than one linear layer without bias",
    "bloom": "its own attention code",
    "cohere": "log-probabilities differ from its own forward",  # its logits have a factor
    "diffllama": "layers must run once, in order",
    "gemma2": "logit soft-capping",
    "gpt_oss": "s_aux",
    "jamba": "layers of the kind 'linear_attention'",
    "jetmoe": "can not be decoded by this sampler",
    "llama4_text": "layers of the kind 'chunked_attention'",
    "mimo_v2_flash": "values of another width than its keys",
}
SIZES = {
    **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 64},
    **{"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "n_inner": 48, "ffn_dim": 48, "d_model": 32},
    **{"num_layers": 2, "word_embed_proj_dim": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_topk": 2, "num_shared_experts": 1, "n_group": 1},
    **{"n_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16},
    **{"ffn_hidden_size": 48, "bos_token_id": 1, "eos_token_id": 256, "pad_token_id": 0, "initializer_range": 0.2},
}
"""Under all names that families give them."""
PROMPTS, COMPLETIONS = [[5, 6, 7, 8], [5, 6, 9]], [[[1, 2, 3], [1, 2, 4, 4]], [[10, 11], [12, 13, 14]]]


def tiny(family, **changes):
    """A random model of any family, in eval mode."""
    kind = CONFIG_MAPPING[family]
    names = kind().to_dict().keys() | kind.attribute_map.keys()
    config = kind(**{name: value for name, value in SIZES.items() if name in names} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def compared(model):
    """A policy over the model, after what `load_policy` and the sampler compare."""
    own = own_logprobs(model)
    policy = Policy(model, byte_tokenizer())
    assert not policy.is_decoder
    refuse_if_different(policy, own)
    return policy, Sampler(policy, byte_tokenizer())


@pytest.mark.parametrize("family", MATCHING.split())
def test_a_family_learns_and_decodes_what_transformers_computes(family):
    model = tiny(family)
    with torch.no_grad():
        theirs, _ = plain_logprobs(model, PROMPTS, COMPLETIONS, 0.7, 257, 4)
    policy, sampler = compared(model)
    tree = pack(PROMPTS, COMPLETIONS)
    ours, _ = policy(tree, 0.7)
    torch.testing.assert_close(ours.detach(), theirs[tree.row, tree.column], rtol=1e-3, atol=1e-3)
    ours.sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in policy.parameters() if p.grad is not None) > 0
    drawn = sampler.generate(PROMPTS, group_size=2, max_new_tokens=6, temperature=0.7, seed=0, step=1)
    learned, _ = token_logprobs(policy, Batch(PROMPTS, drawn.completion_ids, drawn.completion_mask), 0.7)
    torch.testing.assert_close(learned.detach(), drawn.sampling_logprobs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_can_not_be_computed_is_refused_by_what_it_needs(family):
    with pytest.raises(ValueError, match=f"model: .*{REFUSED[family]}"):
        compared(tiny(family))


def test_no_forward_of_transformers_is_replaced():
    model = tiny("gemma")
    before = {name: type(module).forward for name, module in model.named_modules()}
    policy = Policy(model, byte_tokenizer())
    assert policy.model is model
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == before


def test_noise_in_train_mode_is_refused():
    with pytest.raises(ValueError, match="PhimoeForCausalLM computes something else in train mode"):
        compared(tiny("phimoe", router_jitter_noise=0.9, input_jitter_noise=0.9))


def test_a_window_that_the_run_can_reach_is_refused():
    policy, sampler = compared(tiny("gemma3_text", sliding_window=12))
    assert policy.positions == 12
    options = {"group_size": 1, "temperature": 1.0, "seed": 0, "step": 1}
    assert sampler.generate(PROMPTS, max_new_tokens=8, **options).completion_mask.any()
    with pytest.raises(ValueError, match="max_new_tokens: prompts of up to 4 tokens and 9 new ones go beyond the 12"):
        sampler.generate(PROMPTS, max_new_tokens=9, **options)
    with pytest.raises(ValueError, match="a sequence of 13 tokens goes beyond the 12 positions"):
        policy(pack([[1]], [[list(range(2, 15))]]), 1.0)


def test_dropout_of_any_kind_is_off():
    policy, _ = compared(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    tree = pack(PROMPTS, COMPLETIONS)
    assert torch.equal(*(policy.train()(tree, 1.0)[0] for _ in range(2)))


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for again in (False, True):
        policy, _ = compared(tiny("gemma"))
        if again:
            policy.checkpoint_activations()
        policy.train()(pack(PROMPTS, COMPLETIONS), 1.0)[0].sum().backward()
        found.append([p.grad for p in policy.parameters()])
    assert all(map(torch.equal, *found))


def test_it_is_said_in_one_line_that_a_family_runs_slower(tmp_path, capsys):
    tiny("gemma").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert not load_policy(tmp_path)[0].is_decoder
    said = capsys.readouterr().err
    assert said.startswith("model: a GemmaForCausalLM runs as transformers wrote it, slower than the families that")
    assert said.count("\n") == 1
