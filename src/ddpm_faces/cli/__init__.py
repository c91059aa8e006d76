"""The command `ddpm-faces`."""

from .app import main


__all__ = ["main"]
