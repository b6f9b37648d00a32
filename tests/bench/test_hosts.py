import json

import pytest

from bench import hosts


def test_command(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install fastreduce[hf])")

    def tiny():
        from tests.models.test_hf import build, inputs_of

        return build("vit"), inputs_of("vit")["pixel_values"]

    monkeypatch.setitem(hosts.MODELS, "tiny", ("Tiny", tiny))
    file = tmp_path / "hosts.json"
    monkeypatch.setattr("sys.argv", ["hosts", "--models", "tiny", "--rounds", "2", "--json", str(file)])
    hosts.main()
    said = capsys.readouterr().out
    assert "tokens [8, 4, 2]" in said
    assert "tome" in said
    (row,) = json.loads(file.read_text())["models"]
    assert row["title"] == "Tiny"
    assert row["patches"] == 16
    assert row["methods"]["tome"]["low"] <= row["methods"]["tome"]["median"] <= row["methods"]["tome"]["high"]
    monkeypatch.setattr("sys.argv", ["hosts", "--models", "nothing"])
    with pytest.raises(SystemExit, match="videomae-b"):
        hosts.main()


def test_nothing_is_told_of_a_model_that_changes(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install fastreduce[hf])")
    from tests.models.test_hf import build, inputs_of

    given = inputs_of("vit")["pixel_values"]
    model = build("vit")
    with pytest.raises(SystemExit, match="not the unreduced model"):
        hosts._check(model, "topk", given, model(given).logits + 1)
