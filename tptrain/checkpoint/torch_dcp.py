"""What every call of torch.distributed.checkpoint needs."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from tptrain.parallel.control import Control


def ranks_of(control: Control) -> dict[str, Any]:
    """torch's arguments for the ranks that save or load together."""
    return {"process_group": control.process_group} if control.group else {"no_dist": True}


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """torch.distributed.checkpoint warns of its own internals on every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
