"""The plan of a config at the tp that it asks for, in a line, as a process: YAML on standard input, the line on
standard output. So `launch` shows it and imports no torch.
"""

import sys
from pathlib import Path

from tptrain.config import Config, UserError, read_config
from tptrain.plan.report import BINARY, DECIMAL, dry_run_of, ranks_of, step_of, unit_of


def summary(config: Config) -> str:
    """Memory and traffic of a rank in a step. Raises UserError for a model that a dry run cannot run."""
    tp = config.parallel.tp
    ranks = ranks_of(config) or tp
    run = dry_run_of(config, tp, max(1, ranks // tp))
    step = step_of(config, tp, ranks, run)
    memory, per_memory = unit_of([run.peak], BINARY)
    traffic, per_traffic = unit_of([step.tp_bytes, step.dp_bytes], DECIMAL)
    return (
        f"plan: {run.peak / per_memory:,.2f} {memory} of memory a rank at the peak of a step, "
        f"{step.calls:,} collectives over tp with {step.tp_bytes / per_traffic:,.2f} {traffic}, "
        f"{step.dp_bytes / per_traffic:,.2f} {traffic} over dp"
    )


def main() -> int:
    try:
        print(summary(read_config(Path("/dev/stdin"))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
