"""Plain PyTorch with a static wd.json.

python examples/trainers/plain_pytorch.py wd.json --steps 3
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import esdtool

parser = argparse.ArgumentParser()
parser.add_argument("assignment", help="made by esdtool assign --out")
parser.add_argument("--steps", type=int, default=3)
arguments = parser.parse_args()

checkpoint = Path(__file__).parents[1] / "checkpoints" / "stdlib-llama"
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
text = Path(__file__).read_text()
tokens = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids[:, :256]

# What to copy: groups for any torch optimizer. Parameters with equal decays share a group.
assignment = esdtool.load_assignment(arguments.assignment)
optimizer = torch.optim.AdamW(esdtool.param_groups(model, assignment), lr=1e-4)

for step in range(arguments.steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, {len(optimizer.param_groups)} groups")
