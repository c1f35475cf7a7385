"""Invisible watermarks: a message of some bits, written into the color of a picture and read again.

Both methods change the means of 2x2 pixels (the low band of a Haar wavelet) of U, the blue difference of YUV. The
details stay. Each 4x4 block of that band, 8x8 pixels, carries one bit of the message. The message is repeated over the
blocks, row by row. A number of the block is moved to one of a grid of levels, 36 apart. The offset of the grid is the
bit (quantization index modulation, Chen and Wornell 2001).

- dwtDct moves the largest number of the block but the first. The official Stable Diffusion scripts use it, by the
  library invisible-watermark. `write` gives the pixels of that library, with its 8-bit YUV and its swapped details.
- dwtDctSvd, the default, moves the largest singular value of the block to the nearest level. That library's reader
  reads it, too; its writer may take a level further away. The DCT in its name does nothing: it is orthonormal, so that
  the singular values stay the same, and it is left out here.

A watermark is no proof. Whoever knows the method can remove it or write it, and a crop moves the blocks, so that the
message can no longer be read.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

Method: TypeAlias = Literal["dwtDctSvd", "dwtDct"]
Levels: TypeAlias = NDArray[np.float64]

SDXL = "sdxl"  # stands for the 48 bits that the official scripts of SDXL write
SDXL_BITS = 0xB3EC907BB19E
KNOWN = (SDXL, "StableDiffusionV1", "SDV2")  # the messages of the official scripts for SDXL, SD 1 and SD 2
FOUND = 1e-6  # the largest p-value that counts as found
SHORTEST = 24  # bits; a shorter message matches by chance too often
STEP = 36.0  # between the levels of one bit
_HALF = 0.7071067811865476  # pywt's Haar filter


@dataclass(frozen=True)
class Detection:
    """How well the bits read from a picture match a message."""

    message: str
    method: Method
    bits: tuple[bool, ...]  # as read
    matched: int

    @property
    def share(self) -> float:
        """The share of matching bits, 0.5 by chance."""
        return self.matched / len(self.bits)

    @property
    def p_value(self) -> float:
        """The probability that as many of fair random bits match, or more (the upper tail of a binomial)."""
        length = len(self.bits)
        return sum(math.comb(length, k) for k in range(self.matched, length + 1)) / 2**length

    @property
    def found(self) -> bool:
        """Whether the match is too good for chance: the p-value is at most FOUND."""
        return self.p_value <= FOUND


def message_bits(message: str) -> NDArray[np.bool_]:
    """Return the bits of a message: those of its UTF-8 bytes, or of `SDXL_BITS` for "sdxl".

    Raises ValueError for a message of less than SHORTEST bits.
    """
    data = SDXL_BITS.to_bytes(6) if message == SDXL else message.encode()
    if 8 * len(data) < SHORTEST:
        raise ValueError(
            f"the watermark {message!r} has {8 * len(data)} bits and needs at least {SHORTEST}, or other pictures "
            "match it by chance: give a longer text"
        )
    return np.unpackbits(np.frombuffer(data, np.uint8)).astype(bool)


def write(picture: Image.Image, message: str, method: Method = "dwtDctSvd") -> Image.Image:
    """Return a copy of an RGB picture that carries the message.

    Raises ValueError for a message that is too short, and for a picture that has fewer blocks than the message bits.
    """
    rgb, bits = _pixels(picture, method), message_bits(message)
    check_size(picture.width, picture.height, len(bits))
    return Image.fromarray(_write_svd(rgb, bits) if method == "dwtDctSvd" else _write_largest(rgb, bits))


def read(picture: Image.Image, length: int, method: Method = "dwtDctSvd") -> NDArray[np.bool_]:
    """Return the first `length` bits that a picture carries. Each bit is the majority of the blocks that carry it.

    Raises ValueError for a picture with fewer blocks than bits.
    """
    rgb = _pixels(picture, method)
    check_size(picture.width, picture.height, length)
    blocks = _blocks(_haar(_cropped(_to_yuv(rgb)[..., 1]))[0])
    numbers = np.linalg.svd(blocks, compute_uv=False)[:, 0] if method == "dwtDctSvd" else _largest(blocks)[1]
    ones = np.abs(numbers) % STEP > STEP / 2
    place = np.arange(len(ones)) % length
    means = np.bincount(place, weights=ones, minlength=length) / np.bincount(place, minlength=length)
    return means * 255 > 127  # as invisible-watermark decides


def detect(picture: Image.Image, message: str, method: Method = "dwtDctSvd") -> Detection:
    """Compare the bits of a picture with a message. Raises ValueError as `write` does."""
    expected = message_bits(message)
    bits = read(picture, len(expected), method)
    return Detection(message, method, tuple(bits.tolist()), int((bits == expected).sum()))


def capacity(width: int, height: int) -> int:
    """Return how many bits a picture of this size can carry: the number of its whole blocks of 8x8 pixels."""
    return (width // 8) * (height // 8)


def check_size(width: int, height: int, length: int) -> None:
    """Raise ValueError if a picture of this size has fewer blocks than a message has bits."""
    if capacity(width, height) < length:
        raise ValueError(
            f"the watermark has {length} bits, and {width} x {height} pixels carry {capacity(width, height)}, one in "
            "each 8x8: give a shorter message or a larger picture"
        )


def _pixels(picture: Image.Image, method: Method) -> NDArray[np.uint8]:
    if method not in get_args(Method):
        raise ValueError(f"the method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if picture.mode != "RGB":
        raise ValueError(f"the picture must have the mode RGB, got {picture.mode}: convert it with ldm.pictures.to_rgb")
    return np.asarray(picture)


def _write_svd(rgb: NDArray[np.uint8], bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Move the largest singular value of each block, and add the change of U to the pixels.

    Where a channel would leave 0 to 255, the pixel becomes darker or brighter instead, which leaves U as it is.
    """
    blocks = _blocks(_haar(_cropped(_to_yuv(rgb)[..., 1]))[0])
    u, s, vh = np.linalg.svd(blocks)
    change = (_nearest(s[:, 0], bits) - s[:, 0])[:, None, None] * u[:, :, :1] * vh[:, :1]
    columns = rgb.shape[1] // 8
    change_u = rearrange(change, "(i j) h w -> (i h) (j w)", j=columns).repeat(2, 0).repeat(2, 1) / 2
    marked = rgb.astype(np.float64)
    height, width = change_u.shape
    marked[:height, :width] += change_u[..., None] * (0, -6472 / 2**14, 33292 / 2**14)  # dRGB / dU
    marked -= (marked.max(-1, keepdims=True) - 255).clip(0)
    marked -= marked.min(-1, keepdims=True).clip(None, 0)
    return marked.round().clip(0, 255).astype(np.uint8)


