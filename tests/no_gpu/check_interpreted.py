"""The kernels that Inductor writes for an H100, against the plain operations. Run where `interpreted.py` is loaded."""

import re

import pytest
import torch

from grpo.policy import attention_flex
from tests.fakes.models import tiny_policy
from tests.kernels.test_compiled import assert_exact_and_near
from tests.no_gpu import interpreted
from tests.policy.test_attention_flex import assert_the_kernel_equals_attention_in_parts


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As on a GPU, but for trees of 256 tokens where a GPU would pad to 1,024."""
    monkeypatch.setattr(attention_flex, "usable", lambda *_: True)
    monkeypatch.setattr(attention_flex, "LEAST", attention_flex.BUCKET)
    interpreted.SOURCES.clear()
    yield
    assert re.search(r"def triton_tem\w*_flex_attention_backward", "".join(interpreted.SOURCES))


@pytest.mark.parametrize(
    ("dtype", "heads", "tolerance"),
    [(torch.bfloat16, 14, 2e-2), pytest.param(torch.float32, 2, 1e-5, marks=pytest.mark.slow)],
)
def test_c39_attention_equals_attention_in_parts_backwards_too(dtype, heads, tolerance):
    assert_the_kernel_equals_attention_in_parts("cpu", dtype, heads, [(40, 40, 40), (1, 190, 30)], tolerance)


@pytest.mark.parametrize(
    ("layers", "checkpointing", "sizes"),
    [(1, False, (2, 9)), (2, True, (2, 9, 1))],
)
@pytest.mark.slow
def test_c22_a_step_is_exact_where_it_has_to_be_and_near_the_plain_one(layers, checkpointing, sizes):
    plain = tiny_policy(precision="bf16", head_dim=16, num_hidden_layers=layers).train()
    assert_exact_and_near(plain, checkpointing, sizes, gap=0.1, cosine=0.999)
