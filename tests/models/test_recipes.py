"""Recipes that people put together with a reduced model, as docs/recipes.md has it.

At keep rate 1 the patched model equals the unpatched one with the same treatment, whichever came first; at a lower one
the order makes no difference either.
"""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrize, prune

import fastreduce

AT = (1, 2)


def build():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=2, num_classes=7).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def patched(model, keep_rate, method="topk"):
    return fastreduce.patch(model, method, keep_rate=keep_rate, at=AT)


def images(batch=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def run(model):
    with torch.no_grad():
        return model(images())


def _torchao(name):
    def treat(model):
        quantization = pytest.importorskip("torchao.quantization", reason="this recipe is torchao's")
        if not hasattr(quantization, name):
            pytest.skip(f"this torchao has no {name}")
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    return treat


def _quantize_dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def _prune(model):
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1):
            prune.l1_unstructured(layer, "weight", 0.3)
    return model


class _Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def _parametrize(model):
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            parametrize.register_parametrization(layer, "weight", _Halved())
    return model


def _offload(model):
    accelerate = pytest.importorskip("accelerate", reason="this recipe is accelerate's")
    return accelerate.cpu_offload(model, torch.device("cpu"))


TREATMENTS = {
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8 weights": _torchao("Int8WeightOnlyConfig"),
    "torchao float8 weights": _torchao("Float8WeightOnlyConfig"),
    "quantize_dynamic": _quantize_dynamic,
    "prune": _prune,
    "parametrize": _parametrize,
    "offload": _offload,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["topk", "tome"])
@pytest.mark.parametrize("name", TREATMENTS)
def test_treatment_before_and_after_patching(name, method):
    treat = TREATMENTS[name]
    expected, plain = run(treat(build())), run(build())
    if name != "offload":
        assert not torch.allclose(expected, plain, rtol=1e-4, atol=1e-4)  # the treatment does something
    for model in (treat(patched(build(), 1.0, method)), patched(treat(build()), 1.0, method)):
        torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    after, before = run(treat(patched(build(), 0.6, method))), run(patched(treat(build()), 0.6, method))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("method", ["dynamicvit", "dpcknn", "sit", "patchmerger", "sinkhorn"])
def test_layers_of_a_method_on_an_offloaded_model(method):
    """Its blocks hold empty weights: the layers go where the blocks run, with their values."""
    accelerate = pytest.importorskip("accelerate", reason="this recipe is accelerate's")

    def run_patched(model):
        torch.manual_seed(4)
        return run(patched(model, 0.6, method))

    expected = run_patched(build())
    offloaded = accelerate.cpu_offload(build(), torch.device("cpu"))
    torch.testing.assert_close(run_patched(offloaded), expected)
    assert {weight.device.type for weight in offloaded.reducers.parameters()} == {"cpu"}
    meta = patched(build().to("meta"), 0.6, method)
    assert {weight.device.type for weight in meta.reducers.parameters()} == {"meta"}


def test_lora_before_and_after_merged_and_not():
    peft = pytest.importorskip("peft", reason="this recipe is peft's")

    def adapted(model):
        torch.manual_seed(3)
        options = peft.LoraConfig(r=4, target_modules=["qkv", "proj"], init_lora_weights=False)
        return peft.get_peft_model(model, options).eval()

    after, before = adapted(patched(build(), 0.6)), adapted(build())
    patched(before.base_model.model, 0.6)
    expected = run(after)
    torch.testing.assert_close(run(before), expected)
    assert not torch.allclose(expected, run(patched(build(), 0.6)), atol=1e-2)
    for model in (after, before):
        torch.testing.assert_close(run(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    unreduced = adapted(build())
    expected = run(unreduced)
    patched(unreduced.base_model.model, 1.0)
    torch.testing.assert_close(run(unreduced), expected)


def _torch_average(model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average, lambda: average.update_parameters(model)


def _timm_average(model):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model, decay=0.5)
    return average.module, lambda: average.update(model)


def _averaged(make, model):
    """Average a model with itself, and then with weights that are all 0.1 higher."""
    average, update = make(model)
    update()
    torch.testing.assert_close(run(average), run(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    update()
    return average


@pytest.mark.parametrize("make", [_torch_average, _timm_average])
def test_moving_average(make):
    model = patched(build(), 0.6)
    average = _averaged(make, model)
    halfway = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halfway.parameters():
            parameter.sub_(0.05)
    torch.testing.assert_close(run(average), run(halfway), rtol=1e-4, atol=1e-4)
    whole, unpatched = _averaged(make, patched(build(), 1.0)), _averaged(make, build())
    torch.testing.assert_close(run(whole), run(unpatched), rtol=1e-5, atol=1e-5)


def _join(folder, rank=0, processes=1):
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)


@pytest.fixture
def gloo():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


@pytest.fixture
def group(gloo, tmp_path):
    _join(tmp_path)
    yield
    torch.distributed.destroy_process_group()


def _distributed(model, kind, processes=1):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (processes,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _gradients(model, batch):
    model.train()
    model(batch).square().mean().backward()
    full = (parameter.grad for parameter in model.parameters())
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in full]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep_rate", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distributed(group, kind, keep_rate):
    expected = _gradients(build() if keep_rate == 1 else patched(build(), keep_rate), images())
    found = _gradients(_distributed(patched(build(), keep_rate), kind), images())
    torch.testing.assert_close(found, expected)


def _half_of_the_batch(rank, folder, kind):
    """Run one of two processes; the first one leaves the gradients behind."""
    torch.set_num_threads(1)
    _join(folder, rank, 2)
    found = _gradients(_distributed(patched(build(), 0.6), kind, 2), images().chunk(2)[rank])
    if not rank:
        torch.save(found, f"{folder}/gradients")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_share_a_batch(gloo, tmp_path, kind):
    torch.multiprocessing.spawn(_half_of_the_batch, (str(tmp_path), kind), nprocs=2)
    expected = _gradients(patched(build(), 0.6), images())
    torch.testing.assert_close(torch.load(tmp_path / "gradients"), expected, rtol=1e-4, atol=1e-6)
