"""Who takes part. Imports no torch."""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    key: str  # what --only takes
    label: str
    kind: str  # ours, peer, or reference: one process, which has nothing to communicate
    module: str = ""  # of a peer, in this package
    options: dict[str, bool] = field(default_factory=dict)  # of a peer
    overrides: tuple[str, ...] = ()  # of tptrain
    package: str = "torch"  # whose version is told
    own_weights: bool = False  # it begins with other weights than the rest: its losses are not compared


TPTRAIN = Entry("tptrain", "tptrain", "ours", package="tptrain")
ENTRIES = (
    TPTRAIN,
    Entry(
        "engine",
        "tptrain, Transformers' model",
        "ours",
        overrides=("model.engine=transformers",),
        package="tptrain",
    ),
    Entry("dtensor", "PyTorch DTensor", "peer", "dtensor"),
    Entry("dtensor-sp", "PyTorch DTensor, sequence parallel", "peer", "dtensor", {"sequence": True}),
    Entry("dtensor-compile", "PyTorch DTensor, compiled", "peer", "dtensor", {"compile": True}),
    Entry("hf", "Transformers", "peer", "hf", package="transformers"),
    Entry("hf-compile", "Transformers, compiled", "peer", "hf", {"compile": True}, package="transformers"),
    Entry("megatron", "Megatron-core", "peer", "megatron_core", package="megatron-core"),
    Entry("megatron-sdpa", "Megatron-core with SDPA", "peer", "megatron_core", {"sdpa": True}, package="megatron-core"),
    Entry("titan", "torchtitan", "peer", "titan", package="torchtitan"),
    Entry("titan-spmd", "torchtitan, spmd_types", "peer", "titan", {"spmd_types": True}, package="torchtitan"),
    Entry("titan-compile", "torchtitan, compiled", "peer", "titan", {"compile": True}, package="torchtitan"),
    Entry("scratch", "tptrain, the same model from scratch", "ours", package="tptrain", own_weights=True),
    Entry("threads", "tptrain, 1 process x 2 threads", "reference", package="tptrain"),
)


CUDA = ("tptrain", "dtensor", "dtensor-compile", "hf", "hf-compile", "titan", "titan-compile")  # one rank: no TP


OF_FAMILIES = ("tptrain", "engine", "scratch", "hf", "hf-compile", "threads")  # who reads a Hugging Face directory
FROM_SCRATCH = ("llama", "qwen3")  # families that `model.*` settings can make, too


def takes_part(entry: Entry, family: str) -> bool:
    """Whether a contestant can train a model of this family (none: a Llama from scratch)."""
    if entry.key == "scratch":
        return family in FROM_SCRATCH
    if entry.key == "engine":
        return bool(family)
    return not family or entry.key in OF_FAMILIES


def variant(text: str) -> Entry:
    """A further row of tptrain out of `NAME: OVERRIDE OVERRIDE ...`. Raises ValueError."""
    name, colon, overrides = text.partition(":")
    if not colon or not name.strip() or not overrides.split():
        raise ValueError(f"--variant {text!r}: write it as 'NAME: OVERRIDE OVERRIDE ...'")
    key = f"tptrain-{name.strip().replace(' ', '-')}"
    return Entry(key, f"tptrain, {name.strip()}", "ours", overrides=tuple(overrides.split()), package="tptrain")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
