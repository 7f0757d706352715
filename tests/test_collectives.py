"""How many all-reduces a step sends, and in which order the backward one starts."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import mesh, run_ranks
from tptrain.config import ModelConfig
from tptrain.layers import init_weights
from tptrain.loss import vocab_parallel_cross_entropy
from tptrain.model import Decoder

B, T, D = 2, 16, 32
LAYERS = (1, 3)


def _model(layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=250,
        hidden_size=D,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=64,
        qk_norm=True,
    )


def _count(layers: int) -> tuple[list[int], list[int]]:
    """Sizes of the tensors reduced forward and backward, by asking torch itself: every one goes through dist."""
    grid = mesh(2, kv_heads=1)
    config = _model(layers)
    model = Decoder(config, grid)
    init_weights(model, 0, grid.tp_rank)
    tokens = torch.randint(0, 250, (B, T), generator=torch.Generator().manual_seed(0))
    forward: list[int] = []
    backward: list[int] = []
    right = dist.all_reduce
    with patch.object(dist, "all_reduce", lambda x, **k: (forward.append(x.numel()), right(x, **k))[1]):
        logits = model(tokens)
        loss = vocab_parallel_cross_entropy(logits.flatten(0, 1), tokens.flatten(), 250, grid).sum()
    with patch.object(dist, "all_reduce", lambda x, **k: (backward.append(x.numel()), right(x, **k))[1]):
        loss.backward()
    return forward, backward


def _order() -> list[str]:
    """What the backward of a column-parallel linear does, in order."""
    from tptrain.collectives import column_parallel_linears

    grid = mesh(2)
    x = torch.randn(4, 8, requires_grad=True)
    weights = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    events: list[str] = []
    right = dist.all_reduce

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        events.append("start")
        return Work(right(tensor, **options))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm_"):
                events.append("weight gradient" if args[0].shape[0] == 6 else "input gradient")
            return func(*args, **(kwargs or {}))

    total = sum(y.sum() for y in column_parallel_linears(x, weights, None, grid.tp_group))
    assert isinstance(total, torch.Tensor)
    with patch.object(dist, "all_reduce", all_reduce), Watch():
        total.backward()
    return events


def _everything() -> tuple[dict[int, tuple[list[int], list[int]]], list[str]]:
    return {layers: _count(layers) for layers in LAYERS}, _order()


@pytest.fixture(scope="module")
def found() -> tuple[dict[int, tuple[list[int], list[int]]], list[str]]:
    return run_ranks(2, _everything)[0]


@pytest.mark.parametrize("layers", LAYERS)
def test_two_all_reduces_forward_and_two_backward_a_layer(found: Any, layers: int) -> None:
    forward, backward = found[0][layers]
    assert forward[: 1 + 2 * layers] == [B * T * D] * (1 + 2 * layers)  # the embedding's, then two a layer
    assert forward[1 + 2 * layers :] == [B * T, 2 * B * T]  # the loss: maximum, then sum and target
    assert backward == [B * T * D] * (1 + 2 * layers)  # the output head's, then two a layer


def test_weight_gradients_are_computed_while_the_input_gradient_travels(found: Any) -> None:
    assert found[1] == ["input gradient", "input gradient", "start", "weight gradient", "weight gradient", "wait"]
