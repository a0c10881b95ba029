"""The engine against a plain single-process training loop, on real Ray actors over gloo."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.workers.ranks import call
from workers.engine import EngineConfig, FrozenEngine, TrainEngine
from workers.engine_config import ScheduleConfig

STAGES = (0, 1, 2, 3)
BATCH = 8
UPDATES = 5
DECAY, START = 0.9, 2
LEARNING = {
    "learning_rate": 1e-3,
    "schedule": ScheduleConfig("linear", warmup=2, updates=4, final=0.25),
    "clip": 1.2,
    "weight_decay": 0.1,
    "ema_decay": DECAY,
    "ema_start": START,
}
RATES = (0.5e-3, 0.8125e-3, 0.625e-3, 0.4375e-3, 0.25e-3)
"""Of that schedule, the last after its end."""


class Toy(nn.Module):
    """`middle` is large enough for ZeRO-3 to shard it between uses; `extra` is used in some updates only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 320)
        self.middle = nn.Linear(320, 330)
        self.last = nn.Linear(330, 8)
        self.extra = nn.Linear(8, 8)
        self.register_buffer("third", torch.full((8,), 1 / 3), persistent=False)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        y = self.last(torch.tanh(self.middle(torch.tanh(self.first(x + self.third.to(x.dtype))))))
        return self.extra(y) if extra else y


class Weights:
    """Initial weights by name, with changes for tests of bad input."""

    def __init__(self, **changes: Tensor | None) -> None:
        torch.manual_seed(0)
        self.tensors = {
            name: tensor for name, tensor in (Toy().state_dict() | changes).items() if tensor is not None
        }

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def batches(start: int = 0, updates: int = UPDATES) -> list[tuple[bool, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(2, BATCH, 8, generator=generator) for _ in range(start + updates)]
    return [(number % 2 == 0, *pair) for number, pair in enumerate(drawn)][start:]


def loss_of(module: nn.Module, extra: bool, x: Tensor, y: Tensor) -> Tensor:
    """A loss after forwards without gradient, as in a rollout."""
    with torch.no_grad():
        start = 0.1 * module(module(x, extra), extra)
    return (module(x + start, extra).float() - y.float()).square().mean()


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(found) == list(expected)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.fixture(scope="module")
def plain() -> dict:
    """The reference: PyTorch alone, the whole batch at once."""
    module = Toy()
    module.load_state_dict(Weights().tensors)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.0, 0.999), eps=1e-8, weight_decay=0.1)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses, norms, gradients = [], [], {}
    for number, (extra, x, y) in enumerate(batches(), start=1):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(module, extra, x, y)
        loss.backward()
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in parameters.items()}
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), 1.2)))
        optimizer.param_groups[0]["lr"] = RATES[number - 1]
        optimizer.step()
        losses.append(loss.item())
        decay = DECAY if number > START else 0.0
        for name, parameter in parameters.items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "ema": average}


def exported(engine: TrainEngine, ema: bool = False) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    engine.export(tensors.__setitem__, ema=ema)
    return tensors


def save(engine: TrainEngine, directory: str | Path) -> None:
    """Write a snapshot; returns when all ranks have."""
    engine.snapshot().write(directory)
    dist.barrier()


def update(
    engine: TrainEngine, rank: int, world_size: int, extra: bool, x: Tensor, y: Tensor
) -> tuple[float, float, dict[str, Tensor]]:
    """One optimizer step on this rank's share of a batch: its mean loss, the gradient norm, the gradients."""
    total, micro = 0.0, engine.config.accumulation
    for part in range(micro):
        share = slice(rank * micro + part, None, world_size * micro)
        loss = loss_of(engine.module, extra, x[share].to(engine.dtype), y[share])
        assert not engine.step().stepped
        engine.backward(loss)
        total += loss.item() / micro
    gradients = engine.gradients()
    result = engine.step()
    assert result.stepped
    return total, result.grad_norm, gradients


def train(rank: int, world_size: int, settings: dict) -> dict:
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, **settings), weights=Weights())
    assert engine.module.third.dtype == torch.float32
    losses, norms, gradients = zip(
        *(update(engine, rank, world_size, *batch) for batch in batches()), strict=True
    )
    results = {"losses": losses, "norms": norms, "gradients": gradients[0], "version": engine.version}
    return results | {"weights": exported(engine), "ema": exported(engine, ema=True)}


