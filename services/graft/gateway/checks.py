"""What any request must satisfy: its page size, its idempotency key, a name for people. Jobs are
`graft.gateway.checks_jobs`'s."""

import re

from graft.domain.errors import FieldViolation, InvalidArgument

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
MAX_REQUEST_ID_CHARACTERS = 128
"""A UUID4 has 36; the `openai` client's own idempotency keys are longer."""
MAX_NAME_CHARACTERS = 255
"""As long as a file's name may be."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys."""


def check_page_size(page_size: int) -> int:
    """50 for 0, at most 1000; raises InvalidArgument below 0."""
    if page_size < 0:
        raise InvalidArgument(
            "page_size: must not be negative",
            reason="INVALID_PAGE_SIZE",
            violations=(FieldViolation("page_size", "must not be negative"),),
        )
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def check_request_id(request_id: str | None) -> str | None:
    """None for an empty one; raises InvalidArgument when it is longer than 128 characters."""
    if request_id and len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        description = f"is longer than {MAX_REQUEST_ID_CHARACTERS} characters; use a UUID4"
        raise InvalidArgument(
            f"request_id: {description}",
            reason="INVALID_REQUEST_ID",
            violations=(FieldViolation("request_id", description),),
        )
    return request_id or None


def name_faults(display_name: str) -> list[FieldViolation]:
    """What is wrong with a name for people."""
    if len(display_name) > MAX_NAME_CHARACTERS:
        told = f"has {len(display_name)} characters; {MAX_NAME_CHARACTERS} are allowed"
        return [FieldViolation("display_name", told)]
    if CONTROL.search(display_name):
        return [FieldViolation("display_name", "has control characters; leave them out")]
    return []
