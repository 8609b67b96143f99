"""The program `layerprobe`: the list of commands, and how errors leave it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from layerprobe import __version__
from layerprobe.errors import LayerprobeError, Terminated, stopped_by
from layerprobe.progress import error_line, silence_notes

COMMANDS = (
    "freeze-search", "worker", "bridge", "evaluate", "outliers", "compare", "features", "cka", "probe", "transfer",
    "attribute", "report", "env",
)  # fmt: skip
"""In the order of the help; each stands in the file of its name, in a function of its name."""


class Program(TyperGroup):
    """The command group. A known error becomes `error: …` on stderr and its exit code; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_like_ctrl_c():
                return super().invoke(ctx)
        except LayerprobeError as error:
            sys.stderr.write(f"error: {error_line(error)}\n")
            sys.exit(error.exit_code)
        except KeyboardInterrupt as stop:  # before typer, which would call it "Aborted!", exit code 1
            _leave(stop)
        except BrokenPipeError:
            # The reader of our stdout left (for example `| head`); nobody is there to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        finally:
            silence_notes(False)


def _leave(stop: KeyboardInterrupt) -> NoReturn:
    terminated = isinstance(stop, Terminated)
    sys.stderr.write(f"{'terminated' if terminated else 'interrupted'}; finished work is kept\n")
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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Find out which layers of a language-pretrained transformer already serve vision, and which to train.\n\n"
        "First steps:\n\n"
        "  layerprobe freeze-search --model minilm --task digits\n\n"
        "  layerprobe outliers --model llama-7b\n\n"
        "  layerprobe ls models"
    ),
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
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that no encoding can print
            stream.reconfigure(errors="backslashreplace")
    try:
        _register()
        app()
    except KeyboardInterrupt as stop:  # while the commands were imported
        _leave(stop)
