"""The module tree is the truth: copies, replicas, wrappers, threads, tools that look at a reduced model."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import timm
import torch
import torch._dynamo.testing
import torchinfo
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastreduce
from bench.proof import tiny
from fastreduce.integrations.timm import reducer_of

SCHEDULE = {"at": (1, 2, 3), "keep_rate": 0.5}
LEARNED = ("dynamicvit", "dpcknn", "sit", "patchmerger", "sinkhorn")
ALL = (*LEARNED, "topk", "evit", "ats", "tome", "kmedoids", "radial")


@torch.no_grad()
def run(model, images):
    return model(images)


def patched(method="topk", **changes):
    model = fastreduce.patch(tiny.build(**changes), method, **SCHEDULE)
    if list(model.reducers.parameters()):
        tiny.randomize(model.reducers, seed=7)
    return model


class TestTree:
    @pytest.mark.parametrize("method", LEARNED)
    def test_what_stands_under_reducers_runs(self, method):
        """PEFT's ``modules_to_save`` puts a trainable copy there."""
        model = patched(method).train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.reducers = copy.deepcopy(model.reducers).requires_grad_(True)
        model(tiny.images(model)).square().sum().backward()
        assert any(parameter.grad is not None for parameter in model.reducers.parameters())

    @pytest.mark.parametrize("method", ALL)
    def test_replicas_of_data_parallel(self, method):
        """Replicas are made by torch's own machinery, as by ``nn.DataParallel``; each has weights of its own."""
        model = patched(method)
        images = tiny.images(model)
        expected = run(model, images)
        modules = list(model.modules())
        copies = {module: module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            for name, child in module._modules.items():
                if child is not None:
                    setattr(copies[module], name, copies[child])
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    setattr(copies[module], name, parameter.detach().clone())
            for name, buffer in module._buffers.items():
                setattr(copies[module], name, buffer)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))  # what reaches into the original is seen
        replica = copies[model]
        assert torch.equal(run(replica, images), expected)
        assert all(block._site.model is model for block in model.blocks if hasattr(block, "_site"))

    def test_blocks_of_a_replica_alone_say_so(self):
        model = patched()
        replica = model.blocks[1]._replicate_for_data_parallel()
        with pytest.raises(ValueError, match=r"replicas of nn\.DataParallel"):
            replica(torch.zeros(1, 17, 48))

    def test_layers_take_dtype_and_device_of_their_block(self):
        model = tiny.build()
        model.blocks[2].to("meta", torch.bfloat16)
        fastreduce.patch(model, "dynamicvit", **SCHEDULE)
        kinds = [{(p.device.type, p.dtype) for p in layer.parameters()} for layer in model.reducers.score_predictor]
        assert kinds == [{("cpu", torch.float32)}, {("meta", torch.bfloat16)}, {("cpu", torch.float32)}]

    def test_attributes_of_blocks_stay(self):
        model = tiny.build()
        block = model.blocks[2]
        block.name, block.own = "mine", nn.Linear(2, 2)
        block.register_buffer("counter", torch.zeros(1))
        fastreduce.patch(model, "tome", **SCHEDULE)
        assert model.blocks[2].name == "mine"
        assert {"blocks.2.own.weight", "blocks.2.counter"} <= set(model.state_dict())
        model.blocks[2].later = 3
        model.blocks[2].norm1 = other = nn.Identity()
        assert fastreduce.unpatch(model).blocks[2] is block
        assert (block.later, block.norm1, hasattr(block, "_site")) == (3, other, False)

    def test_what_is_already_there_is_refused(self):
        for name, error in (("reducers", ValueError), ("forward_intermediates", TypeError)):
            model = tiny.build()
            setattr(model, name, nn.Identity() if name == "reducers" else model.forward_features)
            before = list(model.blocks)
            with pytest.raises(error, match=name):
                fastreduce.patch(model, "topk", **SCHEDULE)
            assert all(one is other for one, other in zip(before, model.blocks, strict=True))

    def test_container_hooks_go_on(self):
        model, images = tiny.build(), None
        images = tiny.images(model)
        model.blocks.register_forward_hook(lambda module, inputs, output: output.roll(1, 2))
        expected = run(model, images)
        container = model.blocks
        fastreduce.patch(model, "topk", at=(1, 2), keep_rate=1.0)
        assert model.blocks is container
        assert torch.equal(run(model, images), expected)


