"""Log-likelihoods of continuations against those that Transformers' logits give, at tp 1 and 2."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference as ref
from tests.distributed import run_ranks
from tests.families import FAMILIES
from tests.test_generate import hf_model, model_of
from tptrain.generate.score import Request, Score, scores
from tptrain.ops.table import REFERENCE
from tptrain.train.trainer import cross_entropy

# Windows and soft caps, learned positions, rotary scalings that depend on the length
CHOSEN = ("llama", "gemma2", "gpt2", "phi3, longrope", "llama, dynamic")
POSITIONS = 64
BATCHES = {1: 7, 2: 64}  # requests of a batch, by tp


def _requests(model: Any) -> list[Request]:
    """Contexts of several lengths with continuations that no other has and with shared ones, among them the likeliest,
    and the longest that the model has positions for.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, ref.VOCAB, (length,), generator=generator).tolist()

    contexts = [draw(length) for length in (20, 7, 13, 1, 40)]
    requests = [(context, draw(length)) for context in contexts for length in (1, 4, 9, 3)]
    likeliest = [(context, _likeliest(model, context, length)) for context in contexts for length in (1, 5)]
    alone = [(draw(3), draw(POSITIONS - 2)), (draw(5), draw(50)), (draw(POSITIONS), draw(1)), (contexts[0], draw(45))]
    everything = requests + likeliest + alone
    order = torch.randperm(len(everything), generator=generator).tolist()
    return [everything[place] for place in order]


def _likeliest(model: Any, context: list[int], length: int) -> list[int]:
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(_logits(model, tokens)[-1].argmax()))
    return tokens[len(context) :]


def _logits(model: Any, tokens: list[int]) -> Tensor:
    for module in model.modules():  # a model whose rotary scaling is dynamic remembers the longest sequence
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = 0
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def _right(model: Any, requests: list[Request]) -> list[Score]:
    everything = []
    for context, continuation in requests:
        logits = _logits(model, (context + continuation)[:-1])[len(context) - 1 :]
        targets = torch.tensor(continuation)
        own = logits.double().log_softmax(-1).gather(1, targets.unsqueeze(1))
        everything.append(Score(own.sum().item(), bool((logits.argmax(-1) == targets).all())))
    return everything


@pytest.fixture(scope="module")
def of_families() -> tuple[dict[str, list[Score]], list[Any]]:
    """Every family's scores: by Transformers' logits, ours on each rank by tp too."""
    tasks, right = {}, {}
    for family in CHOSEN:
        case = FAMILIES[family]
        model = hf_model(case)
        requests = _requests(model)
        tasks[family] = case, ref.to_ours(case, dict(model.named_parameters())), requests
        right[family] = _right(model, requests)
    return right, run_ranks(2, _of_families, tasks)


def _of_families(tasks: dict[str, Any]) -> dict[tuple[str, int], dict[int, Score]]:
    everything = {}
    for family, (case, weights, requests) in tasks.items():
        for tp, size in BATCHES.items():
            model = model_of(case, weights, tp)
            everything[family, tp] = dict(scores(model, cross_entropy(model, REFERENCE), requests, size))
    return everything


@pytest.mark.parametrize("family", CHOSEN)
def test_scores_are_those_of_transformers_logits(family: str, of_families: Any) -> None:
    right, everywhere = of_families
    assert 5 < sum(score.greedy for score in right[family]) < len(right[family]), "a test of nothing"
    worst = 0.0
    for tp in BATCHES:
        parts = [rank[family, tp] for rank in everywhere[::tp]]  # a dp rank each
        assert sorted(number for part in parts for number in part) == list(range(len(right[family])))
        assert [rank[family, tp] for rank in everywhere[tp - 1 :: tp]] == parts, "ranks of a tp group differ"
        for number, score in (each for part in parts for each in part.items()):
            assert score.greedy == right[family][number].greedy, (tp, number)
            worst = max(worst, abs(score.log_likelihood - right[family][number].log_likelihood))
    print(f"{family}: within {worst:.1e} nats, of up to {-min(score.log_likelihood for score in right[family]):.0f}")
    assert worst < 1e-4
