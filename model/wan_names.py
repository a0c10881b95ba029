"""The Wan transformer's parameter names, ours being those of the Wan 2.1 release, in other libraries' words.

diffusers (`WanTransformer3DModel`) names the same tensors otherwise and lays each out alike, so a checkpoint
is renamed and never reshaped. What training wrappers put into a name is taken out of it.
"""

import re
from collections.abc import Mapping

_MODULES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
}
_IN_BLOCK = {
    "norm3": "norm2",  # the norm before the cross-attention; diffusers' norm3 has no weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{ours}.{part}": f"{theirs}.{other}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, other in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}
_BACK = {theirs: ours for ours, theirs in _MODULES.items()}
_BACK_IN_BLOCK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_OUTER = re.compile(r"^(?:module|model|diffusion_model|transformer|base_model)\.")

IMAGE_CONDITIONED = re.compile(r"img_emb|image_embedder|k_img|v_img|add_k_proj|add_v_proj")
"""What is in the names of weights that only image-conditioned Wan models have."""


def unwrapped(name: str) -> str:
    """A name without what FSDP, activation checkpointing, `torch.compile` and outer modules put into it."""
    name = _WRAPPERS.sub("", name)
    while (bare := _OUTER.sub("", name)) != name:
        name = bare
    return name


def from_diffusers(name: str) -> str:
    """Ours of a name of diffusers'; names that neither library has stay as they are."""
    return _renamed(
        name, _BACK, _BACK_IN_BLOCK, "scale_shift_table", {"scale_shift_table": "head.modulation"}
    )


def to_diffusers(name: str) -> str:
    """diffusers' of a name of ours; names that neither library has stay as they are."""
    return _renamed(name, _MODULES, _IN_BLOCK, "modulation", {"head.modulation": "scale_shift_table"})


def _renamed(
    name: str, outer: Mapping[str, str], in_block: Mapping[str, str], table: str, whole: Mapping[str, str]
) -> str:
    if name in whole:
        return whole[name]
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        block, rest = match.groups()
        if rest == table:
            return block + ("modulation" if table == "scale_shift_table" else "scale_shift_table")
        module, leaf = _split(rest, in_block)
        return f"{block}{module}{leaf}"
    module, leaf = _split(name, outer)
    return f"{module}{leaf}"


def _split(name: str, known: Mapping[str, str]) -> tuple[str, str]:
    """The new name of the longest module in front of `name` that is known, and the rest."""
    module = name
    while module and module not in known:
        module = module.rpartition(".")[0]
    return (known[module], name[len(module) :]) if module else (name, "")
