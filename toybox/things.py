"""How each thing is drawn: flat parts with one dark outline, in coordinates from -1 to 1."""

import math

from PIL import Image, ImageChops, ImageDraw

COLOURS = {
    "red": (218, 36, 40),
    "orange": (245, 138, 30),
    "yellow": (250, 216, 50),
    "green": (60, 168, 66),
    "blue": (44, 92, 214),
    "purple": (132, 58, 176),
    "pink": (248, 142, 184),
    "brown": (134, 84, 46),
    "black": (44, 44, 50),
    "white": (246, 246, 242),
    "gray": (150, 152, 158),
}
OUTLINE = (26, 24, 30)
WHITE, DARK, GLASS = (255, 255, 255), (20, 20, 24), (176, 222, 240)
# Where a thing meets the ground, in its own coordinates (0.95 unless said here).
BASE_LINES = {"car": 0.6, "fish": 0.75, "boat": 0.75, "heart": 0.85, "star": 0.9}


class Pen:
    """Draws a thing given in coordinates from -1 to 1 (x to the right, y down) somewhere on the canvas."""

    def __init__(self, canvas, individual, centre, radius, mirrored):
        self.canvas, self.individual = canvas, individual
        self.cx, self.cy = centre
        self.radius, self.sign = radius, -1 if mirrored else 1
        self.colour, self.second = COLOURS[individual.colour], COLOURS[individual.second]
        self._pattern = None

    def point(self, x, y):
        return self.cx + self.sign * x * self.radius, self.cy + y * self.radius

    def group(self, *parts):
        """Parts (kind, numbers, fill) share one outline; fill None means the individual's pattern."""
        draw = ImageDraw.Draw(self.canvas)
        for kind, numbers, _ in parts:
            self._shape(draw, kind, numbers, OUTLINE, grow=self.canvas.width / 74)
        for kind, numbers, fill in parts:
            self._shape(draw, kind, numbers, fill or self.colour)
        if self.individual.pattern != "plain":
            self._clipped([part for part in parts if part[2] is None], self.pattern())

    def mark(self, kind, numbers, fill):
        """A part without an outline."""
        self._shape(ImageDraw.Draw(self.canvas), kind, numbers, fill)

    def mark_inside(self, part, within, fill):
        """A patch of colour that ends where the part it lies on ends."""
        mask, region = Image.new("L", self.canvas.size), Image.new("L", self.canvas.size)
        self._shape(ImageDraw.Draw(mask), *within, 255)
        self._shape(ImageDraw.Draw(region), *part, 255)
        self.canvas.paste(fill, mask=ImageChops.multiply(mask, region))

    def _clipped(self, parts, picture):
        mask = Image.new("L", self.canvas.size)
        draw = ImageDraw.Draw(mask)
        for kind, numbers, _ in parts:
            self._shape(draw, kind, numbers, 255)
        self.canvas.paste(picture, mask=mask)

    def pattern(self):
        """Stripes or spots, fixed to the thing and not to the canvas."""
        if self._pattern is None:
            self._pattern = Image.new("RGB", self.canvas.size, self.colour)
            draw = ImageDraw.Draw(self._pattern)
            if self.individual.pattern == "striped":
                for i in range(-5, 6):
                    x = i * 0.34
                    self._shape(draw, "polygon", (x, -1.2, x + 0.16, -1.2, x - 0.04, 1.2, x - 0.2, 1.2), self.second)
            else:
                for row in range(-4, 5):
                    for column in range(-4, 5):
                        x, y = column * 0.4 + (row % 2) * 0.2, row * 0.3
                        self._shape(draw, "ellipse", (x - 0.1, y - 0.1, x + 0.1, y + 0.1), self.second)
        return self._pattern

    def _shape(self, draw, kind, numbers, fill, grow=0.0):
        if kind == "line":  # x, y, x, y, ..., width
            *path, width = numbers
            points = [self.point(*xy) for xy in zip(path[::2], path[1::2])]
            width = width * self.radius + 2 * grow
            draw.line(points, fill, round(width), joint="curve")
            for x, y in points:
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill)
            return
        points = [self.point(*xy) for xy in zip(numbers[::2], numbers[1::2])]
        if kind == "polygon":
            draw.polygon(points, fill)
            if grow:
                draw.line([*points, points[0], points[1]], fill, round(2 * grow), joint="curve")
            return
        (x0, y0), (x1, y1) = points
        box = (min(x0, x1) - grow, min(y0, y1) - grow, max(x0, x1) + grow, max(y0, y1) + grow)
        if kind == "ellipse":
            draw.ellipse(box, fill)
        elif kind == "round":
            draw.rounded_rectangle(box, 0.1 * self.radius + grow, fill)
        else:
            draw.rectangle(box, fill)


