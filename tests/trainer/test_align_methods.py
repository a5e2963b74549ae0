"""What holds for every method and option: gradients, compilation, precision, and what a union adds up to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from align_cases import CASES, EchoTeacher, inputs_for, make, randomize

from trainer.align import build, config_class
from trainer.align.base import AlignInputs

CASE_NAMES = list(CASES)

# One of every piece of code that the compiler must get through; tracing is slow.
COMPILED = [
    "repa nt-xent",
    "irepa",
    "sara",
    "dya both",
    "ahpa",
    "ahpa router static",
    "ahpa router linear",
    "ahpa router table",
    "ahpa router attention",
    "ahpa router content",
    "ahpa time fourier",
    "ahpa full union",
    "ahpa whiten",
    "ahpa several blocks content",
    "sra",
    "sra2 conv cosine",
]


def total(terms):
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("case", CASE_NAMES)
def test_loss_is_finite_and_gradients_flow_only_where_they_must(case):
    module = make(*CASES[case])
    inputs = inputs_for(module, requires_grad=True)
    terms = module.terms(inputs)
    assert terms and all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    loss = total(terms)
    assert torch.isfinite(loss)
    loss.backward()

    for tap in module.taps:
        grad = inputs.hidden[tap].grad
        assert grad is not None and torch.isfinite(grad).all()
        assert (grad.flatten(1).norm(dim=1) > 0).all(), "every sample's hidden state must be pulled"
    for target in inputs.targets.values():
        assert target.grad is None
    assert inputs.latent.grad is None
    assert (inputs.time_embedding.grad is not None) == case.startswith("dya")
    if inputs.teacher is not None:
        assert inputs.teacher.weight.grad is None

    adversary = set(module.adversary.parameters()) if module.adversary is not None else set()
    for name, parameter in module.named_parameters():
        if parameter in adversary:
            assert parameter.grad is None, f"{name}: the model's step must not train the discriminator"
        else:
            assert parameter.grad is not None and parameter.grad.norm() > 0, name


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_whole_and_agrees_with_eager(case):
    torch._dynamo.reset()
    module = make(*CASES[case])
    inputs = inputs_for(module)
    teacher = inputs.teacher

    def step(hidden, targets, t, time_embedding, latent, uniform):
        return module.terms(
            AlignInputs(
                hidden=hidden,
                t=t,
                targets=targets,
                time_embedding=time_embedding,
                latent=latent,
                uniform=uniform,
                teacher=None if teacher is None else lambda t, n: torch.cos(t)[:, None, None] * latent.new_ones(16, 16),
            )
        )

    args = (inputs.hidden, inputs.targets, inputs.t, inputs.time_embedding, inputs.latent, inputs.uniform)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*args)
    expected = step(*args)
    assert compiled.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name])


@pytest.mark.parametrize("case", ["dya", "ahpa+sra"])
def test_compiles_whole_with_its_backward_pass_under_autocast(case):
    torch._dynamo.reset()
    if case == "ahpa+sra":
        module = randomize(build([(n, config_class(n)()) for n in ("ahpa", "sra")], *_setting()))
    else:
        module = make(*CASES[case])
    inputs = inputs_for(module, requires_grad=True)

    def step(hidden):
        with torch.autocast("cpu", torch.bfloat16):
            return total(
                module.terms(
                    dataclasses.replace(
                        inputs,
                        hidden=hidden,
                        teacher=(lambda t, n: torch.cos(t)[:, None, None] * torch.ones(16, 16)),
                    )
                )
            )

    eager = torch.autograd.grad(step(inputs.hidden), list(inputs.hidden.values()))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(inputs.hidden), list(inputs.hidden.values())), eager):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def _setting():
    from align_cases import FEATURES, INFO

    return INFO, FEATURES


@pytest.mark.parametrize("case", CASE_NAMES)
def test_bfloat16_autocast_stays_near_float32(case):
    module = make(*CASES[case])
    inputs = inputs_for(module)
    half = dataclasses.replace(
        inputs,
        hidden={tap: h.bfloat16() for tap, h in inputs.hidden.items()},
        targets={name: y.bfloat16() for name, y in inputs.targets.items()},
    )
    with torch.autocast("cpu", torch.bfloat16):
        low = module.terms(half)
    for name, term in module.terms(inputs).items():
        assert low[name].dtype == torch.float32
        assert abs(low[name] - term) <= 0.03 * max(1.0, abs(term.item())), name


@pytest.mark.parametrize("case", CASE_NAMES)
def test_a_batch_loss_is_the_mean_of_its_samples_losses(case):
    """So that micro-batches and ranks of equal size average to the global batch's loss."""
    if case == "sara batch norm":
        pytest.skip("batch statistics couple the samples: the reason why it is not the default")
    module = make(*CASES[case])
    inputs = inputs_for(module)

    def rows(i):
        values = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
        cut: dict[str, Any] = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for key in ("hidden", "targets"):
            cut[key] = {k: v[i : i + 1] for k, v in values[key].items()}
        cut["stream_hidden"] = {
            name: {k: v[i : i + 1] for k, v in found.items()} for name, found in inputs.stream_hidden.items()
        }
        return AlignInputs(**cut)

    parts = [module.terms(rows(i)) for i in range(len(inputs.t))]
    for name, term in module.terms(inputs).items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), term)


