"""torch.compile as it is used here: one graph for every size of a tree, layer by layer, in place.

A step's micro-batches differ in size, so a graph that held for one size would be compiled again and again; and policy,
old policy and reference run three graphs (with gradient, without, other weights) that must give the same numbers, so
nothing may be rounded elsewhere because something else was fused. Left out: the sampler's decoding, which is captured
instead of compiled; whole models as one graph.
"""

import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes

SETTINGS: dict = {
    "dynamic": True,
    "options": {
        "emulate_precision_casts": True,  # a fused kernel rounds where separate operations would
        "deterministic": True,  # the order of a sum is never chosen by the clock
    },
}
"""Of every `torch.compile` here. No CUDA graphs: sizes differ."""


def can_compile() -> bool:
    """Whether kernels for a GPU can be made on this machine: Triton, a C compiler and Python's headers are there."""
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    return bool(find_spec("triton") and compiler and Path(sysconfig.get_path("include"), "Python.h").exists())


@cache
def any_size(function: Callable) -> Callable:
    """The function, compiled once for tensors of any size; for the same function always the same object."""
    _let_sizes_vary()
    return torch.compile(function, **SETTINGS)


def compile_layers(*policies: nn.Module | None) -> None:
    """Compile the decoder layers of each `Policy` (None is passed over) in place: names of weights stay as they are.

    All layers of a model share one graph, whatever the size of the tree. Copies of a policy (`frozen_copy`) are not
    compiled; sampling from a compiled policy runs its layers as they were written.
    """
    _let_sizes_vary()
    torch._dynamo.config.optimize_ddp = False  # layers are graphs of their own, so DDP's hooks overlap without it
    # What a product reads in backward is made again where that is elementwise work (norms, the MLP's product, rounded
    # weights): a quarter less is kept.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for policy in policies:
        if policy is not None:
            policy.compiled = True
            for layer in policy.layers:
                layer.compile(**SETTINGS)


def _let_sizes_vary() -> None:
    """Two dimensions that happen to be equal in the first tree (2 blocks, 2 key heads) are not one and the same."""
    symbolic_shapes.use_duck_shape = False