class TestWrappers:
    @pytest.mark.parametrize("method", ["tome", "topk", "dynamicvit"])
    def test_blocks_in_wrappers(self, method):
        model = patched(method)
        images = tiny.images(model)
        with fastreduce.record(model) as seen:
            expected = run(model, images)
        dense = model.forward_intermediates(images, intermediates_only=True)
        originals = [block._site.original for block in model.blocks if hasattr(block, "_site")]
        model.blocks[2] = checkpoint_wrapper(model.blocks[2])
        model.blocks[3] = torch.compile(model.blocks[3], backend="eager")
        with fastreduce.record(model) as wrapped:
            assert torch.allclose(run(model, images), expected, atol=1e-5)
        assert [stage.block for stage in wrapped.stages] == [stage.block for stage in seen.stages]
        found = model.forward_intermediates(images, intermediates_only=True)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, dense, strict=True))
        fastreduce.unpatch(model)
        assert [type(block).__name__ for block in model.blocks[2:]] == ["CheckpointWrapper", "OptimizedModule"]
        assert model.blocks[2]._checkpoint_wrapped_module is originals[1]
        assert model.blocks[3]._orig_mod is originals[2]
        unreduced = tiny.build()
        assert torch.allclose(run(model, images), run(unreduced, images), atol=1e-5)

    def test_added_and_removed_blocks(self):
        model = patched("tome")
        images = tiny.images(model)
        model.blocks.append(nn.Identity())
        assert run(model, images).shape == (2, 7)
        del model.blocks[2]
        assert run(model, images).shape == (2, 7)
        assert len(fastreduce.unpatch(model).blocks) == 4
        assert run(model, images).shape == (2, 7)

    def test_wrappers_around_the_model(self):
        class Forwarding(nn.Module):  # as peft.PeftModel
            def __init__(self, model):
                super().__init__()
                self.base_model = model

            def __getattr__(self, name):
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(super().__getattr__("base_model"), name)

        model = patched()
        for wrapped, where in ((Forwarding(model), "base_model"), (nn.DataParallel(model), "module")):
            children = list(wrapped.named_children())
            for call in (fastreduce.unpatch, fastreduce.reduced_counts, fastreduce.config_of):
                with pytest.raises(ValueError, match=rf"give its \.{where}"):
                    call(wrapped)
            with pytest.raises(ValueError, match=rf"give its \.{where}"), fastreduce.record(wrapped):
                pass
            assert list(wrapped.named_children()) == children
            assert fastreduce.is_patched(wrapped)
            with pytest.raises(ValueError, match=rf"give its \.{where}"):
                fastreduce.patch(wrapped, "topk", **SCHEDULE)
        fastreduce.unpatch(model)
        with pytest.raises(TypeError, match=r"inside of it, \.base_model"):
            fastreduce.patch(Forwarding(model), "topk", **SCHEDULE)

    def test_wrappers_of_models_say_what_to_give(self):
        """Data parallel, features only, a tower of another library; what is around a patched model goes on working."""
        names = {"data parallel": (nn.DataParallel, "module"), "sequence": (nn.Sequential, "0")}
        for wrap, where in names.values():
            with pytest.raises(TypeError, match=rf"give the VisionTransformer inside of it, \.{where}"):
                fastreduce.patch(wrap(tiny.build()), "topk", **SCHEDULE)
        small = {**tiny.SMALL, "img_size": 64, "features_only": True, "out_indices": (1, 3)}
        getter = timm.create_model("vit_tiny_patch16_224", **{k: v for k, v in small.items() if k != "num_classes"})
        with pytest.raises(TypeError, match=r"give the VisionTransformer inside of it, \.model"):
            fastreduce.patch(getter, "topk", **SCHEDULE)
        images = torch.randn(2, 3, 64, 64)
        before = [one.shape for one in run(getter, images)]
        fastreduce.patch(getter.model, "topk", **SCHEDULE)
        after = run(getter, images)
        assert [one.shape for one in after] == before  # the full grid
        assert all(one.abs().amax(1).min() > 0 for one in after)

    def test_sharded_blocks_are_refused_whole(self):
        model = patched()
        kind = type(model.blocks[2])
        model.blocks[2].__class__ = type("FSDPReducedBlock", (kind,), {})  # as fully_shard does
        before = list(model.blocks)
        with pytest.raises(ValueError, match="block 2 has become a FSDPReducedBlock"):
            fastreduce.unpatch(model)
        assert all(one is other for one, other in zip(before, model.blocks, strict=True))
        assert fastreduce.is_patched(model)

    def test_symbolic_tracing_is_refused(self):
        for method in ("topk", "radial"):  # the latter looks at the patch embedding's input too
            with pytest.raises(TypeError, match=r"symbolic_trace: use torch\.export"):
                torch.fx.symbolic_trace(patched(method))


