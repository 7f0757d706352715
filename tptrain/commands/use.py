"""A model in use: eval, generate."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.commands.settled import settle_engine

if TYPE_CHECKING:
    pass


def evaluate(options: argparse.Namespace) -> int:
    import json

    from launch.place import find_place
    from launch.runs import find_checkpoint
    from tptrain.config import UserError, check_data, load_config, validate
    from tptrain.config.load import settings_of
    from tptrain.models.check import check_model
    from tptrain.run.evaluate import run

    overrides: list[str] = options.overrides
    named = bool(overrides) and "=" not in overrides[0]
    config = load_config(overrides[1:] if named else overrides)
    checkpoint = find_checkpoint(overrides[0]) if named else None
    if checkpoint is not None:
        config = settings_of(checkpoint, config, overrides[1:])
    elif config.model.path is None:
        raise UserError("eval: name a run or a checkpoint, or set model=hf model.path=DIR.")
    config.run.dir = str(Path(config.data.cache_dir) / "eval")  # the same on every rank; nothing is written there
    check_data(config)
    validate(config)
    settle_engine(config)
    check_model(config, reads_weights=checkpoint is None)
    find_place()
    result, is_main = run(config, checkpoint)
    if is_main:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    return 0
