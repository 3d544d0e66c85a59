"""Every architecture of the pinned mlx-lm, unmodified, gives mlx-lm's tokens or is refused in one
sentence when the engine is made.

`python tests/test_architectures.py` prints the README's table from the lists below.
"""

import cortexlab as cl  # noqa: I001 - first, so that the optimized BLAS is in place before MLX
import importlib
import re
import sys
import threading
from itertools import chain
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import Reference, address, prompts_of
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import CONFIGS, VOCABULARY, modules, tiny_model

from cortexlab.engine.mlx_lm_hook import ATTENTION
from cortexlab.engine.model_runner import Batching

names = str.split

IN_ROWS = names("""
    Klear afmoe apertus bailing_moe cohere cohere2 dbrx deepseek deepseek_v2 dots1 ernie4_5
    ernie4_5_moe exaone exaone4 exaone_moe gemma gemma3 gemma3_text gemma4 gemma4_text glm glm4
    glm4_moe gpt2 gpt_neox gpt_oss gptj granite granitemoe helium hunyuan hunyuan_v1_dense
    internlm2 internlm3 iquestloopcoder laguna lille-130m llama llama4_text mellum mimo
    mimo_v2_flash minicpm minicpm3 minimax ministral3 mistral3 mixtral muse_glimmer nanbeige
    nanochat nemotron nemotron-nas olmo2 olmo3 olmoe openelm phi phi3 phimoe phixtral pixtral
    qwen qwen2 qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3
    solar_open spark2_5 stablelm starcoder2 step3p5 talkie telechat3 youtu_llm
""")
DECODES_AT_ONCE = names("""
    baichuan_m1 bailing_moe_linear falcon_h1 gear granitemoehybrid jamba lfm2 lfm2-vl lfm2_moe
    mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next recurrent_gemma rwkv7
""")
ONE_BY_ONE = names("""
    afm7 bailing_hybrid bailing_moe_v3 deepseek_v3 deepseek_v32 gemma2 gemma3n glm4_moe_lite
    glm_moe_dsa gpt_bigcode kimi_k25 kimi_k3 kimi_linear kimi_vl longcat_flash longcat_flash_ngram
    minimax_m3_vl mistral4 plamo plamo2
""")
SERVED = {Batching.ALL: IN_ROWS, Batching.DECODES: DECODES_AT_ONCE, Batching.ONE: ONE_BY_ONE}
VARIANTS = [name for name in CONFIGS if " " in name]  # other settings of listed architectures

REFUSED = {
    "uses ChunkedKVCache": ["llama4"],
    "uses LayerCache": ["deepseek_v41"],
    "masks a sliding window": ["plamo3"],
    "gives other logits": ["phi3small"],
}
NEEDS_METAL = ["bitnet", "muse_spark"]
NOT_BUILT = {
    "olmo": (SystemExit, "the package `ai2-olmo`"),
    "prism_hadamard_qwen35": (ValueError, "its own packed weights"),
}
NO_MODELS = names(
    "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm switch_layers"
)  # modules of mlx_lm.models that hold parts of models

LENGTHS = (3, 60, 1, 31)  # prompts shorter and longer than the window of 12


@pytest.mark.parametrize("name", [*chain(*SERVED.values()), *VARIANTS])
def test_an_architecture_that_is_served_gives_the_tokens_of_mlx_lm(name):
    model = tiny_model(name)
    reference, before, pieces = Reference(model), attention_functions(), []
    for strategy in ("paged", "cortexstream"):
        engine = cl.Engine(
            model,
            num_blocks=120,
            block_size=4,
            strategy=strategy,
            max_batch_size=4,
            max_step_tokens=16,
            on_step=lambda step: pieces.append(max(len(held.extents) for held in step.held)),
        )
        requests = [engine.submit(prompt, 24) for prompt in prompts_of(LENGTHS, VOCABULARY)]
        engine.cache.warmup()
        places = [address(array) for array in engine.cache.arena.arrays() if array.size]
        list(engine.run())
        # On a GPU steps are pipelined, and a step in flight may hold the arena's arrays.
        assert mx.default_device() != mx.cpu or places == [
            address(array) for array in engine.cache.arena.arrays() if array.size
        ], "the arena was copied"
        assert sum(reference.check(request) for request in requests) >= 3, (
            "near ties end a comparison early"
        )
        assert name in VARIANTS or name in SERVED[engine.runner.way]
        assert len({token for request in requests for token in request.output_tokens}) > 3, (
            "outputs of three tokens or fewer would test nothing"
        )
    assert max(pieces) >= 3, "the test needs a sequence of several extents"
    assert attention_functions() == before


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for reason, refused in REFUSED.items() for name in refused]
)
def test_a_refused_architecture_says_why_in_one_sentence_when_the_engine_is_made(name, reason):
    with pytest.raises(cl.ModelError, match=reason) as error:
        cl.Engine(tiny_model(name), num_blocks=8)
    assert "\n" not in str(error.value)
    if reason.startswith("uses"):
        assert re.match(rf"layer \d+ {reason}: only models", str(error.value))


