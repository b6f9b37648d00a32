"""The released code's numbers: decisions exactly, logits and gradients to rounding (tests/golden/README.md)."""

import copy
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

import fastreduce
from fastreduce.plain import PlainModel
from fastreduce.reducers.radial import contiguous_radii, radii_of_counts, ring_radius
from fastreduce.tokens import Tokens

from . import golden

PATCHES = 196


def _cases():
    """name, prefix of the keys, file, arguments of fastreduce.patch."""
    for method in ("topk", "evit", "tome"):
        for rate in golden.RATES:
            arguments = {"method": method, "at": golden.AT, "keep_rate": rate}
            yield pytest.param("eval", f"{method}/r{rate}/", arguments, id=f"{method}-{rate}")
    for norm in ("l1", "l2", "linf"):
        for rate in golden.RATES:
            arguments = {"method": "radial", "norm": norm, "at": golden.AT, "keep_rate": rate}
            yield pytest.param("eval", f"radial_{norm}_stages/r{rate}/", arguments, id=f"{norm}-stages-{rate}")
        arguments = {"method": "radial", "norm": norm, "at": golden.AT}
        yield pytest.param("eval", f"radial_{norm}_contiguous/r0.25/", arguments, id=f"{norm}-contiguous")
    for name, arguments in golden.read("variants")[1]["configs"].items():
        yield pytest.param("variants", f"{name}/", arguments, id=name)


CASES = list(_cases())


def _rows_of(output):
    return output.x if isinstance(output, Tokens) else output


@pytest.mark.parametrize(("file", "prefix", "arguments"), CASES)
def test_evaluation(file, prefix, arguments):
    expected = golden.below(golden.read(file)[0], prefix)
    model = fastreduce.patch(golden.model(), **arguments)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(_rows_of(output)))
    with fastreduce.record(model) as seen, torch.no_grad():
        logits = model(golden.images())

    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(torch.stack([x[:, 0] for x in outputs]), expected["cls"], rtol=1e-4, atol=2e-5)
    if "ntok" in expected:
        assert [x.shape[1] for x in outputs] == expected["ntok"].tolist()
    _check_counts(seen, model)
    if arguments["method"] == "radial":
        _check_radial(seen, expected)
    else:
        _check_decisions(seen, expected)


def _check_counts(seen, model):
    """A stage without an entry keeps what is there."""
    found, present = {stage.block: stage.num_out for stage in seen.stages}, PATCHES
    for block, count in zip(model.blocks._reducer.blocks, fastreduce.reduced_counts(model), strict=True):
        present = found.pop(block, present)
        assert count == present
    assert not found


def _check_decisions(seen, expected):
    stages = {key.split("/")[0] for key in expected if "/" in key}
    assert {f"s{stage.block}" for stage in seen.stages} == stages
    for stage in seen.stages:
        there = golden.below(expected, f"s{stage.block}/")
        assert set(there) in ({"kept", "kept_abs"}, {"kept", "kept_abs", "fused"}, {"assign"})
        if "kept" in there:
            assert torch.equal(stage.kept, there["kept"])
            assert torch.equal(stage.kept_patches, there["kept_abs"])
        else:
            assert stage.kept is None
            assert stage.kept_patches is None
            assert torch.equal(stage.slot, there["assign"])
        if "fused" in there:
            fused = stage.slot == stage.num_out - 1
            assert torch.equal(fused.nonzero()[:, 1].view(len(fused), -1), there["fused"])


def _check_radial(seen, expected):
    """Stages that drop nothing have no entry: the patches are then those of the stage before."""
    wanted = {int(key[1:].split("/")[0]): value for key, value in expected.items() if key.endswith("/kept_abs")}
    assert {stage.block for stage in seen.stages} <= set(wanted)
    for block, patches in wanted.items():
        before = [stage.kept_patches for stage in seen.stages if stage.block <= block]
        found = before[-1] if before else torch.arange(PATCHES).expand(4, -1)
        assert torch.equal(found, patches.expand(4, -1))


