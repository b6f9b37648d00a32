"""The table of deployment: what it says of measured rows, and what it refuses."""

import pytest

from bench import deploy, deploy_tables


def _row(way, ratio, **more):
    row = {"model": "deit_s", "keep_rate": 0.5, "batch": 8, "method": "topk", "way": way, "ratio": ratio}
    return {**row, "difference": 1e-6, **more}


def test_one_line_a_method_and_one_column_a_way():
    rows = [
        _row("eager", 1.5, of_free_slice=0.987),
        _row("onnxruntime", 2.004),
        _row("eager", 1.4, batch=1, of_free_slice=1),
    ]
    lines = deploy_tables.speed_lines(rows, ("eager", "onnxruntime"))
    assert lines[0] == "| model | keep rate | batch | method | eager | onnxruntime | of the free slice |"
    assert lines[2:] == [
        "| deit_s | 0.5 | 8 | Top-K | 1.50 | 2.00 | 0.99 |",
        "| deit_s | 0.5 | 1 | Top-K | 1.40 |  | 1.00 |",
    ]


def test_where_reduction_does_not_pay():
    (line,) = deploy_tables.slower([_row("eager", 1.01), _row("onnxruntime", 0.98, batch=1)])
    assert line == "slower than unreduced: deit_s Top-K at 0.5, batch 1, onnxruntime: 0.98"


@pytest.mark.parametrize(("difference", "code"), [(1e-6, 0), (1e-2, 1)])
def test_another_result_is_an_error(monkeypatch, capsys, tmp_path, difference, code):
    rows = [_row("onnxruntime", 2.0, difference=difference)]
    monkeypatch.setattr(deploy, "measure", lambda given, folder: iter(rows))
    file = tmp_path / "result.json"
    assert deploy.main(["--ways", "onnxruntime", "--json", str(file)]) == code
    assert '"ratio": 2.0' in file.read_text()
    assert ("differs from eager mode by 1.0e-02" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("wrong", [["--ways", "tensorrt"], ["--rounds", "0"]])
def test_what_it_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        deploy.main(wrong)
    assert end.value.code == 2
    assert wrong[1] in capsys.readouterr().err
