"""What the model that lmms-eval asks is shown: chat templates, placeholders, pictures."""

from __future__ import annotations

import harness
import pytest
import tiny
import tiny_folders
from PIL import Image
from tokenizers.processors import TemplateProcessing

from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.runtime.errors import UserError


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
    said = [harness.texts(lm.generate_until(harness.instances(lm, task))) for lm in (one, other)]
    assert said[0] == said[1]
    template.write_text("{{ messages[0]['content'][-1]['text'] }}")
    blind = VlmPrune(str(folder), device="cpu", template=str(template))
    with pytest.raises(UserError, match=r"documents .*writes 0 <image> for"):
        blind.generate_until(harness.instances(blind, task))


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
        requests = harness.instances(lm, harness.task(docs["llava"]))
        ids = lm.inputs([lm.ask(request) for request in requests])["input_ids"]
        assert (ids == 1).sum(1).tolist() == [1] * 11
        said.append(harness.texts(lm.generate_until(requests)))
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
        said[name] = harness.texts(lm.generate_until(harness.instances(lm, task)[:3]))
    assert said["file"] == said["picture"] != said["grey"]
    video = harness.task(docs["llava"], doc_to_visual=lambda doc: ["film.mp4"])
    with pytest.raises(UserError, match=r"task local, documents \d+: video and audio are not supported"):
        lm.generate_until(harness.instances(lm, video)[:1])
