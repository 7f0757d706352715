"""A model has memory by itself, and what is frozen costs its weight and nothing else."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import reference as ref
from tests.distributed import mesh, run_ranks
from tests.models import Training, training
from tptrain.checkpoint.load import load_newest, load_weights
from tptrain.checkpoint.save import Saver
from tptrain.config import load_config
from tptrain.config.schema import ModelConfig
from tptrain.models.settings import decoder_spec
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import initial_values, parameters
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE
from tptrain.parallel.mesh import tp_grid
from tptrain.plan.dry_run import Calls, meta_mesh
from tptrain.records.run_dir import step_folder

MODEL = ModelConfig(vocab_size=250, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MATRICES = ("proj", "embed", "lm_head")  # all but the norms


def test_a_decoder_without_an_optimizer_has_forward_loss_and_logits() -> None:
    case = ref.CASES["llama_gqa"]
    reference = ref.compute(case)
    grid = mesh(1)
    model = Decoder(decoder_spec(case.ours), grid, REFERENCE)
    Store(model, torch.float32).initialise(lambda name, p: reference.weights[name])
    inputs, targets = reference.tokens[:, :-1], reference.tokens[:, 1:].flatten()
    with torch.no_grad():
        x = model(inputs)
        logits = model.logits(x).view(ref.BATCH, ref.SEQ_LEN, -1)[..., : ref.VOCAB]
    losses = CrossEntropy(model.lm_head.weight, ref.VOCAB, grid, REFERENCE).losses(x, targets)
    torch.testing.assert_close(logits, reference.logits, rtol=1e-4, atol=1e-4)
    assert losses.mean().item() == pytest.approx(reference.loss, rel=1e-5)
    assert all(p.main_grad is None for _, p in parameters(model))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def _step(*frozen: str) -> tuple[Training, int, Calls]:
    """Of the last rank of dp=2 x tp=2, on meta tensors: its parts, matrix products and collectives."""
    calls: Calls = Counter()
    tiny = training(MODEL, meta_mesh(tp_grid(4, 2, 4), calls), frozen=frozen)
    with Products() as products:
        tiny.backward(torch.zeros(1, 9, dtype=torch.long, device="meta"), 1.0)
    tiny.optimizer.reducer.finish()
    return tiny, products.count, calls


def test_only_norms_trained_keeps_gradients_and_moments_of_the_norms() -> None:
    everything, all_products, all_calls = _step()
    norms, products, calls = _step(*MATRICES)
    D, layers = MODEL.hidden_size, MODEL.num_hidden_layers
    trained = [p for _, p in parameters(norms.model) if p.requires_grad]
    assert len(trained) == 2 * layers + 1
    elements = sum(len(block.grads) for block in norms.optimizer.state.blocks)
    assert (2 * layers + 1) * D <= elements <= (layers + 1) * 2 * 128, "each unit is rounded up to 64 for each dp rank"
    assert sum(len(block.grads) for block in everything.optimizer.state.blocks) > 20 * elements
    moments = [t for entry in norms.optimizer.adamw.state.values() for t in entry.values() if t.dim()]
    assert sum(len(t) for t in moments) == 2 * (2 * layers + 1) * D
    # Forward, and the input gradients down to the lowest norm, at the entrance of layer 0: no weight gradient.
    forward, head = 4 * layers + 1, 1
    assert all_products == 3 * forward
    assert products == forward + head + 4 * layers
    assert sum(n for (_, axis, _), n in calls.items() if axis == "dp") == layers + 1  # units that have a norm
    # The embedding is not reduced; all else over tp is the same, since the lowest norm's input needs its gradient.
    assert sum(n for (_, axis, _), n in all_calls.items() if axis == "tp") == sum(
        n for (_, axis, _), n in calls.items() if axis == "tp"
    )


def test_nothing_is_run_back_below_the_lowest_trained_layer() -> None:
    _, products, calls = _step("embed", "layers.0.", "proj", "lm_head")
    layers = MODEL.num_hidden_layers
    assert products == (4 * layers + 1) + 1 + 4, "forward, the head's input gradient, and one layer's"
    # Forward: embedding and two sums a layer. Backward: the head's, and those of the upper layer.
    all_reduces = sum(n for (op, axis, _), n in calls.items() if (op, axis) == ("all_reduce", "tp"))
    assert all_reduces == (1 + 2 * layers) + 1 + 2


def test_linears_of_one_product_are_frozen_together() -> None:
    with pytest.raises(ValueError, match="are one matrix product: freeze both or none"):
        training(MODEL, mesh(1), frozen=("q_proj",))


def _gradients(frozen: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of the trained parameters, in a model that is trained in part or whole."""
    tiny = training(MODEL, mesh(2, 4), frozen=frozen)
    tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
    tiny.backward(torch.arange(18).view(2, 9), 1.0)
    return {name: p.main_grad.clone() for name, p in parameters(tiny.model) if p.main_grad is not None}


def _compared() -> list[str]:
    """Trained parameters whose gradient is another one because others are frozen."""
    whole, wrong = _gradients(()), []
    for frozen in (MATRICES, ("embed", "layers.0."), ("norm",), ("lm_head", "down_proj")):
        part = _gradients(frozen)
        assert part, frozen
        wrong += [f"{frozen}: {name}" for name, grad in part.items() if not torch.equal(grad, whole[name])]
    return wrong


def test_gradients_do_not_depend_on_what_else_is_frozen() -> None:
    assert run_ranks(2, _compared) == [[], []]


def _saved_and_loaded(folder: str) -> list[bool]:
    """A checkpoint of bf16 weights, most of them frozen, into another such model, and into one without optimizer."""
    grid, config = mesh(2, 4), load_config([f"run.dir={folder}", "model.name=frozen"])
    config.model = MODEL
    tiny, other = (training(MODEL, grid, dtype=torch.bfloat16, frozen=MATRICES) for _ in range(2))
    tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 1))
    saver = Saver(Path(folder), tiny.optimizer, config, "data", grid)
    saver.save(3)
    saver.finish()
    commit = load_newest(Path(folder), other.optimizer, grid, print)
    assert commit is not None
    alone = Decoder(decoder_spec(MODEL), grid, REFERENCE)
    load_weights(step_folder(Path(folder), 3), Store(alone, torch.bfloat16))
    weights = [dict(parameters(model)) for model in (tiny.model, other.model, alone)]
    pairs = [(p, loaded[name]) for loaded in weights[1:] for name, p in weights[0].items()]
    return [torch.equal(p, loaded) and bool(p.any()) for p, loaded in pairs]


def test_frozen_weights_are_saved_and_loaded_also_without_an_optimizer(tmp_path: Path) -> None:
    for equal in run_ranks(2, _saved_and_loaded, str(tmp_path)):
        assert len(equal) == 2 * (9 * 2 + 3)
        assert all(equal)
