"""Every check that can be made before a job is submitted. Imports no torch and opens as little as it can."""

import dataclasses
import glob
import json
import math
import re
from pathlib import Path
from typing import Any

from tptrain.config.containers import check_container
from tptrain.config.errors import UserError
from tptrain.config.schema import SMALL_VOCABULARY, Config, DataConfig, LoggingConfig, micro_batch_size

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SLURM_ONLY = ("partition", "account", "qos", "constraint", "mem", "cpus_per_task", "sbatch", "srun", "python")
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
# Options of sbatch and srun that have a setting of their own, or that submitit and tptrain set ("")
FIXED = {name: f"cluster.{name}" for name in ("nodes", "time", "mem", "partition", "account", "qos", "constraint")}
FIXED |= {"ntasks": "cluster.nodes and cluster.tasks_per_node", "ntasks-per-node": "cluster.tasks_per_node"}
FIXED |= {"gpus-per-node": "cluster.gpus_per_node", "cpus-per-task": "cluster.cpus_per_task"}
FIXED |= {"requeue": "cluster.max_restarts", "no-requeue": "cluster.max_restarts=0"}
FIXED |= {name: "" for name in ("array", "chdir", "error", "job-name", "open-mode", "output", "signal", "wrap")}
FIXED_BY_SRUN = FIXED | {"export": "cluster.env"}
FIXED_BY_SRUN |= {name: "" for name in ("kill-on-bad-exit", "label", "multi-prog", "test-only", "unbuffered")}
# Whole words of a name: TOKEN, but not TOKENIZERS.
SECRET_NAME = re.compile(
    r"(^|_)(\w*KEY(?<!MONKEY)|TOKEN|SECRETS?|PASS|PASSWD|PASSWORD|PASSPHRASE|PWD|PAT|AUTH|CREDENTIALS?)($|_)",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(r"\bhf_\w{20,}|\bsk-\w{20,}|\b[0-9a-f]{40}\b|\bBearer\s|--?(token|password|api-?key)\b", re.I)
SECRET_URL = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


def validate(config: Config) -> None:
    """Raise UserError for the first setting that cannot work, in the order a reader would fix them."""
    check_bounds(config, "")
    _check_train(config)
    _check_unused(config)
    _check_secrets(config)
    _check_data(config)


def check_data(config: Config) -> None:
    """Whether there is data to train on or to evaluate. Raises UserError where a large vocabulary has no default."""
    data, fits = config.data, f"suits {config.model.name}, whose vocabulary has more than {SMALL_VOCABULARY:,} entries"
    if data.source == "auto":
        raise UserError(
            f"data.source: not set, and no text that comes with tptrain {fits}. Give data=files or data=hub, or insist "
            "on the text of Python's library: data=stdlib."
        )
    if data.tokenizer == "auto":
        raise UserError(
            f"data.tokenizer: not set, and no tokenizer that comes with tptrain {fits}. Give the path of a "
            "tokenizer.json, or insist on bytes: data.tokenizer=bytes."
        )


def check_cluster(config: Config) -> None:
    """What `launch` asks of the machine or of Slurm, as far as the config alone tells. Raises UserError."""
    cluster = config.cluster
    if cluster.kind == "local":
        if cluster.nodes != 1:
            raise UserError(f"cluster.nodes={cluster.nodes}: cluster=local is one machine. Use cluster=slurm.")
        for key in SLURM_ONLY:
            if getattr(cluster, key):
                raise UserError(f"cluster.{key}: only Slurm knows it. Use cluster=slurm or leave it out.")
        if cluster.gpus_per_node and cluster.gpus_per_node != cluster.tasks_per_node:
            raise UserError(
                "cluster.gpus_per_node: here every rank has a GPU. Leave it out, and set cluster.tasks_per_node."
            )
    _check_options("sbatch", cluster.sbatch, FIXED)
    _check_options("srun", cluster.srun, FIXED_BY_SRUN)
    check_container(cluster)
    if cluster.time is not None and 0 < 60 * minutes(cluster.time) <= cluster.grace_s and cluster.kind == "slurm":
        raise UserError(
            f"cluster.grace_s={cluster.grace_s}: as long as cluster.time={cluster.time}, so the run would be stopped "
            "as soon as it starts. Shorten it."
        )
    if cluster.tasks_per_node is None:
        raise UserError(
            f"cluster.tasks_per_node: not set, and cluster.nodes={cluster.nodes}. "
            "Set it to the number of ranks (GPUs) a node runs."
        )
    check_topology(config, cluster.nodes * cluster.tasks_per_node)
    tp = config.parallel.tp
    if cluster.nodes > 1 and cluster.tasks_per_node % tp and not config.parallel.tp_across_nodes:
        raise UserError(
            f"parallel.tp={tp}: does not divide cluster.tasks_per_node={cluster.tasks_per_node}, so a TP group would "
            "span nodes and each layer's 4 all-reduces cross the network. Change one of them, or allow it with "
            "parallel.tp_across_nodes=true (`python -m tptrain plan` shows the cost)."
        )


def _check_options(command: str, options: dict[str, Any], fixed: dict[str, str]) -> None:
    for key, value in options.items():
        name = key.replace("_", "-")
        # Slurm takes a part of a name for the whole; `gpus` is an option of its own.
        meant = name if name in fixed or name == "gpus" else next((each for each in fixed if each.startswith(name)), "")
        if meant in fixed:
            instead = f"Use {fixed[meant]}." if fixed[meant] else "tptrain sets it itself: leave it out."
            raise UserError(f"cluster.{command}.{key}: not to be set this way. {instead}")
        if command == "sbatch" and "container" in name.split("-"):
            raise UserError(
                f"cluster.sbatch.{key}: would have the job script run in the container, and it needs Slurm's commands. "
                f"Use cluster.srun.{key}."
            )
        if isinstance(value, dict):
            raise UserError(f"cluster.{command}.{key}={value}: not the value of an option. Give a text or a list.")


def minutes(limit: str) -> int:
    """A time limit as sbatch reads it (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in minutes, rounded up."""
    days, dash, clock = limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f"cluster.time={limit}: not a time limit. Write minutes, H:MM:SS or D-HH:MM:SS.")
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = [*numbers, 0, 0][:3]
        hours += 24 * int(days)
    else:  # minutes, minutes:seconds or hours:minutes:seconds
        hours, mins, seconds = (numbers if len(numbers) == 3 else [0, *numbers, 0])[:3]
    return hours * 60 + mins + (seconds > 0)


