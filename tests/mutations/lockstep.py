"""Faults of a twin that follows another loop, and of the twin's signs."""

from mutations import Mutation

FILE = "poprisk/risk/lockstep.py"
UNPUSHED = "test_risk_lockstep.py::test_without_a_push_a_twin_is_the_model_after_every_step"
SAME_ESTIMATE = "test_risk_lockstep.py::test_an_estimate_is_that_of_a_twin_in_a_loop_of_its_own"
ALIKE = "test_risk_twin.py::test_every_example_is_pushed_alike_where_a_shift_does_not_count"

MUTATIONS = {
    "labels pushed the wrong way": Mutation(
        FILE, "grads.append(-weight * self", "grads.append(weight * self", SAME_ESTIMATE
    ),
    "the loop's gradient, but not the twin's own": Mutation(
        FILE, "grad + weight * (through - seen.slopes[name])", "grad", SAME_ESTIMATE
    ),
    "gradients not clipped": Mutation(FILE, "        self.clip(model, optimizer)\n", "", UNPUSHED),
    "the first learning rate for ever": Mutation(
        FILE, "group.update(copy.deepcopy(settings))", "pass", UNPUSHED
    ),
    "random numbers of what comes after": Mutation(
        FILE, "        seen.start.restore()\n", "        seen.end.restore()\n", UNPUSHED
    ),
    "a part of an accumulation left out": Mutation(
        FILE,
        "for seen, weight in zip(passes, weights, strict=True):\n            roots",
        "for seen, weight in list(zip(passes, weights, strict=True))[:1]:\n            roots",
        UNPUSHED,
    ),
    "signs that are all equal left so": Mutation(
        "poprisk/risk/twin.py", "_break_ties(self.signs, generator)", "pass", ALIKE
    ),
}
