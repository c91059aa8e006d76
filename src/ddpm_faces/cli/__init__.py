"""The command `ddpm-faces`."""

from ..interruption import handle_interrupts


def main() -> None:
    handle_interrupts()  # before the imports, which take a moment
    from .app import main as run

    run()
