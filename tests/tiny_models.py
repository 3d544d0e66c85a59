"""A tiny seeded model of every architecture in the pinned mlx-lm: `COMMON` dimensions, and in
`CONFIGS` each architecture's own settings.

A model has two to four layers, and a sliding window of `WINDOW` tokens if it has any. Embeddings
are untied where the architecture allows it: a tiny model with tied embeddings repeats a few tokens
and hardly tests attention. Weights are spread wide enough to keep attention sharp.
"""

import contextlib
import importlib
import io
import pkgutil

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten

VOCABULARY, WINDOW = 128, 12
SPREAD = 0.2  # standard deviation of the weights
# Limit of parameters: a larger model has a dimension that its configuration forgot to shrink.
TOO_LARGE = 3_000_000

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    # Scaled down or capped at 30, a tiny model's logits would all be ties.
    logit_scale=1.0,
    final_logit_softcapping=1e4,
    rms_norm_eps=1e-5,
    layer_norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    norm_eps=1e-5,
    layernorm_epsilon=1e-5,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    use_qkv_bias=False,
    use_qk_norm=True,
    qk_norm=True,
    partial_rotary_factor=0.5,
    rope_scaling=None,
    sliding_window=WINDOW,
    sliding_window_pattern=2,
    layer_types=["sliding_attention", "full_attention"],
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_shared_experts=1,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=32,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    moe_layer_freq=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    # K and V of low rank, and the index of sparse attention
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    index_head_dim=16,
    index_n_heads=2,
    index_topk=8,
    # GPT-2's names
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_inner=96,
    n_positions=512,
    n_ctx=512,
    # Granite's and MiniCPM's multipliers
    logits_scaling=1.0,
    attention_multiplier=0.25,
    embedding_multiplier=1.0,
    residual_multiplier=1.0,
    dim_model_base=64,
    scale_depth=1.4,
    scale_emb=1.0,
    # linear attention and state spaces
    layer_group_size=2,
    group_norm_size=1,
    conv_bias=False,
    conv_L_cache=3,
    mamba_d_conv=4,
    mamba_d_state=8,
    mamba_expand=2,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
    state_size=8,
    conv_kernel=4,
    use_conv_bias=True,
    time_step_rank=4,
    n_groups=1,
)

YARN = dict(
    type="yarn",
    rope_type="yarn",
    factor=2.0,
    original_max_position_embeddings=16,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    rope_theta=10000.0,
    llama_4_scaling_beta=0.1,
)
KDA = dict(kda_layers=[1], full_attn_layers=[2], num_heads=4, head_dim=16, short_conv_kernel_size=4)
KIMI = dict(
    linear_attn_config=KDA, model_max_length=512, num_experts_per_token=2, mla_use_nope=True
)
PER_TYPE = dict(
    rope_parameters={
        kind: dict(rope_theta=1e4, rope_type="default")
        for kind in ("sliding_attention", "full_attention")
    }
)
FULL = dict(layer_types=["full_attention"] * 2)
NGRAM = dict(emb_neighbor_num=2, emb_split_num=2, ngram_vocab_size_ratio=2)
LONGCAT = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    ffn_hidden_size=96,
    moe_topk=2,
    expert_ffn_hidden_size=32,
    zero_expert_num=1,
    num_layers=2,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)
LFM = dict(
    block_dim=64,
    block_multiple_of=8,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    block_ff_dim=96,
    full_attn_idxs=[1],
    layer_types=["conv", "full_attention"],
    use_expert_bias=True,
    num_dense_layers=1,
)

