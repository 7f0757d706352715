"""A small random model of every causal family of Transformers that has a tensor-parallel plan, and of a few without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.zoo_table import ABSENT, OVERRIDES, PLANLESS, SIZES, TRANSFORMERS

BATCH, SEQ_LEN = 2, 24
OLDER = tuple(map(int, hf.__version__.split(".")[:2])) < TRANSFORMERS
LARGEST = 5_000_000  # parameters; a model with more has a size that was not overridden
LAYERS = 2  # at least; as many as there are kinds of layers
KV_HEADS: int = SIZES["num_key_value_heads"]
PER_LAYER = ("layer_types", "mlp_layer_types")


def plan(config_class: type[hf.PreTrainedConfig]) -> dict[str, str]:
    """The tensor-parallel plan of a config class, or of the first of its sub-configs that has one."""
    for owner in (config_class, *sub_configs(config_class).values()):
        if styles := getattr(owner, "base_model_tp_plan", None):
            return dict(styles)
    return {}


def sub_configs(config_class: type[hf.PreTrainedConfig]) -> dict[str, Any]:
    return getattr(config_class, "sub_configs", None) or {}


def config_classes() -> dict[str, type[hf.PreTrainedConfig]]:
    """By model type: the configs of causal models that have a plan, also those that are absent here."""
    return {each.model_type: each for each in MODEL_FOR_CAUSAL_LM_MAPPING if plan(each)}


def families() -> list[str]:
    return [family for family in config_classes() if family not in ABSENT]


def planless() -> dict[str, type[hf.PreTrainedConfig]]:
    """By model type: the configs of the causal models without a plan that are built here."""
    return {each.model_type: each for each in MODEL_FOR_CAUSAL_LM_MAPPING if each.model_type in PLANLESS}


def missing(family: str) -> str:
    """Why there is no small model of a family of the tables with an older Transformers; empty where there is one."""
    absent = OLDER and family not in config_classes() | planless()
    return f"Transformers {hf.__version__} has no {family} with a plan" if absent else ""


def skip_where_missing(*families: str) -> None:
    """Skip the test where one of these families is missing."""
    if reason := next(filter(None, map(missing, families)), ""):
        pytest.skip(reason)


def config(family: str, **changes: Any) -> hf.PreTrainedConfig:
    """A small config of `family`, without dropout, with at least one layer of every kind that the default has. Skips
    the test where the family is missing.

    `changes` are of the text model."""
    skip_where_missing(family)
    small = _small((config_classes() | planless())[family], changes)
    small._attn_implementation = "eager"
    return small


def _small(config_class: type[hf.PreTrainedConfig], changes: dict[str, Any]) -> hf.PreTrainedConfig:
    overrides = copy.deepcopy(OVERRIDES.get(config_class.model_type, {}))
    text = sub_configs(config_class).get("text_config")
    if text and plan(text):
        return _of(config_class, {"text_config": _small(text, changes)} | overrides)
    default = config_class()
    values = {name: value for name, value in SIZES.items() if _has(default, name)}
    for name, value in vars(default).items():
        noisy = "dropout" in name or name.endswith(("_pdrop", "jitter_noise"))
        if noisy and isinstance(value, float):
            values[name] = 0.0
    for name in PER_LAYER:
        if kinds := getattr(default, name, None):
            values[name] = list(dict.fromkeys(kinds))
    if _has(default, "kv_lora_rank") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # in latent attention each head has its own keys
    values |= overrides | changes
    if _has(default, "num_hidden_layers"):
        kinds = {name: values[name] for name in PER_LAYER if isinstance(values.get(name), list)}
        layers = values.setdefault("num_hidden_layers", max([LAYERS, *map(len, kinds.values())]))
        values |= {name: [each[i % len(each)] for i in range(layers)] for name, each in kinds.items()}
    return _of(config_class, {name: value for name, value in values.items() if value is not ...})


def _of(config_class: Callable[..., hf.PreTrainedConfig], values: dict[str, Any]) -> hf.PreTrainedConfig:
    return config_class(**values)


def _has(of: hf.PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(of, name)
    except Exception:  # some attributes vary over the layers, and reading them raises
        return True


def grouped(family: str) -> bool:
    """Whether heads of the small model share keys."""
    small = config(family).get_text_config()
    return not _has(small, "kv_lora_rank") and getattr(small, "num_key_value_heads", None) == KV_HEADS


def model(family: str, **changes: Any) -> hf.PreTrainedModel:
    """The family's small model in float32, every parameter and every saved buffer of zeros drawn."""
    small = config(family, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in _build(small).parameters())
    assert size <= LARGEST, f"{family} has {size:,} parameters: a size is not overridden"
    torch.manual_seed(0)
    built = _build(small).train()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() < 2 else 0.05))
        saved = built.state_dict()
        for name, buffer in built.named_buffers():
            if name in saved and buffer.is_floating_point() and not buffer.any():
                buffer.normal_(0, 0.1)  # such as the bias by which experts are chosen
    return built


def _build(small: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_config(copy.deepcopy(small), attn_implementation="eager", dtype=torch.float32)


def tokens() -> Tensor:
    """(B, T + 1), the same for all families."""
    return torch.randint(3, SIZES["vocab_size"], (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))


def loss_and_logits(of: hf.PreTrainedModel, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of the next token, and logits of (B, T, V)."""
    torch.manual_seed(2)  # of a router that draws experts: every rank draws the same
    logits = of(input_ids=batch[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), logits
