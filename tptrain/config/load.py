"""From Hydra overrides, or from a run's snapshot, to one `Config` object."""

import dataclasses
import difflib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tptrain.config.errors import UserError
from tptrain.config.pretrained import CONFIG_BYTES, directory, read_json, tokenizer_rules
from tptrain.config.schema import MODEL_FILES, SMALL_VOCABULARY, Config, kv_heads

FREE_MAPPINGS = ("cluster.env", "cluster.sbatch", "cluster.srun", "model.tp_plan")  # any key may stand below these
WITH_HF = ("model.path", "model.revision", "model.name", "model.dropout", "model.engine", "model.tp_plan")


def config_dir() -> Path:
    """The folder of YAML groups: packed into the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packed = package / "conf"
    return packed if packed.is_dir() else package.parent / "conf"


def load_config(overrides: Sequence[str]) -> Config:
    """Compose a `Config` out of the defaults list and `overrides`, with names and paths filled in.

    Raises UserError for an unknown key or group, a value of the wrong type or an override that does not parse.
    """
    parsed = [_parse(text) for text in overrides]
    lines = [_checked(override) for override in parsed]
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = compose("config", overrides=lines)
        config = cast(Config, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    _check_keys(parsed, config)
    _fill_in(config)
    return config


def read_config(path: Path) -> Config:
    """The snapshot of a run. Raises UserError where the file is missing or is not a tptrain config."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        return cast(Config, OmegaConf.to_object(merged))
    except (OSError, OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable snapshot of a run: {reason}") from error


def write_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, atomically."""
    write_atomically(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """As YAML that reads back as it is: a `${` in it is text, not an interpolation."""

    def escaped(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: escaped(value) for key, value in node.items()}
        if isinstance(node, list):
            return [escaped(value) for value in node]
        return node.replace("${", "\\${") if isinstance(node, str) else node

    return OmegaConf.to_yaml(OmegaConf.create(escaped(dataclasses.asdict(config))))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step that survives a crash: a reader sees the old text or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------- overrides


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every settable key, dotted, leaves and nodes."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for item in dataclasses.fields(node):
            key = f"{prefix}{item.name}"
            yield key
            value = getattr(node, item.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{key}.")

    return tuple(walk(Config(), ""))


def _groups() -> dict[str, list[str]]:
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir()
    }


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(
            f"{text!r} is not an override. Write key=value (lists as 'key=[a,b]', odd characters in quotes)."
        ) from error


def _checked(override: Override) -> str:
    """The override's text for Hydra, once its key is known to exist. Raises UserError otherwise."""
    key, text = override.key_or_group, cast(str, override.input_line)
    if override.is_sweep_override():
        raise UserError(f"{text}: a sweep over several values. Launch it with `launch -m`.")
    groups = _groups()
    if key in groups:
        value = override.value()
        if value not in groups[key]:
            near = _nearest(str(value), groups[key])
            raise UserError(f"{key}={value}: there is no such {key}.{near} Known: {', '.join(groups[key])}.")
        return text
    if any(key == mapping or key.startswith(f"{mapping}.") for mapping in FREE_MAPPINGS):
        if key.startswith("cluster.env.") and not isinstance(override.value(), str):
            text = f"{key}='{text.split('=', 1)[1]}'"  # a variable's value is the text as typed: true, 1e-5
        return f"++{text.lstrip('+')}"
    if key not in known_keys():
        raise UserError(f"{key}: unknown key.{_nearest(key, known_keys())} `python -m tptrain config` lists all keys.")
    return text


def _nearest(word: str, known: Sequence[str]) -> str:
    leaf = word.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == leaf]  # the wrong group: train.lr for optim.lr
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    near = near or [key for key in known if difflib.get_close_matches(leaf, [key.rsplit(".", 1)[-1]])]
    return f" Did you mean {near[0]}?" if near else ""


def _explain(error: BaseException) -> str:
    """One line out of Hydra's chain of exceptions: the key, and what is wrong with its value."""
    while error.__cause__ is not None:
        error = error.__cause__
    key = getattr(error, "full_key", None)
    text = (getattr(error, "msg", None) or str(error)).split("\n")[0]
    if "nterpolation" in text:
        text += ". For a shell variable write \\${NAME}, in single quotes."
    return f"{key}: {text}" if key else text


