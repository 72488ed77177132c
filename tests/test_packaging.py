"""The package as it is laid out, built, documented and checked."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigen.weights import bundled
from tests import conftest
from tests.command_line import ROOT, make_bundled

packaging = pytest.importorskip("packaging.requirements")

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for requirement in map(packaging.Requirement, PROJECT["dependencies"])
}
CONSTRAINTS = [
    packaging.Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
# Names that only exist below `minigen.`: a top-level `kernels` is another, well-known package.
BELOW_MINIGEN = {"kernels", "weights"}


def sources() -> list[Path]:
    """Every Python file once: not again through the links."""
    top = ("kernels", "minigen", "tests", "tools", "weights")
    return sorted(
        Path(folder, file)
        for name in top
        for folder, _, files in os.walk(ROOT / name)
        for file in files
        if file.endswith(".py")
    )


def python(code: str, *flags: str, **options) -> str:
    options = {"cwd": ROOT, **options}
    finished = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


# --- names ---------------------------------------------------------------------------------------


def top_level_imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_sources_import_kernels_and_weights_below_minigen() -> None:
    assert top_level_imports("import a\nimport kernels.cpu\nfrom weights.x import y") == {
        "a",
        *BELOW_MINIGEN,
    }
    files = sources()
    assert ROOT / "kernels" / "cpu.py" in files
    wrong = [str(f) for f in files if top_level_imports(f.read_text("utf-8")) & BELOW_MINIGEN]
    assert not wrong


def test_importing_all_of_minigen_loads_no_top_level_kernels() -> None:
    loaded = python(
        "import importlib, pkgutil, sys, minigen\n"
        "for module in pkgutil.walk_packages(minigen.__path__, 'minigen.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sys.modules)"
    ).split()
    assert {"minigen.kernels.cpu", "minigen.weights.checkpoint", "minigen.chat"} <= set(loaded)
    assert not BELOW_MINIGEN & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize("first", ["transformers", "minigen.kernels"])
def test_transformers_and_minigen_share_a_process(first) -> None:
    """Run from the root, where transformers finds a top-level `kernels` that is not its own."""
    pytest.importorskip("transformers")
    second = {"transformers": "minigen.kernels", "minigen.kernels": "transformers"}[first]
    told = python(
        f"import {first}, {second}, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available(), torch.ops.minigen.varlen_attention.default.name())"
    )
    assert told.split() == [str(_has("kernels")), "minigen::varlen_attention"]


def _has(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except ModuleNotFoundError:
        return False


def test_links_are_relative_and_stay_inside() -> None:
    links = [
        Path(folder, name)
        for top in ("kernels", "minigen", "tests", "tools", "weights", ".ci")
        for folder, folders, files in os.walk(ROOT / top)
        for name in [*folders, *files]
        if Path(folder, name).is_symlink()
    ]
    assert {ROOT / "minigen" / "kernels", ROOT / "minigen" / "weights"} <= set(links)
    for link in links:
        assert not link.readlink().is_absolute()
        assert link.resolve(strict=True).is_relative_to(ROOT)


def test_help_does_not_load_torch() -> None:
    told = python(
        "import runpy, sys\n"
        "sys.argv = ['minigen', '--help']\n"
        "try:\n"
        "    runpy.run_module('minigen', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('exit', end.code)\n"
        "print('torch' in sys.modules)"
    )
    assert "usage: python -m minigen" in told
    assert told.split()[-3:] == ["exit", "0", "False"]


# --- distributions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is built: builds leave files beside their sources.

    A tiny model stands in for the bundled one, which need not be there and would be copied often.
    """
    copy = tmp_path_factory.mktemp("tree")
    copy_tree(copy)
    make_bundled(copy / "weights" / bundled.NAME)
    return copy


def copy_tree(copy: Path) -> None:
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("kernels", "minigen", "weights"):
        ignore = shutil.ignore_patterns("__pycache__", bundled.NAME)
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    assert (copy / "minigen" / "kernels").is_symlink()


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    target = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(tree)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    [built] = target.glob("minigen-*.whl")
    return built


def build(kind: str, tree: Path, target: Path) -> Path:
    """What setuptools builds of a tree: a "wheel", an "sdist" or an "editable" wheel."""
    pytest.importorskip("setuptools", minversion="77")
    target.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    python(code, cwd=tree)
    [built] = target.iterdir()
    return built


def modules_of(root: Path) -> set[str]:
    """`minigen/cli.py`, `minigen/kernels/cpu.py`, … as the links show them."""
    return {
        str(Path("minigen", *prefix, file.name))
        for folder, prefix in (
            ("minigen", ()),
            ("kernels", ("kernels",)),
            ("weights", ("weights",)),
        )
        for file in (root / folder).iterdir()
        if file.suffix in (".py", ".cpp")
    }


