"""Models that tests of per-example gradients run over.

Each gives values (b, k), of which row i depends on example i alone, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    """A model and inputs for it.

    Attributes:
        model: makes the module; its parameters that require a gradient are differentiated.
        inputs: b → the arguments of one call with b examples.
        fallback: operations without factored form that it contains.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    fallback: Sequence[str] = ()


class Function(nn.Module):
    """A forward function of named submodules, parameters and inputs."""

    def __init__(self, forward: Callable[[Any, Any], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function with this module first."""
        return self.function(self, *inputs)


def param(*shape: int, scale: float = 1.0, **options: Any) -> nn.Parameter:
    """A parameter with Gaussian entries."""
    return nn.Parameter(scale * torch.randn(shape, dtype=options.get("dtype", torch.float64)))


def gaussian(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs (b, *shape)."""
    return lambda b: (torch.randn(b, *shape, dtype=torch.float64),)


def time_major(steps: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs (steps, b, *shape)."""
    return lambda b: (torch.randn(steps, b, *shape, dtype=torch.float64),)


def tokens(steps: int, size: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Integers (b, steps) below ``size``."""
    return lambda b: (torch.randint(size, (b, steps)),)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False), nn.GELU(), nn.Linear(5, 3)
    )


def residual_mlp() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for norm, layer in zip(m.norms, m.layers, strict=True):
            x = x + torch.tanh(layer(norm(x)))
        return x

    return Function(
        forward,
        norms=nn.ModuleList([nn.LayerNorm(6) if i % 2 else nn.RMSNorm(6) for i in range(8)]),
        layers=nn.ModuleList([nn.Linear(6, 6) for _ in range(8)]),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def residual_cnn() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.conv2(F.relu(m.norm2(m.conv1(F.relu(m.norm1(x))))))
        return m.head(F.adaptive_avg_pool2d(m.skip(x), 1).flatten(1))

    return Function(
        forward,
        stem=nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm1=nn.GroupNorm(2, 4), conv1=nn.Conv2d(4, 4, 3, padding=1),
        norm2=nn.GroupNorm(4, 4), conv2=nn.Conv2d(4, 4, 3, padding=1),
        skip=nn.Conv2d(4, 6, 1, stride=2), head=nn.Linear(6, 3),
    )  # fmt: skip


def convolutions_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=4, padding="same", padding_mode="circular"), nn.Tanh(),
        nn.Conv1d(8, 8, 4, groups=8, dilation=2, padding="same"), nn.Tanh(),
        nn.Conv1d(8, 3, 3, stride=2, padding=2, dilation=3, padding_mode="reflect"), nn.Flatten(),
    )  # fmt: skip


def convolutions_2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), groups=2, stride=(2, 1), padding=(1, 0)), nn.Tanh(),
        nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(1, 2), padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, stride=2, padding=1, bias=False), nn.Flatten(),
    )  # fmt: skip


def convolutions_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, groups=2, padding=1), nn.Tanh(),
        nn.Conv3d(4, 2, (1, 2, 3), stride=(1, 2, 1), dilation=(1, 1, 2), padding=(0, 1, 2)),
        nn.Flatten(2), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
    )  # fmt: skip


def batch_norm() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    norms: Any = (model[1], model[5])
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    return model.eval()


def vit(*, batch_first: bool) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).mT
        x = torch.cat([m.cls.expand(len(x), 1, 4), x], dim=1) + m.position
        x = m.block(x if batch_first else x.transpose(0, 1))
        return m.head(x[:, 0] if batch_first else x[0])

    def make() -> nn.Module:
        block = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, batch_first=batch_first, norm_first=batch_first
        )
        return Function(
            forward, patch=nn.Conv2d(2, 4, 2, stride=2), cls=param(1, 1, 4),
            position=param(1, 5, 4), block=block, head=nn.Linear(4, 3),
        )  # fmt: skip

    return make


def transformer() -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = m.embedding(ids) + m.position[:t]
        q, k, v = m.qkv(m.norm1(x)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + m.out(a.transpose(1, 2).reshape(b, t, 8))
        x = x + m.down(F.silu(m.up(m.norm2(x))))
        logits = F.linear(x, m.embedding.weight)[:, :-1]
        return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1, keepdim=True)

    return Function(
        forward, embedding=nn.Embedding(7, 8), position=param(6, 8),
        norm1=nn.LayerNorm(8), norm2=nn.RMSNorm(8), qkv=nn.Linear(8, 24, bias=False),
        out=nn.Linear(8, 8), up=nn.Linear(8, 16), down=nn.Linear(16, 8),
    )  # fmt: skip


