"""The model that lmms-eval asks: batches, generation arguments, methods, what it refuses."""

from __future__ import annotations

import io
import warnings

import harness
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval import testbed
from vlmprune.eval.lmms.model import VlmPrune, cut_off, generation_arguments, produced
from vlmprune.eval.lmms.pictures import Reader
from vlmprune.runtime.errors import CommandError, UserError
from vlmprune.runtime.loading import model_inputs

PRUNED = {"llava": {"method": "fopru", "keep": 5}, "llava_next": {"method": "globalcom2", "keep": 0.3}}


def answers(lm, folder, arguments=None, **options):
    """The answers to all documents of a folder, with a task's generation arguments."""
    given = {} if arguments is None else {"generation_kwargs": arguments}
    return harness.answers(harness.evaluate(lm, [harness.task(folder, **given)], **options))


@pytest.mark.parametrize("family", PRUNED)
@pytest.mark.parametrize("pruned", [False, True])
def test_a_batch_gives_the_answers_of_its_prompts_alone(family, pruned, folders, docs):
    chosen = PRUNED[family] if pruned else {"method": "none"}
    found = {}
    for size in (1, 4):
        lm = VlmPrune(folders[family], **chosen, batch_size=size, device="cpu")
        found[size] = answers(lm, docs[family]), lm.take_records()
    assert found[1][0] == found[4][0]
    assert len(set(found[1][0])) > 6  # answers tell prompts apart
    timeless = ("doc", "task", "tokens_before", "tokens_after", "layer_average", "output_tokens")
    assert [[r[k] for k in timeless] for r in found[1][1]] == [[r[k] for k in timeless] for r in found[4][1]]
    before = [record["tokens_before"] for record in found[1][1]]
    assert [b > 0 for b in before] == [i % 3 > 0 for i in range(11)]