def check_training(ranks: list, settings: dict, plain: dict, tolerance: float) -> None:
    results = call(ranks, train, settings)
    losses = [
        sum(values) / len(ranks) for values in zip(*(result["losses"] for result in results), strict=True)
    ]
    assert losses == pytest.approx(plain["losses"], rel=tolerance)
    for result in results:
        assert relative(result["gradients"], plain["gradients"]) < tolerance
        assert result["norms"] == results[0]["norms"]
        assert result["norms"] == pytest.approx(plain["norms"], rel=tolerance)
        assert result["version"] == UPDATES
    assert relative(results[0]["weights"], plain["weights"]) < tolerance
    assert relative(results[0]["ema"], plain["ema"]) < tolerance


def test_rates_rise_fall_and_stay() -> None:
    def rates(schedule: ScheduleConfig, steps: int) -> list[float]:
        return [schedule.rate(2.0, step) for step in range(steps)]

    assert rates(ScheduleConfig(), 3) == [2, 2, 2]
    assert rates(ScheduleConfig(warmup=4), 6) == [0.5, 1, 1.5, 2, 2, 2]
    assert rates(LEARNING["schedule"], 5) == pytest.approx([2e3 * rate for rate in RATES])
    assert rates(ScheduleConfig("linear", updates=2), 4) == [2, 1, 0, 0]
    half = ScheduleConfig("cosine", updates=3, final=0.5)
    assert rates(half, 5) == pytest.approx([2, 1.75, 1.25, 1, 1])
    with pytest.raises(ValueError, match="updates is of a rate that falls: set kind to linear or cosine"):
        ScheduleConfig(updates=3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (2, 1)])
def test_training_equals_a_plain_loop(
    ranks: dict, plain: dict, size: int, stage: int, accumulation: int
) -> None:
    assert min(plain["norms"]) < LEARNING["clip"] < max(plain["norms"])
    check_training(ranks[size], {"zero_stage": stage, "accumulation": accumulation}, plain, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloaded_training_equals_a_plain_loop(ranks: dict, plain: dict, stage: int) -> None:
    check_training(ranks[2], {"zero_stage": stage, "accumulation": 2, "offload": True}, plain, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_training_is_close_to_a_plain_loop(ranks: dict, plain: dict, stage: int) -> None:
    check_training(ranks[2], {"zero_stage": stage, "accumulation": 2, "dtype": "bf16"}, plain, 1e-2)


def interrupt(rank: int, world_size: int, settings: dict, directory: str) -> list:
    """Two more updates after a save: uninterrupted, rolled back in place, and in a new engine."""
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, **settings), weights=Weights())
    for batch in batches(updates=3):
        update(engine, rank, world_size, *batch)
    save(engine, directory)

    def finish(engine: TrainEngine) -> tuple:
        results = [update(engine, rank, world_size, *batch)[:2] for batch in batches(start=3, updates=2)]
        return results, engine.version, exported(engine), exported(engine, ema=True)

    outcomes = [finish(engine)]
    engine.load(directory)
    outcomes.append(finish(engine))
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, **settings))
    engine.load(directory)
    outcomes.append(finish(engine))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [*((stage, "fp32") for stage in STAGES), (3, "bf16")]
    + [pytest.param(stage, "bf16", marks=pytest.mark.by_hand) for stage in STAGES[:-1]],
)
def test_resumed_training_continues_to_the_bit(ranks: dict, tmp_path: Path, stage: int, dtype: str) -> None:
    for size in (1, 2) if dtype == "fp32" else (2,):
        settings = {"zero_stage": stage, "dtype": dtype}
        for outcomes in call(ranks[size], interrupt, settings, str(tmp_path / str(size))):
            (results, version, weights, average), *others = outcomes
            assert version == UPDATES
            for other in others:
                assert other[0] == results
                assert other[1] == version
                for expected, found in ((weights, other[2]), (average, other[3])):
                    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def save_new(rank: int, world_size: int, stage: int, directory: str) -> None:
    save(TrainEngine(Toy, EngineConfig(learning_rate=1e-3, zero_stage=stage), weights=Weights()), directory)


def load_new(rank: int, world_size: int, settings: dict, directory: str) -> None:
    TrainEngine(Toy, EngineConfig(learning_rate=1e-3, **settings)).load(directory)


def load_wider(rank: int, world_size: int, settings: dict, directory: str) -> None:
    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(9, 320)

    TrainEngine(Wider, EngineConfig(learning_rate=1e-3, **settings)).load(directory)


