r"""Train on MNIST without backpropagation, from files in the IDX format that you have.

    python forward_forward_mnist.py DIRECTORY --rule forward-forward --hidden 1000 1000 --epochs 60

The best public implementations of Forward-Forward come to a test error of 1.3 to 1.5%. DIRECTORY
holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two files of t10k, perhaps with .gz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from poprisk import PopRiskAdamW
from poprisk_lab.tasks.digits import flip_labels
from poprisk_lab.tasks.idx import read_mnist
from poprisk_lab.tasks.local_rules import RULES, LocalRule

CLASSES = 10


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rule", choices=[*RULES], default="forward-forward")
    parser.add_argument("--hidden", type=int, nargs="+", default=[1000, 1000], help="units")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.0, help="share of labels made wrong")
    parser.add_argument("--gate", action="store_true", help="PopRiskAdamW in place of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def test_error(rule: LocalRule, net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the test set that is predicted wrong."""
    with torch.no_grad():
        outputs = torch.cat([net(part) for part in x.split(500)])
    return 1 - rule.metric.function(outputs, y)


def main() -> None:
    """Train, and print the test error after each epoch."""
    args = arguments()
    torch.manual_seed(args.seed)
    data, rule = read_mnist(args.directory), RULES[args.rule]
    (x, y), (x_test, y_test) = data["train"], data["test"]
    y = flip_labels(y, args.noise, torch.Generator().manual_seed(args.seed))
    x, y, x_test, y_test = (t.to(args.device) for t in (x, y, x_test, y_test))
    net = rule.net(x.shape[1], *args.hidden, classes=CLASSES).to(args.device)
    sizes = {"batch_size": args.batch, "dataset_size": len(x)}
    optimizer: torch.optim.Optimizer = (
        PopRiskAdamW(net, lr=args.lr, **sizes)
        if args.gate
        else torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01)
    )
    for epoch in range(args.epochs):
        for index in torch.randperm(len(x), device=args.device).split(args.batch):
            optimizer.zero_grad()
            rule.loss(net(x[index]), y[index]).mean().backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: test error {test_error(rule, net, x_test, y_test):.2%}")


if __name__ == "__main__":
    main()