def check_topology(config: Config, world: int) -> None:
    """Whether `world` ranks can run this config. Raises UserError."""
    tp, train = config.parallel.tp, config.train
    if world % tp:
        raise UserError(
            f"parallel.tp={tp}: does not divide the {world} ranks of this run "
            "(cluster.nodes x cluster.tasks_per_node). Use a multiple of parallel.tp ranks."
        )
    dp = world // tp
    size = micro_batch_size(config, dp)
    if train.global_batch_size % (size * dp):
        raise UserError(
            f"train.global_batch_size={train.global_batch_size}: not divisible by train.micro_batch_size x the "
            f"data-parallel degree = {size} x {dp}. Change one of the batch sizes."
        )
    if config.parallel.sequence_parallel and size * train.seq_len % tp:
        raise UserError(
            f"parallel.sequence_parallel: parallel.tp={tp} does not divide the {size * train.seq_len} tokens of a "
            f"micro-batch (train.micro_batch_size={size} x train.seq_len={train.seq_len}). Change one of them."
        )


def check_bounds(node: Any, prefix: str) -> None:
    """The bounds and options that `schema` says of each field. Raises UserError."""
    for item in dataclasses.fields(node):
        key, value, rule = f"{prefix}{item.name}", getattr(node, item.name), item.metadata
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif value is None:
            continue
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be a finite number.")
        elif "options" in rule and value not in rule["options"]:
            raise UserError(f"{key}={value}: must be one of {', '.join(rule['options'])}.")
        elif "least" in rule and not value >= rule["least"]:
            raise UserError(f"{key}={value}: must be at least {rule['least']}.")
        elif "above" in rule and not value > rule["above"]:
            raise UserError(f"{key}={value}: must be greater than {rule['above']}.")
        elif "most" in rule and not value <= rule["most"]:
            raise UserError(f"{key}={value}: must be at most {rule['most']}.")


