"""The command `python -m inductor_ce.bench`."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "tqdm"):
        raise
    sys.exit(f"the benchmark needs {error.name}: pip install 'inductor-ce[bench]'")

if __name__ == "__main__":
    sys.exit(main())
