"""Options and kinds of arguments that several commands take."""

from pathlib import Path

import click

from dicomnode.model import Method

METHODS = click.Choice([m.value for m in Method])
FILE = click.Path(dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings file; node.toml in this folder where there is one.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
csv_option = click.option("--csv", "csv_path", type=FILE, help="Write slices to this file.")
png_option = click.option("--png", "png_path", type=FILE, help="Draw to this file.")
transform_option = click.option(
    "--transform", type=FILE, help="Write an ITK transform (.tfm), fixed to moving points."
)
registration_option = click.option(
    "--registration", type=FILE, help="Write a DICOM Spatial Registration, moving onto fixed."
)
model_option = click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Weight bundle; the one that came with the node.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, mps, cuda or cuda:N."
)
