import dataclasses
import functools
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from PIL import Image

import fastreduce
from bench import contests, models, parity
from bench.model_plots import _spread_out
from fastreduce.ops import unchecked
from fastreduce.plain import FreeSlice
from fastreduce.speed import comparison as engine

METHODS = ("topk", "ats", "patchmerger", "radial-l2")
QUICK = contests.Settings(
    models=("test_vit",), methods=("topk",), keep_rates=(0.5,), batches=(2,), device="cpu", rounds=2, threads=1
)


def measure(**changes):
    return list(contests.measure_models(dataclasses.replace(QUICK, **changes)))


def times(group):
    """Return images per second by name, None for what has no time."""
    return {
        "unreduced": group["unreduced"]["images_per_second"],
        "slice": group["free_slices"][0]["images_per_second"],
        **{row["label"]: row["images_per_second"] for row in group["methods"]},
        **{f"{row['label']} official": row["official"]["images_per_second"] for row in group["methods"]},
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    arguments = ["--quick", "--methods", ",".join(METHODS), "--threads", "1", "--device", "cpu"]
    code = models.main([*arguments, "--json", str(folder / "new" / "r.json"), "--plots", str(folder / "plots")])
    return code, json.loads((folder / "new" / "r.json").read_text()), sorted((folder / "plots").iterdir())


def test_everything_is_measured(measured):
    code, result, _ = measured
    assert code == 0
    assert result["environment"]["fastreduce"] == fastreduce.__version__
    assert result["settings"]["models"] == ["test_vit"]
    assert [(group["keep_rate"], group["step"], group["mode"]) for group in result["groups"]] == [
        (rate, step, "eager") for rate in (0.7, 0.4) for step in ("forward", "training")
    ]
    for group in result["groups"]:
        assert (group["model"], group["batch"], group["reason"], group["rounds"]) == ("test_vit", 2, None, 3)
        assert [row["label"] for row in group["methods"]] == ["topk", "ats", "patchmerger", "radial l2"]
        for row in group["methods"]:
            assert row["parity"]["verdict"] == "green"
            assert 0 < row["parity"]["difference"] < 1e-4
            assert row["parity"]["against"] == "float64"
            assert row["ideal_speedup"] == pytest.approx(group["unreduced"]["gmacs"] / row["gmacs"])
            assert row["ideal_speedup"] > 1
        for row in [group["unreduced"], *group["free_slices"], *group["methods"]]:
            assert row["reason"] is None
            assert len(row["seconds"]) == 3
            low, high = row["images_per_second_quartiles"]
            assert low <= row["images_per_second"] <= high
            assert row["images_per_second"] == pytest.approx(2 / sorted(row["seconds"])[1])


def test_ratios_are_medians_of_the_rounds(measured):
    _, result, _ = measured
    for group in result["groups"]:
        slices = {tuple(row["counts"]): row["seconds"] for row in group["free_slices"]}
        for row in group["methods"]:
            against = {
                "speedup": group["unreduced"]["seconds"],
                "share_of_free_slice": slices[tuple(row["counts"])],
                "speedup_over_official": row["official"]["seconds"],
            }
            for name, seconds in against.items():
                ratios = sorted(theirs / ours for ours, theirs in zip(row["seconds"], seconds, strict=True))
                assert row[name] == pytest.approx(ratios[1])
                assert row[f"{name}_quartiles"] == pytest.approx([(a + b) / 2 for a, b in itertools.pairwise(ratios)])


def test_the_plots(measured):
    _, _, files = measured
    assert [file.name for file in files] == [
        f"{name}-test_vit-batch2-{step}-eager.png"
        for name in ("images-per-second", "share-of-free-slice")
        for step in ("forward", "training")
    ]
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_names_beside_lines_keep_their_order_and_distance():
    wanted = [5.0, 1.0, 1.2, 0.9, 9.0]
    places = _spread_out(wanted, gap=1.0)
    order = sorted(range(5), key=lambda index: wanted[index])
    gaps = [places[b] - places[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) >= 1 - 1e-9
    assert places[0] == 5.0
    assert places[4] == 9.0
    assert (places[1] + places[2] + places[3]) / 3 == pytest.approx((1.0 + 1.2 + 0.9) / 3)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_method_agrees_with_the_official_algorithm(dtype):
    for group in measure(methods=(), rounds=1, dtype=dtype):
        assert {row["method"] for row in group["methods"]} == set(fastreduce.REDUCERS)
        for row in group["methods"]:
            assert row["parity"]["verdict"] != "red", (group["step"], row["label"], row["parity"])
            assert row["images_per_second"] > 0
            noise = group["step"] == "training" and row["method"] == "dynamicvit"
            assert (row["parity"]["against"] != "float64") == noise


def test_training_leaves_the_weights_alone():
    settings = QUICK.resolve()
    contest = contests.Contest(settings, contests._build(settings, "test_vit", 2, 0.5), lambda *_: None)
    before = {name: value.clone() for name, value in contest.comparison.model.state_dict().items()}
    contest.measure("training", "eager", math.inf, lambda *_: None)
    for name, value in contest.comparison.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for model in contest.candidates.values() for parameter in model.parameters())


def test_training_trains():
    """Every parameter that is stepped gets its gradient, the method's own layers included."""
    settings = dataclasses.replace(QUICK, methods=("sit",)).resolve()
    contest = contests.Contest(settings, contests._build(settings, "test_vit", 2, 0.5), lambda *_: None)
    (entry,) = contest.entries.values()
    common = {id(parameter) for parameter in contest.comparison.model.parameters()}
    own = {id(parameter) for parameter in entry.model.reducers.parameters()}
    assert own
    for name, model in contest.candidates.items():
        parameters = contest._parameters(name)
        assert {id(parameter) for parameter in parameters} == common | (own if "sit" in str(name) else set())
        losses = contests._function(model.train(), "training")(contest.images, contest.labels)
        assert losses.shape == (2,)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), parameters))


