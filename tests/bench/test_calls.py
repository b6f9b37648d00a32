"""Calls into our own code that a forward pass of a reduced model makes."""

from bench import calls


def test_a_pass_with_one_stage():
    found = calls.count_calls("topk")
    assert found.total <= 60, found.functions.most_common(10)
    assert found.files["reducers/topk.py"] == 1
    assert 0 < found.checks < 10
    assert found.moves < found.total


def test_what_is_counted(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["calls", "--method", "tome", "--files", "--functions"])
    assert calls.main() == 0
    printed = capsys.readouterr().out
    assert "reducers/tome.py:attend" in printed
    assert printed.startswith("tome: ")
