"""Options of the command line: what is refused, how early, and that no traceback reaches a user."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import timm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastreduce import REDUCERS
from fastreduce.names import FAMILIES, METHODS, TITLES, compared_methods, parse_method_option
from fastreduce.reducers import _options
from fastreduce.speed import comparison as engine
from fastreduce.speed import models as built
from fastreduce.speed import payoff
from fastreduce.speed.settings import CompareSettings, PlanSettings, check_model
from tests.helpers.commands import assert_one_line, run

MODEL = "test_vit"


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


EARLY = {
    "no image": ("compare nowhere.jpg", "there is no image 'nowhere.jpg'"),
    "folder": ("compare FOLDER", "is a folder; give a file"),
    "text": ("compare FOLDER/text.jpg", "cannot be read as an image"),
    "checkpoint": ("plan --checkpoint nowhere.pth", "there is no checkpoint 'nowhere.pth'"),
    "checkpoint is a folder": ("plan --checkpoint FOLDER", "is a folder; give a file"),
    "checkpoint is a picture": ("plan --checkpoint FOLDER/photo.jpg", "is not a .safetensors or torch.save file"),
    "method": ("compare --methods topk,tomm", "unknown method 'tomm'; did you mean 'tome'?"),
    "method option": ("plan --method tome --method-option round=exact", "did you mean 'rounds'?"),
    "model": ("compare --model deit_smal_patch16_224", "did you mean 'deit_small_patch16_224'?"),
    "keep rate": ("compare --keep-rate 1.5", "keep_rate must lie in (0, 1], got 1.5"),
    "device": ("plan --device gpu", "unknown device 'gpu'"),
    "json": ("plan --json FOLDER", "is a folder, not a file"),
    "out": ("plan --out FOLDER/text.jpg", "is a file, not a folder"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.jpg").write_text("not an image")
    Image.new("RGB", (64, 64), (90, 140, 30)).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("case", EARLY)
def test_mistakes_are_told_before_anything_is_built(folder, case, monkeypatch):
    monkeypatch.setattr(built, "create_model", lambda *_, **__: pytest.fail("a model was built"))
    arguments, message = EARLY[case]
    assert_one_line(run(*arguments.replace("FOLDER", str(folder)).split()), message)


def imported(*arguments):
    """Return the modules that a command imports, and what it says."""
    done = process("-X", "importtime", "-m", "fastreduce", *arguments)
    lines = done.stderr.splitlines()
    times = [line for line in lines if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in times}, [line for line in lines if line not in times]


@pytest.mark.parametrize("case", ["text", "checkpoint is a picture", "method option", "model"])
def test_mistakes_are_told_before_torch_is_imported(folder, case):
    """A user would wait seconds for the import."""
    arguments, message = EARLY[case]
    modules, said = imported(*arguments.replace("FOLDER", str(folder)).split())
    assert message in said[0]
    assert len(said) == 1
    assert "fastreduce.speed.settings" in modules
    assert not {"torch", "timm", "sklearn", "matplotlib"} & modules


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["methods"], ["--version"]])
def test_help_imports_little(arguments):
    modules, said = imported(*arguments)
    assert said == []
    assert "fastreduce" in modules
    assert not {"torch", "timm", "numpy", "PIL", "matplotlib"} & modules


def test_names_of_models_are_known_without_timm():
    """The names are all that timm has, old ones too, and nothing else."""
    names = [*timm.list_models(), *timm.models._registry._deprecated_models]
    assert len(names) > 1000
    for name in names[::5]:  # each search goes through four megabytes
        check_model(name, pretrained=False)
    for name in ("test_vitt", "", "../test_vit", "Test_ViT", "(", ".x", "deit_small_patch16_22", "a'b"):
        with pytest.raises(ValueError, match="unknown model"):
            check_model(name, pretrained=False)
    check_model("test_vit.any_tag", pretrained=False)
    check_model("hf-hub:timm/vit", pretrained=True)


def test_nothing_is_left_behind_by_what_was_refused(tmp_path):
    for arguments in (["--seed", "-1"], ["--keep-rate", "7"], ["--model", "test_resnet"], ["--batch", "1000000000"]):
        done = run(
            "compare", "--model", MODEL, *arguments, "--out", tmp_path / "a" / "b", "--json", tmp_path / "c" / "d"
        )
        assert done.exit_code == 2, done.output
        assert os.listdir(tmp_path) == []


MESSAGES = {
    "seed below": ("compare --seed -1", "seed must be from 0 to 2^63 - 1, got -1"),
    "seed above": (f"plan --seed {2**63}", f"seed must be from 0 to 2^63 - 1, got {2**63}"),
    "seed a word": ("plan --seed x", "--seed takes a whole number, got 'x'"),
    "rounds a word": ("compare --rounds abc", "--rounds takes a whole number, got 'abc'"),
    "rounds not whole": ("plan --rounds 2.5", "--rounds takes a whole number, got '2.5'"),
    "rounds beyond": (f"compare --rounds {10**30}", "rounds must be at most"),
    "seconds a word": ("compare --seconds soon", "--seconds takes a number, got 'soon'"),
    "threads beyond": ("compare --threads 1000000", "threads must be at most"),
    "batch beyond": (f"compare --batch {10**400}", "batch must be at most"),
    "batches beyond": (f"plan --batch 1,{10**30}", "batch must be at most"),
    "json empty": ("compare --json=", "--json got '': give a file, or - for standard output"),
    "out empty": ("plan --out=", "--out got '': give a folder"),
    "methods empty": ("compare --methods=", "--methods got '': give names, like topk,tome"),
    "method empty": ("plan --method=,", "--method got ',': give names"),
    "several methods": ("plan --method topk,tome", "plan takes one method, got 'topk,tome'; compare takes several"),
    "keep rates empty": ("compare --keep-rate=", "--keep-rate takes numbers, like 0.7,0.5, got ''"),
    "batches not whole": ("plan --batch 1,2.5", "--batch takes whole numbers, like 1,16, got '1,2.5'"),
    "blocks not whole": ("compare --at 1.5", "--at takes whole numbers, like 3,6,9, got '1.5'"),
    "endless seconds": ("plan --seconds inf", "seconds must be finite, got inf"),
    "csv to standard output": ("plan --csv -", "--csv got '-': give a file"),
    "csv empty": ("plan --csv=", "--csv got '': give a file"),
    "no fidelity, but pictures": ("compare --no-fidelity --images .", "give either --no-fidelity or --images"),
    "no fidelity, but some": ("plan --no-fidelity --at-least 0.9", "give either --no-fidelity or --at-least"),
    "no fidelity of so many": ("plan --no-fidelity --image-count 9", "give either --no-fidelity or --image-count"),
    "block below": ("compare --at -1", "at must hold block indices from 0, got -1"),
    "blocks equal": ("plan --at 3,3", "at must be strictly increasing, got 3,3"),
    "device without index": ("compare --device cuda:", "unknown device 'cuda:'"),
    "second CPU": ("compare --device cpu:1", "unknown device 'cpu:1'"),
    "superscript": ("compare --device cuda:²", "unknown device 'cuda:²'"),
    "too long a name": ("compare --json " + "x" * 300, "File name too long"),
    "no folder can be made": ("compare --out /proc/none/here", "--out: '/proc/none/here' cannot be written"),
    "option of none": (
        "compare --methods topk,evit --method-option iters=3",
        "none of topk, evit has an option 'iters'",
    ),
    "option of two": ("compare --method-option iters=4", "say of which method, like kmedoids.iters=4"),
    "option of another": ("compare --methods topk --method-option tome.rounds=exact", "tome is not among the methods"),
    "option without value": ("plan --method tome --method-option rounds", "like tome.rounds=exact, got 'rounds'"),
    "option's value": ("plan --method tome --method-option rounds=both", "rounds takes official or exact, got 'both'"),
    "option's number": (
        "plan --method kmedoids --method-option iters=-1",
        "takes a whole number of at least 0, got '-1'",
    ),
    "option's range": ("plan --method sinkhorn --method-option eps=0", "eps takes a number above 0, got '0'"),
    "option's nan": ("plan --method sinkhorn --method-option eps=nan", "eps takes a number above 0, got 'nan'"),
    "option of topk": ("plan --method-option x=1", "topk has no option 'x'; it has none"),
    "option of Python": ("plan --method dpcknn --method-option noise=1", "give it to fastreduce.patch"),
    "option that a name gives": ("plan --method radial --method-option norm=l1", "name the method radial-l1"),
    "keep rate of ToMe": ("plan --method tome --method-option r=8", "it takes the place of the keep rate"),
    "unknown option": ("compare --rouns 3", "--rouns"),
    "unknown command": ("compair", "compair"),
    "two pictures": ("compare a.jpg b.jpg", "b.jpg"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_mistake_is_one_line_with_its_value(case):
    arguments, message = MESSAGES[case]
    assert_one_line(run(*arguments.split()), message)


def test_a_picture_is_not_overwritten_by_the_json(folder):
    before = (folder / "photo.jpg").read_bytes()
    done = run("compare", folder / "photo.jpg", "--json", folder / "photo.jpg")
    assert_one_line(done, "is what is read here; it would be lost")
    assert (folder / "photo.jpg").read_bytes() == before


@pytest.mark.parametrize("command", ["compare", "plan"])
def test_a_backend_of_the_environment_that_is_none(command, monkeypatch):
    monkeypatch.setenv("FASTREDUCE_BACKEND", "bogus")
    assert_one_line(run(command), "FASTREDUCE_BACKEND='bogus'; expected one of 'auto', 'triton', 'reference'")


def test_a_backend_of_the_environment_that_is_none_elsewhere():
    """The module that reads it raises while it is imported, whatever command does so."""
    code = "import typer; from fastreduce.cli.app import app; from fastreduce.cli import main\n"
    code += "@app.command()\ndef other():\n    import fastreduce.backends\nmain()"
    done = process("-c", code, "other", FASTREDUCE_BACKEND="bogus")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: FASTREDUCE_BACKEND='bogus'; expected one of 'auto', 'triton', 'reference'\n"


@pytest.mark.parametrize("command", ["compare", "plan"])
def test_a_batch_that_memory_cannot_hold(command, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "free_memory", lambda device: 10**9)
    common = [command, "--model", MODEL, "--keep-rate", "0.5", "--rounds", "1", "--no-pictures"]
    done = run(*common, "--batch", "1000000000", "--json", tmp_path / "result.json")
    assert_one_line(done, "a batch of 1000000000 images takes about ")
    assert "and 1.0 GB are free: give a smaller --batch, at most about " in done.stderr
    most = int(done.stderr.split()[-1])
    assert 100 < most < 10_000
    assert os.listdir(tmp_path) == []
    assert_one_line(run(*common, "--batch", most + 1), f"a batch of {most + 1} images")


def test_usual_batches_that_memory_cannot_hold_are_left_out_of_a_plan(monkeypatch):
    planner = payoff.Planner(payoff.Settings(MODEL, keep_rates=(0.5,)))
    monkeypatch.setattr(engine, "free_memory", lambda device: int(planner.comparison.memory_of(5)))
    planner._drop_what_does_not_fit()
    assert planner.batches == [1, 4]
    assert planner.left_out == {16: "it does not fit into memory"}


def test_what_a_batch_takes_is_no_less_than_its_pictures():
    comparison = engine.Comparison(engine.Settings(model=MODEL, methods=("topk",), keep_rates=(0.5,), batch=1))
    assert comparison.memory_of(1) > 3 * 160 * 160 * 4 + 101 * 64 * 4 * 10
    assert comparison.memory_of(1000) == pytest.approx(1000 * comparison.memory_of(1))
    assert engine.free_memory(comparison.device) > 0


def chosen(monkeypatch, *arguments):
    """Return the settings that a command line comes to."""
    found = []

    def keep(self, settings, started):
        found.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr(engine.Comparison, "__init__", keep)
    monkeypatch.setattr(payoff.Planner, "__init__", keep)
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr == "error: seen\n"
    return found[0]


@pytest.mark.parametrize("name", ["ToMe", "tome", "TOME", " tome "])
@pytest.mark.parametrize("option", ["--methods", "--method"])
def test_names_in_any_case_under_both_options(monkeypatch, name, option):
    settings = chosen(monkeypatch, "compare", option, name)
    assert compared_methods(settings.methods) == [("tome", {})]
    assert chosen(monkeypatch, "plan", option, name).variant == "tome"


def test_names_as_they_are_printed():
    for name, title in TITLES.items():
        if name != "none":
            (found,) = compared_methods([title])
            assert found == compared_methods([name])[0]
    assert [options["norm"] for _, options in compared_methods(["radial"])] == ["l1", "l2", "linf"]
    assert PlanSettings(method="Radial").variant == "radial-l2"
    assert len(compared_methods()) == 13


@pytest.mark.parametrize("device", ["cpu:0", "CPU", "cpu"])
def test_the_first_cpu_is_the_cpu(device):
    settings = CompareSettings(model=MODEL, methods=("topk",), keep_rates=(0.5,), device=device)
    assert str(engine.Comparison(settings).device) == "cpu"
    settings.check()


@pytest.mark.parametrize("name", ["[bold]x", "a\x1b[31mb", "ünï", "\udcff"])
def test_names_with_odd_letters_are_one_line(name):
    done = run("compare", name)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "there is no image" in done.stderr
    assert "\x1b" not in done.stderr


def test_python_dash_m():
    done = process("-m", "fastreduce", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fastreduce ")
    assert "Usage: fastreduce [" in process("-m", "fastreduce", "--help").stdout


def test_completion_of_a_shell():
    done = process("-m", "fastreduce", "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_FASTREDUCE_COMPLETE=complete_bash" in done.stdout
    for line, word in (("fastreduce comp", "compare"), ("fastreduce compare --methods topk,tom", "topk,tome")):
        done = process(
            "-m",
            "fastreduce",
            _FASTREDUCE_COMPLETE="complete_bash",
            COMP_WORDS=line,
            COMP_CWORD=str(len(line.split()) - 1),
        )
        assert done.stdout.split() == [word], done.stderr


def test_the_list_of_methods():
    done = run("methods")
    assert done.exit_code == 0
    lines = [line.strip() for line in done.stdout.splitlines()]
    names = [name.replace("_", "-") for names in FAMILIES.values() for name in names]
    assert len(names) == 13
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in names] == names
    assert set(FAMILIES) <= set(lines)
    assert "options: iters=3, cost=all, equal_weight=false, first=0" in lines
    for name, method in METHODS.items():
        assert method.choose in lines
        assert f"trained: {method.layers}" in done.stdout if method.layers != "none" else True
        assert any(line.startswith(name.replace("_", "-")) for line in lines)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_described_as_they_are(name):
    """Options, defaults and learned layers, as the reducers have them."""
    cls = REDUCERS[name.partition("_")[0]]
    parameters = {**inspect.signature(cls).parameters, **inspect.signature(cls.make).parameters}
    assert {key: option.default for key, option in METHODS[name].options.items()} == {
        key: parameters[key].default for key in _options(cls)
    }
    model = timm.create_model(MODEL)
    from fastreduce import patch

    patch(model, cls.name, keep_rate=0.5, **({"schedule": "stages"} if cls.name == "radial" else {}))
    learned = any(key.startswith("reducers.") for key, _ in model.named_parameters())
    assert learned == (METHODS[name].layers != "none")


def test_every_option_is_given_to_the_method(tmp_path):
    """Values of the right type, in the models that are measured, in the JSON and in the code to paste."""
    given = ["tome.rounds=EXACT", "kmedoids.equal_weight=true", "kmedoids.first=3", "iters=2"]
    words = [word for one in given[:3] for word in ("--method-option", one)]
    file = tmp_path / "result.json"
    done = run(
        *("compare", "--model", MODEL, "--batch", "1", "--rounds", "1", "--methods", "tome,kmedoids"),
        *("--keep-rate", "0.25", "--no-pictures", "--json", file, *words),
    )
    assert done.exit_code == 0, done.output
    tome, kmedoids = json.loads(file.read_text())["methods"]
    assert tome["options"] == {"rounds": "exact"}
    assert tome["counts"] == [25, 6, 1]
    assert kmedoids["options"] == {"equal_weight": True, "first": 3}
    assert max(tome["relative_difference"], kmedoids["relative_difference"]) < 1e-4
    assert "Options: tome rounds=exact, kmedoids equal_weight=True first=3." in " ".join(done.stdout.split())
    settings = payoff.Settings(MODEL, method="tome", method_options=("rounds=exact",), keep_rates=(0.25,))
    planner = payoff.Planner(settings)
    assert 'rounds="exact"' in planner._code(planner.entries[0.25])
    assert planner.entries[0.25].counts == (25, 6, 1)


@pytest.mark.parametrize(
    ("method", "word", "value"),
    [
        ("evit", "normalize=YES", True),
        ("ats", "trim=none", None),
        ("ats", "packed=1", True),
        ("kmedoids", "first=1,2,3", (1, 2, 3)),
        ("kmedoids", "iters= 4 ", 4),
        ("dpcknn", "DPC-KNN.k_neighbors=7", 7),
        ("sinkhorn", "eps=1e-2", 0.01),
        ("sinkhorn", "gradient=exact", "exact"),
        ("patchmerger", "patchmerger.scaled=false", False),
    ],
)
def test_values_have_the_type_of_the_option(method, word, value):
    found = parse_method_option(word, [method])
    assert found[0] == method
    assert found[2] == value
    assert type(found[2]) is type(value)


def test_every_option_that_can_be_given_is_one_that_the_method_takes():
    """A value for each, other than the default where there is one, through to a model that runs."""
    samples = {bool: "true", int: "2", float: "0.5", "ints": "1"}
    words = [
        f"{name}.{key}={option.kind[-1] if isinstance(option.kind, tuple) else samples[option.kind]}"
        for name, method in METHODS.items()
        if not name.startswith("radial")
        for key, option in method.options.items()
        if not option.instead
    ]
    assert len(words) >= 13
    settings = CompareSettings(model=MODEL, keep_rates=(0.5,), batch=1, rounds=1, method_options=tuple(words))
    comparison = engine.Comparison(settings)
    comparison.check(lambda *_: None)
    for entry in comparison.entries:
        tied = entry.chosen.get("cost") == "members"  # two that form a cluster cost the same: rounding decides
        assert entry.difference < 1e-4 or entry.changed or tied, entry.label
        assert set(entry.chosen) >= set(comparison.method_options.get(entry.method, {}))
    assert set(comparison.method_options) == {name for name in METHODS if name in own_names(words)}


def own_names(words):
    return {word.partition(".")[0] for word in words}


ODD = [
    "",
    " ",
    ",",
    "0",
    "-1",
    "1",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 30,
    "x",
    "None",
    "true",
    "[red]",
    "é",
    "٣",
]
ODD += ["\x1b[2J", "a\nb", "a=b", "=", ".", "..", "/", "-", "--", "topk", "radial-l9", "cuda:0", "cpu:0", "1_0", "0x10"]
COMMON = ["--model", "--checkpoint", "--methods", "--method", "--method-option", "--keep-rate", "--at", "--batch"]
COMMON += ["--rounds", "--seconds", "--device", "--dtype", "--backend", "--threads", "--seed", "--out", "--json"]
ONLY = {"compare": [""], "plan": ["--round-to"]}


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Stop where models would be built, in a folder of our own."""

    def stop(*_):
        raise ValueError("all was accepted")

    monkeypatch.setattr(engine.Comparison, "__init__", stop)
    monkeypatch.setattr(payoff.Planner, "__init__", stop)
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **QUIET)
@given(
    command=st.sampled_from(["compare", "plan"]),
    pairs=st.lists(st.tuples(st.sampled_from([*COMMON, "--round-to", "IMAGE"]), st.sampled_from(ODD)), max_size=4),
)
def test_no_traceback_whatever_is_given(unbuilt, command, pairs):
    arguments = [
        command,
        *(word for option, value in pairs for word in ([value] if option == "IMAGE" else [option, value])),
    ]
    done = run(*arguments)
    assert done.exit_code in (0, 2), (arguments, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
    if done.exit_code == 2:
        assert done.stderr.count("\n") == 1, (arguments, done.stderr)
        assert len(done.stderr) > len("error: \n"), arguments
        assert done.stdout == "", arguments
    assert list(unbuilt.iterdir()) == [], arguments


@settings(max_examples=80, **QUIET)
@given(command=st.sampled_from(["compare", "plan"]), option=st.sampled_from(COMMON), value=st.text(max_size=8))
def test_no_traceback_whatever_letters_are_given(unbuilt, command, option, value):
    done = run(command, option, value)
    assert done.exit_code in (0, 2), (option, value, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), (option, value, done.exception)
    assert done.stderr.count("\n") <= 1
    assert list(unbuilt.iterdir()) == []


EXTREMES = {
    "compare": [
        *("--keep-rate 1", "--keep-rate 1e-9", "--at 0", "--at 0,1,2,3,4,5", "--at 5", "--at 6", "--seconds 1e-300"),
        *(
            "--seed 9223372036854775807",
            "--seed 0",
            "--threads 1",
            "--batch 1",
            "--dtype FLOAT16",
            "--backend Reference",
        ),
        *("--methods radial --at 0", "--methods kmedoids --at 0", "--methods sit --keep-rate 0.03", "--device cuda:7"),
    ],
    "plan": [
        *("--keep-rate 1", "--keep-rate 1e-9", "--at 0", "--round-to 1", "--round-to 1000000", "--round-to NONE"),
        *("--method kmedoids --at 0", "--method dpcknn --method-option k_neighbors=1000000", "--batch 1,1,2"),
        "--method kmedoids --method-option first=100",
    ],
}


@pytest.mark.parametrize(
    ("command", "words"), [(command, words) for command in EXTREMES for words in EXTREMES[command]]
)
def test_extremes_end_well_or_with_one_line(command, words, tmp_path):
    """Commands run on a real model, all the way through."""
    common = [command, "--model", MODEL, "--batch", "1", "--rounds", "1", "--no-pictures"]
    common += ["--keep-rate", "0.5"] if "--keep-rate" not in words else []
    common += ["--methods", "topk"] if "--method" not in words else []
    done = run(*common, *words.split())
    assert done.exit_code in (0, 2), (done.output, done.exception)
    if done.exit_code == 2:
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    else:
        assert "unreduced" in done.stdout


def test_a_great_picture_is_read_in_silence(tmp_path, monkeypatch):
    """More pixels than Pillow likes, without a warning."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    Image.new("L", (300, 200), 7).save(tmp_path / "great.png")
    done = run("compare", tmp_path / "great.png", "--model", "nothing")
    assert_one_line(done, "unknown model 'nothing'")
