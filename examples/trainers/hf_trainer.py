"""Hugging Face Trainer with the live schedule, or with a static wd.json.

python examples/trainers/hf_trainer.py --steps 4 [--assignment wd.json]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from esdtool.integrations.transformers import use_alpha_decay, use_assignment

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--assignment", help="a wd.json instead of the live schedule")
arguments = parser.parse_args()

checkpoint = Path(__file__).parents[1] / "checkpoints" / "stdlib-llama"
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
tokens = AutoTokenizer.from_pretrained(checkpoint)(Path(__file__).read_text()).input_ids
rows = [tokens[start : start + 64] for start in range(0, len(tokens) - 64, 64)]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)

# What to copy: before trainer.train(). The base decay is TrainingArguments.weight_decay.
if arguments.assignment:
    use_assignment(trainer, arguments.assignment)
else:
    use_alpha_decay(trainer, interval=2)

trainer.train()
print(f"{len({group['weight_decay'] for group in trainer.optimizer.param_groups})} different decays")
