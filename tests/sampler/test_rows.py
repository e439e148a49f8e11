"""Rows in flight: joining late, rounded shapes, late looks, room that is kept; each against one row at a time."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from grpo.sampler import Sampler, rows
from grpo.tree import trunk_length
from tests.fakes.models import byte_tokenizer, tiny_policy
from tests.sampler.test_generate import ENDS, RUN, count_tokens, make_sampler, rows_of

TRUNK = list(range(30, 60))
PROMPTS = [[*TRUNK, *branch] for branch in ([1, 2], [3], [1, 4, 5, 6], [7], [8, 9], [], [2, 2, 2])]
OPTIONS = {"group_size": 3, "max_new_tokens": 17} | RUN


def one_at_a_time(sampler, prompts=PROMPTS, **changes):
    """Every group sampled alone: nothing joins, and nothing is beside it but its siblings."""
    groups = [sampler.generate([p], prompt_index=[i], **OPTIONS | changes) for i, p in enumerate(prompts)]
    return [row for group in groups for row in rows_of(group)]


def assert_rows(completions, expected):
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(rows_of(completions), expected, strict=True):
        assert ids == expected_ids
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-12, atol=1e-12)


def test_a_row_alone_is_what_it_is_among_its_siblings():
    sampler = make_sampler(eos=ENDS)
    for i, prompt in enumerate(PROMPTS):
        options = {"prompt_index": [i]} | OPTIONS
        group = rows_of(sampler.generate([prompt], **options))
        assert_rows(sampler.generate([prompt], **options | {"group_size": 1}), group[:1])


@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("check_every", [1, 5, 100])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 12, None])
def test_refilling_rounding_and_late_looks_change_no_row(grain, check_every, max_rows):
    sampler = make_sampler(eos=ENDS)
    expected = one_at_a_time(sampler)
    assert len({len(ids) for ids, _ in expected}) > 5
    sampler.rows.grain, sampler.check_every = grain, check_every
    assert_rows(sampler.generate(PROMPTS, max_rows=max_rows, **OPTIONS), expected)


def test_a_stop_string_cuts_exactly_although_looks_are_late():
    sampler = make_sampler(eos=256)
    plain = sampler.generate(PROMPTS, stop=["5", "a"], **OPTIONS)
    assert 0 < int(plain.finished.sum()) < len(plain.finished)
    sampler.check_every = 7
    late = sampler.generate(PROMPTS, stop=["5", "a"], max_rows=9, **OPTIONS)
    assert_rows(late, rows_of(plain))
    assert late.texts == plain.texts and torch.equal(late.finished, plain.finished)


def test_prompts_are_attended_to_where_the_policy_is(monkeypatch):
    """Their tree is laid out on the host, where nothing of it may stay that a GPU has to read."""
    sampler, asked, prefill = make_sampler(eos=ENDS), [], rows.PrefillAttention
    monkeypatch.setattr(
        rows, "PrefillAttention", lambda *args, **kept: asked.append(args[-1]) or prefill(*args, **kept)
    )
    sampler.generate(PROMPTS, max_rows=6, **OPTIONS)
    assert len(asked) > 1 and set(asked) == {sampler.policy.device}


def test_the_trunk_is_computed_once_and_rows_in_flight_stay_within_their_bound():
    sampler = make_sampler(eos=ENDS)
    whole = count_tokens(sampler.policy)
    completions = sampler.generate(PROMPTS, max_rows=6, **OPTIONS)
    assert [tokens for tokens in whole if tokens >= len(TRUNK)] == [len(TRUNK) + 2 + 1]  # with the first two prompts
    own = int(completions.completion_mask.sum()) - 3 * len(PROMPTS)  # the first token of a row comes from its prompt
    # One prompt ends with the trunk's last token, which is therefore no part of it but the first of every branch.
    branches = sum(len(prompt) - len(TRUNK) + 1 for prompt in PROMPTS[2:])
    assert 0 < sum(whole) - (len(TRUNK) + 2 + 1) - own <= branches


def test_room_is_kept_where_shapes_are_rounded_and_new_weights_are_seen():
    policy = tiny_policy(precision="fp64")
    sampler = Sampler(policy, byte_tokenizer())
    sampler.rows.grain, sampler.check_every = 4, 3
    sampler.generate(PROMPTS, max_rows=12, **OPTIONS)
    attention = sampler.rows.attention
    buffers = [attention.own[0][0], attention.branch[1][1], attention.trunk[0][1], sampler.rows.ids]
    with torch.no_grad():
        policy.model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    plain = Sampler(copy.deepcopy(policy), byte_tokenizer())
    for prompts in (PROMPTS[2:6], PROMPTS[4:6]):  # the same trunk; then fewer rows than there is room for
        assert_rows(sampler.generate(prompts, **OPTIONS), rows_of(plain.generate(prompts, **OPTIONS)))
        attention = sampler.rows.attention
        now = [attention.own[0][0], attention.branch[1][1], attention.trunk[0][1], sampler.rows.ids]
        assert all(buffer is before for buffer, before in zip(now, buffers, strict=True))
    for prompt in PROMPTS:  # alone it would be its own trunk
        assert_rows(
            sampler.generate([prompt], trunk_tokens=trunk_length(PROMPTS), **OPTIONS),
            rows_of(plain.generate([prompt], **OPTIONS)),
        )
        assert sampler.rows.attention is attention
    longer = [[*prompt, *range(60, 90)] for prompt in PROMPTS]
    assert_rows(sampler.generate(longer, **OPTIONS), rows_of(plain.generate(longer, **OPTIONS)))


def test_on_a_cpu_the_room_is_freed_and_given_back(monkeypatch):
    sampler, given = make_sampler(), []
    monkeypatch.setattr(rows.heap, "give_back", lambda: given.append(sampler.rows.attention))
    sampler.generate(PROMPTS, **OPTIONS)
    assert sampler.rows.attention is None and given == [None]


def test_few_shapes_occur_where_they_are_rounded():
    sampler, shapes = make_sampler(eos=ENDS), set()
    sampler.rows.grain = 4
    step = sampler.rows._step
    sampler.rows._step = lambda: shapes.add(sampler.rows.attention.shape[:2]) or step()
    sampler.generate(PROMPTS, **OPTIONS | {"group_size": 1})
    assert shapes == {(7, 7), (4, 4)}  # the most there is room for, and a multiple


class Captured:
    """torch.cuda without a GPU: what is captured leaves no trace, and a replay runs it."""

    def __init__(self, monkeypatch, rows):
        self.rows, self.pools = rows, []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "current_stream": lambda: stream,
            "stream": nullcontext,
            "CUDAGraph": lambda: SimpleNamespace(replay=rows._step),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        rows.warming = stream
        forget = rows._forget
        rows._forget = lambda: (forget(), setattr(rows, "pool", object()))
        rows.decode = lambda steps: [(rows._replay(), rows.attention.advance()) for _ in range(steps)]

    @contextmanager
    def graph(self, graph, pool):
        self.pools.append(pool)
        buffers = [x for x in vars(self.rows).values() if isinstance(x, torch.Tensor)]
        buffers += [x for x in vars(self.rows.attention).values() if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in buffers]
        yield
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def test_graphs_of_a_room_share_memory_and_their_warming_up_leaves_no_trace(monkeypatch):
    sampler = make_sampler(eos=ENDS)
    expected = one_at_a_time(sampler)
    sampler.rows.grain, sampler.check_every = 4, 3
    captured = Captured(monkeypatch, sampler.rows)
    assert_rows(sampler.generate(PROMPTS, max_rows=12, **OPTIONS), expected)
    assert len(captured.pools) == len(sampler.rows.graphs) > 3 and len(set(captured.pools)) == 1
    assert_rows(sampler.generate(PROMPTS, max_rows=12, **OPTIONS), expected)
    assert len(captured.pools) == len(sampler.rows.graphs), "nothing is captured twice"
    sampler.generate([[1, *prompt] for prompt in PROMPTS], max_rows=12, **OPTIONS)  # another trunk, another room
    assert len(set(captured.pools)) == 2 and captured.pools[-1] is sampler.rows.pool
    assert captured.pools.count(sampler.rows.pool) == len(sampler.rows.graphs), "no graph outlives its room"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision, prompts, tokens", [("fp32", 5, 34), ("bf16", 1, 3)])  # half: kernels, interpreted
def test_captured_steps_draw_what_the_plain_ones_draw(precision, prompts, tokens):
    policy = tiny_policy(precision=precision).cuda()
    captured, plain = Sampler(policy, byte_tokenizer()), Sampler(policy, byte_tokenizer())
    plain.rows._replay = plain.rows._step
    for step in (1, 2):
        options = OPTIONS | {"step": step, "max_new_tokens": tokens, "max_rows": 3 * prompts // 2}
        ours, theirs = (sampler.generate(PROMPTS[:prompts], **options) for sampler in (captured, plain))
        assert torch.equal(ours.completion_ids, theirs.completion_ids)
        torch.testing.assert_close(ours.sampling_logprobs, theirs.sampling_logprobs, rtol=1e-5, atol=1e-5)
        captured_shapes = len(captured.rows.graphs)
        assert captured_shapes > (0 if captured.rows.fused else 1)
        with torch.no_grad():
            policy.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
            policy.head.mul_(1.1)
        captured.refresh(policy), plain.refresh(policy)
    if precision == "bf16":
        captured.generate(PROMPTS[:1], **OPTIONS | {"max_new_tokens": 1})
        assert torch.equal(captured.rows.rounded_head[: policy.vocab_size], policy.head.bfloat16())
