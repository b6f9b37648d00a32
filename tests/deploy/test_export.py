"""torch.export and torch.jit.trace of reduced models, and what the export refuses."""

import io
import math

import pytest
import torch

import fastreduce
from fastreduce import reference
from fastreduce.deploy import Decided, differing, export, load, settled
from fastreduce.deploy.check import fidelity
from fastreduce.deploy.decisions import Kind
from fastreduce.deploy.export import _WRITE, check
from fastreduce.reducers import radial
from fastreduce.reference import _export
from fastreduce.tokens import Plan

from .models import METHODS, VARIANTS, build, images, patched, run_alone

BATCH = torch.export.Dim("batch", min=1, max=64)


def eager(model, batch):
    return eager_of(model, images(batch, seed=batch))


def eager_of(model, batch):
    with torch.no_grad():
        return model(batch)


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
    model.blocks[1].mlp.drop1.train()
    with pytest.raises(ValueError, match=r"its part blocks\.1\.mlp\.drop1 is in training mode"):
        check(model, images(2), "pt2")
    with pytest.raises(ValueError, match="the model is in training mode"):
        check(model.train(), images(2), "pt2")
    with pytest.raises(ValueError, match=r"dynamo=False.*use dynamo=True"):
        torch.onnx.export(model.eval(), (images(2),), io.BytesIO(), dynamo=False)


def test_endings(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.pt2', got 'model\.onnx'"):
        export(patched("topk"), images(2), tmp_path / "model.onnx", to="pt2")
    with pytest.raises(ValueError, match=r"ends in '\.onnx', '\.xml', '\.pt2', got 'model\.bin'"):
        load("model.bin")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"no folder '.*missing' to write 'model\.onnx' to"):
        export(patched("topk"), images(2), tmp_path / "missing" / "model.onnx")


def _other_layouts(batch):
    """Return the same images in other memory formats: of cameras and image libraries, and a part of larger ones."""
    larger = batch.repeat_interleave(2, dim=2)
    return [batch.to(memory_format=torch.channels_last), larger[:, :, ::2]]


def test_compiled_code_reads_memory_as_it_was_told(tmp_path, monkeypatch):
    """Compiled code checks neither strides nor size nor dtype of its input: the example and all images are brought to
    one memory format, and others than the example's size and dtype are refused."""
    kept, given = {}, []

    class Package:
        def get_metadata(self):
            return kept["inductor_configs"]["aot_inductor.metadata"]

        def __call__(self, batch):
            given.append(batch)
            return batch.sum((1, 2, 3))

    def package(program, **options):
        kept.update(options, example=program.example_inputs[0][0])
        tmp_path.joinpath("model.pt2").touch()

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", package)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda file: Package())
    batch = images(2)
    for example in (batch, *_other_layouts(batch)):
        runtime = load(export(patched("radial"), example, tmp_path / "model.pt2", to="pt2"))
        assert kept["example"].is_contiguous()
        for one in (batch, *_other_layouts(batch), batch.clone().requires_grad_()):
            torch.testing.assert_close(runtime(one), [batch.sum((1, 2, 3))])
            assert torch.equal(given[-1], batch)
            assert given[-1].is_contiguous()
            assert not given[-1].requires_grad
    for wrong in (batch.half(), batch.double(), batch[..., 1:], batch[:, :1]):
        with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 32\) in float32, got \(2, "):
            runtime(wrong)


def test_files_of_others_are_run_without_a_check_of_size(tmp_path, monkeypatch):
    package = lambda batch: batch + 1  # noqa: E731
    package.get_metadata = lambda: {"AOTI_DEVICE_KEY": "cpu"}
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda file: package)
    tmp_path.joinpath("model.pt2").touch()
    assert torch.equal(load(tmp_path / "model.pt2")(torch.ones(2, 3))[0], torch.full((2, 3), 2.0))


def test_a_result_that_is_nan_for_one_image_is_not_faithful(monkeypatch):
    model = patched("sit")  # decides nothing, so that no second file is written

    def runtime(batch):
        return [eager_of(model, batch) * (torch.nan if len(batch) == 1 else 1.0)]

    runtime.name = "a runtime"
    monkeypatch.setattr("fastreduce.deploy.check.load", lambda *rest: runtime)
    found = fidelity(model, None, images(4), "onnx")
    assert math.isnan(found.difference)
    assert not found.faithful


def test_a_compiled_model_is_exported_as_it_was(tmp_path, monkeypatch):
    written = []
    monkeypatch.setitem(_WRITE, "pt2", lambda model, *rest: written.append(model))
    model = patched("radial")
    export(torch.compile(model), images(2), tmp_path / "model.pt2", to="pt2")
    assert written == [model]


def test_sums_and_lengths_are_the_same_in_a_graph(monkeypatch):
    """An ONNX graph has no scatter that adds and no hypot: positions of merged tokens are means over their patches."""
    cos, sin = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3)).unbind(0)
    slot = torch.tensor([[0, 1, -1, 1, 0, 2], [2, 2, 2, -1, 0, -1]])
    for lead in ((), (None,), (None, None)):
        table = cos[lead], sin[lead]
        expected = reference.mean_rows(*table, slot, 3)
        monkeypatch.setattr(_export, "for_onnx", lambda: True)
        torch.testing.assert_close(reference.mean_rows(*table, slot, 3), expected)
        monkeypatch.undo()
    first = torch.stack([cos[1] + cos[3], sin[1] + sin[3]]) / torch.hypot(cos[1] + cos[3], sin[1] + sin[3])
    torch.testing.assert_close(torch.stack([one[0, 0, 1] for one in expected]), first)
    assert [one[1, 0, 1].unique().tolist() for one in expected] == [[1.0], [0.0]]  # an empty slot is not turned


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
        for one in (images(batch, seed=batch), *_other_layouts(images(batch, seed=batch))):
            torch.testing.assert_close(load(file)(one), [expected], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 32\) in float32, got \(2, 3, 32, 32\) in float16"):
        load(file)(images(2).half())


def test_first_members_are_the_same_in_a_graph(monkeypatch):
    plan = Plan(0, 9, 4, slot=torch.tensor([[0, 3, 3, 2, 0, 1, 1, 2, 3], [2, 2, 2, 3, 3, 3, 0, 0, 0]]))
    expected = plan._first_members(2)
    assert expected.tolist() == [[0, 5, 3, 1], [6, 0, 0, 3]]
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(plan._first_members(2), expected)
