"""The configuration: groups, defaults, snapshots, and what a mistake answers."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tptrain.__main__ import main
from tptrain.config import UserError, check_cluster, load_config, read_config, validate, write_config
from tptrain.config.load import known_keys
from tptrain.config.schema import Config, micro_batch_size, padded_vocab_size
from tptrain.config.validate import minutes

MODELS = {  # parameters in millions, of the models' own cards
    "gpt2": 124.4,
    "llama3_1b": 1235.8,
    "llama3_3b": 3212.7,
    "llama3_8b": 8030.3,
    "llama3_70b": 70553.7,
    "qwen3_8b": 8190.7,
    "qwen3_32b": 32762.1,
}


@pytest.mark.parametrize("model", MODELS)
def test_model_configs_have_the_published_size(model: str) -> None:
    from tptrain.models.settings import decoder_spec
    from tptrain.nn.decoder import parameter_count

    config = load_config([f"model={model}", "run.name=x"]).model
    count = parameter_count(decoder_spec(config))
    copies = 1 if config.tie_word_embeddings else 2
    padding = (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.hidden_size * copies
    assert (count - padding) / 1e6 == pytest.approx(MODELS[model], abs=0.1)


@pytest.mark.parametrize(
    ("lines", "dp", "size"),
    [
        ([], 1, 8),
        ([], 2, 4),
        (["train.global_batch_size=6"], 2, 3),
        (["train.global_batch_size=22"], 1, 2),
        (["train.global_batch_size=12", "parallel.overlap=true"], 2, 6),
        (["train.global_batch_size=12", "train.micro_batch_size=1"], 2, 1),
    ],
)
def test_micro_batches_fit_by_themselves(lines: list[str], dp: int, size: int) -> None:
    config = load_config([*lines, "parallel.tp=2", f"cluster.tasks_per_node={2 * dp}", "run.name=x"])
    validate(config)
    check_cluster(config)
    assert micro_batch_size(config, dp) == size


def test_snapshot_reads_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(
        [
            "model=llama3_1b",
            "data.tokenizer=bytes",
            "cluster=slurm",
            "cluster.env.A=true",
            "cluster.env.B=1e-5",
            "cluster.env.TOKENIZERS_PARALLELISM=false",
            "cluster.sbatch.exclude=n7",
            "cluster.time=1:30:00",
            "cluster.setup=['echo \\${HOME}']",
        ]
    )
    validate(config)
    assert config.cluster.env == {"A": "true", "TOKENIZERS_PARALLELISM": "false", "B": "1e-5"}
    assert config.cluster.setup == ["echo ${HOME}"]
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert config.cluster.time == "1:30:00"


def test_yaml_holds_only_differences_from_the_dataclasses() -> None:
    import yaml

    from tptrain.config.load import config_dir

    for file in config_dir().glob("*/*.yaml"):
        text = file.read_text()
        content = yaml.safe_load(text) or {}
        groups = content if "@package _global_" in text else {file.parent.name: content}
        for group, values in groups.items():
            default = dataclasses.asdict(getattr(Config(), group))
            for key, value in values.items():
                assert (key, default[key]) != (key, value) or key == "name", f"{file}: {key}={value} is the default"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("10:30", 11), ("1:30:00", 90), ("1-0", 1440), ("1-2:30", 1590), ("2-00:00:01", 2881)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


# ------------------------------------------------------------------------------------------------------------- mistakes


def _tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    vocab = {f"t{i}": i for i in range(299)}
    path.write_text(json.dumps({"model": {"vocab": vocab}}))
    (folder / "no-eod.json").write_text(path.read_text())
    path.write_text(json.dumps({"added_tokens": [{"content": "</s>", "id": 299}], "model": {"vocab": vocab}}))
    return path


SLURM = ["cluster=slurm", "cluster.tasks_per_node=2", "parallel.tp=2"]
MISTAKES: dict[str, tuple[list[str], list[str]]] = {  # overrides -> words that the message must have
    "unknown key": (["train.stpes=3"], ["train.stpes", "train.steps"]),
    "right key in the wrong group": (["train.lr=0.1"], ["train.lr", "optim.lr"]),
    "unknown group option": (["model=llama3_7b"], ["llama3_7b", "llama3_8b"]),
    "no value": (["train.steps"], ["train.steps", "key=value"]),
    "wrong type": (["train.steps=many"], ["train.steps", "many"]),
    "a list for a number": (["train.steps=[1]"], ["train.steps"]),
    "not one of the options": (["train.precision=fp8"], ["train.precision", "fp8", "bf16"]),
    "heads % tp": (["parallel.tp=3"], ["parallel.tp=3", "num_attention_heads=8"]),
    "ffn % tp": (["parallel.tp=8", "model.intermediate_size=700"], ["parallel.tp=8", "intermediate_size=700"]),
    "tp > heads": (["parallel.tp=16"], ["parallel.tp=16", "num_attention_heads=8"]),
    "kv heads and tp": (
        ["parallel.tp=4", "model.num_attention_heads=12", "model.num_key_value_heads=6", "model.head_dim=32"],
        ["parallel.tp=4", "num_key_value_heads=6"],
    ),
    "heads % kv heads": (["model.num_key_value_heads=3"], ["num_key_value_heads=3", "num_attention_heads=8"]),
    "world % tp": (["parallel.tp=4", "cluster.tasks_per_node=6"], ["parallel.tp=4", "6 ranks"]),
    "batch": (["train.global_batch_size=10", "train.micro_batch_size=4"], ["global_batch_size=10", "4"]),
    "overlap of an odd batch": (
        ["parallel.overlap=true", "train.micro_batch_size=1"],
        ["micro_batch_size=1", "even"],
    ),
    "overlap of scattered tokens": (
        ["parallel.overlap=true", "parallel.sequence_parallel=true"],
        ["parallel.overlap", "sequence_parallel"],
    ),
    "overlap of what is recomputed": (["parallel.overlap=true", "train.recompute=full"], ["overlap", "recompute"]),
    "a negative size": (["model.hidden_size=-256"], ["model.hidden_size=-256", "at least 1"]),
    "zero steps": (["train.steps=0"], ["train.steps=0", "at least 1"]),
    "a zero rate": (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
    "sequence too long": (["train.seq_len=4096"], ["train.seq_len=4096", "max_position_embeddings=2048"]),
    "missing file": (["data=files", "data.files=[{folder}/none.txt]"], ["none.txt", "no such file"]),
    "no files": (["data=files"], ["data.files", "empty"]),
    "empty data": (["data=files", "data.files=[{folder}/empty.txt]"], ["empty.txt", "nothing to train on"]),
    "unknown format": (["data=files", "data.files=[{folder}/table.csv]"], ["table.csv", ".jsonl"]),
    "not JSON": (["data=files", "data.files=[{folder}/broken.jsonl]"], ["broken.jsonl", "not JSON"]),
    "unknown column": (
        ["data=files", "data.files=[{folder}/corpus.jsonl]", "data.text_column=body"],
        ["data.text_column=body", "text"],
    ),
    "unknown parquet column": (
        ["data=files", "data.files=[{folder}/table.parquet]", "data.text_column=body"],
        ["data.text_column=body", "words"],
    ),
    "files that are not read": (["data.files=[{folder}/corpus.jsonl]"], ["data.files", "data=files"]),
    "tokenizer too large": (["data.tokenizer={folder}/tokenizer.json"], ["300", "model.vocab_size=257"]),
    "missing tokenizer": (["data.tokenizer={folder}/none.json"], ["none.json", "no such file"]),
    "hub without a name": (["data=hub"], ["data.name"]),
    "slurm setting here": (["cluster.partition=gpu"], ["cluster.partition", "cluster=slurm"]),
    "two nodes here": (["cluster.nodes=2", "cluster.tasks_per_node=1"], ["cluster.nodes=2", "cluster=slurm"]),
    "time limit": ([*SLURM, "cluster.time=1h"], ["cluster.time=1h", "minutes"]),
    "no tasks": (["cluster=slurm", "cluster.nodes=2"], ["cluster.tasks_per_node", "cluster.nodes=2"]),
    "a secret variable": (["cluster.env.HF_TOKEN=hf_1"], ["cluster.env.HF_TOKEN", "shell"]),
    "a secret in a line": (["cluster.setup=['export MY_API_KEY=1']"], ["MY_API_KEY", "shell"]),
    "a sweep": (["optim.lr=0.1,0.2"], ["optim.lr", "sweep"]),
    "not a run": (["run.dir={folder}/other"], ["other", "not a tptrain run"]),
    "no end of document": (["data.tokenizer={folder}/no-eod.json"], ["data.eod_token", "no-eod.json"]),
    "a folder for a file": (["data=files", "data.files=[{folder}/other]"], ["other", "a folder"]),
    "a secret among others": (["cluster.setup=['true && export A=1 WANDB_API_KEY=1']"], ["WANDB_API_KEY", "shell"]),
    "a password in a URL": (["cluster.env.HTTPS_PROXY='http://bob:pw@proxy'"], ["HTTPS_PROXY", "shell"]),
    "a secret for sbatch": ([*SLURM, "cluster.sbatch.export='ALL,HF_TOKEN=1'"], ["sbatch.export", "HF_TOKEN"]),
    "a variable's name": (["cluster.env.FOO-BAR=1"], ["FOO-BAR"]),
    "shape by sbatch": ([*SLURM, "cluster.sbatch.nodes=2"], ["cluster.sbatch.nodes"]),
    "infinite": (["optim.lr=inf"], ["optim.lr", "finite"]),
    "null for a group": (["train=null"], ["train=None"]),
    "unused data setting": (["data.text_column=body"], ["data.text_column", "stdlib"]),
    "unused rate": (["optim=constant", "optim.min_lr_ratio=0.5"], ["optim.min_lr_ratio", "constant"]),
    "hydra's own": (["hydra.run.dir=x"], ["hydra.run.dir", "unknown key"]),
    "a percent sign": (["run.name=a%j"], ["%"]),
    "an interpolation": (["cluster.env.A=${HOME}"], ["HOME", "single quotes"]),
    "a name too long": (["run.name=" + "x" * 300], ["x" * 300]),
    "an empty sample": (["logging.samples=[a,'']"], ["logging.samples, prompt 2 of 2", "empty"]),
    "a sample too long": (
        ["logging.samples=[" + "x" * 64 + "]", "model.max_position_embeddings=64", "train.seq_len=64"],
        ["logging.samples, prompt 1 of 1", "64 tokens", "64 positions"],
    ),
    "an empty sample for a tokenizer.json": (
        ["logging.samples=['']", "data.tokenizer={folder}/tokenizer.json", "model.vocab_size=300"],
        ["logging.samples, prompt 1 of 1", "empty"],
    ),
    "samples of nothing": (["logging.samples_every=5"], ["logging.samples_every", "logging.samples."]),
    "rope scaling": (["model.rope_scaling.factor=2"], ["rope_scaling", "llama3"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    folder = tmp_path_factory.mktemp("mistakes")
    write_corpus(folder, documents=3)
    _tokenizer(folder)
    (folder / "empty.txt").touch()
    (folder / "table.csv").write_text("text\nword\n")
    (folder / "broken.jsonl").write_text('{"text": \n')
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").touch()
    parquet.write_table(arrow.table({"words": ["a"]}), folder / "table.parquet")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_exit_code_2(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    overrides, words = MISTAKES[mistake]
    before = sorted(folder.rglob("*"))
    code = main(["launch", *(override.replace("{folder}", str(folder)) for override in overrides)])
    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    for word in words:
        assert word in shown.err
    assert sorted(folder.rglob("*")) == before, "nothing is written"


def test_sbatch_not_found(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder))
    assert main(["launch", *SLURM]) == 2
    assert "`sbatch` was not found" in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optim.lr=0.5", "optim.lr"),
        ("model.hidden_size=512", "model.hidden_size"),
        ("train.seed=1", "train.seed"),
        ("train.global_batch_size=32", "train.global_batch_size"),
        ("data.validation_fraction=0.1", "data.validation_fraction"),
        ("train.steps=299", "train.steps"),
    ],
)
def test_a_run_directory_of_another_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, key: str
) -> None:
    from launch.run_dir import claim

    claim(load_config([f"run.dir={tmp_path}/run"]))
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert main(["launch", f"run.dir={tmp_path}/run", change]) == 2
    message = capsys.readouterr().err
    assert key in message
    assert str(tmp_path / "run") in message
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_which_settings_may_change_on_a_resume() -> None:
    marked = {"run", "parallel", "checkpoint", "logging", "wandb", "watchdog", "cluster", "verify"}
    marked |= {f"train.{key}" for key in ("steps", "micro_batch_size", "device", "on_nan", "eval_every")}
    marked |= {"train.eval_sequences", "data.cache_dir", "model.facts"}
    config, fixed_keys = Config(), set()
    for key in known_keys():
        group, _, name = key.partition(".")
        node = getattr(config, group) if name else config
        fields = {item.name: item for item in dataclasses.fields(node)}
        if (item := fields.get(name or group)) and item.metadata.get("may_change"):
            fixed_keys.add(key)
    assert fixed_keys == marked


def test_topology_and_longer_training_may_change_on_a_resume(tmp_path: Path) -> None:
    from launch.run_dir import claim

    claim(load_config([f"run.dir={tmp_path}/run"]))
    now = load_config([f"run.dir={tmp_path}/run", "parallel.tp=2", "train.steps=400", "checkpoint.keep=5"])
    claim(now)
    assert read_config(tmp_path / "run" / "config.yaml") == now
    assert len(list((tmp_path / "run" / "logs").glob("config-until-*.yaml"))) == 1


def test_help_config_and_errors_import_no_torch() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from tptrain.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    for arguments in (['--help'], ['config'], ['config', 'x=1'], ['launch', 'parallel.tp=3'], ['fly']):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main(arguments)\n"
        "heavy = {'torch', 'datasets', 'wandb', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_key_has_a_validated_default() -> None:
    assert len(known_keys()) > 80
    validate(load_config(["run.name=x"]))


def test_an_unreadable_snapshot_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")


# ------------------------------------------------------------------------------------------------------------- warnings

WARM_UP = "the warm-up of optim.warmup_steps=20 does not end before the last step. Lower optim.warmup_steps."


@pytest.mark.parametrize(
    ("lines", "warnings"),
    [
        ([], []),
        (["train.steps=21"], []),
        (["train.steps=20"], [f"train.steps=20: {WARM_UP}"]),
        (["train.steps=1", "optim.warmup_steps=0"], []),
        (["-m", "train.steps=10", "optim.lr=1e-3,2e-3"], [f"train.steps=10: {WARM_UP}"]),
        (["-m", "train.steps=9,10,30"], [f"train.steps={steps}: {WARM_UP}" for steps in (9, 10)]),
    ],
)
def test_what_is_most_likely_not_meant_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], warnings: list[str]
) -> None:
    """Once, on stderr, by `launch` and by `config`, which takes no sweep."""
    monkeypatch.setattr("tptrain.commands.runs._launch_here", lambda configs: 0)
    for verb in ("launch", "config") if "-m" not in lines else ("launch",):
        assert main([verb, *lines]) == 0
        assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in warnings]
