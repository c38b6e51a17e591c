"""Many pictures in one, labelled, to be looked at side by side."""

from collections.abc import Sequence

LABEL = 20  # pixels of a line of text


def grid(cells: Sequence, rows: Sequence[str], columns: Sequence[str], largest: int = 512):
    """Pictures row by row => one picture: a row's label above it, the columns' labels on top.

    largest: pixels a side; bigger cells are shrunk to it.
    """
    from PIL import Image

    cells = [shrink(cell, largest) for cell in cells]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    sheet = Image.new("RGB", (width * len(columns), LABEL + (LABEL + height) * len(rows)), "white")
    write = _writer(sheet)
    for column, label in enumerate(columns):
        write(label, column * width, 0, width)
    for row, label in enumerate(rows):
        top = LABEL + row * (LABEL + height)
        write(label, 0, top, sheet.width)
        for column, cell in enumerate(cells[row * len(columns) : (row + 1) * len(columns)]):
            sheet.paste(cell, (column * width, top + LABEL))
    return sheet


def contact(cells: Sequence, notes: Sequence[Sequence[str]], marked: Sequence[bool] = (), columns: int = 5, side=200):
    """Pictures in rows => one picture: under each its notes, a line each and the last one red where it is `marked`."""
    from PIL import Image

    lines, columns = max(map(len, notes)), min(columns, len(cells))
    width, height = side + 8, side + lines * LABEL + 8
    sheet = Image.new("RGB", (width * columns, height * -(-len(cells) // columns)), "white")
    write = _writer(sheet)
    for place, (cell, texts) in enumerate(zip(cells, notes)):
        left, top = place % columns * width, place // columns * height
        factor = side // max(cell.size)
        cell = cell.resize((cell.width * factor, cell.height * factor), 0) if factor > 1 else shrink(cell, side)
        sheet.paste(cell, (left + 4 + (side - cell.width) // 2, top + 4 + (side - cell.height) // 2))
        for line, text in enumerate(texts):
            red = line == len(texts) - 1 and place < len(marked) and marked[place]
            write(text, left, top + side + 4 + line * LABEL, width, "#c00000" if red else "black")
    return sheet


def lit(image, top: int, left: int, shape: tuple[int, int]):
    """The (width, height) at (top, left) as it is, framed, and what lies outside of it pale."""
    from PIL import Image, ImageDraw

    if image.size == shape:
        return image
    box = (left, top, left + shape[0], top + shape[1])
    pale = Image.blend(image, Image.new("RGB", image.size, "white"), 0.7)
    pale.paste(image.crop(box), box)
    frame = (left, top, box[2] - 1, box[3] - 1)
    ImageDraw.Draw(pale).rectangle(frame, outline="#e02020", width=1 + min(shape) // 200)
    return pale


def veiled(image, mask):
    """The picture with what its mask ("L") leaves out under a red veil."""
    from PIL import Image

    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size, "#e02020"), 0.6), mask)


def _writer(sheet):
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LABEL * 0.6)

    def write(text: str, left: int, top: int, room: int, fill: str = "black") -> None:
        """As much of the text as fits."""
        shown = text = " ".join(text.split())
        while len(shown) > 1 and pen.textlength(shown, font) > room - 8:
            text = text[:-1].rstrip()
            shown = text + "…"
        pen.text((left + 4, top + 3), shown, fill=fill, font=font)

    return write


def shrink(image, largest: int):
    small = image.copy()
    small.thumbnail((largest, largest))
    return small
