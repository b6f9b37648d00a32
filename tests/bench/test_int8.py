"""Layers that ONNX Runtime quantises in a reduced model, and the table of them."""

from collections import Counter

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce
from bench import deploy_tables, int8
from fastreduce.deploy import export, float_nodes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
DEPTH = 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 7}
    return VisionTransformer(**size).eval()


def _operators(file):
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("method", ["topk", "tome"])
def test_layers_with_weights_are_quantised_and_nothing_else(model, method, tmp_path):
    """Products of tokens with tokens, in attention, matching and merging, stay in float32."""
    fastreduce.patch(model, method, keep_rate=0.5, at=(1,))
    images = torch.randn(4, 3, 32, 32)
    file = export(model, images[:2], tmp_path / "model.onnx")
    before = _operators(file)
    dynamic = _operators(int8.quantised(file, images, "dynamic"))
    layers = 4 * DEPTH + 1  # with the head
    if method == "topk":
        layers += 2  # keys and values, the class token's query, the kept queries
    assert dynamic["MatMulInteger"] == layers
    assert dynamic["MatMul"] == before["MatMul"] + before["Gemm"] - dynamic["MatMulInteger"]

    nodes = onnx.load(int8.quantised(file, images, "static")).graph.node
    scaled = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    products = [{*node.input[:2]} & scaled for node in nodes if node.op_type in ("MatMul", "Gemm")]
    assert sorted(map(len, products)) == [0] * (len(products) - layers) + [2] * layers
    assert len(float_nodes(file)) == len(products) - layers  # also before it is prepared


def test_what_it_changes_is_measured(model, tmp_path):
    reduced = fastreduce.patch(model, "topk", keep_rate=0.5, at=(1,))
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    with torch.no_grad():
        labels[:4] = reduced(images[:4]).argmax(1)  # float32 gets at least four right
    subject = int8.Subject("small", {"unreduced": reduced}, images, images, labels)
    float32, dynamic, static = int8.measure(subject, 2, 1, tmp_path)
    assert float32["difference"] == 0
    assert float32["same_class"] == 1
    assert float32["accuracy"]["after"] >= 4 / 6
    for row in (dynamic, static):
        assert 0 < row["difference"] < 0.2
        assert row["accuracy"]["before"] == float32["accuracy"]["after"]


def test_one_line_for_each_kind_of_numbers():
    row = {"method": "topk", "int8": "static", "over_unreduced": 1.8, "ratio": 1.25, "same_class": 0.75}
    accuracy = {"after": 0.7014, "difference": -0.0012, "interval": [-0.004, 0.0016]}
    (line,) = deploy_tables.int8_lines([{**row, "difference": 0.0123}])[2:]
    assert line == "| Top-K | static | 1.80 | 1.25 | 75% | 1.2% |"
    (line,) = deploy_tables.int8_lines([{**row, "accuracy": accuracy}])[2:]
    assert line == "| Top-K | static | 1.80 | 1.25 | 70.14 | -0.12 (-0.40 to +0.16) |"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--root", "there"], "--checkpoint"),
        (["--rounds", "0"], "at least 1"),
        (["--model", "vit_that_is_not"], "vit_that_is_not"),
    ],
)
def test_what_it_refuses(wrong, said, capsys):
    with pytest.raises(SystemExit) as end:
        int8.main(wrong)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
