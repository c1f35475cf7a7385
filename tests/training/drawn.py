"""Six drawn sprites, so that scenes can be tested on machines without an emoji font."""

from PIL import Image, ImageDraw


def drawn_sprites() -> dict[str, Image.Image]:
    """Return shapes that differ in outline, color and inner marks, as RGBA squares of 96 pixels."""
    shapes = {
        "apple": lambda d: d.ellipse((4, 4, 91, 91), fill="crimson"),
        "box": lambda d: d.rectangle((8, 8, 87, 87), fill="royalblue"),
        "hill": lambda d: d.polygon([(48, 2), (94, 92), (2, 92)], fill="seagreen"),
        "kite": lambda d: d.polygon([(48, 2), (90, 48), (48, 94), (6, 48)], fill="gold"),
        "bar": lambda d: d.rectangle((2, 34, 94, 62), fill="indigo"),
        "orange": lambda d: d.pieslice((2, 2, 94, 94), 20, 300, fill="darkorange"),
    }
    sprites = {}
    for i, (name, draw) in enumerate(shapes.items()):
        picture = Image.new("RGBA", (96, 96))
        pen = ImageDraw.Draw(picture)
        draw(pen)
        for k in range(3):  # marks inside, in another order for each
            x, y = 30 + 14 * ((i + k) % 3), 42 + 12 * ((i * k) % 2)
            pen.ellipse((x, y, x + 9, y + 9), fill=("white", "black", "white")[k])
        sprites[name] = picture
    return sprites
