"""A base model from the Hugging Face hub, for `graft models pull` alone: the one place where Graft calls anybody.

Safetensors, tokenizer and configuration only, never code. Does not know the catalogue.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from graft import offline
from graft.domain.errors import FailedPrecondition, GraftError, NotFound, Unavailable
from graft.registry.catalog import Hub
from graft.registry.facts import LINEAGE, read_config

_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
_NOT_THESE = ("*/*", "consolidated*")
"""Folders hold other forms of the same weights, `consolidated` files one that transformers does not read."""


def download(base: str, source: Hub, folder: Path) -> None:
    """Downloads the repository's files into `folder`, which may hold part of them already.

    Raises NotFound for a repository or revision that is not there, FailedPrecondition for one that asks for consent or
    is no base model for Graft, Unavailable when the hub cannot be reached.
    """
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
        raise Unavailable(
            f"{source.repository} cannot be downloaded from {constants.ENDPOINT} ({_first_line(error)}). Try again: "
            "what has come is kept. Without the hub, bring the folder here and name it with `folder:`.",
            reason="HUB_UNREACHABLE",
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    card: Any = about.card_data or {}
    lineage = {"from": f"hub:{source.repository}", "revision": about.sha, "license": card.get("license")}
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
