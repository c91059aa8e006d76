"""The command `ddpm-faces`."""

from .app import app, main


__all__ = ["app", "main"]
