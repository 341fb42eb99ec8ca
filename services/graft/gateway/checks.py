"""What any request must satisfy: its page size, its idempotency key. Jobs are `graft.gateway.checks_jobs`'s."""

from graft.domain.errors import FieldViolation, InvalidArgument

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
MAX_REQUEST_ID_CHARACTERS = 128
"""A UUID4 has 36; the `openai` client's own idempotency keys are longer."""


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
