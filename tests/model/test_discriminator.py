"""The classification branch against a naive one, and which weights its gradient reaches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.discriminator import BranchConfig, Discriminator
from model.objectives.gan import discriminator_loss, gradient_penalty, relativistic_discriminator_loss
from model.transformer import WanTransformer
from tests.model.reference import CONFIG, HEIGHT, WIDTH, difference, normal, prompt, tiny_model

SHAPE = (2, 3, CONFIG.in_dim, HEIGHT, WIDTH)
TIMESTEP = torch.tensor([900.0, 30.0])
BRANCHES = [
    BranchConfig((0, 1)),
    BranchConfig((1,), num_class=3, concat_time=True),
    BranchConfig((1, 0, 1), num_class=2, concat_time=True),
]


def tiny_critic(branch: BranchConfig, *, activation_checkpointing: bool = False) -> Discriminator:
    """A critic whose weights are all random."""
    network = WanTransformer(CONFIG, activation_checkpointing=activation_checkpointing)
    critic = Discriminator(network, branch, activation_checkpointing=activation_checkpointing)
    critic.transformer.load_state_dict(tiny_model().state_dict())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in critic.branch.parameters():
            spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return critic


def naive_logits(critic: Discriminator, branch: BranchConfig, x: Tensor) -> Tensor:
    """The branch's formula, sample by sample and head by head."""
    seen: list[Tensor] = []
    times: list[Tensor] = []
    transformer, weights = critic.transformer, dict(critic.branch.named_parameters())
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        for block in transformer.blocks
    ]
    hooks.append(
        transformer.time_embedding.register_forward_hook(lambda module, args, out: times.append(out))
    )
    transformer(x, TIMESTEP, prompt(len(x)))
    for hook in hooks:
        hook.remove()
    size, head = CONFIG.dim, CONFIG.dim // CONFIG.num_heads

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def rms(name: str, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    logits = []
    for sample in range(len(x)):
        features = []
        for index, tap in enumerate(branch.taps):
            name = f"gan_ca_blocks.{index}"
            register = rms("register_tokens.rms_norm", weights["register_tokens.register_tokens"][index])
            hidden = F.layer_norm(
                seen[tap][sample],
                (size,),
                weights[f"{name}.norm3.weight"],
                weights[f"{name}.norm3.bias"],
                1e-6,
            )
            query = rms(f"{name}.cross_attn.norm_q", linear(f"{name}.cross_attn.q", register))
            key = rms(f"{name}.cross_attn.norm_k", linear(f"{name}.cross_attn.k", hidden))
            value = linear(f"{name}.cross_attn.v", hidden)
            read = [
                torch.softmax(key[:, span] @ query[span] / head**0.5, 0) @ value[:, span]
                for span in (slice(start, start + head) for start in range(0, size, head))
            ]
            a = register + linear(f"{name}.cross_attn.o", torch.cat(read))
            inner = F.gelu(linear(f"{name}.ffn.0", F.layer_norm(a, (size,), eps=1e-6)), approximate="tanh")
            features.append(a + linear(f"{name}.ffn.2", inner))
        if branch.concat_time:
            features.append(10 * times[0][sample])
        whole = torch.cat(features)
        normed = F.layer_norm(
            whole, whole.shape, weights["cls_pred_branch.0.weight"], weights["cls_pred_branch.0.bias"], 1e-5
        )
        logits.append(linear("cls_pred_branch.3", F.silu(linear("cls_pred_branch.1", normed))))
    return torch.stack(logits)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: str(branch.taps))
