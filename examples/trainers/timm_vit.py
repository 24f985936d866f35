"""timm: a small ViT on scikit-learn's digits with the live schedule (the paper's vision case), then a static file.

python examples/trainers/timm_vit.py --steps 200
"""

import argparse
import sys

import torch

import esdtool

try:
    import timm
    from sklearn.datasets import load_digits
    from timm.optim import create_optimizer_v2
except (ImportError, RuntimeError) as error:
    sys.exit(f"this example needs timm, a torchvision that fits your torch, and scikit-learn: {error}")

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
arguments = parser.parse_args()

torch.manual_seed(0)
model = timm.models.VisionTransformer(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4
)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(labels)

# What to copy, live: timm's own groups (no decay for norms and biases) are the bases.
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
alpha_decay = esdtool.AlphaDecay(model, optimizer, weight_decay=None, interval=10)
for _ in range(arguments.steps):
    batch = torch.randint(len(images), (64,))
    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    alpha_decay.step()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
print(f"accuracy {accuracy:.3f} on the training images, {len(alpha_decay.last_decays)} modules have their own decay")

# What to copy, static: param_group_fn.
assignment = alpha_decay.assignment()
optimizer = create_optimizer_v2(
    model, opt="adamw", lr=1e-3, param_group_fn=lambda model: esdtool.param_groups(model, assignment)
)
print(f"{len(optimizer.param_groups)} groups")
