"""Image files: anything that PIL reads as RGB, the one geometry of the pipeline, PNG bytes."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000  # of one image: a small file may decode to gigabytes
Image.init()
# PIL tries one after the other; EPS is a program, which it would hand to Ghostscript.
_FORMATS = ["JPEG", "PNG", *sorted(set(Image.OPEN) - {"JPEG", "PNG", "EPS"})]
_RUN_LENGTHS = 3  # zlib's Z_RLE


class UnreadableImageError(ValueError):
    """A file that is set aside: the message is the reason."""


def read_rgb(path: Path, max_pixels: int) -> Image.Image:
    """Read an image as RGB, its EXIF rotation applied and transparency laid on white.

    Raises UnreadableImageError with the reason for anything that is no whole image of at most
    `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own limit and complaints; ours follows
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadableImageError(
                        f"{image.width} x {image.height} px is above {max_pixels} px"
                    )
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # PIL raises dozens of types for broken files
        raise UnreadableImageError(
            f"{type(error).__name__}: {error}".replace(str(path), path.name)
        ) from None
    return _to_rgb(upright)


def plain_rgb_suffix(path: Path) -> str | None:
    """Return .jpg or .png for a file whose bytes already are the upright RGB picture, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(path, formats=["JPEG", "PNG"])
        except UnidentifiedImageError:
            return None
        with opened as image:
            upright = image.getexif().get(0x0112, 1) == 1
            still = getattr(image, "n_frames", 1) == 1
            plain = image.mode == "RGB" and "transparency" not in image.info
            suffix = {"JPEG": ".jpg", "PNG": ".png"}.get(image.format or "")
            return suffix if plain and upright and still else None


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Return uint8 (size, size, 3): the shorter side scaled, anti-aliased, the centre cut out."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.array(image)


def read_square(path: Path, size: int) -> np.ndarray:
    """Read one of the pipeline's own RGB files as uint8 (size, size, 3)."""
    return decode_square(path.read_bytes(), size)


def decode_square(content: bytes, size: int) -> np.ndarray:
    """Decode the bytes of one of the pipeline's own RGB files as uint8 (size, size, 3)."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        return to_square(image.convert("RGB"), size)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W, 3) without loss; the same pixels give the same bytes.

    Run lengths alone take a fifth of the default's time and no more bytes: after PNG's filters,
    photographs hold hardly any longer repetition (docs/benchmarks.md, "Codec").
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_type=_RUN_LENGTHS)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        with np.errstate(invalid="ignore"):  # a NaN that signals
            values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UnreadableImageError("it holds values that are no finite numbers")
        top = values.max()
        most = 65535 if top > 255 else 1 if image.mode == "F" and top <= 1 else 255
        values = np.clip(values / most * 255, 0, 255).round()
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def pixels_digest(image: Image.Image) -> str:
    """Return 32 hex digits that identify an RGB picture, however it was encoded."""
    pixels = np.asarray(image)
    content = f"{pixels.shape}".encode() + pixels.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
