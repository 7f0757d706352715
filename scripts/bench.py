"""tptrain against other tensor-parallel frameworks, on this machine. Started by scripts/bench, which sets it up."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from peers import report, runs
from peers.cells import CHECKED_STEPS, MODELS, PRECISIONS, Machine
from peers.chart import draw
from peers.roster import CUDA, ENTRIES, Entry, takes_part, variant
from peers.summary import Cell, Row, one_line
from rich.console import Console
from tqdm import tqdm

EXAMPLES = """\
examples:
  scripts/bench                                       all four cells, three rounds: about an hour on two cores
  scripts/bench --models S --precisions fp32 --rounds 1
  scripts/bench --only tptrain,dtensor,hf
  scripts/bench --models S-gemma2,S-olmo2,S-phi3      families from a Hugging Face directory, against Transformers
  scripts/bench --device cuda                         one GPU: a model of 1.5 B parameters in bf16, with MFU
  scripts/bench --variant 'sp: parallel.sequence_parallel=true'
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    keys = ",".join(entry.key for entry in ENTRIES)
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}; default: S,M on a cpu, 1B on cuda")
    parser.add_argument("--precisions", help="default: fp32,bf16 on a cpu, bf16 on cuda")
    parser.add_argument("--only", default="", metavar="KEYS", help=f"of {keys}; default: all")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: OVERRIDES'", help="a further row of tptrain"
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds: A B C ... A B C ... (default: 3)")
    parser.add_argument("--steps", type=int, help="measured steps of a round (default: S 30, M 8)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--no-communication", action="store_true", help="leave out the profiled run of each contestant")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: model 1B in bf16, one GPU")
    parser.add_argument("--ranks", type=int, help="TP degree (default: 2 on a cpu, 1 on cuda, where none communicates)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds after which a run is given up (1200)")
    parser.add_argument("--out", default="runs/bench", type=Path, help="default: runs/bench")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or chosen.warmup < 1 or (chosen.steps is not None and chosen.steps < 1):
        parser.error("--rounds, --steps, --warmup: at least 1 each")
    gpu = chosen.device == "cuda"
    chosen.machine = Machine(chosen.device, chosen.ranks or (1 if gpu else 2))
    chosen.models = _listed(parser, "--models", chosen.models or ("1B" if gpu else "S,M"), list(MODELS))
    chosen.precisions = _listed(parser, "--precisions", chosen.precisions or "bf16" * gpu or "fp32,bf16", PRECISIONS)
    chosen.only = _listed(parser, "--only", chosen.only or ",".join(CUDA) * gpu or keys, keys.split(","))
    if chosen.machine.ranks == 1:
        chosen.only = [key for key in chosen.only if key != "threads"]
    try:
        chosen.variant = [variant(text) for text in chosen.variant]
    except ValueError as error:
        parser.error(str(error))
    return chosen


def _listed(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{option} {name}: not one of {', '.join(known)}")
    return [name for name in known if name in names]


def main() -> int:
    chosen = arguments()
    cores = len(os.sched_getaffinity(0))
    if cores < chosen.machine.ranks:
        print(f"error: {chosen.machine.ranks} ranks need as many cores; this process has {cores}", file=sys.stderr)
        return 2
    seen = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if chosen.device == "cuda" and subprocess.run(seen).returncode:
        print("error: --device cuda: this machine shows no CUDA device to torch", file=sys.stderr)
        return 2
    entries = [entry for entry in ENTRIES if entry.key in chosen.only]
    after = 1 if entries and entries[0].key == "tptrain" else 0
    entries[after:after] = chosen.variant
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["scripts/bench", *sys.argv[1:]])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    session = report.Session(command, date, chosen.rounds, chosen.warmup, chosen.steps)
    console = Console(width=None if sys.stdout.isatty() else 200)
    cells: list[Cell] = []
    for model in chosen.models:
        for precision in chosen.precisions:
            rows = [Row(entry) for entry in entries if takes_part(entry, MODELS[model].family)]
            cells.append(measure(Cell(MODELS[model], precision, chosen.machine, rows), chosen, out))
            report.print_table(cells[-1], console)
            save(cells, session, out)  # after each cell: what is done is not lost
    console.print(report.explanation(), style="dim", highlight=False)
    for name in ("results.json", "results.md", "results.svg"):
        print(out / name)
    failed = [f"{cell.model.name} {cell.precision}: {text}" for cell in cells for text in cell.failed()]
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    return 1 if failed else 0


def measure(cell: Cell, chosen: argparse.Namespace, out: Path) -> Cell:
    """All rounds of a cell. A contestant that fails is told and not tried again."""
    model, precision = cell.model, cell.precision
    steps = chosen.warmup + (chosen.steps or model.steps)
    work = out / "work" / f"{model.name}-{precision}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    place = runs.Place(work, out / "data", chosen.machine, out / "work" / f"inputs-{model.name}", chosen.timeout)
    total = 1 + chosen.rounds * (len(cell.rows) + 1) + (0 if chosen.no_communication else len(cell.rows))
    with tqdm(total=total, desc=f"{model.name} {precision}", unit="run", disable=None, dynamic_ncols=True) as progress:

        def began(text: str) -> None:
            progress.set_postfix_str(text)

        began("weights and batches")
        runs.prepare(model, max(steps, CHECKED_STEPS), place)
        progress.update()
        for turn in range(1, chosen.rounds + 1):
            for row in cell.rows:
                began(f"round {turn}: {row.entry.label}")
                name = f"{row.entry.key}-{turn}"
                if row.failure is None:
                    row.busy.append(runs.busy())
                    try:
                        row.rounds.append(runs.run(row.entry, model, precision, steps, name, place))
                    except runs.Failed as failed:
                        row.failure = str(failed)
                        tell(row.entry, failed, place, name)
                progress.update()
            began(f"round {turn}: GEMM limit")
            cell.limits.append(runs.gemm_limit(model, precision, f"limit-{turn}", place))
            progress.update()
        for row in cell.rows if not chosen.no_communication else ():
            began(f"collectives: {row.entry.label}")
            if row.rounds:
                row.communication = runs.communication(row.entry, model, precision, place)
            progress.update()
    cell.summarise(chosen.warmup)
    return cell


def tell(entry: Entry, failed: runs.Failed, place: runs.Place, name: str) -> None:
    """Peers that cannot run here are expected: a line. tptrain is not: the end of its log."""
    text = one_line(str(failed)) if entry.kind == "peer" else str(failed)
    tqdm.write(f"{entry.label} did not run ({place.work / name}.log): {text}", file=sys.stderr)


def save(cells: list[Cell], session: report.Session, out: Path) -> None:
    facts = session.facts()
    caption = f"{cells[-1].machine}. {facts['cpu']}, {facts['cores']} cores; {session.date[:10]}"
    draw(cells, caption, out / "results.svg")
    (out / "results.json").write_text(report.raw(cells, session))
    (out / "results.md").write_text(report.markdown(cells, session, "results.svg"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except runs.Failed as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)
