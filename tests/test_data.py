"""data.py: shapes against their specification, every reader with good and broken files, words and numbers."""

import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import tarfile
import threading
import unicodedata
import zipfile

import common
import data
from tests import shared

import numpy as np
import pytest
import torch

MASK = 2**64 - 1
DECODED = data.decoded


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def refused(text, action, *args, **options):
    """The one line of the DataError that action raises; it must hold `text`."""
    with pytest.raises(data.DataError) as caught:
        action(*args, **options)
    line = str(caught.value)
    assert text in line and "\n" not in line, line
    assert isinstance(caught.value, common.UserError) and caught.value.code == 2
    return line


# --- Shapes: numbers and scenes ------------------------------------------------

def mix_slow(z):
    """splitmix64's finisher on Python's own integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def u_slow(index, field, seed):
    golden = 0x9E3779B97F4A7C15
    a = mix_slow((seed * golden + 0x1234567) & MASK)
    b = mix_slow((index * golden + a) & MASK)
    return (mix_slow((b + (field + 1) * golden) & MASK) >> 40) / 2**24


def test_splitmix_by_hand():
    # The first output of splitmix64 with seed 0, as printed in its author's test vectors.
    assert mix_slow(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert data.mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF
    for index, field, seed in ((0, 0, 0), (7, 3, 0), (10**9 + 5, 47, 2), (5 * 10**8, 8, 12345678901)):
        assert data.uniform(np.array([index]), field, seed)[0] == u_slow(index, field, seed)
    u = data.uniform(np.arange(20000), 5)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002


def scene_slow(index, objects, mixed, clip, seed):
    """One scene, object by object, from the text of the specification."""
    def u(field):
        return u_slow(index, field, seed)

    y, (lo, hi) = index % 10, objects
    count = lo + int((hi - lo + 1) * u(0))
    left, order, which = [0, 1, 2, 3], [], int(24 * u(2))
    for n in (6, 2, 1, 1):
        order.append(left.pop(which // n))
        which %= n
    found = []
    for j in range(count):
        f = 8 + 10 * j
        shape = (y + 1 + int(9 * u(f))) % 10 if mixed and j else y
        if count == 1 and not clip:
            r = 0.32 + 0.12 * u(f + 2)
        elif not mixed:
            r = 0.17 + 0.06 * u(f + 2)
        else:
            r = 0.13 + 0.045 * u(f + 2) if j else 0.215 + 0.03 * u(f + 2)
        q = order[j]
        if count == 1:
            x, v, q = r + (1 - 2 * r) * u(f + 3), r + (1 - 2 * r) * u(f + 4), 4
        else:
            x = 0.25 + 0.5 * (q % 2) + (2 * u(f + 3) - 1) * (0.25 - r)
            v = 0.25 + 0.5 * (q // 2) + (2 * u(f + 4) - 1) * (0.25 - r)
        speed, way = 0.02 + 0.04 * u(f + 7), 2 * math.pi * u(f + 8)
        found.append(dict(shape=shape, colour=int(8 * u(f + 1)), place=q, x=x, y=v, r=r,
                          angle=(2 * u(f + 5) - 1) * 0.15, shade=1 - 0.12 * u(f + 6),
                          vx=speed * math.cos(way), vy=speed * math.sin(way)))
    return dict(label=y, count=count, background=int(4 * u(1)), glow=16 * (u(3) - 0.5)), found


@pytest.mark.parametrize("objects,mixed,frames", [((1, 1), False, 1), ((1, 4), False, 1), ((1, 4), True, 1),
                                                  ((3, 3), True, 8), ((1, 1), True, 8), ((1, 2), False, 8)])
def test_scenes_are_the_specification(objects, mixed, frames):
    indices = [0, 3, 17, 123456, 10**9 + 11, 5 * 10**8 + 8, 29, 42]
    scene = data.scenes(indices, objects, mixed, frames, seed=3)
    for i, index in enumerate(indices):
        whole, found = scene_slow(index, objects, mixed, frames > 1, 3)
        assert {key: scene[key][i] for key in ("label", "count", "background")} == {
            key: whole[key] for key in ("label", "count", "background")}
        plain = [*data.GROUNDS.values()][whole["background"]]
        assert np.allclose(scene["ground"][i], np.array(plain) + whole["glow"], atol=1e-12)
        for j in range(4):
            for key in ("shape", "colour", "place", "x", "y", "r", "angle", "shade", "vx", "vy"):
                want = found[j][key] if j < len(found) else -1
                assert abs(scene[key][i, j] - want) < 1e-12, (index, j, key)
            assert (scene["size"][i, j] == -1) == (j >= len(found))


def test_balance_quadrants_and_mixture():
    index = np.arange(2000)
    scene = data.scenes(index, (1, 4), True)
    assert np.bincount(scene["label"]).tolist() == [200] * 10
    assert (scene["label"][3::10] == 3).all()    # the k-th image of class y is y + 10 k
    assert abs(np.bincount(scene["count"], minlength=5) - [0, 500, 500, 500, 500]).max() < 80
    assert (scene["shape"][:, 0] == scene["label"]).all()
    others = scene["shape"][:, 1:]
    there = others >= 0
    assert (others != scene["label"][:, None])[there].all() and len(set(others[there])) == 10
    assert (scene["r"][:, 1:] < scene["r"][:, :1]).all()                # object 0 is the largest
    plain = data.scenes(index, (4, 4))
    assert (plain["shape"] == plain["label"][:, None]).all()
    assert (np.sort(plain["place"], 1) == np.arange(4)).all()           # four objects, four quadrants
    assert len(np.unique(plain["place"], axis=0)) == 24


@pytest.mark.parametrize("mixed", [False, True])
def test_discs_stay_inside_and_apart_in_stills(mixed):
    scene = data.scenes(np.arange(3000), (1, 4), mixed)
    x, y, r = scene["x"], scene["y"], scene["r"]
    for j in range(4):
        a = scene["count"] > j
        for c in (x, y):
            assert (c[a, j] - r[a, j] > -1e-12).all() and (c[a, j] + r[a, j] < 1 + 1e-12).all()
        for k in range(j):
            gap = np.hypot(x[a, j] - x[a, k], y[a, j] - y[a, k]) - r[a, j] - r[a, k]
            assert (gap > -1e-12).all()


# --- Shapes: pictures ----------------------------------------------------------

OPTIONS = [dict(), dict(objects=(1, 4)), dict(objects=(2, 4), mixed=True),
           dict(objects=(1, 3), mixed=True, frames=3)]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_is_bitwise_the_same_in_any_batch(options):
    index = np.array([5, 999, 12, 10**9 + 1, 7, 5, 30, 61])
    every = data.shapes(index, 32, **options)
    assert every.dtype == np.uint8 and every.shape == (8, *((3,) if "frames" in options else ()), 3, 32, 32)
    for i in range(8):
        assert (data.shapes(index[i:i + 1], 32, **options)[0] == every[i]).all()
    assert (data.shapes(index[::-1], 32, **options)[::-1] == every).all()
    assert (every[0] == every[5]).all() and (every[0] != every[1]).any()
    assert (data.shapes(index, 32, seed=1, **options) != every).any()


def test_an_image_does_not_depend_on_the_block_it_is_drawn_in():
    index, options = np.arange(600), (32, (1, 4), True)     # a block holds 256 images of 32 pixels
    assert (data.shapes(index, *options)[250:260] == data.shapes(index[250:260], *options)).all()


def test_first_frame_is_a_still_under_the_clip_law():
    for options in (dict(objects=(1, 1)), dict(objects=(2, 4), mixed=True)):
        clip = data.shapes(np.arange(40), 16, frames=4, **options)
        assert (clip[:, 0] == data.draw(data.scenes(np.arange(40), frames=2, **options), 16)).all()
        assert (clip[:, 0] != clip[:, 3]).any((1, 2, 3)).all()          # everything moves
    # With two and more objects stills and clips share one law.
    still = data.shapes(np.arange(40), 16, (2, 4))
    assert (still == data.shapes(np.arange(40), 16, (2, 4), frames=2)[:, 0]).all()


def test_bounce_is_reflection_step_by_step():
    """A circle's middle column and row of a large picture tell where it is."""
    scene = data.scenes(np.arange(0, 600, 10), frames=64)
    scene["vx"][:20] *= 9                                               # many bounces
    x, y, vx, vy, r = (scene[key][:, 0].copy() for key in ("x", "y", "vx", "vy", "r"))
    for frame in range(24):
        image = data.draw(scene, 64, frame).astype(float)
        marked = abs(image - scene["ground"][:, :, None, None]).max(1)
        marked[marked < 2] = 0                                          # what rounding leaves on the ground
        pixel = (np.arange(64) + 0.5) / 64
        seen = [(marked.sum(axis) * pixel).sum(1) / marked.sum((1, 2)) for axis in (1, 2)]
        assert abs(seen[0] - x).max() < 2e-3 and abs(seen[1] - y).max() < 2e-3
        for c, v in ((x, vx), (y, vy)):
            c += v
            for _ in range(4):                                          # reflect until inside
                low, high = c < r, c > 1 - r
                c[low], v[low] = (2 * r - c)[low], -v[low]
                c[high], v[high] = (2 * (1 - r) - c)[high], -v[high]


def inside(polygon, x, y):
    """Even-odd rule."""
    odd = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1]):
        odd ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay + 1e-300) + ax)
    return odd


def test_shapes_against_polygons_and_discs():
    x, y = np.meshgrid(np.linspace(-1.3, 1.3, 201), np.linspace(-1.3, 1.3, 201))
    turn = [math.pi * k / 5 for k in range(10)]
    star = [((1.08, 0.52 * 1.08)[k % 2] * math.sin(t), (1.08, 0.52 * 1.08)[k % 2] * math.cos(t) - 0.05)
            for k, t in enumerate(turn)]
    plus = [(.3, .3), (.95, .3), (.95, -.3), (.3, -.3), (.3, -.95), (-.3, -.95), (-.3, -.3), (-.95, -.3),
            (-.95, .3), (-.3, .3), (-.3, .95), (.3, .95)]
    half = math.sqrt(0.5)
    wide = (0.58 + 0.29) / 0.866                                        # the triangle's lower corners
    polygons = {"square": [(.78, .78), (.78, -.78), (-.78, -.78), (-.78, .78)],
                "triangle": [(0, 1.16 - .22), (wide, -.58 - .22), (-wide, -.58 - .22)],
                "diamond": [(.62, 0), (0, 1), (-.62, 0), (0, -1)], "plus": plus, "star": star,
                "cross": [(half * (a + b), half * (b - a)) for a, b in plus]}
    radius = np.hypot(x, y)
    lobes = [(-.37, .25), (.37, .25)]
    regions = {name: inside(polygon, x, y) for name, polygon in polygons.items()}
    regions |= {"circle": radius < .9, "ring": (radius < .9) & (radius > .5),
                "moon": (radius < .95) & (np.hypot(x - .42, y - .12) > .78),
                "heart": inside([(.74, -.12), (0, .62), (-.74, -.12), (0, -.86)], x, y) | np.any(
                    [np.hypot(x - a, y - b) < .74 * half for a, b in lobes], 0)}
    assert list(regions) and set(regions) == set(data.SHAPES) == set(data.DISTANCE)
    for name, region in regions.items():
        s = data.DISTANCE[name](x, y)
        assert ((s < 0) == region)[abs(s) > 0.003].all(), name
        slope = np.hypot(*np.gradient(s, 0.013))
        assert np.quantile(slope, 0.9) < 1.07 and np.median(slope) > 0.9, name    # a distance: slope 1


def test_drawing_paints_the_scene():
    index = np.arange(0, 3000, 10)                                      # circles
    scene, image = data.scenes(index), data.shapes(index, 16).astype(float)
    paint = np.array([*data.COLOURS.values()])[scene["colour"][:, 0]] * scene["shade"][:, :1]
    cover = ((image - scene["ground"][:, :, None, None]) * (paint - scene["ground"])[:, :, None, None]).sum(1)
    cover /= ((paint - scene["ground"])**2).sum(1)[:, None, None]
    area = cover.sum((1, 2)) / 256 / (math.pi * (0.9 * scene["r"][:, 0])**2)
    assert abs(area.mean() - 1.003) < 0.001 and area.std() < 0.004
    row, column = (np.floor(scene[c][:, 0] * 16).astype(int) for c in "yx")
    assert abs(image[np.arange(300), :, row, column] - paint).max() <= 0.5 + 1e-3
    corner = image[:, :, [0, 0, 15, 15], [0, 15, 0, 15]].transpose(0, 2, 1)
    assert (abs(corner - scene["ground"][:, None]).max(2).min(1) <= 0.5 + 1e-3).all()


