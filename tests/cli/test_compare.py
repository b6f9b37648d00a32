import json
import platform
import subprocess
import sys

import pytest
import torch
from PIL import Image

import fastreduce
from bench.proof import tiny
from fastreduce.integrations import hub
from fastreduce.integrations.timm import create_model
from fastreduce.measure import count_gmacs
from fastreduce.ops import unchecked
from fastreduce.speed import comparison as engine
from fastreduce.speed import decisions
from fastreduce.speed import models as built
from tests.helpers.commands import assert_one_line, run

MODEL = "test_vit"  # 6 blocks, 100 patches, 64 channels
QUICK = ["compare", "--model", MODEL, "--batch", "2", "--rounds", "2", "--random", "--no-fidelity", "--no-pictures"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run everything once on the small model, with pictures."""
    out = tmp_path_factory.mktemp("compare")
    arguments = [
        "compare",
        "--model",
        MODEL,
        "--batch",
        "3",
        "--rounds",
        "3",
        "--keep-rate",
        "0.7",
        "--keep-rate",
        "0.3",
        "--random",
        "--no-fidelity",
    ]
    done = run(*arguments, "--out", out / "new" / "folder", "--json", out / "result.json")
    assert done.exit_code == 0, done.output
    return done, json.loads((out / "result.json").read_text()), out / "new" / "folder"


def test_everything_is_measured(measured):
    _, result, _ = measured
    labels = ["topk", "evit", "dynamicvit", "ats", "tome", "kmedoids", "dpcknn", "sit", "patchmerger", "sinkhorn"]
    labels += ["radial l1", "radial l2", "radial linf"]
    assert [(row["keep_rate"], row["label"]) for row in result["methods"]] == [
        (rate, label) for rate in (0.7, 0.3) for label in labels
    ]
    assert {row["method"] for row in result["methods"]} == set(fastreduce.REDUCERS)
    assert result["blocks"] == [1, 3, 4]
    assert result["batch"] == 3
    assert result["rounds"] == 3
    assert result["images_checked"] == 2
    timed = [result["unreduced"], *result["free_slices"], *result["methods"]]
    timed += [row["plain"] for row in result["methods"]]
    for row in timed:
        assert len(row["seconds"]) == 3
        assert min(row["seconds"]) > 0
        low, high = row["images_per_second_quartiles"]
        assert low <= row["images_per_second"] <= high
        assert row["images_per_second"] == pytest.approx(3 / sorted(row["seconds"])[1])


def test_ratios_are_medians_of_the_rounds(measured):
    _, result, _ = measured
    slices = {tuple(row["counts"]): row["seconds"] for row in result["free_slices"]}
    for row in result["methods"]:
        against = {
            "speedup": result["unreduced"]["seconds"],
            "share_of_free_slice": slices[tuple(row["counts"])],
            "speedup_over_plain": row["plain"]["seconds"],
        }
        for name, seconds in against.items():
            assert row[name] == pytest.approx(sorted(b / a for a, b in zip(row["seconds"], seconds, strict=True))[1])


def test_counts_and_work(measured):
    _, result, _ = measured
    counts = {(row["label"], row["keep_rate"]): row["counts"] for row in result["methods"]}
    assert counts["topk", 0.7] == [70, 48, 34]
    assert counts["evit", 0.3] == [31, 10, 3]
    assert counts["tome", 0.3] == [50, 29, 22]
    for row in result["methods"]:
        assert 0 < row["gmacs"] < result["unreduced"]["gmacs"]


def test_a_comparison_on_the_cpu_keeps_memory(measured):
    assert measured[1]["memory_kept"] == (platform.libc_ver()[0] == "glibc")


def test_logits_are_those_of_the_plain_algorithm(measured):
    _, result, _ = measured
    assert 0 < result["unreduced"]["relative_difference"] < 1e-5
    for row in result["methods"]:
        if not row["images_with_other_decisions"]:
            assert 0 < row["relative_difference"] < 1e-5
            assert row["plain_relative_difference"] < 1e-4


def test_where_it_was_measured(measured):
    _, result, _ = measured
    environment = result["environment"]
    assert environment["fastreduce"] == fastreduce.__version__
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["timm"]
    assert environment["device"] == "cpu"
    assert result["weights"] == "random weights (seed 10)"
    assert result["wall_seconds"] > 0


def test_the_tables(measured):
    done, _, folder = measured
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["checking", "measuring", "drawing"]
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Read these speeds")) <= 80
    assert "…" not in done.stdout, "a column is too narrow"
    assert sum(line.startswith("unreduced") or line.startswith(" unreduced") for line in lines) == 2
    assert "70 48 34" in done.stdout
    assert "random weights (seed 10)" in done.stdout
    assert "say nothing about them" in " ".join(done.stdout.split())
    assert str(folder) in done.stdout.replace("\n", "")


def test_the_pictures(measured):
    _, result, folder = measured
    files = sorted(folder.glob("*.png"))
    assert {file.name for file in folder.iterdir()} - {file.name for file in files} == {"index.html"}
    assert [file.name for file in files] == sorted(
        f"{row['label'].replace(' ', '-')}-{row['keep_rate']}.png" for row in result["methods"]
    )
    assert sorted(row["picture"] for row in result["methods"]) == [str(file) for file in files]
    for file in files:
        with Image.open(file) as picture:
            width, height = picture.size
            assert picture.info["dpi"][0] == pytest.approx(200, abs=0.1)
        assert width > 4 * 440, "four panels"
        assert 440 < height < 800


def test_one_method_one_norm_own_blocks(tmp_path):
    file = tmp_path / "deeper" / "result.json"
    done = run(*QUICK, "--methods", "radial-l1, evit", "--keep-rate", "0.5", "--at", "2,4", "--json", file)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert [row["label"] for row in result["methods"]] == ["evit", "radial l1"]
    assert result["blocks"] == [2, 4]
    assert result["methods"][0]["counts"] == [51, 26]
    assert "picture" not in result["methods"][0]
    assert "Only 2 rounds" in done.stdout


def test_nothing_reduced_can_be_drawn(tmp_path):
    arguments = [*QUICK[:-1], "--methods", "topk,tome", "--keep-rate", "1", "--out", tmp_path]
    assert run(*arguments).exit_code == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_a_checkpoint_and_an_image(tmp_path, form):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    state = create_model(MODEL).state_dict()
    checkpoint = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, checkpoint)
    else:
        torch.save({"model": state}, checkpoint)
    photo = tmp_path / "photo.png"
    Image.new("LA", (91, 47), (200, 100)).save(photo)
    file = tmp_path / "result.json"
    done = run(*QUICK, photo, "--methods", "topk", "--checkpoint", checkpoint, "--dtype", "bfloat16", "--json", file)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["weights"] == f"checkpoint {checkpoint.name}"
    assert result["dtype"] == "bfloat16"
    assert 1e-5 < result["unreduced"]["relative_difference"] < 0.2
    assert "random" not in done.stdout


def test_a_checkpoint_with_a_methods_own_layers(tmp_path):
    """Taken where they fit, which for SiT depends on the keep rate; where not, they are random and that is said."""
    model = fastreduce.patch(create_model(MODEL), "sit", keep_rate=0.5)
    state = {key.removeprefix("reducers."): value for key, value in model.state_dict().items()}
    assert any(key.startswith("cluster_layers.") for key in state)
    torch.save(state, tmp_path / "weights.pth")
    file = tmp_path / "result.json"
    rates = ["--keep-rate", "0.5", "--keep-rate", "0.7"]
    done = run(*QUICK, "--methods", "sit,topk", *rates, "--checkpoint", tmp_path / "weights.pth", "--json", file)
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["methods"]
    found = {(row["method"], row["keep_rate"]): row["layers"] for row in rows}
    assert found == {("topk", 0.5): None, ("sit", 0.5): "checkpoint", ("topk", 0.7): None, ("sit", 0.7): "random"}
    assert "random weights: sit" in " ".join(done.stdout.split())


def test_methods_that_a_model_is_refused_for(tmp_path):
    """Left out and named when everything is compared, an error when asked for."""
    classless = [*QUICK, "--model", "test_vit3", "--keep-rate", "0.5", "--rounds", "1"]
    done = run(*classless, "--json", tmp_path / "result.json")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["refused"]) == ["ats"]
    assert {row["method"] for row in result["methods"]} == set(fastreduce.REDUCERS) - {"ats"}
    assert "Not compared: ats" in done.stdout
    done = run(*classless, "--methods", "ats")
    assert done.exit_code == 2
    assert "class token" in done.output


def test_ats_is_held_against_a_slice_of_what_it_kept():
    settings = engine.Settings(model=MODEL, methods=("ats",), keep_rates=(0.9,), batch=4, rounds=1)
    comparison = engine.Comparison(settings)
    (entry,) = comparison.entries
    most = entry.counts
    tiny.randomize(comparison.model)  # attention that looks somewhere, of all models that share the weights
    comparison.check(lambda *_: None)
    with fastreduce.record(entry.model) as seen, torch.no_grad():
        entry.model(comparison.images)
    assert entry.counts == tuple(int((stage.kept >= 0).sum(1).max()) for stage in seen.stages)
    assert entry.counts < most
    assert list(comparison.slices) == [entry.counts]
    assert comparison.slices[entry.counts].counts == dict(zip(comparison.blocks, entry.counts, strict=True))


def test_three_rounds_whatever_the_clock_says(tmp_path):
    """Measurements that were not asked for are left out to have three rounds, and that is said."""
    file = tmp_path / "result.json"
    done = run("compare", "--model", MODEL, "--seconds", "0.1", "--no-pictures", "--json", file)
    assert done.exit_code == 0, done.output
    assert "batch 1, 3 rounds," in done.stdout
    result = json.loads(file.read_text())
    assert [row["label"] for row in result["methods"]] == ["topk"]
    assert len(result["left_out"]) == 25
    text = " ".join(done.stdout.split())
    assert (
        "Left out, so that 3 rounds of the others fit into the time: keep rate 0.5; at keep rate 0.7 radial linf,"
        in text
    )
    assert "Only 3 rounds: do not read much into the speeds." in text


def test_what_was_asked_for_is_never_left_out():
    arguments = ["compare", "--model", MODEL, "--seconds", "0.1", "--no-pictures", "--methods", "topk,tome"]
    done = run(*arguments, "--keep-rate", "0.6,0.5")
    assert done.exit_code == 0, done.output
    assert "3 rounds," in done.stdout
    assert "Left out" not in done.stdout
    for rate in ("0.6", "0.5"):
        assert f"keep rate {rate}" in done.stdout
    done = run(*arguments)
    assert "Left out, so that 3 rounds of the others fit into the time: keep rate 0.5." in " ".join(done.stdout.split())


def test_top_level():
    assert run("--version").stdout == f"fastreduce {fastreduce.__version__}\n"
    for arguments in ([], ["--help"], ["compare", "--help"], ["plan", "-h"], ["methods", "--help"]):
        done = run(*arguments)
        assert done.exit_code == 0
        assert "Usage: " in done.stdout
        assert done.stderr == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with files that are not what they are given for."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.jpg").write_text("not an image")
    (folder / "junk.safetensors").write_bytes(b"junk")
    (folder / "junk.pth").write_bytes(b"junk")
    torch.save(print, folder / "code.pth")
    torch.save({"head.weight": torch.zeros(3)}, folder / "other.pth")
    return folder


WRONG = {  # what is wrong: arguments, and what the message must say
    "no image": ("nowhere.jpg", "there is no image 'nowhere.jpg'"),
    "image is text": ("FOLDER/text.jpg", "cannot be read as an image"),
    "image is a folder": ("FOLDER", "is a folder; give a file"),
    "model": ("--model deit_smal_patch16_224", "did you mean 'deit_small_patch16_224'?"),
    "model's tag": ("--model test_vit.nonsense", "'test_vit.nonsense' cannot be had"),
    "model without tokens": ("--model test_resnet", "ResNet cannot be reduced"),
    "model of a hub": ("--random --model hf-hub:timm/vit", "would be downloaded: give --pretrained"),
    "method": ("--methods topk,tomm", "unknown method 'tomm'; did you mean 'tome'?"),
    "keep rate 0": ("--keep-rate 0", "keep_rate must lie in (0, 1], got 0.0"),
    "keep rate 2": ("--keep-rate 0.5 --keep-rate 2", "keep_rate must lie in (0, 1], got 2.0"),
    "keep rate nan": ("--keep-rate nan", "keep_rate must lie in (0, 1], got nan"),
    "keep rate too low": ("--keep-rate 0.01", "at least 1 must stay"),
    "keep rate a word": ("--keep-rate half", "--keep-rate takes numbers, like 0.7,0.5, got 'half'"),
    "no checkpoint": ("--checkpoint nowhere.pth", "there is no checkpoint 'nowhere.pth'"),
    "no safetensors": ("--checkpoint FOLDER/junk.safetensors", "is not a .safetensors or torch.save file of weights"),
    "no pickle": ("--checkpoint FOLDER/junk.pth", "is not a .safetensors or torch.save file of weights"),
    "code in a pickle": ("--checkpoint FOLDER/code.pth", "not a dict of weights"),
    "other checkpoint": ("--checkpoint FOLDER/other.pth", "the checkpoint does not fit VisionTransformer"),
    "two weights": ("--checkpoint FOLDER/other.pth --pretrained", "either --pretrained or --checkpoint"),
    "block": ("--at 2,6", "block indices between 0 and 5, got 6"),
    "blocks descend": ("--at 4,2", "strictly increasing"),
    "block a word": ("--at 2,x", "--at takes whole numbers, like 3,6,9, got '2,x'"),
    "device": ("--device tpu", "unknown device 'tpu'; expected cpu, cuda or cuda:N"),
    "dtype": ("--dtype float8", "unknown dtype 'float8'"),
    "backend": ("--backend cuda", "unknown backend 'cuda'"),
    "batch": ("--batch 0", "batch must be positive, got 0"),
    "batch a word": ("--batch many", "--batch"),
    "rounds": ("--rounds -1", "rounds must be positive, got -1"),
    "threads": ("--threads 0", "threads must be positive, got 0"),
    "seconds": ("--seconds nan", "seconds must be positive, got nan"),
    "endless": ("--seconds inf", "seconds must be finite, got inf"),
    "option": ("--fast", "--fast"),
    "json is a folder": ("--json FOLDER", "is a folder, not a file"),
    "json below a file": ("--json FOLDER/text.jpg/result.json", "text.jpg"),
    "out is a file": ("--pictures --out FOLDER/text.jpg", "text.jpg"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line(folder, case):
    arguments, message = WRONG[case]
    assert_one_line(run(*QUICK, *arguments.replace("FOLDER", str(folder)).split()), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [("--device cuda:9", "sees no CUDA device"), ("--backend triton", "'triton' was asked for")],
)
def test_what_needs_a_gpu(arguments, message):
    assert_one_line(run(*QUICK, *arguments.split()), message)


def test_unknown_command():
    assert_one_line(run("compair"), "compair")


def test_pretrained_weights_out_of_reach(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(built, "create_model", unreachable)
    message = "the pretrained weights 'test_vit' cannot be had: "
    assert_one_line(run(*QUICK, "--pretrained"), f"{message}HF_HUB_OFFLINE is set")
    monkeypatch.setattr(hub, "_hub_trouble", lambda seconds: None)
    assert_one_line(run(*QUICK, "--pretrained"), f"{message}no route to the hub")


def test_out_of_memory(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TiB")

    monkeypatch.setattr(engine.Comparison, "measure", full)
    done = run(*QUICK, "--methods", "topk")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[1:] == ["error: CUDA out of memory. Tried to allocate 3 TiB"]


def test_mistakes_in_the_code_are_not_hidden(monkeypatch):
    def broken(*_):
        raise ValueError("a mistake")

    monkeypatch.setattr(engine.Comparison, "check", broken)
    done = run(*QUICK, "--methods", "topk")
    assert isinstance(done.exception, ValueError)
    assert done.exit_code == 1


def test_wrong_logits_are_told(monkeypatch):
    select_topk = unchecked.select_topk
    monkeypatch.setattr(unchecked, "select_topk", lambda scores, *rest, **more: select_topk(-scores, *rest, **more))
    done = run(*QUICK, "--methods", "topk,tome", "--keep-rate", "0.5")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line.rstrip().endswith("!") for line in lines if line.startswith((" topk", " tome"))] == [True, False]
    assert "please report this" in done.stdout


@pytest.mark.parametrize("busy", [True, False])
def test_a_busy_machine_gets_one_thread(monkeypatch, busy):
    before = torch.get_num_threads()
    comparison = engine.Comparison(engine.Settings(model=MODEL, methods=("topk",)))
    monkeypatch.setattr(comparison, "_probe", lambda _: 1.0 if (torch.get_num_threads() == 1) == busy else 2.0)
    try:
        torch.set_num_threads(2)
        comparison._choose_threads()
        assert torch.get_num_threads() == (1 if busy else 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("image", "batch"), [(0.001, 8), (1.0, 4), (2.0, 2), (100.0, 1)])
def test_the_batch_fits_the_time(monkeypatch, image, batch):
    comparison = engine.Comparison(engine.Settings(model=MODEL, methods=("topk", "tome"), keep_rates=(0.5,)))
    monkeypatch.setattr(comparison, "_probe", lambda count: image * count)
    assert comparison._choose_batch() == batch
    assert len(comparison.candidates()) == 7


def test_near_ties_are_told(monkeypatch):
    monkeypatch.setattr(engine, "_SUSPICIOUS", 0)
    monkeypatch.setattr(engine, "changed_decisions", lambda *_: 1)
    done = run(*QUICK, "--methods", "topk", "--keep-rate", "0.5")
    assert done.exit_code == 0
    assert "*: near-ties: in float32 other tokens were chosen than in float64." in done.stdout


def test_decisions_are_compared_as_groups_of_patches():
    def partition(order, method, **options):
        torch.manual_seed(0)
        model = fastreduce.patch(create_model(MODEL).eval(), method, keep_rate=0.5, **options)
        images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(order))
        with torch.inference_mode(), fastreduce.record(model) as seen:
            model(images)
        return seen

    for method in ("topk", "evit", "tome"):
        first, again, other = partition(0, method), partition(0, method), partition(1, method)
        assert decisions.changed_decisions(first, again, 2) == 0
        assert decisions.changed_decisions(first, other, 2) == 2
        groups = decisions.partition(first.stages[0])
        for image in range(2):
            slot = first.stages[0].patch_slot[image].tolist()
            expected = [-1 if own < 0 else slot.index(own) for own in slot]
            assert groups[image].tolist() == expected


def test_work_is_counted():
    model = create_model(MODEL).eval()
    patches, channels, depth = 100, 64, 6
    tokens = patches + 1
    hidden = model.blocks[0].mlp.fc1.out_features
    block = tokens * channels * (4 * channels + 2 * hidden) + 2 * tokens**2 * channels
    expected = patches * channels * 3 * 16**2 + depth * block + channels * model.num_classes
    images = torch.randn(2, 3, 160, 160)
    assert count_gmacs(model, images) == pytest.approx(expected / 1e9, rel=1e-9)
    before = [parameter.clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    saved = 2 * 50 * channels**2 + 2 * 50 * tokens * channels + 50 * channels * 2 * hidden
    reduced = fastreduce.patch(model, "topk", keep=[50], at=[5])
    assert count_gmacs(reduced, images) == pytest.approx((expected + channels**2 - saved) / 1e9, rel=1e-9)


def test_the_first_view_is_what_the_model_sees():
    photo = Image.new("RGB", (200, 100))
    photo.paste((255, 255, 255), (55, 5, 145, 95))  # 0.9 of the height, in the middle
    config = {"input_size": (3, 32, 32), "crop_pct": 0.9, "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    views = engine._views(photo, config, 3, seed=0)
    assert views.shape == (3, 3, 32, 32)
    assert (views[:, :, 1:-1, 1:-1] == 1).all()
    assert views.min() > 0.5  # as after resizing the whole photo, the outermost pixels feel what is beyond them
    squashed = engine._views(photo, {**config, "crop_mode": "squash", "crop_pct": 1.0}, 1, seed=0)
    assert squashed.mean() == pytest.approx(2 * 0.9 * 0.45 - 1, abs=0.01)


def process(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_a_real_process():
    done = process("from fastreduce.cli import main; main()", "compare", "nowhere.jpg")
    assert done.returncode == 2
    assert done.stderr == "error: there is no image 'nowhere.jpg'\n"
    assert done.stdout == ""


def test_without_the_extra():
    code = "import sys; sys.modules['rich'] = sys.modules['sklearn'] = None; from fastreduce.cli import main; main()"
    done = process(code, "--help")
    assert done.returncode == 2
    assert done.stderr == 'fastreduce: rich, sklearn missing; pip install "fastreduce[cli]"\n'
    assert done.stdout == ""
