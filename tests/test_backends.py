"""Which backend runs, and that an explicit choice never falls back."""

import os
import subprocess
import sys

import pytest
import torch

import fastreduce
from fastreduce import backends, ops
from fastreduce.backends import resolve


class _OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a GPU; nothing but resolve() looks at it."""

    @property
    def device(self):
        return torch.device("cuda")


def _cuda(dtype=torch.float32):
    return torch.empty(1, dtype=dtype).as_subclass(_OnDevice)


@pytest.fixture
def _no_environment(monkeypatch):
    monkeypatch.setattr(backends, "_ENVIRONMENT", "auto")


@pytest.mark.usefixtures("_no_environment")
def test_auto_follows_the_device():
    assert resolve("auto", torch.empty(1)) == "reference"
    assert resolve(None, torch.empty(1)) == "reference"
    assert resolve("auto", torch.empty(1, device="meta")) == "reference"
    assert resolve("auto", _cuda()) == "triton"


@pytest.mark.usefixtures("_no_environment")
def test_argument_before_context_before_environment(monkeypatch):
    tensor = _cuda()
    monkeypatch.setattr(backends, "_ENVIRONMENT", "reference")
    assert resolve(None, tensor) == "reference"
    with fastreduce.backend("triton"):
        assert resolve(None, tensor) == "triton"
        assert resolve("auto", tensor) == "triton"
        assert resolve("reference", tensor) == "reference"
        with fastreduce.backend("reference"):
            assert resolve(None, tensor) == "reference"
        assert resolve(None, tensor) == "triton"
    assert resolve(None, tensor) == "reference"


def test_context_is_left_on_an_error():
    with pytest.raises(KeyError), fastreduce.backend("reference"):
        raise KeyError
    assert not backends._context


def test_unknown_names_are_quoted():
    with pytest.raises(ValueError, match="'cuda'"):
        resolve("cuda", torch.empty(1))
    with pytest.raises(ValueError, match="'fast'"), fastreduce.backend("fast"):
        pass


def test_explicit_triton_on_the_cpu_raises():
    x, index = torch.randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ops.gather_tokens(x, index, backend="triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), fastreduce.backend("triton"):
        ops.gather_tokens(x, index)


def test_explicit_triton_refuses_float64_and_auto_says_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    with pytest.raises(RuntimeError, match="float64"):
        resolve("triton", _cuda(torch.float64))
    assert not caplog.records
    for _ in range(2):
        assert resolve("auto", _cuda(torch.float64)) == "reference"
    assert len([record for record in caplog.records if "float64" in record.message]) == 1


def test_without_triton_auto_says_once_and_triton_raises(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    for _ in range(2):
        assert resolve("auto", _cuda()) == "reference"
    assert len(caplog.records) == 1
    assert "not installed" in caplog.text
    with pytest.raises(RuntimeError, match="not installed"):
        resolve("triton", _cuda())


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("nonsense", 1)])
def test_environment_variable(value, code):
    script = "from fastreduce.backends import _ENVIRONMENT; print(_ENVIRONMENT)"
    environment = {**os.environ, "FASTREDUCE_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert value in (done.stdout if code == 0 else done.stderr.splitlines()[-1])
