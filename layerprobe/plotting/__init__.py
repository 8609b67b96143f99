"""Frames in, matplotlib Axes out: `plot_x(frame, *, ax=None, **style) -> Axes`, one module a subject."""
