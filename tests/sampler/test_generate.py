"""The sampler against transformers' `generate` and the learner's log-probabilities; what ends a row, and where."""

import inspect
import itertools

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo.batch import Batch
from grpo.policy import load_policy, token_logprobs
from grpo.sampler import Sampler
from grpo.sampler import rows as rows_module
from tests.fakes.models import FAMILIES, byte_tokenizer, plain_twin, save_tiny, tiny_policy

# the first three share a beginning, two of them more; the last shares nothing
PROMPTS = [[10, 20, 30, 40], [10, 20, 31], [10, 20, 30, 41, 42], [7, 8]]
TRIE_TOKENS = 4 + 1 + 2 + 2
RUN = {"temperature": 1.0, "seed": 3, "step": 1}
ENDS = list(range(0, 257, 8))  # so many EOS ids that rows end at different times


def make_sampler(family="qwen2", precision="fp64", eos=256, tokenizer=None, **changes):
    policy = tiny_policy(family, precision, tokenizer, **changes)
    policy.model.generation_config.eos_token_id = eos
    return Sampler(policy, byte_tokenizer() if tokenizer is None else tokenizer)


def batch_of(prompts, completions):
    return Batch(prompts, completions.completion_ids, completions.completion_mask)


def rows_of(completions):
    """Unpadded rows: ids and log-probabilities."""
    lengths = completions.completion_mask.sum(1).tolist()
    assert torch.equal(completions.completion_mask, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    pairs = zip(completions.completion_ids, completions.sampling_logprobs, lengths, strict=True)
    return [(ids[:n].tolist(), logprobs[:n]) for ids, logprobs, n in pairs]


@pytest.fixture
def follow(monkeypatch):
    """Make the sampler draw given tokens: `follow({(prompt, sample): ids})`, whatever row they have moved to."""

    def install(script):
        def streams(seed, purpose, step, prompt, sample):
            return 1000 * prompt + sample

        def uniforms_at(stream, token):
            pairs = zip(stream.tolist(), token.tolist(), strict=True)
            return torch.tensor([script[divmod(s, 1000)][t] for s, t in pairs], dtype=torch.float64)

        def sample(logits, u, temperature, masses):
            assert len(logits) == len(u)
            return u.long(), -u

        monkeypatch.setattr(rows_module, "streams", streams)
        monkeypatch.setattr(rows_module, "uniforms_at", uniforms_at)
        monkeypatch.setattr(rows_module, "sample", sample)

    return install


# ---- equal to the plain path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_of_transformers(family):
    sampler = make_sampler(family, "fp32", vocab_size=257)
    plain = plain_twin(sampler.policy, family, vocab_size=257)

    def generate(prompt, eos):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 0}
        return plain.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    eos = [256, generate(PROMPTS[0], 256)[4]]  # so that the first row, at least, ends early
    sampler = make_sampler(family, "fp32", eos, vocab_size=257)
    ours = sampler.generate(PROMPTS, group_size=2, max_new_tokens=12, **RUN | {"temperature": 0})
    theirs = [generate(prompt, eos) for prompt in PROMPTS for _ in range(2)]
    assert [ids for ids, _ in rows_of(ours)] == theirs
    assert ours.finished.tolist() == [row[-1] in eos for row in theirs] and ours.finished[0]
    assert len({len(row) for row in theirs}) > 1
    logprobs, _ = token_logprobs(sampler.policy, batch_of(PROMPTS, ours), 1.0)  # greedy: those at temperature 1
    torch.testing.assert_close(ours.sampling_logprobs, logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_c11_c21_the_sampler_and_the_learner_agree(family, tied):
    sampler = make_sampler(family, eos=ENDS, tie_word_embeddings=tied)
    completions = sampler.generate(PROMPTS, group_size=3, max_new_tokens=20, **RUN | {"temperature": 0.7})
    assert len(set(completions.completion_mask.sum(1).tolist())) > 3
    logprobs, _ = token_logprobs(sampler.policy, batch_of(PROMPTS, completions), 0.7)
    torch.testing.assert_close(completions.sampling_logprobs, logprobs, rtol=1e-9, atol=1e-9)
    assert completions.sampling_logprobs.dtype == torch.float64
    assert (completions.sampling_logprobs[completions.completion_mask] < 0).all()


def test_what_is_drawn_can_be_learned_from():
    completions = make_sampler().generate(PROMPTS, group_size=2, max_new_tokens=4, **RUN)
    fields = (
        completions.completion_ids,
        completions.completion_mask,
        completions.finished,
        completions.sampling_logprobs,
    )
    assert not any(field.is_inference() for field in fields)  # autograd may save none that is


def test_c21_under_bfloat16_the_sampler_stays_close_to_the_learner():
    sampler = make_sampler(precision="bf16", num_hidden_layers=4)
    prompts = [[*range(100, 160), i] for i in range(4)]
    completions = sampler.generate(prompts, group_size=4, max_new_tokens=30, **RUN)
    logprobs, _ = token_logprobs(sampler.policy, batch_of(prompts, completions), 1.0)
    gap = (logprobs - completions.sampling_logprobs).abs()[completions.completion_mask]
    assert completions.sampling_logprobs.dtype == torch.float32
    assert gap.mean() < 2e-3  # attention scores rounded to bfloat16 would make it 1e-2


def test_a_model_of_transformers_will_do():
    policy = tiny_policy()
    model = policy.model.train()
    ours, theirs = (Sampler(source, byte_tokenizer()) for source in (model, policy))
    a, b = (s.generate(PROMPTS, group_size=2, max_new_tokens=5, **RUN) for s in (ours, theirs))
    assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.sampling_logprobs, b.sampling_logprobs)


