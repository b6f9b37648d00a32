"""torch.export and torch.jit.trace of reduced models, and what the export refuses."""

import pytest
import torch

import fastreduce
from fastreduce.deploy import Decided, differing, export, load, settled
from fastreduce.deploy.decisions import Kind
from fastreduce.deploy.export import check
from fastreduce.reducers import radial
from fastreduce.tokens import Plan

from .models import METHODS, VARIANTS, build, images, patched, run_alone

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


def test_a_matching_decides_nothing_of_the_class_token():
    matching = settled([torch.tensor([[0, 2, 1, 2]])], [Kind(False, True, 3)])
    assert [one.tolist() for one in matching] == [[[2, 1, 2]]]
    assert differing(matching, matching) == (0, 3)


def test_a_change_of_places_is_seen_in_no_later_stage():
    """Kept tokens change places in the first stage; the second one keeps the same patches, and then other ones."""
    selections = [Kind(True, False, 5, True), Kind(True, False, 4, True)]
    ours = settled([torch.tensor([[4, 0, 2]]), torch.tensor([[0, 3]])], selections)  # patch 4 and what was fused
    assert [one.tolist() for one in ours] == [[[1, 0, 1, 0, 1]], [[0, 0, 1, 1]]]
    swapped = torch.tensor([[0, 4, 2]])
    assert differing(ours, settled([swapped, torch.tensor([[3, 1]])], selections)) == (0, 9)
    assert differing(ours, settled([swapped, torch.tensor([[3, 0]])], selections)) == (2, 9)
    clusters = [Kind(True, True, 4), Kind(True, True, 2)]
    first = [torch.tensor([[3, 1]]), torch.tensor([[1, 1, 1, 0]])]
    ours = settled([*first, torch.tensor([[0]]), torch.zeros(1, 2)], clusters)
    assert [one.tolist() for one in ours] == [[[1, 1, 1, 3]], [[3, 3]]]
    first = [torch.tensor([[1, 3]]), torch.tensor([[0, 0, 0, 1]])]
    assert differing(ours, settled([*first, torch.tensor([[1]]), torch.zeros(1, 2)], clusters)) == (0, 6)
    assert differing(ours, settled([*first, torch.tensor([[0]]), torch.zeros(1, 2)], clusters)) == (2, 6)


def test_padding_is_no_decision():
    """A graph pads where eager mode cuts to the longest image."""
    kinds = [Kind(True, False, 4), Kind(True, False, 4)]
    cut = [torch.tensor([[2, 1], [3, -1]]), torch.tensor([[1], [0]])]
    padded = [torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1]]), torch.tensor([[0, -1], [0, -1]])]
    assert differing(settled(cut, kinds), settled(padded, kinds)) == (0, 16)


def test_decided_needs_a_patched_model():
    with pytest.raises(ValueError, match="not patched"):
        Decided(build())


@pytest.mark.slow
def test_aotinductor(tmp_path):
    """A single program is compiled, since that takes seconds; ToMe has most of what a graph can hold."""
    model = fastreduce.patch(build(1), "tome", at=0, keep_rate=0.6)
    file = export(model, images(3), tmp_path / "model.pt2", to="pt2")
    for batch, found in zip((1, 5), run_alone(file, [images(1, seed=1), images(5, seed=5)], tmp_path), strict=True):
        expected = eager(model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load(file)(images(batch, seed=batch)), [expected], rtol=1e-5, atol=1e-5)


def test_first_members_are_the_same_in_a_graph(monkeypatch):
    plan = Plan(0, 9, 4, slot=torch.tensor([[0, 3, 3, 2, 0, 1, 1, 2, 3], [2, 2, 2, 3, 3, 3, 0, 0, 0]]))
    expected = plan._first_members(2)
    assert expected.tolist() == [[0, 5, 3, 1], [6, 0, 0, 3]]
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(plan._first_members(2), expected)
