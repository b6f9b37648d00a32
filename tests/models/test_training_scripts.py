"""Training scripts: lines of docs/recipes.md run as they stand, then go on as timm's and Lightning's scripts do."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import timm.loss
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

import fastreduce

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def build(*_, num_classes=5, **options):
    """Return a small model, whatever ``create_model`` is called with."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2, **options}
    return VisionTransformer(num_classes=num_classes, **options)


def run_lines(words, method, **names):
    """Run the lines of the page that hold ``words``, for one method, with these names -> all names afterwards."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (lines,) = (block for block in blocks if words in block)
    assert '"topk"' in lines
    exec(compile(lines.replace('"topk"', repr(method)), PAGE.name, "exec"), names)
    return names


def loader():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % 5), batch_size=4)


def moved(model, before):
    """Return the names of parameters that are no longer as they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("method", ["topk", "patchmerger"])
def test_the_lines_in_timms_train(method, tmp_path):
    """Go on as ``train.py`` does: layer decay, averages, clipping, checkpoints, resuming."""
    model = run_lines("create_model(...)", method, create_model=build)["model"]
    assert fastreduce.is_patched(model)
    model.set_grad_checkpointing(enable=True)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert taken == {id(parameter) for parameter in model.parameters()}
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    mixup = timm.data.Mixup(mixup_alpha=0.8, num_classes=5)
    options = argparse.Namespace(model="vit")
    saver = timm.utils.CheckpointSaver(model, optimizer, options, average, checkpoint_dir=str(tmp_path))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    for step, (images, labels) in enumerate(loader(), 1):
        mixed, targets = mixup(images.clone(), labels)
        timm.loss.SoftTargetCrossEntropy()(model(mixed), targets).backward()
        timm.utils.dispatch_clip_grad(timm.models.model_parameters(model), value=1.0, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
    assert moved(model, before) == set(before)
    saver.save_checkpoint(0, metric=1.0)
    resumed = run_lines("create_model(...)", method, create_model=build)["model"]
    timm.models.resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), log_info=False)
    images = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(resumed.eval()(images), model.eval()(images))
        averaged = average.module.eval()(images)
    assert averaged.shape == (4, 5)
    assert not torch.equal(averaged, model(images))


@pytest.mark.slow  # importing Lightning takes longer than all that it does here
@pytest.mark.filterwarnings("ignore")
def test_the_module_in_lightning(monkeypatch, tmp_path):
    lightning = pytest.importorskip("lightning", reason="this recipe is Lightning's")
    monkeypatch.setattr(timm, "create_model", build)
    recipe = run_lines("LightningModule", "patchmerger", lightning=lightning, timm=timm, fastreduce=fastreduce)

    class Trained(recipe["Classifier"]):
        def training_step(self, batch, number):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Trained()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, loader())
    assert moved(module, before) == set(before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Trained.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu").eval()
    images = next(iter(loader()))[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(images), module.eval().model(images))
