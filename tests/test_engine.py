"""A Transformers model in tptrain's hands computes what it computes in one process: loss, logits, every gradient."""

import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests import engine, zoo
from tests.engine import MUTATIONS, Reference, distances
from tests.test_zoo import STYLES
from tests.zoo_pool import Pool, lasting
from tptrain.config import UserError
from tptrain.hf import model
from tptrain.hf.gradients import PARTIAL, gradient_kinds, noted_modules
from tptrain.hf.model import TransformersModel, build
from tptrain.hf.region import Region
from tptrain.parallel.mesh import Mesh, tp_grid

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

TOLERANCE = 2e-5  # relative, in the 2-norm of each tensor, float32
BF16 = 2.0**-8  # what one rounding may change
WITH_BIASES = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
# The family and the changes of its config that show a mutation.
BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "drop the all-reduce of an entrance": ("llama", {}),
    "drop the all-reduce of a rotary key": ("deepseek_v2", {}),
    "drop the all-reduce of an exit": ("mixtral", {}),
    "keep partial gradients partial": ("qwen3", {}),
    "sum every whole gradient": ("llama", {}),
    "add the row-parallel bias on every rank": ("llama", WITH_BIASES),
    "cut packed matrices as one": ("mixtral", {}),
    "keep the number of queries to a key": ("llama", WITH_BIASES),
    "sum the gradient of a gather": ("olmo2", {}),
    "split without gathering the gradient": ("olmo2", {}),
    "count an identity expert on every rank": ("longcat_flash", {}),
    "gather in another order": ("olmo2", {}),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with lasting(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[Pool]:
    with lasting(4) as pool:
        yield pool


@functools.cache
def _reference(family: str, stepped: bool = False, **changes: Any) -> Reference:
    return engine.reference(family, stepped, **changes)


def _worst(by_rank: list[engine.Distances]) -> tuple[float, str]:
    """The largest distance over all ranks, and of what. A NaN counts as infinite."""
    return max((value if value == value else float("inf"), what) for each in by_rank for what, value in each.items())


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("family", sorted(set(STYLES.values())))
def test_a_family_of_each_style(two: Pool, family: str) -> None:
    distance, what = _worst(two.run(distances, _reference(family)))
    assert distance < TOLERANCE, what


@pytest.mark.parametrize("family", ["llama", "mixtral", "olmo2", "minimax_m3_vl_text"])
def test_two_kv_heads_on_four_ranks(four: Pool, family: str) -> None:
    right = _reference(family)
    assert right.config.get_text_config().num_key_value_heads == 2
    distance, what = _worst(four.run(distances, right))
    assert distance < TOLERANCE, what


def test_biases_and_one_kv_head(two: Pool) -> None:
    distance, what = _worst(two.run(distances, _reference("llama", **WITH_BIASES)))
    assert distance < TOLERANCE, what


def test_heads_of_values_of_another_size(two: Pool) -> None:
    distance, what = _worst(two.run(distances, _reference("mimo_v2_flash", v_head_dim=4)))
    assert distance < TOLERANCE, what


def test_an_optimizer_step(four: Pool) -> None:
    """Its norm counts each parameter once: slices, neighbours' copies of a KV head, and whole ones with partial
    gradients.
    """
    by_rank = four.run(distances, _reference("qwen3", stepped=True))
    distance, what = _worst(by_rank)
    assert distance < TOLERANCE, what
    assert any(each.startswith("step ") for each in by_rank[0])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_code_is_noticed(two: Pool, mutation: str) -> None:
    family, changes = BROKEN[mutation]
    distance, _ = _worst(two.run(distances, _reference(family, **changes), mutation))
    assert distance > 100 * TOLERANCE


def test_frozen_parameters(two: Pool) -> None:
    """Nothing below the lowest trained parameter needs a gradient, and no frozen one has one."""
    for frozen in ("self_attn.", "layers.0."):
        by_rank = two.run(functools.partial(distances, frozen=frozen), _reference("qwen3"))
        distance, what = _worst(by_rank)
        assert distance < TOLERANCE, what
        assert not [what for what in by_rank[0] if frozen in what]


def test_bf16(two: Pool) -> None:
    by_rank = two.run(functools.partial(distances, dtype=torch.bfloat16), _reference("llama"))
    distance, what = _worst(by_rank)
    assert distance < 8 * BF16, what
    assert all(each["loss"] < BF16 for each in by_rank)


# ----------------------------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_recomputed_layers_have_the_same_gradients(two: Pool, family: str) -> None:
    distance, what = _worst(two.run(functools.partial(distances, recompute=True), _reference(family)))
    assert distance < TOLERANCE, what


def test_recomputed_layers_sum_again_in_step(two: Pool) -> None:
    """Forward again: the sums of attention and FFN in each layer, on both ranks in the same order."""
    right = _reference("llama")
    plain, again = (two.run(functools.partial(engine.collectives, recompute=each), right) for each in (False, True))
    assert plain[0] == plain[1]
    assert again[0] == again[1]
    layers = right.config.num_hidden_layers
    batch, length = right.tokens.shape
    row = f"all_reduce tp {(batch, length - 1, right.config.hidden_size)}"
    assert plain[0].count(row) == 4 * layers  # forward and backward
    assert again[0].count(row) == 6 * layers
    assert len(again[0]) - len(plain[0]) == 2 * layers


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_plan_without_an_entrance_is_refused(two: Pool) -> None:
    plan = {"layers.*.self_attn.kv_a_proj_with_mqa": "replicate"}
    for refusal in two.run(engine.refusal, _reference("deepseek_v2"), plan):
        assert "model.tp_plan" in refusal
        assert "kv_a_proj_with_mqa" in refusal


def _unconnected(tp: int, kv_heads: int = 2) -> Mesh:
    """A rank's place on a mesh of ranks that are not there: enough to cut a model."""
    return Mesh(tp_grid(tp, tp, kv_heads), 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers.*.mlp.up_proj": "colwize"}, r"layers\.\*\.mlp\.up_proj is to be colwize, which is none of colwise,"),
        ({"norm": "sequence_parallel"}, "norm is to be sequence_parallel: parallel.sequence_parallel is for tptrain's"),
        ({"layers.*.mlp.upproj": "colwise"}, r"has no module or parameter layers\.\*\.mlp\.upproj"),
        ({"norm": "colwise"}, "model.norm is to be colwise, and LlamaRMSNorm is no linear"),
        ({"norm": "rowwise"}, "model.norm is to be rowwise, and LlamaRMSNorm is no linear"),
    ],
)
def test_a_plan_with_a_mistake_is_refused_by_name(plan: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformersModel(zoo.config("llama"), _unconnected(2), plan)


def test_sizes_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"tp=4: does not divide the 90 features of model\.layers\.0\.mlp\.\w+\.weight"):
        TransformersModel(zoo.config("llama", intermediate_size=90), _unconnected(4))
    heads = zoo.config("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6)
    with pytest.raises(UserError, match=r"tp=4: model\.layers\.0\.self_attn\.k_proj has 6 heads"):
        TransformersModel(heads, _unconnected(4, 6))


def test_a_head_that_is_not_cut_is_refused() -> None:
    """Its rows are not the vocabulary, so that only a style of the plan can cut them."""

    def wider(config: Any, *rest: Any) -> Any:
        built = build(config, *rest)
        built.lm_head = nn.Linear(64, 300, bias=False, device="meta")
        return built

    with patch.object(model, "build", wider):
        TransformersModel(zoo.config("llama"), _unconnected(2), {"lm_head": "colwise"})
        with pytest.raises(UserError, match="the output head has 300 rows, for a vocabulary of 256"):
            TransformersModel(zoo.config("llama"), _unconnected(2), {"lm_head": "replicate"})


# ----------------------------------------------------------------------------------------------- reading of the graph


SCALES = (1.5, 2.5, 3.5, 4.5, 5.5, 6.5)


class _Scales(nn.Module):
    """Numbers before, between and after a region's functions. `entered`: whether the region has its entrance."""

    def __init__(self, region: Region, entered: bool) -> None:
        super().__init__()
        self.region, self.entered = region, entered
        self.before, self.inside, self.after, self.unsplit, self.split, self.gathered = (
            nn.Parameter(torch.tensor(each)) for each in SCALES
        )

    def forward(self, x: Tensor) -> Tensor:
        """(D,) -> (D,)."""
        x = x * self.before
        y = self.region.enter(x)[0] if self.entered else x
        x = x + self.region.leave(y * self.inside) * self.after
        x = self.region.split(x * self.unsplit) * self.split
        return self.region.gather(x) * self.gathered


def _read(entered: bool) -> tuple[set[str], dict[str, float]]:
    """The parameters with partial gradients by the graph of a `_Scales`, and this rank's gradients of its sum."""
    scales = _Scales(Region(engine.mesh(2)), entered)
    with noted_modules(scales) as modules:
        output = scales(torch.arange(4.0))
    names = {id(p): name for name, p in scales.named_parameters()}
    kinds = gradient_kinds(output, modules, lambda p: names[id(p)])
    partial = {each for each, kind in kinds.items() if kind == PARTIAL}
    output.sum().backward()
    grads = {name: p.grad.item() for name, p in scales.named_parameters() if p.grad is not None}
    return {names[each] for each in partial}, grads


def test_partial_gradients_are_read_off_the_graph(two: Pool) -> None:
    """The output's sum is 6 b (1 + 2 i a) u s g of the numbers' first letters (before, inside, ...), for two ranks."""
    by_rank = two.run(_read, True)
    before, inside, after, unsplit, split, gathered = SCALES
    outer = 6 * before * unsplit * split * gathered
    total = outer * (1 + 2 * inside * after)
    right = {
        "before": total / before,
        "inside": outer * 2 * after,
        "after": outer * 2 * inside,
        "unsplit": total / unsplit,
        "split": total / split,
        "gathered": total / gathered,
    }
    for partial, grads in by_rank:
        assert partial == {"inside", "split"}
        assert {name: grads[name] for name in right.keys() - partial} == pytest.approx(
            {name: right[name] for name in right.keys() - partial}
        )
    for name in ("inside", "split"):
        assert sum(grads[name] for _, grads in by_rank) == pytest.approx(right[name])


def _missing_entrance() -> str:
    try:
        _read(False)
    except UserError as error:
        return str(error)
    return ""


def test_a_gradient_of_both_kinds_is_refused(two: Pool) -> None:
    for refusal in two.run(_missing_entrance):
        assert "complete in part and partial in part" in refusal
