"""A Transformers config of narrower layers, by the names that sizes have in configs. It keeps all numbers of heads, of
groups and of experts, and so is cut over ranks as the whole model is.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tptrain.config import UserError
from tptrain.models.cut import smaller_features
from tptrain.nn.parameter import Parameter, parameters

Widths = tuple[tuple[str, int, int], ...]  # field, its size in the model, and in the narrower one

FEATURES = re.compile(
    "(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|n_inner|latent_size|embed_dim|proj_dim"
    "|hidden_size_per_layer_input|lru_width|d_ssm|rank)$"
)
HEADS = re.compile("(head_dim|d_head|kv_channels|rotary_dim|state_size|d_state|d_rel)$")
ATTENTION_HEADS = ("head_dim", "swa_head_dim", "kv_channels")  # of which a share may be rotary
LATENT_HEADS = ("qk_nope_head_dim", "qk_rope_head_dim")
ROTARY_FACTORS = ("short_factor", "long_factor")  # one for each pair of rotary dims
# Sizes of something else than a layer's features.
KEPT = re.compile(
    "vocab|window|chunk|block|kernel|ngram|multiple|max_|position|d_conv$|conv1d_width|layer_group_size|dim_model_base"
)
A_SIZE = re.compile("size|dim|width|rank|channels|inner|embd|(^|_)d_")
TOWERS = re.compile("vision|image|audio|speech|talker|code_predictor")  # configs of parts that are not trained
LEAST_PAIRS = 2  # of a head's dims, as in tptrain's own models
RUNNING = (RuntimeError, ValueError, IndexError)  # errors of a forward pass
SHAPES = re.compile("size|shape|dimension|index|divisible|divide|multiple|split|broadcast", re.IGNORECASE)


@dataclass(frozen=True)
class _Sizes:
    """How the sizes of one config shrink."""

    text: Any
    width: int
    tp: int

    @property
    def ratio(self) -> float:
        return self.width / self.text.hidden_size

    def of(self, name: str, value: int) -> int:
        """Raises UserError for a size that is not known."""
        field, name = name, {field: alias for alias, field in self.text.attribute_map.items()}.get(name, name)
        if name == "hidden_size":
            return self.width
        if name == "qk_head_dim":
            return sum(self.of(part, getattr(self.text, part)) for part in LATENT_HEADS)
        if name == "mamba_d_ssm":
            return self.text.mamba_n_heads * self.of("mamba_d_head", self.text.mamba_d_head)
        if name in ROTARY_FACTORS:
            return max(LEAST_PAIRS, round(value * self.ratio))
        if HEADS.search(name):
            step = _head_step(self.text) if name in ATTENTION_HEADS else 2
            return min(value, max(LEAST_PAIRS * step, step * round(value * self.ratio / step)))
        if FEATURES.search(name):
            return min(value, smaller_features(value, self.ratio, self.tp))
        if value > 1 and A_SIZE.search(name) and not KEPT.search(name):
            raise UserError(
                f"verify.width={self.width}: the config of {self.text.model_type} has {field}={value}, a size of which "
                "tptrain does not know how it shrinks with the others. Leave verify.width out."
            )
        return value


def widths(config: Any, width: int, tp: int) -> Widths:
    """The sizes that shrink where the hidden size becomes `width`, in proportion. Raises UserError for a config with a
    size that is not known, or where heads are a share of the hidden size that comes out as no whole number.
    """
    text, smaller = config.get_text_config(), {}
    _check_heads(text, width)
    sizes = _Sizes(text, width, tp)

    def note(name: str, value: int) -> int:
        smaller[name, value] = sizes.of(name, value)
        return value

    _replace(text, note)
    return tuple((name, value, to) for (name, value), to in smaller.items() if to != value)


def narrow(config: Any, widths: Widths) -> None:
    """Put these sizes in their places."""
    to = {(name, value): smaller for name, value, smaller in widths}
    _replace(config.get_text_config(), lambda name, value: to.get((name, value), value))


@contextmanager
def blamed_on_width(width: int | None, model: str, kinds: tuple[type[Exception], ...] = RUNNING) -> Iterator[None]:
    """Errors of these kinds come of sizes that do not fit each other, which they do in the model as it is; of torch's
    only those that speak of sizes. Raises UserError.
    """
    try:
        yield
    except kinds as error:
        text = (str(error).splitlines() or [""])[0]
        if width is None or (isinstance(error, RuntimeError) and not SHAPES.search(text)):
            raise
        raise UserError(
            f"verify.width={width}: {model} does not work so narrow: {text.rstrip('.')}. A half or a quarter of its "
            "hidden size may do; otherwise leave verify.width out."
        ) from error


def _replace(owner: Any, size: Callable[[str, int], int]) -> None:
    """Put `size(name, value)` in the place of each number of a config, also where layers have their own."""
    spec = vars(owner).get("_heterogeneity_spec")
    for layer in () if spec is None else spec.per_layer_overrides.values():
        layer.update({name: _replaced(name, value, size) for name, value in layer.items()})
    for name, value in list(vars(owner).items()):
        if not name.startswith("_") and not TOWERS.search(name):
            vars(owner)[name] = _replaced(name, value, size)  # past checks that look at one field alone


def _replaced(name: str, value: Any, size: Callable[[str, int], int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        _replace(value, size)
    elif name in ROTARY_FACTORS and isinstance(value, (list, tuple)):
        return value[: size(name, len(value))]
    elif isinstance(value, (list, tuple)):
        return type(value)(_replaced(name, each, size) for each in value)
    elif isinstance(value, dict):
        return {key: _replaced(str(key), each, size) for key, each in value.items()}
    return size(name, value) if type(value) is int else value


def _check_heads(text: Any, width: int) -> None:
    """Where the config has no size of heads, it is hidden_size / num_attention_heads."""
    heads, own = getattr(text, "num_attention_heads", None), (*ATTENTION_HEADS, *LATENT_HEADS)
    if type(heads) is not int or text.hidden_size % heads or any(type(vars(text).get(name)) is int for name in own):
        return
    least = heads * _head_step(text)
    if width % least and text.hidden_size % least == 0:
        raise UserError(
            f"verify.width={width}: the {heads} heads of {text.model_type} are hidden_size / {heads} wide. "
            f"Use a multiple of {least}, or leave verify.width out."
        )


def _head_step(text: Any) -> int:
    """What divides the dims of heads, so that an even number of them is rotary."""
    shares = set(_rotary_shares(vars(text))) or {1.0}
    return lcm(*(next((n for n in range(2, 65, 2) if (n * share) % 2 == 0), 2) for share in shares))


def _rotary_shares(fields: Mapping[str, Any]) -> Iterator[float]:
    for name, value in fields.items():
        if name == "partial_rotary_factor" and value:
            yield value
        elif isinstance(value, dict):
            yield from _rotary_shares({str(key): each for key, each in value.items()})


def check_cuts_alike(whole: nn.Module, narrower: nn.Module, width: int) -> None:
    """Raises UserError where the narrower model has other parameters, or they are cut otherwise: it would be proof of
    another model.
    """
    cuts = [{name: _cuts(p) for name, p in parameters(model)} for model in (whole, narrower)]
    name = next((name for name in {**cuts[0], **cuts[1]} if cuts[0].get(name) != cuts[1].get(name)), None)
    if name is not None:
        raise UserError(
            f"verify.width={width}: {name} would be absent, or cut otherwise than in the whole model. "
            "Choose a larger one, or leave verify.width out."
        )


def _cuts(p: Parameter) -> tuple[Any, ...]:
    return len(p.sharding.shape), p.sharding.cuts, p.sharding.summed
