"""What starts, ships and checks the program: every path and command in those files exists."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mllm_demo.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


# Requirements


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_says_why_it_is_there(name):
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith(("#", "-r")):
            assert re.search(r"\s# \S+", line), line


def test_torch_is_bounded_to_the_releases_that_were_tried():
    torch = next(r for r in requirements("requirements.txt") if r.name == "torch")
    assert torch.specifier.contains("2.8.0") and torch.specifier.contains("2.13.0")
    assert not torch.specifier.contains("2.14.0")


def test_every_third_party_import_is_required():
    names = {"PIL": "pillow", "huggingface_hub": "huggingface_hub"}
    required = {r.name.replace("-", "_").lower() for r in requirements("requirements.txt")}
    imports = set()
    for path in [*(ROOT / "mllm_demo").rglob("*.py"), ROOT / "app.py"]:
        if "training" not in path.parts:
            imports.update(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    foreign = {name for name in imports if name not in sys.stdlib_module_names} - {"mllm_demo"}
    assert {names.get(name, name).lower() for name in foreign} <= required


# The Dockerfile


def test_everything_that_is_copied_into_the_image_exists():
    for instruction, arguments in instructions():
        if instruction == "COPY":
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            for source in sources:
                assert (ROOT / source).exists(), source


def test_nothing_that_the_image_needs_is_ignored():
    ignored = set((ROOT / ".dockerignore").read_text().split())
    for instruction, arguments in instructions():
        if instruction == "COPY":
            assert not ignored & set(arguments.replace("./", "").split())


def test_the_modules_and_files_that_the_image_runs_exist():
    text = (ROOT / "Dockerfile").read_text()
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert "mllm_demo.models.bundled.weights" in modules
    assert all(find_spec(module) for module in modules)
    assert dict(instructions())["CMD"] == '["python", "app.py"]'
    compile(re.search(r'"-c", "([^"]+)"', text)[1], "healthcheck", "exec")


def test_the_image_runs_as_a_user_and_listens_where_it_says():
    order = [instruction for instruction, _ in instructions()]
    found = dict(instructions())
    assert found["USER"] == "demo" and order.index("USER") < order.index("CMD")
    assert "--uid 1000" in (ROOT / "Dockerfile").read_text()
    environ = dict(pair.split("=", 1) for pair in found["ENV"].split())
    assert environ["MLLM_DEMO_HOST"] == "0.0.0.0"
    assert found["EXPOSE"] == environ["MLLM_DEMO_PORT"] == str(Settings().port)
    health = next(arguments for instruction, arguments in instructions() if instruction == "HEALTHCHECK")
    assert f"127.0.0.1:{Settings().port}/" in health


def test_the_image_bakes_the_weights_where_the_app_will_look():
    environ = dict(pair.split("=", 1) for pair in dict(instructions())["ENV"].split())
    assert environ["XDG_CACHE_HOME"] == "/home/demo/.cache"
    order = [f"{instruction} {arguments}" for instruction, arguments in instructions()]
    baked = next(i for i, line in enumerate(order) if "bundled.weights" in line)
    assert order.index("USER demo") < baked, "baked as root, the cache could not be written at run time"


def test_the_image_has_a_python_that_is_supported():
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", dict(instructions())["FROM"])[1]
    assert Version("3.10") <= Version(version) <= Version("3.13")


# make and CI


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_make_knows_what_to_do(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"\b(?:sh|python) ((?:tests/)?\w+\.(?:sh|py))", done.stdout):
        assert (ROOT / script).exists(), script


def test_shell_scripts_are_well_formed():
    for script, shell in ((".ci/run", "bash"), ("tests/install_browser.sh", "sh")):
        assert subprocess.run([shell, "-n", str(ROOT / script)]).returncode == 0


def test_ci_runs_the_test_command():
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] == "make test"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
