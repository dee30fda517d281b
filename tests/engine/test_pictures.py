from types import SimpleNamespace

import numpy as np
from PIL import Image

from fiber_d2.drawing import save_png
from fiber_d2.engine.pictures import OVERVIEW_CELL_WIDTH, write_overview


def drawn(folder, colors):
    """What an evaluator leaves behind that drew pictures of one colour each, and their sheet."""
    paths = []
    for number, color in enumerate(colors):
        paths.append(folder / f"{number}.png")
        save_png(paths[-1], np.full((40, 600, 3), color, np.uint8))
    paths.append(folder / "contact_sheet.png")
    save_png(paths[-1], np.full((90, 90, 3), 7, np.uint8))
    return SimpleNamespace(paths=paths)


def test_the_overview_holds_the_pictures_of_all_sets_once(tmp_path):
    first = drawn(tmp_path / "pictures" / "a", [[255, 0, 0], [0, 255, 0]])
    second = drawn(tmp_path / "pictures" / "b", [[0, 0, 255]])
    path = write_overview(str(tmp_path), [first, SimpleNamespace(paths=[]), second])
    assert path == tmp_path / "pictures" / "contact_sheet.png"
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    area = OVERVIEW_CELL_WIDTH * round(40 * OVERVIEW_CELL_WIDTH / 600)
    for color in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        assert (pixels == color).all(axis=1).sum() == area
    # The sheets of the single sets are not pictures of their own.
    assert not (pixels == [7, 7, 7]).all(axis=1).any()


def test_no_overview_without_pictures(tmp_path):
    assert write_overview(str(tmp_path), [SimpleNamespace(paths=[])]) is None
    assert not (tmp_path / "pictures").exists()
