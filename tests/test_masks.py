"""Objects found, moved, cut out and pasted by code."""

import numpy as np
import pytest

from common import masks

GENERATOR = np.random.default_rng(0)


def block(rows, columns, count=1):
    found = np.zeros((count, 32, 32), bool)
    found[:, slice(*rows), slice(*columns)] = True
    return found


def painted(objects, color, background):
    """Images with objects of one colour on another one, and a little noise."""
    images = np.where(objects[..., None], color, background) + GENERATOR.normal(0, 6, (*objects.shape, 3))
    return np.clip(images, 0, 255).astype("uint8")


def horse():
    """A body, four legs, and head and neck on the left."""
    body = block((14, 21), (7, 26)) | block((21, 29), (8, 11)) | block((21, 29), (22, 25))
    return body | block((6, 14), (6, 10))


def test_the_largest_region_of_each_image_is_kept():
    regions = block((2, 5), (2, 5), 2) | block((10, 20), (10, 20), 2)
    regions[1, 9:21, 9:21] = False
    kept = masks.largest_regions(regions)
    assert np.array_equal(kept[0], block((10, 20), (10, 20))[0])
    assert np.array_equal(kept[1], block((2, 5), (2, 5))[0])
    assert not masks.largest_regions(np.zeros((1, 32, 32), bool)).any()


def test_the_object_is_found_without_evidence_and_despite_wrong_evidence():
    images = painted(horse(), (120, 70, 40), (90, 160, 80))
    for evidence in (np.full((1, 32, 32), 0.5), np.eye(32)[None]):
        found = masks.find_objects(images, evidence)
        both, either = (found & horse()).sum(), (found | horse()).sum()
        assert both / either > 0.8


def test_the_border_does_not_stand_out():
    found = masks.stands_out(painted(horse(), (120, 70, 40), (90, 160, 80)))
    assert found[horse()].mean() > 0.8
    assert found[:, 0].mean() < 0.2


def test_the_pose_is_read_off_the_body():
    back, column, width, head, frontal = masks.find_pose(np.concatenate([horse(), horse()[:, :, ::-1]]))
    assert back.tolist() == [14, 14]
    assert column[0] == pytest.approx(31 - column[1])
    assert 12 < column[0] < 20
    assert 15 < width[0] < 30
    assert head.tolist() == [-1, 1]
    assert not frontal.any()
    assert masks.find_pose(block((5, 28), (12, 18)))[-1].all()


def test_masks_move_up_by_the_given_pixels_and_stay_inside():
    lifted = masks.lift(block((3, 8), (4, 9)), 2)
    assert np.array_equal(lifted, block((1, 6), (4, 9)))
    assert np.array_equal(masks.lift(block((3, 8), (4, 9)), 5), block((0, 3), (4, 9)))


@pytest.mark.parametrize("height", [4, 9])
def test_the_band_of_the_wings_is_above_the_back_and_as_high_as_said(height):
    band = masks.wing_bands(horse(), height)
    assert not (band & horse()).any()
    middle = band[0, :, 18]
    assert middle.sum() == height
    assert np.flatnonzero(middle).tolist() == list(range(14 - height, 14))
    soft = masks.smooth(band)
    assert soft.shape == band.shape
    assert (soft.min(), soft.max()) >= (0, 0.9)
    assert soft.max() <= 1


def test_there_is_no_band_without_a_body():
    assert not masks.wing_bands(np.zeros((1, 32, 32), bool), 5).any()


def test_a_horse_moves_down_until_there_is_room():
    bodies = np.concatenate([horse(), np.roll(horse(), -6, axis=1)])
    drop = masks.room_needed(bodies, 12, 6)
    assert drop.tolist() == [0, 4]
    images = GENERATOR.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    moved = masks.move_down(images, drop)
    assert np.array_equal(moved[0], images[0])
    assert np.array_equal(moved[1, 4:], images[1, :28])
    above = moved[1, :4].astype(float)
    assert (above == above[0]).all()
    assert above[0].mean(axis=0) == pytest.approx(images[1, 0].mean(axis=0), abs=25)
    assert above[0].std(axis=0).max() < images[1, 0].std(axis=0).min()  # smooth: no stripes
    assert np.array_equal(masks.move_down(bodies, drop)[1, 4:], bodies[1, :28])


def test_whole_horses_are_preferred():
    bodies = np.concatenate([block((0, 32), (8, 24)), horse(), block((12, 28), (13, 18)), np.roll(horse(), 2, axis=2)])
    assert masks.best_seen(bodies, 2).tolist() == [1, 3]


@pytest.fixture(scope="module")
def cut():
    """Wings cut out of a blue bar, twice as long on the right of its middle as it is high, and of a square."""
    objects = np.concatenate([block((11, 22), (11, 22)), block((14, 18), (5, 27))])
    return masks.cut_wings(painted(objects, (40, 60, 200), (220, 220, 220)), objects, 2)


def test_a_wing_is_half_of_an_object_along_its_longer_axis(cut):
    assert cut.roots[0] == pytest.approx([15.5, 15.5])  # the bar is the best one: it is longer
    assert np.abs(cut.axes[0]) == pytest.approx([0, 1], abs=1e-6)
    assert cut.lengths[0] == pytest.approx(10.5)
    mask = cut.sources[0, ..., 3] > 0
    assert mask.sum() == 4 * 11
    side = slice(16, 27) if cut.axes[0, 1] > 0 else slice(5, 16)
    assert mask[14:18, side].all()


def test_wings_are_pasted_onto_the_back_reproducibly(cut):
    only = masks.Wings(*(each[:1] for each in cut))
    images = painted(horse(), (120, 70, 40), (90, 160, 80))
    collages, pasted = masks.place_wings(images, horse(), only, 10, 0)
    again, _ = masks.place_wings(images, horse(), only, 10, 0)
    other, _ = masks.place_wings(images, horse(), only, 10, 1)
    assert np.array_equal(collages, again)
    assert not np.array_equal(collages, other)
    inside = pasted[0] > 0.9
    assert np.abs(collages[0][inside].mean(0) - (40, 60, 200)).max() < 25
    assert np.array_equal(collages[0][pasted[0] == 0], images[0][pasted[0] == 0])
    rows, columns = np.nonzero(inside)
    assert rows.max() <= 18  # the root is at the back, which is in row 14
    assert rows.min() < 10
    assert columns.mean() > masks.find_pose(horse())[1][0]  # tilted away from the head, which is on the left


def test_a_horse_seen_from_the_front_gets_two_wings(cut):
    only = masks.Wings(*(each[:1] for each in cut))
    body = block((14, 30), (13, 19))
    _, pasted = masks.place_wings(painted(body, (120, 70, 40), (90, 160, 80)), body, only, 10, 0)
    left, right = pasted[0, :, :16].sum(), pasted[0, :, 16:].sum()
    assert left == pytest.approx(right, rel=0.25)
    assert left > 10


def test_evidence_is_enlarged_and_scaled():
    evidence = np.zeros((1, 8, 8))
    evidence[0, 5:7, 1:3] = 7
    enlarged = masks.enlarged(evidence, 32)
    assert enlarged.shape == (1, 32, 32)
    assert np.unravel_index(enlarged.argmax(), (32, 32)) == pytest.approx((23.5, 7.5), abs=1)
    assert enlarged.min() >= 0 < enlarged.max() <= 1
