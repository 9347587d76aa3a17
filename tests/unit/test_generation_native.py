"""Where the native pass comes from, and what happens where it can't be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.generation import Sampling, make_engine
from rlhf_ray.generation.native_model import NativeModel, native_problem
from rlhf_ray.generation.torch_engine import TorchEngine
from rlhf_ray.models import GPT2, GPT2Config
from rlhf_ray.native import NativeUnavailableError, build

CONFIG = GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=2, n_head=2)
compile_again = build.library.__wrapped__


def test_without_a_compiler_plain_torch_generates_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(NativeUnavailableError, match="no-compiler does not run"):
        compile_again()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo what is this >&2; exit 1; }\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeUnavailableError, match="broken can't compile it: what is this"):
        compile_again()
    monkeypatch.setattr(build, "library", compile_again)
    assert isinstance(make_engine(GPT2(CONFIG), eos_id=1, pad_id=0), TorchEngine)
    with pytest.raises(ValueError, match=r"engine = native: .*broken can't compile it.*take auto or torch"):
        make_engine(GPT2(CONFIG), eos_id=1, pad_id=0, kind="native")


def test_the_library_is_compiled_once_and_never_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path / "whole"))
    compile_again()
    (made,) = (tmp_path / "whole").iterdir()
    before = made.stat()
    compile_again()
    assert made.stat() == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / made.name).write_bytes(b"half")
    monkeypatch.setenv("RLHF_RAY_CACHE", str(tmp_path / "half"))
    with pytest.raises(NativeUnavailableError, match=r"native-.*can't be opened.*remove it"):
        compile_again()


def test_what_does_not_fit_the_native_pass_is_named() -> None:
    assert native_problem(GPT2(CONFIG)) == ""
    narrow = GPT2(GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=4))
    assert native_problem(narrow) == "the head dimension 8 is no multiple of 16"
    assert "float64" in native_problem(GPT2(CONFIG, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_gives_each_token_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    native = NativeModel(GPT2(CONFIG, dtype=dtype))
    native.refresh()
    native.reserve(20, 40)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 20)
    tokens = [rng.integers(0, 50, length) for length in lengths]
    whole = native.forward(
        np.concatenate(tokens), np.repeat(np.arange(20), lengths), np.concatenate([np.arange(n) for n in lengths])
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = [
            native.forward(token[t : t + 1], np.array([row]), np.array([t]))
            for row, token in enumerate(tokens)
            for t in range(len(token))
        ]
        assert np.array_equal(np.concatenate(alone), whole)
    out = torch.empty(len(whole), 50)
    logits = native.logits(whole, out).clone()
    for row in range(0, len(whole), 7):
        assert torch.equal(native.logits(whole[row : row + 1], out)[0], logits[row])


def test_greedy_answers_are_those_of_plain_torch() -> None:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    prompts = [[1, 2, 3], [4], [5, 6]]
    sampling = Sampling(max_new_tokens=20, temperature=0.0)
    native, plain = (
        make_engine(model, eos_id=49, pad_id=48, kind=kind).generate(prompts, np.zeros((3, 20)), sampling)
        for kind in ("native", "torch")
    )
    assert [c.tokens for c in native] == [c.tokens for c in plain]
