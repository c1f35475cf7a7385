"""CLIP's tokenizer: byte-pair encoding with OpenAI's vocabulary or another, and added tokens."""

import gzip
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from reprlib import repr as short

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Byte-pair encoding as CLIP does it (Radford et al. 2021): text is lower-cased, and `</w>` ends a word.

    vocab: ids by token. merges: pairs of tokens by priority. added: tokens by id that are found in the text before it
    is split into words, such as those of textual inversion. `self.base` is `vocab`; `self.vocab` has the added tokens
    too. `ldm.models.token_files` reads and writes tokenizers.
    Raises ValueError for an inconsistent vocabulary, merges or added tokens.
    """

    following: Collection[int] = ()  # ids that stay in the chunk of the id before, see `ldm.models.textual_inversion`

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
        words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self._bpe.decoder = decoders.ByteLevel()
        self._bpe.add_tokens([self.added[i] for i in sorted(self.added)])

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without begin and end tokens, however many there are."""
        return list(self._bpe.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, in lower case and with one space between words."""
        text = self._bpe.decode(list(ids), skip_special_tokens=False)
        return str(text).replace("</w>", " ").strip()

    @classmethod
    @cache
    def official(cls) -> "Tokenizer":
        """Return OpenAI's tokenizer with 49,408 tokens, which every Stable Diffusion uses; always the same object."""
        return cls(*official_vocabulary())


def official_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build CLIP's vocabulary and its 48,894 merges from the list that OpenAI published (MIT)."""
    packed = resources.files("ldm.models").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    # Line 0 is a header. CLIP has 49,152 tokens: 256 bytes, 256 bytes that end a word, merges, and 2 special tokens.
    # The last lines do not fit and are not used.
    merges = [(left, right) for left, right in map(str.split, lines[1 : 49152 - 256 - 2 + 1])]
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_alphabet() -> list[str]:
    """Return one printable character per byte, in the order of CLIP's first 256 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
