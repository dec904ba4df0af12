"""The average adult as tables of shapes by height: what every phantom is made from.

All lengths are mm: x grows to patient left, y to posterior (both from the middle of the trunk),
height to the head from the promontory (top of S1). Shapes are painted in order, later ones over
earlier ones, so that the tables read from the skin inwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dicomnode.model import Floats

Knot = tuple[float, ...]
Knots = tuple[Knot, ...]

AIR, LUNG, FAT, MUSCLE, MARROW, CORTEX = -1000.0, -865.0, -100.0, 52.0, 190.0, 800.0  # HU

# From the feet to the head.
LANDMARKS = {
    "ischial_tuberosities": -155.0,
    "symphysis": -115.0,
    "femoral_heads": -88.0,
    "promontory": 0.0,
    "iliac_crest": 48.0,
    "lung_base": 188.0,
    "diaphragm_dome": 278.0,
    "carina": 372.0,
    "aortic_arch": 396.0,
    "lung_apex": 474.0,
    "chin": 520.0,
    "skull_base": 590.0,
    "vertex": 735.0,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One organ: its substance, and how a slice at any height cuts it.

    `knots` are rows, interpolated in between, that start with the height:

    - stack: (height, x, y, half width, half depth), an ellipse at each height; the squares of the
      half axes are interpolated, so that a stack that ends in 0 has a round end
    - blade: (height, half thickness, x0, y0, x1, y1, ...), a bent plate at each height
    - tube: (height, x, y, radius), a round 3-D curve through the knots; one knot is a ball
    """

    name: str
    kind: Literal["stack", "blade", "tube"]
    hu: float
    knots: Knots
    pair: bool = False  # drawn again at -x
    shell: tuple[float, float] | None = None  # thickness of the wall in mm, HU inside it
    square: float = 0.0  # of a stack: from an ellipse (0) to its bounding rectangle (1)
    enhance: float = 0.0  # HU added by full contrast
    free: float = 0.0  # sd in mm of where a patient has it
    breath: float = 0.0  # share of the motion of the diaphragm
    within: str = ""  # name of an earlier shape, or "diaphragm", that bounds it


