"""The region table of a bundle: limits in body height, without anybody having marked one.

Body heights of landmarks that are found from HU alone are the fixed points. Between and a little
beyond them, limits are placed in proportion, as in the drawn adult of `dicomnode.core.anatomy` and
in published tables. Where no landmark is near, nothing is claimed.

Reads landmark positions and curves, gives `dicomnode.core.region.Region` values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dicomnode.core import anatomy
from dicomnode.core.region import Limit, Region, Support
from dicomnode.model import Floats

# Fewer patients than this do not tell where a landmark lies.
MIN_PATIENTS = 3
# Limits further outside the measured landmarks than this, mm of the drawn adult, are unsupported.
REACH_MM = 150.0
# Sd of a proportion, mm a mm of distance to the nearest landmark, at least: adults of one height
# differ by about a twentieth in the length of a segment, and the drawn adult is one of many.
# More where the landmarks themselves disagree by more (see `BodyMap.rate`).
LEAST_RATE = 0.1
# The middle of S1, below its upper end plate, the promontory: half of a vertebral body of 30 mm.
ZERO_MM = -15.0
# Between two limits of anatomy the body height changes by about as much as the distance.
RATE_RANGE = (0.5, 2.0)

# Scores of the public body-part regressor (bpreg 1.1.0, Schuhegger, Apache-2.0; its look-up table
# over some 2000 CT, 0 where the pelvis starts and 100 at the eyes): medians of marked landmarks.
BPREG = {"L5": 25.5, "L4": 29.4, "L3": 33.8, "L2": 37.8, "L1": 41.5, "T12": 45.0, "T11": 47.7,
         "T10": 51.1, "T9": 54.0, "T8": 56.9, "T5": 66.0, "T2": 73.4, "T1": 75.8, "C7": 77.9,
         "C5": 81.8, "C2": 87.2, "C1": 89.2}  # fmt: skip
BPREG_LANDMARKS = {
    "iliac_crest": 28.8,  # pelvis_end
    "lung_base": 44.1,  # lung_start
    "diaphragm_dome": 54.5,  # liver_end
    "lung_apex": 75.4,  # lung_end
}
_NAMES = (*(f"L{k}" for k in range(5, 0, -1)), *(f"T{k}" for k in range(12, 0, -1)),
          *(f"C{k}" for k in range(7, 0, -1)))  # fmt: skip
# Name -> lower and upper end, mm above the promontory, disc included.
VERTEBRAE = dict(
    zip(
        _NAMES,
        zip(
            (0.0, *np.cumsum(anatomy.LEVELS)[:-1].tolist()),
            np.cumsum(anatomy.LEVELS).tolist(),
            strict=True,
        ),
        strict=True,
    )
)
# Landmarks whose place in the drawn adult is known; others a finder may offer are not fixed
# points: arms move the shoulders, breathing and disease the level where the lungs are widest.
FIXED = ("femoral_heads", "iliac_crest", "lung_base", "carina", "lung_apex", "neck", "vertex")
# Where a finder that cannot be asked puts them, mm above the promontory. The neck is narrowest
# just below the laryngeal prominence, which lies at C4 in women, C5 in men (Mirjalili et al. 2012).
REFERENCE = {name: at_mm for name, at_mm in anatomy.LANDMARKS.items() if name in FIXED}
REFERENCE["neck"] = VERTEBRAE["C5"][1]
# A soft organ lies at its commonest level of one vertebra in 54 to 62 % of adults (hyoid, carotid
# bifurcation, thyroid cartilage, by CT: Mirjalili et al., Clin Anat 25:851, 2012): of a normal
# distribution, half a level is then 0.77 sd.
SOFT_SD_LEVELS = 0.5 / 0.77


@dataclass(frozen=True, slots=True)
class LandmarkHeight:
    """Where a landmark lies in the calibration's patients: median and robust sd between them."""

    height_mm: float
    sd_mm: float
    patients: int


@dataclass(frozen=True, slots=True)
class Point:
    """A level of the drawn adult.

    `at_mm` is above the promontory, `spread_mm` what is not known of it beside proportion (sd
    between patients of a soft organ, or how far two published tables disagree), and `landmark`
    names the landmark that it is.
    """

    at_mm: float
    spread_mm: float = 0.0
    landmark: str = ""