# ---- randomness and layout -------------------------------------------------------------------------------------------


def test_c17_c28_a_row_does_not_depend_on_the_rest_of_the_batch():
    sampler = make_sampler(eos=ENDS)
    together = rows_of(sampler.generate(PROMPTS, group_size=3, max_new_tokens=20, **RUN))
    assert len({len(ids) for ids, _ in together}) > 3  # rows left, and others moved into their places
    index = [2, 0]
    other = sampler.generate([PROMPTS[i] for i in index], group_size=3, max_new_tokens=20, prompt_index=index, **RUN)
    fewer = sampler.generate(PROMPTS, group_size=2, max_new_tokens=20, **RUN)
    shorter = sampler.generate(PROMPTS, group_size=3, max_new_tokens=4, **RUN)
    layouts = {(2, 0): rows_of(other)[0:3], (0, 0): rows_of(other)[3:6]}
    layouts |= {(i, 0): rows_of(fewer)[2 * i : 2 * i + 2] for i in (1, 3)}
    for (i, j), rows in layouts.items():
        for (ids, logprobs), (expected_ids, expected) in zip(rows, together[3 * i + j :], strict=False):
            assert ids == expected_ids
            torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    assert [ids for ids, _ in rows_of(shorter)] == [ids[:4] for ids, _ in together]
    for row, prompt in enumerate(prompt for prompt in PROMPTS for _ in range(3)):
        i, j = divmod(row, 3)
        alone = sampler.generate([prompt], group_size=j + 1, max_new_tokens=20, prompt_index=[i], **RUN)
        assert rows_of(alone)[j][0] == together[row][0]


def test_c28_every_sample_has_its_own_stream():
    sampler = make_sampler(tie_word_embeddings=False)
    with torch.no_grad():
        sampler.policy.model.lm_head.weight.zero_()  # a uniform distribution: equal rows would be equal streams

    def rows(**changes):
        options = RUN | {"prompt_index": None, "purpose": "train"} | changes
        drawn = sampler.generate([[1, 2]] * 4, group_size=8, max_new_tokens=6, **options).completion_ids
        return {tuple(row) for row in drawn.tolist()}

    runs = [rows(), rows(seed=4), rows(step=2), rows(purpose="evaluation"), rows(prompt_index=[4, 5, 6, 7])]
    assert [len(run) for run in runs] == [32] * 5
    assert len(set.union(*runs)) == 160
    assert rows() == runs[0]  # C29