def _check_keys(overrides: list[Override], config: Config) -> None:
    """What must not be set by hand beside other settings. Raises UserError."""
    by_hf = any(override.key_or_group == "model" and override.value() == "hf" for override in overrides)
    keys = [str(override.key_or_group) for override in overrides]
    if config.optim.schedule == "constant" and "optim.min_lr_ratio" in keys:
        raise UserError("optim.min_lr_ratio: has no effect on optim.schedule=constant. Leave it out.")
    for key in keys:
        if key in ("model.directory", "model.source", "model.facts"):
            raise UserError(f"{key}: follows from model.path. Set that.")
        if by_hf and key.startswith("model.") and not key.startswith(WITH_HF):
            raise UserError(
                f"{key}: with model=hf config.json decides on it. Leave it out, or edit a copy of the model."
            )
        if not by_hf and key.startswith(WITH_HF) and key != "model.name":
            raise UserError(f"{key}: only model=hf reads it. Add model=hf.")
    if by_hf and not config.model.path:
        raise UserError("model.path: not set. model=hf needs a Hugging Face directory or a name of the hub.")
    if not by_hf and config.data.tokenizer == "model":
        raise UserError("data.tokenizer=model: only model=hf has one. Give `bytes` or the path of a tokenizer.json.")


# ---------------------------------------------------------------------------------------------------------- filling in


def _fill_in(config: Config) -> None:
    """Settle what depends on other settings or on the working directory, so that the snapshot stands by itself."""
    if config.model.num_key_value_heads is None:
        config.model.num_key_value_heads = kv_heads(config.model)
    if config.model.path is not None and not config.model.name:
        config.model.name = Path(config.model.path).name
    if not config.run.dir:
        config.run.name = config.run.name or f"{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        config.run.dir = f"runs/{config.run.name}"
    config.run.dir = _absolute(config.run.dir)
    config.run.name = config.run.name or Path(config.run.dir).name
    config.data.cache_dir = _absolute(config.data.cache_dir)
    config.data.files = [_absolute(file) for file in config.data.files]
    if config.model.path is not None:
        _fill_in_pretrained(config)
    _fill_in_data(config)
    cluster = config.cluster
    if cluster.tasks_per_node is None:
        cluster.tasks_per_node = cluster.gpus_per_node or (config.parallel.tp if cluster.nodes == 1 else None)


def _fill_in_data(config: Config) -> None:
    """Bytes of Python's library where the vocabulary is small; else `auto` stays, and a run refuses it."""
    model, data = config.model, config.data
    vocabulary = model.vocab_size if model.path is None else model.source.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary <= SMALL_VOCABULARY:
        data.source = "stdlib" if data.source == "auto" else data.source
        data.tokenizer = "bytes" if data.tokenizer == "auto" else data.tokenizer
    if data.tokenizer not in ("auto", "bytes"):
        data.tokenizer = _absolute(data.tokenizer)
    if data.name and Path(data.name).is_dir():
        data.name = _absolute(data.name)
    if data.source == "stdlib" and data.name is None:  # another Python has another text
        data.name = f"python-{sys.version_info.major}.{sys.version_info.minor}"


def _fill_in_pretrained(config: Config) -> None:
    """The model's directory, config.json and tokenizer; those of the run, where it was started from the same model."""
    model, data, run_dir = config.model, config.data, Path(config.run.dir)
    assert model.path is not None
    snapshot, names = run_dir / "config.yaml", (model.path, _absolute(model.path))
    before = read_config(snapshot).model if snapshot.exists() else None
    if before is not None and before.path in names and before.revision == model.revision:
        model.path, model.directory, model.source = before.path, before.directory, before.source
        if model.engine == "auto":
            model.engine = before.engine
    else:
        folder = directory(model.path, model.revision)
        model.path = _absolute(model.path) if Path(model.path).expanduser().is_dir() else model.path
        model.directory, model.source = str(folder), read_json(folder / "config.json", CONFIG_BYTES)
    if data.tokenizer != "model":
        return
    kept, original = run_dir / MODEL_FILES, Path(model.directory or "")
    folder = kept if (kept / "tokenizer.json").exists() else original
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"data.tokenizer: {folder} has no tokenizer.json. Make one with Transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), or name another tokenizer."
        )
    rules = tokenizer_rules(folder)
    data.tokenizer = str(folder / "tokenizer.json")
    data.bos_token, data.eod_token = data.bos_token or rules.bos, data.eod_token or rules.eos


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def settings_of(checkpoint: Path, config: Config, overrides: Sequence[str]) -> Config:
    """For what is done with a checkpoint: its model, and its data and lengths where the overrides give no others."""
    before = read_config(checkpoint / "config.yaml")
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    data, train = config.data, config.train
    if not any(key == "data" or key.startswith("data.") for key in given):
        data = before.data
    kept = {
        key: getattr(before.data, key) for key in ("tokenizer", "bos_token", "eod_token") if f"data.{key}" not in given
    }
    lengths = {key: getattr(before.train, key) for key in ("seq_len", "precision") if f"train.{key}" not in given}
    return dataclasses.replace(
        config,
        model=before.model,
        data=dataclasses.replace(data, **kept),
        train=dataclasses.replace(train, **lengths),
    )
