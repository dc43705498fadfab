"""The model of a repository as a service of FastAPI and PyTorch, for benches/serve.py to compare
with.

    REPOSITORY=repository NAME=shop uvicorn --app-dir benches/peers fastapi_service:app --workers 2

What one would write by hand: events checked by pydantic, items looked up in a dictionary, the very
TorchScript module that `bireme export` wrote, called for each request. It serves models of item ids
alone, a session in each request.

Needs fastapi, uvicorn[standard], pyarrow, numpy and torch of the version that wrote the module.
"""

import os
from datetime import datetime
from pathlib import Path

import pyarrow.parquet
import torch
from fastapi import FastAPI
from pydantic import BaseModel, Field

UNKNOWN = 1

torch.set_num_threads(int(os.environ.get("TORCH_THREADS", "1")))
repository, name = Path(os.environ["REPOSITORY"]), os.environ["NAME"]
module = torch.jit.load(max((repository / f"{name}_model").glob("*/model.pt")))
vocabulary = pyarrow.parquet.read_table(
    repository / f"{name}_etl/1/workflow/vocabulary/product_id.parquet"
)
ids = dict(zip(vocabulary["product_id"].to_pylist(), vocabulary["id"].to_pylist()))
app = FastAPI()


class Event(BaseModel):
    """A row of the shop's events."""

    event_time: datetime
    event_type: str
    product_id: int
    category_id: int
    category_code: str | None = None
    brand: str | None = None
    price: float
    user_session: str


class Request(BaseModel):
    """The events of a session."""

    events: list[Event] = Field(min_length=1, max_length=1000)
    top_k: int = Field(20, ge=1, le=100)


@app.get("/ready")
def ready():
    """Whether requests may come."""
    return {}


@app.post("/recommend")
async def recommend(request: Request):
    """The best items for the session, and their scores.

    `async`: a thread for each request would only make them wait for each other, as the module takes
    a core whole.
    """
    products = [
        event.product_id for event in sorted(request.events, key=lambda event: event.event_time)
    ]
    distinct = [id for id, before in zip(products, [None, *products]) if id != before]
    items = [ids.get(id, UNKNOWN) for id in distinct][-20:]
    with torch.inference_mode():
        _, best, scores, _ = module(
            torch.tensor([items + [0] * (20 - len(items))]),
            torch.tensor([[len(items)]]),
            torch.zeros((1, 20), dtype=torch.int64),
            torch.arange(request.top_k).unsqueeze(0),
        )
    return {"item_ids": best[0].tolist(), "item_scores": scores[0].tolist()}
