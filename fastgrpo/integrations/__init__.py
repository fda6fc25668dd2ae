"""Drop-ins for other libraries, each imported on use: ``fastgrpo.integrations.trl`` needs trl, and so on."""

import importlib
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "verl_patch"))


def __getattr__(name):
    if name in NAMES:
        return importlib.import_module(f"fastgrpo.integrations.{name}")
    raise AttributeError(f"module 'fastgrpo.integrations' has no attribute {name!r}")
