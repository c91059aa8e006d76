"""Commands for the demo: run it on this machine, or publish it as a Space."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Private, report


if TYPE_CHECKING:
    from PIL import Image

SHIPPED_MODEL = Path(__file__).parents[3] / "models" / "faces64"  # exists in a clone, not in a wheel


def demo(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model, or USER/NAME (default: models/faces64, in a clone).")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 serves on all networks of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also open a public link through Gradio.")] = False,
) -> None:
    """Open a web page that generates faces, walks between them, restores them and changes them."""
    from ..models import check_model

    if model is None:
        if not SHIPPED_MODEL.is_dir():
            raise ValueError(
                "`model` must be given: the folder of a model, or USER/NAME on the Hub. Only a clone of the "
                "repository ships one."
            )
        model = str(SHIPPED_MODEL)
    check_model(model)
    check_port(host, port)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError('The demo needs gradio: run `pip install "ddpm-faces[demo]"`.') from error
    from ..demo.app import FaceChanger, FaceMaker, launch
    from ..editing_ddpm_faces import DDPMFacesEditPipeline
    from ..models import load_pipeline, model_name
    from ..restoration_ddpm_faces import DDPMFacesRestorePipeline

    maker = FaceMaker(load_pipeline(model), model_name(model))
    restorer = DDPMFacesRestorePipeline.from_pipe(load_pipeline(model))
    editor = DDPMFacesEditPipeline.from_pipe(load_pipeline(model))
    page = launch(
        FaceChanger(maker, restorer, editor, face_finder()),
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    typer.echo(f"The demo is at {page.local_url} and stops with Ctrl-C.")
    if page.share_url:
        typer.echo(f"Anybody can open it at {page.share_url}")
    page.block_thread()


def face_finder() -> "Callable[[Image.Image], Image.Image | None] | None":
    """Return a function that cuts the largest face out of a photo, if the detector is installed."""
    from ..data.alignment import MIN_SCORE, find_frames
    from ..data.detection import MTCNN
    from ..demo.changer import CANVAS

    try:
        detector = MTCNN()
    except ImportError:
        return None

    def find(photo: "Image.Image") -> "Image.Image | None":
        likely = [frame for frame in find_frames(photo, detector) if frame.score >= MIN_SCORE]
        return likely[0].cut(photo, CANVAS) if likely else None

    return find


def check_port(host: str, port: int) -> None:
    """Raise a `ValueError` if no server can listen on this address."""
    wrong_host = f"`host` must be an address of this machine, such as 127.0.0.1, got {host!r}."
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as server:
            if os.name == "posix":  # on Windows, it would allow two programs on one port
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen()
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(wrong_host) from error
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            raise ValueError(wrong_host) from error
        if error.errno == errno.EACCES:
            raise ValueError(f"`port` {port} needs administrator rights: choose a port above 1023.") from error
        raise ValueError(
            f"`port` {port} cannot be used on {host} ({error.strerror}): stop the program that uses it, or choose "
            f"another one, such as --port {port % 65535 + 1}."
        ) from error


def push_space(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="USER/NAME of a published model.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Space to publish.")],
    private: Private = None,
    title: Annotated[str | None, typer.Option(help="Title of the Space (default: its name).")] = None,
    as_json: Json = False,
) -> None:
    """Publish the demo of a model as a Space on the Hub."""
    from ..hub.space import push_space

    space = push_space(model, repo_id, private=private, title=title)
    text = f"Published: {space.commit}\nThe Space builds for some minutes and then runs at {space.url}"
    if space.needs_token:
        text += f"\n{model} is private: add a token with read access as the secret HF_TOKEN in {space.url}/settings"
    report({"commit": str(space.commit), "url": space.url, "needs_token": space.needs_token}, text, as_json)
