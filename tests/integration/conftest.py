"""Fixtures of this folder."""

from postgres_server import postgres, postgres_server

__all__ = ["postgres", "postgres_server"]
