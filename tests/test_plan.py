"""`plan`: the dry run, held to a closed form, to published sizes and to real ranks; and the report."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import llama
from tests.distributed import mesh, run_ranks
from tests.models import training
from tests.reference import CASES
from tptrain.config import UserError, load_config
from tptrain.config.load import config_dir
from tptrain.config.schema import kv_heads
from tptrain.models.cost import CHECKPOINT_BYTES
from tptrain.models.settings import decoder_spec
from tptrain.nn.decoder import parameter_count
from tptrain.nn.store import adjacent
from tptrain.ops.choose import planned
from tptrain.ops.table import REFERENCE, Operations
from tptrain.parallel.mesh import tp_grid
from tptrain.plan.dry_run import LiveBytes, dry_run, meta_mesh
from tptrain.plan.report import plan, ring_seconds, tp_degrees
from tptrain.plan.summary import summary

GPU = Operations("torch.compile", "cuda")
GROUPS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml") if file.stem != "hf")
MODELS = {name: case.ours for name, case in CASES.items()}
MODELS |= {name: load_config([f"model={name}"]).model for name in GROUPS}
DEGREES = [(name, tp) for name, model in MODELS.items() for tp in tp_degrees(model)[0] if tp <= 16]


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808 + (50304 - 50257) * 768),  # and the padding of its vocabulary
        ("llama3_1b", 1_235_814_400),
        ("llama3_3b", 3_212_749_824),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, published: int) -> None:
    assert parameter_count(decoder_spec(MODELS[name])) == published


@pytest.mark.parametrize("name", ["tiny", "gpt2", "llama_mqa_tied_geglu"])
def test_a_checkpoint_holds_weights_and_two_moments(name: str) -> None:
    blocks = training(MODELS[name], meta_mesh(tp_grid(1, 1, 1), Counter())).optimizer.state.blocks
    elements = sum(piece.place.stop - piece.place.start for block in blocks for piece in block.pieces)
    assert CHECKPOINT_BYTES * parameter_count(decoder_spec(MODELS[name])) == 4 * 3 * elements
    assert all(len(block.moments) == 2 for block in blocks)


@pytest.mark.parametrize(("name", "tp"), DEGREES)
def test_qkv_and_gate_up_are_one_product_each(name: str, tp: int) -> None:
    """Matrix products of a step of two layers, on meta tensors: qkv, o, gate|up (or up), down and the head, each for
    the forward pass, the input gradient and the weight gradient.
    """
    model = replace(MODELS[name], num_hidden_layers=2)
    tiny = training(model, meta_mesh(tp_grid(tp, tp, kv_heads(model)), Counter()))
    products: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        tiny.backward(torch.zeros(1, 9, dtype=torch.long, device="meta"), 1.0)
    assert sum(products[name] for name in ("mm", "addmm", "addmm_")) == 3 * (4 * 2 + 1)


@pytest.mark.parametrize("name", GROUPS)
def test_joined_weights_lie_together_in_every_layer(name: str) -> None:
    model, tp = MODELS[name], tp_degrees(MODELS[name])[0][-1]
    tiny = training(model, meta_mesh(tp_grid(tp, tp, kv_heads(model)), Counter()))
    units = [block.unit for block in tiny.store.blocks]
    assert units == ["embedding", *(f"layers.{i}" for i in range(model.num_hidden_layers)), "head"]
    for module in tiny.model.modules():
        for run in getattr(module, "joined", ()):
            assert len(adjacent(run)) == sum(len(p) for p in run)  # asserts that they are adjacent


# --------------------------------------------------------------------------------------------------- the closed form


LLAMAS: dict[str, tuple[list[str], int, int]] = {  # overrides, tp, dp
    "float32": (["model.num_key_value_heads=8", "train.micro_batch_size=2"], 1, 1),
    "grouped queries in float32": (["model=llama3_1b", "train=pretrain", "train.precision=fp32"], 2, 1),
    "tied": (["model=llama3_1b", "train=pretrain"], 4, 2),
    "8b": (["model=llama3_8b", "train=pretrain"], 8, 4),
    "8b, sequence parallel": (["model=llama3_8b", "train=pretrain", "parallel.sequence_parallel=true"], 8, 1),
    "selective recomputation": (["model=llama3_8b", "train=pretrain", "train.recompute=selective"], 8, 1),
    "overlap": (["model=llama3_8b", "train=pretrain", "train.micro_batch_size=2", "parallel.overlap=true"], 8, 1),
    "full recomputation": (["model=llama3_8b", "train=pretrain", "train.recompute=full"], 4, 1),
    "zero off": (["model=llama3_1b", "train=pretrain", "parallel.zero=0"], 2, 4),
}


@pytest.mark.parametrize("case", LLAMAS)
def test_the_dry_run_is_the_closed_form_of_a_llama(case: str) -> None:
    overrides, tp, dp = LLAMAS[case]
    config = load_config(overrides)
    run, form = dry_run(config, tp, dp, GPU), llama.ClosedForm(config, tp, dp)
    assert run.parameters == form.parameters
    padding = 64 * dp * 4 * 4 * (config.model.num_hidden_layers + 2)  # bytes at most, of blocks cut into dp parts
    assert 0 <= run.weights + run.gradients + run.optimizer - form.state <= padding
    assert run.activations == pytest.approx(form.activations, rel=0.01)
    assert run.calls == form.calls


RECOMPUTE = ("none", "selective", "full")


def _peaks(tp: int) -> list[tuple[int, int]]:
    """The peak of a real step on this rank, by the same count of live tensors, and that of the dry run, for each of
    RECOMPUTE.
    """
    lines = ["train.precision=bf16", "train.device=cpu", "train.compile=none", "train.micro_batch_size=4"]
    peaks = []
    for recompute in RECOMPUTE:
        config = load_config([*lines, f"parallel.tp={tp}", f"train.recompute={recompute}"])
        grid = mesh(tp, kv_heads(config.model))
        ids = torch.zeros(4, config.train.seq_len + 1, dtype=torch.long)
        with LiveBytes() as live:
            tiny = training(config.model, grid, dtype=torch.bfloat16, recompute=recompute)
            tiny.backward(ids, 1.0)
        peaks.append((live.peak, dry_run(config, tp, 1, REFERENCE).peak))
        del tiny
    return peaks


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_dry_run_has_the_peak_of_a_real_step(tp: int) -> None:
    for peaks in run_ranks(tp, _peaks, tp):
        for recompute, (real, dry) in zip(RECOMPUTE, peaks, strict=True):
            assert dry == pytest.approx(real, rel=0.05), recompute


def test_a_ring_sends_each_byte_twice_but_for_a_rank() -> None:
    assert ring_seconds(1e9, 1, 1e9) == 0
    assert ring_seconds(1e9, 2, 1e9) == 1
    assert ring_seconds(1e9, 8, 1e9) == pytest.approx(1.75)


# --------------------------------------------------------------------------------------------------------------- report


def test_legal_degrees_of_eight_heads() -> None:
    legal, refused = tp_degrees(load_config(["model=tiny"]).model)
    assert (legal, refused) == ([1, 2, 4, 8], [])
    legal, refused = tp_degrees(load_config(["model=tiny", "model.intermediate_size=516"]).model)
    assert legal == [1, 2, 4]
    assert refused == ["parallel.tp=8: does not divide model.intermediate_size=516. Use a divisor."]


def test_the_report_says_all_of_it_in_plain_lines() -> None:
    report = plan(load_config(["model=llama3_8b", "train=pretrain", "cluster.tasks_per_node=8", "cluster.nodes=2"]))
    lines = report.splitlines()
    assert "8,030.3 M parameters" in lines[0]
    assert "89.75 GiB" in lines[0]
    # Two are kept, and a third is written.
    assert "every 100 steps (checkpoint.every), the newest 2 of them kept: up to 269.24 GiB of disk" in lines[1]
    table = [line.split() for line in lines if line[:2].strip().isdigit()]
    assert [row[0] for row in table] == [str(2**i) for i in range(6)] * 2, "each table has a row for each legal tp"
    assert [row[1] for row in table[6:]] == ["16", "8", "4", "2", "1", "-"], "dp is what tp leaves of the 16 ranks"
    assert table[3][-2:] == ["17.19", f"{89.75 / 16:.2f}"], "the peak, and a sixteenth of the state on the host"
    assert any(line.startswith("parallel.tp=32: does not divide the 16 ranks") for line in lines)
    assert any(line.startswith("a TP group that spans nodes (here: tp > 8)") for line in lines)
    assert "450 GB/s" in report
    assert "50 GB/s" in report
    assert "\x1b" not in report


def test_reasons_are_one_line_each() -> None:
    report = plan(load_config(["model=gpt2"])).splitlines()
    assert sum(line.startswith("parallel.tp=8: does not divide model.num_attention_heads=12.") for line in report) == 1
    crowded = ["cluster.tasks_per_node=8", "train.global_batch_size=8", "train.micro_batch_size=4"]
    report = plan(load_config(crowded)).splitlines()
    assert any(line.startswith("parallel.tp=2: train.global_batch_size=8: not divisible") for line in report)


def test_a_mistake_in_the_model_is_a_users_error() -> None:
    with pytest.raises(UserError, match="num_key_value_heads=3"):
        plan(load_config(["model.num_key_value_heads=3"]))


def test_the_line_of_a_launch_has_the_figures_of_the_plan() -> None:
    config = load_config(["model=tiny", "parallel.tp=2"])
    run = dry_run(config, 2, 1, planned(config))
    text = summary(config)
    assert f"{run.peak / 2**20:,.2f} MiB of memory a rank" in text
    assert f"{sum(n for (_, axis, _), n in run.calls.items() if axis in ('tp', 'kv')):,} collectives over tp" in text


@pytest.mark.parametrize("shapes", [((12, 8), (3, 8, 4)), ((8, 12), (12, 4)), ((3, 4, 8), (3, 8, 4))])
def test_products_of_experts_have_the_shapes_of_real_ones(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """In float32, for which torch has no rule on the meta device: forward, and to the weights' gradients."""
    offs = torch.tensor([4, 8, 12], dtype=torch.int32) if len(shapes[0]) == 2 else None
    x, y = (torch.randn(shape) for shape in shapes)
    real = torch.nn.functional.grouped_mm(x, y, offs=offs)
    with LiveBytes() as live:
        ends = None if offs is None else offs.to("meta")
        planned = torch.nn.functional.grouped_mm(x.to("meta"), y.to("meta"), offs=ends)
    assert planned.shape == real.shape
    assert live.peak >= real.nbytes
