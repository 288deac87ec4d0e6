"""``python -m gim``: the command line."""

from gim.cli import app

if __name__ == "__main__":
    app(prog_name="gim")
