"""The command `tworoads`."""

import sys


def main() -> None:
    """Run the command line; without its libraries say how to get them.

    They are an extra: the services are the same package, and an image of one holds nothing that
    writes to a terminal.
    """
    try:
        from clients.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit("Error: the command has libraries of its own: pip install 'tworoads[clients]'")
    app.main()
