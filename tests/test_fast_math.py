"""exp and SwiGLU of `fast_math` equal their definitions to float32 rounding, and mlx-lm gets its
own SwiGLU back after a step.
"""

import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu

from cortexlab.engine.mlx_lm_hook import over_extents
from cortexlab.host import fast_math

pytestmark = pytest.mark.cpu  # other devices have a fast SwiGLU of their own


def test_exp_is_exact_to_rounding_in_the_range_of_softmax():
    x = np.linspace(-87, 87, 1_000_001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    error = np.abs(np.array(fast_math.exp(mx.array(x))) - expected) / expected
    assert error.max() < 4.1e-6
    assert error[np.abs(x) < 1].max() < 4e-7
    zero, masked, lowest, nan = fast_math.exp(mx.array([0.0, -1e5, -2e6, float("nan")])).tolist()
    assert zero == 1.0
    assert 0 <= masked < 2e-38 and 0 <= lowest < 2e-38
    assert nan != nan


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 1, 1536)])
def test_swiglu_equals_its_definition(shape):
    gate, x = (
        mx.random.normal(shape, scale=4.0, key=mx.random.key(0)),
        mx.random.normal(shape, key=mx.random.key(1)),
    )
    g = np.array(gate).astype(np.float64)
    expected = g / (1 + np.exp(-g)) * np.array(x)
    np.testing.assert_allclose(
        np.array(fast_math.swiglu(gate, x)), expected, rtol=3e-6, atol=1e-7 * np.abs(expected).max()
    )


def test_swiglu_of_huge_gates_is_the_gate_or_zero():
    gate = mx.array([1e3, 1e6, -1e3, -1e6, 0.0, float("nan")])
    *found, nan = fast_math.swiglu(gate, mx.ones(6)).tolist()
    np.testing.assert_allclose(found, [1e3, 1e6, 0, 0, 0], rtol=1e-6, atol=1e-30)
    assert nan != nan


@pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux build needs fast math")
def test_a_step_uses_fast_swiglu_and_mlx_lm_gets_its_own_back(monkeypatch):
    monkeypatch.delenv(fast_math.SWITCH, raising=False)
    gate = mx.array([1.0, -2.0], dtype=mx.bfloat16)
    used = over_extents([llama], lambda: (llama.swiglu, llama.swiglu(gate, gate)))
    assert used[0] is not swiglu
    assert mx.array_equal(used[1], swiglu(gate, gate)), "mlx-lm's own in 16 bits"
    assert llama.swiglu is swiglu
    monkeypatch.setenv(fast_math.SWITCH, "0")
    assert over_extents([llama], lambda: llama.swiglu) is swiglu
