"""What every test run shares: Hypothesis profiles, the GPU's absence, the shared material."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.command_line import PROFILE, ROOT, SHARED

# The same examples at every run; `deep` looks for new ones.
hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=20, deadline=None, print_blob=True
)
hypothesis.settings.register_profile("deep", max_examples=500, deadline=None, print_blob=True)
# More threads than this only wait for each other on the small tensors of tests.
MOST_THREADS = 8


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile(PROFILE)


def no_gpu() -> str:
    """Why tests marked `gpu` cannot run here; empty where they can."""
    import torch

    # Triton's interpreter stands in for the GPU where a test asks for it.
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"needs a CUDA GPU, and torch {torch.__version__} finds none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """A run of the GPU tests without a GPU is green: say that it tested nothing."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        # A whole module that is skipped while it is collected has no keywords.
        if "gpu" in getattr(report, "keywords", ()) and "needs a CUDA GPU" in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} GPU tests did not run: {no_gpu()}", yellow=True
        )


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.interpreted import leave_out_what_tells_nothing

        leave_out_what_tells_nothing()


@pytest.fixture(autouse=True)
def torchs_kernels() -> Iterator[None]:
    """Each test starts with torch's CPU kernels, whatever an earlier one has compiled."""
    yield
    native = sys.modules.get("minigen.kernels.native")
    if native is not None:
        native.unload()


@pytest.fixture
def cold_compiler() -> Iterator[None]:
    """Neither this process's compilations nor those that earlier runs left on disk.

    AOTAutograd's cache (torch 2.13) tells apart neither inputs that share storage from inputs that
    do not, nor ranges of dynamic dimensions: a hit may bring the wrong program. What the C++
    compiler makes of the same generated code is kept: in an empty directory torch would try this
    processor's vectors again, too (12 s).
    """
    import torch
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    torch._dynamo.reset()
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def loaded_once() -> Iterator[None]:
    """No module of `kernels/` or `weights/` under a second name: its ops would register twice.

    `kernels` itself may be there: transformers imports whatever has that name to ask its version.
    """
    yield
    twice = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith(("kernels.", "weights.")) or name == "weights"
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT)
    ]
    assert not twice, f"imported without `minigen.` in front: {', '.join(twice)}"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real tokenizers, templates and a small trained model, which are no part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material, and {SHARED} is absent (set MINIGEN_SHARED)")
    return SHARED
