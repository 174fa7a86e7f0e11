"""``python -m benchmarks.run`` is ``tensorcomp bench`` from a source tree."""

from __future__ import annotations

import sys

from tensorcomp_ext.cli.main import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="tensorcomp")
