"""Equal rows, disputed inputs and leaks, found on disk: as a plain look through all rows finds them."""

import random
import subprocess
import sys

import pytest

from graft.data import row_hashes
from graft.data.row_hashes import RowHashes
from graft.domain.errors import ResourceExhausted
from graft.domain.reports import FoundRows


def told(numbers: list[int]) -> FoundRows:
    return FoundRows(len(numbers), tuple(numbers[:5]))


@pytest.mark.parametrize("values", [1, 3, 40, 2**62])
def test_everything_is_found_that_a_look_at_all_rows_finds(values: int) -> None:
    draw = random.Random(values)
    rows = [[draw.randrange(-values, values) for _ in range(3)] for _ in range(2500)]
    others = [draw.choice([draw.randrange(-values, values), rows[0][1]]) for _ in range(1500)]
    with RowHashes() as hashes, RowHashes() as held_out:
        for row in rows:
            hashes.add(*row)
        for asked in others:
            held_out.add(0, asked, 0)
        duplicates, conflicts = hashes.duplicates(), hashes.conflicts()
        leaked = hashes.leaked(held_out)
        assert (len(hashes), len(held_out)) == (2500, 1500)
    seen: set[int] = set()
    twins = [number for number, (whole, _, _) in enumerate(rows, 1) if whole in seen or seen.add(whole)]  # type: ignore[func-returns-value]
    answers: dict[int, set[int]] = {}
    for _, asked, answer in rows:
        answers.setdefault(asked, set()).add(answer)
    assert duplicates == told(twins)
    assert conflicts == told([number for number, (_, asked, _) in enumerate(rows, 1) if len(answers[asked]) > 1])
    assert leaked == told([number for number, asked in enumerate(others, 1) if asked in answers])


GROW = """
from graft.data.row_hashes import RowHashes

def peak():  # in MiB; this program's own, unlike getrusage's, which remembers what started it
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

with RowHashes() as hashes:
    for number in range(400_000):
        hashes.add(number * 2654435761 % 390_000, number * 40503 % 2**60, number % 3)
        if number == 100_000:
            before = peak()
    found = hashes.duplicates(), hashes.conflicts()
print(found[0].count, peak() - before)
"""


def test_four_times_the_rows_take_no_more_memory() -> None:
    ended = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    duplicates, grown_mib = map(int, ended.stdout.split())
    assert duplicates == 10_000
    assert grown_mib < 8  # three hashes of each row in memory would be 10, and sorting them 30 more


def test_a_full_disk_for_temporary_files_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_hashes, "_OPEN", row_hashes._OPEN + "PRAGMA max_page_count=20;")

    def fill(hashes: RowHashes) -> None:
        for number in range(20_000):
            hashes.add(number, number, number)

    with RowHashes() as hashes, pytest.raises(ResourceExhausted, match="set TMPDIR") as refused:
        fill(hashes)
    assert refused.value.reason == "DISK_FULL"
