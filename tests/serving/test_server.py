"""The real server over HTTP, started by `vlmprune serve` and asked by the real openai client."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from serving_engine import CLOSE, LONGEST, Prompt, expected, questions, reference, several

pytestmark = pytest.mark.vllm

MODEL, OPTIONS = "scene-llava", {"keep": 64}
PATIENCE = 600  # seconds until the server must answer: every process imports torch and vLLM anew


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(engines, tmp_path_factory):
    """Process and address of a server."""
    engines.stop()
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    told = ["--model", MODEL, "--method", "vtc_cls", "--keep", "64", "--dtype", "float32", "--enforce-eager"]
    told += ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    told += ["--limit-mm-per-prompt", '{"image": 2}']
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vlmprune", "serve", *told],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"},
        )
    try:
        wait_for(process, port, log)
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_for(process, port, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no server: {log.read_text()[-4000:]}")


def message(prompt):
    """A prompt as the client sends it, pictures as lossless files."""
    parts = []
    for image in prompt.images:
        file = io.BytesIO()
        image.save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt.question}]}]


def told(prompt):
    extra = {} if prompt.keep is None else {"extra_body": {"mm_processor_kwargs": {"vlmprune_keep": prompt.keep}}}
    return {"model": MODEL, "messages": message(prompt), "max_tokens": LONGEST, "temperature": 0} | extra


def check(response, wanted):
    """A response is what vlmprune on transformers says."""
    (choice,) = response.choices
    text = reference(MODEL)[1].tokenizer.decode(wanted.tokens, skip_special_tokens=True)
    assert response.usage.prompt_tokens == wanted.prompt
    assert choice.message.content.strip() == text.strip()
    logs = [token.logprob for token in choice.logprobs.content]
    assert len(wanted.logprobs) - len(logs) in (0, 1)  # the end of the answer may be left out
    assert all(abs(x - y) < CLOSE for x, y in zip(logs, wanted.logprobs, strict=False))


def test_answers_over_http(server):
    from openai import OpenAI

    client, prompts = OpenAI(base_url=server[1], api_key="none"), questions(MODEL, 10)
    for prompt, wanted in zip(prompts, expected(MODEL, prompts, "vtc_cls", **OPTIONS), strict=True):
        check(client.chat.completions.create(**told(prompt), logprobs=True), wanted)


def test_streaming(server):
    from openai import OpenAI

    client, prompts = OpenAI(base_url=server[1], api_key="none"), questions(MODEL, 4)
    for prompt, wanted in zip(prompts, expected(MODEL, prompts, "vtc_cls", **OPTIONS), strict=True):
        pieces = [
            part.choices[0].delta.content or "" for part in client.chat.completions.create(**told(prompt), stream=True)
        ]
        text = reference(MODEL)[1].tokenizer.decode(wanted.tokens, skip_special_tokens=True)
        assert "".join(pieces).strip() == text.strip()


@pytest.mark.parametrize("keep", [0, "x", 1.5, True])
def test_a_wrong_budget_is_a_400_of_that_request_alone(server, keep):
    from openai import BadRequestError, OpenAI

    client, prompt = OpenAI(base_url=server[1], api_key="none", max_retries=0), questions(MODEL, 1)[0]
    with pytest.raises(BadRequestError, match="vlmprune_keep="):
        client.chat.completions.create(**told(prompt.at(keep)))
    check(
        client.chat.completions.create(**told(prompt), logprobs=True),
        expected(MODEL, [prompt], "vtc_cls", **OPTIONS)[0],
    )


def test_a_request_cannot_end_the_server(server):
    from openai import BadRequestError, OpenAI

    client, prompt = OpenAI(base_url=server[1], api_key="none", max_retries=0), questions(MODEL, 1)[0]
    small = Prompt((prompt.images[0].resize((40, 30)),), prompt.question)
    strange = {"extra_body": {"mm_processor_kwargs": {"do_resize": False, "do_center_crop": False}}}
    with pytest.raises(BadRequestError, match="takes vlmprune_keep alone"):
        client.chat.completions.create(**told(small), **strange)
    wanted = expected(MODEL, [prompt], "vtc_cls", **OPTIONS)[0]
    check(client.chat.completions.create(**told(prompt), logprobs=True), wanted)


def test_200_concurrent_mixed_requests(server):
    from openai import AsyncOpenAI

    one, two = questions(MODEL, 40), several(MODEL, 6)
    kinds = [prompt.at(keep) for prompt, keep in zip(one, [None, 25, 1.0, 0.1] * 10, strict=True)]
    kinds += two + [Prompt((), prompt.question) for prompt in one[:4]]
    wanted = expected(MODEL, kinds, "vtc_cls", **OPTIONS)
    which = [i % len(kinds) for i in range(200)]

    async def ask_all():
        async with AsyncOpenAI(base_url=server[1], api_key="none", max_retries=0, timeout=600) as client:
            asked = [client.chat.completions.create(**told(kinds[i]), logprobs=True) for i in which]
            return await asyncio.gather(*asked)

    for i, response in zip(which, asyncio.run(ask_all()), strict=True):
        check(response, wanted[i])


def test_sigterm_ends_it(server):  # the last one
    process, _ = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
