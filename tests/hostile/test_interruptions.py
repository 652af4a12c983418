"""Full disks, closed folders and Ctrl-C at bad moments: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from clocks import PATIENCE
from PIL import Image
from tiny_folders import noise_picture

from vlmprune.cli import demo
from vlmprune.runtime import answering, loading
from vlmprune.runtime.files import PREFIX, write_whole
from vlmprune.runtime.pictures import write_picture

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def left(folder):
    """All files below a folder by name, their content beside them."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# `write_whole`, which everything is written by


@pytest.mark.parametrize("step", ["os.fdopen", "os.fsync", "os.chmod", "os.replace"])
@pytest.mark.parametrize("fail", [no_room, interrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch, step, fail, old):
    path = tmp_path / "a.json"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            write_whole(path, b"new")
    assert left(tmp_path) == ({} if old is None else {"a.json": old})
    write_whole(path, b"new")
    assert left(tmp_path) == {"a.json": b"new"}


def test_a_disk_that_fills_while_it_is_written_to(tmp_path):
    """A real limit of the system, in a process of its own."""
    write_whole(tmp_path / "a", b"old")
    code = f"""
import resource, signal
from pathlib import Path
from vlmprune.runtime.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole(Path({str(tmp_path / "a")!r}), b"x" * 5000)
except OSError as error:
    print("told", error.strerror)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=os.environ | QUIET)
    assert done.stdout.startswith("told"), done.stderr
    assert left(tmp_path) == {"a": b"old"}


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    write_whole(Path("/dev/null"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("fail", [no_room, interrupt])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.gif"])
def test_pictures_are_written_whole(tmp_path, monkeypatch, name, fail):
    from vlmprune.runtime.errors import CommandError

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((CommandError, KeyboardInterrupt)):
        write_picture(noise_picture(30, 20), tmp_path / name)
    assert left(tmp_path) == {}
    monkeypatch.undo()
    write_picture(noise_picture(30, 20), tmp_path / name)
    with Image.open(tmp_path / name) as read:
        read.load()
        assert read.size == (30, 20)


# The commands: the n-th write of a file fails, or is interrupted, or the model is


@pytest.fixture
def asked(llava, picture, tmp_path):
    """The arguments of `vlmprune run --save`."""
    return ["run", "--image", picture, "--prompt", "what is it ?", "--model", llava, "--repeats", 0,
            "--max-new-tokens", 2, "--save", tmp_path / "out" / "kept.png"]  # fmt: skip


@pytest.fixture
def measured(llava, picture, tmp_path):
    """The arguments of `vlmprune fidelity`."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        noise_picture(24, 24, seed).save(folder / f"{seed}.png")
    (tmp_path / "prompts.txt").write_text("what is it ?\n")
    return ["fidelity", "--images", folder, "--prompts", tmp_path / "prompts.txt", "--model", llava, "--keep", 4,
            "--controls", "none", "--max-new-tokens", 2, "--batch", 1, "--out", tmp_path / "out"]  # fmt: skip


@pytest.fixture
def evaluated(llava, tmp_path):
    """The arguments of `vlmprune eval`."""
    pytest.importorskip("lmms_eval")
    text = f"model: {llava}\nname: tiny\ntasks: [vlmprune_scene_llava_shape]\nmethods: [fopru]\nkeep: 4\nlimit: 1\n"
    (tmp_path / "my.yaml").write_text(f"{text}controls: [none]\noutput: {tmp_path / 'out'}\n")
    return ["eval", tmp_path / "my.yaml"]


@pytest.fixture
def timed(llava, tmp_path):
    """The arguments of `vlmprune bench`, which writes its JSON after the only cell and again at the end."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    return ["bench", "--model", llava, "--method", "random", "--keep", 4, "--pairs", 1, "--plain-runs", 1,
            "--stage-runs", 1, "--new-tokens", 2, "--prompt-tokens", 4, "--device", "cpu",
            "--json", out / "a.json", "--resume", "--csv", out / "a.csv", "--plot", out / "a.png"]  # fmt: skip


VERBS = {"asked": 1, "measured": 1, "evaluated": 1, "timed": 4}


@pytest.mark.parametrize(("fail", "codes"), [(no_room, (1, 2)), (interrupt, (130,))], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("verb", VERBS)
def test_writing_fails(request, cli, tmp_path, monkeypatch, verb, fail, codes):
    """The first file, the last of several: told on one line, and no half of a file is there, nor a temporary one."""
    argv, out = request.getfixturevalue(verb), tmp_path / "out"
    out.mkdir(exist_ok=True)
    replace, number = os.replace, VERBS[verb]

    def sometimes(*args):
        nonlocal number
        number -= 1
        return fail() if number == 0 and PREFIX in str(args[0]) else replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", sometimes)
        code, _, err = cli(*argv)
    assert code in codes, err
    last = [line for line in err.splitlines() if line.startswith("vlmprune: ")]
    assert len(last) == 1
    assert ("interrupted" in last[0]) if fail is interrupt else ("No space left" in last[0])
    assert not any(PREFIX in name for name in left(out))
    for name, content in left(out).items():
        if name.endswith(".json"):
            json.loads(content)
        if name.endswith(".png"):
            Image.open(out / name).load()
    assert cli(*argv)[0] == 0  # and it can be gone on with
    assert not any(PREFIX in name for name in left(out))


LOADING = "transformers.AutoModelForImageTextToText.from_pretrained"
GENERATING = "transformers.LlavaForConditionalGeneration.generate"


@pytest.mark.parametrize("moment", [LOADING, GENERATING, "torch.nn.functional.silu"])
@pytest.mark.parametrize("verb", ["asked", "measured", "evaluated"])
def test_interrupted_at_work(request, cli, tmp_path, monkeypatch, verb, moment):
    """While a model is loaded, while it answers, in the middle of a pruned layer."""
    argv, out = request.getfixturevalue(verb), tmp_path / "out"
    out.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        if moment.startswith("torch"):
            from transformers.models.llama.modeling_llama import LlamaMLP

            patch.setattr(LlamaMLP, "forward", interrupt)
        else:
            patch.setattr(moment, interrupt)
        code, out_text, err = cli(*argv)
    assert (code, [line for line in err.splitlines() if line.startswith("vlmprune: ")]) == (
        130, ["vlmprune: interrupted"],
    )  # fmt: skip
    assert "report" not in out_text
    assert not [name for name in left(out) if not name.endswith((".lock", ".log", "run.json"))]
    assert cli(*argv)[0] == 0


def test_a_demo_that_is_interrupted(cli, tmp_path, monkeypatch):
    """The pictures drawn until then are whole."""
    picture = tmp_path / "scene.png"
    noise_picture(24, 24).save(picture)
    calls = []

    def save(target, *_):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_picture(noise_picture(30, 20), target)

    asked = [{"model": "scene-llava", "file": str(picture), "question": "what ?", "answer": "red"}] * 2
    monkeypatch.setattr(demo, "shipped", lambda: asked)
    monkeypatch.setattr(loading, "load", lambda source: loading.Loaded(source, None, None))
    monkeypatch.setattr(loading, "model_inputs", lambda *_: {})
    monkeypatch.setattr(answering, "answer", lambda *_: "red")
    monkeypatch.setattr(answering, "run_job", lambda *_: None)
    monkeypatch.setattr(answering, "check", lambda *_: None)
    monkeypatch.setattr(demo, "save", save)
    code, out, err = cli("demo", "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert "interrupted" in err
    assert list(left(tmp_path / "out")) == ["1-scene.png"]


def test_an_interrupted_model_is_left_as_it_was(tiny_model, monkeypatch):
    """`with patch(...)`: the hooks go, and the model answers as before."""
    import tiny
    from transformers.models.llama.modeling_llama import LlamaMLP

    import vlmprune

    model = tiny_model()
    prompt = tiny.prompt(model, [3, "image", 2], [(24, 24)])
    with torch.no_grad():
        plain = model(**prompt).logits
        with vlmprune.patch(model, "fastv", keep=4), monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**prompt)
        assert torch.equal(model(**prompt).logits, plain)
        with vlmprune.patch(model, "fastv", keep=4) as handle:
            model(**prompt)
            assert len(handle.trace.kept(0)) == 4


# Folders that cannot be written to


@pytest.mark.parametrize("verb", VERBS)
def test_no_permission(request, cli, tmp_path, monkeypatch, verb):
    """Simulated, since root may write anywhere; as when a folder is closed while the work is done."""
    argv, out, make = request.getfixturevalue(verb), tmp_path / "out", tempfile.mkstemp
    out.mkdir(exist_ok=True)

    def closed(*args, **options):
        if options.get("prefix") == PREFIX:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(*args, **options)

    monkeypatch.setattr(tempfile, "mkstemp", closed)
    code, _, err = cli(*argv)
    assert code in (1, 2), err
    assert "Permission denied" in err.splitlines()[-1]
    assert not [name for name in left(out) if not name.endswith((".lock", ".log"))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("verb", VERBS)
def test_a_closed_folder(request, cli, tmp_path, verb):
    argv, out = request.getfixturevalue(verb), tmp_path / "out"
    out.mkdir(exist_ok=True)
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    code, _, err = cli(*argv)
    assert code in (1, 2), err
    assert "ermission" in err.splitlines()[-1]
    assert left(out) == {}


@pytest.mark.parametrize("verb", ["measured", "evaluated"])
def test_a_file_where_the_folder_should_be(request, cli, tmp_path, verb):
    argv = request.getfixturevalue(verb)
    (tmp_path / "out").write_text("mine")
    code, _, err = cli(*argv)
    assert code == 2
    assert str(tmp_path / "out") in err.splitlines()[-1]
    assert (tmp_path / "out").read_text() == "mine"


# Streams and signals of a real process


def process(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vlmprune", *map(str, argv)], text=True, stderr=subprocess.PIPE,
        env=os.environ | QUIET, **{"stdout": subprocess.PIPE} | options,
    )  # fmt: skip


def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        started = process("--version", stdout=full)
        _, err = started.communicate(timeout=PATIENCE)
    assert (started.returncode, err) == (1, "vlmprune: [Errno 28] No space left on device\n")


def test_nobody_reads_on():
    """`vlmprune ls methods | head -1`: the pipe is closed before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    started = process("ls", "methods", stdout=writing)
    os.close(writing)
    _, err = started.communicate(timeout=PATIENCE)
    assert (started.returncode, err) == (0, "")


def test_ctrl_c_in_a_real_process(tmp_path):
    """While it waits: here for a config that comes through a pipe."""
    os.mkfifo(tmp_path / "pipe.yaml")
    # whoever runs the tests in the background may have it ignored
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    started = process("validate", tmp_path / "pipe.yaml", preexec_fn=heed)
    while started.poll() is None:  # opening to write fails until the command has opened it to read
        try:
            handle = os.open(tmp_path / "pipe.yaml", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    os.close(handle)  # a signal that fell between the open and the read is noticed when the read ends
    out, err = started.communicate(timeout=PATIENCE)
    assert (started.returncode, out, err.strip()) == (130, "", "vlmprune: interrupted")


# Ctrl-C that other people's code makes something else of


def pressed_and(then):
    """A real SIGINT inside somebody's code, which makes what `then` raises of the KeyboardInterrupt, or swallows it."""

    def run(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            then()

    return run


def turned():
    raise ModuleNotFoundError("Could not import module 'CLIPModel'")


def torn():
    raise KeyError("half-imported")


@pytest.fixture
def default_sigint():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was found
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("then", [turned, torn, lambda: None], ids=["import", "traceback", "swallowed"])
@pytest.mark.parametrize("where", [LOADING, "transformers.AutoConfig.from_pretrained", "vlmprune.registry.find"])
@pytest.mark.parametrize("verb", ["asked", "measured", "evaluated"])
def test_ctrl_c_is_130_whatever_became_of_it(request, cli, tmp_path, monkeypatch, default_sigint, verb, where, then):
    argv = request.getfixturevalue(verb)
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(where, pressed_and(then))
        code, _, err = cli(*argv)
    assert (code, [line for line in err.splitlines() if line.startswith("vlmprune: ")]) == (
        130, ["vlmprune: interrupted"],
    )  # fmt: skip
    code, _, err = cli(*argv)  # one Ctrl-C ends one command
    assert code == 0, err


def test_an_error_that_nobody_pressed_a_key_for_is_no_interruption(cli, asked, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(LOADING, lambda *_, **__: turned())
    code, _, err = cli(*asked)
    assert code == 2
    assert "Could not import module 'CLIPModel'" in err


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("module", ["vlmprune.cli", "typer", "vlmprune.runtime.errors"])
def test_ctrl_c_while_the_command_is_imported(tmp_path, module, turned):
    """Before any handler of ours is there; an import may turn it into an error of another kind."""
    (tmp_path / "pressed.py").write_text(f"""
import signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as error:
                raise ImportError("no module") if {turned} else error
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Press())
from vlmprune.__main__ import main
sys.exit(main())
""")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pressed", "--version"], capture_output=True, text=True,
        env=os.environ | QUIET | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "vlmprune: interrupted")


def test_ctrl_c_in_text_that_is_executed(tmp_path):
    """As when a dataclass is made while a module is imported: Python would end itself by the signal, not by 130."""
    (tmp_path / "pressed.py").write_text("""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vlmprune import cli
cli.versions = lambda: exec("signal.raise_signal(signal.SIGINT)", {"signal": signal})
sys.exit(cli.main(["--version"]))
""")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pressed"], capture_output=True, text=True,
        env=os.environ | QUIET | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "vlmprune: interrupted")
