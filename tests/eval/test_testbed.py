"""The embedded models' testbed: its pictures, its questions, its shipped split and its shipped weights."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from testbed import anyres, asking, models, packed, scenes, scoring, split, targets
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmprune.eval import testbed
from vlmprune.eval.testbed import words
from vlmprune.runtime import loading

PLACES_OF = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def digest(scene: scenes.Scene) -> str:
    return hashlib.sha256(scene.pixels.tobytes() + scene.owner.tobytes() + repr(scene.things).encode()).hexdigest()


def told(record: testbed.Question) -> scenes.Scene:
    """The scene behind a shipped picture, drawn again."""
    name, number = record.picture_id.split("-")
    return split.test_scene(name, split.SIZES[name][2] + int(number))


def recomputed(question: str, scene: scenes.Scene) -> str | None:
    """The answer, from the list of things alone: written without looking at how `asking` makes it."""
    things = {}
    for t in scene.things:
        row = int(t.y + t.size / 2 >= scene.height / 2)
        column = int(t.x + t.size / 2 >= scene.width / 2)
        things[row, column] = t
    names = dict(zip(itertools.product((0, 1), (0, 1)), words.PLACES, strict=True))
    tokens = question.removesuffix(" ?").split()
    if question.startswith("is there a"):
        return "yes" if any([t.colour, t.value] == tokens[3:] for t in things.values()) else "no"
    if question.startswith("where is the"):
        (at,) = [p for p, t in things.items() if [t.colour, t.value] == tokens[3:]]
        return names[at]
    if question.startswith("how many"):
        kinds = {
            "objects": lambda t: True,
            "digits": lambda t: t.value.isdigit(),
            "shapes": lambda t: not t.value.isdigit(),
        }
        kinds |= {s + "s": lambda t, s=s: t.value == s for s in words.SHAPES}
        kinds |= {c + " objects": lambda t, c=c: t.colour == c for c in words.COLOURS}
        return str(sum(map(kinds[" ".join(tokens[2:-2])], things.values())))
    if question.startswith("what is"):
        for phrase, (down, right) in PLACES_OF.items():
            if question.startswith(f"what is {phrase} the "):
                (at,) = [p for p, t in things.items() if [t.colour, t.value] == tokens[-2:]]
                beside = things.get((at[0] + down, at[1] + right))
                return beside.value if beside else "nothing"
    if question == "which digit is in the picture ?":
        (value,) = [t.value for t in things.values() if t.value.isdigit()]
        return value
    wanted = tokens[4:]  # `what colour is the ...`
    if wanted[-1] == "object" and len(wanted) == 3:
        (thing,) = [t for p, t in things.items() if names[p] == " ".join(wanted[:2])]
    else:
        (thing,) = [t for t in things.values() if wanted[0] in (t.colour, t.value)]
    return thing.colour if tokens[1] == "colour" else thing.value


def test_same_seed_same_scene():
    one, two, other = (digest(scenes.quadrant_scene(np.random.default_rng(s))) for s in (5, 5, 6))
    assert one == two != other


@pytest.mark.parametrize("name", testbed.SPLITS)
def test_shipped_pictures_are_those_of_the_generator(name):
    records = testbed.questions(name)
    for record in (records[0], records[-1]):
        assert np.array_equal(np.asarray(record.image), told(record).pixels)


@pytest.mark.parametrize("name", testbed.SPLITS)
def test_every_shipped_answer_is_right(name):
    scene, last = None, None
    for record in testbed.questions(name):
        if record.picture_id != last:
            scene, last = told(record), record.picture_id
        assert recomputed(record.question, scene) == record.answer, record.id


def test_the_recomputation_can_disagree():
    record = next(r for r in testbed.questions("sparse") if r.category == "where")
    scene = told(record)
    scene.things = [scenes.Thing(t.colour, t.value, (t.x + 64) % 128, t.y, t.size, t.digit_index) for t in scene.things]
    assert recomputed(record.question, scene) != record.answer


def test_training_questions_are_right_and_never_about_unseen_pairs():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = scenes.quadrant_scene(rng)
        assert not {t.pair for t in scene.things} & words.UNSEEN_PAIRS
        for question, answer in asking.training_questions(rng, scene, 20):
            assert recomputed(question, scene) == answer, question
            tokens = question.split()
            assert not any(pair in words.UNSEEN_PAIRS for pair in itertools.pairwise(tokens)), question
            assert words.CATEGORIES[asking.category_of(question)] in words.CATEGORIES


def test_handwriting_of_test_and_training_is_disjoint():
    used = {True: set(), False: set()}
    for test, seed in itertools.product((True, False), range(80)):
        scene = scenes.quadrant_scene(np.random.default_rng(seed), test=test, digits=0.9)
        used[test] |= {t.digit_index for t in scene.things if t.digit_index >= 0}
    assert len(used[True]) > 40
    assert len(used[False]) > 40
    assert max(used[False]) < scenes.DIGIT_SPLIT <= min(used[True])


def test_shipped_splits_hold_out_what_they_say():
    for name, (number, _, first) in split.SIZES.items():
        assert first >= scenes.TEST_SEED
        pairs = [{t.pair for t in split.test_scene(name, first + i).things} for i in range(min(number, 25))]
        unseen = [bool(p & words.UNSEEN_PAIRS) for p in pairs]
        assert all(unseen) if name == "unseen" else not any(unseen)


def test_objects_cover_about_a_tenth_of_the_tokens_of_sparse_pictures():
    def share(name):
        found = [split.test_scene(name, split.SIZES[name][2] + i).owner for i in range(40)]
        return np.mean([(scenes.patch_owner(o) > 0).mean() for o in found])

    assert 0.05 < share("sparse") < 0.12
    assert share("crowded") > 0.2


def test_targets_name_the_thing_in_its_quadrant():
    for seed in range(20):
        scene = scenes.quadrant_scene(np.random.default_rng(seed))
        patches, cls = targets.view_targets(scene, scene.owner)
        at = scene.by_place()
        for i, place in enumerate(words.PLACES):
            thing = at.get(place)
            expected = words.COLOUR_NAMES.index(thing.colour) if thing else targets.NO_COLOUR
            assert cls[0, i] == expected
        assert set(np.unique(patches[1])) == {targets.NO_VALUE} | {words.VALUES.index(t.value) for t in scene.things}


def test_split_is_large_versioned_and_hard_to_guess():
    records = testbed.questions("sparse")
    assert len(records) >= 1000
    assert {r.category for r in records} == set(words.CATEGORIES)
    assert len({r.id for r in records}) == len(records)
    guess = {}
    for category in words.CATEGORIES:
        mine = [r.answer for r in records if r.category == category]
        guess[category] = max(map(mine.count, set(mine)))
    assert sum(guess.values()) / len(records) < 0.45  # the best constant answer to each category


def test_a_split_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(testbed, "VERSION", "0")
    with pytest.raises(RuntimeError, match="version"):
        testbed.questions("sparse")


def test_wrong_names_list_the_right_ones():
    with pytest.raises(ValueError, match="scene-llava-next"):
        testbed.path("scene-lava")
    with pytest.raises(ValueError, match="crowded"):
        testbed.questions("train")


@pytest.mark.parametrize(("rows", "shift", "squeeze"), [(0, 0, 1.0), (1, 0, 1.0), (0, 7, 0.3)])
def test_packed_training_turn_equals_the_model_on_the_single_prompt(rows, shift, squeeze):
    """The packed sequence gives the logits of the real prompt; another turn's question does not."""
    torch.manual_seed(0)
    model = models.llava_next() if rows else models.llava()
    processor = models.llava_next_processor() if rows else models.llava_processor()
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
        if rows:
            model.model.image_newline.normal_()
    scene = scenes.quadrant_scene(np.random.default_rng(1), count=4, width=256 if rows else 128)
    pairs = [("how many objects are there ?", "4"), ("what colour is the top left object ?", "red")]
    prompt = scoring.prompt_of(processor, pairs[1][0])
    inputs = processor(images=scene.image(), text=prompt, return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    turns = [[packed.encode_turn(q, a, packed.QUESTION_LENGTH)[0] for q, a in pairs]]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    places = torch.cat([torch.arange(2), 2 + (torch.arange(visual) * torch.tensor(squeeze)).floor().long()])
    after = places[-1] + 1 + shift + torch.arange(inputs["input_ids"].shape[1] - len(places))
    with torch.no_grad():
        given = {"pixel_values": pixels, "position_ids": torch.cat([places, after])[None]}
        real = model(**(inputs | given)).logits[0, -1]
        hidden = model.model.vision_tower(pixels.view(-1, 3, 128, 128), output_hidden_states=True).hidden_states[-2]
        (said,) = packed.PackedModel(model)(
            hidden[None, :, 1:], [torch.tensor(turns)], torch.tensor(shift), rows, 2 * rows, torch.tensor(squeeze)
        )
    at = len(pairs[1][0].split())
    assert (said[0, 1, at] - real).abs().max() < 1e-4  # rotary tables are float32
    assert (said[0, 0, len(pairs[0][0].split())] - real).abs().max() > 1e-2  # another turn's answer


@pytest.mark.parametrize(("shift", "shifted_too"), [(0, True), (7, False)])
def test_a_turn_behind_a_picture_of_any_size_equals_the_single_prompt(shift, shifted_too):
    """Positions, mask and patches are the host's own; another turn's question, or one shifted, says other things."""
    torch.manual_seed(0)
    model, processor = anyres.model().double().eval(), anyres.processor()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    scene = anyres.scene(np.random.default_rng(0), 7, 14, count=4)
    pairs = [("how many objects are there ?", "4"), ("what colour is the top left object ?", "red")]
    inputs = processor(images=scene.image(), text=scoring.prompt_of(processor, pairs[1][0]), return_tensors="pt")
    assert torch.equal(anyres.patches(torch.from_numpy(scene.pixels)[None]), inputs["pixel_values"])
    assert torch.equal(anyres.grids(1, 7, 14), inputs["image_grid_thw"])
    turns = torch.tensor([[packed.encode_turn(q, a, packed.QUESTION_LENGTH)[0] for q, a in pairs]])
    with torch.no_grad():
        inputs["pixel_values"] = inputs["pixel_values"].double()
        real = model(**inputs).logits[0, -1]
        states = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        (said,) = anyres.logits(model, states[None], 7, 14, [turns], shift)
    at = len(pairs[1][0].split())
    assert ((said[0, 1, at] - real).abs().max() < 1e-4) == shifted_too  # rotary tables are float32
    assert (said[0, 0, len(pairs[0][0].split())] - real).abs().max() > 1e-2


def test_token_targets_name_what_a_token_shows():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows, columns = anyres.draw_grid(rng)
        scene = anyres.scene(rng, rows, columns)
        colour, value, row, column = anyres.targets(scene, rows, columns).T
        assert scene.pixels.shape == (rows * anyres.CELL, columns * anyres.CELL, 3)
        assert set(colour) == {words.COLOUR_NAMES.index(t.colour) for t in scene.things} | {anyres.NO_COLOUR}
        assert set(value) == {words.VALUES.index(t.value) for t in scene.things} | {anyres.NO_VALUE}
        for thing in scene.things:
            mine = (colour == words.COLOUR_NAMES.index(thing.colour)) & (value == words.VALUES.index(thing.value))
            low, right = divmod(words.PLACES.index(scene.place(thing)), 2)
            assert ((row[mine] >= 4) == low).mean() > 0.4
            assert ((column[mine] >= 4) == right).mean() > 0.4


def test_pictures_of_the_qwen_split_have_many_shapes():
    sizes = {record.picture_id: record.image.size for record in testbed.questions("qwen")}
    assert len({round(w / h, 1) for w, h in sizes.values()}) >= 6
    assert len(testbed.questions("qwen")) >= 500
    window = 4 * anyres.CELL
    assert any(w % window and h % window for w, h in sizes.values())
    assert any(w % anyres.CELL for w, _ in sizes.values())  # which the processor resizes


@pytest.mark.parametrize(
    ("name", "split_name", "least"),
    [("scene-llava", "sparse", 0.75), ("scene-llava-next", "next", 0.6), ("scene-qwen", "qwen", 0.7)],
)
def test_shipped_model_answers(name, split_name, least):
    assert (testbed.path(name) / "model.safetensors").stat().st_size < 16 * 2**20
    loaded = loading.load(loading.find_model(name))
    model, processor = loaded.model, loaded.processor
    if name == "scene-qwen":
        windowed = set(range(model.config.vision_config.depth)) - set(model.config.vision_config.fullatt_block_indexes)
        assert 0 < len(windowed) < model.config.vision_config.depth
    else:
        assert model.config.vision_feature_layer == -2
    assert processor.tokenizer.padding_side == "left"
    records = testbed.questions(split_name)[:60]
    whole = scoring.right(records, scoring.answer(model, processor, records, batch=12)).mean()
    blind = scoring.right(records, scoring.answer(model, processor, records, blind=True)).mean()
    assert whole > least
    assert blind < 0.5


def test_selection_by_hand_of_everything_is_the_whole_model():
    folder = testbed.path("scene-llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    records = testbed.questions("sparse")[:18]
    seen = scoring.looks(model, processor, records)
    whole = scoring.answer(model, processor, records)
    choose = scoring.choose_random
    assert scoring.answer_by_hand(model, processor, records, choose, 256, seen=seen) == whole
    assert scoring.answer_by_hand(model, processor, records, choose, 5, seen=seen) != whole


def test_interval_is_paired_and_by_picture():
    records = testbed.questions("sparse")[:60]
    zero = np.zeros(len(records))
    assert scoring.interval(records, zero) == (0.0, 0.0)
    low, high = scoring.interval(records, zero + 1)
    assert low == high == 1.0
    alternating = np.arange(len(records)) % 2 - 0.5
    low, high = scoring.interval(records, alternating)
    assert low < 0 < high


def test_demonstration_pictures():
    shown = testbed.pictures()
    assert {p["model"] for p in shown} == set(testbed.NAMES)
    assert all(p["file"].exists() for p in shown)
