"""lm-evaluation-harness on models of ours: the scores of its own model of Transformers, and where they are noted."""

import functools
import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer

from tests.commands import losses, tptrain
from tests.corpus import overrides
from tests.directories import save_tokenizer
from tests.distributed import mesh, run_ranks, spare_garbage_collection
from tests.families import FAMILIES
from tests.harness_tasks import (
    NAMES,
    absent_task,
    evaluated,
    transformers_model,
    write_tasks,
    written_by_the_harness,
)
from tests.test_generate import hf_model
from tests.wandb_files import wandb_history
from tests.zoo_generate import lively
from tptrain.__main__ import main
from tptrain.config import Config, UserError, load_config
from tptrain.config.evaluation import split_words
from tptrain.config.load import write_config
from tptrain.config.schema import EvalConfig
from tptrain.generate.codec import Codec
from tptrain.models.sizes import settle_engine, sizes
from tptrain.ops.table import REFERENCE
from tptrain.parallel.control import MAIN_FAILED
from tptrain.records.evaluations import take
from tptrain.records.rows import last_row, read_all, read_rows
from tptrain.run.harness import Ranks, evaluate
from tptrain.run.rank import run_lock
from tptrain.run.results import Target, write
from tptrain.run.tasks import load_tasks
from tptrain.train.loop import train
from tptrain.train.metrics import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval", "ignore::Warning:transformers")
# "bos": its tokenizer puts <s> before a text, "plain": it does not; "experts": by Transformers' code. GPT-2 has no
# position beyond its last.
MODELS = {"bos": "llama", "plain": "gpt2", "experts": "mixtral"}
SIZES = {"vocab_size": 250, "max_position_embeddings": 64}
CLOSE = 1e-4  # nats of a log-likelihood
CHAT = """\
{{ bos_token }}{% for message in messages %}{{ message.role[:2] }} {{ message.content }}{{ eos_token }}\
{% endfor %}{% if add_generation_prompt %}as {% endif %}"""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
TEMPLATES = {"bos": CHAT, "plain": NO_SYSTEM + CHAT}
ASKED = {  # of which model, and how
    "turns": ("bos", ["apply_chat_template=true", "num_fewshot=1", "system_instruction=sa mi"]),
    "one turn": ("bos", ["apply_chat_template=true", "num_fewshot=1", "fewshot_as_multiturn=false"]),
    "no chat": ("bos", ["system_instruction=sa mi"]),
    "refused": ("plain", ["apply_chat_template=true", "system_instruction=sa mi"]),
}
TRACKED = ("model_source", "model_name", "model_name_sanitized")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, and directories with a tokenizer each."""
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder)
    for name in MODELS:
        save_tokenizer(folder / name)
    tokenizer, settings = folder / "plain" / "tokenizer.json", folder / "plain" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"post_processor": None}))
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}))
    for name, template in TEMPLATES.items():
        (folder / name / "chat_template.jinja").write_text(template)
    return folder


def _config(folder: Path, name: str) -> Config:
    config = load_config(["model=hf", f"model.path={folder / name}", "model.dropout=0", "train.device=cpu"])
    settle_engine(config)
    return config


# --------------------------------------------------------------------------------------------------------------- scores


def _asked_of(name: str, folder: Path) -> dict[str, EvalConfig]:
    """Settings of one model."""
    words = [f"tasks=[{NAMES[0]},{NAMES[2]}]", f"task_dir={folder}/tasks", "log_samples=true"]
    return {which: split_words([*words, *asked])[0] for which, (model, asked) in ASKED.items() if model == name}


def _by_ours(folder: Path, configs: dict[str, Config], tp: int, batch_size: int) -> dict[str, Any]:
    """What rank 0's harness has seen of each model, and "asked": the results of each setting."""
    from tptrain.generate.harness import Harness

    seen = dict[str, Any](asked={})
    for name, config in configs.items():
        codec, size = Codec(config, folder / name), sizes(config.model)
        ranks = Ranks(config, None, codec, batch_size, mesh(tp, size.kv_heads, shared=tp > 1), REFERENCE)
        if ranks.mesh.is_main:
            harness = Harness(codec, size.max_positions, ranks.score, ranks.go_on, lambda _: None)
            seen[name] = evaluated(harness, folder / "tasks")
            ranks.dismiss()
        else:
            ranks.serve()
        for which, settings in _asked_of(name, folder).items():
            if ranks.mesh.is_main:
                seen["asked"][which] = evaluate(ranks, load_tasks(settings), config, settings, name)
            else:
                ranks.serve()
    return seen


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[Any, dict[str, Any]]:
    """By "Transformers", and by the tp degrees 1 (two dp ranks) and 2, of each model.

    Results and samples of each setting are written to folders by the same names.
    """
    right, configs = {}, {}
    for name, family in MODELS.items():
        model = hf_model(FAMILIES[family]) if family in FAMILIES else lively(family, **SIZES)
        if name == "bos":
            _end_an_answer(model, folder)
        model.save_pretrained(folder / name)
        right[name], configs[name] = transformers_model(model, folder / name), _config(folder, name)
        for which, settings in _asked_of(name, folder).items():
            written_by_the_harness(right[name], settings, folder / "Transformers" / which)
    right = {name: evaluated(model, folder / "tasks") for name, model in right.items()}
    ours = {tp: run_ranks(2, _by_ours, folder, configs, tp, size)[0] for tp, size in ((1, 3), (2, 8))}
    for tp, by_name in ours.items():
        for which, results in by_name["asked"].items():
            write(Target("", folder / str(tp) / which / "results.json", None), results)
    return {"Transformers": right, **ours}


