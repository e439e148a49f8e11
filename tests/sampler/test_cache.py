"""Decoding attention against the dense attention of each row, while rows leave."""

import numpy as np
import pytest
import torch

from grpo.policy.attention import PrefillAttention, TreeAttention
from grpo.sampler.cache import DecodeAttention
from grpo.tree import build_trie, trunk_length
from tests.fakes.models import Sizes
from tests.policy.test_attention import EXACT, HKV, D, H, R, dense, random_heads

PROMPTS = {
    "one prompt": [[1, 2, 3]],
    "a trunk": [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]],
    "no trunk": [[1, 2, 3], [4], [5, 6]],
    "equal prompts": [[1, 2], [1, 2], [1, 2, 3]],
    "a prompt that is the trunk": [[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]],
    "shared below the trunk": [[1, 2, 3, 4], [1, 2, 3, 5], [1, 6, 7], [1, 6, 8], [1, 9]],
}
LAYERS = 2


class Decoding:
    """A `DecodeAttention` with random keys and values, and the dense attention of each row beside it."""

    def __init__(self, prompts, group_size, max_new_tokens, dtype=torch.float64, seed=0, grain=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.max_new_tokens = dtype, max_new_tokens
        trie = build_trie(prompts)
        position_ids, subtree_end = torch.from_numpy(trie.position_ids), torch.from_numpy(trie.subtree_end)
        prefill = PrefillAttention(position_ids, subtree_end, R)
        S = len(position_ids)
        self.history = []  # [layer][row]: keys and values, 2 x [n,Hkv,d]
        for layer in range(LAYERS):
            query, key, value = self.random(H, S), self.random(HKV, S), self.random(HKV, S)
            out = prefill.attend(layer, query, key, value, 0.7)
            expected = TreeAttention(position_ids, subtree_end, R).attend(0, query, key, value, 0.7)
            assert torch.equal(out, expected)
            rows = [torch.from_numpy(path) for path in trie.paths for _ in range(group_size)]
            self.history.append([(key[path], value[path]) for path in rows])
        trunk = trunk_length(prompts)
        room = [(k[:, :trunk].clone(), v[:, :trunk].clone()) for k, v in prefill.kept]
        sizes = {"max_rows": len(prompts) * group_size, "max_groups": len(prompts), "max_new_tokens": max_new_tokens}
        self.decode = DecodeAttention(room, max_branch=max(map(len, prompts)) - trunk, grain=grain, **sizes)
        self.decode.join(prefill.kept, [torch.from_numpy(path[trunk:]) for path in trie.paths], group_size)
        self.alive = list(range(len(prompts) * group_size))

    def random(self, heads, n):
        """[n,heads,d]."""
        return torch.randn(n, heads, D, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def step(self, autocast=False):
        """One token for every row alive: our output and the dense one, [n,H,d] each, of every layer."""
        n, pairs = len(self.alive), []
        self.decode.begin()
        padding = self.decode.shape[0] - n
        for layer in range(LAYERS):
            query, key, value = self.random(H, n), self.random(HKV, n), self.random(HKV, n)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                padded = (torch.cat([x, self.random(x.shape[1], padding)]) for x in (query, key, value))
                ours = self.decode.attend(layer, *padded, 0.7)[:n]
            theirs = []
            for i, row in enumerate(self.alive):
                keys, values = self.history[layer][row]
                keys, values = torch.cat([keys, key[[i]]]), torch.cat([values, value[[i]]])
                self.history[layer][row] = keys, values
                everything = torch.ones(1, len(keys), dtype=torch.bool)
                ready = (x.double() for x in (query[[i]], keys, values))
                theirs.append(dense(*ready, everything, 0.7)[0])
            pairs.append((ours, torch.stack(theirs)))
        self.decode.lengths[: n + padding] += 1
        self.decode.advance()
        return pairs

    def drop(self, finished):
        alive = torch.tensor([row not in finished for row in self.alive])
        order = self.decode.keep(alive)
        kept = [self.alive[i] for i in order.tolist()]
        assert sorted(kept) == sorted(row for row in self.alive if row not in finished)
        stays = [i for i in range(len(kept)) if self.alive[i] not in finished]
        assert all(kept[i] == self.alive[i] for i in stays)  # only rows from the end move
        self.alive = kept


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("grain", [1, 2, 4])
def test_decode_attention_equals_dense_attention_while_rows_leave(prompts, group_size, grain):
    """Also where shapes are rounded up, as for captured graphs: rows and tokens that pad change nothing."""
    run = Decoding(prompts, group_size, max_new_tokens=8, grain=grain)
    order = torch.randperm(len(run.alive), generator=torch.Generator().manual_seed(len(prompts))).tolist()
    for t in range(8):
        for ours, theirs in run.step():
            torch.testing.assert_close(ours, theirs, **EXACT)
        leaving = order[2 * t : 2 * t + 2] if t else order[:0]  # none first, then two at a time, the last one stays
        if leaving and len(run.alive) > len(leaving):
            run.drop(set(leaving))


def test_rows_may_leave_before_the_first_token_and_whole_groups_at_once():
    run = Decoding(PROMPTS["shared below the trunk"], 2, max_new_tokens=4)
    run.drop({0, 1, 4, 5, 6, 7})  # groups 0, 2 and 3: more than half, so their branches are forgotten
    assert run.decode.num_groups == 2
    for finished in ({2}, {9}, {8}):
        for ours, theirs in run.step():
            torch.testing.assert_close(ours, theirs, **EXACT)
        run.drop(finished)
    assert run.alive == [3]
    for ours, theirs in run.step():
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_c27_decode_scores_are_float32_as_in_learning(dtype):
    run = Decoding(PROMPTS["a trunk"], 2, max_new_tokens=3, dtype=dtype)
    for _ in range(3):
        for ours, theirs in run.step(autocast=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("grain", [1, 2])
def test_the_prompt_is_not_copied_per_row(grain):
    trunk, G = list(range(100, 160)), 32
    run = Decoding([[*trunk, 1], [*trunk, 2]], G, max_new_tokens=2, grain=grain)
    assert run.decode.trunk[0][0].shape[1] == len(trunk) and run.decode.branch[0][0].shape[::2] == (2, 1)
    n = 2 * G
    inputs = run.random(H, n), run.random(HKV, n), run.random(HKV, n)
    run.decode.begin()
    with Sizes() as sizes:
        run.decode.attend(0, *inputs, 1.0)
    largest = H * n * D if grain == 1 else H * n * (len(trunk) + 1 + 2)  # what comes out; the scores of one softmax
    assert max(shape.numel() for shape in sizes.shapes) == largest < n * len(trunk) * HKV * D


def test_layers_run_once_each_and_in_order():
    trie = build_trie([[1, 2]])
    prefill = PrefillAttention(torch.from_numpy(trie.position_ids), torch.from_numpy(trie.subtree_end), R)
    with pytest.raises(ValueError, match="layer 1 attends after 0 others; layers must run once, in order"):
        prefill.attend(1, *random_heads(2), 1.0)


def test_prompts_that_join_later_read_what_the_first_ones_read():
    """Where decoding keeps keys and values in less than they are computed in, all prompts see them rounded."""
    prompts, rounded_to = PROMPTS["a trunk"], torch.bfloat16
    trie, later = build_trie(prompts), build_trie([prompts[0], prompts[2]])
    plans = [(torch.from_numpy(x.position_ids), torch.from_numpy(x.subtree_end), R) for x in (trie, later)]
    inputs = [x.detach() for x in random_heads(len(trie.position_ids))]
    whole = PrefillAttention(*plans[0], rounded_to=rounded_to)
    expected = whole.attend(0, *inputs, 0.7)
    assert all(x.equal(x.to(rounded_to).to(x.dtype)) for x in whole.kept[0])

    places = torch.from_numpy(np.concatenate([trie.paths[0], trie.paths[2][2:]]))
    trunk = [tuple(x[:, :2].to(rounded_to) for x in whole.kept[0])]
    joining = PrefillAttention(*plans[1], trunk, rounded_to=rounded_to)
    ours = joining.attend(0, *(x[places[2:]] for x in inputs), 0.7)
    torch.testing.assert_close(ours, expected[places[2:]], **EXACT)
