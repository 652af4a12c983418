"""The model that lmms-eval asks: batches, images, generation arguments, methods, measurements."""

import time

import harness
import pytest
import tiny
import tiny_folders
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from tokenizers.processors import TemplateProcessing

import vlmprune
from vlmprune.cli.errors import CommandError, UserError
from vlmprune.eval.model import VlmPrune, cut_off, generation_arguments, produced

SIZES = {"llava": [(24, 24), (40, 30), (24, 60)], "llava_next": [(24, 24), (48, 24), (30, 70), (48, 48)]}
PRUNED = {"llava": {"method": "fopru", "keep": 5}, "llava_next": {"method": "globalcom2", "keep": 0.3}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny random models on disk, by family."""
    root = tmp_path_factory.mktemp("tiny")
    return {family: str(tiny_folders.save(root / family, family)) for family in SIZES}


@pytest.fixture(scope="session")
def docs(tmp_path_factory):
    """Eleven questions of different lengths about no, one or two pictures of different shapes, by family."""
    made = {}
    for family, sizes in SIZES.items():
        rows = []
        for i in range(11):
            shown = [tiny_folders.noise_picture(*sizes[(i + k) % len(sizes)], seed=10 * i + k) for k in range(i % 3)]
            words = " ".join(f"word{(7 * i + k) % 40}" for k in range(1 + (5 * i) % 7))
            rows.append({"question": words, "answer": "", "image": [harness.as_file(p) for p in shown]})
        made[family] = harness.save_docs(tmp_path_factory.mktemp(f"docs_{family}"), rows)
    return made


def instances(lm, task):
    """The requests that lmms-eval would make."""
    lm.task_dict[task.config.task] = task.dataset
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def texts(results):
    return [result.text for result in results]


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("pruned", [False, True])
def test_a_batch_gives_the_answers_of_its_prompts_alone(family, pruned, folders, docs):
    chosen = PRUNED[family] if pruned else {"method": "none"}
    found = {}
    for size in (1, 4):
        lm = VlmPrune(folders[family], **chosen, batch_size=size, device="cpu")
        found[size] = harness.answers(harness.evaluate(lm, [harness.task(docs[family])])), lm.take_records()
    assert found[1][0] == found[4][0]
    assert len(set(found[1][0])) > 6  # answers tell prompts apart
    timeless = ("doc", "task", "tokens_before", "tokens_after", "layer_average", "output_tokens")
    assert [[r[k] for k in timeless] for r in found[1][1]] == [[r[k] for k in timeless] for r in found[4][1]]
    before = [record["tokens_before"] for record in found[1][1]]
    assert [b > 0 for b in before] == [i % 3 > 0 for i in range(11)]


@pytest.mark.parametrize("family", SIZES)
def test_answers_are_those_of_the_patched_model_by_itself(family, folders, docs):
    """The reference: transformers' own classes, one prompt at a time, and `vlmprune.patch`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    task = harness.task(docs[family])
    model = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folders[family])
    options = dict(PRUNED[family])
    handle = vlmprune.patch(model, options.pop("method"), **options)
    said, entering, average = [], [], []
    for doc in task.dataset["test"]:
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
    assert harness.answers(harness.evaluate(lm, [task])) == said
    records = lm.take_records()
    assert [record["tokens_after"] for record in records] == entering
    assert [record["layer_average"] for record in records] == pytest.approx(average)
    lm.use("none")
    assert harness.answers(harness.evaluate(lm, [harness.task(docs[family])])) != said


def test_requests_with_other_generation_arguments_do_not_share_a_batch(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=4, device="cpu")
    short = harness.task(docs["llava"], "short", generation_kwargs={"max_new_tokens": 2})
    long = harness.task(docs["llava"], "long", generation_kwargs={"max_new_tokens": 5})
    mixed = [r for pair in zip(instances(lm, short), instances(lm, long), strict=True) for r in pair]
    seen = []
    lm.progress = lambda done, total: seen.append((done, total))
    results = lm.generate_until(mixed)
    said = texts(results)
    assert [result.token_counts.output_tokens for result in results] == [2, 5] * 11
    assert all(long.startswith(short) for short, long in zip(said[::2], said[1::2], strict=True))
    assert seen == [(4, 22), (8, 22), (11, 22), (15, 22), (19, 22), (22, 22)]


def test_greedy_unless_the_task_samples(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=4, device="cpu")
    greedy = harness.answers(harness.evaluate(lm, [harness.task(docs["llava"])]))
    config = lm.loaded.model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 5.0, 0.9  # what some checkpoints come with
    assert harness.answers(harness.evaluate(lm, [harness.task(docs["llava"])])) == greedy
    plain = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "top_p": 1.0, "image_aspect_ratio": "pad"}
    assert harness.answers(harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=plain)])) == greedy
    hot = {"max_new_tokens": 6, "temperature": 3.0}
    sampled = [
        harness.answers(
            harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=hot)], torch_random_seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert greedy not in sampled


