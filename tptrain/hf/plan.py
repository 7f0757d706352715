"""A tensor-parallel plan: which module or parameter of a Transformers model is cut in which style.

Plans name modules by patterns, in which `*` stands for a number: {"model.layers.*.mlp.up_proj": "colwise"}.
"""

import re
from collections.abc import Iterable, Mapping

from tptrain.config import UserError

COLUMN = ("colwise", "colwise_gather_output", "colwise_rep", "packed_colwise")
ROW = ("rowwise", "rowwise_split_input", "rowwise_split_output", "rowwise_rep", "packed_rowwise")
EMBEDDING = ("embedding_rowwise", "embedding_colwise")
# Nothing is cut. What these say of gradients is read off the graph (`gradients.py`), for every model.
WHOLE = ("replicate", "replicated_with_grad_allreduce", "local_params")
OTHERS = ("mla_kv_a_proj", "all_reduce", "moe_tp_experts", "moe_identity_expert")
STYLES = (*COLUMN, *ROW, *EMBEDDING, *WHOLE, *OTHERS)
# Not a style of Transformers: rowwise_split_output.
REFUSED = {"sequence_parallel": "parallel.sequence_parallel is for tptrain's own models"}

Plan = Mapping[str, str]  # pattern -> style


def pattern(name: str) -> str:
    """A module's or parameter's name with `*` for each number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def style_of(plan: Plan, name: str) -> str | None:
    """The style of a module or parameter, by its name."""
    return plan.get(name) or plan.get(pattern(name))


def checked(plan: Plan) -> Plan:
    """Raises UserError for a style that there is not."""
    for name, style in plan.items():
        if style in REFUSED:
            raise UserError(f"model.tp_plan: {name} is to be {style}: {REFUSED[style]}. Leave it out.")
        if style not in STYLES:
            raise UserError(f"model.tp_plan: {name} is to be {style}, which is none of {', '.join(STYLES)}.")
    return plan


def with_user_entries(plan: Plan, user: Plan, names: Iterable[str], prefix: str) -> Plan:
    """The model's plan with entries of the user, whose names may lack the prefix of the inner model.

    Raises UserError for an entry that names no module or parameter.
    """
    known = {each for name in names for each in (name, pattern(name))}
    merged = dict(plan)
    for name, style in user.items():
        whole = name if name in known else f"{prefix}.{name}"
        if whole not in known:
            raise UserError(f"model.tp_plan: the model has no module or parameter {name}.")
        merged[whole] = style
    return checked(merged)
