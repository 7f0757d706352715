"""The cells of the benchmark (a model in a precision) and the job that a contestant is given. Imports no torch."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A Llama: untied embeddings, RMSNorm (eps 1e-5), rotary positions (theta 10000), SwiGLU, no biases.

    With `family`: a model of that family in the same shape, which tptrain reads from a Hugging Face directory.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int  # a multiple of 128, so that nobody pads it
    seq_len: int
    batch: int  # sequences
    steps: int  # measured steps of a round, where --steps does not say
    family: str = ""  # a model_type of config.json

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq_len


MODELS = {
    model.name: model
    for model in (
        Model("S", 4, 256, 8, 4, 688, 4096, seq_len=256, batch=8, steps=30),
        Model("M", 8, 512, 8, 4, 1376, 8192, seq_len=512, batch=8, steps=8),
        Model("1B", 16, 2048, 32, 8, 8192, 128256, seq_len=4096, batch=2, steps=20),  # llama3_1b, its head untied
    )
}
FAMILIES = "llama", "qwen3", "gemma2", "olmo2", "phi3"
MODELS |= {
    f"{name}-{family}": replace(MODELS[name], name=f"{name}-{family}", family=family)
    for name in ("S", "M")
    for family in FAMILIES
}
PRECISIONS = ("fp32", "bf16")
# How far a contestant's loss may lie from tptrain's, relative, in each of the first steps. In bf16 contestants round in
# different places (tptrain keeps the residual stream in bf16, autocast keeps it in float32), in fp32 only sums differ.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}
CHECKED_STEPS = 10
SEED = 0


@dataclass(frozen=True)
class Machine:
    """What a contestant runs on."""

    device: str  # cpu or cuda
    ranks: int  # the TP degree; on a cpu each has one thread

    def __str__(self) -> str:
        return f"TP={self.ranks}, {self.device}" if self.ranks > 1 else f"one rank, {self.device}"


@dataclass(frozen=True)
class Adam:
    """AdamW at a constant rate, the same for every contestant; matrices decay, vectors do not."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    clip: float = 1.0  # largest global gradient norm


ADAM = Adam()


@dataclass(frozen=True)
class Job:
    """What a rank of a peer reads: which contestant, on what, and where to leave the result."""

    module: str  # of this package; its `build(job)` makes the contestant
    options: dict[str, bool]
    model: Model
    precision: str
    steps: int  # all, warm-up included
    machine: Machine
    overrides: list[str]  # of tptrain, where it is profiled
    inputs: str  # folder with config.json, model.safetensors and tokens.npy
    result: str  # JSON file that rank 0 writes
    profile: bool = False  # measure the time in collectives instead of the speed

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: str) -> "Job":
        values = json.loads(Path(path).read_text())
        return Job(**values | {"model": Model(**values["model"]), "machine": Machine(**values["machine"])})
