"""CLIP's tokenizer: byte-pair encoding with OpenAI's vocabulary or a folder's, and added tokens."""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from reprlib import repr as short
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_JSON_FILES = ("vocab", "tokenizer", "tokenizer_config", "added_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class Tokenizer:
    """Byte-pair encoding as CLIP does it (Radford et al. 2021): lower-cased, `</w>` ends a word.

    vocab: ids by token. merges: pairs of tokens by priority. added: tokens by id that are matched in the text before it
    is split into words, such as those of textual inversion. `self.vocab` has them too.
    Raises ValueError for an inconsistent vocabulary, merges or added tokens.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[int, AddedToken] | None = None
    ) -> None:
        # Some folders list a single character, such as SD 2's padding "!". As an added token it would split words.
        characters = set(byte_alphabet())
        added = {i: t for i, t in (added or {}).items() if t.content not in characters}
        self.base, self.merges = dict(vocab), list(merges)
        self.vocab = self.base | {token.content: i for i, token in added.items()}
        if missing := [token for token in (BOS, EOS) if token not in self.vocab]:
            raise ValueError(f"the vocabulary lacks {' and '.join(missing)}")
        for token, i in self.base.items():
            if self.vocab[token] != i or (i in added and added[i].content != token):
                raise ValueError(f"the vocabulary has {short(token)} as {i}, the added tokens do not")
        self.bos_id, self.eos_id = self.vocab[BOS], self.vocab[EOS]
        special = {self.vocab[t]: AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)}
        self.added = special | added
        try:
            # No padding token here: `TextTower` pads. As a special token, SD 2's "!" would replace real ones.
            model = BPE(self.vocab, self.merges, unk_token=EOS, end_of_word_suffix="</w>")
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"the vocabulary and the merges do not go together: {error}") from error
        self._bpe = tokenizers.Tokenizer(model)
        self._bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._bpe.decoder = decoders.ByteLevel()
        self._bpe.add_tokens([self.added[i] for i in sorted(self.added)])

    def encode(self, text: str) -> list[int]:
        """Return all ids of `text`, without begin and end tokens."""
        return list(self._bpe.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, lower-cased and with normalised spaces."""
        text = self._bpe.decode(list(ids), skip_special_tokens=False)
        return str(text).replace("</w>", " ").strip()

    @classmethod
    @cache
    def official(cls) -> "Tokenizer":
        """Return OpenAI's vocabulary of 49,408 tokens, of every Stable Diffusion. Each call returns the same object."""
        return cls(*official_vocabulary())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read vocab.json and merges.txt, or else tokenizer.json, from a `tokenizer/` folder, and the added tokens.

        The added tokens are in tokenizer_config.json's `added_tokens_decoder`; if it is absent, in added_tokens.json
        (without flags) and tokenizer.json. They keep their ids, also if these leave a gap.
        Raises ValueError for a folder without a tokenizer, and naming the file that is malformed.
        """
        folder = Path(folder)
        files = {name: folder / f"{name}.json" for name in _JSON_FILES}
        tables = {n: _read_json(path) if path.is_file() else {} for n, path in files.items()}
        whole, config = tables["tokenizer"], tables["tokenizer_config"]
        merges = folder / "merges.txt"
        if files["vocab"].is_file() and merges.is_file():
            lines = [line for line in _read(merges).split("\n") if line.strip()]
            pairs = _pairs([line for line in lines if not line.startswith("#version")], merges)
            vocab = _ids(tables["vocab"], files["vocab"])
        elif whole:
            vocab, pairs = _model(whole, files["tokenizer"])
        else:
            raise ValueError(f"{folder} holds no tokenizer: need vocab.json and merges.txt, or tokenizer.json")
        if "added_tokens_decoder" in config:
            added = _added(config["added_tokens_decoder"], files["tokenizer_config"])
        else:
            plain = _ids(tables["added_tokens"], files["added_tokens"])
            added = {i: AddedToken(token) for token, i in plain.items() if token not in (BOS, EOS)}
            added |= _added_list(whole, files["tokenizer"])
        try:
            return cls(vocab, pairs, added)
        except ValueError as error:
            raise ValueError(f"{folder} holds no tokenizer of CLIP: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read the contents of a tokenizer.json. Raises ValueError if they are malformed."""
        table, where = json.loads(text), "tokenizer.json"
        return cls(*_model(table, where), _added_list(table, where))

    def save(self, folder: str | Path, max_length: int, pad_id: int | None = None) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, readable by us, transformers and diffusers.

        pad_id: the padding token in tokenizer_config.json; None is the end token.
        Raises ValueError for a pad_id that is not in the vocabulary.
        """
        tokens = {i: token for token, i in self.vocab.items()}
        pad_id = self.eos_id if pad_id is None else pad_id
        if pad_id not in tokens:
            raise ValueError(f"pad_id {pad_id} is not in the vocabulary of {len(tokens)} tokens")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = json.dumps(self.base, ensure_ascii=False)
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        config: dict[str, Any] = {
            "added_tokens_decoder": {
                str(i): {name: getattr(token, name) for name in ("content", *_FLAGS)}
                for i, token in sorted(self.added.items())
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


def official_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build CLIP's vocabulary and its 48,894 merges from the list that OpenAI published (MIT)."""
    packed = resources.files("ldm.models").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    # Line 0 is a header, and CLIP does not use the last lines.
    merges = _pairs(lines[1 : 49152 - 256 - 2 + 1], "the bundled vocabulary")
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_alphabet() -> list[str]:
    """Return one printable character per byte, in the order of CLIP's first 256 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return _object(table, path)


def _object(value: Any, where: object) -> dict[str, Any]:
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


def _model(table: dict[str, Any], where: object) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and the merges in the contents of a tokenizer.json."""
    model = _object(table.get("model"), where)
    if not isinstance(model.get("merges"), list):
        raise ValueError(f"{where}: the model has no list of merges; CLIP's byte-pair encoding has")
    return _ids(model.get("vocab"), where), _pairs(model["merges"], where)


def _added_list(table: dict[str, Any], where: object) -> dict[int, AddedToken]:
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
