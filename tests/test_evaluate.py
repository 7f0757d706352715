"""Perplexity does not depend on how the windows and the model are divided over ranks."""

from pathlib import Path

import pytest

from tests.corpus import overrides, write_corpus
from tests.distributed import mesh, run_ranks
from tests.models import training
from tptrain.config import load_config
from tptrain.nn.parameter import initial_values
from tptrain.train.evaluate import Evaluation, evaluate


def _evaluate(folder: str, tp: int) -> Evaluation:
    config = load_config([*overrides(Path(folder)), f"parallel.tp={tp}", "train.micro_batch_size=3"])
    tiny = training(config.model, mesh(tp, 2))
    tiny.store.initialise(lambda name, p: initial_values(name, p, 0))
    return evaluate(config, tiny.model, tiny.loss)


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    documents = 3
    text = write_corpus(tmp_path, documents).read_text()
    alone = _evaluate(str(tmp_path), 1)
    tokens = sum(len(line.encode()) - len('{"text": ""}') + 1 for line in text.splitlines())  # and an end of document
    windows = -(-tokens // 32)
    assert alone.tokens == tokens - windows
    assert tokens % 32, "the last window is shorter"
    for result in run_ranks(4, _evaluate, str(tmp_path), 2):
        assert result.tokens == alone.tokens
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