# Settings of an architecture besides COMMON. "text" is its inner text configuration: a dict, or the
# name of another architecture. A name in CONFIGS may end with a variant in parentheses.
CONFIGS: dict[str, dict] = {
    "afm7": dict(hidden_dim=64, num_layers=4, num_kv_reuse_layers=2, num_heads=4, num_kv_heads=2),
    "afmoe": dict(num_dense_layers=1),
    "apertus": dict(post_norm=False),
    "baichuan_m1": dict(sliding_window_layers=[1], conv_window=2),
    "dbrx": dict(
        d_model=64,
        n_layers=2,
        n_heads=4,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(rope_scaling=YARN, topk_method="greedy"),
    "ernie4_5_moe": dict(moe_num_experts=4),
    "exaone": dict(num_layers=2),
    "exaone4": dict(sliding_window_pattern="LG"),
    "exaone_moe": dict(is_moe_layer=[False, True]),
    "falcon_h1": dict(mamba_d_head=16, mamba_d_ssm=64, mamba_n_heads=4),
    "gear": dict(
        layer_types=["conv_mixer", "sliding_attention", "full_attention"], num_hidden_layers=3
    ),
    "gemma3": dict(text="gemma3_text"),
    "gemma3n": dict(
        text=dict(
            model_type="gemma3n_text",
            num_hidden_layers=4,
            layer_types=COMMON["layer_types"] * 2,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCABULARY,
            rope_local_base_freq=1e4,
            activation_sparsity_pattern=[0.0] * 4,
            hidden_size_per_layer_input=8,
            altup_num_inputs=2,
            altup_coef_clip=120.0,
            altup_correct_scale=True,
            altup_active_idx=0,
            laurel_rank=8,
        )
    ),
    "gemma4": dict(text="gemma4_text"),
    "gemma4_text": dict(
        num_hidden_layers=4,
        layer_types=COMMON["layer_types"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        global_head_dim=32,
        num_global_key_value_heads=1,
    ),
    "glm_moe_dsa": dict(rope_parameters=dict(rope_theta=1e4)),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gptj": dict(rotary_dim=8),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_proj_bias=False,
        mamba_conv_bias=True,
    ),
    "hunyuan": dict(
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling=dict(alpha=1000.0, factor=1.0, type="dynamic"),
    ),
    "internlm3 (dynamic)": dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "iquestloopcoder": dict(loop_window_size=WINDOW),
    "jamba": dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2
    ),
    "kimi_k25": dict(text={}),
    "kimi_k3": dict(
        text=KIMI | dict(model_type="kimi_linear", attn_res_block_size=2, activation_situ_beta=1.0)
    ),
    "kimi_linear": KIMI,
    "kimi_vl": dict(text={}),
    "laguna": PER_TYPE,
    "lfm2": LFM,
    "lfm2-vl": dict(text="lfm2"),
    "lfm2_moe": LFM,
    "lille-130m": dict(block_size=512, n_kv_heads=2),
    "llama": FULL,
    "llama (sliding window)": {},
    "llama4": dict(
        text=dict(
            model_type="llama4_text",
            attention_chunk_size=16,
            interleave_moe_layer_step=1,
            intermediate_size_mlp=96,
            num_experts_per_tok=1,
        )
    ),
    "llama4_text": dict(intermediate_size_mlp=96, no_rope_layers=[1, 0]),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT | NGRAM,
    "mamba2": dict(num_heads=8, time_step_limit=(0.001, 100.0)),
    "mellum": PER_TYPE,
    "minicpm3": dict(
        rope_scaling=dict(
            original_max_position_embeddings=16, short_factor=[1.0] * 4, long_factor=[2.0] * 4
        )
    ),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[1, 0],
        moe_layer_freq=[0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        swa_rope_theta=1e4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        v_head_dim=8,
        swa_head_dim=16,
        swa_v_head_dim=8,
    ),
    "minimax": dict(rotary_dim=8),
    "minimax_m3_vl": dict(
        text=dict(
            dense_intermediate_size=96,
            rotary_dim=8,
            layer_types=None,
            mlp_layer_types=["dense", "sparse"],
            sparse_attention_config=dict(
                sparse_num_index_heads=2,
                sparse_index_dim=16,
                sparse_block_size=4,
                sparse_topk_blocks=2,
                sparse_local_block=1,
                sparse_attention_freq=[0, 1],
            ),
        )
    ),
    "ministral3": dict(rope_parameters=YARN),
    "mistral3": dict(text="llama"),
    "mistral4": dict(rope_parameters=YARN, head_dim=24),
    "muse_glimmer": {},
    "muse_spark": dict(
        text=dict(
            post_norm_eps=1e-5,
            rope_parameters=dict(rope_theta=1e4),
            layer_rope_theta=[1e4, 0.0],
            output_multiplier=1.0,
            moe_hidden_size=32,
            num_shared_experts=0,
        )
    ),
    "nanbeige": dict(num_loops=2),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(
        num_hidden_layers=3,
        block_configs=[
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=0.5)),
            dict(attention=dict(no_op=True), ffn=dict(no_op=True)),
            dict(attention=dict(n_heads_in_group=4), ffn=dict(replace_with_linear=True)),
        ],
    ),
    "nemotron_h": dict(
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=8,
        hybrid_override_pattern="M*",
        layer_types=None,
    ),
    "olmo_hybrid": dict(
        layer_types=["linear_attention", "full_attention"], linear_allow_neg_eigval=False
    ),
    "openelm": dict(
        num_transformer_layers=2,
        model_dim=64,
        ffn_dim_divisor=8,
        num_query_heads=[4, 8],
        num_kv_heads=[2, 4],
        ffn_multipliers=[1.0, 2.0],
        share_input_output_layers=False,
    ),
    "phi3 (longrope)": dict(
        rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
        original_max_position_embeddings=16,
    ),
    "phi3small": dict(
        dense_attention_every_n_layers=2,
        ff_intermediate_size=96,
        gegelu_limit=20.0,
        vocab_size=100352,
        blocksparse_block_size=32,
        blocksparse_num_local_blocks=1,
        blocksparse_vert_stride=2,
    ),
    "phimoe": dict(
        original_max_position_embeddings=16,
        rope_scaling=dict(
            short_factor=[1.0] * 8, long_factor=[2.0] * 8, short_mscale=1.0, long_mscale=1.2
        ),
    ),
    "phixtral": dict(num_vocab=VOCABULARY, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8),
    "pixtral": dict(text="llama"),
    "plamo": dict(n_shared_head=2),
    "plamo2": dict(hidden_size_per_head=16, attention_window_size=WINDOW, mamba_num_heads=4),
    "prism_hadamard_qwen35": dict(text="qwen3_5"),
    "qwen": dict(kv_channels=16),
    "qwen2_vl": dict(text="qwen2"),
    "qwen3_5": dict(text=dict(full_attention_interval=2, num_experts=0)),
    "qwen3_5_moe": dict(text=dict(full_attention_interval=2)),
    "qwen3_next": dict(full_attention_interval=2),
    "qwen3_vl": dict(text="qwen3"),
    "qwen3_vl_moe": dict(text="qwen3_moe"),
    "recurrent_gemma": dict(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
        block_types=["recurrent", "attention"],
    ),
    "rwkv7": dict(a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8),
    "smollm3": FULL,
    "spark2_5": PER_TYPE,
    "step3p5": dict(
        num_attention_groups=2,
        moe_num_experts=4,
        moe_top_k=2,
        share_expert_dim=32,
        rope_theta=1e4,
        attention_other_setting=dict(
            num_attention_heads=4, num_attention_groups=1, head_dim=16, true_head_dim=16
        ),
    ),
}


