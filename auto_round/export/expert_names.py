"""How the checkpoints of some families name single experts, where Transformers' modules have other names.

Engines look layers up by these names, and Transformers knows them too: it renames what it reads (its
`conversion_mapping`, here as of 5.23). Families that are not listed have the modules' names, `experts.0.gate_proj`.
"""

from __future__ import annotations

from auto_round.export.model_rules import PLAIN, ModelRules, Renames

W123: Renames = (
    (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."), (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
    (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
)  # fmt: skip
_SPARSE = (r"\.mlp\.", ".block_sparse_moe.")

# model type -> renames of tensors; all of them call the matrices of an expert w1, w2 and w3.
EXPERT_NAMES: dict[str, Renames] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), (_SPARSE, *W123)),
    "phimoe": (_SPARSE, (r"_moe\.router\.", "_moe.gate."), *W123),
    "lfm2_moe": W123,
}


def packed_rules(model_type: str) -> ModelRules:
    """The rules of formats whose packed tensors have names of their own, such as `qweight`.

    Transformers joins the dense `experts.*.w1.weight` of these families into one tensor a block, which a block with
    packed experts does not have. Dense experts there keep the modules' names, which it leaves alone.
    """
    renames = EXPERT_NAMES.get(model_type)
    if renames is None:
        return PLAIN
    return ModelRules(renames=renames, beside_packed=tuple(entry for entry in renames if entry not in W123))