@pytest.mark.parametrize(
    "name", [*REFUSED["masks a sliding window"], *REFUSED["gives other logits"]]
)
def test_mlx_lms_logits_of_a_refused_architecture_depend_on_its_own_chunks(name):
    model, (prompt,) = tiny_model(name), prompts_of([40], VOCABULARY)
    whole, chunked = (last_logits(model, prompt, size) for size in (40, 8))
    assert mx.abs(whole - chunked).max() > 0.01 * mx.abs(whole).max()


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal runs these models")
@pytest.mark.parametrize("name", NEEDS_METAL)
def test_a_model_that_mlx_lm_itself_cannot_run_here_is_refused(name):
    with pytest.raises(cl.ModelError, match=r"mlx-lm itself cannot run this model here: .*Metal"):
        cl.Engine(tiny_model(name), num_blocks=8)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_an_architecture_that_cannot_be_built_raises(name):
    with pytest.raises(NOT_BUILT[name][0]):
        tiny_model(name)


def test_every_module_of_mlx_lm_stands_in_one_list():
    listed = [
        *chain(*SERVED.values()),
        *(name for refused in REFUSED.values() for name in refused),
        *NEEDS_METAL,
        *NOT_BUILT,
        *NO_MODELS,
    ]
    assert sorted(listed) == modules()
    assert not any(
        hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "Model") for name in NO_MODELS
    )
    assert {name.split(" ")[0] for name in CONFIGS} <= set(listed)


def test_the_readme_has_the_table_of_architectures():
    assert table() in (Path(__file__).parent.parent / "README.md").read_text()


# --- the hook leaves everything else alone --------------------------------------------------------


def test_engines_in_two_threads_and_mlx_lm_beside_them_do_not_disturb_each_other():
    """Three models of one module: an engine for each of two threads, and mlx-lm's `generate_step`
    for the third model in the main thread.
    """
    models = [tiny_model("llama", seed) for seed in range(3)]
    prompts = prompts_of((20, 33, 7), VOCABULARY)
    expected = [
        [[token for token, _ in Reference(model).steps(prompt, 40)] for prompt in prompts]
        for model in models
    ]
    found = {}

    def serve(index: int) -> None:
        engine = cl.Engine(models[index], num_blocks=64, block_size=4)
        requests = [engine.submit(prompt, 40) for prompt in prompts]
        list(engine.run())
        found[index] = [request.output_tokens for request in requests]

    threads = [threading.Thread(target=serve, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    found[2] = [
        [int(token) for token, _ in generate_step(mx.array(prompt), models[2], max_tokens=40)]
        for prompt in prompts
    ]
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


@pytest.mark.parametrize("name", ["llama (sliding window)", "gemma2"])
def test_engines_take_turns_with_each_other_and_with_mlx_lm(name):
    model = tiny_model(name)
    reference, prompts = Reference(model), prompts_of((20, 33), VOCABULARY)
    engines = [
        cl.Engine(model, num_blocks=32, strategy=strategy) for strategy in ("paged", "cortexstream")
    ]
    requests = [engine.submit(prompt, 20) for engine, prompt in zip(engines, prompts, strict=True)]
    alone = generate_step(mx.array(prompts[0]), model, max_tokens=20)
    tokens = []
    while any(engine.requests for engine in engines):
        for engine in engines:
            engine.step()
        tokens.append(next(alone)[0])
    assert all(reference.check(request) for request in requests)
    assert tokens == [token for token, _ in reference.steps(prompts[0], 20)][: len(tokens)]


def test_a_refusal_leaves_the_model_and_mlx_lm_unchanged():
    model, before = tiny_model("phi3small"), attention_functions()
    inner, weights = model.model, dict(model.model.layers[0].self_attn.items())
    with pytest.raises(cl.ModelError):
        cl.Engine(model, num_blocks=8)
    assert attention_functions() == before
    assert model.model is inner and dict(model.model.layers[0].self_attn.items()) == weights


def last_logits(model, prompt: list[int], chunk_size: int) -> mx.array:
    """mlx-lm's logits after ``prompt`` in chunks, cut to the tokens of `VOCABULARY`."""
    cache = make_prompt_cache(model)
    for start in range(0, len(prompt), chunk_size):
        logits = model(mx.array([prompt[start : start + chunk_size]]), cache=cache)
    return logits[0, -1, :VOCABULARY]


def attention_functions() -> dict:
    """The attention function of each loaded module of mlx-lm."""
    loaded = {
        name: module for name, module in sys.modules.items() if name.startswith("mlx_lm.models.")
    }
    return {
        name: getattr(module, ATTENTION)
        for name, module in loaded.items()
        if hasattr(module, ATTENTION)
    }


# --- the README's table ---------------------------------------------------------------------------


def table() -> str:
    """The README's table of architectures, as Markdown."""
    rows = [(f"exact, {way} ({len(served)})", served) for way, served in SERVED.items()]
    for reason, refused in REFUSED.items():
        if reason.startswith("uses"):
            rows.append(
                (f"refused: a layer {reason.replace(' ', ' `')}` ({len(refused)})", refused)
            )
    unlike_itself = REFUSED["masks a sliding window"] + REFUSED["gives other logits"]
    rows.append(
        (
            f"refused: mlx-lm's own tokens depend on how it cuts a prompt ({len(unlike_itself)})",
            unlike_itself,
        )
    )
    rows.append((f"not tried: needs Metal ({len(NEEDS_METAL)})", NEEDS_METAL))
    rows += [(f"not tried: needs {what} (1)", [name]) for name, (_, what) in NOT_BUILT.items()]
    lines = ["| tokens | architectures |", "| --- | --- |"]
    return (
        "\n".join([*lines, *(f"| {label} | {', '.join(of_them)} |" for label, of_them in rows)])
        + "\n"
    )


if __name__ == "__main__":
    print(table(), end="")
