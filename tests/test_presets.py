"""What the presets resolve to: recipes and who wins over them, data, spacing of checkpoints, exported variables."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.job import shell_lines
from tests.commands import tptrain
from tests.corpus import overrides
from tests.test_config import MODELS
from tptrain.__main__ import main
from tptrain.config import Config, UserError, check_data, load, load_config, read_config, validate
from tptrain.models.cost import checkpoint_every, checkpoint_size
from tptrain.models.settings import decoder_spec
from tptrain.ops.table import REFERENCE
from tptrain.run.preflight import Meeting, Report
from tptrain.run.rendezvous import Rendezvous, surroundings

# Table 2.1 of GPT-3 (arXiv:2005.14165): millions of parameters, tokens of a batch, learning rate. Its 1 M are 2^20.
GPT3 = [(125, 2**19, 6e-4), (350, 2**19, 3e-4), (760, 2**19, 2.5e-4), (1300, 2**20, 2e-4), (2700, 2**20, 1.6e-4)]
GPT3 += [(6700, 2**21, 1.2e-4), (13000, 2**21, 1e-4), (175000, 3.2 * 2**20, 0.6e-4)]
# Llama 3 (arXiv:2407.21783), table 3 and section 3.4.1: learning rate, warm-up in steps, tokens of a batch
PUBLISHED = {
    "llama3_8b": (3e-4, 8000, 2**22),
    "llama3_70b": (1.5e-4, 8000, 2**22),
}


def _recipe(config: Config) -> tuple[float, int, int]:
    """Learning rate, warm-up in steps, sequences of a batch."""
    return config.optim.lr, config.optim.warmup_steps, config.train.global_batch_size


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_is_the_published_one_or_follows_the_rule(model: str) -> None:
    config = load_config([f"model={model}", "run.name=x"])
    text = (load.config_dir() / f"model/{model}.yaml").read_text()
    validate(config)
    lr, warmup, sequences = _recipe(config)
    tokens = sequences * config.train.seq_len
    assert "https://" in text, "a source"
    assert (model in PUBLISHED) == ("not published" not in text)
    if model in PUBLISHED:
        assert (lr, warmup, tokens) == PUBLISHED[model]
    else:
        _, batch, rate = min(GPT3, key=lambda row: abs(math.log(row[0] / MODELS[model])))
        assert (lr, warmup, tokens) == (rate, round(375e6 / batch), batch)


def test_the_rule_is_said_where_the_order_is() -> None:
    rows = re.findall(r"([\d.]+)([MB]) (\d\.\de-4) ([\d.]+)M\b", (load.config_dir() / "config.yaml").read_text())
    said = [(float(n) * (1000 if unit == "B" else 1), float(m) * 2**20, float(lr)) for n, unit, lr, m in rows]
    assert said == GPT3


def test_the_default_is_what_it_was() -> None:
    """The frozen losses and the quickstart rest on it."""
    for lines in ([], ["model=tiny"], ["model=tiny", "data=stdlib", "optim=cosine", "train=default"]):
        config = load_config([*lines, "run.name=x"])
        assert _recipe(config) == (1e-3, 20, 8)
        assert (config.optim.schedule, config.optim.min_lr_ratio) == ("cosine", 0.1)
        assert (config.train.steps, config.train.seq_len, config.train.precision) == (400, 256, "fp32")
        assert (config.data.source, config.data.tokenizer) == ("stdlib", "bytes")
        assert checkpoint_every(config) == 100


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups with two more options, which say what a recipe says too."""
    shutil.copytree(load.config_dir(), tmp_path / "conf")
    (tmp_path / "conf/optim/own.yaml").write_text("lr: 0.5\nwarmup_steps: 7\n")
    (tmp_path / "conf/train/own.yaml").write_text("global_batch_size: 48\n")
    monkeypatch.setattr(load, "config_dir", lambda: tmp_path / "conf")


RECIPE = (3e-4, 8000, 1024)  # of llama3_8b
ORDER = {
    "the model alone": ([], RECIPE),
    "options that say nothing of it": (["optim=constant", "train=pretrain"], RECIPE),
    "an option of optim": (["optim=own"], (0.5, 7, 1024)),
    "an option of train": (["train=own"], (3e-4, 8000, 48)),
    "the command line": (["optim.lr=0.1", "optim.warmup_steps=3", "train.global_batch_size=16"], (0.1, 3, 16)),
    "the command line over options": (["optim=own", "optim.lr=0.1", "train=own"], (0.1, 7, 48)),
}


