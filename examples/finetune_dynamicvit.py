"""Fine-tune DynamicViT with its losses, on scikit-learn's digits: python examples/finetune_dynamicvit.py."""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastreduce

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()
torch.manual_seed(0)
size = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 10}
teacher = timm.create_model("vit_tiny_patch16_224", **size).eval()  # in earnest: a trained model
student = timm.create_model("vit_tiny_patch16_224", **size)
student.load_state_dict(teacher.state_dict())
fastreduce.patch(student, "dynamicvit", keep_rate=0.7)

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), 32).repeat(1, 3, 1, 1)
labels = torch.tensor(digits.target)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student.train()
for _ in range(options.steps):
    batch = torch.randint(len(images), (16,))
    with fastreduce.record(student) as seen:
        features = student.forward_features(images[batch])
    with torch.no_grad():
        wanted = teacher.forward_features(images[batch])
    logits, aims = student.forward_head(features), teacher.forward_head(wanted)
    distilled = {"logits": logits, "teacher_logits": aims, "tokens": features[:, 1:], "teacher_tokens": wanted[:, 1:]}
    loss = fastreduce.dynamicvit_loss(F.cross_entropy(logits, labels[batch]), seen.decisions, 0.7, **distilled)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}, kept {[round(kept.mean().item(), 2) for kept in seen.decisions]} of the patches")
