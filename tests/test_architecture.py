"""The arrows of the house, and what goes into the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastreduce"

# The floors of the house, from the ground up: a room imports rooms of lower floors only. Doors (`fastreduce`,
# `python -m fastreduce`) stand on no floor.
FLOORS = (
    {
        "kernels",
        "reference",
        "backends",
        "arguments",
        "names",
        "draw",
        "plain",
        "_files",
        "_flops",
        "_version",
    },
    {"ops", "checkpoints", "config", "pictures", "measure"},
    {"tokens"},
    {"reducers"},
    {"recording"},
    {"integrations"},
    {"deploy", "speed", "quality", "study"},
    {"cli"},
)
DOORS = {"__init__", "__main__"}
# Neither imports the other: they meet in ops.
APART = ({"kernels", "reference"},)
# The study trains with timm's transforms, losses and schedulers; models it takes from integrations as all do.
ONLY_HERE = {
    "timm": {"integrations", "study"},
    "triton": {"kernels"},
    "transformers": {"integrations"},
    "open_clip": {"integrations"},
}


def _imports(path: Path) -> list[str]:
    """Return absolute dotted names of all that a file imports."""
    names = []
    folder = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(p for p in PACKAGE.glob("**/*.py") if p.parent != PACKAGE / "kernels")
FILES += sorted((PACKAGE / "kernels").glob("*.py"))


FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def test_every_room_has_a_floor():
    rooms = {_room(path) for path in FILES}
    assert rooms - DOORS == set(FLOOR)
    assert len(FLOORS) <= 8


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    room = _room(path)
    for name in _imports(path):
        head, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if head == "fastreduce" and room not in DOORS and target != room:
            assert target in FLOOR, f"{path.name} of {room} imports {name}, which is no room"
            assert FLOOR[target] < FLOOR[room], f"{path.name} of {room} imports {name}"
            assert not any({room, target} <= apart for apart in APART), f"{path.name} of {room} imports {name}"
        if head in ONLY_HERE:
            assert room in ONLY_HERE[head], f"{path.name} imports {name}"
        assert head not in ("bench", "tests"), f"{path.name} imports {name}"


def _modules(top: str) -> dict[str, set[str]]:
    """Return every module of a folder, and the modules of the same folder that it imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / top).glob("**/*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}

    def owner(name: str) -> str:
        return name if name in files else name.rpartition(".")[0]

    return {name: {owner(found) for found in _imports(path)} & set(files) - {name} for name, path in files.items()}


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the modules that stay when all that import nothing are taken away, again and again."""
    left = dict(arrows)
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("top", ["fastreduce", "bench"])
def test_no_module_imports_itself_by_a_detour(top):
    arrows = _modules(top)
    assert sum(map(len, arrows.values())) > 50
    assert _circle(arrows) == []


def test_circles_are_found():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_bench_imports_no_tests():
    for path in (ROOT / "bench").glob("**/*.py"):
        assert not [name for name in _imports(path) if name.partition(".")[0] == "tests"], path


def test_tests_import_what_stands_for_them_in_bench():
    """Tests import the rooms of bench made for them; what measures is imported by its own tests only."""
    own = {"bench", "golden"}
    for path in (ROOT / "tests").glob("*/**/*.py"):
        if path.relative_to(ROOT / "tests").parts[0] in own or path.name in ("test_traffic.py", "test_ladder.py"):
            continue
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "bench":
                assert parts[1] in ("proof", "primitives"), f"{path.name} imports {name}"


def test_the_walk_sees_imports():
    assert any(name.startswith("timm") for name in _imports(PACKAGE / "integrations" / "timm" / "models.py"))
    assert any(name.startswith("fastreduce.reference") for name in _imports(PACKAGE / "ops" / "gather_tokens.py"))
    assert "bench.primitives.Primitive" in _imports(ROOT / "bench" / "proof" / "compiler.py")


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_triton_and_one_another_only(path):
    for name in _imports(path):
        head = name.partition(".")[0]
        relative = name.startswith("fastreduce.kernels.")
        assert relative or head in ("torch", "triton", "__future__") or head in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda p: p.name)
def test_operators_import_kernels_when_they_launch_them(path):
    """Imports at the top of a module would make triton a requirement of the reference."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "kernels" in (node.module or "")
    ]


def _doubled_mappings(text: str) -> list[str]:
    """Return what a call in a source text unpacks more than once."""
    doubled = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
            doubled += [f"line {node.lineno}: **{one}" for one in unpacked if unpacked.count(one) > 1]
    return doubled


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_a_launch_gets_its_settings_once(path):
    """A doubled line made every launch of a kernel fail, which without a GPU only the interpreter's tests see."""
    assert _doubled_mappings("f(1, **a, **a.b)") == []
    assert _doubled_mappings("f[g](x, **a(b), y=1, **a(b))") == ["line 1: **a(b)"] * 2
    assert _doubled_mappings(path.read_text()) == []


def test_import_kernels_in_the_root_finds_the_other_distribution(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other one'")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.name)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the other one\n", done.stderr


def test_kernels_is_a_symlink_to_a_folder_without_init():
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_kernels_as_real_files(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("fastreduce-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path in (ROOT / "kernels").glob("*.py"):
            member = f"fastreduce/kernels/{path.name}"
            assert member in names
            assert archive.read(member) == path.read_bytes()
    assert "fastreduce/py.typed" in names
    roots = {name.split("/")[0] for name in names}
    assert all(root == "fastreduce" or root.endswith(".dist-info") for root in roots), roots


def test_a_text_file_in_place_of_the_symlink_is_said(tmp_path):
    copy = tmp_path / "fastreduce"
    copy.mkdir()
    for name in ("__init__.py", "_version.py"):
        (copy / name).write_text((PACKAGE / name).read_text())
    (copy / "kernels").write_text("../kernels")
    done = subprocess.run([sys.executable, "-c", "import fastreduce"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "symlink" in done.stderr.splitlines()[-1]


def test_without_triton_import_and_reference_work():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastreduce\n"
        "from timm.models.vision_transformer import VisionTransformer\n"
        "model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3)\n"
        "images = torch.randn(2, 3, 32, 32)\n"
        "for method in ('topk', 'evit', 'tome', 'radial'):\n"
        "    fastreduce.patch(model, method, keep_rate=0.5, at=(1, 2))\n"
        "    assert model(images).shape == (2, 3)\n"
        "    fastreduce.unpatch(model)\n"
        "assert not any(name.startswith('triton.') for name in sys.modules)\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stderr