def test_object_zero_is_on_top_and_a_scene_is_the_same_at_any_size():
    scene = data.scenes(np.arange(10), (2, 2))
    for key in ("x", "y"):
        scene[key][:, 1] = scene[key][:, 0]
    alone = {key: value.copy() for key, value in scene.items()}
    alone["shape"][:, 1] = -1
    row, column = (int(scene[c][1, 0] * 64) for c in "yx")              # the middle of the square
    assert (data.draw(scene, 64)[1, :, row, column] == data.draw(alone, 64)[1, :, row, column]).all()
    scene["shape"][:, 0] = -1
    assert (data.draw(scene, 64)[1, :, row, column] != data.draw(alone, 64)[1, :, row, column]).any()
    large, small = (data.shapes(np.arange(100), size, (1, 4), True).astype(float) for size in (64, 32))
    halved = large.reshape(100, 3, 32, 2, 32, 2).mean((3, 5))
    assert abs(halved - small).mean() < 1 and abs(halved - small).max() < 80


# --- Captions and words --------------------------------------------------------

OBJECT = (rf"a ({'|'.join(data.SIZES)}) ({'|'.join(data.COLOURS)}) ({'|'.join(data.SHAPES)}) in the "
          rf"({'|'.join(data.PLACES)})(?:, moving ({'|'.join(data.DIRECTIONS)}))?")


def parsed(caption):
    """(size, colour, shape, place) of each object, the background and the directions, read from words alone."""
    body, ground = re.fullmatch(r"(.*) on a (\w+) background", caption).groups()
    assert re.fullmatch(rf"{OBJECT}(?:(?:, {OBJECT})* and {OBJECT})?", body), body
    found = re.findall(OBJECT, body)
    tables = (data.SIZES, [*data.COLOURS], data.SHAPES, data.PLACES)
    ids = [[table.index(name) for table, name in zip(tables, names)] for names in found]
    return ids, [*data.GROUNDS].index(ground), [names[4] for names in found]


@pytest.mark.parametrize("frames", [1, 8])
def test_captions_parse_back_to_the_scene(frames):
    index, options = np.arange(300), dict(objects=(1, 4), mixed=True, frames=frames)
    scene = data.scenes(index, **options)
    for i, text in enumerate(data.captions(index, **options)):
        read, ground, directions = parsed(text)
        shown = np.stack([scene[key][i] for key in ("size", "colour", "shape", "place")], 1)
        assert read == shown[:len(read)].tolist() and (shown[len(read):] == -1).all()
        assert ground == scene["background"][i] and len(directions) == len(read) == scene["count"][i]
        for j, direction in enumerate(directions):
            vx, vy = scene["vx"][i, j], scene["vy"][i, j]
            steepest = max(dict(up=-vy, down=vy, left=-vx, right=vx).items(), key=lambda pair: pair[1])[0]
            assert direction == (steepest if frames > 1 else "")
    limits = (0, 0.15, 0.20, 0.32, 0.38, 1)
    for j in range(4):
        for r, size in zip(scene["r"][:, j], scene["size"][:, j]):
            assert size == -1 or limits[size] <= r < limits[size + 1]


def test_captions_read_as_sentences_of_few_words():
    index = [k for k in range(200) if data.scenes([k], (2, 2))["count"][0] == 2][0]
    one = r"a \w+ \w+ circle in the \w+ \w+"
    (text,) = data.captions([index - index % 10], (2, 2))
    assert re.fullmatch(rf"{one} and {one} on a \w+ background", text)
    assert data.captions([0])[0].count(" in the centre on a ") == 1
    assert len(data.WORDS) == len(set(data.WORDS)) < 45
    vocabulary = data.Vocabulary()
    for text in data.captions(np.arange(400), (1, 4), True, 8):
        ids = vocabulary.encode(text)
        assert 3 not in ids and vocabulary.decode([1, *ids, 2, 0, 5]) == text
    assert vocabulary.encode("Two RED circles") == [3, vocabulary.ids["red"], 3]


def test_split_words():
    assert data.split_words("Forty-Five, 三百四 <2tr> don't ünï") == [
        "forty", "-", "five", ",", "三", "百", "四", "<2tr>", "don", "'", "t", "ünï"]
    assert data.split_words("u\u0308n") == ["ün"] and data.split_words("  ") == []


# --- Data and packs ------------------------------------------------------------

def test_open_shapes():
    for split, first in (("judge", 5 * 10**8), ("test", 10**9), ("train", 0)):
        index, found = first + np.arange(30), data.open_data("shapes", split, 16, (1, 2), count=30)
        assert (found.images == data.shapes(index, 16, (1, 2))).all()
        assert found.captions == data.captions(index, (1, 2))
        assert found.labels.tolist() == [*range(10)] * 3 and found.labels.dtype == np.int64
    assert found.name == "shapes" and found.classes == data.SHAPES and not found.latent and found.mean is None
    assert [[*rows] for rows in found.by_class] == [[k, k + 10, k + 20] for k in range(10)]
    x = found.pixels(torch.tensor([4, 2]))
    assert x.dtype == torch.float32 and x.shape == (2, 3, 16, 16) and x.is_contiguous()
    assert torch.equal(x, torch.tensor(found.images[[4, 2]].astype(np.float32)) / 127.5 - 1)
    clips = data.open_data("shapes", size=8, frames=3, count=4)
    assert clips.images.shape == (4, 3, 3, 8, 8) and clips.pixels([1]).shape == (1, 3, 3, 8, 8)
    assert len(data.open_data("shapes", size=8)) == 20000


def test_floats_of_all_bytes_are_those_of_the_formula_on_every_device():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(2, 0)
    found = data.Data(images, np.zeros(2, int))
    want = torch.from_numpy(images[:1]).float() / 127.5 - 1
    for x in (found.pixels([1]), found.pixels(torch.tensor([0]), torch.device("cpu"))):
        assert x.dtype == torch.float32 and torch.equal(x.view(torch.int32), want.view(torch.int32))
    assert torch.equal(found.bytes([1]), torch.from_numpy(images[1:]))
    assert found.pixels([0, 1], "meta").shape == (2, 1, 16, 16) and found.bytes([0], "meta").dtype == torch.uint8


def test_pixels_are_the_same_bits_for_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    found = data.Data(values, np.zeros(1, int))
    plain = torch.from_numpy(values).float() / 127.5 - 1
    assert torch.equal(found.pixels([0]).view(torch.int32), plain.view(torch.int32))
    assert (found.images == np.arange(256).reshape(16, 16)).all()       # what it holds is as it was
    assert plain.min() == -1 and plain.max() == 1


def test_describe_and_require_images(pack):
    images = np.zeros((540, 1, 2, 2), np.uint8)
    train = data.Data(images, np.arange(540) % 2, ["a", "b"], name="folder:x")
    test = data.Data(images[:60], np.zeros(60, int), ["a", "b"], name="folder:x")
    assert data.describe({"train": train, "test": test}) == "540 images, 2 classes (a, b), test 60"
    assert data.describe({"test": test}) == "60 images, 2 classes (a, b)"
    many = data.Data(images, np.arange(540), name="x")
    assert data.describe({"train": many}) == "540 images, 540 classes (0, 1, 2, ..., 539)"
    latents = data.Data(images.astype(np.float32), np.zeros(540, int), latent=True)
    assert data.describe({"train": latents}) == "540 latents, 1 class (0)"
    few = data.Data(images[:3], np.zeros(3, int), name="folder:x")
    data.require_images(few, "test", 3, "FID")
    refused("test split of folder:x: 3 images; FID needs 10", data.require_images, few, "test", 10, "FID")
    pairs = data.translation_pairs(languages=("en", "mi"), limit=100)
    assert data.describe({"train": pairs}) == f"{len(pairs)} pairs, 2 directions" and len(pairs) == len(pairs.source)
    refused("train split of numbers:100: ", data.require_images, pairs, "train", 10**6, "an epoch")
    spec = pack()
    assert data.open_data(spec, size=4).name == spec


@pytest.fixture
def pack(tmp_path):
    """write(**arrays) -> the spec of a pack with 20 pictures, changed by these arrays (None: left out)."""
    def write(kind="npz", save=np.savez, **arrays):
        images = np.arange(20 * 4 * 4 * 3, dtype=np.uint8).reshape(20, 4, 4, 3)
        arrays = {"images": images, "labels": np.arange(20) % 3, **arrays}
        path = tmp_path / "pack.npz"
        save(path, **{key: value for key, value in arrays.items() if value is not None})
        return f"{kind}:{path}"
    return write


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_packs(pack, save, tmp_path):
    texts = np.array([f"text {i}" for i in range(20)])
    spec = pack(save=save, class_names=np.array(["a", "b", "c"]), captions=texts)
    train, test, judge = (data.open_data(spec, split, 4) for split in ("train", "test", "judge"))
    assert len(train) == 18 and (judge.images[:] == train.images[:]).all()
    assert test.captions == ["text 9", "text 19"]
    assert train.classes == ["a", "b", "c"] and train.images.shape == (18, 3, 4, 4)
    source = np.load(tmp_path / "pack.npz")["images"]
    assert (train.images[9] == source[10].transpose(2, 0, 1)).all() and train.labels[9] == 1
    assert train.pixels([0]).is_contiguous()
    assert data.open_data(spec, size=0).images.shape == (18, 3, 4, 4)   # size 0: whatever it is
    split = pack(test_images=source[:5], test_labels=np.arange(5), train_images=source[5:],
                 train_labels=np.arange(15), images=None, labels=None)
    assert len(data.open_data(split, size=4)) == 15 and data.open_data(split, "test", 4).classes == [str(k) for k in range(15)]


def test_grey_and_unlabelled_pictures(pack):
    grey = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)
    for images in (grey, grey[..., None]):
        found = data.open_data(pack(images=images, labels=None), size=4)
        assert found.images.shape == (18, 3, 4, 4)
        assert (found.images[:, 2] == np.delete(grey, [9, 19], 0)).all()
        assert found.classes == ["0"] and not found.labels.any()


def test_videos(pack):
    videos = np.arange(20 * 5 * 4 * 4 * 3, dtype=np.uint8).reshape(20, 5, 4, 4, 3)
    for kind in ("video", "npz"):
        clips = data.open_data(pack(kind, images=None, videos=videos), size=4, frames=3)
        assert clips.images.shape == (18, 3, 3, 4, 4)
        assert (clips.images[2, 1] == videos[2, 1].transpose(2, 0, 1)).all()
        still = data.open_data(pack(kind, images=None, videos=videos), size=4)
        assert (still.images == clips.images[:, 0]).all()


