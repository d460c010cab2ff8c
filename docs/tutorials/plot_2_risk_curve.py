"""
A risk curve without validation data
====================================

442 diabetes patients, ten measurements each, and how the disease progressed in the following year (shipped with
scikit-learn). Nobody added noise: what the measurements cannot explain is the noise. A network with far more weights
than patients overfits it, and a held-out set would cost a fifth of the few patients there are.

`poprisk.TwinRisk` trains a *twin* beside the model: same start, same batches, targets pushed a little at random. How far
the twin's outputs follow the push shows how much the network memorizes at that moment, and from that follows an
estimate of its loss on new patients.
"""

# %%
# The data
# --------
# 300 patients to train on. The other 142 only check what the twin says; it never sees them.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from torch import nn

import poprisk

measured, progression = load_diabetes(return_X_y=True)
order = torch.randperm(442, generator=torch.Generator().manual_seed(0))
x = torch.tensor(measured, dtype=torch.float32)[order]
y = torch.tensor(progression, dtype=torch.float32)[order, None]
x = (x - x[:300].mean(0)) / x[:300].std(0)
y = (y - y[:300].mean()) / y[:300].std()
x_train, y_train, x_test, y_test = x[:300], y[:300], x[300:], y[300:]

# %%
# The loop
# --------
# `twin.runs(index)` hands out the model and then its twin, each with an optimizer and a loss of its own; the loop stays
# yours. The loss gives one value an example. The model is trained bit for bit as it would be alone.


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
    )


def squared_error(outputs, targets):
    return (outputs - targets).square().mean(1)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


twin = poprisk.TwinRisk(
    make_model, adamw, squared_error, dataset_size=300, probes=2
)
epochs, estimates, training, held_out = [], [], [], []
for epoch in range(1, 61):
    for index in torch.randperm(300).split(32):
        for run in twin.runs(index):
            run.optimizer.zero_grad()
            run.loss(run.model(x_train[index]), y_train[index]).mean().backward()
            run.optimizer.step()
    if epoch % 3 == 0:
        epochs.append(epoch)
        estimates.append(twin.estimate(x_train, y_train))
        with torch.no_grad():
            training.append(
                squared_error(twin.model(x_train), y_train).mean().item()
            )
            on_others = squared_error(twin.model(x_test), y_test)
        held_out.append(on_others.mean().item())

for epoch, estimate, loss, truth in list(
    zip(epochs, estimates, training, held_out, strict=True)
)[::3]:
    print(
        f"epoch {epoch:2}: estimated risk {estimate.value:.2f} ± {estimate.standard_error:.2f}"
        f"{'' if estimate.valid else ' (flagged)'}, 142 other patients {truth:.2f}, training loss {loss:.2f}"
    )

# %%
# The training loss falls all the way and says nothing. An estimate is flagged where the twin's own answer says that it
# cannot be believed: too much of the freedom is used up, or the response is too noisy.

print("the last estimate:", estimates[-1].reason or "not flagged")
print(f"standard error of what 142 patients say: {on_others.std() / 142**0.5:.2f}")

# %%
# When to stop
# ------------
# `stopping_point` gives the moment of least estimated risk, and the interval of all moments that the estimates cannot
# tell from it. With 300 examples it is wide.

best = poprisk.stopping_point(estimates)
at = epochs[best.index]
print(
    f"stop after epoch {at} (anything from {epochs[best.low]} to {epochs[best.high]} may be as good)"
)
print(
    f"risk on the 142 others: {held_out[best.index]:.3f} there, {min(held_out):.3f} at the best moment in "
    f"hindsight, {held_out[-1]:.3f} at the end"
)

# %%
figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
shown = [i for i, e in enumerate(estimates) if e.comparable]
value = torch.tensor([estimates[i].value for i in shown])
error = torch.tensor([estimates[i].standard_error for i in shown])
at_shown = [epochs[i] for i in shown]
axis.fill_between(at_shown, value - 2 * error, value + 2 * error, alpha=0.2)
axis.plot(
    at_shown, value, label="estimated, no data held out (± 2 standard errors)"
)
axis.plot(epochs, held_out, label="142 patients not trained on")
axis.plot(epochs, training, label="training loss", color="gray", ls=":")
axis.axvline(at, color="k", lw=1, ls="--", label="stopping point")
axis.set(xlabel="epoch", ylabel="squared error", ylim=(0, 1.5))
axis.legend(frameon=False, fontsize=8)
plt.show()

# %%
# What it cost
# ------------
# As many more runs of training as there are twins (`probes`); one is the default.

print(f"cost: {estimates[-1].cost:.1f} trainings beside the model's own")

# %%
# The estimate is of *expected* risk, on patients whose targets are as noisy. It does not replace a test set. How far off
# it is, over twelve problems and five seeds: :doc:`/explanation/exact-or-estimate`.
