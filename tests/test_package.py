"""Import of the package with its BLAS, the models, and the install."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import yaml

import cortexlab as cl
from cortexlab.host import blas
from cortexlab.host import models as model

ROOT = Path(__file__).parent.parent


needs_blas = pytest.mark.skipif(
    not blas.needed(), reason="only MLX's Linux CPU build needs another BLAS"
)


def python(code: str, **environment) -> subprocess.CompletedProcess:
    """Run ``code`` in a new Python process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


@needs_blas
def test_an_optimized_blas_is_loaded_before_mlx():
    code = (
        "import cortexlab; from cortexlab.bench import doctor; print(cortexlab.blas.active.path, "
        "doctor.sgemm_gflops())"
    )
    path, gflops = python(code).stdout.split()
    assert path != "None" and float(gflops) > doctor_limit()


def doctor_limit() -> float:
    from cortexlab.bench.doctor import SLOW_SGEMM_GFLOPS

    return SLOW_SGEMM_GFLOPS


@needs_blas
def test_importing_mlx_before_cortexlab_warns_once():
    done = python(
        "import mlx.core; import cortexlab; import cortexlab.allocators; "
        "print(cortexlab.blas.active.note)"
    )
    assert done.stdout.strip() == "mlx was imported before cortexlab"
    assert done.stderr.count("import cortexlab first") == 1


@needs_blas
def test_a_chosen_blas_that_does_not_load_is_named_in_the_note():
    done = python(
        "import cortexlab; print(cortexlab.blas.active.note)", CORTEXLAB_BLAS="/nowhere/libblas.so"
    )
    assert "/nowhere/libblas.so" in done.stdout


def test_smollm2_knows_the_capital_of_france(smollm2):
    from mlx_lm.generate import generate_step

    llm, tokenizer = smollm2
    tokens = [
        token
        for token, _ in generate_step(
            mx.array(tokenizer.encode("The capital of France is")), llm, max_tokens=4
        )
    ]
    assert tokenizer.decode(tokens).startswith(" Paris")


def test_smollm2s_tokenizer_keeps_any_text_and_knows_digits_chat_and_eos(smollm2):
    tokenizer = smollm2[1]
    text = "In 2024, naïve café-goers paid €3.50 —\n\tright?  <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2024")) == 4, "each digit is a token"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.cpu  # on other devices weights keep the file's type
def test_weights_are_float32_on_the_cpu(smollm2):
    assert smollm2[0].model.layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_equal_seeds_give_equal_tiny_models():
    weights = [model.tiny_llama(seed).lm_head.weight for seed in (0, 0, 1)]
    assert mx.array_equal(weights[0], weights[1]) and not mx.array_equal(weights[0], weights[2])


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_model_file_is_refused(tmp_path, monkeypatch, damage):
    good = model.find_smollm2().read_bytes()
    bad = (
        good[: len(good) // 2]
        if damage == "truncated"
        else good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    )
    (tmp_path / model.GGUF).write_bytes(bad)
    monkeypatch.setattr(model, "find_smollm2", lambda: tmp_path / model.GGUF)
    with pytest.raises(cl.ModelError, match="corrupt or truncated"):
        cl.load_model("smollm2")


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(cl.BadInput, match="unknown model 'gpt5'"):
        cl.load_model("gpt5")


def test_environment_yml_lists_the_dependencies_of_pyproject():
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pip_section() == [*wanted, "--editable ."]


def test_the_pip_section_makes_a_working_environment(tmp_path):
    """A clean venv with the packages of environment.yml alone serves a request."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(pip_section()))
    install = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--requirement",
        requirements,
    ]
    done = subprocess.run(install, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "CI" not in os.environ and "connection" in done.stderr.lower():
        pytest.skip("no network, and pip's cache is not enough")
    assert done.returncode == 0, done.stderr[-2000:]
    code = (
        "import cortexlab as cl; e = cl.Engine(cl.load_model('tiny')[0], num_blocks=8); "
        "e.submit([1], 2); print(len(list(e.run())))"
    )
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2", done.stderr[-2000:]


def pip_section() -> list[str]:
    """Requirements in the pip section of environment.yml."""
    (section,) = [
        part["pip"]
        for part in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(part, dict)
    ]
    return section
