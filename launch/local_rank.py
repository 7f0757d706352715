"""The first lines of a local rank: a SIGTERM from here on waits until the rank's supervisor listens.

`python -m launch.local_rank` stands where submitit's command has `python`. The mask is not inherited from `launch`,
because submitit's controller, which is between the two, has to receive its SIGTERM and pass it on.
"""

import runpy
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
module = sys.argv.index("-m") + 1
sys.argv = sys.argv[module:]  # submitit.core._submit and its folder
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
