"""
Explain a run: channel, reservoir and four cells
================================================

Along the path it took, training answers *linearly* to the output gradient it started from. So a recorded run can be
taken apart exactly: which part of what it says about a new example comes from right labels, and which from wrong
ones.

The data are 569 biopsies (30 measurements each, benign or malignant, shipped with scikit-learn). We train on 100 of them,
flip a fifth of their labels, and ask how the flips got into the predictions.
"""

# %%
# A run to record
# ---------------
# Everything is in float64, so that what should be exact is exact to many digits. The labels are ±1 and the loss is the
# squared error; cross-entropy and logistic losses work as well.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import poprisk

measured, label = load_breast_cancer(return_X_y=True)
g = torch.Generator().manual_seed(0)
order = torch.randperm(569, generator=g)
x = torch.tensor(measured)[order]
y = 2.0 * torch.tensor(label).double()[order, None] - 1
x = (x - x[:100].mean(0)) / x[:100].std(0)
clean, flipped = y[:100], torch.rand(100, 1, generator=g) < 0.2
given = torch.where(flipped, -clean, clean)
train, query = (x[:100], given), (x[100:300], y[100:300])
print(f"{flipped.sum()} of 100 training labels are flipped")

# %%
# `poprisk.record` trains the model on the batches it is given, by the optimizer it is given, and keeps the path.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 12), nn.Tanh(), nn.Linear(12, 1)).double()
adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
batches = [torch.randint(100, (25,), generator=g) for _ in range(160)]
run = poprisk.record(model, "squared_error", adamw, batches, query, train=train)

# %%
# The operators
# -------------
# `W` says along which directions of the training outputs the run dissipated loss: its range is the *signal channel*, its
# kernel the *reservoir*, which no prediction can see. `G` carries what came through to the queries. `closure`
# is how far the operators are from what really happened: look at it first.

operators = poprisk.path_operators(run)
print(f"closure error: {operators.closure.worst:.0e}")
dimensions = operators.spectrum.dimensions((1e-1, 1e-2, 1e-4, 1e-8))
for tolerance, dimension in dimensions.items():
    print(
        f"directions of 100 in the channel, at a tolerance of {tolerance:.0e}: {dimension}"
    )

# %%
# "In the channel" is a matter of a tolerance, so look at the whole profile. What lies below the tolerance is called the
# soft reservoir.

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
axis.semilogy(operators.spectrum.eigenvalues.clamp_min(1e-16))
axis.set(
    xlabel="direction",
    ylabel="eigenvalue of W",
    title="How much each direction was trained",
)
plt.show()

# %%
# Four cells
# ----------
# Right labels and flips, each in the channel or in the reservoir: learned signal, trapped signal, harmful noise, benign
# noise. Only what is in the channel moves a prediction. The test error is then a sum of three terms, and here it is
# one to round-off.

cells = operators.four_cells(clean)
assert cells.error is not None
for name, term in cells.error.terms.items():
    print(f"{name:>14}: {term:+.4f}")
total = sum(cells.error.terms.values())
print(f"{'sum':>14}: {total:+.4f}    measured: {cells.error.measured:.4f}")

# %%
# Without the flips
# -----------------
# Take out the part that the flips contributed, and score what is left: the same run, without the noise that got
# through.

harmful = cells.cells.harmful_noise + cells.cells.benign_noise
with torch.no_grad():
    outputs = model(query[0]).flatten()
as_it_is = (outputs.sign() == query[1].flatten()).double().mean().item()
without = ((outputs - harmful).sign() == query[1].flatten()).double().mean().item()
print(
    f"accuracy {as_it_is:.1%} as it is, {without:.1%} without the flips that got through"
)

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
signal = cells.cells.learned_signal + cells.cells.trapped_signal
for sign, name, colour in ((1, "benign", "#3f7fe8"), (-1, "malignant", "#e8500a")):
    mine = query[1].flatten() == sign
    axis.plot(signal[mine], harmful[mine], ".", color=colour, label=name, alpha=0.7)
axis.axhline(0, color="k", lw=0.5)
axis.axvline(0, color="k", lw=0.5)
axis.set(
    xlabel="moved by right labels",
    ylabel="moved by flips",
    title="Each query, in parts",
)
axis.legend(frameon=False)
plt.show()

# %%
# Any size
# --------
# `W` and `G` are matrices of the training set's size. `trace_cells` gives the same split without any matrix, from two
# vectors that are followed through the run. Left to itself it takes a few averages a pass, which is cheaper and good to
# a few percent; these settings are exact.

trace = poprisk.trace_cells(run, clean, every=1, quadrature="gauss3")
left = trace.without_noise().flatten()
again = (left.sign() == query[1].flatten()).double().mean().item()
print(f"matrix-free: {again:.1%} without the flips")

# %%
# On the command line: ``poprisk explain TASK``. What is exact and what is not: :doc:`/explanation/exact-or-estimate`.
