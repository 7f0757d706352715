"""Where the plan of a Transformers family computes something else than the model, and what is cut instead.

Each has been seen to be wrong, or to fail, against one process; docs/families.md has the figures.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tptrain.hf.plan import Plan


def _packed_experts(config: Any) -> Plan:
    """A gate and an up matrix lie in one, one after the other. Transformers cuts it as one, while it loads rows that
    alternate.
    """
    return {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"}


def _sparse_activations(config: Any) -> Plan:
    """The threshold of a layer with sparse activations comes from mean and deviation over all features."""
    layers = (i for i, share in enumerate(config.activation_sparsity_pattern) if share > 0)
    return {f"layers.{i}.mlp.{name}_proj": "replicate" for i in layers for name in ("gate", "up", "down")}


def _dynamic_mask(config: Any) -> Plan:
    """Each head has a mask of its own, which comes from the values of all heads."""
    return {"layers.*.self_attn.dt_proj": "rowwise_split_output", "layers.*.self_attn.A": "colwise"}


def _summed_experts(config: Any) -> Plan:
    """The experts are cut, and what they give is to be summed. The plan says so since Transformers 5.16 only."""
    return {"layers.*.feed_forward.experts": "moe_tp_experts"}


CORRECTIONS: Mapping[str, Callable[[Any], Plan]] = {
    "doge": _dynamic_mask,
    "gemma3n_text": _sparse_activations,
    "inkling_text": _packed_experts,
    "inkling2_text": _packed_experts,
    "inkling2_loop_text": _packed_experts,
    "llama4_text": _summed_experts,
}


def corrected(plan: Plan, config: Any, prefix: str) -> Plan:
    """The plan of a model whose inner model has this name, with our corrections of its family."""
    text = config.get_text_config()
    correction = CORRECTIONS.get(text.model_type)
    if correction is None:
        return plan
    return {**plan, **{f"{prefix}.{name}": style for name, style in correction(text).items()}}
