"""The database of a search: its address, its connection, and retries when it does not answer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy
from alembic.util import CommandError
from optuna.exceptions import OptunaError, StorageInternalError
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from layerprobe.errors import (
    BrokenFileError,
    LayerprobeError,
    NotAvailableError,
    UsageError,
    first_line,
    shortened,
)
from layerprobe.progress import note
from layerprobe.provenance import without_secrets

STUDY = "layerprobe freeze-search"
HEARTBEAT_SECONDS = 10
RECONNECT_SECONDS = 300.0
"""How long a database that does not answer is waited for, as when a server is restarted."""
LONGEST_PAUSE = 15.0

DAMAGED = (TypeError, ValueError, LookupError, AssertionError)
"""What optuna raises of tables that hold what it did not write there."""
STORAGE_ERRORS = (SQLAlchemyError, OptunaError, CommandError, RuntimeError, OSError, *DAMAGED)
"""What a database that cannot be used raises: SQLAlchemy, optuna and its schema tool alembic; plain errors
for tables of another optuna version (RuntimeError), a malformed URL (ValueError) and a socket (OSError)."""

P = ParamSpec("P")
R = TypeVar("R")

_CALLS = ("_get_trials", "get_all_trials", "create_new_trial", "set_trial_state_values", "set_trial_user_attr",
          "get_study_user_attrs", "set_study_user_attr")  # fmt: skip
_FULL = ("full", "no space left")
_FOR_GOOD = ("readonly", "read-only", "disk i/o error", "malformed", "not a database", "could not decode")
_retries_off = False
DATABASE = "study.db"
"""The database in a run folder."""


def storage_url(url: str | os.PathLike[str]) -> str:
    """A SQLAlchemy URL: paths become SQLite files, postgresql:// takes the psycopg 3 driver."""
    text = os.fspath(url)
    if "://" not in text:  # `%` and `?` mean something in a URL, so the path is not pasted into one
        return str(sqlalchemy.URL.create("sqlite", database=str(Path(text).absolute())))
    for prefix in ("postgresql://", "postgres://"):
        if text.startswith(prefix):
            return "postgresql+psycopg://" + text.removeprefix(prefix)
    return text


def hide_password(url: str) -> str:
    """The URL as it may be shown: an SQLite file's path, anything else without its password."""
    if url.startswith("sqlite:///"):
        return sqlalchemy.make_url(url).database or ":memory:"
    return without_secrets(url)


def with_retry(call: Callable[P, R], shown: str) -> Callable[P, R]:
    """`call`, tried again for five minutes, at growing intervals, while the database does not answer.

    What is written to a search may be written twice: trials with one key count once, and a claim that was made but not
    heard of is found out by its heartbeat. Waiting goes by a clock that does not jump.

    Raises
    ------
    LayerprobeError
        The disk is full, or the database cannot be written; at once.
    NotAvailableError
        It did not answer in that time.
    """

    @functools.wraps(call)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        began, pause = time.monotonic(), 0.5
        while True:
            try:
                return call(*args, **kwargs)
            except (SQLAlchemyError, StorageInternalError) as error:
                reason = shortened(without_secrets(root_cause(error)), 120)
                full = any(word in reason.lower() for word in _FULL)
                if full or any(word in reason.lower() for word in _FOR_GOOD):
                    why = "the disk is full" if full else reason
                    raise LayerprobeError(
                        f"storage {shown} cannot be written: {why}; finished trainings are kept, and the same command "
                        "continues"
                    ) from error
                if not _may_pass(error) or _retries_off:
                    raise
                waited = time.monotonic() - began
                if waited > RECONNECT_SECONDS:
                    raise NotAvailableError(
                        f"storage {shown} has not answered for {waited / 60:.0f} minutes: {reason}; finished trainings "
                        "are kept, and the same command continues"
                    ) from error
                if pause == 0.5:
                    note(
                        f"storage {shown} does not answer ({reason}); trying again for {RECONNECT_SECONDS / 60:.0f} min"
                    )
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    return tried


@contextmanager
def no_retry() -> Iterator[None]:
    """Within: nothing is waited for, since the process is about to end."""
    global _retries_off
    _retries_off = True
    try:
        yield
    finally:
        _retries_off = False


@contextmanager
def damage_named(*more: type[Exception]) -> Iterator[None]:
    """Within: what optuna raises of a damaged database, and `more`, is a BrokenFileError."""
    caught: tuple[type[Exception], ...] = (*DAMAGED, *more)
    try:
        yield
    except LayerprobeError:
        raise
    except caught as error:
        raise BrokenFileError(
            f"cannot read the search's database: {shortened(root_cause(error), 120)}"
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether an error comes from the connection or a lock, and not from what was asked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, DBAPIError) and not isinstance(cause, IntegrityError)


def heartbeats(storage: optuna.storages.RDBStorage) -> dict[int, object]:
    """The last heartbeat of every trial that has one, by the database's number of the trial."""
    query = sqlalchemy.text("SELECT trial_id, heartbeat FROM trial_heartbeats")
    with contextlib.suppress(*STORAGE_ERRORS), storage.engine.connect() as connection:
        return {int(row[0]): row[1] for row in connection.execute(query)}
    return {}


def connect(url: str | os.PathLike[str]) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
    """The storage at a URL or path and its study, created where need be; trials wait for it where it does not answer.

    Raises
    ------
    NotAvailableError
        The database cannot be used, or its driver is not installed.
    UsageError
        It holds another study.
    """
    url = storage_url(url)
    shown = hide_password(url)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in itertools.count():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(
                    url.replace("{", "{{").replace("}", "}}"),  # optuna takes the URL for a template
                    engine_kwargs=engine,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                )
                if url.startswith("sqlite"):
                    _one_writer(storage.engine)
                study = optuna.create_study(
                    study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True
                )
            others = [name for name in optuna.get_all_study_names(storage) if name != STUDY]
            if others:
                raise UsageError(
                    f"storage {shown} already holds another optuna study ('{others[0]}'); "
                    "give each search its own database"
                )
            for name in _CALLS:
                setattr(storage, name, with_retry(getattr(storage, name), shown))
            return storage, study
        except LayerprobeError:
            raise
        except ImportError as error:
            raise NotAvailableError(
                f"storage {shown} needs a driver that is not installed ({error.name}); "
                "for PostgreSQL: pip install 'layerprobe[postgres]'"
            ) from error
        except STORAGE_ERRORS as error:
            # Two processes that create the tables of a new database at once get in each other's way once.
            if attempt == 4 or not url.startswith(("sqlite", "postgresql")) or _unreachable(url):
                raise NotAvailableError(f"storage {shown} cannot be used: {root_cause(error)}") from error
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError  # not reached: the loop has no end


def _one_writer(engine: sqlalchemy.Engine) -> None:
    """Let every transaction on an SQLite file lock it from its start.

    By default Python's driver begins a transaction at the first write, so that two processes may both read
    that a trial waits before either marks it as running. PostgreSQL locks the row that is read for update.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before have not heard of it


def _unreachable(url: str) -> bool:
    try:
        with sqlalchemy.create_engine(url).connect():
            return False
    except STORAGE_ERRORS:
        return True


def root_cause(error: BaseException) -> str:
    """What the error at the bottom of a chain says, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