def _check_train(config: Config) -> None:
    if config.parallel.overlap:
        _check_overlap(config)
    if config.parallel.backend == "nccl" and config.train.device == "cpu":
        raise UserError("parallel.backend=nccl: needs train.device=cuda. Use parallel.backend=gloo on the cpu.")


def _check_overlap(config: Config) -> None:
    size = config.train.micro_batch_size
    if size is not None and size % 2:
        raise UserError(f"parallel.overlap: train.micro_batch_size={size} has no two halves. Make it even.")
    if config.parallel.sequence_parallel:
        raise UserError("parallel.overlap: not with parallel.sequence_parallel=true. Choose one of them.")
    if config.train.recompute == "full":
        raise UserError("parallel.overlap: has no effect with train.recompute=full. Choose one of them.")


def _check_unused(config: Config) -> None:
    """A setting that the others make meaningless is a mistake, not a wish to be ignored."""
    data, default = config.data, DataConfig()
    readers = {"files": ("files",), "name": ("hub",), "subset": ("hub",), "split": ("hub",)}
    for key, sources in (readers | {"text_column": ("files", "hub")}).items():
        own = key == "name" and data.source == "stdlib" and str(data.name).startswith("python-")
        if getattr(data, key) != getattr(default, key) and data.source not in sources and not own:
            raise UserError(
                f"data.{key}: only data={' and data='.join(sources)} reads it, and this is data={data.source}."
            )
    for key in ("bos_token", "eod_token"):
        if getattr(data, key) is not None and data.tokenizer in ("auto", "bytes"):
            raise UserError(f"data.{key}: data.tokenizer={data.tokenizer} has tokens of its own. Leave it out.")
    for key in ("samples_every", "samples_tokens"):
        if not config.logging.samples and getattr(config.logging, key) != getattr(LoggingConfig(), key):
            raise UserError(
                f"logging.{key}: has no effect without logging.samples. Give prompts there, or leave it out."
            )
    if len(Path(config.run.dir).name) > 200:
        raise UserError(f"run.name={config.run.name}: longer than a file's name may be. Use at most 200 characters.")
    if "%" in f"{config.run.dir}{config.run.name}":
        raise UserError(f"run.dir={config.run.dir}: has a %, which Slurm and submitit would replace. Use another name.")


def _check_secrets(config: Config) -> None:
    """The config is written to disk and into the job script, so no secret may pass through it."""
    advice = "Export it in your shell instead: jobs inherit the environment, and nothing writes it down."
    cluster = config.cluster
    for name, value in cluster.env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"cluster.env.{name}: not a name that a shell takes. Use letters, digits and underscores.")
        if SECRET_NAME.search(name) or SECRET_URL.search(value) or SECRET_VALUE.search(value):
            raise UserError(f"cluster.env.{name}: looks like a secret and would land in the run directory. {advice}")
    texts = {"cluster.setup": cluster.setup} | {f"cluster.sbatch.{k}": [str(v)] for k, v in cluster.sbatch.items()}
    for key, lines in texts.items():
        for line in lines:
            names = [name for name in re.findall(r"\b(\w+)=", line) if SECRET_NAME.search(name)]
            if names or SECRET_URL.search(line) or SECRET_VALUE.search(line):
                what = f"sets {names[0]}, which" if names else "holds what"
                raise UserError(f"{key}: {what} looks like a secret. {advice}")


