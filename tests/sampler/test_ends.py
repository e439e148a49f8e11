"""Which tokens end a row and which its text holds, where ids have gaps and special tokens are tags or stop strings."""

import pytest
import torch

from grpo.batch import Batch
from grpo.policy import Policy, load_policy, token_logprobs
from grpo.sampler import Sampler
from grpo.sampler.stops import StopStrings
from tests.fakes.models import byte_tokenizer, plain_twin, tiny_model, tiny_policy
from tests.fakes.puppet import GREEDY, drawn, ids, puppet_sampler, saved_puppet, special_tokenizer

GAP = {"<eos>": 300}
CHAT = {"<eos>": 256, "<|im_end|>": 257, "<pad>": 258}


def test_c43_an_eos_behind_a_gap_in_the_ids_ends_a_row(tmp_path):
    """The kind: a bound taken from the number of tokens, where ids have gaps. It is the highest id + 1."""
    tokenizer = special_tokenizer(GAP)
    sampler = puppet_sampler(tmp_path, tokenizer, ids(tokenizer, "18") + [300])
    assert drawn(sampler) == (ids(tokenizer, "18") + [300], "18", True)
    assert sampler.policy.vocab_size == 301 == len(sampler.policy.head)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_c43_ids_that_no_token_has_are_never_sampled(temperature, tmp_path):
    """Even where the model would write nothing else: 280 lies in the gap."""
    sampler = puppet_sampler(tmp_path, special_tokenizer(GAP), [280])
    got = sampler.generate([[65]], **GREEDY | {"group_size": 20, "temperature": temperature})
    assert all(i <= 255 or i == 300 for i in got.completion_ids[got.completion_mask].tolist())


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("tokenizer", [special_tokenizer(GAP), byte_tokenizer()], ids=["gap", "none"])
def test_c43_c21_sampler_and_learner_leave_the_same_ids_out(tokenizer, precision):
    policy = tiny_policy("llama", precision, tokenizer, vocab_size=310, eos_token_id=None)
    twin = plain_twin(policy, "llama", vocab_size=310, eos_token_id=None)
    got = Sampler(policy, tokenizer).generate([[65, 66]], **GREEDY | {"group_size": 8, "temperature": 0.9})
    batch = Batch([[65, 66]], got.completion_ids, got.completion_mask)
    learned, entropy = token_logprobs(policy, batch, 0.9)
    torch.testing.assert_close(got.sampling_logprobs, learned, rtol=1e-4, atol=1e-4)
    present = [i for i in range(policy.vocab_size) if policy.absent is None or not policy.absent[i]]
    assert len(present) == 257
    for row, length in zip(got.completion_ids, got.completion_mask.sum(1).tolist(), strict=True):
        sequence = torch.tensor([[65, 66, *row[:length].tolist()]])
        logits = twin(input_ids=sequence).logits[0, 1:-1, present] / 0.9
        among = torch.tensor([present.index(i) for i in row[:length].tolist()])
        plain = torch.log_softmax(logits, -1).gather(1, among[:, None])[:, 0]
        torch.testing.assert_close(learned[(got.completion_ids == row).all(1)][0][:length], plain, rtol=1e-4, atol=1e-4)
    (learned.sum() + entropy.sum()).backward()
    gradient = policy.model.get_output_embeddings().weight.grad
    assert gradient.isfinite().all() and torch.isfinite(entropy).all()


def test_c43_an_id_that_the_model_has_no_row_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs 301 output rows for its tokenizer, and has 300"):
        Policy(tiny_model(vocab_size=300), special_tokenizer(GAP))
    sampler = puppet_sampler(tmp_path, special_tokenizer(GAP), [65, 300])
    for wrong in (320, -1):
        with pytest.raises(ValueError, match=f"prompt_ids: token id {wrong} is not one of the model's, .* 0 to 319"):
            sampler.generate([[65], [66, wrong]], **GREEDY)


