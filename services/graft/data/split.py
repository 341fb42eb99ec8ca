"""Which rows are held out: decided by a row's content alone.

Equal rows always fall on the same side, whatever file, order or spelling of JSON they come in, and a row stays where it
is when others are added or taken away.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.domain.errors import FieldViolation, InvalidArgument


@dataclass(frozen=True)
class Split:
    """One side of a data set cut in two."""

    fraction: float
    """Of the rows that are held out, above 0 and below 1; a row's chance, so that small sets differ from it."""
    held_out: bool
    """Which side: True for what is held out, False for what is trained on."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            description = f"{self.fraction:g} is not above 0 and below 1"
            raise InvalidArgument(
                f"validation_fraction: {description}.",
                reason="INVALID_SPLIT",
                violations=(FieldViolation("validation_fraction", description),),
            )

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is on this side."""
        return heldout(row, self.fraction, self.seed) is self.held_out


def heldout(row: Mapping[str, Any] | bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a row is among the `fraction` that is held out. `bytes` are one JSON object.

    A uniform number in [0, 1) is made of the BLAKE2b hash of the row as canonical JSON (sorted keys, no spaces), keyed
    with the seed. Rows held out at a fraction are held out at every larger one.
    """
    content = canonical_json(json.loads(row) if isinstance(row, bytes) else row)
    digest = hashlib.blake2b(content, digest_size=8, salt=(seed % 2**64).to_bytes(8, "big")).digest()
    # The upper 53 bits: as many as a float holds exactly.
    return (int.from_bytes(digest, "big") >> 11) / 2**53 < fraction


def canonical_json(value: Any) -> bytes:
    """The same bytes for equal values, whatever the order of their keys and how they were written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str).encode()
