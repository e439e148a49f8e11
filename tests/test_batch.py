"""Batches are selected from, joined and moved; rows of a group stay together and in order. Wrong ones are refused."""

import pytest
import torch

from grpo.batch import Batch, Completions

LOGPROBS = ("sampling_logprobs", "old_logprobs", "ref_logprobs")
PER_ROW = ("completion_ids", "completion_mask", "advantages", *LOGPROBS)


def make_batch(**changes):
    """Three prompts, two completions each; row r holds r."""
    number = torch.arange(6.0)
    fields = {
        "prompt_ids": [[1], [2, 2], [3]],
        "completion_ids": torch.arange(6)[:, None].expand(6, 3),
        "completion_mask": torch.arange(6)[:, None] > torch.arange(3),
        "advantages": number,
        "sampling_logprobs": -number[:, None].expand(6, 3),
        "old_logprobs": -2 * number[:, None].expand(6, 3),
        "ref_logprobs": -3 * number[:, None].expand(6, 3),
        "prompt_index": [4, 1, 7],
    }
    return Batch(**fields | changes)


@pytest.mark.parametrize("prompts", [[2, 0], [1], [0, 1, 2], [1, 1], []])
def test_c08_select_takes_whole_groups_in_the_given_order(prompts):
    batch = make_batch()
    part = batch.select(prompts)
    rows = [2 * prompt + j for prompt in prompts for j in range(2)]
    assert part.prompt_ids == [batch.prompt_ids[i] for i in prompts]
    assert part.prompt_index == [batch.prompt_index[i] for i in prompts]
    for name in PER_ROW:
        assert torch.equal(getattr(part, name), getattr(batch, name)[rows]), name
    assert part.group_size == (2 if prompts else 0)


def test_what_is_not_there_stays_absent():
    absent = ("advantages", *LOGPROBS, "prompt_index")
    part = make_batch(**dict.fromkeys(absent)).select([1])
    assert all(getattr(part, name) is None for name in absent)
    assert part.completion_ids[:, 0].tolist() == [2, 3]


def test_advantages_may_be_per_token():
    per_token = torch.arange(18.0).view(6, 3)
    assert torch.equal(make_batch(advantages=per_token).select([2, 1]).advantages, per_token[[4, 5, 2, 3]])


def test_c36_a_selection_is_no_view():
    batch = make_batch(completion_ids=torch.zeros(6, 3, dtype=torch.long), old_logprobs=torch.zeros(6, 3))
    part = batch.select([0, 1, 2])
    part.completion_ids.fill_(9)
    part.old_logprobs.fill_(9)
    assert not batch.completion_ids.any() and not batch.old_logprobs.any()


def test_group_size_comes_from_the_shapes():
    assert make_batch().group_size == 2
    assert Batch([], torch.zeros(0, 1).long(), torch.zeros(0, 1).bool()).group_size == 0


def test_rows_are_taken_each_with_its_own_prompt():
    batch = make_batch()
    part = batch.take([5, 2, 3])
    assert part.prompt_ids == [[3], [2, 2], [2, 2]] and part.prompt_index == [7, 1, 1] and part.group_size == 1
    for name in PER_ROW:
        assert torch.equal(getattr(part, name), getattr(batch, name)[[5, 2, 3]]), name
    assert batch.take([]).group_size == 0 and len(batch.take([]).completion_ids) == 0


def test_a_batch_that_was_taken_apart_is_joined_again():
    batch = make_batch()
    joined = Batch.join([batch.select([0]), batch.select([]), batch.select([1, 2])])
    assert joined.prompt_ids == batch.prompt_ids and joined.prompt_index == batch.prompt_index
    assert all(torch.equal(getattr(joined, name), getattr(batch, name)) for name in PER_ROW)


