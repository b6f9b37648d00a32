"""Backends: which one runs, and that an explicit choice never falls back."""

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastreduce
from fastreduce import backends, ops
from fastreduce.backends import resolve


class _OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a GPU; nothing but resolve() looks at it."""

    @property
    def device(self):
        return torch.device("cuda")


def _cuda(dtype=torch.float32):
    return torch.empty(1, dtype=dtype).as_subclass(_OnDevice)


@pytest.fixture
def _no_environment(monkeypatch):
    monkeypatch.setattr(backends, "_ENVIRONMENT", "auto")


@pytest.mark.usefixtures("_no_environment")
def test_auto_follows_the_device():
    assert resolve("auto", torch.empty(1)) == "reference"
    assert resolve(None, torch.empty(1)) == "reference"
    assert resolve("auto", torch.empty(1, device="meta")) == "reference"
    assert resolve("auto", _cuda()) == "triton"


@pytest.mark.usefixtures("_no_environment")
def test_argument_before_context_before_environment(monkeypatch):
    tensor = _cuda()
    monkeypatch.setattr(backends, "_ENVIRONMENT", "reference")
    assert resolve(None, tensor) == "reference"
    with fastreduce.backend("triton"):
        assert resolve(None, tensor) == "triton"
        assert resolve("auto", tensor) == "triton"
        assert resolve("reference", tensor) == "reference"
        with fastreduce.backend("reference"):
            assert resolve(None, tensor) == "reference"
        assert resolve(None, tensor) == "triton"
    assert resolve(None, tensor) == "reference"


def test_context_is_left_on_an_error():
    with pytest.raises(KeyError), fastreduce.backend("reference"):
        raise KeyError
    assert backends._chosen() == backends._ENVIRONMENT


def _in_thread(function):
    """Return what the function returns in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def _meeting(*names):
    """Run threads inside blocks of their own at the same time: what each sees once all are in, and after they left."""
    inside, seen, after = threading.Barrier(len(names)), {}, {}

    def run(name):
        for turn in range(3):
            with fastreduce.backend(name):
                inside.wait(60)
                seen[name, turn] = backends._chosen()
                inside.wait(60)
            after[name, turn] = backends._chosen()

    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(run, names))
    return seen, after