def draw_thing(canvas, individual, centre, radius, mirrored, rng):
    _THINGS[individual.thing](Pen(canvas, individual, centre, radius, mirrored), individual, rng)


def _dog(pen, dog, rng):
    """Side view, looking right: long snout, dark nose, four legs."""
    second = dict.fromkeys(dog.marks, pen.second)
    wag, step = rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06)
    tip = second.get("tip")
    if dog.tail == "long":
        pen.group(("line", (-0.66, 0.02, -0.86, -0.3, -0.84 + wag, -0.72, 0.13), None))
        if tip:
            pen.mark("line", (-0.86, -0.5, -0.84 + wag, -0.72, 0.13), tip)
    elif dog.tail == "curly":
        turns = (1.2, 2.3, 3.4, 4.5, 5.6, 6.4)
        path = [(-0.78 + 0.17 * math.cos(t), -0.22 + wag / 2 + 0.19 * math.sin(t)) for t in turns]
        pen.group(("line", (*(v for xy in path for v in xy), 0.12), None))
        if tip:
            pen.mark("line", (*(v for xy in path[3:] for v in xy), 0.12), tip)
    else:
        pen.group(("ellipse", (-0.95, -0.22 + wag, -0.6, 0.12 + wag), None))
        if tip:
            pen.mark("ellipse", (-0.95, -0.2 + wag, -0.76, 0.08 + wag), tip)
    legs = (-0.66 + step, -0.4 - step, 0.06 + step, 0.3 - step)
    body = ("round", (-0.74, -0.12, 0.46, 0.5), None)
    neck = ("polygon", (0.02, 0.1, 0.2, -0.4, 0.62, -0.3, 0.46, 0.3), None)
    pen.group(body, neck, *(("round", (x, 0.3, x + 0.2, 0.95), None) for x in legs))
    if "saddle" in second:
        pen.mark("round", (-0.62, -0.12, 0.06, 0.26), pen.second)
    if "socks" in second:
        for x in legs:
            pen.mark("rect", (x, 0.74, x + 0.2, 0.95), pen.second)
    if dog.collar:
        pen.group(("line", (0.1, -0.06, 0.5, 0.1, 0.12), COLOURS[dog.collar]))
    ear = second.get("ears")
    if dog.ears == "pointed":
        pen.group(("polygon", (0.12, -0.5, 0.2, -1.0, 0.48, -0.66), ear))
    elif dog.ears == "round":
        pen.group(("ellipse", (0.04, -0.98, 0.4, -0.62), ear))
    pen.group(
        ("ellipse", (0.08, -0.82, 0.72, -0.18), None),
        ("round", (0.44, -0.52, 1.02, -0.18), second.get("muzzle")),
    )
    if "patch" in second:
        pen.mark("ellipse", (0.36, -0.76, 0.66, -0.46), pen.second)
    pen.mark("ellipse", (0.88, -0.6, 1.08, -0.4), DARK)
    pen.mark("ellipse", (0.42, -0.69, 0.6, -0.51), WHITE)
    pen.mark("ellipse", (0.47, -0.66, 0.59, -0.54), DARK)
    if dog.ears == "floppy":
        pen.group(("ellipse", (0.02, -0.72, 0.3, -0.06), ear))


