"""One stack on the catalogue's own base model, started in the background as people do who close their terminal."""

from collections.abc import Iterator

import pytest

from tests.support.whole_stack import WholeStack, make_stack, removed


@pytest.fixture(scope="package")
def stack(pytestconfig: pytest.Config) -> Iterator[WholeStack]:
    # The converted base model, 270 MB, is kept between runs of the tests, as it is between starts of a stack.
    cache = pytestconfig.cache.mkdir("graft")
    with removed(make_stack(GRAFT_CACHE=str(cache))) as stack:
        started = stack.graft("up", "--detach")
        assert started.returncode == 0, f"{started.stderr}\n{stack.last_lines()}"
        yield stack
        stack.graft("down")
