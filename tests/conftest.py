import importlib.util
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings

torch.set_num_threads(1)  # small tensors; the test runner uses the cores

if not torch.cuda.is_available():  # Triton looks when it is imported: here, before any test
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton.language")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need the Hub where it cannot be reached; asked once."""
    wanting = [item for item in items if item.get_closest_marker("hub")]
    if wanting and (reason := _why_no_hub()):
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_hub() -> str | None:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, texts and evaluation sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data beside the checkout ({SHARED.name} folder absent)")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
