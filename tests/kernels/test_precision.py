"""Float32 stays float32 whatever the user lets products be in, and the user's setting stays what it is."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import samples

from vlmprune.kernels import precision, reference

SETTINGS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    """A user's setting, taken back afterwards."""
    if request.param == "new" and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    SETTINGS[request.param]()
    yield request.param
    if request.param == "new":
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def coarse(a, b):
    """What a matrix product may do with float32 then: eight bits of every factor."""
    return (a.bfloat16().double() @ b.bfloat16().double()).to(a.dtype)


def test_products_are_float32(setting, monkeypatch):
    a, b = torch.randn(3, 40, 300), torch.randn(3, 300, 50)
    exact = a.double() @ b.double()
    assert precision.relaxed(a)
    monkeypatch.setattr(torch, "matmul", coarse)  # most CPUs take no notice of the setting
    assert (torch.matmul(a, b) - exact).abs().max() > 0.05
    assert (precision.product(a, b) - exact).abs().max() < 5e-5
    assert not precision.relaxed(a.double())


def test_what_is_picked_and_attended_to_does_not_change(monkeypatch):
    names = ("greedy", "greedy, log_det", "attention_mass", "attention_mass, masked")
    cases = {name: samples()[name] for name in names}
    features = torch.randn(1, 400, 64)
    cases["greedy, all at once"] = (
        features,
        torch.tensor([0]),
        torch.tensor([200]),
        features[..., 0] < 9,
        "max_min",
        200,
    )
    cases["greedy, row by row"] = (features, torch.tensor([0]), torch.tensor([9]), features[..., 0] < 9, "max_sum", 9)
    run = lambda name: getattr(reference, name.partition(",")[0])(*cases[name])  # noqa: E731
    expected = {name: run(name) for name in cases}
    monkeypatch.setattr(precision, "relaxed", lambda x: True)
    monkeypatch.setattr(torch, "matmul", coarse)
    for name in cases:
        for mine, theirs in zip(
            *[x if isinstance(x, tuple) else (x,) for x in (run(name), expected[name])], strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_setting_is_left_alone(setting):
    def state():
        ask = getattr(torch._C, "_get_fp32_precision_getter", None)
        new = [ask(*key) for key in (("generic", "all"), ("cuda", "matmul"), ("mkldnn", "matmul"))] if ask else []
        return new if setting == "new" else [*new, torch.get_float32_matmul_precision()]

    before = state()
    for name in ("greedy", "greedy, log_det", "attention_mass"):
        getattr(reference, name.partition(",")[0])(*samples()[name])
    assert state() == before
