"""A base model from the Hugging Face hub, for `graft models pull` alone: the one place where Graft calls the hub.

Safetensors, tokenizer and configuration only, never code. Does not know the catalogue. The download has a process of
its own (`graft.child`): the hub's client cannot be interrupted within a file.
"""

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from graft import offline
from graft.child import receive, run, tell
from graft.domain.errors import (
    KINDS,
    FailedPrecondition,
    GraftError,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from graft.registry.catalog import Hub
from graft.registry.facts import LINEAGE, read_config

_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
_NOT_THESE = ("*/*", "consolidated*", "*.py")
"""Folders hold other forms of the same weights, `consolidated` files one that transformers does not read."""


_FULL = (errno.ENOSPC, errno.EDQUOT)


def download(base: str, source: Hub, folder: Path, *, show_progress: bool) -> None:
    """Downloads the repository's files into `folder`, which may hold part of them already.

    Raises NotFound for a repository or revision that is not there, FailedPrecondition for one that asks for consent, is
    no base model for Graft or cannot be written, ResourceExhausted when the disk is full, Unavailable when the hub
    cannot be reached.
    """
    order = {"base": base, "repository": source.repository, "revision": source.revision, "folder": str(folder)}
    ended = run("graft.registry.hub", order, lambda _: None, show_errors=show_progress)
    match ended.report:
        case {"kind": "finished"}:
            return
        case {"kind": "failed", "code": code, "message": message, "reason": reason}:
            raise KINDS[code](message, reason=reason)
    raise Internal(f"{source.repository} was not downloaded: {ended.cause}.", reason="PULL_FAILED")


def _download(base: str, source: Hub, folder: Path) -> None:
    offline.stay_but_for_the_hub()  # before the library, which reads its switches when it is imported
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise FailedPrecondition(
            f"HF_HUB_OFFLINE is set, so {source.repository} cannot be downloaded. Unset it, or bring the folder here "
            "and name it with `folder:`.",
            reason="HUB_OFFLINE",
        )
    try:
        about = HfApi().model_info(source.repository, revision=source.revision)

        def fetch(*patterns: str) -> None:
            snapshot_download(
                source.repository,
                revision=about.sha,
                local_dir=folder,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_THESE),
            )

        fetch("config.json")
        read_config(base, folder)  # before gigabytes of an architecture that cannot be used
        fetch(*_FILES, *_TOKENIZER_FILES)
    except GraftError:
        raise
    except errors.RevisionNotFoundError:
        raise NotFound(
            f"{source.repository} has no revision {source.revision!r} on the hub.", reason="HUB_REVISION_NOT_FOUND"
        ) from None
    except errors.GatedRepoError:
        raise FailedPrecondition(
            f"{source.repository} asks for consent: give it on its page, then set HF_TOKEN to a token of your account.",
            reason="HUB_CONSENT_REQUIRED",
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"The hub has no {source.repository}, or only for some: then set HF_TOKEN to a token of your account.",
            reason="HUB_REPOSITORY_NOT_FOUND",
        ) from None
    except Exception as error:  # whatever the library's HTTP client raises
        raise _local_fault(error, folder) or Unavailable(
            f"{source.repository} cannot be downloaded from {constants.ENDPOINT} ({_first_line(error)}). Try again: "
            "what has come is kept. Without the hub, bring the folder here and name it with `folder:`.",
            reason="HUB_UNREACHABLE",
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    card: Any = about.card_data or {}
    lineage = {"from": f"hub:{source.repository}", "revision": about.sha, "license": card.get("license")}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1))


def _local_fault(error: BaseException, folder: Path) -> GraftError | None:
    """What is told when this machine could not write; None when that was not it."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    for one in chain:
        if (isinstance(one, OSError) and one.errno in _FULL) or "No space left on device" in str(one):
            return ResourceExhausted(
                f"The disk of {folder.parent} is full. Free some space there, or set GRAFT_CACHE to a folder on "
                "another disk, and pull again: what has come is kept.",
                reason="DISK_FULL",
            )
        # An error of the network has a number too, but no file.
        if isinstance(one, OSError) and one.errno is not None and one.filename is not None:
            return FailedPrecondition(
                f"{one.filename} cannot be written: {one.strerror}. Pull again when it can; what has come is kept.",
                reason="CACHE_NOT_WRITABLE",
            )
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def main() -> int:
    """Exit code 0 after `finished`, 1 after `failed`. What has come stays when the parent is gone."""
    order = receive(lambda _: None)
    try:
        _download(order["base"], Hub(order["repository"], order["revision"]), Path(order["folder"]))
    except GraftError as error:
        tell("failed", code=error.code, reason=error.reason, message=error.message)
        return 1
    tell("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
