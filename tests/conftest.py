"""Settings of all tests: no test depends on what lies around it, and each leaves everything as it found it.

What could differ between two machines is taken away before anything is imported: environment variables, caches in the
home directory (which may be read-only), threads, a network. Each test starts in an empty directory of its own.
"""

import contextlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Torch and libraries, ranks of a launcher, and how wide and colourful a terminal is.
FOREIGN = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "TRITON_CACHE", "OMP_", "MKL_", "MPL", "XDG_", "SLURM_")
FOREIGN += ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
SCRATCH = "GRPO_TEST_SCRATCH"
"""Names the directory of caches. The first process makes it; workers and processes that tests start share it."""

for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]
if SCRATCH not in os.environ:
    os.environ[SCRATCH] = tempfile.mkdtemp(prefix="grpo-tests-")
    made_here = True
else:
    made_here = False
caches = {
    variable: str(Path(os.environ[SCRATCH], variable.lower()))
    for variable in ("HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
}
for place in caches.values():
    os.makedirs(place, exist_ok=True)
# Tiny models gain nothing from threads, which lose minutes in waiting where other work runs beside the tests. A test
# that downloads is a mistake. Processes that tests start find the code from wherever they are.
os.environ |= caches | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

import pytest  # noqa: E402
import torch  # noqa: E402

# Triton decides when a kernel is defined. Without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.no_gpu import bfloat16

    bfloat16.teach_the_interpreter()


def pytest_unconfigure():
    """The process that made the caches removes them."""
    if made_here:
        shutil.rmtree(os.environ[SCRATCH], ignore_errors=True)


@pytest.fixture(autouse=True)
def somewhere_else():
    """The working directory is empty: no `runs/` of the checkout, and whatever a test writes there is its own."""
    with tempfile.TemporaryDirectory(dir=os.environ[SCRATCH]) as directory, contextlib.chdir(directory):
        yield


@pytest.fixture(params=["large", "all"])
def weights_for_onednn(request, monkeypatch):
    """Which weights of float32 oneDNN multiplies by on a CPU; those of tiny models are not large."""
    if request.param == "all":
        monkeypatch.setattr("grpo.kernels.onednn.LEAST", 0)


@pytest.fixture(autouse=True)
def torch_settings():
    """Some tests set the default dtype or deterministic operations for the whole process."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
