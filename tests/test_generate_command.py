"""`generate` as a user types it, on a directory made on the spot, against Transformers' tokenizer and `generate`."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import TIMEOUT_S, TPTRAIN, environment, tptrain
from tests.directories import save_model, save_tokenizer
from tests.families import case_of
from tptrain.__main__ import main

VOCABULARY = 300
NEW = 12
ODD = "a, \"b\" and 'c' = {d: [e]} (f) \\ ${HOME} $x; #1\n\ttwo % 🚀 ?"
pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 64 positions, and a tokenizer that puts <s> before a text."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(case_of("llama", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1), folder)
    save_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """Transformers' greedy continuation of a text: its ids."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def continuation(prompt: str, new: int = NEW) -> tuple[str, int]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=new, pad_token_id=0)
        ids = whole[0, inputs.input_ids.shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True), len(ids)

    return continuation


def _generate(*words: str, stdin: str | None = None, **variables: str) -> str:
    """What the command prints on stdout."""
    command = [*TPTRAIN, "generate", *words]
    own = environment(**variables)
    done = subprocess.run(command, env=own, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    from_directory = Path(words[0], "config.json").exists()
    assert done.stderr.count("model.engine=native") == from_directory  # one process speaks for all ranks
    return done.stdout


def _rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_prompt_arrives_as_typed(folder: Path, theirs: Any) -> None:
    (row,) = _rows(_generate(str(folder), f"prompt={ODD}", f"max_new_tokens={NEW}", "format=json", "parallel.tp=2"))
    text, tokens = theirs(ODD)
    assert (row["prompt"], row["text"], row["tokens"]) == (ODD, text, tokens)


def test_many_prompts_of_a_file_on_four_ranks(folder: Path, theirs: Any, tmp_path: Path) -> None:
    """Two copies of a model on two ranks each, batches of two; what is no prompt in an object comes back."""
    lines = [{"prompt": "the"}, {"prompt": ODD, "id": 7}, *({"prompt": "the cat " * n} for n in range(1, 6))]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "{no object}\n\n")
    words = [str(folder), f"prompt_file={file}", f"max_new_tokens={NEW}", "format=json", "batch_size=2"]
    rows = _rows(_generate(*words, "parallel.tp=2", "cluster.tasks_per_node=4"))
    assert [row["prompt"] for row in rows] == [*(line["prompt"] for line in lines), "{no object}"]
    assert rows[1]["id"] == 7
    for row in rows:
        assert (row["text"], row["tokens"]) == theirs(row["prompt"]), row


def test_stdin_has_a_prompt_each_line(folder: Path, theirs: Any) -> None:
    text = _generate(str(folder), f"max_new_tokens={NEW}", stdin="the cat\nand\n")
    assert text == f"the cat\n{theirs('the cat')[0]}\n\nand\n{theirs('and')[0]}\n\n"


def test_an_answer_ends_before_a_stop_text(folder: Path, theirs: Any) -> None:
    whole = theirs("the cat", 40)[0]
    stop = whole[9:12]
    text = _generate(str(folder), "prompt=the cat", "max_new_tokens=40", f"stop={stop}", "stop=never comes")
    assert text == f"{whole[: whole.index(stop)]}\n"
    assert _generate(str(folder), "prompt=the cat", "max_new_tokens=40", "stop=never comes") == f"{whole}\n"


def test_a_chat_is_put_into_the_models_template(folder: Path, theirs: Any, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    file = tmp_path / "chat.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    file.write_text(f"{json.dumps({'messages': messages})}\n{json.dumps({'prompt': 'Who?'})}\n")
    first, second = _rows(_generate(str(folder), f"prompt_file={file}", "chat=true", "format=json", "max_new_tokens=9"))
    assert first["text"] == theirs("[system] Be brief.\n[user] Who?\n[assistant]", 9)[0]
    assert second["text"] == theirs("[user] Who?\n[assistant]", 9)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "temperature=hot"], "temperature: "),
        (["prompt=a", "temperature=-1"], "temperature=-1.0: must be at least 0."),
        (["prompt=a", "top_k=5"], "top_k: temperature=0 takes the likeliest token"),
        (["prompt=a", "top_p=2", "temperature=1"], "top_p=2.0: must be at most 1."),
        (["prompt=a", "prompt_file=b"], "prompt_file: prompt= is there, too."),
        (["prompt=a", "stop="], "stop=: empty"),
        (["prompt=a", "format=xml"], "format=xml: must be one of text, json."),
        (["prompt=a", "max_new_token=5"], "max_new_token: unknown key."),
        (["prompt=a", "parallel.tp=3"], "parallel.tp=3: does not divide"),
        (["prompt=a", "cluster.nodes=2", "cluster.tasks_per_node=1"], "cluster.nodes=2: "),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str, folder: Path, capsys: Any) -> None:
    assert main(["generate", str(folder), *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_prompt_that_cannot_be_answered_is_one_message_at_any_tp(folder: Path, tmp_path: Path) -> None:
    for prompt, message in (("the " * 70, "71 tokens, and the model has 64 positions"),):
        done = tptrain("generate", str(folder), "parallel.tp=2", f"prompt={prompt}")
        assert (done.returncode, done.stdout.count("error: ")) == (2, 1)
        assert message in done.stdout
    done = tptrain("generate", str(folder), f"prompt_file={tmp_path / 'none.txt'}")
    assert (done.returncode, done.stdout.count("error: ")) == (2, 1)


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """A run with bytes has no token that begins a text: an empty prompt is a mistake. The same draws at tp=1 and 2."""
    run = tmp_path / "run"
    done = tptrain("launch", f"run.dir={run}", "train.steps=2", "wandb.mode=disabled", "train.seq_len=32")
    assert done.returncode == 0, done.stdout
    words = [str(run), "prompt=def f(", "temperature=1", "top_p=0.9", "seed=3", "max_new_tokens=30", "format=json"]
    assert _generate(*words) == _generate(*words, "parallel.tp=2")
    assert _generate(*words, "seed=4") != _generate(*words)
    assert "prompt: empty" in tptrain("generate", str(run), "prompt=").stdout


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_slurm_job_answers_on_the_terminal(folder: Path, theirs: Any) -> None:
    words = [str(folder), f"prompt={ODD}", f"max_new_tokens={NEW}", "cluster=slurm", "parallel.tp=2"]
    assert _generate(*words, "cluster.cpus_per_task=1", SLURM_CONF=os.environ["SLURM_CONF"]) == f"{theirs(ODD)[0]}\n"
