"""Fast tokenizers from the vocabulary that a GGUF file carries.

`tokenizer.ggml.model` names the kind. `"llama"` is SentencePiece BPE: a vocabulary with scores and no merge
list; the merges are all splits of a piece into two pieces, ordered by the score of the result, which is the
order in which SentencePiece merges. `"gpt2"` (byte-level BPE with merges) is left to transformers' conversion.

Fields read (GGUF specification): `tokenizer.ggml.{model,pre,tokens,scores,token_type}`, `add_space_prefix`,
`add_bos_token`, the `*_token_id` ones, and `tokenizer.chat_template`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_PROBE = "Round trip: naïve café, 12,345 items;  two spaces\n\n\tdef f(x):\n        return x + 1  # 東京 🙂\n"


def _strings(field: Any) -> list[str]:
    return [bytes(field.parts[index]).decode("utf-8") for index in field.data]


def _numbers(field: Any) -> list[float]:
    return [field.parts[index][0].item() for index in field.data]


def _scalar(fields: dict[str, Any], name: str, default: Any = None) -> Any:
    field = fields.get(f"tokenizer.ggml.{name}")
    return default if field is None else field.contents()


def sentencepiece_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merge list of a SentencePiece BPE vocabulary.

    Args:
        vocab: piece -> id, mergeable pieces only (no control, user-defined or byte pieces).
        scores: score by id; a higher score merges first.

    Returns:
        `(left, right)` pairs, best first; pairs of one piece are ordered by the ids of their parts.
    """
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _sentencepiece_backend(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    tokens = _strings(fields["tokenizer.ggml.tokens"])
    scores = _numbers(fields["tokenizer.ggml.scores"])
    types = [int(kind) for kind in _numbers(fields["tokenizer.ggml.token_type"])]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"the GGUF vocabulary has {len(tokens)} tokens but {len(vocab)} different ones")
    mergeable = {t: i for t, i in vocab.items() if types[i] not in (_CONTROL, _USER_DEFINED, _BYTE)}
    unknown = _scalar(fields, "unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=sentencepiece_merges(mergeable, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for kind in types),
        )
    )
    prefix = _scalar(fields, "add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    backend.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i, k in enumerate(types) if k == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(tokens[i], special=False, normalized=False) for i, k in enumerate(types) if k == _USER_DEFINED]
    )
    if _scalar(fields, "add_bos_token", True):
        bos = tokens[_scalar(fields, "bos_token_id")]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return backend


def _wrap(backend: Any, fields: dict[str, Any], max_length: int | None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    names = {
        name: backend.id_to_token(_scalar(fields, key))
        for name, key in _SPECIAL_IDS.items()
        if _scalar(fields, key) is not None
    }
    template = fields.get("tokenizer.chat_template")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=None if template is None else template.contents(),
        **({} if max_length is None else {"model_max_length": max_length}),
        **names,
    )
    return tokenizer


def _byte_level_backend(path: Path, fields: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    if _scalar(fields, "pre") == "smollm":
        # The conversion knows one pre-tokenizer for all byte-level vocabularies; this one splits digits.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return backend


def check_round_trip(tokenizer: PreTrainedTokenizerFast, text: str = _PROBE) -> None:
    """Raise ValueError if `decode(encode(text)) != text` (special tokens left out)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids)
    if decoded != text:
        raise ValueError(
            f"the tokenizer does not give a text back: {text!r} became {decoded!r}; "
            "use the model's own tokenizer folder instead of the one in the GGUF file"
        )


def tokenizer_from_gguf(path: str | Path, *, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Fast tokenizer from the vocabulary in a GGUF file.

    Args:
        path: the GGUF file.
        max_length: `model_max_length` of the result, in tokens.

    Returns:
        A `PreTrainedTokenizerFast` with the special tokens, the bos rule and the chat template of the file.

    Raises:
        ValueError: the file has no vocabulary, is of an unknown kind, or the tokenizer built from it does not
            give a mixed text (accents, runs of spaces, tabs, CJK, emoji) back.
    """
    from gguf import GGUFReader

    path = Path(path)
    fields = GGUFReader(str(path)).fields
    kind = _scalar(fields, "model")
    if kind == "llama":
        backend = _sentencepiece_backend(fields)
    elif kind == "gpt2":
        backend = _byte_level_backend(path, fields)
    else:
        raise ValueError(
            f"{path.name}: tokenizer.ggml.model is {kind!r}; expected 'llama' or 'gpt2'. "
            "Load the model from a folder with tokenizer.json instead"
        )
    tokenizer = _wrap(backend, fields, max_length)
    check_round_trip(tokenizer)
    logger.info("tokenizer with %d entries built from %s", len(tokenizer), path.name)
    return tokenizer
