"""Mutants that no test can notice, as they change nothing that can be seen, with the reason."""

EQUIVALENT: dict[str, dict[str, str]] = {
    "poprisk/optim/gate.py": {
        "if self.q_min > 0.0: -> if self.q_min != 0.0:": "a negative floor is refused",
        "if self.q_min > 0.0: -> if self.q_min > -1.0:": "a floor of 0 under a mask that is never "
        "negative changes nothing; the line only saves the work",
        "tie = 1 + 8 * torch.finfo(mean_sq[0].dtype).eps -> "
        "tie = 1 + 9 * torch.finfo(mean_sq[0].dtype).eps": "some units of rounding, more or fewer",
        "scale = scale.to(x[0].dtype) -> scale = scale.to(x[ -1].dtype)": "tensors of a list have "
        "one type",
        "q_min: float = 0.0 -> q_min: float = -1.0": "no floor either: a mask is never negative",
        "tie = 1 + 8 * torch.finfo(mean_sq[0].dtype).eps -> "
        "tie = 1 + 8 * torch.finfo(mean_sq[ -1].dtype).eps": "tensors of a list have one type",
    },
    "poprisk/optim/update.py": {
        "if settings.weight_decay != 0: -> if settings.weight_decay > 0:": "a negative weight "
        "decay is refused",
        "columns = [column[0].view(-1).split(CHUNK) if column else () for column in lists] -> "
        "columns = [column[ -1].view(-1).split(CHUNK) if column else () for column in lists]": "a "
        "column has one tensor here",
    },
    "poprisk/optim/variance.py": {
        " @abstractmethod ->  [16]": "nobody makes an estimator without its methods",
        "return self.paper or t > 1 -> return self.paper or t != 1": "steps are counted from 1",
        "return where_known(counts.t > 1, 1 - momentum_noise(counts.t, counts.beta1)) -> "
        "return where_known(counts.t >= 1, 1 - momentum_noise(counts.t, counts.beta1))": "all "
        "of the first average is noise, and 1 - 1 = 0",
    },
    "poprisk/path/follow.py": {
        "if (k + 1) % every == 0 or k + 1 == len(run) or (every == 1 and k + 1 in kept): -> "
        "if (k + 1) % every <= 0 or k + 1 == len(run) or (every == 1 and k + 1 in kept):": "no "
        "remainder is negative",
        "if due or k + 1 == len(run): -> if due or k + 1 >= len(run):": "no step comes after the "
        "last",
    },
    "poprisk/path/march.py": {
        "w = self.w if rule.steps == 1 else (self.w + end) / 2 -> w = self.w if rule.steps <= 1 "
        "else (self.w + end) / 2": "an interval has one step at least",
    },
    "poprisk/path/integrals.py": {
        "strided = 3 * outputs if run.stride > 1 else 0 -> "
        "strided = 3 * outputs if run.stride != 1 else 0": "a stride is 1 at least",
        "BLOCK = 2**21 -> BLOCK = 2** 22": "sizes of blocks change memory and time, not the sums",
    },
    "poprisk/path/quadrature.py": {
        "allowed = (self.refine or 0.0) * size.clamp_min(1e-3 * float(size.norm()) + 1e-300) -> "
        "allowed = (self.refine or 0.0) * size.clamp_min(1e-3 * float(size.norm()) - 1e-300)": "it "
        "is below all numbers that occur; it keeps 0 > 0 from being asked",
    },
    "poprisk/risk/local_losses.py": {
        "return LARGEST_GAIN if above < 0 else SMALLEST_GAIN -> "
        "return LARGEST_GAIN if above <= 0 else SMALLEST_GAIN": "the degrees of freedom grow with "
        "the gain: they are not what is asked at both ends",
    },
    "poprisk/optim/step.py": {
        "if mu > 0: -> if mu != 0:": "RMSprop refuses a negative momentum",
    },
    "poprisk/optim/wrapper.py": {
        "q = masks(tensors.lists([param]), counts, estimator, gate)[0] -> q = "
        "masks(tensors.lists([param]), counts, estimator, gate)[ -1]": "the list has one mask",
    },
    "poprisk/optim/adamw.py": {
        "if count == 1: -> if count <= 1:": "skipped steps are counted from 1",
    },
}
"""By file and by change, in the words of :func:`mutants.change_of`."""
