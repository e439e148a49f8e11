"""The counter-based uniforms as random numbers, and the tokens drawn with them as a distribution.

The statistical tests use fixed counters, so each of them passes always or never.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch._subclasses import FakeTensorMode

from grpo.sampler.draw import BLOCK, GOLDEN, PURPOSES, _invert, _mix, sample, uniforms

LAST = 1 - 2.0**-53  # the largest uniform there is


def ints(n):
    return torch.arange(n)


def grid(steps=4, prompts=16, samples=16, tokens=1024, seed=0, purpose="train"):
    """[steps, prompts, samples, tokens] uniforms."""
    step, prompt = ints(steps)[:, None, None, None], ints(prompts)[:, None, None]
    return uniforms(seed, purpose, step, prompt, ints(samples)[:, None], ints(tokens))


# ---- uniforms ----------------------------------------------------------------------------------------------------


def test_mix_is_the_published_splitmix64():
    # the first three outputs for the seed 1234567, as in the test vectors of the algorithm's other implementations
    words = 1234567 + torch.tensor(GOLDEN) * torch.tensor([1, 2, 3])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [word % 2**64 for word in _mix(words).tolist()] == expected


@pytest.mark.parametrize(
    ("counter", "expected"),  # worked out with Python's unbounded integers
    [
        ((0, "train", 0, 0, 0, 0), "0x1.f89aa63464ffap-2"),
        ((0, "evaluation", 0, 0, 0, 0), "0x1.7fc8bf5d07269p-1"),
        ((1, "train", 0, 0, 0, 0), "0x1.ca3a62038c700p-4"),
        ((17, "train", 250, 31, 7, 255), "0x1.6cc37318f0de8p-2"),
        ((2**63 - 1, "evaluation", 10**6, 10**5, 63, 32767), "0x1.6c66a92dcf0fcp-2"),
    ],
)
def test_c29_uniforms_are_pinned(counter, expected):
    assert uniforms(*counter).item() == float.fromhex(expected)


def test_uniforms_are_float64_of_the_broadcast_shape():
    result = uniforms(3, "train", 5, ints(4)[:, None], ints(2)[:, None, None], ints(7))
    assert result.shape == (2, 4, 7) and result.dtype == torch.float64
    assert result.min() >= 0 and result.max() < 1
    assert result[1, 2, 3] == uniforms(3, "train", 5, 2, 1, 3)


def test_c28_a_draw_does_not_depend_on_the_layout_of_the_batch():
    whole = grid(1, 8, 4, 16)[0]
    rank_1_of_2 = uniforms(0, "train", 0, torch.tensor([1, 3, 5, 7])[:, None, None], ints(4)[:, None], ints(16))
    assert rank_1_of_2.equal(whole[1::2])


def test_c28_there_are_no_duplicates():
    draws = torch.cat([grid(purpose=purpose, seed=seed).flatten() for purpose in PURPOSES for seed in (0, 1)])
    assert draws.numel() == 2**22 and draws.unique().numel() == draws.numel()


def test_uniforms_are_uniform():
    draws = grid().flatten().numpy()
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((draws * 4096).astype(int), minlength=4096)).pvalue > 1e-3


def test_all_53_bits_are_random():
    bits = (grid().flatten() * 2.0**53).long()
    assert stats.chisquare(torch.bincount(bits & 0xFFF, minlength=4096).numpy()).pvalue > 1e-3  # the lowest twelve
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(53)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / math.sqrt(bits.numel())


def pairs():
    """Neighbours along every counter: (name, first, second), flat."""
    draws = grid(8, 16, 16, 512)
    for axis, name in enumerate(("step", "prompt", "sample", "token")):
        size = draws.shape[axis]
        yield name, draws.narrow(axis, 0, size - 1).flatten(), draws.narrow(axis, 1, size - 1).flatten()
    yield "seed", draws.flatten(), grid(8, 16, 16, 512, seed=1).flatten()
    yield "purpose", draws.flatten(), grid(8, 16, 16, 512, purpose="evaluation").flatten()


@pytest.mark.parametrize("name", ["step", "prompt", "sample", "token", "seed", "purpose"])
def test_c28_neighbouring_counters_are_independent(name):
    first, second = next((a, b) for counter, a, b in pairs() if counter == name)
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(len(first))
    cells = torch.bincount((first * 32).long() * 32 + (second * 32).long(), minlength=1024)
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3
    low = torch.bincount((first * 2.0**53).long() % 32 * 32 + (second * 2.0**53).long() % 32, minlength=1024)
    assert stats.chisquare(low.numpy()).pvalue > 1e-3


def test_flipping_one_bit_of_a_counter_flips_half_of_the_output():
    base, words = ints(2048)[:, None], 1 << ints(20)
    for position in range(4):
        counters = [base if i == position else 5 for i in range(4)]
        flipped = [base ^ words if i == position else 5 for i in range(4)]
        difference = [(uniforms(9, "train", *c) * 2.0**53).long() for c in (counters, flipped)]
        changed = difference[0] ^ difference[1]
        share = torch.stack([(changed >> i & 1).double().mean(0) for i in range(53)])  # [output bit, input bit]
        assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(1024)  # of the 2048, some are pairs seen from both ends


# ---- sample ------------------------------------------------------------------------------------------------------


def random_logits(rows, vocabulary, seed=0, dtype=torch.float64):
    return (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3).to(dtype)


def bfloat16_logits_of_a_large_vocabulary():
    """[1, 151936] float32 that came from bfloat16: ten tokens hold 0.99, 133,000 below 1e-7 hold 0.002."""
    logits = random_logits(1, 151_936, dtype=torch.float32) * 2 / 3
    logits[0, torch.arange(10) * 15_000] = 17.0 - torch.arange(10) / 4
    return logits.bfloat16().float()


def bins_of(probabilities, draws):
    """[V] a bin for each token: its own if it is heavy, else by decade of probability and place; expected counts."""
    decade = (-probabilities.log10()).floor().clamp(max=7).long()  # 7: all with p < 1e-7
    quarter = ints(len(decade)) * 4 // len(decade)
    bins = torch.where(probabilities > 1e-3, 100 + ints(len(decade)), decade * 4 + quarter)
    bins[decade == 7] = 7 * 4
    expected = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add(0, bins, probabilities) * draws
    assert expected[28] > 500, "the bin of the tail must have something to say"
    return bins, expected


def p_value(ids, bins, expected):
    observed = torch.bincount(bins[ids], minlength=len(expected)).double()
    kept = expected > 10
    assert observed[expected == 0].eq(0).all()
    expected = expected[kept] * (observed[kept].sum() / expected[kept].sum())
    return stats.chisquare(observed[kept].numpy(), expected.numpy()).pvalue


def test_the_tail_of_a_large_vocabulary_is_drawn_with_its_true_probability():
    logits = bfloat16_logits_of_a_large_vocabulary()
    u = uniforms(0, "train", 0, 0, 0, ints(240_000))
    ids = torch.cat([sample(logits, chunk, 1.0)[0] for chunk in u.split(10_000)])
    bins, expected = bins_of(logits[0].double().softmax(-1), len(u))
    assert p_value(ids, bins, expected) > 1e-3
    # the same test sees the fault that it is there for: a cumulative sum in float32 all the way
    cumulative = np.cumsum(logits[0].softmax(-1).numpy(), dtype=np.float32)
    naive = np.searchsorted(cumulative, u.float().numpy(), side="right")
    assert p_value(torch.from_numpy(naive).clamp(max=logits.shape[1] - 1), bins, expected) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_c11_tokens_follow_the_softmax_at_the_temperature(temperature):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1]])
    ids, _ = sample(logits, uniforms(0, "train", 0, 0, 0, ints(40_000)), temperature)
    expected = (logits[0].double() / temperature).softmax(-1) * 40_000
    assert stats.chisquare(torch.bincount(ids, minlength=5).numpy(), expected.numpy()).pvalue > 1e-3


def test_every_token_is_found_in_the_middle_of_its_interval():
    logits = random_logits(1, 4 * BLOCK + 77)
    probabilities = logits[0].softmax(-1)
    middle = probabilities.cumsum(-1) - probabilities / 2
    assert sample(logits, middle, 1.0)[0].equal(ints(logits.shape[1]))


def test_block_sums_are_accumulated_in_float64():
    """One token holds nearly all, 2e-9 for each of the rest: evenly spaced uniforms must fall evenly on the blocks."""
    logits = torch.full((1, 20 * BLOCK), -20.0)
    logits[0, 0] = 0.0
    tail = (1 - logits[0].double().softmax(-1)[0]).item()
    u = 1 - tail * (torch.arange(19_000, dtype=torch.float64) + 0.5) / 19_000
    counts = torch.bincount(sample(logits, u, 1.0)[0] // BLOCK, minlength=20)[3:18].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.003  # in float32: 0.06


def test_entries_of_a_block_are_accumulated_in_float64():
    """Beside a token of probability 1 - 5e-7 the other 511 of its block would be lost in a float32 sum."""
    logits = torch.full((1, 512), math.log(1e-9))
    logits[0, 0] = 0
    assert sample(logits, torch.tensor([1 - 2e-7], dtype=torch.float64), 1.0)[0].item() == pytest.approx(307, abs=5)


def test_logits_may_all_be_large():
    logits, u = torch.linspace(0, 3, 700, dtype=torch.float64)[None], torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    ids, logprobs = sample(logits + 1024, u, 0.5)
    assert ids.equal(sample(logits, u, 0.5)[0]) and logprobs.isfinite().all()


def test_the_place_inside_an_entry_stays_in_the_unit_interval():
    """At the borders of the intervals the two differences that make `rest` round outside of [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mass = (torch.randn(1, 60, generator=generator, dtype=torch.float64) * 10).exp()
        border = (mass.cumsum(-1) / mass.sum()).T.clamp(0, LAST)
        around = [border, border.nextafter(torch.zeros_like(border)), border.nextafter(torch.ones_like(border))]
        u = torch.cat(around).clamp(0, LAST)
        index, rest = _invert(mass, u)
        assert rest.min() >= 0 and rest.max() < 1


def test_c41_a_cumulative_sum_that_is_off_by_a_rounding_leads_to_no_empty_entry(monkeypatch):
    """A parallel scan adds in another order, so it may rise, or fall, by a rounding where there is no mass."""
    exact, mass = torch.Tensor.cumsum, torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0]], dtype=torch.float64)
    for toward in (-torch.ones_like(mass), 2 * torch.ones_like(mass)):
        off = torch.where(mass > 0, exact(mass, -1), exact(mass, -1).nextafter(toward))
        monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_, off=off: off)
        index, _ = _invert(mass, torch.tensor([[0.0], [0.3], [0.5], [LAST]], dtype=torch.float64))
        assert mass[0, index.flatten()].gt(0).all()