@pytest.mark.usefixtures("_no_environment")
class TestContext:
    """Choices of a block belong to its thread or task, whatever others do meanwhile."""

    def test_threads(self):
        seen, after = _meeting("reference", "triton")
        assert seen == {(name, turn): name for name in ("reference", "triton") for turn in range(3)}
        assert set(after.values()) == {"auto"}

    def test_a_thread_started_inside_a_block_has_no_choice(self):
        with fastreduce.backend("reference"):
            assert _in_thread(backends._chosen) == "auto"
            assert backends._chosen() == "reference"

    def test_data_parallel_replicas_choose_for_themselves(self):
        """Replicas run in torch's parallel_apply: one thread each, all within a block of the main thread."""
        x, index = torch.randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
        inside = threading.Barrier(2)

        def replica(name):
            with fastreduce.backend(name):
                inside.wait(60)
                try:
                    return ops.gather_tokens(x, index).shape
                except RuntimeError as error:
                    return str(error)

        with fastreduce.backend("reference"), concurrent.futures.ThreadPoolExecutor(2) as pool:
            shape, refused = pool.map(replica, ("reference", "triton"))
            assert shape == (1, 3, 8)
            assert "'triton' was asked for" in refused
            assert ops.gather_tokens(x, index).shape == (1, 3, 8)

    def test_tasks(self):
        async def task(name, log):
            for _ in range(3):
                with fastreduce.backend(name):
                    await asyncio.sleep(0)
                    log.append((name, backends._chosen()))
                await asyncio.sleep(0)
                log.append(("auto", backends._chosen()))

        async def main():
            log = []
            await asyncio.gather(task("reference", log), task("triton", log))
            with fastreduce.backend("reference"):
                child = asyncio.create_task(_chosen_later())
            log.append(("reference", await child))  # it has what held where it was started
            return log

        async def _chosen_later():
            return backends._chosen()

        log = asyncio.run(main())
        assert len(log) == 13
        assert all(expected == found for expected, found in log), log

    def test_nested(self):
        with fastreduce.backend("triton"):
            with fastreduce.backend("auto"):
                with fastreduce.backend("reference"):
                    assert backends._chosen() == "reference"
                assert backends._chosen() == "auto"
            assert backends._chosen() == "triton"
        assert backends._chosen() == "auto"

    def test_generators_close_their_blocks_in_any_order(self):
        def block(name):
            with fastreduce.backend(name):
                yield backends._chosen()

        first, second = block("triton"), block("reference")
        assert [next(first), next(second)] == ["triton", "reference"]
        first.close()
        assert backends._chosen() == "reference"
        second.close()
        assert backends._chosen() == "auto"

    def test_a_generator_closed_in_another_thread_leaves_nothing(self):
        def block():
            with fastreduce.backend("triton"):
                yield

        generator = block()
        next(generator)
        assert backends._chosen() == "triton"
        _in_thread(generator.close)
        assert backends._chosen() == "auto"

    def test_a_block_can_be_a_decorator(self):
        assert fastreduce.backend("reference")(backends._chosen)() == "reference"
        assert backends._chosen() == "auto"

    def test_compiled_code_sees_the_choice_and_compiles_again_when_it_changes(self):
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph

        def run(x):
            return x + 1 if backends._chosen() == "auto" else x * 3

        torch._dynamo.reset()
        compiled, x = torch.compile(run, fullgraph=True, backend=count), torch.ones(())
        for _ in range(3):
            assert compiled(x) == 2
            with fastreduce.backend("reference"):
                assert compiled(x) == 3
                assert _in_thread(lambda: compiled(x)) == 2
                with fastreduce.backend("auto"):
                    assert compiled(x) == 2
        assert compiled(x) == 2
        assert len(graphs) <= 4  # one a choice, and one a depth of blocks

    def test_a_block_inside_compiled_code(self):
        def run(x):
            with fastreduce.backend("reference"):
                y = x + 1 if backends._chosen() == "auto" else x * 3
            return y if backends._chosen() == "auto" else y * 7

        torch._dynamo.reset()
        compiled, x = torch.compile(run, fullgraph=True, backend="eager"), torch.ones(())
        assert compiled(x) == 3
        with fastreduce.backend("triton"):
            assert compiled(x) == 21
        assert compiled(x) == 3
        assert backends._chosen() == "auto"

    def test_compiled_operators_see_the_choice(self):
        torch._dynamo.reset()
        compiled = torch.compile(lambda s: ops.select_topk(s, 2), fullgraph=True, backend="eager")
        scores = torch.rand(1, 5)
        compiled(scores)
        with fastreduce.backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET"):
            compiled(scores)
        assert torch.equal(compiled(scores), ops.select_topk(scores, 2))


@pytest.mark.skipif(backends._COMPILE_READS_CONTEXT, reason="compiled code reads the task's own choice")
def test_tasks_that_leave_blocks_open_are_warned_of_in_compiled_code(caplog, monkeypatch):
    async def task(name):
        with fastreduce.backend(name):
            await asyncio.sleep(0.01)

    async def main():
        await asyncio.gather(task("reference"), task("triton"))

    monkeypatch.setattr(backends, "_said", set())
    asyncio.run(main())
    assert "torch.compile" in caplog.text
    assert backends._of_thread.choices == ()


def test_unknown_names_are_quoted():
    with pytest.raises(ValueError, match="'cuda'"):
        resolve("cuda", torch.empty(1))
    with pytest.raises(ValueError, match="'fast'"), fastreduce.backend("fast"):
        pass


