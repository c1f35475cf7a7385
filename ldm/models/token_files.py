"""Tokenizers on disk: reading the files of transformers' `CLIPTokenizer` of all ages, and writing them."""

import json
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import Any

from tokenizers import AddedToken

from ldm.models.tokens import BOS, EOS, Tokenizer

Json = dict[str, Any]
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def read_tokenizer(folder: str | Path) -> tuple[Tokenizer, int]:
    """Read a folder with vocab.json and merges.txt, or else tokenizer.json. Returns the tokenizer and its padding id.

    The added tokens are in tokenizer_config.json's `added_tokens_decoder`; if it is absent, in added_tokens.json
    (without flags) and tokenizer.json. They keep their ids, also if these leave a gap.
    The padding token is in tokenizer_config.json; the default is the end token. If that file has no
    `added_tokens_decoder`, which transformers writes since 4.34, special_tokens_map.json overrides it.
    Raises ValueError for a folder without a tokenizer, and naming the file that is malformed.
    """
    folder = Path(folder)
    whole, config = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json")
    vocab, merges = _read_vocabulary(folder, whole)
    if "added_tokens_decoder" in config:
        added = _added(config["added_tokens_decoder"], folder / "tokenizer_config.json")
    else:
        config |= _read_json(folder / "special_tokens_map.json")
        plain = _ids(_read_json(folder / "added_tokens.json"), folder / "added_tokens.json")
        added = {i: AddedToken(token) for token, i in plain.items() if token not in (BOS, EOS)}
        added |= _added_list(whole, folder / "tokenizer.json")
    try:
        tokenizer = Tokenizer(vocab, merges, added)
    except ValueError as error:
        raise ValueError(f"{folder} holds no tokenizer of CLIP: {error}") from error
    pad = config.get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or pad not in tokenizer.vocab:
        raise ValueError(f"{folder} pads with {short(pad)}, which is not in its vocabulary")
    return tokenizer, tokenizer.vocab[pad]


def tokenizer_from_json(text: str) -> Tokenizer:
    """Read the contents of a tokenizer.json. Raises ValueError if they are malformed."""
    table, where = _parse(text, "tokenizer.json"), "tokenizer.json"
    return Tokenizer(*_vocabulary(table, where), _added_list(table, where))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int, pad_id: int | None = None) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, readable by us, transformers and diffusers.

    max_length: of a prompt, with its begin and end tokens. pad_id: the padding token; None is the end token.
    Raises ValueError for a pad_id that is not in the vocabulary.
    """
    tokens = {i: token for token, i in tokenizer.vocab.items()}
    pad_id = tokenizer.eos_id if pad_id is None else pad_id
    if pad_id not in tokens:
        raise ValueError(f"pad_id {pad_id} is not in the vocabulary of {len(tokens)} tokens")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.dumps(tokenizer.base, ensure_ascii=False)
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges)
    config: Json = {
        "added_tokens_decoder": {
            str(i): {name: getattr(token, name) for name in ("content", *_FLAGS)}
            for i, token in sorted(tokenizer.added.items())
        },
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": tokens[pad_id],
        "unk_token": EOS,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
    }
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> Json:
    """Read a JSON object; {} stands for a file that does not exist."""
    return _parse(_read(path), path) if path.is_file() else {}


def _parse(text: str, where: object) -> Json:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    return _object(value, where)


def _object(value: Any, where: object) -> Json:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {short(value)}")
    return value


def _ids(table: Any, where: object) -> dict[str, int]:
    """Return `table`. Raises ValueError unless it maps tokens to ids."""
    ids = _object(table, where)
    for token, i in ids.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(f"{where}: the id of {short(token)} must be a whole number, got {short(i)}")
    return ids


def _pairs(merges: Iterable[Any], where: object) -> list[tuple[str, str]]:
    """Return `merges` as pairs. Each is a line of text or a list of two tokens."""
    pairs = []
    for merge in merges:
        parts = merge.split() if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not type(parts[0]) is type(parts[1]) is str:
            raise ValueError(f"{where}: a merge must be two tokens, got {short(merge)}")
        pairs.append((parts[0], parts[1]))
    return pairs


def _read_vocabulary(folder: Path, whole: Json) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges in `folder`; `whole`: the contents of its tokenizer.json, or {}."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        lines = (line for line in _read(merges).split("\n") if line.strip() and not line.startswith("#version"))
        return _ids(_read_json(vocab), vocab), _pairs(lines, merges)
    if whole:
        return _vocabulary(whole, folder / "tokenizer.json")
    raise ValueError(f"{folder} holds no tokenizer: need vocab.json and merges.txt, or tokenizer.json")


def _vocabulary(table: Json, where: object) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges in the contents of a tokenizer.json."""
    model = _object(table.get("model"), where)
    if not isinstance(model.get("merges"), list):
        raise ValueError(f"{where}: the model has no list of merges; CLIP's byte-pair encoding has")
    return _ids(model.get("vocab"), where), _pairs(model["merges"], where)


def _added_list(table: Json, where: object) -> dict[int, AddedToken]:
    """Return the added tokens in the contents of a tokenizer.json, by id."""
    entries = table.get("added_tokens", [])
    if not isinstance(entries, list):
        raise ValueError(f"{where}: added_tokens must be a list, got {short(entries)}")
    return _added({_object(entry, where).get("id"): entry for entry in entries}, where)


def _added(table: Any, where: object) -> dict[int, AddedToken]:
    """Return added tokens by id from a table of their contents and flags by id."""
    added = {}
    for i, entry in _object(table, where).items():
        flags = {name: entry[name] for name in _FLAGS if name in _object(entry, where)}
        try:
            added[int(i)] = AddedToken(entry["content"], **flags)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: the added token {short(i)} is malformed: {error!r}") from error
    return added
