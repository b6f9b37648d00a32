import json
import math

import pytest
import torch
from PIL import Image

import fastreduce
from fastreduce import draw
from fastreduce.integrations.timm import create_model
from fastreduce.ops import unchecked
from fastreduce.speed import payoff, verdicts
from fastreduce.speed.advice import advice
from tests.helpers.commands import assert_one_line, run, words

MODEL = "test_vit"  # 6 blocks, 100 patches, 64 channels
QUICK = ["plan", "--model", MODEL, "--batch", "2", "--rounds", "5", "--random", "--no-fidelity", "--keep-rate", "0.5"]
QUICK += ["--no-pictures"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run once with a plot, on two batches and three keep rates."""
    folder = tmp_path_factory.mktemp("plan")
    arguments = ["plan", "--model", MODEL, "--batch", "3,1", "--rounds", "5", "--keep-rate", "0.7,0.9"]
    arguments += ["--random", "--no-fidelity"]
    done = run(*arguments, "--keep-rate", "0.3", "--out", folder / "new", "--json", folder / "deep" / "result.json")
    assert done.exit_code == 0, done.output
    return done, json.loads((folder / "deep" / "result.json").read_text()), folder / "new"


def test_everything_is_measured(measured):
    _, result, _ = measured
    assert [row["batch"] for row in result["batches"]] == [1, 3]
    assert [row["keep_rate"] for row in result["rates"]] == [0.9, 0.7, 0.3]
    assert [row["counts"] for row in result["rates"]] == [[90, 81, 72], [70, 48, 34], [30, 9, 2]]
    assert result["blocks"] == [1, 3, 4]
    assert (result["patches"], result["prefix"]) == (100, 1)
    assert result["wrong"] == []
    assert 0 < result["relative_difference"] < 1e-5
    for row in result["rates"]:
        assert row["images_with_other_decisions"] or 0 < row["relative_difference"] < 1e-5
        assert row["code"] == f'fastreduce.patch(model, "topk", keep_rate={row["keep_rate"]}, at=(1, 3, 4))'
    works = [row["speedup_by_work"] for row in result["rates"]]
    assert works == sorted(works)
    assert works[0] > 1
    assert result["environment"]["torch"] == torch.__version__
    assert result["wall_seconds"] > 0


def test_figures_follow_from_the_rounds(measured):
    _, result, _ = measured
    for row in result["batches"]:
        assert row["rounds"] == 5
        unreduced = row["unreduced"]["seconds"]
        for other in (row["control"], *row["rates"]):
            assert len(other["seconds"]) == 5
            ratios = sorted(b / a for a, b in zip(other["seconds"], unreduced, strict=True))
            assert other["speedup"] == pytest.approx(ratios[2])
            assert other["speedup_quartiles"] == pytest.approx([ratios[1], ratios[3]])
            assert other["images_per_second"] == pytest.approx(row["batch"] / sorted(other["seconds"])[2])
        low, high = row["control"]["speedup_quartiles"]
        assert row["bar"] == pytest.approx(max(1.02, high, 1 / low))
        paying = [rate["keep_rate"] for rate in row["rates"] if rate["speedup_quartiles"][0] > row["bar"]]
        assert row["recommended"] == (max(paying) if paying else None)
        assert (row["code"] is None) == (row["recommended"] is None)


def test_the_tables(measured):
    done, result, folder = measured
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["checking", "measuring"]
    lines = done.stdout.splitlines()
    table = [line for line in lines if not line.startswith(("    fastreduce", "plot:", "Read these speeds"))]
    assert max(map(len, table)) <= 80
    assert "…" not in done.stdout, "a column is too narrow"
    text = words(done)
    for row in result["batches"]:
        for rate in row["rates"]:
            low, high = rate["speedup_quartiles"]
            assert f"{rate['speedup']:.2f} ± {(high - low) / 2:.2f}" in text
    for line in result["advice"]:
        assert " ".join(line.split()) in text
    assert "costs accuracy, which these verdicts do not know of" in text
    assert f"plot: {folder / 'topk.png'}" in text


def test_the_plot(measured):
    _, result, folder = measured
    assert [file.name for file in folder.iterdir()] == ["topk.png"]
    assert result["picture"] == str(folder / "topk.png")
    with Image.open(folder / "topk.png") as picture:
        assert picture.size == (1440, 1000)
        assert picture.info["dpi"][0] == pytest.approx(200, abs=0.1)


def test_curves_bands_and_line_are_drawn(tmp_path):
    """A curve where it was put, in its own colour; another picture for other numbers."""

    def drawn(name, shift, full):
        points = [(0.9, 1.0 + shift, 0.9 + shift, 1.1 + shift, full), (0.5, 2.0 + shift, 1.8, 2.4, full)]
        draw.save_curves(tmp_path / name, [("batch 1", points), ("batch 4", points[:1])], "")
        with Image.open(tmp_path / name) as picture:
            return picture.convert("RGB")

    first = drawn("a.png", 0.0, True)
    colours = {colour: count for count, colour in first.getcolors(1 << 20)}
    for hexadecimal in ("0072B2", "D55E00", "111111"):
        assert colours[tuple(bytes.fromhex(hexadecimal))] > 50
    assert first.tobytes() != drawn("b.png", 0.2, True).tobytes()
    assert first.tobytes() != drawn("c.png", 0.0, False).tobytes()
    assert first.tobytes() == drawn("d.png", 0.0, True).tobytes()


NOISE = (0.99, 1.0, 1.01, 1.0, 0.99, 1.01, 1.0, 1.0)


def rows(speedups, noise=NOISE, control=NOISE):
    """Invent rounds: ``{batch: {keep rate: speed-up}}``, each ratio strewn as given."""
    found = []
    for batch, of_rates in speedups.items():
        unreduced = [0.01 * batch * (1 + 0.3 * (turn % 3)) for turn in range(len(noise))]  # drift cancels in a ratio
        seconds = {"unreduced": unreduced}
        for rate, speedup in of_rates.items():
            seconds[rate] = [value / (speedup * part) for value, part in zip(unreduced, noise, strict=True)]
        seconds["control"] = [value / part for value, part in zip(unreduced, control, strict=True)]
        found.append(verdicts.judge(batch, seconds))
    return found


def test_it_pays_everywhere():
    found = rows({1: {0.9: 1.1, 0.5: 1.5}, 16: {0.9: 1.2, 0.5: 1.9}})
    assert [row["recommended"] for row in found] == [0.9, 0.9]
    lines = advice(found)
    assert lines[0] == "Reduction pays at every batch measured."
    assert lines[1].startswith("Batch 1: reduce, from keep rate 0.9 on. There it is 1.10 times as fast (quartiles 1.")
    assert lines[1].endswith("at keep rate 0.5 1.50 times.")
    assert "unreduced 76.92 (batch 1), reduced 146.2 (batch 16, keep rate 0.5)" in lines[3]
    assert advice(found[1:])[0] == "Reduction pays at batch 16."


def test_it_pays_nowhere():
    found = rows({1: {0.9: 0.8, 0.25: 0.97}, 4: {0.9: 0.9, 0.5: 1.01, 0.25: 0.99}})
    assert [row["recommended"] for row in found] == [None, None]
    lines = advice(found)
    assert lines[0] == "Do not reduce on this machine: at batches 1 and 4 no keep rate was shown to pay."
    assert lines[1].startswith(
        "Do not reduce at batch 1: even at keep rate 0.25 it is 0.97 times as fast (quartiles 0.9"
    )
    assert lines[2].startswith("Do not reduce at batch 4: at best, keep rate 0.5, it is 1.01 times as fast")
    assert advice(found[:1])[0].startswith("Do not reduce on this machine: at batch 1 no keep rate")


def test_it_pays_from_a_batch_on():
    slow, fast = {0.9: 0.7, 0.5: 0.95}, {0.9: 0.98, 0.7: 1.2, 0.5: 1.6}
    found = rows({1: slow, 4: slow, 16: fast})
    assert [row["recommended"] for row in found] == [None, None, 0.7]
    lines = advice(found)
    assert lines[0] == "Reduction pays from batch 16 on, not at 1 and 4."
    assert lines[3].startswith("Batch 16: reduce, from keep rate 0.7 on.")
    assert advice(rows({1: fast, 4: slow, 16: fast}))[0] == "Reduction pays at batch 1 and 16, not at 4."


def test_gains_below_two_per_cent_do_not_pay():
    """However quiet the machine is."""
    still = (1.0,) * 8
    found = rows({1: {0.9: 1.0, 0.8: 1.019, 0.7: 1.021}}, noise=still, control=still)
    assert [rate["verdict"] for rate in found[0]["rates"]] == ["no", "no", "pays"]
    assert found[0]["bar"] == verdicts.LEAST_GAIN


@pytest.mark.parametrize(
    "control", [(0.8, 0.85, 0.9, 0.95, 1.0, 1.02, 1.03, 1.04), (1.2, 1.17, 1.1, 1.05, 1.0, 0.98, 0.97, 0.96)]
)
def test_what_the_noise_could_do_is_no_gain(control):
    """A machine on which the unreduced model strays from itself, to either side."""
    found = rows({1: {0.9: 1.06, 0.5: 1.5}}, control=control)
    assert found[0]["bar"] > 1.1
    assert found[0]["recommended"] == 0.5
    assert rows({1: {0.9: 1.06, 0.5: 1.5}})[0]["recommended"] == 0.9


def test_noise_around_one_is_unclear():
    noise = (0.8, 0.9, 0.95, 1.0, 1.0, 1.05, 1.1, 1.2)
    (row,) = rows({1: {0.9: 0.7, 0.5: 1.0}}, noise=noise)
    assert [rate["verdict"] for rate in row["rates"]] == ["no", "unclear"]
    assert row["recommended"] is None
    line = advice([row])[1]
    assert line.startswith(
        "Batch 1: do not reduce before more --rounds have told: even at keep rate 0.5 it is 1.00 times"
    )


def test_keep_rates_below_the_recommended_that_do_not_pay_are_named():
    (row,) = rows({8: {0.9: 1.1, 0.7: 1.0, 0.5: 1.4, 0.25: 0.9}})
    assert row["recommended"] == 0.9
    assert advice([row])[1].endswith("Not shown to pay: 0.7 and 0.25.")


def test_rounding_up():
    assert verdicts.round_up((137, 96, 67), 8, prefix=1, patches=196) == (143, 103, 71)
    assert verdicts.round_up((137, 96, 67), 64, prefix=1, patches=196) == (191, 127, 127)
    assert verdicts.round_up((176, 158), 64, prefix=2, patches=196) == (190, 190)
    assert verdicts.round_up((190,), 64, prefix=5, patches=196) == (196,), "no more than there are"
    assert verdicts.round_up((7, 3), 1, prefix=1, patches=9) == (7, 3)
    for multiple in (2, 8, 16, 64):
        for count in range(1, 197):
            (more,) = verdicts.round_up((count,), multiple, prefix=1, patches=196)
            assert count <= more < count + multiple
            assert (1 + more) % multiple == 0 or more == 196


@pytest.mark.parametrize("method", ["topk", "evit", "tome", "dynamicvit", "sit"])
def test_counts_rounded_throughout(method):
    settings = payoff.Settings(MODEL, method=method, keep_rates=(0.6, 0.9), batches=(2,), rounds=1, round_to="16")
    planner = payoff.Planner(settings)
    for entry in planner.entries.values():
        assert all((count + 1) % 16 == 0 for count in entry.counts), entry.counts
    planner.check(lambda *_: None)
    planner.measure(lambda *_: None)
    result = planner.result()
    assert result["wrong"] == []
    assert result["batches"][0]["rounding"] is None
    for row in result["rates"]:
        model = create_model(MODEL)
        code = row["code"]
        assert "keep=[" in code
        exec(code, {"fastreduce": fastreduce, "model": model})
        assert fastreduce.reduced_counts(model) == row["counts"]


def invent(monkeypatch, gain):
    """Replace the clock: the unreduced model takes 4 s, a reduced one 2 s.

    A model of rounded counts takes 2 s / ``gain``.
    """

    def invented(calls, device, rounds):
        names = {"unreduced": 4.0, "control": 4.0, "exact": 2.0, 16: 2.0 / gain, 3: 3.0}
        for call in calls.values():
            call()
        return {name: [names.get(name, 2.0)] * rounds for name in calls}

    monkeypatch.setattr(payoff, "take_turns", invented)
    monkeypatch.setattr(payoff, "MULTIPLES", {"cpu": (16,)})


@pytest.mark.parametrize(("gain", "proposed"), [(1.5, 16), (1.01, None), (0.7, None)])
def test_rounded_counts_are_proposed_only_if_faster(monkeypatch, tmp_path, gain, proposed):
    invent(monkeypatch, gain)
    done = run(*QUICK, "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "result.json").read_text())["batches"]
    assert row["rounding"]["proposed"] == proposed
    (tried,) = row["rounding"]["tried"]
    assert tried["counts"] == [63, 31, 15]
    assert tried["speedup_over_exact"] == pytest.approx(gain)
    assert 0 < tried["relative_difference"] < 1e-4
    wanted = "keep=[63, 31, 15]" if proposed else "keep_rate=0.5"
    assert row["code"] == f'fastreduce.patch(model, "topk", {wanted}, at=(1, 3, 4))'
    assert row["code"] in done.stdout
    assert ("take the multiples of 16." if proposed else "leave the counts as they are.") in words(done)


def test_nothing_is_rounded_where_it_would_not_be_kept(monkeypatch, tmp_path):
    invent(monkeypatch, 1.5)
    done = run(*QUICK, "--method", "radial", "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["options"] == {"norm": "l2"}
    (row,) = result["batches"]
    assert row["rounding"] is None
    assert row["code"].startswith('fastreduce.patch(model, "radial", keep_rate=0.5, schedule="stages", norm="l2", at=')
    assert "Token counts were not rounded: radial's counts follow from its radii." in words(done)
    done = run(*QUICK, "--round-to", "none", "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["batches"][0]["rounding"] is None
    assert "rounded" not in done.stdout


@pytest.mark.parametrize(
    ("method", "rate", "multiples"),
    [("topk", 0.5, (1, 3)), ("tome", 0.3, (16,))],  # multiples already; out of reach, as a stage merges half at most
)
def test_counts_that_rounding_does_not_change_are_not_timed(monkeypatch, method, rate, multiples):
    invent(monkeypatch, 1.5)
    monkeypatch.setattr(payoff, "MULTIPLES", {"cpu": multiples})
    done = run(*QUICK[:-2], rate, "--no-pictures", "--method", method)
    assert done.exit_code == 0, done.output
    if method == "topk":
        assert "multiples of 3 (50 26 14)" in words(done)
        assert "multiples of 1 " not in words(done)
    else:
        assert "nothing to round, the token counts are multiples already or cannot be made so." in words(done)
    assert f"keep_rate={rate}, at=" in words(done)


def test_stages_that_round_to_the_same_count_are_no_news(recwarn):
    """The warning that such stages do nothing is advice on ``keep``, which the user did not give."""
    settings = payoff.Settings(MODEL, keep_rates=(0.5,), batches=(1,), rounds=1, round_to="64")
    assert payoff.Planner(settings).entries[0.5].counts == (63, 63, 63)
    assert not [str(one.message) for one in recwarn if "keep=" in str(one.message)]


def test_layers_of_a_checkpoint_are_not_rounded_away(monkeypatch, tmp_path):
    model = fastreduce.patch(create_model(MODEL), "sit", keep_rate=0.5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = [*QUICK, "--method", "sit", "--checkpoint", tmp_path / "weights.pth"]
    invent(monkeypatch, 1.5)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "not rounded: the checkpoint's layers of sit are made for 50 25 12 tokens, not others." in words(done)
    done = run(*arguments, "--round-to", "16")
    assert_one_line(done, "the checkpoint's layers of sit are made for 50 25 12 tokens")


def test_ats_says_what_its_speed_depends_on(tmp_path):
    done = run(*QUICK, "--method", "ats", "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    assert "views of a photo" in words(done)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["batches"][0]["rounding"] is None


def test_wrong_logits_get_no_times(monkeypatch, tmp_path):
    select_topk = unchecked.select_topk
    monkeypatch.setattr(unchecked, "select_topk", lambda scores, *rest, **more: select_topk(-scores, *rest, **more))
    monkeypatch.setattr(payoff, "take_turns", lambda *_: pytest.fail("something was timed"))
    done = run(*QUICK[:-1], "--out", tmp_path, "--json", tmp_path / "result.json")
    assert done.exit_code == 1, done.output
    assert "please report this" in words(done)
    assert "Nothing was timed." in done.stdout
    assert "times as fast" not in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["batches"] == result["advice"] == []
    assert len(result["wrong"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_logits_that_turn_wrong_with_the_batch_get_no_times(monkeypatch):
    """Right on the two images of the first check, wrong on what is timed."""
    settings = payoff.Settings(MODEL, keep_rates=(0.5,), batches=(1, 4), rounds=1)
    planner = payoff.Planner(settings)
    planner.check(lambda *_: None)
    assert planner.wrong == []
    ready = planner._ready

    def broken(model, images):
        call, logits = ready(model, images)
        return call, logits + (len(images) == 4) * logits.abs().max()

    monkeypatch.setattr(planner, "_ready", broken)
    planner.measure(lambda *_: None)
    assert list(planner.seconds) == [1]
    assert planner.result()["batches"] == []
    (line,) = planner.wrong
    assert line.startswith("keep rate 0.5, batch 4: the logits are 1e+00 away")


def test_compiled_models(monkeypatch, tmp_path):
    compiled = []

    def compile(model, **options):
        compiled.append(options)
        return model.forward

    monkeypatch.setattr(torch, "compile", compile)
    done = run(*QUICK, "--compile", "--round-to", "none", "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    assert compiled
    assert all(options == {"dynamic": False} for options in compiled)
    assert json.loads((tmp_path / "result.json").read_text())["compile"]
    assert ", compiled" in words(done)


def test_compiled_logits_must_be_the_eager_ones(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda images: 1.1 * model(images))
    settings = payoff.Settings(MODEL, keep_rates=(0.5,), batches=(2,), rounds=1, compile=True)
    planner = payoff.Planner(settings)
    planner.check(lambda *_: None)
    planner.measure(lambda *_: None)
    assert planner.seconds == {}
    assert planner.wrong[-1].endswith("away from those of the eager model")


def test_a_slow_machine_leaves_the_large_batches_out(monkeypatch):
    planner = payoff.Planner(payoff.Settings(MODEL, keep_rates=(0.5,), seconds=10.0))
    assert planner.batches == [1, 4, 16]
    passes = (payoff._FEWEST_ROUNDS + 1) * 2.75
    monkeypatch.setattr(
        planner.comparison, "_probe", lambda count: 10.0 / passes / 6 * count
    )  # 1 and 4 fit, with 16 they do not
    planner._drop_what_takes_too_long(10.0)
    assert planner.batches == [1, 4]
    assert planner.left_out == {16: "it would take about 27 s here; give --batch 16 or more --seconds"}
    planner._drop_what_takes_too_long(0.0)
    assert planner.batches == [1], "one is always measured"


def test_rounds_fill_the_time_and_no_more(monkeypatch):
    planner = payoff.Planner(payoff.Settings(MODEL, keep_rates=(0.5,), batches=(1,)))
    clock = iter(range(1000))
    monkeypatch.setattr(payoff.time, "perf_counter", lambda: float(next(clock)))  # two rounds a second
    monkeypatch.setattr(payoff, "take_turns", lambda calls, device, rounds: {name: [1.0] * rounds for name in calls})
    counts = {}
    for share in (0.1, 10.0, 1e6):
        planner._turns({"a": None}, share, lambda _: None, seconds := {})
        counts[share] = len(seconds["a"])
    assert counts == {0.1: payoff._FEWEST_ROUNDS, 10.0: 20, 1e6: payoff._MOST_ROUNDS}


def test_it_stops_when_the_time_is_up(tmp_path):
    done = run(*["plan", "--model", MODEL, "--keep-rate", "0.5"], "--seconds", "0.1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Batch 16 was left out: it would take about" in words(done)


def test_too_many_images_for_the_memory(monkeypatch):
    settings = payoff.Settings(MODEL, keep_rates=(0.5,), batches=(1, 2, 4), rounds=1, round_to="none")
    planner = payoff.Planner(settings)
    planner.check(lambda *_: None)
    ready = planner._ready

    def full(model, images):
        if len(images) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TiB")
        return ready(model, images)

    monkeypatch.setattr(planner, "_ready", full)
    planner.measure(lambda *_: None)
    result = planner.result()
    assert [row["batch"] for row in result["batches"]] == [1]
    assert "Batch 2 was left out: it does not fit into memory." in result["advice"]
    monkeypatch.setattr(payoff.Planner, "_ready", lambda *_: full(None, range(2)))
    done = run(*QUICK)
    assert done.exit_code == 2
    assert done.stderr.endswith("\nerror: CUDA out of memory. Tried to allocate 3 TiB\n")


def test_keep_rates_too_low_for_a_small_model():
    """Left out and named if nobody asked for them."""
    settings = payoff.Settings(MODEL, at=(1, 2, 3, 4), batches=(1,), rounds=1, round_to="none")
    planner = payoff.Planner(settings)
    assert list(planner.entries) == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    planner.check(lambda *_: None)
    planner.measure(lambda *_: None)
    assert planner.result()["advice"][-1].startswith("Keep rate 0.25 was left out: stage 3 would keep 0 of 100")


WRONG = {  # what is wrong: arguments, and what the message must say
    "model": ("--model deit_smal_patch16_224", "did you mean 'deit_small_patch16_224'?"),
    "method": ("--method tomm", "unknown method 'tomm'; did you mean 'tome'?"),
    "keep rate 0": ("--keep-rate 0", "keep_rate must lie in (0, 1], got 0.0"),
    "keep rate too low": ("--keep-rate 0.01", "at least 1 must stay"),
    "keep rate a word": ("--keep-rate half", "--keep-rate takes numbers, like 0.7,0.5"),
    "no checkpoint": ("--checkpoint nowhere.pth", "there is no checkpoint 'nowhere.pth'"),
    "block": ("--at 2,6", "block indices between 0 and 5, got 6"),
    "device": ("--device tpu", "unknown device 'tpu'; expected cpu, cuda or cuda:N"),
    "dtype": ("--dtype float8", "unknown dtype 'float8'"),
    "backend": ("--backend cuda", "unknown backend 'cuda'"),
    "batch 0": ("--batch 4,0", "batch must be positive, got 0"),
    "batch a word": ("--batch many", "--batch takes whole numbers, like 1,16, got '2,many'"),
    "batch not whole": ("--batch 2.5", "--batch takes whole numbers, like 1,16"),
    "rounds": ("--rounds -1", "rounds must be positive, got -1"),
    "threads": ("--threads 0", "threads must be positive, got 0"),
    "seconds": ("--seconds nan", "seconds must be positive, got nan"),
    "graphs": ("--device cpu --graphs", "CUDA graphs need a CUDA device, and this runs on 'cpu'"),
    "round to 0": ("--round-to 0", "round-to must be positive, got 0"),
    "round to a word": ("--round-to eight", "--round-to takes a number, auto or none, got 'eight'"),
    "round what cannot be": ("--method ats --round-to 8", "ats keeps as many tokens as each image calls for: give"),
    "round radii": ("--method radial-l1 --round-to 8", "radial's counts follow from its radii"),
    "option": ("--fast", "--fast"),
    "json is a folder": ("--json .", "is a folder, not a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line(case):
    arguments, message = WRONG[case]
    assert_one_line(run(*QUICK, *arguments.split()), message)


def test_mistakes_in_the_code_are_not_hidden(monkeypatch):
    def broken(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(payoff.Planner, "check", broken)
    assert isinstance(run(*QUICK).exception, ValueError)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_few_rounds_are_no_verdict(rounds):
    (row,) = rows({1: {0.5: 1.3, 0.25: 0.7}}, noise=(1.0,) * rounds, control=(1.0,) * rounds)
    assert row["recommended"] is None
    assert [rate["verdict"] for rate in row["rates"]] == ["too few rounds"] * 2
    assert math.isclose(row["rates"][0]["speedup"], 1.3)
    lines = advice([row])
    assert lines[0] == "No verdict: the rounds are too few to say whether reduction pays at batch 1."
    assert lines[1].endswith(f"which takes 5 rounds, and this had {rounds}: give --rounds 5 or more.")
    assert not any("educe" in line for line in lines[1:-1])


def test_five_rounds_are_a_verdict():
    (row,) = rows({1: {0.5: 1.3}}, noise=(1.0,) * 5, control=(1.0,) * 5)
    assert row["recommended"] == 0.5


def test_a_batch_of_which_too_few_rounds_were_finished_gets_no_verdict():
    found = rows({1: {0.5: 1.3}}) + rows({4: {0.5: 1.3}}, noise=(1.0,) * 2, control=(1.0,) * 2)
    lines = advice(found)
    assert lines[0] == "Reduction pays at batch 1."
    assert lines[1].startswith("Batch 1: reduce, from keep rate 0.5 on.")
    assert lines[2].startswith("Batch 4: no verdict")
    assert "(batch 4" not in lines[3]


def test_one_round_prints_no_verdict_and_no_spread(tmp_path):
    done = run(*QUICK, "--rounds", "1", "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    text = words(done)
    assert "No verdict: the rounds are too few" in text
    assert "Only 1 round: do not read much into the speeds." in text
    assert "±" not in text
    assert "pays at" not in text.replace("whether reduction pays at", "")
    assert "Do not reduce" not in text
    (row,) = json.loads((tmp_path / "result.json").read_text())["batches"]
    assert row["code"] is None