def test_beams_are_those_of_generate(folders, docs):
    lm = VlmPrune(folders["llava"], **PRUNED["llava"], batch_size=4, device="cpu")
    kwargs = {"max_new_tokens": 6, "num_beams": 3}
    said = harness.answers(harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=kwargs)]))
    counts = [(r["tokens_before"], r["tokens_after"]) for r in lm.take_records()]
    lm.batch_size = 1
    alone = harness.answers(harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=kwargs)]))
    assert said == alone
    assert counts == [(0, 0), (16, 5), (32, 10)] * 3 + [(0, 0), (16, 5)]
    assert said != harness.answers(harness.evaluate(lm, [harness.task(docs["llava"])]))


def test_until_ends_and_cuts_the_answer(folders, docs):
    lm = VlmPrune(folders["llava"], batch_size=3, device="cpu")
    whole = harness.answers(
        harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 8})])
    )
    lengths = [record["output_tokens"] for record in lm.take_records()]
    assert set(lengths) == {8}
    stop = whole[4].split()[3]
    kwargs = {"max_new_tokens": 8, "until": [stop, "never"]}
    cut = harness.answers(harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=kwargs)]))
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut != whole
    lm.batch_size = 1
    lm.take_records()
    alone = harness.answers(harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs=kwargs)]))
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

    def now():
        return harness.answers(harness.evaluate(lm, [harness.task(docs["llava"])]))

    pruned = now()
    lm.use("none")
    plain = now()
    lm.use("random", keep=5, seed=3, average=None)
    other = now()
    lm.use("fopru", keep=5)
    assert now() == pruned
    assert len({tuple(one) for one in (pruned, plain, other)}) == 3
    assert lm.loaded.model is model  # lmms-eval's own clean() would have deleted it
    with pytest.raises(UserError, match="Did you mean 'fopru'"):
        lm.use("foru", keep=5)
    with pytest.raises(UserError, match="globalcom2 on"):
        lm.use("globalcom2", keep=5)
    assert (lm.method, lm.options) == ("fopru", {"keep": 5})
    assert now() == pruned
    lm.use("none")
    assert now() == plain


def test_records_are_of_the_requests_since_the_last_call(folders, docs):
    lm = VlmPrune(folders["llava_next"], method="fastv", keep=8, batch_size=4, device="cpu")
    harness.evaluate(lm, [harness.task(docs["llava_next"], "b"), harness.task(docs["llava_next"], "a")], limit=4)
    records = lm.take_records()
    assert [(r["task"], r["doc"]) for r in records] == [(t, d) for t in "ab" for d in range(4)]
    assert lm.take_records() == []
    blind, one, two = records[0], records[1], records[2]
    assert blind["tokens_before"] == blind["tokens_after"] == blind["layer_average"] == 0
    for record in (one, two):  # cut inside the language model
        assert record["tokens_before"] == record["tokens_after"] > record["layer_average"] > 8
    assert two["tokens_before"] > one["tokens_before"]
    lm.use("none")
    harness.evaluate(lm, [harness.task(docs["llava_next"])], limit=4)
    assert all(r["tokens_before"] == r["tokens_after"] == r["layer_average"] for r in lm.take_records())


def test_the_first_token_is_timed_without_another_forward(folders, docs):
    lm = VlmPrune(folders["llava"], **PRUNED["llava"], device="cpu")
    task = harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 4})
    calls = []

    def slow(module, args, kwargs):
        calls.append(kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else 0)
        time.sleep(0.2 if len(calls) % 4 == 1 else 0.05)

    (request,) = [r for r in instances(lm, task) if r.doc_id == 1]
    texts(lm.generate_until([request]))
    lm.take_records()
    hook = lm.loaded.model.model.language_model.register_forward_pre_hook(slow, with_kwargs=True)
    lm.generate_until([request])
    hook.remove()
    (record,) = lm.take_records()
    assert len(calls) == record["output_tokens"] == 4
    assert 0.2 <= record["ttft_s"] < 0.3
    assert 5 < record["decode_tokens_per_s"] <= 3 / 0.15
    assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 2**20


def test_what_loading_left_to_the_first_request_is_not_measured(folders, docs):
    lm = VlmPrune(folders["llava"], device="cpu")
    task = harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 1})
    calls = []

    def slow(module, args, kwargs):
        calls.append(1)
        time.sleep(1.0 if len(calls) == 1 else 0)

    hook = lm.loaded.model.model.language_model.register_forward_pre_hook(slow, with_kwargs=True)
    requests = instances(lm, task)[:2]
    lm.generate_until(requests)
    records = lm.take_records()
    assert [record["doc"] for record in records] == [request.doc_id for request in requests]
    assert all(record["ttft_s"] < 1 for record in records)
    assert len(calls) == 3
    lm.use(**PRUNED["llava"])
    lm.generate_until(requests)
    hook.remove()
    assert len(calls) == 5  # once a load


def test_one_token_has_no_decode_speed(folders, docs):
    lm = VlmPrune(folders["llava"], device="cpu")
    harness.evaluate(lm, [harness.task(docs["llava"], generation_kwargs={"max_new_tokens": 1})], limit=2)
    assert [record["decode_tokens_per_s"] for record in lm.take_records()] == [None, None]


