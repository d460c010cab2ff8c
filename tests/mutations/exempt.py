"""Plausible bugs of the parameter groups that leave layers out of the gate."""

from mutations import Mutation

FILE = "poprisk/optim/exempt.py"
CHOOSE = "test_exempt.py::test_names_and_types_choose"

MUTATIONS = {
    "exempt parameters gated": Mutation(
        FILE,
        '{"params": rest, "gate": False}',
        '{"params": rest, "gate": True}',
        "test_exempt.py::test_the_exempt_group_is_plain_adamw_and_the_other_is_gated",
    ),
    "exempt groups behind one gate for all": Mutation(
        "poprisk/optim/wrapper.py",
        'if group.get("gate", True) is False:',
        'if group.get("gate", True) is None:',
        "test_exempt.py::test_one_gate_for_all_groups_refuses_exempt_ones",
    ),
    "a tied weight under its first name alone": Mutation(
        FILE, "remove_duplicate=False", "remove_duplicate=True", CHOOSE
    ),
    "a type's own parameters alone": Mutation(
        FILE, "for p in m.parameters()}", "for p in m.parameters(recurse=False)}", CHOOSE
    ),
    "half of a SwiGLU layer taken for a router": Mutation(
        FILE,
        '"gate", "*_gate"',
        '"gate*", "*_gate"',
        "test_exempt.py::test_the_rule_exempts_routers_and_no_half_of_a_swiglu",
    ),
}
