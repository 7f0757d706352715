"""The words after `eval`: which are its own, for tasks of lm-evaluation-harness, and which are overrides for Hydra."""

from collections.abc import Sequence
from pathlib import Path

from tptrain.config.errors import UserError
from tptrain.config.schema import EvalConfig
from tptrain.config.words import as_typed, listed, split

TEXTS = {"tasks": listed, "task_dir": as_typed, "out": as_typed, "system_instruction": as_typed}


def split_words(words: Sequence[str]) -> tuple[EvalConfig, list[str]]:
    """The settings of `eval`, and the words that are none of them. Raises UserError."""
    settings, keys, others = split(words, EvalConfig, TEXTS)
    if keys and not settings.tasks:
        key = min(keys - {"tasks"}, default="tasks")
        raise UserError(f"{key}: is of tasks of lm-evaluation-harness, and none is named. Add tasks=[NAME,...].")
    if settings.tasks and (
        data := [word for word in others if word.startswith(("data=", "data.source=", "data.files="))]
    ):
        raise UserError(f"{data[0]}: tasks have data of their own. Leave it out, or leave out tasks= for perplexity.")
    if settings.task_dir is not None and not Path(settings.task_dir).is_dir():
        raise UserError(f"task_dir={settings.task_dir}: no such folder.")
    if settings.fewshot_as_multiturn and not settings.apply_chat_template:
        raise UserError("fewshot_as_multiturn=true: only a chat has turns. Add apply_chat_template=true.")
    if settings.out is not None:
        _check_out(Path(settings.out))
    return settings, others


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise UserError(f"out={out}: results are JSON. Give the name of a .json file.")
    if out.exists():
        raise UserError(f"out={out}: exists already, and nothing is written over. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"out={out}: there is no folder {out.absolute().parent}. Make it.")