@dataclass(frozen=True, slots=True)
class BodyMap:
    """Height in the drawn adult, mm above the promontory -> body height, through landmarks.

    Straight between neighbouring landmarks; beyond the outermost by their common slope.
    """

    names: tuple[str, ...]
    at_mm: Floats  # (K,) in the drawn adult, increasing
    height_mm: Floats  # (K,) body height, increasing
    sd_mm: Floats  # (K,) of the body height of a landmark, between patients
    drawn_sd_mm: Floats  # (K,) of where the landmark lies in the drawn adult
    slope: float
    rate: float  # sd a mm of distance of what is placed in proportion

    def __call__(self, at_mm: float) -> float:
        """Return the body height of a level, mm."""
        beyond = min(at_mm - self.at_mm[0], 0.0) + max(at_mm - self.at_mm[-1], 0.0)
        return float(np.interp(at_mm, self.at_mm, self.height_mm) + self.slope * beyond)

    def sd(self, at_mm: float) -> float:
        """Return the sd between patients of the body height of a level, mm."""
        variances = (
            np.interp(at_mm, self.at_mm, self.sd_mm) ** 2,
            np.interp(at_mm, self.at_mm, self.drawn_sd_mm) ** 2,
            (self.rate * self.distance(at_mm)) ** 2,
        )
        return float(np.sqrt(sum(variances)))

    def distance(self, at_mm: float) -> float:
        """Return how far a level is from the landmarks that place it, mm.

        Between two, each at a distance: their product over their sum, as the variance of a
        bridge between fixed ends has it; half the lesser distance at most less than that.
        """
        d = np.abs(self.at_mm - at_mm)
        i = int(np.searchsorted(self.at_mm, at_mm))
        if 0 < i < len(d):
            return float(d[i - 1] * d[i] / (d[i - 1] + d[i]))
        return float(d.min())

    def reaches(self, at_mm: float) -> bool:
        """Whether a level is near enough to a landmark to be placed at all."""
        return bool(self.at_mm[0] - REACH_MM <= at_mm <= self.at_mm[-1] + REACH_MM)


def region_table(
    landmarks: Mapping[str, LandmarkHeight],
    residual_sd_mm: float,
    reference: Mapping[str, float] | None = None,
) -> list[Region]:
    """Return the regions of the body, part by part from the feet up, organs under their part.

    Parameters
    ----------
    landmarks
        Name -> body height. Those of `FIXED` with `MIN_PATIENTS` patients count.
    residual_sd_mm : float
        Of the map of scores to body heights; no limit is known better.
    reference
        Name -> height in the drawn adult, mm above the promontory, where a finder puts a
        landmark in it; `REFERENCE` where none is given.
    """
    body = body_map(landmarks, residual_sd_mm, reference)
    return [
        Region(name, code, meaning, _limit(low, body), _limit(high, body), part)
        for name, part, code, meaning, low, high in CATALOGUE
    ]


def zero(
    landmarks: Mapping[str, LandmarkHeight],
    residual_sd_mm: float,
    reference: Mapping[str, float] | None = None,
) -> tuple[float, float]:
    """Return the body height of the middle of S1 and its sd between patients, both mm.

    Raises
    ------
    ValueError
        If no landmark was found in enough patients.
    """
    body = body_map(landmarks, residual_sd_mm, reference)
    if body is None:
        raise ValueError(f"no landmark of {', '.join(FIXED)} in {MIN_PATIENTS} patients")
    return body(ZERO_MM), body.sd(ZERO_MM)