def modules() -> list[str]:
    """Names of all modules in `mlx_lm.models`, architectures or not."""
    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def config(name: str) -> dict:
    """The whole configuration of an architecture."""
    module = name.split(" ")[0]
    made = COMMON | {"model_type": module} | CONFIGS.get(name, {})
    text = made.pop("text", None)
    if isinstance(text, str):
        made["text_config"] = config(text)
    elif text is not None:
        made["text_config"] = COMMON | text
    return made


def tiny_model(name: str, seed: int = 0):
    """A seeded model of an architecture; `ValueError` if it has too many parameters."""
    with contextlib.redirect_stdout(io.StringIO()):  # some modules print before they exit
        module = importlib.import_module(f"mlx_lm.models.{name.split(' ')[0]}")
    model = module.Model(module.ModelArgs.from_dict(config(name)))
    weights = tree_flatten(model.parameters())
    if (count := sum(weight.size for _, weight in weights)) > TOO_LARGE * (
        1 + 4 * (name == "phi3small")
    ):
        raise ValueError(f"{name} has {count:,} parameters")
    keys = mx.random.split(mx.random.key(seed), len(weights))
    model.update(
        tree_unflatten(
            [
                (path, _sharp(path, weight, key))
                for (path, weight), key in zip(weights, keys, strict=True)
            ]
        )
    )
    mx.eval(model.parameters())
    return model.eval()


def _sharp(path: str, weight: mx.array, key: mx.array) -> mx.array:
    """A random weight; norms and gains (vectors of ones) stay, as small ones would make attention
    vanish.
    """
    is_gain = "norm" in path or (weight.ndim <= 1 and mx.all(weight == 1).item())
    if is_gain or not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    return mx.random.normal(weight.shape, scale=SPREAD, key=key).astype(weight.dtype)
