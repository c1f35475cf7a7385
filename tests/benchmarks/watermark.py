"""How well watermarks survive, as the table of docs/operate.md: python -m tests.benchmarks.watermark

Three pictures of 512 x 512 pixels are drawn here by numpy and Pillow; they are no photographs. Each carries the 48 bits
of SDXL's watermark.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldm.safety.watermark import SDXL, detect, write

SIZE = 512
Change = Callable[[Image.Image], Image.Image]


def landscape() -> Image.Image:
    """A smooth sky with a sun, and hills with fine texture."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    picture = np.stack([90 + 150 * y, 140 + 60 * y, 230 - 60 * y], -1)
    picture[(x - 0.7) ** 2 + (y - 0.25) ** 2 < 0.006] = (255, 230, 120)
    grain = np.random.default_rng(0).normal(0, 12, (SIZE, SIZE, 1))
    for base, height, waves, color in ((0.6, 0.08, 3, (70, 110, 90)), (0.75, 0.05, 5, (50, 90, 40))):
        hill = y > base + height * np.sin(2 * np.pi * waves * x)
        picture[hill] = (np.array(color) + grain)[hill]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def clouds() -> Image.Image:
    """Colored noise with the spectrum of photographs: the amplitude falls as 1 / frequency."""
    rng = np.random.default_rng(1)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing="ij"))
    frequency[0, 0] = 1
    waves = np.stack([np.fft.irfft2(np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) / frequency) for _ in range(3)], -1)
    waves = waves @ np.array([[1, 1, 1], [0.4, 0, -0.4], [-0.15, 0.3, -0.15]])  # brightness varies most
    return Image.fromarray((128 + 45 * waves / waves.std()).clip(0, 255).astype(np.uint8))


def poster() -> Image.Image:
    """Flat shapes in strong colors with sharp edges, and fine stripes."""
    picture = Image.new("RGB", (SIZE, SIZE), (245, 240, 220))
    draw, rng = ImageDraw.Draw(picture), np.random.default_rng(2)
    for _ in range(40):
        x, y, w, h = rng.integers(0, 400), rng.integers(0, 400), *rng.integers(20, 140, 2)
        color = tuple(int(level) for level in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=color)
    for x in range(0, SIZE, 6):
        draw.line((x, 440, x, 500), fill=(20, 20, 20), width=2)
    return picture.filter(ImageFilter.GaussianBlur(0.5))


PICTURES = {"landscape": landscape, "clouds": clouds, "poster": poster}


def saved(format: str, **options: int) -> Change:
    """Return a change that writes the picture as a file and reads it again."""

    def change(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, format, **options)
        return Image.open(file).convert("RGB")

    return change


def resized(percent: int) -> Change:
    """Return a change that scales the picture, and back to its first size, which the reader needs."""
    side = SIZE * percent // 100
    return lambda picture: picture.resize((side, side), Image.Resampling.BICUBIC).resize((SIZE, SIZE))


CHANGES: dict[str, Change] = {
    "PNG": lambda picture: picture,
    **{f"JPEG {quality}": saved("JPEG", quality=quality, subsampling=2) for quality in (95, 90, 80, 70, 60, 50)},
    **{f"WebP {quality}": saved("WEBP", quality=quality) for quality in (90, 80, 50)},
    **{f"resized to {percent} % and back": resized(percent) for percent in (75, 50)},
    "16 pixels cropped on the left": lambda picture: picture.crop((16, 0, SIZE, SIZE)),
    "10 % cropped on all sides": lambda picture: picture.crop((51, 51, SIZE - 51, SIZE - 51)),
}


def psnr(picture: Image.Image, marked: Image.Image) -> float:
    """Return the peak signal-to-noise ratio over all channels, in dB."""
    error = np.asarray(picture, np.float64) - np.asarray(marked)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def lines() -> Iterator[str]:
    """Yield the lines of the table: the matching bits of 48, for landscape / clouds / poster."""
    methods = ("dwtDctSvd", "dwtDct")
    pictures = [draw() for draw in PICTURES.values()]
    marked = {method: [write(picture, SDXL, method) for picture in pictures] for method in methods}
    yield "| change | dwtDctSvd | dwtDct |"
    yield "| --- | --- | --- |"
    noise = [
        " / ".join(f"{psnr(a, b):.1f}" for a, b in zip(pictures, marked[method], strict=True)) for method in methods
    ]
    yield f"| PSNR of the marked picture, dB | {' | '.join(noise)} |"
    for name, change in CHANGES.items():
        bits = [" / ".join(str(detect(change(p), SDXL, m).matched) for p in marked[m]) for m in methods]
        yield f"| {name} | {' | '.join(bits)} |"


if __name__ == "__main__":
    print(*lines(), sep="\n")
