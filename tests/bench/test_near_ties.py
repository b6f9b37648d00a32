"""Near-ties: margins of hand-made scores, and a runtime that decides otherwise where the gap is narrow or wide."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fastreduce
from bench import near_ties
from fastreduce.deploy import Decided

ARGUMENTS = ["--model", "test_vit", "--methods", "topk", "--runtimes", "onnxruntime", "--images", "3"]


def build(method):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return Decided(fastreduce.patch(model, method, at=(0, 1), keep_rate=0.5).eval())


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_margins_of_scores():
    values = torch.tensor([[-3.0, -1.0, -2.5, math.inf], [0.5, -0.5, 0.0, math.inf]])  # negated: the lowest is the best
    spread, size, gap = near_ties._margins(values, 2)
    assert spread.tolist() == [2.0, 1.0]
    assert size.tolist() == [3.0, 0.5]
    assert gap.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("method", near_ties.METHODS)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_margins_of_a_model(method):
    """The decisions are those without the notes, one stage has one margin, and afterwards nothing is noted."""
    decided = build(method)
    with torch.no_grad():
        expected = decided(images())
    results, each = near_ties.margins(decided, images())
    assert len(each) == 2
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)
    for spread, size, gap in each:
        assert spread.shape == size.shape == gap.shape == (3,)
        assert (gap > 0).all()
        assert (gap < spread).all()
        assert (spread <= 2 * size).all()
    with near_ties._noted() as (found, _):
        pass
    decided(images())
    assert not found


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_gap_of_a_tie():
    """Tokens of the same patches, without positions, tie in the first stage."""
    decided = build("dynamicvit")
    model = decided.model
    same = images(1)[:, :, :8, :8].repeat(1, 1, 4, 4)
    with torch.no_grad():
        model.pos_embed.zero_()
        (_, each) = near_ties.margins(decided, same)
    assert each[0].gap.item() == 0


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"in 2 stages: expected one of"):
        near_ties.margins(build("ats"), images())


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_drawn_layers_have_wider_scores():
    decided = build("dynamicvit")
    narrow = near_ties.margins(decided, images())[1][0]
    near_ties.redraw(decided.model, 0.15)
    assert (near_ties.margins(decided, images())[1][0].spread > 10 * narrow.spread).all()


def _swapping(decided):
    """Return a loader of a runtime that drops the last kept token of the first image for another one."""

    def run(batch):
        with torch.no_grad():
            found = [one.clone() for one in decided(batch)]
        kept = set(found[1][0].tolist())
        found[1][0, -1] = next(token for token in range(16) if token not in kept)
        found[0][0] += 1
        return found

    return lambda file: run


def test_a_runtime_that_decides_otherwise(monkeypatch, tmp_path):
    decided = build("topk")
    monkeypatch.setattr(near_ties, "export", lambda *given, **names: tmp_path / "none")
    monkeypatch.setattr(near_ties, "load", _swapping(decided))
    (row,) = near_ties.compare(decided, images(), ["onnxruntime"], tmp_path)
    margin = near_ties.margins(decided, images())[1][0]
    assert row["otherwise"] == [(margin.gap[0].item(), (margin.gap / margin.size)[0].item())]
    assert row["difference"] == 0
    assert row["difference_otherwise"] > 0.01


@pytest.mark.parametrize(("part", "code"), [(1e-6, 0), (1e-3, 1)])
def test_a_wide_gap_is_an_error(monkeypatch, capsys, tmp_path, part, code):
    row = {"method": "topk", "layers": "", "runtime": "onnxruntime", "images": 3, "spread": [0.5, 1.0]}
    row |= {"gap": [1e-6, 0.1], "otherwise": [(part, part)], "difference": 1e-6, "difference_otherwise": 0.1}
    monkeypatch.setattr(near_ties, "_measure", lambda given: iter([row]))
    file = tmp_path / "result.json"
    assert near_ties.main([*ARGUMENTS, "--json", str(file)]) == code
    assert '"difference_otherwise": 0.1' in file.read_text()
    printed = capsys.readouterr().out
    assert "| Top-K |  | onnxruntime | 1 of 3 |" in printed
    assert ("in spite of a gap" in printed) == bool(code)


@pytest.mark.parametrize("wrong", [["--methods", "ats"], ["--runtimes", "tensorrt"], ["--images", "1"]])
def test_what_it_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        near_ties.main(wrong)
    assert end.value.code == 2
    assert wrong[1] in capsys.readouterr().err