def stretch(rank: int, world_size: int, settings: dict, since: int, directory: str) -> tuple | None:
    """The next update from the checkpoint after `since`, on this layout, and a checkpoint after it."""
    micro = BATCH // (2 * world_size)
    config = EngineConfig(**LEARNING, accumulation=micro, **settings)
    engine = TrainEngine(Toy, config, weights=None if since else Weights())
    if since:
        engine.load(f"{directory}/{since}")
        # What was written is what is there again, however it is spread out now.
        kept = torch.load(f"{directory}/{since}.pt")
        for ema in (False, True):
            found = exported(engine, ema=ema)
            assert all(torch.equal(found[name], kept[ema][name]) for name in found)
    (batch,) = batches(start=since, updates=1)
    update(engine, rank, world_size, *batch)
    save(engine, f"{directory}/{since + 1}")
    whole = exported(engine), exported(engine, ema=True)
    if rank == 0:
        torch.save(whole, f"{directory}/{since + 1}.pt")
        return whole
    return None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_over_other_ranks_and_zero_stages(
    ranks: dict, plain: dict, tmp_path: Path, dtype: str
) -> None:
    layouts = [(1, 2), (2, 3), (1, 1), (2, 0), (1, 3)]
    assert len(layouts) == UPDATES
    for since, (size, stage) in enumerate(layouts):
        settings = {"zero_stage": stage, "dtype": dtype}
        (weights, average), *_ = call(ranks[size], stretch, settings, since, str(tmp_path))
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    assert relative(weights, plain["weights"]) < tolerance
    assert relative(average, plain["ema"]) < tolerance


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused(ranks: dict, tmp_path: Path) -> None:
    call(ranks[2], save_new, 2, str(tmp_path))
    load_new_in = (load_new, {"zero_stage": 2})
    for group in (ranks[1], ranks[2]):
        with pytest.raises(ValueError, match="has no EMA"):
            call(group, load_new, {"zero_stage": 2, "ema_decay": 0.5}, str(tmp_path))
        with pytest.raises(ValueError, match=r"has first.weight in another size: use the model that"):
            call(group, load_wider, {"zero_stage": 2}, str(tmp_path))
    (kept,) = tmp_path.glob("engine-00001-*")
    kept.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"engine-00001-of-00002\.pt is missing"):
        call(ranks[1], *load_new_in, str(tmp_path))
    (tmp_path / "aside").rename(kept)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="is damaged: use an older checkpoint"):
        call(ranks[2], *load_new_in, str(tmp_path))
    with pytest.raises(ValueError, match="is missing"):
        call(ranks[2], *load_new_in, str(tmp_path / "nowhere"))


def pull_back(module: nn.Module, rank: int, world_size: int, times: int = 3) -> float:
    """Largest relative difference of input gradients from those of a plain copy of the model."""
    copy = Toy()
    copy.load_state_dict(Weights().tensors)
    worst = 0.0
    for extra, x, cotangent in batches(updates=times):
        found, expected = [], []
        for model, gradients in ((module, found), (copy, expected)):
            dtype = next(model.parameters()).dtype
            inputs = x[rank::world_size].to(dtype, copy=True).requires_grad_()
            with torch.no_grad():
                model(inputs, extra)
            weight = cotangent[rank::world_size].to(dtype)
            gradients += torch.autograd.grad(model(inputs, extra), inputs, weight)
        worst = max(worst, relative(dict(enumerate(found)), dict(enumerate(expected))))
    return worst


def pull_back_then_train(rank: int, world_size: int, stage: int) -> tuple[float, dict[str, Tensor]]:
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, zero_stage=stage), weights=Weights())
    worst = pull_back(engine.module, rank, world_size)
    extra, x, y = batches()[0]
    engine.backward(loss_of(engine.module, extra, x[rank::world_size], y[rank::world_size]))
    return worst, engine.gradients()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_pulling_back_to_the_input_leaves_the_weights_alone(ranks: dict, plain: dict, stage: int) -> None:
    for worst, gradients in call(ranks[2], pull_back_then_train, stage):
        assert worst < 1e-5
        assert relative(gradients, plain["gradients"]) < 1e-5


def frozen_sharded(rank: int, world_size: int, dtype: str) -> tuple[float, int]:
    engine = FrozenEngine(Toy, weights=Weights(), zero_stage=3, dtype=dtype)
    assert not any(parameter.requires_grad for parameter in engine.module.parameters())
    worst = pull_back(engine.module, rank, world_size)
    return worst, engine.module.middle.weight.numel() + engine.module.middle.weight.ds_tensor.numel()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_sharded_frozen_model_passes_gradients_to_its_input(
    ranks: dict, dtype: str, tolerance: float
) -> None:
    for worst, held in call(ranks[2], frozen_sharded, dtype):
        assert worst < tolerance
        assert held == 320 * 330 // 2


