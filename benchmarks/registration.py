"""Rigid registration by SimpleITK and elastix, started with and without our offset.

The worked example of `docs/registration.md`. Each registration is started three times: where the
headers say the two scans lie, with both middles on each other (what ITK's and elastix's own
initialization does), and where `dicomnode.align` says.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import itk
import numpy as np
import SimpleITK
from rich.console import Console
from rich.table import Table

import dicomnode
from dicomnode.model import Floats, Method, OffsetStatus

PAIR = Path(__file__).parents[1].parent / "shared" / "ct" / "ACRIN-FLT-Breast_001"
# 4 mm is enough to find a pose, and a sixteenth of the voxels of a 512 matrix.
PIXEL_MM = 4.0
LEVELS = 3
# Two scans may share as little as the end of one: elastix gives up below a quarter by default.
VALID_SAMPLES = 0.05
ITERATIONS = {"SimpleITK": 100, "elastix": 256}  # a level, at most; elastix takes all of them
SAMPLED = 0.05

Point = Sequence[float]
ELASTIX = itk.ElastixRegistrationMethod  # named here, since it loads for seconds where first named


@dataclass(frozen=True, slots=True)
class Run:
    """What one registration came to; `offset_mm` is None where it failed."""

    tool: str
    start: str
    start_mm: float  # the offset it was started with
    iterations: int = 0
    metric: float | None = None  # mutual information, negative: the lower the better
    offset_mm: float | None = None  # where the middle of the moving scan came to lie
    seconds: float = 0.0
    failed: str = ""


def starts(
    fixed: SimpleITK.Image, moving: SimpleITK.Image, offset: dicomnode.Offset
) -> dict[str, SimpleITK.TranslationTransform]:
    """Return transforms to start from, from fixed to moving points."""
    apart = np.array(middle(moving)) - middle(fixed)
    return {
        "headers": SimpleITK.TranslationTransform(3),
        "middles": SimpleITK.TranslationTransform(3, apart.tolist()),
        "dicomnode": dicomnode.to_sitk_transform(offset),
    }


def by_simpleitk(
    fixed: SimpleITK.Image,
    moving: SimpleITK.Image,
    start: SimpleITK.TranslationTransform,
    iterations: int = ITERATIONS["SimpleITK"],
) -> dict[str, Any]:
    """Register by `ImageRegistrationMethod`, and return what a `Run` says of it."""
    rigid = SimpleITK.Euler3DTransform()
    rigid.SetCenter(middle(fixed))
    rigid.SetTranslation(start.GetOffset())
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(SAMPLED, 1)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(4.0, 0.05, iterations, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([8, 4, 0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(rigid)  # in place
    count = 0

    def note() -> None:
        nonlocal count
        count += 1

    method.AddCommand(SimpleITK.sitkIterationEvent, note)
    try:
        method.Execute(fixed, moving)
    except RuntimeError as exc:
        return {"iterations": count, "failed": _last_line(str(exc))}
    offset_mm = _offset_mm(rigid.TransformPoint, middle(moving))
    return {"iterations": count, "metric": method.GetMetricValue(), "offset_mm": offset_mm}


def by_elastix(
    fixed: SimpleITK.Image,
    moving: SimpleITK.Image,
    start: SimpleITK.TranslationTransform,
    iterations: int = ITERATIONS["elastix"],
) -> dict[str, Any]:
    """Register by elastix' rigid parameters, and return what a `Run` says of it."""
    parameters = itk.ParameterObject.New()
    values = parameters.GetDefaultParameterMap("rigid", LEVELS)
    values["AutomaticTransformInitialization"] = ["false"]
    values["MaximumNumberOfIterations"] = [str(iterations)]
    values["RequiredRatioOfValidSamples"] = [str(VALID_SAMPLES)]
    values["RandomSeed"] = ["1"]
    values["WriteResultImage"] = ["false"]
    parameters.AddParameterMap(values)
    with tempfile.TemporaryDirectory(prefix="dicomnode-elastix-") as folder:
        method = ELASTIX.New(_to_itk(fixed), _to_itk(moving))
        method.SetParameterObject(parameters)
        translation = itk.TranslationTransform[itk.D, 3].New()
        translation.SetOffset(start.GetOffset())
        method.SetExternalInitialTransform(translation)
        method.SetOutputDirectory(folder)
        method.SetLogFileName("elastix.log")
        method.LogToFileOn()
        try:
            method.Update()
            failed = False
        except RuntimeError:
            failed = True
        log = (Path(folder) / "elastix.log").read_text()
    if failed:
        return {"failed": next((x for x in log.splitlines() if "ITK ERROR" in x), "see its log")}
    metric = float(log.split("Final metric value")[1].split("=")[1].split()[0])
    # It maps fixed points by the start, then by what it found.
    transform = method.GetCombinationTransform()
    offset_mm = _offset_mm(transform.TransformPoint, middle(moving))
    return {"iterations": LEVELS * iterations, "metric": metric, "offset_mm": offset_mm}


