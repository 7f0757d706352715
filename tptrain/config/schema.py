"""Every setting there is, with its type, default and bounds, and whether it may change when a run is resumed.

Model fields carry the names of Hugging Face's `config.json`. Sizes count elements, batch sizes count sequences.
A field made by `number` names the bounds that `validate` enforces. A resume may change a field that is marked so, and
every field of a group that is; a change of any other makes it another run. Nothing else in the project repeats either.
"""

from dataclasses import dataclass, field
from typing import Any

MAY_CHANGE = {"may_change": True}  # metadata of what a resume may change


def number(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    may_change: bool = False,
) -> Any:
    """A numeric field with inclusive bounds `least` and `most`, or the exclusive lower bound `above`."""
    bounds = {"least": least, "above": above, "most": most}
    metadata = {k: v for k, v in bounds.items() if v is not None}
    return field(default=default, metadata=metadata | {"may_change": may_change})


def size(default: Any, *, may_change: bool = False) -> Any:
    """A count of at least one."""
    return number(default, least=1, may_change=may_change)


def choice(default: Any, *options: str, may_change: bool = False) -> Any:
    """A string out of a fixed list."""
    return field(default=default, metadata={"options": options, "may_change": may_change})


@dataclass
class RunConfig:
    name: str | None = None  # default: model name and time of the launch
    dir: str = ""  # default: runs/<name>, which loading fills in; on a file system that every node sees


