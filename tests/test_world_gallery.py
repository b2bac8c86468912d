"""The gallery of the report: a picture of everything, the same bytes for the same seed."""
import json

import cv2
import pytest

from vlarepro.world.gallery import write_gallery
from vlarepro.world.scene import FAMILIES, ROAD_KINDS
from vlarepro.world.suboptimal import NEGATIVE_KINDS


def test_gallery_has_a_picture_of_each_road_family_and_fault(tmp_path):
    pages = write_gallery(tmp_path / "a", seed=100)
    assert [p["file"] for p in pages] == [f"{g}-{n}.jpg" for g, names in (("road", ROAD_KINDS), ("family", FAMILIES), ("pair", NEGATIVE_KINDS)) for n in names]
    for page in pages:
        image = cv2.imread(str(tmp_path / "a" / page["file"]))
        assert image.shape[1] == 800 and image.std() > 30 and (tmp_path / "a" / page["file"]).stat().st_size < 60_000
    assert json.loads((tmp_path / "a" / "gallery.json").read_text()) == pages
    again = write_gallery(tmp_path / "b", seed=100, n_scenes=1, only="road-merge")
    assert (tmp_path / "b" / again[0]["file"]).read_bytes() == (tmp_path / "a" / "road-merge.jpg").read_bytes()
    with pytest.raises(ValueError, match="begins with 'roads'"):
        write_gallery(tmp_path / "c", n_scenes=1, only="roads")
