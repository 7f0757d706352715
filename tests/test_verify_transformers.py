"""`verify` of models of Transformers: right ones are found right, and each fault is found in its module, with its kind.

The reference is a plain model in this process; the faults are brought about on two ranks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import wide
from tests.distributed import mesh, run_ranks
from tptrain.config import Config, ModelConfig
from tptrain.config.schema import ParallelConfig, VerifyConfig
from tptrain.models.cut import BATCHES, SEQUENCES, cut_of
from tptrain.nn.parameter import Parameter, parameters
from tptrain.ops.table import REFERENCE
from tptrain.verify.compare import Comparison
from tptrain.verify.prove import prove, write_reference
from tptrain.verify.reference import Reference
from tptrain.verify.step import token_ids

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
TP = 2
EXPERTS, CHOSEN = 4, 2  # of Mixtral's small model: all, and of a token
AS_ONE = {"layers.*.mlp.experts.gate_up_proj": "colwise"}  # where Mixtral's plan has packed_colwise


def _models() -> dict[str, ModelConfig]:
    """By name: Mixtral, tied; the same with a wrong plan; Qwen3 with biases; OPT, whose layers have a linear of which
    two ranks have as many features each as the model is wide.
    """
    from tests import zoo

    mixtral = zoo.config("mixtral", vocab_size=300, tie_word_embeddings=True).to_dict()
    qwen3 = zoo.config("qwen3", vocab_size=300, attention_bias=True, num_key_value_heads=1).to_dict()
    opt = zoo.config("opt", vocab_size=300)
    opt.ffn_dim = TP * opt.hidden_size
    opt = opt.to_dict()
    return {
        "mixtral": ModelConfig(path="DIR", engine="transformers", source=mixtral),
        "mixtral, as one": ModelConfig(path="DIR", engine="transformers", source=mixtral, tp_plan=AS_ONE),
        "qwen3": ModelConfig(path="DIR", engine="transformers", source=qwen3),
        "opt": ModelConfig(path="DIR", engine="transformers", source=opt),
    }


def _config(model: ModelConfig) -> Config:
    from tptrain.hf.resolve import resolve, resolve_cut

    model.facts = resolve(None, model.source, model.tp_plan, None, TP)
    model.facts["cut"] = resolve_cut(model.source, model.tp_plan, None, tp=TP)
    return Config(model=model, parallel=ParallelConfig(tp=TP), verify=VerifyConfig(weights="random"))


# --------------------------------------------------------------------------------------------------------------- faults


def _no_router_gradient() -> AbstractContextManager:
    right = Parameter.add_grad

    def add_grad(self: Parameter, grad: Tensor) -> None:
        right(self, grad * 0 if self.sharding.shape[0] == EXPERTS and len(self.sharding.shape) == 2 else grad)

    return patch.object(Parameter, "add_grad", add_grad)


def _router_not_entered() -> AbstractContextManager:
    """The experts' weights of a token, (N, CHOSEN), get the gradient of this rank's features alone."""
    from tptrain.hf import region

    right = region._Enter.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, None, None) if grad.shape[-1] == CHOSEN else right(ctx, grad)

    return patch.object(region._Enter, "backward", staticmethod(backward))


def _rope_lost() -> AbstractContextManager:
    from tptrain.hf import model

    right = model.fill_buffers

    def fill_buffers(inner: Any, device: torch.device) -> None:
        right(inner, device)
        for name, buffer in inner.named_buffers():
            if name.endswith("inv_freq"):
                buffer.zero_()

    return patch.object(model, "fill_buffers", fill_buffers)


def _expert_off_by_one() -> AbstractContextManager:
    """The last expert's columns, on the second rank, are those from one column before."""
    from tptrain.verify import transformers

    right = transformers.random_values

    def random_values(name: str, p: Parameter, seed: int, centre: float = 0.0) -> Tensor:
        values, layout = right(name, p, seed, centre), p.sharding
        if name == "model.layers.1.mlp.experts.down_proj" and layout.offsets[2] > 0:
            p.sharding = dataclasses.replace(layout, offsets=(0, 0, layout.offsets[2] - 1))
            values[-1] = right(name, p, seed, centre)[-1]
            p.sharding = layout
        return values

    return patch.object(transformers, "random_values", random_values)