@pytest.mark.parametrize("case", CASE_NAMES)
def test_metrics_are_finite_scalars(case):
    module = make(*CASES[case])
    with torch.no_grad():
        values = module.metrics(inputs_for(module))
    assert values and all(v.shape == () and torch.isfinite(v) for v in values.values())


@pytest.mark.parametrize("case", CASE_NAMES)
def test_the_weight_scales_the_loss(case):
    name, options = CASES[case]
    keys = ["patch_weight", "structure_weight", "adversarial_weight"] if name == "sara" else ["weight"]
    config = config_class(name)(**options)
    doubled = {**options, **{key: 2 * getattr(config, key) for key in keys}}
    once, twice = make(name, options), make(name, doubled)
    inputs = inputs_for(once)
    torch.testing.assert_close(total(twice.terms(inputs)), 2 * total(once.terms(inputs)))


def test_reg_s_loss_is_of_all_tokens_alike_and_its_metrics_tell_them_apart():
    module = make("reg", {"head_width": 10})
    inputs = inputs_for(module)
    tokens, class_token = module.reads
    found = module.metrics(inputs)
    of_tokens, of_class_token = found[f"similarity/{tokens}"], found[f"similarity/{class_token}"]
    N = inputs.targets[tokens].shape[1]
    torch.testing.assert_close(module.terms(inputs)["cosine"], -0.5 * (N * of_tokens + of_class_token) / (N + 1))
    opposite = {**inputs.targets, class_token: -inputs.targets[class_token]}
    turned = module.metrics(dataclasses.replace(inputs, targets=opposite))
    torch.testing.assert_close(turned[f"similarity/{class_token}"], -of_class_token)
    assert torch.equal(turned[f"similarity/{tokens}"], of_tokens)


def test_none_is_nothing():
    module = make("none")
    assert (module.reads, module.taps, module.needs_teacher, module.adversary) == ((), (), False, None)
    assert list(module.parameters()) == [] and list(module.buffers()) == []
    assert module.terms(inputs_for(module)) == {} and module.metrics(inputs_for(module)) == {}
    assert module.active(step=0, seed=0)


def test_a_union_adds_its_methods_terms_under_their_names():
    info, features = _setting()
    options = {"sara": {"discriminator_weights": "random"}}
    both = randomize(
        build([(n, config_class(n)(**options.get(n, {}))) for n in ("ahpa", "sra", "sara")], info, features)
    )
    inputs = inputs_for(both, teacher=EchoTeacher())
    terms = both.terms(inputs)
    assert set(terms) == {
        "ahpa/cosine",
        "sra/smooth-l1",
        "sara/patch",
        "sara/structure",
        "sara/adversarial",
    }
    for name, part in both.parts.items():
        for term, value in part.terms(inputs).items():
            torch.testing.assert_close(terms[f"{name}/{term}"], value)
    assert both.adversary is both.parts["sara"].adversary and both.adversary_every == 5
    torch.testing.assert_close(both.adversary_loss(inputs), both.parts["sara"].adversary_loss(inputs))
    assert {name.split("/")[0] for name in both.metrics(inputs)} == {"ahpa", "sra", "sara"}


def test_a_union_of_two_discriminators_is_refused():
    from featcache.errors import UserError
    from trainer.align.combined import Combined

    two = {name: make("sara", CASES["sara"][1]) for name in ("a", "b")}
    with pytest.raises(UserError, match="a and b each bring a discriminator"):
        Combined(two)
    one = Combined({"a": two["a"], "b": make("repa")})
    assert one.adversary is two["a"].adversary


def test_dya_switches_off_the_whole_union():
    info, features = _setting()
    both: Any = build([(n, config_class(n)()) for n in ("repa", "dya")], info, features)
    alone = both.parts["dya"]
    assert [both.active(step=s, seed=3) for s in range(50)] == [alone.active(step=s, seed=3) for s in range(50)]
    assert not all(both.active(step=s, seed=3) for s in range(50))


@pytest.mark.parametrize("case", ["ahpa time fourier", "sara", "dya"])
def test_state_dict_round_trip(case):
    first, second = make(*CASES[case]), make(*CASES[case])
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(first.state_dict(), strict=True)
    inputs = inputs_for(first)
    assert {k: v.item() for k, v in first.terms(inputs).items()} == {
        k: v.item() for k, v in second.terms(inputs).items()
    }