def test_an_unzipped_pack_is_memory_mapped(tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    np.save(folder / "latents.npy", np.ones((6, 2, 3, 3), np.float16))
    np.save(folder / "labels.npy", np.arange(6) % 2)
    found = data.open_data(f"latents:{folder}")
    assert isinstance(found.mean, np.memmap) and found.latents([0], [True], None).shape == (1, 2, 3, 3)


def test_labels_with_gaps_are_classes_of_their_own(pack):
    labels = np.array([207, 7, 107] * 6 + [7, 207])
    train, test = (data.open_data(pack(labels=labels), split, 4) for split in ("train", "test"))
    assert train.classes == test.classes == ["7", "107", "207"]
    assert train.labels[:4].tolist() == [2, 0, 1, 2] and test.labels.tolist() == [2 * (n == 207) + (n == 107) for n in labels[9::10]]
    assert [[*rows] for rows in train.by_class] == [[*np.flatnonzero(train.labels == k)] for k in range(3)]
    many = data.open_data(pack(labels=np.arange(20) % 2 * 10**15), size=4)      # no table of that size
    assert many.classes == ["0", "1000000000000000"] and len(many.by_class) == 2
    names = np.array(["a", "b", "c", "d"])
    named = data.open_data(pack(labels=np.arange(20) % 2 * 2, class_names=names), size=4)
    assert named.classes == [*"abcd"] and named.labels[:2].tolist() == [0, 2] and len(named.by_class[3]) == 0


def test_a_test_split_has_the_class_list_of_train(pack):
    images = np.zeros((20, 4, 4, 3), np.uint8)

    def write(train, test, **more):
        return pack(images=None, labels=None, train_images=images[:len(train)], train_labels=np.array(train),
                    test_images=images[:len(test)], test_labels=np.array(test), **more)
    spec = write([0, 1, 2, 3], [3, 1])
    assert data.open_data(spec, "test", 4).classes == [*"0123"] and data.open_data(spec, "test", 4).labels.tolist() == [3, 1]
    assert data.open_data(write([5, 9], [9]), "test", 4).labels.tolist() == [1]
    refused("label [4] of the test split is not in train", data.open_data, write([0, 1], [1, 4]), "test", size=4)
    refused("not in train", data.open_data, pack(labels=np.arange(20) // 19), "test", size=4)
    for other in ("val", "valid", "validation"):
        spec = pack(images=None, labels=None, train_images=images[:3], train_labels=np.arange(3),
                    **{f"{other}_images": images[:2], f"{other}_labels": np.array([2, 1])})
        assert data.open_data(spec, "test", 4).labels.tolist() == [2, 1] and len(data.open_data(spec, "train", 4)) == 3
    alone = pack(images=None, labels=None, train_images=images, train_labels=np.arange(20) % 2)
    assert [len(data.open_data(alone, split, 4)) for split in ("train", "test", "judge")] == [18, 2, 18]


@pytest.mark.parametrize("changes,split,key", [
    (dict(labels=None, y=np.arange(20) % 3), "train", "no labels; name integers (M,) so; without any y, all would be one class"),
    (dict(labels=None, y=np.arange(20)[:, None]), "train", "holds images, y: no labels"),
    (dict(labels=None, y=np.arange(20) % 3 / 2), "train", "without any y"),
    (dict(labels=None, targets=np.eye(20)), "train", "without any targets"),
    (dict(labels=None, kinds=np.array(["a", "b"] * 10)), "train", "without any kinds"),
    (dict(labels=None, sublabels=np.array(["a"] * 20)), "train", "without any sublabels"),
    (dict(images=None, labels=None, train_images=np.zeros((20, 4, 4, 3), np.uint8), train_labels=np.arange(20) % 3,
          test_images=np.zeros((4, 4, 4, 3), np.uint8)), "test", "no test_labels"),
    (dict(images=None, labels=np.arange(20) % 3, train_images=np.zeros((20, 4, 4, 3), np.uint8)), "train", "no train_labels")])
def test_labels_of_another_name_are_not_one_class(pack, changes, split, key):
    spec = pack(**changes)
    assert spec[4:] in refused(key, data.open_data, spec, split, size=4)


@pytest.mark.parametrize("changes,options,line", [
    (dict(images=np.zeros((20, 4, 4, 3), np.float32)), {}, "uint8 with 1 or 3 channels"),
    (dict(images=np.zeros((20, 4, 4, 5), np.uint8)), {}, "(20, 4, 4, 5): pictures in uint8"),
    (dict(images=np.zeros((20, 48), np.uint8)), {}, "pictures in uint8"),
    (dict(images=np.zeros((20, 4, 6, 3), np.uint8)), {}, "6x4 pixels where 4"),
    (dict(images=np.zeros((20, 4, 6, 3), np.uint8)), dict(size=0), "6x4 pixels where equal sides"),
    (dict(), dict(size=8), "4x4 pixels where 8"),
    (dict(), dict(frames=2), "clips in uint8"),
    (dict(images=None, videos=np.zeros((20, 3, 4, 4, 3), np.uint8)), dict(frames=4), "no clips of 4 frames"),
    (dict(images=None, videos=np.zeros((20, 4, 4, 3), np.uint8)), {}, "no clips"),
    (dict(images=None), {}, "holds labels: no images or videos"),
    (dict(images=np.zeros((9, 4, 4, 3), np.uint8), labels=np.zeros(9, int)), dict(split="test"), "split test: 0 images of 9"),
    (dict(labels=np.zeros(20)), {}, "labels float64"),
    (dict(labels=np.arange(18)), {}, "as many labels and captions"),
    (dict(captions=np.array(["a"])), {}, "as many labels and captions"),
    (dict(labels=np.zeros((20, 1), int)), {}, "labels int64 (18, 1)"),
    (dict(labels=-np.ones(20, int)), {}, "labels int64 (18,)"),
    (dict(class_names=np.array(["a", "b"])), {}, "label 2 but 2 class names"),
    (dict(labels=np.array([{}] * 20)), {}, "allow_pickle"),
    (dict(images=None, labels=None, train_images=np.zeros((4, 4, 4, 3), np.uint8)), dict(split="test"), "split test: 0 images of 4"),
    (dict(images=None, labels=None, test_images=np.zeros((4, 4, 4, 3), np.uint8)), {}, "holds test_images: no images or videos"),
])
def test_broken_packs(pack, changes, options, line):
    spec = pack(**changes)
    assert spec[4:] in refused(line, data.open_data, spec, **{"size": 4, **options})


def test_captions_of_another_number():
    images, labels = np.zeros((3, 3, 4, 4), np.uint8), np.zeros(3, int)
    refused("captions are not 3", data.Data, images, labels, captions=["a"])


def test_members_that_are_no_arrays_are_passed_over(pack, tmp_path):
    spec = pack()
    with zipfile.ZipFile(tmp_path / "pack.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    assert len(data.open_data(spec, size=4)) == 18


@pytest.mark.parametrize("kind", ["npz", "video", "latents", "folder", "cifar10"])
def test_missing_and_unreadable_files(kind, tmp_path):
    line = refused("absent", data.open_data, f"{kind}:{tmp_path}/absent")
    assert "No such file" in line
    for name, content in (("text.npz", b"hello"), ("empty.npz", b""), ("zip.npz", b"PK\x03\x04 and no more"),
                          ("broken.tar.gz", b"\x1f\x8b nothing")):
        (tmp_path / name).write_bytes(content)
        refused(name, data.open_data, f"{kind}:{tmp_path / name}")


def test_a_truncated_pack(pack, tmp_path):
    path = tmp_path / "pack.npz"
    pack()
    path.write_bytes(path.read_bytes()[:-60])
    refused("pack.npz: cannot be read", data.open_data, f"npz:{path}", size=4)
    pack(save=np.savez_compressed)
    whole = bytearray(path.read_bytes())
    whole[100:110] = bytes(10)
    path.write_bytes(whole)
    refused("pack.npz: cannot be read", data.open_data, f"npz:{path}", size=4)


@pytest.mark.parametrize("spec,options,line", [
    *((spec, {}, "give shapes, cifar10, or KIND:PATH")
      for spec in ("shape", "npz", "npz:", "glue:RTE:x", "shapes:x", "", "cifar10:")),
    ("shapes", dict(split="val"), "no split val"), ("shapes", dict(objects=(0, 2)), "objects 0,2"),
    ("shapes", dict(objects=(3, 2)), "objects 3,2"), ("shapes", dict(objects=(1, 5)), "objects 1,5"),
    *(("shapes", {name: 0}, f"{name} 0") for name in ("size", "count", "frames")),
])
def test_bad_requests(spec, options, line):
    refused(line, data.open_data, spec, **options)


# --- Latents -------------------------------------------------------------------

@pytest.fixture
def latents(tmp_path):
    """write(names, shape) -> the arrays written and the data set read back."""
    def write(names, shape=(6, 2, 3, 3), dtype=np.float16, **more):
        random = np.random.default_rng(0)
        arrays = {name: random.normal(size=shape).astype(dtype) for name in ("latents", *names)}
        np.savez(tmp_path / "latents.npz", labels=np.arange(6) % 3, **arrays, **more)
        return arrays, data.open_data(f"latents:{tmp_path / 'latents.npz'}")
    return write


@pytest.mark.parametrize("names", [(), ("logvar",), ("latents_flip",),
                                   ("logvar", "latents_flip", "logvar_flip")])
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (6, 2, 4, 3, 3)])
def test_latents(latents, names, shape):
    arrays, found = latents(names, shape, scale=np.float32(0.5))
    assert found.latent and found.scale == 0.5 and found.mean is found.images and len(found) == 6
    assert found.mean.shape == shape and found.classes == [*"012"] and found.by_class[1].tolist() == [1, 4]
    parts = {"logvar": found.logvar, "latents_flip": found.mean_flip, "logvar_flip": found.logvar_flip}
    assert all((part is None) == (name not in names) for name, part in parts.items())
    index, flip = torch.tensor([5, 0, 3]), torch.tensor([True, False, True])
    noise = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(0))
    z = found.latents(index, flip, noise)
    assert z.dtype == torch.float32 and found.latents(index, flip, noise, "meta").shape == z.shape
    assert torch.equal(found.latents(index, flip, 0.0), found.latents(index, flip, torch.zeros_like(noise)))
    for b in range(3):
        side = "_flip" if flip[b] and "latents_flip" in names else ""
        want = torch.tensor(arrays["latents" + side][index[b]].astype(np.float32))
        if "logvar" in names:
            logvar = torch.tensor(arrays["logvar" + side][index[b]].astype(np.float32))
            want = want + torch.exp(logvar / 2) * noise[b]
        assert torch.allclose(z[b], 0.5 * want, rtol=1e-6, atol=1e-6)


def test_arrays_in_columns_are_mapped_as_they_lie(tmp_path):
    """numpy writes a transposed array column by column, and says so in its head; an odd name moves the data."""
    latents = np.arange(6 * 2 * 3 * 5, dtype=np.float32).reshape(5, 3, 2, 6).T
    np.savez(tmp_path / "z.npz", **{"latents": latents, "labels": np.arange(6), "ä" * 7: np.zeros(3)})
    found = data.open_data(f"latents:{tmp_path / 'z.npz'}")
    assert (found.mean == latents).all() and not found.mean.flags.c_contiguous
    bad = latents.copy("K")
    bad[5, 1, 0, 2] = np.nan
    np.savez(tmp_path / "z.npz", latents=bad, labels=np.arange(6))
    refused("latents[5, 1, 0, 2] is nan", data.open_data, f"latents:{tmp_path / 'z.npz'}")


def test_latents_clamp_and_defaults(latents):
    _, found = latents(("logvar",), dtype=np.float32)
    assert found.scale == 1
    found.logvar = np.broadcast_to(np.array([-1000, 1000], np.float32)[:, None, None], found.mean.shape)
    z = found.latents([0], [False], torch.ones(1, 2, 3, 3)) - torch.tensor(found.mean[:1])
    assert torch.allclose(z[:, 1], torch.tensor(math.exp(10.0))) and z[:, 0].abs().max() < 1e-6
    _, plain = latents(())
    assert torch.equal(plain.latents([1], [True], None), torch.tensor(plain.mean[1:2].astype(np.float32)))


def test_latents_bring_the_images_they_are_of(latents):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    _, found = latents((), images=pictures)
    assert found.latent and found.images is found.mean and found.mean.shape[0] == 6
    want = torch.from_numpy(pictures[[4, 1]]).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(found.pixels([4, 1]), want, atol=1e-6)
    assert latents(())[1].pictures is None


def test_broken_latents(tmp_path):
    z, y = np.zeros((6, 2, 3, 3), np.float16), np.zeros(6, int)
    for arrays, line in (
            (dict(labels=y), "holds labels: latents"), (dict(latents=z), "labels (M,) are wanted"),
            (dict(latents=z.astype(int), labels=y), "floats"), (dict(latents=z[0], labels=y), "floats"),
            (dict(latents=z, labels=y[:5]), "6 latents, labels int64 (5,)"),
            (dict(latents=z, labels=y, logvar=z[:5]), "must have the shape of latents"),
            (dict(latents=z, labels=y, latents_flip=z[..., :2]), "must have the shape of latents"),
            (dict(latents=z, labels=y, images=np.zeros((5, 8, 8, 3), np.uint8)), "images: a square one for each of the 6 latents"),
            (dict(latents=z.astype(np.float32) + 1e30, labels=y), "latents[0, 0, 0, 0] is 1.0000000150474662e+30: numbers"),
            (dict(latents=z, labels=y, images=np.zeros((6, 8, 9, 3), np.uint8)), "images: a square one"),
            (dict(latents=z, labels=y, images=np.zeros((6, 8, 8, 3))), "images float64 (6, 8, 8, 3): pictures in uint8")):
        np.savez(tmp_path / "z.npz", **arrays)
        assert "z.npz" in refused(line, data.open_data, f"latents:{tmp_path / 'z.npz'}")


@pytest.mark.parametrize("scale,want", [
    (np.float32(0.5), 0.5), (np.array([0.5]), 0.5), (np.array([[[2]]]), 2.0), (np.array([0.5, 4.0]), [0.5, 4.0]),
    (np.array([0.5, 4.0]).reshape(2, 1, 1), [0.5, 4.0])])
@pytest.mark.parametrize("shape", [(6, 2, 3, 3), (6, 2, 4, 3, 3)])
def test_a_scale_is_a_number_or_one_a_channel(latents, scale, want, shape):
    arrays, found = latents((), shape, np.float32, scale=scale)
    factor = np.array(want, np.float32).reshape(-1, *[1] * (len(shape) - 2))
    z = found.latents([4, 1], [False, True], None)
    assert z.dtype == torch.float32 and (z.numpy() == factor * arrays["latents"][[4, 1]]).all()


@pytest.mark.parametrize("scale", [0, np.nan, np.inf, np.array([1, 0.0]), np.ones(3), np.array([]), np.array("x"), 1e300, np.array([1, 1e-30])])
def test_scales_that_are_none(latents, scale):
    refused("latents.npz", latents, (), scale=scale)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["latents", "logvar", "latents_flip", "logvar_flip"])
