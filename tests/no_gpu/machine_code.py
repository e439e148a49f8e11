"""What the Triton kernels take of a GPU, read from machine code.

`python -m tests.no_gpu.machine_code 90` does it for an H100.

NVIDIA's assembler comes with Triton, so no GPU is needed: every kernel is compiled for what it would be started with,
bfloat16 and Qwen2.5-0.5B's widths, with heads of 64 and of 128, and not started. Left out: how fast it is; the kernels
that Inductor writes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from grpo.kernels import decode  # noqa: E402
from grpo.policy.decoder import Norm  # noqa: E402
from grpo.sampler.decoder_fused import FusedDecodeAttention  # noqa: E402
from grpo.sampler.draw import BLOCK  # noqa: E402


@dataclass
class Usage:
    """Of a kernel."""

    name: str
    registers: int
    """Of a thread, 255 at most."""
    spilled: int
    """Bytes of a thread that did not fit into them, and lie in memory."""
    shared: int
    """Bytes of a program."""


class _Driver:
    """What Triton asks of a driver to compile."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing runs on it."""
        return 0


@contextmanager
def compiling_only(capability: int) -> Iterator[list[Usage]]:
    """Kernels that are started in here are compiled instead; yields what they take."""
    made, run = [], JITFunction.run

    def compile_it(kernel, *args, warmup, **options) -> None:
        compiled = run(kernel, *args, warmup=True, **options)
        made.append(_read(kernel.fn.__name__, compiled.asm["cubin"], compiled.metadata.shared))

    triton.runtime.driver.set_active(_Driver(capability))
    with mock.patch.object(JITFunction, "run", compile_it):
        yield made


def _read(name: str, code: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return Usage(name, int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), shared)


def start_all(dtype: torch.dtype, head_width: int) -> None:
    """Every kernel once, as a step of 40 rows would start it."""
    heads, key_heads = 14, 2

    def keys_and_values(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [tuple(torch.zeros(2, key_heads, tokens, head_width, dtype=dtype))]

    room = FusedDecodeAttention(keys_and_values(690), max_rows=40, max_groups=5, max_branch=96, max_new_tokens=256)
    room.join(keys_and_values(90), [torch.arange(90)] * 5, group_size=8)
    new = torch.zeros(40, heads + 2 * key_heads, head_width, dtype=dtype)
    room.attend_heads(0, new, torch.zeros(2, 40, 1, head_width).unbind(), 0.125)
    norm = Norm(896, 1e-6)
    decode.add_norm(torch.zeros(40, 896), torch.zeros(40, 896, dtype=dtype), norm, dtype)
    decode.gated(torch.zeros(40, 2 * 4864, dtype=dtype))
    decode.block_masses(torch.zeros(40, 151_936), 0.7, BLOCK)


if __name__ == "__main__":
    with compiling_only(capability=int(sys.argv[1])) as made:
        for head_width in (64, 128):
            start_all(torch.bfloat16, head_width)
    for usage in made:
        print(json.dumps(asdict(usage)))
