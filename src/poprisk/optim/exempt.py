"""Parameter groups that leave some layers out of the gate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from poprisk._validate import check_type
from poprisk.jacobian import inner

ROUTERS = ("router", "*_router", "gate", "*_gate", "gating", "gating_*")
"""What routers and gating layers are called: of Mixtral, Qwen-MoE, DeepSeek, GPT-OSS, Switch.

A ``gate_proj`` is none of them: it is half of a SwiGLU layer, and belongs behind the gate.
"""


def exempt_groups(
    model: nn.Module,
    *,
    names: Sequence[str] | None = None,
    types: Sequence[type[nn.Module]] | None = None,
) -> list[dict[str, Any]]:
    r"""Parameter groups of a model: what is gated, and what is plain AdamW (``gate=False``).

    In a public report, adaptive computation on Sudoku, the gate held back a burst of the router's
    gradient, and nothing was learned: hence the rule. Ours; on real routers not measured.

    A parameter is exempt if a part of its dotted name (of ``layers.0.router.weight``: ``layers``,
    ``0``, ``router``, ``weight``) matches one of ``names``, or a module that holds it, however
    deep, is of one of ``types``. Every parameter is in one group, once; one that several modules
    share is exempt if it is so under one of its names.

    Args:
        model: the module; DistributedDataParallel and torch.compile are looked through.
        names: patterns as of a shell, case counts; :data:`ROUTERS` if both are left out.
        types: classes of modules, such as ``(nn.LayerNorm, nn.Embedding)``.

    Returns:
        The gated group and the exempt one, named parameters in the model's order, for
        ``PopRiskAdamW(exempt_groups(model), ...)``. Other settings can be added to either.

    Raises:
        TypeError: if ``names`` or ``types`` is not a sequence of such.
        ValueError: if a pattern or a type matches nothing, or nothing is left to be gated.

    Example:
        >>> model = nn.ModuleDict({"router": nn.Linear(4, 2), "expert": nn.Linear(4, 4)})
        >>> [[name for name, _ in group["params"]] for group in exempt_groups(model)]
        [['expert.weight', 'expert.bias'], ['router.weight', 'router.bias']]
        >>> exempt_groups(model)[1]["gate"]
        False
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    model = inner(model)
    by_rule = names is None and types is None
    patterns = ROUTERS if by_rule else _checked_names(() if names is None else names)
    kinds = _checked_types(() if types is None else types)
    known = dict(model.named_parameters())
    found = [(f"names {pattern!r}", _named(model, pattern)) for pattern in patterns]
    found += [(f"types {kind.__name__}", _held(model, kind)) for kind in kinds]
    _check_found(found, known, by_rule=by_rule)
    exempt = set().union(*(params for _, params in found))
    kept = [(name, p) for name, p in known.items() if id(p) not in exempt]
    if not kept:
        raise ValueError(
            "names and types exempt every parameter of the model: nothing is left to be gated; "
            "exempt less, or take torch.optim.AdamW."
        )
    rest = [(name, p) for name, p in known.items() if id(p) in exempt]
    return [{"params": kept}, {"params": rest, "gate": False}]


def _named(model: nn.Module, pattern: str) -> set[int]:
    """The parameters that have a part of one of their names like this."""
    every = model.named_parameters(remove_duplicate=False)
    return {id(p) for n, p in every if any(fnmatchcase(part, pattern) for part in n.split("."))}


def _held(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """The parameters in modules of a kind."""
    return {id(p) for m in model.modules() if isinstance(m, kind) for p in m.parameters()}


def _checked_names(names: Any) -> Sequence[str]:
    if isinstance(names, str) or not _all(names, lambda one: isinstance(one, str)):
        raise TypeError(
            f"names must be a sequence of patterns, as in ('router',), but got {names!r}."
        )
    return tuple(names)


def _checked_types(types: Any) -> Sequence[type[nn.Module]]:
    def is_module(one: Any) -> bool:
        return isinstance(one, type) and issubclass(one, nn.Module)

    if not _all(types, is_module):
        raise TypeError(
            f"types must be a sequence of module classes, as in (nn.LayerNorm,), but got {types!r}."
        )
    return tuple(types)


def _all(values: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, Collection) and all(map(test, values))


def _check_found(
    found: Sequence[tuple[str, set[int]]], known: Mapping[str, Tensor], *, by_rule: bool
) -> None:
    """Refuse a pattern that matches nothing; of those of the rule, all of them together."""
    empty = [what for what, params in found if not params]
    some = ", ".join([*known][:3])
    if by_rule and len(empty) == len(found):
        raise ValueError(
            f"model has no parameter under a name of routers ({', '.join(ROUTERS)}), but such as "
            f"{some or 'none'}; give names or types."
        )
    if not by_rule and (empty or not found):
        what = empty[0] if empty else "names and types"
        raise ValueError(
            f"{what} match no parameter of the model, which has such as {some or 'none'}; mend the "
            "pattern, or leave it out."
        )
