"""What nobody asked for is not printed: no library's warnings beside the help or an import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("bitsandbytes", "peft", "accelerate", "rich", "matplotlib"):
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parents[1]
# Warns when bitsandbytes is imported, as it does on some CPUs: of its own accord it may be silent here.
NOISY = """
import logging, pathlib, sys

class Noise:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            pathlib.Path(__file__).with_name("heard").write_text("yes")
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load kernels")

sys.meta_path.insert(0, Noise())
"""
HELP = "import sys; from fastgrpo.trainer.cli import main; sys.argv[1:] = ['train', '--help']; main()"
AFTERWARDS = (
    "from fastgrpo.trainer import GRPOConfig, GRPOTrainer;"
    "import logging; logging.getLogger('bitsandbytes').warning('mine')"
)


def run(folder, code):
    (folder / "sitecustomize.py").write_text(NOISY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert (folder / "heard").is_file()
    return done


def test_nothing_but_the_help_that_was_asked_for(tmp_path):
    done = run(tmp_path, HELP)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: fastgrpo train CONFIG")


def test_the_noise_can_be_heard(tmp_path):
    assert "Failed to load kernels" in run(tmp_path, "import bitsandbytes").stderr


def test_nothing_of_an_import_but_later_warnings_are_heard(tmp_path):
    done = run(tmp_path, AFTERWARDS)
    assert done.stdout == ""
    assert done.stderr == "mine\n"
