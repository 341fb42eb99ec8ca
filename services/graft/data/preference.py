"""Pairs of answers to one prompt, as sequences of tokens. Does not know files (`graft.data.prepare`) or losses."""

from dataclasses import dataclass

from graft.data.canonical import Chat, Messages, Pair, Preference
from graft.data.rendering import Example, Tokenizer, render


@dataclass(frozen=True)
class PreferenceExample:
    """Two answers to one prompt. Each sequence holds the prompt and, with loss, its answer."""

    chosen: Example
    rejected: Example

    @property
    def tokens(self) -> int:
        """Of both sequences."""
        return len(self.chosen.token_ids) + len(self.rejected.token_ids)


def render_preference(row: Preference, tokenizer: Tokenizer) -> PreferenceExample:
    """Both sequences, each as supervised training would render it; the turns of the prompt are never learned.

    Raises InvalidArgument as `render`.
    """

    def answered(answer: str | Messages) -> Example:
        if isinstance(row.prompt, str) or isinstance(answer, str):  # then all three are texts
            return render(Pair(str(row.prompt), str(answer)), tokenizer)
        asked = ({**turn, "weight": 0} for turn in row.prompt)
        return render(Chat((*asked, *answer), row.tools), tokenizer)

    return PreferenceExample(answered(row.chosen), answered(row.rejected))
