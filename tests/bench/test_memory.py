"""bench.memory: peaks are counted right, and growth beyond that of the tokens is found."""

import importlib
import json
import os

import pytest
import torch

from bench import memory
from bench.memory import peak_bytes
from bench.proof.gates import Known
from fastreduce.kernels import _workspace
from fastreduce.reducers import _soft as soft

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process has no launches to leave out"
)


def three_steps():
    first = torch.zeros(100)
    second = first + torch.zeros(1000)[:100]  # 4,800 bytes while the sum is computed
    del first
    return second + 1


def test_what_is_alive_at_once_is_counted():
    kept = [torch.zeros(7)]
    assert peak_bytes(three_steps, CPU) == 4800
    assert peak_bytes(lambda: kept.append(torch.zeros(3)), CPU) == 12  # whatever earlier calls have left
    assert peak_bytes(kept.clear, CPU) == 0


def test_models(tmp_path, capsys):
    file = tmp_path / "made.json"
    assert memory.main(["--methods", "topk,radial", "--tokens", "17,65", "--device", "cpu", "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    assert [row["name"] for row in made["peaks"]] == ["unreduced", "topk", "radial"]
    assert all(row["peaks"]["17"] < row["peaks"]["65"] for row in made["peaks"])
    assert made["failures"] == []
    assert "32, 16, 8" in capsys.readouterr().out


def test_growth_is_judged(monkeypatch, capsys):
    peaks = {"linear": 400, "square": 1600, "known": 1500}
    known = {"model known": Known(4, "it has to be"), "model linear": Known(4, "it had to be")}
    monkeypatch.setattr(memory, "KNOWN", known)
    monkeypatch.setattr(
        memory,
        "_models",
        lambda model, tokens, *_: [(name, 100 if tokens == 1025 else most, "") for name, most in peaks.items()],
    )
    assert memory.main(["--methods", "topk", "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert told.count("FAILED") == 2
    assert "model square has 4.003, at most 1.25 is allowed" in told
    assert "the exception of model linear is stale" in told
    assert "known: model known (4): it has to be" in told


@compiles
@pytest.mark.parametrize("name", ["cluster_k_medoids", "sinkhorn_merge"])
def test_an_images_matrix_is_all_that_grows_as_a_square(name, monkeypatch, capsys):
    arguments = ["--primitives", name, "--tokens", "257,1025", "--device", "cpu"]
    assert memory.main(arguments) == 0
    monkeypatch.setattr(memory, "MATRICES", {name: tuple(0.7 * count for count in memory.MATRICES[name])})
    assert memory.main(arguments) == 1
    told = capsys.readouterr().out
    assert f"kernels {name} has" in told
    assert f"reference {name} has" in told


@compiles
@pytest.mark.parametrize("name", ["cluster_k_medoids", "sinkhorn_merge"])
def test_a_batch_takes_no_more_than_the_workspace(name, monkeypatch, capsys):
    monkeypatch.setattr(soft, "LOGITS", 0)  # similarities are not asked for
    arguments = ["--primitives", name, "--tokens", "65,257", "--device", "cpu"]
    monkeypatch.setattr(_workspace, "WORKSPACE", 1 << 20)
    memory.main(arguments)
    assert f"many {name} has" not in capsys.readouterr().out
    module = importlib.import_module(f"fastreduce.kernels.{name}")
    monkeypatch.setattr(module, "workspace_parts", lambda images, bytes_each: [range(images)])
    assert memory.main(arguments) == 1
    assert f"many {name} has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "unknown method 'best'"),
        (["--primitives", "best"], "unknown primitive 'best'"),
        (["--tokens", "17"], "--tokens wants at least two numbers, ascending, got '17'"),
        (["--tokens", "65,17"], "ascending, got '65,17'"),
        (["--methods", "topk", "--tokens", "18,65"], "a square of patches and 1 token more, got 18"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
