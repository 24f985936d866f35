"""nanoGPT's configure_optimizers, extended: matrices decay, each by its own amount, and vectors do not.

python examples/trainers/nanogpt_style.py wd.json
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import esdtool


def configure_optimizers(model, assignment, weight_decay, learning_rate, betas):
    """Follow nanoGPT's model.py: parameters that are not in the file decay if they have two dimensions."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = esdtool.param_groups(model, assignment, base=weight_decay)
    listed = {id(parameter) for group in groups if "weight_decay" in group for parameter in group["params"]}
    rest = [parameter for parameter in trained.values() if id(parameter) not in listed]
    groups = [group for group in groups if "weight_decay" in group]
    groups.append({"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay})
    groups.append({"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


model = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[1] / "checkpoints" / "stdlib-llama")
assignment = esdtool.load_assignment(sys.argv[1])
optimizer = configure_optimizers(model, assignment, weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95))
count = sum(len(group["params"]) for group in optimizer.param_groups)
assert count == len(list(model.parameters()))
print(f"{count} parameters in {len(optimizer.param_groups)} groups")
