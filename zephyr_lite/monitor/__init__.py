"""What a person sees while a stage is trained: a live panel in a terminal, lines in a pipe, JSON for programs."""

from .show import Screen, open_screen

__all__ = ["Screen", "open_screen"]
