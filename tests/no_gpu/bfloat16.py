"""bfloat16 for Triton's interpreter, which keeps it as 16 bits and neither rounds to it nor multiplies in it.

Call `teach_the_interpreter` before a kernel runs. Rounding is to nearest, ties to even, as on a GPU; products are those
of the same numbers in float32. Left out: sums, comparisons and all else that no kernel does before it widens.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, uint16 -> the same numbers, float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def teach_the_interpreter() -> None:
    """Once per process."""
    convert, dot = interpreter._convert_float, InterpreterBuilder.create_dot

    def convert_float(x, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return widened(x)
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            return rounded(x)
        return convert(x, from_dtype, to_dtype, rounding_mode)

    def wide(x: TensorHandle) -> TensorHandle:
        return TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(builder, a, b, *options):
        return dot(builder, wide(a), wide(b), *options)

    interpreter._convert_float, InterpreterBuilder.create_dot = convert_float, create_dot