@pytest.mark.usefixtures("options")
@pytest.mark.parametrize("case", ORDER)
def test_the_model_yields_to_other_presets_and_they_to_the_command_line(case: str) -> None:
    lines, expected = ORDER[case]
    lines = ["model=llama3_8b", *lines]
    for first in range(len(lines)):
        order = [*lines[first:], *lines[:first]]
        assert _recipe(load_config([*order, "run.name=x"])) == expected, order


def test_a_constant_rate_has_no_end_to_come_down_to() -> None:
    """The recipe's min_lr_ratio is nobody's wish; one on the command line is."""
    for line in ("optim=constant", "optim.schedule=constant"):
        validate(load_config(["model=llama3_8b", line, "run.name=x"]))
        with pytest.raises(UserError, match=r"^optim\.min_lr_ratio: has no effect"):
            load_config(["model=llama3_8b", "optim.min_lr_ratio=0.5", line, "run.name=x"])


# ----------------------------------------------------------------------------------------------------------------- data


UNFIT = "parallel.tp=7"  # refused later: where the refusal here is lost, no large model is trained on this machine


def test_a_large_vocabulary_has_no_default_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    files = ["data=files", "data.files=[text.txt]"]
    cases = [  # a model, what is said of its data by hand, the start of the message
        (["model=llama3_8b", "train=pretrain"], [], "data.source: not set"),
        (["model=gpt2"], ["data.tokenizer=bytes"], "data.source: not set"),
        (["model=qwen3_8b"], ["data=stdlib"], "data.tokenizer: not set"),
        (["model=llama3_1b"], files, "data.tokenizer: not set"),
        (["model=tiny", "model.vocab_size=32769"], [], "data.source: not set"),
    ]
    for verb in (["launch"], ["launch", "-m", "optim.lr=1e-4,1e-3"], ["train", "run.name=x"]):
        for model, lines, start in cases:
            assert main([*verb, *model, *lines, UNFIT]) == 2
            message = capsys.readouterr().err
            assert message.startswith(f"error: {start}")
            assert re.search(r"32,768 entries\. Give .*data(\.tokenizer)?=(stdlib|bytes)\.\n$", message)
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt"}


def test_what_was_said_by_hand_holds_and_a_small_vocabulary_needs_no_word() -> None:
    by_hand = ["data=stdlib", "data.tokenizer=bytes"]
    for lines in ([], ["model.vocab_size=32768"], ["model=llama3_8b", *by_hand], ["model=gpt2", *by_hand[::-1]]):
        config = load_config([*lines, "run.name=x"])
        check_data(config)
        validate(config)
        assert (config.data.source, config.data.tokenizer) == ("stdlib", "bytes")
        assert str(config.data.name).startswith("python-")


def test_a_hugging_face_model_has_its_tokenizer_and_no_default_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": {}}}))
    lines = ["model=hf", f"model.path={tmp_path}", f"run.dir={tmp_path}/run"]
    for size, source in ((151936, "auto"), (300, "stdlib")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
        data = load_config(lines).data
        assert (data.source, data.tokenizer) == (source, str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 151936}))
    assert main(["eval", *lines[:2]]) == 2
    assert capsys.readouterr().err.startswith("error: data.source: not set")


def test_config_shows_a_large_model_without_data_and_a_refusal_needs_no_torch() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from tptrain.__main__ import main\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):\n"
        "    assert main(['launch', 'model=llama3_8b', 'train=pretrain', 'parallel.tp=7']) == 2\n"
        "    assert main(['config', 'model=llama3_8b', 'train=pretrain']) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "for line in ('every: 100', 'source: auto', 'tokenizer: auto', 'lr: 0.0003'):\n"
        "    assert f'  {line}\\n' in out.getvalue(), line\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("model", MODELS)