def _experts_in_another_order() -> AbstractContextManager:
    from tptrain.verify import transformers

    right = transformers.random_values

    def random_values(name: str, p: Parameter, seed: int, centre: float = 0.0) -> Tensor:
        values = right(name, p, seed, centre)
        return values.flip(0) if name == "model.layers.0.mlp.experts.gate_up_proj" else values

    return patch.object(transformers, "random_values", random_values)


def _untied() -> AbstractContextManager:
    from tptrain.hf import model

    right = model.build

    def build(*arguments: Any) -> Any:
        inner = right(*arguments)
        inner.lm_head.weight = torch.nn.Parameter(torch.empty_like(inner.lm_head.weight))
        return inner

    return patch.object(model, "build", build)


def _no_sum_behind_experts() -> AbstractContextManager:
    from tptrain.hf import region

    return patch.object(region._Leave, "forward", staticmethod(lambda ctx, x, group: x.clone()))


def _unsummed(name: str) -> Callable[[], AbstractContextManager]:
    """A parameter whose gradient is not summed over the ranks."""

    @contextmanager
    def fault() -> Iterator[None]:
        from tptrain.hf.model import TransformersModel

        right = TransformersModel.settle

        def settle(self: TransformersModel) -> None:
            right(self)
            p = dict(parameters(self))[name]
            assert p.sharding.summed, f"{name} is summed over no axis"
            p.sharding = dataclasses.replace(p.sharding, summed=())

        with patch.object(TransformersModel, "settle", settle):
            yield

    return fault


def _bias_on_every_rank() -> AbstractContextManager:
    from tptrain.hf.region import Region

    right = Region.row

    def row(self: Region, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        y = right(self, x, weight, bias)
        return y if bias is None else y + bias.detach()

    return patch.object(Region, "row", row)


# model, fault: what makes it, and the module and the beginning of the kind that are to be named
FAULTS: dict[tuple[str, str], tuple[Callable[[], AbstractContextManager], str, str]] = {
    ("mixtral", "router without a gradient"): (
        _no_router_gradient,
        "model.layers.1.mlp.gate.weight",
        "absent: zero on this rank",
    ),
    ("mixtral", "router not entered"): (
        _router_not_entered,
        "model.layers.1.mlp.gate.weight",
        "a sum over tp is missing",
    ),
    ("mixtral", "rope lost"): (
        _rope_lost,
        "model.rotary_emb.inv_freq",
        "a buffer that is not what follows from the config",
    ),
    ("mixtral", "expert off by one"): (
        _expert_off_by_one,
        "model.layers.1.mlp.experts.down_proj",
        "a wrong slice: column 47 of the whole lies where column 48 belongs, in matrix 3",
    ),
    ("mixtral", "experts in another order"): (
        _experts_in_another_order,
        "model.layers.0.mlp.experts.gate_up_proj",
        "a wrong slice: matrix 3 of the whole lies where matrix 0 belongs",
    ),
    ("mixtral", "tied weights apart"): (_untied, "lm_head.weight", "one rank has no such parameter: tied weights"),
    ("mixtral", "no sum behind experts"): (
        _no_sum_behind_experts,
        "model.layers.0.mlp",
        "a sum over tp is missing",
    ),
    ("mixtral, as one", "gate|up cut as one"): (
        nullcontext,
        "model.layers.0.mlp",
        "gate_up_proj holds gate and up, and is cut as one matrix",
    ),
    ("qwen3", "q_norm unsummed"): (
        _unsummed("model.layers.1.self_attn.q_norm.weight"),
        "model.layers.1.self_attn.q_norm.weight",
        "a sum over tp is missing",
    ),
    ("qwen3", "k_norm unsummed"): (
        _unsummed("model.layers.0.self_attn.k_norm.weight"),
        "model.layers.0.self_attn.k_norm.weight",
        "a sum over tp is missing",
    ),
    ("qwen3", "bias on every rank"): (
        _bias_on_every_rank,
        "model.layers.0.self_attn",
        "off by the same vector at every token: a bias",
    ),
}
RIGHT = {"mixtral": "model.layers", "qwen3": "model.layers", "opt": "model.decoder.layers"}  # where its layers are
# Of tests/wide.py: latent heads and experts, layers with heads of their own, heads as a share of the width, linear
# attention, state spaces, a list of rotary factors. The others there were right as well.
NARROWER = ("deepseek_v3", "gemma4_text", "gpt2", "qwen3_next", "falcon_h1", "phi3")


# ---------------------------------------------------------------------------------------------------------------- proof


def _tokens(config: Config) -> Tensor:
    return token_ids(cut_of(config), SEQUENCES * BATCHES, config.train.seed)


def _on_ranks(configs: dict[str, Config], folder: Path) -> dict[tuple[str, str], list[Comparison]]:
    from tptrain.verify.transformers import TransformersStep

    assert dist.get_world_size() == TP
    results = {}
    for name, fault in [*((name, "none") for name in (*RIGHT, *NARROWER)), *FAULTS]:
        config, small = configs[name], cut_of(configs[name])
        with FAULTS[name, fault][0]() if fault != "none" else nullcontext():
            grid = mesh(TP, small.spec.kv_heads, shared=True)
            step = TransformersStep(small, config, grid, REFERENCE)
            reference = Reference(folder / name)
            results[name, fault] = prove(step, _tokens(config), reference, grid, torch.float32)
    return results


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Comparison]]:
    """Of right models and of every fault, on two ranks."""
    from tptrain.verify.transformers import PlainStep

    folder = tmp_path_factory.mktemp("references")
    configs = {name: _config(model) for name, model in _models().items()}
    configs |= {family: wide.config(family) for family in NARROWER}
    for name, config in configs.items():
        (folder / name).mkdir()
        step = PlainStep(cut_of(config), config, torch.device("cpu"))
        write_reference(step, _tokens(config), Reference(folder / name))
    return run_ranks(TP, _on_ranks, configs, folder)[0]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_is_right(proofs: dict[tuple[str, str], list[Comparison]], name: str) -> None:
    items = proofs[name, "none"]
    assert [each for each in items if not each.right] == []
    named = {each.module for each in items}
    assert {"embedding", f"{RIGHT[name]}.1", f"{RIGHT[name]}.0.self_attn", "lm_head", "loss", "gradient norm"} <= named
    assert {each.what for each in items if each.module == f"{RIGHT[name]}.1.self_attn.q_proj.weight"} == {
        "at the start",
        "gradient",
        "after the step",
    }