def assert_only_these_are_missing(group, *names):
    for name, speed in times(group).items():
        assert (speed is None) == (name in names), name


def test_a_wrong_method_gets_no_time(monkeypatch, capsys):
    select_topk = unchecked.select_topk
    monkeypatch.setattr(unchecked, "select_topk", lambda scores, *a, **k: select_topk(-scores, *a, **k))
    arguments = ["--quick", "--methods", "topk,tome", "--keep-rates", "0.5", "--steps", "forward", "--device", "cpu"]
    assert models.main([*arguments, "--threads", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith(" topk")]
    assert row.rstrip().endswith("!")
    assert "–" in row
    assert any("topk: not the official algorithm's results" in line for line in lines)
    (group,) = measure(methods=("topk", "tome"), steps=("forward",))
    assert models.is_wrong(group)
    assert_only_these_are_missing(group, "topk", "topk official")
    assert group["methods"][0]["parity"]["verdict"] == "red"
    assert group["methods"][0]["share_of_free_slice"] is None


def test_a_wrong_gradient_gets_no_time_in_training(monkeypatch):
    gather_tokens = unchecked.gather_tokens
    monkeypatch.setattr(unchecked, "gather_tokens", lambda x, *a, **k: gather_tokens(x.detach(), *a, **k))
    forward, training = measure()
    assert_only_these_are_missing(forward)
    assert_only_these_are_missing(training, "topk", "topk official")
    assert models.is_wrong(training)


def test_near_ties_are_told_and_timed(monkeypatch):
    monkeypatch.setattr(parity, "ALLOWED", 0)
    monkeypatch.setattr(engine.Comparison, "changed_decisions", lambda *_: 1)
    monkeypatch.setattr(engine.Comparison, "is_far", lambda *_: True)
    for group in measure():
        assert group["methods"][0]["parity"]["verdict"] == "near-ties"
        assert group["methods"][0]["parity"]["changed"] == 1
        assert_only_these_are_missing(group)
        assert not models.is_wrong(group)


@pytest.mark.parametrize("step", contests.STEPS[-1:])
def test_compiled(monkeypatch, step):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    (group,) = measure(modes=("compiled",), steps=(step,))
    assert group["mode"] == "compiled"
    assert_only_these_are_missing(group)


def test_a_wrong_compilation_gets_no_time(monkeypatch):
    def spoiled(function, **_):
        return lambda images, labels: function(images.flip(1), labels)

    monkeypatch.setattr(torch, "compile", spoiled)
    for group in measure(modes=("compiled",)):
        assert_only_these_are_missing(group, *times(group))
        assert group["methods"][0]["speedup"] is None
        assert "not those of the eager model" in group["methods"][0]["reason"]


def test_what_fails_is_left_out_and_the_others_go_on(monkeypatch):
    def broken(function, **_):
        if isinstance(function.__closure__[0].cell_contents, engine.PlainModel):
            raise RuntimeError("no\ncompiler")
        return function

    monkeypatch.setattr(torch, "compile", broken)
    (group,) = measure(modes=("compiled",), steps=("forward",))
    assert_only_these_are_missing(group, "topk official")
    assert group["methods"][0]["official"]["reason"] == "RuntimeError: no compiler"
    assert group["methods"][0]["speedup_over_official"] is None
    assert group["methods"][0]["speedup"] > 0


@pytest.mark.parametrize("when", ["preparing", "measuring"])
def test_out_of_memory(monkeypatch, when):
    calls = []

    def full(self, images):
        calls.append(torch.is_grad_enabled())
        if calls[-1] and (when == "preparing" or calls.count(True) > 1):
            raise torch.OutOfMemoryError("no memory")
        return forward(self, images)

    forward = FreeSlice.forward
    monkeypatch.setattr(FreeSlice, "forward", full)
    (group,) = measure(steps=("training",))
    assert_only_these_are_missing(group, "slice")
    assert group["free_slices"][0]["reason"] == "OutOfMemoryError: no memory"
    assert len(group["unreduced"]["seconds"]) == 2


def test_endless_compilations_are_left_out(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for most, missing in ((200, ["kmedoids official"]), (300, [])):
        monkeypatch.setattr(contests, "_MOST_UNROLLED", most)
        (group,) = measure(modes=("compiled",), steps=("forward",), methods=("kmedoids",))
        assert_only_these_are_missing(group, *missing)


def test_the_time_ends(capsys):
    groups = measure(keep_rates=(0.7, 0.5), seconds=1e-3, rounds=50)
    assert [group["reason"] for group in groups] == [None, *["the time was up"] * 3]
    assert groups[0]["rounds"] == 1
    assert times(groups[0])["unreduced"] > 0
    assert groups[0]["methods"][0]["reason"] == "no time left to prepare it"
    code = models.main(["--quick", "--seconds", "0.001", "--methods", "topk", "--device", "cpu", "--threads", "1"])
    assert code == 0
    assert capsys.readouterr().out.count("left out: the time was up") == 3


def test_groups_come_one_by_one(monkeypatch):
    """Groups not yet asked for are not measured, so that whoever is cut short has the ones before."""
    built = []
    build = contests._build
    monkeypatch.setattr(contests, "_build", lambda *a, **k: built.append(k["keep_rate"]) or build(*a, **k))
    groups = contests.measure_models(dataclasses.replace(QUICK, keep_rates=(0.7, 0.5), steps=("forward",)))
    assert next(groups)["keep_rate"] == 0.7
    assert built == [0.7]


@pytest.mark.slow
def test_one_model_is_built_once(monkeypatch):
    """Other steps, rounds and batches meet the models that were built, and are checked at every batch."""
    built, checked, kept = [], [], contests.Contests(most=2)
    build, check = contests._build, contests.Comparison.check
    monkeypatch.setattr(contests, "_build", lambda *a, **k: built.append(k["model"]) or build(*a, **k))
    monkeypatch.setattr(
        contests.Comparison, "check", lambda self, *a: checked.append(self.settings.batch) or check(self, *a)
    )

    def groups(**changes):
        settings = dataclasses.replace(QUICK, methods=("topk", "ats"), **{"steps": ("forward",), **changes})
        return list(contests.measure_models(settings, contests=kept))

    found = groups(batches=(2,)) + groups(steps=("training",), rounds=1) + groups(batches=(3, 2), rounds=1)
    assert [(group["batch"], group["step"], group["rounds"]) for group in found] == [
        (2, "forward", 2),
        (2, "training", 1),
        (3, "forward", 1),
        (2, "forward", 1),
    ]
    assert len(built) == 1
    assert checked == [2, 3, 2]
    for group in found:
        assert group["reason"] is None
        for row in group["methods"]:
            assert row["parity"]["verdict"] == "green"
            assert row["gmacs"] == found[0]["methods"][group["methods"].index(row)]["gmacs"]
            assert row["images_per_second"] == pytest.approx(group["batch"] / statistics.median(row["seconds"]))
    groups(keep_rates=(0.7,))
    groups()
    assert len(built) == 2
    groups(keep_rates=(0.6,))
    assert (len(built), len(kept.kept)) == (3, 2)


def test_kernels_are_run_before_they_are_timed(monkeypatch):
    sizes = []
    monkeypatch.setattr(FreeSlice, "forward", None)
    select_topk = fastreduce.ops.unchecked.select_topk
    monkeypatch.setattr(
        fastreduce.ops.unchecked, "select_topk", lambda s, *a, **k: sizes.append(len(s)) or select_topk(s, *a, **k)
    )
    contests.fill_kernel_cache(dataclasses.replace(QUICK, batches=(3, 1)))
    assert set(sizes) == {3, 1}


def test_a_later_group_that_cannot_be_built_is_left_out():
    good, bad = measure(keep_rates=(0.5, 0.01), steps=("forward",))
    assert good["reason"] is None
    assert "at least 1 must stay" in bad["reason"]


WRONG = {
    "method": ("--methods topk,tomm", "unknown method 'tomm'; did you mean 'tome'?"),
    "mode": ("--modes eager,fast", "unknown mode 'fast'; expected one of eager, compiled, graphed, compiled-graphed"),
    "graphs without CUDA": ("--modes graphed", "mode 'graphed' needs a CUDA device, not 'cpu'"),
    "step": ("--steps backward", "unknown step 'backward'; expected one of forward, training"),
    "no step": ("--steps ,", "give at least one step"),
    "model": ("--model test_vitt", "unknown model 'test_vitt'"),
    "model without tokens": ("--model test_resnet", "ResNet cannot be reduced"),
    "keep rate": ("--keep-rates 2", "keep_rate must lie in (0, 1], got 2"),
    "keep rate a word": ("--keep-rates half", "--keep-rates: invalid"),
    "batch": ("--batch 0", "batch must be positive, got 0"),
    "rounds": ("--rounds 0", "rounds must be positive, got 0"),
    "dtype": ("--dtype float8", "invalid choice: 'float8'"),
    "option": ("--fast", "unrecognized arguments: --fast"),
    "abbreviation": ("--method topk", "unrecognized arguments: --method topk"),
    "json is a folder": ("--json .", "is a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line(capsys, case):
    arguments, message = WRONG[case]
    with pytest.raises(SystemExit) as ended:
        models.main(["--quick", "--device", "cpu", *arguments.split()])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert message in told.err


def test_mistakes_in_the_code_are_not_hidden(monkeypatch):
    def broken(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(contests.Contest, "measure", broken)
    with pytest.raises(ValueError, match="a mistake"):
        models.main(["--quick", "--methods", "topk", "--device", "cpu", "--threads", "1"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs():
    """The official ATS asks for a number on the host, which no graph can hold."""
    for group in measure(device="cuda", modes=("graphed",), methods=("topk", "ats")):
        assert_only_these_are_missing(group, "ats official")
        assert "synchronizing" in group["methods"][1]["official"]["reason"]
        assert group["calls_in_a_measurement"] > 1


FAULTS = """
import resource, torch
from fastreduce.measure import keep_memory
keep_memory()
torch.set_num_threads(1)
layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).requires_grad_(False)
x = torch.zeros(40960, 64)  # two results of 40 MiB, which malloc gives back to the system each time
total = [0]
for _ in range(16):
    layers(x)
    total.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sorted(now - before for before, now in zip(total, total[1:]))[8])  # the heap may grow in a late pass, by chance
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_tensor():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < (10 << 20) // resource.getpagesize()  # of one pass; without, each takes 80 MiB of pages
