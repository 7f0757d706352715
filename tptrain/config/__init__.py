"""Configuration: the dataclasses are schema and defaults, Hydra composes, `validate` checks. Imports no torch."""

from tptrain.config.errors import UserError
from tptrain.config.load import load_config, read_config, write_config
from tptrain.config.schema import Config, ModelConfig
from tptrain.config.validate import check_cluster, check_data, check_topology, validate

__all__ = [
    "Config",
    "ModelConfig",
    "UserError",
    "check_cluster",
    "check_data",
    "check_topology",
    "load_config",
    "read_config",
    "validate",
    "write_config",
]
