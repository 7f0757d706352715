"""What a model preset brings with it, what wins over it, and what a large model is not trained on unless asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import tptrain
from tptrain.config import UserError, check_data, check_topology, load_config, validate
from tptrain.config.schema import micro_batch_size
from tptrain.models.check import check_model
from tptrain.models.cost import checkpoint_every
from tptrain.plan.report import plan

PUBLISHED = {  # peak learning rate, warm-up steps, tokens of a batch; sources: conf/model
    "gpt2": (6e-4, 715, 2**19),
    "llama3_8b": (3e-4, 8000, 2**22),
    "llama3_70b": (1.5e-4, 8000, 2**22),
    "llama3_1b": (2e-4, 358, 2**20),
    "llama3_3b": (1.6e-4, 358, 2**20),
    "qwen3_8b": (1.2e-4, 179, 2**21),
    "qwen3_32b": (1e-4, 179, 2**21),
    "tiny": (1e-3, 20, 8 * 256),
}
DATA = ["data=stdlib", "data.tokenizer=bytes"]


def recipe(*lines: str) -> tuple[float, int, int]:
    config = load_config(lines)
    return config.optim.lr, config.optim.warmup_steps, config.train.global_batch_size * config.train.seq_len


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_preset_has_the_published_recipe_with_its_source(model: str) -> None:
    assert recipe(f"model={model}") == PUBLISHED[model]
    if model != "tiny":
        assert recipe(f"model={model}", "optim=linear") == PUBLISHED[model]
        text = Path(f"conf/model/{model}.yaml").read_text()
        assert "arxiv.org/abs" in text or "not published" in text


def test_the_command_line_wins_over_train_and_optim_and_these_over_the_model(tmp_path: Path) -> None:
    """In whatever order they are typed. Presets of train= and optim= that name these keys stand in a copy of conf/."""
    lines = ["model=llama3_8b", "train=ours", "optim=ours"]
    root = Path(__file__).parent.parent
    program = f"""
import shutil, sys
from pathlib import Path
shutil.copytree("{root}/conf", "{tmp_path}/conf")
Path("{tmp_path}/conf/train/ours.yaml").write_text("global_batch_size: 7")
Path("{tmp_path}/conf/optim/ours.yaml").write_text("{{lr: 0.5, warmup_steps: 3}}")
from tptrain.config import load, load_config
load.config_dir = lambda: Path("{tmp_path}/conf")
for lines in ({lines}, {lines[::-1]}, ["optim.lr=0.25", *{lines}, "train.global_batch_size=5", "optim.warmup_steps=4"]):
    config = load_config(lines)
    print(config.optim.lr, config.optim.warmup_steps, config.train.global_batch_size, config.train.seq_len)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == ["0.5 3 7 4096", "0.5 3 7 4096", "0.25 4 5 4096"]


def test_a_preset_of_a_large_model_wants_its_data_named(tmp_path: Path) -> None:
    """In under a second, without torch; what is asked for by name is done."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    missing = {(): "data.source: not set", ("data=stdlib",): "data.tokenizer: not set"}
    for lines, message in missing.items():
        done = tptrain("launch", "model=llama3_1b", *lines, f"run.dir={tmp_path / 'run'}", PYTHONPATH=str(tmp_path))
        assert (done.returncode, done.stdout.count("\n")) == (2, 1), done.stdout
        assert done.stdout.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
    config = load_config(["model=llama3_1b", *DATA])
    check_data(config)
    check_model(config)


def test_a_small_vocabulary_is_trained_on_the_embedded_text() -> None:
    assert load_config([]).data == load_config(DATA).data
    with pytest.raises(UserError, match=r"data\.source: not set"):
        check_data(load_config(["model.vocab_size=32769"]))


@pytest.mark.parametrize(
    ("lines", "every"),
    [
        ((), 100),
        (("model=gpt2",), 100),  # 1.5 GB
        # 14.8 GB at 0.1 GB/s take 148 s; a step's 6 x 1.24e9 x 2**20 FLOPs and those of attention, at 4e14/s, 22 s
        (("model=llama3_1b",), 300),
        (("model=llama3_8b",), 100),  # 964 s, and 509 s
        (("model=llama3_8b", "train.global_batch_size=8"), 7700),
        (("model=llama3_8b", "checkpoint=rare"), 1000),
        (("model=llama3_8b", "checkpoint.every=7"), 7),
        (("model=llama3_8b", "checkpoint.every=0"), 0),
    ],
)
def test_the_space_between_checkpoints_follows_their_size(lines: tuple[str, ...], every: int) -> None:
    config = load_config(lines)
    assert checkpoint_every(config) == every


def test_plan_says_how_often_a_checkpoint_is_written() -> None:
    report = plan(load_config(["model=llama3_1b", "train.steps=5000"]))
    assert "one is written every 300 steps (checkpoint.every), the newest 2 of them kept: up to 41.43 GiB" in report


def test_a_batch_of_8_on_two_data_parallel_ranks() -> None:
    config = load_config(["train.global_batch_size=8", "cluster.tasks_per_node=2"])
    validate(config)
    check_topology(config, 2)
    assert micro_batch_size(config, 2) == 4
