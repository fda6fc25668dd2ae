"""What an installation holds, and that the repository's folders shadow nothing."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastgrpo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    """What git has or is to have: neither a stale build/ nor an empty folder can hide a missing file."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "fastgrpo", "kernels")
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *files):
        if (ROOT / name).is_file():  # not deleted since
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    measured = target / "kernels" / "measured"
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


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """Python of an environment with the wheel installed; what it depends on is found where it is here."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, cwd=folder, env={"PATH": "/usr/bin:/bin"})
    # a path beside, whose own .pth files (such as that of an editable fastgrpo) are not read
    next(folder.glob("lib/python*/site-packages")).joinpath("beside.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_installed_wheel_runs_the_op(fresh, tmp_path):
    """In a fresh environment: against the reference, with the version it says, the kernels beside it, its command."""
    code = "import sys, fastgrpo.env as e; import fastgrpo.kernels.tiles as t; print(t.__file__); sys.exit(e.main())"
    done = subprocess.run(
        [fresh, "-c", code], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    site = next(fresh.parents[1].glob("lib/python*/site-packages"))
    kernels, first, *_ = done.stdout.splitlines()
    assert kernels == str(site / "fastgrpo/kernels/tiles.py")
    assert first.split() == ["fastgrpo", fastgrpo.__version__, "in", str(site / "fastgrpo")]
    assert done.stdout.count("passed in") == 2
    assert (fresh.parent / "fastgrpo").is_file()
    assert (site / f"fastgrpo-{fastgrpo.__version__}.dist-info").is_dir()


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


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.quick
def test_pinned_requirements_cover_what_the_project_declares():
    pinned = {re.split("[=;]", line)[0].lower().replace("_", "-")
              for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["test"], *extras["train"]]
    for name in (re.split("[<>=;\\[ ]", w)[0].lower() for w in wanted):
        assert name in pinned, name


@pytest.mark.quick
def test_version_stands_in_one_place():
    """In fastgrpo/__init__.py: nothing else that is installed or read by people as the version says another."""
    assert "version" not in project()
    assert project()["dynamic"] == ["version"]
    assert re.search(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == fastgrpo.__version__
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


@pytest.mark.quick
def test_tools_have_one_version():
    """pre-commit's ruff is that of ``make lint``."""
    (hook,) = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"ruff=={hook}\n" in (ROOT / "requirements.txt").read_text()


@pytest.mark.quick
def test_project_files_are_what_their_readers_expect():
    yaml = pytest.importorskip("yaml")
    forms = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))]
    bug = next(form for form in forms if form.get("name", "").startswith("Bug"))
    assert any("python -m fastgrpo.env" in json.dumps(field) for field in bug["body"] if field["type"] == "textarea")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert any(".ci/run" in step for step in steps)
    rows = [row for job in jobs.values() for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
    assert {(row["python"], row["pinned"]) for row in rows} == {("3.10", "no"), ("3.12", "yes")}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors", "license"} <= citation.keys()
    assert citation["license"] == project()["license"]
