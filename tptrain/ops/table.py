"""The table of operations: for each name one function, whatever computes it. Its contracts stand in `reference.py`.

A table is chosen once for a run (`choose`) and passed to the modules that use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tptrain.ops import reference

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Operations:
    """What a model computes with, beside matrix products and embeddings."""

    backend: str  # what computes them, for people and to compare ranks: the same text, the same bits
    device: str  # cpu or cuda: the kind of device that the functions are for
    rms_norm: Operation = reference.rms_norm
    rms_norm_backward: Operation = reference.rms_norm_backward
    add_rms_norm: Operation = reference.add_rms_norm
    add_rms_norm_backward: Operation = reference.add_rms_norm_backward
    gate_product: Operation = reference.gate_product
    gate_product_backward: Operation = reference.gate_product_backward
    rotate: Operation = reference.rotate
    rotate_qkv: Operation = reference.rotate_qkv
    rotate_qkv_backward: Operation = reference.rotate_qkv_backward
    attention: Operation = reference.attention
    masked_attention: Operation = reference.masked_attention
    statistics: Operation = reference.statistics
    logit_gradient_: Operation = reference.logit_gradient_


REFERENCE = Operations("PyTorch", "cpu")