def test_a_joined_batch_is_padded_to_its_widest_part():
    mask, narrow = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    parts = [
        Batch([[1]], mask * 7, mask, torch.ones(2, 3), mask * -1.0),
        Batch([[2]], narrow * 8, narrow, torch.ones(2, 1), narrow * -2.0),
    ]
    joined = Batch.join(parts)
    assert joined.completion_ids.tolist() == [[7, 7, 7]] * 2 + [[8, 0, 0]] * 2
    assert joined.completion_mask.tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2
    assert joined.sampling_logprobs.tolist() == [[-1.0] * 3] * 2 + [[-2.0, 0, 0]] * 2
    assert joined.advantages.tolist() == [[1.0] * 3] * 2 + [[1.0, 0, 0]] * 2
    assert joined.completions() == [[[7, 7, 7]] * 2, [[8]] * 2]
    assert joined.old_logprobs is joined.prompt_index is None


def test_what_can_not_be_joined_is_a_sentence():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"^join: the parts have the group sizes \[1, 2\]; must be one and the same"):
        Batch.join([batch, batch.take([0])])
    with pytest.raises(ValueError, match="^join: 1 of 2 parts have no ref_logprobs; must be all or none"):
        Batch.join([batch, make_batch(ref_logprobs=None)])
    with pytest.raises(ValueError, match="^join: there is no part"):
        Batch.join([])


def test_a_batch_is_moved_with_all_of_its_tensors():
    moved = make_batch().to("meta")
    assert {getattr(moved, name).device.type for name in PER_ROW} == {"meta"} and moved.prompt_index == [4, 1, 7]


def make_completions(texts: str, width: int) -> Completions:
    """Two prompts, two completions each, which differ in their number."""
    ids = torch.arange(1, 5)[:, None].expand(4, width)
    return Completions(ids, ids > 0, ids[:, 0] > 2, -ids.float(), list(texts))


def test_completions_are_selected_by_prompt_and_joined():
    one, other = make_completions("abcd", 2), make_completions("efgh", 1)
    joined = Completions.join([one.select([1], 2), other.select([1, 0], 2), one.select([], 2)])
    assert joined.texts == list("cdghef") and joined.finished.tolist() == [True] * 4 + [False] * 2
    assert joined.completion_ids.tolist() == [[3, 3], [4, 4], [3, 0], [4, 0], [1, 0], [2, 0]]
    assert joined.completion_mask.tolist() == [[True] * 2] * 2 + [[True, False]] * 4
    assert joined.sampling_logprobs.tolist() == [[-3, -3], [-4, -4], [-3, 0], [-4, 0], [-1, 0], [-2, 0]]


def test_c54_completions_and_prompts_make_a_batch_whatever_holds_the_prompts():
    completions = make_completions("abcd", 3)
    for prompts in ([[5, 6], [7, 8]], torch.tensor([[5, 6], [7, 8]]), [torch.tensor([5, 6]), (7, 8)]):
        batch = completions.batch(prompts, prompt_index=[3, 9])
        assert batch.prompt_ids == [[5, 6], [7, 8]] and batch.prompt_index == [3, 9] and batch.advantages is None
        for name in ("completion_ids", "completion_mask", "sampling_logprobs"):
            assert getattr(batch, name) is getattr(completions, name)


@pytest.mark.parametrize("prompts", [["1+1=", "2+2="], "12", [["1", "+"], ["2", "+"]], [1, 2]])
def test_c54_texts_instead_of_tokens_are_a_sentence(prompts):
    with pytest.raises(ValueError, match="^prompt_ids: .* is no prompt: must be a list of token ids; encode texts"):
        make_completions("abcd", 3).batch(prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [[1], [2], [3], [4]]}, "completion_ids: 6 rows for 4 prompts; must be as many rows for every"),
        ({"prompt_ids": []}, "completion_ids: 6 rows for 0 prompts"),
        ({"completion_mask": torch.ones(6, 3)}, r"completion_mask: is torch.float32; must be torch.bool, True = learn"),
        ({"advantages": torch.ones(3, 2)}, r"advantages: has the shape \(3, 2\); must be \(6,\) or \(6, 3\)"),
        ({"ref_logprobs": torch.ones(6, 2)}, r"ref_logprobs: has the shape \(6, 2\); must be \(6, 3\)"),
    ],
)
def test_c54_a_tensor_that_does_not_belong_is_a_sentence(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_batch(**changes)