def _cat(pen, cat, rng):
    """Front view, sitting: triangular ears, big green eyes, whiskers."""
    second = dict.fromkeys(cat.marks, pen.second)
    wag = rng.uniform(-0.08, 0.08)
    tails = {
        "long": (0.36, 0.82, 0.72, 0.7, 0.8, 0.3, 0.7 + wag, 0.0),
        "curly": (0.36, 0.82, 0.7, 0.78, 0.82, 0.5, 0.66, 0.32 + wag, 0.52, 0.46),
        "short": (0.36, 0.82, 0.66, 0.74 + wag),
    }
    path = tails[cat.tail]
    pen.group(("line", (*path, 0.15), None))
    if "tip" in second:
        pen.mark("line", (*path[-4:], 0.15), pen.second)
    pen.group(("ellipse", (-0.5, -0.1, 0.5, 0.95), None), ("round", (-0.4, 0.6, 0.4, 0.95), None))
    if "saddle" in second:
        pen.mark("ellipse", (-0.24, 0.1, 0.24, 0.76), pen.second)
    if "socks" in second:
        pen.mark("round", (-0.4, 0.78, -0.04, 0.95), pen.second)
        pen.mark("round", (0.04, 0.78, 0.4, 0.95), pen.second)
    pen.mark("line", (0.0, 0.66, 0.0, 0.93, 0.04), DARK)
    if cat.collar:
        pen.group(("line", (-0.3, 0.08, 0.3, 0.08, 0.13), COLOURS[cat.collar]))
    ear = second.get("ears")
    pen.group(
        ("polygon", (-0.5, -0.5, -0.5, -1.02, -0.06, -0.76), ear),
        ("polygon", (0.5, -0.5, 0.5, -1.02, 0.06, -0.76), ear),
    )
    pen.group(("ellipse", (-0.56, -0.86, 0.56, 0.06), None))
    if "muzzle" in second:
        pen.mark("ellipse", (-0.28, -0.34, 0.28, 0.02), pen.second)
    if "patch" in second:
        pen.mark("ellipse", (0.06, -0.66, 0.46, -0.28), pen.second)
    for x in (-0.25, 0.25):
        pen.mark("ellipse", (x - 0.15, -0.62, x + 0.15, -0.32), (196, 240, 120))
        pen.mark("ellipse", (x - 0.05, -0.6, x + 0.05, -0.34), DARK)
    pen.mark("polygon", (-0.1, -0.28, 0.1, -0.28, 0.0, -0.16), (240, 110, 130))
    for side in (-1, 1):
        for y, end in ((-0.2, -0.28), (-0.12, -0.06)):
            pen.mark("line", (side * 0.3, y, side * 0.86, end, 0.035), DARK)


def _bird(pen, bird, rng):
    """Side view, looking right: round body, beak, wing."""
    flap = rng.uniform(-0.08, 0.08)
    for x in (-0.12, 0.14):
        pen.mark("line", (x, 0.6, x, 0.93, x + 0.14, 0.93, 0.08), (230, 140, 30))
    pen.group(("polygon", (-0.5, 0.1, -1.0, -0.1 + flap, -0.92, 0.36 + flap, -0.4, 0.4), None))
    pen.group(("polygon", (0.66, -0.56, 1.04, -0.4, 0.66, -0.26), (250, 170, 30)))
    pen.group(("ellipse", (-0.66, -0.3, 0.5, 0.72), None), ("ellipse", (0.0, -0.86, 0.8, -0.06), None))
    pen.group(("ellipse", (-0.5, -0.04 + flap, 0.12, 0.42 + flap), pen.second))
    pen.mark("ellipse", (0.38, -0.64, 0.6, -0.42), WHITE)
    pen.mark("ellipse", (0.44, -0.6, 0.58, -0.46), DARK)


def _fish(pen, fish, rng):
    flap = rng.uniform(-0.1, 0.1)
    pen.group(("polygon", (-0.5, 0.0, -1.0, -0.5 + flap, -0.84, 0.0, -1.0, 0.5 + flap), pen.second))
    pen.group(("polygon", (-0.2, -0.4, 0.1, -0.8, 0.35, -0.4), pen.second))
    pen.group(("ellipse", (-0.66, -0.52, 0.94, 0.52), None))
    pen.mark("ellipse", (0.44, -0.3, 0.72, -0.02), WHITE)
    pen.mark("ellipse", (0.54, -0.24, 0.68, -0.1), DARK)
    pen.mark("line", (0.6, 0.24, 0.84, 0.18, 0.06), DARK)


def _car(pen, car, rng):
    pen.group(
        ("polygon", (-0.62, -0.1, -0.4, -0.58, 0.3, -0.58, 0.58, -0.1), None), ("round", (-1.0, -0.14, 1.0, 0.4), None)
    )
    pen.mark("polygon", (-0.46, -0.12, -0.32, -0.46, -0.06, -0.46, -0.06, -0.12), GLASS)
    pen.mark("polygon", (0.06, -0.12, 0.06, -0.46, 0.24, -0.46, 0.42, -0.12), GLASS)
    pen.mark("round", (0.84, 0.0, 0.98, 0.14), (255, 240, 150))
    for x in (-0.56, 0.56):
        pen.mark("ellipse", (x - 0.27, 0.12, x + 0.27, 0.66), DARK)
        pen.mark("ellipse", (x - 0.12, 0.27, x + 0.12, 0.51), pen.second)


