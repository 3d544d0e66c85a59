"""Whether a model can be driven: the shape of its KV cache, and a few tokens tried before anybody relies on it."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from .arena import Arena
from .attention import Plan, RowRun
from .errors import ModelError, shown
from .hook import LayerCache, attention_modules, attention_over_extents

PROBE_SLOTS = 16
TOLERANCE, TOLERANCE_16_BIT = 1e-3, 5e-2  # of the largest logit


def kv_shape(model: nn.Module) -> tuple[int, int, int, mx.Dtype]:
    """``(num_layers, num_kv_heads, head_dim, dtype)`` of a model's KV cache, found by running one token.

    Raises `ModelError` naming the first layer whose cache is not mlx-lm's plain `KVCache`, or whose K and V differ in shape.
    """
    caches = mlx_lm_cache.make_prompt_cache(model)
    for layer, cache in enumerate(caches):
        if type(cache) is not mlx_lm_cache.KVCache:
            raise ModelError(f"layer {layer} uses a {type(cache).__name__}: only models whose layers all use a plain KVCache can be run")
    mx.eval(model(mx.array([[0]]), cache=caches))
    shapes = {(c.keys.shape[1], c.keys.shape[3], c.values.shape[3], c.keys.dtype) for c in caches}
    heads, dim, value_dim, dtype = shapes.pop()
    if shapes or dim != value_dim:
        raise ModelError("layers whose K and V differ in heads, dimension or type cannot share one arena")
    return len(caches), heads, dim, dtype


def check_exact(model: nn.Module, like: Arena) -> None:
    """`ModelError` unless two short sequences in one step give the logits that the model gives each by itself.

    ``like``: the arena the model is to read from; the trial has a small one of its own.
    """
    prompts, arena = [[0, 1, 2], [2, 1]], Arena(like.num_layers, like.num_kv_heads, like.head_dim, PROBE_SLOTS, like.dtype)
    rows = [RowRun(0, len(prompt), [(8 * i, 8 * i + len(prompt))]) for i, prompt in enumerate(prompts)]
    try:
        plan = Plan(rows, arena, "views")
        with attention_over_extents(attention_modules(model)):
            ours = model(mx.array([*prompts[0], *prompts[1]])[:, None], cache=[LayerCache(plan, i) for i in range(like.num_layers)])
        theirs = mx.concatenate([model(mx.array(prompt)[None], cache=mlx_lm_cache.make_prompt_cache(model))[0] for prompt in prompts])
        worst = mx.abs(ours[:, 0] - theirs).max().item() / max(mx.abs(theirs).max().item(), 1e-30)
    except Exception as error:
        raise ModelError(f"this model's attention cannot read from extents: {type(error).__name__}: {shown(str(error))}") from error
    limit = TOLERANCE if arena.dtype == mx.float32 else TOLERANCE_16_BIT
    if not worst <= limit:
        raise ModelError(f"this model gives other logits over extents than by itself (relative difference {worst:.1e})")