# fmt: off
# Muscle; the fat and skin of a patient are laid around it.
OUTLINES = (
    Shape("thigh", "stack", MUSCLE, (
        (-450, 82, 0, 60, 66), (-250, 86, 2, 72, 80), (-170, 92, 5, 78, 90), (-110, 98, 8, 70, 88),
        (-60, 104, 18, 40, 60), (-30, 104, 20, 0, 0)), pair=True),
    Shape("buttock", "stack", MUSCLE, (
        (-200, 70, 45, 0, 0), (-150, 70, 50, 56, 58), (-90, 72, 52, 66, 62), (-20, 66, 56, 54, 48),
        (20, 60, 56, 0, 0)), pair=True),
    Shape("trunk", "stack", MUSCLE, (
        (-172, 0, 15, 0, 0), (-120, 0, 6, 156, 92), (-85, 0, 6, 164, 98), (-30, 0, 6, 152, 100),
        (40, 0, 2, 138, 99), (110, 0, 0, 136, 99), (180, 0, 0, 143, 105), (260, 0, 2, 153, 112),
        (340, 0, 6, 160, 112), (395, 0, 10, 168, 102), (425, 0, 14, 192, 88), (450, 0, 16, 182, 74),
        (468, 0, 16, 125, 66), (485, 0, 14, 70, 60), (500, 0, 12, 59, 57), (545, 0, 12, 58, 58),
        (575, 0, 15, 50, 60), (592, 0, 15, 0, 0)), square=0.67),
    Shape("head", "stack", MUSCLE, (
        (512, 0, -35, 0, 0), (530, 0, -34, 46, 48), (560, 0, -15, 64, 84), (600, 0, -2, 72, 98),
        (645, 0, 0, 77, 99), (690, 0, 2, 68, 88), (720, 0, 4, 44, 57), (735, 0, 4, 0, 0))),
    Shape("nose", "tube", MUSCLE, ((598, 0, -96, 5), (570, 0, -104, 12))),
)
# By where the patient holds them: the muscle, which is an outline too, then bones.
ARMS: dict[str, tuple[Shape, ...]] = {
    "down": (
        Shape("arm", "tube", MUSCLE, (
            (425, 172, 12, 44), (300, 206, 18, 42), (130, 216, 14, 40), (-60, 206, -16, 26),
            (-190, 190, -40, 22)), pair=True),
        Shape("humerus", "tube", CORTEX, (
            (425, 166, 10, 22), (390, 178, 14, 13), (150, 210, 20, 12), (125, 212, 20, 22)),
            pair=True, shell=(4, 20)),
        Shape("radius", "tube", CORTEX, ((115, 226, 4, 9), (-70, 216, -24, 9)), pair=True,
            shell=(4, 60)),
        Shape("ulna", "tube", CORTEX, ((125, 206, 20, 10), (-70, 200, -10, 7)), pair=True,
            shell=(4, 60)),
    ),
    "up": (
        Shape("arm", "tube", MUSCLE, (
            (425, 172, 12, 44), (480, 176, 8, 44), (640, 158, -6, 40), (800, 130, -30, 30)),
            pair=True),
        Shape("humerus", "tube", CORTEX, (
            (425, 160, 10, 22), (460, 170, 10, 14), (690, 152, -10, 12), (720, 150, -12, 22)),
            pair=True, shell=(4, 20)),
    ),
}
# Wall of the trunk, belly, chest, vessels, neck, head, then the bones of trunk and hips.
ORGANS = (
    Shape("septum of the thigh", "blade", FAT, (
        (-450, 1.5, 60, -40, 84, -8, 70, 45), (-160, 1.5, 52, -50, 88, -22, 66, 50),
        (-120, 0, 70, -50, 90, -40, 70, 50)), pair=True),
    Shape("gluteal fat", "blade", FAT, (
        (-150, 2, 50, 60, 78, 48, 118, 40), (-60, 3, 48, 88, 92, 62, 128, 18),
        (-10, 2, 60, 84, 92, 60, 120, 22)), pair=True),
    Shape("natal cleft", "blade", AIR, ((-205, 2, 0, 80, 0, 116), (-90, 2, 0, 102, 0, 116),
        (-60, 0, 0, 112, 0, 116))),
    Shape("back", "blade", FAT, (
        (-20, 1, 16, 84, 40, 96, 72, 88), (60, 1.5, 20, 66, 52, 74, 76, 64),
        (180, 1.5, 16, 88, 40, 96, 72, 88), (420, 1.5, 12, 88, 40, 98, 78, 92),
        (470, 0, 10, 66, 28, 68, 44, 52)), pair=True),
    Shape("linea alba", "blade", FAT, ((-90, 0, 0, -90, 0, -80), (40, 2, 0, -98, 0, -84),
        (250, 1, 0, -112, 0, -100))),
    Shape("ischiorectal fat", "stack", FAT, (
        (-160, 36, 52, 0, 0), (-125, 36, 54, 18, 24), (-85, 36, 60, 16, 18), (-60, 36, 60, 0, 0)),
        pair=True),
    Shape("groin", "stack", FAT, (
        (-290, 62, -30, 0, 0), (-200, 60, -52, 12, 14), (-120, 74, -70, 24, 14),
        (-70, 88, -76, 0, 0)), pair=True),
    Shape("axilla", "stack", FAT, (
        (320, 146, 0, 0, 0), (370, 146, -8, 14, 30), (405, 140, -14, 26, 34),
        (432, 120, -14, 0, 0)), pair=True),
    Shape("cavity", "stack", FAT, (
        (-122, 0, 5, 0, 0), (-95, 0, 2, 56, 52), (-50, 0, -4, 68, 68), (-15, 0, -12, 104, 74),
        (40, 0, -12, 119, 79), (120, 0, -12, 122, 80), (200, 0, -8, 129, 88), (270, 0, 0, 134, 98),
        (350, 0, 2, 134, 96), (400, 0, 6, 118, 78), (440, 0, 14, 84, 54), (465, 0, 18, 52, 36),
        (482, 0, 20, 0, 0)), square=0.56),
    Shape("bladder", "stack", 6, (
        (-116, 0, -18, 0, 0), (-100, 0, -20, 32, 24), (-80, 0, -22, 40, 30), (-62, 0, -24, 0, 0)),
        shell=(3, 4), free=4),
    Shape("pelvic floor", "stack", MUSCLE, (
        (-150, 0, 5, 12, 18), (-118, 0, 8, 26, 22), (-100, 0, 15, 22, 14), (-60, 0, 16, 26, 14),
        (-48, 0, 10, 0, 0)), free=2),
    Shape("rectum", "tube", 45, (
        (-150, 0, 48, 10), (-115, 0, 38, 16), (-70, 2, 50, 18), (-35, 10, 40, 15),
        (-20, 32, 15, 13), (-30, 62, -8, 13), (-5, 92, -10, 14)), shell=(3, -30), free=2),
    Shape("ascending colon", "tube", 40, (
        (-30, -86, -38, 22), (20, -96, -22, 24), (90, -98, -8, 21), (118, -92, -22, 20)),
        shell=(3, -60), free=2),
    Shape("transverse colon", "tube", 40, (
        (112, -84, -40, 17), (84, -35, -68, 17), (80, 30, -70, 16), (130, 82, -50, 16),
        (192, 98, 2, 15)), shell=(3, -150), free=2),
    Shape("descending colon", "tube", 40, (
        (192, 100, 5, 14), (100, 104, 18, 13), (20, 102, 2, 13), (-5, 94, -10, 13)),
        shell=(3, -40), free=2),
    Shape("spleen", "stack", 48, (
        (172, 100, 32, 0, 0), (190, 100, 38, 20, 32), (225, 90, 45, 32, 38), (255, 75, 40, 32, 34),
        (270, 66, 30, 0, 0)), enhance=75, free=4, breath=1, within="cavity"),
    Shape("stomach", "tube", 42, (
        (246, 50, 22, 28), (222, 62, -5, 34), (192, 54, -36, 31), (164, 16, -52, 21),
        (160, -18, -42, 14), (140, -34, -10, 12)), shell=(5, 15), free=2, breath=1),
    Shape("pancreas", "tube", 40, (
        (130, -22, -22, 13), (158, -4, -24, 10), (172, 30, -8, 10), (195, 72, 24, 9)),
        enhance=60, free=2, breath=0.6),
    Shape("liver", "stack", 56, (
        (92, -92, 0, 0, 0), (120, -86, -5, 24, 48), (160, -74, -8, 46, 70), (195, -58, -10, 66, 84),
        (230, -46, -8, 88, 88), (262, -46, -4, 92, 84), (282, -56, 0, 60, 60), (290, -58, 0, 0, 0)),
        enhance=60, free=4, breath=1, within="cavity"),
    Shape("gallbladder", "stack", 8, (
        (128, -58, -58, 0, 0), (145, -54, -48, 13, 18), (168, -46, -36, 9, 12),
        (178, -42, -30, 0, 0)), free=3, breath=1),
    Shape("portal vein", "tube", 40, (
        (160, -12, -14, 7), (182, -30, -20, 7), (198, -62, -14, 5), (222, -95, -5, 3)),
        enhance=130, breath=1),
    Shape("kidney", "stack", 34, (
        (88, 60, 30, 0, 0), (104, 60, 34, 22, 24), (140, 56, 40, 27, 29), (172, 50, 44, 24, 25),
        (190, 46, 46, 0, 0)), pair=True, enhance=150, free=3, breath=0.5),
    Shape("renal sinus", "stack", -70, (
        (118, 46, 34, 0, 0), (140, 42, 34, 14, 8), (160, 42, 38, 0, 0)), pair=True, breath=0.5),
    Shape("psoas", "stack", 56, (
        (188, 26, 42, 0, 0), (150, 33, 34, 12, 16), (60, 44, 26, 20, 24), (0, 52, 8, 19, 21),
        (-60, 76, -32, 17, 18), (-110, 92, -36, 15, 18), (-150, 104, 0, 0, 0)), pair=True),
    Shape("lungs", "stack", LUNG, (
        (150, 0, -8, 124, 84), (200, 0, -8, 126, 85), (270, 0, 0, 131, 95), (350, 0, 2, 131, 93),
        (400, 0, 6, 115, 75), (440, 0, 14, 81, 51), (465, 0, 18, 48, 33), (478, 0, 20, 0, 0)),
        square=0.56, within="diaphragm"),
    Shape("mediastinum", "stack", -75, (
        (240, 28, -36, 0, 0), (254, 26, -34, 46, 40), (275, 14, -28, 58, 66),
        (305, 10, -26, 50, 68), (340, 3, -22, 36, 64), (372, 0, -14, 33, 58), (400, 0, -6, 32, 52),
        (440, 0, 8, 34, 46), (465, 0, 14, 30, 40), (478, 0, 14, 26, 34),
        (494, 0, 14, 0, 0))),
    Shape("posterior mediastinum", "stack", -75, (
        (172, 8, 24, 0, 0), (196, 9, 28, 22, 18), (230, 10, 32, 26, 20), (300, 8, 36, 30, 24),
        (400, 4, 34, 28, 26), (440, 0, 30, 0, 0))),
    Shape("heart", "stack", 45, (
        (244, 30, -34, 0, 0), (262, 28, -34, 48, 32), (290, 22, -30, 56, 44),
        (320, 10, -26, 46, 42), (342, 2, -22, 34, 30), (354, 0, -20, 0, 0)),
        enhance=55, free=2, breath=0.3),
    Shape("left ventricle", "stack", 38, (
        (254, 50, -34, 0, 0), (270, 48, -28, 16, 16), (300, 38, -20, 18, 20), (322, 24, -12, 0, 0)),
        enhance=130, breath=0.3),
    Shape("right ventricle", "stack", 38, (
        (256, 10, -50, 0, 0), (280, 6, -50, 26, 13), (320, 8, -50, 18, 12), (345, 12, -42, 0, 0)),
        enhance=130, breath=0.3),
    Shape("inferior vena cava", "tube", 40, (
        (40, -22, 14, 11), (160, -25, 10, 12), (240, -26, 2, 14), (285, -26, -14, 16)),
        enhance=100),
    Shape("superior vena cava", "tube", 40, ((320, -26, -16, 11), (405, -24, -18, 9),
        (425, -20, -20, 9)), enhance=150),
    Shape("pulmonary artery", "tube", 40, (
        (325, 14, -38, 13), (350, 20, -22, 14), (356, 8, -8, 11), (350, -34, 2, 9)), enhance=150),
    Shape("left pulmonary artery", "tube", 40, ((352, 20, -18, 12), (358, 44, 10, 9)), enhance=150),
    Shape("aorta", "tube", 42, (
        (318, 4, -16, 15), (360, -12, -24, 16), (388, -8, -18, 15), (396, 6, -2, 13),
        (394, 20, 18, 13), (375, 25, 32, 12), (300, 24, 40, 12), (230, 16, 34, 11),
        (180, 7, 18, 10), (90, 7, 2, 9), (42, 5, 8, 8)), enhance=150),
    Shape("iliac vessels", "tube", 42, (
        (42, 4, 10, 8), (0, 32, 10, 8), (-40, 54, 0, 8), (-90, 74, -52, 8), (-150, 72, -52, 7),
        (-450, 60, 5, 5)), pair=True, enhance=130),
    Shape("neck fat", "stack", -80, (
        (456, 44, -6, 0, 0), (474, 38, -2, 13, 20), (500, 36, 0, 14, 20), (540, 34, -2, 12, 17),
        (565, 34, 2, 0, 0)), pair=True),
    Shape("carotid", "tube", 42, (
        (400, 10, -12, 6), (440, 22, -12, 5), (500, 28, -6, 4), (590, 24, -6, 3)),
        pair=True, enhance=180),
    Shape("jugular vein", "tube", 42, (
        (410, 18, -24, 7), (440, 36, -18, 8), (500, 38, -2, 7), (580, 34, 6, 5)), pair=True,
        enhance=140),
    Shape("thyroid", "stack", 105, (
        (448, 18, -10, 0, 0), (470, 18, -12, 9, 12), (498, 19, -10, 0, 0)), pair=True, enhance=60),
    Shape("oesophagus", "tube", 40, (
        (228, 22, 4, 9), (260, 14, 20, 8), (340, 2, 24, 7), (480, 3, 10, 6))),
    Shape("thyroid cartilage", "blade", 190, (
        (486, 1, 0, -34, 12, -22, 17, -6), (498, 2, 0, -38, 12, -24, 18, -4),
        (508, 1, 2, -36, 14, -22, 18, -4)), pair=True),
    Shape("trachea", "tube", MUSCLE, (
        (497, 0, -16, 11), (470, 0, -12, 11), (410, -2, 10, 11), (376, -2, 18, 11)),
        shell=(2, AIR)),
    Shape("bronchus", "tube", MUSCLE, (
        (374, 3, 18, 9), (352, 28, 17, 8), (325, 46, 18, 5), (290, 62, 30, 3)),
        pair=True, shell=(1.5, AIR)),
    Shape("pharynx", "stack", AIR, (
        (490, 0, -16, 4, 8), (505, 0, -12, 9, 6), (530, 0, -8, 12, 7), (560, 0, -12, 10, 6),
        (575, 0, -18, 14, 10), (592, 0, -22, 0, 0))),
    Shape("parotid", "stack", -40, (
        (530, 54, 2, 0, 0), (552, 56, 4, 9, 18), (578, 58, 4, 0, 0)), pair=True),
    Shape("tongue", "stack", 75, (
        (518, 0, -44, 0, 0), (530, 0, -44, 24, 24), (552, 0, -46, 25, 28), (562, 0, -48, 0, 0))),
    Shape("hyoid", "blade", CORTEX, (
        (510, 0, 0, -40, 12, -36, 22, -18), (514, 3, 0, -42, 13, -37, 24, -16),
        (519, 0, 0, -42, 13, -37, 24, -16)), pair=True),
    Shape("maxilla", "stack", 500, (
        (550, 0, -66, 0, 0), (556, 0, -64, 32, 26), (580, 0, -56, 46, 32), (598, 0, -54, 40, 30)),
        shell=(2, 40)),
    Shape("cranium", "stack", CORTEX, (
        (574, 0, 24, 0, 0), (590, 0, 16, 56, 66), (605, 0, 6, 66, 84), (640, 0, 0, 72, 94),
        (690, 0, 2, 63, 83), (717, 0, 4, 40, 53), (730, 0, 4, 0, 0)), shell=(2.5, 400)),
    Shape("liquor", "stack", 8, (
        (584, 0, 34, 0, 0), (596, 0, 24, 46, 52), (612, 0, 6, 59, 76), (640, 0, 0, 65, 87),
        (690, 0, 2, 56, 76), (712, 0, 4, 34, 47), (723, 0, 4, 0, 0))),
    Shape("brain", "stack", 36, (
        (586, 0, 34, 0, 0), (598, 0, 24, 42, 48), (612, 0, 6, 56, 73), (640, 0, 0, 63, 84),
        (690, 0, 2, 53, 73), (708, 0, 4, 32, 45), (719, 0, 4, 0, 0))),
    Shape("white matter", "stack", 27, (
        (640, 24, 0, 0, 0), (660, 26, 0, 20, 50), (690, 24, 2, 18, 46), (704, 20, 4, 0, 0)),
        pair=True),
    Shape("falx", "blade", 60, (
        (640, 1, 0, -84, 0, -40), (690, 1.5, 0, -72, 0, 74), (715, 1.5, 0, -35, 0, 40))),
    Shape("sylvian fissure", "blade", 8, (
        (618, 0, 62, -20, 44, -14), (630, 2, 62, -22, 44, -10), (650, 2, 64, -8, 46, 2),
        (662, 0, 64, 0, 50, 4)), pair=True),
    Shape("lateral ventricle", "tube", 6, (
        (640, 12, -34, 5), (658, 10, -22, 8), (668, 14, 4, 8), (658, 22, 30, 8), (640, 30, 28, 5)),
        pair=True),
    Shape("cisterns", "stack", 6, (
        (604, 0, 42, 4, 4), (612, 0, 44, 8, 5), (620, 0, -2, 14, 9), (634, 0, -2, 12, 8),
        (640, 0, -2, 3, 14), (652, 0, 0, 0, 0))),
    Shape("petrous bone", "tube", CORTEX, (
        (594, 58, 26, 15), (602, 40, 8, 11), (604, 12, -10, 9)), pair=True, shell=(4, 500)),
    Shape("mastoid cells", "stack", -500, (
        (572, 58, 26, 0, 0), (590, 58, 26, 10, 13), (606, 58, 24, 0, 0)), pair=True),
    Shape("ear canal", "tube", AIR, ((594, 76, 6, 4), (596, 52, 6, 3)), pair=True),
    Shape("sphenoid sinus", "stack", AIR, (
        (586, 0, -28, 0, 0), (598, 0, -30, 14, 13), (612, 0, -30, 0, 0))),
    Shape("maxillary sinus", "stack", AIR, (
        (558, 28, -56, 0, 0), (576, 28, -58, 14, 18), (594, 28, -56, 0, 0)), pair=True),
    Shape("nasal cavity", "stack", AIR, (
        (562, 8, -68, 0, 0), (574, 8, -66, 5, 26), (592, 6, -64, 4, 28), (612, 6, -60, 4, 24),
        (618, 6, -60, 0, 0)), pair=True),
    Shape("orbit", "stack", -80, (
        (590, 32, -62, 0, 0), (606, 31, -60, 19, 27), (624, 32, -66, 0, 0)), pair=True),
    Shape("globe", "tube", 15, ((607, 33, -78, 12),), pair=True, shell=(1.5, 8)),
    Shape("frontal sinus", "stack", AIR, (
        (616, 9, -84, 0, 0), (630, 10, -87, 10, 4), (646, 10, -88, 0, 0)), pair=True),
    Shape("zygoma", "tube", CORTEX, (
        (590, 46, -70, 6), (582, 62, -52, 5), (588, 68, -20, 4), (592, 66, 2, 4)), pair=True,
        shell=(2, 250)),
    Shape("mandible", "blade", CORTEX, (
        (519, 0, 0, -76, 16, -72, 34, -42), (526, 6, 0, -76, 22, -68, 44, -30),
        (545, 5, 0, -76, 24, -66, 48, -18), (548, 0, 0, -76, 24, -66, 50, -10)), pair=True,
        shell=(2, 250)),
    Shape("ramus", "blade", CORTEX, (
        (524, 0, 44, -28, 48, -12), (540, 4, 46, -30, 50, -4), (575, 3, 50, -26, 53, -2),
        (592, 2, 53, -6, 55, 0)), pair=True, shell=(2, 300)),
    Shape("teeth", "blade", 1500, (
        (542, 0, 0, -76, 18, -70, 28, -44), (546, 4, 0, -76, 19, -70, 29, -44),
        (560, 4, 0, -76, 19, -70, 29, -44), (564, 0, 0, -76, 18, -70, 28, -44)), pair=True),
    Shape("sternum", "stack", CORTEX, (
        (248, 0, -101, 0, 0), (270, 0, -103, 12, 4), (300, 0, -103, 18, 5), (350, 0, -98, 16, 6),
        (385, 0, -87, 20, 7), (412, 0, -74, 30, 8), (428, 0, -64, 22, 7), (432, 0, -62, 0, 0)),
        shell=(2, 130)),
    Shape("clavicle", "tube", CORTEX, (
        (428, 24, -62, 11), (436, 60, -58, 7), (450, 110, -34, 6), (452, 148, -4, 8)), pair=True,
        shell=(2.5, 250)),
    Shape("scapula", "blade", CORTEX, (
        (300, 0, 92, 92, 106, 86, 116, 80), (315, 3, 88, 94, 108, 86, 124, 74),
        (370, 3, 78, 94, 112, 76, 140, 44), (420, 4, 72, 86, 112, 60, 142, 14),
        (438, 3, 74, 76, 100, 56, 120, 40), (446, 0, 78, 70, 96, 58, 112, 46)), pair=True,
        shell=(2, 350)),
    Shape("spine of the scapula", "tube", CORTEX, (
        (405, 82, 94, 4), (430, 122, 74, 6), (448, 160, 30, 8), (450, 162, 2, 7)), pair=True,
        shell=(2, 250)),
    Shape("glenoid", "tube", CORTEX, ((424, 134, 14, 14),), pair=True, shell=(2, 250)),
    Shape("sacrum", "stack", CORTEX, (
        (3, 0, 42, 0, 0), (0, 0, 43, 46, 18), (-25, 0, 60, 60, 24), (-55, 0, 78, 38, 17),
        (-85, 0, 88, 22, 11), (-110, 0, 84, 9, 7), (-126, 0, 74, 0, 0)), shell=(2, 150)),
    Shape("sacral foramina", "stack", 20, (
        (-4, 24, 62, 6, 5), (-14, 25, 66, 3, 3), (-28, 22, 70, 6, 5), (-40, 20, 76, 3, 3),
        (-52, 18, 82, 5, 4), (-66, 14, 86, 0, 0)), pair=True),
    Shape("iliac wing", "blade", CORTEX, (
        (49, 0, 98, 34, 106, 22, 110, 12), (42, 5, 80, 50, 108, 26, 120, 2),
        (10, 5, 58, 66, 100, 38, 124, -20), (-20, 6, 54, 72, 88, 42, 122, -44),
        (-45, 8, 60, 68, 82, 38, 112, -42), (-65, 9, 72, 54, 84, 25, 102, -32),
        (-84, 5, 80, 42, 82, 25, 92, -26)), pair=True, shell=(2.5, MARROW)),
    Shape("acetabulum", "tube", CORTEX, ((-84, 86, 3, 36),), pair=True, shell=(3, 230)),
    Shape("hip joint", "tube", 60, ((-88, 93, 0, 28),), pair=True),
    Shape("joint opening", "stack", MUSCLE, (
        (-60, 124, 2, 0, 0), (-88, 124, 2, 16, 26), (-125, 110, 2, 24, 26), (-130, 110, 2, 0, 0)),
        pair=True),
    Shape("pubis", "tube", CORTEX, ((-92, 78, -26, 12), (-106, 40, -50, 8), (-115, 12, -57, 10)),
        pair=True, shell=(2, 200)),
    Shape("ischium", "tube", CORTEX, ((-100, 80, 30, 16), (-148, 62, 42, 17)), pair=True,
        shell=(2.5, 200)),
    Shape("ischiopubic ramus", "tube", CORTEX, ((-152, 58, 36, 9), (-122, 14, -50, 7)), pair=True,
        shell=(2, 200)),
    Shape("femur", "tube", CORTEX, (
        (-88, 94, 0, 15), (-104, 118, 6, 15), (-122, 124, 9, 19), (-165, 112, 6, 15),
        (-450, 88, 4, 13)), pair=True, shell=(3, 150)),
    Shape("marrow of the femur", "tube", 0, (
        (-150, 115, 6, 5), (-200, 108, 6, 7), (-450, 88, 4, 7)), pair=True),
    Shape("greater trochanter", "tube", CORTEX, ((-96, 134, 14, 11), (-122, 126, 10, 16)),
        pair=True, shell=(2, 150)),
    Shape("femoral head", "tube", CORTEX, ((-88, 93, 0, 24),), pair=True, shell=(2, 280)),
)
# Height of each vertebra with its disc, from L5 up to C1.
LEVELS = (36.0,) * 5 + tuple(np.linspace(27, 19, 12)) + (17.0,) * 5 + (25.0, 19.0)
# Height; y, half width and half depth of a vertebral body; how far the transverse processes
# reach in x and the spinous process, behind the body, in y.
SPINE = np.array([
    (-5, 42, 25, 17, 40, 28), (36, 33, 26, 18, 44, 30), (100, 28, 25, 17, 44, 32),
    (170, 38, 22, 16, 36, 30), (210, 47, 19, 15, 30, 26), (300, 60, 16, 14, 32, 24),
    (380, 58, 14, 12, 34, 24), (450, 42, 14, 10, 36, 30), (475, 34, 13, 9, 30, 32),
    (530, 22, 11, 8, 24, 18), (562, 20, 11, 8, 24, 20), (590, 20, 10, 7, 36, 8),
], dtype=np.float64)
# fmt: on


