"""Text tower: RoBERTa (arXiv:1907.11692) with room for the image in its upper layers.

The model specification, section 2.

Letters: P captions, T tokens, D text width, B images, S image tokens, C image width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fiber_d2.layers import LayerNorm, Linear, call_block

from .pairs import of_pairs

# Name of the learnt addition to the embeddings. Checkpoints may lack it: it starts at zero.
PROMPT = "embeddings.prompt"


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections around scaled dot-product attention.

    Args:
        dim: width D of queries and of the result.
        num_heads: heads; D must be a multiple.
        context_dim: width of the tokens that give keys and values.
        dropout: on attention probabilities and on the output, in training.
    """

    def __init__(self, *, dim: int, num_heads: int, context_dim: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Text width {dim} is not a multiple of {num_heads} heads.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(dim, dim)
        self.key = Linear(context_dim, dim)
        self.value = Linear(context_dim, dim)
        self.dense = Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: torch.Tensor | None,
        context_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` (P, T, D), ``context`` (B, S, C), ``mask`` bool (P, S) or None, ``context_index``
        (P,) as of :func:`~fiber_d2.modeling.pairs.of_pairs` -> (P, T, D)."""

        def split(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split(self.query(x)),
            of_pairs(split(self.key(context)), context_index),
            of_pairs(split(self.value(context)), context_index),
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended = self.dense(attended.transpose(1, 2).flatten(2))
        return F.dropout(attended, self.dropout, self.training)


class ImageToTextAttention(nn.Module):
    """Text side of the exchange: tokens read the whole image, scaled by a learnt ``alpha``."""

    def __init__(
        self, *, dim: int, num_heads: int, image_dim: int, dropout: float, alpha_init: float
    ) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            dim=dim, num_heads=num_heads, context_dim=image_dim, dropout=dropout
        )
        self.alpha = nn.Parameter(torch.full((1,), float(alpha_init)))

    def forward(
        self, x: torch.Tensor, image: torch.Tensor, image_index: torch.Tensor | None
    ) -> torch.Tensor:
        """``x`` (P, T, D), ``image`` (B, S, C), ``image_index`` (P,) -> (P, T, D): no token of the
        image is masked."""
        return x + self.alpha * self.attention(x, image, None, image_index)


class RobertaLayer(nn.Module):
    """Post-norm transformer layer; fused ones read the image between attention and residual."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        norm_eps: float,
        image_dim: int | None,
        alpha_init: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention = MultiHeadAttention(
            dim=dim, num_heads=num_heads, context_dim=dim, dropout=dropout
        )
        self.image_attention = (
            None
            if image_dim is None
            else ImageToTextAttention(
                dim=dim,
                num_heads=num_heads,
                image_dim=image_dim,
                dropout=dropout,
                alpha_init=alpha_init,
            )
        )
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.fc1 = Linear(dim, mlp_dim)
        self.fc2 = Linear(mlp_dim, dim)
        self.norm2 = LayerNorm(dim, eps=norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        image: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x`` (P, T, D), ``mask`` bool (P, T), for fused layers ``image`` (B, S, C) and, where
        several captions share an image, ``image_index`` (P,)."""
        attended = self.attention(x, x, mask)
        if self.image_attention is not None:
            attended = self.image_attention(attended, image, image_index)
        x = self.norm1(attended + x)
        hidden = self.fc2(F.gelu(self.fc1(x)))
        return self.norm2(F.dropout(hidden, self.dropout, self.training) + x)


class RobertaEmbeddings(nn.Module):
    """Word, position and token-type embeddings; positions count the real tokens.

    Where ``prompt_length`` is not 0, row t of the parameter ``prompt`` is added to what comes out
    at place t of the caption, special tokens included. It starts at zero.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        max_positions: int,
        pad_token_id: int,
        dropout: float,
        norm_eps: float,
        prompt_length: int = 0,
    ) -> None:
        super().__init__()
        self.pad_token_id = pad_token_id
        self.dropout = dropout
        self.word = nn.Embedding(vocab_size, dim, padding_idx=pad_token_id)
        self.position = nn.Embedding(max_positions, dim, padding_idx=pad_token_id)
        self.token_type = nn.Embedding(1, dim)
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.prompt = nn.Parameter(torch.zeros(prompt_length, dim)) if prompt_length else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 ``(P, T)`` to ``(P, T, D)``."""
        real = (input_ids != self.pad_token_id).long()
        positions = real.cumsum(dim=1) * real + self.pad_token_id
        x = self.word(input_ids) + self.position(positions) + self.token_type.weight[0]
        x = F.dropout(self.norm(x), self.dropout, self.training)
        return x if self.prompt is None else x + self.prompt[: x.shape[1]]


class RobertaEncoder(nn.Module):
    """The tower's parts; :class:`~fiber_d2.modeling.fusion.FusionBackbone` sets the order.

    Args:
        vocab_size: entries of the tokenizer.
        dim, num_layers, num_heads, mlp_dim: the usual sizes.
        max_positions: longest caption plus 2 (positions start after the padding index).
        image_dims: width of the image tokens that each of the last ``len(image_dims)`` layers
            reads, in order; the layers before them read text alone.
        dropout: hidden and attention dropout in training.
        pad_token_id: vocabulary index of the padding.
        norm_eps: of every LayerNorm.
        alpha_init: initial weight of the image in fused layers.
        init_std: of the initial weights of linear layers and of the embeddings.
        word_init_std, position_init_std: of the embeddings of words and of their places; None takes
            ``init_std``. Where training starts from scratch, larger ones let the word outweigh its
            place, and both the embedding of the type, which all tokens have in common.
        prompt_length: rows of a learnt addition to the embeddings, for prompt tuning (see
            :mod:`fiber_d2.engine.tuning`); 0 for none. At least ``max_tokens``.
        checkpoint: keep the inputs of each layer in training, and compute the layer again in the
            backward pass.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 50265,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        max_positions: int = 514,
        image_dims: Sequence[int] = (512, 512, 512, 512, 1024, 1024),
        dropout: float = 0.1,
        pad_token_id: int = 1,
        norm_eps: float = 1e-5,
        alpha_init: float = 0.0,
        init_std: float = 0.02,
        word_init_std: float | None = None,
        position_init_std: float | None = None,
        prompt_length: int = 0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(image_dims) > num_layers:
            raise ValueError(
                f"{len(image_dims)} fused text layers do not fit in {num_layers} layers."
            )
        self.dim = dim
        self.pad_token_id = pad_token_id
        self.checkpoint = checkpoint
        self.num_text_only = num_layers - len(image_dims)
        self.embeddings = RobertaEmbeddings(
            vocab_size=vocab_size,
            dim=dim,
            max_positions=max_positions,
            pad_token_id=pad_token_id,
            dropout=dropout,
            norm_eps=norm_eps,
            prompt_length=prompt_length,
        )
        if prompt_length and prompt_length < self.max_tokens:
            raise ValueError(
                f"prompt_length is {prompt_length}, but captions may have {self.max_tokens} "
                "tokens, and each needs a row."
            )
        self.layers = nn.ModuleList(
            RobertaLayer(
                dim=dim,
                num_heads=num_heads,
                mlp_dim=mlp_dim,
                dropout=dropout,
                norm_eps=norm_eps,
                image_dim=image_dim,
                alpha_init=alpha_init,
            )
            for image_dim in (None,) * self.num_text_only + tuple(image_dims)
        )
        for module in self.modules():
            _init_weights(module, init_std)
        if word_init_std is not None:
            _init_weights(self.embeddings.word, word_init_std)
        if position_init_std is not None:
            _init_weights(self.embeddings.position, position_init_std)

    def call(self, layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """``layer(*inputs)`` of one of the tower's layers, as ``checkpoint`` says."""
        return call_block(layer, *inputs, recompute=self.checkpoint)

    def text_only(self) -> list[nn.Module]:
        """What a caption passes before it meets an image, in order."""
        return [self.embeddings, *self.layers[: self.num_text_only]]

    @property
    def max_tokens(self) -> int:
        """Longest caption the position embeddings hold."""
        return self.embeddings.position.num_embeddings - self.pad_token_id - 1


def _init_weights(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