# ---------------------------------------------------------------------------------------------------------------- data


def _check_data(config: Config) -> None:
    data = config.data
    if data.tokenizer != "auto":
        vocabulary(data)
    if data.source == "hub" and not data.name:
        raise UserError("data.name: not set. data=hub needs the name of a Hugging Face data set.")
    if data.source == "files":
        _check_files(data)


def vocabulary(data: DataConfig) -> tuple[int, int]:
    """The number of token ids, and the id of the end-of-document token. Raises UserError where there is none."""
    if data.tokenizer == "bytes":
        return 257, 256
    path = Path(data.tokenizer)
    if not path.is_file():
        raise UserError(f"data.tokenizer={path}: no such file. Give `bytes` or the path of a tokenizer.json.")
    try:
        content = json.loads(path.read_text())
        vocab = content["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        size = max(ids.values()) + 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data.tokenizer={path}: not a Hugging Face tokenizer.json ({error}).") from error
    names = (data.eod_token,) if data.eod_token else EOD_NAMES
    eod = next((ids[name] for name in names if name in ids), None)
    if eod is None:
        raise UserError(
            f"data.eod_token={data.eod_token}: {path} has none of {', '.join(names)}. Name its end-of-document token."
        )
    if data.bos_token is not None and data.bos_token not in ids:
        raise UserError(f"data.bos_token={data.bos_token}: {path} has no such token.")
    return size, eod


def data_files(data: DataConfig) -> list[Path]:
    """The files that `data.files` names, globs expanded, sorted within each. Raises UserError for one that is not."""
    files: list[Path] = []
    for pattern in data.files:
        exact = [Path(pattern)] if Path(pattern).exists() else []  # a name may have brackets of its own
        matches = exact or sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"data.files={pattern}: no such file.")
        if not any(match.is_file() for match in matches):
            raise UserError(f"data.files={pattern}: a folder. Name the files in it, e.g. {pattern}/*.jsonl.")
        files += [match for match in matches if match.is_file()]
    return list(dict.fromkeys(files))


def _check_files(data: DataConfig) -> None:
    if not data.files:
        raise UserError("data.files: empty. Give files, e.g. 'data.files=[corpus/*.jsonl]'.")
    files = data_files(data)
    for file in files:
        if file.suffix not in FORMATS:
            raise UserError(f"data.files={file}: unknown format. Use one of {', '.join(FORMATS)}.")
    if len({FORMATS[file.suffix] for file in files}) > 1:
        raise UserError("data.files: mixes formats. Give files of one format (.json and .jsonl count as one).")
    if sum(file.stat().st_size for file in files) == 0:
        raise UserError(f"data.files={','.join(map(str, files))}: empty, there is nothing to train on.")
    for file in [file for file in files if file.stat().st_size][:100]:
        columns = _columns(file)
        if columns is not None and data.text_column not in columns:
            raise UserError(
                f"data.text_column={data.text_column}: {file} has no such column. It has {', '.join(sorted(columns))}."
            )


def _columns(file: Path) -> set[str] | None:
    """Column names out of the head of a file; None for plain text, or where the head does not tell."""
    if FORMATS[file.suffix] == "text":
        return None
    if FORMATS[file.suffix] == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        try:
            return set(parquet.read_schema(file).names)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"data.files={file}: not a parquet file ({error}).") from error
    with file.open(encoding="utf-8", errors="replace") as opened:
        head = opened.read(1 << 20).lstrip().removeprefix("[").lstrip()
    try:
        record, _ = json.JSONDecoder().raw_decode(head)
    except ValueError as error:
        if len(head) >= 1 << 19:  # one record longer than the head we read
            return None
        raise UserError(f"data.files={file}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f'data.files={file}: its records are not objects. Write {{"text": ...}} for each document.')
    return set(record)
