"""Tokens a second of generation: tptrain's own decoder, Transformers' model in tptrain's hands, and Transformers'
`generate` under its own TP, greedy, with random weights of one Llama.

    pip install accelerate  # that Transformers wants for its TP
    python scripts/generate_speed.py [--ranks 2] [--rounds 3] [--batches 1,8] [--new 128] [--precisions fp32,bf16]

Every round starts each of them once, in turn; a process generates a few tokens first, which are not timed. Ratios are
of medians over the rounds. The last column has the milliseconds that a token of all rows takes in the first and in the
last quarter of the generation: but for attention it costs the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

SHAPES = {  # of scripts/bench: vocabulary, hidden, layers, heads, KV heads, FFN
    "S": (4096, 256, 4, 8, 4, 688),
    "M": (16384, 1024, 8, 16, 8, 2752),
}
WHO = ("native", "transformers in tptrain", "transformers")
PROMPT, WARM = 64, 8  # tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(folder: Path, shape: str, positions: int) -> None:
    import transformers

    vocab, hidden, layers, heads, kv_heads, ffn = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def prompts(batch: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab, (batch, PROMPT), generator=generator).tolist()


class Clock:
    """When each token of all rows has come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def result(self, began: float, batch: int) -> dict[str, float]:
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        part = max(1, len(gaps) // 4)
        total = self.times[-1] - began
        first, last = statistics.median(gaps[:part]), statistics.median(gaps[-part:])
        return {"tokens_s": batch * len(self.times) / total, "first_ms": 1e3 * first, "last_ms": 1e3 * last}


def ours(engine: str, folder: Path, precision: str, batches: list[int], new: int) -> list[dict[str, float]]:
    from launch.place import find_place
    from tptrain.checkpoint.pretrained import read_weights
    from tptrain.config import load_config
    from tptrain.generate.decode import Continuation, decode
    from tptrain.generate.sample import Sampler, Sampling
    from tptrain.models.sizes import settle_engine
    from tptrain.run.rendezvous import connect_ranks, meet
    from tptrain.train.trainer import build_model
    from tptrain.watch.black_box import BlackBox

    world = find_place().world
    settings = ["model=hf", f"model.path='{folder}'", f"model.engine={engine}", f"parallel.tp={world}"]
    settings += [f"run.dir='{folder}/run'", f"train.precision={precision}", "data.tokenizer=bytes"]
    config = load_config([*settings, "train.seq_len=8", f"train.global_batch_size={world}"])
    settle_engine(config)
    rendezvous = meet(config, box := BlackBox())
    model, store = build_model(config, mesh := connect_ranks(config, box, rendezvous), rendezvous.ops)
    read_weights(config.model, model, store.fill)
    sampler, results = Sampler(model.output_head, mesh, Sampling()), []
    for batch in batches:
        rows = list(enumerate(prompts(batch, sampler.vocab_size)))
        decode(model, sampler, rows, WARM, lambda row: False)
        clock, began = Clock(), time.perf_counter()

        def finished(row: Continuation, clock: Clock = clock) -> bool:
            if row.number == 0:
                clock.tick()
            return False

        decode(model, sampler, rows, new, finished)
        results.append(clock.result(began, batch))
    return results


def theirs(folder: Path, precision: str, batches: list[int], new: int) -> list[dict[str, float]]:
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.generation.streamers import BaseStreamer

    dist.init_process_group("gloo")
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=DTYPES[precision])
    model, results = model.eval(), []
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    class Ticks(BaseStreamer):
        def __init__(self, clock: Clock) -> None:
            self.clock, self.prompt = clock, True

        def put(self, value: Any) -> None:
            if not self.prompt:
                self.clock.tick()
            self.prompt = False

        def end(self) -> None:
            pass

    for batch in batches:
        tokens = torch.tensor(prompts(batch, model.config.vocab_size))
        mask = torch.ones_like(tokens)
        model.generate(tokens, attention_mask=mask, max_new_tokens=WARM, **settings)
        # A streamer takes batches of one only: larger ones are ticked by a criterion that never stops.
        clock, began = Clock(), time.perf_counter()
        ticks: dict[str, Any] = {"streamer": Ticks(clock)}
        if batch > 1:
            ticks = {"stopping_criteria": [lambda ids, scores, clock=clock: _tick(ids, clock)]}
        model.generate(tokens, attention_mask=mask, max_new_tokens=new, **settings, **ticks)
        results.append(clock.result(began, batch))
    return results


def _tick(ids: torch.Tensor, clock: Clock) -> torch.Tensor:
    clock.tick()
    return torch.zeros(len(ids), dtype=torch.bool)


def rank(who: str, folder: Path, precision: str, batches: list[int], new: int) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if who == "transformers":
        results = theirs(folder, precision, batches, new)
    else:
        results = ours("native" if who == "native" else "transformers", folder, precision, batches, new)
    if os.environ["RANK"] == "0":
        (folder / "result.json").write_text(json.dumps(results))
    os._exit(0)


def start(who: str, folder: Path, precision: str, chosen: argparse.Namespace) -> list[dict[str, float]]:
    threads = max(1, len(os.sched_getaffinity(0)) // chosen.ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(chosen.ranks), __file__]
    command += ["--who", who, "--folder", str(folder), "--precisions", precision, "--new", str(chosen.new)]
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    (folder / "result.json").unlink(missing_ok=True)
    done = subprocess.run([*command, "--batches", chosen.batches], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{who} failed:\n{done.stderr[:3000]}")
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="S", choices=list(SHAPES))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--who", help=argparse.SUPPRESS)  # a rank, started by this program
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    batches = [int(batch) for batch in chosen.batches.split(",")]
    if chosen.who:
        rank(chosen.who, chosen.folder, chosen.precisions, batches, chosen.new)
        return
    precisions = chosen.precisions.split(",")
    rows: dict[tuple[str, str], list[list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=chosen.rounds * len(precisions) * 3, disable=None) as bar:
        make(Path(scratch), chosen.shape, PROMPT + chosen.new)
        for precision in precisions:
            for _ in range(chosen.rounds):
                for who in WHO:
                    rows.setdefault((precision, who), []).append(start(who, Path(scratch), precision, chosen))
                    bar.update()
    head = f"{chosen.shape}, tp={chosen.ranks} | rows | tokens/s | over Transformers' TP | ms, first and last quarter"
    print(f"| {head} |\n| --- | ---: | ---: | ---: | ---: |")
    for precision in precisions:
        for place, batch in enumerate(batches):
            medians = {who: median([each[place] for each in rows[precision, who]]) for who in WHO}
            for who, own in medians.items():
                ratio = own["tokens_s"] / medians["transformers"]["tokens_s"]
                times = f"{own['first_ms']:.2f}, {own['last_ms']:.2f}"
                print(f"| {precision}, {who} | {batch} | {own['tokens_s']:,.0f} | {ratio:.2f} | {times} |")


def median(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in results) for key in results[0]}


if __name__ == "__main__":
    main()