def attention(*, batch_first: bool, cross: bool) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        memory = m.memory(x[:, 1:] if batch_first else x[1:]) if cross else x
        out, _ = m.attention(x, memory, memory, need_weights=not cross)
        return out.mean(1 if batch_first else 0)

    return lambda: Function(
        forward,
        attention=nn.MultiheadAttention(4, 2, batch_first=batch_first),
        memory=nn.Linear(4, 4) if cross else None,
    )


def recurrent(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, _ = m.rnn(x)
        return m.head(out[:, -1] if m.rnn.batch_first else out[-1])

    width = 6 if options.get("bidirectional") else 3
    return lambda: Function(forward, rnn=kind(4, 3, **options), head=nn.Linear(width, 2))


def siren() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return m.layers[-1](x)

    sizes = [2, 6, 6, 2]
    return Function(forward, layers=nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:])))


def frozen() -> nn.Module:
    model: Any = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid(), layer)


def low_rank() -> nn.Module:
    return Function(
        lambda m, x: torch.tanh(m.base(x) + x @ (m.down @ m.up) * 0.5) @ m.scale.exp().diag(),
        base=nn.Linear(6, 4).requires_grad_(False),
        down=param(6, 2), up=param(2, 4), scale=param(4),
    )  # fmt: skip


def bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean"), nn.Linear(4, 3))


class Scale(torch.autograd.Function):
    """x·w, with two outputs and a setting."""

    @staticmethod
    def forward(*args: Any, **_: Any) -> tuple[Tensor, Tensor]:
        ctx, x, power, w = args
        ctx.save_for_backward(x, w)
        ctx.power = power
        return x * w**power, x + w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        x, w = ctx.saved_tensors
        g, h = grads
        dw = g * x * ctx.power * w ** (ctx.power - 1) + h
        return g * w**ctx.power + h, None, dw.sum(0)


def custom() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = Scale.apply(x, 2, m.w)
        y, z = Scale.apply(y * z, 3, m.w)
        return y + z

    return Function(forward, w=param(4))


def complex_layers() -> nn.Module:
    return Function(
        lambda m, x: (((x + 0j) @ m.w + m.b) * m.w.sum()).abs(),
        w=param(6, 4, dtype=torch.complex128), b=param(4, dtype=torch.complex128),
    )  # fmt: skip


