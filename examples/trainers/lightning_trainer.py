"""Lightning with the live schedule.

python examples/trainers/lightning_trainer.py --steps 4
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import esdtool
from esdtool.integrations.lightning import AlphaDecayCallback

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "stdlib-llama"


class Llama(pl.LightningModule):
    """Continue training the bundled checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        # What to copy: the schedule between the optimizer and the learning-rate scheduler, and the callback below.
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        self.alpha_decay = esdtool.AlphaDecay(self, optimizer, weight_decay=0.1, interval=2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    tokens = AutoTokenizer.from_pretrained(CHECKPOINT)(Path(__file__).read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    module = Llama()
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[AlphaDecayCallback()],
    )
    trainer.fit(module, DataLoader(rows, batch_size=2))
    decays = module.alpha_decay.last_decays.values()
    print(f"decays {min(decays):.3f} to {max(decays):.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
