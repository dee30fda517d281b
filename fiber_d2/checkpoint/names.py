"""Names of the original's weights and of ours: one table, read in both directions.

``{i}`` stands for a number, ``{i+2}`` for the same number plus two, ``*`` for ``weight`` or
``bias``. Every row is a pure renaming; the one entry that is also reshaped (the scales of the
levels) is treated in :mod:`fiber_d2.checkpoint.convert`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Table = Sequence[tuple[str, str]]

SWIN = "fusion_backbone.backbone.body."
ROBERTA = "fusion_backbone.language_backbone.body.model."
FPN = "fusion_backbone.backbone.fpn."
HEAD = "rpn.head."
CELL_ANCHORS = "rpn.anchor_generator.cell_anchors."

OUR_SWIN = "backbone.swin."
OUR_ROBERTA = "backbone.text."

# Names as in Microsoft's Swin, relative to the tower.
SWIN_TABLE: Table = (
    ("patch_embed.proj.*", "patch_embed.proj.*"),
    ("patch_embed.norm.*", "patch_embed.norm.*"),
    ("layers.{i}.blocks.{j}.norm1.*", "stages.{i}.blocks.{j}.norm1.*"),
    ("layers.{i}.blocks.{j}.norm2.*", "stages.{i}.blocks.{j}.norm2.*"),
    (
        "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
        "stages.{i}.blocks.{j}.attn.relative_position_bias_table",
    ),
    ("layers.{i}.blocks.{j}.attn.qkv.*", "stages.{i}.blocks.{j}.attn.qkv.*"),
    ("layers.{i}.blocks.{j}.attn.proj.*", "stages.{i}.blocks.{j}.attn.proj.*"),
    ("layers.{i}.blocks.{j}.mlp.fc1.*", "stages.{i}.blocks.{j}.mlp.fc1.*"),
    ("layers.{i}.blocks.{j}.mlp.fc2.*", "stages.{i}.blocks.{j}.mlp.fc2.*"),
    ("layers.{i}.downsample.reduction.weight", "stages.{i}.downsample.reduction.weight"),
    ("layers.{i}.downsample.norm.*", "stages.{i}.downsample.norm.*"),
)
# What FIBER adds to it: output norms of stages 2 to 4 and the reading of text.
SWIN_FUSION_TABLE: Table = (
    ("norm{i+1}.*", "out_norms.{i}.*"),
    ("layers.{i}.blocks.{j}.attn.alpha_i2t", "stages.{i}.blocks.{j}.attn.text_attention.alpha"),
    ("layers.{i}.blocks.{j}.attn.norm_i2t_i.*", "stages.{i}.blocks.{j}.attn.text_attention.norm.*"),
    ("layers.{i}.blocks.{j}.attn.qkv_i2t.*", "stages.{i}.blocks.{j}.attn.text_attention.query.*"),
    (
        "layers.{i}.blocks.{j}.attn.qkv_text_i2t.*",
        "stages.{i}.blocks.{j}.attn.text_attention.key_value.*",
    ),
    ("layers.{i}.blocks.{j}.attn.proj_i2t.*", "stages.{i}.blocks.{j}.attn.text_attention.proj.*"),
)
# Names as in Hugging Face's RobertaModel, relative to the tower.
ROBERTA_TABLE: Table = (
    ("embeddings.word_embeddings.weight", "embeddings.word.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position.weight"),
    ("embeddings.token_type_embeddings.weight", "embeddings.token_type.weight"),
    ("embeddings.LayerNorm.*", "embeddings.norm.*"),
    ("encoder.layer.{i}.attention.self.query.*", "layers.{i}.attention.query.*"),
    ("encoder.layer.{i}.attention.self.key.*", "layers.{i}.attention.key.*"),
    ("encoder.layer.{i}.attention.self.value.*", "layers.{i}.attention.value.*"),
    ("encoder.layer.{i}.attention.output.dense.*", "layers.{i}.attention.dense.*"),
    ("encoder.layer.{i}.attention.output.LayerNorm.*", "layers.{i}.norm1.*"),
    ("encoder.layer.{i}.intermediate.dense.*", "layers.{i}.fc1.*"),
    ("encoder.layer.{i}.output.dense.*", "layers.{i}.fc2.*"),
    ("encoder.layer.{i}.output.LayerNorm.*", "layers.{i}.norm2.*"),
)
ROBERTA_FUSION_TABLE: Table = (
    ("encoder.layer.{i}.alpha_t2i", "layers.{i}.image_attention.alpha"),
    *(
        (
            f"encoder.layer.{{i}}.crossattention_t2i.{theirs}.*",
            f"layers.{{i}}.image_attention.attention.{ours}.*",
        )
        for theirs, ours in (
            ("self.query", "query"),
            ("self.key", "key"),
            ("self.value", "value"),
            ("output.dense", "dense"),
        )
    ),
)
FPN_TABLE: Table = (
    ("fpn_inner{i+2}.*", "laterals.{i}.*"),
    ("fpn_layer{i+2}.*", "outputs.{i}.*"),
    ("top_blocks.p6.*", "p6.*"),
    ("top_blocks.p7.*", "p7.*"),
)
HEAD_TABLE: Table = (
    ("log_scale", "log_scale"),
    ("bias_lang", "text_bias"),
    ("bias0", "prior_bias"),
    *(
        (f"dyhead_tower.{{i}}.DyConv.{index}.{theirs}.*", f"tower.{{i}}.{ours}.*")
        for index, name in enumerate(("from_coarser", "same_level", "from_finer"))
        for theirs, ours in (("conv", name), ("bn", f"{name}.norm"))
    ),
    # The layers at odd places of these two sequences have no weights.
    ("dyhead_tower.{i}.AttnConv.1.*", "tower.{i}.scale_attention.*"),
    ("dyhead_tower.{i}.relu.fc.0.*", "tower.{i}.activation.fc1.*"),
    ("dyhead_tower.{i}.relu.fc.2.*", "tower.{i}.activation.fc2.*"),
    ("dyhead_tower.{i}.offset.*", "tower.{i}.offset.*"),
    ("bbox_pred.*", "bbox_pred.*"),
    ("centerness.*", "centerness.*"),
    ("dot_product_projection_text.*", "text_projection.*"),
    # One number per level there, one vector here: see convert.
    ("scales.{i}.scale", "scales.{i}"),
)


def with_prefixes(table: Table, theirs: str, ours: str) -> Table:
    """The rows of ``table``, each side under its prefix."""
    return tuple((theirs + row[0], ours + row[1]) for row in table)


FIBER_TABLE: Table = (
    # Where the text was tuned by a learnt addition.
    ("fusion_backbone.tunable_linear.weight", f"{OUR_ROBERTA}embeddings.prompt"),
    *with_prefixes(SWIN_TABLE, SWIN, OUR_SWIN),
    *with_prefixes(SWIN_FUSION_TABLE, SWIN, OUR_SWIN),
    *with_prefixes(FPN_TABLE, FPN, "backbone.neck."),
    *with_prefixes(ROBERTA_TABLE, ROBERTA, OUR_ROBERTA),
    *with_prefixes(ROBERTA_FUSION_TABLE, ROBERTA, OUR_ROBERTA),
    *with_prefixes(HEAD_TABLE, HEAD, "head."),
)

# Entries of the original that no computation reads: a class convolution that is frozen at its
# initial values, the text tower's pooler, and constants that the sizes determine.
FIBER_UNUSED = (
    re.escape(HEAD) + r"cls_logits\.(weight|bias)",
    re.escape(ROBERTA) + r"pooler\..+",
    re.escape(ROBERTA) + r"embeddings\.position_ids",
    re.escape(SWIN) + r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)",
    re.escape(CELL_ANCHORS) + r"\d+",
)

_PLACEHOLDER = re.compile(r"\{(\w)(?:\+(\d+))?\}|(\*)")


class NameMap:
    """Renames by a table of patterns; :attr:`inverse` renames back."""

    def __init__(self, table: Table) -> None:
        self.table = tuple(table)
        self._rows = [(re.compile(_as_regex(theirs)), theirs, ours) for theirs, ours in self.table]

    @property
    def inverse(self) -> NameMap:
        return NameMap([(ours, theirs) for theirs, ours in self.table])

    def __call__(self, name: str) -> str | None:
        """The other name, or None where no pattern fits."""
        for regex, pattern, target in self._rows:
            match = regex.fullmatch(name)
            if match:
                return _fill(target, _numbers(pattern, match))
        return None


def _as_regex(pattern: str) -> str:
    parts, end = [], 0
    for found in _PLACEHOLDER.finditer(pattern):
        parts.append(re.escape(pattern[end : found.start()]))
        parts.append("(?P<leaf>weight|bias)" if found[3] else rf"(?P<{found[1]}>0|[1-9]\d*)")
        end = found.end()
    return "".join(parts) + re.escape(pattern[end:])


def _numbers(pattern: str, match: re.Match[str]) -> dict[str, str | int]:
    values: dict[str, str | int] = {}
    for found in _PLACEHOLDER.finditer(pattern):
        if found[3]:
            values["*"] = match["leaf"]
        else:
            values[found[1]] = int(match[found[1]]) - int(found[2] or 0)
    return values


def _fill(pattern: str, values: dict[str, str | int]) -> str:
    def value(found: re.Match[str]) -> str:
        if found[3]:
            return str(values["*"])
        return str(int(values[found[1]]) + int(found[2] or 0))

    return _PLACEHOLDER.sub(value, pattern)


def is_unused(name: str, patterns: Iterable[str] = FIBER_UNUSED) -> bool:
    """Whether the entry of that original name has no counterpart here on purpose."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def strip_prefixes(name: str, prefixes: Sequence[str] = ("module.", "model.")) -> str:
    """``name`` without what wrappers of the model put before it."""
    while True:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def is_fiber_name(name: str) -> bool:
    """Whether an entry is named as in the original's fine-grained stage."""
    return strip_prefixes(name).startswith(("fusion_backbone.", "rpn."))
