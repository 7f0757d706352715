"""The options of srun that have the ranks run in a container, and what is checked of them. Imports no torch."""

import difflib
import shlex

from tptrain.config.errors import UserError
from tptrain.config.schema import ClusterConfig

PYXIS = ("container-image", "container-name")  # either option has pyxis run the ranks in a container
# Every option that pyxis 0.24 adds under such a name; those that begin with `no-` change nothing that tptrain reads.
PYXIS_OPTIONS = (*PYXIS, "container-mounts", "container-workdir", "container-save", "container-env")
PYXIS_OPTIONS += ("container-unshare", "container-mount-home", "container-remap-root", "container-entrypoint")
PYXIS_OPTIONS += ("container-entrypoint-log", "container-writable", "container-readonly")
OF_SLURM = ("container", "container-id")  # srun's own, for OCI bundles


def check_container(cluster: ClusterConfig) -> None:
    """Raises UserError for an option of a container that has no such name, and for a Python that is no command."""
    for key in cluster.srun:
        name = key.replace("_", "-")
        if name.startswith("container") and name not in (*PYXIS_OPTIONS, *OF_SLURM):
            # srun takes a part of a name for the whole, and the mounts would be left out
            wholes = [option for option in PYXIS_OPTIONS if option.startswith(name)] or PYXIS_OPTIONS
            (meant,) = difflib.get_close_matches(name, wholes, n=1, cutoff=0)
            raise UserError(
                f"cluster.srun.{key}={cluster.srun[key]}: not the full name of an option for containers. Did you mean "
                f"cluster.srun.{meant}?"
            )
    if cluster.python is None:
        keys = (key for key in cluster.srun if key.replace("_", "-") in PYXIS)
        if image := next((key for key in keys if cluster.srun[key]), None):
            raise UserError(
                f"cluster.python: not set, and cluster.srun.{image} has the ranks run in a container. Name the Python "
                "inside, which needs torch and tptrain's other dependencies: cluster.python=python."
            )
        return
    try:
        problem = "" if shlex.split(cluster.python) else "it is empty"
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"cluster.python={cluster.python}: not a shell command ({problem}). Name the Python to run.")
