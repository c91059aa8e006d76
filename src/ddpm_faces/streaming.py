"""Former location of `ddpm_faces.data.stream`, kept for scripts that import it from here."""

from .data.stream import FaceStream, open_stream


__all__ = ["FaceStream", "open_stream"]
