"""exp and SwiGLU in float32 for MLX's Linux CPU build, whose own exp handles one number at a time:
a tenth of the time.

    e^x = 2^n * 2^f      n = round(x * log2(e)), f in [-1/2, 1/2]

2^f is a polynomial, and multiplying by 2^n adds n to the exponent's bits. Each step is a compiled
function whose loop is additions and products alone, which g++ turns into vector instructions;
without g++ MLX runs the same operations one by one, and they still take less time than its exp.
Relative error below 4e-7 for |x| < 1, 4e-6 at |x| = 87 (rounding of x * log2(e)).

``CORTEXLAB_FAST_MATH=0`` in the environment leaves all of it out: what then remains of a lead is
the layout's.
"""

import os
import sys
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.models import activations

SWITCH = "CORTEXLAB_FAST_MATH"
FROM_SIZE = 4096  # numbers: below, six small functions cost more than one slow exp
LARGEST = 2e6  # |x|: beyond it n no longer fits
LOG2_E = 1.4426950408889634
# 2^f on [-1/2, 1/2], c0 = 1: the best polynomial of degree 5 (Lawson's reweighted least squares),
# relative error 9.2e-8.
C1, C2, C3, C4, C5 = (
    0.6931469775984713,
    0.24022242084919213,
    0.05550733744244654,
    0.009671512660562133,
    0.0013264726899012876,
)
ROUND = (
    12582912.0  # 1.5 * 2^23: a float32 near it has no fraction, and its lowest bits are the integer
)
LOWEST, HIGHEST = (int(np.float32(ROUND + n).view(np.int32)) for n in (-126, 126))


def wanted() -> bool:
    """Whether MLX runs on its Linux CPU build here, and the environment does not say no."""
    return (
        sys.platform == "linux"
        and mx.default_device() == mx.cpu
        and os.environ.get(SWITCH, "1") != "0"
    )


# MLX fuses at most eleven operations deep, counting a broadcast before each: hence functions of
# four and five.
_compiled = partial(mx.compile, shapeless=True)


@_compiled
def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    """f, and n in the lowest bits of a float."""
    y = x * LOG2_E
    shifted = y + ROUND
    return y - (shifted - ROUND), shifted


@_compiled
def _power(f: mx.array) -> mx.array:
    square = f * f
    return ((1.0 + C1 * f) + (C2 + C3 * f) * square) + (C4 + C5 * f) * (square * square)


@_compiled
def _scale(power: mx.array, n: mx.array) -> mx.array:
    return power + (mx.maximum(n, LOWEST) << 23)


@_compiled
def _scale_within(power: mx.array, n: mx.array) -> mx.array:
    return power + (mx.minimum(mx.maximum(n, LOWEST), HIGHEST) << 23)


@_compiled
def _gate(e: mx.array, gate: mx.array, x: mx.array) -> mx.array:
    return gate / (1.0 + e) * x


def exp(x: mx.array) -> mx.array:
    """e^x of float32 ``-LARGEST <= x <= 87``, as softmax has them; below -87 it stays at 1e-38."""
    return _exp(x, _scale)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """``silu(gate) * x`` in float32, as `mlx_lm.models.activations.swiglu`."""
    return (
        activations.swiglu(gate, x)
        if gate.size < FROM_SIZE
        else _gate(_exp(-gate, _scale_within), gate, x)
    )


def _exp(x: mx.array, scale) -> mx.array:
    f, shifted = _split(x)
    return scale(_power(f).view(mx.int32), shifted.view(mx.int32)).view(mx.float32)
