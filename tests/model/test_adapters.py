"""Which layers are adapted, what an adapter starts as, and what is refused."""

import pytest
import torch

from infra.settings import Invalid
from model.adapters import AdaptedWeights, AdapterConfig, adapt, effective, merged
from tests.model.reference import CONFIG, difference, normal, tiny_model
from tests.model.test_transformer import inputs


class Base:
    def keys(self) -> list[str]:
        return ["blocks.0.ffn.0.weight"]

    def get(self, name: str) -> torch.Tensor:
        return torch.ones(2)


def test_an_adapter_that_has_not_learned_changes_nothing_and_then_adds_its_product() -> None:
    config = AdapterConfig(rank=2, alpha=3.0, targets=("self_attn.q", "head.head"))
    model, plain = adapt(tiny_model(), config), tiny_model()
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = [f"blocks.{index}.self_attn.q" for index in range(CONFIG.num_layers)] + ["head.head"]
    assert learns == [f"{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B")]
    weights = AdaptedWeights(Base(), config, config.layers(plain))
    assert weights.keys() == ["blocks.0.ffn.0.weight", *learns]
    assert torch.equal(weights.get("blocks.0.ffn.0.weight"), torch.ones(2))
    state = {name: weights.get(name) for name in learns}
    bound = CONFIG.dim**-0.5
    first = state["blocks.0.self_attn.q.lora_A"]
    assert 0.8 * bound < first.abs().max() <= bound
    assert not torch.equal(first, state["blocks.1.self_attn.q.lora_A"])
    model.load_state_dict(state, strict=False)
    assert torch.equal(model(*inputs()).velocity, plain(*inputs()).velocity)

    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False)
    plain.load_state_dict(
        {name: merged(name, base, state, config) for name, base in plain.state_dict().items()}
    )
    expected = plain(*inputs()).velocity
    assert (model(*inputs()).velocity - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": -1}, "rank is -1; it must be at least 0."),
        ({"rank": 2, "alpha": 0.0}, "alpha is 0.0; it must be a positive number, or null for the rank."),
        ({"rank": 2, "targets": ()}, "targets is empty; name at least one linear layer, such as q."),
        (
            {"rank": 2, "targets": ("to_q",)},
            "targets names 'to_q', and no linear layer is called so; there are",
        ),
        ({"rank": 10_000}, "rank 10000 is above"),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        AdapterConfig(**settings).layers(tiny_model())
    assert sentence in str(caught.value)


def test_weights_in_effect_have_the_names_of_a_plain_network_and_answer_as_the_adapted_one() -> None:
    model, plain = adapt(tiny_model(), AdapterConfig(rank=2, alpha=3.0)), tiny_model(seed=1)
    with torch.no_grad():
        for index, (name, weight) in enumerate(model.named_parameters()):
            if "lora" in name:
                weight.copy_(normal(*weight.shape, seed=index))
    plain.load_state_dict(dict(effective(model)))
    assert difference(plain(*inputs()).velocity, model(*inputs()).velocity) < 1e-5
