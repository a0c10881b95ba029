"""A network made ready for many calls against the network itself."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from model.adapters import AdapterConfig, adapt
from model.backbone import Output
from model.families import prepared
from model.kv_cache import BlockCache, History, Window
from model.prepared import TABLES_AT_MOST, PreparedTransformer
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.transformer import TransformerConfig, WanTransformer
from tests.model.reference import CONFIG, GRID, HEIGHT, WIDTH, difference, normal, prompt, tiny_model
from tests.model.test_rollout import run

CHUNK, BATCH = 2, 3
X = normal(BATCH, CHUNK, CONFIG.in_dim, HEIGHT, WIDTH)


def after_one_chunk(network: WanTransformer, dtype: torch.dtype = torch.float32) -> History:
    cache = BlockCache(Window(None, 0, "absolute"), GRID, CONFIG.head_dim)
    shape = (BATCH, CHUNK * GRID[0] * GRID[1], CONFIG.num_heads, CONFIG.head_dim)
    pairs = [(normal(*shape, seed=1).to(dtype), normal(*shape, seed=2).to(dtype)) for _ in network.blocks]
    cache.commit(pairs, CHUNK)
    return cache.history(CHUNK)


@torch.no_grad()
def both(network: WanTransformer, timesteps: list[float]) -> tuple[Output, Output]:
    """What the network answers, and what it answers once it is ready."""
    history, ready = after_one_chunk(network, network.dtype), prepared(network)
    at = torch.tensor(timesteps)
    plain = network(X, at, prompt(BATCH), history=history, return_live=True)
    return plain, ready(
        X, timesteps, network.encode_context(prompt(BATCH)), history=history, return_live=True
    )


def filled(network: nn.Module) -> nn.Module:
    """The network with weights none of which is zero."""
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=index))
    return network


@pytest.mark.parametrize("timesteps", [[750.0] * BATCH, [1000.0, 0.0, 500.0]], ids=["one", "each its own"])
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": False}, {"cross_attn_norm": False}, {"patch_size": (1, 1, 2)}], ids=str
)
def test_it_answers_what_the_network_answers(timesteps: list[float], changes: dict[str, object]) -> None:
    network = filled(WanTransformer(replace(CONFIG, **changes)))
    history = BlockCache(Window(None, 0, "absolute"), network.config.grid(HEIGHT, WIDTH), CONFIG.head_dim)
    ready, text = PreparedTransformer(network), network.encode_context(prompt(BATCH))
    with torch.no_grad():
        for _ in range(2):
            how = {"history": history.history(CHUNK), "return_live": True}
            plain = network(X, torch.tensor(timesteps), prompt(BATCH), **how)
            own = ready(X, timesteps, text, **how)
            assert difference(own.velocity, plain.velocity) < 1e-6
            for (key, value), (own_key, own_value) in zip(plain.live, own.live, strict=True):
                assert difference(own_key, key) < 1e-6 and difference(own_value, value) < 1e-6
            history.commit(plain.live, CHUNK)


def test_rows_at_other_timesteps_do_not_change_a_row() -> None:
    network = tiny_model()
    mixed, alike = both(network, [1000.0, 0.0, 500.0])[1], both(network, [500.0] * BATCH)[1]
    assert torch.equal(mixed.velocity[2], alike.velocity[2])


def test_the_weights_of_a_frozen_network_are_there_once_and_those_of_a_trained_one_are_its_own() -> None:
    frozen, trained = tiny_model().requires_grad_(False), tiny_model()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    for network, shared in ((frozen, True), (trained, False)):
        layer, attention = PreparedTransformer(network, shared=shared).layers[1], network.blocks[1].self_attn
        storage = layer.qkv.weight.untyped_storage().data_ptr()
        for each in (attention.q, attention.k, attention.v):
            assert (each.weight.untyped_storage().data_ptr() == storage) is shared
    after = frozen.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_in_bf16_it_rounds_as_the_network_does() -> None:
    network = tiny_model().to(torch.bfloat16)
    plain, own = both(network, [1000.0] * BATCH)
    assert own.velocity.dtype == plain.velocity.dtype == torch.bfloat16
    assert torch.equal(own.velocity, plain.velocity)


def test_adapters_are_part_of_the_weights() -> None:
    network = adapt(tiny_model(), AdapterConfig(rank=2, alpha=3.0))
    plain, own = both(filled(network), [750.0] * BATCH)
    assert difference(own.velocity, plain.velocity) < 1e-6


@pytest.mark.slow
def test_compiled_it_answers_the_same_and_compiles_once_for_a_window_that_rolls() -> None:
    """For all blocks together, whether there is a history or not, and however long it is."""
    network, config = tiny_model(), RolloutConfig(steps=(1000, 500), chunk=CHUNK, window=5, sink=1)
    plan = RolloutPlan(100, 1)
    dynamo.reset()
    counters.clear()
    expected = run(network, config, plan)
    assert not counters["stats"]
    with dynamo.config.patch(error_on_recompile=True):
        ready = PreparedTransformer(network, compiled=True)
        found = run(network, config, plan, ready=ready)
    assert counters["stats"]["unique_graphs"] == 2, "what is before attention, and what is after it"
    assert difference(found, expected) < 1e-5 and not torch.equal(found, expected)


def test_where_weights_are_sharded_the_network_itself_is_asked() -> None:
    network, whole = tiny_model(), tiny_model()
    own = network.blocks[0].ffn[0].weight.data

    def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.weight.data = own

    network.blocks[0].ffn[0].weight.data = torch.zeros(0)
    network.blocks[0].ffn[0].register_forward_pre_hook(gather)
    config, plan = RolloutConfig(chunk=CHUNK), RolloutPlan(6, 1)
    assert torch.equal(run(network, config, plan, sharded=True), run(whole, config, plan))


def test_modulation_is_kept_for_so_many_timesteps_and_no_more() -> None:
    network = WanTransformer(TransformerConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1))
    ready = PreparedTransformer(network)
    for step in range(TABLES_AT_MOST + 3):
        ready._table([float(step)], torch.device("cpu"))
    assert len(ready._tables) == 3
