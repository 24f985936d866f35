"""torchtitan: an optimizer container with one optimizer per model part, and a hook before each step.

python examples/trainers/torchtitan_style.py

torchtitan itself is not imported: `OptimizersContainer` below has the two features that matter, iteration over
optimizers and `register_step_pre_hook`. In torchtitan, take the container that its trainer has built.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import esdtool


class OptimizersContainer(torch.optim.Optimizer):
    """Replaces torchtitan's container: steps all optimizers as one."""

    def __init__(self, parts: list[torch.nn.Module], **options: float) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), **options) for part in parts]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        super().__init__(parameters, options)

    def __iter__(self):
        return iter(self.optimizers)

    def step(self, closure=None):  # noqa: ARG002
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


model = AutoModelForCausalLM.from_pretrained(
    Path(__file__).parents[1] / "checkpoints" / "stdlib-llama", dtype=torch.float32
)
container = OptimizersContainer([model], lr=1e-4, weight_decay=0.1)

# What to copy: before the learning-rate schedulers are built.
alpha_decay = esdtool.AlphaDecay(model, list(container), weight_decay=0.1, interval=2)
container.register_step_pre_hook(lambda *_: alpha_decay.step())

tokens = torch.arange(64).view(1, -1)
for _ in range(4):
    model(input_ids=tokens, labels=tokens).loss.backward()
    container.step()
    container.zero_grad()
print(f"{alpha_decay.update_step} updates, {len(set(alpha_decay.last_decays.values()))} different decays")