@pytest.mark.parametrize("vocabulary", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_token(vocabulary):
    logits = torch.zeros(2, vocabulary)
    ids, logprobs = sample(logits, torch.tensor([0.0, LAST], dtype=torch.float64), 1.0)
    assert ids.tolist() == [0, vocabulary - 1]
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(vocabulary)))


@pytest.mark.parametrize("kept", [[0], [5], [BLOCK], [4 * BLOCK - 1], [3, 3 * BLOCK + 2], [BLOCK - 1, BLOCK]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c41_a_token_of_probability_zero_is_never_drawn(kept, dtype):
    logits = torch.full((1, 4 * BLOCK), -torch.inf, dtype=dtype)
    logits[0, kept] = random_logits(1, len(kept), dtype=dtype)[0]
    edge = logits[0, kept[:1]].double().sub(logits[0, kept].double().logsumexp(-1)).exp()  # where the intervals meet
    near = torch.cat([edge.nextafter(torch.tensor(0.0).double()), edge, edge.nextafter(torch.tensor(1.0).double())])
    ends = torch.tensor([0.0, 2.0**-53, 0.5, LAST], dtype=torch.float64)
    u = torch.cat([ends, near.clamp(0, LAST), uniforms(0, "train", 0, 0, 0, ints(200))])
    ids, logprobs = sample(logits, u, 1.0)
    assert torch.isin(ids, torch.tensor(kept)).all() and logprobs.isfinite().all()
    assert set(ids.tolist()) == set(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_c18_logprobs_are_those_of_the_drawn_tokens(temperature, dtype):
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    logits = random_logits(16, 5003).to(dtype)
    ids, logprobs = sample(logits, uniforms(0, "train", 0, 0, 0, ints(16)), temperature)
    expected = (logits.double() / temperature).log_softmax(-1)[ints(16), ids]
    assert ids.shape == logprobs.shape == (16,) and ids.dtype == torch.int64
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logprobs.double(), expected, rtol=tolerance, atol=tolerance)


def test_c42_temperature_zero_is_greedy_with_logprobs_at_one():
    logits = random_logits(8, 1001, dtype=torch.float32)
    ids, logprobs = sample(logits, torch.rand(8, dtype=torch.float64), 0)
    assert ids.equal(logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_c13_logits_are_not_scaled_in_place(temperature):
    logits, u = random_logits(4, 700, dtype=torch.float32), torch.rand(4, dtype=torch.float64)
    before = logits.clone(), u.clone()
    sample(logits, u, temperature)
    assert logits.equal(before[0]) and u.equal(before[1])


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_c17_a_row_is_drawn_as_if_it_were_alone(temperature):
    logits, u = random_logits(6, 1300, dtype=torch.float32), uniforms(0, "train", 0, 0, 0, ints(6))
    ids, logprobs = sample(logits, u, temperature)
    for row in range(6):
        alone = sample(logits[row : row + 1], u[row : row + 1], temperature)
        assert alone[0] == ids[row] and alone[1] == logprobs[row]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_one_row_of_logits_serves_many_draws(temperature):
    logits, u = random_logits(1, 1300, dtype=torch.float32), uniforms(0, "train", 0, 0, 0, ints(32))
    once, repeated = sample(logits, u, temperature), sample(logits.repeat(32, 1), u, temperature)
    assert once[0].equal(repeated[0]) and once[1].equal(repeated[1])


def test_c28_siblings_with_the_same_logits_draw_different_tokens():
    ids, _ = sample(torch.zeros(1, 50_000), uniforms(0, "train", 0, 3, ints(8), 0), 1.0)
    assert ids.unique().numel() == 8


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nothing_is_read_back_to_the_host(temperature):
    """Fake tensors have no values: reading one (`.item()`, an `if`, a boolean index) raises."""
    with FakeTensorMode():
        u = uniforms(0, "train", torch.zeros((), dtype=torch.long), ints(4)[:, None], ints(2), 5).flatten()
        ids, logprobs = sample(torch.empty(8, 1000), u, temperature)
    assert ids.shape == logprobs.shape == (8,)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_numbers_and_can_capture_it_all():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    token, logits = torch.tensor(0, device="cuda"), random_logits(8, 151_936, dtype=torch.float32).cuda()
    rows = ints(8).cuda()

    def draw():
        u = uniforms(1, "train", 2, rows, 3, token)
        return u, *sample(logits, u, 1.0)

    draw()  # warm up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw()
    for t in range(3):
        token.fill_(t)
        graph.replay()
        expected = uniforms(1, "train", 2, ints(8), 3, t)
        assert captured[0].cpu().equal(expected)
        ids, logprobs = sample(logits.cpu().double(), expected, 1.0)
        assert captured[1].cpu().equal(ids)
        torch.testing.assert_close(captured[2].cpu().double(), logprobs, rtol=1e-5, atol=1e-5)
