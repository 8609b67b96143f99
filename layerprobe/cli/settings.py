"""The settings of a call: read from a file (`--config`), kept in the run folder, compared with those of other runs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import CallbackParam, Context

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError, did_you_mean
from layerprobe.files import read_yaml, write_text
from layerprobe.reading import is_there

if TYPE_CHECKING:  # typer keeps a click of its own
    from typer._click.core import Parameter

SETTINGS_FILE = "settings.yaml"
KEPT_IN = "layerprobe.kept_in"
"""Entry of a context's `meta`: the folder in which the same command would continue."""
MAX_BYTES = 1 << 20
RUNS = Path("runs")
NOT_KEPT = {"config", "output", "json", "dry-run", "quiet", "help", "storage"}
"""Where the result goes, and an address that may hold a password."""
MAY_DIFFER = {
    "device", "workers", "threads", "decode-workers", "keep-decoded", "offline", "trust-remote-code", "self-check",
    "trackers", "checkpoint-every", "keep", "compile", "cache-dir", "keep-bridge",
}  # fmt: skip
"""Options that change how a run is computed, or what is kept of it, and not which run it is."""


class Call:
    """The options of one call of a command, as its context holds them once they are parsed."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @property
    def command(self) -> str:
        return str(self._context.command.name)

    def settings(self) -> dict[str, Any]:
        """Every option that has a value, by the name of its flag."""
        found = {}
        for parameter in self._context.command.params:
            value = self._context.params.get(str(parameter.name))
            name = option_name(parameter)
            if name not in NOT_KEPT and value is not None and value != []:
                found[name] = _plain(value)
        if "named-model" in found:
            found["model"] = found.pop("named-model")
        return found

    def keeps(self, folder: Path) -> None:
        """From now on the run can be continued from `folder`."""
        self._context.meta[KEPT_IN] = folder

    def write(self, folder: Path) -> None:
        """Keep the settings in `folder`, so that `--config` repeats the run."""
        import yaml

        from layerprobe.provenance import without_secrets

        path = folder / SETTINGS_FILE
        kept = {"command": self.command, **without_secrets(self.settings())}
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        write_text(path, f"# Repeat this run with: layerprobe {self.command} --config FILE\n{text}")

    def free_folder(self, model: str, task: str, *, may_differ: Collection[str] = ()) -> Path:
        """`runs/<command>-<model>-<task>`, or the first with a number behind it that is free or holds this very run."""
        name = "-".join((self.command, _slug(model), _slug(task)))
        number = 1
        while True:
            folder = RUNS / (name if number == 1 else f"{name}-{number}")
            if self._may_use(folder, {*MAY_DIFFER, *may_differ}):
                return folder
            number += 1

    def _may_use(self, folder: Path, may_differ: Collection[str]) -> bool:
        if not is_there(folder):
            _check_writable(folder)
            return True
        if not folder.is_dir():
            return False
        path = folder / SETTINGS_FILE
        if not is_there(path):
            return all(entry.name.startswith(".") for entry in folder.iterdir())
        try:
            there = read_settings(path)
        except BrokenFileError:  # whatever lies there, it is not this run
            return False
        from layerprobe.provenance import without_secrets

        here = {"command": self.command, **without_secrets(self.settings())}
        return all(here.get(key) == there.get(key) for key in {*here, *there}.difference(may_differ))


def use_config(context: Context, parameter: CallbackParam, path: str | None) -> Call:
    """What `--config FILE` does: its entries stand in for options that the command line leaves out."""
    if path is not None and not context.resilient_parsing:
        given = read_settings(Path(path))
        command = given.pop("command", context.command.name)
        if command != context.command.name:
            raise UsageError(
                f"{path} holds the settings of '{command}', not of '{context.command.name}'; "
                f"try: layerprobe {command} --config {path}"
            )
        known = {option_name(one): one for one in context.command.params}
        defaults = {}
        for name, value in given.items():
            if name not in known or name in NOT_KEPT - {"storage"}:
                names = sorted(known.keys() - NOT_KEPT)
                raise UnknownNameError(
                    f"{path}: '{context.command.name}' has no option '{name}'.{did_you_mean(name, names)} "
                    f"See: layerprobe {context.command.name} --help"
                )
            repeated = getattr(known[name], "multiple", False) or getattr(known[name], "nargs", 1) != 1
            listed = isinstance(value, list) and not repeated
            defaults[str(known[name].name)] = ",".join(map(str, value)) if listed else value
        context.default_map = {**(context.default_map or {}), **defaults}
    return Call(context)


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of a file of settings.

    Raises
    ------
    UsageError
        There is no such file.
    BrokenFileError
        It is no YAML of option names with values.
    """
    if not is_there(path):
        raise UsageError(f"there is no file of settings {path}; every run folder holds a {SETTINGS_FILE}")
    found = read_yaml(path, what="file of settings", max_bytes=MAX_BYTES)
    values = found.values() if isinstance(found, dict) else [{}]
    if not all(isinstance(one, (str, int, float, bool, list, type(None))) for one in values):
        raise BrokenFileError(
            f"{path} holds no settings; write one option and its value a line, such as steps: 200"
        )
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items() if value is not None}


def option_name(parameter: Parameter) -> str:
    """The name by which a user knows an option: its long flag without dashes.

    >>> from types import SimpleNamespace
    >>> option_name(SimpleNamespace(name="as_json", opts=["-j", "--json"]))
    'json'
    """
    long = [name for name in parameter.opts if name.startswith("--")]
    return long[0][2:] if long else str(parameter.name).replace("_", "-")


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _slug(name: str) -> str:
    """A part of a folder's name from an alias, a hub id or a path.

    >>> _slug("sentence-transformers/all-MiniLM-L6-v2"), _slug("../data/cats & dogs/")
    ('all-MiniLM-L6-v2', 'cats-dogs')
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(name).name).strip("-.") or "x"


def _check_writable(folder: Path) -> None:
    above = next(place for place in folder.absolute().parents if place.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(f"cannot make {folder}: {above} is not writable; name another folder with --output")
