"""The scenes behind the things: flat shapes in few colours, told apart at a glance."""

from PIL import ImageDraw


def paint_scene(canvas, scene, rng) -> float:
    """Fills the canvas; returns where the ground begins, as a share of the height."""
    side = canvas.size[0]
    brush = _Brush(ImageDraw.Draw(canvas), side, rng)
    return _SCENES[scene](brush, rng)


class _Brush:
    """Draws in shares of the canvas."""

    def __init__(self, draw, side, rng):
        self.draw, self.side, self.rng = draw, side, rng

    def box(self, x0, y0, x1, y1, fill):
        self.draw.rectangle([v * self.side for v in (x0, y0, x1, y1)], fill)

    def disc(self, x, y, r, fill):
        self.draw.ellipse([v * self.side for v in (x - r, y - r, x + r, y + r)], fill)

    def oval(self, x0, y0, x1, y1, fill):
        self.draw.ellipse([v * self.side for v in (x0, y0, x1, y1)], fill)

    def polygon(self, points, fill):
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill)

    def sky(self, top, bottom, until=1.0):
        """Bands from one colour to the other."""
        bands = 12
        for i in range(bands):
            t = i / (bands - 1)
            fill = tuple(round(a + (b - a) * t) for a, b in zip(top, bottom))
            self.box(0, until * i / bands, 1, until * (i + 1) / bands, fill)


def _beach(brush, rng):
    sea, sand = rng.uniform(0.34, 0.42), rng.uniform(0.54, 0.62)
    brush.sky((118, 196, 250), (190, 230, 255), sea)
    brush.disc(rng.choice([0.14, 0.86]) + rng.uniform(-0.04, 0.04), 0.14, 0.09, (255, 226, 80))
    brush.box(0, sea, 1, 1, (28, 130, 190))
    brush.box(0, sand - 0.03, 1, sand, (240, 250, 255))
    brush.box(0, sand, 1, 1, (240, 212, 146))
    return sand


def _snow(brush, rng):
    ground = rng.uniform(0.52, 0.62)
    brush.sky((168, 190, 214), (206, 220, 236), ground)
    brush.box(0, ground, 1, 1, (248, 251, 255))
    brush.oval(-0.4, ground - 0.06, 1.4, 1.8, (248, 251, 255))
    for x in (rng.uniform(0.05, 0.2), rng.uniform(0.8, 0.95)):
        for i in range(3):
            y, w = ground - 0.34 + i * 0.1, 0.06 + i * 0.03
            brush.polygon([(x, y), (x - w, y + 0.17), (x + w, y + 0.17)], (70, 120, 104) if i else (240, 246, 255))
    for _ in range(22):
        brush.disc(rng.random(), rng.random() * 0.9, 0.014, (255, 255, 255))
    return ground


def _forest(brush, rng):
    ground = rng.uniform(0.58, 0.68)
    brush.box(0, 0, 1, 1, (30, 92, 58))
    x = rng.uniform(-0.05, 0.05)
    while x < 1.05:
        width = rng.uniform(0.07, 0.1)
        brush.box(x, 0, x + width, ground, (92, 60, 38))
        x += width + rng.uniform(0.11, 0.16)
    for i in range(8):
        brush.disc(i / 7 + rng.uniform(-0.05, 0.05), rng.uniform(0.0, 0.1), 0.13, (20, 70, 40))
    brush.box(0, ground, 1, 1, (70, 104, 44))
    return ground


def _desert(brush, rng):
    ground = rng.uniform(0.5, 0.58)
    brush.sky((255, 206, 130), (255, 232, 178), ground)
    brush.box(0, ground, 1, 1, (220, 148, 78))
    brush.disc(rng.uniform(0.3, 0.7), 0.13, 0.1, (255, 248, 214))
    shift = rng.uniform(-0.2, 0.2)
    brush.oval(-0.5 + shift, ground - 0.1, 0.6 + shift, 1.3, (226, 156, 84))
    brush.oval(0.3 + shift, ground - 0.04, 1.7 + shift, 1.3, (214, 140, 70))
    x, y = rng.choice([0.1, 0.88]), ground + 0.12
    green = (58, 130, 70)
    brush.box(x - 0.03, y - 0.36, x + 0.03, y, green)
    brush.box(x - 0.1, y - 0.26, x - 0.06, y - 0.12, green)
    brush.box(x - 0.1, y - 0.16, x + 0.1, y - 0.12, green)
    brush.box(x + 0.06, y - 0.3, x + 0.1, y - 0.12, green)
    return ground