def test_the_first_number_that_is_none_is_named(tmp_path, save, name):
    arrays = {key: np.ones((6, 2, 3, 3), np.float16) for key in ("latents", "logvar", "latents_flip", "logvar_flip")}
    arrays[name][4, 1, 2, 0] = np.inf
    arrays[name][5] = np.nan
    save(tmp_path / "z.npz", labels=np.zeros(6, int), **arrays)
    line = refused(f"{name}[4, 1, 2, 0] is inf", data.open_data, f"latents:{tmp_path / 'z.npz'}")
    assert line.startswith(str(tmp_path / "z.npz"))


def test_a_large_file_of_latents_is_looked_through_once(tmp_path, cache, monkeypatch):
    latents = np.ones((1100, 2, 64, 64), np.float16)                    # 18 MB: 17 blocks and a rest
    path, checks, check = tmp_path / "z.npz", [], data.check_finite
    np.savez(path, latents=latents, labels=np.zeros(1100, int))
    monkeypatch.setattr(data, "check_finite", lambda *args: checks.append(1) or check(*args))
    for _ in range(2):
        assert len(data.open_data(f"latents:{path}")) == 1100
    assert len(checks) == 1 and [file.suffix for file in cache.iterdir()] == [".checked"]
    latents[1090, 1, 63, 5] = np.nan
    np.savez(path, latents=latents, labels=np.zeros(1100, int))
    refused("latents[1090, 1, 63, 5] is nan", data.open_data, f"latents:{path}")
    assert len(checks) == 2
    folder = tmp_path / "columns"                                       # .npy files, another order of numbers
    folder.mkdir()
    np.save(folder / "latents.npy", np.asfortranarray(latents))
    np.save(folder / "labels.npy", np.zeros(1100, int))
    refused("latents[1090, 1, 63, 5] is nan", data.open_data, f"latents:{folder}")


def memory():
    """Bytes of this process in memory now, where the system tells."""
    try:
        pages = int(open("/proc/self/statm").read().split()[1])
    except FileNotFoundError:
        pytest.skip("needs /proc")
    return pages * 4096


@pytest.mark.parametrize("kind", ["latents", "npz"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_costs_the_memory_of_what_is_read(tmp_path, cache, kind, save):
    shape, dtype = ((2000, 4, 64, 64), np.float16) if kind == "latents" else ((3000, 64, 64, 3), np.uint8)
    content = np.broadcast_to(np.arange(shape[0]).astype(dtype)[:, None, None, None], shape)
    save(tmp_path / "big.npz", labels=np.arange(shape[0]) % 2, **{"latents" if kind == "latents" else "images": content})
    spec = f"{kind}:{tmp_path / 'big.npz'}"
    before = memory()
    found = data.open_data(spec, size=64)
    assert content.nbytes > 30 * 2**20 and memory() - before < 8 * 2**20
    rows = np.arange(0, 1900, 50)
    x = found.latents(rows, np.zeros(38, bool), None) if kind == "latents" else found.pixels(rows)
    assert memory() - before < 12 * 2**20
    place = rows if kind == "latents" else data.held_out(3000, "train")[rows]
    want = torch.tensor(content[place, 0, 0, 0].astype(np.float32))
    assert torch.equal(x[:, 0, 0, 0], want if kind == "latents" else want / 127.5 - 1)


# --- CIFAR-10 ------------------------------------------------------------------

def batch_bytes(images, labels):
    """A batch file as Python 2 pickled it: byte strings, protocol 2, numpy.core; opcode by opcode."""
    def text(word):
        return b"U" + bytes([len(word)]) + word

    def number(n):
        return b"J" + n.to_bytes(4, "little", signed=True)

    raw = images.transpose(0, 3, 1, 2).tobytes()
    dtype = (b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + number(-1)
             + number(-1) + b"K\x00tb")
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01"
             + number(len(images)) + number(3072) + b"\x86" + dtype + b"\x89T" + number(len(raw))[1:] + raw
             + b"tb")
    return (b"\x80\x02}(" + text(b"batch_label") + text(b"a batch") + text(b"labels") + b"]("
            + b"".join(b"K" + bytes([k]) for k in labels) + b"e" + text(b"data") + array + b"u.")


@pytest.fixture
def cifar():
    """The bytes of a small archive in the published layout, with its images (NHWC) and labels by part."""
    random, parts, buffer = np.random.default_rng(1), {"train": ([], []), "test": ([], [])}, io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
            images, labels = random.integers(0, 256, (4, 32, 32, 3), np.uint8), random.integers(0, 10, 4)
            for all_of_them, new in zip(parts["test" if name == "test_batch" else "train"], (images, labels)):
                all_of_them.append(new)
            content = batch_bytes(images, labels)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), {key: tuple(map(np.concatenate, value)) for key, value in parts.items()}


@pytest.fixture
def server(monkeypatch, cifar):
    """A local stand-in for the host: 'mode' is good, cut or missing; 'asked' counts requests."""
    state = {"mode": "good", "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["asked"] += 1
            if state["mode"] == "missing":
                return self.send_error(404)
            content = cifar[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000] if state["mode"] == "cut" else content)

        def log_message(self, *args):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{host.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(cifar[0]).hexdigest())
    yield state
    host.shutdown()
    thread.join()
    host.server_close()


def check_cifar(spec, parts):
    for split, part in (("train", "train"), ("judge", "train"), ("test", "test")):
        found = data.open_data(spec, split)
        images, labels = parts[part]
        assert (found.images == images.transpose(0, 3, 1, 2)).all() and (found.labels == labels).all()
        assert found.images.dtype == np.uint8 and found.classes[:2] == ["airplane", "automobile"]
        assert len(found.classes) == 10


def test_cifar_is_published_where_we_look():
    assert data.CIFAR_URL == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert data.CIFAR_MD5 == "c58f30108f718f92721af3b95e74349a"


def test_cifar_download(server, cifar, cache):
    check_cifar("cifar10", cifar[1])
    (unpacked,) = cache.glob("cifar10-*.npz")                           # once: then both splits are memory-mapped
    assert server["asked"] == 1 and {*cache.iterdir()} == {unpacked, cache / "cifar-10-python.tar.gz"}
    assert not data.open_data("cifar10").images.flags.owndata


@pytest.mark.parametrize("mode,line", [("cut", "1000 of"), ("missing", "404"), ("wrong", "is right")])
def test_cifar_download_that_fails(server, cifar, cache, monkeypatch, mode, line):
    server["mode"] = mode
    if mode == "wrong":
        monkeypatch.setattr(data, "CIFAR_MD5", "0" * 32)
    assert data.CIFAR_URL in refused(line, data.open_data, "cifar10")
    assert list(cache.iterdir()) == []                                  # nothing is left behind
    server["mode"] = "good"
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(cifar[0]).hexdigest())
    check_cifar("cifar10", cifar[1])


def test_cifar_without_a_server(monkeypatch, cache):
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    refused("127.0.0.1:9", data.open_data, "cifar10")
    assert list(cache.iterdir()) == []


def test_cifar_copies(cifar, tmp_path):
    content, parts = cifar
    (tmp_path / "copy.tar.gz").write_bytes(content)
    check_cifar(f"cifar10:{tmp_path / 'copy.tar.gz'}", parts)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    with tarfile.open(tmp_path / "copy.tar.gz") as archive:
        for member in archive.getmembers():
            (tmp_path / member.name).write_bytes(archive.extractfile(member).read())
    check_cifar(f"cifar10:{folder}", parts)
    np.savez(tmp_path / "copy.npz", class_names=np.array("airplane automobile c d e f g h i j".split()),
             **{f"{part}_images": images for part, (images, labels) in parts.items()},
             **{f"{part}_labels": labels for part, (images, labels) in parts.items()})
    check_cifar(f"cifar10:{tmp_path / 'copy.npz'}", parts)
    (folder / "data_batch_3").unlink()
    refused("lacks data_batch_3", data.open_data, f"cifar10:{folder}")
    (tmp_path / "half.tar.gz").write_bytes(content[:len(content) // 2])
    refused("half.tar.gz: cannot be read", data.open_data, f"cifar10:{tmp_path / 'half.tar.gz'}")


def test_a_pickle_may_hold_arrays_only(tmp_path):
    for protocol in (3, 4):
        content = pickle.dumps({b"data": np.arange(6, dtype=np.uint8), b"labels": [1, 2]}, protocol)
        loaded = data.ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        assert loaded[b"data"].tolist() == [*range(6)] and loaded[b"labels"] == [1, 2]
    folder, ran = tmp_path / "batches", tmp_path / "ran"
    folder.mkdir()

    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(ran)!r}, 'w')",)

    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": Trap()}))
    refused("unsafe pickle: builtins.exec", data.open_data, f"cifar10:{folder}")
    assert not ran.exists()


# --- Folders of pictures -------------------------------------------------------

def fake_decoded(sources, size):
    """Stands in for Pillow: 'picture' k is k everywhere, of the side that its file says."""
    for source in sources:
        k, side = map(int, source.read_text().split())
        yield np.full((3, size or side, size or side), k, np.uint8)