@pytest.mark.parametrize("family", PRUNED)
def test_answers_are_those_of_the_patched_model_by_itself(family, folders, docs):
    """The reference: transformers' own classes, one prompt at a time, and `vlmprune.patch`."""
    model = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folders[family])
    options = dict(PRUNED[family])
    handle = vlmprune.patch(model, options.pop("method"), **options)
    said, entering, average = [], [], []
    for doc in harness.task(docs[family]).dataset["test"]:
        content = [{"type": "image"}] * len(doc["image"]) + [{"type": "text", "text": doc["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given = processor(
            text=prompt, images=[p.convert("RGB") for p in doc["image"]] or None, return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        out = model.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
        said.append(processor.batch_decode(out, skip_special_tokens=True)[0].strip())
        images = range(len(doc["image"]))
        entering.append(sum(handle.trace.entering(i) for i in images) if images else 0)
        average.append(sum(handle.trace.layer_average(i) for i in images) if images else 0)
    lm = VlmPrune(folders[family], **PRUNED[family], batch_size=3, device="cpu")
    assert answers(lm, docs[family]) == said
    records = lm.take_records()
    assert [record["tokens_after"] for record in records] == entering
    assert [record["layer_average"] for record in records] == pytest.approx(average)
    lm.use("none")
    assert answers(lm, docs[family]) != said


def test_requests_with_other_generation_arguments_do_not_share_a_batch(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=4, device="cpu")
    short = harness.task(docs["llava"], "short", generation_kwargs={"max_new_tokens": 2})
    long = harness.task(docs["llava"], "long", generation_kwargs={"max_new_tokens": 5})
    mixed = [r for pair in zip(harness.instances(lm, short), harness.instances(lm, long), strict=True) for r in pair]
    seen = []
    lm.progress = lambda done, total: seen.append((done, total))
    results = lm.generate_until(mixed)
    said = harness.texts(results)
    assert [result.token_counts.output_tokens for result in results] == [2, 5] * 11
    assert all(long.startswith(short) for short, long in zip(said[::2], said[1::2], strict=True))
    assert seen == [(4, 22), (8, 22), (11, 22), (15, 22), (19, 22), (22, 22)]


def test_greedy_unless_the_task_samples(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=4, device="cpu")
    greedy = answers(lm, docs["llava"])
    config = lm.loaded.model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 5.0, 0.9  # what some checkpoints come with
    assert answers(lm, docs["llava"]) == greedy
    plain = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "top_p": 1.0, "image_aspect_ratio": "pad"}
    assert answers(lm, docs["llava"], plain) == greedy
    hot = {"max_new_tokens": 6, "temperature": 3.0}
    sampled = [answers(lm, docs["llava"], hot, torch_random_seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert greedy not in sampled


def test_beams_are_those_of_generate(folders, docs):
    lm = VlmPrune(folders["llava"], **PRUNED["llava"], batch_size=4, device="cpu")
    kwargs = {"max_new_tokens": 6, "num_beams": 3}
    said = answers(lm, docs["llava"], kwargs)
    counts = [(r["tokens_before"], r["tokens_after"]) for r in lm.take_records()]
    lm.batch_size = 1
    alone = answers(lm, docs["llava"], kwargs)
    assert said == alone
    assert counts == [(0, 0), (16, 5), (32, 10)] * 3 + [(0, 0), (16, 5)]
    assert said != answers(lm, docs["llava"])


def test_until_ends_and_cuts_the_answer(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=3, device="cpu")
    whole = answers(lm, docs["llava"], {"max_new_tokens": 8})
    lengths = [record["output_tokens"] for record in lm.take_records()]
    assert set(lengths) == {8}
    stop = whole[4].split()[3]
    kwargs = {"max_new_tokens": 8, "until": [stop, "never"]}
    cut = answers(lm, docs["llava"], kwargs)
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut != whole
    lm.batch_size = 1
    lm.take_records()
    alone = answers(lm, docs["llava"], kwargs)
    assert alone == cut
    assert lm.take_records()[4]["output_tokens"] <= 4  # it did not go on


def test_what_generate_gets():
    made = generation_arguments({"until": ["\n"], "temperature": 0.0, "top_p": 1.0, "image_aspect_ratio": "pad"})
    assert made == {
        "temperature": None, "top_p": None, "top_k": None, "do_sample": False, "num_beams": 1, "max_new_tokens": 1024,
    }  # fmt: skip
    made = generation_arguments({"temperature": 0.7, "top_k": 4, "max_gen_toks": 9})
    assert made == {"temperature": 0.7, "top_k": 4, "do_sample": True, "num_beams": 1, "max_new_tokens": 9}
    assert generation_arguments({"do_sample": False, "temperature": 0.7})["do_sample"] is False
    assert "temperature" not in generation_arguments({"do_sample": True, "temperature": 0.0})
    with pytest.raises(UserError, match="repeats"):
        generation_arguments({"num_return_sequences": 2})


def test_counting_and_cutting():
    assert produced([5, 6, 2, 3, 3], 2, 3) == 3
    assert produced([5, 2, 2, 2], [2, 7], 2) == 2
    assert produced([5, 6, 3, 3], None, 3) == 2
    assert produced([5, 3, 6], None, 3) == 3
    assert cut_off(" a b\n\nc ", ["\n\n", "b"]) == "a"
    assert cut_off(" a ", []) == "a"


def test_another_method_on_the_loaded_model(folders, docs):
    lm = VlmPrune(folders["llava"], method="fopru", keep=5, batch_size=4, device="cpu")
    model = lm.loaded.model
    pruned = answers(lm, docs["llava"])
    lm.use("none")
    plain = answers(lm, docs["llava"])
    lm.use("random", keep=5, seed=3, average=None)
    other = answers(lm, docs["llava"])
    lm.use("fopru", keep=5)
    assert answers(lm, docs["llava"]) == pruned
    assert len({tuple(one) for one in (pruned, plain, other)}) == 3
    assert lm.loaded.model is model  # lmms-eval's own clean() would have deleted it
    with pytest.raises(UserError, match="Did you mean 'fopru'"):
        lm.use("foru", keep=5)
    with pytest.raises(UserError, match="globalcom2 on"):
        lm.use("globalcom2", keep=5)
    assert (lm.method, lm.options) == ("fopru", {"keep": 5})
    assert answers(lm, docs["llava"]) == pruned
    lm.use("none")
    assert answers(lm, docs["llava"]) == plain


def test_the_response_cache_tells_methods_apart(folders, docs, tmp_path, monkeypatch):
    asked = []
    answer = VlmPrune.answer
    monkeypatch.setattr(VlmPrune, "answer", lambda self, batch: asked.append(len(batch)) or answer(self, batch))
    monkeypatch.setattr(VlmPrune, "warm_up", lambda *_: None)

    def run(lm, args=None):
        asked.clear()
        options = {"use_cache": str(tmp_path)}
        if args is not None:
            options |= {"model_args": args, "device": "cpu"}
        return answers(lm, docs["llava"], **options), sum(asked)

    place = f"pretrained={folders['llava']}"
    first, computed = run("vlmprune", f"{place},method=fopru,keep=5")
    assert computed == 11
    assert run("vlmprune", f"{place},method=fopru,keep=5") == (first, 0)
    other, computed = run("vlmprune", f"{place},method=fopru,keep=3")
    assert computed == 11
    assert other != first
    lm = VlmPrune(folders["llava"], method="fopru", keep=5, device="cpu")
    assert run(lm) == (first, 11)
    assert run(lm) == (first, 0)
    lm.use("fopru", keep=3)
    assert run(lm) == (other, 11)
    lm.use("fopru", keep=5)
    assert run(lm) == (first, 0)


def test_what_it_cannot_answer_is_refused(folders):
    lm = VlmPrune(folders["llava"], device="cpu")
    request = Instance("loglikelihood", ("a", "b"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    with pytest.raises(UserError, match="likelihoods"):
        lm.loglikelihood([request])
    with pytest.raises(UserError, match="one round"):
        lm.generate_until_multi_round([request])


def test_running_out_of_memory_names_the_documents(folders, docs, monkeypatch):
    lm = VlmPrune(folders["llava"], device="cpu", batch_size=2)

    def full(**options):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(lm.loaded.model, "generate", full)
    with pytest.raises(CommandError, match=r"task local, documents \d+, \d+: out of memory"):
        lm.generate_until(harness.instances(lm, harness.task(docs["llava"])))


def test_loading_options_reach_the_model(folders, docs):
    lm = VlmPrune(folders["llava"], device="cpu", attn_implementation="eager", dtype="bfloat16")
    assert lm.loaded.model.config._attn_implementation == "eager"
    assert lm.loaded.model.dtype == torch.bfloat16
    assert len(answers(lm, docs["llava"], limit=3)) == 3
    mapped = VlmPrune(folders["llava"], device_map="cpu", **PRUNED["llava"])
    plain = VlmPrune(folders["llava"], device="cpu", **PRUNED["llava"])
    assert answers(mapped, docs["llava"]) == answers(plain, docs["llava"])
    assert "device_map='cpu'" in repr(mapped)


# Pictures that a plain conversion to RGB reads wrong


def odd_pictures():
    """By what a plain conversion does wrong: the picture, and what is to be seen of it at (0, 0)."""
    turned = Image.new("RGB", (4, 2), "red")
    turned.paste("blue", (0, 1, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    return {
        "more than 8 bits clipped": (Image.fromarray(np.full((2, 2), 256 * 100, np.uint16)), (100, 100, 100)),
        "not turned upright": (Image.open(io.BytesIO(file.getvalue())), (0, 0, 255)),
        "transparent pixels shown": (Image.new("RGBA", (2, 2), (9, 9, 9, 0)), (255, 255, 255)),
    }


@pytest.mark.parametrize("plain", [False, True])
def test_one_reader_for_all_commands(plain):
    read = Reader(plain)
    for image, right in odd_pictures().values():
        seen = read(image).getpixel((0, 0))
        assert np.allclose(seen, right, atol=1) != plain
    floats = Image.fromarray(np.full((2, 2), 0.5, np.float32))
    assert (read(floats).getpixel((0, 0))[0] in (127, 128)) != plain
    for same in (Image.new("RGB", (2, 2)), Image.new("L", (2, 2)), Image.new("RGBA", (2, 2), (1, 2, 3, 255))):
        assert read(same).getpixel((0, 0)) == same.convert("RGB").getpixel((0, 0))
    with pytest.warns(UserWarning, match="4 pictures") as told:
        read.tell()
    (message,) = {str(one.message) for one in told}
    assert message.startswith("4 pictures converted plainly" if plain else "4 pictures read as they are to be seen")
    assert "(2 more than 8 bits clipped, 1 not turned upright, 1 transparent pixels shown)" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read.tell()  # told once


def test_the_reader_is_the_models(folders, docs, monkeypatch):
    from vlmprune.eval.lmms import pictures

    monkeypatch.setattr(pictures, "plainly_wrong", lambda image: "not turned upright")
    monkeypatch.setattr(pictures, "upright_rgb", lambda image: Image.new("RGB", image.size, "red"))
    right, plain = (VlmPrune(folders["llava"], device="cpu", batch_size=4, plain_pictures=p) for p in (False, "True"))
    with pytest.warns(UserWarning, match="pictures read as they are to be seen"):
        red = answers(right, docs["llava"])
    with pytest.warns(UserWarning, match=r"10 pictures converted plainly.*\(10 not turned upright\)"):
        assert answers(plain, docs["llava"]) != red
    assert "plain_pictures=True" in repr(plain)
    assert "plain_pictures" not in repr(right)
    with pytest.raises(UserError, match="plain_pictures='maybe' is neither True nor False"):
        VlmPrune(folders["llava"], device="cpu", plain_pictures="maybe")


def test_the_native_rival_has_fewer_tokens_for_the_tower_too():
    """Other settings of the image processor: fewer pixels, or fewer crops, which the model's own packing knows of."""
    for name, split, settings, whole, less in (
        ("scene-qwen", "qwen", {"max_pixels": 2560}, 100, 9),
        ("scene-llava-next", "next", {"image_grid_pinpoints": [[128, 128]]}, 800, 400),
    ):
        docs = testbed.questions(split)[:6:6]
        counts = []
        for given in (None, settings):
            lm = VlmPrune(name, device="cpu", image_processor=given)
            inputs = model_inputs(lm.loaded, [docs[0].image], docs[0].question)
            counts.append(int((inputs["input_ids"] == lm.loaded.model.config.image_token_id).sum()))
            lm.loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)  # as many features as placeholders
            assert ("image_processor" in repr(lm)) == (given is not None)
        assert counts == pytest.approx([whole, less], abs=20)
    with pytest.raises(UserError, match=r"no setting 'max_pixel'\. Did you mean 'max_pixels'\?"):
        VlmPrune("scene-qwen", device="cpu", image_processor={"max_pixel": 2560})


def test_numbers_that_are_no_colours():
    with pytest.raises(UserError, match="NaN"):
        Reader(False)(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_downsample_of_packed_pictures_is_a_smaller_picture(tmp_path):
    """Answers are the unpruned model's about pictures that were scaled by hand; the records know both sizes."""
    from vlmprune.eval import testbed

    asked = [r for r in testbed.questions("qwen") if r.category == "colour" and r.image.width > 1.5 * r.image.height][
        :4
    ]
    sizes = [record.image.size for record in asked]
    whole = [wide * tall // 256 for wide, tall in sizes]
    rows, words = [{"question": "describe the picture .", "answer": ""} for _ in asked], {"max_new_tokens": 14}
    large = [row | {"image": [harness.as_file(r.image)]} for row, r in zip(rows, asked, strict=True)]
    lm = VlmPrune("scene-qwen", method="downsample", keep=0.25, batch_size=4, device="cpu")
    said = answers(lm, harness.save_docs(tmp_path / "large", large), words)
    records = lm.take_records()
    assert [record["tokens_before"] for record in records] == whole
    assert all(0.6 * before // 4 <= r["tokens_after"] <= before // 4 for before, r in zip(whole, records, strict=True))
    assert [r["layer_average"] for r in records] == [r["tokens_after"] for r in records]
    small = []
    for row, record, (wide, tall), mine in zip(rows, asked, sizes, records, strict=True):
        # whole tokens a side, of about the picture's shape
        high = max(1, int((mine["tokens_after"] * tall / wide) ** 0.5 + 0.5))
        size = (mine["tokens_after"] // high * 16, high * 16)
        small.append(row | {"image": [harness.as_file(record.image.resize(size, Image.Resampling.BICUBIC))]})
    lm.use("none")
    assert answers(lm, harness.save_docs(tmp_path / "small", small), words) == said
    assert [record["tokens_before"] for record in lm.take_records()] == [r["tokens_after"] for r in records]
    assert answers(lm, harness.save_docs(tmp_path / "again", large), words) != said
