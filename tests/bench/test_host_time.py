"""The clock of host time; what it says is printed, not asserted."""

import json

import pytest
import torch

from bench import host_time


def test_ratios_are_medians_over_the_unit_beside(monkeypatch):
    """A machine that becomes three times as slow in one round changes nothing."""
    now, slow = [0.0], [1.0]
    monkeypatch.setattr(host_time.time, "process_time", lambda: now[0])

    def taking(seconds):
        def call():
            now[0] += seconds * slow[0]

        return call

    turns = iter(range(10**6))

    def unit():
        slow[0] = 3.0 if next(turns) % 7 == 0 else 1.0
        now[0] += slow[0]
        slow[0] = 1.0

    assert host_time.ratios([taking(2.0), taking(5.0)], taking(1.0), rounds=3, repeats=4) == [2.0, 5.0]
    assert host_time.ratios([taking(2.0)], unit, rounds=9, repeats=1) == [2.0]


def test_every_operator_of_the_reduced_models_has_a_row():
    names = {one.name for one in host_time.contenders()}
    for name in ("select_topk", "gather_tokens (norm)", "attention (index)", "merge_tokens (norm)", "cluster_dpc_knn"):
        assert name in names
    assert host_time.contenders()[-1].most == host_time.MOST_STAGE == 8


def test_the_table(tmp_path, capsys):
    path = tmp_path / "rows.json"
    threads = torch.get_num_threads()
    try:
        assert host_time.main(["--operators", "select_topk", "--rounds", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads(path.read_text())["rows"]
    assert row["operator"] == "select_topk"
    assert row["launches"] == 1
    assert row["checked"] > 0
    assert "select_topk" in capsys.readouterr().out


def test_unknown_operators_are_refused(capsys):
    with pytest.raises(SystemExit):
        host_time.main(["--operators", "sort"])
    assert "names none of select_topk" in capsys.readouterr().err
