"""Resource names of requests, checked against who asks."""

from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.names import check_id, parse_resource
from graft.gateway import auth

ANY = "-"
"""AIP-159: reads across a collection."""


def parent_project(parent: str, field: str = "parent") -> str:
    """The project of `projects/{project}`; the asker's own when empty."""
    if not parent:
        return auth.current().default_project()
    (project,) = parse_resource(parent, "projects", field=field)
    return auth.current().check(check_id(project, field))


def split(name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
    """The ids in a resource name that starts with a project, which must be the asker's."""
    ids = parse_resource(name, "projects", *collections, field=field)
    auth.current().check(check_id(ids[0], field))
    return ids


def cursor(page_token: str) -> int:
    """The number in a page token of a list that is paged by position. Raises InvalidArgument."""
    if not page_token:
        return 0
    if not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 19):
        raise InvalidArgument(
            "page_token: is not one of this list's; send the last answer's next_page_token as it is",
            reason="INVALID_PAGE_TOKEN",
            violations=(FieldViolation("page_token", "is not one of this list's"),),
        )
    return int(page_token)
