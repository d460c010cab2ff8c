"""Plausible bugs of the per-example gradients in factors."""

from mutations import Mutation

DENSE = "test_factors.py::test_equals_the_dense_jacobian"
LAYOUTS = "test_factors.py::test_equal_shapes_with_different_layouts_are_told_apart"
CUT = "test_factors.py::test_one_parameter_in_matrices_of_two_shapes"

MUTATIONS = {
    "dimensions are no part of a structure": Mutation(
        "poprisk/per_sample/graph.py", "                    _settings(node),\n", "", LAYOUTS
    ),
    "only two groups of examples": Mutation(
        "poprisk/per_sample/graph.py",
        "        groups[list(members), i] = True\n",
        "        groups[i % 2, i] = True\n",
        "test_factors.py::test_permuted_examples",
    ),
    "one batch of sparse gradients is trusted": Mutation(
        "poprisk/per_sample/graph.py",
        "and all(c is None or len(c) == 1 for c in told.candidates[use.node])",
        "and told.batches >= 0",
        "test_factors.py::test_units_at_rest_that_look_like_examples_at_first",
    ),
    "the boundary is crossed twice": Mutation(
        "poprisk/per_sample/graph.py",
        "without.update(child for child, _ in node.next_functions if child is not None)",
        "pass",
        f"{DENSE}[examples to experts]",
    ),
    "a product of parameters is taken for examples": Mutation(
        "poprisk/per_sample/graph.py",
        "    if node.name() in PURE and all(child in without for child in children):\n",
        "    if False:\n",
        "test_factors.py::test_a_product_of_parameters_met_by_one_hot_inputs",
    ),
    "gradients pass on through other inputs": Mutation(
        "poprisk/per_sample/nodes.py",
        "    (grad,) = caught\n",
        "    outs = [GradientEdge(site.node, o) for o in outputs]\n"
        "    edge = [GradientEdge(child, index)]\n"
        "    (grad,) = torch.autograd.grad(outs, edge, grads, retain_graph=True)\n",
        "test_factors.py::test_fallback_is_through_one_operation_alone",
    ),
    "a parameter met twice by one operation counts once": Mutation(
        "poprisk/per_sample/graph.py",
        "        for edge, (child, _) in enumerate(node.next_functions)\n"
        "        if child in without\n",
        "        for edge, (child, _) in enumerate(node.next_functions)\n"
        "        if child in without\n"
        "        and (child, 0) not in node.next_functions[:edge]\n",
        f"{DENSE}[one parameter twice in one operation]",
    ),
    "padding of an embedding gets a gradient": Mutation(
        "poprisk/per_sample/rules.py",
        "    if padding.any():\n",
        "    if False:\n",
        f"{DENSE}[Embedding with padding]",
    ),
    "dilation ignored": Mutation(
        "poprisk/per_sample/rules.py",
        "(size - 1) * gap + 1, step)[..., ::gap]",
        "(size - 1) * gap + 1, step)[..., :size]",
        f"{DENSE}[Conv1d]",
    ),
    "groups of channels normalized together": Mutation(
        "poprisk/per_sample/rules.py",
        "grouped = x.reshape(len(x), node._saved_group, -1)",
        "grouped = x.reshape(len(x), -1, node._saved_group).mT",
        f"{DENSE}[residual CNN]",
    ),
    "dense terms of the other examples left out": Mutation(
        "poprisk/per_sample/gram.py",
        "whole = len(outers[0]) < len(left) or len(outers[1]) < len(right)",
        "whole = len(outers[0]) < len(left) or not outers[1]",
        "test_factors.py::test_factors_meet_formed_gradients",
    ),
    "one weight for all rows": Mutation(
        "poprisk/per_sample/gram.py",
        "return weight.reshape(_matrix_shape(term)[0], -1)[rows].flatten()",
        "return weight.reshape(_matrix_shape(term)[0], -1)[: rows.stop - rows.start].flatten()",
        "test_factors.py::test_small_workspaces_change_nothing",
    ),
    "reshaped factors are cut by their own rows": Mutation(
        "poprisk/per_sample/nodes.py",
        "if term.shape[:1] != (rows,) or term.cotangent.is_complex():",
        "if term.cotangent.is_complex():",
        CUT,
    ),
    "squares of positions instead of gradients": Mutation(
        "poprisk/per_sample/moments.py",
        "total[1].index_add_(0, keys % activation.size, grads.square())",
        "total[1].index_add_(0, indices.flatten(), term.cotangent.flatten(0, 2).square())",
        f"{DENSE}[Embedding with padding]",
    ),
    "the caller's no_grad hides the graph": Mutation(
        "poprisk/per_sample/graph.py",
        "with torch.inference_mode(False), torch.enable_grad():",
        "if True:",
        "test_factors.py::test_under_no_grad_of_the_caller",
    ),
}