@torch.no_grad()
def test_logits_are_the_formula_and_velocity_is_the_transformers(branch: BranchConfig) -> None:
    critic, x = tiny_critic(branch), normal(*SHAPE)
    velocity, logits = critic(x, TIMESTEP, prompt(2))
    assert torch.equal(velocity, critic.transformer(x, TIMESTEP, prompt(2)).velocity)
    assert logits.shape == (2, branch.num_class)
    assert difference(logits, naive_logits(critic, branch, x)) < 1e-5


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: str(branch.taps))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_every_weight(branch: BranchConfig, checkpointing: bool) -> None:
    critic = tiny_critic(branch, activation_checkpointing=checkpointing)
    _, fake = critic(normal(*SHAPE), TIMESTEP, prompt(2))
    _, real = critic(normal(*SHAPE, seed=1), TIMESTEP, prompt(2))
    discriminator_loss(fake, real).backward()
    untouched = {
        name for name, weight in critic.named_parameters() if weight.grad is None or not weight.grad.any()
    }
    assert untouched == {
        "transformer.head.head.weight",
        "transformer.head.head.bias",
        "transformer.head.modulation",
    }


def test_blocks_after_the_last_tap_learn_from_the_velocity_only() -> None:
    critic = tiny_critic(BranchConfig((0,)))
    velocity, logits = critic(normal(*SHAPE), TIMESTEP, prompt(2))
    last = list(critic.transformer.blocks[1].parameters())
    grads = torch.autograd.grad(logits.sum(), last, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in grads)
    assert all(gradient.any() for gradient in torch.autograd.grad(velocity.square().sum(), last))


def test_penalties_and_relativistic_pairs_cancel_the_last_bias() -> None:
    critic, x = tiny_critic(BranchConfig((0, 1))), normal(*SHAPE)
    (_, fake), (_, real), (_, perturbed) = (
        critic(video, TIMESTEP, prompt(2)) for video in (x, normal(*SHAPE, seed=1), x + 0.1)
    )
    loss = relativistic_discriminator_loss(fake, real) + gradient_penalty(perturbed, fake, 0.1)
    bias, weight = critic.branch.cls_pred_branch[-1].bias, critic.branch.cls_pred_branch[-1].weight
    of_bias, of_weight = torch.autograd.grad(loss, (bias, weight))
    assert of_bias.abs().max() < 1e-5 * of_weight.abs().max()


def test_bfloat16_gives_logits_in_float32() -> None:
    critic, x = tiny_critic(BranchConfig((0, 1), concat_time=True)), normal(*SHAPE)
    _, exact = critic(x, TIMESTEP, prompt(2))
    _, logits = critic.bfloat16()(x, TIMESTEP, prompt(2))
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 0.1


def test_norms_can_be_left_out() -> None:
    critic = Discriminator(
        WanTransformer(replace(CONFIG, qk_norm=False, cross_attn_norm=False)), BranchConfig((0,))
    )
    named = {name for name, _ in critic.branch.named_parameters() if "norm" in name}
    assert named == {"register_tokens.rms_norm.weight"}


@pytest.mark.parametrize(
    ("branch", "words"),
    [
        ({"taps": ()}, "taps is empty"),
        ({"taps": (0, 2)}, r"taps \(0, 2\) name blocks \[2\].*from 0 to 1"),
        ({"taps": (-1,)}, r"blocks \[-1\].*from 0 to 1"),
        ({"taps": (0,), "num_class": 0}, "num_class is 0; it must be at least 1"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(branch: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Discriminator(WanTransformer(CONFIG), BranchConfig(**branch))


def test_a_checkpointed_branch_keeps_no_more_than_what_it_reads() -> None:
    """Bytes that are kept for the backward pass; the gradients are the same (above)."""
    branch = tiny_critic(BRANCHES[0]).branch
    tokens = 4096
    hidden = [normal(2, tokens, CONFIG.dim, seed=tap).requires_grad_() for tap in range(2)]
    kept = {}
    for recompute in (False, True):
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            branch(hidden, torch.zeros(2, CONFIG.dim), recompute=recompute)
        kept[recompute] = sum(seen.values())
    one = hidden[0].nbytes
    # The hidden states themselves are there in any case.
    assert kept[True] < 2.1 * one < 8 * one < kept[False]