def put(folder, *names):
    """Fake pictures of side 4, numbered in this order."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{k} 4")
    return folder


def numbers(folder, split):
    """The classes of a folder, and the pairs (number of the picture, label) of a split."""
    found = data.open_data(f"folder:{folder}", split, 4)
    return found.classes, [*zip(found.images[:, 0, 0, 0].tolist(), found.labels.tolist())]


@pytest.fixture
def fakes(monkeypatch):
    """Nothing here needs Pillow."""
    monkeypatch.setattr(data, "decoded", fake_decoded)
    monkeypatch.setattr(data, "endings", lambda: {".png", ".jpg", ".webp"})


@pytest.fixture
def folder(tmp_path, fakes):
    """A folder with classes ant (10 pictures), bee (10): fake ones, numbered."""
    for k in range(20):
        path = tmp_path / "pictures" / ("ant", "bee")[k // 10] / f"{k:02}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{k} 4")
    (tmp_path / "pictures" / "ant" / "notes.txt").write_text("not a picture")
    return tmp_path / "pictures"


def test_folders(folder):
    train, test = (data.open_data(f"folder:{folder}", split, 4) for split in ("train", "test"))
    assert train.classes == ["ant", "bee"] and isinstance(train.images, np.memmap) and len(train) == 18
    assert test.images[:, 0, 0, 0].tolist() == [9, 19] and test.labels.tolist() == [0, 1]
    assert 9 not in train.images[:, 0, 0, 0] and train.pixels([3]).shape == (1, 3, 4, 4)
    for side in ("train", "val"):
        (folder / side / "cat").mkdir(parents=True)
        (folder / side / "cat" / "1.jpg").write_text("7 4" if side == "train" else "8 4")
    assert data.open_data(f"folder:{folder}", "train", 4).images[:, 0, 0, 0].tolist() == [7]
    assert data.open_data(f"folder:{folder}", "test", 4).images[:, 0, 0, 0].tolist() == [8]


def test_a_folder_is_packed_once_and_again_when_it_changed(folder, cache, monkeypatch):
    calls = []
    monkeypatch.setattr(data, "decoded", lambda *args: calls.append(1) or fake_decoded(*args))
    for _ in range(2):
        data.open_data(f"folder:{folder}", size=4)
    assert len(calls) == 1
    (before,) = cache.iterdir()
    (folder / "ant" / "00.PNG").write_text("77 4")
    assert data.open_data(f"folder:{folder}", size=4).images[0, 0, 0, 0] == 77 and len(calls) == 2
    (after,) = cache.iterdir()
    assert after != before                                              # the old one is gone
    data.open_data(f"folder:{folder}", size=8)
    assert len(calls) == 3 and len(list(cache.iterdir())) == 2          # another size is another pack
    for _ in range(2):
        data.open_data(f"folder:{folder}", "test", size=4)              # and another split
        data.open_data(f"folder:{folder}", size=4)
    assert len(calls) == 4 and len(list(cache.iterdir())) == 3
    monkeypatch.setattr(data, "rgb", fake_decoded)                      # and another way to decode
    data.open_data(f"folder:{folder}", size=4)
    assert len(calls) == 5


def test_a_pack_that_was_interrupted_is_not_there(folder, cache, monkeypatch):
    def stops(sources, size):
        yield from fake_decoded(sources[:5], size)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "decoded", stops)
    with pytest.raises(KeyboardInterrupt):
        data.open_data(f"folder:{folder}", size=4)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(data, "decoded", fake_decoded)
    assert len(data.open_data(f"folder:{folder}", size=4)) == 18


def test_bad_folders(folder, cache, monkeypatch, tmp_path):
    assert data.open_data(f"folder:{folder}", size=0).images.shape == (18, 3, 4, 4)
    (folder / "bee" / "11.PNG").write_text("11 6")
    line = refused("mixed image sizes", data.open_data, f"folder:{folder}", size=0)
    assert "11.PNG" in line and "(3, 4, 4), (3, 6, 6): scale them" in line
    assert data.open_data(f"folder:{folder}", size=4).images.shape == (18, 3, 4, 4)  # with a size the reader scales
    (tmp_path / "empty").mkdir()
    refused("empty", data.open_data, f"folder:{tmp_path / 'empty'}")
    refused("clips come in npz", data.open_data, f"folder:{folder}", size=4, frames=2)
    monkeypatch.setattr(data, "decoded", DECODED)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    refused("pip install pillow", data.open_data, f"folder:{folder}", size=5)
    assert not list(cache.glob("*.tmp"))


def test_a_full_disk_is_one_line(folder, cache, monkeypatch):
    def full(sources, size):
        yield from fake_decoded(sources[:2], size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "decoded", full)
    with pytest.raises(common.UserError, match="No space left on device") as caught:
        data.open_data(f"folder:{folder}", size=4)
    assert caught.value.code == 1 and "\n" not in str(caught.value) and list(cache.iterdir()) == []


def test_a_folder_of_any_depth_and_type_in_the_order_of_names(tmp_path, fakes, capsys):
    root = put(tmp_path / "größe und farbe", "b/deep/er/1.webp", "a/2.PNG", "b/1.png", "a/10.jpg", "b/notes.txt",
               "a/.hidden.png", ".git/x.png", "loose.png", "b/.thumbs/1.png", "a/film.mp4", "a/readme")
    train = ["a/10.jpg", "a/2.PNG", "b/1.png", "b/deep/er/1.webp"]      # as strings sort; 3, 1, 2, 0 as written
    assert numbers(root, "train") == (["a", "b"], [(3, 0), (1, 0), (2, 1), (0, 1)]) and len(train) == 4
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{root}: left out: 3 hidden, ")
    for part in ("1 of type .txt", "1 of type .mp4", "1 of type unknown", "1 in other folders"):
        assert part in said
    numbers(root, "train")
    assert capsys.readouterr().out == ""                                # said once


def test_splits_of_a_folder_share_the_classes_of_train(tmp_path, fakes, capsys):
    for name in ("test", "val", "valid", "validation", "Testing"):
        root = put(tmp_path / name, "train/a/1.png", "train/b/1.png", "train/c/1.png", f"{name}/c/1.png", f"{name}/a/2.png")
        assert numbers(root, "train") == (["a", "b", "c"], [(0, 0), (1, 1), (2, 2)])
        assert numbers(root, "test") == (["a", "b", "c"], [(4, 0), (3, 2)])     # one that lacks b
    put(root, "testing/zebra/1.png")
    refused("class zebra is in the test split, but none of train's", data.open_data, f"folder:{root}", "test", 4)
    imagenet = put(tmp_path / "imagenet", "train/a/1.png", "train/b/1.png", "val/b/1.png", "test/1.png", "test/2.png")
    assert capsys.readouterr().out == ""                                # so far nothing was left out
    assert numbers(imagenet, "test") == (["a", "b"], [(2, 1)])
    assert "2 in other folders" in capsys.readouterr().out
    alone = put(tmp_path / "alone", *(f"train/{'ab'[k // 10]}/{k:02}.png" for k in range(20)))
    assert numbers(alone, "test") == (["a", "b"], [(9, 0), (19, 1)]) and len(numbers(alone, "train")[1]) == 18
    refused("no train/CLASS", numbers, put(tmp_path / "val only", "val/a/1.png", "val/b/2.png"), "train")


def test_classes_called_train_test_and_val(tmp_path, fakes):
    root = put(tmp_path / "vehicles", *(f"{name}/{k}.png" for name in ("bus", "train", "test", "val") for k in range(5)))
    classes, train = numbers(root, "train")
    assert classes == ["bus", "test", "train", "val"] and len(train) == 18
    assert numbers(root, "test")[1] == [(14, 1), (19, 3)]               # bus 0..4, train 5..9, test 10..14, val 15..19
    flat = put(tmp_path / "flat", *(f"{k}.png" for k in range(10)))
    assert numbers(flat, "train") == (["flat"], [(k, 0) for k in range(9)]) and numbers(flat, "test") == (["flat"], [(9, 0)])


def test_nine_pictures_have_no_test_split(tmp_path, fakes, cache):
    root = put(tmp_path / "nine", *(f"a/{k}.png" for k in range(9)))
    assert len(numbers(root, "train")[1]) == 9
    refused("split test: 0 images of 9", data.open_data, f"folder:{root}", "test", 4)
    assert len(list(cache.iterdir())) == 1                              # nothing empty was packed


def test_a_class_folder_may_be_a_link(tmp_path, fakes):
    put(tmp_path / "elsewhere", "1.png", "2.png")
    put(tmp_path / "linked", "b/3.png")
    (tmp_path / "linked" / "a").symlink_to(tmp_path / "elsewhere")
    assert numbers(tmp_path / "linked", "train") == (["a", "b"], [(0, 0), (1, 0), (0, 1)])
    (tmp_path / "linked" / "b" / "loop").symlink_to(tmp_path / "linked")
    assert len(numbers(tmp_path / "linked", "train")[1]) == 3           # which ends


def test_names_that_are_no_text(tmp_path, fakes, capsys):
    """A name of a file is bytes on Linux: neither the cache nor a message stumbles over it."""
    odd = os.fsdecode(b"\xff\xfe")
    try:
        root = put(tmp_path / odd, f"{odd}/1.png", "b/2.png", f"{odd}.bin")
    except OSError:
        pytest.skip("this system wants text")
    assert [*zip(*numbers(root, "train")[1])] == [(1, 0), (0, 1)]
    assert "left out: 1 of type .bin" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0.9, 0.3, 0.0])
def test_a_cached_pack_that_was_cut_short_is_made_anew(folder, cache, capsys, cut):
    whole = data.open_data(f"folder:{folder}", size=4).images.copy()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:int(cut * len(content))])
    capsys.readouterr()
    assert (data.open_data(f"folder:{folder}", size=4).images == whole).all() and path.read_bytes() == content
    assert f"{path}: damaged" in capsys.readouterr().out


def test_an_unpacked_file_that_was_cut_short_is_made_anew(pack, cache, capsys):
    spec = pack(save=np.savez_compressed)
    whole = data.open_data(spec, size=4).images[:]
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    assert (data.open_data(spec, size=4).images[:] == whole).all()
    assert "made anew" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ä ö/日本 [x]*", "plain"])
def test_a_checkout_that_cannot_be_written(tmp_path, fakes, monkeypatch, capsys, name):
    """The cache moves to the system's folder, which is said; what CACHE holds already is used."""
    root = put(tmp_path / name, "a/1.png", "a/2.png")
    spare = tmp_path / "system"
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(spare))
    kept = numbers(root, "train")
    access = data.os.access
    monkeypatch.setattr(data.os, "access", lambda path, mode: path != data.CACHE and access(path, mode))
    assert numbers(root, "train") == kept and not spare.exists() and "cannot be written" not in capsys.readouterr().out
    assert data.open_data(f"folder:{root}", size=6).images.shape == (2, 3, 6, 6)
    assert len(list((spare / "papers-data").iterdir())) == 1
    assert f"{data.CACHE}: cannot be written" in capsys.readouterr().out
    spare.joinpath("papers-data").rename(tmp_path / "gone")
    spare.joinpath("papers-data").write_text("in the way")
    with pytest.raises((common.UserError, OSError), match="papers-data"):      # the launcher makes one line of both
        data.open_data(f"folder:{root}", size=6)


def test_deep_pictures_are_scaled_not_clipped():
    """16 bits to 8 without Pillow: every 8-bit value comes back from each way to store it."""
    value = np.arange(256).reshape(16, 16)
    for deep, sixteen in ((value * 257, True), (value.astype(">u2") * 257, True), (value / 255, False),
                          (value.astype(np.float32) / 255, False), (value.astype(np.float32), False),
                          (value, False), (value * 257, False), (value * 257.0, False)):
        assert (data.eight_bits(deep, sixteen, "x") == value).all()
    assert data.eight_bits(np.array([[0, 128, 129, 255]]), True, "x").tolist() == [[0, 0, 1, 1]]   # dark, not stretched
    assert data.eight_bits(np.array([[0, 1]]), False, "x").tolist() == [[0, 1]]         # integers are no shares
    bad = value / 255
    bad[3, 5] = bad[7, 7] = np.nan
    refused("x: pixel [3, 5] is nan", data.eight_bits, bad, False, "x")
    for wrong in (-value, value * 300):
        refused("x: values ", data.eight_bits, wrong, False, "x")


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "I;16B", "F", "RGBX", "La", "RGBa"]


@pytest.mark.optional
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reaches_rgb(mode):
    from PIL import Image
    grey = Image.fromarray(np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[None], 4, 0))
    image = grey.convert("RGB")
    if mode.startswith("I;16"):
        image = Image.frombytes(mode, grey.size, (np.asarray(grey).astype(int) * 257).astype(">u2" if mode[-1] == "B" else "<u2").tobytes())
    elif mode == "LAB":
        from PIL import ImageCms
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    else:
        image = (grey if mode in ("P", "PA") else image).convert(mode)
    assert image.mode == mode
    got = np.asarray(data.rgb(image, "x")).astype(int)
    want = np.asarray(image.convert("L") if mode == "1" else grey)[..., None]
    assert got.shape == (4, 16, 3) and abs(got - want).max() <= (3 if mode == "LAB" else 2 if mode in ("HSV", "YCbCr") else 0)


@pytest.mark.optional
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_lies_on_white(kind, tmp_path):
    from PIL import Image
    clear = np.array([[200, 10]], np.uint8)                             # the right pixel is fully transparent
    if kind == "RGBA":
        image, more = Image.fromarray(np.array([[[200, 200, 200, 255], [10, 10, 10, 0]]], np.uint8)), {}
    elif kind == "LA":
        image, more = Image.fromarray(np.array([[[200, 255], [10, 0]]], np.uint8), "LA"), {}
    elif kind == "I;16":
        image, more = Image.fromarray(clear.astype(np.uint16) * 257), dict(transparency=2570)
    else:
        image = Image.fromarray(clear).convert(kind)
        more = dict(transparency={"P": 10, "L": 10, "RGB": (10, 10, 10)}[kind])
    image.save(tmp_path / "x.png", **more)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == kind
        assert np.asarray(data.rgb(image, "x")).tolist() == [[[200] * 3, [255] * 3]]
    half = Image.new("RGBA", (1, 1), (100, 0, 0, 128))
    assert abs(np.asarray(data.rgb(half, "x")).astype(int)[0, 0] - [177, 127, 127]).max() <= 1


