"""What the demo trains: a byte-level language model, and the text that it learns from."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

_BYTES = 256
_HELDOUT_EVERY = 10  # one file in ten
_PROMPT = b"def "
_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What is trained, and for how long.

    Attributes:
        steps: Steps of each optimizer.
        seed: Seed of the weights, the batches and the sample.
        device: Where to train.
        lr: lr of the first step, a cap as in torch.optim.Adafactor; it falls linearly to zero.
        d_model: Width of the model.
        layers: Transformer blocks.
        heads: Attention heads of a block.
        context: Bytes that a prediction can see.
        batch: Sequences of a batch.
        corpus_bytes: Most bytes of text to read.
        heldout_batches: Batches of a held-out loss.
        heldout_points: Held-out losses after the first, which is of the untrained model.
        sample_bytes: Bytes to generate at the end.
    """

    steps: int = 200
    seed: int = 0
    device: str = "cpu"
    lr: float = 2e-2
    d_model: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 64
    batch: int = 16
    corpus_bytes: int = 4 << 20
    heldout_batches: int = 8
    heldout_points: int = 10
    sample_bytes: int = 200


FULL_SIZE = DemoConfig()


class Block(nn.Module):
    """Causal self-attention and a GELU MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, time, width] to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = self.mlp_in(self.mlp_norm(x))
        out: Tensor = x + self.mlp_out(F.gelu(hidden))
        return out


class ByteTransformer(nn.Module):
    """A decoder-only transformer that predicts the next byte."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_BYTES, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.Sequential(
            *(Block(config.d_model, config.heads) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, _BYTES)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    @override
    def forward(self, text: Tensor) -> Tensor:
        """Map bytes [batch, time] to logits [batch, time, 256]."""
        x = self.bytes(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to train on, and text of other files to judge by."""

    files: int
    train: bytes
    heldout: bytes

    def describe(self) -> dict[str, str | int]:
        """Say which text it is, for the record."""
        return {
            "files": self.files,
            "train_bytes": len(self.train),
            "heldout_bytes": len(self.heldout),
            "sha256": hashlib.sha256(self.train + self.heldout).hexdigest(),
        }


def read_corpus(most_bytes: int) -> Corpus:
    """Read modules of Python's standard library, in the order of their names.

    Raises:
        FileNotFoundError: This Python comes without its sources.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    files = total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.name.startswith(("_sysconfigdata", "sitecustomize")):
            continue  # of the machine, not of Python
        text = path.read_bytes().replace(b"\r\n", b"\n")[: most_bytes - total]
        files += 1
        total += len(text)
        parts[files % _HELDOUT_EVERY == 0].append(text)
        if total == most_bytes:
            break
    if not all(parts):
        raise FileNotFoundError(
            "the demo trains on the source files of Python's standard library, and this Python "
            "comes without them"
        )
    train, heldout = map(b"".join, parts)
    return Corpus(files=files, train=train, heldout=heldout)


class Batches:
    """Random windows of a text, the same ones for the same seed."""

    def __init__(self, text: bytes, config: DemoConfig, seed: int) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._offsets = torch.arange(config.context + 1)
        self._batch = config.batch
        self._device = config.device
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """Draw bytes [batch, context + 1]: what to read, and one to the right, what to predict."""
        starts = torch.randint(
            len(self._text) - len(self._offsets) + 1, (self._batch, 1), generator=self._generator
        )
        return self._text[starts + self._offsets].long().to(self._device)


@torch.no_grad()
def write_text(model: nn.Module, config: DemoConfig) -> bytes:
    """Let a model go on from a prompt, byte by byte."""
    generator = torch.Generator().manual_seed(config.seed)
    text = list(_PROMPT)
    for _ in range(config.sample_bytes):
        seen = torch.tensor([text[-config.context :]], device=config.device)
        odds = torch.softmax(model(seen)[0, -1].float().cpu() / _TEMPERATURE, dim=0)
        text.append(int(torch.multinomial(odds, 1, generator=generator)))
    return bytes(text)


def printable(text: bytes) -> str:
    """Turn bytes into text that no terminal can take for a command."""
    return "".join(
        chr(byte) if byte == ord("\n") or ord(" ") <= byte <= ord("~") else "?" for byte in text
    )