def body_map(
    landmarks: Mapping[str, LandmarkHeight],
    residual_sd_mm: float,
    reference: Mapping[str, float] | None = None,
) -> BodyMap | None:
    """Return the map through landmarks, None where there is none to go by.

    Landmarks that contradict the order of the body are left out, those of fewer patients first.
    """
    where = reference_heights(reference or REFERENCE)
    used = [
        name
        for name, found in landmarks.items()
        if name in where and found.patients >= MIN_PATIENTS
    ]
    kept: list[str] = []
    for name in sorted(used, key=lambda n: (-landmarks[n].patients, n)):
        trial = sorted([*kept, name], key=lambda n: where[n])
        heights = np.array([landmarks[n].height_mm for n in trial])
        if (np.diff(heights) > 0).all():
            kept = trial
    if not kept:
        return None
    at = np.array([where[n] for n in kept])
    height = np.array([landmarks[n].height_mm for n in kept])
    sd = np.array([max(landmarks[n].sd_mm, residual_sd_mm) for n in kept])
    # A median of n patients has itself a variance of pi / 2n (of a normal distribution).
    sd = sd * np.sqrt(1 + np.pi / 2 / np.array([landmarks[n].patients for n in kept]))
    slope = float(np.clip(np.polyfit(at, height, 1)[0], *RATE_RANGE)) if len(kept) > 1 else 1.0
    drawn_sd = np.array([_drawn_sd(n) for n in kept])
    rate = _rate(at, height, drawn_sd)
    return BodyMap(tuple(kept), at, height, sd, drawn_sd, slope, rate)


def reference_heights(found: Mapping[str, float]) -> dict[str, float]:
    """Return the heights of landmarks in the average adult, mm above the promontory.

    The mean of two: the drawn adult, and where bpreg's table has the landmark between the
    drawn vertebrae.
    """
    return {name: at_mm + _published_shift(name) for name, at_mm in found.items()}


def robust_height(values: Mapping[str, Sequence[float]]) -> LandmarkHeight:
    """Return the median over patients of a landmark; patient -> body height in each Series."""
    means = np.array([np.mean(v) for v in values.values()])
    median = float(np.median(means))
    # 1.4826: of a normal distribution, the sd a median absolute deviation.
    deviation = 1.4826 * float(np.median(np.abs(means - median)))
    return LandmarkHeight(median, deviation, len(means))


def _limit(point: Point, body: BodyMap | None) -> Limit:
    if body is None:
        return Limit(Support.UNSUPPORTED)
    if point.landmark in body.names:
        i = body.names.index(point.landmark)
        height, sd = float(body.height_mm[i]), float(body.sd_mm[i])
        return Limit(Support.LANDMARK, round(height, 1), round(sd, 1))
    if not body.reaches(point.at_mm):
        return Limit(Support.UNSUPPORTED)
    sd = float(np.hypot(body.sd(point.at_mm), point.spread_mm))
    return Limit(Support.PROPORTION, round(body(point.at_mm), 1), round(sd, 1))


def _rate(at: Floats, height: Floats, drawn_sd: Floats) -> float:
    """Return how well the landmarks place each other in proportion, sd a mm of distance.

    Each but the outermost is left out in turn and placed by the others. What the error exceeds
    the doubt about its place in the drawn adult grows with distance.
    """
    squares = []
    for left_out in range(1, len(at) - 1):
        rest = [i for i in range(len(at)) if i != left_out]
        told = np.interp(at[left_out], at[rest], height[rest])
        below, above = at[left_out] - at[left_out - 1], at[left_out + 1] - at[left_out]
        excess = max((told - height[left_out]) ** 2 - drawn_sd[left_out] ** 2, 0.0)
        squares.append(excess * ((below + above) / (below * above)) ** 2)
    return max(LEAST_RATE, float(np.sqrt(np.mean(squares))) if squares else 0.0)


def _bpreg_mm(score: float) -> float:
    """Return the height in the drawn adult of a score of bpreg, by its vertebrae."""
    middles = [float(np.mean(VERTEBRAE[name])) for name in BPREG]
    return float(np.interp(score, list(BPREG.values()), middles))


def _published_shift(name: str) -> float:
    """Return how far the mean of both tables lies above the drawn adult, mm."""
    if name not in BPREG_LANDMARKS:
        return 0.0
    return (_bpreg_mm(BPREG_LANDMARKS[name]) - anatomy.LANDMARKS[name]) / 2


def _drawn_sd(name: str) -> float:
    """Return how well the place of a landmark in the average adult is known, mm.

    Half of what two tables differ by; of soft parts that only one of them has, a share of a level.
    """
    if name in ("carina", "neck"):
        return _soft(REFERENCE[name]).spread_mm
    return abs(_published_shift(name))