def spine() -> Iterator[Shape]:
    """Yield discs, then the vertebrae with canal, arch and processes."""
    tops = np.cumsum(LEVELS)
    column = tuple((h, 0.0, y, rx, ry) for h, y, rx, ry, *_ in SPINE.tolist())
    yield Shape("discs", "stack", 85, column)
    for level, (top, size) in enumerate(zip(tops.tolist(), LEVELS, strict=True)):
        low = top - size * (0.80 if level < 5 else 0.84)
        y, rx, ry, *_ = at(SPINE, (low + top) / 2).tolist()
        lean = (float(at(SPINE, top)[0]) - float(at(SPINE, low)[0])) / (top - low)
        for name, hu, wall in (("vertebra", CORTEX, 0.0), ("cancellous bone", MARROW, 2.0)):
            # (from the middle to an end plate, girth): end plates are wider than the waist.
            half = (top - low) / 2 - wall
            profile = (
                (-half - 0.7, 0.0),
                (-half, 1.0),
                (0.0, 0.91),
                (half, 1.0),
                (half + 0.7, 0.0),
            )
            yield Shape(name, "stack", hu, tuple(
                ((low + top) / 2 + d, 0.0, y + lean * d, (rx - wall) * girth, (ry - wall) * girth)
                for d, girth in profile
            ))  # fmt: skip
    canal = tuple((h, 0.0, y + ry + 8, 11.0, 8.0) for h, y, _, ry, *_ in SPINE.tolist())
    yield Shape("spinal canal", "stack", -10, canal)
    yield Shape("spinal cord", "stack", 38, tuple((*knot[:3], 6.0, 5.0) for knot in canal))
    for level, (top, size) in enumerate(zip(tops.tolist(), LEVELS, strict=True)):
        middle = top - 0.45 * size
        y, rx, ry, across, back = at(SPINE, middle).tolist()
        slope = 14.0 if 6 < level < 15 else 5.0  # T10 to T3 point down
        arch = ((middle + 5, 0.6 * rx, y + 0.7 * ry, 4.5), (middle + 2, 14.0, y + ry + 8, 4.5),
                (middle - 5, 2.0, y + ry + 20, 4.0))  # fmt: skip
        yield Shape("arch", "tube", CORTEX, arch, pair=True, shell=(2, 300))
        facet = ((middle - 0.5 * size, 15.0, y + ry + 13, 5.0), (middle, 15.0, y + ry + 11, 4.0))
        yield Shape("facet", "tube", CORTEX, facet, pair=True, shell=(2, 350))
        spinous = ((middle - 5, 0.0, y + ry + 20, 4.0), (middle - slope, 0.0, y + ry + back, 3.5))
        yield Shape("spinous process", "tube", CORTEX, spinous, shell=(2, 300))
        transverse = ((middle + 3, 14.0, y + ry + 8, 4.0), (middle + 4, across, y + ry + 10, 3.0))
        yield Shape("transverse process", "tube", CORTEX, transverse, pair=True, shell=(2, 300))