@pytest.mark.optional
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "tga", "pgm", "jp2", "ico"])
def test_file_types_that_pillow_reads(tmp_path, ending):
    from PIL import Image
    image = Image.fromarray(np.arange(0, 256, dtype=np.uint8).reshape(16, 16))
    (tmp_path / "p" / "a" / "b c").mkdir(parents=True)
    image.convert("RGB" if ending not in ("pgm", "gif") else "L").save(tmp_path / "p" / "a" / "b c" / f"x.{ending}")
    found = data.open_data(f"folder:{tmp_path / 'p'}", size=0)
    assert found.images.shape == (1, 3, 16, 16) and found.classes == ["a"]
    assert abs(found.images[0, 0].astype(int) - np.asarray(image)).mean() < 4


@pytest.mark.optional
def test_sixteen_bit_files(tmp_path, cache):
    from PIL import Image
    grey = np.arange(256).reshape(16, 16)
    (tmp_path / "p" / "a").mkdir(parents=True)
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "p" / "a" / "1.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "p" / "a" / "2.tif")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "p" / "a" / "3.tif")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "p" / "a" / "4.tif")
    (tmp_path / "p" / "a" / "5.pgm").write_bytes(b"P5 16 16 65535\n" + (grey * 257).astype(">u2").tobytes())
    images = data.open_data(f"folder:{tmp_path / 'p'}", size=0).images
    assert images.shape == (5, 3, 16, 16) and (images == grey).all()
    bad = (grey / 255).astype(np.float32)
    bad[2, 9] = np.inf
    Image.fromarray(bad).save(tmp_path / "p" / "a" / "4.tif")
    assert "4.tif" in refused("pixel [2, 9] is inf", data.open_data, f"folder:{tmp_path / 'p'}", size=0)


@pytest.mark.optional
def test_pictures_are_scaled_and_cropped(tmp_path, cache):
    from PIL import Image
    ramp = np.zeros((20, 40, 3), np.uint8)
    ramp[:, :, 0] = np.arange(40) * 6
    (tmp_path / "p" / "a").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "p" / "a" / "wide.png")
    Image.fromarray(ramp.transpose(1, 0, 2)).save(tmp_path / "p" / "a" / "tall.jpg", quality=95)
    Image.fromarray(ramp[:, :20, 0]).save(tmp_path / "p" / "a" / "grey.png")
    images = data.open_data(f"folder:{tmp_path / 'p'}", size=10).images
    assert images.shape == (3, 3, 10, 10)
    grey, tall, wide = images.astype(int)                               # in the order of their names
    assert abs(wide[0, 5] - (np.arange(10, 30) * 6).reshape(10, 2).mean(1)).max() <= 4      # the middle half
    assert abs(tall[0, :, 5] - wide[0, 5]).max() < 12 and (wide[1:] == 0).all()
    assert (grey[0] == grey[2]).all() and grey[0, 0, 9] > 90
    (tmp_path / "p" / "a" / "tall.jpg").write_bytes((tmp_path / "p" / "a" / "tall.jpg").read_bytes()[:400])
    refused("tall.jpg: cannot be read", data.open_data, f"folder:{tmp_path / 'p'}", size=10)
    assert not list(cache.glob("*.tmp"))


@pytest.mark.optional
def test_jpeg_streams(tmp_path):
    from PIL import Image
    streams = []
    for k in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (60 * k, 80, 200)).save(buffer, "JPEG", quality=90)
        streams.append(buffer.getvalue())
    head = len(streams[0])
    while len({stream[:head] for stream in streams}) > 1:
        head -= 1
    scans = [np.frombuffer(stream[head:], np.uint8) for stream in streams]
    offset = np.cumsum([0, *map(len, scans)])
    arrays = {"header": np.frombuffer(streams[0][:head], np.uint8)}
    for part in ("train", "test"):
        arrays |= {f"{part}_scan": np.concatenate(scans), f"{part}_offset": offset}
        arrays[f"{part}_labels"] = np.arange(3)
    np.savez(tmp_path / "jpeg.npz", **arrays)
    found = data.open_data(f"cifar10:{tmp_path / 'jpeg.npz'}")
    assert found.images.shape == (3, 3, 32, 32)
    assert abs(found.images[2].mean((1, 2)) - [120, 80, 200]).max() < 4
    assert len(data.open_data(f"cifar10:{tmp_path / 'jpeg.npz'}", "test")) == 3


# --- WordPiece and GLUE --------------------------------------------------------

TOKENS = """[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able ##a ##ff the cafe naive 中 国 , . ! ' ##s s a ##b b
$ 1 ##2 x hello world – i ang ##strom""".split()


