"""Families of Hugging Face models: each file maps config.json to a spec, and the names of the tensors.

A family is a module with `to_spec(fields)` and `keys(spec)`; those that the settings `model.*` can describe have
`to_config(spec)` too. Its name is config.json's `model_type`.
"""

from types import ModuleType

from tptrain.models.families import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)

FAMILIES: dict[str, ModuleType] = {
    "gemma2": gemma,
    "gemma3_text": gemma,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "olmo2": olmo2,
    "olmo3": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
}
