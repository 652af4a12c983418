"""CDPruner and MMTok: which words are asked about, and what they make of them."""

from __future__ import annotations

import pytest
import tiny
import tiny_folders
import torch
from probes import hand_layout, kept, raster
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import vlmprune
from vlmprune import Cut, Decoder, Method, Reduction, UnsupportedError
from vlmprune.methods import CDPruner, MMTok
from vlmprune.methods.cdpruner import likeness, rescaled
from vlmprune.parts import Clip, QuestionIds, QuestionWords, question_of
from vlmprune.parts.diversity import weighted_det


class See(Method):
    """Looks at some taps, and keeps everything."""

    def __init__(self, *taps):
        self.taps, self.seen = taps, None

    def cuts(self, facts):
        return [Cut(Decoder(0), self.taps, self.look)]

    def look(self, seen, layout):
        self.seen = seen
        return Reduction(layout.alive.clone(), list(layout.alive_counts))


@pytest.fixture(scope="module")
def marks():
    return question_of(tiny_folders.processor())


def prompt_of(*turns, images=1):
    """A conversation as the tiny processor's template writes it, with a row of pixels for every picture."""
    processor, model = tiny_folders.processor(), tiny.shared(dtype=torch.float64)
    text = processor.tokenizer.bos_token
    for turn in turns:
        text += f"user: {turn} "
    ids = processor.tokenizer(text + "assistant:", add_special_tokens=False)["input_ids"]
    ids = [i for token in ids for i in [token] * (16 if token == tiny.IMAGE else 1)]
    pixels = torch.randn(images, 3, tiny.TILE, tiny.TILE, generator=torch.Generator().manual_seed(0)).double()
    ids = torch.tensor([ids])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def asked(model, prompt, *taps):
    spy = See(*taps)
    with torch.no_grad(), vlmprune.patch(model, spy):
        model(**prompt)
    return spy.seen


def test_the_template_tells_what_stands_around_a_question(marks):
    tokenizer = tiny_folders.processor().tokenizer
    assert marks.text(marks.opens).startswith("user") or tokenizer.convert_ids_to_tokens(list(marks.opens))[-1:] == [
        "user:"
    ]
    assert tokenizer.convert_ids_to_tokens(list(marks.closes)) == ["assistant:"]
    assert tiny.IMAGE in marks.silent


def test_a_template_may_know_roles_or_refuse_answers():
    """Of one that tells answers apart what stands before a later question, of one that takes none before the first."""
    roles = (
        "{{ bos_token }}word1 {% for message in messages %}{{ 'user: ' if message['role'] == 'user' else 'word2 ' }}"
        "{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}assistant:"
    )
    refusing = "{{ raise_exception('no answers') if messages | length > 1 }}" + roles
    processor, found = tiny_folders.processor(), []
    for template in (roles, refusing):
        processor.chat_template = template
        found.append(processor.tokenizer.convert_ids_to_tokens(list(question_of(processor).opens)))
    assert found == [["user:"], ["<s>", "word1", "user:"]]


@pytest.mark.parametrize(("turns", "images", "said"), [
    (["<image> word7 word8"], 1, "word7 word8"),
    (["word7 <image> word9"], 1, "word7 word9"),
    (["<image> word7 <image> word8"], 2, "word7 word8"),
    (["<image> word7", "word9 word10"], 1, "word9 word10"),
    (["word7", "word9 <image> word10 word11"], 1, "word9 word10 word11"),
])  # fmt: skip
def test_the_question_is_the_last_thing_that_a_user_says(marks, turns, images, said):
    model, prompt = prompt_of(*turns, images=images)
    ids, words = asked(model, prompt, QuestionIds(0, marks), QuestionWords(0, marks)).values()
    assert len(ids) == images
    for image in range(images):
        there = ids[image] >= 0
        assert marks.text(ids[image][there].tolist()) == said
        torch.testing.assert_close(words[image][there], model.get_input_embeddings()(ids[image][there]))
        assert not words[image][~there].any()


def test_words_that_say_nothing_are_left_out_unless_they_are_all(marks):
    model, prompt = prompt_of("<image> word7 word8 word9")
    seven, eight, nine = (marks.ids(f"word{n}")[0] for n in (7, 8, 9))
    taps = (
        QuestionIds(0, marks, (eight,)),
        QuestionIds(0, marks, (seven, eight, nine)),
        QuestionIds(0, marks, (), ((nine,),)),
        QuestionIds(0, None),
    )
    found = [[i for i in ids[0].tolist() if i >= 0] for ids in asked(model, prompt, *taps).values()]
    assert found[:3] == [[seven, nine], [seven, eight, nine], [seven]]  # a sentence goes with the token in front of it
    assert found[3] == [seven, eight, nine, *marks.closes]
    assert marks.words(["word8"]) == (eight,)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_question(marks, side):
    model, short = prompt_of("<image> word7")
    _, long = prompt_of("word9", "<image> word7 word8 word9 word10")
    tap = QuestionIds(0, marks)
    together = asked(model, tiny.batch([short, long], side), tap)[tap]
    assert [[i for i in ids.tolist() if i >= 0] for ids in together] == [
        [i for i in asked(model, prompt, tap)[tap][0].tolist() if i >= 0] for prompt in (short, long)
    ]


