"""Download a checkpoint from the Hugging Face hub: safetensors, config and tokenizer, nothing that could run code."""

from __future__ import annotations

import fnmatch
import os
import sys
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from litgpt.tensorfile import check_free_disk
from litgpt.utils import UserError, run_cli

# Weights under other names in the same repository (consolidated, original/, .bin, .gguf) would double the download.
PATTERNS = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE*",
]

# The HTTP client's own base class (connection refused, time-outs): httpx's or httpx2's, as the hub's version has it.
HTTPClientError = cast(type[Exception], HfHubHTTPError.__bases__[0])


def download(repo_id: str, *, revision: str = "main", checkpoint_dir: Path | None = None) -> None:
    """Download a checkpoint from the Hugging Face hub; what is there already is not fetched again.

    The access token is read from HF_TOKEN, another server than huggingface.co from HF_ENDPOINT.

    Args:
        repo_id: the repository, e.g. Qwen/Qwen3-0.6B.
        revision: branch, tag or commit.
        checkpoint_dir: where the files go; checkpoints/REPO_ID by default.
    """
    directory = checkpoint_dir or Path("checkpoints") / repo_id
    try:
        info = HfApi(endpoint=_endpoint()).model_info(repo_id, revision=revision, files_metadata=True)
        wanted = {file.rfilename: file.size or 0 for file in info.siblings or [] if _matches(file.rfilename)}
        if not any(name.endswith(".safetensors") for name in wanted):
            raise UserError(f"{repo_id} holds no safetensors weights; choose a repository that does")
        present = {name for name, size in wanted.items() if _size(directory / name) == size}
        check_free_disk(directory, sum(size for name, size in wanted.items() if name not in present))
        # Pinned to the commit just asked for: a push in between cannot mix two versions.
        snapshot_download(
            repo_id, revision=info.sha, local_dir=directory, allow_patterns=PATTERNS, endpoint=_endpoint()
        )
    except GatedRepoError:
        raise UserError(
            f"{repo_id} is gated: accept its terms on {_endpoint()}/{repo_id}, then put an access token of that "
            f"account into HF_TOKEN ({_token()})"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo_id} is not on {_endpoint()}, or it is private and HF_TOKEN does not open it ({_token()})"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{repo_id} has no revision {revision!r}; --revision takes a branch, tag or commit") from None
    except OfflineModeIsEnabled:
        raise UserError(f"HF_HUB_OFFLINE is set, so {repo_id} cannot be downloaded; unset it and run again") from None
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name; expected e.g. Qwen/Qwen3-0.6B ({error})") from None
    except (HTTPClientError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{_endpoint()} did not deliver {repo_id} ({reason}); what has arrived is kept, run the same command again"
        ) from None
    # snapshot_download returns what is on the disk, however little, when the connection breaks at its first request.
    if late := [name for name, size in wanted.items() if _size(directory / name) != size]:
        raise UserError(f"{directory}: {', '.join(late[:3])} did not arrive whole; run the same command again")
    print(f"{directory}: {len(wanted)} files of {repo_id} at {info.sha}")
    print(f"next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}")


def _matches(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _token() -> str:
    return "it is set" if os.environ.get("HF_TOKEN") else "it is not set"


if __name__ == "__main__":
    run_cli(download)