def test_explicit_triton_on_the_cpu_raises():
    x, index = torch.randn(1, 4, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ops.gather_tokens(x, index, backend="triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), fastreduce.backend("triton"):
        ops.gather_tokens(x, index)


def test_explicit_triton_refuses_float64_and_auto_says_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    with pytest.raises(RuntimeError, match="float64"):
        resolve("triton", _cuda(torch.float64))
    assert not caplog.records
    for _ in range(2):
        assert resolve("auto", _cuda(torch.float64)) == "reference"
    assert len([record for record in caplog.records if "float64" in record.message]) == 1


def test_without_triton_auto_says_once_and_triton_raises(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    for _ in range(2):
        assert resolve("auto", _cuda()) == "reference"
    assert len(caplog.records) == 1
    assert "not installed" in caplog.text
    with pytest.raises(RuntimeError, match="not installed"):
        resolve("triton", _cuda())


@pytest.mark.parametrize(("value", "code"), [("reference", 0), ("nonsense", 1)])
def test_environment_variable(value, code):
    script = "from fastreduce.backends import _ENVIRONMENT; print(_ENVIRONMENT)"
    environment = {**os.environ, "FASTREDUCE_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert value in (done.stdout if code == 0 else done.stderr.splitlines()[-1])


def _calls(dtype):
    """Call every operator once, on CPU tensors."""
    x, slot = torch.randn(2, 6, 8).to(dtype), torch.tensor([[0, 1, 2, 1, 0, 2]] * 2)
    index, scores = torch.zeros(2, 3, dtype=torch.int64), torch.rand(2, 5).to(dtype)
    order = torch.arange(5).expand(2, -1)
    heads = x.view(2, 2, 3, 8)
    return {
        "cls_scores": lambda **kw: ops.cls_scores(heads[:, :, 0], heads, **kw),
        "fuse_tokens": lambda **kw: ops.fuse_tokens(x, order, scores, 2, **kw),
        "gather_tokens": lambda **kw: ops.gather_tokens(x, index, **kw),
        "gather_tokens with residual": lambda **kw: ops.gather_tokens(x.float(), index, residual=x[:, :4], **kw),
        "match_tokens": lambda **kw: ops.match_tokens(x, 2, **kw),
        "merge_tokens": lambda **kw: ops.merge_tokens(x, slot, 3, **kw),
        "merge_tokens with residual": lambda **kw: ops.merge_tokens(x.float(), slot, 3, residual=x[:, :3], **kw),
        "merge_tokens with sizes by a layer": lambda **kw: ops.merge_tokens(
            x.float(), slot, 3, log_size=(x[0, :1], x[0, 0, :1]), **kw
        ),
        "select_topk": lambda **kw: ops.select_topk(scores, 2, **kw),
        "unmerge_tokens": lambda **kw: ops.unmerge_tokens(x, slot, **kw),
    }


@pytest.mark.parametrize("name", _calls(torch.float64))
def test_no_operator_takes_float64_to_the_kernels_silently(name, monkeypatch):
    with pytest.raises(RuntimeError, match="float64"):
        _calls(torch.float64)[name](backend="triton")
    _calls(torch.float64)[name](backend="reference")
    monkeypatch.setattr(backends, "INTERPRETING", True)  # nor where kernels can run at all
    with pytest.raises(RuntimeError, match="float64"):
        _calls(torch.float64)[name](backend="triton")


@pytest.mark.parametrize("name", _calls(torch.float32))
def test_every_operator_obeys_argument_and_context(name):
    call = _calls(torch.float32)[name]
    call()
    for options in ({"backend": "triton"}, {}):
        with fastreduce.backend("auto" if options else "triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            call(**options)
    with fastreduce.backend("triton"):
        call(backend="reference")
    with pytest.raises(ValueError, match="'fastest'"):
        call(backend="fastest")


def test_environment_gives_way_to_context_and_argument():
    script = (
        "import torch, fastreduce\n"
        "x, slot = torch.randn(1, 4, 8), torch.zeros(1, 4, dtype=torch.int64)\n"
        "fastreduce.ops.unmerge_tokens(x, slot, backend='reference')\n"
        "with fastreduce.backend('reference'):\n"
        "    fastreduce.ops.unmerge_tokens(x, slot)\n"
        "print('both')\n"
        "fastreduce.ops.unmerge_tokens(x, slot)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"FASTREDUCE_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "both\n"
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: backend 'triton' was asked for"), done.stderr


def test_without_triton_every_operator_has_its_reference():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastreduce.ops, torch\n"
        "from tests.test_backends import _calls\n"
        "for call in _calls(torch.float32).values():\n"
        "    call(); call(backend='reference')\n"
        "    try: call(backend='triton')\n"
        "    except RuntimeError as error: assert 'triton is not installed' in str(error), error\n"
        "    else: raise SystemExit('fell back silently')\n"
        "assert not any(name.startswith(('triton.', 'fastreduce.kernels')) for name in sys.modules)\n"
        "print('fine')\n"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