def test_picks_are_those_that_make_the_determinant_largest():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 12, 6, generator=g).double(), torch.rand(1, 12, generator=g).double()
    unit = x[0] / x[0].norm(dim=1, keepdim=True)
    kernel = weight[0][:, None] * (unit @ unit.T) * weight[0]
    order = []
    for _ in range(5):
        rest = [j for j in range(12) if j not in order]
        order.append(max(rest, key=lambda j: float(torch.linalg.det(kernel[[*order, j]][:, [*order, j]]))))
    assert weighted_det(x, weight, 5, torch.ones(1, 12, dtype=torch.bool))[0].tolist() == order
    everything = weighted_det(x, weight, 12, torch.ones(1, 12, dtype=torch.bool))[0].tolist()
    assert sorted(everything) == list(range(12))  # of six numbers only six differ: the others by their weight
    assert everything[6:] == sorted(everything[6:], key=lambda j: -float(weight[0, j]))


def test_relevance_by_embeddings_draws_tokens_to_the_question():
    g = torch.Generator().manual_seed(0)
    features, layout = torch.randn(1, 30, 24, generator=g), hand_layout(raster(5, 6))
    words = torch.zeros(1, 4, 24)
    words[0, :2] = features[0, [7, 11]]
    method = CDPruner(keep=2, relevance="embeddings")
    assert kept(method.by_embeddings({0: features, 1: words}, layout)) == [7, 11]
    cosine = torch.nn.functional.cosine_similarity(features[0, 3], features[0, [7, 11]], dim=1).mean()
    torch.testing.assert_close(likeness(features, words, (words != 0).any(-1))[0, 3], cosine)
    among = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(
        rescaled(torch.tensor([[1.0, 3, 2, 9]]), among)[:, :3], torch.tensor([[0.0, 1, 0.5]]) + 5e-7
    )
    assert rescaled(torch.ones(1, 4), among).tolist() == [[1] * 4]


def clip():
    """A random CLIP model with the tower of the tiny models."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *[f"word{n}" for n in range(60)]])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    text = {
        "vocab_size": 70, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    vision = tiny.shared(dtype=torch.float64).config.vision_config.to_dict()
    made = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(4.0)
    return Clip(made, tokenizer)


def test_relevance_by_clip_is_that_of_its_two_halves(marks):
    judge, (model, prompt) = clip(), prompt_of("<image> word7 word8")
    with torch.no_grad(), vlmprune.patch(model, CDPruner(keep=5, clip=judge, question=marks)) as handle:
        model(**prompt)
        scores, found = handle.trace.cuts[0].scores[0], handle.trace.kept_patches(0)
    with torch.no_grad():
        states = model.model.vision_tower(prompt["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
        patches = judge.model.visual_projection(judge.model.vision_model.post_layernorm(states.float()))
        ids = judge.tokenizer("<s> word7 word8 </s>", return_tensors="pt", add_special_tokens=False)["input_ids"]
        text = judge.model.text_projection(judge.model.text_model(input_ids=ids).pooler_output)
    want = -torch.nn.functional.cosine_similarity(patches, text, dim=-1)
    torch.testing.assert_close(scores.float(), want, rtol=1e-4, atol=1e-5)
    assert len(found) == 5
    with torch.no_grad(), vlmprune.patch(model, CDPruner(keep=5, relevance="embeddings")) as handle:
        model(**prompt)
        assert handle.trace.kept_patches(0) != found


def test_long_texts_come_in_pieces():
    judge = clip()
    pieces = judge.texts(" ".join(f"word{n}" for n in range(8)), torch.device("cpu"))
    assert len(pieces) == 2  # six and two words
    torch.testing.assert_close(pieces[1], judge.texts("word6 word7", torch.device("cpu"))[0])
    assert len(judge.texts("", torch.device("cpu"))) == 1


def test_what_clip_needs_is_asked_for(marks, tiny_model):
    with pytest.raises(UnsupportedError, match=r"nothing tells which that is: give clip=.*relevance='embeddings'"):
        vlmprune.patch(tiny_model(), "cdpruner", keep=4)
    with pytest.raises(UnsupportedError, match=r"give question= the processor"):
        vlmprune.patch(tiny_model(), "cdpruner", keep=4, clip=clip())
    with pytest.raises(UnsupportedError, match=r"cannot be loaded from '/nowhere'"):
        vlmprune.patch(tiny_model(), "cdpruner", keep=4, clip="/nowhere", question=marks)
    with pytest.raises(ValueError, match=r"clip=3 must be a folder, an id on the hub"):
        CDPruner(keep=4, clip=3)
    with pytest.raises(ValueError, match=r"question='what' must be a processor"):
        MMTok(keep=4, question="what")
    assert MMTok(keep=4).told_by(tiny_folders.processor()).question.closes == marks.closes


def test_mmtok_covers_the_words_first():
    """As the loop over rows of words and patches that the paper has."""
    g, layout = torch.Generator().manual_seed(0), hand_layout(raster(4, 5))
    projected, features = torch.randn(1, 20, 8, generator=g), torch.randn(1, 20, 6, generator=g)
    words = torch.zeros(1, 3, 8)
    words[0, :2] = projected[0, [4, 13]]
    unit = [torch.nn.functional.normalize(x, dim=-1)[0] for x in (words[:, :2], projected, features)]
    table = torch.cat(((unit[0] @ unit[1].T / 0.02).softmax(1) / 2, 0.5 * (unit[2] @ unit[2].T / 0.2).softmax(1) / 20))
    covered, order = torch.zeros(22), []
    for _ in range(6):
        gain = (table - covered[:, None]).clamp(min=0).sum(0)
        gain[order] = -1
        order.append(int(gain.argmax()))
        covered = torch.maximum(covered, table[:, order[-1]])
    assert set(order[:2]) == {4, 13}
    got = kept(MMTok(keep=6).reduce({0: projected, 1: features, 2: words}, layout))
    assert got == sorted(order)
    assert kept(MMTok(keep=6).reduce({0: projected, 1: features, 2: words * 0}, layout)) != got
