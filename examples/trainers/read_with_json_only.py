"""Any trainer, without esdtool: read wd.json with nothing but json and torch.

python examples/trainers/read_with_json_only.py wd.json
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[1] / "checkpoints" / "stdlib-llama")

# What to copy.
entries = json.loads(Path(sys.argv[1]).read_text())["parameters"]
groups = [
    {"params": [parameter], "weight_decay": entries[name]["weight_decay"] if name in entries else 0.0}
    for name, parameter in model.named_parameters()
]
optimizer = torch.optim.AdamW(groups, lr=1e-3)

print(f"{len(entries)} decays in {len(optimizer.param_groups)} groups")
