"""How this project uses torch.compile: each decoder layer is compiled in place, with one graph for trees of all sizes.

Two facts decide the settings:

- Micro-batches differ in size, so a graph for one fixed size would be compiled again and again.
- Policy, old policy and reference run three different graphs: with gradient, without it, with other weights. All three
  must give the same numbers, so fusing operations must not change where values are rounded.

Left out: the sampler's decoding, which is captured as CUDA graphs instead; whole models as one graph.
"""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes

SETTINGS: dict = {
    "dynamic": True,
    "options": {
        "emulate_precision_casts": True,  # a fused kernel rounds where separate operations would
        "deterministic": True,  # never choose the order of a sum by timing kernels
    },
}
"""Arguments of every `torch.compile` in this project. CUDA graphs are off, because sizes differ."""


def can_compile() -> bool:
    """Whether this machine can compile GPU kernels: it has Triton, a C compiler and Python's headers."""
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    return bool(find_spec("triton") and compiler and Path(sysconfig.get_path("include"), "Python.h").exists())


@cache
def any_size(function: Callable) -> Callable:
    """The function, compiled for tensors of any size. The same function always gives the same compiled object."""
    _let_sizes_vary()
    return torch.compile(function, **SETTINGS)


def compile_layers(*policies: nn.Module | None) -> None:
    """Compile the decoder layers of each `Policy` in place, so that the names of its weights do not change.

    All layers of a model share one graph, whatever the size of the tree. Copies of a policy (`frozen_copy`) are not
    compiled. Sampling from a compiled policy runs its layers uncompiled.

    Args:
        policies: what to compile; None is skipped.
    """
    _let_sizes_vary()
    torch._dynamo.config.optimize_ddp = False  # each layer is its own graph, so DDP's hooks overlap anyway
    # Backward recomputes elementwise results (norms, the MLP's product, rounded weights). A quarter less is kept.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for policy in policies:
        if policy is not None:
            policy.compiled = True
            for layer in policy.layers:
                layer.compile(**SETTINGS)


@contextmanager
def taken_back() -> Iterator[None]:
    """At its end, take back what compiling within has set for the whole process."""
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with (
        dynamo.patch(optimize_ddp=dynamo.optimize_ddp),
        functorch.patch(ban_recompute_materialized_backward=functorch.ban_recompute_materialized_backward),
        symbolic_shapes.patch(use_duck_shape=symbolic_shapes.use_duck_shape),
    ):
        yield


def _let_sizes_vary() -> None:
    """Treat two dimensions as different even if they are equal in the first tree (such as 2 blocks and 2 key heads)."""
    symbolic_shapes.use_duck_shape = False
