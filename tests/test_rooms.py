"""One room for one change: a toy family, mixer, axis, schedule and operation, each added without touching others."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.distributed import gather_global, mesh, run_ranks
from tests.models import training
from tptrain.checkpoint.huggingface import to_ours, to_theirs
from tptrain.checkpoint.load import load_newest
from tptrain.checkpoint.save import Saver
from tptrain.config import load_config
from tptrain.config.schema import ModelConfig, OptimConfig
from tptrain.models.families import gpt2, llama, qwen3
from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import Key
from tptrain.models.settings import decoder_spec
from tptrain.models.spec import DecoderSpec, LayerSpec
from tptrain.nn.context import Context
from tptrain.nn.decoder import MIXERS, Decoder
from tptrain.nn.linear import ColumnLinear, PendingSum, RowLinear
from tptrain.nn.parameter import initial_values, parameter, parameters, sharding
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE, Operations
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import Grid, Mesh
from tptrain.train.schedule import Action, Backward, Forward, Loss, Reduce, plain
from tptrain.watch.black_box import text_of
from tptrain.watch.verdict import judge

MODEL = ModelConfig(vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)


# --------------------------------------------------------------------------------------------------------------- family


class Toy:
    """A family whose config.json has names of its own, and whose matrices are (in, out)."""

    @staticmethod
    def to_spec(fields: Fields) -> DecoderSpec:
        values = {llama_name: fields.require(name, object) for name, llama_name in Toy.NAMES.items()}
        return llama.to_spec(Fields(values))

    @staticmethod
    def to_config(spec: DecoderSpec) -> dict[str, Any]:
        fields = llama.to_config(spec)
        return {name: fields[llama_name] for name, llama_name in Toy.NAMES.items()}

    @staticmethod
    def keys(spec: DecoderSpec) -> list[Key]:
        keys = [replace(key, theirs=key.theirs.replace("model.", "toy.")) for key in llama.keys(spec)]
        return [replace(key, transposed="proj" in key.theirs) for key in keys]

    NAMES = {  # noqa: RUF012
        "words": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "act": "hidden_act",
        "context": "max_position_embeddings",
        "eps": "rms_norm_eps",
    }


@pytest.mark.parametrize("family", [llama, qwen3, gpt2, Toy], ids=["llama", "qwen3", "gpt2", "toy"])
def test_a_family_maps_config_and_tensors_both_ways(family: Any) -> None:
    changes: dict[Any, dict[str, Any]] = {
        qwen3: {"qk_norm": True},
        gpt2: {"position_embedding": "learned", "norm": "layernorm", "hidden_act": "gelu_new", "gated_ffn": False}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    }
    spec = decoder_spec(replace(MODEL, **changes.get(family, {})))
    fields = Fields(family.to_config(spec))
    assert family.to_spec(fields) == spec
    fields.finish()
    model = Decoder(spec, mesh(1), REFERENCE)
    ours = {name: torch.randn(p.sharding.shape) for name, p in parameters(model)}
    theirs = to_theirs(spec, family.keys(spec), ours)
    back = to_ours(spec, family.keys(spec), theirs)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        rows = spec.vocab_size if name in ("embed_tokens.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(back[name][:rows], tensor[:rows]), name


# ---------------------------------------------------------------------------------------------------------------- mixer


@dataclass(frozen=True)
class MeanSpec:
    """A token mixer that averages what came before."""

    width: int

    def multiplied(self, hidden: int) -> int:
        return 2 * hidden * self.width

    def mixing_flops(self, T: int) -> float:
        return 2.0 * self.width * T


class Mean(nn.Module):
    """out(mean over the earlier tokens of in(x)), its features cut over tp."""

    def __init__(self, spec: MeanSpec, decoder: DecoderSpec, mesh: Mesh, ops: Operations) -> None:
        super().__init__()
        self.into = ColumnLinear(mesh, decoder.hidden_size, spec.width, std=decoder.std)
        self.out = RowLinear(mesh, spec.width, decoder.hidden_size, std=decoder.residual_std)

    def forward(self, x: Tensor, context: Context, recompute: Any = None) -> PendingSum:
        h = self.into(x, recompute).view(-1, context.T, self.into.weight.shape[0])  # (B, T, F/tp)
        counts = torch.arange(1, context.T + 1).view(1, -1, 1)
        return self.out((h.cumsum(1) / counts).flatten(0, 1))


Arrays = dict[str, NDArray[np.float32]]


def _with_means(tp: int) -> list[Arrays]:
    """Whole gradients of a model whose first layer has the toy mixer, for each way of recomputation."""
    return [_gradients_with_means(tp, recompute) for recompute in ("none", "selective", "full")]


def _gradients_with_means(tp: int, recompute: str) -> Arrays:
    MIXERS[MeanSpec] = Mean
    spec = decoder_spec(MODEL)
    layers = (LayerSpec(spec.norm, MeanSpec(24), spec.layers[0].channel_mixer), *spec.layers[1:])
    grid = mesh(tp, 4)
    tiny = training(MODEL, grid, recompute=recompute, spec=replace(spec, layers=layers))
    tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
    tiny.backward(torch.arange(18).view(2, 9), 1.0)
    named = [(name, p.main_grad, p.sharding) for name, p in parameters(tiny.model)]
    return {name: gather_global(grad, layout, grid).numpy() for name, grad, layout in named if grad is not None}


def test_a_mixer_trains_at_any_degree() -> None:
    ((alone, *_),) = run_ranks(1, _with_means, 1)
    assert "layers.0.self_attn.into.weight" in alone
    for rank in run_ranks(2, _with_means, 2):
        for grads in rank:
            for name, grad in alone.items():
                np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- axis


class Toys(nn.Module):
    """A parameter that is cut on an axis of its own, one whose gradient is a sum over it, and one of three dims."""

    def __init__(self, grid: Mesh) -> None:
        super().__init__()
        self.cut = parameter(grid, sharding(grid, (8, 6), {1: "toy"}), std=1.0)
        self.summed = parameter(grid, sharding(grid, (6,), summed=("toy",)), std=1.0)
        self.deep = parameter(grid, sharding(grid, (4, 6, 10), {0: "toy", 2: "tp"}), std=1.0)


def _on_a_toy_axis(folder: str, shape: dict[str, int], load: bool) -> tuple[Arrays, float]:
    """Whole parameters after one step (or as loaded), and the gradient norm before it."""
    grid = connect(Grid(shape), torch.device("cpu"))
    module = Toys(grid)
    optimizer = Optimizer(Store(module, torch.float32, grid.size("dp")), OptimConfig(), grid, zero=True)
    config, norm = load_config([f"run.dir={folder}", "run.name=toy"]), 0.0
    if load:
        assert load_newest(Path(folder), optimizer, grid, print)
    else:
        optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
        # What the whole model's gradient is: 0.1 in each element. Of a sum, and of dp, each rank has an equal part.
        for _, p in parameters(module):
            assert p.main_grad is not None
            ranks = grid.size("dp") * (grid.size("toy") if p.sharding.summed else 1)
            p.add_grad(torch.full_like(p.main_grad, 0.1 / ranks))
        optimizer.reducer.finish()
        norm = optimizer.reducer.norm_and_flags()[0].item()
        optimizer.step(0.1)
        saver = Saver(Path(folder), optimizer, config, "data", grid)
        saver.save(1)
        saver.finish()
    return {name: gather_global(p.detach(), p.sharding, grid).numpy() for name, p in parameters(module)}, norm


def test_an_axis_has_norm_step_and_checkpoint(tmp_path: Path) -> None:
    """dp=2 x toy=2 x tp=1 against one rank, and its checkpoint at toy=1 x tp=2."""
    one = {"dp": 1, "toy": 1, "tp": 1}
    ((alone, norm),) = run_ranks(1, _on_a_toy_axis, str(tmp_path / "one"), one, False)
    assert norm == pytest.approx(0.1 * (48 + 6 + 240) ** 0.5)
    for whole, other_norm in run_ranks(4, _on_a_toy_axis, str(tmp_path / "four"), {"dp": 2, "toy": 2, "tp": 1}, False):
        assert other_norm == pytest.approx(norm, rel=1e-6)
        for name, tensor in alone.items():
            np.testing.assert_allclose(whole[name], tensor, rtol=1e-5)
    for whole, _ in run_ranks(2, _on_a_toy_axis, str(tmp_path / "four"), {"dp": 1, "toy": 1, "tp": 2}, True):
        for name, tensor in alone.items():
            np.testing.assert_allclose(whole[name], tensor, rtol=1e-5)


def test_a_verdict_counts_a_toy_axis_by_itself() -> None:
    """Rank 2 hangs after two collectives over `toy`; that it has entered more over another axis does not matter."""

    def report(rank: int, toy: int, tp: int) -> dict[str, Any]:
        row, column = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        calls = [("tp", column, n) for n in range(1, tp + 1)] + [("toy", row, n) for n in range(1, toy + 1)]
        entries = [
            {"number": i, "number_in_group": n, "op": "all_reduce", "shape": "(4,)", "dtype": "float32", "axis": axis}
            | {"ranks": text_of(ranks), "site": f"{axis}.py:1 f", "left": rank == 2 or i < len(calls)}
            | {"background": False, "enqueued": False}
            for i, (axis, ranks, n) in enumerate(calls, 1)
        ]
        groups = [
            {"axis": axis, "ranks": text_of(ranks), "entered": n}
            for axis, ranks, n in (("tp", column, tp), ("toy", row, toy))
        ]
        cause = {"kind": "hang" if rank == 2 else "waiting", "message": "silent for 9 s in the phase `step`"}
        place = {"rank": rank, "world": 4, "node": f"n{rank}", "time": 1.0, "phase": "step", "step": 4, "top": ""}
        return place | {"entered": len(calls), "cause": cause, "collectives": entries, "groups": groups}

    reports = {0: report(0, 3, 1), 1: report(1, 2, 1), 2: report(2, 2, 5), 3: report(3, 2, 5)}
    for rank in (1, 3):
        reports[rank]["collectives"][-1]["left"] = True
    verdict = judge(reports, 4, [])
    assert (verdict.rank, verdict.node) == (2, "n2"), verdict.text
    assert "never entered collective 3, all_reduce of (4,) float32 over toy [0, 2]" in verdict.text


# ------------------------------------------------------------------------------------------------------------- schedule


def all_forward_first(batches: int, units: Sequence[str]) -> list[Action]:
    """GPipe's order (Huang et al. 2019, arXiv:1811.06965) on one stage."""
    segments = range(len(units))
    actions: list[Action] = [Forward(batch, segment) for batch in range(batches) for segment in segments]
    for batch in reversed(range(batches)):
        actions += [Loss(batch), *(Backward(batch, segment) for segment in reversed(segments))]
    return [*actions, *(Reduce(unit) for unit in dict.fromkeys(reversed(units)))]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_schedule_gives_the_same_gradients(recompute: str) -> None:
    grads = []
    for schedule in (plain, all_forward_first):
        tiny = training(MODEL, mesh(1), recompute=recompute)
        tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
        tiny.backward(torch.arange(36).view(4, 9), 1.0, schedule, 4)
        grads.append({name: p.main_grad for name, p in parameters(tiny.model)})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


# ------------------------------------------------------------------------------------------------------------ operation


def test_an_operation_of_another_backend_is_the_one_that_runs() -> None:
    calls: Counter[str] = Counter()

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As in the reference, by torch's own function."""
        calls["rms_norm"] += 1
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps), x.square().sum(-1, keepdim=True)

    losses = []
    for ops in (REFERENCE, replace(REFERENCE, backend="toy", rms_norm=rms_norm)):
        tiny = training(MODEL, mesh(1), ops=ops)
        tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
        losses.append(tiny.backward(torch.arange(18).view(2, 9), 1.0).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert calls["rms_norm"] == 1, "of the first layer; the other norms have an addition before them"
