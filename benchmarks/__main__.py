"""Speed and memory against diffusers, with the same weights and inputs, and how far both are from the machine's limit.

    python -m stable_cascade_nodes.benchmarks [--cases NAME ...] [--repeats 5] [--json FILE]
    python -m stable_cascade_nodes.benchmarks --profile stage_c_lite_step
    python -m stable_cascade_nodes.benchmarks --table FILE

In a clone, from its root, `python -m benchmarks` does the same. It needs `pip install stable-cascade-nodes[benchmark]`.
On a CPU it runs in float32; where there is a GPU that torch can use, there and in bfloat16.

Each case builds both sides over the same random weights of the published shapes and first checks that their results
agree: where they do not, no speed is reported. Then both run in turns, and medians are compared. Peak memory is that of
one run beside what was there before it (GB of GB with weights and libraries). Every case, and the memory of either
side, has a process of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PACKAGE = "stable_cascade_nodes"


def _load_package() -> None:
    """Make the clone around this file the package, whatever its folder is called and whether or not it is installed."""
    root = Path(__file__).resolve().parents[1]
    # Run as a file, Python looks for modules beside it first; some are called as those of other packages.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)


def main(arguments: list[str] | None = None) -> int:
    if __package__ != f"{_PACKAGE}.benchmarks":
        _load_package()
    from stable_cascade_nodes.benchmarks.command import run

    return run(sys.argv[1:] if arguments is None else arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
