"""A model in use: eval, generate."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain.commands.settled import settle_engine

if TYPE_CHECKING:
    from tptrain.config import Config


def evaluate(options: argparse.Namespace) -> int:
    from launch.place import find_place
    from tptrain.config import check_data
    from tptrain.run.evaluate import run

    config, checkpoint = _model("eval", options.overrides)
    config.run.dir = str(Path(config.data.cache_dir) / "eval")  # the same on every rank; nothing is written there
    check_data(config)
    code = _elsewhere(config, checkpoint, "eval", options.overrides)
    if code is not None:
        return code
    find_place()
    result, is_main = run(config, checkpoint)
    if is_main:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    return 0


def generate(options: argparse.Namespace) -> int:
    from launch.place import find_place
    from tptrain.config.generation import split_words
    from tptrain.config.schema import MODEL_FILES
    from tptrain.run.generate import run
    from tptrain.run.preflight import ReportedByRank0

    settings, words = split_words(options.overrides)
    config, checkpoint = _model("generate", words)
    config.run.dir = str(Path(config.data.cache_dir) / "generate")  # the same on every rank; nothing is written there
    folder = Path(config.model.directory or "") if checkpoint is None else checkpoint.parent.parent / MODEL_FILES
    code = _elsewhere(config, checkpoint, "generate", options.overrides)
    if code is not None:
        return code
    place = find_place()
    train = dataclasses.replace(config.train, micro_batch_size=1, global_batch_size=place.world)
    config.train = dataclasses.replace(train, recompute="none")
    config.parallel = dataclasses.replace(config.parallel, sequence_parallel=False, overlap=False)
    lone = settings.prompt is not None and settings.format == "text"
    files, show = folder if folder.is_dir() else None, _show if lone else None
    try:
        for row, answer in run(config, checkpoint, files, settings, show):
            _print(row, answer, settings.format, lone)
    except ReportedByRank0:
        return 2
    return 0


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _print(row: dict[str, Any], answer: Any, form: str, shown: bool) -> None:
    """An answer as text, or with all that is known of it as a line of JSON."""
    if form == "json":
        print(json.dumps(row | dataclasses.asdict(answer), ensure_ascii=False), flush=True)
    elif shown:
        print(flush=True)
    else:
        asked = row.get("prompt") or row["messages"][-1].get("content", "")
        print(f"{asked}\n{answer.text}\n", flush=True)


def _model(verb: str, words: list[str]) -> "tuple[Config, Path | None]":
    """The config of a run, a checkpoint or a directory that the first word names, and the checkpoint.

    Raises UserError.
    """
    from launch.runs import find_checkpoint
    from tptrain.config import UserError, load_config, validate
    from tptrain.config.load import settings_of
    from tptrain.models.check import check_model

    name = words[0] if words and "=" not in words[0] else None
    rest = words[1:] if name is not None else words
    checkpoint = None
    if name is not None and (Path(name) / "config.json").is_file():
        rest = ["model=hf", f"model.path='{name}'", *rest]
        name = None
    config = load_config(rest)
    if name is not None:
        checkpoint = find_checkpoint(name)
        config = settings_of(checkpoint, config, rest)
    elif config.model.path is None:
        raise UserError(f"{verb}: name a run, a checkpoint or a Hugging Face directory.")
    if verb == "generate":
        config.train = dataclasses.replace(config.train, seq_len=1)  # of training: no length of an answer
    validate(config)
    settle_engine(config)
    check_model(config, reads_weights=checkpoint is None)
    return config, checkpoint


def _elsewhere(config: "Config", checkpoint: "Path | None", verb: str, words: list[str]) -> int | None:
    """Have other processes be the ranks, where this one is not to be one: the exit code; None where it is."""
    from launch import foreground
    from launch.here import ranks_to_start, run_ranks

    if config.cluster.kind == "slurm":
        base = Path(config.run.dir) if checkpoint is None else checkpoint.parent.parent
        foreground.prepare(config, base)
        foreground.replace_by_srun(config, base, verb, words)
    count = ranks_to_start(config)
    return run_ranks(["-m", "tptrain", verb, *words], count, verb) if count else None
