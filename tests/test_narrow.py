"""Forwards for few rows against the usual ones: the same numbers, for as long as they are asked for and no longer."""

import pytest
import torch

from grpo import narrow
from grpo.lean import keep_less
from grpo.narrow import narrow_forwards, product, using
from tests.models import FAMILIES, keep_float64, tiny_model


def forwards(model):
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_numbers_are_the_usual_ones(family):
    model = tiny_model(family, dtype=torch.float64)
    keep_float64(model)
    keep_less(model)
    forwards_of_few = narrow_forwards(model.base_model)
    assert len(forwards_of_few) == 7 * model.config.num_hidden_layers
    hidden = lambda: model.base_model(torch.arange(12)[None], use_cache=False).last_hidden_state  # noqa: E731
    expected = hidden()
    with using(forwards_of_few):
        ours = hidden()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_usual_forwards_come_back_after_an_error_too():
    model = tiny_model("qwen2")
    keep_less(model)
    forwards_of_few, before = narrow_forwards(model), forwards(model)
    with pytest.raises(RuntimeError, match="in between"), using(forwards_of_few):
        assert forwards(model) != before
        raise RuntimeError("in between")
    assert forwards(model) == before


def test_a_bias_is_added_to_every_row():
    linear = torch.nn.Linear(3, 2, dtype=torch.float64)
    x = torch.arange(12.0, dtype=torch.float64).view(1, 4, 3)
    with using(narrow_forwards(linear)):
        ours = linear(x)
    torch.testing.assert_close(ours, x @ linear.weight.t() + linear.bias)
    assert ours.shape == (1, 4, 2)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 32])
def test_rows_are_filled_up_and_cut_again(n):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, 5, generator=generator), torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(product(x, weight), x @ weight.t())


@pytest.mark.parametrize(("n", "vocabulary"), [(1, 5), (3, 4), (9, 13)])
def test_logits_are_those_of_the_whole_head_and_rows_lie_side_by_side(n, vocabulary, monkeypatch):
    monkeypatch.setattr(narrow, "WORDS", 4)
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(n, 5, generator=generator), torch.randn(vocabulary, 5, generator=generator)
    ours = narrow.logits(x, head)
    torch.testing.assert_close(ours, x @ head.t())
    assert ours.is_contiguous()
