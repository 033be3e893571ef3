"""Activation sites of a model: calls, names, gates, in-place writes and statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from site_models import Calls, bits, names, reasons, stack
from torch import Tensor, nn

from quantguard.conversion.converter import convert, inspect
from quantguard.conversion.sites import find_sites


@pytest.mark.parametrize(("name", "main", "auxiliary"), [
    ("resnet18", 17, 0), ("resnet50", 49, 0), ("inception_v3", 94, 2), ("googlenet", 57, 4)])
def test_site_counts(name: str, main: int, auxiliary: int) -> None:
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    plan = inspect(model)
    heads = [site for site in plan.sites if site.owner.lower().startswith("aux")]
    assert len(plan.sites) - len(heads) == main
    assert len(heads) == auxiliary
    assert len(set(names(plan))) == len(plan.converted) == main + auxiliary
    assert plan.unread == {}


MODULES = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(),
           nn.Tanh(), nn.ELU(0.7), nn.Mish(), nn.Softplus(2.0), nn.Hardtanh(-2, 2)]


@pytest.mark.parametrize("act", MODULES, ids=lambda m: type(m).__name__)
def test_a_module_is_one_site(act: nn.Module) -> None:
    plan = find_sites(Calls(lambda self, x: self.act(x), act))
    site, = plan.sites
    assert (site.name, site.owner, site.target, site.form) == ("act", "", "act", "module")
    assert site.function is not None and repr(site.function) == repr(act)
    assert site.kind.replace("_", "") == type(act).__name__.lower()


FUNCTIONS: list[tuple[str, Callable[..., Tensor], nn.Module]] = [
    ("relu", lambda self, x: F.relu(x), nn.ReLU()),
    ("relu", lambda self, x: torch.relu(x), nn.ReLU()),
    ("relu", lambda self, x: x.relu(), nn.ReLU()),
    ("relu", lambda self, x: F.relu(input=x), nn.ReLU()),
    ("relu6", lambda self, x: F.relu6(x), nn.ReLU6()),
    ("leaky_relu", lambda self, x: F.leaky_relu(x, 0.3), nn.LeakyReLU(0.3)),
    ("leaky_relu", lambda self, x: F.leaky_relu(x, negative_slope=0.2), nn.LeakyReLU(0.2)),
    ("gelu", lambda self, x: F.gelu(x), nn.GELU()),
    ("gelu", lambda self, x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    ("silu", lambda self, x: F.silu(x), nn.SiLU()),
    ("hardswish", lambda self, x: F.hardswish(x), nn.Hardswish()),
    ("tanh", lambda self, x: torch.tanh(x), nn.Tanh()),
    ("tanh", lambda self, x: F.tanh(x), nn.Tanh()),
    ("tanh", lambda self, x: x.tanh(), nn.Tanh()),
]


@pytest.mark.parametrize(("kind", "call", "function"), FUNCTIONS)
def test_a_function_or_method_is_one_site_with_its_arguments(
        kind: str, call: Callable[..., Tensor], function: nn.Module) -> None:
    site, = find_sites(Calls(call)).sites
    assert (site.name, site.kind, site.target) == (kind, kind, "")
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(site.function(x), function(x))
    assert "test_sites.py:" in site.where


class Repeats(nn.Module):
    """Model that calls one module three times and one function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(F.gelu(self.act(x - 1)) + 1)
        return self.head(F.gelu(self.act(x - 0.5)))


def test_each_call_is_a_site_of_its_own() -> None:
    plan = find_sites(nn.Sequential(Repeats()))
    assert names(plan) == ["0.act", "0.gelu", "0.act_2", "0.act_3", "0.gelu_2"]
    assert [site.call for site in plan.sites] == [1, 1, 2, 3, 2]


def test_names_avoid_existing_attributes() -> None:
    class Taken(Repeats):
        act_2, gelu = "mine", "mine too"

    assert names(find_sites(Taken())) == ["act", "gelu_q", "act_2_q", "act_3", "gelu_2"]


class Iterates(nn.Module):
    """Model that runs the children of a Sequential one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(),
                                    nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_container_that_is_iterated_over_has_its_sites_once() -> None:
    assert names(find_sites(Iterates())) == ["layers.1", "layers.3"]


class Gated(nn.Module):
    """Squeeze and excite, where the second activation is a gate."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.SiLU()
        self.call, self.head = call, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(x, self.fc2(self.act(self.fc1(x)))))


GATES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, g: x * torch.sigmoid(g), lambda x, g: g.sigmoid() * x,
    lambda x, g: x.mul(F.sigmoid(g)), lambda x, g: x * F.hardsigmoid(g),
    lambda x, g: x * g.sigmoid().unsqueeze(-1).flatten(1)]


@pytest.mark.parametrize("call", GATES)
def test_a_gate_is_excluded_and_listed_unless_requested(call: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Gated(call))
    plan = inspect(model)
    assert [site.name for site in plan.converted] == ["0.act"]
    assert [site.reason for site in plan.excluded] == ["gate"]
    assert len(inspect(model, gates=True).converted) == 2
    assert "excluded: gate" in str(plan) and "1 of 2 activation sites to convert" in str(plan)