class TestTools:
    """Hooks that look at a block's output find a tensor; hooks that would change it are told what it is."""

    def test_torchinfo(self):
        model = patched("tome")
        text = str(torchinfo.summary(model, input_data=tiny.images(model), depth=2, verbose=0))
        assert "ReducedBlock" in text
        assert "[2, 9, 48]" in text  # block 1 leaves 8 of 16 patches and the class token

    def test_grad_cam(self):
        """Grad-CAM does the same with its target layer as pytorch-grad-cam."""
        model = patched("topk")
        kept = {}

        def keep(module, inputs, output):
            kept["activation"] = output.cpu().detach()
            assert output.requires_grad
            output.register_hook(lambda grad: kept.update(gradient=grad.cpu().detach()))

        model.blocks[2].register_forward_hook(keep)
        model(tiny.images(model))[:, 3].sum().backward()
        assert kept["activation"].shape == kept["gradient"].shape == (2, 5, 48)

    def test_looking_and_changing(self):
        model = patched("tome")
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        run(model, tiny.images(model))
        handle.remove()
        tokens = seen[0]
        assert tokens.shape == tokens.size() == tokens.detach().shape == (2, 9, 48)
        assert (tokens.size(1), tokens.dim(), tokens.dtype) == (9, 3, torch.float32)
        for change in (
            lambda: tokens * 2,
            lambda: 1 + tokens,
            lambda: tokens[:, 0],
            lambda: torch.norm(tokens),
            lambda: tokens.roll(1, 2),
            lambda: tokens > 0,
            lambda: -tokens,
        ):
            with pytest.raises((TypeError, AttributeError), match=r"hand on fastreduce\.Tokens"):
                change()
        assert not hasattr(tokens, "no_such_thing")

    def test_they_say_what_they_are(self):
        model = patched("tome")
        with fastreduce.record(model) as seen:
            run(model, tiny.images(model))
        assert "16 -> 8" in repr(seen)
        assert "16 -> 8" in repr(seen.stages[0])
        assert "stage 0 of tome: 16 -> 8" in repr(model.blocks[1])
        assert "ReducedBlock" in repr(model.blocks[1])
        assert fastreduce.is_patched(model)
        assert fastreduce.config_of(model)["method"] == "tome"
        twin = fastreduce.patch(tiny.build(), **fastreduce.config_of(model))
        assert torch.equal(run(twin, tiny.images(model)), run(model, tiny.images(model)))
        fastreduce.unpatch(model)
        assert not fastreduce.is_patched(model)
        with pytest.raises(ValueError, match="not patched"):
            fastreduce.config_of(model)