def test_c28_ranks_draw_what_one_process_draws():
    sampler = make_sampler()
    whole = sampler.generate(PROMPTS, group_size=2, max_new_tokens=6, **RUN).completion_ids.view(4, 2, 6)
    for rank in range(3):
        index = list(range(rank, 4, 3))
        part = sampler.generate([PROMPTS[i] for i in index], group_size=2, max_new_tokens=6, prompt_index=index, **RUN)
        assert torch.equal(part.completion_ids.view(-1, 2, 6), whole[index])


def test_c12_samples_come_from_the_softmax_that_is_learned():
    # a vocabulary of four words and an end; all 85 completions of at most three tokens, by their exact probability
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3, "<eos>": 4}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    sampler = make_sampler(eos=4, tokenizer=tokenizer, vocab_size=6, eos_token_id=4, initializer_range=0.15)
    every = [[*words, 4] for n in range(3) for words in itertools.product(range(4), repeat=n)]
    every += [list(words) for words in itertools.product(range(4), repeat=3)]
    ids = torch.tensor([row + [0] * (3 - len(row)) for row in every])
    mask = torch.arange(3) < torch.tensor([len(row) for row in every])[:, None]
    exact = token_logprobs(sampler.policy, Batch([[0, 1]], ids, mask), 1.3)[0].sum(1).exp().detach()
    assert len(every) == 85 and abs(float(exact.sum()) - 1) < 1e-12

    drawn = sampler.generate([[0, 1]], group_size=6000, max_new_tokens=3, **RUN | {"temperature": 1.3})
    counts = dict.fromkeys(map(tuple, every), 0)
    for row, _ in rows_of(drawn):
        counts[tuple(row)] += 1
    expected, observed = 6000 * exact, torch.tensor(list(counts.values()), dtype=torch.float64)
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    assert len(expected) > 40 and stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_c12_no_option_cuts_the_distribution():
    options = set(inspect.signature(Sampler.generate).parameters) - {"self", "prompt_ids"}
    assert options == {
        *("group_size", "max_new_tokens", "temperature", "seed", "step", "prompt_index", "stop", "purpose"),
        *("max_rows", "trunk_tokens"),  # how the work is done
    }


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_c41_vocabulary_rows_that_the_tokenizer_lacks_are_never_sampled(temperature):
    sampler = make_sampler(tie_word_embeddings=False)
    options = {"group_size": 8, "max_new_tokens": 8} | RUN | {"temperature": temperature}
    before = sampler.generate(PROMPTS, **options)
    with torch.no_grad():
        sampler.policy.model.lm_head.weight[257:] = 50.0  # they would win, or take all the mass, half of the time
    after = sampler.generate(PROMPTS, **options)
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert torch.equal(before.sampling_logprobs, after.sampling_logprobs)


# ---- what is computed ------------------------------------------------------------------------------------------------


def count_tokens(policy):
    """The number of tokens of every forward from now on."""
    counts = []
    policy.model.get_input_embeddings().register_forward_hook(lambda module, args, out: counts.append(args[0].numel()))
    return counts


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_c38_prompts_are_computed_once_and_finished_rows_leave(activation_checkpointing, tmp_path):
    policy, tokenizer = load_policy(save_tiny(tmp_path), activation_checkpointing=activation_checkpointing)
    policy.model.generation_config.eos_token_id = ENDS
    counts = count_tokens(policy)
    completions = Sampler(policy, tokenizer).generate(PROMPTS, group_size=5, max_new_tokens=12, **RUN)
    lengths = completions.completion_mask.sum(1)
    assert counts[0] == TRIE_TOKENS  # a trie's tokens, whatever the group size
    # every drawn token goes through the model once, but the last of its row
    assert counts[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]
    assert counts[1] < 20 and sum(counts) == TRIE_TOKENS + int((lengths - 1).sum())


def test_c38_rows_that_a_stop_string_ends_leave_too():
    sampler = make_sampler(eos=256)
    counts = count_tokens(sampler.policy)
    stop = [chr(i) for i in range(33, 127, 3)]
    completions = sampler.generate(PROMPTS, group_size=5, max_new_tokens=12, stop=stop, **RUN)
    lengths = completions.completion_mask.sum(1)
    assert completions.finished.any() and len(lengths.unique()) > 3
    assert counts[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]


