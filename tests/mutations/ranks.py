"""Plausible bugs of the gate in a Kronecker basis where parameters are sharded."""

from mutations import Mutation

SHARDS = "test_soap_ranks.py::test_shards_are_trained_as_one_piece"

MUTATIONS = {
    "each process with a basis of its own": Mutation(
        "poprisk/optim/sharded.py",
        "state[key] = spread(agreed(gathered[key], layout), own)",
        "state[key] = spread(gathered[key], own)",
        "test_soap_ranks.py::test_parts_are_of_one_basis_where_processes_find_others",
    ),
    "shards turned back by rows of the transpose": Mutation(
        "poprisk/optim/sharded.py",
        "x = x[rows] if left is None else left[rows] @ x",
        "x = x[rows] if left is None else left[:, rows].mT @ x",
        SHARDS,
    ),
    "the sides of the factors of shards exchanged": Mutation(
        "poprisk/optim/sharded.py",
        "for x, side in zip((g, g.mT), sides, strict=True)",
        "for x, side in zip((g.mT, g), sides, strict=True)",
        SHARDS,
    ),
    "factors of shards that are not finite": Mutation(
        "poprisk/optim/sharded.py",
        "if not bool(g.square().sum().isfinite()):",
        "if g is None:",
        "test_soap_ranks.py::test_placements_of_all_kinds_are_one_piece",
    ),
    "columns of a shard cut as its rows": Mutation(
        "poprisk/optim/sharded.py",
        "x if x.is_replicate() or (x.dim == 0) == rows else Replicate()",
        "x if x.is_replicate() or x.dim == 0 else Replicate()",
        "test_soap_ranks.py::test_placements_of_all_kinds_are_one_piece",
    ),
    "strided shards left out of sums": Mutation(
        "poprisk/dtensor.py",
        "if not placement.is_replicate())",
        "if placement.is_shard())",
        "test_soap_ranks.py::test_sums_go_over_strided_shards_too",
    ),
    "a whole state taken up by shards": Mutation(
        "poprisk/optim/state.py",
        "    if layout != expected:",
        "    if layout != expected and False:",
        "test_soap_ranks.py::test_what_cannot_be_is_refused_before_anything_moves",
    ),
}
