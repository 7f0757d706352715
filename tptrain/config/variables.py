"""Environment variables that a run sets for its ranks where nobody else has; cluster.env and the user's shell win."""

from tptrain.config.schema import Config

# By the shell before a rank starts; a value may be an expression of the shell.
FOR_ALL = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
FOR_CUDA = {
    "PYTORCH_ALLOC_CONF": "${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}",  # against fragmentation
    # Kernels start in the order of their launch: an all-reduce before the product that is to hide it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# By the rank's own process: the network of gloo, and where NCCL's flight record goes.
IN_RANK = ("GLOO_SOCKET_IFNAME",)
IN_CUDA_RANK = ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE")
# Set by nobody here. 1 (torch's): kernels of every group go before others; 0 (ours): not even those of the tp group.
STREAM_PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


def exports(config: Config) -> dict[str, str]:
    """What the shell exports, by name."""
    return FOR_ALL | ({} if config.train.device == "cpu" else FOR_CUDA)


def names(config: Config, device: str) -> list[str]:
    """All variables that have a say on a device of this kind, those of cluster.env last."""
    on_cuda = (*FOR_CUDA, *IN_CUDA_RANK, STREAM_PRIORITY) if device == "cuda" else ()
    return list(dict.fromkeys((*FOR_ALL, *IN_RANK, *on_cuda, *config.cluster.env)))
