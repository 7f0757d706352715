"""What is asked about a model before it runs: sizes and costs, whichever engine computes it. Imports no torch."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError
from tptrain.config.schema import MODEL_FILES, TENSORS, ModelConfig, padded_vocab_size
from tptrain.models.directory import fetch_weights
from tptrain.models.settings import decoder_spec
from tptrain.models.spec import DecoderSpec

PATIENCE_S = 120  # for Transformers to be imported and to build the model without memory; some seconds as a rule


@dataclass(frozen=True)
class Facts:
    """Of a model that Transformers' code computes, as that says."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    heads: int
    kv_heads: int
    parameters: int  # padding of the vocabulary among them
    matrix_parameters: int  # all but the vectors
    multiplied: int  # weights that multiply each token
    attention: tuple[tuple[int, int | None], ...]  # of each layer with attention: heads x head_dim, and its window
    proposed: Mapping[str, str]  # the styles of modules that no plan names, which tptrain proposes: to be verified

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size)

    def flops_per_token(self, T: int) -> float:
        """As for a `DecoderSpec`; what linear attention and convolutions compute between tokens is not counted."""
        mixing = sum(4.0 * width * min(T, window or T) for width, window in self.attention)
        return 6.0 * self.multiplied + 3.0 * mixing


def sizes(model: ModelConfig) -> DecoderSpec | Facts:
    """Of a model whose engine has been settled."""
    if model.engine != "transformers":
        return decoder_spec(model)
    return facts_of({key: value for key, value in model.facts.items() if key != "cut"})


def facts_of(values: dict[str, Any]) -> Facts:
    """Out of JSON."""
    everything: dict[str, Any] = {**values, "attention": tuple(tuple(each) for each in values["attention"])}
    return Facts(**everything)


def ask_for_cut(config: Config) -> None:
    """Note in `model.facts` what `verify` runs of a model of Transformers."""
    model = config.model
    options = config.verify
    question = ["cut", model.source, model.tp_plan, model.dropout, options.vocab, options.width, config.parallel.tp]
    model.facts["cut"] = _ask(json.dumps(question))


def settle_engine(config: Config, weights: bool = True) -> str:
    """Decide on `model.engine`, and ask Transformers about the model where it is to compute it. Returns a line on that,
    empty where there was no choice. Raises UserError for a model that neither can train.

    `weights`: those of the model will be read, unless a run has begun with them: Transformers sees whether they fit.
    """
    model, line = config.model, ""
    if model.path is None:
        if model.engine == "transformers":
            raise UserError("model.engine=transformers: only model=hf has such a model. Add model=hf model.path=DIR.")
        model.engine = "native"
        return ""
    if model.engine == "auto":
        try:
            decoder_spec(model)
            model.engine, line = "native", "model.engine=native: all of its config.json is known"
        except UserError as error:
            model.engine = "transformers"
            line = f"model.engine=transformers: {str(error).removeprefix(f'model.path={model.path}: ')}"
    if model.engine == "native":
        if model.tp_plan:
            raise UserError("model.tp_plan: tptrain's own models need none. Add model.engine=transformers.")
        return line
    _check_engine(config)
    if not model.facts:
        begun = (Path(config.run.dir) / MODEL_FILES / TENSORS).exists()
        directory = None
        if weights and not begun:  # a run that has begun does not look at them again
            fetch_weights(model)
            directory = model.directory
        question = ["model", directory, model.source, model.tp_plan, model.dropout, config.parallel.tp]
        model.facts = _ask(json.dumps(question))
    return line


def _check_engine(config: Config) -> None:
    """Raises UserError for settings that Transformers' models do not have."""
    for key, value in {
        "parallel.sequence_parallel": config.parallel.sequence_parallel,
        "parallel.overlap": config.parallel.overlap,
    }.items():
        if value:
            raise UserError(f"{key}: only tptrain's own models have it, and this one is Transformers'. Leave it out.")
    if config.train.recompute == "selective":
        raise UserError(
            "train.recompute=selective: only tptrain's own models have it, and this one is Transformers'. "
            "Use train.recompute=full."
        )


@functools.cache
def _ask(question: str) -> dict[str, Any]:
    """The facts of a model, out of a process of its own: here neither torch nor Transformers is imported."""
    command = [sys.executable, "-m", "tptrain.hf.resolve"]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"model.engine=transformers: it has not answered in {PATIENCE_S} s. Try again.") from error
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode:
        raise UserError(f"model.engine=transformers: its code fails on this model:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
