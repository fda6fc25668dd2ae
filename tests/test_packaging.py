"""What an installation holds, and that the repository's folders shadow nothing."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {p.name for p in (ROOT / "kernels").glob("*.py")}
MEASURED = {f"measured/{p.name}" for p in (ROOT / "kernels" / "measured").glob("*.json")} | {"measured/some-gpu.json"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    copy_sources(source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def copy_sources(target):
    """The tree without build leftovers, so that a stale build/ cannot hide a missing file."""
    import shutil

    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("fastgrpo", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    measured = target / "kernels" / "measured"
    measured.mkdir(exist_ok=True)
    for name in ("some-gpu.json", "some-gpu.jsonl"):  # tiles are shipped, the rows they come from are not
        (measured / name).write_text("{}")


def run_python(code, cwd, path=None):
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastgrpo"}
    assert {n.removeprefix("fastgrpo/kernels/") for n in names if n.startswith("fastgrpo/kernels/")} == (
        KERNELS | MEASURED
    )
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        relative = path.relative_to(ROOT).as_posix()
        assert relative in names or relative == "fastgrpo/kernels/__init__.py", relative
    presets = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgrpo/trainer/presets").glob("*.yaml")]
    assert len(presets) > 3
    assert set(presets) <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "fastgrpo/py.typed" in names


def test_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import fastgrpo, torch; print(fastgrpo.__file__); import fastgrpo.kernels.tiles as t; print(t.__file__);"
        "h=torch.randn(3,4); print(fastgrpo.linear_logprobs(h, torch.randn(5,4), torch.arange(3)).logprobs.shape)"
    )
    done = run_python(code, tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "site/fastgrpo/__init__.py"), str(tmp_path / "site/fastgrpo/kernels/tiles.py"), "torch.Size([3])"
    ]  # fmt: skip


def test_the_repository_root_finds_the_kernels_and_shadows_nothing(tmp_path):
    """A top-level package named ``kernels`` would shadow Hugging Face's, and transformers load no model."""
    code = (
        "from transformers import AutoModelForCausalLM, Qwen2Config;"
        "c = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        " num_attention_heads=1, num_key_value_heads=1);"
        f"AutoModelForCausalLM.from_config(c).save_pretrained({str(tmp_path)!r});"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__);"
        "import fastgrpo.kernels.tiles as t; print(t.__file__)"
    )
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Qwen2ForCausalLM", str(ROOT / "kernels" / "tiles.py")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_op_imports_nothing_optional():
    """The library runs where triton, accelerate, trl, transformers, rich and matplotlib are absent."""
    code = (
        "import sys\n"
        "for name in ('triton', 'accelerate', 'trl', 'transformers', 'rich', 'matplotlib', 'datasets', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "import torch, fastgrpo\n"
        "h, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "r = fastgrpo.grpo_loss(h, w, torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -1.0]))\n"
        "r.loss.backward(); print(h.grad.abs().sum().item() > 0)"
    )
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@pytest.mark.quick
def test_pinned_requirements_cover_what_the_project_declares():
    import re

    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split("[=;]", line)[0].lower().replace("_", "-")
              for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    wanted += project["optional-dependencies"]["train"]
    for name in (re.split("[<>=;\\[ ]", w)[0].lower() for w in wanted):
        assert name in pinned, name


@pytest.mark.quick
def test_version_stands_in_one_number():
    import tomllib

    import fastgrpo

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fastgrpo.__version__
