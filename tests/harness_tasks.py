"""Tasks of lm-evaluation-harness made on the spot, and the harness's own model of Transformers to compare with."""

import functools
import importlib
import json
import random
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tptrain.config.schema import EvalConfig

NAMES = ["made_choice", "made_perplexity", "made_generation"]
LONG = 40  # words: more tokens than the small models have positions
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
GENERATION = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [e, mu], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(folder: Path) -> Path:
    """Three tasks: choices among continuations of one context, perplexity of texts, and answers up to a text."""
    draw = random.Random(2)
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)

    def words(count: int) -> str:
        return " ".join(
            "".join(draw.choice("aeioucdfglmnrst") for _ in range(draw.randint(2, 5))) for _ in range(count)
        )

    def choice(length: int) -> dict[str, Any]:
        choices = [words(draw.choice((1, 1, 4))) for _ in range(4)]
        return {"question": words(length), "choices": choices, "answer": draw.randrange(4)}

    def write(name: str, text: str, documents: list[dict[str, Any]]) -> None:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in documents))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (tasks / f"{name}.yaml").write_text(head + text)

    write(NAMES[0], CHOICE, [choice(length) for length in (3, 8, 1, LONG, 5, 5, 12)])
    write(NAMES[1], PERPLEXITY, [{"text": words(length)} for length in (4, LONG, 25, 1)])
    write(NAMES[2], GENERATION, [{"question": words(length), "answer": words(1)} for length in (5, 1, LONG, 9, 3)])
    return tasks


def absent_task(tasks: Path, name: str, source: str, part: str | None = None) -> None:
    """A task whose data set is nowhere."""
    which = "" if part is None else f"dataset_name: {part}\n"
    (tasks / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: {source}\n{which}test_split: test\n{PERPLEXITY}")


@functools.cache
def _its_kind() -> Any:
    """The harness's own model. It imports accelerate, of which it then uses nothing."""
    importlib.import_module("lm_eval.evaluator")  # what is first imported below is forgotten with the stand-in
    stand_in: Any = types.ModuleType("accelerate")
    stand_in.Accelerator = stand_in.InitProcessGroupKwargs = stand_in.find_executable_batch_size = None
    stand_in.get_max_memory = None
    with patch.dict(sys.modules, {"accelerate": stand_in, "accelerate.utils": stand_in}):
        from lm_eval.models import huggingface
    return huggingface.HFLM


def transformers_model(model: Any, folder: Path, batch_size: int = 1) -> Any:
    """The harness's own model, around one that is there."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        return _its_kind()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def evaluated(model: Any, tasks: Path) -> dict[str, Any]:
    """Of the three tasks what the harness asks of a model, and its answers, and the scores that come of them."""
    from lm_eval.evaluator import evaluate

    from tptrain.run.tasks import load_tasks

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = {task.task_name: task for task in load_tasks(EvalConfig(tasks=NAMES, task_dir=str(tasks)))}
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=0)
        results: Any = evaluate(model, {"tasks": loaded}, log_samples=True)
    answers = {name: [sample["resps"] for sample in results["samples"][name]] for name in NAMES}
    return {"scores": results["results"], "answers": answers}


def written_by_the_harness(model: Any, settings: EvalConfig, folder: Path) -> None:
    """Its results and samples in an empty folder, by what its own command calls with the same settings."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from tptrain.run.tasks import load_tasks

    tracker, chat, multiturn = EvaluationTracker(str(folder / "results.json")), settings.apply_chat_template, True
    if settings.fewshot_as_multiturn is not None or not chat:
        multiturn = bool(settings.fewshot_as_multiturn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results: Any = simple_evaluate(
            model,
            tasks=load_tasks(settings),
            num_fewshot=settings.num_fewshot,
            log_samples=True,
            evaluation_tracker=tracker,
            system_instruction=settings.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
            task_manager=TaskManager(include_defaults=False),
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples)
        for task in results["configs"]:
            tracker.save_results_samples(task, samples[task])
