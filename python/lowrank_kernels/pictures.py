"""Pictures as numbers in 0..1, masks of what is observed, and their writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .files import InputError, PathLike, check_output, extra, read_head, write_atomically
from .tables import read_npy

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_picture(path: PathLike, alpha_mask: bool = False) -> NDArray[np.float64]:
    """Read a picture as numbers in 0..1: ``(H, W)`` grey or ``(H, W, 3)`` colour; palettes are converted.

    With ``alpha_mask`` fully transparent pixels are missing (NaN) and others are taken as they are; without it a picture
    with transparent pixels is refused, since what a pixel under them is worth is a choice. 16-bit grey keeps its depth.
    """
    image = _open_picture(path)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA" if image.mode not in ("LA", "La") else "LA")
        alpha = np.asarray(image.getchannel("A"))
        image = image.convert("L" if image.mode == "LA" else "RGB")
        if (alpha < 255).any() and not alpha_mask:
            raise InputError(
                f"{path}: {int((alpha < 255).sum())} pixels are transparent; pass --alpha-mask to take fully transparent "
                "pixels as missing, or flatten the picture: magick in.png -background white -alpha remove out.png"
            )
        hidden = alpha == 0
    else:
        hidden = np.zeros((image.height, image.width), dtype=bool)
    array = _picture_array(path, image)
    if hidden.all():
        raise InputError(f"{path}: every pixel is transparent; at least one observed pixel is needed")
    array[hidden] = np.nan
    return array


def _open_picture(path: PathLike) -> Any:
    pil, ops = extra("PIL.Image", "reading pictures"), extra("PIL.ImageOps", "reading pictures")
    read_head(path)
    try:
        image = pil.open(path)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{path}: one picture was wanted, got an animation of {frames} frames; save one of them")
        image.load()
        return ops.exif_transpose(image)
    except pil.UnidentifiedImageError:
        raise InputError(f"{path}: a picture was wanted, the content is of no picture format known to Pillow") from None
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as a picture: {str(error).splitlines()[0]}") from error


def _picture_array(path: PathLike, image: Any) -> NDArray[np.float64]:
    if image.mode.startswith("I"):  # 16 bits a pixel; older Pillow opens them as 32-bit "I"
        array = np.asarray(image).astype(np.float64)
        if array.max() > 65535 or array.min() < 0:
            raise InputError(f"{path}: at most 16 bits a pixel were wanted, got values from {array.min():g} to {array.max():g}")
        return array / 65535
    if image.mode == "F":
        array = np.asarray(image).astype(np.float64)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError(f"{path}: a floating-point picture must hold values in 0..1")
        return array
    grey = image.mode in ("1", "L") or (image.mode == "P" and _grey_palette(image))
    return np.asarray(image.convert("L" if grey else "RGB")).astype(np.float64) / 255


def _grey_palette(image: Any) -> bool:
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def read_mask(path: PathLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Read which pixels or cells are observed: a picture (white, that is at least half bright) or a 0/1 .npy of ``shape``."""
    if str(path).lower().endswith(".npy"):
        values = read_npy(path).values
        if not np.isin(values, (0, 1)).all():
            raise InputError(f"{path}: a mask of 0 (missing) and 1 (observed) was wanted, got other values too")
        mask = values == 1
    else:
        image = _open_picture(path)
        mask = np.asarray(image.convert("RGB").convert("L")) >= 128 if image.mode != "L" else np.asarray(image) >= 128
    if mask.shape != tuple(shape):
        raise InputError(
            f"{path}: a mask of {shape[0]} rows x {shape[1]} columns was wanted, got {mask.shape[0]} x {mask.shape[1]}"
        )
    if not mask.any():
        raise InputError(f"{path}: the mask marks nothing as observed (white: observed, black: missing)")
    return mask


def write_picture(path: PathLike, picture: NDArray[Any], overwrite: bool = False) -> None:
    """Write ``(H, W)`` or ``(H, W, 3)`` numbers, clipped to 0..1, as an 8-bit PNG; NaN becomes black."""
    check_output(path, overwrite, (".png",))
    pil = extra("PIL.Image", "writing pictures")
    pixels = np.rint(np.clip(np.nan_to_num(picture, nan=0.0), 0, 1) * 255).astype(np.uint8)
    write_atomically(path, lambda handle: pil.fromarray(pixels).save(handle, format="PNG"), overwrite)
