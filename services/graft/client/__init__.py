"""Graft's typed SDK: `Graft` (blocking) and `AsyncGraft` (asyncio) over the public gRPC contract.

    from graft.client import Graft

    with Graft() as graft:
        data = graft.upload_dataset("reviews.jsonl")
        job = graft.create_job("smollm2-135m", data.name, suffix="reviews")
        for update in graft.watch_job(job.name):
            print(update.event.message)
        print(graft.generate("smollm2-135m:reviews", prompt="A wonderful film.").text)

Answers are the contract's own messages, typed by their stubs. Failures are `graft.domain.errors`.
"""

from graft.client.asynchronous import AsyncGraft
from graft.client.blocking import Graft
from graft.client.connection import Connection

__all__ = ["AsyncGraft", "Connection", "Graft"]