def test_c38_equal_prompts_are_computed_once():
    sampler = make_sampler()
    counts = count_tokens(sampler.policy)
    sampler.generate([[1, 2, 3]] * 4, group_size=2, max_new_tokens=1, **RUN)
    assert counts == [3]


def test_refresh_copies_the_weights_in_place():
    policy = tiny_policy(precision="bf16")
    sampler = Sampler(policy, byte_tokenizer())
    places = [parameter.data_ptr() for parameter in sampler.policy.parameters()]
    before = sampler.generate(PROMPTS, group_size=2, max_new_tokens=6, **RUN)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    stale = sampler.generate(PROMPTS, group_size=2, max_new_tokens=6, **RUN)
    assert torch.equal(stale.sampling_logprobs, before.sampling_logprobs)
    sampler.refresh(policy)
    fresh = sampler.generate(PROMPTS, group_size=2, max_new_tokens=6, **RUN)
    expected = Sampler(policy, byte_tokenizer()).generate(PROMPTS, group_size=2, max_new_tokens=6, **RUN)
    assert torch.equal(fresh.sampling_logprobs, expected.sampling_logprobs)
    assert not torch.equal(fresh.sampling_logprobs, before.sampling_logprobs)
    assert places == [parameter.data_ptr() for parameter in sampler.policy.parameters()]
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_without_autocast_the_policys_own_weights_are_read():
    policy = tiny_policy()
    sampler = Sampler(policy, byte_tokenizer())
    assert sampler.policy is policy
    sampler.refresh(policy)
    assert all(parameter.requires_grad for parameter in policy.parameters())


# ---- what ends a row -------------------------------------------------------------------------------------------------

WORDS = ["end. More", "\n\nQues", "tion: Tom", "xS", "TOPy", "XbYa", " end"]


def drawn(pieces):
    """Token ids: one for a word of `WORDS`, else one per byte."""
    tokenizer = byte_tokenizer(WORDS)
    ids = [[257 + WORDS.index(p)] if p in WORDS else tokenizer(p).input_ids for p in pieces]
    return [i for piece in ids for i in piece]


@pytest.mark.parametrize(
    ("pieces", "stop", "kept", "text"),
    [
        pytest.param(["abSTOPxyz"], ["STOP"], 6, "ab", id="across tokens"),
        pytest.param(["STSTOP"], ["STOP"], 6, "ST", id="a false start"),
        pytest.param(["caféz"], ["é"], 5, "caf", id="a character of two tokens"),
        pytest.param(["hi😀x"], ["😀"], 6, "hi", id="a character of four tokens"),
        pytest.param(["é😀.x"], ["😀."], 7, "é", id="multi-byte characters, then ASCII"),
        pytest.param(["a\n\nQ"], ["\n\n"], 3, "a", id="ends with white space"),
        pytest.param(["a", " end", " b"], ["end "], 3, "a ", id="ends with the space of the next token"),
        pytest.param(["the ", "end. More", "!"], ["end."], 5, "the ", id="text after it in its token"),
        pytest.param(["4", "\n\nQues", "tion: Tom", "x"], ["\n\nQuestion:"], 3, "4", id="over two long tokens"),
        pytest.param(["a", "xS", "TOPy"], ["STOP"], 3, "ax", id="begins and ends inside tokens"),
        pytest.param(["abcd"], ["c", "b"], 2, "a", id="the first of several"),
        pytest.param(["XbYa", "b"], ["a", "b"], 1, "X", id="the first of several in one token"),
        pytest.param(["S"], ["S"], 1, "", id="at once"),
    ],
)
@pytest.mark.parametrize("room", [0, 3])
def test_c14_c16_a_stop_string_ends_the_row_with_the_token_that_completes_it(pieces, stop, kept, text, room, follow):
    ids = drawn(pieces)
    follow({(0, 0): ids + [0] * 10})
    sampler = make_sampler(tokenizer=byte_tokenizer(WORDS), vocab_size=300)
    result = sampler.generate([[1, 2]], group_size=1, max_new_tokens=kept + room, stop=stop, **RUN)
    assert result.completion_ids.tolist() == [ids[:kept]]
    assert result.completion_mask.all() and result.finished.tolist() == [True]
    assert result.texts == [text]
    assert result.sampling_logprobs.tolist() == [[-float(i) for i in ids[:kept]]]


