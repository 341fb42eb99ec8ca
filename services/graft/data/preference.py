"""Pairs of answers to one prompt, as sequences of tokens. Does not know files (`graft.data.prepare`) or losses."""

from dataclasses import dataclass

from graft.data.rendering import Example


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt. Each sequence holds the prompt and, with loss, its answer."""

    chosen: Example
    rejected: Example

    @property
    def tokens(self) -> int:
        """Of both sequences."""
        return len(self.chosen.token_ids) + len(self.rejected.token_ids)
