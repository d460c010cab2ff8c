"""
Swap AdamW, and see what it did with wrong labels
=================================================

Handwritten digits (1,797 images of 8 × 8 pixels, shipped with scikit-learn), of whose training labels 40% are
replaced by another digit. We train the same network twice, with `torch.optim.AdamW` and with
`poprisk.PopRiskAdamW`, and look at what each made of the wrong labels: at the test set, at the wrong labels
themselves, at the weights, and at which labels the run itself takes for wrong.
"""

# %%
# The data
# --------
# The test labels stay right, and we remember which training labels are wrong. A real data set would not tell;
# here it lets us check.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import poprisk

images, digits = load_digits(return_X_y=True)
g = torch.Generator().manual_seed(0)
order = torch.randperm(len(digits), generator=g)
x = torch.tensor(images, dtype=torch.float32)[order] / 16
y = torch.tensor(digits)[order]
x_train, x_test, clean, y_test = x[:1000], x[1000:], y[:1000], y[1000:]

wrong = torch.rand(1000, generator=g) < 0.4
other = (clean + torch.randint(1, 10, (1000,), generator=g)) % 10
y_train = torch.where(wrong, other, clean)
print(f"{wrong.sum()} of {len(y_train)} training labels are wrong")

# %%
# One loop for both
# -----------------
# Nothing in the loop knows which optimizer it has. `memorized` is the share of the wrong labels that the
# network gives back: about one in ten before it has learned anything, next to none once it knows the digits.


def train(make_optimizer, epochs=60):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )
    optimizer = make_optimizer(model)
    accuracy, memorized = [], []
    for _ in range(epochs):
        for i in torch.randperm(1000).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x_train[i]), y_train[i]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append(
                (model(x_test).argmax(1) == y_test).double().mean().item()
            )
            given = model(x_train).argmax(1)
            memorized.append((given == y_train)[wrong].double().mean().item())
    return model, optimizer, accuracy, memorized


# %%
# The swap is the second line below. `batch_size` and `dataset_size` tell the gate how much noise the average of
# one batch carries, and that the training set is finite.

runs = {
    "AdamW": train(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    "PopRiskAdamW": train(
        lambda model: poprisk.PopRiskAdamW(
            model, lr=1e-3, batch_size=64, dataset_size=1000
        )
    ),
}
for name, (_, _, accuracy, memorized) in runs.items():
    print(
        f"{name:12}  test accuracy {accuracy[-1]:.1%} at the end, {max(accuracy):.1%} at its best; "
        f"memorized {memorized[-1]:.0%} of the wrong labels"
    )

# %%
# AdamW learns the digits first and the wrong labels afterwards; somebody with clean test labels could have stopped it
# at its best epoch. The gated run ends close to that point by itself.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, (_, _, accuracy, memorized) in runs.items():
    axes[0].plot(range(1, 61), accuracy, label=name)
    axes[1].plot(range(1, 61), memorized, label=name)
axes[0].set(xlabel="epoch", title="Test accuracy", ylim=(0.5, 1))
axes[1].set(xlabel="epoch", title="Wrong labels memorized", ylim=(0, 1))
axes[0].legend(frameon=False)
plt.show()

# %%
# What passed the gate
# --------------------
# A weight *passes* where its average gradient stands out from the noise. A module is *starved* if its gated update has
# less than 2% of the size of the ungated one: at the end of training that is what you want (nothing is left but
# noise), in the first epochs it would be a fault, to be mended by `gate=False` for that group or a floor `q_min`.

model, optimizer, _, _ = runs["PopRiskAdamW"]
for module, gate in optimizer.gate_stats().items():
    print(
        f"{module}: {gate.pass_rate:.1%} of the weights pass, the update has "
        f"{gate.update_ratio:.1%} of its ungated size, starved: {gate.starved}"
    )

# %%
# Which labels are wrong?
# -----------------------
# A run that hardly follows wrong labels is nearly an outside judge of its own training labels. Where its
# prediction differs from the label, the label is suspect; the most confident ones first.

with torch.no_grad():
    p = model(x_train).softmax(1)
rows = torch.arange(1000)
margin = p[rows, y_train] - p.scatter(1, y_train[:, None], 0).amax(1)
suspects = margin.argsort()[: int((margin < 0).sum())]
precision = wrong[suspects].double().mean().item()
recall = wrong[suspects].sum().item() / wrong.sum().item()
right = (p.argmax(1) == clean)[suspects][wrong[suspects]].double().mean().item()
print(f"{len(suspects)} labels are suspect: {precision:.0%} of them are wrong,")
print(
    f"which is {recall:.0%} of all wrong ones; for {right:.0%} the prediction is the right digit."
)

# %%
# AdamW's own end says nothing of the kind, since it agrees with most of what it was told:

with torch.no_grad():
    agrees = (runs["AdamW"][0](x_train).argmax(1) == y_train).double().mean().item()
print(
    f"AdamW agrees with {agrees:.0%} of its training labels; {1 - wrong.double().mean():.0%} are right."
)

# %%
# The twelve most suspect images, with the label they were given:

figure, axes = plt.subplots(2, 6, figsize=(8, 3.2), layout="constrained")
for axis, i in zip(axes.flat, suspects, strict=False):
    axis.imshow(x_train[i].reshape(8, 8), cmap="gray_r")
    axis.set_title(f"given {y_train[i]}, found {p[i].argmax()}", fontsize=8)
    axis.axis("off")
plt.show()

# %%
# One seed on one data set is an illustration. With ten seeds, controls, and tasks on which the gate loses:
# :doc:`/explanation/when`.
