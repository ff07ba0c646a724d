import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)  # the same on any machine
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Stop when the repository root is on sys.path: our `kernels/` would shadow Hugging Face's."""
    spec = importlib.util.find_spec("kernels")
    locations = list(spec.submodule_search_locations or []) if spec else []
    if any(Path(location).resolve() == ROOT / "kernels" for location in locations):
        raise pytest.UsageError(
            "the repository root is on sys.path and its kernels/ shadows Hugging Face's `kernels`; "
            "run `pytest`, not `python -m pytest`"
        )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, texts and evaluation sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the checkout ({SHARED.name} folder absent)")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