class TestRecords:
    def test_threads_that_overlap(self):
        model = patched()
        inside, ran, done = (threading.Event() for _ in range(3))
        found = {}

        def first():
            with fastreduce.record(model) as seen:
                inside.set()
                ran.wait(30)
                run(model, tiny.images(model, batch=2))
                found["first"] = [len(stage.kept) for stage in seen.stages]
            done.set()

        def second():
            inside.wait(30)
            with fastreduce.record(model) as seen:
                run(model, tiny.images(model, batch=3))
                ran.set()
                done.wait(30)
                found["second"] = [len(stage.kept) for stage in seen.stages]

        threads = [threading.Thread(target=function) for function in (first, second)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert found == {"first": [2, 2, 2], "second": [3, 3, 3]}

    def test_nested_and_closed_in_any_order(self):
        model, other = patched(), patched("tome")
        with fastreduce.record(model) as one, fastreduce.record(model) as two, fastreduce.record(other) as third:
            run(model, tiny.images(model))
        assert len(one.stages) == len(two.stages) == 3
        assert third.stages == []
        outer, inner = fastreduce.record(model), fastreduce.record(model)
        one, two = outer.__enter__(), inner.__enter__()
        outer.__exit__(None, None, None)
        run(model, tiny.images(model, batch=3))
        inner.__exit__(None, None, None)
        run(model, tiny.images(model))
        assert one.stages == []
        assert [len(stage.kept) for stage in two.stages] == [3, 3, 3]

    def test_copies_made_inside_record_nothing(self):
        model = patched()
        size = len(pickle.dumps(model))
        with fastreduce.record(model) as seen:
            run(model, tiny.images(model, batch=8))
            assert len(pickle.dumps(model)) == size
            twin = copy.deepcopy(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
            run(twin, tiny.images(model, batch=3))
        assert [len(stage.kept) for stage in seen.stages] == [8, 8, 8]

    @pytest.mark.parametrize("method", ["dynamicvit", "topk", "tome"])
    def test_a_compiled_model_is_compiled_once_for_all_records(self, method):
        torch._dynamo.reset()
        model = patched(method).train()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        images = tiny.images(model)
        compiled(images)
        for _ in range(4):
            with fastreduce.record(compiled) as seen:
                compiled(images)
            assert len(seen.decisions if method == "dynamicvit" else seen.stages) == 3
        compiled(images)
        assert counter.frame_count == 2

    def test_decisions_are_differentiable_when_compiled(self):
        torch._dynamo.reset()
        model = patched("dynamicvit").train()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with fastreduce.record(model) as seen:
            compiled(tiny.images(model))
        sum(decision.sum() for decision in seen.decisions).backward()
        assert all(p.grad is not None for p in model.reducers.score_predictor[0].parameters())


def test_another_grid_is_another_pattern():
    """A model that takes any image size, by timm's option or made so by hand after patching."""
    wide = torch.randn(1, 3, 32, 128)
    expected = fastreduce.patch(tiny.build(img_size=(32, 128), patch_size=8), "radial", **SCHEDULE)
    model = fastreduce.patch(tiny.build(img_size=64, patch_size=8, dynamic_img_size=True), "radial", **SCHEDULE)
    for one, images in ((model, wide), (expected, wide)):
        with fastreduce.record(one) as seen:
            run(one, images)
        one.found = seen.stages[0].kept_patches.sort(1).values
    assert torch.equal(model.found, expected.found)
    model.patch_embed = timm.layers.PatchEmbed(64, 8, 3, 48, strict_img_size=False, output_fmt="NHWC")
    with pytest.raises(ValueError, match="patch_embed was replaced"):
        run(model, wide)


def test_warnings_are_not_needed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fastreduce.patch(tiny.build(), "topk", **SCHEDULE), torch.zeros(1, 3, 64, 64))
        assert reducer_of(patched()).name == "topk"


class TestSetKeepRate:
    def test_trained_layers_stay(self):
        model = patched("dynamicvit")
        weights = {name: value.clone() for name, value in model.reducers.state_dict().items()}
        assert fastreduce.set_keep_rate(model, 0.75) is model
        assert fastreduce.reduced_counts(model) == [12, 9, 6]
        assert fastreduce.config_of(model)["keep_rate"] == 0.75
        assert all(torch.equal(value, weights[name]) for name, value in model.reducers.state_dict().items())
        fresh = fastreduce.patch(tiny.build(), "dynamicvit", keep_rate=0.75, at=(1, 2, 3))
        fresh.reducers.load_state_dict(weights)
        assert torch.equal(run(model, tiny.images(model)), run(fresh, tiny.images(model)))

    @pytest.mark.parametrize("method", ["topk", "evit", "tome", "kmedoids", "ats", "dpcknn", "radial"])
    def test_other_blocks(self, method):
        model = patched(method)
        fastreduce.set_keep_rate(model, keep=[10, 7, 4], at=[0, 2, 3] if method != "kmedoids" else [1, 2, 3])
        fresh = fastreduce.patch(tiny.build(), **fastreduce.config_of(model))
        fresh.reducers.load_state_dict(model.reducers.state_dict())
        assert [type(block).__name__ for block in model.blocks] == [type(block).__name__ for block in fresh.blocks]
        assert torch.equal(run(model, tiny.images(model)), run(fresh, tiny.images(model)))
        fastreduce.unpatch(model)
        assert torch.equal(run(model, tiny.images(model)), run(tiny.build(), tiny.images(model)))

    def test_a_rate_after_r_stays_at_its_blocks(self):
        """ToMe's r acts in every block by default, a rate in three of them: the config says which."""
        model = fastreduce.patch(tiny.build(), "tome", r=2)
        fastreduce.set_keep_rate(model, 0.9)
        fresh = fastreduce.patch(tiny.build(), **fastreduce.config_of(model))
        assert fresh.reducers.blocks == model.reducers.blocks == (0, 1, 2, 3)
        assert torch.equal(run(model, tiny.images(model)), run(fresh, tiny.images(model)))

    def test_sharded_blocks_do_not_move(self):
        """FSDP gives a block another class, which cannot be undone: the schedule stays the one before, too."""
        model = patched("topk")
        expected, counts = run(model, tiny.images(model)), fastreduce.reduced_counts(model)
        kind = type(model.blocks[2])
        model.blocks[2].__class__ = type("FSDPBlock", (kind,), {})
        with pytest.raises(ValueError, match="sharded"):
            fastreduce.set_keep_rate(model, 0.75, at=(0, 2, 3))
        assert fastreduce.reduced_counts(model) == counts
        model.blocks[2].__class__ = kind
        assert torch.equal(run(model, tiny.images(model)), expected)

    def test_the_config_is_nobody_elses_list(self):
        at, keep = [1, 2], [8, 4]
        model = fastreduce.patch(tiny.build(), "topk", keep=keep, at=at)
        at.append(3)
        keep[0] = 16
        fastreduce.config_of(model)["at"].clear()
        assert fastreduce.config_of(model)["at"] == [1, 2]
        assert fastreduce.config_of(model)["keep"] == [8, 4]
        fastreduce.set_keep_rate(model, keep=keep, at=at[1:])
        keep.clear()
        at.clear()
        assert fastreduce.config_of(model)["keep"] == [16, 4]
        assert fastreduce.config_of(model)["at"] == [2, 3]

    def test_refusals_leave_the_model(self):
        model = patched("sit")
        expected = run(model, tiny.images(model))
        with pytest.raises(ValueError, match="layers made for"):
            fastreduce.set_keep_rate(model, 0.25)
        assert torch.equal(run(model, tiny.images(model)), expected)
        model = patched("tome")
        expected = run(model, tiny.images(model))
        model.blocks[0].forward = lambda x: x
        for arguments in ({"keep_rate": 1.5}, {"keep_rate": 0.5, "at": (0, 1)}, {}):
            with pytest.raises(ValueError, match=r"keep|forward"):
                fastreduce.set_keep_rate(model, **arguments)
        assert fastreduce.config_of(model)["keep_rate"] == 0.5
        assert fastreduce.reduced_counts(model) == [8, 4, 2]
        del model.blocks[0].forward
        assert torch.equal(run(model, tiny.images(model)), expected)