@pytest.mark.parametrize("family", NARROWER)
def test_a_narrower_model_is_right(proofs: dict[tuple[str, str], list[Comparison]], family: str) -> None:
    items = proofs[family, "none"]
    assert [each for each in items if not each.right] == []
    assert {"output", "gradient", "after the step"} <= {each.what for each in items}


@pytest.mark.parametrize("place", FAULTS, ids=lambda place: place[1])
def test_a_fault_is_named(proofs: dict[tuple[str, str], list[Comparison]], place: tuple[str, str]) -> None:
    first = next(each for each in proofs[place] if not each.right)
    _, name, kind = FAULTS[place]
    assert (first.module, first.kind[: len(kind)]) == (name, kind), first


# ------------------------------------------------------------------------------------------------------------- the cut


def test_layers_that_need_each_other_are_all_kept() -> None:
    from tests import zoo
    from tptrain.hf.cut import stack
    from tptrain.hf.model import build

    alone, together = (zoo.config("gemma4_text", **changes) for changes in ({"num_kv_shared_layers": 0}, {}))
    alone.hidden_size_per_layer_input = 0
    assert stack(build(alone)).name == "model.layers"
    assert stack(build(together)).name == ""


def test_sizes_that_a_layer_has_for_itself_go_with_it() -> None:
    from tests import zoo
    from tptrain.hf.cut import keep_layers
    from tptrain.hf.model import build

    changes = {"num_hidden_layers": 6, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    inner = build(zoo.config("gemma4_text", **changes, layer_types=kinds))
    keep_layers(inner, "model.layers", (0, 5))
    assert [inner.config.per_layer_config[i].head_dim for i in range(2)] == [8, 16]


def test_padding_is_in_a_smaller_vocabulary() -> None:
    from tests import zoo
    from tptrain.hf.model import build, read_config

    config = read_config(zoo.config("phi3", pad_token_id=200).to_dict(), None, 100)
    assert build(config).get_input_embeddings().padding_idx == 99
