"""CLIP text encoding: byte-pair tokens, one or more towers, and which of their outputs conditions the UNet.

The tower itself is transformers' `CLIPTextModel`, the one network here that is not written by hand. Its keys lost the
`text_model.` prefix in transformers 5.6: everything that needs them asks the module.
"""

import gzip
import json
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config import TextConfig

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Conditioning(NamedTuple):
    """What the text says to the UNet. context: b n d. vector: b p, the pooled projection, or None."""

    context: Tensor
    vector: Tensor | None


class Tokenizer:
    """Byte-pair encoding as CLIP does it (Radford et al. 2021): lower-cased, `</w>` ends a word."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        from transformers import CLIPTokenizer  # seconds to import: only where text is encoded

        self.vocab, self.merges = vocab, list(merges)
        self.bos_id, self.eos_id = vocab[BOS], vocab[EOS]
        # Padding is TextTower's: as a special token, SD2's pad "!" would swallow real ones.
        self._bpe = CLIPTokenizer(vocab=vocab, merges=self.merges, pad_token=EOS)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without begin and end tokens, however many there are."""
        ids: list[int] = self._bpe(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, lower-cased and with normalised spaces."""
        return str(self._bpe.decode(list(ids))).strip()

    @classmethod
    def official(cls) -> "Tokenizer":
        """Return OpenAI's vocabulary of 49,408 tokens, shared by every Stable Diffusion and in this package."""
        return cls(*official_vocabulary())

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read vocab.json and merges.txt, or else tokenizer.json, from a `tokenizer/` folder.

        Raises ValueError if the folder holds neither.
        """
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            return cls(vocab, _pairs(line for line in lines if not line.startswith("#version")))
        if (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return cls(model["vocab"], [(a, b) for a, b in merges])
        raise ValueError(
            f"{folder} holds no tokenizer: need vocab.json and merges.txt, or tokenizer.json"
        )

    def save(self, folder: str | Path, max_length: int, pad_id: int | None = None) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, readable by us, transformers and diffusers.

        pad_id: of the token that the configuration names for padding; None is the end token.
        Raises ValueError for one that is not in the vocabulary.
        """
        tokens = {i: token for token, i in self.vocab.items()}
        pad_id = self.eos_id if pad_id is None else pad_id
        if pad_id not in tokens:
            raise ValueError(f"pad_id {pad_id} is not in the vocabulary of {len(tokens)} tokens")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = json.dumps(self.vocab, ensure_ascii=False)
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        special: dict[str, Any] = {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": tokens[pad_id],
            "unk_token": EOS,
        }
        config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
        (folder / "vocab.json").write_text(vocab, encoding="utf-8")
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def official_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build CLIP's vocabulary and its 48,894 merges from the list that OpenAI published (MIT)."""
    packed = resources.files("ldm.models").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = _pairs(lines[1 : 49152 - 256 - 2 + 1])  # line 0 is a header, the tail was never used
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_alphabet() -> list[str]:
    """Return one printable character per byte, in the order of CLIP's first 256 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


class TextTower(nn.Module):
    """One CLIP text transformer with its tokenizer and the choice of the output that is used."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        with torch.device("cpu"):  # the import runs code that fails on "meta", where loading builds
            from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import

        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                hidden_act=config.activation,
                max_position_embeddings=config.max_length,
                bos_token_id=tokenizer.bos_id,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=config.pad_id,
            )
        )
        for part in self.model.modules():
            # A constant that no checkpoint need hold: real even on "meta".
            if "position_ids" in part._buffers:
                part.position_ids = torch.arange(config.max_length, device="cpu")[None]
        self.projection = (
            nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        )

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of `texts`, begun, ended and padded: b max_length.

        Warns with the words that are cut where a text is longer than the tower reads.
        """
        room = self.config.max_length - 2
        rows = []
        for text in texts:
            ids = self.tokenizer.encode(text)
            if len(ids) > room:
                warnings.warn(
                    f"the prompt has {len(ids)} tokens and the text encoder reads {room}; this part is cut off: "
                    f"{self.tokenizer.decode(ids[room:])!r}",
                    stacklevel=2,
                )
            row = [self.tokenizer.bos_id, *ids[:room], self.tokenizer.eos_id]
            rows.append(row + [self.config.pad_id] * (self.config.max_length - len(row)))
        return torch.tensor(rows, device=self.model.device)

    def forward(self, ids: Tensor) -> Conditioning:
        """Encode ids: b n as the chosen hidden state: b n width and the pooled projection: b p."""
        out = self.model(input_ids=ids, output_hidden_states=True)
        context = out.hidden_states[self.config.output_layer]
        if self.config.final_norm:
            context = getattr(self.model, "text_model", self.model).final_layer_norm(context)
        if self.projection is None:
            return Conditioning(context, None)
        # The first end token after the beginning; argmax(ids) breaks once tokens are added after it.
        ends = (ids == self.tokenizer.eos_id).int().argmax(dim=-1)
        pooled = out.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]
        return Conditioning(context, self.projection(pooled))


class TextEncoder(nn.Module):
    """The towers of a model, their contexts joined along the width; the last pooled projection wins."""

    def __init__(self, configs: Sequence[TextConfig], tokenizers: Sequence[Tokenizer]) -> None:
        super().__init__()
        self.tokenizers = list(tokenizers)  # one per tower
        self.towers = nn.ModuleList(
            TextTower(config, tokenizer)
            for config, tokenizer in zip(configs, tokenizers, strict=True)
        )

    def encode(self, texts: list[str]) -> Conditioning:
        """Encode `texts` as context: b n d (d: sum of the widths) and vector: b p or None."""
        outputs = [tower(tower.tokenize(texts)) for tower in self.towers]  # type: ignore[operator]
        vectors = [out.vector for out in outputs if out.vector is not None]
        context = torch.cat([out.context for out in outputs], dim=-1)  # b n d
        return Conditioning(context, vectors[-1] if vectors else None)


def _pairs(lines: Any) -> list[tuple[str, str]]:
    return [(a, b) for a, b in (line.split() for line in lines if line.strip())]
