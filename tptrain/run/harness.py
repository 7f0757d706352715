"""One rank of `eval tasks=[...]` as a process: rank 0 runs lm-evaluation-harness, all ranks compute what it asks."""

import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tptrain.config import Config, UserError
from tptrain.config.schema import EvalConfig
from tptrain.generate.codec import Codec
from tptrain.generate.continuations import Continue, continuations
from tptrain.generate.score import Request, Score, scores
from tptrain.models.sizes import sizes
from tptrain.ops.compiled import eager
from tptrain.ops.table import Operations
from tptrain.parallel.control import MAIN_FAILED
from tptrain.parallel.mesh import Mesh
from tptrain.run.preflight import ReportedByRank0
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.run.tasks import load_tasks
from tptrain.run.weights import model_with_weights
from tptrain.train.trainer import cross_entropy
from tptrain.watch.black_box import BlackBox

UNLIMITED = 2**30  # positions, where a model does not say how many it has
DEFAULT_LENGTH = 2048  # tokens, then; as in the harness
Results = dict[str, Any]  # as the harness has them in its own files


class Ranks:
    """What all ranks do together while rank 0 runs the harness."""

    def __init__(
        self, config: Config, checkpoint: Path | None, codec: Codec, batch_size: int, mesh: Mesh, ops: Operations
    ):
        self.codec, self.batch_size, self.mesh = codec, batch_size, mesh
        self.model = model_with_weights(config, checkpoint, mesh, ops)
        self.loss = cross_entropy(self.model, ops)

    def score(self, requests: list[Request]) -> list[Score]:
        """Rank 0 only."""
        return self._do(self.mesh.control.main_first(lambda: requests))

    def go_on(self, task: Continue) -> list[list[int]]:
        """Rank 0 only."""
        return self._do(self.mesh.control.main_first(lambda: task))

    def dismiss(self) -> None:
        """Rank 0 only: there is nothing more to do."""
        self.mesh.control.main_first(lambda: None)

    def fail(self, error: BaseException) -> None:
        """Rank 0 only: the others end, too."""

        def again() -> None:
            raise error

        with suppress(BaseException):
            self.mesh.control.main_first(again)

    def serve(self) -> None:
        """The other ranks: do what rank 0 asks, which may be long in coming, until it dismisses them."""
        while (task := self.mesh.control.main_first(lambda: None)) is not None:
            self._do(task)

    def _do(self, task: list[Request] | Continue) -> list[Any]:
        """The result of each request."""
        try:
            if isinstance(task, Continue):
                own: dict[int, Any] = dict(continuations(self.model, self.codec, task, self.batch_size))
            else:
                own = dict(scores(self.model, self.loss, task, self.batch_size))
        except (torch.OutOfMemoryError, MemoryError) as error:
            less = f"Use batch_size={self.batch_size // 2}" if self.batch_size > 1 else "Use a larger parallel.tp"
            raise UserError(f"batch_size={self.batch_size}: out of memory. {less}, or a smaller max_length.") from error
        parts = self.mesh.control.gather(own if self.mesh.index("tp") == 0 else {})
        everything = {number: result for part in parts for number, result in part.items()}
        return [everything[number] for number in sorted(everything)]


def run(
    config: Config, checkpoint: Path | None, folder: Path | None, settings: EvalConfig, name: str
) -> Results | None:
    """The harness's results, on rank 0, of a model by the `name` of its run or directory.

    `folder`: of the model's files beside its weights. Raises UserError, CheckpointError and RendezvousError, and on the
    other ranks ReportedByRank0 where rank 0 has failed.
    """
    box = BlackBox()
    rendezvous = meet(config, box)
    mesh, tasks = connect_ranks(config, box, rendezvous), list[Any]()

    def prepare() -> None:
        tasks.extend(load_tasks(settings))  # first: whether the hub is asked is settled before Transformers is imported
        codec = Codec(config, folder)  # so that its mistake is told once
        if settings.apply_chat_template:
            codec.check_template()

    try:
        mesh.control.main_first(prepare)
        ops = eager(rendezvous.ops)
        ranks = Ranks(config, checkpoint, Codec(config, folder), settings.batch_size, mesh, ops)
        results = evaluate(ranks, tasks, config, settings, name) if mesh.is_main else ranks.serve()
    except UserError as error:
        if mesh.is_main or not str(error).startswith(MAIN_FAILED):
            raise
        raise ReportedByRank0(str(error)) from error
    dist.destroy_process_group()
    return results


def evaluate(ranks: Ranks, tasks: list[Any], config: Config, settings: EvalConfig, name: str) -> Results:
    """Rank 0 only. Its failure ends the other ranks, too."""
    try:
        results = _by_harness(ranks, tasks, config, settings, name)
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.dismiss()
    return results


def _by_harness(ranks: Ranks, tasks: list[Any], config: Config, settings: EvalConfig, name: str) -> Results:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.tasks import TaskManager

    from tptrain.generate.harness import Harness

    tracker, mesh, chat = GeneralConfigTracker(), ranks.mesh, settings.apply_chat_template
    multiturn = chat if settings.fewshot_as_multiturn is None else settings.fewshot_as_multiturn
    positions = sizes(config.model).max_positions
    length = settings.max_length or (positions if positions < UNLIMITED else DEFAULT_LENGTH)
    harness = Harness(ranks.codec, length, ranks.score, ranks.go_on, _say)
    results: Any = simple_evaluate(
        harness,
        tasks=tasks,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        device=str(mesh.device),
        limit=settings.limit,
        log_samples=settings.log_samples,
        apply_chat_template=chat,
        fewshot_as_multiturn=multiturn,
        system_instruction=settings.system_instruction,
        task_manager=TaskManager(include_defaults=False),  # to read the harness's own takes seconds
    )
    arguments = {"pretrained": name, "dtype": config.train.precision, "tp": mesh.size("tp"), "dp": mesh.size("dp")}
    results["config"] |= {"model": "tptrain", "model_args": arguments}
    template = harness.chat_template(True) if chat else None
    tracker.log_experiment_args("tptrain", arguments, settings.system_instruction, template, multiturn)
    tracker.log_end_time()
    return results | {"task_hashes": _task_hashes(results.get("samples", {}))} | asdict(tracker)


def _task_hashes(samples: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Of each task's documents, prompts and targets, as the harness has them in its own file."""
    from lm_eval.utils import hash_string

    parts = ("doc_hash", "prompt_hash", "target_hash")
    return {task: hash_string("".join(row[part] for row in rows for part in parts)) for task, rows in samples.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
