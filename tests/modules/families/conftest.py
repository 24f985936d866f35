"""Probes of live models: what a fused projection's rows do, seen by running the model's own forward on basis vectors.

A hook puts the identity matrix in place of a projection's input: every sequence of the batch is one token, and that
token is one basis vector. What the model then calls query, key and value is, sequence by sequence, a column of the
matrices that it uses. Rotary embeddings are the identity at the first position, so they do no harm; norms between
projection and attention must be taken out by the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.modules.families.oracle import random_model

Matrices = dict[str, torch.Tensor]
Run = Callable[[int], object]
"""Runs the model on a batch of this many sequences of one token."""

_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})


class _Products(TorchFunctionMode):
    """Records the operands of matrix products (not of nn.Linear), of attention, and of the sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.attention: list[tuple[torch.Tensor, ...]] = []
        self.sigmoids: list[torch.Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _PRODUCTS:
            both = (kwargs["batch1"], kwargs["batch2"]) if "batch1" in kwargs else args[-2:]
            self.operands.append(both)
        elif name == "scaled_dot_product_attention":
            self.attention.append(tuple(args[:3]))
        elif name == "sigmoid":
            self.sigmoids.append(args[0])
        return function(*args, **kwargs)

    @property
    def query_key_value(self) -> tuple[torch.Tensor, ...]:
        """Operands of the attention: of the fused operator, or else of `query key^T` and of `weights value`.

        The fused operator may run once for each sequence.
        """
        if self.attention:
            return tuple(torch.cat(parts) for parts in zip(*self.attention, strict=True))
        return (*self.operands[0], self.operands[-1][1])


@contextmanager
def _identity_into(projections: Sequence[nn.Module]) -> Iterator[None]:
    """Every one of the projections gets the basis vectors, whatever the model has for it."""

    def replace(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (given,) = args
        return (torch.eye(given.shape[-1], dtype=given.dtype).reshape(given.shape),)

    with ExitStack() as hooks:
        for projection in projections:
            hooks.callback(projection.register_forward_pre_hook(replace).remove)
        yield


def _columns(states: torch.Tensor, count: int) -> torch.Tensor:
    """The matrix [rows, in] of which `states`, the first dimension by basis vector, has the columns.

    Heads that share a key or value may come repeated; rows that are equal to the last bit are one row.
    """
    matrix = states.detach().reshape(count, -1).T
    distinct = torch.unique(matrix, dim=0)
    return matrix if len(distinct) == len(matrix) else distinct


def _rows(projection: nn.Module) -> torch.Tensor:
    """The projection's matrix [out, in]; GPT-2's Conv1D stores its transpose."""
    weight: torch.Tensor = projection.weight.detach()
    return weight if isinstance(projection, nn.Linear) else weight.T


def _assert_whole(fused: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """The parts have the rows of the fused matrix, each exactly once."""
    rows = torch.cat(list(parts))
    assert rows.shape == fused.shape
    assert torch.equal(torch.unique(rows, dim=0), torch.unique(fused, dim=0))


@pytest.fixture
def build() -> Callable[[type[Any], Any], Any]:
    """A model of this class and configuration with random matrices, biases of zero, in evaluation."""

    return random_model


@pytest.fixture
def attention_parts() -> Callable[..., Matrices]:
    """q_proj, k_proj, v_proj (and q_gate) of an attention module, as its own forward computes them."""

    def probe(attention: nn.Module, run: Run, *projections: nn.Module, gate: bool = False) -> Matrices:
        products = _Products()
        stack = ExitStack()
        first = attention.register_forward_pre_hook(lambda *_: stack.enter_context(products) and None)
        last = attention.register_forward_hook(lambda *_: stack.close())
        length = _rows(projections[0]).shape[1]
        with stack, torch.no_grad(), _identity_into(projections):
            run(length)
        first.remove()
        last.remove()
        parts = {
            role: _columns(states, length)
            for role, states in zip(("q_proj", "k_proj", "v_proj"), products.query_key_value, strict=True)
        }
        if gate:
            (states,) = products.sigmoids
            parts["q_gate"] = _columns(states, length)
        for projection in projections:
            whole = _rows(projection)
            known = {tuple(row) for row in whole.tolist()}
            _assert_whole(whole, [part for part in parts.values() if tuple(part[0].tolist()) in known])
        return parts

    return probe


@pytest.fixture
def gate_up_parts() -> Callable[..., Matrices]:
    """gate_proj and up_proj of a gated MLP, as its own forward uses them.

    What reaches the activation function is the gate's; where that function returns ones, what reaches `down` is
    the other half.
    """

    def probe(mlp: nn.Module, fused: nn.Linear, activation: nn.Module, down: nn.Module) -> Matrices:
        seen: Matrices = {}

        def activate(_: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
            seen["gate_proj"] = args[0]
            return torch.ones_like(result)

        def arrive(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["up_proj"] = args[0]

        hooks = [activation.register_forward_hook(activate), down.register_forward_pre_hook(arrive)]
        with torch.no_grad():
            mlp(torch.eye(fused.in_features)[:, None])
        for hook in hooks:
            hook.remove()
        parts = {role: _columns(states, fused.in_features) for role, states in seen.items()}
        assert len(parts) == 2
        _assert_whole(_rows(fused), list(parts.values()))
        return parts

    return probe
