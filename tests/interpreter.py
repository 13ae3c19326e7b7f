"""Triton's interpreter with the bfloat16 of a GPU: values are widened, computed in float32, rounded to nearest even.

The interpreter of triton 3.9 keeps bfloat16 as bit patterns and computes with these as integers, without an error, and
truncates where it should round.
"""

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """To nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(np.asarray(values, dtype=np.float32))
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest).reshape(values.shape)


def mend() -> None:
    """To be called before the first kernel is launched."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock = {
        name: getattr(builder, name) for name in ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_dot")
    }
    to_float = builder.create_fp_to_fp

    def is_bf16(x) -> bool:
        is_value = getattr(x.dtype, "scalar", None) == tl.bfloat16 and not isinstance(x.dtype, tl.pointer_type)
        return is_value and np.asarray(x.data).dtype == np.uint16

    def binary_op(self, a, b, op):
        if not (is_bf16(a) and is_bf16(b)):
            return stock["binary_op"](self, a, b, op)
        out = op(widened(a.data), widened(b.data))
        return handle(out if out.dtype == np.bool_ else rounded(out), tl.bfloat16)

    def unary_op(self, a, op):
        return handle(rounded(op(widened(a.data))), tl.bfloat16) if is_bf16(a) else stock["unary_op"](self, a, op)

    def ternary_op(self, a, b, c, op):
        if is_bf16(a) and is_bf16(b) and is_bf16(c):
            return handle(rounded(op(widened(a.data), widened(b.data), widened(c.data))), tl.bfloat16)
        return stock["ternary_op"](self, a, b, c, op)  # a choice between bfloat16 values passes their bits on

    def cast_impl(self, a, to):
        if a.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return handle(rounded(a.data), tl.bfloat16)
        if a.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return handle(widened(a.data), tl.float32)
        return stock["cast_impl"](self, a, to)

    def create_fp_to_fp(self, a, to, rounding):
        if {a.dtype.scalar, to.scalar} == {tl.float32, tl.bfloat16}:
            return cast_impl(self, a, to)
        return to_float(self, a, to, rounding)

    def create_dot(self, a, b, total, precision, imprecise):
        if not (is_bf16(a) or is_bf16(b)):
            return stock["create_dot"](self, a, b, total, precision, imprecise)
        left, right = (widened(x.data) if is_bf16(x) else x.data.astype(np.float32) for x in (a, b))
        return handle(np.matmul(left, right, dtype=total.data.dtype) + total.data, total.dtype.scalar)

    for function in (binary_op, unary_op, ternary_op, cast_impl, create_fp_to_fp, create_dot):
        setattr(builder, function.__name__, function)
