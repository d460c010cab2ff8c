"""What autograd does and its graph does not show: refused by name, before anything is computed.

Per-example gradients are read from the graph of the values. A gradient that takes another way is
not in there: a custom function whose backward pass runs one of its own (reentrant checkpointing), a
compiled region, whose nodes are closed, parameters of which the graph holds a copy (sharding),
hooks on a parameter. And where a layer mixes the examples, in its outputs or only in its gradients,
there is no gradient per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from poprisk.dtensor import split_of
from poprisk.per_sample.graph import Graph

COMPILED = "CompiledFunctionBackward"

TRANSPARENT = frozenset(("BackwardHookFunctionBackward", "_NoopSaveInputsBackward", COMPILED))
"""Functions of torch's own that pass on what they are given."""

NORMALIZATIONS = frozenset(
    f"{name}BatchNormBackward{i}" for name in ("Native", "Cudnn", "Miopen") for i in range(2)
)


def check_whole(
    params: Mapping[str, Tensor], lost: str = "per-example gradients of it cannot be read"
) -> None:
    """Raise ValueError for a parameter that is split between processes.

    Args:
        params: by name.
        lost: what cannot be done therefore.
    """
    for name, p in params.items():
        if what := split_of(p):
            raise ValueError(
                f"parameter {name} is {what}, with a gathered copy in its place while a batch goes "
                f"through: {lost}. Measure the model before it is sharded; train it with "
                'variance="ema" or "second-moment".'
            )


def check_unhooked(params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a hook changes what autograd gives for a parameter."""
    hooked = [name for name, p in params.items() if p._backward_hooks]
    if hooked:
        raise ValueError(
            f"there is a hook on {_listed(hooked)} (register_hook), and what it makes of a batch's "
            "gradient is not known for one example: remove it, or leave these parameters out by "
            "params=."
        )


def check_visible(graph: Graph, values: Tensor, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError where gradients of values take a way that their graph does not show.

    Args:
        graph: of the values.
        values: (b, k).
        params: asked for, by name.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        raise ValueError(
            "the values are traced by a transform of torch.func, whose graph cannot be read; call "
            "this outside of grad, vmap, jvp and the like."
        )
    for node in (*graph.nodes, *graph.others):
        _check_node(node, len(values))
    check_whole(params)


def check_reached(graph: Graph, params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a custom function may hide what a parameter does.

    Only where a parameter is not met elsewhere; whether it is unused or hidden cannot be told.
    """
    met = set(graph.owners.values())
    unmet = [name for name in params if name not in met]
    functions = [n.name() for n in (*graph.nodes, *graph.others) if _is_custom(n)]
    if unmet and functions:
        raise ValueError(
            f"no way leads from the values to {_listed(unmet)}, but {functions[0]}, a custom "
            "autograd.Function, may hide one: a backward pass that it runs itself cannot be "
            "followed. Leave these parameters out by params= if they are unused, else call the "
            "layers without the function."
        )


def _check_node(node: Node, examples: int) -> None:
    name = node.name()
    if name == COMPILED:
        raise ValueError(
            "the values come from a compiled model, whose graph is closed and can be used only "
            "once: compute them by the module that was given to torch.compile (it has the same "
            "weights), or under torch.compiler.set_stance('force_eager')."
        )
    if _is_custom(node) and ("Checkpoint" in name or any(_held(node))):
        raise ValueError(
            f"{name} runs layers again in a backward pass of its own, so the gradients of these "
            "cannot be read from the graph: use checkpoint(..., use_reentrant=False) (in "
            "transformers gradient_checkpointing_kwargs={'use_reentrant': False}), or no "
            "checkpointing."
        )
    if getattr(node, "_saved_scale_grad_by_freq", False):
        raise ValueError(
            "an embedding has scale_grad_by_freq=True, which divides the gradient of a row by how "
            "often it occurs in the batch, so that there are no per-example gradients; set it to "
            "False."
        )
    if name == "SyncBatchNormBackward" or (name in NORMALIZATIONS and _mixes(node, examples)):
        raise ValueError(
            "a batch normalization in train mode normalizes by the statistics of the batch, so "
            "that there are no per-example gradients; call model.eval() on it, or use GroupNorm "
            "or LayerNorm."
        )


def _is_custom(node: Node) -> bool:
    return isinstance(node, BackwardCFunction) and node.name() not in TRANSPARENT


def _held(node: Node) -> Iterator[Any]:
    """Functions and modules that a custom function keeps for its backward pass."""
    return (value for value in vars(node).values() if callable(value))


def _mixes(node: Any, examples: int) -> bool:
    """Whether a normalization takes its statistics over examples; instances are channels then."""
    if not getattr(node, "_saved_training", True):
        return False
    rows, channels, *rest = node._saved_input.shape
    return not (rows == 1 and channels % examples == 0 and math.prod(rest) > 1)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
