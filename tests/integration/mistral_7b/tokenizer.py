"""The tokenizer files of Mistral-7B-Instruct-v0.2, out of the SentencePiece model it was made from.

mistral-common brings the model (its v1: 32,000 tokens). Converters of transformers 5 rank merges by
token id, which splits runs of spaces otherwise than SentencePiece; the published tokenizer.json
ranks them by the model's scores, and so does this one.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from tests.helpers.tiny import write_json

SENTENCEPIECE = Path(str(files("mistral_common"))) / "data" / "tokenizer.model.v1"
SPECIALS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json."""
    shutil.copy(SENTENCEPIECE, folder / "tokenizer.model")
    _convert(SENTENCEPIECE).save(str(folder / "tokenizer.json"))
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    unknown, begin, end = SPECIALS
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(index): {"content": token, **special, "special": True}
                for index, token in enumerate(SPECIALS)
            },
            "additional_special_tokens": [],
            "bos_token": begin,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "legacy": True,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": None,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": unknown,
            "use_default_system_prompt": False,
        },
    )
    names = {"bos_token": begin, "eos_token": end, "unk_token": unknown}
    write_json(
        folder / "special_tokens_map.json",
        {name: {"content": token, **special} for name, token in names.items()},
    )


def _convert(model: Path) -> Tokenizer:
    pieces = SentencePieceProcessor(model_file=str(model))
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
    vocab = {piece: index for index, piece in enumerate(scores)}
    merges = generate_merges(vocab, scores)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, unk_token=SPECIALS[0], fuse_unk=True, byte_fallback=True
        )
    )
    spaced = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaced)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer
