"""Mutants that no test can notice, as they change nothing that can be seen, with the reason."""

EQUIVALENT: dict[str, dict[str, str]] = {
    "poprisk/optim/gate.py": {
        "if self.q_min > 0.0: -> if self.q_min > -1.0:": "a floor of 0 under a mask that is never "
        "negative changes nothing; the line only saves the work",
    },
}
"""By file and by change, in the words of :func:`mutants.change_of`."""
