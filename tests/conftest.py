"""What all tests share. The environment is set before anything heavy is imported: offline, quiet, one thread."""

import os
import signal
import sys
import threading
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",  # tiny models on shared cores run fastest with one thread
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    DIFFUSERS_VERBOSITY="error",
    DIFFUSERS_DISABLE_REMOTE_CODE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
)
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # `from utils import ...`, `import tiny`
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Tests that run in the background (`nohup make test &`) ignore these signals, and so would every process started here.
if threading.current_thread() is threading.main_thread():
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)

import pytest  # noqa: E402

# Files that run whole scripts or load whole pipelines many times: `make test-fast` keeps their golden numbers only.
WHOLE = (
    "scripts sdxl text_to_image pdm exactness faults stops any_folder inpainting tokens streams precomputed launching"
    " security infer concepts quantize merging formats adapter_kinds engines prior personalising two_processes"
    " clusters sam scores posthoc dreambench samplers groups attack"
)


def pytest_collection_modifyitems(items):
    whole = {f"test_{name}" for name in WHOLE.split()}
    for item in items:
        if item.path.stem in whole and "golden" not in item.name:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Folder of a tiny pipeline like SD 1.x (epsilon prediction). Read only: copy it before changing it."""
    import tiny

    return tiny.save(tiny.stable_diffusion("epsilon"), tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """Folder of a tiny pipeline like SD 2.x (v-prediction). Read only."""
    import tiny

    return tiny.save(tiny.stable_diffusion("v_prediction", seed=1), tmp_path_factory.mktemp("models") / "sd2")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """Folder of a tiny pipeline like SDXL. Read only."""
    import tiny

    return tiny.save(tiny.stable_diffusion_xl(), tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def photos(tmp_path):
    """A folder of three instance photos."""
    import tiny

    return tiny.photos(tmp_path / "photos", 3)


@pytest.fixture
def class_photos(tmp_path):
    """A folder of four class images, unlike the instance photos."""
    import tiny

    return tiny.photos(tmp_path / "class", 4, seed=7)


@pytest.fixture(autouse=True)
def _torch_state():
    """No test depends on what an earlier one drew, and none leaves grad mode or threads changed."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)
    yield
