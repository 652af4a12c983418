"""What an engine refuses when it starts, and the ways in which one may run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from serving_engine import agree, expected, questions, where

from vlmprune import embedded
from vlmprune.eval.bench.serving_model import with_older_names

pytestmark = pytest.mark.vllm


def test_embeddings_of_the_users_own_are_refused(engines):
    with pytest.raises(Exception, match="enable_mm_embeds lets requests bring embeddings"):
        engines("scene-llava", "vtc_cls", engine={"enable_mm_embeds": True}, keep=64)


def test_the_engines_budget_is_no_processor_argument(engines):
    with pytest.raises(Exception, match="is for single requests"):
        engines("scene-llava", "vtc_cls", engine={"mm_processor_kwargs": {"vlmprune_keep": 64}}, keep=64)


def test_our_architecture_without_settings_is_refused(engines):
    from vlmprune.serving.plugin import ARCHITECTURES

    with pytest.raises(Exception, match="nobody said how"):
        engines("scene-llava", engine={"hf_overrides": {"architectures": [ARCHITECTURES["llava"]]}})


def test_settings_that_nobody_checked_are_refused_by_the_engine(engines):
    from vlmprune.serving.plugin import ARCHITECTURES

    told = {"architectures": [ARCHITECTURES["llava"]], "vlmprune": {"method": "fopru", "keep": 64, "stratgy": "row"}}
    with pytest.raises(Exception, match="Did you mean 'strategy'"):
        engines("scene-llava", engine={"hf_overrides": told})


def test_a_tower_adapter_is_refused():
    from types import SimpleNamespace

    from vlmprune.serving.front import refuse

    limits = {"enable_mm_embeds": False, "mm_processor_kwargs": None, "get_limit_per_prompt": lambda modality: 2}
    model = SimpleNamespace(multimodal_config=SimpleNamespace(**limits))
    refuse(model, SimpleNamespace(enable_tower_connector_lora=False))
    with pytest.raises(ValueError, match="enable_tower_connector_lora"):
        refuse(model, SimpleNamespace(enable_tower_connector_lora=True))


def test_no_pictures_are_refused(engines):
    with pytest.raises(Exception, match="allows no pictures"):
        engines("scene-llava", "vtc_cls", engine={"limit_mm_per_prompt": {"image": 0}}, keep=64)


def test_a_plugin_that_is_not_loaded_does_not_start():
    code = (
        "from vllm import LLM; import sys; import vlmprune.vllm\n"
        f"place = {where('scene-llava')!r}\n"
        "LLM(place, **vlmprune.vllm.overrides(place, 'vtc_cls', keep=64), enforce_eager=True, max_model_len=512)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_PLUGINS": ""},
    )
    assert done.returncode != 0
    assert "'VlmpruneLlavaForConditionalGeneration'] are not supported" in done.stderr + done.stdout


def axes_config(**changed):
    """What an engine says of itself, as far as positions on three axes ask."""
    from types import SimpleNamespace

    told = {"ranks": 1, "draft": None, "mode": "weights"} | changed
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=told["ranks"]),
        speculative_config=told["draft"],
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(mm_encoder_tp_mode=told["mode"])),
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": 2}, "tells the first stage alone"),
        ({"draft": object()}, "--speculative-config"),
        ({"mode": "data"}, "--mm-encoder-tp-mode data"),
    ],
)
def test_what_loses_places_is_refused(changed, words):
    from vlmprune import UnsupportedError
    from vlmprune.serving.models import check_axes

    check_axes(axes_config())
    with pytest.raises(UnsupportedError, match=words):
        check_axes(axes_config(**changed))


RANKS = [
    ("scene-llava", "fopru", {"keep": 64}), ("scene-llava", "vtc_cls", {"keep": 25}),
    ("scene-llava", "visionzip", {"keep": 64}), ("scene-llava", "tome", {"keep": 64}),
    ("scene-qwen", "fopru", {"keep": 24}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "method", "options"), RANKS)
def test_two_ranks(engines, model, method, options, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    prompts = questions(model)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = engines(model, method, engine=ranks, **options).ask(prompts)
    agree(found, expected(model, prompts, method, **options))


@pytest.mark.parametrize(("model", "method"), [("scene-llava", "vtc_cls"), ("scene-qwen", "fopru")])
def test_a_compiled_language_model(engines, model, method):
    prompts = questions(model)
    found = engines(model, method, engine={"enforce_eager": False}, keep=25).ask(prompts)
    agree(found, expected(model, prompts, method, keep=25))


def test_users_who_do_not_prune_notice_nothing(engines, tmp_path):
    prompts = questions("scene-llava", 12)
    with_older_names(embedded.path("scene-llava"), tmp_path)  # vLLM's own class knows no others
    engine = engines(tmp_path)
    assert type(engine.inner).__module__ == "vllm.model_executor.models.llava"
    agree(engine.ask(prompts), expected("scene-llava", prompts))