def test_writing_checkpoints_takes_3_hundredths_of_the_time(model: str) -> None:
    """Of GPUs of 400 TFLOP/s that each write 100 MB/s; to the next hundred of steps, and a thousand at most."""
    for changes in ([], ["train.global_batch_size=128", "parallel.tp=4", "cluster.nodes=8", "cluster.gpus_per_node=8"]):
        config = load_config([f"model={model}", *changes, "run.name=x"])
        spec, train, size = decoder_spec(config.model), config.train, 12e6 * MODELS[model]
        assert checkpoint_size(spec) == pytest.approx(size, rel=0.01)
        step_s = spec.flops_per_token(train.seq_len) * train.global_batch_size * train.seq_len / 400e12
        least = size / 100e6 / step_s / 0.03
        expected = 100 if size < 10e9 else min(1000, 100 * math.ceil(least / 100))
        assert checkpoint_every(config) == expected
        alone = load_config([f"model={model}", *changes[:1], "run.name=x"])
        assert checkpoint_every(alone) == expected, "ranks have no say"


def test_the_command_line_decides_on_checkpoints() -> None:
    for line, every in (("checkpoint.every=7", 7), ("checkpoint.every=0", 0), ("checkpoint=rare", 1000)):
        assert checkpoint_every(load_config(["model=llama3_8b", line, "run.name=x"])) == every


# ---------------------------------------------------------------------------------------------------------- environment


def test_a_run_says_which_variables_it_has(tmp_path: Path) -> None:
    """A default, the user's own, cluster.env over the user's own, and a name that only cluster.env has."""
    lines = [*overrides(tmp_path), "train.steps=1", "cluster.env.GLOO_SOCKET_IFNAME=lo", "cluster.env.SITE='a b'"]
    done = tptrain("launch", *lines, GLIBC_TUNABLES="glibc.malloc.hugetlb=0", GLOO_SOCKET_IFNAME="none", OTHER="1")
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("environment: ")]
    assert said == ["environment: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 GLOO_SOCKET_IFNAME=lo SITE='a b'"]
    assert read_config(tmp_path / "run/config.yaml").checkpoint.every == 100
    default = tptrain("launch", *overrides(tmp_path, "default"), "train.steps=1")
    assert "\nenvironment: GLIBC_TUNABLES=glibc.malloc.hugetlb=1\n" in default.stdout


ON_GPUS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


@pytest.mark.parametrize(
    ("lines", "before", "changed"),
    [
        ([], {}, {}),
        ([], {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        ([], {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}),  # the name that it had before
        (["CUDA_DEVICE_MAX_CONNECTIONS=8"], {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        (["PYTORCH_ALLOC_CONF=x:1"], {"PYTORCH_ALLOC_CONF": "y:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}),
    ],
)
def test_a_job_on_gpus_has_variables_that_the_shell_and_cluster_env_override(
    lines: list[str], before: dict[str, str], changed: dict[str, str]
) -> None:
    """And no others: caches of torch.compile stay on the node, where torch has them by itself."""
    config = load_config([*(f"cluster.env.{line}" for line in lines), "run.name=x"])
    script = "; ".join([*shell_lines(config), "env"])
    shown = subprocess.run(["bash", "-c", script], env=before, capture_output=True, text=True, check=True).stdout
    after = dict(line.split("=", 1) for line in shown.splitlines())
    for name in ("_", "PWD", "SHLVL", "PYTORCH_CUDA_ALLOC_CONF"):
        after.pop(name, None)
    assert after == ON_GPUS | changed


def test_with_nccl_it_says_streams_and_time_outs_too() -> None:
    """The ranks' meeting is a stand-in: no GPU is here."""
    config = load_config(["parallel.tp=2", "watchdog.step_s=5000", "run.name=x"])
    meeting = Meeting(None, Report(0, "n", 0, "gpu", "", ""), 2, 1, lambda: None)
    there = Rendezvous(meeting, [], torch.device("cuda"), "nccl", REFERENCE)
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_ALLOC_CONF": "x:True", "HOME": "/root"}
    assert surroundings(config, there, variables) == [
        "environment: PYTORCH_ALLOC_CONF=x:True CUDA_DEVICE_MAX_CONNECTIONS=8",
        "NCCL: the tp group's stream has high priority; a collective may take 5,060 s in any group",
    ]
    assert surroundings(config, there, {"TORCH_NCCL_HIGH_PRIORITY": "0"}) == [
        "environment: TORCH_NCCL_HIGH_PRIORITY=0",
        "NCCL: a collective may take 5,060 s in any group",
    ]
    config.parallel.tp = 1
    assert surroundings(config, there, {}) == ["NCCL: a collective may take 5,060 s in any group"]
