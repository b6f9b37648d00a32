"""A method of one's own: registered by a public call, then patched, recorded and compared like ours."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fastreduce
from bench.proof import tiny
from fastreduce import names
from fastreduce.cli.app import app
from fastreduce.reducers import REDUCERS, ScheduledReducer
from fastreduce.tokens import Plan


class LastOnes(ScheduledReducer):
    """You want a method that a test can follow."""

    name = "lastones"

    def __init__(self, blocks, schedule, skip: int = 0, backend: str = "auto"):
        super().__init__(blocks, schedule, backend)
        self.skip = skip

    def before(self, block, tokens, stage):
        keep = self.schedule.count(stage, tokens.patches)
        last = tokens.num_patches - self.skip
        kept = torch.arange(last - keep, last, device=tokens.x.device).expand(tokens.batch, -1)
        x = fastreduce.ops.gather_tokens(tokens.x, kept, prefix=tokens.prefix, backend=tokens.backend)
        return tokens.reduced(x, Plan(self.blocks[stage], tokens.num_patches, keep, kept=kept))


@pytest.fixture
def registered():
    yield fastreduce.register(LastOnes)
    for table in (REDUCERS, names.METHODS, names.TITLES):
        table.pop("lastones")


def test_it_has_a_name_like_ours(registered, tmp_path):
    model = fastreduce.patch(tiny.build(), "Last-Ones", keep_rate=0.5, at=(1, 2), skip=1)
    with torch.no_grad(), fastreduce.record(model) as seen:
        model(tiny.images(model))
    assert fastreduce.reduced_counts(model) == [8, 4]
    assert seen.stages[0].kept_patches[0].tolist() == list(range(7, 15))
    assert names.METHODS["lastones"].options["skip"].default == 0
    with pytest.raises(TypeError, match="has no option 'skp'; did you mean 'skip'"):
        fastreduce.patch(tiny.build(), "lastones", skp=1)
    file = tmp_path / "result.json"
    arguments = ["--model", "test_vit", "--batch", "1", "--rounds", "2", "--keep-rate", "0.5", "--no-pictures"]
    done = CliRunner().invoke(app, ["compare", "--method", "lastones", *arguments, "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text())["methods"][0]["label"] == "lastones"


def test_refusals():
    class Unnamed(LastOnes):
        name = "Last ones"

    class Taken(LastOnes):
        name = "topk"

    class Abstract(fastreduce.reducers.Reducer):
        name = "abstract"

    for cls, error, words in (
        (Unnamed, ValueError, "lower-case letters and digits, got Unnamed.name = 'Last ones'"),
        (Taken, ValueError, "'topk' is taken by fastreduce.reducers.topk.TopK"),
        (Abstract, TypeError, "Abstract has no counts"),
        (torch.nn.Linear, TypeError, "subclass of fastreduce.reducers.Reducer, got"),
    ):
        with pytest.raises(error, match=words):
            fastreduce.register(cls)
    assert "abstract" not in REDUCERS
