"""Every reducer as an ONNX graph: the same decisions and numbers as eager mode, by operators that runtimes have."""

import pytest
import torch

from fastreduce.deploy import Decided, load, settled
from fastreduce.deploy.export import onnx_program

from .models import NAMES, images, patched

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX graphs are run by onnxruntime")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

# No loop, no branch, no operator of our own, nothing whose shape depends on values, no scatter that adds.
_OPERATORS = """
Abs Add And ArgMax ArgMin Cast Clip Concat Constant ConstantOfShape Conv CumSum Div Equal Erf Exp Expand
Gather GatherElements Gelu Gemm Greater Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log
LogSoftmax MatMul Max Min Mul Neg Not Or Pad Pow Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceSum Reshape ScatterElements Shape Slice Softmax Split Sqrt Squeeze Sub Tile TopK
Transpose Unsqueeze Where
"""
ALLOWED = set(_OPERATORS.split())


@pytest.fixture(scope="module", params=NAMES)
def exported(request):
    decided = Decided(patched(request.param))
    expected = {}
    with torch.no_grad():
        for batch in (1, 2, 5):
            expected[batch] = decided(images(batch, seed=batch))
    names = [f"out{place}" for place in range(len(expected[1]))]
    return decided, expected, onnx_program(decided, images(3), names).model_proto


def test_as_eager_with_other_images_in_other_batches(exported):
    decided, expected, graph = exported
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, (logits, *tensors) in expected.items():
        found, *theirs = map(torch.as_tensor, session.run(None, {"images": images(batch, seed=batch).numpy()}))
        ours = settled(tensors, decided.kinds)
        for one, other in zip(ours, settled(theirs, decided.kinds), strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def test_operators_that_every_runtime_has(exported):
    graph = exported[2]
    assert not graph.functions
    for node in graph.graph.node:
        assert node.domain == ""
        assert node.op_type in ALLOWED
        if node.op_type == "ScatterElements":  # silently wrong in TensorRT with a reduction
            assert all(attribute.name != "reduction" or attribute.s == b"none" for attribute in node.attribute)


def test_idle_threads_of_the_runtime_do_not_spin(tmp_path, monkeypatch):
    """Several models in one process would take each other's cores."""
    given = []
    made = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda file, options, **rest: given.append(options) or made(file, options, **rest),
    )
    model = torch.nn.Linear(4, 2).eval()
    torch.onnx.export(model, (torch.ones(1, 4),), tmp_path / "linear.onnx", dynamo=True, verbose=False)
    (found,) = load(tmp_path / "linear.onnx", threads=2)(torch.ones(1, 4))
    torch.testing.assert_close(found, model(torch.ones(1, 4)).detach())
    with pytest.raises(ValueError, match="no bfloat16: export the model in float32 or float16"):
        load(tmp_path / "linear.onnx", threads=2)(torch.ones(1, 4, dtype=torch.bfloat16))
    options = given[0]
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