def ribs() -> Iterator[Shape]:
    """Yield twelve pairs of ribs, and the cartilage that joins ribs 1 to 7 to the sternum."""
    cavity = np.array(next(s.knots for s in ORGANS if s.name == "cavity"), np.float64)
    tops = np.cumsum(LEVELS)
    for rib in range(1, 13):
        start = float(tops[17 - rib])
        reach = np.pi * (0.8 if rib <= 7 else (0.72, 0.62, 0.55, 0.42, 0.3)[rib - 8])
        drop = min(30 + 11 * rib, 100)
        path = []
        for angle in np.linspace(0.13 * np.pi, reach, 12).tolist():
            height = start - drop * (angle / np.pi) ** 1.2
            _, y, rx, ry = at(cavity, height).tolist()
            # The ellipse of power 2.3 that bounds the cavity, and the rib just outside.
            x, dy = np.sin(angle) ** (2 / 2.3), np.cos(angle)
            dy = np.sign(dy) * abs(dy) ** (2 / 2.3)
            path.append((height, float((rx + 6) * x), float(y + (ry + 6) * dy), 5.0))
        y, _, ry, across, _ = at(SPINE, start).tolist()
        path.insert(0, (start - 1, across * 0.8, y + ry + 6, 4.0))
        yield Shape("rib", "tube", CORTEX, tuple(path), pair=True, shell=(2, 250))
        if rib <= 7:
            end = path[-1]
            front = max(end[0] + 2.0 * rib, 268.0)
            _, y, _, ry = at(cavity, front).tolist()
            cartilage = (end, (front, 16.0, y - ry - 5, 5.0))
            yield Shape("costal cartilage", "tube", 140, cartilage, pair=True)


def at(knots: Floats, height: float) -> Floats:
    """Return the row of a table at a height, interpolated; past its ends, the row at the end.

    Parameters
    ----------
    knots : (N, 1 + K) float64
        Rows that start with their height, mm, in ascending order; N is 2 or more.
    height : float
        mm above the promontory.

    Returns
    -------
    (K,) float64
        The columns after the height.
    """
    i = min(max(int(np.searchsorted(knots[:, 0], height)), 1), len(knots) - 1)
    low, high = knots[i - 1], knots[i]
    share = min(max((height - low[0]) / (high[0] - low[0]), 0.0), 1.0)
    columns: Floats = low[1:] + share * (high[1:] - low[1:])
    return columns
