"""A model in use: eval, generate."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tptrain.commands.settled import settle_engine

if TYPE_CHECKING:
    from tptrain.config import Config
    from tptrain.config.schema import EvalConfig


def evaluate(options: argparse.Namespace) -> int:
    from launch.place import find_place
    from tptrain.config.evaluation import split_words
    from tptrain.run.evaluate import run

    settings, words = split_words(options.overrides)
    if settings.tasks:
        return _by_tasks(settings, words, options.overrides)
    config, checkpoint = _model("eval", words, in_windows=True)
    code = _elsewhere(config, checkpoint, "eval", options.overrides)
    if code is not None:
        return code
    find_place()
    result, is_main = run(config, checkpoint)
    if is_main:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    return 0


def _by_tasks(settings: "EvalConfig", words: list[str], typed: list[str]) -> int:
    """Scores of the tasks of lm-evaluation-harness. `words`: the overrides among those that were `typed`."""
    from launch.place import find_place
    from tptrain.config import UserError
    from tptrain.generate.codec import Codec
    from tptrain.models.sizes import sizes
    from tptrain.run import results
    from tptrain.run.preflight import ReportedByRank0
    from tptrain.run.tasks import load_tasks

    config, checkpoint = _model("eval", words)
    positions = sizes(config.model).max_positions
    if settings.max_length is not None and settings.max_length > positions:
        raise UserError(f"max_length={settings.max_length}: the model has {positions:,} positions. Use no more.")
    target = results.target(config, checkpoint, settings.out, words)

    def check() -> None:
        load_tasks(settings)
        if settings.apply_chat_template:
            Codec(config, _folder(config, checkpoint)).check_template()

    code = _elsewhere(config, checkpoint, "eval", typed, check)
    if code is not None:
        return code
    from tptrain.run.harness import run

    _infer(config, find_place().world)
    try:
        scores = run(config, checkpoint, _folder(config, checkpoint), settings, target.name)
    except ReportedByRank0 as error:
        return 2 if "UserError" in str(error) else 1
    if scores is not None:
        results.show(scores)
        results.write(target, scores)
    return 0


def generate(options: argparse.Namespace) -> int:
    from launch.place import find_place
    from tptrain.config.generation import split_words
    from tptrain.run.generate import run
    from tptrain.run.preflight import ReportedByRank0

    settings, words = split_words(options.overrides)
    config, checkpoint = _model("generate", words)
    code = _elsewhere(config, checkpoint, "generate", options.overrides)
    if code is not None:
        return code
    _infer(config, find_place().world)
    lone = settings.prompt is not None and settings.format == "text"
    try:
        for row, answer in run(config, checkpoint, _folder(config, checkpoint), settings, _show if lone else None):
            _print(row, answer, settings.format, lone)
    except ReportedByRank0:
        return 2
    return 0


def _infer(config: "Config", world: int) -> None:
    """No settings of training that the layers would follow."""
    train = dataclasses.replace(config.train, micro_batch_size=1, global_batch_size=world)
    config.train = dataclasses.replace(train, recompute="none")
    config.parallel = dataclasses.replace(config.parallel, sequence_parallel=False, overlap=False)


def _folder(config: "Config", checkpoint: "Path | None") -> "Path | None":
    """The model's files beside its weights, where there are any."""
    from tptrain.config.schema import MODEL_FILES

    folder = Path(config.model.directory or "") if checkpoint is None else checkpoint.parent.parent / MODEL_FILES
    return folder if folder.is_dir() else None


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


def _model(verb: str, words: list[str], in_windows: bool = False) -> "tuple[Config, Path | None]":
    """The config of a run, a checkpoint or a directory that the first word names, and the checkpoint.

    `in_windows`: train.seq_len and data matter. Raises UserError.
    """
    from launch.here import speaks
    from launch.runs import find_checkpoint
    from tptrain.config import UserError, check_data, load_config, validate
    from tptrain.config.load import settings_of
    from tptrain.models.check import check_model
    from tptrain.models.sizes import sizes

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
    if in_windows:
        check_data(config)
    validate(config)
    settle_engine(config, say=speaks())
    if not in_windows:
        config.train.seq_len = min(config.train.seq_len, sizes(config.model).max_positions)
    check_model(config, reads_weights=checkpoint is None)
    config.run.dir = str(Path(config.data.cache_dir) / verb)  # the same on every rank; nothing is written there
    return config, checkpoint


def _elsewhere(
    config: "Config",
    checkpoint: "Path | None",
    verb: str,
    words: list[str],
    check: Callable[[], object] = lambda: None,
) -> int | None:
    """Have other processes be the ranks, where this one is not to be one: the exit code; None where it is.

    `check`: what is to be found out before a job waits in the queue, or ranks start.
    """
    from launch import foreground
    from launch.here import ranks_to_start, run_ranks

    if config.cluster.kind == "slurm":
        base = Path(config.run.dir) if checkpoint is None else checkpoint.parent.parent
        foreground.prepare(config, base)
        check()
        foreground.replace_by_srun(config, base, verb, words)
    count = ranks_to_start(config)
    if not count:
        return None
    check()
    return run_ranks(["-m", "tptrain", verb, *words], count, verb)
