"""The command line: `mixtura VERB ...`, one module per verb, imported when the verb is used.

A verb is an entry in `VERBS` and a module with a function of the verb's name, whose signature
typer reads. Such modules keep torch and Transformers out of their top level, so that `--help` and
usage errors come at once; `import mixtura` itself loads neither (see `mixtura.plugin`).

Errors leave through one door, `VerbGroup.main`: one line on stderr, exit code 1 (2 for a wrong
command line, 130 for Ctrl-C), and with `--debug` the traceback.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import mixtura
from mixtura.cli.options import DEBUG
from mixtura.errors import MixturaError

USER_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit codes; the last two are what a shell gives a program that the signal has ended."""


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb lives, and its line in `mixtura --help`."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "generate": Verb("mixtura.cli.generate", "Generate text, and say how fast it came."),
    "inspect": Verb("mixtura.cli.inspect", "Count and draw which experts a text visits."),
    "explain": Verb("mixtura.cli.explain", "Say which kernel runs each MoE layer, and why."),
    "eplb": Verb("mixtura.cli.eplb", "Say what balancing experts over ranks would bring."),
    "quantize": Verb("mixtura.cli.quantize", "Quantize a checkpoint on disk."),
    "bench": Verb("mixtura.cli.bench", "Measure speed beside the limits of this machine."),
    "tune": Verb("mixtura.cli.tune", "Look for faster blocks for a model's experts on this GPU."),
    "doctor": Verb("mixtura.cli.doctor", "Say what this machine offers, and what is missing."),
    "conformance": Verb("mixtura.cli.conformance", "Try whether a plug-in keeps its contract."),
}


def load_verb(name: str) -> TyperCommand:
    """Import a verb's module and make its command."""
    function = getattr(importlib.import_module(VERBS[name].module), name)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(function)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


class VerbGroup(TyperGroup):
    """A group that knows its verbs by name and help alone, and imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=verb.help) for name, verb in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the real command in the place of the one that only holds the help."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name in VERBS else found, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an interruption and a reader that has gone end it without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(CLOSED_PIPE) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit; every error becomes one line."""
        args = sys.argv[1:] if args is None else args
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            if DEBUG in args:
                traceback.print_exc()
            print(f"error: {error_line(error)}", file=sys.stderr)
            sys.exit(USAGE_ERROR if isinstance(error, typer.TyperException) else USER_ERROR)
        sys.exit(code if isinstance(code, int) else 0)


def error_line(error: Exception) -> str:
    """What the user is told about an exception."""
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "mixtura"
        message = " ".join(error.format_message().split())
        ending = "" if message.endswith((".", "?")) else "."
        return f"{message}{ending} See '{command} --help'."
    if isinstance(error, MixturaError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    told = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"unexpected {told}. Run again with {DEBUG} for the traceback."


def _forget_stdout() -> None:
    """Let the interpreter's last flush go nowhere; the reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="mixtura",
    cls=VerbGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Run Mixture-of-Experts language models on the processor or GPU that is here."""
    if version:
        typer.echo(f"mixtura {mixtura.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The console script."""
    if sys.stdout is None:  # started with the descriptor closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot
    app(prog_name="mixtura")
