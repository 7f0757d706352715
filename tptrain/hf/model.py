"""A Transformers model as a model of ours: built without memory, sharded, and run as one segment.

Shapes: see nn/decoder.py.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tptrain.config import Config, UserError
from tptrain.config.schema import ModelConfig, padded_vocab_size
from tptrain.hf.attention import use_ours
from tptrain.hf.corrections import corrected
from tptrain.hf.cut import keep_layers, stack
from tptrain.hf.gradients import gradient_kinds, noted_modules, receive, refuse, summed_over
from tptrain.hf.head import Head, LogitRule, logit_rule
from tptrain.hf.plan import Plan, with_user_entries
from tptrain.hf.propose import cuts_layers, proposal
from tptrain.hf.shard import Sharder
from tptrain.nn.context import Context
from tptrain.nn.cross_entropy import OutputHead
from tptrain.nn.decoder import Segment, Stream
from tptrain.nn.parameter import parameters
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh, tp_grid

UNLIMITED = 2**31  # positions
PROBE = 64  # tokens of the forward pass that is only looked at


class TransformersModel(nn.Module):
    """Transformers' modelling code with its parameters, and linears, embedding and collectives of ours.

    Parameters carry Transformers' names. They have no memory until a `Store` gives them theirs; call `settle` then.
    """

    proposed: Plan  # what of the plan is neither the model's nor the user's: to be checked before training

    def __init__(
        self,
        config: Any,
        mesh: Mesh,
        user_plan: Plan | None = None,
        recompute: bool = False,
        layers: tuple[int, ...] | None = None,
        ops: Operations | None = None,
        propose: bool | None = None,
    ) -> None:
        """`config`: transformers' PreTrainedConfig; `recompute`: layers are computed again in the backward pass;
        `layers`: those of the model that there are, where not all; `ops`: what computes attention, if not Transformers.

        `propose`: whether cuts are proposed for what the plan leaves whole; None: where it cuts no layer at all.
        """
        super().__init__()
        self.mesh, text = mesh, config.get_text_config()
        self.vocab_size = text.vocab_size
        self.inner = inner = build(config, layers)
        self.shapes = {name: tuple(value.shape) for name, value in inner.state_dict().items()}  # whole, as modules have
        embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise UserError(
                f"model.path: {type(inner).__name__} has no embedding and output head that are ours to cut."
            )
        if type(head).forward is not nn.Linear.forward:
            raise UserError(f"model.path: the output head of {type(inner).__name__} is more than a linear.")
        names = {module: name for name, module in inner.named_modules()}
        rows = padded_vocab_size(self.vocab_size)
        vocabulary = {names[each]: rows for each in (embedding, head) if len(each.weight) == self.vocab_size}
        named = [*names.values(), *(name for name, _ in inner.named_parameters())]
        prefix = names[embedding].rpartition(".")[0]  # of the decoder, whose layers a plan names
        plan = corrected(inner.tp_plan or {}, config, prefix)
        plan = with_user_entries(plan, user_plan or {}, named, prefix)
        wanted = not cuts_layers(plan, named) if propose is None else propose
        self.proposed = proposal(inner, plan, mesh.grid, prefix) if wanted else {}
        self.plan: Plan = {**plan, **self.proposed}
        self.vocabulary_modules = [module for module, name in names.items() if name in vocabulary]
        self.region = Sharder(inner, self.plan, mesh, vocabulary, prefix).shard()
        if ops is not None:
            use_ours(inner, ops)
        self.lm_head = Head(head)
        _check_cut(self.lm_head, self.vocab_size)
        self.rule = LogitRule()
        fill_buffers(inner, mesh.device)
        if recompute:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        inner.train()

    def named_parameters(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_parameters(*arguments, **named)

    @cached_property
    def whole(self) -> Any:
        """The same model, not cut and without memory: what conversions of a directory's tensors read sizes of."""
        return build(self.inner.config)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Parameters whose rows are the vocabulary."""
        own = {id(p) for module in self.vocabulary_modules for p in module.parameters(recurse=False)}
        return tuple(name for name, p in parameters(self) if id(p) in own)

    def settle(self) -> None:
        """Once the weights have memory, of whatever values: find out over which axes gradients are sums, and what is
        done to logits. Runs a forward pass. Raises UserError for a plan with a mistake.
        """
        tokens = torch.arange(min(PROBE, self.max_positions), device=self.mesh.device).unsqueeze(0) % self.vocab_size
        names = {id(p): name for name, p in self.named_parameters()}
        with torch.enable_grad(), noted_modules(self.inner) as modules, self._plan_blamed():
            x, self.rule = logit_rule(self.inner, self.lm_head, tokens)
            self.region.forget()
        kinds = gradient_kinds(x, modules, lambda p: names.get(id(p), ""))
        heads = {id(p) for p in self.lm_head.linear.parameters(recurse=False)}
        for name, p in parameters(self):
            p.sharding = replace(p.sharding, summed=summed_over(p, kinds))
            if p.requires_grad:
                known = id(p) in kinds or id(p) in heads
                p.register_post_accumulate_grad_hook(receive if known else partial(refuse, name))  # type: ignore[arg-type]

    @contextmanager
    def _plan_blamed(self) -> Iterator[None]:
        """Shapes that do not fit are a mistake of the plan. Raises UserError."""
        try:
            yield
        except (RuntimeError, IndexError) as error:
            text = str(error).splitlines()[0]
            if not re.search("size|shape|dimension|index", text):
                raise
            raise UserError(
                f"parallel.tp={self.mesh.size('tp')}: {type(self.inner).__name__} does not work as its plan cuts it: "
                f"{text}. Choose another tp, or give model.tp_plan entries that keep the module whole (replicate)."
            ) from error

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (N, D), the head's input."""
        x = self.lm_head.input_of(self.inner, tokens)  # (B, T, D)
        self.region.forget()
        x = x.flatten(0, 1)  # (N, D)
        return x if self.rule.scale == 1.0 else x * self.rule.scale

    @property
    def output_head(self) -> OutputHead:
        return OutputHead(self.lm_head.weight, self.vocab_size, self.rule.cap, self.lm_head.bias)

    @property
    def max_positions(self) -> int:
        return max_positions(self.inner.config)

    def last_input(self) -> Tensor:
        """The head's input in the last column of the inner model's last forward pass, as `logits` takes it: (B, D)."""
        x = self.lm_head.input
        assert x is not None, "the model has not called its head"
        return x[:, -1] * self.rule.scale

    def logits(self, x: Tensor) -> Tensor:
        """(N, D), the head's input -> (N, V/tp), this rank's columns of the padded vocabulary."""
        return self.rule.capped(x @ self.lm_head.weight.t() + (0 if self.lm_head.bias is None else self.lm_head.bias))

    def context(self, tokens: Tensor) -> Context:
        return Context(tokens.shape[1], tokens.device, {})

    def segments(self, recompute: str = "none") -> list[Segment]:
        """The whole forward pass as one segment; what is computed again is so within it."""
        everything = [p for _, p in self.named_parameters()]
        return [Segment("model", everything, lambda stream, _: Stream(self(stream.x)))]

    def unit_of(self, name: str) -> str:
        """The unit of memory that a parameter belongs to: a numbered layer, or the rest."""
        layer = re.match(r"(.*?\.\d+)\.", name)
        return layer[1] if layer else "rest"


