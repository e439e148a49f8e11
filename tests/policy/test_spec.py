"""Every key of a config: it changes the numbers as in transformers, changes nothing, or is refused."""

import copy

import pytest
import torch

from grpo.policy import Policy
from grpo.policy import spec as spec_file
from grpo.policy.spec import FAMILIES
from grpo.tree import pack
from tests.fakes.models import byte_tokenizer, tiny_model

IDS = torch.arange(3, 27)
ALL = frozenset(FAMILIES)
BIASED = {"granite", "llama", "olmo2", "qwen3", "smollm3"}
WINDOWED = {"qwen2", "qwen3", "smollm3"}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
TRIED = {
    "vocab_size": (259, ALL),
    "hidden_size": (24, ALL),
    "intermediate_size": (40, ALL),
    "num_hidden_layers": (3, ALL),
    "num_attention_heads": (2, ALL),
    "num_key_value_heads": (1, ALL),
    "head_dim": (12, ALL),
    "hidden_act": ("gelu", ALL),  # by transformers' own code
    "rms_norm_eps": (0.3, ALL),
    "tie_word_embeddings": (False, ALL),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 77.0}, ALL),
    "rope_scaling": ({"rope_type": "default", "rope_theta": 99.0}, ALL),  # other kinds: test_decoder.py
    "rope_theta": (77.0, ALL),
    "attention_bias": (True, BIASED),
    "mlp_bias": (True, {"granite", "llama", "smollm3"}),
    "no_rope_layers": ([0, 1], {"smollm3"}),
    "no_rope_layer_interval": (2, {"smollm3"}),
    "embedding_multiplier": (3.0, {"granite"}),
    "attention_multiplier": (0.7, {"granite"}),
    "residual_multiplier": (0.4, {"granite"}),
    "logits_scaling": (5.0, {"granite"}),
}
"""For each key that the decoder computes with: a value that is not the default, and the families that know it."""
WINDOWS = {
    "sliding_window": ({"sliding_window": 6}, WINDOWED),  # which have a switch, and it is off
    "use_sliding_window": (WINDOW | {"max_window_layers": 0, "no_rope_layers": [1, 0]}, set()),
    "max_window_layers": (WINDOW | {"max_window_layers": 2}, WINDOWED),
    "layer_types": (WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, set()),
}
"""The same for windows that are shorter than the sequence: who slides them is refused."""
FREE = dict.fromkeys(spec_file.WITHOUT_EFFECT.split(), 7) | {
    "dtype": "float32",
    "torch_dtype": "float32",
    "architectures": ["Other"],
    "auto_map": {"AutoModel": "x"},
    "pretraining_tp": 1,
    "attention_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "id2label": {0: "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "is_encoder_decoder": False,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 5,
    "task_specific_params": {"a": 1},
    "tokenizer_class": "Other",
    "initializer_range": 0.2,
    "num_labels": 2,
    "use_cache": False,
    "transformers_version": "1.0",
}
"""For each key that changes no log-probability here, some value that a config may have."""


def logprobs(model):
    """[S-1] log-probabilities of `IDS` by transformers' own model."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS[None], use_cache=False).logits[0, :-1, :257]
    return torch.log_softmax(logits, -1).gather(1, IDS[1:, None])[:, 0]


def ours(model):
    """The same by a policy over the model, whatever computes it."""
    policy = Policy(copy.deepcopy(model), byte_tokenizer())
    with torch.no_grad():
        return policy(pack([IDS[:1].tolist()], [[IDS[1:].tolist()]]), 1.0)[0]


def made(family, **changes):
    """A tiny model of the family, all of whose random weights depend on the changes' shapes alone."""
    return tiny_model(family, **changes)


def refused(family, **changes):
    """Whether transformers or the policy refuses a model; if neither does, the numbers are compared."""
    try:
        model = made(family, **changes)
        numbers = ours(model)
    except ValueError as error:
        return str(error).startswith(
            ("model: its config has", "a sequence of 23 tokens goes beyond", "Class validation")
        )
    torch.testing.assert_close(numbers, logprobs(model), rtol=1e-4, atol=2e-5)
    return False


def test_every_known_key_is_tried():
    keys = (spec_file.COMPUTED + spec_file.READ_ELSEWHERE).split()
    assert sorted(keys) == sorted(["model_type", *TRIED, *WINDOWS])
    assert FREE.keys() == set(spec_file.WITHOUT_EFFECT.split())


@pytest.mark.parametrize("key", TRIED)
def test_a_key_changes_the_numbers_as_in_transformers_or_is_refused(key):
    value, families = TRIED[key]
    for family in FAMILIES:
        assert refused(family, **{key: value}) == (family not in families), family
        if family in families:
            assert not torch.equal(logprobs(made(family, **{key: value})), logprobs(made(family))), family


@pytest.mark.parametrize("key", WINDOWS)
def test_a_window_that_the_sequence_exceeds_is_refused_where_it_slides(key):
    changes, families = WINDOWS[key]
    assert {family for family in FAMILIES if not refused(family, **changes)} == families


@pytest.mark.parametrize("key", FREE)
def test_a_key_without_effect_changes_nothing(key):
    for family in FAMILIES:
        changed, plain = made(family, **{key: FREE[key]}), made(family)
        plain.load_state_dict(changed.state_dict())
        assert torch.equal(logprobs(changed), logprobs(plain))
        assert torch.equal(ours(changed), ours(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_nobody_knows_is_refused_unless_it_is_empty(family):
    with pytest.raises(ValueError, match=f"its config has use_mup = True, which a {family} decoder does not know"):
        ours(made(family, use_mup=True))
    for empty in (False, None, 0, []):
        assert not refused(family, use_mup=empty)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_other_rows_are_refused(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = made("llama", rope_parameters=rope, original_max_position_embeddings=16)
    with pytest.raises(ValueError, match=f"rope_type '{kind}', under which a row depends on the lengths of others"):
        ours(model)
