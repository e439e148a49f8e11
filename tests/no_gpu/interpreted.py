"""What `torch.compile` makes for a GPU that is not there, computed by Triton's interpreter on tensors of the host.

A pytest plugin: `python -m pytest -p tests.no_gpu.interpreted tests/no_gpu/check_interpreted.py`. Inductor is told that
a graph's tensors lie on an H100. The Triton code that it writes for it, FlexAttention's kernels among it, then runs
instruction by instruction in NumPy; products of matrices are those of the host. Left out: whatever is decided after
Triton's code: machine code, memory, time.
"""

import functools
import os
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

from tests.no_gpu import device

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
device.declare()

import torch  # noqa: E402
import torch._inductor.scheduler as scheduler  # noqa: E402
import torch.nn.attention.flex_attention as flex_attention  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._guards import detect_fake_mode  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.runtime.hints import DeviceProperties  # noqa: E402
from torch.fx.node import map_aggregate  # noqa: E402
from torch.utils import _triton  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from grpo.kernels import compiled  # noqa: E402

CUDA = torch.device("cuda", 0)
SIZES = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
PROPERTIES = SimpleNamespace(**SIZES, name="H100", minor=0, shared_memory_per_block_optin=232448, total_memory=80 << 30)
SOURCES: list[str] = []
"""Everything that was written so far, Python around Triton."""


def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
    """For `torch.compile`, in place of "inductor"; reads the options that it would be given."""
    patches = OPTIONS | {"force_disable_caches": True}
    return compile_fx(graph, inputs, inner_compile=compile_for_the_gpu, config_patches=patches)


def compile_for_the_gpu(graph: torch.fx.GraphModule, inputs: list, **options) -> object:
    """A graph of operations on the host -> the function that Inductor makes of the same graph on the GPU."""
    with detect_fake_mode(inputs):
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _named)
                    node.meta["val"] = tree_map(_moved, node.meta.get("val"))
                module.recompile()
        inputs = list(map(_moved, inputs))
    with ExitStack() as stack:
        for target, names in THERE_IS_ONE:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(target, name, value))
        return compile_fx_inner(graph, inputs, **options)


def _named(x):
    return CUDA if isinstance(x, torch.device) else x


def _moved(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) if isinstance(x, torch.Tensor) else x


def _write(cls, source: str, *args, **options):
    """What runs on the host instead: allocation, streams."""
    for ours, theirs in {
        "torch._C._dynamo.guards._empty_strided_cuda": "torch._C._dynamo.guards._empty_strided_cpu",
        "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda device: 0",
        "with torch.cuda._DeviceGuard(0):": "if True:",
        "torch.cuda.set_device(0)": "pass",
    }.items():
        source = source.replace(ours, theirs)
    SOURCES.append(source)
    return WRITE.__func__(cls, source, *args, **options)


WRITE = PyCodeCache.write
THERE_IS_ONE = [
    (
        torch.cuda,
        {
            "_exchange_device": lambda index: 0,
            "_lazy_init": lambda: None,
            "_maybe_exchange_device": lambda index: 0,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: PROPERTIES,
            "get_rng_state": lambda *_: torch.zeros(1),
            "is_available": lambda: True,
            "set_rng_state": lambda *_: None,
            "synchronize": lambda *_: None,
        },
    ),
    (CudaInterface, {"is_available": lambda: True, "get_compute_capability": lambda *_: 90}),
    (DeviceProperties, {"create": lambda device: DeviceProperties("cuda", 0, cc=90, **SIZES)}),
    (torch.version, {"cuda": "13.0"}),
    (scheduler, {"has_triton": lambda *_: True}),
    (_triton, {"has_triton": lambda *_: True}),
    (PyCodeCache, {"write": classmethod(_write)}),
]


class _Driver:
    """What Triton and Inductor ask of a driver."""

    def get_current_target(self) -> GPUTarget:
        """Of an H100."""
        return GPUTarget("cuda", 90, 32)


def _install() -> None:
    triton.runtime.driver.set_active(_Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    # Functions of NVIDIA's library; and a maximum that NumPy finds, not the interpreter value by value.
    names = ("exp", "exp2", "log", "log2", "rsqrt", "sqrt")
    triton_helpers.libdevice = SimpleNamespace(**{name: functools.partial(_call, name) for name in names})
    triton_helpers.max2 = functools.partial(_call, "max")
    options = flex_attention._apply_kernel_options

    def as_on_a_gpu(*args, **kwargs):  # on a CPU there is no backward, so nothing is kept for it
        return options(*args, **kwargs) | {"OUTPUT_LOGSUMEXP": torch.is_grad_enabled()}

    flex_attention._apply_kernel_options = as_on_a_gpu
    flex_attention._validate_device = lambda *_: None


def _call(name: str, *args):
    return getattr(tl, name)(*args)  # looked up when it is called: the interpreter puts its own there


_install()
OPTIONS = compiled.SETTINGS["options"]
compiled.SETTINGS = {"dynamic": compiled.SETTINGS["dynamic"], "backend": backend}
