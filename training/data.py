"""Training and calibration data: documents, splits, token blocks, needles.

documents = load_texts("system", min_chars=20_000)
train, held_out = split_documents(documents, held_out=0.1)
blocks = pack_documents(train, tokenizer, 4096, blocks_per_document=2, limit=60)
blocks = NeedleMixer(tokenizer).mix(blocks, share=1 / 3)
"""

from .chat import chat_tokens
from .needles import EVALUATION_KEYS, TRAINING_KEYS, Fact, NeedleBlock, NeedleMixer, draw_facts
from .packing import LengthError, TokenBlocks, pack_documents
from .texts import Document, documents_hash, load_texts, split_documents

__all__ = [
    "EVALUATION_KEYS",
    "TRAINING_KEYS",
    "Document",
    "Fact",
    "LengthError",
    "NeedleBlock",
    "NeedleMixer",
    "TokenBlocks",
    "chat_tokens",
    "documents_hash",
    "draw_facts",
    "load_texts",
    "pack_documents",
    "split_documents",
]
