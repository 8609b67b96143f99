"""The program `layerprobe`: the list of commands, and how errors leave it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from layerprobe import __version__
from layerprobe.errors import LayerprobeError, NotAvailableError, Terminated, out_of_memory, stopped_by
from layerprobe.progress import error_line, line_for_people, silence_notes, wrapped

if TYPE_CHECKING:  # typer keeps a click of its own
    from pathlib import Path

    from typer._click.core import Command
    from typer._click.core import Context as ClickContext
    from typer._click.exceptions import ClickException
    from typer._click.formatting import HelpFormatter

COMMANDS = (
    "demo", "freeze-search", "watch", "worker", "bridge", "evaluate", "outliers", "compare", "features", "cka",
    "probe", "transfer", "attribute", "report", "env",
)  # fmt: skip
"""In the order of the help; each stands in the file of its name, in a function of its name."""


WELCOME = """\
Which layers of a language-pretrained transformer already serve vision, and
which should be trained? The road to an answer:

  layerprobe demo
      a first look, under a minute
  layerprobe probe MODEL --task TASK
      what each layer knows as it is
  layerprobe freeze-search MODEL --task TASK
      which blocks to train: a freeze plan
  layerprobe evaluate MODEL --task TASK --plan RUN --arms partial,language
      the plan against training everything, on unseen seeds
  layerprobe report RUN
      a run as a page to send

MODEL is minilm, gpt2, a hub id or a folder. TASK is digits, cifar100, a data
set of the hub or a folder of images. RUN is a folder below runs/ or of -o.
Names: layerprobe ls models, layerprobe ls tasks. More: layerprobe --help
"""
NO_MEMORY = (
    "there is not enough memory; finished work is kept. Try a smaller --batch-size or --image-size, a larger "
    "--patch-size, fewer --workers, or --dtype bfloat16; --dry-run says what it takes"
)
UsageMistake: type[ClickException] = typer.BadParameter.__mro__[2]
"""What a user typed wrongly: click's own class, wherever typer keeps its click."""


class Program(TyperGroup):
    """The command group. A known error becomes `error: …` on stderr and its exit code; bugs keep their traceback."""

    def get_command(self, ctx: ClickContext, cmd_name: str) -> Command | None:
        """The command, its help made ready for a terminal."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _ready_help(command)
        return command

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **options: Any,
    ) -> object:
        """Run a call; what was typed wrongly is one line, too."""
        try:
            code = super().main(args, prog_name, standalone_mode=False, **options)
        except UsageMistake as mistake:
            if not standalone_mode:
                raise
            sys.stderr.write(wrapped(f"error: {_mistake_line(mistake)}") + "\n")
            sys.exit(mistake.exit_code)
        except typer.Abort:
            sys.exit(1)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: ClickContext) -> object:
        try:
            with _sigterm_like_ctrl_c():
                return super().invoke(ctx)
        except LayerprobeError as error:
            sys.stderr.write(wrapped(f"error: {error_line(error)}") + "\n")
            sys.exit(error.exit_code)
        except KeyboardInterrupt as stop:  # before typer, which would call it "Aborted!", exit code 1
            from layerprobe.cli.settings import KEPT_IN

            _leave(stop, ctx.meta.get(KEPT_IN))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sys.stderr.write(wrapped(f"error: {error_line(NotAvailableError(NO_MEMORY))}") + "\n")
            sys.exit(1)
        except BrokenPipeError:
            # The reader of our stdout left (for example `| head`); nobody is there to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        finally:
            silence_notes(False)


def _ready_help(command: Command) -> None:
    """Give a command a help of two columns, which are wide enough at 80; typer's own table has six."""
    for inner in getattr(command, "commands", {}).values():
        _ready_help(inner)
    if not hasattr(command, "commands"):
        setattr(command, "format_help", functools.partial(_write_help, command))  # noqa: B010


def _write_help(command: Command, context: ClickContext, formatter: HelpFormatter) -> None:
    """Usage, what the command does, and its options by panel. Paragraphs flow; nothing in them is read as markup."""
    command.format_usage(context, formatter)
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    examples = [one.removeprefix("Example: ") for one in paragraphs if one.startswith("Example: ")]
    for paragraph in paragraphs:
        if not paragraph.startswith("Example: "):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(" ".join(paragraph.split()))
    panels: dict[str, list[tuple[str, str]]] = {}
    for one in command.get_params(context):
        if (record := one.get_help_record(context)) is not None:
            names, about = record
            panel = getattr(one, "rich_help_panel", None) or (
                "Options" if one.param_type_name == "option" else "Arguments"
            )
            panels.setdefault(panel, []).append((re.sub(r" (<[^>]+>|WORD|TEXT|PATH)$", "", names), about))
    for panel, rows in panels.items():
        with formatter.section(panel):
            formatter.write_dl(rows, col_max=26)
    for example in examples:
        formatter.write(f"\nExample:\n  {example}\n")


def _mistake_line(mistake: ClickException) -> str:
    """What click says of an option, a value or a command, and where to look."""
    text = " ".join(str(mistake.format_message()).split())
    context = getattr(mistake, "ctx", None)
    where = "layerprobe" if context is None else context.command_path
    return line_for_people(f"{text[:1].lower()}{text[1:].rstrip('.')}; see: {where} --help")


def _leave(stop: KeyboardInterrupt, folder: Path | None = None) -> NoReturn:
    """Say where the run is kept, if it has a folder, and how to continue it."""
    terminated = isinstance(stop, Terminated)
    where = f" in {folder}; the same command continues there" if folder else ""
    sys.stderr.write(
        wrapped(f"{'terminated' if terminated else 'interrupted'}; finished work is kept{where}") + "\n"
    )
    sys.exit(143 if terminated else 130)


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Slurm and Kubernetes send SIGTERM some seconds before they kill; what can be saved is saved."""

    def stop(signum: int, _frame: object) -> None:
        raise stopped_by(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    name="layerprobe",
    cls=Program,
    no_args_is_help=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find out which layers of a language-pretrained transformer already serve vision, and which to train.",
)


def _register() -> None:
    if app.registered_commands:  # a process may call main more than once, and every command slows the start
        return
    from layerprobe.cli import ls, plan

    for name in COMMANDS:
        function = name.replace("-", "_")
        app.command(name)(getattr(importlib.import_module(f"layerprobe.cli.{function}"), function))
    app.add_typer(plan.app, name="plan")
    app.add_typer(ls.app, name="ls")


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"layerprobe {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        sys.stdout.write(WELCOME)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that no encoding can print
            stream.reconfigure(errors="backslashreplace")
    try:
        _register()
        app(prog_name="layerprobe")
    except KeyboardInterrupt as stop:  # while the commands were imported
        _leave(stop)