@torch.no_grad()
def _end_an_answer(model: Any, folder: Path) -> None:
    """An answer begins with the model's own id that ends one, which is not the tokenizer's: two rows of the head change
    their places.
    """
    tokenizer = Tokenizer.from_file(str(folder / "bos" / "tokenizer.json"))
    question = json.loads((folder / "made_generation.jsonl").read_text().splitlines()[0])["question"]
    first = int(model(torch.tensor([tokenizer.encode(question).ids])).logits[0, -1].argmax())
    end = model.generation_config.eos_token_id
    assert end not in (first, tokenizer.token_to_id("</s>"))
    rows = model.lm_head.weight
    rows[[first, end]] = rows[[end, first]]


def _numbers(answers: list[Any]) -> list[tuple[float, bool]]:
    """Log-likelihoods, and whether they are of the likeliest tokens, in a flat list."""
    pairs = [pair for document in answers for request in document for pair in request]
    return [pair if isinstance(pair, tuple) else (pair, False) for pair in pairs]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_harness_own_model(name: str, tp: int, seen: dict[Any, dict[str, Any]]) -> None:
    right, ours = seen["Transformers"][name], seen[tp][name]
    worst = 0.0
    for task in NAMES[:2]:
        pairs = list(zip(_numbers(right["answers"][task]), _numbers(ours["answers"][task]), strict=True))
        assert len({round(theirs[0], 2) for theirs, _ in pairs}) > len(pairs) / 2, "a test of nothing"
        assert [theirs[1] for theirs, _ in pairs] == [own[1] for _, own in pairs]
        worst = max(worst, *(abs(theirs[0] - own[0]) for theirs, own in pairs))
    answers = [answer for document in right["answers"][NAMES[2]] for request in document for answer in request]
    assert len(set(answers)) > 3, "a test of nothing"
    assert ours["answers"][NAMES[2]] == right["answers"][NAMES[2]]
    assert worst < CLOSE
    for task, scores in right["scores"].items():
        for key, value in scores.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours["scores"][task][key] == close, (task, key)
    print(f"{name}, tp={tp}: log-likelihoods within {worst:.1e} nats; {ours['scores']}")


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_alone_gives_the_same_ids(name: str, folder: Path, seen: dict[Any, dict[str, Any]]) -> None:
    """As for a run without a Hugging Face directory: without Transformers' tokenizer."""
    config = _config(folder, name)
    theirs, ours = Codec(config, folder / name), Codec(config, None)
    assert (theirs.tokenizer is None, ours.tokenizer is None) == (False, True)
    assert ours.prefix == theirs.prefix
    for text in ("mu re sa", "", "<s>mu", " re", "q"):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, special=False) == theirs.encode(text, special=False), text
        assert ours.decode(ours.encode(text), special=True) == theirs.decode(theirs.encode(text), special=True)