def _write_largest(rgb: NDArray[np.uint8], bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Move the largest number of each block, as invisible-watermark does, to the last bit of each pixel."""
    yuv = _to_yuv(rgb)
    plane = _cropped(yuv[..., 1])
    low, vertical, horizontal, diagonal = _haar(plane)
    blocks = _blocks(low)
    place, numbers = _largest(blocks)
    moved = np.where(numbers >= 0, 1.0, -1.0) * _in_interval(np.abs(numbers), bits)
    np.put_along_axis(blocks.reshape(-1, 16), place[:, None], moved[:, None], axis=1)
    rows, columns = rgb.shape[0] // 8, rgb.shape[1] // 8
    low[: 4 * rows, : 4 * columns] = rearrange(blocks, "(i j) h w -> (i h) (j w)", j=columns)
    plane[:] = _inverse_haar(low, horizontal, vertical, diagonal)  # swapped and rounded down, as the library does
    return _to_rgb(yuv)


def _in_interval(numbers: Levels, bits: NDArray[np.bool_]) -> Levels:
    """Move each number, at least 0, to the level of its bit in its own interval of length STEP, as the library does."""
    repeated = np.resize(bits, numbers.shape)
    return (numbers // STEP + 0.25 + 0.5 * repeated) * STEP


def _nearest(numbers: Levels, bits: NDArray[np.bool_]) -> Levels:
    """Move each number, at least 0, to the nearest level of its bit that is not negative."""
    offset = (0.25 + 0.5 * np.resize(bits, numbers.shape)) * STEP
    return ((numbers - offset) / STEP).round().clip(0) * STEP + offset


def _largest(blocks: Levels) -> tuple[NDArray[np.intp], Levels]:
    """Return the place (1 to 15) and the value of the largest number, by magnitude, of each block but the first."""
    flat = blocks.reshape(-1, 16)
    place = np.abs(flat[:, 1:]).argmax(1) + 1
    return place, np.take_along_axis(flat, place[:, None], 1)[:, 0]


def _blocks(low: Levels) -> Levels:
    """Cut the low band into its whole 4x4 blocks, row by row: n 4 4."""
    rows, columns = low.shape[0] // 4, low.shape[1] // 4
    return rearrange(low[: 4 * rows, : 4 * columns], "(i h) (j w) -> (i j) h w", h=4, w=4).copy()


def _cropped(plane: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a view of `plane` whose sides are multiples of 4."""
    height, width = plane.shape
    return plane[: height // 4 * 4, : width // 4 * 4]


def _haar(plane: NDArray[np.int64]) -> tuple[Levels, Levels, Levels, Levels]:
    """Return the low band, and the differences along the rows' axis, the columns' axis and both.

    The products are rounded before they are added, as pywt does: the last bit decides how `_write_largest` rounds.
    """
    even, odd = _HALF * plane[::2], _HALF * plane[1::2]
    low, high = even + odd, even - odd
    bands = []
    for sign in (1, -1):
        bands += [_HALF * half[:, ::2] + sign * (_HALF * half[:, 1::2]) for half in (low, high)]
    return bands[0], bands[1], bands[2], bands[3]


def _inverse_haar(low: Levels, vertical: Levels, horizontal: Levels, diagonal: Levels) -> Levels:
    halves = []
    for mean, difference in ((low, horizontal), (vertical, diagonal)):
        half = np.empty((mean.shape[0], 2 * mean.shape[1]))
        half[:, ::2] = _HALF * mean + _HALF * difference
        half[:, 1::2] = _HALF * mean - _HALF * difference
        halves.append(half)
    plane = np.empty((2 * low.shape[0], 2 * low.shape[1]))
    plane[::2] = _HALF * halves[0] + _HALF * halves[1]
    plane[1::2] = _HALF * halves[0] - _HALF * halves[1]
    return plane


def _to_yuv(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return YUV in 8-bit levels, h w 3, by the fixed-point formula of OpenCV's COLOR_BGR2YUV."""
    r, g, b = np.moveaxis(rgb.astype(np.int64), -1, 0)
    y = _rounded(4899 * r + 9617 * g + 1868 * b)
    return np.stack([y, _rounded(8061 * (b - y)) + 128, _rounded(14369 * (r - y)) + 128], -1).clip(0, 255)


def _to_rgb(yuv: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return RGB, h w 3, by the fixed-point formula of OpenCV's COLOR_YUV2BGR."""
    y, u, v = np.moveaxis(yuv, -1, 0)
    u, v = u - 128, v - 128
    rgb = np.stack([y + _rounded(18678 * v), y + _rounded(-6472 * u - 9519 * v), y + _rounded(33292 * u)], -1)
    return rgb.clip(0, 255).astype(np.uint8)


def _rounded(scaled: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide by 2**14 and round to the nearest."""
    return (scaled + 2**13) >> 14
