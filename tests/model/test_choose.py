"""Which instruction set runs a model, on machines that are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native import isa as isa_module
from lorastack.kernels.native.isa import Isa
from lorastack.kernels.quantize import Kind
from lorastack.layout import ModelShapes
from lorastack.model.backends import choose as module
from lorastack.model.backends.choose import Choice, choose
from tests.helpers.native import config_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
XEON = (Isa.AMX, Isa.AVX512_BF16, Isa.AVX512, Isa.AVX2, Isa.PLAIN)
MACHINES = {"xeon": XEON, "zen3": (Isa.AVX2, Isa.PLAIN), "arm": (Isa.NEON, Isa.PLAIN)}


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = getattr(request, "param", "xeon")
    monkeypatch.setattr(isa_module, "supported", MACHINES[name].__contains__)
    return name


def choice_of(
    *,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 32,
    dtype: torch.dtype | None = None,
    native: bool = True,
    kind: Kind | None = None,
    at_most: Isa | None = None,
    triton: bool | None = False,
    device: torch.device = CPU,
) -> Choice:
    shapes = ModelShapes(
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=88,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=100,
        max_context=64,
        tie_word_embeddings=False,
    )
    config = config_of(shapes)
    return choose(
        config,
        device=device,
        dtype=dtype,
        native=native,
        kind=kind,
        at_most=at_most,
        triton=triton,
    )


@pytest.mark.parametrize("kind", [None, *Kind])
@pytest.mark.parametrize(
    ("machine", "best"),
    [("xeon", Isa.AMX), ("zen3", Isa.AVX2), ("arm", Isa.NEON)],
    indirect=["machine"],
)
def test_auto_is_bfloat16_on_the_best_that_is_here(
    machine: str, best: Isa, kind: Kind | None
) -> None:
    chosen = choice_of(kind=kind)
    assert (chosen.dtype, chosen.isa, chosen.why_torch("m")) == (torch.bfloat16, best, "")


@pytest.mark.parametrize(
    ("at_most", "half", "single"),
    [
        (None, Isa.AMX, Isa.AVX512),
        (Isa.AVX512_BF16, Isa.AVX512_BF16, Isa.AVX512),
        (Isa.AVX512, Isa.AVX512, Isa.AVX512),
        (Isa.AVX2, Isa.AVX2, Isa.AVX2),
        (Isa.PLAIN, Isa.PLAIN, Isa.PLAIN),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_lower_one_can_be_asked_for(at_most: Isa | None, half: Isa, single: Isa) -> None:
    assert choice_of(dtype=torch.bfloat16, at_most=at_most).isa is half
    assert choice_of(dtype=torch.float32, at_most=at_most).isa is single


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": 40},
        {"hidden_size": 33},
        {"head_dim": 80},
        {"head_dim": 100},
        {"head_dim": 6, "heads": 16, "kv_heads": 8},
    ],
    ids=str,
)
@pytest.mark.usefixtures("machine")
def test_odd_shapes_run_where_nothing_is_multiplied_in_pairs(odd: dict[str, int]) -> None:
    assert choice_of(**odd).isa is Isa.AVX512
    assert choice_of(**odd, at_most=Isa.AVX2).isa is Isa.AVX2


@pytest.mark.parametrize(
    "odd",
    [
        {"head_dim": 272},
        {"head_dim": 5, "heads": 16, "kv_heads": 16},
        {"head_dim": 100, "kv_heads": 2},
        {"head_dim": 6, "heads": 12, "kv_heads": 8},
    ],
    ids=str,
)
@pytest.mark.usefixtures("machine")
def test_torch_runs_what_fits_nowhere(odd: dict[str, int]) -> None:
    chosen = choice_of(**odd)
    assert (chosen.isa, chosen.dtype) == (None, torch.float32)
    assert "m" in chosen.why_torch("m")


@pytest.mark.usefixtures("machine")
def test_torch_runs_what_native_kernels_may_not_or_cannot() -> None:
    off = choice_of(native=False)
    assert (off.isa, off.dtype, off.why_torch("m")) == (None, torch.float32, "")
    assert choice_of(dtype=torch.float16).isa is None
    assert choice_of(dtype=torch.float32, kind=Kind.INT8).isa is None


@pytest.fixture
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not", lambda device: "")


@pytest.mark.usefixtures("triton_runs")
def test_triton_is_chosen_on_cuda_in_bfloat16() -> None:
    for kind in (None, *Kind):
        chosen = choice_of(triton=None, device=CUDA, kind=kind)
        assert (chosen.triton, chosen.dtype, chosen.isa) == (True, torch.bfloat16, None)
        assert chosen.lossless
    single = choice_of(triton=None, device=CUDA, dtype=torch.float32)
    assert single.triton and single.dtype == torch.float32


@pytest.mark.usefixtures("triton_runs")
def test_triton_runs_on_a_cpu_only_where_it_is_asked_for() -> None:
    assert not choice_of(triton=None).triton
    assert not choice_of(triton=False, device=CUDA).triton
    asked = choice_of(triton=True)
    assert asked.triton and (asked.why_torch("m"), asked.why_not_triton) == ("", "")


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": torch.float16}, "not float16"),
        ({"head_dim": 320}, "not 320"),
        ({"head_dim": 33}, "not 33"),
    ],
)
def test_what_triton_does_not_run_is_left_to_torch(options: dict[str, Any], why: str) -> None:
    chosen = choice_of(triton=None, device=CUDA, **options)
    assert not chosen.triton and why in chosen.why_not_triton


def test_why_a_machine_does_not_run_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not", lambda device: "no compiler")
    chosen = choice_of(triton=None, device=CUDA)
    assert not chosen.triton and chosen.why_not_triton == "no compiler"


@pytest.mark.usefixtures("machine")
def test_auto_is_what_is_lossless() -> None:
    """On CUDA float32 where Triton's kernels do not run."""
    for chosen in (choice_of(), choice_of(native=False), choice_of(device=CUDA)):
        assert chosen.lossless
    on_cuda = choice_of(device=CUDA)
    assert (on_cuda.isa, on_cuda.dtype, on_cuda.why_torch("m")) == (None, torch.float32, "")
    assert not choice_of(device=CUDA, dtype=torch.bfloat16).lossless
    assert not choice_of(native=False, dtype=torch.bfloat16).lossless


@pytest.mark.usefixtures("triton_runs")
def test_quantised_weights_are_bfloat16_on_triton() -> None:
    with pytest.raises(InvalidArgumentError, match=r"bfloat16 alone; .*--dtype bfloat16"):
        choice_of(triton=None, device=CUDA, dtype=torch.float32, kind=Kind.INT8)


@pytest.mark.parametrize("kind", Kind)
def test_quantised_weights_are_refused_on_cuda_with_a_remedy(kind: Kind) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"--quantize {kind}: .*--dtype bfloat16"):
        choice_of(device=CUDA, kind=kind)
