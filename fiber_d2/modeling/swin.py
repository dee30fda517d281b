"""Vision tower: Swin transformer (arXiv:2103.14030) with room for text in its window attention.

The model specification, section 2.

Letters: B images, P image-caption pairs, H x W tokens of a stage, C its width, T text tokens.
Token maps are channel-last, ``(B, H, W, C)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import nn

from fiber_d2.layers import LayerNorm, Linear, call_block

from .pairs import of_pairs
from .windows import from_windows, shift_regions, to_windows, window_attention

NORM_EPS = 1e-5


class TextToWindowAttention(nn.Module):
    """Image side of the exchange: image tokens read the caption.

    ``x + alpha * proj(attention(query(x), key(text), value(text)))``; every token reads the whole
    text, so windows play no part in it.

    Args:
        dim: width C of the image tokens.
        text_dim: width D of the text tokens.
        num_heads: heads of the block.
        query_norm: LayerNorm before the query projection (FIBER v3).
        alpha_init: where ``alpha`` starts.
    """

    def __init__(
        self, *, dim: int, text_dim: int, num_heads: int, query_norm: bool, alpha_init: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = LayerNorm(dim, eps=NORM_EPS) if query_norm else nn.Identity()
        self.query = Linear(dim, dim)
        self.key_value = Linear(text_dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha_init)))

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` (B, H, W, C), ``text`` (P, T, D), ``text_mask`` bool (P, T), ``image_index`` (P,)
        as of :func:`~fiber_d2.modeling.pairs.of_pairs` -> (P, H, W, C)."""
        query = self.query(self.norm(x)).flatten(1, 2).unflatten(-1, (self.num_heads, -1))
        x, query = of_pairs(x, image_index), of_pairs(query, image_index)
        key_value = self.key_value(text).unflatten(-1, (2, self.num_heads, -1))
        key, value = key_value.permute(2, 0, 3, 1, 4)  # each (P, heads, T, C/heads)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=text_mask[:, None, None, :]
        )
        attended = attended.transpose(1, 2).flatten(2).view(x.shape)
        return x + self.alpha * self.proj(attended)