@pytest.mark.parametrize(("file", "prefix", "arguments"), CASES)
def test_float64(file, prefix, arguments):
    expected = golden.read(file)[0][prefix + "logits64"]
    model = golden.model(torch.float64)
    with torch.no_grad():
        plain = PlainModel(model, **arguments)(golden.images().double())
        logits = fastreduce.patch(model, **arguments)(golden.images().double())
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("file", "prefix", "arguments"), CASES)
def test_plain(file, prefix, arguments, fused):
    with torch.no_grad():
        logits = PlainModel(golden.model(), fused=fused, **arguments)(golden.images())
    torch.testing.assert_close(logits, golden.read(file)[0][prefix + "logits"], rtol=1e-4, atol=2e-5)


def test_unreduced():
    tensors = golden.read("train")[0]
    with torch.no_grad():
        logits = golden.model()(golden.images())
        everything = fastreduce.patch(golden.model(), "topk", keep_rate=1.0, at=golden.AT)(golden.images())
    torch.testing.assert_close(logits, tensors["unreduced/eval/logits"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(everything, logits, rtol=1e-5, atol=1e-5)


def _gradients(run, model, dtype):
    """The published loss, sum(logits * proj), in training mode: logits and gradients by name."""
    images = golden.images().to(dtype).requires_grad_()
    model.train()
    logits = run(images)
    (logits * golden.read("base")[0]["proj"].to(dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {"input": images.grad, **gradients}


TRAINING = [
    *(pytest.param(f"{method}/r{rate}", method, rate, id=f"{method}-{rate}")
      for method in ("topk", "evit", "tome") for rate in golden.RATES),
    pytest.param("radial/r0.5", "radial", None, id="radial"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "method", "rate"), TRAINING)
def test_gradients(key, method, rate):
    model = fastreduce.patch(golden.model(), method, keep_rate=rate, at=golden.AT)
    logits, gradients = _gradients(model, model, torch.float32)
    torch.testing.assert_close(logits, golden.read("train")[0][f"{key}/logits"], rtol=1e-4, atol=2e-5)
    assert not golden.gradient_differences(key, gradients, relative=1e-3, absolute=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("key", "method", "rate"), [case for case in TRAINING if "r0.5" in case.values[0]])
def test_gradients_in_float64(key, method, rate, plain):
    model = golden.model(torch.float64)
    arguments = {"method": method, "keep_rate": rate, "at": golden.AT}
    run = PlainModel(model, **arguments) if plain else fastreduce.patch(model, **arguments)
    _, gradients = _gradients(run, model, torch.float64)
    # The stored entries are float32; the projections, of which the third is float64, are held far more tightly below.
    assert not golden.gradient_differences(key, gradients, relative=1e-5, absolute=1e-5)
    statistics, names = golden.read("train")[0][f"{key}/gradstats"], golden.read("train")[1][f"{key}/names"]
    for name, (norm, _, expected) in zip(names, statistics.tolist(), strict=True):
        found = float((gradients[name].numpy() * golden.projection(name, gradients[name].shape)).sum())
        assert found == pytest.approx(expected, abs=1e-9 * max(norm, 1.0)), name


def _table_keys():
    keys = golden.read("radial_tables")[0]
    return sorted({key.rsplit("/", 1)[0] for key in keys if not key.endswith("/z")})


@pytest.mark.parametrize("key", _table_keys())
def test_radial_tables(key):
    """Radii and counts of many schedules, on even and odd grids."""
    tables = golden.read("radial_tables")[0]
    side, norm, setting = key.split("/")
    grid = (int(side.removeprefix("grid")),) * 2
    patches = grid[0] * grid[1]
    depth, blocks = setting.split("_loc")
    blocks = [int(block) for block in blocks.split("_")]
    radius = ring_radius(grid, norm)
    assert torch.equal(radius.view(grid), tables[f"{side}/{norm}/z"])
    checked = 0
    for name, expected in golden.below(tables, f"{key}/").items():
        if not name.endswith("_threshold"):
            continue
        schedule = name.removesuffix("_threshold")
        counts = tables[f"{key}/{schedule}_count"]
        assert len(counts) == int(depth.removeprefix("d"))
        if schedule.startswith("cont_minr"):
            radii = contiguous_radii(radius, grid, blocks[0], blocks[-1], float(schedule.removeprefix("cont_minr")))
            places = list(range(blocks[0], blocks[-1] + 1))
        else:
            rate = float(schedule.removeprefix("sub_r"))
            radii = radii_of_counts(radius, [int(patches * rate ** (stage + 1)) for stage in range(len(blocks))])
            places = blocks
        assert torch.equal(radii, expected[places])
        assert [int((radius <= limit).sum()) for limit in radii] == counts[places].tolist()
        checked += 1
    assert checked == 7


class TestLoadOfficial:
    def _same(self, model):
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in golden.weights().items())

    @pytest.mark.parametrize("patched", [False, True])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda weights: weights,
            lambda weights: {f"module.{key}": value for key, value in weights.items()},
            lambda weights: {"model": weights, "epoch": 3},
            lambda weights: {"state_dict": OrderedDict((f"module.{key}", value) for key, value in weights.items())},
            lambda weights: {"model_ema": weights},
        ],
        ids=["plain", "module", "model", "state_dict", "ema"],
    )
    def test_layouts(self, wrap, patched):
        model = golden.empty_model()
        if patched:
            fastreduce.patch(model, "evit", keep_rate=0.5, at=golden.AT)
        assert fastreduce.load_official(model, wrap(golden.weights())) is model
        self._same(model)
        if patched:
            with torch.no_grad():
                logits = model(golden.images())
            torch.testing.assert_close(logits, golden.read("eval")[0]["evit/r0.5/logits"], rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("name", ["weights.safetensors", "checkpoint.pth"])
    def test_files(self, tmp_path, name):
        path = tmp_path / name
        if path.suffix == ".pth":
            torch.save({"model": golden.weights(), "epoch": 7}, path)
        else:
            save_file(golden.weights(), path)
        self._same(fastreduce.load_official(golden.empty_model(), path))
        self._same(fastreduce.load_official(golden.empty_model(), str(path)))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda state: state.pop("norm.bias"), ["missing norm.bias"]),
            (lambda state: state.update(extra=torch.zeros(1)), ["unexpected extra"]),
            (lambda state: state.update({"head.weight": torch.zeros(5, 48)}), ["head.weight", "(5, 48)", "(10, 48)"]),
            (lambda state: state.update({"norm.bias": [0.0]}), ["norm.bias is a list"]),
            (lambda state: state.clear(), ["missing cls_token", "more"]),
        ],
        ids=["missing", "unexpected", "shape", "type", "empty"],
    )
    def test_misfits_leave_the_model_alone(self, change, words):
        state = golden.weights()
        change(state)
        model = golden.empty_model()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as raised:
            fastreduce.load_official(model, state)
        assert all(word in str(raised.value) for word in words), raised.value
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_broken_files(self, tmp_path):
        junk = tmp_path / "junk.safetensors"
        junk.write_bytes(b"not a checkpoint")
        (tmp_path / "junk.pth").write_bytes(b"not a checkpoint")
        torch.save([1, 2], tmp_path / "list.pth")
        torch.save({"model": pytest.approx}, tmp_path / "code.pth")
        for name in ("junk.safetensors", "junk.pth", "list.pth", "code.pth"):
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                fastreduce.load_official(golden.empty_model(), tmp_path / name)
        for name in ("absent.pth", "absent.safetensors"):
            with pytest.raises(OSError):
                fastreduce.load_official(golden.empty_model(), tmp_path / name)
