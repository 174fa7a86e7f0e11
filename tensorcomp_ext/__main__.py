"""``python -m tensorcomp_ext`` is the command ``tensorcomp``."""

from tensorcomp_ext.cli.main import app

if __name__ == "__main__":
    app(prog_name="tensorcomp")
