"""Every reducer as an ONNX graph: the same decisions and numbers as eager mode, by operators that runtimes have."""

import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce
from fastreduce.deploy import Decided, settled
from fastreduce.deploy.export import onnx_program

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX graphs are run by onnxruntime")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

AT = (1, 2)
METHODS = {
    "topk": {},
    "evit": {},
    "dynamicvit": {},
    "ats": {"trim": False},
    "tome": {},
    "kmedoids": {},
    "dpcknn": {},
    "sit": {},
    "patchmerger": {},
    "sinkhorn": {"eps": 0.1},
    "radial": {"norm": "l2"},  # another norm is another constant in the same graph
}
# Other options, without a class token or with two prefix tokens: where the graph is another one.
VARIANTS = {
    "tome-exact-registers": {"rounds": "exact", "reg_tokens": 2},
    "kmedoids-members": {"cost": "members"},
    "kmedoids-equal": {"equal_weight": True, "first": 1, "keep": [5, 3]},
    "evit-received": {"class_token": False, "global_pool": "avg"},
}

# No loop, no branch, no operator of our own, nothing whose shape depends on values, no scatter that adds.
_OPERATORS = """
Abs Add And ArgMax ArgMin Cast Clip Concat Constant ConstantOfShape Conv CumSum Div Equal Erf Exp Expand
Gather GatherElements Gelu Gemm Greater Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log
LogSoftmax MatMul Max Min Mul Neg Not Or Pad Pow Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceSum Reshape ScatterElements Shape Slice Softmax Split Sqrt Squeeze Sub Tile TopK
Transpose Unsqueeze Where
"""
ALLOWED = set(_OPERATORS.split())


def build(**options):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=7, **options
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def patched(name):
    options = dict({**METHODS, **VARIANTS}[name])
    of_model = {key: options.pop(key) for key in ("reg_tokens", "class_token", "global_pool") if key in options}
    if name != "radial" and "keep" not in options:
        options["keep_rate"] = 0.6
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        return fastreduce.patch(build(**of_model), name.split("-")[0], at=AT, **options).eval()


def images(batch, seed=5):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[*METHODS, *VARIANTS])
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
