"""Plans: which activation sites a model has, what is kept and why, and that looking is harmless."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from quantguard.conversion import convert, inspect
from quantguard.errors import ConversionError, SpecError
from quantguard.sites import Plan, find_sites
from quantguard.spec import QuantSpec


class Calls(nn.Module):
    """Call one activation between two layers, however it is spelled."""

    def __init__(self, call: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.call = call
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, self.first(x)))


def names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


def reasons(plan: Plan) -> dict[str, str]:
    return {site.name: site.reason for site in plan.sites}


def bits(plan: Plan) -> dict[str, int]:
    return {site.name: site.spec.bits if site.spec else 32 for site in plan.sites}


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.resnet18()


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
    """Call one module three times, one function twice."""

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


def test_names_avoid_what_the_module_has_already() -> None:
    class Taken(Repeats):
        act_2, gelu = "mine", "mine too"

    assert names(find_sites(Taken())) == ["act", "gelu_q", "act_2_q", "act_3", "gelu_2"]


class Iterates(nn.Module):
    """Run the children of a Sequential one by one."""

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
    """Squeeze and excite: the second activation is a gate."""

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
def test_a_gate_is_kept_and_listed_unless_asked_for(call: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Gated(call))
    plan = inspect(model)
    assert [site.name for site in plan.converted] == ["0.act"]
    assert [site.reason for site in plan.kept] == ["gate"]
    assert len(inspect(model, gates=True).converted) == 2
    assert "kept: gate" in str(plan) and "1 of 2 activation sites to convert" in str(plan)


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
    assert inspect(model, gates=True).kept[0].reason == "model output"


def test_a_recurrent_cell_is_listed_as_fused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.rnn(x)[0][:, -1]))

    plan = inspect(Recurrent())
    assert reasons(plan) == {"rnn": "fused cell", "relu": ""}


def block(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), *last)


class Named(nn.Sequential):
    pass


def stack() -> nn.Sequential:
    return nn.Sequential(block(), Named(*block()), nn.Linear(6, 3))


ALL = {"0.1": 2, "0.3": 2, "1.1": 2, "1.3": 2}


@pytest.mark.parametrize(("pattern", "expected"), [
    (5, {**ALL, "0.1": 5, "0.3": 5, "1.1": 5, "1.3": 5}),
    ({"*": 2, "1.*": 4}, {**ALL, "1.1": 4, "1.3": 4}),
    ({"*": 2, "gelu": 8}, {**ALL, "0.3": 8, "1.3": 8}),
    ({"*": 2, "0.1": 32}, {**ALL, "0.1": 32}),
    ({"0": 3}, {"0.1": 3, "0.3": 3, "1.1": 32, "1.3": 32}),
    ({"?.1": 1, "1.1": 7}, {"0.1": 1, "1.1": 7, "0.3": 32, "1.3": 32}),
    ({"1.1": 7, "*": 2}, ALL),  # the last that matches counts
    ({"*": 2, "1.1": QuantSpec(6, form="tanh")}, {**ALL, "1.1": 6}),
    (QuantSpec(3, True), dict.fromkeys(ALL, 3)),
])
def test_bits_by_pattern(pattern: Any, expected: dict[str, int]) -> None:
    plan = inspect(stack(), pattern)
    assert bits(plan) == expected
    assert {row["name"]: row["bits"] for row in plan.to_dict()["sites"]} == expected


def test_a_spec_says_everything_and_a_number_takes_the_options() -> None:
    own = QuantSpec(6, False, range_factor=0.5)
    plan = inspect(stack(), {"*": 2, "1.1": own}, True, per_channel=True)
    assert [site.spec for site in plan.sites] == [
        own if site.name == "1.1" else QuantSpec(2, True, True) for site in plan.sites]


@pytest.mark.parametrize(("keep", "kept"), [
    ("0.1", {"0.1"}), (["0.1", "1.3"], {"0.1", "1.3"}), ("1.*", {"1.1", "1.3"}),
    ("1", {"1.1", "1.3"}), ("gelu", {"0.3", "1.3"}), (nn.ReLU, {"0.1", "1.1"}),
    ([Named], {"1.1", "1.3"}), ("*.1", {"0.1", "1.1"}), ((), set()),
])
def test_keep_by_name_pattern_kind_and_class(keep: Any, kept: set[str]) -> None:
    plan = inspect(stack(), keep=keep)
    assert {site.name for site in plan.kept} == kept
    assert {site.reason for site in plan.kept} <= {"keep="}


@pytest.mark.parametrize(("options", "nearest"), [
    ({"keep": "relu_1"}, "relu"), ({"keep": ["1.1", "gelo"]}, "gelu"),
    ({"bits": {"*": 2, "1.11": 3}}, "1.1"), ({"bits": {"layerX": 3}}, None),
    ({"keep": nn.Tanh}, None)])
def test_a_pattern_that_matches_nothing_suggests_the_nearest(
        options: dict[str, Any], nearest: str | None) -> None:
    with pytest.raises(SpecError, match="matches no activation site") as caught:
        inspect(stack(), **options)
    assert (f"Did you mean {nearest!r}?" if nearest else "quantguard.inspect") in str(caught.value)


def test_nothing_to_convert_says_why() -> None:
    with pytest.raises(ConversionError, match="knows"):
        inspect(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match=r"Every one is kept: 1 \(model output\)"):
        inspect(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(ConversionError, match=r"1 \(keep=\)"):
        inspect(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), keep="1")
    with pytest.raises(ConversionError, match="expected an nn.Module, got int"):
        inspect(3)  # type: ignore[arg-type]


def test_a_script_module_is_refused_also_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(1, 3))
    for model in (script, nn.Sequential(script, nn.ReLU(), nn.Linear(3, 3))):
        with pytest.raises(ConversionError, match="ScriptModule"):
            inspect(model)


def test_data_parallel_is_taken_off() -> None:
    model = stack()
    assert inspect(nn.DataParallel(model)).sites == inspect(model).sites


def test_inspecting_a_converted_model_gives_the_plan_it_was_made_by() -> None:
    model = stack()
    assert inspect(convert(model, 3)) == inspect(model, 3)


class Blocked(nn.Module):
    """Hold a no_grad block, which a graph cannot hold."""

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
    # (what follows the layer, whether somebody may read the overwritten input)
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
def test_batchnorms_that_feed_a_site(model: nn.Module, statistics: tuple[str, ...]) -> None:
    assert find_sites(model).sites[0].statistics == statistics


def test_the_channels_are_last_after_linear_layers() -> None:
    assert [site.axis for site in find_sites(stack()).sites] == [-1] * 4
    assert find_sites(conv(nn.ReLU(), nn.Conv2d(4, 2, 1))).sites[0].axis == 1


class Remembers(nn.Module):
    """Change buffers and attributes of its own in forward, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(6, 6), how
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.calls, self.seen, self.table = 0, [], {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.count.add_(1)
        elif self.how == "augmented":
            self.count += 1
        elif self.how == "constant":
            self.last = torch.ones(2)
        elif self.how == "value":
            self.last = x.detach().flatten()[:2]
        elif self.how == "number":
            self.calls += 1
        elif self.how == "list":
            self.seen.append(x)
        elif self.how == "dict":
            self.table["n"] += 1
        return F.relu(self.layer(x))


WAYS = ["in place", "augmented", "constant", "value", "number", "list", "dict"]


def snapshot(model: nn.Module) -> list[Any]:
    """Return all that can be seen of a model and of the random numbers, comparable by ``==``."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    for path, module in model.named_modules():
        plain = {k: repr(v) for k, v in sorted(module.__dict__.items())
                 if not k.startswith("_")}
        tensors = {k: (type(v), v.tolist() if type(v) in (Tensor, nn.Parameter) else repr(v))
                   for place in (module._parameters, module._buffers) for k, v in place.items()}
        seen.append((path, type(module), plain, tensors, list(module._modules),
                     list(module.__dict__)))
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("verb", [inspect, convert])
def test_looking_and_converting_leave_the_users_model_as_it_was(
        verb: Callable[..., Any], how: str, training: bool) -> None:
    # Remembers may be left unread: then its sites stay float and are listed.
    model = nn.Sequential(Remembers(how), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model.train(training)
    before = snapshot(model)
    verb(model, example=torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert snapshot(model) == before


@pytest.mark.parametrize("how", WAYS)
def test_the_snapshot_sees_each_of_these_changes(how: str) -> None:
    """The broken twin: running the forward is what must not happen to the user's model."""
    model = nn.Sequential(Remembers(how), nn.Linear(6, 3))
    before = snapshot(model)
    model(torch.ones(1, 6))
    assert snapshot(model) != before


def test_a_resnet_is_left_as_it_was(resnet: nn.Module) -> None:
    classes = [type(m) for m in resnet.modules()]
    attributes = [copy.copy(m.__dict__) for m in resnet.modules()]
    state = torch.get_rng_state()
    plan = inspect(resnet)
    assert [type(m) for m in resnet.modules()] == classes
    assert [m.__dict__ for m in resnet.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.sites[0].name == "relu" and plan.sites[1].name == "layer1.0.relu"
    assert names(plan)[2] == "layer1.0.relu_2"


@pytest.mark.parametrize("traced", [True, False])
def test_boxes_clipped_to_the_image_are_no_activations(traced: bool) -> None:
    from torchvision.ops import clip_boxes_to_image

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            boxes = self.head(x).relu()
            if not traced and boxes.sum() < -1:  # which torch.fx cannot follow
                boxes = -boxes
            return clip_boxes_to_image(boxes, (30, 40)) + 1

    converted = convert(Boxes(), 2, example=torch.randn(5, 4))
    plan = converted.quantguard.plan
    assert [(site.kind, site.reason) for site in plan.sites] == [
        ("relu", ""), ("relu", "box coordinates"), ("relu", "box coordinates")]
    assert converted.quantguard.audit.left == ()
