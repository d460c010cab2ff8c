"""Plausible bugs of the gate in a Kronecker basis."""

from mutations import Mutation

REFERENCE = "test_soap.py::test_many_steps_are_those_of_the_reference"
PARTS = "test_soap.py::test_parts_of_a_batch_are_the_batch"

MUTATIONS = {
    "squares carried over like means": Mutation(
        "poprisk/optim/kronecker.py",
        "by = squares if key in SQUARES else change",
        "by = change",
        REFERENCE,
    ),
    "averages left in the old basis": Mutation(
        "poprisk/optim/kronecker.py",
        "        state[key] = new\n    carry_(",
        "        state[key] = new\n    (lambda *_: 0)(",
        REFERENCE,
    ),
    "variance of the coordinates": Mutation(
        "poprisk/optim/batch_variance.py",
        "squares = moments(rotation.terms(terms, p.shape))[1]",
        "squares = moments(terms)[1]",
        REFERENCE,
    ),
    "variance around the mean of the coordinates": Mutation(
        "poprisk/optim/batch_variance.py",
        "grad = self.bases.turned(p) if self.bases is not None else _grad(p)",
        "grad = _grad(p)",
        REFERENCE,
    ),
    "the sides of the factors exchanged": Mutation(
        "poprisk/optim/kronecker.py",
        "    if term.flipped:\n        rows, columns = columns, rows\n",
        "",
        "test_soap.py::test_layers_of_all_kinds_are_rotated_where_they_can_be",
    ),
    "the step not turned back": Mutation(
        "poprisk/optim/groups.py",
        "w.add_(rotation.back(step))",
        "w.add_(rotation.forward(step))",
        REFERENCE,
    ),
    "slack added": Mutation(
        "poprisk/optim/update.py", "alpha=-tolerated", "alpha=tolerated", REFERENCE
    ),
    "factors as before clipping": Mutation(
        "poprisk/optim/soap.py",
        "scale = self._batch_parts().factor(p) ** 2",
        "scale = 1.0",
        "test_soap.py::test_factors_follow_a_factor_on_the_gradient",
    ),
    "eigenvectors of the last batch alone": Mutation(
        "poprisk/optim/kronecker.py",
        "state[key].lerp_(factor.to(state[key].dtype), 1 - decay)",
        "state[key].copy_(factor)",
        REFERENCE,
    ),
}
