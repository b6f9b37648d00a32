"""bench.traffic counts the bytes of active lanes, and fails what reads more than it needs."""

import json

import pytest
import torch
import triton
import triton.language as tl

import fastreduce
from bench import traffic as bench
from bench.primitives import Primitive, nbytes
from bench.proof.gates import Known
from bench.proof.traffic import traffic


@triton.jit
def copy_kernel(x, count, out, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.load(count)
    value = tl.load(x + offsets, mask=mask, other=0.0)
    if TWICE:
        value = 0.5 * (value + tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + offsets, value, mask=mask)


def copy(x, twice=False):
    out = torch.empty_like(x)
    copy_kernel[(1,)](x, torch.tensor([x.numel()], dtype=torch.int32), out, TWICE=twice, BLOCK=64)
    return (out,)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)])
def test_bytes_of_active_lanes_are_counted(dtype, size):
    x = torch.randn(37).to(dtype)
    with traffic() as counted:
        (out,) = copy(x)
    assert torch.equal(out, x)
    assert counted.loads == {"copy_kernel": 37 * size + 4}  # the count is one lane
    assert counted.stores == {"copy_kernel": 37 * size}
    assert counted.launches == {"copy_kernel": 1}
    assert counted.requested == 74 * size + 4


def test_nothing_is_counted_outside():
    with traffic() as counted:
        copy(torch.zeros(3), twice=True)
        copy(torch.zeros(3))
    copy(torch.zeros(3))
    assert counted.launches == {"copy_kernel": 2}
    assert counted.loads.total() == 3 * 3 * 4 + 2 * 4


def primitive(twice, floor=lambda inputs, outputs: nbytes(*outputs) * 2):
    return Primitive(
        "copied",
        make=lambda shape, generator: {"x": torch.zeros(60)},
        call=lambda x, backend: copy(x, twice),
        plain=lambda inputs: (inputs["x"].clone(),),
        floor=floor,
    )


def run(monkeypatch, described, known=None):
    monkeypatch.setattr(bench, "choose_primitives", lambda names: {"copied": described})
    monkeypatch.setattr(bench, "KNOWN_TRAFFIC", {} if known is None else {"copied forward": known})
    return bench.main(["--primitives", "copied", "--shapes", "deit_tiny-20-1"])


def test_a_kernel_that_reads_once_passes(monkeypatch, capsys):
    assert run(monkeypatch, primitive(twice=False)) == 0
    assert "copy_kernel" in capsys.readouterr().out


def test_a_kernel_that_reads_twice_fails(monkeypatch, capsys):
    assert run(monkeypatch, primitive(twice=True)) == 1
    assert "FAILED traffic: copied forward deit_tiny-20 has 1.508, at most 1.15 is allowed" in capsys.readouterr().out


def test_a_known_exception_lets_it_pass_up_to_its_limit(monkeypatch, capsys):
    assert run(monkeypatch, primitive(twice=True), Known(1.51, "it is a test")) == 0
    assert "known traffic: copied forward (1.51): it is a test" in capsys.readouterr().out
    assert run(monkeypatch, primitive(twice=True), Known(1.5, "it is a test")) == 1


def test_a_floor_above_what_is_requested_fails(monkeypatch, capsys):
    assert run(monkeypatch, primitive(twice=False, floor=lambda inputs, outputs: 500)) == 1
    assert "FAILED a floor above what is requested: copied forward" in capsys.readouterr().out


def test_the_least_of_tiles_comes_before_the_floor():
    described = Primitive(**(vars(primitive(twice=True)) | {"tiled": lambda inputs: 3 * nbytes(inputs["x"])}))
    row = bench.primitive_traffic(described, bench.parse_shapes("deit_tiny-20-1", torch.float32)[0], "forward")
    assert (row["floor"], row["tiled"]) == (480, 720)
    assert row["ratio"] == pytest.approx(724 / 720)


def test_the_command_writes_what_it_counted(tmp_path):
    file = tmp_path / "traffic.json"
    assert bench.main(["--primitives", "gather_tokens", "--shapes", "deit_tiny-20-1", "--json", str(file)]) == 0
    forward, backward = json.loads(file.read_text())["traffic"]
    assert forward["launches"] == {"gather_tokens_kernel": 1}
    # Nine of nineteen tokens and the class token: rows read, added to as many, written; indices read.
    assert forward["requested"] == forward["floor"] == 3 * 10 * 192 * 4 + 9 * 8
    assert backward["direction"] == "backward"


def test_added_calls():
    row = bench.added_calls("radial")
    assert (row["added"], row["operators"]) == (0, {"gather_tokens": 1, "native_layer_norm": -1})
    assert row["launches"] == {"gather_tokens_kernel": 1}
    assert "attention_scores" in bench.added_calls("kmedoids")["operators"]  # of the block before


def test_every_method_is_hard_or_soft_and_exceptions_are_of_hard_ones():
    assert set(bench.HARD) < set(fastreduce.REDUCERS)
    assert set(bench.KNOWN_CALLS) <= set(bench.HARD)


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--primitives", "sort_tokens"])
    assert "unknown primitive 'sort_tokens'" in capsys.readouterr().err