# ----------------------------------------------------------------------------------------------------- chats, samples


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results, and a task's samples."""
    (file,) = folder.glob("results*.json")
    lines = {each.name.split("_20")[0]: each.read_text().splitlines() for each in folder.glob("samples_*.jsonl")}
    return json.loads(file.read_text()), {task: [json.loads(line) for line in lines[task]] for task in sorted(lines)}


def _without_numbers(sample: dict[str, Any]) -> tuple[list[str], dict[str, Any], list[float]]:
    """A sample's keys in their order, what is the same wherever it is computed, and its log-likelihoods."""
    rest, numbers = sample | {"resps": [], "filtered_resps": []}, list[float]()
    for key in ("resps", "filtered_resps"):
        for answer in [each for one in sample[key] for each in (one if key == "resps" else [one])]:
            rest[key].append(answer[1] if isinstance(answer, list) else answer)  # whether it is the likeliest
            numbers += [float(answer[0])] if isinstance(answer, list) else []
    return list(sample), rest, numbers


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("which", ASKED)
def test_chats_and_samples_are_those_of_the_harness(which: str, tp: int, folder: Path, seen: object) -> None:
    (right, right_samples), (ours, samples) = (_read(folder / place / which) for place in ("Transformers", str(tp)))
    assert list(samples) == list(right_samples) == ["samples_made_choice", "samples_made_generation"]
    worst = 0.0
    for task, rows in right_samples.items():
        for theirs, own in zip(rows, samples[task], strict=True):
            (keys, rest, numbers), (own_keys, own_rest, own_numbers) = map(_without_numbers, (theirs, own))
            assert (own_keys, own_rest) == (keys, rest)
            worst = max([worst, *(abs(a - b) for a, b in zip(numbers, own_numbers, strict=True))])
    assert worst < CLOSE
    print(f"{which}, tp={tp}: log-likelihoods within {worst:.1e} nats")

    assert ours.keys() == right.keys()
    differ = {key for key in right if ours[key] != right[key]}
    assert differ <= {"config", "date", "tokenizer_pad_token", *TRACKED, *(key for key in right if "time" in key)}
    assert set(ours["task_hashes"]) == set(NAMES) - {NAMES[1]}


def test_what_is_asked_differs_and_fits(folder: Path, seen: object) -> None:
    """Else the tests of chats are of nothing: of cut contexts only the end is seen."""
    codec, firsts = Codec(_config(folder, "bos"), folder / "bos"), set[str]()
    for which in ASKED:
        _, samples = _read(folder / "2" / which)
        for task, rows in samples.items():
            asked = [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]
            assert min(len(codec.encode(text)) for text in asked) < 45, (which, task)
            firsts.add(f"{task}: {asked[0]}")
    assert len(firsts) == 2 * len(ASKED)


def test_samples_are_not_written_over(
    folder: Path, tmp_path: Path, seen: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, samples = _read(folder / "2" / "turns")
    samples = {"made_choice": [row | {"arguments": [], "doc": "é"} for row in samples["samples_made_choice"]]}
    monkeypatch.setattr("tptrain.run.results.datetime", SimpleNamespace(now=lambda: datetime(2020, 1, 1)))
    target = Target("", out := tmp_path / "scores.json", None)
    write(target, results | {"samples": samples})
    file = tmp_path / "samples_made_choice_2020-01-01T00-00-00.jsonl"
    assert f"samples: {file}" in capsys.readouterr().out
    before = file.read_text()
    assert before.count('"doc": "é"') == len(before.splitlines()) == 7
    assert json.loads(out.read_text()) == results
    with pytest.raises(FileExistsError):
        write(target, results | {"samples": samples})
    assert file.read_text() == before


def test_a_template_may_refuse_system_messages_but_not_every_chat(folder: Path, seen: object) -> None:
    from tptrain.generate.harness import Harness

    lines, codec = list[str](), Codec(_config(folder, "plain"), folder / "plain")
    harness = Harness(codec, 64, lambda _: [], lambda _: [], lines.append)
    chat = [{"role": "system", "content": "sa"}, {"role": "user", "content": "mi"}]
    assert [harness.apply_chat_template(chat) for _ in range(2)] == ["us mi</s>as "] * 2
    assert harness.apply_chat_template([*chat, {"role": "assistant", "content": "ra"}], False) == "us mi</s>as ra"
    assert lines == ["warning: the chat template refuses system messages, which are left out: no system here"]
    codec.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="the template refuses a chat: never"):
        harness.apply_chat_template(chat)