@dataclass
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (Hugging Face `rope_scaling`, `rope_type: llama3`)."""

    rope_type: str = choice("default", "default", "llama3")  # default: no stretching
    factor: float = number(8.0, above=0)
    low_freq_factor: float = number(1.0, above=0)
    high_freq_factor: float = number(4.0, above=0)
    original_max_position_embeddings: int = size(8192)


@dataclass
class ModelConfig:
    name: str = "tiny"
    vocab_size: int = size(257)  # before padding; see `padded_vocab_size`
    hidden_size: int = size(192)
    num_hidden_layers: int = size(4)
    num_attention_heads: int = size(8)
    num_key_value_heads: int | None = size(None)  # None: as many as attention heads (MHA); 1 is MQA
    head_dim: int | None = size(None)  # None: hidden_size / num_attention_heads
    intermediate_size: int = size(512)
    max_position_embeddings: int = size(2048)
    position_embedding: str = choice("rope", "rope", "learned")
    rope_theta: float = number(10000.0, above=0)
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm: str = choice("rmsnorm", "rmsnorm", "layernorm")
    rms_norm_eps: float = number(1e-5, above=0)  # of every norm, whichever its kind
    hidden_act: str = choice("silu", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh")
    gated_ffn: bool = True  # silu: SwiGLU; a gelu: GeGLU; False: two linears with the activation between
    attention_bias: bool = False  # on the q, k, v and output projections
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key, as in Qwen3
    tie_word_embeddings: bool = False
    initializer_range: float = number(0.02, above=0)  # standard deviation; of residual projections see models/spec.py
    # model=hf: a Hugging Face directory, or a name of the hub; its config.json then takes the place of all above
    path: str | None = None
    revision: str | None = None  # of the hub: a branch, a tag or a commit
    dropout: float | None = number(None, least=0, most=0)  # model=hf: 0 trains without the dropout of its config.json
    # model=hf: whose code computes the model; auto: tptrain's own where it knows all of the config.json
    engine: str = choice("auto", "auto", "native", "transformers")
    # engine=transformers: styles of modules, by patterns, in addition to the model's own plan
    tp_plan: dict[str, str] = field(default_factory=dict)
    directory: str | None = None  # where loading has found the model
    source: dict[str, Any] = field(default_factory=dict)  # its config.json
    # engine=transformers: what its code says of the model's sizes
    facts: dict[str, Any] = field(default_factory=dict, metadata=MAY_CHANGE)


@dataclass
class ParallelConfig:
    tp: int = size(1)
    sequence_parallel: bool = False  # between the linears each TP rank holds 1/tp of the tokens, not all of them
    overlap: bool = False  # a micro-batch's halves run in turn, so that one's forward all-reduce hides behind the other
    zero: int = number(1, least=0, most=1)  # 1: a dp rank holds 1/dp of the optimizer's state (ZeRO-1); 0: all of it
    backend: str = choice("auto", "auto", "nccl", "gloo")  # auto: nccl on cuda; on cpu memory within a node, else gloo
    tp_across_nodes: bool = False  # whether a TP group may span nodes, its all-reduces crossing the network


@dataclass
class DataConfig:
    source: str = choice("auto", "auto", "stdlib", "files", "hub")  # auto: stdlib for a small vocabulary, else none
    files: list[str] = field(default_factory=list)  # source=files: paths or globs of .txt .jsonl .json .parquet
    name: str | None = None  # source=hub: the data set's name, or a local directory that `datasets` can load
    subset: str | None = None  # source=hub
    split: str = "train"  # source=hub
    text_column: str = "text"
    # bytes, or the path of a Hugging Face tokenizer.json; `model` with model=hf: the model's own; auto: bytes for a
    # small vocabulary, else none
    tokenizer: str = "auto"
    bos_token: str | None = None  # beginning of a document, for tokenizer.json; None: none, or the model's own
    eod_token: str | None = None  # end of document, for tokenizer.json; None: the model's, or the usual names are tried
    validation_fraction: float = number(0.02, above=0, most=0.5)
    # Packed tokens, shared by all runs that read the same data
    cache_dir: str = field(default="runs/.data", metadata=MAY_CHANGE)


@dataclass
class OptimConfig:
    lr: float = number(1e-3, above=0)
    schedule: str = choice("cosine", "cosine", "linear", "constant")
    warmup_steps: int = number(20, least=0)
    min_lr_ratio: float = number(0.1, least=0, most=1)  # of lr, reached at the last step of cosine and linear
    beta1: float = number(0.9, least=0, most=0.9999999)
    beta2: float = number(0.95, least=0, most=0.9999999)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.1, least=0)  # of matrices; vectors (norms, biases) are not decayed
    grad_clip: float = number(1.0, least=0)  # largest global gradient norm; 0: no clipping


@dataclass
class TrainConfig:
    steps: int = size(400, may_change=True)  # but not to fewer
    seq_len: int = size(256)
    global_batch_size: int = size(8)
    # Sequences that a rank runs at once; None: as many as divide its part of a batch, up to 8
    micro_batch_size: int | None = size(None, may_change=True)
    precision: str = choice("fp32", "fp32", "bf16")
    seed: int = number(0, least=0, most=2**63 - 1)
    device: str = choice("auto", "auto", "cpu", "cuda", may_change=True)
    # Norms, rotary, activations: by torch.compile (auto: on cuda), before that by tptrain/ops/cpu on a CPU, which has
    # attention too and takes a second; none: neither
    compile: str = choice("auto", "auto", "elementwise", "none")
    recompute: str = choice("none", "none", "selective", "full")  # in the backward pass: what is cheap, or whole layers
    # A loss that is no number: end the run, or leave that update out
    on_nan: str = choice("stop", "stop", "skip", may_change=True)
    eval_every: int = number(100, least=0, may_change=True)  # steps between validations; 0: only after the last step
    eval_sequences: int = size(64, may_change=True)  # held-out sequences a validation reads


@dataclass
class CheckpointConfig:
    # Steps between checkpoints; 0: only the last step's; None: 100 to 1,000, by what one costs (models/cost.py)
    every: int | None = number(None, least=0)
    keep: int = size(2)  # newest committed checkpoints left on disk
    # Write a Hugging Face directory below exports/ too: with the last step's checkpoint, or with every one
    export: str = choice("none", "none", "last", "every")


@dataclass
class LoggingConfig:
    every: int = size(10)  # steps between rows of metrics.jsonl
    # Prompts whose greedy continuations are written into a row, and for wandb into a table
    samples: list[str] = field(default_factory=list)
    samples_every: int = number(100, least=0)  # steps between them; 0: only after the last step
    samples_tokens: int = size(50)  # of a continuation at most


@dataclass
class WandbConfig:
    mode: str = choice("auto", "auto", "online", "offline", "disabled")  # auto: online with a login, else offline
    project: str = "tptrain"
    entity: str | None = None
    group: str | None = None  # None: the sweep's name, for a run of a sweep


@dataclass
class WatchdogConfig:
    """Longest silence of a rank, in seconds, before the run is ended with a report of who hangs where."""

    rendezvous_s: float = number(300.0, above=0)  # until all ranks have met
    build_s: float = number(1800.0, above=0)  # data, model and the loading of a checkpoint
    first_step_s: float = number(1800.0, above=0)
    step_s: float = number(600.0, above=0)  # of a step, also within a validation or while samples are generated
    checkpoint_s: float = number(1800.0, above=0)


@dataclass
class ClusterConfig:
    kind: str = choice("local", "local", "slurm")
    nodes: int = size(1)
    tasks_per_node: int | None = size(None)  # ranks; None: gpus_per_node, else parallel.tp on one node
    gpus_per_node: int | None = size(None)
    cpus_per_task: int | None = size(None)  # None, with GPUs on Slurm: the part of a node's that its GPUs are
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # minutes, [D-]HH:MM[:SS] or MM:SS, as sbatch reads it; None: the partition's default
    mem: str | None = None  # a node's memory, e.g. 200G; None, with GPUs: as for cpus_per_task
    setup: list[str] = field(default_factory=list)  # shell lines before the trainer starts (torch has its own CUDA)
    env: dict[str, str] = field(default_factory=dict)  # environment variables of every rank; no secrets
    max_restarts: int = number(3, least=0)  # in a row without a new checkpoint, after preemption, time limit or failure
    grace_s: int = number(120, least=1)  # before the time limit at which Slurm's signal asks for a stop
    dry_run: bool = False  # print the sbatch script and submit nothing
    sbatch: dict[str, Any] = field(default_factory=dict)  # any further sbatch option, e.g. {exclude: n7}
    srun: dict[str, Any] = field(default_factory=dict)  # any further option of the ranks' srun, e.g. {mpi: none}
    python: str | None = None  # shell command for the ranks' Python, as in a container; None: the one that launches


@dataclass
class VerifyConfig:
    """What `verify` runs: a few of the model's layers, at their real widths unless these say otherwise."""

    width: int | None = number(None, least=16)  # hidden size; heads and FFN shrink with it
    vocab: int | None = number(None, least=16)  # entries of the vocabulary
    weights: str = choice("auto", "auto", "model", "random")  # auto: the model's own where it has some

    @property
    def shrinks(self) -> bool:
        return self.width is not None or self.vocab is not None

    @property
    def reads_weights(self) -> bool:
        """Whether the weights of a model that has some are read."""
        return not self.shrinks and self.weights != "random"


