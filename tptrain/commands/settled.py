"""Checks that the verbs share, and what follows from a config."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tptrain.config import Config


def settle(config: "Config", say: bool = True) -> None:
    """Check what needs neither a machine nor data, and fill in what follows from the model. Raises UserError."""
    from tptrain.config import validate
    from tptrain.models.check import check_model
    from tptrain.models.cost import checkpoint_every

    validate(config)
    settle_engine(config, say)
    check_model(config)
    config.checkpoint.every = checkpoint_every(config)


def settle_engine(config: "Config", say: bool = True, weights: bool = True) -> None:
    """Decide who computes the model, and say so where there was a choice. `weights`: the model's will be read.

    Raises UserError.
    """
    from tptrain.models.sizes import settle_engine

    if (line := settle_engine(config, weights)) and say:
        print(line, file=sys.stderr)


def warn(configs: "list[Config]", overrides: list[str]) -> None:
    from tptrain.config.advice import advice

    for line in advice(configs, overrides):
        print(f"warning: {line}", file=sys.stderr)
