"""
Watch a run
===========

`poprisk.RiskMonitor` writes down, every so many steps, what a run is learning: the loss, how much of the batch
gradient is *signal* (what batches agree on) and how much is noise, and what the gate lets through. It changes
nothing about the run, bit for bit, and never ends it: what cannot be measured is a warning and NaN.
"""

# %%
# Digits again, two labels in five wrong, and a plain loop.

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import poprisk

images, digits = load_digits(return_X_y=True)
g = torch.Generator().manual_seed(0)
order = torch.randperm(len(digits), generator=g)[:1000]
x = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(digits)[order]
wrong = torch.rand(1000, generator=g) < 0.4
y = torch.where(wrong, (y + torch.randint(1, 10, (1000,), generator=g)) % 10, y)

# %%
# Two lines more
# --------------
# The monitor is made once, and told of each batch before the optimizer steps. The loss gives one value an example.
# Sinks are paths of JSONL files, TensorBoard writers, runs of Weights & Biases or trackio, an ``Accelerator``, or your
# own functions.


def train(make_optimizer, path, epochs=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make_optimizer(model)
    loss = nn.CrossEntropyLoss(reduction="none")
    monitor = poprisk.RiskMonitor(model, loss, optimizer, every=8, sinks=[path])
    for _ in range(epochs):
        for i in torch.randperm(1000).split(64):
            optimizer.zero_grad()
            loss(model(x[i]), y[i]).mean().backward()
            monitor.step(x[i], y[i])
            optimizer.step()
    return monitor


folder = Path(tempfile.mkdtemp())
adamw = train(
    lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    folder / "adamw.jsonl",
)
gated = train(
    lambda model: poprisk.PopRiskAdamW(
        model, lr=1e-3, batch_size=64, dataset_size=1000
    ),
    folder / "gated.jsonl",
)

# %%
# What is in a row
# ----------------
# `signal/share` is the share of the squared batch gradient that is signal, over the last eight measured steps, with its
# standard error: near 1 while there is something to learn, 0 for pure noise. One batch tells too little of it: the first
# three rows have NaN there, and an interval from `share_low` to `share_high` all the same. `signal/steps` says how many
# steps a row is about. `signal/noise_scale` is the batch size at which signal and noise would be equal. Names after a
# slash are modules.

step, row = gated.rows[-1]
for name, value in row.items():
    if name.count("/") < 2 or name.startswith("gate"):
        print(f"{name:26} {value:.3g}")

# %%
# The file holds the same, a line a row; what is infinite or not a number is null there.

rows = [
    json.loads(line) for line in (folder / "gated.jsonl").read_text().splitlines()
]
print(len(rows), "rows, the last at step", rows[-1]["step"])

# %%
# The course of the run
# ---------------------
# Rows share steps with those before them; those that are a window apart do not.

for name, monitor in (("AdamW", adamw), ("PopRiskAdamW", gated)):
    early, late = monitor.rows[7][1], monitor.rows[-1][1]
    print(
        f"{name:12} signal share: {early['signal/share']:.0%} at first, {late['signal/share']:.0%} "
        f"± {late['signal/share_error']:.0%} at the end"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, monitor in (("AdamW", adamw), ("PopRiskAdamW", gated)):
    steps = [step for step, _ in monitor.rows]
    axes[0].plot(
        steps, [row["signal/share"] for _, row in monitor.rows], label=name
    )
axes[0].axhline(0, color="k", lw=0.5)
axes[0].set(xlabel="step", title="Share of the batch gradient that is signal")
axes[0].legend(frameon=False)
for module in ("0", "2"):
    ratios = [row[f"gate/update_ratio/{module}"] for _, row in gated.rows[1:]]
    axes[1].plot(
        [step for step, _ in gated.rows[1:]], ratios, label=f"module {module}"
    )
axes[1].set(xlabel="step", title="Gated update over ungated")
axes[1].legend(frameon=False)
plt.show()

# %%
# For Trainers and Lightning there are callbacks (:doc:`/how-to/transformers`, :doc:`/how-to/lightning`); what can be
# measured beside these is in :doc:`/reference/monitor`.