def test_a_sigmoid_that_multiplies_nothing_is_a_target() -> None:
    assert bits(inspect(Calls(lambda self, x: torch.sigmoid(x)))) == {"sigmoid": 2}
    assert bits(inspect(Calls(lambda self, x: self.act(x), nn.Sigmoid()))) == {"act": 2}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.ReLU(), nn.Tanh()])
def test_the_models_output_stays_float(last: nn.Module, nested: bool) -> None:
    tail: nn.Module = nn.Sequential(nn.Linear(4, 3), last) if nested else last
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), tail)
    plan = inspect(model)
    assert reasons(plan) == {"1": "", "3.1" if nested else "3": "model output"}
    assert inspect(model, gates=True).excluded[0].reason == "model output"


def test_a_recurrent_cell_is_listed_as_fused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.rnn(x)[0][:, -1]))

    plan = inspect(Recurrent())
    assert reasons(plan) == {"rnn": "fused cell", "relu": ""}


class Blocked(nn.Module):
    """Module with a no_grad block, which a graph cannot represent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(6, 6), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.relu(self.first(x))
        return self.act(x * scale)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else F.gelu(x)


class Autocasts(Blocked):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.first(x)
        return self.act(y.float())


@pytest.mark.parametrize(("kind", "sites"), [
    (Blocked, {"0.relu": "function", "0.act": "module"}), (Autocasts, {"0.act": "module"}),
    (Decides, {"0.relu": "function", "0.gelu": "function"})])
def test_calls_in_a_forward_that_cannot_be_traced_are_found_by_running_it(
        kind: type[nn.Module], sites: dict[str, str]) -> None:
    plan = inspect(nn.Sequential(nn.Linear(6, 6), kind(), nn.Linear(6, 6), nn.ReLU(),
                                 nn.Linear(6, 3)))
    assert list(plan.unread) == ["1"]
    sites = {name.replace("0", "1"): form for name, form in sites.items()}
    assert {site.name: site.form for site in plan.sites} == {**sites, "3": "module"}
    assert all(site.intercepted == (site.owner == "1") for site in plan.sites)
    assert "not traceable, 1: TraceError" in str(plan) and "by interception" in str(plan)


WRITES: list[tuple[Callable[..., Tensor], bool]] = [
    # (operation after the layer, whether the overwritten input may be read later)
    (lambda self, x: F.relu_(x), False),
    (lambda self, x: F.relu(x, inplace=True), False),
    (lambda self, x: F.relu_(x + 1), False),
    (lambda self, x: F.relu(x) + x, False),
    (lambda self, x: F.relu_(x) + x, True),
    (lambda self, x: F.relu(x, True) + x, True),
    (lambda self, x: x.relu_() + x, True),
    (lambda self, x: torch.relu_(x[:, :1]) + x, True),
    (lambda self, x: F.leaky_relu(x, 0.1, True) * x, True),
    (lambda self, x: F.hardswish(x, inplace=True) * x, True),
]


@pytest.mark.parametrize(("call", "read"), WRITES)
def test_in_place_counts_where_the_overwritten_tensor_may_be_read(
        call: Callable[..., Tensor], read: bool) -> None:
    site, = find_sites(Calls(call)).sites
    assert site.inplace is read


def test_in_place_on_an_argument_may_be_read_by_the_caller() -> None:
    pre = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
    post = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    assert [site.inplace for site in find_sites(nn.Sequential(pre, post)).sites] == [True, False]


def conv(*rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *rest)


class Adds(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other, self.act, self.head = one, other, nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.one(x) + self.other(x)))


def bn() -> nn.Module:
    return nn.BatchNorm2d(4)


@pytest.mark.parametrize(("model", "statistics"), [
    (conv(bn(), nn.ReLU(), nn.Conv2d(4, 2, 1)), ("1",)),
    (conv(bn(), nn.Dropout(), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 2, 1)), ("1",)),
    (conv(nn.ReLU(), nn.Conv2d(4, 2, 1)), ()),
    (conv(bn(), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 2, 1)), ()),
    (nn.Sequential(conv(bn()), nn.ReLU(), nn.Conv2d(4, 2, 1)), ("0.1",)),
    (Adds(conv(bn()), conv(bn())), ("one.1", "other.1")),
    (Adds(conv(bn()), conv()), ()),
])
def test_batchnorms_before_a_site(model: nn.Module, statistics: tuple[str, ...]) -> None:
    assert find_sites(model).sites[0].statistics == statistics


def test_the_channels_are_last_after_linear_layers() -> None:
    assert [site.axis for site in find_sites(stack()).sites] == [-1] * 4
    assert find_sites(conv(nn.ReLU(), nn.Conv2d(4, 2, 1))).sites[0].axis == 1


@pytest.mark.parametrize("traced", [True, False])
def test_boxes_clipped_to_the_image_are_not_activations(traced: bool) -> None:
    from torchvision.ops import clip_boxes_to_image

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            boxes = self.head(x).relu()
            if not traced and boxes.sum() < -1:  # which torch.fx cannot trace
                boxes = -boxes
            return clip_boxes_to_image(boxes, (30, 40)) + 1

    converted = convert(Boxes(), 2, example=torch.randn(5, 4))
    plan = converted.quantguard.plan
    assert [(site.kind, site.reason) for site in plan.sites] == [
        ("relu", ""), ("relu", "box coordinates"), ("relu", "box coordinates")]
    assert converted.quantguard.audit.left == ()
