"""Tasks of lm-evaluation-harness, and before anything is computed, which of them lacks its data set."""

import difflib
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tptrain.config import UserError
from tptrain.config.schema import EvalConfig
from tptrain.models.directory import and_more

REACH_S = 3  # for the hub to answer
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of data sets, which read files that the task names
INSTALL = "Run `pip install 'tptrain[eval]'`."


def load_tasks(settings: EvalConfig) -> list[Any]:
    """The tasks and groups, their data sets read: from the cache, from files, or from the hub where it can be reached.

    Raises UserError that names every data set that is missing.
    """
    _go_offline()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"tasks: this Python has no lm-evaluation-harness ({error}). {INSTALL}") from error
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    manager = None
    if settings.task_dir is not None:  # the harness has ten thousand files of its own, which take it seconds to read
        manager = TaskManager(include_path=settings.task_dir, include_defaults=False)
    if manager is None or _unknown(manager, settings.tasks):
        manager = TaskManager(include_path=settings.task_dir)
    if unknown := [name for name in _unknown(manager, settings.tasks) if name in settings.tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"tasks={unknown[0]}: no task of lm-evaluation-harness{and_more(unknown)}.{meant}")
    built, problems, owners = list[Any](), list[str](), dict[str, str]()
    for name in dict.fromkeys(settings.tasks):
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # a task's own code may raise anything
            problems += _problems(manager, name) or [_unusable(name, error)]
            continue
        built += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
        for task, each in loaded["tasks"].items():
            if owners.setdefault(task, name) != name:
                raise UserError(f"tasks={name}: {task} is in {owners[task]}, too. Leave one of them out.")
            _check(each)
    if problems:
        raise UserError("\n".join(f"tasks: {line}" for line in problems))
    return built


def _go_offline() -> None:
    """Where the hub cannot be reached, have the harness look into the cache only: each data set would wait for it."""
    env = os.environ
    if any(env.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "https_proxy", "HTTPS_PROXY")):
        return
    address = urlparse(env.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=REACH_S).close()
    except OSError:
        env["HF_HUB_OFFLINE"] = "1"


# ------------------------------------------------------------------------------------------------------- names of tasks


def _leaves(manager: Any, name: str) -> list[str]:
    """The tasks of a group or tag, or the one of that name."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name not in ("TAG", "GROUP"):
        return [name]
    children = list(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task") or []
    names = [each if isinstance(each, str) else each.get("task") or each.get("group") for each in children]
    return [leaf for each in names if isinstance(each, str) for leaf in _leaves(manager, each)]


def _unknown(manager: Any, names: list[str]) -> list[str]:
    """Names, or names of a group's members, that are neither known nor a file's."""
    leaves = [leaf for name in names for leaf in _leaves(manager, name)]
    return [leaf for leaf in leaves if leaf not in manager.task_index and not Path(leaf).expanduser().is_file()]


# ------------------------------------------------------------------------------------------------------------- problems


def _problems(manager: Any, name: str) -> list[str]:
    """A line on each data set that the tasks of a name lack, and on each task that cannot be used otherwise."""
    lines, missing = list[str](), dict[str, tuple[str, list[str], dict[str | None, None]]]()  # by the data set's name
    for leaf in _leaves(manager, name):
        entry = manager.task_index.get(leaf)
        config = (entry.cfg if entry is not None else None) or {}
        source, part = config.get("dataset_path"), config.get("dataset_name")
        if source in missing:  # one is enough to know, where each may wait for the hub
            missing[source][1].append(leaf)
            missing[source][2][part] = None
            continue
        try:
            manager.load([leaf])
        except OSError as error:  # of a file that is not there, and of a hub that is not reached
            if source is None or source in BUILDERS:
                lines.append(f"{leaf} needs files that are not there: {_first_line(error)}.")
            else:
                missing[source] = _first_line(error), [leaf], {part: None}
        except Exception as error:
            lines.append(_unusable(leaf, error))
    return lines + [_missing(source, *each) for source, each in missing.items()]


def _missing(source: str, reason: str, tasks: list[str], parts: Iterable[str | None]) -> str:
    calls = "; ".join(f"f({', '.join(repr(each) for each in (source, part) if each)})" for part in parts)
    return (
        f"{tasks[0]}{and_more(tasks)} needs the data set {source}, which is not on this machine ({reason}). Fetch it "
        f"where there is internet, into a cache that this machine sees (HF_HOME): "
        f'python -c "from datasets import load_dataset as f; {calls}"'
    )


def _unusable(name: str, error: Exception) -> str:
    return f"{name} cannot be used: {type(error).__name__}: {_first_line(error)}."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")


def _check(task: Any) -> None:
    """Raises UserError for a task that asks for what is not done here."""
    from tptrain.generate.harness import generation

    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"tasks={name}: has images or sounds, and only text is known here. Leave it out.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"tasks={name}: runs code that the model writes, which is not done here. Leave it out.")
    if task.get_config("output_type") == "generate_until":
        try:
            generation(task.get_config("generation_kwargs") or {})
        except UserError as error:
            raise UserError(f"tasks={name}: {error}") from error
