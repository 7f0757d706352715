"""Ranks in containers: the paths that must be visible inside, and what is added to the job so that they are.

Only the ranks run inside. The job script, `launch.restart` and the checks before a submission run on the host, with the
host's Python, which needs no torch.
"""

import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import launch
from launch import slurm
from tptrain.config import Config, UserError
from tptrain.config.containers import PYXIS
from tptrain.config.schema import ClusterConfig
from tptrain.config.validate import data_files


def checkout() -> Path | None:
    """The folder of this checkout; None where tptrain is an installed package, and the container needs its own."""
    folder = Path(launch.__file__).absolute().parents[1]
    return folder if (folder / "pyproject.toml").exists() else None


def srun_options(configs: list[Config], base: Path) -> dict[str, Any]:
    """`cluster.srun`; for pyxis with the mounts that the runs below `base` need besides, the checkout as the working
    directory, and the names in `cluster.env`, which the image's own variables would otherwise replace.

    Raises UserError for a mount that takes the place of a path that is needed.
    """
    cluster = configs[0].cluster
    options = slurm.options(cluster.srun)
    if not _by_pyxis(options):
        return options
    own = [f"{path}:{path}" for path in _added_mounts(configs, base)]
    options["container-mounts"] = ",".join([*_listed(options, "container-mounts"), *own])
    if (folder := checkout()) is not None:
        options.setdefault("container-workdir", str(folder))  # Python looks there for `tptrain` and `launch` first
    if cluster.env:
        options["container-env"] = ",".join(dict.fromkeys([*_listed(options, "container-env"), *cluster.env]))
    return options


def shell_lines(cluster: ClusterConfig) -> list[str]:
    """The line of the job script that lets another Python than this one import this checkout."""
    if cluster.python is None or checkout() is None:
        return []
    return [f"export PYTHONPATH={shlex.quote(str(checkout()))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def make_folders(configs: list[Config]) -> None:
    """What is mounted must be there. The run directories are."""
    for config in configs:
        if config.cluster.python is not None:
            Path(config.data.cache_dir).mkdir(parents=True, exist_ok=True)


def notice(configs: list[Config], base: Path) -> str | None:
    """One line for the user: which mounts were added, or which paths another runtime than pyxis must show inside."""
    cluster = configs[0].cluster
    if cluster.python is None:
        return None
    if _by_pyxis(slurm.options(cluster.srun)):
        added = _added_mounts(configs, base)
        return f"added to the container's mounts: {', '.join(map(str, added))}" if added else None
    paths = ", ".join(map(str, _outermost(_needed(configs, base))))
    return f"cluster.python={cluster.python}: if that is a container, these must be visible inside, as here: {paths}"


def _by_pyxis(options: dict[str, Any]) -> bool:
    return any(options.get(name) for name in PYXIS)


def _listed(options: dict[str, Any], name: str) -> list[str]:
    return [item for item in str(options.get(name, "")).split(",") if item]


# --------------------------------------------------------------------------------------------------------------- paths


def _needed(configs: list[Config], base: Path) -> dict[Path, bool]:
    """The files and folders that ranks open, and whether they write there."""
    paths = {}
    if (folder := checkout()) is not None:
        paths[folder] = False
    for config in configs:
        model, data = config.model, config.data
        paths |= dict.fromkeys(map(_folder_of, data.files), False) | _targets(data_files(data))
        if data.tokenizer != "bytes":
            paths[Path(data.tokenizer)] = False
        if data.source == "hub" and data.name and Path(data.name).is_dir():
            paths[Path(data.name)] = False
        directory = Path(model.directory or "")
        if model.directory is not None and directory.is_dir():  # once a run has a checkpoint, it may be gone
            paths |= {directory: False} | _targets(directory.iterdir())
        paths[Path(data.cache_dir)] = True
    return paths | {base: True}


def _folder_of(pattern: str) -> Path:
    """The folder that holds the files of a glob or the one file."""
    whole = Path(pattern)
    return next(parent for parent in whole.parents if not any(mark in str(parent) for mark in "*?["))


def _targets(files: Iterable[Path]) -> dict[Path, bool]:
    """The folders of what links among these files lead to, as they do in the hub's cache."""
    return {file.resolve().parent: False for file in files if file.is_symlink()}


def _outermost(paths: Collection[Path]) -> list[Path]:
    """The paths without those that lie below another one."""
    return [path for path in paths if not any(path != other and path.is_relative_to(other) for other in paths)]


def _added_mounts(configs: list[Config], base: Path) -> list[Path]:
    """The paths that the user's own mounts do not show at the same place, or not so that they can be written."""
    mounts = [_mount(text) for text in _listed(slurm.options(configs[0].cluster.srun), "container-mounts")]
    missing: list[Path] = []
    for path, written in _needed(configs, base).items():
        for source, target, _ in mounts:
            if target == path and source != path:
                raise UserError(
                    f"cluster.srun.container-mounts: {source} takes the place of {path}, which this run needs as it is "
                    "here. Mount it elsewhere."
                )
        if not any(
            path.is_relative_to(source) and source == target and not (written and "ro" in flags)
            for source, target, flags in mounts
        ):
            missing.append(path)
    for path in missing:
        if "," in str(path) or ":" in str(path):
            raise UserError(f"{path}: pyxis mounts no path with `:` or `,` in its name. Choose another one.")
    return _outermost(missing)


def _mount(text: str) -> tuple[Path, Path, list[str]]:
    """Source, target and flags of pyxis's SRC[:DST[:FLAG+FLAG]]."""
    source, target, flags = [*text.split(":", 2), "", ""][:3]
    return Path(source), Path(target or source), flags.split("+")
