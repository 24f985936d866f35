"""`adadecay`: AdaDecay (Nakamura and Hong 2019, arXiv 1907.08931), by modules or by single weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from esdtool.assignment.rule import decay_ratios
from esdtool.train.config.section import Count
from esdtool.train.policy import DecayRecord, ModuleDecay, Policy, PolicySettings, Target


class AdaDecaySettings(PolicySettings):
    """Decays by gradient norm within each layer, new each step (Nakamura and Hong 2019)."""

    policy: Literal["adadecay"]
    """`adadecay`: per module, from gradient norms (Nakamura and Hong 2019)."""
    interval: Count = 500
    """Steps between two lines of decay.jsonl; the decays themselves are new each step."""
    adadecay_rule: Literal["module", "parameter"] = "module"
    """Scores of whole modules (the paper's comparison), or the original rule for every single weight."""

    differs_by_module: ClassVar[bool] = True

    def check(self, optimizer_name: str) -> None:
        """Refuse a rule that decays by itself, beside the optimizer, together with `cautious`."""
        super().check(optimizer_name)
        if self.cautious and self.adadecay_rule == "parameter":
            raise ValueError('weight_decay.cautious does not reach the decays of adadecay_rule = "parameter"')

    def start(self, target: Target) -> Policy:
        """Start the policy on a model and its optimizers."""
        return ParameterAdaDecay(target) if self.adadecay_rule == "parameter" else ModuleAdaDecay(self, target)


class ModuleAdaDecay:
    """AdaDecay (Nakamura and Hong 2019, arXiv 1907.08931), module-wise as AlphaDecay compares with it.

    Each step the score of a module is the 2-norm of its gradient, and the decays are
    base * 2 / (1 + exp(-4 z)), z standardised inside each transformer block.
    """

    def __init__(self, settings: AdaDecaySettings, target: Target) -> None:
        self._target = target
        self._interval = settings.interval
        self._count = 0

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        from esdtool.train.norms import gradient_norms  # and with it torch, which reading a configuration does not need

        del grad_norm
        own = self._target.own_groups()
        scores = gradient_norms([parameter for _, parameter, _ in own])
        ratios = decay_ratios(scores, assign="sigmoid", layers=[module.layer for module, _, _ in own])
        for (_, _, group), ratio in zip(own, ratios, strict=True):
            group["weight_decay"] = self._target.base_decay * ratio
        self._count += 1
        if self._count % self._interval:
            return None
        decays = {
            module.name: ModuleDecay(weight_decay=float(group["weight_decay"]), score=score)
            for (module, _, group), score in zip(own, scores, strict=True)
        }
        return DecayRecord(seconds=0.0, modules=decays)

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps. The decays are of one step only: nothing else is kept."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._count = int(state["count"])


class ParameterAdaDecay:
    """AdaDecay's original rule: a decay for every single weight.

    In each matrix z_ij = (|g_ij| - mean |g|) / (std |g| + 1e-8), and the weight decays by
    base * 2 / (1 + exp(-4 z_ij)): decoupled, w_ij (1 - lr base theta_ij), or for Adam as L2 penalty added
    to the gradient. The optimizer's own decay of these matrices is 0.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._apply()

    def _apply(self) -> None:
        for _, _, group in self._target.own_groups():
            group["weight_decay"] = 0.0

    def step(self, grad_norm: float) -> DecayRecord | None:
        """Set the decays of the next update."""
        import torch

        del grad_norm
        with torch.no_grad():
            for _, parameter, group in self._target.own_groups():
                if parameter.grad is None:
                    continue
                size = parameter.grad.abs().float()
                position = (size - size.mean()) / (size.std(correction=0) + 1e-8)
                decay = (self._target.base_decay * 2 * torch.sigmoid(4 * position)).to(parameter.dtype)
                if self._target.optimizer == "adam":
                    parameter.grad.add_(decay * parameter)
                else:
                    parameter.mul_(1 - float(group["lr"]) * decay)
        return None

    def initial(self) -> DecayRecord | None:
        """Return the record of the initial decays, if there is one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        del state
        self._apply()


POLICY = AdaDecaySettings
