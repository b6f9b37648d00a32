"""A method of one's own: keep the tokens that differ most from the average patch. python examples/own_method.py."""

import timm
import torch

import fastreduce
from fastreduce.reducers import AttentionBlock, ScheduledReducer
from fastreduce.tokens import Plan, Tokens


@fastreduce.register
class Outliers(ScheduledReducer):
    """You want to keep what stands out, without looking at attention."""

    name = "outliers"

    def __init__(self, blocks, schedule, centered: bool = True, backend: str = "auto"):
        super().__init__(blocks, schedule, backend)
        self.centered = centered

    def before(self, block: AttentionBlock, tokens: Tokens, stage: int) -> Tokens:
        """Keep the tokens that are farthest from the average, before the block."""
        keep = self.schedule.count(stage, tokens.patches)
        if keep >= tokens.num_patches:
            return tokens
        patches = tokens.x[:, tokens.prefix :].detach()  # a decision has no gradient
        scores = patches - patches.mean(1, keepdim=True) if self.centered else patches
        kept = fastreduce.ops.select_topk(scores.norm(dim=2).float(), keep, backend=tokens.backend)  # (B, keep)
        x = fastreduce.ops.gather_tokens(tokens.x, kept, prefix=tokens.prefix, backend=tokens.backend)
        return tokens.reduced(x, Plan(self.blocks[stage], tokens.num_patches, keep, kept=kept))


model = timm.create_model("deit_tiny_patch16_224").eval()  # in earnest: pretrained=True
fastreduce.patch(model, "outliers", keep_rate=0.7, centered=True)
with torch.no_grad(), fastreduce.record(model) as seen:
    model(torch.randn(2, 3, 224, 224))
print(fastreduce.reduced_counts(model), "tokens stay; the first to go in image 0:", end=" ")
print((seen.stages[0].patch_slot[0] < 0).nonzero()[0].item())
