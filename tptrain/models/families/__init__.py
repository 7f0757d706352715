"""Families of Hugging Face models: each file maps config.json to a spec and back, and the names of the tensors.

A family is a module with `to_spec(config)`, `to_config(spec)` and `keys(spec)`; its name is config.json's `model_type`.
"""

from types import ModuleType

from tptrain.models.families import gpt2, llama, qwen3

FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2}