def routed(m: Any, x: Tensor) -> Tensor:
    """Half of the examples, in another order, go through an expert."""
    h = torch.tanh(m.first(x))
    chosen = h[:, 0].argsort()[: len(x) // 2 + 1]
    return h.index_add(0, chosen, torch.tanh(m.expert(h[chosen])))


def shuffled(m: Any, x: Tensor) -> Tensor:
    """All examples sorted, transformed, and put back."""
    h = torch.tanh(m.first(x))
    order = h[:, 0].argsort()
    return torch.tanh(m.expert(h[order]))[order.argsort()]


def last_step(m: Any, x: Tensor) -> Tensor:
    """The last valid step of every sequence, of (steps, b, features)."""
    ends = (x[:, :, 0].sum(0) * 1000).long() % len(x)
    return m.expert(torch.tanh(m.first(x))[ends, torch.arange(x.shape[1])])


def two_layers(forward: Callable[[Any, Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Function(forward, first=nn.Linear(4, 4), expert=nn.Linear(4, 4))


def heads(m: Any, x: Tensor) -> Tensor:
    per_head = torch.einsum("btc,hcd->bhtd", x, m.w)
    return torch.einsum("bhtd,hdo->bo", torch.tanh(per_head), m.out)


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = (x[:, :, 0] > 0).sum(1).clamp(min=1)
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    _, h = m.rnn(sequence)
    return h[-1]


def positions_as_examples(m: Any, x: Tensor) -> Tensor:
    """(b, t, c) flattened to (b·t, c), and (t, b, c) flattened to (t·b, c)."""
    b, t, c = x.shape
    h = torch.tanh(m.first(x.reshape(b * t, c))).reshape(b, t, -1).transpose(0, 1)
    return torch.tanh(m.expert(h.reshape(t * b, -1))).reshape(t, b, -1).sum(0)


def mixture(m: Any, x: Tensor) -> Tensor:
    """Every position to the best of its experts, weighted; some experts see nothing."""
    scores = m.router(x).softmax(-1)
    weight, best = scores.max(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        places = (best == e).nonzero(as_tuple=True)
        if len(places[0]):
            out = out.index_put(places, expert(x[places]) * weight[places][:, None])
    return m.head(x + out).mean(1)


def decoder(m: Any, x: Tensor) -> Tensor:
    """An autoencoder whose decoder is the transposed encoder."""
    code = F.linear(x, m.encoder.weight, m.encoder.bias).tanh()
    return F.linear(code, m.encoder.weight.T, m.bias)


def gated_units(m: Any, x: Tensor) -> Tensor:
    return m.down(F.glu(m.up(x), dim=-1)).mean(1)


def einsums(m: Any, x: Tensor) -> Tensor:
    """Contractions over positions, features and a low rank, of which one without a batch."""
    core = torch.einsum("ir,rjk->ijk", m.left, m.core)
    return torch.einsum("bti,ijk,bsj->bk", x, core, x.sin())


def masked_attention(m: Any, x: Tensor) -> Tensor:
    """Causal, of one query head more than heads of keys."""
    q, k, v = m.q(x), m.k(x), m.v(x)
    q = q.unflatten(2, (2, 4)).transpose(1, 2)
    k, v = (t.unflatten(2, (1, 4)).transpose(1, 2).expand(-1, 2, -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(out.transpose(1, 2).flatten(2)).square().mean(1)


def upscaled(m: Any, x: Tensor) -> Tensor:
    return m.head(m.shuffle(m.convolution(x)).tanh()).flatten(1)


def weighted_bag(m: Any, ids: Tensor) -> Tensor:
    weights = torch.cos(ids.double())
    return m.head(m.bag(ids, per_sample_weights=weights).tanh())


def recurrence(m: Any, x: Tensor) -> Tensor:
    """A linear state space by a scan, with complex rates."""
    rates = torch.exp(torch.complex(-m.decay.exp(), m.phase))
    state = torch.zeros(len(x), 3, dtype=torch.complex128)
    for step in x.unbind(1):
        state = state * rates + F.linear(step + 0j, m.into)
    return m.head(torch.view_as_real(state).flatten(1))


def hypernetwork(m: Any, x: Tensor) -> Tensor:
    """Weights of a layer that another network makes of each example."""
    weight = m.maker(x).unflatten(1, (3, 4))
    return (weight @ x.unsqueeze(2)).squeeze(2) + m.bias


def differentiated(m: Any, x: Tensor) -> Tensor:
    """Energy and force of each example."""
    x = x.clone().requires_grad_()
    energy = m.net(x)
    (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return torch.cat([energy, force], dim=1)


ZOO: Mapping[str, Case] = {
    "MLP": Case(mlp, gaussian(6)),
    "MLP on positions": Case(lambda: nn.Sequential(mlp(), nn.Flatten()), gaussian(2, 6)),
    "deep residual MLP": Case(residual_mlp, gaussian(6)),
    "LeNet": Case(lenet, gaussian(1, 9, 9)),
    "residual CNN": Case(residual_cnn, gaussian(2, 6, 6)),
    "Conv1d": Case(convolutions_1d, gaussian(4, 7)),
    "Conv2d": Case(convolutions_2d, gaussian(2, 5, 5)),
    "Conv3d": Case(convolutions_3d, gaussian(2, 3, 3, 4)),
    "BatchNorm in eval mode": Case(batch_norm, gaussian(2, 3, 3)),
    "ViT": Case(vit(batch_first=True), gaussian(2, 4, 4)),
    "ViT, time first": Case(vit(batch_first=False), gaussian(2, 4, 4)),
    "causal transformer, tied": Case(transformer, tokens(6, 7)),
    "self-attention": Case(attention(batch_first=True, cross=False), gaussian(4, 4)),
    "self-attention, time first": Case(attention(batch_first=False, cross=False), time_major(4, 4)),
    "cross-attention": Case(attention(batch_first=True, cross=True), gaussian(5, 4)),
    "cross-attention, time first": Case(attention(batch_first=False, cross=True), time_major(5, 4)),
    "RNN": Case(recurrent(nn.RNN, batch_first=True), gaussian(4, 4)),
    "RNN, time first": Case(recurrent(nn.RNN, num_layers=2), time_major(4, 4)),
    "LSTM": Case(recurrent(nn.LSTM, batch_first=True), gaussian(3, 4)),
    "LSTM, time first": Case(recurrent(nn.LSTM), time_major(4, 4)),
    "GRU": Case(recurrent(nn.GRU, batch_first=True, bidirectional=True), gaussian(4, 4)),
    "GRU, time first": Case(recurrent(nn.GRU), time_major(4, 4)),
    "packed sequences": Case(
        lambda: Function(packed, rnn=nn.GRU(4, 3)), gaussian(4, 4), ("IndexSelectBackward0",)
    ),
    "SIREN": Case(siren, gaussian(2)),
    "parameter used twice": Case(
        lambda: Function(
            lambda m, x: torch.tanh(torch.tanh(x @ m.w) @ m.w.T) @ m.w + x.sin() @ m.w.view(4, 6).T,
            w=param(6, 4),
        ),
        gaussian(6),
    ),
    "frozen parameters": Case(frozen, gaussian(6)),
    "shared modules": Case(shared, gaussian(6)),
    "weight_norm": Case(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2)
        ),
        gaussian(6),
    ),
    "spectral_norm": Case(
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Conv1d(4, 2, 2)), nn.Flatten()
        ).eval(),
        gaussian(4, 2),
    ),
    "low-rank update": Case(low_rank, gaussian(6)),
    "low-rank embedding": Case(
        lambda: Function(
            lambda m, i: m.head(F.embedding(i, m.a @ m.b)).tanh().sum(1),
            a=param(4, 2),
            b=param(2, 4),
            head=nn.Linear(4, 3),
        ),
        tokens(1, 4),
    ),
    "Embedding with padding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Flatten(), nn.Linear(12, 3)),
        tokens(3, 5),
    ),
    "EmbeddingBag": Case(bags, tokens(3, 5), ("EmbeddingBagBackward0",)),
    "PReLU": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3), nn.PReLU()),
        gaussian(4),
        ("PreluKernelBackward0",),
    ),
    "ConvTranspose2d": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
        ),
        gaussian(2, 2, 2),
        ("ConvolutionBackward0",),
    ),
    "Bilinear": Case(
        lambda: Function(lambda m, x: m.layer(x, x.sin()), layer=nn.Bilinear(3, 3, 2)),
        gaussian(3),
        ("TrilinearBackward0",),
    ),
    "one parameter twice in one operation": Case(
        lambda: Function(lambda m, x: torch.addcmul(x, m.w, m.w).square(), w=param(4)),
        gaussian(4),
        ("AddcmulBackward0",),
    ),
    "a weight for each head": Case(
        lambda: Function(heads, w=param(2, 4, 3), out=param(2, 3, 2)), gaussian(3, 4)
    ),
    "custom autograd.Function": Case(custom, gaussian(4), ("ScaleBackward",)),
    "complex parameters": Case(
        complex_layers, gaussian(6), ("AddBackward0", "MmBackward0", "MulBackward0")
    ),
    "complex filter": Case(
        lambda: Function(
            lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=6),
            w=param(4, 2),
        ),
        gaussian(6),
        ("MulBackward0",),
    ),
    "0-d parameters": Case(
        lambda: Function(
            lambda m, x: torch.sin(x * m.scale + m.shift) / m.scale, scale=param(), shift=param()
        ),
        gaussian(3),
        ("DivBackward0",),
    ),
    "flattened positions": Case(two_layers(positions_as_examples), gaussian(4, 4)),
    "dead ReLU": Case(
        lambda: Function(
            lambda m, x: m.expert(F.relu(m.first(x) - 1.5)),
            first=nn.Linear(4, 4),
            expert=nn.Linear(4, 4),
        ),
        gaussian(4),
    ),
    "unused parameters": Case(
        lambda: Function(lambda m, x: m.used(x), used=nn.Linear(4, 3), unused=nn.Linear(3, 2)),
        gaussian(4),
    ),
    "checkpoint": Case(
        lambda: Function(
            lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=False)),
            body=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4)),
            head=nn.Linear(4, 2),
        ),
        gaussian(4),
    ),
    "examples to experts": Case(two_layers(routed), gaussian(4), ("IndexAddBackward0",)),
    "shuffled examples": Case(two_layers(shuffled), gaussian(4), ("IndexBackward0",)),
    "last valid step": Case(two_layers(last_step), time_major(4, 4)),
    "sparse mixture": Case(
        lambda: Function(
            mixture,
            router=nn.Linear(4, 3),
            head=nn.Linear(4, 3),
            experts=nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]),
        ),
        gaussian(5, 4),
        ("IndexPutBackward0",),
    ),
    "tied decoder": Case(
        lambda: Function(decoder, encoder=nn.Linear(6, 3), bias=param(6)), gaussian(6)
    ),
    "GLU": Case(
        lambda: Function(gated_units, up=nn.Linear(4, 10), down=nn.Linear(5, 3)), gaussian(3, 4)
    ),
    "einsum": Case(
        lambda: Function(einsums, left=param(4, 2), core=param(2, 4, 3)), gaussian(5, 4)
    ),
    "causal attention, shared keys": Case(
        lambda: Function(
            masked_attention,
            q=nn.Linear(4, 8),
            k=nn.Linear(4, 4),
            v=nn.Linear(4, 4),
            out=nn.Linear(8, 3),
        ),
        gaussian(5, 4),
    ),
    "PixelShuffle": Case(
        lambda: Function(
            upscaled,
            convolution=nn.Conv2d(2, 8, 2),
            shuffle=nn.PixelShuffle(2),
            head=nn.Conv2d(2, 1, 3),
        ),
        gaussian(2, 3, 3),
    ),
    "depthwise separable": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(6, 4, 1),
            nn.GroupNorm(2, 4),
            nn.Hardswish(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        gaussian(3, 4, 4),
    ),
    "ConvTranspose1d in groups": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1),
            nn.Tanh(),
            nn.ConvTranspose1d(6, 2, 2, dilation=2, padding=1, bias=False),
            nn.Flatten(),
        ),
        gaussian(4, 3),
        ("ConvolutionBackward0",),
    ),
    "instance normalization": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2),
            nn.InstanceNorm1d(3, affine=True),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        gaussian(2, 5),
        ("RepeatBackward0",),
    ),
    "weighted EmbeddingBag": Case(
        lambda: Function(weighted_bag, bag=nn.EmbeddingBag(5, 4, mode="sum"), head=nn.Linear(4, 3)),
        tokens(3, 5),
        ("EmbeddingBagBackward0",),
    ),
    "complex state space": Case(
        lambda: Function(
            recurrence,
            decay=param(3),
            phase=param(3),
            head=nn.Linear(6, 2),
            into=param(3, 4, dtype=torch.complex128),
        ),
        gaussian(4, 4),
        ("MulBackward0", "MmBackward0"),
    ),
    "hypernetwork": Case(
        lambda: Function(hypernetwork, maker=nn.Linear(4, 12), bias=param(3)), gaussian(4)
    ),
    "energy and force": Case(
        lambda: Function(
            differentiated,
            net=nn.Sequential(
                nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 1)
            ),
        ),
        gaussian(3),
    ),
    "GRU cells": Case(
        lambda: Function(
            lambda m, x: m.cell(x[:, 1], m.cell(x[:, 0], m.start.expand(len(x), 3))),
            cell=nn.GRUCell(4, 3),
            start=param(3),
        ),
        gaussian(2, 4),
    ),
    "orthogonal and spectral": Case(
        lambda: nn.Sequential(
            parametrizations.orthogonal(nn.Linear(4, 4)),
            nn.Tanh(),
            parametrizations.spectral_norm(nn.Linear(4, 3)),
        ).eval(),
        gaussian(4),
    ),
    "parameters of one example each": Case(
        lambda: Function(
            lambda m, x: F.conv1d(x + F.layer_norm(m.own[: len(x)], (4,)), m.w).flatten(1),
            own=param(5, 4, 4),
            w=param(2, 4, 2),
        ),
        gaussian(4, 4),
        ("NativeLayerNormBackward0",),
    ),
}


def make(name: str) -> nn.Module:
    """The model of one case, from a fixed seed, in float64."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(len(name))
        return ZOO[name].model()
    finally:
        torch.set_default_dtype(previous)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