class WindowAttention(nn.Module):
    """Multi-head self-attention within (shifted) windows, with relative position bias.

    Args:
        dim: width C.
        window: window side in tokens, kept also on smaller maps.
        shift: cyclic shift in tokens, 0 for none.
        num_heads: attention heads.
        text_attention: what the result goes through in fused blocks, None for image-only ones.
        position_bias_std: of the initial relative position biases.
    """

    relative_position_index: torch.Tensor

    def __init__(
        self,
        *,
        dim: int,
        window: int,
        shift: int,
        num_heads: int,
        text_attention: nn.Module | None,
        position_bias_std: float,
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, num_heads)
        )
        position = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        delta = position[:, :, None] - position[:, None, :] + window - 1  # (2, N, N)
        index = delta[0] * (2 * window - 1) + delta[1]
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.text_attention = text_attention
        # timm counts its bounds in absolute values, not in deviations.
        bound = 9 * position_bias_std
        trunc_normal_(self.relative_position_bias_table, std=position_bias_std, a=-bound, b=bound)

    def position_bias(self) -> torch.Tensor:
        """What is added to the scores of every window, ``(heads, N, N)``."""
        # Indexing the table by brackets adds up its gradients many times slower.
        index = self.relative_position_index
        bias = self.relative_position_bias_table.index_select(0, index.flatten())
        return bias.t().unflatten(1, index.shape).contiguous()

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` (B, H, W, C), without text to the same; for the rest see
        :class:`TextToWindowAttention`."""
        height, width = x.shape[1:3]
        window, shift = self.window, self.shift
        x = to_windows(x, window, shift)
        regions = shift_regions(*x.shape[1:3], window, shift, x.device) if shift else None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        x = window_attention(qkv, self.position_bias(), regions)
        # What follows is done token by token, so padding is of no more use.
        x = self.proj(from_windows(x, window, shift, height, width))
        if self.text_attention is None:
            return x
        return self.text_attention(x, text, text_mask, image_index)


class Mlp(nn.Module):
    """Two linear layers with GELU between them, ``(..., C)`` to the same."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """(Shifted) window attention and MLP, both with residual.

    Args:
        dim: width C.
        num_heads: attention heads.
        window: window side in tokens, kept also on smaller maps.
        shift: cyclic shift in tokens, 0 for none.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability that the whole attention branch (text included) or the MLP branch
            is dropped for a sample in training.
        text_attention: module for fused blocks, None for image-only ones.
        position_bias_std: of the initial relative position biases.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window: int,
        shift: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        text_attention: nn.Module | None = None,
        position_bias_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = WindowAttention(
            dim=dim,
            window=window,
            shift=shift,
            num_heads=num_heads,
            text_attention=text_attention,
            position_bias_std=position_bias_std,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` (B, H, W, C), without text to the same. Fused blocks take ``text`` (P, T, D),
        ``text_mask`` bool (P, T) and, where several captions share an image, ``image_index`` (P,),
        and return (P, H, W, C); what precedes the text is computed once per image."""
        attended = self.attn(self.norm1(x), text, text_mask, image_index)
        x = of_pairs(x, image_index) + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halves height and width, doubles the width of the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, eps=NORM_EPS)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, H, W, C)`` with even H and W to ``(B, H/2, W/2, 2C)``."""
        # Neighbours in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        # The residual stream of the next stage: float32 under autocast, too.
        return self.reduction(self.norm(x)).to(self.norm.weight.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, with LayerNorm."""

    def __init__(self, *, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = LayerNorm(dim, eps=NORM_EPS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` to ``(B, H/patch, W/patch, C)``."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class SwinStage(nn.Module):
    """Blocks of one resolution, and the merging that leads to the next one (or None)."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformer(nn.Module):
    """The tower's parts; :class:`~fiber_d2.modeling.fusion.FusionBackbone` sets the order.

    Args:
        embed_dim: width of stage 1, doubled by every later stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        window: window side in tokens.
        fused_blocks: per stage, how many of its last blocks read the text.
        text_dim: width of the text tokens those blocks read.
        query_norm: the extra LayerNorm of FIBER v3.
        alpha_init: initial weight of the text in fused blocks; 0, the published choice, leaves
            pre-trained towers undisturbed.
        mlp_ratio: hidden width of the MLPs over the block's.
        drop_path: rate of the last block; grows linearly from 0 over all blocks.
        patch_size: side of a patch in pixels.
        in_channels: image channels.
        init_std: of the initial weights of linear layers.
        position_bias_std: of the initial relative position biases. Larger ones give every head a
            pattern of places to look at from the first step.
        frozen_stages: -1 trains all; 0 and 1 freeze the patch embedding; n >= 2 also stages 1..n-1
            (counted from 1, their patch merging included), so 2 freezes one stage. The number
            means what the original's FREEZE_CONV_BODY_AT does: 2 in pre-training and for ODinW,
            -1 in the other fine-tunings. Frozen parts are in evaluation mode: no drop path.
        checkpoint: keep the input of each block in training, and compute the block again in the
            backward pass.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window: int = 12,
        fused_blocks: Sequence[int] = (0, 0, 4, 2),
        text_dim: int = 768,
        query_norm: bool = False,
        alpha_init: float = 0.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.4,
        patch_size: int = 4,
        in_channels: int = 3,
        init_std: float = 0.02,
        position_bias_std: float = 0.02,
        frozen_stages: int = -1,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(fused_blocks):
            raise ValueError(
                f"depths {tuple(depths)}, num_heads {tuple(num_heads)} and fused_blocks "
                f"{tuple(fused_blocks)} must name the same number of stages."
            )
        for stage, (depth, fused) in enumerate(zip(depths, fused_blocks)):
            if not 0 <= fused <= depth:
                raise ValueError(
                    f"Stage {stage + 1} has {depth} blocks, {fused} of them cannot be fused."
                )
        self.patch_size = patch_size
        self.depths = tuple(depths)
        self.fused_blocks = tuple(fused_blocks)
        self.dims = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.frozen_stages = frozen_stages
        self.checkpoint = checkpoint
        # Numbers, wherever the weights are made (on the meta device, say).
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        self.patch_embed = PatchEmbed(patch_size=patch_size, in_channels=in_channels, dim=embed_dim)
        stages = []
        for stage, dim in enumerate(self.dims):
            blocks = []
            for block in range(depths[stage]):
                fused = block >= depths[stage] - fused_blocks[stage]
                blocks.append(
                    SwinBlock(
                        dim=dim,
                        num_heads=num_heads[stage],
                        window=window,
                        shift=window // 2 if block % 2 else 0,
                        mlp_ratio=mlp_ratio,
                        drop_path=rates[sum(depths[:stage]) + block],
                        text_attention=TextToWindowAttention(
                            dim=dim,
                            text_dim=text_dim,
                            num_heads=num_heads[stage],
                            query_norm=query_norm,
                            alpha_init=alpha_init,
                        )
                        if fused
                        else None,
                        position_bias_std=position_bias_std,
                    )
                )
            last = stage == len(depths) - 1
            stages.append(SwinStage(blocks, None if last else PatchMerging(dim)))
        self.stages = nn.ModuleList(stages)
        # Outputs of every stage but the first are normalised for the pyramid.
        self.out_norms = nn.ModuleList(LayerNorm(dim, eps=NORM_EPS) for dim in self.dims[1:])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def call(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """``block(*inputs)`` of one of the tower's blocks, as ``checkpoint`` says."""
        return call_block(block, *inputs, recompute=self.checkpoint)

    def _frozen_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = []
        if self.frozen_stages >= 0:
            modules.append(self.patch_embed)
        if self.frozen_stages >= 2:
            modules.extend(self.stages[: self.frozen_stages - 1])
        return modules

    def train(self, mode: bool = True) -> SwinTransformer:
        """As usual, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self