@dataclass
class GenerateConfig:
    """What `generate` does, beside a model's settings: keys without a group, texts taken as they are typed."""

    prompt: str | None = None
    prompt_file: str | None = (
        None  # a prompt each line, as it is or as a JSON object with "prompt" or "messages"; -: stdin
    )
    chat: bool = False  # a prompt is what a user says, put into the tokenizer's chat template
    max_new_tokens: int = size(128)
    temperature: float = number(0.0, least=0)  # 0: greedy
    top_k: int | None = size(None)  # only so many of the likeliest tokens
    top_p: float = number(1.0, above=0, most=1)  # only the likeliest tokens that together have this probability
    seed: int = number(0, least=0, most=2**63 - 1)
    stop: list[str] = field(default_factory=list)  # texts that end an answer and are no part of it; may come repeatedly
    batch_size: int = size(8)  # prompts that a rank answers at once
    format: str = choice("text", "text", "json")  # json: a line for each prompt


@dataclass
class EvalConfig:
    """What `eval` does with tasks of lm-evaluation-harness, beside a model's settings: keys without a group."""

    tasks: list[str] = field(default_factory=list)  # by name, or by the path of a task's file
    task_dir: str | None = None  # a folder of task files, beside the harness's own
    num_fewshot: int | None = number(None, least=0)  # examples before a question; None: as the task has it
    limit: int | None = size(None)  # documents of each task
    batch_size: int = size(8)  # texts that a rank scores, or goes on with, at once
    max_length: int | None = number(None, least=2)  # tokens; None: the model's positions
    apply_chat_template: bool = False  # what is asked goes through the tokenizer's chat template
    fewshot_as_multiturn: bool | None = None  # the examples are turns of the chat; None: as apply_chat_template
    system_instruction: str | None = None  # what stands before a question; with a chat template, its system message
    out: str | None = None  # the file of results; None: below the run, else here, by the time
    log_samples: bool = False  # what was asked and answered goes into files beside it


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig, metadata=MAY_CHANGE)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=MAY_CHANGE)
    logging: LoggingConfig = field(default_factory=LoggingConfig, metadata=MAY_CHANGE)
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata=MAY_CHANGE)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig, metadata=MAY_CHANGE)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=MAY_CHANGE)
    verify: VerifyConfig = field(default_factory=VerifyConfig, metadata=MAY_CHANGE)


MODEL_FILES = "model"  # below a run directory: the files of a Hugging Face directory, without the weights
TENSORS = "tensors.json"  # in it: name, type, file and shape of each tensor, in the order of the files
CPUS_OF_GPU = 4  # that a rank with a GPU needs: trainer, autograd, NCCL, data and saver
MOST_AT_ONCE = 8  # sequences, where train.micro_batch_size does not say
VOCAB_MULTIPLE = 128
SMALL_VOCABULARY = 32768  # entries at most for which bytes of Python's library are data by default


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: rounded up to a fixed multiple, so that the shape never depends on the TP degree."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def micro_batch_size(config: "Config", dp: int) -> int:
    """Sequences that a rank runs at once, with so many data-parallel ranks."""
    train, step = config.train, 2 if config.parallel.overlap else 1
    if train.micro_batch_size is not None:
        return train.micro_batch_size
    part = train.global_batch_size // dp
    return max((size for size in range(step, MOST_AT_ONCE + 1, step) if part % size == 0), default=step)


def kv_heads(model: ModelConfig) -> int:
    return model.num_key_value_heads or model.num_attention_heads


def head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads
