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
    from timm.utils import ModelEmaV2

    average = ModelEmaV2(model, decay=0.5)
    return average.module, lambda: average.update(model)


@pytest.mark.parametrize("make", [_torch_average, _timm_average])
def test_moving_average(make):
    model = patched(build(), 0.6)
    average, update = make(model)
    update()
    torch.testing.assert_close(run(average), run(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    update()
    halfway = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halfway.parameters():
            parameter.sub_(0.05)
    torch.testing.assert_close(run(average), run(halfway), rtol=1e-4, atol=1e-4)


@pytest.fixture
def group(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _gradients(model):
    model.train()
    model(images()).square().mean().backward()
    full = (parameter.grad for parameter in model.parameters())
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in full]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_distributed(group, kind):
    expected = _gradients(patched(build(), 0.6))
    model = patched(build(), 0.6)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    torch.testing.assert_close(_gradients(model), expected)