def nonfinite(rank: int, world_size: int, stage: int) -> tuple:
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, zero_stage=stage), weights=Weights())
    extra, x, y = batches()[0]
    # One rank's loss is infinite: every rank has to notice.
    scale = math.inf if rank == 0 else 1.0
    engine.backward(scale * loss_of(engine.module, extra, x[rank::world_size], y[rank::world_size]))
    result = engine.step()
    weights, version = exported(engine), engine.version
    return result, version, weights, update(engine, rank, world_size, extra, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_changes_nothing(ranks: dict, plain: dict, stage: int) -> None:
    for rank, (result, version, weights, (_, norm, _)) in enumerate(call(ranks[2], nonfinite, stage)):
        assert (result.grad_norm, result.stepped, version) == (math.inf, False, 0)
        assert norm == pytest.approx(plain["norms"][0], rel=1e-5)
        if rank == 0:
            assert all(torch.equal(weights[name], tensor) for name, tensor in Weights().tensors.items())


def broken(rank: int, world_size: int, stage: int, directory: str) -> dict[str, str]:
    """What saving and exporting say where one number of rank 0 is not finite; no rank waits for one that
    failed."""
    engine = TrainEngine(Toy, EngineConfig(**LEARNING, zero_stage=stage), weights=Weights())
    update(engine, rank, world_size, *batches()[0])
    piece = engine._zero.slices["middle.weight"]
    said = {}
    for key, tensor in {
        "value": piece.value,
        "exp_avg_sq": engine._zero.moment(piece, "exp_avg_sq"),
        "ema": engine._ema["middle.weight"],
    }.items():
        kept = tensor.clone()
        if rank == 0:
            tensor[0] = math.nan
        with pytest.raises(FloatingPointError) as caught:
            save(engine, Path(directory) / key)
        said[key] = str(caught.value)
        if key != "exp_avg_sq":
            with pytest.raises(FloatingPointError, match=r"middle\.weight is not finite"):
                exported(engine, ema=key == "ema")
        tensor.copy_(kept)
    save(engine, Path(directory) / "sound")
    return said


@pytest.mark.slow
@pytest.mark.parametrize("stage", (0, 2))
def test_what_is_not_finite_is_neither_saved_nor_exported(ranks: dict, tmp_path: Path, stage: int) -> None:
    for said in call(ranks[2], broken, stage, str(tmp_path)):
        assert said == {key: f"the {key} of middle.weight is not finite" for key in said}
    assert [path.name for path in tmp_path.iterdir()] == ["sound"]


def freeze(rank: int, world_size: int, stage: int, directory: str) -> dict[str, Tensor]:
    config = EngineConfig(**LEARNING, zero_stage=stage)

    def build() -> Toy:
        toy = Toy()
        toy.middle.requires_grad_(False)
        return toy

    engine = TrainEngine(build, config, weights=Weights())
    update(engine, rank, world_size, *batches()[0])
    save(engine, directory)
    engine = TrainEngine(build, config, weights=Weights())
    engine.load(directory)
    return exported(engine, ema=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_stay_and_come_from_the_given_weights_again(
    ranks: dict, tmp_path: Path, stage: int
) -> None:
    weights = call(ranks[2], freeze, stage, str(tmp_path))[0]
    unchanged = {name for name, tensor in Weights().tensors.items() if torch.equal(weights[name], tensor)}
    assert unchanged == {"middle.weight", "middle.bias"}


def build_with(rank: int, world_size: int, stage: int, changes: dict) -> str:
    try:
        TrainEngine(Toy, EngineConfig(learning_rate=1e-3, zero_stage=stage), weights=Weights(**changes))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_do_not_fit_are_refused_by_every_rank(ranks: dict, stage: int) -> None:
    other_names = {"first.bias": None, "head.bias": torch.zeros(8)}
    assert all(
        "lack first.bias (1) and have unknown head.bias (1)" in text
        for text in call(ranks[2], build_with, stage, other_names)
    )
    other_shape = {"first.bias": torch.zeros(7)}
    sentence = "the given weights have first.bias of shape [7] and the model needs [320]"
    assert call(ranks[2], build_with, stage, other_shape) == [sentence] * 2


def test_a_replicated_frozen_model_needs_no_group() -> None:
    engine = FrozenEngine(Toy, weights=Weights())
    assert pull_back(engine.module, 0, 1) < 1e-6
    assert {
        parameter.dtype
        for parameter in FrozenEngine(Toy, weights=Weights(), dtype="bf16").module.parameters()
    } == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"first\.bias of shape"):
        FrozenEngine(Toy, weights=Weights(**{"first.bias": torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"use 0 \(replicated\) or 3 \(sharded\)"):
        FrozenEngine(Toy, weights=Weights(), zero_stage=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_stage": 5}, "zero_stage is 5: use 0, 1, 2 or 3"),
        ({"zero_stage": 0, "offload": True}, "offload needs"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_start": -1}, "ema_start is -1"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**({"learning_rate": 1e-3} | settings))
