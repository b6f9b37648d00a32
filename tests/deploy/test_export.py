"""torch.export and torch.jit.trace of reduced models, and what the export refuses."""

import pytest
import torch

import fastreduce
from fastreduce.deploy import Decided, differing, export, load, settled
from fastreduce.deploy.decisions import Kind
from fastreduce.deploy.export import check
from fastreduce.reducers import radial
from fastreduce.tokens import Plan

from .models import METHODS, VARIANTS, build, images, patched

BATCH = torch.export.Dim("batch", min=1, max=64)


def eager(model, batch):
    with torch.no_grad():
        return model(images(batch, seed=batch))


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_traced_models_take_other_batches(name):
    model = patched(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(3), check_trace=False)
        for batch in (1, 2, 5):
            torch.testing.assert_close(traced(images(batch, seed=batch)), eager(model, batch))


@pytest.mark.parametrize("options", [{"trim": True}, {"packed": True}, {"packed": True, "trim": False}])
def test_lengths_of_an_example_are_not_traced(options):
    model = fastreduce.patch(build(), "ats", at=(1,), keep_rate=0.6, **options).eval()
    with pytest.raises(ValueError, match=r"keep the lengths.*=False"):
        torch.jit.trace(model, images(3), check_trace=False)


def test_packed_tokens_are_exported_with_padding():
    model = fastreduce.patch(build(), "ats", at=(0, 1), keep_rate=0.6, packed=True).eval()
    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: BATCH},)).module()
        for batch in (1, 2, 5):
            torch.testing.assert_close(program(images(batch, seed=batch)), eager(model, batch), rtol=1e-5, atol=1e-5)


def test_patterns_made_while_exporting_leave_the_gradient_alone():
    """Changes of the gradient's mode become parts of the graph, which torch's decompositions cannot take apart."""
    radial._patterns.cache_clear()
    model = fastreduce.patch(build(1), "radial", at=0).eval()
    with torch.no_grad():
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: BATCH},))
    assert "set_grad_enabled" not in str(program.graph)
    torch.testing.assert_close(program.run_decompositions().module()(images(2, seed=2)), eager(model, 2))


def test_what_cannot_be_exported():
    model = patched("topk")
    with pytest.raises(ValueError, match=r"'onx'.*'onnx', 'openvino', 'pt2'"):
        check(model, images(2), "onx")
    with pytest.raises(TypeError, match="got str"):
        check("model", images(2), "pt2")
    with pytest.raises(ValueError, match=r"at least one image, got \(0, 3, 32, 32\)"):
        check(model, images(0), "pt2")
    with pytest.raises(ValueError, match="training mode"):
        check(model.train(), images(2), "pt2")


def test_endings(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.pt2', got 'model\.onnx'"):
        export(patched("topk"), images(2), tmp_path / "model.onnx", to="pt2")
    with pytest.raises(ValueError, match=r"ends in '\.onnx', '\.xml', '\.pt2', got 'model\.bin'"):
        load("model.bin")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "model.onnx")


def test_decisions_in_a_form_without_order():
    """Kept tokens in another order are the same decision; another token is another one, and ends the comparison."""
    kept = torch.tensor([[3, 1], [0, 2]])
    kinds = [Kind(True, False, 4), Kind(False, True, 2)]
    slots = torch.tensor([[0, 1], [1, 0]])
    ours = settled([kept, slots], kinds)
    assert ours[0].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert differing(ours, settled([kept.flip(1), slots], kinds)) == (0, 12)
    other = settled([torch.tensor([[3, 1], [0, 1]]), 1 - slots], kinds)
    assert differing(ours, other) == (2 + 2, 8 + 2)  # of the second image nothing more is counted
    centres = [Kind(True, True, 3)]
    labels = settled([torch.tensor([[2, 0]]), torch.tensor([[1, 0, 0]])], centres)
    assert labels[0].tolist() == [[0, 2, 2]]


def test_decided_needs_a_patched_model():
    with pytest.raises(ValueError, match="not patched"):
        Decided(build())


@pytest.mark.slow
def test_aotinductor(tmp_path):
    """A single program is compiled, since that takes seconds; ToMe has most of what a graph can hold."""
    model = fastreduce.patch(build(1), "tome", at=0, keep_rate=0.6)
    file = export(model, images(3), tmp_path / "model.pt2", to="pt2")
    run = load(file)
    for batch in (1, 5):
        torch.testing.assert_close(run(images(batch, seed=batch))[0], eager(model, batch), rtol=1e-5, atol=1e-5)


def test_first_members_are_the_same_in_a_graph(monkeypatch):
    plan = Plan(0, 9, 4, slot=torch.tensor([[0, 3, 3, 2, 0, 1, 1, 2, 3], [2, 2, 2, 3, 3, 3, 0, 0, 0]]))
    expected = plan._first_members(2)
    assert expected.tolist() == [[0, 5, 3, 1], [6, 0, 0, 3]]
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(plan._first_members(2), expected)