def of_config(config: Config, mesh: Mesh, ops: Operations) -> TransformersModel:
    """The model of a run's config."""
    model = config.model
    if not mesh.is_main:
        transformers.logging.set_verbosity_error()  # its warnings come once
    source = read_config(model.source, model.dropout)
    return TransformersModel(source, mesh, model.tp_plan, config.train.recompute == "full", ops=ops)


def on_meta(model: ModelConfig, config: Any = None, layers: tuple[int, ...] | None = None) -> TransformersModel:
    """A whole model on no device, for the shapes of its parameters; `config`: Transformers', where it is another."""
    config = read_config(model.source, model.dropout) if config is None else config
    return TransformersModel(config, Mesh(tp_grid(1, 1, 1), 0, torch.device("meta")), model.tp_plan, layers=layers)


def read_config(source: Mapping[str, Any], dropout: float | None, vocab: int | None = None) -> Any:
    """Transformers' config out of the content of a config.json; `vocab` cuts the vocabulary.

    Raises UserError for one that Transformers does not know, or that asks for what is not trained here.
    """
    kind = str(source.get("model_type"))
    if source.get("quantization_config") is not None:
        raise UserError("model.path: its weights are quantized. Name the directory of the original weights.")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"model.path: config.json has model_type={kind!r}, which neither tptrain nor Transformers "
            f"{transformers.__version__} knows. Code out of a model's directory is never run."
        )
    plain = transformers.PreTrainedConfig._decode_special_floats(dict(source))  # infinity, as their files write it
    config = transformers.CONFIG_MAPPING[kind].from_dict(plain)
    text = config.get_text_config()
    noisy = [name for name, value in vars(text).items() if _is_noise(name) and isinstance(value, float) and value > 0]
    if noisy and dropout != 0:
        raise UserError(
            f"model.path: config.json has {noisy[0]}={getattr(text, noisy[0])}, and Transformers' models are trained "
            "without. Add model.dropout=0."
        )
    for name in noisy:
        setattr(text, name, 0.0)
    if getattr(text, "output_router_logits", False):
        raise UserError(
            "model.path: config.json has output_router_logits=true, a loss of the routers that is not computed here. "
            "Set it to false in a copy of the model."
        )
    if vocab is not None:
        text.vocab_size = min(vocab, text.vocab_size)
        if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:  # an embedding has it
            text.pad_token_id = text.vocab_size - 1
    return config


def _is_noise(name: str) -> bool:
    return "dropout" in name or name.endswith(("_pdrop", "jitter_noise"))


def kv_heads(config: Any) -> int:
    """Heads of keys of a model, which its ranks share where they are fewer; as many as the heads of queries where the
    config does not say.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    return heads if getattr(text, "kv_lora_rank", None) else getattr(text, "num_key_value_heads", None) or heads


def max_positions(config: Any) -> int:
    """Of a model; very many where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def build(config: Any, layers: tuple[int, ...] | None = None) -> Any:
    """The causal language model of a config, on the meta device; `layers`: the ones that it keeps, where not all."""
    inner = _built(config)
    if layers is not None:
        keep_layers(inner, stack(inner).name, layers)
    return inner


def _built(config: Any) -> Any:
    config = copy.deepcopy(config)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # Transformers before 5.21 takes SDPA, which leaves the cap out
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if type(config) is getattr(named, "config_class", None):
            return named._from_config(config, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _check_cut(head: Head, vocab_size: int) -> None:
    """Each rank's columns of the logits are its own. Raises UserError where several ranks have the same."""
    layout = head.weight.sharding
    if layout.copies > 1:
        raise UserError(
            f"model.tp_plan: the output head has {layout.shape[0]} rows, for a vocabulary of {vocab_size}, and no "
            "style cuts them. Add one: lm_head: colwise."
        )


def fill_buffers(model: Any, device: torch.device) -> None:
    """Buffers that follow from the config, such as rotary frequencies, are computed; the weights are not touched."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=device)
    for p in model.parameters():
        p._is_hf_initialized = True
    model.initialize_weights()
