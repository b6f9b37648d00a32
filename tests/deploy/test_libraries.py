"""Models of transformers and open_clip as ONNX graphs, any number of images: decisions and numbers of eager mode."""

import pytest
import torch

import fastreduce
from fastreduce.deploy import Decided, export, load, settled
from fastreduce.deploy.export import Leaves, onnx_program

from .models import run_alone
from .test_onnx import ALLOWED

onnxruntime = pytest.importorskip("onnxruntime", reason="the ONNX graphs are run by onnxruntime")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

AT, KEEP = (0,), (9,)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"image_size": 32, "patch_size": 8}


def images(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=7))


def dinov3():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from fastreduce.integrations.hf.images import ImageModel

    config = transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2)
    return ImageModel(transformers.DINOv3ViTModel(config).eval(), {"input_size": (3, 32, 32)})


def open_clip():
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, width=32, layers=1, heads=4, mlp_ratio=2.0, output_dim=16)


def eva():
    from timm.models.eva import Eva

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    return Eva(**size, use_rot_pos_emb=True)


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (hugging_face, "topk"),
        pytest.param(eva, "tome", marks=pytest.mark.slow),
        pytest.param(dinov3, "evit", marks=pytest.mark.slow),
        pytest.param(open_clip, "tome", marks=pytest.mark.slow),
    ],
    ids=["vit", "eva", "dinov3", "open_clip"],
)
def test_as_eager_in_onnx_runtime(build, method):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    mean = {"positions": "mean"} if build is eva else {}
    fastreduce.patch(model, method, keep=KEEP, at=AT, **mean)
    decided = _Decided(model) if build is hugging_face else Decided(model)
    with torch.no_grad():
        expected = {batch: decided(images(batch)) for batch in (1, 2, 5)}
    program = onnx_program(decided, images(3), [f"out{place}" for place in range(len(expected[1]))])
    assert {node.op_type for node in program.model_proto.graph.node} <= ALLOWED
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, (answer, *tensors) in expected.items():
        found, *theirs = map(torch.as_tensor, session.run(None, {"images": images(batch).numpy()}))
        for one, other in zip(settled(tensors, decided.kinds), settled(theirs, decided.kinds), strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(found, answer, rtol=1e-5, atol=1e-5)


class _Decided(Decided):
    """The same for a model that gives an output of the library's."""

    def forward(self, x):
        output, *decisions = super().forward(x)
        return (output.logits, *decisions)


def test_tensors_of_an_output_without_its_class():
    model = fastreduce.patch(hugging_face().eval(), "topk", keep=KEEP, at=AT)
    with torch.no_grad():
        output = model(images(2), output_hidden_states=True)
        assert torch.equal(Leaves(model)(images(2)), output.logits)
        model.config.output_hidden_states = True
        logits, *states = Leaves(model)(images(2))
    assert torch.equal(logits, output.logits)
    assert len(states) == len(output.hidden_states)


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path):
    model = fastreduce.patch(hugging_face().eval(), "topk", keep=KEEP, at=AT)
    file = export(model, images(3), tmp_path / "model.pt2", to="pt2")
    batches = [images(1), images(5)]
    with torch.no_grad():
        for batch, found in zip(batches, run_alone(file, batches, tmp_path), strict=True):
            expected = model(batch).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(load(file)(batch), [expected], rtol=1e-5, atol=1e-5)
