"""Parameter groups that leave routers and other layers out of the gate."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import poprisk
from poprisk.optim.exempt import exempt_groups

LAYERS = ("gate_proj", "up_proj")


class Expert(nn.ModuleDict):
    """Two layers multiplied, as in SwiGLU."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self["gate_proj"](h).relu() * self["up_proj"](h)


class Mixture(nn.Module):
    """Two SwiGLU experts behind a router, with tied embeddings and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.router = nn.Linear(4, 2)
        self.shared_expert_gate = nn.Linear(4, 1, bias=False)
        self.experts = nn.ModuleList(Expert({a: nn.Linear(4, 4) for a in LAYERS}) for _ in range(2))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embed(x))
        weights = self.router(h).softmax(-1) * self.shared_expert_gate(h).sigmoid()
        parts = [expert(h) for expert in self.experts]
        return self.head((weights.unsqueeze(-1) * torch.stack(parts, -2)).sum(-2))


def exempt_names(groups: list[dict[str, Any]]) -> set[str]:
    return {name for name, _ in groups[1]["params"]}


def experts(*layers: str) -> set[str]:
    return {f"experts.{i}.{a}.{n}" for i in (0, 1) for a in layers for n in ("weight", "bias")}


ROUTING = {"router.weight", "router.bias", "shared_expert_gate.weight"}


def test_the_rule_exempts_routers_and_no_half_of_a_swiglu() -> None:
    assert exempt_names(exempt_groups(Mixture())) == ROUTING


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"names": ("router",)}, {"router.weight", "router.bias"}),
        ({"names": ("ROUTER", "router")}, None),
        ({"names": ("up_*",)}, experts("up_proj")),
        ({"types": (nn.LayerNorm,)}, {"norm.weight", "norm.bias"}),
        ({"types": [nn.ModuleDict], "names": ["norm"]},
         {"norm.weight", "norm.bias"} | experts("gate_proj", "up_proj")),
        ({"types": (nn.Embedding,)}, {"embed.weight"}),
        ({"names": ("head",)}, {"embed.weight"}),
    ],
)  # fmt: skip
def test_names_and_types_choose(given: Mapping[str, Any], expected: set[str] | None) -> None:
    """A name that matches nothing is refused; a tied weight is exempt under each of its names."""
    if expected is None:
        with pytest.raises(ValueError, match="names 'ROUTER' match no parameter"):
            exempt_groups(Mixture(), **given)
        return
    assert exempt_names(exempt_groups(Mixture(), **given)) == expected


@pytest.mark.parametrize("given", [{}, {"types": (nn.Embedding,)}, {"names": ("*bias",)}])
def test_every_parameter_is_in_one_group_once(given: Mapping[str, Any]) -> None:
    model = Mixture()
    groups = exempt_groups(model, **given)
    held = [id(p) for _, p in itertools.chain(*(group["params"] for group in groups))]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    order = [name for name, _ in model.named_parameters()]
    for group in groups:
        names = [name for name, _ in group["params"]]
        assert names == [name for name in order if name in names]


def test_wrappers_are_looked_through() -> None:
    model = Mixture()
    assert exempt_names(exempt_groups(nn.DataParallel(model))) == ROUTING


def test_the_exempt_group_is_plain_adamw_and_the_other_is_gated() -> None:
    torch.manual_seed(0)
    models = [Mixture() for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    ours, gated, plain = models
    sizes = {"batch_size": 16, "dataset_size": 64}
    optimizer = poprisk.PopRiskAdamW(exempt_groups(ours), **sizes)
    optimizers: list[torch.optim.Optimizer] = [
        optimizer,
        poprisk.PopRiskAdamW(gated, **sizes),
        torch.optim.AdamW(plain.parameters()),
    ]
    grads = [[torch.randn_like(p) for p in ours.parameters()] for _ in range(5)]
    for step in grads:
        for model, one in zip(models, optimizers, strict=True):
            for p, g in zip(model.parameters(), step, strict=True):
                p.grad = g.clone()
            one.step()
    for (name, p), q, w in zip(
        ours.named_parameters(), gated.parameters(), plain.parameters(), strict=True
    ):
        assert torch.equal(p, w if name in ROUTING else q)
        assert not torch.equal(q, w)
    assert {"router", "shared_expert_gate"}.isdisjoint(optimizer.gate_stats())
    assert "norm" in optimizer.gate_stats()


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"model": nn.Linear(2, 2)}, ValueError, "no parameter under a name of routers (router,"),
        ({"model": nn.ReLU()}, ValueError, "such as none"),
        ({"model": [1]}, TypeError, "model must be a torch.nn.Module, but got list"),
        ({"names": "router"}, TypeError, "names must be a sequence of patterns"),
        ({"names": ""}, TypeError, "names must be a sequence of patterns"),
        ({"names": [nn.Linear]}, TypeError, "names must be a sequence of patterns"),
        ({"names": iter(("router",))}, TypeError, "names must be a sequence of patterns"),
        ({"types": nn.LayerNorm}, TypeError, "types must be a sequence of module classes"),
        ({"types": ("norm",)}, TypeError, "types must be a sequence of module classes"),
        ({"types": (nn.Conv2d,)}, ValueError, "types Conv2d match no parameter of the model"),
        ({"names": (), "types": ()}, ValueError, "names and types match no parameter"),
        ({"names": ("*",)}, ValueError, "exempt every parameter of the model"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, error: type[Exception], told: str) -> None:
    given = dict(given)
    with pytest.raises(error, match=re.escape(told)) as caught:
        exempt_groups(given.pop("model", None) or Mixture(), **given)
    assert len(str(caught.value).splitlines()) == 1


ROUTED = {
    "Mixtral": ({"num_local_experts": 4}, {"mlp.gate"}),
    "Qwen2Moe": (
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
        {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "GptOss": ({"num_local_experts": 4, "head_dim": 8}, {"mlp.router"}),
}


@pytest.mark.parametrize("name", ROUTED)
def test_routers_of_transformers_are_found(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    more, expected = ROUTED[name]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    found = {n.rpartition(".")[0] for n in exempt_names(exempt_groups(model))}
    assert found == {f"model.layers.{i}.{part}" for i in (0, 1) for part in expected}
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = poprisk.PopRiskAdamW(exempt_groups(model), batch_size=4, dataset_size=16)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    routers = exempt_names(exempt_groups(model))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in routers)


def test_one_gate_for_all_groups_refuses_exempt_ones() -> None:
    groups = exempt_groups(Mixture())
    with pytest.raises(ValueError, match="but one has gate=False"):
        poprisk.gated(torch.optim.SGD(groups, lr=0.1))
    optimizer = poprisk.gated(torch.optim.SGD(groups[:1], lr=0.1))
    with pytest.raises(ValueError, match="but one has gate=False"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1
