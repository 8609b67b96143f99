"""A PostgreSQL server for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


def server_programs() -> Path | None:
    """The folder of initdb and pg_ctl: the newest of Debian's, which are not on the path, or the path's."""
    debian = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if debian:
        return max(debian, key=lambda folder: float(folder.parent.name))
    found = shutil.which("initdb")
    return Path(found).parent if found else None


class Server(NamedTuple):
    """A PostgreSQL server of a test: its URL, and how it is stopped and started."""

    url: str
    stop: Callable[[], None]
    start: Callable[[], None]


@pytest.fixture
def postgres(postgres_server: Server) -> str:
    return postgres_server.url


@pytest.fixture
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL server of its own, stopped again in the end."""
    pytest.importorskip("psycopg", reason="needs psycopg (pip install 'layerprobe[postgres]')")
    programs = server_programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL server (package postgresql)")
    as_user: list[str] = []
    if os.geteuid() == 0:
        # The server refuses to run as root.
        users = [
            user
            for user in ("postgres", "nobody")
            if not subprocess.run(["id", user], capture_output=True).returncode
        ]
        if not shutil.which("runuser") or not users:
            pytest.skip("runs as root and there is no other user to run the server as")
        as_user = ["runuser", "-u", users[0], "--"]
    # Not under tmp_path: pytest keeps its folders closed to other users, and the server may be one.
    folder = Path(tempfile.mkdtemp(prefix="layerprobe-postgres-"))
    if as_user:
        shutil.chown(folder, users[0])

    def run(program: str, *arguments: str) -> None:
        # Into a file: a pipe would stay open as long as the server that pg_ctl starts.
        with (folder / "output").open("w+") as output:
            command = [*as_user, str(programs / program), "-D", str(folder / "data"), *arguments]
            code = subprocess.run(command, stdout=output, stderr=output, cwd=folder).returncode
            output.seek(0)
            assert code == 0, f"{program} failed: {output.read()}"

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start_server() -> None:
        run("pg_ctl", "-w", "-t", "120", "-l", str(folder / "server.log"), "-o", options, "start")

    def stop_server() -> None:
        run("pg_ctl", "-w", "-m", "immediate", "stop")

    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        run("initdb", "-U", "search", "--auth=trust", "--no-sync", "--locale=C", "--encoding=UTF8")
        start_server()
        try:
            yield Server(f"postgresql://search@127.0.0.1:{port}/postgres", stop_server, start_server)
        finally:
            stop_server()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
