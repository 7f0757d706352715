"""Transformers' own models, sharded by their tensor-parallel plans, with our linears, embedding and collectives.

Nothing here is imported before `check_installed` has been called: the package Transformers is an extra.
"""

from tptrain.config import UserError

OLDEST = (5, 5)  # whose functions the room calls


def check_installed() -> None:
    """Raises UserError where this Python has no Transformers, or an older one."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"model.engine=transformers: this Python has no Transformers ({error}). Run `pip install 'tptrain[hf]'`."
        ) from error
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise UserError(
            f"model.engine=transformers: this Python has Transformers {version}, and {'.'.join(map(str, OLDEST))} is "
            "the oldest that will do. Run `pip install 'tptrain[hf]'`."
        )
