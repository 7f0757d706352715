"""What `launch` and `config` warn of: settings that work, and that are most likely not meant. Imports no torch."""

from collections.abc import Iterable, Sequence

from tptrain.config.schema import Config


def advice(configs: Iterable[Config], overrides: Sequence[str]) -> list[str]:
    """The warnings for these runs of one command line, each once."""
    keys = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    return list(dict.fromkeys(line for config in configs for line in _of_run(config, keys)))


def _of_run(config: Config, keys: set[str]) -> list[str]:
    """`keys`: of the overrides on the command line."""
    lines, train, warmup_steps = [], config.train, config.optim.warmup_steps
    if train.steps <= warmup_steps:
        lines.append(
            f"train.steps={train.steps}: the warm-up of optim.warmup_steps={warmup_steps} does not end before the last "
            "step. Lower optim.warmup_steps."
        )
    if config.model.path is not None and not keys & {"train", "train.seq_len", "train.global_batch_size"}:
        lines.append(
            f"model=hf has no length or batch of its own: train.seq_len={train.seq_len} (tokens) and "
            f"train.global_batch_size={train.global_batch_size} (sequences) are tptrain's defaults. Set both."
        )
    return lines
