"""Plain PyTorch with the live schedule: alphas of the current weights set the decays every few updates.

python examples/trainers/plain_pytorch_live.py --steps 6
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import esdtool

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--interval", type=int, default=3, help="500 in the paper")
arguments = parser.parse_args()

checkpoint = Path(__file__).parents[1] / "checkpoints" / "stdlib-llama"
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
tokens = AutoTokenizer.from_pretrained(checkpoint)(Path(__file__).read_text(), return_tensors="pt").input_ids[:, :256]

# What to copy: AlphaDecay after the optimizer and before any learning-rate scheduler, which counts groups.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
alpha_decay = esdtool.AlphaDecay(model, optimizer, weight_decay=0.1, interval=arguments.interval)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)

for step in range(arguments.steps):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    alpha_decay.step()  # once per update, before the optimizer
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    decays = alpha_decay.last_decays.values()
    print(f"step {step}: loss {loss.item():.3f}, decays {min(decays):.3f} to {max(decays):.3f}")

# To resume, save and load all three: model, optimizer, schedule (and the learning-rate scheduler).
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "alpha_decay": alpha_decay.state_dict()}
print(f"state holds {', '.join(state)}")
