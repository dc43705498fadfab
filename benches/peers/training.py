"""The steps of training of the tutorial's models in PyTorch, on what `bireme preprocess` wrote.

    python benches/peers/training.py DATA --model gru|xlnet|xlnet-side [--variant hf|lean]
        [--compile [MODE]] [--steps 20] [--log-every 1]
    # Data-parallel over gloo, a thread each.
    torchrun --nproc-per-node 2 benches/peers/training.py DATA ...

Needs torch, transformers, pyarrow and numpy (benches/peers/requirements.txt). Day 1's train
sessions, 256 a step, padded to 20; f32, the fused AdamW, gradients clipped at 1. Variants: `hf` is
Hugging Face's XLNetModel over all positions, `lean` the same arithmetic with the last layer
computed only where something is predicted. Both score only those positions against the catalogue,
as the original does. The loss is read every `--log-every` steps; times are means over these steps.
Prints one line of JSON: sessions a second by the median step, of all processes, and by the steps at
a tenth and nine tenths; milliseconds of the median step; GiB that the process reached at most, and
of parameters and moments.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy
import pyarrow.parquet as parquet
import torch
from torch import nn
from torch.nn import functional

LENGTH, WIDTH = 20, 64
ITEM = "product_id-list_seq"
CATEGORIES = ["brand-list_seq", "category_id-list_seq"]
NUMBERS = [
    "et_dayofweek_cos-list_seq",
    "et_dayofweek_sin-list_seq",
    "price_log_norm-list_seq",
    "product_recency_days_log_norm-list_seq",
    "relative_price_to_avg_categ_id-list_seq",
]


def cardinality(schema, name):
    feature = schema.split(f'name: "{name}"', 1)[1]
    return int(feature.split("int_domain", 1)[1].split("max:", 1)[1].split()[0]) + 1


def read(data, names):
    """Columns as tensors `[sessions, LENGTH]`, padded with 0."""
    table = parquet.read_table(data / "sessions_by_day/1/train.parquet", columns=names)
    columns = {}
    for name in names:
        lists = table[name].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
        lengths = numpy.diff(offsets)
        kind = numpy.int64 if name == ITEM or name in CATEGORIES else numpy.float32
        padded = numpy.zeros((len(lengths), LENGTH), kind)
        padded[numpy.arange(LENGTH)[None] < lengths[:, None]] = values[offsets[0] : offsets[-1]]
        columns[name] = torch.from_numpy(padded)
    return columns


class Inputs(nn.Module):
    def __init__(self, rows, side, d_projected, d_body):
        super().__init__()
        self.side = side
        self.tables = nn.ModuleDict(
            {name.split("-")[0]: nn.Embedding(n, WIDTH, padding_idx=0) for name, n in rows.items()}
        )
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.05)
        width = 3 * WIDTH + len(NUMBERS) if side else WIDTH
        self.projection = nn.Linear(width, d_projected) if d_projected else None
        self.mask = nn.Parameter(torch.randn(d_projected or width) * 0.001)
        self.to_body = nn.Linear(d_projected or width, d_body)

    def forward(self, columns, hidden):
        names = sorted([ITEM, *CATEGORIES, *NUMBERS]) if self.side else [ITEM]
        parts = [
            columns[n].unsqueeze(-1) if n in NUMBERS else self.tables[n.split("-")[0]](columns[n])
            for n in names
        ]
        x = torch.cat(parts, -1)
        if self.projection:
            x = self.projection(x).relu()
        if hidden is not None:
            x = torch.where(hidden.unsqueeze(-1), self.mask, x)
        return self.to_body(x).relu()


class Gru(nn.Module):
    """Predicts each next item; no position is hidden."""

    def __init__(self, rows, _side):
        super().__init__()
        self.inputs = Inputs(rows, False, None, 128)
        self.gru = nn.GRU(128, 128, batch_first=True)
        self.to_item = nn.Linear(128, WIDTH)

    def forward(self, columns, hidden, read_at):
        states = self.gru(self.inputs(columns, None))[0]
        return self.to_item(states.reshape(-1, 128)[read_at]).relu()


class Attention(nn.Module):
    """A layer of XLNet: states `[B, L, D]`; at the cells `read_at` alone, if given."""

    def __init__(self, d=192, heads=4, eps=0.03, dropout=0.3):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        for name in "qkvor":
            setattr(self, name, nn.Parameter(torch.randn(d, d) * 0.01))
        self.r_w, self.r_r = (
            nn.Parameter(torch.randn(heads, 1, d // heads) * 0.01) for _ in range(2)
        )
        self.norm_1, self.norm_2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def drop(self, x):
        return functional.dropout(x, self.dropout, self.training)

    def forward(self, h, table, read_at=None):
        (b, length, d), heads = h.shape, self.heads
        split = lambda x: x.view(b, length, heads, d // heads).transpose(1, 2)
        k, v = split(h @ self.k), split(h @ self.v)
        r = (table @ self.r).view(-1, heads, d // heads).permute(1, 2, 0)
        if read_at is None:
            q = split(h @ self.q)
            content = (q + self.r_w) @ k.transpose(2, 3)
            position = ((q + self.r_r) @ r).view(b, heads, 2 * length, length)[:, :, 1:]
            position = position.reshape(b, heads, length, 2 * length - 1)[..., :length]
            weights = self.drop(((content + position) * (d // heads) ** -0.5).softmax(-1))
            found = (weights @ v).transpose(1, 2).reshape(b, length, d)
        else:
            sessions, places = read_at // length, read_at % length
            h = h.reshape(-1, d)[read_at]
            q = (h @ self.q).view(-1, heads, d // heads).transpose(0, 1)
            content = (
                (q + self.r_w).transpose(0, 1).unsqueeze(2) @ k[sessions].transpose(2, 3)
            ).squeeze(2)
            columns = torch.arange(length, device=h.device)[None] - places[:, None] + length
            position = (
                ((q + self.r_r) @ r)
                .transpose(0, 1)
                .gather(2, columns[:, None].expand(-1, heads, -1))
            )
            weights = self.drop(((content + position) * (d // heads) ** -0.5).softmax(-1))
            found = (weights.unsqueeze(2) @ v[sessions]).reshape(-1, d)
        h = self.norm_1(self.drop(found @ self.o.T) + h)
        return self.norm_2(self.drop(self.down(self.drop(functional.gelu(self.up(h))))) + h)


class LeanXlnet(nn.Module):
    def __init__(self, rows, side):
        super().__init__()
        self.inputs = Inputs(rows, side, 192, 192)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.to_item = nn.Linear(192, WIDTH)
        distances = torch.arange(LENGTH, -LENGTH, -1.0)
        angles = distances[:, None] * 10_000 ** (-torch.arange(0, 192, 2.0) / 192)
        self.register_buffer("table", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, columns, hidden, read_at):
        h = functional.dropout(self.inputs(columns, hidden), 0.3)
        h = self.layers[1](self.layers[0](h, self.table), self.table, read_at)
        return self.to_item(functional.dropout(h, 0.3)).relu()


class HfXlnet(nn.Module):
    def __init__(self, rows, side):
        super().__init__()
        from transformers import XLNetConfig, XLNetModel

        self.inputs = Inputs(rows, side, 192, 192)
        self.body = XLNetModel(
            XLNetConfig(
                vocab_size=1,
                d_model=192,
                n_layer=2,
                n_head=4,
                d_inner=768,
                ff_activation="gelu",
                dropout=0.3,
                initializer_range=0.01,
                layer_norm_eps=0.03,
                pad_token_id=0,
            )
        )
        self.to_item = nn.Linear(192, WIDTH)

    def forward(self, columns, hidden, read_at):
        states = self.body(inputs_embeds=self.inputs(columns, hidden), use_mems=False)[0]
        return self.to_item(states).relu().reshape(-1, WIDTH)[read_at]


class Recommender(nn.Module):
    def __init__(self, body, n_items):
        super().__init__()
        self.body = body
        self.bias = nn.Parameter(torch.zeros(n_items))

    def forward(self, columns, hidden, read_at, targets):
        vectors = self.body(columns, hidden, read_at)
        logits = vectors @ self.body.inputs.tables["product_id"].weight.T + self.bias
        return functional.cross_entropy(logits, targets)


def masked(items):
    """Masked item modelling: every event with 0.15, one in any case, but not all."""
    is_event = items > 0
    rand = lambda *shape: torch.rand(shape, device=items.device)
    hidden = is_event & (rand(*items.shape) < 0.15)
    lengths = is_event.sum(1)
    rows = torch.arange(len(items), device=items.device)
    hidden[rows, (rand(len(items)) * lengths).long()] = True
    full = hidden.sum(1) == lengths
    hidden[rows[full], (rand(len(items)) * lengths).long()[full]] = False
    return hidden


def inputs(batch, options):
    """What a model is given: columns, what is hidden, where it is read, and what it should say
    there."""
    items = batch[ITEM]
    if options.model == "gru":
        hidden, following = None, functional.pad(items[:, 1:], (0, 1))
    else:
        hidden = masked(items)
        following = items * hidden
    read_at = following.flatten().nonzero()[:, 0]
    return batch, hidden, read_at, following.flatten()[read_at]


def parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", choices=["gru", "xlnet", "xlnet-side"], required=True)
    parser.add_argument("--variant", choices=["hf", "lean"], default="hf")
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE", help="of torch.compile"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--log-every", type=int, default=1, help="steps between reads of the loss")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, one process only")
    parser.add_argument(
        "--tf32", action="store_true", help="let a GPU multiply with 11 binary digits"
    )
    return parser


def compiled(run, options):
    mode = None if options.compile == "default" else options.compile
    return torch.compile(run, mode=mode, backend=options.backend)


def train(options):
    """Trains and returns the figures."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(options.threads or max(1, os.cpu_count() // world_size))
    rank = int(os.environ.get("RANK", 0))
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    side = options.model == "xlnet-side"
    schema = (options.data / "schema.pbtxt").read_text()
    columns = read(options.data, [ITEM, *CATEGORIES, *NUMBERS] if side else [ITEM])
    rows = {name: cardinality(schema, name) for name in columns if name not in NUMBERS}
    torch.manual_seed(1)
    body = Gru if options.model == "gru" else {"hf": HfXlnet, "lean": LeanXlnet}[options.variant]
    model = Recommender(body(rows, side), rows[ITEM]).to(options.device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    order = torch.randperm(len(columns[ITEM]), generator=torch.Generator().manual_seed(3))
    if world_size > 1:
        # DistributedDataParallel waits for the gradient of every parameter.
        model(
            *inputs({name: column[order[:8]] for name, column in columns.items()}, options)
        ).backward()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-4, weight_decay=0, fused=True)
    run = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    run = compiled(run, options) if options.compile else run

    torch.manual_seed(2 + rank)
    n = len(order)
    own = options.batch // world_size

    def sessions(step):
        first = (step * options.batch + rank * own) % (n - own)
        return {name: column[order[first : first + own]] for name, column in columns.items()}

    seconds = []
    for start in range(0, options.warm_up + options.steps, options.log_every):
        batches = [sessions(start + step) for step in range(options.log_every)]
        began = time.perf_counter()
        for batch in batches:
            batch = {name: column.to(options.device) for name, column in batch.items()}
            loss = run(*inputs(batch, options))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()
        if start >= options.warm_up:
            seconds.append((time.perf_counter() - began) / options.log_every)
    seconds.sort()
    at = lambda share: seconds[min(len(seconds) - 1, int(share * len(seconds)))]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "sessions_per_s": options.batch / at(0.5),
        "slow": options.batch / at(0.9),
        "fast": options.batch / at(0.1),
        "step_ms": 1000 * at(0.5),
        "peak_gib": peak,
        "state_gib": 3 * 4 * n_parameters / 2**30,
        "loss": loss.item(),
        "n_items": rows[ITEM],
    }


def main():
    options = parser().parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo")
    figures = train(options)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
