"""Drop-ins for other libraries, each imported on use: ``fastgrpo.integrations.trl`` needs trl, and so on."""

import importlib

NAMES = ("liger", "transformers", "trl", "verl", "vllm")


def __getattr__(name):
    if name in NAMES:
        return importlib.import_module(f"fastgrpo.integrations.{name}")
    raise AttributeError(f"module 'fastgrpo.integrations' has no attribute {name!r}")