@pytest.mark.parametrize("stop", [["<|im_end|>"], ["<|im_end|>\n"], ["8<|im_end|>"], ["zz", "im_end"]])
def test_c44_a_stop_string_that_is_or_holds_a_special_token_ends_a_row(stop, tmp_path):
    """The kind: a string that is looked for in a text that some tokens have been taken out of."""
    tokenizer = special_tokenizer(CHAT)
    chain = ids(tokenizer, "18") + [257] + ids(tokenizer, "\nuser")
    sampler = puppet_sampler(tmp_path, tokenizer, chain)
    tokens, text, finished = drawn(sampler, stop=stop)
    assert tokens == chain[: 4 if stop == ["<|im_end|>\n"] else 3] and finished
    assert text == {"8<|im_end|>": "1", "zz": "18<|"}.get(stop[0], "18")
    assert sampler.stop_strings(tuple(stop)).tokens_to_stop(chain) == len(tokens), "evaluation counts the same"


def test_c44_a_stop_string_that_no_text_has_is_refused():
    tokenizer = special_tokenizer(CHAT, pad="<pad>")
    with pytest.raises(ValueError, match=r"stop: \['<pad>'\] holds the padding token '<pad>'"):
        StopStrings(tokenizer, ["<pad>"])
    assert StopStrings(tokenizer, ["<eos>"]).text([65, 256]) == StopStrings(tokenizer, []).text([65]), (
        "EOS ends it anyway"
    )


def test_c45_special_tokens_but_eos_and_padding_reach_the_reward(tmp_path):
    """The kind: tags that are special tokens, which a reward looks for and never sees."""
    tokenizer = special_tokenizer({"<eos>": 256, "<think>": 257, "</think>": 258, "<pad>": 259}, pad="<pad>")
    chain = [257, *ids(tokenizer, "hm"), 258, 259, *ids(tokenizer, "18"), 256]
    tokens, text, finished = drawn(puppet_sampler(tmp_path, tokenizer, chain))
    assert tokens == chain and text == "<think>hm</think>18" and finished


def test_c45_every_eos_is_left_out_of_the_text(tmp_path):
    tokenizer = special_tokenizer(CHAT)
    policy, tokenizer = load_policy(saved_puppet(tmp_path, tokenizer, ids(tokenizer, "18") + [257]))
    policy.model.generation_config.eos_token_id = [256, 257]
    assert drawn(Sampler(policy, tokenizer)) == (ids(tokenizer, "18") + [257], "18", True)


def test_c54_a_bare_stop_string_is_one_string(tmp_path):
    """The kind: a text where a list of texts is meant, taken letter by letter."""
    tokenizer = special_tokenizer(CHAT)
    sampler = puppet_sampler(tmp_path, tokenizer, ids(tokenizer, "I!answer."))
    assert drawn(sampler, stop="answer")[1] == "I!"
    assert StopStrings(tokenizer, "answer").stop == ("answer",)


def test_c54_prompts_are_token_lists_arrays_or_a_tensor_and_texts_are_refused(tmp_path):
    tokenizer = special_tokenizer(CHAT)
    sampler = puppet_sampler(tmp_path, tokenizer, ids(tokenizer, "18") + [256])
    rows = [[65, 66], [67, 68]]
    expected = sampler.generate(rows, **GREEDY).texts
    for prompts in (
        torch.tensor(rows),
        [torch.tensor(row) for row in rows],
        torch.tensor(rows).numpy(),
        [(65, 66), [67, 68]],
    ):
        assert sampler.generate(prompts, **GREEDY).texts == expected == ["18", "18"]
    for prompts in (["9+9="], "9+9=", [65, 66], torch.tensor([65, 66]), tokenizer(["a"]), [[[65]]]):
        with pytest.raises(
            ValueError, match="prompt_ids: .* is no prompt: must be a list of prompts, each a list of token"
        ):
            sampler.generate(prompts, **GREEDY)
    for prompts in ([], [[65], []], torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="prompt_ids: there has to be a prompt"):
            sampler.generate(prompts, **GREEDY)