# ------------------------------------------------------------------------------------------------- where they are noted


def _train(lines: list[str]) -> None:
    config = load_config(lines)
    Path(config.run.dir).mkdir(exist_ok=True)
    write_config(config, Path(config.run.dir) / "config.yaml")
    spare_garbage_collection()
    train(config, mesh(1))


def test_a_run_has_the_scores_in_its_directory(folder: Path, tmp_path: Path) -> None:
    lines = [*overrides(tmp_path), "model.max_position_embeddings=64", "train.steps=4", "checkpoint.every=2"]
    lines += ["wandb.mode=offline"]
    run_dir = tmp_path / "run"
    _train(lines)
    before = read_rows(run_dir / "metrics.jsonl")
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    done = tptrain(
        "eval",
        str(checkpoint),
        f"tasks=[{','.join(NAMES)}]",
        f"task_dir={folder}/tasks",
        "limit=2",
        "parallel.tp=2",
        "log_samples=true",
    )
    assert done.returncode == 0, done.stdout
    assert "|made_choice" in done.stdout
    (file,) = (run_dir / "evals" / "step-00000002").glob("results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["model_args"]["tp"] == 2
    assert results["n-samples"]["made_choice"] == {"original": 7, "effective": 2}
    assert "samples" not in results
    lines_of = {each.name: len(each.read_text().splitlines()) for each in file.parent.glob("samples_*")}
    assert lines_of == {file.name.replace("results", f"samples_{task}") + "l": 2 for task in NAMES}
    bits = results["results"]["made_perplexity"]["bits_per_byte,none"]
    assert 0 < bits < 20

    assert read_rows(run_dir / "metrics.jsonl") == before, "rows of training are as they were"
    assert last_row(run_dir / "metrics.jsonl") == before[-1]
    *_, row = read_all(run_dir / "metrics.jsonl")
    assert (row["step"], row["eval"]["made_perplexity"]["bits_per_byte"]) == (2, bits)
    logged = [each for each in wandb_history(run_dir) if "eval_step" in each]
    assert [(each["eval_step"], each["eval/made_perplexity/bits_per_byte"]) for each in logged] == [(2, bits)]

    # A run that goes on keeps the row, and takes those that come while it is trained.
    with run_lock(run_dir):
        write(Target("", None, load_config(lines), step=4), {"results": {"made_choice": {"acc,none": 0.5, "n": 1}}})
    assert read_all(run_dir / "metrics.jsonl")[-1] == row
    _train([*lines, "train.steps=6"])
    assert len(losses(run_dir)) == 6
    assert [each["step"] for each in read_all(run_dir / "metrics.jsonl") if "eval" in each] == [2, 4]
    assert take(run_dir) == []
    assert {each.get("eval/made_choice/acc") for each in wandb_history(run_dir)} >= {0.5}


def test_a_resume_drops_scores_of_checkpoints_that_it_has_left(tmp_path: Path) -> None:
    rows = [{"step": 1}, {"step": 2}, {"step": 1, "eval": {"t" * 9000: {}}}, {"step": 3}, {"step": 3, "eval": {}}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Recorder(load_config([f"run.dir={tmp_path}", "wandb.mode=disabled"]), start=2).close()
    assert read_all(path) == rows[:3]
    assert last_row(path) == {"step": 2}, "behind a row that is longer than the tail"


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_every_missing_data_set_is_named_before_ranks_start(
    folder: Path, tmp_path: Path, seen: object, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = tmp_path / "tasks"
    shutil.copytree(folder / "tasks", tasks)
    absent_task(tasks, "first", "someone/absent", "part1")
    absent_task(tasks, "second", "someone/absent", "part2")
    absent_task(tasks, "third", "another/one")
    (tasks / "group.yaml").write_text("group: both\ntask: [first, second]\n")
    words = ["tasks=[made_choice,both,third]", f"task_dir={tasks}", "parallel.tp=2"]
    assert main(["eval", str(folder / "bos"), *words]) == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "tasks: first (and 1 more) needs the data set someone/absent, which is not on this machine" in first
    assert "f('someone/absent', 'part1'); f('someone/absent', 'part2')" in first
    assert "tasks: third needs the data set another/one, which" in second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limit=2"], "limit: is of tasks of lm-evaluation-harness"),
        (["tasks=a", "batch_size=0"], "batch_size=0: must be at least 1"),
        (["tasks=a", "data=stdlib"], "data=stdlib: tasks have data of their own"),
        (["tasks=a", "task_dir=/nowhere"], "task_dir=/nowhere: no such folder"),
        (["tasks=a", "out=results.txt"], "out=results.txt: results are JSON"),
        (["apply_chat_template=true"], "apply_chat_template: is of tasks of lm-evaluation-harness"),
        (["tasks=a", "fewshot_as_multiturn=true"], "fewshot_as_multiturn=true: only a chat has turns. Add apply_chat"),
        (["tasks=[made_choice,pair]", "task_dir=TASKS"], "tasks=pair: made_choice is in made_choice, too. Leave one"),
        (["tasks=beams", "task_dir=TASKS"], "tasks=beams: generation_kwargs.num_beams=4: not known here"),
        (["tasks=made_choice", "task_dir=TASKS", "max_length=65"], "max_length=65: the model has 64 positions"),
    ],
)
def test_a_mistake_is_one_message(
    folder: Path, seen: object, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "tasks" / "made_generation.yaml").read_text().replace("{until", "{num_beams: 4, until")
    (folder / "tasks" / "pair.yaml").write_text("group: pair\ntask: [made_choice, made_perplexity]\n")
    (folder / "tasks" / "beams.yaml").write_text(text.replace("task: made_generation", "task: beams"))
    words = [word.replace("TASKS", str(folder / "tasks")) for word in words]
    assert main(["eval", str(folder / "bos"), *words, "parallel.tp=2", "train.device=cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=1"], "FOLDER has no chat template."),
        (["parallel.tp=2"], "FOLDER has no chat template. Add its chat_template.jinja there, or leave it out."),
        (
            ["parallel.tp=2", "data.tokenizer=OTHER"],
            "this model's tokenizer is not that of a Hugging Face directory, and has no chat",
        ),
    ],
)
def test_a_model_without_a_template_is_refused_before_ranks_start(
    words: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    seen: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("launch.here.run_ranks", lambda *_: pytest.fail("ranks have been started"))
    shutil.copytree(folder / "bos", tmp_path / "bos")
    (tmp_path / "bos" / "chat_template.jinja").unlink()
    words = ["tasks=[made_choice]", f"task_dir={folder}/tasks", "apply_chat_template=true", "train.device=cpu", *words]
    words = [word.replace("OTHER", str(folder / "plain" / "tokenizer.json")) for word in words]
    with patch.dict(os.environ):  # a lone rank's place is noted there
        assert main(["eval", str(tmp_path / "bos"), *words]) == 2
    message = f"error: apply_chat_template=true: {message.replace('FOLDER', str(tmp_path / 'bos'))}"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_an_unknown_task_gets_near_names(
    folder: Path, seen: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.tasks

    without_its_own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # which take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_its_own)
    assert main(["eval", str(folder / "bos"), "tasks=[made_choise]", f"task_dir={folder}/tasks", "parallel.tp=2"]) == 2
    message = "error: tasks=made_choise: no task of lm-evaluation-harness. Did you mean made_choice?"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_the_extra_is_named(
    folder: Path, seen: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", str(folder / "bos"), "tasks=[made_choice]", "parallel.tp=2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("Run `pip install 'tptrain[eval]'`.")


def _failing(folder: Path) -> str:
    config = _config(folder, "bos")
    ranks = Ranks(config, None, Codec(config, None), 1, mesh(2, 2), REFERENCE)
    if ranks.mesh.is_main:
        ranks.fail(ValueError("a task's code"))
        return ""
    with pytest.raises(UserError) as raised:
        ranks.serve()
    return str(raised.value)


def test_a_failure_of_the_harness_ends_all_ranks(folder: Path, seen: object) -> None:
    assert run_ranks(2, _failing, folder)[1] == f"{MAIN_FAILED}ValueError: a task's code"
