"""A GPU that is not there: tensors on `cuda` that a CPU computes, for tests of what is done where no GPU is at hand.

A pytest plugin: `python -m pytest -p tests.no_gpu.stand_in -m gpu tests/whole/test_gpu.py`.

It refuses what a GPU refuses: a tensor of the host beside one of the device, kernels of CPUs, and, inside a graph or
after `set_sync_debug_mode("error")`, whatever would wait for the device. A captured graph is a list of operations
that a replay runs again, into the memory of the first run; the first run itself leaves no trace. Left out: how
kernels of a GPU round, compiled code, streams, memory, more than one device.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from tests.no_gpu import device

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
device.declare()

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # makes a list of what is in torch.cuda: before that changes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

aten = torch.ops.aten
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that take indices of the host, and copy them."""
READING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
}
"""Operations whose result, or its size, the host waits for."""


def each(function, values):
    """`function` of every leaf of what operations take and return: nested lists and tuples, dictionaries."""
    if isinstance(values, dict):
        return {name: each(function, value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([each(function, value) for value in values])
    return function(values)


def tensors_in(*values) -> list[torch.Tensor]:
    """In order."""
    found = []
    each(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, values)
    return found


class OnDevice(torch.Tensor):
    """A tensor that says it is on `cuda`; `inner` is where its numbers are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        with torch.inference_mode(False):  # a view made in inference mode keeps its base's version
            return torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device="cuda:0",
            )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self, **_):
        return f"OnDevice({self.inner})"

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)  # saved as a tensor of the host

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What never reaches an operation: moving the data, its address, lists in and out."""
        if function in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr):
            return function(args[0].inner)
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(x) if isinstance(x, list) else x for x in index), *args[2:])
        if function == torch.Tensor.data.__set__:
            args[0].inner = args[1].inner
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} on a tensor of the device outside of `Device`")


def _inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def _written(operation, args, kwargs) -> list[torch.Tensor]:
    """What an operation writes over."""
    arguments = operation._schema.arguments
    values = dict(zip((x.name for x in arguments), args, strict=False)) | kwargs
    return tensors_in([values[x.name] for x in arguments if x.alias_info is not None and x.alias_info.is_write])


class Device(TorchDispatchMode):
    """As long as it is entered, there is a device `cuda`."""

    waiting_is_an_error = False
    graph: "Graph | None" = None
    """What is being captured."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and operation._can_decompose():
            with self:
                return operation.decompose(*args, **kwargs)
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        tensors = tensors_in(args, kwargs)
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        if not ours and target != "cuda":
            return operation(*args, **kwargs)
        self._refuse(operation, args, tensors, target)
        inner_args, inner_kwargs = each(_inner, (args, kwargs))
        if target:
            inner_kwargs["device"] = "cpu"
        run = BY_HAND.get(operation, operation)
        if Device.graph:
            Device.graph.protect(_written(operation, inner_args, inner_kwargs))
        out = run(*inner_args, **inner_kwargs)
        if Device.graph:
            Device.graph.operations.append((run, inner_args, inner_kwargs, out))
        if target == "cpu" or (operation is aten.copy_.default and not isinstance(args[0], OnDevice)):
            return out
        given = {id(x.inner): x for x in ours}  # an operation in place returns what it was given

        def wrap(x):
            return given[id(x)] if id(x) in given else OnDevice(x) if isinstance(x, torch.Tensor) else x

        return each(wrap, out)

    def _refuse(self, operation, args, tensors, target) -> None:
        """Raise for what a GPU can not do, or may not do now."""
        if "_for_cpu" in str(operation) or "mkldnn" in str(operation):
            raise NotImplementedError(f"{operation} is a kernel of CPUs")
        of_host = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        if of_host and len(of_host) < len(tensors) and operation not in BETWEEN_DEVICES:
            indices = [x for x in args[1] if x is not None] if operation in INDEXING else []
            if any(all(x is not index for index in indices) for x in of_host):
                raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
        waits = bool(of_host) or operation in READING
        places = {"cuda" if isinstance(x, OnDevice) else "cpu" for x in tensors}
        if operation in BETWEEN_DEVICES:
            waits |= len(places | {target} - {None}) == 2
        waits |= operation in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if waits and (Device.waiting_is_an_error or Device.graph):
            raise RuntimeError(f"{operation} waits for the device")


def _product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Half precision in, float32 out: exact products and a wide sum. CPUs have no such kernel."""
    assert out_dtype == torch.float32 and a.dtype == b.dtype in (torch.bfloat16, torch.float16)
    return a.to(out_dtype) @ b.to(out_dtype)


def _unwritten(operation):
    """New memory, full of what must not be read."""

    def empty(*args, **kwargs) -> torch.Tensor:
        out = operation(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return empty


EMPTY = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
BY_HAND = {aten.mm.dtype: _product, aten.bmm.dtype: _product} | {name: _unwritten(name) for name in EMPTY}


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations: list[tuple] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def protect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remember what is about to be written over."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        """Capturing computes nothing."""
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Run all operations again; what was new memory then is the same memory now."""
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capture(graph: Graph, pool: object = None) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    Device.graph = graph
    try:
        yield
    finally:
        Device.graph = None
        graph.undo()


class Stream:
    """In place of `torch.cuda.Stream`: everything is in order anyway."""

    def wait_stream(self, other: "Stream") -> None:
        """Nothing to wait for."""


def _set_sync_debug_mode(mode: str) -> None:
    Device.waiting_is_an_error = mode == "error"


def _install() -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    stand_ins = {
        "_lazy_init": nothing,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_device": lambda: 0,
        "current_stream": Stream,
        "device_count": lambda: 1,
        "empty_cache": nothing,
        "get_device_name": lambda *_: "stand-in",
        "graph": capture,
        "graph_pool_handle": object,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "max_memory_allocated": lambda *_: 1 << 30,
        "mem_get_info": lambda *_: (20 << 30, 80 << 30),
        "memory_allocated": lambda *_: 1 << 29,
        "set_device": nothing,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "stream": lambda stream: nullcontext(),
        "synchronize": nothing,
    }
    for name, value in stand_ins.items():
        assert hasattr(torch.cuda, name)
        setattr(torch.cuda, name, value)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(.., device="cuda")` is one of the host, moved
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module's parameters become others, tied ones too


def _interpret_kernels() -> None:
    """Have Triton's interpreter compute kernels on the tensors' inner ones, and in a graph again."""
    from triton.runtime.interpreter import GridExecutor

    interpret = GridExecutor.__call__

    def launch(executor, *args, **kwargs) -> None:
        if any(x.ndim and not isinstance(x, OnDevice) for x in tensors_in(args)):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        inner = each(_inner, args)
        numbers = [x for x in args if isinstance(x, int)]
        told = all(x.is_contiguous() or x.stride(0) in numbers for x in tensors_in(inner))
        assert told, "kernels here know sizes, and no strides but those they are given"
        if Device.graph:
            Device.graph.protect(tensors_in(inner))
            Device.graph.operations.append((partial(interpret, executor), inner, kwargs, None))
        with _disable_current_modes():
            interpret(executor, *inner, **kwargs)

    GridExecutor.__call__ = launch


_install()
if importlib.util.find_spec("triton"):
    _interpret_kernels()


@pytest.fixture(autouse=True)
def stand_in():
    """Every test runs where there is a device."""
    with Device():
        yield