@pytest.mark.parametrize("value", ["0", ["0"], [0, None], {"a": 1}, True])
def test_c46_an_eos_that_is_no_token_id_is_a_sentence(value, tmp_path):
    """The kind: a token written at an end that ends no completion. What a config names must be ids."""
    tokenizer = special_tokenizer({"<eos>": 256})
    policy, tokenizer = load_policy(saved_puppet(tmp_path, tokenizer, ids(tokenizer, "18")))
    policy.model.generation_config.eos_token_id = value
    with pytest.raises(
        ValueError, match="model: eos_token_id is .* in its GenerationConfig: must be a token id or a list"
    ):
        Sampler(policy, tokenizer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 2.5}, "group_size: 2.5 must be a whole number, at least 1"),
        ({"group_size": True}, "group_size: True must be a whole number"),
        ({"max_new_tokens": "8"}, "max_new_tokens: '8' must be a whole number"),
        ({"seed": -1}, "seed: -1 must be a whole number, at least 0"),
        ({"seed": 2**63}, "seed: 9223372036854775808 must be a whole number, at least 0 and below 2"),
        ({"step": None}, "step: None must be a whole number"),
        ({"temperature": float("nan")}, "temperature: nan must be a finite number, at least 0"),
        ({"temperature": None}, "temperature: None must be a finite number"),
        ({"purpose": "eval"}, "purpose: 'eval' must be one of train, evaluation"),
        ({"prompt_index": [0, 1]}, "prompt_index: 2 numbers for 1 prompts; must be as many"),
        ({"trunk_tokens": 2}, "trunk_tokens: 2 must be at least 0, and below 2, the shortest prompt's length"),
        ({"trunk_tokens": -1}, "trunk_tokens: -1 must be at least 0"),
        ({"stop": [1]}, r"stop: \[1\] must be one string or a list of strings"),
    ],
)
def test_c54_a_value_that_sampling_can_not_use_is_a_sentence(changes, said):
    """The kind: what the library is given works or is refused in a sentence; some of these killed the process."""
    sampler = Sampler(tiny_policy(), byte_tokenizer())
    with pytest.raises(ValueError, match=said):
        sampler.generate([[65, 66]], **GREEDY | changes)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])  # of our decoder, and of transformers
def test_c54_a_model_of_transformers_in_half_precision_is_sampled_from_as_it_is(family):
    """The kind: as above. Products of float32 and of bfloat16 would meet."""
    policy = Policy(tiny_model(family, dtype=torch.bfloat16), byte_tokenizer())
    got = Sampler(policy, byte_tokenizer()).generate([[65, 66]], **GREEDY | {"group_size": 4, "temperature": 1.0})
    learned, _ = token_logprobs(policy, Batch([[65, 66]], got.completion_ids, got.completion_mask), 1.0)
    assert learned.dtype == got.sampling_logprobs.dtype == torch.float32
    torch.testing.assert_close(got.sampling_logprobs, learned, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("prompts", [None, 5, [[97.5, 98]], [[None]], [[True]], ["text"]])
def test_c54_prompts_that_are_no_token_ids_are_a_sentence(prompts):
    with pytest.raises(
        ValueError, match="prompt_ids: .* is no prompt: must be a list of prompts, each a list of token ids"
    ):
        Sampler(tiny_policy(), byte_tokenizer()).generate(prompts, **GREEDY)


def test_c54_prompts_have_to_share_the_trunk_that_is_named():
    """The kind: as above. The second prompt would be computed behind the first one's tokens, without a word."""
    with pytest.raises(ValueError, match="trunk_tokens: the prompts do not share their first 1 tokens"):
        Sampler(tiny_policy(), byte_tokenizer()).generate([[65, 66], [67, 66]], **GREEDY | {"trunk_tokens": 1})