def read(folder: Path) -> SimpleITK.Image:
    """Return the one CT Series of a folder, in HU, averaged in plane to about 4 mm."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = SimpleITK.Cast(reader.Execute(), SimpleITK.sitkFloat32)
    # elastix gets array, spacing and origin from here: the direction must be the identity.
    image = SimpleITK.DICOMOrient(image, "LPS")
    shrink = [max(1, round(PIXEL_MM / mm)) for mm in image.GetSpacing()[:2]]
    return SimpleITK.Clamp(SimpleITK.BinShrink(image, [*shrink, 1]), lowerBound=-1000)


def middle(image: SimpleITK.Image) -> Point:
    """Return the middle of an image, x, y, z in mm."""
    index = [(n - 1) / 2 for n in image.GetSize()]
    point: Point = image.TransformContinuousIndexToPhysicalPoint(index)
    return point


def _offset_mm(to_moving: Callable[[Point], Point], moving_point: Point) -> float:
    """Return z_fixed - z_moving of a point, given the transform the other way round."""
    target = np.array(moving_point)
    point: Floats = target.copy()
    for _ in range(50):  # converges where the rotation is well below a radian
        point = point + target - np.array(to_moving(point.tolist()))
    return float(point[2] - target[2])


def _to_itk(image: SimpleITK.Image) -> Any:
    converted = itk.image_from_array(SimpleITK.GetArrayFromImage(image))
    converted.SetSpacing(image.GetSpacing())
    converted.SetOrigin(image.GetOrigin())
    return converted


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


TOOLS = {"SimpleITK": by_simpleitk, "elastix": by_elastix}
_folder = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("fixed", type=_folder, default=PAIR / "C_vertex-to-thorax")
@click.argument("moving", type=_folder, default=PAIR / "A_thorax")
@click.option("--method", type=click.Choice([str(m) for m in Method]), help="Of the offset.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(fixed: Path, moving: Path, method: str | None, as_json: bool) -> None:
    """Register two folders of one Series each, started with and without our offset.

    \b
    Example:  python -m benchmarks.registration 2024/CT 2023/CT
    """
    begun = time.perf_counter()
    curves = [dicomnode.score_series(folder) for folder in (fixed, moving)]
    offset = dicomnode.align(*curves, **({"method": method} if method else {}))
    if offset is None or offset.status is OffsetStatus.REFUSED:
        raise click.ClickException("no offset of these two")
    seconds = time.perf_counter() - begun
    images = [read(folder) for folder in (fixed, moving)]
    runs = []
    for tool, register in TOOLS.items():
        for start, transform in starts(*images, offset).items():
            begun = time.perf_counter()
            result = register(*images, transform)
            took = time.perf_counter() - begun
            runs.append(Run(tool, start, 0.0 - transform.GetOffset()[2], seconds=took, **result))
    if as_json:
        answer = {"offset_mm": offset.offset_mm, "method": str(offset.method), "seconds": seconds}
        click.echo(json.dumps({"dicomnode": answer, "runs": [asdict(r) for r in runs]}, indent=1))
        return
    table = Table("tool", "start", "start mm", "iterations", "metric", "offset mm", "s")
    for r in runs:
        if r.metric is None or r.offset_mm is None:
            table.add_row(r.tool, r.start, f"{r.start_mm:.1f}", f"failed: {r.failed}")
        else:
            figures = (f"{r.metric:.3f}", f"{r.offset_mm:.1f}", f"{r.seconds:.1f}")
            table.add_row(r.tool, r.start, f"{r.start_mm:.1f}", str(r.iterations), *figures)
    console = Console()
    console.print(f"{offset.method} of dicomnode: {offset.offset_mm:.1f} mm, in {seconds:.1f} s")
    console.print(table)


if __name__ == "__main__":
    main()