def _night(brush, rng):
    ground = rng.uniform(0.62, 0.7)
    brush.sky((10, 14, 52), (34, 44, 104), ground)
    for _ in range(16):
        brush.disc(rng.random(), rng.random() * ground, 0.012, (255, 255, 220))
    x, y = rng.choice([0.16, 0.84]) + rng.uniform(-0.04, 0.04), rng.uniform(0.13, 0.18)
    brush.disc(x, y, 0.11, (250, 246, 208))
    brush.disc(x + 0.05, y - 0.03, 0.095, (14, 19, 62))
    brush.box(0, ground, 1, 1, (22, 40, 48))
    return ground


def _water(brush, rng):
    brush.sky((70, 200, 222), (8, 70, 140))
    brush.box(0, 0.88, 1, 1, (196, 178, 120))
    for x in (rng.uniform(0.03, 0.14), rng.uniform(0.86, 0.97)):
        for i in range(4):
            y = 0.9 - i * 0.12
            brush.oval(x - 0.045 + 0.03 * (-1) ** i, y - 0.14, x + 0.045 + 0.03 * (-1) ** i, y, (30, 150, 90))
    for _ in range(7):
        x, y, r = rng.random(), rng.random() * 0.7, rng.uniform(0.02, 0.04)
        brush.disc(x, y, r, (225, 248, 255))
        brush.disc(x, y, r * 0.55, (110, 205, 230))
    return 0.8


def _city(brush, rng):
    ground = rng.uniform(0.62, 0.7)
    brush.sky((196, 206, 220), (226, 230, 234), ground)
    x = rng.uniform(-0.1, 0.0)
    while x < 1.0:
        width, top = rng.uniform(0.16, 0.24), rng.uniform(0.06, 0.34)
        brush.box(x, top, x + width, ground, rng.choice([(112, 120, 140), (134, 128, 134), (96, 104, 124)]))
        for row in range(5):
            for column in (0.25, 0.65):
                y = top + 0.05 + row * 0.11
                if y + 0.05 < ground:
                    brush.box(x + width * column, y, x + width * (column + 0.2), y + 0.05, (250, 226, 130))
        x += width + 0.015
    brush.box(0, ground, 1, 1, (84, 84, 90))
    for x in (0.04, 0.4, 0.76):
        brush.box(x, 0.93, x + 0.2, 0.955, (240, 240, 230))
    return ground


def _grass(brush, rng):
    ground = rng.uniform(0.5, 0.6)
    brush.sky((132, 204, 255), (196, 232, 255), ground)
    for _ in range(2):
        x, y = rng.random(), rng.uniform(0.08, 0.24)
        for dx in (-0.08, 0.0, 0.08):
            brush.disc(x + dx, y, 0.06, (255, 255, 255))
    brush.box(0, ground, 1, 1, (112, 196, 72))
    for _ in range(12):
        x, y = rng.random(), rng.uniform(ground + 0.03, 0.97)
        brush.disc(x, y, 0.018, rng.choice([(255, 255, 255), (255, 230, 70), (250, 140, 180)]))
    return ground


def _room(brush, rng):
    ground = rng.uniform(0.6, 0.68)
    brush.box(0, 0, 1, 1, (232, 214, 190))
    x = rng.choice([0.06, 0.66]) + rng.uniform(-0.03, 0.03)
    brush.box(x, 0.08, x + 0.28, 0.4, (255, 255, 255))
    brush.box(x + 0.02, 0.1, x + 0.13, 0.38, (150, 210, 250))
    brush.box(x + 0.15, 0.1, x + 0.26, 0.38, (150, 210, 250))
    brush.box(0, ground, 1, 1, (166, 110, 66))
    for y in (0.25, 0.5, 0.75):
        brush.box(0, ground + (1 - ground) * y, 1, ground + (1 - ground) * y + 0.012, (130, 82, 48))
    brush.box(0, ground - 0.03, 1, ground, (250, 246, 238))
    return ground


def _sunset(brush, rng):
    ground = rng.uniform(0.58, 0.68)
    brush.sky((112, 50, 130), (255, 130, 60), ground)
    brush.disc(rng.uniform(0.25, 0.75), ground - 0.06, 0.2, (255, 214, 90))
    brush.box(0, ground, 1, 1, (64, 34, 70))
    return ground


_SCENES = {
    "beach": _beach, "snow": _snow, "forest": _forest, "desert": _desert, "night": _night, "water": _water,
    "city": _city, "grass": _grass, "room": _room, "sunset": _sunset,
}  # fmt: skip
