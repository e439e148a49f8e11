"""Settings of all tests, and what every test leaves behind as it found it."""

import os
from importlib.util import find_spec

# Before torch and transformers are imported. Tiny models gain nothing from threads, and where other work runs beside
# the tests they lose two minutes in waiting for each other; a test that downloads is a mistake.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton decides when a kernel is defined. Without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.no_gpu import bfloat16

    bfloat16.teach_the_interpreter()


@pytest.fixture(params=["large", "all"])
def weights_for_onednn(request, monkeypatch):
    """Which weights of float32 oneDNN multiplies by on a CPU; those of tiny models are not large."""
    if request.param == "all":
        monkeypatch.setattr("grpo.kernels.onednn.LEAST", 0)


@pytest.fixture(autouse=True)
def torch_settings():
    """A run sets the default dtype and deterministic operations for its whole process."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
