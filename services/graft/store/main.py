"""Migrates the store's database and adds API keys.

python -m graft.store.main migrate
python -m graft.store.main add-key --project default --label laptop
"""

import argparse
import asyncio
import hashlib
import secrets
import sys

from sqlalchemy.exc import OperationalError

from graft import settings
from graft.domain import names
from graft.domain.errors import GraftError
from graft.store.sql import migrate, open_store


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for a wrong setting or argument; 1 when the database does not answer."""
    parser = argparse.ArgumentParser(prog="python -m graft.store.main", description="Keeps Graft's database.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("migrate", help="bring the database to the newest schema")
    key = actions.add_parser("add-key", help="make an API key and print its secret, once")
    key.add_argument("--project", default=names.DEFAULT_PROJECT)
    key.add_argument("--label", default="", help="what the key is for")
    parsed = parser.parse_args(arguments)
    try:
        url = settings.load().store_url
        done = migrate(url)
        if parsed.action == "migrate":
            moved = f"from revision {done.before or 'none'} to {done.after}"
            print(f"The schema was at revision {done.after}." if done.before == done.after else f"Migrated {moved}.")
        if parsed.action == "add-key":
            print(asyncio.run(_add_key(url, names.check_id(parsed.project, "--project"), parsed.label)))
    except GraftError as error:
        print(error.message, file=sys.stderr)
        return 2
    except OperationalError as error:
        print(f"The database does not answer: {error.orig}. Check GRAFT_STORE_URL.", file=sys.stderr)
        return 1
    return 0


async def _add_key(url: str, project: str, label: str) -> str:
    secret = "graft-" + secrets.token_urlsafe(32)
    store = open_store(url)
    try:
        await store.add_key(hashlib.sha256(secret.encode()).hexdigest(), project, label)
    finally:
        await store.close()
    return secret


if __name__ == "__main__":
    sys.exit(main())
