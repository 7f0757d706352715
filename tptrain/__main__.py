"""The command line: `python -m tptrain VERB ...`."""

import errno
import importlib
import os
import sys

from tptrain.config.command_line import HELP, parser

VERBS = {  # verb -> the module of tptrain/commands and its function
    "launch": ("runs", "launch"),
    "status": ("runs", "status"),
    "logs": ("runs", "logs"),
    "cancel": ("runs", "cancel"),
    "config": ("models", "show_config"),
    "plan": ("models", "show_plan"),
    "train": ("runs", "train"),
    "eval": ("use", "evaluate"),
    "generate": ("use", "generate"),
    "verify": ("models", "verify"),
    "import": ("models", "import_model"),
    "export": ("models", "export_model"),
}


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else 2
    verb = words[0]
    if verb not in VERBS:
        print(f"error: {verb}: no such verb. Known: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    options = parser(verb).parse_intermixed_args(words[1:])
    from tptrain.config import UserError

    module, function = VERBS[verb]
    try:
        return getattr(importlib.import_module(f"tptrain.commands.{module}"), function)(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
