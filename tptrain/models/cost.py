"""What checkpoints cost, before a run: on disk, in time, in the hosts' memory. Imports no torch."""

import math

from tptrain.config import Config
from tptrain.models.sizes import Facts, sizes
from tptrain.models.spec import DecoderSpec

CHECKPOINT_BYTES = 4 * 3  # of a parameter: a float32 master and two moments
STAGING_BYTES = 256 * 2**20  # of pinned memory, through which a rank's state goes from its GPU to its host
RANK_BYTES = 2 * 2**30  # of the host, for Python, torch and NCCL of a rank with a GPU: assumed, not measured
# A checkpoint of less than CHEAP bytes is written every OFTEN steps. Writing larger ones takes at most SHARE of the
# time of GPUs that each compute FLOPS a second (0.4 of an H100's peak) and write BANDWIDTH bytes a second; but no more
# than SELDOM steps are at stake, for small steps take longer than their FLOPs.
CHEAP, OFTEN, SELDOM = 10e9, 100, 1000
SHARE, FLOPS, BANDWIDTH = 0.03, 4e14, 1e8


def checkpoint_every(config: Config) -> int:
    """Steps between checkpoints: `checkpoint.every`, else by cost. 0: only the last step's.

    It follows from the model and a step's tokens, not from the number of ranks: more GPUs compute and write faster.
    """
    if config.checkpoint.every is not None:
        return config.checkpoint.every
    spec, train = sizes(config.model), config.train
    size = checkpoint_size(spec)
    if size < CHEAP:
        return OFTEN
    step_s = spec.flops_per_token(train.seq_len) * train.global_batch_size * train.seq_len / FLOPS
    return min(SELDOM, OFTEN * math.ceil(size / BANDWIDTH / (SHARE * step_s) / OFTEN))


def saves_after(step: int, config: Config) -> int:
    """How many checkpoints a run writes after that step, to its end."""
    every, steps = checkpoint_every(config), config.train.steps
    if step >= steps:
        return 0
    return 1 if every == 0 else steps // every - step // every + (steps % every > 0)


def checkpoint_size(spec: DecoderSpec | Facts) -> int:
    """Bytes of a checkpoint, but for norms and biases: less than a hundredth."""
    return CHECKPOINT_BYTES * spec.matrix_parameters


def copy_size(config: Config, ranks: int, ranks_of_node: int) -> int:
    """Bytes that the saving of a GPU run takes in a node's memory: of each rank there its part of the masters and
    moments, and the pinned memory that they go through.
    """
    parts = ranks if config.parallel.zero else config.parallel.tp
    return ranks_of_node * (checkpoint_size(sizes(config.model)) // parts + STAGING_BYTES)
