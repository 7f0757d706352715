"""What `plan` says of a config, in a line, without torch in this process."""

import subprocess
import sys

from tptrain.config import Config
from tptrain.config.load import to_yaml

PATIENCE_S = 60


def summary(config: Config) -> str:
    """The figures, or why there are none. Takes some seconds: another process imports torch and Transformers."""
    command = [sys.executable, "-m", "tptrain.plan.summary"]
    try:
        done = subprocess.run(command, input=to_yaml(config), capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"plan: no answer in {PATIENCE_S} s"
    text = done.stdout if done.returncode == 0 else done.stderr
    return (text.strip().splitlines() or ["plan: no figures"])[-1]