@pytest.mark.parametrize(
    ("text", "stop"),
    [("abSTO", ["STOP"]), ("aèb", ["é"]), ("a\n b", ["\n\n"]), ("stop", ["STOP"]), ("abc", [])],
)
def test_c16_nothing_else_ends_a_row(text, stop, follow):
    ids = byte_tokenizer()(text).input_ids
    follow({(0, 0): ids})
    result = make_sampler().generate([[1, 2]], group_size=1, max_new_tokens=len(ids), stop=stop, **RUN)
    assert result.completion_ids.tolist() == [ids] and result.texts == [text]
    assert result.finished.tolist() == [False]


@pytest.mark.parametrize("eos", [256, 10])
@pytest.mark.parametrize("room", [0, 3])
def test_c14_c15_every_eos_ends_a_row_at_the_cap_too_and_stays_in_the_mask(eos, room, follow):
    ids = [*byte_tokenizer()("ab").input_ids, eos]
    follow({(0, 0): ids + [0] * 3})
    sampler = make_sampler(eos=[10, 11])
    result = sampler.generate([[1, 2]], group_size=1, max_new_tokens=3 + room, stop=["Z"], **RUN)
    assert result.completion_ids.tolist() == [ids] and result.completion_mask.all()
    assert result.finished.tolist() == [True] and result.texts == ["ab"]


def test_c14_padding_is_by_length_where_pad_is_eos(follow):
    a, b, z = byte_tokenizer()("abZ").input_ids
    script = {(0, 0): [a, 256], (0, 1): [b, a, b, a], (1, 0): [256], (1, 1): [0, z]}
    follow({key: row + [9] * (4 - len(row)) for key, row in script.items()})
    result = make_sampler().generate([[1, 2], [3]], group_size=2, max_new_tokens=4, stop=["Z"], **RUN)
    expected = [script[key] for key in sorted(script)]
    assert result.completion_ids.tolist() == [row + [0] * (4 - len(row)) for row in expected]
    assert result.completion_mask.tolist() == [[t < len(row) for t in range(4)] for row in expected]
    assert result.finished.tolist() == [True, False, True, True]
    assert result.texts == ["a", "baba", "", byte_tokenizer().decode([0])]
    padded = result.sampling_logprobs[~result.completion_mask]
    assert len(padded) == 7 and (padded == 0).all()
    assert result.completion_mask.dtype == result.finished.dtype == torch.bool
    assert result.completion_ids.dtype == torch.int64


def test_the_longest_row_sets_the_width(follow):
    follow({(0, 0): [5, 256], (0, 1): [256]})
    result = make_sampler().generate([[1]], group_size=2, max_new_tokens=50, **RUN)
    assert result.completion_ids.tolist() == [[5, 256], [256, 0]]


def test_a_model_without_eos_runs_to_the_cap():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    sampler = make_sampler(eos=None, tokenizer=tokenizer, eos_token_id=None)
    result = sampler.generate(PROMPTS, group_size=2, max_new_tokens=5, **RUN)
    assert result.completion_mask.all() and result.completion_ids.shape == (8, 5) and not result.finished.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size: 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -0.5}, "temperature: -0.5"),
        ({"stop": ["x", ""]}, "stop: .* holds an empty string"),
        ({"prompt_ids": []}, "prompt_ids"),
        ({"prompt_ids": [[1], []]}, "prompt_ids"),
    ],
)
def test_what_makes_no_sense_is_an_error(changes, message):
    options = {"prompt_ids": [[1]], "group_size": 1, "max_new_tokens": 1} | RUN | changes
    with pytest.raises(ValueError, match=message):
        make_sampler().generate(**options)