def test_the_response_cache_tells_methods_apart(folders, docs, tmp_path, monkeypatch):
    asked = []
    answer = VlmPrune.answer
    monkeypatch.setattr(VlmPrune, "answer", lambda self, batch: asked.append(len(batch)) or answer(self, batch))
    monkeypatch.setattr(VlmPrune, "warm_up", lambda *_: None)

    def run(lm, args=None):
        asked.clear()
        task, options = harness.task(docs["llava"]), {"use_cache": str(tmp_path)}
        if args is not None:
            options |= {"model_args": args, "device": "cpu"}
        said = harness.answers(harness.evaluate(lm, [task], **options))
        return said, sum(asked)

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


def test_a_chat_template_is_needed(folders, docs, tmp_path):
    folder = tmp_path / "bare"
    tiny.model().save_pretrained(folder)
    processor = tiny_folders.processor()
    processor.chat_template = None
    processor.save_pretrained(folder)
    with pytest.raises(UserError, match="no chat template"):
        VlmPrune(str(folder), device="cpu")
    template = tmp_path / "chat.jinja"
    template.write_text(tiny_folders.TEMPLATE)
    one, other = (
        VlmPrune(place, device="cpu", template=given)
        for place, given in ((str(folder), str(template)), (folders["llava"], None))
    )
    assert one.loaded.processor.chat_template == other.loaded.processor.chat_template
    task = harness.task(docs["llava"])
    assert texts(one.generate_until(instances(one, task))) == texts(other.generate_until(instances(other, task)))
    template.write_text("{{ messages[0]['content'][-1]['text'] }}")
    blind = VlmPrune(str(folder), device="cpu", template=str(template))
    with pytest.raises(UserError, match=r"documents .*writes 0 <image> for"):
        blind.generate_until(instances(blind, task))


def test_the_first_token_is_there_once(folders, docs, tmp_path):
    """Templates that write it, and templates that leave it to the tokenizer."""
    folder = tmp_path / "adds_bos"
    tiny.model().save_pretrained(folder)
    processor = tiny_folders.processor()
    inner = processor.tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    processor.save_pretrained(folder)
    without = tmp_path / "without.jinja"
    without.write_text(tiny_folders.TEMPLATE.replace("{{ bos_token }}", ""))
    said = []
    for template in (None, str(without)):
        lm = VlmPrune(str(folder), device="cpu", batch_size=11, template=template)
        requests = instances(lm, harness.task(docs["llava"]))
        ids = lm.inputs([lm.ask(request) for request in requests])["input_ids"]
        assert (ids == 1).sum(1).tolist() == [1] * 11
        said.append(texts(lm.generate_until(requests)))
    assert said[0] == said[1]


def test_a_placeholder_in_the_text_is_no_second_image(folders, tmp_path):
    rows = [
        {"question": q, "answer": "", "image": [harness.as_file(tiny_folders.noise_picture(24, 24))]}
        for q in ("<image> word1", "word1")
    ]
    lm = VlmPrune(folders["llava"], device="cpu", batch_size=2)
    said = harness.answers(harness.evaluate(lm, [harness.task(harness.save_docs(tmp_path / "d", rows))]))
    assert said[0] == said[1]


def test_pictures_may_be_files_and_videos_are_refused(folders, docs, tmp_path):
    lm = VlmPrune(folders["llava"], device="cpu")
    picture = tiny_folders.noise_picture(24, 24)
    picture.save(tmp_path / "p.png")
    shown = {"file": str(tmp_path / "p.png"), "picture": picture, "grey": Image.new("L", (24, 24))}
    said = {}
    for name, visual in shown.items():
        task = harness.task(docs["llava"], doc_to_visual=lambda doc, visual=visual: [visual])
        said[name] = texts(lm.generate_until(instances(lm, task)[:3]))
    assert said["file"] == said["picture"] != said["grey"]
    video = harness.task(docs["llava"], doc_to_visual=lambda doc: ["film.mp4"])
    with pytest.raises(UserError, match=r"task local, documents \d+: video and audio are not supported"):
        lm.generate_until(instances(lm, video)[:1])


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
        lm.generate_until(instances(lm, harness.task(docs["llava"])))


def test_loading_options_reach_the_model(folders, docs):
    lm = VlmPrune(folders["llava"], device="cpu", attn_implementation="eager", dtype="bfloat16")
    assert lm.loaded.model.config._attn_implementation == "eager"
    assert lm.loaded.model.dtype == torch.bfloat16
    assert len(harness.answers(harness.evaluate(lm, [harness.task(docs["llava"])], limit=3))) == 3
    mapped = VlmPrune(folders["llava"], device_map="cpu", **PRUNED["llava"])
    plain = VlmPrune(folders["llava"], device="cpu", **PRUNED["llava"])
    said = [texts(one.generate_until(instances(one, harness.task(docs["llava"])))) for one in (mapped, plain)]
    assert said[0] == said[1]
    assert "device_map='cpu'" in repr(mapped)
