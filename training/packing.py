"""Token blocks of one exact length, cut from documents.

Policies:
- `"document"` (default; the paper trains on whole long documents): every block lies inside one document. A document of
  n tokens gives `n // length` blocks; its rest, and documents that are too short, are dropped.
- `"concat"`: documents are joined in their order, each followed by the end-of-text token, and the stream is cut.
  Nothing but the last rest is dropped. Attention does cross the joints, as in ordinary pretraining.

Where the tokenizer puts a begin-of-text token in front of a text, every block begins with it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.data import Dataset

from .chat import chat_tokens
from .texts import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Policy = Literal["document", "concat"]


class LengthError(ValueError):
    """The documents are too few or too short for the asked blocks; the message holds the length histogram."""


@dataclass(frozen=True)
class TokenBlocks(Dataset):
    """Token blocks of one length, as a torch data set.

    `blocks[i]` is a dict of `input_ids` (int64 `[length]`), `needle_rows` (int64 `[R]`: rows whose *next* token is an
    answer token, padded with -1; R is the same for all blocks, 0 without needles) and, for conversations,
    `label_mask` (bool `[length]`: True where the token itself is an assistant's).

    Attributes:
        input_ids: int32 `[N, length]`.
        needle_rows: int64 `[N, R]`.
        label_mask: bool `[N, length]`, or None for plain text.
        document_ids: for each block the ids of the documents it holds tokens of.
    """

    input_ids: torch.Tensor
    needle_rows: torch.Tensor
    label_mask: torch.Tensor | None = None
    document_ids: tuple[tuple[str, ...], ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a block."""
        return self.input_ids.shape[1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": self.input_ids[index].long(), "needle_rows": self.needle_rows[index]}
        if self.label_mask is not None:
            item["label_mask"] = self.label_mask[index]
        return item

    def sha256(self) -> str:
        """SHA-256 of the token ids: names the data in records."""
        return hashlib.sha256(self.input_ids.contiguous().numpy().tobytes()).hexdigest()


def histogram(lengths: Sequence[int]) -> str:
    """Lengths counted by powers of two, in one line."""
    if not lengths:
        return "no documents"
    counts: dict[int, int] = {}
    for length in lengths:
        bucket = max(length, 1).bit_length() - 1
        counts[bucket] = counts.get(bucket, 0) + 1
    return ", ".join(f"{2**b}-{2 ** (b + 1) - 1} tokens: {counts[b]}" for b in sorted(counts))


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts in front of every text (begin-of-text), often none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(plain[0])])


def tokenize(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], list[bool] | None]:
    """`(ids, labelled)` of a document without leading tokens; `labelled` is None for plain text."""
    if document.messages is not None:
        try:
            return chat_tokens(tokenizer, document.messages)
        except ValueError as error:
            raise ValueError(f"{document.id}: {error}") from error
    return list(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]), None


@dataclass
class _Piece:
    ids: list[int]
    labelled: list[bool] | None
    documents: tuple[str, ...]


def _document_pieces(coded: Iterable[_Piece], room: int, at_most: int | None, seed: int) -> Iterator[_Piece]:
    for piece in coded:
        starts = list(range(0, len(piece.ids) - room + 1, room))
        if at_most is not None and len(starts) > at_most:
            starts = sorted(random.Random(f"{seed}:{piece.documents[0]}").sample(starts, at_most))
        for start in starts:
            labelled = None if piece.labelled is None else piece.labelled[start : start + room]
            if labelled is None or any(labelled):
                yield _Piece(piece.ids[start : start + room], labelled, piece.documents)


def _concat_pieces(coded: Iterable[_Piece], room: int, separator: int) -> Iterator[_Piece]:
    ids: list[int] = []
    labelled: list[bool] = []
    owners: list[str] = []
    chat = False
    for piece in coded:
        ids += [*piece.ids, separator]
        chat = chat or piece.labelled is not None
        labelled += [*(piece.labelled or [False] * len(piece.ids)), False]
        owners += piece.documents * (len(piece.ids) + 1)
        while len(ids) >= room:
            if not chat or any(labelled[:room]):
                names = tuple(dict.fromkeys(owners[:room]))
                yield _Piece(ids[:room], labelled[:room] if chat else None, names)
            del ids[:room], labelled[:room], owners[:room]


def pack_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    policy: Policy = "document",
    min_tokens: int = 0,
    max_tokens: int | None = None,
    blocks_per_document: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> TokenBlocks:
    """Cut documents into blocks of exactly `length` tokens.

    Args:
        documents: read in their order, and no further than `limit` needs.
        tokenizer: the model's tokenizer; conversations need its chat template.
        length: tokens in a block, a begin-of-text token included.
        policy: `"document"` or `"concat"`, as the module says.
        min_tokens: documents with fewer tokens are left out.
        max_tokens: documents with more tokens are left out; None keeps them.
        blocks_per_document: with `"document"`, at most so many blocks of one document, drawn by the seed.
        limit: at most so many blocks.
        seed: order of the blocks, and the draw above.

    Returns:
        The blocks, shuffled by `seed`. Blocks of conversations that hold no assistant token are left out.

    Raises:
        LengthError: (a ValueError) no block came out; the message holds the histogram of document lengths.
        ValueError: a bad argument, or `"concat"` with a tokenizer that has no end-of-text token.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if policy not in ("document", "concat"):
        raise ValueError(f"policy must be 'document' or 'concat', got {policy!r}")
    lead = leading_tokens(tokenizer)
    room = length - len(lead)
    lengths: list[int] = []

    def coded() -> Iterator[_Piece]:
        for document in documents:
            ids, labelled = tokenize(tokenizer, document)
            lengths.append(len(ids))
            if len(ids) >= min_tokens and (max_tokens is None or len(ids) <= max_tokens):
                yield _Piece(ids, labelled, (document.id,))

    if policy == "document":
        pieces = _document_pieces(coded(), room, blocks_per_document, seed)
    elif tokenizer.eos_token_id is None:
        raise ValueError("policy 'concat' joins documents with the end-of-text token, and this tokenizer has none")
    else:
        pieces = _concat_pieces(coded(), room, tokenizer.eos_token_id)
    blocks: list[_Piece] = []
    for piece in pieces:
        blocks.append(piece)
        if limit is not None and len(blocks) >= limit:
            break
    if not blocks:
        advice = "use policy 'concat', shorter blocks or longer documents" if lengths else "give more data"
        raise LengthError(
            f"no block of {length} tokens (policy {policy!r}, documents of at least {min_tokens} tokens) came out of "
            f"{len(lengths)} documents; {advice}. Lengths: {histogram(lengths)}"
        )
    if limit is not None and len(blocks) < limit:
        logger.warning("%d blocks of %d tokens came out, %d were asked", len(blocks), length, limit)
    random.Random(seed).shuffle(blocks)
    chat = any(block.labelled is not None for block in blocks)
    return TokenBlocks(
        input_ids=torch.tensor([lead + block.ids for block in blocks], dtype=torch.int32),
        needle_rows=torch.empty(len(blocks), 0, dtype=torch.int64),
        label_mask=torch.tensor([[False] * len(lead) + (b.labelled or [False] * room) for b in blocks])
        if chat
        else None,
        document_ids=tuple(block.documents for block in blocks),
    )