def _house(pen, house, rng):
    pen.group(("rect", (0.34, -0.96, 0.56, -0.3), (120, 80, 70)))
    pen.group(("rect", (-0.72, -0.2, 0.72, 0.95), None))
    pen.group(("polygon", (-0.98, -0.16, 0.0, -0.98, 0.98, -0.16), pen.second))
    pen.group(("rect", (-0.5, 0.3, -0.08, 0.95), (110, 66, 34)))
    pen.group(("rect", (0.14, 0.1, 0.54, 0.5), (255, 236, 140)))
    pen.mark("line", (0.34, 0.1, 0.34, 0.5, 0.05), OUTLINE)


def _boat(pen, boat, rng):
    pen.mark("line", (0.0, -0.98, 0.0, 0.3, 0.09), (96, 62, 36))
    pen.group(("polygon", (0.1, -0.92, 0.8, 0.12, 0.1, 0.12), pen.second))
    pen.group(("polygon", (-0.1, -0.7, -0.1, 0.12, -0.6, 0.12), pen.second))
    pen.group(("polygon", (-0.98, 0.26, 0.98, 0.26, 0.62, 0.75, -0.62, 0.75), None))


def _flower(pen, flower, rng):
    bend = rng.uniform(-0.1, 0.1)
    pen.mark("line", (0.0, 0.0, bend, 0.5, 0.0, 0.95, 0.12), (40, 130, 50))
    pen.group(
        ("ellipse", (0.06, 0.5, 0.52, 0.74), (60, 160, 60)), ("ellipse", (-0.52, 0.56, -0.06, 0.8), (60, 160, 60))
    )
    petals = [(0.42 * math.cos(t), -0.36 + 0.42 * math.sin(t)) for t in (i * math.pi / 3 + 0.3 for i in range(6))]
    pen.group(*(("ellipse", (x - 0.26, y - 0.26, x + 0.26, y + 0.26), None) for x, y in petals))
    pen.group(("ellipse", (-0.22, -0.58, 0.22, -0.14), pen.second))


def _star(pen, star, rng):
    turn = rng.uniform(-0.15, 0.15)
    points = []
    for i in range(10):
        length, angle = (1.0 if i % 2 == 0 else 0.46), turn + i * math.pi / 5
        points += [length * math.sin(angle), -length * math.cos(angle)]
    pen.group(("polygon", tuple(points), None))


def _heart(pen, heart, rng):
    pen.group(
        ("ellipse", (-0.9, -0.8, 0.06, 0.14), None),
        ("ellipse", (-0.06, -0.8, 0.9, 0.14), None),
        ("polygon", (-0.83, -0.1, 0.0, -0.5, 0.83, -0.1, 0.0, 0.85), None),
    )


def _mug(pen, mug, rng):
    pen.group(("ellipse", (0.26, -0.3, 0.96, 0.56), None))
    pen.mark("ellipse", (0.4, -0.12, 0.76, 0.38), OUTLINE)
    pen.mark("ellipse", (0.44, -0.08, 0.72, 0.34), (236, 232, 224))
    pen.group(("round", (-0.72, -0.5, 0.52, 0.95), None))
    pen.group(("ellipse", (-0.72, -0.68, 0.52, -0.32), (98, 58, 34)))
    for x in (-0.36, 0.12):
        pen.mark("line", (x, -0.76, x + 0.08, -0.88, x - 0.02, -1.0, 0.07), (225, 225, 230))


def _mushroom(pen, mushroom, rng):
    pen.group(("round", (-0.28, -0.1, 0.28, 0.95), (250, 238, 210)))
    cap = [(0.92 * math.cos(t), 0.1 + 0.95 * math.sin(t)) for t in (math.pi + i * math.pi / 12 for i in range(13))]
    pen.group(("polygon", tuple(v for xy in cap for v in xy), None))
    if mushroom.pattern == "plain":
        for x, y, r in ((-0.45, -0.2, 0.13), (0.05, -0.5, 0.16), (0.5, -0.18, 0.12)):
            pen.mark("ellipse", (x - r, y - r, x + r, y + r), WHITE)


_THINGS = {
    "dog": _dog, "cat": _cat, "bird": _bird, "fish": _fish, "car": _car, "house": _house, "boat": _boat,
    "flower": _flower, "star": _star, "heart": _heart, "mug": _mug, "mushroom": _mushroom,
}  # fmt: skip
