"""Freeze search: which blocks to train, valued by the real chain."""
