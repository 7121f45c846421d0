"""python -m trainer COMMAND: one thin module per command in trainer/commands."""

from __future__ import annotations

import argparse
import importlib
import keyword
import sys
from pathlib import Path

from components.version import versions
from trainer.config import trust
from trainer.pipes import ends_with_its_reader

COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "encode",
    "export",
    "import",
    "check",
    "plugins",
    "new",
    "conform",
    "benchmark",
)
WITHOUT_CONFIG = ("plugins", "new", "conform")


@ends_with_its_reader
def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; a user error prints one message, no traceback, and returns 2."""
    parser = argparse.ArgumentParser(
        prog="titanrepa" if Path(sys.argv[0]).stem == "titanrepa" else "python -m trainer",
        description="titanrepa: end-to-end training of latent diffusion models through representation alignment.",
    )
    parser.add_argument("--version", action="version", version=versions())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        # "import" cannot be a module's name.
        module = importlib.import_module(f"trainer.commands.{name}{'_' if keyword.iskeyword(name) else ''}")
        sub = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        if name not in WITHOUT_CONFIG:
            sub.add_argument(trust.OPTION, action="store_true", help=trust.HELP)
        sub.set_defaults(run=module.run)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        if rest:
            parser.error(f"expected a COMMAND before {rest[0]}")
        parser.print_help(sys.stderr)
        return 2
    try:
        with trust.trusting(vars(arguments).get("trust_plugins", False)):
            return arguments.run(arguments, rest)
    except user_errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def user_errors() -> tuple[type[Exception], ...]:
    """Exception types that are reported by their message alone, without a traceback."""
    from components.checkpoint import CheckpointError
    from components.data.loader import DataError
    from components.distributed.parallel import ParallelError
    from components.evaluation import EvaluationError
    from components.files.lock import LockError
    from components.files.weights import WeightsError
    from components.finite import NotFiniteError
    from components.registry import PluginError
    from trainer.config import ConfigError
    from trainer.run.alarms import GuardStop

    return (
        ConfigError,
        PluginError,
        WeightsError,
        DataError,
        EvaluationError,
        CheckpointError,
        ParallelError,
        GuardStop,
        NotFiniteError,
        LockError,
    )


if __name__ == "__main__":
    sys.exit(main())