@pytest.fixture
def pieces(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return data.WordPiece(path)


@pytest.mark.parametrize("text,tokens", [
    ("unaffable", "un ##aff ##able"), ("The café, naïve!", "the cafe , naive !"),
    ("cafe\u0301 CAFÉ", "cafe cafe"), ("中国hello中", "中 国 hello 中"), ("\U00020000中", "[UNK] 中"),
    ("한국", "[UNK]"), ("😀", "[UNK]"), ("Ångström", "ang ##strom"), ("İ", "i"),
    ("hello\u200bworld", "[UNK]"), ("hel\u200blo\u00ad", "hello"),
    ("hello\u00a0world\u3000a\tb\r\nx", "hello world a b x"), ("hello\x00\ufffd\x0c\x85", "hello"),
    ("hello–world", "hello – world"), ("$12.", "$ 1 ##2 ."), ("s's", "s ' s"), ("`", "[UNK]"),
    ("[MASK]", "[UNK] [UNK] [UNK]"), ("ab a", "a ##b a"), ("abc", "[UNK]"), ("zzz hello", "[UNK] hello"),
    ("un" * 51, "[UNK]"), ("a" * 101, "[UNK]"), ("", ""), (" \n ", ""),
])
def test_wordpiece_hard_cases(pieces, text, tokens):
    ids, types, mask = pieces.encode(text)
    assert [TOKENS[i] for i in ids] == ["[CLS]", *tokens.split(), "[SEP]"]
    assert types == [0] * len(ids) and mask == [1] * len(ids)


@pytest.mark.parametrize("text, parts", [
    ("The café, naïve!", "The|café|,|naïve|!"), ("un unaffable", "un|un|aff|able"), ("s ab\tunaffable", "s|a|b|un|aff|able"),
    ("cafe\u0301 CAFÉ", "cafe|CAFÉ"), ("中国hello", "中|国|hello"), ("hel\u200blo a", "hel\u200blo|a"), ("İ,zz a", "İ|,|zz|a"),
    ("  Ångström\n$12.", "Ång|ström|$|1|2|."), ("a\x85b\x1ca x", "a|b|a|x"), ("", "")])
def test_a_piece_keeps_its_place(text, parts, pieces):
    """What a token stands for, cut from the text as it was written; [UNK] stands for its whole word."""
    ids, places = pieces.body(text)
    assert ids == pieces.encode(text)[0][1:-1] and len(ids) == len(places)
    assert [text[a:b] for a, b in places] == [part for part in parts.split("|") if part]


def test_places_of_all_characters(pieces):
    """Any character beside two known words leaves them where they are, and the words are those of the whole text."""
    for cased in (False, True):
        pieces.cased = cased
        pieces.stretch.cache_clear()
        for code in [*range(0x500), *range(0x1e00, 0x2100), 0x130, 0x345, 0x3000, 0xac00, 0xfffd, 0x1d15e, 0x2f800]:
            text = f"hello {chr(code)} world"
            ids, places = pieces.body(text)
            assert text[slice(*places[0])] == "hello" and text[slice(*places[-1])] == "world", hex(code)
            plain = text if cased else unicodedata.normalize("NFD", text.lower())
            words = "".join(data.spaced(char, cased) for char in plain).split()
            assert ids == [i for word in words for i, _, _ in pieces.pieces(word)], hex(code)
            assert all(a < b <= c for (a, b), (c, _) in zip(places, places[1:]) if places), hex(code)


CASED = """[PAD] [UNK] [CLS] [SEP] [MASK] The the café cafe Café É é ##é 中 国 , ! US us ##A n Ångström ß SS Paris
e\u0301 e ##\u0301""".split()


@pytest.mark.parametrize("text, ids", [
    ("The the THE", [5, 6, 1]), ("café Café, cafe!", [7, 9, 15, 8, 16]), ("US us USA", [17, 18, 17, 19]),
    ("cafe\u0301", [8, 27]), ("e\u0301 é É", [25, 11, 10]), ("éé", [11, 12]), ("CAFÉ", [1]),
    ("中国The中", [13, 14, 5, 13]), ("\u212bngström Ångström", [1, 21]), ("ß SS", [22, 23]),
    ("Paris,中!", [24, 15, 13, 16]), ("Pa\u200bris\u00ad \ufffd", [24]), ("[MASK]", [1, 1, 1]), ("İ", [1])])
def test_wordpiece_of_a_cased_vocabulary(text, ids, tmp_path):
    """No lower-casing, no stripping of accents, no composing; controls, Chinese and punctuation as ever."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(CASED) + "\n", encoding="utf-8")
    assert data.WordPiece(path, cased=True).encode(text)[0] == [2, *ids, 3]


def test_the_tokenizers_own_file_decides_about_case(tmp_path):
    path, about = tmp_path / "bert-vocab.txt", tmp_path / "tokenizer_config.json"
    path.write_text("\n".join(CASED) + "\n", encoding="utf-8")
    assert data.WordPiece(path).encode("The CAFÉ")[0] == [2, 6, 8, 3]       # uncased: BERT's usual one
    for said, cased in (("false", True), ("true", False)):
        about.write_text(f'{{"do_lower_case": {said}, "model_max_length": 512}}')
        for argument in (True, False):
            words = data.WordPiece(path, cased=argument)
            assert words.cased is cased and words.encode("The")[0] == [2, 5 if cased else 6, 3]
    about.write_text('{"model_max_length": 512}')
    assert data.WordPiece(path, cased=True).cased and not data.WordPiece(path).cased
    about.write_text("{")
    refused("tokenizer_config.json: cannot be read", data.WordPiece, path)


def test_wordpiece_longest_word(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("[PAD]\r\n[UNK]\r\n[CLS]\r\n[SEP]\r\na\r\n##a\r\n", encoding="utf-8")
    words = data.WordPiece(path)
    assert words.encode("a" * 100)[0] == [2, 4, *[5] * 99, 3] and words.encode("a" * 101)[0] == [2, 1, 3]


def test_a_tokenizer_json_is_a_vocabulary_too(tmp_path):
    vocab = {token: i for i, token in enumerate(CASED)}
    path = tmp_path / "tokenizer.json"
    for normalizer, cased in (({"type": "BertNormalizer", "lowercase": False}, True), ({"lowercase": True}, False), (None, False)):
        path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocab}, "normalizer": normalizer}), encoding="utf-8")
        assert data.WordPiece(path).encode("The the")[0] == [2, 5 if cased else 6, 6, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert data.WordPiece(path).encode("The the")[0] == [2, 5, 6, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')       # it does not say
    path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocab}, "normalizer": {"lowercase": False}}), encoding="utf-8")
    assert data.WordPiece(path).encode("The the")[0] == [2, 5, 6, 3]
    path.write_text('{"model": {}}')
    refused("tokenizer.json: cannot be read", data.WordPiece, path)
    path.write_text('{"model": {"type": "BPE", "vocab": {}}}')
    refused("tokenizer.json: a BPE vocabulary where WordPiece is wanted", data.WordPiece, path)


def test_wordpiece_pairs_padding_and_truncation(pieces):
    words = {token: i for i, token in enumerate(TOKENS)}
    c, s, h, w, a = (words[token] for token in ("[CLS]", "[SEP]", "hello", "world", "a"))
    assert pieces.encode("hello", "world a", 8) == (
        [c, h, s, w, a, s, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    assert pieces.encode("hello hello hello", "world", 6)[0] == [c, h, h, s, w, s]  # the longer one shrinks
    assert pieces.encode("hello world", "world a", 6)[0] == [c, h, w, s, w, s]      # a tie: the second
    assert pieces.encode("hello world a", length=4) == ([c, h, w, s], [0] * 4, [1] * 4)
    assert pieces.encode("hello", "", 5) == ([c, h, s, s, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0])
    assert pieces.encode("hello", length=2)[0] == [c, s]


def test_broken_vocabularies(tmp_path):
    refused("absent", data.WordPiece, tmp_path / "absent")
    (tmp_path / "v.txt").write_text("[PAD]\n[CLS]\nhello\n")
    refused("lacks [SEP], [UNK]", data.WordPiece, tmp_path / "v.txt")
    (tmp_path / "v.txt").write_bytes(b"\xff\xfe\x00")
    refused("v.txt: cannot be read", data.WordPiece, tmp_path / "v.txt")


def test_wordpiece_with_the_real_vocabulary():
    words = data.WordPiece(shared("data", "weights", "bert_uncased_vocab.txt"))
    tokens = {i: token for token, i in words.ids.items()}
    special = [words.ids[f"[{name}]"] for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    assert len(words.ids) == 30522 and special == [0, 100, 101, 102, 103]
    assert words.encode("Hello, my dog is cute")[0] == [101, 7592, 1010, 2026, 3899, 2003, 10140, 102]
    for text, want in (
            ("It's so sunny outside!", "it ' s so sunny outside !"), ("unaffable", "una ##ffa ##ble"),
            ("Ångström café", "ang ##strom cafe"), ("tokenization", "token ##ization"), ("3.14%", "3 . 14 %"),
            ("我爱北京", "我 [UNK] 北 京")):
        assert [tokens[i] for i in words.encode(text)[0][1:-1]] == want.split(), text


def write_glue(tmp_path, task, rows, name="dev.tsv"):
    path = tmp_path / task / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("task,rows,texts,labels", [
    ("SST-2", [["sentence", "label"], ["good 'n \"so", "1"], ["bad", "0"]], ["good 'n \"so", "bad"], [1, 0]),
    ("CoLA", [["gj04", "0", "*", "They sleeps."], ["gj04", "1", "", "They\u2028sleep."]],
     ["They sleeps.", "They\u2028sleep."], [0, 1]),
    ("MRPC", [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", "a b", "c"]],
     [("a b", "c")], [1]),
    ("RTE", [["index", "sentence1", "sentence2", "label"], ["0", "p", "q", "not_entailment"],
             ["1", "r", "s", "entailment"]], [("p", "q"), ("r", "s")], [1, 0]),
    ("QNLI", [["index", "question", "sentence", "label"], ["0", "Who \"?", "She.", "entailment"],
              ["1", "r", "s", "not_entailment"]], [("Who \"?", "She."), ("r", "s")], [0, 1]),
    ("WNLI", [["index", "sentence1", "sentence2", "label"], ["0", "p", "q", "1"]], [("p", "q")], [1]),
    ("QQP", [["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["0", "1", "2", "a?", "b?", "1"],
             ["5", "6", "cut"], ["7", "8", "9", "c?", "d?", "0"]], [("a?", "b?"), ("c?", "d?")], [1, 0]),
])
def test_glue(tmp_path, task, rows, texts, labels):
    write_glue(tmp_path, task, rows)
    write_glue(tmp_path, task, rows[:-1] + rows[-1:] * 3, "train.tsv")
    found, y, names = data.glue(task, tmp_path, "test")
    assert found == texts and y.tolist() == labels and len(names) == 2
    assert len(data.glue(task, str(tmp_path))[0]) == len(texts) + 2


STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]


def test_scores_of_sts_b(tmp_path):
    """Ten columns, no quoting; the label is a number from 0 to 5, and there are no classes."""
    rows = [[str(i), "main-news", "headlines", "2014", "0042", "none", "none", f'A "cat" {i}', "A dog", score]
            for i, score in enumerate(("5.000", "0", "3.75", "1.8"))]
    write_glue(tmp_path, "STS-B", [STSB, *rows], "train.tsv")
    texts, labels, names = data.glue("STS-B", tmp_path)
    assert texts[2] == ('A "cat" 2', "A dog") and names == []
    assert labels.dtype == np.float32 and labels.tolist() == [5, 0, 3.75, np.float32(1.8)]
    for bad in ("5.001", "-1", "nan", "", "6", "1e0", "٣"):
        write_glue(tmp_path, "STS-B", [STSB, rows[0], [*rows[1][:9], bad]])
        refused(f"dev.tsv: line 3: no text, or label {bad!r} not in 0 to 5", data.glue, "STS-B", tmp_path, "test")


def test_mnli_has_two_files_for_tests_of_other_columns(tmp_path):
    def row(one, two, *labels):
        return ["0", "1", "2", "fiction", "(p)", "(q)", "(P)", "(Q)", one, two, *labels]
    head = row("sentence1", "sentence2", "label1", "gold_label")
    wide = row("sentence1", "sentence2", *(f"label{k}" for k in range(1, 6)), "gold_label")
    votes = ["neutral"] * 5
    write_glue(tmp_path, "MNLI", [head, row("a", "b", "neutral", "contradiction"), row("c", "d", "neutral", "entailment")], "train.tsv")
    write_glue(tmp_path, "MNLI", [wide, row("e", "f", *votes, "neutral")], "dev_matched.tsv")
    write_glue(tmp_path, "MNLI", [wide, row("g", "h", *votes, "contradiction")], "dev_mismatched.tsv")
    for task, text, label in (("MNLI", ("e", "f"), 1), ("MNLI-mm", ("g", "h"), 2)):
        texts, labels, names = data.glue(task, tmp_path)
        assert texts == [("a", "b"), ("c", "d")] and labels.tolist() == [2, 0]
        assert names == ["entailment", "neutral", "contradiction"]
        texts, labels, _ = data.glue(task, tmp_path, "test")
        assert texts == [text] and labels.tolist() == [label]


def test_rows_of_qqp_that_are_cut_short_are_counted(tmp_path, capsys):
    good = ["0", "1", "2", "a?", "b?", "1"]
    write_glue(tmp_path, "QQP", [good, good, good[:4], good, good[:3] + ["", "b?", "0"], good[:5] + ["2"]], "train.tsv")
    refused("line 6: no text, or label '2'", data.glue, "QQP", tmp_path)
    assert "QQP/train.tsv: left out: 2 rows that lack a column or a text" in capsys.readouterr().out
    write_glue(tmp_path, "QQP", [good, good + ["more"]], "dev.tsv")
    refused("line 2: 7 columns where 6", data.glue, "QQP", tmp_path, "test")


def test_broken_glue(tmp_path):
    refused("glue:SNLI: give one of SST-2, CoLA, MRPC, QQP, STS-B, ", data.glue, "SNLI", tmp_path)
    refused("train.tsv: No such file", data.glue, "RTE", tmp_path)
    head, good = ["index", "sentence1", "sentence2", "label"], ["0", "p", "q", "entailment"]
    for bad, line in (
            (["1", "p", "entailment"], "line 3: 3 columns where 4"), ([""], "line 3: 1 columns"),
            (["1", "p", "q", "maybe"], "line 3: no text, or label 'maybe'"),
            (["1", "", "q", "entailment"], "line 3: no text"),
            (["1", "p", "q", "entailment", ""], "line 3: 5 columns")):
        write_glue(tmp_path, "RTE", [head, good, bad, good])
        assert "RTE/dev.tsv" in refused(line, data.glue, "RTE", tmp_path, "test")
    (tmp_path / "RTE" / "dev.tsv").write_bytes(b"a\tb\tc\td\n0\tp\xff\tq\tentailment\n")
    refused("line 2: 4 columns where 4 are wanted, in UTF-8", data.glue, "RTE", tmp_path, "test")


def test_opened_texts(pieces, tmp_path):
    """Rows of ids, types and mask, as encode gives them; classes, or scores without."""
    head, row = ["index", "sentence1", "sentence2", "label"], ["0", "hello a", "world", "entailment"]
    write_glue(tmp_path, "RTE", [head, row, row])
    found = data.open_texts(f"glue:RTE:{tmp_path}", "test", pieces, 7)
    assert found.tokens.tolist() == 2 * [[*pieces.encode("hello a", "world", 7)]] and found.tokens.dtype == np.int32
    assert found.labels.tolist() == [0, 0] and found.classes == ["entailment", "not_entailment"]
    assert data.describe({"train": found, "test": found}) == "2 texts, 2 classes (entailment, not_entailment), test 2"
    write_glue(tmp_path, "STS-B", [STSB, [*"01234567", "hello", "2.5"]])
    scores = data.open_texts(f"glue:STS-B:{tmp_path}", "test", pieces, 9)
    assert scores.tokens[0].tolist() == [*pieces.encode("7", "hello", 9)]
    assert (scores.labels.tolist(), scores.classes, scores.summary()) == ([2.5], [], "1 texts")


# --- SQuAD ---------------------------------------------------------------------

PASSAGE = "The café: hello (world), hello unaffable world. Naïve a s"


def write_squad(where, passages, split="train"):
    """The published layout: [(passage, [(question, [(answer, place), ...]), ...]), ...]."""
    number = 0
    paragraphs = []
    for passage, asked in passages:
        rows = []
        for question, answers in asked:
            rows.append({"id": f"q{number}", "question": question, "is_impossible": not answers,
                         "answers": [{"text": text, "answer_start": place} for text, place in answers]})
            if not answers:
                rows[-1]["plausible_answers"] = [{"text": "hello", "answer_start": 0}]
            number += 1
        paragraphs.append({"context": passage, "qas": rows})
    articles = [{"title": "One", "paragraphs": paragraphs[:1]}, {"title": "Two", "paragraphs": paragraphs[1:]}]
    (where / f"{split}-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")


def test_squad_questions(tmp_path, capsys):
    """Ids, passages, answers with places; no answer, whatever seems plausible; what lies elsewhere is left out, aloud."""
    passages = [(PASSAGE, [("Who?", [("hello", 10), ("hello (world)", 10)]), ("Where?", [])]),
                ("é hello", [("What?", [("hello", 2)]), ("Why?", [("hello", 1)])])]
    write_squad(tmp_path, passages)
    write_squad(tmp_path, passages, "dev")
    found = data.squad(tmp_path)
    assert [q.id for q in found] == ["q0", "q1", "q2"] and found[2].passage == "é hello"
    assert found[0].answers == [("hello", 10), ("hello (world)", 10)] and found[1].answers == [] and found[0].text == "Who?"
    assert "train-v2.0.json: left out: 1 questions whose answer stands elsewhere" in capsys.readouterr().out
    assert [q.id for q in data.squad(tmp_path, "test")] == ["q0", "q1", "q2", "q3"]         # every question is asked
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text, line", [
    (None, "train-v2.0.json: No such file"), ("{", "train-v2.0.json: cannot be read"), ('{"data": []}', "holds no questions"),
    ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "cannot be read: KeyError('qas')")])
def test_broken_squad(text, line, tmp_path):
    if text is not None:
        (tmp_path / "train-v2.0.json").write_text(text)
    refused(line, data.squad, tmp_path)


@pytest.mark.parametrize("length, stride, longest", [(30, 4, 64), (12, 3, 2), (12, 100, 64), (9, 2, 3), (30, 128, 1)])
def test_squad_windows(length, stride, longest, pieces):
    """Against a slow form, window by window: parts, types, mask, where the answer is, which token is which."""
    def question(text, answer="", passage=PASSAGE):
        return data.Question("q", text, passage, [(answer, passage.index(answer))] if answer else [])

    asked = [question("hello world, a?", "hello unaffable"), question("the", "world)"), question("s"), question("a", "Naïve a s"),
             question("a", "aff"), question("hello", "hello", "hello"), question("a", passage="")]
    tokens, labels, windows = data.squad_windows(asked, pieces, length, stride, longest)
    cls, sep = pieces.ids["[CLS]"], pieces.ids["[SEP]"]
    rows = []
    for number, q in enumerate(asked):
        words, (ids, places) = pieces.body(q.text)[0][:longest], pieces.body(q.passage)
        text, at = q.answers[0] if q.answers else ("", 0)
        holds = [i for i, (a, b) in enumerate(places) if set(range(a, b)) & set(range(at, at + len(text)))]
        start = 0
        while True:
            part = ids[start:start + length - len(words) - 3]
            row = [cls, *words, sep, *part, sep]
            types = [0] * (len(words) + 2) + [1] * (len(part) + 1)
            ends = [i - start + len(words) + 2 for i in holds]
            inside = holds and all(start <= i < start + len(part) for i in holds)
            rows.append(([row + [0] * (length - len(row)), types + [0] * (length - len(types)),
                          [1] * len(row) + [0] * (length - len(row))], [min(ends), max(ends)] if inside else [0, 0], number,
                         start - len(words) - 2))
            if start + len(part) >= len(ids):
                break
            start += min(stride, len(part))
    assert tokens.tolist() == [row[0] for row in rows] and labels.tolist() == [row[1] for row in rows]
    assert windows.tolist() == [[*row[2:]] for row in rows] and tokens.dtype == np.int32
    for (first, last), (number, shift) in zip(labels, windows):
        if last:                                              # the label cuts the answer from the passage
            q = asked[number]
            said = q.passage[q.places[first + shift][0]:q.places[last + shift][1]]
            assert q.answers[0][0] in said and len(said) <= len(q.answers[0][0]) + 4
    if length == 30:                                          # all answers fit somewhere
        assert {number for (first, last), (number, _) in zip(labels, windows) if last} == {0, 1, 3, 4, 5}


def test_a_question_that_fills_the_row(pieces):
    asked = [data.Question("q", "hello a s", "hello", [])]
    refused("length 6: no room for a passage beside 3 tokens", data.squad_windows, asked, pieces, 6)
    assert len(data.squad_windows(asked, pieces, 6, longest=2)[0]) == 1


def test_opened_squad(pieces, tmp_path):
    write_squad(tmp_path, [(PASSAGE, [("a?", [("hello", 10)]), ("s?", [])])], "dev")
    found = data.open_texts(f"squad:{tmp_path}", "test", pieces, 40)
    assert found.tokens.shape == (2, 3, 40) and found.labels.shape == (2, 2) and found.classes == []
    assert found.windows.tolist() == [[0, -4], [1, -4]]       # [CLS] a ? [SEP] stands before the passage
    first, last = found.labels[0] + found.windows[0, 1]
    places = found.questions[0].places
    assert PASSAGE[places[first][0]:places[last][1]] == "hello" and found.labels[1].tolist() == [0, 0]
    assert found.summary() == "2 texts"


def test_real_glue():
    root = shared("data", "glue")
    for task, sizes, majority in (("SST-2", (67349, 872), .509), ("CoLA", (8551, 1043), None),
                                  ("MRPC", (3668, 408), .684), ("RTE", (2490, 277), .527)):
        for split, size in zip(("train", "test"), sizes):
            texts, labels, names = data.glue(task, root, split)
            assert len(texts) == len(labels) == size and set(labels) == {0, 1}
        assert majority is None or abs(max(np.bincount(labels)) / size - majority) < 1e-3


# --- Translation ---------------------------------------------------------------

KNOWN = {
    "en": {0: "zero", 7: "seven", 10: "ten", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen",
           15: "fifteen", 18: "eighteen", 40: "forty", 99: "ninety-nine", 101: "one hundred one",
           2018: "two thousand eighteen", 8888: "eight thousand eight hundred eighty-eight"},
    "zh": {0: "零", 10: "十", 12: "十二", 20: "二十", 99: "九十九", 100: "一百", 105: "一百零五",
           110: "一百一十", 115: "一百一十五", 1000: "一千", 1001: "一千零一", 1010: "一千零一十",
           1100: "一千一百", 2045: "二千零四十五", 7205: "七千二百零五"},
    "vi": {0: "không", 5: "năm", 10: "mười", 11: "mười một", 14: "mười bốn", 15: "mười lăm", 20: "hai mươi",
           21: "hai mươi mốt", 24: "hai mươi tư", 55: "năm mươi lăm", 101: "một trăm lẻ một",
           105: "một trăm lẻ năm", 110: "một trăm mười", 1001: "một nghìn không trăm lẻ một",
           1015: "một nghìn không trăm mười lăm", 1100: "một nghìn một trăm"},
    "ja": {0: "零", 10: "十", 11: "十一", 100: "百", 101: "百一", 345: "三百四十五", 1000: "千",
           1111: "千百十一", 6080: "六千八十"},
    "ko": {0: "영", 10: "십", 11: "십일", 21: "이십일", 100: "백", 110: "백십", 345: "삼백사십오",
           1001: "천일", 2019: "이천십구"},
    "id": {0: "nol", 10: "sepuluh", 11: "sebelas", 12: "dua belas", 21: "dua puluh satu", 100: "seratus",
           110: "seratus sepuluh", 111: "seratus sebelas", 1000: "seribu", 1111: "seribu seratus sebelas",
           5019: "lima ribu sembilan belas"},
    "tr": {0: "sıfır", 11: "on bir", 21: "yirmi bir", 100: "yüz", 101: "yüz bir", 200: "iki yüz", 1000: "bin",
           1100: "bin yüz", 1923: "bin dokuz yüz yirmi üç", 2001: "iki bin bir"},
    "eo": {0: "nul", 10: "dek", 11: "dek unu", 20: "dudek", 21: "dudek unu", 100: "cent", 300: "tricent",
           1000: "mil", 1887: "mil okcent okdek sep", 2000: "du mil"},
    "sw": {0: "sifuri", 11: "kumi na moja", 25: "ishirini na tano", 100: "mia moja", 105: "mia moja na tano",
           345: "mia tatu na arobaini na tano", 1000: "elfu moja", 1300: "elfu moja, mia tatu"},
    "mi": {0: "kore", 10: "tekau", 11: "tekau mā tahi", 20: "rua tekau", 21: "rua tekau mā tahi",
           100: "kotahi rau", 101: "kotahi rau mā tahi", 110: "kotahi rau tekau",
           345: "toru rau whā tekau mā rima", 1000: "kotahi mano", 2000: "rua mano",
           1840: "kotahi mano waru rau whā tekau"},
}


@pytest.mark.parametrize("language", KNOWN)
def test_number_words(language):
    for n, words in KNOWN[language].items():
        assert data.number_words(language, n) == words
    every = [data.number_words(language, n) for n in range(10000)]
    assert len(set(every)) == 10000                                     # no two numbers read alike
    assert not any(re.search(r"[0-9+*]|^ | $|  ", words) for words in every)
    vocabulary = data.Vocabulary(dict.fromkeys(data.split_words(" ".join(every))))
    longest = 0
    for n in range(0, 10000, 7):
        ids = vocabulary.encode(every[n])
        assert vocabulary.decode(ids) == every[n]
        longest = max(longest, len(ids))
    assert 5 <= longest <= 10 and len(vocabulary.words) < 45


def test_every_language_has_a_test():
    assert set(KNOWN) == set(data.NUMERALS) and len(KNOWN) >= 8 and min(map(len, KNOWN.values())) >= 5


def numbers_of(pairs, side, languages, limit):
    """The numbers behind source or target, by looking the decoded words up among all number words."""
    tables = {language: {data.number_words(language, n): n for n in range(limit)} for language in languages}
    place = 0 if side == "source" else 1
    found = []
    for ids, k in zip(getattr(pairs, side), pairs.direction):
        words = pairs.vocabulary.decode(ids[1:] if place else ids)
        tag, _, rest = words.partition(" ") if not place else ("", "", words)
        assert place or tag == f"<2{pairs.directions[k][1]}>"
        found.append(tables[pairs.directions[k][place]][rest])
    return np.array(found)


def test_translation_pairs_of_numbers():
    languages = ("zh", "vi", "sw")
    options = dict(languages=languages, limit=1000, tests=20)
    train, test = (data.translation_pairs(split, **options) for split in ("train", "test"))
    assert train.vocabulary.words == test.vocabulary.words
    assert train.directions == test.directions and len(set(train.directions)) == 6
    assert np.bincount(test.direction).tolist() == [20] * 6
    held = {}
    for pairs in (train, test):
        for ids in (pairs.source, pairs.target):
            assert ids.dtype == np.int64 and 3 not in ids and (ids == 2).sum(1).tolist() == [1] * len(ids)
            ends = (ids == 2).argmax(1)
            assert all((row[end + 1:] == 0).all() and (row[:end] > 0).all() for row, end in zip(ids, ends))
        assert (pairs.target[:, 0] == 1).all() and 1 not in pairs.source
        numbers = numbers_of(pairs, "source", languages, 1000)
        assert (numbers == numbers_of(pairs, "target", languages, 1000)).all()      # exact answers
        held[pairs is test] = numbers
    assert not set(held[True]) & set(held[False])   # no test number trains in any direction
    sizes = dict(zip(train.directions, np.bincount(train.direction)))
    assert sizes["zh", "sw"] == sizes["sw", "vi"] == 200 and sizes["zh", "vi"] == len(set(held[False])) > 850
    low = [set(held[False][train.direction == train.directions.index(pair)])
           for pair in (("zh", "sw"), ("sw", "zh"))]
    assert len(low[0]) == 200 and low[0] != low[1]                      # another choice for each direction


@pytest.mark.parametrize("limit", [10_001, 20_000, 1, 0, -5, "²", "1e3", "٣٤", "+50", "5 0", 10**30])
def test_numbers_end_where_words_do(limit):
    refused(f"numbers:{limit}: give 2 to 10000", data.translation_pairs, limit=limit, languages=("en", "mi"))
    refused(f"numbers:{limit}: give 2 to 10000", data.parse_limit, limit)
    assert data.parse_limit("") == data.parse_limit("10000") == 10_000 and data.parse_limit("20") == 20
    for n in (-1, 10_000):
        refused(f"{n}: words are known for 0 to 9999", data.number_words, "en", n)


def test_high_and_low_resources():
    sizes = [row[0] for row in data.NUMERALS.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] >= 50 * sizes[-1]
    pairs = data.translation_pairs(languages=("en", "zh", "mi"))
    count = dict(zip(pairs.directions, np.bincount(pairs.direction)))
    assert count["en", "zh"] == 6000 and count["mi", "en"] == count["zh", "mi"] == 100
    rows = pairs.direction == pairs.directions.index(("en", "mi"))
    words = set(pairs.target[rows].ravel()) - {0}
    every = {i for n in range(10000) for i in pairs.vocabulary.encode(data.number_words("mi", n))}
    assert every - words <= {pairs.vocabulary.ids["kore"]}              # 100 numbers show all words but zero


def test_translation_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    colours = (("blau", "blue"), ("rot", "red"))
    rows = [("de", "en", f"Wort {colours[i % 2][0]}", f"word, {colours[i % 2][1]}") for i in range(19)]
    rows[9] = ("en", "de", "word new", "Wort neu")
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    train, test = (data.translation_pairs(split, path) for split in ("train", "test"))
    assert len(train.source) == 18 and len(test.source) == 1
    assert train.directions == [("de", "en")] and test.directions == [("en", "de")]
    assert train.vocabulary.words == test.vocabulary.words and "<2en>" in train.vocabulary.ids
    assert train.vocabulary.decode(train.target[0][1:]) == "word, blue"
    assert test.vocabulary.decode(test.source[0]) == "<2de> word <unknown>"
    assert test.target[0].tolist()[-2:] == [3, 2]
    path.write_text("de\ten\teins\tone\nde\ten\tzwei\n", encoding="utf-8")
    refused("pairs.tsv: line 2: 3 columns where 4 are wanted", data.translation_pairs, "train", path)
    path.write_text("de\ten\teins\tone\n", encoding="utf-8")
    refused("split test: 0 rows of 1", data.translation_pairs, "test", path)
    path.write_text("")
    refused("pairs.tsv", data.translation_pairs, "train", path)
    refused("absent", data.translation_pairs, "train", tmp_path / "absent")


# --- The real files ------------------------------------------------------------

def test_real_packs():
    root = shared("data")
    cifar = data.open_data(f"cifar10:{root / 'cifar10_lossless9k.npz'}", "test")
    assert cifar.images.shape == (1017, 3, 32, 32) and cifar.classes[3] == "cat"
    emoji = data.open_data(f"npz:{root / 'emoji64_noto.npz'}", "test", 64)
    assert len(emoji) == 190 and emoji.captions[0] and len(emoji.classes) == 9
