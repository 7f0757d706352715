"""The command line: what `--help` says, and the arguments of each verb."""

import argparse

HELP = """\
Tensor-parallel training of transformer language models on Slurm clusters.

  python -m tptrain VERB [arguments]        python -m tptrain VERB --help

runs:
  launch [-m] [key=value ...]   check the config, submit the run to this machine or to Slurm; -m: a sweep, a=1,2 b=3,4
  status [RUN ...]              how runs stand: job, state, step, loss, tokens/s, restarts, last checkpoint
  logs RUN [-f] [--rank N]      what a rank of the run's last job printed; -f follows it
  cancel RUN                    stop a run for good, with a checkpoint
without a job:
  config [key=value ...]        print the resolved, checked config
  plan [key=value ...]          legal TP degrees, memory a rank, traffic and operations of a step; needs no GPU
  train [key=value ...]         run one rank here, under torchrun, under srun, or alone
  eval RUN|DIR [key=value ...]  perplexity on data=..., of a run, a checkpoint or a Hugging Face directory
  eval RUN|DIR tasks=[NAME,...] [key=value ...]  scores of lm-evaluation-harness; task_dir num_fewshot limit batch_size
                                max_length apply_chat_template fewshot_as_multiturn system_instruction out
                                log_samples
  generate RUN|DIR prompt=TEXT [key=value ...]  what the model goes on with; prompts also by prompt_file=FILE or stdin;
                                max_new_tokens temperature top_k top_p seed stop chat batch_size format=json
  verify [key=value ...]        prove that the model trains right here: many ranks against one; exit code 1 where not
  verify RUN                    whether a run's checkpoints, or one of them, are whole
  import DIR OUT [key=value ...]  a Hugging Face directory as a checkpoint
  export RUN OUT                a run's newest checkpoint, or a checkpoint, as a Hugging Face directory

eval, generate and import are ranks themselves: under torchrun or srun, or alone, where they start parallel.tp of them;
with cluster=slurm eval and generate run as a Slurm job, and answer on this terminal.

overrides are Hydra's:
  python -m tptrain launch model=hf model.path=Qwen/Qwen3-8B parallel.tp=4 data=files 'data.files=[corpus/*.jsonl]'
  python -m tptrain launch model=hf model.path=DIR parallel.tp=8 data=hub data.name=NAME cluster=slurm
  torchrun --nproc-per-node 2 -m tptrain train parallel.tp=2 run.name=mine

`launch` again with the same run.name or run.dir resumes the run. RUN is a run's name below runs/, or its directory.
exit codes: 0 done, 2 a mistake in what was asked for, 1 anything else
"""


def parser(verb: str) -> argparse.ArgumentParser:
    """What reads the arguments after a verb."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tptrain {verb}", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if verb in ("logs", "cancel"):
        parser.add_argument("run", metavar="RUN")
    elif verb == "export":
        parser.add_argument("run", metavar="RUN", help="or a checkpoint's directory")
        parser.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
    elif verb == "status":
        parser.add_argument("runs", nargs="*", metavar="RUN", help="default: all below runs/")
    elif verb == "import":
        parser.add_argument("model", metavar="DIR", help="a Hugging Face directory, or a name of the hub")
        parser.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="parallel.tp=N, as many ranks as there are"
        )
    else:
        parser.add_argument("overrides", nargs="*", metavar="key=value")
    if verb == "launch":
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="one run for every combination of a=1,2 b=3,4"
        )
    if verb == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until the job ends")
        parser.add_argument("--rank", type=int, default=0, help="default: 0, the one that tells progress")
    return parser
