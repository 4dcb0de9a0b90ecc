"""Where voxels lie: affines, spacings and world coordinates, in one convention.

An affine is a 4x4 float64 matrix that takes voxel indices in the order (x, y, z) to millimetres in the RAS
frame (nibabel's convention). Arrays are indexed [z, y, x], so scales that go with arrays are reversed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import StudyError

Affine = NDArray[np.float64]

# The volume of the parallelepiped that the three unit column directions span: 1 when they are orthogonal,
# 0 when they lie in a plane. 1e-3 is far flatter than any gantry tilt, far above rounding in float32.
FLATTEST = 1e-3
SPACING_RANGE_MM = (1e-6, 1e6)


def check_affine(affine: ArrayLike | None) -> Affine:
    """The affine as float64, when it places voxels in space.

    Raises StudyError("geometry") when it is missing (None), not 4x4, not finite, or singular: a voxel axis of
    (almost) no length, or three axes that lie (almost) in one plane.
    """
    if affine is None:
        raise StudyError(
            "geometry",
            "the affine is missing (sform_code and qform_code are both 0), so nothing says where the voxels "
            "lie; set one of the two codes to 1 or more if the stored transform is right",
        )
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise StudyError("geometry", f"the affine has the shape {matrix.shape}; expected (4, 4)")
    if not np.isfinite(matrix).all():
        raise StudyError("geometry", "the affine holds NaN or infinite numbers; expected 16 finite ones")
    if not np.array_equal(matrix[3], (0.0, 0.0, 0.0, 1.0)):
        raise StudyError("geometry", "the last row of the affine is not 0 0 0 1")
    _check_axes(matrix)
    return matrix


def _check_axes(matrix: Affine) -> None:
    spacing = spacing_of(matrix)
    shown = ", ".join(f"{s:g}" for s in spacing)
    low, high = SPACING_RANGE_MM
    if not all(low <= s <= high for s in spacing):
        raise StudyError("geometry", f"the affine is singular: its voxel sizes are {shown} mm; expected all above zero")
    flatness = abs(float(np.linalg.det(matrix[:3, :3] / np.asarray(spacing))))
    if flatness < FLATTEST:
        raise StudyError(
            "geometry",
            f"the affine is singular: its three voxel axes lie in one plane (they span {flatness:.1g} of "
            "what orthogonal axes would); correct the header",
        )


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Voxel sizes (x, y, z) in mm: the lengths of the affine's columns."""
    x, y, z = np.hypot(np.hypot(affine[0, :3], affine[1, :3]), affine[2, :3])
    return float(x), float(y), float(z)


def voxel_volume_mm3(affine: Affine) -> float:
    """The volume of one voxel in cubic millimetres; right for sheared axes too."""
    return abs(float(np.linalg.det(affine[:3, :3])))


def to_world(affine: Affine, index_zyx: ArrayLike) -> NDArray[np.float64]:
    """World coordinates (x, y, z) in mm RAS of voxel positions given as (..., 3) in the order z, y, x.

    A whole number is the centre of a voxel, so a structure's mean index gives its centroid.
    """
    index = np.asarray(index_zyx, dtype=np.float64)[..., ::-1]
    moved: NDArray[np.float64] = index @ affine[:3, :3].T + affine[:3, 3]
    return moved


def corners(affine: Affine, shape_zyx: Sequence[int]) -> NDArray[np.float64]:
    """World coordinates (8, 3) in mm of the centres of a volume's corner voxels."""
    ends = np.asarray(shape_zyx, dtype=np.float64) - 1
    return to_world(affine, np.indices((2, 2, 2)).reshape(3, 8).T * ends)


def furthest_corner_mm(first: Affine, second: Affine, shape_zyx: Sequence[int]) -> float:
    """How far apart two affines put the same corner voxel of a volume, at worst, in mm."""
    apart = corners(first, shape_zyx) - corners(second, shape_zyx)
    return float(np.sqrt((apart**2).sum(axis=1)).max())


def ome_scale(affine: Affine) -> tuple[float, float, float]:
    """The scale (z, y, x) in mm that OME-Zarr can say of an affine: its column lengths, reversed."""
    x, y, z = spacing_of(affine)
    return z, y, x


def ome_translation(affine: Affine) -> tuple[float, float, float]:
    """The translation (z, y, x) in mm that OME-Zarr can say of an affine: where voxel 0 lies, reversed."""
    x, y, z = affine[:3, 3]
    return float(z), float(y), float(x)


def affine_from_ome(scale_zyx: Sequence[float], translation_zyx: Sequence[float]) -> Affine:
    """diag(scale) and translation of an OME-Zarr, both (z, y, x) in mm, as an affine over (x, y, z)."""
    affine = np.diag([*reversed(scale_zyx), 1.0]).astype(np.float64)
    affine[:3, 3] = tuple(reversed(translation_zyx))
    return affine
