"""Where the kernels in C lie: a folder of the user's own on each node. On network file systems compilers' caches break
(pytorch#173679, triton#11512); torch keeps its own on the node, too.
"""

import os
import tempfile
from pathlib import Path

from tptrain.config import UserError


def node_cache() -> Path:
    """The folder, in the temporary files' (TMPDIR). Raises UserError where another user could have put code there."""
    folder = Path(tempfile.gettempdir()) / f"tptrain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or folder.is_symlink() or status.st_mode & 0o022:
        raise UserError(f"TMPDIR: {folder} can be written by others, and code would be run from it. Remove it.")
    return folder
