"""A tokenizer of single characters for small models, and checks for tokenizers that users bring."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# transformers takes seconds to import; commands that only read a recipe must not pay for it.

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

Tokens = NDArray[np.int32]


def character_tokenizer(alphabet: str, tags: Sequence[str] = TAGS) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, one per tag, and `<pad>`, `<eos>`, `<bos>` (ids 0, 1 and 2).

    Decoding joins without spaces and gives the text back. Only these three count as special, so tags survive
    `skip_special_tokens=True` as well. There is no unknown token: a foreign character is an error. The result
    round-trips through `save_pretrained` and `AutoTokenizer`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(alphabet)) != len(alphabet):
        twice = sorted({c for c in alphabet if alphabet.count(c) > 1})
        raise ConfigError(
            f"The alphabet holds {''.join(twice)!r} more than once.", "List each character once."
        )
    words = [PAD, EOS, BOS, *tags, *alphabet]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, EOS, BOS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder. Raises DataError when it cannot be read or has no EOS."""
    try:
        tokenizer = _plain_tokenizer(folder)
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no usable tokenizer: {error}",
            "Point it to a folder with tokenizer.json and tokenizer_config.json.",
        ) from error
    require_eos(tokenizer, folder)
    return tokenizer


def _plain_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer if it is nothing but its tokenizer.json, else None: finding out the class of any other takes
    transformers some seconds of imports."""
    from transformers import PreTrainedTokenizerFast

    settings = Path(folder) / "tokenizer_config.json"
    if not settings.is_file() or json.loads(settings.read_text()).get("tokenizer_class") not in PLAIN_CLASSES:
        return None
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def require_eos(tokenizer: PreTrainedTokenizerBase, folder: str) -> int:
    """The id of EOS. Raises DataError without one: completions would never end."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer in {folder} has no EOS token, so completions would never end.",
            f'Add "eos_token": "<your end token>" to {folder}/tokenizer_config.json.',
        )
    return int(tokenizer.eos_token_id)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> Tokens:
    """[P] the text's tokens, nothing added. Raises DataError naming `where` and what cannot be encoded."""
    return encode_many(tokenizer, [text], lambda _: where)[0]


def encode_many(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], where: Callable[[int], str]
) -> list[Tokens]:
    """Tokens of every text, nothing added. `where(i)` names the i-th text in the DataError raised for a
    character without a token; a tokenizer's unknown token counts as having none."""
    if not texts:
        return []
    try:
        rows: list[list[int]] = tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
    except Exception:  # noqa: BLE001  tokenizers raises a bare Exception for a character without a token
        rows = [_one(tokenizer, text, where(i)) for i, text in enumerate(texts)]
    unknown = _unknown_id(tokenizer)
    if unknown is not None:
        for i, row in enumerate(rows):
            if unknown in row:
                raise _foreign(tokenizer, texts[i], where(i))
    return [np.array(row, dtype=np.int32) for row in rows]


def _one(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        raise _foreign(tokenizer, text, where) from error
    return ids


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for lost text. Some tokenizers name their EOS as unknown token and never use it."""
    unknown = tokenizer.unk_token_id
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if unknown in ends else unknown


def _foreign(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> DataError:
    rest = text
    for token in tokenizer.get_added_vocab():
        rest = rest.replace(token, "")
    vocabulary = tokenizer.get_vocab()
    foreign = sorted({c for c in rest if c not in vocabulary})
    named = ", ".join(f"{c!r}" for c in foreign[:8]) or "a character"
    return DataError(
        f"{where}: the tokenizer has no token for {named}.",
        "Add the character to the tokenizer's alphabet, or remove it from the data.",
    )