def _landmark(name: str) -> Point:
    shift = _published_shift(name)
    return Point(anatomy.LANDMARKS[name] + shift, abs(shift), name)


def _organ(name: str, *, soft: bool = True) -> tuple[Point, Point]:
    """Return the ends of an organ of the drawn adult."""
    shape = next(s for s in anatomy.ORGANS if s.name == name)
    ends = [(k[0], k[3] if shape.kind == "tube" else 0.0) for k in shape.knots]
    low, high = min(h - radius for h, radius in ends), max(h + radius for h, radius in ends)
    return (_soft(low), _soft(high)) if soft else (Point(low), Point(high))


def _soft(at_mm: float) -> Point:
    level = next((v for v in VERTEBRAE.values() if v[0] <= at_mm < v[1]), None)
    size = level[1] - level[0] if level else (36.0 if at_mm < 0 else 17.0)
    return Point(at_mm, SOFT_SD_LEVELS * size)


def _catalogue() -> tuple[tuple[str, str, str, str, Point, Point], ...]:
    marks = anatomy.LANDMARKS
    crest, base, apex = _landmark("iliac_crest"), _landmark("lung_base"), _landmark("lung_apex")
    dome, vertex = _landmark("diaphragm_dome"), _landmark("vertex")
    dome = Point(dome.at_mm, float(np.hypot(dome.spread_mm, _soft(dome.at_mm).spread_mm)))
    seat, skull = Point(marks["ischial_tuberosities"]), Point(marks["skull_base"])
    knee = Point(-450.0)  # where the drawn adult ends, above the knee
    sacrum, brain = _organ("sacrum", soft=False), _organ("brain", soft=False)  # held by bone
    # In CT, from C4 or C5, the top of the thyroid cartilage, to C6 or C7, the cricoid's lower
    # border (Mirjalili et al. 2012).
    larynx = _soft(VERTEBRAE["C6"][0]), _soft(VERTEBRAE["C4"][0])
    liver = _organ("liver")[0], dome
    # Name, part, SNOMED CT code and meaning (PS3.16 CID 4), lower and upper end.
    return (
        ("thighs", "", "68367000", "Thigh", knee, seat),
        ("pelvis", "", "816092008", "Pelvis", seat, crest),
        ("hip joints", "pelvis", "24136001", "Hip joint", *_organ("femoral head", soft=False)),
        ("bladder", "pelvis", "89837001", "Bladder", *_organ("bladder")),
        ("sacrum", "pelvis", "54735007", "Sacrum", *sacrum),
        ("abdomen", "", "818981001", "Abdomen", crest, dome),
        ("lumbar spine", "abdomen", "122496007", "Lumbar spine",
            Point(VERTEBRAE["L5"][0]), Point(VERTEBRAE["L1"][1])),
        ("kidneys", "abdomen", "64033007", "Kidney", *_organ("kidney")),
        ("liver", "abdomen", "10200004", "Liver", *liver),
        ("pancreas", "abdomen", "15776009", "Pancreas", *_organ("pancreas")),
        ("spleen", "abdomen", "78961009", "Spleen", *_organ("spleen")),
        ("chest", "", "816094009", "Chest", base, apex),
        ("thoracic spine", "chest", "122495006", "Thoracic spine",
            Point(VERTEBRAE["T12"][0]), Point(VERTEBRAE["T1"][1])),
        ("lungs", "chest", "39607008", "Lung", base, apex),
        ("heart", "chest", "80891009", "Heart", *_organ("heart")),
        ("neck", "", "45048000", "Neck", apex, skull),
        ("thyroid", "neck", "69748006", "Thyroid", *_organ("thyroid")),
        ("cervical spine", "neck", "122494005", "Cervical spine",
            Point(VERTEBRAE["C7"][0]), Point(VERTEBRAE["C1"][1])),
        ("larynx", "neck", "4596009", "Larynx", *larynx),
        ("head", "", "69536005", "Head", skull, vertex),
        ("brain", "head", "12738006", "Brain", *brain),
    )  # fmt: skip


CATALOGUE = _catalogue()