def test_wheel_holds_each_module_below_minigen(tree, wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"minigen/kernels/paged_attention.py", "minigen/kernels/native.cpp"} <= modules_of(tree)
    assert modules_of(tree) <= names
    assert {name.partition("/")[0] for name in names} == {
        "minigen",
        f"minigen-{PROJECT['version']}.dist-info",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_unpacked_wheel_imports_elsewhere(wheel, tmp_path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    told = python(
        "import importlib.util, minigen.kernels, minigen.weights.checkpoint\n"
        "print(minigen.kernels.__file__, importlib.util.find_spec('weights'))",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert told.split() == [str(tmp_path / "site/minigen/kernels/__init__.py"), "None"]


def test_sdist_holds_each_module(tree, tmp_path) -> None:
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert modules_of(tree) <= names
    assert files_of_model(tree) <= names


def files_of_model(tree: Path) -> set[str]:
    """`minigen/weights/minichat-11m/config.json`, … as an installation has them."""
    model = tree / "weights" / bundled.NAME
    files = {f"minigen/weights/{bundled.NAME}/{file.name}" for file in model.iterdir()}
    assert len(files) >= len(bundled.FILES) + 3  # an index, two shards
    return files


def test_wheel_carries_the_model_and_serves_it(tree, wheel, tmp_path) -> None:
    assert files_of_model(tree) <= set(zipfile.ZipFile(wheel).namelist())
    site = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    options = ["--compile", "eager", "--device", "cpu", "--temperature", "0", "--ignore-eos"]
    arguments = ["generate", "--prompt", "Once upon a time", "--max-tokens", "8", *options]
    finished = subprocess.run(
        [sys.executable, "-m", "minigen", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout == continuation(tree / "weights" / bundled.NAME) + "\n"


def continuation(model: Path) -> str:
    from minigen import LLM, SamplingParams

    llm = LLM(model, compile="eager", device="cpu", progress=False)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return llm.generate("Once upon a time", params, progress=False)[0].outputs[0].text


def test_editable_installation_finds_the_model(tree, tmp_path) -> None:
    with zipfile.ZipFile(build("editable", tree, tmp_path / "editable")) as file:
        file.extractall(tmp_path / "site")
    # -S: what this environment has installed in the same way would be found first.
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    told = python(
        f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r}); sys.path += {packages}\n"
        "from minigen.weights.bundled import bundled_model\n"
        "print(bundled_model().resolve())",
        "-S",
        cwd=tmp_path,
    )
    assert Path(told.strip()) == (tree / "weights" / bundled.NAME).resolve()


def test_wheel_without_the_model_builds_and_says_so(tmp_path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_tree(tree)
    with zipfile.ZipFile(build("wheel", tree, tmp_path / "wheel")) as file:
        assert modules_of(tree) <= set(file.namelist())
        file.extractall(tmp_path / "site")
    told = python(
        "from minigen.weights.bundled import bundled_model\n"
        "try:\n    bundled_model()\nexcept ValueError as error:\n    print(error)",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert "carries no model of its own" in told


def test_git_ignores_no_file_of_the_model() -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = [*bundled.FILES, "README.md", "model.safetensors.index.json", *shards]
    files = [f"weights/{bundled.NAME}/{name}" for name in names]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")

    def ignored(names: list[str]) -> list[str]:
        # Only the rules of the project: a user may ignore what they like.
        options = ["-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index"]
        finished = subprocess.run(
            ["git", *options, *names], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return finished.stdout.split()

    assert ignored(["build/x", *files]) == ["build/x"]


# --- versions ------------------------------------------------------------------------------------


def test_pins_are_within_what_is_supported() -> None:
    assert {pin.name for pin in CONSTRAINTS} == {"torch", "triton"}
    for pin in CONSTRAINTS:
        [exact] = pin.specifier
        assert exact.operator == "=="
        assert exact.version in REQUIREMENTS[pin.name].specifier


def test_oldest_versions_are_the_documented_ones() -> None:
    assert REQUIREMENTS["torch"].specifier == packaging.Requirement("torch>=2.11").specifier
    assert PROJECT["requires-python"] == ">=3.11"
    assert "Python 3.11 to 3.13" in README
    assert "torch 2.11" in README


def test_this_environment_is_supported() -> None:
    for name, requirement in REQUIREMENTS.items():
        if requirement.marker is None or requirement.marker.evaluate():
            found = version(name)
            assert requirement.specifier.contains(found, prereleases=True), f"{name} {found}"


# --- documents -----------------------------------------------------------------------------------


def commands_of(script: str) -> list[str]:
    lines = (line.strip() for line in script.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]


def test_ci_runs_the_two_documented_commands() -> None:
    script = ROOT / ".ci" / "run"
    commands = commands_of(script.read_text(encoding="utf-8"))
    assert commands == ["make check", "make test"]
    assert os.access(script, os.X_OK)
    for command in commands:
        assert command in README


def test_readme_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"chat", "check", "test", "test-deep", "test-gpu", "bench", "help", "clean"} <= targets
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code_of(README))))
    assert {"chat", "check", "test", "test-gpu"} <= named <= targets


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"\b(?:minigen|kernels|weights|tests|tools)/[\w/]*\.\w+", README))
    assert {"minigen/model.py", "kernels/varlen_attention.py", "weights/tokenizer.py"} <= named
    absent = {name for name in named if not (ROOT / name).is_file()}
    assert not absent


def test_readme_lists_the_supported_families() -> None:
    from minigen.model import FAMILIES

    section = README.partition("## What is supported")[2].partition("\n## ")[0]
    _header, *named = re.findall(r"^\| [^|]+ \| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(named) == sorted(FAMILIES)


def code_of(markdown: str) -> list[str]:
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", markdown)]


def test_a_module_skipped_as_a_whole_does_not_break_the_summary() -> None:
    """pytest reports one that lacks a package without the keywords that a test has."""
    lines: list[str] = []
    of_test = SimpleNamespace(keywords={"gpu": 1}, longrepr="Skipped: needs a CUDA GPU")
    of_module = SimpleNamespace(longrepr="Skipped: could not import 'pexpect'")
    reporter = SimpleNamespace(
        stats={"skipped": [of_module, of_test]},
        write_line=lambda line, **markup: lines.append(line),
    )
    conftest.pytest_terminal_summary(reporter, None)  # pyright: ignore[reportArgumentType]
    assert len(lines) == 1
    assert lines[0].startswith("1 GPU tests did not run")
