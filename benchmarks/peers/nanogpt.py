"""A loop by nanoGPT's published settings, written for comparison: one file of ids, random rows, a loss at every token.

Settings are those of karpathy/nanoGPT's README and train.py: AdamW (betas 0.9 and 0.95, decay 0.1 on matrices),
clipping at 1, linear warmup and cosine, the next batch drawn between forward and backward. Its documented way on CPU
is float32 without compiling, which is the default here on CPU; on CUDA bfloat16, compiled, with a fused AdamW.
`--dtype bfloat16 --compile --fused` is its best on CPU.

The shape is that of a transformers config (llama's fields). `--block gpt2` is nanoGPT's own block (LayerNorm, GELU,
learned positions), as wide inside as gives as many weights as the config's; `--block llama` is the config's.
Prints one JSON line: seconds of each step, the last loss, on CUDA the peak of memory.

    python nanogpt.py CONFIG_DIR TEXT.jsonl --sequence-length 512 --rows 8 --steps 12 [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

LOG_EVERY_STEPS = {"cpu": 1, "cuda": 10}
"""How often the host reads the loss: nanoGPT's command for CPU, and its default."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    block: str
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocab: int
    length: int
    tied: bool
    theta: float = 10_000.0

    @classmethod
    def of(cls, folder: Path, block: str, length: int) -> Shape:
        """From a transformers config; GPT-2's MLP has two matrices where llama's has three."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        own = block == "gpt2"
        return cls(
            block=block,
            width=config["hidden_size"],
            inner=inner * 3 // 2 if own else inner,
            layers=config["num_hidden_layers"],
            heads=heads,
            groups=heads if own else config.get("num_key_value_heads") or heads,
            vocab=config["vocab_size"],
            length=length,
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def norm(self) -> nn.Module:
        """Neither has a bias."""
        return nn.LayerNorm(self.width, bias=False) if self.block == "gpt2" else nn.RMSNorm(self.width, eps=1e-5)


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        head = shape.width // shape.heads
        self.norm_1, self.norm_2 = shape.norm(), shape.norm()
        self.qkv = nn.Linear(shape.width, (shape.heads + 2 * shape.groups) * head, bias=False)
        self.attention_out = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, shape.inner * (1 if shape.block == "gpt2" else 2), bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x_BTD: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """`turn`: cosines and sines of rotary positions."""
        shape, (rows, length, width) = self.shape, x_BTD.shape
        head = width // shape.heads
        parts = self.qkv(self.norm_1(x_BTD)).split([width, shape.groups * head, shape.groups * head], dim=2)
        q, k, v = (part.view(rows, length, -1, head).transpose(1, 2) for part in parts)
        if turn is not None:
            q, k = rotated(q, turn), rotated(k, turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.groups != shape.heads)
        x_BTD = x_BTD + self.attention_out(y.transpose(1, 2).reshape(rows, length, width))
        inner = self.up(self.norm_2(x_BTD))
        if shape.block == "gpt2":
            inner = F.gelu(inner)
        else:
            gate, value = inner.chunk(2, dim=2)
            inner = F.silu(gate) * value
        return x_BTD + self.down(inner)


def rotated(x_BHTD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, halves of a head as pairs."""
    first, second = x_BHTD.chunk(2, dim=3)
    cos, sin = (part.to(x_BHTD.dtype) for part in turn)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class Model(nn.Module):
    """Embedding, blocks, head; returns logits of every token and their mean loss, as nanoGPT does."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width) if shape.block == "gpt2" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = shape.norm()
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.tokens.weight
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.length), shape.theta ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                last = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if last else 0.02)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, T]."""
        x_BTD, turn = self.tokens(ids_BT), None
        if self.positions is None:
            turn = self.cos, self.sin
        else:
            x_BTD = x_BTD + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD, turn)
        logits = self.head(self.norm(x_BTD))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets_BT.view(-1))


def write_ids(folder: Path, text: Path, out: Path, vocab: int) -> np.memmap[Any, Any]:
    """All documents as one row of ids, an end of text after each, on disk."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ends = config.get("eos_token") or config.get("sep_token")
    end = [tokenizer.token_to_id(ends["content"] if isinstance(ends, dict) else ends)]
    kind = np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines() if line]
    with out.open("wb") as file:
        for start in range(0, len(texts), 256):
            for found in tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False):
                file.write(np.array(found.ids + end, dtype=kind).tobytes())
    return np.memmap(out, dtype=kind, mode="r")


class Clock:
    """Ends of steps; on CUDA events, so that the host need not wait for the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """A step ends here."""
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Between marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device == "cpu":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--block", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, help="AdamW; default: on CUDA")
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    on_device = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_device else "float32")
    args.compile = on_device if args.compile is None else args.compile
    args.fused = on_device if args.fused is None else args.fused
    return args


def train(args: argparse.Namespace, ids: np.memmap[Any, Any], shape: Shape) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss."""
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = Model(shape).to(args.device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.fused)
    called: Any = torch.compile(model) if args.compile else model
    casts = nullcontext() if args.dtype == "float32" else torch.autocast(args.device, torch.bfloat16)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - args.sequence_length - 1, (args.rows,)).tolist()
        rows = [torch.from_numpy(ids[i : i + args.sequence_length + 1].astype(np.int64)) for i in starts]
        stacked = torch.stack(rows)
        x, y = stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()
        if args.device == "cpu":
            return x, y
        return x.pin_memory().to(args.device, non_blocking=True), y.pin_memory().to(args.device, non_blocking=True)

    clock, read = Clock(args.device), 0.0
    x, y = batch()
    clock.mark()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            warm, done = min(1.0, (step + 1) / 100), step / max(1, args.steps)
            group["lr"] = args.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        with casts:
            _logits, loss = called(x, y)
        x, y = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY_STEPS[args.device] == 0 or step == args.steps - 1:
            read = loss.item()
        clock.mark()
    return clock.seconds(), read


def main() -> None:
    """Train for a few steps and print the times."""
    args = parse()
    shape = Shape.of(args.model, args.block, args.sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        ids = write_ids(args.model, args.text, Path(scratch) / "train.bin", shape.vocab)
        seconds, loss = train(args, ids, shape)
    row = {"step_seconds": seconds, "loss": loss, "threads": torch.get_num_threads()}
    if args.device == "cuda":
        row["memory_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
