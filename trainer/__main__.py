"""python -m trainer COMMAND: one thin module per command in trainer/commands."""

from __future__ import annotations

import errno
import sys

from trainer.signals import Interruptions

COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "compare",
    "encode",
    "pack",
    "export",
    "import",
    "check",
    "plugins",
    "new",
    "conform",
    "benchmark",
)
WITHOUT_CONFIG = ("compare", "plugins", "new", "conform")

# Commands that skip what an interrupted one has finished.
RESUMED = ("train", "sample", "evaluate", "encode", "pack")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    A user error prints one message, no traceback, and returns 2; a signal prints one line and returns 128 + number.
    """
    words = sys.argv[1:] if argv is None else argv
    hint = "repeat the command to resume" if words and words[0] in RESUMED else ""
    with Interruptions(hint) as interruptions:  # before further imports, of which torch's take seconds
        try:
            from trainer.pipes import ends_with_its_reader

            return ends_with_its_reader(run)(words)
        except Exception as error:
            # Whatever surfaces after a signal is its consequence: libraries translate KeyboardInterrupt, and ranks that
            # were interrupted first break the connection.
            if interruptions.number:
                return interruptions.report()
            if (message := user_message(error)) is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return interruptions.report()


def run(argv: list[str]) -> int:
    """Parse the command line and run the command; returns its exit status. Raises its errors."""
    import argparse
    import importlib
    import keyword
    from pathlib import Path

    from components.version import versions
    from trainer.config import trust

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
    with trust.trusting(vars(arguments).get("trust_plugins", False)):
        return arguments.run(arguments, rest)


def user_message(error: Exception) -> str | None:
    """Message of an error that is reported without a traceback; None for other errors."""
    if isinstance(error, user_errors()):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" '{error.filename}'" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; free disk space or choose another folder, then repeat"
    return None


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
