"""The optimizer, the gate on other optimizers, and the estimators of variance behind both."""
