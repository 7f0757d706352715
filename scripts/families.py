"""Every causal family of Transformers with a tensor-parallel plan, and some without, as a small random model, cut by
Transformers and by tptrain, which runs Transformers' model or has the family natively, against one process: a step of
training, and what tptrain generates by Transformers' model. Started by scripts/families, which sets it up. Writes
docs/families.md."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from family_report import Outcome, Row, one_line, page
from tqdm import tqdm

from tests import zoo, zoo_generate, zoo_step
from tests.zoo_pool import DIED, Pool, TaskError, preload
from tests.zoo_table import ABSENT
from tptrain.models.families import FAMILIES as NATIVE

DEGREES = (2, 4)
MOST = max(DEGREES)
REFUSAL = "UserError: "
PAGE = Path(__file__).parent.parent / "docs" / "families.md"


@dataclass
class Pools:
    """Ranks for each number of them. `timeout`: seconds of a task."""

    timeout: float
    of: dict[int, Pool] = field(default_factory=lambda: {world: Pool(world) for world in (1, *DEGREES)})

    def outcome(self, world: int, function: Callable[..., Any], *arguments: Any, again: bool = True) -> Outcome:
        """Over so many ranks, of a step or of what they generate. Where a rank died without an error it is tried
        `again`, once.
        """
        try:
            ranks = self.of[world].run(function, *arguments, timeout=self.timeout)
        except TaskError as error:
            text = str(error)
            if again and DIED in text:
                return self.outcome(world, function, *arguments, again=False)
            refused = text.startswith(REFUSAL)
            return Outcome("refused" if refused else "crashes", text.removeprefix(REFUSAL) if refused else text)
        if isinstance(ranks[0], str):
            wrong = next(filter(None, ranks), "")
            return Outcome("wrong" if wrong else "right", wrong)
        worst = zoo_step.worst(ranks)
        wrong = zoo_step.difference(worst)
        return Outcome("wrong" if wrong else "right", wrong, worst)

    def generates(self, family: str) -> dict[int, Outcome]:
        """By the number of ranks, against Transformers in one process."""
        try:
            right = self.of[1].run(zoo_generate.generated, family, timeout=self.timeout)[0]
        except TaskError as error:
            return {tp: Outcome("crashes", f"in one process: {error}") for tp in DEGREES}
        return {tp: self.outcome(tp, zoo_generate.difference, right, tp) for tp in DEGREES}

    def stop(self) -> None:
        for pool in self.of.values():
            pool.stop()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="A,B", help="these families, printed and not written")
    parser.add_argument("--timeout", type=float, default=90, help="seconds of a step, after which it crashes (90)")
    chosen = parser.parse_args()
    known = [*zoo.config_classes(), *zoo.planless()]
    chosen.families = chosen.only.split(",") if chosen.only else known
    if unknown := set(chosen.families) - set(known):
        parser.error(f"--only: {', '.join(sorted(unknown))}: none of {', '.join(known)}")
    return chosen


def row(family: str, pools: Pools) -> Row:
    """What `family` does alone, and cut in every way. Where 2 KV heads are too few, again with as many as ranks."""
    config_class = (zoo.config_classes() | zoo.planless())[family]
    result = Row(family, sorted(set(zoo.plan(config_class).values())))
    if family in ABSENT:
        result.absent = ABSENT[family]
        return result
    with TemporaryDirectory() as name, TemporaryDirectory() as other:
        folder, wide = Path(name), Path(other)
        try:
            _, result.reloaded = pools.of[1].run(zoo_step.alone, family, folder, timeout=pools.timeout)[0]
        except TaskError as error:
            result.absent = str(error)
            return result
        for tp in DEGREES:
            if result.styles:
                result.theirs[tp] = pools.outcome(tp, zoo_step.theirs, folder)
            result.engine[tp] = pools.outcome(tp, zoo_step.engine, folder)
            if family in NATIVE:
                result.native[tp] = pools.outcome(tp, zoo_step.ours, family, folder)
        result.generates = pools.generates(family)
        if result.theirs and result.theirs[MOST].verdict == "crashes" and zoo.grouped(family):
            try:
                pools.of[1].run(zoo_step.alone, family, wide, MOST, timeout=pools.timeout)
                result.wide = pools.outcome(MOST, zoo_step.theirs, wide)
            except TaskError as error:
                result.wide = Outcome("crashes", f"in one process: {error}")
    return result


def main() -> None:
    chosen = arguments()
    preload()
    pools = Pools(chosen.timeout)
    start = time.monotonic()
    rows = []
    try:
        for family in (bar := tqdm(chosen.families, disable=None, unit="family")):
            bar.set_postfix_str(family)
            rows.append(row(family, pools))
            tqdm.write(one_line(rows[-1]))
    finally:
        pools.stop()
    if not chosen.only:
        PAGE.write_text(page(rows, (time.monotonic() - start) / 60))
        print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
