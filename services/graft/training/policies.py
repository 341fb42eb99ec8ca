"""The policy on its way to the inference service: after each update a new adapter, and the one before is taken out.

Owns the folders `{output_dir}/policy/step-N`, in the shared storage where there is one, and the names under which the
engine holds them. They are in no registry. A process that is killed leaves its last one behind; the orchestrator takes
it out by `policy_prefix`.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graft.domain.errors import GraftError
from graft.registry.digest import adapter_digest
from graft.training.objectives.objective import Group
from graft.training.places import patiently, put, remove, uri_of
from graft.training.rollouts import Policy, Sampler
from graft.training.saving import save_adapter
from graft.training.spec import RunSpec, Tell, policy_folder, policy_prefix

DIGEST_BYTES = 32


class Policies:
    """Publishes `model`'s adapter as training changes it. Every worker has one and calls it alike."""

    def __init__(self, spec: RunSpec, model: Any, sampler: Sampler, group: Group, tell: Tell) -> None:
        self._model = model
        self._tell = tell
        self._sampler = sampler
        self._leader = group.rank == 0
        self._prefix = policy_prefix(spec.base_model, spec.job_id)
        self._spec = spec
        self._folder = policy_folder(Path(spec.output_dir))
        self._is_base = spec.start_from is None
        self._held: list[Policy] = []

    def publish(self, updates: int, group: Group) -> Policy | None:
        """Makes the engine hold the model as it is after so many updates; returns what prompts must name.

        None, for the base model itself, while nothing has been learned. Rank 0 saves and loads, and nobody goes on
        before it has. Raises what the engine refuses the adapter with.
        """
        if updates == 0 and self._is_base:
            return None
        told = torch.zeros(1 + DIGEST_BYTES, dtype=torch.float64)
        if self._leader:
            policy = self._publish(updates)
            number = int(policy.path.rpartition("-")[2])
            told += torch.tensor([number, *bytes.fromhex(policy.digest.removeprefix("sha256:"))])
        group.reduce(told)  # rank 0's, since the others add zeros
        number, *digest = (int(value) for value in told.tolist())
        return self._policy(number, f"sha256:{bytes(digest).hex()}")

    def close(self) -> None:
        """Takes out what the engine still holds, if it answers, and deletes the folders of what it no longer holds."""
        if self._leader:
            self._retire(self._held)
            if not self._held:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self, updates: int) -> Policy:
        path = self._folder / f"step-{updates}"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_adapter(self._model, path)
        policy = self._policy(updates, adapter_digest(path))
        if self._held and self._held[-1].digest == policy.digest:  # the update changed nothing
            shutil.rmtree(path)
            return self._held[-1]
        patiently(partial(put, self._spec, path), self._tell)
        self._held.append(policy)  # first: whatever becomes of loading it, it is taken out
        self._sampler.load(policy)
        self._retire(self._held[:-1])
        return policy

    def _policy(self, updates: int, digest: str) -> Policy:
        return Policy(f"{self._prefix}{updates}", digest, uri_of(self._spec, self._folder / f"step-{updates}"))

    def _retire(self, policies: Sequence[Policy]) -> None:
        """What cannot be taken out now is tried again at the next call, and keeps its files until then: an engine that
        is replaced reads again what it held."""
        for policy in tuple(policies):
            try:
                self._sampler.unload(policy)
            except GraftError:
                continue
            self._held.remove(policy)
            with suppress(GraftError):
                remove(self._spec, policy.path)
